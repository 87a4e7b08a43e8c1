"""A reward model of the same pairs by reward_model.py and by TRL's RewardTrainer: pairs per second, memory.

The model, its tokenizer and the way of measuring are those of sft_vs_trl.py; the pairs are those of
dpo_vs_trl.py. The model is saved with its head, so that both programs begin with the same one, and its
padding token is not the end token: TRL would read the reward one token too early. What is compared
(CONTENDERS has the settings):

    cleanpost        reward_model.py as it is, with the centring loss off: `--center-coef 0`, TRL's default
    trl_shipped      TRL with its defaults: bfloat16 autocast, gradient checkpointing
    trl_tuned        the same, float32, no gradient checkpointing: the batches and the arithmetic of
                     reward_model.py, so that the losses of both can be compared, step by step

TRL 1.16 has no packing for reward models: all of its batches are padded. Each runs in a process of its own,
one after the other, in rounds (A B C A B C ...). A step is timed from its beginning to the end of its update,
without logging and saving; TRL's collation lies outside of that, ours inside. The first `--warmup` steps are
not counted. After training reward_model.py scores 1,000 pairs, to move their mean reward to 0:
`centring_seconds` has what that takes, outside of the timed steps. Tokens are real ones, and the same for
all: those of both answers, each with its prompt, without padding.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/reward_vs_trl.py                                  # about 6 minutes on 2 idle cores
    python benchmarks/reward_vs_trl.py --rounds 1 --steps 2 --warmup 1  # a rough look
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import dpo_vs_trl
import numpy as np
import sft_vs_trl as shared
import tyro
from sft_vs_trl import ROOT

CENTER_COEF = 0.0  # of both: TRL's default
CONTENDERS = {  # name: label, settings of reward_model.Args or RewardConfig beside those that all share
    "cleanpost": ("CleanPost", {}),
    "trl_shipped": ("TRL as shipped", {}),
    "trl_tuned": ("TRL tuned", {"bf16": False, "gradient_checkpointing": False}),
}
COMPARED = {"trl_shipped": "cleanpost", "trl_tuned": "cleanpost"}  # with which of ours
TARGETS = {  # pairs per second of ours over theirs, at least; peak memory over theirs, at most
    "speed": {"trl_shipped": 1.5, "trl_tuned": 1.8},
    "memory": {"trl_shipped": 0.6, "trl_tuned": 0.6},
    "first_step_loss": 1e-4,
}


@dataclass
class Args(shared.Args):
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    """Which to run, and in which order."""
    steps: int = 8
    """Optimizer steps that are timed."""
    warmup: int = 2
    """Optimizer steps before them."""
    batch_size: int = 8
    """Pairs per optimizer step (TRL: 8)."""
    learning_rate: float = 2e-5
    """Peak learning rate of AdamW, linear to 0 (TRL: 1e-4)."""
    seed: int = 1
    """Seed of the model's weights; the head's is one higher."""
    output: Path = ROOT / "benchmarks" / "results" / "reward_vs_trl.json"
    """The file of results."""
    plot: Path | None = ROOT / "docs" / "img" / "reward_vs_trl.png"
    """The bar plot of the results; None for none."""


# ------------------------------------------------------------------------------------------------------------
# In a process of its own
# ------------------------------------------------------------------------------------------------------------
def prepare(args: Args, folder: Path) -> dict:
    """Write the pairs, the tokenizer and the model with its head into `folder`; describe them."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    described = dpo_vs_trl.prepare(args, folder)
    torch.manual_seed(args.seed + 1)
    options = {"num_labels": 1, "dtype": torch.float32}
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", **options)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    model.save_pretrained(folder / "judge")  # not over the file that it may still be mapped from
    tokenizer.save_pretrained(folder / "judge")
    for name in ("model", "reference"):
        shutil.rmtree(folder / name)
    (folder / "judge").rename(folder / "model")
    del described["trained_tokens"]  # a reward model is trained at one token of each answer
    kind = {"architecture": type(model).__name__, "parameters": model.num_parameters()}
    return described | {"model": described["model"] | kind}


