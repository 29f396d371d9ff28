"""The encoder: any number of views in any order, any picture size, cameras matter, and codes differ from the start."""

import pytest
import torch

from talk3d.models.encoder import Encoder
from talk3d.ops.geometry import head_camera
from talk3d.presets import TINY_ENCODER
from talk3d.types import Camera


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(TINY_ENCODER, 16)


def views(batch: int, count: int, side: int = 64) -> tuple[torch.Tensor, torch.Tensor, Camera]:
    image, alpha = torch.rand(batch, count, 3, side, side) * 2 - 1, torch.rand(batch, count, 1, side, side)
    return image, alpha, head_camera(0.3 * torch.randn(batch * count, 3))


def test_one_code_for_each_moment_whatever_the_number_and_size_of_pictures(encoder: Encoder) -> None:
    for count, side in ((1, 32), (3, 64)):
        assert encoder(*views(2, count, side)).shape == (2, 16)


def test_the_order_of_the_views_does_not_matter_and_their_cameras_do(encoder: Encoder) -> None:
    image, alpha, camera = views(1, 3)
    order = torch.tensor([2, 0, 1])
    code = encoder(image, alpha, camera)
    torch.testing.assert_close(encoder(image[:, order], alpha[:, order], camera[order]), code, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(encoder(image, alpha, camera[order]), code, atol=1e-4)


def test_every_moment_of_a_batch_is_guessed_from_its_own_pictures(encoder: Encoder) -> None:
    image, alpha, camera = views(3, 2)
    together = encoder(image, alpha, camera)
    alone = torch.cat([encoder(image[i : i + 1], alpha[i : i + 1], camera[2 * i : 2 * i + 2]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_codes_of_different_pictures_differ_before_any_training(encoder: Encoder) -> None:
    codes = encoder(*views(16, 1))
    assert codes.std(0).mean() > 0.01
