"""Three ways not to forget, beside none: replay of old text, a LoRA, and EWC. sft.py on tiny/base.

    python benchmarks/forgetting.py               # an hour on one core, for what has not been run yet

What is learnt is accuracy on held-out questions, what is lost the perplexity of stories as the base model
read them. Writes benchmarks/results/forgetting.json after every run, and docs/img/forgetting.png: a point a
setting, the mean of its seeds, with a bar of one standard deviation.
"""

import json
import os
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import tyro
from learning import ROOT, cpu_name, run

REPLAY = (
    "--dataset tiny/data/sft_train.jsonl tiny/data/text_train.jsonl --eval-dataset tiny/data/sft_eval.jsonl "
)
REPLAY += "--forgetting-dataset tiny/data/text_eval.jsonl --max-steps 384 --dataset-weights"
EWC = "--ewc-dataset tiny/data/text_train.jsonl --ewc-coef"
WAYS = {  # way: flags by setting
    "all weights": {"": ""},
    "replay": {share: f"{REPLAY} {1 - float(share):g} {share}" for share in ("0.02", "0.05", "0.2")},
    "LoRA": {rate: f"--lora-rank 16 --learning-rate {rate}" for rate in ("1e-3", "5e-3")},
    "EWC": {coef: f"{EWC} {coef}" for coef in ("0.1", "1", "10")},
}
METRICS = ("eval/accuracy", "eval/loss", "eval/forgetting_perplexity")
PATH = ROOT / "benchmarks" / "results" / "forgetting.json"


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds, a run each."""


def draw(runs: list[dict]):
    """Accuracy over perplexity, a colour a way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for way in WAYS:
        points = []
        for setting in WAYS[way]:
            ends = [one for one in runs if (one["way"], one["setting"]) == (way, setting)]
            if ends:
                values = np.array([[one["eval/forgetting_perplexity"], one["eval/accuracy"]] for one in ends])
                points.append((*values.mean(0), *values.std(0, ddof=min(1, len(ends) - 1)), setting))
        if points:
            x, y, dx, dy, settings = zip(*points)
            axes.errorbar(x, y, dy, dx, fmt="o-", label=way, linewidth=1, capsize=2)
            for n, (at, up, setting) in enumerate(zip(x, y, settings)):
                beside = [(4, 4), (-20, -11), (-20, 4)][n] if way == "replay" else (4, 4)  # they lie close
                axes.annotate(setting, (at, up), xytext=beside, textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="perplexity of old text (1.57 before)", ylabel="sampled answers right")
    axes.set_xlim(left=1.2)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(ROOT / "docs" / "img" / "forgetting.png", dpi=110)


def summarise(runs: list[dict]) -> dict:
    """Of each setting: means over its seeds, and standard deviations."""
    summary = {}
    for way, settings in WAYS.items():
        for setting in settings:
            ends = [one for one in runs if (one["way"], one["setting"]) == (way, setting)]
            values = np.array([[one["eval/accuracy"], one["eval/forgetting_perplexity"]] for one in ends])
            if len(ends):
                (accuracy, perplexity), spread = values.mean(0), values.std(0, ddof=min(1, len(ends) - 1))
                row = {"answers right": accuracy, "std": spread[0], "perplexity of old text": perplexity}
                row |= {"std of it": spread[1], "seeds": len(ends)}
                summary[f"{way} {setting}".strip()] = row
    return summary


def main(args: Args):
    result = json.loads(PATH.read_text()) if PATH.exists() else {"runs": []}
    for seed in args.seeds:
        for way, settings in WAYS.items():
            for setting, flags in settings.items():
                key = {"way": way, "setting": setting, "seed": seed}
                if any(key.items() <= one.items() for one in result["runs"]):
                    continue
                lines, _, cpu_seconds = run("sft.py", seed, ["--eval-every", "0", *flags.split()])
                end = {name: lines[-1][name] for name in METRICS}
                result["runs"].append(key | {"flags": flags, "cpu_seconds": cpu_seconds} | end)
                print(key, end, flush=True)
                result |= {"command": "python benchmarks/forgetting.py"}
                result["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count()}
                result["summary"] = summarise(result["runs"])
                result["versions"] = {name: version(name) for name in ("torch", "transformers", "peft")}
                PATH.with_suffix(".partial").write_text(json.dumps(result, indent=1) + "\n")
                PATH.with_suffix(".partial").rename(PATH)
                draw(result["runs"])


if __name__ == "__main__":
    main(tyro.cli(Args))
