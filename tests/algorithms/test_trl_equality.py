"""Loss and gradient of a whole update equal TRL's trainers on the same tokens.

TRL 1.16 in float32 on the CPU, without dropout or truncation; every trainer with its own tokenization, collator and
loss: `compute_loss` on a batch of all four rows. Our side is a run over offline pairs, in four micro-batches whose two
responses share their prompt. The gradient is the one that the optimizer gets.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from rlhf_pl import (
    APODownLoss,
    APOZeroLoss,
    ChosenNLL,
    CPOLoss,
    DPOLoss,
    HingeLoss,
    IPOLoss,
    KTOLoss,
    OfflineDataModule,
    ORPOLoss,
    PolicyLoss,
    RebelModule,
    RobustDPOLoss,
    SimPOLoss,
    SPPOHardLoss,
    SumOfLosses,
)
from rlhf_pl.algorithms.prompt_groups import Z_REF, PromptGroups
from rlhf_pl.callbacks import EpochRun, OfflineLogps
from tests.conftest import save_llama

pytest.importorskip("trl")
ROWS = [
    {
        "prompt": f"<|user|>What is {i} and {i}?<|end|><|assistant|>",
        "chosen": f"It is {i}" + " and on" * i,
        "rejected": "no " * (1 + (i * 2) % 5),
    }
    for i in range(4)
]


@dataclass
class Models:
    """Folders of the policy and of another model: the reference, or pi_old of SPPO."""

    policy: Path
    other: Path
    output: Path


@dataclass
class Update:
    """The loss of an update and its gradient by parameter."""

    loss: float
    gradient: dict[str, Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("trl")
    return Models(save_llama(folder / "policy"), save_llama(folder / "other", seed=1), folder)


# TRL's side


def make_trainer(models: Models, name: str, **settings: Any) -> Any:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental import cpo, orpo

    package = {"CPO": cpo, "ORPO": orpo}.get(name, trl)
    references = {} if name in ("CPO", "ORPO") else {"ref_model": AutoModelForCausalLM.from_pretrained(models.other)}
    config = getattr(package, f"{name}Config")(
        output_dir=str(models.output / "trl"),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        **{"per_device_train_batch_size": 4, "max_length": 256} | settings,
    )
    return getattr(package, f"{name}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(models.policy),
        args=config,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(models.policy),
        **references,
    )


def batches_of(trainer: Any) -> Iterator[Any]:
    trainer.model.train()
    for batch in trainer.get_train_dataloader():
        yield trainer._prepare_inputs(batch)


def update_of(trainer: Any, loss: Tensor) -> Update:
    trainer.model.zero_grad()
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return Update(loss.item(), gradient)


def dpo(models: Models, **settings: Any) -> Update:
    trainer = make_trainer(models, "DPO", **settings)
    losses = [trainer.compute_loss(trainer.model, batch) for batch in batches_of(trainer)]
    return update_of(trainer, torch.stack(losses).mean())


def cpo(models: Models, **settings: Any) -> Update:
    trainer = make_trainer(models, "CPO", **settings)
    (batch,) = batches_of(trainer)
    return update_of(trainer, trainer.compute_loss(trainer.model, batch))


def orpo(models: Models, **settings: Any) -> Update:
    """Its NLL is over the tokens of the prompt as well; here it is over the labels, those of the chosen response."""
    trainer = make_trainer(models, "ORPO", **settings)
    (batch,) = batches_of(trainer)
    chosen, rejected, logits, *_ = trainer.concatenated_forward(trainer.model, batch)
    ratios = trainer.odds_ratio_loss(chosen, rejected)[0]  # beta log sigmoid of the log odds
    labels = batch["chosen_labels"]
    width = logits.shape[1] + 1  # it drops the last position
    padded = torch.nn.functional.pad(labels, (0, width - labels.shape[1]), value=-100)
    whole = torch.nn.functional.pad(logits, (0, 0, 0, 1))
    nll = -trainer.get_batch_logps(whole, padded).sum() / (labels != -100).sum()
    return update_of(trainer, nll - ratios.mean())


# our side


class Keep(L.Callback):
    """Keeps the gradient that the optimizer gets."""

    gradient: dict[str, Tensor]

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        found = module.policy.lm.named_parameters()
        self.gradient = {name: p.grad.clone() for name, p in found if p.grad is not None}


@pytest.fixture(scope="module")
def pairs(models: Models) -> str:
    """The tokens of TRL's DPO trainer, with their log-probs under the other model, which SPPO takes for pi_old."""
    import json

    from transformers import AutoModelForCausalLM

    trainer = make_trainer(models, "DPO")
    tokens = {row["prompt"]: row for row in trainer.train_dataset}
    lm, rows = AutoModelForCausalLM.from_pretrained(models.other), []
    for row in ROWS:
        found = tokens[row["prompt"]]
        row |= {f"{which}_tokens": found[f"{which}_ids"] for which in ("prompt", "chosen", "rejected")}
        for which in ("chosen", "rejected"):
            ids = torch.tensor([found["prompt_ids"] + found[f"{which}_ids"]])
            logps = lm(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
            row[f"{which}_logprob"] = logps[len(found["prompt_ids"]) - 1 :].sum().item()
        rows.append(row)
    file = models.output / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def ours(models: Models, pairs: str, loss: PolicyLoss) -> Update:
    keep = Keep()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=4,
        default_root_dir=models.output / "runs" / str(len(list((models.output / "runs").glob("*")))),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[EpochRun(), OfflineLogps(), keep],
    )
    reference = str(models.other) if "reference_logps" in loss.needs else None
    trainer.fit(
        RebelModule(str(models.policy), loss, reference=reference),
        datamodule=OfflineDataModule(pairs, batch_size=1),
    )
    assert trainer.global_step == 1
    return Update(trainer.callback_metrics["train/loss"].item(), keep.gradient)


