"""BiSeNet's names and sizes, and what it returns."""

from collections.abc import Callable
from pathlib import Path

import torch

from talk3d.io.catalogue import CATALOGUE
from talk3d.perception.bisenet import BiSeNet, load_bisenet


def test_names_and_sizes_are_the_published_ones(has_published_sizes: Callable[..., None]) -> None:
    with torch.device("meta"):
        network = BiSeNet()
    has_published_sizes("bisenet", network, file_bytes=CATALOGUE["bisenet"].size_bytes)
    inference = sum(
        4 * value.numel() for key, value in network.state_dict().items() if value.is_floating_point() and "out16" not in key and "out32" not in key
    )
    assert inference == 52_650_752  # as others have counted the tensors of the published file without the two heads for training


def test_logits_have_the_size_of_the_picture(tmp_path: Path) -> None:
    original = BiSeNet().eval()
    torch.save(original.state_dict(), tmp_path / "bisenet.pth")
    network = load_bisenet(tmp_path / "bisenet.pth")
    pictures = torch.rand(2, 3, 64, 96)
    logits = network(pictures)
    assert logits.shape == (2, 19, 64, 96)
    assert torch.equal(logits, original(pictures))
    assert torch.allclose(network(pictures[1:]), logits[1:], atol=1e-5)
