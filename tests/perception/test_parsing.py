"""The guided filter against its definition, the median in time, and a matte of a rendered person."""

import numpy as np
import pytest

from talk3d.errors import WeightsError
from talk3d.perception import parsing


def test_guided_filter_of_a_flat_guide_is_two_box_means_and_of_itself_keeps_edges():
    rng = np.random.default_rng(0)
    values = rng.random((40, 40), dtype=np.float32)
    flat = parsing.guided_filter(np.full((40, 40), 0.5, np.float32), values, 2, 1e-3)
    twice = parsing.uniform_filter(parsing.uniform_filter(values, 5, mode="nearest"), 5, mode="nearest")
    assert np.abs(flat - twice).max() < 1e-5
    edge = np.zeros((40, 40), np.float32)
    edge[:, 20:] = 1
    soft = parsing.uniform_filter(edge, 9, mode="nearest")
    sharp = parsing.guided_filter(edge, soft, 4, 1e-4)
    assert (sharp[:, 21] - sharp[:, 18]).mean() > 1.5 * (soft[:, 21] - soft[:, 18]).mean()


def test_median_in_time_removes_a_flicker_and_keeps_the_count():
    mattes = [np.full((2, 2), value, np.float32) for value in (0.2, 0.2, 1.0, 0.2, 0.4)]
    steady = [int(matte[0, 0]) for matte in parsing.steady_mattes(mattes)]
    assert steady == [51, 51, 51, 102, 102]
    assert list(parsing.steady_mattes([])) == []
    assert len(list(parsing.steady_mattes(mattes[:1]))) == 1


def test_the_matte_of_a_person_covers_the_head_and_not_the_background(portrait: np.ndarray):
    try:
        matting = parsing.SelfieMatting()
    except WeightsError as error:
        pytest.skip(f"the matting network is neither cached nor to be had: {error}")
    assert isinstance(matting, parsing.Matting)
    matte = matting(portrait)
    assert matte.shape == portrait.shape[:2]
    assert matte[150:230, 150:230].min() > 0.95
    assert matte[:60, :60].max() < 0.05
    assert matte[:60, -60:].max() < 0.05
