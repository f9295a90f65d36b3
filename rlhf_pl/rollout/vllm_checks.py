"""Checks that vLLM can sample from a run's policy: attention heads, rotary factors, memory, engine options."""

from collections.abc import Mapping
from typing import Any

from rlhf_pl.models.rotary import factors_key, longrope_scales, thresholds
from rlhf_pl.utils.errors import InputError

MARGIN_BYTES = 4 * 2**30  # reserved on a GPU for contexts, graphs and the allocators' caches


def find_distribution_options(arguments: Mapping[str, Any]) -> list[str]:
    """The arguments of an engine that change the distribution it samples from, or the log-probs it records."""
    changed = [n for n in ("logits_processors", "override_generation_config") if arguments.get(n)]
    if (arguments.get("logprobs_mode") or "raw_logprobs") != "raw_logprobs":
        changed.append("logprobs_mode")
    if (arguments.get("speculative_config") or {}).get("rejection_sample_method") == "synthetic":
        changed.append("speculative_config")
    return changed


def check_engine_rotary(config: Any, longest: int, engine: int, where: str) -> None:
    """Check that an engine computes with the run's rotary factors.

    vLLM chooses `longrope` factors by the engine's longest sequence, and does not scale `dynamic` ones.

    Args:
        config: The policy's config.
        longest: Tokens of the longest row of the run.
        engine: Tokens of the engine's longest sequence.
        where: The option that sets `engine`, for the error.

    Raises:
        InputError: The engine's factors differ from those of the run.
    """
    limits = thresholds(config)
    if longest > (limit := limits.get("dynamic", longest)):
        raise InputError(
            "`rollout.sampler`: vLLM does not scale dynamic rotary factors, which this policy's rows need: they have "
            f"up to {longest} tokens, more than its {limit}. Lower data.max_prompt_tokens or "
            "rollout.sampling.max_response_tokens, or use --rollout.sampler TransformersSampler."
        )
    if factors_key(limits, longest) != factors_key(limits, engine):
        limit = limits["longrope"]
        raise InputError(
            f"{where} is {engine}, and this run's longest prompt with its response has {longest} tokens: the policy's "
            f"rotary factors change at {limit}, so responses would be sampled with different ones. Set it to {longest}."
        )
    if "longrope" in limits:
        own, other = longrope_scales(config, longest)
        if abs(own - other) > 1e-4 * own:
            raise InputError(
                f"`rollout.sampler`: vLLM multiplies this policy's longrope embeddings by {other:.4g}, and "
                f"transformers by {own:.4g} (factor, attention_factor and mscales of its config), so responses would "
                "be those of another model. Use --rollout.sampler TransformersSampler."
            )


def compute_engine_share(total: int, trainer: int) -> float:
    """Fraction of a GPU's memory that remains for the engine.

    Args:
        total: Memory of the GPU, bytes.
        trainer: Memory that the trainer occupies there during sampling, bytes.

    Raises:
        InputError: Less than 5% remains.
    """
    share = (total - trainer - MARGIN_BYTES) / total
    if share < 0.05:
        raise InputError(
            f"`rollout.sampler`: of {total / 2**30:.1f} GiB the trainer occupies {trainer / 2**30:.1f} GiB during "
            "sampling, which leaves no room for an engine. Shard the trainer (--trainer.strategy fsdp2 over more "
            "devices), train adapters (--model.lora LoRA), or sample elsewhere (VLLMServerSampler)."
        )
    return round(share, 3)


def check_heads(config: Any) -> None:
    """Refuse unsupported attention heads on a CPU, where vLLM itself only fails in the middle of its first batch."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    supported = CPUAttentionBackend.get_supported_head_sizes()
    if size not in supported:
        raise InputError(
            f"`rollout.sampler`: on CPUs vLLM does not support heads of size {size}, only of {supported}. Choose "
            "another model, or use --rollout.sampler TransformersSampler."
        )
