"""Process reward models (PRM): score every step of a solution, find its first error, choose among solutions.

    L = -E_k [ z_k log sigma(r_k) + (1 - z_k) log sigma(-r_k) ]                arXiv:2305.20050, section 2.6

r_k is a linear head on the last hidden state of the token that ends step k, z_k in [0, 1] says whether the
solution is right so far. Without human labels, Math-Shepherd (arXiv:2312.08935, Eq. 3 and 4) estimates them:
z_k is the share of completions sampled from behind step k that reach the right answer (soft), or whether any
does (hard): `--annotate`. The loop:

    1. Batch     take the next `--batch-size` solutions and pack them into rows
    2. Rewards   read the head at the end of every step
    3. Loss      cross-entropy of each step; their mean over the steps of the whole optimizer batch
    4. Update    clip the gradient, learning-rate schedule, AdamW
    5. Evaluate  accuracy of steps, detection of the first error; log; save
    6. Search    best of N: a policy samples N solutions of each prompt; the PRM's favourite against that of
                 an outcome model, the majority's, and one sample

Deviations from the papers, each with its reason:
    1. One logit a step, read at the token that ends it (the separator; behind the last step, the end token),
       where the papers predict two special tokens: nothing is added to the vocabulary.

    python process_reward_model.py                             # CPU, offline, 3 minutes on 2 cores
    python process_reward_model.py --annotate tiny/data/steps_train.jsonl --policy tiny/sft
    python process_reward_model.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset steps.jsonl \
        --eval-fraction 0.05 --learning-rate 1e-5 --batch-size 64 --max-tokens-per-micro-batch 16384

Shapes: N tokens in a row, B solutions, C their steps, H hidden size, G samples of a prompt.
"""

import ctypes
import gc
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from bisect import bisect_left, insort
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import torch.nn.functional as F
import transformers
import tyro
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils.chat_template_utils import render_jinja_template

from common import check_attention, check_packed, collate, fsdp_forward, packed_hidden_states, segment_sum


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    # Model
    model: str = "tiny/reward"
    """Model to fine-tune: a hub id or a folder."""
    chat_template: str | None = None
    """File with a Jinja chat template to use instead of the tokenizer's own."""
    attn: str = "packed"
    """Attention: packed, or flash_attention_2 where it is installed, or eager (exact, slow)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about 30 % slower, far less memory, the same result."""
    compile: bool = False
    """Compile each layer with torch.compile."""

    # Data
    dataset: tuple[str, ...] = ("tiny/data/steps_train.jsonl",)
    """Hub ids or local .jsonl/.json/.parquet/.csv files or saved datasets."""
    dataset_config: str | None = None
    """Configuration name of the hub dataset ("main" for openai/gsm8k)."""
    dataset_split: str = "train"
    """Split of the hub dataset to train on."""
    eval_dataset: str | None = None
    """Held-out dataset; by default the one of tiny/ if tiny/ is trained on, else none."""
    eval_split: str = "test"
    """Split of the hub dataset to evaluate on."""
    eval_fraction: float = 0.0
    """Share of the training prompts, with all their pairs, that is held out in place of an --eval-dataset."""
    order: Literal["shuffled", "given", "length"] = "shuffled"
    """Order of the sequences within an epoch; `length` goes from short to long (a curriculum)."""
    dedupe: bool = True
    """Drop sequences that repeat an earlier one exactly."""
    max_length: int = 1024
    """Longest sequence in tokens (TRL: 1024)."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to longer sequences; both are counted in the log."""

    # Optimization
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW; the default suits tiny/, models of billions 2e-5 (SFT) to 1e-6 (DPO)."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Shape of the learning rate after warm-up; linear and cosine end at 0."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly from 0."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments (TRL: 0.9, 0.999)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, on matrices only (TRL: 0)."""
    max_grad_norm: float = 1.0
    """Largest norm of a model's gradient; larger ones are scaled down to it (TRL: 1.0); inf is no end."""
    batch_size: int = 32
    """Sequences, or pairs of them, per step over all processes; online, completions of a rollout."""
    max_tokens_per_micro_batch: int = 2048
    """Tokens of a packed row: memory only, never the result. A longer sequence gets its own row."""
    num_epochs: float = 3.0
    """Passes over the training set (TRL: 3)."""
    max_steps: int = 0
    """Steps (optimizer updates; online, rollouts); 0 derives them from --num-epochs."""

    # Search: best of N
    policy: str | None = None
    """Model that samples solutions, for best of N and --annotate; tiny/sft if tiny/ is trained on."""
    search_dataset: str | None = None
    """Prompts for best of N, with the columns that --reward reads; tiny/'s if tiny/ is trained on."""
    outcome_model: str | None = None
    """Outcome reward model to compare with, a folder of reward_model.py; on tiny/ tiny/reward."""
    reward: str | None = None
    """Verifier of solutions, file.py:function; by default whether the final answer is the `answer` column."""
    step_aggregation: Literal["min", "product", "last", "mean"] = "product"
    """Score of a solution from those of its steps (arXiv:2305.20050: product; arXiv:2312.08935: min)."""
    num_samples: int = 8
    """Solutions sampled of each prompt: the N of best of N."""
    num_prompts: int = 256
    """Prompts of the search; 0 searches none."""

    # Annotation: Math-Shepherd
    annotate: str | None = None
    """Dataset of prompt + completions (steps), with what --reward reads, to label in place of training."""
    annotate_output: str = "runs/annotated.jsonl"
    """Where the labelled rows go; rows that are there already are not done again."""
    num_rollouts: int = 8
    """Completions that are sampled from behind every step (arXiv:2312.08935: 8)."""
    label: Literal["soft", "hard"] = "soft"
    """The share of right completions, or 1 if any is right."""

    # Evaluation and output
    eval_every: int = 100
    """Steps between evaluations; 0 evaluates only before and after."""
    num_eval: int = 0
    """Rows of the evaluation sets that are used; 0 uses all."""
    max_completion_length: int = 128
    """Longest sampled answer in tokens."""
    generation_batch_size: int = 256
    """Prompts that are sampled at once."""
    temperature: float = 1.0
    """Sampling temperature; 0, where samples are not trained on, is greedy."""
    seed: int = 1
    """Seed of the data order, the noise and the sampling."""
    output_dir: str | None = None
    """Folder of the run; by default runs/<script>_<seed>_<time>."""
    resume: bool = False
    """Continue the run in --output-dir from its last checkpoint."""
    save_every: int = 500
    """Steps between checkpoints; 0 saves only on SIGTERM or Ctrl-C."""
    keep_checkpoints: int = 2
    """How many of the last checkpoints stay on disk."""
    log_every: int = 10
    """Steps between lines on the terminal; metrics.jsonl has one line a step."""
    wandb: bool = False
    """Log to Weights & Biases as well (WANDB_MODE=offline works)."""

    def __post_init__(self):
        on_tiny = self.dataset == ("tiny/data/steps_train.jsonl",)
        if on_tiny and not self.eval_fraction:
            self.eval_dataset = self.eval_dataset or "tiny/data/steps_eval.jsonl"
        if on_tiny:
            self.policy = self.policy or "tiny/sft"
            self.search_dataset = self.search_dataset or "tiny/data/prompts_eval.jsonl"
            self.outcome_model = self.outcome_model or "tiny/reward"
        check_flags(self)
        if self.eval_fraction and self.eval_dataset:
            fail("--eval-fraction and --eval-dataset both name the held-out solutions: give one of them")
        if self.annotate and not self.policy:
            fail("--annotate samples from a --policy: which one?")
        if self.annotate and self.temperature == 0:
            fail("--annotate samples completions: --temperature must be above 0")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def step_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each step, (C,) from logits (C,) and labels (C,) in [0, 1], hard or soft."""
    return -labels * F.logsigmoid(logits) - (1 - labels) * F.logsigmoid(-logits)


@fsdp_forward
def step_logits(model, batch) -> torch.Tensor:
    """Logits (C,), float32, at the marked tokens of a packed row: the ends of the steps."""
    return model.score(packed_hidden_states(model, batch)[0, batch.completion_index].float()).squeeze(-1)


@fsdp_forward
def answer_rewards(model, batch) -> torch.Tensor:
    """Rewards (B,), float32, of the B answers in a packed row, read at the last trained token of each."""
    states = packed_hidden_states(model, batch)[0, batch.completion_index]  # (C, H)
    ones = torch.ones_like(states[:, 0], dtype=torch.long)  # (C,)
    last = segment_sum(ones, batch.sequence_index, batch.num_sequences).cumsum(0) - 1  # (B,)
    return model.score(states[last if len(ones) else []].float()).squeeze(-1)  # none where a row holds filler


def aggregate_steps(probabilities: torch.Tensor, *, step_aggregation: str) -> torch.Tensor:
    """One score of a solution, a scalar, from the probabilities of its steps, (steps,).

    `product` is the probability that every step is right (arXiv:2305.20050), `min` that of the weakest
    (arXiv:2312.08935), `last` what an outcome model would say, `mean` does not punish long solutions.
    """
    return {
        "min": probabilities.amin,
        "product": probabilities.prod,
        "last": lambda: probabilities[-1],
        "mean": probabilities.mean,
    }[step_aggregation]()


def shepherd_label(outcomes: list[float], label: str) -> float:
    """A step's label from the rewards, 0 or 1, of completions behind it (Eq. 3 and 4, arXiv:2312.08935)."""
    return float(any(outcomes)) if label == "hard" else sum(outcomes) / len(outcomes)


