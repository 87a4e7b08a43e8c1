"""Faults, as figures: runs are killed, disks fill up, files are damaged, rewards hang; what is lost?

    python benchmarks/faults.py                            # an hour on one core; goes on where it was stopped
    python benchmarks/faults.py --only kill_sft junk_rows  # some of it

Short runs of sft.py, dpo.py, grpo.py and ppo_rlhf.py with a checkpoint every 2 of 8 steps. A run that was
broken off goes on with --resume, and its weights are held against an unbroken run's, bit for bit. Linux only:
the full disk is a small tmpfs in a namespace of the user's own (`unshare`), for which nobody need be root.
Writes benchmarks/results/faults.json, the table of docs/reliability.md.
"""

import hashlib
import json
import multiprocessing
import os
import platform
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro
from faults_data import broken_jsonl, junk_rows, large_file, told
from learning import ROOT, cpu_name

SHORT = "--max-steps 8 --save-every 2 --log-every 1 --eval-every 0 --warmup-steps 2 "
ONLINE = SHORT + "--batch-size 32 --num-generations 4 --max-completion-length 48"
RUNS = {  # flags, and the data of tiny/
    "sft": (SHORT + "--model tiny/sft --batch-size 16 --max-completion-length 0", "sft_train"),
    "dpo": (SHORT + "--batch-size 8", "preference_train"),
    "grpo": (ONLINE, "prompts_train"),
    "ppo_rlhf": (ONLINE, "prompts_train"),
}
CLOCK = {"tokens_per_second", "step_time"}
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
FORKS = multiprocessing.get_context("forkserver")  # of a process that has imported what takes seconds
FORKS.set_forkserver_preload(["sft", "grpo"])


@dataclass
class Args:
    only: tuple[str, ...] = ()
    """Names of faults; by default all that the result lacks."""
    kills: int = 20
    """Kills of each script."""
    rows: int = 10_000
    """Junk rows of each loader."""
    megabytes: tuple[int, ...] = (50, 100, 200)
    """Sizes of the large JSONL files."""
    folder: Path = ROOT / "runs" / "faults"
    """Where runs are made, and where a broken measurement goes on."""


def command(name: str, args: Args, folder: Path, *more) -> list[str]:
    """The words of a short run of a script on the first rows of its data."""
    flags, data = RUNS[name]
    rows = args.folder / f"{data}.jsonl"
    if not rows.exists():
        lines = (ROOT / "tiny" / "data" / f"{data}.jsonl").read_text().splitlines()[:200]
        rows.write_text("\n".join(lines) + "\n")
    words = [str(ROOT / f"{name}.py"), *flags.split(), "--dataset", str(rows)]
    return [*words, "--output-dir", str(folder), *map(str, more)]


def play(words: list[str], output: str):
    """What `python words` does, in this process, which has imported most of it already."""
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def begin(words: list[str], args: Args):
    """Start a run in a process of its own; what it says is written to <folder>/output."""
    (args.folder / "output").unlink(missing_ok=True)
    process = FORKS.Process(target=play, args=(words, str(args.folder / "output")))
    process.start()
    return process


def run(words: list[str], args: Args) -> tuple[int, str]:
    """A run to its end -> its exit code and what it said."""
    process = begin(words, args)
    process.join()
    return process.exitcode, (args.folder / "output").read_text()


def lines_of(path: Path) -> list[dict]:
    """The whole lines of a JSONL file, none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def outcome(folder: Path) -> tuple:
    """What two equal runs share: hashes of their weights, and metrics but for the clock's."""
    weights = {path.parent.name: path.read_bytes() for path in folder.glob("*model/*.safetensors")}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in weights.items()}
    lines = lines_of(folder / "metrics.jsonl")
    return hashes, [{key: x for key, x in line.items() if key not in CLOCK} for line in lines]


def unbroken(name: str, args: Args) -> tuple[tuple, float]:
    """The outcome of a run that nothing disturbs, and its seconds."""
    folder, kept = args.folder / name / "unbroken", args.folder / name / "seconds.json"
    if not kept.exists():
        shutil.rmtree(folder, ignore_errors=True)
        run([str(ROOT / "sft.py"), "--help"], args)  # what serves the forks has imported all from now on
        started = time.perf_counter()
        code, said = run(command(name, args, folder), args)
        assert code == 0, said
        kept.write_text(json.dumps(time.perf_counter() - started))
    return outcome(folder), json.loads(kept.read_text())


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


def go_on(words: list[str], folder: Path, args: Args) -> tuple[str, str]:
    """Continue a run that was broken off -> how that went, all that was printed."""
    code, said = run([*words, "--resume"], args)
    if "is finished" in told(said):
        return "finished before", said
    if "holds no run" in told(said):
        shutil.rmtree(folder, ignore_errors=True)
        code, said = run(words, args)
        return "begun anew" if code == 0 else told(said), said
    return "continued" if code == 0 else told(said), said


def counted(texts) -> str:
    """Texts, without what stands in brackets, and how often each occurs."""
    counts = Counter(text.partition(" (")[0][:100] or "nothing" for text in texts)
    return "; ".join(f"{count} x {text}" for text, count in counts.items())


def equal_share(found: list[dict]) -> str:
    return f"{sum(x['equal'] for x in found)} of {len(found)} end bit for bit as the unbroken run"


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
    for megabytes in (0.02, 6, 12, 18, 28, 34, 35):
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
        "times": f"{len(failed)}: file systems of {failed[0]['megabytes']} to {failed[-1]['megabytes']} MB",
        "seen": counted(x["told"] for x in failed),
        "lost": f"{went_on} of {len(failed)} go on with `--resume` once there is room, others begin anew",
        "verdict": equal_share(found),
        "each": found,
    }


