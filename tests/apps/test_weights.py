"""What `talk3d weights` says and does; the internet is never asked."""

import pickle
from pathlib import Path

import pytest
import torch

from talk3d.apps import weights
from talk3d.apps.cli import main
from talk3d.io import catalogue
from talk3d.io.catalogue import CATALOGUE, Published, PublishedFile
from talk3d.io.weights import load_prior
from talk3d.perception.bisenet import BiSeNet


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a catalogue whose only address is a file of this machine."""
    state = BiSeNet().state_dict()
    torch.save(state, tmp_path / "source.pth")
    file = PublishedFile(path="net.pth", url=(tmp_path / "source.pth").as_uri(), size_bytes=60_000_000)
    entry = Published(name="bisenet", files=(file,), licence="for research", commercial=False, unlocks="masks")
    for module in (catalogue, weights):
        monkeypatch.setattr(module, "CATALOGUE", {"bisenet": entry})
        monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_list_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "list"]) == 0
    shown = capsys.readouterr().out
    for entry in CATALOGUE.values():
        assert entry.name in shown and entry.unlocks in shown and entry.licence in shown and all(file.url in shown for file in entry.files)


def test_every_network_is_loaded_by_verify() -> None:
    assert weights.LOADERS.keys() == CATALOGUE.keys()


def test_fetch_then_verify(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "verify"]) == 0
    assert "no optional network" in capsys.readouterr().out
    assert main(["weights", "fetch", "bisenet"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("for research; not for commercial use") < shown.index("net.pth: there, checked")
    assert main(["weights", "list"]) == 0 and "there" in capsys.readouterr().out
    assert main(["weights", "verify"]) == 0
    assert capsys.readouterr().out == "bisenet: good\n"
    torch.save({"a": torch.zeros(1)}, cache / "net.pth")
    assert main(["weights", "verify", "bisenet"]) == 2
    said = capsys.readouterr()
    assert "is not the first seen" in said.out and "cannot be used" in said.err
    (cache / "sha256.json").unlink()
    assert main(["weights", "verify", "bisenet"]) == 2
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"), [(["fetch", "foo"], "no network 'foo'"), (["fetch"], "give names"), (["verify", "bisenet"], "cannot be used"), ([], "")]
)
def test_mistakes_are_one_line(arguments: list[str], said: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del cache
    assert main(["weights", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_import_makes_a_prior(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "import", str(shared / "fixtures" / "eg3d_tiny128.pkl"), "-o", str(tmp_path / "prior.t3d")]) == 0
    said = capsys.readouterr().out
    assert "128 pixels, fixed axes" in said and "d4ad58b6547019a2454038c3295551177120d6d774728e2c1e13f5d49ddacacb" in said
    prior = load_prior(tmp_path / "prior.t3d")
    assert prior.generator.config.z_dim == 64
    assert "not placed in head space" in said and "head_space" not in prior.provenance  # its average is no face


def test_import_refuses_what_wants_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"G_ema": print}, protocol=4))
    assert main(["weights", "import", str(tmp_path / "bad.pkl")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "wants the global builtins.print" in line and not (tmp_path / "bad.t3d").exists()
