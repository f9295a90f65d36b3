"""The vLLM engine inside the trainer's process: weights handed over in memory, token ids in and out."""

import contextlib
import gc
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_pl.rollout.base import EngineSpec, NamedTensors, PromptTokens, Response, Sampler, SamplingConfig
from rlhf_pl.rollout.checkpoint_format import checkpoint_format
from rlhf_pl.rollout.vllm_checks import check_engine_rotary, check_heads, engine_share, reshaping
from rlhf_pl.rollout.vllm_experts import check_kernels, take_kernels
from rlhf_pl.rollout.vllm_process import engine_environment, own_temporary_files, private_rng
from rlhf_pl.rollout.weight_sync.self_check import StaleSamplerError
from rlhf_pl.utils.devices import fast_dtype
from rlhf_pl.utils.errors import InputError

_ON_CPU = 256  # answers drawn at a time


class VLLMSampler(Sampler):
    """Draws answers with vLLM, in the trainer's process.

    Args:
        dtype: The engine's dtype; the policy is cast to it on the way. bfloat16 is twice as fast as float32, except on
            CPUs without instructions for it, where float32 is taken instead.
        max_sequences: Answers drawn at a time; null for the engine's own choice on GPUs (1,024 on large ones), and 256
            on CPUs.
        gpu_memory_utilization: Share of the GPU the engine may take; the rest is the trainer's. null for all but what
            the trainer holds while answers are drawn (weights, the optimizer's moments, a reward model) and 4 GiB.
            Unused on the CPU.
        kv_cache_gib: Memory for the KV cache on the CPU, GiB. Unused on GPUs.
        tensor_parallel_size: Ranks that share one engine, each with a part of the model; 1 for an engine per rank.
        engine_args: Any other argument of `vllm.LLM`.
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
            self.start_note = "compiles, kept for later runs"
        self._llm: Any = None
        self._requests = 0
        self._announced: set[str] = set()

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
        return [f"engine_args.{name} is {self.engine_args[name]!r}" for name in reshaping(self.engine_args)]

    def start(self, spec: EngineSpec) -> None:
        self.check()
        from vllm import LLM

        self._eos = list(spec.source.eos_token_ids)
        self._as_stored = checkpoint_format(spec.source)
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
        most = self.max_sequences or (None if self._on_gpu else _ON_CPU)
        if most is not None:
            args["max_num_seqs"] = max(1, min(most, spec.max_sequences))
        if self._on_gpu:
            share = self.gpu_memory_utilization or engine_share(
                torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory, spec.trainer_bytes
            )
            args |= {"gpu_memory_utilization": share, "enable_sleep_mode": True}
        else:
            args |= {
                "enforce_eager": True,
                "kv_cache_memory_bytes": int(self.kv_cache_gib * 2**30),
                # A prompt whose prefill is split makes vLLM rewind its seeded generator, which CPU generators can't.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, spec.max_model_tokens),
            }
        # beside speculative decoding vLLM takes no processors
        self._own_top_p = not self._on_gpu and not {"logits_processors", "speculative_config"} & set(self.engine_args)
        if self._own_top_p:
            from rlhf_pl.rollout.vllm_nucleus import Nucleus

            args["logits_processors"] = [Nucleus]
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed:
            args["distributed_executor_backend"] = "external_launcher"
            args["tensor_parallel_size"] = self.ranks_per_engine
        try:
            with private_rng(), own_temporary_files(), engine_environment(distributed):
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
        """What the engine computes with is overwritten where it lies, fused and repacked as it is."""
        self._announced = set(tensors)
        for _, parameter in self._parameters():
            if parameter.is_floating_point():
                parameter.fill_(torch.nan)

    def readable_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What is neither fused nor repacked keeps its name: embeddings and norms, mostly."""
        return self._parameters()

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The engine's own."""
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
        """Stream tensors into the engine; returns their names."""
        dtype = getattr(torch, self.dtype)
        names: set[str] = set()

        engine = self._model()

        def stream() -> NamedTensors:
            for name, tensor in tensors:
                names.add(name)
                # of a tied head some of vLLM's models have nothing (Gemma-2), and take nothing
                if name != "lm_head.weight" or not self._is_tied or engine is None or hasattr(engine, "lm_head"):
                    yield name, tensor.detach().to(dtype)

        model = None if self._on_gpu else engine
        kernels = [] if model is None else take_kernels(model)
        with torch.no_grad():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._as_stored(stream())})
        try:
            check_kernels(kernels, model)
        except RuntimeError as error:
            raise InputError(f"`rollout.sampler`: {error}") from error
        return names

    def load_weights(self, tensors: NamedTensors) -> None:
        missing = self._announced - self._reload(tensors)
        if missing:  # of a fused tensor that came in part, the rest would be whatever lay in memory
            raise StaleSamplerError(
                f"The sampler was not given all weights of the policy: {', '.join(sorted(missing)[:3])} missing."
            )
        if self._on_gpu and self._llm.llm_engine.is_sleeping():
            self._llm.wake_up(tags=["kv_cache"])
        # Cached blocks of the old policy would otherwise be used for the new one.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still in flight.")

    def generate(
        self, prompts: Sequence[PromptTokens], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        top_p, extra = sampling.top_p, {}
        if self._own_top_p and top_p < 1 and sampling.top_k == 0:  # with a top-k, which comes first, vLLM's own
            from rlhf_pl.rollout.vllm_nucleus import TOP_P

            top_p, extra = 1.0, {TOP_P: top_p}
        index_of: dict[str, int] = {}
        for index, prompt in enumerate(prompts):
            room = self._max_model_tokens - len(prompt.token_ids)
            if not prompt.token_ids or room < sampling.max_response_tokens:
                raise ValueError(
                    f"Prompt {index} has {len(prompt.token_ids)} tokens; the engine was started for prompt plus answer "
                    f"of {self._max_model_tokens} and {sampling.max_response_tokens} were asked for."
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
        with private_rng():  # around all steps: reading a GPU's state makes the host wait for it
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        answers = sorted(output.outputs, key=lambda o: o.index)
                        yield _index(index_of, output.request_id), [_response(a) for a in answers]

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
        # After a reload this registry pins the whole model.
        with contextlib.suppress(ImportError):
            from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

            LAYERWISE_INFO.clear()
        gc.collect()


def _index(index_of: dict[str, int], request_id: str) -> int:
    """The engine may append a suffix of its own to a request's id."""
    return index_of[request_id] if request_id in index_of else index_of["-".join(request_id.split("-")[:2])]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."


def _response(answer: Any) -> Response:
    ids = list(answer.token_ids)
    noted = answer.logprobs
    logps = [] if noted is None else [step[token].logprob for step, token in zip(noted, ids, strict=True)]
    return Response(ids, logps, finished=answer.finish_reason == "stop")
