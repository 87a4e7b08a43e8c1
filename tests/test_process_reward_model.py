"""process_reward_model.py against numbers worked by hand and the stock classifier on one prefix at a time."""

import json
import zlib

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, read_lines, write_rows
from helpers import error_of, rewards, trainer
from samples import CPU, END, asked, float64, gradient_norm, said, stock_classifier, tiny_rows, tiny_tokenizer
from transformers import AutoTokenizer

import process_reward_model as prm
from common import collate

ROWS = tiny_rows("steps_train")
pytestmark = pytest.mark.usefixtures("one_cpu", "process_group")


def test_step_loss_by_hand_of_hard_and_soft_labels():
    # ln(1 + e^-2), ln(1 + e^-1) + 1, ln 2, 0.3 ln(1 + e^-2) + 0.7 (ln(1 + e^-2) + 2)
    losses = prm.step_loss(float64(2, 1, 0, 2), float64(1, 0, 0.4, 0.3))
    assert losses.tolist() == pytest.approx([0.126928, 1.313262, 0.693147, 1.526928], abs=2e-6)
    far = prm.step_loss(torch.tensor([300.0, -300.0, 300.0]), torch.tensor([1.0, 1.0, 0.5]))
    assert far.tolist() == pytest.approx([0, 300, 150])


def test_aggregates_by_hand():
    steps = float64(0.9, 0.5, 0.8)
    found = {how: prm.aggregate_steps(steps, how).item() for how in ("min", "product", "last", "mean")}
    assert found == pytest.approx({"min": 0.5, "product": 0.36, "last": 0.8, "mean": 2.2 / 3})
    for how in found:
        assert prm.aggregate_steps(float64(0.3), how).item() == pytest.approx(0.3)


def test_shepherd_labels_are_a_share_or_whether_any_is_right():
    for outcomes, soft, hard in (([0.0, 1.0, 0.0, 0.0], 0.25, 1), ([0.0, 0.0], 0, 0), ([1.0] * 3, 1, 1)):
        assert prm.shepherd_label(outcomes, "soft") == soft
        assert prm.shepherd_label(outcomes, "hard") == hard


def test_first_error_scores_by_hand():
    # with an error: 2 of 3 found; without: 1 of 2 left alone; F1 2 (2/3) (1/2) / (7/6) = 4/7
    found, f1 = prm.first_error_scores([0, 2, 3, -1, 1], [0, 2, 1, -1, -1])
    assert (found, f1) == (pytest.approx(3 / 5), pytest.approx(4 / 7))
    # shares 1/4 and 1: no mean but the harmonic one
    found, f1 = prm.first_error_scores([0, 0, 0, 0, -1], [0, 1, 2, 3, -1])
    assert (found, f1) == (pytest.approx(2 / 5), pytest.approx(0.4))


def test_majority_takes_the_first_of_the_most_frequent_answers():
    answers = np.array([list("57757"), list("57755"), list("abcdc")])
    assert prm.votes(answers).tolist() == [[2, 3, 3, 2, 3], [3, 2, 2, 3, 3], [1, 1, 2, 1, 2]]
    right = np.array([list("01101"), list("10011"), list("00101")]) == "1"
    assert prm.best_of(5, right, prm.votes(answers)) == 1
    assert prm.best_of(5, ~right, prm.votes(answers)) == 0


def steps_of(prompt, steps, tokenizer=None):
    return prm.encode_steps(tokenizer or tiny_tokenizer(), {"prompt": prompt}, steps)


STEPS = [
    ["12 + 30 = 42", "42 - 2 = 40", "#### 40"],
    ["one step alone"],
    ["I think, then answer.", "", "two lines apart"],  # an empty step ends with its line break
    ["of two\nlines each", "and\nagain"],
    [" begins with a blank", "  with two", "ends with one ", "é 日本 ."],
]


@pytest.mark.parametrize("steps", STEPS, ids=range(len(STEPS)))
@pytest.mark.parametrize("kind", ["messages", "text"])
def test_marked_tokens_are_the_separators_and_the_end(steps, kind):
    tokenizer, question = tiny_tokenizer(), "What is it?\n"
    ids, marked = steps_of(asked(question) if kind == "messages" else question, steps)
    assert len(ids) == len(marked) and marked[-1] and marked.sum() == len(steps)
    head = "<|im_start|>user\nWhat is it?\n<|im_end|>\n<|im_start|>assistant\n"
    head = head if kind == "messages" else question
    assert tokenizer.decode(ids).startswith(head + steps[0])
    for k, end in enumerate(np.flatnonzero(marked)):
        text = head + "".join(step + "\n" for step in steps[: k + 1])
        if k == len(steps) - 1:
            text = text[:-1] + "<|im_end|>"
        # The prefix up to the mark is the steps so far and their separators, and nothing of the next step.
        assert tokenizer.decode(ids[: end + 1]) == text
    assert ids[-1] == END


