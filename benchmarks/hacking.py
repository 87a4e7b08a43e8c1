"""Reward hacking, shown and stopped: PPO against a reward model that likes long answers.

    python benchmarks/hacking.py

trains ppo_rlhf.py on tiny/reward_biased, which is right about long answers only, without a KL, with a KL in
the reward, and without one but with a budget, --max-kl. Follows the proxy (what is optimised), the gold
reward (whether the sum is right) and the length. Writes benchmarks/results/hacking.json and
docs/img/hacking.png.
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

import numpy as np
import tyro
from learning import ROOT, cpu_name

GUARDS = {"off": "--kl-coef 0", "kl": "--kl-coef 1", "max_kl": "--kl-coef 0 --max-kl 0.003"}
KEYS = {
    "objective/scores": "proxy: the biased reward model",
    "gold_reward": "gold: share of right answers",
    "completions/mean_length": "tokens of an answer",
    "objective/kl": "KL to the reference, nats per answer",
}


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds, one run of each guard each."""
    flags: str = "--reward tiny/reward_biased --max-steps 16 --eval-every 0 --log-every 1"
    """More flags for ppo_rlhf.py, the same for every guard."""


def run(seed: int, flags: list[str]) -> list[dict]:
    """One run of ppo_rlhf.py -> its lines of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "ppo_rlhf.py"), "--seed", str(seed)]
        command += ["--output-dir", f"{folder}/run", *flags]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
        return [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]


def draw(result: dict, path: Path):
    """A panel a quantity, a colour a guard: one thin line a seed, a thick one for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(KEYS), figsize=(13, 3.2), layout="constrained")
    for panel, (key, title) in zip(panels, KEYS.items(), strict=True):
        for colour, (guard, runs) in zip(("tab:red", "tab:blue", "tab:green"), result["runs"].items()):
            curves = [np.array(one["curves"][key]) for one in runs]
            for curve in curves:  # a budget ends runs at different steps
                panel.plot(np.arange(1, len(curve) + 1), curve, color=colour, alpha=0.25, linewidth=1)
            common = min(map(len, curves))
            mean = np.mean([curve[:common] for curve in curves], 0)
            panel.plot(
                np.arange(1, common + 1), mean, color=colour, linewidth=2, label=result["guards"][guard]
            )
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    panels[2].legend(loc="upper left", fontsize=7)  # where no curve passes
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(args: Args):
    runs, summary = {}, {}
    for guard, flags in GUARDS.items():
        runs[guard] = []
        for seed in args.seeds:
            steps = run(seed, f"{args.flags} {flags}".split())[1:]
            curves = {key: [line[key] for line in steps] for key in KEYS}
            runs[guard].append({"seed": seed, "steps": len(steps), "curves": curves})
        summary[guard] = {}
        for key in KEYS:
            for when, part in (("first", slice(0, 5)), ("last", slice(-5, None))):
                means = [np.mean(one["curves"][key][part]) for one in runs[guard]]  # (seeds,)
                spread = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
                summary[guard].setdefault(key, {})[when] = {"mean": float(np.mean(means)), "std": spread}
        shown = {key: [round(v["mean"], 3) for v in both.values()] for key, both in summary[guard].items()}
        print(f"{guard}: {shown}", flush=True)
    result = {
        "command": f"python ppo_rlhf.py {args.flags}",
        "guards": GUARDS,
        "seeds": list(args.seeds),
        "summary": summary,
        "runs": runs,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }
    path = ROOT / "benchmarks" / "results" / "hacking.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, ROOT / "docs" / "img" / "hacking.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
