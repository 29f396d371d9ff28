"""An avatar looked at for evaluation: the held-out moments, unseen cameras of the truth, a turn of the camera, and where its attention goes.

What drives the avatar is said in one place, `Bench.driving`: nothing else of the held-out part reaches it.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from talk3d.metrics.face import head_rotations, turn_between
from talk3d.metrics.film import Networks, Scene, Watched, fetching, floats
from talk3d.metrics.image import psnr, ssim
from talk3d.metrics.report import Measure, Row, measure
from talk3d.metrics.truth import HeadAlignment, NovelFrame, Truth, align_heads, novel_frames
from talk3d.models.avatar import Avatar, Renders
from talk3d.models.deltaplane import DeltaplanePredictor
from talk3d.ops.geometry import CAMERA_FOCAL, CAMERA_RADIUS, HEAD_PIVOT, head_camera
from talk3d.perception.facetemplate import load_template
from talk3d.perception.identity import Likeness, align_faces, five_points
from talk3d.perception.landmarks import observe_picture
from talk3d.stages.animate import composite, to_uint8
from talk3d.types import Camera, Clip, Driving, Progress, Waveform, spread_evenly

NUM_ALIGNED = 50
"""Training frames that the two head spaces are aligned on."""
ORBIT_YAWS_DEG = (0, -15, 15, -30, 30)
NUM_ORBITS = 6
"""Moments that are seen from all round."""
TOKENS = ("audio", "blink", "null", "head pose", "place")
"""The condition tokens, in order."""
HEAT = ((0.0, (16, 16, 48)), (0.35, (120, 28, 109)), (0.7, (237, 105, 37)), (1.0, (252, 255, 164)))
"""Colours of attention, from least to most."""

Sound = Callable[[Int[Tensor, " b"]], Float[Tensor, "b n f c"]]


@dataclass
class Bench:
    """The avatar, the clip's held-out frames, and how to get pictures of both."""

    avatar: Avatar
    clip: Clip
    frames: Int[Tensor, " t"]
    batch_size: int
    device: str
    progress: Progress
    render_s: list[float] = field(default_factory=list)
    """Seconds per frame of every batch that was rendered."""
    model: Renders = field(init=False)
    """What `animate` renders with."""

    def __post_init__(self) -> None:
        """Bake the avatar."""
        self.model = self.avatar.bake()

    def driving(self, frames: Int[Tensor, " b"], sound: Sound | None = None, *, still: bool = False) -> Driving:
        """What drives the avatar: the clip's sound features, blink, brows, gaze, cheeks, head pose, place; no point of lips or jaw, picture or matte.

        Args:
            frames: of the clip.
            sound: other features in place of the clip's.
            still: blink, brows, gaze, cheeks, pose and place are the means of the training part, so that nothing but the sound is told.
        """
        was = self.clip.driving(frames)
        if still:
            track, used = self.clip.track, slice(0, self.clip.num_training_frames)
            means = {name: getattr(track, name)[used].mean(0) for name in ("blink", "head_pose", "anchors", "upper_face")}
            was = replace(was, **{name: mean.expand(len(frames), -1) for name, mean in means.items()})
        return (was if sound is None else replace(was, audio=sound(frames))).to(self.device)

    def render(
        self, driving: Driving, camera: Camera, background: Float[Tensor, "b 3 h w"] | None = None
    ) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 1 h w"]]:
        """Rendered pictures over a background, by default the avatar's plate, and their mattes, in [0, 1]."""
        plate = 0.5 * (self.avatar.background[None] + 1) if background is None else background
        begun = time.perf_counter()
        with torch.no_grad():
            rendering = self.model.render(driving, camera.to(self.device))
        pictures, alpha = composite(rendering, plate.to(self.device)).cpu(), rendering.alpha.cpu()
        self.render_s.append((time.perf_counter() - begun) / len(pictures))
        return pictures, alpha

    def film(self, stage: str, sound: Sound | None = None, *, still: bool = False) -> UInt8[np.ndarray, "t h w 3"]:
        """Render every held-out frame with the camera of that frame; see `driving`."""
        pictures: list[np.ndarray] = []
        for frames in self.frames.split(self.batch_size):
            rendered, _ = self.render(self.driving(frames, sound, still=still), self.clip.track.cameras[frames])
            pictures.extend(to_uint8(rendered))
            self.progress(f"render {stage}", len(pictures), len(self.frames), {})
        return np.stack(pictures)


