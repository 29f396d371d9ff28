"""From where an avatar is seen: cameras for any frame number, and the views that it is good for.

Every camera is a function of the frame's number, so that films can be long, cut and gone on with.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from talk3d.errors import ConfigError
from talk3d.ops.geometry import HEAD_PIVOT, SPINE_TOP, framed, head_camera, orbit, view_angles, view_rotation
from talk3d.types import WIDER, Camera

logger = logging.getLogger(__name__)

VERIFIED_DEG = ((-35.0, 35.0), (-18.0, 18.0), (-15.0, 15.0))
"""Yaw, pitch and roll at which avatars of the builtin prior were compared with films from there."""
KNEE_DEG = 5.0
"""A view beyond the range never gets further out of it than this."""
ZOOMS = (0.25, 4.0)
KEY_FIELDS = {"time_s": None, "yaw_deg": 0.0, "pitch_deg": 0.0, "roll_deg": 0.0, "zoom": 1.0}
"""What a key of a camera path may say, and what it says by itself."""


@dataclass(frozen=True, kw_only=True)
class CameraConfig:
    """From where the avatar is seen."""

    camera: Literal["tracked", "fixed", "orbit", "path"] = "tracked"
    """The camera of the training video, back and forth; one that stands still, one that swings from side to side, or one that follows a path."""
    yaw_deg: float = 0.0
    """Of the fixed camera; positive moves it to the head's left."""
    pitch_deg: float = 0.0
    """Of the fixed camera; positive moves it up."""
    roll_deg: float = 0.0
    """Of the fixed camera, about its own axis."""
    zoom: float = 1.0
    """Of the fixed and the swinging camera; 2 shows the head twice as large."""
    orbit_yaw_deg: float = 25.0
    """Largest turn of the swinging camera to either side."""
    orbit_pitch_deg: float = 8.0
    """How far the swinging camera moves up and down altogether."""
    orbit_period_s: float = 4.0
    """Seconds until the swing repeats."""
    camera_path: Path | None = None
    """JSON, a list of keys like {"time_s": 2, "yaw_deg": 20, "pitch_deg": 0, "roll_deg": 0, "zoom": 1.2}, smoothly joined; the last one holds."""
    view_limit: bool = True
    """Keep the camera where the avatar is known to look well: views beyond fade to the nearest such one."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        if not self.orbit_period_s > 0:
            raise ConfigError(f"animate needs a positive orbit period, got {self.orbit_period_s} s: leave --orbit-period-s out")
        check_view({"yaw_deg": self.yaw_deg, "pitch_deg": self.pitch_deg, "roll_deg": self.roll_deg, "zoom": self.zoom}, "the camera")
        check_view({"yaw_deg": self.orbit_yaw_deg, "pitch_deg": self.orbit_pitch_deg}, "the orbit")
        for name in ("yaw_deg", "pitch_deg", "roll_deg"):
            if getattr(self, name) and self.camera != "fixed":
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} is of the fixed camera, got --camera {self.camera}: give --camera fixed too, or leave --{flag} out")
        if self.zoom != 1 and self.camera in ("tracked", "path"):
            raise ConfigError(f"--zoom is of the fixed and the swinging camera, got --camera {self.camera}: give --camera fixed, or leave it out")
        if (self.camera == "path") != (self.camera_path is not None):
            raise ConfigError("a camera path needs both --camera path and --camera-path FILE.json: give both, or neither")


def check_view(values: Mapping[str, float], what: str) -> None:
    """Refuse views that show no face.

    Raises:
        ConfigError: an angle of 90 degrees or more, a roll of more than 180, a zoom beyond a quarter or four, or something that is no number.
    """
    for name, value in values.items():
        low, high = ZOOMS if name == "zoom" else (-180.0, 180.0) if name == "roll_deg" else (-89.0, 89.0)
        if name != "time_s" and not low <= value <= high:
            beyond = "" if name == "zoom" else ", the face is not seen from elsewhere"
            raise ConfigError(f"{what} has a {name} of {value:g}: give a number from {low:g} to {high:g}{beyond}")


def read_camera_path(path: Path) -> PchipInterpolator:
    """Read a camera path: a function of seconds that returns yaw, pitch and roll in degrees and zoom.

    Raises:
        ConfigError: no such file, no list of keys, or a key that cannot be used.
    """
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no camera path ({error}): give a JSON list of keys with time_s, yaw_deg, pitch_deg, roll_deg, zoom") from error
    if not isinstance(keys, list) or not keys or not all(isinstance(key, dict) for key in keys):
        raise ConfigError(
            f'{path} is no camera path: give a JSON list of keys such as [{{"time_s": 0, "yaw_deg": 0}}, {{"time_s": 2, "yaw_deg": 20}}]'
        )
    rows = [_key(key, f"key {number} of {path}") for number, key in enumerate(keys, 1)]
    table = np.array(rows if len(rows) > 1 else [*rows, [rows[0][0] + 1, *rows[0][1:]]])
    if not (np.diff(table[:, 0]) > 0).all():
        raise ConfigError(f"the times of {path} do not grow from key to key: put the keys in order")
    return PchipInterpolator(table[:, 0], table[:, 1:])


def _key(key: Mapping[str, Any], where: str) -> list[float]:
    """The numbers of a key, in the order of `KEY_FIELDS`."""
    values = KEY_FIELDS | dict(key)
    if values.keys() != KEY_FIELDS.keys():
        raise ConfigError(f"{where} has {', '.join(sorted(values.keys() - KEY_FIELDS.keys()))}: a key knows {', '.join(KEY_FIELDS)}")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values.values()):
        raise ConfigError(f"{where} lacks time_s or has something that is no number: give numbers")
    check_view(values, where)
    return [float(values[name]) for name in KEY_FIELDS]


class Viewpoints:
    """The camera of any frame."""

    def __init__(self, config: CameraConfig, fps: float, filmed: Camera, given: Camera | None = None) -> None:
        """Choose where cameras come from.

        Args:
            config: the kind of camera.
            fps: frames a second.
            filmed: of the training video, or of another performance.
            given: in place of the config's; goes back and forth.

        Raises:
            ConfigError: the camera path cannot be used, or `given` is empty.
        """
        if given is not None and (given.cam2world.ndim != 3 or not len(given)):
            raise ConfigError(f"cameras has no camera per frame (cam2world {tuple(given.cam2world.shape)}): give (t, 4, 4), or leave it out")
        self.fps, self.config = fps, config
        self.follows = given is None and config.camera == "tracked"
        """Whether the camera is that of the performance, and moves with it."""
        self.listed = given if given is not None else filmed if self.follows else None
        self.path = read_camera_path(config.camera_path) if given is None and config.camera_path is not None else None
        self.swing: Camera | None = None
        if config.camera == "orbit":
            period = max(1, round(config.orbit_period_s * fps))
            self.swing = zoomed(orbit(period, yaw_deg=config.orbit_yaw_deg, pitch_deg=config.orbit_pitch_deg, period_frames=period), config.zoom)
        least = config.zoom if self.path is None else float(self.path(self.path.x)[:, 3].min())
        if self.listed is None and least < 1 / WIDER:
            logger.warning("a zoom of %g shows what no training picture did: below %.2f shoulders and clothes end in tatters", least, 1 / WIDER)

    def at(self, frames: Int[Tensor, " b"]) -> Camera:
        """Return the cameras of these frames, on the CPU."""
        if self.listed is not None:
            return self.listed[ping_pong(frames, len(self.listed)).to(self.listed.cam2world.device)].to("cpu")
        if self.path is not None:
            table = self.path(np.clip(frames.double().numpy() / self.fps, self.path.x[0], self.path.x[-1]))
            values = torch.from_numpy(table).float()
            return zoomed(head_camera(values[:, :3].deg2rad()), values[:, 3])
        if self.swing is not None:
            return self.swing[frames % len(self.swing)]
        config = self.config
        angles = torch.tensor([config.yaw_deg, config.pitch_deg, config.roll_deg]).deg2rad()
        return zoomed(head_camera(angles.expand(len(frames), 3)), config.zoom)

    def framed(self, camera: Camera) -> Camera:
        """Return cameras as they are where a film or the caller listed them, else with the head in the middle of the picture."""
        return camera if self.listed is not None else framed(camera)


def ping_pong(frames: Int[Tensor, " b"], length: int) -> Int[Tensor, " b"]:
    """Fold frame numbers into 0 … length - 1, back and forth, with the ends shown once: 0 1 2 1 0 1 2."""
    period = max(2 * (length - 1), 1)
    folded = frames % period
    return torch.minimum(folded, period - folded) if length > 1 else torch.zeros_like(frames)


def zoomed(camera: Camera, zoom: float | Float[Tensor, " b"]) -> Camera:
    """The same cameras with focal lengths that show things `zoom` times as large."""
    factor = torch.as_tensor(zoom, dtype=camera.intrinsics.dtype).reshape(-1, 1, 1) * torch.ones(3, 3)
    factor[:, :, 2] = 1
    return Camera(cam2world=camera.cam2world, intrinsics=camera.intrinsics * factor)


def turned(camera: Camera, turn: Float[Tensor, "b 3"]) -> Camera:
    """Cameras moved round the head by yaw, pitch and roll in radians, as if the head had turned the other way, shoulders and all."""
    angles = view_angles(camera.cam2world[:, :3, :3])
    return _moved(camera, view_rotation(angles + turn) @ view_rotation(angles).mT, HEAD_PIVOT)


def held(camera: Camera, head_pose: Float[Tensor, "b 3"], turn: Float[Tensor, "b 3"]) -> Camera:
    """Cameras that see a head come to this pose by this turn on its spine, where these see it before; its shoulders keep still before them."""
    return _moved(camera, view_rotation(head_pose) @ view_rotation(head_pose - turn).mT, SPINE_TOP)


def _moved(camera: Camera, move: Float[Tensor, "b 3 3"], pivot: tuple[float, float, float]) -> Camera:
    centre = torch.tensor(pivot)
    moved = camera.cam2world.clone()
    moved[:, :3, :3] = move @ camera.cam2world[:, :3, :3]
    moved[:, :3, 3] = centre + (move @ (camera.cam2world[:, :3, 3] - centre)[..., None])[..., 0]
    return Camera(cam2world=moved, intrinsics=camera.intrinsics)


def trained_views(cameras: Camera) -> dict[str, list[float]]:
    """The range of yaw, pitch and roll of some cameras in degrees, as an avatar's provenance keeps it under `views`."""
    angles = view_angles(cameras.cam2world[:, :3, :3]).rad2deg()
    names = ("yaw_deg", "pitch_deg", "roll_deg")
    return {name: [float(angles[:, axis].min()), float(angles[:, axis].max())] for axis, name in enumerate(names)}


