"""DPO of one model on the same pairs by dpo.py and by TRL's DPOTrainer: pairs per second and peak memory.

The model, its tokenizer and the way of measuring are those of sft_vs_trl.py. A pair is a question of GSM8K
with its own answer, and with one that has other digits in its last two lines. What is compared (CONTENDERS
has the settings):

    cleanpost_live   dpo.py as it is, with the reference in memory: `dpo.main --ref live`
    cleanpost_cached dpo.py with its default: the reference's log-probs come from one pass before training
    trl_shipped      TRL with its defaults: reference in memory, bfloat16 autocast, gradient checkpointing
    trl_tuned        the same, float32, no gradient checkpointing: the batches and the arithmetic of dpo.py,
                     so that the losses of both can be compared, step by step
    trl_precomputed  as trl_tuned, with the reference's log-probs from one pass before training

TRL 1.16 has no packing for DPO: all of its batches are padded. With the reference in memory it is another
random model: were it the starting policy, the loss of step 1 would be ln 2 for any program. Where its
log-probs come from a pass before training it is the starting policy, so that neither keeps a second model.

Each runs in a process of its own, one after the other, in rounds (A B C A B C ...). A step is timed from its
beginning to the end of its update, without logging and saving; TRL's collation lies outside of that, ours
inside. The first `--warmup` steps are not counted, nor is the pass before training, which is reported by
itself (`prepass_seconds`; dpo.py has one with a live reference, too, when that is not its starting policy:
to log how far the chosen answers drift). Tokens are real ones, and the same for all: those of both answers,
each with its prompt, without padding, although dpo.py has the prompt of a pair in its row once.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/dpo_vs_trl.py                                  # about 9 minutes on 2 idle cores
    python benchmarks/dpo_vs_trl.py --rounds 1 --steps 2 --warmup 1  # a rough look
"""

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import sft_vs_trl as shared
import tyro
from sft_vs_trl import ROOT

CONTENDERS = {  # name: label, settings of dpo.Args or DPOConfig beside those that all share
    "cleanpost_live": ("CleanPost", {"ref": "live"}),
    "cleanpost_cached": ("CleanPost, cached", {}),
    "trl_shipped": ("TRL as shipped", {}),
    "trl_tuned": ("TRL tuned", {"bf16": False, "gradient_checkpointing": False}),
    "trl_precomputed": (  # in batches of `precompute_ref_batch_size` pairs: by default those of training
        "TRL tuned, precomputed",
        {"bf16": False, "gradient_checkpointing": False, "precompute_ref_log_probs": True},
    ),
}
COMPARED = {  # with which of ours
    "trl_shipped": "cleanpost_live",
    "trl_tuned": "cleanpost_live",
    "trl_precomputed": "cleanpost_cached",
}
TARGETS = {  # pairs per second of ours over theirs, at least; peak memory over theirs, at most
    "speed": {"trl_shipped": 3.5, "trl_tuned": 4.0, "trl_precomputed": 3.5},
    "memory": {"trl_shipped": 0.4, "trl_tuned": 0.4},
    "first_step_loss": 1e-4,
}
BETA = 0.1  # TRL's default
OTHER_DIGITS = str.maketrans("0123456789", "1234567891")


@dataclass
class Args(shared.Args):
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    """Which to run, and in which order."""
    steps: int = 5
    """Optimizer steps that are timed."""
    warmup: int = 2
    """Optimizer steps before them."""
    batch_size: int = 8
    """Pairs per optimizer step (TRL: 8)."""
    learning_rate: float = 2e-5
    """Peak learning rate of AdamW, linear to 0 (TRL: 1e-6, with which the losses would hardly move)."""
    seed: int = 1
    """Seed of the model's weights; the reference's is one higher."""
    output: Path = ROOT / "benchmarks" / "results" / "dpo_vs_trl.json"
    """The file of results."""
    plot: Path | None = ROOT / "docs" / "img" / "dpo_vs_trl.png"
    """The bar plot of the results; None for none."""


