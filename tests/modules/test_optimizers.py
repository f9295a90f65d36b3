import math

import pytest
import torch

from rlhf_pl.modules.optimizers import (
    AdamW,
    WarmupCosine,
    WarmupLinear,
    add_empty_state,
    copy_state,
    hyperparameters,
    reset_state,
    restore_hyperparameters,
)
from rlhf_pl.utils.errors import InputError


def schedule(**settings: float | str) -> WarmupCosine:
    return WarmupCosine(AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0), **settings)  # type: ignore[arg-type]


def test_recipe_defaults() -> None:
    group = AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-8, 1e-6)


def test_fused_steps_equal_plain_ones() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(50), torch.randn(4, 50)
    ends = []
    for make in (AdamW, torch.optim.AdamW):
        weight = torch.nn.Parameter(start.clone())
        optimizer = make([{"params": [weight]}], lr=0.1, betas=(0.9, 0.95), weight_decay=1e-6)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends)
    assert AdamW([torch.nn.Parameter(start)], lr=0.1).param_groups[0]["fused"]


def test_warm_up_then_cosine() -> None:
    """10% of warm-up: half the peak at 5%, the peak at 10%, half again midway through the cosine, 0 at the end."""
    s = schedule(warmup=0.1)
    assert s.factor(0.05) == pytest.approx(0.5)
    assert s.factor(0.1) == pytest.approx(1.0)
    assert s.factor(0.55) == pytest.approx(0.5)
    assert s.factor(1.0) == pytest.approx(0.0)
    assert schedule(warmup=0.0, min_factor=0.2).factor(1.0) == pytest.approx(0.2)


def test_follows_the_run_or_the_round() -> None:
    for span, expected in (("run", 0.5 * (1 + math.cos(math.pi * 0.25))), ("round", 0.5 * (1 + math.cos(math.pi / 2)))):
        s = schedule(warmup=0.0, span=span)
        s.follow(lambda: (0.25, 0.5))
        s.refresh()
        assert s.optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * expected)


def test_state_is_plain(tmp_path: object) -> None:
    s = schedule()
    s.follow(lambda: (0.5, 0.5))
    assert "progress" not in s.state_dict()
    assert all(isinstance(v, int | float | str | bool | list) for v in s.state_dict().values())


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InputError, match="warmup"):
        schedule(warmup=1.0)
    with pytest.raises(InputError, match="min_factor"):
        schedule(min_factor=2.0)


def test_the_configs_settings_are_restored_and_a_changed_rate_scales_the_current_one() -> None:
    """A schedule has gone from 0.1 to 0.01; the config now says 0.2: it continues at 0.02, from a base of 0.2."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    saved = torch.optim.SGD([parameter], lr=0.1, momentum=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(saved, 1)
    saved.step()
    schedule.step()
    assert saved.param_groups[0]["lr"] == pytest.approx(0.01)
    now = torch.optim.SGD([parameter], lr=0.2, momentum=0.9)
    later = torch.optim.lr_scheduler.StepLR(now, 1)
    settings = hyperparameters(now)
    now.load_state_dict(saved.state_dict())
    later.load_state_dict(schedule.state_dict())
    restore_hyperparameters(now, later, settings)
    group = now.param_groups[0]
    assert (group["lr"], group["initial_lr"], group["momentum"]) == pytest.approx((0.02, 0.2, 0.9))
    assert later.base_lrs == [0.2]
    now.step()
    later.step()
    assert group["lr"] == pytest.approx(0.002)


def test_an_empty_state_is_that_before_the_first_step() -> None:
    """One parameter trains for two steps before the other, with and without an empty state of that."""
    torch.manual_seed(0)
    start, gradients = torch.randn(2, 50), torch.randn(4, 2, 50)
    ends = []
    for is_empty in (False, True):
        early, late = (torch.nn.Parameter(part.clone()) for part in start)
        optimizer = AdamW([{"params": [early]}, {"params": [late], "lr": 0.2}], lr=0.1, weight_decay=0.1)
        for step, (first, second) in enumerate(gradients):
            early.grad, late.grad = first.clone(), second.clone() if step >= 2 else None
            if is_empty and step < 2:
                add_empty_state(optimizer, [late])
                assert torch.equal(early.grad, first)
                assert late in optimizer.state
                assert torch.equal(late, start[1])
            optimizer.step()
        ends.append(torch.stack([early, late]).detach())
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert torch.equal(*ends)


@pytest.mark.parametrize("make", [AdamW, torch.optim.Adagrad])  # Adagrad makes its state before its first step
def test_a_reset_optimizer_steps_as_a_new_one(make: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    gradients = torch.randn(3, 20)
    weight = torch.nn.Parameter(torch.zeros(20))
    optimizer = make([weight], lr=0.1)  # type: ignore[call-arg]
    initial = copy_state(optimizer)
    for gradient in gradients[:2]:
        weight.grad = gradient.clone()
        optimizer.step()
    with torch.no_grad():
        weight.zero_()
    weight.grad = gradients[2].clone()
    reset_state(optimizer, initial)
    optimizer.step()
    other = torch.nn.Parameter(torch.zeros(20))
    fresh = make([other], lr=0.1)  # type: ignore[call-arg]
    other.grad = gradients[2].clone()
    fresh.step()
    assert torch.equal(weight, other)


def test_warmup_linear_falls_in_a_line_to_its_end() -> None:
    """A warm-up over a fifth, then from 1 to `min_factor`: in the middle of the decay, half of the way."""
    linear = WarmupLinear(AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0), warmup=0.2, min_factor=0.1)
    assert [linear.factor(p) for p in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.5, 1.0, 0.55, 0.1])
    plain = WarmupLinear(AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0))
    plain.follow(lambda: (0.25, 0.9))
    plain.refresh()
    assert plain.optimizer.param_groups[0]["lr"] == pytest.approx(1.5)
