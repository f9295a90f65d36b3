"""KL of a newly trained policy to the previous policy and to the reference, on the held-out prompts."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import lightning as L
from torch import Tensor

from rlhf_pl.data.policy_module import PolicyModule, as_lightning
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.distributed.strategies import get_callable_policy, is_sharded
from rlhf_pl.models.kept_weights import KeptWeights
from rlhf_pl.rounds.policy_snapshot import assume_weights_unchanged, find_past_lm, logps_function
from rlhf_pl.rounds.stages.kl import STAGE, read_prefix_groups, response_logps, write_kl
from rlhf_pl.store.round_store import Round
from rlhf_pl.utils.console import Advance

Phase = Callable[[str, int, str], AbstractContextManager[Advance]]


class PolicyKL:
    """Estimates KL(new || pi_old) and KL(new || reference) from the new policy's responses to the held-out prompts.

    pi_old sampled the round. Its trainable weights are kept in CPU memory while the round
    trains. A run that was resumed in between reads them from a checkpoint, or from the model that the run started from.
    The reference is that of the KL penalty, or, with adapters, the model without them.

    Args:
        trainer: The run's Trainer.
        module: Holds the new policy.
        data: Holds the store that is read.
        tokens_per_batch: Tokens of a forward pass, prompts counted once.
        phase: Shows progress: (description, total, unit).
    """

    def __init__(
        self, trainer: L.Trainer, module: PolicyModule, data: RoundDataModule, tokens_per_batch: int, phase: Phase
    ) -> None:
        self.trainer, self.module, self.data = trainer, module, data
        self.tokens_per_batch, self._phase = tokens_per_batch, phase
        self._kept: KeptWeights | None = None
        self._kept_round: int | None = None  # the round that `_kept` generated

    def keep(self, index: int) -> None:
        """Keep the current policy, which has generated round `index` and is about to train."""
        if not self.data.val_prompts or self._kept_round == index:
            return
        if self._kept is None:
            self._kept = KeptWeights(as_lightning(self.module))
        else:
            self._kept.update()
        self._kept_round = index

    def is_missing(self, stored: Round, version: int) -> bool:
        """Whether the KL is still to be estimated. Greedy responses are not a sample of the policy."""
        if version == 0 or stored.is_complete(STAGE) or not stored.is_complete("responses"):
            return False
        return stored.info("responses")["sampling"]["temperature"] > 0

    def estimate(self, stored: Round, version: int) -> None:
        """Estimate the KL of the current policy and write it into `stored`.

        Args:
            stored: The evaluation with this policy's responses.
            version: Rounds that the policy has trained on.
        """
        ranks, started = ranks_of(self.trainer), time.monotonic()
        pi_old = self._find_pi_old(version - 1)
        reference = self.module.has_reference
        groups = read_prefix_groups(stored)
        count = sum(len(group.responses) for group in groups) * (1 + (pi_old is not None) + reference)
        temperature = stored.info("responses")["sampling"]["temperature"]
        own = logps_function(self.trainer, self.module, get_callable_policy(self.trainer))
        logps: dict[str, Tensor] = {}
        with self._phase("KL of the new policy", count, "responses") as report:

            def compute(name: str, policy: Callable[..., Tensor]) -> None:
                with assume_weights_unchanged(self.module):
                    logps[name] = response_logps(groups, policy, temperature, self.tokens_per_batch, ranks, report)

            compute("new", own)
            if pi_old is not None:
                with pi_old.swapped_in():
                    compute("old", own)
            if reference:
                compute("reference", logps_function(self.trainer, self.module, self.module.load_reference()))
        ranks.run_on_rank_zero(lambda: write_kl(stored, groups, logps, started))

    def _find_pi_old(self, index: int) -> KeptWeights | None:
        """The policy that generated round `index`; None if it is no longer available."""
        if self._kept_round == index:
            return self._kept
        made_by = self.data.store.round(index).manifest.get("settings", {}).get("responses")
        if is_sharded(self.trainer) or made_by is None:
            return None
        lm = find_past_lm(self.trainer, self.module, made_by["policy_step"], made_by["weights"])
        return None if lm is None else KeptWeights.from_state(as_lightning(self.module), lm.state_dict(), "policy.lm.")
