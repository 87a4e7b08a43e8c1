"""Faults, as figures: runs are killed, disks fill up, files are damaged, rewards hang; what is lost?

    python benchmarks/faults.py                            # an hour on one core; goes on where it was stopped
    python benchmarks/faults.py --only kill_sft junk_rows  # some of it

Short runs of sft.py, dpo.py, grpo.py and ppo_rlhf.py with a checkpoint every 2 of 8 steps. A run that was
broken off goes on with --resume, and its weights are held against an unbroken run's, bit for bit. Linux only:
the full disk is a small tmpfs in a namespace of the user's own (`unshare`), for which nobody need be root.
Writes benchmarks/results/faults.json, the table of docs/reliability.md.
"""

import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import tyro
from faults_files import broken_jsonl, corrupt_checkpoint, corrupt_model, junk_rows
from faults_runs import (
    QUIET,
    RUNS,
    Args,
    begin,
    command,
    counted,
    equal_share,
    go_on,
    lines_of,
    outcome,
    run,
    told,
    unbroken,
)
from learning import ROOT, cpu_name


def kill_at(words: list[str], folder: Path, seconds: float, write: int, args: Args) -> bool | None:
    """Start a run; kill it `seconds` later, or after its `write`-th checkpoint began.

    Says whether it was in a write; None where the run had ended before.
    """
    process, partial, before, begun = begin(words, args), folder / "checkpoints" / "partial", False, 0
    while begun < write and process.is_alive():
        now = partial.exists()
        begun, before = begun + (now and not before), now
        time.sleep(0.0005)
    process.join(seconds)
    process.kill()
    process.join()
    return partial.exists() if process.exitcode == -signal.SIGKILL else None


def kills(name: str, args: Args) -> dict:
    """Half of the kills at any moment of a run, half of them within checkpoint writes."""
    (wanted, seconds), log = unbroken(name, args), args.folder / name / "kills.jsonl"
    found, folder = lines_of(log), args.folder / name / "killed"
    for n in range(len(found), args.kills):
        rng, words, in_write = random.Random(f"{name} {n}"), command(name, args, folder), None
        while in_write is None:
            shutil.rmtree(folder, ignore_errors=True)
            write = rng.randint(1, 4) * (n % 2)
            moment = rng.uniform(0, 0.03 if write else seconds)
            in_write = kill_at(words, folder, moment, write, args)
            seconds *= 0.8 if in_write is None else 1  # it ran faster than the unbroken run
        reached = len(lines_of(folder / "metrics.jsonl")) - 1
        how, said = go_on(words, folder, args)
        starts = [int(x[-8:]) for x in said.splitlines() if x.startswith("continuing from")]
        lost = 0 if how == "finished before" else max(0, reached - max(starts, default=0))
        line = {"seconds": moment, "write": write, "in_write": in_write, "step": reached, "lost": lost}
        found.append(line | {"how": how, "equal": outcome(folder) == wanted})
        with log.open("a") as file:
            file.write(json.dumps(found[-1]) + "\n")
        print(f"kill_{name} {n + 1}/{args.kills}: {found[-1]}", flush=True)
    return {
        "fault": f"`kill -9` of `{name}.py`",
        "times": f"{len(found)}, {sum(x['in_write'] for x in found)} of them in a checkpoint write",
        "seen": counted(x["how"] for x in found),
        "lost": f"at most {max(x['lost'] for x in found)} steps, those since the last checkpoint",
        "verdict": equal_share(found),
        "each": found,
    }


