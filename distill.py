"""Distillation: a student learns from a teacher's answers, or from its distribution over every next token.

    L(theta) = 1/T sum_t D(p_T(. | y_<t), p_S(. | y_<t)) - ce_coef log p_S(y_t | y_<t)

T trained tokens of the optimizer batch; D a divergence of teacher and student over the vocabulary.

    --mode       tokens y come from         loss of a token
    seq_kd       the teacher, filtered      -log p_S(y_t): section 3.2, arXiv:1606.07947; R1's distillation
    token_kd     the data                   D: word-level distillation, section 3.1, arXiv:1606.07947
    on_policy    the student, or the data   D: generalized knowledge distillation, section 3, arXiv:2306.13649

    --divergence
    forward_kl   KL(p_T || p_S): covers all that the teacher may say
    reverse_kl   KL(p_S || p_T): keeps to what the teacher does say
    jsd          beta KL(p_T || m) + (1 - beta) KL(p_S || m),  m = beta p_T + (1 - beta) p_S

What the student has sampled is held fixed: no gradient goes through the sampling. The exception is
`--on-policy-loss policy_gradient --kl-discount 1`, the reverse KL of whole answers.

The loop:

    0. Teacher    sample its answers (seq_kd), or keep its likeliest tokens on disk (--cache-top-k)
    1. Batch      sequences of the data; answers of the student to prompts (on_policy)
    2. Loss       both heads over the trained tokens, chunk by chunk; counts are those of the whole batch
    3. Update     clip the gradient, learning-rate schedule, AdamW
    4. Evaluate   held-out divergences, right answers of the student, first of the teacher, too; log; save

Deviations from the papers, each with its reason:
    1. A batch mixes sampled and given sequences in a fixed ratio; GKD draws by chance which of them a whole
       batch is made of. The expectation is the same, and the gradient is quieter.
    2. A token counts alike in short and long answers, as in TRL; GKD's mean is
       `--loss-agg seq_mean_token_mean`.
    3. The divergence has no weight of its own: `--ce-coef` weighs the likelihood beside it, where Hinton et
       al. and DistillKit weigh both. A common factor is the learning rate's.
    4. seq_kd learns from samples of the teacher; section 3.2 from the mode of its distribution, by beam
       search. Of several samples a reward can keep the right ones; `--temperature 0` is the greedy mode.
    5. Equal answers to a prompt count once, as any sequences (`--dedupe`), which flattens what the teacher
       says often; `--no-dedupe` keeps its weights.
    6. policy_gradient leaves out MiniLLM's single-step decomposition, teacher-mixed sampling, normalization
       by length and language-modelling term: `--divergence` is the exact single step, `--ce-coef` the term.

    python distill.py                                          # CPU, offline, 2 minutes on one core
    python distill.py --mode seq_kd --reward rewards.py:math_answer
    python distill.py --mode on_policy
    python distill.py --model Qwen/Qwen2.5-0.5B --teacher Qwen/Qwen2.5-7B-Instruct --dataset openai/gsm8k \
        --dataset-config main --learning-rate 1e-5 --batch-size 64 --max-tokens-per-micro-batch 16384 \
        --max-steps 0

Shapes: N tokens in a row, B sequences, C trained tokens, c of them in a chunk, V vocabulary, H and H_t hidden
sizes of student and teacher, k cached tokens.
"""

import ctypes
import gc
import hashlib
import importlib.util
import inspect
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
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import transformers
import tyro
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor
from transformers.utils.chat_template_utils import render_jinja_template

from common import (
    check_attention,
    check_packed,
    collate,
    completion_states,
    fsdp_forward,
    head_logits,
    head_settings,
    segment_sum,
    token_logprobs,
)


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    mode: Literal["token_kd", "seq_kd", "on_policy"] = "token_kd"
    """Learn from the teacher's distributions on data, from its answers, or on the student's own answers."""

    # Model
    model: str = "tiny/sft"
    """Model to fine-tune: a hub id or a folder."""
    keep_layers: tuple[int, ...] | None = None
    """Layers of --model that the student keeps; None is all, of tiny/sft under itself 0 and 1."""
    teacher: str | None = "tiny/sft"
    """Model to learn from: a hub id or a folder; None with --teacher-data alone."""
    chat_template: str | None = None
    """File with a Jinja chat template to use instead of the tokenizer's own."""
    prompt_template: str | None = None
    """Text for a base model in place of a chat template; {prompt} in it is the question (R1-Zero)."""
    attn: str = "packed"
    """Attention: packed, or flash_attention_2 where it is installed, or eager (exact, slow)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about 30 % slower, far less memory, the same result."""
    compile: bool = False
    """Compile each layer with torch.compile."""

    # Data
    dataset: tuple[str, ...] = ("tiny/data/sft_train.jsonl",)
    """Hub ids or local .jsonl/.json/.parquet/.csv files or saved datasets."""
    dataset_config: str | None = None
    """Configuration name of the hub dataset ("main" for openai/gsm8k)."""
    dataset_split: str = "train"
    """Split of the hub dataset to train on."""
    prompt_dataset: str | None = None
    """Prompts that teacher or student answer; by default tiny/'s, or those of the first --dataset."""
    eval_dataset: str | None = None
    """Held-out dataset; by default the one of tiny/ if tiny/ is trained on, else none."""
    eval_split: str = "test"
    """Split of the hub dataset to evaluate on."""
    order: Literal["shuffled", "given", "length"] = "shuffled"
    """Order of the sequences within an epoch; `length` goes from short to long (a curriculum)."""
    dedupe: bool = True
    """Drop sequences that repeat an earlier one exactly."""
    max_length: int = 1024
    """Longest sequence in tokens (TRL: 1024)."""
    max_prompt_length: int = 512
    """Longest prompt in tokens; longer ones are dropped and counted."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to longer sequences; both are counted in the log."""
    train_on_prompt: bool = False
    """Train on every token, not only the assistant's."""
    train_on_system: bool = False
    """Train on the system message, too."""

    # Distillation
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Divergence of teacher and student at each token."""
    jsd_beta: float = 0.5
    """Weight of the teacher in the mixture of jsd, within (0, 1) (GKD: 0.1, 0.5 and 0.9)."""
    kd_temperature: float = 1.0
    """Temperature that both distributions are softened with in the divergence (Hinton: 1 to 20)."""
    kd_temperature_squared: bool = True
    """Multiply the divergence by that temperature squared: its gradient keeps its size (arXiv:1503.02531)."""
    ce_coef: float = 0.0
    """Weight of the negative log-likelihood of the data's tokens beside the divergence (DistillKit: 0.5)."""
    cache_top_k: int = 0
    """Likeliest tokens of the teacher kept on disk, the rest as one; 0 asks it at every step instead."""
    cache_dir: str = "runs/cache"
    """Folder of cached log-probs, found again by model, tokens and attention."""
    on_policy_fraction: float = 0.5
    """Share of a batch of on_policy that the student samples; the rest is data (GKD's lambda: 0.5 and 1)."""
    on_policy_loss: Literal["divergence", "policy_gradient"] = "divergence"
    """Divergence over the vocabulary, or the reverse KL of the sampled tokens as their advantage."""
    kl_discount: float = 0.0
    """Discount of later tokens' KL in an advantage: 0 counts the token's own, 1 all behind it (MiniLLM)."""

    # Answers
    teacher_data: str | None = None
    """Answers to learn from in seq_kd instead of sampling them: a dataset with completions."""
    answers_per_prompt: int = 4
    """Answers that the teacher samples of each prompt in seq_kd; at --temperature 0 one."""
    reward: tuple[str, ...] = ()
    """Functions file.py:function that score completions; seq_kd keeps those above --reward-threshold."""
    reward_threshold: float = 0.5
    """Answers are kept if the mean of their rewards, without those that are None, is above this."""
    allow_code_execution: bool = False
    """Let reward functions run what the model writes (rewards.py:code_tests)."""
    max_completion_length: int = 128
    """Longest sampled answer in tokens."""
    temperature: float = 1.0
    """Sampling temperature; 0, where samples are not trained on, is greedy."""
    generation_batch_size: int = 256
    """Prompts that are sampled at once."""

    # Optimization
    loss_agg: Literal["token_mean", "seq_mean_token_mean"] = "token_mean"
    """Mean over all trained tokens (long answers weigh more), or over sequences of each one's token mean."""
    learning_rate: float = 2e-3
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
    max_steps: int = 400
    """Steps (optimizer updates; online, rollouts); 0 derives them from --num-epochs."""

    # Evaluation and output
    eval_every: int = 100
    """Steps between evaluations; 0 evaluates only before and after."""
    num_eval: int = 256
    """Rows of the evaluation sets that are used; 0 uses all."""
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
        if self.dataset == ("tiny/data/sft_train.jsonl",):
            self.eval_dataset = self.eval_dataset or "tiny/data/sft_eval.jsonl"
            self.prompt_dataset = self.prompt_dataset or "tiny/data/prompts_train.jsonl"
        self.prompt_dataset = self.prompt_dataset or self.dataset[0]
        if self.keep_layers is None and self.model == self.teacher == "tiny/sft":
            self.keep_layers = (0, 1)
        check_flags(self)
        if self.mode == "on_policy" and self.temperature == 0:
            fail("--temperature 0: --mode on_policy trains on samples, which takes a temperature above 0")
        if not 0 < self.jsd_beta < 1:
            fail(
                f"--jsd-beta {self.jsd_beta}: at 0 and 1 jsd is 0; take --divergence forward_kl or reverse_kl"
            )
        if not 0 < self.on_policy_fraction <= 1:
            fail(f"--on-policy-fraction must lie in (0, 1], not {self.on_policy_fraction}")
        if self.mode == "on_policy" and round(self.on_policy_fraction * self.batch_size) < 1:
            fail(f"--on-policy-fraction {self.on_policy_fraction} is no sequence of {self.batch_size}")
        if self.teacher is None and not (self.mode == "seq_kd" and self.teacher_data):
            fail("--teacher None: only --mode seq_kd with --teacher-data does without")
        for name in ("teacher_data", "reward"):
            if getattr(self, name) and self.mode != "seq_kd":
                fail(f"--{name.replace('_', '-')}: only --mode seq_kd reads it, not {self.mode}")
        if self.cache_top_k < 0 or self.cache_top_k and self.mode != "token_kd":
            fail(f"--cache-top-k {self.cache_top_k}: only --mode token_kd keeps tokens, and at least 1")
        if not self.ce_coef >= 0:
            fail(f"--ce-coef must be at least 0, not {self.ce_coef}")
        if self.ce_coef and (
            self.mode == "seq_kd" or self.mode == "on_policy" and self.on_policy_fraction == 1
        ):
            fail(f"--ce-coef {self.ce_coef}: this mode has no data beside the divergence for it to weigh")
        if self.mode != "on_policy" and self.on_policy_loss == "policy_gradient":
            fail(
                f"--on-policy-loss policy_gradient: only --mode on_policy has samples for it, not {self.mode}"
            )
        if self.kl_discount and self.on_policy_loss != "policy_gradient":
            fail(f"--kl-discount {self.kl_discount}: only --on-policy-loss policy_gradient reads it")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def finite(logprobs: torch.Tensor) -> torch.Tensor:
    """Log-probs with a very low number in place of -inf: 0 x (-inf + inf) would be NaN."""
    return logprobs.clamp(min=torch.finfo(logprobs.dtype).min / 4)


