"""Every side-by-side benchmark, one after the other, and docs/performance.md from what they measure.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/run.py                      # about 2 hours on 2 idle cores
    python benchmarks/run.py --rounds 1 --only sft_vs_trl grpo_vs_trl
    python benchmarks/run.py --data gsm8k/train.jsonl        # a local copy of the rows

Each writes its JSON into benchmarks/results/ and its figure into docs/img/ as it ends; one that fails is
named at the end, the others run all the same. Ratios of a machine with other work mean little: it is said.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

import tyro
from learning import ROOT, cpu_name

BENCHMARKS = ("sft_vs_trl", "dpo_vs_trl", "reward_vs_trl", "grpo_vs_trl", "merge_vs_mergekit")


@dataclass
class Args:
    only: tuple[str, ...] = BENCHMARKS
    """Which to run."""
    rounds: int = 3
    """How often each contender runs, in turns."""
    data: str = "openai/gsm8k"
    """What models are trained on: a hub dataset or a file."""


def main(args: Args) -> int:
    if unknown := set(args.only) - set(BENCHMARKS):
        print(f"error: --only {' '.join(unknown)}: there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    started, failed = time.perf_counter(), []
    print(f"{cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if os.getloadavg()[0] > 0.5:
        print("other programs are running: ratios will scatter")
    for n, name in enumerate(args.only, 1):
        print(f"[{n}/{len(args.only)}, {(time.perf_counter() - started) / 60:.0f} min] {name}", flush=True)
        command = [sys.executable, f"benchmarks/{name}.py", "--rounds", str(args.rounds)]
        command += ["--data", args.data] if name != "merge_vs_mergekit" else []
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(name)
    subprocess.run([sys.executable, "tests/sync_docs.py"], cwd=ROOT, check=True)
    print(f"failed: {', '.join(failed)}" if failed else "docs/performance.md is up to date")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
