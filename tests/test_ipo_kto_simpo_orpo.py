"""ipo_kto_simpo_orpo.py: its four losses, KTO's mismatched answers, weights and data, its errors, short runs.

Losses are held against numbers worked by hand from the papers, runs against a loop over log_softmax of the
stock model on one sequence at a time. What the script shares with dpo.py is tested in test_dpo.py.
"""

import functools
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ipo_kto_simpo_orpo as four

LN2 = math.log(2)
ALGORITHMS = ("ipo", "kto", "simpo", "orpo")


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def softplus(x):
    return math.log1p(math.exp(x))


# Losses -----------------------------------------------------------------------------------------------------


def ipo(*ratios, beta):
    """IPO at pairs of log-ratios (chosen, rejected); the references differ, so that their sign shows."""
    chosen, rejected = float64(*ratios).T
    refs = torch.full_like(chosen, -12.0), torch.full_like(chosen, -17.0)
    return four.ipo_loss(chosen + refs[0], rejected + refs[1], *refs, beta=beta).tolist()


def kto(*ratios, label, kl=0.7, **weights):
    """KTO at log-ratios of answers that all have one label; beta is 0.3."""
    refs = torch.full((len(ratios),), -12.0, dtype=torch.float64)
    labels = torch.full((len(ratios),), int(label))
    kl = torch.tensor(kl, dtype=torch.float64)
    return four.kto_loss(refs + float64(*ratios), refs, labels, kl, beta=0.3, **weights).tolist()


def test_ipo_at_the_reference_is_the_square_of_its_target():
    assert ipo((0, 0), (3, 3), beta=0.1) == pytest.approx([25, 25])  # (1 / 0.2)^2
    assert ipo((0, 0), beta=0.5) == pytest.approx([1])


def test_ipo_is_0_at_its_target_margin_and_grows_on_both_sides():
    for beta in (0.05, 0.1, 2.0):
        target = 1 / (2 * beta)
        losses = ipo((target, 0), (-1, -1 - target), (target + 3, 0), (target - 3, 0), beta=beta)
        assert losses == pytest.approx([0, 0, 9, 9], abs=1e-12)


def test_ipo_by_hand():
    # target 2: margins 1 and -3; target 5: margins 5 and -3
    assert ipo((1.5, 0.5), (-4, -1), beta=0.25) == pytest.approx([1, 25])
    assert ipo((2, -3), (-4, -1), beta=0.1) == pytest.approx([0, 64])


def test_swapping_the_labels_adds_twice_the_margin_over_beta_to_ipo():
    # (-h - t)^2 - (h - t)^2 = 4 h t, with t = 1 / (2 beta)
    points = [(0, 0), (2, -3), (-4, -1), (7.5, 7)]
    right, swapped = ipo(*points, beta=0.1), ipo(*[(r, c) for c, r in points], beta=0.1)
    expected = [2 * (c - r) / 0.1 for c, r in points]
    assert [s - r for s, r in zip(swapped, right, strict=True)] == pytest.approx(expected, abs=1e-9)


def test_kto_at_its_reference_point_is_half_the_weight():
    approx = lambda value: pytest.approx([value])
    for kl in (0.0, 0.7):
        assert kto(kl, label=True, kl=kl, desirable_weight=1.5, undesirable_weight=9.0) == approx(0.75)
        assert kto(kl, label=False, kl=kl, desirable_weight=9.0, undesirable_weight=3.0) == approx(1.5)
        assert kto(kl, label=True, kl=kl) == approx(0.5)
        assert kto(kl, label=False, kl=kl) == approx(0.5)


def test_kto_by_hand():
    # beta (r - z0) is 0.39 and -0.51: 1 / (1 + e^0.39) = 1 / 2.476981, 1 / (1 + e^-0.51) = 1 / 1.600496
    assert kto(2, -1, label=True) == pytest.approx([0.403717, 0.624806], abs=2e-6)
    assert kto(2, -1, label=False) == pytest.approx([0.596283, 0.375194], abs=2e-6)
    weights = {"desirable_weight": 2.0, "undesirable_weight": 5.0}
    assert kto(2, -1, label=True, **weights) == pytest.approx([0.807435, 1.249611], abs=1e-5)
    assert kto(2, -1, label=False, **weights) == pytest.approx([2.981413, 1.875972], abs=1e-5)


def test_kto_gives_every_answer_the_loss_of_its_own_label():
    ratios, labels = [2, -1, 2, -1], torch.tensor([1, 0, 0, 1])
    for kind in (torch.int64, torch.bool, torch.float32):
        found = four.kto_loss(
            float64(*ratios), float64(0, 0, 0, 0), labels.to(kind), float64(0.7)[0], beta=0.3
        )
        assert found.tolist() == pytest.approx([0.403717, 0.375194, 0.596283, 0.624806], abs=2e-6)


def test_negative_kl_counts_as_0_in_kto():
    # 1 / (1 + e^0.6): the reference point is 0, not -0.7
    for kl in (0.0, -0.7, -50.0):
        assert kto(2, label=True, kl=kl) == pytest.approx([0.354344], abs=2e-6)
        assert kto(2, label=False, kl=kl) == pytest.approx([0.645656], abs=2e-6)


def test_kto_sends_no_gradient_into_the_kl():
    kl, logps = torch.tensor(0.7, requires_grad=True), torch.tensor([1.0, -2.0], requires_grad=True)
    four.kto_loss(logps, torch.zeros(2), torch.tensor([1, 0]), kl, beta=0.3).sum().backward()
    assert kl.grad is None and logps.grad[0] < 0 < logps.grad[1]


def test_kto_of_both_labels_adds_up_to_1():
    ratios = (-9.0, -1.0, 0.2, 5.0)
    both = [kto(*ratios, label=label) for label in (True, False)]
    assert [good + bad for good, bad in zip(*both, strict=True)] == pytest.approx([1] * 4)


def test_simpo_at_equal_averages_is_softplus_of_gamma():
    for beta, share in ((2.0, 0.5), (2.5, 0.3), (10.0, 0.3)):
        averages = float64(-0.1, -3)
        losses = four.simpo_loss(averages, averages, beta=beta, gamma_beta_ratio=share)
        assert losses.tolist() == pytest.approx([softplus(beta * share)] * 2)


def test_simpo_by_hand():
    # 2 (1) - 1 = 1, 2 (-1) - 1 = -3 and, with gamma 0.6 and beta 3, 3 (0.5) - 0.6 = 0.9
    losses = four.simpo_loss(float64(-0.5, -1.5), float64(-1.5, -0.5), beta=2.0, gamma_beta_ratio=0.5)
    assert losses.tolist() == pytest.approx([0.313262, 3.048587], abs=2e-6)
    losses = four.simpo_loss(float64(-0.5), float64(-1.0), beta=3.0, gamma_beta_ratio=0.2)
    assert losses.tolist() == pytest.approx([0.341154], abs=2e-6)


def log_odds(x):
    """log p - log(1 - p) of p = e^x in float64; x counts as -1e-6 at most, where 1 - p is below float32."""
    return x - math.log(-math.expm1(min(x, -1e-6)))


def test_orpo_by_hand():
    # p = 1/2 against 1/4: odds 1 and 1/3, so -log sigma(log 3) = log(4/3); turned round, log 4
    half, quarter = float64(math.log(1 / 2)), float64(math.log(1 / 4))
    assert four.orpo_loss(half, quarter, beta=1.0).item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert four.orpo_loss(half, quarter, beta=0.5).item() == pytest.approx(math.log(4 / 3) / 2, rel=1e-6)
    assert four.orpo_loss(quarter, half, beta=1.0).item() == pytest.approx(math.log(4), rel=1e-6)


