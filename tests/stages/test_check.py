"""The capture check of videos whose faults are known."""

import json
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from talk3d.errors import ConfigError, MediaError
from talk3d.io.media import read_audio, read_video
from talk3d.io.writing import VideoWriter
from talk3d.stages.check import CheckConfig, check, sampled_frames
from talk3d.types import Waveform

FPS = 25
FRONT_VIEW = "00001/img00000011.webp"
"""Of an invented person who is not the one of the film."""


@pytest.fixture(scope="module")
def person(person_11: Path) -> Path:
    return person_11 / "video.mp4"


@pytest.fixture(scope="module")
def takes(person: Path) -> list[np.ndarray]:
    return list(islice(read_video(person), 250))


def write(path: Path, frames: list[np.ndarray], sound: Waveform | None) -> Path:
    with VideoWriter(path, frames[0].shape[1], frames[0].shape[0], audio=sound, crf=20) as writer:
        for frame in frames:
            writer.write(frame)
    return path


@pytest.fixture(scope="module")
def sound(person: Path) -> Waveform:
    return read_audio(person)


def line(report, what: str):
    return next(row for row in report["lines"] if row["what"] == what)


@pytest.fixture(scope="module")
def late(takes: list[np.ndarray], person: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good take whose sound comes 280 ms early."""
    samples = torch.roll(read_audio(person).samples, -280 * 16)
    return write(tmp_path_factory.mktemp("late") / "late.mp4", takes, Waveform(samples=samples, sample_rate_hz=16000))


def test_early_sound_is_found_and_advice_says_how_to_mend_it(late: Path):
    report = check(late)
    assert report["audio_offset_ms"] == pytest.approx(-280, abs=40)
    row = line(report, "sound and lips")
    assert row["judgement"] == "warning"
    assert float(row["advice"].partition("--audio-offset-ms ")[2].split()[0]) == round(report["audio_offset_ms"] or 0)


def test_a_good_take_is_measured_and_can_be_written_as_json(late: Path):
    report = check(late, CheckConfig(audio_offset_ms=-280))
    assert report["verdict"] == "usable with warnings"
    assert [row["what"] for row in report["lines"] if row["judgement"] != "ok"] == ["length"]
    assert report["looked_frames"] == report["frames"] == 250
    assert report["missed_frames"] == 0
    assert report["cuts"] == []
    assert report["shot_likeness"] == [1.0]
    assert abs(report["audio_offset_ms"] or 999) <= 40
    assert report["audio_offset_applied_ms"] == -280
    assert report["size_px"] == [384, 384]
    assert report["series"]["time_s"][0] == pytest.approx(0.02)
    assert json.loads(json.dumps(report)) == report


def test_another_person_after_a_cut_is_refused(shared: Path, takes: list[np.ndarray], sound: Waveform, tmp_path: Path):
    head = Image.open(shared / "data" / "heads256" / FRONT_VIEW).convert("RGBA").resize((384, 384))
    portrait = np.asarray(Image.alpha_composite(Image.new("RGBA", head.size, (90, 110, 130, 255)), head).convert("RGB"))
    other = [np.ascontiguousarray(np.roll(portrait, index - 25, axis=1)) for index in range(50)]
    report = check(write(tmp_path / "two.mp4", [*takes[:100], *other], sound))
    assert report["cuts"] == [100]
    assert report["shot_likeness"][0] == 1 > 0.6 > report["shot_likeness"][1]
    assert line(report, "person")["judgement"] == report["verdict"] == "refuse"
    assert "another person from 4 s on" in line(report, "person")["found"]


def test_cuts_are_found_to_the_frame_also_between_two_takes_of_one_person(takes: list[np.ndarray], sound: Waveform, tmp_path: Path):
    other = [np.ascontiguousarray(np.roll(frame[:, ::-1], 30, axis=1) // 2) for frame in takes]
    report = check(write(tmp_path / "cut.mp4", [*takes[:40], *takes[140:175], *other[:38]], sound))
    assert report["cuts"] == [40, 75]
    assert line(report, "shots")["judgement"] == "warning"


def test_two_faces_no_face_silence_and_no_sound_are_refused_with_a_report(takes: list[np.ndarray], sound: Waveform, tmp_path: Path):
    pair = check(write(tmp_path / "two.mp4", [np.concatenate([frame, frame], 1) for frame in takes[:30]], sound))
    assert (pair["verdict"], line(pair, "face")["judgement"]) == ("refuse", "refuse")
    assert "faces of similar size" in line(pair, "face")["found"]
    nobody = check(write(tmp_path / "none.mp4", [np.full((96, 128, 3), 40 + 3 * value, np.uint8) for value in range(50)], sound))
    assert nobody["verdict"] == "refuse"
    assert "no face" in line(nobody, "face")["found"]
    assert nobody["audio_rms_db"] > -40
    assert "crop_side_px" not in nobody
    silent = check(write(tmp_path / "silent.mp4", takes[:60], Waveform(samples=torch.zeros(160000), sample_rate_hz=16000)))
    assert (silent["verdict"], line(silent, "sound")["judgement"]) == ("refuse", "refuse")
    assert silent["audio_offset_ms"] is None
    mute = check(write(tmp_path / "mute.mp4", takes[:40], None))
    assert mute["verdict"] == "refuse"
    assert "no sound track" in line(mute, "sound")["found"]
    assert mute["blinks"] >= 0


def test_a_file_that_is_no_video_is_an_error(tmp_path: Path):
    (tmp_path / "text.mp4").write_text("text")
    with pytest.raises(MediaError, match=r"text\.mp4"):
        check(tmp_path / "text.mp4")


def test_doubled_frames_are_reported_and_what_is_left_is_even(takes: list[np.ndarray], tmp_path: Path):
    path = tmp_path / "thirty.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30), options={"crf": "20"})
        stream.width = stream.height = 384
        for number in range(120):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(takes[number * 5 // 6], format="rgb24")))
        container.mux(stream.encode(None))
    report = check(path)
    assert report["duplicates"] in (19, 20)
    assert report["true_fps"] == pytest.approx(25, abs=0.3)
    assert report["frames"] == pytest.approx(100, abs=1)
    assert report["repeated"] + report["dropped"] <= 1
    assert "really has 25" in line(report, "frame rate")["found"]


def test_a_long_video_is_sampled_from_end_to_end():
    assert sampled_frames(100, 25, 100).tolist() == list(range(100))
    picked = sampled_frames(1000, 50, 200)
    assert len(picked) == 200
    assert (picked[0], picked[-1]) == (0, 999)
    assert (np.diff(picked) > 1).sum() == 3
    assert len(np.unique(picked)) == 200


def test_settings_that_cannot_work_are_refused():
    for wrong in ({"fps": 0.0}, {"look_s": 5.0}, {"stretch_s": float("nan")}, {"audio_offset_ms": 1e9}):
        with pytest.raises(ConfigError, match="check needs"):
            CheckConfig(**wrong)
