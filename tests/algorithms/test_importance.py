"""Weights of responses that another policy has sampled: limits, statistics, and TRL's loss with them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_pl.algorithms.advantages import group_advantages
from rlhf_pl.algorithms.group_subsets import select_groups
from rlhf_pl.algorithms.grpo_losses import GRPOLoss, GSPOLoss, RLOOLoss
from rlhf_pl.algorithms.importance import STATISTICS, ImportanceCorrection, effective_share, summarise_weights
from rlhf_pl.algorithms.policy_gradient import PolicyGradientLoss
from rlhf_pl.algorithms.prompt_groups import SAMPLING_LOGPS, PromptGroups
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.modules.logging import Means
from rlhf_pl.utils.errors import InputError

LENGTHS = [3, 1, 4, 2, 5, 2]  # of the responses of two groups
MODES = [(mode, level) for mode in ("truncate", "mask") for level in ("token", "sequence")]


def make_groups(token_logps: Tensor, old: Tensor, sampling: Tensor) -> PromptGroups:
    """Two groups of three responses with `LENGTHS` tokens."""
    lengths = torch.tensor(LENGTHS)
    rewards = torch.tensor([0.1, 0.9, 0.4, 1.3, -0.2, 0.5])
    stored = {"old_token_logps": old, SAMPLING_LOGPS: sampling}
    sums = torch.stack([part.sum() for part in token_logps.split(LENGTHS)])
    return PromptGroups(token_logps, sums, rewards, lengths, lengths > 1, torch.tensor([3, 3]), stored)


def random_groups(scale: float = 0.6, seed: int = 0) -> PromptGroups:
    source = torch.Generator().manual_seed(seed)
    old, noise = (torch.randn(sum(LENGTHS), generator=source) for _ in range(2))
    return make_groups(old - 3, old - 3, old - 3 - scale * noise)


def by_hand(groups: PromptGroups, mode: str, level: str, low: float, high: float) -> tuple[list[float], list[float]]:
    """(The weight of each token; the weights before they are limited, at their level), token by token."""
    weights, raws, start = [], [], 0
    for length in LENGTHS:
        tokens = range(start, start + length)
        start += length
        logs = [float(groups.old_token_logps[i].double() - groups.stored[SAMPLING_LOGPS][i].double()) for i in tokens]
        for log in [sum(logs)] if level == "sequence" else logs:
            raw = math.exp(log)
            raws.append(raw)
            kept = raw if low <= raw <= high else 0.0 if mode == "mask" else low if raw < low else high
            weights += [kept] * (length if level == "sequence" else 1)
    return weights, raws


@pytest.mark.parametrize(("mode", "level"), MODES)
def test_weights_and_statistics_equal_a_direct_computation(mode: Any, level: Any) -> None:
    groups, correction = random_groups(), ImportanceCorrection(mode, level, high=1.5, low=0.6)
    expected, raws = by_hand(groups, mode, level, 0.6, 1.5)
    weights = correction.weights(groups)[0]
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)
    assert len({"low" if raw < 0.6 else "high" if raw > 1.5 else "inside" for raw in raws}) == 3
    found = summarise_weights({n: v.mean().item() for n, v in correction.statistics(groups).items()})
    values = np.array(raws)
    assert found == {
        "sampling_weight": pytest.approx(values.mean(), rel=1e-5),
        "sampling_weight_var": pytest.approx(values.var(), rel=1e-4),
        "sampling_ess": pytest.approx(values.sum() ** 2 / (len(values) * (values**2).sum()), rel=1e-5),
        "sampling_limited": pytest.approx(((values < 0.6) | (values > 1.5)).mean()),
    }


def test_weights_worked_by_hand() -> None:
    """Ratios 4, 1/4, 1 of one response: limited to 2, 1/2, 1; as a response 1, so nothing is limited."""
    log = math.log(4)
    groups = make_groups(torch.zeros(17), torch.zeros(17), torch.tensor([-log, log, 0.0] + [0.0] * 14))
    limits = {"high": 2.0, "low": 0.5}
    assert ImportanceCorrection(**limits).weights(groups)[0][:3].tolist() == [2, 0.5, 1]
    assert ImportanceCorrection("mask", **limits).weights(groups)[0][:3].tolist() == [0, 0, 1]
    for mode in ("truncate", "mask"):
        weights, _, limited = ImportanceCorrection(mode, "sequence", **limits).weights(groups)  # type: ignore[arg-type]
        assert weights.tolist() == pytest.approx([1.0] * 17)
        assert not limited.any()


@pytest.mark.parametrize(("mode", "level"), MODES)
def test_statistics_are_over_all_elements_whatever_the_micro_batches(mode: Any, level: Any) -> None:
    """Of several groups at once, and of the groups of a batch that count where some are in parts."""
    correction, means = ImportanceCorrection(mode, level), Means()
    batches = [random_groups(seed=seed) for seed in range(3)]
    counted = [batches[0], select_groups(batches[1], [1]), select_groups(batches[2], [0]), batches[2]]
    for groups in counted:
        means.add(**correction.statistics(groups))
    found = summarise_weights({n.removeprefix("x/"): v for n, v in means.compute_and_reset("x", Ranks()).items()})
    raws: list[float] = []
    for groups, part in ((batches[0], "all"), (batches[1], "second"), (batches[2], "first"), (batches[2], "all")):
        own = by_hand(groups, mode, level, 0.0, 2.0)[1]
        first = 3 if level == "sequence" else sum(LENGTHS[:3])
        raws += own if part == "all" else own[:first] if part == "first" else own[first:]
    values = np.array(raws)
    assert found["sampling_weight"] == pytest.approx(values.mean(), rel=1e-5)
    assert found["sampling_weight_var"] == pytest.approx(values.var(), rel=1e-4)
    assert found["sampling_ess"] == pytest.approx(values.mean() ** 2 / (values**2).mean(), rel=1e-5)
    assert found["sampling_limited"] == pytest.approx((values > 2).mean())


@pytest.mark.parametrize(("mode", "level"), MODES)
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_log_ratios_stay_finite(mode: Any, level: Any, extreme: float) -> None:
    """Of one token: its weight is at its limit, and loss, gradient and statistics are finite."""
    logps = torch.full((17,), -2.0, requires_grad=True)
    sampling = torch.full((17,), -2.0)
    sampling[0] -= extreme
    groups = make_groups(logps, logps.detach(), sampling)
    loss = GRPOLoss(correction=ImportanceCorrection(mode, level, high=2.0, low=0.5))
    weights = loss.correction.weights(groups)[0]  # type: ignore[union-attr]
    assert weights[0] == (0.0 if mode == "mask" else 2.0 if extreme > 0 else 0.5)
    assert (weights[3:] == 1).all()
    loss.losses(groups).mean().backward()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()
    assert (logps.grad[0] == 0) == (mode == "mask")
    found = loss.summarise({n: v.mean().item() for n, v in loss.metrics(groups).items()})
    assert all(map(math.isfinite, found.values()))
    assert found["sampling_limited"] == pytest.approx(1 / (6 if level == "sequence" else 17))


def test_small_differences_are_not_lost_in_the_variance() -> None:
    """Log-weights of 1e-5 and -1e-5: a variance of 1e-10, far below the rounding error of squares of weights near 1."""
    sampling = torch.tensor([1e-5 if i % 2 else -1e-5 for i in range(16)] + [0.0])
    groups = make_groups(torch.zeros(17), torch.zeros(17), sampling)
    means = {n: v.double().mean().item() for n, v in ImportanceCorrection().statistics(groups).items()}
    assert summarise_weights(means)["sampling_weight_var"] == pytest.approx(1e-10 * 16 / 17, rel=1e-3)


@pytest.mark.parametrize("loss", [RLOOLoss(), GRPOLoss(), GSPOLoss()])
def test_an_extreme_ratio_that_a_limit_cuts_off_has_no_gradient(loss: PolicyGradientLoss) -> None:
    """Log-ratios of 100 a token: the best response is cut off, and in a group of equal rewards none has an effect."""
    sizes, lengths = torch.tensor([2, 2]), torch.ones(4, dtype=torch.int64)
    shifts = torch.tensor([100.0, 0.0, 100.0, 100.0])
    logps = (shifts - 200).requires_grad_()
    old = torch.full((4,), -200.0)
    stored = {"old_token_logps": old, "old_logps": old}
    rewards = torch.tensor([1.0, 0.0, 3.0, 3.0])
    finished = torch.ones(4, dtype=torch.bool)
    groups = PromptGroups(logps, logps, rewards, lengths, finished, sizes, stored)
    loss.losses(groups).mean().backward()
    assert logps.grad is not None
    assert (logps.grad != 0).tolist() == [False, True, False, False]
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize(
    ("weights", "expected"), [([0.5, 1.5], 0.8), ([1.0, 1.0], 1.0), ([0.0, 2.0], 0.5), ([1e-30] * 3, math.nan)]
)
def test_effective_sample_size_by_hand(weights: list[float], expected: float) -> None:
    """Weights that have all vanished have none."""
    shifts = torch.tensor(weights) - 1
    found = effective_share(shifts.mean().item(), shifts.square().mean().item())
    assert found == pytest.approx(expected, nan_ok=True)


def test_metrics_have_their_names_and_need_both_policies() -> None:
    loss = GRPOLoss(correction=ImportanceCorrection())
    assert {"old_token_logps", SAMPLING_LOGPS} <= set(loss.needs)
    assert set(STATISTICS) <= set(loss.metric_names)
    found = loss.summarise({n: v.mean().item() for n, v in loss.metrics(random_groups()).items()})
    assert set(found) == set(loss.metric_names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "clip"}, "`model.loss.correction.mode` must be truncate or mask, got 'clip'"),
        ({"level": "response"}, "`model.loss.correction.level` must be token or sequence, got 'response'"),
        ({"high": 0.9}, "high 1 or more and finite, got 0.0 and 0.9"),
        ({"high": math.inf}, "high 1 or more and finite"),
        ({"low": 1.1}, "low must be from 0 to 1"),
    ],
)
def test_limits_that_exclude_1_are_refused(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ImportanceCorrection(**options)


# TRL's loss with its `vllm_importance_sampling_mode`s, on one padded batch of a real model


@pytest.fixture(scope="module")
def trl_trainer(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        report_to=[],
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=6,
        num_generations=3,
        loss_type="grpo",
        beta=0.0,
        epsilon=0.2,
        max_completion_length=8,
        disable_dropout=True,
    )
    return trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(llama),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "What?"}]),
        processing_class=AutoTokenizer.from_pretrained(llama),
    )


def trl_weights(old: Tensor, sampling: Tensor, mask: Tensor, mode: str, level: str, low: float, high: float) -> Tensor:
    """`GRPOTrainer._generate_and_score_completions` of TRL 1.16, on padded tensors of shape (B, T)."""
    difference = torch.nan_to_num((old - sampling) * mask, nan=0.0)
    ratio = (difference.sum(-1, keepdim=True) if level == "sequence" else difference).exp()
    if mode == "truncate":
        return ratio.clamp(min=low, max=high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


@pytest.mark.parametrize("ratio", ["token", "sequence_mean"])
@pytest.mark.parametrize(("mode", "level"), MODES)
def test_loss_and_gradient_equal_those_of_trl(trl_trainer: Any, mode: Any, level: Any, ratio: str) -> None:
    source = torch.Generator().manual_seed(1)
    prompts = [[0, 30, 31], [0, 40, 41, 42]]
    responses = [torch.randint(6, 300, (length,), generator=source) for length in LENGTHS]
    completions = pad_sequence(responses, batch_first=True, padding_value=1)
    mask = pad_sequence([torch.ones(length) for length in LENGTHS], batch_first=True).long()
    prompt_ids, prompt_mask = torch.ones(6, 4).long(), torch.zeros(6, 4).long()  # padded on the left
    for i in range(6):
        ids = torch.tensor(prompts[i // 3])
        prompt_ids[i, -len(ids) :], prompt_mask[i, -len(ids) :] = ids, 1
    model = trl_trainer.model.eval()
    model.zero_grad()
    ours = []
    for i, response in enumerate(responses):
        prompt = torch.tensor(prompts[i // 3])
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        ours.append(logits.log_softmax(-1)[range(len(response)), response])
    logps = torch.cat(ours)
    old = logps.detach() + 0.1 * torch.randn(len(logps), generator=source)
    sampling = old + 0.5 * torch.randn(len(logps), generator=source)
    groups = make_groups(logps, old, sampling)
    correction = ImportanceCorrection(mode, level, high=1.4, low=0.7)
    loss: PolicyGradientLoss = GRPOLoss(correction=correction)
    if ratio == "sequence_mean":
        loss = GSPOLoss(0.2, 0.2, correction=correction)
    value = loss.losses(groups).mean()
    value.backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    old_rows, sampling_rows = (pad_sequence(v.split(LENGTHS), batch_first=True) for v in (old, sampling))
    weights = trl_weights(old_rows, sampling_rows, mask, mode, level, 0.7, 1.4)
    assert (weights[mask.bool()] if level == "token" else weights).unique().numel() > 2
    trl_trainer.use_vllm, trl_trainer.vllm_importance_sampling_correction = True, True
    trl_trainer.importance_sampling_level = "token" if ratio == "token" else "sequence"
    trl_trainer.current_gradient_accumulation_steps = 1
    theirs = trl_trainer._compute_loss(
        model,
        {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completions,
            "completion_mask": mask,
            "advantages": group_advantages("group_normalized", groups),
            "old_per_token_logps": old_rows,
            "importance_sampling_ratio": weights,
            "num_items_in_batch": mask.sum(),
        },
    )
    theirs.backward()
    assert value.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-5, atol=1e-5)
    model.zero_grad()
