"""The memory and the time of a run over fixed data: SFT, reward models, offline pairs."""

from typing import Any

from rlhf_pl.algorithms.prompt_groups import Z_REF
from rlhf_pl.cli.plan_rows import PlannedRows
from rlhf_pl.cli.plan_trainer import PlannedTrainer
from rlhf_pl.data import OfflineDataModule
from rlhf_pl.models.footprint import DTYPE_BYTES, activation_bytes, classifier_size, head_bytes, model_size
from rlhf_pl.modules import RewardModelModule


class FixedPlan:
    """Estimates of the memory and time of a run over fixed data.

    Args:
        module: The module.
        data: Its DataModule.
        machine: The Trainer.
        rows: The rows of an epoch.
    """

    critic = None  # PPO's, which trains on rounds

    def __init__(self, module: Any, data: Any, machine: PlannedTrainer, rows: PlannedRows) -> None:
        self.module, self.data, self.machine, self.rows = module, data, machine, rows
        self.config = module.source.config
        self.kernels = machine.kernels(module)
        self.is_classifier = isinstance(module, RewardModelModule)
        layers = getattr(module, "trainable_layers", None)
        self.model = (
            classifier_size(module.source, module.lora)
            if self.is_classifier
            else model_size(self.config, layers, module.lora)
        )
        self.trains_all = module.lora is None and layers is None

    @property
    def rows_text(self) -> str:
        """What a micro-batch is made of, with the length of the longest."""
        return f"{self.rows.noun} of up to {self.rows.longest:,} tokens"

    def memory(self, device_memory: float) -> dict[str, dict[str, int]]:
        """Bytes per device of the training, by part."""
        module, model, machine = self.module, self.model, self.machine
        width, half = DTYPE_BYTES[module.dtype_name], self.kernels.half
        rows, tokens = self.rows.micro_batch(self.data.batch_size, machine.accumulate)
        training = machine.held(model, module.dtype_name, half) | {
            "gradients": width * model.trainable // machine.shards * machine.gradient_copies,
            "activations": activation_bytes(self.config, rows, tokens, self.kernels, module.gradient_checkpointing),
        }
        if not self.is_classifier:  # which reads one hidden state a row
            chunk = min(module.logprob_chunk_tokens, rows * tokens)
            training["output head"] = head_bytes(self.config, chunk, machine.on_gpu, half, module.lora is None)
        if machine.sharded:
            training["gathered units"] = (2 if half else width) * (model.rest + 2 * model.layer)
        return {"train": training}

    def host_memory(self) -> dict[str, tuple[int, int]]:
        """Bytes in host memory on rank 0 and on each other rank, by what holds them."""
        whole = self.model.weight_bytes(DTYPE_BYTES[self.module.dtype_name])
        all_read = self.machine.all_ranks_read or self.model.quantized > 0
        return {f"{self.module.source.path} while loading": (whole, whole if all_read else 0)}

    def checkpoint(self) -> int:
        """Bytes of a checkpoint."""
        return self.model.checkpoint_bytes(DTYPE_BYTES[self.module.dtype_name])

    def updates(self) -> int:
        """Updates of an epoch."""
        if (fixed := getattr(self.data, "updates_per_round", None)) is not None:
            return int(fixed)
        return max(1, -(-self.rows.count // self._per_update))

    @property
    def _per_update(self) -> int:
        return self.data.batch_size * self.machine.accumulate * self.machine.devices

    def seconds(self, tflops: float) -> dict[str, float]:
        """Seconds of an epoch by phase, of those that it has; the log-probs of offline pairs are computed once.

        Args:
            tflops: Throughput of a device in training, TFLOP/s.
        """
        rows, total = self.rows, self.model.total
        speed = tflops * 1e12 * self.machine.devices
        used = rows.count * rows.typical
        fixed = getattr(self.data, "updates_per_round", None)
        passes = 1.0 if fixed is None else fixed * min(self._per_update, rows.count) / rows.count
        needs = getattr(self.module, "needs", ())
        has_mismatched = Z_REF in needs
        is_split = rows.max_tokens is not None and rows.typical > rows.max_tokens
        per_token = (6 if self.trains_all else 4) + 2 * self.module.gradient_checkpointing
        ahead = 2 * (has_mismatched + (is_split and not self.is_classifier))
        seconds = {}
        if isinstance(self.data, OfflineDataModule):
            models = ("old_logps" in needs) + ("reference_logps" in needs) + has_mismatched
            seconds["log-probs"] = 2 * models * total * (used + rows.held_out_tokens) / speed
        seconds |= {
            "train": (per_token + ahead) * total * used * passes / speed,
            "held-out": 2 * total * rows.held_out_tokens / speed,
        }
        return {phase: value for phase, value in seconds.items() if value}
