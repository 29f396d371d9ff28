"""The attention U-Net: zero at the start, its prefix exact in values and gradients, its geometry that of the planes."""

import pytest
import torch

from talk3d.models.deltaplane import DeltaplaneConfig, DeltaplanePredictor, _positions
from talk3d.types import Triplane


def test_it_starts_at_exactly_zero(identity: Triplane) -> None:
    predictor = DeltaplanePredictor(DeltaplaneConfig(plane_channels=4, plane_resolution=16, widths=(8, 8, 16), head_width=8, token_width=6))
    delta = predictor(identity, torch.randn(2, 5, 6))
    assert delta.planes.shape == (2, 3, 4, 16, 16) and delta.axes == "fixed"
    assert delta.planes.eq(0).all()


def test_it_learns_from_the_first_step(identity: Triplane) -> None:
    predictor = DeltaplanePredictor(DeltaplaneConfig(plane_channels=4, plane_resolution=16, widths=(8, 8, 16), head_width=8, token_width=6))
    predictor(identity, torch.randn(2, 5, 6)).planes.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in predictor.out.parameters())


def test_output_can_be_of_either_sign(make_predictor, identity: Triplane) -> None:
    planes = make_predictor()(identity, torch.randn(2, 5, 6)).planes
    assert planes.min() < -0.1 and planes.max() > 0.1


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_shared_prefix_equals_one_pass_per_sample(make_predictor, identity: Triplane, num_blocks: int) -> None:
    predictor = make_predictor(num_blocks=num_blocks)
    tokens = torch.randn(3, 5, 6)
    together = predictor.predict(predictor.prepare(identity), tokens)
    for i in range(3):
        torch.testing.assert_close(together.planes[i : i + 1], predictor(identity, tokens[i : i + 1]).planes, atol=1e-5, rtol=1e-4)


def test_shared_prefix_has_the_gradients_of_single_passes(make_predictor, identity: Triplane) -> None:
    predictor = make_predictor().double()
    identity = Triplane(planes=identity.planes.double(), axes="fixed")
    tokens, towards = torch.randn(3, 5, 6).double(), torch.randn(3, 3, 4, 16, 16).double()

    def gradients(shared: bool) -> dict[str, torch.Tensor]:
        predictor.zero_grad()
        if shared:
            loss = (predictor.predict(predictor.prepare(identity), tokens).planes * towards).sum()
        else:
            loss = torch.stack([(predictor(identity, tokens[i : i + 1]).planes * towards[i]).sum() for i in range(3)]).sum()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in predictor.named_parameters() if parameter.grad is not None}

    one, many = gradients(True), gradients(False)
    assert one.keys() == many.keys() == dict(predictor.named_parameters()).keys()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, many[name], msg=lambda text, name=name: f"{name}: {text}")
        assert gradient.abs().sum() > 0, name


def test_every_token_matters(make_predictor, identity: Triplane) -> None:
    predictor = make_predictor()
    tokens = torch.randn(1, 5, 6, requires_grad=True)
    predictor(identity, tokens).planes.square().sum().backward()
    assert tokens.grad is not None and (tokens.grad.abs().sum(-1) > 0).all()


def test_one_person_at_a_time(make_predictor, identity: Triplane) -> None:
    with pytest.raises(AssertionError, match="one person"):
        make_predictor().prepare(Triplane(planes=identity.planes.repeat(2, 1, 1, 1, 1), axes="fixed"))


def test_positions_are_codes_of_x_y_and_z_with_the_collapsed_axis_in_the_middle() -> None:
    """With the width a multiple of 6 the code is [e(x) | e(y) | e(z)], each a third wide."""
    width, side = 24, 4
    codes = _positions(width, side).view(3, side, side, 3, 8)  # plane row column axis code
    angle = torch.arange(4) * 1.0
    expected = torch.stack([f(angle) for f in (torch.sin, torch.cos)], -1)  # first frequency is 1
    torch.testing.assert_close(codes[0, 2, :, 0, :2], expected)  # plane A: x along columns
    torch.testing.assert_close(codes[0, :, 1, 1, :2], expected)  # y along rows
    torch.testing.assert_close(codes[1, 0, :, 0, :2], expected)  # plane B: x along columns
    torch.testing.assert_close(codes[1, :, 3, 2, :2], expected)  # z along rows
    torch.testing.assert_close(codes[2, 0, :, 2, :2], expected)  # plane C: z along columns
    torch.testing.assert_close(codes[2, :, 0, 1, :2], expected)  # y along rows
    for plane, collapsed in enumerate((2, 1, 0)):
        torch.testing.assert_close(codes[plane, ..., collapsed, :2], ((expected[1] + expected[2]) / 2).expand(side, side, 2))
