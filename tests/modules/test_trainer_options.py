"""Options of the Trainer that are refused, and metrics that can be monitored."""

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch import callbacks
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from rlhf_pl.algorithms.reward_shaping import RewardShaping
from rlhf_pl.callbacks import RoundRefresh
from rlhf_pl.cli.user_errors import find_user_error
from rlhf_pl.modules import RebelModule, SFTModule
from rlhf_pl.modules.monitors import check_monitors
from rlhf_pl.modules.trainer_options import check_trainer
from rlhf_pl.rewards import CombinedReward, ExactAnswer, WeightedReward
from rlhf_pl.rounds.metrics import ROLLOUT, metric_names
from rlhf_pl.utils.errors import InputError


def score(response: str) -> float:
    return float(len(response))


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    if options.get("barebones"):
        return L.Trainer(accelerator="cpu", barebones=True)
    return L.Trainer(accelerator="cpu", **{**quiet, "enable_checkpointing": False, **options})


REFUSED = {
    "fast_dev_run": {"fast_dev_run": True},
    "barebones": {"barebones": True},
    "overfit_batches": {"overfit_batches": 2},
    "limit_train_batches": {"limit_train_batches": 0},
    "accumulate_grad_batches": {"accumulate_grad_batches": 0},
    "reload_dataloaders_every_n_epochs": {"reload_dataloaders_every_n_epochs": 3},
    "val_check_interval": {"val_check_interval": 5},
    "AsyncCheckpointIO": {"plugins": [AsyncCheckpointIO()]},
    "StochasticWeightAveraging": {"callbacks": [callbacks.StochasticWeightAveraging(1e-3)]},
    "LearningRateFinder": {"callbacks": [callbacks.LearningRateFinder()]},
    "BatchSizeFinder": {"callbacks": [callbacks.BatchSizeFinder()]},
    "GradientAccumulationScheduler": {"callbacks": [callbacks.GradientAccumulationScheduler({0: 2})]},
    "BackboneFinetuning": {"callbacks": [callbacks.BackboneFinetuning()]},
    "ModelPruning": {"callbacks": [callbacks.ModelPruning("l1_unstructured")]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_options_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=name):
        check_trainer(trainer(**REFUSED[name]), in_rounds=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": 3},
        {"val_check_interval": 0.5},
        {"val_check_interval": "00:00:10:00"},
        {"callbacks": [callbacks.EMAWeightAveraging()]},
    ],
)
def test_other_options_pass(options: dict[str, Any]) -> None:
    check_trainer(trainer(**options), in_rounds=True)


def test_lightnings_distributed_sampler_is_disabled() -> None:
    run: Any = trainer(devices=1)
    assert run._accelerator_connector.use_distributed_sampler
    check_trainer(run, in_rounds=False)
    assert not run._accelerator_connector.use_distributed_sampler


def stopping(metric: str) -> L.Trainer:
    return trainer(callbacks=[callbacks.EarlyStopping(metric)])


def test_monitored_metrics_are_checked(llama: Any) -> None:
    module = RebelModule(str(llama))
    reward = CombinedReward([WeightedReward(f"{__name__}.score", name="helpful")])
    everything = metric_names(RoundRefresh(reward).options, False, True)  # type: ignore[arg-type]
    for name in ("rollout/reward_mean", "rollout/reward/helpful", "val/win_rate", "val/loss", "train/kl"):
        check_monitors(stopping(name), module, True, everything, "")
    for name, validates, others in (("val/loss", False, everything), ("val/reward_mean", True, ROLLOUT)):
        with pytest.raises(InputError, match=rf"EarlyStopping monitors '{name}'.* Set data\.val_prompts"):
            check_monitors(stopping(name), module, validates, others, "Set data.val_prompts.")
    with pytest.raises(InputError, match="Available: rollout/reward_mean"):
        check_monitors(stopping("rollout/reward_meen"), module, True, everything, "")
    with pytest.raises(InputError, match="val/reward_mean"):
        check_monitors(stopping("val/reward_mean"), SFTModule(str(llama)), True, (), "")


def test_only_metrics_of_the_run_can_be_monitored() -> None:
    """No penalty, no sampler's log-probs, no reference, no held-out prompts; then all of them."""
    plain = RoundRefresh(ExactAnswer())
    assert plain.options is not None
    optional = {"rollout/penalty/length", "rollout/old_logp_difference"}
    kl = {"val/kl_new_reference", "val/kl_new_reference_se"}
    names = set(metric_names(plain.options, has_reference=True, held_out=False))
    assert not names & (optional | kl)
    assert not any("/reward/" in name for name in names)
    assert kl <= set(metric_names(plain.options, has_reference=True, held_out=True))
    assert not kl & set(metric_names(plain.options, has_reference=False, held_out=True))
    greedy = RoundRefresh(ExactAnswer(), val_temperature=0).options
    assert greedy is not None
    assert not any(name.startswith("val/kl_") for name in metric_names(greedy, has_reference=True, held_out=True))
    shaped = RoundRefresh(f"{__name__}.score", shaping=RewardShaping(length_penalty=0.1), old_logps="sampler").options
    assert shaped is not None
    assert optional <= set(metric_names(shaped, has_reference=False, held_out=False))


def test_a_users_callback_may_log_the_monitored_metric(llama: Any) -> None:
    own = type("Own", (L.Callback,), {"__module__": "mine"})()
    run = trainer(callbacks=[callbacks.EarlyStopping("my/metric"), own])
    check_monitors(run, RebelModule(str(llama)), True, (), "")


def test_a_schedule_without_its_metric_is_refused(llama: Any) -> None:
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    module = RebelModule(str(llama), lr_scheduler=ReduceLROnPlateau)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"lightning\.pytorch\.cli\.ReduceLROnPlateau"):
        check_monitors(trainer(), module, True, (), "")


def test_a_metric_that_a_callback_lacks_is_a_user_error() -> None:
    run: Any = SimpleNamespace(callback_metrics={}, fast_dev_run=False)
    with pytest.raises(RuntimeError) as error:
        callbacks.EarlyStopping("x")._run_early_stopping_check(run)
    assert find_user_error(error.value) is None  # called by this file
    assert error.tb is not None
    assert isinstance(find_user_error(error.value.with_traceback(error.tb.tb_next)), InputError)
