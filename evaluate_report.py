"""How evaluate.py shows its report: a table, plots, a page of HTML. Loaded by path, never imported.

    table(report) -> lines          page(report, samples, folder) -> HTML that needs nothing from outside

A report is what evaluate.py writes to report.json. The page is evaluate.html, filled in.
"""

import base64
import re
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

GROUPS = {  # of the table, in this order: what keys begin with
    "Capability": r"rewards/|eval/(greedy|reward|pass|maj|best|strict|lenient|win|length)",
    "Cost": r"eval/forgetting|kl|num_tokens|tokens_per|step_time",
    "Health": r"completions/|entropy",
    "Honesty": r"eval/(ece|format)|sycophancy/",
}
MORE_IS_BETTER = rf"{GROUPS['Capability']}|sycophancy/(plain|hinted)"
LESS_IS_BETTER = r"eval/(ece|format|forgetting)|sycophancy/(flip|hint_g)|completions/(clipped|repeated)"
STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "axes.grid": True, "grid.alpha": 0.3}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
STYLE |= {"axes.axisbelow": True}


def shown(value: float) -> str:
    """A number as tables have it: 0.577, 44.2, 58,764."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def table_rows(report: dict) -> dict[str, list]:
    """Group -> [(key, cells)]; a cell of each model: number, interval, whether it is clearly the best."""
    models, groups = list(report["models"].values()), {title: [] for title in GROUPS}
    for key in dict.fromkeys(key for own in models for key in own if not key.endswith("/interval")):
        ends = [own.get(f"{key}/interval", [own[key]] * 2) for own in models if key in own]
        best = (max if re.match(MORE_IS_BETTER, key) else min)(own[key] for own in models if key in own)
        cells = [("", "", False)] * len(models)
        for n, own in enumerate(models):
            if key in own:
                interval = own.get(f"{key}/interval", ())
                low, high = interval or [own[key]] * 2
                alone = len(ends) > 1 and sum(low <= end[1] and end[0] <= high for end in ends) == 1
                marked = alone and own[key] == best and re.match(f"{MORE_IS_BETTER}|{LESS_IS_BETTER}", key)
                marked = marked and (interval or key.startswith("eval/forgetting"))  # else it may be noise
                cells[n] = (shown(own[key]), "–".join(map(shown, interval)), bool(marked))
        title = next(title for title, pattern in GROUPS.items() if re.match(pattern, key))
        groups[title].append((key, cells))
    return {title: rows for title, rows in groups.items() if rows}


def table(report: dict) -> list[str]:
    """The lines of the table, at most 120 characters each, three models side by side."""
    names, groups, lines = list(report["models"]), table_rows(report), []
    for start in range(0, len(names), 3):
        some = slice(start, start + 3)
        lines += ["", " " * 33 + "".join(f"{name[-26:]:>28}" for name in names[some])]
        for title, rows in groups.items():
            lines.append(title)
            for key, cells in rows:
                numbers = (f"{number:>13} {interval:<14}" for number, interval, _ in cells[some])
                lines.append(f"  {key:<31}{''.join(numbers)}".rstrip())
    found = report["contamination"]
    if found["files"]:
        files = ", ".join(found["files"])
        lines.append(
            f"{found['share']:.1%} of {found['prompts']:,} prompts share 13 words in a row with {files}"
        )
    return lines


def page(report: dict, samples: list[tuple], folder: Path) -> str:
    """report.html, with `samples`: prompts, each with a row of every model. Plots pass through `folder`."""
    settings = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    text = Path(__file__).with_name("evaluate.html").read_text(encoding="utf-8")
    template = jinja2.Environment(**settings).from_string(text)
    plots, groups = draw_plots(report, folder / "plot.svg"), table_rows(report)
    names = list(report["models"])
    return template.render(
        report=report, groups=groups, plots=plots, samples=samples, names=names, shown=shown
    )


def draw_plots(report: dict, path: Path) -> dict[str, str]:
    """Title -> a plot, as the data URI of an SVG that `path` holds for a moment."""
    models, figures = report["models"], {}
    colors = {name: f"C{n % 10}" for n, name in enumerate(models)}

    def axes_of(title, **settings):
        figures[title] = Figure((5.4, 3.3), layout="constrained")
        return figures[title].add_subplot(**settings)

    def draw_bars(title, names, some=models):
        axes, width = axes_of(title), 0.8 / len(some)
        keys = [key for key in names if any(key in own for own in some.values())]
        for n, (name, own) in enumerate(some.items()):
            known = [(i + (n + 0.5) * width - 0.4, key) for i, key in enumerate(keys) if key in own]
            heights = [own[key] for _, key in known]
            axes.bar([x for x, _ in known], heights, 0.92 * width, color=colors[name], label=name)
            for x, key in known:
                if f"{key}/interval" in own:
                    axes.plot([x, x], own[f"{key}/interval"], color="#333", linewidth=1)
        axes.set_xticks(range(len(keys)), [key.partition("/")[2].replace("_", "\n") for key in keys])
        return axes

    with matplotlib.rc_context(STYLE):
        shares = ("greedy_reward", "reward", "strict_accuracy", "lenient_accuracy", "format_only")
        draw_bars("Reward and accuracy", [f"eval/{name}" for name in shares])
        choice = axes_of("One of k samples: pass@k or the best; majorities dashed", xlabel="k")
        choice.set_xscale("log", base=2)
        sizes = axes_of("Length of answers", xlabel="tokens", ylabel="answers")
        paid = axes_of("What it cost: reward against KL", xlabel="KL from the base, nats an answer (k3)")
        bins = axes_of(
            "Calibration", xlabel="share of the most frequent answer", ylabel="how often it is right"
        )
        bins.plot([0, 1], [0, 1], color="#999", linewidth=1)
        counts = {name: np.repeat(*zip(*report["plots"][name]["lengths"])) for name in models}
        edges = np.histogram_bin_edges(np.concatenate([*counts.values()]), 30)
        for name, own in models.items():
            look = {"color": colors[name], "label": name}
            for what, line in (("pass", ".-"), ("best", ".-"), ("maj", ".--")):
                keys = [key for key in own if re.fullmatch(rf"eval/{what}@\d+", key)]
                if ks := [int(key.partition("@")[2]) for key in keys]:
                    label = None if what == "maj" else name
                    choice.plot(ks, [own[key] for key in keys], line, color=colors[name], label=label)
                    ends = zip(*(own[f"{key}/interval"] for key in keys))
                    choice.fill_between(ks, *ends, color=colors[name], alpha=0.12, linewidth=0)
                    choice.set_xticks(ks, ks)
            sizes.hist(counts[name], edges, histtype="step", linewidth=1.6, **look)
            if "kl_sequence" in own:
                reward = own.get("eval/reward", own.get("eval/greedy_reward", np.nan))
                paid.plot(own["kl_sequence"], reward, "o", **look)
            if reliability := report["plots"][name]["reliability"]:
                _, confidences, right = zip(*reliability)
                bins.plot(confidences, right, ".-", **look)
        if others := {name: own for name, own in models.items() if "eval/win_rate" in own}:
            wins = ["eval/win_rate", "eval/length_controlled_win_rate"]
            draw_bars("Wins over the base", wins, others).axhline(0.5, color="#999", linewidth=1)
        if any("sycophancy/plain_accuracy" in own for own in models.values()):
            hints = ("plain_accuracy", "hinted_accuracy", "flip_rate", "hint_given_back", "hint_by_chance")
            draw_bars("Wrong hints", [f"sycophancy/{name}" for name in hints])
        plots = {}
        for title, figure in figures.items():
            handles, labels = figure.axes[0].get_legend_handles_labels()
            if handles:
                figure.legend(handles, [label[-30:] for label in labels], loc="outside upper left", ncols=2)
                figure.savefig(path)
                plots[title] = f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
                path.unlink()
    return plots
