"""IPO, KTO, SimPO and ORPO: four answers to what DPO gets wrong, one pure function each and one loop.

    ipo    (h - 1 / (2 tau))^2, h = log pi/ref (y_w) - log pi/ref (y_l)            Eq. 17, arXiv:2310.12036
    kto    lambda_y - v(x, y), v = lambda_D sigma(beta (r - z0)), r = log pi/ref   Eq. 7, arXiv:2402.01306
                            or lambda_U sigma(beta (z0 - r)) for an undesirable y
    simpo  -log sigma(beta (mean log pi(y_w) - mean log pi(y_l)) - gamma)          Eq. 6, arXiv:2405.14734
    orpo   NLL(y_w) - lambda log sigma(log odds(y_w) / odds(y_l))                  Eq. 6, arXiv:2403.07691

IPO ends at a margin instead of at infinity; KTO needs no pairs, only answers that are good or bad; SimPO and
ORPO need no reference: SimPO compares what generation maximizes, ORPO is supervised fine-tuning with a
penalty on the rejected answer. tau and lambda are `--beta`, gamma / beta is `--gamma-beta-ratio`. The loop:

    0. Reference  log-probs of all answers under the reference, once, cached on disk (ipo, kto)
    1. Batch      take the next `--batch-size` pairs, or single answers, and pack them into rows
    2. KL         kto: z0, the mean of log pi/ref of mismatched answers over the whole optimizer batch
    3. Log-probs  sum, or average, them over each answer
    4. Loss       one number a pair (kto: an answer); their mean over the whole optimizer batch
    5. Update     clip the gradient, learning-rate schedule, AdamW
    6. Evaluate   accuracy on held-out pairs, sampled answers; log; save

Deviations from the papers, each with its reason:
    1. KTO's mismatched answers are those of the row before that has another prompt, fixed for the run, where
       the paper draws them from the batch: the reference then knows them from its one pass.
    2. AdamW with the schedule of sft.py throughout; the papers use RMSprop, Adam and AdamW.

    python ipo_kto_simpo_orpo.py --algorithm kto                # CPU, offline, 2 minutes on 2 cores
    python ipo_kto_simpo_orpo.py --algorithm simpo --model Qwen/Qwen2.5-1.5B-Instruct \
        --dataset trl-lib/ultrafeedback_binarized --learning-rate 1e-6 --batch-size 128 --max-length 2048 \
        --max-tokens-per-micro-batch 16384

Shapes: N tokens in a row, B pairs or single answers, K answers of each (2 or 1), C trained tokens.
"""

import ctypes
import gc
import hashlib
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
from dataclasses import asdict, dataclass
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.chat_template_utils import render_jinja_template

