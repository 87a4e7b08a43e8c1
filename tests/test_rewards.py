"""rewards.py: answers extracted and compared, formats, lengths, and programs that fight their sandbox.

Expected values are worked by hand. Answers are also held against the labels that GSM8K's authors gave their
models' solutions, and hostile programs against what is left of them in /proc.
"""

import contextlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import ROOT

import rewards

HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None
HAS_SANDBOX = sys.platform == "linux" and rewards.platform.machine() in rewards.ARCHITECTURES
LEFT = "cleanpost-test-of-the-sandbox"  # what hostile programs call their files
sandboxed = pytest.mark.skipif(not HAS_SANDBOX, reason="the sandbox needs Linux on x86-64 or ARM64")


def grade(completion, answer, reward=rewards.math_answer, **settings):
    return reward(["?"], [completion], [answer], **settings)[0]


def score(reward, *completions, **columns):
    return reward(prompts=["?"] * len(completions), completions=list(completions), **columns)


# Texts ------------------------------------------------------------------------------------------------------


def test_messages_count_by_the_last_of_the_assistant():
    messages = [
        {"role": "assistant", "content": "Let me use a tool: #### 1"},
        {"role": "tool", "content": "#### 2"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "3."}],
        },
        {"role": "user", "content": "#### 4"},
    ]
    assert rewards.text_of(messages) == "It is 3."
    assert grade(messages, "3") == 1.0
    assert rewards.text_of([{"role": "user", "content": "4"}]) == ""
    assert rewards.text_of([{"role": "assistant", "content": None}]) == ""


def test_only_what_follows_the_thought_counts():
    assert grade("<think>#### 5</think>It is 6.", "6") == 1.0
    assert grade("the prompt opened it: 5</think>\n6", "6") == 1.0
    assert grade("<think>It is 6, no doubt", "6") == 0.0  # cut off within the thought
    assert grade("<think>5</think>6<think>7", "6") == 0.0


# Mathematics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("42", 42),
        ("1,234", 1234),
        ("1,234,567.50", Fraction(2469135, 2)),
        ("-7", -7),
        ("\u22127", -7),  # the minus of Unicode
        ("+7", 7),
        ("18.00", 18),
        (".5", Fraction(1, 2)),
        ("0.1", Fraction(1, 10)),  # the float 0.1 is not
        ("3/4", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"\frac34", Fraction(3, 4)),
        ("1 1/2", Fraction(3, 2)),
        (r"1\frac{1}{2}", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        ("2.5e3", 2500),
        ("5e-1", Fraction(1, 2)),
        ("$18", 18),
        (r"\$18", 18),
        ("-$5", -5),
        ("$-5", -5),
        ("$18$", 18),
        (r"\(18\)", 18),
        ("18 dollars", 18),
        ("18 dollars per day.", 18),
        ("5 km", 5),
        ("5km/h", 5),
        ("5 m", 5),
        ("12 m^2", 12),
        ("30°C", 30),
        (r"30^\circ", 30),
        (r"5\ \text{cm}", 5),
        (r"5\text{ square meters}", 5),
        ("10{,}000", 10000),
        (r"10,\!000", 10000),
        ("3 million", 3_000_000),
        ("$2.5 billion dollars", 2_500_000_000),
        ("18.", 18),
        ("**18**", 18),
        ("x = 5", 5),
        ("9" * 400, 10**400 - 1),
    ],
)
def test_numbers_are_read_exactly(text, value):
    assert rewards.number(text) == (value, False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "eighteen",
        "2x",
        "2 x",
        "2 pi",
        r"2\pi",
        "5 or 6",
        "5, 6",
        "1/0",
        "12,34",
        "2^3",
        "1.2.3",
        "3 + 4",
        "6:30",
    ]
    + ["1e99999999", "1" * 5000, "5 a" + "b" * 5000 + "!"],
)
def test_what_is_no_number_is_not_read_as_one(text):
    start = time.perf_counter()
    assert rewards.number(text) == (None, False)
    assert time.perf_counter() - start < 0.5  # no pattern tries all ways of failing


@pytest.mark.parametrize(
    "gold, answer, equal",
    [
        ("18", "18.00", True),
        ("3/4", "0.75", True),
        ("1/3", "0.333333333333", False),
        ("0.3", "0.30000000000000004", False),
        ("50%", "50", True),
        ("50", "50%", True),
        ("0.5", "50%", True),
        ("50%", "1/2", True),
        ("50%", "50 percent", True),
        ("50%", "0.5%", False),
        ("50", "0.5", False),
        ("5", "-5", False),
        ("1234", "1,234", True),
        ("Monday", "monday.", True),
        (r"\text{Monday}", "Monday", True),
        ("Monday", "Tuesday", False),
        (r"\sqrt{2}", r"\sqrt {2}", True),
        ("7", "seven", False),
    ],
)
def test_equality_is_exact(gold, answer, equal):
    assert rewards.same_answer(gold, answer) is equal