# ------------------------------------------------------------------------------------------------------------
# In a process of its own
# ------------------------------------------------------------------------------------------------------------
def corrupt(answer: str) -> str:
    """The answer with other digits in its last two lines: the last calculation and the result."""
    lines = answer.split("\n")
    return "\n".join(lines[:-2] + [line.translate(OTHER_DIGITS) for line in lines[-2:]])


def prepare(args: Args, folder: Path) -> dict:
    """Write the pairs, the tokenizer, the model and the reference into `folder`; describe them."""
    rows = shared.load_rows(args.data)
    tokenizer = shared.make_tokenizer(rows)
    described = shared.write_model(tokenizer, args.seed, folder / "model")
    shared.write_model(tokenizer, args.seed + 1, folder / "reference")

    rows = rows[: (args.warmup + args.steps) * args.batch_size]
    assert len(rows) == (args.warmup + args.steps) * args.batch_size, "too few rows for so many steps"
    pairs = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "chosen": [{"role": "assistant", "content": row["answer"]}],
            "rejected": [{"role": "assistant", "content": corrupt(row["answer"])}],
        }
        for row in rows
    ]
    lines = [json.dumps(pair) + "\n" for pair in pairs]
    assert len(set(lines)) == len(lines) and all(pair["chosen"] != pair["rejected"] for pair in pairs)
    (folder / "rows.jsonl").write_text("".join(lines))
    prompt_lengths, lengths = [], {"chosen": [], "rejected": []}
    for pair in pairs:
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
        prompt_lengths.append(len(prompt))
        for key, of_answers in lengths.items():
            whole = tokenizer.apply_chat_template(pair["prompt"] + pair[key], return_dict=False)
            assert whole[: len(prompt)] == prompt
            of_answers.append(len(whole))
    longest = max(map(max, lengths.values()))
    assert longest <= 1024, "both programs would shorten or drop longer ones, each in its way"
    of_pairs = [sum(both) for both in zip(*lengths.values())]
    steps = range(args.batch_size, len(pairs) + 1, args.batch_size)
    return (
        described
        | {
            "pairs": len(pairs),
            "rows_sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
            "tokens": sum(of_pairs),
            "prompt_tokens": sum(prompt_lengths),  # counted once a pair
            "trained_tokens": {key: sum(x) - sum(prompt_lengths) for key, x in lengths.items()},
            "longest_sequence": longest,
            "tokens_up_to_step": [sum(of_pairs[:end]) for end in steps],
        }
    )


def timed(owner, name: str) -> list[float]:
    """Replace a function by itself with a clock: the seconds of its calls, in a list that grows."""
    seconds, function = [], getattr(owner, name)

    def with_clock(*arguments, **more):
        started = time.perf_counter()
        result = function(*arguments, **more)
        seconds.append(time.perf_counter() - started)
        return result

    setattr(owner, name, with_clock)
    return seconds


def run_cleanpost(args: Args, folder: Path) -> dict:
    """dpo.py as a user runs it, without evaluation."""
    sys.path.insert(0, str(ROOT))
    import dpo

    settings, seconds = CONTENDERS[args.only][1], timed(dpo, "pair_logps")
    if settings.get("ref") == "live":
        settings = settings | {"ref_model": str(folder / "reference")}
    dpo.np.random.default_rng = lambda seed: SimpleNamespace(permutation=np.arange)  # TRL's order: as given
    run = shared.run_cleanpost(args, folder, "dpo", beta=BETA, **settings)
    return run | {"prepass_seconds": sum(seconds)}


