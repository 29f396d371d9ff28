"""How different pictures look: LPIPS on AlexNet or VGG16, without torchvision.

The backbones come from `talk3d weights fetch lpips-alex` or `lpips-vgg`; the small linear heads lie in the package torchmetrics.

Reference: Zhang et al., The unreasonable effectiveness of deep features as a perceptual metric (arXiv 1801.03924), version 0.1.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.errors import WeightsError
from talk3d.io.catalogue import load_published
from talk3d.io.published import read_checkpoint
from talk3d.io.weights import load_strictly

Backbone = Literal["alex", "vgg"]
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of the channels of pictures in [-1, 1] before the backbone."""
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
"""Layers after which features are compared."""
VGG_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
"""Channels of VGG16's convolutions; 0 halves the size."""


@runtime_checkable
class PerceptualDistance(Protocol):
    """Says how different two pictures look."""

    source: str
    """Which network it is, to be recorded with what it measured."""

    def __call__(self, first: Float[Tensor, "b 3 h w"], second: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """Return one number for each pair of pictures in [-1, 1], 0 for equal ones; differentiable."""
        ...


def backbone(kind: Backbone) -> nn.Sequential:
    """Return the convolutions of AlexNet or VGG16, with the names that `features.` has in the published files."""
    if kind == "vgg":
        layers, channels = [], 3
        for width in VGG_WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            channels = width or channels
        return nn.Sequential(*layers)
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


class LPIPS(nn.Module):
    """The learnt distance of unit-length features, averaged over each layer and added up."""

    shift: Tensor
    scale: Tensor

    def __init__(self, kind: Backbone) -> None:
        super().__init__()
        self.source, self.taps = f"LPIPS 0.1 {kind}", TAPS[kind]
        self.features = backbone(kind)
        widths = [layer.out_channels for layer in self.features if isinstance(layer, nn.Conv2d)]
        order = [sum(isinstance(layer, nn.Conv2d) for layer in list(self.features)[: tap + 1]) - 1 for tap in self.taps]
        self.heads = nn.ParameterList(torch.zeros(1, widths[number], 1, 1) for number in order)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)

    def forward(self, first: Float[Tensor, "b 3 h w"], second: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """Return the distance of each pair of RGB pictures in [-1, 1] of at least 64 px."""
        x = (torch.cat([first, second]) - self.shift) / self.scale
        total = x.new_zeros(len(first))
        heads = iter(self.heads)
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.taps:
                length = (x.square().sum(1, keepdim=True) + 1e-20).sqrt() + 1e-10
                one, other = (x / length).chunk(2)
                total = total + (next(heads) * (one - other).square()).sum(1).mean((1, 2))
        return total


def load_lpips(kind: Backbone = "alex", path: Path | None = None, device: str = "cpu") -> LPIPS:
    """Return the published distance, frozen.

    Args:
        kind: alex for measuring, vgg for inversion.
        path: of the backbone's weights, in place of those in the cache folder.
        device: where to compute.

    Raises:
        WeightsError: the weights are not there, or do not fit.
    """
    network = LPIPS(kind)
    load_published(f"lpips-{kind}", network.features, path, prefix="features.")
    heads = heads_path(kind)
    found = {name.removeprefix("lin").removesuffix(".model.1.weight"): value for name, value in read_checkpoint(heads).items()}
    load_strictly(network.heads, found, heads)
    return network.eval().requires_grad_(False).to(device)


def heads_path(kind: Backbone) -> Path:
    """Return the file of the linear heads inside the installed package torchmetrics.

    Raises:
        WeightsError: the package does not carry them.
    """
    found = find_spec("torchmetrics")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "functional" / "image" / "lpips_models" / f"{kind}.pth"
        if path.is_file():
            return path
    raise WeightsError(f"the package torchmetrics lacks its LPIPS heads ({kind}.pth): pip install --force-reinstall --no-deps torchmetrics")