SPREAD = (-1e-7, -1e-5, -1e-3, -0.3, -0.69, -0.7, -1.5, -5.0, -50.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_orpo_is_right_from_sure_answers_to_impossible_ones_and_so_are_its_gradients(dtype):
    for chosen, rejected in itertools.product(SPREAD, SPREAD):
        two = [torch.tensor([x], dtype=dtype, requires_grad=True) for x in (chosen, rejected)]
        loss = four.orpo_loss(*two, beta=0.5)
        ratio = log_odds(chosen) - log_odds(rejected)
        assert loss.item() == pytest.approx(0.5 * softplus(-ratio), rel=1e-3), (chosen, rejected)
        # d log odds / dx = 1 / (1 - p); a sure answer, beyond float32's digits, has 1 instead
        slopes = [1 / -math.expm1(x) if x < -1e-6 else 1 for x in (chosen, rejected)]
        pull = 0.5 / (1 + math.exp(ratio))
        grads = [grad.item() for grad in torch.autograd.grad(loss.sum(), two)]
        expected = [-pull * slopes[0], pull * slopes[1]]
        assert grads == pytest.approx(expected, rel=2e-3, abs=1e-30), (chosen, rejected)


def test_orpo_gradients_are_those_of_finite_differences():
    # The loss itself is float32, too coarse for small steps: the differences are of the odds in float64.
    exact = lambda c, r: 0.5 * math.log1p(math.exp(log_odds(r) - log_odds(c)))
    for chosen, rejected in itertools.product((-0.01, -0.5, -0.8, -3.0), (-0.02, -0.6, -1.0, -8.0)):
        two = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (chosen, rejected)]
        grads = torch.autograd.grad(four.orpo_loss(*two, beta=0.5).sum(), two)
        h = 1e-6
        numerical = [
            (exact(chosen + h, rejected) - exact(chosen - h, rejected)) / (2 * h),
            (exact(chosen, rejected + h) - exact(chosen, rejected - h)) / (2 * h),
        ]
        assert [grad.item() for grad in grads] == pytest.approx(numerical, rel=1e-4)


def test_orpo_of_a_batch_with_sure_and_impossible_answers_has_no_nan():
    chosen = torch.tensor([0.0, -1e-7, -50.0, -1.0, 0.0], requires_grad=True)
    rejected = torch.tensor([-50.0, 0.0, -1e-5, -1.0, 0.0], requires_grad=True)
    losses = four.orpo_loss(chosen, rejected, beta=0.5)
    losses.sum().backward()
    assert all(torch.isfinite(x).all() for x in (losses, chosen.grad, rejected.grad))
    assert (chosen.grad <= 0).all() and (rejected.grad >= 0).all() and chosen.grad[2] < -0.4


def test_orpo_of_equal_averages_is_beta_ln_2():
    averages = torch.tensor(SPREAD)
    losses = four.orpo_loss(averages, averages.clone(), beta=0.7)
    assert losses.tolist() == pytest.approx([0.7 * LN2] * len(SPREAD))


def test_swapping_the_labels_adds_beta_times_the_log_odds_ratio_to_orpo():
    chosen, rejected = torch.tensor([-0.2, -2.0]), torch.tensor([-1.0, -0.01])
    added = four.orpo_loss(rejected, chosen, beta=0.5) - four.orpo_loss(chosen, rejected, beta=0.5)
    ratios = [log_odds(-0.2) - log_odds(-1.0), log_odds(-2.0) - log_odds(-0.01)]
    assert added.tolist() == pytest.approx([0.5 * x for x in ratios], rel=1e-5)


def test_orpo_of_bfloat16_averages_keeps_the_digits_of_float32():
    chosen, rejected = torch.tensor([-0.0078125]), torch.tensor([-0.015625])  # exact in bfloat16
    low = four.orpo_loss(chosen.bfloat16(), rejected.bfloat16(), beta=0.5)
    expected = 0.5 * softplus(log_odds(-0.015625) - log_odds(-0.0078125))
    assert low.dtype == torch.float32 and low.item() == pytest.approx(expected, rel=1e-5)


# On both sides of -ln 2, where the branch changes.
NEGATIVE = (-2e-6, -1e-4, -0.1, -0.5, -0.693, -LN2, -0.6932, -0.7, -1.0, -5.0, -30.0, -50.0, -700.0)


def test_log1mexp_keeps_its_digits_on_both_sides_of_minus_ln_2():
    def exact(x):
        return math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))

    expected = [exact(x) for x in NEGATIVE]
    assert exact(-LN2) == pytest.approx(-LN2, rel=1e-15) and exact(-50.0) < 0  # 1 - 1/2, and no 0
    assert four.log1mexp(float64(*NEGATIVE)).tolist() == pytest.approx(expected, rel=1e-14, abs=0)
    rounded = torch.tensor([x for x in NEGATIVE if x > -80])  # e^-80 is about float32's smallest
    expected = [exact(x) for x in rounded.tolist()]
    assert four.log1mexp(rounded).tolist() == pytest.approx(expected, rel=1e-6, abs=0)


def test_log1mexp_of_a_certain_answer_is_that_of_minus_a_millionth_without_gradient():
    x = float64(0.0, -1e-9, -1e-7).requires_grad_()
    values = four.log1mexp(x)
    values.sum().backward()
    assert values.tolist() == pytest.approx([-13.8155111] * 3, abs=1e-6)  # log 1e-6 - 0.5e-6
    assert x.grad.tolist() == [0, 0, 0]


def test_gradients_of_the_losses_are_those_of_finite_differences():
    chosen, rejected = float64(-3.0, -0.4, -7.5, -1.0), float64(-2.0, -4.0, -8.0, -1.0)
    refs, labels = (float64(-2.5, -1.0, -7.0, -1.0), float64(-2.2, -3.0, -9.0, -1.0)), [1, 0, 1, 0]
    kl, two = float64(0.7)[0], (chosen.requires_grad_(), rejected.requires_grad_())
    losses = {
        "ipo": (lambda c, r: four.ipo_loss(c, r, *refs, beta=0.1), two),
        "ipo, references": (lambda c, r: four.ipo_loss(*refs, c, r, beta=0.1), two),
        "kto": (
            lambda x: four.kto_loss(
                x, refs[0], torch.tensor(labels), kl, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5
            ),
            two[:1],
        ),
        "simpo": (lambda c, r: four.simpo_loss(c, r, beta=2.0, gamma_beta_ratio=0.5), two),
        "log1mexp": (four.log1mexp, (float64(-0.01, -0.6, -0.69, -0.7, -3.0, -40.0).requires_grad_(),)),
    }
    for name, (function, inputs) in losses.items():
        assert torch.autograd.gradcheck(function, inputs), name


def test_pairwise_accuracy_is_a_double_loop_with_ties_one_half():
    good, bad = [0.3, 0.1, -2.0, 0.5], [0.1, 0.10001, 0.7, -3.0, 0.5]  # 0.1 and 0.10001 are a tie, too
    wins = 0.0
    for one, other in itertools.product(good, bad):
        wins += 0.5 if abs(one - other) < 5e-5 else float(one > other)
    found = four.pairwise_accuracy(torch.tensor(good), torch.tensor(bad))
    assert found == pytest.approx(wins / 20) and 0.4 < found < 0.6 and found != 0.5
    assert four.pairwise_accuracy(torch.tensor([1.0]), torch.tensor([0.0, 2.0, 3.0])) == pytest.approx(1 / 3)


