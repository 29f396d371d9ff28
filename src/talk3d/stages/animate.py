"""Animate: sound in, frames of the talking avatar out, one small batch at a time, for as long as the sound lasts.

Every frame is a function of its number, the settings and the sound round it: it does not matter how the sound was cut, or where a film went on.
"""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError
from torch import Tensor

from talk3d import __version__
from talk3d.errors import ConfigError, MediaError
from talk3d.io.catalogue import sha256_of
from talk3d.io.media import sound_length_s, stream_audio
from talk3d.io.writing import SEGMENT_FRAMES, FilmWriter, encoding_for
from talk3d.models.avatar import Avatar
from talk3d.perception.listening import Heard, check_sound, count_frames, listen
from talk3d.perception.speech import SAMPLE_RATE_HZ, SpeechEncoder, load_speech_of
from talk3d.stages.acting import ActingConfig, Actor, read_performer
from talk3d.stages.pasting import Film, one_of
from talk3d.stages.viewpoints import CameraConfig, ViewLimit, Viewpoints, held
from talk3d.types import Camera, Driving, Progress, Rendering, Waveform, silent

logger = logging.getLogger(__name__)

SOUND_HZ = 44100
"""Sample rate of the sound in written videos."""
LEVELS = {"white": 1.0, "grey": 0.5, "black": 0.0}
BLUR = 0.03
"""Standard deviation of the blurred background, in sides of the picture."""

Sound = Waveform | Path | str | Iterable[Waveform]
"""16 kHz mono, a file with sound, or 16 kHz mono that comes in chunks."""