@pytest.mark.parametrize(
    "text, answer",
    [
        ("#### 42", "42"),
        ("so 7 + 5\n#### 12\nThat took 3 steps.", "12"),
        (r"It is \boxed{42}.", "42"),
        (r"First \boxed{1}, then \boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{5} and then \boxed{6", "5"),  # cut off
        ("<answer> 18 </answer>", "18"),
        ("<answer>1</answer> no, <answer>\n2\n</answer>", "2"),
        (r"<answer>The total is \boxed{18} dollars.</answer>", "18"),
        ("<answer>never closed 5", None),
        ("A: 18", "18"),
        ("**Answer:** 18", "18"),
        ("Final answer: 18", "18"),
        ("Plan A: none. Answer 5", None),
        ("#### Step 1: add\n#### 2. subtract\n#### Result:\n", None),  # headings
        (r"\boxed{1} #### 2", "2"),  # the last mark, whichever it is
        ("no mark, 18", None),
    ],
)
def test_the_last_mark_gives_the_answer(text, answer):
    assert rewards.marked_answer(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("He has 3, and she 4.", "4"),
        ("That makes $1,234.50.", "$1,234.50"),
        ("16-3", "3"),
        ("x is -3", "-3"),
        ("it falls by \u22124 degrees", "-4"),
        ("a share of 3/4", "3/4"),
        (r"which is -\frac{3}{4}", r"-\frac{3}{4}"),
        ("about 50% of it", "50%"),
        ("none", None),
    ],
)
def test_without_a_mark_the_last_number_counts(text, answer):
    assert rewards.final_number(text) == answer


def test_gold_is_a_gsm8k_solution_or_bare():
    gold = "She makes 9 * 2 = $<<9*2=18>>18 every day at the market.\n#### 18"
    assert grade("That is $18 a day.", gold) == 1.0
    assert grade("That is $18 a day.", 18) == 1.0
    assert grade("That is $18 a day.", 18.0) == 1.0
    assert grade("That is $19 a day.", gold) == 0.0
    assert grade("1,450,000", "thus\n#### 1,450,000") == 1.0


def test_rows_without_a_gold_answer_are_not_scored():
    assert score(rewards.math_answer, "5", "5", "5", answer=["5", None, " "]) == [1.0, None, None]


def test_lenient_reads_a_number_in_a_marked_sentence():
    assert grade("<answer>The total is 18 dollars</answer> (3 steps)", "18") == 1.0
    assert grade("A: There are 18 apples", "18") == 1.0
    assert grade("no number", "18") == 0.0 == grade("", "18")


def test_strict_wants_a_format_that_was_asked_for():
    strict = rewards.math_answer_strict
    assert [grade(text, "18", strict) for text in ("#### 18", r"\boxed{18}", "<answer>$18</answer>")] == [
        1.0
    ] * 3
    assert [grade(text, "18", strict) for text in ("18", "A: 18", r"\boxed{17} no, 18", "#### 18 or 19")] == [
        0.0
    ] * 4


def test_formats_choose_the_marks():
    only_boxed = {"formats": ("boxed",), "last_number": False}
    assert grade(r"\boxed{18} #### 19", "18", **only_boxed) == 1.0
    assert grade("#### 18", "18", **only_boxed) == 0.0
    assert grade("A: 18", "18", formats=("line",), last_number=False) == 1.0


def test_many_open_marks_take_no_time():
    start = time.perf_counter()
    for piece in (r"\boxed{", "<answer>", "#### ", "<think>", "```\n", "9,", "1/", "A:", "$"):
        grade(piece * 4000, "18")
        rewards.last_fence(piece * 4000)
    assert time.perf_counter() - start < 5


@pytest.mark.skipif(HAS_MATH_VERIFY, reason="math-verify is installed")
def test_without_math_verify_rows_that_need_it_are_not_scored_and_one_warning_says_so():
    rewards.math_verify.cache_clear()
    with pytest.warns(UserWarning, match="pip install math-verify") as caught:
        symbolic = score(rewards.math_answer, r"\boxed{2\sqrt{2}}", "none", answer=[r"\sqrt{8}"] * 2)
        numeric = score(rewards.math_answer, r"\boxed{2^3}", "8", answer=["8"] * 2)
    assert symbolic == [None, None]  # of the row, whatever the completion is: nothing can be gained by it
    assert numeric == [0.0, 1.0]
    assert len(caught) == 1


def test_words_and_plain_numbers_do_not_ask_for_math_verify():
    rewards.math_verify.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [grade("It was Monday", "Monday"), grade("I give up", "18"), grade("A: Monday", "Monday")] == [
            0,
            0,
            1,
        ]


@pytest.mark.skipif(not HAS_MATH_VERIFY, reason="math-verify is not installed")
@pytest.mark.parametrize(
    "gold, answer, reward",
    [
        (r"\sqrt{8}", r"2\sqrt{2}", 1.0),
        (r"\frac{\pi}{2}", r"\pi/2", 1.0),
        ("x^2+2x+1", "(x+1)^2", 1.0),
        (r"\{1, 2\}", r"\{2, 1\}", 1.0),
        ("8", "2^3", 1.0),
        ("1/2", r"\frac{\sqrt{4}}{4}", 1.0),
        (r"\sqrt{8}", "2", 0.0),
        ("(1, 2)", "(2, 1)", 0.0),
        ("x+1", "x-1", 0.0),
        ("8", "2^4", 0.0),
        (r"\sqrt{8}", r"\frac{", 0.0),
    ],
)
def test_mathematics_goes_through_math_verify(gold, answer, reward):
    assert grade(rf"\boxed{{{answer}}}", gold) == reward
    in_thread = []
    thread = threading.Thread(target=lambda: in_thread.append(grade(rf"\boxed{{{answer}}}", gold)))
    thread.start(), thread.join()
    assert in_thread == [reward]  # where no alarm can be set


