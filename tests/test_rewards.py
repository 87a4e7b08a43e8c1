"""rewards.py: answers extracted and compared, formats and lengths, and reward models.

Expected values are worked by hand. Answers are also held against the labels that GSM8K's authors gave their
models' solutions, and reward models against transformers' own scores of single conversations.
"""

import importlib.util
import json
import math
import re
import shutil
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from conftest import ROOT, start
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rewards

ASKED = [{"role": "user", "content": "Nora has 12 apples and gives away 5. How many are left?"}]
ANSWERS = ["12 - 5 = 7\n#### 7", "12", "<think>12 - 5 = 8</think>#### 8", "I do not know. " * 30]
HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None


def grade(completion, answer, reward=rewards.math_answer, **settings):
    return reward(["?"], [completion], [answer], **settings)[0]


def score(reward, *completions, **columns):
    return reward(prompts=["?"] * len(completions), completions=list(completions), **columns)


def said(text):
    return [{"role": "assistant", "content": text}]


def table(text, width=2):
    """The cells of a text between bars and line breaks, `width` to a row; `\\n` in one is a line break."""
    cells = [cell.strip().replace(r"\n", "\n") for cell in text.strip().replace("\n", "|").split("|")]
    return list(zip(*(cells[n::width] for n in range(width)), strict=True))


# Texts ------------------------------------------------------------------------------------------------------


def test_messages_count_by_the_last_of_the_assistant():
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "3."}]
    contents = {"assistant": "Let me use a tool: #### 1", "tool": "#### 2", "user": "#### 4"}
    before, tool, after = ({"role": role, "content": content} for role, content in contents.items())
    messages = [before, tool, {"role": "assistant", "content": parts}, after]
    assert rewards.text_of(messages) == "It is 3." and grade(messages, "3") == 1.0
    assert rewards.text_of([after]) == "" == rewards.text_of([{"role": "assistant", "content": None}])
    assert rewards.text_of(None) is None is rewards.text_of([{"role": "assistant", "content": 5}])


# Mathematics ------------------------------------------------------------------------------------------------

NUMBERS = r"""
42 | 42               | 1,234 | 1234      | 1,234,567.50 | 2469135/2 | -7 | -7          | +7 | 7
18.00 | 18            | .5 | 1/2          | 0.1 | 1/10               | 3/4 | 3/4        | 1 1/2 | 3/2
\frac{3}{4} | 3/4     | \frac34 | 3/4     | -\dfrac{3}{4} | -3/4     | -1 1/2 | -3/2    | 1\frac{1}{2} | 3/2
2.5e3 | 2500          | 5e-1 | 1/2        | $18 | 18                 | \$18 | 18        | -$5 | -5
$-5 | -5              | $18$ | 18         | \(18\) | 18           | 18 dollars | 18 | 18 dollars per day. | 18
5 km | 5              | 5km/h | 5         | 5 m | 5                  | 12 m^2 | 12      | 30°C | 30
30^\circ | 30         | 5\ \text{cm} | 5  | 5\text{ square meters} | 5 | 10{,}000 | 10000 | 10,\!000 | 10000
3 million | 3000000   | 18. | 18          | $2.5 billion dollars | 2500000000 | **18** | 18 | x = 5 | 5
"""


def test_numbers_are_read_exactly():
    pairs = [*table(NUMBERS), ("\u22127", -7), ("9" * 400, 10**400 - 1)]
    assert len(pairs) == 42
    for text, value in pairs:
        assert rewards.number(text) == (Fraction(value), False), text


NO_NUMBERS = ["", "eighteen", "2x", "2 x", "2 pi", r"2\pi", "5 or 6", "5, 6", "1/0", "12,34", "2^3", "1.2.3"]
NO_NUMBERS += ["3 + 4", "6:30", "1e99999999", "1" * 5000, "5 a" + "b" * 5000 + "!"]


def test_what_is_no_number_is_not_read_as_one():
    began = time.perf_counter()
    for text in NO_NUMBERS:
        assert rewards.number(text) == (None, False), text
    assert time.perf_counter() - began < 5  # no pattern tries all ways of failing


