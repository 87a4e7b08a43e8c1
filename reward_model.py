"""Reward models (RM): score answers, from pairs of which one is preferred, or from good and bad ones.

    bradley_terry  -E log sigma( r(x, y_w) - r(x, y_l) - m )                    Eq. 1, arXiv:2203.02155
    outcome        -E [ z log sigma(r(x, y)) + (1 - z) log sigma(-r(x, y)) ]    arXiv:2110.14168, section 4.2

r is a linear head on the last hidden state of the answer's last token; m is an optional margin per pair. The
backbone is a causal language model that answers already (after sft.py). The loop:

    1. Batch     take the next `--batch-size` pairs (or answers) and pack them, the two of a pair in one row
    2. Rewards   read the head at the last token of every answer
    3. Loss      one number a pair, or an answer; their mean over the whole optimizer batch
    4. Update    clip the gradient, learning-rate schedule, AdamW
    5. Evaluate  accuracy, calibration, length bias on held-out answers; log; save
    6. Centre    move the mean reward of Bradley-Terry models, which their loss leaves open, to 0

Deviations from common practice, each with its reason:
    1. The reward is read at an answer's end token, by position: what a policy samples ends there, without the
       line break that templates write behind it, and padding may have the same id.
    2. The offset that centres rewards is in the config (`reward_offset`): the head that transformers loads
       has no bias.

    python reward_model.py                                     # CPU, offline, 2 minutes on one core
    python reward_model.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset trl-lib/ultrafeedback_binarized \
        --learning-rate 1e-5 --batch-size 64 --max-length 2048 --max-tokens-per-micro-batch 8192

Shapes: N tokens in a row, B pairs (or answers), K answers of each (2 or 1), C = B K ends, H hidden size.
"""

import atexit
import ctypes
import gc
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
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import islice, takewhile
from pathlib import Path
from types import SimpleNamespace
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import common
import loading
from common import CHATML, check_packed, segment_sum

HERE = Path(__file__).resolve().parent
Decay = Annotated[float, Field(ge=0, lt=1)]


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@pydantic.dataclasses.dataclass
class Args:
    # Model
    model: str = "tiny/checker"  # model to train: a hub id or a folder
    num_members: PositiveInt = 1  # models of an ensemble, one after the other, of other seeds and data orders
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
    objective: Literal["bradley_terry", "outcome"] = "bradley_terry"  # pairs, or answers labelled good or bad
    center_coef: NonNegativeFloat = 0.01  # weight of (r_c + r_r)^2 of each pair (arXiv:2312.09244; TRL: 0.01)
    label_smoothing: Decay = 0.0  # share of labels believed flipped; 0 trusts them all

    # Optimization
    optimizer: loading.Optimizer = "adamw"  # adamw8bit: its moments in 8 bits, a quarter of their memory
    learning_rate: NonNegativeFloat = 3e-4  # peak, for tiny/; models of billions need 1e-5 (SFT) to 1e-6
    lr_schedule: Literal["linear", "cosine", "constant"] = "cosine"  # after warm-up; the first two end at 0
    warmup_steps: NonNegativeInt = 10  # steps over which the learning rate rises linearly from 0
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay rates of AdamW's two moments
    weight_decay: NonNegativeFloat = 0.0  # AdamW's decoupled weight decay, on matrices only
    max_grad_norm: PositiveFloat = 1.0  # larger gradients are scaled down to this norm; inf: no clipping
    batch_size: PositiveInt = 32  # sequences, pairs or completions per step, over all processes
    max_tokens_per_micro_batch: PositiveInt = 512  # tokens of a packed row: memory only, never the result
    num_epochs: PositiveFloat = 2.0  # passes over the training set or the prompts, if --max-steps is 0
    max_steps: NonNegativeInt = 0  # steps, or rollouts; 0 derives them from --num-epochs

    # Evaluation and output
    eval_every: NonNegativeInt = 50  # steps between evaluations; 0 evaluates only before and after
    num_eval: NonNegativeInt = 0  # rows of the evaluation sets that are used; 0 uses all
    score: str | None = None  # dataset of prompt + completion(s) to score with --model instead of training
    score_output: str | None = None  # where the scored rows go; by default beside --score
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
        if not self.dataset:
            kind = "preference" if self.objective == "bradley_terry" else "unpaired"
            self.dataset = (f"tiny/data/{kind}_train.jsonl",)
            self.eval_dataset = self.eval_dataset or "tiny/data/preference_eval.jsonl"
        if self.score and self.chat_template:
            fail("--score reads with the chat template that was saved with --model: drop --chat-template")
        if "tiny/" not in self.model and self.learning_rate == Args.learning_rate and not self.score:
            say(f"--learning-rate {self.learning_rate} suits tiny/; models of billions take 1e-5")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def bradley_terry_loss(chosen_rewards, rejected_rewards, margin=0.0, label_smoothing: float = 0.0):
    """Negative log-likelihood of each preference, (B,) from rewards (B,) (Eq. 1, arXiv:2203.02155).

    The chosen answer wins with probability sigma(r_c - r_r); `margin` (B,) is how much the better one must
    win by (arXiv:2307.09288, Eq. 2). With label_smoothing e that is the rejected one with probability e.
    """
    differences = chosen_rewards - rejected_rewards  # (B,)
    right, flipped = F.logsigmoid(differences - margin), F.logsigmoid(-differences - margin)  # (B,) each
    return -(1 - label_smoothing) * right - label_smoothing * flipped


