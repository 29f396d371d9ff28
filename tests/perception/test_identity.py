"""ArcFace's names, sizes and unit vectors; faces cut out where they should be."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from talk3d.errors import WeightsError
from talk3d.io.catalogue import CATALOGUE
from talk3d.perception.identity import FIVE_POINTS, ArcFace, IdentityNetwork, align_faces, load_identity


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
