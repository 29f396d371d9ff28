"""Torch's files: everything that torch writes comes back to the bit, in both layouts and inside pickles."""

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from talk3d.errors import WeightsError
from talk3d.io.pickles import Global, LongText, Node, read_pickle
from talk3d.io.torch_files import (
    TENSOR_GLOBALS,
    VALUE_GLOBALS,
    Values,
    archive_entries,
    described,
    items_of,
    map_file,
    naming,
    raw_bytes,
    read_archive,
    read_legacy,
    size_of,
)

ALLOWED = re.compile(rf"{TENSOR_GLOBALS}|{VALUE_GLOBALS}|torch\.storage\._load_from_bytes")
BUDGET = 2**20
whole = torch.arange(60.0).view(3, 4, 5)
TENSORS = {
    "plain": torch.randn(3, 4),
    "turned": torch.randn(3, 4).T,
    "part": whole[1:, 2, ::2],
    "other part": whole[0],
    "number": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "learnt": torch.nn.Parameter(torch.ones(2)),
    "channels last": torch.randn(1, 3, 2, 2).contiguous(memory_format=torch.channels_last),
    **{str(dtype): torch.tensor([0, 1, 2]).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32)},
    **{str(dtype): torch.tensor([0, 1, 2]).to(dtype) for dtype in (torch.int16, torch.int8, torch.uint8, torch.bool)},
}
VALUES = {
    "tensors": TENSORS,
    "ordered": OrderedDict(a=1, b=[2.5, "x", None, True, (1, {"y"})]),
    "counts": defaultdict(int, a=3),
    "size": torch.Size([3, 4]),
    "bytes": b"abc",
    "no bytes": b"",
    "numbers": [np.float64(0.1), np.float32(0.5), np.int64(-7), np.bool_(True)],
}


def legacy(thing: Any) -> memoryview:
    with io.BytesIO() as stream:
        torch.save(thing, stream, _use_new_zipfile_serialization=False)
        return memoryview(stream.getvalue())


def archive(thing: Any) -> memoryview:
    with io.BytesIO() as stream:
        torch.save(thing, stream)
        return memoryview(stream.getvalue())


def read_plain(data: memoryview) -> tuple[Any, Values]:
    return read_pickle(data, ALLOWED).value, Values(BUDGET)


def pickled(protocol: int) -> Callable[[Any], memoryview]:
    return lambda thing: memoryview(pickle.dumps(thing, protocol=protocol))


LAYOUTS: dict[str, tuple[Callable[[Any], memoryview], Callable[..., tuple[Any, Values]]]] = {
    "archive": (archive, lambda data: read_archive(data, ALLOWED)),
    "legacy": (legacy, lambda data: read_legacy(data, ALLOWED)),
    **{f"pickle {protocol}": (pickled(protocol), read_plain) for protocol in (2, 3, 4, 5)},
}


def same(found: Any, written: Any) -> None:
    if isinstance(written, Tensor):
        assert isinstance(found, Tensor) and found.dtype == written.dtype and found.equal(written.detach()) and not found.requires_grad
    elif isinstance(written, dict):
        assert found.keys() == written.keys()
        for name in written:
            same(found[name], written[name])
    else:
        assert found == written


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_torch_writes_comes_back(layout: str) -> None:
    write, read = LAYOUTS[layout]
    root, values = read(write(VALUES))
    same(values.plain(root), VALUES)


def test_a_large_storage_written_as_text_comes_back() -> None:
    written = torch.randn(200, 200)
    root, values = read_plain(memoryview(pickle.dumps(written, protocol=2)))
    assert isinstance(root.arguments[0].arguments[0].arguments[0], LongText)
    assert size_of(root) == (200, 200) and values.tensor(root).equal(written)


