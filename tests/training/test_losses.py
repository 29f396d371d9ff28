"""Losses against what they mean: zero for equals, closed forms, no dependence on size."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from talk3d.errors import ConfigError
from talk3d.models.avatar import PersonalizedGenerator
from talk3d.models.conditioning import Conditioner, ConditioningConfig
from talk3d.models.renderer import TriplaneRenderer
from talk3d.ops.geometry import head_camera, view_angles
from talk3d.presets import TINY
from talk3d.training.losses import (
    UNSEEN_DEG,
    Heard,
    MouthShapes,
    PictureTarget,
    SideViews,
    density_variation,
    depth_loss,
    hearing_losses,
    laplacian_l1,
    laplacian_pyramid,
    lay_over,
    mouth_shapes,
    picture_losses,
    quiet_frames,
    random_backgrounds,
    run_chances,
    shut_mouth,
    temporal_loss,
    unlikeness,
    unusual,
    weighted_sum,
)
from talk3d.types import AudioFeatures, Rendering, Triplane, Waveform


def rendering(image: torch.Tensor, alpha: torch.Tensor) -> Rendering:
    raw, raw_alpha = (F.avg_pool2d(x, 2) for x in (image, alpha))
    return Rendering(image=image, alpha=alpha, raw=raw, raw_alpha=raw_alpha, features=raw, depth=raw_alpha)


def test_pyramid_bands_add_up_to_the_picture() -> None:
    x = torch.randn(2, 3, 16, 16)
    bands = laplacian_pyramid(x, 3)
    assert [band.shape[-1] for band in bands] == [16, 8, 4, 2]
    total = bands[-1]
    for band in reversed(bands[:-1]):
        total = band + F.interpolate(total, scale_factor=2.0, mode="bilinear", align_corners=False)
    torch.testing.assert_close(total, x)


def test_pyramid_loss_of_a_constant_is_its_height() -> None:
    x = torch.zeros(1, 3, 16, 16)
    assert laplacian_l1(x, x).item() == 0
    assert laplacian_l1(x, x + 0.3).item() == pytest.approx(0.3, abs=1e-6)
    assert laplacian_l1(x, x + 0.3, weight=torch.full((1, 1, 16, 16), 2.0)).item() == pytest.approx(0.6, abs=1e-6)


def test_pyramid_loss_weighs_where_the_weight_is() -> None:
    x, y = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    y[..., 2:6, 2:6] = 1
    weight = torch.ones(1, 1, 16, 16)
    near, away = weight.clone(), weight.clone()
    near[..., :8, :8] = 5
    away[..., 8:, 8:] = 5
    plain = laplacian_l1(x, y, weight=weight)
    torch.testing.assert_close(plain, laplacian_l1(x, y))
    assert laplacian_l1(x, y, weight=near) > 2 * plain and laplacian_l1(x, y, weight=away) < 1.6 * plain


def test_equal_pictures_cost_nothing() -> None:
    image, alpha = torch.rand(2, 3, 16, 16), torch.rand(2, 1, 16, 16)
    smooth = torch.full_like(image, 0.2)
    losses = picture_losses(rendering(smooth, torch.ones_like(alpha)), PictureTarget(image=smooth, alpha=torch.ones_like(alpha)))
    assert losses.keys() == {"image", "detail", "alpha", "raw"}
    assert all(value.abs() < 1e-6 for value in losses.values())


def test_each_loss_sees_its_own_difference() -> None:
    image, alpha = torch.zeros(1, 3, 16, 16), torch.full((1, 1, 16, 16), 0.5)
    brighter = picture_losses(rendering(image + 0.2, alpha), PictureTarget(image=image, alpha=alpha))
    assert {name: round(value.item(), 5) for name, value in brighter.items()} == {"image": 0.2, "detail": 0.2, "alpha": 0.0, "raw": 0.2}
    denser = picture_losses(rendering(image, alpha + 0.1), PictureTarget(image=image, alpha=alpha))
    assert {name: round(value.item(), 5) for name, value in denser.items()} == {"image": 0.0, "detail": 0.0, "alpha": 0.2, "raw": 0.0}
    heavier = picture_losses(rendering(image + 0.2, alpha), PictureTarget(image=image, alpha=alpha), torch.full((1, 1, 16, 16), 3.0))
    assert heavier["image"].item() == pytest.approx(0.6) and heavier["raw"].item() == pytest.approx(0.2)


def test_over_something_bright_errors_of_opacity_are_seen() -> None:
    image, alpha, grey = torch.zeros(2, 3, 16, 16), torch.full((2, 1, 16, 16), 0.5), torch.full((2, 3, 16, 16), 0.6)
    same = picture_losses(*lay_over(rendering(image, alpha), PictureTarget(image=image, alpha=alpha), grey))
    assert all(value.abs() < 1e-6 for value in same.values())
    thinner = picture_losses(*lay_over(rendering(image, alpha - 0.1), PictureTarget(image=image, alpha=alpha), grey))
    assert {name: round(value.item(), 5) for name, value in thinner.items()} == {"image": 0.16, "detail": 0.16, "alpha": 0.2, "raw": 0.16}
    black = picture_losses(*lay_over(rendering(image, alpha - 0.1), PictureTarget(image=image, alpha=alpha), -torch.ones_like(image)))
    assert black["image"].abs() < 1e-6 and black["raw"].abs() < 1e-6


def test_half_of_the_runs_are_laid_over_the_plate_and_half_over_one_colour() -> None:
    plate = 2 * torch.rand(3, 4, 4) - 1
    drawn = random_backgrounds(plate, 1200, 3, torch.Generator().manual_seed(0)).unflatten(0, (400, 3))
    assert bool((drawn == drawn[:, :1]).all())
    first, even = drawn[:, 0], drawn[:, 0, :, :1, :1]
    on_plate, flat = (first == plate).all((1, 2, 3)), (first == even).all((1, 2, 3))
    assert bool((on_plate ^ flat).all()) and 160 < on_plate.sum() < 240
    colours = even[flat].flatten(1)
    assert colours.abs().max() <= 1 and colours.std(0).min() > 0.5 and len(colours.unique(dim=0)) == len(colours)


def test_losses_do_not_depend_on_size_or_batch() -> None:
    def losses(batch: int, side: int) -> dict[str, float]:
        image, alpha = torch.zeros(batch, 3, side, side), torch.ones(batch, 1, side, side)
        found = picture_losses(rendering(image + 0.25, alpha), PictureTarget(image=image, alpha=alpha))
        return {name: round(value.item(), 5) for name, value in found.items()}

    assert losses(1, 16) == losses(3, 32)


def test_changes_are_compared_within_runs_and_what_stays_costs_nothing() -> None:
    target, weight = torch.rand(6, 3, 4, 4), torch.rand(6, 1, 4, 4)
    image = torch.rand(6, 3, 4, 4).requires_grad_()
    found = temporal_loss(image, target, weight, 3)
    slow = []
    for i in (0, 1, 3, 4):  # two runs of three
        change = (image[i + 1] - image[i]) - (target[i + 1] - target[i])
        slow.append(change.abs() * (weight[i] + weight[i + 1]) / 2)
    torch.testing.assert_close(found, torch.stack(slow).mean())
    found.backward()
    assert image.grad is not None and (image.grad.abs().amax((1, 2, 3)) > 0).all()
    off = target + 0.3  # the same in every frame
    assert temporal_loss(off, target, weight, 2) < 1e-6
    frozen = target[:1].expand(6, -1, -1, -1)
    even = torch.ones(6, 1, 4, 4)
    torch.testing.assert_close(temporal_loss(frozen, target, even, 6), target.diff(dim=0).abs().mean())


def test_unlikeness_is_one_less_the_cosine() -> None:
    one, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    assert unlikeness(one, one) == 0 and unlikeness(one, other).item() == pytest.approx(0.2) and unlikeness(one, -one) == 2


def test_runs_are_as_likely_as_their_frames_and_stay_within_shots() -> None:
    chances = torch.rand(7)
    assert run_chances(chances, 1, (3,)).equal(chances)
    torch.testing.assert_close(run_chances(chances, 3), torch.stack([chances[i : i + 3].mean() for i in range(5)]))
    assert run_chances(chances, 2, (3,)).gt(0).tolist() == [True, True, False, True, True, True]
    assert run_chances(chances, 3, (1, 6, 9)).gt(0).tolist() == [False, True, True, True, False]
    for length, cuts in ((8, ()), (4, (3, 4))):
        with pytest.raises(ConfigError, match=f"need {length} frames in a row, got 7 frames"):
            run_chances(chances, length, cuts)


def test_distances_are_compared_where_they_are_known_at_the_rays() -> None:
    seen = replace(rendering(torch.zeros(1, 3, 4, 4), torch.ones(1, 1, 4, 4)), depth=torch.full((1, 1, 2, 2), 2.5))
    truth = torch.full((1, 1, 4, 4), 2.7)
    truth[..., 2:, 2:] = torch.tensor([[2.5, 2.5], [2.5, 0.0]])  # one of these four is not known
    assert depth_loss(seen, truth).item() == pytest.approx(0.2, abs=1e-6)
    truth[..., 0, 0] = 3.1
    assert depth_loss(seen, truth).item() == pytest.approx((0.3 + 0.2 + 0.2) / 3, abs=1e-6)
    assert depth_loss(seen, torch.zeros(1, 1, 4, 4)).item() == 0


def test_density_variation_is_zero_for_flat_planes_and_grows_with_roughness() -> None:
    renderer = TriplaneRenderer(TINY.renderer)
    planes = torch.randn(2, 3, 4, 32, 32)

    def variation(scale: float) -> float:
        triplane = Triplane(planes=scale * planes, axes="fixed")
        return density_variation(renderer, triplane, torch.Generator().manual_seed(0)).item()

    flat, gentle, rough = variation(0.0), variation(0.1), variation(1.0)
    assert flat == 0 and 0 < gentle < rough
    assert variation(1.0) == rough


def test_weighted_sum_multiplies_and_misses_nothing() -> None:
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    assert weighted_sum(terms, {"a": 0.5, "b": 2.0, "unused": 9.0}).item() == 7
    with pytest.raises(KeyError):
        weighted_sum(terms, {"a": 1.0})


def _talking_looks(opening: torch.Tensor, pitch: torch.Tensor) -> torch.Tensor:
    """Forty numbers of a mouth: some go by its opening, and all by the head's pitch and its square."""
    ways = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    return opening[:, None] * ways[0] + 300 * pitch[:, None] * ways[1] + 500 * pitch.square()[:, None] * ways[2]


