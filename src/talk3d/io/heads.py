"""Data sets of heads for pretraining: pictures with known cameras in EG3D's layout, a folder or a zip of one."""

import io
import json
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, Int, UInt8
from PIL import Image
from torch import Tensor

from talk3d.errors import MediaError
from talk3d.types import Camera


@dataclass(frozen=True, kw_only=True)
class HeadDataset:
    """All pictures in memory, with who and which moment they show."""

    images: UInt8[Tensor, "n h w 4"]
    """RGBA; alpha is the foreground (255 everywhere if the files have none)."""
    cameras: Camera
    sample: Int[Tensor, " n"]
    """Pictures of one number show the same moment of the same person."""
    person: Int[Tensor, " n"]
    """Which person, from 0."""
    depth: Float16[Tensor, "n p p"] | None = None
    """Distance from the camera along each ray, scene units; 0 where it is not known."""

    def to(self, device: str) -> "HeadDataset":
        """Return the data set on another device; pictures that would take more than half of a GPU's free memory stay where they are."""
        fits = torch.device(device).type != "cuda" or 2 * self.images.numel() < torch.cuda.mem_get_info(device)[0]
        depth = None if self.depth is None else self.depth.to(device)
        return replace(self, images=self.images.to(device) if fits else self.images, cameras=self.cameras.to(device), depth=depth)

    def look(self, index: Int[Tensor, " b"], mirrored: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b 4 h w"], Camera]:
        """Pick pictures as RGBA in [0, 1], not premultiplied, on the cameras' device, left and right swapped where `mirrored` is 1."""
        device = self.cameras.cam2world.device
        chosen = self.images[index.to(self.images.device)].to(device)
        rgba = chosen.permute(0, 3, 1, 2).float() / 255  # b c h w
        return mirror(rgba, self.cameras[index.to(device)], mirrored.to(device))

    def look_deep(self, index: Int[Tensor, " b"], mirrored: Int[Tensor, " b"]) -> Float[Tensor, "b 1 p p"] | None:
        """Return these pictures' distances, left and right swapped where `mirrored` is 1; None where the data set has none."""
        if self.depth is None:
            return None
        depth = self.depth[index.to(self.depth.device)].float().unsqueeze(1)
        return torch.where(mirrored.to(depth.device).bool()[:, None, None, None], depth.flip(-1), depth)


def mirror(images: Float[Tensor, "b c h w"], camera: Camera, mirrored: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b c h w"], Camera]:
    """Swap left and right where `mirrored` is 1: in the picture, and x in the world and the camera."""
    flip = mirrored.bool()
    sign = torch.where(flip, -1.0, 1.0).to(camera.cam2world)
    diagonal = torch.ones(len(sign), 4, device=sign.device)
    diagonal[:, 0] = sign
    cam2world = diagonal[:, :, None] * camera.cam2world * diagonal[:, None, :]
    intrinsics = camera.intrinsics.clone()
    intrinsics[:, 0, 2] = torch.where(flip, 1 - intrinsics[:, 0, 2], intrinsics[:, 0, 2])
    return torch.where(flip[:, None, None, None], images.flip(-1), images), Camera(cam2world=cam2world, intrinsics=intrinsics)


def load_heads(path: Path, side: int | None = None, progress: Callable[[int, int], None] = lambda done, total: None) -> HeadDataset:
    """Read a data set.

    `samples.npz`, where present, says which pictures belong together (arrays `sample` and `person`); without it every picture is a sample
    and a person of its own. `depth.npy`, where present, is the distance along the rays of each picture, float16 n p p, 0 where unknown.

    Args:
        path: a folder or a zip that holds `dataset.json` and the pictures it names.
        side: pictures are resized to this many pixels; None keeps them, and they must all be of one size.
        progress: hears how many pictures of how many are read.

    Raises:
        MediaError: there is no such data set, or a picture cannot be read.
    """
    try:
        read = _reader(path)
        labels = json.loads(read("dataset.json"))["labels"]
        names, numbers = [row[0] for row in labels], np.array([row[1] for row in labels], np.float32)
        assert numbers.ndim == 2 and numbers.shape[1] == 25
    except (OSError, ValueError, KeyError, TypeError, IndexError, AssertionError, zipfile.BadZipFile) as error:
        expected = 'give a folder or a zip with dataset.json = {"labels": [[picture, 25 numbers], …]}'
        raise MediaError(f"{path} is no data set ({error}): {expected}") from error
    images = _read_pictures(path, read, names, side, progress)
    sample, person = _read_groups(path, read, len(names))
    return HeadDataset(
        images=torch.from_numpy(images),
        cameras=Camera.from_label(torch.from_numpy(numbers)),
        sample=torch.from_numpy(sample),
        person=torch.from_numpy(person),
        depth=_read_depth(path, read, len(names)),
    )


def _reader(path: Path) -> Callable[[str], bytes]:
    """How files of the data set are read by their names."""
    if path.is_file():
        return zipfile.ZipFile(path).read
    return lambda name: (path / name).read_bytes()


def _read_groups(path: Path, read: Callable[[str], bytes], count: int) -> list[Int[np.ndarray, " n"]]:
    """Which moment and which person each picture shows, numbered from 0."""
    try:
        content = read("samples.npz")
    except (FileNotFoundError, KeyError):  # a folder and a zip without it
        return [np.arange(count)] * 2
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as groups:
            numbers = [np.unique(groups[key], return_inverse=True)[1] for key in ("sample", "person")]
        assert all(number.shape == (count,) for number in numbers), f"not of {count} pictures"
    except (KeyError, ValueError, OSError, AssertionError, zipfile.BadZipFile) as error:
        raise MediaError(f"samples.npz of {path} is unfit ({error}): it must hold the arrays sample and person, one number a picture") from error
    return numbers


def _read_depth(path: Path, read: Callable[[str], bytes], count: int) -> Float16[Tensor, "n p p"] | None:
    try:
        content = read("depth.npy")
    except (FileNotFoundError, KeyError):  # a folder and a zip without it
        return None
    try:
        depth = np.load(io.BytesIO(content), allow_pickle=False).astype(np.float16, copy=False)
        assert depth.ndim == 3 and len(depth) == count and depth.shape[1] == depth.shape[2], f"of shape {depth.shape}"
    except (ValueError, OSError, EOFError, AssertionError) as error:
        raise MediaError(f"depth.npy of {path} is unfit ({error}): it must hold one square of distances for each of {count} pictures") from error
    return torch.from_numpy(depth)


def _read_pictures(
    path: Path, read: Callable[[str], bytes], names: list[str], side: int | None, progress: Callable[[int, int], None]
) -> UInt8[np.ndarray, "n h w 4"]:
    def decode(name: str) -> UInt8[np.ndarray, "h w 4"]:
        try:
            with Image.open(io.BytesIO(read(name))) as picture:
                picture = picture.convert("RGBA")
                if side is not None and picture.size != (side, side):
                    picture = picture.resize((side, side), Image.Resampling.LANCZOS)
                return np.asarray(picture)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise MediaError(f"picture {path / name} cannot be read ({error}): make the data set again") from error

    images = np.empty((len(names), *decode(names[0]).shape), np.uint8)  # filled in place: there may be tens of thousands

    def keep(row: int) -> None:
        picture = decode(names[row])
        if picture.shape != images.shape[1:]:
            raise MediaError(f"pictures of {path} differ in size: give a side to resize them to")
        images[row] = picture

    with ThreadPoolExecutor() as pool:
        for done, _ in enumerate(pool.map(keep, range(len(names))), 1):
            progress(done, len(names))
    return images
