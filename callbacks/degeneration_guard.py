"""Detects silent failures of online RLHF: collapse of the policy or the reward."""

import math
from typing import Any

import lightning as L

from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.algorithms.step_options import describe_smaller_steps
from rlhf_pl.checkpointing.progress import has_stopped_inside, is_inside_round, rounds_done
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.modules.logging import expose_metrics, publish_metrics
from rlhf_pl.rounds.degeneration import response_statistics
from rlhf_pl.rounds.metrics import policy_kl
from rlhf_pl.rounds.report.left_out import describe_dropped
from rlhf_pl.store.round_store import Round
from rlhf_pl.utils.console import warn
from rlhf_pl.utils.errors import InputError

SIGNS = ("kl", "distinct", "identical", "length", "pairs", "reward_std")


class DegenerationError(InputError):
    """The policy has degenerated, and `guards.stop_on` stops the run."""


class DegenerationGuard(L.Callback):
    """Warns once per round of signs that the policy or the reward has collapsed; on the signs in `stop_on` it stops.

    Warnings are printed, kept in the round's manifest, and counted in `guard/warnings`.

    Args:
        max_kl: Sign `kl`: the KL between the policy and pi_old is above this, in nats per response. It is KL(old ||
            new) over all pairs of the round, or KL(new || old) over the new policy's held-out responses; `.inf` for no
            limit.
        min_distinct: Sign `distinct`: the share of distinct trigrams of tokens in a response (mean over responses) is
            below this, because the policy repeats itself.
        max_identical: Sign `identical`: the share of responses that equal another response to their prompt is above
            this.
        max_length_ratio: Sign `length`: the mean response is longer or shorter than in the first round by more than
            this factor; `.inf` for no limit.
        min_pair_share: Sign `pairs`: the share of prompts with a usable pair is below this.
        min_reward_std: Sign `reward_std`: the standard deviation of all rewards of a round is below this, in reward
            units.
        stop_on: Signs that stop the run, before it trains on such responses; `all` for any of them.
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
        """Let callbacks monitor the metrics that an earlier process has logged of a resumed round."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, RoundDataModule) or not is_inside_round(trainer):
            return
        stored = data.store.round(rounds_done(trainer))
        statistics = ranks_of(trainer).run_on_rank_zero(lambda: _statistics(stored))
        warnings = float(len(stored.manifest.get("warnings", {})))
        metrics = {f"rollout/{name}": value for name, value in statistics.items()}
        expose_metrics(trainer, {**metrics, "guard/warnings": warnings})

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the round's responses before the policy trains on them."""
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, RoundDataModule):
            index = rounds_done(trainer)
            stored, first = data.store.round(index), data.store.round(0)
            if stored.is_complete("rewards"):
                self._report(trainer, stored, self._response_signs(trainer, stored, first), trainer.global_step)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check how far the round's training has moved the policy."""
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, RoundDataModule) and not has_stopped_inside(trainer):
            stored = data.store.round(rounds_done(trainer) - 1)
            kls = {
                "KL(old || new)": stored.manifest["stages"].get("training", {}).get("kl"),
                "KL(new || old) on held-out prompts": policy_kl(data.store.held_out(rounds_done(trainer))).get(
                    "new_old"
                ),
            }
            high = [f"{name} {kl:.1f}" for name, kl in kls.items() if kl is not None and not kl <= self.max_kl]
            if high:
                loss = getattr(pl_module, "loss", None)
                smaller = describe_smaller_steps(loss) if isinstance(loss, PolicyLoss) else ""
                sign = (
                    f"{', '.join(high)} nats per response (k1), above {self.max_kl:g}; lower `--model.optimizer.lr`"
                    + (f", or {smaller}" if smaller else "")
                )
                self._report(trainer, stored, {"kl": sign}, max(0, trainer.global_step - 1))

    def _response_signs(self, trainer: L.Trainer, stored: Round, first: Round) -> dict[str, str]:
        """Descriptions of the signs of collapse in a round's responses, by sign."""
        statistics = ranks_of(trainer).run_on_rank_zero(lambda: _statistics(stored))
        publish_metrics(trainer, {f"rollout/{name}": value for name, value in statistics.items()}, trainer.global_step)
        length, first_length = (r.info("responses")["tokens_mean"] for r in (stored, first))
        ratio = max(length, first_length) / max(1e-9, min(length, first_length))
        pairs, std = stored.info("pairs"), stored.info("rewards")["std"]
        used = pairs.get("groups", pairs["pairs"])  # prompts; rounds of earlier versions have only their pairs
        share = used / max(1, pairs["prompts"])
        reasons = describe_dropped(pairs["dropped"])
        signs: dict[str, tuple[bool, str]] = {
            "distinct": (
                statistics["distinct_3"] < self.min_distinct,
                f"the responses repeat themselves: {statistics['distinct_3']:.0%} of their trigrams of tokens are "
                f"distinct, below {self.min_distinct:.0%}",
            ),
            "identical": (
                statistics["identical_share"] > self.max_identical,
                f"{statistics['identical_share']:.0%} of the responses equal another one to their prompt, above "
                f"{self.max_identical:.0%}",
            ),
            "length": (
                ratio > self.max_length_ratio,
                f"the mean response has {length:.0f} tokens, compared with {first_length:.0f} in round 1",
            ),
            "pairs": (
                share < self.min_pair_share or pairs["pairs"] == 0,
                f"{used} of {pairs['prompts']} prompts give a usable pair ({reasons})"
                + ("; there is nothing to train on in this round" if pairs["pairs"] == 0 else ""),
            ),
            "reward_std": (
                std < self.min_reward_std,
                f"the rewards hardly differ: standard deviation {std:.2g}, below {self.min_reward_std:g}",
            ),
        }
        return {name: text for name, (is_bad, text) in signs.items() if is_bad}

    def _report(self, trainer: L.Trainer, stored: Round, signs: dict[str, str], step: int) -> None:
        """Print, store and log the signs; raise if one of them stops the run."""
        known: dict[str, Any] = ranks_of(trainer).broadcast(stored.manifest.get("warnings", {}))
        if signs and {**known, **signs} != known:
            ranks_of(trainer).run_on_rank_zero(lambda: stored.update(warnings=known | signs))
        number = int(stored.path.name) + 1
        for text in signs.values():
            warn(f"round {number}: {text}.")
        publish_metrics(trainer, {"guard/warnings": float(len(signs))}, step)
        if fatal := [text for name, text in signs.items() if name in self.stop_on]:
            raise DegenerationError(
                f"Stopped in round {number} (`guards.stop_on`): {'; '.join(fatal)}. The last policy is in "
                f"{trainer.default_root_dir}/checkpoints. To continue, change the cause or the guard's limits."
            )


def _statistics(stored: Round) -> dict[str, float]:
    return response_statistics(stored.read_shards("responses", ["prompt_id", "response_tokens"]))
