"""The guided filter against its definition, the median in time, a matte of a rendered person; parts of a face and their regions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from talk3d.errors import WeightsError
from talk3d.perception import parsing
from talk3d.perception.bisenet import BiSeNet


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


def test_a_parser_gives_each_pixel_the_part_that_the_network_sees_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save(BiSeNet().state_dict(), tmp_path / "bisenet.pth")
    parser = parsing.BiSeNetParser(tmp_path / "bisenet.pth")
    assert isinstance(parser, parsing.FaceParser) and parser.source == "BiSeNet 79999"
    asked: list[tuple[int, ...]] = []

    def by_brightness(pictures: Tensor) -> Tensor:
        """Skin where it is dark, hair where it is bright."""
        asked.append(tuple(pictures.shape))
        logits = torch.zeros(1, 19, *pictures.shape[2:])
        logits[:, 1], logits[:, 17] = 20 * (0.5 - pictures.mean(1)), 20 * (pictures.mean(1) - 0.5)
        return logits

    monkeypatch.setattr(parser, "network", by_brightness)
    picture = np.zeros((128, 128, 3), np.uint8)
    picture[:, 64:] = 255
    parts = parser(picture)
    assert asked == [(1, 3, 512, 512)]
    assert parts.dtype == np.uint8 and (parts[:, :63] == 1).all() and (parts[:, 65:] == 17).all()


def test_regions_have_soft_edges_and_no_specks():
    parts = np.zeros((60, 60), np.uint8)
    parts[10:50, 10:50] = 1
    parts[30:34, 20:40] = 12
    parts[55, 55] = 12
    mouth, face = (parsing.region_matte(parts, region) for region in ("mouth", "face"))
    assert mouth[31:33, 21:39].min() == 1 and mouth[55, 55] > 0  # a pixel is more than a hundredth of this mouth
    assert face[55, 55] == 0 and face[20, 20] == 1
    assert 0 < face[10, 30] < 1 and face[8, 30] == 0
    assert parsing.region_matte(parts, "hair").max() == 0
    assert set(parsing.REGIONS["mouth"]) | set(parsing.REGIONS["eyes"]) <= set(parsing.REGIONS["face"])
