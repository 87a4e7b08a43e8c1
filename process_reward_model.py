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

    python process_reward_model.py                             # CPU, offline, 1 minute on one core
    python process_reward_model.py --annotate tiny/data/steps_train.jsonl --policy tiny/sft
    python process_reward_model.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset steps.jsonl \
        --learning-rate 1e-5 --batch-size 64 --max-tokens-per-micro-batch 8192

Shapes: N tokens in a row, B solutions, C their steps, H hidden size, P prompts, G samples of each.
"""

import atexit
import ctypes
import gc
import hashlib
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
from common import CHATML, check_packed

HERE = Path(__file__).resolve().parent
Decay = Annotated[float, Field(ge=0, lt=1)]


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@pydantic.dataclasses.dataclass
class Args:
    # Model
    model: str = "tiny/reward"  # model to train: a hub id or a folder
    chat_template: FilePath | None = None  # Jinja chat template to use instead of the tokenizer's own
    attn: str = "packed"  # packed, or flash_attention_2 where it is installed, or eager (exact, slow)
    dtype: loading.Dtype = "bfloat16" if torch.cuda.is_available() else "float32"  # compute precision
    gradient_checkpointing: bool = False  # recompute activations: about 30 % slower, far less memory
    compile: bool = False  # compile each layer with torch.compile
    lora_rank: NonNegativeInt = 0  # train a LoRA of this rank and leave the model as it is; 0: no LoRA
    lora_alpha: PositiveFloat = 32.0  # what a LoRA adds is multiplied by alpha / rank
    lora_target: str = "all-linear"  # layers with a LoRA: all but the head, or a regular expression of names

    # Data
    dataset: tuple[str, ...] = ("tiny/data/steps_train.jsonl",)  # hub ids, files, saved datasets
    dataset_config: str | None = None  # configuration name of the hub dataset ("main" for openai/gsm8k)
    dataset_split: str = "train"  # split of the hub dataset to train on
    eval_dataset: str | None = None  # held-out dataset; by default tiny/'s if tiny/ is trained on, else none
    eval_split: str = "test"  # split of the hub dataset to evaluate on
    max_length: PositiveInt = 1024  # longest sequence in tokens; longer ones are dropped and counted

    # Optimization
    optimizer: loading.Optimizer = "adamw"  # adamw8bit: its moments in 8 bits, a quarter of their memory
    learning_rate: NonNegativeFloat = 1e-4  # peak, for tiny/; models of billions need 1e-5 (SFT) to 1e-6
    lr_schedule: Literal["linear", "cosine", "constant"] = "cosine"  # after warm-up; the first two end at 0
    warmup_steps: NonNegativeInt = 10  # steps over which the learning rate rises linearly from 0
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay rates of AdamW's two moments
    weight_decay: NonNegativeFloat = 0.0  # AdamW's decoupled weight decay, on matrices only
    max_grad_norm: PositiveFloat = 1.0  # larger gradients are scaled down to this norm; inf: no clipping
    batch_size: PositiveInt = 32  # sequences, pairs or completions per step, over all processes
    max_tokens_per_micro_batch: PositiveInt = 2048  # tokens of a packed row: memory only, never the result
    num_epochs: PositiveFloat = 3.0  # passes over the training set or the prompts, if --max-steps is 0
    max_steps: NonNegativeInt = 0  # steps, or rollouts; 0 derives them from --num-epochs

    # Search: best of N
    policy: str | None = None  # model that samples solutions, to search and to annotate; on tiny/ tiny/sft
    search_dataset: str | None = None  # prompts, with the columns --reward reads; tiny/'s if it is trained on
    outcome_model: str | None = None  # outcome reward model to compare with; on tiny/ tiny/reward
    reward: str = "rewards.py:math_answer"  # verifier, file.py:function: what is above 0 is right
    reward_timeout: NonNegativeFloat = 1800  # seconds a reward has for a batch, or the run ends; 0: for ever
    step_aggregation: Literal["min", "product", "last", "mean"] = "product"  # a solution's score
    num_samples: NonNegativeInt = 8  # solutions sampled of each prompt, the N of best of N; 0 searches none
    num_prompts: PositiveInt = 256  # prompts of the search

    # Annotation (Math-Shepherd), and sampling
    annotate: str | None = None  # dataset of prompt + completions (steps) to label instead of training
    annotate_output: str = "runs/annotated.jsonl"  # where the labelled rows go; what is there is continued
    num_rollouts: PositiveInt = 8  # completions sampled from behind every step (arXiv:2312.08935: 8)
    label: Literal["soft", "hard"] = "soft"  # the share of right completions, or 1 if any is right
    max_completion_length: PositiveInt = 128  # longest sampled answer in tokens
    temperature: NonNegativeFloat = 1.0  # sampling temperature; 0 is greedy
    max_tokens_per_rollout: PositiveInt = 65536  # tokens that are sampled at once: memory, never the result

    # Evaluation and output
    eval_every: NonNegativeInt = 100  # steps between evaluations; 0 evaluates only before and after
    num_eval: NonNegativeInt = 0  # rows of the evaluation sets that are used; 0 uses all
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
            self.eval_dataset = self.eval_dataset or "tiny/data/steps_eval.jsonl"
            self.policy = self.policy or "tiny/sft"
            self.search_dataset = self.search_dataset or "tiny/data/prompts_eval.jsonl"
            self.outcome_model = self.outcome_model or "tiny/reward"
        if self.annotate and (self.policy is None or self.temperature == 0):
            fail("--annotate samples completions: it needs a --policy, and a --temperature above 0")
        if "tiny/" not in self.model and self.learning_rate == Args.learning_rate and not self.annotate:
            say(f"--learning-rate {self.learning_rate} suits tiny/; models of billions take 1e-5")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def step_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each step, (C,) from logits (C,) and labels (C,) in [0, 1], hard or soft."""
    return -labels * F.logsigmoid(logits) - (1 - labels) * F.logsigmoid(-logits)


