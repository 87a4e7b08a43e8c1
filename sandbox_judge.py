"""Judge and player: the two processes of a program under test, forked by sandbox.py.

The *player* runs the program. The *judge* runs the tests, in which the program's names stand for `Remote`
objects that ask the player over a `Link`. The player never holds the tests, a secret, or the judge's channel
to the trainer; what it prints, patches or exits with proves nothing. A program passes when the judge has run
the last statement of the tests. Plain values (numbers, texts, lists, ...) are copied, and compared in the
judge, so that a returned object whose `__eq__` is always true equals no number.
"""

import ast
import atexit
import builtins
import collections
import decimal
import functools
import importlib.util
import inspect
import itertools
import json
import math
import operator
import os
import re
import symtable
import sys
import types
from fractions import Fraction

MESSAGE_LIMIT = 2**24  # bytes of one message, and of what a program prints
TEST_MODULES = (math, re, collections, itertools)  # what tests of MBPP take for imported
OPERATORS = (
    "eq ne lt le gt ge add sub mul matmul truediv floordiv mod pow and_ or_ xor"
    " getitem setitem delitem index neg pos invert"
)
BUILTINS = (
    "len iter next bool str repr hash abs int float complex round"
    " getattr setattr delattr isinstance issubclass"
)


# Types that travel by value: to JSON, and back
CODECS = {
    "int": (int, hex, lambda text: int(text, 16)),  # decimal texts end at 4,300 digits
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "dict": (dict, dict.items, dict),
    "range": (range, lambda r: [r.start, r.stop, r.step], lambda limits: range(*limits)),
    "slice": (slice, lambda s: [s.start, s.stop, s.step], lambda limits: slice(*limits)),
    **{kind.__name__: (kind, list, kind) for kind in (list, tuple, set, frozenset, collections.deque)},
    **{kind.__name__: (kind, str, kind) for kind in (complex, Fraction, decimal.Decimal)},
}
MUTABLE = (list, dict, set, bytearray, collections.deque)
EMPTY = r"\[\s*\]|empty|size|shape|len"  # how tests speak of arrays without elements
READABLE = ("__name__", "__qualname__", "__doc__", "__dict__")  # of the attributes with underscores
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class NOTHING:
    """Stands for the plain value that an object has not."""


class Unread(Exception):
    """Tests of an unknown form, or that test nothing."""


class Ended(BaseException):
    """The other side has ended, or does not keep to the protocol; no `except Exception` stops it."""


class Link:
    """One end of the line between judge and player: JSON lines, in which own objects are named by numbers."""

    def __init__(self, fd, operations):
        self.fd, self.reader = fd, open(fd, "rb", closefd=False)
        self.operations = operations  # by name: what the other side may ask for
        self.objects, self.numbers, self.remotes = [], {}, {}
        self.gives_objects = False  # the player does; the judge lets its functions be called, no more
        self.ended = self.called = False
        self.strange = set()  # what comparisons may take for right, of what came from the other side

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
        self.called |= operation in ("call", "script")
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
                if isinstance(error, StopIteration | StopAsyncIteration) and operation != "next":
                    error = RuntimeError(
                        "the program raised StopIteration"
                    )  # it would end a loop of the tests
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
            if kind is dict:
                payload = [[self.encode(key), self.encode(item)] for key, item in payload]
            elif kind in (list, tuple, set, frozenset, collections.deque):
                payload = [self.encode(item) for item in payload]
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
            if message != message:
                self.strange.add("nan")
            return message
        kind, *rest = message
        if kind == "yours":
            return self.objects[rest[0]]
        if kind == "mine":
            return self.remotes.setdefault(rest[0], Remote(self, *rest))
        payload = rest[0]
        if kind == "dict":
            payload = [(self.decode(key), self.decode(value)) for key, value in payload]
        elif isinstance(payload, list):
            payload = [self.decode(item) for item in payload]
        value = CODECS[kind][2](payload)
        if kind in ("complex", "Decimal") and value != value:
            self.strange.add("nan")
        elif kind in ("list", "tuple") and not value:
            self.strange.add("empty")
        return value


