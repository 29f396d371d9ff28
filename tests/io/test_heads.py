"""Data sets of heads: read from folders and zips in order, grouped, resized, mirrored rightly, and refused in one line when something is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from talk3d.errors import MediaError
from talk3d.io.heads import load_heads, mirror
from talk3d.ops.geometry import head_camera, project
from talk3d.types import Camera

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


def test_distances_are_read_and_mirrored_like_their_pictures(folder: Path) -> None:
    assert load_heads(folder).look_deep(torch.tensor([0]), torch.tensor([0])) is None
    depth = np.arange(12, dtype=np.float32).reshape(3, 2, 2) / 4
    np.save(folder / "depth.npy", depth)
    found = load_heads(folder).look_deep(torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert found is not None and found[:, 0].tolist() == [depth[1].tolist(), depth[2, :, ::-1].tolist()]


@pytest.mark.parametrize("content", [b"", b"no numbers"])
def test_unfit_distances_are_refused(folder: Path, content: bytes) -> None:
    (folder / "depth.npy").write_bytes(content)
    with pytest.raises(MediaError, match=r"depth\.npy"):
        load_heads(folder)
    np.save(folder / "depth.npy", np.zeros((2, 4, 4)))
    with pytest.raises(MediaError, match=r"shape \(2, 4, 4\).*each of 3 pictures"):
        load_heads(folder)


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


def test_a_zip_is_read_like_its_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    np.savez(folder / "samples.npz", sample=np.array([40, 7, 40]), person=np.array([5, 5, 9]))
    packed = Path(shutil.make_archive(str(tmp_path_factory.mktemp("zip") / "heads"), "zip", folder))
    one, other = load_heads(folder), load_heads(packed)
    assert one.images.equal(other.images) and one.sample.equal(other.sample) and one.person.equal(other.person)
    assert one.cameras.to_label().equal(other.cameras.to_label())
    (folder / "samples.npz").unlink()
    packed = Path(shutil.make_archive(str(tmp_path_factory.mktemp("zip") / "plain"), "zip", folder))
    assert load_heads(packed).sample.tolist() == [0, 1, 2]


def test_unfit_groups_and_zips_are_refused(folder: Path) -> None:
    for content in ({"sample": np.arange(3)}, {"sample": np.arange(2), "person": np.arange(3)}):
        np.savez(folder / "samples.npz", **content)
        with pytest.raises(MediaError, match=r"samples\.npz of .* is unfit"):
            load_heads(folder)
    (folder / "samples.npz").write_bytes(b"no arrays")
    with pytest.raises(MediaError, match="is unfit"):
        load_heads(folder)
    (folder / "broken.zip").write_bytes(b"no zip")
    with pytest.raises(MediaError, match="is no data set"):
        load_heads(folder / "broken.zip")


def test_pictures_are_looked_at_in_the_unit_range_and_mirrored_where_asked(folder: Path) -> None:
    heads = load_heads(folder).to("cpu")
    rgba, cameras = heads.look(torch.tensor([2, 0]), torch.tensor([0, 1]))
    torch.testing.assert_close(rgba[:, :, 0, 0], torch.tensor([[20.0, 20, 30, 128], [0, 20, 30, 128]]) / 255)
    assert cameras.to_label()[0].equal(LABELS[2]) and not cameras.to_label()[1].equal(LABELS[0])


def test_mirroring_twice_is_nothing() -> None:
    images = torch.rand(3, 4, 5, 5)
    camera = head_camera(torch.randn(3, 3) * 0.3)
    camera = Camera(cam2world=camera.cam2world, intrinsics=camera.intrinsics + torch.tensor([[0.0, 0, 0.04], [0, 0, 0.1], [0, 0, 0]]))
    flip = torch.tensor([1, 0, 1])
    flipped = mirror(images, camera, flip)
    back, back_camera = mirror(*flipped, flip)
    assert back.equal(images)
    torch.testing.assert_close(back_camera.to_label(), camera.to_label())
    assert flipped[0][1].equal(images[1]) and flipped[1].to_label()[1].equal(camera.to_label()[1])
    assert flipped[0][0].equal(images[0].flip(-1))


def test_the_mirrored_camera_sees_the_mirrored_point_at_the_mirrored_pixel() -> None:
    camera = head_camera(torch.tensor([[0.4, -0.2, 0.15]]))
    camera = Camera(cam2world=camera.cam2world, intrinsics=camera.intrinsics + torch.tensor([[0.0, 0, 0.04], [0, 0, 0.1], [0, 0, 0]]))
    points = torch.rand(1, 6, 3) - 0.5
    _, other = mirror(torch.zeros(1, 3, 2, 2), camera, torch.tensor([1]))
    there, here = project(points * torch.tensor([-1.0, 1, 1]), other), project(points, camera)
    torch.testing.assert_close(there, torch.stack([1 - here[..., 0], here[..., 1]], -1), atol=1e-5, rtol=1e-5)
    assert torch.linalg.det(other.cam2world[0, :3, :3]).item() == pytest.approx(1, abs=1e-5)
