"""The Inception network of the ADM evaluator in PyTorch: its frozen graph, run node by node.

Nothing of the architecture is written here: operations, strides, paddings and epsilons are those of
the graph's nodes, so that the network is what TensorFlow would run, on any device, without it.

Letters: N pictures, P pixels, C channels. Tensors are (N, C, rows, columns) here, and channels last
in the graph.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.runtime.compute import to_device
from evaluations.c2i.features import SPATIAL_CHANNELS, Features, to_numpy
from evaluations.c2i.graph_def import Attribute, Node, read_graph
from evaluations.c2i.inception import INPUT, LOGITS, POOL, SPATIAL, Inception

Attributes = dict[str, Attribute]


class TorchInception(Inception):
    """Features of pictures by a frozen graph; a FeatureNetwork.

    Raises:
        ValueError: the graph is not that of this network.
        DecodeError: of protobuf: the file is no graph.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        """Reads the graph and checks that every operation in it is known.

        Args:
            path: the graph.
            device: where to compute.
        """
        self.nodes = read_graph(path)
        self.device = device
        super().__init__(path, "torch", self.nodes)
        self._outputs = (POOL, SPATIAL, self.nodes[LOGITS].inputs[1])
        needed = _needed_in_order(self.nodes, self._outputs, INPUT)
        self._order = [name for name in needed if self.nodes[name].op != "Const"]
        if unknown := {self.nodes[name].op for name in self._order} - set(OPERATIONS):
            raise ValueError(f"{path}: expected operations {', '.join(OPERATIONS)}, "
                             f"found {', '.join(sorted(unknown))}")
        self._constants = {name: _place(node.attributes["value"], device)
                           for name, node in self.nodes.items() if node.op == "Const"}

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> Features:
        """Returns the features of pictures (N, P, P, 3) uint8."""
        inputs = to_device(images, self.device).permute(0, 3, 1, 2).float()     # (N, 3, P, P)
        pool, spatial, softmax_weight = self.run(inputs)
        pool = pool.flatten(1)                                                  # (N, 2048)
        spatial = spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (N, 17 * 17 * 7)
        probabilities = (pool @ softmax_weight).softmax(dim=1)          # without the bias, as ADM
        return Features(*to_numpy(pool, spatial, probabilities))

    def run(self, images: Tensor) -> list[Tensor]:
        """Runs the graph on images (N, 3, P, P) float32, 0 .. 255.

        Returns:
            POOL (N, 2048, 1, 1), SPATIAL (N, C, 17, 17), and the weight (2048, 1008) of LOGITS.
        """
        values = self._constants | {INPUT: images}
        readers = Counter(self._outputs)            # node -> how many still read it
        for name in self._order:
            readers.update(self.nodes[name].inputs)
        for name in self._order:
            node = self.nodes[name]
            inputs = (values[source] for source in node.inputs)
            values[name] = OPERATIONS[node.op](node.attributes, *inputs)
            readers.subtract(node.inputs)
            for source in set(node.inputs):         # what nothing reads any more is freed
                if not readers[source]:
                    del values[source]
        return [values[name] for name in self._outputs]


def _place(value: np.ndarray, device: torch.device) -> Tensor:
    """Returns a constant on a device.

    Integers, which are axes and sizes, stay on the CPU, where reading them does not wait for a GPU.
    """
    tensor = torch.from_numpy(np.array(value))
    return tensor.to(device) if tensor.is_floating_point() else tensor


def _needed_in_order(nodes: dict[str, Node], wanted: tuple[str, ...], given: str) -> list[str]:
    """Returns the names that `wanted` depend on, each after its inputs, without `given`."""
    needed = {}
    pending = list(wanted)
    while pending:
        name = pending.pop()
        if name != given and name not in needed:
            needed[name] = nodes[name].inputs
            pending += needed[name]
    return [name for name in TopologicalSorter(needed).static_order() if name != given]


