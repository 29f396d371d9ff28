"""Duplicates, cuts and constant rates on time stamps made by hand."""

import numpy as np

from talk3d.io.timeline import constant_rate, find_cuts, find_duplicates, retime


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
