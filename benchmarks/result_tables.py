"""The results of benchmarks/results/ as Markdown tables; tests/sync_docs.py puts them into the documentation.

    python benchmarks/result_tables.py sft            # one run over several seeds
    python benchmarks/result_tables.py ipo kto orpo   # several runs, a row each

tests/README.md lists what else can be named.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What the README says of each script's default run: `{result metric}` becomes its mean before -> after, with
# the standard deviation over the seeds, `{result#key}` the number that stands there.
HEADLINES = {
    "sft.py": "sampled answers right {sft eval/accuracy}",
    "dpo.py": "held-out pairs {dpo eval/accuracy}, sampled answers right {dpo eval/reward}",
    "ipo_kto_simpo_orpo.py": "sampled answers right: IPO {ipo eval/reward}, KTO {kto eval/reward}, SimPO "
    "{simpo eval/reward}, ORPO {orpo eval/reward}",
    "reward_model.py": "held-out pairs {reward_model eval/accuracy}",
    "process_reward_model.py": "first errors found {process_reward_model eval/first_error}",
    "ppo_rlhf.py": "sampled answers right {ppo_rlhf eval/reward}, from a reward model alone",
    "grpo.py": "sampled answers right {grpo eval/reward}",
    "dapo.py": "sampled answers right {dapo eval/reward}",
    "rloo_remax.py": "sampled answers right: RLOO {rloo eval/reward}, ReMax {remax eval/reward}",
    "rejection_sampling.py": "sampled answers right {rejection_sampling eval/reward}",
    "online_dpo.py": "sampled answers right: online {online_dpo eval/reward}, iterative "
    "{iterative_dpo eval/reward}, SPIN {spin eval/reward}, Nash-MD {nash_md eval/reward}",
    "constitutional_ai.py": "rude answers {constitutional_ai eval/violations} by revision, right ones "
    "{constitutional_ai eval/reward}",
    "distill.py": "greedy answers right {distill_token_kd_forward eval/greedy_accuracy}, half the layers",
    "evaluate.py": "SFT on `tiny/`: answers right {evaluation#models.tiny/base.eval/reward} → "
    "{evaluation#models.tiny/sft.eval/reward}, perplexity of old text "
    "{evaluation#models.tiny/base.eval/forgetting_perplexity} → "
    "{evaluation#models.tiny/sft.eval/forgetting_perplexity}",
    "merge.py": "half-way from base to SFT: answers right {merge_sweep#points.5.accuracy}, perplexity of old "
    "text {merge_sweep#points.5.perplexity} (SFT: {merge_sweep#points.10.accuracy} and "
    "{merge_sweep#points.10.perplexity})",
}
BRIEF = ("seq_kd", "sft_right", "orpo", "ppo", "rft", "grpo", "dpo")  # of the leaderboard
PEERS = {"reward_vs_trl": "reward_model"}  # results whose script is not named as their first word


def as_table(rows: list[list[str]]) -> str:
    """The Markdown table of `rows`, header first."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(
        f"| {' | '.join(row)} |".replace("| ---", "|---").replace("--- |", "---|") for row in rows
    )


def number(value: float, beside: float = 0.0) -> str:
    """`value` with as many decimals as the larger of it and `beside` deserves."""
    size = max(abs(value), abs(beside))
    if isinstance(value, int) or size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < size < 5e-4 else f"{value:.{1 if size >= 10 else 3}f}"


def cell(value) -> str | None:
    """A number, a mean with its deviation, or a median with its range; None of anything else."""
    if isinstance(value, dict) and {"mean", "std"} <= value.keys():
        return f"{number(value['mean'], value['std'])} ± {number(value['std'], value['mean'])}"
    if isinstance(value, dict) and {"median", "min", "max"} <= value.keys():
        return f"{value['median']:.3g} ({value['min']:.3g} to {value['max']:.3g})"
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def change(result: dict, metric: str) -> str:
    """A metric before -> after training, the latter with its deviation over the seeds."""
    return f"{number(result['before'][metric]['mean'])} → {cell(result['after'][metric])}"


def look_up(values, path: str):
    """What stands at the dotted path; digits index lists, and names may hold dots themselves."""
    if not path:
        return values
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        name, rest = ".".join(parts[:i]), ".".join(parts[i:])
        if isinstance(values, list) and name.isdigit():
            return look_up(values[int(name)], rest)
        if isinstance(values, dict) and name in values:
            return look_up(values[name], rest)
    raise KeyError(path)


