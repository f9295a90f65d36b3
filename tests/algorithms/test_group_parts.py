"""The real command splits groups above the token budget, and trains as on whole groups."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from rlhf_pl.store.round_store import RoundStore
from tests.algorithms.test_algorithms_of_users import LOSSES, naive_loss
from tests.algorithms.test_all_pairs import ETA, rebel
from tests.algorithms.trained_round import assert_same_training, logged, logged_losses, naive_updates


@pytest.mark.parametrize("name", ["RebelLoss", "ClippedTokens"])
def test_groups_in_parts_train_like_the_naive_computation(name: str, fit: Callable[..., int], llama: Path) -> None:
    """Prompts of about 30 tokens and four responses of up to 32, in micro-batches of at most 70 tokens."""
    Path("users_losses.py").write_text(LOSSES)
    arguments = [
        "--rollout.sampling.num_responses",
        "4",
        "--data.max_tokens_per_batch",
        "70",
        "--data.num_workers",
        "1",
    ]
    if name == "RebelLoss":
        arguments += ["--model.loss.eta", str(ETA), "--rollout.selector", "AllPairs"]
        naive = partial(rebel, selector="AllPairs")
    else:
        arguments += ["--model.loss", f"users_losses.{name}"]
        naive = partial(naive_loss, name)
    assert fit(*arguments) == 0
    lengths = [len(row) for row in RoundStore("run").round(0).read("responses")["response_tokens"].to_pylist()]
    assert sum(lengths) / 7 > 100  # of a group, on average: most are split
    losses, start, wanted = naive_updates(llama, 2, naive)
    assert logged_losses() == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert_same_training(start, wanted)
    assert logged("train/first_logratio")[0] == 0  # the log-prob pass computed the same parts