from common import check_attention, check_packed, collate, segment_sum, token_logprobs


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    algorithm: Literal["ipo", "kto", "simpo", "orpo"] = "ipo"
    """Which of the four losses; simpo and orpo load no reference."""

    # Model
    model: str = "tiny/sft"
    """Model to fine-tune: a hub id or a folder."""
    ref_model: str | None = None
    """Reference model: a hub id or a folder; by default --model as it is before training."""
    cache_dir: str = "runs/cache"
    """Folder of cached log-probs, found again by model, tokens and attention."""
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
    share_prompt: bool = False
    """Put a prompt into the row once, seen by all its answers (arXiv:2410.20305): the same result."""

    # Loss
    beta: float | None = None
    """IPO's tau, KTO's beta, SimPO's beta, ORPO's lambda; by default 0.1, 0.5, 2.0 and 0.5."""
    ipo_length_average: bool = False
    """IPO on log-ratios averaged over each answer's tokens, as TRL reads the paper, not on their sums."""
    desirable_weight: float = 1.0
    """KTO's lambda_D, the weight of desirable answers (TRL: 1)."""
    undesirable_weight: float = 1.0
    """KTO's lambda_U, the weight of undesirable answers (TRL: 1); see the rule that the log prints."""
    gamma_beta_ratio: float = 0.5
    """SimPO's target margin gamma as a share of beta (SimPO: 0.3 to 1.0; 0.5 for most models)."""
    orpo_nll: Literal["full", "response"] = "full"
    """ORPO's NLL over prompt and answer, as its authors' code has it, or over the answer alone."""
    sft_coef: float = 0.0
    """Weight of the chosen answers' mean negative log-likelihood per token (RPO, arXiv:2404.19733: 1)."""

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
    num_epochs: float = 1.0
    """Passes over the training set (TRL: 3)."""
    max_steps: int = 0
    """Steps (optimizer updates; online, rollouts); 0 derives them from --num-epochs."""

    # Evaluation and output
    eval_every: int = 50
    """Steps between evaluations; 0 evaluates only before and after."""
    num_eval: int = 256
    """Rows of the evaluation sets that are used; 0 uses all."""
    max_completion_length: int = 128
    """Longest sampled answer in tokens."""
    generation_batch_size: int = 64
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
        kto = self.algorithm == "kto"
        if not self.dataset:
            self.dataset = ("tiny/data/unpaired_train.jsonl" if kto else "tiny/data/preference_train.jsonl",)
            if not self.eval_dataset and not self.eval_fraction:
                self.eval_dataset = "tiny/data/preference_eval.jsonl"
        if self.beta is None:
            self.beta = {"ipo": 0.1, "kto": 0.5, "simpo": 2.0, "orpo": 0.5}[self.algorithm]
        check_flags(self)
        if not self.beta > 0:
            fail(f"--beta must be above 0, not {self.beta}")
        if self.eval_fraction and self.eval_dataset:
            fail("--eval-fraction and --eval-dataset both name the held-out answers: give one of them")
        if self.ref_model and self.algorithm in REFERENCE_FREE:
            fail(f"--ref-model means nothing to --algorithm {self.algorithm}, which has no reference")
        if self.ipo_length_average and self.algorithm != "ipo":
            fail(f"--ipo-length-average means nothing to --algorithm {self.algorithm}")
        if self.sft_coef and self.algorithm == "orpo":
            fail("--algorithm orpo has the NLL of the chosen answers already; --beta weighs the other term")
        if self.share_prompt and kto:
            fail("--share-prompt is for pairs; --algorithm kto has single answers")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
REFERENCE_FREE = ("simpo", "orpo")


def ipo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor,
    ref_rejected_logps: torch.Tensor,
    *,
    beta: float,
) -> torch.Tensor:
    """IPO of each pair, (B,) from four summed log-probs (B,): (h - 1 / (2 beta))^2.

    Eq. 17 of arXiv:2310.12036; h is the difference of the pair's log-ratios log pi/ref, and beta the paper's
    tau. Where DPO's loss falls for ever, this one has its minimum at a margin of 1 / (2 beta).
    """
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps  # (B,) log-ratios
    return (chosen - rejected - 1 / (2 * beta)).square()


def kto_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    labels: torch.Tensor,
    kl: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """KTO of each answer, (B,) from summed log-probs (B,) and labels (B,), true if desirable.

    Eq. 7 of arXiv:2402.01306: gains and losses are felt against a reference point, and both level off. The
    point z0 is the KL of policy and reference, estimated by `kl`, a scalar: the mean of log pi/ref over
    mismatched answers. A KL is not negative, so it is clamped at 0; it takes no gradient.
    """
    log_ratio, reference_point = logps - ref_logps, kl.detach().clamp(min=0)  # (B,), scalar
    desirable = desirable_weight * (1 - torch.sigmoid(beta * (log_ratio - reference_point)))  # (B,)
    undesirable = undesirable_weight * (1 - torch.sigmoid(beta * (reference_point - log_ratio)))  # (B,)
    return torch.where(labels.bool(), desirable, undesirable)