def first_error(right: list[bool]) -> int:
    """Index of the first step that is not right, -1 if all are."""
    return right.index(False) if False in right else -1


def first_error_scores(predicted: list[int], true: list[int]) -> tuple[float, float]:
    """How often the first error is found, and ProcessBench's F1 (arXiv:2412.06559): the harmonic mean of that
    share among the solutions that have an error and among those that have none."""
    found = [p == t for p, t in zip(predicted, true, strict=True)]
    sides = [[f for f, t in zip(found, true, strict=True) if (t < 0) == clean] for clean in (True, False)]
    shares = [sum(side) / len(side) if side else 0.0 for side in sides]
    return sum(found) / max(1, len(found)), 2 * shares[0] * shares[1] / max(1e-9, sum(shares))


def majority(answers: list[str]) -> int:
    """Index of a solution with the most frequent final answer (self-consistency, arXiv:2203.11171)."""
    counts = Counter(answers)
    return max(range(len(answers)), key=lambda i: (counts[answers[i]], -i))


def lr_factor(step: int, *, total_steps: int, warmup_steps: int, lr_schedule: str) -> float:
    """The learning rate of the 1-based `step` as a share of its peak: linear warm-up, then down towards 0."""
    if step <= warmup_steps:
        return step / warmup_steps
    done = (step - warmup_steps - 1) / max(1, total_steps - warmup_steps)  # in [0, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[lr_schedule]


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------
COLUMNS = {  # of the terminal's lines
    "loss": ".4f",
    "step_accuracy": ".3f",
    "grad_norm": ".2f",
    "learning_rate": ".1e",
    "tokens_per_second": ",.0f",
}


