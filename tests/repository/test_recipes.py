"""Runs every shipped config with tiny models of the same architecture and a few rows of data.

All other settings stay: a number or a name in a config that the program does not accept fails here.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf_pl.__main__ import main
from rlhf_pl.store.round_store import RoundStore
from tests.conftest import make_tokenizer, save_reward_model
from tests.rewards.test_armorm import armorm

__all__ = ["armorm"]  # a fixture
ROOT = Path(__file__).parents[2]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
ROUND = [
    "--data.val_prompts",
    "4",
    "--rollout.sampler",
    "TransformersSampler",
    "--rollout.sampling.max_response_tokens",
    "8",
]
# random models never sample an EOS
FEW_UPDATES = ["--rollout.drop_truncated", "false", "--data.updates_per_round", "3"]
ONE_CPU = ["--trainer.devices", "1", "--trainer.accelerator", "cpu", "--trainer.strategy", "auto"]


def save_lm(kind: str, folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    rows = {
        "prompts": [{"prompt": f"Say {i}"} for i in range(12)],
        "tldr": [{"prompt": f"POST: {i} TL;DR:", "completion": f" it is {i}"} for i in range(80)],
        "preferences": [
            {"prompt": f"POST: {i % 9} TL;DR:", "chosen": f" it is {i}", "rejected": f" not {i}"} for i in range(80)
        ],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return {name: folder / f"{name}.jsonl" for name in rows}


def run(config: str, run_dir: Path, *arguments: Any) -> None:
    text = ["fit", "--config", str(ROOT / config), *ONE_CPU, "--trainer.max_epochs", "1"]
    text += ["--trainer.default_root_dir", str(run_dir), "--trainer.enable_progress_bar", "false", *map(str, arguments)]
    assert main(text) == 0


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_ultrafeedback_llama3_armo(armorm: Path, files: dict[str, Path], tmp_path: Path) -> None:
    policy = save_lm("llama", tmp_path / "policy")
    run(
        "configs/recipes/ultrafeedback-llama3-armo.yaml",
        tmp_path / "run",
        *(
            "--model.policy",
            policy,
            "--data.prompts",
            files["prompts"],
            "--rollout.reward.init_args.model",
            armorm,
            *ROUND,
            *FEW_UPDATES,
        ),
    )
    manifest = RoundStore(tmp_path / "run").round(0).manifest
    assert manifest["stages"]["responses"]["sampling"] | {"max_response_tokens": 2048} == {
        "num_responses": 5,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "max_response_tokens": 2048,
    }
    assert len(manifest["stages"]["rewards"]["components"]) == 19
    training = manifest["settings"]["training"]
    assert training["pairs_per_update"] * 8 == 128
    assert training["optimizer_state"] == "new in every round"
    assert training["optimizer"]["betas"] == [0.9, 0.95]
    assert (training["optimizer"]["lr"], training["optimizer"]["weight_decay"]) == (3e-7, 1e-6)
    assert "eta=1000000.0" in training["loss"]


def test_four_nodes(armorm: Path, files: dict[str, Path], tmp_path: Path) -> None:
    one, four = (
        yaml.safe_load((ROOT / "configs" / name).read_text())
        for name in ("recipes/ultrafeedback-llama3-armo.yaml", "scaling/llama3-8b-4-nodes.yaml")
    )
    assert four["model"] == one["model"]
    for config in (one, four):
        trainer = config["trainer"]
        ranks = trainer["devices"] * trainer["num_nodes"]
        assert config["data"]["batch_size"] * trainer["accumulate_grad_batches"] * ranks == 128
    run(
        "configs/scaling/llama3-8b-4-nodes.yaml",
        tmp_path / "run",
        *("--trainer.num_nodes", 1, "--model.policy", save_lm("llama", tmp_path / "policy")),
        *("--data.prompts", files["prompts"], "--rollout.reward.init_args.model", armorm, *ROUND, *FEW_UPDATES),
    )
    assert RoundStore(tmp_path / "run").round(0).is_complete("training")


@pytest.fixture(scope="module")
def tldr_stages(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The policy of stage 1 and the reward model of stage 2."""
    folder = tmp_path_factory.mktemp("tldr")
    policy = save_lm("gpt_neox", folder / "policy")
    sft = ("--model.policy", policy, "--data.conversations", files["tldr"])
    run("configs/recipes/tldr-pythia-1-sft.yaml", folder / "sft", *sft)
    comparisons = ("--model.backbone", folder / "sft" / "model", "--data.preferences", files["preferences"])
    comparisons += ("--data.center_on", files["tldr"])
    run("configs/recipes/tldr-pythia-2-reward.yaml", folder / "rm", *comparisons)
    return folder / "sft" / "model", folder / "rm" / "model"


