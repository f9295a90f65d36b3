"""Rotary factors that depend on length: a row's results do not depend on the other rows of a batch."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_pl.data.packing import Example, pack_examples
from rlhf_pl.data.preference_batches import PreferenceDataset
from rlhf_pl.data.preferences import Preference
from rlhf_pl.models.compute import Compute
from rlhf_pl.models.packed_batch import PrefixGroup, pack
from rlhf_pl.models.policy import PolicyLM, load_lm
from rlhf_pl.models.rendering import Renderer
from rlhf_pl.models.rotary import describe_factors, stabilize_rotary
from rlhf_pl.models.sequence_classifier import ClassifierLM, load_classifier
from rlhf_pl.models.source import ModelSource
from rlhf_pl.modules import pairwise
from rlhf_pl.rewards import ClassifierReward, Sample, VLLMServerReward
from rlhf_pl.rollout import EngineSpec, PromptTokens, SamplingConfig, TransformersSampler, VLLMSampler
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.errors import InputError
from tests.conftest import save_llama, save_reward_model
from tests.integration.test_fit import fit
from tests.stored_pairs import read_pairs

LIMIT = 20
LONG, SHORT = [4.0] * 16, [1.0] * 16


def longrope(short: list[float] = SHORT, long: list[float] = LONG) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": LIMIT,
            "factor": 8.0,
        }
    }


DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0},
    "max_position_embeddings": LIMIT,
}
KINDS = {"longrope": longrope(), "dynamic": DYNAMIC}


def rows_of(lengths: list[int]) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(3, 300, (n,), generator=random).tolist() for n in lengths]


def plain_logps(lm: Any, ids: list[int], prompt: int) -> Tensor:
    """An independent reference: a single row by plain transformers."""
    with torch.no_grad():
        logps = lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return logps[prompt - 1 : -1].gather(1, torch.tensor(ids[prompt:])[:, None])[:, 0]


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # shared prompts, and rows
@pytest.mark.parametrize("longest", [LIMIT, LIMIT + 1, 60])
def test_a_policy_uses_the_factors_of_the_longest_row_of_its_run(tmp_path: Path, attention: str, longest: int) -> None:
    folder = save_llama(tmp_path / "llama", **longrope())
    which = LONG if longest > LIMIT else SHORT
    same = plain(save_llama(tmp_path / "same", **longrope(which, which)))  # the same weights, one kind of factors
    policy = PolicyLM(load_lm(ModelSource(str(folder)), attn_implementation=attention, longest=longest))
    prompts, responses = rows_of([5, 9, 30]), rows_of([4, 8, 25, 3, 20, 6])
    if longest <= LIMIT:
        prompts, responses = prompts[:2], [r[:6] for r in responses]
    groups = [PrefixGroup(p, tuple(responses[2 * i : 2 * i + 2])) for i, p in enumerate(prompts)]
    found = policy(**pack(groups).inputs())
    expected = [plain_logps(same, [*g.prompt, *r], len(g.prompt)) for g in groups for r in g.responses]
    assert torch.allclose(found, torch.cat(expected), atol=1e-4)


def test_factors_may_depend_on_length_in_one_type_of_layers_only() -> None:
    """Gemma-3 has separate rotary embeddings for each type of layers."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sliding = {"rope_type": "default", "rope_theta": 10000.0}
    full = longrope(long=[4.0] * 16)["rope_parameters"]
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
        num_key_value_heads=1, layer_types=kinds, sliding_window=8, initializer_range=0.2,
        rope_parameters=dict(zip(kinds, (sliding, full), strict=True)),
    )  # fmt: skip
    torch.manual_seed(0)
    lm = Gemma3ForCausalLM(config).eval()
    same = Gemma3ForCausalLM(config).eval()
    same.load_state_dict(lm.state_dict())
    stabilize_rotary(lm, config, 60)
    rows = rows_of([8, 40])
    for row in rows * 2:  # plain transformers can only do this once per model
        mine = plain_logps(lm, row, 3)
        batch = torch.tensor([[*row, *[0] * (60 - len(row))], rows_of([60])[0]])
        mask = torch.ones_like(batch).index_fill(1, torch.arange(len(row), 60), 0)
        mask[1] = 1
        logps = deepcopy(same)(input_ids=batch, attention_mask=mask, use_cache=False).logits[0].log_softmax(-1)
        expected = logps[2 : len(row) - 1].gather(1, torch.tensor(row[3:])[:, None])[:, 0]
        assert torch.allclose(mine, expected, atol=1e-4)


