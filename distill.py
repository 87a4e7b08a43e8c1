"""Distillation: a student learns from a teacher's answers, or from its distribution over every next token.

    L(theta) = 1/T sum_t D(p_T(. | y_<t), p_S(. | y_<t)) - ce_coef/T' sum_t' log p_S(y_t' | y_<t')

T trained tokens of the optimizer batch, T' those of them that are the data's; D a divergence of teacher and
student over the vocabulary.

    --mode       tokens y come from         loss of a token
    seq_kd       the teacher, filtered      -log p_S(y_t): section 3.2, arXiv:1606.07947; R1's distillation
    token_kd     the data                   D: word-level distillation, section 3.1, arXiv:1606.07947
    on_policy    the student, or the data   D: generalized knowledge distillation, section 3, arXiv:2306.13649

    --divergence
    forward_kl   KL(p_T || p_S): covers all that the teacher may say
    reverse_kl   KL(p_S || p_T): keeps to what the teacher does say
    jsd          beta KL(p_T || m) + (1 - beta) KL(p_S || m),  m = beta p_T + (1 - beta) p_S

What the student has sampled is held fixed: no gradient goes through the sampling. The exception is
`--on-policy-loss policy_gradient --kl-discount 1`, the reverse KL of whole answers. The loop:

    0. Teacher    sample its answers (seq_kd), or keep its likeliest tokens on disk (--cache-top-k)
    1. Batch      sequences of the data; answers of the student to prompts (on_policy)
    2. Loss       both heads over the trained tokens, chunk by chunk; counts are those of the whole batch
    3. Update     clip the gradient, learning-rate schedule, AdamW
    4. Evaluate   held-out divergences, right answers of the student, first of the teacher, too; log; save

Deviations from the papers, each with its reason:
    1. A batch mixes sampled and given sequences in a fixed ratio; GKD draws by chance which of them a whole
       batch is made of. The expectation is the same, and the gradient is quieter.
    2. A token counts alike in short and long answers, as in TRL; GKD takes the mean of sequences' means.
    3. Only the likelihood beside D has a weight, `--ce-coef`: a common factor is the learning rate's.
    4. seq_kd learns from samples of the teacher, equal ones once; section 3.2 from the mode of its
       distribution, by beam search. Rewards can keep the right samples; `--temperature 0` is the greedy mode.
    5. policy_gradient leaves out MiniLLM's single-step decomposition, teacher-mixed sampling, normalization
       by length and language-modelling term: `--divergence` is the exact single step, `--ce-coef` the term.

    python distill.py                                          # CPU, offline, 2 minutes on one core
    python distill.py --mode seq_kd --reward rewards.py:math_answer
    python distill.py --model Qwen/Qwen2.5-0.5B --teacher Qwen/Qwen2.5-7B-Instruct --dataset openai/gsm8k \
        --dataset-config main --learning-rate 1e-5 --batch-size 64 --max-tokens-per-micro-batch 8192

Shapes: N tokens in a row, B sequences, C trained tokens, c of them in a chunk, V vocabulary, H and H_t hidden
sizes of student and teacher, k cached tokens, F reward functions.
"""

import atexit
import ctypes
import gc
import hashlib
import inspect
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import time
from collections import namedtuple
from dataclasses import asdict
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import datasets
import numpy as np
import pydantic
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import transformers
import tyro
from matplotlib.figure import Figure
from pydantic import Field, FilePath, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

import common
import loading
from common import CHATML, check_packed, token_logprobs

HERE = Path(__file__).resolve().parent
Decay = Annotated[float, Field(ge=0, lt=1)]


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@pydantic.dataclasses.dataclass
class Args:
    # Model
    model: str = "tiny/student"  # model to train: a hub id or a folder
    teacher: str = "tiny/sft"  # model to learn from: a hub id or a folder
    chat_template: FilePath | None = None  # Jinja chat template to use instead of the tokenizer's own
    attn: str = "packed"  # packed, or flash_attention_2 where it is installed, or eager (exact, slow)
    dtype: loading.Dtype = "bfloat16" if torch.cuda.is_available() else "float32"  # compute precision
    gradient_checkpointing: bool = False  # recompute activations: about 30 % slower, far less memory
    compile: bool = False  # compile each layer with torch.compile
    lora_rank: NonNegativeInt = 0  # train a LoRA of this rank and leave the model as it is; 0: no LoRA
    lora_alpha: PositiveFloat = 32.0  # what a LoRA adds is multiplied by alpha / rank
    lora_target: str = "all-linear"  # layers with a LoRA: all but the head, or a regular expression of names

    # Data
    dataset: tuple[str, ...] = ("tiny/data/sft_train.jsonl",)  # hub ids, files, saved datasets
    dataset_config: str | None = None  # configuration name of the hub dataset ("main" for openai/gsm8k)
    dataset_split: str = "train"  # split of the hub dataset to train on
    prompt_dataset: str | None = None  # what is answered; by default tiny/'s, or the first --dataset's
    eval_dataset: str | None = None  # held-out dataset; by default tiny/'s if tiny/ is trained on, else none
    eval_split: str = "test"  # split of the hub dataset to evaluate on
    max_length: PositiveInt = 1024  # longest sequence in tokens; longer ones are dropped and counted
    max_prompt_length: PositiveInt = 512  # longest prompt in tokens; longer ones are dropped and counted
    train_on_prompt: bool = False  # train on every token, not only the assistant's

    # Distillation
    mode: Literal["token_kd", "seq_kd", "on_policy"] = "token_kd"  # data, teacher's answers, or student's
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"  # of teacher and student, per token
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5  # the teacher's share in jsd (GKD: 0.1, 0.5, 0.9)
    kd_temperature: PositiveFloat = 1.0  # softens both distributions in the divergence (Hinton: 1 to 20)
    ce_coef: NonNegativeFloat = 0.0  # weight of the likelihood of the data's tokens (DistillKit: 0.5)
    cache_top_k: NonNegativeInt = 0  # the teacher's likeliest tokens kept on disk; 0 asks it at every step
    cache_dir: str = "runs/cache"  # folder of what a teacher has said, for all runs that ask the same

    # Answers
    on_policy_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5  # sampled share of a batch (GKD: 0.5, 1)
    on_policy_loss: Literal["divergence", "policy_gradient"] = "divergence"  # or the KL of sampled tokens
    kl_discount: Annotated[float, Field(ge=0, le=1)] = 0.0  # of later tokens' KL in an advantage (MiniLLM: 1)
    mask_truncated: bool = False  # do not train on completions that --max-completion-length cut off
    answers_per_prompt: PositiveInt = 4  # the teacher's samples of each prompt; one at --temperature 0
    reward: tuple[str, ...] = ()  # file.py:function, or a reward model, for seq_kd's answers
    reward_threshold: float = 0.5  # answers are kept if the mean of their rewards but None is above this
    allow_code_execution: bool = False  # let rewards run what the model writes (rewards.py:code_tests)
    reward_timeout: NonNegativeFloat = 1800  # seconds a reward has for a batch, or the run ends; 0: for ever
    max_completion_length: PositiveInt = 128  # longest sampled answer in tokens
    temperature: NonNegativeFloat = 1.0  # sampling temperature; 0 is greedy
    max_tokens_per_rollout: PositiveInt = 65536  # tokens that are sampled at once: memory, never the result
    rollout: Literal["transformers", "vllm"] = "transformers"  # sampling engine, in this process
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.4  # share of a GPU's memory that vLLM may take

    # Optimization
    optimizer: loading.Optimizer = "adamw"  # adamw8bit: its moments in 8 bits, a quarter of their memory
    learning_rate: NonNegativeFloat = 2e-3  # peak, for tiny/; models of billions need 1e-5 (SFT) to 1e-6
    lr_schedule: Literal["linear", "cosine", "constant"] = "cosine"  # after warm-up; the first two end at 0
    warmup_steps: NonNegativeInt = 10  # steps over which the learning rate rises linearly from 0
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay rates of AdamW's two moments
    weight_decay: NonNegativeFloat = 0.0  # AdamW's decoupled weight decay, on matrices only
    max_grad_norm: PositiveFloat = 1.0  # larger gradients are scaled down to this norm; inf: no clipping
    batch_size: PositiveInt = 32  # sequences, pairs or completions per step, over all processes
    max_tokens_per_micro_batch: PositiveInt = 2048  # tokens of a packed row: memory only, never the result
    num_epochs: PositiveFloat = 3.125  # passes over the training set or the prompts, if --max-steps is 0
    max_steps: NonNegativeInt = 0  # steps, or rollouts; 0 derives them from --num-epochs

    # Evaluation and output
    eval_every: NonNegativeInt = 100  # steps between evaluations; 0 evaluates only before and after
    num_eval: NonNegativeInt = 256  # rows of the evaluation sets that are used; 0 uses all
    seed: NonNegativeInt = 1  # of the data order and the sampling
    output_dir: str | None = None  # new folder of the run; by default runs/<script>_<seed>_<time>
    resume: bool = False  # continue the run in --output-dir from its last checkpoint
    save_every: NonNegativeInt = 500  # steps between checkpoints; 0 saves only on SIGTERM or Ctrl-C
    log_every: PositiveInt = 10  # steps between lines on the terminal; metrics.jsonl has one line a step
    wandb: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline works)

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def in_range(cls, values, build):
        try:
            return build(values)
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            fail(f"--{problem['loc'][0].replace('_', '-')} {problem['input']}: {problem['msg']}")

    def __post_init__(self):
        if self.dataset == Args.dataset:
            self.eval_dataset = self.eval_dataset or "tiny/data/sft_eval.jsonl"
            self.prompt_dataset = self.prompt_dataset or "tiny/data/prompts_train.jsonl"
        self.prompt_dataset = self.prompt_dataset or self.dataset[0]
        sampled, by_gradient = self.mode == "on_policy", self.on_policy_loss == "policy_gradient"
        num_given = self.batch_size - sampled * round(self.on_policy_fraction * self.batch_size)
        temperatures = self.temperature, self.kd_temperature
        mistakes = {
            "--reward is for --mode seq_kd": self.reward and self.mode != "seq_kd",
            "--temperature 0: --mode on_policy trains on samples": sampled and self.temperature == 0,
            "--on-policy-fraction: no sequence of a batch": sampled and num_given == self.batch_size,
            "--cache-top-k: a cache knows nothing of the student's samples": sampled and self.cache_top_k,
            "--ce-coef: no data beside it": self.ce_coef and (self.mode == "seq_kd" or num_given == 0),
            "--on-policy-loss is for --mode on_policy": by_gradient and not sampled,
            "--mask-truncated is for --mode on_policy": self.mask_truncated and not sampled,
            "--kl-discount is for --on-policy-loss policy_gradient": self.kl_discount and not by_gradient,
            "--on-policy-loss policy_gradient: temperatures are 1": by_gradient and temperatures != (1, 1),
        }
        for mistake in (mistake for mistake, made in mistakes.items() if made):
            fail(mistake)
        if "tiny/" not in self.model and self.learning_rate == Args.learning_rate:
            say(f"--learning-rate {self.learning_rate} suits tiny/; models of billions take 1e-5")


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
    """KL(teacher || student) of log-probs (c, V) -> (c,) in nats (Hinton et al., arXiv:1503.02531)."""
    return expected_log_ratio(teacher_logprobs, student_logprobs)


