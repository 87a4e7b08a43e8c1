"""A sandbox: whether a program that a model wrote passes its tests, with a verdict that it cannot forge.

    run_tests("def f(x): return 2 * x", "assert f(2) == 4")  # (True, "passed")

The *player*, a process, runs the program; the *judge*, another, runs the tests and asks the player over a
socket (sandbox_judge.py). Both are forked from the *nursery*, which holds neither programs nor tests, so that
nothing of one reaches the next. Both can read the files of Python and write none, start neither processes nor
threads, open no connection, signal nobody, and die with the trainer; they hold no other files and no
environment. docs/rewards.md says what this does not protect against, and which honest programs fail. Only the
standard library is used.
"""

import contextlib
import ctypes
import functools
import json
import math
import os
import platform
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

UNBUILT = "the sandbox could not be built"
FILE_LIMIT = 2**24  # bytes of a file, as of what a program prints
PRELOADED = "bisect copy dataclasses datetime heapq random string traceback typing"  # by the nursery


def run_tests(program, tests, entry_point=None, timeout=10.0, memory_mb=1024) -> tuple[bool | None, str]:
    """Whether a program passes its tests (None: they cannot be read), and why; `run_batch` of one."""
    return run_batch([(program, tests, entry_point)], timeout, memory_mb)[0]


