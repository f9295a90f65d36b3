"""The groups of a stored round for a module: with all that its loss needs, and with rewards that it can take."""

import torch
from torch import Tensor

from rlhf_pl.algorithms.policy_loss import PolicyLoss, reward_margins
from rlhf_pl.algorithms.prompt_groups import PromptGroups
from rlhf_pl.data.pair_batches import GroupDataset
from rlhf_pl.data.policy_module import PolicyModule
from rlhf_pl.data.stored_groups import stored_groups, stored_numbers
from rlhf_pl.store.round_store import Round
from rlhf_pl.utils.errors import InputError

_AT_ONCE = 4096  # groups, so that per-token numbers of a round are not in memory together


def read_groups(module: PolicyModule, stored: Round, temperature: float, rewards: str) -> GroupDataset:
    """The groups of a stored round whose stage `logps` is complete.

    Args:
        module: What trains on them.
        stored: The round.
        temperature: That its responses were sampled at.
        rewards: What the rewards are called, for errors.

    Raises:
        InputError: The round was prepared for another loss, or the loss can't take its rewards.
    """
    loss, groups = type(module.loss).__name__, stored_groups(stored)
    if module.loss.per == "pair" and not groups.pairs:
        raise InputError(f"`model.loss` {loss} is on pairs, but {stored.path} was prepared without.")
    numbers = stored_numbers(stored.read("logps"), groups)
    if missing := sorted(name for name in module.needs if name != "rewards" and name not in numbers):
        raise InputError(
            f"`model.loss` {loss} with `model.kl_coef` {module.kl_coef} needs {', '.join(missing)}, but {stored.path} "
            "was prepared without."
        )
    used = {name: values for name, values in numbers.items() if name in module.needs}
    dataset = GroupDataset(groups, used, temperature)
    refuse_overflow(module, dataset, rewards)
    return dataset


@torch.no_grad()
def refuse_overflow(module: PolicyModule, dataset: GroupDataset, rewards: str) -> None:
    """Refuse groups whose loss is not finite for the policy that sampled them, whose log-ratios are 0.

    Args:
        module: Its loss, and the KL penalty that it adds to rewards.
        dataset: All groups of a round.
        rewards: What the rewards are called, for the error.

    Raises:
        InputError: Names the first such group with its rewards.
    """
    found: list[int] = []
    message = ""
    for start in range(0, len(dataset), _AT_ONCE):
        numbers = range(start, min(start + _AT_ONCE, len(dataset)))
        groups = dataset.before_training(numbers, module.kl_coef, module.device)
        wrong = _overflowing(module.loss, groups)
        if wrong and not found:
            message = _rewards(dataset, start + wrong[0], groups, wrong[0], module.loss)
        found += wrong
    if found:
        unit = "pairs" if module.loss.per == "pair" else "prompt groups"
        raise InputError(
            f"{rewards}: {message} whose loss overflows float32 ({len(found)} of {len(dataset)} {unit}). Scale the "
            "rewards (--rollout.shaping.normalize round), or lower `model.loss.eta`, `model.kl_coef` or the penalties "
            "of `rollout.shaping`."
        )


def _overflowing(loss: PolicyLoss, groups: PromptGroups) -> list[int]:
    """Numbers of the groups with a loss that is not finite."""
    finite = loss.losses(groups).isfinite().flatten()
    if finite.all():
        return []
    if loss.per == "response" and len(finite) == len(groups.lengths):
        finite = _all_of(finite, groups.sizes)
    elif loss.per == "token" and len(finite) == len(groups.token_logps):
        finite = _all_of(_all_of(finite, groups.lengths), groups.sizes)
    # a loss that leaves elements out does not tell whose the others are
    return (~finite).nonzero().flatten().tolist() if len(finite) == len(groups.sizes) else [0]


def _all_of(finite: Tensor, lengths: Tensor) -> Tensor:
    """Whether all elements of each segment are finite."""
    return torch.segment_reduce(finite.float(), "min", lengths=lengths, unsafe=True, initial=1) > 0


def _rewards(dataset: GroupDataset, group: int, groups: PromptGroups, place: int, loss: PolicyLoss) -> str:
    """The rewards of a group in words."""
    rows = dataset.stored.rows(group)
    values = dataset.rewards[torch.from_numpy(rows)].tolist()
    prompt_id = dataset.stored.prompt_ids[int(rows[0])].as_py()
    if loss.per == "pair":
        margin = reward_margins(groups)[place].item()
        return (
            f"the rewards {values[0]:g} (chosen) and {values[1]:g} (rejected) of prompt_id {prompt_id!r} make a margin "
            f"of {margin:g}, KL term included,"
        )
    return f"the rewards {', '.join(f'{value:g}' for value in values)} of prompt_id {prompt_id!r} make a group"