EQUAL = r"""
18 | 18.00          | 3/4 | 0.75     | 50% | 50       | 50 | 50%           | 0.5 | 50%        | 50% | 1/2
50% | 50 percent    | 1234 | 1,234   | Monday | monday. | \text{Monday} | Monday  | \sqrt{2} | \sqrt {2}
"""
UNEQUAL = r"""
1/3 | 0.333333333333 | 0.3 | 0.30000000000000004 | 50% | 0.5% | 50 | 0.5 | 5 | -5 | Monday | Tuesday
7 | seven
"""


def test_equality_is_exact():
    assert [pair for pair in table(EQUAL) if not rewards.same_answer(*pair)] == []
    assert [pair for pair in table(UNEQUAL) if rewards.same_answer(*pair)] == []


MARKED = r"""
#### 42 | 42           | so 7 + 5\n#### 12\nThat took 3 steps. | 12               | A: 18 | 18
It is \boxed{42}. | 42 | First \boxed{1}, then \boxed{\frac{\sqrt{3}}{2}} | \frac{\sqrt{3}}{2}
<answer> 18 </answer> | 18    | \boxed{\{1, 2\}} | \{1, 2\}                      | \boxed{5}, \boxed{6 | 5
**Answer:** 18 | 18    | <answer>1</answer> no, <answer>\n2\n</answer> | 2     | \boxed{1} #### 2 | 2
Final answer: 18 | 18  | <answer>The total is \boxed{18} dollars.</answer> | 18 | no mark, 18 | None
The answer is 3.5 h. | 3.5 h  | So the answer is 18. That took 3 steps. | 18           | Plan A: no 5 | None
The answer is x = 18. | 18    | The answer is $5 + 13 = 18$. | 18$                     | <answer>open 5 | None
the answer is: **18** | 18    | The answer is \boxed{18}, of 3 x 6. | 18
#### Step 1: add\n#### 2. subtract\n#### Result:\n | None
"""
LAST_NUMBERS = r"""
He has 3, and she 4. | 4                     | That makes $1,234.50. | $1,234.50 | 16-3 | 3 | x is -3 | -3
which is -\frac{3}{4} | -\frac{3}{4}         | a share of 3/4 | 3/4 | about 50% of it | 50%  | none | None
"""


def test_the_last_mark_gives_the_answer_and_without_a_mark_the_last_number():
    for text, answer in table(MARKED):
        assert str(rewards.marked_answer(text)) == answer, text
    for text, answer in [*table(LAST_NUMBERS), ("it falls by \u22124 degrees", "-4")]:
        assert str(rewards.final_number(text)) == answer, text


SAME_FINALS = {
    "42": ["#### 42", r"\boxed{42.0}", "<answer>It is 42 apples</answer>", "A: $42", "The answer is 42."],
    "3/4": [r"\boxed{\frac{3}{4}}", "#### 0.75", "Final answer: 75/100", "the answer is x = 3/4"],
    "1234": ["#### 1,234", r"so \boxed{1234\text{ cm}}", "<think>5</think>1234", "1,234%"],
    "monday": ["A: Monday", r"\boxed{\text{Monday}}", "The answer is monday.", "#### **Monday**"],
    "x+1": [r"\boxed{x + 1}", "#### $x+1$"],
    "I give up": [" I give up\n", [{"role": "assistant", "content": "I give up"}]],
    "": ["", None],
}


def test_equal_final_answers_are_equal_texts_for_a_majority():
    for answer, texts in SAME_FINALS.items():
        assert {rewards.final_answer(text) for text in texts} == {answer}


GRADES = r"""
<think>#### 5</think>It is 6. | 6 | 1 | 0      | it was opened: 5</think>\n6 | 6 | 1 | 0
<think>It is 6, no doubt | 6 | 0 | 0           | <think>5</think>6<think>7 | 6 | 0 | 0
<answer>It is 18 euros</answer> 3 | 18 | 1 | 0 | A: There are 18 apples | 18 | 1 | 0
#### 18 | 18 | 1 | 1                           | \boxed{18} | 18 | 1 | 1
<answer>$18</answer> | 18 | 1 | 1              | A: 18 | 18 | 1 | 0
18 | 18 | 1 | 0                                | The answer is 18 | 18 | 1 | 0
\boxed{17} no, 18 | 18 | 0 | 0                 | #### 18 or 19 | 18 | 0 | 0
no number | 18 | 0 | 0                         | | 18 | 0 | 0
That is $18 a day. | 18.0 | 1 | 0              | That is $19 a day. | 18 | 0 | 0
That is $18. | 2 * 9 = <<2*9=18>>18\n#### 18 | 1 | 0 | 1,450,000 | thus\n#### 1,450,000 | 1 | 0
"""


