"""Head pose of synthetic motions known exactly, and of a rendered person."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.signal import savgol_filter

from talk3d.errors import ShapeError, WeightsError
from talk3d.ops.geometry import fit_similarity, head_camera, project, view_angles
from talk3d.perception import headpose as hp
from talk3d.types import Camera


def swinging(count: int = 200) -> torch.Tensor:
    """Yaw, pitch, roll in radians of a lively head."""
    time = torch.arange(count, dtype=torch.float64) / 25
    return torch.stack([0.25 * (1.3 * time).sin(), 0.12 * (1.9 * time + 1).sin(), 0.06 * (0.8 * time).cos()], -1)


def seen_by(cameras: Camera, template: hp.FaceTemplate, side_px: float, noise_px: float = 0.0) -> torch.Tensor:
    points = template.points.double().expand(len(cameras), -1, -1)
    noise = noise_px * torch.randn(len(cameras), 468, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (project(points, cameras) * side_px + noise).float()


def offset_free_error_deg(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Yaw, pitch, roll errors of rotations after the one constant turn between their head spaces is taken out."""
    _, turn, _ = fit_similarity(found.transpose(-1, -2).reshape(-1, 3), truth.transpose(-1, -2).reshape(-1, 3), with_scale=False)
    return torch.rad2deg(view_angles(turn @ found) - view_angles(truth))


def test_exact_points_give_back_the_exact_cameras():
    template = hp.load_template("registry")
    cameras = head_camera(swinging())
    motion = hp.solve_head_pose(seen_by(cameras, template, 500), template, (500, 500))
    assert motion.focal_px == pytest.approx(4.2647 * 500, rel=2e-3)
    error = torch.rad2deg(view_angles(motion.cam2world()[:, :3, :3]) - swinging())
    assert error.abs().max() < 0.1
    assert (motion.cam2world()[:, :3, 3] - cameras.cam2world[:, :3, 3]).norm(dim=-1).max() < 0.02
    assert motion.residual_px.max() < 0.2


def test_noise_a_stranger_and_a_speaking_mouth_do_not_turn_the_head():
    template = hp.load_template("registry")
    generator = torch.Generator().manual_seed(1)
    stranger = hp.FaceTemplate(
        points=template.points * torch.tensor([1.05, 0.97, 1.0]) + 0.004 * torch.randn(468, 3, generator=generator),
        modes=template.modes,
        mirror=template.mirror,
    )
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
    template = hp.load_template("registry")
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
    template = hp.load_template("registry")
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
    assert np.abs(view_angles(blurred.mT)[:, 0].numpy() - expected).max() < 1e-6


def views(count: int) -> Camera:
    generator = torch.Generator().manual_seed(2)
    return head_camera(torch.rand(count, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.2, 0.6, 0.0]) - torch.tensor([0.6, 0.3, 0.0]))


def test_a_template_is_found_again_from_many_views_though_some_are_wrong():
    template = hp.load_template("registry")
    cameras = views(150)
    points = seen_by(cameras, template, 1.0)
    points[::10] += 0.1
    assert (hp.fit_template(points, cameras) - template.points).norm(dim=-1).max() < 5e-3


def test_error_modes_are_found_whoever_the_people_are_and_undone():
    template = hp.load_template("registry")
    cameras = views(200)
    generator = torch.Generator().manual_seed(5)
    mode = 0.01 * torch.randn(468, 2, generator=generator)
    person = torch.arange(200) // 8
    strayed = torch.randn(200, generator=generator)
    own = 0.003 * torch.randn(25, 468, 2, generator=generator)
    points = seen_by(cameras, template, 1.0) + (strayed[:, None, None] * mode + own[person]) * 4.2647 / 2.7
    found = hp.fit_error_modes(points, cameras, person, template.points, num_modes=3)
    assert torch.nn.functional.cosine_similarity(found[..., 0].flatten(), mode.flatten(), dim=0).abs() > 0.99
    spread = torch.stack([group.var() for group in strayed.split(8)]).mean().sqrt()
    assert found[..., 0].norm() == pytest.approx(float(mode.norm() * spread), rel=0.05)
    assert found[..., 1].norm() < 0.1 * mode.norm()

    lively = head_camera(swinging())
    nod = torch.zeros(468, 2)
    nod[:, 1] = 0.01 * template.points[:, 2] / 0.1  # looks like a nod, so only knowing the mode can undo it in part
    puff = 0.01 * torch.randn(468, 2, generator=generator)
    swayed = seen_by(lively, template, 500) + (0.3 * torch.arange(200)).sin()[:, None, None] * (nod + puff) * 500 * 4.2647 / 2.7
    errors = []
    for modes in (torch.zeros(468, 2, 1), (nod + puff)[..., None]):
        knowing = hp.FaceTemplate(points=template.points, modes=modes, mirror=template.mirror)
        motion = hp.solve_head_pose(swayed, knowing, (500, 500))
        errors.append(offset_free_error_deg(motion.cam2world()[:, :3, :3], lively.cam2world[:, :3, :3]).abs().mean())
    assert errors[1] < 0.3 * errors[0]


def test_templates_are_saved_loaded_and_refused(tmp_path: Path):
    templates = {"task": hp.load_template("task"), "registry": hp.load_template("registry")}
    hp.save_templates(templates, tmp_path / "face.safetensors")
    again = hp.load_template("task", tmp_path / "face.safetensors")
    assert torch.equal(again.points, templates["task"].points)
    assert torch.equal(again.modes, templates["task"].modes)
    assert torch.equal(again.mirror[again.mirror], torch.arange(478))
    with pytest.raises(WeightsError, match="cannot be read"):
        hp.load_template("task", tmp_path / "missing.safetensors")
    with pytest.raises(ShapeError, match="468"):
        hp.solve_head_pose(torch.zeros(5, 68, 2), again, (100, 100))


@pytest.mark.parametrize("kind", ["registry", "task"])
def test_the_cameras_of_a_rendered_person_are_found(followed_by, kind: hp.ModelKind, person: Path):
    motion = hp.solve_head_pose(followed_by(kind)[0], hp.load_template(kind), (384, 384))
    with np.load(person / "truth.npz") as truth:
        cameras = torch.from_numpy(truth["cam2head"][:200, :16]).double().reshape(-1, 4, 4)
    error = offset_free_error_deg(motion.cam2world()[:, :3, :3], cameras[:, :3, :3]).abs().mean(0)
    assert error.max() < 0.6
