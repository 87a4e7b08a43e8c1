"""sandbox.py and the reward code_tests: honest programs, forged verdicts, and programs that fight.

Hostile programs are held against what is left of them in /proc.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

import rewards
import sandbox

HAS_SANDBOX = sys.platform == "linux" and sandbox.platform.machine() in sandbox.ARCHITECTURES
pytestmark = pytest.mark.skipif(not HAS_SANDBOX, reason="the sandbox needs Linux on x86-64 or ARM64")
LEFT = "cleanpost-test-of-the-sandbox"  # what hostile programs call their files
RIGHT, TEST, PASSED = "def f(x): return 2 * x", "assert f(2) == 4", (True, "passed")


def code(*completions, tests=TEST, allow_code_execution=True, **settings):
    tests = [tests] * len(completions) if isinstance(tests, str) else tests
    settings |= {"tests": tests, "allow_code_execution": allow_code_execution}
    return rewards.code_tests(completions, completions, **settings)


def passes(program, tests=TEST, **settings):
    return sandbox.run_tests(program, tests, **settings)[0]


# Honest programs --------------------------------------------------------------------------------------------

HUMANEVAL = """
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
It prints ```True```."""


def test_programs_pass_or_fail_by_their_tests_and_run_only_where_allowed():
    wrong = SOLUTION.replace("<", ">=")
    assert code(SOLUTION, wrong, "I do not know.", tests=HUMANEVAL) == [1.0, 0.0, 0.0]
    messages = [{"role": "assistant", "content": "<think>```python\n1/0\n```</think>" + SOLUTION}]
    assert code(messages, "<think>" + SOLUTION, tests=HUMANEVAL) == [1.0, 0.0]
    rows = [None, "", "# nothing", "def f(:", 5, {}, TEST, ["import math", TEST]]
    assert code(*[RIGHT] * 8, tests=rows) == [None] * 6 + [1.0, 1.0]
    named_sum = "def sum(a, b): return a + b"  # as a builtin is: only an entry point takes it
    assert code(named_sum, tests="assert sum(1, 2) == 3") == [0.0]
    assert code(named_sum, tests="assert sum(1, 2) == 3", entry_point=["sum"]) == [1.0]
    for allowed in (False, None, [True], 1):
        with pytest.raises(RuntimeError, match="--allow-code-execution"):
            code("x", tests="x", allow_code_execution=allowed)


REASONS = {
    "def f(x:": "never closed",
    "1 / 0": "division by zero",
    "def f(x): return 1 / 0": "division by zero",
    "def g(x): return 4": "name 'f' is not defined",
    "def f(x): return 5": "AssertionError",
    "def f(x): return f(x)": "recursion",
    "def f(x): return input()": "EOF",
    "class E(BaseException): pass\ndef f(x): raise E": "ended",
}


def test_reasons_of_failure_are_told():
    for program, reason in REASONS.items():
        passed, told = sandbox.run_tests(program, TEST)
        assert passed is False and reason in told, program


def test_tests_are_statements_run_to_their_end():
    assert passes(RIGHT, f"import sys\n{TEST}\nsys.exit(0)\nassert f(2) == 5") is False
    assert passes(RIGHT, "import os\nos._exit(0)") is False
    # what the attacks below begin with is harmless
    assert passes(ATTEMPT + WRITE + RIGHT, f"print('passed')\n{TEST}") is True
    # a program that has ended is not the exception that a test waits for
    catches, ends = "try:\n    f(2)\n    assert False\nexcept Exception:\n    pass", "def f(x): os._exit(1)"
    assert passes("def f(x): raise ValueError", catches) is True
    assert passes(f"import os\n{ends}", catches) is False
    assert passes(f"import os\n{ends}", catches.replace("except Exception", "except")) is False


def test_plain_values_travel_exactly():
    program = "def f(x): return x\ndef twice(g, x): return g(g(x))\nkind = lambda x: type(x).__name__"
    tests = """
