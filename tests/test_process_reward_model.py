"""process_reward_model.py: where steps end, their loss and logits, runs, best of N, annotation and errors.

Losses and measures are held against numbers worked by hand, logits against the stock sequence classifier at
the end of one prefix at a time; searches and annotations run on completions and scores that are known.
What the script shares with other scripts is tested with them.
"""

import functools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

import process_reward_model as prm
from common import collate

CPU, END = torch.device("cpu"), 2  # <|im_end|> of tiny's tokenizer


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


# Losses and measures ----------------------------------------------------------------------------------------


def test_step_loss_by_hand_of_hard_and_soft_labels():
    # ln(1 + e^-2), ln(1 + e^-1) + 1, ln 2, 0.3 ln(1 + e^-2) + 0.7 (ln(1 + e^-2) + 2)
    losses = prm.step_loss(float64(2, 1, 0, 2), float64(1, 0, 0.4, 0.3))
    assert losses.tolist() == pytest.approx([0.126928, 1.313262, 0.693147, 1.526928], abs=2e-6)


def test_step_loss_is_least_where_the_probability_is_the_label():
    for z in (0.2, 0.5, 0.9):
        best = math.log(z / (1 - z))
        below, at, above = prm.step_loss(float64(best - 0.1, best, best + 0.1), float64(z, z, z)).tolist()
        assert at < below and at < above
        assert at == pytest.approx(-z * math.log(z) - (1 - z) * math.log(1 - z))


def test_gradient_of_the_step_loss_is_that_of_finite_differences():
    logits, labels = float64(2, -1, 0.3).requires_grad_(), float64(1, 0, 0.4)
    assert torch.autograd.gradcheck(prm.step_loss, (logits, labels))
    [grad] = torch.autograd.grad(prm.step_loss(logits, labels).sum(), logits)
    assert torch.allclose(grad, torch.sigmoid(logits) - labels)
    far = prm.step_loss(torch.tensor([300.0, -300.0, 300.0]), torch.tensor([1.0, 1.0, 0.5]))
    assert far.tolist() == pytest.approx([0, 300, 150])


def test_aggregates_by_hand():
    steps = float64(0.9, 0.5, 0.8)
    found = {
        how: prm.aggregate_steps(steps, step_aggregation=how).item()
        for how in ("min", "product", "last", "mean")
    }
    assert found == pytest.approx({"min": 0.5, "product": 0.36, "last": 0.8, "mean": 2.2 / 3})
    for how in found:
        assert prm.aggregate_steps(float64(0.3), step_aggregation=how).item() == pytest.approx(0.3)


def test_shepherd_labels_are_a_share_or_whether_any_is_right():
    for outcomes, soft, hard in (([0.0, 1.0, 0.0, 0.0], 0.25, 1), ([0.0, 0.0], 0, 0), ([1.0] * 3, 1, 1)):
        assert prm.shepherd_label(outcomes, "soft") == soft
        assert prm.shepherd_label(outcomes, "hard") == hard
    assert isinstance(prm.shepherd_label([1.0], "hard"), float)


def test_first_error_is_an_index_or_minus_1():
    assert prm.first_error([True, False, True, False]) == 1
    assert prm.first_error([False]) == 0 and prm.first_error([True, True]) == -1


def test_first_error_scores_by_hand():
    # with an error: 2 of 3 found; without: 1 of 2 left alone; F1 2 (2/3) (1/2) / (7/6) = 4/7
    found, f1 = prm.first_error_scores([0, 2, 3, -1, 1], [0, 2, 1, -1, -1])
    assert (found, f1) == (pytest.approx(3 / 5), pytest.approx(4 / 7))
    # shares 1/4 and 1: no mean but the harmonic one
    found, f1 = prm.first_error_scores([0, 0, 0, 0, -1], [0, 1, 2, 3, -1])
    assert (found, f1) == (pytest.approx(2 / 5), pytest.approx(0.4))


def test_first_error_f1_is_0_where_one_kind_is_never_found_or_not_there():
    assert prm.first_error_scores([-1, -1], [0, -1]) == (0.5, 0)  # calls all clean
    assert prm.first_error_scores([-1, -1], [-1, -1]) == (1, 0)
    assert prm.first_error_scores([1, 2], [1, 2]) == (1, 0)
    assert prm.first_error_scores([], []) == (0, 0)


def test_majority_takes_the_first_of_the_most_frequent_answers():
    assert prm.majority(["5", "7", "7", "5", "7"]) == 1
    assert prm.majority(["5", "7", "7", "5"]) == 0  # a tie: to the first
    assert prm.majority(["a", "b", "c", "c"]) == 2 and prm.majority(["x"]) == 0


# Where steps end --------------------------------------------------------------------------------------------


def user(text):
    return [{"role": "user", "content": text}]


@functools.cache
def tiny_tokenizer():
    return prm.load_tokenizer(prm.Args())


@functools.cache
def tiny_rows(name="steps_train"):
    return [json.loads(x) for x in (ROOT / "tiny" / "data" / f"{name}.jsonl").read_text().splitlines()][:200]


def steps_of(prompt, steps, tokenizer=None):
    return prm.tokenize_steps(tokenizer or tiny_tokenizer(), prompt, steps, {}, "here")


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
    ids, marked = steps_of(user(question) if kind == "messages" else question, steps)
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


def test_solution_of_a_text_prompt_ends_with_the_end_token():
    ids, marked = steps_of("What is it?\n", ["1 + 1 = 2", "#### 2"])
    assert ids[-1] == END and marked[-1] and marked.sum() == 2


