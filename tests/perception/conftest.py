"""The face models, or a skip that says what is missing."""

from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from talk3d.errors import WeightsError
from talk3d.io.media import read_video
from talk3d.perception.landmarks import FaceModel, FaceTracker, RegistryFaceModel, TaskFaceModel


@pytest.fixture(scope="session")
def registry_model() -> FaceModel:
    try:
        return RegistryFaceModel()
    except WeightsError as error:
        pytest.skip(f"the face models are neither cached nor to be had: {error}")


@pytest.fixture(scope="session")
def task_model(shared: Path) -> FaceModel:
    path = shared / "models" / "face_landmarker.task"
    if not path.is_file():
        pytest.skip(f"no Face Landmarker file at {path}")
    return TaskFaceModel(path)


@pytest.fixture(scope="session")
def person(shared: Path) -> Path:
    return shared / "clips" / "person_11" if (shared / "clips").is_dir() else shared / "data" / "clips" / "person_11"


@pytest.fixture(scope="session")
def portrait(person: Path) -> np.ndarray:
    """One frame of an invented person."""
    return next(read_video(person / "video.mp4"))


@pytest.fixture(scope="session")
def followed_by(request: pytest.FixtureRequest, person: Path) -> Callable[[str], tuple[torch.Tensor, torch.Tensor]]:
    """Points and shut eyes of an invented person's first eight seconds, by a kind of face model."""

    @cache
    def follow(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        tracker = FaceTracker(request.getfixturevalue(f"{kind}_model"))
        seen = [tracker.follow(frame) for frame in islice(read_video(person / "video.mp4"), 200)]
        assert all(seen)
        assert max(tracker.crowd) == 1
        points = torch.from_numpy(np.stack([face.landmarks for face in seen if face]))
        return points, torch.tensor([face.eyes_shut for face in seen if face])

    return follow
