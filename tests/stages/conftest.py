"""An avatar whose pictures are known in closed form, so that what stands round the model can be tested by value."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from talk3d.models.avatar import Avatar, Performance, PersonalizedGenerator
from talk3d.models.generator import TriplaneGenerator
from talk3d.ops.geometry import head_camera
from talk3d.presets import TINY, TINY_AVATAR
from talk3d.types import Camera, Driving, Rendering

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
        )
        self.alpha = alpha
        self.seen: list[tuple[Driving, Camera]] = []

    @property
    def resolution(self) -> int:
        return self.side

    def train(self, mode: bool = True) -> "KnownAvatar":
        self.training = mode
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
        )

    @property
    def filmed(self) -> torch.Tensor:
        """All cameras it was seen by, in order."""
        return torch.cat([camera.cam2world for _, camera in self.seen])


@pytest.fixture
def make_avatar() -> Callable[..., KnownAvatar]:
    """Make avatars of known pictures."""
    return KnownAvatar


@pytest.fixture(scope="session")
def tiny_avatar() -> Avatar:
    """An avatar of the real networks, tiny and as loud as if it were taught."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = TriplaneGenerator(TINY).eval()
        ws = generator.mapping(torch.randn(1, TINY.z_dim))
        personalized = PersonalizedGenerator.from_generator(generator, ws, {})
        count = torch.arange(NUM_PERFORMED, dtype=torch.float32)
        avatar = Avatar(
            personalized=personalized,
            config=TINY_AVATAR,
            performance=Performance(
                cameras=head_camera(torch.stack([0.1 * count, 0 * count, 0 * count], -1)),
                blink=count[:, None] / 10,
                head_pose=count[:, None].repeat(1, 3) / 10,
                anchors=count[:, None].repeat(1, 6) / 10,
            ),
            background=torch.zeros(3, 32, 32),
            audio_source="logmel64",
            fps=25.0,
            provenance={},
        )
        for parameter in [*avatar.predictor.parameters(), *avatar.conditioner.parameters()]:
            torch.nn.init.normal_(parameter, std=0.2)
    return avatar.eval()
