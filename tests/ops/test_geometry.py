"""Rotations, cameras and rigid fits against closed forms."""

import math

import numpy as np
import pytest
import torch

from talk3d.ops import geometry as g
from talk3d.types import Camera


def random_rotations(count: int, seed: int = 0, reach: float = 2.5) -> torch.Tensor:
    vector = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return g.rotation_from_vector(vector / vector.norm(dim=-1, keepdim=True) * torch.linspace(0, reach, count, dtype=torch.float64)[:, None])


def test_rotation_about_y_by_a_right_angle_takes_z_to_x():
    rotation = g.rotation_from_vector(torch.tensor([0.0, math.pi / 2, 0.0]))
    assert torch.allclose(rotation @ torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0]), atol=1e-6)


def test_rotation_equals_the_matrix_exponential_and_its_vector_comes_back():
    vector = torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    vector[0] = 0
    vector[1] *= 1e-6
    rotation = g.rotation_from_vector(vector)
    assert torch.allclose(rotation, torch.linalg.matrix_exp(g.cross_matrix(vector)), atol=1e-9)
    assert torch.allclose(g.vector_from_rotation(random_rotations(20)).norm(dim=-1), torch.linspace(0, 2.5, 20, dtype=torch.float64), atol=1e-8)


def test_rotation_has_finite_gradients_at_zero():
    vector = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(g.rotation_from_vector, (vector,))


def test_front_camera_looks_along_minus_z_at_the_pivot():
    camera = g.look_at(torch.zeros(3))
    expected = torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 2.9], [0, 0, 0, 1]])
    assert torch.allclose(camera, expected, atol=1e-6)


@pytest.mark.parametrize("angles", [(0.3, 0.0, 0.0), (-0.4, 0.25, 0.1), (0.2, -0.3, -0.35)])
def test_look_at_keeps_the_pivot_in_the_middle_and_its_angles_come_back(angles):
    camera = g.head_camera(torch.tensor(angles))
    pixel = g.project(torch.tensor([g.HEAD_PIVOT]), camera)
    assert torch.allclose(pixel, torch.full((1, 2), 0.5), atol=1e-5)
    assert torch.allclose(g.view_angles(camera.cam2world[:3, :3]), torch.tensor(angles), atol=1e-6)
    offset = camera.cam2world[:3, 3] - torch.tensor(g.HEAD_PIVOT)
    assert offset.norm().item() == pytest.approx(2.7, abs=1e-5)
    assert math.copysign(1, offset[0].item()) == math.copysign(1, angles[0])
    assert torch.linalg.det(camera.cam2world[:3, :3]).item() == pytest.approx(1, abs=1e-5)


def test_look_at_agrees_with_a_published_label():
    """First label of a rendered data set: yaw and pitch read off its centre, roll from its rotation."""
    label = torch.tensor([0.97770, -0.006889, 0.20991, -0.56675, 0.0, -0.99946, -0.03280, 0.08856, 0.21002, 0.03207, -0.97717, 2.83836])
    pose = label.reshape(3, 4)
    angles = g.view_angles(pose[:, :3])
    assert torch.allclose(g.look_at(angles)[:3], pose, atol=2e-4)


def test_orbit_starts_in_front_stays_inside_its_limits_and_closes():
    camera = g.orbit(121, yaw_deg=25, pitch_deg=8, period_frames=120)
    angles = g.view_angles(camera.cam2world[:, :3, :3])
    assert torch.allclose(angles[0], torch.zeros(3), atol=1e-6)
    assert torch.allclose(camera.cam2world[0], camera.cam2world[120], atol=1e-5)
    assert math.degrees(angles[:, 0].abs().max()) == pytest.approx(25, abs=0.01)
    assert math.degrees(angles[:, 1].abs().max()) <= 8.01


def test_framed_heads_stay_in_the_middle_and_enlarged_faces_do():
    camera = g.head_camera(torch.tensor([[0.5, -0.2, 0.1], [0.0, 0.0, 0.0]]))
    framed = g.framed(camera)
    assert torch.equal(framed.cam2world, camera.cam2world)
    torch.testing.assert_close(framed.intrinsics[1], camera.intrinsics[1])  # in front nothing changes
    torch.testing.assert_close(g.project(torch.zeros(2, 1, 3), framed), torch.full((2, 1, 2), 0.5))
    enlarged = Camera(cam2world=camera.cam2world, intrinsics=g.intrinsics_matrix(4 * g.CAMERA_FOCAL).expand(2, 3, 3))
    torch.testing.assert_close(g.project(torch.tensor([0.0, -0.0675, 0.15]).expand(2, 1, 3), g.framed(enlarged)), torch.full((2, 1, 2), 0.5))


