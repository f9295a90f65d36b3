"""A sampler with a vLLM engine in the trainer's process: weights are synced in memory, prompts are token ids."""

import contextlib
import gc
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_pl.models.rounding import round_to
from rlhf_pl.rollout.base import EngineSpec, NamedTensors, PromptTokens, Response, Sampler, SamplingConfig
from rlhf_pl.rollout.checkpoint_format import make_checkpoint_converter
from rlhf_pl.rollout.vllm_checks import (
    check_engine_rotary,
    check_heads,
    compute_engine_share,
    find_distribution_options,
)
from rlhf_pl.rollout.vllm_experts import check_kernels, detach_kernels
from rlhf_pl.rollout.vllm_process import engine_environment, private_rng, private_temporary_folder
from rlhf_pl.rollout.weight_sync.self_check import StaleSamplerError
from rlhf_pl.utils.devices import fast_dtype
from rlhf_pl.utils.errors import InputError

_MAX_SEQUENCES_ON_CPU = 256  # responses sampled at a time


class VLLMSampler(Sampler):
    """Samples responses with vLLM, in the trainer's process.

    Args:
        dtype: The engine's dtype; the policy's weights are cast to it. bfloat16 is twice as fast as float32, except on
            CPUs without bfloat16 instructions, where float32 is used instead.
        max_sequences: Responses sampled at a time; null for the engine's default on GPUs (1,024 on large ones), and 256
            on CPUs.
        gpu_memory_utilization: Fraction of the GPU's memory for the engine; the rest is the trainer's. null for
            everything but 4 GiB and what the trainer occupies during sampling (weights, the optimizer's moments, a
            reward model). Unused on CPUs.
        kv_cache_gib: Memory for the KV cache on CPUs, GiB. Unused on GPUs.
        tensor_parallel_size: Ranks that share one engine, each with a part of the model; 1 for an engine per rank.
        engine_args: Further arguments of `vllm.LLM`.
    """

    def __init__(
        self,
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
        max_sequences: int | None = None,
        gpu_memory_utilization: float | None = None,
        kv_cache_gib: float = 1.0,
        tensor_parallel_size: int = 1,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        self.dtype = fast_dtype(dtype, "cuda" if torch.cuda.is_available() else "cpu") or dtype
        self.max_sequences = max_sequences
        self.gpu_memory_utilization = gpu_memory_utilization
        self.kv_cache_gib = kv_cache_gib
        if tensor_parallel_size < 1:
            raise InputError(f"`rollout.sampler.tensor_parallel_size` must be 1 or more, got {tensor_parallel_size}.")
        self.ranks_per_engine = tensor_parallel_size
        self.engine_args = engine_args or {}
        if torch.cuda.is_available() and not self.engine_args.get("enforce_eager"):
            self.start_note = "compiling, cached for later runs"
        self._llm: Any = None
        self._requests = 0
        self._expected_names: set[str] = set()

    def check(self) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise InputError(
                "`rollout.sampler`: vLLM is not installed. Install it (pip install 'rlhf-pl[vllm]' on GPU machines, "
                "'rlhf-pl[cpu]' on others), or use --rollout.sampler TransformersSampler."
            )

    def check_rotary(self, config: Any, longest: int) -> None:
        engine = int(self.engine_args.get("max_model_len") or longest)
        check_engine_rotary(config, longest, engine, "`rollout.sampler.engine_args`: max_model_len")

    def reshapes(self) -> list[str]:
        return [
            f"engine_args.{name} is {self.engine_args[name]!r}" for name in find_distribution_options(self.engine_args)
        ]

    def start(self, spec: EngineSpec) -> None:
        self.check()
        from vllm import LLM

        self._eos = list(spec.source.eos_token_ids)
        self._to_checkpoint_format = make_checkpoint_converter(spec.source)
        self._is_tied = bool(spec.source.config.get_text_config().tie_word_embeddings)
        self._on_gpu = torch.cuda.is_available()
        if not self._on_gpu:
            check_heads(spec.source.config.get_text_config())
        self._max_model_tokens = spec.max_model_tokens
        args: dict[str, Any] = {
            "dtype": self.dtype,
            "max_model_len": spec.max_model_tokens,
            "revision": spec.source.revision,
            "trust_remote_code": spec.source.trust_remote_code,
            "load_format": "dummy",  # the weights come from the trainer
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "logprobs_mode": "raw_logprobs",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        limit = self.max_sequences or (None if self._on_gpu else _MAX_SEQUENCES_ON_CPU)
        if limit is not None:
            args["max_num_seqs"] = max(1, min(limit, spec.max_sequences))
        if self._on_gpu:
            share = self.gpu_memory_utilization or compute_engine_share(
                torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory, spec.trainer_bytes
            )
            args |= {"gpu_memory_utilization": share, "enable_sleep_mode": True}
        else:
            args |= {
                "enforce_eager": True,
                "kv_cache_memory_bytes": int(self.kv_cache_gib * 2**30),
                # With a chunked prefill vLLM rewinds its seeded generator, which CPU generators can't do.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, spec.max_model_tokens),
            }
        # vLLM does not accept logits processors together with speculative decoding
        self._uses_own_top_p = not self._on_gpu and not {"logits_processors", "speculative_config"} & set(
            self.engine_args
        )
        if self._uses_own_top_p:
            from rlhf_pl.rollout.vllm_nucleus import Nucleus

            args["logits_processors"] = [Nucleus]
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed:
            args["distributed_executor_backend"] = "external_launcher"
            args["tensor_parallel_size"] = self.ranks_per_engine
        try:
            with private_rng(), private_temporary_folder(), engine_environment(distributed):
                self._llm = LLM(spec.source.path, **(args | self.engine_args))
        except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
            raise InputError(
                f"`rollout.sampler`: vLLM could not start with {spec.source.path!r}: {_first_line(error)} Change its "
                "arguments or the model, or use --rollout.sampler TransformersSampler."
            ) from error
        # The engine's own shutdown would destroy the trainer's default process group.
        finalizer = getattr(self._llm.llm_engine.engine_core, "_finalizer", None)
        if finalizer is not None:
            finalizer.detach()
        self._owns_process_group = not distributed and torch.distributed.is_initialized()

    @torch.no_grad()
    def invalidate_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the engine's own parameters in place, fused and repacked ones included."""
        self._expected_names = set(tensors)
        for _, parameter in self._parameters():
            if parameter.is_floating_point():
                parameter.fill_(torch.nan)

    def readable_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Mostly embeddings and norms: only parameters that are neither fused nor repacked keep their names."""
        return self._parameters()

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names and parameters of the engine's model."""
        model = self._model()
        return iter([] if model is None else [(n, p) for n, p in model.named_parameters() if p.numel()])

    def _model(self) -> Any:
        core = self._llm.llm_engine.engine_core.engine_core
        worker = getattr(core.model_executor, "driver_worker", None)
        runner = getattr(getattr(worker, "worker", worker), "model_runner", None)
        return getattr(runner, "model", None)

    def reset(self) -> None:
        self._llm.reset_prefix_cache()

    def _reload(self, tensors: NamedTensors) -> set[str]:
        """Stream tensors into the engine and return their names."""
        dtype = getattr(torch, self.dtype)
        names: set[str] = set()

        engine = self._model()

        def stream() -> NamedTensors:
            for name, tensor in tensors:
                names.add(name)
                # some of vLLM's models (Gemma-2) have no module for a tied head and reject its weight
                if name != "lm_head.weight" or not self._is_tied or engine is None or hasattr(engine, "lm_head"):
                    yield name, round_to(tensor.detach(), dtype)

        model = None if self._on_gpu else engine
        kernels = [] if model is None else detach_kernels(model)
        with torch.no_grad():
            self._llm.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": self._to_checkpoint_format(stream())}
            )
        try:
            check_kernels(kernels, model)
        except RuntimeError as error:
            raise InputError(f"`rollout.sampler`: {error}") from error
        return names

    def load_weights(self, tensors: NamedTensors) -> None:
        missing = self._expected_names - self._reload(tensors)
        if missing:  # the rest of a partly loaded fused tensor would be uninitialized memory
            raise StaleSamplerError(
                f"The sampler did not get all weights of the policy: {', '.join(sorted(missing)[:3])} missing."
            )
        if self._on_gpu and self._llm.llm_engine.is_sleeping():
            self._llm.wake_up(tags=["kv_cache"])
        # Otherwise cached blocks of the previous policy would be used for the new one.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still in flight.")

    def generate(
        self, prompts: Sequence[PromptTokens], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        top_p, extra = sampling.top_p, {}
        if self._uses_own_top_p and top_p < 1 and sampling.top_k == 0:  # top-k must come before top-p: vLLM's own
            from rlhf_pl.rollout.vllm_nucleus import TOP_P

            top_p, extra = 1.0, {TOP_P: top_p}
        index_of: dict[str, int] = {}
        for index, prompt in enumerate(prompts):
            room = self._max_model_tokens - len(prompt.token_ids)
            if not prompt.token_ids or room < sampling.max_response_tokens:
                raise ValueError(
                    f"Prompt {index} has {len(prompt.token_ids)} tokens, with a response of up to "
                    f"{sampling.max_response_tokens}; the engine was started for {self._max_model_tokens} in total."
                )
            params = SamplingParams(
                n=sampling.num_responses,
                temperature=sampling.temperature,
                top_p=top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                max_tokens=sampling.max_response_tokens,
                seed=prompt.seed,
                logprobs=0 if prompt.logps else None,
                stop_token_ids=self._eos,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args=extra,
            )
            request = f"rlhf-{self._requests}"
            self._requests += 1
            index_of[request] = index
            engine.add_request(request, {"prompt_token_ids": prompt.token_ids}, params)
        with private_rng():  # around all steps, as reading a GPU's random state synchronizes the host with it
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        completions = sorted(output.outputs, key=lambda o: o.index)
                        yield _find_index(index_of, output.request_id), [_make_response(c) for c in completions]

    def sleep(self) -> None:
        if self._llm is not None and self._on_gpu:
            self._llm.sleep(level=2)

    def wake(self) -> None:
        if self._on_gpu and self._llm.llm_engine.is_sleeping():
            torch.cuda.empty_cache()
            self._llm.wake_up(tags=["weights"])

    def close(self) -> None:
        if self._llm is None:
            return
        core = self._llm.llm_engine.engine_core.engine_core
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        gc.unfreeze()
        from vllm.distributed import parallel_state

        parallel_state.destroy_model_parallel()
        if parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None
        if self._owns_process_group and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        self._llm = None
        # After a reload this registry keeps a reference to the whole model.
        with contextlib.suppress(ImportError):
            from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

            LAYERWISE_INFO.clear()
        gc.collect()


def _find_index(index_of: dict[str, int], request_id: str) -> int:
    """Index of a request's prompt; the engine may append a suffix to the request's id."""
    return index_of[request_id] if request_id in index_of else index_of["-".join(request_id.split("-")[:2])]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."


def _make_response(completion: Any) -> Response:
    ids = list(completion.token_ids)
    steps = completion.logprobs
    logps = [] if steps is None else [step[token].logprob for step, token in zip(steps, ids, strict=True)]
    return Response(ids, logps, finished=completion.finish_reason == "stop")
