"""Checks of a run in rounds before any weights load."""

from collections.abc import Hashable, Sequence

import lightning as L

from rlhf_pl.algorithms.prompt_groups import SAMPLING_LOGPS
from rlhf_pl.data.policy_module import PolicyModule, is_policy_module
from rlhf_pl.data.prompts import Prompt
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.modules.monitors import check_monitors
from rlhf_pl.rewards import Sample
from rlhf_pl.rewards.guard import try_reward
from rlhf_pl.rollout import Sampler
from rlhf_pl.rounds.logps_origins import check_sampler_logps
from rlhf_pl.rounds.metrics import HELD_OUT, metric_names
from rlhf_pl.rounds.settings import RoundOptions
from rlhf_pl.utils.errors import InputError

_MISSING_HINT = (
    "Metrics of responses come from held-out prompts: set `data.val_prompts`. Those of held-out pairs also need "
    "`rollout.val_num_responses` of 2 or more. With --rounds_from they are sampled with `rollout.evaluate: true` alone."
)
_MAX_KINDS = 64  # of conversations that a reward is tried on, each with three responses


def check_round_monitors(
    trainer: L.Trainer, module: L.LightningModule, data: RoundDataModule, options: RoundOptions | None
) -> None:
    """Refuse callbacks and schedules that monitor a metric which the run will not have.

    Raises:
        InputError: A metric is unknown; lists those that the run will have.
    """
    has_pairs = options is None or (data.val_prompts and options.val_sampling.num_responses > 1)
    validates = bool(has_pairs) and data.max_val_pairs > 0 and trainer.limit_val_batches != 0
    measured: list[str] = []
    if options is not None and is_policy_module(module):
        measured = metric_names(options, module.has_reference, bool(data.val_prompts), not module.loss.uses_pairs)
    absent = HELD_OUT if measured and not data.val_prompts else ()
    check_monitors(trainer, module, validates, measured, _MISSING_HINT, absent)


def check_sampling(
    trainer: L.Trainer, module: PolicyModule, data: RoundDataModule, sampler: Sampler, options: RoundOptions
) -> None:
    """Check that the sampler can start, and that it fits the policy and the options.

    Raises:
        InputError: Names the options that do not fit together.
    """
    if trainer.world_size % sampler.ranks_per_engine:
        raise InputError(
            f"`rollout.sampler`: engines of {sampler.ranks_per_engine} ranks each do not divide the "
            f"{trainer.world_size} ranks of this run. Change tensor_parallel_size or the number of devices."
        )
    sampler.check()
    if options.old_logps == "sampler":
        check_sampler_logps(options.sampling, sampler.reshapes())
    if SAMPLING_LOGPS in module.needs and not options.from_other_run:
        check_sampler_logps(options.sampling, sampler.reshapes(), "sampling")
    check_context(module, data, options)
    sampler.check_rotary(module.source.config, data.longest_tokens)
    if options.reward.by_prompt and data.val_prompts and options.val_sampling.num_responses < 2:
        raise InputError(
            f"`rollout.val_num_responses` must be 2 or more: {options.reward.name} compares the responses to a "
            "prompt with each other, on held-out prompts too."
        )


def check_context(module: PolicyModule, data: RoundDataModule, options: RoundOptions) -> None:
    """Refuse rows that may be longer than the policy's context.

    Raises:
        InputError: Names the options that add up to too many tokens.
    """
    longest = data.max_prompt_tokens + options.sampling.max_response_tokens
    if longest > module.source.max_context_tokens:
        raise InputError(
            f"`data.max_prompt_tokens` + `rollout.sampling.max_response_tokens` = {data.max_prompt_tokens} + "
            f"{options.sampling.max_response_tokens} = {longest} is over the context of {module.source.path!r}, "
            f"{module.source.max_context_tokens} tokens. Lower one of them."
        )


def check_reward(trainer: L.Trainer, data: RoundDataModule, options: RoundOptions) -> None:
    """Try the reward on made-up responses to real prompts, on rank 0.

    Raises:
        InputError: The reward fails.
    """
    trial = _trial_samples([*data.train_prompts, *data.val_prompts])
    ranks_of(trainer).run_on_rank_zero(lambda: try_reward(options.reward, trial, options.scoring))


def _trial_samples(prompts: Sequence[Prompt]) -> list[Sample]:
    """Made-up responses to real prompts: to the first two, and to one of every other kind of conversation."""
    responses = ["Yes, of course. Here is what I would do.", "", "word " * 40]
    kinds = {_kind(p): p for p in reversed(prompts)}
    chosen = {p.prompt_id: p for p in [*prompts[:2], *list(kinds.values())[:_MAX_KINDS]]}
    return [
        Sample(
            p.prompt_id,
            p.messages,
            text,
            (),
            finished,
            p.columns,
            tools=p.tools,
            chat_template_kwargs=p.chat_template_kwargs,
        )
        for p in chosen.values()
        for text, finished in zip(responses, (True, True, False), strict=True)
    ]


def _kind(prompt: Prompt) -> Hashable:
    """What chat templates distinguish conversations by: tools, roles with their keys, and the order of roles."""
    turns = frozenset((m["role"], type(m.get("content")), frozenset(m)) for m in prompt.messages)
    roles = [m["role"] for m in prompt.messages]
    return bool(prompt.tools), turns, frozenset(zip(["", *roles], roles, strict=False))
