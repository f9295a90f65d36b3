"""Margins that a loss can't take: refused before a round trains."""

from typing import Any

import torch

from rlhf_pl.data.pair_batches import PairDataset
from rlhf_pl.utils.errors import InputError


@torch.no_grad()
def refuse_overflow(module: Any, pairs: PairDataset, rewards: str) -> None:
    """Refuse pairs whose loss is not finite for the policy that drew them, whose log-ratios are 0.

    Args:
        module: Its loss, and what it adds to rewards.
        pairs: All of a round.
        rewards: What the rewards are called, for the error.

    Raises:
        InputError: Names the first such pair with its rewards.
    """
    if len(pairs) == 0:
        return
    old, reference = pairs.old_logps, pairs.reference_logps
    margins = module.margins(pairs.rewards, old, reference).to(module.device)
    losses = module.loss(torch.zeros_like(margins), torch.zeros_like(margins), margins)
    wrong = (~losses.isfinite()).nonzero().flatten().tolist()
    if wrong:
        first = wrong[0]
        chosen, rejected = pairs.rewards[:, first].tolist()
        raise InputError(
            f"{rewards}: the rewards {chosen:g} (chosen) and {rejected:g} (rejected) of prompt_id "
            f"{pairs.prompt_ids[first].as_py()!r} make a margin of {margins[first].item():g}, KL term included, whose "
            f"loss overflows float32 ({len(wrong)} of {len(pairs)} pairs). Scale the rewards "
            "(--rollout.shaping.normalize round), or lower `model.loss.eta`, `model.kl_coef` or the penalties of "
            "`rollout.shaping`."
        )
