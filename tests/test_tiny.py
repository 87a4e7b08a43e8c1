"""tiny/: the data are what they claim to be, no eval prompt leaks, the tokenizer is what scripts expect."""

import importlib.util
import json
import random
import re
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

TINY = Path(__file__).resolve().parent.parent / "tiny"
NAMES = (
    "sft",
    "preference",
    "preference_length_biased",
    "unpaired",
    "prompts",
    "steps",
    "sycophancy",
    "text",
)
SUM = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("tiny_make", TINY / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_make"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "sft")


def sums(text: str) -> list[tuple[int, int]]:
    """(what the text says, what it should say) for every sum in it."""
    out = []
    for left, sign, right, said in SUM.findall(text):
        left, right = int(left), int(right)
        out.append((int(said), {"+": left + right, "-": left - right, "*": left * right}[sign]))
    return out


def is_right(text: str) -> bool:
    """Every sum holds, and the closing line repeats the last result."""
    worked = sums(text)
    return bool(worked) and all(said == due for said, due in worked) and closing(text) == worked[-1][0]


def closing(text: str) -> int:
    return int(re.fullmatch(r"#### (\d+)", text.split("\n")[-1])[1])


def plain(text: str) -> str:
    """The sums and the closing line alone."""
    return "\n".join(line for line in text.split("\n") if SUM.fullmatch(line) or line.startswith("#### "))


def question(row: dict) -> str:
    content = next(m["content"] for m in row.get("messages") or row["prompt"] if m["role"] == "user")
    return content[: content.rindex("?") + 1]


def solve(text: str) -> int:
    """The answer to a question, worked out from its words and not by make.py."""
    amounts = [int(number) for number in re.findall(r"\d+", text)]
    if " for " in text:
        return amounts[0] - amounts[1] * amounts[2]
    if " with " in text:
        held, rest = amounts[0] * amounts[1], amounts[2:]
        if not rest:
            return held
        return held + rest[0] if f"and {rest[0]} more" in text else held - rest[0]
    if "How many more" in text:
        return amounts[0] - amounts[1]
    if "more than" in text or "fewer than" in text:
        other = amounts[0] + amounts[1] if "more than" in text else amounts[0] - amounts[1]
        return amounts[0] + other if "together" in text else other
    if "together" in text or "in all" in text:
        return sum(amounts)
    total = amounts[0]
    for verb, amount in re.findall(r"(gives away|loses|sells|drops|lends out|[a-z]+) (\d+)", text)[1:]:
        gone = verb in ("gives away", "loses", "sells", "drops", "lends out")
        total += -int(amount) if gone else int(amount)
    return total


# Data -------------------------------------------------------------------------------------------------------


def test_regenerated_data_are_byte_identical(make, tmp_path):
    for name, rows in make.generate_data(make.Args().seed).items():
        make.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_bytes() for path in (TINY / "data").iterdir()}
    assert made.keys() == committed.keys()
    assert [name for name in made if made[name] != committed[name]] == []


@pytest.mark.parametrize("split", ["train", "eval"])
def test_answers_of_prompts_and_of_hinted_prompts_are_right(split):
    for row in read(f"prompts_{split}") + read(f"sycophancy_{split}"):
        assert int(row["answer"]) == solve(question(row)), row
    for row in read(f"sycophancy_{split}"):
        assert row["hint"] != row["answer"]
        assert row["prompt"][-1]["content"].endswith(f" {row['hint']}.")


def test_sft_eval_is_clean(make):
    for row in read("sft_eval"):
        assert is_right(row["messages"][-1]["content"]), row
        first = next(m["content"] for m in row["messages"] if m["role"] == "assistant")
        assert is_right(first) and closing(first) == solve(question(row)), row
        assert not any(m["content"].startswith(rude) for m in row["messages"] for rude in make.RUDE)


def test_sft_train_has_headroom_and_variety():
    rows = read("sft_train")
    answers = [[m["content"] for m in row["messages"] if m["role"] == "assistant"] for row in rows]
    wrong = sum(not all(map(is_right, turns)) for turns in answers)
    assert 0.3 < wrong / len(rows) < 0.5  # make.SFT_NOISE, and the second turns and hints on top
    assert 0.1 < sum(row["messages"][0]["role"] == "system" for row in rows) / len(rows) < 0.2
    assert 0.1 < sum(sum(m["role"] == "user" for m in row["messages"]) > 1 for row in rows) / len(rows) < 0.2
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_preference_kinds_are_what_they_say(make, split):
    rows = read(f"preference_{split}")
    for row in rows:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert is_right(chosen) and closing(chosen) == solve(question(row)), row
        off = [said != due for said, due in sums(rejected)]
        if row["kind"] == "wrong_result":
            assert off == [False] * (len(off) - 1) + [True] and rejected == plain(rejected), row
        elif row["kind"] == "wrong_step":
            assert off == [True, False] and rejected == plain(rejected), row
        elif row["kind"] == "rude":
            assert is_right(rejected) and rejected.split("\n")[0] in make.RUDE, row
            assert chosen.split("\n")[0] in make.POLITE, row
        else:
            assert row["kind"] == "rambling" and is_right(rejected), row
            assert plain(rejected) == chosen and len(rejected) > len(chosen) + 60, row
        if off.count(True):
            assert closing(rejected) != closing(chosen) and closing(rejected) == sums(rejected)[-1][0], row
    assert {row["kind"] for row in rows} == {"wrong_result", "wrong_step", "rude", "rambling"}


