import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from talk3d.apps import evaluation
from talk3d.apps.cli import main
from talk3d.errors import ConfigError
from talk3d.metrics.report import Report, measure


def a_report() -> Report:
    return Report(
        columns={
            "avatar": [measure("psnr", np.array([20.0, 30.0])), measure("csim", [], needs="arcface: talk3d weights fetch arcface")],
            "truth": [measure("psnr", 100.0)],
        },
        facts={"driven_by": {"audio": "the clip's own sound"}, "ranking": {"avatar": 1.0}, "ranked_by": ["psnr", "jitter"], "seconds": 61.0},
    )


def test_the_table_names_columns_gaps_and_sources() -> None:
    console = Console(file=io.StringIO(), width=120)
    evaluation.print_report("report.json", a_report(), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for part in (
        "psnr (dB)",
        "↑",
        "25",
        "100",
        "csim: not measured (needs arcface: talk3d weights fetch arcface)",
        "driven by  audio",
        "1. avatar",
        "ranked by  psnr, jitter",
        "1 min 1 s",
    ):
        assert part in text


def test_a_report_has_one_of_two_endings(tmp_path: Path) -> None:
    for name in ("a.json", "a.html"):
        evaluation.check_report(tmp_path / name)
    with pytest.raises(ConfigError, match=r"\.html or \.json"):
        evaluation.check_report(tmp_path / "a.mp4")


@pytest.mark.parametrize("command", [["evaluate", "AVATAR", "CLIP"], ["compare", "AVATAR", "--clip", "CLIP"]], ids=lambda parts: parts[0])
def test_inputs_are_looked_for_before_anything_else(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(tmp_path / part) if part.isupper() else part for part in command]
    assert main([*given, "-o", str(tmp_path / "report.json")]) == 2
    assert "AVATAR does not exist" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_what_is_compared_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="twice"):
        evaluation._named((tmp_path / "a.mp4", tmp_path / "a.mp4"))
    found = evaluation._named((tmp_path / "x" / "a.mp4", tmp_path / "y" / "a.mp4", tmp_path / "b.mov"))
    assert all(isinstance(value, Path) for value in found.values()) and len(found) == 3


def test_both_commands_write_and_print(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip, film = tmp_path / "clip", tmp_path / "other.mp4"
    clip.mkdir()
    film.touch()
    heard = []

    def stage(*given: object, **rest: object) -> Report:
        heard.append((given, rest))
        return a_report()

    for name in ("evaluate", "compare"):
        monkeypatch.setattr(evaluation, name, stage)
    monkeypatch.setattr(evaluation, "load_clip", lambda path: path)
    assert main(["evaluate", "sample", str(clip), "-o", str(tmp_path / "one.json"), "--max-frames", "3"]) == 0
    assert main(["compare", "sample", str(film), "--clip", str(clip), "-o", str(tmp_path / "two.html"), "--cropped"]) == 0
    assert heard[0][0][2].max_frames == 3 and list(heard[1][0][0]) == ["sample", "other"] and heard[1][0][2].cropped
    assert (tmp_path / "one.json").is_file() and (tmp_path / "two.html").is_file()
    assert capsys.readouterr().out.count("not measured") == 2
