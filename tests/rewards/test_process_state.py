"""Changes that rewards make have no effect outside of their call."""

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
from rlhf_pl.rewards.guard import score_samples

CONFIG = ScoringConfig(5, retries=0)


def make_sample() -> Sample:
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


def mutate(sample: Sample) -> float:
    sample.messages[0]["content"] = "Other"
    sample.messages.append({"role": "user", "content": "More"})
    sample.response_tokens.clear()  # type: ignore[attr-defined]
    sample.columns["keys"].pop()
    sample.columns["meta"]["n"].append(2)
    sample.columns["new"] = 1  # type: ignore[index]
    sample.message["tool_calls"].clear()  # type: ignore[index]
    sample.tools[0]["function"]["name"] = "g"  # type: ignore[index]
    sample.chat_template_kwargs["more"].append(2)
    return 1.0


class MutatingReward(Reward):
    def score(self, batch: Sequence[Sample]) -> Any:
        values = [mutate(s) for s in batch]
        batch.clear()  # type: ignore[attr-defined]
        return values


class MutatingRule(RuleReward):
    def one(self, sample: Sample) -> float:
        return mutate(sample)


def mutate_arguments(
    response: str, messages: Any, keys: Any, meta: Any, tools: Any, response_tokens: Any, response_message: Any
) -> float:
    messages.clear()
    keys.clear()
    meta.clear()
    tools.clear()
    response_tokens.clear()
    response_message.clear()
    return 1.0


def mutate_lists(responses: list[str], samples: list[Sample], keys: list[Any]) -> list[float]:
    values = [mutate(s) for s in samples]
    keys.clear()
    responses.clear()
    return values


MUTATING = [MutatingReward(), MutatingRule(), FunctionReward(mutate_arguments), FunctionReward(mutate_lists)]


@pytest.mark.parametrize("reward", MUTATING, ids=["class", "rule", "function", "batched function"])
def test_a_reward_receives_copies_of_samples(reward: Reward) -> None:
    """Samples do not change for the caller, for the next attempt, or for the other parts of a sum."""
    samples = [make_sample(), make_sample()]
    assert score_samples(reward, samples, CONFIG) == [RewardResult(1.0)] * 2
    assert samples == [make_sample(), make_sample()]

    def sees_originals(messages: Any, response_tokens: Any, keys: Any, response: str) -> float:
        return float((len(messages), list(response_tokens), keys) == (1, [5, 6], ["a", "b"]))

    both = CombinedReward([Part(reward, 1.0, "mutates"), Part(sees_originals, 10.0, "sees")])  # type: ignore[arg-type]
    assert [o.reward for o in score_samples(both, samples, CONFIG)] == [11.0, 11.0]  # type: ignore[union-attr]


def read_state() -> list[Any]:
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


def change_state(response: str) -> float:
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
def test_process_state_is_restored_after_a_reward(response: str) -> None:
    before = read_state()
    samples = [Sample("p", [{"role": "user", "content": "?"}], response)]
    score_samples(FunctionReward(change_state), samples, ScoringConfig(5, retries=0, on_failure="drop"))
    assert read_state() == before


def test_a_reward_has_separate_random_generators() -> None:
    """Their states continue from call to call; the run's generators do not change."""
    random.seed(1)
    torch.manual_seed(1)
    expected = [random.random(), *torch.rand(2).tolist()]
    random.seed(1)
    torch.manual_seed(1)
    found = []

    def reward(response: str) -> float:
        found.append(random.random() + torch.rand(1).item())
        return found[-1]

    score_samples(FunctionReward(reward), [make_sample(), make_sample()], CONFIG)
    first = torch.rand(1).item()
    score_samples(FunctionReward(reward), [make_sample()], CONFIG)
    assert [random.random(), first, torch.rand(1).item()] == expected
    assert len(set(found)) == 3


CLOSES = """
import os, sys
from rlhf_pl.rewards import FunctionReward, Sample, ScoringConfig
from rlhf_pl.rewards.guard import score_samples
def closes(response):
    sys.stdout.close()
    os.close(2)
    return 1.0
sample = Sample("p", [{"role": "user", "content": "?"}], "a")
out = sys.stdout
score_samples(FunctionReward(closes), [sample, sample], ScoringConfig())
out.write("still there\\n")
sys.stderr.write("here too\\n")
"""


def test_closed_streams_are_reopened(tmp_path: Path) -> None:
    file = tmp_path / "closes.py"
    file.write_text(CLOSES)
    found = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "still there\n", "here too\n")
