"""Multi-view data sets: what is read, what belongs together, and errors that say what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from talk3d.errors import MediaError
from talk3d.io.heads import load_heads
from talk3d.ops.geometry import head_camera

LABELS = head_camera(torch.tensor([[0.1, 0.0, 0.0], [0.2, 0.0, 0.0], [0.3, 0.0, 0.0]])).to_label()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, mode in enumerate(("RGBA", "RGB", "RGBA")):
        colour = (10 * i, 20, 30, 128)[: len(mode)]
        (tmp_path / f"{i:02}").mkdir()
        Image.new(mode, (8, 8), colour).save(tmp_path / f"{i:02}" / "a.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[f"{i:02}/a.png", LABELS[i].tolist()] for i in range(3)]}))
    return tmp_path


def test_pictures_and_cameras_are_read_in_order(folder: Path) -> None:
    heard = []
    heads = load_heads(folder, progress=lambda done, total: heard.append((done, total)))
    assert heads.images.shape == (3, 8, 8, 4) and heads.images.dtype == torch.uint8
    assert heads.images[:, 0, 0].tolist() == [[0, 20, 30, 128], [10, 20, 30, 255], [20, 20, 30, 128]]
    torch.testing.assert_close(heads.cameras.to_label(), LABELS)
    assert heads.sample.tolist() == heads.person.tolist() == [0, 1, 2] and heard == [(1, 3), (2, 3), (3, 3)]


def test_groups_are_numbered_from_zero(folder: Path) -> None:
    np.savez(folder / "samples.npz", sample=np.array([40, 7, 40]), person=np.array([5, 5, 5]))
    heads = load_heads(folder)
    assert heads.sample.tolist() == [1, 0, 1] and heads.person.tolist() == [0, 0, 0]


def test_pictures_are_resized(folder: Path) -> None:
    heads = load_heads(folder, 4)
    assert heads.images.shape == (3, 4, 4, 4) and heads.images[1, 2, 2].tolist() == [10, 20, 30, 255]


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", '{"labels": [["a.png"]]}', '{"labels": [["a.png", [1, 2]]]}', '{"labels": null}', '{"labels": []}']
)
def test_what_is_no_data_set_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(MediaError, match="is no data set"):
        load_heads(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="is no data set"):
        load_heads(tmp_path / "missing")


def test_missing_and_damaged_pictures_are_named(folder: Path) -> None:
    (folder / "01" / "a.png").write_bytes(b"no picture")
    with pytest.raises(MediaError, match=r"a\.png cannot be read"):
        load_heads(folder)
    (folder / "01" / "a.png").unlink()
    with pytest.raises(MediaError, match=r"a\.png cannot be read"):
        load_heads(folder)


def test_pictures_of_different_sizes_need_a_side(folder: Path) -> None:
    Image.new("RGBA", (6, 6)).save(folder / "01" / "a.png")
    with pytest.raises(MediaError, match="differ in size"):
        load_heads(folder)
    assert load_heads(folder, 8).images.shape == (3, 8, 8, 4)