def outcome_loss(rewards: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Binary cross-entropy of each answer, (B,), from rewards (B,) as logits and labels (B,), 1 if good."""
    targets = labels * (1 - label_smoothing) + (1 - labels) * label_smoothing  # (B,)
    return -targets * F.logsigmoid(rewards) - (1 - targets) * F.logsigmoid(-rewards)


def center_loss(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> torch.Tensor:
    """(r_c + r_r)^2 of each pair, (B,): only differences are learnt otherwise (arXiv:2312.09244, Eq. 2)."""
    return (chosen_rewards + rejected_rewards).square()


@loading.fsdp_forward
def head_outputs(model, batch) -> torch.Tensor:
    """Outputs (C,), float32, of the head at the marked tokens of a packed row, where rewards are read."""
    states = common.packed_hidden_states(model, batch)[0, batch.completion_index]  # (C, H)
    return model.score(states.float()).sum(1)  # of one output; FSDP2 hooks no view


def preferred(margins: torch.Tensor, tie: float = 1e-4) -> torch.Tensor:
    """1 where the chosen answer has the higher reward, 1/2 in a tie, 0 else: margins (B,) -> (B,).

    Rewards closer than `tie` are equal: in another row a float32 reward differs by 1e-6.
    """
    return (1 + margins.sign() * (margins.abs() > tie)) / 2


def calibration_error(differences: torch.Tensor, num_bins: int = 10) -> float:
    """Expected calibration error (arXiv:1706.04599, Eq. 3) of pairs, from r_c - r_r (P,).

    The model prefers one answer with confidence sigma(|difference|) in [1/2, 1] and is right or not; the
    error is the mean over bins of |confidence - accuracy|, weighted by their pairs.
    """
    confidence, right = torch.sigmoid(differences.abs()), preferred(differences)  # (P,)
    bins = ((confidence - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)  # (P,)
    return segment_sum(confidence - right, bins, num_bins).abs().sum().item() / len(differences)


def length_correlation(rewards: torch.Tensor, lengths: torch.Tensor) -> float:
    """Pearson's correlation of rewards (P,) with answer lengths (P,); 0 where one of them does not vary."""
    both = torch.stack([rewards.double(), lengths.double()])
    return torch.nan_to_num(torch.corrcoef(both)[0, 1]).item() if len(rewards) > 1 else 0.0


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
    """Train, or score a dataset, as `args` says and return the last metrics."""
    device, world_size = setup_distributed(), dist.get_world_size()
    if args.score:
        return score_dataset(args, device)
    output_dir = choose_output_dir(args)
    if args.num_members > 1:
        return train_ensemble(args, output_dir)
    tokenizer = load_tokenizer(args)
    if args.max_length > tokenizer.positions:
        fail(f"--max-length {args.max_length}: the model has {tokenizer.positions} positions")
    train = [x for name in args.dataset for x in load_answers(tokenizer, name, args.dataset_split, args)]
    held_out = load_answers(tokenizer, args.eval_dataset, args.eval_split, args, args.num_eval)
    if args.objective == "outcome":  # pairs are taken apart
        train = [Labelled((s,), [z], [n], x.row) for x in train for s, z, n in zip(*x[:3])]
    answers, pairwise = [item.answers for item in train], args.objective == "bradley_terry"
    labels = torch.tensor([item.labels for item in train], device=device)  # (P, K)
    margins = torch.tensor([float(item.row.get("margin") or 0) for item in train], device=device)  # (P,)
    lengths = np.array([row_length(some, args) for some in answers])  # (P,)
    steps_per_epoch = len(answers) / args.batch_size
    total_steps = args.max_steps or max(1, math.ceil(args.num_epochs * steps_per_epoch))
    rng, num_epochs = np.random.default_rng(args.seed), math.ceil(total_steps / steps_per_epoch)
    stream = np.concatenate([rng.permutation(len(answers)) for _ in range(num_epochs)])
    say("first example:\n" + "\n".join(tokenizer.decode(answer.input_ids) for answer in answers[stream[0]]))

    model = load_reward_model(args.model, args, tokenizer, device)
    optimizer = loading.adamw(args, model)
    step = load_checkpoint(output_dir, model, optimizer).get("step", 0) if args.resume else 0
    logger = Logger(args, output_dir, total_steps, step)
    metrics = {}
    if step == 0:
        logger.log({"step": 0} | evaluate_reward_model(model, held_out, args, device), [])
    while step < total_steps:
        # 1. Batch: the answers of this optimizer step, packed into rows that are dealt to the processes
        step, started = step + 1, time.perf_counter()
        picks = stream[(step - 1) * args.batch_size : step * args.batch_size]
        packed = common.pack(lengths[picks], args.max_tokens_per_micro_batch, multiple_of=world_size)
        num_tokens = int(lengths[picks].sum())
        model.train()
        loss_and_stop = torch.zeros(2, device=device)  # loss, processes told to stop
        batch_rewards = torch.zeros(len(picks), labels.shape[1], device=device)
        for row in packed[dist.get_rank() :: world_size]:
            # 2. Rewards: (B, 2), chosen and rejected, or (B, 1)
            ids = picks[row]
            batch = collate_pairs([answers[i] for i in ids], args, device)
            rewards = head_outputs(model, batch).view(-1, labels.shape[1])  # (B, K); none in an empty row
            batch_rewards[row] = rewards.detach()

            # 3. Loss: each row adds its part of the mean over the whole optimizer batch
            if pairwise:
                losses = bradley_terry_loss(*rewards.T, margins[ids], args.label_smoothing)  # (B,)
                losses = losses + args.center_coef * center_loss(*rewards.T)  # (B,)
            else:
                losses = outcome_loss(rewards[:, 0], labels[ids, 0], args.label_smoothing)  # (B,)
            loss = losses.sum() / len(picks)
            (loss * world_size).backward()  # FSDP2 averages over processes what is to be summed
            loss_and_stop[0] += loss.detach()

        # 4. Update
        for group in optimizer.param_groups:
            factor = lr_factor(step, total_steps, args.warmup_steps, args.lr_schedule)
            group["lr"] = args.learning_rate * factor
        loss_and_stop[1] = logger.stopping
        dist.all_reduce(loss_and_stop)
        dist.all_reduce(batch_rewards)  # each row is some process's
        loss, stopping = loss_and_stop.tolist()
        grad_norm = loading.clip_grad_norm(model, args.max_grad_norm)
        if not math.isfinite(loss + grad_norm):
            fail(f"step {step}: loss {loss}, gradient norm {grad_norm}; --resume goes back to a checkpoint")
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started

        # 5. Evaluate, log, save
        good = labels[picks] == 1  # (B, K)
        right = preferred((batch_rewards * (2 * labels[picks] - 1)).sum(1))  # (B,): of r_c - r_r, r or -r
        metrics = {
            "step": step,
            "epoch": step / steps_per_epoch,
            "loss": loss,
            "learning_rate": group["lr"],
            "grad_norm": grad_norm,
            "accuracy": right.mean().item(),
            "margin": (batch_rewards[good].mean() - batch_rewards[~good].mean()).item(),
            "mean_reward": batch_rewards.mean().item(),
            "min_reward": batch_rewards.min().item(),
            "max_reward": batch_rewards.max().item(),
            "num_tokens": int(lengths[stream[: step * args.batch_size]].sum()),
            "tokens_per_second": num_tokens / seconds,
            "step_time": seconds,
            "packing/fill": num_tokens / (len(packed) * args.max_tokens_per_micro_batch),
        }
        last = step == total_steps
        if last or (args.eval_every and step % args.eval_every == 0):
            metrics |= evaluate_reward_model(model, held_out, args, device)
        logger.log(metrics, [])
        if stopping or (args.save_every and (last or step % args.save_every == 0)):
            save_checkpoint(output_dir, model, optimizer, {"step": step})
        if stopping and not last:
            logger.close(f"stopped; continue with --resume --output-dir {output_dir}")
            return metrics

    # 6. Centre: pairs leave the mean reward open; an outcome model's sigma(r) is P(right), and stays so
    if pairwise:
        sample = [answers[i] for i in np.random.default_rng(args.seed).permutation(len(answers))[:1000]]
        model.config.reward_offset = -answer_scores(model, sample, args, device).mean().item()
    save_model(output_dir / "model", model, tokenizer)
    logger.close(f"model saved to {output_dir / 'model'}, reward offset {model.config.reward_offset:+.3f}")
    return metrics


def evaluate_reward_model(model, held_out, args, device) -> dict:
    """Accuracy, calibration and length bias on what is held out."""
    if not held_out:
        return {}
    answers, labels = [item.answers for item in held_out], torch.tensor([item.labels for item in held_out])
    rewards, lengths = (
        answer_scores(model, answers, args, device),
        torch.tensor([x.lengths for x in held_out]),
    )
    right = preferred((rewards * (2 * labels - 1)).sum(1))  # (P,)
    metrics = {
        "eval/accuracy": right.mean().item(),
        "eval/length_correlation": length_correlation(rewards.flatten(), lengths.flatten()),
    }
    if rewards.shape[1] == 1:
        couples = rewards[labels == 1][:, None] - rewards[labels == 0][None]  # good with bad: ROC's area
        return metrics | {"eval/auc": preferred(couples).mean().item()}
    differences, kinds = rewards[:, 0] - rewards[:, 1], [str(item.row.get("kind") or "") for item in held_out]
    metrics |= {"eval/ece": calibration_error(differences), "eval/margin": differences.mean().item()}
    groups = {"length_matched": (lengths[:, 0] - lengths[:, 1]).abs() <= 0.1 * lengths.amax(1)}  # (P,) each
    groups |= {kind: torch.tensor([kind == other for other in kinds]) for kind in sorted({*kinds} - {""})}
    known = {f"eval/accuracy_{name}": right[members].mean().item() for name, members in groups.items()}
    return metrics | {name: share for name, share in known.items() if share == share}  # NaN: no such pair


def train_ensemble(args, output_dir: Path) -> dict:
    """Train --num-members models into member_<n>/ of one folder -> the metrics of the last."""
    (output_dir / "args.json").write_text(as_json(args))
    metrics, names = {}, [f"member_{n}" for n in range(args.num_members)]
    for n, folder in enumerate(output_dir / name for name in names):
        own = {"num_members": 1, "seed": args.seed + n, "output_dir": str(folder), "resume": folder.exists()}
        if not (folder / "model").exists():
            metrics = main(replace(args, **own))
        if not (folder / "model").exists():  # told to stop
            return metrics
    if dist.get_rank() == 0:
        (output_dir / "ensemble.json").write_text(json.dumps({"members": [f"{n}/model" for n in names]}))
    say(f"ensemble saved to {output_dir}: --reward {output_dir}, or {output_dir}:min, asks all of it")
    return metrics


def score_dataset(args, device) -> dict:
    """Write the rows of --score with their `reward`, a list for `completions`; null where the model's chat
    template refuses a row, or its positions do not reach."""
    output = Path(args.score_output or Path(args.score).with_suffix(".scored.jsonl"))
    if output.exists() or dist.get_world_size() > 1:
        fail(f"--score runs in one process, and {output}, where the rewards go, must not exist")
    rows, asked, counts, dropped = [], [], [], {}
    for row in load_rows(args.score, args.dataset_split, args):
        rows.append({name: value for name, value in row.items() if value is not None})
    for n, row in enumerate(rows, 1):
        read = common.conversational(row)
        completions = read["completions"] if "completions" in read else [read.get("completion")]
        if "prompt" not in read or None in completions:
            dropped.setdefault(f"found {', '.join(row)}; needed are prompt + completion(s)", []).append(n)
            completions = []
        settings = (read.get("tools"), read.get("chat_template_kwargs"))
        asked += [(read["prompt"], completion, *settings) for completion in completions]
        counts.append(len(completions))
    report_dropped(args.score, len(rows), dropped)
    names = ("prompts", "completions", "tools", "chat_template_kwargs")
    try:
        reward = runpy.run_path(str(HERE / "rewards.py"))["reward_model"](args.model, device, args.dtype)
        rewards = reward(**dict(zip(names, map(list, zip(*asked)))))
    except (OSError, ValueError) as error:  # also where it has no reward head
        fail(f"--model {args.model}: {error}".splitlines()[0])
    with open(output, "x") as file:
        left = iter(rewards)
        for row, count in zip(rows, counts):
            found = [*islice(left, count)]
            found = found if "completions" in row else (found or [None])[0]
            file.write(json.dumps(row | {"reward": found}, default=str) + "\n")
    mean = float(np.mean([value for value in rewards if value is not None]))
    say(f"{output}: rewards of {len(rewards):,} answers, mean {mean:+.3f}")
    return {"mean_reward": mean}


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
Sequence = namedtuple("Sequence", ["input_ids", "trained"])  # token ids and which of them are trained
Pair = namedtuple("Pair", ["chosen", "rejected"])  # two answers, sequences that begin with the same prompt
FILLER = Sequence(np.zeros(1, np.int32), np.zeros(1, bool))  # for a process that has no row: trains nothing
# A single answer, or the two of a pair, sequences whose last tokens are marked; which are good, 1 or 0 each;
# how many tokens each answers with; the row of the dataset.
Labelled = namedtuple("Labelled", ["answers", "labels", "lengths", "row"])
COLUMNS = ("loss", "accuracy", "margin", "mean_reward", "grad_norm", "tokens_per_second")  # on the terminal
PAIR_FORMATS = "prompt + chosen + rejected; question + chosen + rejected; chosen + rejected; HH's"


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


def shared_prompt(answers, args) -> int:
    """How many tokens the two answers of a pair have in a row once: those that neither trains."""
    if len(answers) == 1 or args.attn != "packed":
        return 0
    untrained = min(int(trained.argmax()) for _, trained in answers)  # 0 of fillers, which train nothing
    return len_shared(*(ids[:untrained].tolist() for ids, _ in answers))


def row_length(answers, args) -> int:
    """Tokens that a pair, or a single answer, takes in a row."""
    return sum(len(ids) for ids, _ in answers) - shared_prompt(answers, args)


def collate_pairs(pairs: list, args, device):
    """Pairs as one packed row: its sequences 2k and 2k + 1 are the chosen and the rejected one of pair k.

    Of single answers, tuples of one sequence each, sequence k is answer k. No pair at all: one of fillers.
    """
    pairs = pairs or [Pair(FILLER, FILLER)]
    sequences = [answer for answers in pairs for answer in answers]
    shared = [n for answers in pairs for n in (0, shared_prompt(answers, args))[: len(answers)]]
    return common.collate(sequences, device, shared if any(shared) else None)


def load_answers(tokenizer, source: str | None, split: str, args, limit: int = 0) -> list[Labelled]:
    """A dataset as pairs, or as single answers, each once; says how they differ and how much was dropped."""
    if source is None:
        return []
    rows, found, dropped = load_rows(source, split, args, limit), {}, {}
    for n in tqdm(range(len(rows)), desc=f"tokenize {source}", leave=False, disable=None):
        try:
            row = common.conversational(rows[n])
            if args.objective == "outcome" and row.get("label") in (True, False):
                names, labels = ("completion",), [int(row["label"])]
            else:
                row, names, labels = read_pair(row), ("chosen", "rejected"), [1, 0]
            answers = tuple(encode_answer(tokenizer, row["prompt"], row[name], row) for name in names)
            if len({answer.input_ids.tobytes() for answer in answers}) < len(names):
                raise ValueError("chosen and rejected are the same")
            if max(len(answer.input_ids) for answer in answers) > args.max_length:
                raise ValueError("longer than --max-length")
            lengths = [int(answer.trained.sum()) for answer in answers]
            ends = tuple(Sequence(ids, np.arange(len(ids)) == len(ids) - 1) for ids, _ in answers)
            found.setdefault(tuple(ids.tobytes() for ids, _ in ends), Labelled(ends, labels, lengths, row))
        except Exception as error:  # chat templates raise what they like
            dropped.setdefault(str(error).partition("\n")[0], []).append(n + 1)
    report_dropped(source, len(rows), dropped)
    labels = np.concatenate([item.labels for item in found.values()])
    say(f"{source}: {len(found):,} different examples of {len(labels):,} answers, {labels.sum():,} good")
    return list(found.values())


def load_reward_model(name, args, tokenizer, device):
    """A model with one output; a language model gets a head, its std 1 / sqrt(H + 1) (arXiv:2009.01325)."""

    def from_pretrained(path, **settings):
        config = settings["config"] = AutoConfig.from_pretrained(path, num_labels=1)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path, **settings)
        if not any("SequenceClassification" in kind for kind in config.architectures or ()):
            noise = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(args.seed))
            model.score.weight.data = noise.to(model.dtype) / math.sqrt(model.score.in_features + 1)
        model.generation_config, model.config.reward_offset = None, 0.0  # it writes nothing
        return model

    kind = SimpleNamespace(from_pretrained=from_pretrained)
    model, pad = load_model(name, args, device, kind=kind, check=check_rewards), tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    return model


