"""Verifiable rewards: functions that read a completion and say what it is worth, without a model.

Every reward has TRL's signature: lists in, one number a completion out, None where a row cannot be scored.

    reward(prompts, completions, **columns) -> list[float | None]

Prompts and completions are texts, or lists of {"role", "content"} messages, of which the assistant's last one
counts. Each column of the dataset comes as a keyword list. Scripts load rewards by path, never by import, so
a file of your own does as well as this one:

    --reward rewards.py:math_answer --reward rewards.py:think_format --reward-weights 1.0 0.2

    math_answer           1 if the final answer equals the gold one, however it is written
    math_answer_strict    the same, of answers in a format that was asked for
    code_tests            1 if the program passes its tests, run in a sandbox
    think_format          1 if the completion is <think>...</think> and then an answer
    json_format           1 if the completion is JSON
    length_penalty        from 0 to -1 with the length beyond a bound
    soft_overlong         from 0 to -1 over the last tokens before the limit (DAPO)
    repetition_penalty    minus the share of n-grams that repeat an earlier one

Keyword-only parameters are settings. To change them, name the changed function in a file of your own:

    from functools import partial
    import rewards
    boxed_answer = partial(rewards.math_answer, formats=("boxed",), last_number=False)
    code_tests = partial(rewards.code_tests, timeout=5.0)

and pass `--reward my_rewards.py:boxed_answer`. Only the standard library is imported here.
"""

import ast
import builtins
import collections
import ctypes
import decimal
import functools
import importlib.util
import itertools
import json
import math
import operator
import os
import platform
import re
import resource
import struct
import subprocess
import sys
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from socket import socketpair


# ------------------------------------------------------------------------------------------------------------
# Texts
# ------------------------------------------------------------------------------------------------------------
def text_of(completion) -> str:
    """The text of a completion: itself, or the content of the assistant's last message."""
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") for message in completion if message["role"] == "assistant"]
    content = contents[-1] if contents else ""
    if isinstance(content, list):  # parts of a multimodal message
        content = "".join(part.get("text", "") for part in content)
    return content or ""


def after_thought(text) -> str:
    """What follows the last </think>; nothing where a thought was begun and never ended."""
    rest = text.rpartition("</think>")[2]
    return rest if "<think>" not in rest else ""


def last_fence(text, *languages) -> str:
    """The last fenced block, of one of `languages` if there is any; the whole text without a block."""
    blocks = re.findall(r"```([^\n`]*)\n(.*?)```", text, re.DOTALL)
    named = [code for language, code in blocks if language.strip().lower() in languages]
    return (named or [code for _, code in blocks] or [text])[-1]


# ------------------------------------------------------------------------------------------------------------
# Mathematics
# ------------------------------------------------------------------------------------------------------------
DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# A number as it is written in an answer: -$1,234.50, 3/4, 1 1/2, 5e-3, 12%, 5 km/h, 3 million dollars
NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*[$€£¥]?\s*(?P<sign2>[-+]?)"
    rf"(?:(?P<whole>\d+)\s+(?=\d+\s*/))?(?P<top>{DIGITS})(?:e(?P<exponent>[-+]?\d{{1,3}})\b)?"
    rf"(?:\s*/\s*(?P<bottom>{DIGITS}))?(?:\s*(?P<percent>%|percent\b))?"
    rf"(?:\s*(?P<scale>hundred|thousand|million|billion|trillion)\b)?(?P<unit>.*)",
    re.IGNORECASE | re.DOTALL,
)
LAST_NUMBER = re.compile(
    rf"(?:(?<![\w)\].])[-+])?(?:\\[dt]?frac\{{\d+\}}\{{\d+\}}|[$€£¥]?(?<![\d.]){DIGITS}(?:/{DIGITS})?(?:\s?%)?)"
)
LETTER_UNITS = frozenset("mgshlLCFKVWJN")  # other single letters are variables
NO_UNIT = re.compile("(?:pi|or|and|to|times|plus|minus|over|mod|sqrt|sin|cos|tan|log|ln|exp)", re.IGNORECASE)
MATHEMATICS = re.compile(r"[\\^_=+*/()\[\]{}]|\d\s*[A-Za-z]\b")
FORMATS = {
    # GSM8K's #### 18; Markdown's headings begin alike: #### Step 1, #### 2. Add them, #### Answer:
    "hash": r"####[ \t]*+(?P<hash>(?!Step\b|\d+[.)][ \t])[^\n]*[^\s:])[ \t]*$",
    "boxed": r"\\boxed\s*(?P<boxed>\{)",  # its end is where the braces balance
    "tag": r"<answer>(?P<tag>(?:(?!<answer>).)*?)</answer>",
    "line": r"^[ \t*_]*(?:A|(?i:(?:final )?answer))[ \t*_]*:[ \t*_]*(?P<line>[^\n]+)",  # A: 18
}