def reverse_kl(student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) of log-probs (c, V) -> (c,) in nats (MiniLLM, arXiv:2306.08543, section 2.1)."""
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


class TeacherTerms(NamedTuple):
    """What a teacher says of C tokens; of all V tokens, or of k and the rest."""

    logprobs: torch.Tensor  # (C, V) or (C, k + 1), at --kd-temperature
    target_logprobs: torch.Tensor  # (C,) log-prob of the token that is there, at temperature 1
    ids: torch.Tensor  # (C, k) its likeliest tokens, in order; k = 1 where all V are known


class TokenTerms(NamedTuple):
    """What a loss and its metrics are made of, (C,) each, or the sums over tokens; two have a gradient."""

    divergences: torch.Tensor  # of teacher and student, at --kd-temperature
    ce: torch.Tensor  # negative log-prob of the token that is there under the student, at temperature 1
    teacher_ce: torch.Tensor  # the same under the teacher
    kl_forward: torch.Tensor  # KL(teacher || student), at --kd-temperature
    kl_reverse: torch.Tensor  # KL(student || teacher), at --kd-temperature
    token_agreement: torch.Tensor  # 1 where both have the same likeliest token


def live_terms(states, head: tuple, targets: torch.Tensor, temperature: float) -> TeacherTerms:
    """What a teacher says of the tokens `targets` (c,), from its states before them (c, H_t) and its head."""
    logits = common.head_logits(states, *head)  # (c, V)
    logprobs = logits.log_softmax(-1)  # (c, V)
    target_logprobs = logprobs.gather(-1, targets[:, None]).squeeze(-1)  # (c,)
    softened = logprobs if temperature == 1 else (logits / temperature).log_softmax(-1)  # (c, V)
    return TeacherTerms(softened, target_logprobs, logits.argmax(-1, keepdim=True))


def chunk_terms(hidden, head, targets, said_of, c: slice, divergence, temperature: float) -> TokenTerms:
    """`TokenTerms` (c,) of the tokens `targets` (c,) from a student's states before them (c, H)."""
    logits = common.head_logits(hidden, *head)  # (c, V)
    logprobs = logits.log_softmax(-1)  # (c, V)
    ce = -logprobs.gather(-1, targets[:, None]).squeeze(-1)  # (c,)
    if temperature != 1:
        logprobs = (logits / temperature).log_softmax(-1)  # (c, V)
    with torch.no_grad():
        said = said_of(c, targets, temperature)
    if said.logprobs.shape[-1] != logprobs.shape[-1] or said.ids.shape[-1] > 1:
        logprobs = bucketed(logprobs, said.ids)  # (c, k + 1)
    divergences = divergence(logprobs, said.logprobs)  # (c,)
    with torch.no_grad():  # last: what the backward pass computes again ends above
        both = logprobs, said.logprobs
        kls = [divergences.detach() if kl is divergence else kl(*both) for kl in (forward_kl, reverse_kl)]
        agreement = (logits.argmax(-1) == said.ids[:, 0]).float()  # (c,)
    return TokenTerms(divergences, ce, -said.target_logprobs, *kls, agreement)


def first_tokens(head: tuple, vocab_size: int) -> tuple:
    """A head, as `head_settings` gives it, of the first tokens alone: without the rows that pad its table."""
    weight, bias, *others = head
    return weight[:vocab_size], None if bias is None else bias[:vocab_size], *others


@loading.fsdp_forward
def token_divergences(student, batch, said_of, *, divergence, temperature, vocab_size, chunk_size=None):
    """`TokenTerms` (C,) of a row's trained tokens under a student, beside what a teacher says of them.

    `said_of` gives `TeacherTerms` of a slice of the tokens; `divergence` maps log-probs of student and
    teacher at `temperature`, (c, V) each, to (c,); both are of the first `vocab_size` tokens. Logits exist
    for `chunk_size` tokens at a time, and again in the backward pass: 1,024 on CUDA, 256 elsewhere.
    """
    hidden = common.completion_states(student, batch)  # (C, H)
    targets = batch.input_ids[0, batch.completion_index]  # (C,)
    head = first_tokens(common.head_settings(student), vocab_size)
    chunk_size, parts = chunk_size or (1024 if hidden.is_cuda else 256), []
    for n, states in enumerate(hidden.split(chunk_size)):
        c = slice(n * chunk_size, (n + 1) * chunk_size)
        inputs = states, head, targets[c], said_of, c, divergence, temperature
        parts.append(checkpoint(chunk_terms, *inputs, use_reentrant=False, preserve_rng_state=False))
    return TokenTerms(*map(torch.cat, zip(*parts)))


