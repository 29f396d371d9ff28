"""Evaluate: how well an avatar shows the end of its clip, which its training never saw, by measures whose definitions travel with them.

Self-driven: sound, blinks, head pose and cameras are those of the held-out frames, and no token but the sound's knows the mouth. The same film is
rendered with wrong sound, with unchanging sound and with nothing but sound, and the real film is held against itself, so that every report shows
what its measures can tell.
"""

import logging
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

import talk3d
from talk3d.errors import ConfigError, WeightsError
from talk3d.metrics.face import lip_motion
from talk3d.metrics.film import Networks, Scene, Seen, Watched, counted, load_networks, measure_film, mouth_measure
from talk3d.metrics.report import Films, Measure, Report, Row, measure
from talk3d.metrics.truth import Truth, camera_errors, find_truth, load_truth
from talk3d.models.avatar import Avatar
from talk3d.ops.geometry import head_camera
from talk3d.perception.speech import load_speech_of
from talk3d.stages.animate import to_uint8
from talk3d.stages.views import Bench, NovelViews, attention_rows, make_scene, see_novel_views, see_orbit
from talk3d.types import Clip, Progress, Waveform, silent, spread_evenly

logger = logging.getLogger(__name__)

NUM_SHOWN = 6
"""Moments on the report's sheet."""
NUM_EXTREMES = 3
"""Worst and best frames that are shown."""
NEEDS_TRUTH = "the truth of an invented person: --truth FOLDER with truth.npz and its films"
AVATAR, TRUTH = "avatar", "truth"
"""The columns of the avatar, and of the real film held against itself."""
OPENING = "Mouth opening (distances of the outer eye corners)"
PLOTS = {
    "PSNR inside the face (dB)": "psnr_mask",
    "SSIM inside the face": "ssim_mask",
    OPENING: "opening",
    "Distance of lip points (distances of the outer eye corners)": "lmd_lips",
    "Lids apart (eye widths)": "eyes",
    "Head turn, rendered against real (°)": "pose_error",
    "Likeness (cosine)": "likeness",
}
"""Curves of the page by their headings."""
WITH_TRUTH = ("opening", "eyes")
"""Curves that are not differences, so that the real film has one as well."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How much is measured."""

    max_frames: int | None = None
    """Held-out frames to measure, from the first one; all by default."""
    novel_every: int = 4
    """Every how many frames the unseen cameras are compared."""
    controls: bool = True
    """Whether to render again with shifted sound, with unchanging sound and with sound alone, to show what the measures can tell."""
    shift_frames: int = 5
    """By how many frames the sound is shifted in the control: 200 ms at 25 frames a second."""
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
        WeightsError: a published network is there but is not the right one.
    """
    config, begun = config or EvaluateConfig(), time.perf_counter()
    bench = open_bench(avatar, clip, config.max_frames, config.batch_size, device=device, progress=progress)
    if not avatar.is_of(clip.source_sha256):
        logger.warning("the clip is of another film than the avatar: the measures say how unlike they are, not how good the avatar is")
    networks = load_networks(face_model, device)
    folder = truth if truth is not None else find_truth(Path(clip.source).parent)
    known = None if folder is None else load_truth(folder).part(int(clip.check.get("first_frame", 0)), clip.num_frames)
    scene = make_scene(clip, bench.frames, avatar.resolution, watcher(networks, progress, TRUTH), config.face_margin)
    films = {AVATAR: bench.film(AVATAR)}
    costs = _costs(bench)
    films |= {TRUTH: scene.pictures} | (_control_films(bench, config) if config.controls else {})
    seen = {name: measure_film(pictures, scene, networks, _named(progress, name)) for name, pictures in films.items()}
    columns = {name: [*one.measures, _against_truth(one, known, bench, networks.missing_face)] for name, one in seen.items()}
    views = None if known is None else see_novel_views(bench, known, config.novel_every)
    orbit, orbit_rows = see_orbit(bench, networks)
    columns[AVATAR] += [*costs, _pause_measure(bench, networks), *_truth_measures(bench, known, views), *orbit]
    pictures = show_moments(films[AVATAR], scene, bench.frames, seen[AVATAR].curves) | {
        "Unseen cameras, real and rendered": [] if views is None else views.rows,
        "A turn of the camera": orbit_rows,
        "Where the attention U-Net looks, from least (dark) to most (bright); motion that is not its own is the linear bases'": attention_rows(
            bench, bench.frames[spread_evenly(len(bench.frames), NUM_EXTREMES)]
        ),
    }
    facts = _facts(bench, networks, folder, "given" if truth is not None else "found beside the clip's video", views)
    return Report(
        columns=columns,
        facts=facts | {"seconds": round(time.perf_counter() - begun, 1)},
        pictures={heading: rows for heading, rows in pictures.items() if any(rows)},
        series=curves_of(seen, known, bench.frames),
        films=Films(pictures={"real": scene.pictures, AVATAR: films[AVATAR]}, fps=clip.fps, waveform=scene.waveform),
    )


def open_bench(avatar: Avatar, clip: Clip, max_frames: int | None, batch_size: int, *, device: str, progress: Progress) -> Bench:
    """Put an avatar before the held-out frames of a clip.

    Raises:
        ConfigError: the clip holds nothing out, or its speech features are not those that the avatar listens to.
    """
    frames = held_out(clip, max_frames)
    if clip.audio.source != avatar.audio_source:
        raise ConfigError(f"the avatar listens to {avatar.audio_source!r}, the clip has {clip.audio.source!r} features: track the video again")
    return Bench(avatar=avatar.to(device).eval(), clip=clip, frames=frames, batch_size=batch_size, device=device, progress=progress)


def held_out(clip: Clip, max_frames: int | None) -> Int[Tensor, " t"]:
    """Numbers of the frames that no training saw.

    Raises:
        ConfigError: there are none.
    """
    if clip.num_training_frames >= clip.num_frames:
        raise ConfigError("the clip holds no frames out, so there is nothing honest to measure: track a longer video")
    stop = clip.num_frames if max_frames is None else min(clip.num_frames, clip.num_training_frames + max_frames)
    return torch.arange(clip.num_training_frames, stop)


def watcher(networks: Networks, progress: Progress, name: str) -> Callable[[np.ndarray], Watched]:
    """What the detector sees of a film, with progress under the film's name."""
    return lambda pictures: Watched(networks.face, pictures, _named(progress, name))


