"""Labels of a drawn head whose parts are known."""

import numpy as np
import pytest

from talk3d.perception.facetemplate import load_template
from talk3d.perception.regions import RegionLabeller, soft_region
from talk3d.types.face import REGIONS

SIDE = 128
SKIN, HAIR, SHIRT, WALL = (210, 160, 130), (60, 40, 25), (30, 60, 160), (120, 130, 120)


def head(bald: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Picture, matte and points of a head with ears, hair, neck and shirt."""
    points = load_template("task").points.numpy()
    landmarks = (points[:, :2] * (1, -1) * 200 + (SIDE / 2, SIDE / 2)).astype(np.float32)
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    top, chin = landmarks[10, 1], landmarks[152, 1]
    middle, half = (top + chin) / 2, (chin - top) / 2
    across = (columns - SIDE / 2) / half
    skull = across**2 + ((rows - middle + 0.15 * half) / (1.35 * half)) ** 2 < 1
    face = (across / 0.88) ** 2 + ((rows - middle) / (1.1 * half)) ** 2 < 1
    neck = (np.abs(across) < 0.5) & (rows > middle) & (rows < chin + 8)
    shirt = (rows >= chin + 8) & (np.abs(across) < 1.3)
    picture = np.full((SIDE, SIDE, 3), WALL, np.uint8)
    for part, colour in ((skull, SKIN if bald else HAIR), (neck, SKIN), (face, SKIN), (shirt, SHIRT)):
        picture[part] = colour
    picture = np.clip(picture + np.random.default_rng(0).normal(0, 4, picture.shape), 0, 255).astype(np.uint8)
    matte = (255 * (skull | face | neck | shirt)).astype(np.uint8)
    return picture, matte, landmarks


def share(labels: np.ndarray, name: str) -> float:
    return float((labels == REGIONS.index(name)).mean())


def test_every_part_of_a_head_has_its_name():
    picture, matte, landmarks = head()
    labels = RegionLabeller()(picture, matte, landmarks)
    named = {name: labels[round(y), round(x)] for name, (x, y) in {"mouth": landmarks[13], "eyes": landmarks[[159, 145]].mean(0)}.items()}
    assert named == {name: REGIONS.index(name) for name in named}
    chin, top = landmarks[152], landmarks[10]
    assert labels[round(top[1]) - 9, round(top[0])] == REGIONS.index("hair")
    assert labels[round(landmarks[4, 1]), round(landmarks[4, 0])] == REGIONS.index("face")
    assert labels[round(chin[1]) + 5, round(chin[0])] == REGIONS.index("neck")
    assert labels[-3, SIDE // 2] == REGIONS.index("torso")
    assert (labels[matte == 0] == 0).all()
    assert (labels[matte > 0] > 0).all()


def test_a_bald_head_has_next_to_no_hair():
    picture, matte, landmarks = head()
    hairy = share(RegionLabeller()(picture, matte, landmarks), "hair")
    picture, matte, landmarks = head(bald=True)
    assert share(RegionLabeller()(picture, matte, landmarks), "hair") < 0.6 * hairy


def test_no_person_and_no_colours_give_no_labels():
    picture, matte, landmarks = head()
    assert RegionLabeller()(picture, np.zeros_like(matte), landmarks).max() == 0


def test_soft_regions_share_the_matte():
    picture, matte, landmarks = head()
    labels = RegionLabeller()(picture, matte, landmarks)
    parts = [soft_region(labels, matte, name) for name in REGIONS[1:]]
    inside = matte > 0
    assert np.sum(parts, 0)[inside] == pytest.approx(1.0, abs=1e-4)
    assert soft_region(labels, matte, *REGIONS[1:])[~inside].max() == 0
    edge = parts[REGIONS.index("face") - 1]
    assert ((edge > 0.2) & (edge < 0.8)).any()
