"""From a video to a `Clip`: the face found in every frame, the camera in head space, steady crops, mattes and speech features.

Streams through the video three times (time stamps, faces, crops), so memory does not grow with its length. Prints nothing.
"""

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from talk3d.errors import ConfigError, MediaError, TrackingError
from talk3d.io.catalogue import sha256_of
from talk3d.io.media import VideoScan, read_audio, read_video, scan_video
from talk3d.ops.geometry import CAMERA_FOCAL, HEAD_PIVOT, view_angles
from talk3d.perception.headpose import HeadMotion, load_template, solve_head_pose
from talk3d.perception.landmarks import FaceModel, FaceTracker, load_face_model, normalize_blink
from talk3d.perception.parsing import BiSeNetParser, FaceParser, SelfieMatting, steady_mattes
from talk3d.perception.speech import PUBLISHED_FPS, SAMPLE_RATE_HZ, SpeechKind, load_speech
from talk3d.types import Camera, Clip, FaceMasks, FaceTrack, Progress, Waveform, silent

logger = logging.getLogger(__name__)

ANCHOR_POINTS = (168, 263, 33)
"""Nose bridge, outer corners of the left and the right eye."""


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """How a video becomes a clip."""

    fps: float = 25.0
    """Frames a second of the clip; the video is brought to it by its time stamps."""
    size_px: int = 256
    """Side of the square crops."""
    held_out_s: float = 4.0
    """Length of the clip's end that is kept from training, at most a fifth of the clip."""
    max_gap_s: float = 0.4
    """Longest time without a face that is bridged; a longer one ends the stretch that is used."""
    min_length_s: float = 1.0
    """Shortest stretch with a face that makes a clip."""
    parsing: Literal["none", "bisenet"] = "none"
    """Whether the parts of the face (skin, hair, lips, eyes, clothes …) are told apart too; bisenet comes from `talk3d weights` and is slow."""
    speech: SpeechKind = "logmel"
    """What the avatar will listen to: log-mel, or networks of `talk3d weights`: wav2vec2, hubert, or published windows, ctc44 and deepspeech."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        if not 1 <= self.fps <= 240 or not 32 <= self.size_px <= 4096:
            raise ConfigError(
                f"track makes 1 to 240 frames a second of 32 to 4096 px, got {self.fps} and {self.size_px}: leave --fps and --size-px out"
            )
        if self.speech in ("ctc44", "deepspeech") and self.fps != PUBLISHED_FPS:
            raise ConfigError(f"--speech {self.speech} is made for 25 frames a second, got {self.fps}: leave --fps out, or take another --speech")
        if not (self.held_out_s >= 0 and self.max_gap_s >= 0 and self.min_length_s > 0):
            raise ConfigError(
                f"track needs lengths in seconds that are not negative, got held out {self.held_out_s}, gap {self.max_gap_s}, "
                f"shortest {self.min_length_s}: leave them out for good ones"
            )


@dataclass(frozen=True, kw_only=True)
class _Faces:
    """What the first look found in frames start … start + t."""

    start: int
    landmarks: Tensor
    eyes_shut: Tensor
    score: Tensor
    seen: Tensor
    crowd: list[int]


def track(
    video: Path | str,
    config: TrackConfig = TrackConfig(),
    *,
    face_model: Path | None = None,
    template: Tensor | None = None,
    progress: Progress = silent,
) -> Clip:
    """Turn a video of one talking person into a clip.

    If faces of similar size are in view together, tracking stops with an error; smaller ones are ignored and noted in `Clip.check`.

    Args:
        video: any file with pictures and sound.
        config: see its fields.
        face_model: a face_landmarker.task; by default the one in the cache folder, else the models of the package registry.
        template: mean face points of the prior's head space; by default those of the builtin prior.
        progress: hears of every frame.

    Raises:
        MediaError: the file cannot be read, is shorter than a second, or has no sound.
        TrackingError: no face, several faces, or too short a stretch with one.
        WeightsError: the face models cannot be had.
    """
    scan = scan_video(video, config.fps)
    if scan.num_frames < config.min_length_s * config.fps:
        raise MediaError(
            f"{video} is {scan.num_frames / config.fps:.2f} s long, at least {config.min_length_s:g} s are needed: record a longer video"
        )
    waveform = read_audio(video, SAMPLE_RATE_HZ)
    encoder = load_speech(config.speech)
    parser = BiSeNetParser() if config.parsing == "bisenet" else None
    model = load_face_model(face_model)
    faces = _find_faces(scan, model, config, progress)
    num_frames = len(faces.landmarks)
    cuts = tuple(cut - faces.start for cut in scan.cuts if faces.start < cut < faces.start + num_frames)
    size = (scan.width_px, scan.height_px)
    builtin = load_template(model.kind)
    head = builtin if template is None else replace(builtin, points=template.float().cpu())
    motion = solve_head_pose(faces.landmarks, head, size, faces.seen, cuts)
    crop = _crop_maps(motion, size, config.size_px)
    matting = SelfieMatting()
    frames, mattes = _write_crops(scan, faces.start, crop, config.size_px, matting, progress)
    waveform = _cut_sound(waveform, faces.start, num_frames, config.fps)
    face_track = _face_track(faces, motion, crop, size, config.size_px)
    held_out = min(round(config.held_out_s * config.fps), num_frames // 5)
    return Clip(
        frames=frames,
        fps=config.fps,
        waveform=waveform,
        audio=encoder(waveform, num_frames, config.fps),
        track=face_track,
        masks=FaceMasks(person=mattes, source=matting.source, parts=_parse(frames, parser, progress)),
        source=str(video),
        source_sha256=sha256_of(Path(video)),
        num_training_frames=num_frames - held_out,
        check=_check(scan, faces, motion, crop, waveform, model, face_track),
    )


def _find_faces(scan: VideoScan, model: FaceModel, config: TrackConfig, progress: Progress) -> _Faces:
    """Follow the face through all frames and keep the longest stretch without long gaps."""
    tracker = FaceTracker(model, survey_every=round(config.fps))
    cuts = set(scan.cuts)
    landmarks: dict[int, np.ndarray] = {}
    eyes: dict[int, tuple[float, float]] = {}
    scores: dict[int, float] = {}
    for index, frame in enumerate(read_video(scan.path, scan=scan)):
        if index in cuts:
            tracker.cut()
        seen = tracker.follow(frame)
        if seen is not None:
            landmarks[index], eyes[index], scores[index] = seen.landmarks, seen.eyes_shut, seen.score
        progress("faces", index + 1, scan.num_frames, {"missed": index + 1 - len(landmarks)})
    _refuse_crowds(scan, tracker.crowd)
    start, end = _longest_stretch(sorted(landmarks), round(config.max_gap_s * config.fps))
    if end - start < config.min_length_s * config.fps:
        found = f"a face for only {(end - start) / config.fps:.1f} s in a row" if landmarks else "no face"
        raise TrackingError(f"{scan.path} shows {found}: give a video in which one face, turned towards the camera, is in view for some seconds")
    wanted = np.arange(start, end)
    known = [index for index in sorted(landmarks) if start <= index < end]
    return _Faces(
        start=start,
        landmarks=_interpolate(wanted, known, np.stack([landmarks[index] for index in known])),
        eyes_shut=_interpolate(wanted, known, np.array([eyes[index] for index in known])),
        score=torch.tensor([scores.get(index, 0.0) for index in wanted.tolist()]),
        seen=torch.from_numpy(np.isin(wanted, known)),
        crowd=tracker.crowd,
    )


def _refuse_crowds(scan: VideoScan, crowd: list[int]) -> None:
    """Stop where faces of similar size are in view for more than a quarter of the time."""
    together = sum(count > 1 for count in crowd)
    if crowd and together > 0.25 * len(crowd):
        raise TrackingError(f"{scan.path} shows {max(crowd)} faces of similar size: cut the video so that only the person to learn is in view")


def _longest_stretch(seen: list[int], max_gap: int) -> tuple[int, int]:
    """First frame and one past the last of the longest run of seen frames with no gap of more than `max_gap` missing ones."""
    if not seen:
        return 0, 0
    breaks = np.flatnonzero(np.diff(seen) > max_gap + 1)
    starts = [seen[0], *[seen[index + 1] for index in breaks]]
    ends = [*[seen[index] + 1 for index in breaks], seen[-1] + 1]
    return max(zip(starts, ends, strict=True), key=lambda stretch: stretch[1] - stretch[0])


def _interpolate(wanted: np.ndarray, known: list[int], values: np.ndarray) -> Tensor:
    """Values at all wanted frames, linear between known ones."""
    if len(wanted) == len(known):
        return torch.from_numpy(values).float()
    flat = values.reshape(len(values), -1)
    columns = [np.interp(wanted, known, column) for column in flat.T]
    return torch.from_numpy(np.stack(columns, -1).reshape(len(wanted), *values.shape[1:])).float()


def _crop_maps(motion: HeadMotion, size: tuple[int, int], crop_px: int) -> np.ndarray:
    """Source px to crop px: one scale for the clip, and shifts that keep the head's pivot in the middle; t 2 3, float64."""
    pivot = torch.tensor([HEAD_PIVOT], dtype=torch.float64)
    centre = motion.project(pivot, (size[0] / 2, size[1] / 2))[:, 0].numpy()
    side = motion.focal_px / CAMERA_FOCAL
    crop = np.zeros((len(centre), 2, 3))
    crop[:, 0, 0] = crop[:, 1, 1] = crop_px / side
    crop[:, :, 2] = (side / 2 - centre) * crop_px / side
    return crop


