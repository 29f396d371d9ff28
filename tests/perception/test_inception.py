"""Inception for FID: names, sizes, and that torchmetrics takes it."""

from collections.abc import Callable
from pathlib import Path

import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from talk3d.io.catalogue import CATALOGUE
from talk3d.perception.inception import Inception, load_inception


def test_names_and_sizes_are_the_published_ones(has_published_sizes: Callable[..., None]) -> None:
    with torch.device("meta"):
        network = Inception()
    has_published_sizes("inception", network, file_bytes=CATALOGUE["inception"].size_bytes)


def test_features_feed_torchmetrics(tmp_path: Path) -> None:
    torch.save(Inception().state_dict(), tmp_path / "inception.pth")
    network = load_inception(tmp_path / "inception.pth")
    pictures = torch.randint(0, 256, (3, 3, 40, 50), dtype=torch.uint8)
    assert network(pictures).shape == (3, 2048)
    distance = FrechetInceptionDistance(feature=network)
    distance.update(pictures, real=True)
    assert torch.allclose(distance.real_features_sum, network(pictures).double().sum(0))
