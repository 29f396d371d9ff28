"""Face points against a rendered person's truth, with both face models."""

from pathlib import Path

import numpy as np
import pytest
import torch

from talk3d.perception import landmarks as lm

POINTS_OF_TRUTH = {36: 33, 39: 133, 42: 362, 45: 263, 48: 61, 54: 291, 51: 0, 57: 17, 60: 78, 64: 308, 62: 13, 66: 14}
"""Numbers of the 68-point truth: numbers of MediaPipe; eye corners and lips."""
NUM_FRAMES = 200


@pytest.fixture(scope="module", params=["registry", "task"])
def followed(request: pytest.FixtureRequest, followed_by) -> tuple[torch.Tensor, torch.Tensor]:
    return followed_by(request.param)


@pytest.fixture(scope="module")
def truth(person: Path) -> dict[str, np.ndarray]:
    with np.load(person / "truth.npz") as file:
        return {name: file[name] for name in ("landmarks", "weights", "expression_names")}


def test_eye_corners_and_lips_lie_within_three_percent(followed, truth):
    points, expected = followed[0].numpy(), truth["landmarks"][:NUM_FRAMES]
    between_eyes = np.linalg.norm(expected[:, 36] - expected[:, 45], axis=-1)
    errors = [np.linalg.norm(points[:, ours] - expected[:, theirs], axis=-1) / between_eyes for theirs, ours in POINTS_OF_TRUTH.items()]
    assert np.mean(errors) < 0.03


def test_mouth_opening_follows_the_truth(followed, truth):
    expected = truth["landmarks"][:NUM_FRAMES]
    opening = np.linalg.norm(expected[:, 62] - expected[:, 66], axis=-1) / np.linalg.norm(expected[:, 36] - expected[:, 45], axis=-1)
    ours = lm.mouth_opening(followed[0]).numpy()
    assert np.corrcoef(ours, opening)[0, 1] > 0.94


def test_blinks_are_found_and_none_is_invented(followed, truth):
    names = truth["expression_names"].tolist()
    expected = truth["weights"][:NUM_FRAMES, [names.index("eyeBlink_L"), names.index("eyeBlink_R")]].mean(-1)
    ours = lm.normalize_blink(followed[1])[:, 0].numpy()
    assert ours.min() >= 0
    assert ours.max() <= 1
    assert np.corrcoef(ours, expected)[0, 1] > 0.9
    assert _events(ours) == pytest.approx(_events(expected), abs=2)


def _events(values: np.ndarray) -> list[int]:
    """Middles of the stretches above one half."""
    above = np.concatenate([[0], (values > 0.5).astype(int), [0]])
    return [int(middle) for middle in (np.flatnonzero(np.diff(above) == 1) + np.flatnonzero(np.diff(above) == -1)) // 2]


def test_points_move_with_the_picture(registry_model, portrait: np.ndarray):
    first = lm.observe_picture(registry_model, portrait)
    shifted = lm.observe_picture(registry_model, np.pad(portrait, ((40, 0), (60, 0), (0, 0)), mode="edge"))
    mirrored = lm.observe_picture(registry_model, np.ascontiguousarray(portrait[:, ::-1]))
    assert first is not None
    assert shifted is not None
    assert mirrored is not None
    assert np.abs(shifted.landmarks - (60, 40) - first.landmarks).mean() < 1.0
    swapped = mirrored.landmarks[lm.load_template("registry").mirror[:468].numpy()] * (-1, 1) + (portrait.shape[1], 0)
    assert np.abs(swapped - first.landmarks).mean() < 1.5


def test_no_face_gives_nothing_and_a_cut_forgets(registry_model, portrait: np.ndarray):
    tracker = lm.FaceTracker(registry_model)
    assert tracker.follow(np.full((200, 200, 3), 127, np.uint8)) is None
    assert tracker.follow(portrait) is not None
    tracker.cut()
    assert tracker.follow(np.full((384, 384, 3), 127, np.uint8)) is None


def test_mouth_opening_and_eyes_by_hand():
    points = torch.zeros(2, 468, 2)
    points[:, 33], points[:, 263] = torch.tensor([0.0, 0.0]), torch.tensor([100.0, 0.0])
    points[1, [87, 14, 317], 1] = 20
    assert lm.mouth_opening(points).tolist() == pytest.approx([0.0, 0.2])
    face = np.zeros((468, 2), np.float32)
    face[33], face[133], face[263], face[362] = (0, 0), (30, 0), (100, 0), (70, 0)
    face[[144, 145, 153], 1] = 6
    assert lm.eye_openings(face) == pytest.approx((0.2, 0.0))


def test_blink_is_zero_open_one_shut_and_nothing_is_made_of_noise():
    eyes = -0.3 + 0.01 * torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    eyes[100:104] = -0.02
    eyes[300:304] = -0.02
    blink = lm.normalize_blink(eyes)
    assert blink[101].item() > 0.9
    assert blink[:90].mean() < 0.1
    quiet = lm.normalize_blink(torch.full((50, 2), 0.4))
    assert quiet.max() == 0
