"""Pretraining on a few pictures of coloured balls: it learns, resumes exactly, mirrors rightly, and its mapping reproduces the codes."""

import json
import math
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from talk3d.errors import ConfigError, MediaError, WeightsError
from talk3d.io.clips import load_heads
from talk3d.models.generator import TriplaneGenerator
from talk3d.ops.geometry import head_camera, project
from talk3d.presets import TINY
from talk3d.stages.pretrain import PretrainConfig, _Codes, _Trainer, mirror, pretrain
from talk3d.types import Camera

SIDE = 32
CENTRE = torch.tensor([[0.1, 0.05, 0.0]])
SHORT = PretrainConfig(steps=10, samples_per_step=2, views_per_sample=2)


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

    config = PretrainConfig(steps=50, samples_per_step=2, views_per_sample=2, learning_rate=3e-2, code_learning_rate=2e-2, average_decay=0.8)
    prior = pretrain(balls, config, sizes=TINY, progress=listen)
    assert heard[0].keys() == {"image", "detail", "alpha", "raw", "density", "code"}
    for name in ("image", "detail", "alpha", "raw"):
        assert heard[-1][name] < 0.8 * heard[0][name], name
    assert prior.provenance == {"dataset": balls.name, "pictures": 12, "steps": 50, "seed": 0}
    camera = head_camera(torch.zeros(1, 3))
    with torch.no_grad():
        alpha = prior.generator.render(prior.generator.mapping(torch.randn(1, 8), None, 0.0), camera).alpha[0, 0]
    assert alpha[24:40, 24:40].mean() > alpha[:8, :8].mean() + 0.2


def test_a_stopped_run_continues_exactly(balls: Path, tmp_path: Path) -> None:
    whole = pretrain(balls, SHORT, sizes=TINY, seed=3)

    def stop(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        if stage == "pretrain" and step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pretrain(balls, SHORT, sizes=TINY, seed=3, progress=stop, checkpoint=tmp_path / "check")
    resumed = pretrain(balls, SHORT, sizes=TINY, seed=3, checkpoint=tmp_path / "check")
    assert resumed.w_std == whole.w_std
    for name, value in weights(whole).items():
        assert weights(resumed)[name].equal(value), name


def test_seeds_matter_and_the_global_randomness_is_left_alone(balls: Path) -> None:
    config = replace(SHORT, steps=1)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = pretrain(balls, config, sizes=TINY, seed=1)
    assert torch.rand(1).equal(expected)
    again, other = (pretrain(balls, config, sizes=TINY, seed=seed) for seed in (1, 2))
    name = "generator.decoder.net.0.weight"
    assert weights(first)[name].equal(weights(again)[name]) and not weights(first)[name].equal(weights(other)[name])


def test_unfit_inputs_are_refused(balls: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1 step"):
        PretrainConfig(steps=0)
    with pytest.raises(MediaError, match="is no data set"):
        pretrain(tmp_path, SHORT, sizes=TINY)
    pretrain(balls, replace(SHORT, steps=1), sizes=TINY, checkpoint=tmp_path / "check")
    with pytest.raises(WeightsError, match="other settings"):
        pretrain(balls, SHORT, sizes=replace(TINY, channel_max=8), checkpoint=tmp_path / "check")


def test_mirroring_twice_is_nothing() -> None:
    images = torch.rand(3, 4, 5, 5)
    camera = head_camera(torch.randn(3, 3) * 0.3)
    camera = Camera(cam2world=camera.cam2world, intrinsics=camera.intrinsics + torch.tensor([[0.0, 0, 0.04], [0, 0, 0.1], [0, 0, 0]]))
    flip = torch.tensor([1, 0, 1])
    flipped = mirror(images, camera, flip)
    back, back_camera = mirror(*flipped, flip)
    assert back.equal(images)
    torch.testing.assert_close(back_camera.to_label(), camera.to_label())
    assert flipped[0][1].equal(images[1]) and flipped[1].to_label()[1].equal(camera.to_label()[1])
    assert flipped[0][0].equal(images[0].flip(-1))


def test_the_mirrored_camera_sees_the_mirrored_point_at_the_mirrored_pixel() -> None:
    camera = head_camera(torch.tensor([[0.4, -0.2, 0.15]]))
    camera = Camera(cam2world=camera.cam2world, intrinsics=camera.intrinsics + torch.tensor([[0.0, 0, 0.04], [0, 0, 0.1], [0, 0, 0]]))
    points = torch.rand(1, 6, 3) - 0.5
    _, other = mirror(torch.zeros(1, 3, 2, 2), camera, torch.tensor([1]))
    there, here = project(points * torch.tensor([-1.0, 1, 1]), other), project(points, camera)
    torch.testing.assert_close(there, torch.stack([1 - here[..., 0], here[..., 1]], -1), atol=1e-5, rtol=1e-5)
    assert torch.linalg.det(other.cam2world[0, :3, :3]).item() == pytest.approx(1, abs=1e-5)


def test_the_fitted_mapping_has_the_mean_and_covariance_of_the_codes(balls: Path) -> None:
    heads = load_heads(balls, 64)
    torch.manual_seed(0)
    codes = _Codes(2, 4, 16, torch.Generator().manual_seed(1))
    trainer = _Trainer(SHORT, heads, TriplaneGenerator(TINY), codes, device="cpu", seed=0)
    with torch.no_grad():
        people = torch.tensor([0, 0, 1, 1])
        w = torch.cat([codes(torch.arange(4), people, torch.full((4,), mirrored)) for mirrored in (0, 1)])
    mean, centred = w.mean(0), w - w.mean(0)
    prior = trainer.result("balls", 0)
    mapping = prior.generator.mapping_network
    matrix = mapping.affine.weight / math.sqrt(TINY.z_dim)
    assert torch.allclose(mapping.affine.bias, mean, atol=1e-5) and torch.allclose(mapping.w_avg, mean, atol=1e-5)
    torch.testing.assert_close(matrix @ matrix.T, centred.T @ centred / 8, atol=1e-5, rtol=1e-3)  # 8 codes have 7 directions, z has 8
    assert prior.w_std == pytest.approx(centred.square().mean().sqrt().item(), rel=1e-4)
    drawn = prior.generator.mapping(torch.randn(4000, 8))[:, 0]
    torch.testing.assert_close(torch.cov(drawn.T, correction=0), centred.T @ centred / 8, atol=0.1 * centred.square().mean().item(), rtol=0.1)


def test_mirrored_people_and_moments_have_codes_of_their_own() -> None:
    codes = _Codes(2, 3, 4, torch.Generator().manual_seed(0))
    zero, one = torch.tensor([0]), torch.tensor([1])
    plain, mirrored = codes(zero, one, zero), codes(zero, one, one)
    torch.testing.assert_close(plain, (codes.average + codes.person[1] + codes.moment[0])[None])
    torch.testing.assert_close(mirrored, (codes.average + codes.person[3] + codes.moment[3])[None])
