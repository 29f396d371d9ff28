"""Reader of multi-view head data sets in EG3D's layout: pictures and `dataset.json` with 25-number camera labels."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
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


def load_heads(folder: Path, side: int | None = None, progress: Callable[[int, int], None] = lambda done, total: None) -> HeadDataset:
    """Read a data set folder.

    `samples.npz`, where present, says which pictures belong together (arrays `sample` and `person`); without it every picture is a sample
    and a person of its own.

    Args:
        folder: holds `dataset.json` and the pictures it names.
        side: pictures are resized to this many pixels; None keeps them, and they must all be of one size.
        progress: hears how many pictures of how many are read.

    Raises:
        MediaError: the folder is no such data set, or a picture cannot be read.
    """
    try:
        labels = json.loads((folder / "dataset.json").read_text())["labels"]
        names, numbers = [row[0] for row in labels], np.array([row[1] for row in labels], np.float32)
        assert numbers.ndim == 2 and numbers.shape[1] == 25
    except (OSError, ValueError, KeyError, TypeError, IndexError, AssertionError) as error:
        raise MediaError(f'{folder} is no data set ({error}): give a folder with dataset.json = {{"labels": [[picture, 25 numbers], …]}}') from error

    def read(name: str) -> UInt8[np.ndarray, "h w 4"]:
        try:
            with Image.open(folder / name) as picture:
                picture = picture.convert("RGBA")
                if side is not None and picture.size != (side, side):
                    picture = picture.resize((side, side), Image.Resampling.LANCZOS)
                return np.asarray(picture)
        except OSError as error:
            raise MediaError(f"picture {folder / name} cannot be read ({error}): make the data set again") from error

    pictures = []
    with ThreadPoolExecutor() as pool:
        for picture in pool.map(read, names):
            pictures.append(picture)
            progress(len(pictures), len(names))
    if len({picture.shape for picture in pictures}) != 1:
        raise MediaError(f"pictures of {folder} differ in size: give a side to resize them to")
    sample = person = np.arange(len(names))
    if (folder / "samples.npz").exists():
        with np.load(folder / "samples.npz") as groups:
            sample, person = (np.unique(groups[key], return_inverse=True)[1] for key in ("sample", "person"))
    return HeadDataset(
        images=torch.from_numpy(np.stack(pictures)),
        cameras=Camera.from_label(torch.from_numpy(numbers)),
        sample=torch.from_numpy(sample),
        person=torch.from_numpy(person),
    )