@pytest.mark.filterwarnings("ignore:an answer needs math-verify")
def test_agrees_with_the_labels_of_gsm8k(gsm8k):
    path = gsm8k / "example_model_solutions.jsonl"
    if not path.exists():
        pytest.skip("no example solutions")
    rows = [json.loads(line) for line in path.open()]
    solutions = [(row, method) for row in rows for method in row.values() if isinstance(method, dict)]
    stated = [
        (row["ground_truth"], m["solution"], m["is_correct"])
        for row, m in solutions
        if "A: " in m["solution"]
    ]
    golds, texts, labels = zip(*stated, strict=True)
    assert len(stated) > 5000 and 0.2 < sum(labels) / len(labels) < 0.6
    for settings in ({}, {"formats": ("line",), "last_number": False}):
        scores = rewards.math_answer(texts, texts, golds, **settings)
        assert [gold for gold, s, label in zip(golds, scores, labels) if s != label] == []
    assert not any(rewards.math_answer_strict(texts, texts, golds))  # none of them is in a format it asks for


def test_gsm8k_gold_solutions_are_right_by_their_own_measure(gsm8k):
    golds = [json.loads(line)["answer"] for line in (gsm8k / "test.jsonl").open()]
    assert set(rewards.math_answer_strict(golds, golds, golds)) == {1.0}
    wrong = golds[1:] + golds[:1]
    assert sum(rewards.math_answer(golds, wrong, golds)) < 0.05 * len(golds)


# Format, length and repetition ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, reward",
    [
        ("<think>2 + 2</think>4", 1.0),
        ("\n<think>\n2 + 2\n</think>\n\n4\n", 1.0),
        ("<think>2 + 2</think>", 0.0),
        ("<think> </think>4", 0.0),
        ("4 <think>2 + 2</think>4", 0.0),
        ("<think>2</think><think>2</think>4", 0.0),
        ("<think>2<think>2</think>4", 0.0),
        ("<think>2</think></think>4", 0.0),
        ("</think>2<think>4", 0.0),
        ("4", 0.0),
    ],
)
def test_think_format(text, reward):
    assert score(rewards.think_format, text) == [reward]
    assert score(rewards.think_format, [{"role": "assistant", "content": text}]) == [reward]


