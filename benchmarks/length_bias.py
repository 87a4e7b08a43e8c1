"""GRPO against Dr. GRPO: how long right and wrong answers become, in runs of grpo.py and in an exact case.

    python benchmarks/length_bias.py              # half an hour on one core; goes on where it was stopped

GRPO divides a completion's loss by its length. What an answer gets out of it is A / length: if it is right,
the shorter the more; if it is wrong, the longer the less it loses (arXiv:2503.20783, section 3.1). The exact
case is a policy whose first token decides right or wrong, and that then has nothing to decide but when to
stop: every length is listed, and the expected gradient followed. Writes benchmarks/results/length_bias.json
and docs/img/length_bias.png.
"""

import json
import math
import os
import platform
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

ROOT = Path(__file__).resolve().parent.parent
METHODS = {  # flags of grpo.py: --loss-agg, --scale-rewards
    "GRPO": ("seq_mean_token_mean", "group"),
    "Dr. GRPO": ("seq_mean_token_sum_norm", "none"),
}
KEYS = {"right": "share of right answers", "tokens_right": "tokens of right answers"}
KEYS |= {"tokens_wrong": "tokens of wrong answers"}


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds, one run of each method each, with the same prompts."""
    flags: str = "--max-steps 80 --batch-size 64 --log-every 1000 --save-every 0"
    """More flags for grpo.py, the same for both."""
    folder: Path = ROOT / "runs" / "length_bias"
    """What the runs leave; a run that is there is not made again."""


def recorded(completion_ids, **columns):
    """The reward of grpo.py's default; appends lengths and rewards of every call to the file $LENGTHS."""
    columns |= {"completion_ids": completion_ids}
    rewards = runpy.run_path(str(ROOT / "rewards.py"))["math_answer"](**columns)
    with open(os.environ["LENGTHS"], "a") as file:
        file.write(json.dumps({"lengths": list(map(len, completion_ids)), "rewards": rewards}) + "\n")
    return rewards


def of_step(lengths: list[int], rewards: list[float]) -> dict:
    """Share of right answers, mean tokens of right and of wrong ones; NaN where there are none."""
    lengths, right = np.array(lengths), np.array(rewards) == 1
    mean = lambda part: round(float(part.mean()), 4) if len(part) else math.nan
    return dict(zip(KEYS, (mean(right), mean(lengths[right]), mean(lengths[~right]))))


def run(method: str, seed: int, args: Args) -> dict:
    """A list over the steps of a run for each of KEYS."""
    folder = args.folder / f"{method.replace('. ', '_')}_{seed}"
    lengths = folder.with_suffix(".jsonl")
    if not (folder / "model").exists():
        lengths.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        data = ROOT / "tiny" / "data" / "prompts_train.jsonl"  # by its whole path: nothing is evaluated
        words = [sys.executable, ROOT / "grpo.py", "--dataset", data, "--seed", seed, "--output-dir", folder]
        words += ["--loss-agg", METHODS[method][0], "--scale-rewards", METHODS[method][1]]
        words += ["--reward", f"{__file__}:recorded", *args.flags.split()]
        environment = os.environ | {"LENGTHS": str(lengths)}
        subprocess.run(list(map(str, words)), check=True, env=environment, stdout=subprocess.DEVNULL)
    steps = [of_step(**json.loads(line)) for line in lengths.open()]
    return {key: [step[key] for step in steps] for key in KEYS}


def expected_advantages(grpo, group: int, share: float, scale: str) -> torch.Tensor:
    """E[A] of a wrong and of a right one of `group` answers, (2,), if each is right with chance `share`."""
    totals, others = torch.zeros(2).double(), group - 1
    for k in range(group):  # of the others are right
        chance = math.comb(others, k) * share**k * (1 - share) ** (others - k)
        for own in (0, 1):
            rewards = torch.tensor([[own] + [1] * k + [0] * (others - k)])  # (1, G)
            totals[own] += chance * grpo.group_advantages(rewards, scale)[0, 0].double()
    return totals


