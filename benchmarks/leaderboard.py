"""Every algorithm from one start on one budget of tokens: who learns the task, and at what cost.

    python benchmarks/leaderboard.py              # what leaderboard.json lacks; all of it: 2 hours on 2 cores
    python benchmarks/leaderboard.py --methods grpo dpo --seeds 1

Each method starts from tiny/sft and ends when it has sampled, or offline been trained on, `--budget` tokens.
Its learning rate is the best of three on prompts that no run trains on (`search`). With it new seeds run, and
the same code measures all models on the prompts of the test. benchmarks/results/leaderboard.json is written
after every run: what is there with the same command, budget and versions is not run again.
docs/leaderboard.md says what counts as a token, and what came out.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import tyro
from leaderboard_methods import (
    METHODS,
    NUM_PROMPTS,
    ONLINE,
    SEARCH_SEED,
    WORK,
    Method,
    command_of,
    load_tokenizer,
    rows_of,
    used_tokens,
    write_data,
)
from leaderboard_report import draw, summarise
from learning import ROOT, cpu_name

sys.path.insert(0, str(ROOT))

RESULT = ROOT / "benchmarks" / "results" / "leaderboard.json"


@dataclass
class Args:
    methods: tuple[str, ...] = tuple(METHODS)
    """Which of METHODS are run; the others keep the runs that they have."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the runs that count; the search has one of its own."""
    budget: int = 64_000
    """Tokens of a run: sampled ones, or trained ones where nothing is sampled."""
    samples: int = 4
    """Sampled answers of each of the 256 prompts of the search and of the test."""
    workers: int = 2
    """Runs at the same time, a thread each."""


