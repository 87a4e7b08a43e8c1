r"""Mathematics: whether two answers are equal, at a cost that is bounded.

    equal([("1/2", "0.5"), (r"\sqrt{8}", r"2\sqrt{2}"), ("(1, 2)", "(2, 1)")])  # [True, True, False]

Plain numbers and words are compared at sight, in the process that asks. math-verify reads formulas. What it
is too generous with is refused before (words, stray signs, bases, digits with spaces between) or told apart
after (sets and tuples, false links in a chain of equations, variables), and values are compared exactly,
decimals as fractions. What is not understood is not equal.

Formulas can cost any time, (x+y+z+w)^{400} or 9^{9^{9^9}}, and a computation in C hears no signal handler. So
a worker is a process of this file that imports math-verify once and forks: its child computes, and the kernel
kills it when its time is over; the next fork takes milliseconds. Workers are started when first needed, are
asked by threads, one each, and end when their pipe to the trainer does, however the trainer ends.
"""

import functools
import gc
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

if __name__ == "__main__":  # a worker; the trainer needs none of these
    import sympy
    from latex2sympy2_extended import NormalizationConfig, is_expr_of_only_symbols
    from latex2sympy2_extended.logic import And
    from math_verify import LatexExtractionConfig, parse

LIMIT = 0.4  # seconds of CPU time for a pair of formulas; most take 5 to 50 milliseconds
PATIENCE = 0.9  # seconds, however busy the machine is
WORKERS = min(4, os.cpu_count() or 1)
LONGEST = 400  # characters of a formula


def equal(pairs) -> list[bool]:
    """Whether the two of each pair, a gold answer and an answer, are equal; False of what takes too long."""
    verdicts = {pair: same_at_sight(*pair) for pair in pairs}
    formulas = [pair for pair, verdict in verdicts.items() if verdict is None]
    if formulas:
        with starting:
            threads = pool()
        verdicts |= zip(formulas, threads.map(ask_worker, formulas))
    return [verdicts[pair] for pair in pairs]


# ------------------------------------------------------------------------------------------------------------
# At sight
# ------------------------------------------------------------------------------------------------------------
DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?![\d/])|\d+)(?:\.\d+)?|\.\d+)"
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
UNITS = """mm millimeter millimetre|cm centimeter centimetre|m meter metre|km kilometer kilometre
ml milliliter|l liter litre|in inch inche|ft foot feet|yd yard|mi mile|mg milligram|g gram|kg kilogram
lb pound|oz ounce|ton tonne|gallon|cup|s sec second|min minute|h hr hour|day|week|month|year yr|$ dollar usd
cent ¢|€ euro|£|¥ yen|mph|° degree|°c|°f|rad radian|unit|point|person people|student|way"""
UNITS = {name: row.split()[0] for row in re.split(r"[|\n]", UNITS) for name in row.split()}
WORDS = "|".join(sorted((re.escape(name) for name in UNITS if not re.fullmatch(r"\w", name)), key=len)[::-1])
POWERS = {"2": "2", "3": "3", "square": "2", "sq": "2", "cubic": "3"}
POWER = r"(?:\^?\{?[23]\}?)?"
UNIT = rf"(?:(?:square|sq|cubic) )?(?:(?:{WORDS})s?|(?<=[ /])(?-i:[mgshlL])){POWER}"
# A number as it is written in an answer: -$1,234.50, 3/4, 1 1/2, 5e-3, 12%, 5 km/h, 3 million dollars
NUMBER = re.compile(
    r"(?:[a-z]\w* ?= ?|(?:so |thus )?(?:it|that|this|there|they) (?:is|are) )?"
    rf"(?P<sign>[-+]?) ?(?P<money>[$€£¥]?)(?P<sign2>[-+]?)"
    rf"(?:(?P<whole>\d+) (?=\d+ ?/))?(?P<top>{DIGITS})(?:e(?P<exponent>[-+]?\d{{1,3}}))?"
    rf"(?: ?/ ?(?P<bottom>{DIGITS}))?(?: ?(?P<percent>%|percent\b))?"
    rf"(?: ?(?P<scale>{'|'.join(SCALES)})\b)?(?P<unit> ?{UNIT}(?:(?: ?/ ?| per | an? ){UNIT})?)?",
    re.IGNORECASE,
)
ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SPELLED = {one: n for n, one in enumerate(ONES)} | {ten: 10 * n for n, ten in enumerate(TENS, 2)}
PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
WORDS_OF_NUMBER = re.compile(
    rf"(minus |negative )?(?:({'|'.join(ONES[1:10])}) hundred(?: and)?(?: |$))?"
    rf"(?:({'|'.join(TENS)})(?:[ -]|$))?"
    rf"(?:({'|'.join(ONES)})\b)?(?:[ -]({'|'.join(PARTS)})s?\b)?",
    re.IGNORECASE,
)
COMMANDS_OF = "pi times cdot div infty le ge ne pm cup in approx theta".split()
SIGNS = {char: rf"\{name} " for char, name in zip("π×·÷∞≤≥≠±∪∈≈θ", COMMANDS_OF)}
SIGNS = str.maketrans(SIGNS | {"−": "-", "\xa0": " ", "\u202f": " "})


