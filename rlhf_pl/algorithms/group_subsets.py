"""Some of the groups of a batch, as a batch of their own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_pl.algorithms.prompt_groups import PromptGroups


def select_groups(groups: PromptGroups, chosen: Sequence[int]) -> PromptGroups:
    """The groups at the indices `chosen`, in that order; log-probs keep their gradient.

    Args:
        groups: G groups of R responses with M tokens.
        chosen: At least one index, 0 to G - 1.
    """
    wanted = torch.tensor(chosen, device=groups.sizes.device)
    responses = _members(groups.sizes, wanted)
    tokens = _members(groups.lengths, responses)
    of_size = {len(groups.token_logps): tokens, len(groups.lengths): responses}  # one token a response: both are equal
    stored = {
        name: values if values.dim() == 0 else values[of_size[len(values)]] for name, values in groups.stored.items()
    }
    pair_rows, pair_sizes = groups.pair_rows, groups.pair_sizes
    if pair_rows is not None and pair_sizes is not None:
        place = torch.full_like(groups.lengths, -1)  # of each response among the selected ones
        place[responses] = torch.arange(len(responses), device=place.device)
        pair_rows = place[pair_rows[:, _members(pair_sizes, wanted)]]
        pair_sizes = pair_sizes[wanted]
    return PromptGroups(
        groups.token_logps[tokens],
        groups.logps[responses],
        groups.rewards[responses],
        groups.lengths[responses],
        groups.finished[responses],
        groups.sizes[wanted],
        stored,
        pair_rows,
        pair_sizes,
        groups.kl_coef,
    )


def _members(lengths: Tensor, segments: Tensor) -> Tensor:
    """Indices of the members of some of the consecutive segments with these lengths, segment after segment."""
    starts = lengths.cumsum(0) - lengths
    chosen = lengths[segments]
    within = torch.arange(int(chosen.sum()), device=lengths.device)
    within = within - torch.repeat_interleave(chosen.cumsum(0) - chosen, chosen)
    return torch.repeat_interleave(starts[segments], chosen) + within
