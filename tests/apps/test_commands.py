from pathlib import Path

import pytest
import torch

from talk3d.apps import commands
from talk3d.errors import ConfigError


def test_auto_takes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert commands.resolve_device("auto") == device
        assert commands.resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="--device cpu"):
        commands.resolve_device("cuda")


def test_inputs_must_be_there(tmp_path: Path) -> None:
    commands.check_input(tmp_path, "a folder")
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
