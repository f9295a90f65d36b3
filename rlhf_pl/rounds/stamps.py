"""A round's stamp: the settings it is made with, written to its manifest and compared when the run continues."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning as L

from rlhf_pl.data.policy_module import PolicyModule
from rlhf_pl.data.prompts import Prompt
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.models.rotary import describe_factors
from rlhf_pl.rollout import Sampler
from rlhf_pl.rounds.engine_spec import prompts_per_shard
from rlhf_pl.rounds.logps_origins import stores_sampled_tokens, takes_sampler_logps
from rlhf_pl.rounds.refill import plan_first_wave
from rlhf_pl.rounds.settings import RoundOptions, downstream_settings
from rlhf_pl.rounds.stages.sampler_logps import TOKENS
from rlhf_pl.rounds.stored_rounds import StoredRounds
from rlhf_pl.store.provenance import (
    POLICY_KEYS,
    StageSettings,
    list_differences,
    reconcile_round,
    refuse_upstream_change,
)
from rlhf_pl.store.round_store import ORDER, Round
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.fingerprints import rows_fingerprint


class RoundStamps:
    """Stamps rounds with the current settings, and refuses rounds that were made with other settings.

    Args:
        trainer: The run's Trainer.
        module: Holds the policy.
        data: Holds the prompts and the store.
        sampler: The run's sampler.
        options: How rounds are made.
        weights: Returns the fingerprint of the policy's current weights; all ranks call it together.
        accept_changes: Continue although upstream settings have changed.
        rounds: The other run that responses and rewards come from; None if they are made here.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: PolicyModule,
        data: RoundDataModule,
        sampler: Sampler,
        options: RoundOptions,
        weights: Callable[[], str],
        accept_changes: bool,
        rounds: StoredRounds | None = None,
    ) -> None:
        self.trainer, self.module, self.data, self.sampler = trainer, module, data, sampler
        self.options, self.accept_changes = options, accept_changes
        self._weights, self.ranks, self._rounds = weights, ranks_of(trainer), rounds
        self._fingerprints = {
            held_out: (
                rows_fingerprint((p.prompt_id, list(p.token_ids)) for p in prompts),
                rows_fingerprint(dict(p.columns) for p in prompts),
                _hash_unrendered_keys(prompts),
            )
            for held_out, prompts in ((False, data.train_prompts), (True, data.val_prompts))
        }

    def settings(self, stored: Round, with_policy: bool = True) -> StageSettings:
        """Settings that the stages of a round would be made with now.

        Args:
            stored: The round.
            with_policy: Whether to include the policy's step and the fingerprint of its weights.
        """
        prompts, columns, messages = self._fingerprints[stored.is_held_out]
        sampling = self.options.get_sampling(stored)
        options = replace(self.options, from_other_run=False) if stored.is_held_out else self.options
        sampled_by = {"sampler": f"{type(self.sampler).__name__}({getattr(self.sampler, 'dtype', '')})"}
        if options.from_other_run and self._rounds is not None:
            sampled_by = {"rounds_from": self._rounds.run}
        settings: StageSettings = {
            "responses": {
                "policy": self.module.source.path,
                "policy_step": self.trainer.global_step if with_policy else None,
                "weights": self._weights() if with_policy else None,
                "seed": self.data.seed,
                "prompts": prompts,
                **sampled_by,
                "sampling": vars(sampling),
            },
            **downstream_settings(self.module, options, self.trainer, self.data),
        }
        if not options.from_other_run:
            settings["rewards"] |= {"columns": columns, **messages}
        if (factors := describe_factors(self.module.source.config, self.data.longest_tokens)) is not None:
            settings["responses"]["rotary_factors"] = factors
        if stores_sampled_tokens(stored, self.module.needs, self.options):
            settings["responses"][TOKENS] = "stored"
        if not takes_sampler_logps(stored, self.module.needs, self.options):
            settings["logps"].pop("old", None)
        if stored.is_held_out:
            settings["pairs"]["limit"] = self.data.max_val_pairs
            settings["logps"].pop("token_logps", None)
            del settings["training"]
        else:
            settings["responses"]["prompts_per_round"] = self.data.prompts_per_round
            if self.options.refill:
                settings["responses"]["refill"] = self.options.refill
        return settings

    def refuse_changes(self) -> None:
        """Check, before any weights load, that the newest round and evaluation have the current upstream settings.

        Raises:
            ChangedSettingsError: They do not, and the change is not accepted.
        """
        store = self.data.store

        def refuse() -> None:
            for stored in [*list(store.rounds().values())[-1:], *list(store.evaluations().values())[-1:]]:
                refuse_upstream_change(stored, Round.as_stored(self.settings(stored, with_policy=False)))

        if not self.accept_changes:
            self.ranks.run_on_rank_zero(refuse)

    def refuse_change_since(self, index: int) -> None:
        """Check that a new round has the upstream settings of the previous one.

        Raises:
            ChangedSettingsError: It does not, and the change is not accepted.
        """
        stored = self.data.store.round(index)
        settings = self.settings(stored)

        def refuse() -> None:
            if not stored.manifest.get("settings") and index > 0 and not self.accept_changes:
                refuse_upstream_change(self.data.store.round(index - 1), Round.as_stored(settings))

        self.ranks.run_on_rank_zero(refuse)

    def check_inside(self, index: int) -> None:
        """Check the stored round of a run that resumes in the middle of its training.

        Raises:
            InputError: The round is incomplete, or was made with other settings.
        """
        stored = self.data.store.round(index)
        if not stored.is_complete("logps"):
            raise InputError(f"The run was stopped while training on {stored.path}, whose files are gone.")
        if self.accept_changes:
            return
        now = Round.as_stored(self.settings(stored))
        self.ranks.run_on_rank_zero(lambda: _refuse_changed_downstream(stored, now))

    def reconcile(self, stored: Round, keep_ties: bool, made_by: dict[str, Any] | None = None) -> None:
        """Stamp a new round, or keep the stages of a stored one that are still valid.

        Args:
            stored: The round.
            keep_ties: Whether its pairs may hold responses with equal rewards.
            made_by: The `responses` settings that name its policy; None for the current policy.
        """
        settings = self.settings(stored)
        if made_by is not None:
            settings["responses"] |= {k: made_by[k] for k in POLICY_KEYS}

        def change() -> None:
            reconcile_round(stored, settings, self.accept_changes, self._fresh_entries(stored))
            scored = stored.manifest["stages"].get("rewards", {})
            has_changed = scored.get("on_failure") != Round.as_stored(self.options.scoring.on_failure)
            is_scored_here = stored.is_held_out or not self.options.from_other_run
            if scored.get("failures") and has_changed and is_scored_here and not stored.is_complete("training"):
                stored.reopen("rewards")
            paired = stored.manifest["stages"].get("pairs", {})
            if paired and ("kept_ties" in paired) != keep_ties and not stored.is_complete("training"):
                stored.clear("pairs")

        self.ranks.run_on_rank_zero(change)

    def _fresh_entries(self, stored: Round) -> dict[str, Any]:
        """Numbers and order of prompts that a new manifest records."""
        index, data = int(stored.path.name), self.data
        in_round = len(data.val_prompts if stored.is_held_out else data.round_prompts(index))
        per_shard = prompts_per_shard(self.trainer, self.sampler, self.options, in_round)
        is_sampled = not stored.is_held_out and not self.options.from_other_run
        return {
            "prompts_per_shard": per_shard,
            **(plan_first_wave(data, self.options, index, per_shard) if is_sampled else {}),
            "prompts": {
                "training": len(data.train_prompts),
                "held_out": len(data.val_prompts),
                "too_long": data.prompts_too_long,
                "duplicates": data.duplicate_prompts,
                "in_round": in_round,
            },
        }


def _hash_unrendered_keys(prompts: Sequence[Prompt]) -> dict[str, str]:
    """Hash of messages that have extra keys: rewards see these keys, but the policy's tokens may not show them."""
    if all(set(m) <= {"role", "content"} for p in prompts for m in p.messages):
        return {}
    return {"messages": rows_fingerprint(p.messages for p in prompts)}


def _refuse_changed_downstream(stored: Round, now: StageSettings) -> None:
    refuse_upstream_change(stored, now)
    before = stored.manifest.get("settings", now)
    changed = [line for stage in ORDER[1:] if stage in now for line in list_differences(before[stage], now[stage])]
    if changed:
        raise InputError(
            f"The training on {stored.path} was started with other settings:\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nResume from the checkpoint before that round, or give --accept_changes to continue in the middle of "
            "it with the new settings."
        )
