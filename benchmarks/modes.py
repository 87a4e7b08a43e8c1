"""Mode seeking and mode covering: one bump fitted to two by each divergence of distill.py.

    python benchmarks/modes.py                    # seconds

The teacher is a categorical distribution over 41 places with two bumps, the student a single bump of some
mean and width, too simple for both. Of all students on a grid the one of least divergence is drawn. Writes
benchmarks/results/modes.json and docs/img/modes.png.
"""

import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import distill  # noqa: E402

DIVERGENCES = {
    "forward_kl": distill.forward_kl,
    "jsd_0.1": partial(distill.jsd, beta=0.1),
    "jsd_0.5": partial(distill.jsd, beta=0.5),
    "jsd_0.9": partial(distill.jsd, beta=0.9),
    "reverse_kl": distill.reverse_kl,
}
PLACES = torch.arange(41, dtype=torch.float64) - 20


@dataclass
class Args:
    distance: float = 8.0
    """Places from the middle to each bump of the teacher."""
    width: float = 2.0
    """Standard deviation of its bumps."""
    share: float = 0.6
    """Mass of its left bump."""


def bump(mean, width) -> torch.Tensor:
    """Log-probs over the places of a bump, means and widths (n, 1) or numbers -> (n, 41) or (41,)."""
    return (-((PLACES - mean) ** 2) / (2 * width**2)).log_softmax(-1)


def draw(result: dict, path: Path):
    """The teacher, and the best student of each divergence."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(DIVERGENCES), figsize=(13, 2.6), sharey=True, layout="constrained")
    for panel, (name, student) in zip(panels, result["students"].items(), strict=True):
        panel.bar(PLACES, result["teacher"], color="lightgrey", label="teacher")
        panel.plot(PLACES, student["probabilities"], color="tab:blue", label="student")
        panel.set_title(name, fontsize=10)
    panels[0].legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(args: Args):
    left, right = bump(-args.distance, args.width), bump(args.distance, args.width)
    teacher = torch.logaddexp(left + math.log(args.share), right + math.log1p(-args.share))  # (41,)
    grid = torch.meshgrid(PLACES[5:36], torch.arange(1, 60).double() / 4, indexing="ij")
    means, widths = (x.reshape(-1, 1) for x in grid)  # (n, 1) each
    students, result = bump(means, widths), {"teacher": teacher.exp().tolist(), "students": {}}
    near = (PLACES + args.distance).abs() <= 2 * args.width  # the left bump
    for name, divergence in DIVERGENCES.items():
        values = divergence(students, teacher.expand_as(students))  # (n,)
        best = values.argmin()
        result["students"][name] = {
            "mean": means[best].item(),
            "width": widths[best].item(),
            "divergence": values[best].item(),
            "mass_on_left_bump": students[best].exp()[near].sum().item(),
            "probabilities": students[best].exp().tolist(),
        }
        shown = {key: value for key, value in result["students"][name].items() if key != "probabilities"}
        print(name, "  ".join(f"{key} {value:.3f}" for key, value in shown.items()))
    path = ROOT / "benchmarks" / "results" / "modes.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, ROOT / "docs" / "img" / "modes.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