from collections import deque
from decimal import Decimal
from fractions import Fraction
values = [None, True, 0, -1, 2**53, -10**5000, 0.1, float("inf"), 1e-320, 1 + 2j]
values += ["", "\\ud800 \\n \\x00", b"\\xff", bytearray(b"a"), Fraction(1, 3), Decimal("0.10"), deque([1, 2])]
values += [[], (), (1,), [(1, [2])], {1, 2}, frozenset([3]), {}, {(1, 2): [3], None: {4: 5}}, range(2, 9, 3)]
for value in values:
    assert f(value) == value and type(f(value)) is type(value), value
    assert kind(value) == type(value).__name__
assert f(float("nan")) != f(float("nan")) and str(f(-0.0)) == "-0.0"
assert twice(lambda x: x + [len(x)], []) == [0, 1]
"""
    assert sandbox.run_tests(program, tests) == PASSED


OBJECTS = """
import collections, enum
from dataclasses import dataclass
class Stack:
    def __init__(self, items=()): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def __len__(self): return len(self.items)
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
def check_size(n): raise TooLarge("too large", n)
def sort(items): items.sort()
words = lambda text: collections.Counter(text.split())
"""


def test_objects_of_the_program_can_be_used():
    tests = """
s = Stack([1]).push(2)
assert list(s[:1]) == [1] and len(s) == 2 and list(s) == [1, 2] == s.items and 2 in s and 3 not in s
assert s and isinstance(s, Stack) and not isinstance(s, Vector) and not hasattr(s, "nothing")
s.items = [5]
with s as inside: assert inside[0] == 5
assert len(s) == 0
assert Vector(1) + Vector(2, 3) == Vector(3, 3) != Vector(3, 4) and len({Vector(1), Vector(1)}) == 1
assert Point(1, 2) == (1, 2) and Point(1, 2).x == 1 and Color.RED == 1 and Color.GREEN > Color.RED
tally = words("a b a")
assert tally == {"a": 2, "b": 1} and tally["z"] == 0
assert list(count(3)) == [0, 1, 2] and next(count(1)) == 0
try: assert check_size(4) and False
except ValueError as error: assert error.args[0] == "too large"
numbers = [3, 1, 2]
sort(numbers)
assert numbers == [1, 2, 3] and math.isclose(0.1 + 0.2, 0.3)
"""
    assert sandbox.run_tests(OBJECTS, tests) == PASSED


def test_what_honest_programs_use_works():
    program = """
from __future__ import annotations
import asyncio, collections, functools, heapq, itertools, os, random, re, string, time
from dataclasses import dataclass
@dataclass
class Node:
    value: int
    next: Node | None = None
async def double(x):
    await asyncio.sleep(0.001)
    return 2 * x
@functools.cache
def f(x):
    for _ in range(1000): print("x" * 100000)
    return asyncio.run(double(Node(x).value))
if __name__ == "__main__": f(int(input()))
"""
    assert sandbox.run_tests(program, TEST) == PASSED
    pytest.importorskip("numpy")  # its arrays arrive as lists
    program = "import numpy as np\nf = lambda x: np.float64(x) * 2\ng = lambda n: np.arange(n).reshape(2, -1)"
    assert sandbox.run_tests(program, TEST + " and g(4) == [[0, 1], [2, 3]]") == PASSED


# Forged verdicts --------------------------------------------------------------------------------------------

WRITE = """
import os
def write(*texts):
    for fd in range(64):
        for text in texts:
            try: os.write(fd, text)
            except OSError: pass
"""
FORGED = {
    "ends early": "import os; os._exit(0)",
    "exits": "import sys; sys.exit(0)",
    "raises SystemExit": "raise SystemExit",
    "ends early when called": "import os\ndef f(x): os._exit(0)",
    "exits when called": "def f(x): raise SystemExit(0)",
    "is killed": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGKILL)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\natexit.register(print, 'passed')",
    "own check": "def check(candidate): pass\ndef f(x): return 5",
    "prints a verdict": WRITE + "write(b'passed', b'[true, 1]', b'[true, \"passed\"]\\n', b'1.0\\n')",
    "answers ahead": WRITE + "def f(x): write(b'[\"value\", true, []]\\n' * 100); os._exit(0)",
    "sends nonsense": WRITE + 'def f(x): write(b\'["mine"]\\n["value", ["set", [[]]], 0]\\n{}\\n[[[[[[\')',
    "sends without end": WRITE + "def f(x):\n    while True: write(b'9' * 100000)",
    "patched builtins": """
