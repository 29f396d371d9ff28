"""Finding faces in whole pictures, and the turned squares in which networks look at them.

Runs TensorFlow Lite models through LiteRT; the steps round the networks are written here in numpy.

Reference: BlazeFace (arXiv 1907.05047).
"""

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from jaxtyping import Float32, UInt8
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class FaceBox:
    """A square round a face, turned so that the eyes are level in it."""

    centre_px: tuple[float, float]
    side_px: float
    angle_rad: float
    """Of the line from the subject's right eye to the left one, positive clockwise in the picture."""
    score: float


class Network:
    """A TensorFlow Lite model as a function from one array to a list of arrays."""

    def __init__(self, contents: bytes, num_threads: int = 1) -> None:
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
        regressed, logits = sorted(self._network(unit_range(patch) * 2 - 1), key=lambda output: -output.shape[-1])
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


def square_round(points: np.ndarray, angle_rad: float, scale: float) -> FaceBox:
    """The turned square about the upright bounding box of points, `scale` times its longer side."""
    low, high = points.min(0), points.max(0)
    centre = (low + high) / 2
    return FaceBox(centre_px=(float(centre[0]), float(centre[1])), side_px=float((high - low).max() * scale), angle_rad=float(angle_rad), score=1.0)


def from_square(points: np.ndarray, box: FaceBox) -> np.ndarray:
    """Points in shares of the square's side to pixels of the picture."""
    cosine, sine = math.cos(box.angle_rad), math.sin(box.angle_rad)
    turn = np.array([[cosine, sine], [-sine, cosine]])
    return ((points - 0.5) * box.side_px @ turn + box.centre_px).astype(np.float32)


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


def unit_range(patch: np.ndarray) -> np.ndarray:
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