def test_step_whose_separator_is_merged_with_the_next_step_ends_one_token_before():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "sft")
    tokenizer.add_tokens(["\n##"])  # holds a separator and the beginning of a step
    ids, marked = steps_of(asked("?"), ["1 + 1 = 2", "## 2"], tokenizer)
    first, last = np.flatnonzero(marked)
    assert tokenizer.decode(ids[first + 1]) == "\n##" and tokenizer.decode(ids[: first + 1]).endswith("= 2")
    assert last == len(ids) - 1 and ids[last] == END


def stock_logits(model, sequence):
    """The stock classifier's output on the prefix up to and with each mark, one forward each."""
    ids = torch.tensor(sequence.input_ids).long()[None]
    ends = np.flatnonzero(sequence.trained)
    return torch.cat([model(input_ids=ids[:, : end + 1], use_cache=False).logits[0] for end in ends])


def loaded(folder, **flags):
    args = prm.Args(model=str(folder), **flags)
    return prm.load_reward_model(str(folder), args, prm.load_tokenizer(args), CPU)


def tiny_sequences(count):
    return [steps_of(row["prompt"], row["completions"]) for row in ROWS[:count]]


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_logits_are_those_of_the_stock_model_on_every_prefix_whatever_the_row(random_classifiers, kind):
    model, plain = loaded(random_classifiers[kind]), stock_classifier(random_classifiers[kind])
    sequences = [*tiny_sequences(5), steps_of("Text.\n", ["a", "b c", "d"])]
    with torch.no_grad():
        expected = [stock_logits(plain, sequence) for sequence in sequences]
        for picks in (range(6), range(5, -1, -1), (3,), (2, 4)):
            logits = prm.head_outputs(model, collate([sequences[i] for i in picks]))
            assert logits.dtype == torch.float32
            assert torch.allclose(logits, torch.cat([expected[i] for i in picks]), atol=1e-4)
    assert torch.cat(expected).std() > 0.1
    for budget in (8192, 100, 1):  # in the order of the solutions for any rows
        found = prm.step_probabilities(model, sequences, prm.Args(max_tokens_per_micro_batch=budget), CPU)
        for probabilities, logits in zip(found, expected, strict=True):
            assert probabilities.tolist() == pytest.approx(logits.sigmoid().tolist(), abs=1e-4)


def test_bad_rows_are_dropped_and_counted_by_reason(tmp_path, capsys):
    bad, row = read_lines(DATA / "step_rows.jsonl"), {"completions": ["b", "c"], "labels": [True, 0.25]}
    good = [{"prompt": f"{n}\n"} | row for n in range(9)]
    rows = write_rows(tmp_path / "steps.jsonl", [*good, good[0], *(case["row"] for case in bad)])
    args = prm.Args(dataset=(rows,), max_length=40)
    assert len(prm.load_steps(tiny_tokenizer(), rows, "train", args)) == 9
    told = capsys.readouterr().out
    assert [case["told"] for case in bad if case["told"] not in told] == [], told


# Runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path, random_classifiers):
    """As `trainer` says: one step of all rows on a small random classifier; nothing is searched."""
    flags = {"model": random_classifiers["qwen3"], "max_steps": 1, "lr_schedule": "constant"}
    train = trainer(prm, tmp_path, learning_rate=1e-3, **flags)
    return lambda rows, *rest, **flags: train(rows, *rest, **{"batch_size": len(rows)} | flags)


