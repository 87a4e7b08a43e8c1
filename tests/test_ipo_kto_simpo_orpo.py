"""ipo_kto_simpo_orpo.py against numbers worked by hand and a loop over the stock model."""

import functools
import itertools
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, read_lines, write_rows
from helpers import calls_of, error_of, trainer
from safetensors.torch import load_file, save_file
from samples import asked, float64, said, softplus, stock, tiny_rows, tiny_tokenizer

import ipo_kto_simpo_orpo as four

ALGORITHMS = ("ipo", "kto", "simpo", "orpo")
cached = functools.cache(stock)
pytestmark = pytest.mark.usefixtures("process_group")


def ipo(*ratios, beta):
    """IPO at pairs of log-ratios (chosen, rejected)."""
    return four.ipo_loss(*float64(*ratios).T, beta=beta).tolist()


def simpo(*averages, beta, share):
    """SimPO at pairs of averaged log-probs."""
    return four.simpo_loss(*float64(*averages).T, beta=beta, gamma_beta_ratio=share).tolist()


def kto(*ratios, label, kl=0.7, desirable_weight=1.0, undesirable_weight=1.0):
    """KTO at log-ratios of answers that all have one label; beta is 0.3."""
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    labels, kl = torch.full((len(ratios),), int(label)), torch.tensor(kl, dtype=torch.float64)
    return four.kto_loss(float64(*ratios), labels, kl, beta=0.3, **weights).tolist()


def test_ipo_by_hand_and_0_at_its_target_margin():
    for beta in (0.05, 0.1, 2.0):
        target = 1 / (2 * beta)
        losses = ipo((target, 0), (-1, -1 - target), (target + 3, 0), (target - 3, 0), beta=beta)
        assert losses == pytest.approx([0, 0, 9, 9], abs=1e-12)
    # target 2: margins 1 and -3; target 5: margins 0, 5 and -3
    assert ipo((1.5, 0.5), (-4, -1), beta=0.25) == pytest.approx([1, 25])
    assert ipo((3, 3), (2, -3), (-4, -1), beta=0.1) == pytest.approx([25, 0, 64])


def test_simpo_by_hand_and_softplus_of_gamma_at_equal_averages():
    for beta, share in ((2.0, 0.5), (2.5, 0.3), (10.0, 0.3)):
        losses = simpo((-0.1, -0.1), (-3, -3), beta=beta, share=share)
        assert losses == pytest.approx([softplus(beta * share)] * 2)
    # 2 (1) - 1 = 1, 2 (-1) - 1 = -3 and, with gamma 0.6 and beta 3, 3 (0.5) - 0.6 = 0.9
    losses = simpo((-0.5, -1.5), (-1.5, -0.5), beta=2.0, share=0.5)
    assert losses == pytest.approx([0.313262, 3.048587], abs=2e-6)
    assert simpo((-0.5, -1.0), beta=3.0, share=0.2) == pytest.approx([0.341154], abs=2e-6)


def test_kto_by_hand_and_half_the_weight_at_its_reference_point():
    approx = lambda value: pytest.approx([value])
    for kl in (0.0, 0.7):
        assert kto(kl, label=True, kl=kl, desirable_weight=1.5, undesirable_weight=9.0) == approx(0.75)
        assert kto(kl, label=False, kl=kl, desirable_weight=9.0, undesirable_weight=3.0) == approx(1.5)
    # beta (r - z0) is 0.39 and -0.51: 1 / (1 + e^0.39) = 1 / 2.476981, 1 / (1 + e^-0.51) = 1 / 1.600496
    assert kto(2, -1, label=True) == pytest.approx([0.403717, 0.624806], abs=2e-6)
    assert kto(2, -1, label=False) == pytest.approx([0.596283, 0.375194], abs=2e-6)
    weights = {"desirable_weight": 2.0, "undesirable_weight": 5.0}
    assert kto(2, -1, label=True, **weights) == pytest.approx([0.807435, 1.249611], abs=1e-5)
    assert kto(2, -1, label=False, **weights) == pytest.approx([2.981413, 1.875972], abs=1e-5)


def test_kto_sends_no_gradient_into_the_kl():
    kl, ratios = torch.tensor(0.7, requires_grad=True), torch.tensor([1.0, -2.0], requires_grad=True)
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    four.kto_loss(ratios, torch.tensor([1, 0]), kl, beta=0.3, **weights).sum().backward()
    assert kl.grad is None and ratios.grad[0] < 0 < ratios.grad[1]


def log_odds(x):
    """log p - log(1 - p) of p = e^x in float64; x counts as -1e-6 at most, where 1 - p is below float32."""
    return x - math.log(-math.expm1(min(x, -1e-6)))


