"""The default run of every script on tiny/ learns what it is for. Minutes each: only with --slow.

A threshold lies between what the metric is before training and where runs of several seeds have ended
(`benchmarks/results/`), so that a broken sign or a lost gradient fails and another seed does not.
"""

import importlib

import pytest
from sync_copies import scripts
from sync_docs import flags

LEARNT = [  # script, its --algorithm, and what its last metrics must reach
    ("sft", None, {"eval/accuracy": 0.4}),
    ("dpo", None, {"eval/accuracy": 0.9, "eval/reward": 0.65}),
    ("ipo_kto_simpo_orpo", "ipo", {"eval/accuracy": 0.9, "eval/reward": 0.62}),
    ("ipo_kto_simpo_orpo", "kto", {"eval/accuracy": 0.85, "eval/reward": 0.6}),
    ("ipo_kto_simpo_orpo", "simpo", {"eval/accuracy": 0.95}),
    ("ipo_kto_simpo_orpo", "orpo", {"eval/accuracy": 0.95, "eval/reward": 0.62}),
    ("reward_model", None, {"eval/accuracy": 0.9}),
    ("process_reward_model", None, {"eval/step_accuracy": 0.85, "eval/first_error": 0.75}),
    ("ppo_rlhf", None, {"eval/reward": 0.78, "eval/greedy_reward": 0.88, "objective/scores": 1.0}),
    ("grpo", None, {"eval/reward": 0.8, "eval/greedy_reward": 0.9}),
    ("dapo", None, {"eval/reward": 0.8, "eval/greedy_reward": 0.9}),
    ("rloo_remax", "rloo", {"eval/reward": 0.75, "eval/greedy_reward": 0.9}),
    ("rloo_remax", "remax", {"eval/reward": 0.75, "eval/greedy_reward": 0.9}),
    ("rejection_sampling", None, {"eval/reward": 0.68, "eval/greedy_reward": 0.88}),
    ("online_dpo", "online_dpo", {"eval/reward": 0.75, "eval/greedy_reward": 0.88}),
    ("online_dpo", "iterative_dpo", {"eval/reward": 0.72, "eval/greedy_reward": 0.85}),
    ("online_dpo", "spin", {"eval/reward": 0.64, "eval/greedy_reward": 0.9}),
    ("online_dpo", "nash_md", {"eval/reward": 0.7, "eval/greedy_reward": 0.88}),
    ("distill", None, {"eval/accuracy": 0.3, "eval/greedy_accuracy": 0.6}),
]


def test_every_script_has_a_threshold():
    trained = [path for path in scripts() if any(flag.name == "max_steps" for flag in flags(path))]
    assert {path.stem for path in trained} == {script for script, *_ in LEARNT}


@pytest.mark.slow
@pytest.mark.parametrize(("script", "algorithm", "wanted"), LEARNT)
def test_default_run_learns(script, algorithm, wanted, tmp_path):
    module = importlib.import_module(script)
    chosen = {"algorithm": algorithm} if algorithm else {}
    metrics = module.main(module.Args(output_dir=str(tmp_path / "run"), **chosen))
    assert {key: metrics[key] for key in wanted if metrics[key] < wanted[key]} == {}
