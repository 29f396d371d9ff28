"""The examples run as they stand, on what ships."""

import importlib.util
import wave
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import talk3d
from talk3d.apps.terminal import asset

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
AVATAR = asset("sample_avatar.safetensors")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Half a second of noise."""
    path = tmp_path / "speech.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((3000 * np.random.default_rng(0).standard_normal(8000)).astype("<i2").tobytes())
    return path


def test_examples_are_short() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"look_around", "speak", "whole_path"}
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 40 for path in EXAMPLES.glob("*.py"))


def test_speak(speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("speak").main(str(AVATAR), str(speech), str(tmp_path / "out.mp4"))
    assert (tmp_path / "out.mp4").stat().st_size > 1000
    assert "12 frames" in capsys.readouterr().out


def test_look_around(speech: Path, tmp_path: Path) -> None:
    load("look_around").main(str(AVATAR), str(speech), str(tmp_path / "pictures"))
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == ["000.png", "001.png"]
    with Image.open(pictures[0]) as picture:
        assert picture.size == (256, 256)


def test_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of things and their files; what the stages do has tests of its own."""

    class Thing:
        def __init__(self, name: str) -> None:
            self.name = name

        def save(self, path: Path) -> None:
            path.write_text(self.name)

    def stage(name: str) -> Any:
        return lambda *given, **rest: Thing(f"{name} of {', '.join(getattr(part, 'name', str(part)) for part in given)}")

    for name in ("track", "personalize", "train", "evaluate"):
        monkeypatch.setitem(vars(talk3d), name, stage(name))
    load("whole_path").main("me.mp4", str(tmp_path / "out"))
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    clip, person = "track of me.mp4", "personalize of track of me.mp4"
    avatar = f"train of {person}, {clip}"
    assert written == {"clip": clip, "person.t3d": person, "avatar.t3d": avatar, "report.json": f"evaluate of {avatar}, {clip}"}
