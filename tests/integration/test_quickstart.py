"""The quickstart's config on its real model with the real engine, shortened."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
PLAIN_VLLM = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", max_model_len=256, enforce_eager=True, kv_cache_memory_bytes=2**28)
    greedy = SamplingParams(temperature=0, max_tokens=12)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    print("RESPONSE:", llm.chat([chat], greedy, use_tqdm=False)[0].outputs[0].text)
"""
PLAIN_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
chat = [{"role": "user", "content": "What is the capital of France?"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1]:]
print("RESPONSE:", tokenizer.decode(out, skip_special_tokens=True))
"""


def generate(code: str, model: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(line for line in done.stdout.splitlines() if line.startswith("RESPONSE:"))


@pytest.mark.slow(minutes=3)
@pytest.mark.vllm
@pytest.mark.skipif(not MODEL.exists(), reason="`make model` has not been run")
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM")
def test_quickstart_config_trains_and_its_model_loads_everywhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rlhf_pl", "fit", "--config", "configs/quickstart.yaml"),
            *("--trainer.default_root_dir", str(run), "--data.prompts_per_round", "8", "--data.val_prompts", "4"),
            *("--trainer.max_epochs", "2", "--rollout.sampling.max_response_tokens", "16"),
            # small steps: on so few prompts the config's learning rate could make the model forget Paris
            *("--model.optimizer.init_args.lr", "1e-6"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == "", "no log noise from libraries"
    assert "round 2: reward" in done.stdout
    texts = {generate(code, run / "model") for code in (PLAIN_VLLM, PLAIN_TRANSFORMERS)}
    assert len(texts) == 1
    assert "Paris" in texts.pop()
