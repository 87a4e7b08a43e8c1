"""GRPO of one model on the same prompts by grpo.py and by TRL's GRPOTrainer: completions per second, memory.

The model, its tokenizer and the way of measuring are those of sft_vs_trl.py. A prompt is a question of GSM8K
in the chat format. Both sample 8 completions of each of 8 prompts a step, at temperature 1, and make one
update of them, without a KL in the loss. The model is random: what it writes is noise, rewarded for every
letter e, and it does not stop before the 64 new tokens, except by chance (1 token in 23,000 is an end token).
What is compared (CONTENDERS has the settings):

    cleanpost    grpo.py as it is, without the KL as a metric (--log-every): TRL does not measure it, either
    cleanpost_bf16  the same with --dtype bfloat16
    trl_shipped  TRL with its defaults: bfloat16 autocast, gradient checkpointing, 8 completions at a time;
                 8 such batches make one update, and one generation is for all of them
    trl_tuned    the same, float32, no gradient checkpointing
    trl_at_once  as trl_tuned, with all completions in one batch
    replay       grpo.py on the rollouts of trl_tuned, for a comparison of the gradients: not timed

Each runs in a process of its own, one after the other, in rounds (A B C A B C ...). A step is timed from its
beginning to the end of its update: rollout, rewards, log-probs, update, but neither logging nor saving. The
first `--warmup` steps are not counted. `seconds_...` splits a step. The sampled tokens differ, but not their
number: that of the prompts is checked to be equal, that of the completions to be the largest possible, but
for 3 % that chance may take.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/grpo_vs_trl.py                                  # about 20 minutes on 2 idle cores
    python benchmarks/grpo_vs_trl.py --rounds 1 --steps 1 --warmup 1  # a rough look
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import dpo_vs_trl
import numpy as np
import sft_vs_trl as shared
import torch
import tyro
from sft_vs_trl import ROOT

GROUP, NEW_TOKENS = 8, 64  # completions of a prompt, tokens of a completion
TRAINED_AT_ONCE = 8  # completions: TRL's default
CONTENDERS = {  # name: label, settings of GRPOConfig beside those that all share
    "cleanpost": ("CleanPost", {}),
    "cleanpost_bf16": ("CleanPost bfloat16", {}),
    "trl_shipped": ("TRL as shipped", {}),
    "trl_tuned": ("TRL tuned", {"bf16": False, "gradient_checkpointing": False}),
    "trl_at_once": (
        "TRL tuned, one batch",
        {"bf16": False, "gradient_checkpointing": False, "gradient_accumulation_steps": 1},
    ),
    "replay": ("CleanPost, replayed", {}),
}
COMPARED = {name: "cleanpost" for name in CONTENDERS if name.startswith("trl")}  # with which of ours
TARGETS = {  # completions per second of ours over theirs, at least; peak memory over theirs, at most
    "speed": {"trl_shipped": 2.8},
    "memory": {"trl_shipped": 0.35},
    "first_step_loss": 1e-4,  # of replay and trl_tuned
    "first_step_grad_norm": 1e-3,  # the same, relative: with a loss of 0 at ratio 1 this one tells
}
PARTS = ("generate", "score", "logprobs", "update", "other")


@dataclass
class Args(shared.Args):
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    """Which to run, and in which order; replay comes after trl_tuned."""
    steps: int = 4
    """Optimizer steps that are timed."""
    warmup: int = 2
    """Optimizer steps before them."""
    batch_size: int = 64
    """Completions per optimizer step, 8 of each prompt."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW, linear to 0 (TRL: 1e-6)."""
    output: Path = ROOT / "benchmarks" / "results" / "grpo_vs_trl.json"
    """The file of results."""
    plot: Path | None = ROOT / "docs" / "img" / "grpo_vs_trl.png"
    """The bar plot of the results; None for none."""


# ------------------------------------------------------------------------------------------------------------
# In a process of its own
# ------------------------------------------------------------------------------------------------------------
def letters_e(completions, **_) -> list[float]:
    """The reward of both programs: how many letters e a completion has."""
    return [float(messages[0]["content"].count("e")) for messages in completions]


