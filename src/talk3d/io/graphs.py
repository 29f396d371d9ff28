"""Constants out of a frozen TensorFlow graph, without TensorFlow: enough of the protocol buffer format to read named float tensors.

Nothing of the graph is run; what is not a float constant is skipped.
"""

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from talk3d.errors import WeightsError

MAX_BYTES = 2**30
"""A larger graph is refused."""
_NODE, _NAME, _OP, _ATTRIBUTE, _KEY, _VALUE, _TENSOR, _TYPE, _SHAPE, _DIMENSION, _SIZE, _CONTENT = 1, 1, 2, 5, 1, 2, 8, 1, 2, 2, 1, 4
_FLOAT = 1


def read_constants(path: Path) -> dict[str, Tensor]:
    """Read the float constants of a frozen graph (.pb, or a zip with one in it) by the names of their nodes.

    Raises:
        WeightsError: the file is missing, damaged, too large, or no graph.
    """
    try:
        data = memoryview(_contents(path))
        found = {}
        for field, node in _fields(data):
            if field == _NODE and isinstance(node, memoryview):
                constant = _constant(node)
                if constant is not None:
                    found[constant[0]] = constant[1]
    except (OSError, zipfile.BadZipFile, IndexError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path} is no frozen graph that can be read ({error}): fetch it again") from error
    if not found:
        raise WeightsError(f"{path} holds no constants: give a frozen TensorFlow graph")
    return found


def _contents(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".pb")]
        if len(members) != 1 or members[0].file_size > MAX_BYTES:
            raise ValueError(f"it holds {len(members)} graphs, or one of more than {MAX_BYTES} bytes")
        with archive.open(members[0]) as file:
            return file.read(members[0].file_size)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message: integers, or the bytes of strings, messages and fixed numbers."""
    place = 0
    while place < len(data):
        tag, place = _integer(data, place)
        kind = tag & 7
        if kind == 0:
            value, place = _integer(data, place)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, place = _integer(data, place)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if place + length > len(data):
            raise ValueError("it ends in the middle of a field")
        yield tag >> 3, data[place : place + length]
        place += length


def _integer(data: memoryview, place: int) -> tuple[int, int]:
    """A variable-length integer and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("an integer without end")


def _constant(node: memoryview) -> tuple[str, Tensor] | None:
    """Name and value of a node that is a float constant."""
    name, op, value = "", "", None
    for field, content in _fields(node):
        if isinstance(content, int):
            continue
        if field == _NAME:
            name = str(content, "utf-8")
        elif field == _OP:
            op = str(content, "utf-8")
        elif field == _ATTRIBUTE:
            entry = dict(_fields(content))
            key, attribute = entry.get(_KEY), entry.get(_VALUE)
            if isinstance(key, memoryview) and bytes(key) == b"value" and isinstance(attribute, memoryview):
                value = dict(_fields(attribute)).get(_TENSOR)
    if op != "Const" or not isinstance(value, memoryview):
        return None
    tensor = _tensor(value)
    return None if tensor is None else (name, tensor)


def _tensor(message: memoryview) -> Tensor | None:
    """A float tensor whose numbers lie in the message as bytes; anything else is None."""
    fields = dict(_fields(message))
    content, shape = fields.get(_CONTENT), fields.get(_SHAPE)
    if fields.get(_TYPE) != _FLOAT or not isinstance(content, memoryview) or not isinstance(shape, memoryview):
        return None
    sizes = [size for field, dimension in _fields(shape) if field == _DIMENSION and isinstance(dimension, memoryview)
             for size in [dict(_fields(dimension)).get(_SIZE, 0)] if isinstance(size, int)]  # fmt: skip
    if 4 * math.prod(sizes) != len(content):
        raise ValueError(f"a tensor of {sizes} has {len(content)} bytes")
    return torch.frombuffer(bytearray(content), dtype=torch.float32).reshape(sizes)