def test_first_step_is_a_plain_loop_and_its_mean_over_the_steps_of_the_batch(train, random_classifiers):
    # Solutions of 1 to 4 steps with hard and soft labels: a mean of means is not the mean over steps.
    model, losses, right, rows = stock_classifier(random_classifiers["qwen3"]), [], [], ROWS[:5]
    one = {"completions": ["#### 92"], "labels": [0.2]}
    four = {"completions": [*rows[1]["completions"], "That is all."], "labels": [1.0, 0.75, 0.0, 1.0]}
    rows = [rows[0] | one, rows[1] | four, *rows[2:]]
    assert len({len(row["labels"]) for row in rows}) >= 3
    for row in rows:
        logits = stock_logits(model, steps_of(row["prompt"], row["completions"]))
        for x, z in zip(logits, map(float, row["labels"]), strict=True):
            losses.append(z * torch.log1p(torch.exp(-x)) + (1 - z) * torch.log1p(torch.exp(x)))
            right.append((x.item() > 0) == (z > 0.5))
    loss = torch.stack(losses).mean()
    loss.backward()
    for budget in (120, 1):  # in the last, every solution has a row of its own
        _, [line] = train(rows, max_tokens_per_micro_batch=budget)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert line["grad_norm"] == pytest.approx(gradient_norm(model), rel=1e-3)
        assert line["step_accuracy"] == pytest.approx(np.mean(right))


def test_evaluation_by_hand(monkeypatch):
    # said: TFT, TT, F, TT, FT; labelled: TFF, TT, T, TF, FF: first errors 1, -1, 0, -1, 0 and 1, -1, -1, 1, 0
    probabilities = [[0.9, 0.4, 0.6], [0.7, 0.6], [0.2], [0.8, 0.9], [0.5, 0.6]]
    labels = [[1.0, 0.2, 0.5], [1.0, 0.51], [0.9], [1.0, 0.0], [0.0, 0.1]]
    monkeypatch.setattr(prm, "step_probabilities", lambda *_: [torch.tensor(p) for p in probabilities])
    found = prm.evaluate_steps(None, [prm.Solution(prm.FILLER, z) for z in labels], None, None)
    # steps: 2 of 3, 2 of 2, 0 of 1, 1 of 2, 1 of 2; with an error 2 of 3 found, without 1 of 2
    assert found == pytest.approx(
        {"eval/step_accuracy": 6 / 10, "eval/first_error": 3 / 5, "eval/first_error_f1": 4 / 7}
    )
    assert prm.evaluate_steps(None, [], None, None) == {}


# Of each of two prompts (right answers 7 and 9): final answer, PRM's steps, outcome model's score.
SAMPLES = [
    *[("a\n#### 5", [0.9, 0.8], 0.0), ("b\n#### 7", [0.7, 0.9], 3.0)],
    *[("c\n#### 7", [0.95, 0.85], 1.0), ("d\n#### 6", [0.9, 0.99], 2.0)],
    *[("e\n#### 9", [0.3, 0.6], 1.0), ("f\n\n#### 8", [0.5, 0.4], 2.0)],
    *[("g\n#### 8", [0.2, 0.99], 0.0), ("####  9", [0.8], 1.5)],
]


def test_best_of_n_by_hand(monkeypatch, tmp_path):
    tokenizer, judge = tiny_tokenizer(), prm.judge
    prompts = [{"prompt": asked("What is 3 + 4?"), "answer": "7"}]
    prompts += [{"prompt": asked("4 + 5?"), "answer": "#### 9"}]

    def step_probabilities(model, sequences, args, device):
        for sequence, (_, steps, _) in zip(sequences, SAMPLES, strict=True):
            assert sequence.trained.sum() == len(steps)  # blank lines are no steps
        return [torch.tensor(steps) for _, steps, _ in SAMPLES]

    def judged(spec, rows, *rest):
        return np.array([s for _, _, s in SAMPLES]) if spec == "somewhere" else judge(spec, rows, *rest)

    monkeypatch.setattr(prm, "load_policy", lambda *_: (tokenizer, None))
    monkeypatch.setattr(prm, "complete", lambda *_: ([text for text, *_ in SAMPLES], [False] * 7 + [True]))
    monkeypatch.setattr(prm, "judge", judged)
    monkeypatch.setattr(prm, "step_probabilities", step_probabilities)
    flags = {"policy": "tiny/sft", "num_samples": 4, "outcome_model": "somewhere", "step_aggregation": "min"}
    args = prm.Args(dataset=("other.jsonl",), **flags)
    metrics, samples = prm.best_of_n(None, tokenizer, prompts, tmp_path, args, CPU)
    table = json.loads((tmp_path / "best_of_n.json").read_text())
    # right: 0 1 1 0 and 1 0 0 1. By min the PRM has 0.8 0.7 0.85 0.9 and 0.3 0.4 0.2 0.8.
    assert table == [
        {"n": 1, "single": 0.5, "prm": 0.5, "orm": 0.5, "majority": 0.5, "any": 0.5},
        # of the halves the PRM takes 0.8, 0.9 and 0.4 (wrong), 0.8 (right); the outcome model 3 and 1.5
        # (right), 2 and 2 (wrong); of two answers a majority takes the first: wrong, right, right, wrong
        {"n": 2, "single": 0.5, "prm": 0.25, "orm": 0.5, "majority": 0.5, "any": 1.0},
        # 0.9 (wrong) and 0.8 (right); 3 (right) and 2 (wrong); two 7, and of two 9 and two 8 the first
        {"n": 4, "single": 0.5, "prm": 0.5, "orm": 0.5, "majority": 1.0, "any": 1.0},
    ]
    wanted = {f"search/{key}": value for key, value in table[-1].items() if key != "n"}
    assert metrics == wanted | {"search/clipped_ratio": 1 / 8}
    assert [sample["right"] for sample in samples] == [False, True, True, False, True, False, False, True]
    assert samples[5]["completion"] == "f\n\n#### 8"
    assert samples[5]["probabilities"] == pytest.approx([0.5, 0.4])


