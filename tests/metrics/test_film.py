import math
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from talk3d.metrics import film as module
from talk3d.metrics.face import LIP_POINTS
from talk3d.metrics.film import Networks, Scene, Seen, Watched, cut_faces, load_networks, measure_film, mouth_measure
from talk3d.metrics.report import REGIONS
from talk3d.perception.facetemplate import load_template
from talk3d.perception.landmarks import FaceBox, FaceObservation
from talk3d.types import Waveform

SIDE = 200
UPPER, LOWER = (82, 13, 312), (87, 14, 317)


class ScriptedModel:
    """A face model that reads the first pixel: red is the mouth opening in px, green 0 means no face, blue is every blendshape."""

    source = "script"
    kind = "task"

    def __init__(self) -> None:
        self.face = (100 + 250 * load_template("task").points[:478, :2].numpy() * [1, -1]).astype(np.float32)
        self.face[33], self.face[263] = (50, 80), (150, 80)
        for upper, lower in zip(UPPER, LOWER, strict=True):
            self.face[lower] = self.face[upper]

    def detect(self, frame: np.ndarray) -> list[FaceBox]:
        return [FaceBox(centre_px=(100.0, 100.0), side_px=100.0, angle_rad=0.0, score=1.0)] if frame[0, 0, 1] else []

    def observe(self, frame: np.ndarray, box: FaceBox) -> FaceObservation | None:
        if not frame[0, 0, 1]:
            return None
        points = self.face.copy()
        points[list(LOWER), 1] += frame[0, 0, 0]
        return FaceObservation(landmarks=points, score=1.0, eyes_shut=(0.0, 0.0), expression=np.full(52, frame[0, 0, 2] / 255, np.float32))


def a_film(*openings: int | None, level: int = 100, blendshape: int = 0) -> np.ndarray:
    """A grey film; what the detector sees stands in each first pixel."""
    pictures = np.full((len(openings), SIDE, SIDE, 3), level, np.uint8)
    for picture, opening in zip(pictures, openings, strict=True):
        picture[0, 0] = (opening or 0, opening is not None, blendshape)
    return pictures


def networks(**published: Any) -> Networks:
    return Networks(face=ScriptedModel(), published=published)


def a_scene(pictures: np.ndarray, samples: Float[Tensor, " n"] | None = None, face: bool = True) -> Scene:
    mattes = torch.zeros(len(pictures), 1, SIDE, SIDE)
    mattes[..., 40:180, 40:160] = 1
    samples = torch.sin(0.3 * torch.arange(len(pictures) * 640)) if samples is None else samples
    return Scene(
        pictures=pictures,
        mattes=mattes,
        landmarks=torch.from_numpy(ScriptedModel().face).expand(len(pictures), -1, -1),
        waveform=Waveform(samples=samples, sample_rate_hz=16000),
        fps=25.0,
        watched=Watched(ScriptedModel() if face else None, pictures),
    )


def values(seen: Seen) -> dict[str, float | None]:
    return {entry.name: entry.value for entry in seen.measures}


def test_what_a_detector_saw_and_missed() -> None:
    watched = Watched(ScriptedModel(), a_film(0, 10, None, 30))
    np.testing.assert_array_equal(watched.seen, [True, True, False, True])
    np.testing.assert_allclose(watched.opening, [0, 0.1, math.nan, 0.3], atol=1e-6)
    assert watched.landmarks.shape == (4, 468, 2) and watched.landmarks[2].isnan().all()
    assert np.isnan(watched.eyes[2]) and watched.expression.shape == (4, 52)
    assert Watched(None, a_film(0, 10)).seen.tolist() == [False, False]


def test_a_film_against_itself_is_perfect_everywhere() -> None:
    pictures = a_film(*(int(10 + 8 * math.sin(0.9 * k)) for k in range(30)))
    found = values(measure_film(pictures, a_scene(pictures), networks()))
    for region in REGIONS:
        assert found[f"psnr{region}"] == 100 and found[f"ssim{region}"] == pytest.approx(1, abs=1e-5)
    for name, expected in {
        "ms_ssim": 1,
        "mouth_correlation": 1,
        "mouth_gain": 1,
        "mouth_lag": 0,
        "lmd_lips": 0,
        "lmd_face": 0,
        "likeness": 1,
    }.items():
        assert found[name] == pytest.approx(expected, abs=1e-4), name
    for name in ("aue_lower", "aue_upper", "position_error", "jitter", "flicker"):
        assert found[name] == pytest.approx(0, abs=1e-4), name
    assert found["pose_error"] == pytest.approx(0, abs=0.05)


def test_a_film_of_half_the_motion_two_frames_late_and_ten_levels_brighter() -> None:
    openings = [int(20 + 16 * math.sin(0.9 * k) * math.cos(0.17 * k)) for k in range(40)]
    late = [openings[max(k - 2, 0)] // 2 for k in range(40)]
    real, ours = a_film(*openings), a_film(*late, level=110, blendshape=51)
    seen = measure_film(ours, a_scene(real), networks())
    found = values(seen)
    assert found["psnr_mask"] == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)
    assert found["mouth_lag"] == pytest.approx(80, abs=10) and found["mouth_gain"] == pytest.approx(0.5, abs=0.05)
    assert found["aue_lower"] == pytest.approx(0.2, abs=1e-6) and found["aue_upper"] == pytest.approx(0.2, abs=1e-6)
    apart = np.abs(np.array(openings) - late).mean() / 100 * len(set(LOWER) & set(LIP_POINTS)) / 40
    assert found["lmd_lips"] == pytest.approx(apart, rel=1e-3)
    assert seen.curves["lmd_lips"].shape == (40,) and found["flicker"] == 0  # brighter, but steadily