def math_answer(prompts, completions, answer, *, formats=tuple(FORMATS), last_number=True, **columns):
    r"""1.0 if a completion's final answer equals `answer`, else 0.0.

    `answer` is bare, or a solution with its answer marked (GSM8K). `formats` says which marks count in a
    completion, of `hash` (#### 18), `boxed` (\boxed{18}), `tag` (<answer>18</answer>) and `line` (A: 18, or
    Answer: 18, on a line of its own); the last mark counts, after the thought if there is one. With
    `last_number` a completion without a mark answers with its last number. Equality is that of `same_answer`.
    None where the gold answer is empty, or needs math-verify and it is not installed.
    """
    rewards = []
    for completion, gold in zip(completions, answer, strict=True):
        gold = "" if gold is None else str(gold)
        gold = plain(marked_answer(gold) or gold)
        is_number = number(gold)[0] is not None
        if not gold or (not is_number and MATHEMATICS.search(gold) and math_verify() is None):
            rewards.append(None)
            continue
        text = after_thought(text_of(completion))
        found = marked_answer(text, formats)
        if last_number and found is None:
            found = final_number(text)
        elif last_number and is_number and number(found)[0] is None and not MATHEMATICS.search(found):
            found = final_number(found)  # <answer>The total is 18 dollars</answer>
        rewards.append(float(found is not None and same_answer(gold, found)))
    return rewards


def math_answer_strict(prompts, completions, answer, **columns):
    r"""`math_answer` of answers marked ####, \boxed or <answer>: one without a mark is worth 0.0."""
    return math_answer(
        prompts, completions, answer, formats=("hash", "boxed", "tag"), last_number=False, **columns
    )


def marked_answer(text, formats=tuple(FORMATS)) -> str | None:
    """What the last mark in a text gives for its answer, or None; a box within another mark is opened."""
    pattern = "|".join(FORMATS[name] for name in formats)
    for match in reversed(list(re.finditer(pattern, text, re.MULTILINE | re.DOTALL))):
        if match.lastgroup == "boxed":
            found = braced(text, match.start("boxed"))
        else:
            found = match[match.lastgroup]
            found = found if r"\boxed" not in found else marked_answer(found, ("boxed",))
        if found is not None:  # else an unclosed box
            return found.strip()
    return None


def braced(text, start, longest=1000) -> str | None:
    """What stands between the brace at `start` and the one that closes it, or None."""
    depth = 0
    for i in range(start, min(start + longest, len(text))):
        if text[i] in "{}" and text[i - 1] != "\\":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start + 1 : i]
    return None


def final_number(text) -> str | None:
    """The last number in a text, with its fraction and percent sign; the minus of 16-3 is no sign."""
    found = LAST_NUMBER.findall(plain(text))
    return found[-1] if found else None


def same_answer(gold, answer) -> bool:
    r"""Whether two bare answers are equal.

    Numbers are compared as fractions, exactly, with signs, thousands, decimals, currencies and units read;
    where one alone has a percent sign, 50% is both 50 and 1/2. Other answers are equal if their letters are,
    regardless of case and spaces; and what is mathematics, such as \sqrt{8} and 2\sqrt{2}, if math-verify
    (which computes to 6 decimals) says so.
    """
    (x, x_percent), (y, y_percent) = number(gold), number(answer)
    if x is not None and y is not None:
        return x == y or x / 100**x_percent == y / 100**y_percent
    gold, answer = plain(gold), plain(answer)
    if re.sub(r"\s", "", gold).casefold() == re.sub(r"\s", "", answer).casefold():
        return True
    if not MATHEMATICS.search(gold if x is None else answer) or math_verify() is None:
        return False
    # Its time limit is an alarm signal, which only the main thread may set.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    try:
        parsed = [math_verify().parse(f"${text}$", parsing_timeout=seconds) for text in (gold, answer)]
        return bool(math_verify().verify(*parsed, timeout_seconds=seconds))
    except Exception:  # it reports what it cannot read in many ways
        return False


def number(text) -> tuple[Fraction | None, bool]:
    """An amount as an exact fraction, None if the text is none, and whether it has a percent sign."""
    text = re.sub(r"(\d)\s*\\[dt]?frac", r"\1 \\frac", plain(text))  # 1\frac{1}{2} is one and a half
    text = re.sub(r"\\[dt]?frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))", r"\1\2/\3\4", text)
    text = re.sub(r"^[A-Za-z]\w*\s*=\s*", "", text)  # x = 5
    match = NUMBER.fullmatch(text)
    if len(text) > 1000 or not match or not is_unit(match["unit"]):  # Python refuses 4,300 digits
        return None, False
    top, bottom, whole = (
        Fraction((match[name] or "0").replace(",", "")) for name in ("top", "bottom", "whole")
    )
    if match["bottom"] and bottom == 0:
        return None, False
    value = (whole + top / (bottom or 1)) * Fraction(10) ** int(match["exponent"] or 0)
    value *= SCALES[match["scale"].lower()] if match["scale"] else 1
    return -value if "-" in match["sign"] + match["sign2"] else value, bool(match["percent"])


