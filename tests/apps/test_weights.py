"""What `talk3d weights` says and does."""

import pickle
from pathlib import Path

import pytest

from talk3d.apps.cli import main
from talk3d.io.weights import load_prior


def test_import_makes_a_prior(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "import", str(shared / "fixtures" / "eg3d_tiny128.pkl"), "-o", str(tmp_path / "prior.t3d")]) == 0
    said = capsys.readouterr().out
    assert "128 pixels, fixed axes" in said and "d4ad58b6547019a2454038c3295551177120d6d774728e2c1e13f5d49ddacacb" in said
    assert load_prior(tmp_path / "prior.t3d").generator.config.z_dim == 64


def test_import_refuses_what_wants_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"G_ema": print}, protocol=4))
    assert main(["weights", "import", str(tmp_path / "bad.pkl")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "wants the global builtins.print" in line and not (tmp_path / "bad.t3d").exists()
