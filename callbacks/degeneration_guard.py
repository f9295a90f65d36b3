"""Watches for the ways in which online RLHF goes wrong quietly."""

import math
from typing import Any

import lightning as L

from rlhf_pl.checkpointing.progress import inside_round, rounds_done, stopped_inside
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.modules.logging import keep, publish
from rlhf_pl.rounds.degeneration import answer_statistics
from rlhf_pl.rounds.metrics import policy_kl
from rlhf_pl.store.round_store import Round
from rlhf_pl.utils.console import warn
from rlhf_pl.utils.errors import InputError

SIGNS = ("kl", "distinct", "identical", "length", "pairs", "reward_std")


class DegenerationError(InputError):
    """The policy has degenerated, and the run was asked to stop then."""


class DegenerationGuard(L.Callback):
    """Warns once per round of signs that the policy or the reward has collapsed, and stops the run where asked to.

    The warnings are printed, kept in the round's manifest, and counted in `guard/warnings`.

    Args:
        max_kl: `kl`: the KL between the policy and the one that generated the round, in nats per answer, above this:
            KL(old || new) over all pairs of the round, or KL(new || old) over the held-out responses of the new policy;
            `.inf` for no limit.
        min_distinct: `distinct`: of the runs of three tokens inside an answer, the share that is not a repetition
            (mean over the answers) below this: the policy loops.
        max_identical: `identical`: the share of answers that equal another answer to their prompt, above this.
        max_length_ratio: `length`: the mean answer is so many times longer or shorter than in the first round; `.inf`
            for no limit.
        min_pair_share: `pairs`: the share of prompts that give a usable pair, below this.
        min_reward_std: `reward_std`: the standard deviation of all rewards of a round, below this, in reward units.
        stop_on: Signs that stop the run instead, before it trains on such answers; `all` for any of them.
    """

    def __init__(
        self,
        max_kl: float = 50.0,
        min_distinct: float = 0.3,
        max_identical: float = 0.8,
        max_length_ratio: float = 4.0,
        min_pair_share: float = 0.1,
        min_reward_std: float = 1e-4,
        stop_on: list[str] | None = None,
    ) -> None:
        rules = [
            ("max_kl", max_kl > 0, "above 0 nats"),
            ("min_distinct", 0 <= min_distinct <= 1, "a share from 0 to 1"),
            ("max_identical", 0 <= max_identical <= 1, "a share from 0 to 1"),
            ("max_length_ratio", max_length_ratio >= 1, "1 or more"),
            ("min_pair_share", 0 <= min_pair_share <= 1, "a share from 0 to 1"),
            ("min_reward_std", 0 <= min_reward_std < math.inf, "0 or more, and finite"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise InputError(f"`guards.{name}` must be {rule}, got {locals()[name]}.")
        unknown = set(stop_on or ()) - {*SIGNS, "all"}
        if unknown:
            raise InputError(f"`guards.stop_on` names {sorted(unknown)}; the signs are {', '.join(SIGNS)}, or `all`.")
        self.max_kl = max_kl
        self.min_distinct = min_distinct
        self.max_identical = max_identical
        self.max_length_ratio = max_length_ratio
        self.min_pair_share = min_pair_share
        self.min_reward_std = min_reward_std
        self.stop_on = set(SIGNS) if "all" in (stop_on or ()) else set(stop_on or ())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What an earlier process logged of a round that goes on, for callbacks that monitor it."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, RoundDataModule) or not inside_round(trainer):
            return
        stored = data.store.round(rounds_done(trainer))
        seen = ranks_of(trainer).run_on_rank_zero(lambda: _statistics(stored))
        warnings = float(len(stored.manifest.get("warnings", {})))
        keep(trainer, {**{f"rollout/{name}": value for name, value in seen.items()}, "guard/warnings": warnings})

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The round's answers, before they are trained on."""
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, RoundDataModule):
            index = rounds_done(trainer)
            stored, first = data.store.round(index), data.store.round(0)
            if stored.is_complete("rewards"):
                self._judge(trainer, stored, self._signs_of_answers(trainer, stored, first), trainer.global_step)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """How far the round's training went."""
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, RoundDataModule) and not stopped_inside(trainer):
            stored = data.store.round(rounds_done(trainer) - 1)
            found = {
                "KL(old || new)": stored.manifest["stages"].get("training", {}).get("kl"),
                "KL(new || old) on held-out prompts": policy_kl(data.store.held_out(rounds_done(trainer))).get(
                    "new_old"
                ),
            }
            high = [f"{name} {kl:.1f}" for name, kl in found.items() if kl is not None and not kl <= self.max_kl]
            if high:
                sign = (
                    f"{', '.join(high)} nats per answer (k1), above {self.max_kl:g}; lower the learning rate or "
                    "`model.loss.eta`"
                )
                self._judge(trainer, stored, {"kl": sign}, max(0, trainer.global_step - 1))

    def _signs_of_answers(self, trainer: L.Trainer, stored: Round, first: Round) -> dict[str, str]:
        seen = ranks_of(trainer).run_on_rank_zero(lambda: _statistics(stored))
        publish(trainer, {f"rollout/{name}": value for name, value in seen.items()}, trainer.global_step)
        length, at_first = (r.info("responses")["tokens_mean"] for r in (stored, first))
        ratio = max(length, at_first) / max(1e-9, min(length, at_first))
        pairs, std = stored.info("pairs"), stored.info("rewards")["std"]
        share = pairs["pairs"] / max(1, pairs["prompts"])
        reasons = ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in pairs["dropped"].items() if count)
        signs: dict[str, tuple[bool, str]] = {
            "distinct": (
                seen["distinct_3"] < self.min_distinct,
                f"the answers repeat themselves: {seen['distinct_3']:.0%} of their runs of three tokens are distinct, "
                f"below {self.min_distinct:.0%}",
            ),
            "identical": (
                seen["identical_share"] > self.max_identical,
                f"{seen['identical_share']:.0%} of the answers equal another one to their prompt, above "
                f"{self.max_identical:.0%}",
            ),
            "length": (
                ratio > self.max_length_ratio,
                f"the mean answer has {length:.0f} tokens, against {at_first:.0f} in round 1",
            ),
            "pairs": (
                share < self.min_pair_share or pairs["pairs"] == 0,
                f"{pairs['pairs']} of {pairs['prompts']} prompts give a usable pair ({reasons})"
                + ("; there is nothing to train on in this round" if pairs["pairs"] == 0 else ""),
            ),
            "reward_std": (
                std < self.min_reward_std,
                f"the rewards hardly differ: standard deviation {std:.2g}, below {self.min_reward_std:g}",
            ),
        }
        return {name: text for name, (bad, text) in signs.items() if bad}

    def _judge(self, trainer: L.Trainer, stored: Round, signs: dict[str, str], step: int) -> None:
        known: dict[str, Any] = ranks_of(trainer).broadcast(stored.manifest.get("warnings", {}))
        if signs and {**known, **signs} != known:
            ranks_of(trainer).run_on_rank_zero(lambda: stored.update(warnings=known | signs))
        number = int(stored.path.name) + 1
        for text in signs.values():
            warn(f"round {number}: {text}.")
        publish(trainer, {"guard/warnings": float(len(signs))}, step)
        if fatal := [text for name, text in signs.items() if name in self.stop_on]:
            raise DegenerationError(
                f"Stopped in round {number} (`guards.stop_on`): {'; '.join(fatal)}. The last policy is in "
                f"{trainer.default_root_dir}/checkpoints. To go on, change what led here, or the guard's limits."
            )


def _statistics(stored: Round) -> dict[str, float]:
    return answer_statistics(stored.read_shards("responses", ["prompt_id", "response_tokens"]))