def load_result(name: str, root: Path) -> dict:
    return json.loads((root / "benchmarks" / "results" / f"{name}.json").read_text())


def machine(result: dict) -> str:
    """The machine that a result was measured on, in words; "" where it does not depend on one."""
    where = result.get("conditions") or result.get("machine") or {}
    cores = where.get("cores", where.get("threads"))
    return (
        f", {cores} {'core' if cores == 1 else 'cores'} of an {where.get('cpu', 'x86 CPU')}" if cores else ""
    )


def seconds(result: dict) -> str:
    """CPU seconds of a run, start-up included: others on the machine do not change them much."""
    return f"{result['cpu_seconds']['median']:.0f}"


def learning_table(result: dict) -> str:
    """One run over several seeds (benchmarks/learning.py): a row a metric."""
    count = len(result["seeds"])
    head = f"`{result['command']}`, {count} seeds{machine(result)}, float32."
    head += f" {seconds(result)} CPU seconds a run (median)."
    rows = [["", "before", f"after (mean ± std over {count} seeds)"]]
    rows += [[f"`{key}`", cell(result["before"][key]), cell(result["after"][key])] for key in result["after"]]
    return f"{head}\n\n{as_table(rows)}"


def comparison_table(results: list[dict], root: Path) -> str:
    """Several runs: a row a run, with the metrics that all have, or with what the README says of each."""
    shared = [key for key in results[0]["after"] if all(key in result["after"] for result in results)]
    if not shared:
        rows = [["Command", "CPU minutes", "What to expect"]]
        for result in results:
            script = result["command"].split()[1]
            minutes = f"{result['cpu_seconds']['median'] / 60:.1f}"
            rows.append([f"`{result['command']}`", minutes, headline(script, root)])
        return as_table(rows)
    rows = [["Before → after (mean ± std)", *(f"`{key}`" for key in shared), "CPU seconds"]]
    for result in results:
        rows.append([f"`{result['command']}`", *(change(result, key) for key in shared), seconds(result)])
    return f"{len(results[0]['seeds'])} seeds each{machine(results[0])}, float32.\n\n{as_table(rows)}"


def peer_rows(name: str, result: dict, brief: bool) -> list[list[str]]:
    """A row for each contender of a *_vs_*.py: its speed and memory, and ours by its."""
    inverse = "seconds_ratio" in result
    speed, memory = result["seconds_ratio" if inverse else "speed_ratio"], result["memory_ratio"]
    rows = []
    for contender, measured in result["contenders"].items():
        unit = next((key for key in measured if key.endswith("_per_second")), "seconds")
        amount = f"{measured[unit]['median']:,.3g} {unit.replace('_per_second', '/s').replace('_', ' ')}"
        if measured[unit]["median"] >= 1000:
            amount = f"{measured[unit]['median']:,.0f} {unit.replace('_per_second', '/s')}"
        key = next((k for k in speed if k in (contender, contender.removeprefix("mergekit_"))), None)
        ours = key is None or contender.startswith("cleanpost")
        if brief and (ours or contender.startswith("trl") and contender not in ("trl_shipped", "trl_tuned")):
            continue
        speed_text = memory_text = ""
        if not ours:
            low, middle, high = sorted(speed[key][k] for k in ("min", "median", "max"))
            if inverse:
                low, middle, high = 1 / high, 1 / middle, 1 / low
            speed_text = f"{middle:.2f} times ({low:.2f} to {high:.2f})"
            memory_text = f"{memory[key]['median']:.2f} times"
        gigabytes = f"{measured['peak_memory_gb']['median']:.2f} GB"
        row = [measured["label"], amount, speed_text, gigabytes, memory_text]
        rows.append([f"`{PEERS.get(name, name.split('_')[0])}.py`", *row] if brief else row)
    return rows


