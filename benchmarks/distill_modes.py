"""The modes of distill.py at equal cost, in one figure: from benchmarks/results/distill_*.json.

    python benchmarks/distill_modes.py          # seconds; draws docs/img/distill_modes.png

Every run trains on 32 sequences in each of its optimizer steps, about 400 but for one of 800 (`RUNS` has the
flags with which benchmarks/learning.py made the results). The last panel has what each cost in all, sampling
included.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
RUNS = {  # result: label; flags of learning.py --flags
    "distill_token_kd_forward": "token_kd, forward KL",  # (none)
    "distill_token_kd_long": "token_kd, 800 steps",  # --max-steps 800
    "distill_token_kd_reverse": "token_kd, reverse KL",  # --divergence reverse_kl
    "distill_on_policy": "on_policy, half data",  # --mode on_policy
    # --mode seq_kd --reward rewards.py:math_answer --cache-top-k 768
    "distill_seq_kd": "seq_kd, right answers",
}
PANELS = {
    "eval/accuracy": "right answers, sampled",
    "eval/greedy_accuracy": "right answers, greedy",
    "eval/kl_forward": "KL(teacher || student)",
}


@dataclass
class Args:
    output: Path = ROOT / "docs" / "img" / "distill_modes.png"
    """The picture."""


def main(args: Args):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = {name: json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in RUNS}
    figure, panels = plt.subplots(1, len(PANELS) + 1, figsize=(15, 3.4), layout="constrained")
    for panel, (metric, title) in zip(panels, PANELS.items(), strict=False):
        for (name, label), colour in zip(RUNS.items(), plt.rcParams["axes.prop_cycle"].by_key()["color"]):
            curve = results[name]["curves"][metric]
            values = np.array(curve["values"])  # (seeds, evaluations)
            panel.plot(curve["steps"], values.T, color=colour, alpha=0.25, linewidth=1)
            panel.plot(curve["steps"], values.mean(0), color=colour, linewidth=2, label=label)
        if metric != "eval/kl_forward":
            of_teacher = results["distill_token_kd_forward"]["after"][
                metric.replace("eval/", "eval/teacher_")
            ]["mean"]
            panel.axhline(of_teacher, color="grey", linestyle="--", linewidth=1, label="teacher")
        panel.set(title=title, xlabel="optimizer step", yscale="log" if "kl" in metric else "linear")
        panel.grid(alpha=0.3)
    for (name, label), colour in zip(RUNS.items(), plt.rcParams["axes.prop_cycle"].by_key()["color"]):
        result = results[name]
        right = [seed[-1] for seed in result["curves"]["eval/greedy_accuracy"]["values"]]
        panels[-1].plot(result["cpu_seconds"]["each"], right, "o", color=colour, markersize=5, label=label)
    panels[-1].set(title="right answers, greedy, at the end", xlabel="CPU seconds of the run", xlim=(0, None))
    panels[-1].grid(alpha=0.3)
    panels[0].legend(fontsize=7, frameon=False)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=105)


if __name__ == "__main__":
    main(tyro.cli(Args))