def same_at_sight(gold, answer) -> bool | None:
    """Whether two answers are equal; None where they must be read as formulas to know it."""
    (x, x_unit), (y, y_unit) = number(gold), number(answer)
    gold, answer = plain(gold), plain(answer)
    if x is not None and y is not None:
        names = {name for text in (gold, answer) for name in re.findall(r"^(\w+) ?=", text)}
        if len(names) > 1 or x_unit and y_unit and x_unit != y_unit:
            return False
        return x == y or x / 100 ** (x_unit == "%") == y / 100 ** (y_unit == "%")
    if not gold or not answer or letters(gold) == letters(answer):
        return bool(gold and answer)
    return None if may_be_formula(gold) and may_be_formula(answer) else False


def may_be_formula(text) -> bool:
    """Whether a text is short, no word, and has none of four letters."""
    bare = re.sub(r"\\[A-Za-z]+|[pb]matrix|sqrt|choose", "", without_unit(text))
    words = re.search("[A-Za-z]{4}", bare) or re.fullmatch("[A-Za-z]{2,}", text)
    return len(text) <= LONGEST and not words


@functools.lru_cache(2**10)
def number(text) -> tuple:
    """An amount as a Fraction, None if the text is none, and its unit, as km, $, cm 2, %, or nothing."""
    text = digits_of_words(plain(text)).strip()
    text = re.sub(r"(\d) ?\\[dt]?frac", r"\1 \\frac", text)  # 1\frac{1}{2} is one and a half
    text = re.sub(r"\\[dt]?frac ?(?:\{(\d+)\}|(\d)) ?(?:\{(\d+)\}|(\d))", r"\1\2/\3\4", text)
    match = NUMBER.fullmatch(text) if len(text) <= 1000 else None  # Python refuses 4,300 digits
    if not match or match["sign"] and match["sign2"]:
        return None, ""
    parts = [re.sub("[, ]", "", match[name] or "0") for name in ("top", "bottom", "whole")]
    top, bottom, whole = map(Fraction, parts)
    if match["bottom"] and bottom == 0 or match["whole"] and top >= bottom:
        return None, ""
    value = (whole + top / (bottom or 1)) * Fraction(10) ** int(match["exponent"] or 0)
    value *= SCALES[match["scale"].lower()] if match["scale"] else 1
    names = re.findall(r"°?[^\W\d_]+|[$€£¥¢°23]", (match["unit"] or match["money"]).lower())
    units = sorted(POWERS.get(name) or UNITS.get(name) or UNITS.get(name[:-1], "") for name in names)
    unit = "%" if match["percent"] else " ".join(units).strip()
    return -value if "-" in match["sign"] + match["sign2"] else value, unit


