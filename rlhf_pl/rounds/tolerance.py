"""How far apart log-probs of one policy may be, and the check of those that a round's training starts from."""

import lightning as L

from rlhf_pl.data.policy_module import PolicyModule
from rlhf_pl.distributed.strategies import compute_dtype
from rlhf_pl.rollout import Sampler
from rlhf_pl.rollout.weight_sync.self_check import tolerance
from rlhf_pl.rounds.settings import RoundOptions
from rlhf_pl.utils.errors import InputError

# nats a token between log-probs computed in other batches, on other devices or by other kernels: in half precision, and
# in float32
FIRST_LOGRATIO = (0.05, 1e-3)


def sampler_tolerance(trainer: L.Trainer, module: PolicyModule, sampler: Sampler) -> float:
    """The mean difference per token, nats, that rounding explains between the policy and its sampler."""
    return tolerance(compute_dtype(trainer, module.dtype_name), getattr(sampler, "dtype", "float32"))


def check_first_update(
    trainer: L.Trainer, module: PolicyModule, options: RoundOptions, sampler: Sampler, logratio: float
) -> None:
    """Refuse a training whose policy is not the one whose log-probs are stored as pi_old.

    Args:
        trainer: Of the run.
        module: Holds the policy.
        options: How rounds are made.
        sampler: Of the run.
        logratio: The mean absolute log-ratio a token in a round's first update, nats: 0 where nothing rounds
            differently.

    Raises:
        InputError: It is more than rounding explains: the stored log-probs are another policy's.
    """
    limit = FIRST_LOGRATIO[compute_dtype(trainer, module.dtype_name) == "float32"]
    if options.old_logps == "sampler":
        limit = sampler_tolerance(trainer, module, sampler)
    if logratio > limit:  # a NaN is a matter of the loss
        raise InputError(
            f"The log-probs stored with this round are {logratio:.3g} nats a token from those of the policy that "
            f"trains on it, where rounding explains at most {limit:g}. If the precision, attention or kernels were "
            "changed since, move the round's folder `logps` away and run the same command again."
        )