def main(args: Args) -> dict:
    """Train, or annotate a dataset, as `args` says and return the last metrics."""
    rank, world_size, device = setup_distributed()
    torch.manual_seed(args.seed)
    if args.annotate:
        return annotate(args, device)
    output_dir = choose_output_dir(args, "process_reward_model")
    tokenizer = load_tokenizer(args)
    verify = load_verifier(args)
    solutions, held_out = load_solutions(tokenizer, args)
    prompts = load_prompts(args) if args.search_dataset and args.policy else []
    for flag, name in (("--policy", args.policy), ("--outcome-model", args.outcome_model)):
        if prompts and name:  # before anything slow: are they there?
            own_tokenizer(name, args, flag)
    epoch_size, lengths = len(solutions), np.array([len(s.sequence.input_ids) for s in solutions])  # (P,)
    total_steps = args.max_steps or max(1, math.ceil(args.num_epochs * epoch_size / args.batch_size))
    num_epochs = math.ceil(total_steps * args.batch_size / epoch_size)
    stream = data_order(lengths, [solutions], [1], epoch_size, num_epochs, args.order, args.seed)
    show_sequence(tokenizer, solutions[stream[0]].sequence)

    model = load_reward_model(args.model, args, tokenizer, device)
    model.config.reward_offset = 0.0  # of an outcome model that it may start from
    optimizer = make_optimizer(model, args)
    step, num_tokens = load_checkpoint(output_dir, model, optimizer) if args.resume else (0, 0)
    logger = Logger(args, output_dir, total_steps, step, COLUMNS)
    metrics = {}
    if step == 0:
        logger.log({"step": 0} | evaluate_steps(model, held_out, args, device))
    while step < total_steps:
        # 1. Batch: the solutions of this optimizer step, packed into rows that are dealt to the processes
        step, started = step + 1, time.perf_counter()
        picks = stream[(step - 1) * args.batch_size : step * args.batch_size]
        rows = pack(lengths[picks], args.max_tokens_per_micro_batch, multiple_of=world_size)
        num_labels = sum(len(solutions[i].labels) for i in picks)
        model.train()
        sums = torch.zeros(3, device=device)  # told to stop, loss, steps judged as their label says
        for row in rows[rank::world_size]:
            # 2. Rewards: a logit at the end of every step
            mine = [solutions[picks[i]] for i in row]
            batch = collate([solution.sequence for solution in mine] or [FILLER], device)
            logits = step_logits(model, batch)  # (C,)
            labels = torch.tensor([z for solution in mine for z in solution.labels], device=device)  # (C,)

            # 3. Loss: each row adds its part of the mean over the steps of the whole optimizer batch
            loss = step_loss(logits, labels).sum() / num_labels
            (loss * world_size).backward()  # FSDP2 averages over processes what is to be summed
            sums[1:] += torch.stack([loss.detach(), ((logits > 0) == (labels > 0.5)).sum()])

        # 4. Update
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * lr_factor(
                step, total_steps=total_steps, warmup_steps=args.warmup_steps, lr_schedule=args.lr_schedule
            )
        sums[0] = logger.stopping
        results = torch.cat([all_reduce(sums), full(grad_norm)[None]])
        stopping, loss, right, grad_norm = results.tolist()  # the one synchronisation of a step
        if not math.isfinite(loss + grad_norm):
            sequences = [solutions[i].sequence for i in picks]
            stop_on_nonfinite(output_dir, step, sequences, loss, grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started

        # 5. Evaluate, log, save
        batch_tokens = int(lengths[picks].sum())
        num_tokens += batch_tokens
        room = len(rows) * max(args.max_tokens_per_micro_batch, *lengths[picks])
        metrics = {
            "step": step,
            "epoch": step * args.batch_size / epoch_size,
            "loss": loss,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            "step_accuracy": right / num_labels,
            "num_tokens": num_tokens,
            "tokens_per_second": batch_tokens / seconds,
            "step_time": seconds,
            "packing/fill": batch_tokens / room,
        }
        if device.type == "cuda":
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        if step == total_steps or (args.eval_every and step % args.eval_every == 0):
            metrics |= evaluate_steps(model, held_out, args, device)
        samples = []
        if step == total_steps and prompts:
            # 6. Search
            results, samples = best_of_n(model, tokenizer, prompts, verify, output_dir, args, device)
            metrics |= results
            if args.outcome_model and args.eval_dataset:  # asked at the end of every step, what does it find?
                reader = own_tokenizer(args.outcome_model, args, "--outcome-model")
                judge = load_reward_model(args.outcome_model, args, reader, device)
                asked = load_steps(reader, args.eval_dataset, args.eval_split, args, args.num_eval)
                results = evaluate_steps(judge, asked, args, device)
                metrics |= {key.replace("eval/", "search/orm_"): value for key, value in results.items()}
                del judge
        logger.log(metrics, samples)
        if stopping or (args.save_every and (step == total_steps or step % args.save_every == 0)):
            save_checkpoint(output_dir, model, optimizer, step, num_tokens, args.keep_checkpoints)
        if stopping and step < total_steps:
            logger.close(f"stopped; continue with --resume --output-dir {output_dir}")
            return metrics
    save_model(output_dir / "model", model, tokenizer)
    logger.close(f"model saved to {output_dir / 'model'}")
    return metrics


def evaluate_steps(model, held_out, args, device) -> dict:
    """Accuracy on held-out steps, and how often the first wrong one is found."""
    if not held_out:
        return {}
    probabilities = step_probabilities(model, [s.sequence for s in held_out], args, device)
    offset = getattr(model.config, "reward_offset", 0.0)  # of an outcome model, where 0 is average
    said = [(p.logit() + offset > 0).tolist() for p in probabilities]
    true = [[z > 0.5 for z in s.labels] for s in held_out]
    right = [a == b for one, other in zip(said, true, strict=True) for a, b in zip(one, other, strict=True)]
    found, f1 = first_error_scores(*([first_error(s) for s in some] for some in (said, true)))
    return {
        "eval/step_accuracy": sum(right) / len(right),
        "eval/first_error": found,
        "eval/first_error_f1": f1,
    }


def best_of_n(model, tokenizer, prompts, verify, output_dir, args, device) -> tuple[dict, list[dict]]:
    """Sample --num-samples solutions of each prompt: how often does each way of choosing take a right one?

    As N grows, in best_of_n.json and best_of_n.png: the PRM's favourite, the outcome model's, the majority's,
    one sample, and the share of prompts with any right one.
    """
    speller, judge_name = own_tokenizer(args.policy, args, "--policy"), args.outcome_model
    policy = load_model(args.policy, args, speller, device)
    repeated = [row for row in prompts for _ in range(args.num_samples)]
    prompt_ids = [prompt_tokens(speller, row["prompt"], row) for row in repeated]
    texts = speller.batch_decode(
        generate(policy, speller, prompt_ids, args, device), skip_special_tokens=True
    )
    del policy
    right = np.array(verify(repeated, texts)).reshape(len(prompts), -1)  # (P, G)
    finals = np.array([final_answer(text) for text in texts], object).reshape(right.shape)  # (P, G)
    steps = [[line for line in text.split(SEPARATOR) if line.strip()] or ["?"] for text in texts]

    def read(tokenizer):
        solutions = enumerate(zip(repeated, steps, strict=True))
        return [tokenize_steps(tokenizer, r["prompt"], s, r, f"sample {i}") for i, (r, s) in solutions]

    chance = step_probabilities(model, read(tokenizer), args, device)
    scores = {"prm": np.array([aggregate_steps(p, step_aggregation=args.step_aggregation) for p in chance])}
    if judge_name:
        reader = own_tokenizer(judge_name, args, "--outcome-model")
        judge = load_reward_model(judge_name, args, reader, device)
        scores["orm"] = outcome_rewards(judge, read(reader), args, device).cpu().numpy()
        del judge
    scores = {name: score.reshape(right.shape) for name, score in scores.items()}  # (P, G)
    table, sizes = [], [n for n in (2**k for k in range(20)) if n <= args.num_samples]
    for n in sizes:
        line = {"n": n, "single": right.mean(), "any": (right[:, :n].max(1) > 0).mean()}
        line["majority"] = np.mean([r[majority(list(f))] for r, f in zip(right[:, :n], finals[:, :n])])
        for name, score in scores.items():
            line[name] = np.take_along_axis(right, score[:, :n].argmax(1)[:, None], 1).mean()
        table.append({key: float(value) for key, value in line.items()})
    names = ["single", *scores, "majority", "any"]
    say("  N   " + "".join(f"{name:>10}" for name in names))
    for line in table:
        say(f"  {int(line['n']):<4}" + "".join(f"{line[name]:>10.3f}" for name in names))
    if process()[0] == 0:
        (output_dir / "best_of_n.json").write_text(json.dumps(table, indent=2))
        draw_search(table, names, output_dir / "best_of_n.png")
    samples = [
        {"prompt": speller.decode(ids), "completion": text, "right": bool(r), "probabilities": p.tolist()}
        for ids, text, r, p in zip(prompt_ids, texts, right.flatten(), chance, strict=True)
    ]
    return {f"search/{name}": table[-1][name] for name in names}, samples


def own_tokenizer(name: str, args, flag: str):
    """The tokenizer of another model than --model, which `flag` gives, with its own chat template."""
    return load_tokenizer(replace(args, model=name, chat_template=None), flag)


def annotate(args, device) -> dict:
    """Math-Shepherd: label every step of a dataset's solutions by what completions behind it come to."""
    tokenizer = own_tokenizer(args.policy, args, "--policy")
    verify, rows = load_verifier(args), load_rows(args.annotate, args.dataset_split, args.dataset_config)
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            fail(f"{args.annotate}, row {n}: not an object with columns, but {type(row).__name__}")
        if "prompt" not in row or not isinstance(row.get("completions"), list):
            found = ", ".join(row)
            fail(f"{args.annotate}, row {n}: found the columns {found}; needed are prompt + completions")
    check_columns(rows, args.annotate, args)
    output = Path(args.annotate_output)
    done = output.read_text().splitlines(keepends=True) if output.exists() else []
    done = [line for line in done if line.endswith("}\n")]  # a killed run may leave half a line
    if len(done) > len(rows):
        fail(f"{output} has more rows than {args.annotate}: choose another --annotate-output")
    policy = load_model(args.policy, args, tokenizer, device)
    if process()[0] == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(done))
    say(f"{args.annotate}: {len(rows):,} solutions, {len(done):,} of them labelled already")
    chunk = max(1, args.generation_batch_size // args.num_rollouts // 2)
    bar = tqdm(total=len(rows), initial=len(done), unit="solution", dynamic_ncols=True, disable=None)
    found, pairs = [], []  # estimated labels; pairs of them and given ones, where the dataset has some
    for start in range(len(done), len(rows), chunk):
        asked, owners = [], []  # prefixes to complete, and (row, step) of each
        for n, row in enumerate(rows[start : start + chunk]):
            where = f"{args.annotate}, row {start + n + 1}"
            input_ids, ends = tokenize_steps(tokenizer, row["prompt"], row["completions"], row, where)
            for k, end in enumerate(np.flatnonzero(ends)[:-1]):
                asked += [input_ids[: end + 1].tolist()] * args.num_rollouts
                owners += [(n, k)] * args.num_rollouts
        completions = generate(policy, tokenizer, asked, replace(args, seed=args.seed + start), device)
        endings = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
        texts = [
            SEPARATOR.join([*rows[start + n]["completions"][: k + 1], ending])
            for (n, k), ending in zip(owners, endings, strict=True)
        ]
        whole = rows[start : start + chunk]
        texts += [
            SEPARATOR.join(row["completions"]) for row in whole
        ]  # behind the last step there is nothing left
        owners += [(n, len(row["completions"]) - 1) for n, row in enumerate(whole)]
        outcomes = verify([rows[start + n] for n, _ in owners], texts)
        labels = [[[] for _ in row["completions"]] for row in whole]
        for (n, k), outcome in zip(owners, outcomes, strict=True):
            labels[n][k].append(outcome)
        labels = [[shepherd_label(step, args.label) for step in solution] for solution in labels]
        for row, estimated in zip(whole, labels, strict=True):
            found += estimated
            pairs += zip(estimated, map(float, row.get("labels", ())))
        if process()[0] == 0:
            with open(output, "a") as file:
                for row, estimated in zip(whole, labels, strict=True):
                    true = {"true_labels": row["labels"]} if "labels" in row else {}
                    file.write(json.dumps(row | {"labels": estimated} | true) + "\n")
        bar.update(len(whole))
    bar.close()
    metrics = {"mean_label": float(np.mean(found)) if found else 0.0}
    if len(pairs) > 1:
        with np.errstate(invalid="ignore"):  # labels that are all the same correlate with nothing
            metrics["label_correlation"] = float(np.nan_to_num(np.corrcoef(np.array(pairs).T)[0, 1]))
        metrics["label_agreement"] = float(np.mean([(e > 0.5) == (t > 0.5) for e, t in pairs]))
    say(f"labels in {output}" + "".join(f", {key} {value:.3f}" for key, value in metrics.items()))
    return metrics


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
class Sequence(NamedTuple):
    """Token ids and which of them are trained, both (length,)."""

    input_ids: np.ndarray
    trained: np.ndarray


FILLER = Sequence(np.zeros(1, np.int32), np.zeros(1, bool))  # for a process that has no row: trains nothing


class Solution(NamedTuple):
    """A prompt and the steps of a solution, whose ends are marked, and a label in [0, 1] of each step."""

    sequence: Sequence
    labels: list[float]


SEPARATOR = "\n"  # between steps; it belongs to the step that it ends
STEP_FORMATS = "prompt + completions (a list of steps) + labels (true, false, or a number from 0 to 1 each)"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def say(message: str, file=None):
    """Print a line above the progress bar, from the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(message, file=file or sys.stdout)


def fail(message: str):
    """End the run over a user's mistake: one line and exit code 2."""
    say(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_flags(args):
    """End the run over what no run can have, NaN included: flags that scripts share, with their ranges."""
    ranges = (
        (
            "be at least 1",
            lambda x: x >= 1,
            "batch_size max_tokens_per_micro_batch max_length max_prompt_length max_completion_length"
            " generation_batch_size num_generations num_iterations num_ppo_epochs num_minibatches num_members"
            " num_samples num_rollouts answers_per_prompt eval_samples keep_checkpoints log_every",
        ),
        (
            "be above 0",
            lambda x: x > 0,
            "max_grad_norm num_epochs epsilon epsilon_high kl_target kl_horizon target_kl max_kl reward_clip"
            " cliprange_value kd_temperature desirable_weight undesirable_weight",
        ),
        (
            "be at least 0",
            lambda x: x >= 0,
            "learning_rate value_learning_rate weight_decay warmup_steps value_warmup_steps max_steps kl_coef"
            " vf_coef std_coef missing_eos_penalty temperature num_eval eval_every save_every",
        ),
        ("lie in [0, 1]", lambda x: 0 <= x <= 1, "gamma lam kl_discount"),
        (
            "lie in [0, 1)",
            lambda x: 0 <= x < 1,
            "eval_fraction label_smoothing replay_fraction ches_filter_fraction",
        ),
    )
    for words, holds, names in ranges:
        for name in names.split():
            value = getattr(args, name, None)
            if value is not None and not holds(value):
                fail(f"--{name.replace('_', '-')} must {words}, not {value}")
    if "{prompt}" not in (getattr(args, "prompt_template", None) or "{prompt}"):
        fail("--prompt-template has no {prompt} in it, where the question goes")
    if args.resume and not args.output_dir:
        fail("--resume needs --output-dir: which run should continue?")


def process() -> tuple[int, int]:
    """Rank and number of the processes that torchrun started, (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def setup_distributed() -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started -> rank, world size, device.

    CUDA gets a process group for one process, too: FSDP2 then keeps float32 masters and computes in bfloat16.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of one process
    cuda, libc = torch.cuda.is_available(), ctypes.CDLL(None)
    if not cuda and hasattr(libc, "mallopt"):
        # glibc gives big buffers back to the system and pages them in anew at every step: keep them instead.
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer from outside the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    elif cuda and not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    return *process(), device


def leave_distributed():
    """Leave the process group at a clean end: threads of gloo that outlive the interpreter abort it."""
    gc.collect()  # sharded models hold the group
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def full(x: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP2 may have sharded."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def locate(name: str) -> str:
    """A path as given, or beside this file (tiny/ is found from any folder); a hub id is left as it is."""
    beside = Path(__file__).resolve().parent / name
    return str(beside) if beside.exists() and not Path(name).exists() else name


def choose_output_dir(args, script: str) -> Path:
    """The folder of the run; one that holds a run already is continued or left alone, never overwritten."""
    names = [args.output_dir or f"runs/{script}_{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}"]
    if dist.is_initialized():
        dist.broadcast_object_list(names)  # the clock may tick between two processes
    folder = Path(names[0])
    if not args.resume and (folder / "metrics.jsonl").exists():
        state = "finished" if (folder / "model").exists() else "unfinished"
        fail(f"{folder} holds a run ({state}): --resume continues it, another --output-dir starts a new one")
    if args.resume and (folder / "model").exists() and not list(folder.glob("checkpoints/step_*")):
        fail(f"{folder} holds a finished run without checkpoints: choose another --output-dir")
    return folder


def load_tokenizer(args, flag: str = "--model"):
    """The tokenizer of --model, its chat template, and `end_ids`: what may end a turn.

    The architecture is checked here as well, before anything slow is loaded.
    """
    path = locate(args.model)
    if path.startswith((".", "/")) and not Path(path).is_dir():
        fail(f"{flag} {args.model}: no such folder")
    try:
        config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        check_attention(config, transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], args.attn)
    except KeyError:
        fail(f"{flag} {args.model}: {config.model_type} is not a causal language model")
    except (OSError, ValueError) as error:
        fail(f"{flag} {args.model}: {str(error).splitlines()[0]}")
    if not tokenizer.is_fast:
        fail(f"{flag} {args.model}: its tokenizer reports no character offsets; only fast tokenizers do")
    if args.chat_template:
        if not Path(args.chat_template).is_file():
            fail(f"--chat-template {args.chat_template}: no such file")
        tokenizer.chat_template = Path(args.chat_template).read_text(encoding="utf-8")
    tokenizer.known_size = len(tokenizer)  # tokens from here on have no embedding yet
    try:  # Gemma and Llama 3 end a turn with a token that only their generation config names
        ends = np.atleast_1d(GenerationConfig.from_pretrained(path).eos_token_id or []).tolist()
    except OSError:
        ends = []
    turn_ends = []
    try:  # and what the template writes behind a reply: Qwen2.5's base models have another EOS
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("!")[2]
        behind_ids = tokenizer(behind, add_special_tokens=False).input_ids
        turn_ends = [i for i in behind_ids if i in tokenizer.added_tokens_decoder][:1]
    except Exception:  # no template, or one that wants another conversation: `render` says so, with the row
        pass
    tokenizer.turn_end_id = (turn_ends or [tokenizer.eos_token_id])[0]
    tokenizer.end_ids = sorted({int(i) for i in [tokenizer.eos_token_id, *ends, *turn_ends] if i is not None})
    return tokenizer


def use_chatml(tokenizer):
    """Give a tokenizer without a chat template ChatML, its special tokens, and its end of turn as EOS."""
    say("the tokenizer has no chat template: using ChatML")
    tokenizer.chat_template = CHATML
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.turn_end_id = tokenizer.eos_token_id
    tokenizer.end_ids = sorted({*tokenizer.end_ids, tokenizer.eos_token_id})


def load_rows(source: str, split: str, config: str | None) -> list[dict]:
    """The rows of a .jsonl/.json/.parquet/.csv file, a saved dataset or a hub dataset; at least one."""
    path, rows = Path(locate(source)), []
    if not path.exists() and (path.suffix in (".jsonl", ".json", ".parquet", ".csv") or source[0] in "./"):
        fail(f"{source}: no such file")
    if path.suffix in (".jsonl", ".json"):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            fail(f"{source}: not UTF-8 ({error})")
        whole = text.lstrip().startswith("[")  # one list, else one row a line
        for n, line in enumerate([text] if whole else text.split("\n"), 1):
            try:
                rows += (json.loads(line) if whole else [json.loads(line)]) if line.strip() else []
            except json.JSONDecodeError as error:
                fail(f"{source}, line {n}: not JSON ({error})")
    else:
        import datasets  # here, because the import takes a second that .jsonl does not need

        datasets.disable_progress_bars()
        try:
            if path.is_dir():
                rows = datasets.load_from_disk(str(path))
                rows = rows[split] if isinstance(rows, dict) else rows
            elif path.exists():
                rows = datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train")
            else:
                rows = datasets.load_dataset(source, config, split=split)
        except Exception as error:  # `datasets` raises a dozen kinds; for the user they are one
            fail(f"{source}: {type(error).__name__}: {error}".splitlines()[0])
    if not len(rows):
        fail(f"{source}: the dataset is empty")
    return list(rows)


def as_example(prompt, completion, row: dict, where: str) -> dict:
    """A prompt and its completion, each text or messages: {"prompt", "completion"} if both are text, else
    a conversation {"messages", "context", "options"}.

    Of its messages the first `context` are prompt; `options` go to the chat template (from the row's columns
    `tools` and `chat_template_kwargs`).
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            fail(f"{where}: the completion is empty")
        return {"where": where, "prompt": prompt, "completion": completion}
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    completion = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    messages = [{k: v for k, v in m.items() if v is not None} for m in [*prompt, *completion]]
    for m in messages:
        if isinstance(m.get("content"), list):  # parts, of which text is read
            m["content"] = "".join(part.get("text", "") for part in m["content"])
        if m.get("role") == "assistant" and not m.get("content", "").strip() and not m.get("tool_calls"):
            fail(f"{where}: an assistant turn is empty")
    if not any(m.get("role") == "assistant" for m in messages[max(1, len(prompt)) :]):
        fail(f"{where}: no assistant turn follows the prompt")
    options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
    return {"where": where, "messages": messages, "context": len(prompt), "options": options}


def render(tokenizer, example: dict) -> list[tuple[str, list[tuple[int, int]]]]:
    """A conversation as text with the character spans of the assistant's turns after the prompt.

    The spans come from the template's {% generation %} marks, or else from rendering the conversation up to
    each assistant turn, without it and with it. A template that renders a turn differently once others follow
    (Qwen3 drops old reasoning) gives one text per turn, each as the model sees it when it writes that turn.
    """
    messages, options, where = example["messages"], example["options"], example["where"]
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    wanted = [i for i in turns if i >= max(1, example["context"])]

    def text_of(count, **more):
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, **options, **more)

    text, template = text_of(len(messages)), tokenizer.get_chat_template(tools=options.get("tools"))
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        variables = {"chat_template": template} | tokenizer.special_tokens_map | options
        marks = render_jinja_template([messages], return_assistant_tokens_mask=True, **variables)[1][0]
        if len(marks) != len(turns):
            fail(f"{where}: the chat template marks {len(marks)} of {len(turns)} assistant turns")
        return [(text, [mark for i, mark in zip(turns, marks, strict=True) if i in wanted])]
    heads = [text_of(i, add_generation_prompt=True) for i in wanted]
    bodies = [text_of(i + 1) for i in wanted]
    if not all(body.startswith(head) for head, body in zip(heads, bodies, strict=True)):
        fail(f"{where}: the chat template has no generation marks and renders the prompt anew with a reply")
    spans, ends = [], [tokenizer.decode(i) for i in tokenizer.end_ids]
    for head, body in zip(heads, bodies, strict=True):
        # Up to the last end token, without the line break that follows it.
        stops = [body.rfind(end) + len(end) for end in ends if body.rfind(end) >= len(head)]
        spans.append((len(head), max(stops, default=len(body))))
    whole = all(text.startswith(body) for body in bodies)
    return [(text, spans)] if whole else [(body, [span]) for body, span in zip(bodies, spans, strict=True)]


def tokenize_steps(tokenizer, prompt, steps: list[str], row: dict, where: str) -> Sequence:
    """A prompt and the steps of a solution as token ids up to the end of the last; which tokens end a step.

    A step ends with its separator, the last one with the end token. Where a token holds a separator and the
    beginning of the next step, the step ends with the token before.
    """
    if not all(isinstance(step, str) for step in steps):
        fail(f"{where}: a step is not a text")
    answer = SEPARATOR.join(steps)
    example = as_example(prompt, answer, row, where)
    if "messages" in example:
        if tokenizer.chat_template is None:
            use_chatml(tokenizer)
        text, spans = render(tokenizer, example)[-1]
        start, size = text.find(answer, spans[-1][0]), spans[-1][1]
        if start < 0:
            fail(f"{where}: the chat template changes the solution")
    else:
        text = prompt + answer
        start, size = len(prompt), len(text)
    special = "messages" not in example  # a template has written its special tokens already
    tokens = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    input_ids, (begins, ends) = tokens.input_ids, np.array(tokens.offset_mapping).T
    stops = start + np.cumsum([len(step) + len(SEPARATOR) for step in steps])  # behind each step's separator
    stops[-1] = size
    marked = np.zeros(len(ends), bool)
    for stop in stops:
        marked[np.flatnonzero((ends <= stop) & (ends > begins))[-1]] = True
    if marked.sum() != len(steps):
        fail(f"{where}: two of its steps end with one token")
    size = int(np.flatnonzero(marked)[-1]) + 1
    input_ids, marked, behind = input_ids[:size], marked[:size], input_ids[size : size + 1]
    if input_ids[-1] not in tokenizer.end_ids and (special or behind and behind[0] in tokenizer.end_ids):
        # The end token, which texts have not yet and some templates leave outside their marks
        input_ids, marked = [*input_ids, *(behind or [tokenizer.eos_token_id])], np.append(marked, True)
        marked[-2] = False
    return Sequence(np.array(input_ids, np.int32), marked)


def prompt_tokens(tokenizer, prompt, row: dict) -> list[int]:
    """A prompt, text or messages, as the token ids after which an answer begins."""
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options)
    return tokenizer(text, add_special_tokens=False).input_ids