def peer_table(names: list[str], results: list[dict]) -> str:
    """What a *_vs_*.py measured; of several only the peers as shipped and as tuned."""
    brief = len(results) > 1
    head = ["", "speed or time", "CleanPost is faster", "peak memory", "CleanPost's memory"]
    rows = [["Script", "Compared with", *head[1:]] if brief else head]
    for name, result in zip(names, results, strict=True):
        rows += peer_rows(name, result, brief)
    known = {k: v for result in results for k, v in result["conditions"]["versions"].items()}
    used = ["torch", *(peer for peer in ("trl", "mergekit") if any(peer in name for name in names))]
    versions = ", ".join(f"{package} {known[package]}" for package in used)
    rounds = results[0]["conditions"]["rounds"]
    machines = {}  # in words, and what was measured on each
    for name, result in zip(names, results, strict=True):
        machines.setdefault(machine(result), []).append(f"`{name.partition('_vs_')[0]}`")
    where = "".join(f"{m} ({' '.join(on)})" if len(machines) > 1 else m for m, on in machines.items())
    loads = [f"{result['conditions']['load_average_at_start']:.1f}" for result in results]
    head = f"Medians of {rounds} interleaved rounds (range){where}, {versions}"
    return f"{head}; load at the start {', '.join(loads)}.\n\n{as_table(rows)}"


def flat(record: dict, prefix: str = "") -> dict[str, str]:
    """The numbers of a nested dict as cells by their path."""
    found = {}
    for key, value in record.items():
        if text := cell(value):
            found[f"{prefix}{key}"] = text
        elif isinstance(value, dict):
            found |= flat(value, f"{prefix}{key} ")
    return found


