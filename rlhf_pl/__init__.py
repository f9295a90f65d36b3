"""Modular RLHF on PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_pl.algorithms.importance import ImportanceCorrection
    from rlhf_pl.algorithms.kl_estimates import KLTerm
    from rlhf_pl.algorithms.losses import (
        APODownLoss,
        APOZeroLoss,
        ChosenNLL,
        CISPOLoss,
        CPOLoss,
        DAPOLoss,
        DPOLoss,
        DrGRPOLoss,
        GRPOLoss,
        GSPOLoss,
        HingeLoss,
        IPOLoss,
        KTOLoss,
        ORPOLoss,
        PairwiseLoss,
        PolicyGradientLoss,
        PolicyLoss,
        PPOLoss,
        RebelLoss,
        ReinforceLoss,
        ReinforcePlusPlusLoss,
        RLOOLoss,
        RobustDPOLoss,
        SimPOLoss,
        SPPOHardLoss,
        SPPOLoss,
        SumOfLosses,
    )
    from rlhf_pl.algorithms.pair_selection import (
        AllPairs,
        BestVsRest,
        BestWorst,
        LengthMatched,
        PairSelector,
        RandomPair,
    )
    from rlhf_pl.algorithms.prompt_groups import PromptGroups
    from rlhf_pl.data import OfflineDataModule, PreferenceDataModule, RoundDataModule, SFTDataModule
    from rlhf_pl.data.policy_module import PolicyModule
    from rlhf_pl.distributed.strategies import CPUFSDPStrategy, FSDP2Strategy
    from rlhf_pl.models.critic_options import Critic
    from rlhf_pl.models.lora import LoRA
    from rlhf_pl.modules import PPOModule, RebelModule, RewardModelModule, SFTModule
    from rlhf_pl.rewards import FunctionReward, Reward, RewardResult, Sample
    from rlhf_pl.rollout import Sampler, SamplingConfig, TransformersSampler, VLLMSampler, VLLMServerSampler
    from rlhf_pl.trainer.rlhf_trainer import RlhfTrainer

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(("OfflineDataModule", "PreferenceDataModule", "RoundDataModule", "SFTDataModule"), "rlhf_pl.data"),
    **dict.fromkeys(("PPOModule", "RebelModule", "RewardModelModule", "SFTModule"), "rlhf_pl.modules"),
    "Critic": "rlhf_pl.models.critic_options",
    "LoRA": "rlhf_pl.models.lora",
    **dict.fromkeys(("CPUFSDPStrategy", "FSDP2Strategy"), "rlhf_pl.distributed.strategies"),
    "ImportanceCorrection": "rlhf_pl.algorithms.importance",
    "KLTerm": "rlhf_pl.algorithms.kl_estimates",
    "PolicyModule": "rlhf_pl.data.policy_module",
    "PromptGroups": "rlhf_pl.algorithms.prompt_groups",
    **dict.fromkeys(
        (
            "APODownLoss",
            "APOZeroLoss",
            "CISPOLoss",
            "DAPOLoss",
            "DrGRPOLoss",
            "GRPOLoss",
            "GSPOLoss",
            "RLOOLoss",
            "ReinforceLoss",
            "ReinforcePlusPlusLoss",
            "PolicyGradientLoss",
            "CPOLoss",
            "ChosenNLL",
            "DPOLoss",
            "HingeLoss",
            "IPOLoss",
            "KTOLoss",
            "ORPOLoss",
            "PairwiseLoss",
            "PolicyLoss",
            "RebelLoss",
            "RobustDPOLoss",
            "SPPOHardLoss",
            "SPPOLoss",
            "SimPOLoss",
            "SumOfLosses",
            "PPOLoss",
        ),
        "rlhf_pl.algorithms.losses",
    ),
    **dict.fromkeys(
        ("AllPairs", "BestVsRest", "BestWorst", "LengthMatched", "PairSelector", "RandomPair"),
        "rlhf_pl.algorithms.pair_selection",
    ),
    "RlhfTrainer": "rlhf_pl.trainer.rlhf_trainer",
    **dict.fromkeys(("FunctionReward", "Reward", "RewardResult", "Sample"), "rlhf_pl.rewards"),
    **dict.fromkeys(
        ("Sampler", "SamplingConfig", "TransformersSampler", "VLLMSampler", "VLLMServerSampler"), "rlhf_pl.rollout"
    ),
}

__all__ = [
    "APODownLoss",
    "APOZeroLoss",
    "AllPairs",
    "BestVsRest",
    "BestWorst",
    "CISPOLoss",
    "CPOLoss",
    "CPUFSDPStrategy",
    "ChosenNLL",
    "Critic",
    "DAPOLoss",
    "DPOLoss",
    "DrGRPOLoss",
    "FSDP2Strategy",
    "FunctionReward",
    "GRPOLoss",
    "GSPOLoss",
    "HingeLoss",
    "IPOLoss",
    "ImportanceCorrection",
    "KLTerm",
    "KTOLoss",
    "LengthMatched",
    "LoRA",
    "ORPOLoss",
    "OfflineDataModule",
    "PPOLoss",
    "PPOModule",
    "PairSelector",
    "PairwiseLoss",
    "PolicyGradientLoss",
    "PolicyLoss",
    "PolicyModule",
    "PreferenceDataModule",
    "PromptGroups",
    "RLOOLoss",
    "RandomPair",
    "RebelLoss",
    "RebelModule",
    "ReinforceLoss",
    "ReinforcePlusPlusLoss",
    "Reward",
    "RewardModelModule",
    "RewardResult",
    "RlhfTrainer",
    "RobustDPOLoss",
    "RoundDataModule",
    "SFTDataModule",
    "SFTModule",
    "SPPOHardLoss",
    "SPPOLoss",
    "Sample",
    "Sampler",
    "SamplingConfig",
    "SimPOLoss",
    "SumOfLosses",
    "TransformersSampler",
    "VLLMSampler",
    "VLLMServerSampler",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: `import rlhf_pl` alone stays fast."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'rlhf_pl' has no attribute {name!r}")