def _padding(attributes: Attributes, x: Tensor, kernel: Sequence[int]) -> tuple[int, ...]:
    """Returns (left, right, top, bottom) of TensorFlow's SAME padding, zeros for VALID."""
    if attributes["padding"] == b"VALID":
        return (0, 0, 0, 0)
    pads = []
    for axis in (1, 0):                             # columns, then rows
        length = x.shape[2 + axis]
        size = kernel[axis]
        stride = attributes["strides"][1 + axis]
        total = max((-(-length // stride) - 1) * stride + size - length, 0)
        pads += [total // 2, total - total // 2]
    return tuple(pads)


def _convolve(attributes: Attributes, x: Tensor, weight: Tensor) -> Tensor:
    """Returns the convolution of x with a weight (rows, columns, in, out)."""
    weight = weight.permute(3, 2, 0, 1)             # (out, in, rows, columns)
    padded = F.pad(x, _padding(attributes, x, weight.shape[2:]))
    return F.conv2d(padded, weight, stride=attributes["strides"][1:3])


def _normalise(attributes: Attributes, x: Tensor, mean: Tensor, variance: Tensor, beta: Tensor,
               gamma: Tensor) -> Tensor:
    """Returns x normalised by statistics (C,); gamma is used only if the node says so."""
    scale = torch.rsqrt(variance + attributes["variance_epsilon"])
    if attributes.get("scale_after_normalization"):
        scale = scale * gamma
    return x * scale[:, None, None] + (beta - mean * scale)[:, None, None]


def _pool(attributes: Attributes, x: Tensor, pool: Callable[..., Tensor],
          border: float) -> Tensor:
    """Returns x pooled by `pool`, after padding with the value `border`."""
    kernel = attributes["ksize"][1:3]
    padded = F.pad(x, _padding(attributes, x, kernel), value=border)
    return pool(padded, kernel, attributes["strides"][1:3])


def _max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    return _pool(attributes, x, F.max_pool2d, -torch.inf)


def _average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    """Returns the means over the part of each window that lies inside the picture."""
    inside = _pool(attributes, torch.ones_like(x[:1, :1]), F.avg_pool2d, 0)     # fraction inside
    return _pool(attributes, x, F.avg_pool2d, 0) / inside


def _join(parts: Sequence[Tensor], axis: Tensor) -> Tensor:
    """Returns the parts (N, C_i, rows, columns) side by side in their channels.

    Raises:
        ValueError: the graph names another axis.
    """
    if int(axis) not in (3, -1):
        raise ValueError(f"Concat: expected the axis of the channels, 3, got {int(axis)}")
    return torch.cat(parts, dim=1)


def _resize(attributes: Attributes, x: Tensor, size: Tensor) -> Tensor:
    """Returns TensorFlow 1's bilinear resize to `size`: corners not aligned, pixels not centred.

    Raises:
        ValueError: the graph asks for another kind.
    """
    if attributes.get("align_corners") or attributes.get("half_pixel_centers"):
        raise ValueError("ResizeBilinear: expected align_corners and half_pixel_centers false")
    for axis, wanted in zip((2, 3), size.tolist(), strict=True):
        length = x.shape[axis]
        places = torch.arange(wanted, device=x.device, dtype=torch.float32) * (length / wanted)
        low = places.long()
        high = (low + 1).clamp(max=length - 1)
        lower = x.index_select(axis, low)
        upper = x.index_select(axis, high)
        shape = (-1, 1) if axis == 2 else (1, -1)
        x = lower + (upper - lower) * places.frac().unflatten(0, shape)
    return x


# Each takes the attributes of a node and its inputs.
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "Conv2D": _convolve, "BatchNormWithGlobalNormalization": _normalise, "MaxPool": _max_pool,
    "AvgPool": _average_pool, "ResizeBilinear": _resize,
    "Relu": lambda attributes, x: x.relu(), "Identity": lambda attributes, x: x,
    "CheckNumerics": lambda attributes, x: x, "Sub": lambda attributes, x, y: x - y,
    "Mul": lambda attributes, x, y: x * y,
    "Concat": lambda attributes, axis, *parts: _join(parts, axis),
    "ConcatV2": lambda attributes, *inputs: _join(inputs[:-1], inputs[-1]),
}
