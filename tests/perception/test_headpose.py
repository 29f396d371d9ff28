"""Head pose of synthetic motions known exactly, and of a rendered person."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.signal import savgol_filter

from talk3d.errors import ShapeError
from talk3d.ops.geometry import fit_similarity, head_camera, project, view_angles
from talk3d.perception import headpose as hp
from talk3d.perception.facetemplate import FaceTemplate, ModelKind, load_template, pose_features
from talk3d.types import Camera


def swinging(count: int = 200) -> torch.Tensor:
    """Yaw, pitch, roll in radians of a lively head."""
    time = torch.arange(count, dtype=torch.float64) / 25
    return torch.stack([0.25 * (1.3 * time).sin(), 0.12 * (1.9 * time + 1).sin(), 0.06 * (0.8 * time).cos()], -1)


def exact(kind: ModelKind) -> FaceTemplate:
    """The template of networks that follow every turn."""
    template = load_template(kind)
    return replace(template, lag=torch.zeros_like(template.lag))


def seen_by(cameras: Camera, template: FaceTemplate, side_px: float, noise_px: float = 0.0) -> torch.Tensor:
    points = template.points.double().expand(len(cameras), -1, -1)
    noise = noise_px * torch.randn(len(cameras), 468, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (project(points, cameras) * side_px + noise).float()


def offset_free_error_deg(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Yaw, pitch, roll errors of rotations after the one constant turn between their head spaces is taken out."""
    _, turn, _ = fit_similarity(found.transpose(-1, -2).reshape(-1, 3), truth.transpose(-1, -2).reshape(-1, 3), with_scale=False)
    return torch.rad2deg(view_angles(turn @ found) - view_angles(truth))


def test_exact_points_give_back_the_exact_cameras():
    template = exact("registry")
    cameras = head_camera(swinging())
    motion = hp.solve_head_pose(seen_by(cameras, template, 500), template, (500, 500))
    assert motion.focal_px == pytest.approx(4.2647 * 500, rel=2e-3)
    error = torch.rad2deg(view_angles(motion.cam2world()[:, :3, :3]) - swinging())
    assert error.abs().max() < 0.25
    assert (motion.cam2world()[:, :3, 3] - cameras.cam2world[:, :3, 3]).norm(dim=-1).max() < 0.02
    assert motion.residual_px.max() < 0.2


def test_noise_a_stranger_and_a_speaking_mouth_do_not_turn_the_head():
    template = exact("registry")
    generator = torch.Generator().manual_seed(1)
    strange = template.points * torch.tensor([1.05, 0.97, 1.0]) + 0.002 * torch.randn(468, 3, generator=generator)
    stranger = replace(template, points=strange)
    cameras = head_camera(swinging())
    points = seen_by(cameras, stranger, 500, noise_px=0.7)
    mouth = [13, 14, 17, 0, 61, 291, 152, 148, 377, 84, 314]
    points[:, mouth, 1] += 15 * (torch.arange(200) * 0.9).sin()[:, None].abs()
    motion = hp.solve_head_pose(points, template, (500, 500))
    error = offset_free_error_deg(motion.cam2world()[:, :3, :3], cameras.cam2world[:, :3, :3])
    assert error.abs().mean(0).max() < 0.5
    jitter = torch.rad2deg(view_angles(motion.rotation.mT)).diff(n=2, dim=0).square().mean().sqrt()
    assert jitter < 0.25


def test_a_head_beside_the_middle_keeps_the_geometry_of_the_whole_picture():
    template = exact("registry")
    cameras = head_camera(swinging())
    intrinsics = cameras.intrinsics.clone()
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = 4.0
    moved = cameras.cam2world.clone()
    moved[:, :3, 3] += 0.3 * moved[:, :3, 0]  # the camera stands to the side, the head left of the middle
    shifted = Camera(cam2world=moved, intrinsics=intrinsics)
    motion = hp.solve_head_pose(seen_by(shifted, template, 800), template, (800, 800))
    error = offset_free_error_deg(motion.cam2world()[:, :3, :3], moved[:, :3, :3])
    assert error.abs().max() < 0.3


