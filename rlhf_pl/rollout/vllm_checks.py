"""Whether vLLM can sample what a run trains: attention heads, rotary factors, memory, options of the engine."""

from collections.abc import Mapping
from typing import Any

from rlhf_pl.models.rotary import factors_key, longrope_scales, thresholds
from rlhf_pl.utils.errors import InputError

MARGIN_BYTES = 4 * 2**30  # of a GPU that neither is to take: contexts, graphs, what allocators keep


def reshaping(arguments: Mapping[str, Any]) -> list[str]:
    """Which of an engine's arguments change the distribution that it draws from, or the log-probs that it notes."""
    changed = [n for n in ("logits_processors", "override_generation_config") if arguments.get(n)]
    if (arguments.get("logprobs_mode") or "raw_logprobs") != "raw_logprobs":
        changed.append("logprobs_mode")
    if (arguments.get("speculative_config") or {}).get("rejection_sample_method") == "synthetic":
        changed.append("speculative_config")
    return changed


def check_engine_rotary(config: Any, longest: int, engine: int, where: str) -> None:
    """vLLM takes `longrope` factors by an engine's longest sequence, and stretches no `dynamic` ones.

    Args:
        config: The policy's.
        longest: Tokens of the longest row of the run.
        engine: Of the engine's.
        where: What sets that, for the error.

    Raises:
        InputError: Its factors are not those of the run.
    """
    limits = thresholds(config)
    if longest > (limit := limits.get("dynamic", longest)):
        raise InputError(
            "`rollout.sampler`: vLLM does not stretch dynamic rotary factors, which this policy's rows need: they have "
            f"{longest} tokens at most, over its {limit}. Lower data.max_prompt_tokens or "
            "rollout.sampling.max_response_tokens, or use --rollout.sampler TransformersSampler."
        )
    if factors_key(limits, longest) != factors_key(limits, engine):
        limit = limits["longrope"]
        raise InputError(
            f"{where} is {engine}, and this run's longest prompt with its response has {longest} tokens: the policy's "
            f"rotary factors change at {limit}, so responses would be sampled with other ones. Set it to {longest}."
        )
    if "longrope" in limits:
        own, other = longrope_scales(config, longest)
        if abs(own - other) > 1e-4 * own:
            raise InputError(
                f"`rollout.sampler`: vLLM multiplies this policy's longrope embeddings by {other:.4g}, and "
                f"transformers by {own:.4g} (factor, attention_factor and mscales of its config), so responses would "
                "be another model's. Use --rollout.sampler TransformersSampler."
            )


def engine_share(total: int, trainer: int) -> float:
    """Share of a GPU that is left to the engine.

    Args:
        total: Of the GPU, bytes.
        trainer: What the trainer will hold there while answers are drawn, bytes.

    Raises:
        InputError: Next to nothing is left.
    """
    share = (total - trainer - MARGIN_BYTES) / total
    if share < 0.05:
        raise InputError(
            f"`rollout.sampler`: of {total / 2**30:.1f} GiB the trainer holds {trainer / 2**30:.1f} GiB while answers "
            "are drawn, which leaves no room for an engine beside it. Shard the trainer (--trainer.strategy fsdp2 over "
            "more devices), train adapters (--model.lora LoRA), or draw answers elsewhere (VLLMServerSampler)."
        )
    return round(share, 3)


def check_heads(config: Any) -> None:
    """On the CPU vLLM finds out about unsupported attention heads only in the middle of its first batch."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    supported = CPUAttentionBackend.get_supported_head_sizes()
    if size not in supported:
        raise InputError(
            f"`rollout.sampler`: on the CPU vLLM has no attention heads of size {size}, only of {supported}. Choose "
            "another model, or use --rollout.sampler TransformersSampler."
        )
