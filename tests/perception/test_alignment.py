"""Poses corrected by the picture, against a rendered person's true cameras."""

import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from talk3d.io.media import read_video
from talk3d.ops.geometry import rotation_from_vector, vector_from_rotation, view_angles
from talk3d.perception import alignment as al
from talk3d.perception.facetemplate import load_template
from talk3d.perception.headpose import HeadMotion, solve_head_pose

NUM_FRAMES = 80


def test_the_skin_says_how_far_the_head_nods(followed_by, person: Path):
    """A tracked motion is spoilt; the picture mends it to what it was, and brings it nearer to the truth."""
    points = followed_by("registry")[0][:NUM_FRAMES]
    kept: list[HeadMotion] = []
    with tempfile.TemporaryFile() as file:
        views = al.FaceViews(file)
        for index, frame in enumerate(islice(read_video(person / "video.mp4"), NUM_FRAMES)):
            views.put(index, frame, points[index].numpy())

        def refine(motion: HeadMotion) -> HeadMotion:
            good = al.refine_motion(motion, views, torch.arange(NUM_FRAMES), (384, 384))
            wobble = 0.02 * (2.0 * torch.arange(NUM_FRAMES, dtype=torch.float64)).sin()[:, None] * torch.tensor([1.0, 0.5, 0.0])
            spoilt = replace(motion, rotation=rotation_from_vector(wobble) @ motion.rotation)
            kept.extend([good, al.refine_motion(spoilt, views, torch.arange(NUM_FRAMES), (384, 384)), motion, spoilt])
            return good

        solve_head_pose(points, load_template("registry"), (384, 384), refine=refine)
    good, mended, plain, spoilt = kept
    apart = [float(vector_from_rotation(a.rotation.mT @ b.rotation).norm(dim=-1).mean()) for a, b in ((mended, good), (spoilt, plain))]
    assert apart[0] < 0.5 * apart[1]
    with np.load(person / "truth.npz") as truth:
        true = view_angles(torch.from_numpy(truth["cam2head"][:NUM_FRAMES, :16]).double().reshape(-1, 4, 4)[:, :3, :3])
    agreement = [np.corrcoef(view_angles(motion.rotation.mT)[:, 1].numpy(), true[:, 1].numpy())[0, 1] for motion in (good, plain)]
    assert agreement[0] > max(agreement[1], 0.98)


def test_views_show_the_square_round_the_points():
    frame = np.zeros((120, 160, 3), np.uint8)
    frame[:, 80:] = 200
    points = np.array([[60.0, 40.0], [100.0, 80.0]], np.float32)
    with tempfile.TemporaryFile() as file:
        views = al.FaceViews(file)
        views.put(3, frame, points)
        pictures, squares = views.read(torch.tensor([3]))
    assert squares[0].tolist() == [56.0, 36.0, 48.0]
    assert pictures.shape == (1, 3, al.SIDE_PX, al.SIDE_PX)
    slope = pictures[0, 1].mean(0)
    assert abs(int(slope.argmax()) - al.SIDE_PX // 2) <= 2  # the edge at column 80 is in the middle of the square
    assert pictures[0, 2].abs().max() < 1e-3


def test_the_surface_holds_what_does_not_speak():
    face = load_template("task").points.double()
    surface = al.Surface(face)
    assert len(surface.points) > 800
    assert surface.points[:, 1].min() > face[0, 1]  # nothing as low as the upper lip
    assert torch.allclose(surface.normals.norm(dim=-1), torch.ones(len(surface.normals)), atol=1e-5)
    assert (surface.normals[:, 2] > 0).all()
    eye = face[[33, 133, 159, 145], :2].mean(0).float()
    assert (surface.points[:, :2] - eye).norm(dim=-1).min() > 0.015
