"""Reward models (RM): score answers, from pairs of which one is preferred, or from good and bad ones.

    bradley_terry  -E log sigma( r(x, y_w) - r(x, y_l) - m )                    Eq. 1, arXiv:2203.02155
    outcome        -E [ z log sigma(r(x, y)) + (1 - z) log sigma(-r(x, y)) ]    arXiv:2110.14168, section 4.2

r is a linear head on the last hidden state of the answer's last token; m is an optional margin per pair. The
backbone is a causal language model that answers already (after sft.py). The loop:

    1. Batch     take the next `--batch-size` pairs (or answers) and pack them, the two of a pair in one row
    2. Rewards   read the head at the last token of every answer
    3. Loss      one number a pair, or an answer; their mean over the whole optimizer batch
    4. Update    clip the gradient, learning-rate schedule, AdamW
    5. Evaluate  accuracy, calibration, length bias on held-out pairs; log; save
    6. Centre    move the mean reward of the training set to 0; a report with two plots

Deviations from common practice, each with its reason:
    1. The reward is read at an answer's end token, by position: what a policy samples ends there, without the
       line break that templates write behind it, and padding may have the same id.
    2. The offset that centres rewards is in the config (`reward_offset`): the head that transformers loads
       has no bias.

    python reward_model.py                                     # CPU, offline, 2 minutes on 2 cores
    python reward_model.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset trl-lib/ultrafeedback_binarized \
        --eval-fraction 0.02 --learning-rate 1e-5 --batch-size 64 --max-length 2048 \
        --max-tokens-per-micro-batch 16384

Shapes: N tokens in a row, B pairs (or answers), K answers of each (2 or 1), H hidden size.
"""

import ctypes
import gc
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
from itertools import takewhile
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
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils.chat_template_utils import render_jinja_template

