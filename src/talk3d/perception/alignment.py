"""The head's motion refined by the picture itself: the rigid parts of the face must look the same in every frame.

Face networks follow a nodding head only in part, and differently for each person; skin does not. Every frame is laid on one surface, the face of
the person's points, and its pose corrected until the skin agrees with the mean of many frames (Gauss-Newton on six numbers, robust). Light stays
while heads turn, so the mean, a second time round, follows the turn of the head.

Once crops are cut and the prior has guessed the head's shape, hair and ears are followed as well: no expression moves them. Brows are followed in
the same way, on a head whose pose is known by then: how far they are drawn up.

Reference: Baker and Matthews, Lucas-Kanade 20 years on, IJCV 2004.
"""

import math
from dataclasses import replace
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from scipy.interpolate import LinearNDInterpolator
from scipy.ndimage import uniform_filter
from torch import Tensor

from talk3d.ops.geometry import inside_outline, rotation_from_vector, vector_from_rotation
from talk3d.perception.facetemplate import huber_weight
from talk3d.perception.headpose import HeadMotion
from talk3d.perception.landmarks import BROWS, LEFT_EYE_CORNERS, RIGHT_EYE_CORNERS
from talk3d.perception.regions import FACE_OVAL
from talk3d.types import spread_evenly

SIDE_PX = 160
"""Side of the pictures of the face that are compared."""
SPACING = 0.004
"""Of the grid of surface points that are compared, scene units: a little less than a pixel of those pictures."""
RELIEF = 0.93
"""Depth of the surface against that of the face points to start from: light stays while heads turn, which makes turns look smaller."""
LIVELY_RAD = math.radians(2)
"""Turns much smaller than this say nothing of the surface's depth."""
FIXED_PARTS = (
    (151, 108, 69, 104, 68, 71, 139, 34, 227, 116, 117, 118, 101, 36, 129, 102, 64, 98, 97, 2),
    (151, 337, 299, 333, 298, 301, 368, 264, 447, 345, 346, 347, 330, 266, 358, 331, 294, 327, 326, 2),
)
"""Outlines of the right and the left half of what neither jaw nor lips move: forehead, temples, upper cheeks, nose."""
MOVING_PARTS = (
    (70, 63, 105, 66, 107, 55, 193, 245, 233, 232, 231, 230, 229, 228, 31, 226, 35, 124, 46),
    (300, 293, 334, 296, 336, 285, 417, 465, 453, 452, 451, 450, 449, 448, 261, 446, 265, 353, 276),
)
"""Outlines of brow, lids and eye on either side, which are left out."""
NOSE_TIP = 1
"""Outside the face and above this, hair and ears move with the head alone."""
BROW_POINTS = (105, 66, 107, 336, 296, 334)
"""On the upper rim of the brows."""
NOSE_BRIDGE, FOREHEAD_TOP = 197, 10
"""Below the first nothing is drawn up with the brows."""
BROW_TRUST = 0.015
"""How far brows are drawn up or down, scene units."""
ONE_BROW_TRUST = 0.002
"""The same of one more than the other: with more freedom it takes turns of the head for its own."""
LOWER_LIDS, NOSE_BASE, NOSE_WINGS, CHEEK_BONES = (145, 374), (98, 327), (129, 358), (116, 345)
"""Smiles draw up what lies below the first, in full from half the way to the second, and beside the third, in full from 40 % of the way to
the fourth."""
CHEEK_TRUST = 0.005
"""How far smiles draw cheeks up, scene units; with more freedom cheeks say less of how a head is held."""

