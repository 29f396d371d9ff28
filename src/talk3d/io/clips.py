"""Clips on disk: one folder of plain arrays and a JSON file, whole or not there. Reading maps the pictures instead of loading them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from talk3d.errors import MediaError
from talk3d.types import AudioFeatures, Camera, Clip, FaceMasks, FaceTrack, Waveform

FORMAT = 1
"""Raised when a reader of the older format could not read the newer one."""


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
        np.save(partial / "frames.npy", clip.frames)
        np.save(partial / "masks.npy", clip.masks.person)
        save_file(_tensors(clip), partial / "track.safetensors")
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
        return _assemble(facts, load_file(path / "track.safetensors"), frames, mattes)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MediaError(f"the clip {path} is damaged ({error}): track the video again") from error


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
        "confidence": track.confidence,
        "crop": torch.from_numpy(np.array(track.crop)),
        "audio": clip.audio.values,
        "waveform": clip.waveform.samples,
    }
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


def _assemble(facts: dict[str, Any], tensors: dict[str, torch.Tensor], frames: np.ndarray, mattes: np.ndarray) -> Clip:
    """The clip from its parts."""
    track = FaceTrack(
        cameras=Camera(cam2world=tensors["cam2world"], intrinsics=tensors["intrinsics"]),
        crop=tensors["crop"].numpy(),
        **{name: tensors[name] for name in ("head_pose", "landmarks", "anchors", "blink", "confidence")},
    )
    return Clip(
        frames=frames,
        fps=facts["fps"],
        waveform=Waveform(samples=tensors["waveform"], sample_rate_hz=facts["sample_rate_hz"]),
        audio=AudioFeatures(values=tensors["audio"], fps=facts["audio_fps"], source=facts["audio_source"]),
        track=track,
        masks=FaceMasks(person=mattes, source=facts["masks_source"]),
        source=facts["source"],
        source_sha256=facts["source_sha256"],
        num_training_frames=facts["num_training_frames"],
        check=facts["check"],
    )


def _swap(partial: Path, path: Path) -> None:
    """Put the whole folder in its place; what was there goes only afterwards."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
