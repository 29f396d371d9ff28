"""What is known of face points beforehand, found again from points made of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from talk3d.errors import WeightsError
from talk3d.ops.geometry import fit_similarity, head_camera, project, rotation_from_vector, vector_from_rotation
from talk3d.perception import facetemplate as ft
from talk3d.types import Camera


def seen_by(cameras: Camera, template: ft.FaceTemplate) -> torch.Tensor:
    return project(template.points.double().expand(len(cameras), -1, -1), cameras).float()


def views(count: int) -> Camera:
    generator = torch.Generator().manual_seed(2)
    return head_camera(torch.rand(count, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.2, 0.6, 0.0]) - torch.tensor([0.6, 0.3, 0.0]))


def test_a_template_is_found_again_from_many_views_though_some_are_wrong():
    template = ft.load_template("registry")
    cameras = views(150)
    points = seen_by(cameras, template)
    points[::10] += 0.1
    assert (ft.fit_template(points, cameras) - template.points).norm(dim=-1).max() < 5e-3


def test_lag_and_modes_are_told_apart_whoever_the_people_are():
    template = ft.load_template("registry")
    cameras = views(200)
    generator = torch.Generator().manual_seed(5)
    mode = 0.01 * torch.randn(468, 2, generator=generator)
    lag = torch.zeros(468, 2, 5)
    lag[:, :, 1] = 0.05 * torch.randn(468, 2, generator=generator)
    person = torch.arange(200) // 8
    strayed = torch.randn(200, generator=generator)
    own = 0.003 * torch.randn(25, 468, 2, generator=generator)
    turned = torch.einsum("paf,nf->npa", lag, ft.pose_features(cameras.cam2world[:, :3, :3]).float())
    level = turned + strayed[:, None, None] * mode + own[person]
    angle = ft.eye_line_angle(seen_by(cameras, template))
    points = seen_by(cameras, template) + ft.turn_picture(level, angle) * 4.2647 / 2.7
    found_lag, found = ft.fit_errors(points, cameras, person, template.points, num_modes=3)
    assert torch.nn.functional.cosine_similarity(found[..., 0].flatten(), mode.flatten(), dim=0).abs() > 0.95
    assert found[..., 1].norm() < 0.3 * mode.norm()
    assert torch.nn.functional.cosine_similarity(found_lag[..., 1].flatten(), lag[..., 1].flatten(), dim=0) > 0.9


def test_how_people_differ_is_found_and_lays_a_slanting_face_right():
    template = ft.load_template("registry")
    generator = torch.Generator().manual_seed(6)
    slant = template.points @ rotation_from_vector(torch.tensor([0.05, 0.0, 0.0])).mT - template.points
    bump = 0.02 * torch.exp(-100 * (template.points - template.points[1]).square().sum(-1))[:, None] * torch.tensor([0.0, 0.0, 1.0])
    way = slant + bump  # who has a large nose also has a slanting face
    amount = torch.randn(40, generator=generator)
    cameras = views(320)
    person = torch.arange(320) // 8
    points = project((template.points + amount[person, None, None] * way).double(), cameras).float()
    people = ft.fit_people(points, cameras, person, template.points, torch.zeros(468, 2, 5), num_ways=2)
    assert torch.nn.functional.cosine_similarity(people[..., 0].flatten(), way.flatten(), dim=0).abs() > 0.97
    face = template.points + 1.5 * way
    turned = 1.1 * face @ rotation_from_vector(torch.tensor([-0.03, 0.02, 0.01])).mT + 0.01
    placed, found = ft.place_shape(turned.double(), template.points.double(), people.double())
    left = vector_from_rotation(fit_similarity(placed, face.double())[1]).rad2deg().abs().max()
    blind = vector_from_rotation(fit_similarity(fit_similarity_applied(turned, template.points), face)[1]).rad2deg().abs().max()
    assert left < 0.5 < 2 < blind
    assert found.shape == (2,)


def fit_similarity_applied(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    scale, turn, shift = fit_similarity(source, target)
    return scale * source @ turn.mT + shift


def test_pictures_turn_clockwise():
    points = torch.tensor([[[1.0, 0.0]]])
    assert ft.turn_picture(points, torch.tensor([0.5 * torch.pi]))[0, 0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    level = ft.load_template("task").points[None, :, :2] * torch.tensor([1.0, -1.0])
    turned = ft.turn_picture(level, torch.tensor([0.2]))
    assert (ft.eye_line_angle(turned) - ft.eye_line_angle(level)).item() == pytest.approx(0.2, abs=1e-5)


def test_templates_are_saved_loaded_and_refused(tmp_path: Path):
    templates: dict[ft.ModelKind, ft.FaceTemplate] = {"task": ft.load_template("task"), "registry": ft.load_template("registry")}
    templates["task"] = replace(templates["task"], points=templates["task"].points + 1)
    ft.save_templates(templates, tmp_path / "face.safetensors")
    again = ft.load_template("task", tmp_path / "face.safetensors")
    assert torch.equal(again.points, templates["task"].points)
    assert torch.equal(again.modes, templates["task"].modes)
    assert torch.equal(again.lag, templates["task"].lag)
    assert torch.equal(again.people, templates["task"].people)
    assert torch.equal(again.mirror[again.mirror], torch.arange(478))
    with pytest.raises(WeightsError, match="cannot be read"):
        ft.load_template("task", tmp_path / "missing.safetensors")


def test_the_kind_of_the_face_points_is_what_the_clip_says() -> None:
    assert ft.face_model_kind({}) == "registry"
    assert ft.face_model_kind({"landmarks": "face_landmarker.task"}) == "task"
    assert ft.face_model_kind({"landmarks": "models of mediapipe 0.10.21"}) == "registry"
