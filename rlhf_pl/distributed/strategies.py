"""Adapts Lightning's DDP, FSDP and FSDP2 strategies to Hugging Face models and to CPUs."""

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
from rlhf_pl.utils.cpu import is_cpu_fsdp_active
from rlhf_pl.utils.errors import InputError


def _load(strategy: Any, load: Callable[..., Any], path: Any, weights_only: bool | None) -> Any:
    """Load a checkpoint with the strategy's `load_with` if it is set, else with `load`."""
    load_with = strategy.load_with
    return load(path, weights_only) if load_with is None else load_with(load, path)


class CPUFSDPStrategy(FSDPStrategy):
    """FSDPStrategy that also runs on CPUs, for trying a config and for tests; Lightning's needs GPUs.

    The command line uses it for `fsdp` and `FSDPStrategy` if there is no GPU. In Python, pass an instance to the
    Trainer, and call `fit` inside of `rlhf_pl.utils.cpu.cpu_fsdp()`. On GPUs it equals FSDPStrategy. On CPUs its
    checkpoints are sharded: full ones would alias the optimizer's two moments.
    """

    load_with: Callable[[Callable[..., Any], Any], Any] | None = None  # called with Lightning's function and a path

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self.root_device.type != "cpu":
            return super()._setup_model(model)
        from lightning.fabric.strategies.fsdp import _setup_activation_checkpointing
        from torch.distributed.fsdp import FullyShardedDataParallel

        if not is_cpu_fsdp_active():
            raise InputError(
                "CPUFSDPStrategy needs a patch of torch on CPUs. Call `fit` inside of "
                "`with rlhf_pl.utils.cpu.cpu_fsdp():`, which removes the patch at its end."
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
    """ModelParallelStrategy that shards the model over all devices (FSDP2), without tensor parallelism.

    On the command line its name is `fsdp2`. In Python, pass an instance to the Trainer.

    Args:
        data_parallel_size: Number of devices that share the parameters; auto for all.
        tensor_parallel_size: Must be 1.
        cpu_offload: Whether to keep parameters, gradients and the optimizer's state in host memory.
        **kwargs: Options of ModelParallelStrategy: save_distributed_checkpoint, process_group_backend, timeout.
    """

    load_with: Callable[[Callable[..., Any], Any], Any] | None = None  # called with Lightning's function and a path

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
    """Whether each rank holds only a part of the parameters."""
    return isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)


def writes_sharded(trainer: L.Trainer) -> bool:
    """Whether a checkpoint is a folder with a part from each rank."""
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        return strategy._state_dict_type == "sharded"
    return isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint


def check_strategy(trainer: L.Trainer, dtype: str, base_dtype: str | None = None) -> None:
    """Refuse combinations of options with silently wrong results, before the model is loaded.

    Args:
        trainer: Has the strategy and the precision.
        dtype: The policy's dtype.
        base_dtype: The dtype of quantized base weights under LoRA, or None.

    Raises:
        InputError: The options do not fit together. The message says what to set instead.
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
            "to null, or use --trainer.strategy ddp."
        )
    if isinstance(strategy, FSDPStrategy) and dtype != "float32" and str(trainer.precision) == "32-true":
        raise InputError(
            f"`model.dtype` is {dtype}, but under FSDPStrategy Lightning's precision 32-true converts the weights to "
            "float32. Set --trainer.precision bf16-mixed for weights and compute in bfloat16, or use "
            "--trainer.strategy fsdp2."
        )
    if isinstance(strategy, ModelParallelStrategy) and strategy._tensor_parallel_size not in ("auto", 1):
        raise InputError(
            f"`trainer.strategy`: tensor_parallel_size is {strategy._tensor_parallel_size}. Policies are sharded over "
            "all devices; set data_parallel_size to their number and tensor_parallel_size to 1, or use fsdp2."
        )


def shard(module: L.LightningModule, unit: nn.Module, from_first_rank: bool = False) -> None:
    """Shard a unit with the module's strategy, with suitable defaults for any decoder. Call it in `configure_model`.

    The sharded units are the decoder's layers and `unit`, which holds backbone and head: a call to a part of a wrapped
    unit would see flattened weights.

    Args:
        module: Its Trainer has the strategy.
        unit: Holds a Hugging Face model; maps rows to numbers.
        from_first_rank: Whether only the ranks for which `reads_weights` is true hold weights, which this function
            sends to the others.
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
    """Set the wrapping policy and mixed precision, unless the config does."""
    from torch.distributed.fsdp import MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    options, earlier = strategy.kwargs, getattr(strategy, "wrapped_kinds", None)  # of another unit of the module
    if options.get("auto_wrap_policy") is None or earlier is not None:
        kinds = {type(layer) for layer in decoder_layers(unit)} | {type(unit)} | (earlier or set())
        options["auto_wrap_policy"] = ModuleWrapPolicy(kinds)
        strategy.wrapped_kinds = kinds  # type: ignore[attr-defined]
    if strategy.mixed_precision is None and precision in HALF:
        # Lightning's default reduces gradients in bf16, and also casts positions, rewards and log-probs
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
    """Shard a model that does not train, in the same way as the strategy shards the trained one."""
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


def get_callable_policy(trainer: L.Trainer) -> Any:
    """The callable for forward passes of the policy outside of training steps.

    Under FSDP it is the wrapped model, which all ranks must call equally often. Otherwise it is the module itself:
    DDP's wrapper would synchronize buffers at every call, and hang if ranks call it unequally often.
    """
    return trainer.model if is_sharded(trainer) else trainer.lightning_module


def compute_dtype(trainer: L.Trainer, dtype: str) -> str:
    """Name of the dtype that the policy computes in."""
    compute = get_compute(trainer)
    half = compute.dtype or compute.autocast
    return dtype if half is None else str(half).removeprefix("torch.")


def clip_gradients(
    module: L.LightningModule, optimizer: Any, clip_val: int | float | None, algorithm: str | None
) -> torch.Tensor | None:
    """Clip gradients in `configure_gradient_clipping`. Under FSDP only the root module can compute the total norm.

    Returns:
        The norm of the gradients before clipping, shape (); None if it is not computed, or if a gradient scaler skips
        updates with an infinite norm.
    """
    if isinstance(module.trainer.strategy, FSDPStrategy) and clip_val and clip_val > 0:
        if algorithm not in (None, "norm"):
            raise InputError("`trainer.gradient_clip_algorithm`: FSDPStrategy supports only `norm`.")
        norm: torch.Tensor = module.trainer.model.clip_grad_norm_(clip_val)  # type: ignore[union-attr,operator]
        return norm if getattr(module.trainer.precision_plugin, "scaler", None) is None else None
    precision: Any = module.trainer.precision_plugin
    if clip_val and clip_val > 0 and getattr(precision, "scaler", None) is None:
        # Lightning refuses fused optimizers under any mixed precision, but only a scaler needs that
        if algorithm in (None, GradClipAlgorithmType.NORM):
            return nn.utils.clip_grad_norm_(precision.main_params(optimizer), clip_val)
        Precision.clip_gradients(precision, optimizer, clip_val, GradClipAlgorithmType(algorithm))
        return None
    try:
        module.clip_gradients(optimizer, gradient_clip_val=clip_val, gradient_clip_algorithm=algorithm)
    except RuntimeError as error:
        raise InputError(
            f"`trainer.gradient_clip_val` is {clip_val}, but {type(optimizer).__name__} unscales gradients by itself "
            "under 16-mixed. Set --model.optimizer.fused false, or use --trainer.precision bf16-mixed."
        ) from error
    return None