import builtins as b
b.AssertionError, abs, b.all, b.any, b.isinstance = ValueError, lambda x: 0, *[lambda *args: True] * 3
def f(x): return 5
""",
    "patched checker": """
import sys, json
main = sys.modules["__main__"]
main.judge, main.Link.encode = lambda *args: (True, "passed"), lambda self, value: True
json.dumps = lambda *args, **kwargs: '["value", true, []]'
def f(x): return 5
""",
    "traces": """
import sys
sys.settrace(trace := lambda frame, event, arg: (frame.f_locals.clear(), trace)[1])
def f(x): return 5
""",
    "is equal to everything": """
class Anything:
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = lambda *args: True
    __sub__ = __rsub__ = __abs__ = __round__ = __float__ = __int__ = lambda *args: 0
    __ne__, __hash__ = lambda *args: False, lambda self: 4
f = lambda x: Anything()
""",
    "is a number equal to everything": """
class Anything(int):
    __eq__ = __lt__ = __le__ = lambda *args: True
    __ne__, __hash__ = lambda *args: False, int.__hash__
    __sub__ = __rsub__ = __abs__ = lambda *args: Anything(0)
f = lambda x: Anything(7)
""",
    "a class": "class f(float): __eq__, __sub__ = lambda self, other: True, lambda self, other: 0.0",
}
FLOAT_TESTS = """
def check(candidate):
    assert abs(candidate(2) - 4) < 1e-6
    assert candidate(2) == 4
    assert candidate(3) in [6], "message"
    assert not candidate(3) != 6
try: check(f)
except ZeroDivisionError: pass
"""
COMPARISONS = ["f(2) == 4", "4 == f(2)", "not f(2) != 4", "abs(f(2) - 4) < 1", "f(2) in [4]", "[f(2)] == [4]"]
COMPARISONS += ["f(2) < 5"]


@pytest.mark.parametrize("program", FORGED.values(), ids=FORGED)
def test_a_verdict_cannot_be_forged(program):
    assert passes(program, FLOAT_TESTS, timeout=6.0) is False


def test_each_comparison_alone_sees_through_an_object_that_agrees_with_all():
    assert passes(RIGHT, FLOAT_TESTS) is True  # the tests above are fair
    for comparison in COMPARISONS:
        assert passes(RIGHT, f"assert {comparison}") is True, comparison
        for kind in ("is equal to everything", "is a number equal to everything"):
            assert passes(FORGED[kind], f"assert {comparison}") is False, (kind, comparison)


# What a program sees ----------------------------------------------------------------------------------------

SPY = """
import gc, os, sys
def look():
    seen = []
    def attempt(action, *args):
        try: seen.append(action(*args))
        except OSError: pass
    read = lambda path: open(path, "rb").read(10**6).decode("latin-1")
    for fd in range(64): attempt(os.readlink, f"/proc/self/fd/{fd}")
    for name in ("environ", "cmdline", "maps", "mem"): attempt(read, f"/proc/self/{name}")
    for path in ("/etc/passwd", HERE): attempt(read, path)
    for pid in {os.getppid(), *range(max(2, os.getpid() - 20), os.getpid() + 20)}:
        for name in ("environ", "mem", "fd/0", "cmdline", "maps"): attempt(read, f"/proc/{pid}/{name}")
    for folder in ("/", "/proc", "/tmp", ".", os.path.dirname(HERE)): attempt(os.listdir, folder)
    frame = sys._getframe()
    while frame:
        seen += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    seen += [o for o in gc.get_objects() if type(o) in (dict, list, tuple, str) and o is not seen]
    seen += [os.environ, sys.argv, vars(sys.modules["__main__"])]
    return chr(10).join(map(repr, seen))
def f(x): return look()
"""


def test_the_program_finds_neither_tests_nor_verdict_nor_files():
    tests = """