NOISE = 0.35
"""Least difference between skins, in units of their local contrast, that is no news."""
INDEPENDENT = 0.1
"""Share of the compared points that err independently."""
TRUST = (0.05, 0.05, 0.05, 0.02, 0.02, 0.06)
"""How far the pose of the face points may be off: turns in radians, shifts in scene units."""
KNOWN = 6 * (1e-4,)
"""Trust in a pose that is known."""
BROW_ROOM = (0.03, 0.013)
"""How far above and below their rims brows are looked at, in distances between the outer eye corners."""
NUM_REFERENCE = 64
"""Frames, spread over the clip, whose mean all are compared with."""
NUM_SHADED = 192
"""The same where the mean follows the turn of the head."""
SHADE_DOUBT = 3.0
"""So many frames would have to say that a look follows the turn of the head to be believed by half."""
MOST_TURNED = 2.5
"""In standard deviations: looks of heads that are turned farther are those of heads that are turned so far."""


class FaceViews:
    """Small pictures of the face, one per frame, as local contrast in a nameless file on disk, and where they lie in the source pictures."""

    def __init__(self, file: BinaryIO, side: int = SIDE_PX, window: int = SIDE_PX // 14) -> None:
        """Start empty.

        Args:
            file: is written and read, and closed by its owner.
            side: of the pictures, px.
            window: of what is local, px.
        """
        self._file, self._side, self._window = file, side, window
        self._squares: dict[int, tuple[float, float, float]] = {}

    def put(self, index: int, frame: UInt8[np.ndarray, "h w 3"], landmarks: Float[np.ndarray, "n 2"]) -> None:
        """Keep the face of a frame."""
        low, high = landmarks.min(0), landmarks.max(0)
        side = float(1.2 * (high - low).max())
        left, top = (float(value) - side / 2 for value in (low + high) / 2)
        margin = max(1, math.ceil(2 * side / self._side))
        corner = (max(math.floor(left) - margin, 0), max(math.floor(top) - margin, 0))
        part = Image.fromarray(frame[corner[1] : math.ceil(top + side) + margin, corner[0] : math.ceil(left + side) + margin]).convert("L")
        scale = side / self._side
        shrunk = part.reduce(int(scale)) if scale >= 2 else part
        factor = int(scale) if scale >= 2 else 1
        affine = (scale / factor, 0, (left - corner[0]) / factor, 0, scale / factor, (top - corner[1]) / factor)
        view = shrunk.transform((self._side, self._side), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        self.keep(index, view, (left, top, side))

    def keep(self, index: int, view: Image.Image, square: tuple[float, float, float]) -> None:
        """Keep a grey picture that shows a square of the frame with this left, top and side, px."""
        grey = np.asarray(view, np.float32)
        mean = uniform_filter(grey, self._window, mode="nearest")
        spread = uniform_filter(grey * grey, self._window, mode="nearest") - mean * mean
        contrast = (grey - mean) / np.sqrt(np.maximum(spread, 0) + 16.0)
        self._squares[index] = square
        self._file.seek(2 * index * self._side**2)
        self._file.write(contrast.astype(np.float16).tobytes())

    def read(self, indices: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b 3 s s"], Float[Tensor, "b 3"]]:
        """Pictures of local contrast with their slopes to the right and down, and the left, top and side of the squares they show, px."""
        pictures = np.empty((len(indices), self._side, self._side), np.float16)
        for picture, index in zip(pictures, indices.tolist(), strict=True):
            self._file.seek(2 * index * self._side**2)
            picture[:] = np.frombuffer(self._file.read(picture.nbytes), np.float16).reshape(picture.shape)
        contrast = torch.from_numpy(pictures).float()
        down, right = torch.gradient(contrast, dim=(1, 2))
        return torch.stack([contrast, right, down], 1), torch.tensor([self._squares[index] for index in indices.tolist()])


def crop_views(file: BinaryIO, frames: UInt8[np.ndarray, "t s s 3"], crop: Float[np.ndarray, "t 2 3"]) -> FaceViews:
    """A clip's crops as views; `crop` maps source px of every frame to crop px, without rotation."""
    side = frames.shape[1]
    views = FaceViews(file, side, side // 25)
    for index, (scale, right, down) in enumerate(crop[:, (0, 0, 1), (0, 2, 2)].tolist()):
        views.keep(index, Image.fromarray(frames[index]).convert("L"), (-right / scale, -down / scale, side / scale))
    return views


class Surface:
    """Points of the person's face with their normals, on a grid seen from the front, and how the skin there may slide."""

    def __init__(self, points: Float[Tensor, "n 3"], normals: Float[Tensor, "n 3"], lifts: Float[Tensor, "n l"]) -> None:
        """`lifts`: how much of each way of being drawn up a point takes part in."""
        self.points, self.normals = points, normals
        along = torch.nn.functional.normalize(torch.tensor([0.0, 1.0, 0.0]) - normals[:, 1:2] * normals, dim=-1)
        self.lifts = along[..., None] * lifts[:, None]
        """How the skin moves along itself as it is drawn up, n 3 l."""

    @classmethod
    def rigid(cls, face: Float[Tensor, "p 3"], relief: float = RELIEF) -> "Surface":
        """Return what neither jaw nor lips move, on a face with its depth times `relief`; four lifts, see `_lifts`."""
        points, normals = _laid(face, relief)
        kept = _still(points, face)
        return cls(points[kept], normals[kept], _lifts(points[kept], face.float()))

    @classmethod
    def head(cls, points: Float[Tensor, "n 3"], normals: Float[Tensor, "n 3"], face: Float[Tensor, "p 3"]) -> "Surface":
        """Return what neither jaw nor lips move, and hair and ears, of a head of known shape; the lifts of `rigid`, outside the face none."""
        inside = _within(points, face, (FACE_OVAL,))
        kept = _still(points, face) | (~inside & (points[:, 1] > float(face[NOSE_TIP, 1])))
        return cls(points[kept], normals[kept], _lifts(points[kept], face.float()) * inside[kept, None])

    @classmethod
    def brows(cls, face: Float[Tensor, "p 3"]) -> "Surface":
        """Return the brows; two lifts, of the right and the left one."""
        points, normals = _laid(face, RELIEF)
        above, below = (room * _eye_distance(face) for room in BROW_ROOM)
        outlines = []
        for brow in BROWS:
            upper, lower = np.split(face[list(brow), :2].numpy(), 2)  # rims, both from the outer end
            outlines.append(np.concatenate([upper + np.array([0, above]), lower[::-1] - np.array([0, below])]))
        sides = torch.from_numpy(np.stack([inside_outline(points[:, :2].numpy(), outline) for outline in outlines], -1))
        kept = sides.any(-1)
        return cls(points[kept], normals[kept], sides[kept].float())


def _eye_distance(face: Float[Tensor, "p 3"]) -> float:
    return float((face[RIGHT_EYE_CORNERS[0]] - face[LEFT_EYE_CORNERS[0]]).norm())


def _laid(face: Float[Tensor, "p 3"], relief: float) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
    """Points and normals of a grid laid on the face's points, their depth times `relief`."""
    corners = face.numpy()
    flat, depth = corners[:468, :2], corners[:468, 2].mean() + relief * (corners[:468, 2] - corners[:468, 2].mean())
    low, high = flat.min(0), flat.max(0)
    x, y = np.meshgrid(np.arange(low[0], high[0], SPACING), np.arange(low[1], high[1], SPACING))
    height = LinearNDInterpolator(flat, depth)
    height_here, right, up = height(x, y), height(x + SPACING, y) - height(x - SPACING, y), height(x, y + SPACING) - height(x, y - SPACING)
    normal = np.stack([-right / (2 * SPACING), -up / (2 * SPACING), np.ones_like(x)], -1).reshape(-1, 3)
    points = np.stack([x, y, height_here], -1).reshape(-1, 3)
    kept = np.isfinite(points).all(-1) & np.isfinite(normal).all(-1)
    return torch.from_numpy(points[kept]).float(), torch.nn.functional.normalize(torch.from_numpy(normal[kept]).float(), dim=-1)


def _lifts(points: Float[Tensor, "n 3"], face: Float[Tensor, "p 3"]) -> Float[Tensor, "n 4"]:
    """How far points are drawn up; last axis: both brows, one more than the other, the forehead above them, both cheeks."""
    bridge, brows, top = face[NOSE_BRIDGE, 1], face[list(BROW_POINTS), 1].mean(), face[FOREHEAD_TOP, 1]
    low = ((points[:, 1] - bridge) / (brows - bridge)).clamp(0, 1)
    high = ((points[:, 1] - brows) / (top - brows)).clamp(0, 1)
    side = points[:, 0] / points[:, 0].abs().max()
    lids, nose = (face[list(there), 1].mean() for there in (LOWER_LIDS, NOSE_BASE))
    wings, bones = (face[list(there), 0].abs().mean() for there in (NOSE_WINGS, CHEEK_BONES))
    cheeks = (2 * (lids - points[:, 1]) / (lids - nose)).clamp(0, 1) * ((points[:, 0].abs() - wings) / (0.4 * (bones - wings))).clamp(0, 1)
    return torch.stack([low, low * side, high, cheeks], -1)


def refine_motion(
    motion: HeadMotion,
    views: FaceViews,
    pictures: Int[Tensor, " t"],
    image_size: tuple[int, int],
    surface: Surface | None = None,
) -> tuple[HeadMotion, Float[Tensor, "t 1"]]:
    """Correct each frame's pose until the rigid parts of the head look as in all other frames.

    The second result is how far smiles draw the cheeks up against where they usually are, in distances between the outer eye corners.

    Args:
        motion: where to begin.
        views: of the face.
        pictures: under which number each frame of the motion is in `views`.
        image_size: width, height of the source picture, px.
        surface: of the head; None takes that of the face's points, and first finds how deep it is.
    """
    trust = (*TRUST, BROW_TRUST, ONE_BROW_TRUST, BROW_TRUST, CHEEK_TRUST)
    alignment = _Alignment(motion, views, pictures, image_size, surface or Surface.rigid(motion.face), trust)
    refined, cheeks = alignment.run(surface is None), alignment.drawn[:, 3:]
    return refined, (cheeks - cheeks.median()) / _eye_distance(motion.face)


def refine_brows(
    lift: Float[Tensor, "t 2"], motion: HeadMotion, views: FaceViews, pictures: Int[Tensor, " t"], image_size: tuple[int, int]
) -> Float[Tensor, "t 2"]:
    """Correct how far the right and the left brow are drawn up until they look as in all other frames.

    Args:
        lift: of the face points, in distances between the outer eye corners: where to begin.
        motion: of the head.
        views: of the face.
        pictures: under which number each frame of the motion is in `views`.
        image_size: width, height of the source picture, px.
    """
    brows = _Alignment(motion, views, pictures, image_size, Surface.brows(motion.face), (*KNOWN, *2 * (BROW_TRUST,)))
    distance = _eye_distance(motion.face)
    lift = brows.slide(lift.float() * distance) / distance
    return lift - lift.median(0).values


class _Alignment:
    """The mean look of the surface, and how well each point keeps it."""

    def __init__(
        self,
        motion: HeadMotion,
        views: FaceViews,
        pictures: Tensor,
        image_size: tuple[int, int],
        surface: Surface,
        trust: tuple[float, ...],
    ) -> None:
        self.motion, self.views, self.pictures, self.surface = motion, views, pictures, surface
        self.centre, self.trust = torch.tensor(image_size) / 2, torch.tensor(trust).pow(-2)
        self.rotation, self.translation = motion.rotation.float(), motion.translation.float()
        self.drawn = torch.zeros(len(self.rotation), self.surface.lifts.shape[-1])
        self.first = self.drawn.clone()
        self.turned = torch.cat([torch.ones(len(self.rotation), 1), torch.zeros(len(self.rotation), 5)], 1)
        """What looks may follow: 1, and the terms of a quadratic in the head's turns, t 6."""
        self._forget()

    def run(self, deepen: bool) -> HeadMotion:
        """Find the poses; first how deep the surface is, if asked to."""
        few = spread_evenly(len(self.rotation), NUM_REFERENCE)
        if deepen:
            self._settle(few)
            self.surface = Surface.rigid(self.motion.face, RELIEF * self._turns_seen(few))
        self._refine_all(few)
        return replace(self.motion, rotation=self.rotation.double(), translation=self.translation.double())

    def slide(self, start: Float[Tensor, "t l"]) -> Float[Tensor, "t l"]:
        """Find how far the surface is drawn up, from a start on."""
        self.first, self.drawn = start, start.clone()
        self._refine_all(spread_evenly(len(self.rotation), NUM_REFERENCE))
        return self.drawn

    def _refine_all(self, few: Tensor) -> None:
        self._settle(few)
        self._update_look(few)
        self._refine_each(3)
        for _ in range(3):
            self._update_shades()
            self._refine_each(2)

    def _refine_each(self, num_steps: int) -> None:
        for chunk in torch.arange(len(self.rotation)).split(32):
            self._refine(chunk, num_steps)

    def _settle(self, frames: Tensor) -> None:
        """Look and poses in turn, from the start."""
        self.rotation[frames], self.translation[frames] = self.motion.rotation[frames].float(), self.motion.translation[frames].float()
        self.drawn[frames] = self.first[frames]
        self._forget()
        for _ in range(3):
            self._update_look(frames)
            self._refine(frames, 3)

    def _forget(self) -> None:
        count = len(self.surface.points)
        self.look, self.weight = torch.zeros(self.turned.shape[1], count), torch.ones(count)

    def _turns_seen(self, frames: Tensor) -> float:
        """How large turns to the side look to the skin against the face points, which follow them well: too deep a surface makes them small."""
        middle = self.motion.rotation[frames[len(frames) // 2]]
        turns = [vector_from_rotation(rotation[frames].double() @ middle.mT)[:, 1] for rotation in (self.motion.rotation, self.rotation)]
        points, skin = (turn - turn.mean() for turn in turns)
        doubt = len(frames) * LIVELY_RAD**2
        return float(((points @ skin + doubt) / (points @ points + doubt)).clamp(0.75, 1.3))

    def _sample(self, pictures: Tensor, squares: Tensor, rotation: Tensor, translation: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the pictures show at the surface's points, b 3 n; the points in the camera, b n 3; and how squarely they are seen, b n."""
        local = (self.surface.points + torch.einsum("nil,bl->bni", self.surface.lifts, drawn)) @ rotation.mT + translation[:, None]
        seen = self.motion.focal_px * local[..., :2] / local[..., 2:] + self.centre
        grid = 2 * (seen - squares[:, None, :2]) / squares[:, None, 2:] - 1
        values = torch.nn.functional.grid_sample(pictures, grid[:, None], mode="bilinear", padding_mode="border", align_corners=False)[:, :, 0]
        facing = -(self.surface.normals @ rotation.mT * torch.nn.functional.normalize(local, dim=-1)).sum(-1)
        inside = (grid.abs() < 0.97).all(-1)
        return values, local, ((facing - 0.3) / 0.3).clamp(0, 1) * inside

    def _shown(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """What these frames show at the surface's points, and which points they show; b n."""
        pictures, squares = self.views.read(self.pictures[frames])
        values, _, facing = self._sample(pictures, squares, self.rotation[frames], self.translation[frames], self.drawn[frames])
        return values[:, 0], facing > 0.1

    def _update_look(self, frames: Tensor) -> None:
        """Median look of each point, and less weight for points that change."""
        shown, seen = self._shown(frames)
        self.look[0] = torch.where(seen, shown, torch.nan).nanmedian(0).values.nan_to_num()
        self._weigh(shown - self.look[0], seen)

    def _weigh(self, error: Tensor, seen: Tensor) -> None:
        spread = 1.48 * torch.where(seen, error.abs(), torch.nan).nanmedian(0).values.nan_to_num(1e3)
        self.weight = 1 / (spread.square() + NOISE**2)

    def _update_shades(self) -> None:
        """How each point's look follows the turn of the head, a quadratic, by robust least squares, and less weight for points that change else."""
        turn = vector_from_rotation(self.rotation @ self.rotation[len(self.rotation) // 2].mT)[:, :2]
        turn = ((turn - turn.mean(0)) / turn.std(0).clamp(min=LIVELY_RAD)).clamp(-MOST_TURNED, MOST_TURNED)
        self.turned[:, 1:] = torch.cat([turn, turn.square(), turn.prod(1, keepdim=True)], 1)
        frames = spread_evenly(len(self.rotation), NUM_SHADED)
        (shown, seen), known = self._shown(frames), self.turned[frames]
        doubt = torch.diag(torch.tensor([1e-3, *5 * (SHADE_DOUBT,)]))
        error = shown - known @ self.look
        for _ in range(3):
            weight = seen * huber_weight(error.abs() * self.weight.sqrt(), torch.tensor(1.5))
            normal = torch.einsum("fk,fn,fl->nkl", known, weight, known) + doubt
            self.look = torch.linalg.solve(normal, torch.einsum("fk,fn->nk", known, weight * shown)[..., None])[..., 0].mT
            error = shown - known @ self.look
        self._weigh(error, seen)

    def _refine(self, frames: Tensor, num_steps: int) -> None:
        """Gauss-Newton on each frame's pose and what is drawn up, held to the pose of the face points and to skin at rest."""
        pictures, squares = self.views.read(self.pictures[frames])
        first_rotation, first_translation = self.motion.rotation[frames].float(), self.motion.translation[frames].float()
        rotation, translation, drawn = self.rotation[frames], self.translation[frames], self.drawn[frames]
        expected = self.turned[frames] @ self.look
        for _ in range(num_steps):
            values, local, facing = self._sample(pictures, squares, rotation, translation, drawn)
            error = values[:, 0] - expected
            weight = INDEPENDENT * self.weight * facing * huber_weight(error.abs() * self.weight.sqrt(), torch.tensor(1.5))
            slope = values[:, 1:].mT * (self.motion.focal_px * pictures.shape[-1] / squares[:, 2])[:, None, None] / local[..., 2:]  # b n 2
            by_place = torch.cat([slope, -(slope * local[..., :2] / local[..., 2:]).sum(-1, keepdim=True)], -1)
            by_turn = torch.cross(local - translation[:, None], by_place, dim=-1)
            by_lifts = torch.einsum("bni,nil->bnl", by_place @ rotation, self.surface.lifts)
            jacobian = torch.cat([by_turn, by_place, by_lifts], -1)  # b n 6+l
            weighted = (weight[..., None] * jacobian).mT
            moved = torch.cat([vector_from_rotation(rotation @ first_rotation.mT), translation - first_translation, drawn], -1)
            gradient = (weighted @ error[..., None])[..., 0] + self.trust * moved
            step = torch.linalg.solve(weighted @ jacobian + torch.diag(self.trust), gradient)
            rotation = rotation_from_vector(-step[:, :3]) @ rotation
            translation, drawn = translation - step[:, 3:6], drawn - step[:, 6:]
        self.rotation[frames], self.translation[frames], self.drawn[frames] = rotation, translation, drawn


def _still(points: Float[Tensor, "n 3"], face: Float[Tensor, "p 3"]) -> Bool[Tensor, " n"]:
    """Which points of the face neither jaw nor lips, brows nor lids move."""
    return _within(points, face, FIXED_PARTS) & ~_within(points, face, MOVING_PARTS)


def _within(points: Float[Tensor, "n 3"], face: Float[Tensor, "p 3"], outlines: tuple[tuple[int, ...], ...]) -> Bool[Tensor, " n"]:
    """Which points lie, seen from the front, inside one of these outlines of the face's points."""
    return torch.from_numpy(np.any([inside_outline(points[:, :2].numpy(), face[list(outline), :2].numpy()) for outline in outlines], 0))
