"""From a video to a `Clip`: the face found in every frame, the camera in head space, steady crops, mattes and speech features.

Streams through the video three times (time stamps, faces, crops): of a long one, face points and sound are in memory, pictures never. Prints nothing.
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import median_filter
from torch import Tensor

from talk3d.errors import ConfigError, MediaError, TrackingError
from talk3d.io.catalogue import sha256_of
from talk3d.io.media import VideoScan, read_audio, read_video, scan_video
from talk3d.io.timeline import shot_starts
from talk3d.io.weights import load_prior
from talk3d.metrics.capture import CaptureReport, FaceMeasures, capture_report, in_step
from talk3d.ops.geometry import CAMERA_FOCAL, mean_rotation, view_angles
from talk3d.perception.alignment import FaceViews, Surface, crop_views, refine_brows, refine_motion
from talk3d.perception.facetemplate import FaceTemplate, load_template
from talk3d.perception.headpose import HeadMotion, solve_head_pose, steadied
from talk3d.perception.headspace import nod_head_space, settle_head_space, widen_head_turns
from talk3d.perception.identity import Likeness
from talk3d.perception.landmarks import (
    BROWS,
    FaceModel,
    FaceTracker,
    brow_lift,
    eye_gaze,
    irises_ahead,
    load_face_model,
    normalize_blink,
    steady_gaze,
)
from talk3d.perception.liplines import correct_lips
from talk3d.perception.nod import NUM_VIEWS, TURNS_VIEWS, choose_views, find_nod, find_turns, guessed_shape
from talk3d.perception.parsing import BiSeNetParser
from talk3d.perception.speech import PUBLISHED_FPS, SAMPLE_RATE_HZ, SpeechKind, load_speech
from talk3d.stages.pasting import crop_maps, write_crops
from talk3d.types import Camera, Clip, FaceMasks, FaceTrack, Progress, silent

ANCHOR_POINTS = (168, 263, 33)
"""Nose bridge, outer corners of the left and the right eye."""
MOST_POINTS = 478
"""Points of a face, irises and all."""


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
    audio_offset_ms: float | None = None
    """How late the sound of the video comes: it is moved forward by this much. None measures it, and moves what surely is out of step."""
    parsing: Literal["outlines", "bisenet"] = "outlines"
    """What tells the parts of the face (skin, hair, lips, eyes, clothes …) apart: face points and colours, or bisenet of `talk3d weights`, slow."""
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
        if not abs(self.audio_offset_ms or 0) <= 10_000:
            raise ConfigError(f"track moves sound by at most 10 s, got {self.audio_offset_ms} ms: give the milliseconds that `talk3d check` names")


@dataclass(frozen=True, kw_only=True)
class Faces:
    """What the first look found in frames start … start + t."""

    start: int
    landmarks: Float[Tensor, "t n 2"]
    """Source px."""
    eyes_shut: Float[Tensor, "t 2"]
    expression: Float[Tensor, "t e"]
    score: Float[Tensor, " t"]
    seen: Bool[Tensor, " t"]
    crowd: list[int]
    """For each look at the whole picture, how many faces of similar size there were."""
    looks: Mapping[int, Float[Tensor, " d"]]
    """Whose face it is, as `Likeness` tells: about once a second and where a shot begins, by frames from `start`."""


def track(
    video: Path | str,
    config: TrackConfig = TrackConfig(),
    *,
    face_model: Path | None = None,
    progress: Progress = silent,
    review: Callable[[CaptureReport], None] = lambda report: None,
) -> Clip:
    """Turn a video of one talking person into a clip.

    If faces of similar size are in view together for more than a quarter of the time, tracking stops with an error; otherwise the largest is
    followed, and `Clip.check` says so.

    Args:
        video: any file with pictures and sound.
        config: see its fields.
        face_model: a face_landmarker.task; by default the one in the cache folder, else the models of the package registry.
        progress: hears of every frame, and of head pose, hair and ears as a whole.
        review: hears what the capture check found, before the longer half of the work; what it raises stops the work.

    Raises:
        MediaError: the file cannot be read, is shorter than a second, or has no sound.
        TrackingError: no face, several faces, or too short a stretch with one.
        WeightsError: the face models cannot be had.
    """
    scan = scan_video(video, config.fps)
    if scan.num_frames < config.min_length_s * config.fps:
        raise MediaError(f"{video} is {scan.num_frames / config.fps:.2f} s long: record a longer video, of {config.min_length_s:g} s at least")
    waveform = read_audio(video, SAMPLE_RATE_HZ)
    parser = BiSeNetParser() if config.parsing == "bisenet" else None
    encoder, model = load_speech(config.speech), load_face_model(face_model)
    size = (scan.width_px, scan.height_px)
    faces, cuts, motion, lifts = _find_motion(scan, model, load_template(model.kind), config, progress)
    num_frames = len(faces.landmarks)
    face = measures(faces, np.arange(num_frames), motion, model)
    capture = partial(capture_report, scan, face, cuts=cuts, start=faces.start, num_frames=num_frames)
    sound, check = in_step(waveform, faces.start / config.fps, num_frames / config.fps, config.audio_offset_ms, capture)
    review(check)
    faces = replace(faces, landmarks=correct_lips(faces.landmarks, model.kind))  # pose and measures are made for points as networks give them
    crop = crop_maps(motion, size, config.size_px)
    locate = partial(_face_track, faces, crop=crop, size=size, crop_px=config.size_px)
    num_training = num_frames - min(round(config.held_out_s * config.fps), num_frames // 5)
    frames, masks, wide = write_crops(scan, faces.start, crop, locate(lifts, motion), num_training, config.size_px, parser, progress)
    progress("hair and ears", 0, 1, {})
    motion, head, constants = _as_the_prior_sees(motion, partial(locate, lifts), frames, masks)  # about the face, so that crops stay
    motion, lifts = _follow_head(motion, lifts, head, partial(crop_views, frames=frames, crop=crop), faces.seen, cuts, config.fps, size)
    progress("hair and ears", 1, 1, {})
    return Clip(
        frames=frames,
        fps=config.fps,
        waveform=sound,
        audio=encoder(sound, num_frames, config.fps),
        track=locate(lifts, motion),
        masks=masks,
        source=str(Path(video).resolve()),
        source_sha256=sha256_of(Path(video)),
        num_training_frames=num_training,
        check={**check, "smoothing": dict(motion.smoothing), **constants},
        wide=wide,
    )


def _find_motion(
    scan: VideoScan, model: FaceModel, template: FaceTemplate, config: TrackConfig, progress: Progress
) -> tuple[Faces, tuple[int, ...], HeadMotion, Float[Tensor, "t 3"]]:
    """The faces, the shot changes among them, the head's motion and how far the brows and the cheeks are drawn up.

    Motion and brows are refined by small pictures of the face that are kept on disk meanwhile; brows before the motion is smoothed, which parts the
    two where a head moves fast.
    """
    size = (scan.width_px, scan.height_px)
    with tempfile.TemporaryFile() as file:
        views = FaceViews(file)
        faces = find_faces(scan, model, config, progress, views)
        cuts = _cuts_inside(scan, faces)
        seen = torch.nonzero(faces.seen)[:, 0]
        points, pictures = faces.landmarks[seen], faces.start + seen
        lifts: list[Tensor] = []

        def refine(motion: HeadMotion) -> HeadMotion:
            motion, cheeks = refine_motion(motion, views, pictures, size)
            rest = torch.stack([motion.project(motion.face[list(brow)], (size[0] / 2, size[1] / 2)).float() for brow in BROWS], 1)
            brows = refine_brows(brow_lift(points, rest), motion, views, pictures, size)
            lifts.append(_without_jolts(torch.cat([brows, cheeks], 1), faces.seen, config.fps))
            return settle_head_space(motion, points, template, size)

        progress("head pose", 0, 1, {})
        motion = solve_head_pose(faces.landmarks, template, size, faces.seen, cuts, config.fps, refine)
        progress("head pose", 1, 1, {})
    return faces, cuts, motion, lifts[0]


def _without_jolts(lifts: Float[Tensor, "s 3"], seen: Bool[Tensor, " t"], fps: float) -> Float[Tensor, "t 3"]:
    """Brows and cheeks of all frames from those of the frames that were seen, without what blinks do to them."""
    calm = median_filter(lifts.numpy(), (2 * round(fps / 12) + 1, 1), mode="nearest")
    return _interpolate(np.arange(len(seen)), torch.nonzero(seen)[:, 0].numpy(), calm)


def _cuts_inside(scan: VideoScan, faces: Faces) -> tuple[int, ...]:
    """Frames of the clip at which a new shot begins."""
    inside = torch.nonzero(faces.seen)[:, 0]
    starts = shot_starts(scan.cuts, scan.jumps, inside.numpy() + faces.start, faces.landmarks[inside].numpy())
    return tuple(cut - faces.start for cut in starts if 0 < cut - faces.start < len(faces.landmarks))


def find_faces(scan: VideoScan, model: FaceModel, config: TrackConfig, progress: Progress, views: FaceViews | None = None) -> Faces:
    """Follow the face through all frames and keep the longest stretch without long gaps.

    Args:
        scan: of the video.
        model: what finds the face.
        config: how long a gap may be, and how short the stretch.
        progress: hears of every frame.
        views: keeps small pictures of the face.

    Raises:
        TrackingError: no face, several faces, or too short a stretch with one.
    """
    tracker = FaceTracker(model, survey_every=round(config.fps))
    cuts, describe = set(scan.cuts), Likeness(model.kind)
    looks: dict[int, Tensor] = {}
    landmarks = np.zeros((scan.num_frames, MOST_POINTS, 2), np.float32)  # one block: many small arrays would scatter over the memory
    eyes, scores = np.zeros((scan.num_frames, 2), np.float32), np.zeros(scan.num_frames, np.float32)
    expressions: list[np.ndarray] = []
    known: list[int] = []
    num_points = MOST_POINTS
    for index, frame in enumerate(read_video(scan.path, scan=scan)):
        if index in cuts:
            tracker.cut()
        seen = tracker.follow(frame)
        if seen is not None:
            num_points = len(seen.landmarks)
            landmarks[index, :num_points], eyes[index], scores[index] = seen.landmarks, seen.eyes_shut, seen.score
            known.append(index)
            expressions.append(seen.expression)
            if index in cuts or index % round(config.fps) == 0:
                looks[index] = describe(torch.from_numpy(frame).permute(2, 0, 1)[None] / 255, torch.from_numpy(seen.landmarks)[None])[0]  # 1 c h w
            if views is not None:
                views.put(index, frame, seen.landmarks)
        progress("faces", index + 1, scan.num_frames, {"missed": index + 1 - len(known)})
    _refuse_crowds(scan, tracker.crowd)
    start, end = _longest_stretch(known, round(config.max_gap_s * config.fps))
    if end - start < config.min_length_s * config.fps:
        found = f"a face for only {(end - start) / config.fps:.1f} s in a row" if known else "no face"
        raise TrackingError(f"{scan.path} shows {found}: give a video in which one face, turned towards the camera, is in view for some seconds")
    wanted = np.arange(start, end)
    inside = np.array([index for index in known if start <= index < end])
    return Faces(
        start=start,
        landmarks=_interpolate(wanted, inside, landmarks[inside, :num_points]),
        eyes_shut=_interpolate(wanted, inside, eyes[inside]),
        expression=_interpolate(wanted, inside, np.stack(expressions)[np.isin(known, inside)]),
        score=torch.from_numpy(scores[start:end]),
        seen=torch.from_numpy(np.isin(wanted, inside)),
        crowd=tracker.crowd,
        looks={index - start: look for index, look in looks.items() if start <= index < end},
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


def _interpolate(wanted: np.ndarray, known: np.ndarray, values: np.ndarray) -> Tensor:
    """Values at all wanted frames, linear between known ones."""
    if len(wanted) == len(known) or not values.size:
        return torch.from_numpy(np.resize(values, (len(wanted), *values.shape[1:]))).float()
    flat = values.reshape(len(values), -1)
    columns = [np.interp(wanted, known, column) for column in flat.T]
    return torch.from_numpy(np.stack(columns, -1).reshape(len(wanted), *values.shape[1:])).float()


def _face_track(faces: Faces, lifts: Tensor, motion: HeadMotion, crop: np.ndarray, size: tuple[int, int], crop_px: int) -> FaceTrack:
    """Everything known of the face, in crop px and head space."""
    cam2world = motion.cam2world()
    middle = torch.tensor([size[0] / 2, size[1] / 2], dtype=torch.float64)
    maps = torch.from_numpy(crop)
    intrinsics = torch.zeros(len(crop), 3, 3, dtype=torch.float64)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = CAMERA_FOCAL
    intrinsics[:, :2, 2] = (maps[:, :, :2] @ middle + maps[:, :, 2]) / crop_px
    intrinsics[:, 2, 2] = 1
    centre = (size[0] / 2, size[1] / 2)
    anchors = motion.project(motion.points(ANCHOR_POINTS), centre) / middle - 1
    eyes_shut = normalize_blink(faces.eyes_shut)
    blink, gaze = eyes_shut.mean(-1, keepdim=True), eye_gaze(faces.landmarks, motion.project(irises_ahead(motion.face), centre).float())
    return FaceTrack(
        cameras=Camera(cam2world=cam2world.float(), intrinsics=intrinsics.float()),
        head_pose=view_angles(cam2world[:, :3, :3]).float(),
        landmarks=(faces.landmarks.double() @ maps[:, :, :2].mT + maps[:, None, :, 2]).float(),
        anchors=anchors.flatten(1).float(),
        blink=blink,
        upper_face=torch.cat([lifts[:, :2], steady_gaze(gaze, blink), lifts[:, 2:]], 1),
        eyes_shut=eyes_shut,
        gaze=gaze,
        expression=faces.expression,
        confidence=(faces.score * faces.seen)[:, None].float(),
        crop=crop,
    )


def _as_the_prior_sees(
    motion: HeadMotion, locate: Callable[[HeadMotion], FaceTrack], frames: np.ndarray, masks: FaceMasks
) -> tuple[HeadMotion, Surface | None, dict[str, float]]:
    """Nod the head and let it turn as far as it looks most like what the builtin prior guesses of it.

    Returns:
        The motion; the guess's surface, if it looks like the head; and what was changed.
    """
    prior = load_prior()
    motion = nod_head_space(motion, nod := find_nod(prior, *_seen_views(locate(motion), frames, masks, NUM_VIEWS)))
    middle = mean_rotation(motion.rotation)
    turns = find_turns(prior, *_seen_views(locate(motion), frames, masks, TURNS_VIEWS), middle)
    motion = widen_head_turns(motion, turns, middle)
    shape = guessed_shape(prior, *_seen_views(locate(motion), frames, masks, TURNS_VIEWS))
    return motion, None if shape is None else Surface.head(*shape, motion.face), {"nod_deg": round(math.degrees(nod), 2), "turns": round(turns, 3)}


def _follow_head(
    motion: HeadMotion,
    lifts: Float[Tensor, "t 3"],
    head: Surface | None,
    views_in: Callable[..., FaceViews],
    seen: Bool[Tensor, " t"],
    cuts: tuple[int, ...],
    fps: float,
    size: tuple[int, int],
) -> tuple[HeadMotion, Float[Tensor, "t 3"]]:
    """The motion refined by the whole head, hair and ears as well, and how far brows and cheeks are drawn up; as they are if its shape is unknown."""
    if head is None:
        return motion, lifts
    index = torch.nonzero(seen)[:, 0]
    with tempfile.TemporaryFile() as file:
        views = views_in(file)
        motion, cheeks = refine_motion(motion.at(seen), views, index, size, head)
        brows = refine_brows(lifts[seen, :2], motion, views, index, size)
    return steadied(motion, seen, cuts, fps), _without_jolts(torch.cat([brows, cheeks], 1), seen, fps)


def _seen_views(face_track: FaceTrack, frames: np.ndarray, masks: FaceMasks, count: int) -> tuple[Tensor, Tensor, Camera]:
    """Pictures, mattes and cameras of frames with the most different poses."""
    chosen = choose_views(face_track.head_pose, count)
    image = torch.from_numpy(frames[chosen.numpy()]).permute(0, 3, 1, 2) / 127.5 - 1  # k c h w
    matte = torch.from_numpy(masks.person[chosen.numpy()])[:, None] / 255
    return image, matte, face_track.cameras[chosen]


def measures(faces: Faces, frames: np.ndarray, motion: HeadMotion, model: FaceModel) -> FaceMeasures:
    """What the capture check needs to know of the face.

    Args:
        faces: what was found.
        frames: their numbers on the clip's time.
        motion: of the head through them.
        model: what found them.
    """
    return FaceMeasures(
        frames=frames,
        landmarks=faces.landmarks,
        seen=torch.nonzero(faces.seen)[:, 0].numpy(),
        head_pose=view_angles(motion.cam2world()[:, :3, :3]).float(),
        blink=normalize_blink(faces.eyes_shut).mean(-1, keepdim=True),
        crop_side_px=motion.focal_px / CAMERA_FOCAL,
        residual_px=float(motion.residual_px.nanmedian()),
        crowd=max(faces.crowd, default=1),
        source=model.source,
        looks={int(frames[index]): look for index, look in faces.looks.items()},
    )
