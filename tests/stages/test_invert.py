"""Inversion of pictures that the prior itself painted: the code is found again, guesses help, what is not seen stays."""

import math
from dataclasses import replace

import pytest
import torch

from talk3d.errors import ConfigError
from talk3d.models.avatar import Prior
from talk3d.models.encoder import Encoder
from talk3d.ops.geometry import head_camera
from talk3d.presets import TINY_ENCODER
from talk3d.stages.invert import WIDE_RAYS, InversionConfig, Views, _look, _Search, guess_codes, invert
from talk3d.training.losses import PictureTarget
from talk3d.types import Camera, Triplane

SHORT = InversionConfig(inversion_steps=4, tuning_steps=4)
YAWS = torch.tensor([-0.4, 0.0, 0.4])


def painted(prior: Prior, ws: torch.Tensor, moment: torch.Tensor) -> tuple[Views, Camera]:
    """Pictures of these style rows, one for each of three cameras."""
    cameras = head_camera(torch.stack([YAWS, 0 * YAWS, 0 * YAWS], -1))
    with torch.no_grad():
        rendering = prior.generator.render(ws[moment], cameras)
    return Views(target=PictureTarget(image=rendering.image, alpha=rendering.alpha), cameras=cameras, moment=moment), cameras


def test_heads_are_compared_with_necks_bent_as_they_are_held(prior: Prior) -> None:
    bent = prior.with_renderer(rest_pose=(0.1, 0.0, 0.0))
    ws = bent.generator.mapping(torch.zeros(1, 8), None, 0.0)
    views, _ = painted(bent, ws, torch.zeros(3, dtype=torch.long))
    held = torch.tensor([[0.6, 0.0, 0.0], [0.1, 0.1, 0.0], [-0.5, 0.0, 0.1]])
    volumes = bent.generator.renderer_config.bent(bent.generator.triplane(ws.expand(3, -1, -1)), held)
    side = bent.generator.renderer_config.superresolution.input_side
    with torch.no_grad():
        seen = bent.generator.render_triplane(volumes, ws[:, -1], views.cameras, neural_rendering_resolution=side)
    views = replace(views, target=PictureTarget(image=seen.image, alpha=seen.alpha), head_pose=held)
    errors = [float(_Search(bent, one, SHORT, device="cpu", seed=0).error(one)) for one in (views, replace(views, head_pose=None))]
    assert errors[0] < 1e-5 < 1e-3 < errors[1]
    searches = [_Search(bent, one, SHORT, device="cpu", seed=0) for one in (views, replace(views, head_pose=None))]
    steps = [float(search.step(0)["image"]) for search in searches]
    assert steps[0] < steps[1]
    with torch.no_grad():
        wide = [float(searches[0]._look_wide(replace(one, emphasis=None))) for one in (views, replace(views, head_pose=None))]
    assert wide[0] != wide[1]


def test_unfit_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="positive numbers"):
        InversionConfig(tuning_steps=0)


def test_pictures_that_the_prior_painted_are_found_again(prior: Prior) -> None:
    ws = prior.generator.mapping(torch.randn(1, 8))
    views, cameras = painted(prior, ws, torch.zeros(3, dtype=torch.long))
    config = InversionConfig(frames_per_step=3, inversion_steps=60, inversion_rate=0.1, tuning_steps=1, tuning_rate=1e-9, person_weight=0.0)
    before = {name: value.clone() for name, value in prior.generator.state_dict().items()}
    found = invert(prior, views, config)
    average = prior.generator.mapping(torch.zeros(1, 8), None, 0.0)
    with torch.no_grad():
        pictures = [prior.generator.render(rows.expand(3, -1, -1), cameras).image for rows in (found.person, average)]
    errors = [(picture - views.target.image).abs().mean() for picture in pictures]
    assert errors[0] < 0.2 * errors[1]
    assert all(value.equal(before[name]) for name, value in prior.generator.state_dict().items()), "the prior was changed"


