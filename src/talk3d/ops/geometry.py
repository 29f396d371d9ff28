"""Rotations, cameras on a sphere round the head, rigid motions between point sets, and outlines. Imports nothing above `types`."""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from talk3d.types import Camera

CAMERA_RADIUS = 2.7
"""EG3D's distance between camera and pivot, scene units."""
CAMERA_FOCAL = 4.2647
"""EG3D's focal length for FFHQ crops, image sides."""
HEAD_PIVOT = (0.0, 0.0, 0.2)
"""The point of the head that EG3D's cameras look at, scene units."""
FACE_MIDDLE = (0.0, 0.0, 0.15)
"""Of the skin between eyes and mouth, about, scene units."""
ABOVE_LIPS = (0.0, -0.09, 0.2)
"""Between nose and mouth, scene units: towards it faces are enlarged."""
SPINE_TOP = (0.0, -0.15, -0.06)
"""Round which heads turn, scene units: of all points fixed to the head cameras see it move least, within 0.05 for five rendered people and a real
one."""
NECK_LENGTH = 0.22
"""From the throat, above which all of a head turns, down to the shoulders, scene units."""


def rotation_from_vector(vector: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    """Rotation matrices about `vector` by its length in radians (Rodrigues' formula), smooth through zero."""
    squared = vector.square().sum(-1)[..., None, None]
    angle = squared.clamp_min(1e-24).sqrt()
    small = squared < 1e-8
    sine = torch.where(small, 1 - squared / 6, angle.sin() / angle)
    cosine = torch.where(small, 0.5 - squared / 24, (1 - angle.cos()) / angle.square())
    cross = cross_matrix(vector)
    return torch.eye(3, dtype=vector.dtype, device=vector.device) + sine * cross + cosine * (cross @ cross)


def vector_from_rotation(rotation: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3"]:
    """Axis times angle in radians of rotations by less than half a turn, the inverse of `rotation_from_vector`."""
    skew = 0.5 * (rotation - rotation.mT)
    axis = torch.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1)
    sine = axis.norm(dim=-1, keepdim=True)
    cosine = 0.5 * (rotation.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) - 1)
    angle = torch.atan2(sine, cosine)
    return axis * torch.where(sine < 1e-6, torch.ones_like(sine), angle / sine.clamp_min(1e-12))


def farthest_points(points: Float[Tensor, "n d"], count: int) -> Int[Tensor, " k"]:
    """Pick points, each as far from those before it as can be; the first is the one nearest to the median."""
    chosen = [int((points - points.median(0).values).norm(dim=1).argmin())]
    distance = (points - points[chosen[0]]).norm(dim=1)
    while len(chosen) < count:
        distance[chosen[-1]] = -1  # never again, even where all points are the same
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).norm(dim=1))
    return torch.tensor(chosen)


