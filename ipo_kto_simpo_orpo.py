"""IPO, KTO, SimPO and ORPO: four answers to what DPO gets wrong, one pure function each and one loop.

    ipo    (h - 1 / (2 tau))^2, h = log pi/ref (y_w) - log pi/ref (y_l)            Eq. 17, arXiv:2310.12036
    kto    lambda_y - v(x, y), v = lambda_D sigma(beta (r - z0)), r = log pi/ref   Eq. 7, arXiv:2402.01306
                            or lambda_U sigma(beta (z0 - r)) for an undesirable y
    simpo  -log sigma(beta (mean log pi(y_w) - mean log pi(y_l)) - gamma)          Eq. 6, arXiv:2405.14734
    orpo   NLL(y_w) - lambda log sigma(log odds(y_w) / odds(y_l))                  Eq. 6, arXiv:2403.07691

IPO ends at a margin instead of at infinity; KTO needs no pairs, only answers that are good or bad; SimPO and
ORPO need no reference: SimPO compares what generation maximizes, ORPO is supervised fine-tuning with a
penalty on the rejected answer. tau and lambda are `--beta`, gamma / beta is `--gamma-beta-ratio`. The loop:

    0. Reference  log-probs of all answers under the reference, once; then it leaves the memory (ipo, kto)
    1. Batch      take the next `--batch-size` pairs, or single answers, and pack them into rows
    2. KL         kto: z0, the mean of log pi/ref of mismatched answers over the whole optimizer batch
    3. Log-probs  sum, or average, them over each answer
    4. Loss       one number a pair (kto: an answer); their mean over the whole optimizer batch
    5. Update     clip the gradient, learning-rate schedule, AdamW
    6. Evaluate   accuracy on held-out pairs, sampled answers; log; save

Deviations from the papers, each with its reason:
    1. KTO's mismatched answers are drawn from the whole training set, once, by the seed; the paper draws them
       from the batch: the reference then knows them from its one pass.
    2. ORPO's NLL is that of the answer, as Eq. 6 has it; its authors' code adds the prompt's.
    3. AdamW with the schedule of sft.py throughout; the papers use RMSprop, Adam and AdamW.

    python ipo_kto_simpo_orpo.py --algorithm kto                # CPU, offline, 1 minute on one core
    python ipo_kto_simpo_orpo.py --algorithm simpo --model Qwen/Qwen2.5-1.5B-Instruct --beta 2 \
        --dataset trl-lib/ultrafeedback_binarized --learning-rate 1e-6 --batch-size 128 --max-length 2048 \
        --max-tokens-per-micro-batch 8192

Shapes: N tokens in a row, B pairs or single answers, K answers of each (2 or 1), C trained tokens.
"""

import atexit
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
from collections import namedtuple
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal

import datasets
import numpy as np
import pydantic
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import torch.nn.functional as F
import transformers
import tyro
from matplotlib.figure import Figure
from pydantic import Field, FilePath, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import common
import loading
from common import CHATML, check_packed, segment_sum, token_logprobs

