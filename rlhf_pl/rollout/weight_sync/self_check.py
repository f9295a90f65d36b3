"""Proof that the sampler draws from the policy that trains."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_pl.distributed.gather_weights import Weights
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.models.packed_batch import PackedBatch, PrefixGroup, pack
from rlhf_pl.rollout.base import PromptTokens, Sampler, SamplingConfig
from rlhf_pl.utils.errors import InputError


class StaleSamplerError(RuntimeError):
    """The sampler's weights are not the policy's."""


def tolerance(*dtypes: str) -> float:
    """The mean difference per token, in nats, that rounding explains in any chat model.

    Measured on SmolLM2-135M: 4e-5 where both sides compute in float32, 0.025 to 0.04 where one is in bfloat16.
    """
    return 1e-3 if all(dtype == "float32" for dtype in dtypes) else 0.1


TIMES_ROUNDING = 4.0  # above the policy's own difference between its dtypes; 0.6 to 1.5 times was measured


def sync_weights(sampler: Sampler, weights: Weights) -> None:
    """Give the sampler new weights; a tensor that does not arrive leaves NaNs behind instead of old weights."""
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
    """Compare what can be read of the sampler's weights, and its log-probs of tokens it draws, with the policy's.

    Args:
        sampler: Has just been given the policy's weights.
        prompts: Token ids of a few prompts.
        policy: (rows, temperature) -> log-probs of the M wanted tokens, shape (M,).
        weights: The policy's, by their Hugging Face names.
        limit: The largest mean absolute difference per token to accept, nats; see `tolerance`.
        response_tokens: Tokens to draw per prompt.
        rounding: rows -> mean absolute difference per token that the dtypes make in the policy itself. Where they make
            much of one, the limit is `TIMES_ROUNDING` times that.
        ranks: All of them check their samplers together.

    Returns:
        The mean absolute difference per token, nats.

    Raises:
        StaleSamplerError: A weight differs, or the difference is above `limit`.
        InputError: The policy's own log-probs are not finite.
    """
    if wrong := next(filter(None, ranks.all_gather(_wrong_weights(sampler, weights))), []):
        raise StaleSamplerError(
            f"The sampler does not hold the policy's weights: {', '.join(wrong[:3])}"
            + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            + " differ after they were handed over. This round would train on answers of another model."
        )
    sampling = SamplingConfig(num_responses=1, max_response_tokens=response_tokens)
    requests = [PromptTokens(list(ids), seed) for seed, ids in enumerate(prompts)]
    answers = {index: responses[0] for index, responses in sampler.generate(requests, sampling)}
    rows = pack([PrefixGroup(prompts[i], (answers[i].token_ids,)) for i in range(len(prompts))])
    expected = policy(rows, 1.0).cpu()
    if not all(ranks.all_gather(bool(expected.isfinite().all()))):
        raise InputError(
            "The policy's log-probs are not finite: training has diverged. Go on from an earlier checkpoint "
            "(--ckpt_path) with a lower learning rate (--model.optimizer.lr) or gradient clipping "
            "(--trainer.gradient_clip_val 1)."
        )
    actual = torch.tensor([logp for i in range(len(prompts)) for logp in answers[i].logps])
    error = max(
        ranks.all_gather((actual - expected).abs().mean().item()), key=lambda e: (e != e, e)
    )  # NaN is the worst
    if error > limit:
        limit = max(limit, TIMES_ROUNDING * max(ranks.all_gather(rounding(rows))))
    if not error <= limit:
        raise StaleSamplerError(
            f"The sampler does not draw from the policy: its log-probs are off by {error:.3g} nats a token on average, "
            f"where rounding explains at most {limit:g}. Its weights are stale or wrong; this round would train on "
            "answers of another model."
        )
    return error


@torch.no_grad()
def _wrong_weights(sampler: Sampler, weights: Weights) -> list[str]:
    """Names of tensors that the sampler can show and that are not the policy's, cast to the sampler's dtype."""
    shown = dict(sampler.readable_weights())
    wrong = []
    for name, given in weights.stream() if shown else ():
        held = shown.get(name)
        if held is not None and given.shape == held.shape:
            same = torch.equal(given.detach().to(held.device, held.dtype), held)
            if not same:
                wrong.append(name)
    return wrong