@torch.no_grad()
def check_rewards(model):
    """Raise ValueError unless packed answers, also with a shared prompt, score as alone in the stock model.

    A leak shows as an error of 0.1 and more, rounding in float32 as 1e-5 of the rewards.
    """
    device, vocab_size = model.get_input_embeddings().weight.device, model.config.get_text_config().vocab_size
    one, other = (torch.arange(1, n + 1) * 7919 % vocab_size for n in (9, 6))
    name, attn = model.config.model_type, model.config._attn_implementation
    rows = [([one, other], None)] + [([one, torch.cat([one[:4], other])], [0, 4])] * (attn == "packed")
    model.config.pad_token_id = None  # the stock model reads the last token then
    for sequences, shared in rows:
        ends = [(ids, torch.arange(len(ids)) == len(ids) - 1) for ids in sequences]
        alone = [model(input_ids=ids[None].to(device), use_cache=False).logits[0] for ids in sequences]
        alone = torch.cat(alone)  # (B,)
        error = (head_outputs(model, common.collate(ends, device, shared)) - alone).abs().max()
        if not error < (1e-4 if model.compute_dtype == torch.float32 else 0.01) * (10 + alone.abs().max()):
            raise ValueError(f"{name}: packed rewards are {error:.2g} from the model's under --attn {attn}")


@torch.no_grad()
def answer_scores(model, answers: list, args, device) -> torch.Tensor:
    """Rewards (P, K), on the CPU, of the answers of pairs, or of single ones, with the model's offset."""
    model.eval()
    rewards = torch.zeros(len(answers), len(answers[0]), device=device)
    lengths, world_size = [row_length(some, args) for some in answers], dist.get_world_size()
    rows = common.pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)
    for row in tqdm(rows[dist.get_rank() :: world_size], desc="rewards", leave=False, disable=None):
        batch = collate_pairs([answers[i] for i in row], args, device)
        rewards[row] = head_outputs(model, batch).view(-1, rewards.shape[1])
    dist.all_reduce(rewards)
    return rewards.cpu() + model.config.reward_offset


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
