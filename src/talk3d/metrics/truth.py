"""The truth of a synthetic clip: its cameras, its landmarks, and films of the same moments from cameras that nobody trained on.

Head spaces differ by one constant similarity; it is found here from where the tracked cameras put points of the head.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from scipy.ndimage import binary_closing, binary_fill_holes, binary_opening, gaussian_filter
from scipy.optimize import least_squares
from torch import Tensor

from talk3d.errors import MediaError, ShapeError
from talk3d.io.media import read_video, scan_video
from talk3d.ops.geometry import CAMERA_FOCAL, HEAD_PIVOT, intrinsics_matrix, look_at, move_camera, project, rotation_from_vector
from talk3d.types import Camera, FaceTrack

TRUTH_FILE = "truth.npz"
MATTE_THRESHOLD = 10.0
"""Levels of 255 by which a pixel must differ from the background to be the person."""


@dataclass(frozen=True, kw_only=True)
class NovelView:
    """A film of the held-out moments from a camera fixed in the world."""

    yaw_deg: float
    pitch_deg: float
    path: Path

    @property
    def name(self) -> str:
        """Yaw and pitch as in the film's name, such as "+35_+0"."""
        return f"{self.yaw_deg:+.0f}_{self.pitch_deg:+.0f}"


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is known of every frame of a synthetic clip."""

    cameras: Camera
    """The film's camera in the head's own space, t frames; intrinsics in sides of the whole picture."""
    landmarks: Float[np.ndarray, "t 68 2"]
    """Multi-PIE's 68 points in pixels of the film."""
    filming: Camera
    """The film's camera in the world: one, without batch axis."""
    film_side_px: int
    """Side of the film's square pictures."""
    novel: tuple[NovelView, ...]
    novel_first_frame: int
    """The frame that the novel films begin with."""

    @property
    def num_frames(self) -> int:
        """How many frames are known."""
        return len(self.cameras)

    def part(self, first: int, num_frames: int) -> "Truth":
        """Return the truth of a clip that begins with frame `first` of the film; its frames are numbered from 0.

        Raises:
            ShapeError: the film is shorter than the clip.
        """
        if first + num_frames > self.num_frames:
            raise ShapeError(
                f"the truth knows {self.num_frames} frames, the clip shows {first} to {first + num_frames}: give the truth of its own film"
            )
        chosen = slice(first, first + num_frames)
        shifted = self.novel_first_frame - first
        return replace(self, cameras=self.cameras[chosen], landmarks=self.landmarks[chosen], novel_first_frame=shifted)

    @property
    def mouth_opening(self) -> Float[np.ndarray, " t"]:
        """Distance of the inner lips (62, 66) over that of the outer eye corners (36, 45), per frame."""
        points = self.landmarks.astype(np.float64)
        return np.linalg.norm(points[:, 62] - points[:, 66], axis=-1) / np.linalg.norm(points[:, 36] - points[:, 45], axis=-1)


@dataclass(frozen=True, kw_only=True)
class HeadAlignment:
    """The similarity x ↦ scale · rotation x + shift from the truth's head space to the tracked one."""

    scale: float
    rotation: Float[Tensor, "3 3"]
    shift: Float[Tensor, " 3"]

    def apply(self, camera: Camera) -> Camera:
        """Move cameras of the truth's head space to the tracked one; their pictures stay the same."""
        return move_camera(camera, self.scale, self.rotation.to(camera.cam2world), self.shift.to(camera.cam2world))


@dataclass(frozen=True, kw_only=True)
class CameraErrors:
    """How far tracked cameras are from the truth, head spaces aligned; one number per frame."""

    rotation_deg: Float[np.ndarray, " t"]
    reprojection_px: Float[np.ndarray, " t"]
    """Root mean square over points round the head, in pixels of the crop."""


@dataclass(frozen=True, kw_only=True)
class NovelFrame:
    """One moment from a novel camera, cut to the head."""

    picture: UInt8[np.ndarray, "s s 3"]
    background: UInt8[np.ndarray, "s s 3"]
    """What the film shows behind the person, fitted."""
    matte: Float[np.ndarray, "s s"]
    """1 person, 0 background."""
    camera: Camera
    """In the truth's head space, without batch axis."""


def find_truth(folder: Path) -> Path | None:
    """Return the folder if it holds a truth file, else None."""
    return folder if (folder / TRUTH_FILE).is_file() else None