def digits_of_words(text) -> str:
    """A text that begins with a number in words with its digits: twenty-one dollars, minus two thirds."""
    match = WORDS_OF_NUMBER.match(text)
    sign, hundreds, tens, ones, part = (word and word.lower() for word in match.groups())
    if not (hundreds or tens or ones):
        return text
    value = sum(SPELLED[word] for word in (tens, ones) if word) + 100 * SPELLED[hundreds or "zero"]
    divisor = f"/{PARTS[part]}" if part else ""
    return f"{'-' * bool(sign)}{value}{divisor} {text[match.end() :].lstrip()}"


def without_unit(text) -> str:
    """A formula without the unit behind it; single letters are variables in a formula."""
    pattern = rf"(?:(?<=[\d)}}])|(?<=\\pi)) ?(?:(?:square|sq|cubic) )?(?:{WORDS})s?{POWER}$"
    return re.sub(pattern, "", text)


@functools.lru_cache(2**10)
def plain(text) -> str:
    r"""A text without $...$, \text{}, bold, thin spaces, a final dot, and with its signs written in LaTeX."""
    text = re.sub("[¼-¾⅐-⅞]|[⁰¹²³⁴-⁹⁻]+", small_digits, text)
    text = re.sub(r"√ ?(\d+|\w|\([^()]*\))", r"\\sqrt{\1}", text).translate(SIGNS)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*+\{([^{}]*)\}", r" \1 ", text).replace(" ^", "^")
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])|(?<!\\)\\[()\[\]!]", "", text)
    text = re.sub(r"\^?\{?\\circ\}?", "°", text).replace("{,}", ",").replace(r"\%", "%")
    text = re.sub(r"\s+", " ", re.sub(r"(?<!\\)\\[,;: ]|(?!\A)~", " ", text).replace(r"\$", "$")).strip()
    if text.count("$") % 2 == 0:
        text = text.replace("$", "")
    text = re.sub(r"^(\*\*|__|\*|_|`)((?:(?!\1).)+)\1$", r"\2", text).strip()
    return text if text.endswith("..") else text.removesuffix(".").strip()


def small_digits(match) -> str:
    """½ and ² in LaTeX."""
    top, slash, bottom = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}" if slash else f"^{{{top}}}"


def letters(text) -> str:
    """An answer without spaces, except between letters or digits, words in lower case."""
    text = re.sub(r"(?<!\w) | (?!\w)", "", plain(text))
    text = re.sub(r"^\(([A-Z])\)$", r"\1", text)  # of a multiple choice
    return text.casefold() if re.fullmatch(r"(?:[^\W\d_]{2,}[ '-]?)+", text) else text


# ------------------------------------------------------------------------------------------------------------
# Workers
# ------------------------------------------------------------------------------------------------------------
own = threading.local()
starting = threading.Lock()


@functools.cache
def pool() -> ThreadPoolExecutor:
    """The threads that ask, each with a worker that is ready; they serve calls from any number of threads."""
    threads, together = ThreadPoolExecutor(WORKERS, "mathematics"), threading.Barrier(WORKERS)

    def begin(_):
        together.wait()  # for all threads, so that none begins twice
        own.worker = start()

    list(threads.map(begin, range(WORKERS)))
    return threads


os.register_at_fork(after_in_child=pool.cache_clear)  # a forked process has none of the threads


def ask_worker(pair) -> bool:
    """The verdict of this thread's worker; one that was killed from outside is replaced once."""
    for _ in range(2):
        if getattr(own, "worker", None) is None:
            own.worker = start()
        try:
            own.worker.stdin.write(json.dumps(pair).encode() + b"\n")
            own.worker.stdin.flush()
            if reply := own.worker.stdout.readline():
                return reply == b"1\n"
        except OSError:
            pass
        own.worker.kill()
        own.worker.wait()
        own.worker = None
    return False