@dataclass(frozen=True, kw_only=True)
class AnimateConfig(CameraConfig, ActingConfig):
    """From where the avatar is seen, before what, and what it does beside speaking."""

    background: str = "plate"
    """`plate`, what was behind the person in the training video; `blurred`, the same out of focus; white, grey, black, #rrggbb, an image, or
    `transparent`."""
    paste_into: Path | None = None
    """A clip of `talk3d track`: the head is put back into the film that it was made from, whose camera, head motion and blinks are followed."""
    source: Path | None = None
    """That film, if it is not where it was when it was tracked."""
    voice_activity: bool = True
    """Let the mouth rest where nobody speaks: in hum, noise, clicks and silence."""
    level_db: float | None = None
    """Loudness of the speech's loudest bands (full scale 0; about -35 for ordinary speech) for live sound: frames come 0.9 s after their sound,
    not 13 s."""
    lossless: bool = False
    """Write every pixel as it was rendered: H.264 of RGB, which few players show, in .mp4, .mov or .mkv."""
    compile: bool = False
    """On a GPU, compile the model for it: the first frame takes a minute longer, the others about 0.6 of their time."""
    batch_size: int | None = None
    """Frames in one pass of the model; None takes 1 on a CPU, whose cores take a frame each, and 4 on a GPU. It changes speed, not the frames."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        CameraConfig.__post_init__(self)
        ActingConfig.__post_init__(self)
        if self.paste_into is not None and (self.camera != "tracked" or self.background != "plate" or self.performer is not None):
            raise ConfigError("a head in a film has the film's camera, motion and background: leave --camera, --performer and --background out")
        if self.source is not None and self.paste_into is None:
            raise ConfigError("--source is the film of --paste-into, got no --paste-into: give --paste-into CLIP too, or leave --source out")
        if self.level_db is not None and not self.level_db <= 0:
            raise ConfigError(f"level_db is {self.level_db:g}, above full scale, which is 0: give about -35 for ordinary speech")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"animate renders at least 1 frame at once, got {self.batch_size}: give a positive number")


def animate(
    avatar: Avatar,
    audio: Sound,
    cameras: Camera | None = None,
    config: AnimateConfig | None = None,
    *,
    device: str = "cpu",
    first: int = 0,
) -> Iterator[UInt8[np.ndarray, "h w c"]]:
    """Yield RGB frames of the avatar speaking (RGBA where the background is transparent), at its frame rate, as soon as enough sound is there.

    There are as many frames as fit the sound, at least one. Memory does not grow with the sound, and the frames are the same however it is cut.
    With the builtin speech features, the sound is heard 13 s ahead, with `level_db` 0.9 s; with other ones, all of it is.
    Where the sound outlasts the training video, the person's performance (for the tracked camera its motion and the blinks) goes back and forth.

    Args:
        avatar: who speaks; moved to `device`.
        audio: what is said: 16 kHz mono, a file with sound, or an iterable of chunks of 16 kHz mono.
        cameras: one per frame, in place of the config's; goes back and forth if there are fewer.
        config: from where the avatar is seen, before what, and what it does.
        device: where to render.
        first: begin with this frame.

    Raises:
        MediaError: the sound is empty, not finite, or cannot be read.
        ConfigError: the sound's rate is not 16 kHz, the avatar listens to features that cannot be made here, or a setting cannot be used.
        WeightsError: the weights of the avatar's speech encoder are not there.
    """
    config = config or AnimateConfig()
    chunks = _chunks(audio)
    return _spoken(_scene(avatar, config, cameras, device), chunks, first)


def batch_size_on(device: str, config: AnimateConfig) -> int:
    """Say how many frames go through the model at once."""
    return config.batch_size or (1 if torch.device(device).type == "cpu" else 4)


def write_animation(
    avatar: Avatar,
    audio: Waveform | Path | str,
    path: str | Path,
    config: AnimateConfig | None = None,
    *,
    cameras: Camera | None = None,
    device: str = "cpu",
    progress: Progress = silent,
    resume: bool = False,
) -> int:
    """Write a video of the avatar speaking, with the sound, and return its number of frames; the file appears only when it is whole.

    Args:
        avatar: who speaks.
        audio: what is said: 16 kHz mono, or a file with sound, whose own quality is kept.
        path: ends in .mp4, .m4v, .mov, .mkv or .webm; without an ending, a folder of PNG pictures without sound.
        config: from where the avatar is seen, before what, and what it does.
        cameras: see `animate`.
        device: where to render.
        progress: hears every frame.
        resume: go on with an interrupted film of the same avatar, sound and settings.

    Raises:
        MediaError: the sound cannot be used, or the file cannot be written.
        ConfigError: see `animate`; or there is an interrupted film that was made from something else.
    """
    config, path = config or AnimateConfig(), Path(path)
    transparent = config.background == "transparent"
    encoding = encoding_for(path, transparent=transparent, lossless=config.lossless) if path.suffix else None
    batch = batch_size_on(device, config)
    segment = -(-SEGMENT_FRAMES // batch) * batch  # so that batches are the same wherever a film is gone on with
    key = _key(avatar, audio, config, cameras, device)
    length = len(audio.samples) if isinstance(audio, Waveform) else round(sound_length_s(audio) * SAMPLE_RATE_HZ)
    total = count_frames(length, avatar.fps) if length else 0
    chunks, scene = _chunks(audio), _scene(avatar, config, cameras, device)  # they refuse what is unfit before anything is written
    with FilmWriter(path, fps=avatar.fps, encoding=encoding, key=key, segment_frames=segment, resume=resume) as film:
        for frame in _spoken(scene, chunks, film.num_frames):
            film.write(frame)
            progress("animate", film.num_frames, max(total, film.num_frames) if total else 0, {})
        film.finish(*(([audio], audio.sample_rate_hz) if isinstance(audio, Waveform) else (stream_audio(audio, SOUND_HZ), SOUND_HZ)))
        return film.num_frames


class Scene:
    """Renders any frames: who acts how, from where it is seen, and what is behind."""

    def __init__(self, avatar: Avatar, config: AnimateConfig, cameras: Camera | None, encoder: SpeechEncoder, device: str) -> None:
        """Prepare to render.

        Args:
            avatar: who speaks, on the device.
            config: everything that can be chosen.
            cameras: in place of the config's.
            encoder: what the avatar listens with.
            device: where to render.
        """
        if config.compile and torch.device(device).type == "cpu":
            raise ConfigError("compiling pays on a GPU alone, got the CPU: leave --compile out, or give --device cuda")
        own, rest = avatar.performance, _silence(encoder, avatar.fps) if config.expression != 1 else None
        self.avatar, self.config, self.device, self.encoder = avatar, config, device, encoder
        self.model = avatar.bake(rest=rest, expression=config.expression, compiled=config.compile)
        self.film = None if config.paste_into is None else Film(config.paste_into, config.source, avatar.fps, avatar.resolution)
        if self.film is not None and not avatar.is_of(self.film.clip.source_sha256):
            logger.warning("%s is of another film than the avatar: it gets the avatar's head; see that whoever is in it agrees", config.paste_into)
        self.shown: Iterator[UInt8[np.ndarray, "h w 3"]] = iter(())
        performed, blink = (None, None) if config.performer is None else read_performer(config.performer, avatar.fps)
        performed = self.film.performance if self.film else performed
        self.views = Viewpoints(config, avatar.fps, (performed or own).cameras, cameras)
        self.actor = Actor(config, own, avatar.fps, performed=performed, blink=blink, follows=self.views.follows)
        self.limit = ViewLimit(own.cameras.to("cpu"), avatar.provenance) if config.view_limit and not self.film else None
        self.backdrop = None if config.background == "transparent" else _backdrop(config.background, avatar).to(device)

    def begin(self, first: int) -> None:
        """Say which frame will be finished first; the others follow."""
        if self.film:
            self.shown = self.film.frames(first)

    @torch.no_grad()
    def pictures(self, heard: Heard) -> Rendering | UInt8[np.ndarray, "b H W c"]:
        """Return pictures of these frames, or what is to be put into the film; any batch, in any order, from any thread."""
        rendering = self.render(heard)
        if self.film:
            return rendering
        return _cut_out(rendering) if self.backdrop is None else to_uint8(composite(rendering, self.backdrop[None]))

    def finished(self, heard: Heard, made: Rendering | UInt8[np.ndarray, "b H W c"]) -> Iterator[UInt8[np.ndarray, "h w c"]]:
        """Yield the frames of one batch after the other: the film, if there is one, is decoded as it goes."""
        if isinstance(made, np.ndarray):
            yield from made
            return
        assert self.film
        for place, number in enumerate(heard[0].tolist()):
            yield self.film.put_back(next(self.shown), number, one_of(made, place))

    def render(self, heard: Heard) -> Rendering:
        """Render these frames; the only place where the model is called."""
        frames, audio = heard
        acts = self.actor.at(frames)
        camera = self.views.at(frames)
        still = self._limited(camera)
        moved = self._limited(held(camera, acts.head_pose, acts.turn), quiet=True) if bool(acts.turn.any()) else still
        camera = Camera(cam2world=moved.cam2world, intrinsics=self.views.framed(still).intrinsics).to(self.device)  # a head moves in the picture
        driving = Driving(audio=audio, blink=acts.blink, head_pose=acts.head_pose, anchors=acts.anchors, upper_face=acts.upper_face)
        return self.model.render(driving.to(self.device), camera)

    def _limited(self, camera: Camera, *, quiet: bool = False) -> Camera:
        return self.limit(camera, quiet=quiet) if self.limit else camera


def composite(rendering: Rendering, background: Float[Tensor, "#b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
    """Lay a rendering over a background; all in [0, 1] but the rendering's own picture."""
    return (0.5 * (rendering.image + 1) + (1 - rendering.alpha) * background).clamp(0, 1)