def test_dynamic_factors_are_those_of_the_longest_row_of_a_run(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llama", **DYNAMIC)
    policy = PolicyLM(load_lm(ModelSource(str(folder)), longest=50))
    lm = plain(folder)
    head = 32
    theta = 10000.0 * (8.0 * 50 / LIMIT - 7.0) ** (head / (head - 2))  # the formula of dynamic factors at 50 positions
    lm.model.rotary_emb.rope_type = "default"
    lm.model.rotary_emb.inv_freq = theta ** -(torch.arange(0, head, 2) / head)
    rows = rows_of([12, 30, 50, 8])
    for batch in (rows, rows[:1], rows[::-1]):
        found = policy(**pack([PrefixGroup(row[:5], (row[5:],)) for row in batch]).inputs())
        expected = torch.cat([plain_logps(lm, row, 5) for row in batch])
        assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_examples_equal_each_example_alone(tmp_path: Path, kind: str) -> None:
    policy = PolicyLM(load_lm(ModelSource(str(save_llama(tmp_path, **KINDS[kind]))), longest=60))
    examples = [Example(row, [True] * len(row)) for row in rows_of([10, 40, 25])]
    together = policy(**pack_examples(examples).inputs())
    alone = torch.cat([policy(**pack_examples([e]).inputs()) for e in examples])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_scores_each_row_as_if_alone(tmp_path: Path, kind: str, attention: str) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = save_reward_model(tmp_path / "rm", **KINDS[kind])
    question = [{"role": "user", "content": "Go"}]
    texts = ["Yes", "Red, green, blue. " * 3, "No", "What is it? " * 8, "Some more of it", "Red, green, blue! " * 3]
    samples = [Sample("a", question, text) for text in texts]
    reward = ClassifierReward(str(folder), attn_implementation=attention)
    found = [r.reward for r in reward.score(samples)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lengths = []
    for sample, score in zip(samples, found, strict=True):
        chat = [*sample.messages, {"role": "assistant", "content": sample.response}]
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False).input_ids
        lengths.append(len(ids))
        model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
        with torch.no_grad():
            assert score == pytest.approx(model(input_ids=torch.tensor([ids])).logits.item(), abs=1e-4)
    assert min(lengths) < LIMIT < max(lengths)


def test_the_sampler_uses_the_runs_factors_beyond_and_below_the_threshold(tmp_path: Path) -> None:
    """A response that passes the threshold continues with its cached keys and values."""
    folder = save_llama(tmp_path / "phi", **longrope())
    source = ModelSource(str(folder))
    lm = load_lm(source, longest=48)
    sampler = TransformersSampler()
    sampler.start(EngineSpec(source, max_model_tokens=48, max_sequences=8))
    sampler.load_weights(lm.state_dict().items())
    prompts = rows_of([6, 16])
    requests = [PromptTokens(prompt, seed) for seed, prompt in enumerate(prompts)]
    responses = dict(sampler.generate(requests, SamplingConfig(num_responses=2, max_response_tokens=32)))
    groups = [PrefixGroup(p, tuple(r.token_ids for r in responses[i])) for i, p in enumerate(prompts)]
    assert max(len(group) for group in groups) > LIMIT
    sampled = [logp for i in range(2) for r in responses[i] for logp in r.logps]
    found = PolicyLM(lm)(**pack(groups).inputs())
    assert torch.allclose(found, torch.tensor(sampled), atol=1e-4)


LONG_PROMPT = "Tell me of the sea, the sky and the hills. " * 2
PROMPTS = [{"prompt": "Go" if i % 2 else f"{LONG_PROMPT}{i}", "answer": i} for i in range(8)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_learning_rate_zero_keeps_its_policy(
    tmp_path: Path, write_jsonl: Callable[..., str], kind: str
) -> None:
    """Short and long prompts, one pair per batch: the log-ratios of every pair are those of an unchanged policy."""
    folder = save_llama(tmp_path / "llama", **KINDS[kind])
    trainer, _ = fit(
        tmp_path / "run",
        folder,
        write_jsonl(PROMPTS),
        module={"optimizer": lambda p: pairwise.AdamW(p, lr=0.0)},
        data={"batch_size": 1, "val_prompts": 0, "max_prompt_tokens": 100},
        max_epochs=1,
    )
    assert abs(float(trainer.callback_metrics["train/kl_chosen"])) < 1e-5
    stored = RoundStore(tmp_path / "run").round(0)
    assert stored.manifest["settings"]["responses"]["rotary_factors"].startswith(kind)
    longest = trainer.datamodule.longest_tokens  # type: ignore[attr-defined]
    same = PolicyLM(load_lm(ModelSource(str(folder)), attn_implementation="eager", longest=longest))
    for pair in read_pairs(stored):
        for which in ("chosen", "rejected"):
            rows = pack([PrefixGroup(pair["prompt_tokens"], (pair[f"{which}_tokens"],))])
            expected = same(**rows.inputs(), temperature=0.9).sum().item()
            assert pair[f"{which}_old_logp"] == pytest.approx(expected, abs=1e-3)


def test_factors_that_an_engine_would_compute_differently_are_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config, dynamic = LlamaConfig(**longrope(), max_position_embeddings=8 * LIMIT), LlamaConfig(**DYNAMIC)
    VLLMSampler().check_rotary(config, 48)
    VLLMSampler(engine_args={"max_model_len": LIMIT + 5}).check_rotary(config, LIMIT + 1)
    with pytest.raises(InputError, match=r"max_model_len is 64, .* 18 tokens: .* change at 20"):
        VLLMSampler(engine_args={"max_model_len": 64}).check_rotary(config, 18)
    VLLMSampler().check_rotary(dynamic, LIMIT)
    with pytest.raises(InputError, match=r"does not scale dynamic .* up to 21 tokens"):
        VLLMSampler().check_rotary(dynamic, LIMIT + 1)
    assert describe_factors(config, LIMIT) == "longrope, up to 20 positions"
    assert describe_factors(config, 99) == "longrope, over 20 positions"
    assert describe_factors(dynamic, 99) == "dynamic, at 99 positions"
    assert describe_factors(LlamaConfig(), 99) is None


def test_a_scale_that_vllm_does_not_read_is_refused() -> None:
    """The scale is sqrt(1 + ln(stretch) / ln(limit)): 1.302 for the config's factor 8, 1.361 for 256 / 20 positions."""
    from transformers import LlamaConfig

    with pytest.raises(InputError, match=r"vLLM multiplies .* by 1\.361, and transformers by 1\.302 "):
        VLLMSampler().check_rotary(LlamaConfig(**longrope(), max_position_embeddings=256), 48)
    plain = longrope()["rope_parameters"] | {"factor": None}
    sizes = {"max_position_embeddings": 256}
    VLLMSampler().check_rotary(LlamaConfig(rope_parameters=plain, **sizes), 48)
    for scale, most in (("attention_factor", 18), ("attention_factor", 48), ("long_mscale", 48)):
        config = LlamaConfig(rope_parameters=plain | {scale: 1.1}, **sizes)
        with pytest.raises(InputError, match=r"those of another model\. Use .* TransformersSampler"):
            VLLMSampler(engine_args={"max_model_len": most}).check_rotary(config, most)


def served(folder: Path, length: int, **options: Any) -> VLLMServerReward:
    reward = VLLMServerReward("http://x", str(folder), **options)
    models = {"data": [{"id": "rm", "max_model_len": length}]}
    reward._service.get_json = {"http://x/v1/models": models}.get  # type: ignore[method-assign, assignment]
    return reward


def test_a_server_with_other_factors_is_refused(tmp_path: Path, reward_model: Path) -> None:
    samples = [Sample("a", [{"role": "user", "content": "Go"}], "Yes")]
    positions = {"max_position_embeddings": 8 * LIMIT}
    longropes = save_reward_model(tmp_path / "longrope", **longrope(), **positions)
    dynamic = save_reward_model(tmp_path / "dynamic", **DYNAMIC)
    served(longropes, LIMIT).check(samples)
    with pytest.raises(InputError, match=rf"`rollout.reward.url`: .* {LIMIT + 1}, over {LIMIT}, .*ClassifierReward"):
        served(longropes, LIMIT + 1).check(samples)
    scaled = save_reward_model(tmp_path / "scaled", **longrope())
    with pytest.raises(InputError, match=r"by 1\.443, and transformers by 1\.302 .*ClassifierReward"):
        served(scaled, LIMIT).check(samples)
    served(dynamic, 400, max_tokens=LIMIT).check(samples)
    with pytest.raises(InputError, match=rf"`rollout.reward.max_tokens` is {LIMIT + 1}: .* Set it to {LIMIT} at most"):
        served(dynamic, 400, max_tokens=LIMIT + 1).check(samples)
    served(reward_model, 4096).check(samples)


def test_copies_in_half_precision_use_the_same_factors(tmp_path: Path) -> None:
    compute = Compute(dtype=torch.bfloat16)
    lm = load_lm(ModelSource(str(save_llama(tmp_path, **longrope()))), compute=compute, longest=60)
    policy = PolicyLM(lm, compute=compute)
    rows = [PrefixGroup(row[:5], (row[5:],)) for row in rows_of([12, 40])]
    together, alone = (policy(**pack(part).inputs()) for part in (rows, rows[:1]))
    assert torch.allclose(together[:7], alone, atol=1e-2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_comparisons_train_on_the_scores_of_each_row_alone(tmp_path: Path, kind: str, attention: str) -> None:
    """Pairs with rows on both sides of the threshold share nothing; others share their prompt."""
    source = ModelSource(str(save_reward_model(tmp_path, **KINDS[kind])))
    render = Renderer(source.tokenizer, 400)
    question = [{"role": "user", "content": "Go"}]
    texts = [("Yes", "Red, green, blue. " * 3), ("No", "Yes"), ("What is it? " * 9, "Red, green, blue. " * 5)]
    responses = [[{"role": "assistant", "content": text} for text in both] for both in texts]
    pairs = [Preference(question, (chosen, rejected)) for chosen, rejected in responses]
    unit = ClassifierLM(load_classifier(source, attn_implementation=attention)).train()
    dataset = PreferenceDataset(pairs, render, source.config)
    dataset.pad_id, dataset.shares_prompts = 1, unit.shares_prompts
    assert unit.shares_prompts == (attention == "sdpa")
    together = unit(**dataset.__getitems__(([0, 1, 2], (1.0,))).inputs)
    rows = [row for both in dataset.rows for row in both]
    assert min(map(len, rows)) < LIMIT < max(map(len, rows))
    for score, row in zip(together, rows, strict=True):
        alone = load_classifier(source, attn_implementation="eager")
        assert alone(input_ids=torch.tensor([row.ids])).logits.item() == pytest.approx(score.item(), abs=1e-4)
