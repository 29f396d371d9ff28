"""Face points in pictures: find the face, follow it from frame to frame, measure mouth and eyelids.

Runs MediaPipe's published networks through LiteRT, with the steps between them written here, so that nothing else of MediaPipe is needed and no
point is smoothed over time. Knows nothing of cameras or heads in space.

Reference: BlazeFace (arXiv 1907.05047); Real-time facial surface geometry from monocular video (arXiv 1907.06724).
"""

import contextlib
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from jaxtyping import Float, Float32, UInt8
from PIL import Image
from torch import Tensor

from talk3d.io.face_models import find_task, read_task, registry_model

logger = logging.getLogger(__name__)

RIGHT_EYE_CORNERS = (33, 133)
"""Outer and inner corner of the subject's right eye, on the left of the picture."""
LEFT_EYE_CORNERS = (263, 362)
"""Outer and inner corner of the subject's left eye."""
RIGHT_EYE = (33, 7, 163, 144, 145, 153, 154, 155, 133, 246, 161, 160, 159, 158, 157, 173)
"""Contour of the subject's right eye in the order of the eye network: lower lid from the outer corner, then upper lid."""
LEFT_EYE = (263, 249, 390, 373, 374, 380, 381, 382, 362, 466, 388, 387, 386, 385, 384, 398)
EYELID_PAIRS = (((160, 144), (159, 145), (158, 153)), ((387, 373), (386, 374), (385, 380)))
"""Upper and lower lid points of the right and the left eye."""
INNER_LIPS = ((82, 87), (13, 14), (312, 317))
"""Upper and lower inner lip points."""
EYE_BLINKS = (9, 10)
"""Blendshapes eyeBlinkLeft and eyeBlinkRight."""
BLENDSHAPE_POINTS = (
    *(0, 1, 4, 5, 6, 7, 8, 10, 13, 14, 17, 21, 33, 37, 39, 40, 46, 52, 53, 54, 55, 58, 61, 63, 65, 66, 67, 70, 78, 80, 81, 82, 84, 87, 88, 91, 93),
    *(95, 103, 105, 107, 109, 127, 132, 133, 136, 144, 145, 146, 148, 149, 150, 152, 153, 154, 155, 157, 158, 159, 160, 161, 162, 163, 168, 172),
    *(173, 176, 178, 181, 185, 191, 195, 197, 234, 246, 249, 251, 263, 267, 269, 270, 276, 282, 283, 284, 285, 288, 291, 293, 295, 296),
    *(297, 300, 308, 310, 311, 312, 314, 317, 318, 321, 323, 324, 332, 334, 336, 338, 356, 361, 362, 365, 373, 374, 375, 377, 378, 379, 380, 381),
    *(382, 384, 385, 386, 387, 388, 389, 390, 397, 398, 400, 402, 405, 409, 415, 454, 466, 468, 469, 470, 471, 472, 473, 474, 475, 476, 477),
)
"""The points that the blendshape network reads."""


@dataclass(frozen=True, kw_only=True)
class FaceBox:
    """A square round a face, turned so that the eyes are level in it."""

    centre_px: tuple[float, float]
    side_px: float
    angle_rad: float
    """Of the line from the subject's right eye to the left one, positive clockwise in the picture."""
    score: float


@dataclass(frozen=True, kw_only=True)
class FaceObservation:
    """One face in one picture."""

    landmarks: Float32[np.ndarray, "n 2"]
    """Pixels of the picture, pixel centres at half-integers."""
    score: float
    """0 … 1, how sure the network is that this is a face."""
    eyes_shut: tuple[float, float]
    """Left and right eye, larger is further shut; the scale depends on the model."""


