"""Run a script's default over several seeds, keep what it measured, and draw the curves.

    python benchmarks/learning.py sft.py --metrics eval/loss eval/accuracy eval/forgetting_perplexity

writes benchmarks/results/<name>.json (every evaluation of every seed, means and standard deviations before
and after, seconds, command, machine, versions) and docs/img/<name>.png. Anything after `--` goes to the
script.
"""

import json
import math
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

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    script: tyro.conf.Positional[str]
    """The script to run, relative to the repository."""
    metrics: tuple[str, ...] = ("eval/loss",)
    """Keys of metrics.jsonl to keep and draw."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds, one run each, one after the other."""
    name: str = ""
    """Name of the result and the picture; by default the script's."""
    flags: str = ""
    """More flags for the script, as one string."""


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def run(script: str, seed: int, flags: list[str]) -> tuple[list[dict], float, float]:
    """One run of the script -> its lines of metrics.jsonl, its seconds and CPU seconds, start-up included.

    What it keeps in a cache, it computes itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / script),
            "--seed",
            str(seed),
            "--output-dir",
            f"{folder}/run",
            *flags,
        ]
        if "    cache_dir: " in (ROOT / script).read_text():
            command += ["--cache-dir", f"{folder}/cache"]
        started, used = time.perf_counter(), os.times()
        subprocess.run(command, check=True, cwd=ROOT)
        seconds, use = time.perf_counter() - started, os.times()
        cpu = use.children_user + use.children_system - used.children_user - used.children_system
        return [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")], seconds, cpu


def draw(result: dict, path: Path):
    """Small multiples: one panel a metric, one line a seed and their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = result["curves"]
    columns = min(4, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(curves) :]:
        panel.axis("off")
    for panel, (key, curve) in zip(panels.flat, curves.items(), strict=False):
        values = np.array(curve["values"])  # (seeds, evaluations)
        panel.plot(curve["steps"], values.T, color="tab:blue", alpha=0.35, linewidth=1)
        panel.plot(curve["steps"], values.mean(0), color="tab:blue", linewidth=2, marker="o", markersize=3)
        panel.set(title=key, xlabel="optimizer step")
        panel.grid(alpha=0.3)
    figure.suptitle(f"{result['command']}   ({len(result['seeds'])} seeds and their mean)", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)  # four panels: 1,600 pixels


def main(args: Args) -> dict:
    name, runs = args.name or Path(args.script).stem, []
    for seed in args.seeds:
        runs.append(run(args.script, seed, args.flags.split()))
    curves, before, after = {}, {}, {}
    for key in args.metrics:
        lines = [[line for line in metrics if key in line] for metrics, *_ in runs]
        values = np.array([[line[key] for line in seed] for seed in lines])  # (seeds, evaluations)
        curves[key] = {"steps": [line["step"] for line in lines[0]], "values": values.tolist()}
        for where, column in (before, values[:, 0]), (after, values[:, -1]):
            where[key] = {"mean": column.mean(), "std": column.std(ddof=1) if len(column) > 1 else 0.0}
    seconds, cpu_seconds = ([one[n] for one in runs] for n in (1, 2))
    result = {
        "command": f"python {args.script} {args.flags}".strip(),
        "seeds": list(args.seeds),
        "seconds": {"each": seconds, "median": float(np.median(seconds)), "max": max(seconds)},
        "cpu_seconds": {"each": cpu_seconds, "median": float(np.median(cpu_seconds))},
        "before": before,
        "after": after,
        "curves": curves,
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            "python": platform.python_version(),
        },
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, ROOT / "docs" / "img" / f"{name}.png")
    for key in args.metrics:
        first, last = (f"{moment[key]['mean']:.4f} +- {moment[key]['std']:.4f}" for moment in (before, after))
        print(f"{key}: {first} -> {last}")
    print(f"seconds per run: {', '.join(f'{s:.0f}' for s in seconds)}; written to {path}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
