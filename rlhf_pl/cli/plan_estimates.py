"""The memory and the time of a run, computed from its config."""

from collections.abc import Mapping
from typing import Any, Protocol

from rlhf_pl.algorithms.prompt_groups import Z_REF
from rlhf_pl.callbacks import RoundRefresh
from rlhf_pl.cli.plan_critic import plan_critic
from rlhf_pl.cli.plan_prompts import PlannedPrompts
from rlhf_pl.cli.plan_trainer import PlannedTrainer
from rlhf_pl.data import RoundDataModule
from rlhf_pl.data.policy_module import PolicyModule
from rlhf_pl.models.footprint import (
    DTYPE_BYTES,
    activation_bytes,
    head_bytes,
    kv_bytes,
    model_size,
    reward_bytes,
)
from rlhf_pl.models.lora import LoRA
from rlhf_pl.rollout import VLLMSampler, VLLMServerSampler
from rlhf_pl.rollout.vllm_checks import MARGIN_BYTES
from rlhf_pl.rollout.vllm_server import BUCKET_BYTES


class PlannedModule(PolicyModule, Protocol):
    """A `PolicyModule` with the options that memory and time depend on; see `RebelModule`."""

    trainable_layers: int | None
    lora: LoRA | None
    attn_implementation: str
    use_liger_kernel: bool | None
    gradient_checkpointing: bool
    logprob_chunk_tokens: int


