"""sandbox.py: programs of data/*.jsonl get their scores, and of hostile ones nothing is left in /proc."""

import contextlib
import functools
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from conftest import DATA, ROOT, read_lines

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


def test_programs_run_only_where_allowed_and_against_tests_that_can_be_read():
    rows = [None, "", "# nothing", "def f(:", 5, {}, TEST, ["import math", TEST]]
    assert code(*[RIGHT] * 8, tests=rows) == [None] * 6 + [1.0, 1.0]
    named_sum = "def sum(a, b): return a + b"  # as a builtin is: only an entry point takes it
    assert code(named_sum, tests="assert sum(1, 2) == 3") == [None]
    assert code(named_sum, tests="assert sum(1, 2) == 3", entry_point=["sum"]) == [1.0]
    for allowed in (False, None, [True], 1):
        with pytest.raises(RuntimeError, match="--allow-code-execution"):
            code("x", tests="x", allow_code_execution=allowed)


@pytest.mark.parametrize("case", read_lines(DATA / "programs_reasons.jsonl"), ids=lambda case: case["told"])
def test_reasons_of_failure_are_told(case):
    passed, told = sandbox.run_tests(case["program"], TEST)
    assert passed is False and case["told"] in told


def test_tests_are_statements_run_to_their_end():
    assert passes(RIGHT, f"import sys\n{TEST}\nsys.exit(0)\nassert f(2) == 5") is False
    assert passes(RIGHT, f"import os\n{TEST}\nos._exit(0)") is False
    # what the attacks below begin with is harmless
    assert passes(ATTEMPT + RIGHT, f"print('passed')\n{TEST}") is True
    # a program that has ended is not the exception that a test waits for
    catches, ends = "try:\n    f(2)\n    assert False\nexcept Exception:\n    pass", "def f(x): os._exit(1)"
    assert passes("def f(x): raise ValueError", catches) is True
    assert passes(f"import os\n{ends}", catches) is False
    assert passes(f"import os\n{ends}", catches.replace("except Exception", "except")) is False


ROWS = read_lines(DATA / "programs.jsonl")


@functools.cache
def scores_of_rows(endless):
    """By kind: the row's name, which of its programs, its score, and the score that it must get."""
    rows = [row for row in ROWS if (row["kind"] == "endless") is endless]
    cases = [(row, "completion", row["expected"]) for row in rows]
    cases += [(row, "right", 1.0) for row in rows if "right" in row]
    columns = {name: [row[name] for row, _, _ in cases] for name in ("tests", "entry_point")}
    completions, timeout = [row[which] for row, which, _ in cases], 3.0 if endless else 60.0
    scores, found = code(*completions, timeout=timeout, workers=2, **columns), {}
    for (row, which, expected), score in zip(cases, scores):
        found.setdefault(row["kind"], []).append((row["name"], which, score, expected))
    return found


@pytest.mark.filterwarnings("ignore:code_tests")
@pytest.mark.parametrize("kind", sorted({row["kind"] for row in ROWS}))
def test_attacks_fail_and_right_programs_pass_in_every_form(kind):
    if kind == "satisfies comparisons":
        pytest.importorskip("numpy")
    assert not [case for case in scores_of_rows(kind == "endless")[kind] if case[2] != case[3]]


def test_a_row_that_cannot_be_read_is_named_and_does_not_end_the_batch():
    rows = [TEST, {"inputs": ["1"]}, "def f(", "import no_such_module\n" + TEST, TEST]
    with pytest.warns(UserWarning, match="code_tests") as caught:
        assert code(*[RIGHT] * 5, tests=rows) == [1.0, None, None, None, 1.0]
    told = [str(warning.message) for warning in caught]
    assert len(told) == 3 and "outputs" in told[0] and "'def f('" in told[1] and "not installed" in told[2]


