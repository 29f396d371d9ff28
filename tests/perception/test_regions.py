"""Labels of a drawn head whose parts are known."""

import numpy as np

from talk3d.perception.facetemplate import load_template
from talk3d.perception.parsing import region_matte
from talk3d.perception.regions import OutlineParser

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


def test_every_part_of_a_head_has_its_name():
    picture, matte, landmarks = head()
    parts = OutlineParser()(picture, matte, landmarks)
    chin, top, eye = landmarks[152], landmarks[10], landmarks[[159, 145]].mean(0)
    at = {
        "hair": top - np.array([0, 9]),
        "nose": landmarks[4],
        "right eye": eye,
        "upper lip": 0.8 * landmarks[0] + 0.2 * landmarks[13],
        "neck": chin + np.array([0, 5]),
    }
    named = {name: int(parts[round(float(y)), round(float(x))]) for name, (x, y) in at.items()}
    assert named == {"hair": 17, "nose": 1, "right eye": 5, "upper lip": 12, "neck": 14}
    assert parts[-3, SIDE // 2] == 16
    assert (parts[matte == 0] == 0).all()
    assert (parts[matte > 0] > 0).all()


def test_a_bald_head_has_next_to_no_hair():
    picture, matte, landmarks = head()
    hairy = region_matte(OutlineParser()(picture, matte, landmarks), "hair").mean()
    picture, matte, landmarks = head(bald=True)
    assert region_matte(OutlineParser()(picture, matte, landmarks), "hair").mean() < 0.6 * hairy


def test_where_nobody_is_there_are_no_parts():
    picture, matte, landmarks = head()
    assert OutlineParser()(picture, np.zeros_like(matte), landmarks).max() == 0


def test_colours_are_remembered():
    picture, matte, landmarks = head()
    parser = OutlineParser()
    first = parser(picture, matte, landmarks)
    covered = picture.copy()
    covered[:20] = WALL  # the top of the head is out of sight for a frame
    again = parser(covered, np.where(np.arange(SIDE)[:, None] < 20, 0, matte).astype(np.uint8), landmarks)
    assert (again[20:] == first[20:]).mean() > 0.97
