"""Top-p for vLLM's engine on CPUs, as vLLM's own sorts the vocabulary at every step."""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from rlhf_pl.rollout.nucleus import keep_nucleus

TOP_P = "rlhf_pl_top_p"  # of a request's `extra_args`


class Nucleus(LogitsProcessor):
    """Restricts requests to their nucleus, instead of vLLM's `top_p`."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._top_p: dict[int, float] = {}  # by row of the batch

    def is_argmax_invariant(self) -> bool:
        """True, so that vLLM applies it after the temperature."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._top_p, batch_update, lambda params, *_: (params.extra_args or {}).get(TOP_P))

    def apply(self, logits: Tensor) -> Tensor:
        if not self._top_p:
            return logits
        if len(self._top_p) == len(logits):
            return keep_nucleus(logits, torch.tensor([self._top_p[row] for row in range(len(logits))]))
        rows = torch.tensor(list(self._top_p))
        logits[rows] = keep_nucleus(logits[rows], torch.tensor(list(self._top_p.values())))
        return logits
