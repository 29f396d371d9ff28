"""Compare: several avatars, or films that other systems made of the same moments, ranked on the held-out part of one clip."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from talk3d.errors import ConfigError
from talk3d.io.media import read_video, scan_video
from talk3d.metrics.film import load_networks, measure_film
from talk3d.metrics.report import Films, Measure, Report, Row, definition_of
from talk3d.models.avatar import Avatar
from talk3d.stages.evaluate import NUM_SHOWN, TRUTH, curves_of, driven_by, facts_of, held_out, open_bench, watcher
from talk3d.stages.views import make_scene, real_pictures
from talk3d.types import Clip, Progress, silent, spread_evenly

RANKED = (
    *("psnr_mask", "ssim_mask", "lpips_alex", "fid", "lmd_lips", "mouth_correlation", "mouth_lag", "lse_d", "lse_c", "csim", "likeness"),
    *("pose_error", "blink_correlation", "jitter", "flicker", "silence_motion"),
)
"""Measures whose ranks are averaged; one of each kind, and only those that every competitor has."""
LATE_FRAMES = 5
"""How late the late control is: 200 ms at 25 frames a second."""
FROZEN = "truth, one frame"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is compared."""

    max_frames: int | None = None
    """Held-out frames to compare, from the first one; all by default."""
    cropped: bool = False
    """Whether the films of other systems show the clip's crops already, and not the whole pictures of its video."""
    controls: bool = True
    """Whether to measure two controls beside the competitors: the real film coming late, and its first moment throughout."""
    face_margin: float = 0.1
    """Border of the face box beyond the landmarks, in shares of its larger side."""
    batch_size: int = 4
    """Frames rendered at once."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        if self.batch_size < 1 or (self.max_frames is not None and self.max_frames < 1):
            raise ConfigError("compare needs a positive batch size and number of frames: give positive numbers")


def compare(
    competitors: Mapping[str, Avatar | Path],
    clip: Clip,
    config: CompareConfig | None = None,
    *,
    face_model: Path | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Report:
    """Measure every competitor on the same held-out frames by the same code, and rank them by the mean of their ranks; films are read first.

    Args:
        competitors: by name: avatars, or paths of films of the clip's frames (all of them, or the held-out ones).
        clip: of the same person.
        config: what is compared.
        face_model: a face_landmarker.task; see `load_face_model`.
        device: where to render.
        progress: hears every frame.

    Raises:
        ConfigError: there is nothing to compare, an avatar listens to other features, or a film has another number of frames.
        MediaError: a film cannot be read.
    """
    config, begun = config or CompareConfig(), time.perf_counter()
    if not competitors or TRUTH in competitors:
        raise ConfigError("there is nothing to compare, or a competitor is called truth: give one or more avatars or films of other names")
    frames, side = held_out(clip, config.max_frames), clip.frames.shape[1]
    networks = load_networks(face_model, device)
    films: dict[str, UInt8[np.ndarray, "t h w 3"]] = {}
    for name, competitor in competitors.items():
        if isinstance(competitor, Path):
            films[name] = read_crops(competitor, clip, frames, cropped=config.cropped)
            progress(f"read {name}", len(frames), len(frames), {})
    for name, competitor in competitors.items():
        if not isinstance(competitor, Path):
            bench = open_bench(competitor, clip, config.max_frames, config.batch_size, device=device, progress=progress)
            films[name] = _resized(bench.film(name), side)
    scene = make_scene(clip, frames, side, watcher(networks, progress, TRUTH), config.face_margin)
    controls = _control_films(clip, scene.pictures, frames) if config.controls else {}
    seen = {name: measure_film(pictures, scene, networks, progress) for name, pictures in (films | {TRUTH: scene.pictures} | controls).items()}
    columns = {name: one.measures for name, one in seen.items()}
    competing, real = {name: columns[name] for name in competitors}, columns[TRUTH]
    ranks = rank(competing, real)
    return Report(
        columns={name: columns[name] for name in (*ranks, TRUTH, *controls)},
        facts={
            **facts_of(clip, frames, networks, device),
            "ranking": ranks,
            "ranked_by": ranked_by(competing, real),
            "driven_by": driven_by(clip) | {"films of others": "unknown: ask their makers what drove them"},
            "seconds": round(time.perf_counter() - begun, 1),
        },
        pictures={"Held-out moments": _moments({TRUTH: scene.pictures, **{name: films[name] for name in ranks}}, frames)},
        series=curves_of({name: seen[name] for name in (*competitors, TRUTH)}, None, frames),
        films=Films(pictures={"real": scene.pictures, **{name: films[name] for name in ranks}}, fps=clip.fps, waveform=scene.waveform),
    )


def ranked_by(columns: Mapping[str, Sequence[Measure]], truth: Sequence[Measure]) -> list[str]:
    """Return those of `RANKED` that all competitors have and, where they should be near to the real film's, the real film has."""
    has = [{entry.name for entry in column if entry.value is not None} for column in columns.values()]
    real = {entry.name for entry in truth if entry.value is not None}
    return [name for name in RANKED if all(name in known for known in has) and (definition_of(name).better != "as real" or name in real)]