def test_mouth_shapes_follow_the_mouth_and_not_the_head() -> None:
    time = torch.linspace(0, 20, 120)
    opening, pitch = 10 * torch.sin(3.1 * time), 0.1 * torch.sin(1.7 * time)
    pose = torch.stack([0 * time, pitch, 0 * time], 1)
    shapes = mouth_shapes(_talking_looks(opening, pitch), pose, 120)
    first = shapes.values[:, 0]
    assert abs(torch.corrcoef(torch.stack([first, opening]))[0, 1]) > 0.999
    assert shapes.importance[0] > 0.95 and shapes.importance.sum() == pytest.approx(1)
    assert first.square().mean() == pytest.approx(1, abs=1e-3)


def test_mouth_shapes_are_found_in_the_frames_that_are_learnt_from_and_told_of_all() -> None:
    time = torch.linspace(0, 20, 120)
    opening, pitch = 10 * torch.sin(3.1 * time), 0.1 * torch.sin(1.7 * time)
    looks, pose = _talking_looks(opening, pitch), torch.stack([0 * time, pitch, 0 * time], 1)
    known = mouth_shapes(looks, pose, 90)
    alone = mouth_shapes(looks[:90], pose[:90], 90)
    torch.testing.assert_close(known.values[:90, 0], alone.values[:, 0])
    torch.testing.assert_close(known.importance, alone.importance)
    assert abs(torch.corrcoef(torch.stack([known.values[90:, 0], opening[90:]]))[0, 1]) > 0.98


