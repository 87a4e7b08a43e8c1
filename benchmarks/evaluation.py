"""What evaluate.py says of tiny/base and tiny/sft, by default: the numbers of docs/evaluate.md.

    python benchmarks/evaluation.py          # two minutes of one core

Writes benchmarks/results/evaluation.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from learning import ROOT, cpu_name

SHOWN = (
    "eval/reward",
    "eval/greedy_reward",
    "eval/pass@8",
    "eval/maj@8",
    "eval/strict_accuracy",
    "eval/format_only",
    "eval/win_rate",
    "eval/length_controlled_win_rate",
    "eval/ece",
    "kl_sequence",
    "kl",
    "entropy",
    "eval/forgetting_perplexity",
    "eval/forgetting_bits_per_byte",
    "sycophancy/flip_rate",
    "sycophancy/hint_given_back",
    "completions/mean_length",
    "completions/clipped_ratio",
    "completions/distinct_2",
    "completions/repeated_4",
)


def main():
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "evaluate.py", "--output-dir", f"{folder}/run"]
        subprocess.run(command, cwd=ROOT, check=True)
        report = json.loads((Path(folder) / "run" / "report.json").read_text())
    models = report["models"].items()
    result = {
        "command": "python evaluate.py",
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "models": {name: {key: own[key] for key in SHOWN if key in own} for name, own in models},
        "intervals": {name: {k: x for k, x in own.items() if isinstance(x, list)} for name, own in models},
        "contaminated": {"share of prompts": report["contamination"]["share"]},
    }
    path = ROOT / "benchmarks" / "results" / "evaluation.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
