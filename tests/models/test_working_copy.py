"""`bf16-mixed`: the optimizer updates float32 weights, and bfloat16 copies compute."""

import copy
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from rlhf_pl.models.compute import Compute
from rlhf_pl.models.lora import LoRA, add_lora, without_adapters
from rlhf_pl.models.packed_batch import PrefixGroup, pack
from rlhf_pl.models.policy import PolicyLM, load_lm
from rlhf_pl.models.rounding import round_to
from rlhf_pl.models.source import ModelSource

BF16 = Compute(dtype=torch.bfloat16)
ROWS = pack([PrefixGroup([5, 6, 7, 8], ([9, 10, 11], [30, 31, 32])), PrefixGroup([5], ([12],))])


def policies(folder: Path) -> tuple[PolicyLM, PolicyLM]:
    """A policy with float32 weights and copies, and one with the same weights in bfloat16."""
    source = ModelSource(str(folder))
    mixed, half = PolicyLM(load_lm(source, compute=BF16), compute=BF16), PolicyLM(load_lm(source, "bfloat16"))
    half.load_state_dict(rounded(mixed))
    return mixed, half


def rounded(policy: PolicyLM) -> dict[str, Tensor]:
    return {name: round_to(weight, torch.bfloat16) for name, weight in policy.state_dict().items()}


def gradients(policy: PolicyLM, scale: float = 1.0) -> dict[str, Tensor]:
    policy.zero_grad()
    (policy(**ROWS.inputs()).sum() * scale).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_results_equal_bfloat16_weights_and_gradients_are_float32(llama: Path) -> None:
    mixed, half = policies(llama)
    assert torch.equal(mixed(**ROWS.inputs()), half(**ROWS.inputs()))
    ours, plain = gradients(mixed), gradients(half)
    assert {g.dtype for g in ours.values()} == {torch.float32}
    assert ours.keys() == plain.keys() == dict(mixed.named_parameters()).keys()
    assert all(torch.equal(ours[name], plain[name].float()) for name in ours)


def test_a_fixed_reference_is_rounded_as_copies_are(llama: Path) -> None:
    """Both from the same float32 checkpoint, whose weights bfloat16 can't hold: the KL of the first round is 0."""
    mixed, _ = policies(llama)
    reference = copy.deepcopy(mixed)
    reference.drop_float32_weights()
    assert torch.equal(mixed(**ROWS.inputs()), reference(**ROWS.inputs()))
    assert {weight.dtype for weight in reference.parameters()} == {torch.bfloat16}


def test_micro_batches_are_summed_in_float32(llama: Path) -> None:
    """bfloat16 sums lose a gradient that is 300 times smaller than the sum."""
    mixed, _ = policies(llama)
    large, small = gradients(mixed), gradients(mixed, 2.0**-10)
    mixed.zero_grad()
    for scale in (1.0, 2.0**-10):
        (mixed(**ROWS.inputs()).sum() * scale).backward()
    for name, parameter in mixed.named_parameters():
        torch.testing.assert_close(parameter.grad, large[name] + small[name], atol=0, rtol=1e-6)


@pytest.mark.parametrize("change", ["step", "data", "load", "checkpointed"])
def test_copies_follow_the_weights(llama: Path, change: str) -> None:
    mixed, half = policies(llama)
    if change == "checkpointed":
        mixed.train().lm.gradient_checkpointing_enable({"use_reentrant": False})
        ours, plain = gradients(mixed), gradients(half)
        assert all(torch.equal(ours[name], plain[name].float()) for name in ours)
        return
    mixed(**ROWS.inputs())
    torch.manual_seed(1)
    moved = {name: p + 0.1 * torch.randn_like(p) for name, p in mixed.lm.named_parameters()}
    if change == "step":
        with torch.no_grad():
            for name, parameter in mixed.lm.named_parameters():
                parameter.copy_(moved[name])
    elif change == "data":  # as optimizers and weight averages may do, invisible to torch
        for name, parameter in mixed.lm.named_parameters():
            parameter.data = moved[name].data
    else:
        mixed.lm.load_state_dict(moved | {"lm_head.weight": moved["model.embed_tokens.weight"]})
    half.load_state_dict(rounded(mixed))
    with torch.no_grad():
        assert torch.equal(mixed(**ROWS.inputs()), half(**ROWS.inputs()))


def test_the_state_dict_has_only_the_float32_weights(llama: Path) -> None:
    mixed, _ = policies(llama)
    before = list(mixed.state_dict())
    gradients(mixed)
    assert list(mixed.state_dict()) == before
    assert {t.dtype for t in mixed.state_dict().values()} == {torch.float32}
    again = copy.deepcopy(mixed)
    with torch.no_grad():
        next(again.lm.parameters()).add_(1.0)
        assert not torch.equal(again(**ROWS.inputs()), mixed(**ROWS.inputs()))