def test_orpo_by_hand():
    # p = 1/2 against 1/4: odds 1 and 1/3, so -log sigma(log 3) = log(4/3); turned round, log 4
    half, quarter = float64(math.log(1 / 2)), float64(math.log(1 / 4))
    assert four.orpo_loss(half, quarter, beta=1.0).item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert four.orpo_loss(half, quarter, beta=0.5).item() == pytest.approx(math.log(4 / 3) / 2, rel=1e-6)
    assert four.orpo_loss(quarter, half, beta=1.0).item() == pytest.approx(math.log(4), rel=1e-6)


SPREAD = (0.0, -1e-7, -1e-5, -1e-3, -0.3, -0.69, -0.7, -1.5, -5.0, -50.0)


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


# Models and data --------------------------------------------------------------------------------------------


@functools.cache
def token_logps(name, input_ids):
    """Log-probs (float64, numpy) of all tokens of one sequence but its first, the shift written out."""
    ids = torch.tensor([input_ids])
    with torch.no_grad():
        logprobs = cached(name)(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return [logprobs[n - 1, token].item() for n, token in enumerate(input_ids) if n]


def logp(name, sequence):
    """The sum of the log-probs of a sequence's trained tokens."""
    every = token_logps(name, tuple(sequence.input_ids.tolist()))
    return sum(every[n - 1] for n in np.flatnonzero(sequence.trained))


@pytest.fixture(scope="session")
def near(tmp_path_factory):
    """tiny/sft with a little noise on its weights: log-ratios of about 1, where no loss is saturated."""
    folder = tmp_path_factory.mktemp("near") / "model"
    shutil.copytree(ROOT / "tiny" / "sft", folder)
    weights, rng = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3)
    for name, weight in weights.items():
        noise = torch.randn(weight.shape, generator=rng)
        weights[name] = (weight.float() * (1 + 0.05 * noise)).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture
def load(tmp_path):
    """load(rows, **flags) -> answers and labels of each example; KTO by default."""

    def run(rows, limit=0, **flags):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        args = four.Args(**{"algorithm": "kto", "dataset": (path,)} | flags)
        examples = four.load_labelled(tiny_tokenizer(), path, "train", args, limit)
        return [answers for answers, _ in examples], [list(labels) for _, labels in examples]

    return run


def text_of(sequence, trained):
    return tiny_tokenizer().decode(sequence.input_ids[sequence.trained == trained])


def unpaired(number, answer, label):
    return {"prompt": asked(f"What is {number} and 2?"), "completion": said(answer), "label": label}


def numbers_of(answers):
    """The numbers that the prompts ask about."""
    texts = [tiny_tokenizer().decode(item[0].input_ids) for item in answers]
    return [int(re.search(r"is (\d+) and", text)[1]) for text in texts]


def test_unpaired_rows_are_single_answers_with_their_labels(load):
    rows = [unpaired(1, "It is 3.", True), {"prompt": "5 and 2 are", "completion": " so 8", "label": 0}]
    answers, labels = load(rows)
    assert [len(item) for item in answers] == [1, 1] and labels == [[1], [0]]
    assert [text_of(item[0], True) for item in answers] == ["It is 3.<|im_end|>", " so 8<|im_end|>"]
    assert text_of(answers[1][0], False) == "5 and 2 are" and "It is 3" not in text_of(answers[0][0], False)


def test_dropped_answers_are_counted_and_take_their_labels_with_them(load, capsys):
    cases = [(1, "3", True), (1, "3", True), (1, "3", False)]  # the same again, and another judge's
    cases += [(2, "4 " * 60, False), (3, "", True), (5, "8", False), (6, "8", True)]
    rows = [unpaired(*case) for case in cases]
    answers, labels = load(rows, max_length=60)
    assert numbers_of(answers) == [1, 1, 5, 6] and labels == [[1], [0], [0], [1]]
    told = capsys.readouterr().out
    assert "4 different examples, 2 answers of them good" in told
    assert "first row 4: longer than --max-length" in told and "first row 5: an assistant turn" in told


BAD = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "label": "yes"}]


@pytest.mark.parametrize("algorithm, bad", [*[("kto", bad) for bad in BAD], ("ipo", unpaired(1, "3", True))])
def test_rows_that_are_not_understood_are_named_with_their_columns(load, capsys, algorithm, bad):
    line = error_of(lambda: load([bad], algorithm=algorithm), capsys)
    assert "first row 1" in line and all(name in line for name in bad)
    assert ("prompt + completion + label" in line) == (algorithm == "kto")
    assert "prompt + chosen + rejected" in line


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