@pytest.mark.filterwarnings("ignore:code_tests")
def test_mutated_rows_get_a_score_or_none():
    noise = random.Random(0)
    pieces = [str(value) for row in ROWS for value in (row["tests"], row["completion"])]
    values = [None, 5, [], {}, [5], {"inputs": 5, "outputs": {}}, b"x", float("nan"), [[["["]]], "\0"]

    def mutated():
        text = list(noise.choice(pieces)[:300])
        for _ in range(3):
            text.insert(noise.randrange(len(text) + 1), noise.choice(noise.choice(pieces)[:40] + "\ud800\0"))
        return noise.choice(["".join(text), "".join(text), noise.choice(values)])

    columns = {"tests": [mutated() for _ in range(40)], "entry_point": [mutated() for _ in range(40)]}
    scores = code(*[mutated() for _ in range(40)], timeout=2.0, workers=2, **columns)
    assert len(scores) == 40 and set(scores) <= {None, 0.0, 1.0}


def test_nothing_of_one_program_reaches_the_next():
    modules = "import builtins, heapq, math, sys\n"
    leave = "builtins.left = sys.left = math.left = sys.modules['heapq'] = sys\nf = lambda x: 4"
    find = "left = [m for m in (builtins, sys, math) if hasattr(m, 'left')] or heapq is sys\n"
    leave, find = modules + leave, modules + find + "f = lambda x: 5 if left else 4"
    assert code(leave, find, leave, find, workers=1) == [1.0] * 4


def test_workers_share_the_memory_and_the_trainer_is_not_the_first_to_be_ended(monkeypatch):
    module, pools = rewards.module("sandbox"), []
    pool = module.ThreadPoolExecutor
    monkeypatch.setattr(module, "free_memory_mb", lambda: 5000)
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda n: pools.append(n) or pool(n))
    assert code(RIGHT, workers=64, memory_mb=1024) == code(RIGHT, workers=1) == [1.0] and pools == [2, 1]
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], cwd=ROOT)
    try:
        started = descendants(process.pid, 3)
        scores = [Path(f"/proc/{pid}/oom_score_adj").read_text().strip() for pid in started]
        assert scores == ["1000"] * 3
    finally:
        process.kill(), process.wait()


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
def succeeds(path, mode):  # a process that is just ending has no memory, and nothing to be read
    try:
        file = open(path, mode)
        return mode != "rb" or path.endswith("fd/0") or bool(file.read(1))
    except OSError: return False
def f(x):
    opened = [("{LEFT}", flag) for flag in ("x", "w", "a") if succeeds("/tmp/{LEFT}", flag)]
    for pid in {{os.getppid(), TRAINER, *range(os.getpid() - 5, os.getpid() + 5)}} - {{os.getpid()}}:
        names = ("environ", "maps", "fd/0")
        opened += [(pid, name) for name in names if succeeds(f"/proc/{{pid}}/{{name}}", "rb")]
    return opened