def run_trl(args: Args, folder: Path) -> dict:
    """DPOTrainer on the same pairs."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    seconds, reference = timed(DPOTrainer, "_precompute_ref_logps"), None  # the model is loaded before
    settings = shared.trl_settings(args, CONTENDERS[args.only][1] | {"beta": BETA})
    if not settings.get("precompute_ref_log_probs"):
        reference = AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=torch.float32)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    trainer = DPOTrainer(
        model=str(folder / "model"),
        ref_model=reference,
        args=DPOConfig(output_dir=str(folder / "run"), **settings),
        train_dataset=Dataset.from_list(rows),
    )
    return shared.train_trl(trainer) | {"prepass_seconds": sum(seconds)}


def run(args: Args, folder: Path) -> dict:
    """One contender; its tokens are counted as TRL processes them: a prompt with each of its answers."""
    result = (run_cleanpost if args.only.startswith("cleanpost") else run_trl)(args, folder)
    tokens = json.loads((folder / "prepare.json").read_text())["tokens_up_to_step"]
    assert args.only.startswith("cleanpost") or result["total_tokens"] == tokens, result["total_tokens"]
    return result | {"total_tokens": tokens}


# ------------------------------------------------------------------------------------------------------------
# The rounds
# ------------------------------------------------------------------------------------------------------------
def figures(run: dict, args: Args) -> dict:
    """Pairs per second and the rest of one run, its warm-up left out."""
    seconds = run["seconds"][args.warmup :]
    return {
        "pairs_per_second": args.batch_size * len(seconds) / sum(seconds),
        **shared.figures(run, args.warmup),
        "prepass_seconds": run["prepass_seconds"],
    }


def table(result: dict) -> str:
    """The results as lines for the terminal."""
    titles = ("pairs/s", "(min - max)", "tokens/s", "ours / it", "peak GB", "ours / it", "loss 1", "before")
    lines = ["{:26}{:>8}{:>16}{:>10}{:>11}{:>9}{:>11}{:>9}{:>9}".format("", *titles)]
    for name, figure in result["contenders"].items():
        speed, memory = figure["pairs_per_second"], figure["peak_memory_gb"]
        ratios = [result[key].get(name, {}).get("median") for key in ("speed_ratio", "memory_ratio")]
        faster, smaller = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        tokens = figure["tokens_per_second"]["median"]
        lines.append(
            f"{figure['label']:26}{speed['median']:>8.2f}{speed['min']:>8.2f} - {speed['max']:>5.2f}"
            f"{tokens:>10,.0f}{faster:>11}{memory['median']:>9.2f}{smaller:>11}"
            f"{figure['first_step_loss']['median']:>9.4f}{figure['prepass_seconds']['median']:>7.1f} s"
        )
    return "\n".join(lines + shared.target_lines(result))


def main(args: Args):
    def show(name: str, run: dict) -> str:
        return f"{CONTENDERS[name][0]:26}{figures(run, args)['pairs_per_second']:>8.2f} pairs/s"

    conditions, runs = shared.run_rounds(__file__, args, show)
    conditions |= {
        "beta": BETA,
        "cleanpost_settings": {n: CONTENDERS[n][1] for n in args.contenders if n.startswith("cleanpost")},
        "trl_settings": {
            name: shared.trl_settings(args, CONTENDERS[name][1] | {"beta": BETA})
            for name in args.contenders
            if name.startswith("trl")
        },
        "reference": "live: a random model of another seed; cached and precomputed: the starting policy",
        "units": "pairs; tokens without padding, of both answers, each with its prompt; seconds of optimizer "
        "steps, and of the pass before them; resident GB of 1e9 bytes",
    }
    rounds = {name: [figures(run, args) for run in of_name] for name, of_name in runs.items()}
    same_batches = ("cleanpost_live", "trl_tuned")
    compared = shared.compare(rounds, runs, CONTENDERS, TARGETS, COMPARED, same_batches, "pairs_per_second")
    result = {"benchmark": "dpo_vs_trl", "conditions": conditions} | compared
    two = ("cleanpost_cached", "trl_precomputed")
    if set(two) <= set(runs):
        result["loss_difference_precomputed"] = shared.loss_gaps(runs, *two)
    result["losses"] = {name: of_name[0]["losses"] for name, of_name in runs.items()}
    panels = {
        "pairs_per_second": ("pairs per second", ".2f"),
        "peak_memory_gb": ("peak memory, GB", ".2f"),
    }
    shared.finish(args, result, table(result), panels)


if __name__ == "__main__":
    parsed = tyro.cli(Args)
    shared.run_only(parsed, prepare if parsed.only == "prepare" else run) if parsed.only else main(parsed)