def load_steps(tokenizer, source: str | None, split: str, args, limit: int = 0) -> list[Solution]:
    """A dataset of steps as solutions; says how many steps are right and what was dropped."""
    if source is None:
        return []
    solutions, seen, notes, lengths = [], set(), Counter(), []
    rows = load_rows(source, split, args.dataset_config)[: limit or None]
    for n, row in enumerate(tqdm(rows, desc=f"tokenize {source}", leave=False, disable=None), 1):
        where = f"{source}, row {n}"
        if not isinstance(row, dict):
            fail(f"{where}: not an object with columns, but {type(row).__name__}")
        prompt, steps, labels = (row.get(key) for key in ("prompt", "completions", "labels"))
        if prompt is None or not isinstance(steps, list) or not isinstance(labels, list):
            fail(f"{where}: found the columns {', '.join(row)}; accepted are {STEP_FORMATS}")
        if len(steps) != len(labels) or not steps:
            fail(f"{where}: {len(steps)} steps and {len(labels)} labels")
        if not all(isinstance(z, bool | int | float) and 0 <= z <= 1 for z in labels):
            fail(f"{where}: a label is not true, false, or a number from 0 to 1")
        sequence = tokenize_steps(tokenizer, prompt, steps, row, where)
        lengths.append(len(sequence.input_ids))
        key = sequence.input_ids.tobytes()
        if args.dedupe and key in seen:
            notes["dropped as duplicates"] += 1
            continue
        seen.add(key)
        labels = [float(z) for z in labels]
        if lengths[-1] > args.max_length:
            kept = int(sequence.trained[: args.max_length].sum())
            if args.overlong == "drop" or not kept:
                notes[f"dropped as longer than {args.max_length:,} tokens"] += 1
                continue
            notes[f"cut to {args.max_length:,} tokens"] += 1
            sequence, labels = Sequence(*(x[: args.max_length] for x in sequence)), labels[:kept]
        solutions.append(Solution(sequence, labels))
    if not solutions:
        shortest = f"the shortest has {min(lengths)} tokens"
        fail(f"{source}: no solution fits --max-length {args.max_length}; {shortest}")
    told = "".join(f", {count:,} {reason}" for reason, count in notes.items())
    mean = np.mean([z for solution in solutions for z in solution.labels])
    total = sum(len(solution.labels) for solution in solutions)
    say(f"{source}: {len(solutions):,} solutions, {total:,} steps, mean label {mean:.2f}{told}")
    return solutions


