"""What is known of face points before a clip is seen: where they lie on heads, how heads differ, and how the face networks err.

Measured once on people seen by known cameras; `headpose` uses it. Geometry only: knows nothing of pictures or networks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from talk3d.errors import WeightsError
from talk3d.ops.geometry import HEAD_PIVOT, cross_matrix, fit_similarity, project, rotation_from_vector, view_angles
from talk3d.types import Camera

TEMPLATE_PATH = Path(__file__).resolve().parents[1] / "assets" / "face_template.safetensors"
ModelKind = Literal["task", "registry"]
"""The Face Landmarker file, or the models of the package registry: their points err differently."""
OUTER_EYE_CORNERS = (33, 263)
"""Of the subject's right and left eye; the networks see the face turned so that the line between them is level."""

OWN_SHAPE = 0.001
"""How far a person's points lie from what the principal ways of people can say, scene units."""


def face_model_kind(check: Mapping[str, Any]) -> ModelKind:
    """Say by which kind of face model a clip's points were found; its `check` tells."""
    return "task" if check.get("landmarks") == "face_landmarker.task" else "registry"


@dataclass(frozen=True, kw_only=True)
class FaceTemplate:
    """Where a face model puts its points on a head, and how it errs."""

    points: Float[Tensor, "p 3"]
    """On the mean head, head space, scene units."""
    people: Float[Tensor, "p 3 q"]
    """Principal ways in which heads differ from the mean, scene units; one standard deviation. How a face slants in its head space is part of it."""
    lag: Float[Tensor, "p 2 5"]
    """Displacement in the level picture, scene units, for each of `pose_features`: the networks follow a turning head only in part."""
    modes: Float[Tensor, "p 2 k"]
    """Displacements in the level picture, scene units, that points share as speech and looks mislead the network; one standard deviation."""
    mirror: Int[Tensor, " m"]
    """Number of the point that each point becomes in a mirrored picture; also for MediaPipe's ten iris points."""


