"""A real model of 135 million parameters learns GSM8K on a CPU: SFT, then DPO, GRPO and DAPO from it.

    python benchmarks/real_model.py --model smollm2 --gsm8k gsm8k --hours 8         # a night, and the next
    python benchmarks/real_model.py --model smollm2 --gsm8k gsm8k --hours 3 --steps 96 12 8 8

The model is SmolLM2-135M-Instruct as a folder, gsm8k a folder with OpenAI's train.jsonl, test.jsonl and
example_model_solutions.jsonl. The stages, which share the hours:

    sft     sft.py on the training questions
    dpo     dpo.py on pairs of a right and a wrong solution to one question, of GPT-3's in OpenAI's file
    grpo    grpo.py on the training questions: the verifier's reward, and a fifth as much for an answer that
            ends as GSM8K's do (accuracy and format, as in DeepSeek-R1)
    dapo    dapo.py, likewise

A stage whose time is over is stopped as a user would stop it, and goes on with --resume the next time. Then
its model is evaluated by evaluate.py on the last 64 questions of the test set: dpo's pairs are of the first
thousand. Writes benchmarks/results/real_model.json, and docs/img/real_model.png with the curves.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro
from learning import ROOT, cpu_name
from safetensors.torch import load_file

PATH = ROOT / "benchmarks" / "results" / "real_model.json"
HELD_OUT = 64  # questions
ALL = "--max-completion-length 160 --max-tokens-per-micro-batch 4096 --num-eval 64 --save-every 10"
ONLINE = f"{ALL} --batch-size 64 --num-generations 8 --eval-samples 0 --eval-every 50"
ONLINE += " --reward rewards.py:math_answer benchmarks/gsm8k_format.py:answer_format --reward-weights 1.0 0.2"
ONLINE += " --learning-rate 1e-5 --warmup-steps 2"
STAGES = {
    "sft": f"{ALL} --learning-rate 2e-5 --batch-size 16 --max-length 512 --eval-every 48",
    "dpo": f"{ALL} --learning-rate 5e-6 --beta 0.1 --batch-size 16 --eval-every 10",
    "grpo": ONLINE,
    "dapo": f"{ONLINE} --max-resamples 2",
}
SHOWN = {  # of evaluate.py's report
    "greedy answers right": "eval/greedy_reward",
    "sampled answers right": "eval/reward",
    "right and in the format": "eval/strict_accuracy",
    "pass@8": "eval/pass@8",
    "tokens an answer": "completions/mean_length",
    "cut off": "completions/clipped_ratio",
    "in the format, and wrong": "eval/format_only",
}
CURVES = {  # of training, and held out
    "sft": ("loss", "eval/loss"),
    "dpo": ("rewards/accuracies", "eval/accuracy"),
    "grpo": ("reward", "eval/greedy_reward"),
    "dapo": ("reward", "eval/greedy_reward"),
}
KEPT = ("step", "loss", "entropy", "kl", "step_time", "tokens_per_second", "frac_reward_zero_std", "reward")
KEPT += ("rewards/accuracies", "rewards/margins", "completions/mean_length", "completions/clipped_ratio")


@dataclass
class Args:
    model: Path
    """Folder of SmolLM2-135M-Instruct."""
    gsm8k: Path
    """Folder of GSM8K."""
    hours: float = 8.0
    """Hours for all stages together; each that is not finished takes an equal share."""
    steps: tuple[int, int, int, int] = (934, 35, 400, 400)
    """Optimizer steps of the four stages; by default two epochs of the questions, one of the pairs, and as
    many rollouts as time allows."""
    stages: tuple[str, ...] = tuple(STAGES)
    """Which stages go on."""
    dtype: str = "bfloat16" if "amx_bf16" in Path("/proc/cpuinfo").read_text() else "float32"
    """bfloat16 by default where the processor has AMX for it."""
    folder: Path = ROOT / "runs" / "real_model"
    """Where the stages are kept."""


def flags(stage: str, args: Args) -> str:
    return f"{STAGES[stage]} --max-steps {args.steps[list(STAGES).index(stage)]}"


def write_data(args: Args):
    """Held-out questions, and pairs of a right and a wrong solution, as files in the folder."""
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "train.jsonl").write_text((args.gsm8k / "train.jsonl").read_text())
    lines = (args.gsm8k / "test.jsonl").read_text().splitlines()
    (args.folder / "eval.jsonl").write_text("\n".join(lines[-HELD_OUT:]) + "\n")
    pairs, final = [], lambda text: re.sub(r"\n?A:\s*(\S+)\s*$", r"\n#### \1", text.strip())
    for line in (args.gsm8k / "example_model_solutions.jsonl").read_text().splitlines():
        row = json.loads(line)
        tried = [x for x in row.values() if isinstance(x, dict)]
        right, wrong = (
            [final(x["solution"]) for x in tried if x["is_correct"] == good] for good in (True, False)
        )
        if right and wrong and "####" in right[0] and "####" in wrong[0]:
            pairs.append({"question": row["question"], "chosen": right[0], "rejected": wrong[0]})
    held = {json.loads(line)["question"] for line in lines[1000:]}
    for name, some in (("pairs", [p for p in pairs if p["question"] not in held]),
                       ("held_pairs", [p for p in pairs if p["question"] in held][:HELD_OUT])):  # fmt: skip
        (args.folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in some))


def train(stage: str, seconds: float, args: Args) -> bool:
    """Let a stage go on for some seconds -> whether it is finished."""
    folder, data = args.folder / stage, "pairs" if stage == "dpo" else "train"
    started_from = args.model if stage == "sft" else args.folder / "sft" / "model"
    words = [sys.executable, f"{stage}.py", *flags(stage, args).split(), "--model", str(started_from)]
    words += ["--dataset", f"{args.folder}/{data}.jsonl", "--output-dir", str(folder), "--dtype", args.dtype]
    words += ["--eval-dataset", f"{args.folder}/{'held_pairs' if stage == 'dpo' else 'eval'}.jsonl"]
    if (folder / "checkpoints").exists():
        words += ["--resume"]
    else:
        shutil.rmtree(folder, ignore_errors=True)
    process = subprocess.Popen(words, cwd=ROOT)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it saves behind its step, and ends
    if process.wait():
        raise SystemExit(process.returncode)
    return (folder / "model").exists()


def evaluate(name: str, model: Path, args: Args) -> dict:
    """Greedy and sampled accuracy, pass@k and lengths of a model, by evaluate.py."""
    folder = args.folder / f"evaluated_{name}_{time.strftime('%Y%m%d-%H%M%S')}"
    words = f"evaluate.py --models {model} --dataset {args.folder}/eval.jsonl --output-dir {folder}"
    words += f" --eval-samples 8 --max-completion-length 160 --dtype {args.dtype}"
    subprocess.run([sys.executable, *words.split()], cwd=ROOT, check=True)
    [(_, report)] = json.loads((folder / "report.json").read_text())["models"].items()
    return {key: value for key, value in report.items() if isinstance(value, int | float | list)}


def kept_by_bfloat16(start: Path, trained: Path) -> float:
    """How much of a change, D = trained - start, is left in bfloat16: <rounded - start, D> / <D, D>."""
    before, after = (load_file(folder / "model.safetensors") for folder in (start, trained))
    kept = changed = 0.0
    for name, weight in after.items():
        old = before[name].double()
        kept += ((weight.bfloat16().double() - old) * (weight.double() - old)).sum().item()
        changed += (weight.double() - old).square().sum().item()
    return kept / changed


def draw(stages: dict):
    """The curve of each stage: every step, and the held-out values under evaluation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(stages), figsize=(3.2 * len(stages), 3), layout="constrained")
    for axes, (stage, found) in zip(np.atleast_1d(panels), stages.items()):
        for key, label in zip(CURVES[stage], ("batches", "held out")):
            known = [(line["step"], line[key]) for line in found["curve"] if key in line]
            axes.plot(*zip(*known), label=label, marker="o" if label == "held out" else "")
        axes.set(title=f"{stage}.py", xlabel="step", ylabel=CURVES[stage][0])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(ROOT / "docs" / "img" / "real_model.png", dpi=110)