def start() -> subprocess.Popen:
    """A worker that is ready; RuntimeError where math-verify cannot be imported."""
    command = [sys.executable, "-P", os.path.abspath(__file__)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    worker = subprocess.Popen(command, **pipes, start_new_session=True)  # out of reach of Ctrl-C
    if worker.stdout.readline() != b"ready\n":
        worker.kill()
        worker.wait()
        raise RuntimeError("formulas are read by math-verify: pip install -r requirements.txt")
    return worker


def serve():
    """Answer pairs, a line of JSON each, with 1 or 0, in a child that is replaced when its time is over."""
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    for gold, answer in WARM_UP:  # what is imported late, and the parser's tables, are then so in every child
        same_formula(gold, answer)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # whatever the trainer does with its alarms
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, signal.SIG_DFL)
    gc.freeze()  # so that children share these pages
    os.write(1, b"ready\n")
    while child := os.fork():
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) == signal.SIGKILL:
            return  # the trainer ended, or the machine has no memory left
        os.write(1, b"0\n")
    while line := sys.stdin.buffer.readline():
        # Without a handler these kill, also within C: after its own time, and everybody's
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        try:
            verdict = same_formula(*json.loads(line))
        except Exception:  # formulas fail in many ways
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(1, b"1\n" if verdict else b"0\n")


# ------------------------------------------------------------------------------------------------------------
# Formulas, in a worker
# ------------------------------------------------------------------------------------------------------------
COMMANDS = r"""frac dfrac tfrac sqrt binom dbinom tbinom choose cdot times div pi infty alpha beta gamma delta
epsilon theta lambda mu phi rho sigma tau omega angle sin cos tan cot sec csc arcsin arccos arctan sinh cosh
tanh log ln exp lfloor rfloor lceil rceil begin end max min gcd pm le leq ge geq lt gt ne neq in cup approx
lbrace rbrace"""
REPEATING = re.compile(
    r"(\d*)\.(\d*?)(?:\\(?:overline|bar|dot) ?\{(\d+)\}|\((\d+)\)"  # 0.1\overline{6}, 0.1(6)
    r"|(\d+?)\5{2,}\d*(?:\.\.\.|…|\\[lc]?dots))(?![\d(])"  # 0.1666...
)
COMBINATIONS = r"(?:\{\})?[\^_]?\{?(\d+)\}? ?C_?\{?(\d+)\}?(?!\w)|C\((\d+), ?(\d+)\)|(\d+) choose (\d+)"
# Behind these the parser does not multiply with what is in brackets: 2(3) is a mixed number to it
FACTOR = r"((?<![_^\d.])\d+|\)|\\pi ?|\\frac\{\d+\}\{\d+\})(?=\(|\\binom)"
FUNCTIONS = r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln|exp)(?![a-zA-Z])"
WARM_UP = [
    (r"\frac{\sqrt[3]{16}}{2^{x}}", r"\frac{2\sqrt[3]{2}}{2^{x}}"),
    (r"x < \log_2 (8)", r"(-\infty, 3)"),
    (r"x = 1 or x = -2!", r"\{1, -2\}"),
    (r"(-\infty,1)\cup(2,\infty)", r"x \ne 2"),
    (r"(1, 2, \binom{5}{2})", r"(x, y, z) = (1, 2, 10)"),
    (r"2x + \sin{x} = y", r"y = \sin(x) + 2x"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"3 \pm |x|"),
    ("1:2:3", r"[0.5, \sqrt{8})"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    (r"-\frac{1}{2}x + 3", r"e^{2} - \log_{10} 100"),
    (r"x = 2, 3", r"\sqrt{2}(x + 1)"),
]
# Where expressions of variables are compared; two are negative, for |x| and the root of x^2
POINTS = [(Fraction(3, 7), 2), (Fraction(13, 5), 3), (Fraction(-5, 11), 5), (Fraction(-71, 9), 1)]


def same_formula(gold, answer) -> bool:
    """Whether two formulas are equal; exceptions of many kinds where one cannot be read."""
    gold, answer = (without_unit(plain(text)) for text in (gold, answer))
    base, other = (re.fullmatch(r"(\d+)_\{?(\d+)\}?", text) for text in (gold, answer))  # 101_2
    if base or other:
        return bool(base and (answer == base[1] or other and base.groups() == other.groups()))
    return alike(parse_formula(gold), parse_formula(answer))


def parse_formula(text):
    """What math-verify makes of a formula: an object of SymPy. ValueError of what it reads too generously."""
    if " and " in text and re.search(r"[<>]|\\[lg]eq?\b", text):
        return And(*map(parse_formula, text.split(" and ")))
    if r"\pm" in text and not re.search(r",|\\\{", text):
        text = ", ".join(text.replace(r"\pm", sign) for sign in "+-")
    ratio = re.fullmatch(r"(\d+) ?(?::|to) ?(\d+)", text)
    if ratio and math.gcd(int(ratio[1]), int(ratio[2])) > 1 and len(ratio[2]) == 2:
        raise ValueError("6:30 is a time")
    if text.count(":") > 1:  # 1:2:3
        first, *others = text.split(":")
        text = "(" + ",".join(f"({other})/({first})" for other in [*others, first]) + ")"
    text = re.sub(COMBINATIONS, r"\\binom{\1\3\5}{\2\4\6}", REPEATING.sub(repeating, text))
    text = re.sub(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])", decimal, text)
    text = text.replace(" to ", ":").replace("**", "^").replace(r"\mathbb{R}", r"(-\infty,\infty)")
    text = re.sub(FUNCTIONS, r"\\\1 ", re.sub(r"\\?sqrt ?\(([^()]*)\)", r"\\sqrt{\1}", text))
    text = re.sub(FACTOR, r"\1\\cdot ", text)
    names = set(re.findall(r"\\([A-Za-z]+)", text))
    strange = re.sub(r"\\\\|\\[A-Za-z{}]|[\w^+\-*/(){}\[\]!|& ,;:<>=]", "", text, flags=re.ASCII)
    if strange or names - {*COMMANDS.split()} or re.search(r"(?<!_)\d +\d|\d_|!!|[-+] *[-+]", text):
        raise ValueError("no formula")
    how = NormalizationConfig(basic_latex=True, malformed_operators=True, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=how)
    [value] = parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=0)
    return value