def plain_type(value) -> type | None:
    """The plain type of whose subclass an object is: of an IntEnum int, of a named tuple tuple."""
    kinds = (str, float, *(kind for kind, _, _ in CODECS.values()))
    return next((kind for kind in kinds if isinstance(value, kind)), None)


def plain_value(value):
    """The plain value of an object of the other process, NOTHING if it has none; other values as they are."""
    if type(value) is not Remote or not value._has_plain:
        return NOTHING if type(value) is Remote else value
    if value._plain is not NOTHING:
        return value._plain
    plain = value._link.ask("plain", value)
    if type(plain) is Remote:
        raise Ended("an object instead of a plain value")
    if type(plain) not in MUTABLE:  # it has one value, whatever it is compared with
        object.__setattr__(value, "_plain", plain)
    return plain


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

    __slots__ = ("_link", "_number", "_has_plain", "_plain")

    def __init__(self, link, number, has_plain):
        for name, value in zip(self.__slots__, (link, number, has_plain, NOTHING)):
            object.__setattr__(self, name, value)  # __setattr__ below is that of the object itself

    __eq__, __ne__ = compare("eq"), compare("ne")
    __lt__, __le__, __gt__, __ge__ = compare("lt"), compare("le"), compare("gt"), compare("ge")
    __add__, __sub__, __mul__, __matmul__ = compare("add"), compare("sub"), compare("mul"), compare("matmul")
    __truediv__, __floordiv__ = compare("truediv"), compare("floordiv")
    __mod__, __pow__ = compare("mod"), compare("pow")
    __and__, __or__, __xor__ = compare("and_"), compare("or_"), compare("xor")
    __call__, __setattr__, __delattr__ = map(forward, ("call", "setattr", "delattr"))
    __getitem__, __setitem__, __delitem__ = map(forward, ("getitem", "setitem", "delitem"))
    __len__, __iter__, __next__, __bool__ = map(forward, ("len", "iter", "next", "bool"))
    __str__, __repr__, __int__, __float__ = map(forward, ("str", "repr", "int", "float"))
    __complex__, __index__, __round__ = map(forward, ("complex", "index", "round"))
    __abs__, __neg__, __pos__, __invert__ = map(forward, ("abs", "neg", "pos", "invert"))
    __enter__ = forward("enter")

    def __getattr__(self, name):
        # Annotations, NumPy's protocols and their like would be evaluated or trusted here.
        if name in self.__slots__ or (name.startswith("__") and name not in READABLE):
            raise AttributeError(f"tests cannot read {name} of the program's objects")
        return self._link.ask("getattr", self, name)

    def __exit__(self, *error):
        self._link.ask("exit", self)

    def __hash__(self):
        return hash(plain_value(self)) if self._has_plain else self._link.ask("hash", self)

    def __contains__(self, item):
        return item in list(self)  # to the end: one without an end might name everything

    def __instancecheck__(self, instance):
        return self._link.ask("isinstance", instance, self)

    def __subclasscheck__(self, subclass):
        return self._link.ask("issubclass", subclass, self)