def expected_log_ratio(logprobs: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum_v p (log p - log q) in nats, of log p and log q (c, V) -> (c,); 0 log 0 is 0."""
    logprobs, others = finite(logprobs), finite(others)
    return torch.linalg.vecdot(logprobs.exp(), logprobs - others)


def forward_kl(student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of log-probs (c, V) -> (c,) in nats (Hinton et al., arXiv:1503.02531).

    It is infinite where the student rules out what the teacher may say, so the student covers all of it.
    """
    return expected_log_ratio(teacher_logprobs, student_logprobs)


def reverse_kl(student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) of log-probs (c, V) -> (c,) in nats (MiniLLM, arXiv:2306.08543, section 2.1).

    It punishes what the teacher would not say, so a student too small for all of it settles on a part.
    """
    return expected_log_ratio(student_logprobs, teacher_logprobs)


def jsd(student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, *, beta: float) -> torch.Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student.

    Log-probs (c, V) -> (c,) in nats (arXiv:2306.13649, Eq. 1), at most ln 2 for beta 1/2. As beta goes
    to 0 or 1 it goes to 0: divided by beta to KL(teacher || student), by 1 - beta to KL(student || teacher).
    """
    parts = finite(teacher_logprobs) + math.log(beta), finite(student_logprobs) + math.log1p(-beta)
    mixture = torch.logaddexp(*parts)  # (c, V)
    of_teacher = expected_log_ratio(teacher_logprobs, mixture)
    return beta * of_teacher + (1 - beta) * expected_log_ratio(student_logprobs, mixture)


def bucketed(logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs (c, V) of the tokens `ids` (c, k), and of all others together: (c, k + 1); (c, k) if k = V.

    A divergence of two distributions over buckets is never negative, and never above that over all tokens.
    """
    kept = logprobs.gather(-1, ids)  # (c, k)
    if kept.shape == logprobs.shape:
        return kept
    rest = logprobs.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)  # (c, 1)
    return torch.cat([kept, rest], -1)


class TeacherChunk(NamedTuple):
    """What a teacher says of c tokens; of all V tokens, or of k and the rest."""

    logprobs: torch.Tensor  # (c, V) or (c, k + 1), at --kd-temperature
    ids: torch.Tensor | None  # (c, k), or None: all
    top1: torch.Tensor  # (c,) its likeliest token
    target_logprobs: torch.Tensor  # (c,) log-prob of the token that is there, at temperature 1


class LiveTeacher(NamedTuple):
    """A teacher's states (C, H_t) at the trained tokens of a row, and its head; logits exist per chunk."""

    states: torch.Tensor
    head: tuple  # weight (V, H_t), bias (V,), scale, soft cap

    def chunk(self, c: slice, targets: torch.Tensor, temperature: float) -> TeacherChunk:
        logits = head_logits(self.states[c], *self.head)  # (c, V)
        logprobs = logits.log_softmax(-1)  # (c, V)
        of_targets = logprobs.gather(-1, targets[c, None]).squeeze(-1)  # (c,)
        softened = logprobs if temperature == 1 else (logits / temperature).log_softmax(-1)
        return TeacherChunk(softened, None, logits.argmax(-1), of_targets)


class CachedTeacher(NamedTuple):
    """What the cache holds of the trained tokens of a row; its temperature is fixed."""

    logprobs: torch.Tensor  # (C, k + 1), or (C, V) where all is kept
    ids: torch.Tensor  # (C, k), the likeliest first
    target_logprobs: torch.Tensor  # (C,)

    def chunk(self, c: slice, targets: torch.Tensor, temperature: float) -> TeacherChunk:
        return TeacherChunk(self.logprobs[c], self.ids[c], self.ids[c, 0], self.target_logprobs[c])


def chunk_divergence(logits, targets, teacher: TeacherChunk, divergence, temperature: float):
    """A student's logits (c, V) beside a chunk of the teacher -> a divergence and all that it comes from.

    The divergence (c,) at `temperature`; log-probs (c,) of the tokens `targets` (c,) at temperature 1; the
    student's log-probs over the teacher's outcomes, (c, V) or (c, k + 1).
    """
    logprobs = logits.log_softmax(-1)  # (c, V)
    of_targets = logprobs.gather(-1, targets[:, None]).squeeze(-1)  # (c,)
    if temperature != 1:
        logprobs = (logits / temperature).log_softmax(-1)  # (c, V)
    if teacher.ids is not None:
        logprobs = bucketed(logprobs, teacher.ids)  # (c, k + 1)
    return divergence(logprobs, teacher.logprobs), of_targets, logprobs


class TokenTerms(NamedTuple):
    """What a loss and its metrics are made of, (C,) each, or the six sums over tokens.

    The first two have a gradient, the others have none.
    """

    divergences: torch.Tensor  # of teacher and student, at --kd-temperature
    logprobs: torch.Tensor  # of the token under the student, at temperature 1
    kl_forward: torch.Tensor  # KL(teacher || student), at --kd-temperature
    kl_reverse: torch.Tensor  # KL(student || teacher), at --kd-temperature
    token_agreement: torch.Tensor  # 1 where both have the same likeliest token
    teacher_logprobs: torch.Tensor  # of the token under the teacher, at temperature 1


class _HeadDivergence(torch.autograd.Function):
    """`TokenTerms` from both heads in chunks of rows; the backward pass recomputes each, so only (C,) is
    kept."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, teacher, *settings):
        divergence, temperature, scale, softcap, chunk_size = settings
        terms = TokenTerms(*(torch.empty(len(targets), device=hidden.device) for _ in TokenTerms._fields))
        for start in range(0, len(targets), chunk_size):
            c = slice(start, start + chunk_size)
            logits = head_logits(hidden[c], weight, bias, scale, softcap)  # (c, V)
            said = teacher.chunk(c, targets, temperature)
            terms.divergences[c], terms.logprobs[c], own = chunk_divergence(
                logits, targets[c], said, divergence, temperature
            )
            for kl, kls in ((forward_kl, terms.kl_forward), (reverse_kl, terms.kl_reverse)):
                kls[c] = terms.divergences[c] if divergence is kl else kl(own, said.logprobs)
            terms.token_agreement[c] = (logits.argmax(-1) == said.top1).float()
            terms.teacher_logprobs[c] = said.target_logprobs
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.teacher, ctx.settings = teacher, settings
        ctx.mark_non_differentiable(*terms[2:])
        ctx.set_materialize_grads(False)
        return tuple(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        hidden, weight, bias, targets = ctx.saved_tensors
        divergence, temperature, scale, softcap, chunk_size = ctx.settings
        wanted_of_head = zip((weight, bias), ctx.needs_input_grad[1:3])  # a frozen head gets no gradient
        grad_hidden = torch.empty_like(hidden)
        grad_weight, grad_bias = (torch.zeros_like(x) if wanted else None for x, wanted in wanted_of_head)
        used = [n for n in (0, 1) if grads[n] is not None]  # the divergence, the log-probs, or both
        for start in range(0, len(targets), chunk_size):
            c = slice(start, start + chunk_size)
            logits = head_logits(hidden[c], weight, bias, scale, softcap)  # (c, V)
            said = ctx.teacher.chunk(c, targets, temperature)
            with torch.enable_grad():
                logits.requires_grad_()
                outputs = chunk_divergence(logits, targets[c], said, divergence, temperature)
            [grad] = torch.autograd.grad([outputs[n] for n in used], logits, [grads[n][c] for n in used])
            if softcap is not None:
                grad *= 1 - (logits.detach() / softcap) ** 2
            grad = (grad * scale if scale != 1 else grad).type_as(weight)  # (c, V)
            grad_hidden[c] = grad @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[c].type_as(weight))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, *[None] * 7


def first_tokens(head: tuple, vocab_size: int) -> tuple:
    """A head, as `head_settings` gives it, of the first tokens alone: without the rows that pad its table."""
    weight, bias, *others = head
    if len(weight) <= vocab_size:
        return head
    return weight[:vocab_size], None if bias is None else bias[:vocab_size], *others


@fsdp_forward
def token_divergences(
    student,
    batch,
    teacher: LiveTeacher | CachedTeacher,
    *,
    divergence,
    temperature: float,
    vocab_size: int,
    chunk_size: int | None = None,
) -> TokenTerms:
    """Divergence from the teacher at each trained token of a row, log-prob of the token, and what is logged.

    `divergence` maps log-probs of student and teacher at `temperature`, (c, V) each, to (c,); both
    distributions are those of the first `vocab_size` tokens. Logits exist for `chunk_size` tokens at a time,
    of either model: 1,024 on CUDA, 256 elsewhere.
    """
    hidden = completion_states(student, batch)  # (C, H)
    targets = batch.input_ids[0, batch.completion_index]  # (C,)
    weight, bias, scale, softcap = first_tokens(head_settings(student), vocab_size)
    chunk_size = chunk_size or (1024 if hidden.is_cuda else 256)
    terms = _HeadDivergence.apply(
        hidden, weight, bias, targets, teacher, divergence, temperature, scale, softcap, chunk_size
    )
    return TokenTerms(*terms)


def reverse_kl_advantages(
    logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, sequence_index: torch.Tensor, *, discount: float
) -> torch.Tensor:
    """sum_{s >= t} discount^(s - t) log p_T/p_S (y_s) at each token t that the student sampled, (C,).

    At discount 0, -A log p_S has in expectation the gradient of KL(p_S || p_T) of every token, what comes
    before it held fixed (Thinking Machines 2025, On-policy distillation); at 1 that of KL(p_S || p_T) of
    whole answers (MiniLLM, arXiv:2306.08543, section 2.2; deviation 6).
    """
    advantages = (teacher_logprobs - logprobs).detach()  # (C,)
    if discount == 0:
        return advantages
    returns, index = advantages.tolist(), sequence_index.tolist()
    for t in range(len(returns) - 2, -1, -1):
        if index[t] == index[t + 1]:
            returns[t] += discount * returns[t + 1]
    return torch.tensor(returns, dtype=advantages.dtype, device=advantages.device)


def aggregate(token_losses, batch, *, batch_tokens: int, batch_sequences: int, loss_agg: str) -> torch.Tensor:
    """One row's part of the mean over the whole optimizer batch, token_losses (C,) -> scalar: rows add up.

    `batch_tokens` (trained) and `batch_sequences` count the optimizer batch, over all rows and processes:
    what shares a row must not change the objective. `token_mean` weighs all tokens alike,
    `seq_mean_token_mean` all sequences.
    """
    if loss_agg == "token_mean":
        return token_losses.sum() / batch_tokens
    sums = segment_sum(token_losses, batch.sequence_index, batch.num_sequences)  # (B,)
    counts = segment_sum(torch.ones_like(token_losses), batch.sequence_index, batch.num_sequences)  # (B,)
    return (sums / counts.clamp(min=1)).sum() / batch_sequences


def lr_factor(step: int, *, total_steps: int, warmup_steps: int, lr_schedule: str) -> float:
    """The learning rate of the 1-based `step` as a share of its peak: linear warm-up, then down towards 0."""
    if step <= warmup_steps:
        return step / warmup_steps
    done = (step - warmup_steps - 1) / max(1, total_steps - warmup_steps)  # in [0, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[lr_schedule]


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------
DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}
COLUMNS = {  # of the terminal's lines
    "loss": ".4f",
    "kl_forward": ".4f",
    "kl_reverse": ".4f",
    "ce": ".4f",
    "token_agreement": ".3f",
    "grad_norm": ".2f",
    "learning_rate": ".1e",
    "tokens_per_second": ",.0f",
}


def main(args: Args) -> dict:
    """Train as `args` says and return the last metrics."""
    rank, world_size, device = setup_distributed()
    torch.manual_seed(args.seed)
    output_dir = choose_output_dir(args, "distill")
    with_teacher = args.mode != "seq_kd"  # whether the loss needs its distribution, not its answers alone
    tokenizer, teacher_tokenizer = load_tokenizer(args), load_teacher_tokenizer(args)
    if with_teacher:
        share_template(args, tokenizer, teacher_tokenizer)
        check_tokens(args, tokenizer, teacher_tokenizer)
    check_layers(args)
    check_sampled_loss(args)
    check_cache_dir(args)
    functions = load_functions(args.reward, args)
    held_out = load_sequences(tokenizer, args.eval_dataset, args.eval_split, args, args.num_eval)
    questions, teacher_questions = (load_questions(x, args) for x in (tokenizer, teacher_tokenizer))

    # Loaded when it is first asked something, which is never if all that it would say is on disk already;
    # `load_teacher.cache_clear()` lets it go.
    @cache
    def load_teacher():
        return load_model(args.teacher, args, teacher_tokenizer, device).requires_grad_(False).eval()

    # 0. Teacher: its answers are the data of seq_kd; what it says of other data is for `teacher_views`
    sources = args.dataset
    if not with_teacher:
        sources = (teacher_answers(load_teacher, teacher_tokenizer, functions, args, output_dir, device),)

    # Data: of each batch so many sequences are sampled by the student, answers to prompts, and so many given
    num_sampled = round(args.on_policy_fraction * args.batch_size) if args.mode == "on_policy" else 0
    num_given = args.batch_size - num_sampled
    sequences, prompts = [], []
    if num_given:
        sequences = [s for name in sources for s in load_sequences(tokenizer, name, args.dataset_split, args)]
    if num_sampled:
        prompts = tokenize_prompts(tokenizer, args.prompt_dataset, args.dataset_split, args)
    if with_teacher:
        share_chatml(tokenizer, teacher_tokenizer)
        check_tokens(args, tokenizer, teacher_tokenizer)
    epoch_size, per_step = (len(prompts), num_sampled) if num_sampled else (len(sequences), num_given)
    total_steps = args.max_steps or max(1, math.ceil(args.num_epochs * epoch_size / per_step))
    given_stream = training_order(sequences, total_steps * num_given, args)
    prompt_stream = training_order(prompts, total_steps * num_sampled, args)
    if num_given:
        show_sequence(tokenizer, sequences[given_stream[0]])

    # Student, and what it is compared with
    name = args.model if args.keep_layers is None else prune_layers(args, output_dir / "student")
    student = load_model(name, args, tokenizer, device)
    optimizer = make_optimizer(student, args)
    step, num_tokens = load_checkpoint(output_dir, student, optimizer) if args.resume else (0, 0)
    settings = {  # of `token_divergences`
        "divergence": DIVERGENCES[args.divergence],
        "temperature": args.kd_temperature,
        "vocab_size": len(tokenizer),
    }
    if args.divergence == "jsd":
        settings["divergence"] = partial(jsd, beta=args.jsd_beta)
    view_of, held_out_view_of = None, None  # row, numbers of its sequences -> what the teacher says of it
    if with_teacher:
        wanted = np.unique(given_stream)
        view_of = teacher_views(load_teacher, sequences, wanted, len(tokenizer), args, device)
    if held_out and same_tokens(tokenizer, teacher_tokenizer):
        wanted = np.arange(len(held_out))
        held_out_view_of = teacher_views(load_teacher, held_out, wanted, len(tokenizer), args, device)
    evaluate = partial(
        evaluate_student, student, tokenizer, held_out_view_of, held_out, questions, settings, args, device
    )
    logger = Logger(args, output_dir, total_steps, step, columns_of(with_teacher))
    metrics = {}
    if step == 0:
        before, samples = evaluate()
        if teacher_questions:
            of_teacher, _ = answer_rates(load_teacher(), teacher_tokenizer, teacher_questions, args, device)
            before |= {key.replace("eval/", "eval/teacher_"): value for key, value in of_teacher.items()}
        logger.log({"step": 0} | before, samples)
    if args.cache_top_k or not (view_of or held_out_view_of):
        load_teacher.cache_clear()  # it has said all that is asked of it

    while step < total_steps:
        # 1. Batch: given sequences and sampled answers, packed into rows that are dealt to the processes
        step, started = step + 1, time.perf_counter()
        given_of_step = given_stream[(step - 1) * num_given : step * num_given]
        prompts_of_step = [prompts[i] for i in prompt_stream[(step - 1) * num_sampled : step * num_sampled]]
        rollout = []
        if prompts_of_step:
            seed = args.seed * 10**6 + step
            rollout = roll_out(student, tokenizer, prompts_of_step, args, device, seed=seed)
        batch_sequences = [sequences[i] for i in given_of_step]
        batch_sequences += [as_sequence(completion, len(tokenizer)) for completion in rollout]
        batch_lengths = np.array([len(sequence.input_ids) for sequence in batch_sequences])
        rows = pack(batch_lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)
        batch_tokens = sum(int(sequence.trained.sum()) for sequence in batch_sequences)
        counts = {"batch_tokens": batch_tokens, "batch_sequences": len(batch_sequences)}
        rolled_out = time.perf_counter()

        # 2. Loss: each row adds its part of the mean over the whole optimizer batch
        student.train()
        sums = torch.zeros(2 + len(TokenTerms._fields), device=device)  # told to stop, loss, every term
        for row in rows[rank::world_size]:
            batch = collate([batch_sequences[i] for i in row] or [FILLER], device)
            given = torch.tensor([i < num_given for i in row] or [True], device=device)[batch.sequence_index]
            teacher_view = None
            if with_teacher:  # a cache goes by the numbers of sequences, which samples have none of
                teacher_view = view_of(batch, given_of_step[row] if args.cache_top_k else ())
            terms = row_terms(student, batch, teacher_view, settings)  # (C,) each
            losses = token_losses(terms, given, batch.sequence_index, args)  # (C,)
            loss = aggregate(losses, batch, **counts, loss_agg=args.loss_agg)
            (loss * world_size).backward()  # FSDP2 averages over processes what is to be summed
            sums[1:] += torch.stack([loss, *(term.sum() for term in terms)]).detach()

        # 3. Update
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * lr_factor(
                step, total_steps=total_steps, warmup_steps=args.warmup_steps, lr_schedule=args.lr_schedule
            )
        sums[0] = logger.stopping
        sums = torch.cat([all_reduce(sums), full(grad_norm)[None]])
        stopping, loss, *term_sums, grad_norm = sums.tolist()  # the one synchronisation of a step
        if not math.isfinite(loss + grad_norm):
            stop_on_nonfinite(output_dir, step, batch_sequences, loss, grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started

        # 4. Evaluate, log, save
        num_tokens += int(batch_lengths.sum())
        metrics = {
            "step": step,
            "epoch": step * per_step / epoch_size,
            "loss": loss,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            **describe(term_sums, batch_tokens, with_teacher),
            "num_tokens": num_tokens,
            "tokens_per_second": int(batch_lengths.sum()) / seconds,
            "step_time": seconds,
            "packing/fill": batch_lengths.sum()
            / (len(rows) * max(args.max_tokens_per_micro_batch, *batch_lengths)),
        }
        if rollout:
            metrics |= {
                "completions/mean_length": float(np.mean([len(c.token_ids) for c in rollout])),
                "completions/clipped_ratio": float(np.mean([not c.ended for c in rollout])),
                "time/rollout": rolled_out - started,
            }
        if device.type == "cuda":
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        samples = []
        if step == total_steps or (args.eval_every and step % args.eval_every == 0):
            evaluated, samples = evaluate()
            metrics |= evaluated
        logger.log(metrics, samples)
        if stopping or (args.save_every and (step == total_steps or step % args.save_every == 0)):
            save_checkpoint(output_dir, student, optimizer, step, num_tokens, args.keep_checkpoints)
        if stopping and step < total_steps:
            logger.close(f"stopped; continue with --resume --output-dir {output_dir}")
            return metrics
    save_model(output_dir / "model", student, tokenizer)
    logger.close(f"model saved to {output_dir / 'model'}")
    return metrics


def token_losses(terms: TokenTerms, given, sequence_index, args) -> torch.Tensor:
    """Loss of each token (C,) as --mode has it; `given` (C,) is False for tokens that the student sampled."""
    if args.mode == "seq_kd":
        return -terms.logprobs
    losses = terms.divergences * (args.kd_temperature**2 if args.kd_temperature_squared else 1.0)  # (C,)
    if args.mode == "on_policy" and args.on_policy_loss == "policy_gradient":
        advantages = reverse_kl_advantages(
            terms.logprobs, terms.teacher_logprobs, sequence_index, discount=args.kl_discount
        )  # (C,)
        losses = torch.where(given, losses, -advantages * terms.logprobs)
    return losses - args.ce_coef * given * terms.logprobs if args.ce_coef else losses


def row_terms(student, batch, teacher_view, settings: dict) -> TokenTerms:
    """`token_divergences` of a row; log-probs alone and zeros where there is no view of the teacher."""
    if teacher_view is not None:
        return token_divergences(student, batch, teacher_view, **settings)
    logprobs = token_logprobs(student, batch)  # (C,)
    zeros = torch.zeros_like(logprobs)  # (C,)
    return TokenTerms(zeros, logprobs, zeros, zeros, zeros, zeros)


def describe(term_sums: list[float], count: int, with_teacher: bool) -> dict:
    """Metrics from the sums of `TokenTerms` over `count` tokens; without a teacher the student's alone."""
    means = TokenTerms(*(value / count for value in term_sums))
    metrics = {"ce": -means.logprobs}
    if with_teacher:
        metrics |= {"kl_forward": means.kl_forward, "kl_reverse": means.kl_reverse}
        metrics |= {"token_agreement": means.token_agreement, "teacher_ce": -means.teacher_logprobs}
    return metrics


def columns_of(with_teacher: bool) -> dict[str, str]:
    """The terminal's columns, without a teacher those that need none."""
    return {k: v for k, v in COLUMNS.items() if with_teacher or k not in TokenTerms._fields}


@torch.no_grad()
def evaluate_student(student, tokenizer, view_of, held_out, questions, settings, args, device):
    """Held-out loss and divergences; right answers, sampled and greedy -> metrics and samples."""
    metrics = {}
    if held_out:
        student.eval()
        rank, world_size = process()
        sums = torch.zeros(1 + len(TokenTerms._fields), device=device)  # tokens, every term
        lengths = [len(sequence.input_ids) for sequence in held_out]
        rows = pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)
        for row in rows[rank::world_size]:
            batch = collate([held_out[i] for i in row] or [FILLER], device)
            terms = row_terms(student, batch, view_of(batch, row) if view_of else None, settings)
            sums += torch.stack([torch.ones_like(terms.logprobs).sum(), *(term.sum() for term in terms)])
        count, *term_sums = all_reduce(sums).tolist()
        described = describe(term_sums, count, view_of is not None)
        metrics = {f"eval/{key}": value for key, value in described.items()}
    rates, samples = answer_rates(student, tokenizer, questions, args, device)
    return metrics | rates, samples


def answer_rates(model, tokenizer, questions: list, args, device) -> tuple[dict, list[dict]]:
    """Share of questions that a model answers right, sampled and greedy -> metrics and samples."""
    if not questions:
        return {}, []
    sampled, greedy = (
        roll_out(model, tokenizer, questions, replace(args, temperature=t), device, seed=args.seed)
        for t in (max(args.temperature, GREEDY), GREEDY)
    )
    right, right_greedily = (
        [final_answer(c.text) == final_answer(c.prompt.row["answer"]) for c in completions]
        for completions in (sampled, greedy)
    )
    metrics = {
        "eval/accuracy": float(np.mean(right)),
        "eval/greedy_accuracy": float(np.mean(right_greedily)),
        "eval/mean_length": float(np.mean([len(c.token_ids) for c in sampled])),
    }
    samples = [
        {"prompt": tokenizer.decode(c.prompt.input_ids), "completion": c.text, "right": r}
        for c, r in zip(sampled, right, strict=True)
    ]
    return metrics, samples


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
class Sequence(NamedTuple):
    """Token ids and which of them are trained, both (length,)."""

    input_ids: np.ndarray
    trained: np.ndarray


FILLER = Sequence(np.zeros(1, np.int32), np.zeros(1, bool))  # for a process that has no row: trains nothing


class Prompt(NamedTuple):
    """What is asked: its token ids, and the dataset row with a `prompt`, text or messages."""

    input_ids: list[int]
    row: dict


class Completion(NamedTuple):
    """A sampled answer as it was sampled: token ids, their log-probs under the sampler, its text."""

    prompt: Prompt
    token_ids: list[int]
    logprobs: np.ndarray
    text: str
    ended: bool

    @property
    def input_ids(self) -> np.ndarray:
        return np.array(self.prompt.input_ids + self.token_ids, np.int32)

    @property
    def trained(self) -> np.ndarray:
        return np.arange(len(self.prompt.input_ids) + len(self.token_ids)) >= len(self.prompt.input_ids)


GREEDY = 1e-6  # temperature: division by 0 gives none
BLOCK = 64  # prompts, or sequences, between two points at which a teacher's work is safe on disk
FORMATS = "messages; prompt + completion; question + answer; text"


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


def load_teacher_tokenizer(args):
    """The tokenizer of --teacher, None without one."""
    return args.teacher and own_tokenizer(args.teacher, args, "--teacher")


def own_tokenizer(name: str, args, flag: str):
    """The tokenizer of another model than --model, which `flag` gives, with its own chat template."""
    return load_tokenizer(replace(args, model=name, chat_template=None), flag)


def same_tokens(tokenizer, teacher_tokenizer) -> bool:
    """Whether every id stands for the same token in both; rows of a table beyond them pad it."""
    return teacher_tokenizer is not None and tokenizer.get_vocab() == teacher_tokenizer.get_vocab()


def check_tokens(args, tokenizer, teacher_tokenizer):
    """End the run where distributions over tokens are to be compared that are not the same tokens."""
    if same_tokens(tokenizer, teacher_tokenizer):
        return
    ours, theirs = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    token = next(t for t in [*ours, *theirs] if ours.get(t) != theirs.get(t))
    fail(
        f"--teacher {args.teacher} has other tokens than --model {args.model} ({token!r} is "
        f"{theirs.get(token)}, not {ours.get(token)}): --mode seq_kd learns from answers"
    )


def share_template(args, tokenizer, teacher_tokenizer):
    """Give the chat template of one model to the other where that has none: a base model and its teacher.

    A conversation is then the same tokens to both, and the student learns to end a turn as its teacher does.
    """
    ours, theirs = tokenizer.chat_template, teacher_tokenizer.chat_template
    if ours == theirs or not same_tokens(tokenizer, teacher_tokenizer):
        return
    if ours and theirs:
        say(f"warning: {args.teacher} is asked in {args.model}'s chat template, which is not its own")
        return
    taker, giver = (teacher_tokenizer, tokenizer) if ours else (tokenizer, teacher_tokenizer)
    taker.chat_template, taker.turn_end_id = giver.chat_template, giver.turn_end_id
    taker.end_ids = sorted({*taker.end_ids, *giver.end_ids})
    names = (args.teacher, args.model) if ours else (args.model, args.teacher)
    say("{} has no chat template: using that of {}".format(*names))


def share_chatml(tokenizer, teacher_tokenizer):
    """Give the teacher ChatML, too, where neither had a template and data has brought it to the student."""
    if tokenizer.chat_template == CHATML and teacher_tokenizer.chat_template is None:
        use_chatml(teacher_tokenizer)


def check_cache_dir(args):
    """End the run where --cache-dir is needed and can be no folder."""
    if args.cache_top_k or args.mode == "seq_kd" and not args.teacher_data:
        try:
            Path(args.cache_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--cache-dir {args.cache_dir}: no folder can be made there ({error.strerror})")


def check_sampled_loss(args):
    """End the run where samples would come from another distribution than that of the log-probs."""
    if args.mode == "on_policy" and args.on_policy_loss == "policy_gradient":
        if (args.temperature, args.kd_temperature) != (1, 1):
            fail("--on-policy-loss policy_gradient needs --temperature 1 and --kd-temperature 1")


def check_layers(args):
    """End the run where --keep-layers names layers that --model does not have."""
    if args.keep_layers is None:
        return
    kept = list(args.keep_layers)
    count = AutoConfig.from_pretrained(locate(args.model)).get_text_config().num_hidden_layers
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < count:
        fail(f"--keep-layers {kept}: not rising numbers of the layers 0 to {count - 1} of {args.model}")


@torch.no_grad()
def prune_layers(args, folder: Path) -> str:
    """Write --model with the layers --keep-layers alone into a folder, once a run -> its name.

    Depth pruning: a student that begins as a part of its teacher (DistilBERT, arXiv:1910.01108; Minitron,
    arXiv:2407.14679). What is read back must say the same as the layers that were kept.
    """
    if process()[0] == 0 and not (args.resume and folder.exists()):
        model = AutoModelForCausalLM.from_pretrained(locate(args.model), dtype="auto")
        lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
        found = [x for x in lists if len(x) and type(x[0]).__name__ in model._no_split_modules]
        if len(found) != 1:
            fail(f"--keep-layers: {args.model} has {len(found)} lists of layers, not 1")
        [layers], config = found, model.config.get_text_config()
        for name, value in config.to_dict().items():  # layer_types, SmolLM3's no_rope_layers: one a layer
            if isinstance(value, list) and len(value) == len(layers) and not name.endswith("_token_id"):
                setattr(config, name, [value[n] for n in args.keep_layers])
        kept = [layers[n] for n in args.keep_layers]
        config.num_hidden_layers = len(kept)
        del layers[:]
        layers.extend(kept)
        ids = torch.arange(12)[None] % config.vocab_size  # (1, 12)
        wanted = model(ids, use_cache=False).logits  # (1, 12, V)
        partial_folder = folder.with_name(f"{folder.name}.partial")
        model.save_pretrained(partial_folder)
        del model, layers, kept, found, lists  # one model in memory at a time
        student = AutoModelForCausalLM.from_pretrained(partial_folder, dtype="auto")
        difference = (student(ids, use_cache=False).logits - wanted).abs().max()
        if not difference < 1e-3 * wanted.abs().max():
            fail(f"--keep-layers: a config of {config.model_type} tells layers apart in a way not known here")
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.rename(folder)
    if dist.is_initialized():
        dist.barrier()
    return str(folder)


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


def load_examples(source: str, split: str, config: str | None, limit: int = 0) -> list[dict]:
    """The rows of a dataset in any format that has a completion, as `as_example` gives them."""
    examples = []
    for n, row in enumerate(load_rows(source, split, config)[: limit or None], 1):
        where = f"{source}, row {n}"
        try:
            prompt, completion = row.get("prompt"), row.get("completion")
            if "messages" in row:
                prompt, completion = [], row["messages"]
            elif "conversations" in row:  # ShareGPT's names
                roles, turns = {"human": "user", "gpt": "assistant"}, row["conversations"]
                pairs = [(m.get("from", m.get("role")), m.get("value", m.get("content"))) for m in turns]
                prompt, completion = (
                    [],
                    [{"role": roles.get(r, r), "content": content} for r, content in pairs],
                )
            elif "question" in row and "answer" in row and prompt is None:
                prompt, completion = [{"role": "user", "content": row["question"]}], row["answer"]
            elif "text" in row and prompt is None:
                prompt, completion = "", row["text"]
            if prompt is None or completion is None:
                fail(f"{where}: found the columns {', '.join(row)}; accepted are {FORMATS}")
            examples.append(as_example(prompt, completion, row, where))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            fail(f"{where}: neither text nor messages of a role and a content ({error})")
    return examples


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


def train_more(tokenizer, example: dict, sequence: Sequence, args) -> Sequence:
    """Mark the system message or the whole prompt as trained, too, where the flags say so."""
    input_ids, trained = sequence
    if args.train_on_system and example.get("messages", [{}])[0].get("role") == "system":
        system = tokenizer.apply_chat_template(example["messages"][:1], tokenize=False, **example["options"])
        system_ids = tokenizer(system, add_special_tokens=False).input_ids
        if input_ids[: len(system_ids)].tolist() != system_ids:
            fail(f"{example['where']}: the chat template moves the system message: drop --train-on-system")
        trained[: len(system_ids)] = True
    trained[:] |= args.train_on_prompt
    trained[0] = False  # nothing comes before it to predict it
    return sequence


def load_sequences(tokenizer, source: str | None, split: str, args, limit: int = 0) -> list[Sequence]:
    """A dataset as sequences; says how much there is to train and what was dropped, and why."""
    if source is None:
        return []
    examples = load_examples(source, split, args.dataset_config, limit)
    if tokenizer.chat_template is None and any("messages" in example for example in examples):
        use_chatml(tokenizer)
    sequences, lengths, seen, counts = [], [], set(), Counter()
    for example in tqdm(examples, desc=f"tokenize {source}", leave=False, disable=None):
        try:
            found = [train_more(tokenizer, example, s, args) for s in tokenize(tokenizer, example)]
        except Exception as error:  # templates raise what they like
            fail(f"{example['where']}: the chat template does not take this conversation: {error}")
        for input_ids, trained in found:
            if not trained.any():
                fail(f"{example['where']}: no token is trained; the template's generation marks hold nothing")
            if len(input_ids) > 1 and input_ids[0] == input_ids[1] == tokenizer.bos_token_id:
                fail(f"{example['where']}: begins with two BOS tokens, the chat template's and the data's")
            lengths.append(len(input_ids))
            key = input_ids.tobytes() + trained.tobytes()
            if args.dedupe and key in seen:
                counts["dropped as duplicates"] += 1
                continue
            seen.add(key)
            if len(input_ids) > args.max_length:
                if args.overlong == "drop" or not trained[: args.max_length].any():
                    counts[f"dropped as longer than {args.max_length:,} tokens"] += 1
                    continue
                counts[f"cut to {args.max_length:,} tokens"] += 1
                input_ids, trained = input_ids[: args.max_length], trained[: args.max_length]
            sequences.append(Sequence(input_ids, trained))
    if not sequences:
        shortest = f"the shortest has {min(lengths)} tokens"
        fail(f"{source}: no sequence fits --max-length {args.max_length}; {shortest}")
    tokens, trained = sum(len(s.input_ids) for s in sequences), sum(int(s.trained.sum()) for s in sequences)
    ended = np.mean([np.isin(s.input_ids[s.trained][-1], tokenizer.end_ids) for s in sequences])
    notes = "".join(f", {count:,} {reason}" for reason, count in counts.items())
    total = f"{len(sequences):,} sequences, {tokens:,} tokens"
    say(f"{source}: {total}, {trained:,} trained, EOS trained in {ended:.0%}{notes}")
    return sequences


def tokenize_prompts(tokenizer, source: str | None, split: str, args, limit: int = 0) -> list[Prompt]:
    """The prompts of a dataset, with all columns for the reward functions; `question` is a user's message."""
    if source is None:
        return []
    prompts, dropped = [], 0
    rows = load_rows(source, split, args.dataset_config)[: limit or None]
    for n, row in enumerate(tqdm(rows, desc=f"tokenize {source}", leave=False, disable=None), 1):
        where = f"{source}, row {n}"
        if not isinstance(row, dict):
            fail(f"{where}: not an object with columns, but {type(row).__name__}")
        asked = [{"role": "user", "content": row["question"]}] if "question" in row else None
        row = row | {"prompt": row.get("prompt", asked)}
        if not isinstance(row["prompt"], str | list) or not row["prompt"]:
            fail(f"{where}: found the columns {', '.join(row)}; needed is prompt or question")
        try:
            if args.prompt_template:
                question = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
                row["prompt"] = args.prompt_template.replace("{prompt}", question)
            elif isinstance(row["prompt"], list) and tokenizer.chat_template is None:
                use_chatml(tokenizer)
            input_ids = prompt_tokens(tokenizer, row["prompt"], row)
        except Exception as error:  # templates raise what they like
            fail(f"{where}: neither text nor messages that the chat template takes ({error})")
        if len(input_ids) > args.max_prompt_length:
            dropped += 1
        else:
            prompts.append(Prompt(input_ids, row))
    if not prompts:
        fail(f"{source}: no prompt is within --max-prompt-length {args.max_prompt_length}")
    told = f", {dropped:,} dropped as longer than {args.max_prompt_length:,} tokens" if dropped else ""
    say(f"{source}: {len(prompts):,} prompts{told}")
    return prompts


def prompt_tokens(tokenizer, prompt, row: dict) -> list[int]:
    """A prompt, text or messages, as the token ids after which an answer begins."""
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options)
    return tokenizer(text, add_special_tokens=False).input_ids


def load_questions(tokenizer, args) -> list[Prompt]:
    """What the held-out rows ask before their last answer, with that answer."""
    if args.eval_dataset is None or tokenizer is None:
        return []
    questions = []
    for example in load_examples(args.eval_dataset, args.eval_split, args.dataset_config, args.num_eval):
        prompt, answer = last_answer(example)
        if isinstance(prompt, list) and tokenizer.chat_template is None:
            use_chatml(tokenizer)
        row = {"prompt": prompt, "answer": answer, "chat_template_kwargs": example.get("options")}
        input_ids = prompt_tokens(tokenizer, prompt, row) if prompt else []
        if 0 < len(input_ids) <= args.max_prompt_length:
            questions.append(Prompt(input_ids, row))
    return questions


def last_answer(example: dict) -> tuple[str | list[dict], str]:
    """Prompt, text or messages, and last answer, text, of an example as `as_example` gives it."""
    if "messages" not in example:
        return example["prompt"], example["completion"]
    messages = example["messages"]
    last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last], messages[last].get("content") or ""


