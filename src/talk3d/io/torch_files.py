"""What torch's files mean, read off the inert nodes of `io.pickles`: storages, tensors, plain values; both layouts of `torch.save`.

Only the tensors that are wanted are read, straight from the mapped file, after the claimed sizes were compared with the bytes that are there.
A tensor must lie inside its storage and not overlap itself. Archives may only hold stored (uncompressed) entries beside each other, as torch
writes them, so nothing can grow while it is read.
"""

import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from talk3d.errors import WeightsError
from talk3d.io.pickles import Global, LongText, Node, Persistent, read_pickle, shown

STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
TENSOR_GLOBALS = rf"collections\.OrderedDict|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.(cuda\.)?({'|'.join(STORAGES)})Storage"
VALUE_GLOBALS = (
    r"(builtins|__builtin__)\.(set|dict|list|bytes|object|int|long|float)|collections\.defaultdict|_codecs\.encode|numpy\.dtype|numpy\.ndarray"
    r"|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)|(copyreg|copy_reg)\._reconstructor|torch\.Size"
)
MAX_ENTRIES = 20_000
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_MAX_DIMENSIONS = 8
_MAX_PLAIN_BYTES = 2**16
_ENTRY = "<4s4xHH8xIIHHH8xI"  # of a zip archive's directory: magic, flags, method, sizes, lengths of name, extra field and comment, offset
_ENTRY_NAME = re.compile(r"[\w\-.+ ]+(/[\w\-.]+)*", re.ASCII)
_AS_NUMPY = {2: np.int16, 4: np.int32, 8: np.int64}
_STORAGE_ONLY = re.compile(rf"torch\.(cuda\.)?({'|'.join(STORAGES)})Storage")
_MAPPINGS = {"collections.OrderedDict", "collections.defaultdict", "dnnlib.util.EasyDict", "builtins.dict", "__builtin__.dict"}
_BYTES = ("_codecs.encode", "builtins.bytes", "__builtin__.bytes")
_SETS = {"builtins.set", "__builtin__.set"}
_RECONSTRUCTORS = {"copyreg._reconstructor", "copy_reg._reconstructor"}


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Put the path before the message of a `WeightsError`; anything else that damaged bytes can cause becomes one."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError, struct.error, RuntimeError) as error:
        raise WeightsError(f"{path}: its content makes no sense ({type(error).__name__}), so it is damaged or no file of weights") from error


def map_file(path: Path) -> memoryview:
    """Return a file's bytes without reading them yet.

    Raises:
        WeightsError: there is no such file, it is empty, or cannot be read.
    """
    try:
        if not path.is_file():
            raise WeightsError("is not a file: give the path of a file of weights")
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError as error:
        raise WeightsError("is empty: get the file again") from error
    except OSError as error:
        raise WeightsError(f"cannot be read ({error.strerror}): give a file that can be") from error


