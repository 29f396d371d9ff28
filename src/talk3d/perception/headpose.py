"""The head's motion in one clip, and with it the camera in the head's space: one focal length, one rigid shape, six degrees of freedom a frame.

Geometry only, in float64 torch: points in, cameras out. Knows nothing of pictures or networks.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.signal import savgol_filter
from torch import Tensor

from talk3d.errors import ShapeError
from talk3d.ops.geometry import CAMERA_RADIUS, HEAD_PIVOT, cross_matrix, rotation_from_vector, vector_from_rotation
from talk3d.perception.facetemplate import (
    OWN_SHAPE,
    FaceTemplate,
    eye_line_angle,
    huber_weight,
    place_shape,
    pose_features,
    projection_jacobian,
    turn_picture,
)

RIGID_POINTS = (
    *(8, 9, 168, 6, 197, 195, 5, 4, 1, 19, 94, 2),  # forehead to nose to its base, down the middle
    *(97, 98, 99, 48, 129, 49, 131, 198, 236, 3, 51, 45),  # right side of the nose
    *(326, 327, 328, 278, 358, 279, 360, 420, 456, 248, 281, 275),  # left side of the nose
    *(33, 133, 243, 130, 226, 35, 143, 156),  # right eye corners and the bone beside them
    *(263, 362, 463, 359, 446, 265, 372, 383),
    *(193, 122, 188, 245, 417, 351, 412, 465),  # inner brow ridge and sides of the bridge
    *(10, 151, 109, 338, 67, 297, 103, 332, 54, 284, 21, 251, 162, 389, 127, 356),  # forehead and temples
    *(234, 454, 93, 323, 227, 447, 137, 366, 116, 345, 123, 352, 111, 340, 117, 346),  # ear side and cheek bones
)
"""MediaPipe points that neither speech, lids nor brows move much."""
SYSTEMATIC = 0.005
"""Error of the face networks that is the same in many frames, scene units; it bounds how much a clip can tell of the person's shape."""
POINT_NOISE = 0.0005
"""Least noise of each point beside the error modes, scene units; a grainy clip has more, which is measured."""
NUM_VIEWS = 10.0
"""How many independent views a clip counts for when the person's shape is refined: neighbouring frames err alike."""
STILL_RAD = math.radians(0.1)
"""A head of which the short and the long smoothing window differ by less is still."""
SMOOTHING_S = 0.36
"""Length of the smoothing window: at 25 frames a second it keeps 93 % of a 2 Hz nod and halves noise."""


@dataclass(frozen=True, kw_only=True)
class HeadMotion:
    """What one clip tells of its head and its camera."""

    rotation: Float[Tensor, "t 3 3"]
    """Head to camera."""
    translation: Float[Tensor, "t 3"]
    """Of the head's origin in the camera, scene units."""
    focal_px: float
    """Of the source camera, chosen so that the camera is on average 2.7 from the head's pivot."""
    shape: Float[Tensor, "k 3"]
    """The person's rigid points in head space."""
    face: Float[Tensor, "p 3"]
    """All face points of the likeliest such person, at rest."""
    residual_px: Float[Tensor, " t"]
    """Median distance between seen and projected rigid points."""
    smoothing: Mapping[str, float]
    """What `describe_smoothing` says of this clip."""

    def cam2world(self) -> Float[Tensor, "t 4 4"]:
        """Camera to head matrices."""
        result = torch.eye(4, dtype=self.rotation.dtype).repeat(len(self.rotation), 1, 1)
        result[:, :3, :3] = self.rotation.mT
        result[:, :3, 3] = -(self.rotation.mT @ self.translation[..., None])[..., 0]
        return result

    def at(self, frames: Bool[Tensor, " t"]) -> "HeadMotion":
        """Return the motion of some of the frames."""
        return replace(self, rotation=self.rotation[frames], translation=self.translation[frames], residual_px=self.residual_px[frames])

    def points(self, indices: tuple[int, ...]) -> Float[Tensor, "k 3"]:
        """Some of the person's rigid points by MediaPipe's numbers."""
        return self.shape[[RIGID_POINTS.index(index) for index in indices]]

    def project(self, points: Float[Tensor, "k 3"], centre_px: tuple[float, float]) -> Float[Tensor, "t k 2"]:
        """Where fixed points of the head appear in the source picture, px."""
        seen = points @ self.rotation.mT + self.translation[:, None]
        return self.focal_px * seen[..., :2] / seen[..., 2:] + torch.tensor(centre_px, dtype=seen.dtype)


