"""`rollout.refill`: a round samples further prompts in place of those that give it nothing to train on."""

from collections.abc import Callable
from typing import Any

from rlhf_pl.data.policy_module import PolicyModule
from rlhf_pl.data.prompts import slice_start, take_prompts
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.rounds.settings import RoundOptions
from rlhf_pl.store.round_store import Round
from rlhf_pl.store.waves import REFILL
from rlhf_pl.utils.console import console
from rlhf_pl.utils.errors import InputError


def check_refill(module: PolicyModule, data: RoundDataModule, options: RoundOptions) -> None:
    """Refuse `rollout.refill` where there are no further prompts, or where no reward decides about a prompt's use.

    Raises:
        InputError: The option would have no effect.
    """
    if options.refill == 0 or options.from_other_run:  # the other run has refilled its rounds, or not
        return
    per_round, total = data.prompts_per_round, len(data.train_prompts)
    if per_round is None or per_round >= total:
        raise InputError(
            f"`rollout.refill` is {options.refill}, but `data.prompts_per_round` is "
            f"{'null' if per_round is None else per_round}: every round samples all {total} training prompts, so none "
            "is left to refill it from. Lower `data.prompts_per_round`, or leave `rollout.refill` out."
        )
    if not module.loss.uses_pairs and "rewards" not in module.needs and not options.drop_truncated:
        raise InputError(
            f"`rollout.refill` is {options.refill}, but `model.loss` {type(module.loss).__name__} reads no rewards, so "
            "prompts without a difference in reward are of use to it. Leave it out, or set `rollout.drop_truncated`."
        )


def plan_first_wave(data: RoundDataModule, options: RoundOptions, index: int, prompts_per_shard: int) -> dict[str, Any]:
    """The entry `refill` of a new round's manifest; empty where the round has the prompts of a run without refill.

    Args:
        data: Holds the prompts and the store.
        options: How rounds are made.
        index: The round.
        prompts_per_shard: Prompts per shard of the round's first prompts.
    """
    total = len(data.train_prompts)
    size = min(data.prompts_per_round or total, total)
    start = _find_start(data, index, size * (1 + options.refill))
    if start is None and options.refill == 0:
        return {}
    start = slice_start(index, size, total) if start is None else start
    end = take_prompts(data.train_prompts, start, size, data.seed)[1]
    wave = {"prompts": size, "prompts_per_shard": prompts_per_shard}
    return {REFILL: {"start": start, "end": end, "waves": [wave]}}


def _find_start(data: RoundDataModule, index: int, most: int) -> int | None:
    """Where a round's prompts begin: where those of the round before it end. None if no manifest records that.

    Args:
        data: Holds the store.
        index: The round.
        most: Maximum number of prompts of a round, the distance that is kept for each round that is lost.
    """
    for lost in range(index):
        manifest = data.store.round(index - 1 - lost).manifest
        if REFILL in manifest:
            return manifest[REFILL]["end"] + lost * most
        if "settings" in manifest:
            break
    return None


def open_wave(
    stored: Round,
    data: RoundDataModule,
    options: RoundOptions,
    count_usable: Callable[[], int],
    prompts_per_shard: Callable[[int], int],
) -> bool:
    """Add further prompts to a scored round, as many as it lacks usable ones, for its missing shards to be made.

    What is added depends on stored responses and rewards alone, and it is added by one write of the manifest, so a
    killed run adds the same prompts. A round that once was complete gets no further ones, whatever is changed later.

    Args:
        stored: The round; all its responses have been scored.
        data: Holds the prompts.
        options: How rounds are made.
        count_usable: Counts the prompts that the round can train on, of all those sampled so far.
        prompts_per_shard: (prompts to sample) -> prompts per shard.

    Returns:
        Whether prompts were added.
    """
    manifest = stored.manifest
    if options.refill == 0 or REFILL not in manifest or manifest[REFILL].get("complete"):
        return False
    refill, wanted = manifest[REFILL], data.prompts_per_round
    assert wanted is not None  # see `check_refill`
    waves = refill["waves"]
    sampled = sum(wave["prompts"] for wave in waves)
    waves[-1]["usable"] = usable = count_usable()
    count = min(wanted - usable, len(data.train_prompts) - sampled)
    if count <= 0 or len(waves) > options.refill:
        stored.update(refill=refill | {"complete": True})
        return False
    refill["end"] = take_prompts(data.train_prompts, refill["start"], sampled + count, data.seed)[1]
    waves.append({"prompts": count, "prompts_per_shard": prompts_per_shard(count)})
    prompts = manifest["prompts"] | {"in_round": sampled + count}
    stored.extend(("responses", "rewards"), refill=refill, prompts=prompts)
    console.print(
        f"{stored.name}: {usable} of {wanted} prompts are usable. Refill {len(waves) - 1} of at most {options.refill}: "
        f"{count} more.",
        soft_wrap=True,
    )
    return True
