"""The KL of a newly trained policy from the one before it and from the reference, on the held-out prompts."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import lightning as L
from torch import Tensor

from rlhf_pl.data.policy_module import PolicyModule, as_lightning
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.distributed.strategies import callable_policy, is_sharded
from rlhf_pl.models.kept_weights import KeptWeights
from rlhf_pl.rounds.policy_snapshot import find_past_lm, logps_function, steady
from rlhf_pl.rounds.stages.kl import STAGE, note_kl, response_logps, sampled_trees
from rlhf_pl.store.round_store import Round
from rlhf_pl.utils.console import Advance

Phase = Callable[[str, int, str], AbstractContextManager[Advance]]


class PolicyKL:
    """Estimates KL(new || old) and KL(new || reference) from the responses that the new policy has sampled anyway.

    The old policy is the one that generated the round. What trains of it is kept in the CPU's memory while the round
    trains; a run that was resumed in between reads it from a checkpoint, or from the model the run started from. The
    reference is that of the KL penalty, or with adapters the model without them.

    Args:
        trainer: Of the run.
        module: Holds the new policy.
        data: Its store is read.
        tokens_per_batch: Of a forward pass, prompts counted once.
        phase: Shows progress: (description, total, unit).
    """

    def __init__(
        self, trainer: L.Trainer, module: PolicyModule, data: RoundDataModule, tokens_per_batch: int, phase: Phase
    ) -> None:
        self.trainer, self.module, self.data = trainer, module, data
        self.tokens_per_batch, self._phase = tokens_per_batch, phase
        self._kept: KeptWeights | None = None
        self._of_round: int | None = None

    def keep(self, index: int) -> None:
        """The present policy has generated round `index` and is about to change."""
        if not self.data.val_prompts or self._of_round == index:
            return
        if self._kept is None:
            self._kept = KeptWeights(as_lightning(self.module))
        else:
            self._kept.update()
        self._of_round = index

    def is_missing(self, stored: Round, version: int) -> bool:
        """Whether there is something to estimate: greedy responses are no sample of the policy."""
        if version == 0 or stored.is_complete(STAGE) or not stored.is_complete("responses"):
            return False
        return stored.info("responses")["sampling"]["temperature"] > 0

    def estimate(self, stored: Round, version: int) -> None:
        """Note the KL of the present policy, which is that after `version` rounds and has answered in `stored`."""
        ranks, started = ranks_of(self.trainer), time.monotonic()
        old = self._old_policy(version - 1)
        reference = self.module.has_reference
        trees = sampled_trees(stored)
        count = sum(len(tree.responses) for tree in trees) * (1 + (old is not None) + reference)
        temperature = stored.info("responses")["sampling"]["temperature"]
        own = logps_function(self.trainer, self.module, callable_policy(self.trainer))
        logps: dict[str, Tensor] = {}
        with self._phase("KL of the new policy", count, "answers") as report:

            def under(name: str, policy: Callable[..., Tensor]) -> None:
                with steady(self.module):
                    logps[name] = response_logps(trees, policy, temperature, self.tokens_per_batch, ranks, report)

            under("new", own)
            if old is not None:
                with old.swapped_in():
                    under("old", own)
            if reference:
                under("reference", logps_function(self.trainer, self.module, self.module.load_reference()))
        ranks.run_on_rank_zero(lambda: note_kl(stored, trees, logps, started))

    def _old_policy(self, index: int) -> KeptWeights | None:
        """The policy that generated round `index`; None if it is gone."""
        if self._of_round == index:
            return self._kept
        made_by = self.data.store.round(index).manifest.get("settings", {}).get("responses")
        if is_sharded(self.trainer) or made_by is None:
            return None
        lm = find_past_lm(self.trainer, self.module, made_by["policy_step"], made_by["weights"])
        return None if lm is None else KeptWeights.from_state(as_lightning(self.module), lm.state_dict(), "policy.lm.")