def follow(grpo, method: str, steps: int = 300, longest: int = 20, group: int = 8) -> dict:
    """Expected tokens of right and wrong answers while the exact expected gradient is followed.

    stops (2, longest) are the logits with which a wrong, or a right, answer ends behind each token; half of
    the answers are right. A rate of 1; Dr. GRPO's is larger by the constant that it divides by.
    """
    loss_agg, scale = METHODS[method]
    advantages, lengths = expected_advantages(grpo, group, 0.5, scale), torch.arange(1, longest + 1)
    weights = [grpo.token_weights(n[None], loss_agg, longest) for n in lengths]
    weights = torch.cat(weights).double() * (longest if loss_agg == "seq_mean_token_sum_norm" else 1)  # (L,)
    stops, curve = torch.full((2, longest), -2.2).double().requires_grad_(), {"right": [], "wrong": []}
    for _ in range(steps):
        go_on = F.logsigmoid(-stops)  # (2, L)
        end = F.pad(F.logsigmoid(stops)[:, :-1], (0, 1))  # the last token ends it in any case
        logps = go_on.cumsum(1) - go_on + end  # (2, L) of an answer's tokens together
        p = logps.exp().detach()
        for key, tokens in zip(("wrong", "right"), (p * lengths).sum(1).tolist()):
            curve[key].append(round(tokens, 4))
        (slope,) = torch.autograd.grad((advantages[:, None] * p * weights * logps).sum() / 2, stops)
        stops = (stops + slope).detach().requires_grad_()
    return curve


def draw(result: dict, path: Path):
    """Share of right answers, tokens of right and of wrong ones in runs; tokens in the exact case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    for colour, method in zip(("tab:red", "tab:blue"), METHODS):
        for panel, (key, title) in zip(panels, KEYS.items()):
            curves = np.array([one[key] for one in result["runs"][method]])  # (seeds, steps)
            ends = range(10, curves.shape[1] + 1)
            smooth = np.stack([np.nanmean(curves[:, n - 10 : n], 1) for n in ends], 1)
            panel.plot(ends, smooth.T, color=colour, alpha=0.25, linewidth=1)
            panel.plot(ends, smooth.mean(0), color=colour, linewidth=2, label=method)
            panel.set_title(f"{title}, means of 10 steps", fontsize=9)
        for style, (key, curve) in zip(("-", "--"), result["exact"][method].items()):
            panels[3].plot(curve, style, color=colour, linewidth=2, label=f"{method}, {key}")
    panels[3].set_title("the exact case: expected tokens", fontsize=9)
    for panel in panels:
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    panels[3].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(args: Args):
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from learning import cpu_name

    import grpo

    args.folder.mkdir(parents=True, exist_ok=True)
    result = {"command": "python benchmarks/length_bias.py", "flags": args.flags, "methods": METHODS}
    result["seeds"] = list(args.seeds)
    result |= {"summary": {}, "exact_summary": {}, "runs": {}, "exact": {}}
    for method in METHODS:
        curve = result["exact"][method] = follow(grpo, method)
        ends = {
            f"{key}, {when}": line[n]
            for when, n in (("before", 0), ("after", -1))
            for key, line in curve.items()
        }
        result["exact_summary"][method] = ends
        runs = result["runs"][method] = [run(method, seed, args) for seed in args.seeds]
        result["summary"][method] = {}
        for key in KEYS:
            for when, part in (("first 10 steps", slice(0, 10)), ("last 10 steps", slice(-10, None))):
                means = [np.nanmean(one[key][part]) for one in runs]  # (seeds,)
                spread = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
                result["summary"][method][f"{key}, {when}"] = {"mean": float(np.mean(means)), "std": spread}
        print(method, ends, result["summary"][method], flush=True)
    result["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    result["versions"] = {package: version(package) for package in ("torch", "transformers")}
    path = ROOT / "benchmarks" / "results" / "length_bias.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, ROOT / "docs" / "img" / "length_bias.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
