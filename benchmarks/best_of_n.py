"""What Best-of-N of tiny/sft is worth, by three choosers: a verifier, a reward model, a biased reward model.

    python benchmarks/best_of_n.py                      # 3 minutes on 2 cores

Every run samples N = 16 answers to each held-out prompt, over three seeds; the verifier says what the chosen
answers are worth. Writes benchmarks/results/best_of_n.json: means over the seeds, a line for each k.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import tyro
from learning import ROOT, cpu_name

CHOOSERS = {
    "verifier": ["rewards.py:math_answer"],
    "reward_model": ["tiny/reward"],
    "biased_reward_model": ["tiny/reward_biased"],
}


@dataclass
class Args:
    size: int = 16
    """N, the samples of each prompt."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the sampling, a run each."""


def table_of(reward: list[str], seed: int, size: int) -> list[dict]:
    """best_of_n.json of a run: a line for each k, means over the prompts."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--num-rounds", 0, "--eval-samples", size, "--seed", seed, "--output-dir", f"{folder}/run"]
        flags += ["--reward", *reward, "--eval-reward", "rewards.py:math_answer"]
        command = [sys.executable, ROOT / "rejection_sampling.py", *map(str, flags)]
        subprocess.run(command, check=True, cwd=ROOT)
        return json.loads(Path(folder, "run", "best_of_n.json").read_text())


def main(args: Args):
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    result = {"benchmark": "best_of_n", "command": "python benchmarks/best_of_n.py", "machine": machine}
    result["versions"] = {"torch": version("torch"), "transformers": version("transformers")}
    for name, reward in CHOOSERS.items():
        tables = [table_of(reward, seed, args.size) for seed in args.seeds]
        result[name] = [{key: mean(x[key] for x in lines) for key in lines[0]} for lines in zip(*tables)]
    path = ROOT / "benchmarks" / "results" / "best_of_n.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Args))