class Values:
    """Turns inert nodes into tensors and plain values."""

    def __init__(self, budget: int, entries: Mapping[str, memoryview] | None = None) -> None:
        """Start with what lies outside the pickle.

        Args:
            budget: bytes that all tensors together may take, so that many cannot be made of one storage.
            entries: the storages by key; None if there are none.
        """
        self._budget, self._entries = budget, entries or {}

    def _find_storage(self, reference: Any, most_text: int = 0) -> tuple[memoryview, torch.dtype]:
        """Return the bytes of a storage and their type; nothing is copied but bytes that were written as text, up to `most_text`."""
        if isinstance(reference, Node) and reference.name == "torch.storage._load_from_bytes":
            data = memoryview(raw_bytes(*reference.arguments, most_text=most_text))
            inner, values = read_legacy(data, _STORAGE_ONLY)
            return values._find_storage(inner)
        if not isinstance(reference, Persistent):
            raise WeightsError("a tensor has no storage, so the file is damaged")
        key, dtype, count = _storage_of(reference)
        data = self._entries.get(key, memoryview(b""))
        if len(data) != count * dtype.itemsize:
            raise WeightsError(f"storage {shown(key)} claims {shown(count)} numbers, the file holds {len(data)} bytes for them: get it again")
        return data, dtype

    def count(self, node: Any) -> int:
        """Return how many numbers a tensor has, after a look whether its storage holds them."""
        return self._view(node)[0].size

    def tensor(self, node: Any) -> Tensor:
        """Read a tensor or parameter.

        Raises:
            WeightsError: it is none, does not lie in its storage, or overlaps itself.
        """
        view, dtype = self._view(node)
        self._budget -= view.nbytes
        if self._budget < 0:
            raise WeightsError("its tensors share their numbers so often that they would be many times larger than the file, so it is a trap")
        copy = torch.from_numpy(view.copy())
        return copy != 0 if dtype == torch.bool else copy.view(dtype)

    def _view(self, node: Any) -> tuple[np.ndarray, torch.dtype]:
        """Return a tensor's numbers where they lie, as integers of their width, and their type."""
        source, offset, size, stride = _tensor_arguments(node)
        data, dtype = self._find_storage(source, 64 * math.prod(size) + _MAX_PLAIN_BYTES)
        _check_bounds(len(data) // dtype.itemsize, offset, size, stride)
        strides = [step * dtype.itemsize for step in stride]
        return np.ndarray(size, _AS_NUMPY.get(dtype.itemsize, np.uint8), data, offset * dtype.itemsize, strides), dtype

    def plain(self, value: Any) -> Any:
        """Return plain containers, numbers, short strings and tensors for nodes that mean them.

        Raises:
            WeightsError: there is an object of another kind among them; the message names it.
        """
        value = _settled(value)
        if value is None or isinstance(value, str | bool | int | float):
            return value
        if isinstance(value, memoryview | LongText):
            return _short_bytes(value)
        if isinstance(value, tuple | list | set):
            return type(value)(self.plain(part) for part in value)
        if isinstance(value, dict):
            return {key: self.plain(part) for key, part in value.items() if not isinstance(key, Node)}
        if isinstance(value, Node):
            return self._plain_node(value)
        raise WeightsError(f"{described(value)} stands where a plain value is expected")

    def _plain_node(self, node: Node) -> Any:
        if node.name in _MAPPINGS:
            return self.plain(items_of(node))
        if node.name in _SETS:
            return {self.plain(part) for part in (node.arguments or ((),))[0]}
        if node.name == "torch.Size":
            return tuple(self.plain(node.arguments[0]))
        if node.name in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"):
            return _number(node)
        if node.name in _BYTES:
            return _short_bytes(raw_bytes(node))
        return self.tensor(node)


def described(value: Any) -> str:
    """Name a value in a file for an error."""
    return f"an object of {shown(value.name)}" if isinstance(value, Node | Global) else f"a {type(value).__name__}"


def items_of(value: Any) -> dict[Any, Any]:
    """Return the items of a dict or of a node that means one.

    Raises:
        WeightsError: it means something else.
    """
    value = _settled(value)
    if isinstance(value, dict):
        return value
    if not (isinstance(value, Node) and value.name in _MAPPINGS):
        raise WeightsError(f"{described(value)} stands where a dict is expected")
    pairs = [pair for given in value.arguments if isinstance(given, list) for pair in given]  # Python 2 wrote them so
    if any(not isinstance(key, str) for key, _ in pairs):
        raise WeightsError("the keys of a dict are no strings, so the file is damaged")
    return dict(pairs) | value.items


def raw_bytes(value: Any, *, most_text: int = _MAX_PLAIN_BYTES) -> bytes | memoryview:
    """Return the bytes that a value means, also when they were written as text (by protocol 2), of which `most_text` are read."""
    if isinstance(value, memoryview):
        return value
    if isinstance(value, Node) and value.name in _BYTES[1:] and not value.arguments:
        return b""
    if not (isinstance(value, Node) and value.name == _BYTES[0] and value.arguments[1] in ("latin1", "latin-1")):
        raise WeightsError(f"{described(value)} stands where bytes are expected")
    text = value.arguments[0]
    if isinstance(text, LongText):
        if len(text.data) > most_text or np.frombuffer(text.data, np.uint8).max() > 0xC3:  # beyond Latin-1, four times as large
            raise WeightsError("bytes written as text are too many or no bytes, so the file is damaged")
        text = str(text.data, "utf-8")
    return text.encode("latin-1")


def read_legacy(data: memoryview, allowed: re.Pattern[str]) -> tuple[Any, Values]:
    """Read the layout that `torch.save` wrote before version 1.6, also found inside pickles, one storage each.

    Raises:
        WeightsError: it is none, is damaged, or wants a global that is not allowed.
    """
    parts, position = [], 0
    for _ in range(5):  # magic number, version, byte order, the object, keys of the storages
        parts.append(read_pickle(data, allowed, start=position, references=len(parts) == 3))
        position = parts[-1].end
    magic, version, system, root, keys = (part.value for part in parts)
    if magic != _MAGIC_NUMBER or version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise WeightsError("no tensors of torch (little-endian, version 1001) start here")
    claims: dict[str, tuple[torch.dtype, int]] = {}
    for reference in parts[3].references:
        key, dtype, count = _storage_of(reference)
        if claims.setdefault(key, (dtype, count)) != (dtype, count):
            raise WeightsError(f"storage {shown(key)} is described in two ways, so the file is damaged")
    if not isinstance(keys, list) or len(set(keys)) != len(keys) or set(keys) != claims.keys():
        raise WeightsError("the file does not hold the storages that it mentions")
    entries = {}
    for key in keys:
        dtype, count = claims[key]
        end = position + 8 + count * dtype.itemsize
        if end > len(data) or int.from_bytes(data[position : position + 8], "little") != count:
            raise WeightsError(f"storage {shown(key)} claims {shown(count)} numbers, which are not in the file: get it again")
        entries[key], position = data[position + 8 : end], end
    return root, Values(2 * len(data) + 2**20, entries)


def size_of(node: Any) -> tuple[int, ...]:
    """Return a tensor's size as the file claims it, without reading the tensor."""
    return _tensor_arguments(node)[2]


def _tensor_arguments(node: Any) -> tuple[Any, Any, Any, Any]:
    if isinstance(node, Node) and node.name == "torch._utils._rebuild_parameter":
        node = node.arguments[0]
    if not (isinstance(node, Node) and node.name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")):
        raise WeightsError(f"{described(node)} stands where a tensor is expected")
    source, offset, size, stride, *_ = node.arguments
    _check_size(offset, size, stride)
    return source, offset, size, stride


def _storage_of(reference: Persistent) -> tuple[str, torch.dtype, int]:
    """Return key, type and number of elements of a storage, as its persistent reference claims."""
    match reference.key:
        case ("storage", Global(name=name), str(key), str(), int(count)) | ("storage", Global(name=name), str(key), str(), int(count), None):
            kind = name.rpartition(".")[2].removesuffix("Storage")
            if kind in STORAGES and count >= 0 and not isinstance(count, bool):
                return key, STORAGES[kind], count
    raise WeightsError("a persistent reference is not to a storage of torch, so the file is damaged or no file of weights")


def _check_size(offset: Any, size: Any, stride: Any) -> None:
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= _MAX_DIMENSIONS):
        raise WeightsError("a tensor's size and stride do not fit each other, so the file is damaged")
    if any(type(number) is not int or not 0 <= number < 2**60 for number in (offset, *size, *stride)):
        raise WeightsError("a tensor has sizes that are no numbers from zero, so the file is damaged")


def _check_bounds(length: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    needed = 1 if math.prod(size) else 0
    for step, extent in sorted(zip(stride, size, strict=True)):
        if needed and extent > 1:
            if step < needed:
                raise WeightsError("a tensor's elements overlap each other, so the file is damaged")
            needed += step * (extent - 1)
    if offset + needed > length:
        raise WeightsError(f"a tensor of size {shown(size)} reaches out of its storage of {length} numbers, so the file is damaged")


def _settled(value: Any) -> Any:
    """Undo the detour by which Python 2 style classes are made again."""
    if isinstance(value, Node) and value.name in _RECONSTRUCTORS:
        made, base, initial = value.arguments
        items = initial if base.name.endswith(".dict") else {}
        return Node(made.name, (), value.state, items | value.items)
    return value


def _number(node: Node) -> int | float | bool:
    """Return a number that NumPy wrote."""
    kind, data = node.arguments
    order = kind.state[1] if kind.name == "numpy.dtype" and isinstance(kind.state, tuple) else None
    if order not in ("<", "|", "=") or kind.arguments[0] not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"):
        raise WeightsError("a number of NumPy is of a kind that weights do not need")
    (number,) = np.frombuffer(raw_bytes(data), np.dtype("<" + kind.arguments[0]))
    return number.item()


def _short_bytes(value: bytes | memoryview | LongText) -> bytes | str:
    data = value.data if isinstance(value, LongText) else value
    if len(data) > _MAX_PLAIN_BYTES:
        raise WeightsError(f"{len(data)} bytes stand where a plain value is expected")
    return str(data, "utf-8") if isinstance(value, LongText) else bytes(data)


def read_archive(data: memoryview, allowed: re.Pattern[str]) -> tuple[Any, Values]:
    """Read the layout that `torch.save` writes since version 1.6: a zip archive with one pickle and one entry for each storage.

    Raises:
        WeightsError: it is none, is damaged, or wants a global that is not allowed.
    """
    entries = archive_entries(data)
    roots = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise WeightsError("the archive holds no data.pkl, so it is not of torch: give a file that torch saved")
    folder = roots[0].removesuffix("data.pkl")
    if bytes(entries.get(f"{folder}byteorder", b"little")[:8]) != b"little":
        raise WeightsError("the archive was written on a big-endian machine: save it again on another")
    pickled = read_pickle(entries[roots[0]], allowed, references=True)
    storages = {name.removeprefix(f"{folder}data/"): entry for name, entry in entries.items() if name.startswith(f"{folder}data/")}
    return pickled.value, Values(2 * len(data) + 2**20, storages)


def archive_entries(data: memoryview) -> dict[str, memoryview]:
    """Return the entries of a zip archive as slices of the file.

    Raises:
        WeightsError: it is damaged, or an entry is compressed, encrypted, overlaps another, or has the name of no entry of torch.
    """
    count, size, start = _directory(data)
    if count > MAX_ENTRIES:
        raise WeightsError(f"the archive claims {count} entries, more than {MAX_ENTRIES}, so it is no file of weights")
    directory, position = data[start : start + size], 0
    entries: dict[str, memoryview] = {}
    spans: list[tuple[int, int]] = []
    for _ in range(count):
        (magic, flags, method, packed, length, *lengths, offset) = struct.unpack_from(_ENTRY, directory, position)
        position += struct.calcsize(_ENTRY)
        name_bytes, extra, _ = (bytes(directory[position : (position := position + size)]) for size in lengths)
        name = name_bytes.decode("ascii")
        packed, length, offset = _wide(extra, length, packed, offset)
        if magic != b"PK\1\2" or name in entries or not _ENTRY_NAME.fullmatch(name) or ".." in name:
            raise WeightsError(f"the archive's entry {shown(name)} is damaged, there twice, or has a name that torch does not give")
        if method or flags & 1 or packed != length:
            raise WeightsError(f"the archive's entry {shown(name)} is compressed or encrypted, which torch does not do: save it again with torch")
        header = struct.unpack_from("<4s22xHH", data, offset)
        first = offset + 30 + header[1] + header[2]
        if header[0] != b"PK\3\4" or bytes(data[offset + 30 : offset + 30 + header[1]]) != name_bytes or first + length > start:
            raise WeightsError(f"the archive's entry {shown(name)} does not lie where it is said to lie: get the file again")
        entries[name] = data[first : first + length]
        spans.append((offset, first + length))
    spans.sort()
    if any(end > following for (_, end), (following, _) in pairwise(spans)):
        raise WeightsError("entries of the archive overlap each other, so it is a trap")
    return entries


def _directory(data: memoryview) -> tuple[int, int, int]:
    """Return the number of a zip archive's entries, and size and place of its directory."""
    tail = bytes(data[-(2**16 + 22) :])
    place = tail.rfind(b"PK\5\6")
    if place < 0 or len(tail) < place + 22:
        raise WeightsError("the archive has no end, so it is cut off: get the file again")
    end = len(data) - len(tail) + place
    count, size, start = struct.unpack_from("<10xHII", data, end)
    if count == 0xFFFF or 0xFFFFFFFF in (size, start):
        magic, where = struct.unpack_from("<4s4xQ", data, end - 20)
        wide_magic, count, size, start = struct.unpack_from("<4s28xQQQ", data, min(where, len(data)))
        if magic != b"PK\6\7" or wide_magic != b"PK\6\6":
            raise WeightsError("the archive's directory cannot be found, so it is damaged: get the file again")
    if start + size > end:
        raise WeightsError("the archive's directory reaches beyond its end, so it is damaged: get the file again")
    return count, size, start


def _wide(extra: bytes, *numbers: int) -> tuple[int, int, int]:
    """Return length, packed length and offset of an entry, those beyond 4 GiB from its extra field."""
    position, wide = 0, b""
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, position)
        wide = extra[position + 4 : position + 4 + size] if kind == 1 else wide
        position += 4 + size
    found = []
    for number in numbers:
        if number == 0xFFFFFFFF:
            (number,), wide = struct.unpack_from("<Q", wide), wide[8:]
        found.append(number)
    length, packed, offset = found
    return packed, length, offset