def show_sequence(tokenizer, sequence: Sequence):
    """Print a sequence as the model sees it: trained tokens in green, or in [brackets] without colours."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    on, off = ("\033[32m", "\033[0m") if colour else ("[", "]")
    cuts, parts = np.flatnonzero(np.diff(sequence.trained)) + 1, []
    for ids, trained in zip(*(np.split(x, cuts) for x in sequence), strict=True):  # runs of one kind
        text = tokenizer.decode(ids)
        parts.append(f"{on}{text}{off}" if trained[0] else text)
    say("".join(parts))


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


def load_functions(specs: tuple[str, ...], args) -> list[tuple[str, object]]:
    """Names and functions of --reward or --eval-reward, with those of our settings that they name."""
    ours = {
        "allow_code_execution": args.allow_code_execution,
        "max_completion_length": args.max_completion_length,
    }
    found = []
    for spec in specs:
        function = load_function(spec)
        named = inspect.signature(function).parameters
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in named.values()):
            fail(f"{spec}: without **kwargs it cannot take prompts, completions and the dataset's columns")
        name = spec.rpartition(":")[2]
        if name in (known for known, _ in found):
            name = f"{name}_{len(found)}"
        found.append((name, partial(function, **{key: value for key, value in ours.items() if key in named})))
    return found


def teacher_answers(load_teacher, tokenizer, functions, args, output_dir: Path, device) -> str:
    """The dataset that seq_kd trains on: --teacher-data or the teacher's samples, what is right of them."""
    path = output_dir / "answers" / "kept.jsonl"
    if args.resume and functions and of_first(path.exists()):
        return str(path)
    source = args.teacher_data or str(sample_teacher(load_teacher, tokenizer, args, device))
    if not functions:
        return source
    if process()[0] == 0:
        kept = right_rows(source, functions, args)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, kept)
    if dist.is_initialized():
        dist.barrier()
    return str(path)


