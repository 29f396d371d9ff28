"""ArcFace's names, sizes and unit vectors; faces cut out where they should be; the offline descriptor on faces known in closed form."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from talk3d.errors import WeightsError
from talk3d.io.catalogue import CATALOGUE
from talk3d.perception.facetemplate import load_template
from talk3d.perception.identity import (
    FIVE_POINTS,
    ArcFace,
    IdentityNetwork,
    Likeness,
    align_faces,
    compare_shots,
    fit_likeness,
    five_points,
    load_identity,
)
from talk3d.perception.landmarks import load_face_model, observe_picture


def test_names_and_sizes_are_the_published_ones(has_published_sizes: Callable[..., None]) -> None:
    with torch.device("meta"):
        network = ArcFace()
    has_published_sizes("arcface", network, file_bytes=CATALOGUE["arcface"].size_bytes)


def test_embeddings_are_unit_vectors_that_gradients_reach(tmp_path: Path) -> None:
    torch.save(ArcFace().state_dict(), tmp_path / "arcface.pth")
    network = load_identity(tmp_path / "arcface.pth")
    assert isinstance(network, IdentityNetwork) and not network.training
    faces = torch.rand(1, 3, 112, 112) * 2 - 1
    vectors = network(faces)
    assert vectors.shape == (1, 512) and torch.allclose(vectors.norm(dim=-1), torch.ones(1), atol=1e-5)
    large = faces.repeat_interleave(2, -1).repeat_interleave(2, -2).requires_grad_()
    again = network(large)  # averaged down
    assert torch.allclose(again, vectors, atol=1e-5)
    again[:, 0].sum().backward()
    assert large.grad is not None and large.grad.abs().max() > 0
    torch.save({"body": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="does not fit"):
        load_identity(tmp_path / "other.pth")


def test_faces_are_cut_out_upright() -> None:
    template = torch.tensor(FIVE_POINTS)
    turn, scale, shift = math.radians(25), 1.7, torch.tensor([60.0, 40.0])
    rotation = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    points = scale * template @ rotation.T + shift
    rows, columns = torch.meshgrid(torch.arange(300) + 0.5, torch.arange(300) + 0.5, indexing="ij")
    picture = torch.stack([columns, rows, torch.ones_like(rows)])[None]
    crops = align_faces(picture, points[None])
    centres = torch.arange(112) + 0.5
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1)
    expected = (scale * grid @ rotation.T + shift).permute(2, 0, 1)
    inside = ((expected > 1) & (expected < 299)).all(0)
    assert inside.float().mean() > 0.7
    assert (crops[0, :2] - expected)[:, inside].abs().max() < 1e-2


def test_five_points_are_eyes_nose_and_corners_of_the_mouth() -> None:
    landmarks = torch.zeros(1, 478, 2)
    for point, place in {33: (0, 0), 133: (4, 2), 362: (6, 2), 263: (10, 0), 1: (5, 5), 61: (2, 8), 291: (8, 8)}.items():
        landmarks[0, point] = torch.tensor(place)
    torch.testing.assert_close(five_points(landmarks)[0], torch.tensor([[2.0, 1], [8, 1], [5, 5], [2, 8], [8, 8]]))


def seen_from(yaw_deg: float, tint: torch.Tensor, stretch: float, light: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A flat face: the template turned, stretched along y, on a picture whose colour varies from place to place."""
    template = load_template("registry").points[:468]
    yaw = math.radians(yaw_deg)
    x = math.cos(yaw) * template[:, 0] - math.sin(yaw) * template[:, 2]
    points = 64 + 100 * torch.stack([x, -stretch * template[:, 1]], -1)
    rows = torch.linspace(0, 3, 128)[:, None].expand(128, 128)
    picture = light * (0.3 + 0.1 * torch.sin(rows + tint.view(3, 1, 1)))
    return picture[None], points[None]


def test_likeness_forgets_light_and_size_and_knows_equal_faces() -> None:
    describe, tint = Likeness("registry"), torch.tensor([0.0, 1.0, 2.0])
    picture, points = seen_from(0, tint, 1.0)
    one = describe(picture, points)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(1))
    darker, _ = seen_from(0, tint, 1.0, light=0.7)
    torch.testing.assert_close(describe(darker, points), one, atol=1e-4, rtol=0)
    larger = torch.nn.functional.interpolate(picture, scale_factor=2, mode="bilinear", align_corners=False)
    assert float((describe(larger, 2 * points) * one).sum()) > 0.99
    turned = describe(*seen_from(20, tint, 1.0))
    other = describe(*seen_from(0, torch.tensor([2.0, 0.0, 1.0]), 1.15))
    assert float((turned * one).sum()) > float((other * one).sum()) + 0.1


def test_the_projection_is_learnt_from_people_who_differ_in_one_feature(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    person = torch.arange(30).repeat_interleave(8)
    features = torch.randn(240, 300, generator=generator)
    features[:, 7] += 20 * torch.randn(30, generator=generator)[person]
    fit_likeness(features, person, tmp_path / "own.safetensors")
    learnt = load_file(tmp_path / "own.safetensors")
    assert learnt["projection"].shape == (300, 30)
    assert int(learnt["projection"][:, 0].abs().argmax()) == 7
    with pytest.raises(WeightsError, match="install the package again"):
        Likeness("registry", tmp_path / "absent.safetensors")


def test_unseen_people_are_told_apart(shared: Path) -> None:
    """Two invented people of the data set, each seen from several sides by the detector, and the card's threshold."""
    try:
        model = load_face_model()
    except WeightsError as error:
        pytest.skip(f"no face model: {error}")
    folder = shared / "data" / "heads256"
    labels = json.loads((folder / "dataset.json").read_text())["labels"]
    describe, vectors = Likeness(model.kind), []
    for name, _ in [*labels[:4], *labels[400:404]]:
        rgba = np.asarray(Image.open(folder / name).convert("RGBA"), np.float32)
        alpha = rgba[..., 3:] / 255
        picture = (rgba[..., :3] * alpha + 128 * (1 - alpha)).round().astype(np.uint8)
        seen = observe_picture(model, picture)
        assert seen is not None
        vectors.append(describe(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, torch.from_numpy(seen.landmarks)[None]))
    cosine = torch.cat(vectors) @ torch.cat(vectors).mT
    assert float(cosine[:4, :4].min()) > 0.6 > float(cosine[:4, 4:].max())


def test_shots_are_compared_with_the_one_looked_at_most() -> None:
    same, other = torch.tensor([0.8, 0.6]), torch.tensor([0.0, 1.0])
    looks = {60: other, 50: other, 0: same, 10: same, 20: same}
    assert compare_shots(looks, (30, 70)) == {0: pytest.approx(1), 30: pytest.approx(0.6)}  # nothing was seen from 70 on
    assert compare_shots({}, (30,)) == {}
    mixed = compare_shots({0: same, 25: same, 40: same, 50: other}, (30,))
    assert mixed[30] == pytest.approx(math.cos(0.5 * math.acos(0.6)))  # a shot's mean, not its worst frame
