"""PPO by the command equals a naive computation; its critic is warmed up, resumed, exported and loaded again."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_pl import Critic, GRPOLoss, LoRA, PPOLoss, PPOModule, RebelModule
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.errors import InputError
from tests.algorithms import conftest
from tests.algorithms.trained_round import LR, assert_same_training, logged, logged_losses, stored_prompts, token_logps
from tests.conftest import save_reward_model

Fit = Callable[..., int]
fit = conftest.fit  # a fixture
VF, CRITIC_LR, UPDATES = 0.5, 0.02, 2
PPO = ("--model", "PPOModule", "--model.loss.vf_coef", str(VF))
OWN = (*PPO, "--model.critic.lr", str(CRITIC_LR))
ADAM = (
    *("--model.optimizer", "rlhf_pl.modules.optimizers.AdamW"),
    *("--model.optimizer.lr", "0.003", "--model.optimizer.weight_decay", "0.1"),
)
STEPWISE = ("--data.passes", "3", "--checkpoint.every_n_updates", "1")


@pytest.fixture
def with_head(llama: Path, tmp_path: Path) -> Path:
    """A policy with a value head beside its weights."""
    folder = shutil.copytree(llama, tmp_path / "with_head")
    (folder / "critic").mkdir()
    head = torch.randn(1, 64, generator=torch.Generator().manual_seed(5)) / 8
    save_file({"weight": head, "bias": torch.tensor([0.3])}, folder / "critic" / "value_head.safetensors")
    return folder


def advantages_of(values: Tensor, reward: float, lam: float = 0.95) -> Tensor:
    """GAE without discount, token by token: the reward comes with the last token, whose next value is 0."""
    found, ahead = [], 0.0
    numbers = [*values.tolist(), 0.0]
    for t in reversed(range(len(values))):
        delta = (reward if t == len(values) - 1 else 0.0) + numbers[t + 1] - numbers[t]
        ahead = delta + lam * ahead
        found.insert(0, ahead)
    return torch.tensor(found)


def naive_ppo(lm: Any, value: Callable[[dict[str, Any]], Tensor], critic: list[Tensor]) -> list[float]:
    """Plain SGD updates of a policy and its critic over the whole round; returns the loss before each.

    Args:
        lm: The policy.
        value: The critic: values of the states before a response's tokens.
        critic: Its parameters, which train with a rate of their own.
    """
    rows = [row for group in stored_prompts() for row in group]
    old = [(token_logps(lm, row).detach(), value(row).detach()) for row in rows]
    raw = [advantages_of(values, row["reward"]) for row, (_, values) in zip(rows, old, strict=True)]
    everything = torch.cat(raw)
    losses = []
    for _ in range(UPDATES):
        surrogates, errors = [], []
        for row, (old_logps, old_values), own in zip(rows, old, raw, strict=True):
            gain = (own - everything.mean()) / everything.std()
            ratio = (token_logps(lm, row) - old_logps).exp()
            surrogates.append(torch.maximum(-gain * ratio, -gain * ratio.clamp(0.8, 1.2)))
            values, returns = value(row), own + old_values
            near = old_values + (values - old_values).clamp(-0.2, 0.2)
            errors.append(torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2)
        total = torch.cat(surrogates).mean() + VF * torch.cat(errors).mean()
        policy = [p for p in lm.parameters() if not any(p is c for c in critic)]
        gradients = torch.autograd.grad(total, [*policy, *critic])
        losses.append(total.item())
        with torch.no_grad():
            for parameter, gradient in zip([*policy, *critic], gradients, strict=True):
                parameter -= (CRITIC_LR if any(parameter is c for c in critic) else LR) * gradient
    return losses


def states(model: Any, row: dict[str, Any]) -> Tensor:
    """Hidden states before each token of a response, without padding."""
    ids = torch.tensor([row["prompt_tokens"] + row["response_tokens"]])
    return model.base_model(input_ids=ids).last_hidden_state[0, len(row["prompt_tokens"]) - 1 : -1]


def named(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tokens", ["null", "60"])  # 60: every group is split
def test_a_critic_from_the_reward_model_equals_a_naive_computation(
    tokens: str,
    fit: Fit,
    llama: Path,
    reward_model: Path,
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    arguments = ("--model.critic.model", str(reward_model), "--data.max_tokens_per_batch", tokens)
    assert fit(*OWN, *arguments) == 0
    lm = AutoModelForCausalLM.from_pretrained(llama).eval()
    critic = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    start, critic_start = named(lm), named(critic)
    losses = naive_ppo(lm, lambda row: critic.score(states(critic, row))[:, 0], list(critic.parameters()))
    assert logged_losses() == pytest.approx(losses, rel=1e-4)
    assert_same_training(start, named(lm))
    assert_same_training(critic_start, named(critic), "run", "model/critic")
    assert logged("train/critic_lr") == pytest.approx([CRITIC_LR] * UPDATES)
    assert logged("train/lr") == pytest.approx([LR] * UPDATES)


@pytest.mark.parametrize("tokens", ["null", "60"])
def test_a_critic_on_the_policys_trunk_equals_a_naive_computation(
    tokens: str,
    fit: Fit,
    with_head: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    arguments = ("--model.critic.shares_trunk", "true", "--data.max_tokens_per_batch", tokens)
    assert fit("--model.policy", str(with_head), *OWN, *arguments) == 0
    lm = AutoModelForCausalLM.from_pretrained(with_head).eval()
    start = named(lm)
    head = load_file(with_head / "critic" / "value_head.safetensors")
    weight, bias = (head[name].clone().requires_grad_() for name in ("weight", "bias"))
    losses = naive_ppo(lm, lambda row: states(lm, row) @ weight[0] + bias, [weight, bias])
    assert logged_losses() == pytest.approx(losses, rel=1e-4)
    assert_same_training(start, named(lm))
    trained = load_file("run/model/critic/value_head.safetensors")
    for name, wanted in {"weight": weight, "bias": bias}.items():
        moved = wanted.detach() - head[name]
        assert moved.norm() > 1e-6
        assert (trained[name] - head[name] - moved).norm() < 1e-3 * moved.norm()
    assert not any("value_head" in name for name in load_file("run/model/model.safetensors"))


def saved(folder: str) -> dict[str, Tensor]:
    """All weights of a run's export, those of the critic included."""
    found = {}
    for file in sorted(Path(folder, "model").rglob("*.safetensors")):
        found |= {f"{file.parent.name}/{name}": tensor for name, tensor in load_file(file).items()}
    return found


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