@loading.fsdp_forward
def head_outputs(model, batch) -> torch.Tensor:
    """Outputs (C,), float32, of the head at the marked tokens of a packed row, where rewards are read."""
    states = common.packed_hidden_states(model, batch)[0, batch.completion_index]  # (C, H)
    return model.score(states.float()).sum(1)  # of one output; FSDP2 hooks no view


def aggregate_steps(probabilities: torch.Tensor, step_aggregation: str) -> torch.Tensor:
    """One score of a solution, a scalar, from the probabilities of its steps, (steps,).

    `product` is the probability that every step is right (arXiv:2305.20050), `min` that of the weakest
    (arXiv:2312.08935), `last` what an outcome model would say, `mean` does not punish long solutions.
    """
    p = probabilities
    return {"min": p.amin(), "product": p.prod(), "last": p[-1], "mean": p.mean()}[step_aggregation]


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


def votes(answers: np.ndarray) -> np.ndarray:
    """How many of n samples have the final answer of each, (P, n) (self-consistency, arXiv:2203.11171)."""
    return (answers[:, :, None] == answers[:, None, :]).sum(2)


def best_of(n: int, right: np.ndarray, scores: np.ndarray) -> float:
    """Share of right ones among the favourites of every n samples; right and scores (P G,). All samples count
    for every n, which divides G: choices are compared, not draws."""
    picks = scores.reshape(-1, n).argmax(1)[:, None]  # (P G / n, 1)
    return float(np.take_along_axis(right.reshape(-1, n), picks, 1).mean())


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
    """Train, or annotate a dataset, as `args` says and return the last metrics."""
    device, world_size = setup_distributed(), dist.get_world_size()
    if args.annotate:
        return annotate(args, device)
    output_dir, tokenizer = choose_output_dir(args), load_tokenizer(args)
    if args.max_length > tokenizer.positions:
        fail(f"--max-length {args.max_length}: the model has {tokenizer.positions} positions")
    solutions = [s for name in args.dataset for s in load_steps(tokenizer, name, args.dataset_split, args)]
    held_out = load_steps(tokenizer, args.eval_dataset, args.eval_split, args, args.num_eval)
    searches = args.num_samples and args.policy and args.search_dataset
    prompts = load_search(args, device) if searches else []
    lengths = np.array([len(solution.sequence.input_ids) for solution in solutions])  # (P,)
    steps_per_epoch = len(solutions) / args.batch_size
    total_steps = args.max_steps or max(1, math.ceil(args.num_epochs * steps_per_epoch))
    rng, num_epochs = np.random.default_rng(args.seed), math.ceil(total_steps / steps_per_epoch)
    stream = np.concatenate([rng.permutation(len(solutions)) for _ in range(num_epochs)])
    say(f"first solution:\n{tokenizer.decode(solutions[stream[0]].sequence.input_ids)}")

    model = load_reward_model(args.model, args, tokenizer, device)
    optimizer = loading.adamw(args, model)
    step = load_checkpoint(output_dir, model, optimizer).get("step", 0) if args.resume else 0
    logger = Logger(args, output_dir, total_steps, step)
    metrics = {}
    if step == 0:
        logger.log({"step": 0} | evaluate_steps(model, held_out, args, device), [])
    while step < total_steps:
        # 1. Batch: the solutions of this optimizer step, packed into rows that are dealt to the processes
        step, started = step + 1, time.perf_counter()
        picks = stream[(step - 1) * args.batch_size : step * args.batch_size]
        rows = common.pack(lengths[picks], args.max_tokens_per_micro_batch, multiple_of=world_size)
        num_tokens, num_labels = int(lengths[picks].sum()), sum(len(solutions[i].labels) for i in picks)
        model.train()
        sums = torch.zeros(3, device=device)  # loss, steps judged as their label says, told to stop
        for row in rows[dist.get_rank() :: world_size]:
            # 2. Rewards: a logit at the end of every step
            mine = [solutions[picks[i]] for i in row]
            batch = common.collate([solution.sequence for solution in mine] or [FILLER], device)
            logits = head_outputs(model, batch)  # (C,)
            labels = torch.tensor([z for solution in mine for z in solution.labels], device=device)  # (C,)

            # 3. Loss: each row adds its part of the mean over the steps of the whole optimizer batch
            loss = step_loss(logits, labels).sum() / num_labels
            (loss * world_size).backward()  # FSDP2 averages over processes what is to be summed
            sums[:2] += torch.stack([loss.detach(), ((logits > 0) == (labels > 0.5)).sum()])

        # 4. Update
        for group in optimizer.param_groups:
            factor = lr_factor(step, total_steps, args.warmup_steps, args.lr_schedule)
            group["lr"] = args.learning_rate * factor
        sums[2] = logger.stopping
        dist.all_reduce(sums)
        loss, right, stopping = sums.tolist()
        grad_norm = loading.clip_grad_norm(model, args.max_grad_norm)
        if not math.isfinite(loss + grad_norm):
            fail(f"step {step}: loss {loss}, gradient norm {grad_norm}; --resume goes back to a checkpoint")
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started

        # 5. Evaluate, log, save: the model before the search, whose verifier may raise
        metrics = {
            "step": step,
            "epoch": step / steps_per_epoch,
            "loss": loss,
            "learning_rate": group["lr"],
            "grad_norm": grad_norm,
            "step_accuracy": right / num_labels,
            "num_tokens": int(lengths[stream[: step * args.batch_size]].sum()),
            "tokens_per_second": num_tokens / seconds,
            "step_time": seconds,
            "packing/fill": num_tokens / (len(rows) * args.max_tokens_per_micro_batch),
        }
        last, samples = step == total_steps, []
        if last:
            save_model(output_dir / "model", model, tokenizer)
        if last or (args.eval_every and step % args.eval_every == 0):
            metrics |= evaluate_steps(model, held_out, args, device)
        if last and prompts:
            # 6. Search
            found, samples = best_of_n(model, tokenizer, prompts, output_dir, args, device)
            metrics |= found
        logger.log(metrics, samples)
        if stopping or (args.save_every and (last or step % args.save_every == 0)):
            save_checkpoint(output_dir, model, optimizer, {"step": step})
        if stopping and not last:
            logger.close(f"stopped; continue with --resume --output-dir {output_dir}")
            return metrics
    logger.close(f"model saved to {output_dir / 'model'}")
    return metrics


