import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from talk3d.apps import build as building
from talk3d.apps.build import (
    BuildConfig,
    build,
    checkpoint_beside,
    fingerprint,
    place_and_save,
    placed_prior,
    remove_checkpoints,
    sha256_of,
)
from talk3d.errors import ConfigError, TrackingError
from talk3d.io.weights import load_prior, save_prior
from talk3d.models.avatar import Prior
from talk3d.models.generator import TriplaneGenerator
from talk3d.presets import TINY

Calls = list[str]


class Product:
    def __init__(self, name: str) -> None:
        self.name = name
        self.check: dict[str, Any] = {}

    def save(self, path: Path) -> None:
        path.write_text(self.name)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stages that only note that they were called; training leaves a checkpoint."""
    made: Calls = []

    def track(video: Path, config: Any, **rest: Any) -> Product:
        made.append("track")
        return Product("clip")

    def personalize(clip: str, prior: str, config: Any, **rest: Any) -> Product:
        made.append(f"personalize {clip} {prior}")
        return Product("person")

    def train(person: str, clip: str, config: Any, *, checkpoint: Path, **rest: Any) -> Product:
        made.append(f"train {person} {clip}" + (f" from {checkpoint.read_text()}" if checkpoint.exists() else ""))
        checkpoint.write_text(f"step {config.steps}")
        return Product("avatar")

    for stage in (track, personalize, train):
        monkeypatch.setattr(building, stage.__name__, stage)
    for load in ("load_clip", "load_person"):
        monkeypatch.setattr(building, load, Path.read_text)
    monkeypatch.setattr(building, "placed_prior", lambda prior, *rest: prior)
    return made


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "me.mp4"
    path.write_bytes(b"film")
    return path


ALL = ["track", "personalize clip builtin", "train person clip"]


def test_products_are_kept_and_finished_stages_skipped(video: Path, tmp_path: Path, calls: Calls) -> None:
    out = tmp_path / "me.t3d"
    assert build(video, out, BuildConfig()) == ["track", "personalize", "train"]
    assert calls == ALL
    assert {path.name for path in (tmp_path / "me.build").iterdir()} == {"clip", "person.t3d", "train.checkpoint", "manifest.json"}
    assert build(video, out, BuildConfig()) == []
    assert calls == ALL


def test_other_settings_redo_only_what_depends_on_them(video: Path, tmp_path: Path, calls: Calls) -> None:
    out, config = tmp_path / "me.t3d", BuildConfig()
    build(video, out, config)
    longer = replace(config, train=replace(config.train, steps=config.train.steps + 1))
    assert build(video, out, longer) == ["train"]
    assert calls[-1] == "train person clip"  # not from the checkpoint of other settings
    assert build(video, out, longer, seed=5) == ["personalize", "train"]


def test_an_interrupted_stage_goes_on_from_its_checkpoint(video: Path, tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = tmp_path / "me.t3d", building.train

    def interrupted(*given: Any, checkpoint: Path, **rest: Any) -> Product:
        checkpoint.write_text("step 7")
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(video, out, BuildConfig())
    assert not out.exists()
    monkeypatch.setattr(building, "train", whole)
    assert build(video, out, BuildConfig()) == ["train"]
    assert calls[-1] == "train person clip from step 7"


def test_a_lost_avatar_comes_back_from_the_checkpoint(video: Path, tmp_path: Path, calls: Calls) -> None:
    out = tmp_path / "me.t3d"
    build(video, out, BuildConfig())
    out.unlink()
    assert build(video, out, BuildConfig()) == ["train"]
    assert " from step " in calls[-1]


def test_products_of_another_video_are_never_used(video: Path, tmp_path: Path, calls: Calls) -> None:
    out, other = tmp_path / "me.t3d", tmp_path / "you.mp4"
    build(video, out, BuildConfig())
    other.write_bytes(b"another film")
    with pytest.raises(ConfigError, match=r"another video \(me.mp4\): give another -o, or --fresh"):
        build(other, out, BuildConfig())
    assert calls == ALL
    assert build(other, out, BuildConfig(), fresh=True) == ["track", "personalize", "train"]
    assert json.loads((tmp_path / "me.build" / "manifest.json").read_text())["video"] == "you.mp4"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_foreign_folder_is_left_alone(video: Path, tmp_path: Path, calls: Calls, fresh: bool) -> None:
    (tmp_path / "me.build").mkdir()
    (tmp_path / "me.build" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="no build folder of talk3d"):
        build(video, tmp_path / "me.t3d", BuildConfig(), fresh=fresh)
    assert (tmp_path / "me.build" / "thesis.txt").exists()
    assert calls == []


@dataclass(frozen=True)
class Settings:
    steps: int = 3


def test_fingerprints_follow_content(tmp_path: Path) -> None:
    path = tmp_path / "person"
    path.write_bytes(b"abc")
    first = fingerprint(path, Settings(), 0)
    copy = tmp_path / "copy"
    copy.write_bytes(b"abc")
    assert fingerprint(copy, Settings(), 0) == first
    assert fingerprint(copy, Settings(steps=4), 0) != first
    assert fingerprint(copy, Settings(), 1) != first
    path.write_bytes(b"abd")
    assert fingerprint(path, Settings(), 0) != first


def test_fingerprints_of_folders_follow_their_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    os.utime(tmp_path / "a", (1, 1))
    assert fingerprint(tmp_path) != first


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_only_the_checkpoints_of_one_output_are_removed(tmp_path: Path) -> None:
    mine, other = checkpoint_beside(tmp_path / "a[1].t3d", 1), checkpoint_beside(tmp_path / "b.t3d", 1)
    earlier = checkpoint_beside(tmp_path / "a[1].t3d", 2)
    for path in (mine, other, earlier):
        path.touch()
    remove_checkpoints(tmp_path / "a[1].t3d")
    assert list(tmp_path.iterdir()) == [other]


def test_a_refused_video_stops_before_anything_is_made_unless_told_otherwise(
    video: Path, tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {"what": "sound", "found": "-90 dB", "judgement": "refuse", "advice": "record with a microphone"}

    def track(video: Path, config: Any, *, review: Any, **rest: Any) -> Product:
        review({"verdict": "refuse", "lines": [line], "warnings": []})
        return Product("clip")

    monkeypatch.setattr(building, "track", track)
    with pytest.raises(TrackingError, match=r"me.mp4: -90 dB: record with a microphone; --yes"):
        build(video, tmp_path / "me.t3d", BuildConfig())
    assert calls == [] and list(tmp_path.iterdir()) == [video]
    assert build(video, tmp_path / "me.t3d", BuildConfig(), yes=True) == ["track", "personalize", "train"]


def test_priors_are_placed_once_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def place(prior: Prior, model: str, *, device: str) -> Prior:
        return Prior(generator=prior.generator, w_std=prior.w_std, provenance={"head_space": {"residual": 0.004, "face_model": f"{model} {device}"}})

    monkeypatch.setattr(building, "load_face_model", lambda path=None: path or "usual")
    monkeypatch.setattr(building, "place_prior", place)
    save_prior(Prior(generator=TriplaneGenerator(TINY), w_std=1.0, provenance={}), tmp_path / "old.t3d")
    assert placed_prior(str(tmp_path / "old.t3d"), "cpu", Path("other")).provenance["head_space"]["face_model"] == "other cpu"
    place_and_save(load_prior(tmp_path / "old.t3d"), tmp_path / "new.t3d", "cpu")
    assert capsys.readouterr().out == "placed in head space; face points are 0.4% of a head off\n"
    assert placed_prior(str(tmp_path / "new.t3d"), "cpu", Path("other")).provenance["head_space"]["face_model"] == "usual cpu"
    assert "head_space" not in placed_prior("builtin", "cpu").provenance