# Models and data --------------------------------------------------------------------------------------------


@functools.cache
def stock(name):
    """A model as plain transformers loads it: nothing in here knows of packed rows."""
    folder = Path(four.__file__).parent / name
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@functools.cache
def token_logps(name, input_ids):
    """Log-probs (float64, numpy) of all tokens of one sequence but its first, the shift written out."""
    ids = torch.tensor([input_ids])
    with torch.no_grad():
        logprobs = stock(name)(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return [logprobs[n - 1, token].item() for n, token in enumerate(input_ids) if n]


def logp(name, sequence):
    """The sum of the log-probs of a sequence's trained tokens."""
    every = token_logps(name, tuple(sequence.input_ids.tolist()))
    return sum(every[n - 1] for n in np.flatnonzero(sequence.trained))


@pytest.fixture(scope="session")
def near(tmp_path_factory):
    """tiny/sft with a little noise on its weights: log-ratios of about 1, where no loss is saturated."""
    folder = tmp_path_factory.mktemp("near") / "model"
    shutil.copytree(Path(four.__file__).parent / "tiny" / "sft", folder)
    weights, rng = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3)
    for name, weight in weights.items():
        noise = torch.randn(weight.shape, generator=rng)
        weights[name] = (weight.float() * (1 + 0.05 * noise)).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@functools.cache
def tiny_rows(name="preference_train"):
    path = Path(four.__file__).parent / "tiny" / "data" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[:100]]


@functools.cache
def tiny_tokenizer():
    return four.load_tokenizer(four.Args())


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def load(tmp_path):
    """load(rows, held_out, **flags) -> answers, labels, held-out answers, their labels; KTO by default."""

    def run(rows, held_out=None, **flags):
        flags = {"algorithm": "kto", "dataset": (write_rows(tmp_path / "rows.jsonl", rows),)} | flags
        if held_out:
            flags["eval_dataset"] = write_rows(tmp_path / "held_out.jsonl", held_out)
        return four.load_answers(tiny_tokenizer(), four.Args(**flags))

    return run


def text_of(sequence, trained):
    return tiny_tokenizer().decode(sequence.input_ids[sequence.trained == trained])


def unpaired(number, answer, label):
    ask = [{"role": "user", "content": f"What is {number} and 2?"}]
    return {"prompt": ask, "completion": [{"role": "assistant", "content": answer}], "label": label}


def paired(number, good, bad):
    ask = [{"role": "user", "content": f"What is {number} and 2?"}]
    return {"prompt": ask, "chosen": good, "rejected": bad}


def keys_of(answers):
    return [
        sequence.input_ids.tobytes() + sequence.trained.tobytes() for item in answers for sequence in item
    ]


def numbers_of(answers):
    """The numbers that the prompts ask about."""
    return [
        int(re.search(r"is (\d+) and", tiny_tokenizer().decode(item[0].input_ids))[1]) for item in answers
    ]


def test_unpaired_rows_are_single_answers_with_their_labels(load):
    rows = [unpaired(1, "It is 3.", True), unpaired(5, "It is 8.", False), unpaired(6, "8", True)]
    answers, labels, held_out, _ = load(rows)
    assert [len(item) for item in answers] == [1, 1, 1] and labels.tolist() == [[1], [0], [1]]
    assert [text_of(item[0], True) for item in answers] == [
        "It is 3.<|im_end|>",
        "It is 8.<|im_end|>",
        "8<|im_end|>",
    ]
    assert numbers_of(answers) == [1, 5, 6] and held_out == []
    assert "It is 3" not in text_of(answers[0][0], False)


def test_unpaired_texts_questions_and_numbers_as_labels_are_taken(load):
    rows = [
        {"prompt": "5 and 2 are", "completion": " 8", "label": 0},
        {"question": "What is 1 and 2?", "completion": "3", "label": 1},
    ]
    answers, labels, *_ = load(rows)
    assert labels.tolist() == [[0], [1]]
    assert [text_of(item[0], True) for item in answers] == [" 8<|im_end|>", "3<|im_end|>"]
    assert text_of(answers[0][0], False) == "5 and 2 are"
    # A question is a user's turn, as in a conversation.
    asked = [{"role": "user", "content": "What is 1 and 2?"}]
    [same, _], *_ = load([{"prompt": asked, "completion": "3", "label": True}, rows[0]])
    assert np.array_equal(same[0].input_ids, answers[1][0].input_ids)


def test_pairs_are_taken_apart_for_kto_and_for_no_other(load):
    rows = [paired(1, "It is 3.", "4"), paired(5, "7", "It is 8."), paired(6, "8", "9")]
    answers, labels, *_ = load(rows)
    assert labels.tolist() == [[1], [0]] * 3 and len(answers) == 6
    texts = [text_of(item[0], True).removesuffix("<|im_end|>") for item in answers]
    assert texts == ["It is 3.", "4", "7", "It is 8.", "8", "9"] and numbers_of(answers) == [1, 1, 5, 5, 6, 6]
    for algorithm in ("ipo", "simpo", "orpo"):
        pairs, labels, *_ = load(rows, algorithm=algorithm)
        assert labels.tolist() == [[1, 0]] * 3 and keys_of(pairs) == keys_of(answers)


def test_unpaired_and_paired_sources_are_trained_on_together(load, tmp_path):
    one = write_rows(tmp_path / "one.jsonl", [unpaired(1, "It is 4.", False), unpaired(2, "4", True)])
    other = write_rows(tmp_path / "other.jsonl", [paired(5, "7", "8")])
    args = four.Args(algorithm="kto", dataset=(one, other))
    answers, labels, *_ = four.load_answers(tiny_tokenizer(), args)
    assert numbers_of(answers) == [1, 2, 5, 5] and labels.tolist() == [[0], [1], [1], [0]]


def test_pairs_stay_pairs_where_kto_evaluates_on_them(load):
    rows, others = [unpaired(1, "3", True), unpaired(5, "8", False)], [paired(n, "a", "b") for n in (7, 8, 9)]
    answers, _, held_out, labels = load(rows, others, num_eval=2)
    assert [len(item) for item in answers] == [1, 1] and [len(item) for item in held_out] == [2, 2]
    assert labels.tolist() == [[1, 0], [1, 0]] and numbers_of(held_out) == [7, 8]


def test_kto_evaluates_on_unpaired_rows_with_both_labels_only(load, capsys):
    rows = [unpaired(1, "3", True), unpaired(5, "8", False)]
    others = [unpaired(7, "9", True), unpaired(8, "10", True), unpaired(9, "12", False)]
    _, _, held_out, labels = load(rows, others, num_eval=0)
    assert labels.tolist() == [[1], [1], [0]] and numbers_of(held_out) == [7, 8, 9]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        load(rows, others, num_eval=2)
    assert stop.value.code == 2 and "nothing to compare" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["unpaired", "paired"])
def test_held_out_fraction_keeps_a_prompt_on_one_side_with_the_labels_of_its_answers(load, kind):
    rows = [
        row
        for n in range(10, 16)
        for row in (
            [unpaired(n, f"yes {n}", True), unpaired(n, f"no {n}", False), unpaired(n, f"no, {n}", False)]
            if kind == "unpaired"
            else [paired(n, f"yes {n}", f"no {n}")]
        )
    ]
    sides, each = set(), 3 if kind == "unpaired" else 2
    for seed in range(4):
        answers, labels, held_out, held_out_labels = load(rows, eval_fraction=0.4, seed=seed, num_eval=0)
        here, there = set(numbers_of(answers)), set(numbers_of(held_out))
        assert not here & there and here | there == set(range(10, 16)) and len(there) == 3  # 2.4, rounded up
        assert len(answers) == len(held_out) == 3 * each
        for items, side in ((answers, labels), (held_out, held_out_labels)):
            good = [text_of(item[0], True).startswith("yes") for item in items]
            assert side[:, 0].astype(bool).tolist() == good
        sides.add(frozenset(there))
    assert len(sides) > 1
    assert len(load(rows, eval_fraction=0.4, num_eval=5)[2]) == 5


