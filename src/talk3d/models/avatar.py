"""What the stages hand on: a prior, a person in it, an avatar that talks. Modules, configs and provenance, no IO."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from talk3d.models.conditioning import RELEASED as RELEASED_CONDITIONING
from talk3d.models.conditioning import Conditioner, ConditioningConfig
from talk3d.models.deltaplane import DeltaplaneConfig, DeltaplanePredictor, DeltaplanePrefix
from talk3d.models.encoder import Encoder
from talk3d.models.generator import TriplaneGenerator
from talk3d.models.renderer import RendererConfig, TriplaneRenderer
from talk3d.types import Camera, Driving, FaceTrack, Rendering, Triplane


class Prior(nn.Module):
    """A generator that knows heads, how far people are from its average, and, if it was trained with one, the encoder that guesses codes."""

    def __init__(self, *, generator: TriplaneGenerator, w_std: float, provenance: Mapping[str, Any], encoder: Encoder | None = None) -> None:
        """Bundle them.

        Args:
            generator: the tri-plane generator.
            w_std: root mean square of one component of the training people's distance from the average w.
            provenance: how it was made.
            encoder: guesses codes from pictures; None where there is none.
        """
        super().__init__()
        self.generator, self.encoder = generator, encoder
        self.w_std, self.provenance = w_std, dict(provenance)

    def with_renderer(self, **changes: Any) -> "Prior":
        """Return the same networks, shared, with other settings of the renderer."""
        return Prior(generator=self.generator.with_renderer(**changes), w_std=self.w_std, provenance=self.provenance, encoder=self.encoder)

    def save(self, path: str | Path) -> None:
        """Write one file, weights as float16."""
        from talk3d.io.weights import save_prior

        save_prior(self, Path(path))


class PersonalizedGenerator(nn.Module):
    """A generator tuned to one person: the renderer, the person's planes, and the style row that drives super-resolution.

    The backbone that painted the planes is not kept: for one person its planes never change.
    """

    w: Tensor
    occupied: Tensor

    def __init__(self, config: RendererConfig, provenance: Mapping[str, Any]) -> None:
        super().__init__()
        self.renderer = TriplaneRenderer(config)
        self.identity = nn.Parameter(torch.zeros(1, 3, config.plane_channels, config.plane_resolution, config.plane_resolution))
        self.register_buffer("w", torch.zeros(1, config.w_dim))
        self.register_buffer("occupied", torch.ones(64, 64, 64, dtype=torch.bool))
        self.provenance = dict(provenance)

    @classmethod
    def from_generator(
        cls, generator: TriplaneGenerator, ws: Float[Tensor, "1 n w"], provenance: Mapping[str, Any], own: Float[Tensor, "1 3 c p p"] | None = None
    ) -> "PersonalizedGenerator":
        """Freeze a tuned generator at the person's style rows; `own` is added to the planes it paints."""
        person = cls(generator.renderer_config, provenance)
        wanted = person.renderer.state_dict().keys()
        person.renderer.load_state_dict({k: v for k, v in generator.state_dict().items() if k in wanted})
        with torch.no_grad():
            triplane = generator.triplane(ws)
            person.identity.copy_(triplane.planes if own is None else triplane.planes + own)
            person.w.copy_(ws[:, -1])
            person.occupied.copy_(person.renderer.cpu().occupancy(person.triplane))
        return person.eval()

    @property
    def triplane(self) -> Triplane:
        """The person's identity planes, batch 1."""
        return Triplane(planes=self.identity, axes=self.renderer.renderer_config.plane_axes)

    def render(
        self, triplane: Triplane, camera: Camera, head_pose: Float[Tensor, "b 3"] | None = None, generator: torch.Generator | None = None
    ) -> Rendering:
        """Render planes near the identity's, looking only where this person's head can be.

        Args:
            triplane: of b moments.
            camera: of each.
            head_pose: how the head is held on its neck; None: as at rest.
            generator: jitters the samples.
        """
        occupied: Bool[Tensor, "s s s"] = self.occupied
        bent = self.renderer.renderer_config.bent(triplane, head_pose)
        return self.renderer.render_triplane(bent, self.w, camera, generator=generator, occupied=occupied)

    def save(self, path: str | Path) -> None:
        """Write one file, weights as float16."""
        from talk3d.io.weights import save_person

        save_person(self, Path(path))


@dataclass(frozen=True, kw_only=True)
class AvatarConfig:
    """Sizes of the talking part."""

    conditioning: ConditioningConfig
    """The encoders of the tokens."""
    deltaplane: DeltaplaneConfig
    """The U-Net and the linear bases."""


RELEASED = AvatarConfig(conditioning=RELEASED_CONDITIONING, deltaplane=DeltaplaneConfig(released=True))
"""Of the released Talk3D networks."""


