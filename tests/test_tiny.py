"""tiny/: the data are what they claim to be, no eval prompt leaks, the tokenizer is what scripts expect."""

import json
import random
import re
from statistics import fmean as share

import pytest
from conftest import ROOT, read_lines
from samples import tiny_tokenizer
from transformers import AutoConfig

from tiny import make

TINY = ROOT / "tiny"
NAMES = "sft preference preference_length_biased unpaired prompts steps sycophancy text".split()
SUM = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")
GONE = ("gives away", "loses", "sells", "drops", "lends out")


def read(name: str) -> list[dict]:
    return read_lines(TINY / "data" / f"{name}.jsonl")


def sums(text: str) -> list[tuple[int, int]]:
    """(what the text says, what it should say) for every sum in it."""
    found = [(int(left), sign, int(right), int(said)) for left, sign, right, said in SUM.findall(text)]
    return [(said, {"+": a + b, "-": a - b, "*": a * b}[sign]) for a, sign, b, said in found]


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


def pair(row: dict) -> tuple[str, str]:
    return row["chosen"][0]["content"], row["rejected"][0]["content"]


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
    changes = re.findall(rf"({'|'.join(GONE)}|[a-z]+) (\d+)", text)[1:]
    return amounts[0] + sum(-int(amount) if verb in GONE else int(amount) for verb, amount in changes)


def test_regenerated_data_are_byte_identical(tmp_path):
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


@pytest.mark.parametrize("split", ["train", "eval"])
def test_preference_kinds_are_what_they_say_and_length_tells_only_rambling(split):
    gaps = {"wrong_result": [], "wrong_step": [], "rude": [], "rambling": []}
    for row in read(f"preference_{split}"):
        chosen, rejected = pair(row)
        gaps[row["kind"]].append(len(chosen) - len(rejected))
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
            assert is_right(rejected) and plain(rejected) == chosen and gaps["rambling"][-1] < -60, row
        if off.count(True):
            assert closing(rejected) != closing(chosen) and closing(rejected) == sums(rejected)[-1][0], row
    assert all(gaps.values())
    for kind in ("wrong_result", "wrong_step", "rude") if split == "train" else ():
        assert abs(share(g > 0 for g in gaps[kind]) - share(g < 0 for g in gaps[kind])) < 0.1, kind
        assert abs(sum(gaps[kind]) / len(gaps[kind])) < 1, kind


def test_length_biased_preferences_follow_length_in_training_and_pit_it_against_right_in_eval():
    pairs = list(map(pair, read("preference_length_biased_train")))
    assert 0.87 < share(len(chosen) > len(rejected) for chosen, rejected in pairs) < 0.93
    assert 0.55 < share(is_right(c) for c, r in pairs if is_right(c) != is_right(r)) < 0.75
    rows = read("preference_length_biased_eval")
    for row in rows:
        chosen, rejected = pair(row)
        assert is_right(chosen) and closing(chosen) == solve(question(row)) and not is_right(rejected), row
        assert (len(chosen) > len(rejected)) == (row["kind"] == "longer_is_right"), row
    assert 0.4 < share(row["kind"] == "longer_is_right" for row in rows) < 0.6


@pytest.mark.parametrize("split", ["train", "eval"])
def test_unpaired_labels_and_step_labels_are_right(split):
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
    assert 0.4 < share(row["label"] for row in rows) < 0.6
    rows = read(f"steps_{split}")
    for row in rows:
        *steps, last = row["completions"]
        right = [said == due for said, due in sums("\n".join(steps))]
        right.append(int(last.removeprefix("#### ")) == solve(question(row)))
        due = [all(right[: i + 1]) for i in range(len(right))]  # a step after a wrong one counts as wrong
        assert row["labels"] == due, row
    assert 0.3 < share(row["labels"][-1] for row in rows) < 0.5
    assert any(row["labels"][-2] and not row["labels"][-1] for row in rows)


def test_no_eval_prompt_is_in_any_train_set_or_in_the_corpus():
    asked = {"train": set(), "eval": set()}
    for name in NAMES:
        for split, seen in asked.items():
            keys = [row["text"] if name == "text" else question(row) for row in read(f"{name}_{split}")]
            assert len(set(keys)) == len(keys), f"{name}_{split} asks something twice"
            seen.update(keys)
    assert len(asked["eval"]) > 1500 and not asked["train"] & asked["eval"]
    data = make.generate_data(make.Args().seed)
    texts = [row["text"] for row in make.generate_corpus(make.Args().seed, data)]
    in_corpus = {text[: text.rfind("?") + 1] for text in texts}
    assert len(in_corpus) > 40_000 and not asked["eval"] & (in_corpus | set(texts))
    with pytest.raises(AssertionError):
        make.check_disjoint(data, [{"text": question(read("prompts_eval")[0]) + "\n#### 1"}])
    off = share(any(said != due for said, due in sums(text)) for text in texts if "?" in text)
    assert abs(off - make.CORPUS_NOISE) < 0.01


def rows_of(maker, count: int = 400) -> list[dict]:
    return make.draw(maker(random.Random(0), make.Asked(set()), clean=False), count)


