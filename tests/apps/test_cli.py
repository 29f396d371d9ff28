import subprocess
import sys
import time
from pathlib import Path

import pytest

from talk3d.apps import cli, commands
from talk3d.errors import MediaError


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("talk3d: ")
    return lines[0]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_overview_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in commands.COMMANDS)
    assert "examples:" in shown


def test_every_command_is_summarised() -> None:
    assert set(cli.SUMMARIES) == set(commands.COMMANDS) == set(cli.EXAMPLES)


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = "import sys; from talk3d.apps.cli import main; main(['--help']); sys.exit('torch' in sys.modules or 'tyro' in sys.modules)"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("talk3d 0.")


def test_unknown_command_suggests_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "did you mean train?" in error_line(capsys)
    assert cli.main(["zzz"]) == 2
    assert "choose one of" in error_line(capsys)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (MediaError("x.mp4 has no sound:\n give another"), 2, "talk3d: x.mp4 has no sound: give another"),
        (ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime.capi"), 2, "pip install onnxruntime"),
        (PermissionError(13, "Permission denied", "/x"), 2, "/x: Permission denied"),
        (OSError("the disk is full"), 2, "the disk is full"),
        (KeyboardInterrupt(), 130, "run the same command again to go on"),
    ],
)
def test_what_goes_wrong_is_one_line(
    raised: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, arguments: list[str], examples: str) -> None:
        raise raised

    monkeypatch.setattr(commands, "run", fail)
    assert cli.main(["train"]) == code
    assert said in error_line(capsys)


def test_our_own_slips_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, arguments: list[str], examples: str) -> None:
        raise ModuleNotFoundError("No module named 'talk3d.gone'", name="talk3d.gone")

    monkeypatch.setattr(commands, "run", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["train"])


@pytest.mark.parametrize("name", sorted(commands.COMMANDS))
def test_every_command_has_help_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown and f"talk3d {name}" in shown


@pytest.mark.parametrize("name", sorted(set(commands.COMMANDS) - {"demo", "doctor", "export", "prior", "weights"}))
def test_missing_inputs_are_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = {"train": 2, "animate": 2, "evaluate": 2}.get(name, 1)
    missing = [str(tmp_path / f"absent{number}") for number in range(inputs)]
    more = ["--clip", missing[0]] if name == "compare" else []
    assert cli.main([name, *missing, *more, "-o", str(tmp_path / "out.mp4")]) == 2
    assert f"{missing[0]} does not exist" in error_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(set(commands.COMMANDS) - {"demo", "doctor", "export", "prior", "weights"}))
def test_unwritable_outputs_are_one_line_before_work_starts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "given"
    given.touch()
    inputs = {"train": 2, "animate": 2, "evaluate": 2}.get(name, 1)
    more = ["--clip", str(given)] if name == "compare" else []
    assert cli.main([name, *[str(given)] * inputs, *more, "-o", str(tmp_path / "absent" / "out.mp4")]) == 2
    assert "cannot write" in error_line(capsys)
    assert list(tmp_path.iterdir()) == [given]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("pretrain heads -o x --stepz 3", "Unrecognized options: --stepz, 3: see talk3d pretrain --help"),
        ("animate a.t3d b.wav -o c.mp4 --yaw-deg abc", "could not convert string to float: 'abc': see talk3d animate --help"),
        ("animate", "missing: AVATAR; AUDIO; -o PATH, --out PATH: see talk3d animate --help"),
        ("track a.mp4 -o b --fps", "Missing value for argument '--fps'. Expected 1 values: see talk3d track --help"),
        ("weights", "Expected one of {list, fetch, verify, import}: see talk3d weights --help"),
        ("build a.mp4 -o b.t3d --device gpu", "'gpu'"),
    ],
)
def test_what_cannot_be_parsed_is_one_line(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments.split()) == 2
    assert said in error_line(capsys)


def test_a_prior_that_is_not_there_is_refused_before_the_film_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = tmp_path / "film.mp4"
    film.touch()
    assert cli.main(["build", str(film), "-o", str(tmp_path / "b.t3d"), "--prior", str(tmp_path / "none")]) == 2
    assert "none does not exist: give the path of a prior" in error_line(capsys)