def of_first(value):
    """What the first process holds, on all of them: each may see a shared disk at another moment."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


OTHER_FORMS = "messages", "conversations"  # columns that are read in place of prompt and completion


def right_rows(source: str, functions, args) -> list[dict]:
    """Prompt, completion and columns of a dataset's answers whose mean reward is above --reward-threshold.

    A reward's None counts nothing; an answer of which no reward knows anything is dropped.
    """
    examples = load_examples(source, args.dataset_split, args.dataset_config)
    rows = load_rows(source, args.dataset_split, args.dataset_config)
    for n, row in enumerate(rows, 1):  # the rule of `load_examples`
        without_prompt = row.get("prompt") is None and not row.keys() & OTHER_FORMS
        if without_prompt and {"question", "answer"} <= row.keys():
            fail(
                f"{source}, row {n}: `answer` is read as the completion, so --reward would compare it with "
                "itself: give the columns prompt, completion and, with the right one, answer"
            )
    rows = [{k: v for k, v in row.items() if k not in OTHER_FORMS} for row in rows]
    prompts, texts = zip(*map(last_answer, examples), strict=True)
    completions = [
        [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    names = dict.fromkeys(key for row in rows for key in row if key not in ("prompt", "completion"))
    columns = {key: [row.get(key) for row in rows] for key in names}
    scores = np.zeros((len(functions), len(rows)))
    for line, (name, function) in zip(scores, functions, strict=True):
        try:
            values = list(function(prompts=list(prompts), completions=completions, **columns))
            numbers = [math.nan if value is None else float(value) for value in values]
        except Exception as error:  # whatever a user's function raises
            fail(f"reward {name}: {type(error).__name__}: {error}".splitlines()[0])
        if len(numbers) != len(rows):
            fail(f"reward {name} returned {len(numbers)} numbers for {len(rows)} completions")
        line[:] = numbers
    known = ~np.isnan(scores)  # (F, B)
    means = np.where(known, scores, 0.0).sum(0) / known.sum(0).clip(min=1)  # (B,)
    right = known.any(0) & (means > args.reward_threshold)  # (B,)
    chosen = np.flatnonzero(right).tolist()
    kept = [rows[n] | {"prompt": prompts[n], "completion": texts[n]} for n in chosen]
    say(f"{source}: {len(kept):,} of {len(rows):,} answers have a reward above {args.reward_threshold}")
    if not kept:
        fail(f"{source}: no answer is left to learn from")
    return kept


def sample_teacher(load_teacher, tokenizer, args, device) -> Path:
    """--answers-per-prompt samples of the teacher for every prompt that came to an end, in --cache-dir.

    The file's name is a digest of all that they depend on; what an ended run has sampled is continued. Asked
    are, in whole blocks, no more prompts than the steps have sequences: a short run need not wait for all.
    """
    prompts = tokenize_prompts(tokenizer, args.prompt_dataset, args.dataset_split, args)
    count = args.answers_per_prompt if args.temperature else 1  # greedy answers are all the same
    flags = (args.temperature, args.max_completion_length, count, args.seed, args.attn)
    key = hashlib.sha256(f"{teacher_digest(args.teacher)} {flags} {device.type}".encode())
    for prompt in prompts:
        key.update(json.dumps([prompt.input_ids, prompt.row]).encode())
    folder, rank = Path(args.cache_dir) / f"answers_{key.hexdigest()[:32]}", process()[0]
    blocks = [prompts[n : n + BLOCK] for n in range(0, len(prompts), BLOCK)]
    blocks = blocks[: math.ceil(args.max_steps * args.batch_size / BLOCK) or None]
    files = [folder / f"block_{n:06}.jsonl" for n in range(len(blocks))]
    missing = of_first([n for n, file in enumerate(files) if not file.exists()])
    folder.mkdir(parents=True, exist_ok=True)
    asked = sum(map(len, blocks))
    say(
        f"{folder}: {count} answers of {args.teacher} to each of {asked:,} prompts, of which "
        f"{len(missing):,} of {len(blocks):,} blocks are still to sample"
    )
    sampling = replace(args, temperature=max(args.temperature, GREEDY))
    for n in with_progress(missing, "the teacher's answers"):
        prompts_of_block = [prompt for prompt in blocks[n] for _ in range(count)]
        seed = args.seed * 10**6 + n
        answers = roll_out(load_teacher(), tokenizer, prompts_of_block, sampling, device, seed=seed)
        if rank == 0:
            ended = [answer for answer in answers if answer.ended and answer.text.strip()]
            rows = [answer.prompt.row | {"completion": answer.text} for answer in ended]
            write_rows(files[n], [{k: v for k, v in row.items() if k not in OTHER_FORMS} for row in rows])
    path = folder / f"answers_{len(blocks):06}.jsonl"
    if rank == 0:
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        write_rows(path, rows)
        say(f"{folder}: {len(rows):,} of {asked * count:,} answers of {args.teacher} came to an end")
        if not rows:
            fail(f"{path}: no answer to learn from; --max-completion-length is {args.max_completion_length}")
    if dist.is_initialized():
        dist.barrier()
    return path


def with_progress(blocks: list, what: str):
    """Blocks of work one after the other, under a bar; without a terminal a line about every 10 seconds."""
    started = said = time.perf_counter()
    hidden = None if process()[0] == 0 else True  # None: on a terminal alone
    for n, block in enumerate(tqdm(blocks, desc=what, leave=False, disable=hidden), 1):
        yield block
        now = time.perf_counter()
        if now - said > 10 and not sys.stderr.isatty():
            left, said = round((now - started) / n * (len(blocks) - n)), now
            say(f"{what}: {n:,} of {len(blocks):,} blocks, left {left // 60}:{left % 60:02}")


def write_rows(path: Path, rows: list[dict]):
    """Write a .jsonl, whole or not at all, whoever else writes it."""
    partial_path = path.with_suffix(f".partial_{os.getpid()}")
    partial_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial_path.rename(path)


@cache
def teacher_digest(name: str) -> str:
    """`model_digest`, by the first process and once: it reads every file."""
    return of_first(model_digest(name) if process()[0] == 0 else None)


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


def teacher_views(load_teacher, sequences, wanted, vocab_size: int, args, device):
    """A function of a row and the numbers of its sequences -> what the teacher says of its trained tokens.

    With --cache-top-k from a cache, in which the sequences `wanted` are by then.
    """
    if args.cache_top_k:
        stored = cache_teacher(load_teacher, sequences, wanted, vocab_size, args, device)
        return lambda batch, indices: stored.look_up(indices, device)
    return lambda batch, indices: live_teacher(load_teacher(), batch, vocab_size)


@torch.no_grad()
def live_teacher(teacher, batch, vocab_size: int) -> LiveTeacher:
    """The teacher's states at the trained tokens of a row, and its head without padded rows."""
    states = fsdp_forward(completion_states)(teacher, batch)  # (C, H_t)
    return LiveTeacher(states, first_tokens(head_settings(teacher), vocab_size))