def test_only_what_is_wanted_is_read_and_only_once_over() -> None:
    root, _ = read_plain(memoryview(pickle.dumps({str(i): whole for i in range(5)}, protocol=4)))
    values = Values(3 * whole.numel() * 4)
    for name in ("0", "1", "2"):
        assert values.tensor(root[name]).equal(whole)
    with pytest.raises(WeightsError, match="many times larger than the file"):
        values.tensor(root["3"])


def test_python_two_wrote_classes_and_dicts_otherwise() -> None:
    ordered = Node("collections.OrderedDict", ([["a", 1], ["b", 2]],))
    easy = Node("copy_reg._reconstructor", (Global("dnnlib.util.EasyDict"), Global("__builtin__.dict"), {"a": 1}))
    assert items_of(ordered) == {"a": 1, "b": 2} and items_of(easy) == {"a": 1} and Values(0).plain(easy) == {"a": 1}
    with pytest.raises(WeightsError, match=r"an object of torch\.optim stands where a dict is expected"):
        items_of(Node("torch.optim"))


@pytest.mark.parametrize("code", [("f8", ">"), ("O8", "|"), ("M8", "<")])
def test_strange_numbers_of_numpy_are_refused(code: tuple[str, str]) -> None:
    kind = Node("numpy.dtype", (code[0], False, True), (3, code[1], None, None, None, -1, -1, 0))
    with pytest.raises(WeightsError, match="NumPy"):
        Values(0).plain(Node("numpy.core.multiarray.scalar", (kind, memoryview(b"\0" * 8))))


def test_other_objects_are_named() -> None:
    assert described(Node("a.b")) == "an object of a.b" and described([]) == "a list"
    for value in (Node("a.b"), Global("a.b"), memoryview(b"x" * 10**5), [Node("a.b")]):
        with pytest.raises(WeightsError, match="expected"):
            Values(0).plain(value)
    with pytest.raises(WeightsError, match="bytes are expected"):
        raw_bytes(Node("_codecs.encode", ("x", "zip")))


def test_archives_that_others_packed(tmp_path: Path) -> None:
    data = archive({"a": torch.ones(3)})
    for method, fine in ((zipfile.ZIP_STORED, True), (zipfile.ZIP_DEFLATED, False)):
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(tmp_path / "new.pt", "w", method) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        if fine:
            root, values = read_archive(map_file(tmp_path / "new.pt"), ALLOWED)
            assert values.plain(root)["a"].equal(torch.ones(3))
        else:
            with pytest.raises(WeightsError, match="compressed"):
                read_archive(map_file(tmp_path / "new.pt"), ALLOWED)


def test_archives_beyond_four_gigabytes_have_wide_sizes() -> None:
    """As written by programs that put every size into the extra field and the place of the directory into the wide end."""
    name, content = b"a/data.pkl", b"\x80\x02}."
    header = b"PK\3\4" + struct.pack("<HHHHHIIIHH", 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(name), 0) + name
    extra = struct.pack("<HHQQQ", 1, 24, len(content), len(content), 0)
    entry = b"PK\1\2" + struct.pack("<HHHHHHIIIHHHHHII", 45, 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(name), len(extra), 0, 0, 0, 0, 2**32 - 1)
    entry += name + extra
    start = len(header) + len(content)
    wide = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, len(entry), start)
    locator = b"PK\6\7" + struct.pack("<IQI", 0, start + len(entry), 1)
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 2**32 - 1, 2**32 - 1, 0)
    found = archive_entries(memoryview(header + content + entry + wide + locator + end))
    assert bytes(found["a/data.pkl"]) == content


def test_errors_name_the_file_and_damage_of_every_kind_is_one() -> None:
    for error in (WeightsError("is odd"), KeyError("x"), RuntimeError("x"), struct.error("x")):
        with pytest.raises(WeightsError, match=r"^some\.pt: (is odd|its content makes no sense)"), naming("some.pt"):
            raise error


def test_what_is_no_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path, said in ((tmp_path, "is not a file"), (tmp_path / "none", "is not a file"), (tmp_path / "empty", "is empty")):
        with pytest.raises(WeightsError, match=said):
            map_file(path)