def test_dropped_answers_are_counted_and_take_their_labels_with_them(load, capsys):
    rows = [
        unpaired(1, "3", True),
        unpaired(1, "3", True),
        unpaired(2, "4 " * 60, False),
        unpaired(5, "8", False),
        unpaired(6, "8", True),
    ]
    answers, labels, *_ = load(rows, max_length=60)
    told = capsys.readouterr().out
    assert numbers_of(answers) == [1, 5, 6] and labels.tolist() == [[1], [0], [1]]
    for part in ("3 answers, 2 of them desirable", "1 dropped as duplicates", "1 dropped as longer than 60"):
        assert part in told
    assert load(rows, max_length=60, dedupe=False)[1].tolist() == [[1], [1], [0], [1]]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        load(rows, max_length=3)
    assert stop.value.code == 2 and "no answer fits --max-length 3" in capsys.readouterr().err


def test_overlong_single_answers_are_cut_on_request(load, capsys):
    rows = [unpaired(1, "3", True), unpaired(2, "4 " * 60, False)]
    answers, labels, *_ = load(rows, max_length=60, overlong="truncate")
    assert labels.tolist() == [[1], [0]] and numbers_of(answers) == [1, 2]
    assert len(answers[1]) == 1 and len(answers[1][0].input_ids) == len(answers[1][0].trained) == 60
    assert answers[1][0].trained[-1] and "1 cut to 60 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": "a", "completion": "b"},
        {"completion": "b", "label": True},
        {"prompt": "a", "label": True},
        {"prompt": "a", "completion": "b", "label": "yes"},
        {"prompt": "a", "completion": "b", "label": "true"},
        {"prompt": "a", "completion": "b", "label": None},
        {"prompt": "a", "completion": "b", "label": 2},
        {"prompt": "a", "completion": "b", "label": [True]},
    ],
    ids=str,
)
def test_rows_that_are_not_unpaired_are_named_with_their_columns(load, capsys, bad):
    with pytest.raises(SystemExit) as stop:
        load([{"prompt": "a", "completion": "b", "label": True}, bad])
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "rows.jsonl, row 2:" in line and ", ".join(bad) in line
    assert "prompt + completion + label" in line


@pytest.mark.parametrize("algorithm", ["ipo", "simpo", "orpo"])
def test_unpaired_rows_are_refused_where_pairs_are_compared(load, capsys, algorithm):
    with pytest.raises(SystemExit) as stop:
        load([unpaired(1, "3", True)], algorithm=algorithm)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "rows.jsonl, row 1:" in line and "prompt, completion, label" in line
    assert "prompt + chosen + rejected" in line


@pytest.mark.parametrize(
    "algorithm, position, bad",
    [
        pytest.param("kto", 1, 5),
        pytest.param("ipo", 1, 5),
        pytest.param("kto", 1, None),
        pytest.param("ipo", 1, None),
        pytest.param("kto", 2, 5),
        pytest.param("kto", 2, "text"),
        pytest.param("kto", 2, None),
        ("kto", 1, "text"),
        ("ipo", 1, "text"),
        ("ipo", 2, 5),
    ],
)
def test_rows_that_are_no_objects_are_named(load, capsys, algorithm, position, bad):
    rows = [unpaired(1, "3", True) if algorithm == "kto" else paired(1, "3", "4")]
    rows.insert(position - 1, bad)
    with pytest.raises(SystemExit) as stop:
        load(rows, algorithm=algorithm)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"rows.jsonl, row {position}:" in line


# KTO's mismatched answers and weights -----------------------------------------------------------------------


def singles(prompts):
    """An answer to each prompt, a number: prompts and answers of 2 to 4 tokens, no two answers alike."""
    answers = []
    for n, prompt in enumerate(prompts):
        begin, end = [10 + prompt] * (2 + prompt % 3), [100 + n] * (2 + n % 3)
        trained = [False] * len(begin) + [True] * len(end)
        if len(end) > 2:
            trained[-2] = False  # as between two turns
        trained = np.array(trained)
        answers.append((four.Sequence(np.array(begin + end, np.int32), trained),))
    return answers


def parts_of(answer):
    """Prompt, completion and the completion's trained marks of an answer of `singles`, by the token ids."""
    ids, trained = answer[0]
    first = int(np.argmax(ids >= 100))
    return ids[:first].tolist(), ids[first:].tolist(), trained[first:].tolist(), trained[:first].any()


RUNS = [
    [0, 1],
    [0, 0, 0, 1],
    [1, 0, 0, 0],
    [0, 0, 1, 1, 0],
    [0, 1, 2, 3],
    [2, 2, 0, 1, 1, 1, 2, 2],
    [0, 1] * 4,
]
RUNS += [np.random.default_rng(seed).integers(0, 3, 20).tolist() for seed in range(5)]


@pytest.mark.parametrize("prompts", RUNS, ids=str)
def test_mismatched_answer_is_whole_and_to_another_prompt(prompts):
    answers = singles(prompts)
    found = four.mismatch(answers, 1024)
    assert len(found) == len(answers)
    whole = [parts_of(answer) for answer in answers]
    for n, (prompt, completion, trained, prompt_trained) in enumerate(map(parts_of, found)):
        assert prompt == whole[n][0] and not prompt_trained
        [taken] = [k for k, other in enumerate(whole) if other[1] == completion]
        assert trained == whole[taken][2] and prompts[taken] != prompts[n]


def test_mismatched_answer_is_the_last_one_before_with_another_prompt():
    def taken(prompts):
        return [parts_of(answer)[1][0] - 100 for answer in four.mismatch(singles(prompts), 1024)]

    assert taken([0, 1, 2, 3]) == [3, 0, 1, 2]
    assert taken([0, 0, 0, 1]) == [3, 3, 3, 2]
    assert taken([0, 0, 1, 1, 0]) == [3, 3, 1, 1, 3]
    assert taken([1, 0, 0, 1]) == [2, 0, 0, 2]


def test_mismatched_answer_is_cut_to_the_longest_sequence_but_not_its_prompt():
    answers = singles([0, 1, 2, 4, 3, 5])
    for longest in (5, 6):
        cut, whole = (four.mismatch(answers, n) for n in (longest, 1024))
        for (one,), (other,) in zip(cut, whole, strict=True):
            assert len(one.input_ids) == min(longest, len(other.input_ids)) == len(one.trained)
            assert np.array_equal(one.input_ids, other.input_ids[:longest])
            assert np.array_equal(one.trained, other.trained[:longest]) and one.trained.any()
        assert any(len(other.input_ids) > longest for (other,) in whole)


def test_mismatched_answers_of_tiny_put_one_rows_completion_behind_another_rows_prompt(load):
    rows = tiny_rows("unpaired_train")[:40]
    mismatched = four.mismatch(load(rows)[0], 1024)
    for n, (sequence,) in enumerate(mismatched):
        assert rows[n]["prompt"][-1]["content"] in text_of(sequence, False)
        assert text_of(sequence, True) == rows[n - 1]["completion"][0]["content"] + "<|im_end|>"
        assert rows[n - 1]["prompt"] != rows[n]["prompt"]