import re
SECRET = "aWxsaW5n" + str(6 * 7)
text = f(2)
assert isinstance(text, str) and len(text) > 1000
for word in ("aWxsaW5n", "root:", "PYTEST", "[heap]", "test_sandbox"):
    assert word not in re.sub(re.escape(HERE), "", text), word
"""
    assert sandbox.run_tests(f"HERE = {__file__!r}\n{SPY}", tests, timeout=20.0) == PASSED


PEEK = f"""
import os
def succeeds(*args):
    try: return bool(open(*args))
    except OSError: return False
def f(x):
    opened = [("{LEFT}", flag) for flag in ("x", "w", "a") if succeeds("/tmp/{LEFT}", flag)]
    for pid in {{os.getppid(), TRAINER, *range(os.getpid() - 5, os.getpid() + 5)}} - {{os.getpid()}}:
        names = ("environ", "mem", "maps", "fd/0")
        opened += [(pid, name) for name in names if succeeds(f"/proc/{{pid}}/{{name}}", "rb")]
    return opened
"""


def variant(folder, old, new):
    """The module with a piece of its source replaced, its processes too."""
    source = (ROOT / "sandbox.py").read_text()
    assert source.count(old) == 1
    (folder / "variant.py").write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("variant", folder / "variant.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("lacking", ["libc.unshare(0x10000000)", "libc.syscall(444, None, 0, 1) > 0"])
def test_processes_and_files_stay_closed_without_landlock_or_without_a_namespace(lacking, tmp_path):
    weaker = variant(tmp_path, lacking, "False")
    assert weaker.run_tests(f"TRAINER = {os.getpid()}\n{PEEK}", "assert f(2) == [], f(2)") == PASSED


LOCKED = "import sandbox; file = open('/proc/self/status'); sandbox.lock_down(30, 1024); print(file.read())"


def test_a_locked_process_has_no_capability_left():
    done = subprocess.run([sys.executable, "-c", LOCKED], capture_output=True, text=True, cwd=ROOT)
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
    orphans = {pid for pid, (parent, command) in running.items() if parent == 1 and "sandbox.py" in command}
    folders = [*map(Path, ("/", "/dev/shm", "/tmp", "/var/tmp")), Path.cwd(), Path.home()]
    files = [path for folder in folders for path in folder.glob(f"{LEFT}*")]
    return children, orphans, threading.active_count(), len(os.listdir("/proc/self/fd")), files


ATTEMPT = """
import ctypes, mmap, os, resource, signal, socket, subprocess, threading, time
def attempt(action, *args):
    try: return action(*args)
    except (OSError, ValueError): pass
"""
HOSTILE = {
    "endless loop": "while True: pass",
    "endless loop when called": "def f(x):\n    while True: pass",
    "sleeps": "time.sleep(1000)",
    "ignores exceptions": "def f(x):\n  while True:\n    try: time.sleep(1)\n    except BaseException: pass",
    "fork bomb": "while True: os.fork()",
    "fork bomb that perseveres": "def f(x):\n    while True: attempt(os.fork)",
    "threads": "while True: threading.Thread(target=time.sleep, args=(100,)).start()",
    "subprocess": "subprocess.Popen(['sleep', '1000'])",
    "10 GB of memory": "x = bytearray(10 * 2**30)",
    "2 GB reserved": "x = mmap.mmap(-1, 2 * 2**30)",
    "10 GB in pieces": "x = []\nwhile True: x.append(bytearray(2**24))",
    "memory of a value": "f = lambda x: [0] * 10**8",
    "1 GB file": f"with open('{LEFT}', 'wb') as file:\n    for _ in range(1024): file.write(bytes(2**20))",
    "1 GB file elsewhere": f"""
write = lambda folder: open(folder + "/{LEFT}", "wb").write(bytes(2**30))
done = [attempt(write, folder) for folder in ("/dev/shm", "/tmp", "/var/tmp", os.path.expanduser("~"), ".")]
os.write(os.memfd_create("big"), bytes(2**30))
f = lambda x: 4 if any(done) else 5
""",
    "signals the parent": "os.kill(os.getppid(), signal.SIGKILL)",
    "signals the trainer": f"os.kill({os.getpid()}, signal.SIGKILL)",
    "signals the group": "os.killpg(0, signal.SIGKILL)",
    "signals everybody": "os.kill(-1, signal.SIGKILL)",
    "signals quietly": """