def is_unit(text) -> bool:
    """Whether what follows a number is words, as dollars, km/h, m^2; in 2x and 2 pi it is mathematics."""
    words = re.findall(r"[^\W\d_]+", text)
    rest = re.sub(r"[^\W\d_]+(?:\^?[23]\b)?|[\s/°.'$€£¥-]", "", text)
    if rest or re.match(r"[^\W\d_](?![^\W\d_])", text):  # another number or sign; a letter next to the digit
        return False
    return all(word in LETTER_UNITS if len(word) == 1 else not NO_UNIT.fullmatch(word) for word in words)


def plain(text) -> str:
    r"""`text` without what only typesets it: $...$, \text{}, thin spaces, unicode signs, a final dot."""
    text = text.translate({0x2212: "-", 0x2013: "-", 0xFF0D: "-", 0xA0: " ", 0x202F: " "})
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[()\[\]]|\\[!,;: ]|\^\{?\\circ\}?|\*\*", "", text)
    text = text.replace("{,}", ",").replace(r"\%", "%").replace(r"\$", "$").strip()
    if text[:1] == text[-1:] == "$":
        text = text.strip("$")
    return text.rstrip(".").strip()


@functools.cache
def math_verify():
    """The module math_verify, or None after one warning."""
    if importlib.util.find_spec("math_verify") is None:
        warnings.warn(
            "an answer needs math-verify, which is not installed (pip install math-verify): rows whose gold "
            "answer needs it get no reward, and such answers to a numeric gold answer count as wrong",
            stacklevel=2,
        )
        return None
    import math_verify as module

    return module


# ------------------------------------------------------------------------------------------------------------
# Format, length and repetition
# ------------------------------------------------------------------------------------------------------------
def think_format(prompts, completions, **columns):
    """1.0 if a completion is one <think>...</think>, not empty, and then an answer, else 0.0.

    A prompt that ends with <think>, as some chat templates make it, has opened the thought already.
    """
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        opened = isinstance(prompt, str) and prompt.rstrip().endswith("<think>")
        text = "<think>" * opened + text_of(completion)
        before, _, rest = text.partition("<think>")
        thought, _, answer = rest.partition("</think>")
        once = text.count("<think>") == text.count("</think>") == 1
        rewards.append(float(bool(once and not before.strip() and thought.strip() and answer.strip())))
    return rewards