@runtime_checkable
class FaceModel(Protocol):
    """Finds faces and their points in single pictures; keeps no state between them."""

    source: str
    """What the points come from, to be recorded with them."""

    def detect(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[FaceBox]:
        """Faces in a picture, the largest first."""
        ...

    def observe(self, frame: UInt8[np.ndarray, "h w 3"], box: FaceBox) -> FaceObservation | None:
        """Points of the face in `box`, or None if there is none."""
        ...


class Network:
    """A TensorFlow Lite model as a function from one array to a list of arrays."""

    def __init__(self, contents: bytes, num_threads: int = 2) -> None:
        """Read the model.

        Args:
            contents: of the .tflite file.
            num_threads: CPU threads.
        """
        with _native_output_hidden():
            self._interpreter = Interpreter(model_content=contents, num_threads=num_threads)
            self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]
        self._outputs = self._interpreter.get_output_details()
        self.side_px = int(self._input["shape"][1])

    def __call__(self, values: Float32[np.ndarray, "..."]) -> list[np.ndarray]:
        """Run the model on one input without its batch axis."""
        self._interpreter.set_tensor(self._input["index"], values[None])
        self._interpreter.invoke()
        results = [self._interpreter.get_tensor(output["index"]) for output in self._outputs]
        return [result[0] if result.ndim > 1 else result for result in results]


