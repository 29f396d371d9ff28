"""Out of the film and back: square crops that follow the head, some frames cut wider, and the rendered head in the film again."""

import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from talk3d.errors import ConfigError
from talk3d.io.catalogue import sha256_of
from talk3d.io.clips import load_clip
from talk3d.io.media import VideoScan, read_frames, read_video, scan_video
from talk3d.ops.compositing import inner_matte, inverse, match_colours, paste, resample, soft_window
from talk3d.ops.geometry import CAMERA_FOCAL, HEAD_PIVOT
from talk3d.perception.headpose import HeadMotion
from talk3d.perception.nod import choose_views
from talk3d.perception.parsing import FaceParser, SelfieMatting, steady_mattes
from talk3d.perception.regions import OutlineParser
from talk3d.stages.acting import clip_index, performance_of
from talk3d.stages.viewpoints import ping_pong
from talk3d.types import WIDER, FaceMasks, FaceTrack, Progress, Rendering, WideViews

PERSON = 0.9
"""A pixel that is more than this a person's is compared at the seam."""


class Film:
    """The film that a clip was made from, whose frames get another head; it goes back and forth where the sound is longer."""

    def __init__(self, clip: Path, video: Path | None, fps: float, side: int) -> None:
        """Find the film and everything known of its frames.

        Args:
            clip: of the film, from `talk3d track`.
            video: the film, if it is not where it was when it was tracked.
            fps: frames a second wanted.
            side: of the rendered pictures, px.

        Raises:
            ConfigError: the film is not there, or is another one.
            MediaError: the clip cannot be read.
        """
        self.clip = load_clip(clip)
        path = video or Path(self.clip.source)
        if not path.is_file():
            raise ConfigError(f"the film of {clip} is not at {path} any more: give it with --source VIDEO")
        if sha256_of(path) != self.clip.source_sha256:
            raise ConfigError(f"{path} is not the film that {clip} was made from: give that one with --source VIDEO, or track this one")
        self.scan = scan_video(path, self.clip.fps)
        self.index, self.performance = clip_index(self.clip, fps), performance_of(self.clip, fps)
        self.start = int(self.clip.check.get("first_frame", 0))
        self.scale = side / self.clip.frames.shape[1]
        self.window = soft_window(side)

    def frames(self, first: int) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The film's own frames, without end, from one on."""

        def order() -> Iterator[int]:
            number = first
            while True:
                yield self.start + int(self.place(torch.tensor([number])))
                number += 1

        return read_frames(self.scan, order())

    def place(self, frames: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Numbers of the clip's frames that are shown at some frames."""
        return self.index[ping_pong(frames, len(self.index))]

    def put_back(self, frame: UInt8[np.ndarray, "h w 3"], number: int, rendering: Rendering) -> UInt8[np.ndarray, "h w 3"]:
        """Lay one rendered head into the film's frame."""
        place = int(self.place(torch.tensor([number])))
        crop = self.clip.track.crop[place] * self.scale
        alpha = rendering.alpha[0].clamp(0, 1).cpu()
        side = alpha.shape[-1]
        colour = (0.5 * (rendering.image[0].cpu() + 1) / alpha.clamp_min(1e-3)).clamp(0, 1)
        source = resample(torch.from_numpy(frame).permute(2, 0, 1).float() / 255, inverse(crop), (side, side))  # 3 s s
        person = torch.from_numpy(self.clip.masks.person[place].astype(np.float32) / 255)[None]
        person = resample(person, np.array([[1.0, 0, 0], [0, 1, 0]]) / self.scale, (side, side))
        shared = ((person > PERSON) & (alpha > PERSON)).float()
        return paste(frame, match_colours(colour, source, shared, self.window), inner_matte(alpha) * self.window, crop)


PICTURES = ("image", "alpha", "raw", "raw_alpha", "features", "depth")


def one_of(rendering: Rendering, number: int) -> Rendering:
    """One picture of a batch."""
    return replace(rendering, **{name: getattr(rendering, name)[number : number + 1] for name in PICTURES})


def crop_maps(motion: HeadMotion, size: tuple[int, int], crop_px: int) -> np.ndarray:
    """Source px to crop px: one scale for the clip, and shifts that keep the head's pivot in the middle; t 2 3, float64."""
    pivot = torch.tensor([HEAD_PIVOT], dtype=torch.float64)
    centre = motion.project(pivot, (size[0] / 2, size[1] / 2))[:, 0].numpy()
    side = motion.focal_px / CAMERA_FOCAL
    crop = np.zeros((len(centre), 2, 3))
    crop[:, 0, 0] = crop[:, 1, 1] = crop_px / side
    crop[:, :, 2] = (side / 2 - centre) * crop_px / side
    return crop


def write_crops(
    scan: VideoScan,
    start: int,
    crop: np.ndarray,
    face_track: FaceTrack,
    num_training: int,
    crop_px: int,
    parser: FaceParser | None,
    progress: Progress,
) -> tuple[np.ndarray, FaceMasks, WideViews | None]:
    """Crops, mattes and parts of all frames, in nameless files on disk that vanish with the arrays, and wide views of the training part.

    Args:
        scan: of the video.
        start: its frame with which the clip begins.
        crop: map of every frame, t 2 3.
        face_track: of the frames, as far as it is known.
        num_training: frames for training, the first ones.
        crop_px: side of the crops.
        parser: of the parts of the face; None goes by face points and colours.
        progress: hears of every frame.
    """
    landmarks = face_track.landmarks.numpy()
    wide = WideCuts(choose_views(face_track.head_pose[:num_training]), crop, crop_px)
    matting, outlines = SelfieMatting(), OutlineParser()
    shape = (len(crop), crop_px, crop_px)
    waiting: deque[np.ndarray] = deque()  # the mattes come a frame late: they are the median of three
    with tempfile.TemporaryFile() as frames_file, tempfile.TemporaryFile() as mattes_file, tempfile.TemporaryFile() as parts_file:

        def mattes() -> Iterator[np.ndarray]:
            for index, frame in enumerate(islice(read_video(scan.path, scan=scan), start, start + len(crop))):
                picture = crop_picture(frame, crop[index], crop_px)
                frames_file.write(picture.tobytes())
                waiting.append(picture)
                wide.put(index, frame, matting)
                progress("crops", index + 1, len(crop), {})
                yield matting(picture)

        for index, matte in enumerate(steady_mattes(_ahead(mattes()))):
            mattes_file.write(matte.tobytes())
            picture = waiting.popleft()
            parts_file.write((parser(picture) if parser else outlines(picture, matte, landmarks[index])).tobytes())
        source = f"{matting.source}; {(parser or outlines).source}"
        masks = FaceMasks(person=_mapped(mattes_file, shape), parts=_mapped(parts_file, shape), source=source)
        return _mapped(frames_file, (*shape, 3)), masks, wide.views()


def _ahead(items: Iterator[np.ndarray], most: int = 8) -> Iterator[np.ndarray]:
    """The same items, of which a thread of its own makes so many before they are asked for."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, items, None) for _ in range(most))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item


class WideCuts:
    """Wide views, cut as the frames go by."""

    def __init__(self, frames: Int[Tensor, " k"], crop: np.ndarray, crop_px: int) -> None:
        self.frames, self.crop, self.crop_px = frames, crop / WIDER, crop_px
        self.crop[:, :, 2] += (1 - 1 / WIDER) * crop_px / 2
        self.pictures: list[np.ndarray] = []
        self.mattes: list[np.ndarray] = []
        self.beyond: list[np.ndarray] = []

    def put(self, index: int, frame: UInt8[np.ndarray, "h w 3"], matting: SelfieMatting) -> None:
        """Cut this frame if it is one of those chosen."""
        if index not in self.frames:
            return
        picture = crop_picture(frame, self.crop[index], self.crop_px)
        places = np.arange(self.crop_px) + 0.5
        cropped = np.abs(places - self.crop_px / 2) < self.crop_px / (2 * WIDER)
        scale, shift = self.crop[index, 0, 0], self.crop[index, :, 2]
        filmed = [(places > offset) & (places < offset + scale * side) for offset, side in zip(shift, frame.shape[1::-1], strict=True)]
        self.pictures.append(picture)
        self.mattes += steady_mattes([matting(picture)])
        self.beyond.append(filmed[1][:, None] & filmed[0] & ~(cropped[:, None] & cropped))

    def views(self) -> WideViews | None:
        """Return what was cut, if it shows anything beyond the crops."""
        if not np.any(self.beyond):
            return None
        pictures, mattes, beyond = (np.stack(cut) for cut in (self.pictures, self.mattes, self.beyond))
        return WideViews(frames=self.frames, pictures=pictures, mattes=mattes, beyond=beyond)


def _mapped(file: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of a file as an array that is read from disk when it is looked at."""
    file.flush()
    return np.memmap(file, np.uint8, "r", shape=shape)


def crop_picture(frame: np.ndarray, crop: np.ndarray, crop_px: int) -> np.ndarray:
    """Cut the square of a crop map out of a frame, anti-aliased; beyond the frame its edge is repeated."""
    scale = crop[0, 0]
    side = crop_px / scale
    left, top = -crop[0, 2] / scale, -crop[1, 2] / scale
    height, width = frame.shape[:2]
    margins = [int(max(np.ceil(value), 0)) for value in (-top, top + side - height, -left, left + side - width)]
    if any(margins):
        frame = np.pad(frame, ((margins[0], margins[1]), (margins[2], margins[3]), (0, 0)), mode="edge")
        left, top = left + margins[2], top + margins[0]
    picture = Image.fromarray(frame).resize((crop_px, crop_px), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(picture)