def test_projection_of_a_point_by_hand():
    camera = g.head_camera(torch.zeros(1, 3))
    pixel = g.project(torch.tensor([[[0.27, -0.27, 0.2]]]), camera)
    assert torch.allclose(pixel, torch.tensor([[[0.5 + 0.42647, 0.5 + 0.42647]]]), atol=1e-5)


@pytest.mark.parametrize("with_scale", [True, False])
def test_similarity_fit_finds_the_motion_that_was_applied(with_scale):
    points = torch.randn(4, 12, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rotation, shift = random_rotations(4, seed=3), torch.arange(12, dtype=torch.float64).reshape(4, 3)
    scale = 1.7 if with_scale else 1.0
    moved = scale * points @ rotation.mT + shift[:, None]
    s, r, t = g.fit_similarity(points, moved, with_scale=with_scale)
    assert torch.allclose(s, torch.full((4,), scale, dtype=torch.float64))
    assert torch.allclose(r, rotation, atol=1e-9)
    assert torch.allclose(t, shift, atol=1e-9)


def test_similarity_fit_never_mirrors_and_ignores_points_without_weight():
    points = torch.randn(10, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mirrored = points * torch.tensor([-1.0, 1, 1], dtype=torch.float64)
    assert torch.linalg.det(g.fit_similarity(points, mirrored)[1]).item() == pytest.approx(1)
    target = points + 1.0
    target[0] += 100
    weights = torch.ones(10, dtype=torch.float64)
    weights[0] = 0
    assert torch.allclose(g.fit_similarity(points, target, weights)[2], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(("name", "sampler"), [("ffhq", {}), ("talk3d", {"pivot": (0.0, 0.05, 0.2), "focal": 3.6})])
def test_published_cameras_have_the_known_labels(name, sampler, shared):
    known = np.load(shared / "fixtures" / "cameras.npz")
    camera = g.published_camera(torch.from_numpy(known["yaw_pitch"]).float(), **sampler)
    torch.testing.assert_close(camera.to_label(), torch.from_numpy(known[f"labels_{name}"]).float(), atol=1e-5, rtol=0)


def test_published_cameras_stand_at_the_true_elevation_round_the_origin():
    pitch = torch.tensor([-1.2, -0.3, 0.0, 0.15, 0.9])
    camera = g.published_camera(torch.stack([torch.full_like(pitch, 0.4), pitch], -1), radius=2.0)
    centre = camera.cam2world[:, :3, 3]
    torch.testing.assert_close(centre.norm(dim=-1), torch.full((5,), 2.0))
    torch.testing.assert_close(torch.asin(centre[:, 1] / 2.0), g.elevation(pitch))
    torch.testing.assert_close(torch.atan2(centre[:, 0], centre[:, 2]), torch.full((5,), 0.4))
    torch.testing.assert_close(g.warped_pitch(g.elevation(pitch)), pitch)
    pixels = g.project(torch.tensor(g.HEAD_PIVOT).expand(5, 1, 3), camera)
    torch.testing.assert_close(pixels, torch.full((5, 1, 2), 0.5), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(camera.cam2world), torch.ones(5))


def test_published_cameras_stay_finite_at_the_poles():
    camera = g.published_camera(torch.tensor([[0.0, 2.0], [1.0, -2.0]]))
    assert camera.cam2world.isfinite().all()
    assert camera.cam2world[:, 1, 3].sign().tolist() == [-1, 1]


def test_published_focal_lengths():
    assert g.published_focal(18.837) == pytest.approx(4.2647, abs=2e-3)


def test_moved_cameras_see_moved_points_where_these_see_them():
    points = torch.randn(1, 7, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.2
    turn, shift = random_rotations(3)[1], torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64)
    camera = g.head_camera(torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64))
    moved = g.move_camera(camera, 1.3, turn, shift)
    assert torch.allclose(g.project(1.3 * points @ turn.mT + shift, moved), g.project(points, camera), atol=1e-9)


def test_the_mean_of_rotations_about_one_axis_is_at_their_middle():
    vectors = torch.tensor([[0.0, -0.2, 0.0], [0.0, 0.1, 0.0], [0.0, 0.4, 0.0]], dtype=torch.float64)
    turned = g.rotation_from_vector(vectors) @ random_rotations(2)[1]
    mean = g.mean_rotation(turned)
    assert torch.allclose(mean.mT @ mean, torch.eye(3, dtype=torch.float64)) and torch.linalg.det(mean) > 0
    middle = math.atan2(sum(math.sin(a) for a in (-0.2, 0.1, 0.4)), sum(math.cos(a) for a in (-0.2, 0.1, 0.4)))
    assert torch.allclose(mean, g.rotation_from_vector(torch.tensor([0.0, middle, 0.0], dtype=torch.float64)) @ random_rotations(2)[1])


def test_widened_turns_are_farther_from_the_middle_and_keep_rolls_and_the_face_in_place():
    angles = torch.tensor([[0.2, 0.1, 0.0], [-0.3, 0.0, 0.0], [0.0, 0.0, 0.15]], dtype=torch.float64)
    camera = g.head_camera(angles)
    middle = g.head_camera(torch.zeros(1, 3, dtype=torch.float64)).cam2world[0, :3, :3].mT
    wider = g.Camera(cam2world=g.widen_turns(camera.cam2world, 1.2, middle), intrinsics=camera.intrinsics)
    turn, before = (g.vector_from_rotation(c.cam2world[:, :3, :3].mT @ middle.mT) for c in (wider, camera))
    assert torch.allclose(turn, before * torch.tensor([1.2, 1.2, 1.0], dtype=torch.float64), atol=1e-9)
    face = torch.tensor(g.FACE_MIDDLE, dtype=torch.float64).expand(3, 1, 3)
    assert torch.allclose(g.project(face, wider), g.project(face, camera), atol=1e-9)
    assert torch.allclose(g.widen_turns(camera.cam2world, 1.0, middle), camera.cam2world, atol=1e-9)


def test_shoulders_keep_still_before_the_camera_and_faces_stay_as_they_are():
    neck, rest, pose = g.Neck.of((1.0,) + 6 * (0.0,), -0.2, torch.device("cpu")), torch.tensor([0.05, -0.1, 0.02]), torch.tensor([[0.5, 0.2, -0.1]])
    spine, shoulders = torch.tensor(g.SPINE_TOP), torch.tensor([[0.3, -0.45, -0.1], [-0.2, -0.6, 0.1]])
    cameras = [g.look_at(angles, pivot=g.SPINE_TOP) for angles in (rest, pose[0])]  # of a head that turns on its spine
    seen = (shoulders - cameras[0][:3, 3]) @ cameras[0][:3, :3]
    turned = seen @ cameras[1][:3, :3].mT + cameras[1][:3, 3]  # where they are in the head then
    turned[:, 1] = turned[:, 1].clamp(max=-0.2 - g.NECK_LENGTH)
    again = (turned - cameras[1][:3, 3]) @ cameras[1][:3, :3] @ cameras[0][:3, :3].mT + cameras[0][:3, 3]
    found = neck.straighten(turned[None], neck.swing(pose, rest))[0]
    torch.testing.assert_close(found, again, atol=1e-5, rtol=0)
    assert (found - turned).norm(dim=1).min() > 0.05
    face = torch.tensor([[[0.1, 0.1, 0.1], [0.0, -0.199, 0.13]]])
    assert neck.straighten(face, neck.swing(pose, rest)).equal(face)
    between = torch.tensor([[[0.1, -0.2 - g.NECK_LENGTH / 2, 0.0]]])
    assert neck.share(between).item() == pytest.approx(0.5)
    torch.testing.assert_close(neck.straighten(between, neck.swing(rest[None], rest)), between)
    assert neck.straighten(spine[None, None], neck.swing(pose, rest)).equal(spine[None, None])


def test_a_neck_that_was_asked_for_without_gradients_can_be_learnt_through():
    with torch.inference_mode():
        neck = g.Neck.of((1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.123), -0.2, torch.device("cpu"))
    points = torch.rand(1, 5, 3).requires_grad_()
    neck.straighten(points, torch.rand(1, 3, 3)).sum().backward()
    assert points.grad is not None


def test_a_neck_that_lies_elsewhere_bends_as_in_head_space():
    placed = (1.2, 0.3, -0.2, 0.1, 0.05, 0.02, -0.04)
    frame, shift = g.rotation_from_vector(torch.tensor(placed[1:4])), torch.tensor(placed[4:])
    necks = [g.Neck.of(place, -0.25, torch.device("cpu")) for place in ((1.0,) + 6 * (0.0,), placed)]
    rest, pose, points = torch.tensor([0.1, 0.0, 0.0]), torch.tensor([[0.4, -0.2, 0.1]]), torch.rand(1, 50, 3) - 0.7
    there = placed[0] * points @ frame.mT + shift
    expected = placed[0] * necks[0].straighten(points, necks[0].swing(pose, rest)) @ frame.mT + shift
    torch.testing.assert_close(necks[1].straighten(there, necks[1].swing(pose, rest)), expected, atol=1e-5, rtol=0)
    assert (expected - there).norm(dim=-1).max() > 0.05


def test_points_inside_an_outline_are_told_from_those_in_its_notch():
    notched = np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 4.0], [2.0, 1.0], [0.0, 4.0]])
    points = np.array([[0.5, 0.5], [2.0, 0.5], [2.0, 3.0], [3.5, 3.0], [5.0, 1.0], [-1.0, 0.0]])
    assert g.inside_outline(points, notched).tolist() == [True, True, False, True, False, False]
