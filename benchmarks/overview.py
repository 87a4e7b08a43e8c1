"""One figure of what every script learns on tiny/: small multiples from benchmarks/results/*.json.

python benchmarks/overview.py          # seconds; draws docs/img/overview.png
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
PANELS = {  # result: title, metric
    "sft": ("sft.py", "eval/accuracy"),
    "dpo": ("dpo.py", "eval/reward"),
    "ipo": ("--algorithm ipo", "eval/reward"),
    "kto": ("--algorithm kto", "eval/reward"),
    "simpo": ("--algorithm simpo", "eval/reward"),
    "orpo": ("--algorithm orpo", "eval/reward"),
    "reward_model": ("reward_model.py", "eval/accuracy"),
    "process_reward_model": ("process_reward_model.py", "eval/first_error"),
    "ppo_rlhf": ("ppo_rlhf.py", "eval/reward"),
    "grpo": ("grpo.py", "eval/reward"),
    "dapo": ("dapo.py", "eval/reward"),
    "rloo": ("--algorithm rloo", "eval/reward"),
    "remax": ("--algorithm remax", "eval/reward"),
    "distill_token_kd_forward": ("distill.py", "eval/greedy_accuracy"),
    "distill_seq_kd": ("--mode seq_kd", "eval/greedy_accuracy"),
    "distill_on_policy": ("--mode on_policy", "eval/greedy_accuracy"),
}


@dataclass
class Args:
    output: Path = ROOT / "docs" / "img" / "overview.png"
    """The picture."""


def main(args: Args):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(4, 4, figsize=(11, 8.6), sharey=True, layout="constrained")
    for panel, (name, (title, metric)) in zip(panels.flat, PANELS.items(), strict=True):
        result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        curve = result["curves"][metric]
        values = np.array(curve["values"])  # (seeds, evaluations)
        panel.plot(curve["steps"], values.T, color="tab:blue", alpha=0.35, linewidth=1)
        panel.plot(curve["steps"], values.mean(0), color="tab:blue", linewidth=2, marker="o", markersize=3)
        panel.set_title(title, fontsize=9)
        panel.text(0.97, 0.05, metric, transform=panel.transAxes, ha="right", fontsize=8, color="grey")
        panel.set_ylim(0, 1.02)
        panel.grid(alpha=0.3)
    figure.suptitle("The default runs on tiny/: 3 seeds and their mean, by optimizer step", fontsize=10)
    figure.savefig(args.output, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args))
