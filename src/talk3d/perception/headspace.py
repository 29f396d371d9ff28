"""Where head space lies in one person's head: the shape told by the refined motion, laid where such people's points lie.

A slightly wrong shape and a constant nod explain single frames equally well. Once the skin has told how the head moves from frame to frame, the
points' parallax tells the shape, and the shape tells the nod.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from talk3d.ops.geometry import CAMERA_RADIUS, HEAD_PIVOT, fit_similarity, rotation_from_vector
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
from talk3d.perception.headpose import RIGID_POINTS, HeadMotion

NOISE = 0.003
"""Error of a point in one frame, scene units."""
NUM_VIEWS = 300.0
"""How many independent views a clip counts for, once its motion is known."""
NUM_FRAMES = 250
"""About how many frames, spread over the clip, are looked at."""
UNSEEN = 0.1
"""What is known of points without parallax, 1 / scene units squared: keeps heads that never turn solvable."""


def settle_head_space(
    motion: HeadMotion, landmarks: Float[Tensor, "t p 2"], template: FaceTemplate, image_size: tuple[int, int], num_rounds: int = 5
) -> HeadMotion:
    """Turn and shift head space, once for the whole clip, to where it lies in other people's heads.

    Args:
        motion: right but for a constant, as `alignment.refine_motion` leaves it.
        landmarks: of the same frames, px of the source picture.
        template: of the face model that found them.
        image_size: width, height of the source picture, px.
        num_rounds: the networks' lag depends on the pose, so shape and place are found in turn.
    """
    rigid = list(RIGID_POINTS)
    few = slice(None, None, max(1, len(landmarks) // NUM_FRAMES))
    seen = landmarks[few].double()
    angle = eye_line_angle(seen)
    observed = seen[:, rigid] - torch.tensor(image_size, dtype=torch.float64) / 2
    mean, people, lag = (values[rigid].double() for values in (template.points, template.people, template.lag))
    pivot = torch.tensor(HEAD_PIVOT, dtype=torch.float64)
    way = torch.zeros(people.shape[-1], dtype=torch.float64)
    for _ in range(num_rounds):
        shape, information = _triangulate(motion, few, observed, angle, lag)
        placed, way = place_shape(shape, mean, people, information)
        _, turn, _ = fit_similarity(shape, placed)  # parallax says nothing of size, which stays
        placed = (shape - shape.mean(0)) @ turn.mT + placed.mean(0)
        rotation = motion.rotation @ turn.mT
        translation = motion.translation - rotation @ (placed.mean(0) - turn @ shape.mean(0))
        nearer = CAMERA_RADIUS / (rotation @ pivot + translation).norm(dim=-1).mean()
        motion = replace(motion, rotation=rotation, translation=translation * nearer, focal_px=motion.focal_px * float(nearer), shape=placed)
    return replace(motion, face=template.points.double() + template.people.double() @ way)


def nod_head_space(motion: HeadMotion, angle_rad: float) -> HeadMotion:
    """Turn head space round the head's pivot, once for the whole clip: cameras in front rise by this angle, and what they see stays."""
    turn = rotation_from_vector(torch.tensor([-angle_rad, 0.0, 0.0], dtype=torch.float64))
    pivot = torch.tensor(HEAD_PIVOT, dtype=torch.float64)
    shape, face = ((points - pivot) @ turn.mT + pivot for points in (motion.shape, motion.face))
    rotation = motion.rotation @ turn.mT
    return replace(motion, rotation=rotation, translation=motion.translation + motion.rotation @ pivot - rotation @ pivot, shape=shape, face=face)


def _triangulate(motion: HeadMotion, few: slice, observed: Tensor, angle: Tensor, lag: Tensor) -> tuple[Tensor, Tensor]:
    """The rigid points that the cameras see, and what is known of each; k 3, k 3 3."""
    rotation, translation, shape = motion.rotation[few], motion.translation[few], motion.shape
    focal = torch.tensor(motion.focal_px, dtype=torch.float64)
    strayed = turn_picture(torch.einsum("kaf,tf->tka", lag, pose_features(rotation.mT)), angle)
    normal = torch.zeros(len(shape), 3, 3, dtype=torch.float64)
    little = UNSEEN * torch.eye(3, dtype=torch.float64)
    for _ in range(3):
        local = shape @ rotation.mT + translation[:, None]
        scale = focal / local[..., 2].mean(-1)[:, None, None]  # px per scene unit
        error = focal * local[..., :2] / local[..., 2:] + scale * strayed - observed
        jacobian = projection_jacobian(local, focal) @ rotation[:, None]
        distance = error.norm(dim=-1)
        weight = NUM_VIEWS / len(observed) / (NOISE * scale[..., 0]) ** 2 * huber_weight(distance, 1.5 * distance.median())
        normal = torch.einsum("tk,tkai,tkaj->kij", weight, jacobian, jacobian) + little
        gradient = torch.einsum("tk,tkai,tka->ki", weight, jacobian, error)
        shape = shape - torch.linalg.solve(normal, gradient[..., None])[..., 0]
    return shape, torch.linalg.inv(torch.linalg.inv(normal) + OWN_SHAPE**2 * torch.eye(3, dtype=torch.float64))
