"""A frozen graph of random weights with the nodes, operations and shapes of ADM's Inception."""

import numpy as np
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.util.tensor_util import make_tensor_proto

SAME, VALID = b"SAME", b"VALID"


class GraphBuilder:
    """Adds nodes to a GraphDef; layers return the name of their output and its channels."""

    def __init__(self, seed=0):
        self.graph = GraphDef()
        self.graph.versions.producer = 8            # newer ones may not hold the old batch norm
        self.random = np.random.default_rng(seed)

    def node(self, name, op, inputs=(), **attributes):
        node = self.graph.node.add(name=name, op=op, input=list(inputs))
        for key, value in attributes.items():
            attribute = node.attr[key]
            if isinstance(value, bool):
                attribute.b = value
            elif isinstance(value, float):
                attribute.f = value
            elif isinstance(value, bytes):
                attribute.s = value
            elif isinstance(value, list):
                attribute.list.i.extend(value)
            elif key in ("T", "dtype"):
                attribute.type = value
            else:
                attribute.i = value
        return name

    def constant(self, name, array):
        node = self.graph.node.add(name=name, op="Const")
        tensor = make_tensor_proto(array)
        node.attr["dtype"].type = tensor.dtype
        node.attr["value"].tensor.CopyFrom(tensor)
        return name

    def unit(self, name, source, rows, columns, channels, stride=1, padding=SAME):
        """Convolution, batch norm without scale, checks, ReLU."""
        source, width = source
        fan_in = rows * columns * width
        weight = self.random.standard_normal((rows, columns, width, channels)) * np.sqrt(2 / fan_in)
        numbers = {"beta": 0.1 * self.random.standard_normal(channels),
                   "gamma": self.random.random(channels),
                   "moving_mean": 0.1 * self.random.standard_normal(channels),
                   "moving_variance": 0.5 + self.random.random(channels)}
        self.constant(f"{name}/conv2d_params", weight.astype(np.float32))
        self.node(f"{name}/Conv2D", "Conv2D", [source, f"{name}/conv2d_params"], T=DT_FLOAT,
                  strides=[1, stride, stride, 1], padding=padding)
        for key, values in numbers.items():
            self.constant(f"{name}/batchnorm/{key}", values.astype(np.float32))
        inputs = [f"{name}/batchnorm/{key}"
                  for key in ("moving_mean", "moving_variance", "beta", "gamma")]
        self.node(f"{name}/batchnorm", "BatchNormWithGlobalNormalization",
                  [f"{name}/Conv2D", *inputs], T=DT_FLOAT,
                  variance_epsilon=0.001, scale_after_normalization=False)
        self.node(f"{name}/CheckNumerics", "CheckNumerics", [f"{name}/batchnorm"], T=DT_FLOAT,
                  message=b"")
        self.node(f"{name}/control_dependency", "Identity",
                  [f"{name}/batchnorm", f"^{name}/CheckNumerics"], T=DT_FLOAT)
        return self.node(name, "Relu", [f"{name}/control_dependency"], T=DT_FLOAT), channels

    def pool(self, name, source, kind="MaxPool", size=3, stride=2, padding=VALID):
        return self.node(name, kind, [source[0]], T=DT_FLOAT, ksize=[1, size, size, 1],
                         strides=[1, stride, stride, 1], padding=padding), source[1]

    def join(self, name, *parts):
        axis = self.constant(f"{name}/concat_dim", np.array(3, np.int32))
        joined = self.node(name, "Concat", [axis, *(part[0] for part in parts)], N=len(parts),
                           T=DT_FLOAT)
        return joined, sum(part[1] for part in parts)

    def tower(self, name, source, *units):
        """Units one after the other, each (rows, columns, channels), or with a stride and VALID."""
        for number, (rows, columns, channels, *stride) in enumerate(units):
            unit_name = f"{name}/conv_{number}" if number else f"{name}/conv"
            more = {"stride": stride[0], "padding": VALID} if stride else {}
            source = self.unit(unit_name, source, rows, columns, channels, **more)
        return source

    def average(self, name, source, kind="AvgPool"):
        return self.pool(f"{name}/pool", source, kind, 3, 1, SAME)

    def pair(self, name, source):
        """The split end of a tower of the last two blocks."""
        return (self.unit(f"{name}/conv", source, 1, 3, 384),
                self.unit(f"{name}/conv_1", source, 3, 1, 384))


