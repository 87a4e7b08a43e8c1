"""benchmarks/leaderboard.py on runs that nobody made: budget, choice of a learning rate, taking up, ranks."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import leaderboard
from leaderboard_methods import METHODS, command_of, steps_for, trained_tokens, used_tokens
from leaderboard_report import level_with, ranks

TOKENS = [  # prompts up to a line and its mean length, line by line; tokens that count
    ("grpo", [(16, 20), (32, 10)], 16 * 8 * 30),
    ("dapo", [(20, 20), (60, 10)], 20 * 8 * 20 + 40 * 8 * 10),  # the second step had more rounds
    ("remax", [(16, 20)], 16 * 9 * 20),  # with greedy answers
    ("iterative_dpo", [(16, 20), (32, None), (48, None)], 10 * 64 * 20),  # sampled as a round begins
    ("dpo", [(32, None), (64, None)], 2 * 32 * trained_tokens("preference_train")),
]


@pytest.mark.parametrize(("name", "lines", "tokens"), TOKENS)
def test_tokens_of_a_run_are_counted_from_what_it_has_written(tmp_path, name, lines, tokens):
    rows = [{"step": n, "epoch": x / 1792, "completions/mean_length": y} for n, (x, y) in enumerate(lines, 1)]
    rows = [{key: x for key, x in row.items() if x is not None} for row in [{"step": 0}, *rows]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"half')
    assert used_tokens(name, tmp_path) == (len(lines), round(tokens))
    steps = steps_for(METHODS[name], 10**6)
    assert abs(steps_for(METHODS[name], 2 * 10**6) - 2 * steps) <= 10
    assert f"--max-steps {steps * (1 + (name == 'dapo'))} " in command_of(name, 1e-4, 1, 10**6)


def test_rate_is_chosen_by_the_whole_search_alone_and_only_what_has_changed_runs_again():
    args, rates = leaderboard.Args(), leaderboard.rates(METHODS["dpo"])
    jobs = [("dpo", rate, 0) for rate in rates]
    runs = {f"dpo {r:g} 0": leaderboard.conditions("dpo", r, 0, args) | {"accuracy": r} for r in rates}
    runs[f"dpo {rates[0]:g} 1"] = {"accuracy": 1.0}  # a run of the test
    assert leaderboard.chosen_rates(runs) == {"dpo": rates[2]} and not leaderboard.missing(runs, jobs, args)
    assert leaderboard.missing(runs, jobs, leaderboard.Args(samples=1)) == jobs
    runs[f"dpo {rates[1]:g} 0"]["versions"] = {}
    assert leaderboard.missing(runs, jobs, args) == jobs[1:2]
    assert leaderboard.chosen_rates({key: runs[key] for key in list(runs)[1:]}) == {}
    accuracies = {"a": [80, 82, 84], "b": [79] * 3, "c": [80] * 3, "d": [50, 52, 54]}  # b, c: equal by chance
    assert ranks(accuracies) == {"a": (1, 3), "b": (1, 3), "c": (1, 3), "d": (4, 4)}
    assert level_with(accuracies) == {"a": ["c", "b"], "c": ["b"], "b": [], "d": []}
