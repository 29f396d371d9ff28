import dataclasses
import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from talk3d.errors import ConfigError, ShapeError, WeightsError
from talk3d.io.media import read_audio, read_video
from talk3d.metrics import film
from talk3d.metrics.image import psnr
from talk3d.metrics.truth import load_truth, novel_frames
from talk3d.models.avatar import Avatar
from talk3d.ops.geometry import head_camera
from talk3d.perception.landmarks import load_face_model
from talk3d.perception.speech import speech_features
from talk3d.stages.evaluate import EvaluateConfig, evaluate
from talk3d.types import AudioFeatures, Camera, Clip, Driving, FaceMasks, FaceTrack, Rendering, Waveform

SIDE = 32


def a_clip(frames: np.ndarray, num_training_frames: int, **changes: object) -> Clip:
    """Make a clip of these frames with a calm track."""
    count, side = len(frames), frames.shape[1]
    corners = torch.tensor([[0.25, 0.25], [0.75, 0.75]]) * side
    track = FaceTrack(
        cameras=head_camera(torch.zeros(count, 3)),
        head_pose=torch.zeros(count, 3),
        landmarks=corners.repeat(234, 1).expand(count, 468, 2),
        anchors=torch.zeros(count, 6),
        blink=torch.zeros(count, 1),
        upper_face=torch.zeros(count, 5),
        confidence=torch.ones(count, 1),
        crop=np.tile(np.eye(2, 3), (count, 1, 1)),
    )
    values: dict[str, object] = {
        "frames": frames,
        "fps": 25.0,
        "waveform": Waveform(samples=torch.zeros(count * 640), sample_rate_hz=16000),
        "audio": AudioFeatures(values=torch.zeros(count, 16, 64), fps=25.0, source="logmel64"),
        "track": track,
        "masks": FaceMasks(person=np.full((count, side, side), 255, np.uint8), source="test"),
        "source": "nowhere.mp4",
        "source_sha256": "0",
        "num_training_frames": num_training_frames,
    }
    return Clip(**{**values, **changes})  # pyright: ignore[reportArgumentType]


@pytest.fixture
def no_face_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path | None = None) -> None:
        raise WeightsError("no face model is there: fetch one")

    monkeypatch.setattr(film, "load_face_model", refuse)


@pytest.mark.usefixtures("no_face_model")
def test_pictures_off_by_a_tenth_score_twenty_decibels(make_avatar: Callable[..., Avatar], tmp_path: Path) -> None:
    # KnownAvatar shows red 0.5 (silence), green 0 (no blink) and blue 0 (yaw 0): the real frames differ by 0.1 inside the person, by 0.2 outside
    frames = np.zeros((8, SIDE, SIDE, 3), np.uint8)
    frames[..., 0] = round(0.5 * 255)
    offset, far = np.uint8(25), np.uint8(51)
    person = np.zeros((8, SIDE, SIDE), np.uint8)
    person[:, 8:24, 8:24] = 255
    frames += np.where(person[..., None] > 0, offset, far)
    clip = a_clip(frames, 3, masks=FaceMasks(person=person, source="test"))
    report = evaluate(make_avatar(side=SIDE), clip)
    inside, outside = (value**2 / 255**2 for value in (25, 51))
    assert report.value("psnr_person") == pytest.approx(-10 * math.log10(inside), abs=1e-3)
    assert report.value("psnr") == pytest.approx(-10 * math.log10(0.25 * inside + 0.75 * outside), abs=1e-3)
    measures = report.to_json()["measures"]
    assert measures["psnr"]["num_frames"] == 5
    for name in ("lmd_lips", "mouth_correlation", "jitter", "likeness", "orbit_likeness", "silence_motion_made"):
        assert measures[name]["value"] is None and "no face model is there" in measures[name]["needs"], name
    for name in ("mouth_correlation_truth", "camera_rotation", "novel_psnr"):
        assert measures[name]["value"] is None and "truth" in measures[name]["needs"]
    assert list(report.columns) == ["avatar", "truth", "sound +200 ms", "frozen mouth", "sound alone"]
    assert report.value("psnr", "truth") == 100
    assert measures["render_time"]["value"] > 0
    report.save(tmp_path / "report.json")
    facts = json.loads((tmp_path / "report.json").read_text())["facts"]
    assert facts["measured_frames"] == {"first": 3, "last": 7, "training_frames": 3} and facts["side_px"] == SIDE
    assert facts["driven_by"]["blink"].startswith("tracked") and facts["driven_by"]["mouth"].startswith("the sound, on head and upper cheeks held so")
    assert facts["truth"] is None and facts["networks"]["face"] == "none"
    assert (tmp_path / "report.png").is_file()


