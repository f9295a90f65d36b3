"""Base classes can not be chosen: the command line offers what can be made."""

import inspect

import pytest

from rlhf_pl.data.base_datamodule import RowsDataModule
from rlhf_pl.data.pairs_datamodule import PairsDataModule
from rlhf_pl.modules.base import TrainedModule
from rlhf_pl.modules.causal_lm import CausalLMModule
from rlhf_pl.rewards.chat_judge import JudgeReward
from rlhf_pl.rewards.local_model import LocalModelReward
from rlhf_pl.rewards.remote import RemoteReward

BASES = [TrainedModule, CausalLMModule, RowsDataModule, PairsDataModule, LocalModelReward, RemoteReward, JudgeReward]


@pytest.mark.parametrize("base", BASES)
def test_a_base_class_can_not_be_made(base: type) -> None:
    assert inspect.isabstract(base)
