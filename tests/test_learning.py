"""The default run of every script on tiny/ learns what it is for. Minutes each: only with --slow.

A threshold lies between what the metric is before training and where runs of several seeds have ended
(`benchmarks/results/`), so that a broken sign or a lost gradient fails and another seed does not.
"""

import importlib

import pytest
from sync_copies import scripts
from sync_docs import flags

# script: flags, and what its last metrics must reach
LEARNT = {
    "sft.py": [((), {"eval/accuracy": 0.4})],
    "dpo.py": [((), {"eval/accuracy": 0.9, "eval/reward": 0.65})],
    "ipo_kto_simpo_orpo.py": [
        (("ipo",), {"eval/accuracy": 0.9, "eval/reward": 0.62}),
        (("kto",), {"eval/accuracy": 0.85, "eval/reward": 0.6}),
        (("simpo",), {"eval/accuracy": 0.95}),
        (("orpo",), {"eval/accuracy": 0.95, "eval/reward": 0.62}),
    ],
    "reward_model.py": [((), {"eval/accuracy": 0.9})],
    "distill.py": [((), {"eval/accuracy": 0.3, "eval/greedy_accuracy": 0.6})],
    "process_reward_model.py": [((), {"eval/step_accuracy": 0.85, "eval/first_error": 0.75})],
    "ppo_rlhf.py": [((), {"eval/reward": 0.78, "eval/greedy_reward": 0.88, "objective/scores": 1.0})],
    "grpo.py": [((), {"eval/reward": 0.8, "eval/greedy_reward": 0.9})],
    "dapo.py": [((), {"eval/reward": 0.8, "eval/greedy_reward": 0.9})],
    "rloo_remax.py": [
        (("rloo",), {"eval/reward": 0.75, "eval/greedy_reward": 0.9}),
        (("remax",), {"eval/reward": 0.75, "eval/greedy_reward": 0.9}),
    ],
}


def test_every_script_has_a_threshold():
    trained = [path for path in scripts() if any(flag.name == "max_steps" for flag in flags(path))]
    assert {path.name for path in trained} == set(LEARNT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, algorithm, wanted",
    [(script, algorithm, wanted) for script, runs in LEARNT.items() for algorithm, wanted in runs],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value) * isinstance(value, str),
)
def test_default_run_learns(script, algorithm, wanted, tmp_path):
    module = importlib.import_module(script.removesuffix(".py"))
    flags = {"algorithm": algorithm[0]} if algorithm else {}
    metrics = module.main(module.Args(output_dir=str(tmp_path / "run"), **flags))
    assert {key: metrics[key] for key in wanted if metrics[key] < wanted[key]} == {}
