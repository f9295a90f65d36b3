"""What rewards change is changed for themselves alone."""

import locale
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_pl.rewards import CombinedReward, FunctionReward, Reward, RewardResult, RuleReward, Sample, ScoringConfig
from rlhf_pl.rewards import WeightedReward as Part
from rlhf_pl.rewards.guard import guarded_scores

CONFIG = ScoringConfig(5, retries=0)


def sample() -> Sample:
    return Sample(
        "p",
        [{"role": "user", "content": "Why?"}],
        "Because.",
        [5, 6],
        True,
        {"keys": ["a", "b"], "meta": {"n": [1]}},
        {"role": "assistant", "content": "Because.", "tool_calls": [{"function": {"name": "f"}}]},
        [{"function": {"name": "f"}}],
        {"more": [1]},
    )


def spoil(given: Sample) -> float:
    given.messages[0]["content"] = "Other"
    given.messages.append({"role": "user", "content": "More"})
    given.response_tokens.clear()  # type: ignore[attr-defined]
    given.columns["keys"].pop()
    given.columns["meta"]["n"].append(2)
    given.columns["new"] = 1  # type: ignore[index]
    given.message["tool_calls"].clear()  # type: ignore[index]
    given.tools[0]["function"]["name"] = "g"  # type: ignore[index]
    given.chat_template_kwargs["more"].append(2)
    return 1.0


class Spoils(Reward):
    def score(self, batch: Sequence[Sample]) -> Any:
        values = [spoil(s) for s in batch]
        batch.clear()  # type: ignore[attr-defined]
        return values


class SpoilsOne(RuleReward):
    def one(self, given: Sample) -> float:
        return spoil(given)


def spoils_arguments(
    response: str, messages: Any, keys: Any, meta: Any, tools: Any, response_tokens: Any, response_message: Any
) -> float:
    messages.clear()
    keys.clear()
    meta.clear()
    tools.clear()
    response_tokens.clear()
    response_message.clear()
    return 1.0


def spoils_lists(responses: list[str], samples: list[Sample], keys: list[Any]) -> list[float]:
    values = [spoil(s) for s in samples]
    keys.clear()
    responses.clear()
    return values


SPOIL = [Spoils(), SpoilsOne(), FunctionReward(spoils_arguments), FunctionReward(spoils_lists)]


@pytest.mark.parametrize("reward", SPOIL, ids=["class", "rule", "function", "batched function"])
def test_a_reward_has_samples_of_its_own(reward: Reward) -> None:
    """The same before and after, for the next attempt, and for the other parts of a sum."""
    given = [sample(), sample()]
    assert guarded_scores(reward, given, CONFIG) == [RewardResult(1.0)] * 2
    assert given == [sample(), sample()]

    def sees_all(messages: Any, response_tokens: Any, keys: Any, response: str) -> float:
        return float((len(messages), list(response_tokens), keys) == (1, [5, 6], ["a", "b"]))

    both = CombinedReward([Part(reward, 1.0, "spoils"), Part(sees_all, 10.0, "sees")])  # type: ignore[arg-type]
    assert [o.reward for o in guarded_scores(both, given, CONFIG)] == [11.0, 11.0]  # type: ignore[union-attr]


def state() -> list[Any]:
    return [
        os.getcwd(),
        (mask := os.umask(0), os.umask(mask))[0],
        signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        locale.setlocale(locale.LC_ALL),
        sys.getrecursionlimit(),
        socket.getdefaulttimeout(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.ones(1).device,
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]
        [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD)],
        (sys.stdin, sys.stdout, sys.stderr),
    ]


def upset(response: str) -> float:
    os.chdir("/")
    os.umask(0o777)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    locale.setlocale(locale.LC_ALL, "C.UTF-8")
    sys.setrecursionlimit(5000)
    socket.setdefaulttimeout(1.0)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]
    if response == "raise":
        raise ValueError
    return 1.0


@pytest.mark.parametrize("response", ["return", "raise"])
def test_what_a_reward_sets_in_the_process_is_put_back(response: str) -> None:
    before = state()
    given = [Sample("p", [{"role": "user", "content": "?"}], response)]
    guarded_scores(FunctionReward(upset), given, ScoringConfig(5, retries=0, on_failure="drop"))
    assert state() == before


def test_a_reward_has_random_numbers_of_its_own() -> None:
    """They go on from call to call, and leave the run's alone."""
    random.seed(1)
    torch.manual_seed(1)
    expected = [random.random(), *torch.rand(2).tolist()]
    random.seed(1)
    torch.manual_seed(1)
    found = []

    def reward(response: str) -> float:
        found.append(random.random() + torch.rand(1).item())
        return found[-1]

    guarded_scores(FunctionReward(reward), [sample(), sample()], CONFIG)
    first = torch.rand(1).item()
    guarded_scores(FunctionReward(reward), [sample()], CONFIG)
    assert [random.random(), first, torch.rand(1).item()] == expected
    assert len(set(found)) == 3


CLOSES = """
import os, sys
from rlhf_pl.rewards import FunctionReward, Sample, ScoringConfig
from rlhf_pl.rewards.guard import guarded_scores
def closes(response):
    sys.stdout.close()
    os.close(2)
    return 1.0
sample = Sample("p", [{"role": "user", "content": "?"}], "a")
out = sys.stdout
guarded_scores(FunctionReward(closes), [sample, sample], ScoringConfig())
out.write("still there\\n")
sys.stderr.write("here too\\n")
"""


def test_closed_streams_are_opened_again(tmp_path: Path) -> None:
    file = tmp_path / "closes.py"
    file.write_text(CLOSES)
    found = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "still there\n", "here too\n")
