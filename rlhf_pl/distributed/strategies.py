"""What Lightning's DDP, FSDP and FSDP2 strategies need to train a Hugging Face model, and to run on a CPU."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import nn

from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.distributed.weight_placement import Placement
from rlhf_pl.models.compute import HALF, get_compute
from rlhf_pl.models.policy import PolicyLM, decoder_layers
from rlhf_pl.utils.cpu import runs_fsdp
from rlhf_pl.utils.errors import InputError


def _load(strategy: Any, load: Callable[..., Any], path: Any, weights_only: bool | None) -> Any:
    """Load a checkpoint by what a run has set as the strategy's `load_by`, if it has; by `load` otherwise."""
    through = strategy.load_by
    return load(path, weights_only) if through is None else through(load, path)


class CPUFSDPStrategy(FSDPStrategy):
    """Lightning's FSDPStrategy on CPUs, where Lightning refuses it: for trying a config and for tests.

    The command line takes it by itself where `fsdp` or `FSDPStrategy` is asked for and there is no GPU. In Python, give
    the Trainer an instance, and fit inside of `rlhf_pl.utils.cpu.cpu_fsdp()`. On GPUs it is FSDPStrategy. Checkpoints
    are sharded on CPUs: full ones alias the optimizer's two moments there.
    """

    load_by: Callable[[Callable[..., Any], Any], Any] | None = None  # loads a path by Lightning's function

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self.root_device.type != "cpu":
            return super()._setup_model(model)
        from lightning.fabric.strategies.fsdp import _setup_activation_checkpointing
        from torch.distributed.fsdp import FullyShardedDataParallel

        if not runs_fsdp():
            raise InputError(
                "CPUFSDPStrategy needs a change in torch on CPUs. Fit inside of `with rlhf_pl.utils.cpu.cpu_fsdp():`, "
                "which undoes it at its end."
            )
        self._state_dict_type = "sharded"
        wrapped = FullyShardedDataParallel(
            module=model,
            cpu_offload=None,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )
        _setup_activation_checkpointing(wrapped, self._activation_checkpointing_kwargs)
        return wrapped

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return _load(self, super().load_checkpoint, checkpoint_path, weights_only)


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy whose devices all shard the model (FSDP2), instead of tensor parallelism.

    On the command line it is called `fsdp2`; in Python, give the Trainer an instance.

    Args:
        data_parallel_size: Devices that share the parameters; auto for all.
        tensor_parallel_size: Must be 1.
        cpu_offload: Keep parameters, gradients and the optimizer's state in the memory of the CPU.
        **kwargs: Of ModelParallelStrategy: save_distributed_checkpoint, process_group_backend, timeout.
    """

    load_by: Callable[[Callable[..., Any], Any], Any] | None = None  # loads a path by Lightning's function

    def __init__(
        self,
        data_parallel_size: int | str = "auto",
        tensor_parallel_size: int | str = 1,
        cpu_offload: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_parallel_size, tensor_parallel_size, **kwargs)  # type: ignore[arg-type]
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        if self._data_parallel_size == "auto" and self._tensor_parallel_size in ("auto", 1):
            self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def model_to_device(self) -> None:
        assert self.model is not None
        if getattr(self, "cpu_offload", False):
            for buffer in self.model.buffers():
                buffer.data = buffer.data.to(self.root_device)
        else:
            self.model.to(self.root_device)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return _load(self, super().load_checkpoint, checkpoint_path, weights_only)


def is_sharded(trainer: L.Trainer) -> bool:
    """Whether each rank holds a part of the parameters only."""
    return isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)


def writes_sharded(trainer: L.Trainer) -> bool:
    """Whether a checkpoint is a folder with a part from each rank."""
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        return strategy._state_dict_type == "sharded"
    return isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint


def check_strategy(trainer: L.Trainer, dtype: str, base_dtype: str | None = None) -> None:
    """Refuse what would go wrong in silence, before the model loads.

    Raises:
        InputError: Says what to set instead.
    """
    strategy = trainer.strategy
    if dtype == "float16" and str(trainer.precision) == "bf16-mixed":
        raise InputError(
            "`model.dtype` is float16, but `trainer.precision` is bf16-mixed, which computes with bfloat16 copies of "
            "float32 weights. Set model.dtype to float32, or trainer.precision to 32-true for float16 weights."
        )
    if base_dtype is not None and is_sharded(trainer):
        raise InputError(
            f"`model.lora.base_dtype` is {base_dtype}, but {type(strategy).__name__} can't shard 4-bit weights. Set it "
            "to null, or take --trainer.strategy ddp."
        )
    if isinstance(strategy, FSDPStrategy) and dtype != "float32" and str(trainer.precision) == "32-true":
        raise InputError(
            f"`model.dtype` is {dtype}, but under FSDPStrategy Lightning's precision 32-true makes the weights float32 "
            "again. Set --trainer.precision bf16-mixed for weights and compute in bfloat16, or take --trainer.strategy "
            "fsdp2."
        )
    if isinstance(strategy, ModelParallelStrategy) and strategy._tensor_parallel_size not in ("auto", 1):
        raise InputError(
            f"`trainer.strategy`: tensor_parallel_size is {strategy._tensor_parallel_size}. Policies are sharded over "
            "all devices; set data_parallel_size to their number and tensor_parallel_size to 1, or take fsdp2."
        )


def shard(module: L.LightningModule, unit: nn.Module, from_first_rank: bool = False) -> None:
    """Let the module's strategy shard a unit, with right defaults for any decoder. Call it in `configure_model`.

    The units are the decoder's layers and `unit`, which holds backbone and head: a call to a part of a wrapped unit
    would see flattened weights.

    Args:
        module: Its Trainer has the strategy.
        unit: Holds a Hugging Face model; rows in, numbers out.
        from_first_rank: Whether only those ranks hold weights that `reads_weights`; the others get them here.
    """
    if module._trainer is None:
        return
    trainer = module.trainer
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        _default_wrapping(strategy, unit, str(trainer.precision))
        return
    placement = None
    if from_first_rank and trainer.world_size > 1:
        placement = Placement(unit, strategy.root_device, ranks_of(trainer))
    if isinstance(strategy, ModelParallelStrategy):
        _fully_shard(strategy, unit, str(trainer.precision), placement)
    elif placement is not None:
        placement.move(unit)


def _default_wrapping(strategy: FSDPStrategy, unit: nn.Module, precision: str) -> None:
    """Fill in what the config leaves open."""
    from torch.distributed.fsdp import MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    if strategy.kwargs.get("auto_wrap_policy") is None:
        units = {type(layer) for layer in decoder_layers(unit)} | {type(unit)}
        strategy.kwargs["auto_wrap_policy"] = ModuleWrapPolicy(units)
    if strategy.mixed_precision is None and precision in HALF:
        # Lightning's own would reduce gradients in bf16, and cast positions, rewards and log-probs too.
        strategy.mixed_precision = MixedPrecision(
            param_dtype=HALF[precision],
            reduce_dtype=torch.float32,
            buffer_dtype=torch.float32,
            cast_root_forward_inputs=False,
        )


def _fully_shard(
    strategy: ModelParallelStrategy, unit: nn.Module, precision: str, placement: Placement | None = None
) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {"mesh": strategy.device_mesh["data_parallel"]}
    if precision in HALF:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=HALF[precision], reduce_dtype=torch.float32)
    if getattr(strategy, "cpu_offload", False):
        options["offload_policy"] = CPUOffloadPolicy()
    for part in (*decoder_layers(unit), unit):
        if placement is not None:
            placement.move(part)
        fully_shard(part, **options)


def shard_frozen(trainer: L.Trainer, unit: nn.Module) -> nn.Module:
    """A second model that does not train, spread over the devices as the strategy does with the first."""
    strategy = trainer.strategy
    unit.requires_grad_(False)
    if isinstance(strategy, FSDPStrategy):
        from torch.distributed.fsdp import FullyShardedDataParallel

        on_cpu = strategy.root_device.type == "cpu"
        return FullyShardedDataParallel(
            module=unit,
            mixed_precision=strategy.mixed_precision_config,
            sharding_strategy=strategy.sharding_strategy,
            device_id=strategy.root_device if on_cpu else strategy.root_device.index,
            **strategy.kwargs,
        ).eval()
    if isinstance(strategy, ModelParallelStrategy):
        _fully_shard(strategy, unit, str(trainer.precision))
        return unit.to(strategy.root_device).eval() if not getattr(strategy, "cpu_offload", False) else unit.eval()
    if isinstance(unit, PolicyLM):
        unit.drop_float32_weights()
    return unit.to(strategy.root_device).eval()


def callable_policy(trainer: L.Trainer) -> Any:
    """What takes the policy's rows outside of training steps.

    Under FSDP that is the wrapped model, which all ranks must call equally often. Elsewhere it is the module itself:
    DDP's wrapper would synchronise buffers at every call, and hang where ranks call it unequally often.
    """
    return trainer.model if is_sharded(trainer) else trainer.lightning_module


def compute_dtype(trainer: L.Trainer, dtype: str) -> str:
    """The dtype that the policy computes in, by name."""
    compute = get_compute(trainer)
    half = compute.dtype or compute.autocast
    return dtype if half is None else str(half).removeprefix("torch.")


def clip_gradients(
    module: L.LightningModule, optimizer: Any, clip_val: int | float | None, algorithm: str | None
) -> torch.Tensor | None:
    """For `configure_gradient_clipping`: FSDP's norm is that over all shards, which only its root knows.

    Returns:
        The norm of the gradients before they were clipped, shape (); None where none is computed, or where a gradient
        scaler leaves out updates whose norm is infinite.
    """
    if isinstance(module.trainer.strategy, FSDPStrategy) and clip_val and clip_val > 0:
        if algorithm not in (None, "norm"):
            raise InputError("`trainer.gradient_clip_algorithm`: under FSDPStrategy only `norm` is there.")
        norm: torch.Tensor = module.trainer.model.clip_grad_norm_(clip_val)  # type: ignore[union-attr,operator]
        return norm if getattr(module.trainer.precision_plugin, "scaler", None) is None else None
    precision: Any = module.trainer.precision_plugin
    if clip_val and clip_val > 0 and getattr(precision, "scaler", None) is None:
        # Lightning refuses it for fused optimizers under any mixed precision; without a scaler there is no reason to
        if algorithm in (None, GradClipAlgorithmType.NORM):
            return nn.utils.clip_grad_norm_(precision.main_params(optimizer), clip_val)
        Precision.clip_gradients(precision, optimizer, clip_val, GradClipAlgorithmType(algorithm))
        return None
    try:
        module.clip_gradients(optimizer, gradient_clip_val=clip_val, gradient_clip_algorithm=algorithm)
    except RuntimeError as error:
        raise InputError(
            f"`trainer.gradient_clip_val` is {clip_val}, but {type(optimizer).__name__} unscales gradients by itself "
            "under 16-mixed. Set --model.optimizer.fused false, or take --trainer.precision bf16-mixed."
        ) from error
    return None
