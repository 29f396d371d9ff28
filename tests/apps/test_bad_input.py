"""Unfit inputs through the command line: exit code 2, one line on the standard error, nothing left behind."""

import json
import wave
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from talk3d.apps.cli import main
from talk3d.errors import WeightsError
from talk3d.io.face_models import WHEEL_MEMBERS, registry_model
from talk3d.io.writing import VideoWriter
from talk3d.types import Waveform

FPS = 25


def write_film(path: Path, seconds: float = 1.6, *, sound: bool = True, size: tuple[int, int] = (96, 64)) -> Path:
    """A film of soft colours in which nobody is."""
    width, height = size
    count = round(seconds * FPS)
    waveform = Waveform(samples=torch.sin(torch.arange(seconds * 16000) * 0.1) * 0.3, sample_rate_hz=16000) if sound else None
    ramp = np.linspace(0, 200, width, dtype=np.uint8)
    with VideoWriter(path, width, height, fps=float(FPS), audio=waveform) as writer:
        for number in range(count):
            writer.write(np.broadcast_to((ramp + number % 50)[None, :, None], (height, width, 3)).copy())
    return path


def not_a_video(path: Path) -> None:
    path.write_text("I am a text.\n" * 50)


def empty(path: Path) -> None:
    path.touch()


def a_folder(path: Path) -> None:
    path.mkdir()


def without_sound(path: Path) -> None:
    write_film(path, sound=False)


def too_short(path: Path) -> None:
    write_film(path, 0.2)


def beheaded(path: Path) -> None:
    write_film(path)
    path.write_bytes(path.read_bytes()[-2000:])


def only_sound(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(b"\1\0" * 32000)


def of_no_numbers(path: Path) -> None:
    write_film(path, sound=False)
    with av.open(str(path)) as source, av.open(str(path.with_suffix(".mkv")), "w") as film:
        pictures = film.add_stream_from_template(source.streams.video[0])
        sound = film.add_stream("pcm_f32le", rate=16000, layout="mono")
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = pictures
                film.mux(packet)
        piece = av.AudioFrame.from_ndarray(np.full((1, 25600), np.nan, np.float32), format="flt", layout="mono")
        piece.sample_rate, piece.pts = 16000, 0
        film.mux([*sound.encode(piece), *sound.encode(None)])
    path.with_suffix(".mkv").replace(path)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    code = main(arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2, lines
    assert len(lines) == 1 and lines[0].startswith("talk3d: "), lines
    return lines[0]


@pytest.mark.parametrize("command", ["track", "build"])
@pytest.mark.parametrize("make", [not_a_video, empty, a_folder, without_sound, of_no_numbers, too_short, beheaded, only_sound])
def test_unfit_videos_are_refused(command: str, make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = tmp_path / "given.mp4"
    make(video)
    assert "given.mp4" in refused([command, str(video), "-o", str(tmp_path / "out.t3d")], capsys)
    assert not (tmp_path / "out.t3d").exists()
    assert not list(tmp_path.glob("**/*partial*"))


@pytest.fixture
def face_models() -> None:
    try:
        registry_model(next(iter(WHEEL_MEMBERS)))
    except WeightsError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("make", [not_a_video, empty, a_folder, beheaded, only_sound])
def test_what_cannot_be_looked_at_is_not_checked(make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = tmp_path / "given.mp4"
    make(video)
    assert "given.mp4" in refused(["check", str(video), "-o", str(tmp_path / "page.html")], capsys)
    assert list(tmp_path.iterdir()) == [video]


@pytest.mark.usefixtures("face_models")
@pytest.mark.parametrize(("make", "said"), [(without_sound, "no sound track"), (of_no_numbers, "is a number"), (too_short, "no face")])
def test_what_can_be_looked_at_but_not_used_is_refused_with_a_report(
    make: Callable[[Path], None], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video, report = tmp_path / "given.mp4", tmp_path / "report.json"
    make(video)
    assert said in refused(["check", str(video), "-o", str(report)], capsys)
    assert json.loads(report.read_text())["verdict"] == "refuse"
    assert sorted(tmp_path.iterdir()) == [video, report]


@pytest.mark.parametrize("command", ["track", "check"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = write_film(tmp_path / "given.mp4")
    assert "folder that exists" in refused([command, str(video), "-o", str(tmp_path / "no" / "out.html")], capsys)
    (tmp_path / "folder").mkdir()
    assert "folder" in refused([command, str(video), "-o", str(tmp_path / "folder")], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "given.mp4"]


@pytest.mark.usefixtures("face_models")
@pytest.mark.parametrize("size", [(96, 64), (97, 65), (64, 120)])
def test_films_without_a_face_are_refused(size: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = write_film(tmp_path / "given.mp4", size=size)
    assert "no face" in refused(["track", str(video), "-o", str(tmp_path / "clip")], capsys)
    assert list(tmp_path.iterdir()) == [video]


def test_a_face_model_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video, model = write_film(tmp_path / "given.mp4"), tmp_path / "face_landmarker.task"
    model.write_text("no bundle")
    assert "not a Face Landmarker" in refused(["track", str(video), "-o", str(tmp_path / "clip"), "--face-model", str(model)], capsys)


def test_a_foreign_folder_is_not_overwritten_by_a_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video, folder = write_film(tmp_path / "given.mp4"), tmp_path / "photos"
    folder.mkdir()
    (folder / "me.jpg").touch()
    assert "photos" in refused(["track", str(video), "-o", str(folder)], capsys)
    assert (folder / "me.jpg").exists()


@pytest.mark.parametrize("command", ["train", "animate", "evaluate"])
def test_files_that_are_no_weights_are_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, other = tmp_path / "given.t3d", write_film(tmp_path / "sound.mp4")
    not_a_video(given)
    out = tmp_path / ("out.json" if command == "evaluate" else "out.mp4")
    assert "given.t3d" in refused([command, str(given), str(other), "-o", str(out)], capsys)
    assert sorted(tmp_path.iterdir()) == [given, other]


def test_a_folder_that_is_no_clip_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clip").mkdir()
    assert "is not a clip" in refused(["personalize", str(tmp_path / "clip"), "-o", str(tmp_path / "person.t3d")], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_a_folder_that_is_no_data_set_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "heads").mkdir()
    assert "dataset.json" in refused(["pretrain", str(tmp_path / "heads"), "-o", str(tmp_path / "prior.t3d")], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]