def simpo_loss(
    avg_chosen_logps: torch.Tensor, avg_rejected_logps: torch.Tensor, *, beta: float, gamma_beta_ratio: float
) -> torch.Tensor:
    """SimPO of each pair, (B,) from log-probs averaged over each answer's tokens (B,).

    Eq. 6 of arXiv:2405.14734: the margin beta x difference must exceed gamma = beta x gamma_beta_ratio.
    """
    return -F.logsigmoid(beta * (avg_chosen_logps - avg_rejected_logps - gamma_beta_ratio))


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - e^x) for x < 0, in the branch that keeps its digits (Maechler 2012, Eq. 7).

    At x = 0 it would be -infinity; x is kept below -1e-6, where its gradient is 0 (a certain answer).
    """
    x = x.clamp(max=-1e-6)
    near_zero = x > -math.log(2)
    # Each branch sees only what is its own: where() would pass the other's infinite gradient on as NaN.
    near, far = torch.where(near_zero, x, -1.0), torch.where(near_zero, -1.0, x)
    return torch.where(near_zero, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def orpo_loss(
    avg_chosen_logps: torch.Tensor, avg_rejected_logps: torch.Tensor, *, beta: float
) -> torch.Tensor:
    """ORPO's odds-ratio term of each pair, (B,): -lambda log sigma(log odds(y_w) - log odds(y_l)).

    Eq. 7 of arXiv:2403.07691, with lambda = beta; log odds = log p - log(1 - p), where log p, (B,), is the
    mean log-prob of an answer's tokens. The objective adds the NLL of the chosen answer (Eq. 6).
    """
    chosen, rejected = (
        avg_chosen_logps.float(),
        avg_rejected_logps.float(),
    )  # bfloat16 has no digits near p = 1
    log_odds_ratio = chosen - rejected - (log1mexp(chosen) - log1mexp(rejected))  # (B,)
    return -beta * F.logsigmoid(log_odds_ratio)


def pairwise_accuracy(desirable: torch.Tensor, undesirable: torch.Tensor) -> float:
    """Share of couples in which the desirable answer has the higher reward, ties one half (ROC's area)."""
    return preferred((desirable[:, None] - undesirable[None]).flatten()).mean().item()


def preferred(margins: torch.Tensor) -> torch.Tensor:
    """1 where the chosen answer has the higher reward, 1/2 in a tie, 0 else: margins (B,) -> (B,)."""
    return (1 + margins.sign() * (margins.abs() > TIE)) / 2


def lr_factor(step: int, *, total_steps: int, warmup_steps: int, lr_schedule: str) -> float:
    """The learning rate of the 1-based `step` as a share of its peak: linear warm-up, then down towards 0."""
    if step <= warmup_steps:
        return step / warmup_steps
    done = (step - warmup_steps - 1) / max(1, total_steps - warmup_steps)  # in [0, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[lr_schedule]


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------
TIE = 1e-4  # rewards closer than this are equal: float32 sums of some hundred log-probs differ by 1e-5
COLUMNS = {  # of the terminal's lines
    "loss": ".4f",
    "rewards/accuracies": ".3f",
    "rewards/margins": ".3f",
    "logps/chosen_drift": "+.2f",
    "grad_norm": ".2f",
    "learning_rate": ".1e",
    "tokens_per_second": ",.0f",
}


def main(args: Args) -> dict:
    """Train as `args` says and return the last metrics."""
    rank, world_size, device = setup_distributed()
    torch.manual_seed(args.seed)
    output_dir = choose_output_dir(args, args.algorithm)
    tokenizer = load_tokenizer(args)
    check_reference(args, tokenizer)
    answers, labels, held_out, held_out_labels = load_answers(tokenizer, args)
    kto, ref_name = args.algorithm == "kto", args.ref_model or args.model
    with_reference = args.algorithm not in REFERENCE_FREE
    mismatched = mismatch(answers, args.max_length) if kto else []
    if kto:
        check_weights(labels, args)
    epoch_size, lengths = len(answers), np.array([row_length(a, args.share_prompt) for a in answers])  # (P,)
    total_steps = args.max_steps or max(1, math.ceil(args.num_epochs * epoch_size / args.batch_size))
    num_epochs = math.ceil(total_steps * args.batch_size / epoch_size)
    stream = data_order(lengths, [answers], [1], epoch_size, num_epochs, args.order, args.seed)
    used, stream = np.unique(stream[: total_steps * args.batch_size], return_inverse=True)
    answers, labels = [answers[i] for i in used], labels[used]  # from here on only those that a step meets
    mismatched = [mismatched[i] for i in used] if kto else []
    full_nll = args.algorithm == "orpo" and args.orpo_nll == "full"
    in_rows = [whole_chosen(pair) for pair in answers] if full_nll else answers  # what log-probs are taken of
    lengths = np.array([row_length(pair, args.share_prompt) for pair in in_rows])  # (P,)
    counts, nll_counts = count_tokens(answers), count_tokens(in_rows)  # (P, K)
    for sequence in answers[stream[0]]:
        show_sequence(tokenizer, sequence)

    # 0. Reference: log-probs (P, K) under it and under the starting policy, for drift
    policy = load_model(args.model, args, tokenizer, device)
    optimizer = make_optimizer(policy, args)
    model = None if args.resume else policy  # a continued one has moved, should the cache be lost
    start_logps = cached_logps(args.model, answers, args, tokenizer, device, model)
    ref_logps = held_out_ref_logps = mismatched_ref_logps = None
    if with_reference:
        model = model if ref_name == args.model else load_model(ref_name, args, tokenizer, device)
        ref_logps, held_out_ref_logps, mismatched_ref_logps = (
            cached_logps(ref_name, some, args, tokenizer, device, model)
            for some in (answers, held_out, mismatched)
        )
    del model

    step, num_tokens = load_checkpoint(output_dir, policy, optimizer) if args.resume else (0, 0)
    logger = Logger(args, output_dir, total_steps, step, COLUMNS)
    metrics, kl = {}, torch.zeros((), device=device)
    evaluation = (policy, tokenizer, held_out, held_out_labels, held_out_ref_logps, args, device)
    if step == 0:
        results, samples = evaluate_answers(*evaluation)
        logger.log({"step": 0} | results, samples)
    while step < total_steps:
        # 1. Batch: the answers of this optimizer step, packed into rows that are dealt to the processes
        step, started = step + 1, time.perf_counter()
        picks = stream[(step - 1) * args.batch_size : step * args.batch_size]
        rows = pack(lengths[picks], args.max_tokens_per_micro_batch, multiple_of=world_size)
        nll_tokens = max(1, (nll_counts * labels)[picks].sum())

        # 2. KL of policy and reference over the whole optimizer batch and all processes, before any gradient
        if kto:
            log_ratio = pair_logps(policy, [mismatched[i] for i in picks], args, device)
            kl = (log_ratio - mismatched_ref_logps[picks]).mean().clamp(min=0)  # scalar

        policy.train()
        sums = torch.zeros(14, device=device)
        for row in rows[rank::world_size]:
            # 3. Log-probs, summed over each answer: (B, 2), chosen and rejected, or (B, 1)
            ids = picks[row]
            batch = collate_pairs([in_rows[i] for i in ids], device, args.share_prompt)
            logprobs = token_logprobs(policy, batch)  # (C,)
            of_answer = torch.from_numpy(answer_tokens(answers, in_rows, ids)).to(device)  # (C,)
            logps = pair_sums(logprobs * of_answer, batch, labels.shape[1])[: len(ids)]  # (B, K)
            row_labels, row_counts = (torch.from_numpy(x[ids]).to(device) for x in (labels, counts))  # (B, K)
            ref = ref_logps[ids] if with_reference else None  # (B, K)

            # 4. Loss: each row adds its part of the mean over the whole optimizer batch
            losses = losses_of(logps, ref, row_counts, row_labels, kl, args)  # (B,)
            nll_logps = pair_sums(logprobs, batch, labels.shape[1])[: len(ids)]  # (B, K)
            nll = -(nll_logps * row_labels).sum() / nll_tokens
            loss = losses.sum() / len(picks) + (1 if args.algorithm == "orpo" else args.sft_coef) * nll
            (loss * world_size).backward()  # FSDP2 averages over processes what is to be summed
            with torch.no_grad():
                rewards = rewards_of(logps, ref, row_counts, args)  # (B, K)
                signs = row_labels * 2 - 1  # 1 for what is to be raised, -1 for what is to be lowered
                margins = (signs * (rewards - (args.beta * kl if kto else 0))).sum(1)  # (B,)
                of_all = [losses, preferred(margins), margins.abs() <= TIE, margins.abs()]
                of_each = torch.stack([torch.ones_like(logps), rewards, logps, logps - start_logps[ids]])
                sides = [(of_each * side).sum((1, 2)) for side in (row_labels, 1 - row_labels)]  # (4,) each
                sums[1:] += torch.cat([loss[None], torch.stack(of_all).sum(1), *sides])

        # 5. Update
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * lr_factor(
                step, total_steps=total_steps, warmup_steps=args.warmup_steps, lr_schedule=args.lr_schedule
            )
        sums[0] = logger.stopping
        results = torch.cat([all_reduce(sums), full(grad_norm)[None], kl[None]])
        results = results.tolist()  # the one synchronisation of a step
        stopping, loss, *of_all, grad_norm, kl_estimate = results
        losses, right, ties, absolute_margins = (total / len(picks) for total in of_all[:4])
        if not math.isfinite(loss + grad_norm):
            sequences = [sequence for i in picks for sequence in answers[i]]
            stop_on_nonfinite(output_dir, step, sequences, loss, grad_norm)
        if step == 1 and with_reference and ref_name == args.model:
            zeros, ones = torch.zeros(counts[picks].shape), torch.ones(counts[picks].shape)
            at_reference = losses_of(zeros, zeros, ones, torch.from_numpy(labels[picks]), zeros[0, 0], args)
            check_start(losses, at_reference.mean().item(), absolute_margins, device)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started

        # 6. Evaluate, log, save
        batch_tokens = int(lengths[picks].sum())
        num_tokens += batch_tokens
        room = len(rows) * max(args.max_tokens_per_micro_batch, *lengths[picks])
        chosen, rejected = (
            [total / max(1, n) for total in of_side] for n, *of_side in (of_all[4:8], of_all[8:])
        )
        metrics = {
            "step": step,
            "epoch": step * args.batch_size / epoch_size,
            "loss": loss,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            "rewards/chosen": chosen[0],
            "rewards/rejected": rejected[0],
            "rewards/accuracies": right,
            "rewards/ties": ties,
            "rewards/margins": chosen[0] - rejected[0],
            "logps/chosen": chosen[1],
            "logps/rejected": rejected[1],
            "logps/chosen_drift": chosen[2],
            "num_tokens": num_tokens,
            "tokens_per_second": batch_tokens / seconds,
            "step_time": seconds,
            "packing/fill": batch_tokens / room,
        }
        if kto:
            metrics["kl"] = kl_estimate
        if device.type == "cuda":
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        samples = []
        if step == total_steps or (args.eval_every and step % args.eval_every == 0):
            results, samples = evaluate_answers(*evaluation)
            metrics |= results
        logger.log(metrics, samples)
        if stopping or (args.save_every and (step == total_steps or step % args.save_every == 0)):
            save_checkpoint(output_dir, policy, optimizer, step, num_tokens, args.keep_checkpoints)
        if stopping and step < total_steps:
            logger.close(f"stopped; continue with --resume --output-dir {output_dir}")
            return metrics
    save_model(output_dir / "model", policy, tokenizer)
    logger.close(f"model saved to {output_dir / 'model'}")
    return metrics


def losses_of(logps, ref_logps, counts, labels, kl, args) -> torch.Tensor:
    """The loss of --algorithm for each pair or answer, (B,); log-probs, counts and labels are (B, K)."""
    if args.algorithm == "ipo":
        divisor = counts if args.ipo_length_average else 1
        return ipo_loss(*(logps / divisor).T, *(ref_logps / divisor).T, beta=args.beta)
    if args.algorithm == "kto":
        weights = {"desirable_weight": args.desirable_weight, "undesirable_weight": args.undesirable_weight}
        return kto_loss(logps[:, 0], ref_logps[:, 0], labels[:, 0], kl, beta=args.beta, **weights)
    if args.algorithm == "simpo":
        return simpo_loss(*(logps / counts).T, beta=args.beta, gamma_beta_ratio=args.gamma_beta_ratio)
    return orpo_loss(*(logps / counts).T, beta=args.beta)


def rewards_of(logps, ref_logps, counts, args) -> torch.Tensor:
    """What --algorithm compares, times beta, (B, K): log-ratios to the reference, or average log-probs."""
    if args.algorithm in REFERENCE_FREE:
        return args.beta * logps / counts
    return args.beta * (logps - ref_logps) / (counts if args.ipo_length_average else 1)


def evaluate_answers(policy, tokenizer, held_out, labels, ref_logps, args, device) -> tuple[dict, list]:
    """Accuracy on held-out pairs, or of good above bad answers; right sampled answers and their length."""
    if not held_out:
        return {}, []
    counts = count_tokens(held_out)  # (P, K)
    logps = pair_logps(policy, held_out, args, device)  # (P, K)
    rewards = rewards_of(logps, ref_logps, torch.from_numpy(counts).to(device), args).cpu()  # (P, K)
    good = labels.astype(bool)  # (P, K)
    chosen, rejected = rewards[torch.from_numpy(good)], rewards[torch.from_numpy(~good)]
    metrics = {"eval/margin": (chosen.mean() - rejected.mean()).item()}
    if len(held_out[0]) == 1:
        metrics["eval/accuracy"] = pairwise_accuracy(chosen, rejected)
    else:
        right, alike = preferred(chosen - rejected), torch.from_numpy(equal_lengths(counts))
        metrics["eval/accuracy"] = right.mean().item()
        metrics["eval/accuracy_length_matched"] = right[alike].mean().item() if alike.any() else 0.5
    if ref_logps is not None:
        metrics["eval/chosen_log_ratio"] = (logps - ref_logps).cpu()[torch.from_numpy(good)].mean().item()
    asked = [item[0] for item, is_good in zip(held_out, good[:, 0], strict=True) if is_good]
    samples = sample_answers(policy, tokenizer, asked, args, device)
    metrics["eval/reward"] = sum(sample["right"] for sample in samples) / max(1, len(samples))
    metrics["eval/mean_length"] = sum(sample["length"] for sample in samples) / max(1, len(samples))
    return metrics, samples


def check_start(loss: float, loss_at_reference: float, margin: float, device):
    """End the run unless a policy that is its reference has every margin 0, and the loss that follows."""
    tolerance = 1e-3 if device.type == "cpu" else 0.05  # bfloat16 rounds differently in rows of other lengths
    if margin > tolerance or abs(loss - loss_at_reference) > tolerance * max(1, loss_at_reference):
        fail(
            f"policy and reference are the same model, yet at step 1 margins are {margin:.2g} on average and "
            f"the loss is {loss:.4f}, not {loss_at_reference:.4f}: --cache-dir has another model's log-probs"
        )


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


def load_answers(tokenizer, args) -> tuple[list, np.ndarray, list, np.ndarray]:
    """Training and held-out answers with labels (P, K), 1 for what is to be raised: pairs, or single answers.

    KTO takes pairs apart to train on, not to evaluate on.
    """

    def load(source, split, limit, apart):
        first = load_rows(source, split, args.dataset_config)[0] if args.algorithm == "kto" else None
        if isinstance(first, dict) and "completion" in first:
            return load_unpaired(tokenizer, source, split, args, limit)
        pairs, _ = load_pairs(tokenizer, source, split, args, limit)
        if apart:
            return [(sequence,) for pair in pairs for sequence in pair], np.array([[1], [0]] * len(pairs))
        return pairs, np.array([[1, 0]] * len(pairs))

    parts = [load(source, args.dataset_split, 0, args.algorithm == "kto") for source in args.dataset]
    answers, labels = [item for items, _ in parts for item in items], np.concatenate([y for _, y in parts])
    held_out, held_out_labels = [], np.zeros((0, 2), int)
    if args.eval_dataset:
        held_out, held_out_labels = load(args.eval_dataset, args.eval_split, args.num_eval, False)
    elif args.eval_fraction:
        trained_on, apart = hold_out(answers, args)
        held_out, held_out_labels = [answers[i] for i in apart], labels[apart]
        answers, labels = [answers[i] for i in trained_on], labels[trained_on]
    if held_out and len(held_out[0]) == 1 and len(set(held_out_labels[:, 0])) < 2:
        fail("the held-out answers are all desirable or all undesirable: there is nothing to compare")
    count_overlap(answers, held_out)
    return answers, labels, held_out, held_out_labels


def mismatch(answers: list, max_length: int) -> list:
    """The prompt of each single answer, completed by the last one before it that has another prompt."""
    prompts = [prompt_of(answer) for answer in answers]
    if len(set(prompts)) < 2:
        fail("KTO estimates a KL from answers to other prompts, and all prompts are the same")
    mismatched = []
    for i, (sequence,) in enumerate(answers):
        other = next(j for j in range(i - 1, i - 1 - len(answers), -1) if prompts[j] != prompts[i])
        prompt, (taken,) = int(sequence.trained.argmax()), answers[other]
        start = int(taken.trained.argmax())
        parts = [(x[:prompt], y[start:]) for x, y in zip(sequence, taken, strict=True)]
        mismatched.append((Sequence(*(np.concatenate(part)[:max_length] for part in parts)),))
    return mismatched


def check_weights(labels: np.ndarray, args):
    """Say whether KTO's weights keep the paper's rule: n_D lambda_D / (n_U lambda_U) in [1, 4/3] (Eq. 8)."""
    desirable, undesirable = int(labels.sum()), int((1 - labels).sum())
    if not desirable or not undesirable:
        fail(f"KTO needs both labels: {desirable:,} answers are desirable, {undesirable:,} are not")
    ratio = desirable * args.desirable_weight / (undesirable * args.undesirable_weight)
    fair = desirable * args.desirable_weight / undesirable
    rule = f"the paper's rule is --undesirable-weight in [{fair * 3 / 4:.4g}, {fair:.4g}]"
    fits = 0.999 <= ratio <= 1.001 * 4 / 3  # as the rule is printed
    advice, warning = ("as the paper wants it", "") if fits else (f"outside [1, 4/3]: {rule}", "warning: ")
    say(f"{warning}{desirable:,} desirable, {undesirable:,} not, weighted ratio {ratio:.3g}, {advice}")


def whole_chosen(pair: Pair) -> Pair:
    """The pair with all of the chosen one trained, prompt included; nothing predicts its first token."""
    return pair._replace(chosen=pair.chosen._replace(trained=np.arange(len(pair.chosen.trained)) > 0))


def answer_tokens(answers: list, in_rows: list, ids) -> np.ndarray:
    """Which of the trained tokens (C,) of a row belong to its answers: not those of a prompt trained, too."""
    parts = [
        answer.trained[taken.trained]
        for i in ids
        for answer, taken in zip(answers[i], in_rows[i], strict=True)
    ]
    return np.concatenate(parts or [np.zeros(0, bool)])


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


def collate_pairs(pairs: list[Pair], device, share_prompt: bool = False):
    """Pairs as one packed row: its sequences 2k and 2k + 1 are the chosen and the rejected one of pair k.

    Of single answers, tuples of one sequence each, sequence k is answer k.
    """
    pairs = pairs or [Pair(FILLER, FILLER)]
    shared = [n for pair in pairs for n in (0, shared_prompt(pair))[: len(pair)]] if share_prompt else None
    return collate([sequence for pair in pairs for sequence in pair], device, shared)


def pair_sums(x: torch.Tensor, batch, answers: int = 2) -> torch.Tensor:
    """Sums over each answer of what is known per token, x (C,) -> (B, answers): chosen and rejected."""
    return segment_sum(x, batch.sequence_index, batch.num_sequences).view(-1, answers)


@torch.no_grad()
def pair_logps(model, pairs: list[Pair], args, device) -> torch.Tensor:
    """Summed log-probs (P, 2) of the chosen and rejected answers, (P, 1) of single ones, on every process."""
    model.eval()
    rank, world_size = process()
    logps = torch.zeros(len(pairs), len(pairs[0]), device=device)
    lengths = [row_length(pair, args.share_prompt) for pair in pairs]
    rows = pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)
    for row in tqdm(
        rows[rank::world_size], desc="log-probs", leave=False, disable=None if rank == 0 else True
    ):
        batch = collate_pairs([pairs[i] for i in row], device, args.share_prompt)
        logps[row] = pair_sums(token_logprobs(model, batch), batch, logps.shape[1])[: len(row)]
    return all_reduce(logps)


