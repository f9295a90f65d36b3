"""Stores offline pairs with their log-probs under pi_old before a run trains on them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import numpy as np

from rlhf_pl.algorithms.prompt_groups import SAMPLING_LOGPS, Z_REF
from rlhf_pl.data.compatibility import check_policy_module
from rlhf_pl.data.offline_datamodule import OfflineDataModule
from rlhf_pl.data.offline_pairs import OfflinePair, make_tables
from rlhf_pl.data.policy_module import PolicyModule, is_policy_module
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.distributed.strategies import get_callable_policy, shard_frozen
from rlhf_pl.models.packed_batch import PrefixGroup, pack
from rlhf_pl.models.rotary import describe_factors
from rlhf_pl.rounds.policy_snapshot import assume_weights_unchanged, extra_passes, logps_function
from rlhf_pl.rounds.repair import move_aside
from rlhf_pl.rounds.settings import logps_settings
from rlhf_pl.rounds.stages import store_logps
from rlhf_pl.rounds.stages.logps import mismatched_by_length, steps_by_length
from rlhf_pl.store.check import find_problems
from rlhf_pl.store.provenance import ChangedSettingsError, list_differences
from rlhf_pl.store.round_store import Round, RoundStore
from rlhf_pl.utils.console import console, phase, warn
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.fingerprints import rows_fingerprint

WARN_DIFFERENCE = 0.1  # nats a token between given and computed log-probs


class OfflineLogps(L.Callback):
    """Computes the log-probs of offline pairs once, from the starting policy, and stores them.

    Args:
        logps_batch_tokens: Tokens per batch for held-out pairs; training pairs come in the training's own
            micro-batches.
    """

    repair = False  # set by `--repair`: move foreign files aside and regenerate damaged ones

    def __init__(self, logps_batch_tokens: int = 4096) -> None:
        if logps_batch_tokens < 1:
            raise InputError(f"`logps_batch_tokens` must be 1 or more, got {logps_batch_tokens}.")
        self.logps_batch_tokens = logps_batch_tokens
        self._run: tuple[L.Trainer, PolicyModule, OfflineDataModule] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a run directory with other pairs, and register as the DataModule's source of its round."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, OfflineDataModule)
        check_policy_module(pl_module, data)
        assert is_policy_module(pl_module)
        if SAMPLING_LOGPS in pl_module.needs:
            raise InputError(
                f"`model.loss` {type(pl_module.loss).__name__} has importance weights pi_old / pi_sampling "
                "(`model.loss.correction`), but pairs from a file have no sampler. Leave `model.loss.correction` out."
            )
        problems = ranks_of(trainer).run_on_rank_zero(lambda: find_problems(_store(trainer), checksums=self.repair))
        if not self.repair:
            problems.refuse()
        damaged = [stored.path for stored, _ in problems.damaged]
        for stored, pairs in ((data.stored, data.train_set), (data.stored_held_out, data.val_set)):
            before = None if stored.path in damaged else stored.manifest.get("settings")
            if before is None:
                continue
            if changed := list_differences(
                before["pairs"], Round.as_stored(_settings(pl_module, data, pairs))["pairs"]
            ):
                raise ChangedSettingsError(
                    f"{stored.path} was made with other settings:\n"
                    + "\n".join(f"  {line}" for line in changed)
                    + "\nGive this run its own directory (--trainer.default_root_dir DIR)."
                )
        self._run = (trainer, pl_module, data)
        data.prepare_with(self)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tidy the run directory, which from here on is this run's."""
        ranks_of(trainer).run_on_rank_zero(lambda: self._clear_up(_store(trainer)))

    def _clear_up(self, store: RoundStore) -> None:
        if self.repair:
            move_aside(store, find_problems(store).foreign)
            for stored in {stored.path: stored for stored, _ in find_problems(store).damaged}.values():
                console.print(f"Repairing {stored.path}", soft_wrap=True)
                stored.delete()
        store.clean_up()

    def prepare_round(self, index: int) -> None:
        """Store the pairs of all epochs with their log-probs, unless they are stored already."""
        assert self._run is not None
        trainer, module, data = self._run
        for stored, pairs in ((data.stored, data.train_set), (data.stored_held_out, data.val_set)):
            settings = Round.as_stored(_settings(module, data, pairs))

            def store_pairs(
                stored: Round = stored, pairs: list[OfflinePair] = pairs, settings: dict[str, Any] = settings
            ) -> bool:
                """Store the pairs; return whether their log-probs are stored already."""
                if stored.is_complete("logps") and stored.manifest["settings"]["logps"] == settings["logps"]:
                    return True
                stored.update(settings=settings)
                if not stored.is_complete("pairs"):
                    responses, indices = make_tables(pairs)
                    stored.write_shard("responses", 0, responses)
                    stored.complete("responses", responses=len(responses))
                    stored.write_shard("pairs", 0, indices)
                    stored.complete("pairs", pairs=len(pairs), dropped=data.dropped)
                return False

            if pairs and not ranks_of(trainer).run_on_rank_zero(store_pairs):
                self._store_logps(trainer, module, data, stored, pairs)

    def finish_run(self, rounds: int) -> None:
        """Do nothing: a run over fixed pairs has no evaluation at its end."""

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._run = None

    def _store_logps(
        self,
        trainer: L.Trainer,
        module: PolicyModule,
        data: OfflineDataModule,
        stored: Round,
        pairs: list[OfflinePair],
    ) -> None:
        given = _given_logps(pairs) if "old_logps" in module.needs else None
        if given is not None and "old_token_logps" in module.needs:
            raise InputError(
                f"`data.pairs` has log-probs of whole responses, but `model.loss` {type(module.loss).__name__} needs "
                "those of every token. Set --data.use_logprobs false to use this policy's own."
            )
        policies = {}
        if "old_logps" in module.needs and given is None:
            policies["old"] = logps_function(trainer, module, _starting_policy(trainer, module))
        if "reference_logps" in module.needs:
            policies["reference"] = logps_function(trainer, module, module.load_reference())
        extra = extra_passes(trainer, module)
        if extra and trainer.global_step > 0:
            raise InputError(
                f"{stored.path} lacks {', '.join(extra)} of the module as it was at the start of the run, which has "
                "trained since. Give the run a directory of its own (--trainer.default_root_dir DIR)."
            )
        show = trainer.is_global_zero and trainer.progress_bar_callback is not None
        ranks, description = ranks_of(trainer), "log-probs of pairs"
        has_mismatched = Z_REF in module.needs
        total = 2 * len(pairs) * (len(policies) + len(extra) + has_mismatched)
        with (
            ranks.phase(description),
            phase(description, total, "responses", show) as report,
            assume_weights_unchanged(module),
        ):
            divide = steps_by_length(self.logps_batch_tokens, ranks)
            mismatched = mismatched_by_length(self.logps_batch_tokens, ranks)
            if not stored.is_held_out:
                divide, mismatched = partial(data.training_steps, 0), partial(data.mismatched_steps, 0)
            known = None if given is None else {"old": given}
            store_logps(
                stored,
                policies,
                divide,
                data.temperature,
                report,
                ranks,
                module.needs,
                known,
                extra=extra,
                mismatched=mismatched if has_mismatched else None,
            )
        if given is not None:
            self._compare_logps(trainer, module, data, pairs)

    def _compare_logps(
        self, trainer: L.Trainer, module: PolicyModule, data: OfflineDataModule, pairs: list[OfflinePair]
    ) -> None:
        """Warn if the log-probs in the data are not those of the policy that this run starts from."""
        logps = logps_function(trainer, module, _starting_policy(trainer, module))
        few = pairs[:4]
        rows = pack([PrefixGroup(p.prompt_tokens, p.tokens) for p in few])
        own = rows.sum_per_response(logps(rows, data.temperature).cpu()).double().numpy()
        given = np.array([value for p in few for value in p.logps or ()])
        difference = float(np.mean(np.abs(own - given) / [len(tokens) for p in few for tokens in p.tokens]))
        if difference > WARN_DIFFERENCE:
            warn(
                f"the log-probs in the data differ by {difference:.2f} nats a token from this policy's at "
                f"temperature {data.temperature:g}. They are used as those of the policy that sampled the responses; "
                "set --data.use_logprobs false to use this policy's own."
            )