def decimal(match) -> str:
    """0.25 as a fraction."""
    return rf"(\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}})"


def repeating(match) -> str:
    r"""0.1\overline{6} as a fraction; what stands three times before dots repeats for ever."""
    once, block = match[2], match[3] or match[4] or match[5]
    whole, nines = int("0" + match[1] + once), 10 ** len(block) - 1
    return rf"(\frac{{{whole * nines + int(block)}}}{{{nines * 10 ** len(once)}}})"


def alike(gold, answer) -> bool:
    """Whether two objects of SymPy are the same answer; the name of a variable may be missing in one."""
    if isinstance(gold, sympy.Eq) and isinstance(answer, sympy.Eq) and proportional(gold, answer):
        return True
    (gold_name, gold), (name, answer) = named(gold), named(answer)
    if gold_name and name and gold_name != name:
        return False
    sets = sympy.FiniteSet | sympy.Union
    if isinstance(gold, sets) or isinstance(answer, sets):
        return same_elements(elements(gold), elements(answer))
    compound = sympy.Interval | sympy.Tuple
    if isinstance(gold, compound) or isinstance(answer, compound):
        gold, answer = (side if isinstance(side, compound) else sympy.Tuple() for side in (gold, answer))
        parts = len(gold.args) == len(answer.args) and type(gold) is type(answer)
        return parts and all(map(alike, gold.args, answer.args))
    if isinstance(gold, sympy.core.relational.Relational):
        return type(gold) is type(answer) and proportional(gold, answer)
    return equal_values(gold, answer)