def token_terms(student, batch, said_of, settings: dict) -> TokenTerms:
    """`token_divergences` of a row; the likelihood alone and zeros where nothing of the teacher is known."""
    if said_of is not None:
        return token_divergences(student, batch, said_of, **settings)
    ce = -token_logprobs(student, batch)  # (C,)
    zeros = torch.zeros_like(ce)  # (C,)
    return TokenTerms(zeros, ce, zeros, zeros, zeros, zeros)


def reverse_kl_advantages(logprobs, teacher_logprobs, sequence_index, discount: float) -> torch.Tensor:
    """sum_{s >= t} discount^(s - t) log p_T/p_S (y_s) at each token t that the student sampled, (C,).

    At discount 0, -A log p_S has in expectation the gradient of KL(p_S || p_T) of every token, what comes
    before it held fixed (Thinking Machines 2025, On-policy distillation); at 1 that of KL(p_S || p_T) of
    whole answers (MiniLLM, arXiv:2306.08543, section 2.2; deviation 5).
    """
    log_ratios, index = (teacher_logprobs - logprobs).tolist(), sequence_index.tolist()
    for t in reversed(range(len(log_ratios) - 1)):
        log_ratios[t] += discount * log_ratios[t + 1] * (index[t] == index[t + 1])
    return torch.tensor(log_ratios, dtype=logprobs.dtype, device=logprobs.device)


def lr_factor(step: int, total_steps: int, warmup_steps: int, lr_schedule: str) -> float:
    """The learning rate of the 1-based `step` as a share of its peak: linear warm-up, then down towards 0."""
    if step <= warmup_steps:
        return step / warmup_steps
    done = (step - warmup_steps - 1) / max(1, total_steps - warmup_steps)  # in [0, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[lr_schedule]


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------
DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def main(args: Args) -> dict:
    """Train as `args` says and return the last metrics."""
    device, world_size = setup_distributed(), dist.get_world_size()
    output_dir, (tokenizer, teacher_tokenizer) = choose_output_dir(args), load_tokenizers(args)
    longest = max(args.max_length, args.max_prompt_length + args.max_completion_length)
    if longest > tokenizer.positions:
        fail(f"the length flags allow {longest} tokens, but a model has {tokenizer.positions} positions")
    with_teacher = args.mode != "seq_kd"  # whether the loss needs its distributions, not its answers alone
    num_sampled = round(args.on_policy_fraction * args.batch_size) if args.mode == "on_policy" else 0
    num_given = args.batch_size - num_sampled  # sequences of a batch that are data, not the student's answers
    vocab_size, prompts, sources = len(tokenizer), [], args.dataset if num_given else ()
    folder = cache_folder(vocab_size, args, device) if args.cache_top_k or not with_teacher else None
    held_out = load_sequences(tokenizer, args.eval_dataset, args.eval_split, args, args.num_eval)
    if num_sampled or not with_teacher:
        prompts = load_prompts(teacher_tokenizer, args.prompt_dataset, args.dataset_split, args)

    # Loaded when it is first asked something, which is never if all that it would say is on disk already.
    @cache
    def get_teacher():
        teacher = load_model(args.teacher, args, device, frozen=True).eval()
        teacher.generation_config = GenerationConfig(eos_token_id=end_tokens(teacher_tokenizer, teacher))
        return teacher

    # 0. Teacher: its answers, its likeliest tokens, its score; then it leaves the memory, if no step asks it
    if not with_teacher:
        sources = [teacher_answers(get_teacher, teacher_tokenizer, prompts, folder, output_dir, args, device)]
    sequences = [s for name in sources for s in load_sequences(tokenizer, name, args.dataset_split, args)]
    epoch_size, per_step = (len(prompts), num_sampled) if num_sampled else (len(sequences), num_given)
    total_steps = args.max_steps or max(1, math.ceil(args.num_epochs * epoch_size / per_step))
    given_stream = training_order(len(sequences), total_steps * num_given, args.seed)
    prompt_stream = training_order(len(prompts), total_steps * num_sampled, args.seed)
    if num_given:
        ids, trained = sequences[given_stream[0]]
        say(f"first sequence:\n{tokenizer.decode(ids)}\ntrained of it:\n{tokenizer.decode(ids[trained])}")
    view_of = partial(live_view, get_teacher, vocab_size) if with_teacher else None
    if args.cache_top_k and teacher_tokenizer is tokenizer:
        wanted = held_out + [sequences[i] for i in np.unique(given_stream) if with_teacher]
        fill_cache(get_teacher, wanted, vocab_size, folder, args, device)
        view_of = partial(cached_view, folder, min(args.cache_top_k, vocab_size), vocab_size)
    teacher_metrics = {}
    if held_out and teacher_tokenizer is tokenizer and not args.resume:
        teacher_metrics, _ = answer_rates("eval/teacher_", get_teacher(), tokenizer, held_out, args)
    if args.cache_top_k or not with_teacher:
        get_teacher.cache_clear()
        gc.collect()  # FSDP2's modules and hooks hold each other

    engine = runpy.run_path(located("rollout_vllm.py"))["find_engine"]() if args.rollout == "vllm" else None
    student = load_model(args.model, args, device)
    student.generation_config = GenerationConfig(eos_token_id=end_tokens(tokenizer, student))
    if engine:
        student.decode = engine(located(args.model), args.vllm_memory, args).decode
    optimizer = loading.adamw(args, student)
    progress = load_checkpoint(output_dir, student, optimizer) if args.resume else {}
    step, num_tokens = progress.get("step", 0), progress.get("num_tokens", 0)
    divergence = {**DIVERGENCES, "jsd": partial(jsd, beta=args.jsd_beta)}[args.divergence]
    settings = {"divergence": divergence, "temperature": args.kd_temperature, "vocab_size": vocab_size}
    evaluation = partial(evaluate_student, student, tokenizer, held_out, view_of, settings, args, device)
    logger, metrics = Logger(args, output_dir, total_steps, step), {}
    if step == 0:
        evaluated, samples = evaluation()
        logger.log({"step": 0} | teacher_metrics | evaluated, samples)
    while step < total_steps:
        # 1. Batch: given sequences and sampled answers, packed into rows that are dealt to the processes
        step, started, rollout = step + 1, time.perf_counter(), []
        batch_sequences = [sequences[i] for i in given_stream[(step - 1) * num_given : step * num_given]]
        if num_sampled:
            asked = [prompts[i] for i in prompt_stream[(step - 1) * num_sampled : step * num_sampled]]
            rollout = roll_out(student, tokenizer, asked, 1, args.temperature, (args.seed, step), args)
            batch_sequences += [as_sequence(completion, vocab_size, args) for completion in rollout]
        rolled_out = time.perf_counter()
        lengths = np.array([len(ids) for ids, _ in batch_sequences])  # (B,)
        counts = [int(trained.sum()) for _, trained in batch_sequences]  # (B,)
        batch_tokens, given_tokens = sum(counts), sum(counts[:num_given])
        rows = common.pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)

        # 2. Loss: each row adds its part of the mean over the whole optimizer batch
        student.train()
        sums = torch.zeros(2 + len(TokenTerms._fields), device=device)  # to stop, loss, every term
        for row in rows[dist.get_rank() :: world_size]:
            members = [batch_sequences[i] for i in row]
            batch = common.collate(members or [FILLER], device)
            terms = token_terms(student, batch, view_of(batch, members) if with_teacher else None, settings)
            given = torch.tensor([i < num_given for i in row] or [True], device=device)  # (B of the row,)
            given = given[batch.sequence_index]  # (C,) False for what the student sampled
            losses = terms.divergences * args.kd_temperature**2  # (C,) keeps the gradient's size (Hinton)
            if args.mode == "seq_kd":
                losses = terms.ce  # (C,)
            if args.on_policy_loss == "policy_gradient":
                logps = -terms.ce.detach(), -terms.teacher_ce  # (C,) each
                advantages = reverse_kl_advantages(*logps, batch.sequence_index, args.kl_discount)  # (C,)
                losses = torch.where(given, losses, advantages * terms.ce)
            loss = losses.sum() / max(1, batch_tokens)
            if args.ce_coef:
                loss = loss + args.ce_coef * (terms.ce * given).sum() / given_tokens
            (loss * world_size).backward()  # FSDP2 averages over processes what is to be summed
            sums[1:] += torch.stack([loss, *(term.sum() for term in terms)]).detach()

        # 3. Update
        for group in optimizer.param_groups:
            factor = lr_factor(step, total_steps, args.warmup_steps, args.lr_schedule)
            group["lr"] = args.learning_rate * factor
        sums[0] = logger.stopping
        dist.all_reduce(sums)
        stopping, loss, *term_sums = sums.tolist()
        grad_norm = loading.clip_grad_norm(student, args.max_grad_norm)
        if not math.isfinite(loss + grad_norm):
            fail(f"step {step}: loss {loss}, gradient norm {grad_norm}; --resume goes back to a checkpoint")
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started

        # 4. Evaluate, log, save
        num_tokens += int(lengths.sum())
        metrics = {
            "step": step,
            "epoch": step * per_step / epoch_size,
            "loss": loss,
            "learning_rate": group["lr"],
            "grad_norm": grad_norm,
            **describe(term_sums, batch_tokens, with_teacher),
            "num_tokens": num_tokens,
            "tokens_per_second": int(lengths.sum()) / seconds,
            "step_time": seconds,
            "packing/fill": int(lengths.sum()) / (len(rows) * args.max_tokens_per_micro_batch),
        }
        if rollout:
            metrics |= {
                "completions/mean_length": float(np.mean([len(c.token_ids) for c in rollout])),
                "completions/clipped_ratio": float(np.mean([not c.ended for c in rollout])),
                "time/rollout": rolled_out - started,
            }
        last, samples = step == total_steps, []
        if last or (args.eval_every and step % args.eval_every == 0):
            evaluated, samples = evaluation()
            metrics |= evaluated
        logger.log(metrics, samples)
        if stopping or (args.save_every and (last or step % args.save_every == 0)):
            save_checkpoint(output_dir, student, optimizer, {"step": step, "num_tokens": num_tokens})
        if stopping and not last:
            logger.close(f"stopped; continue with --resume --output-dir {output_dir}")
            return metrics
    save_model(output_dir / "model", student, tokenizer)
    logger.close(f"model saved to {output_dir / 'model'}")
    return metrics