def load_truth(folder: Path) -> Truth:
    """Read truth.npz and list the novel films beside it.

    Raises:
        MediaError: no such file, not one of ours, or no film beside it.
    """
    try:
        with np.load(folder / TRUTH_FILE) as arrays:
            cameras = Camera.from_label(torch.from_numpy(arrays["cam2head"]))
            filming = Camera.from_label(torch.from_numpy(arrays["camera"]))
            landmarks, angles, first = arrays["landmarks"], arrays["novel"].reshape(-1, 2), int(arrays["novel_cam2head_first_frame"])
    except (OSError, KeyError, ValueError) as error:
        raise MediaError(f"{folder / TRUTH_FILE} cannot be read ({error}): give a folder made by the synthetic head tools") from error
    views = (NovelView(yaw_deg=float(yaw), pitch_deg=float(pitch), path=folder / f"novel_{yaw:+.0f}_{pitch:+.0f}.mp4") for yaw, pitch in angles)
    novel = tuple(view for view in views if view.path.is_file())
    films = [path for path in (*(view.path for view in novel), folder / "video.mp4") if path.is_file()]
    if not films:
        raise MediaError(f"{folder} holds no film beside {TRUTH_FILE}: give the whole folder of the synthetic clip")
    side = scan_video(films[0]).width_px
    return Truth(cameras=cameras, landmarks=landmarks, filming=filming, film_side_px=side, novel=novel, novel_first_frame=first)


def _cloud(num_frames: int) -> Float[Tensor, "b 27 3"]:
    """Points on a grid that fills the head, the same for every frame."""
    axis = torch.tensor([-0.2, 0.0, 0.2], dtype=torch.float64)
    return (torch.cartesian_prod(axis, axis, axis) + torch.tensor([0.0, 0.0, 0.1])).expand(num_frames, 27, 3)


def align_heads(truth: Truth, track: FaceTrack, frames: Int[np.ndarray, " b"], crop_side_px: int) -> HeadAlignment:
    """Find the similarity that makes tracked cameras show head points where the truth's crops show them, by least squares of pixels.

    Args:
        truth: of the same film.
        track: with one entry per frame of the film.
        frames: which to fit, usually some fifty of the training part.
        crop_side_px: side of the track's crops.
    """
    cloud = _cloud(len(frames))
    target = _truth_in_crop(truth, track, frames, crop_side_px)
    camera = _double(track.cameras[torch.from_numpy(frames)])

    def residual(values: np.ndarray) -> np.ndarray:
        scale, rotation, shift = _similarity(values)
        return (project(scale * cloud @ rotation.mT + shift, camera) - target).flatten().numpy()

    found = least_squares(residual, np.zeros(7), x_scale="jac")
    scale, rotation, shift = _similarity(found.x)
    return HeadAlignment(scale=scale, rotation=rotation.float(), shift=shift.float())


def camera_errors(truth: Truth, track: FaceTrack, alignment: HeadAlignment, frames: Int[np.ndarray, " b"], crop_side_px: int) -> CameraErrors:
    """Compare tracked cameras with the truth at these frames.

    Args:
        truth: of the same film.
        track: with one entry per frame of the film.
        alignment: of the two head spaces.
        frames: which to compare.
        crop_side_px: side of the track's crops.
    """
    camera = _double(track.cameras[torch.from_numpy(frames)])
    moved = alignment.scale * _cloud(len(frames)) @ alignment.rotation.double().mT + alignment.shift.double()
    distance = (project(moved, camera) - _truth_in_crop(truth, track, frames, crop_side_px)).square().sum(-1).mean(-1).sqrt()
    affine = torch.from_numpy(track.crop[frames])
    angle = torch.atan2(affine[:, 1, 0], affine[:, 0, 0])
    roll = rotation_from_vector(torch.stack([torch.zeros_like(angle), torch.zeros_like(angle), -angle], -1))
    expected = alignment.rotation.double() @ truth.cameras.cam2world[torch.from_numpy(frames), :3, :3].double() @ roll
    relative = expected.mT @ camera.cam2world[:, :3, :3]
    cosine = 0.5 * (relative.diagonal(dim1=-2, dim2=-1).sum(-1) - 1)
    return CameraErrors(rotation_deg=cosine.clamp(-1, 1).acos().rad2deg().numpy(), reprojection_px=crop_side_px * distance.numpy())


def novel_frames(truth: Truth, view: NovelView, frames: Int[np.ndarray, " b"], side_px: int) -> Iterator[NovelFrame]:
    """Yield these moments as a novel camera saw them, cut to the head like the tracker cuts.

    The cut is the square round the projected head pivot in which the focal length is EG3D's; its principal point moves with it.

    Args:
        truth: whose films they are.
        view: which film.
        frames: numbers of the clip's frames, ascending, none before the novel films begin.
        side_px: side of the cut pictures.

    Raises:
        ShapeError: the film ends before the last of the frames.
        MediaError: the film cannot be read.
    """
    scan = scan_video(view.path)
    wanted = {int(frame) - truth.novel_first_frame for frame in frames}
    if scan.num_frames <= max(wanted):
        raise ShapeError(f"{view.path} has {scan.num_frames} frames, expected at least {max(wanted) + 1}: make the truth again")
    background: np.ndarray | None = None
    for number, picture in enumerate(read_video(view.path, scan=scan)):
        if number not in wanted:
            continue
        background = fit_background(picture) if background is None else background
        matte = person_matte(picture, background)
        camera, box = _novel_camera(truth, view, number + truth.novel_first_frame)
        yield NovelFrame(
            picture=_cut(picture, box, side_px),
            background=_cut(background, box, side_px),
            matte=_cut(np.repeat(matte[..., None], 3, 2), box, side_px)[..., 0].astype(np.float32) / 255,
            camera=camera,
        )


