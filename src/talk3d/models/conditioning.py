"""The five condition tokens of a frame: audio, blink, null, head rotation, landmarks.

Reference: Talk3D (arXiv 2403.20153), section 3.2; audio encoder after AD-NeRF (arXiv 2103.11078). Angles are radians and the octaves few, so
that tokens vary smoothly with what they encode.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.types import Driving, FaceTrack


@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    """Sizes of the token encoders; the published ones have 44 audio channels and 16, 10 and 6 octaves."""

    audio_channels: int = 64
    """Channels of a speech feature; a window has 16 steps of them."""
    blink_octaves: int = 2
    """Octaves of the positional code of the blink."""
    pose_octaves: int = 2
    """Octaves of the positional code of the head rotation."""
    anchor_octaves: int = 2
    """Octaves of the positional code of the landmarks."""
    token_width: int = 64
    """Width of a token."""
    mouth_shapes: int = 8
    """Principal components of the mouth's shape that are read off the audio token; 0 reads off none."""
    limits: bool = False
    """Whether heads that are turned, and brows and eyes that are moved, farther than in what was learnt from count as if they were at its edge,
    and the mouth's components follow from how the head is turned, too."""
    cheeks: bool = False
    """Whether they follow, with limits, from how far smiles draw the cheeks up, as well."""
    drop_rate: float = 0.1
    """How often, in training, each token but the audio's is replaced by the null token."""

    @property
    def num_coefficients(self) -> int:
        """Weights of the linear bases: mouth shapes, blink, two brows, two of the gaze, three angles, two coordinates."""
        return self.mouth_shapes + 10


RELEASED = ConditioningConfig(audio_channels=44, blink_octaves=16, pose_octaves=10, anchor_octaves=6, mouth_shapes=0, drop_rate=0.0)
"""Of the released Talk3D networks, which were trained on pitch, yaw and roll in degrees."""


class AudioNet(nn.Module):
    """One window of speech features to a vector."""

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in ((channels, 32), (32, 32), (32, 64), (64, 64)):
            layers += [nn.Conv1d(i, o, 3, stride=2, padding=1), nn.LeakyReLU(0.02)]
        self.encoder_conv = nn.Sequential(*layers)
        self.encoder_fc1 = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.02), nn.Linear(64, width))

    def forward(self, windows: Float[Tensor, "n c 16"]) -> Float[Tensor, "n d"]:
        """Encode windows of 16 steps."""
        return self.encoder_fc1(self.encoder_conv(windows).squeeze(-1))


class AudioAttention(nn.Module):
    """Weighs the eight neighbouring windows into one token."""

    def __init__(self, width: int = 64, length: int = 8) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in ((width, 16), (16, 8), (8, 4), (4, 2), (2, 1)):
            layers += [nn.Conv1d(i, o, 3, padding=1), nn.LeakyReLU(0.02)]
        self.attentionConvNet = nn.Sequential(*layers)
        self.attentionNet = nn.Sequential(nn.Linear(length, length), nn.Softmax(-1))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """Return the weighted sum over n windows."""
        weights = self.attentionNet(self.attentionConvNet(x.transpose(1, 2)).squeeze(1))
        return (weights.unsqueeze(-1) * x).sum(1)


class PositionalMLP(nn.Module):
    """Positional code [x, sin x, cos x, sin 2x, cos 2x, …] and three linear layers."""

    def __init__(self, in_features: int, octaves: int, width: int = 64) -> None:
        super().__init__()
        self.octaves = octaves
        self.in_layer = nn.Linear(in_features * (2 * octaves + 1), width)
        hidden = [nn.Linear(width, width) for _ in range(2)]
        self.mlp_layers = nn.ModuleList(hidden)
        for layer in (self.in_layer, *hidden):  # keeps the variance, so that the token tells its input from the first step
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "b d"]:
        """Encode vectors."""
        waves = [f(2**k * x) for k in range(self.octaves) for f in (torch.sin, torch.cos)]
        x = self.in_layer(torch.cat([x, *waves], -1))
        for layer in self.mlp_layers:
            x = layer(F.relu(x))
        return x