def evaluate_steps(model, held_out, args, device) -> dict:
    """Accuracy on held-out steps, and how often the first wrong one is found."""
    if not held_out:
        return {}
    found = step_probabilities(model, [solution.sequence for solution in held_out], args, device)
    said, true = [(p > 0.5).tolist() for p in found], [[z > 0.5 for z in s.labels] for s in held_out]
    right = np.concatenate(said) == np.concatenate(true)
    share, f1 = first_error_scores(*([first_error(steps) for steps in some] for some in (said, true)))
    return {"eval/step_accuracy": right.mean(), "eval/first_error": share, "eval/first_error_f1": f1}


def best_of_n(model, tokenizer, prompts: list[dict], output_dir, args, device) -> tuple[dict, list[dict]]:
    """Sample --num-samples solutions of each prompt: how often does each way of choosing take a right one?

    best_of_n.json has it for every N that divides their number; "any" is the share with a right one.
    """
    rows = [row for row in prompts for _ in range(args.num_samples)]  # B = P G
    speller, policy = load_policy(args, device)
    heads = [spell(speller, row, "?")[0] for row in rows]
    asked = speller(heads, add_special_tokens=False).input_ids
    texts, cut = complete(policy, speller, asked, args.seed, args, device)
    del policy
    gc.collect()  # FSDP2's cycles hold it
    right = judge(args.reward, rows, texts, cut, args, device) > 0  # (B,)
    steps = [[line for line in text.split(SEPARATOR) if line.strip()] or ["?"] for text in texts]
    read = [encode_steps(tokenizer, row, some) for row, some in zip(rows, steps)]
    chances = step_probabilities(model, read, args, device)
    scores = {"prm": np.array([float(aggregate_steps(p, args.step_aggregation)) for p in chances])}
    if args.outcome_model:
        scores["orm"] = judge(args.outcome_model, rows, texts, cut, args, device)
    final_answer = runpy.run_path(str(HERE / "rewards.py"))["final_answer"]
    finals, table = np.array([final_answer(text) for text in texts]), []
    for n in (n for n in range(1, args.num_samples + 1) if args.num_samples % n == 0):
        scores |= {"majority": votes(finals.reshape(-1, n)), "any": right}
        shares = {name: best_of(n, right, score) for name, score in scores.items()}
        table.append({"n": n, "single": float(right.mean())} | shares)
        say("  best of " + "  ".join(f"{name} {value:.4g}" for name, value in table[-1].items()))
    if dist.get_rank() == 0:
        (output_dir / "best_of_n.json").write_text(json.dumps(table, indent=2))
    columns = heads, texts, right.tolist(), [p.tolist() for p in chances]
    samples = [dict(zip(("prompt", "completion", "right", "probabilities"), x)) for x in zip(*columns)]
    found = {f"search/{name}": value for name, value in table[-1].items() if name != "n"}
    return found | {"search/clipped_ratio": sum(cut) / len(cut)}, samples


