"""Training of a policy on prompt groups, by REBEL or another loss, as a LightningModule."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rlhf_pl.algorithms.group_subsets import select_groups
from rlhf_pl.algorithms.loss_choices import chosen_names, chosen_numbers
from rlhf_pl.algorithms.loss_terms import loss_names, sum_of_means, summarised, term_losses, with_total_loss
from rlhf_pl.algorithms.losses import RebelLoss
from rlhf_pl.algorithms.margin_metrics import has_margins, margin_metric_names, pair_columns
from rlhf_pl.algorithms.policy_loss import PolicyLoss, check_needs, logged, logged_names
from rlhf_pl.algorithms.prompt_groups import Z_REF, PromptGroups
from rlhf_pl.checkpointing.progress import has_stopped_inside
from rlhf_pl.data.ahead import Ahead
from rlhf_pl.data.group_batches import GroupBatch
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.distributed.strategies import get_callable_policy, shard_frozen
from rlhf_pl.distributed.weight_placement import checks_weights
from rlhf_pl.models.lora import LoRA, record_settings, without_adapters
from rlhf_pl.models.packed_batch import PackedBatch
from rlhf_pl.models.policy import DType, check_lm, train_last_layers, weights_unchanged
from rlhf_pl.models.source import ModelSource
from rlhf_pl.modules.ahead_pass import AheadPass
from rlhf_pl.modules.causal_lm import CausalLMModule
from rlhf_pl.modules.logging import Means, is_update, k2_of_ratios, log_histograms, log_update, with_variance
from rlhf_pl.modules.optimizers import AdamW, WarmupCosine
from rlhf_pl.modules.pair_margins import PairMargins
from rlhf_pl.utils.errors import InputError, check_at_least
from rlhf_pl.utils.fingerprints import describe

_DECLARED = ("metric_names", "least_responses", "per")  # by a loss, following from its settings
# sums over the round's elements so far, and their number; updates, and the largest k2 and rate of one of them
_EMPTY_ROUND = {"loss": 0.0, "kl": 0.0, "pairs": 0.0, "updates": 0.0, "k2": 0.0, "lr": 0.0}


class RebelModule(CausalLMModule):
    """A policy that learns from prompt groups: by REBEL on pairs, or by any other `PolicyLoss`.

    Args:
        policy: The model to improve: a folder in Hugging Face format, or a Hub id.
        loss: The loss on pairs, or on whole prompt groups.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer; it steps once an update.
        kl_coef: Weight of the KL penalty to the fixed reference, in reward units per nat. At 0 no reference is loaded,
            unless the loss needs one.
        reference: The fixed reference of the KL penalty and the loss; null for the policy before training.
        trainable_layers: Train only this number of last layers, the final norm and an output head that is not tied to
            the embeddings; null for all weights.
        lora: Train low-rank adapters instead of all weights. The model without them is the reference of `kl_coef`. The
            sampler gets the merged model; the export has both the merged model and the adapters alone.
        dtype: Dtype of the trained weights. bfloat16 halves their memory, but small updates are lost in it.
        attn_implementation: Attention of transformers: sdpa, eager, flash_attention_2, flex_attention.
        use_liger_kernel: Compute norms, MLPs and rotary embeddings with liger-kernel: less memory and time on GPUs.
            null to use it wherever a GPU, the package and kernels for the architecture are available and agree with
            the plain layers; true to require it (an error without a GPU).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        logprob_chunk_tokens: Response tokens whose logits are in memory at a time.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run Python code that comes with the model. Off unless you trust its authors.
        reset_optimizer: Start every round with a new state of the optimizer, without the moments and the
            number of steps of the rounds before.
    """

    batch_type = GroupBatch
    computes_ahead = True  # what `GroupBatch.ahead` asks for: groups above the token budget are split
    # names of methods that compute a number per token before a round trains: see `PolicyModule.needs`
    extra_passes: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        policy: str,
        loss: PolicyLoss = RebelLoss(),  # noqa: B008 - stateless; the command line shows it as the default
        optimizer: OptimizerCallable = lambda p: AdamW(p),
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
        reset_optimizer: bool = False,
    ) -> None:
        check_at_least("model", kl_coef=(kl_coef, 0))
        needs = check_needs(loss, kl_coef, self.extra_passes)
        if reference is not None and "reference_logps" not in needs:
            raise InputError(
                f"`model.reference` is {reference!r} but `model.kl_coef` is 0, so it would have no effect: "
                f"`model.loss` {type(loss).__name__} reads no reference log-probs. Leave it out."
            )
        if trainable_layers is not None and trainable_layers < 1:
            raise InputError(f"`model.trainable_layers` must be 1 or more, or null for all, got {trainable_layers}.")
        if lora is not None and trainable_layers is not None:
            raise InputError("`model.lora` and `model.trainable_layers` exclude each other: give one of them.")
        if lora is not None and lora.dropout > 0:
            raise InputError(
                f"`model.lora.dropout` is {lora.dropout}: the policy must give the log-probs that its responses were "
                "sampled with. Set it to 0."
            )
        source = ModelSource(policy, revision, chat_template, trust_remote_code)
        super().__init__(
            source,
            optimizer,
            lr_scheduler,
            lora,
            dtype,
            attn_implementation,
            use_liger_kernel,
            gradient_checkpointing,
            logprob_chunk_tokens,
            reset_optimizer,
        )
        self.reference_source = (
            source if reference is None else ModelSource(reference, None, None, trust_remote_code, "model.reference")
        )
        self.loss, self.needs, self.kl_coef, self.trainable_layers = loss, needs, kl_coef, trainable_layers
        names = tuple(dict.fromkeys(("loss", *loss_names(loss), *logged_names(loss, needs))))
        margins = margin_metric_names(loss, needs)
        self.train_metrics = tuple(f"train/{name}" for name in ("lr", *names, *margins, *chosen_names(loss)))
        margins = margin_metric_names(loss, needs, held_out=True)
        self.val_metrics = tuple(f"val/{name}" for name in (*names, *margins))
        self._round = dict(_EMPTY_ROUND)
        self._has_margins = has_margins(loss, needs)
        self._train_margins, self._val_margins = PairMargins(), PairMargins()
        self._ahead, self._val_ahead = AheadPass(), AheadPass()
        # mean absolute log-ratio a token in a round's first update, set right after it; None after the others
        self.first_logratio: float | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for _, term in self.loss.terms:
            term.use({})  # what it chose in an earlier run is not for this one
        if self.reference_source is not self.source:
            self._check_reference()
        check_ready = getattr(getattr(self.trainer, "datamodule", None), "check_ready", None)
        if check_ready is not None:
            check_ready()

    def _check_reference(self) -> None:
        """Refuse a reference that is missing, or that lacks tokens of the policy, before any weights load."""
        reference, tokens = self.reference_source, len(self.source.tokenizer)
        if checks_weights(self.trainer, reference):
            check_lm(reference)
        size = reference.config.get_text_config().vocab_size
        if size < min(tokens, self.source.config.get_text_config().vocab_size):
            raise InputError(
                f"`model.reference`: {reference.path!r} has {size} embeddings, but the tokenizer of the policy "
                f"{self.source.path!r} has {tokens} tokens. A reference needs the policy's tokenizer."
            )

    def load_model(self) -> Any:
        lm = super().load_model()
        if self.trainable_layers is not None:
            train_last_layers(lm, self.trainable_layers, self.source)
        return lm

    def load_reference(self) -> Callable[..., Tensor]:
        """Load the fixed reference, which is called like the policy. The caller drops it after use.

        If adapters start from it, it is the policy without them; otherwise it is a second model, sharded like the
        policy.
        """
        if self.lora is None or self.reference_source is not self.source:
            lm = self.load(self.reference_source)
            return shard_frozen(self.trainer, self.unit(lm))

        def base(**inputs: Any) -> Tensor:
            assert self.policy is not None
            with without_adapters(self.policy.lm):
                return get_callable_policy(self.trainer)(**inputs)

        return base

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference for the KL metrics."""
        return "reference_logps" in self.needs or self.lora is not None

    def training_step(self, batch: GroupBatch, batch_idx: int) -> Tensor:
        groups = self._groups(batch)
        losses = term_losses(self.loss, groups)
        is_first_update = batch_idx < self.trainer.accumulate_grad_batches
        if batch.counts:
            counted = self._add(self.train_means, self._train_margins, batch, groups, losses)
            if is_first_update and "old_logps" in groups.stored and counted is not None:  # the policy is still pi_old
                logratios = (counted.logps.detach() - counted.old_logps).abs()
                self.train_means.add(counted.lengths, first_logratio=logratios / counted.lengths)
        if is_update(self.trainer, batch_idx):
            self._log_update(is_first_update)
            self._ahead.clear()
        return sum_of_means(self.loss, losses, batch.weights, groups)

    @property
    def _zeros(self) -> dict[str, Tensor]:
        """The numbers of an update where nothing gives them, as for a round with a single prompt."""
        return {Z_REF: torch.zeros((), device=self.device)} if Z_REF in self.needs else {}

    def _compute_ahead(self, ahead: AheadPass, batches: Ahead, temperature: float) -> None:
        """Compute, without gradient, what this update needs of the policy as it is now."""

        with weights_unchanged(self):
            numbers = partial(self.numbers_of_tokens, temperature=temperature)
            ahead.compute(batches, numbers, ranks_of(self.trainer), self.device)

    def numbers_of_tokens(self, rows: PackedBatch, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probs of a batch's M targets, shape (M,), nats, and further numbers of each for the loss, by name."""
        return self(**rows.inputs(), temperature=temperature), {}

    def _log_update(self, is_first_update: bool) -> None:
        """Log an update's metrics over all its elements, and add them to those of the round."""
        metrics = self._compute(self.train_means, "train") | self._compute_margins(self._train_margins, "train")
        metrics |= {f"train/{name}": value for name, value in chosen_numbers(self.loss).items()}
        count = self.train_means.last_weights.get(loss_names(self.loss)[0], 0.0)
        first = metrics.pop("train/first_logratio", None)
        if is_first_update:
            self.first_logratio = first
            metrics |= {} if first is None else {"train/first_logratio": first}
        if count > 0:  # otherwise no element of the update counts
            self._round = {
                "loss": self._round["loss"] + count * metrics["train/loss"],
                "kl": self._round["kl"] + count * metrics.get("train/kl", math.nan),
                "pairs": self._round["pairs"] + count,
                "updates": self._round["updates"] + 1,
                "k2": max(self._round["k2"], k2_of_ratios(metrics)),
                "lr": max(self._round["lr"], float(self.trainer.optimizers[0].param_groups[0]["lr"])),
            }
        log_update(self, metrics | self.further_metrics())

    def further_metrics(self) -> dict[str, float]:
        """Metrics of an update that do not come from the loss, by their full names."""
        return {}

    def validation_step(self, batch: GroupBatch, batch_idx: int) -> None:
        groups = self._groups(batch, self._val_ahead)
        if batch.counts:
            self._add(self.val_means, self._val_margins, batch, groups, term_losses(self.loss, groups))

    def _groups(self, batch: GroupBatch, ahead: AheadPass | None = None) -> PromptGroups:
        """The prompt groups of a batch, with their log-probs under the policy; `ahead` is that of the training."""
        ahead = self._ahead if ahead is None else ahead
        if batch.ahead is not None:
            self._compute_ahead(ahead, batch.ahead, batch.temperature)
        logps, further = self.numbers_of_tokens(batch.rows, batch.temperature)
        common = self._zeros | ahead.numbers
        return batch.groups(logps, self.kl_coef, ahead.token_logps, common, further, ahead.further)

    def _add(
        self, means: Means, margins: PairMargins, batch: GroupBatch, groups: PromptGroups, losses: list[Tensor]
    ) -> PromptGroups | None:
        """Add a batch to the metrics; a group that is split counts with its first part alone.

        Returns:
            The groups that count; None if there is none.
        """
        if batch.parts is not None:
            if not batch.parts.counted:
                return None
            groups = select_groups(groups, batch.parts.counted)
            losses = term_losses(self.loss, groups)
        for name, values in zip(loss_names(self.loss), losses, strict=True):
            means.add(**{name: values})
        means.add(**logged(self.loss, groups))
        if self._has_margins:
            margins.add(pair_columns(self.loss, groups, losses if torch.is_grad_enabled() else None))
        return groups

    def _compute(self, means: Means, prefix: str) -> dict[str, float]:
        """Metrics over all values since the last call and all ranks; all of them call it together.

        Those that no element counts in are left out, as the loss of an update whose responses are all masked.
        """
        found = means.compute_and_reset(prefix, ranks_of(self.trainer))
        found = {name: v for name, v in found.items() if means.last_weights[name.removeprefix(f"{prefix}/")]}
        metrics = with_variance(found, f"{prefix}/ratio")
        metrics = summarised(self.loss, metrics, prefix)
        return with_total_loss(self.loss, metrics, prefix)

    def _compute_margins(self, margins: PairMargins, prefix: str) -> dict[str, float]:
        return margins.compute_and_reset(prefix, ranks_of(self.trainer)) if self._has_margins else {}

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self._compute(self.val_means, "val") | self._compute_margins(self._val_margins, "val"))
        self._val_margins.start_round()
        self._val_ahead.clear()

    def describe_epoch(self, metrics: Mapping[str, float], held_out: int) -> str:
        """The held-out metrics of an epoch over offline pairs, in a line."""
        texts = {
            "val/loss": "held-out loss {:.3f}",
            "val/sign_align": "sign agreement {:.3f}",
            "val/slope": "slope {:.3g} nats per reward unit",
            "val/r2": "R² {:.2f}",
            "val/kl": f"KL(old||new) {{:.3f}} nats (k1, {held_out} pairs)",
        }
        return ", ".join(text.format(metrics[name]) for name, text in texts.items() if name in metrics)

    def round_summary(self) -> dict[str, Any]:
        """Mean loss and KL over all elements that the round has trained on; None without updates, or if not known.

        With pairs, `margins` has the metrics of `summarise_margins`, over all pairs of the round. `movement` has the
        number of updates, and over them the largest learning rate and k2: half the mean square of log pi - log pi_old.
        """
        pairs, known = self._round["pairs"], ("loss", "kl") if "old_logps" in self.needs else ("loss",)
        means = {name: self._round[name] / pairs if pairs and name in known else None for name in ("loss", "kl")}
        margins = self._train_margins.summary()
        k2 = self._round["k2"] if "old_logps" in self.needs else None
        movement = {"updates": int(self._round["updates"]), "lr": self._round["lr"], "k2": k2}
        return means | {"movement": movement} | ({"margins": margins} if margins else {})

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self._has_margins and not has_stopped_inside(self.trainer):
            log_histograms(self.trainer, self._train_margins.histograms("train"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rlhf_pl"] = {"round": dict(self._round)}
        if self._has_margins:
            checkpoint["rlhf_pl"]["margins"] = self._train_margins.of_round()
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("rlhf_pl")
        if saved is not None:
            self._round = _EMPTY_ROUND | saved["round"]
            self._train_margins.start_round(saved.get("margins"))
            if "kl" not in saved["round"]:  # of an earlier version, which saved only that of the last update
                self._round["kl"] = self._round["pairs"] * (saved["last_kl"] or 0.0)

    def extra_pass_settings(self) -> dict[str, Any]:
        """Settings that the stored numbers of `extra_passes` depend on; builds nothing heavy."""
        return {}

    def training_settings(self) -> dict[str, Any]:
        """Settings that the training on a round depends on; builds nothing heavy."""
        terms = self.loss.terms
        return {
            "loss": describe(self.loss, *_DECLARED),
            **(
                {}
                if len(terms) == 1
                else {"terms": [f"{weight:g} x {describe(term, *_DECLARED)}" for weight, term in terms]}
            ),
            **self.optimization.settings(),
            "kl_coef": self.kl_coef,
            "dtype": self.dtype_name,
            **({} if self.trainable_layers is None else {"trainable_layers": self.trainable_layers}),
            **({} if self.lora is None else {"lora": record_settings(self.lora)}),
        }

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._round = dict(_EMPTY_ROUND)
        self._train_margins.start_round()