def test_verifier_that_fails_in_the_search_does_not_lose_the_training(train, tmp_path, capsys):
    prompts = write_rows(tmp_path / "prompts.jsonl", tiny_rows("prompts_eval")[:2])
    flags = {"search_dataset": prompts, "policy": "tiny/sft", "num_samples": 2, "max_completion_length": 8}
    line = error_of(lambda: train(ROWS[:4], reward=rewards("together")[0], **flags), capsys)
    assert "ZeroDivisionError" in line and stock_classifier(tmp_path / "run_0" / "model")


# Annotation -------------------------------------------------------------------------------------------------


@pytest.fixture
def annotate(monkeypatch, tmp_path):
    """annotate(rows, **flags) -> rows written, metrics; `annotate.answers` says how completions end."""
    output = tmp_path / "out" / "annotated.jsonl"

    def complete(policy, tokenizer, asked, seed, args, device):
        run.prefixes += asked
        endings = [f"then\n#### {next(run.answers)}" for _ in asked]
        return endings, [text.endswith("3") for text in endings]

    def run(rows, **flags):
        run.prefixes = []
        source = write_rows(tmp_path / f"{zlib.crc32(json.dumps(rows).encode())}.jsonl", rows)
        defaults = {"annotate": source, "annotate_output": str(output), "policy": "tiny/sft"}
        result = prm.main(prm.Args(**(defaults | {"num_rollouts": 4} | flags)))
        return read_lines(output), result

    run.answers, run.output = iter(()), output
    monkeypatch.setattr(prm, "complete", complete)
    monkeypatch.setattr(prm, "load_policy", lambda *_: (tiny_tokenizer(), None))
    return run


SOLUTIONS = [
    {"prompt": asked("3 + 4 + 1?"), "completions": ["3 + 4 = 7", "7 + 1 = 8", "#### 8"], "answer": "8"},
    {"prompt": asked("What is 1 + 1?"), "completions": ["1 + 1 = 3", "#### 3"], "answer": "2"},
    {"prompt": asked("What is 5?"), "completions": ["#### 5"], "answer": "5"},
]
SOLUTIONS = [row | {"kept": n} for n, row in enumerate(SOLUTIONS, 1)]
# 4 rollouts from behind the first and the second step of the first solution, and the first of the second
ANSWERS = [8, 8, 1, 8, 8, 1, 1, 1, 3, 3, 3, 3]


def test_soft_labels_are_the_shares_of_right_completions_and_the_last_one_is_the_verdict(annotate):
    annotate.answers = iter(ANSWERS)
    rows, metrics = annotate(SOLUTIONS)
    assert [row["labels"] for row in rows] == [[0.75, 0.25, 1.0], [0.0, 0.0], [1.0]]
    assert [{k: row[k] for k in SOLUTIONS[0]} for row in rows] == SOLUTIONS
    assert next(annotate.answers, None) is None  # the last steps are not completed
    assert metrics == pytest.approx({"mean_label": 3 / 6, "clipped_ratio": 4 / 12})
    # what is completed is exactly the tokens up to the end of each step
    head = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    first, second = (head.format(row["prompt"][0]["content"]) for row in SOLUTIONS[:2])
    texts = [first + "3 + 4 = 7\n", first + "3 + 4 = 7\n7 + 1 = 8\n", second + "1 + 1 = 3\n"]
    tokenizer, whole = tiny_tokenizer(), steps_of(SOLUTIONS[0]["prompt"], SOLUTIONS[0]["completions"])
    assert [tokenizer.decode(ids) for ids in annotate.prefixes] == [t for t in texts for _ in range(4)]
    for n, end in enumerate(np.flatnonzero(whole.trained)[:-1]):
        assert annotate.prefixes[4 * n] == whole.input_ids[: end + 1].tolist()


