"""Tries every causal LM of transformers as a policy, with tiny random models, and writes docs/models.md.

python -m scripts.causal_lms            # all, a few minutes
python -m scripts.causal_lms llama phi3 # some; prints the outcomes
"""

import multiprocessing
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from rlhf_pl.cli.quiet import quiet_libraries
from rlhf_pl.models.compute import Compute
from rlhf_pl.models.kernel_check import NoCopyError, small_copies
from rlhf_pl.models.packed_batch import PrefixGroup, pack
from rlhf_pl.models.policy import PolicyLM, load_lm, meta_lm
from rlhf_pl.models.shared_prefix import takes_prefix_groups
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError, describe_error

SECONDS, GIB = 600, 14
LONGEST = 30
NATS = 5e-3  # largest accepted difference from transformers, float32; recurrent models differ by 0.001 from rounding
HEADER = """# Models

Every causal LM of transformers {version}, tried as a policy with a tiny random model of its config: log-probs of \
prompts with several responses, in train mode with gradient checkpointing if supported, compared with transformers' \
own eager attention on each row separately. `python -m scripts.causal_lms` writes this page.

- **shared prompts**: a prompt is computed once for all its responses.
- **works**: the numbers are correct; every response is computed with a copy of its prompt.
- **refused**: an error message gives the reason, before anything is written.
- **not tried**: no tiny model could be made from the config; the result is unknown.

Only text is used. A router's auxiliary loss (load balancing, z-loss) is not in the objective of any module: routers \
train only on the loss of the log-probs. Dropout, router noise and everything else that differs in train mode is off.

| model type | class | outcome |
|---|---|---|
"""


@dataclass(frozen=True)
class Outcome:
    """The result of trying an architecture.

    Args:
        kind: shared prompts, works, refused, not tried, or WRONG.
        reason: Why it does not work; empty if it works.
        name: The model's class.
    """

    kind: str
    reason: str = ""
    name: str = ""


def try_architecture(model_type: str, **changes: Any) -> Outcome:
    """Compare the log-probs of a tiny model by `PolicyLM` with those of plain transformers.

    Args:
        model_type: Model type of transformers.
        changes: Changes to the config's defaults.
    """
    try:
        lm = _make_tiny_model(model_type, changes)
    except NoCopyError as error:
        return _classify_untried(model_type, changes, str(error))
    name = type(lm).__name__
    groups = _make_prefix_groups(lm.config.get_text_config().vocab_size)
    try:
        loaded = load_lm(_Source(lm), longest=LONGEST)
    except InputError as error:
        return Outcome("refused", str(error).removeprefix("`model.policy`: "), name)
    if loaded.supports_gradient_checkpointing:
        loaded.gradient_checkpointing_enable({"use_reentrant": False})
    policy = PolicyLM(loaded).train()
    actual = policy(**pack(groups).inputs())
    actual.sum().backward()
    expected = _compute_plain_logps(lm, groups)
    difference = (actual.detach() - expected).abs().max().item()
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    if difference > NATS or not gradients or not all(g.isfinite().all() for g in gradients):
        return Outcome("WRONG", f"{difference:.3g} nats from plain transformers", name)
    return Outcome("shared prompts" if takes_prefix_groups(loaded) else "works", "", name)


def _classify_untried(model_type: str, changes: dict[str, Any], reason: str) -> Outcome:
    """The outcome for an architecture without a tiny model: refused if loading would refuse its class."""
    lm = meta_lm(_make_config(model_type, changes, 0.0))
    if lm.base_model is lm:
        return Outcome("refused", "no backbone apart from its output head, which log-probs need", type(lm).__name__)
    return Outcome("not tried", reason, type(lm).__name__)


class _Source(ModelSource):
    """A model in memory instead of a folder."""

    def __init__(self, lm: Any) -> None:
        super().__init__(type(lm).__name__)
        object.__setattr__(self, "config", lm.config)
        object.__setattr__(self, "lm", lm)

    def read(self, part: str, loader: Any, **kwargs: Any) -> Any:
        model = loader.from_config(kwargs["config"], **{n: kwargs[n] for n in ("dtype", "attn_implementation")})
        model.load_state_dict(self.lm.state_dict())  # type: ignore[attr-defined]
        return model.eval(), {"missing_keys": (), "mismatched_keys": ()}


def _make_tiny_model(model_type: str, changes: dict[str, Any]) -> Any:
    """A tiny model, with noise in train mode if its config has options for noise."""
    for noise in (0.3, 0.0):
        try:
            return small_copies(_make_config(model_type, changes, noise), Compute(), torch.float32).exact
        except NoCopyError as error:
            failure = error
    raise failure


def _make_config(model_type: str, changes: dict[str, Any], noise: float) -> Any:
    config = transformers.AutoConfig.for_model(model_type, **changes)
    text = config.get_text_config()
    if getattr(text, "is_decoder", None) is False:  # models that can also be encoders
        text.is_decoder = True
    for name, value in vars(text).items():
        if isinstance(value, float) and any(word in name for word in ("jitter_noise", "dropout", "pdrop", "layerdrop")):
            setattr(text, name, noise)  # noise that is not turned off would change the result
    return config


def _make_prefix_groups(vocabulary: int) -> list[PrefixGroup]:
    """Prompts of 1, 9 and 12 tokens with responses; rows have 5 to 30 tokens."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    return [
        PrefixGroup(ids(9), (ids(3), ids(7), ids(12))),
        PrefixGroup(ids(1), (ids(4), ids(11))),
        PrefixGroup(ids(12), (ids(LONGEST - 12), ids(2))),
    ]


@torch.no_grad()
def _compute_plain_logps(lm: Any, groups: Sequence[PrefixGroup]) -> torch.Tensor:
    parts = []
    for group in groups:
        for response in group.responses:
            row = torch.tensor([[*group.prompt, *response]])
            logps = lm(input_ids=row, use_cache=False).logits[0].float().log_softmax(-1)
            start = len(group.prompt)
            parts.append(logps[start - 1 : -1].gather(1, row[0, start:, None])[:, 0])
    return torch.cat(parts)


def _run_child(model_type: str, queue: Any) -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (GIB * 2**30, GIB * 2**30))
    try:
        queue.put(try_architecture(model_type))
    except Exception as error:
        queue.put(Outcome("not tried", describe_error(error)))


def try_in_process(model_type: str) -> Outcome:
    """Run `try_architecture` in a separate process, with limits on time and memory."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_run_child, args=(model_type, queue))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        return Outcome("not tried", f"takes over {SECONDS} s")
    return queue.get(timeout=5) if process.exitcode == 0 else Outcome("not tried", "takes too much memory")


def write_page(outcomes: Mapping[str, Outcome]) -> None:
    """Write docs/models.md with the outcomes of all model types."""
    rows = []
    for model_type, outcome in sorted(outcomes.items()):
        reason = f": {outcome.reason}".replace("|", r"\|")[:240] if outcome.reason else ""
        rows.append(f"| `{model_type}` | {outcome.name} | {outcome.kind}{reason} |\n")
    Path("docs/models.md").write_text(HEADER.format(version=transformers.__version__) + "".join(rows))


def main(model_types: list[str]) -> int:
    """Write the page, or only print the outcomes of some model types; the exit code is 1 if numbers are wrong."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    outcomes = {}
    for model_type in model_types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        outcomes[model_type] = try_in_process(model_type)
        print(model_type, outcomes[model_type], flush=True)
    if not model_types:
        write_page(outcomes)
    return int(any(outcome.kind == "WRONG" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
