"""LPIPS: names, sizes, the heads of torchmetrics, and the distance against its definition."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from talk3d.errors import WeightsError
from talk3d.perception import perceptual
from talk3d.perception.perceptual import LPIPS, Backbone, PerceptualDistance, backbone, heads_path, load_lpips


@pytest.mark.parametrize("kind", get_args(Backbone))
def test_names_and_sizes_are_the_published_ones(kind: Backbone, has_published_sizes: Callable[..., None]) -> None:
    with torch.device("meta"):
        network = nn.ModuleDict({"features": backbone(kind)})
    has_published_sizes(f"lpips-{kind}", network, rest=("classifier.",))


def saved(folder: Path, kind: Backbone) -> Path:
    state = {f"features.{key}": value for key, value in backbone(kind).state_dict().items()} | {"classifier.1.weight": torch.zeros(2, 2)}
    torch.save(state, folder / f"{kind}.pth", _use_new_zipfile_serialization=False)
    return folder / f"{kind}.pth"


def slow(network: LPIPS, first: Tensor, second: Tensor) -> float:
    """The distance of one pair by its definition, in double precision."""
    shift, scale = (torch.tensor(values).double().view(1, 3, 1, 1) for values in (perceptual.SHIFT, perceptual.SCALE))
    features = network.features.double()
    total, level, pair = 0.0, 0, [(picture[None].double() - shift) / scale for picture in (first, second)]
    for number, layer in enumerate(features):
        pair = [layer(x) for x in pair]
        if number in network.taps:
            one, other = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-10) for x in pair)
            difference = (one - other).square()
            total += sum(float(w) * float(difference[0, c].mean()) for c, w in enumerate(network.heads[level].flatten()))
            level += 1
    features.float()
    return total


@pytest.mark.parametrize("kind", get_args(Backbone))
def test_distance_is_its_definition(kind: Backbone, tmp_path: Path) -> None:
    network = load_lpips(kind, saved(tmp_path, kind))
    assert isinstance(network, PerceptualDistance)
    assert all(head.min() >= 0 and head.max() > 0 for head in network.heads)
    first, second = (torch.rand(2, 3, 64, 64) * 2 - 1 for _ in range(2))
    found = network(first, second)
    assert found.shape == (2,) and torch.equal(network(first, first), torch.zeros(2))
    assert torch.allclose(network(second, first), found, atol=1e-6)
    assert float(found[1]) == pytest.approx(slow(network, first[1], second[1]), rel=1e-4)
    black = torch.zeros(1, 3, 64, 64, requires_grad=True)
    network(black, first[:1]).backward()
    assert black.grad is not None and bool(black.grad.isfinite().all()) and black.grad.abs().max() > 0


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert heads_path("alex").is_file()
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="torchmetrics lacks"):
        heads_path("vgg")
    with pytest.raises(WeightsError, match="does not fit"):
        load_lpips("vgg", saved(tmp_path, "alex"))
