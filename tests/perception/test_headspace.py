"""Head space is found again after it was moved, from points of people that were made from the template."""

import math
from dataclasses import replace

import pytest
import torch

from talk3d.ops.geometry import fit_similarity, head_camera, rotation_from_vector, vector_from_rotation, view_angles
from talk3d.perception.facetemplate import FaceTemplate, load_template, place_shape
from talk3d.perception.headpose import RIGID_POINTS, HeadMotion
from talk3d.perception.headspace import nod_head_space, settle_head_space
from talk3d.perception.nod import nodded
from talk3d.types import Camera

SIZE = (512, 512)


def moving(count: int = 120) -> tuple[FaceTemplate, HeadMotion, torch.Tensor]:
    """A template without lag, the true motion of a person who differs from its mean, and the points as they are seen."""
    template = load_template("task")
    template = replace(template, lag=torch.zeros_like(template.lag))
    way = torch.zeros(template.people.shape[-1])
    way[:4] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    face = (template.points + template.people @ way).double()
    time = torch.linspace(0, 6, count)
    cameras = head_camera(torch.stack([0.2 * time.sin(), 0.1 * (1.7 * time).cos(), 0.05 * (0.6 * time).sin()], -1))
    rotation = cameras.cam2world[:, :3, :3].mT.double()
    motion = HeadMotion(
        rotation=rotation,
        translation=-(rotation @ cameras.cam2world[:, :3, 3:].double())[..., 0],
        focal_px=float(cameras.intrinsics[0, 0, 0]) * SIZE[0],
        shape=face[list(RIGID_POINTS)],
        face=face,
        residual_px=torch.zeros(count),
        smoothing={},
    )
    return template, motion, motion.project(face, (SIZE[0] / 2, SIZE[1] / 2))


def test_a_constant_nod_is_found_and_taken_back():
    template, truth, landmarks = moving()
    nod = rotation_from_vector(torch.tensor([math.radians(5), 0, 0], dtype=torch.float64))
    nodded = replace(truth, rotation=truth.rotation @ nod.mT, shape=template.points[list(RIGID_POINTS)].double())
    settled = settle_head_space(nodded, landmarks, template, SIZE)
    left = (view_angles(settled.rotation.mT) - view_angles(truth.rotation.mT)).rad2deg()
    assert left.mean(0).abs().max() < 0.7
    between = settled.rotation[0].mT @ settled.rotation[60], nodded.rotation[0].mT @ nodded.rotation[60]
    turned = [vector_from_rotation(value).norm() for value in between]
    torch.testing.assert_close(turned[0], turned[1])  # one constant for the clip: what the skin told is kept
    seen = settled.project(settled.points((168, 33, 263)), (256, 256))
    assert (seen - landmarks[:, [168, 33, 263]]).norm(dim=-1).mean() < 0.5


def test_a_head_that_never_turns_is_placed_like_the_mean():
    template, truth, _ = moving()
    still = replace(
        truth,
        rotation=truth.rotation[:1].expand(30, 3, 3).clone(),
        translation=truth.translation[:1].expand(30, 3).clone(),
        residual_px=torch.zeros(30),
    )
    seen = still.project(template.points.double(), (256, 256))
    settled = settle_head_space(replace(still, shape=template.points[list(RIGID_POINTS)].double()), seen, template, SIZE)
    torch.testing.assert_close(settled.rotation, still.rotation, atol=0.01, rtol=0)


def test_points_of_which_less_is_known_say_less():
    template, truth, _ = moving()
    rigid = list(RIGID_POINTS)
    mean, people = template.points[rigid].double(), template.people[rigid].double()
    wrong = truth.shape.clone()
    wrong[:, 2] *= 1.3  # depths that are not known
    doubt = torch.diag(torch.tensor([1e6, 1e6, 1.0], dtype=torch.float64)).expand(len(rigid), 3, 3)
    errors = []
    for information in (None, doubt):
        placed, _ = place_shape(wrong, mean, people, information)
        _, turn, _ = fit_similarity(wrong, placed)
        errors.append(vector_from_rotation(turn).norm())
    assert errors[1] < errors[0]


def test_nodding_head_space_lifts_the_cameras_and_changes_nothing_that_they_see():
    _, motion, landmarks = moving()
    lifted = nod_head_space(motion, math.radians(3))
    assert (lifted.project(lifted.face, (256, 256)) - landmarks).abs().max() < 1e-6
    cameras = nodded(Camera(cam2world=motion.cam2world(), intrinsics=torch.eye(3).double().expand(120, 3, 3)), math.radians(3))
    torch.testing.assert_close(lifted.cam2world(), cameras.cam2world, rtol=0, atol=1e-7)
    rise = view_angles(lifted.rotation.mT)[:, 1] - view_angles(motion.rotation.mT)[:, 1]
    assert rise.rad2deg().mean() == pytest.approx(3, abs=0.1)
