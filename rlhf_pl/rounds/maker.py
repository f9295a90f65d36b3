"""Makes rounds: answers, rewards, pairs, log-probs; and evaluates policies on the held-out prompts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
from torch import Tensor

from rlhf_pl.checkpointing.divergence import diverged, refuse_diverged_weights
from rlhf_pl.data.prompts import Prompt
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.distributed.strategies import compute_dtype
from rlhf_pl.models.footprint import reward_bytes, trainer_bytes
from rlhf_pl.models.packed_batch import PackedBatch, PrefixGroup, pack
from rlhf_pl.models.rotary import describe_factors
from rlhf_pl.modules.pairwise import RebelModule
from rlhf_pl.rollout import EngineSpec, SamplingConfig
from rlhf_pl.rollout.weight_sync.self_check import tolerance
from rlhf_pl.rollout.weight_sync.sync import SamplerSync
from rlhf_pl.rounds.policy_kl import PolicyKL
from rlhf_pl.rounds.policy_snapshot import PolicySnapshot, find_past_policy, logps_function, present_policy, steady
from rlhf_pl.rounds.settings import RoundOptions, downstream_settings, takes_noted_logps
from rlhf_pl.rounds.stages import generate, pair_logps, score, select
from rlhf_pl.rounds.stages.logps import steps_by_length
from rlhf_pl.rounds.stages.score import ShardScorer
from rlhf_pl.rounds.stages.score_ahead import ScoreAhead
from rlhf_pl.store.provenance import OF_POLICY, StageSettings, differences, reconcile_round, refuse_upstream_change
from rlhf_pl.store.round_store import ORDER, DamagedStoreError, Round
from rlhf_pl.utils.console import Advance, phase
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.fingerprints import rows_fingerprint

# nats a token between log-probs computed in other batches, on other devices or by other kernels: in half precision, and
# in float32
FIRST_LOGRATIO = (0.05, 1e-3)


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
        module: RebelModule,
        data: RoundDataModule,
        link: SamplerSync,
        options: RoundOptions,
        log: Callable[[dict[str, float]], None],
        accept_changes: bool = False,
    ) -> None:
        self.trainer, self.module, self.data, self.link = trainer, module, data, link
        self.options, self.log, self.accept_changes = options, log, accept_changes
        self.ranks = ranks_of(trainer)
        self._show = trainer.is_global_zero and trainer.progress_bar_callback is not None
        self._present: tuple[int, PolicySnapshot] | None = None
        self._kl = PolicyKL(trainer, module, data, options.logps_batch_tokens, self._phase)
        self._fingerprints = {
            held_out: (
                rows_fingerprint((p.prompt_id, p.token_ids) for p in prompts),
                rows_fingerprint(dict(p.columns) for p in prompts),
                _unrendered(prompts),
            )
            for held_out, prompts in ((False, data.train_prompts), (True, data.val_prompts))
        }

    def policy(self) -> PolicySnapshot:
        """The policy that trains, as it is now."""
        if self._present is None or self._present[0] != self.trainer.global_step:
            refuse_diverged_weights(self.trainer, self.module)
            self._present = (self.trainer.global_step, present_policy(self.trainer, self.module))
        return self._present[1]

    def refuse_changes(self) -> None:
        """Before anything loads: the newest round and evaluation must be of the present upstream settings.

        Raises:
            ChangedSettingsError: They are not, and that is not accepted.
        """
        store = self.data.store

        def refuse() -> None:
            for stored in [*list(store.rounds().values())[-1:], *list(store.evaluations().values())[-1:]]:
                refuse_upstream_change(stored, Round.as_stored(self.settings(stored, of_present_policy=False)))

        if not self.accept_changes:
            self.ranks.run_on_rank_zero(refuse)

    def make(self, index: int) -> Round:
        """Round `index`, complete, of the present policy."""
        stored = self.data.store.round(index)
        settings = self.settings(stored)

        def refuse_change() -> None:
            if not stored.manifest.get("settings") and index > 0 and not self.accept_changes:
                refuse_upstream_change(self.data.store.round(index - 1), Round.as_stored(settings))

        self.ranks.run_on_rank_zero(refuse_change)
        self.reconcile(stored)
        self.fill(stored, self.policy, "pairs")
        self._kl.keep(index)
        return stored

    def check_first_update(self, logratio: float) -> None:
        """The mean absolute log-ratio a token in a round's first update, nats: 0 where nothing rounds differently.

        Raises:
            InputError: It is more than rounding explains: the stored log-probs are another policy's.
        """
        limit = FIRST_LOGRATIO[compute_dtype(self.trainer, self.module.dtype_name) == "float32"]
        if self.options.old_logps == "sampler":
            limit = self._tolerance()
        if logratio > limit:  # a NaN is a matter of the loss
            raise InputError(
                f"The log-probs stored with this round are {logratio:.3g} nats a token from those of the policy that "
                f"trains on it, where rounding explains at most {limit:g}. If the precision, attention or kernels were "
                "changed since, move the round's folder `logps` away and run the same command again."
            )

    def check_inside(self, index: int) -> None:
        """The stored round of a training that goes on in its middle.

        Raises:
            InputError: It is not whole, or was made with other settings.
        """
        stored = self.data.store.round(index)
        if not stored.is_complete("logps"):
            raise InputError(f"The run was stopped while training on {stored.path}, whose files are gone.")
        if self.accept_changes:
            return
        now = Round.as_stored(self.settings(stored))
        self.ranks.run_on_rank_zero(lambda: _refuse_inside(stored, now))

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
            selector, shaping, ties = self.options.selector, self.options.shaping, self._keeps_ties(stored)
            with self.ranks.phase("making pairs"):
                self.ranks.run_on_rank_zero(lambda: select(stored, selector, self.data.seed, limit, shaping, ties))
        if self._lacks(stored, "logps"):
            self._pair_logps(stored, policy(), what)

    def _keeps_ties(self, stored: Round) -> bool:
        """Whether the KL term will tell answers of equal reward apart: not where the policy is the reference still."""
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
            metrics = self.link.ensure_synced(
                policy, self._engine(), self._check_prompts(), self._tolerance(), self._show, self.ranks
            )
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
        rows = pack([PrefixGroup(ids[:1], (ids[1:],)) for ids in self._check_prompts() if len(ids) > 1])
        if not all(self.ranks.all_gather(bool(policy.logps(rows, 1.0).isfinite().all()))):
            raise diverged(self.trainer, "the log-probs of the policy are not finite")

    def _pair_logps(self, stored: Round, policy: PolicySnapshot, what: str) -> None:
        if not stored.is_held_out:
            self.link.release_gpu()  # nothing more is drawn before training
        with_reference, own = self.module.kl_coef > 0, not takes_noted_logps(self.options, self._sampling(stored))
        rows = 2 * stored.info("pairs")["pairs"] * (own + with_reference)
        temperature = stored.info("responses")["sampling"]["temperature"]
        policies: dict[str, Callable[[PackedBatch, float], Tensor]] = {"old": policy.logps} if own else {}
        if with_reference:
            policies["reference"] = logps_function(self.trainer, self.module, self.module.load_reference())
        with self._phase(f"log-probs of {what}", rows, "answers") as report, steady(self.module):
            check = None if own else policy.logps
            divide = steps_by_length(self.options.logps_batch_tokens, self.ranks)
            if not stored.is_held_out:
                divide = partial(self.data.training_steps, int(stored.path.name))
            pair_logps(stored, policies, divide, temperature, report, self.ranks, check)

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

    def reconcile(self, stored: Round, answered_by: dict[str, Any] | None = None) -> None:
        """Stamp or check a round; `answered_by` names the policy if it is not the present one."""
        settings = self.settings(stored)
        if answered_by is not None:
            settings["responses"] |= {k: answered_by[k] for k in OF_POLICY}
        prompts = self._prompts(stored)
        fresh = {
            "prompts_per_shard": self._prompts_per_shard(len(prompts)),
            "prompts": {
                "training": len(self.data.train_prompts),
                "held_out": len(self.data.val_prompts),
                "too_long": self.data.prompts_too_long,
                "duplicates": self.data.duplicate_prompts,
                "in_round": len(prompts),
            },
        }

        def change() -> None:
            reconcile_round(stored, settings, self.accept_changes, fresh)
            scored = stored.manifest["stages"].get("rewards", {})
            changed = scored.get("on_failure") != Round.as_stored(self.options.scoring.on_failure)
            if scored.get("failures") and changed and not stored.is_complete("training"):
                stored.reopen("rewards")
            paired = stored.manifest["stages"].get("pairs", {})
            if paired and ("kept_ties" in paired) != self._keeps_ties(stored) and not stored.is_complete("training"):
                stored.clear("pairs")

        self.ranks.run_on_rank_zero(change)

    def _prompts_per_shard(self, prompts: int) -> int:
        """At most what the user wants, and few enough that every engine has a shard."""
        engines = self.ranks.size // self.link.sampler.ranks_per_engine
        return max(1, min(self.options.shard_prompts, -(-prompts // engines)))

    def settings(self, stored: Round, of_present_policy: bool = True) -> StageSettings:
        """What the stages of a round would be made from; the policy is looked at only if wanted."""
        prompts, columns, messages = self._fingerprints[stored.is_held_out]
        sampler = self.link.sampler
        settings: StageSettings = {
            "responses": {
                "policy": self.module.source.path,
                "policy_step": self.trainer.global_step if of_present_policy else None,
                "weights": self.policy().fingerprint if of_present_policy else None,
                "seed": self.data.seed,
                "prompts": prompts,
                "sampler": f"{type(sampler).__name__}({getattr(sampler, 'dtype', '')})",
                "sampling": vars(self._sampling(stored)),
            },
            **downstream_settings(self.module, self.options, self.trainer, self.data),
        }
        settings["rewards"] |= {"columns": columns, **messages}
        if (factors := describe_factors(self.module.source.config, self.data.longest_tokens)) is not None:
            settings["responses"]["rotary_factors"] = factors
        if not takes_noted_logps(self.options, self._sampling(stored)):
            settings["logps"].pop("old", None)
        if stored.is_held_out:
            settings["pairs"]["limit"] = self.data.max_val_pairs
            del settings["training"]
        else:
            settings["responses"]["prompts_per_round"] = self.data.prompts_per_round
        return settings

    def _prompts(self, stored: Round) -> list[Prompt]:
        return self.data.val_prompts if stored.is_held_out else self.data.round_prompts(int(stored.path.name))

    def _sampling(self, stored: Round) -> SamplingConfig:
        return self.options.val_sampling if stored.is_held_out else self.options.sampling

    def _check_prompts(self) -> Sequence[Sequence[int]]:
        return [p.token_ids[-16:] for p in self.data.train_prompts[:4]]  # whole ones would cost more than they show

    def _tolerance(self) -> float:
        compute = compute_dtype(self.trainer, self.module.dtype_name)
        return tolerance(compute, getattr(self.link.sampler, "dtype", "float32"))

    def _engine(self) -> EngineSpec:
        data, options = self.data, self.options
        engines = self.ranks.size // self.link.sampler.ranks_per_engine

        def together(prompts: int) -> int:
            return -(-prompts // engines) if options.stream_shards else self._prompts_per_shard(prompts)

        most = max(
            options.sampling.num_responses * together(len(data.round_prompts(0))),
            options.val_sampling.num_responses * together(len(data.val_prompts)),
        )
        held = trainer_bytes(self.module, self.trainer.strategy.root_device) + reward_bytes(options.reward)
        return EngineSpec(self.module.source, data.longest_tokens, most, held)


def _unrendered(prompts: Sequence[Prompt]) -> dict[str, str]:
    """A hash of messages with further keys, which rewards see and the policy's tokens may not show."""
    if all(set(m) <= {"role", "content"} for p in prompts for m in p.messages):
        return {}
    return {"messages": rows_fingerprint(p.messages for p in prompts)}


def _refuse_inside(stored: Round, now: StageSettings) -> None:
    refuse_upstream_change(stored, now)
    before = stored.manifest.get("settings", now)
    changed = [line for stage in ORDER[1:] for line in differences(before[stage], now[stage])]
    if changed:
        raise InputError(
            f"The training on {stored.path} was begun with other settings:\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nResume from the checkpoint before that round, or give --accept_changes to go on with the new ones "
            "in its middle."
        )