def cross_matrix(vector: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    """Skew matrices K with K @ x = vector × x."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def look_at(
    angles: Float[Tensor, "*b 3"],
    radius: float = CAMERA_RADIUS,
    pivot: tuple[float, float, float] = HEAD_PIVOT,
) -> Float[Tensor, "*b 4 4"]:
    """cam2world of cameras on a sphere round `pivot` that look at it.

    Args:
        angles: yaw, pitch, roll in radians. Yaw > 0 moves the camera to the head's left (+x), pitch > 0 moves it up, roll turns it about
            its own axis.
        radius: distance to the pivot, scene units.
        pivot: scene units.
    """
    rotation = view_rotation(angles)
    centre = torch.tensor(pivot, dtype=angles.dtype, device=angles.device) - radius * rotation[..., 2]
    top = torch.cat([rotation, centre[..., None]], -1)  # *b 3 4
    bottom = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=angles.dtype, device=angles.device).expand(*top.shape[:-2], 1, 4)
    return torch.cat([top, bottom], -2)


def view_rotation(angles: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    """Camera-to-world rotations of the cameras of `look_at`."""
    yaw, pitch, roll = angles.unbind(-1)
    backward = torch.stack([yaw.sin() * pitch.cos(), pitch.sin(), yaw.cos() * pitch.cos()], -1)
    right = torch.stack([yaw.cos(), torch.zeros_like(yaw), -yaw.sin()], -1)
    down = torch.cross(-backward, right, dim=-1)
    cosine, sine = roll.cos()[..., None], roll.sin()[..., None]
    return torch.stack([cosine * right + sine * down, cosine * down - sine * right, -backward], -1)


def view_angles(rotation: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3"]:
    """Yaw, pitch, roll in radians of camera-to-world rotations: the angles that `look_at` turns into the same rotation."""
    backward = -rotation[..., :, 2]
    yaw = torch.atan2(backward[..., 0], backward[..., 2])
    pitch = torch.asin(backward[..., 1].clamp(-1, 1))
    level = view_rotation(torch.stack([yaw, pitch, torch.zeros_like(yaw)], -1))
    right = rotation[..., :, 0]
    roll = torch.atan2((right * level[..., :, 1]).sum(-1), (right * level[..., :, 0]).sum(-1))
    return torch.stack([yaw, pitch, roll], -1)


def move_camera(camera: Camera, scale: float, turn: Float[Tensor, "3 3"], shift: Float[Tensor, " 3"]) -> Camera:
    """Cameras that see scale * turn @ x + shift where these see x."""
    cam2world = camera.cam2world.clone()
    cam2world[..., :3, :3] = turn @ camera.cam2world[..., :3, :3]
    cam2world[..., :3, 3] = scale * camera.cam2world[..., :3, 3] @ turn.mT + shift
    return Camera(cam2world=cam2world, intrinsics=camera.intrinsics)


@dataclass(frozen=True, kw_only=True)
class Neck:
    """Where a head turns on its shoulders, which keep still before the camera: above the throat all turns, down to the shoulders less and less."""

    pivot: Float[Tensor, "3"]
    frame: Float[Tensor, "3 3"]
    """From axes of the head to those in which the neck lies."""
    shoulders: float
    throat: float

    @classmethod
    @functools.cache
    def of(cls, placed: tuple[float, ...], throat_y: float, device: torch.device) -> "Neck":
        """Return the neck of heads that are placed so (a scale, a rotation vector and a shift), with the throat at this height of head space."""
        with torch.inference_mode(False):  # whoever asks first, training may use it, too
            frame, shift = rotation_from_vector(torch.tensor(placed[1:4])), torch.tensor(placed[4:])
            below = float(shift @ frame[:, 1])
            return cls(
                pivot=(placed[0] * frame @ torch.tensor(SPINE_TOP) + shift).to(device),
                frame=frame.to(device),
                shoulders=placed[0] * (throat_y - NECK_LENGTH) + below,
                throat=placed[0] * throat_y + below,
            )

    def swing(self, head_pose: Float[Tensor, "b 3"], rest: Float[Tensor, " 3"]) -> Float[Tensor, "b 3 3"]:
        """Return what, times the way from the pivot, leads from shoulders to where they are at rest; both poses as `view_angles` has them."""
        back = view_rotation(rest) @ view_rotation(head_pose).mT
        return self.frame @ (back - torch.eye(3, device=back.device)) @ self.frame.mT

    def share(self, points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 1"]:
        """Return how much points belong to the shoulders: 0 to 1, smoothly."""
        share = ((self.throat - points @ self.frame[:, 1:2]) / (self.throat - self.shoulders)).clamp(0, 1)
        return share.square() * (3 - 2 * share)

    def straighten(self, points: Float[Tensor, "b n 3"], swing: Float[Tensor, "b 3 3"]) -> Float[Tensor, "b n 3"]:
        """Return where points are when the head is held as at rest."""
        return torch.addcmul(points, self.share(points), (points - self.pivot) @ swing.mT)


def mean_rotation(rotation: Float[Tensor, "b 3 3"]) -> Float[Tensor, "3 3"]:
    """Return the rotation nearest to all of these, by least squares of matrices."""
    u, _, vt = torch.linalg.svd(rotation.mean(0))
    u[:, -1] *= torch.linalg.det(u @ vt).sign()
    return u @ vt


def widen_turns(cam2world: Float[Tensor, "b 4 4"], factor: float, middle: Float[Tensor, "3 3"]) -> Float[Tensor, "b 4 4"]:
    """Let a head turn to the sides and nod so many times as far; it rolls as before, and the middle of the face stays where cameras see it.

    Args:
        cam2world: cameras in head space.
        factor: of turns and nods.
        middle: from which they count, head to camera.
    """
    rotation, position = cam2world[:, :3, :3].mT, cam2world[:, :3, 3]
    face = position.new_tensor(FACE_MIDDLE)
    turn = vector_from_rotation(rotation @ middle.mT)
    wider = rotation_from_vector(turn * turn.new_tensor([factor, factor, 1.0])) @ middle
    result = cam2world.clone()
    result[:, :3, :3] = wider.mT
    result[:, :3, 3] = face - (wider.mT @ rotation @ (face - position)[..., None])[..., 0]
    return result


def intrinsics_matrix(focal: float = CAMERA_FOCAL, centre: tuple[float, float] = (0.5, 0.5)) -> Float[Tensor, "3 3"]:
    """Intrinsics of square pixels, in image sides."""
    return torch.tensor([[focal, 0.0, centre[0]], [0.0, focal, centre[1]], [0.0, 0.0, 1.0]])


def head_camera(angles: Float[Tensor, "*b 3"], radius: float = CAMERA_RADIUS, focal: float = CAMERA_FOCAL) -> Camera:
    """EG3D's cameras at these yaw, pitch, roll angles in radians, see `look_at`."""
    cam2world = look_at(angles, radius)
    matrix = intrinsics_matrix(focal).to(cam2world)
    return Camera(cam2world=cam2world, intrinsics=matrix.expand(*cam2world.shape[:-2], 3, 3))


def published_camera(
    yaw_pitch: Float[Tensor, "*b 2"],
    *,
    pivot: tuple[float, float, float] = HEAD_PIVOT,
    radius: float = CAMERA_RADIUS,
    focal: float = CAMERA_FOCAL,
) -> Camera:
    """The cameras that EG3D's look-at sampler makes of these numbers, which labels, tracks and checkpoints of the published models hold.

    They sit on a sphere round the world's origin and look at the pivot, without roll. The second number is not the camera's elevation but
    a warped one, and positive is below the face: see `elevation`.

    Args:
        yaw_pitch: yaw and warped pitch, radians; zeros are in front.
        pivot: scene units.
        radius: distance to the world's origin, scene units.
        focal: image sides. Talk3D takes 3.6, with pivot (0, 0.05, 0.2).

    Reference: EG3D (arXiv 2112.07945), its sampler of camera poses.
    """
    yaw, pitch = yaw_pitch.unbind(-1)
    polar = torch.acos(1 - 2 * (pitch + math.pi / 2).clamp(1e-5, math.pi - 1e-5) / math.pi)
    centre = radius * torch.stack([polar.sin() * yaw.sin(), polar.cos(), polar.sin() * yaw.cos()], -1)
    forward = F.normalize(centre.new_tensor(pivot) - centre, dim=-1)
    up = centre.new_tensor([0.0, 1.0, 0.0]).expand_as(forward)
    right = -F.normalize(torch.cross(up, forward, dim=-1), dim=-1)
    down = F.normalize(torch.cross(forward, right, dim=-1), dim=-1)
    top = torch.stack([right, down, forward, centre], -1)  # *b 3 4
    bottom = centre.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*top.shape[:-2], 1, 4)
    matrix = intrinsics_matrix(focal).to(centre).expand(*top.shape[:-2], 3, 3)
    return Camera(cam2world=torch.cat([top, bottom], -2), intrinsics=matrix)


