"""The pickle machine: it agrees with Python's where it reads, and nothing gets out of it or through it."""

import io
import json
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from talk3d.errors import WeightsError
from talk3d.io.pickles import Global, LongText, Node, Persistent, read_pickle, shown

NOTHING = re.compile("(?!)")
ORDERED = re.compile(r"collections\.OrderedDict|builtins\.set|__builtin__\.set|_codecs\.encode|__builtin__\.bytes")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**100), 2**100) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=20,
)


def read(data: bytes, allowed: re.Pattern[str] = NOTHING) -> Any:
    return read_pickle(memoryview(data), allowed).value


@given(VALUES, st.integers(2, 5))
def test_plain_values_come_back(value: Any, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol=protocol)) == value


def test_python_agrees_in_its_slow_form() -> None:
    value = {"a": [1, 2**40, -(2**70), 0.1, None, True, ("x", ()), {"b": "é" * 300}], "": []}
    with io.BytesIO() as stream:
        pickle._Pickler(stream, 2).dump(value)
        assert read(stream.getvalue()) == value


def test_bytes_and_long_texts_stay_in_the_file() -> None:
    data = memoryview(pickle.dumps([b"x" * 10_000, "y" * 10_000], protocol=4))
    first, second = read_pickle(data, NOTHING).value
    assert isinstance(first, memoryview) and first.obj is data.obj and bytes(first) == b"x" * 10_000
    assert isinstance(second, LongText) and second.data.obj is data.obj


def test_sets_are_sets_and_shared_parts_are_shared() -> None:
    part = [1]
    value = read(pickle.dumps({"set": {1, "a"}, "one": part, "two": part}, protocol=4))
    assert value["set"] == {1, "a"} and value["one"] is value["two"]


def test_what_is_called_becomes_a_node() -> None:
    node = read(pickle.dumps(OrderedDict(a=1), protocol=4), ORDERED)
    assert isinstance(node, Node) and (node.name, node.arguments, node.items) == ("collections.OrderedDict", (), {"a": 1})
    assert isinstance(read(pickle.dumps(OrderedDict, protocol=2), ORDERED), Global)


def test_it_stops_where_the_pickle_stops_and_goes_on_from_there() -> None:
    data = memoryview(pickle.dumps(1, protocol=2) + pickle.dumps("b", protocol=4) + b"rest")
    first = read_pickle(data, NOTHING)
    assert first.value == 1 and read_pickle(data, NOTHING, start=first.end).value == "b"


def test_references_are_kept_in_order() -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", int(obj[1])) if obj in ("s1", "s2") else None

    with io.BytesIO() as stream:
        Pickler(stream, 2).dump(["s1", "x", "s2"])
        data = memoryview(stream.getvalue())
    pickled = read_pickle(data, NOTHING, references=True)
    assert [reference.key for reference in pickled.references] == [("storage", 1), ("storage", 2)]
    assert isinstance(pickled.value[0], Persistent) and pickled.value[1] == "x"
    with pytest.raises(WeightsError, match="persistent reference"):
        read_pickle(data, NOTHING)


def test_a_global_that_is_not_allowed_is_named() -> None:
    with pytest.raises(WeightsError, match=r"wants the global posix\.system, which weights do not need, so nothing of it was run"):
        read(b"\x80\x02cposix\nsystem\n.", ORDERED)


def test_names_of_a_file_cannot_write_on_a_terminal() -> None:
    assert shown("a\x1b[31m\n" + "x" * 100) == "a\\x1b[31m\\n" + "x" * 73 and shown("é") == "\\xe9"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[Path], dict[str, Any]]:
    def run(good: Path) -> dict[str, Any]:
        state = {"a.weight": torch.arange(12.0).view(3, 4), "nested": {"b": torch.ones(2, dtype=torch.float16)}}
        torch.save(state, good.parent / "zip.pt")
        torch.save(state, good.parent / "legacy.pt", _use_new_zipfile_serialization=False)
        good.rename(good.parent / "eg3d.pkl")
        program = Path(__file__).with_name("hostile.py")
        done = subprocess.run([sys.executable, str(program), str(good.parent)], capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return run


def test_hundreds_of_hostile_files_are_refused_and_run_nothing(write_eg3d: Callable[..., Any], outcome: Callable[[Path], dict[str, Any]]) -> None:
    found = outcome(write_eg3d()[0])
    accepted = {
        f"{name}, {reader}: {what}" for name, by_reader in found["results"].items() for reader, what in by_reader.items() if what != "refused"
    }
    assert not accepted and len(found["results"]) > 500
    assert not found["ran"] and found["grown_mib"] < 200


BASES = {
    protocol: pickle.dumps({"a": [1, 2.5, None, ("x", b"y" * 9)], "b": {"c": {1, 2}}, "d": OrderedDict(e="f" * 5000)}, protocol=protocol)
    for protocol in (2, 4)
}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([2, 4]), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8), st.integers(0, 10_000))
def test_changed_bytes_are_read_or_refused(protocol: int, changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(BASES[protocol])
    for place, value in changes:
        data[place % len(data)] = value
    try:
        read(bytes(data[: length or None]), ORDERED)
    except WeightsError as error:
        assert "\n" not in str(error)
