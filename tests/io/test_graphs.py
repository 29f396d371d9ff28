"""Constants out of frozen graphs, written here byte by byte; whatever is broken is one typed error."""

import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from talk3d.errors import WeightsError
from talk3d.io import graphs
from talk3d.io.graphs import read_constants


def integer(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return integer(number << 3) + integer(content)
    return integer(number << 3 | 2) + integer(len(content)) + content


def constant(name: str, value: Tensor, kind: int = 1) -> bytes:
    shape = b"".join(field(2, field(1, size)) for size in value.shape)
    tensor = field(1, kind) + field(2, shape) + field(4, value.numpy().tobytes())
    attributes = field(5, field(1, b"dtype") + field(2, field(6, kind))) + field(5, field(1, b"value") + field(2, field(8, tensor)))
    return field(1, field(1, name.encode()) + field(2, b"Const") + attributes)


def graph(constants: dict[str, Tensor]) -> bytes:
    other = field(1, field(1, b"x") + field(2, b"Placeholder") + field(3, b"y"))
    return other + b"".join(constant(name, value) for name, value in constants.items()) + field(4, field(1, 26))


TENSORS = {"h1": torch.arange(300.0).view(150, 2), "cell/bias": torch.ones(3), "scalar": torch.tensor(2.0)}


@pytest.mark.parametrize("zipped", [False, True])
def test_float_constants_come_out(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "graph.pb"
    path.write_bytes(graph(TENSORS) + constant("step", torch.arange(3, dtype=torch.int32), kind=3))
    if zipped:
        with zipfile.ZipFile(tmp_path / "graph.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, "graph.pb")
        path = tmp_path / "graph.zip"
    found = read_constants(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "graph.pb"
    for content, said in (
        (b"", "no constants"),
        (graph({}), "no constants"),
        (graph(TENSORS)[:-50], "no frozen graph"),
        (b"\x0b" * 9, "field of kind"),
    ):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=said):
            read_constants(path)
    with pytest.raises(WeightsError, match="no frozen graph"):
        read_constants(tmp_path / "nowhere")
    wrong = constant("h", torch.zeros(4)).replace(field(2, field(1, 4)), field(2, field(1, 5)))
    path.write_bytes(wrong)
    with pytest.raises(WeightsError, match="has 16 bytes"):
        read_constants(path)
    path.write_bytes(graph(TENSORS))
    monkeypatch.setattr(graphs, "MAX_BYTES", 100)
    with pytest.raises(WeightsError, match="larger than"):
        read_constants(path)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("graph.pb", bytes(10_000))
    with pytest.raises(WeightsError, match="more than 100"):
        read_constants(tmp_path / "bomb.zip")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_graphs_give_typed_errors(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(graph(TENSORS))
    for place, value in changes:
        data[place % len(data)] = value
    (tmp_path / "graph.pb").write_bytes(data)
    try:
        read_constants(tmp_path / "graph.pb")
    except WeightsError as error:
        assert "\n" not in str(error)