def json_format(prompts, completions, **columns):
    """1.0 if a completion, or its last fenced block, is JSON (RFC 8259: no NaN, no Infinity), else 0.0."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    def is_json(text):
        try:
            json.loads(text, parse_constant=refuse, parse_int=len)  # len: numbers of any length are JSON
        except (ValueError, RecursionError):
            return False
        return True

    return [float(is_json(last_fence(after_thought(text_of(c)), "json"))) for c in completions]


def length_penalty(prompts, completions, completion_ids=None, *, max_length=256, **columns):
    """0 up to `max_length`, then falling by the excess's share of it, to -1 at twice that length.

    Lengths are in tokens where `completion_ids` are given, else in words.
    """
    return [min(max(1 - len(c) / max_length, -1.0), 0.0) for c in units(completions, completion_ids)]


def soft_overlong(
    prompts, completions, completion_ids=None, *, max_completion_length=20480, cache=None, **columns
):
    """`overlong_penalty` of the lengths of `completion_ids`, in tokens; ValueError without them.

    Scripts set `max_completion_length` to their flag. By default `cache` is a fifth of it, as in DAPO, whose
    lengths are 20,480 and 4,096.
    """
    if completion_ids is None:
        raise ValueError("soft_overlong counts tokens and needs completion_ids")
    cache = max_completion_length // 5 if cache is None else cache
    return [overlong_penalty(len(ids), max_completion_length, cache) for ids in completion_ids]


def overlong_penalty(length, max_length, cache) -> float:
    """0 up to max_length - cache, then linearly down to -1 at max_length (Eq. 13, arXiv:2503.14476)."""
    if length > max_length:
        return -1.0
    return min((max_length - cache - length) / cache, 0.0) if cache else 0.0


def repetition_penalty(prompts, completions, completion_ids=None, *, n=3, scale=1.0, **columns):
    """-scale times the share of n-grams that occurred before in the completion (Sec. 2.4, arXiv:2502.03373).

    N-grams are of tokens where `completion_ids` are given, else of words in lower case; fewer than n give 0.
    """
    rewards = []
    for sequence in units(completions, completion_ids):
        ngrams = [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]
        rewards.append(scale * (len(set(ngrams)) / len(ngrams) - 1) if ngrams else 0.0)
    return rewards


def units(completions, completion_ids) -> list:
    """What a length is counted in: the tokens of each completion, or its words."""
    return completion_ids if completion_ids is not None else [text_of(c).lower().split() for c in completions]


# ------------------------------------------------------------------------------------------------------------
# Programs
# ------------------------------------------------------------------------------------------------------------
def code_tests(
    prompts,
    completions,
    tests,
    entry_point=None,
    *,
    allow_code_execution=False,
    timeout=10.0,
    memory_mb=1024,
    workers=None,
    **columns,
):
    """1.0 if the program in a completion passes its tests, else 0.0; None if a row has no tests that compile.

    The program is the last fenced block of Python after the thought, or the whole text. `tests` is Python
    source that is run after it, or a list of its lines: HumanEval's `test` and then `check(name)`, or MBPP's
    `test_list`. Each program has `timeout` seconds of time, and `memory_mb`; `workers` (the number of CPUs)
    run at once. RuntimeError unless `allow_code_execution=True`, and where the sandbox cannot be built (it
    needs Linux).

    How a verdict comes about, and what forging one would take: two processes, joined by a pipe. The *player*
    runs the program. The *judge* runs the tests, in which the program's names stand for `Remote` objects that
    ask the player. The player never holds the tests, a secret, or the judge's channel to this process, and
    what it prints, patches, or exits with proves nothing: a program passes when the judge has run the last
    statement of the tests. Plain values (numbers, texts, lists, ...) are compared in the judge, so that a
    returned object whose `__eq__` is always true equals no number.

    Both processes can read the files of Python and write none, start neither processes nor threads, open no
    socket, signal nobody, and die with this process; they hold no other files and no environment.

    What this does not do. A test that asks the program's own objects gets their word for it: `f(x) == g(x)`
    of two such objects, `f(x).is_right()`. Weak tests stay weak: a program that sees an argument may answer
    from memory. Limits of the kernel are no virtual machine: against its bugs, use one. Without Landlock
    (Linux 5.13) the program can read the files that you can. And some honest programs fail: those that need
    files, threads or processes, tests that pass the program anything but plain values and functions, or
    compare its own objects with plain ones, or capture what it prints. Names of builtins (a function called
    `sum`) are taken from the program only if the column `entry_point` names them. Arrays arrive as lists.
    """
    if allow_code_execution is not True:  # a dataset's column of this name is a list
        raise RuntimeError(
            "code_tests runs programs written by the model on this machine. If that is what you want, pass "
            "--allow-code-execution to the script, or allow_code_execution=True to the function"
        )
    jobs = [
        {
            "program": last_fence(after_thought(text_of(c)), "python", "py", "python3"),
            "tests": "\n".join(t) if isinstance(t, list) else t,
            "entry_point": e,
        }
        for c, t, e in zip(completions, tests, entry_point or [None] * len(tests), strict=True)
    ]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        verdicts = list(pool.map(lambda job: run_tests(**job, timeout=timeout, memory_mb=memory_mb), jobs))
    return [None if passed is None else float(passed) for passed, _ in verdicts]


def run_tests(program, tests, entry_point=None, timeout=10.0, memory_mb=1024) -> tuple[bool | None, str]:
    """Whether a program passes its tests (None: there are none), and the reason. It executes the program."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        raise RuntimeError(f"code_tests needs Linux on {' or '.join(ARCHITECTURES)}")
    if not tests or not tests.strip():
        return None, "no tests"
    job = json.dumps({"program": program, "tests": tests, "entry_point": entry_point})
    ends = socketpair()
    processes = []
    try:
        for role, end in zip(("player", "judge"), ends):
            limits = [str(math.ceil(timeout) + 1), str(memory_mb)]
            command = [
                sys.executable,
                "-I",
                "-X",
                "utf8",
                os.path.abspath(__file__),
                role,
                str(end.fileno()),
                *limits,
            ]
            pipe = subprocess.PIPE if role == "judge" else subprocess.DEVNULL
            processes.append(
                subprocess.Popen(
                    command,
                    stdin=pipe,
                    stdout=pipe,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[end.fileno()],
                    env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                    cwd="/",
                    start_new_session=True,  # out of reach of the terminal's signals
                )
            )
            end.close()  # so that each side sees when the other has ended
        output, _ = processes[1].communicate(job.encode(), timeout)
        started, _, verdict = output.partition(b"\n")
        if started != b"null":
            raise RuntimeError(
                f"the sandbox of code_tests could not be built: {started.decode() or 'no word of it'}"
            )
        passed, reason = json.loads(verdict) if verdict else (False, "the judge ended: memory or CPU limit")
    except subprocess.TimeoutExpired:
        passed, reason = False, f"more than {timeout} seconds"
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout)):
                pipe.close()
        for end in ends:
            end.close()
    return passed, reason


