"""Checks of a run that takes its rounds from another one, before anything is written."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from rlhf_pl.algorithms.prompt_groups import SAMPLING_LOGPS
from rlhf_pl.data.policy_module import PolicyModule
from rlhf_pl.rollout import SamplingConfig
from rlhf_pl.rounds.settings import RoundOptions, drops_equal_groups, pair_selector
from rlhf_pl.rounds.stages.given import find_missing, read_given
from rlhf_pl.rounds.stages.sampler_logps import SUM, TOKENS
from rlhf_pl.rounds.stages.select import make_selection
from rlhf_pl.rounds.stored_rounds import StoredRounds
from rlhf_pl.store.files import DamagedStoreError
from rlhf_pl.store.provenance import list_differences
from rlhf_pl.store.source_run import SourceRound, as_foreign
from rlhf_pl.utils.errors import InputError

# settings of stored responses that must be those of this run, with the options that they depend on
_MUST_AGREE = {
    "prompts": "data.prompts, data.val_prompts, data.max_prompt_tokens, the chat template or the tokenizer",
    "prompts_per_round": "data.prompts_per_round",
    "rotary_factors": "the longest row of the run",
}
_TEXTS = 8  # responses whose tokens are compared with their texts


def check_rounds(rounds: StoredRounds, wanted: int | None) -> None:
    """Refuse a directory without rounds, and more rounds than it has.

    Args:
        rounds: The rounds.
        wanted: `trainer.max_epochs`.

    Raises:
        InputError: Says what there is, and which option to set.
    """
    if wanted is not None and wanted >= 0 and all(map(rounds.is_copied, range(wanted))) and rounds.run:
        return
    rounds.source.check()
    assert rounds.run
    count = rounds.source.count()
    if wanted is None or not 0 <= wanted <= count:
        raise InputError(
            f"`trainer.max_epochs` is {wanted}, but `--rounds_from` {str(rounds.source.run_dir)!r} has {count} "
            f"round{'s' * (count != 1)} whose responses and rewards are complete. Set --trainer.max_epochs {count} or "
            "fewer."
        )


def refuse_differences(source: SourceRound, module: PolicyModule, now: dict[str, Any], accept_changes: bool) -> None:
    """Refuse settings that contradict the stored first round, before any weights load.

    Args:
        source: The first round.
        module: The module that trains on it.
        now: This run's settings of the stage `responses`.
        accept_changes: Whether to go on nevertheless.

    Raises:
        InputError: Lists the differences.
    """
    before = source.settings
    differences: list[str] = []
    for name, options in _MUST_AGREE.items() if before else ():
        lines = list_differences({name: before.get(name)}, {name: now.get(name)})
        differences += [f"{line} ({options})" for line in lines]
    training = source.manifest.get("settings", {}).get("training", {})
    if (dtype := training.get("dtype", module.dtype_name)) != module.dtype_name:
        differences.append(f"dtype: {dtype} -> {module.dtype_name} (model.dtype)")
    if source.made_by["weights"] is None and before.get("policy", module.source.path) != module.source.path:
        differences.append(f"policy: {before['policy']} -> {module.source.path} (model.policy)")
    if (text := _find_other_text(source, module.source.tokenizer)) is not None:
        differences.append(f"tokenizer: it decodes a stored response to {text!r} (model.policy)")
    if differences and not accept_changes:
        raise InputError(
            f"`--rounds_from`: {source.stored.path} was made with other settings than those of this run:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nSet these options as in that run's config.yaml, or add --accept_changes to train on its rounds "
            "nevertheless."
        )


def _find_other_text(source: SourceRound, tokenizer: Any) -> str | None:
    """The text of a stored response by this tokenizer, if it is not the stored text."""
    rows = next(source.tables("responses")).slice(0, _TEXTS).select(["response", "response_tokens"]).to_pylist()
    texts = [tokenizer.decode(row["response_tokens"], skip_special_tokens=True) for row in rows]
    return next((text[:40] for text, row in zip(texts, rows, strict=True) if text != row["response"]), None)


def check_files(source: SourceRound, module: PolicyModule) -> None:
    """Refuse a round with a damaged file, or whose responses have tokens that the policy has no embeddings for.

    Raises:
        InputError: A file that would be copied is missing or damaged, or the tokens do not fit the policy.
    """
    read_given(source)
    source.read("rewards")
    for table in source.tables("responses"):
        ids = table["response_tokens"].combine_chunks().flatten().to_numpy()
        most = [int(ids.max())] if len(ids) else []
        module.source.check_ids([(f"a response in {source.stored.path}", most)], "--rounds_from")


def refuse_other_start(
    name: str, made_by: Mapping[str, Any], module: PolicyModule, weights: str, accept_changes: bool
) -> bool:
    """Refuse to start from another policy than the one that sampled the first round.

    Args:
        name: Name of the round.
        made_by: The policy that sampled it, by `policy` and `weights`.
        module: Holds the policy.
        weights: Fingerprint of the weights that this run starts from.
        accept_changes: Whether to go on nevertheless.

    Returns:
        Whether the policies differ.

    Raises:
        InputError: They do, and that is not accepted.
    """
    if made_by["weights"] in (None, weights):
        return False
    if not accept_changes:
        before = {"policy": made_by["policy"], "weights": made_by["weights"]}
        lines = list_differences(before, {"policy": module.source.path, "weights": weights})
        raise InputError(
            f"`--rounds_from`: another policy than the one that this run starts from has sampled {name}:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nStart from that policy (`model.policy`, `model.dtype`, `model.lora` as in that run's config.yaml), or "
            "add --accept_changes to train on its responses off-policy, with the log-probs that are stored there as "
            f"those of {'the policy that sampled' if SAMPLING_LOGPS in module.needs else 'pi_old'}."
        )
    return True


def check_stored_logps(
    source: SourceRound, module: PolicyModule, options: RoundOptions, run_seed: int, ties: tuple[bool, bool]
) -> None:
    """Refuse an off-policy round that lacks the log-probs under pi_old of a response that this run would use.

    Args:
        source: The round.
        module: The module that trains on it.
        options: How this run selects.
        run_seed: The run's seed.
        ties: Whether pairs with equal rewards are selected: see `make_selection`.

    Raises:
        InputError: Says what is missing, and the ways out.
    """
    if "old_logps" not in module.needs:
        return
    path, has_sampled = source.stored.path, TOKENS in source.info("responses")
    if options.old_logps == "sampler":
        lacks_sums = any(table[SUM].null_count for table in source.tables("responses"))
        if lacks_sums or ("old_token_logps" in module.needs and not has_sampled):
            lacking = "log-probs" if lacks_sums else "the log-prob of every token"
            raise InputError(
                f"`rollout.old_logps` is sampler, but the responses of {path} were sampled without {lacking}. Set it "
                "to policy."
            )
        return
    if SAMPLING_LOGPS in module.needs and has_sampled:
        return
    given = read_given(source)
    try:
        selector, drop_equal = pair_selector(module, options), drops_equal_groups(module, options)
        table, _ = make_selection(
            source.stored,
            selector,
            run_seed,
            None,
            options.shaping,
            *ties,
            drop_equal,
            module.loss.needs_responses,
            options.drop_truncated,
        )
    except DamagedStoreError as error:
        raise as_foreign(error) from error
    names = [name for name in ("chosen_index", "rejected_index", "response_index") if name in table.column_names]
    prompt_ids = pa.concat_arrays([table["prompt_id"].combine_chunks()] * len(names))
    indices = pa.concat_arrays([table[name].combine_chunks() for name in names])
    if missing := find_missing(given, prompt_ids, indices, module.needs):
        raise InputError(
            f"`model.loss` {type(module.loss).__name__} needs log-probs under the policy that sampled the round, which "
            f"is not this run's for {path}, and there are {missing}. Use the selector and the shaping of that run, "
            "make its rounds with `rollout.store_token_logps: true`, or train on its first round alone "
            "(--trainer.max_epochs 1)."
        )


def list_unused(given: SamplingConfig, stored: SamplingConfig, seeds: tuple[Any, int]) -> list[str]:
    """The settings of this run that stored rounds replace: `name: that of the rounds, not this one`.

    Args:
        given: The sampling settings of this run's config.
        stored: How the responses were sampled.
        seeds: The seed of the rounds, and that of this run.
    """
    before, now = vars(stored), vars(given)
    lines = [f"{name} {before[name]}, not {now[name]}" for name in before if before[name] != now[name]]
    if seeds[0] not in (None, seeds[1]):
        lines.append(f"seed {seeds[0]}, while seed {seeds[1]} orders the updates")
    return lines