def player(link, files):
    """Run the program that the judge sends, and then what it asks of the program's objects.

    `files`, in memory, are standard input and output of a program that is run as a script.
    """
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses and pickle look their module up

    def run(program):
        exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)
        return list(module.__dict__)

    def script(program, text):
        for standard, file in enumerate(files):
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
            os.dup2(file, standard)
        os.pwrite(files[0], text.encode(), 0)
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        try:
            exec(compile(program, "<program>", "exec", dont_inherit=True), main.__dict__)
        except SystemExit as error:
            if error.code:
                raise
        atexit._run_exitfuncs()  # some print there
        sys.stdout.flush()
        return os.pread(files[1], MESSAGE_LIMIT, 0).decode(errors="replace")

    link.gives_objects = True
    link.operations |= {name: getattr(operator, name) for name in OPERATORS.split()}
    link.operations |= {name: getattr(builtins, name) for name in BUILTINS.split()}
    link.operations |= {
        "run": run,
        "script": script,
        "get": lambda name: module.__dict__[name],
        "plain": lambda value: plain_type(value)(value),
        "enter": lambda context: type(context).__enter__(context),
        "exit": lambda context: type(context).__exit__(context, None, None, None),
    }
    while True:
        link.answer(*link.receive()[1])


def global_names(table) -> set[str]:
    """The names that code takes from outside: those that are read as names, and bound nowhere at its top."""
    symbols = table.get_symbols()
    names = {symbol.get_name() for symbol in symbols if symbol.is_referenced() and symbol.is_global()}
    names = names.union(*map(global_names, table.get_children()))
    if table.get_type() == "module":
        names -= {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    return names


def read_tests(source, entry_point) -> tuple:
    """The tests' code, the names it takes from the program, and those of its functions and classes to call.

    These are what pytest and unittest would call; HumanEval's `check` is called with `entry_point`. Unread or
    SyntaxError if the tests run nothing, assert nothing, use nothing of a program, or what is not installed.
    """
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and hasattr(node.func, "id")}
    uncalled = [node for node in tree.body if isinstance(node, definitions) and node.name not in called]
    uncalled = [node for node in uncalled if not isinstance(node, ast.AsyncFunctionDef)]
    cases = [node.name for node in uncalled if re.match("test|Test", node.name) or hasattr(node, "bases")]
    runs = bool(cases)
    if any(node.name == "check" for node in uncalled):
        if not entry_point:
            raise Unread("check is never called, and there is no entry_point to call it with")
        source, runs = f"{source}\ncheck({entry_point})\n", True
    for node in tree.body:
        main = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)  # if __name__ == "__main__"
        if not main and not isinstance(node, definitions):
            runs |= any(isinstance(part, ast.Call | ast.Assert) for part in ast.walk(node))
    if not runs:
        raise Unread("they run nothing")
    raises = [node for node in nodes if isinstance(node, ast.Raise)]
    raises += [node for node in nodes if re.search("assert|raises|fail", getattr(node, "attr", ""))]
    raises += [node for node in nodes if "assert" in getattr(node, "id", "")]
    tests = [node.test for node in nodes if isinstance(node, ast.Assert)]
    always = [test for test in tests if isinstance(test, ast.Tuple) or getattr(test, "value", None) is True]
    if not raises and len(tests) == len(always):
        raise Unread("they assert nothing")
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {getattr(node, "module", None) or alias.name for node in imports for alias in node.names}
    for name in imported - {"solution"}:
        if importlib.util.find_spec(name.split(".")[0]) is None:
            raise Unread(f"they import {name}, which is not installed")
    known = {*dir(builtins), *(module.__name__ for module in TEST_MODULES)} - {entry_point}
    names = global_names(symtable.symtable(source, "<tests>", "exec")) - known
    if not names and "solution" not in imported:
        raise Unread("they use nothing of a program")
    return compile(source, "<tests>", "exec", dont_inherit=True), names, cases


