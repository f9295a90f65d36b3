"""Base of the LightningModules: checks, loading, optimizer, checkpoints and export of one model."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, ClassVar, get_args

import lightning as L
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from rlhf_pl.checkpointing.progress import has_stopped_inside
from rlhf_pl.checkpointing.safe_loading import guard_loads, unguard_loads
from rlhf_pl.data.resumed_counts import convert_batch_counts, record_update_size
from rlhf_pl.distributed.gather_weights import Weights, like_of, model_weights
from rlhf_pl.distributed.strategies import check_strategy, clip_gradients, shard
from rlhf_pl.distributed.weight_placement import checks_weights
from rlhf_pl.models.lora import LoRA, adapter_targets, base_dtype, check_lora
from rlhf_pl.models.policy import DType
from rlhf_pl.models.source import ModelSource
from rlhf_pl.modules.divergence_check import DivergenceCheck
from rlhf_pl.modules.export import check_weights, export_adapter, export_folder, leave_out_base, try_adapter, try_export
from rlhf_pl.modules.learning_rates import Stage, suitable_rate
from rlhf_pl.modules.logging import Means
from rlhf_pl.modules.optimizer_hooks import Optimization
from rlhf_pl.modules.trainer_options import check_precision
from rlhf_pl.utils.errors import InputError


class TrainedModule(L.LightningModule, ABC):
    """A module that trains one Hugging Face model. A subclass makes the model and defines the loss.

    Args:
        source: Where the model comes from.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer; it steps once an update.
        lora: Low-rank adapters to train instead of the weights; None to train all weights.
        dtype: Dtype of the trained weights.
        attn_implementation: Attention of transformers.
        use_liger_kernel: Whether liger-kernel computes norms, MLPs and rotary embeddings; None to use it where it can.
        gradient_checkpointing: Whether activations are recomputed in the backward pass.
        reset_optimizer: Whether every epoch starts with a new optimizer state.
    """

    batch_type: ClassVar[type]  # of the batches that it takes
    stage: ClassVar[Stage] = "policy"  # what its learning rate is chosen for
    train_metrics: tuple[str, ...] = ()  # logged with every update
    val_metrics: tuple[str, ...] = ()  # logged with every validation on held-out rows
    exports_adapter: ClassVar[bool] = True  # in addition to the merged model

    gradient_norm: Tensor | None = None  # of the last update, before clipping; None where it is not computed

    def __init__(
        self,
        source: ModelSource,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
        lora: LoRA | None,
        dtype: DType,
        attn_implementation: str,
        use_liger_kernel: bool | None,
        gradient_checkpointing: bool,
        reset_optimizer: bool = False,
    ) -> None:
        super().__init__()
        if dtype not in get_args(DType):
            raise InputError(f"`model.dtype` must be one of {', '.join(get_args(DType))}, got {dtype!r}.")
        if not isinstance(attn_implementation, str):
            raise InputError(f"`model.attn_implementation` must be a name, got {attn_implementation!r}.")
        check_lora(lora)
        self.source, self.lora = source, lora
        self.optimization = Optimization(optimizer, lr_scheduler, lambda: self.suitable_rate, reset_optimizer)
        self.dtype_name: DType = dtype
        self.attn_implementation = attn_implementation
        self.use_liger_kernel = use_liger_kernel
        self.gradient_checkpointing = gradient_checkpointing
        self.train_means, self.val_means = Means(), Means()
        self._like: dict[str, Tensor] = {}

    @property
    @abstractmethod
    def hf_model(self) -> Any:
        """The Hugging Face model that trains; None until it is loaded."""

    @abstractmethod
    def check_source(self) -> None:
        """Refuse weight files that the model can't be loaded from, before any weights load."""

    @abstractmethod
    def empty_model(self) -> Any:
        """Make the Hugging Face model on the meta device, without adapters."""

    @abstractmethod
    def load_model(self) -> Any:
        """Load the Hugging Face model that training starts from, adapters included."""

    @abstractmethod
    def unit(self, model: Any) -> nn.Module:
        """Wrap a Hugging Face model into a module that takes a batch's rows, in this run's precision."""

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a micro-batch, weighted so that an update's gradient is that of its mean."""

    @cached_property
    def suitable_rate(self) -> float:
        """The learning rate that `lr: auto` of the optimizer stands for."""
        parameters = sum(parameter.numel() for parameter in self.empty_model().parameters())
        return suitable_rate(parameters, self.stage, self.lora is not None)

    @property
    def export_tokenizer(self) -> Any:
        """The tokenizer that the model is exported with."""
        return self.source.tokenizer

    def setup(self, stage: str) -> None:
        guard_loads(self.trainer)
        check_precision(self.trainer)
        check_strategy(self.trainer, self.dtype_name, base_dtype(self.lora))
        if checks_weights(self.trainer, self.source):
            self.check_source()
        if self.lora is not None:
            adapter_targets(self.empty_model(), self.lora)

    def load_unit(self, from_first_rank: bool = False) -> Any:
        """Load, wrap and shard the model that trains; for `configure_model`.

        Args:
            from_first_rank: Whether only rank 0 reads the weights, and sends them to the others.
        """
        model = self.load_model()
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._like = like_of(model)
        unit = self.unit(model)
        self.add_parts(unit)
        unit.train()
        shard(self, unit, from_first_rank)
        return unit

    def add_parts(self, unit: Any) -> None:
        """Add what trains beside the Hugging Face model to its unit, before that is sharded."""

    def parameters_to_train(self) -> list[Any]:
        """What the optimizer gets: parameters, or torch's parameter groups."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def weights(self) -> Weights:
        """The model's weights under their Hugging Face names, tied ones included, adapters merged."""
        assert self.hf_model is not None
        return model_weights(self, self.hf_model, self._like)

    def try_export(self, dtype: str | None = None) -> None:
        """Check that `export` will be able to write the folder; loads no weights and leaves no files behind."""
        is_loaded = self.hf_model is not None
        model = self.hf_model if is_loaded else self.empty_model()
        try_export(model, self.source, self.export_tokenizer, dtype)
        if self.lora is not None and self.exports_adapter and not is_loaded:
            try_adapter(model, self.lora, self.source)

    def export(self, folder: str, dtype: str | None = None) -> None:
        """Write the model as a Hugging Face folder: safetensors, tokenizer, chat template, generation config.

        All ranks must call it; rank 0 writes. Adapters are merged in; a policy's adapters are also in the subfolder
        `adapter`.

        Args:
            folder: The target; made if missing.
            dtype: Dtype of the weights; None for that of the checkpoint that the run started from.
        """
        model, write = self.hf_model, self.global_rank == 0
        export_folder(model, self.source, self.export_tokenizer, self.weights(), folder, dtype, write)
        if self.lora is not None and self.exports_adapter:
            export_adapter(self, self.lora, model, self.source, folder)

    def teardown(self, stage: str) -> None:
        unguard_loads(self.trainer)

    def configure_callbacks(self) -> list[L.Callback]:
        """Add the DivergenceCheck, also to a run in Python."""
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if any(isinstance(callback, DivergenceCheck) for callback in callbacks) else [DivergenceCheck()]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return self.optimization.configure(self, self.parameters_to_train())

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: int | float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        self.gradient_norm = clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_fit_start(self) -> None:
        self.optimization.on_fit_start(self.trainer)

    def on_train_start(self) -> None:
        self.optimization.on_train_start(self.trainer)

    def on_train_epoch_start(self) -> None:
        self.optimization.on_train_epoch_start(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.optimization.on_train_batch_start(self.trainer, batch_idx)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        step = partial(super().optimizer_step, epoch, batch_idx, optimizer, optimizer_closure)
        self.optimization.step(self.trainer, step)

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        self.optimization.step_schedule(scheduler)

    def on_validation_end(self) -> None:
        self.optimization.validated = not self.trainer.sanity_checking

    def on_train_epoch_end(self) -> None:
        """Step the schedules that follow a metric: after the epoch's metrics are logged, before its checkpoint."""
        if not has_stopped_inside(self.trainer):
            self.optimization.step_by_metric(self.trainer, self.val_metrics)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        record_update_size(self.trainer, checkpoint)
        self.optimization.on_save_checkpoint(checkpoint)
        leave_out_base(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.hf_model is not None:
            check_weights(self, checkpoint, self.source)
        convert_batch_counts(self.trainer, checkpoint)
        self.optimization.on_load_checkpoint(checkpoint)