def elevation(warped_pitch: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """True elevation in radians, positive above the face, of the cameras that `published_camera` makes of these pitches.

    The sine of the elevation is -2 / pi times the warped pitch: the pole is at pi / 2.
    """
    return -torch.asin((2 * warped_pitch / math.pi).clamp(-1, 1))


def warped_pitch(elevation: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """The pitch that `published_camera` needs for a true elevation in radians: the inverse of `elevation`."""
    return -math.pi / 2 * torch.sin(elevation)


def published_focal(field_of_view_deg: float) -> float:
    """Focal length in image sides that the published scripts make of a field of view, odd constants included."""
    return 1 / (1.414 * math.tan(field_of_view_deg * 3.14159 / 360))


def orbit(num_frames: int, *, yaw_deg: float = 25.0, pitch_deg: float = 8.0, period_frames: float = 120.0) -> Camera:
    """A smooth, closed swing round the head, which stays in the middle of the picture; it starts from the front.

    Args:
        num_frames: how many cameras.
        yaw_deg: largest turn to either side.
        pitch_deg: largest turn up and down, a quarter of a period later than yaw.
        period_frames: frames until the swing repeats.
    """
    phase = 2 * math.pi * torch.arange(num_frames) / period_frames
    yaw = math.radians(yaw_deg) * phase.sin()
    pitch = math.radians(pitch_deg) * 0.5 * (2 * phase).sin()
    return framed(head_camera(torch.stack([yaw, pitch, torch.zeros_like(yaw)], -1)))


def framed(camera: Camera) -> Camera:
    """Move the crops of cameras so that the middle of the head, at the scene's origin, is in their middle.

    The point that EG3D's cameras look at lies in the face, so that a head seen from the side would lean out of the picture. The larger
    the head is shown, the nearer to the mouth is what is in the middle.
    """
    zoom = camera.intrinsics[..., 0, 0] / CAMERA_FOCAL
    aim = (1 - 1 / zoom).clamp_min(0)[..., None] * zoom.new_tensor(ABOVE_LIPS)
    offset = project(aim[..., None, :].to(camera.cam2world), camera)[..., 0, :] - 0.5
    intrinsics = camera.intrinsics.clone()
    intrinsics[..., :2, 2] -= offset.to(intrinsics)
    return Camera(cam2world=camera.cam2world, intrinsics=intrinsics)


def project(points: Float[Tensor, "*b p 3"], camera: Camera) -> Float[Tensor, "*b p 2"]:
    """Where world points appear, in image sides from the top left corner."""
    rotation, centre = camera.cam2world[..., :3, :3], camera.cam2world[..., :3, 3]
    seen = (points - centre[..., None, :]) @ rotation  # rows times R are columns times R^T
    pixels = seen @ camera.intrinsics.mT
    return pixels[..., :2] / pixels[..., 2:]


def fit_similarity(
    source: Float[Tensor, "*b p d"],
    target: Float[Tensor, "*b p d"],
    weights: Float[Tensor, "*b p"] | None = None,
    *,
    with_scale: bool = True,
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b d d"], Float[Tensor, "*b d"]]:
    """Scale s, rotation R and shift t that minimise the weighted squares of s R source + t - target; never a reflection.

    Args:
        source: points to move.
        target: where they should go.
        weights: one per point, any scale; all equal if left out.
        with_scale: False keeps s = 1 (Kabsch).

    Reference: Umeyama, Least-squares estimation of transformation parameters between two point patterns, PAMI 1991.
    """
    w = torch.ones_like(source[..., 0]) if weights is None else weights
    w = (w / w.sum(-1, keepdim=True))[..., None]
    source_mean, target_mean = (w * source).sum(-2, keepdim=True), (w * target).sum(-2, keepdim=True)
    a, b = source - source_mean, target - target_mean
    u, singular, vt = torch.linalg.svd((w * b).mT @ a)
    sign = torch.ones_like(singular)
    sign[..., -1] = torch.linalg.det(u @ vt).sign()
    rotation = (u * sign[..., None, :]) @ vt
    scale = (singular * sign).sum(-1) / (w * a.square()).sum((-2, -1)) if with_scale else torch.ones_like(singular[..., 0])
    shift = target_mean.squeeze(-2) - scale[..., None] * (rotation @ source_mean.mT).squeeze(-1)
    return scale, rotation, shift


def inside_outline(points: Float[np.ndarray, "n 2"], outline: Float[np.ndarray, "k 2"]) -> Bool[np.ndarray, " n"]:
    """Say which points lie inside a closed outline (even-odd rule)."""
    inside = np.zeros(len(points), bool)
    for start, end in zip(outline, np.roll(outline, -1, 0), strict=True):
        crosses = (start[1] > points[:, 1]) != (end[1] > points[:, 1])
        with np.errstate(divide="ignore", invalid="ignore"):
            at = start[0] + (points[:, 1] - start[1]) * (end[0] - start[0]) / (end[1] - start[1])
        inside ^= crosses & (points[:, 0] < at)
    return inside
