"""The face models, or a skip that says what is missing; names and sizes of what others published."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

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


def _tensors(layer: str, kind: str, sizes: list[int], biased: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and sizes of one line of published_networks.json; its legend says what the kinds are."""
    width = (sizes[0],)
    if kind == "tensor":
        yield layer, tuple(sizes)
        return
    yield f"{layer}.weight", tuple(sizes)
    if kind in ("linear", "norm") or biased:
        yield f"{layer}.bias", width
    if kind == "norm":
        yield from ((f"{layer}.{name}", width) for name in ("running_mean", "running_var"))
        yield f"{layer}.num_batches_tracked", ()


def published_sizes(name: str) -> dict[str, tuple[int, ...]]:
    table = json.loads((Path(__file__).parent / "published_networks.json").read_text(encoding="utf-8"))
    found = {}
    for layer, line in table[name]["layers"].items():
        kind, *rest = line.split()
        found |= _tensors(layer, kind, [int(size) for size in rest if size != "+"], "+" in rest)
    return found


@pytest.fixture(scope="session")
def has_published_sizes() -> Callable[..., None]:
    """Holds a network to the names and sizes of the published one, and those to the size of its file."""

    def check(name: str, network: nn.Module, *, rest: tuple[str, ...] = (), file_bytes: int | None = None) -> None:
        wanted = published_sizes(name)
        own = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        assert own == {key: value for key, value in wanted.items() if not key.startswith(rest)} if rest else own == wanted
        if file_bytes is not None:  # what a file holds beside its tensors is 60 to 250 bytes for each
            tensors = sum(4 * int(np.prod(value)) for value in wanted.values())
            assert 60 * len(wanted) < file_bytes - tensors < 250 * len(wanted)

    return check
