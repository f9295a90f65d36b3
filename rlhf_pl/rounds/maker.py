"""Makes rounds (responses, rewards, pairs, log-probs) and evaluates policies on the held-out prompts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
from torch import Tensor

from rlhf_pl.algorithms.prompt_groups import SAMPLING_LOGPS, Z_REF, extra_needs
from rlhf_pl.checkpointing.divergence import make_diverged_error, refuse_diverged_weights
from rlhf_pl.data.policy_module import PolicyModule, as_lightning
from rlhf_pl.data.prompts import Prompt
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.models.packed_batch import PackedBatch, PrefixGroup, pack
from rlhf_pl.rollout import SamplingConfig
from rlhf_pl.rollout.weight_sync.sync import SamplerSync
from rlhf_pl.rounds.engine_spec import make_engine_spec, prompts_per_shard, self_check_prompts
from rlhf_pl.rounds.logps_check import sampler_tolerance
from rlhf_pl.rounds.logps_origins import LogpsOrigins, find_origins, takes_sampler_logps
from rlhf_pl.rounds.policy_kl import PolicyKL
from rlhf_pl.rounds.policy_snapshot import (
    PolicySnapshot,
    assume_weights_unchanged,
    extra_passes,
    find_past_policy,
    logps_function,
    snapshot_policy,
)
from rlhf_pl.rounds.refill import open_wave
from rlhf_pl.rounds.settings import RoundOptions, drops_equal_groups, pair_selector
from rlhf_pl.rounds.stages import count_usable, generate, score, select, store_logps
from rlhf_pl.rounds.stages.known_logps import PER_TOKEN, known_columns, known_from
from rlhf_pl.rounds.stages.logps import mismatched_by_length, steps_by_length
from rlhf_pl.rounds.stages.sampler_logps import TOKENS as SAMPLED_TOKENS
from rlhf_pl.rounds.stages.score import ShardScorer
from rlhf_pl.rounds.stages.score_ahead import ScoreAhead
from rlhf_pl.rounds.stamps import RoundStamps
from rlhf_pl.rounds.stored_rounds import StoredRounds, is_off_policy
from rlhf_pl.store.round_store import DamagedStoreError, Round
from rlhf_pl.store.waves import shard_ranges
from rlhf_pl.utils.console import Advance, phase


class RoundMaker:
    """Makes the missing stages of a round, from the current policy or from an earlier one.

    Args:
        trainer: The run's Trainer.
        module: Holds the policy.
        data: Holds the prompts, and the store that is written to.
        sync: Syncs weights to the sampler.
        options: How rounds are made.
        log: Logs metrics.
        accept_changes: Continue although upstream settings have changed.
        rounds: The other run that responses and rewards come from; None to sample and score them.

    In a run with several processes, all of them make every call together. Each process samples and scores its share;
    rank 0 decides for all of them and writes what exists once.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: PolicyModule,
        data: RoundDataModule,
        sync: SamplerSync,
        options: RoundOptions,
        log: Callable[[dict[str, float]], None],
        accept_changes: bool = False,
        rounds: StoredRounds | None = None,
    ) -> None:
        self.rounds, self.accept_changes = rounds, accept_changes
        self.trainer, self.module, self.data, self.sync = trainer, module, data, sync
        self.options, self.log = options, log
        self.ranks = ranks_of(trainer)
        self._show = trainer.is_global_zero and trainer.progress_bar_callback is not None
        self._current: tuple[int, PolicySnapshot] | None = None  # of the update with that number
        self._kl = PolicyKL(trainer, module, data, options.logps_batch_tokens, self._phase)
        self.stamps = RoundStamps(
            trainer, module, data, sync.sampler, options, lambda: self.policy().fingerprint, accept_changes, rounds
        )

    def policy(self) -> PolicySnapshot:
        """The current state of the policy that trains."""
        if self._current is None or self._current[0] != self.trainer.global_step:
            refuse_diverged_weights(self.trainer, as_lightning(self.module))
            self._current = (self.trainer.global_step, snapshot_policy(self.trainer, self.module))
        return self._current[1]

    def make(self, index: int) -> Round:
        """Make round `index` from the current policy, up to the log-probs."""
        stored = self.data.store.round(index)
        self.stamps.refuse_change_since(index)
        self.reconcile(stored)
        self.make_stages(stored, self.policy)
        self._kl.keep(index)
        return stored

    def evaluate(self, version: int) -> Round:
        """Sample and score responses to the held-out prompts from the current policy, that after `version` rounds."""
        store = self.data.store
        earlier = [v for v, e in store.evaluations().items() if v < version and e.is_complete("responses")]
        for other in self.ranks.broadcast(earlier):  # so that the same reward scores all of them
            stored = store.held_out(other)
            self.reconcile(stored, stored.manifest["settings"]["responses"])
            self.make_stages(stored, partial(self.past_policy, stored), pairs=False)
        stored = self.data.store.held_out(version)
        self.reconcile(stored)
        self.make_stages(stored, self.policy, pairs=False)
        if self.ranks.broadcast(self._kl.is_missing(stored, version)):
            self.sync.release_gpu()  # no more responses are sampled from this policy
            self._kl.estimate(stored, version)
        return stored

    @property
    def has_held_out_pairs(self) -> bool:
        """Whether the run makes held-out pairs, for `val/loss`."""
        return (
            bool(self.data.val_prompts) and self.options.val_sampling.num_responses > 1 and self.data.max_val_pairs > 0
        )

    def make_held_out_pairs(self, version: int) -> None:
        """Make pairs of the held-out responses, for `val/loss`."""
        self.make_stages(self.data.store.held_out(version), self.policy)

    def make_stages(self, stored: Round, policy: Callable[[], PolicySnapshot], pairs: bool = True) -> None:
        """Make every missing stage; existing shards are kept.

        Args:
            stored: The round or evaluation.
            policy: Returns the policy of its responses; called only where it is needed.
            pairs: Whether to make pairs and their log-probs too.
        """
        if self.rounds is not None and not stored.is_held_out:
            self._copy(self.rounds, stored)
        self._sample_and_score(stored, policy)
        if not pairs:
            return
        if self._is_missing(stored, "pairs"):
            limit = self.data.max_val_pairs if stored.is_held_out else None
            selector, shaping = pair_selector(self.module, self.options), self.options.shaping
            drop_equal = drops_equal_groups(self.module, self.options) and not stored.is_held_out
            how = (
                selector,
                self.data.seed,
                limit,
                shaping,
                *self.ties(stored),
                drop_equal,
                self.module.loss.needs_responses,
                self.options.drop_truncated,
            )
            while self._adds_prompts(stored, lambda: count_usable(stored, *how)):
                self._sample_and_score(stored, policy)
            with self.ranks.phase("making pairs"):
                self.ranks.run_on_rank_zero(lambda: select(stored, *how))
        if self._is_missing(stored, "logps"):
            origins = self.ranks.broadcast(find_origins(stored, self.module.needs, self.options))
            off_policy = self.ranks.broadcast(is_off_policy(stored))
            is_needed = not off_policy or origins.old == "policy" or bool(extra_needs(self.module.needs))
            self._store_logps(stored, policy() if is_needed else self.policy(), off_policy, origins)

    def _copy(self, rounds: StoredRounds, stored: Round) -> None:
        """Take the responses and rewards of a round from the other run."""
        with self.ranks.phase("copying responses"):
            self.ranks.run_on_rank_zero(lambda: rounds.copy(stored))
        rounds.say_whose(stored, "old_logps" in self.module.needs, SAMPLING_LOGPS in self.module.needs)

    def ties(self, stored: Round) -> tuple[bool, bool]:
        """Whether pairs with equal rewards are kept because a KL term breaks ties, and whether the loss uses them."""
        return self._kl_breaks_ties(stored), self.module.loss.uses_ties

    def _sample_and_score(self, stored: Round, policy: Callable[[], PolicySnapshot]) -> None:
        """Make the missing responses and rewards."""
        manifest = self.ranks.broadcast(stored.manifest)  # as rank 0 sees it: it adds prompts
        prompts, sampling = self.data.prompts_of(stored, manifest), self.options.get_sampling(stored)
        name = "held-out " if stored.is_held_out else ""
        if self._is_missing(stored, "responses"):
            self._generate(stored, prompts, shard_ranges(manifest, len(prompts)), sampling, policy(), name)
        if self._is_missing(stored, "rewards"):
            total = stored.info("responses")["responses"]
            with self._phase(f"scoring {name}responses", total, "responses") as report:
                tokenizer = self.module.source.tokenizer
                score(stored, prompts, self.options.reward, self.options.scoring, report, self.ranks, tokenizer)

    def _adds_prompts(self, stored: Round, count_usable: Callable[[], int]) -> bool:
        """Whether `rollout.refill` adds prompts to a scored round."""
        if self.options.refill == 0 or stored.is_held_out:
            return False
        per_shard = partial(prompts_per_shard, self.trainer, self.sync.sampler, self.options)
        with self.ranks.phase("refilling the round"):
            return self.ranks.run_on_rank_zero(
                lambda: open_wave(stored, self.data, self.options, count_usable, per_shard)
            )

    def _kl_breaks_ties(self, stored: Round) -> bool:
        """Whether the KL term will break ties in rewards. It is 0 while the policy equals the reference."""
        if not self.module.loss.uses_pairs:
            return False
        starts_at_reference = self.module.reference_source is self.module.source
        return self.module.kl_coef > 0 and not (starts_at_reference and int(stored.path.name) == 0)

    def _is_missing(self, stored: Round, stage: str) -> bool:
        """Whether a stage must be made, as rank 0 sees it: others may already see the result of rank 0's next step."""
        return self.ranks.broadcast(not stored.is_complete(stage))

    @contextmanager
    def _phase(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        with self.ranks.phase(description), phase(description, total, unit, self._show) as report:
            yield report

    def _generate(
        self,
        stored: Round,
        prompts: list[Prompt],
        shards: list[range],
        sampling: SamplingConfig,
        policy: PolicySnapshot,
        name: str,
    ) -> None:
        lost = stored.manifest["stages"].get("responses", {}).get("lost", [])
        self._refuse_diverged(policy)
        with self.ranks.phase("syncing weights to the sampler"):
            sampler = self.sync.sampler
            spec = make_engine_spec(self.trainer, self.module, self.data, sampler, self.options)
            limit = sampler_tolerance(self.trainer, self.module, sampler)
            metrics = self.sync.ensure_synced(
                policy, spec, self_check_prompts(self.data), limit, self._show, self.ranks
            )
        if metrics:
            self.log(metrics)
            self.ranks.run_on_rank_zero(lambda: stored.update(sync=metrics))
        per_token = self.ranks.broadcast(SAMPLED_TOKENS in stored.manifest["settings"]["responses"])
        tokenizer = self.module.source.tokenizer
        reward = self.options.reward
        scorer = ShardScorer(stored, prompts, reward, self.options.scoring, tokenizer)
        with (
            self._phase(f"sampling {name}responses", len(prompts), "prompts") as report,
            ScoreAhead(scorer, enabled=reward.is_remote and not lost) as ahead,
        ):
            generate(
                stored,
                prompts,
                self.sync.sampler,
                sampling,
                tokenizer,
                self.data.seed,
                shards,
                report,
                self.ranks,
                on_shard=ahead.add,
                logps=takes_sampler_logps(stored, self.module.needs, self.options),
                stream=self.options.stream_shards,
                per_token=per_token,
            )

        def invalidate_rewards_of_regenerated_shards() -> None:
            regenerated = {file.name for file in stored.shards("responses").values()}
            if not set(lost) <= regenerated and not stored.is_complete("training"):
                stored.clear("rewards")

        self.ranks.run_on_rank_zero(invalidate_rewards_of_regenerated_shards)

    def _refuse_diverged(self, policy: PolicySnapshot) -> None:
        """Refuse finite weights that are too large for finite log-probs, before the sampler is blamed for them."""
        rows = pack([PrefixGroup(ids[:1], (ids[1:],)) for ids in self_check_prompts(self.data) if len(ids) > 1])
        if not all(self.ranks.all_gather(bool(policy.logps(rows, 1.0).isfinite().all()))):
            raise make_diverged_error(self.trainer, "the log-probs of the policy are not finite")

    def _store_logps(self, stored: Round, policy: PolicySnapshot, off_policy: bool, origins: LogpsOrigins) -> None:
        """Store the log-probs that the loss needs, from their origins."""
        if not stored.is_held_out:
            self.sync.release_gpu()  # no more responses are sampled before training
        needs = self.module.needs
        temperature = stored.info("responses")["sampling"]["temperature"]
        policies: dict[str, Callable[[PackedBatch, float], Tensor]] = {}
        stores_all = self.options.store_token_logps and not stored.is_held_out and not off_policy
        if stores_all or origins.old == "policy":
            policies["old"] = policy.logps
        if "reference_logps" in needs:
            policies["reference"] = logps_function(self.trainer, self.module, self.module.load_reference())
        extra = extra_passes(self.trainer, self.module)
        if extra and policy is not self.policy():
            raise DamagedStoreError(
                f"{stored.path} can't be completed: {', '.join(extra)} came from the module as it was at the start of "
                "that round. Resume from the checkpoint of that moment, or move the folder away, and run the same "
                "command with --repair."
            )
        pairs = stored.info("pairs")
        used = pairs.get("responses", 2 * pairs["pairs"])
        has_mismatched = Z_REF in needs
        rows = (len(policies) + len(extra) + has_mismatched) * used
        rows += max(0, stored.info("rewards")["scored"] - used) if stores_all else 0
        what = ("held-out " if stored.is_held_out else "") + ("pairs" if self.module.loss.uses_pairs else "responses")
        with self._phase(f"log-probs of {what}", rows, "responses") as report, assume_weights_unchanged(self.module):
            check = policy.logps if origins.old == "sampler" and not off_policy else None
            divide = steps_by_length(self.options.logps_batch_tokens, self.ranks)
            mismatched = mismatched_by_length(self.options.logps_batch_tokens, self.ranks)
            if not stored.is_held_out:
                divide = partial(self.data.training_steps, int(stored.path.name))
                mismatched = partial(self.data.mismatched_steps, int(stored.path.name))
            store_logps(
                stored,
                policies,
                divide,
                temperature,
                report,
                self.ranks,
                needs=needs,
                check_sampler_with=check,
                extra=extra,
                known=partial(known_columns, stored, origins.old, origins.sampling, needs),
                known_from=known_from(origins.old, origins.sampling),
                copies={SAMPLING_LOGPS: PER_TOKEN} if origins.sampling == "old" else None,
                divide_unused=steps_by_length(self.options.logps_batch_tokens, self.ranks) if stores_all else None,
                mismatched=mismatched if has_mismatched else None,
            )

    def past_policy(self, stored: Round) -> PolicySnapshot:
        """The policy that sampled the responses in `stored`."""
        made_by = stored.manifest["settings"]["responses"]
        if made_by["weights"] == self.policy().fingerprint:
            return self.policy()
        found = find_past_policy(self.trainer, self.module, made_by["policy_step"], made_by["weights"])
        if found is None:
            raise DamagedStoreError(
                f"{stored.path} can't be completed: the policy that sampled its responses (update "
                f"{made_by['policy_step']}) is neither the starting model nor in a checkpoint. If the run has trained "
                "on this round, it is not needed any more: move the folder away and run the same command with "
                "--repair."
            )
        return found

    def reconcile(self, stored: Round, made_by: dict[str, Any] | None = None) -> None:
        """Stamp or check a round; `made_by` names its policy if that is not the current one."""
        self.stamps.reconcile(stored, self._kl_breaks_ties(stored), made_by)
