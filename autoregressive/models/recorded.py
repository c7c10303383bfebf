"""Decode steps recorded as CUDA graphs: one launch a step instead of hundreds.

A step is recorded once for every bucket of the cache's length, so that it reads little more than is filled. It finds
its position, its uniforms and the tokens before it in tensors that stay in place.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

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


class RecordedSteps:
    """Steps of a GPT that are recorded when they are first met; a models.generate.Steps."""

    def __init__(self, model: GPT, record: Callable[[Callable[[], None]], Graph] | None = None):
        """
        Args:
            model: in evaluation mode; its weights stay where they are.
            record: takes down what a function does, without doing it; None is CUDARecorder().
        """
        self._model = model
        self._record = record or CUDARecorder()
        self._drawings: dict[tuple, Drawing] = {}
        self._graphs: dict[tuple, Graph] = {}

    def drawing(self, batch_size: int, sampler: Sampler) -> Drawing:
        key = batch_size, sampler.guides(0)
        if key not in self._drawings:
            self._drawings[key] = Drawing(self._model, *key)
        return self._drawings[key]

    def step(self, drawing: Drawing, position: int, sampler: Sampler) -> None:
        is_guided = sampler.guides(position)
        length = min(-(-(position + 1) // BUCKET) * BUCKET, self._model.config.num_tokens)
        key = drawing, sampler, is_guided, length
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
