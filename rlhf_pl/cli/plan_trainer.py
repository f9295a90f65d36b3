"""What a plan reads of the Trainer's options: devices, precision, and how the weights are spread."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_pl.cli.plan_machine import count_devices, plans_gpus
from rlhf_pl.models.footprint import DTYPE_BYTES, Kernels, ModelSize
from rlhf_pl.utils.devices import fast_precision


@dataclass(frozen=True)
class PlannedTrainer:
    """The Trainer of a plan.

    Args:
        on_gpu: Whether the devices are GPUs.
        processes: Devices of a node.
        devices: Devices of all nodes.
        accumulate: Micro-batches of an update.
        sharded: Whether the weights are spread over the devices.
        all_ranks_read: Whether every rank reads the weights.
        bf16: Whether matrix products are in half precision by the Trainer's options.
        max_epochs: Rounds or epochs; None or -1 for no limit.
        run_dir: The run directory.
        is_elsewhere: Whether GPUs are planned because their memory is given, though this machine has none.
        chooses_cpu: Whether `fit` would use several CPU processes here because there is no GPU.
    """

    on_gpu: bool
    processes: int
    devices: int
    accumulate: int
    sharded: bool
    all_ranks_read: bool
    bf16: bool
    max_epochs: int | None
    run_dir: str
    is_elsewhere: bool
    chooses_cpu: bool

    @property
    def shards(self) -> int:
        """Number of devices that the weights are spread over."""
        return self.devices if self.sharded else 1

    @property
    def gradient_copies(self) -> int:
        """Copies of the gradients: DDP's buckets hold them once more."""
        return 1 if self.sharded or self.devices == 1 else 2

    def kernels(self, module: Any) -> Kernels:
        """The kernels of a module's model."""
        half = self.bf16 or module.dtype_name != "float32"
        liger = self.on_gpu and module.use_liger_kernel is not False
        flash = self.on_gpu and half and module.attn_implementation == "sdpa"
        return Kernels(half, module.attn_implementation, flash, liger)

    def held(self, size: ModelSize, dtype: str, half: bool) -> dict[str, int]:
        """Bytes per device of what a model holds in all phases, by part.

        Args:
            size: The model's parameters.
            dtype: Dtype of the trained weights.
            half: Whether matrix products are in half precision.
        """
        width = DTYPE_BYTES[dtype]
        held = {
            "parameters": size.weight_bytes(width) // self.shards,
            "optimizer": 2 * width * size.trainable // self.shards,
        }
        if self.has_copies(dtype, half):
            held["copies in bf16"] = 2 * (size.total - size.quantized)
        return held

    def has_copies(self, dtype: str, half: bool) -> bool:
        """Whether there is a copy of the weights in half precision."""
        return half and dtype == "float32" and not self.sharded


def plan_trainer(options: Mapping[str, Any], memory_given: bool) -> PlannedTrainer:
    """Read the options of a Trainer.

    Args:
        options: The options.
        memory_given: Whether the user has given the memory of a device, which means GPUs unless the options say `cpu`.
    """
    accelerator = options["accelerator"]
    here = plans_gpus(accelerator)
    on_gpu = here or (memory_given and accelerator == "auto")
    processes = count_devices(options["devices"], on_gpu)
    devices = processes * int(options["num_nodes"])
    strategy = options["strategy"]
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    precision = fast_precision(str(options["precision"] or "32-true"), on_gpu)
    mixed = getattr(strategy, "mixed_precision", None)
    return PlannedTrainer(
        on_gpu=on_gpu,
        processes=processes,
        devices=devices,
        accumulate=options["accumulate_grad_batches"],
        sharded="fsdp" in name.lower() or "ModelParallel" in name,
        all_ranks_read=name in ("fsdp", "fsdp_cpu_offload") or "FSDPStrategy" in name,
        bf16="16" in precision or (mixed is not None and mixed.param_dtype is not None),
        max_epochs=options["max_epochs"],
        run_dir=options["default_root_dir"],
        is_elsewhere=on_gpu and not here,
        chooses_cpu=not on_gpu and accelerator == "auto" and devices > 1,
    )
