"""Head space is found again after it was moved, in people whose points were made from the template and in priors."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from talk3d.errors import WeightsError
from talk3d.io.weights import load_prior
from talk3d.models.avatar import Prior
from talk3d.models.generator import TriplaneGenerator
from talk3d.ops.geometry import (
    FACE_MIDDLE,
    fit_similarity,
    head_camera,
    mean_rotation,
    project,
    rotation_from_vector,
    vector_from_rotation,
    view_angles,
)
from talk3d.perception import headspace
from talk3d.perception.facetemplate import FaceTemplate, load_template, place_shape
from talk3d.perception.headpose import RIGID_POINTS, HeadMotion
from talk3d.perception.headspace import MOST_RESIDUAL, nod_head_space, place_prior, settle_head_space, widen_head_turns
from talk3d.perception.landmarks import FaceModel
from talk3d.perception.nod import nodded
from talk3d.presets import TINY
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


def test_widened_turns_are_so_many_times_as_far_and_the_face_stays_where_it_is_seen():
    _, motion, _ = moving()
    wider = widen_head_turns(motion, 1.1, mean_rotation(motion.rotation))
    yaw, before = (view_angles(m.rotation.mT)[:, 0] for m in (wider, motion))
    assert float(yaw.std() / before.std()) == pytest.approx(1.1, abs=0.01)
    face = torch.tensor([FACE_MIDDLE], dtype=torch.float64)
    assert (wider.project(face, (256, 256)) - motion.project(face, (256, 256))).abs().max() < 1e-3


class Sculptor:
    """Stands for a face model: knows where the points of heads are in pictures that carry nothing but their number."""

    source, kind = "sculptor", "task"

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def detect(self, frame: np.ndarray) -> list[Any]:
        raise NotImplementedError

    def observe(self, frame: np.ndarray, box: Any) -> Any:
        return SimpleNamespace(landmarks=self.seen[int(frame[0, 0, 0])])


@pytest.fixture
def sculptor(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[float, torch.Tensor]]:
    """A face model, and where the face of each prior stands in its planes' space, by the prior's number; the builtin prior's is 1."""
    model, heads = Sculptor(), dict[float, torch.Tensor]()

    def render(generator: TriplaneGenerator, w: torch.Tensor, camera: Camera) -> SimpleNamespace:
        moved = generator.renderer_config.in_planes(camera)
        points = heads[float(generator.mapping_network.w_avg[0])]
        model.seen.append(64 * project(points[None], Camera(cam2world=moved.cam2world.double(), intrinsics=moved.intrinsics.double()))[0].numpy())
        return SimpleNamespace(image=torch.full((1, 3, 64, 64), (len(model.seen) - 0.5) / 127.5 - 1))

    monkeypatch.setattr(TriplaneGenerator, "render", render)
    monkeypatch.setattr(headspace, "observe_picture", lambda model, frame: model.observe(frame, None))
    monkeypatch.setattr(headspace, "load_prior", lambda: prior_like(1.0))
    return model, heads


def prior_like(number: float) -> Prior:
    generator = TriplaneGenerator(TINY)
    generator.mapping_network.w_avg.fill_(number)
    return Prior(generator=generator, w_std=1.0, provenance={"dataset": "none"})


def test_a_prior_that_lies_elsewhere_is_placed_by_its_average_head(sculptor: tuple[Any, dict[float, torch.Tensor]]):
    model, heads = sculptor
    face = load_template("task").points.double()
    place = torch.tensor([1.2, 0.1, -0.2, 0.05, 0.02, -0.03, 0.01], dtype=torch.float64)
    turn = rotation_from_vector(place[1:4])
    heads.update({1.0: face, 2.0: place[0] * face @ turn.mT + place[4:]})
    prior = prior_like(2.0)
    placed = place_prior(prior, model)
    torch.testing.assert_close(torch.tensor(placed.generator.config.renderer.head_space).double(), place, atol=1e-4, rtol=0)
    assert placed.generator.renderer_config == placed.generator.config.renderer
    assert placed.provenance == {"dataset": "none", "head_space": {"residual": 0.0, "face_model": "sculptor"}}
    assert prior.generator.renderer_config.head_space[0] == 1 and "head_space" not in prior.provenance  # the one given stays as it was


def test_a_prior_of_something_else_is_refused(sculptor: tuple[Any, dict[float, torch.Tensor]]):
    model, heads = sculptor
    heads.update({1.0: load_template("task").points.double(), 2.0: load_template("task").points.double() * torch.tensor([1.0, 1.0, 0.5])})
    with pytest.raises(WeightsError, match=rf"lie \d\.\d% of a head from where heads have them, at most {MOST_RESIDUAL:.1%} is expected"):
        place_prior(prior_like(2.0), model)


def test_a_prior_whose_average_is_no_face_is_refused(registry_model: FaceModel):
    with pytest.raises(WeightsError, match="a face is seen in 0 of 15 views"):
        place_prior(prior_like(0.0), registry_model)


def test_the_builtin_prior_drawn_larger_is_found_larger(registry_model: FaceModel, monkeypatch: pytest.MonkeyPatch):
    few = torch.tensor([[-20.0, 0, 0], [20, 0, 0], [0, -20, 0], [0, 20, 0]]).deg2rad()
    monkeypatch.setattr(headspace, "PRIOR_VIEWS", few)
    moved = load_prior()
    sizes = moved.generator.renderer_config
    moved.generator.renderer_config = replace(sizes, box_warp=1.05 * sizes.box_warp)  # everything is larger
    placed = place_prior(moved, registry_model)
    assert placed.generator.renderer_config.head_space[0] == pytest.approx(1.05, abs=0.01)
    assert torch.tensor(placed.generator.renderer_config.head_space[1:]).abs().max() < 0.02
