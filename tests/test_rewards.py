"""rewards.py against values worked by hand, the labels of GSM8K's authors, and transformers' own scores."""

import functools
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from types import SimpleNamespace

import pytest
from conftest import DATA, ROOT, read_lines, start
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from samples import asked, said
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import grpo
import rewards

ASKED = asked("Nora has 12 apples and gives away 5. How many are left?")
ANSWERS = ["12 - 5 = 7\n#### 7", "12", "<think>12 - 5 = 8</think>#### 8", "I do not know. " * 30]
mathematics = rewards.module("mathematics")


def grade(completion, answer, reward=rewards.math_answer, **settings):
    return reward(["?"], [completion], [answer], **settings)[0]


def score(reward, *completions, **columns):
    return reward(prompts=["?"] * len(completions), completions=list(completions), **columns)


def cases(name):
    return read_lines(DATA / name)


def test_messages_count_by_the_last_of_the_assistant():
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "3."}]
    contents = {"assistant": "Let me use a tool: #### 1", "tool": "#### 2", "user": "#### 4"}
    before, tool, after = ({"role": role, "content": content} for role, content in contents.items())
    messages = [before, tool, {"role": "assistant", "content": parts}, after]
    assert rewards.text_of(messages) == "It is 3." and grade(messages, "3") == 1.0
    assert rewards.text_of([after]) == "" == rewards.text_of([{"role": "assistant", "content": None}])
    assert rewards.text_of(None) is None is rewards.text_of([{"role": "assistant", "content": 5}])


def test_numbers_are_read_exactly_and_what_is_none_is_not():
    for text, value, *unit in cases("math_numbers.jsonl"):
        found = mathematics.number(text)
        assert found[0] == (value and Fraction(value)) and (not unit or found[1] == unit[0]), text


def test_the_last_mark_gives_the_answer_and_without_a_mark_the_last_number():
    for text, answer in cases("math_marks.jsonl"):
        assert str(rewards.marked_answer(text)) == answer, text
    for text, answer in cases("math_last_numbers.jsonl"):
        assert str(rewards.final_number(text)) == answer, text


def test_equal_final_answers_are_equal_texts_for_a_majority():
    for answer, texts in cases("final_answers.jsonl"):
        assert {rewards.final_answer(text) for text in texts} == {answer}


def test_strict_wants_a_format_that_was_asked_for_and_lenient_reads_numbers():
    for completion, gold, lenient, strict in cases("math_grades.jsonl"):
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


def mistakes(reward):
    """Of the pairs, how many wrong answers are accepted and how many right ones refused."""
    wrong, right = [], []
    for row in cases("math_pairs.jsonl"):
        text = row.get("completion") or rf"\boxed{{{row['answer']}}}"
        (right if row["right"] else wrong).append(reward(text, row["gold"]))
    return f"| {sum(wrong)} of {len(wrong)} | {len(right) - sum(right)} of {len(right)} |"


@functools.cache
def patient(text, gold, reward=rewards.math_answer):
    """Whether an answer is right, asked again if not: on a loaded machine what waits too long is refused."""
    return any(grade(text, gold, reward) for _ in range(3))


def test_pairs_of_known_truth_are_told_apart_as_the_page_says():
    page, strict = (ROOT / "docs" / "rewards.md").read_text(), rewards.math_answer_strict
    assert f"`math_answer` {mistakes(patient)}" in page
    both = lambda text, gold: patient(text, gold, *[strict] * (not text.startswith(r"\boxed")))  # read alike
    assert f"`math_answer_strict` {mistakes(both)}" in page


@pytest.mark.slow
def test_math_verify_alone_makes_the_mistakes_that_the_page_says():
    from math_verify import parse, verify

    page = (ROOT / "docs" / "rewards.md").read_text()
    assert f"math-verify alone {mistakes(lambda text, gold: verify(parse(f'${gold}$'), parse(text)))}" in page


ENDLESS = ["(x+y+z+w)^{400}", "9^{9^{9^9}}", "100000000!", r"\binom{10^9}{10^8}", "x^{x^{x^{x^x}}}"]