def record_table(result: dict, path: str) -> str:
    """The dict of dicts, or the list of dicts, at `path`: a row each, or a column where that is narrower."""
    records = look_up(result, path)
    if isinstance(records, list):  # the first number of each names it
        records = {f"{next(iter(r))} = {r.pop(next(iter(r))):g}": r for r in map(dict, records)}
    elif any(cell(value) for value in records.values()):
        records = {"": records}
    named = (v for v in result.values() if isinstance(v, dict) and v.keys() >= records.keys())
    labels = next((v for v in named if all(isinstance(text, str) for text in v.values())), {})
    rows = {key: flat(record) for key, record in records.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = [["", *(f"`{column}`" for column in columns)]]
    for key, row in rows.items():
        cells.append([key and f"`{labels.get(key, key)}`", *(row.get(column, "") for column in columns)])
    if len(columns) > len(rows):
        cells = [list(column) for column in zip(*cells, strict=True)]
    head = f"`{result['command']}`{machine(result)}." if "command" in result else ""
    return f"{head}\n\n{as_table(cells)}".strip()


def fits_table(result: dict) -> str:
    """What a run needs on each GPU (benchmarks/memory.py), and the smallest GPU that has it."""
    sizes = ", ".join(map(str, result["gpus"][:-1])) + f" and {result['gpus'][-1]}"
    head = (
        f"GB on each GPU, computed by `{result['command']}`. In brackets the smallest GPU of {sizes} GB that "
    )
    head += f"has it within {result['usable']:.0%} of its memory, none where the largest has not."
    counts = list(next(iter(result["needed"].values())))
    rows = [["", *(f"{n} GPU{'s' * (n != '1')}" for n in counts)]]
    for name, needed in result["needed"].items():
        fitting = [[gpu for gpu in result["gpus"] if x <= result["usable"] * gpu] for x in needed.values()]
        cells = [f"{x:.0f} ({gpus[0] if gpus else 'none'})" for x, gpus in zip(needed.values(), fitting)]
        command, _, model = name.rpartition(", ")
        rows.append([f"`{command}`, {model}", *cells])
    return f"{head}\n\n{as_table(rows)}"


def faults_table(result: dict) -> str:
    """A row a fault of benchmarks/faults.py, in its words."""
    titles = {"fault": "Fault", "times": "How often", "seen": "What the user sees", "lost": "What is lost"}
    titles |= {"verdict": "Verdict"}
    rows = [list(titles.values())]
    rows += [[fault[key].replace("|", r"\|") for key in titles] for fault in result["faults"].values()]
    return f"`{result['command']}`{machine(result)}.\n\n{as_table(rows)}"


def leaderboard_table(result: dict) -> str:
    """The start and every method of benchmarks/leaderboard.py, the best first, with places within noise."""
    columns = {
        "accuracy": "sampled answers right",
        "rank": "place",
        "greedy": "greedy answers right",
        "kl_k1": "KL from the start",
        "length": "tokens an answer",
        "truncated": "cut off",
        "perplexity": "perplexity of stories",
        "tokens": "tokens used",
        "cpu_seconds": "CPU seconds",
        "memory_gb": "peak GB",
        "learning_rate": "learning rate",
    }
    head = f"`{result['command']}`{machine(result)}, float32. Mean ± std over the seeds, the best first."
    rows, edges = [["", *columns.values()]], {}
    for name, tried in result["search"].items():
        edges[name] = {float(rate) for rate in list(tried)[:: len(tried) - 1]}
    first = {"start": "tiny/sft, the start", "teacher": "the teacher of distill.py"}
    first = {name: {"label": label} | result[name] for name, label in first.items() if name in result}
    for name, row in (first | result["summary"]).items():
        cells = {key: cell(row[key]) or "" for key in columns if key in row}
        if "learning_rate" in row:
            cells["learning_rate"] = f"{row['learning_rate']:g}{'*' * (row['learning_rate'] in edges[name])}"
        cells["rank"] = " to ".join(map(str, sorted(set(row.get("rank", ())))))
        few = f", {row['num_runs']} of 3 seeds" if row.get("num_runs", 3) < 3 else ""
        rows.append([row["label"] + few, *(cells.get(key, "") for key in columns)])
    return f"{head}\n\n{as_table(rows)}"


def brief_leaderboard(result: dict) -> str:
    """For the README: one method of each kind with its gain and what it cost."""
    columns = {
        "accuracy": "sampled answers right",
        "kl_k1": "KL from the start",
        "cpu_seconds": "CPU seconds",
    }
    start = number(result["start"]["accuracy"])
    rows = [[f"{result['budget']:,} answer tokens each, from {start} right", *columns.values()]]
    chosen = [result["summary"][name] for name in BRIEF]
    return as_table(rows + [[row["label"], *(cell(row[key]) for key in columns)] for row in chosen])


def level_table(result: dict) -> str:
    """Of each method of benchmarks/leaderboard.py those below it that noise may have put there."""
    rows = [["", "within noise of"]]
    rows += [[row["label"], "; ".join(row["level_with"]) or "none"] for row in result["summary"].values()]
    return as_table(rows)


def commands_block(root: Path) -> str:
    """The commands that measured every learning curve in benchmarks/results/."""
    lines = []
    for path in sorted((root / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        if {"seeds", "before", "curves"} <= result.keys():
            script, _, more = result["command"].removeprefix("python ").partition(" ")
            name = f" --name {path.stem}" if path.stem != Path(script).stem else ""
            options = f' --flags="{more}"' if more else ""
            options += f" --metrics {' '.join(result['curves'])}"
            lines.append(f"python benchmarks/learning.py {script}{name}{options}")
    return "```bash\n" + "\n".join(lines) + "\n```"


def results_block(spec: str, root: Path) -> str:
    """What stands between `<!-- results:begin spec -->` and its end; FileNotFoundError without the result."""
    if spec == "commands":
        return commands_block(root)
    names = spec.split()
    results = [load_result(name.partition("#")[0], root) for name in names]
    if "contenders" in results[0] and "#" not in spec:
        return peer_table(names, results)
    if "search" in results[0] and "#" not in spec:
        return leaderboard_table(results[0])
    if spec == "leaderboard#level_with":
        return level_table(results[0])
    if spec == "leaderboard#brief":
        return brief_leaderboard(results[0])
    if "needed" in results[0]:
        return fits_table(results[0])
    if "faults" in results[0]:
        return faults_table(results[0])
    if "curves" in results[0] and "#" not in spec:
        return learning_table(results[0]) if len(results) == 1 else comparison_table(results, root)
    return "\n\n".join(record_table(r, n.partition("#")[2]) for n, r in zip(names, results, strict=True))


def headline(script: str, root: Path) -> str:
    """What the README says of the script's default run."""

    def measured(match):
        name, sign, key = re.match(r"(\w+)([ #])(.*)", match[1]).groups()
        try:
            result = load_result(name, root)
        except FileNotFoundError:
            return "not measured"
        return change(result, key) if sign == " " else cell(look_up(result, key))

    return re.sub(r"\{(.*?)\}", measured, HEADLINES.get(script, ""))


if __name__ == "__main__":
    print(results_block(" ".join(sys.argv[1:]), ROOT))