def full_disk(args: Args) -> dict:
    """sft.py into file systems of several sizes; then each gets room, and the run goes on."""
    (wanted, _), found, disk, out = unbroken("sft", args), [], args.folder / "disk", args.folder / "from_disk"
    disk.mkdir(exist_ok=True)
    for megabytes in (0.02, 6, 18, 28, 34):
        shutil.rmtree(out, ignore_errors=True)
        script = f"""mount -t tmpfs -o size={int(megabytes * 1024)}k tmpfs {disk} || exit 99
            "$@"; echo "== $?"; mount -o remount,size=200m {disk}; "$@" --resume; code=$?; echo "== $code"
            [ $code = 0 ] || {{ rm -rf {disk}/run; "$@"; }}; cp -r {disk}/run {out}"""
        words = [sys.executable, *command("sft", args, disk / "run")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        said = subprocess.run(["unshare", "-Urm", "sh", "-c", script, "sh", *words], cwd=ROOT, **pipes).stdout
        parts = said.split("== ")
        line = {"megabytes": megabytes, "codes": [int(part.split()[0]) for part in parts[1:]]}
        found.append(
            line | {"told": told(parts[0]), "resume": told(parts[1]), "equal": outcome(out) == wanted}
        )
        print("full_disk", found[-1], flush=True)
    failed = [x for x in found if x["codes"][0]]
    went_on = sum(x["codes"][1] == 0 for x in failed)
    return {
        "fault": "full disk (`sft.py`)",
        "times": f"{len(failed)} of {len(found)} file systems, the largest of {failed[-1]['megabytes']} MB",
        "seen": counted(x["told"] for x in failed),
        "lost": f"nothing: {went_on} of {len(failed)} go on with `--resume` once there is room",
        "verdict": equal_share(found),
        "each": found,
    }


def hanging_reward(args: Args) -> dict:
    """A reward of grpo.py that does not return in step 5, and swallows what it can; then --resume."""
    (wanted, _), reward = unbroken("grpo", args), args.folder / "hanging.py"
    folder, hang = args.folder / "grpo" / "hanging", args.folder / "hang"
    reward.write_text(f"""import pathlib, runpy, time
right, calls = runpy.run_path({str(ROOT / "rewards.py")!r})["math_answer"], []
def math_answer(**columns):
    calls.append(0)
    while len(calls) == 5 and pathlib.Path({str(hang)!r}).exists():
        try:
            time.sleep(600)
        except Exception:
            pass
    return right(**columns)
""")
    shutil.rmtree(folder, ignore_errors=True)
    hang.touch()
    words = command("grpo", args, folder, "--reward", f"{reward}:math_answer", "--reward-timeout", "20")
    started = time.perf_counter()
    code, said = run(words, args)
    seconds, reached = time.perf_counter() - started, len(lines_of(folder / "metrics.jsonl")) - 1
    hang.unlink()
    how, _ = go_on(words, folder, args)
    same = "bit for bit as" if outcome(folder) == wanted else "unlike"
    return {
        "fault": "a reward that hangs (`grpo.py --reward-timeout 20`)",
        "times": f"1, behind step {reached}",
        "seen": f"exit code {code} after {seconds:.0f} s in all: {told(said)}".replace(f"{args.folder}/", ""),
        "lost": "the steps since the last checkpoint",
        "verdict": f"{how}, {same} the unbroken run",
    }


def large_file(args: Args) -> dict:
    """Peak memory and CPU seconds of sft.py up to its first step, on JSONL files of several sizes."""
    each, big, cache = [], args.folder / "big.jsonl", args.folder / "datasets_cache"
    text = " ".join(json.loads(x)["text"] for x in (ROOT / "tiny/data/text_train.jsonl").open())
    for megabytes in (1, *args.megabytes):
        with big.open("w") as file:
            for n in range(megabytes * 500):  # rows of 2,000 bytes
                said = f"{n} {text[n * 37 % (len(text) - 2000) :][:1800]}"
                turns = [{"role": "user", "content": f"Tell {n}."}, {"role": "assistant", "content": said}]
                file.write(json.dumps({"messages": turns}) + "\n")
        flags = "--max-steps 1 --save-every 0 --max-completion-length 0 --batch-size 1"
        words = [sys.executable, "sft.py", "--dataset", str(big), *flags.split()]
        words += ["--output-dir", str(args.folder / "large")]
        size = big.stat().st_size / 1e9
        environment = os.environ | {"HF_DATASETS_CACHE": str(cache)}
        with open(args.folder / "output", "w") as output:
            process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, (args.folder / "output").read_text()
        line = {"gb": size, "peak_gb": usage.ru_maxrss * 1024 / 1e9}
        line["cpu_seconds"] = usage.ru_utime + usage.ru_stime
        each.append(line)
        print("large_file", line, flush=True)
        big.unlink()
        for folder in (cache, args.folder / "large"):
            shutil.rmtree(folder)
    first, last = each[0], each[-1]
    slope, pace = ((last[x] - first[x]) / (last["gb"] - first["gb"]) for x in ("peak_gb", "cpu_seconds"))
    listed = lambda what: ", ".join(f"{x[what]:.2g}" for x in each)
    return {
        "fault": "a large JSONL (`sft.py`, rows of 2 kB)",
        "times": f"{listed('gb')} GB",
        "seen": f"peak memory {listed('peak_gb')} GB",
        "lost": f"{slope:.1f} GB of memory and {pace / 60:.0f} CPU minutes for each GB of JSONL",
        "verdict": "token ids are kept in memory, text is not",
        "each": each,
    }


FAULTS = {f"kill_{name}": lambda args, name=name: kills(name, args) for name in RUNS}
FAULTS |= {"full_disk": full_disk, "corrupt_checkpoint": corrupt_checkpoint, "corrupt_model": corrupt_model}
FAULTS |= {"corrupt_jsonl": broken_jsonl, "junk_rows": junk_rows, "hanging_reward": hanging_reward}
FAULTS |= {"large_file": large_file}


def main(args: Args):
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(QUIET | {"HF_DATASETS_CACHE": str(args.folder / "datasets_cache")})
    path = ROOT / "benchmarks" / "results" / "faults.json"
    result = json.loads(path.read_text()) if path.exists() else {"faults": {}}
    result |= {"command": "python benchmarks/faults.py"}
    result["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    result["versions"] = {package: version(package) for package in ("torch", "transformers", "datasets")}
    for name in args.only or [name for name in FAULTS if name not in result["faults"]]:
        found = FAULTS[name](args)
        print({key: value for key, value in found.items() if key != "each"}, flush=True)
        result["faults"][name] = found
        result["faults"] = {name: result["faults"][name] for name in FAULTS if name in result["faults"]}
        path.write_text(json.dumps(result, indent=1).replace(f"{args.folder}/", "") + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