def merging_tokenizer():
    """Tiny's tokenizer with a token that holds a separator and the beginning of a step."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "sft")
    tokenizer.add_tokens(["\n##"])
    tokenizer.end_ids, tokenizer.known_size = [END], len(tokenizer)
    return tokenizer


def test_step_whose_separator_is_merged_with_the_next_step_ends_one_token_before():
    tokenizer = merging_tokenizer()
    ids, marked = steps_of(user("?"), ["1 + 1 = 2", "## 2"], tokenizer)
    first, last = np.flatnonzero(marked)
    assert tokenizer.decode(ids[first + 1]) == "\n##" and tokenizer.decode(ids[: first + 1]).endswith("= 2")
    assert last == len(ids) - 1 and ids[last] == END


def test_steps_that_end_with_one_token_are_an_error(capsys):
    tokenizer = merging_tokenizer()
    tokenizer.add_tokens(["\n\n\n"])
    with pytest.raises(SystemExit) as stop:
        steps_of(user("?"), ["1", "", "", "2"], tokenizer)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: here: two of its steps end with one token\n"


def test_marks_do_not_depend_on_how_often_the_prompt_has_the_steps_text():
    # The answer is looked for behind the prompt, which quotes it.
    ids, marked = steps_of(user("1 + 1 = 2\n#### 2"), ["1 + 1 = 2", "#### 2"])
    text = tiny_tokenizer().decode(ids[: np.flatnonzero(marked)[0] + 1])
    assert text.endswith("assistant\n1 + 1 = 2\n") and text.count("####") == 1


TRIMMING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trimming_tokenizer():
    """Tiny's tokenizer with a template that strips turns, as Llama 3's does."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "sft")
    tokenizer.chat_template, tokenizer.end_ids, tokenizer.known_size = TRIMMING, [END], len(tokenizer)
    return tokenizer


def test_template_without_generation_marks_gives_the_same_steps():
    for steps in STEPS[:4]:
        one, other = steps_of(user("?"), steps), steps_of(user("?"), steps, trimming_tokenizer())
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.trained.tolist() == other.trained.tolist()


def test_solution_that_a_template_strips_is_no_traceback():
    steps = [" begins with a blank", "and ends with one "]
    try:
        _, marked = steps_of(user("?"), steps, trimming_tokenizer())
    except SystemExit as stop:
        assert stop.code == 2
    else:
        assert marked.sum() == 2


# Logits -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of small random float32 classifiers with tiny's tokenizer."""
    sizes = {"vocab_size": 768, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_labels": 1}
    sizes |= {"bos_token_id": None, "eos_token_id": END, "pad_token_id": 0}
    sizes |= {"max_position_embeddings": 2048, "initializer_range": 0.2}
    found = {}
    for kind, config, model_class in (
        ("qwen3", Qwen3Config, Qwen3ForSequenceClassification),
        ("llama", LlamaConfig, LlamaForSequenceClassification),
    ):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = model_class(config(**sizes))
        found[kind] = str(tmp_path_factory.mktemp(kind))
        model.save_pretrained(found[kind])
        AutoTokenizer.from_pretrained(ROOT / "tiny" / "sft").save_pretrained(found[kind])
    return found


def stock(folder):
    """A classifier as plain transformers loads it."""
    options = {"dtype": torch.float32, "attn_implementation": "eager", "num_labels": 1}
    return AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()


def stock_logits(model, sequence):
    """The stock classifier's output on the prefix up to and with each mark, one forward each."""
    ids = torch.tensor(sequence.input_ids).long()[None]
    ends = np.flatnonzero(sequence.trained)
    return torch.cat([model(input_ids=ids[:, : end + 1], use_cache=False).logits[0] for end in ends])


def loaded(folder, **flags):
    args = prm.Args(model=str(folder), **flags)
    return prm.load_reward_model(str(folder), args, prm.load_tokenizer(args), CPU)


def tiny_sequences(count):
    return [steps_of(row["prompt"], row["completions"]) for row in tiny_rows()[:count]]


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_logits_are_those_of_the_stock_model_on_every_prefix_whatever_the_row(folders, kind, one_cpu):
    sequences, model, plain = tiny_sequences(5), loaded(folders[kind]), stock(folders[kind])
    sequences.insert(2, steps_of("Text.\n", ["a", "b c", "d"]))
    with torch.no_grad():
        expected = [stock_logits(plain, sequence) for sequence in sequences]
        for picks in (range(6), range(5, -1, -1), (3,), (2, 4)):
            logits = prm.step_logits(model, collate([sequences[i] for i in picks]))
            assert logits.dtype == torch.float32
            assert torch.allclose(logits, torch.cat([expected[i] for i in picks]), atol=1e-4)
    assert torch.cat(expected).std() > 0.1


def test_step_probabilities_are_in_the_order_of_the_solutions_for_any_row_budget(folders, one_cpu):
    sequences, model, plain = tiny_sequences(6), loaded(folders["qwen3"]), stock(folders["qwen3"])
    with torch.no_grad():
        expected = [stock_logits(plain, sequence).sigmoid() for sequence in sequences]
    for budget in (8192, 100, 1):
        found = prm.step_probabilities(model, sequences, prm.Args(max_tokens_per_micro_batch=budget), CPU)
        assert [len(p) for p in found] == [len(p) for p in expected]
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))