# ------------------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------------------
def execute(command: str, folder: Path, enough=lambda: False) -> tuple[int, float, float]:
    """Run a script until it ends, or `enough()` -> its exit code, CPU seconds, peak resident size in GB."""
    words = [sys.executable, *command.split(), "--output-dir", str(folder)]
    words += ["--cache-dir", f"{folder}/cache"] if "distill.py" in command else []
    environment, told = os.environ | {"OMP_NUM_THREADS": "1"}, False
    with open(f"{folder}.log", "a") as log:
        process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, env=environment)
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        if not told and enough():
            process.send_signal(signal.SIGTERM)
            told = True
        time.sleep(0.3)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def run(name: str, rate: float, seed: int, args: Args) -> dict:
    """Train and measure -> what the result keeps of a run. One that diverges has an accuracy of 0."""
    folder, command = ROOT / WORK / f"{name}_{rate:g}_{seed}", command_of(name, rate, seed, args.budget)
    shutil.rmtree(folder, ignore_errors=True)
    enough = lambda: name == "dapo" and used_tokens(name, folder)[1] >= args.budget
    code, cpu, memory = execute(command, folder, enough)
    steps, tokens = used_tokens(name, folder)
    if code == 0 and not (folder / "model").exists():  # stopped at the budget: the model is in a checkpoint
        code, *_ = execute(re.sub(r"--max-steps \d+", f"--max-steps {steps} --resume", command), folder)
    last_words = Path(f"{folder}.log").read_text().strip().splitlines()[-1:]
    if code == 0:
        found = measure(folder / "model", seed, args.samples, test=seed != SEARCH_SEED)
    elif steps and code == 2:  # what scripts say of a loss or a gradient that is not finite
        found = {"accuracy": 0.0, "failed": last_words}
    else:
        raise RuntimeError(f"{command}: exit code {code}, {last_words}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    looks = [(line["step"], line.get("eval/reward", line.get("eval/accuracy"))) for line in lines]
    looks = [[round(step / max(1, steps), 3), y] for step, y in looks if y is not None]
    shutil.rmtree(folder)
    found |= {"steps": steps, "tokens": tokens, "cpu_seconds": round(cpu, 1), "memory_gb": round(memory, 3)}
    return conditions(name, rate, seed, args) | found | {"curve": looks if seed != SEARCH_SEED else []}


def versions() -> dict[str, str]:
    return {package: version(package) for package in ("torch", "transformers")}


def conditions(name: str, rate: float, seed: int, args: Args) -> dict:
    """What a run depends on."""
    command = f"python {command_of(name, rate, seed, args.budget)}"
    return {"command": command, "budget": args.budget, "samples": args.samples, "versions": versions()}


def measure(model_folder, seed: int, samples: int, test: bool) -> dict:
    """What a model can do on the prompts of the test, or of the search, and what it has lost."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    import common
    import rewards
    import sft

    torch.set_num_threads(1)
    tokenizer = load_tokenizer()
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32, attn_implementation="packed")
    model, ref_model = load(model_folder), load(ROOT / "tiny" / "sft")
    rows = rows_of("prompts_eval") if test else rows_of("prompts_train")[NUM_PROMPTS:]
    template = partial(tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=False)
    prompts = [list(template(row["prompt"])) for row in rows]

    def accuracy(temperature, count):
        """Share of right answers, and the answers with their log-probs: `count` of each prompt."""
        asked = [prompt for prompt in prompts for _ in range(count)]
        uniforms = torch.from_numpy(np.random.default_rng((seed, count)).random((len(asked), 128)))
        found = []
        for n in range(0, len(asked), 256):
            part = slice(n, n + 256)
            found += common.decode(model, asked[part], uniforms[part], [tokenizer.eos_token_id], temperature)
        texts = tokenizer.batch_decode([ids for ids, _ in found], skip_special_tokens=True)
        golds = [row["answer"] for row in rows for _ in range(count)]
        return mean(rewards.math_answer(asked, texts, golds)), asked, found

    def logprobs(model, sequences):
        """Log-probs of the trained tokens of each sequence."""
        out = [None] * len(sequences)
        for row in common.pack([len(ids) for ids, _ in sequences], 4096):
            batch = common.collate([sequences[i] for i in row])
            values = common.token_logprobs(model, batch)
            for place, i in enumerate(row):
                out[i] = values[batch.sequence_index == place]
        return out

    with torch.no_grad():
        sampled, asked, found = accuracy(1.0, samples)
        if not test:
            return {"accuracy": sampled}
        answers = [
            (np.array(x + ids), np.arange(len(x + ids)) >= len(x)) for x, (ids, _) in zip(asked, found)
        ]
        ref = logprobs(ref_model, answers)
        stories = sft.load_sequences(tokenizer, f"{ROOT}/tiny/data/text_eval.jsonl", "test", sft.Args())
        told = torch.cat(logprobs(model, stories))
        k1, k3 = (
            mean(estimate(mine, other).sum().item() for (_, mine), other in zip(found, ref))
            for estimate in (common.kl_k1, common.kl_k3)
        )
        return {
            "accuracy": sampled,
            "greedy": accuracy(0.0, 1)[0],
            "kl": k3,
            "kl_k1": k1,
            "length": mean(len(ids) for ids, _ in found),
            "truncated": mean(ids[-1] != tokenizer.eos_token_id for ids, _ in found),
            "perplexity": told.mean().neg().exp().item(),
        }


# ------------------------------------------------------------------------------------------------------------
# All runs
# ------------------------------------------------------------------------------------------------------------
def rates(method: Method) -> list[float]:
    """The three learning rates of the search: a third of the default, it, and three times as much."""
    return [float(f"{method.rate * factor:.0e}") for factor in (1 / 3, 1, 3)]


def searched(runs: dict) -> dict[str, dict[float, float]]:
    """The accuracies of the search by method and learning rate, of methods of which all three have run."""
    tried = {
        name: {rate: f"{name} {rate:g} {SEARCH_SEED}" for rate in rates(m)} for name, m in METHODS.items()
    }
    whole = {name: keys for name, keys in tried.items() if all(key in runs for key in keys.values())}
    return {name: {rate: runs[k]["accuracy"] for rate, k in keys.items()} for name, keys in whole.items()}


def chosen_rates(runs: dict) -> dict[str, float]:
    """The learning rate of the highest accuracy in the search."""
    return {name: max(found, key=found.get) for name, found in searched(runs).items()}


def missing(runs: dict, jobs: list[tuple], args: Args) -> list[tuple]:
    """The jobs, a method with its learning rate and seed each, without a run of the conditions of today."""
    kept = {job: runs.get("{} {:g} {}".format(*job), {}) for job in jobs}
    return [job for job in jobs if not conditions(*job, args).items() <= kept[job].items()]


def write(result: dict, args: Args):
    """The result with its summary, a line for each run; whole or not at all."""
    runs, labels = result["runs"], {name: method.label for name, method in METHODS.items()}
    result["search"] = {name: {f"{k:g}": x for k, x in y.items()} for name, y in searched(runs).items()}
    result["summary"] = summarise(runs, chosen_rates(runs), labels, args.seeds)
    head = json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=1)
    lines = ",\n".join(f'  "{key}": {json.dumps(value)}' for key, value in runs.items())
    RESULT.with_suffix(".partial").write_text(
        head.removesuffix("\n}") + f',\n "runs": {{\n{lines}\n }}\n}}\n'
    )
    RESULT.with_suffix(".partial").rename(RESULT)


def main(args: Args):
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"runs": {}}
    result |= {"command": "python benchmarks/leaderboard.py", "budget": args.budget, "versions": versions()}
    result |= {"machine": {"cpu": cpu_name(), "cores": os.cpu_count()}}
    runs, teacher = result["runs"], ROOT / WORK / "teacher"
    write_data()
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:

        def work_off(jobs):
            waiting = {pool.submit(run, *job, args): job for job in missing(runs, jobs, args)}
            for number, future in enumerate(as_completed(waiting), 1):
                name, rate, seed = waiting[future]
                try:
                    found = runs[f"{name} {rate:g} {seed}"] = future.result()
                except RuntimeError as error:  # it is missing the next time, too
                    print(f"{name} {rate:g} seed {seed}: {error}", flush=True)
                    continue
                told = "  ".join(f"{key} {found[key]:.4g}" for key in ("accuracy", "tokens", "cpu_seconds"))
                print(f"{number}/{len(waiting)} {name} {rate:g} seed {seed}: {told}", flush=True)
                write(result, args)

        command = f"grpo.py {ONLINE} --eval-every 0 --save-every 0"
        if not (teacher / "model").exists():
            shutil.rmtree(teacher, ignore_errors=True)
            execute(command, teacher)
        if "teacher" not in result:
            steps, tokens = used_tokens("grpo", teacher)
            found = pool.submit(measure, teacher / "model", 1, args.samples, test=True).result()
            result["teacher"] = {"command": f"python {command}", "steps": steps, "tokens": tokens} | found
        if "start" not in result:
            result["start"] = pool.submit(measure, ROOT / "tiny" / "sft", 1, args.samples, test=True).result()
        work_off([(name, rates(METHODS[name])[n], SEARCH_SEED) for n in (1, 2, 0) for name in args.methods])
        chosen = chosen_rates(runs)
        work_off(
            [(name, chosen[name], seed) for seed in args.seeds for name in args.methods if name in chosen]
        )
    draw(result, ROOT / "docs" / "img" / "leaderboard.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