class ViewLimit:
    """Keeps cameras where an avatar is known to look well: what it was trained on and what its prior was verified for."""

    def __init__(self, cameras: Camera, provenance: Mapping[str, Any]) -> None:
        """Find the range.

        Args:
            cameras: of the avatar's own performance.
            provenance: of the avatar; older ones lack `views`, which then come from the cameras.
        """
        views = provenance.get("views") or trained_views(cameras)
        ranges = [views[name] for name in ("yaw_deg", "pitch_deg", "roll_deg")]
        self.low = torch.tensor([min(seen[0], known[0]) for seen, known in zip(ranges, VERIFIED_DEG, strict=True)])
        self.high = torch.tensor([max(seen[1], known[1]) for seen, known in zip(ranges, VERIFIED_DEG, strict=True)])
        self.warned = False

    def __call__(self, camera: Camera, *, quiet: bool = False) -> Camera:
        """Return the cameras, those outside moved to about the nearest good view; says so once, unless it should be quiet."""
        angles = view_angles(camera.cam2world[:, :3, :3]).rad2deg()
        excess = (angles - self.high).clamp_min(0) - (self.low - angles).clamp_min(0)
        if not bool((excess.abs() > 1e-3).any()):
            return camera
        if not self.warned and not quiet:
            self.warned = True
            spans = ", ".join(
                f"{name} {low:.0f} to {high:.0f}" for name, low, high in zip(("yaw", "pitch", "roll"), self.low, self.high, strict=True)
            )
            logger.warning(
                "the avatar is known to look well at %s degrees; views beyond fade to the nearest such one (--no-view-limit shows them)", spans
            )
        kept = excess.sign() * KNEE_DEG * (1 - torch.exp(-excess.abs() / KNEE_DEG))
        outside = (excess.abs() > 1e-3).any(-1)
        limited = turned(camera, (kept - excess).deg2rad())
        return Camera(cam2world=torch.where(outside[:, None, None], limited.cam2world, camera.cam2world), intrinsics=camera.intrinsics)
