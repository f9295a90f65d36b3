"""Supervised fine-tuning as a LightningModule."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlhf_pl.checkpointing.progress import run_seed
from rlhf_pl.data.sft_datamodule import SFTBatch
from rlhf_pl.distributed.gather_weights import Weights, like_of, model_weights
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.distributed.strategies import check_strategy, shard
from rlhf_pl.distributed.weight_placement import checks_weights, reads_weights
from rlhf_pl.models.compute import compute_of
from rlhf_pl.models.lora import LoRA, adapter_targets, add_lora, base_dtype, check_lora
from rlhf_pl.models.policy import DType, PolicyLM, check_lm, empty_lm, load_lm
from rlhf_pl.models.rotary import longest_row
from rlhf_pl.models.source import ModelSource
from rlhf_pl.modules.base import TrainedModule
from rlhf_pl.modules.export import check_weights, export_adapter, export_folder, leave_out_base, try_adapter, try_export
from rlhf_pl.modules.logging import Means, is_update, log_update
from rlhf_pl.modules.optimization import Optimization, check_precision
from rlhf_pl.modules.optimizers import AdamW, WarmupCosine
from rlhf_pl.utils.errors import InputError


class SFTModule(TrainedModule):
    """A policy that learns to give the answers of the data: cross-entropy over the assistant's tokens alone.

    Args:
        policy: The model to tune: a folder in Hugging Face format, or a Hub id.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer; it steps once an update.
        lora: Train low-rank adapters instead of all weights; they are merged in the export.
        dtype: Dtype of the trained weights. bfloat16 halves their memory, but small updates are lost in it.
        attn_implementation: Attention of transformers: sdpa, eager, flash_attention_2, flex_attention.
        use_liger_kernel: Norms, MLPs and rotary embeddings by liger-kernel: less memory and time on GPUs. null for
            wherever a GPU, the package and kernels for the architecture are there and give what plain layers give,
            true to require it (an error without a GPU).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        logprob_chunk_tokens: Answer tokens whose logits are in memory at a time.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run Python code that comes with the model. Off unless you trust its authors.
    """

    train_metrics = tuple(f"train/{name}" for name in ("lr", "loss"))
    val_metrics = tuple(f"val/{name}" for name in ("loss", "perplexity"))

    def __init__(
        self,
        policy: str,
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1e-5),
        lr_scheduler: LRSchedulerCallable = lambda o: WarmupCosine(o, warmup=0.1),
        lora: LoRA | None = None,
        dtype: DType = "float32",
        attn_implementation: str = "sdpa",
        use_liger_kernel: bool | None = None,
        gradient_checkpointing: bool = False,
        logprob_chunk_tokens: int = 1024,
        chat_template: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if logprob_chunk_tokens < 1:
            raise InputError(f"`model.logprob_chunk_tokens` must be 1 or more, got {logprob_chunk_tokens}.")
        check_lora(lora)
        self.source = ModelSource(policy, revision, chat_template, trust_remote_code)
        self.optimization = Optimization(optimizer, lr_scheduler)
        self.lora = lora
        self.strict_loading = base_dtype(lora) is None  # a 4-bit base is not in checkpoints
        self.dtype_name: DType = dtype
        self.attn_implementation = attn_implementation
        self.use_liger_kernel = use_liger_kernel
        self.gradient_checkpointing = gradient_checkpointing
        self.logprob_chunk_tokens = logprob_chunk_tokens
        self.policy: PolicyLM | None = None
        self.train_means, self.val_means = Means(), Means()
        self._like: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        check_precision(self.trainer)
        check_strategy(self.trainer, self.dtype_name, base_dtype(self.lora))
        if checks_weights(self.trainer, self.source):
            check_lm(self.source)
        if self.lora is not None:
            adapter_targets(empty_lm(self.source), self.lora)

    def configure_model(self) -> None:
        """Load the policy. Lightning calls it after all inputs have been checked."""
        if self.policy is not None:
            return
        compute = compute_of(self._trainer)
        base = base_dtype(self.lora)
        liger, reads = self.use_liger_kernel, reads_weights(self._trainer)
        longest = longest_row(self._trainer, self.source.config)
        lm = load_lm(self.source, self.dtype_name, self.attn_implementation, base, compute, liger, reads, longest)
        if self.lora is not None:
            add_lora(lm, self.lora, run_seed(), train_head=False)
        if self.gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        self._like = like_of(lm)
        self.policy = PolicyLM(lm, self.logprob_chunk_tokens, compute).train()
        shard(self, self.policy, from_first_rank=base is None)

    def forward(self, **inputs: Any) -> Tensor:
        """Log-probs of the learned tokens, shape (M,)."""
        assert self.policy is not None
        return self.policy(**inputs)

    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        loss, tokens = self._loss(batch)
        if batch.weight > 0:
            self.train_means.add(weights=float(tokens), loss=loss.detach())
        if is_update(self.trainer, batch_idx):
            log_update(self, self.train_means.compute_and_reset("train", ranks_of(self.trainer)))
        return loss * batch.weight

    def validation_step(self, batch: SFTBatch, batch_idx: int) -> None:
        loss, tokens = self._loss(batch)
        if batch.weight > 0:
            self.val_means.add(weights=float(tokens), loss=loss)

    def _loss(self, batch: SFTBatch) -> tuple[Tensor, int]:
        """(mean negative log-prob of the learned tokens, nats; their number)."""
        tokens = len(batch.rows.targets)
        return -self(**batch.rows.inputs()).sum() / max(1, tokens), tokens

    def on_validation_epoch_end(self) -> None:
        metrics = self.val_means.compute_and_reset("val", ranks_of(self.trainer))
        metrics["val/perplexity"] = math.exp(min(metrics["val/loss"], 700.0))
        self.log_dict(metrics)

    def describe_epoch(self, metrics: Mapping[str, float], held_out: int) -> str:
        """The held-out metrics of an epoch in a line."""
        return (
            f"held-out perplexity {metrics['val/perplexity']:.3f} (loss {metrics['val/loss']:.3f} nats a token, "
            f"{held_out} conversations)"
        )

    def weights(self) -> Weights:
        """The policy's weights under their Hugging Face names, tied ones included, adapters merged."""
        assert self.policy is not None
        return model_weights(self, self.policy.lm, self._like)

    def try_export(self, dtype: str | None = None) -> None:
        """See whether `export` will be able to write the folder; nothing is loaded and nothing is left behind."""
        model = empty_lm(self.source) if self.policy is None else self.policy.lm
        try_export(model, self.source, self.source.tokenizer, dtype)
        if self.lora is not None and self.policy is None:
            try_adapter(model, self.lora, self.source)

    def export(self, folder: str, dtype: str | None = None) -> None:
        """Write the policy as a Hugging Face folder: safetensors, tokenizer, chat template, generation config.

        Args:
            folder: Where to; made if missing.
            dtype: Dtype of the weights; None for that of the checkpoint that the run started from.
        """
        assert self.policy is not None
        tokenizer, write = self.source.tokenizer, self.global_rank == 0
        export_folder(self.policy.lm, self.source, tokenizer, self.weights(), folder, dtype, write)
        if self.lora is not None:
            export_adapter(self, self.lora, self.policy.lm, self.source, folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        leave_out_base(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.policy is not None:
            check_weights(self, checkpoint, self.source)
        super().on_load_checkpoint(checkpoint)