# ------------------------------------------------------------------------------------------------------------
# Judge and player: the two processes of a program under test
# ------------------------------------------------------------------------------------------------------------
MESSAGE_LIMIT = 2**24  # bytes of one message
TEST_MODULES = (math, re, collections, itertools)  # what tests of MBPP take for imported
OPERATORS = (
    "eq ne lt le gt ge add sub mul matmul truediv floordiv mod pow and_ or_ xor"
    " getitem setitem delitem index neg pos invert"
)
BUILTINS = (
    "len iter next bool str repr hash abs int float complex round"
    " getattr setattr delattr isinstance issubclass"
)


def new_slice(limits) -> slice:
    """The slice of a list of its start, stop and step."""
    return slice(*limits)


# Types that travel by value: to JSON, and back
CODECS = {
    "int": (int, hex, lambda text: int(text, 16)),  # decimal texts end at 4,300 digits
    "complex": (complex, str, complex),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "list": (list, list, list),
    "tuple": (tuple, list, tuple),
    "set": (set, list, set),
    "frozenset": (frozenset, list, frozenset),
    "deque": (collections.deque, list, collections.deque),
    "dict": (dict, dict.items, dict),
    "range": (range, lambda r: [r.start, r.stop, r.step], lambda limits: range(*limits)),
    "slice": (slice, lambda s: [s.start, s.stop, s.step], new_slice),
    "Fraction": (Fraction, str, Fraction),
    "Decimal": (decimal.Decimal, str, decimal.Decimal),
}
MUTABLE = (list, dict, set, bytearray, collections.deque)
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class NOTHING:
    """Stands for the plain value that an object has not."""


class Ended(BaseException):
    """The other side has ended, or does not keep to the protocol; no `except Exception` stops it."""


class Link:
    """One end of the line between judge and player: JSON lines, in which own objects are named by numbers."""

    def __init__(self, fd, operations):
        self.fd, self.reader = fd, open(fd, "rb", closefd=False)
        self.operations = operations  # by name: what the other side may ask for
        self.objects, self.numbers, self.remotes = [], {}, {}
        self.gives_objects = False  # the player does; the judge lets its functions be called, no more
        self.ended = False

    def send(self, *message):
        """Send one message: its kind, then what belongs to it."""
        line = json.dumps(message).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self.fd, line) :]
        except OSError as error:
            self.ended = True
            raise Ended("the program ended") from error

    def receive(self):
        """The kind of the next message, and what belongs to it."""
        try:
            line = self.reader.readline(MESSAGE_LIMIT)
            if not line.endswith(b"\n"):
                raise ValueError("the program ended, or said too much at once")
            kind, *rest = json.loads(line)
            return kind, rest
        except (OSError, *UNREADABLE) as error:
            self.ended = True
            raise Ended(str(error)) from error

    def ask(self, operation, /, *args, **kwargs):
        """Let the other side apply an operation; its changes to mutable arguments are made here, too."""
        named = {name: self.encode(value) for name, value in kwargs.items()}
        self.send("ask", operation, [self.encode(value) for value in args], named)
        while True:
            kind, rest = self.receive()
            try:
                if kind == "ask":  # it calls a function that was among the arguments
                    self.answer(*rest)
                    continue
                if kind == "value":
                    value, changed = self.decode(rest[0]), [self.decode(c) for c in rest[1]]
                elif kind == "error":
                    error = as_exception(*rest)
                else:
                    raise ValueError(f"unknown message {kind!r}")
            except UNREADABLE as error:
                self.ended = True
                raise Ended(f"a message that cannot be read: {error}") from error
            if kind == "error":
                raise error
            for mine, theirs in zip(args, changed):
                if type(mine) in MUTABLE and type(mine) is type(theirs) and mine != theirs:
                    mine.clear()
                    (mine.update if isinstance(mine, dict | set) else mine.extend)(theirs)
            return value

    def answer(self, operation, args, kwargs):
        """Apply an operation that the other side asks for, and send what came of it."""
        try:
            values = [self.decode(a) for a in args]
            result = self.operations[operation](*values, **{k: self.decode(v) for k, v in kwargs.items()})
            changed = [self.encode(v) if type(v) in MUTABLE else None for v in values]
            self.send("value", self.encode(result), changed)
        except Exception as error:
            self.send("error", [t.__name__ for t in type(error).__mro__], [str(a)[:1000] for a in error.args])
        except (SystemExit, KeyboardInterrupt) as error:
            self.send("error", [], [repr(error)])

    def encode(self, value):
        """JSON of a plain value; else of the number under which the other side may ask for the object."""
        kind = type(value)
        if value is None or kind in (bool, float, str) or (kind is int and abs(value) < 2**53):
            return value
        if kind.__module__ == "numpy" and hasattr(value, "tolist"):
            return self.encode(value.tolist())
        if kind.__name__ in CODECS and kind is CODECS[kind.__name__][0]:
            payload = CODECS[kind.__name__][1](value)
            if kind in (list, tuple, set, frozenset, dict, collections.deque):
                payload = [
                    [self.encode(x) for x in item] if kind is dict else self.encode(item) for item in payload
                ]
            return [kind.__name__, payload]
        if kind is Remote:
            return ["yours", value._number]
        if not (self.gives_objects or callable(value)):
            raise TypeError(f"a {kind.__name__} of the tests cannot be passed to the program")
        number = self.numbers.setdefault(id(value), len(self.objects))
        if number == len(self.objects):
            self.objects.append(value)  # kept, or another object might get its id
        return ["mine", number, plain_type(value) is not None]

    def decode(self, message):
        """The value of what `encode` made on the other side."""
        if not isinstance(message, list):
            return message
        kind, *rest = message
        if kind == "yours":
            return self.objects[rest[0]]
        if kind == "mine":
            return self.remotes.setdefault(rest[0], Remote(self, *rest))
        payload = rest[0]
        if isinstance(payload, list):
            if kind == "dict":
                payload = [(self.decode(key), self.decode(value)) for key, value in payload]
            else:
                payload = [self.decode(item) for item in payload]
        return CODECS[kind][2](payload)


