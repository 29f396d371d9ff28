"""One film held against the real one, frame by frame: every measure that needs pictures alone, no avatar.

A film is an array of frames before any codec, so that avatars, controls and the films of other systems are measured by the same code.
The parts of the face come from the tracked points of the real film, and never move with the film that is measured.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from talk3d.errors import WeightsError
from talk3d.io.catalogue import CATALOGUE, is_there
from talk3d.metrics import face as measures_of
from talk3d.metrics.image import box_around, box_mask, distribution_distances, flicker, floats, outline_mask, psnr, root_mean, ssim
from talk3d.metrics.report import REGIONS, Measure, measure
from talk3d.perception.facetemplate import load_template
from talk3d.perception.identity import Likeness, align_faces, five_points, load_identity
from talk3d.perception.inception import load_inception
from talk3d.perception.landmarks import FaceModel, FaceTracker, eye_openings, load_face_model, mouth_opening
from talk3d.perception.lipsync import NUM_FRAMES, SYNC_FPS, load_syncnet
from talk3d.perception.perceptual import load_lpips
from talk3d.perception.regions import FACE_OVAL, OUTER_LIPS
from talk3d.types import Progress, Waveform, silent

BATCH = 8
"""Frames in memory as floating-point numbers at once."""
MOUTH_MARGIN = 0.25
"""Border of the mouth's box, in shares of its larger side."""
LEAST_SIDE_PX = 177
"""Multi-scale SSIM halves pictures four times and still needs eleven pixels."""
LEAST_FRAMES = 16
"""Fewer pictures say nothing of distributions."""
SYNC_MARGIN = 1.8
"""Side of the crops that SyncNet sees over that of the face's box."""
LOADERS = {
    "arcface": load_identity,
    "lpips-alex": lambda path, device: load_lpips("alex", path, device),
    "lpips-vgg": lambda path, device: load_lpips("vgg", path, device),
    "syncnet": load_syncnet,
    "inception": load_inception,
}
"""Published networks that measure, by their names in the catalogue."""
FACE_LANDMARKER = "face-landmarker: talk3d weights fetch face-landmarker"


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What looks at the films."""

    face: FaceModel | None
    published: Mapping[str, Any]
    """Those of `LOADERS` that are there."""
    device: str = "cpu"
    missing_face: str = ""
    """Why there is no face model."""

    def get(self, name: str) -> Any:
        """Return a published network, or None."""
        return self.published.get(name)

    @property
    def sources(self) -> dict[str, str]:
        """What measured, to be recorded with it."""
        found = {name: network.source for name, network in self.published.items()}
        return {"face": self.face.source if self.face else "none", "likeness": Likeness.source, **found}


def load_networks(face_model: Path | None = None, device: str = "cpu") -> Networks:
    """Load the face model and every published network that is in its place; none is ever fetched.

    Args:
        face_model: a face_landmarker.task; see `load_face_model`.
        device: where the published networks compute.

    Raises:
        WeightsError: a network is there but is not the right one.
    """
    published = {name: loader(None, device) for name, loader in LOADERS.items() if is_there(CATALOGUE[name])}
    try:
        return Networks(face=load_face_model(face_model), published=published, device=device)
    except WeightsError as error:
        return Networks(face=None, published=published, device=device, missing_face=f"a face model: {error}")


class Watched:
    """What one detector saw of one film, frame after frame; nan where it saw no face."""

    def __init__(self, model: FaceModel | None, pictures: Iterable[UInt8[np.ndarray, "h w 3"]] = (), progress: Progress = silent) -> None:
        """Watch a film; without a model no face is ever seen.

        Args:
            model: finds the points.
            pictures: the film.
            progress: hears how many frames were watched.
        """
        tracker = FaceTracker(model) if model else None
        points, expressions = [], []
        for number, picture in enumerate(pictures, 1):
            seen = tracker.follow(np.ascontiguousarray(picture)) if tracker else None
            points.append(seen.landmarks if seen else None)
            expressions.append(seen.expression if seen else None)
            progress("watch", number, 0, {})
        self.landmarks: Float[Tensor, "t n 2"] = torch.from_numpy(_filled(points, (478, 2)))
        """In pixels."""
        self.expression: Float[np.ndarray, "t e"] = _filled(expressions, (0,))
        """Blendshapes, where the model gives them."""
        self.seen: Bool[np.ndarray, " t"] = np.array([entry is not None for entry in points], bool)
        """Where a face was found."""

    @property
    def opening(self) -> Float[np.ndarray, " t"]:
        """Mouth opening."""
        return mouth_opening(self.landmarks).double().numpy()

    @property
    def eyes(self) -> Float[np.ndarray, " t"]:
        """Distance of the lids over the eye's width, mean of both eyes."""
        return np.array([np.mean(eye_openings(points)) if np.isfinite(points).all() else np.nan for points in self.landmarks.numpy()])