class TeacherCache(NamedTuple):
    """Memory-mapped arrays over all T trained tokens of some sequences, sequence after sequence."""

    logprobs: np.ndarray  # (T, k + 1) float32: of `ids`, and of the rest together; (T, V) where all is kept
    ids: np.ndarray  # (T, k) int32, the likeliest first
    target_logprobs: np.ndarray  # (T,) float32, at temperature 1
    done: np.ndarray  # (S,) bool: sequences that are in the cache
    starts: np.ndarray  # (S + 1,) where each sequence begins

    def where(self, indices) -> np.ndarray:
        """Positions of the tokens of some sequences, one after the other."""
        parts = [np.arange(self.starts[i], self.starts[i + 1]) for i in indices]
        return np.concatenate([np.zeros(0, int), *parts])

    def look_up(self, indices, device) -> CachedTeacher:
        """What the teacher says of a row of those sequences."""
        where = self.where(indices)
        logprobs, ids, targets = (torch.from_numpy(x[where]).to(device) for x in self[:3])
        return CachedTeacher(logprobs, ids.long(), targets)


@torch.no_grad()
def cache_teacher(load_teacher, sequences, wanted, vocab_size: int, args, device) -> TeacherCache:
    """The cache of a teacher's likeliest tokens over `sequences`, filled where `wanted` ones are missing.

    The folder's name is a digest of all that it depends on. A block of sequences counts once it is on disk:
    a run that was ended goes on behind the last one, and other runs on the same data find what is there.
    """
    rank, world_size = process()
    k = min(args.cache_top_k, vocab_size)
    flags = (k, args.kd_temperature, vocab_size, args.attn, device.type)
    key = hashlib.sha256(f"{teacher_digest(args.teacher)} {flags}".encode())
    for s in sequences:
        key.update(len(s.input_ids).to_bytes(8) + s.input_ids.tobytes() + s.trained.tobytes())
    starts = np.cumsum([0, *(int(s.trained.sum()) for s in sequences)])
    total, folder = int(starts[-1]), Path(args.cache_dir) / f"teacher_{key.hexdigest()[:32]}"
    shapes = {
        "logprobs": ((total, k + (k < vocab_size)), np.float32),
        "ids": ((total, k), np.int32),
        "target_logprobs": ((total,), np.float32),
        "done": ((len(sequences),), np.bool_),
    }
    if rank == 0 and not folder.exists():
        partial_folder = folder.with_name(f"{folder.name}.partial_{os.getpid()}")
        partial_folder.mkdir(parents=True, exist_ok=True)
        for name, (shape, kind) in shapes.items():
            np.lib.format.open_memmap(partial_folder / f"{name}.npy", "w+", kind, shape)
        try:
            partial_folder.rename(folder)
        except OSError:  # another run was faster: both fill the same cache
            shutil.rmtree(partial_folder)
    if dist.is_initialized():
        dist.barrier()
    arrays = [np.lib.format.open_memmap(folder / f"{name}.npy", "r+") for name in shapes]
    stored = TeacherCache(*arrays, starts)
    missing = of_first([i for i in wanted if not stored.done[i]])
    per_token = sum(x.itemsize * x.shape[-1] if x.ndim > 1 else x.itemsize for x in arrays[:3])
    say(
        f"{folder}: {total:,} tokens, {per_token:,} bytes each, {total * per_token / 2**20:,.1f} MiB; "
        f"{len(missing):,} of {len(wanted):,} sequences are still to ask {args.teacher} about"
    )
    blocks = [missing[n : n + BLOCK * world_size] for n in range(0, len(missing), BLOCK * world_size)]
    for block in with_progress(blocks, "the teacher's log-probs"):
        lengths = [len(sequences[i].input_ids) for i in block]
        rows = pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)
        for row in rows[rank::world_size]:
            ids = [block[i] for i in row]
            batch = collate([sequences[i] for i in ids] or [FILLER], device)
            store_row(stored, stored.where(ids), live_teacher(load_teacher(), batch, vocab_size), batch, args)
        for array in arrays[:3]:
            array.flush()
        if dist.is_initialized():
            dist.barrier()
        if rank == 0:
            stored.done[block] = True
            stored.done.flush()
    return stored


