"""Judgements of made-up reports: each fault against its threshold, with advice."""

from typing import Any

import pytest

from talk3d.metrics.verdict import judge

GOOD: dict[str, Any] = {
    "source_fps": 25.0,
    "true_fps": 25.0,
    "frames_decoded": 1000,
    "duplicates": 0,
    "truncated": False,
    "frames": 1000,
    "video_frames": 1000,
    "looked_frames": 1000,
    "missed_frames": 0,
    "length_s": 40.0,
    "cuts_s": [],
    "shot_likeness": [1.0],
    "shot_likeness_s": [0.0],
    "faces": 1,
    "crop_side_px": 300.0,
    "eye_distance_px": 100.0,
    "yaw_deg": [-20.0, 20.0],
    "pitch_deg": [-5.0, 5.0],
    "mouth_open": [0.0, 0.2],
    "mouth_wide": [0.4, 0.6],
    "blinks": 10,
    "blinks_per_min": 15.0,
    "audio_rms_db": -23.0,
    "noise_db": -80.0,
    "speech_db": -20.0,
    "clipped_share": 0.0,
    "audio_offset_ms": 0.0,
    "audio_offset_guess_ms": 0.0,
    "audio_offset_spread_ms": 5.0,
    "audio_offset_applied_ms": 0.0,
}


def test_a_good_report_is_ok_in_every_line():
    lines = list(judge(GOOD))
    assert {line["judgement"] for line in lines} == {"ok"}
    assert not any(line["advice"] for line in lines)
    assert [line["what"] for line in lines] == [
        *("frame rate", "length", "shots", "face", "person", "head turns", "mouth and eyes", "sound", "sound and lips")
    ]


def test_what_was_not_measured_is_not_judged():
    bare = {key: value for key, value in GOOD.items() if key not in ("crop_side_px", "audio_rms_db", "audio_offset_ms")}
    assert [line["what"] for line in judge(bare)] == ["frame rate", "length", "shots"]


@pytest.mark.parametrize(
    ("changes", "what", "judgement", "said"),
    [
        ({"duplicates": 200, "frames_decoded": 1200, "source_fps": 30.0}, "frame rate", "warning", "200 of 1200 frames are doubled"),
        ({"true_fps": 12.0}, "frame rate", "warning", "25 frames a second or more"),
        ({"truncated": True}, "frame rate", "warning", "ends before it should"),
        ({"frames": 400, "length_s": 16.0}, "length", "warning", "left out"),
        ({"frames": 60, "length_s": 2.4}, "length", "refuse", "too short"),
        ({"cuts_s": [4.0, 12.0]}, "shots", "warning", "2 times, at 4 s, 12 s"),
        ({"crop_side_px": 60.0}, "face", "refuse", "too small"),
        ({"crop_side_px": 150.0}, "face", "warning", "small"),
        ({"faces": 2}, "face", "warning", "only the person to learn"),
        ({"missed_frames": 5}, "face", "warning", "not found in 5 of 1000"),
        ({"shot_likeness": [1.0, 0.1], "shot_likeness_s": [0.0, 12.0]}, "person", "refuse", "another person from 12 s on: cut the video"),
        ({"shot_likeness": [0.7, 1.0], "shot_likeness_s": [0.0, 12.0]}, "person", "warning", "perhaps another person from 0 s on"),
        ({"yaw_deg": [0.0, 3.0]}, "head turns", "warning", "hardly turns"),
        ({"mouth_open": [0.0, 0.02]}, "mouth and eyes", "warning", "hardly opens"),
        ({"blinks": 0}, "mouth and eyes", "warning", "no blink"),
        ({"audio_rms_db": -70.0}, "sound", "refuse", "silent"),
        ({"audio_rms_db": -50.0}, "sound", "warning", "quiet"),
        ({"clipped_share": 0.1}, "sound", "warning", "clipped"),
        ({"noise_db": -30.0}, "sound", "warning", "noise"),
        (
            {"audio_offset_ms": 200.0, "audio_offset_guess_ms": 200.0},
            "sound and lips",
            "warning",
            "200 ms late (± 10 ms): left to themselves, track and build",
        ),
        (
            {"audio_offset_ms": 70.0, "audio_offset_guess_ms": 70.0, "audio_offset_applied_ms": 120.0},
            "sound and lips",
            "warning",
            "moved forward by 120 ms, the sound comes 70 ms late",
        ),
        ({"audio_offset_ms": None, "audio_offset_guess_ms": 90.0}, "sound and lips", "warning", "not sure"),
    ],
)
def test_each_fault_is_judged_with_advice(changes: dict[str, Any], what: str, judgement: str, said: str):
    lines = list(judge({**GOOD, **changes}))
    assert {line["what"]: line["judgement"] for line in lines if line["judgement"] != "ok"} == {what: judgement}
    line = next(line for line in lines if line["what"] == what)
    assert said in f"{line['found']}: {line['advice']}"


def test_nothing_is_less_than_nothing():
    found = {
        line["what"]: line["found"]
        for line in judge({**GOOD, "yaw_deg": [-0.3, 20.0], "audio_offset_guess_ms": -0.2, "audio_offset_applied_ms": -265.0})
    }
    assert "yaw 0° to 20°" in found["head turns"]
    assert found["sound and lips"] == "moved back by 265 ms, the sound comes in step (± 10 ms)"