def load_solutions(tokenizer, args) -> tuple[list[Solution], list[Solution]]:
    """Training and held-out solutions; those of a prompt stay together where --eval-fraction splits them."""
    solutions = [s for name in args.dataset for s in load_steps(tokenizer, name, args.dataset_split, args)]
    held_out = load_steps(tokenizer, args.eval_dataset, args.eval_split, args, args.num_eval)
    if args.eval_fraction:
        kept, apart = hold_out([(s.sequence,) for s in solutions], args)
        solutions, held_out = [solutions[i] for i in kept], [solutions[i] for i in apart]
    return solutions, held_out


def load_prompts(args) -> list[dict]:
    """The rows of the search's prompts, `question` taken as a user's message."""
    rows = load_rows(args.search_dataset, args.eval_split, args.dataset_config)[: args.num_prompts]
    for n, row in enumerate(rows, 1):
        if "prompt" not in row and "question" in row:
            row["prompt"] = [{"role": "user", "content": row["question"]}]
        if "prompt" not in row:
            fail(f"{args.search_dataset}, row {n}: found the columns {', '.join(row)}; needed is prompt")
    check_columns(rows, args.search_dataset, args)
    return rows


def check_columns(rows: list[dict], source: str, args):
    """End the run where the default verifier would miss its column."""
    for n, row in enumerate(rows if args.reward is None else (), 1):
        if "answer" not in row:
            fail(f"{source}, row {n}: without --reward a column answer is needed; found {', '.join(row)}")