def mismatch(answers, which=None, **flags):
    return four.mismatch(answers, range(len(answers)) if which is None else which, four.Args(**flags))


def test_mismatched_answer_is_the_last_one_before_with_another_prompt_in_a_seeded_order(monkeypatch):
    def taken(prompts):
        return [parts_of(answer)[1][0] - 100 for answer in mismatch(singles(prompts))]

    assert taken([0, 1, 2, 3, 4, 5]) != [5, 0, 1, 2, 3, 4]
    monkeypatch.setattr(four.np.random, "default_rng", lambda _: np)
    monkeypatch.setattr(np, "permutation", np.arange, raising=False)
    assert taken([0, 1, 2, 3]) == [3, 0, 1, 2]
    assert taken([0, 0, 0, 1]) == [3, 3, 3, 2]
    assert taken([0, 0, 1, 1, 0]) == [3, 3, 1, 1, 3]
    assert taken([1, 0, 0, 1]) == [2, 0, 0, 2]


def test_donors_of_pairs_that_were_taken_apart_have_both_labels():
    answers = singles([n // 2 for n in range(200)])  # good and bad answers in turn, as of pairs
    found, again, other = mismatch(answers), mismatch(answers), mismatch(answers, seed=2)
    donors = [[parts_of(answer)[1][0] - 100 for answer in some] for some in (found, again, other)]
    assert donors[0] == donors[1] != donors[2]
    assert 0.4 < np.mean(np.array(donors[0]) % 2) < 0.6
    some = mismatch(answers, [7, 3])
    assert [parts_of(answer) for answer in some] == [parts_of(found[n]) for n in (7, 3)]


# Runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path, one_cpu):
    """As `trainer` says: one step of all rows."""
    flags = {"max_steps": 1, "num_eval": 0, "max_completion_length": 0, "lr_schedule": "constant"}
    train = trainer(four, tmp_path, **flags)
    return lambda rows, *rest, **flags: train(rows, *rest, **{"batch_size": len(rows)} | flags)


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


def mean_nll(model, answers):
    """The mean over all tokens of the answers, not over the answers."""
    return -sum(logp(model, s) for s in answers) / sum(int(s.trained.sum()) for s in answers)


def pair_metrics(chosen, rejected, accuracy):
    """What a step says of the rewards of its answers."""
    chosen, rejected = means(chosen), means(rejected)
    wanted = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected, "accuracies": accuracy}
    return {f"rewards/{name}": value for name, value in wanted.items()}


PLAIN = {"ipo": {"beta": 0.1}, "simpo": {"beta": 3.0, "gamma_beta_ratio": 0.2}, "orpo": {"beta": 0.8}}


FIRST = [("ipo", {}), ("ipo", {"ipo_length_average": True}), ("simpo", {"sft_coef": 0.5}), ("orpo", {})]


@pytest.mark.parametrize("algorithm, flags", FIRST)
def test_first_step_of_pairs_is_a_plain_loop_over_the_stock_model(train, load, near, algorithm, flags):
    rows, model, ref = rows_for(algorithm), near, "tiny/sft"
    pairs = [four.Pair(*answers) for answers in load(rows, algorithm=algorithm)[0]]
    own = flags | PLAIN[algorithm] | ({"ref_model": ref} if algorithm == "ipo" else {})
    _, [line] = train(rows, algorithm=algorithm, model=model, max_tokens_per_micro_batch=150, **own)
    losses = pair_losses(algorithm, pairs, model, ref, **flags)
    loss, chosen = means(losses), [pair.chosen for pair in pairs]
    nll = mean_nll(model, chosen)
    loss += (1 if algorithm == "orpo" else flags.get("sft_coef", 0)) * nll
    assert nll > 0.05 and line["loss"] == pytest.approx(loss, rel=1e-4)

    def reward(answer):
        start = logp(ref, answer) if algorithm == "ipo" else 0
        sums = algorithm == "ipo" and not flags.get("ipo_length_average")
        return (
            PLAIN[algorithm]["beta"] * (logp(model, answer) - start) / (1 if sums else answer.trained.sum())
        )

    rewards = [[reward(pair[side]) for pair in pairs] for side in (0, 1)]
    expected = pair_metrics(*rewards, means([c > r for c, r in zip(*rewards, strict=True)]))
    expected["logps/chosen"] = means([logp(model, pair.chosen) for pair in pairs])
    expected["logps/rejected"] = means([logp(model, pair.rejected) for pair in pairs])
    if algorithm == "ipo":
        expected["logps/chosen_drift"] = means([logp(model, y) - logp(ref, y) for y in chosen])
    assert {key: line[key] for key in expected} == pytest.approx(expected, abs=1e-3)
    assert "kl" not in line and ("logps/chosen_drift" in line) == (algorithm == "ipo")


def kto_by_hand(labels, ratios, kl, beta, weights=(1.0, 1.0)):
    """Losses by the definition, and whether each answer is on the right side of the reference point."""
    point, losses, right = max(kl, 0), [], []
    for ratio, [label] in zip(ratios, labels, strict=True):
        above = ratio - point if label else point - ratio
        losses.append((weights[0] if label else weights[1]) / (1 + math.exp(beta * above)))
        right.append(above > 0)
    return losses, right


def mismatched_kl(answers, model, ref, which=None):
    """The mean of log pi/ref of prompts with the completions of other rows, one after another."""
    found = [sequence for (sequence,) in mismatch(answers, which)]
    return means([logp(model, sequence) - logp(ref, sequence) for sequence in found])


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("flags", [{}, {"weights": (1.5, 0.7), "sft_coef": 2.5}], ids=str)
def test_first_step_of_kto_is_a_plain_loop_over_the_stock_model(train, load, near, flags, direction):
    rows, (model, ref) = rows_for("kto", 7), (near, "tiny/sft")[::direction]
    answers, labels = load(rows)
    weights, coef = flags.get("weights", (1.0, 1.0)), flags.get("sft_coef", 0.0)
    more = {"desirable_weight": weights[0], "undesirable_weight": weights[1], "sft_coef": coef}
    more |= {"model": model, "ref_model": ref, "beta": 0.4, "max_tokens_per_micro_batch": 100}
    _, [line] = train(rows, algorithm="kto", **more)
    kl = mismatched_kl(answers, model, ref)
    assert abs(kl) > 0.1 and line["kl"] == pytest.approx(kl, abs=1e-3)  # as it is, before its clamp

    ratios = [logp(model, item[0]) - logp(ref, item[0]) for item in answers]
    losses, right = kto_by_hand(labels, ratios, kl, 0.4, weights)
    good = [n for n, [label] in enumerate(labels) if label]
    bad = [n for n, [label] in enumerate(labels) if not label]
    assert len(good) != len(bad) and good and bad  # each has its own number in the means
    loss = means(losses) + coef * mean_nll(model, [answers[n][0] for n in good])
    assert line["loss"] == pytest.approx(loss, rel=1e-4)
    expected = pair_metrics(*([0.4 * ratios[n] for n in side] for side in (good, bad)), means(right))
    expected["logps/chosen"] = means([logp(model, answers[n][0]) for n in good])
    expected["logps/rejected"] = means([logp(model, answers[n][0]) for n in bad])
    expected["logps/chosen_drift"] = means([ratios[n] for n in good])
    assert {key: line[key] for key in expected} == pytest.approx(expected, abs=1e-3)


def test_pairs_are_taken_apart_for_kto(train, load):
    rows = rows_for("ipo", 4)
    _, [line] = train(rows, algorithm="kto", batch_size=8)  # all answers, in one order
    pairs = load(rows)[0]
    assert line["loss"] == pytest.approx(0.5, rel=1e-3) and line["epoch"] == 1
    expected = [means([logp("tiny/sft", pair[side]) for pair in pairs]) for side in (0, 1)]
    assert [line["logps/chosen"], line["logps/rejected"]] == pytest.approx(expected, abs=1e-3)


def test_kl_of_kto_is_that_of_the_optimizer_batch_and_takes_answers_from_outside_it(train, load, near):
    rows = rows_for("kto", 8)
    answers = load(rows)[0]
    picked = np.random.default_rng(1).permutation(8)[:3]  # the first batch
    expected = mismatched_kl(answers, near, "tiny/sft", picked)
    assert abs(expected - mismatched_kl(answers, near, "tiny/sft")) > 0.05
    flags = {"model": near, "ref_model": "tiny/sft", "batch_size": 3, "max_tokens_per_micro_batch": 60}
    _, [line] = train(rows, algorithm="kto", **flags)
    assert line["kl"] == pytest.approx(expected, abs=1e-3)


def test_metrics_of_a_label_that_a_batch_has_not_are_not_logged(train):
    _, lines = train(rows_for("kto", 8), algorithm="kto", batch_size=1, max_steps=8)
    for line in lines:
        [side] = {"chosen", "rejected"} & {key.removeprefix("logps/") for key in line}
        assert f"rewards/{side}" in line and "rewards/margins" not in line and "rewards/accuracies" in line
    assert len({tuple(line) for line in lines}) == 2  # each label came


PASSES = [  # algorithm, flags, models that are loaded, passes of the reference
    ("simpo", {}, 1, 0),
    ("orpo", {}, 1, 0),
    ("ipo", {}, 1, 2),  # training and held-out pairs
    ("kto", {}, 1, 3),  # mismatched answers besides
    ("kto", {"ref_model": "tiny/base"}, 2, 3),
]


@pytest.mark.parametrize("algorithm, flags, loads, passes", PASSES)
def test_models_and_passes_before_a_run_trains(train, monkeypatch, algorithm, flags, loads, passes):
    loaded, found = calls_of(monkeypatch, four, "load_model"), calls_of(monkeypatch, four, "pair_logps")
    passes_so_far = lambda *_: {"passes": sum(len(pairs[:1]) for (_, pairs, *_), _ in found)}
    monkeypatch.setattr(four, "evaluate_labelled", lambda *_: (passes_so_far(), []))
    _, lines = train(rows_for(algorithm, 4), rows_for("ipo", 24)[20:], algorithm=algorithm, **flags)
    assert [arguments[0] for arguments, _ in loaded] == ["tiny/sft", "tiny/base"][:loads]
    assert lines[0]["passes"] == passes


def test_unpaired_answers_are_evaluated_by_a_double_loop_over_good_and_bad(train, load, near):
    rows, others = rows_for("kto", 4), tiny_rows("unpaired_eval")[:9]
    held_out, labels = load(others)
    flags = {"model": near, "ref_model": "tiny/sft", "beta": 0.4, "max_completion_length": 4}
    folder, lines = train(rows, others, algorithm="kto", **flags)
    ratios = [logp(near, item[0]) - logp("tiny/sft", item[0]) for item in held_out]
    good, bad = ([r for r, [y] in zip(ratios, labels, strict=True) if y == side] for side in (1, 0))
    expected = {
        "eval/accuracy": means([float(one > other) for one in good for other in bad]),
        "eval/margin": 0.4 * (means(good) - means(bad)),
        "eval/chosen_log_ratio": means(good),
    }
    assert len(good) != len(bad) and 0 < expected["eval/accuracy"] < 1
    assert {key: lines[0][key] for key in expected} == pytest.approx(expected, abs=1e-3)
    assert "eval/accuracy_length_matched" not in lines[0]
    prompts = [x["prompt"] for x in read_lines(folder / "samples.jsonl") if x["step"] == 0]
    wanted = [row["prompt"][-1]["content"] for row in others if row["label"]]  # only good ones have an answer
    assert all(w in prompt for w, prompt in zip(wanted, prompts, strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_held_out_pairs_are_compared_by_what_the_algorithm_compares(train, load, near, algorithm):
    rows, others = rows_for(algorithm, 4), tiny_rows("preference_eval")[:12]
    pairs = load(others, algorithm=algorithm)[0]
    model, with_reference = near, algorithm in ("ipo", "kto")
    flags = {"beta": 0.4} | ({"ref_model": "tiny/sft"} if with_reference else {})
    _, lines = train(rows, others, algorithm=algorithm, model=model, **flags)
    if with_reference:
        reward = lambda answer: 0.4 * (logp(model, answer) - logp("tiny/sft", answer))
    else:
        reward = lambda answer: 0.4 * logp(model, answer) / answer.trained.sum()
    margins = [reward(chosen) - reward(rejected) for chosen, rejected in pairs]
    counts = [[int(answer.trained.sum()) for answer in pair] for pair in pairs]
    alike = [abs(one - other) <= 0.1 * max(one, other) for one, other in counts]
    right = [float(margin > 0) for margin in margins]
    assert any(alike) and 0 < means(right)
    expected = {
        "eval/accuracy": means(right),
        "eval/accuracy_length_matched": means([r for r, same in zip(right, alike, strict=True) if same]),
        "eval/margin": means(margins),
    }
    assert {key: lines[0][key] for key in expected} == pytest.approx(expected, abs=1e-3)
    assert ("eval/chosen_log_ratio" in lines[0]) == with_reference


def test_data_that_kto_cannot_learn_from_is_refused_before_a_model_is_loaded(train, monkeypatch, capsys):
    monkeypatch.setattr(four, "load_model", lambda *_: pytest.fail("a model was loaded"))
    for told, rows in (
        ("all prompts are the same", [unpaired(1, "3", True), unpaired(1, "4", False)]),
        ("2 answers are desirable, 0 are not", [unpaired(n, "3", True) for n in (1, 2)]),
    ):
        assert told in error_of(lambda rows=rows: train(rows, algorithm="kto"), capsys)
