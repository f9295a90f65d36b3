"""KTO's z_ref: the mean log-ratio of an update's responses to other prompts, whatever the division of the update."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_pl.data.mismatched import mismatch_prompts
from rlhf_pl.store.round_store import RoundStore
from tests.algorithms.trained_round import LR, assert_same_training, logged, stored_prompts, token_logps
from tests.data.test_group_parts import make_dataset

LOSS = """
from rlhf_pl import PolicyLoss


class Relative(PolicyLoss):
    needs, per = {"reference_logps", "kto_z_ref"}, "response"

    def losses(self, groups):
        assert groups.stored["kto_z_ref"].shape == ()
        return (0.3 * (groups.stored["kto_z_ref"] - groups.logps + groups.reference_logps)).sigmoid()
"""
DIVISIONS = {
    "accumulated": (),
    "by tokens": ("--data.max_tokens_per_batch", "70"),
}


def naive(llama: Path) -> tuple[list[float], list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, z_ref, and the weights before and after two plain updates over the round.

    Each prompt's responses also follow the next prompt, the last ones the first.
    """
    from transformers import AutoModelForCausalLM

    groups = stored_prompts()
    others = [
        row | {"prompt_tokens": following[0]["prompt_tokens"]}
        for group, following in zip(groups, groups[1:] + groups[:1], strict=True)
        for row in group
    ]
    lm: Any = AutoModelForCausalLM.from_pretrained(llama).eval()
    start = {n: p.detach().clone() for n, p in lm.named_parameters()}

    def logps(rows: list[dict[str, Any]]) -> Tensor:
        return torch.stack([token_logps(lm, row).sum() for row in rows])

    rows, losses, estimates = [row for group in groups for row in group], [], []
    reference, other_reference = logps(rows).detach(), logps(others).detach()
    for _ in range(2):
        z_ref = (logps(others) - other_reference).mean().detach().clamp(min=0)
        estimates.append(z_ref.item())
        value = (0.3 * (z_ref - logps(rows) + reference)).sigmoid().mean()
        lm.zero_grad()
        value.backward()
        losses.append(value.item())
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter -= LR * parameter.grad
    assert estimates[0] < 1e-4 < 0.05 < estimates[1]
    return losses, estimates, start, {n: p.detach() for n, p in lm.named_parameters()}


@pytest.mark.parametrize("division", DIVISIONS)
def test_z_ref_is_that_of_the_whole_update(division: str, fit: Callable[..., int], llama: Path) -> None:
    Path("relative.py").write_text(LOSS)
    assert fit("--model.loss", "relative.Relative", *DIVISIONS[division]) == 0
    losses, estimates, start, wanted = naive(llama)
    assert logged("train/loss") == pytest.approx(losses, rel=1e-4)
    assert logged("train/kto_z_ref") == pytest.approx(estimates, rel=1e-3, abs=1e-4)
    assert_same_training(start, wanted)
    stored = RoundStore("run").round(0).read("logps")
    assert stored.column_names == ["prompt_id", "response_index", "reference_logp", "mismatched_reference_logp"]


def test_responses_follow_the_next_prompt_with_other_tokens() -> None:
    groups = make_dataset().stored
    prompts = groups.prompt_tokens.to_pylist()
    second = [prompts[0] if i in groups.rows(1) else prompt for i, prompt in enumerate(prompts)]
    other = mismatch_prompts(replace(groups, prompt_tokens=pa.array(second, groups.prompt_tokens.type)))
    assert other is not None
    found = [int(other.prefix_group(g).prompt[0]) - 3 for g in range(len(groups))]
    assert found == [2, 2, 3, 4, 0]  # groups 0 and 1 have one prompt
    assert [other.rows(g).tolist() for g in range(5)] == [groups.rows(g).tolist() for g in range(5)]
    alone = replace(groups, prompt_tokens=pa.array([prompts[0]] * len(prompts), groups.prompt_tokens.type))
    assert mismatch_prompts(alone) is None


def test_a_stop_between_updates_changes_nothing(fit: Callable[..., int]) -> None:
    """Groups in parts and z_ref: what is computed ahead of an update is computed again."""
    Path("relative.py").write_text(LOSS)
    arguments = ("--model.loss", "relative.Relative", *DIVISIONS["by tokens"])
    assert fit(*arguments, "--trainer.default_root_dir", "whole") == 0
    for steps in ("1", "-1"):
        assert fit(*arguments, "--trainer.max_steps", steps) == 0
    whole, stopped = (load_file(f"{folder}/model/model.safetensors") for folder in ("whole", "run"))
    assert all(torch.equal(stopped[name], tensor) for name, tensor in whole.items())
