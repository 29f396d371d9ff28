import pytest
import torch

from talk3d.errors import ShapeError
from talk3d.types import Triplane


def test_a_deltaplane_is_added_value_by_value() -> None:
    identity = Triplane(planes=torch.ones(1, 3, 2, 4, 4), axes="fixed")
    delta = Triplane(planes=torch.full((1, 3, 2, 4, 4), 0.5), axes="fixed")
    total = identity + delta
    assert total.axes == "fixed"
    assert torch.equal(total.planes, torch.full((1, 3, 2, 4, 4), 1.5))


def test_other_axes_are_refused() -> None:
    planes = torch.zeros(1, 3, 2, 4, 4)
    with pytest.raises(ShapeError, match="one prior"):
        Triplane(planes=planes, axes="fixed") + Triplane(planes=planes, axes="released")


def test_moving_keeps_axes() -> None:
    assert Triplane(planes=torch.zeros(3, 2, 4, 4), axes="released").to("cpu").axes == "released"