def annotate(args, device) -> dict:
    """Math-Shepherd: label every step of a dataset's solutions by what completions behind it come to.

    What is there is continued, if a file beside it says that it is of the same rows, policy and flags.
    """
    rows, output = load_search(args, device), Path(args.annotate_output)
    flags = ("policy", "reward", "label", "num_rollouts", "temperature", "max_completion_length", "seed")
    origin = {name: getattr(args, name) for name in flags}
    origin["rows"] = hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()
    beside, done = output.with_suffix(".args.json"), []
    if output.exists():
        before = json.loads(beside.read_text()) if beside.exists() else {}
        for name in (name for name in origin if before.get(name) != origin[name]):
            fail(f"--annotate-output {output} is of other {name} ({before.get(name)}): name a new file")
        done = [line for line in output.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    dist.barrier()
    tokenizer, policy = load_policy(args, device)
    if dist.get_rank() == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(origin, indent=2))
        output.write_text("".join(done))  # a killed run may have left half a line
    say(f"{args.annotate}: {len(rows):,} solutions, {len(done):,} of them labelled already")
    results = {"mean_label": [], "clipped_ratio": [], "label_agreement": []}  # with labels that rows have
    for n in tqdm(range(len(done), len(rows)), unit="solution", dynamic_ncols=True, disable=None):
        row, steps, times = rows[n], rows[n]["completions"], args.num_rollouts
        input_ids, ends = encode_steps(tokenizer, row, steps)
        asked = [input_ids[: end + 1].tolist() for end in np.flatnonzero(ends)[:-1] for _ in range(times)]
        endings, cut = complete(policy, tokenizer, asked, (args.seed, n), args, device)
        texts = [SEPARATOR.join([*steps[: i // times + 1], ending]) for i, ending in enumerate(endings)]
        texts += [SEPARATOR.join(steps)] * times  # behind the last step there is nothing left to sample
        outcomes = judge(args.reward, [row] * len(texts), texts, cut + [False] * times, args, device) > 0
        labels = [shepherd_label(part.tolist(), args.label) for part in outcomes.reshape(-1, times)]
        results["mean_label"] += labels
        results["clipped_ratio"] += cut
        results["label_agreement"] += [(e > 0.5) == (t > 0.5) for e, t in zip(labels, row.get("labels", ()))]
        if dist.get_rank() == 0:
            row |= {"labels": labels, "true_labels": row.get("labels")}
            with open(output, "a") as file:
                file.write(json.dumps(row, default=str) + "\n")
    metrics = {name: float(np.mean(values)) for name, values in results.items() if values}
    say(f"labels in {output}" + "".join(f", {name} {value:.3f}" for name, value in metrics.items()))
    return metrics


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
Sequence = namedtuple("Sequence", ["input_ids", "trained"])  # token ids and which of them are trained
Solution = namedtuple("Solution", ["sequence", "labels"])  # the ends of its steps are marked; [0, 1] for each
FILLER = Sequence(np.zeros(1, np.int32), np.zeros(1, bool))  # for a process that has no row: trains nothing
COLUMNS = ("loss", "step_accuracy", "grad_norm", "learning_rate", "tokens_per_second")  # on the terminal
SEPARATOR = "\n"  # between steps; it belongs to the step that it ends
STEP_FORMATS = "prompt + completions (a list of steps) + labels (true, false, or a number from 0 to 1 each)"


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


def spell(tokenizer, row: dict, answer: str) -> tuple[str, str]:
    """What stands before an answer to a row's prompt, text or messages, and the answer up to its end."""
    if isinstance(row["prompt"], str):
        bos = tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""
        return bos + row["prompt"], answer
    apply = common.template_of(tokenizer, row)
    head = apply(row["prompt"], add_generation_prompt=True)
    body = apply([*row["prompt"], {"role": "assistant", "content": answer}]).rstrip()
    if not body.startswith(head) or answer not in body[len(head) :]:
        raise ValueError("the chat template renders the prompt anew with a reply, or changes the solution")
    return head, body[len(head) :]


def encode_steps(tokenizer, row: dict, steps: list[str]) -> Sequence:
    """A prompt and the steps of a solution as token ids up to the end of the last; which tokens end a step.

    A step ends with its separator, the last one with the end token. Where a token holds a separator and the
    beginning of the next step, the step ends with the token before.
    """
    answer = SEPARATOR.join(steps)
    head, reply = spell(tokenizer, row, answer)
    tokens = tokenizer(head + reply, add_special_tokens=False, return_offsets_mapping=True)
    input_ids, (begins, ends) = tokens.input_ids, np.array(tokens.offset_mapping).T
    stops = len(head) + reply.index(answer) + np.cumsum([len(step) + len(SEPARATOR) for step in steps])
    stops[-1] = len(head + reply)
    marked = np.zeros(len(ends), bool)
    for stop in stops:  # behind each step's separator
        marked[np.flatnonzero((ends <= stop) & (ends > begins))[-1]] = True
    if marked.sum() != len(steps):
        raise ValueError("two steps end with one token")
    if input_ids[-1] not in tokenizer.added_tokens_decoder:  # a text, or a template without an end token
        input_ids, marked = [*input_ids, tokenizer.eos_token_id], np.append(marked, True)
        marked[-2] = False
    return Sequence(np.array(input_ids, np.int32), marked)


def load_steps(tokenizer, source: str | None, split: str, args, limit: int = 0) -> list[Solution]:
    """A dataset of steps as solutions, each once; says how many steps are right and what was dropped."""
    if source is None:
        return []
    rows, found, dropped = load_rows(source, split, args, limit), {}, {}
    for n in tqdm(range(len(rows)), desc=f"tokenize {source}", leave=False, disable=None):
        try:
            match common.conversational(rows[n]):
                case {"prompt": _, "completions": [*steps], "labels": [*labels]} as row:
                    if not steps or len(steps) != len(labels) or not all(0 <= z <= 1 for z in labels):
                        raise ValueError(f"{len(steps)} steps, and labels {labels!s:.40}")
                    sequence = encode_steps(tokenizer, row, steps)
                case _:
                    raise ValueError(f"found the columns {', '.join(row)}; accepted are {STEP_FORMATS}")
            if len(sequence.input_ids) > args.max_length:
                raise ValueError("longer than --max-length")
            found.setdefault(sequence.input_ids.tobytes(), Solution(sequence, [float(z) for z in labels]))
        except Exception as error:  # chat templates raise what they like
            dropped.setdefault(str(error).partition("\n")[0], []).append(n + 1)
    report_dropped(source, len(rows), dropped)
    labels = [z for solution in found.values() for z in solution.labels]
    say(f"{source}: {len(found):,} different solutions, {len(labels):,} steps, {np.mean(labels):.0%} right")
    return list(found.values())


def load_search(args, device) -> list[dict]:
    """The rows of what is annotated or searched, each with a prompt; what judges them is tried on one."""
    source = args.annotate or args.search_dataset
    split, limit = (args.dataset_split, 0) if args.annotate else (args.eval_split, args.num_prompts)
    rows = load_rows(source, split, args, limit)
    speller, found, dropped = load_tokenizer(replace(args, model=args.policy, chat_template=None)), [], {}
    for n, row in enumerate(rows, 1):
        try:
            row = common.conversational(row)
            steps = row["completions"] if args.annotate else ["?"]
            if not isinstance(steps, list) or not steps:
                raise ValueError("completions are no list of steps")
            encode_steps(speller, row, steps)
            found.append(row)
        except Exception as error:  # chat templates raise what they like
            dropped.setdefault(repr(error), []).append(n)
    report_dropped(source, len(rows), dropped)
    for spec in (args.reward, None if args.annotate else args.outcome_model):
        if spec:
            judge(spec, found[:1], ["?"], [False], args, device)
    return found


def judge(spec: str, rows: list[dict], texts: list[str], cut: list[bool], args, device) -> np.ndarray:
    """What file.py:function, or a reward model, says of solutions, (B,); 0 where it says nothing."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "completions"))
    columns = {name: [row.get(name) for row in rows] for name in names} | {"truncated": cut}
    prompts = columns["prompts"] = [row["prompt"] for row in rows]
    turns = [[{"role": "assistant", "content": text}] for text in texts]
    completions = [text if isinstance(p, str) else turn for p, text, turn in zip(prompts, texts, turns)]
    (path, _, name), library = spec.rpartition(":"), runpy.run_path(str(HERE / "rewards.py"))
    try:
        if path.endswith(".py"):
            function = runpy.run_path(located(path))[name]
        else:
            function = library["reward_model"](spec, device, args.dtype)
        function = library["within"](args.reward_timeout, spec, function)
        return np.array([value or 0.0 for value in function(completions=completions, **columns)], float)
    except Exception as error:  # whatever stands in that file
        fail(f"{spec}: {type(error).__name__}: {error}".splitlines()[0])


def load_policy(args, device):
    """The tokenizer of --policy, with its own chat template, and the model with what ends its answers."""
    tokenizer = load_tokenizer(replace(args, model=args.policy, chat_template=None))
    policy = load_model(args.policy, args, device, frozen=True)
    policy.generation_config.eos_token_id = end_tokens(tokenizer, policy)
    return tokenizer, policy


def end_tokens(tokenizer, model) -> list[int]:
    """Ids that end an answer: those of the model and tokenizer, and what a chat template writes behind it."""
    ends = {tokenizer.eos_token_id, *np.atleast_1d(model.generation_config.eos_token_id or []).tolist()}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("!")[2]
    behind_ids = tokenizer(behind, add_special_tokens=False).input_ids  # Qwen2.5's base: not its EOS
    return sorted(ends | set(behind_ids[:1]) & set(tokenizer.added_tokens_decoder))


@loading.unsharded
def complete(policy, tokenizer, prompts: list[list[int]], seed, args, device) -> tuple[list[str], list[bool]]:
    """Sample an answer to each prompt, of `seed` and its place alone: its text, and whether it is cut."""
    policy.eval()
    rank, world_size, end_ids = dist.get_rank(), dist.get_world_size(), policy.generation_config.eos_token_id
    uniforms = np.random.default_rng(seed).random((len(prompts), args.max_completion_length))  # (B, T)
    mine = sorted(range(rank, len(prompts), world_size), key=lambda i: len(prompts[i]))
    longest = max(map(len, prompts), default=0) + args.max_completion_length
    sampled, shares, size = {}, [None] * world_size, max(1, args.max_tokens_per_rollout // longest)
    for chunk in (mine[start : start + size] for start in range(0, len(mine), size)):
        numbers = torch.tensor(uniforms[chunk], device=device)
        answers = common.decode(policy, [prompts[i] for i in chunk], numbers, end_ids, args.temperature)
        sampled |= {i: ids for i, (ids, _) in zip(chunk, answers)}
    dist.all_gather_object(shares, sampled)
    answers = [shares[i % world_size][i] for i in range(len(prompts))]
    return tokenizer.batch_decode(answers, skip_special_tokens=True), [x[-1] not in end_ids for x in answers]


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
def step_probabilities(model, sequences: list[Sequence], args, device) -> list[torch.Tensor]:
    """sigma of the logits at the marked tokens, one tensor a sequence, on every process."""
    model.eval()
    counts = [int(sequence.trained.sum()) for sequence in sequences]
    starts, flat = np.cumsum([0, *counts]), torch.zeros(sum(counts), device=device)
    lengths, world_size = [len(sequence.input_ids) for sequence in sequences], dist.get_world_size()
    rows = common.pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)
    for row in tqdm(rows[dist.get_rank() :: world_size], desc="steps", leave=False, disable=None):
        logits = head_outputs(model, common.collate([sequences[i] for i in row] or [FILLER], device))
        flat[[n for i in row for n in range(starts[i], starts[i + 1])]] = torch.sigmoid(logits)
    dist.all_reduce(flat)
    return list(flat.cpu().split(counts))


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
