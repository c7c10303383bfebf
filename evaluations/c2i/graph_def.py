"""Reads frozen TensorFlow graphs (GraphDef files) without TensorFlow: nodes, their inputs, attributes and constants.

A GraphDef is a protocol buffer: a sequence of fields, each a key (number << 3 | wire type) and a value. Only the fields
that frozen inference graphs use are read; their numbers come from tensorflow/core/framework/*.proto.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DTYPES = {1: np.float32, 2: np.float64, 3: np.int32, 4: np.uint8, 9: np.int64, 10: np.bool_}       # of types.proto


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        op: its kind, such as "Conv2D".
        inputs: names of other nodes, "name" or "name:output"; control inputs are left out.
        attributes: dict of name -> int, float, bool, bytes, list, or numpy array (the value of a constant).
    """

    op: str
    inputs: list
    attributes: dict


def read_graph(path):
    """Reads a frozen graph.

    Args:
        path: GraphDef file (.pb).

    Returns:
        dict of name -> Node, in the order of the file.

    Raises:
        ValueError: the file is no GraphDef, or is cut off.
    """
    try:
        nodes = dict(_read_node(value) for number, value in _fields(memoryview(Path(path).read_bytes())) if number == 1)
    except (IndexError, struct.error, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a frozen TensorFlow graph, found other or damaged content ({error}); "
                         "download it again") from error
    if not nodes:
        raise ValueError(f"{path}: expected a frozen TensorFlow graph, found no node; download it again")
    return nodes


def _varint(data, place):
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7


def _fields(data):
    """Yields (number, value) of a message: ints, or memoryviews of what has a length, or of 4 or 8 bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
        else:
            if kind == 2:
                length, place = _varint(data, place)
            else:
                length = {1: 8, 5: 4}[kind]
            value, place = data[place:place + length], place + length
            if len(value) < length:
                raise ValueError("it ends in the middle of a field")
        yield key >> 3, value


def _read_node(data):
    name, op, inputs, attributes = "", "", [], {}
    for number, value in _fields(data):
        if number == 1:
            name = bytes(value).decode()
        elif number == 2:
            op = bytes(value).decode()
        elif number == 3 and value[0] != ord("^"):
            inputs.append(bytes(value).decode())
        elif number == 5:                                                           # an entry of a map
            entry = dict(_fields(value))
            attributes[bytes(entry[1]).decode()] = _read_attribute(entry.get(2, b""))
    return name, Node(op, inputs, attributes)


def _read_attribute(data):
    for number, value in _fields(data):
        if number == 1:
            return _read_list(value)
        if number == 2:
            return bytes(value)
        if number == 3:
            return _signed(value)
        if number == 4:
            return struct.unpack("<f", value)[0]
        if number in (5, 6):                                                        # bool; an enum of types
            return value
        if number == 8:
            return _read_tensor(value)
    return None


def _read_list(data):
    items = []
    for number, value in _fields(data):
        if number == 2:
            items.append(bytes(value))
        elif number == 3:
            items += [_signed(value)] if isinstance(value, int) else [_signed(item) for item in _packed(value)]
    return items


def _packed(data):
    place = 0
    while place < len(data):
        value, place = _varint(data, place)
        yield value


def _signed(value):
    return value - 2**64 if value >= 2**63 else value


def _read_tensor(data):
    dtype, shape, content, values = np.float32, [], None, []
    for number, value in _fields(data):
        if number == 1:
            dtype = DTYPES[value]
        elif number == 2:
            shape = [_signed(dict(_fields(size)).get(1, 0)) for field, size in _fields(value) if field == 2]
        elif number == 4:
            content = value
        elif number == 5:                                                           # floats, packed or one by one
            values += np.frombuffer(value, np.float32).tolist()
        elif number in (7, 10):                                                     # ints
            values += [_signed(value)] if isinstance(value, int) else [_signed(item) for item in _packed(value)]
    if content is not None:
        return np.frombuffer(content, dtype).reshape(shape)
    array = np.array(values, dtype=dtype)
    return np.resize(array, shape) if array.size == 1 else array.reshape(shape)     # one value stands for all