def test_formulas_that_never_end_cost_a_second_at_most_and_their_neighbours_nothing():
    def seconds(formula):
        began = time.perf_counter()
        assert grade(rf"\boxed{{{formula}}}", "x+1") == 0.0
        return time.perf_counter() - began

    assert grade(r"\boxed{1+x}", "x+1") == 1.0  # starts the workers
    assert max(map(seconds, ENDLESS)) < 4  # 1, and what a loaded machine takes
    with ThreadPoolExecutor(3) as threads:
        others = [threads.submit(grade, rf"\boxed{{{n} + {n}x}}", f"{n}(x+1)") for n in range(2, 12)]
        assert max(threads.map(seconds, ENDLESS[:1] * 3)) < 8  # two workers, three of them
        assert all(other.result() for other in others)
    texts = [rf"\boxed{{{formula}}}" for formula in [*ENDLESS, "x+1"]]
    assert rewards.math_answer(texts, texts, ["1+x"] * 6) == [0, 0, 0, 0, 0, 1]


WORKERS = """
import os, signal, sys, time, rewards
from pathlib import Path
grade = lambda text: rewards.math_answer(["?"], [text], ["x+1"])
print(grade(r"\\boxed{1+x}"), "sympy" in sys.modules)
def children(pid):
    return [n for file in Path(f"/proc/{pid}/task").glob("*/children") for n in file.read_text().split()]
workers = children(os.getpid())
pids = [*workers, *(child for worker in workers for child in children(worker))]
print(*pids)
print(any("torch" in Path(f"/proc/{pid}/maps").read_text() for pid in pids))
for pid in pids[::-1]:
    os.kill(int(pid), signal.SIGKILL)
print(grade(r"\\boxed{1 + x}"), grade(r"\\boxed{x}"))
if os.fork() == 0:
    print(grade(r"\\boxed{0+x+1}"), flush=True)
    os._exit(0)
os.wait()
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_do_not_load_torch_are_replaced_and_end_with_the_trainer():
    done = start(sys.executable, "-c", WORKERS, cwd=ROOT)
    verdict, pids, *others = done.stdout.splitlines()
    assert [verdict, *others] == ["[1.0] False", "False", "[1.0] [0.0]", "[1.0]"], done.stderr
    ended = lambda pid: not os.path.exists(f"/proc/{pid}") or ") Z " in open(f"/proc/{pid}/stat").read()
    for _ in range(100):
        time.sleep(0.1 * (not all(map(ended, pids.split()))))
    assert done.returncode == -signal.SIGKILL and all(map(ended, pids.split()))


def test_without_math_verify_formulas_end_the_run_and_numbers_do_not(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    mathematics.pool.cache_clear()
    with pytest.raises(RuntimeError, match="pip install"):
        grade(r"\boxed{1+x}", "x+1")
    assert grade(r"\boxed{18}", "18") == 1.0


def test_agrees_with_the_labels_of_gsm8k(gsm8k):
    rows = read_lines(gsm8k / "example_model_solutions.jsonl")
    solutions = [(row["ground_truth"], m) for row in rows for m in row.values() if isinstance(m, dict)]
    stated = [(gold, m["solution"], m["is_correct"]) for gold, m in solutions if "A: " in m["solution"]]
    golds, texts, labels = zip(*stated, strict=True)
    assert len(stated) > 5000 and 0.2 < sum(labels) / len(labels) < 0.6
    for settings in ({}, {"formats": ("line",), "last_number": False}):
        assert rewards.math_answer(texts, texts, golds, **settings) == [float(label) for label in labels]
    finals = [rewards.final_answer(text) == rewards.final_answer(gold) for text, gold in zip(texts, golds)]
    assert finals == list(labels)
    assert not any(rewards.math_answer_strict(texts, texts, golds))  # none of them is in a format it asks for
    golds = [row["answer"] for row in read_lines(gsm8k / "test.jsonl")]
    assert set(rewards.math_answer_strict(golds, golds, golds)) == {1.0}
    assert sum(rewards.math_answer(golds, golds[1:] + golds[:1], golds)) < 0.05 * len(golds)


# Rows: a completion, what it is worth after a prompt, after a text that ends with <think>, after messages
def test_think_format_where_a_chat_template_may_have_opened_the_thought():
    for text, *expected in cases("thoughts.jsonl"):
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
    punished = {0: 0, 12: 0, 13: -0.125, 16: -0.5, 19: -0.875, 20: -1, 21: -1, 10**6: -1}
    assert overlong(punished, max_completion_length=20, cache=8) == [*punished.values()]
    assert overlong((16384, 18432, 20480)) == [0.0, -0.5, -1.0]  # the paper's
    assert overlong((8, 9, 10, 11), max_completion_length=10) == [0, -0.5, -1, -1]  # a fifth of 10 by default
    assert overlong((20, 21), max_completion_length=20, cache=0) == [0.0, -1.0]
    with pytest.raises(ValueError, match="completion_ids"):
        score(rewards.soft_overlong, "text")


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


PARTS = st.lists(st.sampled_from(cases("fuzz.jsonl")) | st.text(max_size=3), max_size=25)
FORMS = ["{}", "{} ", r"\boxed{{{}}}", "#### {}", "the answer is {}", "<answer>{}</answer>"]
TEXTS = st.builds(
    lambda parts, glue, form, times: form.format(glue.join(parts)) * times,
    *(PARTS, st.sampled_from(["", " "]), st.sampled_from(FORMS), st.sampled_from([1, 1, 1, 300])),
)


@how(max_examples=int(os.environ.get("FUZZ", 500)), deadline=None, derandomize=True, database=None)
@given(TEXTS, TEXTS)
def test_no_input_raises_or_takes_a_second(text, gold):
    grade(r"\boxed{1+x}", "x+1")  # starts the workers
    columns = {"answer": [gold], "completion_ids": [list(range(len(text)))], "max_completion_length": 8}
    for name in {*NAMES} - {"code_tests"}:
        began = time.process_time()  # of this process: the kernel bounds the workers'
        [reward] = getattr(rewards, name)([gold], [text], **columns)
        assert (reward is None or type(reward) is float) and time.process_time() - began < 1, name
    assert type(rewards.final_answer(text)) is str


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
    modules = {name.split(".")[0] for name in modules.replace(str(ROOT), "").split()}
    assert modules <= sys.stdlib_module_names | {"__main__", "/sandbox", "/mathematics"}
    done = start(sys.executable, "-Ic", LOAD + JUDGE, path, cwd=tmp_path)
    assert math.isfinite(float(done.stdout.splitlines()[-1])), done.stderr


HANGS = """
import re, runpy, sys, time
from concurrent.futures import ThreadPoolExecutor
rewards = runpy.run_path(sys.argv[2])
def patient(completions):
    while True:
        try:
            time.sleep(9)
        except Exception:
            pass
