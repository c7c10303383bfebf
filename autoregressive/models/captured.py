"""Decode steps captured as CUDA graphs: one launch a step instead of hundreds.

A step is captured once for every bucket of the cache's length, so that it reads little more than is
filled. It finds its position, its uniforms and the tokens before it in tensors that stay in place.

Letters: B batch, T tokens.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from autoregressive.models.cache import DecodePosition
from autoregressive.models.generate import DecodeState
from autoregressive.models.gpt import GPT
from autoregressive.models.sampler import Sampler

BUCKET = 64                     # positions; a captured step reads the cache up to the next multiple


class Graph(Protocol):
    """A captured function, as torch.cuda.CUDAGraph is one."""

    def replay(self) -> None:
        """Runs it again, on the same tensors."""


class CUDACapture:
    """Captures functions as CUDA graphs that share their temporary memory.

    They can, since they run one after the other.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Graph:
        """Returns a graph of the kernels that `function` would run; none of them runs now."""
        graph = torch.cuda.CUDAGraph()
        # Another thread may copy finished pictures meanwhile; by default its CUDA calls would
        # break the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function()
        return graph


class CalledAgain:
    """A Graph where there is no GPU: the function itself, to be called again."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def replay(self) -> None:
        """Calls the function."""
        self._function()


class StepKey(NamedTuple):
    """What a step does that its tensors do not say: steps of one key share a graph."""

    sampler: Sampler
    is_guided: bool
    length: int


class CapturedSteps:
    """Steps of a GPT that are captured when they are first met; a models.generate.Steps.

    It keeps the tensors and graphs of one batch size: when a batch of another size comes, they are
    replaced.
    """

    def __init__(self, model: GPT,
                 capture: Callable[[Callable[[], None]], Graph] | None = None) -> None:
        """Prepares to capture; nothing is allocated yet.

        Args:
            model: in evaluation mode; its weights stay where they are.
            capture: makes a Graph of a function, without calling it; None is CUDACapture(), on a
                CPU CalledAgain.
        """
        self._model = model
        is_gpu = model.norm.weight.is_cuda
        self._capture = capture or (CUDACapture() if is_gpu else CalledAgain)
        self._state: DecodeState | None = None
        self._size: tuple[int, bool] | None = None      # of the state: B, whether it is guided
        self._graphs: dict[StepKey, Graph] = {}

    def state_for(self, batch_size: int, sampler: Sampler) -> DecodeState:
        """Returns what the captured steps of a batch of this size read and write."""
        is_guided = sampler.num_guided(self._model.config.num_tokens) > 0
        size = (batch_size, is_guided)
        if size != self._size:
            self._graphs.clear()
            self._state = None          # free its memory before the next one is allocated
            self._state = DecodeState(self._model, batch_size, is_guided)
            self._size = size
        return self._state

    def begin(self, labels: Tensor, uniforms: Tensor, sampler: Sampler) -> DecodeState:
        """See models.generate.Steps; the state is that of the batch before, if it fits."""
        state = self.state_for(len(labels), sampler)
        # A step reads the whole bucket, and gives what is not filled yet a weight of 0. Values that
        # an earlier batch left there might be NaN, and 0 times NaN is NaN.
        torch._foreach_zero_(state.cache.values)
        with torch.compiler.set_stance("force_eager"):      # blocks are compiled for buckets alone
            state.begin(self._model, labels, uniforms, sampler)
        return state

    def step(self, state: DecodeState, position: int, sampler: Sampler) -> None:
        """See models.generate.Steps; replays the step's graph, which a first call captures."""
        is_guided = position < sampler.num_guided(self._model.config.num_tokens)
        num_buckets = position // BUCKET + 1
        length = min(num_buckets * BUCKET, self._model.config.num_tokens)
        key = StepKey(sampler, is_guided, length)
        if key in self._graphs:
            self._graphs[key].replay()
            return

        def step() -> None:
            at = DecodePosition.in_bucket(state.index, length)
            state.step(self._model, at, sampler, is_guided)

        # Run it once as it is: what libraries and compilers do at a first call cannot be captured.
        step()
        self._graphs[key] = self._capture(step)


def compile_decoding(model: GPT, backend: str | Callable[..., object] = "inductor") -> GPT:
    """Compiles what a block does in a decode step, once for all blocks of a model; in place.

    Inside a graph every kernel still costs a microsecond or two: compiled, a block has a third of
    them.

    Args:
        model: GPT.
        backend: of torch.compile.
    """
    for layer in model.layers:
        layer.decode = torch.compile(layer.decode, dynamic=False, backend=backend)
    return model
