"""An avatar whose pictures are known in closed form, so that what stands round the model can be tested by value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from talk3d.errors import WeightsError
from talk3d.models.avatar import Avatar, Performance, PersonalizedGenerator, Prior
from talk3d.models.generator import TriplaneGenerator
from talk3d.ops.geometry import head_camera
from talk3d.perception.landmarks import RegistryFaceModel
from talk3d.presets import TINY, TINY_AVATAR
from talk3d.types import AudioFeatures, Camera, Clip, Driving, FaceMasks, FaceTrack, Rendering, Waveform

NUM_PERFORMED = 5
"""Frames of its performance."""
SIDE = 8


class KnownAvatar(Avatar):
    """Shows its inputs as colours and remembers them: red is the audio's mean, green the blink, blue the camera's yaw."""

    def __init__(self, side: int = SIDE, alpha: float = 1.0, audio_source: str = "logmel64") -> None:
        nn.Module.__init__(self)
        count = torch.arange(NUM_PERFORMED, dtype=torch.float32)
        self.side, self.audio_source, self.fps, self.provenance = side, audio_source, 25.0, {}
        self.background = torch.full((3, side, side), 0.5)
        self.performance = Performance(
            cameras=head_camera(torch.stack([0.1 * count, 0 * count, 0 * count], -1)),
            blink=count[:, None] / 10,
            head_pose=count[:, None].repeat(1, 3),
            anchors=count[:, None].repeat(1, 6),
            upper_face=count[:, None].repeat(1, 5),
        )
        self.alpha = alpha
        self.seen: list[tuple[Driving, Camera]] = []

    @property
    def resolution(self) -> int:
        return self.side

    def train(self, mode: bool = True) -> "KnownAvatar":
        self.training = mode
        return self

    def bake(self, **_: object) -> "KnownAvatar":
        return self

    def render(self, driving: Driving, camera: Camera) -> Rendering:
        self.seen.append((driving, camera))
        yaw = torch.atan2(camera.cam2world[:, 0, 3], camera.cam2world[:, 2, 3])
        colour = torch.stack([0.5 * driving.audio.mean((1, 2, 3)) + 0.5, driving.blink[:, 0], yaw.clamp(0, 1)], 1)
        image = colour[:, :, None, None].expand(-1, -1, self.resolution, self.resolution)
        matte = torch.full_like(image[:, :1], self.alpha)
        image = 2 * self.alpha * image - 1
        return Rendering(image=image, alpha=matte, raw=image, raw_alpha=matte, features=image, depth=matte)

    @property
    def driven(self) -> Driving:
        """Everything it was driven by, in order."""
        parts = [driving for driving, _ in self.seen]
        return Driving(
            audio=torch.cat([part.audio for part in parts]),
            blink=torch.cat([part.blink for part in parts]),
            head_pose=torch.cat([part.head_pose for part in parts]),
            anchors=torch.cat([part.anchors for part in parts]),
            upper_face=torch.cat([part.upper_face for part in parts]),
        )

    @property
    def filmed(self) -> torch.Tensor:
        """All cameras it was seen by, in order."""
        return torch.cat([camera.cam2world for _, camera in self.seen])


@pytest.fixture
def make_avatar(monkeypatch: pytest.MonkeyPatch) -> Callable[..., KnownAvatar]:
    """Make avatars of known pictures, rendered on one thread: several would note what drove them as they get to it, not in order."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return KnownAvatar