def test_a_prompt_may_have_opened_the_thought():
    assert rewards.think_format(["Go.<think>\n"] * 2, ["2 + 2</think>4", "<think>2</think>4"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "text, reward",
    [
        ('{"a": [1, 2.5, null]}', 1.0),
        (" [] \n", 1.0),
        ("42", 1.0),
        ('Here:\n```json\n{"a": 1}\n```\nand\n```python\nx = {}\n```', 1.0),
        ("<think>{</think>{}", 1.0),
        ("9" * 5000, 1.0),
        ("{'a': 1}", 0.0),
        ('{"a": 1,}', 0.0),
        ('{"a": NaN}', 0.0),
        ('{"a": 1} and more', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_format(text, reward):
    assert score(rewards.json_format, text) == [reward]


def test_length_penalty_by_hand():
    texts = ["a b", "a b c d", "a b c d e", "a b c d e f g h", "a " * 100]
    assert score(rewards.length_penalty, *texts, max_length=4) == [0.0, 0.0, -0.25, -1.0, -1.0]
    ids = [[1] * n for n in (4, 5, 6, 8, 0)]  # tokens go before words
    assert score(rewards.length_penalty, *texts, completion_ids=ids, max_length=4) == [
        0.0,
        -0.25,
        -0.5,
        -1.0,
        0.0,
    ]


def test_soft_overlong_is_equation_13_of_dapo():
    # L_max 20, L_cache 8: 0 up to 12, -1/8 a token, -1 at 20
    lengths = (0, 12, 13, 16, 19, 20, 21, 10**6)
    penalties = [0.0, 0.0, -0.125, -0.5, -0.875, -1.0, -1.0, -1.0]
    assert [rewards.overlong_penalty(length, 20, 8) for length in lengths] == penalties
    ids = [range(length) for length in lengths]
    texts = ["one word"] * len(lengths)
    assert (
        score(rewards.soft_overlong, *texts, completion_ids=ids, max_completion_length=20, cache=8)
        == penalties
    )
    paper = [range(length) for length in (16384, 18432, 20480)]
    assert score(rewards.soft_overlong, "", "", "", completion_ids=paper) == [0.0, -0.5, -1.0]
    # a fifth of 10 by default
    ids = [range(length) for length in (8, 9, 10, 11)]
    assert score(rewards.soft_overlong, *"abcd", completion_ids=ids, max_completion_length=10) == [
        0,
        -0.5,
        -1,
        -1,
    ]
    assert rewards.overlong_penalty(20, 20, 0) == 0.0 and rewards.overlong_penalty(21, 20, 0) == -1.0
    with pytest.raises(ValueError, match="completion_ids"):
        score(rewards.soft_overlong, "text")


def test_repetition_penalty_by_hand():
    # a b a b a b: trigrams aba bab aba bab, of which 2 of 4 repeat; bigrams ab ba ab ba ab: 3 of 5
    assert score(rewards.repetition_penalty, "a b a B a b", "a b c d", "a b", "") == [-0.5, 0.0, 0.0, 0.0]
    assert score(rewards.repetition_penalty, "a b a b a b", n=2) == pytest.approx([-0.6])
    assert score(rewards.repetition_penalty, "a a a a a", scale=3) == pytest.approx([-2.0])
    assert score(rewards.repetition_penalty, "x", completion_ids=[[7, 8, 7, 8, 7, 8]]) == [-0.5]


def test_no_penalty_is_a_negative_zero():
    zeros = score(rewards.length_penalty, "a") + score(rewards.repetition_penalty, "a b c d")
    assert [math.copysign(1, zero) for zero in zeros] == [1.0, 1.0]


# Programs ---------------------------------------------------------------------------------------------------

HUMANEVAL = """
METADATA = {"author": "jt", "dataset": "test"}


def check(candidate):
    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.3) == True
    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.05) == False


check(has_close_elements)
"""
SOLUTION = """Here is the function:
```python
from typing import List

def has_close_elements(numbers: List[float], threshold: float) -> bool:
    numbers = sorted(numbers)
    return any(b - a < threshold for a, b in zip(numbers, numbers[1:]))
```
It prints:
```
True
```"""


def code(*completions, tests, **settings):
    settings = {"allow_code_execution": True, "timeout": 10.0} | settings
    tests = [tests] * len(completions) if isinstance(tests, str) else tests
    return score(rewards.code_tests, *completions, tests=tests, **settings)


def passes(program, tests="assert f(2) == 4", **settings):
    return rewards.run_tests(program, tests, **settings)[0]


@pytest.mark.parametrize("allowed", [False, None, [True], 1])
def test_nothing_is_executed_unless_allowed(allowed):
    with pytest.raises(RuntimeError, match="--allow-code-execution"):
        code("x", tests="x", allow_code_execution=allowed)


@sandboxed
def test_programs_pass_or_fail_by_their_tests():
    wrong = SOLUTION.replace("<", ">=")
    assert code(SOLUTION, wrong, "I do not know.", tests=HUMANEVAL) == [1.0, 0.0, 0.0]
    messages = [{"role": "assistant", "content": "<think>```python\n1/0\n```</think>" + SOLUTION}]
    assert code(messages, "<think>" + SOLUTION, tests=HUMANEVAL) == [1.0, 0.0]
    bare = "def f(x): return 2 * x"
    rows = [None, "", "# nothing", "def f(:", "assert f(2) == 4"]
    assert code(*[bare] * 5, tests=rows) == [None, None, None, None, 1.0]


@sandboxed
@pytest.mark.parametrize(
    "program, reason",
    [
        ("def f(x:", "never closed"),
        ("1 / 0", "division by zero"),
        ("def f(x): return 1 / 0", "division by zero"),
        ("def g(x): return 4", "name 'f' is not defined"),
        ("def f(x): return 5", "AssertionError"),
        ("def f(x): return f(x)", "recursion"),
        ("def f(x): return input()", "EOF"),
        ("class E(BaseException): pass\ndef f(x): raise E", "ended"),
    ],
)
def test_reasons_of_failure_are_told(program, reason):
    passed, told = rewards.run_tests(program, "assert f(2) == 4")
    assert passed is False and reason in told


@sandboxed
def test_plain_values_travel_exactly():
    program = "def f(x): return x\ndef twice(g, x): return g(g(x))\nkind = lambda x: type(x).__name__"
    tests = """
from collections import deque
from decimal import Decimal
from fractions import Fraction
values = [None, True, 0, -1, 2**53, -10**5000, 0.1, float("inf"), 1e-320, 1 + 2j]
values += ["", "\\ud800 \\n \\x00", b"\\xff"]
values += [[], (), (1,), [(1, [2])], {1, 2}, frozenset([3]), {}, {(1, 2): [3], None: {4: 5}}, range(2, 9, 3)]
values += [bytearray(b"a"), Fraction(1, 3), Decimal("0.10"), deque([1, 2])]
for value in values:
    assert f(value) == value and type(f(value)) is type(value), value
    assert kind(value) == type(value).__name__
assert f(float("nan")) != f(float("nan"))
assert str(f(-0.0)) == "-0.0"
assert twice(lambda x: x + [len(x)], []) == [0, 1]
"""
    assert rewards.run_tests(program, tests) == (True, "passed")


@sandboxed
def test_objects_of_the_program_can_be_used():
    program = """
import collections, enum
from dataclasses import dataclass
class Stack:
    def __init__(self, items=()): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, i): return self.items[i]
    def __enter__(self): return self
    def __exit__(self, *error): self.items.clear()
@dataclass(frozen=True)
class Vector:
    x: float
    y: float = 0.0
    def __add__(self, other): return Vector(self.x + other.x, self.y + other.y)
Point = collections.namedtuple("Point", "x y")
Color = enum.IntEnum("Color", "RED GREEN")
class TooLarge(ValueError): pass
def count(n):
    for i in range(n): yield i
def check_size(n):
    if n > 3: raise TooLarge("too large", n)
def sort(items): items.sort()
words = lambda text: collections.Counter(text.split())
LIMIT = [1, 2]
"""
    tests = """
s = Stack([1]).push(2)
assert list(s[:1]) == [1] and len(s) == 2 and list(s) == [1, 2] and s[1] == 2 and 2 in s and 3 not in s
assert s and isinstance(s, Stack) and not isinstance(s, Vector)
assert sorted(s, reverse=True) == [2, 1] and s.items == [1, 2] and not hasattr(s, "nothing")
s.items = [5]
assert s[0] == 5
with s as inside:
    assert inside[0] == 5
assert len(s) == 0
assert Vector(1) + Vector(2, 3) == Vector(3, 3) != Vector(3, 4) and len({Vector(1), Vector(1)}) == 1
assert Point(1, 2) == (1, 2) and Point(1, 2).x == 1 and Color.RED == 1 and Color.GREEN > Color.RED
assert words("a b a") == {"a": 2, "b": 1} and words("a b a")["a"] == 2 and words("")["z"] == 0
tally = words("a")
tally.update(["a"])
assert tally == {"a": 2}
assert list(count(3)) == [0, 1, 2] and next(count(1)) == 0 and sum(count(4)) == 6
try:
    check_size(4)
    assert False
except ValueError as error:
    assert error.args[0] == "too large"
numbers = [3, 1, 2]
sort(numbers)
assert numbers == [1, 2, 3] and LIMIT == [1, 2] and math.isclose(0.1 + 0.2, 0.3)
"""
    assert rewards.run_tests(program, tests) == (True, "passed")


@sandboxed
def test_a_program_called_as_a_builtin_needs_its_entry_point_named():
    program, tests = "def sum(a, b): return a + b", "assert sum(1, 2) == 3"
    assert code(program, tests=tests) == [0.0]
    assert code(program, tests=tests, entry_point=["sum"]) == [1.0]


@sandboxed
def test_tests_are_statements_run_to_their_end():
    program = "def f(x): return 2 * x"
    assert passes(program, "import sys\nassert f(2) == 4\nsys.exit(0)\nassert f(2) == 5") is False
    assert passes(program, "import os\nos._exit(0)") is False
    assert passes(program, "print('passed')\nassert f(2) == 4") is True


FORGED = {
    "ends early": "import os; os._exit(0)",
    "exits": "import sys; sys.exit(0)",
    "raises SystemExit": "raise SystemExit",
    "ends early when called": "import os\ndef f(x): os._exit(0)",
    "exits when called": "def f(x): raise SystemExit(0)",
    "is killed": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGKILL)",
    "prints a verdict": """
import os
for fd in range(64):
    for text in (b"passed", b'[true, "passed"]', b'[true, "passed"]\\n', b"1.0\\n"):
        try: os.write(fd, text)
        except OSError: pass
""",
    "answers ahead of the question": """
import os
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'["value", true, []]\\n' * 100)
        except OSError: pass
    os._exit(0)
""",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\natexit.register(print, 'passed')",
    "own check": "def check(candidate): pass\ndef f(x): return 5",
    "patched builtins": """
import builtins
class Right(Exception):
    pass
builtins.AssertionError = Right
builtins.all = builtins.any = builtins.isinstance = lambda *args: True
abs = len = lambda x: 0
def f(x): return 5
""",
    "patched checker": """
import sys, json, os
main = sys.modules["__main__"]
main.judge = lambda *args: (True, "passed")
main.Link.encode = lambda self, value: True
json.dumps = lambda *args, **kwargs: '["value", true, []]'
def f(x): return 5
""",
    "traces": """
import sys
def trace(frame, event, arg):
    frame.f_locals.clear()
    return trace
sys.settrace(trace)
def f(x): return 5
""",
    "is equal to everything": """
class Anything:
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = lambda *args: True
    __ne__ = lambda *args: False
    __sub__ = __rsub__ = __abs__ = __round__ = __float__ = __int__ = lambda *args: 0
    __hash__ = lambda self: 4
f = lambda x: Anything()
""",
    "is a number equal to everything": """
class Anything(int):
    __eq__ = __lt__ = __le__ = lambda *args: True
    __ne__ = lambda *args: False
    __hash__ = int.__hash__
    __sub__ = __rsub__ = __abs__ = lambda *args: Anything(0)
f = lambda x: Anything(7)
""",
    "a class for a function": """
class f(float):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0.0
""",
    "sends nonsense": """
import os
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'["mine"]\\n["value", ["set", [[]]], 0]\\n{}\\n[[[[[[')
        except OSError: pass
""",
    "sends without end": """
import os
def f(x):
    for fd in range(3, 64):
        try:
            while True: os.write(fd, b"9" * 100000)
        except OSError: pass
""",
}
FLOAT_TESTS = """
def check(candidate):
    assert abs(candidate(2) - 4) < 1e-6
    assert candidate(2) == 4
    assert candidate(3) in [6], "message"
    assert not candidate(3) != 6
try:
    check(f)
except ZeroDivisionError:
    pass
"""


@sandboxed
@pytest.mark.parametrize("program", FORGED.values(), ids=FORGED)
def test_a_verdict_cannot_be_forged(program):
    assert passes(program, FLOAT_TESTS, timeout=6.0) is False
    assert passes("def f(x): return 2 * x", FLOAT_TESTS) is True  # the tests themselves are fair


@sandboxed
def test_each_comparison_alone_sees_through_an_object_that_agrees_with_all():
    program = FORGED["is equal to everything"]
    for test in (
        "f(2) == 4",
        "4 == f(2)",
        "not f(2) != 4",
        "abs(f(2) - 4) < 1",
        "f(2) in [4]",
        "f(2) < 9",
        "[f(2)] == [4]",
    ):
        assert passes(program, f"assert {test}") is False, test
        assert (
            passes(FORGED["is a number equal to everything"], f"assert {test.replace('< 9', '< 5')}") is False
        ), test


@sandboxed
def test_an_ended_program_is_not_the_exception_that_a_test_waits_for():
    tests = "try:\n    f(2)\n    assert False\nexcept Exception:\n    pass"
    assert passes("def f(x): raise ValueError", tests) is True
    assert passes("import os\ndef f(x): os._exit(1)", tests) is False
    assert passes("import os\ndef f(x): os._exit(1)", tests.replace("except Exception", "except")) is False


SPY = """
import gc, os, sys
def look():
    seen = []
    for fd in range(64):
        try: seen.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError: pass
    own = [f"/proc/self/{name}" for name in ("environ", "cmdline", "maps", "mem")]
    for path in [*own, "/etc/passwd", HERE]:
        try: seen.append(open(path).read())
        except OSError: pass
    for pid in {os.getppid(), *range(max(2, os.getpid() - 20), os.getpid() + 20)}:
        for name in ("environ", "mem", "fd/0", "cmdline", "maps"):
            try: seen.append(open(f"/proc/{pid}/{name}", "rb").read(10**6).decode("latin-1"))
            except OSError: pass
    for folder in ("/", "/proc", "/tmp", ".", os.path.dirname(HERE)):
        try: seen += os.listdir(folder)
        except OSError: pass
    frame = sys._getframe()
    while frame:
        seen += [repr(frame.f_locals), repr(frame.f_globals)]
        frame = frame.f_back
    seen += [repr(o) for o in gc.get_objects() if type(o) in (dict, list, tuple, str)]
    seen += [repr(os.environ), repr(sys.argv), repr(vars(sys.modules["__main__"]))]
    return chr(10).join(seen)
def f(x): return look()
"""


@sandboxed
def test_the_program_finds_neither_tests_nor_verdict_nor_files():
    program = f"HERE = {__file__!r}\n" + SPY
    tests = """
import re
SECRET = "aWxsaW5n" + str(6 * 7)
text = f(2)
assert isinstance(text, str) and len(text) > 1000
for word in ("aWxsaW5n", "root:", "PYTEST", "[heap]", "test_rewards"):
    assert word not in re.sub(re.escape(HERE), "", text), word
"""
    assert rewards.run_tests(program, tests, timeout=20.0) == (True, "passed")


PEEK = """
import os
def opened(pid):
    found = []
    for name in ("environ", "mem", "maps", "fd/0"):
        try:
            open(f"/proc/{pid}/{name}", "rb").close()
            found.append(name)
        except OSError: pass
    return found
def written():
    try: return [open("/tmp/LEFT", flags) for flags in ("x", "w", "a")]
    except OSError: return []
def f(x): return [written()] + [opened(pid) for pid in {os.getppid(), TRAINER, *NEAR} - {os.getpid()}]
NEAR = range(os.getpid() - 5, os.getpid() + 5)
""".replace("LEFT", LEFT)


def variant(folder, old, new):
    """The module with a piece of its source replaced, its processes too."""
    source = (ROOT / "rewards.py").read_text()
    assert source.count(old) == 1
    (folder / "variant.py").write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("variant", folder / "variant.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@sandboxed
@pytest.mark.parametrize("lacking", ["libc.unshare(0x10000000)", "libc.syscall(444, None, 0, 1) > 0"])
def test_processes_and_files_stay_closed_without_landlock_or_without_a_namespace(lacking, tmp_path):
    weaker = variant(tmp_path, lacking, "False")
    program = f"TRAINER = {os.getpid()}\n{PEEK}"
    assert weaker.run_tests(program, "assert not any(f(2)), f(2)") == (True, "passed")


@sandboxed
def test_a_locked_process_has_no_capability_left():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import rewards\n"
        "status = open('/proc/self/status')\n"
        "rewards.lock_down(30, 1024)\n"
        "print(status.read())\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(ROOT)], capture_output=True, text=True)
    fields = dict(line.split(":\t", 1) for line in done.stdout.splitlines() if ":\t" in line)
    assert (fields["CapPrm"], fields["CapEff"]) == ("0" * 16, "0" * 16), done.stderr
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")


# Programs that fight ----------------------------------------------------------------------------------------


def processes():
    """The parent and the command of every process; a dead one that is not reaped yet has no command."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(folder.name)] = parent, (folder / "cmdline").read_bytes().decode()
    return found


def footprint():
    """What a leak shows in: children, orphans, threads, file descriptors, files of the programs below."""
    running = processes()
    children = {pid for pid, (parent, _) in running.items() if parent == os.getpid()}
    orphans = {pid for pid, (parent, command) in running.items() if parent == 1 and "rewards.py" in command}
    folders = [*map(Path, ("/", "/dev/shm", "/tmp", "/var/tmp")), Path.cwd(), Path.home()]
    files = [path for folder in folders for path in folder.glob(f"{LEFT}*")]
    return children, orphans, threading.active_count(), len(os.listdir("/proc/self/fd")), files


HOSTILE = {
    "endless loop": "while True: pass",
    "endless loop when called": "def f(x):\n    while True: pass",
    "sleeps": "import time\ntime.sleep(1000)",
    "loops through every exception": """
def f(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
""",
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "fork bomb that perseveres": """
import os
def f(x):
    while True:
        try: os.fork()
        except OSError: pass
""",
    "threads": """
import threading, time
threading.stack_size(32768)
while True:
    threading.Thread(target=time.sleep, args=(100,)).start()
""",
    "subprocess": "import subprocess\nsubprocess.Popen(['sleep', '1000'])",
    "10 GB of memory": "x = bytearray(10 * 2**30)",
    "2 GB reserved": "import mmap\nx = mmap.mmap(-1, 2 * 2**30)",
    "10 GB in pieces": "x = []\nwhile True: x.append(bytearray(2**24))",
    "memory of a value": "f = lambda x: [0] * 10**8",
    "1 GB file": f"with open('{LEFT}', 'wb') as file:\n    for _ in range(1024): file.write(bytes(2**20))",
    "1 GB file elsewhere": """
import os, tempfile
done = 0
for folder in ("/dev/shm", "/tmp", "/var/tmp", os.path.expanduser("~"), "."):
    try:
        with open(folder + "/LEFT", "wb") as file:
            done += file.write(bytes(2**30))
    except OSError: pass
fd = os.memfd_create("big")
os.write(fd, bytes(2**30))
f = lambda x: 4 if done else 5
""".replace("LEFT", LEFT),
    "signals the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "signals the trainer": f"import os, signal\nos.kill({os.getpid()}, signal.SIGKILL)",
    "signals the group": "import os, signal\nos.killpg(0, signal.SIGKILL)",
    "signals everybody": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "signals quietly": """
import os, signal
for pid in (os.getppid(), 0, -1, *range(max(2, os.getpid() - 30), os.getpid())):
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL):
        try: os.kill(pid, number)
        except OSError: pass
f = lambda x: 5
""",
    "daemonised child": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
f = lambda x: 2 * x
""",
    "ignores signals": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
    "limits of the parent": """
import os, resource
for pid in (os.getppid(), 1):
    try: resource.prlimit(pid, resource.RLIMIT_AS, (1, 1))
    except OSError: pass
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
""",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', 9))",
    "C library": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
calls = {57: (), 58: (), 56: (17, 0, 0, 0, 0), 62: (-1, 9), 41: (1, 1, 0), 101: (16, 1, 0, 0), 319: (b"x", 0)}
if os.uname().machine != "x86_64": calls = {}
f = lambda x: 4 if any(libc.syscall(number, *args) >= 0 for number, args in calls.items()) else 5
""",
}


@sandboxed
@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_no_hostile_program_passes_or_survives(program):
    before = footprint()
    start = time.perf_counter()
    program += "\nf = globals().get('f', lambda x: 2 * x)"  # right, if what comes before it were let through
    assert passes(program, timeout=1.5) is False
    assert time.perf_counter() - start < 6
    assert footprint() == before


@sandboxed
def test_a_bystander_of_the_same_user_is_out_of_reach():
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    program = (
        f"PID = {bystander.pid}"
        + """
import ctypes, fcntl, os, resource, signal, socket, struct
left, right = socket.socketpair()
log = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]
libc = ctypes.CDLL(None)
attempts = [
    lambda: os.kill(PID, signal.SIGKILL),
    lambda: fcntl.fcntl(left, fcntl.F_SETOWN, PID),  # with O_ASYNC, a message to it would send the signal
    lambda: fcntl.fcntl(left, fcntl.F_SETSIG, signal.SIGKILL),
    lambda: fcntl.fcntl(left, 15, struct.pack("ii", 1, PID)),  # F_SETOWN_EX
    lambda: fcntl.ioctl(left, 0x8901, struct.pack("i", PID)),  # FIOSETOWN
    lambda: fcntl.ioctl(left, 0x8902, struct.pack("i", PID)),  # SIOCSPGRP
    lambda: os.setpriority(os.PRIO_PROCESS, PID, 19),
    lambda: os.sched_setaffinity(PID, {0}),
    lambda: resource.prlimit(PID, resource.RLIMIT_NOFILE, (0, 0)),
    lambda: os.pidfd_open(PID),
    lambda: log.connect(chr(0) + "abstract"),
    lambda: log.sendto(b"x", chr(0) + "abstract"),
    lambda: log.sendmsg([b"x"], [], 0, chr(0) + "abstract"),
    lambda: open(f"/proc/{PID}/environ"),
]
def f(x):
    done = []
    for i, attempt in enumerate(attempts):
        try:
            attempt()
            done.append(i)
        except PermissionError: pass
    return done
"""
    )
    try:
        assert rewards.run_tests(program, "assert f(2) == [], f(2)") == (True, "passed")
        assert bystander.poll() is None
    finally:
        bystander.kill(), bystander.wait()


@sandboxed
def test_what_honest_programs_use_works():
    program = """
from __future__ import annotations
import asyncio, collections, heapq, itertools, os, random, re, string, time
from dataclasses import dataclass
from functools import lru_cache
@dataclass
class Node:
    value: int
    next: Node | None = None
async def double(x):
    await asyncio.sleep(0.001)
    return 2 * x
@lru_cache(None)
def f(x): return asyncio.run(double(Node(x).value))
if __name__ == "__main__":
    f(int(input()))
"""
    assert rewards.run_tests(program, "assert f(2) == 4") == (True, "passed")
    assert code("def f(x): return 2 * x", tests=[["import math", "assert f(2) == 4"]]) == [1.0]


@sandboxed
def test_arrays_arrive_as_lists():
    pytest.importorskip("numpy")
    program = "import numpy as np\nf = lambda x: np.float64(x) * 2\ng = lambda n: np.arange(n).reshape(2, -1)"
    assert rewards.run_tests(program, "assert f(2) == 4 and g(4) == [[0, 1], [2, 3]]") == (True, "passed")


@sandboxed
def test_output_costs_nothing_and_honest_programs_may_print():
    program = "def f(x):\n    for _ in range(1000): print('x' * 100000)\n    return 2 * x"
    assert passes(program) is True


@sandboxed
def test_200_programs_in_parallel_leave_nothing_behind():
    good, bad = "def f(x): return 2 * x", "import os\ndef f(x): os.fork(); return 2 * x"
    programs = [good, bad, "import os; os._exit(0)", "def f(x): return 5", "print('passed')"] * 40
    code(good, tests="assert f(2) == 4")
    before = footprint()
    scores = code(*programs, tests="assert f(2) == 4", timeout=60.0, workers=16)
    assert scores == [1.0, 0.0, 0.0, 0.0, 0.0] * 40
    assert footprint() == before


@sandboxed
def test_programs_die_with_the_trainer():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import rewards\n"
        "rewards.run_tests('import time; time.sleep(1000)', 'f(2)', timeout=900)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script, str(ROOT)])
    deadline = time.monotonic() + 20
    started = set()
    while len(started) < 2 and time.monotonic() < deadline:
        started = {pid for pid, (parent, _) in processes().items() if parent == trainer.pid}
    time.sleep(0.5)  # until both are locked down
    trainer.kill(), trainer.wait()

    def alive():
        return {
            pid for pid, (_, command) in processes().items() if pid in started and "rewards.py" in command
        }

    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(started) == 2 and not alive()


@sandboxed
def test_a_sandbox_that_cannot_be_built_is_an_error_and_no_reward(tmp_path, monkeypatch):
    refused = variant(tmp_path, "call(libc.prctl, 38, 1,", "call(libc.prctl, 38, 7,")
    with pytest.raises(RuntimeError, match="could not be built: .*Invalid argument"):
        refused.run_tests("def f(x): return 4", "assert f(2) == 4")
    crashed = variant(tmp_path, "    verdict = os.dup(1)\n", "    os.abort()\n")
    with pytest.raises(RuntimeError, match="could not be built"):
        crashed.run_tests("def f(x): return 4", "assert f(2) == 4")
    monkeypatch.setattr(rewards.platform, "machine", lambda: "vax")
    with pytest.raises(RuntimeError, match="x86_64 or aarch64"):
        rewards.run_tests("def f(x): return 4", "assert f(2) == 4")


# The module -------------------------------------------------------------------------------------------------


def test_every_reward_takes_whatever_columns_a_script_passes():
    columns = {
        "answer": ["5"] * 2,
        "tests": [None] * 2,
        "completion_ids": [[1], [2]],
        "level": [1, 2],
        "step": 3,
    }
    for name in re.findall(r"^    ([a-z_]+) {4,}\S", rewards.__doc__, re.MULTILINE):
        settings = {"allow_code_execution": True} if name == "code_tests" else {}
        scores = getattr(rewards, name)(prompts=["?"] * 2, completions=["5", "#### 5"], **columns, **settings)
        assert len(scores) == 2 and all(s is None or type(s) is float for s in scores), name


def test_only_the_standard_library_is_imported():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import rewards\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, str(ROOT)], capture_output=True, text=True
    )
    assert set(done.stdout.split()) <= sys.stdlib_module_names | {"rewards", "__main__"}, done.stderr


def test_a_settings_file_of_two_lines_works(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "from functools import partial\nimport rewards\n"
        'boxed_answer = partial(rewards.math_answer, formats=("boxed",), last_number=False)\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_rewards

    assert score(my_rewards.boxed_answer, r"\boxed{5}", "5", answer=["5"] * 2) == [1.0, 0.0]