def test_unseen_frames_are_bridged_along_the_arc():
    template = exact("registry")
    cameras = head_camera(swinging())
    points = seen_by(cameras, template, 500)
    seen = torch.ones(200, dtype=torch.bool)
    seen[60:66] = False
    points[60:66] = 0
    motion = hp.solve_head_pose(points, template, (500, 500), seen)
    error = torch.rad2deg(view_angles(motion.cam2world()[:, :3, :3]) - swinging())
    assert error.abs().max() < 0.6
    assert torch.isnan(motion.residual_px[60:66]).all()


def test_smoothing_has_no_delay_keeps_slow_nods_and_stops_at_cuts():
    assert hp.smoothing_gain(2.0) == pytest.approx(0.93, abs=0.01)
    assert hp.smoothing_gain(0.0) == pytest.approx(1.0)
    angles = torch.zeros(100, 3, dtype=torch.float64)
    angles[50:, 0] = 0.5
    rotation = head_camera(angles).cam2world[:, :3, :3].mT
    place = torch.tensor([0.0, 0.0, 2.7], dtype=torch.float64).expand(100, 3)
    kept, _ = hp.smooth_motion(rotation, place, cuts=(50,))
    assert torch.allclose(kept, rotation, atol=1e-9)
    blurred, _ = hp.smooth_motion(rotation, place)
    expected = savgol_filter(angles[:, 0].numpy(), 9, 2)
    assert np.abs(view_angles(blurred.mT)[40:60, 0].numpy() - expected[40:60]).max() < 1e-6
    assert hp.cutoff_hz(25.0, 9) == pytest.approx(3.05, abs=0.02)
    report = hp.describe_smoothing(rotation, blurred, 25.0, hp.smoothing_window(25.0))
    assert report["delay_frames"] == 0
    assert report["jitter_after_deg"] < report["jitter_before_deg"]


def test_a_still_head_is_calm_and_a_nodding_one_keeps_its_nods():
    place = torch.tensor([0.0, 0.0, 2.7], dtype=torch.float64).expand(100, 3)
    noise = math.radians(0.06) * torch.randn(100, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    calm, _ = hp.smooth_motion(head_camera(noise).cam2world[:, :3, :3].mT, place)
    assert torch.rad2deg(view_angles(calm.mT)).diff(dim=0).abs().mean() < 0.02
    nod = torch.zeros(100, 3, dtype=torch.float64)
    nod[:, 1] = math.radians(4) * (2 * math.pi * 2 * torch.arange(100) / 25).sin()
    kept, _ = hp.smooth_motion(head_camera(nod).cam2world[:, :3, :3].mT, place)
    assert view_angles(kept.mT)[10:-10, 1].std() / nod[10:-10, 1].std() == pytest.approx(0.93, abs=0.01)


def test_the_lag_of_the_networks_is_made_good():
    template = exact("registry")
    lag = torch.zeros(468, 2, 5)
    lag[:, 1, 1] = -0.3 * template.points[:, 2]  # points follow a nod only in part, as if faces were flatter
    cameras = head_camera(swinging())
    turned = torch.einsum("paf,tf->tpa", lag, pose_features(cameras.cam2world[:, :3, :3]).float())
    points = seen_by(cameras, template, 500) + turned * 500 * 4.2647 / 2.7
    errors = []
    for known in (lag, torch.zeros_like(lag)):
        motion = hp.solve_head_pose(points, replace(template, lag=known), (500, 500))
        errors.append(offset_free_error_deg(motion.cam2world()[:, :3, :3], cameras.cam2world[:, :3, :3])[:, 1].abs().mean())
    assert errors[0] < 0.3 < errors[1]


def test_fewer_points_are_refused():
    with pytest.raises(ShapeError, match="468"):
        hp.solve_head_pose(torch.zeros(5, 68, 2), exact("task"), (100, 100))


@pytest.mark.parametrize("kind", ["registry", "task"])
def test_the_cameras_of_a_rendered_person_are_found(followed_by, kind: ModelKind, person: Path):
    motion = hp.solve_head_pose(followed_by(kind)[0], load_template(kind), (384, 384))
    with np.load(person / "truth.npz") as truth:
        cameras = torch.from_numpy(truth["cam2head"][:200, :16]).double().reshape(-1, 4, 4)
    error = offset_free_error_deg(motion.cam2world()[:, :3, :3], cameras[:, :3, :3]).abs().mean(0)
    assert error.max() < 0.8
