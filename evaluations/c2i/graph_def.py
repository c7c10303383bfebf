"""Reads frozen TensorFlow graphs (GraphDef files) without TensorFlow: nodes, their inputs, attributes and constants."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.util.tensor_util import make_ndarray


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        op: its kind, such as "Conv2D".
        inputs: names of other nodes, whose first output is read; control inputs are left out.
        attributes: dict of name -> int, float, bool, bytes, list of ints, or numpy array (the value of a constant).
    """

    op: str
    inputs: list[str]
    attributes: dict[str, Any]


def read_graph(path: str | Path) -> dict[str, Node]:
    """Reads a frozen graph (.pb); returns its nodes by name, in the order of the file.

    Raises:
        DecodeError: of protobuf: the file is no GraphDef, or is cut off.
    """
    return {node.name: Node(node.op, [name.split(":")[0] for name in node.input if not name.startswith("^")],
                            {name: _read_attribute(value) for name, value in node.attr.items()})
            for node in GraphDef.FromString(Path(path).read_bytes()).node}


def _read_attribute(attribute: Any) -> Any:
    kind = attribute.WhichOneof("value")
    if kind == "list":
        return list(attribute.list.i)
    if kind == "tensor":
        return make_ndarray(attribute.tensor)
    return getattr(attribute, kind) if kind else None
