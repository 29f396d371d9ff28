"""Tracking a rendered person whose cameras are known, and videos that cannot be tracked."""

import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from talk3d.errors import ConfigError, MediaError, TrackingError
from talk3d.io.clips import load_clip
from talk3d.io.media import read_audio, read_video
from talk3d.io.writing import VideoWriter
from talk3d.ops.geometry import fit_similarity, head_camera, project, view_angles
from talk3d.perception.facetemplate import load_template
from talk3d.perception.headpose import solve_head_pose
from talk3d.perception.parsing import REGIONS, SelfieMatting
from talk3d.stages import pasting
from talk3d.stages import track as tracking
from talk3d.types import WIDER, Clip, Waveform

NUM_FRAMES = 75


@pytest.fixture(scope="module")
def person(person_11: Path) -> Path:
    return person_11


@pytest.fixture(scope="module")
def film(person: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a film of the person's first frames, changed by a function."""
    frames = list(islice(read_video(person / "video.mp4"), NUM_FRAMES))
    sound = read_audio(person / "video.mp4")

    def write(change: Callable[[list[np.ndarray]], Iterable[np.ndarray]] = list, audio: Waveform | None = sound) -> Path:
        path = tmp_path_factory.mktemp("film") / "film.mp4"
        pictures = list(change(frames))
        height, width = pictures[0].shape[:2]
        with VideoWriter(path, width, height, audio=audio) as writer:
            for picture in pictures:
                writer.write(picture)
        return path

    return write


@pytest.fixture(scope="module")
def clip(film: Callable[..., Path]) -> Clip:
    return tracking.track(Path(os.path.relpath(film())))  # as one gives it who stands beside it


def test_a_clip_holds_every_frame_and_its_split(clip: Clip):
    assert clip.num_frames == NUM_FRAMES
    assert clip.num_training_frames == NUM_FRAMES - NUM_FRAMES // 5
    assert clip.frames.shape == (NUM_FRAMES, 256, 256, 3)
    assert clip.masks.person.shape == (NUM_FRAMES, 256, 256)
    assert clip.waveform.samples.shape[0] == NUM_FRAMES * 640
    assert clip.audio.values.shape == (NUM_FRAMES, 16, 64)
    assert len(clip.source_sha256) == 64
    assert Path(clip.source).is_absolute() and Path(clip.source).is_file()
    assert clip.check["duplicates"] == clip.check["missed_frames"] == 0
    assert clip.check["landmarks"].startswith("models of mediapipe") or clip.check["landmarks"] == "face_landmarker.task"
    assert any("short" in warning for warning in clip.check["warnings"])


def test_a_clip_says_how_it_was_smoothed_and_what_each_pixel_shows(clip: Clip):
    assert clip.check["smoothing"]["cutoff_hz"] == pytest.approx(3.04, abs=0.03)
    assert clip.check["smoothing"]["delay_frames"] == 0
    assert torch.equal(clip.track.blink, clip.track.eyes_shut.mean(-1, keepdim=True))
    assert clip.track.gaze.abs().median() < 0.2
    assert float((clip.masks.parts == 0).mean()) == pytest.approx(float((clip.masks.person <= 127).mean()))
    for region, least in {"face": 0.1, "hair": 0.02, "mouth": 0.005, "eyes": 0.003, "torso": 0.05}.items():
        assert np.isin(clip.masks.parts, REGIONS[region]).mean() > least, region


def test_cameras_have_the_priors_focal_length_and_distance_and_look_at_the_head(clip: Clip):
    cameras = clip.track.cameras
    assert torch.allclose(cameras.intrinsics[:, 0, 0], torch.tensor(4.2647))
    pivot = torch.tensor([[0.0, 0.0, 0.2]])
    assert (cameras.cam2world[:, :3, 3] - pivot).norm(dim=-1).mean() == pytest.approx(2.7, abs=0.02)
    assert (project(pivot.expand(NUM_FRAMES, 1, 3), cameras) - 0.5).abs().max() < 0.004  # crops are cut before the whole head is followed


def test_cameras_follow_the_truth_and_points_lie_on_the_projected_head(clip: Clip, person: Path):
    with np.load(person / "truth.npz") as truth:
        expected = torch.from_numpy(truth["cam2head"][:NUM_FRAMES, :16]).reshape(-1, 4, 4)[:, :3, :3]
    found = clip.track.cameras.cam2world[:, :3, :3]
    _, turn, _ = fit_similarity(found.mT.reshape(-1, 3), expected.mT.reshape(-1, 3), with_scale=False)
    error = torch.rad2deg(view_angles(turn @ found) - view_angles(expected)).abs().mean(0)
    assert error.max() < 0.12  # .15 where the face alone is followed
    mean_head = project(load_template("registry").points[None].expand(NUM_FRAMES, -1, -1), clip.track.cameras) * 256
    corners = [33, 133, 362, 263, 168, 1]
    assert (mean_head[:, corners] - clip.track.landmarks[:, corners]).norm(dim=-1).median() < 6
    assert torch.equal(clip.track.head_pose, view_angles(found.double()).float()) or torch.allclose(
        clip.track.head_pose, view_angles(found), atol=1e-4
    )


def test_lips_and_eye_corners_lie_where_the_truth_has_them(clip: Clip, person: Path):
    with np.load(person / "truth.npz") as known:
        truth = torch.from_numpy(known["landmarks"][:NUM_FRAMES]).double()
    crop = torch.from_numpy(clip.track.crop)
    truth = truth @ crop[:, :, :2].mT + crop[:, None, :, 2]
    eyes = dict(zip((36, 39, 42, 45), (33, 133, 362, 263), strict=True))
    lips = dict(zip(range(48, 68), (61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 81, 13, 311, 308, 402, 14, 178), strict=True))
    apart = (truth[:, 36] - truth[:, 45]).norm(dim=-1)
    for pairs, most in ((eyes, 0.02), (lips, 0.028)):
        error = (clip.track.landmarks[:, list(pairs.values())] - truth[:, list(pairs)]).norm(dim=-1).mean(1) / apart
        assert error.mean() < most


def test_the_crop_map_cuts_what_it_says(clip: Clip, person: Path):
    frame = next(read_video(person / "video.mp4")).astype(float)
    scale, _, left = clip.track.crop[0, 0]
    top = clip.track.crop[0, 1, 2]
    rows, columns = np.meshgrid(np.arange(40, 216, 8), np.arange(40, 216, 8), indexing="ij")
    source_rows, source_columns = ((rows + 0.5 - top) / scale).astype(int), ((columns + 0.5 - left) / scale).astype(int)
    difference = clip.frames[0][rows, columns].astype(float) - frame[source_rows, source_columns]
    assert np.abs(difference).mean() < 6
    assert np.abs(difference.mean()) < 2


def test_wide_views_show_what_lies_round_the_crops(clip: Clip):
    wide = clip.wide
    assert wide is not None and len(wide.frames) == 8 and int(wide.frames.max()) < clip.num_training_frames
    inner = round(wide.pictures.shape[1] / WIDER)
    edge = (wide.pictures.shape[1] - inner) // 2
    for frame, picture, matte, beyond in zip(wide.frames.tolist(), wide.pictures, wide.mattes, wide.beyond, strict=True):
        small = Image.fromarray(clip.frames[frame]).resize((inner, inner), Image.Resampling.BOX)
        middle = np.s_[edge : edge + inner, edge : edge + inner]
        assert np.abs(np.asarray(small, float) - picture[middle]).mean() < 4
        assert not beyond[middle][2:-2, 2:-2].any() and beyond.mean() > 0.2
        assert 0.5 < (matte[inner + edge :] > 128)[beyond[inner + edge :]].mean() * 2 < 1.9, "shoulders lie below the crop, and not everywhere"
        assert ((matte < 20) | (matte > 235)).mean() > 0.9


class Everybody(SelfieMatting):
    """Takes everything for the person."""

    def __init__(self) -> None:
        pass

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        return np.ones(picture.shape[:2], np.float32)


def test_the_middle_of_a_wide_view_is_the_crop():
    rows, columns = np.mgrid[:120, :160]
    frame = np.stack([128 + 100 * np.sin(columns / 9), 128 + 100 * np.cos(rows / 9), rows + columns / 2], -1).astype(np.uint8)
    crop = np.array([[[0.75, 0, -40.5], [0, 0.75, -21.0]]])
    before = crop.copy()
    wide = pasting.WideCuts(torch.tensor([0]), crop, 48)
    wide.put(0, frame, Everybody())
    found = wide.views()
    assert found is not None and np.array_equal(crop, before), "the crops' maps were changed"
    middle = Image.fromarray(found.pictures[0]).resize((48, 48), Image.Resampling.BICUBIC, box=(8, 8, 40, 40))
    assert np.abs(np.asarray(middle, float) - pasting.crop_picture(frame, crop[0], 48)).mean() < 2
    assert not found.beyond[0, 8:40, 8:40].any() and found.beyond[0, :8].all()


def test_wide_views_know_where_the_film_ends():
    frame, crop = np.full((60, 90, 3), 7, np.uint8), np.array([[[1.0, 0, -20], [0, 1.0, -10]]] * 2)
    wide = pasting.WideCuts(torch.tensor([1]), crop, 48)  # shows columns 20 to 68 and rows 10 to 58 of the film, wide ones 8 to 80 and -2 to 70
    for index in range(2):
        wide.put(index, frame, Everybody())
    found = wide.views()
    assert found is not None and found.mattes.dtype == np.uint8 and found.mattes.min() == 255
    rows, columns = ((np.arange(48) + 0.5) * WIDER + low for low in (-2, 8))
    inside, cropped = (rows > 0) & (rows < 60), (rows > 10) & (rows < 58)
    assert np.array_equal(found.beyond[0], inside[:, None] & ~(cropped[:, None] & (columns > 20) & (columns < 68)))
    whole = pasting.WideCuts(torch.tensor([0]), np.array([[[1.0, 0, 0], [0, 1.0, 0]]]), 48)
    whole.put(0, frame[:48, :48], Everybody())
    assert whole.views() is None, "the crop shows the whole film"


def test_talking_does_not_move_the_crop():
    template = load_template("registry")
    angles = torch.zeros(100, 3, dtype=torch.float64)
    angles[:, 0] = 0.1 * (0.1 * torch.arange(100)).sin()
    still = project(template.points.double().expand(100, -1, -1), head_camera(angles)) * 500
    jaw = still.clone()
    lower = (template.points[:, 1] < -0.06).nonzero()[:, 0]
    jaw[:, lower, 1] += 18 * (0.7 * torch.arange(100)).sin().abs()[:, None]
    maps = [pasting.crop_maps(solve_head_pose(points.float(), template, (500, 500)), (500, 500), 256) for points in (still, jaw)]
    assert np.abs(maps[0] - maps[1])[:, :, 2].max() < 0.3


def test_crops_beyond_the_frame_repeat_its_edge():
    frame = np.full((50, 60, 3), 10, np.uint8)
    frame[:, -1] = 200
    crop = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    picture = pasting.crop_picture(frame, crop, 80)
    assert picture.shape == (80, 80, 3)
    assert picture[20, 70].tolist() == [200] * 3
    assert picture[70, 20].tolist() == [10] * 3


def test_the_same_video_twice_gives_the_same_clip_also_through_disk(film: Callable[..., Path], tmp_path: Path):
    path = film(lambda frames: frames[:30])
    heard: list[tuple[str, int, int]] = []
    first = tracking.track(path, progress=lambda stage, step, total, values: heard.append((stage, step, total)))
    second = tracking.track(path)
    first.save(tmp_path / "clip")
    loaded = load_clip(tmp_path / "clip")
    for other in (second, loaded):
        assert np.array_equal(first.frames, other.frames)
        assert np.array_equal(first.masks.person, other.masks.person)
        assert np.array_equal(first.masks.parts, other.masks.parts)
        assert torch.equal(first.track.gaze, other.track.gaze)
        assert torch.equal(first.track.cameras.to_label(), other.track.cameras.to_label())
        assert torch.equal(first.track.landmarks, other.track.landmarks)
        assert dict(first.check) == dict(other.check)
    assert heard[29] == ("faces", 30, 30)
    assert list(dict.fromkeys(stage for stage, *_ in heard)) == ["faces", "head pose", "crops", "hair and ears"]
    assert heard[-3] == ("crops", 30, 30) and heard[-1] == ("hair and ears", 1, 1)


def test_missed_frames_are_bridged_and_noted(film: Callable[..., Path]):
    def hide(frames: list[np.ndarray]) -> list[np.ndarray]:
        hidden = [frame.copy() for frame in frames[:50]]
        for frame in hidden[20:25]:
            frame[:] = 90
        return hidden

    clip = tracking.track(film(hide))
    assert clip.num_frames == 50
    assert clip.check["missed_frames"] == 5
    assert clip.track.confidence[20:25].max() == 0
    assert clip.track.confidence[:20].min() > 0.5


def test_a_long_gap_ends_the_stretch_that_is_used(film: Callable[..., Path]):
    clip = tracking.track(film(lambda frames: [*[np.zeros_like(frames[0])] * 30, *frames[30:70]]))
    assert clip.num_frames == 40
    assert clip.check["first_frame"] == 30
    assert any("left out" in warning for warning in clip.check["warnings"])


def test_sound_is_moved_forward_by_as_much_as_it_is_late(film: Callable[..., Path]):
    path = film(lambda frames: frames[:30])
    plain, moved = (tracking.track(str(path), tracking.TrackConfig(audio_offset_ms=late)) for late in (0.0, 200.0))
    assert torch.equal(moved.waveform.samples[:12000], plain.waveform.samples[3200:15200])
    assert moved.waveform.samples.shape == plain.waveform.samples.shape
    assert moved.check["audio_offset_applied_ms"] == 200
    assert torch.equal(moved.track.landmarks, plain.track.landmarks)


def test_the_report_is_heard_before_the_crops_and_can_stop_the_work(film: Callable[..., Path]):
    heard: list[str] = []

    def review(report: Any) -> None:
        heard.append(report["verdict"])
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        tracking.track(film(lambda frames: frames[:30]), progress=lambda stage, *rest: heard.append(stage), review=review)
    assert heard == ["faces"] * 30 + ["head pose"] * 2 + ["refuse"]


def test_cuts_of_the_film_are_those_of_the_clip(film: Callable[..., Path]):
    clip = tracking.track(film(lambda frames: [*[np.zeros_like(frames[0])] * 20, *frames[:30], *[frame[:, ::-1] // 2 for frame in frames[:20]]]))
    assert clip.check["first_frame"] == 20
    assert clip.check["cuts"] == [30]
    assert clip.check["cuts_s"] == [1.2]


def test_silence_is_a_warning(film: Callable[..., Path]):
    clip = tracking.track(film(lambda frames: frames[:30], Waveform(samples=torch.zeros(48000), sample_rate_hz=16000)))
    assert any("silent" in warning for warning in clip.check["warnings"])
    assert (clip.audio.values == -1).all()


@pytest.mark.parametrize(
    ("change", "audio", "kind", "message"),
    [
        (lambda frames: [np.full((128, 128, 3), value, np.uint8) for value in range(50)], True, TrackingError, "no face"),
        (lambda frames: [np.concatenate([frame, frame], 1) for frame in frames[:30]], True, TrackingError, "faces of similar size"),
        (lambda frames: frames[:20], True, MediaError, "long"),
        (lambda frames: frames[:30], False, MediaError, "no sound track"),
    ],
)
def test_what_cannot_be_tracked_is_refused_in_one_line(film: Callable[..., Path], change, audio: bool, kind: type[Exception], message: str):
    path = film(change) if audio else film(change, None)
    with pytest.raises(kind, match=message) as caught:
        tracking.track(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"fps": 0.0},
        {"fps": float("nan")},
        {"fps": -5.0},
        {"size_px": 7},
        {"size_px": -5},
        {"held_out_s": -1.0},
        {"min_length_s": 0.0},
        {"audio_offset_ms": 1e6},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="track "):
        tracking.TrackConfig(**wrong)


def test_the_published_windows_need_their_frame_rate():
    for speech in ("ctc44", "deepspeech"):
        with pytest.raises(ConfigError, match="25 frames a second"):
            tracking.TrackConfig(speech=speech, fps=30.0)
    assert tracking.TrackConfig(speech="hubert", fps=30.0).speech == "hubert"
