import math
from pathlib import Path

import numpy as np
import pytest
import torch

from talk3d.errors import MediaError, ShapeError
from talk3d.io.writing import VideoWriter
from talk3d.metrics.truth import TRUTH_FILE, Truth, align_heads, camera_errors, find_truth, fit_background, load_truth, novel_frames, person_matte
from talk3d.ops.geometry import HEAD_PIVOT, intrinsics_matrix, look_at, project, rotation_from_vector
from talk3d.types import Camera, FaceTrack

FILM_PX, CROP_PX, FRAMES = 384, 256, 24


def corners(height: int, width: int) -> np.ndarray:
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return np.stack([60 + 90 * x, 120 + 50 * y, 180 - 60 * x * y], -1).round().astype(np.uint8)


def truth(**changes: object) -> Truth:
    angles = torch.stack([0.3 * torch.sin(torch.arange(FRAMES) / 3.0), 0.1 * torch.cos(torch.arange(FRAMES) / 2.0), torch.zeros(FRAMES)], -1)
    values: dict[str, object] = {
        "cameras": Camera(cam2world=look_at(angles), intrinsics=intrinsics_matrix(3.0).expand(FRAMES, 3, 3)),
        "landmarks": np.random.default_rng(0).uniform(0, FILM_PX, (FRAMES, 68, 2)).astype(np.float32),
        "filming": Camera(cam2world=look_at(torch.zeros(3)), intrinsics=intrinsics_matrix(3.0)),
        "film_side_px": FILM_PX,
        "novel": (),
        "novel_first_frame": 20,
    }
    return Truth(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def track(known: Truth, scale: float, turn: torch.Tensor, shift: torch.Tensor) -> FaceTrack:
    """Track the truth perfectly, in a moved head space, with crops that shift, shrink and roll."""
    roll = 0.1 * torch.sin(torch.arange(FRAMES) / 4.0).double()
    zoom, corner = 0.9, torch.tensor([50.0, 40.0], dtype=torch.float64)
    cosine, sine = roll.cos(), roll.sin()
    matrix = zoom * torch.stack([torch.stack([cosine, -sine], -1), torch.stack([sine, cosine], -1)], -2)
    moved = known.cameras.cam2world.double().clone()
    moved[:, :3, :3] = turn @ moved[:, :3, :3] @ rotation_from_vector(torch.stack([0 * roll, 0 * roll, -roll], -1))
    moved[:, :3, 3] = scale * moved[:, :3, 3] @ turn.T + shift
    middle = matrix @ torch.tensor([FILM_PX / 2, FILM_PX / 2], dtype=torch.float64) - corner
    focal = 3.0 * FILM_PX * zoom / CROP_PX
    intrinsics = intrinsics_matrix(focal).repeat(FRAMES, 1, 1)
    intrinsics[:, :2, 2] = (middle / CROP_PX).float()
    return FaceTrack(
        cameras=Camera(cam2world=moved.float(), intrinsics=intrinsics),
        head_pose=torch.zeros(FRAMES, 3),
        landmarks=torch.zeros(FRAMES, 478, 2),
        anchors=torch.zeros(FRAMES, 6),
        blink=torch.zeros(FRAMES, 1),
        upper_face=torch.zeros(FRAMES, 5),
        confidence=torch.ones(FRAMES, 1),
        crop=torch.cat([matrix, -corner.expand(FRAMES, 2)[..., None]], -1).numpy(),
    )


SCALE, TURN, SHIFT = 1.08, rotation_from_vector(torch.tensor([0.05, -0.1, 0.02], dtype=torch.float64)), torch.tensor([0.02, -0.05, 0.03]).double()


def test_the_head_space_of_a_perfect_track_is_found() -> None:
    known = truth()
    tracked = track(known, SCALE, TURN, SHIFT)
    alignment = align_heads(known, tracked, np.arange(FRAMES), CROP_PX)
    assert alignment.scale == pytest.approx(SCALE, abs=1e-3)
    torch.testing.assert_close(alignment.rotation, TURN.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(alignment.shift, SHIFT.float(), atol=1e-3, rtol=0)
    errors = camera_errors(known, tracked, alignment, np.arange(FRAMES), CROP_PX)
    assert errors.rotation_deg.max() < 0.05
    assert errors.reprojection_px.max() < 0.01


def test_a_camera_turned_by_two_degrees_is_off_by_two_degrees() -> None:
    known = truth()
    tracked = track(known, SCALE, TURN, SHIFT)
    alignment = align_heads(known, tracked, np.arange(FRAMES), CROP_PX)
    tracked.cameras.cam2world[5, :3, :3] @= rotation_from_vector(torch.tensor([0.0, math.radians(2.0), 0.0]))
    errors = camera_errors(known, tracked, alignment, np.array([4, 5]), CROP_PX)
    np.testing.assert_allclose(errors.rotation_deg, [0, 2], atol=0.05)
    assert errors.reprojection_px[1] > 5


def test_aligned_cameras_see_the_same() -> None:
    known = truth()
    alignment = align_heads(known, track(known, SCALE, TURN, SHIFT), np.arange(FRAMES), CROP_PX)
    points = (torch.rand(10, 3) * 0.4 - 0.2).expand(FRAMES, 10, 3)
    moved = alignment.scale * points @ alignment.rotation.T + alignment.shift
    torch.testing.assert_close(project(moved, alignment.apply(known.cameras)), project(points, known.cameras), atol=1e-4, rtol=0)


def test_mouth_opening_is_lips_over_eyes() -> None:
    landmarks = np.zeros((2, 68, 2), np.float32)
    landmarks[:, 45, 0] = 100
    landmarks[1, 66] = (3, 4)
    np.testing.assert_allclose(truth(landmarks=landmarks).mouth_opening, [0, 0.05])


def test_a_clip_may_begin_later_than_its_film() -> None:
    known = truth()
    part = known.part(3, 10)
    assert part.num_frames == 10 and part.novel_first_frame == 17
    torch.testing.assert_close(part.cameras.cam2world, known.cameras.cam2world[3:13])
    np.testing.assert_array_equal(part.landmarks, known.landmarks[3:13])
    with pytest.raises(ShapeError, match="knows 24 frames"):
        known.part(20, 5)


def test_a_gradient_behind_a_person_is_found() -> None:
    background = corners(96, 96)
    picture = background.copy()
    picture[30:, 25:75] = (20, 30, 40)
    fitted = fit_background(picture)
    assert np.abs(fitted.astype(int) - background).max() <= 1
    matte = person_matte(picture, fitted)
    assert matte[40:, 30:70].min() == 255
    assert matte[:25].max() == 0 and matte[:, :20].max() == 0


def make_truth(folder: Path, num_novel: int) -> Truth:
    """Write a truth whose novel film shows a bright ball at the head's pivot."""
    known = truth()
    filming = Camera(cam2world=look_at(torch.tensor([0.05, -0.03, 0.0])), intrinsics=intrinsics_matrix(3.0))
    np.savez(
        folder / TRUTH_FILE,
        cam2head=known.cameras.to_label().numpy(),
        camera=filming.to_label().numpy(),
        landmarks=known.landmarks,
        novel=np.array([[35.0, -10.0]]),
        novel_cam2head_first_frame=20,
    )
    background = corners(192, 192)
    y, x = np.mgrid[:192, :192] + 0.5
    with VideoWriter(folder / "novel_+35_-10.mp4", 192, 192) as writer:
        for i in range(num_novel):
            world = filming.cam2world @ torch.linalg.inv(known.cameras.cam2world[20 + i]) @ torch.tensor([*HEAD_PIVOT, 1.0])
            novel = Camera(cam2world=look_at(torch.tensor([math.radians(35), math.radians(-10), 0.0])), intrinsics=intrinsics_matrix(3.0))
            centre = 192 * project(world[None, :3], novel)[0].numpy()
            ball = np.hypot(x - centre[0], y - centre[1]) < 20
            writer.write(np.where(ball[..., None], np.uint8(235), background))
    return load_truth(folder)


def test_novel_frames_are_cut_round_the_head(tmp_path: Path) -> None:
    known = make_truth(tmp_path, 4)
    assert known.num_frames == FRAMES and [view.name for view in known.novel] == ["+35_-10"]
    found = list(novel_frames(known, known.novel[0], np.array([21, 23]), 128))
    assert len(found) == 2
    y, x = np.mgrid[:128, :128] + 0.5
    for frame in found:
        weight = frame.matte / frame.matte.sum()
        assert (weight * x).sum() == pytest.approx(64, abs=0.5) and (weight * y).sum() == pytest.approx(64, abs=0.5)
        assert math.sqrt(frame.matte.sum() / math.pi) == pytest.approx(20 * 128 / (192 * 3.0 / 4.2647), abs=0.7)
        assert frame.picture[64, 64].min() > 220 and np.abs(frame.picture[2, 2].astype(int) - frame.background[2, 2]).max() < 6
        torch.testing.assert_close(project(torch.tensor([HEAD_PIVOT]), frame.camera), torch.tensor([[0.5, 0.5]]), atol=1e-4, rtol=0)
        distance = (frame.camera.cam2world[:3, 3] - torch.tensor(HEAD_PIVOT)).norm().item()
        assert distance == pytest.approx(2.7, abs=0.4)


def test_a_film_too_short_is_refused(tmp_path: Path) -> None:
    known = make_truth(tmp_path, 2)
    with pytest.raises(ShapeError, match="frames"):
        list(novel_frames(known, known.novel[0], np.array([23]), 64))


def test_a_folder_without_truth(tmp_path: Path) -> None:
    assert find_truth(tmp_path) is None
    with pytest.raises(MediaError, match=TRUTH_FILE):
        load_truth(tmp_path)


def test_the_truth_of_the_development_clip(shared: Path) -> None:
    known = load_truth(shared / "data/clips/person_11")
    assert known.num_frames == 900 and known.film_side_px == 384 and len(known.novel) == 4 and known.novel_first_frame == 800
    assert 0 <= known.mouth_opening.min() < 0.01 and 0.2 < known.mouth_opening.max() < 0.3