def test_tldr_pythia_in_three_stages(files: dict[str, Path], tldr_stages: tuple[Path, Path], tmp_path: Path) -> None:
    policy, reward_model = tldr_stages
    run(
        "configs/recipes/tldr-pythia-3-rebel.yaml",
        tmp_path / "rebel",
        *("--model.policy", policy, "--rollout.reward.init_args.model", reward_model),
        *("--data.prompts", files["prompts"], *ROUND, "--trainer.accumulate_grad_batches", 1),
    )
    stored = RoundStore(tmp_path / "rebel").round(0)
    assert stored.manifest["settings"]["pairs"]["shaping"]["missing_eos_reward"] == -1.0
    finished: dict[str, list[bool]] = {}
    for row in stored.read("responses").to_pylist():
        finished.setdefault(row["prompt_id"], []).append(row["finished"])
    both_truncated = sum(not any(flags) for flags in finished.values())  # both rewards are -1 then
    assert both_truncated > 0
    assert stored.info("pairs")["dropped"]["no_reward_difference"] >= both_truncated


def test_the_reward_model_is_centred_on_the_sft_data(
    files: dict[str, Path], tldr_stages: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its config has the mean score of these data as `bias`, so that their rewards have the mean 0."""
    assert json.loads((tldr_stages[1] / "config.json").read_text())["bias"] != 0
    score = ["score", "--reward", "ClassifierReward", "--reward.model", str(tldr_stages[1])]
    means = {}
    for name, option in (("centred", "null"), ("raw", "0.0")):
        output = tmp_path / f"{name}.jsonl"
        assert main([*score, "--reward.mean_score", option, "--data", str(files["tldr"]), "--output", str(output)]) == 0
        rewards = [json.loads(line)["reward"] for line in output.read_text().splitlines()]
        means[name] = sum(rewards) / len(rewards)
    bias = json.loads((tldr_stages[1] / "config.json").read_text())["bias"]
    assert means["raw"] == pytest.approx(bias, abs=1e-2)  # trained in half precision, scored in that of the export
    assert means["centred"] == pytest.approx(means["raw"] - bias, abs=1e-5)


@pytest.mark.slow(minutes=0.2)
def test_tldr_rebel_with_adapters(files: dict[str, Path], tldr_stages: tuple[Path, Path], tmp_path: Path) -> None:
    policy, reward_model = tldr_stages
    run(
        "configs/recipes/tldr-pythia-3-rebel-lora.yaml",
        tmp_path,
        *("--model.policy", policy, "--rollout.reward.init_args.model", reward_model, "--data.prompts"),
        *(files["prompts"], *ROUND, "--trainer.accumulate_grad_batches", 1),
    )
    assert "'rank': 1024" in str(RoundStore(tmp_path).round(0).manifest["settings"]["training"]["lora"])


def test_ultrafeedback_llama3_fsfairx(files: dict[str, Path], tmp_path: Path) -> None:
    run(
        "configs/recipes/ultrafeedback-llama3-fsfairx.yaml",
        tmp_path / "run",
        *("--model.policy", save_lm("llama", tmp_path / "policy"), "--data.prompts", files["prompts"], *ROUND),
        *("--data.columns.prompt", "prompt", "--trainer.accumulate_grad_batches", 1),
        *("--rollout.reward.init_args.model", save_reward_model(tmp_path / "rm")),
    )
    assert RoundStore(tmp_path / "run").round(0).is_complete("training")


def published_rows(tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Rows in the columns of the published rounds: prompts are padded on the left, responses on the right."""
    pad, eos = len(tokenizer), tokenizer.eos_token_id
    rows = []
    for i in range(count):
        texts = [f"it is {i} or {j}" for j in range(5)]
        user = [{"role": "user", "content": f"Say {i}"}]
        text = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        chosen, reject = ([*tokenizer(t, add_special_tokens=False)["input_ids"], eos] for t in (texts[1], texts[3]))
        rows.append(
            {
                "prompt_id": f"id-{i}",
                "prompt": f"Say {i}",
                **{f"response_{j}": response for j, response in enumerate(texts)},
                **{f"response_{j}_reward": 0.1 + 0.01 * (j == 1) - 0.01 * (j == 3) for j in range(5)},
                **{"chosen": texts[1], "chosen_reward": 0.11, "reject": texts[3], "reject_reward": 0.09},
                "llama_prompt_tokens": [pad] * (64 - len(prompt)) + prompt,
                "llama_chosen_tokens": chosen + [pad] * (48 - len(chosen)),
                "llama_reject_tokens": reject + [(pad, eos)[i % 2]] * (48 - len(reject)),
                **{"chosen_logprob": -20.0 - i, "reject_logprob": -21.0 - i},
            }
        )
    return rows


def test_ultrafeedback_llama3_armo_published(tmp_path: Path) -> None:
    """Pairs in the published columns train as they are: 5 updates of 8 of 12 pairs are 3.3 passes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    policy = save_lm("llama", tmp_path / "policy")
    rows = published_rows(make_tokenizer(), 15)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "round.parquet")
    run(
        "configs/recipes/ultrafeedback-llama3-armo-published.yaml",
        tmp_path / "run",
        *("--model.policy", policy, "--data.pairs", tmp_path / "round.parquet", "--data.val_pairs", 3),
        *("--data.updates_per_round", 5, "--trainer.accumulate_grad_batches", 8),
    )
    stored = RoundStore(tmp_path / "run").round(0)
    lengths = {len(row["response_tokens"]) for row in stored.read("responses").to_pylist()}
    assert max(lengths) < 48
    tokens = stored.read("responses")["response_tokens"].to_pylist()
    assert all(ids[-1] in (1, 2) and ids.count(ids[-1]) == 1 for ids in tokens)
    logps = dict(
        zip(stored.read("logps")["prompt_id"].to_pylist(), stored.read("logps")["old_logp"].to_pylist(), strict=True)
    )
    assert all(value == -21.0 - int(name.removeprefix("id-")) for name, value in logps.items())
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 5


def tldr_ppo(run_dir: Path, stages: tuple[Path, Path], files: dict[str, Path], *arguments: Any) -> None:
    policy, reward_model = stages
    models = ("--model.policy", policy, "--model.critic.model", reward_model)
    reward = ("--rollout.reward.init_args.model", reward_model, "--data.prompts", files["prompts"])
    run("configs/recipes/tldr-pythia-3-ppo.yaml", run_dir, *models, *reward, *ROUND, *arguments)


def test_tldr_pythia_with_ppo(files: dict[str, Path], tldr_stages: tuple[Path, Path], tmp_path: Path) -> None:
    """One round with the recipe's own numbers: the authors'."""
    tldr_ppo(tmp_path, tldr_stages, files)
    manifest = RoundStore(tmp_path).round(0).manifest
    training, sampling = manifest["settings"]["training"], manifest["stages"]["responses"]["sampling"]
    assert (sampling["num_responses"], sampling["temperature"]) == (1, 0.7)
    assert RoundStore(tmp_path).held_out(0).info("responses")["sampling"]["temperature"] == 0.01
    assert training["pairs_per_update"] == 512
    assert (training["kl_coef"], training["passes"]) == (0.05, 4)
    assert (training["optimizer"]["lr"], training["optimizer"]["eps"]) == (3e-6, 1e-5)
    policy, values = training["terms"]
    assert "'gamma': 1.0, 'lam': 0.95, 'whiten_rewards': True" in policy
    assert policy.startswith("1 x")
    assert "clip_high=0.2, clip_low=0.2" in policy
    assert "whiten_advantages=True" in policy
    assert values.startswith("0.1 x")
    assert "value_clip=0.2" in values


@pytest.mark.slow
def test_tldr_pythia_with_ppo_to_the_end(
    files: dict[str, Path], tldr_stages: tuple[Path, Path], tmp_path: Path
) -> None:
    """Three rounds with adapters as the authors train them; then another run from the exported policy and critic."""
    adapters = [f"--model{part}.lora{rest}" for part in ("", ".critic") for rest in ("=LoRA", ".rank=8", ".alpha=16")]
    shrunk = ("--trainer.max_epochs", 3, "--trainer.accumulate_grad_batches", 1, "--data.prompts_per_round", 4)
    rates = ("--model.optimizer.init_args.lr", 1e-3)
    tldr_ppo(tmp_path / "first", tldr_stages, files, *adapters, *shrunk, *rates)
    exported = tmp_path / "first" / "model"
    again = (exported, exported / "critic")
    tldr_ppo(tmp_path / "second", again, files, *shrunk, *rates)
    for name, start in (("first", tldr_stages), ("second", again)):
        model = tmp_path / name / "model"
        for folder, before in ((model, start[0]), (model / "critic", start[1])):
            assert_trained(before, folder)
        for index in range(3):
            assert RoundStore(tmp_path / name).round(index).is_complete("training")


def assert_trained(before: Path, after: Path) -> None:
    """All weights of a folder differ from those of another; both have the same names and dtypes."""
    from safetensors.torch import load_file

    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert {n: t.dtype for n, t in old.items()} == {n: t.dtype for n, t in new.items()}
    moved = [name for name, tensor in new.items() if not torch.equal(tensor, old[name])]
    assert any("layers.0." in name for name in moved)
    assert any("layers.4." in name for name in moved)


def test_nectar_openchat_starling(files: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    policy = save_lm("mistral", tmp_path / "policy")
    base = save_reward_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    state = {"transformer." + n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    (tmp_path / "starling").mkdir()
    torch.save(state | {"v_head.weight": tensors["score.weight"]}, tmp_path / "starling" / "pytorch_model.bin")
    run(
        "configs/recipes/nectar-openchat-starling.yaml",
        tmp_path / "run",
        *("--model.policy", policy, "--data.prompts", files["prompts"], *ROUND, "--trainer.accumulate_grad_batches", 1),
        *("--rollout.reward.init_args.model", tmp_path / "starling", "--rollout.reward.init_args.base", base),
        *("--model.optimizer.init_args.lr", 1e-3, "--export.dtype", "float32"),
        *("--rollout.shaping.missing_eos_reward", "null"),  # a random model never samples EOS
    )
    before, after = load_file(policy / "model.safetensors"), load_file(tmp_path / "run" / "model" / "model.safetensors")
    changed = {n for n, t in after.items() if not torch.equal(t, before[n].float())}
    assert any("layers.4." in n for n in changed)
    assert not any("layers.0." in n or "embed_tokens" in n for n in changed)


def test_strategies_of_the_recipes_can_be_built() -> None:
    from jsonargparse import ArgumentParser
    from lightning.pytorch.strategies import FSDPStrategy, Strategy

    for file in sorted((ROOT / "configs" / "recipes").glob("*.yaml")):
        strategy = yaml.safe_load(file.read_text())["trainer"].get("strategy")
        if strategy is None:
            continue
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--strategy", type=Strategy)
        built = parser.instantiate_classes(parser.parse_object({"strategy": strategy})).strategy
        assert isinstance(built, FSDPStrategy)


def test_tutorial_in_three_stages(tmp_path: Path, files: dict[str, Path]) -> None:
    """Each stage reads the output of the previous one; only models and sizes are replaced."""
    policy = save_lm("llama", tmp_path / "policy")
    run("configs/tutorial/sft.yaml", tmp_path / "sft", "--model.policy", policy)
    run("configs/tutorial/reward_model.yaml", tmp_path / "rm", "--model.backbone", tmp_path / "sft" / "model")
    run(
        "configs/tutorial/rebel.yaml",
        tmp_path / "rebel",
        *("--model.policy", tmp_path / "sft" / "model", "--rollout.reward.init_args.model", tmp_path / "rm" / "model"),
        *(*ROUND, "--data.prompts_per_round", 8),
    )
    assert (tmp_path / "rebel" / "model" / "model.safetensors").exists()


def test_every_config_is_built_here() -> None:
    """A config that is added to `configs/` needs a test of its own."""
    text = Path(__file__).read_text() + (ROOT / "tests" / "integration" / "test_quickstart.py").read_text()
    for file in (ROOT / "configs").rglob("*.yaml"):
        assert file.relative_to(ROOT).as_posix() in text
