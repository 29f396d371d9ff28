import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from talk3d.errors import ConfigError, WeightsError
from talk3d.io.writing import VideoWriter
from talk3d.metrics import film
from talk3d.metrics.report import measure
from talk3d.stages.compare import FROZEN, CompareConfig, compare, cut, rank, ranked_by, read_crops
from talk3d.types import Clip

SIDE = 64


@pytest.fixture(autouse=True)
def no_face_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path | None = None) -> None:
        raise WeightsError("none")

    monkeypatch.setattr(film, "load_face_model", refuse)


def write(path: Path, frames: np.ndarray) -> Path:
    with VideoWriter(path, frames.shape[2], frames.shape[1], crf=1) as writer:
        for frame in frames:
            writer.write(np.ascontiguousarray(frame))
    return path


def test_ranks_are_averaged_over_what_all_have() -> None:
    columns = {
        "a": [measure("psnr_mask", 30.0), measure("lmd_lips", 0.02), measure("jitter", 0.5), measure("csim", 0.9)],
        "b": [measure("psnr_mask", 28.0), measure("lmd_lips", 0.01), measure("jitter", 0.9), measure("csim", [])],
        "c": [measure("psnr_mask", 28.0), measure("lmd_lips", 0.03), measure("jitter", 0.1), measure("csim", 0.1)],
    }
    truth = [measure("jitter", 0.6), measure("psnr_mask", 100.0)]
    # psnr: 1, 2.5, 2.5; lips: 2, 1, 3; jitter's distance from 0.6: 0.1, 0.3, 0.5; csim is not known of b
    expected = {"a": 4 / 3, "b": 5.5 / 3, "c": 8.5 / 3}
    found = rank(columns, truth)
    assert list(found) == ["a", "b", "c"]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value)
    assert ranked_by(columns, truth) == ["psnr_mask", "lmd_lips", "jitter"]
    assert ranked_by(columns, truth[1:]) == ["psnr_mask", "lmd_lips"], "nothing says how much the real film trembles"


def test_films_are_cut_as_the_clip_was(tmp_path: Path) -> None:
    # a picture twice as fine as the crop, whose crop begins at (20, 10)
    ramp = np.stack(np.meshgrid(np.arange(200), np.arange(160)), -1).astype(np.uint8)
    picture = np.concatenate([ramp, np.full((160, 200, 1), 7, np.uint8)], -1)
    crop = cut(picture, np.array([[0.5, 0.0, -10.0], [0.0, 0.5, -5.0]]), 32, tmp_path)
    expected = 20 + 2 * np.arange(32) + 0.5
    assert crop.shape == (32, 32, 3)
    np.testing.assert_allclose(crop[5, :, 0], expected, atol=0.51)
    np.testing.assert_allclose(crop[:, 5, 1], expected - 10, atol=0.51)
    with pytest.raises(ConfigError, match="outside"):
        cut(picture, np.array([[0.5, 0.0, -1000.0], [0.0, 0.5, -5.0]]), 32, tmp_path)


def test_a_film_of_all_frames_or_of_the_held_out_ones(clip: Clip, tmp_path: Path) -> None:
    held = torch.arange(12, 16)
    for name, frames in (("all.mp4", clip.frames), ("held.mp4", clip.frames[12:])):
        crops = read_crops(write(tmp_path / name, frames), clip, held)
        assert np.abs(crops.astype(int) - clip.frames[12:]).mean() < 4
        crops = read_crops(tmp_path / name, clip, held[:2], cropped=True)
        assert crops.shape == (2, SIDE, SIDE, 3)
    with pytest.raises(ConfigError, match="10 frames, the clip 16, the last 4"):
        read_crops(write(tmp_path / "other.mp4", clip.frames[:10]), clip, held)


def test_the_real_film_beats_an_avatar_that_shows_colours(clip: Clip, make_avatar: Callable[..., Any], tmp_path: Path) -> None:
    path = write(tmp_path / "real.mp4", clip.frames)
    report = compare({"colours": make_avatar(side=32), "film": path}, clip, CompareConfig(max_frames=3))
    late = "truth 200 ms late"
    assert list(report.columns) == ["film", "colours", "truth", late, FROZEN] and list(report.facts["ranking"]) == ["film", "colours"]
    assert report.facts["ranked_by"] == ["psnr_mask", "ssim_mask", "flicker"], "no face model, no published network"
    ours, theirs = report.value("psnr_mask", "film"), report.value("psnr_mask", "colours")
    assert ours is not None and theirs is not None and ours > 25 > theirs
    assert report.value("psnr_mask", "truth") == 100 and report.measures[0].num_frames == 3
    assert report.films is not None and list(report.films.pictures) == ["real", "film", "colours"]
    assert report.facts["driven_by"]["films of others"].startswith("unknown")
    assert not {"novel_views", "sound alone"} & report.facts["driven_by"].keys(), "neither is looked at here"


def test_controls_are_the_real_film_but_for_one_thing(clip: Clip, make_avatar: Callable[..., Any]) -> None:
    clip = dataclasses.replace(clip, num_training_frames=9)  # 7 held out
    report = compare({"colours": make_avatar(side=32)}, clip, CompareConfig())
    film = clip.frames.astype(float)
    late = [_psnr(film[k - 5], film[k]) for k in range(9, 16)]
    still = [_psnr(film[9], film[k]) for k in range(9, 16)]
    for column, expected in (("truth 200 ms late", late), (FROZEN, still)):
        assert report.value("psnr", column) == pytest.approx(np.mean(expected), abs=0.01)
    without = compare({"colours": make_avatar(side=32)}, clip, CompareConfig(controls=False))
    assert list(without.columns) == ["colours", "truth"]


def _psnr(ours: np.ndarray, real: np.ndarray) -> float:
    error = ((ours - real) ** 2).mean() / 255**2
    return 100.0 if error == 0 else -10 * np.log10(error)


def test_films_are_looked_at_before_anything_is_rendered(clip: Clip, make_avatar: Callable[..., Any], tmp_path: Path) -> None:
    short = write(tmp_path / "short.mp4", clip.frames[:10])
    stages: list[str] = []
    with pytest.raises(ConfigError, match="10 frames, the clip 16"):
        compare({"avatar": make_avatar(side=32), "film": short}, clip, progress=lambda stage, *_: stages.append(stage))
    assert stages == []


def test_what_cannot_be_compared_is_refused(clip: Clip, make_avatar: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare({}, clip)
    with pytest.raises(ConfigError, match="called truth"):
        compare({"truth": make_avatar(side=32)}, clip)
    with pytest.raises(ConfigError, match="'hubert'"):
        compare({"a": make_avatar(side=32, audio_source="hubert")}, clip)
    with pytest.raises(ConfigError, match="nothing honest"):
        compare({"a": make_avatar(side=32)}, dataclasses.replace(clip, num_training_frames=16))
    with pytest.raises(ConfigError, match="positive"):
        CompareConfig(batch_size=0)