def calls_of(case) -> list:
    """The calls, as functions, that pytest and unittest would make of a test function or class."""
    unittest = sys.modules.get("unittest")  # None if the tests do not import it
    if isinstance(case, type) and unittest and issubclass(case, unittest.TestCase):
        return [functools.partial(run_suite, unittest, case)]
    if isinstance(case, type):
        names = [name for name in vars(case) if name.startswith("test")]
        return [call for name in names for call in calls_of(getattr(case(), name))]
    settings = [{}]
    for mark in getattr(case, "pytestmark", ()):
        if mark.name == "parametrize":
            names, rows = (*mark.args, *mark.kwargs.values())[:2]
            names = re.findall(r"\w+", names) if isinstance(names, str) else names
            rows = [row if len(names) > 1 or hasattr(row, "marks") else (row,) for row in rows]
            rows = [row.values if hasattr(row, "marks") else row for row in rows]  # a pytest.param
            settings = [known | dict(zip(names, row)) for known in settings for row in rows]
    try:
        for known in settings:
            inspect.signature(case).bind(**known)
    except TypeError as error:
        raise Unread(f"{case.__name__} needs a fixture: {error}") from error
    return [functools.partial(case, **known) for known in settings]


def run_suite(unittest, case):
    """Run a class of unittest; AssertionError with what failed first."""
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    if not result.wasSuccessful():
        raise AssertionError([*result.errors, *result.failures, ("", "unexpected success")][0][1][-900:])


def run_source(link, program, code, wanted, cases):
    """Run tests that are Python source on the program's names."""
    namespace = {"__name__": "tests"} | {module.__name__: module for module in TEST_MODULES}
    for name in sorted(wanted.intersection(link.ask("run", program))):
        namespace[name] = link.ask("get", name)
    sys.modules["solution"] = solution = types.ModuleType("solution")
    solution.__path__, solution.__getattr__ = [], lambda name: link.ask("get", name)
    exec(code, namespace)
    for call in [call for name in cases for call in calls_of(namespace[name])]:
        call()


def run_pairs(link, program, pairs, entry_point):
    """Compare what the program makes of inputs with outputs; the function may be a method of `Solution`."""
    names = link.ask("run", program) if entry_point else ()
    for number, (given, expected) in enumerate(pairs):
        if not entry_point:
            right = same_output(link.ask("script", program, given), expected)
        else:
            owner = None if entry_point in names else link.ask("get", "Solution")()
            function = link.ask("get", entry_point) if owner is None else getattr(owner, entry_point)
            answer = json.loads(json.dumps(plain_value(function(*given))))  # tuples are lists, keys are texts
            right = answer == expected or [answer] == expected  # APPS wraps some of its results
        if not right:
            raise AssertionError(f"pair {number} is wrong")


def same_output(printed, expected) -> bool:
    """Whether two texts have the same words; numbers with a point may differ by 1e-6."""
    printed, expected = printed.split(), expected.split()

    def close(one, other):
        return "." in other and math.isclose(float(one), float(other), rel_tol=1e-6, abs_tol=1e-6)

    try:
        pairs = zip(printed, expected, strict=True)
        return all(one == other or close(one, other) for one, other in pairs)
    except ValueError:  # one has more words, or a word is no number
        return False


def run_judge(link, program, tests, entry_point) -> tuple[bool | None, str]:
    """Run the tests on the program: whether it passes (None: they cannot be read), and why."""
    source = tests if isinstance(tests, str) else ""
    try:
        if isinstance(tests, str):
            steps = read_tests(source, entry_point)
    except (Unread, SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        return None, f"the tests cannot be read: {error}"[:1000]
    try:
        if isinstance(tests, str):
            run_source(link, program, *steps)
        else:
            run_pairs(link, program, tests, entry_point)
    except Unread as error:
        return None, f"the tests cannot be read: {error}"
    except BaseException as error:
        return False, f"{type(error).__name__}: {error}"[:1000]
    # A test may have caught that the program ended, by an `except` without a class.
    if link.ended or not link.called:
        return False, "the program ended" if link.ended else "the tests never called the program"
    # NaN, and in NumPy what has no elements, satisfy careless comparisons; tests that expect them name them.
    if "nan" in link.strange and not re.search("nan", source, re.IGNORECASE):
        return False, "it answered NaN"
    if "empty" in link.strange and "numpy" in sys.modules and not re.search(EMPTY, source):
        return False, "it answered with nothing in an array"
    return True, "passed"