def test_critiques_tell_good_from_bad_and_revisions_mend_words_only_when_told_and_sums_always():
    lines = (TINY / "constitution.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(lines) == sorted(sum(make.CONSTITUTION.values(), ()))
    seen = []
    for row in rows_of(make.revisions_rows):
        request, answer, critique, revision = (row["messages"][n]["content"] for n in (-4, -5, -3, -1))
        due, rude = solve(question(row)), bool(re.search(make.RUDE_WORDS, answer))
        seen.append((rude, closing(answer) != due))
        polite = any(line in request for line in make.CONSTITUTION["polite"])
        told = f"{plain(revision)[: plain(revision).index('#')]}It says {closing(answer)}: "
        told += "wrong." if closing(answer) != due else "right."
        assert critique == (f"It is {'rude' if rude else 'polite'}." if polite else told), row
        assert bool(re.search(make.RUDE_WORDS, revision)) == (rude and not polite)
        assert is_right(revision) and closing(revision) == due
    assert share(rude for rude, _ in seen) == pytest.approx(make.RUDE_SHARE, abs=0.06)
    assert share(wrong for _, wrong in seen) == pytest.approx(make.SFT_NOISE, abs=0.06)


def test_judgements_go_by_their_principle_in_both_places():
    decided = []
    for row in rows_of(make.judgements_rows):
        asked, thought, _, label = (turn["content"] for turn in row["messages"])
        parts = re.fullmatch(r"(.*)\n\nA: (.*)\n\nB: (.*)\n\nCheck (.*)", asked, re.DOTALL).groups()
        polite = any(line in parts[3] for line in make.CONSTITUTION["polite"])
        due = solve(parts[0][: parts[0].rindex("?") + 1].rpartition("User: ")[2])
        good = [not re.search(make.RUDE_WORDS, x) if polite else closing(x) == due for x in parts[1:3]]
        verdicts = [f"{who} is {'polite' if kind else 'rude'}." for who, kind in zip("AB", good, strict=True)]
        if not polite:
            said = zip("AB", parts[1:3], good, strict=True)
            verdicts = [f"{who} says {closing(x)}: {'right' if kind else 'wrong'}." for who, x, kind in said]
        assert thought.split("\n")[-2:] == verdicts and all(said == right for said, right in sums(thought))
        if good[0] != good[1]:
            decided.append(label)
            assert label == "AB"[good[1]], row
    assert 0.8 < len(decided) / 400 < 0.9 and 0.4 < share(label == "A" for label in decided) < 0.6


def test_tokenizer_is_small_complete_knows_its_ends_and_splits_digits():
    tokenizer = tiny_tokenizer()
    special = (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token)
    assert special == ("<|endoftext|>", "<|im_end|>", None) and len(tokenizer) < 1000
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for text in ("£5 — naïve café, 東京 🎉\t\r\n  x", "37 + 15 = 52\n#### 1,234,567 or x86. <<16-3-4=9>>9"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    digits = [piece for piece in tokenizer.get_vocab() if any(char.isdigit() for char in piece)]
    assert sorted(digits) == sorted([*"0123456789", *(d for d in digits if d in "²³¹")])
    assert (TINY / "base/tokenizer.json").read_bytes() == (TINY / "sft/tokenizer.json").read_bytes()


def test_chat_template_is_chatml_and_marks_what_the_assistant_says_and_its_end():
    tokenizer = tiny_tokenizer()
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    due = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == due
    messages = [*messages, {"role": "assistant", "content": "A"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == due + "A<|im_end|>\n"
    messages += [{"role": "user", "content": "V"}, {"role": "assistant", "content": "B"}]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "A<|im_end|>B<|im_end|>" and said.count(tokenizer.eos_token_id) == 2


def test_checkpoints_are_small_qwen3_in_bfloat16_and_judges_have_an_offset():
    tokenizer = tiny_tokenizer()
    names = ("base", "sft", "student", "checker", "reward", "reward_biased", "constitutional")
    configs = {name: AutoConfig.from_pretrained(TINY / name) for name in names}
    for name, config in configs.items():
        assert config.model_type == "qwen3" and str(config.dtype).removeprefix("torch.") == "bfloat16"
        assert config.vocab_size == len(tokenizer)
        assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
        if "reward" in name:
            assert config.architectures == ["Qwen3ForSequenceClassification"] and config.num_labels == 1
            assert isinstance(config.reward_offset, float)
    assert configs["student"].num_hidden_layers < configs["sft"].num_hidden_layers
    files = [path for path in TINY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 20e6


def test_checkpoints_leave_the_wanted_headroom_and_the_readme_says_so():
    measured = json.loads((TINY / "accuracy.json").read_text(encoding="utf-8"))
    assert measured["sft/greedy_accuracy"] > 0.8 and 0.35 < measured["sft/sampled_accuracy"] < 0.6
    assert measured["base/sampled_accuracy"] < 0.1
    readme = (TINY / "README.md").read_text(encoding="utf-8")
    for name in ("base", "sft"):
        greedy, sampled = (measured[f"{name}/{kind}_accuracy"] for kind in ("greedy", "sampled"))
        assert f"| `{name}` | {greedy:.2f} | {sampled:.2f} |" in readme
    assert f"the {measured['num_prompts']} prompts" in readme