class Plan:
    """Estimates of a run's memory and time.

    Args:
        module: The policy module.
        data: The DataModule.
        options: The round's options.
        machine: The Trainer.
        refresh: The callback with the sampler.
        prompts: The prompts of a round.
    """

    def __init__(
        self,
        module: Any,
        data: RoundDataModule,
        options: Any,
        machine: PlannedTrainer,
        refresh: RoundRefresh,
        prompts: PlannedPrompts,
    ) -> None:
        self.module, self.data, self.options, self.machine = module, data, options, machine
        self.sampler: Any = refresh.sampler
        self.prompts = prompts
        planned = refresh.options_for(prompts.held_out)
        assert planned is not None
        self.val_responses = planned.val_sampling.num_responses
        self.config = module.source.config
        self.kernels = machine.kernels(module)
        self.model = model_size(self.config, module.trainable_layers, module.lora)
        self.critic = plan_critic(module)
        self.longest = prompts.longest + options.sampling.max_response_tokens
        # responses per prompt that are trained on
        one_pair = module.loss.uses_pairs and (options.selector is None or options.selector.gives_one_pair)
        self.has_mismatched = Z_REF in module.needs
        self.used = 2 if one_pair else options.sampling.num_responses

    @property
    def rows_text(self) -> str:
        """The length of the longest row, in words."""
        return f"rows of up to {self.longest:,} tokens"

    def memory(self, device_memory: float) -> dict[str, dict[str, int]]:
        """Bytes per device by phase and part, on devices of `device_memory` bytes."""
        module, model, config = self.module, self.model, self.config
        width, shards = DTYPE_BYTES[module.dtype_name], self.machine.shards
        held = self.machine.held(model, module.dtype_name, self.kernels.half)
        if self.critic is not None:
            held |= self.critic.held(shards, self.machine.has_copies(module.dtype_name, self.kernels.half))
        if not self.machine.on_gpu:
            held["policy before the round"] = self.snapshot_bytes()
        unit = max(model.rest, model.layer)
        groups, response = self.data.batch_size, self.options.sampling.max_response_tokens
        used, budget = self.used, self.data.max_tokens_per_batch
        group_tokens = self.longest + (used - 1) * response
        if budget is not None and group_tokens > budget:  # a part of a group, of at least one response
            groups, used = 1, max(1, 1 + (budget - self.longest) // response)
        elif budget is not None:
            groups = max(1, min(groups * self.machine.accumulate, budget // group_tokens))
        # with shared-prefix attention a group holds its prompt once, and a batch is one row without padding
        shares = module.attn_implementation == "sdpa"
        packed = groups * (self.longest + (used - 1) * response)
        rows, tokens = (1, packed) if shares else (used * groups, self.longest)
        sums = self.machine.gradient_copies
        training = {
            **held,
            "gradients": width * model.trainable // shards * sums,
            "activations": activation_bytes(config, rows, tokens, self.kernels, module.gradient_checkpointing),
            "output head": head_bytes(
                config,
                min(module.logprob_chunk_tokens, used * groups * response),
                self.machine.on_gpu,
                self.kernels.half,
                module.lora is None,
            ),
        }
        compute = 2 if self.kernels.half else width
        if self.machine.sharded:
            training["gathered units"] = compute * (model.rest + 2 * model.layer)
        if self.critic is not None:
            training |= self.critic.training(shards, sums, rows, tokens, self.kernels, module.gradient_checkpointing)
            if self.machine.sharded:
                training["gathered units"] += self.critic.gathered(compute)
        engine = self._engine_bytes(device_memory, held)
        sync = {
            **held,
            "sampler": engine,
            "gathered unit": width * unit if self.machine.sharded else 0,
            "sync buffers": self._sync_buffer_bytes(unit),
        }
        return {
            "train": training | ({} if self.machine.on_gpu else {"sampler": engine}),
            "generate": held | {"sampler": engine},
            "score": held | {"sampler": engine, "reward model": self._reward_bytes()},
            "sync": sync,
        }

    def training_factor(self) -> float:
        """How many times the training takes as long because of the responses to other prompts."""
        per_token = self._training_flops()
        return (per_token + 2) / per_token

    def _training_flops(self) -> int:
        """FLOPs of the training for each parameter and token, without passes ahead."""
        per_token = 6 if self.module.lora is None and self.module.trainable_layers is None else 4
        return per_token + 2 * self.module.gradient_checkpointing

    def _engine_bytes(self, device_memory: float, held: Mapping[str, int]) -> int:
        """Weights and KV cache of a rank's sampler. vLLM on a GPU fills its configured share of the memory."""
        if isinstance(self.sampler, VLLMServerSampler):
            return 0
        dtype = DTYPE_BYTES[self.sampler.dtype]
        weights = dtype * (self.model.total - self.model.adapters) // self.sampler.ranks_per_engine
        if isinstance(self.sampler, VLLMSampler) and not self.machine.on_gpu:
            return weights + int(self.sampler.kv_cache_gib * 2**30)
        if isinstance(self.sampler, VLLMSampler):
            share = self.sampler.gpu_memory_utilization
            if share is None:
                return max(weights, int(device_memory - sum(held.values()) - self._reward_bytes() - MARGIN_BYTES))
            return max(weights, int(share * device_memory))
        sequences = min(
            getattr(self.sampler, "max_sequences", None) or self.sampler.batch_size,
            self.options.sampling.num_responses * self.options.shard_prompts,
        )
        return weights + kv_bytes(self.config, sequences, self.longest, dtype) // self.sampler.ranks_per_engine

    def host_memory(self) -> dict[str, tuple[int, int]]:
        """Bytes in host memory on rank 0 and on each other rank, by what holds them. Under FSDP1 all ranks read."""
        whole = self.model.weight_bytes(DTYPE_BYTES[self.module.dtype_name])
        all_read = self.machine.all_ranks_read or self.model.quantized > 0
        found = {f"{self.module.source.path} while loading": (whole, whole if all_read else 0)}
        if self.critic is not None and self.critic.source is not None:
            own = self.critic.width * self.critic.size.total
            found[f"{self.critic.source.path} (critic) while loading"] = (own, own)
        return found | {"the policy before the round, while it trains": (self.snapshot_bytes(),) * 2}

    def checkpoint(self) -> int:
        """Bytes of a checkpoint of policy and critic."""
        own = self.model.checkpoint_bytes(DTYPE_BYTES[self.module.dtype_name])
        return own + (0 if self.critic is None else self.critic.checkpoint())

    def snapshot_bytes(self) -> int:
        """Bytes of each rank's snapshot of pi_old in host memory, for the KL on held-out prompts."""
        return (
            (self.prompts.held_out > 0)
            * DTYPE_BYTES[self.module.dtype_name]
            * self.model.trainable
            // self.machine.shards
        )

    def _sync_buffer_bytes(self, unit: int) -> int:
        """Bytes of the buffers for syncing weights: copies of the largest unit in the sampler's dtype, or a bucket."""
        if isinstance(self.sampler, VLLMServerSampler):
            return BUCKET_BYTES
        return 2 * DTYPE_BYTES[self.sampler.dtype] * unit

    def _reward_bytes(self) -> int:
        return reward_bytes(self.options.reward)

    def seconds(self, response_tokens: float, tokens_per_s: float, tflops: float) -> dict[str, float]:
        """Seconds of a round by phase, of those that it has, with typical prompts.

        Scoring counts reward models in this process only.

        Args:
            response_tokens: Mean length of a response.
            tokens_per_s: Throughput of an engine.
            tflops: Throughput of a device in training, TFLOP/s.
        """
        prompts = self.prompts.count
        responses = prompts * self.options.sampling.num_responses
        engines = max(1, self.machine.devices // self.sampler.ranks_per_engine)
        if isinstance(self.sampler, VLLMServerSampler):
            engines = len(self.sampler.urls)
        row = self.prompts.typical + response_tokens
        others = self.used - 1
        shares = self.module.attn_implementation == "sdpa"
        used_tokens = prompts * (row + others * response_tokens if shares else self.used * row)
        needs = self.module.needs
        models = ("old_logps" in needs and self.options.old_logps == "policy") + ("reference_logps" in needs)
        per_token = self._training_flops()
        speed = tflops * 1e12 * self.machine.devices
        reward = self._reward_bytes() / 2  # approximate number of parameters
        budget = self.data.max_tokens_per_batch
        is_split = budget is not None and row + others * response_tokens > budget
        ahead = is_split + self.has_mismatched  # passes without gradient ahead of each update
        per_row_token = (per_token + 2 * ahead) * self.model.total
        logps = 2 * (models + self.has_mismatched) * self.model.total
        if self.critic is not None:
            per_row_token += self.critic.flops(self.module.gradient_checkpointing, ahead)
            logps += self.critic.flops_of_old_values(self.model.total)
        held_out = self.prompts.held_out * self.val_responses
        seconds = {
            "held-out": held_out * response_tokens / (tokens_per_s * engines) + 2 * reward * held_out * row / speed,
            "generate": responses * response_tokens / (tokens_per_s * engines),
            "score": 2 * reward * responses * row / speed,
            "log-probs": logps * used_tokens / speed,
            "train": per_row_token * self._passes(prompts) * used_tokens / speed,
        }
        return {phase: value for phase, value in seconds.items() if value or phase == "score"}

    def _passes(self, prompts: int) -> float:
        """How many times a round's training uses a prompt, if all of them are usable."""
        if self.data.updates_per_round is None:
            return self.data.passes
        per_update = min(self.data.batch_size * self.machine.accumulate * self.machine.devices, prompts)
        return self.data.updates_per_round * per_update / prompts