def test_outcome_rewards_are_read_at_the_last_step(folders, one_cpu):
    sequences, model, plain = tiny_sequences(5), loaded(folders["llama"]), stock(folders["llama"])
    with torch.no_grad():
        expected = [stock_logits(plain, sequence)[-1].item() for sequence in sequences]
    for budget in (8192, 60):
        args = prm.Args(max_tokens_per_micro_batch=budget)
        assert prm.outcome_rewards(model, sequences, args, CPU).tolist() == pytest.approx(expected, abs=1e-4)


def test_row_without_solutions_has_no_logits_and_a_backward_that_reaches_every_parameter(folders, one_cpu):
    model = loaded(folders["qwen3"])
    logits = prm.step_logits(model, collate([prm.FILLER]))
    assert logits.shape == (0,)
    prm.step_loss(logits, torch.tensor([])).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# Data -------------------------------------------------------------------------------------------------------


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


ROW = {"prompt": "a\n", "completions": ["b", "c"], "labels": [True, 0.25]}


def load(tmp_path, rows, **flags):
    path = write_rows(tmp_path / "steps.jsonl", rows)
    return prm.load_steps(tiny_tokenizer(), path, "train", prm.Args(dataset=(path,), **flags))


def test_labels_are_numbers_whether_hard_or_soft(tmp_path):
    [solution] = load(tmp_path, [ROW])
    assert solution.labels == [1.0, 0.25] and all(type(z) is float for z in solution.labels)
    assert solution.sequence.trained.sum() == 2


BAD_ROWS = [
    ({"prompt": "a", "completions": ["b"]}, r"found the columns prompt, completions; accepted are"),
    ({"completions": ["b"], "labels": [1]}, r"found the columns completions, labels; accepted are"),
    ({"prompt": "a", "completions": "b", "labels": [1]}, r"found the columns"),
    ({"prompt": "a", "completions": ["b"], "labels": 1}, r"found the columns"),
    (ROW | {"labels": [1]}, r"2 steps and 1 labels"),
    (ROW | {"labels": [1, 0, 1]}, r"2 steps and 3 labels"),
    (ROW | {"completions": [], "labels": []}, r"0 steps and 0 labels"),
    (ROW | {"labels": [1, 1.5]}, r"a label is not true, false, or a number from 0 to 1"),
    (ROW | {"labels": [-0.1, 1]}, r"a label is not"),
    (ROW | {"labels": ["true", True]}, r"a label is not"),
    (ROW | {"labels": [None, True]}, r"a label is not"),
    ("a text", r"not an object"),
    ([1, 2], r"not an object"),
    (3, r"not an object"),
]


@pytest.mark.parametrize("bad, pattern", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_rows_end_the_run_with_one_line(tmp_path, capsys, bad, pattern):
    with pytest.raises(SystemExit) as stop:
        load(tmp_path, [ROW, bad])
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ")
    assert re.search(rf"steps\.jsonl, row 2: {pattern}", line), line


def test_steps_that_are_no_texts_end_the_run_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        load(tmp_path, [ROW | {"completions": [1, 2]}])
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "row 1" in line


def test_solutions_that_are_too_long_are_dropped_or_keep_the_steps_that_fit(tmp_path, capsys):
    short = {"prompt": "a\n", "completions": ["b", "c"], "labels": [1, 0]}
    long = {"prompt": "a\n", "completions": ["b", "c " * 20, "d"], "labels": [0.5, 1, 0]}
    assert len(load(tmp_path, [short, long], max_length=12)) == 1
    assert "1 solutions, 2 steps, mean label 0.50, 1 dropped as longer than 12" in capsys.readouterr().out
    whole = load(tmp_path, [long])[0].sequence
    first, cut = load(tmp_path, [short, long], max_length=12, overlong="truncate")
    assert cut.labels == [0.5] and first.labels == [1, 0]
    assert cut.sequence.input_ids.tolist() == whole.input_ids[:12].tolist()
    assert cut.sequence.trained.sum() == 1
    with pytest.raises(SystemExit) as stop:
        load(tmp_path, [long], max_length=12)
    assert stop.value.code == 2 and "no solution fits" in capsys.readouterr().err


def test_repeated_solutions_count_once_unless_asked_to(tmp_path):
    assert len(load(tmp_path, [ROW, ROW])) == 1
    assert len(load(tmp_path, [ROW, ROW], dedupe=False)) == 2


# Runs -------------------------------------------------------------------------------------------------------

TIMES = ("tokens_per_second", "step_time")
PACKING = ("num_tokens", "packing/fill")


@pytest.fixture
def train(tmp_path, folders, one_cpu):
    """train(rows, held_out, **flags) -> output folder, lines of metrics.jsonl; nothing is searched."""

    def run(rows, held_out=None, **flags):
        folder = tmp_path / f"run_{run.count}"
        run.count += 1
        path = write_rows(tmp_path / f"train_{run.count}.jsonl", rows)
        defaults = {"model": folders["qwen3"], "dataset": (path,), "output_dir": str(folder)}
        defaults |= {"batch_size": len(rows), "max_steps": 1, "eval_every": 0, "save_every": 0}
        defaults |= {"warmup_steps": 0, "lr_schedule": "constant", "learning_rate": 1e-3}
        if held_out:
            defaults["eval_dataset"] = write_rows(tmp_path / "held_out.jsonl", held_out)
        args = prm.Args(**(defaults | flags))
        run.result = prm.main(args)
        return Path(args.output_dir), read_lines(Path(args.output_dir) / "metrics.jsonl")

    run.count = 0
    return run


def assert_same_metrics(one, other):
    assert len(one) == len(other)
    for line, wanted in zip(one, other, strict=True):
        assert line.keys() == wanted.keys()
        keys = [key for key in wanted if key not in (*TIMES, *PACKING)]
        assert [line[k] for k in keys] == pytest.approx([wanted[k] for k in keys], rel=1e-4, abs=1e-4)


def uneven_rows():
    """Solutions of 1 to 4 steps with hard and soft labels: a mean of means is not the mean over steps."""
    rows = [dict(row) for row in tiny_rows()[:5]]
    rows[0] |= {"completions": ["#### 92"], "labels": [0.2]}
    rows[1] |= {"completions": [*rows[1]["completions"], "That is all."], "labels": [1, 0.75, 0, 1]}
    assert len({len(row["labels"]) for row in rows}) >= 3
    return rows


def test_first_step_is_a_plain_loop_and_the_mean_is_over_the_steps_of_the_whole_batch(train, folders):
    rows, model, losses, right = uneven_rows(), stock(folders["qwen3"]), [], []
    for row in rows:
        logits = stock_logits(model, steps_of(row["prompt"], row["completions"]))
        for x, z in zip(logits, map(float, row["labels"]), strict=True):
            losses.append(z * torch.log1p(torch.exp(-x)) + (1 - z) * torch.log1p(torch.exp(x)))
            right.append((x.item() > 0) == (z > 0.5))
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    for budget in (8192, 120, 1):  # in the last, every solution has a row of its own
        _, lines = train(rows, max_tokens_per_micro_batch=budget)
        assert lines[1]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert lines[1]["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert lines[1]["step_accuracy"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"max_tokens_per_micro_batch": 128}, id="rows"),
        pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param({"attn": "eager"}, id="eager"),
    ],
)
def test_settings_of_memory_and_speed_do_not_change_the_metrics(train, changes):
    rows, held_out = tiny_rows()[:10], tiny_rows("steps_eval")[:8]
    flags = {"max_steps": 3, "batch_size": 4, "eval_every": 1}
    _, plain = train(rows, held_out, **flags)
    assert len({line["loss"] for line in plain[1:]}) == 3
    _, lines = train(rows, held_out, **flags, **changes)
    assert_same_metrics(lines, plain)