def make_scene(clip: Clip, frames: Int[Tensor, " t"], side: int, watch: Callable[[np.ndarray], Watched], margin: float) -> Scene:
    """The real film of some frames of a clip.

    Args:
        clip: of the person.
        frames: in order, without gaps.
        side: of the pictures, px.
        watch: what the detector sees of a film.
        margin: border of the face box.
    """
    parts = [real_pictures(clip, some, side) for some in frames.split(8)]
    pictures = np.concatenate([picture for picture, _ in parts])
    per_frame = clip.waveform.sample_rate_hz / clip.fps
    samples = clip.waveform.samples[round(int(frames[0]) * per_frame) : round((int(frames[-1]) + 1) * per_frame)]
    return Scene(
        pictures=pictures,
        mattes=torch.cat([matte for _, matte in parts]),
        landmarks=side / clip.frames.shape[1] * clip.track.landmarks[frames],
        waveform=Waveform(samples=samples, sample_rate_hz=clip.waveform.sample_rate_hz),
        fps=clip.fps,
        watched=watch(pictures),
        margin=margin,
    )


def real_pictures(clip: Clip, frames: Int[Tensor, " b"], side: int) -> tuple[UInt8[np.ndarray, "b s s 3"], Float[Tensor, "b 1 s s"]]:
    """Real pictures, and mattes in [0, 1], at this size."""
    images, mattes = clip.images(frames)
    if images.shape[-1] != side:
        images, mattes = (F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False) for x in (images, mattes))
    return to_uint8((0.5 * (images + 1)).clamp(0, 1)), mattes


@dataclass
class NovelViews:
    """What the unseen cameras of a truth saw."""

    alignment: HeadAlignment
    measures: list[Measure] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


