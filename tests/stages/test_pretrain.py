"""Pretraining on a few pictures of coloured balls: it learns, resumes exactly, mirrors rightly, and its mapping reproduces the codes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from talk3d.errors import ConfigError, MediaError, WeightsError
from talk3d.io.heads import load_heads
from talk3d.io.weights import load_tensors
from talk3d.models.avatar import Prior
from talk3d.models.encoder import Encoder
from talk3d.models.generator import TriplaneGenerator
from talk3d.models.stylegan2 import resize_to
from talk3d.ops.geometry import head_camera, project
from talk3d.presets import TINY, TINY_ENCODER
from talk3d.stages.adversarial import AdversarialConfig
from talk3d.stages.pretrain import PretrainConfig, SupervisedTrainer, pretrain
from talk3d.training.losses import picture_losses
from talk3d.types import Rendering

SIDE = 32
CENTRE = torch.tensor([[0.1, 0.05, 0.0]])
SHORT = PretrainConfig(steps=10, samples_per_step=2, views_per_sample=2, encoder=TINY_ENCODER)


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people of two moments each, seen from three sides: a ball off the middle, in the person's colour."""
    folder = tmp_path_factory.mktemp("balls")
    grid = (torch.arange(SIDE) + 0.5) / SIDE
    labels, samples, people = [], [], []
    for sample in range(4):
        person = sample // 2
        for yaw in (-0.4, 0.0, 0.4):
            camera = head_camera(torch.tensor([yaw, 0.0, 0.0]))
            middle = project(CENTRE, camera)[0]
            radius = (0.2 + 0.05 * (sample % 2)) * 4.2647 / 2.9
            inside = ((grid[None] - middle[0]) ** 2 + (grid[:, None] - middle[1]) ** 2).sqrt() < radius
            rgba = np.zeros((SIDE, SIDE, 4), np.uint8)
            rgba[inside.numpy()] = (220, 60, 40, 255) if person else (40, 90, 220, 255)
            name = f"{len(labels)}.png"
            Image.fromarray(rgba).save(folder / name)
            labels.append([name, camera.to_label().tolist()])
            samples.append(sample)
            people.append(person)
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    np.savez(folder / "samples.npz", sample=samples, person=people)
    return folder


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