def plain_type(value) -> type | None:
    """The plain type of whose subclass an object is: of an IntEnum int, of a named tuple tuple."""
    kinds = (str, float, *(kind for kind, _, _ in CODECS.values()))
    return next((kind for kind in kinds if isinstance(value, kind)), None)


def plain_value(value):
    """The plain value of an object of the other process, NOTHING if it has none; other values as they are."""
    if type(value) is not Remote:
        return value
    return value._link.ask("plain", value) if value._has_plain else NOTHING


def as_exception(names, args) -> Exception:
    """The builtin exception nearest to one of another process, given by the names of its classes."""
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(*args)
            except TypeError:  # a UnicodeDecodeError wants five arguments of their types; its base takes any
                continue
    return RuntimeError(*args)


def forward(name):
    """A method of `Remote` that the other side applies."""
    return lambda self, /, *args, **kwargs: self._link.ask(name, self, *args, **kwargs)


def compare(name):
    """A binary operator of `Remote`: between two objects of the program its own, else that of plain values.

    An object without a plain value does not go together with a plain one: it would be shown what the test
    expects, and could answer that.
    """

    def apply(self, other):
        mine, theirs = plain_value(self), plain_value(other)
        if type(other) is Remote and (mine is NOTHING or theirs is NOTHING):
            return self._link.ask(name, self, other)
        return NotImplemented if mine is NOTHING else getattr(operator, name)(mine, theirs)

    return apply


class Remote:
    """An object of the other process; `_has_plain` if it is of a subclass of a plain type."""

    __slots__ = ("_link", "_number", "_has_plain")

    def __init__(self, link, number, has_plain):
        for name, value in zip(self.__slots__, (link, number, has_plain)):
            object.__setattr__(self, name, value)  # __setattr__ below is that of the object itself

    __eq__, __ne__ = compare("eq"), compare("ne")
    __lt__, __le__, __gt__, __ge__ = compare("lt"), compare("le"), compare("gt"), compare("ge")
    __add__, __sub__, __mul__, __matmul__ = compare("add"), compare("sub"), compare("mul"), compare("matmul")
    __truediv__, __floordiv__ = compare("truediv"), compare("floordiv")
    __mod__, __pow__ = compare("mod"), compare("pow")
    __and__, __or__, __xor__ = compare("and_"), compare("or_"), compare("xor")
    __call__, __getattr__, __setattr__, __delattr__ = map(forward, ("call", "getattr", "setattr", "delattr"))
    __getitem__, __setitem__, __delitem__ = map(forward, ("getitem", "setitem", "delitem"))
    __len__, __iter__, __next__, __bool__ = map(forward, ("len", "iter", "next", "bool"))
    __str__, __repr__, __int__, __float__ = map(forward, ("str", "repr", "int", "float"))
    __complex__, __index__, __round__ = map(forward, ("complex", "index", "round"))
    __abs__, __neg__, __pos__, __invert__ = map(forward, ("abs", "neg", "pos", "invert"))
    __enter__ = forward("enter")

    def __exit__(self, *error):
        self._link.ask("exit", self)

    def __hash__(self):
        return hash(plain_value(self)) if self._has_plain else self._link.ask("hash", self)

    def __contains__(self, item):
        return any(item is other or item == other for other in self)

    def __instancecheck__(self, instance):
        return self._link.ask("isinstance", instance, self)

    def __subclasscheck__(self, subclass):
        return self._link.ask("issubclass", subclass, self)


