"""Short runs of the scripts that benchmarks/faults.py disturbs, in processes of their own; what two share."""

import hashlib
import json
import multiprocessing
import os
import runpy
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from learning import ROOT

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
    megabytes: tuple[int, ...] = (2000,)
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


def told(text: str) -> str:
    """What a user sees of a run that failed: its line of error, or that it is a traceback."""
    lines = [line.split("error: ", 1)[1] for line in text.splitlines() if line.startswith("error: ")]
    return lines[-1] if lines else "a traceback" if "Traceback" in text else ""


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
