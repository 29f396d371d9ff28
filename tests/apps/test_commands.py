import wave
from pathlib import Path

import av
import pytest
import torch

from talk3d.apps import commands, terminal
from talk3d.apps.cli import main
from talk3d.errors import ConfigError
from talk3d.io.weights import save_tensors


def test_auto_takes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert commands.resolve_device("auto") == device
        assert commands.resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="--device cpu"):
        commands.resolve_device("cuda")


def test_inputs_must_be_there(tmp_path: Path) -> None:
    commands.check_input(tmp_path, "a clip", folder=True)
    with pytest.raises(ConfigError, match="is a folder: give the path of a video"):
        commands.check_input(tmp_path, "a video")
    with pytest.raises(ConfigError, match="give the path of a video"):
        commands.check_input(tmp_path / "absent", "a video")


def test_outputs_must_have_a_folder(tmp_path: Path) -> None:
    commands.check_output(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    for path in (tmp_path / "absent" / "out", Path("/dev/null/out")):
        with pytest.raises(ConfigError, match="cannot write"):
            commands.check_output(path)


def test_outputs_replace_only_their_own_kind(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "clip.json").touch()
    (tmp_path / "person.t3d").touch()
    commands.check_output(tmp_path / "clip", folder_with="clip.json")
    commands.check_output(tmp_path / "person.t3d")
    with pytest.raises(ConfigError, match="something else"):
        commands.check_output(tmp_path / "clip")
    with pytest.raises(ConfigError, match="something else"):
        commands.check_output(tmp_path / "person.t3d", folder_with="clip.json")


def test_a_saved_model_replaces_only_one_of_its_kind(tmp_path: Path) -> None:
    model, note = tmp_path / "model.t3d", tmp_path / "note.txt"
    save_tensors(model, {"numbers": torch.zeros(2)}, {"kind": "avatar"})
    note.write_text("mine")
    commands.check_output(model, kind="avatar")
    commands.check_output(tmp_path / "new.t3d", kind="person")
    for path, kind in ((model, "person"), (note, "avatar")):
        with pytest.raises(ConfigError, match="something else"):
            commands.check_output(path, kind=kind)


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    film, same = tmp_path / "film.mp4", tmp_path / "link.mp4"
    film.write_bytes(b"film")
    same.symlink_to(film)
    for out in (film, same):
        with pytest.raises(ConfigError, match="is not lost"):
            commands.check_output(out, tmp_path / "absent", film)
    commands.check_output(tmp_path / "other.mp4", film)


@pytest.mark.parametrize("command", [["check"], ["animate", "sample"], ["weights", "import"], ["track"], ["build"]], ids=" ".join)
def test_no_command_writes_over_what_it_reads(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.html"
    mine.write_bytes(b"irreplaceable")
    assert main([*command, str(mine), "-o", str(mine)]) == 2
    assert mine.read_bytes() == b"irreplaceable" and list(tmp_path.iterdir()) == [mine]
    assert capsys.readouterr().err.count("\n") == 1


def test_the_demo_is_a_film_with_sound_and_says_what_to_try_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short.wav"
    with wave.open(str(short), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(b"\x00\x08\x00\xf8" * 3200)
    assert terminal.asset("sample_sentence.flac").is_file()
    monkeypatch.setattr(terminal, "asset", lambda name: short)
    assert main(["demo", "-o", str(tmp_path / "demo.mp4")]) == 0
    with av.open(str(tmp_path / "demo.mp4")) as film:
        picture, sound = film.streams.video[0], film.streams.audio[0]
        assert (picture.codec_context.name, picture.width, picture.height, picture.average_rate) == ("h264", 256, 256, 25)
        assert sound.codec_context.name == "aac"
        assert sum(1 for _ in film.decode(picture)) == 10
    assert capsys.readouterr().out.count("  talk3d ") == 3