def test_the_own_weights_can_be_used(llama: Path) -> None:
    mixed, _ = policies(llama)
    exact = PolicyLM(load_lm(ModelSource(str(llama))))(**ROWS.inputs())
    with mixed.using_own_weights():
        assert torch.equal(mixed(**ROWS.inputs()), exact)
    assert not torch.equal(mixed(**ROWS.inputs()), exact)


def test_adapters_are_disabled_in_the_copy_too(llama: Path) -> None:
    lm = load_lm(ModelSource(str(llama)), compute=BF16)
    base = policies(llama)[1](**ROWS.inputs())
    add_lora(lm, LoRA(rank=4), 0, train_head=False)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    mixed = PolicyLM(lm, compute=BF16)
    for _ in range(2):
        with without_adapters(lm):
            assert torch.equal(mixed(**ROWS.inputs()), base)
        assert not torch.equal(mixed(**ROWS.inputs()), base)
    assert all("lora" in name for name in gradients(mixed))


class _Module(L.LightningModule):
    def __init__(self, folder: str, make: Callable) -> None:
        super().__init__()
        self.policy = PolicyLM(load_lm(ModelSource(folder), compute=BF16), compute=BF16)
        self.make = make

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.policy(**ROWS.inputs()).sum() * 1e-3

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


def test_training_steps_smaller_than_bfloat16_resolution_change_the_weights(llama: Path, tmp_path: Path) -> None:
    module = _Module(str(llama), lambda p: torch.optim.AdamW(p, lr=1e-6))
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, precision="bf16-mixed", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(range(8)))
    moved = {name: (p.detach() - start[name]).abs().mean().item() for name, p in module.named_parameters()}
    assert all(0 < change < 4e-6 for change in moved.values())


def test_changes_invisible_to_torch_are_copied_before_passes_without_gradients_and_after(llama: Path) -> None:
    """Weight averages are swapped in and out around a validation in this way."""
    mixed, half = policies(llama)
    mixed.eval()

    def shift() -> None:
        for policy in (mixed, half):
            for parameter in policy.lm.parameters():
                parameter.data.copy_(parameter.data + 0.25)
        half.load_state_dict(rounded(mixed))

    with torch.no_grad():
        for _ in range(2):
            shift()
            assert torch.equal(mixed(**ROWS.inputs()), half(**ROWS.inputs()))
    shift()
    assert torch.equal(mixed.train()(**ROWS.inputs()), half(**ROWS.inputs()))


def test_the_copy_is_rebuilt_when_the_model_changes(llama: Path) -> None:
    """Replaced weights, adapters and hooks added later, weights for one call."""
    mixed, half = policies(llama)
    mixed(**ROWS.inputs())
    for policy in (mixed, half):
        norm = policy.lm.model.norm
        norm.weight = torch.nn.Parameter(torch.full_like(norm.weight, 0.5))
    assert torch.equal(mixed(**ROWS.inputs()), half(**ROWS.inputs()))
    other = {name: p * 0.5 for name, p in mixed.named_parameters()}
    found = torch.func.functional_call(mixed, other, kwargs=ROWS.inputs())
    for parameter in half.lm.parameters():
        parameter.data.mul_(0.5)
    assert torch.equal(found, half(**ROWS.inputs()))
    seen: list[int] = []
    mixed.lm.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    mixed(**ROWS.inputs())
    assert seen == [1]
    add_lora(mixed.lm, LoRA(rank=2), 0, train_head=False)
    assert all("lora" in name for name in gradients(mixed))


def test_passes_in_inference_mode_do_not_affect_training(llama: Path) -> None:
    """Lightning validates in inference mode, also before training."""
    mixed, half = policies(llama)
    with torch.inference_mode():
        mixed(**ROWS.inputs())
    ours, plain = gradients(mixed.train()), gradients(half)
    assert all(torch.equal(ours[name], plain[name].float()) for name in ours)


def test_a_pass_between_forward_and_backward_does_not_change_gradients(llama: Path) -> None:
    """Gradient checkpointing recomputes activations in the backward pass."""
    mixed, half = policies(llama)
    for policy in (mixed, half):
        policy.train().lm.gradient_checkpointing_enable({"use_reentrant": False})
    total = mixed(**ROWS.inputs()).sum()
    with torch.no_grad():
        mixed.eval()(**ROWS.inputs())
    mixed.train()
    total.backward()
    plain = gradients(half)
    assert all(torch.equal(p.grad, plain[name].float()) for name, p in mixed.named_parameters())
