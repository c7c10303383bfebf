"""Decode steps recorded as CUDA graphs: one launch a step instead of hundreds.

A step is recorded once for every bucket of the cache's length, so that it reads little more than is filled. It finds
its position, its uniforms and the tokens before it in tensors that stay in place.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from autoregressive.models.cache import DecodePosition
from autoregressive.models.generate import Drawing
from autoregressive.models.gpt import GPT
from autoregressive.models.sampler import Sampler

BUCKET = 64                     # positions; a recorded step reads the cache up to the next multiple


class Graph(Protocol):
    """What was recorded."""

    def replay(self) -> None:
        """Runs it again, on the same tensors."""


class CUDARecorder:
    """Records functions as CUDA graphs that share their temporary memory, since they run one after the other."""

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy finished pictures meanwhile: what they ask of the GPU is not part of the recording.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function()
        return graph


class CalledAgain:
    """Stands in for a CUDA graph where there is no GPU: the function itself, to be called again."""

    def __init__(self, function: Callable[[], None]):
        self.replay = function


class RecordedSteps:
    """Steps of a GPT that are recorded when they are first met; a models.generate.Steps.

    It keeps the tensors and graphs of one batch size: those of the batches before go when another size comes.
    """

    def __init__(self, model: GPT, record: Callable[[Callable[[], None]], Graph] | None = None):
        """
        Args:
            model: in evaluation mode; its weights stay where they are.
            record: takes down what a function does, without doing it; None is CUDARecorder(), on a CPU CalledAgain.
        """
        self._model = model
        is_gpu = model.norm.weight.is_cuda
        self._record = record or (CUDARecorder() if is_gpu else CalledAgain)
        self._drawing: Drawing | None = None
        self._size: tuple[int, bool] | None = None              # of the drawing: batch size, whether it is guided
        self._graphs: dict[tuple, Graph] = {}

    def drawing(self, batch_size: int, sampler: Sampler) -> Drawing:
        """Returns what the recorded steps of a batch of this size read and write."""
        size = batch_size, sampler.guides(0)
        if size != self._size:
            self._graphs.clear()
            self._drawing = None                    # before there is another one
            self._drawing = Drawing(self._model, *size)
            self._size = size
        return self._drawing

    def begin(self, labels: Tensor, uniforms: Tensor, sampler: Sampler) -> Drawing:
        drawing = self.drawing(len(labels), sampler)
        # A step reads the whole bucket, and hides what is not filled by a weight of 0: 0 times NaN would be NaN.
        torch._foreach_zero_(drawing.cache.values)
        with torch.compiler.set_stance("force_eager"):          # blocks are compiled for buckets alone
            drawing.begin(self._model, labels, uniforms, sampler)
        return drawing

    def step(self, drawing: Drawing, position: int, sampler: Sampler) -> None:
        is_guided = sampler.guides(position)
        length = min(-(-(position + 1) // BUCKET) * BUCKET, self._model.config.num_tokens)
        key = sampler, is_guided, length
        if key in self._graphs:
            self._graphs[key].replay()
            return

        def step() -> None:
            drawing.step(self._model, DecodePosition.in_bucket(drawing.index, length), sampler, is_guided)

        step()                  # as it is: what libraries and compilers do at a first call cannot be recorded
        self._graphs[key] = self._record(step)


def compile_decoding(model: GPT, backend: str | Callable[..., Any] = "inductor") -> GPT:
    """Compiles what a block does in a decode step, once for all blocks of a model; in place.

    Inside a graph every kernel still costs a microsecond or two: compiled, a block has a third of them.
    """
    for layer in model.layers:
        layer.decode = torch.compile(layer.decode, dynamic=False, backend=backend)
    return model