def test_verifier_reads_the_steps_before_a_completion_too(annotate, tmp_path):
    path = tmp_path / "spy.py"
    path.write_text(
        "seen = []\n"
        "def judge(prompts, completions, answer, kept, **kwargs):\n"
        "    with open(__file__ + '.txt', 'a') as file:\n"
        "        for row in zip(prompts, completions, answer, kept, strict=True):\n"
        "            file.write(repr(row) + '\\n')\n"
        "    texts = [messages[0]['content'] for messages in completions]  # as the prompts are messages\n"
        "    return [None if text.endswith('3') else len(text) - 20 for text in texts]\n"
    )
    annotate.answers = iter(ANSWERS)
    rows, _ = annotate(SOLUTIONS, reward=f"{path}:judge")
    seen = [eval(line) for line in (tmp_path / "spy.py.txt").read_text().splitlines()]
    seen.pop(0)  # the function is tried before anything slow
    one, two = SOLUTIONS[:2]
    assert seen[0] == (one["prompt"], said("3 + 4 = 7\nthen\n#### 8"), "8", 1)
    assert seen[4] == (one["prompt"], said("3 + 4 = 7\n7 + 1 = 8\nthen\n#### 8"), "8", 1)
    assert seen[12] == (two["prompt"], said("1 + 1 = 3\nthen\n#### 3"), "2", 2)
    # above 0 is right: 21, 31 and 26 characters; None is not; the solutions have 26 and 6
    assert [row["labels"] for row in rows] == [[1.0, 1.0, 1.0], [0.0, 0.0], [0.0]]


@pytest.mark.parametrize("torn", ["", '{"prompt": [{"role": "us', '{"prompt": "a"}'])
def test_annotation_continues_behind_the_rows_that_are_whole(annotate, torn):
    annotate.answers = iter(ANSWERS)
    whole, _ = annotate(SOLUTIONS)
    text = annotate.output.read_text().splitlines(keepends=True)
    annotate.output.write_text(text[0] + torn)
    annotate.answers = iter(ANSWERS[8:])
    rows, _ = annotate(SOLUTIONS)
    assert rows == whole and len(annotate.prefixes) == 4
    rows, _ = annotate(SOLUTIONS)  # nothing is left to do
    assert rows == whole and annotate.prefixes == []


def test_annotation_of_other_rows_or_flags_is_left_alone(annotate, capsys):
    annotate.answers = iter(ANSWERS)
    annotate(SOLUTIONS)
    before = annotate.output.read_text()
    other = [SOLUTIONS[0] | {"answer": "9"}, *SOLUTIONS[1:]]
    changes = {"label": "hard"}, {"policy": "tiny/base"}, {"num_rollouts": 2}, {"seed": 2}
    for rows, flags in ((SOLUTIONS[:2], {}), (other, {}), *((SOLUTIONS, change) for change in changes)):
        line = error_of(lambda rows=rows, flags=flags: annotate(rows, **flags), capsys)
        assert f"is of other {next(iter(flags), 'rows')}" in line
        assert annotate.output.read_text() == before


def test_given_labels_are_kept_and_compared(annotate):
    labels = [[True, False, True], [False, False], [True]]
    given = [row | {"labels": z} for row, z in zip(SOLUTIONS, labels, strict=True)]
    annotate.answers = iter([8, 1, 1, 1, 8, 8, 8, 1, 3, 3, 3, 3])
    rows, metrics = annotate(given)
    estimated = [[0.25, 0.75, 1.0], [0.0, 0.0], [1.0]]
    assert [row["labels"] for row in rows] == estimated
    assert [row["true_labels"] for row in rows] == labels
    assert metrics["label_agreement"] == pytest.approx(4 / 6)


def test_rows_that_cannot_be_annotated_are_dropped_and_a_missing_column_ends_the_run(annotate, capsys):
    annotate.answers = iter(ANSWERS)
    rows, _ = annotate([*SOLUTIONS, {"prompt": "a", "answer": "1"}, {"completions": ["a"], "answer": "1"}])
    assert len(rows) == 3 and "2 rows dropped" not in capsys.readouterr().err
    annotate.output.unlink()
    without = [{k: v for k, v in row.items() if k != "answer"} for row in SOLUTIONS]
    line = error_of(lambda: annotate(without), capsys)
    assert "math_answer" in line and "answer" in line
