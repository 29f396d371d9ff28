"""Clips on disk."""

import csv
import json
import mmap
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from talk3d.errors import MediaError
from talk3d.types import AudioFeatures, Camera, Clip, FaceMasks, FaceTrack, Waveform, WideViews
from talk3d.types.face import with_cheeks

FORMAT = 1
"""Raised when a reader of the older format could not read the newer one."""

MAYBE = ("eyes_shut", "gaze", "expression")
"""What a track may lack."""


def save_clip(clip: Clip, path: Path) -> None:
    """Write a clip as a folder; a clip that is already there is replaced only when the new one is whole.

    Args:
        clip: what to write.
        path: of the folder.

    Raises:
        MediaError: something else is at `path`, or nothing can be written there.
    """
    path = Path(path)
    if path.exists() and not (path / "clip.json").is_file():
        raise MediaError(f"{path} exists and is not a clip: give another path, so that nothing of yours is overwritten")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _write_array(partial / "frames.npy", clip.frames)
        _write_array(partial / "masks.npy", clip.masks.person)
        if clip.masks.parts is not None:
            _write_array(partial / "parts.npy", clip.masks.parts)
        save_file(_tensors(clip), partial / "track.safetensors")
        (partial / "track.safetensors").chmod(0o644)
        (partial / "clip.json").write_text(json.dumps(_facts(clip), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _swap(partial, path)
    except OSError as error:
        raise MediaError(f"cannot write the clip {path} ({error}): give a path with room that you may write to") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_clip(path: str | Path) -> Clip:
    """Read a clip that `save_clip` wrote; pictures and mattes stay on disk until they are looked at.

    Raises:
        MediaError: there is no clip at `path`, or it is damaged or of a newer version.
        ShapeError: its parts have different lengths.
    """
    path = Path(path)
    if not (path / "clip.json").is_file():
        raise MediaError(f"{path} is not a clip: give a folder made by `talk3d track VIDEO -o CLIP`")
    try:
        facts = json.loads((path / "clip.json").read_text(encoding="utf-8"))
        if facts["format"] > FORMAT:
            raise MediaError(f"the clip {path} was made by a newer talk3d: update talk3d, or track the video again")
        frames = np.load(path / "frames.npy", mmap_mode="r", allow_pickle=False)
        mattes = np.load(path / "masks.npy", mmap_mode="r", allow_pickle=False)
        parts = np.load(path / "parts.npy", mmap_mode="r", allow_pickle=False) if (path / "parts.npy").is_file() else None
        masks = FaceMasks(person=mattes, source=facts["masks_source"], parts=parts)
        return _assemble(facts, load_file(path / "track.safetensors"), frames, masks)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MediaError(f"the clip {path} is damaged ({error}): track the video again") from error


def read_openface_blink(path: Path) -> Float[Tensor, "t 1"]:
    """How far the eyes are shut by an OpenFace table (au.csv): AU45_r, cut off at 2 and halved, 0 open … 1 shut; one row per frame of the video.

    Raises:
        MediaError: no such table.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
        if not rows:
            raise ValueError("it has no rows")
        return torch.tensor([[min(max(float(row["AU45_r"]), 0.0), 2.0) / 2] for row in rows]).reshape(-1, 1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MediaError(
            f"{path} is no table of OpenFace with a column AU45_r ({error}): give the au.csv that its FeatureExtraction wrote"
        ) from error


def _write_array(path: Path, array: np.ndarray, chunk: int = 128) -> None:
    """Write a .npy file piece by piece, so that an array that is mapped from disk is never all in memory."""
    mapped: Any = array
    while isinstance(mapped, np.ndarray):
        mapped = mapped.base
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(array), chunk):
            file.write(array[start : start + chunk].tobytes())
            if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)


def _tensors(clip: Clip) -> dict[str, torch.Tensor]:
    """Everything numeric but the pictures."""
    track = clip.track
    tensors = {
        "cam2world": track.cameras.cam2world,
        "intrinsics": track.cameras.intrinsics,
        "head_pose": track.head_pose,
        "landmarks": track.landmarks,
        "anchors": track.anchors,
        "blink": track.blink,
        "upper_face": track.upper_face,
        "confidence": track.confidence,
        "crop": torch.from_numpy(np.array(track.crop)),
        "audio": clip.audio.values,
        "waveform": clip.waveform.samples,
        **{name: value for name in MAYBE if (value := getattr(track, name)) is not None},
    }
    if clip.wide is not None:
        tensors |= {f"wide_{name}": torch.as_tensor(value) for name, value in vars(clip.wide).items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _facts(clip: Clip) -> dict[str, Any]:
    """Everything that is not an array."""
    return {
        "format": FORMAT,
        "fps": clip.fps,
        "num_frames": clip.num_frames,
        "num_training_frames": clip.num_training_frames,
        "source": clip.source,
        "source_sha256": clip.source_sha256,
        "sample_rate_hz": clip.waveform.sample_rate_hz,
        "audio_fps": clip.audio.fps,
        "audio_source": clip.audio.source,
        "masks_source": clip.masks.source,
        "check": dict(clip.check),
    }


def _assemble(facts: dict[str, Any], tensors: dict[str, torch.Tensor], frames: np.ndarray, masks: FaceMasks) -> Clip:
    """The clip from its parts."""
    track = FaceTrack(
        cameras=Camera(cam2world=tensors["cam2world"], intrinsics=tensors["intrinsics"]),
        crop=tensors["crop"].numpy(),
        upper_face=with_cheeks(tensors["upper_face"]),
        **{name: tensors[name] for name in ("head_pose", "landmarks", "anchors", "blink", "confidence")},
        **{name: tensors[name] for name in MAYBE if name in tensors},
    )
    return Clip(
        frames=frames,
        fps=facts["fps"],
        waveform=Waveform(samples=tensors["waveform"], sample_rate_hz=facts["sample_rate_hz"]),
        audio=AudioFeatures(values=tensors["audio"], fps=facts["audio_fps"], source=facts["audio_source"]),
        track=track,
        masks=masks,
        source=facts["source"],
        source_sha256=facts["source_sha256"],
        num_training_frames=facts["num_training_frames"],
        check=facts["check"],
        wide=_wide(tensors),
    )


def _wide(tensors: dict[str, torch.Tensor]) -> WideViews | None:
    """The wide views, if there are any."""
    if "wide_frames" not in tensors:
        return None
    pictures, mattes, beyond = (tensors[f"wide_{name}"].numpy() for name in ("pictures", "mattes", "beyond"))
    return WideViews(frames=tensors["wide_frames"], pictures=pictures, mattes=mattes, beyond=beyond)


def _swap(partial: Path, path: Path) -> None:
    """Put the whole folder in its place; what was there goes only afterwards."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