def player(link):
    """Run the program that the judge sends, and then what it asks of the program's objects."""
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses and pickle look their module up

    def run(program):
        exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)
        return list(module.__dict__)

    link.gives_objects = True
    link.operations |= {name: getattr(operator, name) for name in OPERATORS.split()}
    link.operations |= {name: getattr(builtins, name) for name in BUILTINS.split()}
    link.operations |= {
        "run": run,
        "get": lambda name: module.__dict__[name],
        "plain": lambda value: plain_type(value)(value),
        "enter": lambda context: type(context).__enter__(context),
        "exit": lambda context: type(context).__exit__(context, None, None, None),
    }
    while True:
        link.answer(*link.receive()[1])


def judge(link, program, tests, entry_point) -> tuple[bool | None, str]:
    """Run the tests on the program's names: whether it passes (None: the tests do not compile), and why."""
    try:
        statements = ast.parse(tests)
        code = compile(statements, "<tests>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return None, f"the tests do not compile: {error}"
    if not statements.body:
        return None, "no tests"
    namespace = {"__name__": "tests"} | {module.__name__: module for module in TEST_MODULES}
    try:
        names = set(link.ask("run", program))
        for name in dict.fromkeys(re.findall(r"[^\W\d]\w*", tests)):
            own = not hasattr(builtins, name) and name not in namespace and not name.startswith("__")
            if (own or name == entry_point) and name in names:
                namespace[name] = link.ask("get", name)
        exec(code, namespace)
    except BaseException as error:
        return False, f"{type(error).__name__}: {error}"[:1000]
    # A test may have caught that the program ended, by an `except` without a class.
    return (False, "the program ended") if link.ended else (True, "passed")


# ------------------------------------------------------------------------------------------------------------
# The sandbox
# ------------------------------------------------------------------------------------------------------------
# What neither process may do, as name:number on x86-64:number on ARM64 (none where it does not exist there)
DENIED_CALLS = """
    fork:57: vfork:58: clone:56:220 clone3:435:435 execve:59:221 execveat:322:281 setsid:112:157
    setpgid:109:154 kill:62:129 tkill:200:130 tgkill:234:131 rt_sigqueueinfo:129:138
    rt_tgsigqueueinfo:297:240 pidfd_open:434:434 pidfd_send_signal:424:424 pidfd_getfd:438:438
    process_madvise:440:440 ptrace:101:117 process_vm_readv:310:270 process_vm_writev:311:271
    process_mrelease:448:448 kcmp:312:272 prctl:157:167 setpriority:141:140 ioprio_set:251:30
    sched_setaffinity:203:122 sched_setscheduler:144:119 sched_setparam:142:118 sched_setattr:314:274
    migrate_pages:256:238 move_pages:279:239 socket:41:198 connect:42:203 bind:49:200 listen:50:201
    sendmsg:46:211 sendmmsg:307:269 io_uring_setup:425:425 unshare:272:97 setns:308:268 bpf:321:280
    perf_event_open:298:241 userfaultfd:323:282 keyctl:250:219 add_key:248:217 request_key:249:218
    shmget:29:194 msgget:68:186 semget:64:190 mq_open:240:180 shmat:30:196 shmctl:31:195 semop:65:193
    semtimedop:220:192 semctl:66:191 msgsnd:69:189 msgrcv:70:188 msgctl:71:187 mq_unlink:241:181
    memfd_create:319:279 memfd_secret:447:447 creat:85: openat2:437:437 open_by_handle_at:304:265
    truncate:76:45 mkdir:83: mkdirat:258:34 mknod:133: mknodat:259:33 rmdir:84: unlink:87: unlinkat:263:35
    rename:82: renameat:264:38 renameat2:316:276 link:86: linkat:265:37 symlink:88: symlinkat:266:36
    chmod:90: fchmod:91:52 fchmodat:268:53 fchmodat2:452:452 chown:92: fchown:93:55 lchown:94:
    fchownat:260:54 utime:132: utimes:235: futimesat:261: utimensat:280:88 setxattr:188:5 lsetxattr:189:6
    fsetxattr:190:7 setxattrat:463:463 removexattr:197:14 lremovexattr:198:15 fremovexattr:199:16
    removexattrat:466:466
"""
# Calls denied for some arguments: name, numbers, which argument, and the bits that it must not have
DENIED_ARGUMENTS = (
    ("open", (2, None), 1, os.O_ACCMODE | os.O_CREAT | os.O_TRUNC),  # opening to write
    ("openat", (257, 56), 2, os.O_ACCMODE | os.O_CREAT | os.O_TRUNC),
    ("prlimit64", (302, 261), 0, 0xFFFFFFFF),  # limits of a process other than itself, which is 0
    ("fcntl", (72, 25), 1, 8),  # F_SETOWN, F_SETSIG: the kernel would signal another process for it
    ("ioctl", (16, 29), 1, 0x8000),  # FIOSETOWN, SIOCSPGRP: the same, of sockets
    ("sendto", (44, 206), 5, 0xFFFFFFFF),  # with an address, which a socketpair of datagrams may take
)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_...


def lock_down(seconds, memory_mb):
    """Give up, for this process and for good, what running a program does not need; OSError if refused."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function, *args):  # a call that must not fail
        result = function(*args)
        if result < 0:
            raise OSError(
                ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())} ({function.__name__}{args[:2]})"
            )
        return result

    limits = {"CPU": seconds, "AS": memory_mb * 2**20, "FSIZE": 0, "CORE": 0, "NOFILE": 64}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    # A user namespace of its own, where the kernel grants one, bars it from the memory and /proc of others.
    libc.unshare(0x10000000)  # CLONE_NEWUSER
    call(libc.capset, struct.pack("Ii", 0x20080522, 0), bytes(24))  # version 3, itself: no capability is left
    call(libc.prctl, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call(libc.prctl, 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: its memory is closed to other processes
    call(libc.prctl, 1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: SIGKILL when the thread that started it ends

    # Landlock: files can be read below the folders of Python and of the system's libraries, and nowhere else.
    if libc.syscall(444, None, 0, 1) > 0:
        rights = call(libc.syscall, 444, struct.pack("Q", 2**13 - 1), 8, 0)
        for folder in {sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64"}:
            if os.path.isdir(folder):
                below = os.open(folder, os.O_PATH)
                call(libc.syscall, 445, rights, 1, struct.pack("=Qi", 4 | 8, below), 0)  # READ_FILE, READ_DIR
                os.close(below)
        call(libc.syscall, 446, rights, 0)
        os.close(rights)

    program = seccomp_filter(platform.machine())
    instructions = ctypes.create_string_buffer(program)
    header = struct.pack("HP", len(program) // 8, ctypes.addressof(instructions))
    call(libc.prctl, 22, 2, header, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def seccomp_filter(machine) -> bytes:
    """The filter of system calls as classic BPF: instructions of code, two jumps, and a number."""
    column, architecture = ARCHITECTURES[machine]
    load, equal, at_least, any_bit, leave = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, deny, allow = 0x80000000, 0x00050001, 0x7FFF0000  # the process; with EPERM; the call
    # The number of the call stands at byte 0, the architecture at 4, the arguments, of 8 bytes each, from 16.
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (leave, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":
        steps += [(at_least, 0, 1, 0x40000000), (leave, 0, 0, kill)]  # a second set of numbers (x32)
    for name in DENIED_CALLS.split():
        if number := name.split(":")[1 + column]:
            steps += [(equal, 0, 1, int(number)), (leave, 0, 0, deny)]
    for _, numbers, argument, bits in DENIED_ARGUMENTS:
        if numbers[column] is not None:
            steps += [(equal, 0, 4, numbers[column]), (load, 0, 0, 16 + 8 * argument)]
            steps += [(any_bit, 0, 1, bits), (leave, 0, 0, deny), (leave, 0, 0, allow)]
    steps += [(leave, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def main(role, fd, seconds, memory_mb):
    """What `run_tests` starts, once as the player and once as the judge."""
    verdict = os.dup(1)
    try:
        if role == "judge":
            job = json.load(sys.stdin)
            null = os.open(os.devnull, os.O_RDWR)
            for standard in range(3):  # the tests may print
                os.dup2(null, standard)
        lock_down(int(seconds), int(memory_mb))
        problem = None
    except (OSError, MemoryError) as error:
        problem = repr(error)
    link = Link(int(fd), {"call": lambda function, /, *args, **kwargs: function(*args, **kwargs)})
    if role == "player":
        os.close(verdict)
        link.send("ready", problem)
        return player(link)
    try:
        problem = problem or link.receive()[1][0]  # sent before the program
    except Ended as error:
        problem = str(error)
    os.write(verdict, json.dumps(problem).encode() + b"\n")
    if not problem:
        os.write(verdict, json.dumps(judge(link, **job)).encode())
    os._exit(0)  # whatever the tests have registered to be done at the end


if __name__ == "__main__":
    main(*sys.argv[1:])
