"""Reads frozen TensorFlow graphs (GraphDef files) without TensorFlow."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.attr_value_pb2 import AttrValue
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.util.tensor_util import make_ndarray

Attribute = int | float | bool | bytes | list[int] | np.ndarray | None   # a constant's is an array


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        op: its kind, such as "Conv2D".
        inputs: names of other nodes, whose first output is read; control inputs are left out.
        attributes: by name.
    """

    op: str
    inputs: list[str]
    attributes: dict[str, Attribute]


def read_graph(path: str | Path) -> dict[str, Node]:
    """Reads a frozen graph (.pb); returns its nodes by name, in the order of the file.

    Raises:
        DecodeError: of protobuf: the file is no GraphDef, or is cut off.
    """
    nodes = {}
    for node in GraphDef.FromString(Path(path).read_bytes()).node:
        inputs = [name.split(":")[0] for name in node.input if not name.startswith("^")]
        attributes = {name: _read_attribute(value) for name, value in node.attr.items()}
        nodes[node.name] = Node(node.op, inputs, attributes)
    return nodes


def _read_attribute(attribute: AttrValue) -> Attribute:
    """Returns the value of an attribute as plain Python or NumPy; None if it has none."""
    kind = attribute.WhichOneof("value")
    if kind == "list":
        return list(attribute.list.i)
    if kind == "tensor":
        return make_ndarray(attribute.tensor)
    return getattr(attribute, kind) if kind else None