def load_function(spec: str):
    """The function that file.py:function names."""
    path, _, name = spec.rpartition(":")
    path = Path(locate(path))
    if not name or not path.is_file():
        fail(f"{spec}: not file.py:function of a file that exists")
    found = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:  # whatever stands in that file
        fail(f"{spec}: {type(error).__name__}: {error}".splitlines()[0])
    if not callable(getattr(module, name, None)):
        fail(f"{spec}: {path.name} has no function {name}")
    return getattr(module, name)


def load_verifier(args):
    """The function of --reward as verify(rows, texts) -> a reward of each text, or the default one."""
    if args.reward is None:

        def verify(rows, texts):
            pairs = zip(rows, texts, strict=True)
            return [float(final_answer(text) == final_answer(str(row["answer"]))) for row, text in pairs]

        return verify
    function = load_function(args.reward)

    def verify(rows, texts):
        columns = {
            key: [row.get(key) for row in rows] for key in rows[0] if key not in ("prompt", "completions")
        }
        completions = [
            [{"role": "assistant", "content": text}] if isinstance(row["prompt"], list) else text
            for row, text in zip(rows, texts, strict=True)
        ]
        rewards = function(prompts=[row["prompt"] for row in rows], completions=completions, **columns)
        return [0.0 if reward is None else float(reward > 0) for reward in rewards]

    return verify


@torch.no_grad()
def step_probabilities(model, sequences: list[Sequence], args, device) -> list[torch.Tensor]:
    """sigma of the logits at the marked tokens, one tensor a sequence, on every process."""
    model.eval()
    rank, world_size = process()
    counts = [int(sequence.trained.sum()) for sequence in sequences]
    starts = np.cumsum([0, *counts])
    flat = torch.zeros(starts[-1], device=device)
    lengths = [len(sequence.input_ids) for sequence in sequences]
    rows = pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)
    for row in tqdm(rows[rank::world_size], desc="steps", leave=False, disable=None if rank == 0 else True):
        logits = step_logits(model, collate([sequences[i] for i in row] or [FILLER], device))
        where = [n for i in row for n in range(starts[i], starts[i + 1])]
        flat[where] = torch.sigmoid(logits)
    return list(all_reduce(flat).cpu().split(counts))


@torch.no_grad()
def outcome_rewards(model, sequences: list[Sequence], args, device) -> torch.Tensor:
    """An outcome model's reward (P,) of each sequence, read at its last marked token, on every process."""
    model.eval()
    rank, world_size = process()
    rewards = torch.zeros(len(sequences), device=device)
    lengths = [len(sequence.input_ids) for sequence in sequences]
    rows = pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)
    for row in rows[rank::world_size]:
        rewards[row] = answer_rewards(model, collate([sequences[i] for i in row] or [FILLER], device))
    return all_reduce(rewards)


def draw_search(table: list[dict], names: list[str], path: Path):
    """Accuracy of each way of choosing against N."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for name in names:
        panel.plot([line["n"] for line in table], [line[name] for line in table], marker="o", label=name)
    panel.set(xscale="log", xlabel="N samples of each prompt", ylabel="share of prompts answered right")
    panel.set_xticks([line["n"] for line in table], [int(line["n"]) for line in table])
    panel.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def hold_out(pairs: list, args) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pairs to train on, and of those whose prompts are in the held-out --eval-fraction."""
    prompts = sorted({prompt_of(pair) for pair in pairs})
    number = math.ceil(args.eval_fraction * len(prompts))
    order = np.random.default_rng(args.seed).permutation(len(prompts))
    held = {prompts[i] for i in order[:number]}
    apart = np.array([prompt_of(pair) in held for pair in pairs])
    if apart.all():
        fail(f"--eval-fraction {args.eval_fraction} leaves no pair to train on")
    say(f"held out: {number:,} of {len(prompts):,} prompts, {apart.sum():,} of {len(pairs):,} examples")
    return np.flatnonzero(~apart), np.flatnonzero(apart)[: args.num_eval or None]


def prompt_of(answers: tuple) -> bytes:
    """What the answers of a pair, or a single one, are answers to, as a key."""
    input_ids, trained = answers[0]
    return input_ids[: int(trained.argmax())].tobytes()


