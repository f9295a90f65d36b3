"""Checks that the sampler samples from the policy being trained."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_pl.distributed.gather_weights import Weights
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.models.packed_batch import PackedBatch, PrefixGroup, pack
from rlhf_pl.models.rounding import round_to
from rlhf_pl.rollout.base import PromptTokens, Sampler, SamplingConfig
from rlhf_pl.utils.errors import InputError


class StaleSamplerError(RuntimeError):
    """The sampler's weights are not the policy's."""


def tolerance(*dtypes: str) -> float:
    """The mean difference per token, in nats, that rounding can explain in any chat model.

    Measured on SmolLM2-135M: 4e-5 if both sides compute in float32, 0.025 to 0.04 if one computes in bfloat16.
    """
    return 1e-3 if all(dtype == "float32" for dtype in dtypes) else 0.1


TIMES_ROUNDING = 4.0  # limit, relative to the policy's own difference between dtypes; 0.6 to 1.5 was measured


def sync_weights(sampler: Sampler, weights: Weights) -> None:
    """Sync weights to the sampler; a tensor that does not arrive leaves NaNs instead of previous weights."""
    sampler.invalidate_weights(weights.like)
    sampler.load_weights(weights.stream())


def check_sampler(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    policy: Callable[[PackedBatch, float], Tensor],
    weights: Weights,
    limit: float,
    response_tokens: int = 8,
    rounding: Callable[[PackedBatch], float] = lambda rows: 0.0,
    ranks: Ranks = Ranks(),  # noqa: B008 - one process
) -> float:
    """Compare the sampler's readable weights, and its log-probs of tokens it samples, with the policy's.

    Args:
        sampler: A sampler that has just got the policy's weights.
        prompts: Token ids of a few prompts.
        policy: (rows, temperature) -> log-probs of the M target tokens, shape (M,).
        weights: The policy's weights, by their Hugging Face names.
        limit: Largest accepted mean absolute difference per token, nats; see `tolerance`.
        response_tokens: Tokens to sample per prompt.
        rounding: rows -> mean absolute difference per token between dtypes in the policy itself. If the difference
            is above `limit`, the limit is raised to `TIMES_ROUNDING` times that.
        ranks: All ranks check their samplers together.

    Returns:
        The mean absolute difference per token, nats.

    Raises:
        StaleSamplerError: A weight differs, or the difference is above `limit`.
        InputError: The policy's own log-probs are not finite.
    """
    if wrong := next(filter(None, ranks.all_gather(_find_wrong_weights(sampler, weights))), []):
        raise StaleSamplerError(
            f"The sampler does not have the policy's weights: {', '.join(wrong[:3])}"
            + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            + " differ after the weight sync. This round would train on responses of another model."
        )
    sampling = SamplingConfig(num_responses=1, max_response_tokens=response_tokens)
    requests = [PromptTokens(list(ids), seed) for seed, ids in enumerate(prompts)]
    sampled = {index: responses[0] for index, responses in sampler.generate(requests, sampling)}
    rows = pack([PrefixGroup(prompts[i], (sampled[i].token_ids,)) for i in range(len(prompts))])
    expected = policy(rows, 1.0).cpu()
    if not all(ranks.all_gather(bool(expected.isfinite().all()))):
        raise InputError(
            "The policy's log-probs are not finite: training has diverged. Continue from an earlier checkpoint "
            "(--ckpt_path) with a lower learning rate (--model.optimizer.lr) or gradient clipping "
            "(--trainer.gradient_clip_val 1)."
        )
    actual = torch.tensor([logp for i in range(len(prompts)) for logp in sampled[i].logps])
    errors = ranks.all_gather((actual - expected).abs().mean().item())
    error = max(errors, key=lambda e: (e != e, e))  # NaN counts as the largest
    if error > limit:
        limit = max(limit, TIMES_ROUNDING * max(ranks.all_gather(rounding(rows))))
    if not error <= limit:
        raise StaleSamplerError(
            f"The sampler does not sample from the policy: its log-probs differ by {error:.3g} nats per token on "
            f"average, and rounding explains at most {limit:g}. Its weights are stale or wrong; this round would train "
            "on responses of another model."
        )
    return error


@torch.no_grad()
def _find_wrong_weights(sampler: Sampler, weights: Weights) -> list[str]:
    """Names of the sampler's readable tensors that differ from the policy's, cast to the sampler's dtype."""
    readable = dict(sampler.readable_weights())
    wrong = []
    for name, expected in weights.stream() if readable else ():
        actual = readable.get(name)
        if actual is not None and expected.shape == actual.shape:
            is_equal = torch.equal(round_to(expected.detach(), actual.dtype).to(actual.device), actual)
            if not is_equal:
                wrong.append(name)
    return wrong