def main(args: Args):
    write_data(args)
    result = json.loads(PATH.read_text()) if PATH.exists() else {"stages": {}, "evaluations": {}}
    if "start" not in result["evaluations"]:
        result["evaluations"]["start"] = evaluate("start", args.model, args)
    for n, stage in enumerate(args.stages):
        if not (args.folder / stage / "model").exists():
            started = time.perf_counter()
            finished = train(stage, 3600 * args.hours / (len(args.stages) - n), args)
            args.hours -= (time.perf_counter() - started) / 3600
            lines = [json.loads(line) for line in (args.folder / stage / "metrics.jsonl").open()]
            curve = [{k: x for k, x in line.items() if k in KEPT or k.startswith("eval/")} for line in lines]
            result["stages"][stage] = {"flags": flags(stage, args), "dtype": args.dtype, "curve": curve}
            if finished:
                start = args.model if stage == "sft" else args.folder / "sft" / "model"
                kept = kept_by_bfloat16(start, args.folder / stage / "model")
                result.setdefault("kept_by_bfloat16", {})[stage] = kept
                result["evaluations"][stage] = evaluate(stage, args.folder / stage / "model", args)
        result["command"] = f"python benchmarks/real_model.py --steps {' '.join(map(str, args.steps))}"
        result["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count()}
        numbers = result["evaluations"].items()
        result["summary"] = {name: {k: found[v] for k, v in SHOWN.items()} for name, found in numbers}
        result["versions"] = {name: version(name) for name in ("torch", "transformers")}
        PATH.with_suffix(".partial").write_text(json.dumps(result, indent=1) + "\n")
        PATH.with_suffix(".partial").rename(PATH)
        draw(result["stages"])
        if not (args.folder / "sft" / "model").exists():
            print("the others start from sft.py's model, which is not finished: run this again")
            return


if __name__ == "__main__":
    main(tyro.cli(Args))