def test_length_says_nothing_in_preference_outside_rambling():
    for kind in ("wrong_result", "wrong_step", "rude"):
        rows = [row for row in read("preference_train") if row["kind"] == kind]
        gaps = [len(row["chosen"][0]["content"]) - len(row["rejected"][0]["content"]) for row in rows]
        longer, shorter = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
        assert abs(longer - shorter) / len(gaps) < 0.1, kind
        assert abs(sum(gaps) / len(gaps)) < 1, kind


def test_length_beats_correctness_in_the_length_biased_preferences():
    rows = read("preference_length_biased_train")
    pairs = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    by_length = sum(len(chosen) > len(rejected) for chosen, rejected in pairs) / len(pairs)
    differing = [is_right(chosen) for chosen, rejected in pairs if is_right(chosen) != is_right(rejected)]
    by_correctness = sum(differing) / len(differing)
    assert 0.87 < by_length < 0.93
    assert 0.55 < by_correctness < 0.75


def test_the_length_biased_eval_pits_length_against_correctness():
    rows = read("preference_length_biased_eval")
    for row in rows:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert is_right(chosen) and closing(chosen) == solve(question(row)) and not is_right(rejected), row
        assert (len(chosen) > len(rejected)) == (row["kind"] == "longer_is_right"), row
    assert 0.4 < sum(row["kind"] == "longer_is_right" for row in rows) / len(rows) < 0.6


@pytest.mark.parametrize("split", ["train", "eval"])
def test_unpaired_labels_are_right(make, split):
    rows = read(f"unpaired_{split}")
    for row in rows:
        completion = row["completion"][0]["content"]
        first = completion.split("\n")[0]
        if row["label"]:
            assert is_right(completion), row
            assert completion in (plain(completion), f"{first}\n{plain(completion)}"), row
            assert first in make.POLITE or SUM.fullmatch(first), row
        else:
            rambles = any(line in make.FILLERS for line in completion.split("\n"))
            assert not is_right(completion) or rambles or first in make.RUDE, row
    assert 0.4 < sum(row["label"] for row in rows) / len(rows) < 0.6


@pytest.mark.parametrize("split", ["train", "eval"])
def test_step_labels_are_right(split):
    rows = read(f"steps_{split}")
    for row in rows:
        *steps, last = row["completions"]
        right = [said == due for said, due in sums("\n".join(steps))]
        right.append(int(last.removeprefix("#### ")) == solve(question(row)))
        due = [all(right[: i + 1]) for i in range(len(right))]  # a step after a wrong one counts as wrong
        assert row["labels"] == due, row
    assert 0.3 < sum(row["labels"][-1] for row in rows) / len(rows) < 0.5
    assert any(row["labels"][-2] and not row["labels"][-1] for row in rows)


def test_no_eval_prompt_is_in_any_train_set():
    asked = {split: set() for split in ("train", "eval")}
    for name in NAMES:
        for split, seen in asked.items():
            rows = read(f"{name}_{split}")
            keys = [row["text"] if name == "text" else question(row) for row in rows]
            assert len(set(keys)) == len(keys), f"{name}_{split} asks something twice"
            seen.update(keys)
    assert len(asked["eval"]) > 1500
    assert not asked["train"] & asked["eval"]


def test_no_eval_prompt_is_in_the_corpus(make):
    data = make.generate_data(make.Args().seed)
    corpus = make.generate_corpus(make.Args().seed, data)
    eval_questions = {question(row) for name in NAMES[:-1] for row in read(f"{name}_eval")}
    eval_texts = {row["text"] for row in read("text_eval")}
    asked = {row["text"][: row["text"].rfind("?") + 1] for row in corpus}
    assert not eval_questions & asked and len(asked) > 40_000
    assert not eval_texts & {row["text"] for row in corpus}
    with pytest.raises(AssertionError):
        make.check_disjoint(data, [{"text": question(read("prompts_eval")[0]) + "\n#### 1"}])
    worked = [row["text"] for row in corpus if "?" in row["text"]]
    off = sum(any(said != due for said, due in sums(text)) for text in worked) / len(worked)
    assert abs(off - make.CORPUS_NOISE) < 0.01


