"""The Inception network of the ADM evaluator in PyTorch: its frozen graph, run node by node from the same file.

Nothing of the architecture is written here: operations, strides, paddings and epsilons are those of the graph's nodes,
so that the network is what TensorFlow would run, on any device, without TensorFlow.

Letters: N pictures, P pixels; tensors are (N, channels, rows, columns) here, and channels last in the graph.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from evaluations.c2i.graph_def import read_graph
from evaluations.c2i.inception import INPUT, LOGITS, POOL, SPATIAL, SPATIAL_CHANNELS


class TorchInception(nn.Module):
    """Features of pictures by a frozen graph; a FeatureNetwork.

    Args:
        path: the graph.
        sha256: of its file.
        device: where to compute.

    Raises:
        ValueError: the file is no graph, or not one of this network.
    """

    image_size = None                               # any: the graph resizes to 299 pixels
    settings = {"class_names": None}

    def __init__(self, path, sha256, device):
        super().__init__()
        self.name, self.sha256, self.device = "Inception 2015-12-05 (torch)", sha256, device
        self.nodes = read_graph(path)
        if missing := [name for name in (INPUT, POOL, SPATIAL, LOGITS) if name not in self.nodes]:
            raise ValueError(f"{path}: expected nodes {INPUT}, {POOL}, {SPATIAL} and {LOGITS}, found no "
                             f"{', '.join(missing)}; this is not the graph of the ADM evaluator")
        self._order = _needed_in_order(self.nodes, (POOL, SPATIAL), INPUT)
        if unknown := {self.nodes[name].op for name in self._order} - set(OPERATIONS) - {"Const"}:
            raise ValueError(f"{path}: expected operations {', '.join(OPERATIONS)}, found {', '.join(sorted(unknown))}")
        self._constants = {name: torch.from_numpy(np.array(node.attributes["value"])).to(device)
                           for name, node in self.nodes.items() if node.op == "Const"}
        self._softmax_weight = self._constants[_source(self.nodes[LOGITS].inputs[1], self.nodes)]       # (2048, 1008)

    @torch.inference_mode()
    def features(self, images):
        """Computes pool, spatial and probabilities of pictures (N, P, P, 3) uint8; see FeatureNetwork."""
        pool, spatial = self.run(torch.tensor(images, device=self.device).permute(0, 3, 1, 2).float())
        pool = pool.flatten(1)                                                      # (N, 2048)
        spatial = spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)      # (N, 17 * 17 * 7)
        probabilities = (pool @ self._softmax_weight).softmax(dim=1)                # without the bias, as ADM
        return tuple(tensor.float().cpu().numpy() for tensor in (pool, spatial, probabilities))

    def run(self, images):
        """Returns the values of the nodes POOL and SPATIAL for images (N, 3, P, P) float32 in 0 .. 255."""
        values, remaining = {INPUT: images}, {}
        for name in self._order:
            for source in self._inputs(name):
                remaining[source] = remaining.get(source, 0) + 1
        for name in self._order:
            node = self.nodes[name]
            sources = self._inputs(name)
            values[name] = self._constants[name] if node.op == "Const" else \
                OPERATIONS[node.op](node.attributes, *(values[source] for source in sources))
            for source in sources:                  # what nobody reads any more is let go
                remaining[source] -= 1
                if not remaining[source] and source not in (POOL, SPATIAL):
                    del values[source]
        return values[POOL], values[SPATIAL]

    def _inputs(self, name):
        return [source.split(":")[0] for source in self.nodes[name].inputs]


def _needed_in_order(nodes, wanted, given):
    """Returns the names that `wanted` depend on, each after its inputs, without `given`."""
    order, pending = [], list(wanted)
    done = {given}
    while pending:
        name = pending[-1]
        waiting = [source for source in (text.split(":")[0] for text in nodes[name].inputs) if source not in done]
        if name in done or not waiting:
            pending.pop()
            if name not in done:
                done.add(name)
                order.append(name)
        else:
            pending += waiting
    return order


def _source(name, nodes):
    """Returns the constant behind a name, past identities."""
    name = name.split(":")[0]
    return _source(nodes[name].inputs[0], nodes) if nodes[name].op == "Identity" else name


def _padding(x, kernel, strides, attributes):
    """Returns (left, right, top, bottom) of TensorFlow's SAME padding, zeros for VALID."""
    if attributes["padding"] == b"VALID":
        return (0, 0, 0, 0)
    pads = []
    for length, size, stride in zip(x.shape[:1:-1], kernel[::-1], strides[::-1], strict=True):      # columns, then rows
        total = max((-(-length // stride) - 1) * stride + size - length, 0)
        pads += [total // 2, total - total // 2]
    return tuple(pads)


def _convolve(attributes, x, weight):
    strides = attributes["strides"][1:3]
    weight = weight.permute(3, 2, 0, 1)                                             # from (rows, columns, in, out)
    return F.conv2d(F.pad(x, _padding(x, weight.shape[2:], strides, attributes)), weight, stride=strides)


def _normalise(attributes, x, mean, variance, beta, gamma):
    scale = torch.rsqrt(variance + attributes["variance_epsilon"])
    if attributes.get("scale_after_normalization"):
        scale = scale * gamma
    return x * scale[:, None, None] + (beta - mean * scale)[:, None, None]


def _max_pool(attributes, x):
    kernel, strides = attributes["ksize"][1:3], attributes["strides"][1:3]
    return F.max_pool2d(F.pad(x, _padding(x, kernel, strides, attributes), value=-torch.inf), kernel, strides)


def _average_pool(attributes, x):
    kernel, strides = attributes["ksize"][1:3], attributes["strides"][1:3]
    pads = _padding(x, kernel, strides, attributes)
    counted = F.avg_pool2d(F.pad(torch.ones_like(x[:1, :1]), pads), kernel, strides)        # share inside the picture
    return F.avg_pool2d(F.pad(x, pads), kernel, strides) / counted


def _resize(attributes, x, size):
    """Returns TensorFlow 1's bilinear resize: corners not aligned, pixels not centred."""
    if attributes.get("align_corners") or attributes.get("half_pixel_centers"):
        raise ValueError("ResizeBilinear: expected align_corners and half_pixel_centers false")
    for axis, wanted in zip((2, 3), size.tolist(), strict=True):
        length = x.shape[axis]
        places = torch.arange(wanted, device=x.device, dtype=torch.float32) * (length / wanted)
        low = places.floor().long()
        high = (low + 1).clamp(max=length - 1)
        shares = (places - low).view(-1, 1) if axis == 2 else places - low
        lower, upper = x.index_select(axis, low), x.index_select(axis, high)
        x = lower + (upper - lower) * shares
    return x


OPERATIONS = {
    "Conv2D": _convolve, "BatchNormWithGlobalNormalization": _normalise, "MaxPool": _max_pool,
    "AvgPool": _average_pool, "ResizeBilinear": _resize,
    "Relu": lambda attributes, x: F.relu(x), "Identity": lambda attributes, x: x,
    "CheckNumerics": lambda attributes, x: x, "Sub": lambda attributes, x, y: x - y,
    "Mul": lambda attributes, x, y: x * y,
    "Concat": lambda attributes, axis, *parts: torch.cat(parts, dim=_channels(axis)),
    "ConcatV2": lambda attributes, *inputs: torch.cat(inputs[:-1], dim=_channels(inputs[-1])),
}


def _channels(axis):
    if int(axis) not in (3, -1):
        raise ValueError(f"Concat: expected the axis of the channels, 3, got {int(axis)}")
    return 1
