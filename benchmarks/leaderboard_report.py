"""What the runs of leaderboard.py amount to: means, ranks within noise, the table and the figure.

python benchmarks/leaderboard_report.py          # seconds; draws the figure from leaderboard.json
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

import tyro

ROOT = Path(__file__).resolve().parent.parent
T_95 = 2.78  # Student's t at 5 %, two-sided, for 4 degrees of freedom: two methods of three runs each


@dataclass
class Args:
    result: Path = ROOT / "benchmarks" / "results" / "leaderboard.json"
    """The runs."""
    output: Path = ROOT / "docs" / "img" / "leaderboard.png"
    """The picture."""


def apart(a: list[float], b: list[float], floor: float) -> bool:
    """Whether means differ beyond noise: Welch's t above T_95, with deviations of at least `floor`.

    Three runs may agree by chance; the floor is the median deviation of all methods.
    """
    error = sum(max(stdev(x), floor) ** 2 / len(x) for x in (a, b)) ** 0.5
    return abs(mean(a) - mean(b)) > T_95 * error


def noise_floor(accuracies: dict[str, list[float]]) -> float:
    return median(stdev(x) for x in accuracies.values()) if accuracies else 0.0


def ranks(accuracies: dict[str, list[float]]) -> dict[str, tuple[int, int]]:
    """The best and the worst place that each method may have, given what is apart from it."""
    floor, found = noise_floor(accuracies), {}
    for name, x in accuracies.items():
        others = [mean(y) for y in accuracies.values() if apart(x, y, floor)]
        above = sum(y > mean(x) for y in others)
        found[name] = (1 + above, len(accuracies) - (len(others) - above))
    return found


def level_with(accuracies: dict[str, list[float]]) -> dict[str, list[str]]:
    """Of each method those with a lower mean that it is not apart from, the best first."""
    floor, best_first = noise_floor(accuracies), sorted(accuracies, key=lambda name: -mean(accuracies[name]))
    return {
        name: [y for y in best_first[n + 1 :] if not apart(accuracies[name], accuracies[y], floor)]
        for n, name in enumerate(best_first)
    }


def summarise(runs: dict, chosen: dict[str, float], labels: dict[str, str], seeds) -> dict:
    """Mean and deviation of each method's measurements at its chosen learning rate, the best first."""
    summary, accuracies = {}, {}
    for name, rate in chosen.items():
        done = [runs[key] for key in (f"{name} {rate:g} {seed}" for seed in seeds) if key in runs]
        if not done:
            continue
        summary[name] = {"label": labels[name], "learning_rate": rate, "num_runs": len(done)}
        for key in (key for key, value in done[0].items() if isinstance(value, int | float)):
            values = [one.get(key, float("nan")) for one in done]
            spread = stdev(values) if len(values) > 1 else 0.0
            summary[name][key] = {"mean": mean(values), "std": spread}
        if len(done) > 1:
            accuracies[name] = [one["accuracy"] for one in done]
    for name, places in ranks(accuracies).items():
        summary[name]["rank"] = list(places)
    for name, level in level_with(accuracies).items():
        summary[name]["level_with"] = [labels[other] for other in level]
    return dict(sorted(summary.items(), key=lambda item: -item[1]["accuracy"]["mean"]))


def draw(result: dict, path: Path):
    """A panel for each method: held-out accuracy over the share of the budget, its seeds and their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summary = result["summary"]
    count = -(-len(summary) // 4)
    figure, panels = plt.subplots(
        count, 4, figsize=(11, 1.75 * count), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(summary) :]:
        panel.axis("off")
    for panel, (name, row) in zip(panels.flat, summary.items(), strict=False):
        prefix = f"{name} {row['learning_rate']:g} "
        runs = [run for key, run in result["runs"].items() if key.startswith(prefix) and run["curve"]]
        curves = [list(zip(*run["curve"], strict=True)) for run in runs]  # shares and accuracies
        for x, y in curves:
            panel.plot(x, y, color="tab:blue", alpha=0.35, linewidth=1)
        x, y = ([mean(some) for some in zip(*(curve[k] for curve in curves), strict=False)] for k in (0, 1))
        panel.plot(x, y, color="tab:blue", linewidth=2, marker="o", markersize=3)
        panel.axhline(y[0], color="grey", linewidth=0.8, linestyle=":")
        panel.set_title(f"{row['label']}: {row['accuracy']['mean']:.2f}", fontsize=10)
        panel.grid(alpha=0.3)
    figure.supxlabel("share of the budget of tokens", fontsize=10)
    figure.supylabel("sampled answers that are right", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: Args):
    draw(json.loads(args.result.read_text()), args.output)


if __name__ == "__main__":
    main(tyro.cli(Args))