from common import check_attention, collate, fsdp_forward, packed_hidden_states, segment_sum


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    objective: Literal["bradley_terry", "outcome"] = "bradley_terry"
    """Pairs of answers, or single answers labelled good or bad."""

    # Model
    model: str = "tiny/checker"
    """Model to fine-tune: a hub id or a folder."""
    num_members: int = 1
    """Models of an ensemble, one after the other, which differ in seed and data order."""
    member_backbone: tuple[str, ...] = ()
    """Backbones of the members in turn; by default all start from --model."""
    chat_template: str | None = None
    """File with a Jinja chat template to use instead of the tokenizer's own."""
    attn: str = "packed"
    """Attention: packed, or flash_attention_2 where it is installed, or eager (exact, slow)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about 30 % slower, far less memory, the same result."""
    compile: bool = False
    """Compile each layer with torch.compile."""

    # Data
    dataset: tuple[str, ...] = ()
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
    share_prompt: bool = True
    """Put a prompt into the row once, seen by all its answers (arXiv:2410.20305): the same result."""

    # Loss
    center_coef: float = 0.01
    """Weight of (r_c + r_r)^2 of each pair, which keeps rewards near 0 (arXiv:2312.09244; TRL: 0.01)."""
    label_smoothing: float = 0.0
    """Share of labels believed flipped; 0 trusts them all."""

    # Optimization
    learning_rate: float = 3e-4
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
    max_tokens_per_micro_batch: int = 512
    """Tokens of a packed row: memory only, never the result. A longer sequence gets its own row."""
    num_epochs: float = 2.0
    """Passes over the training set (TRL: 3)."""
    max_steps: int = 0
    """Steps (optimizer updates; online, rollouts); 0 derives them from --num-epochs."""

    # Evaluation and output
    eval_every: int = 50
    """Steps between evaluations; 0 evaluates only before and after."""
    num_eval: int = 0
    """Rows of the evaluation sets that are used; 0 uses all."""
    score: str | None = None
    """File of prompt + completion(s) rows to score with --model, a trained one, in place of training."""
    score_output: str | None = None
    """Where --score writes the rows with their rewards; by default beside the file."""
    reward_aggregation: Literal["mean", "min", "mean_minus_std"] = "mean"
    """One reward from those of several reward models (arXiv:2310.02743)."""
    std_coef: float = 1.0
    """Standard deviations that mean_minus_std takes off (arXiv:2310.02743 takes off variances)."""
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
        if not self.dataset:
            outcome = self.objective == "outcome"
            self.dataset = (f"tiny/data/{'unpaired' if outcome else 'preference'}_train.jsonl",)
            if not self.eval_dataset and not self.eval_fraction:
                self.eval_dataset = "tiny/data/preference_eval.jsonl"
        check_flags(self)
        if self.attn != "packed" or self.objective == "outcome" or self.score:  # single answers share nothing
            self.share_prompt = False
        if self.eval_fraction and self.eval_dataset:
            fail("--eval-fraction and --eval-dataset both name the held-out answers: give one of them")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def bradley_terry_loss(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    *,
    margin: torch.Tensor | float = 0.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Negative log-likelihood of each preference, (B,) from rewards (B,) (Eq. 1, arXiv:2203.02155).

    The chosen answer wins with probability sigma(r_c - r_r); `margin` (B,) is how much it must win by
    (arXiv:2307.09288, Eq. 2). With label_smoothing e the label is wrong with probability e.
    """
    differences = chosen_rewards - rejected_rewards - margin  # (B,)
    return -(1 - label_smoothing) * F.logsigmoid(differences) - label_smoothing * F.logsigmoid(-differences)


def outcome_loss(
    rewards: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Binary cross-entropy of each answer, (B,), from rewards (B,) as logits and labels (B,), 1 if good."""
    targets = labels * (1 - label_smoothing) + (1 - labels) * label_smoothing  # (B,)
    return -targets * F.logsigmoid(rewards) - (1 - targets) * F.logsigmoid(-rewards)


def center_loss(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> torch.Tensor:
    """(r_c + r_r)^2 of each pair, (B,): only differences are learnt otherwise (arXiv:2312.09244, Eq. 2)."""
    return (chosen_rewards + rejected_rewards).square()


def combine(rewards: torch.Tensor, *, reward_aggregation: str, std_coef: float) -> torch.Tensor:
    """One reward from those of several models, (members, ...) -> (...), after arXiv:2310.02743.

    A policy that is trained against the mean finds where single members err; `min` and `mean_minus_std`
    distrust answers on which they differ. The paper takes off variances, in another unit.
    """
    if reward_aggregation == "min":
        return rewards.amin(0)
    return rewards.mean(0) - (
        std_coef * rewards.std(0, unbiased=False) if reward_aggregation == "mean_minus_std" else 0
    )


@fsdp_forward
def answer_rewards(model, batch) -> torch.Tensor:
    """Rewards (B,), float32, of the B answers in a packed row, read at the last trained token of each."""
    states = packed_hidden_states(model, batch)[0, batch.completion_index]  # (C, H)
    ones = torch.ones_like(states[:, 0], dtype=torch.long)  # (C,)
    last = segment_sum(ones, batch.sequence_index, batch.num_sequences).cumsum(0) - 1  # (B,)
    return model.score(states[last if len(ones) else []].float()).squeeze(-1)  # none where a row holds filler


def preferred(margins: torch.Tensor) -> torch.Tensor:
    """1 where the chosen answer has the higher reward, 1/2 in a tie, 0 else: margins (B,) -> (B,)."""
    return (1 + margins.sign() * (margins.abs() > TIE)) / 2


def pairwise_accuracy(desirable: torch.Tensor, undesirable: torch.Tensor) -> float:
    """Share of couples in which the desirable answer has the higher reward, ties one half (ROC's area)."""
    return preferred((desirable[:, None] - undesirable[None]).flatten()).mean().item()


def calibration_error(differences: torch.Tensor, num_bins: int = 10) -> float:
    """Expected calibration error (arXiv:1706.04599, Eq. 3) of pairs, from r_c - r_r (P,).

    The model prefers one answer with confidence sigma(|difference|) in [1/2, 1] and is right or not; the
    error is the mean over bins of |confidence - accuracy|, weighted by their pairs.
    """
    confidence, right = torch.sigmoid(differences.abs()), preferred(differences)  # (P,)
    bins = ((confidence - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)  # (P,)
    gaps = [(confidence - right)[bins == n].sum().abs().item() for n in range(num_bins)]
    return sum(gaps) / len(differences)


def length_correlation(rewards: torch.Tensor, lengths: torch.Tensor) -> float:
    """Pearson's correlation of rewards (P,) with answer lengths (P,); 0 where one of them does not vary."""
    both = torch.stack([rewards.double(), lengths.double()])
    return torch.nan_to_num(torch.corrcoef(both)[0, 1]).item() if len(rewards) > 1 else 0.0


def lr_factor(step: int, *, total_steps: int, warmup_steps: int, lr_schedule: str) -> float:
    """The learning rate of the 1-based `step` as a share of its peak: linear warm-up, then down towards 0."""
    if step <= warmup_steps:
        return step / warmup_steps
    done = (step - warmup_steps - 1) / max(1, total_steps - warmup_steps)  # in [0, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[lr_schedule]


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------
TIE = 1e-4  # rewards closer than this are equal: in another row a float32 reward differs by 1e-6
COLUMNS = {  # of the terminal's lines
    "loss": ".4f",
    "accuracy": ".3f",
    "margin": ".3f",
    "mean_reward": "+.3f",
    "grad_norm": ".2f",
    "learning_rate": ".1e",
    "tokens_per_second": ",.0f",
}


def main(args: Args) -> dict:
    """Train, or score a file, as `args` says and return the last metrics."""
    rank, world_size, device = setup_distributed()
    if args.score:
        return score_file(args, device)
    if args.num_members > 1:
        return train_ensemble(args, device)
    torch.manual_seed(args.seed)
    output_dir = choose_output_dir(args, "reward_model")
    tokenizer = load_tokenizer(args)
    answers, labels, rows, held_out, held_out_labels, held_out_rows = load_labelled(tokenizer, args)
    pairwise = args.objective == "bradley_terry"
    margins = np.array([row.get("margin") or 0.0 for row in rows], np.float32)  # (P,)
    epoch_size, lengths = len(answers), np.array([row_length(a, args.share_prompt) for a in answers])  # (P,)
    total_steps = args.max_steps or max(1, math.ceil(args.num_epochs * epoch_size / args.batch_size))
    num_epochs = math.ceil(total_steps * args.batch_size / epoch_size)
    stream = data_order(lengths, [answers], [1], epoch_size, num_epochs, args.order, args.seed)
    for sequence in answers[stream[0]]:
        show_sequence(tokenizer, sequence)

    model = load_reward_model(args.model, args, tokenizer, device)
    optimizer = make_optimizer(model, args)
    step, num_tokens = load_checkpoint(output_dir, model, optimizer) if args.resume else (0, 0)
    logger = Logger(args, output_dir, total_steps, step, COLUMNS)
    metrics, evaluation = {}, (model, held_out, held_out_labels, args, device)
    if step == 0:
        logger.log({"step": 0} | evaluate_rewards(*evaluation)[0])
    while step < total_steps:
        # 1. Batch: the answers of this optimizer step, packed into rows that are dealt to the processes
        step, started = step + 1, time.perf_counter()
        picks = stream[(step - 1) * args.batch_size : step * args.batch_size]
        packed = pack(lengths[picks], args.max_tokens_per_micro_batch, multiple_of=world_size)
        num_good = max(1, labels[picks].sum())
        num_bad = max(1, (1 - labels)[picks].sum())
        model.train()
        sums = torch.zeros(5, device=device)  # told to stop, loss, right, rewards of good and of bad answers
        extremes = torch.full((2,), -math.inf, device=device)  # of rewards and of their negatives
        for row in packed[rank::world_size]:
            # 2. Rewards: (B, 2), chosen and rejected, or (B, 1)
            ids = picks[row]
            batch = collate_pairs([answers[i] for i in ids], device, args.share_prompt)
            rewards = answer_rewards(model, batch).view(-1, labels.shape[1])  # (B, K); none in an empty row
            good = torch.from_numpy(labels[ids]).to(device)  # (B, K)

            # 3. Loss: each row adds its part of the mean over the whole optimizer batch
            if pairwise:
                margin = torch.from_numpy(margins[ids]).to(device)  # (B,)
                losses = bradley_terry_loss(*rewards.T, margin=margin, label_smoothing=args.label_smoothing)
                losses = losses + args.center_coef * center_loss(*rewards.T)  # (B,)
                right = preferred(rewards.detach()[:, 0] - rewards.detach()[:, 1])  # (B,)
            else:
                losses = outcome_loss(rewards[:, 0], good[:, 0], label_smoothing=args.label_smoothing)  # (B,)
                right = preferred(rewards.detach()[:, 0] * (2 * good[:, 0] - 1))  # (B,)
            loss = losses.sum() / len(picks)
            (loss * world_size).backward()  # FSDP2 averages over processes what is to be summed
            with torch.no_grad():
                sums[1:] += torch.stack(
                    [loss, right.sum(), (rewards * good).sum(), (rewards * (1 - good)).sum()]
                )
                if len(ids):
                    extremes = torch.maximum(extremes, torch.stack([rewards.max(), -rewards.min()]))

        # 4. Update
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * lr_factor(
                step, total_steps=total_steps, warmup_steps=args.warmup_steps, lr_schedule=args.lr_schedule
            )
        sums[0] = logger.stopping
        if dist.is_initialized():
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
        results = torch.cat([all_reduce(sums), extremes, full(grad_norm)[None]])
        stopping, loss, right, good_sum, bad_sum, largest, smallest, grad_norm = (
            results.tolist()
        )  # synchronises
        if not math.isfinite(loss + grad_norm):
            sequences = [sequence for i in picks for sequence in answers[i]]
            stop_on_nonfinite(output_dir, step, sequences, loss, grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started

        # 5. Evaluate, log, save
        batch_tokens = int(lengths[picks].sum())
        num_tokens += batch_tokens
        room = len(packed) * max(args.max_tokens_per_micro_batch, *lengths[picks])
        metrics = {
            "step": step,
            "epoch": step * args.batch_size / epoch_size,
            "loss": loss,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            "accuracy": right / len(picks),
            "margin": good_sum / num_good - bad_sum / num_bad,
            "mean_reward": (good_sum + bad_sum) / labels[picks].size,
            "min_reward": -smallest,
            "max_reward": largest,
            "num_tokens": num_tokens,
            "tokens_per_second": batch_tokens / seconds,
            "step_time": seconds,
            "packing/fill": batch_tokens / room,
        }
        if device.type == "cuda":
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        if step == total_steps or (args.eval_every and step % args.eval_every == 0):
            metrics |= evaluate_rewards(*evaluation)[0]
        logger.log(metrics)
        if stopping or (args.save_every and (step == total_steps or step % args.save_every == 0)):
            save_checkpoint(output_dir, model, optimizer, step, num_tokens, args.keep_checkpoints)
        if stopping and step < total_steps:
            logger.close(f"stopped; continue with --resume --output-dir {output_dir}")
            return metrics

    # 6. Centre: the mean reward of the training set becomes 0
    for p in model.parameters():  # as they are saved
        p.data.copy_(p.data.to(model.stored_dtype or torch.float32))
    model.config.reward_offset -= pair_rewards(model, answers, args, device).mean().item()
    save_model(output_dir / "model", model, tokenizer)
    if held_out:
        report(output_dir, evaluate_rewards(*evaluation)[1], held_out, held_out_labels, held_out_rows)
    logger.close(
        f"model saved to {output_dir / 'model'}, mean reward {-model.config.reward_offset:+.3f} moved to 0"
    )
    return metrics


def evaluate_rewards(model, held_out, labels, args, device) -> tuple[dict, torch.Tensor]:
    """Accuracy, calibration and length bias on what is held out, and its rewards (P, K)."""
    if not held_out:
        return {}, torch.zeros(0, 2)
    rewards = pair_rewards(model, held_out, args, device).cpu()  # (P, K)
    lengths, good = count_tokens(held_out), torch.from_numpy(labels).bool()  # (P, K)
    metrics = {
        "eval/length_correlation": length_correlation(rewards.flatten(), torch.from_numpy(lengths).flatten())
    }
    if len(held_out[0]) == 1:
        right = preferred(rewards * (2 * good.int() - 1))
        metrics |= {
            "eval/accuracy": right.mean().item(),
            "eval/auc": pairwise_accuracy(rewards[good], rewards[~good]),
        }
        return metrics, rewards
    differences = rewards[:, 0] - rewards[:, 1]  # (P,)
    right, alike = preferred(differences), torch.from_numpy(equal_lengths(lengths))  # (P,)
    metrics["eval/accuracy"] = right.mean().item()
    metrics["eval/accuracy_length_matched"] = right[alike].mean().item() if alike.any() else 0.5
    metrics["eval/ties"] = (differences.abs() <= TIE).float().mean().item()
    metrics["eval/ece"] = calibration_error(differences)
    metrics["eval/margin"] = differences.mean().item()
    return metrics, rewards


def train_ensemble(args, device) -> dict:
    """Train --num-members models into member_<n>/ of one folder, and say how far they agree."""
    output_dir, members = choose_output_dir(args, "reward_ensemble"), []
    if not args.resume and (output_dir / "member_0").exists():
        fail(f"{output_dir} holds an ensemble: --resume continues it, another --output-dir starts a new one")
    shared_tokenizer(list(args.member_backbone or [args.model]), args)
    for n in range(args.num_members):
        folder = output_dir / f"member_{n}"
        backbone = args.member_backbone[n % len(args.member_backbone)] if args.member_backbone else args.model
        begun = args.resume and (folder / "metrics.jsonl").exists()
        own = {"model": backbone, "seed": args.seed + n, "output_dir": str(folder), "resume": begun}
        member = replace(args, num_members=1, **own)
        say(f"member {n + 1} of {args.num_members}: {backbone}, seed {args.seed + n}")
        if not (folder / "model").exists():
            metrics = main(member)
            if not (folder / "model").exists():  # told to stop
                return metrics
        members.append(folder / "model")
    if process()[0] == 0:
        index = {"members": [str(member.relative_to(output_dir)) for member in members]}
        (output_dir / "ensemble.json").write_text(json.dumps(index, indent=2))
    return agreement(output_dir, args, device)


def agreement(output_dir: Path, args, device) -> dict:
    """How an ensemble does on the held-out pairs, together and member against member."""
    models, tokenizer = load_rewards(str(output_dir), args, device)
    held_out = load_labelled(tokenizer, args)[3]
    if not held_out or len(held_out[0]) == 1:
        return {}
    rewards = torch.stack(
        [pair_rewards(model, held_out, args, device).cpu() for model in models]
    )  # (K, P, 2)
    differences = rewards[..., 0] - rewards[..., 1]  # (K, P)
    votes = (differences > 0).float()  # (K, P)
    same = torch.stack([(a == b).float().mean() for i, a in enumerate(votes) for b in votes[:i]])
    metrics = {
        f"eval/accuracy_{how}": preferred(d).mean().item()
        for how, d in (
            ("members", differences.flatten()),
            ("mean", combine(differences, reward_aggregation="mean", std_coef=0.0)),
        )
    }
    metrics |= {
        "eval/agreement": same.mean().item(),
        "eval/reward_std": rewards.std(0, unbiased=False).mean().item(),
    }
    if process()[0] == 0:
        (output_dir / "agreement.json").write_text(json.dumps(metrics, indent=2))
    say(f"ensemble saved to {output_dir}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
    return metrics


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
class Sequence(NamedTuple):
    """Token ids and which of them are trained, both (length,)."""

    input_ids: np.ndarray
    trained: np.ndarray


class Pair(NamedTuple):
    """Two answers to the same prompt, each a sequence with the prompt before it."""

    chosen: Sequence
    rejected: Sequence


FILLER = Sequence(np.zeros(1, np.int32), np.zeros(1, bool))  # for a process that has no row: trains nothing


PAIR_FORMATS = "prompt + chosen + rejected; chosen + rejected"


UNPAIRED_FORMATS = "prompt + completion + label (true or false); prompt + chosen + rejected"


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


def read_preferences(source: str, split: str, config: str | None, limit: int) -> list[tuple[str, dict]]:
    """Where each row of a preference dataset stands, and the row with `prompt`, `chosen` and `rejected`.

    Without a prompt it is what both answers begin with: whole messages, or whole words of texts.
    """
    found = []
    for n, row in enumerate(load_rows(source, split, config)[: limit or None], 1):
        where = f"{source}, row {n}"
        if not isinstance(row, dict):
            fail(f"{where}: not an object with columns, but {type(row).__name__}")
        chosen, rejected = row.get("chosen"), row.get("rejected")
        if chosen is None or rejected is None:
            fail(f"{where}: found the columns {', '.join(row)}; accepted are {PAIR_FORMATS}")
        if not all(isinstance(answer, str | list) for answer in (chosen, rejected)):
            fail(f"{where}: chosen and rejected are neither text nor messages")
        asked = [{"role": "user", "content": row["question"]}] if "question" in row else None
        prompt = row.get("prompt", asked)
        talks = isinstance(chosen, list) and chosen and isinstance(chosen[0], dict)
        if prompt is None or (talks and chosen[0].get("role") != "assistant"):  # the answers contain it
            shared = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(chosen, rejected)))
            if isinstance(chosen, str):
                shared = max(chosen.rfind(" ", 0, shared), chosen.rfind("\n", 0, shared), 0)
            else:
                shared = min(shared, len(chosen) - 1, len(rejected) - 1)  # equal ones keep an answer each
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        found.append((where, row | {"prompt": prompt, "chosen": chosen, "rejected": rejected}))
    return found


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


def tokenize(tokenizer, example: dict) -> list[Sequence]:
    """An example as token ids and which of them are trained: one sequence, or one per turn (see `render`)."""
    if "messages" in example:
        sequences = []
        for text, spans in render(tokenizer, example):
            # No special tokens: BOS is in the text already.
            tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            input_ids = np.array(tokens.input_ids, np.int32)
            begins, ends = np.array(tokens.offset_mapping).T
            trained = np.any([(ends > begin) & (begins < end) for begin, end in spans], axis=0)
            # The end token of a trained turn, where a template leaves it outside its marks.
            trained[1:] |= trained[:-1] & np.isin(input_ids[1:], tokenizer.end_ids)
            sequences.append(Sequence(input_ids, trained))
        return sequences
    if tokenizer.eos_token_id is None:
        fail("the tokenizer has no end token (EOS), so a completion could not end")
    prompt_ids = tokenizer(example["prompt"]).input_ids
    if tokenizer("a").input_ids[-1] != tokenizer("a", add_special_tokens=False).input_ids[-1]:
        prompt_ids.pop()  # the EOS that some tokenizers append
    completion_ids = tokenizer(example["prompt"] + example["completion"]).input_ids
    if completion_ids[: len(prompt_ids)] == prompt_ids:
        completion_ids = completion_ids[len(prompt_ids) :]
    else:  # a merge across the boundary: the prompt keeps the tokens that it has when the model is used
        completion_ids = tokenizer(example["completion"], add_special_tokens=False).input_ids
    if completion_ids[-1] not in tokenizer.end_ids:
        completion_ids.append(tokenizer.eos_token_id)
    input_ids = np.array(prompt_ids + completion_ids, np.int32)
    trained = np.arange(len(input_ids)) >= max(1, len(prompt_ids))  # nothing predicts the first
    return [Sequence(input_ids, trained)]


def tokenize_answer(tokenizer, prompt, answer, row: dict, where: str) -> Sequence:
    """A prompt and one answer to it, each text or messages (or steps, a list of texts), as one sequence."""
    if isinstance(answer, list) and answer and isinstance(answer[0], str):
        answer = "\n".join(answer)
    try:
        example = as_example(prompt, answer, row, where)
        if tokenizer.chat_template is None and "messages" in example:
            use_chatml(tokenizer)
        found = tokenize(tokenizer, example)
    except Exception as error:  # templates raise what they like
        fail(f"{where}: neither text nor messages that the chat template takes ({error})")
    if len(found) > 1 or not found[0].trained.any():
        fail(f"{where}: the chat template does not render it as one prompt and one answer")
    return found[0]


def fit(answers, args, seen: set, notes: Counter):
    """Answers to one prompt within --max-length, or None; `notes` counts what was cut or dropped."""
    longest = max(len(sequence.input_ids) for sequence in answers)
    if longest > args.max_length and args.overlong == "truncate":
        notes[f"cut to {args.max_length:,} tokens"] += 1
        cut = [Sequence(*(x[: args.max_length] for x in sequence)) for sequence in answers]
        answers = Pair(*cut) if len(cut) > 1 else tuple(cut)
    key = b"|".join(sequence.input_ids.tobytes() for sequence in answers)
    if len(answers) > 1 and np.array_equal(answers[0].input_ids, answers[1].input_ids):
        notes["dropped as identical answers"] += 1
    elif args.dedupe and key in seen:
        notes["dropped as duplicates"] += 1
    elif any(len(ids) > args.max_length or not trained.any() for ids, trained in answers):
        notes[f"dropped as longer than {args.max_length:,} tokens"] += 1
    else:
        seen.add(key)
        return answers
    return None


def load_pairs(
    tokenizer, source: str | None, split: str, args, limit: int = 0, read=read_preferences
) -> tuple[list[Pair], list[dict]]:
    """A preference dataset as pairs of sequences, and the row of each; says what was dropped and how answers
    differ in length."""
    if source is None:
        return [], []
    rows = read(source, split, args.dataset_config, limit)
    pairs, kept, seen, notes, lengths = [], [], set(), Counter(), []
    for where, row in tqdm(rows, desc=f"tokenize {source}", leave=False, disable=None):
        if row.get("score_chosen") is not None and row["score_chosen"] == row.get("score_rejected"):
            notes["dropped as ties"] += 1
            continue
        chosen, rejected = (
            tokenize_answer(tokenizer, row["prompt"], row[key], row, f"{where}, {key}")
            for key in ("chosen", "rejected")
        )
        pair = Pair(chosen, rejected)
        lengths.append(max(len(sequence.input_ids) for sequence in pair))
        pair = fit(pair, args, seen, notes)
        if pair is not None:
            pairs.append(pair)
            kept.append(row)
    if not pairs:
        shortest = f"; the shortest pair has {min(lengths)} tokens an answer" if lengths else ""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in notes.items())
        fail(f"{source}: no pair is left ({reasons}){shortest}")
    chosen, rejected = count_tokens(pairs).T
    told = "".join(f", {count:,} {reason}" for reason, count in notes.items())
    longer = (
        f"chosen longer in {np.mean(chosen > rejected):.0%}, rejected in {np.mean(chosen < rejected):.0%}"
    )
    means = f"answers of {chosen.mean():.1f} and {rejected.mean():.1f} tokens"
    say(f"{source}: {len(pairs):,} pairs{told}; {means}, {longer}")
    return pairs, kept


def load_unpaired(tokenizer, source: str, split: str, args, limit: int) -> tuple[list, np.ndarray]:
    """Single answers (P,) and whether each is desirable (P, 1), from `prompt`, `completion` and `label`."""
    answers, labels, seen, notes, lengths = [], [], set(), Counter(), []
    rows = load_rows(source, split, args.dataset_config)[: limit or None]
    for n, row in enumerate(tqdm(rows, desc=f"tokenize {source}", leave=False, disable=None), 1):
        where = f"{source}, row {n}"
        if not isinstance(row, dict):
            fail(f"{where}: not an object with columns, but {type(row).__name__}")
        asked = [{"role": "user", "content": row["question"]}] if "question" in row else None
        prompt = row.get("prompt", asked)
        if prompt is None or row.get("completion") is None or row.get("label") not in (True, False):
            fail(f"{where}: found the columns {', '.join(row)}; accepted are {UNPAIRED_FORMATS}")
        sequence = tokenize_answer(tokenizer, prompt, row["completion"], row, where)
        lengths.append(len(sequence.input_ids))
        answer = fit((sequence,), args, seen, notes)
        if answer is not None:
            answers.append(answer)
            labels.append([int(row["label"])])
    if not answers:
        shortest = f"the shortest has {min(lengths)} tokens"
        fail(f"{source}: no answer fits --max-length {args.max_length}; {shortest}")
    told = "".join(f", {count:,} {reason}" for reason, count in notes.items())
    say(f"{source}: {len(answers):,} answers, {sum(label for [label] in labels):,} of them desirable{told}")
    return answers, np.array(labels)


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


def count_overlap(pairs: list, held_out: list):
    """Warn where what is held out is trained on, too."""
    asked = {prompt_of(pair) for pair in held_out}
    overlap = sum(prompt_of(pair) in asked for pair in pairs)
    if overlap:
        say(f"warning: {overlap:,} training examples have a prompt that is held out, too")


def prompt_of(answers: tuple) -> bytes:
    """What the answers of a pair, or a single one, are answers to, as a key."""
    input_ids, trained = answers[0]
    return input_ids[: int(trained.argmax())].tobytes()


def shared_tokens(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences have in common from their beginning on."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


def shared_prompt(pair: Pair) -> int:
    """How many tokens of its prompt a pair can have in a row once: those that neither answer trains."""
    untrained = min(int(s.trained.argmax()) if s.trained.any() else 0 for s in pair)
    return min(untrained, shared_tokens(pair.chosen.input_ids, pair.rejected.input_ids))


def row_length(pair: Pair, share_prompt: bool) -> int:
    """Tokens that a pair takes in a row."""
    return sum(len(s.input_ids) for s in pair) - (shared_prompt(pair) if share_prompt else 0)


def count_tokens(pairs: list[Pair]) -> np.ndarray:
    """Trained tokens (P, 2) of the chosen and rejected answers."""
    return np.array([[sequence.trained.sum() for sequence in pair] for pair in pairs])


def equal_lengths(counts: np.ndarray) -> np.ndarray:
    """Which pairs (P,) have answers whose token counts (P, 2) differ by 10 % of the longer one at most."""
    return np.abs(counts[:, 0] - counts[:, 1]) <= 0.1 * counts.max(1)


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


def load_labelled(tokenizer, args):
    """Training answers, labels (P, K), 1 for what is good, and their rows; then the same, held out."""

    def load(source, split, limit):
        columns = load_rows(source, split, args.dataset_config)[0]
        if args.objective == "outcome" and isinstance(columns, dict) and "completion" in columns:
            answers, labels = load_unpaired(tokenizer, source, split, args, limit)
            return answers, labels, [{}] * len(answers)
        pairs, rows = load_pairs(tokenizer, source, split, args, limit)
        return pairs, np.array([[1, 0]] * len(pairs)), rows

    parts = [load(source, args.dataset_split, 0) for source in args.dataset]
    answers, rows = ([item for part in parts for item in part[n]] for n in (0, 2))
    if len({part[1].shape[1] for part in parts}) > 1:
        fail("--dataset names pairs and single answers: give one kind")
    labels = np.concatenate([part[1] for part in parts])
    held_out, held_out_labels, held_out_rows = [], np.zeros((0, 2), int), []
    if args.eval_dataset:
        held_out, held_out_labels, held_out_rows = load(args.eval_dataset, args.eval_split, args.num_eval)
    elif args.eval_fraction:
        kept, apart = hold_out(answers, args)
        held_out, held_out_labels, held_out_rows = (
            [answers[i] for i in apart],
            labels[apart],
            [rows[i] for i in apart],
        )
        answers, labels, rows = [answers[i] for i in kept], labels[kept], [rows[i] for i in kept]
    count_overlap(answers, held_out)
    if args.objective == "outcome" and labels.shape[1] == 2:  # pairs, taken apart
        answers, labels = [(s,) for pair in answers for s in pair], labels.reshape(-1, 1)
        rows = [row for row in rows for _ in range(2)]
    return answers, labels, rows, held_out, held_out_labels, held_out_rows


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


@torch.no_grad()
def pair_rewards(model, pairs: list, args, device) -> torch.Tensor:
    """Rewards (P, K) of the answers of pairs, or of single ones, under a model, on every process."""
    model.eval()
    rank, world_size = process()
    rewards = torch.zeros(len(pairs), len(pairs[0]), device=device)
    lengths = [row_length(pair, args.share_prompt) for pair in pairs]
    rows = pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)
    for row in tqdm(rows[rank::world_size], desc="rewards", leave=False, disable=None if rank == 0 else True):
        batch = collate_pairs([pairs[i] for i in row], device, args.share_prompt)
        rewards[row] = answer_rewards(model, batch).view(-1, rewards.shape[1])
    return all_reduce(rewards) + model.config.reward_offset


def load_rewards(name: str, args, device) -> tuple[list, object]:
    """The reward model in a folder, or all members of an ensemble's, and their tokenizer."""
    index = Path(locate(name)) / "ensemble.json"
    names = (
        [str(index.parent / m) for m in json.loads(index.read_text())["members"]]
        if index.exists()
        else [name]
    )
    tokenizer = shared_tokenizer(names, args)
    return [load_reward_model(member, args, tokenizer, device) for member in names], tokenizer


def shared_tokenizer(names: list[str], args):
    """The one tokenizer of an ensemble's members."""
    tokenizers = [load_tokenizer(replace(args, model=name)) for name in names]
    for name, tokenizer in zip(names, tokenizers, strict=True):
        if tokenizer.get_vocab() != tokenizers[0].get_vocab():
            fail(f"members of an ensemble share a tokenizer; those of {names[0]} and {name} differ")
    return tokenizers[0]


def score_file(args, device) -> dict:
    """Write the rows of --score with a `reward` each: of its completion, or a list for its completions."""
    output = Path(args.score_output or Path(args.score).with_suffix(".scored.jsonl"))
    if output.exists():
        fail(f"{output} exists: choose another --score-output")
    rows = load_rows(args.score, args.dataset_split, args.dataset_config)
    models, tokenizer = load_rewards(args.model, args, device)
    answers, owners = [], []
    for n, row in enumerate(rows):
        where = f"{args.score}, row {n + 1}"
        if not isinstance(row, dict):
            fail(f"{where}: not an object with columns, but {type(row).__name__}")
        asked = [{"role": "user", "content": row["question"]}] if "question" in row else None
        prompt, completions = row.get("prompt", asked), row.get("completions", [row.get("completion")])
        if prompt is None or not isinstance(completions, list) or None in completions:
            fail(f"{where}: found the columns {', '.join(row)}; accepted are prompt + completion(s)")
        answers += [(tokenize_answer(tokenizer, prompt, c, row, where),) for c in completions]
        owners += [n] * len(completions)
    members = torch.stack(
        [pair_rewards(model, answers, args, device)[:, 0].cpu() for model in models]
    )  # (K, P)
    rewards = combine(members, reward_aggregation=args.reward_aggregation, std_coef=args.std_coef)  # (P,)
    found = [[] for _ in rows]
    for n, reward in zip(owners, rewards.tolist(), strict=True):
        found[n].append(reward)
    if process()[0] == 0:
        partial = output.with_name(f"{output.name}.partial")
        with open(partial, "w") as file:
            for row, scores in zip(rows, found, strict=True):
                file.write(json.dumps(row | {"reward": scores if "completions" in row else scores[0]}) + "\n")
        partial.rename(output)
    spread = f"mean {rewards.mean():+.3f}, from {rewards.min():+.3f} to {rewards.max():+.3f}"
    say(f"{output}: {len(rewards):,} rewards, {spread}")
    return {"mean_reward": rewards.mean().item()}


def report(output_dir: Path, rewards: torch.Tensor, held_out: list, labels: np.ndarray, rows: list[dict]):
    """report.json and report.png: accuracy by margin and `kind`, calibration, rewards by label and length."""
    if process()[0] > 0:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good, lengths, found = torch.from_numpy(labels).bool(), torch.from_numpy(count_tokens(held_out)), {}
    figure, (reliability, histogram, scatter) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    if labels.shape[1] == 2:
        differences = rewards[:, 0] - rewards[:, 1]  # (P,)
        right, confidence = preferred(differences), torch.sigmoid(differences.abs())  # (P,)
        found["ties"], found["ece"] = int((differences.abs() <= TIE).sum()), calibration_error(differences)
        edges = torch.quantile(differences.abs(), torch.linspace(0, 1, 5))  # quarters by size of the margin
        quarter = torch.bucketize(differences.abs(), edges[1:-1])  # (P,)
        found["by_margin"] = [
            {
                "from": edges[n].item(),
                "to": edges[n + 1].item(),
                "accuracy": right[quarter == n].mean().item(),
            }
            for n in range(4)
            if (quarter == n).any()
        ]
        kinds = np.array([str(row.get("kind", "")) for row in rows])
        found["by_kind"] = {
            kind: {
                "pairs": int((kinds == kind).sum()),
                "accuracy": right[torch.from_numpy(kinds == kind)].mean().item(),
            }
            for kind in sorted({*kinds} - {""})
        }
        bins = ((confidence - 0.5) * 20).long().clamp(max=9)  # (P,)
        drawn = [n for n in range(10) if (bins == n).any()]
        reliability.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8)
        means = [[x[bins == n].mean().item() for n in drawn] for x in (confidence, right)]
        reliability.plot(*means, marker="o")
        reliability.set(
            xlabel="confidence sigma(|difference|)", ylabel="accuracy", title=f"ECE {found['ece']:.3f}"
        )
        for kind, line in found["by_kind"].items():
            say(f"  {kind:<30} {line['accuracy']:.3f} of {line['pairs']:,} pairs")
    for name, side in {"good": good, "bad": ~good}.items():
        histogram.hist(rewards[side].numpy(), bins=40, alpha=0.6, label=name)
        scatter.scatter(lengths[side], rewards[side], s=4, alpha=0.5, label=name)
    found["length_correlation"] = length_correlation(rewards.flatten(), lengths.flatten())
    histogram.set(xlabel="reward", title="held-out answers")
    histogram.legend()
    scatter.set(
        xlabel="tokens", ylabel="reward", title=f"correlation with length {found['length_correlation']:+.2f}"
    )
    figure.savefig(output_dir / "report.png", dpi=120)
    plt.close(figure)
    (output_dir / "report.json").write_text(json.dumps(found, indent=2))


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


def collate_pairs(pairs: list[Pair], device, share_prompt: bool = False):
    """Pairs as one packed row: its sequences 2k and 2k + 1 are the chosen and the rejected one of pair k.

    Of single answers, tuples of one sequence each, sequence k is answer k.
    """
    pairs = pairs or [Pair(FILLER, FILLER)]
    shared = [n for pair in pairs for n in (0, shared_prompt(pair))[: len(pair)]] if share_prompt else None
    return collate([sequence for pair in pairs for sequence in pair], device, shared)


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