def describe(term_sums: list[float], count: int, with_teacher: bool) -> dict:
    """Metrics from the sums of `TokenTerms` over `count` tokens; without a teacher the likelihood alone."""
    means = TokenTerms(*(value / max(1, count) for value in term_sums))._asdict()
    return {name: means[name] for name in TokenTerms._fields[1:] if with_teacher or name == "ce"}


@torch.no_grad()
def evaluate_student(
    student, tokenizer, held_out, view_of, settings, args, device
) -> tuple[dict, list[dict]]:
    """Held-out loss and divergences; right answers, sampled and greedy -> metrics and samples."""
    student.eval()
    sums = torch.zeros(1 + len(TokenTerms._fields), device=device)  # tokens, every term
    lengths, world_size = [len(ids) for ids, _ in held_out], dist.get_world_size()
    rows = common.pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)
    for row in rows[dist.get_rank() :: world_size]:
        members = [held_out[i] for i in row]
        batch = common.collate(members or [FILLER], device)
        terms = token_terms(student, batch, view_of(batch, members) if view_of else None, settings)
        sums += torch.stack([torch.ones_like(terms.ce).sum(), *(term.sum() for term in terms)])
    dist.all_reduce(sums)
    count, *term_sums = sums.tolist()
    described = describe(term_sums, count, view_of is not None) if held_out else {}
    rates, samples = answer_rates("eval/", student, tokenizer, held_out, args)
    return {f"eval/{name}": value for name, value in described.items()} | rates, samples


def answer_rates(prefix: str, model, tokenizer, sequences, args) -> tuple[dict, list[dict]]:
    """Share of what sequences ask, before their last trained turn, that a model answers right; samples."""
    questions, metrics, samples = [], {}, []
    for ids, trained in sequences:
        start = int(np.flatnonzero(~trained)[-1]) + 1
        answer = tokenizer.decode(ids[start:], skip_special_tokens=True)
        questions += [Prompt(ids[:start].tolist(), {"answer": answer}, "")] if start > 1 else []
    for name in ("greedy_accuracy", "accuracy") if questions else ():
        temperature = args.temperature if name == "accuracy" else 0.0
        samples = []
        for c in roll_out(model, tokenizer, questions, 1, temperature, (args.seed, 0), args):
            texts, prompt = (c.text, c.prompt.row["answer"]), tokenizer.decode(c.prompt.input_ids)
            finals = {text.rsplit("####", 1)[-1].strip().replace(",", "") for text in texts}
            sample = {"prompt": prompt, "completion": c.text, "answer": texts[1]}
            samples.append(sample | {"right": len(finals) == 1})  # equal behind GSM8K's mark, or whole
        metrics[prefix + name] = float(np.mean([sample["right"] for sample in samples]))
    return metrics, samples


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
Sequence = namedtuple("Sequence", ["input_ids", "trained"])  # token ids and which of them are trained
# What is asked: token ids, the dataset row with its prompt (text or messages), where that stands.
Prompt = namedtuple("Prompt", ["input_ids", "row", "place"])
# An answer as it was sampled: token ids, log-probs under the sampler, text, whether an end token came.
Completion = namedtuple("Completion", ["prompt", "token_ids", "logprobs", "text", "ended"])
FILLER = Sequence(np.zeros(1, np.int32), np.zeros(1, bool))  # for a process that has no row: trains nothing
BLOCK = 64  # prompts whose answers are sampled and kept on disk together
COLUMNS = ("loss", "kl_forward", "kl_reverse", "ce", "token_agreement", "grad_norm")  # on the terminal
FORMATS = "messages; prompt + completion; question + answer; text; ShareGPT's, Alpaca's and HH's"


