"""The loop: exact resuming, interruption between steps, averages of weights."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from talk3d.errors import WeightsError
from talk3d.io.weights import load_tensors
from talk3d.training.loop import Average, Best, Loop, average_gradients, processes


class Run:
    """A small regression with noise, so that optimiser, weights and randomness all matter."""

    def __init__(self, checkpoint: Path | None = None, width: int = 4) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        self.average = Average(self.net, 0.9)
        self.adam = torch.optim.Adam(self.net.parameters(), lr=0.05)
        self.noise = torch.Generator().manual_seed(5)
        self.seen: list[int] = []
        self.hook: Callable[[int], None] = lambda number: None
        self.loop = Loop(
            modules={"net": self.net, "average": self.average.module},
            optimizers={"adam": self.adam},
            generators={"noise": self.noise},
            checkpoint=checkpoint,
        )

    def step(self, number: int) -> dict[str, torch.Tensor]:
        self.seen.append(number)
        x = torch.randn(8, 3, generator=self.noise)
        loss = (self.net(x) - x.sum(1, keepdim=True)).square().mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.average.update(self.net, number)
        self.hook(number)
        return {"error": loss.detach()}

    def numbers(self) -> list[torch.Tensor]:
        return [*self.net.state_dict().values(), *self.average.module.state_dict().values(), self.noise.get_state()]


def same(one: Run, other: Run) -> bool:
    return all(a.equal(b) for a, b in zip(one.numbers(), other.numbers(), strict=True))


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole = Run()
    whole.loop.run("fit", 6, whole.step)
    first = Run(tmp_path / "check")
    first.loop.run("fit", 3, first.step)
    assert not same(whole, first)
    second = Run(tmp_path / "check")
    assert second.loop.step == 3
    second.loop.run("fit", 6, second.step)
    assert second.seen == [3, 4, 5] and same(whole, second)
    third = Run(tmp_path / "check")
    third.loop.run("fit", 6, third.step)
    assert third.seen == [] and same(whole, third)


def test_checkpoints_are_written_every_minute_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, found = Run(tmp_path / "check"), []
    monkeypatch.setattr(time, "monotonic", lambda: 30.0 * len(run.seen))
    run.hook = lambda number: found.append(load_tensors(tmp_path / "check", "checkpoint")[1]["step"] if (tmp_path / "check").exists() else 0)
    run.loop.run("fit", 5, run.step)
    assert found == [0, 0, 2, 2, 4] and load_tensors(tmp_path / "check", "checkpoint")[1]["step"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["check"]


def test_progress_hears_losses_every_few_steps_and_at_the_end() -> None:
    run, heard = Run(), []
    run.loop.run("fit", 12, run.step, lambda stage, step, total, values: heard.append((stage, step, total, dict(values))))
    assert [(stage, step, total) for stage, step, total, _ in heard] == [("fit", 5, 12), ("fit", 10, 12), ("fit", 12, 12)]
    assert all(values.keys() == {"error"} and isinstance(values["error"], float) for *_, values in heard)


def test_interruption_finishes_the_step_saves_and_can_be_resumed(tmp_path: Path) -> None:
    whole = Run()
    whole.loop.run("fit", 6, whole.step)
    run = Run(tmp_path / "check")
    run.hook = lambda number: os.kill(os.getpid(), signal.SIGINT) if number == 2 else None
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.loop.run("fit", 6, run.step)
    assert run.seen == [0, 1, 2] and signal.getsignal(signal.SIGINT) is before
    again = Run(tmp_path / "check")
    again.loop.run("fit", 6, again.step)
    assert again.seen == [3, 4, 5] and same(whole, again)


def test_a_second_interruption_strikes_at_once() -> None:
    run, after = Run(), []

    def twice(number: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        after.append("first")
        os.kill(os.getpid(), signal.SIGINT)
        after.append("second")

    run.hook = twice
    with pytest.raises(KeyboardInterrupt):
        run.loop.run("fit", 6, run.step)
    assert after == ["first"] and run.loop.step == 0


def test_an_error_in_a_step_passes_through_and_gives_the_handler_back() -> None:
    run = Run()

    def fail(number: int) -> None:
        raise RuntimeError("no")

    run.hook, before = fail, signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="no"):
        run.loop.run("fit", 6, run.step)
    assert signal.getsignal(signal.SIGINT) is before


def test_it_runs_outside_the_main_thread() -> None:
    run = Run()
    thread = threading.Thread(target=lambda: run.loop.run("fit", 2, run.step))
    thread.start()
    thread.join()
    assert run.loop.step == 2


def test_a_checkpoint_of_other_settings_is_refused_in_one_line(tmp_path: Path) -> None:
    run = Run(tmp_path / "check")
    run.loop.run("fit", 2, run.step)
    with pytest.raises(WeightsError, match="belongs to other settings") as caught:
        Run(tmp_path / "check", width=5)
    assert "delete it to start anew" in str(caught.value) and "\n" not in str(caught.value)


def test_a_torn_checkpoint_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "check")
    run.loop.run("fit", 2, run.step)
    (tmp_path / "check").write_bytes((tmp_path / "check").read_bytes()[:100])
    with pytest.raises(WeightsError, match="damaged"):
        Run(tmp_path / "check")


def test_average_follows_the_closed_form() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 0.0)
    average = Average(net, 0.5)
    nn.init.constant_(net.weight, 1.0)
    expected = 0.0
    for step in range(20):
        average.update(net, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
        assert average.module.weight.item() == pytest.approx(expected, abs=1e-6)
    assert math.isclose(expected, 1, abs_tol=1e-4)


def test_average_copies_buffers_and_is_apart_from_the_module() -> None:
    net = nn.BatchNorm1d(2)
    average = Average(net, 0.999)
    net(torch.randn(8, 2))
    before = average.module.weight.clone()
    assert not average.module.running_mean.equal(net.running_mean)
    average.update(net, 0)
    assert average.module.running_mean.equal(net.running_mean) and average.module.weight.equal(before)
    assert not average.module.training and not any(parameter.requires_grad for parameter in average.module.parameters())


def test_the_best_is_what_had_the_least_error() -> None:
    module = nn.Linear(2, 2)
    best = Best(module)
    kept = []
    for error in (math.nan, 0.5, 0.3, math.nan, 0.4, None):
        with torch.no_grad():
            module.weight.add_(1)
        best.consider(module, None if error is None else torch.tensor(error))
        kept.append(best.module.weight.equal(module.weight))
    assert kept == [False, True, True, False, False, True] and best.error.item() == pytest.approx(0.3)
    again = Best(nn.Linear(2, 2))
    again.load_state_dict(best.state_dict())
    again.consider(nn.Linear(2, 2), torch.tensor(0.35))
    assert again.module.weight.equal(best.module.weight)


def _average_two(number: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    some, other, without = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))
    some.grad, other.grad = torch.full((2, 3), 1.0 + number), torch.arange(4.0) * number
    average_gradients([some, without, other])
    assert processes() == (number, 2) and without.grad is None
    torch.testing.assert_close(some.grad, torch.full((2, 3), 1.5))
    torch.testing.assert_close(other.grad, torch.arange(4.0) / 2)
    torch.distributed.destroy_process_group()


def _interrupt_one(number: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    run = Run()

    def hook(step: int) -> None:
        average_gradients(run.net.parameters())
        if (number, step) == (1, 2):
            os.kill(os.getpid(), signal.SIGINT)

    run.hook = hook
    with pytest.raises(KeyboardInterrupt):
        run.loop.run("fit", 100, run.step)
    assert run.loop.step == 5
    torch.distributed.destroy_process_group()


def test_an_interruption_of_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_interrupt_one, (str(tmp_path / "store"),), nprocs=2)


def test_processes_share_the_mean_of_their_gradients(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_average_two, (str(tmp_path / "store"),), nprocs=2)  # raises what a process raises
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    average_gradients([parameter])  # alone
    assert processes() == (0, 1) and parameter.grad.equal(torch.ones(2))