def to_uint8(pictures: Float[Tensor, "b c h w"]) -> UInt8[np.ndarray, "b h w c"]:
    """Turn pictures in [0, 1] into 0..255."""
    return (255 * pictures + 0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # b h w c


def _cut_out(rendering: Rendering) -> UInt8[np.ndarray, "b h w 4"]:
    """RGBA, straight: colours are not multiplied by the opacity."""
    alpha = rendering.alpha.clamp(0, 1)
    colour = 0.5 * (rendering.image + 1) / alpha.clamp_min(1e-3)
    return to_uint8(torch.cat([colour.clamp(0, 1), alpha], 1))


def _backdrop(background: str, avatar: Avatar) -> Float[Tensor, "3 h w"]:
    """What is behind the person, in [0, 1]."""
    side = avatar.resolution
    if background in LEVELS:
        return torch.full((3, side, side), LEVELS[background])
    if background == "plate":
        return 0.5 * (avatar.background + 1)
    if background == "blurred":
        plate = Image.fromarray(to_uint8(0.5 * (avatar.background[None] + 1))[0])
        return _to_float(plate.filter(ImageFilter.GaussianBlur(BLUR * side)))
    if background.startswith("#"):
        try:
            colour = torch.tensor([int(background[place : place + 2], 16) for place in (1, 3, 5)]) / 255
        except ValueError:
            colour = torch.zeros(0)
        if len(background) != 7 or len(colour) != 3:
            raise ConfigError(f"{background} is no colour: give six hexadecimal digits, such as #1e90ff")
        return colour[:, None, None].expand(3, side, side).contiguous()
    try:
        picture = ImageOps.exif_transpose(Image.open(background)).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        known = f"plate, blurred, {', '.join(LEVELS)}, transparent, #rrggbb or an image"
        raise ConfigError(f"the background {background} is no picture that can be read: give {known}") from error
    return _to_float(ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS))


def _to_float(picture: Image.Image) -> Float[Tensor, "3 h w"]:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255  # 3 h w


