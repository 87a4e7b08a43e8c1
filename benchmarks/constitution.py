"""Constitutional AI on tiny/, from answers to a tuned model, the commands of docs/constitutional_ai.md.

    python benchmarks/constitution.py                 # 3 seeds, about 15 minutes of one core each
    python benchmarks/constitution.py --seeds 1

For each seed: revisions and what sft.py learns from them (SL-CAI); pairs of the first model's answers and
what dpo.py learns from them (RLAIF); and the two after each other, as in the paper. How many answers to
held-out prompts are rude (a rule) and right (a verifier) is measured of each model by the same script; of the
judge, how often it sides with the rule and the verifier, by what its principle is about. Writes
benchmarks/results/constitutional_ai.json.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro
from learning import ROOT, cpu_name

sys.path.insert(0, str(ROOT))
from tiny.make import CONSTITUTION

FIRST = "tiny/constitutional"
# What is run, in this order; a command's folder is its name, {folder} that of all.
JUDGE = f"constitutional_ai.py --stage judge --judge {FIRST}"
COMMANDS = {
    "revise": "constitutional_ai.py",
    "sl_cai": f"sft.py --model {FIRST} --dataset {{folder}}/revise/sft.jsonl --learning-rate 3e-4",
    "judge": JUDGE,
    "rlaif": f"dpo.py --model {FIRST} --dataset {{folder}}/judge/preference.jsonl",
    "judge_sl": f"{JUDGE} --model {{folder}}/sl_cai/model --num-rows 2048",
    "rl_cai": "dpo.py --model {folder}/sl_cai/model --dataset {folder}/judge_sl/preference.jsonl",
}
MODELS = ("sl_cai", "rlaif", "rl_cai")


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of every command of a pipeline."""


def run(command: str, seed: int, output: Path) -> list[dict]:
    """Run a command of the repository -> its lines of metrics.jsonl."""
    command = [sys.executable, *command.split(), "--seed", str(seed), "--output-dir", str(output)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return read(output / "metrics.jsonl")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def of_answers(metrics: list[dict], line: int) -> dict[str, float]:
    """What rules say of answers to held-out prompts, in the first or last line of metrics."""
    line = [x for x in metrics if "eval/reward" in x][line]
    return {"eval/violations": line["eval/violations"], "eval/reward": line["eval/reward"]}


def of_judge(rows: list[dict]) -> dict[str, dict[str, float]]:
    """By what principles are about: of pairs that a rule tells apart, those that the judge does as well."""
    found = {}
    for about, principles in CONSTITUTION.items():
        own = [row for row in rows if row["principle"] in principles]
        rude = [row["violations"] for row in own if row["violations"][0] != row["violations"][1]]
        right = [row["rewards"] for row in own if row["rewards"][0] != row["rewards"][1]]
        found[about] = {
            "polite one chosen": float(np.mean([chosen < rejected for rejected, chosen in rude])),
            "right one chosen": float(np.mean([chosen > rejected for rejected, chosen in right])),
            "position bias": float(np.mean([row["position_bias"] for row in own])),
            "same place in both orders": float(np.mean([row["same_place"] for row in own])),
        }
    return found


def pipeline(seed: int, folder: Path) -> dict:
    """All commands of a seed, and each model's own answers."""
    started, metrics = time.perf_counter(), {}
    for name, command in COMMANDS.items():
        metrics[name] = run(command.format(folder=folder), seed, folder / name)
        print(f"seed {seed}, {time.perf_counter() - started:.0f} s: {name}", flush=True)
    rows = read(folder / "revise" / "rows.jsonl")
    rounds = {}
    for number in range(len(rows[0]["violations"])):
        means = (np.mean([row[key][number] for row in rows]) for key in ("violations", "rewards"))
        rounds[f"round {number}"] = dict(zip(("violations", "reward"), map(float, means), strict=True))
    stages = {FIRST: of_answers(metrics["revise"], 0), "revisions": of_answers(metrics["revise"], -1)}
    stages["chosen"] = of_answers(metrics["judge"], -1)
    for name in MODELS:
        command = f"constitutional_ai.py --model {folder / name / 'model'} --num-rows 0"
        stages[name] = of_answers(run(command, seed, folder / f"{name}_answers"), 0)
    pairs = [row for row in read(folder / "judge" / "rows.jsonl") if row["chosen"] != row["rejected"]]
    kept = {name: len(read(folder / name / "preference.jsonl")) for name in ("judge", "judge_sl")}
    seconds = time.perf_counter() - started
    return {
        "seed": seed,
        "stages": stages,
        "rounds": rounds,
        "judge": of_judge(pairs),
        "pairs": kept,
        "seconds": seconds,
    }


def summary(runs: list[dict]) -> dict:
    """Means and standard deviations of what runs have at the same place; of one run what it has."""
    if isinstance(runs[0], dict):
        return {key: summary([one[key] for one in runs]) for key in runs[0]}
    return {"mean": float(np.mean(runs)), "std": float(np.std(runs, ddof=1))} if len(runs) > 1 else runs[0]


def main(args: Args):
    runs = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(pipeline(seed, Path(folder)))
    result = {
        "command": "python benchmarks/constitution.py",
        "commands": COMMANDS,
        "seeds": list(args.seeds),
    }
    result |= summary([{key: one[key] for key in ("stages", "rounds", "judge", "pairs")} for one in runs])
    for when, name in (("before", FIRST), ("after", "revisions")):  # what the README shows
        values = result["stages"][name].items()
        result[when] = {key: x if isinstance(x, dict) else {"mean": x, "std": 0.0} for key, x in values}
    result["runs"] = runs
    result["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    result["versions"] = {package: version(package) for package in ("torch", "transformers")}
    path = ROOT / "benchmarks" / "results" / "constitutional_ai.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for name, values in result["stages"].items():
        print(name, values)


if __name__ == "__main__":
    main(tyro.cli(Args))
