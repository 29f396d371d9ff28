"""Where head space lies in one person's head: the shape told by the refined motion, laid where such people's points lie. And where in a prior.

A slightly wrong shape and a constant nod explain single frames equally well. Once the skin has told how the head moves from frame to frame, the
points' parallax tells the shape, and the shape tells the nod. Head space is the builtin prior's; others are laid over it by their average heads.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from talk3d.errors import WeightsError
from talk3d.io.weights import load_prior
from talk3d.models.avatar import Prior
from talk3d.models.generator import TriplaneGenerator
from talk3d.ops.geometry import (
    CAMERA_RADIUS,
    HEAD_PIVOT,
    fit_similarity,
    head_camera,
    rotation_from_vector,
    vector_from_rotation,
    widen_turns,
)
from talk3d.perception.facetemplate import (
    OWN_SHAPE,
    FaceTemplate,
    eye_line_angle,
    fit_template,
    huber_weight,
    place_shape,
    pose_features,
    projection_jacobian,
    turn_picture,
)
from talk3d.perception.headpose import RIGID_POINTS, HeadMotion
from talk3d.perception.landmarks import FaceModel, observe_picture

NOISE = 0.003
"""Error of a point in one frame, scene units."""
NUM_VIEWS = 300.0
"""How many independent views a clip counts for, once its motion is known."""
NUM_FRAMES = 250
"""About how many frames, spread over the clip, are looked at."""
UNSEEN = 0.1
"""What is known of points without parallax, 1 / scene units squared: keeps heads that never turn solvable."""
PRIOR_VIEWS = torch.cartesian_prod(torch.tensor([-40.0, -20, 0, 20, 40]), torch.tensor([-20.0, 0, 20]), torch.zeros(1)).deg2rad()
"""Yaw, pitch and roll from which a prior's average head is looked at; nine by five views give the same answer within 0.3 degrees."""
HEAD_HEIGHT = 0.5
"""Of the builtin prior's average head, scene units."""
MOST_RESIDUAL = 0.015
"""Largest mean distance between the points of a prior's average head and the builtin one's, in heads, with which its place is believed."""


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


def widen_head_turns(motion: HeadMotion, factor: float, middle: Float[Tensor, "3 3"]) -> HeadMotion:
    """Let the head turn so many times as far through the whole clip, from the middle of its turns (`widen_turns`)."""
    cam2world = widen_turns(motion.cam2world(), factor, middle)
    rotation = cam2world[:, :3, :3].mT
    return replace(motion, rotation=rotation, translation=-(rotation @ cam2world[:, :3, 3:])[..., 0])


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


def place_prior(prior: Prior, model: FaceModel, *, device: str = "cpu") -> Prior:
    """Return the prior with its place in head space, so that cameras of tracked clips show it the same heads as they show the builtin one.

    The face model looks at the average heads of both from known cameras, and one similarity lays the one's points over the other's; what the model
    does to all rendered heads alike falls out. It is done twice: the second time the cameras are nearly the same for both. The place and what is
    left of the distances (`residual`, in heads) are kept in the prior's config and provenance.

    Args:
        prior: made elsewhere or from other pictures, in whatever space.
        model: should be the one that tracks clips.
        device: where to render.

    Raises:
        WeightsError: the prior's average is no head that the face model knows.
    """
    rigid = list(RIGID_POINTS)
    generator = _placed(prior.generator, 1.0, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    total_scale, total_turn, total_shift = 1.0, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    found = _average_face(generator, model, device)[rigid]
    wanted = _average_face(load_prior().generator, model, device)[rigid]
    for again in (True, False):
        scale, turn, shift = fit_similarity(wanted, found)
        residual = float((scale * wanted @ turn.mT + shift - found).norm(dim=-1).mean() / scale) / HEAD_HEIGHT
        total_shift = total_scale * total_turn @ shift + total_shift
        total_scale, total_turn = total_scale * float(scale), total_turn @ turn
        generator = _placed(generator, total_scale, total_turn, total_shift)
        if again:
            found = _average_face(generator, model, device)[rigid]
    if residual > MOST_RESIDUAL:
        raise WeightsError(
            f"face points of this prior's average head lie {residual:.1%} of a head from where heads have them, at most {MOST_RESIDUAL:.1%} is "
            "expected: give a prior of upright human heads, imported with the right order of axes (--axes)"
        )
    provenance = {**prior.provenance, "head_space": {"residual": round(residual, 4), "face_model": model.source}}
    return Prior(generator=generator, w_std=prior.w_std, provenance=provenance, encoder=prior.encoder)


def _placed(generator: TriplaneGenerator, scale: float, turn: Tensor, shift: Tensor) -> TriplaneGenerator:
    """The same networks, shared, that lie elsewhere in head space."""
    return generator.with_renderer(head_space=(scale, *vector_from_rotation(turn).tolist(), *shift.tolist()))


def _average_face(generator: TriplaneGenerator, model: FaceModel, device: str) -> Float[Tensor, "p 3"]:
    """Face points of the average head in head space."""
    cameras, home = head_camera(PRIOR_VIEWS), generator.mapping_network.w_avg.device
    generator.to(device)
    w = generator.mapping_network.w_avg.expand(1, generator.num_ws, -1)
    with torch.no_grad():
        pictures = [generator.render(w, cameras[number : number + 1].to(device)).image[0] for number in range(len(cameras))]
    generator.to(home)
    frames = [((picture.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).cpu().numpy() for picture in pictures]  # h w c
    seen = {number: face for number, frame in enumerate(frames) if (face := observe_picture(model, frame))}
    if len(seen) < 2 * len(frames) / 3:
        raise WeightsError(
            f"a face is seen in {len(seen)} of {len(frames)} views of this prior's average head: give a prior of upright human heads, "
            "imported with the right order of axes (--axes), or train it for longer"
        )
    landmarks = torch.stack([torch.from_numpy(face.landmarks) for face in seen.values()]) / frames[0].shape[0]
    return fit_template(landmarks, cameras[torch.tensor(list(seen))]).double()
