"""Reports of made-up measurements: numbers against their definitions, judgements against thresholds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from talk3d.io.media import VideoScan
from talk3d.metrics.capture import FaceMeasures, capture_report, in_step
from talk3d.types import Waveform

FPS = 25


def scan(count: int = 1000, **changes: Any) -> VideoScan:
    fields: dict[str, Any] = {
        "path": Path("film.mp4"),
        "width_px": 640,
        "height_px": 360,
        "fps": 25.0,
        "source_fps": 25.0,
        "true_fps": 25.0,
        "num_decoded": count,
        "num_duplicates": 0,
        "rotation_deg": 0,
        "start_s": 0.0,
        "source_index": np.arange(count),
        "cuts": (),
        "jumps": np.zeros(count),
        "truncated": False,
    }
    return VideoScan(**fields | changes)


def face(count: int = 1000, **changes: Any) -> FaceMeasures:
    time = torch.arange(count) / FPS
    points = torch.zeros(count, 468, 2)
    points[:, 33, 0], points[:, 263, 0] = -50.0, 50.0
    points[:, 61, 0], points[:, 291, 0] = -25 - 5 * torch.sin(time), 25 + 5 * torch.sin(time)
    points[:, [87, 14, 317], 1] = (10 + 10 * torch.sin(13 * time))[:, None]
    blink = torch.zeros(count, 1)
    for start in range(50, count, 100):
        blink[start : start + 5] = 1
    fields: dict[str, Any] = {
        "frames": np.arange(count),
        "landmarks": points,
        "seen": np.arange(count),
        "head_pose": torch.stack([torch.deg2rad(20 * torch.sin(time)), torch.deg2rad(5 * torch.cos(time)), 0 * time], -1),
        "blink": blink,
        "crop_side_px": 300.0,
        "residual_px": 0.5,
        "crowd": 1,
        "source": "a model",
        "looks": {frame: torch.tensor([1.0, 0.0]) for frame in range(0, count, FPS)},
    }
    return FaceMeasures(**fields | changes)


def speech(seconds: float = 40.0, level: float = 0.1) -> Waveform:
    """Bursts of noise and near silence, half a second each."""
    samples = torch.randn(round(seconds * 16000), generator=torch.Generator().manual_seed(0))
    loud = (torch.arange(len(samples)) // 8000 % 2).float()
    return Waveform(samples=(samples * level * (loud + 1e-3)).clamp(-1, 1), sample_rate_hz=16000)


def judgements(report: Any) -> dict[str, str]:
    return {line["what"]: line["judgement"] for line in report["lines"]}


def test_a_good_film_is_ok_and_its_numbers_are_what_they_say():
    report = capture_report(scan(), face(), speech())
    assert report["length_s"] == 40
    assert report["blinks"] == 10
    assert report["blinks_per_min"] == 15
    assert report["yaw_deg"] == pytest.approx([-20, 20], abs=0.2)
    assert report["pitch_deg"] == pytest.approx([-5, 5], abs=0.2)
    assert report["mouth_open"] == pytest.approx([0, 0.2], abs=0.01)
    assert report["mouth_wide"] == pytest.approx([0.4, 0.6], abs=0.01)
    assert report["eye_distance_px"] == 100
    assert report["audio_rms_db"] == pytest.approx(-23.0, abs=0.1)
    assert report["speech_db"] == pytest.approx(-20, abs=0.5)
    assert report["noise_db"] == pytest.approx(-80, abs=0.5)
    assert report["silent_share"] == pytest.approx(0.5, abs=0.01)
    assert {what: verdict for what, verdict in judgements(report).items() if verdict != "ok"} == {"sound and lips": "warning"}
    assert (report["shot_likeness"], report["shot_likeness_s"]) == ([1.0], [0.0])
    assert len(report["series"]["time_s"]) == len(report["series"]["mouth"]) == 240


def test_the_face_of_each_shot_is_compared_with_that_of_the_longest():
    looks = {frame: torch.tensor([0.6, 0.8] if frame >= 700 else [1.0, 0.0]) for frame in range(0, 1000, FPS)}
    report = capture_report(scan(), face(looks=looks), speech(), cuts=(300, 700))
    assert report["shot_likeness"] == pytest.approx([1, 1, 0.6])
    assert report["shot_likeness_s"] == [0, 12, 28]


def test_a_shift_between_sound_and_lips_is_reported_with_what_has_been_applied():
    time = torch.arange(1000) / FPS + 0.02
    waves = [torch.sin(2 * torch.pi * hz * time + hz) for hz in (1.7, 2.3, 3.1, 4.3)]
    points = face().landmarks.clone()
    points[:, [87, 14, 317], 1] = (12 + 4 * torch.stack(waves).sum(0))[:, None]
    moment = torch.arange(640000) / 16000 - 0.2
    opening = 12 + 4 * torch.stack([torch.sin(2 * torch.pi * hz * moment + hz) for hz in (1.7, 2.3, 3.1, 4.3)]).sum(0)
    noise = torch.randn(640000, generator=torch.Generator().manual_seed(1))
    sound = Waveform(samples=0.01 * opening * noise, sample_rate_hz=16000)
    report = capture_report(scan(), face(landmarks=points), sound, applied_ms=100.0)
    assert report["audio_offset_ms"] == report["audio_offset_guess_ms"] == pytest.approx(200, abs=10)
    assert report["audio_offset_agreement"] == 1
    line = next(line for line in report["lines"] if line["what"] == "sound and lips")
    assert line["judgement"] == "warning"
    assert f"--audio-offset-ms {report['audio_offset_ms'] + 100:.0f} " in line["advice"]


def test_what_is_missing_is_left_out_and_known_problems_come_first():
    problem: Any = {"what": "sound", "found": "no sound track", "judgement": "refuse", "advice": "give a film with sound"}
    report = capture_report(scan(50), None, None, problems=(problem,))
    assert report["lines"][0] == problem
    assert report["verdict"] == "refuse"
    assert list(judgements(report)) == ["sound", "frame rate", "length", "shots"]
    assert not {"audio_rms_db", "crop_side_px", "audio_offset_ms"} & set(report)


def test_a_sampled_video_counts_what_was_looked_at():
    frames = np.r_[0:250, 2000:2250]
    half = face(500, frames=frames, seen=np.arange(490))
    report = capture_report(scan(3000), half, speech(120))
    assert (report["frames"], report["looked_frames"], report["missed_frames"]) == (3000, 500, 10)
    assert report["blinks"] == 5
    assert report["series"]["time_s"][-1] == pytest.approx(89.98)


@pytest.mark.parametrize(("late_ms", "given_ms", "applied_ms"), [(280, None, 280), (30, None, 0), (280, 0.0, 0), (30, 280.0, 280)])
def test_sound_that_surely_is_out_of_step_is_moved_unless_a_shift_was_given(late_ms: float, given_ms: float | None, applied_ms: float):
    """What is surely heard is counted from the sound itself: its ramp says where it was cut."""
    ramp = Waveform(samples=torch.arange(32000.0), sample_rate_hz=16000)

    def capture(sound: Waveform, *, applied_ms: float) -> dict[str, float]:
        begins_ms = float(sound.samples[0]) / 16
        return {"audio_offset_ms": 500 + late_ms - begins_ms, "audio_offset_applied_ms": applied_ms}

    sound, check = in_step(ramp, 0.5, 1.0, given_ms, capture)  # pyright: ignore[reportArgumentType]
    assert check["audio_offset_applied_ms"] == applied_ms
    assert float(sound.samples[0]) == 16 * (500 + applied_ms)
    assert len(sound.samples) == 16000