CRITICS = {
    "own": (),
    "adapters": ("--model.critic.lora.rank", "2", "--model.lora.rank", "2", "--model.kl_coef", "0.1"),
    "trunk": ("--model.critic.shares_trunk", "true"),
    "half": ("--trainer.precision", "bf16-mixed", "--model.gradient_checkpointing", "true"),
}
FURTHER = [pytest.mark.slow, pytest.mark.exhaustive]
MARKS = {"adapters": pytest.mark.slow, "half": FURTHER}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=MARKS.get(k, ())) for k in CRITICS])
def test_the_first_updates_train_the_critic_alone_and_a_stopped_run_resumes_in_them(
    kind: str,
    fit: Fit,
    llama: Path,
) -> None:
    """Two of three updates train the critic alone; the run is stopped inside its round, after the first and second.

    The KL to the policy before the round, on held-out prompts, is then that of the run without stops.
    """
    held_out = ("--data.val_prompts", "2", "--rollout.val_temperature", "1")
    arguments = (*PPO, *ADAM, *STEPWISE, *CRITICS[kind], *held_out, "--trainer.gradient_clip_val", "1")
    warm = ("--model.critic.warmup_updates", "2")
    assert fit(*arguments, *warm) == 0
    wanted = saved("run")
    parts = ("--trainer.default_root_dir", "parts")
    start = {f"model/{name}": tensor for name, tensor in load_file(llama / "model.safetensors").items()}
    critics = []
    for steps in ("1", "2", "-1"):
        assert fit(*arguments, *warm, *parts, "--trainer.max_steps", steps) == 0
        found = saved("parts")
        if steps != "-1":
            assert_equal({name: found[name] for name in start}, start)  # without weight decay
            state = torch.load("parts/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
            policy, critic = (group["params"] for group in state["param_groups"])
            assert set(state["state"]) == set(critic)  # the policy has no moments yet
            assert policy
        critics.append({name: tensor for name, tensor in found.items() if name.startswith("critic/")})
    assert any(not torch.equal(tensor, critics[1][name]) for name, tensor in critics[0].items())
    assert_equal(found, wanted)
    assert any(not torch.equal(wanted[name], tensor) for name, tensor in start.items())
    whole, resumed = (RoundStore(run).held_out(1).info("kl") for run in ("run", "parts"))
    assert resumed["new_old"] == whole["new_old"] != 0


def test_a_run_does_not_go_on_with_another_critic(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*OWN) == 0
    assert fit(*OWN, "--trainer.max_epochs", "2", "--model.critic.shares_trunk", "true") == 1
    assert "The checkpoint is of another critic than `model.critic` gives" in capsys.readouterr().err


def test_an_exported_critic_is_a_reward_model_and_the_start_of_another_run(
    fit: Fit, llama: Path, reward_model: Path
) -> None:
    from rlhf_pl.models.source import ModelSource
    from rlhf_pl.models.value_model import load_critic
    from rlhf_pl.rewards.classifier import ClassifierReward

    assert fit(*OWN, "--model.critic.model", str(reward_model)) == 0
    exported = load_file("run/model/critic/model.safetensors")
    model = load_critic(ModelSource("run/model/critic", option="model.critic.model"), seed=1)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in exported.items())
    assert isinstance(ClassifierReward("run/model/critic"), ClassifierReward)
    again = ("--trainer.default_root_dir", "again", "--model.policy", "run/model")
    assert fit(*again, *OWN, "--model.critic.model", "run/model/critic") == 0
    moved = load_file("again/model/critic/model.safetensors")
    assert 0 < max(float((moved[n] - t).abs().max()) for n, t in exported.items()) < 1