@pytest.mark.usefixtures("no_face_model")
def test_nothing_but_the_declared_sources_reaches_the_avatar(make_avatar: Callable[..., Any], clip_of: Callable[..., Clip]) -> None:
    """Scrambled pictures, mattes, face points and expressions of the held-out frames change nothing of what drives the avatar."""
    seen = []
    for scrambled in (False, True):
        clip = clip_of(count=16, side=SIDE)
        if scrambled:
            rng = np.random.default_rng(0)
            track = clip.track
            landmarks = torch.from_numpy(rng.uniform(8, 24, track.landmarks.shape)).float()
            track = dataclasses.replace(
                track, landmarks=landmarks, expression=torch.rand(16, 52), gaze=torch.rand(16, 2), eyes_shut=torch.rand(16, 2)
            )
            frames = np.concatenate([clip.frames[:12], rng.integers(0, 255, (4, SIDE, SIDE, 3)).astype(np.uint8)])
            masks = FaceMasks(person=rng.integers(0, 255, (16, SIDE, SIDE)).astype(np.uint8), source="noise")
            clip = dataclasses.replace(clip, track=track, frames=frames, masks=masks)
        avatar = make_avatar(side=SIDE)
        evaluate(avatar, clip)
        seen.append(avatar)
    for name in ("audio", "blink", "head_pose", "anchors", "upper_face"):
        torch.testing.assert_close(getattr(seen[0].driven, name), getattr(seen[1].driven, name), rtol=0, atol=0)
    torch.testing.assert_close(seen[0].filmed, seen[1].filmed, rtol=0, atol=0)


@pytest.mark.usefixtures("no_face_model")
def test_the_controls_change_the_sound_and_nothing_else(make_avatar: Callable[..., Any], clip_of: Callable[..., Clip]) -> None:
    clip, avatar = clip_of(count=16, side=SIDE), make_avatar(side=SIDE)
    evaluate(avatar, clip, EvaluateConfig(shift_frames=2, batch_size=4))
    held = torch.arange(12, 16)
    films = avatar.seen[:4]
    was, (self_driven, shifted, frozen, alone) = clip.driving(held), [driving for driving, _ in films]
    torch.testing.assert_close(self_driven.audio, was.audio)
    torch.testing.assert_close(shifted.audio, clip.audio.around(held + 2))
    torch.testing.assert_close(frozen.audio, clip.audio.values[:12].mean(0).expand_as(was.audio))
    torch.testing.assert_close(alone.audio, was.audio)
    for driving in (self_driven, shifted, frozen):
        torch.testing.assert_close(driving.head_pose, was.head_pose)
        torch.testing.assert_close(driving.blink, was.blink)
    torch.testing.assert_close(alone.head_pose, clip.track.head_pose[:12].mean(0).expand(4, -1))
    torch.testing.assert_close(alone.blink, clip.track.blink[:12].mean(0).expand(4, -1))
    torch.testing.assert_close(alone.upper_face, clip.track.upper_face[:12].mean(0).expand(4, -1))
    for _, camera in films:
        torch.testing.assert_close(camera.cam2world, clip.track.cameras.cam2world[held])


@pytest.mark.usefixtures("no_face_model")
def test_the_face_box_follows_the_landmarks_and_the_avatars_size(make_avatar: Callable[..., Avatar]) -> None:
    # landmarks span 16…48 of a 64 px crop, so the box with 10% margin spans 12.8…51.2, which is 6.4…25.6 at the avatar's 32 px
    frames = np.zeros((6, 64, 64, 3), np.uint8)
    frames[..., 0] = 128
    frames[:, :8] = 255
    report = evaluate(make_avatar(side=SIDE), a_clip(frames, 2), EvaluateConfig(max_frames=2))
    face, whole = report.value("psnr_face"), report.value("psnr")
    assert face is not None and whole is not None
    assert face > 50 > whole
    assert report.to_json()["measures"]["psnr"]["num_frames"] == 2


def test_a_clip_that_holds_nothing_out_or_was_heard_otherwise(make_avatar: Callable[..., Avatar]) -> None:
    frames = np.zeros((4, SIDE, SIDE, 3), np.uint8)
    with pytest.raises(ConfigError, match="nothing honest"):
        evaluate(make_avatar(side=SIDE), a_clip(frames, 4))
    with pytest.raises(ConfigError, match="'hubert'"):
        evaluate(make_avatar(side=SIDE, audio_source="hubert"), a_clip(frames, 2))
    with pytest.raises(ConfigError):
        EvaluateConfig(novel_every=0)


