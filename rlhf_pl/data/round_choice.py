"""Lets a loss choose its numbers for a round (`eta: auto`) from what is stored, and records them in the manifest."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf_pl.algorithms.loss_choices import chosen_numbers
from rlhf_pl.algorithms.policy_loss import reward_margins
from rlhf_pl.algorithms.round_facts import Choice, RoundBefore, RoundFacts
from rlhf_pl.data.group_batches import GROUPS_AT_ONCE, GroupDataset
from rlhf_pl.data.policy_module import PolicyModule
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.store.round_store import Round, RoundStore
from rlhf_pl.utils.console import warn
from rlhf_pl.utils.fingerprints import describe

ENTRY = "chosen"  # in the manifest


def choose_for_round(module: PolicyModule, dataset: GroupDataset, stored: Round, ranks: Ranks) -> None:
    """Let the loss choose for a round; all ranks call it together, before anything computes the loss.

    A choice that the manifest has is kept where the loss, its settings and the round's numbers are the same: a run that
    resumes inside the round goes on with it, whatever became of earlier rounds.
    """
    choosers = [term for _, term in module.loss.terms if term.chooses]
    if not choosers:
        return
    statistics = round_statistics(dataset, module.kl_coef, stored.manifest["stages"].get("pairs", {}))

    def choose() -> list[Choice]:
        made_of = {"loss": [describe(term) for term in choosers], "statistics": statistics}
        recorded = stored.manifest.get(ENTRY, {})
        if recorded and {name: recorded[name] for name in made_of} == made_of:
            return recorded["terms"]
        before = find_round_before(stored, len(choosers))
        choices = [
            term.choose(RoundFacts(**statistics, before=past)) for term, past in zip(choosers, before, strict=True)
        ]
        for term, choice in zip(choosers, choices, strict=True):
            term.use(choice)
        stored.update(**{ENTRY: {**made_of, "terms": choices, "numbers": chosen_numbers(module.loss)}})
        for choice in choices:
            if "kept" in choice:
                warn(f"round {int(stored.path.name) + 1}: {choice['kept']}.")
        return choices

    for term, choice in zip(choosers, ranks.run_on_rank_zero(choose), strict=True):
        term.use(choice)


def training_round(held_out: Round) -> Round:
    """The round that trains when the held-out pairs of an evaluation are validated on."""
    return RoundStore(held_out.run_dir).round(int(held_out.path.name))


def use_recorded_choice(module: PolicyModule, stored: Round, ranks: Ranks) -> bool:
    """Use what a round's manifest records. Return whether the loss has what it needs; all ranks call it together."""
    choosers = [term for _, term in module.loss.terms if term.chooses]
    if not choosers:
        return True
    recorded = ranks.run_on_rank_zero(lambda: stored.manifest.get(ENTRY, {}))
    if recorded.get("loss") != [describe(term) for term in choosers]:
        return False
    for term, choice in zip(choosers, recorded["terms"], strict=True):
        term.use(choice)
    return True


def round_statistics(dataset: GroupDataset, kl_coef: float, selection: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of `RoundFacts`. A prompt counts once, whatever its number of pairs.

    The variance of a prompt's rewards is that of all its scored responses, which the stage `pairs` has recorded, times
    what the KL penalty changes of the selected pairs' mean square margin. Where it is not recorded, pairs are taken for
    random ones, whose mean square margin is twice the variance.

    Args:
        dataset: The round.
        kl_coef: Weight of the KL penalty in the rewards, reward units per nat.
        selection: What the manifest says about the stage `pairs`.
    """
    if dataset.stored.pairs is None:
        return {"pairs": 0, "margin_rms": 0.0, "reward_variance": _mean_variance(dataset, kl_coef)}
    square, pairs = _mean_square_margin(dataset, kl_coef)
    variance, recorded = square / 2, selection.get("reward_variance")
    if recorded:
        plain = _mean_square_margin(dataset, 0.0)[0] if kl_coef else square
        variance = recorded * square / plain if plain > 0 else variance
    return {"pairs": pairs, "margin_rms": math.sqrt(square), "reward_variance": variance}


def _mean_square_margin(dataset: GroupDataset, kl_coef: float) -> tuple[float, int]:
    """Mean over prompts of the mean square reward margin of their pairs, and the number of pairs."""
    total, pairs = 0.0, 0
    for groups in _chunks(dataset, kl_coef):
        squares = reward_margins(groups).double().square()
        total, pairs = total + float(groups.mean_per_prompt(squares).sum()), pairs + len(squares)
    return total / max(1, len(dataset)), pairs


def _mean_variance(dataset: GroupDataset, kl_coef: float) -> float:
    """Mean over prompts of the (unbiased) variance of their responses' rewards."""
    total = 0.0
    for groups in _chunks(dataset, kl_coef):
        rewards = groups.rewards.double()
        deviations = (rewards - groups.group_means(rewards)).square()
        total += float((groups.sum_per_group(deviations) / (groups.sizes - 1).clamp(min=1)).sum())
    return total / max(1, len(dataset))


def _chunks(dataset: GroupDataset, kl_coef: float) -> Any:
    for start in range(0, len(dataset), GROUPS_AT_ONCE):
        numbers = range(start, min(start + GROUPS_AT_ONCE, len(dataset)))
        yield dataset.groups_before_training(numbers, kl_coef, torch.device("cpu"), with_tokens=False)


def find_round_before(stored: Round, terms: int) -> Sequence[RoundBefore | None]:
    """The newest earlier round with a choice, and how far it moved the policy, for each of the terms that choose."""
    store, index = RoundStore(stored.run_dir), int(stored.path.name)
    for number, earlier in reversed(store.rounds().items()):
        if number >= index or len(choices := earlier.manifest.get(ENTRY, {}).get("terms", [])) != terms:
            continue
        measured = store.held_out(number + 1).manifest["stages"].get("kl", {})
        kl, error = measured.get("new_old"), measured.get("new_old_se")
        if kl is None:
            kl, error = earlier.manifest["stages"].get("training", {}).get("kl"), None
        return [RoundBefore(choice, kl, error) for choice in choices]
    return [None] * terms
