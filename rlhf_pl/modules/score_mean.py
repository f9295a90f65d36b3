"""The mean score of given conversations under a reward model in training."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.distributed.strategies import get_callable_policy
from rlhf_pl.models.packed_batch import make_prefix_group
from rlhf_pl.models.packed_layout import Layout
from rlhf_pl.models.rendering import Rendered, pad_rows
from rlhf_pl.models.sequence_classifier import prefix_group_inputs
from rlhf_pl.models.working_copy import working_copies


def compute_score_mean(module: L.LightningModule, rows: Sequence[Rendered], rows_per_batch: int) -> float:
    """Mean score of all rows under the module's weights as they are now; all ranks call it, each scores its share.

    Args:
        module: Maps inputs of `ClassifierLM` to scores; has `pad_id` and `shares_prompts`.
        rows: The conversations.
        rows_per_batch: Rows of a batch; they are of similar length.
    """
    trainer: Any = module.trainer
    ranks, device = ranks_of(trainer), trainer.strategy.root_device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches = [order[start : start + rows_per_batch] for start in range(0, len(order), rows_per_batch)]
    own, total = batches[ranks.rank :: ranks.size], torch.zeros(2, dtype=torch.float64)
    for copy in working_copies(module):
        copy.invalidate()  # a callback may have exchanged the weights
    was_training = module.training
    module.eval()
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        for number in range(-(-len(batches) // ranks.size)):  # strategies need equally many calls on every rank
            batch = own[number] if number < len(own) else batches[0]
            scores = get_callable_policy(trainer)(**_inputs(module, [rows[i] for i in batch], device))
            if number < len(own):
                total += torch.tensor([scores.double().sum().item(), len(batch)], dtype=torch.float64)
    module.train(was_training)
    score_sum, count = ranks.all_reduce_sum(total).tolist()
    return score_sum / count


def _inputs(module: Any, rows: list[Rendered], device: torch.device) -> dict[str, Any]:
    if module.shares_prompts:
        inputs = prefix_group_inputs([make_prefix_group([row.ids], len(row.ids) - 1) for row in rows])
        return {name: v.to(device) if isinstance(v, Tensor | Layout) else v for name, v in inputs.items()}
    return pad_rows(rows, module.pad_id, device)
