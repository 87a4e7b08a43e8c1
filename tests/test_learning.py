"""The default run of every script on tiny/ learns what it is for. Minutes each: only with --slow.

A threshold lies between what the metric is before training and where runs of several seeds have ended
(`benchmarks/results/`), so that a broken sign or a lost gradient fails and another seed does not.
"""

import importlib

import pytest
from conftest import DATA, read_lines
from sync_copies import scripts
from sync_docs import flags

LEARNT = read_lines(DATA / "learnt.jsonl")  # script, --algorithm, and what the last metrics must reach


def test_every_script_has_a_threshold():
    trained = [path for path in scripts() if any(flag.name == "max_steps" for flag in flags(path))]
    assert {path.stem for path in trained} == {case["script"] for case in LEARNT}


@pytest.mark.slow
@pytest.mark.parametrize("case", LEARNT, ids=lambda case: f"{case['script']}-{case['algorithm']}")
def test_default_run_learns(case, tmp_path):
    module, wanted = importlib.import_module(case["script"]), case["wanted"]
    chosen = {"algorithm": case["algorithm"]} if case["algorithm"] else {}
    metrics = module.main(module.Args(output_dir=str(tmp_path / "run"), **chosen))
    assert {key: metrics[key] for key in wanted if metrics[key] < wanted[key]} == {}
