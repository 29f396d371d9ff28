"""Face points in pictures: find the face, follow it from frame to frame, measure mouth and eyelids.

Runs MediaPipe's published networks through LiteRT, with the steps between them written here, so that nothing else of MediaPipe is needed and no
point is smoothed over time. Knows nothing of cameras or heads in space.

Reference: BlazeFace (arXiv 1907.05047); Real-time facial surface geometry from monocular video (arXiv 1907.06724).
"""

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from talk3d.io.face_models import find_task, read_task, registry_model
from talk3d.perception.detection import FaceBox, FaceDetector, Network, from_square, sample_square, square_round, unit_range
from talk3d.perception.facetemplate import ModelKind, load_template
from talk3d.perception.liplines import LIPS

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
BROWS = ((70, 63, 105, 66, 107, 46, 53, 52, 65, 55), (300, 293, 334, 296, 336, 276, 283, 282, 295, 285))
"""Upper and lower rim of the right and the left brow."""
SHUT = 0.3
"""Of eyes further shut than this, the gaze is not known."""
IRISES = (468, 473)
"""Middle of the right and the left iris."""
EYE_BLINKS = (9, 10)
"""Blendshapes eyeBlinkLeft and eyeBlinkRight."""
LOOK_SCALES = (1.0, 0.85)
"""Sizes of the squares that the point network looks at, against half as large again as the points."""
VIVID = 3.0
"""How much further from grey colours are made for the looks that lips are read from by the network of the package registry, which hardly finds
them in a beard. On four invented people the opening of the mouth came from r = .91, .24 (bearded), .96 and .97 to .95, .72, .96 and .97."""
BLENDSHAPE_POINTS = (
    *(0, 1, 4, 5, 6, 7, 8, 10, 13, 14, 17, 21, 33, 37, 39, 40, 46, 52, 53, 54, 55, 58, 61, 63, 65, 66, 67, 70, 78, 80, 81, 82, 84, 87, 88, 91, 93),
    *(95, 103, 105, 107, 109, 127, 132, 133, 136, 144, 145, 146, 148, 149, 150, 152, 153, 154, 155, 157, 158, 159, 160, 161, 162, 163, 168, 172),
    *(173, 176, 178, 181, 185, 191, 195, 197, 234, 246, 249, 251, 263, 267, 269, 270, 276, 282, 283, 284, 285, 288, 291, 293, 295, 296),
    *(297, 300, 308, 310, 311, 312, 314, 317, 318, 321, 323, 324, 332, 334, 336, 338, 356, 361, 362, 365, 373, 374, 375, 377, 378, 379, 380, 381),
    *(382, 384, 385, 386, 387, 388, 389, 390, 397, 398, 400, 402, 405, 409, 415, 454, 466, 468, 469, 470, 471, 472, 473, 474, 475, 476, 477),
)
"""The points that the blendshape network reads."""


@dataclass(frozen=True, kw_only=True)
class FaceObservation:
    """One face in one picture."""

    landmarks: Float32[np.ndarray, "n 2"]
    """478 points in pixels of the picture, pixel centres at half-integers; the last ten are the irises."""
    score: float
    """0 … 1, how sure the network is that this is a face."""
    eyes_shut: tuple[float, float]
    """Left and right eye, larger is further shut; the scale depends on the model."""
    expression: Float32[np.ndarray, " e"]
    """ARKit's 52 blendshapes in MediaPipe's order, or none."""


