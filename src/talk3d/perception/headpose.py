"""Where the camera stands in the head's space: a mean head from people seen by known cameras, and the head's motion in one clip.

Geometry only, in float64 torch: points and cameras in, cameras out. Knows nothing of pictures or networks.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.signal import savgol_filter
from torch import Tensor

from talk3d.errors import ShapeError, WeightsError
from talk3d.ops.geometry import CAMERA_RADIUS, HEAD_PIVOT, cross_matrix, fit_similarity, rotation_from_vector, vector_from_rotation, view_angles
from talk3d.types import Camera

TEMPLATE_PATH = Path(__file__).resolve().parents[1] / "assets" / "face_template.safetensors"
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
    """Where the face networks put their points on a mean head."""

    points: Float[Tensor, "p 3"]
    """Head space, scene units, seen from the front."""
    slide: Float[Tensor, "p 3"]
    """How far the points wander over the skin per radian of pitch: the networks follow a nodding head only by three quarters."""
    mirror: Int[Tensor, " m"]
    """Number of the point that each point becomes in a mirrored picture; also for MediaPipe's ten iris points."""


def load_template(path: Path = TEMPLATE_PATH) -> FaceTemplate:
    """The template of the builtin prior's head space.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return FaceTemplate(points=file.get_tensor("points"), slide=file.get_tensor("slide"), mirror=file.get_tensor("mirror"))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"the face template {path} cannot be read ({error}): install the package again, or give a template of your own") from error


def fit_template(landmarks: Float[Tensor, "n p 2"], cameras: Camera, num_steps: int = 20) -> Float[Tensor, "p 3"]:
    """Mean 3D shape of MediaPipe's 468 face points of many people seen by known cameras, in the cameras' head space.

    Args:
        landmarks: divided by the picture's side.
        cameras: one for each picture, intrinsics divided by the picture's side; best with yaw below 40°.
        num_steps: Gauss-Newton steps.
    """
    return _triangulate(landmarks, cameras, load_template().slide, num_steps)[0]


def fit_template_and_slide(landmarks: Float[Tensor, "n p 2"], cameras: Camera, num_steps: int = 20) -> FaceTemplate:
    """Like `fit_template`, and also measures how the points slide with pitch; needs pictures from above and below."""
    points, slide = _triangulate(landmarks, cameras, None, num_steps)
    return FaceTemplate(points=points, slide=slide, mirror=load_template().mirror)


def save_template(template: FaceTemplate, path: Path = TEMPLATE_PATH) -> None:
    """Write a template where `load_template` reads it."""
    tensors = {"points": template.points.float().contiguous(), "slide": template.slide.float().contiguous(), "mirror": template.mirror}
    save_file(tensors, path, metadata={"space": "EG3D head space, camera radius 2.7", "points": "468 of MediaPipe"})


def _triangulate(landmarks: Tensor, cameras: Camera, slide: Tensor | None, num_steps: int) -> tuple[Tensor, Tensor]:
    """Gauss-Newton on every point's place, and on its slide unless that is given; what disagrees counts for less (Huber loss)."""
    view = cameras.cam2world.double()
    intrinsics = cameras.intrinsics.double()
    focal = intrinsics[:, [0, 1], [0, 1]][:, None]  # n 1 2
    seen = landmarks.double() - intrinsics[:, None, :2, 2]
    rotation, centre = view[:, :3, :3].mT, view[:, :3, 3]  # world to camera
    pitch = view_angles(view[:, :3, :3])[:, 1, None, None]  # n 1 1
    count = landmarks.shape[1]
    state = torch.zeros(count, 6, dtype=torch.float64)
    if slide is not None:
        state[:, 3:] = slide.double()
    ridge = torch.diag(torch.tensor([0.0, 0, 0, 1e-2, 1e-2, 1e-2], dtype=torch.float64)) * len(seen) * 1e-2
    for _ in range(num_steps):
        local = (state[:, :3] + pitch * state[:, 3:] - centre[:, None]) @ rotation.mT  # n p 3
        error = focal * local[..., :2] / local[..., 2:] - seen
        by_place = _projection_jacobian(local, focal) @ rotation[:, None]  # n p 2 3
        jacobian = torch.cat([by_place, by_place * pitch[..., None] * (slide is None)], -1)  # n p 2 6
        weight = _huber_weight(error.norm(dim=-1), 1.5 * error.norm(dim=-1).median())
        normal = torch.einsum("np,npai,npaj->pij", weight, jacobian, jacobian) + ridge
        gradient = torch.einsum("np,npai,npa->pi", weight, jacobian, error)
        if slide is None:
            gradient = gradient + state @ ridge
        state = state - torch.linalg.solve(normal, gradient)
    return state[:, :3].float(), state[:, 3:].float()


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
    bundle = _Bundle(template.points[rigid].double(), template.slide[rigid].double(), measured[:: max(1, len(measured) // 1500)])
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

    def __init__(self, template: Tensor, slide: Tensor, observed: Tensor) -> None:
        self.template, self.shape, self.slide, self.observed = template, template, slide, observed
        self.noise = torch.ones(len(template), dtype=torch.float64)
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

    def poses(self, observed: Tensor, chunk: int = 4096) -> tuple[Tensor, Tensor, Tensor]:
        """Rotation, translation and median residual in px of any frames, with the shape as it is."""
        rotations, translations, residuals = [], [], []
        for piece in observed.split(chunk):
            rotation, translation = self._solve(piece, *self._start(piece), 12)
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
        pitch = view_angles(rotation.mT)[:, 1, None, None]
        local = (self.shape + pitch * self.slide) @ rotation.mT + translation[:, None]  # t k 3
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
    kernel = savgol_filter(impulse, window, 2)
    phase = 2 * np.pi * frequency_hz / fps * (np.arange(len(kernel)) - 2 * window)
    return float((kernel * np.cos(phase)).sum())