def rank(columns: Mapping[str, Sequence[Measure]], truth: Sequence[Measure]) -> dict[str, float]:
    """Return the mean rank (1 is best) of every competitor over the measures of `ranked_by`, the best one first.

    Equal values share the mean of their ranks.

    Args:
        columns: the competitors' measures.
        truth: those of the real film, which some should be near to.
    """
    values = {label: {entry.name: entry for entry in column} for label, column in columns.items()}
    real = {entry.name: entry.value for entry in truth}
    total: dict[str, list[float]] = {label: [] for label in columns}
    for name in ranked_by(columns, truth):
        cost = {label: _cost(known[name], real.get(name)) for label, known in values.items()}
        for label in cost:
            below, equal = (sum(test(other, cost[label]) for other in cost.values()) for test in (float.__lt__, float.__eq__))
            total[label].append(below + (equal + 1) / 2)
    means = {label: float(np.mean(ranks)) if ranks else float("nan") for label, ranks in total.items()}
    return dict(sorted(means.items(), key=lambda entry: entry[1]))


def _cost(entry: Measure, real: float | None) -> float:
    """What a measure says, turned so that less is better."""
    assert entry.value is not None
    if entry.better == "as real":
        assert real is not None
        return abs(entry.value - real)
    return -entry.value if entry.better == "higher" else entry.value


def _control_films(clip: Clip, real: UInt8[np.ndarray, "t s s 3"], frames: Int[Tensor, " t"]) -> dict[str, UInt8[np.ndarray, "t s s 3"]]:
    """Films that are perfect but for one thing: they come late, or stand still."""
    before = (frames[:LATE_FRAMES] - LATE_FRAMES).clamp_min(0)
    late = np.concatenate([real_pictures(clip, before, real.shape[1])[0], real[:-LATE_FRAMES]])[: len(frames)]
    return {f"truth {1000 * LATE_FRAMES / clip.fps:.0f} ms late": late, FROZEN: np.repeat(real[:1], len(real), 0)}


def read_crops(path: Path, clip: Clip, frames: Int[Tensor, " t"], *, cropped: bool = False) -> UInt8[np.ndarray, "t s s 3"]:
    """Read the held-out moments out of a film and cut them as the clip's own frames were cut.

    Args:
        path: a film of all of the clip's frames, or of the held-out ones alone.
        clip: of the same person.
        frames: which of its frames.
        cropped: whether the film shows the crops already.

    Raises:
        ConfigError: the film has another number of frames, or its pictures lie elsewhere.
        MediaError: it cannot be read.
    """
    scan, side = scan_video(path, clip.fps), clip.frames.shape[1]
    first = {clip.num_frames: int(frames[0]), clip.num_frames - clip.num_training_frames: 0}.get(scan.num_frames)
    if first is None:
        held = clip.num_frames - clip.num_training_frames
        raise ConfigError(
            f"{path} has {scan.num_frames} frames, the clip {clip.num_frames}, the last {held} of them held out: give a film of all or of these"
        )
    found = []
    for number, picture in enumerate(read_video(path, scan=scan)):
        if first <= number < first + len(frames):
            found.append(_resized(picture[None], side)[0] if cropped else cut(picture, clip.track.crop[int(frames[number - first])], side, path))
    return np.stack(found)


def cut(picture: UInt8[np.ndarray, "h w 3"], affine: Float[np.ndarray, "2 3"], side: int, path: Path) -> UInt8[np.ndarray, "s s 3"]:
    """Cut one picture by its affine map from source to crop pixels; shrunk pictures are averaged, edges repeated.

    Args:
        picture: a whole picture of the source's size.
        affine: source to crop.
        side: of the crop, px.
        path: named if the crop lies outside.

    Raises:
        ConfigError: the middle of the crop is not in the picture.
    """
    back = np.linalg.inv(np.concatenate([affine, [[0.0, 0.0, 1.0]]]))[:2]
    x, y = back @ [side / 2, side / 2, 1]
    if not (0 <= x < picture.shape[1] and 0 <= y < picture.shape[0]):
        size = f"{picture.shape[1]} by {picture.shape[0]}"
        raise ConfigError(
            f"{path} shows {size} pixels, in which the clip's face lies outside: give whole pictures of the source's size, or --cropped"
        )
    scale = float(np.sqrt(abs(np.linalg.det(back[:, :2]))))
    finer = max(1, round(scale))  # source pixels per crop pixel: sample finer, then average
    grid = torch.from_numpy(np.stack(np.meshgrid(*(2 * [(np.arange(side * finer) + 0.5) / finer])), -1).reshape(-1, 2))
    places = grid @ torch.from_numpy(back[:, :2]).mT + torch.from_numpy(back[:, 2])
    size = torch.tensor([picture.shape[1], picture.shape[0]], dtype=torch.float64)
    source = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()  # 1 3 h w
    where = (2 * places / size - 1).float().view(1, side * finer, side * finer, 2)
    sampled = torch.nn.functional.grid_sample(source, where, padding_mode="border", align_corners=False)
    averaged = torch.nn.functional.avg_pool2d(sampled, finer)[0]
    return (averaged + 0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()  # s s 3


def _resized(pictures: UInt8[np.ndarray, "t h w 3"], side: int) -> UInt8[np.ndarray, "t s s 3"]:
    if pictures.shape[1:3] == (side, side):
        return pictures
    return np.stack([np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)) for picture in pictures])


def _moments(films: Mapping[str, np.ndarray], frames: Int[Tensor, " t"]) -> list[Row]:
    """The same moments of all films, one above the other."""
    chosen = spread_evenly(len(frames), NUM_SHOWN).tolist()
    return [[(f"{name} {int(frames[k])}", film[k]) for k in chosen] for name, film in films.items()]
