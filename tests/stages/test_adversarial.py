"""Adversarial pretraining: both players move, terms come when they are due, rays grow, the average w follows; losses in closed form.

Augmentation is the identity at probability 0, keeps greys grey, treats both halves alike, and adapts.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from talk3d.io.heads import HeadDataset
from talk3d.models.discriminator import DiscriminatorConfig, DualDiscriminator
from talk3d.ops.geometry import head_camera
from talk3d.presets import FFHQ512, TINY
from talk3d.stages.adversarial import (
    ADAPTATION_PICTURES,
    AdversarialConfig,
    AdversarialTrainer,
    Augmentation,
    _colours,
    _move,
    conditioned,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)
from talk3d.stages.pretrain import PretrainConfig, pretrain

CONFIG = AdversarialConfig(pictures_per_step=4, penalty_every=3, density_every=2)


@pytest.fixture
def trainer() -> AdversarialTrainer:
    rgba = torch.randint(256, (6, 64, 64, 4), dtype=torch.uint8)
    heads = HeadDataset(images=rgba, cameras=head_camera(0.3 * torch.randn(6, 3)), sample=torch.arange(6), person=torch.arange(6))
    trainer = AdversarialTrainer(CONFIG, heads, conditioned(TINY), steps=10, coarse_part=0.5, device="cpu")
    trainer.seed(0)
    return trainer


def test_sizes_get_a_conditioned_mapping_network_only_where_they_lack_one() -> None:
    assert (conditioned(TINY).c_dim, conditioned(TINY).mapping_layers) == (25, 2)
    assert conditioned(FFHQ512) == FFHQ512


def test_both_players_move_and_terms_come_when_they_are_due(trainer: AdversarialTrainer) -> None:
    always = {"generator", "discriminator", "augmentation"}
    before = {name: {k: v.clone() for k, v in trainer.modules[name].state_dict().items()} for name in ("generator", "discriminator")}
    assert trainer.step(0).keys() == always | {"density", "penalty"}
    assert trainer.step(1).keys() == always
    assert trainer.step(2).keys() == always | {"density"}
    assert trainer.step(3).keys() == always | {"penalty"}
    for name, state in before.items():
        after = trainer.modules[name].state_dict()
        assert any(not after[key].equal(value) for key, value in state.items()), name


def test_rays_grow_from_half_to_all(trainer: AdversarialTrainer) -> None:
    assert [trainer._rays_a_side(number) for number in (0, 5, 9)] == [8, 16, 16]
    assert trainer._rays_a_side(2) == 12 and trainer._rays_a_side(1) % 2 == 0


def test_the_average_w_follows_the_mapped_latents(trainer: AdversarialTrainer) -> None:
    mapping = trainer.generator.mapping_network
    mapping.w_avg.fill_(5.0)
    trainer.step(1)
    assert 4.9 < mapping.w_avg.max() < 5.0


def test_the_result_has_no_encoder_and_a_spread(trainer: AdversarialTrainer) -> None:
    trainer.step(0)
    prior = trainer.result({"made": "here"})
    assert prior.encoder is None and prior.w_std > 0 and prior.provenance == {"made": "here"}
    assert not prior.generator.training


def test_a_fixed_strength_of_augmentation_stays(trainer: AdversarialTrainer) -> None:
    trainer.config = replace(CONFIG, augmented=False)
    trainer.step(0)
    assert trainer.augmentation.probability == 0


def test_it_runs_as_a_way_of_pretraining(tmp_path: Path) -> None:
    labels = []
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 100, 50)).save(tmp_path / f"{i}.png")
        labels.append([f"{i}.png", head_camera(torch.zeros(3)).to_label().tolist()])
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    prior = pretrain(tmp_path, PretrainConfig(mode="adversarial", steps=2, adversarial=CONFIG), start=TINY)
    assert prior.provenance["mode"] == "adversarial" and prior.generator.config.c_dim == 25


def test_losses_at_undecided_scores_are_logarithms_of_two() -> None:
    zero = torch.zeros(3, 1)
    assert generator_loss(zero).item() == pytest.approx(math.log(2))
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    sure = torch.full((3, 1), 50.0)
    assert discriminator_loss(sure, -sure).item() < 1e-6 < generator_loss(-sure).item()


class Linear(DualDiscriminator):
    """Scores a picture by its product with a fixed one."""

    def __init__(self, weight: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(weight)

    def forward(self, pictures: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        return (pictures * self.weight).sum((1, 2, 3))[:, None]


def test_the_penalty_of_a_linear_score_is_its_squared_weight() -> None:
    weight = torch.randn(6, 8, 8)
    model = Linear(weight)
    penalty = gradient_penalty(model, torch.randn(4, 6, 8, 8), None)
    assert penalty.item() == pytest.approx(weight.square().sum().item(), rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(model.weight.grad, 2 * weight)


def test_the_penalty_reaches_the_networks_weights() -> None:
    model = DualDiscriminator(DiscriminatorConfig(side=16, channel_base=64, channel_max=8, c_dim=0))
    gradient_penalty(model, torch.randn(2, 6, 16, 16), None).backward()
    assert model.from_pictures.weight.grad is not None and model.from_pictures.weight.grad.abs().sum() > 0


def test_at_probability_zero_nothing_changes_and_at_one_everything_does() -> None:
    augmentation, pictures = Augmentation(), torch.rand(8, 6, 16, 16) * 2 - 1
    assert augmentation(pictures, torch.Generator().manual_seed(0)).equal(pictures)
    augmentation.probability.fill_(1.0)
    changed = augmentation(pictures, torch.Generator().manual_seed(0))
    assert ((changed - pictures).abs().mean((1, 2, 3)) > 0.05).all()
    assert changed.equal(augmentation(pictures, torch.Generator().manual_seed(0)))


def test_both_halves_are_treated_alike_and_gradients_pass() -> None:
    augmentation = Augmentation()
    augmentation.probability.fill_(1.0)
    half = torch.rand(4, 3, 16, 16, requires_grad=True)
    changed = augmentation(torch.cat([half, half], 1), torch.Generator().manual_seed(1))
    torch.testing.assert_close(changed[:, :3], changed[:, 3:])
    changed.sum().backward()
    assert half.grad is not None and half.grad.abs().sum() > 0


def test_greys_stay_grey_and_no_colour_change_is_the_identity() -> None:
    matrix, shift = _colours(5, 1.0, torch.Generator().manual_seed(2), torch.device("cpu"))
    grey = matrix @ torch.full((3,), 0.4) + shift
    torch.testing.assert_close(grey, grey[:, :1].expand(-1, 3), atol=1e-5, rtol=0)
    matrix, shift = _colours(5, 0.0, torch.Generator().manual_seed(2), torch.device("cpu"))
    torch.testing.assert_close(matrix, torch.eye(3).expand(5, 3, 3))
    assert shift.eq(0).all()


def test_moving_by_a_whole_pixel_moves_the_picture() -> None:
    pictures = torch.rand(1, 2, 8, 8)
    placement = torch.tensor([[[1.0, 0.0, 2 / 8], [0.0, 1.0, 0.0]]])  # each pixel comes from its right neighbour
    torch.testing.assert_close(_move(pictures, placement)[..., :-1], pictures[..., 1:])


def test_the_probability_follows_the_scores_of_real_pictures() -> None:
    augmentation, sure = Augmentation(), torch.ones(1000, 1)
    augmentation.adapt(sure)
    assert augmentation.probability.item() == pytest.approx(1000 / ADAPTATION_PICTURES)
    augmentation.adapt(torch.cat([sure, -sure]))
    assert augmentation.probability.item() == 0
    for _ in range(3):
        augmentation.adapt(torch.ones(ADAPTATION_PICTURES, 1))
    assert augmentation.probability.item() == 1