def show_sequence(tokenizer, sequence: Sequence):
    """Print a sequence as the model sees it: trained tokens in green, or in [brackets] without colours."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    on, off = ("\033[32m", "\033[0m") if colour else ("[", "]")
    cuts, parts = np.flatnonzero(np.diff(sequence.trained)) + 1, []
    for ids, trained in zip(*(np.split(x, cuts) for x in sequence), strict=True):  # runs of one kind
        text = tokenizer.decode(ids)
        parts.append(f"{on}{text}{off}" if trained[0] else text)
    say("".join(parts))


def pack(lengths, max_tokens: int, multiple_of: int = 1) -> list[list[int]]:
    """Best fit decreasing: indices of `lengths` in rows of at most max_tokens; a longer one has its own row.

    >>> pack([3, 5, 2, 4], max_tokens=8)
    [[1, 0], [3, 2]]  # 5 + 3 and 4 + 2 tokens

    The number of rows is a multiple of `multiple_of` (processes): rows are split for it, at last empty ones
    added.
    """
    rows, spaces = [], []  # spaces: sorted (free tokens, row)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fit = bisect_left(spaces, (lengths[i], -1))  # the row with the least room that is enough
        free, row = spaces.pop(fit) if fit < len(spaces) else (max_tokens, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        insort(spaces, (free - lengths[i], row))
    while len(rows) % multiple_of:
        most = max(rows, key=len)
        rows.append([most.pop() for _ in range(len(most) // 2)])
    return rows


def data_order(
    lengths, sources, shares, epoch_size: int, num_epochs: int, order: str, seed: int
) -> np.ndarray:
    """Indices of the sequences of all epochs, in the order of training.

    It depends on its arguments alone: the data position of a continued run is its step. Each source gives its
    share of an epoch, in rounds through it where that takes more than one.
    """
    rng, stream, sizes = np.random.default_rng(seed), [], [len(source) for source in sources]
    counts = np.diff(np.rint(np.cumsum([0, *shares]) / sum(shares) * epoch_size)).astype(int)  # per source
    for _ in range(num_epochs):
        picks = []  # per source
        for first, size, count in zip(np.cumsum([0, *sizes]), sizes, counts, strict=False):
            rounds = [
                rng.permutation(size) if order != "given" else np.arange(size) for _ in range(0, count, size)
            ]
            picks.append(first + np.concatenate([np.zeros(0, int), *rounds])[:count])
        epoch = np.concatenate(picks)
        key = {
            "shuffled": rng.random(len(epoch)),
            "length": lengths[epoch],
            "given": np.concatenate(
                [(np.arange(len(p)) + 0.5) / len(p) for p in picks]
            ),  # evenly interleaved
        }[order]
        stream.append(epoch[np.argsort(key, kind="stable")])
    return np.concatenate(stream)


def load_model(name: str, args, tokenizer, device):
    """A model with float32 parameters, checked against packed rows, sharded where processes share it."""
    path = locate(name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=args.attn)
    model.auto_class, model.stored_dtype = AutoModelForCausalLM, AutoConfig.from_pretrained(path).dtype
    embed_new_tokens(model, tokenizer)
    prepare_model(model, args, device)
    try:
        with unsharded(model):  # sharded again behind it: an optimizer over whole parameters updates copies
            check_packed(model)
    except ValueError as error:
        fail(f"{name}: {error}")
    size = sum(p.numel() for p in model.parameters())
    say(f"{name}: {model.config.model_type}, {size:,} parameters, {device.type}, attention {args.attn}")
    return model


def load_reward_model(name: str, args, tokenizer, device):
    """A model with one output and float32 parameters; on a causal language model it gets a new head.

    The head starts with standard deviation 1 / sqrt(H + 1) (arXiv:2009.01325), from the seed.
    """
    path = locate(name)
    config = AutoConfig.from_pretrained(path, num_labels=1)
    options = {"config": config, "dtype": torch.float32, "attn_implementation": args.attn}
    try:
        model = AutoModelForSequenceClassification.from_pretrained(path, **options)
    except ValueError:
        fail(f"{name}: transformers has no sequence classification for {config.model_type}")
    model.auto_class, model.stored_dtype = AutoModelForSequenceClassification, config.dtype
    embed_new_tokens(model, tokenizer)
    if not any("SequenceClassification" in kind for kind in config.architectures or ()):
        generator = torch.Generator().manual_seed(args.seed)
        std = 1 / math.sqrt(model.score.in_features + 1)
        model.score.weight.data = torch.randn(model.score.weight.shape, generator=generator) * std
    model.config.reward_offset = getattr(config, "reward_offset", 0.0)
    model.config.pad_token_id = (
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )
    prepare_model(model, args, device)
    with unsharded(model):
        check_rewards(model, name)
    size = sum(p.numel() for p in model.parameters())
    say(f"{name}: {config.model_type}, {size:,} parameters, {device.type}, attention {args.attn}")
    return model


@torch.no_grad()
def check_rewards(model, name: str):
    """End the run unless two answers in one packed row score as each does alone in the stock model.

    Also where their prompt stands in the row once, if --attn packed lets it.
    """
    device, vocab_size = model.get_input_embeddings().weight.device, model.config.get_text_config().vocab_size
    one, other = (torch.arange(1, n + 1) * 7919 % (vocab_size - 1) + 1 for n in (9, 6))
    attn = model.config._attn_implementation
    rows = [([one, other], None)] + [([one, torch.cat([one[:4], other])], [0, 4])] * (attn == "packed")
    for sequences, shared in rows:
        ends = [(ids, torch.arange(len(ids)) == len(ids) - 1) for ids in sequences]
        pad, model.config.pad_token_id = model.config.pad_token_id, None  # stock reads the last token then
        logits = [model(input_ids=ids[None].to(device), use_cache=False).logits[0, 0] for ids in sequences]
        model.config.pad_token_id = pad
        rewards = answer_rewards(model, collate(ends, device, shared))
        error = (rewards - torch.stack(logits).float()).abs().max().item()
        if not error < (1e-3 if logits[0].dtype == torch.float32 and device.type == "cpu" else 0.1):
            fail(f"{name}: packed rewards differ from the model's by {error:.2g} under --attn {attn}")


def embed_new_tokens(model, tokenizer):
    """Start the embeddings of tokens that the tokenizer has been given at the mean of the known ones."""
    if len(tokenizer) > len(model.get_input_embeddings().weight):  # Qwen's tables have spare rows
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    new = slice(tokenizer.known_size, len(tokenizer))
    tables = {model.get_input_embeddings(), model.get_output_embeddings()} - {None}
    for table in tables if new.stop > new.start else ():
        table.weight.data[new] = table.weight.data[: new.start].mean(0)


def prepare_model(model, args, device):
    """Dropout off, checkpointing and compiling as the flags say, onto the device, sharded over processes."""
    for module in model.modules():
        for rate in ("p", "dropout", "attention_dropout", "resid_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    for layer in layers if args.compile else ():
        layer.compile()
    model.to(device)
    if dist.is_initialized():
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy()
        if device.type == "cuda":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if hasattr(model, "score"):  # a reward head stays in float32
            fully_shard(model.score, mesh=mesh)
        for module in [*layers, model]:
            fully_shard(module, mesh=mesh, mp_policy=policy)


def make_optimizer(model, args):
    """Fused AdamW; weight decay on matrices only, not on norms and biases."""
    matrices, vectors = (
        [p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False)
    )
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=args.adam_betas, fused=True)


@contextmanager
def unsharded(model):
    """All parameters whole on every process: generation then needs no communication per token."""
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in modules:
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


@torch.no_grad()
def generate(model, tokenizer, prompts: list[list[int]], args, device) -> list[list[int]]:
    """Sample a completion for each prompt: its token ids up to and with the first end token.

    Every setting is given here: the model's own generation config stays out of it. Sampling has a seed of its
    own and leaves the training's random state alone.
    """
    model.eval()
    rank, world_size = process()
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    own_config, model.generation_config = (
        model.generation_config,
        GenerationConfig(
            max_new_tokens=args.max_completion_length,
            eos_token_id=tokenizer.end_ids,
            pad_token_id=pad,
            **(sampling if args.temperature > 0 else {"do_sample": False}),
        ),
    )
    mine, completions = sorted(range(rank, len(prompts), world_size), key=lambda i: len(prompts[i])), {}
    with unsharded(model), torch.random.fork_rng():
        torch.manual_seed(args.seed + rank)
        for start in range(0, len(mine), args.generation_batch_size):
            chunk = mine[start : start + args.generation_batch_size]
            width = max(len(prompts[i]) for i in chunk)
            input_ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in chunk])
            attention_mask = torch.tensor(
                [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chunk]
            )
            prompt = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
            output = model.generate(**prompt, synced_gpus=False)  # processes have different numbers of chunks
            for i, ids in zip(chunk, output[:, width:].tolist(), strict=True):
                stop = next((n for n, token in enumerate(ids) if token in tokenizer.end_ids), len(ids))
                completions[i] = ids[: stop + 1]
    model.generation_config = own_config
    if dist.is_initialized():
        shares = [None] * world_size
        dist.all_gather_object(shares, completions)
        completions = {i: ids for share in shares for i, ids in share.items()}
    return [completions[i] for i in range(len(prompts))]


def final_answer(text: str) -> str:
    """What follows the last `####` (GSM8K's mark) without thousands separators, or else the whole text."""
    return text.rsplit("####", 1)[-1].strip().replace(",", "")


def save_checkpoint(output_dir: Path, model, optimizer, step: int, num_tokens: int, keep: int, others=None):
    """Write all that a continued run needs beside the older ones, rename it into place, drop the oldest.

    `others` are further models that move, by name.
    """
    folder, (rank, _) = output_dir / "checkpoints", process()
    weights, moments = dcp_state.get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": step, "num_tokens": num_tokens}
    state |= {name: dcp_state.get_model_state_dict(other) for name, other in (others or {}).items()}
    state[f"rng_{rank}"] = torch.get_rng_state()
    partial, name = folder / "partial", f"step_{step:08d}"
    dcp.save(state, checkpoint_id=partial, no_dist=not dist.is_initialized())
    if rank == 0:
        shutil.rmtree(folder / name, ignore_errors=True)
        partial.rename(folder / name)  # from here on it counts
        for old in sorted(folder.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    if dist.is_initialized():
        dist.barrier()


def load_checkpoint(output_dir: Path, model, optimizer, others=None) -> tuple[int, int]:
    """Restore the last complete checkpoint -> its step and token count; (0, 0) where there is none yet."""
    found = sorted((output_dir / "checkpoints").glob("step_*"))
    if not found:
        say(f"{output_dir} has no checkpoint yet: starting at step 0")
        return 0, 0
    weights, moments = dcp_state.get_state_dict(model, optimizer)
    state, rng = {"model": weights, "optimizer": moments, "step": 0, "num_tokens": 0}, f"rng_{process()[0]}"
    state |= {name: dcp_state.get_model_state_dict(other) for name, other in (others or {}).items()}
    state[rng] = torch.get_rng_state()  # stays so where more processes continue than had begun
    planner = dcp.default_planner.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(state, checkpoint_id=found[-1], planner=planner, no_dist=not dist.is_initialized())
    dcp_state.set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    for name, other in (others or {}).items():
        dcp_state.set_model_state_dict(other, state[name])
    torch.set_rng_state(state[rng])
    say(f"continuing from {found[-1]}")
    return state["step"], state["num_tokens"]


def save_model(folder: Path, model, tokenizer):
    """Write the model, its tokenizer and generation config as transformers, vLLM and TRL load them."""
    whole = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp_state.get_model_state_dict(model, options=whole)
    if process()[0] == 0:
        with torch.device("meta"):  # a shell without FSDP2's class name; its weights are given beside it
            shell = model.auto_class.from_config(model.config, dtype=model.stored_dtype or torch.float32)
        if shell.can_generate():
            ends = {"eos_token_id": tokenizer.end_ids, "pad_token_id": tokenizer.pad_token_id}
            shell.generation_config = GenerationConfig(**ends)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        tied = set(shell.all_tied_weights_keys)  # a tied head is stored once, as the embeddings
        weights = {k: v.to(shell.dtype) for k, v in weights.items() if k not in tied}
        shell.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    if dist.is_initialized():
        dist.barrier()


def stop_on_nonfinite(output_dir: Path, step: int, sequences: list[Sequence], loss: float, grad_norm: float):
    """End the run before the broken update, with the batch that broke it on disk."""
    path, checkpoints = (
        output_dir / f"nonfinite_step_{step}.json",
        (output_dir / "checkpoints").glob("step_*"),
    )
    if process()[0] == 0:
        batch = [
            {"input_ids": s.input_ids.tolist(), "trained": s.trained.astype(int).tolist()} for s in sequences
        ]
        path.write_text(json.dumps(batch))
    last = max(checkpoints, default="none was saved")
    say(
        f"step {step}: loss {loss}, gradient norm {grad_norm}; batch in {path}; last checkpoint: {last}",
        sys.stderr,
    )
    raise SystemExit(1)


class Logger:
    """metrics.jsonl, samples.jsonl, the progress bar, a line per interval, wandb; and the signals to stop."""

    def __init__(self, args, output_dir: Path, total_steps: int, step: int, columns: dict[str, str]):
        self.args, self.output_dir, self.total_steps, self.columns = args, output_dir, total_steps, columns
        self.first_step, self.started, self.stopping, self.wandb = step, time.perf_counter(), False, None
        self.handlers = {
            number: signal.signal(number, self.stop) for number in (signal.SIGTERM, signal.SIGINT)
        }
        if process()[0] > 0:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "args.json").write_text(json.dumps(asdict(args), indent=2))
        shutil.copy(sys.modules[type(args).__module__].__file__, output_dir)
        logs = {output_dir / "metrics.jsonl", output_dir / "samples.jsonl", *output_dir.glob("*.jsonl")}
        for path in logs:  # that a run continues
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            whole = [line for line in lines if line.endswith("}\n")]  # a killed run may leave half a line
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
            partial.rename(path)
        say(f"run: {output_dir}, {total_steps:,} steps")
        self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, disable=None)
        if args.wandb:
            import wandb

            self.wandb = wandb.init(
                project="cleanpost", name=output_dir.name, dir=output_dir, config=asdict(args)
            )

    def stop(self, *_):
        """Take a signal: the first asks the loop to save and end, a second does not wait for it."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        say("stopping after this step, with a checkpoint")

    def log(self, metrics: dict, samples: list[dict] = ()):
        if process()[0] > 0:
            return
        metrics = {key: value for key, value in metrics.items() if value == value}  # NaN: nothing is known
        step, total = metrics["step"], self.total_steps
        for name, rows in {
            "metrics": [metrics],
            "samples": [{"step": step} | sample for sample in samples],
        }.items():
            with open(self.output_dir / f"{name}.jsonl", "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        if self.wandb:
            self.wandb.log(metrics, step=step)
        self.bar.update(step - self.bar.n)
        if step and (step % self.args.log_every == 0 or step == total):
            left = round((time.perf_counter() - self.started) / (step - self.first_step) * (total - step))
            shown = {name: form for name, form in self.columns.items() if name in metrics}
            shown = "  ".join(f"{name} {metrics[name]:{form}}" for name, form in shown.items())
            say(f"step {step:>{len(str(total))}}/{total}  {shown}  left {left // 60}:{left % 60:02}")
        evaluated = [
            f"{k.removeprefix('eval/')} {v:.4g}" for k, v in metrics.items() if k.startswith("eval/")
        ]
        if evaluated:
            say(f"  evaluation at step {step}:  {'  '.join(evaluated)}")
        for sample in samples[:2]:
            say(f"    ...{sample['prompt'][-100:]!r} -> {sample['completion'][:200]!r}")

    def close(self, message: str):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if process()[0] == 0:
            self.bar.close()
            lines = map(json.loads, (self.output_dir / "metrics.jsonl").read_text().splitlines())
            curves = {}
            for line in lines:
                for key in line:
                    if key.startswith("eval/"):
                        curves.setdefault(key, []).append(line[key])
            for key, values in curves.items():
                say(f"  {key:<30} {values[0]:.4g} -> {values[-1]:.4g}")
            say(message)
        if self.wandb:
            self.wandb.finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
    leave_distributed()
