"""Published checkpoints: tensors come out, code does not run."""

import pickle
from pathlib import Path

import pytest
import torch

from talk3d.errors import WeightsError
from talk3d.io.published import read_checkpoint


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, (str(Path.cwd() / "never"), "w"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_come_back(tmp_path: Path, zipped: bool) -> None:
    state = {"state_dict": {"a.weight": torch.arange(6.0).view(2, 3)}, "step": 3}
    torch.save(state, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    back = read_checkpoint(tmp_path / "net.pth")
    assert back["step"] == 3 and torch.equal(back["state_dict"]["a.weight"], state["state_dict"]["a.weight"])


def test_nothing_of_a_hostile_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("pickle", pickle.dumps({"a": Hostile()})), ("noise", b"\x00" * 300), ("text", b"<html>"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match="read safely"):
            read_checkpoint(tmp_path / name)
    torch.save(torch.zeros(3), tmp_path / "tensor")
    with pytest.raises(WeightsError, match="dict of tensors"):
        read_checkpoint(tmp_path / "tensor")
    with pytest.raises(WeightsError, match="read safely"):
        read_checkpoint(tmp_path / "nowhere")
    assert not (tmp_path / "never").exists()