def test_run_learns_moves_every_parameter_and_saves_what_transformers_loads(train, folders):
    rows = uneven_rows()
    folder, lines = train(rows, max_steps=5, learning_rate=3e-3)
    losses = [line["loss"] for line in lines[1:]]
    assert losses == sorted(losses, reverse=True)
    before, after = (
        load_file(Path(path) / "model.safetensors") for path in (folders["qwen3"], folder / "model")
    )
    assert before.keys() == after.keys()
    assert all(not torch.equal(after[name], before[name]) for name in after)
    sequences = [steps_of(row["prompt"], row["completions"]) for row in rows]
    found = prm.step_probabilities(loaded(folder / "model", seed=7), sequences, prm.Args(), CPU)
    plain = stock(folder / "model")
    with torch.no_grad():
        expected = torch.cat([stock_logits(plain, s) for s in sequences]).sigmoid()
    assert torch.allclose(torch.cat(found), expected, atol=1e-4)


def test_continued_run_is_the_uninterrupted_one(train):
    rows, flags = tiny_rows()[:10], {"save_every": 2, "batch_size": 4}
    _, whole = train(rows, max_steps=4, **flags)
    folder, _ = train(rows, max_steps=2, **flags)
    _, lines = train(rows, max_steps=4, output_dir=str(folder), resume=True, **flags)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert_same_metrics(lines, whole)


def test_evaluation_by_hand(monkeypatch):
    # said: TFT, TT, F, TT, FT; labelled: TFF, TT, T, TF, FF: first errors 1, -1, 0, -1, 0 and 1, -1, -1, 1, 0
    probabilities = [[0.9, 0.4, 0.6], [0.7, 0.6], [0.2], [0.8, 0.9], [0.5, 0.6]]
    labels = [[1.0, 0.2, 0.5], [1.0, 0.51], [0.9], [1.0, 0.0], [0.0, 0.1]]
    solutions = [prm.Solution(prm.FILLER, z) for z in labels]
    monkeypatch.setattr(
        prm, "step_probabilities", lambda model, sequences, *_: [torch.tensor(p) for p in probabilities]
    )
    model = SimpleNamespace(config=SimpleNamespace())
    found = prm.evaluate_steps(model, solutions, None, None)
    # steps: 2 of 3, 2 of 2, 0 of 1, 1 of 2, 1 of 2; with an error 2 of 3 found, without 1 of 2
    assert found == pytest.approx(
        {"eval/step_accuracy": 6 / 10, "eval/first_error": 3 / 5, "eval/first_error_f1": 4 / 7}
    )
    assert prm.evaluate_steps(model, [], None, None) == {}
    model.config.reward_offset = 0.1  # of an outcome model: what is said 0.5 is above average
    assert prm.evaluate_steps(model, solutions, None, None)["eval/step_accuracy"] == pytest.approx(5 / 10)


def test_evaluation_of_a_run_is_that_of_the_stock_model(train, folders):
    held_out = tiny_rows("steps_eval")[:8]
    _, lines = train(tiny_rows()[:2], held_out)
    plain, right = stock(folders["qwen3"]), []
    for row in held_out:
        with torch.no_grad():
            logits = stock_logits(plain, steps_of(row["prompt"], row["completions"])).tolist()
        right += [(x > 0) == z for x, z in zip(logits, row["labels"], strict=True)]
    assert lines[0]["eval/step_accuracy"] == pytest.approx(np.mean(right))


# Best of N --------------------------------------------------------------------------------------------------