@dataclass(frozen=True, kw_only=True)
class Performance:
    """How the person moved in the training part of the video: what an avatar does when only sound is given."""

    cameras: Camera
    blink: Float[Tensor, "t 1"]
    head_pose: Float[Tensor, "t 3"]
    anchors: Float[Tensor, "t 6"]
    upper_face: Float[Tensor, "t 5"]

    @classmethod
    def of(cls, track: FaceTrack, frames: slice | Int[Tensor, " t"]) -> "Performance":
        """Return what was tracked in these frames."""
        moved = {name: getattr(track, name)[frames].float() for name in ("blink", "head_pose", "anchors", "upper_face")}
        return cls(cameras=track.cameras[frames], **moved)


@runtime_checkable
class Renders(Protocol):
    """Whatever shows the person at given moments from given cameras."""

    def render(self, driving: Driving, camera: Camera) -> Rendering:
        """Render b frames as their cameras see them, deterministically."""
        ...


class Avatar(nn.Module):
    """A person who talks: everything animation needs and nothing else."""

    background: Tensor

    def __init__(
        self,
        *,
        personalized: PersonalizedGenerator,
        config: AvatarConfig,
        performance: Performance,
        background: Float[Tensor, "3 h w"],
        audio_source: str,
        fps: float,
        provenance: Mapping[str, Any],
    ) -> None:
        """Put the parts together; the talking part starts silent (a deltaplane of zeros).

        Args:
            personalized: the person.
            config: sizes of the talking part.
            performance: how the person moved.
            background: what was behind the person, [-1, 1].
            audio_source: the speech encoder that drives it.
            fps: video frames a second it was trained at.
            provenance: how it was made.
        """
        super().__init__()
        self.personalized, self.config, self.performance = personalized, config, performance
        self.conditioner = Conditioner(config.conditioning)
        self.predictor = DeltaplanePredictor(config.deltaplane)
        self.register_buffer("background", background)
        self.audio_source, self.fps, self.provenance = audio_source, fps, dict(provenance)
        self._prefix_modules = list(self.predictor.modules())
        self._prefix: DeltaplanePrefix | None = None
        self._prefix_state: list[tuple[int, int]] = []

    @property
    def resolution(self) -> int:
        """Pixels a side of the pictures."""
        return self.personalized.renderer.renderer_config.superresolution.output_side

    def is_of(self, source_sha256: str) -> bool:
        """Say whether it was made from the video with this checksum; True where it does not know of any."""
        return self.provenance.get("source_sha256", source_sha256) == source_sha256

    def deltaplane(self, driving: Driving, generator: torch.Generator | None = None) -> Triplane:
        """Predict the deltaplane of b frames; `generator` (training) drops tokens.

        What depends only on the person is computed once for the batch; in evaluation without gradients it is kept until a weight changes.
        """
        tokens = self.conditioner(driving, generator)
        return self.predictor.predict(self._prepared(len(tokens)), tokens, self.conditioner.heard_coefficients(tokens, driving))

    def _prepared(self, batch: int) -> DeltaplanePrefix:
        if self.training or torch.is_grad_enabled():
            return self.predictor.prepare(self.personalized.triplane, batch)
        parts = [
            self.personalized.identity,
            *(part for module in self._prefix_modules for part in (*module._parameters.values(), *module._buffers.values())),
        ]
        state = [(part.data_ptr(), 0 if part.is_inference() else part._version) for part in parts if part is not None]
        if self._prefix is None or state != self._prefix_state:
            self._prefix, self._prefix_state = self.predictor.prepare(self.personalized.triplane), state
        return self._prefix

    def render(self, driving: Driving, camera: Camera) -> Rendering:
        """Render b frames as their cameras see them, deterministically."""
        return self.personalized.render(self.personalized.triplane + self.deltaplane(driving), camera, driving.head_pose)

    def score_maps(self, driving: Driving) -> Float[Tensor, "l b h m k"]:
        """Return where the deltaplane looks, see `DeltaplanePredictor.score_maps`."""
        with torch.no_grad():
            tokens = self.conditioner(driving)
            return self.predictor.score_maps(self._prepared(len(tokens)), tokens)

    def bake(self, *, rest: Float[Tensor, "f w"] | None = None, expression: float = 1.0, compiled: bool = False) -> Renders:
        """Return what renders this avatar fast, on the device that it is on and as its weights are now, without gradients: `models.baked`."""
        from talk3d.models.baked import BakedAvatar

        return BakedAvatar(self, rest=rest, expression=expression, compiled=compiled)

    def save(self, path: str | Path) -> None:
        """Write one file, weights as float16."""
        from talk3d.io.weights import save_avatar

        save_avatar(self, Path(path))