def run_cleanpost(args: Args, folder: Path) -> dict:
    """reward_model.py as a user runs it, without evaluation."""
    sys.path.insert(0, str(ROOT))
    import reward_model

    seconds = dpo_vs_trl.timed(reward_model, "answer_scores")  # without evaluation centring alone calls it
    settings = {"center_coef": CENTER_COEF} | CONTENDERS[args.only][1]
    np.random.default_rng = lambda seed: SimpleNamespace(permutation=np.arange)  # TRL's order: as given
    run = shared.run_cleanpost(args, folder, "reward_model", **settings)
    return run | {"centring_seconds": sum(seconds)}


def trl_settings(args: Args, name: str) -> dict:
    """What RewardConfig is given."""
    return shared.trl_settings(args, CONTENDERS[name][1] | {"center_rewards_coefficient": CENTER_COEF})


def run_trl(args: Args, folder: Path) -> dict:
    """RewardTrainer on the same pairs."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    trainer = RewardTrainer(
        model=str(folder / "model"),
        args=RewardConfig(output_dir=str(folder / "run"), **trl_settings(args, args.only)),
        train_dataset=Dataset.from_list(rows),
    )
    return shared.train_trl(trainer) | {"centring_seconds": 0.0}


def run(args: Args, folder: Path) -> dict:
    """One contender; its tokens are counted as all but those that share prompts process them."""
    result = (run_cleanpost if args.only.startswith("cleanpost") else run_trl)(args, folder)
    tokens = json.loads((folder / "prepare.json").read_text())["tokens_up_to_step"]
    assert args.only == "cleanpost" or result["total_tokens"] == tokens, result["total_tokens"]
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
        "centring_seconds": run["centring_seconds"],
    }


def table(result: dict) -> str:
    """The results as lines for the terminal."""
    titles = ("pairs/s", "(min - max)", "tokens/s", "ours / it", "peak GB", "ours / it", "loss 1", "centring")
    lines = ["{:26}{:>8}{:>16}{:>10}{:>11}{:>9}{:>11}{:>9}{:>10}".format("", *titles)]
    for name, figure in result["contenders"].items():
        speed, memory = figure["pairs_per_second"], figure["peak_memory_gb"]
        ratios = [result[key].get(name, {}).get("median") for key in ("speed_ratio", "memory_ratio")]
        faster, smaller = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        tokens = figure["tokens_per_second"]["median"]
        lines.append(
            f"{figure['label']:26}{speed['median']:>8.2f}{speed['min']:>8.2f} - {speed['max']:>5.2f}"
            f"{tokens:>10,.0f}{faster:>11}{memory['median']:>9.2f}{smaller:>11}"
            f"{figure['first_step_loss']['median']:>9.4f}{figure['centring_seconds']['median']:>8.1f} s"
        )
    return "\n".join(lines + shared.target_lines(result))


def main(args: Args):
    def show(name: str, run: dict) -> str:
        return f"{CONTENDERS[name][0]:26}{figures(run, args)['pairs_per_second']:>8.2f} pairs/s"

    conditions, runs = shared.run_rounds(__file__, args, show)
    conditions |= {
        "center_coef": CENTER_COEF,
        "cleanpost_settings": {n: CONTENDERS[n][1] for n in args.contenders if n.startswith("cleanpost")},
        "trl_settings": {n: trl_settings(args, n) for n in args.contenders if n.startswith("trl")},
        "units": "pairs; tokens without padding, of both answers, each with its prompt; seconds of optimizer "
        "steps, and of scoring pairs after them; resident GB of 1e9 bytes",
    }
    rounds = {name: [figures(run, args) for run in of_name] for name, of_name in runs.items()}
    same_batches = ("cleanpost", "trl_tuned")
    compared = shared.compare(rounds, runs, CONTENDERS, TARGETS, COMPARED, same_batches, "pairs_per_second")
    result = {"benchmark": "reward_vs_trl", "conditions": conditions} | compared
    result["losses"] = {name: of_name[0]["losses"] for name, of_name in runs.items()}
    panels = {
        "pairs_per_second": ("pairs per second", ".2f"),
        "peak_memory_gb": ("peak memory, GB", ".2f"),
    }
    shared.finish(args, result, table(result), panels)


if __name__ == "__main__":
    parsed = tyro.cli(Args)
    shared.run_only(parsed, prepare if parsed.only == "prepare" else run) if parsed.only else main(parsed)