def _write_crops(
    scan: VideoScan, start: int, crop: np.ndarray, crop_px: int, matting: SelfieMatting, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Crops and mattes of all frames, in nameless files on disk that vanish with the arrays."""
    with tempfile.TemporaryFile() as frames_file, tempfile.TemporaryFile() as mattes_file:

        def mattes() -> Iterator[np.ndarray]:
            for index, frame in enumerate(islice(read_video(scan.path, scan=scan), start, start + len(crop))):
                picture = crop_picture(frame, crop[index], crop_px)
                frames_file.write(picture.tobytes())
                progress("crops", index + 1, len(crop), {})
                yield matting(picture)

        for matte in steady_mattes(mattes()):
            mattes_file.write(matte.tobytes())
        shape = (len(crop), crop_px, crop_px)
        return _mapped(frames_file, (*shape, 3)), _mapped(mattes_file, shape)


def _parse(frames: np.ndarray, parser: FaceParser | None, progress: Progress) -> np.ndarray | None:
    """The parts of the face in all crops, in a nameless file like the crops."""
    if parser is None:
        return None
    with tempfile.TemporaryFile() as file:
        for index, frame in enumerate(frames):
            file.write(parser(np.asarray(frame)).tobytes())
            progress("parts", index + 1, len(frames), {})
        return _mapped(file, frames.shape[:3])


def _mapped(file: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of a file as an array that is read from disk when it is looked at."""
    file.flush()
    return np.memmap(file, np.uint8, "r", shape=shape)


def crop_picture(frame: np.ndarray, crop: np.ndarray, crop_px: int) -> np.ndarray:
    """Cut the square of a crop map out of a frame, anti-aliased; beyond the frame its edge is repeated."""
    scale = crop[0, 0]
    side = crop_px / scale
    left, top = -crop[0, 2] / scale, -crop[1, 2] / scale
    height, width = frame.shape[:2]
    margins = [int(max(np.ceil(value), 0)) for value in (-top, top + side - height, -left, left + side - width)]
    if any(margins):
        frame = np.pad(frame, ((margins[0], margins[1]), (margins[2], margins[3]), (0, 0)), mode="edge")
        left, top = left + margins[2], top + margins[0]
    picture = Image.fromarray(frame).resize((crop_px, crop_px), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(picture)


def _face_track(faces: _Faces, motion: HeadMotion, crop: np.ndarray, size: tuple[int, int], crop_px: int) -> FaceTrack:
    """Everything known of the face, in crop px and head space."""
    cam2world = motion.cam2world()
    middle = torch.tensor([size[0] / 2, size[1] / 2], dtype=torch.float64)
    maps = torch.from_numpy(crop)
    intrinsics = torch.zeros(len(crop), 3, 3, dtype=torch.float64)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = CAMERA_FOCAL
    intrinsics[:, :2, 2] = (maps[:, :, :2] @ middle + maps[:, :, 2]) / crop_px
    intrinsics[:, 2, 2] = 1
    anchors = motion.project(motion.points(ANCHOR_POINTS), (size[0] / 2, size[1] / 2)) / middle - 1
    return FaceTrack(
        cameras=Camera(cam2world=cam2world.float(), intrinsics=intrinsics.float()),
        head_pose=view_angles(cam2world[:, :3, :3]).float(),
        landmarks=(faces.landmarks.double() @ maps[:, :, :2].mT + maps[:, None, :, 2]).float(),
        anchors=anchors.flatten(1).float(),
        blink=normalize_blink(faces.eyes_shut),
        confidence=(faces.score * faces.seen)[:, None].float(),
        crop=crop,
    )


def _cut_sound(waveform: Waveform, start: int, num_frames: int, fps: float) -> Waveform:
    """The sound of these frames, silence where the track ends early."""
    rate = waveform.sample_rate_hz
    first, last = round(start / fps * rate), round((start + num_frames) / fps * rate)
    samples = waveform.samples[first:last]
    return Waveform(samples=torch.nn.functional.pad(samples, (0, last - first - len(samples))), sample_rate_hz=rate)


def _check(
    scan: VideoScan, faces: _Faces, motion: HeadMotion, crop: np.ndarray, waveform: Waveform, model: FaceModel, face_track: FaceTrack
) -> dict[str, Any]:
    """What was noticed, as plain numbers and words, and warnings of one line each."""
    num_frames = len(crop)
    rms = float(waveform.samples.square().mean().sqrt())
    side = float(motion.focal_px / CAMERA_FOCAL)
    facts: dict[str, Any] = {
        "source_fps": round(scan.source_fps, 3),
        "true_fps": round(scan.true_fps, 3),
        "frames_decoded": scan.num_decoded,
        "duplicates": scan.num_duplicates,
        "repeated": scan.num_repeated,
        "dropped": scan.num_dropped,
        "rotation_deg": scan.rotation_deg,
        "truncated": scan.truncated,
        "cuts_s": [round(cut / scan.fps, 2) for cut in scan.cuts],
        "landmarks": model.source,
        "faces": max(faces.crowd, default=1),
        "frames": num_frames,
        "first_frame": faces.start,
        "missed_frames": int((~faces.seen).sum()),
        "length_s": round(num_frames / scan.fps, 3),
        "audio_rms_db": round(20 * float(np.log10(max(rms, 1e-6))), 1),
        "silent_share": round(_silent_share(waveform), 3),
        "crop_side_px": round(side, 1),
        "pose_residual_px": round(float(motion.residual_px.nanmedian()), 2),
        "yaw_deg": [round(float(torch.rad2deg(face_track.head_pose[:, 0].quantile(share))), 1) for share in (0.01, 0.99)],
    }
    return {**facts, "warnings": list(_warnings(facts, scan))}


def _warnings(facts: dict[str, Any], scan: VideoScan) -> Iterator[str]:
    """One line for each thing that the user may want to mend."""
    if scan.num_duplicates:
        doubled = f"{scan.num_duplicates} of {scan.num_decoded} frames are doubled and were left out"
        yield f"{doubled}: the video really has {scan.true_fps:.2f} frames a second"
    if scan.truncated:
        yield "the file ends before it should: only its readable part was used; copy or export it again"
    if facts["audio_rms_db"] < -60:
        yield "the sound is silent: lips cannot be learnt from it; record with a microphone"
    elif facts["audio_rms_db"] < -40:
        yield f"the sound is quiet ({facts['audio_rms_db']:.0f} dB): record closer to the microphone"
    if scan.cuts:
        yield f"the shot changes {len(scan.cuts)} times: one continuous shot is learnt best"
    if facts["missed_frames"]:
        yield f"the face was not found in {facts['missed_frames']} frames, which were bridged"
    if facts["frames"] < scan.num_frames:
        yield f"only {facts['length_s']:.1f} s of the video show the face without a long gap, the rest was left out"
    if facts["crop_side_px"] < 200:
        yield f"the head is small ({facts['crop_side_px']:.0f} px): film closer, or at a higher resolution"
    if facts["length_s"] < 20:
        yield f"the clip is short ({facts['length_s']:.0f} s): some minutes are learnt best"


def _silent_share(waveform: Waveform) -> float:
    """Share of 20 ms pieces quieter than -50 dB."""
    step = waveform.sample_rate_hz // 50
    pieces = waveform.samples[: len(waveform.samples) // step * step].reshape(-1, step)
    return float((pieces.square().mean(-1) < 1e-5).float().mean()) if len(pieces) else 1.0
