"""What a video is good for: everything the capture check measures, from one pass over the sound and the face; `verdict` judges it.

Numbers in, one plain dict out, the `Clip.check`; its keys are in `CaptureReport`. Reads no file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from talk3d.io.media import VideoScan
from talk3d.metrics.offset import SoundOffset, sound_offset
from talk3d.metrics.verdict import LATE_MS, Line, judge
from talk3d.perception.identity import compare_shots
from talk3d.perception.landmarks import LEFT_EYE_CORNERS, RIGHT_EYE_CORNERS, mouth_opening
from talk3d.types import Waveform, spread_evenly

Verdict = Literal["ok", "usable with warnings", "refuse"]

NUM_PLOTTED = 240


class CaptureReport(TypedDict, total=False):
    """`Clip.check`: what was measured and noticed; what could not be measured is missing. All of it can be written as JSON."""

    verdict: Verdict
    lines: list[Line]
    """The table, in the order in which it is shown."""
    warnings: list[str]
    """Of the lines that are not ok: what was found and what to do."""
    source_fps: float
    """What the time stamps say."""
    true_fps: float
    """Different pictures a second."""
    frames_decoded: int
    duplicates: int
    """Doubled pictures that were left out."""
    repeated: int
    """Frames that show the picture before once more, to come to the constant rate."""
    dropped: int
    """Pictures left out to come to the constant rate."""
    size_px: list[int]
    """Width and height of the upright picture."""
    rotation_deg: int
    truncated: bool
    frames: int
    """Frames of the clip (of the whole video, for `talk3d check`), at the constant rate."""
    first_frame: int
    """Where the clip begins in the constant-rate video."""
    video_frames: int
    """Of the whole constant-rate video."""
    looked_frames: int
    """In how many frames the face was looked for: all of them, but for `talk3d check` of a long video."""
    missed_frames: int
    """In how many of these it was not found."""
    length_s: float
    cuts: list[int]
    """Frames of the clip at which a new shot begins."""
    cuts_s: list[float]
    shot_likeness: list[float]
    """For each shot in which a face was looked at, how alike it is to that of the shot looked at most: 1 is the same, two people are below 0.7."""
    shot_likeness_s: list[float]
    """When these shots begin."""
    faces: int
    """Most faces of similar size that were seen together."""
    landmarks: str
    """Which face model found the points."""
    crop_side_px: float
    """Side of the square round the head in the video."""
    eye_distance_px: float
    """Between the outer corners of the eyes, median."""
    pose_residual_px: float
    """Between seen and projected rigid points of the face, median."""
    yaw_deg: list[float]
    """1 % and 99 % of the frames turn the head less than this."""
    pitch_deg: list[float]
    mouth_open: list[float]
    """2 % and 98 % of the opening of the lips, in distances between the eyes."""
    mouth_wide: list[float]
    """The same of the distance between the corners of the mouth."""
    blinks: int
    blinks_per_min: float
    audio_rms_db: float
    """Full scale is 0."""
    silent_share: float
    """Share of 20 ms pieces quieter than -50 dB."""
    noise_db: float
    """Level of the quietest tenth of the sound."""
    speech_db: float
    """Level of the loudest tenth."""
    clipped_share: float
    """Share of samples at full scale."""
    audio_offset_ms: float | None
    """The sound comes this much after the picture; None where that is not sure."""
    audio_offset_guess_ms: float | None
    """The same, sure or not; None where sound or lips do not move."""
    audio_offset_spread_ms: float | None
    """Half the range of two thirds of the guesses from parts of the video."""
    audio_offset_agreement: float
    """Share of the guesses from parts of the video that are within 60 ms; never sure below 0.95, nor in less than 3 s (see `metrics.offset`)."""
    audio_offset_applied_ms: float
    """By how much the sound was moved forward before any of this was measured."""
    nod_deg: float
    """By how much pictures and the builtin prior lifted the cameras beyond what the face points say; 0 where the prior does not know such a face."""
    series: dict[str, list[float]]
    """For plots: time_s with yaw_deg, pitch_deg, mouth, blink, level_db; and lag_ms with lag_correlation."""


@dataclass(frozen=True, kw_only=True)
class FaceMeasures:
    """What tracking knows of the face, of all frames that were looked at."""

    frames: Int[np.ndarray, " t"]
    """Their numbers on the clip's time, ascending."""
    landmarks: Float[Tensor, "t n 2"]
    """Source px; interpolated where not seen."""
    seen: Int[np.ndarray, " s"]
    """Which of them show a face: indices into `frames`."""
    head_pose: Float[Tensor, "t 3"]
    blink: Float[Tensor, "t 1"]
    crop_side_px: float
    residual_px: float
    crowd: int
    """Most faces of similar size seen together."""
    source: str
    """Which face model found the points."""
    looks: Mapping[int, Float[Tensor, " d"]]
    """`Likeness` of the face in some of `frames`, by their numbers."""