class BlinkEncoder(nn.Module):
    """The blink's token."""

    def __init__(self, octaves: int, width: int) -> None:
        super().__init__()
        self.simplemlp = PositionalMLP(1, octaves, width)

    def forward(self, blink: Float[Tensor, "b 1"]) -> Float[Tensor, "b d"]:
        """Encode how shut the eyes are."""
        return self.simplemlp(blink)


class CameraEncoder(nn.Module):
    """The tokens of head rotation and landmarks."""

    def __init__(self, pose_octaves: int, anchor_octaves: int, width: int) -> None:
        super().__init__()
        self.encoder1 = PositionalMLP(3, pose_octaves, width)
        self.encoder2 = PositionalMLP(6, anchor_octaves, width)

    def forward(self, head_pose: Float[Tensor, "b 3"], anchors: Float[Tensor, "b 6"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """Encode three angles and three points."""
        return self.encoder1(head_pose), self.encoder2(anchors)


class Limits(nn.Module):
    """How far head, brows and gaze were moved in what was learnt from: beyond it nobody knows what they do, and linear bases would exaggerate."""

    low: Tensor
    high: Tensor
    share = 0.02
    """Of what was learnt from, that lies beyond either limit: a few tracked values are always wrong."""

    def __init__(self, cheeks: bool) -> None:
        super().__init__()
        self.register_buffer("low", -torch.ones(7 + cheeks))
        self.register_buffer("high", torch.ones(7 + cheeks))

    def learn(self, head_pose: Float[Tensor, "t 3"], upper_face: Float[Tensor, "t 5"]) -> None:
        """Take the limits of the frames that are learnt from."""
        seen = torch.cat([head_pose, upper_face], 1).float()[:, : len(self.low)]
        for limit, share in ((self.low, self.share), (self.high, 1 - self.share)):
            limit.copy_(torch.quantile(seen, share, dim=0))

    def within(self, posture: Float[Tensor, "b 4"]) -> Float[Tensor, "b p"]:
        """Return how the head is turned and, where that matters, the cheeks are drawn up, -1 at the lower and 1 at the upper limit."""
        low, high = (torch.cat([limit[:3], limit[7:]]) for limit in (self.low, self.high))
        return 2 * (posture[:, : len(low)].clamp(low, high) - low) / (high - low).clamp(min=1e-6) - 1

    def forward(self, driving: Driving) -> Driving:
        """Return what drives b frames, within the limits."""
        head_pose, eyes = driving.head_pose.clamp(self.low[:3], self.high[:3]), driving.upper_face[:, :4].clamp(self.low[3:7], self.high[3:7])
        return replace(driving, head_pose=head_pose, upper_face=torch.cat([eyes, driving.upper_face[:, 4:]], 1))


def quadratic(angles: Float[Tensor, "n 3"]) -> Float[Tensor, "n 9"]:
    """Return the terms of a quadratic in three angles: these, their squares, their products in pairs."""
    return torch.cat([angles, angles.square(), angles * angles.roll(1, 1)], 1)


def posture(moved: Driving | FaceTrack) -> Float[Tensor, "b 4"]:
    """Return what, beside the sound, decides how a mouth looks: the head's angles and how far the cheeks are drawn up."""
    return torch.cat([moved.head_pose, moved.upper_face[:, 4:]], 1)


class TurnedMouth(nn.Module):
    """What the mouth's components owe to how the head is turned and the cheeks are drawn up, by itself and together with what is heard.

    The components are of pictures: an open mouth of a head that is turned away is another picture than one of a head that looks up. And smiles,
    which no sound tells, move the lips, and slowly.
    """

    def __init__(self, width: int, num_shapes: int, cheeks: bool) -> None:
        super().__init__()
        self.alone = nn.Linear(9 + cheeks, num_shapes)
        self.together = nn.Sequential(nn.Linear(width + 3 + cheeks, width), nn.LeakyReLU(0.1), nn.Linear(width, num_shapes))
        for layer in (self.alone, self.together[2]):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, token: Float[Tensor, "b d"], within: Float[Tensor, "b p"]) -> Float[Tensor, "b s"]:
        """Return what is to be added to the components that are heard: a quadratic in the angles, and what they do together with the sound.

        Args:
            token: the audio's.
            within: three angles of the head and, if asked for, the cheeks, -1 and 1 at the limits of what was learnt from.
        """
        return self.alone(torch.cat([quadratic(within[:, :3]), within[:, 3:]], 1)) + self.together(torch.cat([token, within], 1))


class Conditioner(nn.Module):
    """Encodes what drives a frame into tokens [audio, blink, null, rotation, landmarks], and into the weights of the linear bases.

    Attribute names are those of the published weights.
    """

    def __init__(self, config: ConditioningConfig) -> None:
        super().__init__()
        self.config = config
        width = config.token_width
        self.audio_net = AudioNet(config.audio_channels, width)
        self.audio_att_net = AudioAttention(width)
        self.blink_encoder = BlinkEncoder(config.blink_octaves, width)
        self.camera_encoder = CameraEncoder(config.pose_octaves, config.anchor_octaves, width)
        self.mouth_head = nn.Linear(width, config.mouth_shapes) if config.mouth_shapes else None
        self.limits = Limits(config.cheeks) if config.limits else None
        self.mouth_turned = TurnedMouth(width, config.mouth_shapes, config.cheeks) if config.mouth_shapes and config.limits else None
        self.null_vector = nn.Parameter(torch.randn(1, 1, width))

    def audio_token(self, windows: Float[Tensor, "b n f w"]) -> Float[Tensor, "b d"]:
        """Encode the speech features of b frames and their neighbours."""
        encoded = self.audio_net(windows.flatten(0, 1).transpose(1, 2))
        return self.audio_att_net(encoded.unflatten(0, windows.shape[:2]))

    def ear(self) -> nn.ModuleList:
        """What hears: the layers from sound to audio token, and to the shapes of the mouth."""
        return nn.ModuleList([part for part in (self.audio_net, self.audio_att_net, self.mouth_head, self.mouth_turned) if part is not None])

    def mouth(self, token: Float[Tensor, "b d"], held: Float[Tensor, "b 4"]) -> Float[Tensor, "b s"]:
        """Return the mouth shapes that are heard in the audio token, with head and cheeks held like that; none where none are read off."""
        if self.mouth_head is None:
            return token[:, :0]
        mouth = self.mouth_head(token)
        return mouth if self.limits is None or self.mouth_turned is None else mouth + self.mouth_turned(token, self.limits.within(held))

    def heard(self, tokens: Float[Tensor, "b 5 d"], driving: Driving) -> Float[Tensor, "b s"]:
        """Return the mouth shapes of encoded frames; the audio token is never dropped."""
        return self.mouth(tokens[:, 0], posture(driving))

    def coefficients(self, driving: Driving, mouth: Float[Tensor, "b s"]) -> Float[Tensor, "b k"]:
        """Return the weights of the linear bases, of about unit size: mouth shapes as given, blink, brows, gaze, rotation, place."""
        driving = driving if self.limits is None else self.limits(driving)
        return torch.cat([mouth, 2 * driving.blink, 20 * driving.upper_face[:, :4], 4 * driving.head_pose, 4 * driving.anchors[:, :2]], 1)

    def heard_coefficients(self, tokens: Float[Tensor, "b 5 d"], driving: Driving) -> Float[Tensor, "b k"]:
        """Return the weights of the linear bases of encoded frames, the mouth as it is heard."""
        return self.coefficients(driving, self.heard(tokens, driving))

    def forward(self, driving: Driving, generator: torch.Generator | None = None, run_length: int = 1) -> Float[Tensor, "b 5 d"]:
        """Encode b frames; `generator` (training) replaces tokens other than the audio's by the null token at the configured rate.

        Frames that come in runs of `run_length` lose the same tokens.
        """
        batch = driving.audio.shape[0]
        driving = driving if self.limits is None else self.limits(driving)
        tokens = torch.stack(
            [
                self.audio_token(driving.audio),
                self.blink_encoder(driving.blink),
                self.null_vector.expand(batch, -1, -1)[:, 0],
                *self.camera_encoder(driving.head_pose, driving.anchors),
            ],
            1,
        )
        if generator is not None:
            drop = torch.rand((batch // run_length, tokens.shape[1]), generator=generator, device=generator.device) < self.config.drop_rate
            drop = drop.repeat_interleave(run_length, 0).to(tokens.device)
            drop[:, 0] = False
            tokens = torch.where(drop[..., None], self.null_vector, tokens)
        return tokens
