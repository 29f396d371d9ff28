"""The one training loop: steps, checkpoints, an average of the weights. Resuming continues exactly where it stopped."""

import contextlib
import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from talk3d.errors import WeightsError
from talk3d.io.weights import load_tensors, pack_state, save_tensors, unpack_state
from talk3d.types import Progress, silent

Step = Callable[[int], dict[str, Float[Tensor, ""]]]
"""Does one optimisation step, given its number from 0, and returns losses to report."""


@contextlib.contextmanager
def _finish_step_first() -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C back until it is asked for, so that no step is torn; the second one strikes at once."""
    asked = False

    def hold(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def cosine_decay(fraction: float, end: float) -> float:
    """Factor of a learning rate after `fraction` of the steps: from 1 down to `end` along half a cosine."""
    return end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * fraction))


def processes() -> tuple[int, int]:
    """Return this process's number from 0 and how many train together: (0, 1) unless `torch.distributed` was set up."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the mean of all processes' gradients, in one message; alone, do nothing."""
    _, count = processes()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if count == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    pieces = (flat / count).split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)])


def _any_process(asked: bool) -> bool:
    """Say whether any process is asked; those that stopped alone would leave the others waiting for their gradients."""
    if processes()[1] == 1:
        return asked
    flag = torch.tensor(float(asked), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


class Average:
    """Exponential moving average of a module's parameters and buffers."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's current values; early steps (fewer than 1 / (1 - decay)) move faster."""
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)
            for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
                mine.copy_(theirs)


class Best(nn.Module):
    """The module with the least error so far, an error that is no number being none; before anything was considered, the one it was made from."""

    error: Tensor

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.register_buffer("error", torch.tensor(math.inf))

    def consider(self, module: nn.Module, error: Float[Tensor, ""] | None) -> None:
        """Keep the module's values if its error is smaller than any before; None keeps them anyway."""
        if error is not None and not float(error) < float(self.error):
            return
        self.module.load_state_dict(module.state_dict())
        if error is not None:
            self.error.copy_(error)


class Loop:
    """Runs steps and keeps a checkpoint from which the same run continues bit for bit on one device.

    Everything that changes from step to step must be listed: modules, optimisers, generators.
    """

    def __init__(
        self,
        *,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        generators: Mapping[str, torch.Generator],
        checkpoint: Path | None = None,
        checkpoint_seconds: float = 60.0,
        report_every: int = 5,
    ) -> None:
        self.modules, self.optimizers, self.generators = dict(modules), dict(optimizers), dict(generators)
        self.checkpoint, self.checkpoint_seconds, self.report_every = checkpoint, checkpoint_seconds, report_every
        self.step = 0
        if checkpoint is not None and checkpoint.exists():
            self._restore(checkpoint)

    def run(self, stage: str, total: int, step: Step, progress: Progress = silent) -> None:
        """Do steps until `total`; save the checkpoint every `checkpoint_seconds`, at the end, and when interrupted."""
        saved = time.monotonic()
        with _finish_step_first() as interrupted:
            while self.step < total:
                values = step(self.step)
                self.step += 1
                told = self.step % self.report_every == 0 or self.step == total
                if told:
                    progress(stage, self.step, total, {name: float(value) for name, value in values.items()})
                if (told or processes()[1] == 1) and _any_process(interrupted()):  # several wait for each other, so they ask more seldom
                    self.save()
                    raise KeyboardInterrupt
                if time.monotonic() - saved >= self.checkpoint_seconds:
                    self.save()
                    saved = time.monotonic()
            self.save()

    def save(self) -> None:
        """Write the checkpoint, if there is a place for it; of several processes the first one does."""
        if self.checkpoint is None or processes()[0]:
            return
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "generators": {name: generator.get_state() for name, generator in self.generators.items()},
        }
        tensors, skeleton = pack_state(state)
        save_tensors(self.checkpoint, tensors, {"kind": "checkpoint", "step": self.step, "skeleton": skeleton})

    def _restore(self, path: Path) -> None:
        tensors, header = load_tensors(path, "checkpoint")
        state = unpack_state(tensors, header["skeleton"])
        try:
            for name, module in self.modules.items():
                module.load_state_dict(state["modules"][name])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
            for name, generator in self.generators.items():
                generator.set_state(state["generators"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise WeightsError(f"checkpoint {path} belongs to other settings ({reason}): delete it to start anew") from error
        self.step = header["step"]