def test_strict_wants_a_format_that_was_asked_for_and_lenient_reads_numbers():
    for completion, gold, lenient, strict in table(GRADES, 4):
        assert grade(completion, gold) == float(lenient), completion
        assert grade(completion, gold, rewards.math_answer_strict) == float(strict), completion
    scores = score(rewards.math_answer, *"55555", answer=["5", None, " ", 5, 5.0])
    assert scores == [1.0, None, None, 1.0, 1.0]
    only_boxed = {"formats": ("boxed",), "last_number": False}
    assert grade(r"\boxed{18} #### 19", "18", **only_boxed) == 1.0
    assert grade("#### 18", "18", **only_boxed) == 0.0
    assert grade("A: 18", "18", formats=("line",), last_number=False) == 1.0


OPEN = [r"\boxed{", "<answer>", "#### ", "<think>", "```\n", "9,", "1/", "A:", "$", "the answer is ="]


def test_many_open_marks_take_no_time():
    began = time.perf_counter()
    for piece in OPEN:
        grade(piece * 4000, "18")
        rewards.last_fence(piece * 4000)
    assert time.perf_counter() - began < 5


@pytest.mark.skipif(HAS_MATH_VERIFY, reason="math-verify is installed")
def test_without_math_verify_rows_that_need_it_are_not_scored_and_one_warning_says_so():
    rewards.math_verify.cache_clear()
    with pytest.warns(UserWarning, match="pip install math-verify") as caught:
        symbolic = score(rewards.math_answer, r"\boxed{2\sqrt{2}}", "none", answer=[r"\sqrt{8}"] * 2)
        numeric = score(rewards.math_answer, r"\boxed{2^3}", "8", answer=["8"] * 2)
    assert symbolic == [None, None]  # of the row, whatever the completion is: nothing can be gained by it
    assert numeric == [0.0, 1.0] and len(caught) == 1
    rewards.math_verify.cache_clear()
    with warnings.catch_warnings():  # words and plain numbers do not need it
        warnings.simplefilter("error")
        completions = ["It was Monday", "I give up", "A: Monday"]
        assert score(rewards.math_answer, *completions, answer=["Monday", "18", "Monday"]) == [0, 0, 1]


SYMBOLIC = r"""
\sqrt{8} | 2\sqrt{2} | 1      | \frac{\pi}{2} | \pi/2 | 1            | x^2+2x+1 | (x+1)^2 | 1 | 8 | 2^3 | 1
\{1, 2\} | \{2, 1\} | 1       | 1/2 | \frac{\sqrt{4}}{4} | 1         | \sqrt{8} | 2 | 0       | 8 | 2^4 | 0
(1, 2) | (2, 1) | 0           | \sqrt{8} | \frac{ | 0                | x+1 | x-1 | 0
"""


@pytest.mark.skipif(not HAS_MATH_VERIFY, reason="math-verify is not installed")
def test_mathematics_goes_through_math_verify():
    for gold, answer, reward in table(SYMBOLIC, 3):
        completion = rf"\boxed{{{answer}}}"
        assert grade(completion, gold) == float(reward), (gold, answer)
        with ThreadPoolExecutor(1) as pool:  # where no alarm can be set
            assert pool.submit(grade, completion, gold).result() == float(reward), (gold, answer)


@pytest.mark.filterwarnings("ignore:math-verify")
def test_agrees_with_the_labels_of_gsm8k(gsm8k):
    path = gsm8k / "example_model_solutions.jsonl"
    if not path.exists():
        pytest.skip("no example solutions")
    rows = [json.loads(line) for line in path.open()]
    solutions = [(row["ground_truth"], m) for row in rows for m in row.values() if isinstance(m, dict)]
    stated = [(gold, m["solution"], m["is_correct"]) for gold, m in solutions if "A: " in m["solution"]]
    golds, texts, labels = zip(*stated, strict=True)
    assert len(stated) > 5000 and 0.2 < sum(labels) / len(labels) < 0.6
    for settings in ({}, {"formats": ("line",), "last_number": False}):
        assert rewards.math_answer(texts, texts, golds, **settings) == [float(label) for label in labels]
    finals = [rewards.final_answer(text) == rewards.final_answer(gold) for text, gold in zip(texts, golds)]
    assert finals == list(labels)
    assert not any(rewards.math_answer_strict(texts, texts, golds))  # none of them is in a format it asks for
    golds = [json.loads(line)["answer"] for line in (gsm8k / "test.jsonl").open()]
    assert set(rewards.math_answer_strict(golds, golds, golds)) == {1.0}
    assert sum(rewards.math_answer(golds, golds[1:] + golds[:1], golds)) < 0.05 * len(golds)


