"""What the stages hand on: a prior, a person in it, an avatar that talks. Modules, configs and provenance, no IO."""

from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from talk3d.models.generator import TriplaneGenerator


class Prior(nn.Module):
    """A generator that knows heads, with what tracking and inversion need to know of it."""

    def __init__(
        self, *, generator: TriplaneGenerator, w_std: float, face_template: Float[Tensor, "p 3"] | None = None, provenance: dict[str, Any] | None = None
    ) -> None:
        """Bundle them.

        Args:
            generator: the tri-plane generator.
            w_std: root mean square distance of training people from the average w.
            face_template: mean positions of MediaPipe's 468 face points in the generator's head space; None where it was not calibrated.
            provenance: how it was made.
        """
        super().__init__()
        self.generator = generator
        self.w_std = w_std
        self.face_template = face_template
        self.provenance = provenance or {}

    def save(self, path: str | Path, *, half: bool = True) -> None:
        """Write one file; `half` stores the weights as float16."""
        from talk3d.io.avatars import save_prior

        save_prior(self, Path(path), half=half)
