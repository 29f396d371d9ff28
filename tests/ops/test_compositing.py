import numpy as np
import pytest
import torch

from talk3d.ops.compositing import SAME, inner_matte, inverse, match_colours, membrane, over, paste, premultiply, resample, soft_window, unmix

CROP = np.array([[0.8, 0.1, -20.0], [-0.1, 0.8, -8.0]])
SIDE = 48


def waves(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([0.5 + 0.3 * torch.sin(rows / 9), 0.5 + 0.3 * torch.cos(columns / 11), 0.5 + 0.2 * torch.sin((rows + columns) / 13)])


def test_premultiplied_pictures_fade_to_black() -> None:
    image = torch.full((1, 3, 2, 2), 0.6)
    for alpha, expected in ((1.0, 0.6), (0.0, -1.0), (0.5, -0.2)):
        torch.testing.assert_close(premultiply(image, torch.full((1, 1, 2, 2), alpha)), torch.full((1, 3, 2, 2), expected))


def test_a_picture_over_what_is_behind_is_their_mixture() -> None:
    image, behind, alpha = 2 * torch.rand(2, 3, 6, 6) - 1, 2 * torch.rand(1, 3, 6, 6) - 1, torch.rand(2, 1, 6, 6)
    torch.testing.assert_close(over(premultiply(image, alpha), alpha, behind), torch.lerp(behind.expand_as(image), image, alpha))


def test_resampling_hits_pixel_centres() -> None:
    picture = waves(40, 60)
    assert torch.allclose(resample(picture, np.eye(2, 3), (40, 60)), picture, atol=1e-6)
    shifted = np.array([[1.0, 0, 7], [0, 1, 3]])
    assert torch.allclose(resample(picture, shifted, (20, 30)), picture[:, 3:23, 7:37], atol=1e-5)
    half = resample(picture, np.array([[2.0, 0, 0], [0, 2, 0]]), (20, 30))
    assert torch.allclose(half, torch.nn.functional.avg_pool2d(picture, 2), atol=1e-5)


def test_there_and_back_is_the_same_place() -> None:
    picture = waves(96, 96)
    there = resample(picture, inverse(CROP), (96, 96))
    back = resample(there, CROP, (96, 96))[:, 40:70, 40:70]
    assert (back - picture[:, 40:70, 40:70]).abs().max() < 0.01
    np.testing.assert_allclose(inverse(inverse(CROP)), CROP, atol=1e-12)


def frame() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (90, 110, 3), np.uint8)


def test_nothing_outside_the_matte_changes_and_inside_it_is_the_picture() -> None:
    film, picture = frame(), waves(SIDE, SIDE)
    window = soft_window(SIDE)
    result = paste(film, picture, window, CROP)
    wider = CROP + np.array([[0.0, 0, 50], [0, 0, 50]])
    opacity = resample(torch.nn.functional.pad(window, (50, 50, 50, 50)), wider, (90, 110))[0].numpy()
    assert np.array_equal(result[opacity < 1e-3], film[opacity < 1e-3]) and not np.array_equal(result, film)
    whole = opacity > 0.9999
    assert whole.sum() > 300
    expected = 255 * resample(picture, CROP, (90, 110)).permute(1, 2, 0).numpy()
    assert np.abs(result[whole] - expected[whole]).max() <= 0.51
    assert np.array_equal(paste(film, picture, torch.zeros(1, SIDE, SIDE), CROP), film)


def test_a_picture_beyond_the_frame_is_cut_off() -> None:
    film = frame()
    outside = np.array([[1.0, 0, 500], [0, 1, 500]])
    assert np.array_equal(paste(film, waves(SIDE, SIDE), soft_window(SIDE), outside), film)
    corner = np.array([[1.0, 0, 20], [0, 1, 20]])
    result = paste(film, waves(SIDE, SIDE), soft_window(SIDE), corner)
    assert np.array_equal(result[28:], film[28:]) and not np.array_equal(result[:20, :20], film[:20, :20])


def test_the_window_is_one_inside_zero_at_the_edge_and_smooth() -> None:
    window = soft_window(200)[0]
    assert window[100, 100] == 1 and not window[0].any() and not window[:, -1].any()
    assert float(window.diff(dim=0).abs().max()) < 0.15


def test_a_membrane_of_one_value_is_flat_and_one_between_two_runs_across() -> None:
    weight = torch.zeros(1, 1, 32, 32)
    weight[..., :2], weight[..., -2:] = 1, 1
    assert torch.allclose(membrane(0.3 * weight, weight), torch.full((1, 1, 32, 32), 0.3), atol=1e-5)
    value = weight.clone()
    value[..., :2] = 0
    across = membrane(value, weight)[0, 0]
    assert across[:, 0].abs().max() < 1e-5 and (across[:, -1] - 1).abs().max() < 1e-5
    assert (across.mean(0).diff() > -0.02).all()


