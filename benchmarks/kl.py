"""What k1, k2 and k3 estimate, and what their gradients are, as the policy leaves the reference: exactly.

    python benchmarks/kl.py                       # seconds

Policies small enough to enumerate: one draw of 8 tokens, and sequences of 3 draws of 4 tokens with logits of
their own behind every prefix. The policy's logits are the reference's plus `drift` times normal numbers. Of
every estimator of common.py: bias and standard deviation of its value, and of its gradient, as a loss and as
a detached reward. Writes benchmarks/results/kl.json and docs/img/kl.png.
"""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import KL  # noqa: E402

SHAPES = {"one token": (1, 8), "3 tokens": (3, 4)}  # tokens of a sequence, vocabulary
DRIFTS = (0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
TITLES = {
    "value": "value, beside KL(pi || ref)",
    "loss": "gradient as a loss, beside that of\nevery token's own KL(pi || ref)",
    "reward": "gradient as a reward, beside that of\nthe whole sequence's KL(pi || ref)",
}


@dataclass
class Args:
    policies: int = 25
    """Random pairs of a reference and a direction; figures are medians over them."""
    seed: int = 0
    """Of these pairs."""


def token_logprobs(logits, sequences) -> torch.Tensor:
    """Log-probs of the tokens of sequences, both (X, T), from logits (S, V), a line for every prefix."""
    size, prefixes, lines = logits.shape[1], torch.zeros_like(sequences[:, 0]), []
    for t in range(sequences.shape[1]):
        lines.append(sum(size**i for i in range(t)) + prefixes)
        prefixes = prefixes * size + sequences[:, t]
    return logits.log_softmax(-1)[torch.stack(lines, 1), sequences]


def targets(logits, ref_logits, sequences) -> dict:
    """Four KLs and their gradients (n,): of sequences or, with what stands before held fixed, of tokens."""
    logps, ref_logps = (token_logprobs(x, sequences) for x in (logits, ref_logits))  # (X, T) each
    ratio, found = logps - ref_logps, {}
    before = (logps.cumsum(1) - logps).detach()  # (X, T): log-prob of what stands before a token
    repeats = logits.shape[1] ** torch.arange(logps.shape[1] - 1.0, -1, -1)  # (T,): sequences that begin so
    for name, own, sign in (("reverse KL", logps, 1), ("forward KL", ref_logps, -1)):
        found[f"{name}, sequence"] = (own.sum(1).exp() * sign * ratio.sum(1)).sum()
        found[f"{name}, per token"] = ((before + own).exp() * sign * ratio / repeats).sum()
    grad = lambda x: torch.autograd.grad(x, logits, retain_graph=True)[0].flatten()
    return {name: (x.item(), grad(x)) for name, x in found.items()}


def moments(p, x, wanted) -> dict:
    """Distance of the mean of x (X, n) under p (X,) from `wanted` (n,), and its deviation, over |wanted|."""
    mean = p @ x  # (n,)
    noise = (p @ (x - mean).square()).sum().sqrt()
    return {"bias": (mean - wanted).norm() / wanted.norm(), "noise": noise / wanted.norm()}


def examine(logits, ref_logits, length: int) -> dict:
    """Of every estimator: relative bias and noise of value and gradients, distance to each target."""
    logits = logits.clone().requires_grad_()
    sequences = torch.tensor([*itertools.product(range(logits.shape[1]), repeat=length)])  # (X, T)
    logps, ref_logps = (token_logprobs(x, sequences).detach() for x in (logits, ref_logits))  # (X, T) each
    slopes = torch.autograd.functional.jacobian(lambda x: token_logprobs(x, sequences), logits)
    slopes, p = slopes.flatten(2), logps.sum(1).exp()  # (X, T, n), (X,)
    found = targets(logits, ref_logits, sequences)
    kl, whole = found["reverse KL, sequence"]
    result = {"kl": kl}
    for name, estimator in KL.items():
        at = logps.clone().requires_grad_()
        values = estimator(at, ref_logps)  # (X, T)
        rates = torch.autograd.grad(values.sum(), at)[0]  # (X, T): d k / d log pi
        samples = {"value": (values.detach().sum(1, keepdim=True), torch.tensor([kl]))}  # (X, 1)
        samples["loss"] = (rates[:, :, None] * slopes).sum(1), found["reverse KL, per token"][1]  # (X, n)
        samples["reward"] = samples["value"][0] * slopes.sum(1), whole  # (X, n)
        result[name] = {}
        for what, (x, wanted) in samples.items():
            result[name] |= {f"{what} {part}": y.item() for part, y in moments(p, x, wanted).items()}
        for what in ("loss", "reward"):
            to = {target: moments(p, samples[what][0], slope)["bias"] for target, (_, slope) in found.items()}
            result[name] |= {f"{what}: {target}": distance.item() for target, distance in to.items()}
    return result


def draw(shapes: dict, path: Path):
    """Bias above noise; value, gradient as a loss, gradient as a reward; a colour an estimator."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(12, 6), sharex=True, layout="constrained")
    for (column, (key, title)), (row, part) in itertools.product(
        enumerate(TITLES.items()), enumerate(("bias", "noise"))
    ):
        panel = panels[row, column]
        for style, (shape, found) in zip(("-", "--"), shapes.items()):
            for colour, name in zip(("tab:blue", "tab:orange", "tab:green"), KL):
                drawn = [max(line[name][f"{key} {part}"], 1e-3) for line in found["by_drift"]]
                panel.plot(found["kl_per_token"], drawn, style, color=colour, label=f"{name}, {shape}")
        panel.set(xscale="log", yscale="log", title="" if row else title)
        panel.grid(alpha=0.3)
    figure.supxlabel("KL(pi || ref), nats per token", fontsize=10)
    panels[0, 0].set_ylabel("bias / size of the target\n(0 is drawn at 0.001)")
    panels[1, 0].set_ylabel("deviation of one sample\n/ size of the target")
    panels[1, 0].legend(fontsize=8, ncol=2)
    figure.savefig(path, dpi=120)


def main(args: Args):
    torch.set_default_dtype(torch.float64)
    result = {"command": "python benchmarks/kl.py", "drifts": DRIFTS, "shapes": {}}
    median = lambda numbers: round(torch.tensor([*numbers]).median().item(), 6)
    for shape, (length, size) in SHAPES.items():
        lines = sum(size**t for t in range(length))
        generator = torch.Generator().manual_seed(args.seed)
        pairs = torch.randn(args.policies, 2, lines, size, generator=generator)
        by_drift, kls = [], []
        for drift in DRIFTS:
            found = [examine(ref + drift * direction, ref, length) for ref, direction in pairs]
            kls.append(median(x["kl"] / length for x in found))
            by_drift.append({n: {key: median(x[n][key] for x in found) for key in found[0][n]} for n in KL})
        result["shapes"][shape] = {"kl_per_token": kls, "by_drift": by_drift}
    middle = by_drift[DRIFTS.index(1.0)]  # of the sequences: the tables of docs/kl.md
    for what in TITLES:
        keys = [
            key for key in middle["k1"] if key.startswith(what) and key not in ("loss bias", "reward bias")
        ]
        result[what] = {
            name: {key.split(": ")[-1]: line[key] for key in keys} for name, line in middle.items()
        }
        print(what, json.dumps(result[what], indent=1))
    path = ROOT / "benchmarks" / "results" / "kl.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result["shapes"], ROOT / "docs" / "img" / "kl.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
