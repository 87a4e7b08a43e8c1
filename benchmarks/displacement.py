"""Likelihood displacement: what becomes of the chosen answers when pairs are nearly identical.

    python benchmarks/displacement.py

trains dpo.py on those pairs of tiny/ whose answers differ in the last result alone (`kind` wrong_result),
with DPO's loss, with DPO-Positive's and with DPO and an NLL term, and follows the log-prob of the chosen
answers (`logps/chosen_drift`). Writes benchmarks/results/displacement.json and docs/img/displacement.png.
"""

import json
import os
import platform
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro
from learning import ROOT, cpu_name, run

LOSSES = {
    "dpo": "--loss sigmoid",
    "dpop": "--loss dpop",
    "dpo_nll": "--loss sigmoid --sft-coef 1",
}
KEYS = ("logps/chosen_drift", "logps/rejected", "rewards/margins")


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds, one run of each loss each."""
    flags: str = "--beta 0.1 --eval-every 0 --num-epochs 3 --learning-rate 2e-4"
    """More flags for dpo.py, the same for every loss."""


def draw(result: dict, path: Path):
    """One line a seed and their mean, for each loss: the drift of the chosen log-probs, and the margins."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "logps/chosen_drift": "chosen answers: log-prob since step 0",
        "rewards/margins": "reward margin",
    }
    figure, panels = plt.subplots(1, len(titles), figsize=(9, 3.2), layout="constrained")
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for colour, (name, curves) in zip(("tab:red", "tab:blue", "tab:green"), result["curves"].items()):
            values = np.array(curves[key])  # (seeds, steps)
            steps = np.arange(1, values.shape[1] + 1)
            panel.plot(steps, values.T, color=colour, alpha=0.25, linewidth=1)
            panel.plot(steps, values.mean(0), color=colour, linewidth=2, label=result["losses"][name])
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set(title=title, xlabel="optimizer step")
        panel.grid(alpha=0.3)
    panels[0].legend(loc="lower left", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(args: Args):
    curves, after, counts = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "eval"):
            lines = (ROOT / f"tiny/data/preference_{split}.jsonl").read_text(encoding="utf-8").splitlines()
            alike = [line for line in lines if json.loads(line)["kind"] == "wrong_result"]
            counts[split] = len(alike)
            Path(folder, f"{split}.jsonl").write_text("\n".join(alike), encoding="utf-8")
        files = f"--dataset {folder}/train.jsonl --eval-dataset {folder}/eval.jsonl"
        for name, loss in LOSSES.items():
            runs = [run("dpo.py", seed, f"{files} {loss} {args.flags}".split())[0] for seed in args.seeds]
            curves[name] = {key: [[line[key] for line in lines[1:]] for lines in runs] for key in KEYS}
            last = {
                key: np.array([line[key] for lines in runs for line in lines[-1:]]) for key in runs[0][-1]
            }
            wanted = ("logps/chosen_drift", "eval/accuracy", "eval/chosen_log_ratio", "eval/reward")
            after[name] = {key: {"mean": last[key].mean(), "std": last[key].std(ddof=1)} for key in wanted}
            shown = "  ".join(f"{key} {v['mean']:.3f} +- {v['std']:.3f}" for key, v in after[name].items())
            print(f"{name}: {shown}", flush=True)
    result = {
        "command": f"python dpo.py --dataset <pairs of kind wrong_result> {args.flags}",
        "losses": LOSSES,
        "pairs": counts,
        "seeds": list(args.seeds),
        "after": after,
        "curves": curves,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }
    path = ROOT / "benchmarks" / "results" / "displacement.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, ROOT / "docs" / "img" / "displacement.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
