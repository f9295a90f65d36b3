"""Stores offline pairs with their old policy's log-probs before a run trains on them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import numpy as np

from rlhf_pl.data.offline_datamodule import OfflineDataModule
from rlhf_pl.data.offline_pairs import OfflinePair, as_tables
from rlhf_pl.data.options import check_policy_module
from rlhf_pl.data.policy_module import PolicyModule, is_policy_module
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.distributed.strategies import callable_policy, shard_frozen
from rlhf_pl.models.packed_batch import PrefixGroup, pack
from rlhf_pl.models.rotary import describe_factors
from rlhf_pl.rounds.policy_snapshot import logps_function, steady
from rlhf_pl.rounds.repair import move_aside
from rlhf_pl.rounds.settings import logps_settings
from rlhf_pl.rounds.stages import store_logps
from rlhf_pl.rounds.stages.logps import steps_by_length
from rlhf_pl.store.check import find_problems
from rlhf_pl.store.provenance import ChangedSettingsError, differences
from rlhf_pl.store.round_store import Round, RoundStore
from rlhf_pl.utils.console import console, phase, warn
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.fingerprints import rows_fingerprint

SURPRISE = 0.1  # nats a token between given and computed log-probs


class OfflineLogps(L.Callback):
    """Computes the log-probs of offline pairs once, from the policy as it starts, and keeps them.

    Args:
        logps_batch_tokens: Tokens per batch for held-out pairs; pairs that train come in the training's own batches.
    """

    repair = False  # set by `--repair`: move aside or make again what is not as it was written

    def __init__(self, logps_batch_tokens: int = 4096) -> None:
        if logps_batch_tokens < 1:
            raise InputError(f"`logps_batch_tokens` must be 1 or more, got {logps_batch_tokens}.")
        self.logps_batch_tokens = logps_batch_tokens
        self._run: tuple[L.Trainer, PolicyModule, OfflineDataModule] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a run directory of other pairs, and offer the DataModule to prepare its round."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, OfflineDataModule)
        check_policy_module(pl_module, data)
        assert is_policy_module(pl_module)
        problems = ranks_of(trainer).run_on_rank_zero(lambda: find_problems(_store(trainer), checksums=self.repair))
        if not self.repair:
            problems.refuse()
        damaged = [stored.path for stored, _ in problems.damaged]
        for stored, pairs in ((data.stored, data.train_set), (data.stored_held_out, data.val_set)):
            before = None if stored.path in damaged else stored.manifest.get("settings")
            if before is None:
                continue
            if changed := differences(before["pairs"], Round.as_stored(_settings(pl_module, data, pairs))["pairs"]):
                raise ChangedSettingsError(
                    f"{stored.path} was made with other settings:\n"
                    + "\n".join(f"  {line}" for line in changed)
                    + "\nGive this run a directory of its own (--trainer.default_root_dir DIR)."
                )
        self._run = (trainer, pl_module, data)
        data.prepare_with(self)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The run directory is this run's from here on: clear it up."""
        ranks_of(trainer).run_on_rank_zero(lambda: self._clear_up(_store(trainer)))

    def _clear_up(self, store: RoundStore) -> None:
        if self.repair:
            move_aside(store, find_problems(store).strangers)
            for stored in {stored.path: stored for stored, _ in find_problems(store).damaged}.values():
                console.print(f"Repairing {stored.path}", soft_wrap=True)
                stored.delete()
        store.tidy()

    def prepare_round(self, index: int) -> None:
        """Store the pairs of all epochs with their log-probs, where they are not there."""
        assert self._run is not None
        trainer, module, data = self._run
        for stored, pairs in ((data.stored, data.train_set), (data.stored_held_out, data.val_set)):
            settings = Round.as_stored(_settings(module, data, pairs))

            def keep_pairs(
                stored: Round = stored, pairs: list[OfflinePair] = pairs, settings: dict[str, Any] = settings
            ) -> bool:
                """Store the pairs; whether their log-probs are there already."""
                if stored.is_complete("logps") and stored.manifest["settings"]["logps"] == settings["logps"]:
                    return True
                stored.update(settings=settings)
                if not stored.is_complete("pairs"):
                    responses, indices = as_tables(pairs)
                    stored.write_shard("responses", 0, responses)
                    stored.complete("responses", responses=len(responses))
                    stored.write_shard("pairs", 0, indices)
                    stored.complete("pairs", pairs=len(pairs), dropped=data.dropped)
                return False

            if pairs and not ranks_of(trainer).run_on_rank_zero(keep_pairs):
                self._logps(trainer, module, data, stored, pairs)

    def finish_run(self, rounds: int) -> None:
        """Nothing is measured at the end of a run over fixed pairs."""

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._run = None

    def _logps(
        self,
        trainer: L.Trainer,
        module: PolicyModule,
        data: OfflineDataModule,
        stored: Round,
        pairs: list[OfflinePair],
    ) -> None:
        given = _given(pairs) if "old_logps" in module.needs else None
        if given is not None and "old_token_logps" in module.needs:
            raise InputError(
                f"`data.pairs` has log-probs of whole responses, but `model.loss` {type(module.loss).__name__} needs "
                "those of every token. Set --data.use_logprobs false, and this policy's own are taken."
            )
        policies = {}
        if "old_logps" in module.needs and given is None:
            policies["old"] = logps_function(trainer, module, _starting_policy(trainer, module))
        if "reference_logps" in module.needs:
            policies["reference"] = logps_function(trainer, module, module.load_reference())
        show = trainer.is_global_zero and trainer.progress_bar_callback is not None
        ranks, what = ranks_of(trainer), "log-probs of pairs"
        total = 2 * len(pairs) * len(policies)
        with ranks.phase(what), phase(what, total, "answers", show) as report, steady(module):
            divide = steps_by_length(self.logps_batch_tokens, ranks)
            if not stored.is_held_out:
                divide = partial(data.training_steps, 0)
            known = None if given is None else {"old": given}
            store_logps(stored, policies, divide, data.temperature, report, ranks, module.needs, known)
        if given is not None:
            self._compare(trainer, module, data, pairs)

    def _compare(
        self, trainer: L.Trainer, module: PolicyModule, data: OfflineDataModule, pairs: list[OfflinePair]
    ) -> None:
        """Warn if the log-probs in the data are not those of the policy that this run starts from."""

        logps = logps_function(trainer, module, _starting_policy(trainer, module))
        few = pairs[:4]
        rows = pack([PrefixGroup(p.prompt_tokens, p.tokens) for p in few])
        own = rows.sum_per_response(logps(rows, data.temperature).cpu()).double().numpy()
        theirs = np.array([value for p in few for value in p.logps or ()])
        off = float(np.mean(np.abs(own - theirs) / [len(tokens) for p in few for tokens in p.tokens]))
        if off > SURPRISE:
            warn(
                f"the log-probs in the data are {off:.2f} nats a token from this policy's at "
                f"temperature {data.temperature:g}. They are used as those of the policy that drew the answers; with "
                "--data.use_logprobs false this policy's own are taken."
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
    """The policy before its first update, also in a run that goes on."""
    if trainer.global_step == 0:
        return callable_policy(trainer)
    return shard_frozen(trainer, module.unit(module.load(module.source)))


def _given(pairs: Sequence[OfflinePair]) -> np.ndarray | None:
    """The log-probs that came with the data, of each pair's two responses; None where some pair has none."""
    given = [pair.logps for pair in pairs if pair.logps is not None]
    return np.array(given).ravel() if len(given) == len(pairs) else None