def pool(completions):
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda _: time.sleep(99), completions))
def one_by_one(completions):
    yield 1.0
    time.sleep(99)
def regex(completions):  # keeps Python's lock
    return re.match("(a+)+$", "a" * 60 + "b")
print(rewards["within"](0.5, "r", lambda completions: (len(x) for x in completions))(completions=["a", "bc"]))
rewards["within"](0.5, f"{sys.argv[0]}:{sys.argv[1]}", globals()[sys.argv[1]])(completions=["a", "b"])
"""


@pytest.mark.parametrize("kind, line", [("patient", 8), ("pool", 13), ("one_by_one", 16)])
def test_reward_that_hangs_ends_the_process_with_one_line_that_says_where(kind, line, tmp_path):
    path = tmp_path / "hangs.py"
    path.write_text(HANGS)
    done = start(sys.executable, path, kind, ROOT / "rewards.py", cwd=tmp_path, timeout=60)
    told = f"error: --reward {path}:{kind}: no answer in 0.5 s (--reward-timeout); it is in line {line} of "
    assert (done.returncode, done.stdout, done.stderr) == (2, "[1, 2]\n", f"{told}{path}\n")


def test_reward_that_hangs_in_c_ends_the_process_too(tmp_path):
    (tmp_path / "hangs.py").write_text(HANGS)
    done = start(sys.executable, "hangs.py", "regex", ROOT / "rewards.py", cwd=tmp_path, timeout=60)
    assert done.returncode == 1 and "line 18 in regex" in done.stderr


def test_a_file_of_the_users_may_be_named_rewards_py(tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text("def mine(completions, **columns): return [0.5]")
    monkeypatch.chdir(tmp_path)
    args = SimpleNamespace(reward_timeout=9, dtype="float32")
    found = grpo.load_rewards(("rewards.py:mine", str(ROOT / "tiny" / "reward")), [], args, "cpu")
    assert found["mine"](completions=["x"]) == [0.5] and "reward_model" in found


def test_reward_without_a_limit_is_itself_and_a_limited_one_has_its_signature_and_errors():
    assert rewards.within(0, "x", rewards.math_answer) is rewards.math_answer
    limited = rewards.within(9, "x", rewards.math_answer)
    assert inspect.signature(limited) == inspect.signature(rewards.math_answer)
    with pytest.raises(TypeError):
        limited(prompts=["?"])