def say(message: str):
    """Print a line above the progress bar, from the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(message)


def fail(message: str):
    """End the run over a user's mistake: one line and exit code 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def setup_distributed() -> torch.device:
    """Join the processes that torchrun started, or be a group of one; silence libraries -> own device."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # until the Logger takes over
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    device, libc = torch.device("cpu"), ctypes.CDLL(None)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif hasattr(libc, "mallopt"):  # else glibc gives big buffers back and pages them in anew at every step
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer from outside the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2), **alone)  # rollouts are waited for
        atexit.register(lambda: (gc.collect(), dist.is_initialized() and dist.destroy_process_group()))
    return device


def located(name: str) -> str:
    """A path as given, or beside this file: tiny/ is found from any folder; a hub id is left as it is."""
    return name if Path(name).exists() or not (HERE / name).exists() else str(HERE / name)


def choose_output_dir(args) -> Path:
    """The run's folder: made here, by no other run, and removed if nothing is written; or one to resume."""
    name = f"runs/{Path(__file__).stem}_{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    names = [args.output_dir or name]
    dist.broadcast_object_list(names)
    folder = Path(names[0])
    if args.resume:
        if not (folder / "args.json").exists():
            fail(f"--resume: {folder} holds no run; --output-dir says which one should continue")
        before, now = json.loads((folder / "args.json").read_text()), json.loads(as_json(args))
        for flag in (flag for flag in before if before[flag] != now.get(flag) and flag != "resume"):
            stop_or_say = fail if flag in "script model dataset seed weight_decay adam_betas".split() else say
            stop_or_say(f"--resume: {flag} was {before[flag]} and is {now.get(flag)}")
    elif dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            fail(f"--output-dir {folder}: {error.strerror}; name a new one, or --resume the run in it")
        atexit.register(lambda: folder.is_dir() and not any(folder.iterdir()) and folder.rmdir())
    return folder


def as_json(args) -> str:
    """The flags of a run, and whose they are."""
    return json.dumps({"script": Path(__file__).name} | asdict(args), indent=2, default=str)


def load_tokenizer(args):
    """The tokenizer of --model with the chat template of the run; it knows the model's `positions`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(located(args.model))
        config = AutoConfig.from_pretrained(located(args.model)).get_text_config()
    except (OSError, ValueError) as error:
        fail(f"--model {args.model}: {error}".splitlines()[0])
    if tokenizer.eos_token is None:
        fail(f"--model {args.model}: its tokenizer has no end token (EOS), so a completion could not end")
    if args.chat_template:
        tokenizer.chat_template = args.chat_template.read_text(encoding="utf-8")
    if tokenizer.chat_template is None:
        say(f"{args.model} has no chat template: conversations are written in ChatML")
        tokenizer.chat_template = CHATML if not tokenizer("").input_ids else "{{ bos_token }}" + CHATML
    tokenizer.positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    return tokenizer


def load_tokenizers(args) -> tuple:
    """The tokenizers of --model and --teacher: one and the same where every id is the same token in both.

    A student without a chat template takes the teacher's. Only seq_kd, from texts, learns across tokenizers.
    """
    tokenizer = load_tokenizer(args)
    try:
        teacher_tokenizer = AutoTokenizer.from_pretrained(located(args.teacher))
        config = AutoConfig.from_pretrained(located(args.teacher)).get_text_config()
    except (OSError, ValueError) as error:
        fail(f"--teacher {args.teacher}: {error}".splitlines()[0])
    tokenizer.positions = min(tokenizer.positions, getattr(config, "max_position_embeddings", sys.maxsize))
    template = teacher_tokenizer.chat_template
    if tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        if args.mode != "seq_kd":
            fail(f"--teacher {args.teacher} has another vocabulary than --model: use --mode seq_kd")
        teacher_tokenizer.chat_template = template or CHATML
        return tokenizer, teacher_tokenizer
    if template and tokenizer.chat_template.endswith(CHATML):
        say("the chat template is the teacher's")
        tokenizer.chat_template = template
    return tokenizer, tokenizer


def load_rows(source: str, split: str, args, limit: int = 0) -> datasets.Dataset:
    """The first `limit` rows, or all, of a file, a saved dataset or a hub dataset; read as they are taken."""
    builder = path = located(source)
    options = {"name": args.dataset_config, "split": split}
    if kind := re.search(r"\.(csv|json|parquet)l?(\.gz)?$", path):
        builder, options = kind[1], {"data_files": path, "split": "train"}
        options |= {"keep_default_na": False} if builder == "csv" else {}  # an empty cell is an empty text
    try:
        is_saved = Path(path).is_dir()
        rows = datasets.load_from_disk(path) if is_saved else datasets.load_dataset(builder, **options)
        rows = rows[split] if isinstance(rows, dict) else rows
        return rows.select(range(min(limit or len(rows), len(rows))))
    except Exception as error:  # `datasets` raises a dozen kinds; for the user they are one
        cause = error.__cause__ or error
        fail(f"{source} cannot be loaded: {type(cause).__name__}: {str(cause) or 'empty'}".splitlines()[0])


def report_dropped(source: str, num_rows: int, dropped: dict[str, list[int]]):
    """Say why rows of a dataset cannot be used, reason by reason; end the run where they are most of it."""
    lines = [f"{len(rows):,} rows dropped, first row {rows[0]}: {reason}" for reason, rows in dropped.items()]
    if 2 * sum(map(len, dropped.values())) > num_rows or num_rows == 0:
        fail(f"{source}: hardly a row of {num_rows:,} can be used; {'; '.join(lines[:3]) or 'it is empty'}")
    for line in lines[:9]:
        say(f"{source}: {line}")


def load_sequences(tokenizer, source: str | None, split: str, args, limit: int = 0) -> list[Sequence]:
    """A dataset as sequences, each once; says how much there is to train, and how much was dropped."""
    if source is None:
        return []
    rows, found, dropped = load_rows(source, split, args, limit), {}, {}
    for n in tqdm(range(len(rows)), desc=f"tokenize {source}", leave=False, disable=None):
        try:
            encoded = encode(tokenizer, rows[n], args)
            if max(len(ids) for ids, _ in encoded) > args.max_length:
                raise ValueError("longer than --max-length")
            found |= {hashlib.sha256(np.concatenate(one)).digest(): one for one in encoded}
        except Exception as error:  # chat templates raise what they like
            reason = f"{type(error).__name__}: {error}".removeprefix("ValueError: ").partition("\n")[0]
            dropped.setdefault(reason, []).append(n + 1)
    report_dropped(source, len(rows), dropped)
    found = list(found.values())
    sizes = f"{sum(len(ids) for ids, _ in found):,} tokens, {sum(t.sum() for _, t in found):,} trained"
    say(f"{source}: {len(found):,} different sequences, {sizes}")
    return found


def encode(tokenizer, row: dict, args) -> list[Sequence]:
    """A row of any accepted format as sequences, each of which ends with the end token of a reply."""
    bos = tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""
    match common.conversational(row):
        case {"messages": list(messages)}:
            sequences = render(tokenizer, messages, 1, row)
        case {"prompt": list(prompt), "completion": list(completion)}:
            sequences = render(tokenizer, prompt + completion, max(1, len(prompt)), row)
        case {"prompt": str(head), "completion": str(reply)}:
            sequences = [[(bos + head, reply)]] if reply.strip() else []
        case {"text": str(reply)}:
            sequences = [[(bos, reply)]] if reply.strip() else []
        case _:
            columns = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items())
            raise ValueError(f"found {columns}; accepted are {FORMATS}")
    if not sequences:
        raise ValueError("no completion, or an empty one")
    return [tokenize(tokenizer, turns, args.train_on_prompt) for turns in sequences]


def render(tokenizer, messages: list[dict], first: int, row: dict) -> list[list[tuple[str, str]]]:
    """A conversation as sequences of turns: what stands before a reply, and the reply up to its end token.

    Replies before message `first` are prompt. What stands before a reply is what generation sees: the
    conversation so far with a generation prompt. Where a template renders earlier turns anew (Qwen3 drops old
    reasoning), the sequence so far no longer begins it, and a new one does.
    """
    apply, sequences, text = common.template_of(tokenizer, row), [], ""
    for n in (n for n, turn in enumerate(messages) if n >= first and turn["role"] == "assistant"):
        head, body = apply(messages[:n], add_generation_prompt=True), apply(messages[: n + 1])
        content = messages[n].get("content") or ""
        content = "".join(x["text"] for x in content) if isinstance(content, list) else str(content)
        if not body.startswith(head):
            raise ValueError("the chat template renders the prompt anew with a reply")
        if not content.strip() and body == apply([*messages[:n], {"role": "assistant", "content": content}]):
            raise ValueError("an assistant turn is empty, or the chat template does not show its tool calls")
        if head == apply(messages[:n]):  # no generation prompt is known: the role's header is no reply
            head = os.path.commonprefix([body, apply([*messages[:n], messages[n] | {"content": "\0"}])])
        if not sequences or not head.startswith(text):
            sequences.append([])
            text = ""
        reply = body[len(head) :].rstrip()  # without the line break that follows the end token
        sequences[-1].append((head[len(text) :], reply))
        text = head + reply
    return sequences


def tokenize(tokenizer, turns: list[tuple[str, str]], train_on_prompt: bool) -> Sequence:
    """Turns as token ids, of which the replies are trained; heads have the tokens they have in generation."""
    input_ids, trained = [], []
    for head, reply in turns:
        texts = [head, reply, head + reply]
        head_ids, reply_ids, both_ids = tokenizer(texts, add_special_tokens=False).input_ids
        if both_ids[: len(head_ids)] == head_ids:  # no token reaches across the border
            reply_ids = both_ids[len(head_ids) :]  # alone, Llama 2's tokenizer puts a space before it
        input_ids += head_ids + reply_ids
        trained += [train_on_prompt] * len(head_ids) + [True] * len(reply_ids)
    last = tokenizer.added_tokens_decoder.get(input_ids[-1])
    if not (last and last.special):  # a text, or a template without an end token: the last reply gets EOS
        input_ids, trained = [*input_ids, tokenizer.eos_token_id], [*trained, True]
    if input_ids[:2] == [tokenizer.bos_token_id] * 2:
        raise ValueError("begins with two BOS tokens, the chat template's and the data's")
    trained[0] = False  # nothing comes before it to predict it
    return Sequence(np.array(input_ids, np.int32), np.array(trained))


def load_prompts(tokenizer, sources, split: str, args, limit: int = 0) -> list[Prompt]:
    """The prompts of some datasets, or of one, with all columns; unusable rows are dropped and counted."""
    found = []
    for source in np.atleast_1d(sources or ()).tolist():
        rows, prompts, dropped = load_rows(source, split, args, limit), [], {}
        for n in tqdm(range(len(rows)), desc=f"tokenize {source}", leave=False, disable=None):
            try:
                prompts.append(read_prompt(tokenizer, rows[n], f"{source}, row {n + 1}", args))
            except Exception as error:  # chat templates raise what they like
                dropped.setdefault(str(error).partition("\n")[0], []).append(n + 1)
        report_dropped(source, len(rows), dropped)
        say(f"{source}: {len(prompts):,} prompts")
        found += prompts
    columns = dict.fromkeys(name for prompt in found for name in prompt.row)  # None where a dataset lacks one
    return [prompt._replace(row=columns | prompt.row) for prompt in found]


def read_prompt(tokenizer, row: dict, place: str, args) -> Prompt:
    """What a row of any accepted format asks: text, or a conversation up to where an answer begins."""
    match common.conversational(row):
        case {"prompt": str(prompt)} if prompt.strip():
            input_ids = tokenizer(prompt).input_ids
        case {"prompt": [_, *_] as turns} | {"messages": [*turns, {"role": "assistant"}] | [*turns]} if turns:
            prompt, text = turns, common.template_of(tokenizer, row)(turns, add_generation_prompt=True)
            input_ids = tokenizer(text, add_special_tokens=False).input_ids
        case _:
            raise ValueError(f"no prompt in {', '.join(row)}; accepted are prompt, messages, question ...")
    if len(input_ids) > args.max_prompt_length:
        raise ValueError("longer than --max-prompt-length")
    return Prompt(input_ids, row | {"prompt": prompt}, place)


def load_rewards(specs: tuple[str, ...], prompts: list[Prompt], args, device) -> dict:
    """Reward functions by name, of files or of reward models, that take the columns of all `prompts`."""
    found, library = {}, runpy.run_path(str(HERE / "rewards.py"))
    for spec in specs:
        path, _, name = spec.rpartition(":")
        try:
            if path.endswith(".py"):
                function = runpy.run_path(located(path))[name]
            else:
                name, function = "reward_model", library["reward_model"](spec, device, args.dtype)
            function = library["within"](args.reward_timeout, spec, function)
            for asked in prompts:
                inspect.signature(function).bind(**reward_inputs([Completion(asked, [], [], "", True)], args))
        except Exception as error:  # whatever stands in that file
            fail(f"--reward {spec}: {type(error).__name__}: {error}".splitlines()[0])
        found[name if name not in found else f"{name}_{len(found)}"] = function
    return found


def reward_inputs(rollout: list[Completion], args) -> dict:
    """The keywords of reward functions, TRL's: lists of prompts, completions and every column; settings."""
    rows = [completion.prompt.row for completion in rollout]
    said = lambda text, prompt: text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    return {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"} | {
        "prompts": [row["prompt"] for row in rows],
        "completions": [said(c.text, c.prompt.row["prompt"]) for c in rollout],
        "completion_ids": [c.token_ids for c in rollout],
        "truncated": [not c.ended for c in rollout],
        "allow_code_execution": args.allow_code_execution,
        "max_completion_length": args.max_completion_length,
    }


