"""What is refused of a run in rounds before its weights load."""

from collections.abc import Hashable, Sequence

import lightning as L

from rlhf_pl.data.policy_module import PolicyModule, is_policy_module
from rlhf_pl.data.prompts import Prompt
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.modules.monitors import check_monitors
from rlhf_pl.rewards import Sample
from rlhf_pl.rewards.guard import try_reward
from rlhf_pl.rollout import Sampler
from rlhf_pl.rounds.metrics import metric_names
from rlhf_pl.rounds.settings import RoundOptions, check_noted_logps
from rlhf_pl.utils.errors import InputError

_LACKING = (
    "Metrics of answers come from held-out prompts: set `data.val_prompts`. Those of held-out pairs also need "
    "`rollout.val_num_responses` of 2 or more."
)
_MAX_KINDS = 64  # of conversations that a reward is checked with, each with three responses


def check_round_monitors(
    trainer: L.Trainer, module: L.LightningModule, data: RoundDataModule, options: RoundOptions | None
) -> None:
    """Refuse callbacks and schedules that follow a metric which the run will not have.

    Raises:
        InputError: Lists the metrics that it will have.
    """
    has_pairs = options is None or (data.val_prompts and options.val_sampling.num_responses > 1)
    validates = bool(has_pairs) and data.max_val_pairs > 0 and trainer.limit_val_batches != 0
    measured: list[str] = []
    if options is not None and is_policy_module(module):
        measured = metric_names(options, module.has_reference, bool(data.val_prompts))
    check_monitors(trainer, module, validates, measured, _LACKING)


def check_sampling(
    trainer: L.Trainer, module: PolicyModule, data: RoundDataModule, sampler: Sampler, options: RoundOptions
) -> None:
    """Whether the sampler can be started, and samples what the policy and the options ask for.

    Raises:
        InputError: Says what does not fit together.
    """
    if trainer.world_size % sampler.ranks_per_engine:
        raise InputError(
            f"`rollout.sampler`: engines of {sampler.ranks_per_engine} ranks each do not divide the "
            f"{trainer.world_size} ranks of this run. Change tensor_parallel_size or the number of devices."
        )
    sampler.check()
    longest = data.max_prompt_tokens + options.sampling.max_response_tokens
    if options.old_logps == "sampler":
        check_noted_logps(options.sampling, sampler.reshapes())
    if longest > module.source.max_context_tokens:
        raise InputError(
            f"`data.max_prompt_tokens` + `rollout.sampling.max_response_tokens` = {data.max_prompt_tokens} + "
            f"{options.sampling.max_response_tokens} = {longest} is over the context of {module.source.path!r}, "
            f"{module.source.max_context_tokens} tokens. Lower one of them."
        )
    sampler.check_rotary(module.source.config, data.longest_tokens)
    if options.reward.by_prompt and data.val_prompts and options.val_sampling.num_responses < 2:
        raise InputError(
            f"`rollout.val_num_responses` must be 2 or more: {options.reward.name} compares a prompt's answers "
            "with each other, on held-out prompts too."
        )


def check_reward(trainer: L.Trainer, data: RoundDataModule, options: RoundOptions) -> None:
    """Try the reward on made-up responses to real prompts, on rank 0.

    Raises:
        InputError: It fails.
    """
    trial = _trial_samples([*data.train_prompts, *data.val_prompts])
    ranks_of(trainer).run_on_rank_zero(lambda: try_reward(options.reward, trial, options.scoring))


def _trial_samples(prompts: Sequence[Prompt]) -> list[Sample]:
    """Real prompts with made-up responses: two, and one of every further kind of conversation."""
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
    """What templates tell conversations apart by: tools, roles with their keys, and who follows whom."""
    turns = frozenset((m["role"], type(m.get("content")), frozenset(m)) for m in prompt.messages)
    roles = [m["role"] for m in prompt.messages]
    return bool(prompt.tools), turns, frozenset(zip(["", *roles], roles, strict=False))