def damaged(path: Path):
    """Spoil a file in turn: cut it in half, empty it, turn one bit of its middle, remove it."""
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    turned = content[:half] + bytes([content[half] ^ 64]) + content[half + 1 :]
    for how, new in {"cut": content[:half], "emptied": b"", "one bit turned": turned}.items():
        path.write_bytes(new)
        yield how
    path.unlink()
    yield "removed"


def corrupt_checkpoint(args: Args) -> dict:
    """The last checkpoint of a run that was broken off is damaged; it goes on from the one before."""
    (wanted, _), found, folder = unbroken("sft", args), [], args.folder / "sft" / "damaged"
    for name in ("__0_0.distcp", ".metadata"):
        copy = args.folder / "copy"
        shutil.copy(args.folder / "sft" / "unbroken" / "checkpoints" / "step_00000008" / name, copy)
        for how in damaged(copy):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(args.folder / "sft" / "unbroken", folder)
            shutil.rmtree(folder / "model")
            spoilt = folder / "checkpoints" / "step_00000008" / name
            shutil.copy(copy, spoilt) if copy.exists() else spoilt.unlink()
            went, said = go_on(command("sft", args, folder), folder, args)
            line = {"file": name, "how": how, "went": went, "fell_back": "trying the one before" in said}
            found.append(line | {"equal": outcome(folder) == wanted})
            print("corrupt_checkpoint", found[-1], flush=True)
    return {
        "fault": "damaged last checkpoint (`sft.py`)",
        "times": f"{len(found)}: data or index cut, emptied, one bit turned, removed",
        "seen": f"{sum(x['fell_back'] for x in found)} x `... is damaged, trying the one before`; "
        + counted(x["went"] for x in found),
        "lost": "the steps since the checkpoint before",
        "verdict": equal_share(found),
        "each": found,
    }


def corrupt_model(args: Args) -> dict:
    """--model is a folder of which one file is damaged."""
    found, model, folder = [], args.folder / "broken_model", args.folder / "of_broken"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(ROOT / "tiny" / "sft", model)
        for how in damaged(model / name):
            shutil.rmtree(folder, ignore_errors=True)
            code, said = run(command("sft", args, folder, "--model", model), args)
            found.append({"file": name, "how": how, "code": code, "told": told(said)})
            print("corrupt_model", found[-1], flush=True)
    in_a_line, traceback = ([x for x in found if x["code"] == code] for code in (2, 1))
    return {
        "fault": "damaged `model.safetensors`, `config.json` or `tokenizer.json`",
        "times": f"{len(found)}: cut, emptied, one bit turned, removed",
        "seen": f"{len(in_a_line)} x one line; {len(traceback)} x a traceback; "
        f"{len(found) - len(in_a_line + traceback)} x nothing",
        "lost": "nothing: no run has begun",
        "verdict": "all refused"
        if all(x["code"] for x in found)
        else "a turned bit of a weight is not noticed",
        "each": found,
    }


def hanging_reward(args: Args) -> dict:
    """A reward of grpo.py that does not return in step 5; Ctrl-C, once and once more; then --resume."""
    (wanted, seconds), reward = unbroken("grpo", args), args.folder / "hanging.py"
    folder, hang = args.folder / "grpo" / "hanging", args.folder / "hang"
    reward.write_text(f"""import pathlib, runpy, time
right, calls = runpy.run_path({str(ROOT / "rewards.py")!r})["math_answer"], []
def math_answer(**columns):
    calls.append(0)
    while len(calls) == 5 and pathlib.Path({str(hang)!r}).exists():
        time.sleep(1)
    return right(**columns)
""")
    shutil.rmtree(folder, ignore_errors=True)
    hang.touch()
    words = command("grpo", args, folder, "--reward", f"{reward}:math_answer")
    process, sent = begin(words, args), []
    for patience, number in ((3 * seconds, signal.SIGINT), (20, signal.SIGINT), (20, signal.SIGKILL)):
        process.join(patience)
        if process.is_alive():
            sent.append(signal.Signals(number).name)
            os.kill(process.pid, number)
    process.join()
    reached, code = len(lines_of(folder / "metrics.jsonl")) - 1, process.exitcode
    hang.unlink()
    how, _ = go_on(words, folder, args)
    same = "bit for bit as" if outcome(folder) == wanted else "unlike"
    return {
        "fault": "a reward that hangs (`grpo.py`)",
        "times": f"1, behind step {reached}",
        "seen": f"nothing for {3 * seconds:.0f} s; then {', '.join(sent)} ended it, exit code {code}",
        "lost": "the steps since the last checkpoint",
        "verdict": f"{how}, {same} the unbroken run; nothing ends the wait by itself",
    }


FAULTS = {f"kill_{name}": lambda args, name=name: kills(name, args) for name in RUNS}
FAULTS |= {"full_disk": full_disk, "corrupt_checkpoint": corrupt_checkpoint, "corrupt_model": corrupt_model}
FAULTS |= {"corrupt_jsonl": broken_jsonl, "junk_rows": junk_rows, "hanging_reward": hanging_reward}
FAULTS |= {"large_file": large_file}


def main(args: Args):
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(QUIET)
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
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
