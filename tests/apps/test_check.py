"""The capture check on the terminal, as a page, and as a refusal."""

import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from talk3d.apps.check import page, plot, print_report, refusal, refuse_other_clip, reviewer, write_report
from talk3d.apps.cli import main
from talk3d.errors import ConfigError, MediaError, TrackingError
from talk3d.io.catalogue import sha256_of

LINES = [
    {"what": "frame rate", "found": "25 pictures a second", "judgement": "ok", "advice": ""},
    {"what": "sound", "found": "-80 dB & <silent>", "judgement": "refuse", "advice": "record with a microphone"},
]


def report(*lines: dict[str, Any], verdict: str = "refuse") -> dict[str, Any]:
    times = [0.0, 1.0, 2.0]
    series = {name: [1.0, 3.0, 2.0] for name in ("yaw_deg", "pitch_deg", "mouth", "blink", "level_db")}
    return {
        "verdict": verdict,
        "lines": list(lines or LINES),
        "warnings": [],
        "series": {"time_s": times, **series, "lag_ms": [-20.0, 0.0, 20.0], "lag_correlation": [0.1, 0.6, 0.2]},
    }


def test_the_table_shows_every_line_with_its_advice():
    console = Console(file=io.StringIO(), width=160)
    print_report("film.mp4", report(), console)
    shown = console.file.getvalue()
    for word in ("film.mp4: refuse", "25 pictures a second", "<silent>", "refused", "record with a microphone"):
        assert word in shown


def test_the_table_shows_names_with_brackets_and_long_words_whole():
    console = Console(file=io.StringIO(), width=80)
    advice = "mend it with --audio-offset-ms 116 (build: --track.audio-offset-ms)"
    print_report("a[/b] [red].mp4", report({"what": "sound", "found": "a[/b].mp4 has no sound", "judgement": "warning", "advice": advice}), console)
    shown = console.file.getvalue()
    assert "a[/b] [red].mp4: refuse" in shown and "a[/b].mp4" in shown
    assert advice.replace(" ", "") in "".join(row.split("│")[4] for row in shown.splitlines() if row.count("│") == 5).replace(" ", "")


def test_the_page_is_whole_in_itself_and_shows_what_was_found():
    text = page("a <film>.mp4", report())
    assert "a &lt;film&gt;.mp4" in text
    assert "-80 dB &amp; &lt;silent&gt;" in text
    assert text.count("<svg") == 5
    assert not re.search(r"https?:|src=|href=|<img|<script", text)


def test_a_report_without_a_face_is_a_page_without_plots():
    assert "<svg" not in page("film", {"verdict": "refuse", "lines": LINES})


def test_a_plot_is_drawn_to_scale():
    figure = ElementTree.fromstring(plot("Loud & clear", [0.0, 1.0, 2.0], [("sound", [0.0, 10.0, 5.0])], "s"))
    line = figure.find(".//polyline")
    assert line is not None
    points = [tuple(map(float, place.split(","))) for place in line.attrib["points"].split()]
    assert points == [(30.0, 110.0), (225.0, 8.0), (420.0, 59.0)]
    assert plot("nothing", [], [("sound", [])], "s") == ""


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path):
    write_report("film", report(), tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["lines"][1]["judgement"] == "refuse"
    write_report("film", report(), tmp_path / "out.html")
    assert (tmp_path / "out.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.json"]
    with pytest.raises(MediaError, match="folder that exists"):
        write_report("film", report(), tmp_path / "none" / "out.html")


def test_a_refused_video_stops_the_work_unless_told_otherwise(caplog: pytest.LogCaptureFixture):
    video = Path("film.mp4")
    assert refusal(video, report()) == "film.mp4: -80 dB & <silent>: record with a microphone"
    assert refusal(video, report(LINES[0])) == ""
    with pytest.raises(TrackingError, match="--yes"):
        reviewer(video, yes=False)(report())
    reviewer(video, yes=True)(report())
    reviewer(video, yes=False)({**report(LINES[0]), "warnings": ["the sound is quiet"]})
    assert "the sound is quiet" in caplog.text


def test_a_report_is_a_page_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    video = tmp_path / "film.mp4"
    video.write_bytes(b"film")
    assert main(["check", str(video), "-o", str(tmp_path / "report.txt")]) == 2
    assert "'.txt', a report is .html or .json" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [video]


def test_a_refusal_names_the_film_once():
    nosound = {"what": "sound", "found": "film.mp4 has no sound track", "judgement": "refuse", "advice": "give another"}
    assert refusal(Path("film.mp4"), report(nosound)) == "film.mp4 has no sound track: give another"


def test_a_clip_of_another_video_is_not_replaced(tmp_path: Path):
    video, clip = tmp_path / "film.mp4", tmp_path / "clip"
    video.write_bytes(b"one")
    refuse_other_clip(clip, video)
    clip.mkdir()
    facts = {"source": "old.mp4", "source_sha256": sha256_of(video)}
    (clip / "clip.json").write_text(json.dumps(facts))
    refuse_other_clip(clip, video)
    video.write_bytes(b"two")
    with pytest.raises(ConfigError, match=r"clip of another video, old\.mp4: give another -o"):
        refuse_other_clip(clip, video)