class TaskFaceModel:
    """MediaPipe's Face Landmarker: 478 points and the blendshapes of the eyelids."""

    def __init__(self, path: Path) -> None:
        """Read the networks inside a face_landmarker.task.

        Raises:
            WeightsError: the file is not a Face Landmarker bundle.
        """
        members = read_task(path)
        self.source = "face_landmarker.task"
        self._detector = FaceDetector(Network(members["face_detector.tflite"]))
        self._points = Network(members["face_landmarks_detector.tflite"])
        self._blendshapes = Network(members["face_blendshapes.tflite"], num_threads=1)

    def detect(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[FaceBox]:
        """Faces in a picture, the largest first."""
        return self._detector(frame)

    def observe(self, frame: UInt8[np.ndarray, "h w 3"], box: FaceBox) -> FaceObservation | None:
        """478 points of the face in `box`, or None if there is none."""
        landmarks, score = _run_points(self._points, frame, box)
        if score < 0.5:
            return None
        weights = self._blendshapes(landmarks[list(BLENDSHAPE_POINTS)])[0]
        return FaceObservation(landmarks=landmarks, score=score, eyes_shut=(float(weights[EYE_BLINKS[0]]), float(weights[EYE_BLINKS[1]])))


class RegistryFaceModel:
    """The models of the MediaPipe wheel: 468 points, with the eyes measured again by the iris model's contour."""

    def __init__(self, folder: Path | None = None) -> None:
        """Read the networks from the cache folder; fetch them from the package registry if they are not there.

        Raises:
            WeightsError: they cannot be had.
        """
        self.source = "models of mediapipe 0.10.21"
        self._detector = FaceDetector(Network(registry_model("face_detection_short_range.tflite", folder)))
        self._points = Network(registry_model("face_landmark.tflite", folder))
        self._eye = Network(registry_model("iris_landmark.tflite", folder), num_threads=1)

    def detect(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[FaceBox]:
        """Faces in a picture, the largest first."""
        return self._detector(frame)

    def observe(self, frame: UInt8[np.ndarray, "h w 3"], box: FaceBox) -> FaceObservation | None:
        """468 points of the face in `box`, or None if there is none."""
        landmarks, score = _run_points(self._points, frame, box)
        if score < 0.5:
            return None
        for contour, corners, mirrored in ((RIGHT_EYE, RIGHT_EYE_CORNERS, False), (LEFT_EYE, LEFT_EYE_CORNERS, True)):
            landmarks[list(contour)] = self._eye_contour(frame, landmarks[list(corners)], mirrored)
        right, left = eye_openings(landmarks)
        return FaceObservation(landmarks=landmarks, score=score, eyes_shut=(-left, -right))

    def _eye_contour(self, frame: np.ndarray, corners: np.ndarray, mirrored: bool) -> np.ndarray:
        """The 16 contour points of one eye; the network knows the subject's right eye, so a left one is shown mirrored."""
        left, right = (corners[1], corners[0]) if mirrored else (corners[0], corners[1])
        box = _square_round(corners, angle_rad=math.atan2(*(right - left)[::-1]), scale=2.3)
        patch = sample_square(frame, box, self._eye.side_px)
        points = self._eye(_unit(patch[:, ::-1] if mirrored else patch))[0].reshape(-1, 3)[:16, :2] / self._eye.side_px
        if mirrored:
            points[:, 0] = 1 - points[:, 0]
        return _from_square(points, box)


def load_face_model(path: Path | None = None, folder: Path | None = None) -> FaceModel:
    """The best face model at hand: the Face Landmarker file if there is one, else the models of the package registry.

    Args:
        path: of a face_landmarker.task; by default the one in the cache folder, if any.
        folder: to look in instead of the user's cache folder.

    Raises:
        WeightsError: no model can be had.
    """
    task = find_task(path, folder)
    return TaskFaceModel(task) if task else RegistryFaceModel(folder)


class FaceTracker:
    """Follows one face through the frames of a shot: each frame's square comes from the points of the frame before."""

    def __init__(self, model: FaceModel, survey_every: int = 25) -> None:
        """Start without a face.

        Args:
            model: what finds the points.
            survey_every: frames between looks at the whole picture for other faces.
        """
        self.model = model
        self.crowd: list[int] = []
        """For each look at the whole picture with a face followed: how many faces at least half as wide were there."""
        self._survey_every = survey_every
        self._box: FaceBox | None = None
        self._count = 0

    def cut(self) -> None:
        """Forget the last frame: a new shot begins."""
        self._box = None

    def follow(self, frame: UInt8[np.ndarray, "h w 3"]) -> FaceObservation | None:
        """The followed face in the next frame, or the largest one if none was followed; None if there is no face."""
        survey = self._count % self._survey_every == 0
        self._count += 1
        found = self.model.detect(frame) if survey or self._box is None else []
        seen = self.model.observe(frame, self._box) if self._box else None
        if seen is None and found:
            first = self.model.observe(frame, found[0])
            seen = self.model.observe(frame, box_of(first.landmarks)) if first else None
        self._box = box_of(seen.landmarks) if seen else None
        if survey and found:
            self.crowd.append(sum(box.side_px > 0.5 * found[0].side_px for box in found))
        return seen


class FaceDetector:
    """BlazeFace's short-range detector with its anchors and its weighted suppression of overlaps."""

    def __init__(self, network: Network) -> None:
        """Lay the anchors: two on every cell of a 16 × 16 grid, six on every cell of 8 × 8."""
        self._network = network
        grids = [_grid(16).repeat(2, 0), _grid(8).repeat(6, 0)]
        self._anchors = np.concatenate(grids).astype(np.float32)

    def __call__(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[FaceBox]:
        """Faces in a picture, the largest first; parts of the picture are looked at where the whole shows none."""
        picture = Image.fromarray(frame)
        for tiles in _tilings(*picture.size):
            boxes = _without_overlaps([box for tile in tiles for box in self._in_tile(picture, tile)])
            if boxes:
                return sorted(boxes, key=lambda box: -box.side_px)
        return []

    def _in_tile(self, picture: Image.Image, tile: tuple[float, float, float]) -> list[FaceBox]:
        """Faces in the square tile with left, top, side px; what lies outside the picture is black."""
        left, top, side = tile
        inner = self._network.side_px
        width, height = picture.size
        low_x, low_y, high_x, high_y = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
        patch = np.zeros((inner, inner, 3), np.uint8)
        place = [round((value - start) / side * inner) for value, start in ((low_x, left), (low_y, top), (high_x, left), (high_y, top))]
        size = (place[2] - place[0], place[3] - place[1])
        patch[place[1] : place[3], place[0] : place[2]] = np.asarray(
            picture.resize(size, Image.Resampling.BILINEAR, box=(low_x, low_y, high_x, high_y))
        )
        regressed, logits = sorted(self._network(_unit(patch) * 2 - 1), key=lambda output: -output.shape[-1])
        scores = 1 / (1 + np.exp(-np.clip(logits[:, 0], -80, 80)))
        sure = np.flatnonzero(scores > 0.5)
        points = (regressed[sure].reshape(-1, 8, 2) / inner + self._anchors[sure, None]) * side + (left, top)  # n 8 xy: centre, size, six face points
        sizes = regressed[sure, 2:4] / inner * side
        merged = _merge(np.concatenate([points[:, :1], sizes[:, None], points[:, 2:]], 1), scores[sure])
        return [_box_of_detection(values, score) for values, score in merged]


def sample_square(frame: UInt8[np.ndarray, "h w 3"], box: FaceBox, side_px: int) -> UInt8[np.ndarray, "s s 3"]:
    """The turned square of a picture as an upright picture of `side_px`; black outside, averaged first where it shrinks much."""
    picture = Image.fromarray(frame)
    cosine, sine = math.cos(box.angle_rad), math.sin(box.angle_rad)
    shrink = max(1, int(box.side_px / side_px))
    reach = 0.5 * box.side_px * (abs(cosine) + abs(sine)) + 2 * shrink
    left, top = (max(int(centre - reach), 0) for centre in box.centre_px)
    right, bottom = (min(int(centre + reach) + 1, limit) for centre, limit in zip(box.centre_px, picture.size, strict=True))
    if right - left < shrink or bottom - top < shrink:
        return np.zeros((side_px, side_px, 3), np.uint8)
    picture = picture.reduce(shrink, (left, top, right, bottom)) if shrink > 1 else picture.crop((left, top, right, bottom))
    step = box.side_px / side_px / shrink
    centre_x, centre_y = ((centre - start) / shrink for centre, start in zip(box.centre_px, (left, top), strict=True))
    half = 0.5 * side_px * step
    coefficients = (
        *(step * cosine, -step * sine, centre_x - half * cosine + half * sine),
        *(step * sine, step * cosine, centre_y - half * sine - half * cosine),
    )
    return np.asarray(picture.transform((side_px, side_px), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR))


def box_of(landmarks: Float[np.ndarray, "n 2"]) -> FaceBox:
    """The square in which to look for the face in the next frame: half as large again as the points, level with the eyes."""
    line = landmarks[LEFT_EYE_CORNERS[0]] - landmarks[RIGHT_EYE_CORNERS[0]]
    return _square_round(landmarks[:468], angle_rad=math.atan2(line[1], line[0]), scale=1.5)


def mouth_opening(landmarks: Float[Tensor, "*t n 2"]) -> Float[Tensor, "*t"]:
    """Distance between the inner lips as a share of the distance between the outer eye corners; about 0 shut, 0.5 wide open."""
    upper, lower = landmarks[..., [pair[0] for pair in INNER_LIPS], :], landmarks[..., [pair[1] for pair in INNER_LIPS], :]
    eyes = landmarks[..., LEFT_EYE_CORNERS[0], :] - landmarks[..., RIGHT_EYE_CORNERS[0], :]
    return (upper - lower).norm(dim=-1).mean(-1) / eyes.norm(dim=-1)


def eye_openings(landmarks: Float[np.ndarray, "n 2"]) -> tuple[float, float]:
    """Mean distance between the lids of the right and the left eye, as a share of the eye's width."""
    openings = []
    for pairs, corners in zip(EYELID_PAIRS, (RIGHT_EYE_CORNERS, LEFT_EYE_CORNERS), strict=True):
        width = np.linalg.norm(landmarks[corners[0]] - landmarks[corners[1]])
        lids = np.mean([np.linalg.norm(landmarks[upper] - landmarks[lower]) for upper, lower in pairs])
        openings.append(float(lids / max(width, 1e-6)))
    return openings[0], openings[1]


def normalize_blink(eyes_shut: Float[Tensor, "t 2"]) -> Float[Tensor, "t 1"]:
    """Mean of both eyes, stretched for this person to 0 open … 1 shut.

    Open is where the eyes are most of the time (the median of all frames), shut the most that was seen; a clip without a blink stays near 0.
    """
    both = eyes_shut.mean(-1)
    open_level = both.quantile(0.3)
    spread = (both.quantile(0.7) - both.quantile(0.1)).clamp_min(1e-3)
    shut_level = torch.maximum(both.quantile(0.995), open_level + 3 * spread)
    return ((both - open_level) / (shut_level - open_level)).clamp(0, 1)[:, None]


def _run_points(network: Network, frame: np.ndarray, box: FaceBox) -> tuple[np.ndarray, float]:
    """Points in pixels of the picture and the score that there is a face."""
    patch = _unit(sample_square(frame, box, network.side_px))
    outputs = [np.ravel(output) for output in network(patch)]
    points = outputs[0].reshape(-1, 3)[:, :2] / network.side_px
    return _from_square(points, box), float(1 / (1 + np.exp(-np.clip(outputs[1][0], -80, 80))))


def _from_square(points: np.ndarray, box: FaceBox) -> np.ndarray:
    """Points in shares of the square's side to pixels of the picture."""
    cosine, sine = math.cos(box.angle_rad), math.sin(box.angle_rad)
    turn = np.array([[cosine, sine], [-sine, cosine]])
    return ((points - 0.5) * box.side_px @ turn + box.centre_px).astype(np.float32)


def _square_round(points: np.ndarray, angle_rad: float, scale: float) -> FaceBox:
    """The turned square about the upright bounding box of points, `scale` times its longer side."""
    low, high = points.min(0), points.max(0)
    centre = (low + high) / 2
    return FaceBox(centre_px=(float(centre[0]), float(centre[1])), side_px=float((high - low).max() * scale), angle_rad=float(angle_rad), score=1.0)


def _box_of_detection(values: np.ndarray, score: float) -> FaceBox:
    """The square for the point network from a detection: centre, size, right eye, left eye, …."""
    line = values[3] - values[2]
    angle = math.atan2(line[1], line[0])
    return FaceBox(centre_px=(float(values[0, 0]), float(values[0, 1])), side_px=1.5 * float(values[1].max()), angle_rad=angle, score=float(score))


def _merge(detections: np.ndarray, scores: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    """Score-weighted means of detections that overlap by more than 0.3, the surest first."""
    order = list(np.argsort(-scores))
    while order:
        best = order[0]
        overlaps = np.array([_overlap(detections[best, :2], detections[other, :2]) for other in order])
        group = [other for other, overlap in zip(order, overlaps, strict=True) if overlap > 0.3 or other == best]
        order = [other for other in order if other not in group]
        weights = scores[group] / scores[group].sum()
        yield (detections[group] * weights[:, None, None]).sum(0), float(scores[best])


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two upright boxes given as rows centre, size."""
    low = np.maximum(a[0] - a[1] / 2, b[0] - b[1] / 2)
    high = np.minimum(a[0] + a[1] / 2, b[0] + b[1] / 2)
    both = np.prod(np.maximum(high - low, 0))
    return float(both / (np.prod(a[1]) + np.prod(b[1]) - both + 1e-9))


def _without_overlaps(boxes: Sequence[FaceBox]) -> list[FaceBox]:
    """The surest of each group of boxes that were found in several tiles."""
    kept: list[FaceBox] = []
    for box in sorted(boxes, key=lambda box: -box.score):
        if all(math.dist(box.centre_px, other.centre_px) > 0.4 * max(box.side_px, other.side_px) for other in kept):
            kept.append(box)
    return kept


def _tilings(width: int, height: int) -> Iterator[list[tuple[float, float, float]]]:
    """The whole picture as one square tile, then overlapping squares of the short side, then of half of it."""
    long, short = max(width, height), min(width, height)
    yield [((width - long) / 2, (height - long) / 2, float(long))]
    for side in (short, short // 2):
        starts = [np.linspace(0, size - side, max(1, math.ceil(2 * size / side) - 1)) for size in (width, height)]
        yield [(float(left), float(top), float(side)) for top in starts[1] for left in starts[0]]


def _grid(cells: int) -> np.ndarray:
    """Centres of the cells of a square grid in [0, 1], row-major, as x, y."""
    centres = (np.arange(cells) + 0.5) / cells
    return np.stack(np.meshgrid(centres, centres), -1).reshape(-1, 2)


def _unit(patch: np.ndarray) -> np.ndarray:
    """uint8 to float32 in [0, 1]."""
    return np.ascontiguousarray(patch, dtype=np.float32) / 255


@contextlib.contextmanager
def _native_output_hidden() -> Iterator[None]:
    """Keep the runtime's own notices off the terminal while a model is read."""
    try:
        stderr = sys.__stderr__.fileno() if sys.__stderr__ else None
    except (OSError, ValueError):
        stderr = None
    if stderr is None:
        yield
        return
    kept = os.dup(stderr)
    with open(os.devnull, "wb") as sink:
        os.dup2(sink.fileno(), stderr)
        try:
            yield
        finally:
            os.dup2(kept, stderr)
            os.close(kept)