def run_batch(jobs, timeout=10.0, memory_mb=1024, workers=None) -> list[tuple[bool | None, str]]:
    """Whether each program passes its tests (None: it cannot be said), and why. It executes the programs.

    A job is (program, tests, entry_point). Tests are Python source, or a list of [input, output]: arguments
    and result of the function `entry_point`, or without one what the program reads and prints. In source, a
    name of a builtin (a function called `sum`) is taken from the program only if it is `entry_point`.
    `workers` (the number of CPUs) run at once, fewer where memory is short. RuntimeError where no sandbox can
    be built.
    """
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        raise RuntimeError(f"code_tests needs Linux on {' or '.join(ARCHITECTURES)}")
    workers = max(1, min(workers or os.cpu_count(), free_memory_mb() // (2 * memory_mb)))
    control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    settings = [str(other.fileno()), str(math.ceil(timeout) + 1), str(memory_mb)]
    process = subprocess.Popen(
        [sys.executable, "-IB", "-X", "utf8", os.path.abspath(__file__), *settings],
        **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL),
        pass_fds=[other.fileno()],
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        cwd="/",
        start_new_session=True,  # out of reach of the terminal's signals
    )
    other.close()
    pool = ThreadPoolExecutor(workers)
    try:
        results = list(pool.map(lambda row: run_job(control, row, jobs[row], timeout), range(len(jobs))))
    finally:
        with contextlib.suppress(OSError):
            control.shutdown(socket.SHUT_RDWR)  # the nursery ends what it forked, and itself
        pool.shutdown(cancel_futures=True)
        process.wait()
        control.close()
    for (_, tests, _), (passed, reason) in zip(jobs, results):
        if passed is None:  # Python shows the same warning once
            warnings.warn(f"code_tests gives None: {reason}; tests: {tests!r:.80}", stacklevel=2)
    if jobs and all(reason.startswith(UNBUILT) and passed is None for passed, reason in results):
        raise RuntimeError(f"code_tests: {results[0][1]}")
    return results


def run_job(control, row, job, timeout) -> tuple[bool | None, str]:
    """The verdict of one job, and why; the nursery forks what it needs."""
    name, output, deadline = str(row).encode(), b"", time.monotonic() + timeout
    mine, other = socket.socketpair()
    try:
        line = json.dumps(job, default=str, skipkeys=True).encode() + b"\n"
        with other:
            socket.send_fds(control, [name], [other.fileno()])
        mine.settimeout(timeout)
        mine.sendall(line)
        while len(output) < 2**16 and (piece := mine.recv(2**16)):  # a judge has less to say
            output += piece
            mine.settimeout(max(deadline - time.monotonic(), 0.001))
    except TimeoutError:
        return False, f"more than {timeout} seconds"
    except (ValueError, RecursionError) as error:
        return None, f"the tests cannot be read: {error}"
    except OSError as error:
        return None, f"{UNBUILT}: {error}"
    finally:
        mine.close()
        with contextlib.suppress(OSError):
            control.send(name)  # the nursery ends both processes
    started, _, verdict = output.partition(b"\n")
    problem, missing = json.loads(started or b'["no word of it", []]')  # written before the tests are run
    if problem:
        return None, f"{UNBUILT}: {problem}"
    for protection in missing:
        warnings.warn(f"code_tests runs without {protection}, which this kernel does not grant", stacklevel=2)
    try:  # the judge of tests that evaluate an answer may have been made to say anything
        passed, reason = json.loads(verdict or b'[false, "the judge ended: memory or CPU limit"]')
        return (passed if passed in (True, None) else False), str(reason)[:1000]
    except (ValueError, TypeError, RecursionError):
        return False, "the judge cannot be understood"


def free_memory_mb() -> int:
    """MiB that this machine has left, and its control group if that has a limit."""
    free = int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) // 1024
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, TypeError):  # there is none, or its limit is "max"
        used = re.search(r"^anon (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)[1]
        free = min(free, (int((group / "memory.max").read_text()) - int(used)) // 2**20)
    return free


# ------------------------------------------------------------------------------------------------------------
# The sandbox
# ------------------------------------------------------------------------------------------------------------
# What both processes may do, as name:number on x86-64:number on ARM64 (none where it does not exist there)
CALLS = """
    read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 close:3:57 lseek:8:62
    ftruncate:77:46 stat:4: fstat:5:80 lstat:6: newfstatat:262:79 statx:332:291 statfs:137:43 fstatfs:138:44
    access:21: faccessat:269:48 faccessat2:439:439 readlink:89: readlinkat:267:78 getcwd:79:17 getdents:78:
    getdents64:217:61 fadvise64:221:223 dup:32:23 dup2:33: dup3:292:24 pipe:22: pipe2:293:59 select:23:
    pselect6:270:72 poll:7: ppoll:271:73 epoll_create:213: epoll_create1:291:20 epoll_ctl:233:21
    epoll_wait:232: epoll_pwait:281:22 epoll_pwait2:441:441 eventfd2:290:19 socketpair:53:199 recvfrom:45:207
    shutdown:48:210 getsockopt:55:209 getsockname:51:204 getpeername:52:205 mmap:9:222 munmap:11:215
    mprotect:10:226 mremap:25:216 madvise:28:233 mincore:27:232 brk:12:214 rt_sigaction:13:134
    rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137
    rt_sigsuspend:130:133 sigaltstack:131:132 pause:34: alarm:37: getitimer:36:102 setitimer:38:103
    restart_syscall:219:128 nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113
    clock_getres:229:114 gettimeofday:96:169 time:201: times:100:153 getrusage:98:165 getrlimit:97:163
    setrlimit:160:164 sysinfo:99:179 uname:63:160 umask:95:166 getrandom:318:278 getcpu:309:168
    sched_yield:24:124 sched_getaffinity:204:123 sched_getparam:143:121 sched_getscheduler:145:120
    sched_get_priority_max:146:125 sched_get_priority_min:147:126 getpriority:140:141 getpid:39:172
    getppid:110:173 gettid:186:178 getpgrp:111: getpgid:121:155 getsid:124:156 getuid:102:174
    geteuid:107:175 getgid:104:176 getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158
    futex:202:98 set_robust_list:273:99 get_robust_list:274:100 set_tid_address:218:96 rseq:334:293
    membarrier:324:283 exit:60:93 exit_group:231:94
"""
# Calls allowed for some arguments: name, numbers, which argument, its values or the bits that it may not have
CALLS_WITH = (
    ("open", (2, None), 1, os.O_ACCMODE | os.O_CREAT | os.O_TRUNC),  # to read
    ("openat", (257, 56), 2, os.O_ACCMODE | os.O_CREAT | os.O_TRUNC),
    ("prlimit64", (302, 261), 0, (0,)),  # limits of itself
    ("sendto", (44, 206), 5, (0,)),  # without an address, which a socketpair of datagrams may take
    ("fcntl", (72, 25), 1, (0, 1, 2, 3, 4, 5, 1030)),  # copies of a descriptor, its flags, a lock's state
    (
        "ioctl",
        (16, 29),
        1,
        (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),
    ),  # a terminal? waiting? blocking?
)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_...


def lock_down(seconds, memory_mb) -> list[str]:
    """Give up, for this process and for good, what running a program does not need; OSError if refused.

    Returns which protections the kernel does not grant.
    """
    libc, missing = ctypes.CDLL(None, use_errno=True), []

    def call(function, *args):  # a call that must not fail
        if (result := function(*args)) < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"{os.strerror(code)} ({function.__name__}{args[:2]})")
        return result

    limits = {"CPU": seconds, "AS": memory_mb * 2**20, "FSIZE": FILE_LIMIT, "CORE": 0, "NOFILE": 64}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    # A user namespace of its own bars it from the memory and /proc of others.
    if not libc.unshare(0x10000000) == 0:  # CLONE_NEWUSER
        missing.append("a user namespace")
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
    else:
        missing.append("Landlock")

    program = seccomp_filter(platform.machine())
    instructions = ctypes.create_string_buffer(program)
    header = struct.pack("HP", len(program) // 8, ctypes.addressof(instructions))
    call(libc.prctl, 22, 2, header, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    return missing


@functools.cache
def seccomp_filter(machine) -> bytes:
    """The filter of system calls as classic BPF: instructions of code, two jumps, and a number."""
    column, architecture = ARCHITECTURES[machine]
    load, equal, any_bit, leave = 0x20, 0x15, 0x45, 0x06
    kill, deny, allow = 0x80000000, 0x00050001, 0x7FFF0000  # the process; with EPERM; the call
    # The number of the call stands at byte 0, the architecture at 4, the arguments, of 8 bytes each, from 16.
    # Calls of a second set of numbers (x32), from 0x40000000, are none of the list.
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (leave, 0, 0, kill), (load, 0, 0, 0)]
    for name in CALLS.split():
        if number := name.split(":")[1 + column]:
            steps += [(equal, 0, 1, int(number)), (leave, 0, 0, allow)]
    for _, numbers, argument, test in CALLS_WITH:
        if numbers[column] is None:
            continue
        if isinstance(test, int):
            tests = [(any_bit, 0, 1, test), (leave, 0, 0, deny), (leave, 0, 0, allow)]
        else:
            tests = [step for value in test for step in ((equal, 0, 1, value), (leave, 0, 0, allow))]
            tests += [(leave, 0, 0, deny)]
        steps += [(equal, 0, 1 + len(tests), numbers[column]), (load, 0, 0, 16 + 8 * argument), *tests]
    steps += [(leave, 0, 0, deny)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def nursery(fd, seconds, memory_mb):
    """Fork the two processes of each job whose name comes over `fd` with the trainer's line to the judge.

    A name that comes again ends them. When the line closes, all end.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(
            "1000"
        )  # where memory is short, the kernel ends these first
    for option, value in ((1, 9), (4, 0)):  # as in lock_down
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
    for module in PRELOADED.split():
        __import__(module)
    control, children = socket.socket(fileno=fd), {}
    while True:
        name, lines, _, _ = socket.recv_fds(control, 64, 1)
        for pid in children.pop(name, ()):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if lines:
            ends = [end.detach() for end in socket.socketpair()]
            arguments = ("player", ends[0], None), ("judge", ends[1], lines[0])
            children[name] = [fork(*given, seconds, memory_mb) for given in arguments]
            for end in (*ends, *lines):
                os.close(end)
        elif not name:
            break


def fork(role, fd, trainer, seconds, memory_mb) -> int:
    """Fork the player or the judge, with its end `fd` of their line, and the judge's line to the trainer."""
    if pid := os.fork():
        return pid
    try:
        for other in {*range(3, 64)} - {fd, trainer}:
            with contextlib.suppress(OSError):
                os.close(other)
        files = [os.memfd_create("standard") for _ in range(2)]
        try:
            problem, missing = None, lock_down(seconds, memory_mb)
        except (OSError, MemoryError) as error:
            problem, missing = repr(error), []
        link = Link(fd, {"call": lambda function, /, *args, **kwargs: function(*args, **kwargs)})
        if role == "player":
            link.send("ready", problem)
            player(link, files)
        job = json.loads(open(trainer, "rb", closefd=False).readline())
        try:
            problem = problem or link.receive()[1][0]  # sent before the program
        except Ended as error:
            problem = str(error)
        os.write(trainer, json.dumps([problem, missing]).encode() + b"\n")
        if not problem:
            os.write(trainer, json.dumps(run_judge(link, *job)).encode())
    finally:
        os._exit(0)  # whatever the tests have registered to be done at the end


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from sandbox_judge import Ended, Link, player, run_judge

    del sys.path[0]
    nursery(*map(int, sys.argv[1:]))
