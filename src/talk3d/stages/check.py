"""The capture check of a video that has not been tracked: the same report as `Clip.check`, for a fraction of the work.

The whole video is read once, for its rate, its cuts and its sound; the face is looked for in stretches of some seconds that are spread over it.
Prints nothing.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from talk3d.errors import ConfigError, MediaError, TrackingError
from talk3d.io.media import VideoScan, read_audio, scan_video
from talk3d.io.timeline import shot_starts
from talk3d.metrics.capture import CaptureReport, FaceMeasures, capture_report
from talk3d.metrics.verdict import Line
from talk3d.perception.facetemplate import load_template
from talk3d.perception.headpose import solve_head_pose
from talk3d.perception.landmarks import FaceModel, load_face_model
from talk3d.perception.speech import SAMPLE_RATE_HZ
from talk3d.stages.track import TrackConfig, find_faces, measures
from talk3d.types import Progress, Waveform, silent


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """How closely a video is looked at."""

    fps: float = 25.0
    """Frames a second that `track` would make."""
    look_s: float = 60.0
    """Length of the parts in which the face is looked for; a longer video is sampled."""
    stretch_s: float = 10.0
    """Length of each part."""
    audio_offset_ms: float = 0.0
    """Move the sound forward by this much before it is compared with the lips, as `track` would."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        for name, fine, wanted in (
            ("fps", 1 <= self.fps <= 240, "1 to 240 frames a second"),
            ("stretch_s", self.stretch_s >= 2, "2 s or more"),
            ("look_s", self.look_s >= self.stretch_s, f"at least the {self.stretch_s:g} s of one part"),
            ("audio_offset_ms", abs(self.audio_offset_ms) <= 10_000, "10 s at most, either way"),
        ):
            if not fine:
                raise ConfigError(f"{name} is {getattr(self, name):g}, check needs {wanted}: leave it out for a good one")


def check(video: Path | str, config: CheckConfig = CheckConfig(), *, face_model: Path | None = None, progress: Progress = silent) -> CaptureReport:
    """Say what is wrong with a video before anything is learnt from it.

    A video without sound or without a face, and one with several faces, gets a report that says so and the verdict `refuse`.

    Args:
        video: film of one person, with sound.
        config: see its fields.
        face_model: a face_landmarker.task; by default the one in the cache folder, else the models of the package registry.
        progress: hears of every frame in which the face is looked for.

    Raises:
        MediaError: the file is no video, or nothing in it can be decoded.
        WeightsError: the face models cannot be had.
    """
    scan = scan_video(video, config.fps)
    problems: list[Line] = []
    waveform: Waveform | None = None
    face: FaceMeasures | None = None
    cuts = scan.cuts
    try:
        waveform = read_audio(video, SAMPLE_RATE_HZ).cut(config.audio_offset_ms / 1000, scan.num_frames / scan.fps)
    except MediaError as error:
        problems.append(_refusal("sound", str(error)))
    try:
        face, cuts = _look(scan, load_face_model(face_model), config, progress)
    except TrackingError as error:
        problems.append(_refusal("face", str(error)))
    return capture_report(scan, face, waveform, cuts=cuts, applied_ms=config.audio_offset_ms, problems=tuple(problems))


def _refusal(what: str, message: str) -> Line:
    """A line from an error's message: what is wrong, then what to do."""
    found, _, advice = message.partition(": ")
    return Line(what=what, found=found, judgement="refuse", advice=advice)


def _look(scan: VideoScan, model: FaceModel, config: CheckConfig, progress: Progress) -> tuple[FaceMeasures, tuple[int, ...]]:
    """What the face does in the sampled parts, and where shots begin."""
    wanted = sampled_frames(scan.num_frames, round(config.stretch_s * scan.fps), round(config.look_s * scan.fps))
    joins = np.flatnonzero(np.diff(wanted) > 1) + 1
    shown = np.searchsorted(wanted, scan.cuts)
    part = replace(scan, source_index=scan.source_index[wanted], cuts=tuple(np.union1d(joins, shown).astype(int).tolist()))
    faces = find_faces(part, model, TrackConfig(fps=scan.fps, max_gap_s=scan.num_frames / scan.fps, min_length_s=1 / scan.fps), progress)
    numbers = wanted[faces.start : faces.start + len(faces.landmarks)]
    inside = torch.nonzero(faces.seen)[:, 0]
    cuts = shot_starts(scan.cuts, scan.jumps, numbers[inside.numpy()], faces.landmarks[inside].numpy())
    breaks = np.union1d(np.flatnonzero(np.diff(numbers) > 1) + 1, np.searchsorted(numbers, cuts)).astype(int).tolist()
    motion = solve_head_pose(faces.landmarks, load_template(model.kind), (scan.width_px, scan.height_px), faces.seen, tuple(breaks))
    return measures(faces, numbers, motion, model), cuts


def sampled_frames(num_frames: int, stretch: int, most: int) -> np.ndarray:
    """All frames of a short video; of a longer one, stretches of frames that are spread evenly from its start to its end.

    Args:
        num_frames: of the video.
        stretch: frames in a row.
        most: frames in all.
    """
    if num_frames <= most:
        return np.arange(num_frames)
    starts = np.linspace(0, num_frames - stretch, most // stretch).round().astype(int)
    return np.unique(starts[:, None] + np.arange(stretch))