class Playback(Avatar):
    """Plays the real frame that belongs to the sound it hears, as long as the camera is that of the clip; else it is invisible."""

    def __init__(self, clip: Clip) -> None:
        torch.nn.Module.__init__(self)
        self.clip, self.fps, self.audio_source, self.provenance = clip, clip.fps, clip.audio.source, {}
        self.background = torch.zeros(3, clip.frames.shape[1], clip.frames.shape[1])
        self.windows = clip.audio.around(torch.arange(clip.num_frames)).flatten(1)

    @property
    def resolution(self) -> int:
        return self.clip.frames.shape[1]

    def bake(self) -> "Playback":
        return self

    def train(self, mode: bool = True) -> "Playback":
        self.training = mode
        return self

    def render(self, driving: Driving, camera: Camera) -> Rendering:
        frame = (driving.audio.flatten(1)[:, None] - self.windows).abs().mean(-1).argmin(1)
        nearest = (camera.cam2world.flatten(1)[:, None] - self.clip.track.cameras.cam2world.flatten(1)).abs().mean(-1).amin(1)
        alpha = (nearest < 1e-5).float()[:, None, None, None].expand(-1, 1, self.resolution, self.resolution)
        image: Tensor = alpha * (self.clip.images(frame)[0] + 1) - 1
        return Rendering(image=image, alpha=alpha, raw=image, raw_alpha=alpha, features=image, depth=alpha)


@pytest.fixture(scope="module")
def known_clip(shared: Path) -> Clip:
    """Make a clip of an invented person, frames 780 to 840 of the film, tracked perfectly and not cropped at all."""
    try:
        load_face_model()
    except WeightsError as error:
        pytest.skip(f"no face model: {error}")
    folder = shared / "data/clips/person_11"
    truth = load_truth(folder)
    first, count = 780, 60
    film = np.stack(list(islice(read_video(folder / "video.mp4"), first, first + count)))
    sound = read_audio(folder / "video.mp4")
    samples = sound.samples[first * 640 : (first + count) * 640]
    waveform = Waveform(samples=samples, sample_rate_hz=16000)
    clip = a_clip(
        film, 20, waveform=waveform, audio=speech_features(waveform, count, 25.0), source=str(folder / "video.mp4"), check={"first_frame": first}
    )
    landmarks = torch.from_numpy(truth.landmarks[first : first + count]).repeat(1, 7, 1)
    return dataclasses.replace(clip, track=dataclasses.replace(clip.track, cameras=truth.cameras[first : first + count], landmarks=landmarks))


def test_playing_the_real_film_back_is_perfect_and_the_controls_are_not(known_clip: Clip) -> None:
    report = evaluate(Playback(known_clip), known_clip, EvaluateConfig(novel_every=20, max_frames=26))
    for name, low, high in (
        ("psnr", 99, 100),
        ("ssim", 0.9999, 1.0001),
        ("lmd_lips", 0, 1e-5),
        ("mouth_correlation", 0.9999, 1.0001),
        ("mouth_correlation_truth", 0.9, 1),
        ("camera_rotation", 0, 0.05),
        ("camera_reprojection", 0, 0.02),
    ):
        value = report.value(name)
        assert value is not None and low <= value <= high, f"{name}: {value}"
    assert report.value("jitter") == report.value("jitter", "truth")
    for name, column, low, high in (
        ("mouth_correlation_truth", "truth", 0.9, 1),
        ("mouth_correlation", "sound +200 ms", -1, 0.6),
        ("mouth_lag", "sound +200 ms", -230, -170),
        ("lmd_lips", "frozen mouth", 0.005, 1),
    ):
        value = report.value(name, column)
        assert value is not None and low <= value <= high, f"{column}, {name}: {value}"
    frozen = report.value("mouth_correlation", "frozen mouth")
    assert frozen is None or abs(frozen) < 0.6  # one second
    assert report.value("orbit_found") == 0 and report.value("orbit_likeness") is None  # from other cameras it is invisible
    assert report.to_json()["facts"]["truth"]["was"].startswith("found")


@pytest.mark.usefixtures("no_face_model")
def test_unseen_cameras_of_an_invisible_avatar_show_the_background(known_clip: Clip, shared: Path) -> None:
    config = EvaluateConfig(novel_every=20, controls=False, max_frames=21)
    report = evaluate(Playback(known_clip), known_clip, config, truth=shared / "data/clips/person_11")
    truth = load_truth(shared / "data/clips/person_11")
    expected = []
    for known in novel_frames(truth, truth.novel[1], np.array([800, 820]), 384):
        picture, background = (torch.from_numpy(x).permute(2, 0, 1)[None] / 255 for x in (known.picture, known.background))
        expected.append(float(psnr(background, picture, torch.from_numpy(known.matte)[None, None])))
    assert report.value("novel_psnr_+35_+0") == pytest.approx(np.mean(expected), abs=0.05)
    views = [report.value(f"novel_psnr_{view.name}") for view in truth.novel]
    assert report.value("novel_psnr") == pytest.approx(np.mean([value for value in views if value is not None]))
    assert report.to_json()["measures"]["novel_psnr"]["num_frames"] == 8
    assert report.to_json()["facts"]["truth"]["was"] == "given"


def test_the_truth_of_another_film_is_refused(known_clip: Clip) -> None:
    other = dataclasses.replace(known_clip, check={"first_frame": 870})
    with pytest.raises(ShapeError, match="its own film"):
        evaluate(Playback(other), other, EvaluateConfig(max_frames=2, controls=False))