def see_novel_views(bench: Bench, truth: Truth, every: int) -> NovelViews:
    """Render held-out moments from the truth's unseen cameras and compare.

    Args:
        bench: the avatar.
        truth: of the clip.
        every: how many frames lie between the moments.
    """
    clip, side = bench.clip, bench.avatar.resolution
    fitted = spread_evenly(clip.num_training_frames, NUM_ALIGNED).numpy()
    found = NovelViews(alignment=align_heads(truth, clip.track, fitted, clip.frames.shape[1]))
    chosen = bench.frames.numpy()[::every]
    chosen = chosen[chosen >= truth.novel_first_frame]
    pooled: dict[str, list[float]] = {"psnr": [], "ssim": []}
    single: list[Measure] = []
    for view in truth.novel if len(chosen) else ():
        scores: list[dict[str, float]] = []
        row: list[tuple[str, np.ndarray]] = []
        for number, (frame, known) in enumerate(zip(chosen, novel_frames(truth, view, chosen, side), strict=True), 1):
            ours, score = _novel_frame(bench, int(frame), known, found.alignment)
            scores.append(score)
            if number - 1 in (0, len(chosen) // 2):
                row += [(f"{view.name} real {frame}", known.picture), (f"{view.name} rendered", ours)]
            bench.progress(f"novel view {view.name}", number, len(chosen), {"psnr": score["psnr"]})
        found.rows.append(row)
        for name, values in pooled.items():
            values += [score[name] for score in scores]
        single.append(measure(f"novel_psnr_{view.name}", [score["psnr"] for score in scores]))
        single.append(measure(f"novel_psnr_crop_{view.name}", [score["psnr_crop"] for score in scores]))
    needs = "held-out frames that the truth's novel films show"
    found.measures += [*(measure(f"novel_{name}", values, needs=needs) for name, values in pooled.items()), *single]
    return found


def _novel_frame(bench: Bench, frame: int, known: NovelFrame, alignment: HeadAlignment) -> tuple[UInt8[np.ndarray, "h w 3"], dict[str, float]]:
    """One rendered picture, and how it compares inside the union of both mattes and in the whole crop."""
    camera = alignment.apply(known.camera)
    batched = Camera(cam2world=camera.cam2world[None], intrinsics=camera.intrinsics[None])
    background, real = floats(known.background[None]), floats(known.picture[None])
    ours, alpha = bench.render(bench.driving(torch.tensor([frame])), batched, background)
    union = torch.maximum(alpha, torch.from_numpy(known.matte)[None, None])
    scores = {"psnr": psnr(ours, real, union), "psnr_crop": psnr(ours, real), "ssim": ssim(ours, real, union)}
    return to_uint8(ours)[0], {name: float(value) for name, value in scores.items()}


def see_orbit(bench: Bench, networks: Networks) -> tuple[list[Measure], list[Row]]:
    """Turn the camera round held-out moments, pose tokens unchanged, and ask whether it stays a face, the same one, turned as far as the camera."""
    names = ["orbit_likeness", *(f"orbit_likeness_{yaw:+d}" for yaw in ORBIT_YAWS_DEG[1:]), "orbit_csim", "orbit_found", "orbit_pose_error"]
    moments = bench.frames[spread_evenly(len(bench.frames), NUM_ORBITS)]
    rows: list[Row] = []
    cosines: dict[str, dict[int, list[float]]] = {"likeness": {}, "csim": {}}
    turns, found = [], []
    for number, frame in enumerate(moments, 1):
        driving = bench.driving(frame.expand(len(ORBIT_YAWS_DEG)))
        cameras = head_camera(torch.tensor([[math.radians(yaw), 0.0, 0.0] for yaw in ORBIT_YAWS_DEG]))
        pictures = to_uint8(bench.render(driving, cameras)[0])
        rows.append(
            [(f"{int(frame)}: {yaw:+d}°", picture) for yaw, picture in sorted(zip(ORBIT_YAWS_DEG, pictures, strict=True), key=lambda e: e[0])]
        )
        if networks.face is not None:
            found += _look_round(pictures, networks, cosines, turns)
        bench.progress("orbit", number, len(moments), {})
    missing = networks.missing_face
    rest = missing or "a face in the frontal and the turned render"
    values: dict[str, Any] = {f"orbit_likeness_{yaw:+d}": cosines["likeness"].get(yaw, []) for yaw in ORBIT_YAWS_DEG[1:]}
    values |= {"orbit_likeness": _least(cosines["likeness"]), "orbit_csim": _least(cosines["csim"])}
    values |= {"orbit_found": found, "orbit_pose_error": turns}
    needs = {"orbit_csim": missing or (fetching("arcface") if networks.get("arcface") is None else rest)}
    return [measure(name, values[name], needs=needs.get(name, rest)) for name in names], rows[:2]


def _least(by_yaw: dict[int, list[float]]) -> float:
    """The worst yaw's mean; nan unless every yaw was seen."""
    whole = len(by_yaw) == len(ORBIT_YAWS_DEG) - 1
    return min(float(np.mean(values)) for values in by_yaw.values()) if whole else float("nan")


def _look_round(
    pictures: UInt8[np.ndarray, "v h w 3"], networks: Networks, cosines: dict[str, dict[int, list[float]]], turns: list[float]
) -> list[float]:
    """Compare the turned renders of one moment with the frontal one; return for each whether a face was found."""
    assert networks.face is not None
    seen = [observe_picture(networks.face, np.ascontiguousarray(picture)) for picture in pictures]
    front = seen[0]
    shape, describe, arcface = load_template(networks.face.kind).points, Likeness(networks.face.kind), networks.get("arcface")

    def embed(number: int, points: np.ndarray) -> dict[str, Tensor]:
        picture, places = floats(pictures[number][None]), torch.from_numpy(points)[None]
        found = {"likeness": describe(picture, places)[0]}
        if arcface is not None:
            with torch.no_grad():
                found["csim"] = arcface(align_faces(2 * picture - 1, five_points(places)).to(networks.device))[0].cpu()
        return found

    for number, (yaw, turned) in enumerate(zip(ORBIT_YAWS_DEG, seen, strict=True)):
        if number == 0 or front is None or turned is None:
            continue
        before, after = embed(0, front.landmarks), embed(number, turned.landmarks)
        for name, vector in after.items():
            cosines[name].setdefault(yaw, []).append(float(before[name] @ vector))
        first, second = (head_rotations(torch.from_numpy(one.landmarks)[None], shape) for one in (front, turned))
        turns.append(abs(float(turn_between(first, second)) - abs(yaw)))
    return [float(one is not None) for one in seen]


def network_share(avatar: Avatar, driving: Driving) -> float:
    """How much of the planes' motion between some moments is the network's, which attends to the tokens; the linear bases make the rest.

    Planes as they are against planes of the moments' mean tokens with the bases as they are: root mean square, over that of all motion.
    """
    with torch.no_grad():
        tokens = avatar.conditioner(driving)
        coefficients = avatar.conditioner.heard_coefficients(tokens, driving)
        prefix = avatar.predictor.prepare(avatar.personalized.triplane)
        calm_tokens = tokens.mean(0, keepdim=True).expand_as(tokens)
        planes, calm = (avatar.predictor.predict(prefix, one, coefficients).planes for one in (tokens, calm_tokens))
    return float((planes - calm).square().mean().sqrt() / (planes - planes.mean(0)).square().mean().sqrt().clamp(min=1e-12))


def attention_rows(bench: Bench, frames: Int[Tensor, " b"]) -> list[Row]:
    """Where the deltaplane looks at these moments: for each token how much the cells of the front plane attend to it, mean over blocks and heads.

    The plane is drawn as it lies in the head seen from straight ahead, beside that render, each token from its least to its most attention; every row
    is one moment, and says how much of the planes' motion is the network's own. Empty for an avatar without a deltaplane network.
    """
    if not isinstance(getattr(bench.avatar, "predictor", None), DeltaplanePredictor):
        return []
    driving = bench.driving(frames)
    maps = bench.avatar.score_maps(driving).mean((0, 2)).cpu()  # b m k
    share = f"{100 * network_share(bench.avatar, driving):.1f} % its own"
    pictures, _ = bench.render(driving, head_camera(torch.zeros(len(frames), 3)))
    large = front_view(maps, pictures.shape[-1], bench.avatar.personalized.renderer.renderer_config.box_warp)
    rows: list[Row] = []
    for number, frame in enumerate(frames.tolist()):
        row = [(f"frame {frame}: {share}", to_uint8(pictures[number : number + 1])[0])]
        for k, name in enumerate(TOKENS):
            low, high = (float(edge) for edge in large[number, k].aminmax())
            row.append((f"{name}: {100 * low:.1f} to {100 * high:.1f} %", _heat((large[number, k].numpy() - low) / max(high - low, 1e-6))))
        rows.append(row)
    return rows


def front_view(maps: Float[Tensor, "b m k"], side: int, box_warp: float) -> Float[Tensor, "b k s s"]:
    """Draw the first plane's cells (column x, row y) as a camera straight ahead sees them at the depth of its pivot.

    Args:
        maps: values of all cells of three square planes, row-major.
        side: of the picture, px.
        box_warp: side of the cube that the planes describe.
    """
    cells = math.isqrt(maps.shape[1] // 3)
    front = maps[:, : cells**2].permute(0, 2, 1).unflatten(2, (cells, cells))  # b k h w
    across = ((torch.arange(side) + 0.5) / side - 0.5) * CAMERA_RADIUS / CAMERA_FOCAL
    x, y = across + HEAD_PIVOT[0], HEAD_PIVOT[1] - across
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1) * (2 / box_warp)
    return F.grid_sample(front, grid.expand(len(maps), -1, -1, -1), align_corners=False, padding_mode="border")


def _heat(values: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Values between 0 and 1 as colours."""
    stops = [stop for stop, _ in HEAT]
    channels = [np.interp(values, stops, [colour[channel] for _, colour in HEAT]) for channel in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)