def _named(progress: Progress, name: str) -> Progress:
    """Progress of the detector under the name of the film that it watches."""
    return lambda stage, step, total, values: progress(f"{stage} {name}", step, total, values)


def _control_films(bench: Bench, config: EvaluateConfig) -> dict[str, UInt8[np.ndarray, "t h w 3"]]:
    """Films with sound of other moments, with one sound that never changes, and with sound alone."""
    audio = bench.clip.audio
    mean = audio.values[: bench.clip.num_training_frames].mean(0)

    def later(frames: Int[Tensor, " b"]) -> Float[Tensor, "b n f c"]:
        return audio.around(frames + config.shift_frames)

    def still(frames: Int[Tensor, " b"]) -> Float[Tensor, "b n f c"]:
        return mean.expand_as(audio.around(frames))

    shift = f"sound +{1000 * config.shift_frames / bench.clip.fps:.0f} ms"
    return {
        shift: bench.film(shift, later),
        "frozen mouth": bench.film("frozen mouth", still),
        "sound alone": bench.film("sound alone", still=True),
    }


def _costs(bench: Bench) -> list[Measure]:
    """What rendering the film cost."""
    times = bench.render_s[1:] or bench.render_s
    found = [counted(measure("render_time", 1000 * float(np.mean(times))), len(bench.frames))]
    if bench.device.startswith("cuda"):
        return [*found, measure("memory", torch.cuda.max_memory_allocated(bench.device) / 2**20)]
    try:
        import resource
    except ImportError:  # Windows
        return [*found, measure("memory", [], needs="a system that tells it")]
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return [*found, measure("memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)]


def _pause_measure(bench: Bench, networks: Networks) -> Measure:
    """Motion of the lips in the last second of a silence that follows held-out speech, all else held still."""
    name, clip = "silence_motion_made", bench.clip
    if networks.face is None:
        return measure(name, [], needs=networks.missing_face)
    rate, fps = clip.waveform.sample_rate_hz, clip.fps
    try:
        encoder = load_speech_of(clip.audio.source, bench.device)
    except (ConfigError, WeightsError) as error:
        return measure(name, [], needs=str(error))
    start, second = round(int(bench.frames[0]) / fps * rate), round(fps)
    speech = clip.waveform.samples[start : start + rate]
    samples = torch.cat([speech, torch.zeros(2 * rate)])
    heard = encoder(Waveform(samples=samples, sample_rate_hz=rate), round(len(samples) / rate * fps), fps)
    frames = torch.arange(len(heard.values) - second - 4, len(heard.values) - 4)
    camera = head_camera(torch.zeros(1, 3))
    pictures: list[np.ndarray] = []
    for some in frames.split(bench.batch_size):
        driving = bench.driving(bench.frames[:1].expand(len(some)), lambda _, some=some: heard.around(some), still=True)
        pictures.extend(to_uint8(bench.render(driving, camera[torch.zeros(len(some), dtype=torch.long)])[0]))
    watched = Watched(networks.face, pictures, _named(bench.progress, "silence"))
    if watched.seen.sum() < 3:
        return measure(name, [], needs="a face in the rendered silence")
    return counted(measure(name, lip_motion(watched.landmarks[torch.from_numpy(np.flatnonzero(watched.seen))])), int(watched.seen.sum()))


def _against_truth(seen: Seen, truth: Truth | None, bench: Bench, missing: str) -> Measure:
    """Mouth opening that the detector sees in a film against the truth's."""
    if truth is None:
        return measure("mouth_correlation_truth", [], needs=NEEDS_TRUTH)
    return mouth_measure("mouth_correlation_truth", seen.watched, truth.mouth_opening[bench.frames.numpy()], missing)


def _truth_measures(bench: Bench, truth: Truth | None, views: NovelViews | None) -> list[Measure]:
    """Measures against what is known of an invented person."""
    if truth is None or views is None:
        return [measure(name, [], needs=NEEDS_TRUTH) for name in ("camera_rotation", "camera_reprojection", "novel_psnr", "novel_ssim")]
    errors = camera_errors(truth, bench.clip.track, views.alignment, bench.frames.numpy(), bench.clip.frames.shape[1])
    return [measure("camera_rotation", errors.rotation_deg), measure("camera_reprojection", errors.reprojection_px), *views.measures]


def show_moments(
    pictures: UInt8[np.ndarray, "t h w 3"], scene: Scene, frames: Int[Tensor, " t"], curves: Mapping[str, Float[np.ndarray, " t"]]
) -> dict[str, list[Row]]:
    """Real and rendered pictures one above the other: moments spread evenly, and the worst and the best by PSNR inside the face."""
    score = np.nan_to_num(curves["psnr_mask"], nan=np.inf)
    order = np.argsort(score, kind="stable")
    order = order[np.isfinite(score[order])]
    even = spread_evenly(len(pictures), NUM_SHOWN).tolist()

    def rows(chosen: Sequence[int] | np.ndarray) -> list[Row]:
        real = [(f"real {int(frames[k])}", scene.pictures[k]) for k in chosen]
        return [
            real,
            [(f"rendered, {score[k]:.1f} dB in the face", pictures[k]) for k in chosen],
            [("4 x difference", _difference(pictures[k], scene.pictures[k])) for k in chosen],
        ]

    return {"Held-out moments": rows(even), "Worst frames": rows(order[:NUM_EXTREMES]), "Best frames": rows(order[::-1][:NUM_EXTREMES])}


def _difference(ours: UInt8[np.ndarray, "h w 3"], real: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Four times the absolute difference."""
    return np.minimum(4 * np.abs(ours.astype(np.int16) - real), 255).astype(np.uint8)


def curves_of(seen: Mapping[str, Seen], truth: Truth | None, frames: Int[Tensor, " t"]) -> dict[str, dict[str, Float[np.ndarray, " t"]]]:
    """Curves of the films by heading and film; the real film has one only where a curve is no difference from it.

    Args:
        seen: the films by name.
        truth: of an invented person.
        frames: of the clip.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for heading, name in PLOTS.items():
        order = sorted(seen, key=lambda film: film == TRUTH)  # the real film last, so that the others keep their colours
        shown = {film: seen[film].curves[name] for film in order if name in seen[film].curves and (film != TRUTH or name in WITH_TRUTH)}
        found[heading] = {"real" if film == TRUTH else film: curve for film, curve in shown.items() if np.isfinite(curve).any()}
    if truth is not None:
        found[OPENING]["known truth"] = truth.mouth_opening[frames.numpy()]
    return {heading: lines for heading, lines in found.items() if lines}


def driven_by(clip: Clip) -> dict[str, str]:
    """Where each driving token comes from, and what of the whole clip went into it."""
    return {
        "audio": f"{clip.audio.source} features of the clip's own sound, whole clip, so context crosses into the training part",
        "blink": "tracked in the held-out frames (eyelids), on a scale that the whole clip sets",
        "upper_face": "tracked in the held-out frames (brows, irises and upper cheeks)",
        "head_pose": "tracked in the held-out frames (rigid points and skin, one solution for the whole clip, smoothed over time)",
        "anchors": "tracked in the held-out frames (projected from the rigid pose)",
        "cameras": "tracked in the held-out frames, with head_pose",
        "mouth": "the sound, on head and upper cheeks held so: no point of lips or jaw, picture or matte of a held-out frame reaches the avatar",
        "background": "a plate of the training frames",
    }


def _facts(bench: Bench, networks: Networks, truth: Path | None, truth_is: str, views: NovelViews | None) -> dict[str, Any]:
    clip = bench.clip
    alignment = None if views is None else views.alignment
    return {
        **facts_of(clip, bench.frames, networks, bench.device),
        "avatar": dict(bench.avatar.provenance),
        "side_px": bench.avatar.resolution,
        "driven_by": driven_by(clip)
        | {
            "novel_views": "the same tokens; cameras from the truth",
            "sound alone": "blink, upper_face, head_pose and anchors are the means of the training part; cameras tracked",
        },
        "truth": {"folder": str(truth), "was": truth_is} if truth else None,
        "head_space": None
        if alignment is None
        else {"scale": alignment.scale, "rotation": alignment.rotation.tolist(), "shift": alignment.shift.tolist()},
    }


def facts_of(clip: Clip, frames: Int[Tensor, " t"], networks: Networks, device: str) -> dict[str, Any]:
    """What any report says of its clip and of what measured."""
    return {
        "versions": {
            "talk3d": talk3d.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "torchmetrics")},
        },
        "clip": {"source": clip.source, "sha256": clip.source_sha256, "fps": clip.fps, "frames": clip.num_frames, "check": clip.check},
        "measured_frames": {"first": int(frames[0]), "last": int(frames[-1]), "training_frames": clip.num_training_frames},
        "networks": networks.sources,
        "masks": clip.masks.source,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads",
    }
