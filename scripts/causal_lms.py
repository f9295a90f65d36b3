"""Try every causal LM of transformers as a policy, on tiny random models, and write docs/models.md.

python -m scripts.causal_lms            # all of them, a few minutes
python -m scripts.causal_lms llama phi3 # some, to the terminal
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
from rlhf_pl.utils.errors import InputError

SECONDS, GIB = 600, 14
LONGEST = 30
NATS = 5e-3  # between ours and transformers' own numbers, float32; recurrent models make 0.001 of rounding
HEADER = """# Models

Every causal LM of transformers {version}, tried as a policy with a tiny random model of its config: log-probs of \
prompts with several responses, in train mode with gradient checkpointing where there is any, against transformers' \
own eager attention, each row alone. `python -m scripts.causal_lms` writes this page.

- **shared prompts**: a prompt is computed once for all its responses.
- **works**: the numbers are right; every response is computed with a copy of its prompt.
- **refused**: one message says why, before anything is written.
- **not tried**: no tiny model could be made of the config; nothing is known.

Only text is read. A router's auxiliary loss (load balancing, z-loss) is not in the objective of any module: routers \
train on the loss of the log-probs alone. Dropout, router noise and whatever else differs in train mode are off.

| model type | class | outcome |
|---|---|---|
"""


@dataclass(frozen=True)
class Outcome:
    """What came of trying an architecture.

    Args:
        kind: shared prompts, works, refused, not tried, or WRONG.
        why: Of what does not work.
        name: The model's class.
    """

    kind: str
    why: str = ""
    name: str = ""


def try_architecture(model_type: str, **changes: Any) -> Outcome:
    """Log-probs of a tiny model as `PolicyLM` gives them against those of plain transformers.

    Args:
        model_type: Of transformers.
        changes: To the config's defaults.
    """
    try:
        lm = _tiny(model_type, changes)
    except NoCopyError as error:
        return _without_copy(model_type, changes, str(error))
    name = type(lm).__name__
    trees = _trees(lm.config.get_text_config().vocab_size)
    try:
        loaded = load_lm(_Source(lm), longest=LONGEST)
    except InputError as error:
        return Outcome("refused", str(error).removeprefix("`model.policy`: "), name)
    if loaded.supports_gradient_checkpointing:
        loaded.gradient_checkpointing_enable({"use_reentrant": False})
    policy = PolicyLM(loaded).train()
    found = policy(**pack(trees).inputs())
    found.sum().backward()
    expected = _plain_logps(lm, trees)
    off = (found.detach() - expected).abs().max().item()
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    if off > NATS or not gradients or not all(g.isfinite().all() for g in gradients):
        return Outcome("WRONG", f"{off:.3g} nats from plain transformers", name)
    return Outcome("shared prompts" if takes_prefix_groups(loaded) else "works", "", name)


def _without_copy(model_type: str, changes: dict[str, Any], why: str) -> Outcome:
    """Of a model that nothing can be tried on: what loading says of its class, if it refuses that."""
    lm = meta_lm(_config(model_type, changes, 0.0))
    if lm.base_model is lm:
        return Outcome("refused", "no backbone apart from its output head, which log-probs need", type(lm).__name__)
    return Outcome("not tried", why, type(lm).__name__)


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


def _tiny(model_type: str, changes: dict[str, Any]) -> Any:
    """A tiny model, with noise in train mode if its config has any."""
    for noise in (0.3, 0.0):
        try:
            return small_copies(_config(model_type, changes, noise), Compute(), torch.float32).exact
        except NoCopyError as error:
            failure = error
    raise failure


def _config(model_type: str, changes: dict[str, Any], noise: float) -> Any:
    config = transformers.AutoConfig.for_model(model_type, **changes)
    text = config.get_text_config()
    if getattr(text, "is_decoder", None) is False:  # models that are also encoders
        text.is_decoder = True
    for name, value in vars(text).items():
        if isinstance(value, float) and any(word in name for word in ("jitter_noise", "dropout", "pdrop", "layerdrop")):
            setattr(text, name, noise)  # so that it would show
    return config


def _trees(vocabulary: int) -> list[PrefixGroup]:
    """Prompts of 1, 9 and 12 tokens with responses, rows of 5 to 30 tokens."""
    random = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=random).tolist()

    return [
        PrefixGroup(ids(9), (ids(3), ids(7), ids(12))),
        PrefixGroup(ids(1), (ids(4), ids(11))),
        PrefixGroup(ids(12), (ids(LONGEST - 12), ids(2))),
    ]


@torch.no_grad()
def _plain_logps(lm: Any, trees: Sequence[PrefixGroup]) -> torch.Tensor:
    found = []
    for tree in trees:
        for response in tree.responses:
            row = torch.tensor([[*tree.prompt, *response]])
            logps = lm(input_ids=row, use_cache=False).logits[0].float().log_softmax(-1)
            start = len(tree.prompt)
            found.append(logps[start - 1 : -1].gather(1, row[0, start:, None])[:, 0])
    return torch.cat(found)


def _child(model_type: str, queue: Any) -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (GIB * 2**30, GIB * 2**30))
    try:
        queue.put(try_architecture(model_type))
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        queue.put(Outcome("not tried", f"{type(error).__name__}: {line}"))


def try_apart(model_type: str) -> Outcome:
    """`try_architecture` in a process of its own, with limits on time and memory."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(model_type, queue))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        return Outcome("not tried", f"takes over {SECONDS} s")
    return queue.get(timeout=5) if process.exitcode == 0 else Outcome("not tried", "takes too much memory")


def write_page(found: Mapping[str, Outcome]) -> None:
    """The table of all outcomes, by model type."""
    rows = []
    for model_type, outcome in sorted(found.items()):
        why = f": {outcome.why}".replace("|", r"\|")[:240] if outcome.why else ""
        rows.append(f"| `{model_type}` | {outcome.name} | {outcome.kind}{why} |\n")
    Path("docs/models.md").write_text(HEADER.format(version=transformers.__version__) + "".join(rows))


def main(wanted: list[str]) -> int:
    """Write the page, or print the outcomes of what is `wanted`; the exit code is 1 where numbers are wrong."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = {}
    for model_type in wanted or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found[model_type] = try_apart(model_type)
        print(model_type, found[model_type], flush=True)
    if not wanted:
        write_page(found)
    return int(any(outcome.kind == "WRONG" for outcome in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