# Format, length and repetition ------------------------------------------------------------------------------

# A completion; what it is worth after a prompt, after a text that ends with <think>, and after messages
THOUGHTS = r"""
<think>2 + 2</think>4 | 1 | 0 | 1             | \n<think>\n2 + 2\n</think>\n\n4\n | 1 | 0 | 1
2 + 2</think>4 | 0 | 1 | 1                    | <think>2 + 2</think> | 0 | 0 | 0
2 + 2</think> | 0 | 0 | 0                     | <think> </think>4 | 0 | 0 | 0
</think>4 | 0 | 0 | 0                         | 4 <think>2 + 2</think>4 | 0 | 0 | 0
<think>2</think><think>2</think>4 | 0 | 0 | 0 | <think>2<think>2</think>4 | 0 | 0 | 0
<think>2</think></think>4 | 0 | 0 | 0         | 2</think>2</think>4 | 0 | 0 | 0
</think>2<think>4 | 0 | 0 | 0                 | 4 | 0 | 0 | 0
"""


def test_think_format_where_a_chat_template_may_have_opened_the_thought():
    for text, *expected in table(THOUGHTS, 4):
        prompts, completions = ["2 + 2?", "2 + 2?<think>\n", ASKED], [text, text, said(text)]
        assert rewards.think_format(prompts, completions) == list(map(float, expected)), text


JSON = ['{"a": [1, 2.5, null]}', " [] \n", "42", "<think>{</think>{}", "9" * 5000]
JSON += ['Here:\n```json\n{"a": 1}\n```\nand\n```python\nx = {}\n```']
NO_JSON = ["{'a': 1}", '{"a": 1,}', '{"a": NaN}', "-Infinity", '{"a": 1} and more', "", "[" * 100_000]


def test_json_format():
    assert score(rewards.json_format, *JSON, *NO_JSON) == [1.0] * len(JSON) + [0.0] * len(NO_JSON)


def test_length_and_repetition_penalty_by_hand():
    texts = ["a b", "a b c d", "a b c d e", "a b c d e f g h", "a " * 100]
    assert score(rewards.length_penalty, *texts, max_length=4) == [0.0, 0.0, -0.25, -1.0, -1.0]
    ids = [[1] * n for n in (4, 5, 6, 8, 0)]  # tokens go before words
    penalties = score(rewards.length_penalty, *texts, completion_ids=ids, max_length=4)
    assert penalties == [0.0, -0.25, -0.5, -1.0, 0.0]
    # a b a b a b: trigrams aba bab aba bab, of which 2 of 4 repeat; bigrams ab ba ab ba ab: 3 of 5
    assert score(rewards.repetition_penalty, "a b a B a b", "a b c d", "a b", "") == [-0.5, 0.0, 0.0, 0.0]
    assert score(rewards.repetition_penalty, "a b a b a b", n=2) == pytest.approx([-0.6])
    assert score(rewards.repetition_penalty, "a a a a a", scale=3) == pytest.approx([-2.0])
    assert score(rewards.repetition_penalty, "x", completion_ids=[[7, 8, 7, 8, 7, 8]]) == [-0.5]


def overlong(lengths, **settings):
    ids = [range(length) for length in lengths]
    return score(rewards.soft_overlong, *["one word"] * len(ids), completion_ids=ids, **settings)