def _filled(values: list[np.ndarray | None], shape: tuple[int, ...]) -> np.ndarray:
    blank = np.full(next((value.shape for value in values if value is not None), shape), np.nan, np.float32)
    return np.stack([blank if value is None else value for value in values]) if values else np.zeros((0, *shape), np.float32)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The real film of some moments, and what is known of it."""

    pictures: UInt8[np.ndarray, "t h w 3"]
    mattes: Float[Tensor, "t 1 h w"]
    """Of the person, [0, 1]."""
    landmarks: Float[Tensor, "t n 2"]
    """As tracked, in pixels of the pictures."""
    waveform: Waveform
    """Sample 0 is the start of the first frame."""
    fps: float
    watched: Watched
    """The same detector's view of the real film."""
    margin: float = 0.1
    """Border of the face box."""

    def masks(self, part: slice) -> dict[str, Float[Tensor, "b 1 h w"] | None]:
        """Weights of the pixels of some frames, by the names of `REGIONS`; None for all."""
        height, width = self.pictures.shape[1:3]
        points = self.landmarks[part]
        mouth = box_around(points[:, list(OUTER_LIPS)], MOUTH_MARGIN)
        return {
            "": None,
            "_face": box_mask(measures_of.face_box(points, self.margin), height, width),
            "_person": self.mattes[part],
            "_mask": torch.stack([outline_mask(one, FACE_OVAL, height, width) for one in points]),
            "_mouth": box_mask(mouth, height, width),
        }

    def face(self, frame: int) -> Bool[np.ndarray, "h w"]:
        """Pixels inside the outline of the face in one frame."""
        return outline_mask(self.landmarks[frame], FACE_OVAL, *self.pictures.shape[1:3])[0].numpy() > 0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A film's measures, and its curves by the measures' names."""

    measures: list[Measure]
    curves: dict[str, Float[np.ndarray, " t"]]
    watched: Watched


def measure_film(pictures: UInt8[np.ndarray, "t h w 3"], scene: Scene, networks: Networks, progress: Progress = silent) -> Seen:
    """Hold a film against the real one.

    Args:
        pictures: as many, and as large, as the real ones.
        scene: the real film.
        networks: what looks at them.
        progress: hears every frame that the detector watched.
    """
    watched = scene.watched if pictures is scene.pictures else Watched(networks.face, pictures, progress)
    curves = _picture_curves(pictures, scene, networks)
    measures = [_of_pictures(name, curves, scene) for name in (*(f"{kind}{end}" for kind in ("psnr", "ssim") for end in REGIONS), "ms_ssim")]
    measures += [_of_network(name, curves, name.replace("_", "-")) for name in ("lpips_alex", "lpips_vgg")]
    measures += _distribution_measures(pictures, scene, networks)
    face_curves = _face_curves(watched, scene, networks)
    curves |= face_curves
    measures += _face_measures(watched, scene, face_curves, networks)
    measures += _identity_measures(pictures, watched, scene, networks, curves)
    measures += _sync_measures(pictures, scene, networks)
    measures += _temporal_measures(pictures, scene)
    return Seen(measures=measures, curves=curves, watched=watched)


def _picture_curves(pictures: np.ndarray, scene: Scene, networks: Networks) -> dict[str, np.ndarray]:
    found: dict[str, list[Tensor]] = {}
    distances = {name: networks.get(name.replace("_", "-")) for name in ("lpips_alex", "lpips_vgg")}
    for start in range(0, len(pictures), BATCH):
        part = slice(start, min(start + BATCH, len(pictures)))
        ours, real = floats(pictures[part]), floats(scene.pictures[part])
        for end, mask in scene.masks(part).items():
            found.setdefault(f"psnr{end}", []).append(psnr(ours, real, mask))
            found.setdefault(f"ssim{end}", []).append(ssim(ours, real, mask))
        if min(ours.shape[-2:]) >= LEAST_SIDE_PX:
            value = multiscale_structural_similarity_index_measure(ours, real, reduction="none", data_range=1.0)
            assert isinstance(value, Tensor)
            found.setdefault("ms_ssim", []).append(value)
        for name, network in distances.items():
            if network is not None:
                with torch.no_grad():
                    both = network(2 * ours.to(networks.device) - 1, 2 * real.to(networks.device) - 1)
                found.setdefault(name, []).append(both.cpu())
    return {name: torch.cat(values).double().numpy() for name, values in found.items()}


def _of_pictures(name: str, curves: Mapping[str, np.ndarray], scene: Scene) -> Measure:
    needs = f"pictures of at least {LEAST_SIDE_PX} px" if name == "ms_ssim" else "frames in which this part is seen"
    return measure(name, curves.get(name, np.zeros(0)), needs=needs)


def _of_network(name: str, curves: Mapping[str, np.ndarray], network: str) -> Measure:
    return measure(name, curves.get(name, np.zeros(0)), needs=fetching(network))


def fetching(network: str) -> str:
    """What a measure needs whose published network is not there."""
    return f"{network}: talk3d weights fetch {network}"


def _distribution_measures(pictures: np.ndarray, scene: Scene, networks: Networks) -> list[Measure]:
    network = networks.get("inception")
    if network is None or len(pictures) < LEAST_FRAMES:
        needs = fetching("inception") if network is None else f"at least {LEAST_FRAMES} frames"
        return [measure(name, [], needs=needs) for name in ("fid", "kid")]
    fid, kid = distribution_distances(network, scene.pictures, pictures, networks.device)
    count = len(pictures)
    return [replace(measure(name, value), num_frames=count) for name, value in (("fid", fid), ("kid", kid))]


def _face_curves(watched: Watched, scene: Scene, networks: Networks) -> dict[str, np.ndarray]:
    """Per-frame face measures, nan where one of the films shows no face."""
    curves = {"opening": watched.opening, "eyes": watched.eyes}
    both = torch.from_numpy(np.flatnonzero(watched.seen & scene.watched.seen))
    if networks.face is None:
        return curves
    ours, real = watched.landmarks[both], scene.watched.landmarks[both]
    shape = load_template(networks.face.kind).points
    found = {
        "lmd_lips": measures_of.landmark_distance,
        "lmd_face": measures_of.face_distance,
        "pose_error": lambda a, b: measures_of.turn_between(measures_of.head_rotations(a, shape), measures_of.head_rotations(b, shape)),
        "position_error": measures_of.rigid_distance,
    }
    for name, distance in found.items():
        curve = np.full(len(watched.seen), np.nan)
        if len(both):
            curve[both.numpy()] = distance(ours, real).numpy()
        curves[name] = curve
    if watched.expression.shape[1] == scene.watched.expression.shape[1] == 52:
        apart = np.abs(watched.expression - scene.watched.expression)
        curves["aue_lower"] = apart[:, list(measures_of.LOWER_BLENDSHAPES)].mean(1)
        curves["aue_upper"] = apart[:, list(measures_of.UPPER_BLENDSHAPES)].mean(1)
    return curves


def _face_measures(watched: Watched, scene: Scene, curves: Mapping[str, np.ndarray], networks: Networks) -> list[Measure]:
    missing = networks.missing_face
    both = watched.seen & scene.watched.seen
    num_missed = 0 if missing else int((~both).sum())

    def of_frames(name: str, needs: str) -> Measure:
        return measure(name, curves.get(name, np.zeros(0)), num_missed=num_missed, needs=missing or needs)

    def of_film(name: str, value: float, needs: str) -> Measure:
        return counted(measure(name, value, num_missed=num_missed, needs=missing or needs), int(both.sum()))

    real, ours = scene.watched.opening, watched.opening
    moving = correlation_possible(ours, real)
    lag = measures_of.mouth_lag(ours, real, scene.fps)
    gain = float(np.std(ours[both]) / np.std(real[both])) if moving else float("nan")
    return [
        of_frames("lmd_lips", "frames in which the face is found in both films"),
        of_frames("lmd_face", "frames in which the face is found in both films"),
        of_frames("aue_lower", FACE_LANDMARKER),
        of_frames("aue_upper", FACE_LANDMARKER),
        mouth_measure("mouth_correlation", watched, real, missing),
        of_film("mouth_gain", gain, "a mouth that moves"),
        of_film("mouth_lag", 1000 * lag / scene.fps, "a mouth that moves with the real one at some shift"),
        of_film("blink_correlation", measures_of.correlation(watched.eyes, scene.watched.eyes), "eyes that move"),
        of_frames("pose_error", "frames in which the face is found in both films"),
        of_frames("position_error", "frames in which the face is found in both films"),
        of_film("jitter", measures_of.jitter(watched.landmarks, watched.seen), "three frames in a row in which the face is found"),
        _silence_measure(watched, scene, missing),
    ]


def correlation_possible(values: Float[np.ndarray, " t"], truth: Float[np.ndarray, " t"]) -> bool:
    """Whether both curves move where both are known."""
    return bool(np.isfinite(measures_of.correlation(values, truth)))


def mouth_measure(name: str, watched: Watched, reference: Float[np.ndarray, " t"], missing: str) -> Measure:
    """Correlation of a film's mouth opening with a reference (nan: unknown), over the frames where both are known."""
    both = watched.seen & np.isfinite(reference)
    num_missed = 0 if missing else int((~both).sum())
    value = measures_of.correlation(watched.opening, reference)
    return counted(measure(name, value, num_missed=num_missed, needs=missing or "a mouth that moves"), int(both.sum()))


