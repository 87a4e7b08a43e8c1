"""A newcomer's hour: every command of README.md and docs/ in a fresh clone and a fresh environment, in order.

    python benchmarks/newcomer.py                   # hours on 2 cores: all runs to their end
    python benchmarks/newcomer.py --seconds 60      # what lasts longer is stopped, and must end well

A command fails where its exit code is not 0. Commands with --output-dir, which others need, and evaluations
always run to their end. Left out, and listed: what names a model or data of the hub, a GPU, several machines
or a file that a reader has to bring; the measurements of benchmarks/; the tests, which have their own run.
The log, a line a command, goes to the terminal and to newcomer.log in the folder.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from learning import ROOT

# A hub id has one slash and no ending, a folder of ours begins with tiny/ or runs/.
HUB = r"(?<![\w./-])(?!tiny/|runs/|docs/|tests/|benchmarks/)[A-Za-z][\w-]*/[\w.-]+(?![\w./-])"
ELSEWHERE = (
    rf"{HUB}|torchrun|sbatch|srun|vllm|lm_eval|--attn flash|runs/(x|a|b|\.\.\.)\b|my_|\.\.\.|--slow|--gpu"
)
ELSEWHERE += r"|pytest|benchmarks/|tiny/make|sync_|git |gsm8k|FOLDER|lm-eval"
ELSEWHERE += r"|-model code-model|models (one|run1)|\ba\.jsonl|answers\.jsonl"


@dataclass
class Args:
    seconds: float = 0
    """Stop a command after these seconds; 0 lets all run to their end."""
    python: Path | None = None
    """The interpreter of an environment that has all requirements; by default a fresh one is made."""
    folder: Path | None = None
    """Where to clone; by default a temporary folder."""
    only: tuple[str, ...] = ()
    """Only commands that contain one of these texts; by default all."""


def commands() -> list[tuple[str, str]]:
    """(page, command) of every bash block, continued lines joined, without comments; each command once."""
    found, pages = {}, [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"\s&&\s", re.sub(r"(^|\s)#.*", "", line)):
                    words = " ".join(part.split())
                    if re.match(r"([A-Z_]+=\S+ )*(python|pip|grep|torchrun|lm_eval|vllm)\b", words):
                        found.setdefault(words, page.name)
    return [(page, command) for command, page in found.items()]


def run(command: str, python: Path, clone: Path, seconds: float) -> tuple[str, float, str]:
    """A command in the clone -> how it ended, its seconds, the last line that it printed."""
    started, note = time.perf_counter(), "to its end"
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as output:
        settings = {"cwd": clone, "env": environment, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(f"exec env {command}", shell=True, **settings)
        try:
            process.wait(seconds or None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            note = "stopped"
        code = process.wait()
        output.seek(0)
        last = ([line for line in output.read().splitlines() if line.strip()] or [""])[-1]
    return (note if code == 0 else f"FAILED ({code})"), time.perf_counter() - started, last


def main(args: Args) -> int:
    folder = args.folder or Path(tempfile.mkdtemp(prefix="newcomer_"))
    clone, python, failed = folder / "main", args.python, 0
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    if python is None:
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        python = folder / "venv" / "bin" / "python"
    log = open(folder / "newcomer.log", "w")

    def say(line: str):
        print(line, flush=True)
        print(line, file=log, flush=True)

    wanted = [x for x in commands() if not args.only or any(text in x[1] for text in args.only)]
    for page, command in wanted:
        own = command.startswith("pip install -r") and "tests" not in command and "benchmarks" not in command
        if re.search(ELSEWHERE, command) and not own:
            say(f"{page}: left out: {command[:150]}")
            continue
        if own and args.python:
            continue
        whole = own or re.search(r"--output-dir|\bevaluate\.py", command)
        ended, seconds, last = run(command, python, clone, 0 if whole else args.seconds)
        failed += ended.startswith("FAILED")
        say(f"{page}: {ended}, {seconds:.0f} s: {command[:150]}\n    {last[:150]}")
    say(f"{failed} commands failed; the log is {folder / 'newcomer.log'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