@pytest.fixture(scope="session")
def tiny_avatar() -> Avatar:
    """An avatar of the real networks, tiny and as loud as if it were taught."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = TriplaneGenerator(TINY).eval()
        ws = generator.mapping(torch.randn(1, TINY.z_dim))
        personalized = PersonalizedGenerator.from_generator(generator, ws, {})
        count, side = torch.arange(NUM_PERFORMED, dtype=torch.float32), personalized.renderer.renderer_config.superresolution.output_side
        avatar = Avatar(
            personalized=personalized,
            config=TINY_AVATAR,
            performance=Performance(
                cameras=head_camera(torch.stack([0.1 * count, 0 * count, 0 * count], -1)),
                blink=count[:, None] / 10,
                head_pose=count[:, None].repeat(1, 3) / 10,
                anchors=count[:, None].repeat(1, 6) / 10,
                upper_face=count[:, None].repeat(1, 5) / 100,
            ),
            background=torch.zeros(3, side, side),
            audio_source="logmel64",
            fps=25.0,
            provenance={},
        )
        for parameter in [*avatar.predictor.parameters(), *avatar.conditioner.parameters()]:
            torch.nn.init.normal_(parameter, std=0.2)
    return avatar.eval()


def plate(side: int) -> torch.Tensor:
    """The wall behind the person of `make_clip`: a smooth gradient, 3 h w in 0..255."""
    ramp = torch.linspace(40, 200, side)
    return torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), torch.full((side, side), 90.0)])


def make_clip(count: int = 16, side: int = 64, **changes: Any) -> Clip:
    """A round person who sways, nods and opens a dark mouth as loud as the sound is; three quarters are for training."""
    time = torch.arange(count, dtype=torch.float32)
    opening = 0.5 - 0.5 * torch.cos(time)
    scattered = torch.rand(468, 2, generator=torch.Generator().manual_seed(4))
    landmarks = (0.35 + 0.3 * scattered).expand(count, 468, 2).clone()
    for point, place in {
        33: (0.38, 0.42),
        133: (0.45, 0.42),
        362: (0.55, 0.42),
        263: (0.62, 0.42),
        5: (0.5, 0.5),
        9: (0.5, 0.36),
        61: (0.44, 0.6),
        291: (0.56, 0.6),
    }.items():
        landmarks[:, point] = torch.tensor(place)
    for upper, lower, column in ((82, 87, 0.47), (13, 14, 0.5), (312, 317, 0.53)):
        landmarks[:, [upper, lower]] = torch.tensor([column, 0.58])
        landmarks[:, lower, 1] += 0.08 * opening
    grid = (torch.arange(side) + 0.5) / side
    rows, columns = torch.meshgrid(grid, grid, indexing="ij")
    inside = (((columns - 0.5) ** 2 + (rows - 0.48) ** 2).sqrt() < 0.25).float()
    texture = 12 * torch.sin(40 * columns) * torch.sin(40 * rows)
    frames = []
    for i in range(count):
        skin = torch.stack([torch.full_like(rows, value) for value in (210.0, 150.0, 120.0)]) + texture
        mouth = ((columns - 0.5).abs() < 0.05) & (rows > 0.58) & (rows < 0.58 + 0.08 * opening[i])
        picture = torch.where(inside > 0, torch.where(mouth, torch.tensor(20.0), skin), plate(side))
        frames.append(picture.permute(1, 2, 0).round().to(torch.uint8).numpy())
    sound = torch.randn(count, 16, 64, generator=torch.Generator().manual_seed(5)) * 0.1 + opening[:, None, None]
    angles = torch.stack([0.25 * torch.sin(0.7 * time), 0.1 * torch.cos(0.5 * time), 0 * time], -1)
    fields: dict[str, Any] = {
        "frames": np.stack(frames),
        "fps": 25.0,
        "waveform": Waveform(samples=torch.zeros(count * 640), sample_rate_hz=16000),
        "audio": AudioFeatures(values=sound, fps=25.0, source="logmel64"),
        "track": FaceTrack(
            cameras=head_camera(angles),
            head_pose=angles,
            landmarks=landmarks * side,
            anchors=torch.tensor([0.0, -0.1, 0.2, -0.2, -0.2, -0.2]).repeat(count, 1),
            blink=(time % 7 == 3).float()[:, None],
            upper_face=0.03 * torch.stack([torch.sin(time + i) for i in range(5)], -1),
            confidence=torch.ones(count, 1),
            crop=np.tile(np.eye(2, 3), (count, 1, 1)),
        ),
        "masks": FaceMasks(person=(255 * inside).to(torch.uint8).expand(count, side, side).numpy().copy(), source="test"),
        "source": "nowhere.mp4",
        "source_sha256": "a" * 64,
        "num_training_frames": 3 * count // 4,
    }
    return Clip(**fields | changes)


@pytest.fixture
def clip() -> Clip:
    """Sixteen frames of a person, of the size that TINY renders."""
    return make_clip()


@pytest.fixture
def clip_of() -> Callable[..., Clip]:
    """Make clips of a person with some fields changed."""
    return make_clip


@pytest.fixture
def prior() -> Prior:
    """A TINY prior that has learnt nothing."""
    torch.manual_seed(11)
    generator = TriplaneGenerator(TINY).eval()
    ws = generator.mapping(torch.randn(200, TINY.z_dim))[:, 0]
    generator.mapping_network.w_avg.copy_(ws.detach().mean(0))
    return Prior(generator=generator, w_std=float(ws.detach().std(0).mean()), provenance={"dataset": "none"})


@pytest.fixture(scope="session")
def person_11(shared: Path) -> Path:
    """Folder of an invented person's film, where there are face models to track it with."""
    try:
        RegistryFaceModel()
    except WeightsError as error:
        pytest.skip(f"the face models are neither cached nor to be had: {error}")
    return shared / "data" / "clips" / "person_11"
