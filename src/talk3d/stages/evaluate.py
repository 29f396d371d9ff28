"""Evaluate: how well an avatar shows the end of its clip, which its training never saw, by measures whose definitions travel with them.

Self-driven: sound, blinks, head pose and cameras are those of the held-out frames, and no token but the sound's knows the mouth.
"""

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

import talk3d
from talk3d.errors import ConfigError, WeightsError
from talk3d.metrics.face import Film, distance_measure, face_box, face_measures, mouth_measure
from talk3d.metrics.image import box_mask, psnr, ssim
from talk3d.metrics.report import Measure, Report, contact_sheet, measure
from talk3d.metrics.truth import HeadAlignment, NovelFrame, Truth, align_heads, camera_errors, find_truth, load_truth, novel_frames
from talk3d.models.avatar import Avatar
from talk3d.perception.landmarks import FaceModel, load_face_model
from talk3d.stages.animate import composite, to_uint8
from talk3d.types import Camera, Clip, Driving, Progress, silent

NUM_SHOWN = 6
"""Moments on the report's sheet."""
NUM_ALIGNED = 50
"""Training frames that the two head spaces are aligned on."""
NEEDS_TRUTH = "the truth of an invented person: truth=FOLDER with truth.npz and its films"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How much is measured."""

    max_frames: int | None = None
    """Held-out frames to measure, from the first one; all by default."""
    novel_every: int = 4
    """Every how many frames the unseen cameras are compared."""
    controls: bool = True
    """Whether to render again with shifted and with unchanging sound, to show that the measures can tell."""
    shift_frames: int = 5
    """By how many frames the sound is shifted in the control."""
    face_margin: float = 0.1
    """Border of the face box beyond the landmarks, in shares of its larger side."""
    batch_size: int = 4
    """Frames rendered at once."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        if min(self.novel_every, self.batch_size) < 1 or (self.max_frames is not None and self.max_frames < 1):
            raise ConfigError("evaluate needs a positive batch size, step between frames and number of frames: give positive numbers")


