"""Weights on disk: exact round trips, atomic writes, and one-line errors for every damaged file."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from talk3d.errors import WeightsError
from talk3d.io.weights import config_from_json, config_to_json, load_strictly, load_tensors, pack_state, save_tensors, unpack_state
from talk3d.presets import BUILTIN256, TINY_AVATAR


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "thing.safetensors"
    save_tensors(path, {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bool)}, {"kind": "thing", "number": 3})
    return path


def test_tensors_and_header_come_back(saved: Path) -> None:
    tensors, header = load_tensors(saved, "thing")
    assert tensors["a"].equal(torch.arange(6.0).view(2, 3)) and tensors["b"].dtype == torch.bool
    assert header == {"kind": "thing", "number": 3}
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_shared_strided_and_learnt_tensors_can_be_saved(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    learnt = nn.Parameter(torch.ones(2))
    save_tensors(tmp_path / "x", {"whole": whole, "same": whole, "turned": whole.T, "learnt": learnt}, {"kind": "thing"})
    tensors, _ = load_tensors(tmp_path / "x", "thing")
    assert tensors["turned"].equal(whole.T) and tensors["same"].equal(whole) and not tensors["learnt"].requires_grad


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def scribble(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("no weights, just words\n" * 20)


def broken_header(path: Path) -> None:
    save_file({"a": torch.ones(1)}, path, metadata={"talk3d": "{not json"})


@pytest.mark.parametrize("damage", [truncate, scribble, empty, text, broken_header])
def test_damaged_files_are_refused_in_one_line(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved)
    with pytest.raises(WeightsError, match="is damaged or no safetensors file") as caught:
        load_tensors(saved, "thing")
    assert saved.name in str(caught.value) and "\n" not in str(caught.value)


def foreign(path: Path) -> None:
    save_file({"a": torch.ones(1)}, path)


def other_kind(path: Path) -> None:
    save_tensors(path, {"a": torch.ones(1)}, {"kind": "prior"})


def list_header(path: Path) -> None:
    save_file({"a": torch.ones(1)}, path, metadata={"talk3d": "[1]"})


@pytest.mark.parametrize(("make", "found"), [(foreign, "something else"), (other_kind, "prior"), (list_header, "something else")])
def test_files_of_another_kind_are_named(tmp_path: Path, make: Callable[[Path], None], found: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(WeightsError, match=f"holds {found}, expected a talk3d avatar"):
        load_tensors(tmp_path / "x", "avatar")


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_what_is_no_file_is_said_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match="is not a file: give the path of a saved avatar"):
        load_tensors(tmp_path / name, "avatar")


def test_an_unwritable_place_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "missing" / "x", tmp_path / "folder"):
        with pytest.raises(WeightsError, match="cannot write") as caught:
            save_tensors(target, {"a": torch.ones(1)}, {"kind": "thing"})
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_failing_write_keeps_the_old_file_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(WeightsError, match="disk full"):
        save_tensors(saved, {"a": torch.zeros(100)}, {"kind": "thing"})
    assert saved.read_bytes() == before and [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_header_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    with pytest.raises(WeightsError, match="damaged"):
        load_tensors(tmp_path / "x", "thing")


def test_strict_loading_copies_and_widens() -> None:
    module = nn.Linear(2, 3)
    load_strictly(module, {"weight": torch.full((3, 2), 0.5, dtype=torch.float16), "bias": torch.ones(3)}, "x")
    assert module.weight.eq(0.5).all() and module.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"weight": torch.ones(3, 2)}, r"missing \['bias'\]"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(3), "more": torch.ones(1)}, r"unexpected \['more'\]"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(3)}, r"wrong shape \['weight \(2, 3\) instead of \(3, 2\)'\]"),
    ],
)
def test_strict_loading_says_what_does_not_fit_and_changes_nothing(tensors: dict[str, torch.Tensor], said: str) -> None:
    module = nn.Linear(2, 3)
    before = module.weight.clone()
    with pytest.raises(WeightsError, match=said):
        load_strictly(module, tensors, "x")
    assert module.weight.equal(before)


@dataclass(frozen=True, kw_only=True)
class Inner:
    pair: tuple[int, int] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@pytest.mark.parametrize("config", [Outer(inner=Inner(pair=(3, 4)), kind="b"), BUILTIN256, TINY_AVATAR])
def test_configs_come_back_from_json(config: object) -> None:
    assert config_from_json(type(config), json.loads(json.dumps(config_to_json(config))), "x") == config


@pytest.mark.parametrize("values", [{"inner": {"pair": [1, 2]}, "more": 1}, {}, {"inner": {"pair": 3}}, {"inner": 4}, {"inner": {"trio": []}}])
def test_configs_of_another_version_are_refused(values: object) -> None:
    with pytest.raises(WeightsError, match="incompatible version"):
        config_from_json(Outer, values, "x")


def test_states_are_packed_and_unpacked_with_the_optimiser() -> None:
    module = nn.Linear(3, 2)
    optimizer = torch.optim.Adam([{"params": [module.weight], "betas": (0.0, 0.99)}, {"params": [module.bias], "lr": 0.1}])
    module(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {
        "module": module.state_dict(),
        "adam": optimizer.state_dict(),
        "numbers": [1, 2.5, None, "x", True],
        "by number": {3: {"t": torch.ones(2)}},
    }
    tensors, skeleton = pack_state(state)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # as a file would
    back = unpack_state(tensors, json.loads(json.dumps(skeleton)))
    assert back["numbers"] == [1, 2.5, None, "x", True] and back["by number"][3]["t"].equal(torch.ones(2))
    assert back["module"]["weight"].equal(module.weight)
    other = nn.Linear(3, 2)
    other.load_state_dict(back["module"])
    fresh = torch.optim.Adam([{"params": [other.weight]}, {"params": [other.bias]}])
    fresh.load_state_dict(back["adam"])
    x = torch.randn(4, 3)
    for net, opt in ((module, optimizer), (other, fresh)):
        opt.zero_grad()
        net(x).square().sum().backward()
        opt.step()
    assert other.weight.equal(module.weight) and other.bias.equal(module.bias)
