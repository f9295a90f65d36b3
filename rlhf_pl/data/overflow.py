"""Reads the prompt groups of a stored round for a module, and checks that its loss does not overflow on them."""

import torch
from torch import Tensor

from rlhf_pl.algorithms.policy_loss import PolicyLoss, element_losses, reward_margins
from rlhf_pl.algorithms.prompt_groups import PromptGroups
from rlhf_pl.data.group_batches import GROUPS_AT_ONCE, GroupDataset
from rlhf_pl.data.policy_module import PolicyModule
from rlhf_pl.data.round_choice import choose_for_round, training_round, use_recorded_choice
from rlhf_pl.data.stored_groups import order_ties, read_stored_groups, read_stored_logps
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.store.round_store import Round
from rlhf_pl.utils.errors import InputError


def read_groups(module: PolicyModule, stored: Round, temperature: float, rewards: str, ranks: Ranks) -> GroupDataset:
    """Read the prompt groups of a stored round whose stage `logps` is complete, and let the loss choose for it.

    Held-out pairs get what the loss chose for the round that trains at that time. All ranks call it together.

    Args:
        module: The module that trains on them.
        stored: The round.
        temperature: Temperature at which its responses were sampled.
        rewards: Name of the source of the rewards, for errors.
        ranks: The run's ranks.

    Raises:
        InputError: The round was prepared for another loss, or the loss overflows with its rewards.
    """
    dataset = _read(module, stored, temperature)
    if not stored.is_held_out:
        choose_for_round(module, dataset, stored, ranks)
    elif not use_recorded_choice(module, trains := training_round(stored), ranks):
        choose_for_round(module, _read(module, trains, temperature), trains, ranks)
    check_overflow(module, dataset, rewards)
    return dataset


def _read(module: PolicyModule, stored: Round, temperature: float) -> GroupDataset:
    loss, groups = type(module.loss).__name__, read_stored_groups(stored)
    if module.loss.uses_pairs and groups.pairs is None:
        raise InputError(f"`model.loss` {loss} requires pairs, but {stored.path} was prepared without pairs.")
    numbers = read_stored_logps(stored.read("logps"), groups)
    if missing := sorted(name for name in module.needs if name != "rewards" and name not in numbers):
        raise InputError(
            f"`model.loss` {loss} with `model.kl_coef` {module.kl_coef} requires {', '.join(missing)}, which "
            f"{stored.path} lacks."
        )
    used = {name: values for name, values in numbers.items() if name in module.needs}
    if module.kl_coef > 0 and groups.pairs is not None:
        groups = order_ties(groups, module.kl_coef * (used["old_logps"] - used["reference_logps"]).numpy())
    dataset = GroupDataset(groups, used, temperature)
    dataset.compute_values(module.loss, module.kl_coef)
    return dataset


@torch.no_grad()
def check_overflow(module: PolicyModule, dataset: GroupDataset, rewards: str) -> None:
    """Raise if the loss of a group is not finite under pi_old, where all log-ratios are 0.

    Args:
        module: The module with the loss and the weight of the KL penalty in the rewards.
        dataset: All groups of a round.
        rewards: Name of the source of the rewards, for the error.

    Raises:
        InputError: A group overflows; the error names the first one with its rewards.
    """
    overflows: list[int] = []
    message = ""
    for start in range(0, len(dataset), GROUPS_AT_ONCE):
        numbers = range(start, min(start + GROUPS_AT_ONCE, len(dataset)))
        groups = dataset.groups_before_training(numbers, module.kl_coef, module.device)
        found = sorted({i for _, term in module.loss.terms for i in _find_overflows(term, groups)})
        if found and not overflows:
            message = _describe_rewards(dataset, start + found[0], groups, found[0], module.loss)
        overflows += found
    if overflows:
        unit = "pairs" if module.loss.uses_pairs and dataset.has_single_pairs else "prompt groups"
        if "rewards" not in module.needs:
            raise InputError(
                f"`model.loss` {type(module.loss).__name__} overflows float32 before any training, in "
                f"{len(overflows)} of {len(dataset)} {unit}: choose less extreme options."
            )
        raise InputError(
            f"{rewards}: {message} whose loss overflows float32 ({len(overflows)} of {len(dataset)} {unit}). Scale the "
            "rewards (--rollout.shaping.normalize round), or lower `model.loss.eta`, `model.kl_coef` or the penalties "
            "of `rollout.shaping`."
        )


def _find_overflows(loss: PolicyLoss, groups: PromptGroups) -> list[int]:
    """Indices of the groups whose loss is not finite."""
    finite = element_losses(loss, groups).isfinite()
    if finite.all():
        return []
    if loss.per == "response" and len(finite) == len(groups.lengths):
        finite = _all_of(finite, groups.sizes)
    elif loss.per == "token" and len(finite) == len(groups.token_logps):
        finite = _all_of(_all_of(finite, groups.lengths), groups.sizes)
    # if a loss omits elements, the groups of the others are unknown
    return (~finite).nonzero().flatten().tolist() if len(finite) == len(groups.sizes) else [0]


def _all_of(finite: Tensor, lengths: Tensor) -> Tensor:
    """Whether all elements of each segment are finite."""
    return torch.segment_reduce(finite.float(), "min", lengths=lengths, unsafe=True, initial=1) > 0


def _describe_rewards(dataset: GroupDataset, group: int, groups: PromptGroups, place: int, loss: PolicyLoss) -> str:
    """Describe the rewards of a group: `group` is its index in the data set, `place` that in `groups`."""
    rows = dataset.stored.rows(group)
    values = dataset.rewards[torch.from_numpy(rows)].tolist()
    prompt_id = dataset.stored.prompt_ids[int(rows[0])].as_py()
    if loss.uses_pairs and dataset.has_single_pairs:
        margin = reward_margins(groups)[place].item()
        return (
            f"the rewards {values[0]:g} (chosen) and {values[1]:g} (rejected) of prompt_id {prompt_id!r} make a margin "
            f"of {margin:g}, KL term included,"
        )
    return f"the rewards {', '.join(f'{value:g}' for value in values)} of prompt_id {prompt_id!r} make a group"