HERE = Path(__file__).resolve().parent
Decay = Annotated[float, Field(ge=0, lt=1)]
REFERENCE_FREE = ("simpo", "orpo")
BETAS = {"ipo": 0.1, "kto": 0.5, "simpo": 2.0, "orpo": 0.5}


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@pydantic.dataclasses.dataclass
class Args:
    # Model
    model: str = "tiny/sft"  # model to train: a hub id or a folder
    ref_model: str | None = None  # reference model; by default --model as it is before training
    chat_template: FilePath | None = None  # Jinja chat template to use instead of the tokenizer's own
    attn: str = "packed"  # packed, or flash_attention_2 where it is installed, or eager (exact, slow)
    dtype: loading.Dtype = "bfloat16" if torch.cuda.is_available() else "float32"  # compute precision
    gradient_checkpointing: bool = False  # recompute activations: about 30 % slower, far less memory
    compile: bool = False  # compile each layer with torch.compile
    lora_rank: NonNegativeInt = 0  # train a LoRA of this rank and leave the model as it is; 0: no LoRA
    lora_alpha: PositiveFloat = 32.0  # what a LoRA adds is multiplied by alpha / rank
    lora_target: str = "all-linear"  # layers with a LoRA: all but the head, or a regular expression of names

    # Data
    dataset: tuple[str, ...] = ()  # hub ids, files, saved datasets
    dataset_config: str | None = None  # configuration name of the hub dataset ("main" for openai/gsm8k)
    dataset_split: str = "train"  # split of the hub dataset to train on
    eval_dataset: str | None = None  # held-out dataset; by default tiny/'s if tiny/ is trained on, else none
    eval_split: str = "test"  # split of the hub dataset to evaluate on
    max_length: PositiveInt = 1024  # longest sequence in tokens; longer ones are dropped and counted

    # Loss
    algorithm: Literal["ipo", "kto", "simpo", "orpo"] = "ipo"  # simpo and orpo load no reference
    beta: PositiveFloat | None = None  # IPO's tau, KTO's and SimPO's beta, ORPO's lambda; 0.1, 0.5, 2, 0.5
    ipo_length_average: bool = False  # IPO on log-ratios averaged over an answer's tokens, as TRL has it
    desirable_weight: PositiveFloat = 1.0  # KTO's lambda_D, the weight of desirable answers (TRL: 1)
    undesirable_weight: PositiveFloat = 1.0  # KTO's lambda_U (TRL: 1); Eq. 8: good to bad, weighted, 1 to 4/3
    gamma_beta_ratio: float = 0.5  # SimPO's target margin gamma as a share of beta (SimPO: 0.3 to 1.0)
    sft_coef: NonNegativeFloat = 0.0  # weight of the chosen answers' NLL a token (RPO, arXiv:2404.19733: 1)

    # Optimization
    optimizer: loading.Optimizer = "adamw"  # adamw8bit: its moments in 8 bits, a quarter of their memory
    learning_rate: NonNegativeFloat = 1e-4  # peak, for tiny/; models of billions need 1e-5 (SFT) to 1e-6
    lr_schedule: Literal["linear", "cosine", "constant"] = "cosine"  # after warm-up; the first two end at 0
    warmup_steps: NonNegativeInt = 10  # steps over which the learning rate rises linearly from 0
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay rates of AdamW's two moments
    weight_decay: NonNegativeFloat = 0.0  # AdamW's decoupled weight decay, on matrices only
    max_grad_norm: PositiveFloat = 1.0  # larger gradients are scaled down to this norm; inf: no clipping
    batch_size: PositiveInt = 32  # sequences, pairs or completions per step, over all processes
    max_tokens_per_micro_batch: PositiveInt = 8192  # tokens of a packed row: memory only, never the result
    num_epochs: PositiveFloat = 1.0  # passes over the training set or the prompts, if --max-steps is 0
    max_steps: NonNegativeInt = 0  # steps, or rollouts; 0 derives them from --num-epochs

    # Evaluation and output
    eval_every: NonNegativeInt = 50  # steps between evaluations; 0 evaluates only before and after
    num_eval: NonNegativeInt = 256  # rows of the evaluation sets that are used; 0 uses all
    max_completion_length: NonNegativeInt = 128  # longest sampled answer in tokens; 0 samples none
    temperature: NonNegativeFloat = 1.0  # sampling temperature; 0 is greedy
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
        kto = self.algorithm == "kto"
        if not self.dataset:
            self.dataset = ("tiny/data/unpaired_train.jsonl" if kto else "tiny/data/preference_train.jsonl",)
            self.eval_dataset = self.eval_dataset or "tiny/data/preference_eval.jsonl"
        self.beta = self.beta or BETAS[self.algorithm]
        no_reader = {"ref_model": "simpo orpo", "sft_coef": "orpo", "ipo_length_average": "kto simpo orpo"}
        for flag, algorithms in no_reader.items():
            if getattr(self, flag) and self.algorithm in algorithms.split():
                fail(f"--{flag.replace('_', '-')} means nothing to --algorithm {self.algorithm}")
        if "tiny/" not in self.model and self.learning_rate == Args.learning_rate:
            say(f"--learning-rate {self.learning_rate} suits tiny/; models of billions take 1e-6")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def ipo_loss(chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float) -> torch.Tensor:
    """IPO of each pair, (B,) from log pi/ref, summed over the tokens, of both of its answers, (B,) in nats.

    Eq. 17 of arXiv:2310.12036, (h - 1 / (2 beta))^2: h is the difference of the two log-ratios, and beta the
    paper's tau. Where DPO's loss falls for ever, this one has its minimum at a margin of 1 / (2 beta).
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def kto_loss(log_ratio, labels, kl, *, beta: float, desirable_weight: float, undesirable_weight: float):
    """KTO of each answer, (B,), from log pi/ref, summed over its tokens, and labels, 1 if good, (B,) each.

    Eq. 7 of arXiv:2402.01306: gains and losses are felt against a reference point z0, and both level off. It
    is the KL of policy and reference, of which `kl`, a scalar, is an estimate; no gradient goes through it.
    """
    reference_point = kl.detach().clamp(min=0)  # scalar; a KL is not negative
    desirable = desirable_weight * (1 - torch.sigmoid(beta * (log_ratio - reference_point)))  # (B,)
    undesirable = undesirable_weight * (1 - torch.sigmoid(beta * (reference_point - log_ratio)))  # (B,)
    return torch.where(labels.bool(), desirable, undesirable)


def simpo_loss(avg_chosen_logps, avg_rejected_logps, *, beta: float, gamma_beta_ratio: float) -> torch.Tensor:
    """SimPO of each pair, (B,) from log-probs averaged over each answer's tokens (B,).

    Eq. 6 of arXiv:2405.14734: the margin beta x difference must exceed gamma = beta x gamma_beta_ratio.
    """
    return -F.logsigmoid(beta * (avg_chosen_logps - avg_rejected_logps - gamma_beta_ratio))


def orpo_loss(avg_chosen_logps, avg_rejected_logps, *, beta: float) -> torch.Tensor:
    """ORPO's odds-ratio term of each pair, (B,), from log-probs averaged over each answer's tokens (B,).

    Eq. 7 of arXiv:2403.07691: -lambda log sigma(log odds(y_w) - log odds(y_l)), with lambda = beta and
    log odds = log p - log(1 - p). The objective adds the NLL of the chosen answer (Eq. 6).
    """
    sure = -1e-6  # a log-prob above it counts as this: log(1 - p) would have no digits, and no end
    both = (avg_chosen_logps, avg_rejected_logps)
    log_odds = [logp - torch.log(-torch.expm1(logp.clamp(max=sure))) for logp in both]  # (B,) each
    return -beta * F.logsigmoid(log_odds[0] - log_odds[1])


def preferred(margins: torch.Tensor, tie: float = 1e-4) -> torch.Tensor:
    """1 where the chosen answer has the higher reward, 1/2 in a tie, 0 else: margins (B,) -> (B,).

    Rewards closer than `tie` are equal: in another row a float32 reward differs by 1e-6.
    """
    return (1 + margins.sign() * (margins.abs() > tie)) / 2


def lr_factor(step: int, total_steps: int, warmup_steps: int, lr_schedule: str) -> float:
    """The learning rate of the 1-based `step` as a share of its peak: linear warm-up, then down towards 0."""
    if step <= warmup_steps:
        return step / warmup_steps
    done = (step - warmup_steps - 1) / max(1, total_steps - warmup_steps)  # in [0, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[lr_schedule]


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------
def main(args: Args) -> dict:
    """Train as `args` says and return the last metrics."""
    device, world_size = setup_distributed(), dist.get_world_size()
    output_dir, tokenizer = choose_output_dir(args), load_tokenizer(args)
    if args.ref_model and load_tokenizer(replace(args, model=args.ref_model)).vocab != tokenizer.vocab:
        fail(f"--ref-model {args.ref_model} has another vocabulary than --model {args.model}")
    if args.max_length + args.max_completion_length > tokenizer.positions:
        fail(f"--max-length and --max-completion-length exceed the model's {tokenizer.positions} positions")
    kto, with_reference = args.algorithm == "kto", args.algorithm not in REFERENCE_FREE
    examples = [x for name in args.dataset for x in load_labelled(tokenizer, name, args.dataset_split, args)]
    held_out = load_labelled(tokenizer, args.eval_dataset, args.eval_split, args, args.num_eval)
    if kto:  # trains on single answers: pairs are taken apart
        examples = [((y,), (good,)) for answers, labels in examples for y, good in zip(answers, labels)]
        counts = [sum(labels == (good,) for _, labels in examples) for good in (1, 0)]
        if not all(counts):
            fail(f"KTO needs both labels: {counts[0]:,} answers are desirable, {counts[1]:,} are not")
    answers, labels = zip(*examples)
    special = {int(some[0].input_ids[-1]) for some in answers} & set(tokenizer.added_tokens_decoder)
    end_ids = sorted(special | {tokenizer.eos_token_id})  # of answers
    steps_per_epoch = len(answers) / args.batch_size
    total_steps = args.max_steps or max(1, math.ceil(args.num_epochs * steps_per_epoch))
    rng, num_epochs = np.random.default_rng(args.seed), math.ceil(total_steps / steps_per_epoch)
    stream = np.concatenate([rng.permutation(len(answers)) for _ in range(num_epochs)])
    used, stream = np.unique(stream[: total_steps * args.batch_size], return_inverse=True)
    mismatched = mismatch(answers, used, args) if kto else []
    answers, labels = [answers[i] for i in used], np.array(labels)[used]  # only those that a step meets
    lengths = np.array([row_length(some, args) for some in answers])  # (P,)
    counts = count_tokens(answers)  # (P, K)
    all_labels, all_counts = (torch.from_numpy(x).to(device) for x in (labels, counts))  # (P, K) each
    ids, trained = answers[stream[0]][0]
    say(f"first answer:\n{tokenizer.decode(ids)}\ntrained of it:\n{tokenizer.decode(ids[trained])}")

    policy = load_model(args.model, args, device)
    policy.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id)
    optimizer = loading.adamw(args, policy)

    # 0. Reference: log-probs (P, K) under it, which in time are those before training
    ref_logps, held_out_logps = torch.zeros(labels.shape, device=device), None  # where there is none
    if with_reference:
        ref_policy = load_model(args.ref_model, args, device, frozen=True) if args.ref_model else policy
        read = (answers, [some for some, _ in held_out], mismatched)
        ref_logps, held_out_logps, mismatched_logps = (pair_logps(ref_policy, x, args, device) for x in read)
        del ref_policy
        gc.collect()  # FSDP's modules refer to each other
    step = load_checkpoint(output_dir, policy, optimizer).get("step", 0) if args.resume else 0
    logger = Logger(args, output_dir, total_steps, step)
    metrics, kl = {}, torch.zeros((), device=device)
    evaluation = partial(evaluate_labelled, policy, tokenizer, held_out, held_out_logps, args, device)
    if step == 0:
        evaluated, samples = evaluation()
        logger.log({"step": 0} | evaluated, samples)
    while step < total_steps:
        # 1. Batch: the answers of this optimizer step, packed into rows that are dealt to the processes
        step, started = step + 1, time.perf_counter()
        picks = stream[(step - 1) * args.batch_size : step * args.batch_size]
        rows = common.pack(lengths[picks], args.max_tokens_per_micro_batch, multiple_of=world_size)
        num_tokens, good_tokens = int(lengths[picks].sum()), max(1, int((counts * labels)[picks].sum()))

        # 2. KL of policy and reference over the whole optimizer batch and all processes, before any gradient
        if kto:
            logps = pair_logps(policy, [mismatched[i] for i in picks], args, device)  # (B, 1)
            kl = (logps - mismatched_logps[picks]).mean()  # scalar

        policy.train()
        sums = torch.zeros(11, device=device)  # processes told to stop, loss, accuracy, and 4 of each label
        for row in rows[dist.get_rank() :: world_size]:
            # 3. Log-probs, summed over each answer: (B, 2), chosen and rejected, or (B, 1)
            batch = collate_pairs([answers[i] for i in picks[row]], args, device)
            ids = torch.from_numpy(picks[row]).to(device, non_blocking=True)  # (B,)
            logps = pair_sums(token_logprobs(policy, batch), batch, labels.shape[1])[: len(ids)]  # (B, K)
            row_labels, row_counts = all_labels[ids], all_counts[ids]  # (B, K) each

            # 4. Loss: each row adds its part of the mean over the whole optimizer batch
            scores = compared(logps, ref_logps[ids], row_counts, args)  # (B, K)
            losses = losses_of(scores, row_labels, kl, args)  # (B,)
            nll = -(logps * row_labels).sum() / good_tokens
            loss = losses.sum() / len(picks) + (1 if args.algorithm == "orpo" else args.sft_coef) * nll
            (loss * world_size).backward()  # FSDP2 averages over processes what is to be summed
            with torch.no_grad():
                rewards = args.beta * scores  # (B, K)
                signs = row_labels * 2 - 1  # 1 for what is to be raised, -1 for what is to be lowered
                margins = (signs * (rewards - args.beta * kl.clamp(min=0))).sum(1)  # (B,)
                values = [torch.ones_like(logps), rewards, logps, logps - ref_logps[ids]]  # (B, K) each
                sides = [(torch.stack(values) * y).sum((1, 2)) for y in (row_labels, 1 - row_labels)]  # (4,)
                sums[1:] += torch.cat([loss[None], preferred(margins).sum()[None], *sides])

        # 5. Update
        for group in optimizer.param_groups:
            factor = lr_factor(step, total_steps, args.warmup_steps, args.lr_schedule)
            group["lr"] = args.learning_rate * factor
        sums[0] = logger.stopping
        dist.all_reduce(sums)
        stopping, loss, right = sums[:3].tolist()
        chosen, rejected = sums[3:].view(2, 4)  # sums: number, rewards, log-probs, drift
        chosen, rejected = ((side / side[0]).tolist() for side in (chosen, rejected))  # NaN where it has none
        grad_norm = loading.clip_grad_norm(policy, args.max_grad_norm)
        if not math.isfinite(loss + grad_norm):
            fail(f"step {step}: loss {loss}, gradient norm {grad_norm}; --resume goes back to a checkpoint")
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started

        # 6. Evaluate, log, save
        metrics = {
            "step": step,
            "epoch": step / steps_per_epoch,
            "loss": loss,
            "learning_rate": group["lr"],
            "grad_norm": grad_norm,
            "rewards/chosen": chosen[1],
            "rewards/rejected": rejected[1],
            "rewards/accuracies": right / len(picks),
            "rewards/margins": chosen[1] - rejected[1],
            "logps/chosen": chosen[2],
            "logps/rejected": rejected[2],
            "logps/chosen_drift": chosen[3] if with_reference else math.nan,
            "kl": kl.item() if kto else math.nan,
            "num_tokens": int(lengths[stream[: step * args.batch_size]].sum()),
            "tokens_per_second": num_tokens / seconds,
            "step_time": seconds,
            "packing/fill": num_tokens / (len(rows) * args.max_tokens_per_micro_batch),
        }
        last, samples = step == total_steps, []
        if last or (args.eval_every and step % args.eval_every == 0):
            evaluated, samples = evaluation()
            metrics |= evaluated
        logger.log(metrics, samples)
        if stopping or (args.save_every and (last or step % args.save_every == 0)):
            save_checkpoint(output_dir, policy, optimizer, {"step": step})
        if stopping and not last:
            logger.close(f"stopped; continue with --resume --output-dir {output_dir}")
            return metrics
    save_model(output_dir / "model", policy, tokenizer)
    logger.close(f"model saved to {output_dir / 'model'}")
    return metrics


def compared(logps, ref_logps, counts, args) -> torch.Tensor:
    """What --algorithm compares, (B, K): log-ratios to the reference, or averages over the counted tokens."""
    if args.algorithm in REFERENCE_FREE:
        return logps / counts
    return (logps - ref_logps) / (counts if args.ipo_length_average else 1)


def losses_of(scores, labels, kl, args) -> torch.Tensor:
    """The loss of --algorithm for each pair or answer, (B,), of what is `compared` and labels, (B, K)."""
    if args.algorithm == "kto":
        weights = {"desirable_weight": args.desirable_weight, "undesirable_weight": args.undesirable_weight}
        return kto_loss(scores[:, 0], labels[:, 0], kl, beta=args.beta, **weights)
    if args.algorithm == "simpo":
        return simpo_loss(*scores.T, beta=args.beta, gamma_beta_ratio=args.gamma_beta_ratio)
    return {"ipo": ipo_loss, "orpo": orpo_loss}[args.algorithm](*scores.T, beta=args.beta)


def evaluate_labelled(policy, tokenizer, held_out, ref_logps, args, device) -> tuple[dict, list]:
    """Accuracy on held-out pairs, or of good above bad answers; right sampled answers and their length."""
    if not held_out:
        return {}, []
    answers, good = zip(*held_out)
    good = torch.tensor(good, device=device).bool()  # (P, K)
    counts = torch.from_numpy(count_tokens(answers)).to(device)  # (P, K)
    logps = pair_logps(policy, answers, args, device)  # (P, K)
    rewards = args.beta * compared(logps, ref_logps, counts, args)  # (P, K)
    chosen, rejected, is_pairs = rewards[good], rewards[~good], good.shape[1] == 2
    margins = chosen - rejected if is_pairs else (chosen[:, None] - rejected).flatten()  # of every couple
    metrics = {"eval/accuracy": preferred(margins).mean().item(), "eval/margin": margins.mean().item()}
    if is_pairs:
        alike = counts.diff().abs().squeeze(1) <= 0.1 * counts.amax(1)  # (P,) by 10 % of the longer one
        metrics["eval/accuracy_length_matched"] = preferred(margins)[alike].mean().item()  # NaN without any
    if ref_logps is not None:
        metrics["eval/chosen_log_ratio"] = (logps - ref_logps)[good].mean().item()
    asked = [some[0] for some, labels in held_out if labels[0]]
    samples = sample_answers(policy, tokenizer, asked, args, device) if args.max_completion_length else []
    if samples:
        lengths = [len(tokenizer(s["completion"], add_special_tokens=False).input_ids) for s in samples]
        right = [sample["right"] for sample in samples]
        metrics |= {"eval/reward": float(np.mean(right)), "eval/mean_length": float(np.mean(lengths))}
    return metrics, samples


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
Sequence = namedtuple("Sequence", ["input_ids", "trained"])  # token ids and which of them are trained
Pair = namedtuple("Pair", ["chosen", "rejected"])  # two answers, sequences that begin with the same prompt
FILLER = Sequence(np.zeros(1, np.int32), np.zeros(1, bool))  # for a process that has no row: trains nothing
COLUMNS = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen_drift", "grad_norm")
PAIR_FORMATS = "prompt + chosen + rejected; question + chosen + rejected; chosen + rejected; HH's"
ANSWER_FORMATS = "prompt + completion + label (true or false)"


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


def len_shared(one, other) -> int:
    """How many items two texts, lists of messages or token ids have in common from their beginning on."""
    return sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(one, other)))


def read_pair(row: dict) -> dict:
    """A row of any accepted format with `prompt`, `chosen` and `rejected`, all texts or all messages.

    Without a prompt it is what both answers begin with: whole messages, or whole words of texts.
    """
    row = common.conversational(row)
    if not {"chosen", "rejected"} <= row.keys():
        columns = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items())
        raise ValueError(f"found {columns}; accepted are {PAIR_FORMATS}")
    if "score_chosen" in row and row["score_chosen"] == row.get("score_rejected"):
        raise ValueError("a tie: score_chosen equals score_rejected")
    chosen, rejected = row["chosen"], row["rejected"]
    if not chosen or not rejected:
        raise ValueError("an answer is empty")
    start, prompt = 0, row.get("prompt")
    shared = len_shared(chosen, rejected)
    if prompt is None and isinstance(chosen, str):
        start = max(chosen.rfind(" ", 0, shared), chosen.rfind("\n", 0, shared), 0)
        prompt = chosen[:start]
    elif prompt is None or (isinstance(chosen, list) and chosen[0]["role"] != "assistant"):
        start = min(shared, len(chosen) - 1, len(rejected) - 1)  # equal ones keep an answer each
        system = [turn for turn in (prompt or [])[:1] if turn["role"] == "system" != chosen[0]["role"]]
        prompt = system + chosen[:start]
    return row | {"prompt": prompt, "chosen": chosen[start:], "rejected": rejected[start:]}


def load_labelled(tokenizer, source: str | None, split: str, args, limit: int = 0) -> list[tuple]:
    """A dataset as examples, each once: answers and labels, 1 for what is to be raised, of pairs or, for KTO
    and where rows have a label, of single answers. Says how many there are, and how much was dropped."""
    if source is None:
        return []
    rows, found, dropped = load_rows(source, split, args, limit), {}, {}
    for n in tqdm(range(len(rows)), desc=f"tokenize {source}", leave=False, disable=None):
        try:
            row = common.conversational(rows[n])
            if args.algorithm == "kto" and "chosen" not in row:
                if not {"prompt", "completion", "label"} <= row.keys() or row["label"] not in (0, 1):
                    raise ValueError(f"found {', '.join(row)}; accepted are {ANSWER_FORMATS}; {PAIR_FORMATS}")
                names, labels = ("completion",), (int(row["label"]),)
            else:
                row, names, labels = read_pair(row), Pair._fields, (1, 0)
            answers = tuple(encode_answer(tokenizer, row["prompt"], row[name], row) for name in names)
            if len({answer.input_ids.tobytes() for answer in answers}) < len(names):
                raise ValueError("chosen and rejected are the same")
            if max(len(answer.input_ids) for answer in answers) > args.max_length:
                raise ValueError("longer than --max-length")
            found[tuple(answer.input_ids.tobytes() for answer in answers), labels] = answers, labels
        except Exception as error:  # chat templates raise what they like
            dropped.setdefault(str(error).partition("\n")[0], []).append(n + 1)
    report_dropped(source, len(rows), dropped)
    good = sum(sum(labels) for _, labels in found.values())
    say(f"{source}: {len(found):,} different examples, {good:,} answers of them good")
    return list(found.values())


def encode_answer(tokenizer, prompt, answer, row: dict) -> Sequence:
    """A prompt and one answer to it, both texts or both messages, as a sequence with an end token."""
    if isinstance(answer, str):
        bos = tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""
        sequences = [[(bos + prompt, answer)]] if answer.strip() else []
    else:
        sequences = render(tokenizer, prompt + answer, max(1, len(prompt)), row)
    if len(sequences) != 1:
        raise ValueError("an answer is empty, or the chat template does not render it in one piece")
    return tokenize(tokenizer, sequences[0], train_on_prompt=False)


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


def mismatch(answers, which, args) -> list:
    """The prompts of some single answers, each completed by an answer to another prompt: for KTO's KL.

    It is the last one before it with another prompt, in a seeded order of all: in the order of the data both
    answers of a pair stand side by side, and all donors would have one label.
    """
    order = np.random.default_rng(args.seed).permutation(len(answers))
    places, mismatched = np.argsort(order), []
    starts = [int(trained.argmax()) for ((_, trained),) in answers]  # where a prompt ends
    prompts = [ids[:start].tobytes() for ((ids, _),), start in zip(answers, starts)]
    if len(set(prompts)) < 2:
        fail("KTO estimates a KL from answers to other prompts, and all prompts are the same")
    for i in which:
        others = (order[places[i] - back] for back in range(1, len(order)))
        donor = next(j for j in others if prompts[j] != prompts[i])
        parts = [(x[: starts[i]], y[starts[donor] :]) for x, y in zip(answers[i][0], answers[donor][0])]
        mismatched.append((Sequence(*(np.concatenate(part)[: args.max_length] for part in parts)),))
    return mismatched


def shared_prompt(answers, args) -> int:
    """How many tokens the two answers of a pair have in a row once: those that neither trains."""
    if len(answers) == 1 or args.attn != "packed":
        return 0
    untrained = min(int(trained.argmax()) for _, trained in answers)  # 0 of fillers, which train nothing
    return len_shared(*(ids[:untrained].tolist() for ids, _ in answers))


def row_length(answers, args) -> int:
    """Tokens that a pair, or a single answer, takes in a row."""
    return sum(len(ids) for ids, _ in answers) - shared_prompt(answers, args)


def count_tokens(pairs: list) -> np.ndarray:
    """Trained tokens (P, 2) of the chosen and rejected answers, (P, 1) of single ones."""
    return np.array([[int(trained.sum()) for _, trained in answers] for answers in pairs])


def collate_pairs(pairs: list, args, device):
    """Pairs as one packed row: its sequences 2k and 2k + 1 are the chosen and the rejected one of pair k.

    Of single answers, tuples of one sequence each, sequence k is answer k. No pair at all: one of fillers.
    """
    pairs = pairs or [Pair(FILLER, FILLER)]
    sequences = [answer for answers in pairs for answer in answers]
    shared = [n for answers in pairs for n in (0, shared_prompt(answers, args))[: len(answers)]]
    return common.collate(sequences, device, shared if any(shared) else None)


def pair_sums(x: torch.Tensor, batch, answers: int = 2) -> torch.Tensor:
    """Sums over each answer of what is known per token, x (C,) -> (B, answers): chosen and rejected."""
    return segment_sum(x, batch.sequence_index, batch.num_sequences).view(-1, answers)


@torch.no_grad()
def pair_logps(model, pairs: list, args, device) -> torch.Tensor:
    """Summed log-probs (P, 2) of the chosen and rejected answers, (P, 1) of single ones, on every process."""
    model.eval()
    logps = torch.zeros(len(pairs), len(pairs[0]) if pairs else 2, device=device)
    lengths, world_size = [row_length(answers, args) for answers in pairs], dist.get_world_size()
    rows = common.pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)
    for row in tqdm(rows[dist.get_rank() :: world_size], desc="log-probs", leave=False, disable=None):
        batch = collate_pairs([pairs[i] for i in row], args, device)
        logps[row] = pair_sums(token_logprobs(model, batch), batch, logps.shape[1])[: len(row)]
    dist.all_reduce(logps)
    return logps


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


@loading.unsharded
def sample_answers(model, tokenizer, sequences, args, device) -> list[dict]:
    """Sample an answer to what each sequence asks before its last trained turn; compare final answers."""
    starts = [int(np.flatnonzero(~trained)[-1]) + 1 for _, trained in sequences]
    asked = [(ids[:start].tolist(), ids[start:]) for (ids, _), start in zip(sequences, starts) if start > 1]
    uniforms = np.random.default_rng(args.seed).random((len(asked), args.max_completion_length))
    lengths, world_size = [len(ids) + args.max_completion_length for ids, _ in asked], dist.get_world_size()
    rows = common.pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)
    samples, everyones, end_ids = [], [None] * world_size, model.generation_config.eos_token_id
    for row in filter(len, rows[dist.get_rank() :: world_size]):
        prompts, numbers = [asked[i][0] for i in row], torch.tensor(uniforms[row], device=device)
        sampled = common.decode(model, prompts, numbers, end_ids, args.temperature)
        for i, (completion_ids, _) in zip(row, sampled):
            texts = tokenizer.batch_decode([completion_ids, asked[i][1]], skip_special_tokens=True)
            finals = {text.rsplit("####", 1)[-1].strip().replace(",", "") for text in texts}
            sample = {"prompt": tokenizer.decode(asked[i][0]), "completion": texts[0], "answer": texts[1]}
            samples.append(sample | {"right": len(finals) == 1})  # equal behind GSM8K's mark, or whole
    dist.all_gather_object(everyones, samples)
    return sum(everyones, [])


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