def test_colours_meet_at_the_seam() -> None:
    source, window = waves(SIDE, SIDE), soft_window(SIDE)
    shared = torch.ones(1, SIDE, SIDE)
    matched = match_colours(source + 0.08, source, shared, window)
    assert (matched - source).abs().max() < 1e-3
    seam = (window[0] > 0) & (window[0] < 0.99)
    marked = source.clone()
    marked[:, 20:28, 20:28] += 0.2  # what is new in the middle stays
    matched = match_colours((marked - 0.06).clamp(0, 1), source, shared, window)
    assert (matched - source)[:, seam].abs().max() < 0.01 and (matched - marked)[:, 20:28, 20:28].abs().max() < 0.03
    assert torch.equal(match_colours(marked, source, torch.zeros(1, SIDE, SIDE), window), marked)
    far = match_colours(source * 0, source * 0 + 1, shared, window)
    assert float(far.max()) == pytest.approx(0.15)


def disc(side: int, radius: float, blur: float) -> torch.Tensor:
    place = torch.arange(side) + 0.5 - side / 2
    return ((radius - torch.hypot(place[:, None], place[None])) / blur + 0.5).clamp(0, 1)[None]


def test_the_inner_matte_fades_inside_the_head() -> None:
    alpha = disc(128, 40, 3)
    matte = inner_matte(alpha)
    assert matte[alpha < 0.5].max() < 1e-6 and matte[disc(128, 33, 1) == 1].min() > 1 - 1e-6
    assert (matte <= alpha + 1e-6).all() and ((matte > 0.02) & (matte < 0.98)).sum() > ((alpha > 0.02) & (alpha < 0.98)).sum()


def test_a_fringe_at_the_outline_leaves_no_edge() -> None:
    """A head that is rendered a pixel too large, with a dark fringe where it is faint, beside the same head in the frame."""
    side = 128
    head, ground = torch.tensor([0.8, 0.6, 0.5]), torch.tensor([0.3, 0.4, 0.5])
    inside = disc(side, 40, 3)
    film = (255 * (inside * head[:, None, None] + (1 - inside) * ground[:, None, None])).round().to(torch.uint8).permute(1, 2, 0).numpy()
    alpha = disc(side, 41, 6)
    picture = head[:, None, None] * torch.where(alpha > 0.5, 1.0, 0.3)
    band = ((disc(side, 46, 1) > 0) & (disc(side, 35, 1) < 1))[0].numpy()

    def steepness(frame: np.ndarray) -> float:
        down, right = np.gradient(frame.astype(np.float32).mean(-1))
        return float(np.hypot(down, right)[band].mean())

    identity = np.eye(2, 3)
    assert steepness(paste(film, picture, alpha, identity)) > 1.1 * steepness(film)
    assert steepness(paste(film, picture, inner_matte(alpha), identity)) < 1.02 * steepness(film)


def test_what_shines_through_is_taken_out_and_the_whole_is_the_picture_again() -> None:
    generator = torch.Generator().manual_seed(0)
    own, behind = torch.rand(1, 3, 32, 32, generator=generator), torch.rand(3, 32, 32, generator=generator)
    alpha = disc(32, 9, 4)[None]
    seen = alpha * own + (1 - alpha) * behind
    image, found = unmix(2 * seen - 1, alpha, 2 * behind - 1, torch.ones(1, 32, 32))
    assert (found - alpha).abs().max() < 1e-6  # the matte is right: the picture asks for no more
    torch.testing.assert_close((image + 1) / 2, alpha * own, atol=1e-5, rtol=0)


def test_hair_near_the_person_is_found_against_a_steady_wall_alone() -> None:
    behind, alpha = torch.full((3, 32, 32), 0.6), disc(32, 6, 1)[None]
    seen = behind[None].clone()
    rows, columns = (torch.tensor([15, 15, 15]), torch.tensor([24, 25, 31]))  # two hairs 3 px beside the disc, one far away
    seen[:, :, rows[:2], columns[:2]] = torch.tensor([0.0, 0.3])
    seen[:, :, rows[2], columns[2]] = 0.0
    for steady in (1.0, 0.0):
        image, found = unmix(2 * seen - 1, alpha, 2 * behind - 1, torch.full((1, 32, 32), steady))
        hairs = found[0, 0, rows, columns]
        expected = torch.tensor([(0.6 - SAME) / 0.6, (0.3 - SAME) / 0.6, 0.0]) if steady else torch.zeros(3)
        torch.testing.assert_close(hairs, expected, atol=1e-5, rtol=0)
        if not steady:
            torch.testing.assert_close(image, premultiply(2 * seen - 1, alpha))