def capture_report(
    scan: VideoScan,
    face: FaceMeasures | None,
    waveform: Waveform | None,
    *,
    cuts: tuple[int, ...] = (),
    start: int = 0,
    num_frames: int | None = None,
    applied_ms: float = 0.0,
    problems: tuple[Line, ...] = (),
) -> CaptureReport:
    """Measure, judge and advise.

    Args:
        scan: of the video.
        face: of the frames that were looked at, if it was found.
        waveform: if there is sound; sample 0 is the start of frame 0 of the clip.
        cuts: frames of the clip at which a new shot begins.
        start: where the clip begins in the constant-rate video.
        num_frames: of the clip; to the end of the video if None.
        applied_ms: by how much the sound has been moved already.
        problems: lines that are known before.
    """
    report: dict[str, Any] = _picture(scan, cuts, start, scan.num_frames - start if num_frames is None else num_frames)
    if face is not None:
        alike = compare_shots(face.looks, cuts)
        report |= _face(face, scan.fps) | {
            "shot_likeness": [round(value, 3) for value in alike.values()],
            "shot_likeness_s": [round(begin / scan.fps, 2) for begin in alike],
        }
    if waveform is not None:
        report |= {**_sound(waveform), "audio_offset_applied_ms": applied_ms}
    if face is not None and waveform is not None:
        offset = sound_offset(face.landmarks.numpy()[face.seen], face.frames[face.seen], waveform, scan.fps, cuts)
        report |= {
            "audio_offset_ms": round(offset.late_s * 1000, 1) if offset and offset.sure else None,
            "audio_offset_guess_ms": round(offset.late_s * 1000, 1) if offset else None,
            "audio_offset_spread_ms": round(offset.spread_s * 1000, 1) if offset else None,
            "audio_offset_agreement": round(offset.agreement, 3) if offset else 0.0,
            "series": _series(face, waveform, scan.fps, offset),
        }
    lines = [*problems, *judge(report)]
    judgements = {line["judgement"] for line in lines}
    verdict: Verdict = "refuse" if "refuse" in judgements else "usable with warnings" if "warning" in judgements else "ok"
    warnings = [f"{line['found']}: {line['advice']}" for line in lines if line["judgement"] != "ok"]
    return cast(CaptureReport, {"verdict": verdict, "lines": lines, "warnings": warnings, **report})


def in_step(
    waveform: Waveform, start_s: float, length_s: float, late_ms: float | None, capture: Callable[..., CaptureReport]
) -> tuple[Waveform, CaptureReport]:
    """Return the sound of a span of the video, moved by as much as it is late, and what the capture check says of it then.

    Args:
        waveform: of the whole video.
        start_s: where the span begins.
        length_s: how long it is.
        late_ms: how late the sound comes; None measures it, and moves the sound if it surely is further than `LATE_MS` out of step.
        capture: `capture_report`, given everything but the sound.
    """
    applied_ms = late_ms or 0.0
    sound = waveform.cut(start_s + applied_ms / 1000, length_s)
    check = capture(sound, applied_ms=applied_ms)
    found_ms = check.get("audio_offset_ms") or 0.0
    if late_ms is None and abs(found_ms) > LATE_MS:
        return in_step(waveform, start_s, length_s, found_ms, capture)
    return sound, check


def _picture(scan: VideoScan, cuts: tuple[int, ...], start: int, num_frames: int) -> dict[str, Any]:
    """What the file and its pictures are."""
    return {
        "source_fps": round(scan.source_fps, 3),
        "true_fps": round(scan.true_fps, 3),
        "frames_decoded": scan.num_decoded,
        "duplicates": scan.num_duplicates,
        "repeated": scan.num_repeated,
        "dropped": scan.num_dropped,
        "size_px": [scan.width_px, scan.height_px],
        "rotation_deg": scan.rotation_deg,
        "truncated": scan.truncated,
        "frames": num_frames,
        "first_frame": start,
        "video_frames": scan.num_frames,
        "length_s": round(num_frames / scan.fps, 3),
        "cuts": list(cuts),
        "cuts_s": [round(cut / scan.fps, 2) for cut in cuts],
    }


