"""Where the camera stands in the head's space: a mean head from people seen by known cameras, and the head's motion in one clip.

Geometry only, in float64 torch: points and cameras in, cameras out. Knows nothing of pictures or networks.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.signal import savgol_filter
from torch import Tensor

from talk3d.errors import ShapeError, WeightsError
from talk3d.ops.geometry import CAMERA_RADIUS, HEAD_PIVOT, cross_matrix, fit_similarity, project, rotation_from_vector, vector_from_rotation
from talk3d.types import Camera

TEMPLATE_PATH = Path(__file__).resolve().parents[1] / "assets" / "face_template.safetensors"
ModelKind = Literal["task", "registry"]
"""The Face Landmarker file, or the models of the package registry: their points err differently."""
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
NUM_VIEWS = 60.0
"""How many independent views a clip counts for when the person's shape is refined: neighbouring frames err alike."""


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
    residual_px: Float[Tensor, " t"]
    """Median distance between seen and projected rigid points."""

    def cam2world(self) -> Float[Tensor, "t 4 4"]:
        """Camera to head matrices."""
        result = torch.eye(4, dtype=self.rotation.dtype).repeat(len(self.rotation), 1, 1)
        result[:, :3, :3] = self.rotation.mT
        result[:, :3, 3] = -(self.rotation.mT @ self.translation[..., None])[..., 0]
        return result

    def points(self, indices: tuple[int, ...]) -> Float[Tensor, "k 3"]:
        """Some of the person's rigid points by MediaPipe's numbers."""
        return self.shape[[RIGID_POINTS.index(index) for index in indices]]

    def project(self, points: Float[Tensor, "k 3"], centre_px: tuple[float, float]) -> Float[Tensor, "t k 2"]:
        """Where fixed points of the head appear in the source picture, px."""
        seen = points @ self.rotation.mT + self.translation[:, None]
        return self.focal_px * seen[..., :2] / seen[..., 2:] + torch.tensor(centre_px, dtype=seen.dtype)


@dataclass(frozen=True, kw_only=True)
class FaceTemplate:
    """Where a face model puts its points on a mean head, and how it errs together."""

    points: Float[Tensor, "p 3"]
    """Head space, scene units."""
    modes: Float[Tensor, "p 2 k"]
    """Displacements in the picture, scene units, that points share as speech, looks and turning heads mislead the network; one standard deviation."""
    mirror: Int[Tensor, " m"]
    """Number of the point that each point becomes in a mirrored picture; also for MediaPipe's ten iris points."""


