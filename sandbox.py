"""A sandbox: whether a program that a model wrote passes its tests, with a verdict that it cannot forge.

    run_tests("def f(x): return 2 * x", "assert f(2) == 4")  # (True, "passed")

The *player*, a process, runs the program. The *judge*, another, runs the tests, in which the program's names
stand for `Remote` objects that ask the player over a socket. The player never holds the tests, a secret, or
the judge's channel to the trainer; what it prints, patches or exits with proves nothing. A program passes
when the judge has run the last statement of the tests. Plain values (numbers, texts, lists, ...) are compared
in the judge, so that a returned object whose `__eq__` is always true equals no number.

Both processes can read the files of Python and write none, start neither processes nor threads, open no
socket, signal nobody, and die with the trainer; they hold no other files and no environment. docs/rewards.md
says what this does not protect against, and which honest programs fail. Only the standard library is used.
"""

import ast
import builtins
import collections
import ctypes
import decimal
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
import types
from fractions import Fraction
from socket import socketpair


def run_tests(program, tests, entry_point=None, timeout=10.0, memory_mb=1024) -> tuple[bool | None, str]:
    """Whether a program passes its tests (None: there are none), and the reason. It executes the program.

    `tests` is Python source. A name of a builtin (a function called `sum`) is taken from the program only if
    `entry_point` is that name. RuntimeError where the sandbox cannot be built.
    """
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        raise RuntimeError(f"code_tests needs Linux on {' or '.join(ARCHITECTURES)}")
    if not isinstance(tests, str) or not tests.strip():
        return None, "no tests"
    job = json.dumps({"program": program, "tests": tests, "entry_point": entry_point}, default=str).encode()
    ends, processes = socketpair(), []
    try:
        for role, end in zip(("player", "judge"), ends):
            processes.append(start(role, end.fileno(), math.ceil(timeout) + 1, memory_mb))
            end.close()  # so that each side sees when the other has ended
        output, _ = processes[1].communicate(job, timeout)
    except subprocess.TimeoutExpired:
        return False, f"more than {timeout} seconds"
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout)):
                pipe.close()
        for end in ends:
            end.close()
    started, _, verdict = output.partition(b"\n")
    if started != b"null":
        problem = started.decode() or "no word of it"
        raise RuntimeError(f"the sandbox of code_tests could not be built: {problem}")
    passed, reason = json.loads(verdict) if verdict else (False, "the judge ended: memory or CPU limit")
    return passed, reason


def start(role, fd, seconds, memory_mb) -> subprocess.Popen:
    """Start the player or the judge, without an environment; `fd` is its end of the line between the two."""
    pipe = subprocess.PIPE if role == "judge" else subprocess.DEVNULL
    command = [sys.executable, "-I", "-X", "utf8", os.path.abspath(__file__)]
    return subprocess.Popen(
        command + [role, str(fd), str(seconds), str(memory_mb)],
        stdin=pipe,
        stdout=pipe,
        stderr=subprocess.DEVNULL,
        pass_fds=[fd],
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        cwd="/",
        start_new_session=True,  # out of reach of the terminal's signals
    )


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
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "dict": (dict, dict.items, dict),
    "range": (range, lambda r: [r.start, r.stop, r.step], lambda limits: range(*limits)),
    "slice": (slice, lambda s: [s.start, s.stop, s.step], new_slice),
    **{kind.__name__: (kind, list, kind) for kind in (list, tuple, set, frozenset, collections.deque)},
    **{kind.__name__: (kind, str, kind) for kind in (complex, Fraction, decimal.Decimal)},
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
        if (result := function(*args)) < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"{os.strerror(code)} ({function.__name__}{args[:2]})")
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
