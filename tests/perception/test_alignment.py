"""Poses corrected by the picture, against a rendered person's true cameras."""

import copy
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.interpolate import LinearNDInterpolator

from talk3d.io.media import read_video
from talk3d.ops.geometry import inside_outline, rotation_from_vector, vector_from_rotation, view_angles
from talk3d.perception import alignment as al
from talk3d.perception.facetemplate import load_template
from talk3d.perception.headpose import HeadMotion, solve_head_pose
from talk3d.perception.regions import FACE_OVAL

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
            good = al.refine_motion(motion, views, torch.arange(NUM_FRAMES), (384, 384))[0]
            wobble = 0.02 * (2.0 * torch.arange(NUM_FRAMES, dtype=torch.float64)).sin()[:, None] * torch.tensor([1.0, 0.5, 0.0])
            spoilt = replace(motion, rotation=rotation_from_vector(wobble) @ motion.rotation)
            kept.extend([good, al.refine_motion(spoilt, views, torch.arange(NUM_FRAMES), (384, 384))[0], motion, spoilt])
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


def test_crops_are_read_as_the_squares_that_their_maps_cut():
    frames = np.zeros((3, 100, 100, 3), np.uint8)
    frames[2, :, 60:] = 200
    crop = np.tile(np.array([[0.5, 0.0, -20.0], [0.0, 0.5, 10.0]]), (3, 1, 1))  # of source px 40 … 240, -20 … 180
    with tempfile.TemporaryFile() as file:
        pictures, squares = al.crop_views(file, frames, crop).read(torch.tensor([2, 0]))
    assert squares.tolist() == [[40.0, -20.0, 200.0]] * 2
    assert pictures.shape == (2, 3, 100, 100)
    assert abs(int(pictures[0, 1].mean(0).argmax()) - 60) <= 1
    assert pictures[1].abs().max() == 0