def evaluate(
    avatar: Avatar,
    clip: Clip,
    config: EvaluateConfig | None = None,
    *,
    truth: Path | None = None,
    face_model: Path | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Report:
    """Render the held-out frames and compare them with the real ones; each measure of the report carries its definition.

    Args:
        avatar: moved to `device`.
        clip: of the same person, tracked with the same speech features.
        config: how much is measured.
        truth: folder with truth.npz of an invented person; by default the folder of the clip's video, if it has one.
        face_model: a face_landmarker.task; see `load_face_model`. Without any face model, what needs landmarks is not measured.
        device: where to render.
        progress: hears every frame.

    Raises:
        ConfigError: the clip holds nothing out, or its speech features are not those that the avatar listens to.
        MediaError: the truth cannot be read.
        ShapeError: the truth belongs to another film.
    """
    config = config or EvaluateConfig()
    if clip.num_training_frames >= clip.num_frames:
        raise ConfigError("the clip holds no frames out, so there is nothing honest to measure: track a longer video")
    if clip.audio.source != avatar.audio_source:
        raise ConfigError(f"the avatar listens to {avatar.audio_source!r}, the clip has {clip.audio.source!r} features: track the video again")
    stop = clip.num_frames if config.max_frames is None else min(clip.num_frames, clip.num_training_frames + config.max_frames)
    bench = _Bench(avatar.to(device).eval(), clip, torch.arange(clip.num_training_frames, stop), config, device=device, progress=progress)
    model, missing = _face_model(face_model)
    played = _self_driven(bench, model)
    measures = [*_picture_measures(played), *face_measures(played.rendered, played.real, missing)]
    if config.controls:
        measures += _controls(bench, played, model, missing)
    folder = truth if truth is not None else find_truth(Path(clip.source).parent)
    known = None if folder is None else load_truth(folder).part(int(clip.check.get("first_frame", 0)), clip.num_frames)
    views = _Views()
    if known is None:
        names = ("mouth_correlation_truth", "camera_rotation", "camera_reprojection", "novel_psnr")
        measures += [measure(name, [], "", "see the same measure of an invented person", needs=NEEDS_TRUTH) for name in names]
    else:
        views = _novel_views(bench, known)
        measures += _truth_measures(bench, known, views, played, missing)
    facts = _facts(bench, model, folder, "given" if truth is not None else "found beside the clip's video", views)
    return Report(measures=tuple(measures), facts=facts, sheet=contact_sheet([*played.rows(), *views.rows]))


class _Bench:
    """The avatar, the real frames, and how to get pictures of both."""

    def __init__(self, avatar: Avatar, clip: Clip, frames: Int[Tensor, " t"], config: EvaluateConfig, *, device: str, progress: Progress) -> None:
        self.avatar, self.clip, self.frames, self.config, self.device, self.progress = avatar, clip, frames, config, device, progress
        self.plate = 0.5 * (avatar.background[None] + 1).to(device)
        self.scale = avatar.resolution / clip.frames.shape[1]

    def batches(self, stage: str) -> Iterator[Int[Tensor, " b"]]:
        """Held-out frames, some at a time."""
        done = 0
        for frames in self.frames.split(self.config.batch_size):
            yield frames
            done += len(frames)
            self.progress(stage, done, len(self.frames), {})

    def real(self, frames: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 1 h w"]]:
        """Real pictures and mattes in [0, 1], at the avatar's size."""
        images, mattes = self.clip.images(frames)
        size = (self.avatar.resolution, self.avatar.resolution)
        if images.shape[-2:] != size:
            images, mattes = (F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False) for x in (images, mattes))
        return (0.5 * (images + 1)).clamp(0, 1), mattes

    def render(
        self,
        frames: Int[Tensor, " b"],
        *,
        audio: Float[Tensor, "b n f c"] | None = None,
        camera: Camera | None = None,
        background: Float[Tensor, "b 3 h w"] | None = None,
    ) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 1 h w"]]:
        """Rendered pictures over the background, and their mattes, in [0, 1]; what is not given is as it was in the clip."""
        was = self.clip.driving(frames)
        parts = (was.audio if audio is None else audio, was.blink, was.head_pose, was.anchors)
        heard, blink, head_pose, anchors = (part.to(self.device) for part in parts)
        driving = Driving(audio=heard, blink=blink, head_pose=head_pose, anchors=anchors)
        camera = self.clip.track.cameras[frames] if camera is None else camera
        with torch.no_grad():
            rendering = self.avatar.render(driving, camera.to(self.device))
        pictures = composite(rendering, self.plate if background is None else background.to(self.device))
        return pictures.cpu(), rendering.alpha.cpu()


@dataclass
class _Played:
    """What the self-driven pass saw."""

    real: Film
    rendered: Film
    values: dict[str, list[Tensor]] = field(default_factory=dict)
    shown: list[tuple[int, UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w 3"]]] = field(default_factory=list)

    def rows(self) -> list[list[tuple[str, UInt8[np.ndarray, "h w 3"]]]]:
        """Real and rendered pictures, one above the other."""
        return [[(f"real {i}", real) for i, real, _ in self.shown], [(f"rendered {i}", ours) for i, _, ours in self.shown]]


@dataclass
class _Views:
    """What the unseen cameras saw: per view, numbers per frame; and pairs of pictures."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    rows: list[list[tuple[str, UInt8[np.ndarray, "h w 3"]]]] = field(default_factory=list)
    alignment: HeadAlignment | None = None


def _face_model(path: Path | None) -> tuple[FaceModel | None, str]:
    """The face model, or what is missing."""
    try:
        return load_face_model(path), ""
    except WeightsError as error:
        return None, f"a face model: {error}"


def _self_driven(bench: _Bench, model: FaceModel | None) -> _Played:
    """Render every held-out frame as it was, and compare."""
    played = _Played(real=Film(model), rendered=Film(model))
    shown = set(bench.frames[torch.linspace(0, len(bench.frames) - 1, NUM_SHOWN).round().long()].tolist())
    side = bench.avatar.resolution
    for frames in bench.batches("evaluate"):
        real, person = bench.real(frames)
        ours, _ = bench.render(frames)
        box = box_mask(face_box(bench.scale * bench.clip.track.landmarks[frames], bench.config.face_margin), side, side)
        found = {
            "psnr": psnr(ours, real),
            "psnr_face": psnr(ours, real, box),
            "psnr_person": psnr(ours, real, person),
            "ssim": ssim(ours, real),
            "ssim_face": ssim(ours, real, box),
        }
        for name, value in found.items():
            played.values.setdefault(name, []).append(value)
        pictures = to_uint8(real), to_uint8(ours)
        played.real.watch(pictures[0])
        played.rendered.watch(pictures[1])
        played.shown += [(int(i), pictures[0][k], pictures[1][k]) for k, i in enumerate(frames) if int(i) in shown]
    return played


def _picture_measures(played: _Played) -> list[Measure]:
    kinds = {
        "psnr": ("dB", "mean over frames of 10 log10(1/MSE) of the whole crop, rendered over the clip's background plate"),
        "psnr_face": ("dB", "the same inside the bounding box of the tracked face points, widened by face_margin of its larger side"),
        "psnr_person": ("dB", "the same inside the person's soft matte, MSE over the matte's pixels only"),
        "ssim": ("", "mean over frames of SSIM of the whole crop, Gaussian window 11×11 σ 1.5, range 1"),  # noqa: RUF001
        "ssim_face": ("", "mean of the same SSIM map inside the face box"),
    }
    return [measure(name, torch.cat(played.values[name]).numpy(), unit, meaning) for name, (unit, meaning) in kinds.items()]


def _controls(bench: _Bench, played: _Played, model: FaceModel | None, missing: str) -> list[Measure]:
    """Render with sound of other moments, and with one sound that never changes: the lips must then be wrong."""
    shift = bench.config.shift_frames
    names = ("control_shifted_mouth_correlation", "control_frozen_mouth_correlation", "control_frozen_lmd_lips")
    meanings = (
        f"mouth_correlation with the sound of {shift} frames later: must be lower than mouth_correlation",
        "mouth_correlation with the mean of the training part's sound in every frame: should be near 0",
        "lmd_lips with that unchanging sound: must be larger than lmd_lips",
    )
    if model is None:
        return [measure(name, [], "", meaning, needs=missing) for name, meaning in zip(names, meanings, strict=True)]
    shifted, frozen = Film(model), Film(model)
    audio = bench.clip.audio
    still = audio.values[: bench.clip.num_training_frames].mean(0)
    for frames in bench.batches("controls"):
        later = audio.around(frames + shift)
        shifted.watch(to_uint8(bench.render(frames, audio=later)[0]))
        frozen.watch(to_uint8(bench.render(frames, audio=still.expand_as(later))[0]))
    return [
        mouth_measure(names[0], shifted, played.real.opening, meanings[0]),
        mouth_measure(names[1], frozen, played.real.opening, meanings[1]),
        distance_measure(names[2], frozen, played.real, meanings[2]),
    ]


def _novel_views(bench: _Bench, truth: Truth) -> _Views:
    """Render the held-out moments from the truth's unseen cameras and compare."""
    clip, side = bench.clip, bench.avatar.resolution
    fitted = np.unique(np.linspace(0, clip.num_training_frames - 1, NUM_ALIGNED).round().astype(int))
    views = _Views(alignment=align_heads(truth, clip.track, fitted, clip.frames.shape[1]))
    chosen = bench.frames.numpy()[:: bench.config.novel_every]
    chosen = chosen[chosen >= truth.novel_first_frame]
    for view in truth.novel if len(chosen) else ():
        values: dict[str, list[float]] = {"psnr": [], "psnr_crop": []}
        pairs: list[tuple[str, UInt8[np.ndarray, "h w 3"]]] = []
        for number, (frame, known) in enumerate(zip(chosen, novel_frames(truth, view, chosen, side), strict=True), 1):
            ours, (inside, whole) = _novel_frame(bench, int(frame), known, views.alignment)
            values["psnr"].append(inside)
            values["psnr_crop"].append(whole)
            if number - 1 in (0, len(chosen) // 3, 2 * len(chosen) // 3):
                pairs += [(f"{view.name} real {frame}", known.picture), (f"{view.name} rendered", ours)]
            bench.progress(f"novel view {view.name}", number, len(chosen), {"psnr": inside})
        views.values[view.name] = values
        views.rows.append(pairs)
    return views


def _novel_frame(
    bench: _Bench, frame: int, known: NovelFrame, alignment: HeadAlignment | None
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[float, float]]:
    """One rendered picture, its PSNR inside the union of both mattes, and of the whole crop."""
    assert alignment is not None
    camera = alignment.apply(known.camera)
    batched = Camera(cam2world=camera.cam2world[None], intrinsics=camera.intrinsics[None])
    background, real = (torch.from_numpy(x).permute(2, 0, 1)[None].float() / 255 for x in (known.background, known.picture))  # 1 3 h w
    ours, alpha = bench.render(torch.tensor([frame]), camera=batched, background=background)
    union = torch.maximum(alpha, torch.from_numpy(known.matte)[None, None])
    return to_uint8(ours)[0], (float(psnr(ours, real, union)), float(psnr(ours, real)))


def _truth_measures(bench: _Bench, truth: Truth, views: _Views, played: _Played, missing: str) -> list[Measure]:
    """Measures against what is known of an invented person."""
    frames = bench.frames.numpy()
    assert views.alignment is not None
    errors = camera_errors(truth, bench.clip.track, views.alignment, frames, bench.clip.frames.shape[1])
    opening = truth.mouth_opening[frames]
    after = "between tracked and true cameras of the held-out frames, after one constant similarity of the head spaces fitted on training frames"
    lips = "Pearson's r of mouth opening by the detector in the {} frames against the truth's (inner lips 62-66 over eyes 36-45)"
    inside = "mean over frames of PSNR inside the union of rendered and true matte, from the unseen camera{}, over the film's own background"
    pooled = [value for values in views.values.values() for value in values["psnr"]]
    needs = "held-out frames that the truth's novel films show"
    measures = [
        mouth_measure("mouth_correlation_truth", played.rendered, opening, lips.format("rendered"), missing),
        mouth_measure("control_detector_mouth_correlation", played.real, opening, lips.format("real") + ": the best that can be expected", missing),
        measure("camera_rotation", errors.rotation_deg, "deg", f"mean angle {after}"),
        measure("camera_reprojection", errors.reprojection_px, "px", f"RMS distance in the crop of points round the head {after}"),
        measure("novel_psnr", pooled, "dB", inside.format("s"), needs=needs),
    ]
    for name, values in views.values.items():
        measures.append(measure(f"novel_psnr_{name}", values["psnr"], "dB", inside.format(f" at yaw_pitch {name}°")))
        measures.append(measure(f"novel_psnr_crop_{name}", values["psnr_crop"], "dB", f"the same of the whole crop at {name}°"))
    return measures


def _facts(bench: _Bench, model: FaceModel | None, truth: Path | None, truth_is: str, views: _Views) -> Mapping[str, Any]:
    clip = bench.clip
    held_out: Sequence[int] = [int(bench.frames[0]), int(bench.frames[-1])]
    alignment = views.alignment
    return {
        "versions": {"talk3d": talk3d.__version__, "python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}},
        "avatar": dict(bench.avatar.provenance),
        "clip": {"source": clip.source, "sha256": clip.source_sha256, "fps": clip.fps, "frames": clip.num_frames, "check": clip.check},
        "measured_frames": {
            "first": held_out[0],
            "last": held_out[1],
            "training_frames": clip.num_training_frames,
            "side_px": bench.avatar.resolution,
        },
        "driving": {
            "audio": f"{clip.audio.source} features of the clip's own sound, whole clip, so context crosses into the training part",
            "blink": "tracked in the held-out frames (eyelids)",
            "head_pose": "tracked in the held-out frames (rigid pose)",
            "anchors": "tracked in the held-out frames (projected from the rigid pose)",
            "cameras": "tracked in the held-out frames",
            "novel_views": "the same tokens; cameras from the truth",
        },
        "face_model": model.source if model else None,
        "masks": clip.masks.source,
        "truth": {"folder": str(truth), "was": truth_is} if truth else None,
        "head_space": None
        if alignment is None
        else {"scale": alignment.scale, "rotation": alignment.rotation.tolist(), "shift": alignment.shift.tolist()},
    }