def counted(found: Measure, num_frames: int) -> Measure:
    """The same measure, which stands on this many frames."""
    return found if found.value is None else replace(found, num_frames=num_frames)


def _silence_measure(watched: Watched, scene: Scene, missing: str) -> Measure:
    motions, count = [], 0
    for first, end in measures_of.silent_spans(scene.waveform, len(watched.seen), scene.fps):
        inside = np.flatnonzero(watched.seen[first:end]) + first
        if len(inside) > 2:
            motions.append(measures_of.lip_motion(watched.landmarks[torch.from_numpy(inside)]))
            count += len(inside)
    return counted(measure("silence_motion", motions, needs=missing or "silence of 0.4 s or more in the held-out sound"), count)


def _identity_measures(pictures: np.ndarray, watched: Watched, scene: Scene, networks: Networks, curves: dict[str, np.ndarray]) -> list[Measure]:
    """Cosines of who is seen in both films; their curves are added to `curves`."""
    both = np.flatnonzero(watched.seen & scene.watched.seen)
    arcface = networks.get("arcface")
    found: dict[str, list[Tensor]] = {"csim": [], "likeness": []}
    describe = Likeness(networks.face.kind) if networks.face else None
    for index in np.array_split(both, max(1, len(both) // BATCH)) if len(both) else ():
        films = [(pictures, watched), (scene.pictures, scene.watched)]
        shown = [(floats(film[index]), points.landmarks[torch.from_numpy(index)]) for film, points in films]
        if describe is not None:
            found["likeness"].append((describe(*shown[0]) * describe(*shown[1])).sum(1))
        if arcface is not None:
            with torch.no_grad():
                ours, real = (arcface(align_faces(2 * picture - 1, five_points(points)).to(networks.device)) for picture, points in shown)
            found["csim"].append((ours * real).sum(1).cpu())
    for name, values in found.items():
        if values:
            curves[name] = np.full(len(pictures), np.nan)
            curves[name][both] = torch.cat(values).double().numpy()
    num_missed = 0 if networks.missing_face else len(pictures) - len(both)
    needs = {"csim": networks.missing_face or fetching("arcface"), "likeness": networks.missing_face or "frames in which the face is found"}
    if arcface is not None and not len(both):
        needs["csim"] = needs["likeness"]
    return [measure(name, curves.get(name, np.zeros(0)), num_missed=num_missed, needs=needs[name]) for name in found]


def _sync_measures(pictures: np.ndarray, scene: Scene, networks: Networks) -> list[Measure]:
    names, network = ("lse_d", "lse_c", "sync_offset"), networks.get("syncnet")
    if network is None or abs(scene.fps - SYNC_FPS) > 0.01 or len(pictures) < 2 * NUM_FRAMES:
        needs = fetching("syncnet") if network is None else f"{2 * NUM_FRAMES} frames or more at {SYNC_FPS:g} a second"
        return [measure(name, [], needs=needs) for name in names]
    faces = cut_faces(pictures, scene.landmarks)
    with torch.no_grad():
        distances = measures_of.sync_distances(network.see(faces.to(networks.device)).cpu(), network.hear(scene.waveform).cpu())
    return [counted(measure(name, value), len(pictures)) for name, value in zip(names, measures_of.lse(distances), strict=True)]


def cut_faces(pictures: UInt8[np.ndarray, "t h w 3"], landmarks: Float[Tensor, "t n 2"], side_px: int = 224) -> Float[Tensor, "t 3 s s"]:
    """The face with its surroundings in [-1, 1], as SyncNet learnt it: a square of one size round the tracked face, lower than its middle."""
    box = measures_of.face_box(landmarks, 0.0)
    size = SYNC_MARGIN * float((box[:, 3] - box[:, 1]).median())
    cut = []
    for picture, (left, top, right, bottom) in zip(pictures, box.tolist(), strict=True):
        x, y = (left + right) / 2, top + (bottom - top) / 2 + 0.1 * size
        corners = (x - size / 2, y - size / 2, x + size / 2, y + size / 2)
        matrix = (size / side_px, 0, corners[0], 0, size / side_px, corners[1])
        cut.append(np.asarray(Image.fromarray(picture).transform((side_px, side_px), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)))
    return 2 * floats(np.stack(cut)) - 1


def _temporal_measures(pictures: np.ndarray, scene: Scene) -> list[Measure]:
    """How pictures change from frame to frame."""
    nobody = scene.mattes.amax(0, keepdim=True) < 0.02
    face = [flicker(pictures[k - 1 : k + 1], scene.pictures[k - 1 : k + 1], scene.face(k)) for k in range(1, len(pictures))]
    behind = [flicker(pictures[k - 1 : k + 1], None, nobody[0, 0].numpy()) for k in range(1, len(pictures))]
    found = (("flicker", face, "two frames in which the face is seen"), ("flicker_background", behind, "pixels that are never the person's"))
    return [counted(measure(name, root_mean(squares), needs=needs), int(np.isfinite(squares).sum())) for name, squares, needs in found]
