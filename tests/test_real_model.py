"""A real model (SmolLM2-135M-Instruct) takes three steps on GSM8K in five scripts: only with --slow."""

import importlib
import math
import resource

import pytest
from conftest import read_lines
from helpers import trainer

STEPS = {"max_steps": 3, "num_eval": 2}
ONLINE = {"num_generations": 2, "batch_size": 4, "max_completion_length": 48, "eval_samples": 1}
RUNS = {  # flags beside the data's; billions' learning rates suit it
    "sft": {"batch_size": 8, "learning_rate": 1e-5},
    "dpo": {"batch_size": 4, "learning_rate": 1e-6, "beta": 0.1, "max_completion_length": 16},
    "reward_model": {"batch_size": 4, "learning_rate": 1e-5},
    "grpo": ONLINE | {"learning_rate": 1e-6},
    "ppo_rlhf": ONLINE | {"learning_rate": 1e-6, "kl_coef": 0.05, "reward": ("rewards.py:math_answer",)},
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("script", RUNS)
def test_real_model_trains_on_real_data(script, dtype, smollm2, gsm8k, tmp_path, one_cpu):
    rows = read_lines(gsm8k / "train.jsonl")[:24]
    if script in ("dpo", "reward_model"):
        others = [row["answer"] for row in rows[1:] + rows[:1]]
        rows = [
            {"question": r["question"], "chosen": r["answer"], "rejected": o} for r, o in zip(rows, others)
        ]
    train = trainer(importlib.import_module(script), tmp_path, model=str(smollm2), dtype=dtype, **STEPS)
    lines = [line for line in train(rows, **RUNS[script])[1] if line["step"]]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    seconds = sorted(line["step_time"] for line in lines)[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    losses = f"loss {lines[0]['loss']:.3f} -> {lines[2]['loss']:.3f}"
    print(f"{script} {dtype}: {losses}, {seconds:.1f} s a step, {peak:.1f} GB at most")