def test_frames_without_a_face_are_counted_and_left_out() -> None:
    real, ours = a_film(0, 20, 40, 30, 80), a_film(0, 10, 20, None, 40)
    found = {entry.name: entry for entry in measure_film(ours, a_scene(real), networks()).measures}
    assert found["mouth_correlation"].value == pytest.approx(1)
    for name in ("mouth_correlation", "lmd_lips", "likeness"):
        assert (found[name].num_frames, found[name].num_missed) == (4, 1), name


def test_a_mouth_that_does_not_move_has_no_correlation() -> None:
    still = mouth_measure("mouth_correlation", Watched(ScriptedModel(), a_film(5, 5, 5)), np.array([0.0, 1.0, 2.0]), "")
    assert still.value is None and "moves" in still.needs


def test_without_networks_nothing_is_invented_and_the_command_is_named() -> None:
    pictures = a_film(*[1, 2, 3] * 6)
    blind = Networks(face=None, published={}, missing_face="a face model: none is there")
    found = {entry.name: entry for entry in measure_film(pictures, a_scene(pictures, face=False), blind).measures}
    for name in ("lmd_lips", "aue_lower", "mouth_correlation", "mouth_lag", "jitter", "silence_motion", "likeness", "csim", "pose_error"):
        assert str(found[name]) == "not measured (needs a face model: none is there)" and found[name].num_missed == 0, name
    for name, network in {
        "lpips_alex": "lpips-alex",
        "lpips_vgg": "lpips-vgg",
        "fid": "inception",
        "kid": "inception",
        "lse_d": "syncnet",
        "lse_c": "syncnet",
    }.items():
        assert str(found[name]) == f"not measured (needs {network}: talk3d weights fetch {network})"
    assert found["psnr"].value == 100


class Distance:
    """In place of LPIPS: the mean difference."""

    source = "difference"

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        return (first - second).abs().mean((1, 2, 3))


class Colour(torch.nn.Module):
    """In place of Inception and ArcFace: the mean colour."""

    source = "colour"

    def forward(self, pictures: Tensor) -> Tensor:
        mean = pictures.float().mean((2, 3)) + torch.tensor([0.0, 1.0, 2.0])
        return mean / mean.norm(dim=1, keepdim=True)


class Sync:
    """In place of SyncNet: sees the first pixel, hears the first sample of each frame."""

    source = "sync"

    def see(self, faces: Tensor) -> Tensor:
        assert faces.shape[1:] == (3, 224, 224)
        return self.seen[: len(faces) - 4]

    def hear(self, waveform: Waveform) -> Tensor:
        return self.seen[3:][: len(waveform.samples) // 640 - 4]

    def __init__(self) -> None:
        self.seen = torch.randn(60, 12, generator=torch.Generator().manual_seed(0))


def test_published_networks_are_used_where_they_are() -> None:
    real, ours = a_film(*[1, 2, 3, 4] * 10), a_film(*[1, 2, 3, 4] * 10, level=151)
    scene = a_scene(real)
    found = {
        e.name: e
        for e in measure_film(
            ours, scene, networks(**{"lpips-alex": Distance(), "inception": Colour(), "arcface": Colour(), "syncnet": Sync()})
        ).measures
    }
    assert found["lpips_alex"].value == pytest.approx(0.4, rel=1e-3) and found["lpips_alex"].num_frames == 40
    assert found["lpips_vgg"].value is None
    assert found["fid"].value is not None and found["fid"].num_frames == 40
    assert found["csim"].value is not None and 0.9 < found["csim"].value < 1
    assert found["sync_offset"].value == -3 and found["lse_d"].value == pytest.approx(0, abs=1e-5)  # the sound that belongs to lips i comes 3 earlier
    assert found["lse_c"].value is not None and found["lse_c"].value > 3


def test_lips_in_silence_are_measured_in_pixels() -> None:
    samples = torch.sin(0.3 * torch.arange(40 * 640))
    samples[10 * 640 : 30 * 640] = 0
    openings = [30] * 10 + [4, 8] * 10 + [30] * 10
    pictures = a_film(*openings)
    found = {entry.name: entry for entry in measure_film(pictures, a_scene(pictures, samples), networks()).measures}
    # three of forty lip points move by ±2 px
    assert found["silence_motion"].value == pytest.approx(2 * math.sqrt(3 / 40), rel=1e-2)
    assert found["silence_motion"].num_frames == 14


def test_faces_for_sync_are_cut_steadily_round_the_face() -> None:
    pictures = a_film(1, 2)
    pictures[:, 60:120, 60:120] = 255
    cut = cut_faces(pictures, a_scene(pictures).landmarks, 32)
    assert cut.shape == (2, 3, 32, 32) and float(cut.max()) == 1
    torch.testing.assert_close(cut[0], cut[1])


def test_networks_that_are_there_are_loaded_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_there", lambda entry: entry.name == "arcface")
    monkeypatch.setattr(module, "LOADERS", {"arcface": lambda path, device: Colour(), "syncnet": lambda path, device: Sync()})
    monkeypatch.setattr(module, "load_face_model", lambda path: ScriptedModel())
    loaded = load_networks()
    assert list(loaded.published) == ["arcface"] and loaded.get("syncnet") is None
    assert loaded.sources["face"] == "script" and loaded.sources["arcface"] == "colour"