def prepare(args: Args, folder: Path) -> dict:
    """Write the prompts, the tokenizer and the model into `folder`; describe them."""
    rows = shared.load_rows(args.data)
    tokenizer = shared.make_tokenizer(rows)
    described = shared.write_model(tokenizer, args.seed, folder / "model")
    of_step, steps = args.batch_size // GROUP, args.warmup + args.steps
    rows = rows[: steps * of_step]
    assert len(rows) == steps * of_step and args.batch_size % GROUP == 0
    asked = [{"prompt": [{"role": "user", "content": row["question"]}]} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    options = {"add_generation_prompt": True, "return_dict": False}
    lengths = [len(tokenizer.apply_chat_template(row["prompt"], **options)) for row in asked]
    assert max(lengths) <= 512, "grpo.py would drop longer ones"
    return described | {
        "prompts": len(rows),
        "longest_prompt": max(lengths),
        "prompt_tokens_of_steps": [
            GROUP * sum(lengths[start : start + of_step]) for start in range(0, len(rows), of_step)
        ],
    }


def run_cleanpost(args: Args, folder: Path) -> dict:
    """grpo.py as a user runs it, without evaluation; `replay` takes the rollouts of trl_tuned for its own."""
    sys.path.insert(0, str(ROOT))
    import grpo

    path, rows = folder / "in_order.jsonl", (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    order = np.random.default_rng(grpo.Args.seed).permutation(len(rows))  # of grpo.py, here undone
    path.write_text("".join(rows[i] for i in np.argsort(order)))
    if args.only == "replay":
        assert (folder / "rollouts.jsonl").exists(), "replay needs trl_tuned before it"
        grpo.roll_out = replay(grpo, folder / "rollouts.jsonl")
    rolled_out, scored = (dpo_vs_trl.timed(grpo, name) for name in ("roll_out", "score"))
    loaded, load_model = [], grpo.load_model

    def load_and_look(*arguments):
        model = load_model(*arguments)
        loaded.append(shared.resident_gb())
        return model

    grpo.load_model = load_and_look
    flags = grpo.Args(
        model=str(folder / "model"),
        dtype="bfloat16" if args.only == "cleanpost_bf16" else "float32",
        dataset=(str(path),),
        reward=(f"{Path(__file__).resolve()}:letters_e",),
        num_generations=GROUP,
        max_completion_length=NEW_TOKENS,
        learning_rate=args.learning_rate,
        lr_schedule="linear",
        warmup_steps=0,
        batch_size=args.batch_size,
        max_steps=args.warmup + args.steps,
        eval_every=0,
        save_every=0,
        log_every=1000,  # so no reference is loaded; TRL has none, either
        output_dir=str(folder / "run"),
    )
    grpo.main(flags)
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if line["step"] > 0]
    seconds = [line["step_time"] for line in steps]
    scored = [a + b for a, b in zip(scored[::2], scored[1::2], strict=True)]  # rewards, and no gold rewards
    rests = zip(seconds, rolled_out, scored, strict=True)
    parts = {"generate": rolled_out, "score": scored, "update": [whole - a - b for whole, a, b in rests]}
    return {
        "seconds": seconds,
        "total_tokens": [line["num_tokens"] for line in steps],
        "losses": [line["loss"] for line in steps],
        "loaded_memory_gb": loaded[-1],
        "parts": parts | {"logprobs": [0.0] * len(steps), "other": [0.0] * len(steps)},
        "completion_tokens": [round(line["completions/mean_length"] * args.batch_size) for line in steps],
        "grad_norms": [line["grad_norm"] for line in steps],
        "rewards": [line["reward"] for line in steps],
    }


def replay(grpo, path: Path):
    """A stand-in for grpo.roll_out: the rollouts of `path`, step after step."""
    rollouts = {}
    for line in map(json.loads, path.read_text().splitlines()):
        rollouts.setdefault(line["step"], []).append(line)
    steps = iter(rollouts.values())

    def roll_out(policy, tokenizer, *_):
        completions = []
        for line in next(steps):
            ids, logprobs = line["token_ids"], torch.zeros(len(line["token_ids"]))  # TRL's are unknown
            prompt = grpo.Prompt(line["prompt_ids"], line["row"], "")
            text = tokenizer.decode(ids, skip_special_tokens=True)
            ended = ids[-1] == tokenizer.eos_token_id
            completions.append(grpo.Completion(prompt, ids, logprobs, text, ended))
        return completions

    return roll_out


def trl_settings(args: Args, name: str) -> dict:
    """What GRPOConfig is given."""
    overrides = {"gradient_accumulation_steps": args.batch_size // TRAINED_AT_ONCE} | CONTENDERS[name][1]
    batches = overrides["gradient_accumulation_steps"]  # of one update, and by default of one generation
    return shared.trl_settings(args, overrides) | {
        "per_device_train_batch_size": args.batch_size // batches,
        "num_generations": GROUP,
        "max_completion_length": NEW_TOKENS,
        "loss_type": "grpo",  # TRL: dapo, the same for completions of equal length
        "shuffle_dataset": False,
    }


def run_trl(args: Args, folder: Path) -> dict:
    """GRPOTrainer on the same prompts; its rollouts are kept for `replay`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    generate, rollouts = GRPOTrainer._generate, []

    def generate_and_keep(*arguments):
        result = generate(*arguments)
        rollouts.append(result[:2])  # token ids of the prompts, and of the completions
        return result

    GRPOTrainer._generate = generate_and_keep
    parts = ("_generate", "_calculate_rewards", "_generate_and_score_completions")
    generated, scored, both = (dpo_vs_trl.timed(GRPOTrainer, name) for name in parts)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    trainer = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=[letters_e],
        args=GRPOConfig(output_dir=str(folder / "run"), **trl_settings(args, args.only)),
        train_dataset=Dataset.from_list(rows),
    )
    run = shared.train_trl(trainer)
    steps = [line for line in trainer.state.log_history if "loss" in line]
    assert len(rollouts) == len(steps), "not one generation for every update"
    if args.only == "trl_tuned":
        keep_rollouts(rollouts, rows, folder / "rollouts.jsonl")
    return run | {
        "parts": {
            "generate": generated,
            "score": scored,
            "logprobs": [0.0] * len(steps),  # those of the reference: without a KL in the loss none
            "update": [whole - before for whole, before in zip(run["seconds"], both, strict=True)],
            "other": [b - g - s for b, g, s in zip(both, generated, scored, strict=True)],
        },
        "completion_tokens": [sum(map(len, completion_ids)) for _, completion_ids in rollouts],
        "grad_norms": [line["grad_norm"] for line in steps],
        "rewards": [line["reward"] for line in steps],
    }


def keep_rollouts(rollouts: list[tuple], rows: list[dict], path: Path):
    """Write TRL's rollouts as `replay` reads them."""
    lines = []
    for step, (prompt_ids, completion_ids) in enumerate(rollouts):
        for n, (asked, sampled) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            row = rows[(step * len(prompt_ids) + n) // GROUP]
            ids = {"prompt_ids": list(asked), "token_ids": list(sampled)}
            lines.append(json.dumps({"step": step + 1, "row": row} | ids) + "\n")
    path.write_text("".join(lines))


def run(args: Args, folder: Path) -> dict:
    """One contender, whose prompts and numbers of tokens are checked to be those of the others."""
    result = (run_trl if args.only.startswith("trl") else run_cleanpost)(args, folder)
    expected = json.loads((folder / "prepare.json").read_text())["prompt_tokens_of_steps"]
    up_to_step, totals = 0, []
    for prompt_tokens, completion_tokens in zip(expected, result["completion_tokens"], strict=True):
        assert 0.97 * NEW_TOKENS * args.batch_size <= completion_tokens <= NEW_TOKENS * args.batch_size
        up_to_step += prompt_tokens + completion_tokens
        totals.append(up_to_step)
    assert result["total_tokens"] == totals, (result["total_tokens"], totals)
    return result


# ------------------------------------------------------------------------------------------------------------
# The rounds
# ------------------------------------------------------------------------------------------------------------
def figures(run: dict, args: Args) -> dict:
    """Completions per second, the parts of a step and the rest of one run, its warm-up left out."""
    seconds = run["seconds"][args.warmup :]
    return {
        "completions_per_second": args.batch_size * len(seconds) / sum(seconds),
        **shared.figures(run, args.warmup),
        "completion_tokens_per_step": sum(run["completion_tokens"][args.warmup :]) / len(seconds),
        **{f"seconds_{part}": median(run["parts"][part][args.warmup :]) for part in PARTS},
    }


def compare_replay(result: dict, runs: dict[str, list[dict]]):
    """Add how far gradients and rewards of grpo.py lie from TRL's, on TRL's rollouts of the first round."""
    ours, theirs = runs["replay"][0], runs["trl_tuned"][0]
    gaps = {
        key: [abs(a - b) / abs(b) for a, b in zip(ours[key], theirs[key], strict=True)]
        for key in ("grad_norms", "rewards")
    }
    result["replay_difference"] = {
        key: {"first_step": relative[0], "largest_of_all_steps": max(relative)}
        for key, relative in gaps.items()
    }
    target, value = TARGETS["first_step_grad_norm"], gaps["grad_norms"][0]
    reached = {"target": target, "value": value, "met": value <= target}
    result["targets"]["first_step_grad_norm"] = reached


def table(result: dict) -> str:
    """The results as lines for the terminal."""
    titles = ("compl./s", "(min - max)", "ours / it", "peak GB", "ours / it", *PARTS)
    lines = ["{:22}{:>9}{:>16}{:>11}{:>9}{:>11}{:>10}{:>8}{:>10}{:>8}{:>8}".format("", *titles)]
    for name, figure in result["contenders"].items():
        speed, memory = figure["completions_per_second"], figure["peak_memory_gb"]
        ratios = [result[key].get(name, {}).get("median") for key in ("speed_ratio", "memory_ratio")]
        faster, smaller = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        parts = [figure[f"seconds_{part}"]["median"] for part in PARTS]
        lines.append(
            f"{figure['label']:22}{speed['median']:>9.2f}{speed['min']:>8.2f} - {speed['max']:>5.2f}"
            f"{faster:>11}{memory['median']:>9.2f}{smaller:>11}"
            + "{:>8.2f} s{:>6.2f} s{:>8.2f} s{:>6.2f} s{:>6.2f} s".format(*parts)
        )
    return "\n".join(lines + shared.target_lines(result))


def main(args: Args):
    def show(name: str, run: dict) -> str:
        if name == "replay":
            return f"{CONTENDERS[name][0]:22}gradient norm {run['grad_norms'][0]:.4f} at step 1"
        return f"{CONTENDERS[name][0]:22}{figures(run, args)['completions_per_second']:>8.2f} completions/s"

    conditions, runs = shared.run_rounds(__file__, args, show)
    conditions |= {
        "num_generations": GROUP,
        "max_completion_length": NEW_TOKENS,
        "temperature": 1.0,
        "beta": 0.0,
        "trl_settings": {n: trl_settings(args, n) for n in args.contenders if n.startswith("trl")},
        "units": "completions; tokens without padding, of completions, each with its prompt; seconds of "
        "optimizer steps and, as medians, of their parts; resident GB of 1e9 bytes",
    }
    rounds = {
        name: [figures(run, args) for run in of_name] for name, of_name in runs.items() if name != "replay"
    }
    replayed = ("replay", "trl_tuned")
    compared = shared.compare(rounds, runs, CONTENDERS, TARGETS, COMPARED, replayed, "completions_per_second")
    result = {"benchmark": "grpo_vs_trl", "conditions": conditions} | compared
    if set(replayed) <= set(runs):
        compare_replay(result, runs)
    for key in ("losses", "grad_norms", "rewards"):
        result[key] = {name: of_name[0][key] for name, of_name in runs.items()}
    panels = {
        "completions_per_second": ("completions per second", ".2f"),
        "peak_memory_gb": ("peak memory, GB", ".2f"),
    }
    shared.finish(args, result, table(result), panels)


if __name__ == "__main__":
    parsed = tyro.cli(Args)
    shared.run_only(parsed, prepare if parsed.only == "prepare" else run) if parsed.only else main(parsed)