def check_equal(found: Update, expected: Update) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-5)
    assert found.gradient.keys() == expected.gradient.keys()
    size = max(gradient.abs().max().item() for gradient in expected.gradient.values())
    assert size > 1e-4
    for name, gradient in expected.gradient.items():
        torch.testing.assert_close(found.gradient[name], gradient, rtol=1e-5, atol=1e-5 * size)


CASES: dict[str, tuple[PolicyLoss, Callable[[Models], Update]]] = {
    "DPO": (DPOLoss(0.3), lambda m: dpo(m, loss_type=["sigmoid"], beta=0.3)),
    # `sigmoid` takes no label smoothing; `aot` does, and is the same for batches of one pair, which it sorts
    "cDPO": (
        DPOLoss(0.3, label_smoothing=0.2),
        lambda m: dpo(m, loss_type=["aot"], beta=0.3, label_smoothing=0.2, per_device_train_batch_size=1),
    ),
    "robust DPO": (
        RobustDPOLoss(0.3, label_smoothing=0.2),
        lambda m: dpo(m, loss_type=["robust"], beta=0.3, label_smoothing=0.2),
    ),
    "IPO": (IPOLoss(0.3), lambda m: dpo(m, loss_type=["ipo"], beta=0.3)),
    "hinge": (HingeLoss(0.02), lambda m: dpo(m, loss_type=["hinge"], beta=0.02)),
    "APO-zero": (APOZeroLoss(0.05), lambda m: dpo(m, loss_type=["apo_zero"], beta=0.05)),
    "APO-down": (APODownLoss(0.05), lambda m: dpo(m, loss_type=["apo_down"], beta=0.05)),
    # TRL's log-ratios are to its `ref_model`; ours to pi_old, which has the other model's log-probs here
    "SPPO": (SPPOHardLoss(0.3), lambda m: dpo(m, loss_type=["sppo_hard"], beta=0.3)),
    "DPO and NLL": (
        SumOfLosses([DPOLoss(0.3), ChosenNLL()], [1.5, 0.5]),
        lambda m: dpo(m, loss_type=["sigmoid", "sft"], loss_weights=[1.5, 0.5], beta=0.3),
    ),
    "SimPO": (
        SimPOLoss(beta=2.0, gamma=0.7),
        lambda m: cpo(m, loss_type="simpo", beta=2.0, simpo_gamma=0.7, cpo_alpha=0.0),
    ),
    "CPO": (CPOLoss(0.05, nll_weight=0.5), lambda m: cpo(m, loss_type="sigmoid", beta=0.05, cpo_alpha=0.5)),
    "ORPO": (ORPOLoss(0.3), lambda m: orpo(m, beta=0.3)),
}


@pytest.mark.parametrize(("loss", "theirs"), CASES.values(), ids=CASES)
def test_loss_and_gradient_equal_trls(
    models: Models, pairs: str, loss: PolicyLoss, theirs: Callable[[Models], Update]
) -> None:
    check_equal(ours(models, pairs, loss), theirs(models))


class KTOWithZRef(KTOLoss):
    """KTO with a z_ref from elsewhere."""

    needs = frozenset({"rewards", "reference_logps"})
    z_ref = 0.0

    def losses(self, groups: PromptGroups) -> Tensor:
        return super().losses(replace(groups, stored={**groups.stored, Z_REF: torch.tensor(self.z_ref)}))


def test_kto_equals_trls_with_its_z_ref(models: Models, pairs: str) -> None:
    """TRL estimates z_ref from the completions of one batch of a rank, each under the prompt of the next row, which may
    be the same prompt; ours is of a whole update. Compared is the loss, given TRL's z_ref."""
    models = Models(models.other, models.policy, models.output)  # the other way round z_ref is 0
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.8}
    trainer = make_trainer(models, "KTO", beta=0.1, per_device_train_batch_size=8, **weights)
    (batch,) = batches_of(trainer)
    expected = update_of(trainer, trainer.compute_loss(trainer.model, batch))
    loss = KTOWithZRef(0.1, **weights)
    loss.z_ref = trainer._metrics["train"]["kl"][0]
    assert loss.z_ref > 0
    check_equal(ours(models, pairs, loss), expected)