def test_one_prompt_alone_gives_kto_no_kl(capsys):
    with pytest.raises(SystemExit) as stop:
        four.mismatch(singles([4, 4, 4]), 1024)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "all prompts are the same" in line


def told_weights(capsys, desirable, undesirable, *weights):
    labels = np.array([[1]] * desirable + [[0]] * undesirable)
    flags = dict(zip(("desirable_weight", "undesirable_weight"), weights))
    four.check_weights(labels, four.Args(algorithm="kto", **flags))
    [line] = capsys.readouterr().out.splitlines()
    return line


def test_weights_that_keep_the_rule_are_told_without_a_warning(capsys):
    for case, ratio in (
        ((5, 5), "1"),
        ((4, 3), "1.33"),  # 4/3 itself
        ((6, 5), "1.2"),
        ((2, 8, 1.0, 0.2), "1.25"),  # 2 (1) / (8 (0.2))
        ((9, 3, 0.4, 1.0), "1.2"),
    ):
        line = told_weights(capsys, *case)
        assert "warning" not in line and f"weighted ratio {ratio}," in line
        assert f"{case[0]} desirable, {case[1]} not" in line


def test_weights_that_break_the_rule_are_warned_of_with_those_that_keep_it(capsys):
    for case, ratio, low, high in (
        ((8, 4), "2", 1.5, 2),  # 8 / (4 x) = 4/3 at 1.5, 1 at 2
        ((4, 8), "0.5", 0.375, 0.5),
        ((8, 4, 3.0, 1.0), "6", 4.5, 6),
        ((8, 4, 1.0, 3.0), "0.667", 1.5, 2),  # what the undesirable weight is now plays no part
    ):
        line = told_weights(capsys, *case)
        assert line.startswith("warning: ") and f"weighted ratio {ratio}," in line
        found = re.search(r"--undesirable-weight in \[(\S+), (\S+)\]", line)
        assert [float(x) for x in found.groups()] == pytest.approx([low, high])


def test_both_ends_of_the_range_that_is_advised_keep_the_rule(capsys):
    rng = np.random.default_rng(0)
    for _ in range(40):
        good, bad, weight = (
            int(rng.integers(20, 900)),
            int(rng.integers(20, 900)),
            float(rng.choice([1, 0.3])),
        )
        line = told_weights(capsys, good, bad, weight, 50.0)
        ends = [float(x) for x in re.search(r"in \[(\S+), (\S+)\]", line).groups()]
        for undesirable in (*ends, sum(ends) / 2):
            again = told_weights(capsys, good, bad, weight, undesirable)
            assert "warning" not in again, (good, bad, weight, undesirable, again)


@pytest.mark.parametrize("label", [0, 1])
def test_one_label_alone_is_no_data_for_kto(capsys, label):
    with pytest.raises(SystemExit) as stop:
        four.check_weights(np.array([[label]] * 3), four.Args(algorithm="kto"))
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and re.search(rf"{3 * label} answers are desirable, {3 - 3 * label}", line)


# Runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(monkeypatch, tmp_path, one_cpu):
    """train(rows, held_out, **flags) -> lines of metrics.jsonl; train.loads: the models that were loaded."""
    load_model = four.load_model

    def loaded(name, *rest):
        run.loads.append(name)
        return load_model(name, *rest)

    def run(rows, held_out=None, **flags):
        run.count += 1
        defaults = {"dataset": (write_rows(tmp_path / f"train_{run.count}.jsonl", rows),)}
        defaults |= {"output_dir": str(tmp_path / f"run_{run.count}"), "cache_dir": str(tmp_path / "cache")}
        defaults |= {"batch_size": len(rows), "max_steps": 1, "eval_every": 0, "num_eval": 4, "save_every": 0}
        defaults |= {"max_completion_length": 4, "warmup_steps": 0, "lr_schedule": "constant"}
        if held_out:
            defaults["eval_dataset"] = write_rows(tmp_path / "held_out.jsonl", held_out)
        args = four.Args(**(defaults | flags))
        run.folder, run.loads = Path(args.output_dir), []
        four.main(args)
        return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]

    run.count, run.loads = 0, []
    monkeypatch.setattr(four, "load_model", loaded)
    return run


def rows_for(algorithm, count=6):
    """Rows of tiny/ that suit an algorithm; for KTO more of them undesirable than not, the first one, too."""
    return tiny_rows("unpaired_train" if algorithm == "kto" else "preference_train")[:count]


def means(values):
    return sum(values) / len(values)


def pair_losses(algorithm, pairs, model, ref, **flags):
    """Losses of pairs by a plain loop, with the papers' terms written in another way than the script's."""
    losses = []
    for pair in pairs:
        chosen, rejected = (logp(model, answer) for answer in pair)
        one, other = (int(answer.trained.sum()) for answer in pair)
        if algorithm == "ipo":
            ref_chosen, ref_rejected = (logp(ref, answer) for answer in pair)
            if not flags.get("ipo_length_average"):
                one = other = 1
            h = (chosen - ref_chosen) / one - (rejected - ref_rejected) / other
            losses.append(h**2 - h / 0.1 + 25)  # (h - 5)^2
        elif algorithm == "simpo":
            losses.append(softplus(0.6 - 3.0 * chosen / one + 3.0 * rejected / other))  # gamma 0.2 x 3
        else:
            odds = [p / (1 - p) for p in (math.exp(chosen / one), math.exp(rejected / other))]
            losses.append(0.8 * math.log(1 + odds[1] / odds[0]))
    return losses


def mean_nll(model, answers, whole=False):
    """The mean over all tokens of the answers, not over the answers; `whole` is with their prompts."""
    if whole:
        answers = [four.Sequence(s.input_ids, np.arange(len(s.trained)) > 0) for s in answers]
    return -sum(logp(model, s) for s in answers) / sum(int(s.trained.sum()) for s in answers)


PLAIN = {"ipo": {"beta": 0.1}, "simpo": {"beta": 3.0, "gamma_beta_ratio": 0.2}, "orpo": {"beta": 0.8}}


@pytest.mark.parametrize("budget", [8192, 150])
@pytest.mark.parametrize(
    "algorithm, flags",
    [
        pytest.param("ipo", {}, id="ipo"),
        pytest.param("ipo", {"ipo_length_average": True}, id="ipo-average"),
        pytest.param("ipo", {"sft_coef": 2.5}, id="ipo-sft"),
        pytest.param("simpo", {}, id="simpo"),
        pytest.param("simpo", {"sft_coef": 0.5}, id="simpo-sft"),
        pytest.param("orpo", {"orpo_nll": "full"}, id="orpo-full"),
        pytest.param("orpo", {"orpo_nll": "response"}, id="orpo-response"),
    ],
)
def test_first_step_of_pairs_is_a_plain_loop_over_the_stock_model(
    train, load, near, algorithm, flags, budget
):
    rows, model, ref = rows_for(algorithm), near, "tiny/sft"
    pairs = load(rows, algorithm=algorithm)[0]
    own = flags | PLAIN[algorithm] | ({"ref_model": ref} if algorithm == "ipo" else {})
    lines = train(rows, algorithm=algorithm, model=model, max_tokens_per_micro_batch=budget, **own)
    losses = pair_losses(algorithm, pairs, model, ref, **flags)
    loss, chosen = means(losses), [pair.chosen for pair in pairs]
    if algorithm == "orpo":
        loss += mean_nll(model, chosen, whole=flags["orpo_nll"] == "full")
    nll = mean_nll(model, chosen)
    loss += flags.get("sft_coef", 0) * nll
    assert nll > 0.05 and lines[1]["loss"] == pytest.approx(loss, rel=1e-4)

    beta, both = PLAIN[algorithm]["beta"], []
    for pair in pairs:
        rewards = []
        for answer in pair:
            start = logp(ref, answer) if algorithm == "ipo" else 0
            sums = algorithm == "ipo" and not flags.get("ipo_length_average")
            rewards.append(beta * (logp(model, answer) - start) / (1 if sums else answer.trained.sum()))
        both.append(rewards)
    chosen_rewards, rejected_rewards = zip(*both, strict=True)
    expected = {
        "rewards/chosen": means(chosen_rewards),
        "rewards/rejected": means(rejected_rewards),
        "rewards/margins": means(chosen_rewards) - means(rejected_rewards),
        "rewards/accuracies": means([c > r for c, r in both]),
        "logps/chosen": means([logp(model, pair.chosen) for pair in pairs]),
        "logps/rejected": means([logp(model, pair.rejected) for pair in pairs]),
        "logps/chosen_drift": 0.0,
    }
    assert {key: lines[1][key] for key in expected} == pytest.approx(expected, abs=1e-3)
    assert "kl" not in lines[1]


