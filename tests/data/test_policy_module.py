"""A user's own LightningModule can train in rounds if it has the members of `PolicyModule`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from rlhf_pl import RebelLoss, RebelModule, RoundDataModule, SamplingConfig, TransformersSampler
from rlhf_pl.callbacks import RoundRefresh
from rlhf_pl.data import GroupBatch
from rlhf_pl.data.compatibility import check_policy_module
from rlhf_pl.data.policy_module import find_missing_members, is_policy_module
from rlhf_pl.distributed.gather_weights import Weights, like_of, model_weights
from rlhf_pl.models.policy import PolicyLM, load_lm
from rlhf_pl.models.source import ModelSource
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.errors import InputError
from tests.integration.test_fit import PROMPTS


class OwnModule(L.LightningModule):
    """REBEL without this package's modules."""

    batch_type = GroupBatch
    kl_coef = 0.0
    dtype_name = "float32"
    has_reference = False
    needs = frozenset({"rewards", "old_logps"})
    first_logratio: float | None = None

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.source = self.reference_source = ModelSource(folder)
        self.loss = RebelLoss(2.0)
        self.policy: PolicyLM | None = None
        self.like: dict[str, Tensor] = {}

    def build_lm(self, read_weights: bool = True) -> Any:
        return self.load(self.source)

    def load(self, source: ModelSource) -> Any:
        return load_lm(source)

    def unit(self, lm: Any) -> PolicyLM:
        return PolicyLM(lm)

    def load_reference(self) -> Callable[..., Tensor]:
        raise NotImplementedError

    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = self.unit(self.build_lm()).train()
            self.like = like_of(self.policy.lm)

    def weights(self) -> Weights:
        assert self.policy is not None
        return model_weights(self, self.policy.lm, self.like)

    def forward(self, **inputs: Any) -> Tensor:
        assert self.policy is not None
        return self.policy(**inputs)

    def training_step(self, batch: GroupBatch, batch_idx: int) -> Tensor:
        groups = batch.groups(self(**batch.rows.inputs(), temperature=batch.temperature))
        return self.loss.losses(groups).mean() * batch.weight

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def training_settings(self) -> dict[str, Any]:
        return {"loss": "own"}

    def round_summary(self) -> dict[str, float | None]:
        return {"loss": None, "kl": None}


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def test_two_rounds_of_an_own_module_equal_those_of_ours(
    tmp_path: Path, llama: Path, write_jsonl: Callable[..., str]
) -> None:
    ours = RebelModule(str(llama), RebelLoss(2.0), lambda p: torch.optim.AdamW(p, lr=1e-3), constant)
    found = []
    for name, module in (("ours", ours), ("own", OwnModule(str(llama)))):
        L.seed_everything(5, verbose=False)
        sampling = SamplingConfig(num_responses=3, max_response_tokens=8, temperature=0.9)
        reward = "tests.integration.test_fit.reward"
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=2,
            accumulate_grad_batches=2,
            default_root_dir=tmp_path / name,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[RoundRefresh(reward, TransformersSampler(), sampling)],
        )
        trainer.fit(module, datamodule=RoundDataModule(write_jsonl(PROMPTS), max_prompt_tokens=64, batch_size=2))
        assert list(RoundStore(tmp_path / name).rounds()) == [0, 1]
        found.append({key: tensor.clone() for key, tensor in module.weights().stream()})  # type: ignore[attr-defined]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_missing_members_of_a_module_are_named(llama: Path) -> None:
    class Half(L.LightningModule):
        batch_type = GroupBatch

    module = OwnModule(str(llama))
    assert is_policy_module(module)
    module.configure_model()  # from here on its policy is a submodule
    assert is_policy_module(module)
    assert not is_policy_module(Half())
    assert {"loss", "needs", "load_reference", "source", "weights"} <= set(find_missing_members(Half()))
    with pytest.raises(InputError, match=r"Half lacks .*load_reference.*rlhf_pl.PolicyModule"):
        check_policy_module(Half(), object())
    with pytest.raises(InputError, match="LightningModule does not define `batch_type`"):
        check_policy_module(L.LightningModule(), object())