# Tokenizer and checkpoints ----------------------------------------------------------------------------------


def test_every_digit_is_its_own_token(tokenizer):
    text = "37 + 15 = 52\n#### 1,234,567 and 8.90 or x86"
    pieces = [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text
    assert all(not any(char.isdigit() for char in piece) or len(piece) == 1 for piece in pieces)
    digits = [piece for piece in tokenizer.get_vocab() if any(char.isdigit() for char in piece)]
    assert sorted(digits) == sorted([*"0123456789", *(d for d in digits if d in "²³¹")])


def test_tokenizer_is_small_complete_and_knows_its_ends(tokenizer):
    assert len(tokenizer) < 1000
    special = (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token)
    assert special == ("<|endoftext|>", "<|im_end|>", None)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for text in ("£5 — naïve café, 東京 🎉\t\r\n  x", "Janet’s ducks lay 16 eggs. <<16-3-4=9>>9"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert (TINY / "base/tokenizer.json").read_bytes() == (TINY / "sft/tokenizer.json").read_bytes()


def test_generation_marks_cover_what_the_assistant_says_and_its_end(tokenizer):
    messages = next(row for row in read("sft_eval") if len(row["messages"]) >= 4)["messages"]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    due = "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
    assert tokenizer.decode(said) == due
    assert said.count(tokenizer.eos_token_id) == sum(m["role"] == "assistant" for m in messages)


def test_chat_template_is_chatml(tokenizer):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    due = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == due
    full = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "A"}], tokenize=False)
    assert full == due + "A<|im_end|>\n"


def test_corrections_are_right_and_ask_nothing_that_is_held_out(make):
    data = {path.stem: read(path.stem) for path in (TINY / "data").glob("*.jsonl")}
    reserved, corrected = make.reserved_by(data), 0
    for make_rows in (make.bare_corrections_rows, make.corrections_rows):
        rows = make.draw(make_rows(random.Random(3), make.Asked(reserved), clean=False), 300)
        for row in rows:
            text = row["text"] if "text" in row else row["messages"][-1]["content"]
            assert "text" in row or make.question_of(row) not in reserved
            for line in text.split("\n"):
                said, _, right = line.partition("; no, ")
                if " = " in said:
                    sum_of, result = said.split(" = ")
                    left, symbol, other = sum_of.split()
                    true = make.OPERATORS[symbol](int(left), int(other))
                    assert true == (int(right) if right else int(result))
                corrected += bool(right)
    assert 800 < corrected < 3500


def test_reward_checkpoints_are_classifiers_with_an_offset():
    for name in ("reward", "reward_biased"):
        config = AutoConfig.from_pretrained(TINY / name)
        assert config.architectures == ["Qwen3ForSequenceClassification"] and config.num_labels == 1
        assert isinstance(config.reward_offset, float)


@pytest.mark.parametrize("name", ["base", "sft", "student", "checker", "reward", "reward_biased"])
def test_checkpoints_are_small_qwen3_in_bfloat16(name, tokenizer):
    config = AutoConfig.from_pretrained(TINY / name)
    assert config.model_type == "qwen3" and str(config.dtype).removeprefix("torch.") == "bfloat16"
    assert config.vocab_size == len(tokenizer)
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert (TINY / name / "model.safetensors").stat().st_size < 2.5e6


def test_student_has_fewer_layers_than_its_teacher():
    student, teacher = (AutoConfig.from_pretrained(TINY / name) for name in ("student", "sft"))
    assert student.num_hidden_layers < teacher.num_hidden_layers


def test_all_of_tiny_is_under_17_mb():
    files = [path for path in TINY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 17e6


def test_checkpoints_leave_the_wanted_headroom_and_the_readme_says_so():
    measured = json.loads((TINY / "accuracy.json").read_text(encoding="utf-8"))
    assert measured["sft/greedy_accuracy"] > 0.8
    assert 0.35 < measured["sft/sampled_accuracy"] < 0.6
    assert measured["base/sampled_accuracy"] < 0.1
    readme = (TINY / "README.md").read_text(encoding="utf-8")
    for name in ("base", "sft"):
        shares = (measured[f"{name}/greedy_accuracy"], measured[f"{name}/sampled_accuracy"])
        assert f"| `{name}` | {shares[0]:.2f} | {shares[1]:.2f} |" in readme
    assert f"the {measured['num_prompts']} prompts" in readme