def store_row(stored: TeacherCache, where: np.ndarray, teacher: LiveTeacher, batch, args):
    """Write what the teacher says of a row to the positions `where` (C,) of a cache, chunk by chunk."""
    targets = batch.input_ids[0, batch.completion_index]  # (C,)
    for start in range(0, len(targets), 256):
        c = slice(start, start + 256)
        said = teacher.chunk(c, targets, args.kd_temperature)
        ids = said.logprobs.topk(stored.ids.shape[1]).indices  # (c, k)
        stored.ids[where[c]] = ids.cpu().numpy()
        stored.logprobs[where[c]] = bucketed(said.logprobs, ids).cpu().numpy()
        stored.target_logprobs[where[c]] = said.target_logprobs.cpu().numpy()


def training_order(items: list, count: int, args) -> np.ndarray:
    """Numbers of the first `count` sequences or prompts to train on, epoch after epoch."""
    if not count:
        return np.zeros(0, int)
    lengths = np.array([len(item.input_ids) for item in items])
    num_epochs = math.ceil(count / len(items))
    return data_order(lengths, [items], [1], len(items), num_epochs, args.order, args.seed)[:count]


def as_sequence(completion: Completion, vocab_size: int) -> Sequence:
    """A sampled answer as a sequence; a row that only pads the student's table is no token to learn from."""
    input_ids = completion.input_ids
    return Sequence(input_ids, completion.trained & (input_ids < vocab_size))


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


