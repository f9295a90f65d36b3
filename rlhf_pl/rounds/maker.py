"""Makes rounds: answers, rewards, pairs, log-probs; and evaluates policies on the held-out prompts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
from torch import Tensor

from rlhf_pl.checkpointing.divergence import diverged, refuse_diverged_weights
from rlhf_pl.data.policy_module import PolicyModule, as_lightning
from rlhf_pl.data.prompts import Prompt
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.models.packed_batch import PackedBatch, PrefixGroup, pack
from rlhf_pl.rollout import SamplingConfig
from rlhf_pl.rollout.weight_sync.sync import SamplerSync
from rlhf_pl.rounds.engine import check_prompts, engine_spec
from rlhf_pl.rounds.policy_kl import PolicyKL
from rlhf_pl.rounds.policy_snapshot import PolicySnapshot, find_past_policy, logps_function, present_policy, steady
from rlhf_pl.rounds.settings import RoundOptions, pair_selector, takes_noted_logps
from rlhf_pl.rounds.stages import generate, score, select, store_logps
from rlhf_pl.rounds.stages.logps import steps_by_length
from rlhf_pl.rounds.stages.score import ShardScorer
from rlhf_pl.rounds.stages.score_ahead import ScoreAhead
from rlhf_pl.rounds.stamps import RoundStamps
from rlhf_pl.rounds.tolerance import sampler_tolerance
from rlhf_pl.store.round_store import DamagedStoreError, Round
from rlhf_pl.utils.console import Advance, phase


class RoundMaker:
    """Makes what is missing of a round, from the policy as it is or was.

    Args:
        trainer: Of the run.
        module: Holds the policy.
        data: Holds the prompts; its store is written to.
        link: To the sampler.
        options: How rounds are made.
        log: Takes metrics.
        accept_changes: Go on although upstream settings have changed.

    In a run of several processes all of them make every call together: each draws and scores its share, and rank 0
    decides and writes what there is one of.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: PolicyModule,
        data: RoundDataModule,
        link: SamplerSync,
        options: RoundOptions,
        log: Callable[[dict[str, float]], None],
        accept_changes: bool = False,
    ) -> None:
        self.trainer, self.module, self.data, self.link = trainer, module, data, link
        self.options, self.log = options, log
        self.ranks = ranks_of(trainer)
        self._show = trainer.is_global_zero and trainer.progress_bar_callback is not None
        self._present: tuple[int, PolicySnapshot] | None = None
        self._kl = PolicyKL(trainer, module, data, options.logps_batch_tokens, self._phase)
        self.stamps = RoundStamps(
            trainer, module, data, link.sampler, options, lambda: self.policy().fingerprint, accept_changes
        )

    def policy(self) -> PolicySnapshot:
        """The policy that trains, as it is now."""
        if self._present is None or self._present[0] != self.trainer.global_step:
            refuse_diverged_weights(self.trainer, as_lightning(self.module))
            self._present = (self.trainer.global_step, present_policy(self.trainer, self.module))
        return self._present[1]

    def make(self, index: int) -> Round:
        """Round `index`, complete, of the present policy."""
        stored = self.data.store.round(index)
        self.stamps.refuse_change_since(index)
        self.reconcile(stored)
        self.fill(stored, self.policy, "pairs")
        self._kl.keep(index)
        return stored

    def evaluate(self, version: int) -> Round:
        """The answers of the policy after `version` rounds to the held-out prompts, scored; pairs where wanted."""
        store = self.data.store
        earlier = [v for v, e in store.evaluations().items() if v < version and e.is_complete("responses")]
        for other in self.ranks.broadcast(earlier):  # so that all are scored by the same reward
            stored = store.held_out(other)
            self.reconcile(stored, stored.manifest["settings"]["responses"])
            self.fill(stored, partial(self.past_policy, stored), "held-out pairs", pairs=False)
        stored = self.data.store.held_out(version)
        self.reconcile(stored)
        self.fill(stored, self.policy, "held-out pairs", pairs=False)
        if self.ranks.broadcast(self._kl.is_missing(stored, version)):
            self.link.release_gpu()  # nothing more is drawn from this policy
            self._kl.estimate(stored, version)
        return stored

    @property
    def pairs_held_out(self) -> bool:
        """Whether held-out answers are paired, for `val/loss`."""
        return (
            bool(self.data.val_prompts) and self.options.val_sampling.num_responses > 1 and self.data.max_val_pairs > 0
        )

    def pair_held_out(self, version: int) -> None:
        """Pairs of the held-out answers, for `val/loss`."""
        self.fill(self.data.store.held_out(version), self.policy, "held-out pairs")

    def fill(self, stored: Round, policy: Callable[[], PolicySnapshot], what: str, pairs: bool = True) -> None:
        """Every stage that is missing, from the shards that exist."""
        prompts, sampling = self._prompts(stored), self._sampling(stored)
        name = "held-out " if stored.is_held_out else ""
        if self._lacks(stored, "responses"):
            self._generate(stored, prompts, sampling, policy(), name)
        if self._lacks(stored, "rewards"):
            total = stored.info("responses")["responses"]
            with self._phase(f"scoring {name}answers", total, "answers") as report:
                tokenizer = self.module.source.tokenizer
                score(stored, prompts, self.options.reward, self.options.scoring, report, self.ranks, tokenizer)
        if not pairs:
            return
        if self._lacks(stored, "pairs"):
            limit = self.data.max_val_pairs if stored.is_held_out else None
            selector, shaping = pair_selector(self.module, self.options), self.options.shaping
            ties = self._keeps_ties(stored)
            with self.ranks.phase("making pairs"):
                self.ranks.run_on_rank_zero(lambda: select(stored, selector, self.data.seed, limit, shaping, ties))
        if self._lacks(stored, "logps"):
            self._pair_logps(stored, policy(), what)

    def _keeps_ties(self, stored: Round) -> bool:
        """Whether the KL term will tell answers of equal reward apart: not where the policy is the reference still."""
        if self.module.loss.per != "pair":
            return False
        starts_there = self.module.reference_source is self.module.source
        return self.module.kl_coef > 0 and not (starts_there and int(stored.path.name) == 0)

    def _lacks(self, stored: Round, stage: str) -> bool:
        """Whether a stage is to be made, as rank 0 sees it: another may already see what rank 0 does next."""
        return self.ranks.broadcast(not stored.is_complete(stage))

    @contextmanager
    def _phase(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        with self.ranks.phase(description), phase(description, total, unit, self._show) as report:
            yield report

    def _generate(
        self, stored: Round, prompts: list[Prompt], sampling: SamplingConfig, policy: PolicySnapshot, name: str
    ) -> None:
        lost = stored.manifest["stages"].get("responses", {}).get("lost", [])
        self._refuse_diverged(policy)
        with self.ranks.phase("handing weights to the sampler"):
            sampler = self.link.sampler
            spec = engine_spec(self.trainer, self.module, self.data, sampler, self.options)
            limit = sampler_tolerance(self.trainer, self.module, sampler)
            metrics = self.link.ensure_synced(policy, spec, check_prompts(self.data), limit, self._show, self.ranks)
        if metrics:
            self.log(metrics)
            self.ranks.run_on_rank_zero(lambda: stored.update(sync=metrics))
        shard = stored.manifest["prompts_per_shard"]
        tokenizer = self.module.source.tokenizer
        reward = self.options.reward
        scorer = ShardScorer(stored, prompts, reward, self.options.scoring, tokenizer)
        with (
            self._phase(f"answering {name}prompts", len(prompts), "prompts") as report,
            ScoreAhead(scorer, enabled=reward.is_remote and not lost) as ahead,
        ):
            draw = partial(generate, stored, prompts, self.link.sampler, sampling, tokenizer, self.data.seed, shard)
            logps = takes_noted_logps(self.options, sampling)
            draw(report, self.ranks, ahead.add, logps, self.options.stream_shards)

        def invalidate_rewards_of_regenerated_shards() -> None:
            again = {file.name for file in stored.shards("responses").values()}
            if not set(lost) <= again and not stored.is_complete("training"):
                stored.clear("rewards")

        self.ranks.run_on_rank_zero(invalidate_rewards_of_regenerated_shards)

    def _refuse_diverged(self, policy: PolicySnapshot) -> None:
        """Finite weights may still be too large to give finite log-probs; no sampler is to blame for that."""
        rows = pack([PrefixGroup(ids[:1], (ids[1:],)) for ids in check_prompts(self.data) if len(ids) > 1])
        if not all(self.ranks.all_gather(bool(policy.logps(rows, 1.0).isfinite().all()))):
            raise diverged(self.trainer, "the log-probs of the policy are not finite")

    def _pair_logps(self, stored: Round, policy: PolicySnapshot, what: str) -> None:
        if not stored.is_held_out:
            self.link.release_gpu()  # nothing more is drawn before training
        needs, noted = self.module.needs, takes_noted_logps(self.options, self._sampling(stored))
        temperature = stored.info("responses")["sampling"]["temperature"]
        policies: dict[str, Callable[[PackedBatch, float], Tensor]] = {}
        if "old_logps" in needs and not noted:
            policies["old"] = policy.logps
        if "reference_logps" in needs:
            policies["reference"] = logps_function(self.trainer, self.module, self.module.load_reference())
        of_pairs = stored.info("pairs")
        rows = len(policies) * of_pairs.get("responses", 2 * of_pairs["pairs"])
        with self._phase(f"log-probs of {what}", rows, "answers") as report, steady(self.module):
            check = policy.logps if noted else None
            divide = steps_by_length(self.options.logps_batch_tokens, self.ranks)
            if not stored.is_held_out:
                divide = partial(self.data.training_steps, int(stored.path.name))
            store_logps(
                stored, policies, divide, temperature, report, self.ranks, needs=needs, check_sampler_with=check
            )

    def past_policy(self, stored: Round) -> PolicySnapshot:
        """The policy that answered in `stored`."""
        made_by = stored.manifest["settings"]["responses"]
        if made_by["weights"] == self.policy().fingerprint:
            return self.policy()
        found = find_past_policy(self.trainer, self.module, made_by["policy_step"], made_by["weights"])
        if found is None:
            raise DamagedStoreError(
                f"{stored.path} can't be made whole: the policy that answered there (update "
                f"{made_by['policy_step']}) is neither the starting model nor in a checkpoint. If the round was "
                "trained on, the run does not need it any more: move that folder away, and run the same command with "
                "--repair."
            )
        return found

    def reconcile(self, stored: Round, made_by: dict[str, Any] | None = None) -> None:
        """Stamp or check a round; `made_by` names the policy if it is not the present one."""
        self.stamps.reconcile(stored, self._keeps_ties(stored), made_by)

    def _prompts(self, stored: Round) -> list[Prompt]:
        return self.data.prompts_of(stored)

    def _sampling(self, stored: Round) -> SamplingConfig:
        return self.options.sampling_of(stored)