def _store(trainer: L.Trainer) -> RoundStore:
    return RoundStore(trainer.default_root_dir)


def _settings(module: PolicyModule, data: OfflineDataModule, pairs: list[OfflinePair]) -> dict[str, dict[str, Any]]:
    rows = rows_fingerprint((list(p.prompt_tokens), *map(list, p.tokens), p.rewards, p.logps) for p in pairs)
    factors = describe_factors(module.source.config, data.longest_tokens)
    return {
        "pairs": {
            "policy": module.source.path,
            "temperature": data.temperature,
            "pairs": len(pairs),
            "rows": rows,
            **({} if factors is None else {"rotary_factors": factors}),
        },
        "logps": {
            "reference": module.reference_source.path if "reference_logps" in module.needs else None,
            **logps_settings(module),
        },
    }


def _starting_policy(trainer: L.Trainer, module: PolicyModule) -> Any:
    """The policy before its first update, also in a resumed run."""
    if trainer.global_step == 0:
        return get_callable_policy(trainer)
    return shard_frozen(trainer, module.unit(module.load(module.source)))


def _given_logps(pairs: Sequence[OfflinePair]) -> np.ndarray | None:
    """Log-probs from the data, of each pair's two responses; None if some pair has none."""
    given = [pair.logps for pair in pairs if pair.logps is not None]
    return np.array(given).ravel() if len(given) == len(pairs) else None