def fit_background(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """The gradient between four corner colours that most of the picture's upper border shows, fitted robustly."""
    height, width = picture.shape[:2]
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    basis = np.stack([np.ones_like(x), x, y, x * y], -1).reshape(-1, 4)
    colours = picture.reshape(-1, 3).astype(np.float64)
    border = (y < 0.08) | (((x < 0.08) | (x > 0.92)) & (y < 0.5))
    chosen = border.reshape(-1)
    fitted = np.zeros_like(colours)
    for _ in range(8):
        weights, *_ = np.linalg.lstsq(basis[chosen], colours[chosen], rcond=None)
        fitted = basis @ weights
        chosen = np.abs(fitted - colours).max(-1) < MATTE_THRESHOLD
    return fitted.clip(0, 255).round().astype(np.uint8).reshape(picture.shape)


def person_matte(picture: UInt8[np.ndarray, "h w 3"], background: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    """255 where a picture differs from its background, specks removed, holes filled, the edge softened."""
    difference = np.pad(np.abs(picture.astype(np.int16) - background).max(-1), 4, mode="edge")
    closed = binary_closing(binary_opening(difference > MATTE_THRESHOLD), iterations=2)
    solid = np.asarray(binary_fill_holes(closed), np.float32)[4:-4, 4:-4]
    return (255 * gaussian_filter(solid, 0.7)).round().astype(np.uint8)


def _novel_camera(truth: Truth, view: NovelView, frame: int) -> tuple[Camera, tuple[float, float, float, float]]:
    """The camera of the cut picture in the truth's head space, and the cut's left, top, right, bottom in pixels of the film."""
    angles = torch.tensor([math.radians(view.yaw_deg), math.radians(view.pitch_deg), 0.0], dtype=torch.float64)
    film2head = truth.cameras.cam2world[frame].double()
    cam2head = film2head @ torch.linalg.inv(truth.filming.cam2world.double()) @ look_at(angles)
    whole = Camera(cam2world=cam2head, intrinsics=truth.filming.intrinsics.double())
    centre = project(torch.tensor([HEAD_PIVOT], dtype=torch.float64), whole)[0]
    side = float(truth.filming.intrinsics[0, 0]) / CAMERA_FOCAL
    left, top = (float(value) - side / 2 for value in centre)
    principal = ((0.5 - left) / side, (0.5 - top) / side)
    camera = Camera(cam2world=cam2head.float(), intrinsics=intrinsics_matrix(CAMERA_FOCAL, principal))
    film = truth.film_side_px
    return camera, (film * left, film * top, film * (left + side), film * (top + side))


def _cut(picture: UInt8[np.ndarray, "h w 3"], box: tuple[float, float, float, float], side_px: int) -> UInt8[np.ndarray, "s s 3"]:
    """Cut a box out at `side_px`, averaged where it shrinks, edges repeated outside."""
    border = math.ceil(max(-min(box), box[2] - picture.shape[1], box[3] - picture.shape[0], 0)) + 1
    padded = Image.fromarray(np.pad(picture, ((border, border), (border, border), (0, 0)), mode="edge"))
    left, top, right, bottom = (value + border for value in box)
    return np.array(padded.resize((side_px, side_px), Image.Resampling.BICUBIC, box=(left, top, right, bottom)))


def _truth_in_crop(truth: Truth, track: FaceTrack, frames: Int[np.ndarray, " b"], crop_side_px: int) -> Float[Tensor, "b 27 2"]:
    """Where the true cameras put the cloud, in sides of the crop."""
    film = project(_cloud(len(frames)), _double(truth.cameras[torch.from_numpy(frames)])) * truth.film_side_px
    affine = torch.from_numpy(track.crop[frames])
    return (film @ affine[:, :, :2].mT + affine[:, None, :, 2]) / crop_side_px


def _similarity(values: np.ndarray) -> tuple[float, Float[Tensor, "3 3"], Float[Tensor, " 3"]]:
    return math.exp(values[0]), rotation_from_vector(torch.from_numpy(values[1:4])), torch.from_numpy(values[4:7])


def _double(camera: Camera) -> Camera:
    return Camera(cam2world=camera.cam2world.double(), intrinsics=camera.intrinsics.double())
