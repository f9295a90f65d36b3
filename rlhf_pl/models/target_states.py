"""Hidden states at the positions that predict the tokens of responses."""

from typing import Any

from torch import Tensor

from rlhf_pl.models.packed_batch import unpack
from rlhf_pl.models.packed_layout import Layout
from rlhf_pl.models.shared_prefix import hidden_states, takes_prefix_groups


def target_states(
    model: Any,
    input_ids: Tensor,
    position_ids: Tensor,
    logit_positions: Tensor,
    response_ids: Tensor,
    layout: Layout,
) -> Tensor:
    """Last hidden states from which the targets of a `PackedBatch` are predicted, shape (M, H).

    A model prepared by `share_prompts` computes each prompt once; others get padded rows.

    Args:
        model: A Hugging Face model with a causal backbone.
        input_ids: See `PackedBatch` for this and the other tensors; shape (1, N).
        position_ids: Shape (1, N).
        logit_positions: Shape (M,).
        response_ids: Shape (M,).
        layout: Lengths of the prompts and responses.
    """
    if takes_prefix_groups(model):
        return hidden_states(model, input_ids, position_ids, layout).index_select(0, logit_positions)
    ids, mask = unpack(input_ids, layout.lengths)
    rows = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return rows[response_ids, position_ids[0, logit_positions]]