"""


def variant(folder, old, new):
    """The module with a piece of its source replaced, its processes too."""
    source = (ROOT / "sandbox.py").read_text()
    assert source.count(old) == 1
    (folder / "variant.py").write_text(source.replace(old, new))
    shutil.copy(ROOT / "sandbox_judge.py", folder)
    spec = importlib.util.spec_from_file_location("variant", folder / "variant.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("lacking", ["libc.unshare(0x10000000) == 0", "libc.syscall(444, None, 0, 1) > 0"])
def test_processes_and_files_stay_closed_without_landlock_or_without_a_namespace(lacking, tmp_path):
    weaker = variant(tmp_path, lacking, "False")
    with pytest.warns(UserWarning, match="without (Landlock|a user namespace)"):
        assert weaker.run_tests(f"TRAINER = {os.getpid()}\n{PEEK}", "assert f(2) == [], f(2)") == PASSED


LOCKED = "import sandbox; file = open('/proc/self/status'); sandbox.lock_down(30, 1024); print(file.read())"


def test_a_locked_process_has_no_capability_left():
    done = subprocess.run([sys.executable, "-c", LOCKED], capture_output=True, text=True, cwd=ROOT)
    fields = dict(line.split(":\t", 1) for line in done.stdout.splitlines() if ":\t" in line)
    assert (fields["CapPrm"], fields["CapEff"]) == ("0" * 16, "0" * 16), done.stderr
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")


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


def test_no_hostile_program_passes_or_survives():
    before, start = footprint(), time.perf_counter()
    right = "f = globals().get('f', lambda x: 2 * x)"  # right, if what comes before it were let through
    rows = read_lines(DATA / "programs_hostile.jsonl")
    programs = [f"{ATTEMPT}TRAINER = {os.getpid()}\n{row['program']}\n{right}" for row in rows]
    scores = code(*programs, timeout=1.5, workers=4)
    assert not [row["name"] for row, score in zip(rows, scores) if score != 0.0]
    assert time.perf_counter() - start < 60
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
    before = footprint()
    assert code(*programs, timeout=60.0, workers=8) == [1.0, 0.0, 0.0, 0.0, 0.0] * 40
    assert footprint() == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
def test_an_ordinary_user_is_as_well_protected():
    jobs = [(RIGHT, TEST, None), (f"TRAINER = {os.getpid()}\n{PEEK}", "assert f(2) == [], f(2)", None)]
    jobs += [(row["completion"], row["tests"], None) for row in ROWS if row["kind"] == "system calls"]
    script = f"import sandbox; print(sandbox.run_batch({jobs!r}, workers=2))"
    # That user may have no way to the interpreter of these tests.
    pythons = [sys.executable, "/usr/bin/python3"]
    python = next(path for path in pythons if not os.path.realpath(path).startswith("/root"))
    before = footprint()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("sandbox.py", "sandbox_judge.py"):
            shutil.copy(ROOT / name, folder)
        os.chmod(folder, 0o755)
        command = [python, "-W", "error", "-c", script]
        options = {"capture_output": True, "text": True, "user": 65534, "group": 65534}
        try:
            done = subprocess.run(command, cwd=folder, **options)
        except PermissionError:
            pytest.skip("the interpreter is out of another user's reach")
    assert [passed for passed, _ in eval(done.stdout)] == [i < 2 for i in range(len(jobs))], done.stderr
    assert footprint() == before


SLEEPER = (
    "import sandbox; sandbox.run_tests('import time; time.sleep(1000)', 'assert f(2) == 4', timeout=900)"
)


def descendants(pid, number):
    """The processes below one, when there are as many as `number`."""
    deadline, found = time.monotonic() + 20, set()
    while len(found) < number and time.monotonic() < deadline:
        found, running = {pid}, processes()
        for _ in range(3):
            found |= {child for child, (parent, _) in running.items() if parent in found}
        found -= {pid}
    return found


def test_programs_die_with_the_trainer():
    trainer = subprocess.Popen([sys.executable, "-c", SLEEPER], cwd=ROOT)
    started = descendants(trainer.pid, 3)  # what forks, the player, the judge
    time.sleep(0.3)  # until both are locked down
    trainer.kill(), trainer.wait()
    deadline, alive = time.monotonic() + 20, started
    while alive and time.monotonic() < deadline:
        alive = [p for p, (_, command) in processes().items() if p in started and "sandbox.py" in command]
        time.sleep(0.05)
    assert len(started) == 3 and not alive


def test_a_sandbox_that_cannot_be_built_is_an_error_and_no_reward(tmp_path, monkeypatch):
    for old, new, problem in (
        ("call(libc.prctl, 38, 1,", "call(libc.prctl, 38, 7,", "could not be built: .*Invalid argument"),
        ("            problem, missing = None", "            os.abort(), None", "could not be built"),
        ("    control, children = ", "    os.abort()\n    control, children = ", "could not be built"),
    ):
        with pytest.raises(RuntimeError, match=problem):
            variant(tmp_path, old, new).run_tests(RIGHT, TEST)
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "vax")
    with pytest.raises(RuntimeError, match="x86_64 or aarch64"):
        sandbox.run_tests(RIGHT, TEST)