def test_another_critic_computes_the_stored_values_anew(fit: Fit, llama: Path, reward_model: Path) -> None:
    """The round is kept, and a run that starts with the new settings gives the same."""
    changed = (*OWN, "--model.critic.model", str(reward_model))
    assert fit(*OWN) == 0
    before = RoundStore("run").round(0)
    assert before.manifest["settings"]["training"]["critic"]["lr"] == CRITIC_LR
    responses, values = before.read("responses"), before.read("logps")["old_values"].to_pylist()
    assert fit(*changed) == 0
    assert fit(*changed, "--trainer.default_root_dir", "direct") == 0
    after = RoundStore("run").round(0)
    assert after.read("responses").equals(responses)
    assert after.read("logps")["old_values"].to_pylist() != values
    assert_equal(saved("run"), saved("direct"))


def test_what_would_have_no_effect_is_refused(llama: Path) -> None:
    for settings, text in (
        ({"shares_trunk": True, "model": "x"}, r"`model\.critic\.model` has no effect"),
        ({"shares_trunk": True, "lora": LoRA()}, r"`model\.critic\.lora` has no effect"),
        ({"lr": 0.0}, r"`model\.critic\.lr` must be above 0"),
        ({"warmup_updates": -1}, r"`model\.critic\.warmup_updates` must be 0 or more"),
        ({"lora": LoRA(dropout=0.1)}, r"`model\.critic\.lora\.dropout` is 0\.1"),
        ({"lora": LoRA(base_dtype="nf4")}, r"`model\.critic\.lora\.base_dtype`"),
    ):
        with pytest.raises(InputError, match=text):
            Critic(**settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"GRPOLoss reads no values of a critic, .* Train with RebelModule"):
        PPOModule(str(llama), GRPOLoss())
    with pytest.raises(InputError, match=r"needs old_values.*PPOModule"):
        RebelModule(str(llama), PPOLoss())


def test_a_wrong_critic_is_named(fit: Fit, with_head: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = save_reward_model(Path("few"), vocab_size=100)
    assert fit(*PPO, "--model.critic.model", str(few)) == 1
    error = capsys.readouterr().err
    assert "`model.critic.model`: 'few' has 100 embeddings" in error
    assert "Traceback" not in error
    save_file({"weight": torch.zeros(1, 8), "bias": torch.zeros(1)}, with_head / "critic" / "value_head.safetensors")
    assert fit("--model.policy", str(with_head), *PPO, "--model.critic.shares_trunk", "true") == 1
    assert "does not hold the value head of this model" in capsys.readouterr().err