@runtime_checkable
class FaceModel(Protocol):
    """Finds faces and their points in single pictures; keeps no state between them."""

    source: str
    """What the points come from, to be recorded with them."""
    kind: ModelKind
    """Which error modes of `headpose.FaceTemplate` belong to it."""

    def detect(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[FaceBox]:
        """Faces in a picture, the largest first."""
        ...

    def observe(self, frame: UInt8[np.ndarray, "h w 3"], box: FaceBox) -> FaceObservation | None:
        """Points of the face in `box`, or None if there is none."""
        ...


class TaskFaceModel:
    """MediaPipe's Face Landmarker: 478 points and the blendshapes of the eyelids."""

    def __init__(self, path: Path) -> None:
        """Read the networks inside a face_landmarker.task.

        Raises:
            WeightsError: the file is not a Face Landmarker bundle.
        """
        members = read_task(path)
        self.source = "face_landmarker.task"
        self.kind: ModelKind = "task"
        self._detector = FaceDetector(Network(members["face_detector.tflite"]))
        self._points = _PointNetwork(members["face_landmarks_detector.tflite"], self.kind)
        self._blendshapes = Network(members["face_blendshapes.tflite"])

    def detect(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[FaceBox]:
        """Faces in a picture, the largest first."""
        return self._detector(frame)

    def observe(self, frame: UInt8[np.ndarray, "h w 3"], box: FaceBox) -> FaceObservation | None:
        """478 points of the face in `box`, or None if there is none."""
        (landmarks,), score = self._points(frame, box)
        if score < 0.5:
            return None
        weights = self._blendshapes(landmarks[list(BLENDSHAPE_POINTS)])[0]
        eyes_shut = (float(weights[EYE_BLINKS[0]]), float(weights[EYE_BLINKS[1]]))
        return FaceObservation(landmarks=landmarks, score=score, eyes_shut=eyes_shut, expression=np.ravel(weights).astype(np.float32))


class RegistryFaceModel:
    """The models of the MediaPipe wheel: 468 points, with eyes and irises measured by the iris model."""

    def __init__(self, folder: Path | None = None) -> None:
        """Read the networks from the cache folder; fetch them from the package registry if they are not there.

        Raises:
            WeightsError: they cannot be had.
        """
        self.source = "models of mediapipe 0.10.21"
        self.kind: ModelKind = "registry"
        self._detector = FaceDetector(Network(registry_model("face_detection_short_range.tflite", folder)))
        self._points = _PointNetwork(registry_model("face_landmark.tflite", folder), self.kind)
        self._eye_network = Network(registry_model("iris_landmark.tflite", folder))

    def detect(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[FaceBox]:
        """Faces in a picture, the largest first."""
        return self._detector(frame)

    def observe(self, frame: UInt8[np.ndarray, "h w 3"], box: FaceBox) -> FaceObservation | None:
        """478 points of the face in `box`, or None if there is none."""
        (landmarks, vivid), score = self._points(frame, box, (1.0, VIVID))
        if score < 0.5:
            return None
        landmarks[list(LIPS)] = vivid[list(LIPS)]
        eyes = [self._eye(frame, landmarks[list(corners)], mirrored) for corners, mirrored in ((RIGHT_EYE_CORNERS, False), (LEFT_EYE_CORNERS, True))]
        landmarks[[*RIGHT_EYE, *LEFT_EYE]] = np.concatenate([eye[:16] for eye in eyes])
        landmarks = np.concatenate([landmarks, *(eye[16:] for eye in eyes)])
        right, left = eye_openings(landmarks)
        return FaceObservation(landmarks=landmarks, score=score, eyes_shut=(-left, -right), expression=np.zeros(0, np.float32))

    def _eye(self, frame: np.ndarray, corners: np.ndarray, mirrored: bool) -> np.ndarray:
        """Contour (16 points) and iris (5) of one eye; the network knows the subject's right eye, so a left one is shown mirrored."""
        left, right = (corners[1], corners[0]) if mirrored else (corners[0], corners[1])
        box = square_round(corners, angle_rad=math.atan2(*(right - left)[::-1]), scale=2.3)
        patch = sample_square(frame, box, self._eye_network.side_px)
        contour, iris = sorted(self._eye_network(unit_range(patch[:, ::-1] if mirrored else patch)), key=lambda output: -output.size)
        points = np.concatenate([contour.reshape(-1, 3)[:16, :2], iris.reshape(-1, 3)[:, :2]]) / self._eye_network.side_px
        if mirrored:
            points[:, 0] = 1 - points[:, 0]
        return from_square(points, box)


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


def observe_picture(model: FaceModel, frame: UInt8[np.ndarray, "h w 3"]) -> FaceObservation | None:
    """The largest face of a single picture, or None if there is no face."""
    found = model.detect(frame)
    first = model.observe(frame, found[0]) if found else None
    return model.observe(frame, box_of(first.landmarks)) if first else None


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
        self._last: FaceBox | None = None
        self._count = 0

    def cut(self) -> None:
        """Forget the last frame: a new shot begins."""
        self._box = self._last = None

    def follow(self, frame: UInt8[np.ndarray, "h w 3"]) -> FaceObservation | None:
        """The followed face in the next frame, or the largest one if none was followed; None if there is no face."""
        survey = self._count % self._survey_every == 0
        self._count += 1
        found = self.model.detect(frame) if survey else []
        seen = self.model.observe(frame, self._box) if self._box else None
        if seen is None:
            first = self._choose(found or self.model.detect(frame))
            rough = self.model.observe(frame, first) if first else None
            seen = self.model.observe(frame, box_of(rough.landmarks)) if rough else None
        self._box = box_of(seen.landmarks) if seen else None
        self._last = self._box or self._last
        if survey and found:
            self.crowd.append(sum(box.side_px > 0.5 * found[0].side_px for box in found))
        return seen

    def _choose(self, found: list[FaceBox]) -> FaceBox | None:
        """The face that was followed before it was lost, by place and size; the largest one in a new shot."""
        last = self._last
        if last is None or not found:
            return found[0] if found else None
        large = [box for box in found if box.side_px > 0.5 * found[0].side_px]
        return min(large, key=lambda box: math.dist(box.centre_px, last.centre_px) + abs(box.side_px - last.side_px))


def box_of(landmarks: Float[np.ndarray, "n 2"]) -> FaceBox:
    """The square in which to look for the face in the next frame: half as large again as the points, level with the eyes."""
    line = landmarks[LEFT_EYE_CORNERS[0]] - landmarks[RIGHT_EYE_CORNERS[0]]
    return square_round(landmarks[:468], angle_rad=math.atan2(line[1], line[0]), scale=1.5)


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


def normalize_blink(eyes_shut: Float[Tensor, "t 2"]) -> Float[Tensor, "t 2"]:
    """Each eye stretched for this person to 0 open … 1 shut.

    Open is where the eye is most of the time, shut the most that was seen; a clip without a blink stays near 0.
    """
    open_level = eyes_shut.quantile(0.3, dim=0)
    spread = (eyes_shut.quantile(0.7, dim=0) - eyes_shut.quantile(0.1, dim=0)).clamp_min(1e-3)
    shut_level = torch.maximum(eyes_shut.quantile(0.995, dim=0), open_level + 3 * spread)
    return ((eyes_shut - open_level) / (shut_level - open_level)).clamp(0, 1)


def eye_gaze(landmarks: Float[Tensor, "t n 2"], ahead: Float[Tensor, "t 2 2"]) -> Float[Tensor, "t 2"]:
    """How far the irises are from where they were if the eyes looked straight ahead, in eye widths, mean of both: to the subject's left, and up.

    Zero where no irises were found (468 points).

    Args:
        landmarks: px of the picture.
        ahead: where the right and the left iris would be in it.
    """
    if landmarks.shape[1] < 478:
        return torch.zeros(len(landmarks), 2)
    level = landmarks[:, LEFT_EYE_CORNERS[0]] - landmarks[:, RIGHT_EYE_CORNERS[0]]
    right = torch.nn.functional.normalize(level, dim=-1)[:, None]
    up = torch.stack([right[..., 1], -right[..., 0]], -1)
    ends = torch.stack([landmarks[:, list(corners)] for corners in (RIGHT_EYE_CORNERS, LEFT_EYE_CORNERS)], 1)
    offset = (landmarks[:, list(IRISES)] - ahead) / (ends[:, :, 0] - ends[:, :, 1]).norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return torch.stack([(offset * right).sum(-1), (offset * up).sum(-1)], -1).mean(1)


def irises_ahead(face: Float[Tensor, "p 3"]) -> Float[Tensor, "2 3"]:
    """Where the right and the left iris are when the eyes look straight ahead: between the corners, as far out as the lids.

    Args:
        face: all points of the person at rest.
    """
    corners, lids = face[torch.tensor([RIGHT_EYE_CORNERS, LEFT_EYE_CORNERS])].mean(1), face[torch.tensor(EYELID_PAIRS)].mean((1, 2))
    return torch.cat([corners[:, :2], lids[:, 2:]], -1)


def brow_lift(landmarks: Float[Tensor, "t n 2"], rest: Float[Tensor, "t 2 k 2"]) -> Float[Tensor, "t 2"]:
    """How far the right and the left brow are drawn up from where they usually are, in distances between the outer eye corners.

    Args:
        landmarks: px of the picture.
        rest: where the points of `BROWS` would be in it if the face were rigid.
    """
    level = landmarks[:, LEFT_EYE_CORNERS[0]] - landmarks[:, RIGHT_EYE_CORNERS[0]]
    up = torch.stack([level[:, 1], -level[:, 0]], -1) / level.square().sum(-1, keepdim=True).clamp_min(1e-6)
    lift = ((landmarks[:, torch.tensor(BROWS)] - rest).mean(2) * up[:, None]).sum(-1)
    return lift - lift.median(0).values


def steady_gaze(gaze: Float[Tensor, "t 2"], blink: Float[Tensor, "t 1"]) -> Float[Tensor, "t 2"]:
    """The gaze, gone over in a straight line where the eyes are shut; zero in a clip that has them shut throughout."""
    known = np.flatnonzero(blink[:, 0].numpy() <= SHUT)
    if not len(known):
        return torch.zeros_like(gaze)
    return torch.from_numpy(np.stack([np.interp(np.arange(len(gaze)), known, axis[known]) for axis in gaze.numpy().T], -1)).float()


class _PointNetwork:
    """The network of the face points. It looks four times, at two sizes and mirrored: its errors differ from look to look much more than faces do."""

    def __init__(self, contents: bytes, kind: ModelKind) -> None:
        """Read the network, once for each size: they are looked at side by side."""
        self._networks = [Network(contents) for _ in LOOK_SCALES]
        self._pool = ThreadPoolExecutor(len(LOOK_SCALES))
        self._mirror = load_template(kind).mirror.numpy()

    def __call__(self, frame: np.ndarray, box: FaceBox, vivid: tuple[float, ...] = (1.0,)) -> tuple[Float32[np.ndarray, "v n 2"], float]:
        """Points in pixels of the picture, the mean of all looks, and the lowest score that there is a face.

        Args:
            frame: the picture.
            box: where the face is.
            vivid: how far from grey the colours are made, times what they are; points for each, the score of the first.
        """
        squares = [replace(box, side_px=box.side_px * scale) for scale in LOOK_SCALES]
        looks = self._pool.map(lambda network, square: self._look(network, frame, square, vivid), self._networks, squares)
        points, scores = (np.stack(found) for found in zip(*looks, strict=True))
        return points.mean((0, 2)).astype(np.float32), float(1 / (1 + np.exp(-np.clip(scores[:, 0].min(), -80, 80))))

    def _look(self, network: Network, frame: np.ndarray, square: FaceBox, vivid: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Points (v 2 n 2) and logits (v 2) of one square as it is and mirrored."""
        patch, looks, scores = unit_range(sample_square(frame, square, network.side_px)), [], []
        grey = patch @ np.full((3, 1), 1 / 3, np.float32)
        for factor in vivid:
            colours = patch if factor == 1 else (grey + factor * (patch - grey)).clip(0, 1)
            for mirrored in (False, True):
                outputs = [np.ravel(output) for output in network(np.ascontiguousarray(colours[:, ::-1]) if mirrored else colours)]
                points = outputs[0].reshape(-1, 3)[:, :2] / network.side_px
                looks.append(from_square((points * [-1, 1] + [1, 0])[self._mirror[: len(points)]] if mirrored else points, square))
                scores.append(outputs[1][0])
        shape = len(vivid), 2
        return np.stack(looks).reshape(*shape, -1, 2), np.reshape(scores, shape)
