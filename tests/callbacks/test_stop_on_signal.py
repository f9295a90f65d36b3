"""A signal ends a run after the update in progress is saved."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlhf_pl.callbacks import RoundCheckpoint, RunStopped, StopOnSignal
from rlhf_pl.checkpointing.stop_request import StopRequest
from tests.integration import test_fit
from tests.integration.test_fit import PROMPTS, assert_same, weights

SIGNALS = (signal.SIGTERM, signal.SIGINT)
fit = partial(test_fit.fit, enable_checkpointing=True, max_epochs=1, module={"kl_coef": 0.0})


@pytest.fixture
def prompts(write_jsonl: Callable[..., str]) -> str:
    return write_jsonl(PROMPTS)


class SignalSender(L.Callback):
    """Sends a signal to this process inside a micro-batch, and records the process's handlers there."""

    def __init__(self, number: int, inside: int, times: int = 1) -> None:
        self.number, self.inside, self.times = number, inside, times
        self.handlers: list[Any] = []

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == self.inside:
            self.handlers = [signal.getsignal(number) for number in SIGNALS]
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def checkpoints(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_an_update_ends_the_run_after_it(tmp_path: Path, llama: Path, prompts: str, number: int) -> None:
    """An update has two micro-batches: the second update is in progress."""
    before = [signal.getsignal(n) for n in SIGNALS]
    sender = SignalSender(number, inside=2)
    with pytest.raises(RunStopped) as stopped:
        fit(tmp_path / "run", llama, prompts, [sender, RoundCheckpoint(0), StopOnSignal()])
    assert stopped.value.signum == number
    saved = tmp_path / "run" / "checkpoints" / "update-00000002.ckpt"
    assert str(stopped.value) == (
        f"Stopped by {signal.Signals(number).name}. The training up to update 2 is in {saved}. Run the same "
        "command again to resume."
    )
    assert checkpoints(tmp_path / "run") == ["last.ckpt", "update-00000002.ckpt"]
    assert all(isinstance(handler.__self__, StopOnSignal) for handler in sender.handlers)
    assert [signal.getsignal(n) for n in SIGNALS] == before
    _, resumed = fit(tmp_path / "run", llama, prompts, [RoundCheckpoint()], ckpt_path=str(saved))
    _, whole = fit(tmp_path / "whole", llama, prompts)
    assert_same(weights(resumed), weights(whole))


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, llama: Path, prompts: str) -> None:
    sender = SignalSender(signal.SIGINT, inside=0, times=2)
    with pytest.raises(RunStopped, match=r"Stopped by SIGINT. No resume point was written"):
        fit(tmp_path, llama, prompts, [sender, RoundCheckpoint(), StopOnSignal()])
    assert checkpoints(tmp_path) == []


def test_without_round_checkpoint_the_update_is_finished_and_nothing_saved(
    tmp_path: Path, llama: Path, prompts: str
) -> None:
    class Counts(L.Callback):
        batches = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.batches += 1

    counts = Counts()
    with pytest.raises(RunStopped, match=r"Stopped by SIGTERM. No resume point was written"):
        fit(tmp_path, llama, prompts, [SignalSender(signal.SIGTERM, inside=0), StopOnSignal(), counts])
    assert counts.batches == 2


@pytest.mark.parametrize(("inside", "updates"), [(2, 1), (3, 2)])
def test_without_it_lightning_handles_signals_and_sigterm_is_saved(
    tmp_path: Path, llama: Path, prompts: str, inside: int, updates: int
) -> None:
    """Lightning ends the run after the micro-batch: the third is half of the second update, the fourth ends it."""
    outside = signal.getsignal(signal.SIGINT)
    sender = SignalSender(signal.SIGTERM, inside)
    with pytest.raises(SIGTERMException):
        fit(tmp_path / "run", llama, prompts, [sender, RoundCheckpoint(0)])
    assert type(sender.handlers[0]).__module__.startswith("lightning.")
    assert sender.handlers[1] == outside
    assert checkpoints(tmp_path / "run") == ["last.ckpt", f"update-{updates:08d}.ckpt"]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    _, resumed = fit(tmp_path / "run", llama, prompts, [RoundCheckpoint()], ckpt_path=str(last))
    _, whole = fit(tmp_path / "whole", llama, prompts)
    assert_same(weights(resumed), weights(whole))


def test_a_request_waits_for_a_save_in_progress(tmp_path: Path) -> None:
    request = StopRequest(tmp_path)

    def save() -> None:
        with request.postpone():
            request.receive(signal.SIGTERM)
            with request.postpone():
                request.receive(signal.SIGTERM)  # a second SIGTERM also waits
            reached.append(True)

    reached: list[bool] = []
    with pytest.raises(RunStopped, match=r"Stopped by SIGTERM. Nothing was trained yet"):
        save()
    assert reached
    inside = StopRequest(tmp_path)
    inside.can_stop = False
    inside.receive(signal.SIGINT)
    with pytest.raises(RunStopped):
        inside.receive(signal.SIGINT)
