"""Face points against a rendered person's truth, with both face models."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from talk3d.perception import landmarks as lm
from talk3d.perception.detection import FaceBox

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
    ours = lm.normalize_blink(followed[1]).mean(-1).numpy()
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
    swapped = mirrored.landmarks[lm.load_template("registry").mirror.numpy()] * (-1, 1) + (portrait.shape[1], 0)
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
    assert blink.shape == (500, 2)
    assert blink[101].min() > 0.9
    assert blink[:90].mean() < 0.1
    quiet = lm.normalize_blink(torch.full((50, 2), 0.4))
    assert quiet.max() == 0


def test_each_eye_has_its_own_blink():
    eyes = torch.zeros(100, 2)
    eyes[40:44, 0] = 1.0
    blink = lm.normalize_blink(eyes)
    assert blink[42].tolist() == [1.0, 0.0]


def test_gaze_is_where_the_irises_are_against_looking_straight_ahead():
    points = torch.zeros(2, 478, 2)
    points[:, 33], points[:, 133], points[:, 362], points[:, 263] = (torch.tensor([x, 0.0]) for x in (0.0, 30.0, 70.0, 100.0))
    ahead = torch.tensor([[15.0, 0.0], [85.0, 0.0]]).expand(2, 2, 2)
    points[:, 468], points[:, 473] = ahead[0, 0], ahead[0, 1]
    points[1, [468, 473]] += torch.tensor([3.0, -6.0])
    assert lm.eye_gaze(points, ahead).flatten().tolist() == pytest.approx([0.0, 0.0, 0.1, 0.2], abs=1e-6)
    assert lm.eye_gaze(points[:, :468], ahead).abs().max() == 0


def test_irises_lie_between_the_corners_as_far_out_as_the_lids():
    face = torch.zeros(468, 3)
    face[[33, 133]], face[[362, 263]] = torch.tensor([[-3.0, 1, 0], [-1, 2, 0]]), torch.tensor([[1.0, 2, 0], [3, 1, 0]])
    face[[160, 144, 159, 145, 158, 153], 2] = 0.5
    face[[387, 373, 386, 374, 385, 380], 2] = torch.tensor([0.4, 0.8] * 3)
    torch.testing.assert_close(lm.irises_ahead(face), torch.tensor([[-2.0, 1.5, 0.5], [2.0, 1.5, 0.6]]))


def test_brows_are_measured_along_the_face_against_where_they_usually_are():
    points = torch.zeros(3, 478, 2)
    points[:, 33], points[:, 263] = torch.tensor([10.0, 20.0]), torch.tensor([10.0, 120.0])  # the head lies on its side: up is to the right
    rest = torch.randn(2, 10, 2, generator=torch.Generator().manual_seed(0))
    points[:, torch.tensor(lm.BROWS)] = rest + torch.tensor([2.0, 5.0])
    points[1, list(lm.BROWS[0])] += torch.tensor([4.0, 0.0])
    points[2, list(lm.BROWS[1])] += torch.tensor([-3.0, 7.0])
    expected = torch.tensor([[0.0, 0.0], [0.04, 0.0], [0.0, -0.03]])
    torch.testing.assert_close(lm.brow_lift(points, rest.expand(3, 2, 10, 2)), expected, atol=1e-6, rtol=0)


def test_the_gaze_is_gone_over_while_the_eyes_are_shut():
    gaze, blink = torch.tensor([[0.0, 0.2], [9.0, 9.0], [9.0, 9.0], [0.3, -0.1], [0.5, 0.0]]), torch.tensor([[0.0], [0.9], [0.5], [0.1], [0.0]])
    expected = torch.tensor([[0.0, 0.2], [0.1, 0.1], [0.2, 0.0], [0.3, -0.1], [0.5, 0.0]])
    torch.testing.assert_close(lm.steady_gaze(gaze, blink), expected)
    assert not lm.steady_gaze(gaze, torch.ones(5, 1)).any()


@pytest.mark.parametrize("kind", ["registry", "task"])
def test_irises_lie_in_their_eyes(kind: str, request: pytest.FixtureRequest, portrait: np.ndarray):
    seen = lm.observe_picture(request.getfixturevalue(f"{kind}_model"), portrait)
    assert seen is not None
    assert seen.landmarks.shape == (478, 2)
    for iris, corners in zip(lm.IRISES, (lm.RIGHT_EYE_CORNERS, lm.LEFT_EYE_CORNERS), strict=True):
        middle = seen.landmarks[list(corners)].mean(0)
        width = np.linalg.norm(seen.landmarks[corners[0]] - seen.landmarks[corners[1]])
        assert np.linalg.norm(seen.landmarks[iris] - middle) < 0.3 * width
    assert len(seen.expression) == (52 if kind == "task" else 0)


class TwoFaces:
    """A model that sees two faces of the same size and follows the one it is shown."""

    source, kind = "scripted", "task"

    def __init__(self) -> None:
        self.blind = False

    def detect(self, frame: np.ndarray) -> list[FaceBox]:
        return (
            [] if self.blind else [FaceBox(centre_px=(x, 50.0), side_px=side, angle_rad=0.0, score=1.0) for x, side in ((150.0, 41.0), (50.0, 40.0))]
        )

    def observe(self, frame: np.ndarray, box: FaceBox) -> lm.FaceObservation | None:
        if self.blind:
            return None
        middle = 150.0 if box.centre_px[0] > 100 else 50.0
        points = np.random.default_rng(0).uniform(-13, 13, (478, 2)).astype(np.float32) + np.float32([middle, 50])
        points[33], points[263] = (middle - 10, 45), (middle + 10, 45)
        return lm.FaceObservation(landmarks=points, score=1.0, eyes_shut=(0.0, 0.0), expression=np.zeros(0, np.float32))


def test_a_lost_face_is_found_again_beside_another():
    model = TwoFaces()
    tracker = lm.FaceTracker(model)
    frame = np.zeros((100, 200, 3), np.uint8)
    tracker.follow(frame)
    tracker._box = tracker._last = FaceBox(centre_px=(50.0, 50.0), side_px=40.0, angle_rad=0.0, score=1.0)
    model.blind = True
    assert tracker.follow(frame) is None
    model.blind = False
    again = tracker.follow(frame)
    assert again is not None
    assert again.landmarks[:, 0].max() < 100
    tracker.cut()
    fresh = tracker.follow(frame)
    assert fresh is not None
    assert fresh.landmarks[:, 0].min() > 100


def test_lips_are_read_from_vivid_colours_and_all_else_from_the_picture_as_it_is(registry_model, portrait: np.ndarray):
    box = registry_model.detect(portrait)[0]
    grey = np.repeat(portrait.mean(-1, keepdims=True).round().astype(np.uint8), 3, -1)
    for picture, lips_differ in ((portrait, True), (grey, False)):
        plain, vivid = registry_model._points(picture, box, (1.0, lm.VIVID))[0]
        seen = registry_model.observe(picture, box).landmarks[:468]
        rest = [point for point in range(468) if point not in {*lm.LIPS, *lm.RIGHT_EYE, *lm.LEFT_EYE}]
        np.testing.assert_array_equal(seen[list(lm.LIPS)], vivid[list(lm.LIPS)])
        np.testing.assert_array_equal(seen[rest], plain[rest])
        assert (np.abs(vivid - plain).max() > 0.1) == lips_differ


def test_looks_side_by_side_are_those_of_one_network_in_turn(registry_model, portrait: np.ndarray):
    box, points = registry_model.detect(portrait)[0], registry_model._points
    squares = [replace(box, side_px=scale * box.side_px) for scale in lm.LOOK_SCALES]
    looks = [points._look(points._networks[0], portrait, square, (1.0,)) for square in squares]
    (found,), score = points(portrait, box)
    np.testing.assert_allclose(found, np.mean([look for seen, _ in looks for look in seen[0]], 0), atol=1e-4)
    assert score == pytest.approx(1 / (1 + np.exp(-min(logits.min() for _, logits in looks))), abs=1e-6)