def test_it_learns_what_the_pictures_show(balls: Path) -> None:
    heard: list[dict[str, float]] = []

    def listen(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        if stage == "pretrain":
            heard.append(dict(values))

    config = PretrainConfig(
        steps=120, samples_per_step=2, views_per_sample=2, learning_rate=3e-2, encoder_rate=1e-2, average_decay=0.8, encoder=TINY_ENCODER
    )
    prior = pretrain(balls, config, start=TINY, progress=listen)
    assert heard[0].keys() == {"image", "detail", "alpha", "raw", "density", "code"}
    for name in ("image", "detail", "alpha", "raw"):
        assert heard[-1][name] < 0.8 * heard[0][name], name
    facts = {"mode": "supervised", "dataset": balls.name, "pictures": 12, "people": 2, "steps": 120, "seed": 0}
    assert prior.provenance == facts
    camera = head_camera(torch.zeros(1, 3))
    with torch.no_grad():
        alpha = prior.generator.render(prior.generator.mapping(torch.randn(1, 8), None, 0.0), camera).alpha[0, 0]
    assert alpha[24:40, 24:40].mean() > alpha[:8, :8].mean() + 0.2


def test_outlines_count_over_more_than_black(balls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = SupervisedTrainer(replace(SHORT, samples_per_step=8), load_heads(balls, 64), TINY, device="cpu")
    trainer.seed(0)
    w, target, camera, depth = trainer._batch()
    small, matte = (resize_to(x, 16) for x in (target.image, target.alpha))
    thin = Rendering(image=target.image, alpha=target.alpha / 2, raw=small, raw_alpha=matte / 2, features=small, depth=matte)
    monkeypatch.setattr(trainer.generator, "render_triplane", lambda *_given, **_settings: thin)
    terms = trainer._terms(w, target, camera, depth, coarse=False)
    assert picture_losses(thin, target)["image"] == 0, "over black nothing shows"
    assert terms["image"] > 0.05 * target.alpha.mean() and terms["raw"] > 0.05 * target.alpha.mean()


def test_it_learns_distances_where_the_data_set_has_them(balls: Path, tmp_path: Path) -> None:
    heads = tmp_path / "heads"
    shutil.copytree(balls, heads)
    np.save(heads / "depth.npy", np.full((12, 16, 16), 2.6, np.float16))
    heard: list[dict[str, float]] = []
    config = PretrainConfig(steps=60, samples_per_step=2, encoder=TINY_ENCODER, learning_rate=1e-2, depth_weight=10.0, coarse_part=0.3)
    pretrain(heads, config, start=TINY, progress=lambda stage, _n, _t, values: heard.append(dict(values)) if stage == "pretrain" else None)
    assert heard[-1]["depth"] < 0.5 * heard[0]["depth"]


@pytest.mark.parametrize("mode", ["supervised", "adversarial"])
def test_a_stopped_run_continues_exactly(balls: Path, tmp_path: Path, mode: Literal["supervised", "adversarial"]) -> None:
    config = replace(SHORT, mode=mode, adversarial=AdversarialConfig(pictures_per_step=4, penalty_every=2, density_every=3))
    whole = pretrain(balls, config, start=TINY, seed=3)

    def stop(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        if stage == "pretrain" and step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pretrain(balls, config, start=TINY, seed=3, progress=stop, checkpoint=tmp_path / "check")
    resumed = pretrain(balls, config, start=TINY, seed=3, checkpoint=tmp_path / "check")
    assert resumed.w_std == whole.w_std
    for name, value in weights(whole).items():
        assert weights(resumed)[name].equal(value), name


KILLED = """
import functools, importlib, os, signal, sys
from pathlib import Path
import torch
from talk3d.presets import TINY, TINY_ENCODER

torch.set_num_threads(1)
stage = importlib.import_module("talk3d.stages.pretrain")
loop = stage.Loop
stage.Loop = lambda **settings: loop(**settings | {"checkpoint_seconds": 0})
config = stage.PretrainConfig(steps=10, samples_per_step=2, views_per_sample=2, encoder=TINY_ENCODER)
stop = lambda name, step, *_: os.kill(os.getpid(), signal.SIGKILL) if (name, step) == ("pretrain", 5) else None
stage.pretrain(Path(sys.argv[1]), config, start=TINY, seed=3, progress=stop, checkpoint=Path(sys.argv[2]))
"""


def test_a_killed_run_continues_exactly_from_its_last_checkpoint(balls: Path, tmp_path: Path) -> None:
    whole = pretrain(balls, SHORT, start=TINY, seed=3)
    done = subprocess.run([sys.executable, "-c", KILLED, str(balls), str(tmp_path / "check")], check=False)
    assert done.returncode == -signal.SIGKILL and load_tensors(tmp_path / "check", "checkpoint")[1]["step"] == 4
    resumed = pretrain(balls, SHORT, start=TINY, seed=3, checkpoint=tmp_path / "check")
    assert all(weights(resumed)[name].equal(value) for name, value in weights(whole).items())


def test_seeds_matter_and_the_global_randomness_is_left_alone(balls: Path) -> None:
    config = replace(SHORT, steps=1)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = pretrain(balls, config, start=TINY, seed=1)
    assert torch.rand(1).equal(expected)
    again, other = (pretrain(balls, config, start=TINY, seed=seed) for seed in (1, 2))
    name = "generator.decoder.net.0.weight"
    assert weights(first)[name].equal(weights(again)[name]) and not weights(first)[name].equal(weights(other)[name])


def test_unfit_inputs_are_refused(balls: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1 step"):
        PretrainConfig(steps=0)
    with pytest.raises(MediaError, match="is no data set"):
        pretrain(tmp_path, SHORT, start=TINY)
    pretrain(balls, replace(SHORT, steps=1), start=TINY, checkpoint=tmp_path / "check")
    with pytest.raises(WeightsError, match="other settings"):
        pretrain(balls, SHORT, start=replace(TINY, channel_max=8), checkpoint=tmp_path / "check")


def test_the_fitted_mapping_has_the_mean_and_covariance_of_the_codes(balls: Path) -> None:
    heads = load_heads(balls, 64)
    trainer = SupervisedTrainer(SHORT, heads, TINY, device="cpu")
    w = trainer.codes(trainer.encoder)
    mean, centred = w.mean(0), w - w.mean(0)
    prior = trainer.result({})
    mapping = prior.generator.mapping_network
    matrix = mapping.affine.weight / math.sqrt(TINY.z_dim)
    assert torch.allclose(mapping.affine.bias, mean, atol=1e-5) and torch.allclose(mapping.w_avg, mean, atol=1e-5)
    torch.testing.assert_close(matrix @ matrix.T, centred.T @ centred / 8, atol=1e-5, rtol=1e-3)  # 8 codes have 7 directions, z has 8
    assert prior.w_std == pytest.approx(centred.square().mean().sqrt().item(), rel=1e-4)
    drawn = prior.generator.mapping(torch.randn(4000, 8))[:, 0]
    torch.testing.assert_close(torch.cov(drawn.T, correction=0), centred.T @ centred / 8, atol=0.1 * centred.square().mean().item(), rtol=0.1)
    assert prior.encoder is not None and trainer.codes(prior.encoder).mean(0).abs().max() < 1e-5, "the encoder speaks of offsets"


def test_half_precision_learns_the_same_way(balls: Path) -> None:
    heads, losses = load_heads(balls, 64), []
    for mixed in (False, True):
        torch.manual_seed(1)
        trainer = SupervisedTrainer(replace(SHORT, mixed_precision=mixed), heads, TINY, device="cpu")
        trainer.seed(0)
        losses.append([trainer.step(number) for number in range(3)][-1])
    for name in ("image", "detail", "alpha", "raw"):
        assert losses[1][name].item() == pytest.approx(losses[0][name].item(), rel=0.02), name


def test_sheets_are_written_now_and_then_and_change_nothing(balls: Path, tmp_path: Path) -> None:
    config = replace(SHORT, steps=3, sheet_every=2)
    with_sheets, without = (pretrain(balls, config, start=TINY, sheets=sheets) for sheets in (tmp_path / "sheets", None))
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["0000000.png", "0000002.png"]
    with Image.open(tmp_path / "sheets" / "0000002.png") as picture:
        assert picture.size == (5 * 64, 4 * 64)  # three sides, depth, normals; four moments
    for name, value in weights(without).items():
        assert weights(with_sheets)[name].equal(value), name


def test_sizes_with_a_camera_told_mapping_network_are_made_plain(balls: Path) -> None:
    prior = pretrain(balls, replace(SHORT, steps=1), start=replace(TINY, c_dim=25, mapping_layers=2))
    assert prior.generator.config.c_dim == prior.generator.config.mapping_layers == 0


@pytest.mark.parametrize("mode", ["supervised", "adversarial"])
def test_training_goes_on_from_a_prior(balls: Path, mode: Literal["supervised", "adversarial"]) -> None:
    config = replace(SHORT, mode=mode, steps=2, average_decay=0.0, adversarial=AdversarialConfig(pictures_per_step=4, average_decay=0.0))
    prior = pretrain(balls, config, start=TINY)
    still = replace(config, learning_rate=0.0, encoder_rate=0.0, adversarial=replace(config.adversarial, generator_rate=0.0), steps=1)
    on = pretrain(balls, still, start=prior)
    for name, value in weights(prior).items():
        if "mapping" not in name:
            torch.testing.assert_close(weights(on)[name], value, atol=1e-5, rtol=1e-5, msg=name)
    assert on.provenance["start"] == prior.provenance
    other = "adversarial" if mode == "supervised" else "supervised"
    with pytest.raises(ConfigError, match="cannot go on"):
        pretrain(balls, replace(config, mode=other), start=prior)


def test_a_new_encoder_of_an_old_prior_guesses_within_its_spread(balls: Path) -> None:
    prior = pretrain(balls, SHORT, start=TINY)
    prior.encoder = None
    trainer = SupervisedTrainer(SHORT, load_heads(balls, 64), TINY, device="cpu")
    trainer.take_over(prior)
    mapping = prior.generator.mapping_network
    spread = mapping.affine.weight / math.sqrt(TINY.z_dim)
    offset = trainer.codes(trainer.encoder) - mapping.w_avg
    inside = torch.linalg.lstsq(spread[:, :7], offset.T).solution  # eight codes have seven directions
    torch.testing.assert_close(spread[:, :7] @ inside, offset.T, atol=1e-5, rtol=1e-3)


def test_a_start_can_be_sharpened(balls: Path) -> None:
    first = pretrain(balls, SHORT, start=TINY)
    trainers = [SupervisedTrainer(replace(SHORT, sharpen=by), load_heads(balls, 64), first.generator.config, device="cpu") for by in (1.0, 2.5)]
    for trainer in trainers:
        trainer.take_over(first)
    ws, points = first.generator.mapping(torch.ones(1, TINY.z_dim)), torch.rand(1, 50, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    with torch.no_grad():
        before, after = (t.generator.query(t.generator.triplane(ws), points)[0] for t in trainers)
    torch.testing.assert_close(after - 1, 2.5 * (before - 1), rtol=1e-4, atol=1e-4)


def test_a_prior_that_was_placed_goes_on_in_the_space_of_its_pictures(balls: Path) -> None:
    sizes = replace(TINY, renderer=replace(TINY.renderer, head_space=(1.1, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0)))
    start = Prior(generator=TriplaneGenerator(sizes), w_std=1.0, provenance={}, encoder=Encoder(TINY_ENCODER, sizes.renderer.w_dim))
    again = pretrain(balls, replace(SHORT, steps=1), start=start)
    assert again.generator.config == TINY and again.generator.renderer_config == TINY.renderer
