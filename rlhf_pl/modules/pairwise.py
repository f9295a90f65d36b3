"""REBEL as a LightningModule."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlhf_pl.algorithms.losses import PairwiseLoss, RebelLoss
from rlhf_pl.checkpointing.progress import run_seed
from rlhf_pl.data.pair_batches import PairBatch
from rlhf_pl.distributed.gather_weights import Weights, like_of, model_weights
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.distributed.strategies import callable_policy, check_strategy, shard, shard_frozen
from rlhf_pl.distributed.weight_placement import checks_weights, reads_weights
from rlhf_pl.models.compute import compute_of
from rlhf_pl.models.lora import LoRA, adapter_targets, add_lora, base_dtype, check_lora, noted, without_adapters
from rlhf_pl.models.policy import DType, PolicyLM, check_lm, empty_lm, load_lm, train_last_layers
from rlhf_pl.models.rotary import longest_row
from rlhf_pl.models.source import ModelSource
from rlhf_pl.modules.base import TrainedModule
from rlhf_pl.modules.export import check_weights, export_adapter, export_folder, leave_out_base, try_adapter, try_export
from rlhf_pl.modules.logging import Means, is_update, log_update, with_variance
from rlhf_pl.modules.optimization import Optimization, check_precision
from rlhf_pl.modules.optimizers import AdamW, WarmupCosine
from rlhf_pl.utils.errors import InputError, at_least
from rlhf_pl.utils.fingerprints import describe

_NO_PAIRS = {"loss": 0.0, "kl": 0.0, "pairs": 0.0}  # of the round in training: sums over its pairs, their number

PARTS = (
    "loss",
    "kl",
    "kl_chosen",
    "kl_rejected",
    "ratio_mean",
    "ratio_var",
    "logratio_margin",
    "reward_margin",
    "sign_align",
)


class RebelModule(TrainedModule):
    """A policy that learns from pairs: REBEL by default, any `PairwiseLoss` by choice.

    Args:
        policy: The model to improve: a folder in Hugging Face format, or a Hub id.
        loss: The loss on pairs.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer; it steps once an update.
        kl_coef: Weight of the KL penalty to the fixed reference, in reward units per nat. At 0 no reference is loaded.
        reference: The fixed reference of the KL penalty; null for the policy as it was before training.
        trainable_layers: Train only so many of the last layers, the final norm and an output head that is not tied
            to the embeddings; null for all weights.
        lora: Train low-rank adapters instead of all weights. The model without them is the reference of `kl_coef`; the
            sampler gets them merged in, and the export holds both the merged model and the adapters alone.
        dtype: Dtype of the trained weights. bfloat16 halves their memory, but small updates are lost in it.
        attn_implementation: Attention of transformers: sdpa, eager, flash_attention_2, flex_attention.
        use_liger_kernel: Norms, MLPs and rotary embeddings by liger-kernel: less memory and time on GPUs. null for
            wherever a GPU, the package and kernels for the architecture are there and give what plain layers give,
            true to require it (an error without a GPU).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        logprob_chunk_tokens: Response tokens whose logits are in memory at a time.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run Python code that comes with the model. Off unless you trust its authors.
    """

    train_metrics = tuple(f"train/{name}" for name in ("lr", *PARTS))
    val_metrics = tuple(f"val/{name}" for name in PARTS)

    def __init__(
        self,
        policy: str,
        loss: PairwiseLoss = RebelLoss(),  # noqa: B008 - stateless; the command line shows it as the default
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=3e-7),
        lr_scheduler: LRSchedulerCallable = lambda o: WarmupCosine(o, warmup=0.1),
        kl_coef: float = 0.0,
        reference: str | None = None,
        trainable_layers: int | None = None,
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
        at_least("model", kl_coef=(kl_coef, 0))
        if reference is not None and kl_coef == 0:
            raise InputError(
                f"`model.reference` is {reference!r} but `model.kl_coef` is 0, so it would have no effect."
            )
        if logprob_chunk_tokens < 1:
            raise InputError(f"`model.logprob_chunk_tokens` must be 1 or more, got {logprob_chunk_tokens}.")
        if trainable_layers is not None and trainable_layers < 1:
            raise InputError(f"`model.trainable_layers` must be 1 or more, or null for all, got {trainable_layers}.")
        if lora is not None and trainable_layers is not None:
            raise InputError("`model.lora` and `model.trainable_layers` exclude each other: give one of them.")
        if lora is not None and lora.dropout > 0:
            raise InputError(
                f"`model.lora.dropout` is {lora.dropout}: the policy must give the log-probs that its answers were "
                "drawn with. Set it to 0."
            )
        check_lora(lora)
        self.trainable_layers = trainable_layers
        self.lora = lora
        self.strict_loading = base_dtype(lora) is None  # a 4-bit base is not in checkpoints
        self.source = ModelSource(policy, revision, chat_template, trust_remote_code)
        self.reference_source = (
            self.source
            if reference is None
            else ModelSource(reference, None, None, trust_remote_code, "model.reference")
        )
        self.loss = loss
        self.optimization = Optimization(optimizer, lr_scheduler)
        self.kl_coef = kl_coef
        self.dtype_name: DType = dtype
        self.attn_implementation = attn_implementation
        self.use_liger_kernel = use_liger_kernel
        self.gradient_checkpointing = gradient_checkpointing
        self.logprob_chunk_tokens = logprob_chunk_tokens
        self.policy: PolicyLM | None = None
        self.train_means = Means()
        self.val_means = Means()
        self._round = dict(_NO_PAIRS)
        # mean absolute log-ratio a token in a round's first update, right after it; None after the others
        self.first_logratio: float | None = None
        self._like: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        check_precision(self.trainer)
        check_strategy(self.trainer, self.dtype_name, base_dtype(self.lora))
        if checks_weights(self.trainer, self.source):
            check_lm(self.source)
        if self.lora is not None:
            adapter_targets(empty_lm(self.source), self.lora)
        if self.reference_source is not self.source:
            self._check_reference()
        check_ready = getattr(getattr(self.trainer, "datamodule", None), "check_ready", None)
        if check_ready is not None:
            check_ready()

    def _check_reference(self) -> None:
        """Refuse a reference that is not there, or that lacks tokens of the policy, before anything loads."""
        reference, tokens = self.reference_source, len(self.source.tokenizer)
        if checks_weights(self.trainer, reference):
            check_lm(reference)
        size = reference.config.get_text_config().vocab_size
        if size < min(tokens, self.source.config.get_text_config().vocab_size):
            raise InputError(
                f"`model.reference`: {reference.path!r} has {size} embeddings, but the tokenizer of the policy "
                f"{self.source.path!r} has {tokens} tokens. A reference needs the policy's tokenizer."
            )

    def configure_model(self) -> None:
        """Load the policy. Lightning calls it after all inputs have been checked."""
        if self.policy is not None:
            return
        lm = self.build_lm(reads_weights(self._trainer))
        if self.trainable_layers is not None:
            train_last_layers(lm, self.trainable_layers, self.source)
        if self.gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        self._like = like_of(lm)
        self.policy = self.unit(lm).train()
        shard(self, self.policy, from_first_rank=base_dtype(self.lora) is None)

    def build_lm(self, read_weights: bool = True) -> Any:
        """The policy as the run starts from it, adapters included; on the meta device if its weights are not read."""
        lm = self.load(self.source, base_dtype(self.lora), read_weights)
        if self.lora is not None:
            add_lora(lm, self.lora, run_seed(), train_head=False)
        return lm

    def load(self, source: ModelSource, base_dtype: str | None = None, read_weights: bool = True) -> Any:
        """A causal LM with this run's dtype and kernels."""
        compute, liger = compute_of(self._trainer), self.use_liger_kernel
        longest = longest_row(self._trainer, source.config)
        attention = self.attn_implementation
        return load_lm(source, self.dtype_name, attention, base_dtype, compute, liger, read_weights, longest)

    def unit(self, lm: Any) -> PolicyLM:
        """A causal LM as what gives log-probs in this run's precision."""
        return PolicyLM(lm, self.logprob_chunk_tokens, compute_of(self._trainer))

    def load_reference(self) -> Callable[..., Tensor]:
        """The fixed reference of the KL penalty, to be called as the policy is. The caller drops it after use.

        With adapters that start from it, it is the policy without them; otherwise a second model, sharded as the first.
        """
        if self.lora is None or self.reference_source is not self.source:
            lm = self.load(self.reference_source)
            return shard_frozen(self.trainer, self.unit(lm))

        def base(**inputs: Any) -> Tensor:
            assert self.policy is not None
            with without_adapters(self.policy.lm):
                return callable_policy(self.trainer)(**inputs)

        return base

    def weights(self) -> Weights:
        """The policy's weights under their Hugging Face names, tied ones included, adapters merged."""
        assert self.policy is not None
        return model_weights(self, self.policy.lm, self._like)

    def forward(self, **inputs: Any) -> Tensor:
        """`PolicyLM.forward` through whatever the strategy wrapped around this module."""
        assert self.policy is not None
        return self.policy(**inputs)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        losses, parts, logratios = self._losses(batch)
        accumulate = self.trainer.accumulate_grad_batches
        if batch.weight > 0:
            self.train_means.add(loss=losses.detach(), **parts)
            if batch_idx < accumulate:  # the policy is still the one that made the round
                tokens = batch.rows.counts.view(-1, 2).T
                self.train_means.add(tokens, first_logratio=logratios.abs() / tokens)
        if is_update(self.trainer, batch_idx):  # log over all its pairs
            metrics = with_variance(self.train_means.compute_and_reset("train", ranks_of(self.trainer)), "train/ratio")
            pairs = self.train_means.last_weights["loss"]
            self._round = {
                "loss": self._round["loss"] + pairs * metrics["train/loss"],
                "kl": self._round["kl"] + pairs * metrics["train/kl"],
                "pairs": self._round["pairs"] + pairs,
            }
            if batch_idx < accumulate:
                self.first_logratio = metrics["train/first_logratio"]
            else:
                metrics.pop("train/first_logratio", None)
            log_update(self, metrics)
        return losses.mean() * batch.weight

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        losses, parts, _ = self._losses(batch)
        if batch.weight > 0:
            self.val_means.add(loss=losses, **parts)

    def _losses(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss per pair, what is logged about it, each of shape (B,), and log-ratios, shape (2, B)."""
        rows = batch.rows
        logps = rows.sum_per_response(self(**rows.inputs(), temperature=batch.temperature)).view(-1, 2).T
        logratios = logps - batch.old_logps
        margins = self.margins(batch.rewards, batch.old_logps, batch.reference_logps)
        losses = self.loss(logratios[0], logratios[1], margins)
        detached = logratios.detach()
        ratios = detached.expm1()  # about 1, so that variances as small as rounding's are not lost in it
        parts = {
            "kl": -detached.mean(0),
            "kl_chosen": -detached[0],
            "kl_rejected": -detached[1],
            "ratio": ratios.mean(0),
            "ratio_square": ratios.square().mean(0),
            "logratio_margin": detached[0] - detached[1],
            "reward_margin": margins,
            "sign_align": ((detached[0] - detached[1]).sign() == margins.sign()).float(),
        }
        return losses, parts, detached

    def margins(self, rewards: Tensor, old_logps: Tensor, reference_logps: Tensor | None) -> Tensor:
        """Of each pair the reward margin that the loss gets, KL penalty included, shape (B,); the others are (2, B)."""
        if self.kl_coef > 0:
            if reference_logps is None:
                raise InputError(
                    f"`model.kl_coef` is {self.kl_coef}, but this round was prepared without reference log-probs."
                )
            rewards = rewards - self.kl_coef * (old_logps - reference_logps)
        return rewards[0] - rewards[1]

    def on_validation_epoch_end(self) -> None:
        self.log_dict(with_variance(self.val_means.compute_and_reset("val", ranks_of(self.trainer)), "val/ratio"))

    def describe_epoch(self, metrics: Mapping[str, float], held_out: int) -> str:
        """The held-out metrics of an epoch over offline pairs in a line."""
        return (
            f"held-out loss {metrics['val/loss']:.3f}, sign agreement {metrics['val/sign_align']:.3f}, "
            f"KL(old||new) {metrics['val/kl']:.3f} nats (k1, {held_out} pairs)"
        )

    def round_summary(self) -> dict[str, float | None]:
        """Mean loss and KL over all pairs that the round has trained on; None for a round without updates."""
        pairs = self._round["pairs"]
        return {name: self._round[name] / pairs if pairs else None for name in ("loss", "kl")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rlhf_pl"] = {"round": dict(self._round)}
        super().on_save_checkpoint(checkpoint)
        leave_out_base(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.policy is not None:
            check_weights(self, checkpoint, self.source)
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint.get("rlhf_pl")
        if kept is not None:
            self._round = _NO_PAIRS | kept["round"]
            if "kl" not in kept["round"]:  # of an earlier version, which kept the last update's alone
                self._round["kl"] = self._round["pairs"] * (kept["last_kl"] or 0.0)

    def training_settings(self) -> dict[str, Any]:
        """What the training on a round depends on, without building anything heavy."""
        return {
            "loss": describe(self.loss),
            **self.optimization.settings(),
            "kl_coef": self.kl_coef,
            "dtype": self.dtype_name,
            **({} if self.trainable_layers is None else {"trainable_layers": self.trainable_layers}),
            **({} if self.lora is None else {"lora": noted(self.lora)}),
        }

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._round = dict(_NO_PAIRS)

    def try_export(self, dtype: str | None = None) -> None:
        """See whether `export` will be able to write the folder; nothing is loaded and nothing is left behind."""
        model = empty_lm(self.source) if self.policy is None else self.policy.lm
        try_export(model, self.source, self.source.tokenizer, dtype)
        if self.lora is not None and self.policy is None:
            try_adapter(model, self.lora, self.source)

    def export(self, folder: str, dtype: str | None = None) -> None:
        """Write the policy as a Hugging Face folder: safetensors, tokenizer, chat template, generation config.

        All ranks must call it; rank 0 writes. Adapters are merged in, and are in the subfolder `adapter` as well.

        Args:
            folder: Where to; made if missing.
            dtype: Dtype of the weights; None for that of the checkpoint that the run started from.
        """
        assert self.policy is not None
        tokenizer, write = self.source.tokenizer, self.global_rank == 0
        export_folder(self.policy.lm, self.source, tokenizer, self.weights(), folder, dtype, write)
        if self.lora is not None:
            export_adapter(self, self.lora, self.policy.lm, self.source, folder)