# Of each of two prompts (right answers 7 and 9): final answer, PRM's steps, outcome model's score.
SAMPLES = [
    [
        ("a\n#### 5", [0.9, 0.8], 0.0),
        ("b\n#### 7", [0.7, 0.9], 3.0),
        ("c\n#### 7", [0.95, 0.85], 1.0),
        ("d\n#### 6", [0.9, 0.99], 2.0),
    ],
    [
        ("e\n#### 9", [0.3, 0.6], 1.0),
        ("f\n\n#### 8", [0.5, 0.4], 2.0),
        ("g\n#### 8", [0.2, 0.99], 0.0),
        ("####  9", [0.8], 1.5),
    ],
]


@pytest.fixture
def search(monkeypatch, tmp_path):
    """search(**flags) -> table, metrics, samples of best_of_n on SAMPLES; run.state.asked: the prompts."""
    known = [sample for group in SAMPLES for sample in group]
    tokenizer, questions = tiny_tokenizer(), ["What is 3 + 4?", "What is 4 + 5?"]
    prompts = [{"prompt": user(q), "answer": a} for q, a in zip(questions, ("7", "#### 9"), strict=True)]

    def generate(model, tok, prompt_ids, args, device):
        search.asked = prompt_ids
        return [tok(text).input_ids + [END] for text, _, _ in known]

    def step_probabilities(model, sequences, args, device):
        for sequence, (_, steps, _) in zip(sequences, known, strict=True):
            assert sequence.trained.sum() == len(steps)  # blank lines are no steps
        return [torch.tensor(steps) for _, steps, _ in known]

    monkeypatch.setattr(prm, "own_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr(prm, "load_model", lambda name, *_: ("policy", name))
    monkeypatch.setattr(prm, "load_reward_model", lambda name, *_: ("judge", name))
    monkeypatch.setattr(prm, "generate", generate)
    monkeypatch.setattr(prm, "step_probabilities", step_probabilities)
    monkeypatch.setattr(prm, "outcome_rewards", lambda *_: torch.tensor([s for _, _, s in known]))

    def run(**flags):
        args = prm.Args(policy="tiny/sft", num_samples=4, **flags)
        verify = prm.load_verifier(args)
        metrics, samples = prm.best_of_n(None, tokenizer, prompts, verify, tmp_path, args, CPU)
        return json.loads((tmp_path / "best_of_n.json").read_text()), metrics, samples

    search.questions = questions
    run.state = search
    return run


def test_best_of_n_by_hand(search, tmp_path):
    # right: 0 1 1 0 and 1 0 0 1. By min the PRM has 0.8 0.7 0.85 0.9 and 0.3 0.4 0.2 0.8.
    table, metrics, samples = search(outcome_model="somewhere")
    assert table == [
        {"n": 1, "single": 0.5, "any": 0.5, "majority": 0.5, "prm": 0.5, "orm": 0.5},
        # the PRM takes 0.8 (wrong) and 0.4 (wrong), the outcome model 3 (right) and 2 (wrong)
        {"n": 2, "single": 0.5, "any": 1.0, "majority": 0.5, "prm": 0.0, "orm": 0.5},
        # 0.9 (wrong) and 0.8 (right); 3 (right) and 2 (wrong); two 7, and of two 9 and two 8 the first
        {"n": 4, "single": 0.5, "any": 1.0, "majority": 1.0, "prm": 0.5, "orm": 0.5},
    ]
    assert metrics == {f"search/{key}": value for key, value in table[-1].items() if key != "n"}
    assert (tmp_path / "best_of_n.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [sample["right"] for sample in samples] == [False, True, True, False, True, False, False, True]
    assert samples[5]["completion"] == "f\n\n#### 8"
    assert samples[5]["probabilities"] == pytest.approx([0.5, 0.4])


def test_best_of_n_without_an_outcome_model_has_no_column_for_it(search):
    table, metrics, _ = search(dataset=("other.jsonl",))
    assert set(table[0]) == {"n", "single", "any", "majority", "prm"} and "search/orm" not in metrics


@pytest.mark.parametrize(
    "how, prm_right",
    [
        # 0.72 0.63 0.81 0.89 | 0.18 0.2 0.2 0.8
        ("product", [0.5, 0.0, 0.5]),
        # 0.8 0.9 0.85 0.99 | 0.6 0.4 0.99 0.8
        ("last", [0.5, 1.0, 0.0]),
        # 0.85 0.8 0.9 0.945 | 0.45 0.45 0.595 0.8: float32 has 0.45 from 0.3 and 0.6 above that from 0.5, 0.4
        ("mean", [0.5, 0.5, 0.5]),
    ],
)
def test_best_of_n_scores_solutions_as_the_aggregation_says(search, how, prm_right):
    table, _, _ = search(step_aggregation=how)
    assert [line["prm"] for line in table] == prm_right


def test_every_prompt_is_sampled_n_times_with_the_generation_prompt(search):
    search()
    found = [tiny_tokenizer().decode(ids) for ids in search.state.asked]
    wanted = [
        f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n"
        for q in search.state.questions
        for _ in range(4)
    ]
    assert found == wanted


def test_run_ends_with_a_search_of_the_policys_samples(train, tmp_path):
    prompts = write_rows(tmp_path / "prompts.jsonl", tiny_rows("prompts_eval")[:5])
    flags = {"search_dataset": prompts, "policy": "tiny/sft", "num_samples": 3, "num_prompts": 2}
    folder, lines = train(tiny_rows()[:4], max_steps=2, max_completion_length=24, **flags)
    assert "search/prm" not in lines[1] and 0 <= lines[2]["search/prm"] <= lines[2]["search/any"] <= 1
    table = json.loads((folder / "best_of_n.json").read_text())
    assert [line["n"] for line in table] == [1, 2] and (folder / "best_of_n.png").exists()
    samples = read_lines(folder / "samples.jsonl")
    assert len(samples) == 6 and {sample["step"] for sample in samples} == {2}
    share = np.mean([sample["right"] for sample in samples])
    assert lines[2]["search/single"] == pytest.approx(share)


# Annotation -------------------------------------------------------------------------------------------------


@pytest.fixture
def annotate(monkeypatch, tmp_path, one_cpu):
    """annotate(rows, **flags) -> rows written, metrics; `annotate.answers` says how completions end."""
    output = tmp_path / "out" / "annotated.jsonl"

    def generate(policy, tokenizer, asked, args, device):
        assert policy == "tiny/sft"
        state.prefixes += asked
        if not asked:
            return []
        endings = [f"then\n#### {next(state.answers)}" for _ in asked]
        return [tokenizer(text).input_ids + [END] for text in endings]

    def run(rows, **flags):
        state.prefixes = []
        source = write_rows(tmp_path / "solutions.jsonl", rows)
        defaults = {"annotate": source, "annotate_output": str(output), "policy": "tiny/sft"}
        result = prm.main(prm.Args(**(defaults | {"num_rollouts": 4} | flags)))
        return read_lines(output), result

    state = run
    state.answers, state.output = iter(()), output
    monkeypatch.setattr(prm, "generate", generate)
    monkeypatch.setattr(prm, "load_model", lambda name, *_: name)
    return run


SOLUTIONS = [
    {
        "prompt": user("What is 3 + 4 + 1?"),
        "completions": ["3 + 4 = 7", "7 + 1 = 8", "#### 8"],
        "answer": "8",
        "kept": 1,
    },
    {"prompt": user("What is 1 + 1?"), "completions": ["1 + 1 = 3", "#### 3"], "answer": "2", "kept": 2},
    {"prompt": user("What is 5?"), "completions": ["#### 5"], "answer": "5", "kept": 3},
]
# 4 rollouts from behind the first and the second step of the first solution, and the first of the second
ANSWERS = [8, 8, 1, 8, 8, 1, 1, 1, 3, 3, 3, 3]


@pytest.mark.parametrize("size", [256, 8, 1])  # solutions are sampled together or one by one
def test_soft_labels_are_the_shares_of_right_completions_and_the_last_one_is_the_verdict(annotate, size):
    annotate.answers = iter(ANSWERS)
    solutions = SOLUTIONS if size == 256 else SOLUTIONS[:2]
    rows, metrics = annotate(solutions, generation_batch_size=size)
    assert [row["labels"] for row in rows] == [[0.75, 0.25, 1.0], [0.0, 0.0], [1.0]][: len(solutions)]
    assert [{k: v for k, v in row.items() if k != "labels"} for row in rows] == solutions
    assert "label_correlation" not in metrics
    assert next(annotate.answers, None) is None  # the last steps are not completed


def test_solutions_of_one_step_get_the_verdict_and_no_completions(annotate):
    rows, _ = annotate(SOLUTIONS[2:])
    assert [row["labels"] for row in rows] == [[1.0]] and annotate.prefixes == []


def test_hard_labels_say_whether_any_completion_is_right(annotate):
    annotate.answers = iter(ANSWERS)
    rows, _ = annotate(SOLUTIONS, label="hard")
    assert [row["labels"] for row in rows] == [[1.0, 1.0, 1.0], [0.0, 0.0], [1.0]]


def test_what_is_completed_is_exactly_the_tokens_up_to_the_end_of_each_step(annotate):
    annotate.answers = iter(ANSWERS)
    annotate(SOLUTIONS)
    head = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    first, second = (head.format(row["prompt"][0]["content"]) for row in SOLUTIONS[:2])
    texts = [first + "3 + 4 = 7\n", first + "3 + 4 = 7\n7 + 1 = 8\n", second + "1 + 1 = 3\n"]
    tokenizer, whole = tiny_tokenizer(), steps_of(SOLUTIONS[0]["prompt"], SOLUTIONS[0]["completions"])
    assert [tokenizer.decode(ids) for ids in annotate.prefixes] == [t for t in texts for _ in range(4)]
    for n, end in enumerate(np.flatnonzero(whole.trained)[:-1]):
        assert annotate.prefixes[4 * n] == whole.input_ids[: end + 1].tolist()


def said(text):
    return [{"role": "assistant", "content": text}]


def test_verifier_reads_the_steps_before_a_completion_too(annotate, tmp_path):
    path = tmp_path / "spy.py"
    path.write_text(
        "seen = []\n"
        "def judge(prompts, completions, answer, kept, **kwargs):\n"
        "    with open(__file__ + '.txt', 'a') as file:\n"
        "        for row in zip(prompts, completions, answer, kept, strict=True):\n"
        "            file.write(repr(row) + '\\n')\n"
        "    assert not kwargs, kwargs\n"
        "    texts = [messages[0]['content'] for messages in completions]  # as the prompts are messages\n"
        "    return [None if text.endswith('3') else len(text) - 20 for text in texts]\n"
    )
    annotate.answers = iter(ANSWERS)
    rows, _ = annotate(SOLUTIONS, reward=f"{path}:judge")
    seen = [eval(line) for line in (tmp_path / "spy.py.txt").read_text().splitlines()]
    assert len(seen) == 12 + 3
    one, two = SOLUTIONS[:2]
    assert seen[0] == (one["prompt"], said("3 + 4 = 7\nthen\n#### 8"), "8", 1)
    assert seen[4] == (one["prompt"], said("3 + 4 = 7\n7 + 1 = 8\nthen\n#### 8"), "8", 1)
    assert seen[8] == (two["prompt"], said("1 + 1 = 3\nthen\n#### 3"), "2", 2)
    assert [row[1] for row in seen[12:]] == [said("\n".join(row["completions"])) for row in SOLUTIONS]
    # above 0 is right: 21, 31 and 26 characters; None is not; the solutions have 26 and 6
    assert [row["labels"] for row in rows] == [[1.0, 1.0, 1.0], [0.0, 0.0], [0.0]]


def test_completions_of_a_later_chunk_follow_their_own_steps(annotate, monkeypatch):
    judged = []

    def load_verifier(args):
        return lambda rows, texts: judged.extend(zip([r["kept"] for r in rows], texts)) or [1.0] * len(rows)

    monkeypatch.setattr(prm, "load_verifier", load_verifier)
    annotate.answers = iter(ANSWERS)
    annotate(SOLUTIONS[:2], generation_batch_size=1)
    assert judged == [
        *[(1, f"3 + 4 = 7\nthen\n#### {answer}") for answer in ANSWERS[:4]],
        *[(1, f"3 + 4 = 7\n7 + 1 = 8\nthen\n#### {answer}") for answer in ANSWERS[4:8]],
        (1, "3 + 4 = 7\n7 + 1 = 8\n#### 8"),
        *[(2, f"1 + 1 = 3\nthen\n#### {answer}") for answer in ANSWERS[8:]],
        (2, "1 + 1 = 3\n#### 3"),
    ]


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


def test_output_with_more_rows_than_the_dataset_is_left_alone(annotate, capsys):
    annotate.answers = iter(ANSWERS)
    annotate(SOLUTIONS)
    before = annotate.output.read_text()
    with pytest.raises(SystemExit) as stop:
        annotate(SOLUTIONS[:2])
    assert stop.value.code == 2 and "more rows" in capsys.readouterr().err
    assert annotate.output.read_text() == before


def test_given_labels_are_kept_and_compared(annotate):
    labels = [[True, False, True], [False, False], [True]]
    given = [row | {"labels": z} for row, z in zip(SOLUTIONS, labels, strict=True)]
    annotate.answers = iter([8, 1, 1, 1, 8, 8, 8, 1, 3, 3, 3, 3])
    rows, metrics = annotate(given)
    estimated = [[0.25, 0.75, 1.0], [0.0, 0.0], [1.0]]
    assert [row["labels"] for row in rows] == estimated
    assert [row["true_labels"] for row in rows] == labels
    flat = [x for solution in estimated for x in solution]
    correlation = np.corrcoef(flat, [1, 0, 1, 0, 0, 1])[0, 1]
    expected = {"mean_label": 3 / 6, "label_correlation": correlation, "label_agreement": 4 / 6}
    assert metrics == pytest.approx(expected)


def test_mean_label_is_that_of_all_estimated_labels(annotate):
    annotate.answers = iter(ANSWERS)
    _, metrics = annotate(SOLUTIONS)
    assert metrics["mean_label"] == pytest.approx(3 / 6)  # 0.75, 0.25, 1 and 0, 0 and 1


def test_annotated_rows_are_what_the_script_trains_on(annotate, tmp_path):
    annotate.answers = iter(ANSWERS)
    annotate(SOLUTIONS)
    args = prm.Args(dataset=(str(annotate.output),))
    solutions = prm.load_steps(tiny_tokenizer(), str(annotate.output), "train", args)
    assert [s.labels for s in solutions] == [[0.75, 0.25, 1.0], [0.0, 0.0], [1.0]]


def test_annotation_of_rows_without_answers_says_so_in_one_line(annotate, capsys):
    annotate.answers = iter([1] * 100)
    with pytest.raises(SystemExit) as stop:
        annotate([{k: v for k, v in row.items() if k != "answer"} for row in tiny_rows()[:2]])
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line.startswith("error: ") and re.search(r"without --reward .*answer.*found prompt, comp", line)
    assert annotate.prefixes == []  # before anything is sampled


@pytest.mark.parametrize(
    "bad",
    [
        {"completions": ["a"], "answer": "1"},
        {"prompt": "a", "completions": "b", "answer": "1"},
        {"prompt": "a", "completion": "b", "answer": "1"},
        {"prompt": "a", "completions": [], "answer": "1"},
        3,
    ],
    ids=["no prompt", "a text", "completion", "no steps", "a number"],
)
def test_bad_rows_to_annotate_end_the_run_with_one_line(annotate, capsys, bad):
    annotate.answers = iter([1] * 100)
    with pytest.raises(SystemExit) as stop:
        annotate([SOLUTIONS[0], bad])
    [line] = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert stop.value.code == 2 and "row 2" in line


def test_real_policy_labels_solutions(tmp_path, one_cpu):
    rows = [dict(row, answer=row["completions"][-1]) for row in tiny_rows()[:3]]
    source, output = write_rows(tmp_path / "solutions.jsonl", rows), tmp_path / "annotated.jsonl"
    flags = {"annotate": source, "annotate_output": str(output), "num_rollouts": 2}
    metrics = prm.main(prm.Args(max_completion_length=16, **flags))
    found = read_lines(output)
    assert all(set(row["labels"]) <= {0.0, 0.5, 1.0} and row["labels"][-1] == 1 for row in found)
    assert [len(row["labels"]) for row in found] == [len(row["completions"]) for row in rows]
    assert set(metrics) == {"mean_label", "label_correlation", "label_agreement"}


# Verifiers and errors ---------------------------------------------------------------------------------------


def test_default_verifier_compares_final_answers():
    verify = prm.load_verifier(prm.Args())
    rows = [{"answer": a} for a in ("1,234", "work\n#### 5", 7, "7")]
    assert verify(rows, ["x\n#### 1234", "#### 5", "#### 7", "8\n#### 77"]) == [1, 1, 1, 0]


def test_reward_function_gets_prompts_completions_and_columns(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(
        "def judge(prompts, completions, solution, labels, **kwargs):\n"
        "    assert kwargs == {'extra': [None, 5]}\n"
        "    assert prompts == ['p', 'q'] and completions == ['one', 'two'] and labels == [[1], None]\n"
        "    return [-0.5 if s == c else 2 for s, c in zip(solution, completions)]\n"
    )
    rows = [
        {"prompt": "p", "completions": ["x"], "solution": "one", "labels": [1], "extra": None},
        {"prompt": "q", "completions": ["y"], "solution": "no", "extra": 5},
    ]
    verify = prm.load_verifier(prm.Args(reward=f"{path}:judge"))
    assert verify(rows, ["one", "two"]) == [0, 1]


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """refused(pattern, **flags): one line on stderr, exit status 2, no model loaded, nothing written."""

    def run(pattern, **flags):
        for loader in ("load_reward_model", "load_model"):
            monkeypatch.setattr(prm, loader, lambda *_: pytest.fail("a model was loaded"))
        defaults = {"dataset": (write_rows(tmp_path / "rows.jsonl", tiny_rows()[:4]),)}
        defaults |= {"output_dir": str(tmp_path / "run"), "annotate_output": str(tmp_path / "out.jsonl")}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            prm.main(prm.Args(**(defaults | flags)))
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1, lines
        assert lines[0].startswith("error: ") and re.search(pattern, lines[0]), lines[0]
        assert not (tmp_path / "run").exists() and not (tmp_path / "out.jsonl").exists()

    return run


@pytest.mark.parametrize(
    "pattern, flags",
    [
        (r"--annotate samples from a --policy", {"annotate": "a.jsonl"}),
        (r"--temperature must be above 0", {"annotate": "a.jsonl", "policy": "tiny/sft", "temperature": 0.0}),
        (r"a\.jsonl: no such file", {"annotate": "a.jsonl", "policy": "tiny/sft"}),
        (r"judge\.py:f: not file\.py:function", {"reward": "judge.py:f"}),
        (r"common\.py: not file\.py:function", {"reward": "common.py"}),
        (r"--eval-fraction must lie in", {"eval_fraction": 1.0}),
        (r"--eval-fraction and --eval-dataset", {"eval_fraction": 0.1, "eval_dataset": "a.jsonl"}),
        (r"--num-samples must be at least 1", {"num_samples": 0}),
        (r"--num-rollouts must be at least 1", {"num_rollouts": 0}),
        (r"--batch-size must be at least 1", {"batch_size": 0}),
        (r"--resume needs --output-dir", {"resume": True, "output_dir": None}),
        (r"--model \./nowhere: no such folder", {"model": "./nowhere"}),
        (r"nowhere\.jsonl: no such file", {"dataset": ("nowhere.jsonl",)}),
        (r"nowhere\.jsonl: no such file", {"search_dataset": "nowhere.jsonl", "policy": "tiny/sft"}),
        (r"no solution fits --max-length 5", {"max_length": 5}),
    ],
)
def test_mistakes_end_the_run_with_one_line_before_a_model_is_loaded(refused, pattern, flags):
    refused(pattern, **flags)


def test_missing_function_of_a_reward_file_is_named(refused, tmp_path):
    path = tmp_path / "judge.py"
    path.write_text("number = 3\n")
    refused(r"judge\.py has no function f$", reward=f"{path}:f")
    refused(r"judge\.py has no function number$", reward=f"{path}:number")


def test_prompts_of_a_search_without_a_prompt_are_refused(refused, tmp_path):
    path = write_rows(tmp_path / "prompts.jsonl", [{"question": "q", "answer": "1"}, {"answer": "2"}])
    refused(r"prompts\.jsonl, row 2: found the columns answer", search_dataset=path, policy="tiny/sft")


def test_policy_and_outcome_model_have_tokenizers_of_their_own(train, random_model, folders, tmp_path):
    prompts = write_rows(tmp_path / "prompts.jsonl", tiny_rows("prompts_eval")[:2])
    flags = {"search_dataset": prompts, "num_samples": 2, "max_completion_length": 40}
    flags |= {"policy": "tiny/sft", "outcome_model": folders["qwen3"]}
    folder, _ = train(tiny_rows()[:2], model=str(random_model), **flags)
    for sample in read_lines(folder / "samples.jsonl"):
        assert sample["prompt"].startswith("<|im_start|>") and sample["prompt"].endswith("assistant\n")
        assert " = " in sample["completion"]  # what tiny/sft says, not the letters of another vocabulary


def test_outcome_model_that_is_missing_is_noticed_before_training(refused, tmp_path):
    prompts = write_rows(tmp_path / "prompts.jsonl", tiny_rows("prompts_eval")[:1])
    flags = {"search_dataset": prompts, "policy": "tiny/sft", "outcome_model": "./nowhere"}
    refused(r"nowhere: no such folder", **flags)