def solve_head_pose(
    landmarks: Float[Tensor, "t p 2"],
    template: FaceTemplate,
    image_size: tuple[int, int],
    seen: Bool[Tensor, " t"] | None = None,
    cuts: tuple[int, ...] = (),
    fps: float = 25.0,
    refine: Callable[[HeadMotion], HeadMotion] | None = None,
) -> HeadMotion:
    """Track the head through a clip: one focal length, one rigid shape, six degrees of freedom a frame, smooth between cuts.

    Args:
        landmarks: MediaPipe's points in px of the source picture.
        template: of the face model that found them.
        image_size: width, height of the source picture, px.
        seen: frames whose landmarks were measured; the motion of the others is interpolated. All by default.
        cuts: frames at which a new shot begins; nothing is smoothed across them.
        fps: frames a second.
        refine: corrects the motion of the frames that were seen before it is smoothed.

    Raises:
        ShapeError: fewer than 468 points.

    Reference: Triggs et al., Bundle adjustment, a modern synthesis, 1999.
    """
    if landmarks.shape[1] < 468 or len(template.points) < 468:
        raise ShapeError(f"head pose needs MediaPipe's 468 face points, got {landmarks.shape[1]} points and a template of {len(template.points)}")
    seen = torch.ones(len(landmarks), dtype=torch.bool) if seen is None else seen
    measured = landmarks[seen].double()
    angle = eye_line_angle(measured)
    level = turn_picture(measured[:, list(RIGID_POINTS)] - torch.tensor(image_size, dtype=torch.float64) / 2, -angle)
    bundle = _Bundle(template, level[:: max(1, len(level) // 250)])
    bundle.run()
    rotation, translation, residual = bundle.poses(level)
    roll = rotation_from_vector(torch.stack([0 * angle, 0 * angle, angle], -1))
    rotation, translation = roll @ rotation, (roll @ translation[..., None])[..., 0]
    motion = HeadMotion(
        rotation=rotation,
        translation=translation,
        focal_px=bundle.focal,
        shape=bundle.shape,
        face=template.points.double() + template.people.double() @ bundle.way,
        residual_px=residual,
        smoothing={},
    )
    if refine is not None:
        motion = refine(steadied(motion, seen, cuts, fps).at(seen))
    return steadied(motion, seen, cuts, fps)


def steadied(motion: HeadMotion, seen: Bool[Tensor, " t"], cuts: tuple[int, ...] = (), fps: float = 25.0) -> HeadMotion:
    """Return the smooth motion of all frames, from that of the `seen` ones; between these it is interpolated, and across cuts nothing is smoothed."""
    window = smoothing_window(fps)
    rotation, translation = _fill_gaps(motion.rotation, motion.translation, torch.nonzero(seen)[:, 0], len(seen))
    smooth, translation = smooth_motion(rotation, translation, cuts, window)
    residual = torch.full((len(seen),), float("nan"), dtype=torch.float64)
    residual[seen] = motion.residual_px
    smoothing = describe_smoothing(rotation, smooth, fps, window)
    return replace(motion, rotation=smooth, translation=translation, residual_px=residual, smoothing=smoothing)


def smoothing_window(fps: float) -> int:
    """Frames, odd, that `smooth_motion` looks at together."""
    return max(5, 2 * round((SMOOTHING_S * fps - 1) / 2) + 1)


def smooth_motion(
    rotation: Float[Tensor, "t 3 3"],
    translation: Float[Tensor, "t 3"],
    cuts: tuple[int, ...] = (),
    window: int = 9,
) -> tuple[Float[Tensor, "t 3 3"], Float[Tensor, "t 3"]]:
    """Take the trembling out of a head's motion without delay: Savitzky-Golay of order 2 on rotation vectors, log-depth and direction.

    Where a window more than twice as long says the same, as in a still head, its calmer answer is taken.

    Args:
        rotation: head to camera.
        translation: head in the camera, scene units.
        cuts: frames at which a new shot begins.
        window: frames, odd.
    """
    bounds = [0, *[cut for cut in cuts if 0 < cut < len(rotation)], len(rotation)]
    rotations, translations = [], []
    for start, end in itertools.pairwise(bounds):
        middle = rotation[(start + end) // 2]
        turn = vector_from_rotation(middle.mT @ rotation[start:end])
        place = translation[start:end]
        values = torch.cat([turn, place[:, :2] / place[:, 2:], place[:, 2:].log()], -1)
        brisk, calm = _savgol(values, window), _savgol(values, _calm_window(window))
        restless = _savgol((brisk - calm)[:, :3].norm(dim=-1)[:, None], window, 0)
        values = torch.lerp(calm, brisk, (restless / STILL_RAD - 1).clamp(0, 1))
        depth = values[:, 5:].exp()
        rotations.append(middle @ rotation_from_vector(values[:, :3]))
        translations.append(torch.cat([values[:, 3:5] * depth, depth], -1))
    return torch.cat(rotations), torch.cat(translations)


def _savgol(values: Tensor, window: int, order: int = 2) -> Tensor:
    """Savitzky-Golay along the first axis, narrower where there are too few frames."""
    width = min(window, (len(values) - 1) // 2 * 2 + 1)
    return torch.from_numpy(savgol_filter(values.numpy(), width, order, axis=0, mode="interp")) if width >= 5 else values


def _calm_window(window: int) -> int:
    """Frames, odd, of the longer window."""
    return 2 * window + 3


def smoothing_gain(frequency_hz: float, fps: float = 25.0, window: int = 9) -> float:
    """Share of a sinusoid of this frequency that `smooth_motion` keeps."""
    impulse = np.zeros(4 * window + 1)
    impulse[2 * window] = 1
    kernel = np.asarray(savgol_filter(impulse, window, 2))
    phase = 2 * np.pi * frequency_hz / fps * (np.arange(len(kernel)) - 2 * window)
    return float((kernel * np.cos(phase)).sum())


def cutoff_hz(fps: float, window: int) -> float:
    """Frequency at which the filter keeps half the power (-3 dB)."""
    low, high = 0.0, 1.5 * fps / window  # the gain falls steadily up to there
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if smoothing_gain(middle, fps, window) > math.sqrt(0.5) else (low, middle)
    return round(low, 2)


def describe_smoothing(raw: Float[Tensor, "t 3 3"], smooth: Float[Tensor, "t 3 3"], fps: float, window: int) -> dict[str, float]:
    """The filter in numbers: where it cuts off, whether it delays, and how much trembling it took out.

    Args:
        raw: rotations before smoothing.
        smooth: the same after it.
        fps: frames a second.
        window: frames.
    """
    before, after = (vector_from_rotation(motion[len(motion) // 2].mT @ motion).rad2deg() for motion in (raw, smooth))
    speed = [motion.diff(dim=0) for motion in (before, after)]
    shifts = [shift for shift in range(-3, 4) if len(speed[0]) > 8]
    agreement = [float((speed[0][3:-3] * speed[1].roll(shift, 0)[3:-3]).sum()) for shift in shifts]
    trembling = [float(motion.diff(n=2, dim=0).square().sum(-1).mean().sqrt()) if len(motion) > 2 else 0.0 for motion in (before, after)]
    return {
        "window_s": round(window / fps, 3),
        "cutoff_hz": cutoff_hz(fps, window),
        "still_cutoff_hz": cutoff_hz(fps, _calm_window(window)),
        "delay_frames": float(-shifts[int(np.argmax(agreement))]) if agreement else 0.0,
        "jitter_before_deg": round(trembling[0], 4),
        "jitter_after_deg": round(trembling[1], 4),
    }


class _Bundle:
    """Alternates between the frames' poses, the person's shape, each point's reliability and the focal length."""

    def __init__(self, template: FaceTemplate, observed: Tensor) -> None:
        rigid = list(RIGID_POINTS)
        self.mean, self.people, self.lag, self.modes = (
            values[rigid].double() for values in (template.points, template.people, template.lag, template.modes)
        )
        self.shape = self.expected = self.mean
        self.way = torch.zeros(self.people.shape[-1], dtype=torch.float64)
        self.observed = observed
        self.noise = torch.ones(len(rigid), dtype=torch.float64)
        self.point_noise = POINT_NOISE
        self.focal = float(CAMERA_RADIUS * _weak_perspective(self.mean, observed)[1].mean())

    def run(self, num_rounds: int = 12) -> None:
        """Refine shape, reliability and focal length from the observed frames."""
        pivot = torch.tensor(HEAD_PIVOT, dtype=torch.float64)
        rotation, translation = self._start(self.observed)
        for _ in range(num_rounds):
            rotation, translation = self._solve(self.observed, rotation, translation, 4)
            self._update_noise(rotation, translation)
            self._update_shape(rotation, translation)
            distance = (rotation @ pivot + translation).norm(dim=-1).mean()
            self.focal *= float(CAMERA_RADIUS / distance)
            translation = translation * (CAMERA_RADIUS / distance)
        few = slice(None, None, max(1, len(self.observed) // 100))
        left = self._solve_with_modes(self.observed[few], rotation[few], translation[few], 3)[2]
        share = max(1 - (6 + self.modes.shape[-1]) / (2 * len(self.mean)), 0.1)  # the rest of the freedom is taken by pose and modes
        self.point_noise = max(POINT_NOISE, float(left.abs().median()) * 1.48 / math.sqrt(share))

    def poses(self, observed: Tensor, chunk: int = 512) -> tuple[Tensor, Tensor, Tensor]:
        """Rotation, translation and median residual in px of any frames, with the shape as it is."""
        rotations, translations, residuals = [], [], []
        for piece in observed.split(chunk):
            rotation, translation = self._solve(piece, *self._start(piece), 8)
            rotation, translation, _ = self._solve_with_modes(piece, rotation, translation, 4)
            error = self._error(piece, rotation, translation)[0].norm(dim=-1)
            rotations.append(rotation)
            translations.append(translation)
            residuals.append(error.median(-1).values)
        return torch.cat(rotations), torch.cat(translations), torch.cat(residuals)

    def _start(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Poses by weak perspective: scale is focal over depth."""
        rotation, scale, shift = _weak_perspective(self.shape, observed)
        depth = self.focal / scale
        return rotation, torch.cat([shift / scale[:, None], depth[:, None]], -1)

    def _error(self, observed: Tensor, rotation: Tensor, translation: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals in px, with the networks' lag, and the points in the camera."""
        local = self.shape @ rotation.mT + translation[:, None]  # t k 3
        scale = self.focal / local[..., 2].mean(-1)[:, None, None]  # px per scene unit
        lag = scale * torch.einsum("kaf,tf->tka", self.lag, pose_features(rotation.mT))
        return self.focal * local[..., :2] / local[..., 2:] + lag - observed, local

    def _jacobian(self, rotation: Tensor, translation: Tensor, local: Tensor) -> Tensor:
        """Derivative of the residuals by a turn before the camera and a shift, t k 2 6."""
        by_place = projection_jacobian(local, torch.tensor(self.focal, dtype=torch.float64))  # t k 2 3
        by_turn = -by_place @ cross_matrix(local - translation[:, None])
        step = 1e-5
        turns = rotation_from_vector(step * torch.eye(3, dtype=torch.float64))
        here = pose_features(rotation.mT)
        by_feature = torch.stack([(pose_features((turn @ rotation).mT) - here) / step for turn in turns], -1)  # t f 3
        scale = self.focal / local[..., 2].mean(-1)[:, None, None, None]
        return torch.cat([by_turn + scale * torch.einsum("kaf,tfi->tkai", self.lag, by_feature), by_place], -1)

    def _solve(self, observed: Tensor, rotation: Tensor, translation: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """Gauss-Newton on each frame's six numbers."""
        damping = 1e-9 * torch.eye(6, dtype=torch.float64)
        for _ in range(num_steps):
            error, local = self._error(observed, rotation, translation)
            jacobian = self._jacobian(rotation, translation, local)
            weighted = (self._weight(error)[..., None, None] * jacobian).flatten(1, 2).mT  # t 6 2k
            normal = weighted @ jacobian.flatten(1, 2)
            gradient = (weighted @ error.flatten(1)[..., None])[..., 0]
            step = torch.linalg.solve(normal + damping * normal.diagonal(dim1=-2, dim2=-1)[..., None], gradient)
            rotation = rotation_from_vector(-step[:, :3]) @ rotation
            translation = translation - step[:, 3:]
        return rotation, translation

    def _solve_with_modes(self, observed: Tensor, rotation: Tensor, translation: Tensor, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gauss-Newton on each frame's six numbers and how far it strays along each error mode, normally distributed; also what error is left."""
        num_frames, num_modes = len(observed), self.modes.shape[-1]
        prior = torch.diag(torch.cat([torch.zeros(6), torch.ones(num_modes)]).double())
        strayed = torch.zeros(num_frames, num_modes, dtype=torch.float64)
        by_mode = self.modes.expand(num_frames, -1, -1, -1)
        limit = torch.tensor(3.0, dtype=torch.float64)
        error = torch.zeros_like(observed)
        for _ in range(num_steps):
            error, local = self._error(observed, rotation, translation)
            scale = self.focal / local[..., 2].mean(-1)[:, None, None]  # px per scene unit
            error = error / scale + torch.einsum("kam,tm->tka", self.modes, strayed)
            jacobian = torch.cat([self._jacobian(rotation, translation, local) / scale[..., None], by_mode], -1)  # t k 2 6+m
            weight = huber_weight(error.norm(dim=-1) / self.point_noise, limit) / self.point_noise**2
            weighted = (weight[..., None, None] * jacobian).flatten(1, 2).mT
            normal = weighted @ jacobian.flatten(1, 2) + prior
            gradient = (weighted @ error.flatten(1)[..., None])[..., 0]
            gradient[:, 6:] += strayed
            step = torch.linalg.solve(normal, gradient)
            rotation = rotation_from_vector(-step[:, :3]) @ rotation
            translation, strayed = translation - step[:, 3:6], strayed - step[:, 6:]
        return rotation, translation, error

    def _weight(self, error: Tensor, floor_px: float = 0.0) -> Tensor:
        """Inverse variance of each point times the Huber weight of each residual."""
        noise = (self.noise.square() + floor_px**2).sqrt()
        return huber_weight(error.norm(dim=-1) / noise, torch.tensor(2.0, dtype=torch.float64)) / noise.square()

    def _update_noise(self, rotation: Tensor, translation: Tensor) -> None:
        """Each point's own spread in px: what expression moves counts for less."""
        error = self._error(self.observed, rotation, translation)[0]
        spread = (error - error.median(0).values).norm(dim=-1).median(0).values
        floor = spread.median()
        self.noise = (spread.square() + floor.square()).sqrt().clamp_min(1e-3)

    def _update_shape(self, rotation: Tensor, translation: Tensor) -> None:
        """Person's points from all frames, drawn to what people look like, and laid where such people's heads lie in head space."""
        error, local = self._error(self.observed, rotation, translation)
        jacobian = projection_jacobian(local, torch.tensor(self.focal, dtype=torch.float64)) @ rotation[:, None]
        share = NUM_VIEWS / len(error)
        weight = self._weight(error, SYSTEMATIC * self.focal / CAMERA_RADIUS) * share
        prior = torch.eye(3, dtype=torch.float64) / OWN_SHAPE**2
        normal = torch.einsum("tk,tkai,tkaj->kij", weight, jacobian, jacobian) + prior
        gradient = torch.einsum("tk,tkai,tka->ki", weight, jacobian, error) + (self.shape - self.expected) / OWN_SHAPE**2
        self.shape, self.way = place_shape(self.shape - torch.linalg.solve(normal, gradient), self.mean, self.people)
        self.expected = self.mean + self.people @ self.way


def _weak_perspective(shape: Tensor, observed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotation, px per unit and shift in px of frames seen from far away, by least squares and the nearest rotation."""
    middle = shape.mean(0)
    inverse = torch.linalg.pinv(shape - middle)  # 3 k
    centre = observed.mean(1)
    affine = (inverse @ (observed - centre[:, None])).mT  # t 2 3
    u, singular, vt = torch.linalg.svd(affine, full_matrices=False)
    rows = u @ vt
    rotation = torch.cat([rows, torch.cross(rows[:, 0], rows[:, 1], dim=-1)[:, None]], 1)
    scale = singular.mean(-1)
    return rotation, scale, centre - scale[:, None] * (rows @ middle)


def _fill_gaps(rotation: Tensor, translation: Tensor, frames: Int[Tensor, " s"], total: int) -> tuple[Tensor, Tensor]:
    """Motion at every frame: rotation along the shortest arc, translation along a line, between the frames that were seen."""
    if len(frames) == total:
        return rotation, translation
    wanted = torch.arange(total)
    after = torch.searchsorted(frames, wanted).clamp(max=len(frames) - 1)
    before = (torch.searchsorted(frames, wanted, right=True) - 1).clamp(min=0)
    span = (frames[after] - frames[before]).clamp_min(1)
    share = ((wanted - frames[before]) / span).clamp(0, 1).double()[:, None]
    arc = vector_from_rotation(rotation[before].mT @ rotation[after])
    return rotation[before] @ rotation_from_vector(share * arc), torch.lerp(translation[before], translation[after], share)