def load_template(kind: ModelKind, path: Path = TEMPLATE_PATH) -> FaceTemplate:
    """The template of the builtin prior's head space for a kind of face model.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            own = {name: file.get_tensor(f"{name}_{kind}").float() for name in ("points", "people", "lag", "modes")}
            return FaceTemplate(**own, mirror=file.get_tensor("mirror"))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"the face template {path} cannot be read ({error}): install the package again, or give a template of your own") from error


def save_templates(templates: Mapping[ModelKind, FaceTemplate], path: Path = TEMPLATE_PATH) -> None:
    """Write templates where `load_template` reads them, all but the points as float16."""
    tensors = {"mirror": next(iter(templates.values())).mirror}
    for kind, template in templates.items():
        tensors[f"points_{kind}"] = template.points.float().contiguous()
        for name in ("people", "lag", "modes"):
            tensors[f"{name}_{kind}"] = getattr(template, name).half().contiguous()
    save_file(tensors, path)


def eye_line_angle(landmarks: Float[Tensor, "n p 2"]) -> Float[Tensor, " n"]:
    """Angle of the line between the outer eye corners, radians, positive clockwise in the picture."""
    line = landmarks[:, OUTER_EYE_CORNERS[1]] - landmarks[:, OUTER_EYE_CORNERS[0]]
    return torch.atan2(line[:, 1], line[:, 0])


def turn_picture(points: Float[Tensor, "n p 2"], angle: Float[Tensor, " n"]) -> Float[Tensor, "n p 2"]:
    """Points turned by an angle about the origin, positive clockwise in a picture whose y points down."""
    cosine, sine = angle.cos(), angle.sin()
    matrix = torch.stack([torch.stack([cosine, -sine], -1), torch.stack([sine, cosine], -1)], -2)
    return points @ matrix.mT


def pose_features(rotation: Float[Tensor, "n 3 3"]) -> Float[Tensor, "n 5"]:
    """Yaw, pitch, their squares and their product of camera-to-head rotations: what the lag of the networks depends on."""
    yaw, pitch, _ = view_angles(rotation).unbind(-1)
    return torch.stack([yaw, pitch, yaw.square(), yaw * pitch, pitch.square()], -1)


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
        jacobian = projection_jacobian(local, focal) @ rotation[:, None]  # n p 2 3
        weight = huber_weight(error.norm(dim=-1), 1.5 * error.norm(dim=-1).median())
        normal = torch.einsum("np,npai,npaj->pij", weight, jacobian, jacobian)
        points = points - torch.linalg.solve(normal, torch.einsum("np,npai,npa->pi", weight, jacobian, error))
    return points.float()


def fit_errors(
    landmarks: Float[Tensor, "n p 2"], cameras: Camera, person: Int[Tensor, " n"], points: Float[Tensor, "p 3"], num_modes: int = 60
) -> tuple[Float[Tensor, "p 2 5"], Float[Tensor, "p 2 k"]]:
    """How a face model's points stray from where the true cameras put them, beyond what makes each person different: lag and modes.

    Args:
        landmarks: divided by the picture's side.
        cameras: the true ones; best with yaw below 30°.
        person: who is in each picture; people with fewer than four pictures are left out.
        points: from `fit_template`.
        num_modes: principal components to keep of what the lag leaves.
    """
    error = _level_error(landmarks, cameras, points)
    features = pose_features(cameras.cam2world[:, :3, :3].double())
    groups = [person == number for number in person.unique() if (person == number).sum() >= 4]
    strayed = torch.cat([_centred(error[group]) for group in groups])
    turned = torch.cat([_centred(features[group]) for group in groups])
    lag = torch.linalg.lstsq(turned, strayed.flatten(1)).solution  # 5 2p
    flat = strayed.flatten(1) - turned @ lag
    _, singular, directions = torch.linalg.svd(flat / math.sqrt(len(flat)), full_matrices=False)
    modes = (directions[:num_modes] * singular[:num_modes, None]).mT
    return lag.mT.unflatten(0, (-1, 2)).float(), modes.unflatten(0, (-1, 2)).float()


def fit_people(
    landmarks: Float[Tensor, "n p 2"],
    cameras: Camera,
    person: Int[Tensor, " n"],
    points: Float[Tensor, "p 3"],
    lag: Float[Tensor, "p 2 5"],
    num_ways: int = 30,
    prior_units: float = 0.02,
) -> Float[Tensor, "p 3 q"]:
    """Principal ways in which people's points differ from the mean head in head space, each person triangulated on its own.

    Args:
        landmarks: divided by the picture's side.
        cameras: the true ones.
        person: who is in each picture; people with fewer than four pictures are left out.
        points: from `fit_template`.
        lag: from `fit_errors`.
        num_ways: principal components to keep.
        prior_units: how far points are thought to lie from the mean, scene units.
    """
    error = _level_error(landmarks, cameras, points)
    error = error - torch.einsum("pac,nc->npa", lag.double(), pose_features(cameras.cam2world[:, :3, :3].double()))
    angle = eye_line_angle(landmarks.double())
    across = cameras.cam2world[:, :3, :2].double().mT  # n 2 3: picture axes in head space
    across = turn_picture(across.mT, -angle).mT
    noise = 0.01
    shapes = []
    for number in person.unique():
        group = person == number
        if group.sum() < 4:
            continue
        normal = torch.einsum("nai,naj->ij", across[group], across[group]) / noise**2 + torch.eye(3, dtype=torch.float64) / prior_units**2
        gradient = torch.einsum("nai,npa->pi", across[group], error[group]) / noise**2
        shapes.append(torch.linalg.solve(normal, gradient[..., None])[..., 0])
    flat = torch.stack(shapes).flatten(1)
    _, singular, directions = torch.linalg.svd((flat - flat.mean(0)) / math.sqrt(len(flat)), full_matrices=False)
    return (directions[:num_ways] * singular[:num_ways, None]).mT.unflatten(0, (-1, 3)).float()


def place_shape(
    shape: Float[Tensor, "k 3"],
    mean: Float[Tensor, "k 3"],
    people: Float[Tensor, "k 3 q"],
    information: Float[Tensor, "k 3 3"] | None = None,
    num_steps: int = 8,
) -> tuple[Float[Tensor, "k 3"], Float[Tensor, " q"]]:
    """Lay a person's points, known up to a similarity, where such a person's points lie in head space; also how such people differ from the mean.

    Args:
        shape: the person's points.
        mean: of all people.
        people: how people differ, one standard deviation; how faces slant, sit and are large in head space is part of it.
        information: inverse covariance of each of `shape`'s points, 1 / scene units squared; by default only `OWN_SHAPE` is in doubt.
        num_steps: Gauss-Newton steps.
    """
    scale, turn, shift = fit_similarity(shape, mean)
    placed = scale * shape @ turn.mT + shift
    each = torch.eye(3).to(shape).expand(len(shape), 3, 3)
    known = each / OWN_SHAPE**2 if information is None else information
    found = torch.zeros(7 + people.shape[-1]).to(shape)
    prior = torch.diag(torch.cat([torch.zeros(7), torch.ones(people.shape[-1])]).to(shape))
    for _ in range(num_steps):
        middle = placed.mean(0)
        spun = cross_matrix(placed - middle)  # turning by w moves a point by -cross @ w
        moves = torch.cat([(placed - middle)[..., None], -spun, each, -people], -1)  # k 3 7+q
        weighted = moves.mT @ (turn @ known @ turn.mT)
        # at the solution, moved points equal mean + people c
        gradient = (weighted @ (mean - placed)[..., None]).sum(0)[:, 0]
        found = torch.linalg.solve((weighted @ moves).sum(0) + prior, gradient)
        step = rotation_from_vector(found[1:4])
        turn = step @ turn
        placed = (placed - middle) @ step.mT * found[0].exp() + middle + found[4:7]
    return placed, found[7:]


def _level_error(landmarks: Tensor, cameras: Camera, points: Tensor) -> Tensor:
    """Seen minus projected points in the level picture, scene units at the head's pivot; n p 2."""
    distance = (cameras.cam2world[:, :3, 3] - torch.tensor(HEAD_PIVOT)).norm(dim=-1).double()
    units = distance / cameras.intrinsics[:, 0, 0].double()  # scene units per picture side
    exact = Camera(cam2world=cameras.cam2world.double(), intrinsics=cameras.intrinsics.double())
    error = (landmarks.double() - project(points.double().expand(len(landmarks), -1, -1), exact)) * units[:, None, None]
    return turn_picture(error, -eye_line_angle(landmarks.double()))


def _centred(values: Tensor) -> Tensor:
    """Deviations from the mean, scaled so that their mean square is the variance."""
    return (values - values.mean(0)) * math.sqrt(len(values) / (len(values) - 1))


def projection_jacobian(local: Float[Tensor, "*b 3"], focal: Float[Tensor, "..."]) -> Float[Tensor, "*b 2 3"]:
    """Derivative of focal * xy / z by the point in the camera."""
    depth = local[..., 2:]
    scale = focal / depth  # focal may differ by axis
    scale = scale.expand(*local.shape[:-1], 2)
    return torch.cat([torch.diag_embed(scale), (-scale * local[..., :2] / depth)[..., None]], -1)


def huber_weight(distance: Float[Tensor, "*b"], limit: Float[Tensor, ""]) -> Float[Tensor, "*b"]:
    """1 inside `limit`, falling as 1/distance outside."""
    return (limit / distance.clamp_min(1e-12)).clamp_max(1)