def kto_by_hand(labels, ratios, kl, beta, weights=(1.0, 1.0)):
    """Losses by the definition, and whether each answer is on the right side of the reference point."""
    point, losses, right = max(kl, 0), [], []
    for ratio, [label] in zip(ratios, labels.tolist(), strict=True):
        above = ratio - point if label else point - ratio
        losses.append((weights[0] if label else weights[1]) / (1 + math.exp(beta * above)))
        right.append(above > 0)
    return losses, right


def mismatched_kl(answers, model, ref, batch=None):
    """The mean of log pi/ref of each prompt with the completion of the row before, one after another."""
    found = []
    for n in range(len(answers))[:batch]:
        (own,), (other,) = answers[n], answers[n - 1]
        prompt = own.input_ids[~own.trained][: int(own.trained.argmax())]
        start = int(other.trained.argmax())
        ids = np.concatenate([prompt, other.input_ids[start:]])
        trained = np.concatenate([np.zeros(len(prompt), bool), other.trained[start:]])
        sequence = four.Sequence(ids, trained)
        found.append(logp(model, sequence) - logp(ref, sequence))
    return means(found)


@pytest.mark.parametrize("budget", [8192, 100])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("flags", [{}, {"weights": (1.5, 0.7)}, {"sft_coef": 2.5}], ids=str)
def test_first_step_of_kto_is_a_plain_loop_over_the_stock_model(train, load, near, flags, direction, budget):
    rows, (model, ref) = rows_for("kto", 7), (near, "tiny/sft")[::direction]
    answers, labels, *_ = load(rows)
    weights, coef = flags.get("weights", (1.0, 1.0)), flags.get("sft_coef", 0.0)
    more = {"desirable_weight": weights[0], "undesirable_weight": weights[1], "sft_coef": coef}
    more |= {"model": model, "ref_model": ref, "beta": 0.4, "max_tokens_per_micro_batch": budget}
    lines = train(rows, algorithm="kto", **more)
    kl = mismatched_kl(answers, model, ref)
    assert abs(kl) > 0.1 and lines[1]["kl"] == pytest.approx(max(kl, 0), abs=1e-3)

    ratios = [logp(model, item[0]) - logp(ref, item[0]) for item in answers]
    losses, _ = kto_by_hand(labels, ratios, kl, 0.4, weights)
    good = [n for n, [label] in enumerate(labels) if label]
    bad = [n for n, [label] in enumerate(labels) if not label]
    assert len(good) != len(bad) and good and bad  # each has its own number in the means
    loss = means(losses) + coef * mean_nll(model, [answers[n][0] for n in good])
    assert lines[1]["loss"] == pytest.approx(loss, rel=1e-4)
    chosen, rejected = (0.4 * means([ratios[n] for n in side]) for side in (good, bad))
    expected = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/ties": 0.0,
        "logps/chosen": means([logp(model, answers[n][0]) for n in good]),
        "logps/rejected": means([logp(model, answers[n][0]) for n in bad]),
        "logps/chosen_drift": 0.0,
    }
    assert {key: lines[1][key] for key in expected} == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("direction", [1, -1])
def test_accuracy_of_kto_is_the_share_on_the_right_side_of_the_losss_reference_point(
    train, load, near, direction
):
    rows, (model, ref) = rows_for("kto", 30), (near, "tiny/sft")[::direction]
    answers, labels, *_ = load(rows)
    [_, line] = train(rows, algorithm="kto", model=model, ref_model=ref, beta=0.4)
    kl = mismatched_kl(answers, model, ref)
    ratios = [logp(model, item[0]) - logp(ref, item[0]) for item in answers]
    _, right = kto_by_hand(labels, ratios, kl, 0.4)
    between = [kl < r < 0 for r in ratios]
    assert line["rewards/accuracies"] == pytest.approx(means(right))
    assert kl > 0 or any(between)  # else the test shows nothing