def cached_logps(name: str, pairs: list[Pair], args, tokenizer, device, model=None) -> torch.Tensor:
    """`pair_logps` of a model, from --cache-dir or computed now; it is loaded for that only, if not given.

    The file's name is a digest of all that they depend on: the model's files, the tokens (and with them data,
    template and lengths), what is trained, the attention, and the device.
    """
    if not pairs:
        return torch.zeros(0, 2)
    key = hashlib.sha256(f"{model_digest(name)} {args.attn} {device.type} {len(tokenizer)}".encode())
    for sequence in (sequence for pair in pairs for sequence in pair):
        key.update(
            len(sequence.input_ids).to_bytes(8) + sequence.input_ids.tobytes() + sequence.trained.tobytes()
        )
    path = Path(args.cache_dir) / f"logps_{key.hexdigest()[:32]}.npy"
    found = [np.load(path) if path.exists() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)  # as the first process sees it
    if found[0] is not None:
        say(f"{name}: log-probs of {len(pairs):,} pairs from {path}")
        return torch.tensor(found[0], device=device).view(len(pairs), -1)  # pairs may have been taken apart
    logps = pair_logps(model or load_model(name, args, tokenizer, device), pairs, args, device)
    if process()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.npy")
        np.save(partial, logps.cpu().numpy())
        partial.rename(path)
    return logps


