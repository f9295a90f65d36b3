"""Creates `stored_runs/`: stopped runs of a tiny model as text, and the results of the resumed runs.

    python -m tests.checkpointing.make_stored_runs KIND...

Run it once, with the version whose run directories are to be kept. It uses only the command line.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.checkpointing.checkpoint_json import write_json

HERE = Path(__file__).parent / "stored_runs"
LINKED = ("between", "lora", "offline", "reward_model", "sft")  # stopped after the first round or epoch is saved
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(folder: Path) -> None:
    """A Llama of 1,400 random weights with a byte-level tokenizer for ASCII."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted("0123456789abcdefghijklmnopqrstuvwxyzINSWY+-.,?!ĠĊ")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<unk>"]
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", pad_token="</s>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(wrapped),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=2,
            initializer_range=0.3,
        )
    )
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[1, 2])
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)


def schedule_stop(kind: str) -> None:
    """Make this process stop after a round or epoch is saved, in the middle of a round, or during scoring."""
    if kind in LINKED:
        plain = os.replace

        def replace(source: Any, target: Any) -> None:
            plain(source, target)
            if Path(target).name == "last.ckpt" and "after-round-0001" in os.readlink(target):
                os.kill(os.getpid(), signal.SIGTERM)

        os.replace = replace
    elif kind == "scoring":
        from rlhf_pl.store.journal import Journal

        signal_at_call(
            Journal, "add", 6, signal.SIGKILL
        )  # after three calls for held-out prompts and two for the round
    else:
        signal_at_call(torch.optim.AdamW, "step", 6, signal.SIGTERM)


def signal_at_call(kind: Any, method: str, number: int, stop: signal.Signals) -> None:
    """Send this process a signal at the `number`-th call of a method."""
    plain: Callable[..., Any] = getattr(kind, method)
    count = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), stop)
        return plain(*args, **kwargs)

    setattr(kind, method, counted)


def run(kind: str, stops: bool) -> int:
    """Run `rlhf-pl fit` in a child process. Return its exit code."""
    pid = os.fork()
    if pid == 0:
        from rlhf_pl.__main__ import main

        status = 99
        try:
            if stops:
                schedule_stop(kind)
            status = main(["fit", "--config", "run.yaml"])
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.wait()[1])


def store_run(kind: str) -> None:
    """Copy a stopped run as text."""
    target = HERE / kind / "run"
    shutil.rmtree(target, ignore_errors=True)
    for file in sorted(path for path in Path("run").rglob("*") if path.is_file() or path.is_symlink()):
        kept = target / file.relative_to("run")
        kept.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink():
            kept.with_name(f"{kept.name}.link").write_text(os.readlink(file) + "\n")
        elif file.suffix == ".ckpt":
            write_json(torch.load(file, weights_only=True), kept.with_name(f"{kept.name}.json"))
        elif file.suffix in (".json", ".parquet", ".yaml", ".shard", ".journal", ".jsonl", ".csv", ".md"):
            shutil.copyfile(file, kept)
        else:
            print("skipped:", file)


def store_results(kind: str) -> None:
    """Write the results of the resumed run: the files of its store, and the weights."""
    from safetensors.torch import load_file

    files = sorted(str(path) for path in Path("run").rglob("*.parquet"))
    weights = {
        name: [round(float(v), 6) for v in tensor.flatten()]
        for file in sorted(Path("run/model").rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    last = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    text = json.dumps({"updates": last["global_step"], "files": files, "weights": weights}, separators=(",", ":"))
    (HERE / kind / "ends.json").write_text(text + "\n")


def main(kinds: list[str]) -> None:
    model = HERE / "model"
    if not model.exists():
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder))
            model.mkdir(parents=True)
            from safetensors.torch import load_file

            write_json(load_file(Path(folder) / "model.safetensors"), model / "weights.json")
            for file in Path(folder).iterdir():
                if file.suffix != ".safetensors":
                    shutil.copyfile(file, model / file.name)
    from tests.checkpointing.stored_run import restore_inputs

    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            restore_inputs(kind, Path(folder))
            os.chdir(folder)
            print(kind, "stopped:", run(kind, stops=True))
            store_run(kind)
            print(kind, "resumed:", run(kind, stops=False))
            store_results(kind)
            os.chdir("/")


if __name__ == "__main__":
    main(sys.argv[1:])