def test_kl_of_kto_is_that_of_the_optimizer_batch_and_takes_answers_from_outside_it(train, load, near):
    rows = rows_for("kto", 8)
    answers = load(rows)[0]
    expected = mismatched_kl(answers, near, "tiny/sft", batch=3)  # the first one takes the answer of the last
    assert abs(expected - mismatched_kl(answers, near, "tiny/sft")) > 0.05
    assert abs(expected - mismatched_kl(answers[:3], near, "tiny/sft")) > 0.05
    for budget in (8192, 60):
        flags = {"model": near, "ref_model": "tiny/sft", "order": "given", "batch_size": 3}
        lines = train(rows, algorithm="kto", max_tokens_per_micro_batch=budget, **flags)
        assert lines[1]["kl"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_run_of_the_starting_policy_as_reference_begins_there_and_learns(train, algorithm):
    rows = rows_for(algorithm, 4)
    lines = train(rows, rows_for("ipo", 4), algorithm=algorithm, max_steps=3, learning_rate=1e-4)
    start = {"ipo": 25, "kto": 0.5}.get(algorithm)
    assert start is None or lines[1]["loss"] == pytest.approx(start, rel=1e-3)
    assert all(math.isfinite(x) for line in lines for x in line.values())
    assert lines[1]["loss"] > lines[2]["loss"] > lines[3]["loss"]  # the same answers in every batch
    assert lines[3]["rewards/margins"] > lines[1]["rewards/margins"]
    drift = lines[3]["logps/chosen"] - lines[1]["logps/chosen"]
    assert lines[3]["logps/chosen_drift"] == pytest.approx(drift, abs=1e-3) and abs(drift) > 1e-3
    assert lines[0]["eval/accuracy"] == 0.5 or algorithm in ("simpo", "orpo")
    if algorithm == "kto":
        assert lines[1]["kl"] == pytest.approx(0, abs=1e-3)


TIMES = ("tokens_per_second", "step_time")
PACKING = ("num_tokens", "packing/fill")


def assert_same_metrics(one, other, without=TIMES, tolerance=1e-4):
    assert len(one) == len(other)
    for line, wanted in zip(one, other, strict=True):
        assert line.keys() == wanted.keys()
        keys = [key for key in wanted if key not in without]
        assert [line[key] for key in keys] == pytest.approx(
            [wanted[key] for key in keys], rel=1e-4, abs=tolerance
        )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_settings_of_memory_and_the_order_of_columns_do_not_change_the_metrics(train, algorithm):
    rows, held_out = rows_for(algorithm, 7), rows_for("ipo", 24)[20:]
    flags = {"algorithm": algorithm, "max_steps": 3, "batch_size": 4, "learning_rate": 3e-4}
    plain = train(rows, held_out, **flags)
    assert len({line["loss"] for line in plain[1:]}) == 3
    changes = [{"max_tokens_per_micro_batch": 128}, {"gradient_checkpointing": True}, {}]
    changes += [] if algorithm == "kto" else [{"share_prompt": True}]
    turned = [dict(reversed(row.items())) for row in rows]  # rejected before chosen, label before prompt
    for change in changes:
        lines = train(rows if change else turned, held_out, **flags, **change)
        assert_same_metrics(lines, plain, (*TIMES, *PACKING))
        saved = plain[-1]["num_tokens"] - lines[-1]["num_tokens"]
        assert saved > 0 if "share_prompt" in change else saved == 0


@pytest.mark.parametrize("algorithm", ["ipo", "simpo", "orpo"])
def test_swapped_answers_swap_what_is_logged_of_them(train, near, algorithm):
    rows = rows_for(algorithm)
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    flags = {"algorithm": algorithm, "model": near} | (
        {"ref_model": "tiny/sft"} if algorithm == "ipo" else {}
    )
    one, other = train(rows, **flags)[1], train(swapped, **flags)[1]
    for name in ("rewards", "logps"):
        for key, opposite in (("chosen", "rejected"), ("rejected", "chosen")):
            assert one[f"{name}/{key}"] == pytest.approx(other[f"{name}/{opposite}"], abs=1e-4)
    assert one["rewards/margins"] == pytest.approx(-other["rewards/margins"], abs=1e-4)
    assert one["rewards/accuracies"] == pytest.approx(1 - other["rewards/accuracies"])
    assert abs(one["rewards/margins"]) > 1e-2 and one["loss"] != pytest.approx(other["loss"], rel=1e-2)


@pytest.mark.parametrize(
    "orpo_nll, share_prompt",
    [
        ("full", False),
        ("response", False),
        ("response", True),
        pytest.param("full", True),
    ],
)
def test_rows_of_orpo_keep_the_token_budget(train, monkeypatch, orpo_nll, share_prompt):
    sizes, token_logprobs = [], four.token_logprobs

    def counted(model, batch, **rest):
        sizes.append(batch.input_ids.shape[1])
        return token_logprobs(model, batch, **rest)

    monkeypatch.setattr(four, "token_logprobs", counted)
    flags = {"orpo_nll": orpo_nll, "share_prompt": share_prompt, "max_tokens_per_micro_batch": 230}
    train(rows_for("orpo", 12), algorithm="orpo", **flags)
    assert len(sizes) > 4 and max(sizes) <= 230  # no pair of these has as many tokens by itself


@pytest.mark.parametrize(
    "algorithm, other, loads",
    [("simpo", False, 1), ("orpo", False, 1), ("ipo", False, 1), ("kto", False, 1)]
    + [("ipo", True, 2), ("kto", True, 2)],
)
def test_models_that_a_run_loads(train, near, tmp_path, algorithm, other, loads):
    flags = {"ref_model": near} if other else {}
    for _ in range(2):  # with an empty cache, and with a full one
        train(rows_for(algorithm, 4), rows_for("ipo", 24)[20:], algorithm=algorithm, **flags)
        assert train.loads == ["tiny/sft", near][:loads]
    cached = len(list((tmp_path / "cache").iterdir()))
    # under the start, and where there is a reference under it as well: held-out and mismatched answers
    assert cached == {"simpo": 1, "orpo": 1, "ipo": 2, "kto": 3}[algorithm] + other


def test_reference_free_runs_ask_for_no_log_probs_but_those_at_the_start(train, monkeypatch):
    asked, cached_logps = [], four.cached_logps
    monkeypatch.setattr(four, "cached_logps", lambda *rest: asked.append(rest[0]) or cached_logps(*rest))
    for algorithm in ("simpo", "orpo"):
        asked.clear()
        train(rows_for(algorithm, 4), rows_for("ipo", 24)[20:], algorithm=algorithm)
        assert asked == ["tiny/sft"]


@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_continued_run_is_the_uninterrupted_one_though_its_cache_is_lost(train, tmp_path, algorithm, lost):
    rows = rows_for(algorithm, 7)
    flags = {"algorithm": algorithm, "batch_size": 3, "learning_rate": 3e-4, "save_every": 2}
    whole = train(rows, max_steps=4, **flags)
    train(rows, max_steps=2, **flags)
    if lost:
        shutil.rmtree(tmp_path / "cache")
    lines = train(rows, max_steps=4, output_dir=str(train.folder), resume=True, **flags)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert_same_metrics(lines, whole, tolerance=1e-6)
    assert abs(lines[-1]["logps/chosen_drift"]) > 1e-3


@pytest.mark.parametrize("first, then", [("ipo", "kto"), ("kto", "ipo")])
def test_pairs_and_the_same_pairs_taken_apart_share_a_cache_folder(train, first, then):
    rows = rows_for("ipo", 4)
    flags = {"ipo": {"batch_size": 4}, "kto": {"batch_size": 8}}  # both take all answers, in one order
    train(rows, algorithm=first, **flags[first])
    lines = train(rows, algorithm=then, **flags[then])
    assert lines[1]["loss"] == pytest.approx({"ipo": 25, "kto": 0.5}[then], rel=1e-3)
    assert lines[1]["logps/chosen_drift"] == pytest.approx(0, abs=1e-3)


def test_length_averaged_ipo_divides_log_ratios_by_each_answers_own_tokens(train, load, near):
    # TRL averages policy and reference over the completion's tokens, then takes (delta - 1 / (2 beta))^2.
    rows = [paired(7, "It is 9, as far as I can see.", "10"), paired(8, "10", "It is 11, I think.")]
    pairs, ratios = load(rows, algorithm="ipo")[0], []
    for pair in pairs:
        per_token = []
        for answer in pair:
            policy, ref = (token_logps(n, tuple(answer.input_ids.tolist())) for n in (near, "tiny/sft"))
            at = [n - 1 for n in np.flatnonzero(answer.trained)]
            per_token.append(means([policy[n] for n in at]) - means([ref[n] for n in at]))
        ratios.append(per_token)
    flags = {"algorithm": "ipo", "model": near, "ref_model": "tiny/sft", "beta": 0.25}
    lines, plain = (train(rows, ipo_length_average=average, **flags) for average in (True, False))
    expected = means([(chosen - rejected - 2) ** 2 for chosen, rejected in ratios])
    assert lines[1]["loss"] == pytest.approx(expected, rel=1e-4)
    assert plain[1]["loss"] != pytest.approx(expected, rel=0.1)
    assert lines[1]["rewards/chosen"] == pytest.approx(0.25 * means([c for c, _ in ratios]), abs=1e-4)


def test_weights_of_kto_scale_the_gradients_of_their_own_label(train, near):
    rows = rows_for("kto", 7)
    flags = {"algorithm": "kto", "model": near, "ref_model": "tiny/sft", "max_grad_norm": 1e9, "beta": 0.4}
    norm = lambda **weights: train(rows, **flags, **weights)[1]["grad_norm"]
    both = norm()
    good, bad = norm(undesirable_weight=1e-9), norm(desirable_weight=1e-9)
    assert norm(desirable_weight=3.0, undesirable_weight=1e-9) == pytest.approx(3 * good, rel=1e-3)
    assert norm(desirable_weight=3.0, undesirable_weight=3.0) == pytest.approx(3 * both, rel=1e-3)
    assert min(good, bad) > 0 and abs(good - bad) <= both * 1.001 <= (good + bad) * 1.002


# Evaluation -------------------------------------------------------------------------------------------------


def test_unpaired_answers_are_evaluated_by_a_double_loop_over_good_and_bad(train, load, near):
    rows, others = rows_for("kto", 4), tiny_rows("unpaired_eval")[:9]
    _, _, held_out, labels = load(rows, others)
    lines = train(rows, others, algorithm="kto", model=near, ref_model="tiny/sft", beta=0.4, num_eval=0)
    ratios = [logp(near, item[0]) - logp("tiny/sft", item[0]) for item in held_out]
    good = [r for r, [label] in zip(ratios, labels.tolist(), strict=True) if label]
    bad = [r for r, [label] in zip(ratios, labels.tolist(), strict=True) if not label]
    expected = {
        "eval/accuracy": means([float(one > other) for one in good for other in bad]),
        "eval/margin": 0.4 * (means(good) - means(bad)),
        "eval/chosen_log_ratio": means(good),
    }
    assert len(good) != len(bad) and 0 < expected["eval/accuracy"] < 1
    assert {key: lines[0][key] for key in expected} == pytest.approx(expected, abs=1e-3)
    assert "eval/accuracy_length_matched" not in lines[0]
    samples = [json.loads(line) for line in (train.folder / "samples.jsonl").read_text().splitlines()]
    asked = [sample["prompt"] for sample in samples if sample["step"] == 0]
    wanted = [row["prompt"][-1]["content"] for row in others if row["label"]]  # only good ones have an answer
    assert len(asked) == len(wanted) and all(w in a for w, a in zip(wanted, asked, strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_held_out_pairs_are_compared_by_what_the_algorithm_compares(train, load, near, algorithm):
    rows, others = rows_for(algorithm, 4), tiny_rows("preference_eval")[:12]
    pairs = load(rows, others, algorithm=algorithm)[2]
    model, with_reference = near, algorithm in ("ipo", "kto")
    flags = {"beta": 0.4, "num_eval": 0} | ({"ref_model": "tiny/sft"} if with_reference else {})
    lines = train(rows, others, algorithm=algorithm, model=model, **flags)
    margins = []
    for pair in pairs:
        if with_reference:
            rewards = [logp(model, answer) - logp("tiny/sft", answer) for answer in pair]
        else:
            rewards = [logp(model, answer) / answer.trained.sum() for answer in pair]
        margins.append(0.4 * (rewards[0] - rewards[1]))
    alike = [
        abs(one - other) <= 0.1 * max(one, other)
        for one, other in ([int(answer.trained.sum()) for answer in pair] for pair in pairs)
    ]
    right = [float(margin > 0) for margin in margins]
    assert any(alike) and 0 < means(right)
    expected = {
        "eval/accuracy": means(right),
        "eval/accuracy_length_matched": means([r for r, same in zip(right, alike, strict=True) if same]),
        "eval/margin": means(margins),
    }
    assert {key: lines[0][key] for key in expected} == pytest.approx(expected, abs=1e-3)
    assert ("eval/chosen_log_ratio" in lines[0]) == with_reference


# Errors -----------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """refused(pattern, rows, **flags): one line on stderr, exit status 2, no model, nothing written."""

    def run(pattern, rows=None, **flags):
        monkeypatch.setattr(four, "load_model", lambda *_: pytest.fail("a model was loaded"))
        rows = rows or rows_for(flags.get("algorithm"), 4)
        defaults = {"dataset": (write_rows(tmp_path / "rows.jsonl", rows),)}
        defaults |= {"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache")}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            four.main(four.Args(**(defaults | flags)))
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1, lines
        assert lines[0].startswith("error: ") and re.search(pattern, lines[0]), lines[0]
        assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()

    return run


@pytest.mark.parametrize(
    "pattern, flags",
    [
        (r"--ref-model means nothing to --algorithm simpo", {"algorithm": "simpo", "ref_model": "tiny/base"}),
        (r"--ref-model means nothing to --algorithm orpo", {"algorithm": "orpo", "ref_model": "tiny/base"}),
        (r"--ipo-length-average .* kto", {"algorithm": "kto", "ipo_length_average": True}),
        (r"--ipo-length-average .* simpo", {"algorithm": "simpo", "ipo_length_average": True}),
        (r"orpo has the NLL .*--beta", {"algorithm": "orpo", "sft_coef": 0.1}),
        (r"--share-prompt is for pairs", {"algorithm": "kto", "share_prompt": True}),
        (r"--beta must be above 0", {"beta": 0.0}),
        (r"--beta must be above 0", {"algorithm": "simpo", "beta": -1.0}),
        (r"--desirable-weight must be above 0", {"algorithm": "kto", "desirable_weight": 0.0}),
        (r"--undesirable-weight must be above 0", {"algorithm": "kto", "undesirable_weight": -1.0}),
        (r"--eval-fraction and --eval-dataset", {"eval_fraction": 0.1, "eval_dataset": "a.jsonl"}),
        (r"--eval-fraction must lie in", {"eval_fraction": 1.0}),
        (r"--eval-fraction must lie in", {"eval_fraction": -0.1}),
        (r"--eval-fraction 0\.99 leaves no pair", {"algorithm": "kto", "eval_fraction": 0.99}),
        (r"--batch-size must be at least 1", {"batch_size": 0}),
        (r"--resume needs --output-dir", {"resume": True, "output_dir": None}),
        (r"--ref-model \./nowhere: no such folder", {"algorithm": "kto", "ref_model": "./nowhere"}),
    ],
)
def test_mistakes_end_the_run_with_one_line_before_a_model_is_loaded(refused, pattern, flags):
    refused(pattern, **flags)


def test_data_that_kto_cannot_learn_from_is_refused_before_a_model_is_loaded(refused):
    one_prompt = [unpaired(1, "3", True), unpaired(1, "4", False), unpaired(1, "5", False)]
    refused(r"all prompts are the same", one_prompt, algorithm="kto")
    refused(r"all prompts are the same", [paired(1, "3", "4")], algorithm="kto")
    one_label = [unpaired(n, "3", True) for n in (1, 2)]
    refused(r"2 answers are desirable, 0 are not", one_label, algorithm="kto")
    not_boolean = [unpaired(1, "3", True), unpaired(2, "4", "no")]
    refused(r"rows\.jsonl, row 2: .*prompt, completion, label", not_boolean, algorithm="kto")


def test_default_beta_is_the_one_that_the_help_names_and_another_is_kept():
    told = re.search(
        r"ORPO's lambda; by default (\S+), (\S+), (\S+) and (\S+)\.\"", Path(four.__file__).read_text()
    )
    found = [four.Args(algorithm=algorithm).beta for algorithm in ALGORITHMS]
    assert found == [float(x) for x in told.groups()] and min(found) > 0
    assert four.Args(algorithm="simpo", beta=0.25).beta == 0.25


def test_default_data_suits_the_algorithm():
    for algorithm in ALGORITHMS:
        args = four.Args(algorithm=algorithm)
        kind = "unpaired" if algorithm == "kto" else "preference"
        assert args.dataset == (f"tiny/data/{kind}_train.jsonl",)
        assert args.eval_dataset == "tiny/data/preference_eval.jsonl"
        assert four.Args(algorithm=algorithm, eval_fraction=0.1).eval_dataset is None