def _face(face: FaceMeasures, fps: float) -> dict[str, Any]:
    """What the face does."""
    eyes = (face.landmarks[:, LEFT_EYE_CORNERS[0]] - face.landmarks[:, RIGHT_EYE_CORNERS[0]]).norm(dim=-1)
    wide = (face.landmarks[:, 61] - face.landmarks[:, 291]).norm(dim=-1) / eyes
    degrees = torch.rad2deg(face.head_pose)
    blinks = _count_blinks(face.blink[:, 0].numpy(), face.frames, fps)
    return {
        "looked_frames": len(face.frames),
        "missed_frames": len(face.frames) - len(face.seen),
        "faces": face.crowd,
        "landmarks": face.source,
        "crop_side_px": round(face.crop_side_px, 1),
        "eye_distance_px": round(float(eyes.median()), 1),
        "pose_residual_px": round(face.residual_px, 2),
        "yaw_deg": _range(degrees[:, 0], 0.01, 1),
        "pitch_deg": _range(degrees[:, 1], 0.01, 1),
        "mouth_open": _range(mouth_opening(face.landmarks), 0.02, 3),
        "mouth_wide": _range(wide, 0.02, 3),
        "blinks": blinks,
        "blinks_per_min": round(60 * fps * blinks / len(face.frames), 1),
    }


def _range(values: Tensor, share: float, digits: int) -> list[float]:
    return [round(float(np.quantile(values.numpy(), at)), digits) for at in (share, 1 - share)]


def _count_blinks(blink: np.ndarray, frames: np.ndarray, fps: float) -> int:
    """How often the eyes shut and open again within 0.6 s."""
    shut = np.concatenate([[False], (blink > 0.5) & (np.diff(frames, prepend=frames[0] - 1) == 1), [False]])
    edges = np.flatnonzero(np.diff(shut.astype(int)))
    return int((edges[1::2] - edges[::2] <= max(0.6 * fps, 1)).sum())


def _levels_db(waveform: Waveform, step_s: float = 0.02) -> np.ndarray:
    """Level of each 20 ms piece, full scale 0."""
    step = round(waveform.sample_rate_hz * step_s)
    pieces = waveform.samples[: len(waveform.samples) // step * step].reshape(-1, step)
    return 10 * np.log10(pieces.square().mean(-1).numpy() + 1e-10)


def _sound(waveform: Waveform) -> dict[str, Any]:
    """What the sound is like."""
    samples, levels = waveform.samples, _levels_db(waveform)
    rms = float(samples.square().mean().sqrt()) if len(samples) else 0.0
    low, high = np.quantile(levels, [0.1, 0.9]) if len(levels) else (-100.0, -100.0)
    return {
        "audio_rms_db": round(20 * float(np.log10(max(rms, 1e-6))), 1),
        "silent_share": round(float((levels < -50).mean()), 3) if len(levels) else 1.0,
        "noise_db": round(float(low), 1),
        "speech_db": round(float(high), 1),
        "clipped_share": round(float((samples.abs() > 0.985).float().mean()), 5) if len(samples) else 0.0,
    }


def _series(face: FaceMeasures, waveform: Waveform, fps: float, offset: SoundOffset | None) -> dict[str, list[float]]:
    """Thinned values for plots."""
    few = spread_evenly(len(face.frames), NUM_PLOTTED).numpy()
    levels = _levels_db(waveform)
    times = (face.frames[few] + 0.5) / fps
    nearest = np.clip((times / 0.02).astype(int), 0, max(len(levels) - 1, 0))
    degrees = torch.rad2deg(face.head_pose).numpy()
    columns = {
        "time_s": times,
        "yaw_deg": degrees[few, 0],
        "pitch_deg": degrees[few, 1],
        "mouth": mouth_opening(face.landmarks).numpy()[few],
        "blink": face.blink[few, 0].numpy(),
        "level_db": levels[nearest] if len(levels) else np.full(len(few), -100.0),
        "lag_ms": np.zeros(0) if offset is None else offset.lags_s * 1000,
        "lag_correlation": np.zeros(0) if offset is None else offset.curve,
    }
    return {name: [round(float(value), 3) for value in values] for name, values in columns.items()}