def gather(found: dict) -> dict:
    """What all processes have found, together."""
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, found)
    return dict(item for share in shares for item in share.items())


def my_share(size: int, group_size: int) -> list[int]:
    """Which of `size` completions this process samples and scores: whole groups, one after the other."""
    groups = np.arange(size).reshape(-1, group_size)
    return np.array_split(groups, dist.get_world_size())[dist.get_rank()].flatten().tolist()


@loading.unsharded
def roll_out(policy, tokenizer, prompts, group_size, temperature, seed, args) -> list[Completion]:
    """Sample `group_size` completions of each prompt; `seed` and its place say what one is, nothing else."""
    policy.eval()
    asked = [prompt for prompt in prompts for _ in range(group_size)]  # B
    mine = sorted(my_share(len(asked), group_size), key=lambda i: len(asked[i].input_ids))
    longest = max(len(prompt.input_ids) for prompt in prompts) + args.max_completion_length
    size, end_ids = max(1, args.max_tokens_per_rollout // longest), policy.generation_config.eos_token_id
    uniforms = np.random.default_rng(seed).random((len(asked), args.max_completion_length))  # (B, T)
    sampled = {}
    for chunk in (mine[start : start + size] for start in range(0, len(mine), size)):
        numbers = torch.tensor(uniforms[chunk], device=policy.device)
        decode = getattr(policy, "decode", common.decode)
        answers = decode(policy, [asked[i].input_ids for i in chunk], numbers, end_ids, temperature)
        sampled |= dict(zip(chunk, answers))
    sampled = [answer for _, answer in sorted(gather(sampled).items())]  # B, token ids and log-probs
    texts = tokenizer.batch_decode([ids for ids, _ in sampled], skip_special_tokens=True)
    answers = zip(asked, sampled, texts)
    return [Completion(p, ids, logprobs, text, ids[-1] in end_ids) for p, (ids, logprobs), text in answers]


def end_tokens(tokenizer, model) -> list[int]:
    """Ids that end an answer: those of the model and tokenizer, and what a chat template writes behind it."""
    ends = {tokenizer.eos_token_id, *np.atleast_1d(model.generation_config.eos_token_id or []).tolist()}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("!")[2]
    behind_ids = tokenizer(behind, add_special_tokens=False).input_ids  # Qwen2.5's base: not its EOS
    return sorted(ends | set(behind_ids[:1]) & set(tokenizer.added_tokens_decoder))


def as_sequence(completion: Completion, vocab_size: int, args) -> Sequence:
    """A sampled answer as a sequence; a row that only pads the student's table is no token to learn from."""
    input_ids = np.array(completion.prompt.input_ids + completion.token_ids, np.int32)
    trained = (np.arange(len(input_ids)) >= len(completion.prompt.input_ids)) & (input_ids < vocab_size)
    return Sequence(input_ids, trained & (completion.ended or not args.mask_truncated))


def training_order(size: int, count: int, seed: int) -> np.ndarray:
    """Numbers of the first `count` of `size` items to train on, epoch after epoch, each in its own order."""
    rng, epochs = np.random.default_rng(seed), math.ceil(count / max(1, size))
    return np.concatenate([np.zeros(0, int), *(rng.permutation(size) for _ in range(epochs))])[:count]


def cache_folder(vocab_size: int, args, device) -> Path:
    """The folder in --cache-dir of what --teacher says, named after all that its log-probs depend on."""
    config = Path(cached_file(located(args.teacher), "config.json"))  # a hub model's folder is a commit's
    parts = [vocab_size, args.cache_top_k, args.kd_temperature, args.attn, args.dtype, args.compile]
    parts += [config, device.type, torch.__version__, transformers.__version__]
    parts += [(path.name, path.stat().st_mtime_ns) for path in sorted(config.parent.iterdir())]
    folder = Path(args.cache_dir) / gather({dist.get_rank(): f"teacher_{key_of(*parts)}"})[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--cache-dir {args.cache_dir}: no folder can be made there ({error.strerror})")
    return folder


def key_of(*parts) -> str:
    """A name that tells `parts` from all others; of a sequence its tokens and which of them are trained."""
    parts = [part.tobytes() if isinstance(part, np.ndarray) else part for part in parts]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def missing(paths) -> list[Path]:
    """The paths where nothing is, as the first process sees it."""
    return gather({dist.get_rank(): [path for path in paths if not path.exists()]})[0]


def write_whole(path: Path, content: bytes):
    """Write a file, whole or not at all, whoever else writes it."""
    unfinished = path.with_suffix(f".partial_{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.rename(path)


@torch.no_grad()
def live_view(get_teacher, vocab_size: int, batch, members):
    """A row -> a function of a slice of its trained tokens: what the teacher says of them."""
    teacher = get_teacher()
    states = loading.fsdp_forward(common.completion_states, keep=True)(teacher, batch)  # (C, H_t)
    head = first_tokens(common.head_settings(teacher), vocab_size)
    return lambda c, targets, temperature: live_terms(states[c], head, targets, temperature)


def cached_view(folder: Path, k: int, vocab_size: int, batch, members):
    """`live_view` from the cache of the k likeliest tokens, filled at the same temperature."""
    sizes = k + (k < vocab_size), 1, k  # log-probs of k tokens and of the rest, the token's own, ids of the k
    found = b"".join((folder / key_of(*sequence)).read_bytes() for sequence in members)
    found = torch.tensor(np.frombuffer(found, np.int32).reshape(-1, sum(sizes)))  # (C, 2k + 2)
    logprobs, target_logprobs, ids = found.to(batch.input_ids.device).split(sizes, 1)
    terms = logprobs.view(torch.float32), target_logprobs.view(torch.float32)[:, 0], ids.long()
    return lambda c, targets, temperature: TeacherTerms(*(x[c] for x in terms))


@torch.no_grad()
def fill_cache(get_teacher, sequences: list[Sequence], vocab_size: int, folder: Path, args, device):
    """Ask the teacher about the sequences that its cache lacks; each counts once its file is there."""
    by_path = {folder / key_of(*sequence): sequence for sequence in sequences}
    asked, k, world_size = missing(by_path), min(args.cache_top_k, vocab_size), dist.get_world_size()
    say(f"{folder}: {8 * k + 8:,} bytes a token; it lacks {len(asked):,} of {len(by_path):,} sequences")
    lengths = [len(by_path[path].input_ids) for path in asked]
    rows = common.pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size) if asked else []
    for row in tqdm(rows[dist.get_rank() :: world_size], desc="teacher", leave=False, disable=None):
        members, lines = [by_path[asked[i]] for i in row], []
        batch = common.collate(members or [FILLER], device)
        targets = batch.input_ids[0, batch.completion_index]  # (C,)
        said_of = live_view(get_teacher, vocab_size, batch, members)
        for c in (slice(n, n + 256) for n in range(0, len(targets), 256)):
            logprobs, target_logprobs, _ = said_of(c, targets[c], args.kd_temperature)
            ids = logprobs.topk(k).indices  # (c, k)
            floats = torch.cat([bucketed(logprobs, ids), target_logprobs[:, None]], 1)  # (c, k + 2)
            lines.append(torch.cat([floats.view(torch.int32), ids.int()], 1).cpu())  # (c, 2k + 2)
        ends = np.cumsum([trained.sum() for _, trained in members])
        for i, part in zip(row, np.split(torch.cat(lines).numpy(), ends[:-1]) if row else ()):
            write_whole(asked[i], part.tobytes())
    dist.barrier()


def teacher_answers(get_teacher, tokenizer, prompts, folder: Path, output_dir: Path, args, device) -> str:
    """The dataset that seq_kd learns from: what rewards like of --answers-per-prompt samples of the teacher.

    It is answers.jsonl of the run, with which --resume goes on. Asked are, in whole blocks that are kept in
    the cache, no more prompts than --max-steps have sequences.
    """
    answers_path = output_dir / "answers.jsonl"
    if args.resume and not missing([answers_path]):
        return str(answers_path)
    rewarders = load_rewards(args.reward, prompts[:1], args, device)
    count = args.answers_per_prompt if args.temperature else 1  # greedy answers are all the same
    prompts = prompts[: math.ceil(args.max_steps * args.batch_size / BLOCK) * BLOCK or None]
    blocks = [prompts[n : n + BLOCK] for n in range(0, len(prompts), BLOCK)]
    flags, answers, means = (args.temperature, args.max_completion_length, count, args.seed), [], {}
    paths = [folder / key_of(*flags, n, [x.input_ids for x in block]) for n, block in enumerate(blocks)]
    asked = missing(paths)
    for n, path in enumerate(tqdm(paths, desc="teacher", leave=False, disable=None)):
        if path in asked:
            flags = count, args.temperature, (args.seed, n), args
            rollout = roll_out(get_teacher(), tokenizer, blocks[n], *flags)
            write_whole(path, json.dumps([[c.token_ids, c.ended] for c in rollout]).encode())
        for i, (ids, ended) in enumerate(json.loads(path.read_bytes())):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if ended and text.strip():
                answers.append(Completion(blocks[n][i // count], ids, None, text, ended))
    mine = my_share(len(answers), 1) if rewarders else []
    try:
        inputs = reward_inputs([answers[i] for i in mine], args) if mine else {}
        scores = [rewarder(**inputs) for rewarder in rewarders.values()] if mine else []  # F times B
        for i, values in zip(mine, zip(*scores, strict=True), strict=True):
            known = [float(value) for value in values if value is not None]
            means[i] = np.mean(known) if known else -math.inf  # where no reward says anything
    except Exception as error:  # whatever a user's function raises
        fail(f"--reward: {type(error).__name__}: {error}".splitlines()[0])
    means = gather(means)
    kept = [answer for i, answer in enumerate(answers) if means.get(i, math.inf) > args.reward_threshold]
    say(f"{count * len(prompts):,} answers: {len(answers):,} with an end, {len(kept):,} that rewards like")
    if not kept:
        fail("no answer is left to learn from")
    if dist.get_rank() == 0:
        others = ("text", "messages", "conversations", "instruction")  # would be read in place of these two
        rows = [c.prompt.row | {"completion": c.text} for c in kept]
        rows = [{name: x for name, x in row.items() if name not in others} for row in rows]
        write_whole(answers_path, "".join(json.dumps(row, default=str) + "\n" for row in rows).encode())
    dist.barrier()
    return str(answers_path)


def load_model(name, args, device, frozen=False, kind=AutoModelForCausalLM, check=check_packed):
    """A model without dropout that passed `check`: float32, or frozen in --dtype; FSDP2 shards and casts."""
    compute, trained = getattr(torch, args.dtype), not frozen
    dtype = torch.float32 if trained and not args.lora_rank else compute

    def load():
        model = kind.from_pretrained(located(name), dtype=dtype, attn_implementation=args.attn)
        model.requires_grad_(trained)
        return loading.add_lora(model, args) if args.lora_rank and trained else model

    shards = dist.get_world_size() > 1 or (trained and compute != torch.float32)
    try:
        loading.check_packages(args)
        model = loading.sharded(load, compute, device) if shards else load().to(device)
        model.compute_dtype = compute
        for module in model.modules():
            for rate in ("p", "dropout", "attention_dropout", "resid_dropout"):
                if isinstance(getattr(module, rate, None), float):
                    setattr(module, rate, 0.0)
        check(model)
        model.stored_dtype = AutoConfig.from_pretrained(located(name)).dtype or torch.float32
    except loading.UNREADABLE as error:
        fail(f"{name}: {error}".splitlines()[0])
    if shards:
        model.reshard()  # FSDP2 leaves a root whole behind its pass
    if args.gradient_checkpointing and trained:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in loading.layers_of(model) if args.compile else ():
        layer.compile()
    size = f"{model.num_parameters():,} parameters"
    say(f"{name}: {model.config.model_type}, {size}, {device.type}, {args.attn} attention")
    return model


def save_checkpoint(output_dir: Path, model, optimizer, progress: dict):
    """Write what a continued run needs, `progress` as JSON, beside the older ones; keep the last two."""
    folder = output_dir / "checkpoints"
    weights, moments = dcp_state.get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "progress": json.dumps(progress)}
    dcp.save(state, checkpoint_id=folder / "partial")
    if dist.get_rank() == 0:
        finished = folder / f"step_{progress['step']:08d}"
        shutil.rmtree(finished, ignore_errors=True)  # one that was damaged
        (folder / "partial").rename(finished)  # from here on it counts
        for old in sorted(folder.glob("step_*"))[:-2]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(output_dir: Path, model, optimizer) -> dict:
    """Restore the last checkpoint that can be read -> its progress; {} where there is none yet."""
    found = sorted((output_dir / "checkpoints").glob("step_*"), reverse=True)
    for folder in found:
        weights, moments = dcp_state.get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "progress": ""}
        try:
            dcp.load(state, checkpoint_id=folder)
        except (dcp.api.CheckpointException, OSError) as error:
            say(f"{folder} is damaged, trying the one before: {str(error).splitlines()[-1]}")
            continue
        dcp_state.set_model_state_dict(model, state["model"])
        dcp_state.set_optimizer_state_dict(model, optimizer, state["optimizer"])
        say(f"continuing from {folder}")
        return json.loads(state["progress"])
    if found or (output_dir / "model").exists():
        fail(f"{output_dir}: no checkpoint that can be read, or one of other flags")
    return {}


def save_model(folder: Path, model, tokenizer):
    """Write the model and its tokenizer as transformers, vLLM and TRL load them."""
    twin, weights = loading.whole(model)
    if dist.get_rank() == 0:
        unfinished = folder.with_name(f"{folder.name}.partial")
        twin.save_pretrained(unfinished, state_dict=weights)
        tokenizer.save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was continued beyond its end
        unfinished.rename(folder)
    dist.barrier()


class Logger:
    """The files of a run, the progress bar, a line per interval, wandb; takes the signals to stop."""

    def __init__(self, args, folder: Path, total_steps: int, step: int):
        self.args, self.folder, self.first_step, self.started = args, folder, step, time.perf_counter()
        self.stopping, self.is_first = False, dist.get_rank() == 0
        if args.resume and step >= total_steps and (folder / "model").exists():
            fail(f"{folder} is finished: step {step} of {total_steps}; a larger --max-steps goes on")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        if not self.is_first:
            return
        (folder / "args.json").write_text(as_json(args))
        for path in (Path(__file__), HERE / "common.py", HERE / "loading.py"):
            shutil.copy(path, folder)
        for path in (folder / "metrics.jsonl", folder / "samples.jsonl"):
            path.touch()  # of a run that continues: what followed its checkpoint goes
            lines = [x for x in path.open() if x.endswith("}\n") and json.loads(x)["step"] <= step > 0]
            path.with_suffix(".partial").write_text("".join(lines))
            path.with_suffix(".partial").rename(path)
        say(f"run: {folder}, {total_steps:,} steps")
        self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, disable=None)
        if args.wandb:
            import wandb

            self.wandb = wandb.init(project="cleanpost", name=folder.name, dir=folder, config=asdict(args))

    def stop(self, *_):
        """Take a signal: the loop saves and ends after its step; a second Ctrl-C does not wait for it."""
        self.stopping = True
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

    def log(self, metrics: dict, samples: list[dict]):
        if not self.is_first:
            return
        if torch.cuda.is_available():
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        metrics = {key: value for key, value in metrics.items() if value == value}  # NaN: nothing is known
        step, total = metrics["step"], self.bar.total
        for name, lines in (("metrics", [metrics]), ("samples", [{"step": step} | s for s in samples])):
            with open(self.folder / f"{name}.jsonl", "a") as file:
                file.writelines(json.dumps({k: v for k, v in x.items() if v == v}) + "\n" for x in lines)
        if self.args.wandb:
            self.wandb.log(metrics, step=step)
        self.bar.update(step - self.bar.n)
        if step and (step % self.args.log_every == 0 or step == total):
            left = (time.perf_counter() - self.started) / (step - self.first_step) * (total - step)
            columns = "  ".join(f"{name} {metrics[name]:<6.4g}" for name in COLUMNS if name in metrics)
            say(f"step {step:>{len(str(total))}}/{total}  {columns}  left {tqdm.format_interval(left)}")
        evaluated = [f"{k} {v:.4g}" for k, v in metrics.items() if k.startswith("eval/")]
        for start in range(0, len(evaluated), 3):
            say(f"  step {step}:  {'  '.join(evaluated[start : start + 3])}")
        for sample in samples[:2]:
            say(f"    ...{sample['prompt'][-50:]!r} -> {sample['completion'][:50]!r}")

    def close(self, message: str):
        """Draw curves.png, one panel a metric; say how what was evaluated has moved from first to last."""
        if not self.is_first:
            return
        self.bar.close()
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").open()]
        evaluated = [name for line in lines for name in line if name.startswith("eval/")]
        names = list(dict.fromkeys([*COLUMNS, *evaluated]))
        figure = Figure((14, 2.5 * math.ceil(len(names) / 4)), layout="constrained")
        for n, name in enumerate(names, 1):
            known = [(line["step"], line[name]) for line in lines if name in line]
            figure.add_subplot(math.ceil(len(names) / 4), 4, n, title=name).plot(*zip(*known))
            if name.startswith("eval/"):
                say(f"  {name:<32} {known[0][1]:.4g} -> {known[-1][1]:.4g}")
        figure.savefig(self.folder / "curves.png")
        say(message)
        if self.args.wandb:
            self.wandb.finish()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except BaseException as error:  # CheckpointException is no Exception
        if not re.search("No space left|unexpected pos", str(error)):  # the latter is PyTorch's word for it
            raise
        fail(f"no space left on the device; what was saved before is whole ({type(error).__name__})")