def build_inception(seed=0):
    """Returns the stand-in as a GraphDef."""
    b = GraphBuilder(seed)
    b.node("Cast", "Placeholder", dtype=DT_FLOAT)
    b.constant("ExpandDims/dim", np.array(0, np.int32))
    b.node("ExpandDims", "ExpandDims", ["Cast", "ExpandDims/dim"], T=DT_FLOAT)
    b.constant("ResizeBilinear/size", np.array([299, 299], np.int32))
    b.node("ResizeBilinear", "ResizeBilinear", ["ExpandDims", "ResizeBilinear/size"], T=DT_FLOAT,
           align_corners=False)
    b.constant("Sub/y", np.array(128, np.float32))
    b.node("Sub", "Sub", ["ResizeBilinear", "Sub/y"], T=DT_FLOAT)
    b.constant("Mul/y", np.array(1 / 128, np.float32))
    b.node("Mul", "Mul", ["Sub", "Mul/y"], T=DT_FLOAT)
    x = b.unit("conv", ("Mul", 3), 3, 3, 32, 2, VALID)
    x = b.unit("conv_1", x, 3, 3, 32, 1, VALID)
    x = b.unit("conv_2", x, 3, 3, 64)
    x = b.pool("pool", x)
    x = b.unit("conv_3", x, 1, 1, 80, 1, VALID)
    x = b.unit("conv_4", x, 3, 3, 192, 1, VALID)
    x = b.pool("pool_1", x)
    for name, channels in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
        x = b.join(f"{name}/join", b.unit(f"{name}/conv", x, 1, 1, 64),
                   b.tower(f"{name}/tower", x, (1, 1, 48), (5, 5, 64)),
                   b.tower(f"{name}/tower_1", x, (1, 1, 64), (3, 3, 96), (3, 3, 96)),
                   b.tower(f"{name}/tower_2", b.average(f"{name}/tower_2", x), (1, 1, channels)))
    x = b.join("mixed_3/join", b.unit("mixed_3/conv", x, 3, 3, 384, 2, VALID),
               b.tower("mixed_3/tower", x, (1, 1, 64), (3, 3, 96), (3, 3, 96, 2)),
               b.pool("mixed_3/pool", x))
    for number, c in ((4, 128), (5, 160), (6, 160), (7, 192)):
        name = f"mixed_{number}"
        x = b.join(f"{name}/join", b.unit(f"{name}/conv", x, 1, 1, 192),
                   b.tower(f"{name}/tower", x, (1, 1, c), (1, 7, c), (7, 1, 192)),
                   b.tower(f"{name}/tower_1", x,
                           (1, 1, c), (7, 1, c), (1, 7, c), (7, 1, c), (1, 7, 192)),
                   b.tower(f"{name}/tower_2", b.average(f"{name}/tower_2", x), (1, 1, 192)))
    x = b.join("mixed_8/join", b.tower("mixed_8/tower", x, (1, 1, 192), (3, 3, 320, 2)),
               b.tower("mixed_8/tower_1", x, (1, 1, 192), (1, 7, 192), (7, 1, 192), (3, 3, 192, 2)),
               b.pool("mixed_8/pool", x))
    for name, kind in (("mixed_9", "AvgPool"), ("mixed_10", "MaxPool")):
        middle = b.tower(f"{name}/tower", x, (1, 1, 384))
        other = b.tower(f"{name}/tower_1", x, (1, 1, 448), (3, 3, 384))
        x = b.join(f"{name}/join", b.unit(f"{name}/conv", x, 1, 1, 320),
                   *b.pair(f"{name}/tower/mixed", middle), *b.pair(f"{name}/tower_1/mixed", other),
                   b.tower(f"{name}/tower_2", b.average(f"{name}/tower_2", x, kind), (1, 1, 192)))
    x, channels = b.pool("pool_3", x, "AvgPool", 8, 1)
    assert channels == 2048
    b.constant("pool_3/_reshape/shape", np.array([-1, 2048], np.int32))
    b.node("pool_3/_reshape", "Reshape", [x, "pool_3/_reshape/shape"], T=DT_FLOAT)
    b.constant("softmax/weights", (b.random.standard_normal((2048, 1008)) / 8).astype(np.float32))
    b.constant("softmax/biases", b.random.standard_normal(1008).astype(np.float32))
    b.node("softmax/logits/MatMul", "MatMul", ["pool_3/_reshape", "softmax/weights"], T=DT_FLOAT)
    b.node("softmax/logits", "BiasAdd", ["softmax/logits/MatMul", "softmax/biases"], T=DT_FLOAT)
    b.node("softmax", "Softmax", ["softmax/logits"], T=DT_FLOAT)
    return b.graph
