"""Tolerances between log-probs of one policy, and the check of the stored log-probs in a round's first update."""

import lightning as L

from rlhf_pl.data.policy_module import PolicyModule
from rlhf_pl.distributed.strategies import compute_dtype
from rlhf_pl.rollout import Sampler
from rlhf_pl.rollout.weight_sync.self_check import tolerance
from rlhf_pl.rounds.settings import RoundOptions
from rlhf_pl.utils.errors import InputError

# nats a token between log-probs computed in different batches, on different devices or by different kernels: in half
# precision, and in float32
FIRST_LOGRATIO = (0.05, 1e-3)


def sampler_tolerance(trainer: L.Trainer, module: PolicyModule, sampler: Sampler) -> float:
    """Mean difference between the policy's and its sampler's log-probs that rounding explains, nats a token."""
    return tolerance(compute_dtype(trainer, module.dtype_name), getattr(sampler, "dtype", "float32"))


def check_first_update(
    trainer: L.Trainer, module: PolicyModule, options: RoundOptions, sampler: Sampler, logratio: float
) -> None:
    """Refuse to train if the stored log-probs are not the policy's own.

    Args:
        trainer: The run's Trainer.
        module: Holds the policy.
        options: How rounds are made.
        sampler: The run's sampler.
        logratio: Mean absolute log-ratio to pi_old in a round's first update, nats a token: 0 up to rounding.

    Raises:
        InputError: The log-ratio exceeds what rounding explains, so the stored log-probs are another policy's.
    """
    limit = FIRST_LOGRATIO[compute_dtype(trainer, module.dtype_name) == "float32"]
    if options.old_logps == "sampler":
        limit = sampler_tolerance(trainer, module, sampler)
    if logratio > limit:  # a NaN is found in the loss
        raise InputError(
            f"The log-probs stored with this round differ by {logratio:.3g} nats a token from those of the policy that "
            f"trains on it; rounding explains at most {limit:g}. If the precision, attention or kernels have changed "
            "since, move the round's folder `logps` away and run the same command again."
        )