def model_digest(name: str) -> str:
    """What tells a model's weights from others: a hash of its files, or the hub's commit."""
    folder = Path(locate(name))
    if not folder.is_dir():
        return f"{name} {AutoConfig.from_pretrained(name)._commit_hash}"
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".bin")):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_reference(args, tokenizer):
    """End the run where --ref-model does not exist or has other tokens than --model."""
    if args.ref_model is None:
        return
    path = locate(args.ref_model)
    if path.startswith((".", "/")) and not Path(path).is_dir():
        fail(f"--ref-model {args.ref_model}: no such folder")
    try:
        vocabulary = AutoTokenizer.from_pretrained(path).get_vocab()
    except (OSError, ValueError) as error:
        fail(f"--ref-model {args.ref_model}: {str(error).splitlines()[0]}")
    if vocabulary != tokenizer.get_vocab():
        fail(f"--ref-model {args.ref_model}: its tokenizer is not that of --model {args.model}")


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


def sample_answers(model, tokenizer, sequences: list[Sequence], args, device) -> list[dict]:
    """Sample an answer to what each sequence asks before its last trained turn; compare final answers."""
    starts = [int(np.flatnonzero(np.diff(s.trained, prepend=True) & s.trained)[-1]) for s in sequences]
    asked = [
        (s.input_ids[:n].tolist(), s.input_ids[n:][s.trained[n:]]) for s, n in zip(sequences, starts) if n > 1
    ]
    completions, samples = (
        generate(model, tokenizer, [prompt_ids for prompt_ids, _ in asked], args, device),
        [],
    )
    for (prompt_ids, answer_ids), completion_ids in zip(asked, completions, strict=True):
        prompt, length = tokenizer.decode(prompt_ids), len(completion_ids)
        completion, answer = tokenizer.batch_decode([completion_ids, answer_ids], skip_special_tokens=True)
        right = final_answer(completion) == final_answer(answer)
        sample = {
            "prompt": prompt,
            "completion": completion,
            "answer": answer,
            "right": right,
            "length": length,
        }
        samples.append(sample)
    return samples


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
