"""The formula of memory.py held against peaks measured on a CPU: small random models are trained.

    python benchmarks/memory_measured.py      # half an hour on one core, 6 GB

Measured is the most that was resident (VmHWM) up to the end of the last step, less what was resident when the
first model was loaded: imports, data and tokenizer are not counted. glibc is told to give big buffers back as
they are freed; "as it runs" is sft.py with its own setting, where the heap keeps them, in pieces that do not
always fit again. That, and the buffers of kernels and libraries, the formula leaves out.
"""

import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import tyro
from distill_memory import resident
from learning import ROOT, cpu_name
from memory import SCRIPTS, Run, Shape, peak

SMALL = {  # what is trained on a CPU; the first is the model of sft_vs_trl.py
    "13M": Shape(256, 8, 8, 4, 32, 896, 23000, True, qk_norm=True),
    "120M": Shape(768, 12, 12, 4, 64, 2304, 24000, False),
}
CASES = {  # name: data of tiny/, tokens of its rows on average, flags, what is other in the formula
    "sft": ("sft_train", 67, {}, {}),
    "sft, as it runs": ("sft_train", 67, {}, {}),
    "sft, checkpointing": ("sft_train", 67, {"gradient_checkpointing": True}, {"checkpointing": True}),
    "sft, LoRA": ("sft_train", 67, {"lora_rank": 16}, {"lora_rank": 16}),
    "dpo, cached": ("preference_train", 85, {}, {}),
    "dpo, live": ("preference_train", 85, {"ref": "live"}, {"live": True}),
    "reward_model": ("preference_train", 85, {}, {}),
    "grpo": ("prompts_train", 51, {"beta": 0.01}, {}),
    "ppo_rlhf": ("prompts_train", 51, {"reward": ("rewards.py:math_answer",)}, {}),
}
ROWS, SAMPLED, LONGEST = {"13M": 2048, "120M": 256}, 64, 126  # tokens of a row, an answer, with its prompt
RUNS = [("13M", case) for case in CASES]
RUNS += [("120M", case) for case in ("sft", "ppo_rlhf", "grpo", "dpo, live", "sft, LoRA", "reward_model")]
CONFIG = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size"
CONFIG = [*CONFIG.split(), "vocab_size", "tie_word_embeddings"]  # a Shape in transformers' words


def run_of(case: str, model: str) -> Run:
    """What is measured, as the formula takes it: a batch is two rows or a little more."""
    name, (_, length, _, more) = case.partition(",")[0], CASES[case]
    batch = max(8, 2 * ROWS[model] // length // 8 * 8)
    run = Run(f"{name}.py", bytes_each=4, row=ROWS[model], checkpointing=False, batch=batch, longest=LONGEST)
    return replace(run, on_cuda=False, **more)


def measure(case: str, model: str) -> int:
    """Train a random model for two steps in this process -> bytes at the peak, above the start."""
    sys.path.insert(0, str(ROOT))
    import torch
    import transformers

    (data, _, flags, _), run, shape, seen = CASES[case], run_of(case, model), SMALL[model], {}
    module = importlib.import_module(run.script.removesuffix(".py"))
    load_model, online = module.load_model, SCRIPTS[run.script].rollouts
    if run.lora_rank:
        importlib.import_module("peft")

    def begin(*args, **options):
        if not seen:
            seen["start"] = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on
        return load_model(*args, **options)

    module.load_model = begin
    module.save_model = lambda *_: seen.update(peak=resident("VmHWM") - seen["start"])
    if "as it runs" not in case:
        module.ctypes = SimpleNamespace(CDLL=lambda _: None)  # its own setting of glibc
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "tiny" / "base")
        kind = transformers.Qwen3Config if shape.qk_norm else transformers.Qwen2Config
        config = kind(**dict(zip(CONFIG, shape)), max_position_embeddings=4096, eos_token_id=2)
        torch.manual_seed(0)
        for part in (tokenizer, transformers.AutoModelForCausalLM.from_config(config)):
            part.save_pretrained(folder)
        flags = flags | {"model": folder, "batch_size": run.batch, "max_tokens_per_micro_batch": run.row}
        flags |= {"dataset": (str(ROOT / "tiny" / "data" / f"{data}.jsonl"),), "output_dir": f"{folder}/run"}
        flags |= {"max_steps": 2, "eval_every": 0, "save_every": 0, "learning_rate": 1e-5}
        flags |= {"value_model": folder} if run.script == "ppo_rlhf.py" else {}
        flags |= {"max_completion_length": SAMPLED * online} if SCRIPTS[run.script].head else {}
        module.main(module.Args(**flags))
    return seen["peak"]


def measured(case: str, model: str) -> dict:
    """One case in a process of its own, beside the formula."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "131072"  # bytes; larger buffers go back when they are freed
    command = [sys.executable, __file__, "--case", case, "--model", model]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found, wanted = int(done.stdout.split()[-1]), peak(SMALL[model], run_of(case, model))
    return {"formula GB": wanted / 1e9, "measured GB": found / 1e9, "measured / formula": found / wanted}


@dataclass
class Args:
    case: str = ""
    """Set for the processes that this one starts, as is --model."""
    model: str = ""


def main(args: Args):
    if args.case:
        print(measure(args.case, args.model))
        return
    result = {
        "command": "python benchmarks/memory_measured.py",
        "runs": {},
        "shapes": {name: shape._asdict() for name, shape in SMALL.items()},
        "settings": {"row": ROWS, "answer": SAMPLED, "steps": 2, "dtype": "float32"},
        "machine": {"cpu": cpu_name(), "cores": 1, "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    path = ROOT / "benchmarks" / "results" / "memory.json"
    for model, case in RUNS:
        result["runs"][f"{case}, {model}"] = found = measured(case, model)
        print(f"{case}, {model}:", {name: round(x, 3) for name, x in found.items()}, flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