def test_few_frames_have_few_mouth_shapes_and_the_rest_are_zero() -> None:
    shapes = mouth_shapes(torch.randn(3, 40), torch.zeros(3, 3), 3)
    assert shapes.values.shape == (3, 8) and bool((shapes.values[:, 2:] == 0).all()) and bool((shapes.importance[2:] == 0).all())
    assert shapes.values.isfinite().all() and bool((shapes.importance[:2] > 0).all())


def _listener(**config) -> tuple[Conditioner, Heard]:
    torch.manual_seed(0)
    conditioner = Conditioner(ConditioningConfig(audio_channels=8, token_width=16, mouth_shapes=2, **config))
    shapes = MouthShapes(values=torch.randn(12, 2), importance=torch.tensor([0.75, 0.25]))
    audio = AudioFeatures(values=torch.randn(12, 16, 8), fps=25.0, source="test")
    return conditioner, Heard(audio=audio, shapes=shapes, postures=torch.randn(12, 4), quiet=torch.tensor([3]), shut=torch.tensor([1.0, -1.0]))


def _taught(conditioner: Conditioner, heard: Heard) -> float:
    """Teach it for a while, and return what is left of the error."""
    optimizer = torch.optim.Adam(conditioner.parameters(), lr=1e-2)
    for _ in range(150):
        loss = hearing_losses(conditioner, heard, torch.arange(11), 0.0, torch.Generator())["hearing"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_hearing_losses_are_weighted_square_errors() -> None:
    conditioner, heard = _listener()
    frames, values, importance = torch.arange(11), heard.shapes.values, heard.shapes.importance
    losses = hearing_losses(conditioner, heard, frames, 0.0, torch.Generator())
    with torch.no_grad():
        mouth = conditioner.mouth_head(conditioner.audio_token(heard.audio.around(torch.arange(12))))
        held = conditioner.mouth_head(conditioner.audio_token(heard.audio.values[3].expand(1, 8, -1, -1)))
    error = ((mouth - values).square() * importance).sum(1)
    torch.testing.assert_close(losses["hearing"].detach(), (error[:-1].mean() + error[1:].mean()) / 2)
    torch.testing.assert_close(losses["velocity"].detach(), ((mouth.diff(dim=0) - values.diff(dim=0)).square() * importance).sum(1).mean())
    torch.testing.assert_close(losses["silence"].detach(), ((held - heard.shut).square() * importance).sum())


def test_hearing_losses_fall_when_taught_and_without_silence_there_is_no_such_term() -> None:
    conditioner, heard = _listener()
    heard = replace(heard, quiet=torch.tensor([], dtype=torch.long))
    optimizer = torch.optim.Adam(conditioner.parameters(), lr=3e-3)
    seen = []
    for _ in range(60):
        losses = hearing_losses(conditioner, heard, torch.arange(11), 0.0, torch.Generator())
        optimizer.zero_grad()
        losses["hearing"].backward()
        optimizer.step()
        seen.append(losses["hearing"].item())
    assert seen[-1] < 0.3 * seen[0] and losses.keys() == {"hearing", "velocity"}


def test_mouths_of_one_sound_that_differ_as_the_head_turns_are_told_apart() -> None:
    errors = []
    for limits in (False, True):
        conditioner, heard = _listener(limits=limits)
        same = replace(heard.audio, values=heard.audio.values[:1].expand(12, -1, -1))
        turned = MouthShapes(values=heard.postures[:, :2] * heard.postures[:, 1:3], importance=heard.shapes.importance)
        heard = replace(heard, audio=same, shapes=turned, quiet=torch.tensor([], dtype=torch.long))
        errors.append(_taught(conditioner, heard))
    assert errors[1] < 0.1 * errors[0]


def test_smiles_that_no_sound_tells_are_told_by_the_cheeks() -> None:
    errors = []
    for cheeks in (False, True):
        conditioner, heard = _listener(limits=True, cheeks=cheeks)
        smiles = MouthShapes(values=heard.postures[:, 3:] * torch.tensor([[1.0, -0.5]]), importance=heard.shapes.importance)
        heard = replace(heard, audio=replace(heard.audio, values=heard.audio.values[:1].expand(12, -1, -1)), shapes=smiles, quiet=heard.quiet[:0])
        heard = replace(heard, postures=torch.cat([torch.zeros(12, 3), heard.postures[:, 3:].clamp(-1, 1)], 1))
        errors.append(_taught(conditioner, heard))
    assert errors[1] < 0.3 * errors[0]


def test_with_noise_sounds_are_mixed_and_so_is_what_should_be_heard() -> None:
    conditioner, heard = _listener(limits=True)
    assert conditioner.mouth_turned is not None
    torch.nn.init.normal_(conditioner.mouth_turned.alone.weight)
    mixed: list[torch.Tensor] = []
    listen = conditioner.audio_token
    conditioner.audio_token = lambda windows: mixed.append(windows) or listen(windows)
    frames = torch.arange(0, 11, 2)
    losses = hearing_losses(conditioner, heard, frames, 1e-7, torch.Generator().manual_seed(5))
    pairs = torch.cat([frames, frames + 1])
    sounds = heard.audio.around(pairs).flatten(1)
    shares = mixed[0][: len(pairs)].flatten(1) @ torch.linalg.pinv(sounds)  # of every frame's sound in every mixture
    torch.testing.assert_close(shares.sum(1), torch.ones(len(pairs)), atol=1e-4, rtol=0)
    assert shares.min() > -1e-4 and int((shares > 1e-3).sum(1).max()) == 2
    torch.testing.assert_close(shares[:6, :6], shares[6:, 6:], atol=1e-4, rtol=0)  # both frames of a pair alike, so that their change stays a change
    with torch.no_grad():
        found = conditioner.mouth(listen(mixed[0][: len(pairs)]), shares @ heard.postures[pairs])
    wanted = shares @ heard.shapes.values[pairs]
    torch.testing.assert_close(losses["hearing"].detach(), ((found - wanted).square() * heard.shapes.importance).sum(1).mean(), rtol=1e-3, atol=0)


def test_unusual_mouths_have_the_greater_chance() -> None:
    shut, wide = 0.1 * torch.randn(950, 8), 3 + torch.randn(50, 8)
    chances = unusual(torch.cat([shut, wide]))
    assert chances.sum().item() == pytest.approx(1, abs=1e-5) and bool((chances > 0).all())
    assert chances[950:].min() > chances[:950].mean() and chances[950:].sum() > 0.7
    torch.testing.assert_close(unusual(torch.zeros(5, 2)), torch.full((5,), 0.2))
    many = unusual(torch.cat([shut, wide]).repeat(5, 1))
    assert many[950:1000].sum() > 5 * many[:950].sum() * 50 / 950


def test_frames_are_quiet_where_nothing_sounds_near() -> None:
    samples = torch.cat([torch.ones(25 * 640), torch.zeros(25 * 640), torch.ones(10 * 640)])
    quiet = quiet_frames(Waveform(samples=samples, sample_rate_hz=16000), 25.0, 60)
    assert quiet.nonzero()[:, 0].tolist() == list(range(28, 47))
    assert quiet_frames(Waveform(samples=samples[:640], sample_rate_hz=16000), 25.0, 60).shape == (60,)


def test_the_shut_mouth_is_that_of_the_least_open_frames() -> None:
    values = torch.arange(20.0)[:, None].expand(-1, 2)
    shapes = MouthShapes(values=values, importance=torch.tensor([0.5, 0.5]))
    assert shut_mouth(shapes, torch.arange(20.0).flip(0)).tolist() == [18.0, 18.0]


def _side_person() -> PersonalizedGenerator:
    torch.manual_seed(3)
    person = PersonalizedGenerator(TINY.renderer, {})
    with torch.no_grad():
        person.identity.normal_()
        person.renderer.decoder.net[2].bias[0] = 4  # something is there
    return person


def test_a_person_who_stays_as_it_was_looks_so_from_the_side_and_another_does_not() -> None:
    person = _side_person()
    filmed = head_camera(torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.1, 0.0]]))
    sides = SideViews(filmed)
    sides.take(person, person.triplane)
    seen = view_angles(sides.cameras.cam2world[:, :3, :3])[:, :2].rad2deg()
    assert len(seen) == len(sides.pictures) and torch.cdist(seen, torch.tensor([[0.0, 0.0], [5.7, 5.7]])).min() > UNSEEN_DEG - 0.5
    assert {round(float(yaw)) for yaw in seen[:, 0]} == set(range(-50, 51, 10))  # straight ahead from above and below
    choice, rays = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    same = float(sides.loss(person, person.triplane, choice, rays).detach())
    brighter = copy.deepcopy(person)
    with torch.no_grad():
        brighter.renderer.decoder.net[2].bias[1:4] += 3
    other = sides.loss(brighter, brighter.triplane, choice, rays)
    assert 3 * same < float(other.detach())
    (gradient,) = torch.autograd.grad(other, [brighter.identity])
    assert gradient.abs().max() > 0


def test_who_was_filmed_from_everywhere_has_no_sides() -> None:
    person = _side_person()
    everywhere = torch.cartesian_prod(torch.arange(-50.0, 51.0, 10.0), torch.arange(-20.0, 21.0, 10.0), torch.tensor([0.0])).deg2rad()
    sides = SideViews(head_camera(everywhere))
    sides.take(person, person.triplane)
    assert float(sides.loss(person, person.triplane, torch.Generator(), torch.Generator())) == 0