def load_template(kind: ModelKind, path: Path = TEMPLATE_PATH) -> FaceTemplate:
    """The template of the builtin prior's head space for a kind of face model.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            modes = file.get_tensor(f"modes_{kind}").float()
            return FaceTemplate(points=file.get_tensor("points"), modes=modes, mirror=file.get_tensor("mirror"))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"the face template {path} cannot be read ({error}): install the package again, or give a template of your own") from error


def save_templates(templates: Mapping[ModelKind, FaceTemplate], path: Path = TEMPLATE_PATH) -> None:
    """Write templates that differ by their modes only where `load_template` reads them."""
    tensors = {f"modes_{kind}": template.modes.half().contiguous() for kind, template in templates.items()}
    common = next(iter(templates.values()))
    save_file({**tensors, "points": common.points.float().contiguous(), "mirror": common.mirror}, path)


def fit_template(landmarks: Float[Tensor, "n p 2"], cameras: Camera, num_steps: int = 20) -> Float[Tensor, "p 3"]:
    """Mean 3D shape of face points of many people seen by known cameras, in the cameras' head space.

    Each point is triangulated by Gauss-Newton from all pictures at once; what disagrees counts for less (Huber loss).

    Args:
        landmarks: divided by the picture's side.
        cameras: one for each picture, intrinsics divided by the picture's side; best with yaw below 40°.
        num_steps: Gauss-Newton steps.
    """
    view, intrinsics = cameras.cam2world.double(), cameras.intrinsics.double()
    focal = intrinsics[:, [0, 1], [0, 1]][:, None]  # n 1 2
    rotation, centre = view[:, :3, :3].mT, view[:, :3, 3]  # world to camera
    points = torch.zeros(landmarks.shape[1], 3, dtype=torch.float64)
    for _ in range(num_steps):
        local = (points - centre[:, None]) @ rotation.mT  # n p 3
        error = focal * local[..., :2] / local[..., 2:] + intrinsics[:, None, :2, 2] - landmarks.double()
        jacobian = _projection_jacobian(local, focal) @ rotation[:, None]  # n p 2 3
        weight = _huber_weight(error.norm(dim=-1), 1.5 * error.norm(dim=-1).median())
        normal = torch.einsum("np,npai,npaj->pij", weight, jacobian, jacobian)
        points = points - torch.linalg.solve(normal, torch.einsum("np,npai,npa->pi", weight, jacobian, error))
    return points.float()


def fit_error_modes(
    landmarks: Float[Tensor, "n p 2"], cameras: Camera, person: Int[Tensor, " n"], points: Float[Tensor, "p 3"], num_modes: int = 60
) -> Float[Tensor, "p 2 k"]:
    """How a face model's points stray together from where the true cameras put them, beyond what makes each person different.

    Args:
        landmarks: divided by the picture's side.
        cameras: the true ones; best with yaw below 30°.
        person: who is in each picture; people with fewer than four pictures are left out.
        points: from `fit_template`.
        num_modes: principal components to keep.
    """
    distance = (cameras.cam2world[:, :3, 3] - torch.tensor(HEAD_PIVOT)).norm(dim=-1).double()
    units = distance / cameras.intrinsics[:, 0, 0].double()  # scene units per picture side, at the pivot
    exact = Camera(cam2world=cameras.cam2world.double(), intrinsics=cameras.intrinsics.double())
    error = (landmarks.double() - project(points.double().expand(len(landmarks), -1, -1), exact)) * units[:, None, None]
    groups = [error[person == number] for number in person.unique()]
    strayed = [(group - group.mean(0)) * math.sqrt(len(group) / (len(group) - 1)) for group in groups if len(group) >= 4]
    flat = torch.cat(strayed).flatten(1)
    _, singular, directions = torch.linalg.svd(flat / math.sqrt(len(flat)), full_matrices=False)
    return (directions[:num_modes] * singular[:num_modes, None]).mT.unflatten(0, (-1, 2)).float()


def solve_head_pose(
    landmarks: Float[Tensor, "t p 2"],
    template: FaceTemplate,
    image_size: tuple[int, int],
    seen: Bool[Tensor, " t"] | None = None,
    cuts: tuple[int, ...] = (),
) -> HeadMotion:
    """Track the head through a clip: one focal length, one rigid shape, six degrees of freedom a frame, smooth between cuts.

    Args:
        landmarks: MediaPipe's points in px of the source picture.
        template: the same points in head space.
        image_size: width, height of the source picture, px.
        seen: frames whose landmarks were measured; the motion of the others is interpolated. All by default.
        cuts: frames at which a new shot begins; nothing is smoothed across them.

    Raises:
        ShapeError: fewer than 468 points.

    Reference: Triggs et al., Bundle adjustment, a modern synthesis, 1999.
    """
    if landmarks.shape[1] < 468 or len(template.points) < 468:
        raise ShapeError(f"head pose needs MediaPipe's 468 face points, got {landmarks.shape[1]} points and a template of {len(template.points)}")
    rigid = list(RIGID_POINTS)
    seen = torch.ones(len(landmarks), dtype=torch.bool) if seen is None else seen
    centred = landmarks[:, rigid].double() - torch.tensor(image_size, dtype=torch.float64) / 2
    measured = centred[seen]
    bundle = _Bundle(template.points[rigid].double(), template.modes[rigid].double(), measured[:: max(1, len(measured) // 1500)])
    bundle.run()
    rotation, translation, residual = bundle.poses(measured)
    frames = torch.nonzero(seen)[:, 0]
    rotation, translation = _fill_gaps(rotation, translation, frames, len(landmarks))
    rotation, translation = smooth_motion(rotation, translation, cuts)
    filled = torch.full((len(landmarks),), float("nan"), dtype=torch.float64)
    filled[frames] = residual
    return HeadMotion(rotation=rotation, translation=translation, focal_px=bundle.focal, shape=bundle.shape, residual_px=filled)


def smooth_motion(
    rotation: Float[Tensor, "t 3 3"],
    translation: Float[Tensor, "t 3"],
    cuts: tuple[int, ...] = (),
    window: int = 9,
) -> tuple[Float[Tensor, "t 3 3"], Float[Tensor, "t 3"]]:
    """Take the trembling out of a head's motion without delay: Savitzky-Golay of order 2 on rotation vectors, log-depth and direction.

    At 25 frames a second a window of 9 keeps 93 % of a 2 Hz nod and halves noise.

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
        width = min(window, (end - start - 1) // 2 * 2 + 1)
        if width >= 5:
            values = torch.from_numpy(savgol_filter(values.numpy(), width, 2, axis=0, mode="interp"))
        depth = values[:, 5:].exp()
        rotations.append(middle @ rotation_from_vector(values[:, :3]))
        translations.append(torch.cat([values[:, 3:5] * depth, depth], -1))
    return torch.cat(rotations), torch.cat(translations)


class _Bundle:
    """Alternates between the frames' poses, the person's shape, each point's reliability and the focal length."""

    def __init__(self, template: Tensor, modes: Tensor, observed: Tensor) -> None:
        self.template, self.shape, self.modes, self.observed = template, template, modes, observed
        self.noise = torch.ones(len(template), dtype=torch.float64)
        self.point_noise = POINT_NOISE
        self.focal = float(CAMERA_RADIUS * _weak_perspective(template, observed)[1].mean())

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
        share = max(1 - (6 + self.modes.shape[-1]) / (2 * len(self.template)), 0.1)  # the rest of the freedom is taken by pose and modes
        self.point_noise = max(POINT_NOISE, float(left.abs().median()) * 1.48 / math.sqrt(share))

    def poses(self, observed: Tensor, chunk: int = 512) -> tuple[Tensor, Tensor, Tensor]:
        """Rotation, translation and median residual in px of any frames, with the shape as it is."""
        rotations, translations, residuals = [], [], []
        for piece in observed.split(chunk):
            rotation, translation = self._solve(piece, *self._start(piece), 12)
            rotation, translation, _ = self._solve_with_modes(piece, rotation, translation, 5)
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
        """Residuals in px and the points in the camera."""
        local = self.shape @ rotation.mT + translation[:, None]  # t k 3
        return self.focal * local[..., :2] / local[..., 2:] - observed, local

    def _solve(self, observed: Tensor, rotation: Tensor, translation: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """Gauss-Newton on each frame's six numbers."""
        damping = 1e-9 * torch.eye(6, dtype=torch.float64)
        for _ in range(num_steps):
            error, local = self._error(observed, rotation, translation)
            by_place = _projection_jacobian(local, torch.tensor(self.focal, dtype=torch.float64))  # t k 2 3
            by_turn = -by_place @ cross_matrix(local - translation[:, None])
            jacobian = torch.cat([by_turn, by_place], -1)  # t k 2 6
            weight = self._weight(error)
            normal = torch.einsum("tk,tkai,tkaj->tij", weight, jacobian, jacobian)
            gradient = torch.einsum("tk,tkai,tka->ti", weight, jacobian, error)
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
            by_place = _projection_jacobian(local, torch.tensor(self.focal, dtype=torch.float64)) / scale[..., None]
            by_turn = -by_place @ cross_matrix(local - translation[:, None])
            jacobian = torch.cat([by_turn, by_place, by_mode], -1)  # t k 2 6+m
            weight = _huber_weight(error.norm(dim=-1) / self.point_noise, limit) / self.point_noise**2
            weighted = (weight[..., None, None] * jacobian).flatten(1, 2)
            normal = weighted.mT @ jacobian.flatten(1, 2) + prior
            gradient = (weighted.mT @ error.flatten(1)[..., None])[..., 0]
            gradient[:, 6:] += strayed
            step = torch.linalg.solve(normal, gradient)
            rotation = rotation_from_vector(-step[:, :3]) @ rotation
            translation, strayed = translation - step[:, 3:6], strayed - step[:, 6:]
        return rotation, translation, error

    def _weight(self, error: Tensor, floor_px: float = 0.0) -> Tensor:
        """Inverse variance of each point times the Huber weight of each residual."""
        noise = (self.noise.square() + floor_px**2).sqrt()
        return _huber_weight(error.norm(dim=-1) / noise, torch.tensor(2.0, dtype=torch.float64)) / noise.square()

    def _update_noise(self, rotation: Tensor, translation: Tensor) -> None:
        """Each point's own spread in px: what expression moves counts for less."""
        error = self._error(self.observed, rotation, translation)[0]
        spread = (error - error.median(0).values).norm(dim=-1).median(0).values
        floor = spread.median()
        self.noise = (spread.square() + floor.square()).sqrt().clamp_min(1e-3)

    def _update_shape(self, rotation: Tensor, translation: Tensor, prior_units: float = 0.01) -> None:
        """Person's points from all frames, drawn to the template, and laid over it so that the head space stays the prior's."""
        error, local = self._error(self.observed, rotation, translation)
        jacobian = _projection_jacobian(local, torch.tensor(self.focal, dtype=torch.float64)) @ rotation[:, None]
        share = NUM_VIEWS / len(error)
        weight = self._weight(error, SYSTEMATIC * self.focal / CAMERA_RADIUS) * share
        prior = torch.eye(3, dtype=torch.float64) / prior_units**2
        normal = torch.einsum("tk,tkai,tkaj->kij", weight, jacobian, jacobian) + prior
        gradient = torch.einsum("tk,tkai,tka->ki", weight, jacobian, error) + (self.shape - self.template) / prior_units**2
        moved = self.shape - torch.linalg.solve(normal, gradient)
        scale, turn, shift = fit_similarity(moved, self.template)
        self.shape = scale * moved @ turn.mT + shift


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


def _projection_jacobian(local: Tensor, focal: Tensor) -> Tensor:
    """Derivative of focal * xy / z by the point in the camera, … 2 3."""
    depth = local[..., 2:]
    scale = focal / depth  # focal may differ by axis
    scale = scale.expand(*local.shape[:-1], 2)
    diagonal = torch.diag_embed(scale)
    return torch.cat([diagonal, (-scale * local[..., :2] / depth)[..., None]], -1)


def _huber_weight(distance: Tensor, limit: Tensor) -> Tensor:
    """1 inside `limit`, falling as 1/distance outside."""
    return (limit / distance.clamp_min(1e-12)).clamp_max(1)


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


def smoothing_gain(frequency_hz: float, fps: float = 25.0, window: int = 9) -> float:
    """Share of a sinusoid of this frequency that `smooth_motion` keeps."""
    impulse = np.zeros(4 * window + 1)
    impulse[2 * window] = 1
    kernel = np.asarray(savgol_filter(impulse, window, 2))
    phase = 2 * np.pi * frequency_hz / fps * (np.arange(len(kernel)) - 2 * window)
    return float((kernel * np.cos(phase)).sum())