def _silence(encoder: SpeechEncoder, fps: float) -> Float[Tensor, "f w"]:
    """What the avatar hears when nobody speaks."""
    sound = Waveform(samples=torch.zeros(2 * SAMPLE_RATE_HZ), sample_rate_hz=SAMPLE_RATE_HZ)
    total = count_frames(len(sound.samples), fps)
    return encoder(sound, total, fps, total // 2, total // 2 + 1).values[0]


def _chunks(audio: Sound) -> Iterator[Waveform]:
    """The sound in chunks; what is given whole is looked at now, so that it is refused before anything else is done."""
    if isinstance(audio, Waveform):
        check_sound(audio)
        if not audio.samples.numel():
            raise MediaError("the sound is empty: give at least a fraction of a second of it")
        return iter([audio])
    if not isinstance(audio, Path | str):
        return iter(audio)
    pieces = stream_audio(audio)
    return chain([next(pieces)], pieces)


def _batches(heard: Iterator[Heard], size: int, first: int) -> Iterator[Heard]:
    """Cut blocks into batches whose first frames are multiples of `size`, from frame `first` on."""
    frames, windows = torch.zeros(0, dtype=torch.long), None
    for more, audio in heard:
        frames, windows = torch.cat([frames, more]), audio if windows is None else torch.cat([windows, audio])
        skipped = int((frames < first).sum())
        frames, windows = frames[skipped:], windows[skipped:]
        while len(frames) >= size:
            yield frames[:size], windows[:size]
            frames, windows = frames[size:], windows[size:]
    if windows is not None and len(frames):
        yield frames, windows


def _scene(avatar: Avatar, config: AnimateConfig, cameras: Camera | None, device: str) -> Scene:
    if cameras is not None and config.paste_into is not None:
        raise ConfigError("a head in a film has the film's camera: leave cameras out, or do not paste")
    with _one_thread():
        return Scene(avatar.to(device).eval(), config, cameras, load_speech_of(avatar.audio_source, device), device)


def _spoken(scene: Scene, chunks: Iterator[Waveform], first: int) -> Iterator[UInt8[np.ndarray, "h w c"]]:
    """Frames of the avatar saying this, from one on."""
    scene.begin(first)
    config, fps = scene.config, scene.avatar.fps
    heard = listen(chunks, scene.encoder, fps, level_db=config.level_db, voice_activity=config.voice_activity, first=first)
    return _frames(scene, _batches(heard, batch_size_on(scene.device, config), first))


def _frames(scene: Scene, batches: Iterator[Heard]) -> Iterator[UInt8[np.ndarray, "h w c"]]:
    """Frames in their order. On a CPU each thread renders a batch of its own: two threads at one frame would mostly wait for each other."""
    if torch.device(scene.device).type != "cpu":
        for batch in batches:
            yield from scene.finished(batch, scene.pictures(batch))
        return
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting: deque[tuple[Heard, Future]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(scene.pictures, batch)))
                while len(waiting) > threads or (waiting and waiting[0][1].done()):  # live sound may pause: what is ready does not wait for it
                    yield from _next_finished(scene, waiting)
            while waiting:
                yield from _next_finished(scene, waiting)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Do small things on one thread of the CPU: on a busy machine, several would wait for each other, actively, for seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _next_finished(scene: Scene, waiting: "deque[tuple[Heard, Future]]") -> Iterator[UInt8[np.ndarray, "h w c"]]:
    batch, made = waiting.popleft()
    yield from scene.finished(batch, made.result())


def _key(avatar: Avatar, audio: Waveform | Path | str, config: AnimateConfig, cameras: Camera | None, device: str) -> str:
    """A fingerprint of everything that a film is made from."""
    clips = [path / "track.safetensors" for path in (config.performer, config.paste_into) if path is not None]
    chosen = (config.performer, config.camera_path, Path(config.background), config.source)
    files = [path for path in (*chosen, *clips) if path is not None and path.is_file()]
    facts = [__version__, device, asdict(config), avatar.fps, avatar.audio_source, avatar.provenance.get("views")]
    digest = hashlib.sha256(json.dumps(facts, default=str).encode())
    parts = [*avatar.state_dict().values(), *([] if cameras is None else [cameras.to_label()])]
    for tensor in [*parts, *([audio.samples] if isinstance(audio, Waveform) else [])]:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for path in [*files, *([] if isinstance(audio, Waveform) else [Path(audio)])]:
        digest.update(sha256_of(path).encode())
    return digest.hexdigest()
