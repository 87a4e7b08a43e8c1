"""The arithmetic of benchmarks/kl.py, length_bias.py, overoptimization.py and faults.py on small cases."""

import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import faults_files
import kl
import length_bias
import overoptimization
from faults_runs import counted, told

import grpo


def test_kl_of_sequences_is_that_of_their_listed_probabilities():
    logits, ref_logits = torch.randn(2, 7, 2, generator=torch.Generator().manual_seed(0)).double()
    sequences = torch.tensor([*itertools.product(range(2), repeat=3)])
    p, q = (x.softmax(-1) for x in (logits, ref_logits))
    line = lambda ids: [0, 1 + ids[0], 3 + 2 * ids[0] + ids[1]]  # of the prefix before each token
    chance = lambda x, ids: math.prod(x[n, i].item() for n, i in zip(line(ids), ids))
    both = [(chance(p, ids), chance(q, ids)) for ids in sequences.tolist()]
    found = kl.targets(logits.requires_grad_(), ref_logits, sequences)
    assert sum(a for a, _ in both) == pytest.approx(1)
    assert found["reverse KL, sequence"][0] == pytest.approx(sum(a * math.log(a / b) for a, b in both))
    assert found["forward KL, sequence"][0] == pytest.approx(sum(b * math.log(b / a) for a, b in both))
    assert found["reverse KL, per token"][0] == pytest.approx(found["reverse KL, sequence"][0])
    assert (found["reverse KL, per token"][1] - found["reverse KL, sequence"][1]).norm() > 0.01


def test_kl_table_is_that_of_common():
    result = json.loads((ROOT / "benchmarks" / "results" / "kl.json").read_text())
    as_loss, as_reward = result["loss"], result["reward"]
    assert [result["value"][k]["value bias"] > 0 for k in kl.KL] == [False, True, False]
    assert as_loss["k1"]["reverse KL, per token"] == 1 and as_loss["k2"]["reverse KL, per token"] == 0
    assert as_loss["k3"]["forward KL, per token"] == 0 < as_loss["k3"]["reverse KL, per token"]
    assert as_loss["k2"]["reverse KL, sequence"] > 0.1
    assert [as_reward[k]["reverse KL, sequence"] == 0 for k in kl.KL] == [True, False, False]


def test_only_grpo_shortens_right_answers_and_lengthens_wrong_ones():
    """One step by hand: the gradient of A E[1 / length] for GRPO, 0 for Dr. GRPO."""
    still = length_bias.follow(grpo, "Dr. GRPO", steps=3)
    assert still["right"] == still["wrong"] == [still["right"][0]] * 3
    moved = length_bias.follow(grpo, "GRPO", steps=3)
    assert moved["right"][0] > moved["right"][1] > moved["right"][2]
    assert moved["wrong"][0] < moved["wrong"][1] < moved["wrong"][2]
    assert length_bias.expected_advantages(grpo, 2, 0.5, "none").tolist() == [-0.25, 0.25]  # half differ
    assert [*length_bias.of_step([3, 5, 8], [1.0, 0.0, 1.0]).values()] == [0.6667, 5.5, 5.0]


def test_best_of_n_of_a_pool_and_the_fitted_forms():
    answers = [{"count": 3, "gold": 1.0, "scores": [0.0] * 5}, {"count": 1, "gold": 0.0, "scores": [2.0] * 5}]
    one, two = overoptimization.best_of_n([answers], "single", sizes=(1, 2))
    assert (one["proxy"], one["gold"], one["kl"]) == (0.5, 0.75, 0)
    assert two["gold"] == pytest.approx(9 / 16) and two["proxy"] == pytest.approx(2 * 7 / 16)
    assert two["kl"] == pytest.approx(9 / 16 * math.log(3 / 4) + 7 / 16 * math.log(7 / 4))
    chosen = [overoptimization.choose(np.array([[9.0, 1, 2, 3, 6]]), c)[0] for c in overoptimization.CHOOSERS]
    assert chosen == pytest.approx([9, 3, 1, 3 - math.sqrt(3.5)])
    for of_ppo in (False, True):
        d = np.linspace(0, 2, 9)
        gold = 0.5 + d * (0.3 - 0.2 * (np.log(np.maximum(d, 1e-9)) if of_ppo else d))
        fitted = overoptimization.fit([{"kl": x * x, "gold": y, "proxy": x} for x, y in zip(d, gold)], of_ppo)
        assert [fitted[key] for key in ("alpha", "beta", "R2")] == pytest.approx([0.3, 0.2, 1], abs=1e-4)


def test_faults_read_what_a_user_reads_and_damage_what_they_say(tmp_path):
    assert told("step 1\nerror: no space\n") == "no space" and told("Traceback (most ...\n") == "a traceback"
    assert counted(["a (1)", "a (2)", ""]) == "2 x a; 1 x nothing"
    path = tmp_path / "file"
    path.write_bytes(b"abcd")
    contents = [path.exists() and path.read_bytes() for _ in faults_files.damaged(path)]
    assert contents == [b"ab", b"", b"abc$", False]
