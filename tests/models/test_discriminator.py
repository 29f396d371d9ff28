"""The discriminator: shapes, conditioning, sameness shows, and its halving layers keep the mean."""

import pytest
import torch

from talk3d.models.discriminator import DiscriminatorConfig, DualDiscriminator, EqualConv, dual, minibatch_deviation

SMALL = DiscriminatorConfig(side=32, channel_base=256, channel_max=16)


def test_one_score_a_picture_and_labels_matter_only_if_it_is_told() -> None:
    pictures, label = torch.randn(4, 6, 32, 32), torch.randn(4, 25)
    told = DualDiscriminator(SMALL)
    assert told(pictures, label).shape == (4, 1)
    assert not torch.allclose(told(pictures, label), told(pictures, -label))
    untold = DualDiscriminator(DiscriminatorConfig(side=32, channel_base=256, channel_max=16, c_dim=0))
    assert untold(pictures).shape == (4, 1)
    with pytest.raises(AssertionError, match="give a label"):
        told(pictures)


def test_gradients_reach_pictures_and_every_weight() -> None:
    model, pictures = DualDiscriminator(SMALL), torch.randn(4, 6, 32, 32, requires_grad=True)
    model(pictures, torch.randn(4, 25)).sum().backward()
    assert pictures.grad is not None and pictures.grad.abs().sum() > 0
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_the_deviation_is_zero_among_equals_and_known_among_opposites() -> None:
    x = torch.randn(1, 3, 4, 4)
    assert minibatch_deviation(x.repeat(4, 1, 1, 1), 4).max() < 1e-3
    opposites = torch.cat([x.sign(), -x.sign(), x.sign(), -x.sign()])  # deviation 1 everywhere
    torch.testing.assert_close(minibatch_deviation(opposites, 4), torch.ones(4, 1, 4, 4))
    pairs = torch.cat([x.sign(), 3 * x.sign(), -x.sign(), 3 * x.sign()])  # groups of two are pictures 0, 2 and 1, 3
    torch.testing.assert_close(minibatch_deviation(pairs, 2)[:, 0, 0, 0], torch.tensor([1.0, 0.0, 1.0, 0.0]), atol=1e-3, rtol=0)


def test_deviation_of_a_batch_that_the_group_does_not_divide() -> None:
    assert minibatch_deviation(torch.randn(3, 2, 4, 4), 4).shape == (3, 1, 4, 4)


@pytest.mark.parametrize("kernel", [1, 3])
def test_halving_keeps_constant_pictures_constant_inside(kernel: int) -> None:
    layer = EqualConv(1, 1, kernel, down=True, activated=False)
    with torch.no_grad():
        layer.weight.fill_(1.0 / (kernel * kernel * layer.scale))
    out = layer(torch.full((1, 1, 16, 16), 3.0))
    assert out.shape == (1, 1, 8, 8)
    torch.testing.assert_close(out[..., 2:-2, 2:-2], torch.full((1, 1, 4, 4), 3.0))


def test_both_pictures_are_stacked_at_the_full_size() -> None:
    image, raw = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 8, 8)
    both = dual(image, raw)
    assert both.shape == (2, 6, 16, 16) and both[:, :3].equal(image)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(dual(image, torch.full((2, 3, 8, 8), 0.3))[:, 3:], 2), torch.full((2, 3, 8, 8), 0.3))
