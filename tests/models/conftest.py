"""Tiny models for the tests, with weights that leave nothing at its starting value."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from talk3d.models.deltaplane import DeltaplaneConfig, DeltaplanePredictor
from talk3d.types import Triplane


@pytest.fixture
def make_predictor() -> Callable[..., DeltaplanePredictor]:
    """Make a small U-Net whose output is not zero."""

    def make(**sizes) -> DeltaplanePredictor:
        torch.manual_seed(1)
        config = {"plane_channels": 4, "plane_resolution": 16, "widths": (8, 8, 16), "head_width": 8, "token_width": 6, "num_bases": 3} | sizes
        predictor = DeltaplanePredictor(DeltaplaneConfig(**config))
        last = [stage.conv1 for stage in predictor.Upnet.slots(3)] if predictor.config.released else predictor.out.values()
        for layer in last:
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            nn.init.normal_(layer.weight, std=0.5)
            nn.init.normal_(layer.bias)
        for bases in (predictor.bases, predictor.near):
            if bases is not None:
                nn.init.normal_(bases)
        return predictor

    return make


@pytest.fixture
def identity() -> Triplane:
    """Planes of one volume for `make_predictor`."""
    return Triplane(planes=torch.randn(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(2)), axes="fixed")