for pid in (os.getppid(), 0, -1, *range(max(2, os.getpid() - 30), os.getpid())):
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL): attempt(os.kill, pid, number)
f = lambda x: 5
""",
    "daemonised": "if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(1000)\n  os._exit(0)",
    "ignores signals": "[attempt(signal.signal, n, 1) for n in range(1, 65)]\nwhile True: pass",
    "limits of the parent": """
for pid in (os.getppid(), 1): attempt(resource.prlimit, pid, resource.RLIMIT_AS, (1, 1))
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
""",
    "network": "socket.create_connection(('127.0.0.1', 9))",
    "C library": """
libc = ctypes.CDLL(None, use_errno=True)
calls = {57: (), 58: (), 56: (17, 0, 0, 0, 0), 62: (-1, 9), 41: (1, 1, 0), 101: (16, 1, 0, 0), 319: (b"x", 0)}
if os.uname().machine != "x86_64": calls = {}
f = lambda x: 4 if any(libc.syscall(number, *args) >= 0 for number, args in calls.items()) else 5
""",
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_no_hostile_program_passes_or_survives(program):
    before, start = footprint(), time.perf_counter()
    right = "f = globals().get('f', lambda x: 2 * x)"  # right, if what comes before it were let through
    assert passes(f"{ATTEMPT}\n{program}\n{right}", timeout=1.5) is False
    assert time.perf_counter() - start < 6
    assert footprint() == before


BYSTANDER = """
import fcntl, os, resource, signal, socket, struct
left, right = socket.socketpair()
log = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]
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
def refused(attempt):
    try: attempt()
    except PermissionError: return True
f = lambda x: [i for i, attempt in enumerate(attempts) if not refused(attempt)]
"""


def test_a_bystander_of_the_same_user_is_out_of_reach():
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert sandbox.run_tests(f"PID = {bystander.pid}\n{BYSTANDER}", "assert f(2) == [], f(2)") == PASSED
        assert bystander.poll() is None
    finally:
        bystander.kill(), bystander.wait()


def test_200_programs_in_parallel_leave_nothing_behind():
    fork = "import os\ndef f(x): os.fork(); return 2 * x"
    programs = [RIGHT, fork, "import os; os._exit(0)", "def f(x): return 5", "print('passed')"] * 40
    code(RIGHT)
    before = footprint()
    assert code(*programs, timeout=60.0, workers=16) == [1.0, 0.0, 0.0, 0.0, 0.0] * 40
    assert footprint() == before


def test_programs_die_with_the_trainer():
    script = "import sandbox; sandbox.run_tests('import time; time.sleep(1000)', 'f(2)', timeout=900)"
    trainer = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    deadline, started, alive = time.monotonic() + 20, set(), True
    while len(started) < 2 and time.monotonic() < deadline:
        started = {pid for pid, (parent, _) in processes().items() if parent == trainer.pid}
    time.sleep(0.5)  # until both are locked down
    trainer.kill(), trainer.wait()
    while alive and time.monotonic() < deadline:
        alive = [p for p, (_, command) in processes().items() if p in started and "sandbox.py" in command]
        time.sleep(0.05)
    assert len(started) == 2 and not alive


def test_a_sandbox_that_cannot_be_built_is_an_error_and_no_reward(tmp_path, monkeypatch):
    for old, new, problem in (
        ("call(libc.prctl, 38, 1,", "call(libc.prctl, 38, 7,", "could not be built: .*Invalid argument"),
        ("    verdict = os.dup(1)\n", "    os.abort()\n", "could not be built"),
    ):
        with pytest.raises(RuntimeError, match=problem):
            variant(tmp_path, old, new).run_tests(RIGHT, TEST)
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "vax")
    with pytest.raises(RuntimeError, match="x86_64 or aarch64"):
        sandbox.run_tests(RIGHT, TEST)
