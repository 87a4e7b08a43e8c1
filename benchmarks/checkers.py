"""What the checkers of rewards.py cost, and what hostile programs leave behind.

    python benchmarks/checkers.py --solutions example_model_solutions.jsonl     # 3 minutes on 2 idle cores

The solutions are those of github.com/openai/grade-school-math. Measured are, in rounds of one process:

    numbers    math_answer on the solutions that state an answer, `A: 18`: plain numbers
    formulas   math_answer on the pairs of tests/data/math_pairs.jsonl that are read as formulas
    programs   code_tests on a task of MBPP's size, many copies of a right program

and once, of 1,000 programs, a third of them from tests/data/programs_hostile.jsonl: wrong scores, and what is
left of them (processes, threads, descriptors, files). Writes benchmarks/results/checkers.json.
"""

import json
import os
import platform
import sys
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import tyro
from learning import ROOT, cpu_name

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_sandbox import ATTEMPT, footprint, lines  # noqa: E402

import rewards  # noqa: E402

PROGRAM = "def similar_elements(a, b):\n    return tuple(sorted(set(a) & set(b)))"
TESTS = [
    "assert similar_elements((3, 4, 5, 6), (5, 7, 4, 10)) == (4, 5)",
    "assert similar_elements((1, 2, 3, 4), (5, 4, 3, 7)) == (3, 4)",
    "assert similar_elements((11, 12, 14, 13), (17, 15, 14, 13)) == (13, 14)",
]


@dataclass
class Args:
    solutions: Path
    """GSM8K's example_model_solutions.jsonl."""
    rounds: int = 3
    """How often each is timed."""
    programs: int = 400
    """Programs of a round."""


def per_second(count: int, call) -> float:
    """How many of `count` things a second a call does."""
    started = time.perf_counter()
    call()
    return count / (time.perf_counter() - started)


def run_code(programs: list[str], tests: list, **settings) -> list:
    return rewards.code_tests(programs, programs, tests, allow_code_execution=True, **settings)


def hostile() -> dict:
    """1,000 programs, a third hostile: how many get a wrong score, and whether anything is left of them."""
    attacks = [f"{ATTEMPT}TRAINER = {os.getpid()}\n{x['program']}" for x in lines("programs_hostile.jsonl")]
    programs, wanted = [], []
    for n in range(1000):
        right = n % 3 == 0
        programs.append(
            attacks[n // 3 % len(attacks)] if n % 3 == 1 else f"def f(x): return {2 if right else 3} * x"
        )
        wanted.append(float(right))
    before, started = footprint(), time.perf_counter()
    scores = run_code(programs, ["assert f(2) == 4"] * 1000, timeout=3.0)
    wrong = sum(score != right for score, right in zip(scores, wanted, strict=True))
    return {
        "programs": 1000,
        "hostile": sum(n % 3 == 1 for n in range(1000)),
        "wrong_scores": wrong,
        "seconds": round(time.perf_counter() - started),
        "left_behind": int(footprint() != before),
    }


def main(args: Args):
    warnings.simplefilter("ignore")
    found = [json.loads(line) for line in args.solutions.open(encoding="utf-8")]
    models = [(row["ground_truth"], model) for row in found for model in row.values() if type(model) is dict]
    stated = [(gold, m["solution"], m["is_correct"]) for gold, m in models if "A: " in m["solution"]]
    golds, texts, labels = map(list, zip(*stated, strict=True))
    same = rewards.module("mathematics").same_at_sight
    pairs = [(x["gold"], x["answer"]) for x in lines("math_pairs.jsonl") if "answer" in x]
    pairs = [pair for pair in pairs if same(*pair) is None]
    answers, boxed = [gold for gold, _ in pairs], [rf"\boxed{{{answer}}}" for _, answer in pairs]
    rewards.math_answer(boxed, boxed, answers)  # starts the workers
    run_code([PROGRAM], [TESTS])
    rates = {"numbers": [], "formulas": [], "programs": []}
    for _ in range(args.rounds):
        rates["numbers"].append(per_second(len(texts), lambda: rewards.math_answer(texts, texts, golds)))
        rates["formulas"].append(per_second(len(boxed), lambda: rewards.math_answer(boxed, boxed, answers)))
        copies = [PROGRAM] * args.programs
        rates["programs"].append(per_second(len(copies), lambda c=copies: run_code(c, [TESTS] * len(c))))
    agreeing = rewards.math_answer(texts, texts, golds)
    result = {
        "benchmark": "checkers",
        "command": "python benchmarks/checkers.py",
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {package: version(package) for package in ("math-verify", "sympy")},
        "rates": {
            name: {
                "a second (median)": round(median(values)),
                "slowest round": round(min(values)),
                "fastest round": round(max(values)),
                "rounds": values,
            }
            for name, values in rates.items()
        },
        "gsm8k": {
            "solutions": len(texts),
            "agree with the label": sum(a == b for a, b in zip(agreeing, labels)),
        },
        "hostile": hostile(),
    }
    (ROOT / "benchmarks" / "results" / "checkers.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("rates", "gsm8k", "hostile")}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