class InverseSampler(LogitsProcessor):
    """Samples by inverting the distribution function at uniform numbers (B, T) given, and keeps log-probs.

    Each sequence has its own numbers, so what is sampled depends on no other: not on the sequences that are
    sampled at once, nor on the number of processes.
    """

    def __init__(self, uniforms: torch.Tensor, temperature: float):
        self.uniforms, self.temperature, self.logprobs = uniforms, temperature, []  # logprobs: T times (B,)

    def __call__(self, input_ids, scores):
        logprobs = (scores.float() / self.temperature).log_softmax(-1)  # (B, V)
        cumulative = logprobs.double().exp().cumsum(-1)  # (B, V)
        wanted = self.uniforms[:, len(self.logprobs), None] * cumulative[:, -1:]  # (B, 1)
        tokens = torch.searchsorted(cumulative, wanted, right=True).clamp(max=scores.shape[-1] - 1)  # (B, 1)
        self.logprobs.append(logprobs.gather(-1, tokens).squeeze(-1))
        return torch.full_like(scores, -math.inf).scatter(-1, tokens, 0.0)  # greedy decoding then takes it


@torch.no_grad()
def roll_out(policy, tokenizer, prompts: list[Prompt], args, device, *, seed: int) -> list[Completion]:
    """Sample a completion of each prompt at --temperature, up to and with the first end token.

    Every setting is given here: the model's own generation config stays out of it.
    """
    policy.eval()
    rank, world_size = process()
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    own_config, policy.generation_config = (
        policy.generation_config,
        GenerationConfig(
            max_new_tokens=args.max_completion_length,
            eos_token_id=tokenizer.end_ids,
            pad_token_id=pad,
            do_sample=False,  # InverseSampler has sampled already
        ),
    )
    size = (len(prompts), args.max_completion_length + 1)  # some devices decode one token more
    uniforms = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order, sampled = (
        sorted(range(rank, len(prompts), world_size), key=lambda i: len(prompts[i].input_ids)),
        {},
    )
    with unsharded(policy):
        for start in range(0, len(order), args.generation_batch_size):
            chunk = order[start : start + args.generation_batch_size]
            asked = [prompts[i].input_ids for i in chunk]
            width = max(map(len, asked))
            input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in asked], device=device)
            attention_mask = torch.tensor(
                [[0] * (width - len(ids)) + [1] * len(ids) for ids in asked], device=device
            )
            sampler = InverseSampler(uniforms[chunk].to(device), args.temperature)
            output = policy.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_processor=[sampler],
                synced_gpus=False,  # processes have different numbers of chunks
            )
            logprobs = torch.stack(sampler.logprobs, 1).cpu().numpy()  # (chunk, T)
            for i, ids, line in zip(chunk, output[:, width:].tolist(), logprobs, strict=True):
                stop = next((n + 1 for n, token in enumerate(ids) if token in tokenizer.end_ids), len(ids))
                sampled[i] = ids[:stop], line[:stop]
    policy.generation_config = own_config
    if dist.is_initialized():
        shares = [None] * world_size
        dist.all_gather_object(shares, sampled)
        sampled = {i: found for share in shares for i, found in share.items()}
    return [completion_of(tokenizer, prompt, *sampled[i]) for i, prompt in enumerate(prompts)]


def completion_of(tokenizer, prompt: Prompt, token_ids: list[int], logprobs) -> Completion:
    """What was sampled, with its text; truncated if its last token is not an end token."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    return Completion(prompt, token_ids, logprobs, text, token_ids[-1] in tokenizer.end_ids)


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