def test_soft_overlong_is_equation_13_of_dapo():
    # L_max 20, L_cache 8: 0 up to 12, -1/8 a token, -1 at 20
    lengths, penalties = (
        (0, 12, 13, 16, 19, 20, 21, 10**6),
        [0.0, 0.0, -0.125, -0.5, -0.875, -1.0, -1.0, -1.0],
    )
    assert overlong(lengths, max_completion_length=20, cache=8) == penalties
    assert overlong((16384, 18432, 20480)) == [0.0, -0.5, -1.0]  # the paper's
    assert overlong((8, 9, 10, 11), max_completion_length=10) == [0, -0.5, -1, -1]  # a fifth of 10 by default
    assert overlong((20, 21), max_completion_length=20, cache=0) == [0.0, -1.0]
    with pytest.raises(ValueError, match="completion_ids"):
        score(rewards.soft_overlong, "text")


# Reward models ----------------------------------------------------------------------------------------------


def stock_score(folder, text):
    """The reward that transformers gives to a text alone, read at its last token."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32")
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt").input_ids
    return model(input_ids=ids).logits.item() + model.config.reward_offset


@pytest.mark.parametrize("name", ["reward", "reward_biased"])
def test_a_reward_model_scores_as_transformers_does(name, tiny, one_cpu):
    folder, answers = tiny / name, list(map(said, ANSWERS))
    chat = f"<|im_start|>user\n{ASKED[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    expected = [stock_score(folder, f"{chat}{answer}<|im_end|>") for answer in ANSWERS]
    for max_tokens in (1, 400, 2**12):  # whatever the batches are
        reward = rewards.reward_model(folder, max_tokens=max_tokens)
        scores = reward(prompts=[ASKED] * 4, completions=answers, answer=["7"] * 4)
        assert scores == pytest.approx(expected, abs=1e-5)
    assert reward([ASKED] * 4, ANSWERS) == pytest.approx(expected, abs=1e-5)
    cut = reward([ASKED] * 2, answers[:2], truncated=[True, False])
    assert cut == pytest.approx([stock_score(folder, chat + ANSWERS[0]), expected[1]], abs=1e-5)
    texts = reward(["2 + 2?\n"] * 2, ["4", "5"], truncated=[False, True])  # of text prompts, EOS behind
    expected = [stock_score(folder, "2 + 2?\n4<|im_end|>"), stock_score(folder, "2 + 2?\n5")]
    assert texts == pytest.approx(expected, abs=1e-5)
    coarse = rewards.reward_model(folder, dtype="bfloat16")([ASKED] * 4, ANSWERS)
    assert coarse == pytest.approx(scores, abs=0.2) and coarse != scores


def test_an_ensemble_gives_the_mean_or_less_where_its_members_differ(tiny, tmp_path, one_cpu):
    for n, name in enumerate(("reward", "reward_biased")):
        shutil.copytree(tiny / name, tmp_path / f"member_{n}" / "model")
    (tmp_path / "ensemble.json").write_text('{"members": ["member_0/model", "member_1/model"]}')
    folders = [tiny / "reward", tiny / "reward_biased"]
    folders += [f"{tmp_path}{how}" for how in ("", ":mean", ":min", ":mean_minus_std")]
    scores = [rewards.reward_model(folder)([ASKED] * 4, ANSWERS) for folder in folders]
    for one, other, default, mean, least, cautious in zip(*scores, strict=True):
        assert default == mean == pytest.approx((one + other) / 2, abs=1e-6)
        assert least == pytest.approx(min(one, other), abs=1e-6)
        assert cautious == pytest.approx(mean - abs(one - other) / 2, abs=1e-6)


def test_rows_that_a_reward_model_cannot_read_are_not_scored(tiny, tmp_path, one_cpu):
    shutil.copytree(tiny / "reward", tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    short = rewards.reward_model(tmp_path / "short")
    with pytest.warns(UserWarning, match="refuses"):
        weird = short([ASKED, ASKED, None, [{}], ASKED, "?"], [ANSWERS[3], None, "4", "4", ANSWERS[1], 5])
    assert [reward is None for reward in weird] == [True, True, True, True, False, True]
    assert weird[4:5] == pytest.approx(rewards.reward_model(tiny / "reward")([ASKED], ["12"]), abs=1e-5)


def test_tokens_of_texts_end_with_eos_begin_with_one_bos_and_none_reaches_across(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "reward", bos_token="<|endoftext|>")
    ids = [rewards.conversation_ids(tokenizer, "2 + 2 =", " 4", cut, None, None) for cut in (True, False)]
    border = tokenizer("2 + 2 =").input_ids + tokenizer(" 4").input_ids  # as in training
    assert ids == [border, [*border, tokenizer.eos_token_id]] and tokenizer("2 + 2 = 4").input_ids != border
    bos = ("<|endoftext|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", special_tokens=[bos])
    for prompt in ("2 + 2 =", "<|endoftext|>2 + 2 ="):
        ids = rewards.conversation_ids(tokenizer, prompt, "4", False, None, None)
        assert ids.count(tokenizer.bos_token_id) == 1 == ids.count(tokenizer.eos_token_id), prompt


def test_what_is_no_reward_model_is_refused(tiny, tmp_path, one_cpu):
    for name in ("no_head", "two_labels", "no_template"):
        shutil.copytree(tiny / "reward", tmp_path / name)
    weights = load_file(tmp_path / "no_head" / "model.safetensors")
    weights.pop("score.weight")
    save_file(weights, tmp_path / "no_head" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tiny / "reward" / "config.json").read_text()) | {"id2label": {"0": "a", "1": "b"}}
    (tmp_path / "two_labels" / "config.json").write_text(json.dumps(config))
    for folder, problem in (
        (tiny / "sft", "is no reward model, but Qwen3ForCausalLM"),
        (tmp_path / "two_labels", "with 2 outputs"),
        (tmp_path / "no_head", "lacks .*score.weight"),
        (f"{tiny}/reward:median", "no such folder"),
    ):
        with pytest.raises(ValueError, match=problem):
            rewards.reward_model(folder)
    (tmp_path / "no_template" / "chat_template.jinja").unlink()
    plain = rewards.reward_model(tmp_path / "no_template")
    assert plain(["2 + 2 = "], ["4"])[0] is not None
    with pytest.raises(ValueError, match="no chat template"):
        plain([ASKED], [said("4")])


# The module -------------------------------------------------------------------------------------------------

NAMES = re.findall(r"^    ([a-z_]+) {4,}\S", rewards.__doc__, re.MULTILINE)


def test_every_reward_takes_whatever_columns_a_script_passes_and_no_row_ends_a_batch():
    assert len(NAMES) == 8
    weird = [None, 5, 0.5, {"role": "assistant"}, [{"role": "assistant", "content": 5}]]
    prompts, completions = ["?", None, *weird, "?"], ["5", "#### 5", *weird, [{}, "5"]]
    columns = {"answer": ["5", "5", None, [], {}, 0.5, "5", float("nan")], "level": [1] * 8, "step": 3}
    columns |= {"tests": [None, 5, "f()", [], [5], "", "1", {}], "entry_point": [None, 5, {}, *"abcde"]}
    columns |= {"completion_ids": [[1], [2], *[None] * 5, []]}
    for name in NAMES:
        settings = {"allow_code_execution": True} if name == "code_tests" else {}
        scores = getattr(rewards, name)(prompts, completions, **columns, **settings)
        assert len(scores) == 8 and all(s is None or type(s) is float for s in scores), name
        assert scores[2:7] == [None] * 5 and (name == "code_tests" or None not in scores[:2]), name
    for name in ("length_penalty", "repetition_penalty"):
        assert getattr(rewards, name)(prompts, completions) == [0.0, 0.0, *[None] * 5, 0.0]


LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("rewards", sys.argv[1])
rewards = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rewards)
programs, tests = ["def f(x): return 2 * x"] * 2, ["assert f(2) == 4", "f(1"]
print(rewards.code_tests("??", programs, tests, allow_code_execution=True))
print(*sys.modules)
"""
JUDGE = "print(*rewards.reward_model('tiny/reward')(['2 + 2 ='], ['4']))"


def test_it_is_loaded_by_path_from_any_folder_and_imports_only_the_standard_library(tmp_path):
    path = ROOT / "rewards.py"
    verdicts, modules = start(sys.executable, "-ISc", LOAD, path, cwd=tmp_path).stdout.splitlines()
    assert verdicts == "[1.0, None]"
    assert {name.split(".")[0] for name in modules.split()} <= sys.stdlib_module_names | {"__main__"}
    done = start(sys.executable, "-Ic", LOAD + JUDGE, path, cwd=tmp_path)
    assert math.isfinite(float(done.stdout.splitlines()[-1])), done.stderr
