import io
import logging
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from talk3d.apps import terminal
from talk3d.apps.cli import main
from talk3d.apps.terminal import Display, duration, note_findings, print_table


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_durations_read_well() -> None:
    assert [duration(s) for s in (0.4, 59.0, 200.0, 7500.0)] == ["0 s", "59 s", "3 min 20 s", "2 h 5 min"]


def test_plain_lines_come_seldom_and_say_what_is_left() -> None:
    clock, sink = Clock(), io.StringIO()
    with Display(Console(file=sink, width=200), every_s=10.0, clock=clock) as display:
        for step in range(1, 101):
            clock.now_s += 1
            display("train", step, 100, {"image": 0.12345})
    lines = sink.getvalue().splitlines()
    assert lines[0] == "train 1/100  image 0.123"
    assert lines[1] == "train 11/100  1 min 29 s left  image 0.123"
    assert lines[-1] == "train 100/100  image 0.123"
    assert len(lines) == 11


def test_time_left_is_not_fooled_by_resumed_work() -> None:
    clock, sink = Clock(), io.StringIO()
    with Display(Console(file=sink, width=200), every_s=1.0, clock=clock) as display:
        display("train", 900, 1000, {})
        clock.now_s = 10.0
        display("train", 910, 1000, {})
    assert sink.getvalue().splitlines()[1] == "train 910/1000  1 min 30 s left"


def test_unknown_totals_are_shown_as_such() -> None:
    sink = io.StringIO()
    with Display(Console(file=sink, width=200)) as display:
        display("read", 5, 0, {})
    assert sink.getvalue() == "read 5/?\n"


def test_a_terminal_gets_one_bar_per_stage() -> None:
    sink = io.StringIO()
    with Display(Console(file=sink, width=120, force_terminal=True)) as display:
        display("track", 1, 2, {})
        display("track", 2, 2, {})
        display("train", 1, 4, {"image": 0.5})
        display("scan", 1, 0, {})
        assert display.bars is not None
        assert [(task.description, task.completed, task.total) for task in display.bars.tasks] == [
            ("track", 2, 2),
            ("train", 1, 4),
            ("scan", 1, None),
        ]


def test_warnings_of_the_package_are_shown_once() -> None:
    sink = io.StringIO()
    with Display(Console(file=sink, width=200)):
        logging.getLogger("talk3d.io.media").warning("10 frames were duplicates")
        logging.getLogger("talk3d.io.media").warning("10 frames were duplicates")
    logging.getLogger("talk3d.io.media").debug("afterwards")
    assert sink.getvalue() == "note: 10 frames were duplicates\n"


def test_findings_are_shown_as_notes() -> None:
    sink = io.StringIO()
    with Display(Console(file=sink, width=200)):
        note_findings({"landmarks": "the package registry", "warnings": ["the sound is quiet"], "audio_offset_applied_ms": 0.0})
        note_findings({})
    assert sink.getvalue().splitlines() == ["note: the face points come from the package registry", "note: the sound is quiet"]


@pytest.mark.parametrize(("applied_ms", "said"), [(291.9, "moved forward by 292 ms"), (-265.0, "moved back by 265 ms")])
def test_sound_that_was_moved_is_noted_with_how_to_leave_it(applied_ms: float, said: str) -> None:
    sink = io.StringIO()
    with Display(Console(file=sink, width=200)):
        note_findings({"audio_offset_applied_ms": applied_ms, "warnings": []})
    (line,) = sink.getvalue().splitlines()
    assert said in line
    assert "--audio-offset-ms 0 " in line


def test_tables_hold_their_cells(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("report", ("metric", "[/mine]"), [("psnr", "31.2")])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("report", "metric", "[/mine]", "psnr", "31.2"))


def test_everything_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for what in ("talk3d", "torch", "device", "ai-edge-litert", "libx264 yes", "face landmarks"):
        assert what in shown


def test_missing_packages_are_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "PACKAGES", ("numpy", "no-such-package"))
    assert "no-such-package missing" in dict(terminal.examine())["packages"]


def test_extras_are_there_or_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "EXTRAS", {"mesh": ("numpy",), "onnx": ("numpy", "no-such-package")})
    assert dict(terminal.examine())["extras"] == "mesh there; onnx not there: pip install 'talk3d[onnx]'"


def test_every_extra_is_examined_with_its_packages() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extras = {name: given for name, given in tomllib.loads(text)["project"]["optional-dependencies"].items() if name != "dev"}
    assert {name: tuple(package.partition(">=")[0] for package in given) for name, given in extras.items()} == terminal.EXTRAS


def test_unwanted_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "UNWANTED", ("numpy",))
    assert "never uses it" in dict(terminal.examine())["numpy"]
