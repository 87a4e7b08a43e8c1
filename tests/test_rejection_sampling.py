"""rejection_sampling.py: Best-of-N and its estimators against enumeration, the filter, short runs."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, read_lines
from helpers import assert_continues, calls_of, error_of, rewards, trainer
from safetensors.torch import load_file
from samples import stock, tiny_rows

import estimators
import rejection_sampling as rs
import sft

SCORINGS = {"no ties": [0.3, -1.0, 2.0, 0.5], "a tie": [1.0, 0.0, 1.0, 0.5]}
SCORINGS |= {"a verifier": [0.0, 1.0, 0.0, 1.0]}
every_scoring = pytest.mark.parametrize("scores", SCORINGS.values(), ids=SCORINGS)
CHANCES = np.array([0.4, 0.3, 0.1, 0.2])
HELD_OUT = tiny_rows("prompts_eval", 6)

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def train(tmp_path, one_cpu):
    """train(rows, **flags): 2 rounds of 4 prompts and 2 steps on tiny/sft."""
    settings = {"num_rounds": 2, "prompts_per_round": 4, "max_steps": 4, "filter": "top1"}
    settings |= {"learning_rate": 1e-3, "max_completion_length": 40, "num_generations": 4, "batch_size": 16}
    run = trainer(rs, tmp_path, reward="residue")
    return lambda rows=None, held_out=None, **flags: run(rows, held_out, **settings | flags)


def enumerated_law(scores, n):
    """How likely each answer is the best of n: over all draws, the first or each of those that tie."""
    first, shared = np.zeros(4), np.zeros(4)
    for draw in itertools.product(range(4), repeat=n):
        chance, top = CHANCES[list(draw)].prod(), max(scores[i] for i in draw)
        best = [i for i in draw if scores[i] == top]
        first[best[0]] += chance
        for i in best:
            shared[i] += chance / len(best)
    return first, shared


@every_scoring
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_law_and_kl_of_the_best_of_n_are_those_of_enumeration(scores, n):
    found, (first, shared) = estimators.best_of_n_law(CHANCES, np.array(scores), n), enumerated_law(scores, n)
    assert found == pytest.approx(first) and found == pytest.approx(shared)
    kl = estimators.best_of_n_kl(CHANCES, np.array(scores), n)
    assert kl == pytest.approx((first * np.log(first / CHANCES)).sum(), abs=1e-12)
    assert -1e-12 <= kl <= math.log(n) - (n - 1) / n + 1e-12  # arXiv:2401.01879


def test_kl_reaches_its_bound_only_where_nothing_ties_and_nothing_is_likely():
    even, n = np.full(2000, 1 / 2000), 8
    bound = math.log(n) - (n - 1) / n
    assert estimators.best_of_n_kl(even, np.arange(2000.0), n) == pytest.approx(bound, rel=1e-3)
    verifier = estimators.best_of_n_kl(CHANCES, np.array(SCORINGS["a verifier"]), 64)  # right: half of all
    assert verifier == pytest.approx(math.log(2)) and verifier < 0.25 * (math.log(64) - 63 / 64)


@every_scoring
def test_shares_of_the_chosen_are_those_over_all_subsets(scores):
    scores, values = np.array([*scores, scores[0]]), np.array([3.0, 1.0, 4.0, 1.5, 9.0])
    for k in range(1, 6):
        wanted = []
        for subset in map(list, itertools.combinations(range(5), k)):
            wanted.append(values[subset][scores[subset] == scores[subset].max()].mean())
        assert estimators.chosen_shares(scores, k).sum() == pytest.approx(1)
        assert estimators.chosen_shares(scores, k) @ values == pytest.approx(np.mean(wanted))


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    right = np.array([1.0, 0, 0, 1, 0, 0, 0, 0])
    for k in (1, 2, 4, 7):
        wanted = 1 - math.comb(6, k) / math.comb(8, k)  # Eq. 1, arXiv:2107.03374
        assert estimators.chosen_shares(right, k) @ right == pytest.approx(wanted)


@every_scoring
@pytest.mark.parametrize("k", [1, 2, 3])
def test_value_of_the_best_of_k_is_estimated_without_bias_from_more_samples(scores, k):
    """Its mean over all draws of 4 samples is what the law of the best of k says, of scores and values."""
    scores, values = np.array(scores), np.array([2.0, -1.0, 0.5, 7.0])
    draws = np.array([*itertools.product(range(4), repeat=4)])
    for of in (scores, values):
        found = [estimators.chosen_shares(scores[draw], k) @ of[draw] for draw in draws]
        assert CHANCES[draws].prod(1) @ found == pytest.approx(
            estimators.best_of_n_law(CHANCES, scores, k) @ of
        )


def test_majority_by_hand():
    finals, right = list("abbcab"), np.array([0.0, 1, 1, 0, 0, 1])  # b is right
    # 2: a, b, a; 3: b, c; 4: the two left over are no group
    shares = {1: 3 / 6, 2: 1 / 3, 3: 1 / 2, 4: 1, 6: 1}
    assert {k: estimators.majority_right(finals, right, k) for k in shares} == pytest.approx(shares)


def rows_of(*columns, names=("reward", "gold_reward", "final")):
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def test_table_by_hand():
    """Two prompts of four samples: the reward prefers wrong ones of the first, and ties on the second."""
    rewards, gold = [4.0, 3, 2, 1, 0, 0, 0, 0], [0.0, 0, 1, 1, 1, 0, 0, 0]
    one, two, four = estimators.best_of_k(rows_of(rewards, gold, [*"abcc", *"abcd"]), 4)
    first = {"best_reward": 1.25, "best@k": 3 / 8, "pass@k": 3 / 8, "maj@k": 3 / 8}
    assert one == pytest.approx(first | {"k": 1, "kl": 0, "kl_bound": 0})
    assert two["best@k"] == pytest.approx((1 / 6 + 1 / 4) / 2)
    assert two["pass@k"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert two["best_reward"] == pytest.approx((3 * 4 + 2 * 3 + 2) / 6 / 2)
    assert four["maj@k"] == 1 and four["best@k"] == pytest.approx(1 / 8) and four["pass@k"] == 1
    law = np.diff((np.arange(5) / 4) ** 4)  # of the first prompt; the second's ties leave it as it was
    assert four["kl"] == pytest.approx((law * np.log(4 * law)).sum() / 2)
    assert four["kl_bound"] == pytest.approx(math.log(4) - 3 / 4)


def test_prompts_without_all_their_rewards_are_left_out_and_shares_of_right_ones_where_nothing_is_right():
    rewards = [1.0, 2.0, None, 5.0]
    [one, two] = estimators.best_of_k(rows_of(rewards, rewards, "abab"), 2)
    assert one["best_reward"] == 1.5 and two["best@k"] == 2 and "pass@k" not in one
    assert estimators.best_of_k(rows_of([None] * 4, [None] * 4, "abab"), 2) == []
    table = estimators.best_of_k(rows_of([0.0] * 6, [0.0] * 6, "abcdef"), 6)
    assert [line["k"] for line in table] == [1, 2, 4, 6]


@pytest.mark.parametrize("case", read_lines(DATA / "filters.jsonl"), ids=lambda case: str(case["settings"]))
def test_filters_by_hand(case):
    """Settings: filter, threshold, most."""
    reasons = rs.reasons_against(case["group"], *case["settings"])
    kept = [row["completion"] for row, reason in zip(case["group"], reasons, strict=True) if not reason]
    assert "".join(kept) == case["kept"] and reasons[1] == "cut off" and reasons[4] == "no reward"
    if case["settings"] == ["all_correct", None, 2]:
        assert reasons == ["", "cut off", "duplicate", "wrong", "no reward", "", "not among the best"]


def test_rounds_are_on_disk_with_their_origin_and_are_what_sft_would_train_on(train):
    folder, lines = train()
    tokenizer = sft.load_tokenizer(sft.Args())
    for number, step in ((1, 0), (2, 2)):
        rows = read_lines(folder / f"round_{number}.jsonl")
        assert len(rows) == 16 and all(re.search(r"\.jsonl, row \d+$", row["place"]) for row in rows)
        for row in rows:
            assert (row["round"], row["step"], row["model"], row["seed"]) == (number, step, "tiny/sft", 1)
            assert row["reward"] == sum(row["completion_ids"]) % 7 / 3 == row["rewards/residue"]
        kept = [row for row in rows if row["kept"]]
        assert all(row["kept"] == (not row["reason"]) for row in rows) and 0 < len(kept) <= 4
        for group in (rows[n : n + 4] for n in range(0, 16, 4)):
            best = max((row["reward"] for row in group if row["ended"]), default=None)
            assert [row["reward"] for row in group if row["kept"]] == [best] * (best is not None)
        for row in kept:
            [(ids, trained)] = sft.encode(tokenizer, row, sft.Args())
            assert ids[~trained].tolist() == row["prompt_ids"]
            said = tokenizer.decode(ids[trained], skip_special_tokens=True)
            assert said.strip() == row["completion"].strip()
        line = lines[step]
        assert line["round"] == number and line["sampling/kept_ratio"] == len(kept) / 16
        assert line["reward"] == pytest.approx(np.mean([row["reward"] for row in rows]))
    assert [line["round"] for line in lines] == [1, 1, 2, 2]


def test_steps_of_a_round_pass_over_what_it_kept(train):
    folder, lines = train(max_steps=0, num_epochs=3.0, batch_size=4, num_rounds=3)
    for number in (1, 2, 3):
        kept = sum(row["kept"] for row in read_lines(folder / f"round_{number}.jsonl"))
        steps = [line for line in lines if line["round"] == number]
        assert len(steps) == math.ceil(3 * kept / 4) and steps[-1]["epoch"] >= 3
        assert steps[0]["learning_rate"] == 1e-3 > steps[-1]["learning_rate"]  # a schedule each
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))


def test_first_loss_of_a_round_is_what_the_stock_model_says_of_the_kept_answers(train):
    folder, lines = train(num_rounds=1, max_steps=1)
    rows = [row for row in read_lines(folder / "round_1.jsonl") if row["kept"]]
    assert len(rows) == 4  # a step of 16 has each of them as often
    model, logps = stock("tiny/sft"), []
    for row in rows:
        ids, start = torch.tensor(row["prompt_ids"] + row["completion_ids"]), len(row["prompt_ids"])
        scores = model(ids[None]).logits[0, start - 1 : -1].log_softmax(1)
        logps.append(scores.gather(1, ids[start:, None])[:, 0].detach())
    assert lines[0]["loss"] == pytest.approx(-torch.cat(logps).mean().item(), rel=1e-5)


def test_continuing_within_a_round_equals_never_having_stopped_and_samples_nothing_again(train, monkeypatch):
    calls, answer = [], rs.answer
    monkeypatch.setattr(rs, "answer", lambda *given: calls.append(1) or answer(*given))
    assert_continues(train, save_every=3, max_steps=5)  # goes on at step 3, the first of round 2
    assert len(calls) == 2  # one of each round, none of the run that went on


def test_restart_trains_from_the_first_model_on_samples_of_the_newest(train, monkeypatch):
    first, token_logprobs = load_file(ROOT / "tiny" / "sft" / "model.safetensors"), rs.token_logprobs

    def spy(policy, *given, **settings):
        now = dict(policy.named_parameters())
        is_first.append(all(torch.equal(now[name], first[name].float()) for name in first))
        return token_logprobs(policy, *given, **settings)

    monkeypatch.setattr(rs, "token_logprobs", spy)
    sampled = []
    for restart, wanted in ((False, [True, False, False, False]), (True, [True, False, True, False])):
        is_first = []
        folder, _ = train(restart=restart)
        assert is_first == wanted
        rows = [read_lines(folder / f"round_{number}.jsonl") for number in (1, 2)]
        sampled.append([[row["completion_ids"] for row in some] for some in rows])
    assert sampled[0] == sampled[1]


def test_best_of_n_writes_the_best_answers_and_trains_nothing(train, monkeypatch):
    calls = calls_of(monkeypatch, rs, "answer")
    folder, _ = train(None, HELD_OUT, num_rounds=0, max_steps=0, eval_samples=8)
    (_, greedy), (_, rows) = calls
    best = read_lines(folder / "samples.jsonl")
    assert not (folder / "model").exists() and (len(greedy), len(rows), len(best)) == (6, 48, 6)
    for n, line in enumerate(best):
        group = rows[8 * n : 8 * n + 8]
        assert line["completion_ids"] in [row["completion_ids"] for row in group]
        assert line["reward"] == max(row["reward"] for row in group)
        finals = [row["final"] for row in group]
        assert finals.count(line["majority"]) == max(map(finals.count, finals))
    table = json.loads((folder / "best_of_n.json").read_text())
    assert [line["k"] for line in table] == [1, 2, 4, 8] and "pass@k" not in table[0]  # rewards of 0 to 2
    assert table[0]["best_reward"] == pytest.approx(np.mean([row["reward"] for row in rows]))
    assert table[-1]["best_reward"] == pytest.approx(np.mean([line["reward"] for line in best]))
    assert (folder / "best_of_n.png").exists()
    [line] = read_lines(folder / "metrics.jsonl")
    assert line["eval/best@k"] == table[-1]["best@k"] >= line["eval/reward"] > 0


def test_gold_rewards_judge_and_choose_nothing(train):
    settings = {"num_rounds": 1, "max_steps": 1, "prompts_per_round": 16}
    folder, lines = train(eval_reward=rewards("rare"), **settings)
    rows = read_lines(folder / "round_1.jsonl")
    for row in rows:
        assert row["gold_reward"] == (sum(row["completion_ids"]) % 3 == 0)
        assert row["correct"] == (row["rewards/residue"] == 1)
    assert lines[0]["gold_reward"] == pytest.approx(np.mean([row["gold_reward"] for row in rows]))
    plain, _ = train(**settings)
    kept = [[row["kept"] for row in read_lines(x / "round_1.jsonl")] for x in (folder, plain)]
    assert kept[0] == kept[1]


def test_evaluation_by_hand(monkeypatch, tmp_path):
    answers = {  # temperature 0 and above: final, reward, gold reward
        0.0: [("1", 5.0, 1.0), ("2", 0.0, 0.0)],
        1.0: [("1", 1.0, 1.0), ("2", 2.0, 0.0), ("3", 0.0, 0.0), ("3", 1.0, 1.0)],
    }

    def answer(policy, tokenizer, asked, group_size, temperature, *rest):
        rows = rows_of(*zip(*answers[temperature]), names=("final", "reward", "gold_reward"))
        return [row | {"prompt_ids": [5], "n": n} for n, row in enumerate(rows)]

    monkeypatch.setattr(rs, "answer", answer)
    args, tokenizer = rs.Args(eval_samples=2), rs.load_tokenizer(rs.Args())
    metrics, samples = rs.evaluate_best_of_n(None, tokenizer, ["?", "!"], None, tmp_path, args)
    wanted = {"greedy_reward": 0.5, "reward": 0.5, "best@k": 0.5, "pass@k": 1.0, "maj@k": 0.5}
    assert metrics == pytest.approx({f"eval/{name}": value for name, value in wanted.items()})
    assert [(sample["n"], sample["majority"]) for sample in samples] == [(1, "1"), (3, "3")]
    metrics, samples = rs.evaluate_best_of_n(
        None, tokenizer, ["?", "!"], None, tmp_path, rs.Args(eval_samples=0)
    )
    assert metrics == {"eval/greedy_reward": 0.5} and [sample["n"] for sample in samples] == [0, 1]


def test_round_without_a_single_answer_ends_the_run_with_one_line(train, capsys):
    assert "round 1: not one of 16 answers is kept" in error_of(lambda: train(threshold=9.0), capsys)


def test_later_round_that_keeps_nothing_leaves_the_policy_of_the_one_before(train, monkeypatch):
    reasons_against, numbers = rs.reasons_against, itertools.count()
    spy = lambda *given: ["no"] * 4 if next(numbers) >= 4 else reasons_against(*given)
    monkeypatch.setattr(rs, "reasons_against", spy)
    folder, lines = train()
    assert (folder / "model").exists() and [line["round"] for line in lines] == [1, 1]