def test_tuning_learns_from_wide_views_where_they_count(prior: Prior) -> None:
    ws = prior.generator.mapping(torch.randn(1, 8))
    views, cameras = painted(prior, ws, torch.zeros(3, dtype=torch.long))
    below = torch.zeros_like(views.target.alpha)
    below[:, :, 5 * below.shape[-1] // 8 :] = 1.0
    white = PictureTarget(image=torch.ones_like(views.target.image), alpha=torch.ones_like(below))
    wide = replace(views, target=white, emphasis=below)
    config = InversionConfig(inversion_steps=5, tuning_steps=30, tuning_rate=3e-3)

    def run(views: Views, weight: float) -> tuple[float, list[set[str]]]:
        heard: list[set[str]] = []
        found = invert(prior, views, replace(config, wide_weight=weight), progress=lambda s, n, t, values: heard.append(set(values)))
        person = found.personalized({})
        with torch.no_grad():
            planes = replace(person.triplane, planes=person.identity.expand(3, -1, -1, -1, -1))
            rendering = person.render(planes, cameras)
        return float(rendering.raw[:, :, -(rendering.raw.shape[-1] // 4) :].mean()), heard

    (seen, with_wide), (off, without) = (run(replace(views, wide=wide), weight) for weight in (4.0, 0.0))
    assert any("wide" in names for names in with_wide) and not any("wide" in names and "person" in names for names in with_wide)
    assert not any("wide" in names for names in without)
    assert seen > off + 0.05


def test_a_wide_view_is_as_wrong_as_its_picture_where_it_counts(prior: Prior) -> None:
    views, cameras = painted(prior, prior.generator.mapping(torch.randn(1, 8)), torch.zeros(3, dtype=torch.long))
    search = _Search(prior, views, SHORT, device="cpu", seed=0)
    with torch.no_grad():
        colours, matte, _ = _look(search.generator, search.tuned.triplane(search.codes.person_rows()), cameras[1:2], WIDE_RAYS)
        image, alpha = (rays.mT.unflatten(2, (WIDE_RAYS, WIDE_RAYS)) for rays in (colours, matte))
        left = torch.zeros_like(alpha)
        left[..., : WIDE_RAYS // 4] = 1.0
        for change, emphasis, expected in ((0.0, None, 0.0), (0.5, None, 0.5), (0.5, left, 0.125), (0.5 * (1 - left), left, 0.0)):
            target = PictureTarget(image=image + change, alpha=alpha)
            wide = Views(target=target, cameras=cameras[1:2], moment=torch.zeros(1, dtype=torch.long), emphasis=emphasis)
            assert float(search._look_wide(wide)) == pytest.approx(expected, abs=1e-5)


def test_the_wide_term_is_there_only_in_tuning_with_wide_views_that_weigh(prior: Prior) -> None:
    views, _ = painted(prior, prior.generator.mapping(torch.randn(1, 8)), torch.zeros(3, dtype=torch.long))
    for wide, weight in ((views, 1.0), (views, 0.0), (None, 1.0)):
        search = _Search(prior, replace(views, wide=wide), replace(SHORT, wide_weight=weight), device="cpu", seed=0)
        there = ["wide" in search.step(number) for number in range(8)]
        assert there == [wide is not None and weight > 0 and number == 5 for number in range(8)]  # every third, from 2 on; 2 still inverts


def test_moments_have_codes_of_their_own_round_the_person(prior: Prior) -> None:
    ws = prior.generator.mapping(torch.randn(2, 8))
    views, _ = painted(prior, ws, torch.tensor([0, 1, 1]))
    found = invert(prior, views, SHORT)
    assert found.moments.shape == (2, prior.generator.num_ws, 16)
    assert not found.moments[0].equal(found.moments[1])
    torch.testing.assert_close(found.person, found.moments.mean(0, keepdim=True))


def test_the_search_starts_from_the_average_or_from_the_encoders_guess(prior: Prior) -> None:
    ws = prior.generator.mapping(torch.randn(2, 8))
    views, cameras = painted(prior, ws, torch.tensor([0, 1, 1]))
    average = prior.generator.mapping_network.w_avg
    assert guess_codes(prior, views).equal(average.expand(2, -1))
    prior.encoder = Encoder(TINY_ENCODER, 16).eval()
    guess = guess_codes(prior, views)
    for moment, rows in ((0, slice(0, 1)), (1, slice(1, 3))):
        alone = prior.encoder(views.target.image[None, rows], views.target.alpha[None, rows], cameras[rows])[0]
        torch.testing.assert_close(guess[moment], average + alone)


def test_locality_keeps_what_the_pictures_do_not_show(prior: Prior) -> None:
    ws = prior.generator.mapping(torch.randn(1, 8))
    views, _ = painted(prior, ws, torch.zeros(3, dtype=torch.long))
    black = PictureTarget(image=torch.full_like(views.target.image[:1], -1.0), alpha=torch.zeros_like(views.target.alpha[:1]))
    front = Views(target=black, cameras=views.cameras[1:2], moment=torch.zeros(1, dtype=torch.long))
    config = InversionConfig(inversion_steps=1, inversion_rate=1e-9, tuning_steps=30, tuning_rate=3e-3, locality_every=1)
    side = head_camera(torch.tensor([[0.8, 0.0, 0.0]]))
    changes = []
    for weight in (0.0, 5.0):
        found = invert(prior, front, replace(config, locality_weight=weight))
        with torch.no_grad():
            changes.append((found.generator.render(found.person, side).raw - prior.generator.render(found.person, side).raw).abs().mean().item())
    assert changes[1] < 0.7 * changes[0] and math.isfinite(changes[1])


def test_the_persons_shape_stays_where_the_pictures_do_not_show_it(prior: Prior) -> None:
    ws = prior.generator.mapping(torch.randn(1, 8))
    views, _ = painted(prior, ws, torch.zeros(3, dtype=torch.long))
    clear = PictureTarget(image=torch.full_like(views.target.image[:1], -1.0), alpha=torch.zeros_like(views.target.alpha[:1]))
    front = Views(target=clear, cameras=views.cameras[1:2], moment=torch.zeros(1, dtype=torch.long))
    config = InversionConfig(
        inversion_steps=1, inversion_rate=1e-9, tuning_steps=30, tuning_rate=1e-9, own_rate=0.1, locality_weight=0.0, locality_every=2
    )
    side = head_camera(torch.tensor([[0.8, 0.0, 0.0]]))
    changes = []
    for weight in (0.0, 20.0):
        found = invert(prior, front, replace(config, shape_weight=weight))
        with torch.no_grad():
            planes = found.generator.triplane(found.person)
            own = Triplane(planes=planes.planes + found.own, axes=planes.axes)
            shown, before = (found.generator.render_triplane(x, found.person[:, -1], side) for x in (own, planes))
        changes.append((shown.raw_alpha - before.raw_alpha).abs().mean().item())
    assert changes[1] < 0.7 * changes[0]


def test_the_person_can_be_frozen(prior: Prior) -> None:
    views, _ = painted(prior, prior.generator.mapping(torch.randn(1, 8)), torch.zeros(3, dtype=torch.long))
    found = invert(prior, views, SHORT)
    person = found.personalized({"made": "here"})
    assert person.provenance == {"made": "here"}
    with torch.no_grad():
        torch.testing.assert_close(person.identity, found.generator.triplane(found.person).planes + found.own)


def test_the_generator_that_shows_the_validation_views_best_is_kept(prior: Prior) -> None:
    ws = prior.generator.mapping(torch.randn(1, 8))
    views, _ = painted(prior, ws, torch.zeros(3, dtype=torch.long))
    seen: list[dict[str, float]] = []
    config = replace(SHORT, tuning_steps=6, tuning_rate=0.5, validation_every=2)
    kept = invert(prior, replace(views, validation=views), config, progress=lambda _s, _n, _t, values: seen.append(dict(values)))
    with torch.no_grad():
        image = kept.generator.render(kept.person.expand(3, -1, -1), views.cameras).image
    errors = [values["validation"] for values in seen if "validation" in values]
    found = (image - views.target.image).abs().mean().item()
    assert errors and found <= min(errors) + 1e-5
    gentle = invert(prior, views, replace(SHORT, tuning_rate=1e-6))
    assert 0 <= gentle.drift < 0.01 < kept.drift and seen[-1] == {"drift": kept.drift}


def test_what_is_the_persons_own_sharpens_what_tuning_shows(prior: Prior) -> None:
    views, _ = painted(prior, prior.generator.mapping(torch.randn(1, 8)), torch.zeros(3, dtype=torch.long))
    noisy = replace(
        views, target=PictureTarget(image=(views.target.image + 0.3 * torch.randn_like(views.target.image)).clamp(-1, 1), alpha=views.target.alpha)
    )
    errors = []
    for rate in (0.0, 0.1):
        found = invert(prior, noisy, replace(SHORT, tuning_steps=15, tuning_rate=1e-5, own_rate=rate))
        assert bool(found.own.any()) == (rate > 0)
        person = found.personalized({})
        with torch.no_grad():
            image = torch.cat([person.render(person.triplane, noisy.cameras[i : i + 1]).image for i in range(3)])
        errors.append(float((image - noisy.target.image).abs().mean()))
    assert errors[1] < 0.97 * errors[0]