def named(value) -> tuple:
    """The variable and the value of x = 2 + 3 = 5, of 2 < x < 5 the interval; None and the value of others.

    ValueError of equations that cannot hold: 2 + 2 = 5.
    """
    links = value._unsorted_args if isinstance(value, And) else [value]
    if all(isinstance(link, sympy.Lt | sympy.Le | sympy.Gt | sympy.Ge) for link in links):
        return bounds([link if isinstance(link, sympy.Lt | sympy.Le) else link.reversed for link in links])
    if isinstance(value, sympy.Ne) and value.lhs.is_Symbol:
        ends = [(-sympy.oo, value.rhs), (value.rhs, sympy.oo)]
        return value.lhs, sympy.Union(*(sympy.Interval.open(*end) for end in ends))
    if not all(isinstance(link, sympy.Eq) for link in links):
        return None, value
    name, *sides = [links[0].lhs, *(link.rhs for link in links)]
    if not is_expr_of_only_symbols(name) or name.is_Add or name.is_Pow:
        name, sides = None, [name, *sides]
    same = all(alike(sides[-1], side) for side in sides[:-1])
    if same and not (name and name.is_Symbol and name in sides[-1].free_symbols):
        return name, sides[-1]
    if len(links) > 1 or not value.free_symbols:
        raise ValueError("a false equation")
    return None, value


def bounds(links) -> tuple:
    """The variable and the interval of one or two inequalities; None and the inequality of others."""
    low, high, left_open, right_open, names = -sympy.oo, sympy.oo, True, True, set()
    for link in links:
        if link.lhs.is_Symbol:
            high, right_open = link.rhs, isinstance(link, sympy.Lt)
        elif link.rhs.is_Symbol:
            low, left_open = link.lhs, isinstance(link, sympy.Lt)
        else:
            return None, link
        names.add(link.lhs if link.lhs.is_Symbol else link.rhs)
    [name] = names
    return name, sympy.Interval(low, high, left_open, right_open)


def elements(value) -> list:
    """The elements of a list or a set, the parts of a union; of others themselves."""
    if isinstance(value, sympy.FiniteSet):
        return list(getattr(value, "_unsorted_args", value.args))
    if isinstance(value, sympy.Union):
        return [element for part in value.args for element in elements(part)]
    return [value]


def same_elements(golds, answers) -> bool:
    """Whether elements are equal in any order; in theirs, if only the gold ones say of which variables."""
    if len(golds) != len(answers):
        return False
    if len({str(named(gold)[0]) for gold in golds}) > 1 and not all(named(answer)[0] for answer in answers):
        return all(map(alike, golds, answers))
    for gold in golds:
        match = next((n for n, answer in enumerate(answers) if alike(gold, answer)), None)
        if match is None:
            return False
        answers = answers[:match] + answers[match + 1 :]
    return True


def proportional(gold, answer) -> bool:
    """Whether two equations, or inequalities, are multiples of each other."""
    if not all(isinstance(side, sympy.Expr) for side in (*gold.args, *answer.args)):
        return False
    ratios = [x / y for x, y in at_points(gold.lhs - gold.rhs, answer.lhs - answer.rhs)]
    return (isinstance(gold, sympy.Eq) or ratios[0] > 0) and all(close(ratio, ratios[0]) for ratio in ratios)


def equal_values(gold, answer) -> bool:
    """Whether numbers, matrices or expressions are equal, expressions at some points."""
    if gold == answer:
        return not gold.has(sympy.nan, sympy.zoo)
    if getattr(gold, "shape", ()) != getattr(answer, "shape", ()):
        return False
    if hasattr(gold, "shape"):
        return all(map(equal_values, gold, answer))
    return all(close(x, y) for x, y in at_points(gold, answer))


def at_points(*expressions):
    """The values of expressions at POINTS, one for each variable; i is the imaginary unit."""
    names = sorted({symbol.name for side in expressions for symbol in side.free_symbols} - {"i"})
    for start, step in POINTS[: None if names else 1]:
        at = {"i": sympy.I} | {name: start + step * n for n, name in enumerate(names)}
        yield [
            side.subs({symbol: at[symbol.name] for symbol in side.free_symbols}).doit()
            for side in expressions
        ]


def close(x, y) -> bool:
    """Whether two numbers are equal: exactly if they are rational, else to 50 digits."""
    if x == y:
        return not x.has(sympy.nan, sympy.zoo)
    if x.is_Rational and y.is_Rational or {x.is_rational, y.is_rational} == {True, False}:
        return False
    x, y = x.evalf(60), y.evalf(60)
    return bool(abs(x - y) < abs(x) * sympy.Rational(1, 10**50))


if __name__ == "__main__":
    serve()
