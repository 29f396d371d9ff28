"""The commands round priors: made from a zip with sheets and TensorBoard's files, looked at, and refused early."""

import json
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from talk3d.apps.cli import main
from talk3d.apps.prior import recorded
from talk3d.errors import ConfigError
from talk3d.io.weights import load_prior
from talk3d.ops.geometry import head_camera


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    """A zip of two green pictures."""
    labels = []
    with zipfile.ZipFile(tmp_path / "heads.zip", "w") as archive:
        for i in range(2):
            content = BytesIO()
            Image.new("RGBA", (64, 64), (0, 200, 0, 255)).save(content, "PNG")
            archive.writestr(f"{i}.png", content.getvalue())
            labels.append([f"{i}.png", head_camera(torch.tensor([0.3 * i, 0.0, 0.0])).to_label().tolist()])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return tmp_path / "heads.zip"


def test_a_prior_is_made_and_shown(heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, sheets, board = tmp_path / "prior.t3d", tmp_path / "sheets", tmp_path / "board"
    small = ["--start", "tiny", "--steps", "5", "--samples-per-step", "2", "--encoder.side", "32", "--encoder.width", "4", "--device", "cpu"]
    assert main(["pretrain", str(heads), "-o", str(out), *small, "--sheets", str(sheets), "--tensorboard", str(board)]) == 0
    assert load_prior(out).encoder is not None
    assert [path.name for path in sheets.iterdir()] == ["0000000.png"]
    assert any(path.name.startswith("events") for path in board.iterdir())
    assert [path.name for path in tmp_path.glob("*.checkpoint")] == []
    arguments = ["--device", "cpu", "--num-people", "2", "--orbit-frames", "3", "--mesh-side", "0"]
    assert main(["prior", "show", str(out), "-o", str(tmp_path / "shown"), *arguments]) == 0
    assert {path.name for path in (tmp_path / "shown").iterdir()} == {"grid.png", "person.png", "orbit.mp4"}
    assert "grid.png" in capsys.readouterr().out


def test_two_processes_make_one_prior(heads: Path, tmp_path: Path) -> None:
    out = tmp_path / "prior.t3d"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", "--"]
    talk3d = [sys.executable, "-c", "from talk3d.apps.cli import main; raise SystemExit(main())"]
    small = ["--start", "tiny", "--steps", "3", "--samples-per-step", "2", "--encoder.side", "32", "--encoder.width", "4", "--device", "cpu"]
    ran = subprocess.run([*torchrun, *talk3d, "pretrain", str(heads), "-o", str(out), *small], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("next, talk3d prior show") == 1
    assert load_prior(out).provenance["steps"] == 3 and not list(tmp_path.glob("*.checkpoint"))


def test_what_cannot_work_is_refused_in_one_line(heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prior", "show", str(tmp_path / "absent.t3d"), "-o", str(tmp_path / "shown")]) == 2
    assert main(["prior", "show", "builtin", "-o", str(heads)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2 and "does not exist" in errors[0] and "is a file" in errors[1]


def test_progress_goes_on_while_it_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, int]] = []
    for folder in (None, tmp_path / "board"):
        with recorded(lambda stage, step, total, values: heard.append((stage, step)), folder) as progress:
            progress("pretrain", 3, 10, {"image": 0.5})
    assert heard == [("pretrain", 3)] * 2
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'talk3d\[tensorboard\]'"), recorded(lambda *given: None, tmp_path):
        pass