def _head(face: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on the front of an ellipsoid round the face, and their normals."""
    outline = face[list(FACE_OVAL)]
    middle = torch.cat([(outline[:, :2].amax(0) + outline[:, :2].amin(0)) / 2, torch.zeros(1)])
    radii = torch.cat([0.65 * (outline[:, :2].amax(0) - outline[:, :2].amin(0)), face[:, 2].amax()[None]])
    y, x = torch.meshgrid(torch.linspace(-0.9, 0.9, 60), torch.linspace(-0.9, 0.9, 60), indexing="ij")
    flat = torch.stack([x, y], -1).reshape(-1, 2)
    flat = flat[flat.norm(dim=-1) < 0.9].double()
    unit = torch.cat([flat, (1 - flat.square().sum(-1, keepdim=True)).sqrt()], -1)
    return (middle + radii * unit).float(), torch.nn.functional.normalize(unit / radii, dim=-1).float()


def test_hair_and_ears_belong_to_the_head_and_nothing_draws_them_up():
    face = load_template("task").points.double()
    points, normals = _head(face)
    surface = al.Surface.head(points, normals, face)
    inside = inside_outline(surface.points[:, :2].numpy(), face[list(FACE_OVAL), :2].numpy())
    assert 0.1 < inside.mean() < 0.9
    assert surface.lifts[torch.from_numpy(~inside)].abs().max() == 0 < surface.lifts[torch.from_numpy(inside)].abs().max()
    assert surface.points[torch.from_numpy(~inside), 1].min() > face[al.NOSE_TIP, 1]
    assert len(surface.points) < len(points)


def test_hair_and_ears_hold_the_head_while_the_face_moves():
    """A painted head whose forehead and cheeks slide more than skin is taken to: its pose is found nearer to the truth than by the face alone."""
    face = load_template("task").points.double()
    whole = al.Surface.head(*_head(face), face)
    inside = torch.from_numpy(inside_outline(whole.points[:, :2].numpy(), face[list(FACE_OVAL), :2].numpy()))
    alone = copy.copy(whole)
    alone.points, alone.normals, alone.lifts = alone.points[inside], alone.normals[inside], alone.lifts[inside]
    true, turns = _turning(face)
    start = replace(true, rotation=rotation_from_vector(0.01 * turns.roll(1, 0) / 0.08) @ true.rotation)
    slides = torch.zeros(12, 4)
    slides[::2, 1] = 0.012  # one side more than the other, which is taken for a turn
    frames = np.stack([_painted(whole, true, index, slides[index])[0] for index in range(12)])
    worst = {}
    with tempfile.TemporaryFile() as file:
        views = al.crop_views(file, frames, np.tile(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), (12, 1, 1)))
        for name, surface in (("whole", whole), ("alone", alone)):
            found = al.refine_motion(start, views, torch.arange(12), (256, 256), surface)[0]
            worst[name] = _trembling(found, true)
    assert worst["whole"] < 0.004
    assert worst["alone"] > 2 * worst["whole"]


def test_the_surface_holds_what_does_not_speak():
    face = load_template("task").points.double()
    surface = al.Surface.rigid(face)
    assert len(surface.points) > 800
    assert surface.points[:, 1].min() > face[0, 1]  # nothing as low as the upper lip
    assert torch.allclose(surface.normals.norm(dim=-1), torch.ones(len(surface.normals)), atol=1e-5)
    assert (surface.normals[:, 2] > 0).all()
    eye = face[[33, 133, 159, 145], :2].mean(0).float()
    assert (surface.points[:, :2] - eye).norm(dim=-1).min() > 0.015


@pytest.mark.parametrize(("drawn", "trust"), [((0.012, 0.0, 0.004, 0.0), "BROW_TRUST"), ((0.0, 0.0, 0.0, 0.012), "CHEEK_TRUST")])
def test_drawn_up_skin_does_not_move_the_head(drawn: tuple[float, ...], trust: str):
    """A painted face whose forehead or cheeks slide up: its pose stays to a tenth of a pixel, where rigid skin would drag it along."""
    face = load_template("task").points.double()
    surface = al.Surface.rigid(face)
    true, turns = _turning(face)
    lifted = torch.zeros(12, 4)
    lifted[::3] = torch.tensor(drawn)
    start = replace(true, rotation=rotation_from_vector(0.01 * turns.roll(1, 0) / 0.08) @ true.rotation)
    worst = {}
    for name, freedom in (("free", getattr(al, trust)), ("rigid", 1e-6)):
        with tempfile.TemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
            patch.setattr(al, trust, freedom)
            views = al.FaceViews(file)
            for index in range(12):
                views.put(index, *_painted(surface, true, index, lifted[index]))
            found, cheeks = al.refine_motion(start, views, torch.arange(12), (256, 256))
        if name == "free" and trust == "CHEEK_TRUST":
            assert np.corrcoef(cheeks[:, 0], lifted[:, 3])[0, 1] > 0.95 and float(cheeks.median()) == 0
        points = face[[4, 33, 263, 116, 345, 168]]
        error = found.project(points, (128, 128)) - true.project(points, (128, 128))
        worst[name] = float((error - error.mean(0)).norm(dim=-1).square().mean().sqrt())
    assert worst["free"] < 0.1
    assert worst["rigid"] > 2 * worst["free"]


def test_light_that_stays_while_the_head_turns_does_not_hold_it_back():
    """A painted face of which another side is bright as it turns: its pose is found nearer to the truth by looks that follow the turn."""
    face = load_template("task").points.double()
    surface = al.Surface.rigid(face)
    true, turns = _turning(face)
    worst = {}
    for name, doubt in (("follows", al.SHADE_DOUBT / 16), ("one look", 1e9)):  # few frames, so they count for more
        with tempfile.TemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
            patch.setattr(al, "SHADE_DOUBT", doubt)
            views = al.FaceViews(file)
            for index in range(12):
                views.put(index, *_painted(surface, true, index, torch.zeros(4), float(turns[index, 1] / 0.08)))
            found = al.refine_motion(true, views, torch.arange(12), (256, 256))[0]
        worst[name] = _trembling(found, true)
    assert worst["follows"] < 0.8 * worst["one look"]


def _trembling(found: HeadMotion, true: HeadMotion) -> float:
    """Root mean square of the rotations from the true poses to the found ones, less their mean, radians."""
    apart = vector_from_rotation(found.rotation @ true.rotation.mT)
    return float((apart - apart.mean(0)).norm(dim=-1).square().mean().sqrt())


def _turning(face: torch.Tensor) -> tuple[HeadMotion, torch.Tensor]:
    """Twelve frames of a head that turns a little, and its turns."""
    turns = 0.08 * torch.tensor([[np.sin(k), np.cos(1.7 * k), 0.3 * np.sin(2.3 * k)] for k in range(12)], dtype=torch.float64)
    turn_over = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))  # the camera looks along z, y down
    motion = HeadMotion(
        rotation=rotation_from_vector(turns) @ turn_over,
        translation=torch.tensor([0.0, 0.0, 2.7], dtype=torch.float64).expand(12, 3),
        focal_px=1000.0,
        shape=face[:4],
        face=face,
        residual_px=torch.zeros(12),
        smoothing={},
    )
    return motion, turns


def test_each_brow_is_followed_however_the_face_points_err():
    """Painted brows that slide: found to a tenth of a pixel, from points that say nothing of them or something else."""
    face = load_template("task").points.double()
    surface, (motion, _) = al.Surface.brows(face), _turning(face)
    distance = float((face[33] - face[263]).norm())
    lifts = 0.006 * torch.tensor([[max(0.0, np.sin(2.0 * k)), np.cos(1.3 * k)] for k in range(12)]).float()
    expected = (lifts - lifts.median(0).values) / distance
    noise = 0.01 * torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryFile() as file:
        views = al.FaceViews(file)
        for index in range(12):
            views.put(index, *_painted(surface, motion, index, lifts[index]))
        for start in (torch.zeros(12, 2), noise):
            found = al.refine_brows(start, motion, views, torch.arange(12), (256, 256))
            px = (found - expected).abs() * distance * 1000 / 2.7
            assert found.shape == (12, 2) and px.mean() < 0.1 and px.max() < 0.4
    assert (expected.abs() * distance * 1000 / 2.7).mean() > 1


def test_brows_are_where_they_should_be():
    face = load_template("task").points.double()
    surface = al.Surface.brows(face)
    right, left = (surface.points[surface.lifts[:, 1, side] > 0] for side in (0, 1))
    assert len(right) > 30 and len(left) > 30 and len(right) + len(left) == len(surface.points)
    assert right[:, 0].max() < 0 < left[:, 0].min()
    assert surface.points[:, 1].min() > face[[159, 386], 1].max() and surface.points[:, 1].max() < face[10, 1]


def _painted(surface: al.Surface, motion: HeadMotion, index: int, drawn: torch.Tensor, light: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A picture of the surface with waves painted on its skin, and others as strong as the light, and where its corners are seen."""
    skin = surface.points.double()
    moved = skin + (surface.lifts @ drawn).double()
    seen = motion.focal_px * (local := moved @ motion.rotation[index].T + motion.translation[index])[:, :2] / local[:, 2:] + 128
    x, y = (200 * skin[:, :2]).T.numpy()
    paint = 128 + 30 * np.sin(x + 0.5 * y) + 30 * np.sin(1.3 * y) + 30 * np.sin(0.4 * x - 0.8 * y)
    paint = paint + light * 30 * np.sin(0.7 * x + 1.0)
    down, right = np.mgrid[:256, :256] + 0.5
    picture = np.nan_to_num(LinearNDInterpolator(seen.numpy(), paint)(right, down), nan=128).round().astype(np.uint8)
    corners = motion.project(motion.face[:468], (128, 128))[index].numpy()
    return np.repeat(picture[..., None], 3, -1), corners.astype(np.float32)
