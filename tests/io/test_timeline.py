"""Duplicates, cuts and constant rates on time stamps made by hand."""

import numpy as np
import pytest

from talk3d.io.timeline import constant_rate, find_cuts, find_duplicates, find_jumps, largest_since, retime, shot_starts


def changes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 3.0, count)


def test_every_sixth_picture_doubled_is_found_and_nothing_else():
    change = changes(600)
    change[3::6] = 0.01
    assert np.flatnonzero(find_duplicates(change)).tolist() == list(range(3, 600, 6))


def test_a_duplicate_hidden_by_a_key_frame_is_found_by_the_pattern():
    change = changes(300)
    change[3::6] = 0.01
    change[63] = 2.0
    assert find_duplicates(change)[63]


def test_a_still_scene_and_irregular_repeats_are_no_duplicates():
    assert not find_duplicates(np.full(300, 0.001)).any()
    change = changes(300)
    change[[10, 15, 70, 71, 90, 140, 222, 250]] = 0.01
    assert not find_duplicates(change).any()
    assert not find_duplicates(np.zeros(5)).any()


def test_thirty_a_second_with_doubles_becomes_an_even_twenty_five():
    stamps = np.arange(600) / 30 + 0.08
    duplicate = np.zeros(600, bool)
    duplicate[3::6] = True
    times = retime(stamps, duplicate, 1 / 30)
    assert np.allclose(np.diff(times), 0.04, atol=1e-3)
    assert abs(times[0] - 0.08) < 0.01
    shown = constant_rate(times, 25.0, 1 / 30)
    assert len(shown) == 500
    assert (np.diff(shown) == 1).all()


def test_variable_rate_is_brought_to_the_nearest_due_picture():
    times = np.array([0.0, 0.05, 0.07, 0.20, 0.24])
    assert constant_rate(times, 25.0, 0.04).tolist() == [0, 1, 2, 2, 2, 3, 4]


def test_half_rate_repeats_and_double_rate_drops_without_drift():
    assert constant_rate(np.arange(50) / 12.5, 25.0, 0.08).tolist() == [index // 2 for index in range(100)]
    doubled = constant_rate(np.arange(100) / 50, 25.0, 0.02)
    assert (np.diff(doubled) == 2).all()
    assert abs(len(doubled) - 50) <= 1


def test_a_cut_stands_out_and_fast_motion_does_not():
    change = changes(100)
    change[40] = 30.0
    change[60:70] = np.linspace(3, 9, 10)
    assert find_cuts(change) == [40]


def test_a_jump_between_two_moments_of_one_person_stands_out_and_a_flash_of_repeats_does_not():
    change = changes(120)
    change[40], change[43], change[80] = 12.0, 11.0, 2.5
    jumps = find_jumps(change)
    assert find_cuts(change) == [40, 43]
    assert jumps[40] > 2.5
    assert jumps[80] < 1.5
    held = np.full(240, 0.01)
    held[::2] = change  # every picture shown twice
    assert find_jumps(held)[::2] == pytest.approx(jumps, rel=0.2, abs=0.5)
    assert not find_jumps(held)[1::2].any()


def test_a_key_frame_of_a_coarse_codec_is_no_cut():
    change = np.full(100, 0.5)
    change[50] = 3.0
    assert find_cuts(change) == []
    assert find_jumps(change)[50] == pytest.approx(6.0)


def test_pictures_shown_two_and_three_times_are_taken_out_of_sixty_a_second():
    shown = np.floor(np.arange(600) * 25 / 60)
    change = np.where(np.diff(shown, prepend=-1) > 0, changes(600), 0.05)
    duplicate = find_duplicates(change)
    assert duplicate.sum() == pytest.approx(350, abs=2)
    assert not duplicate[np.diff(shown, prepend=-1) > 0].any()
    assert not find_duplicates(np.r_[change[:12], np.full(300, 0.01)]).any()
    assert not find_duplicates(np.r_[255.0, np.zeros(19), change[duplicate == 0][:50]]).any()
    stamps = np.arange(600) / 60
    picked = np.flatnonzero(~duplicate)[constant_rate(retime(stamps, duplicate, 1 / 60), 25.0, 1 / 60)]
    assert (shown[picked] == np.arange(250)).mean() > 0.99


def test_a_frame_has_the_largest_value_of_the_pictures_it_passed():
    values = np.array([9.0, 1, 5, 2, 3, 4])
    assert largest_since(values, np.array([0, 1, 1, 4, 5])).tolist() == [0, 1, 0, 5, 4]


def test_a_shot_starts_where_picture_and_face_jump_together():
    sway = 3 * np.sin(np.arange(100) / 4)[:, None, None] + np.random.default_rng(2).normal(size=(100, 1, 2)) * 0.1
    points = np.random.default_rng(1).normal(size=(1, 40, 2)) * 30 + sway
    points[50:] += 8
    jumps = np.ones(100)
    jumps[[20, 50, 70]] = 2.5, 2.5, 5.0
    frames = np.arange(100)
    assert shot_starts((90,), jumps, frames, points) == (50, 90)
    assert shot_starts((), jumps, np.r_[0:45, 55:100], np.delete(points, np.s_[45:55], 0)) == ()
    assert shot_starts((3,), jumps, frames[:0], points[:0]) == (3,)


def test_a_dropped_picture_is_no_new_shot():
    run = np.random.default_rng(1).normal(size=(1, 40, 2)) * 30 + 2.0 * np.r_[0:50, 51:101][:, None, None]
    jumps = np.ones(100)
    jumps[50] = 2.4
    assert shot_starts((), jumps, np.arange(100), run) == ()
    jumps[[20, 60]], run[50:] = 0, run[50:] - 30
    assert shot_starts((), jumps, np.arange(100), run) == (50,)
