"""Rejection sampling: a policy learns from the best of its own samples (RFT, RAFT, STaR), or only picks it.

    D_r = { (x, y) : y ~ pi_r-1(. | x), kept by --filter },   pi_r = argmax_pi sum_(x, y) in D_r log pi(y | x)

With a verifier and `--filter all_correct` this is RFT (arXiv:2308.01825); with a reward model and `top1` RAFT
(Algorithm 1, arXiv:2304.06767); with `--restart`, every round from the first model, STaR (arXiv:2203.14465).
The loop, for each of `--num-rounds`:

    1. Sample    answers to the prompts of the round, and their rewards; they stay in round_<r>.jsonl
    2. Filter    no answer twice, none that was cut off, at most `--max-per-prompt` of a prompt
    3. Train     maximum likelihood of what is kept, on packed rows, as sft.py does
    4. Evaluate  sampled and greedy answers to held-out prompts; log; save

`--num-rounds 0` is Best-of-N: nothing is trained, held-out prompts get the best of N = `--eval-samples`
answers. With F and F- the shares of answers that are no better, and worse, than y,

    pi_N(y) = pi(y) [F^N - F-^N] / [F - F-],    KL(pi_N || pi) <= log N - (N - 1) / N,

far below it where many answers are worth the same, as under a verifier (arXiv:2401.01879).

Deviations from the papers, each with its reason:
    1. Every round is a fine-tuning of its own, with its own schedule and fresh moments: what the policy
       samples differs from round to round, and with --restart there is nothing to go on with.
    2. RFT takes solutions with the same equations for one; here equal texts are one, in any domain.
    3. STaR's rationalization (show the answer, ask for the way to it) is left out: it needs other prompts.

    python rejection_sampling.py                               # CPU, offline, 3 minutes on 2 cores
    python rejection_sampling.py --num-rounds 0 --eval-samples 16                  # Best-of-16 of tiny/sft
    python rejection_sampling.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k \
        --dataset-config main --learning-rate 1e-5 --batch-size 64 --max-completion-length 512

Shapes: P prompts, G or N samples of each, B = P G, C trained tokens of a row, F rewards.
"""

import atexit
import ctypes
import gc
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
import traceback
from collections import Counter, namedtuple
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

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
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import common
import loading
from common import CHATML, check_packed, token_logprobs
from estimators import best_of_k, mean_of

HERE = Path(__file__).resolve().parent
Decay = Annotated[float, Field(ge=0, lt=1)]
Filter = Literal["all_correct", "top1", "threshold"]


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@pydantic.dataclasses.dataclass
class Args:
    # Model
    model: str = "tiny/sft"  # model to train: a hub id or a folder
    chat_template: FilePath | None = None  # Jinja chat template to use instead of the tokenizer's own
    attn: str = "packed"  # packed, or flash_attention_2 where it is installed, or eager (exact, slow)
    dtype: loading.Dtype = "bfloat16" if torch.cuda.is_available() else "float32"  # compute precision
    gradient_checkpointing: bool = False  # recompute activations: about 30 % slower, far less memory
    compile: bool = False  # compile each layer with torch.compile
    lora_rank: NonNegativeInt = 0  # train a LoRA of this rank and leave the model as it is; 0: no LoRA
    lora_alpha: PositiveFloat = 32.0  # what a LoRA adds is multiplied by alpha / rank
    lora_target: str = "all-linear"  # layers with a LoRA: all but the head, or a regular expression of names

    # Data
    dataset: tuple[str, ...] = ("tiny/data/prompts_train.jsonl",)  # hub ids, files, saved datasets
    dataset_config: str | None = None  # configuration name of the hub dataset ("main" for openai/gsm8k)
    dataset_split: str = "train"  # split of the hub dataset to train on
    eval_dataset: str | None = None  # held-out dataset; by default tiny/'s if tiny/ is trained on, else none
    eval_split: str = "test"  # split of the hub dataset to evaluate on
    max_prompt_length: PositiveInt = 512  # longest prompt in tokens; longer ones are dropped and counted

    # Reward
    reward: tuple[str, ...] = ("rewards.py:math_answer",)  # file.py:function, or a reward model
    reward_weights: tuple[float, ...] = ()  # weight of each --reward in turn; by default 1 each
    eval_reward: tuple[str, ...] = ()  # gold rewards: logged and evaluated on, never optimised
    allow_code_execution: bool = False  # let rewards run what the model writes (rewards.py:code_tests)
    reward_timeout: NonNegativeFloat = 1800  # seconds a reward has for a batch, or the run ends; 0: for ever

    # Rounds
    num_rounds: NonNegativeInt = 3  # rounds of sampling and training; 0 trains nothing: Best-of-N
    prompts_per_round: NonNegativeInt = 512  # prompts that a round samples answers to; 0: all there are
    num_generations: PositiveInt = 8  # answers sampled to each prompt of a round
    filter: Filter = "all_correct"  # keep answers whose first --reward is 1, the best, or from --threshold
    threshold: float | None = None  # least reward of what is kept, under every filter; "threshold" needs it
    max_per_prompt: PositiveInt = 1  # most answers kept of a prompt and round, the best first; top1: 1
    restart: bool = False  # train every round from --model as it was, on the newest samples (STaR)
    max_completion_length: PositiveInt = 128  # longest sampled answer in tokens
    temperature: PositiveFloat = 1.0  # sampling temperature
    max_tokens_per_rollout: PositiveInt = 65536  # tokens that are sampled at once: memory, never the result
    rollout: Literal["transformers", "vllm"] = "transformers"  # sampling engine, in this process
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.4  # share of a GPU's memory that vLLM may take

    # Optimization
    optimizer: loading.Optimizer = "adamw"  # adamw8bit: its moments in 8 bits, a quarter of their memory
    learning_rate: NonNegativeFloat = 3e-4  # peak, for tiny/; models of billions need 1e-5 (SFT) to 1e-6
    lr_schedule: Literal["linear", "cosine", "constant"] = "cosine"  # after warm-up; the first two end at 0
    warmup_steps: NonNegativeInt = 5  # steps over which the learning rate rises linearly from 0
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay rates of AdamW's two moments
    weight_decay: NonNegativeFloat = 0.0  # AdamW's decoupled weight decay, on matrices only
    max_grad_norm: PositiveFloat = 1.0  # larger gradients are scaled down to this norm; inf: no clipping
    batch_size: PositiveInt = 32  # sequences, pairs or completions per step, over all processes
    max_tokens_per_micro_batch: PositiveInt = 8192  # tokens of a packed row: memory only, never the result
    num_epochs: PositiveFloat = 2.0  # passes over the training set or the prompts, if --max-steps is 0
    max_steps: NonNegativeInt = 0  # steps, or rollouts; 0 derives them from --num-epochs

    # Evaluation and output
    eval_every: NonNegativeInt = 0  # steps between evaluations; 0 evaluates only before and after
    num_eval: NonNegativeInt = 256  # rows of the evaluation sets that are used; 0 uses all
    eval_samples: NonNegativeInt = 4  # samples of each held-out prompt, the k of pass@k; 0: greedy only
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
            self.eval_dataset = self.eval_dataset or "tiny/data/prompts_eval.jsonl"
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            fail(f"{len(self.reward_weights)} --reward-weights for {len(self.reward)} rewards")
        if self.filter == "threshold" and self.threshold is None:
            fail("--filter threshold needs --threshold: from which reward on is an answer kept?")
        if not self.num_rounds and not (self.eval_dataset and self.eval_samples):
            fail("--num-rounds 0 chooses among --eval-samples answers to --eval-dataset: give both")
        self.num_rounds = min(self.num_rounds, self.max_steps or self.num_rounds)  # a step each, at least
        if "tiny/" not in self.model and self.learning_rate == Args.learning_rate and self.num_rounds:
            say(f"--learning-rate {self.learning_rate} suits tiny/; models of billions take 1e-5")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def weighted_sum(scores: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """Rewards (B,) from the scores (F, B) of F functions, by default 1 each: without NaN, NaN if all are."""
    weighted = scores * torch.tensor(weights or [1.0] * len(scores), dtype=scores.dtype)[:, None]  # (F, B)
    return weighted.nansum(0).masked_fill(scores.isnan().all(0), math.nan)


def reasons_against(group: list[dict], filter: Filter, threshold: float | None, most: int) -> list[str]:
    """Why each of G answers to a prompt is not learnt from, "" for what is: at most `most`, or the best.

    An answer has a `completion`, a `reward` (None: it has none), and whether it `ended` and is `correct`. The
    best come first, equally good ones as they were sampled.
    """
    reasons, kept, bar = [""] * len(group), set(), -math.inf if threshold is None else threshold
    rewards = [-math.inf if row["reward"] is None else row["reward"] for row in group]
    for i in sorted(range(len(group)), key=lambda i: -rewards[i]):
        words = tuple(group[i]["completion"].split())
        checks = {"no reward": group[i]["reward"] is None, "cut off": not group[i]["ended"]}
        checks |= {"wrong": filter == "all_correct" and not group[i]["correct"]}
        checks |= {"below --threshold": rewards[i] < bar, "duplicate": words in kept}
        checks |= {"not among the best": len(kept) == (1 if filter == "top1" else most)}
        reasons[i] = next((reason for reason, holds in checks.items() if holds), "")
        kept |= set() if reasons[i] else {words}
    return reasons


def sft_loss(logprobs: torch.Tensor, batch_tokens: int) -> torch.Tensor:
    """A row's part of the mean negative log-likelihood, logprobs (C,) -> scalar in nats: rows add up.

    `batch_tokens` counts the trained tokens of the optimizer batch, over all rows and processes: what shares
    a row must not change the objective.
    """
    return -logprobs.sum() / batch_tokens


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
    """Sample and train in rounds, or choose among samples, as `args` says, and return the last metrics."""
    device, world_size = setup_distributed(), dist.get_world_size()
    output_dir, tokenizer = choose_output_dir(args), load_tokenizer(args)
    prompts = load_prompts(tokenizer, args.dataset, args.dataset_split, args)
    held_out = load_prompts(tokenizer, args.eval_dataset, args.eval_split, args, args.num_eval)
    longest = max(len(prompt.input_ids) for prompt in prompts + held_out) + args.max_completion_length
    if longest > tokenizer.positions:
        fail(f"--max-completion-length: {longest} tokens with a prompt, {tokenizer.positions} positions")
    some = [prompts[0], *held_out[:1]]
    judges = [load_rewards(specs, some, args, device) for specs in (args.reward, args.eval_reward)]
    num_prompts, rng = args.prompts_per_round or len(prompts), np.random.default_rng(args.seed)
    num_orders = math.ceil((args.num_rounds + 1) * num_prompts / len(prompts))
    stream = np.concatenate([rng.permutation(len(prompts)) for _ in range(num_orders)])
    say(f"first prompt:\n{tokenizer.decode(prompts[0].input_ids)}")

    engine = runpy.run_path(located("rollout_vllm.py"))["find_engine"]() if args.rollout == "vllm" else None
    policy = load_model(args.model, args, device)
    end_ids = end_tokens(tokenizer, policy)
    policy.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id)
    if engine:
        policy.decode = engine(located(args.model), args.vllm_memory, args).decode
    optimizer = loading.adamw(args, policy)
    progress = load_checkpoint(output_dir, policy, optimizer) if args.resume else {}
    step, num_tokens = progress.get("step", 0), progress.get("num_tokens", 0)
    guess = args.num_rounds * math.ceil(args.num_epochs * num_prompts / args.batch_size)  # one kept a prompt
    logger = Logger(args, output_dir, args.max_steps or guess, step)
    metrics, resumed_at, end = {}, step, 0
    if step == 0:
        evaluated, samples = evaluate_best_of_n(policy, tokenizer, held_out, judges, output_dir, args)
        metrics = {"step": 0} | evaluated
        logger.log(metrics, samples)
    for number in range(1, args.num_rounds + 1):
        # 1. Sample: answers of the policy as it is after step `begin`, or the file of a round that has begun
        path, begin = output_dir / f"round_{number}.jsonl", end
        if begin <= resumed_at and path.exists():
            rows = [json.loads(line) for line in path.open()]
        else:
            asked = [prompts[i] for i in stream[(number - 1) * num_prompts : number * num_prompts]]  # P
            rows = sample_round(policy, tokenizer, asked, judges, path, (number, begin), args)  # B
        described = {"round": number} | describe_round(rows)

        # 2. Filter: each row says whether it is kept; the round's steps pass over what is --num-epochs times
        kept = [(row["prompt_ids"], row["completion_ids"]) for row in rows if row["kept"]]
        if not kept:  # of a later round: the policy stays that of the round before
            (say if begin else fail)(f"round {number}: not one of {len(rows):,} answers is kept")
            break
        sequences = [Sequence(np.array(x + y, np.int32), np.arange(len(x + y)) >= len(x)) for x, y in kept]
        lengths = np.array([len(ids) for ids, _ in sequences])
        rng = np.random.default_rng((args.seed, number))
        passes = math.ceil(args.num_epochs * len(kept) / args.batch_size)
        end = args.max_steps * number // args.num_rounds or begin + passes
        num_orders = math.ceil((end - begin) * args.batch_size / len(kept))
        order = np.concatenate([rng.permutation(len(kept)) for _ in range(num_orders)])
        if logger.is_first:
            logger.bar.total = args.max_steps or end + passes * (args.num_rounds - number)
        if step == begin:
            optimizer.state.clear()
            if args.restart:
                policy.load_state_dict(load_model(args.model, args, device).state_dict())

        while step < end:
            # 3. Train: the next answers, packed into rows that are dealt to the processes
            step, started = step + 1, time.perf_counter()
            picks = order[(step - 1 - begin) * args.batch_size : (step - begin) * args.batch_size]
            packed = common.pack(lengths[picks], args.max_tokens_per_micro_batch, multiple_of=world_size)
            batch_tokens = int(lengths[picks].sum())
            num_trained = sum(int(sequences[i].trained.sum()) for i in picks)
            policy.train()
            sums = torch.zeros(3, device=device)  # loss, entropy, processes told to stop
            for row in packed[dist.get_rank() :: world_size]:
                batch = common.collate([sequences[picks[i]] for i in row] or [FILLER], device)
                logprobs, entropy = token_logprobs(policy, batch, return_entropy=True)  # (C,) each
                loss = sft_loss(logprobs, num_trained)
                (loss * world_size).backward()  # FSDP2 averages over processes what is to be summed
                sums[:2] += torch.stack([loss.detach(), entropy.detach().sum()])
            for group in optimizer.param_groups:
                factor = lr_factor(step - begin, end - begin, args.warmup_steps, args.lr_schedule)
                group["lr"] = args.learning_rate * factor
            sums[2] = logger.stopping
            dist.all_reduce(sums)
            loss, entropy, stopping = sums.tolist()
            grad_norm = loading.clip_grad_norm(policy, args.max_grad_norm)
            if not math.isfinite(loss + grad_norm):
                fail(f"step {step}: loss {loss}, gradient norm {grad_norm}; --resume goes to a checkpoint")
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - started
            num_tokens += batch_tokens

            # 4. Evaluate, log, save
            metrics = described | {
                "step": step,
                "epoch": (step - begin) * args.batch_size / len(kept),
                "loss": loss,
                "learning_rate": group["lr"],
                "grad_norm": grad_norm,
                "entropy": entropy / num_trained,
                "num_tokens": num_tokens,
                "tokens_per_second": batch_tokens / seconds,
                "step_time": seconds,
            }
            last, samples = step == end and number == args.num_rounds, []
            if step == end or (args.eval_every and step % args.eval_every == 0):
                evaluated, samples = evaluate_best_of_n(policy, tokenizer, held_out, judges, output_dir, args)
                metrics |= evaluated
            logger.log(metrics, samples)
            if stopping or (args.save_every and (last or step % args.save_every == 0)):
                save_checkpoint(output_dir, policy, optimizer, {"step": step, "num_tokens": num_tokens})
            if stopping and not last:
                logger.close(f"stopped; continue with --resume --output-dir {output_dir}")
                return metrics
    if args.num_rounds:
        save_model(output_dir / "model", policy, tokenizer)
    logger.close(f"{'model' if args.num_rounds else 'samples.jsonl'} saved in {output_dir}")
    return metrics


def sample_round(policy, tokenizer, asked, judges, path, origin, args) -> list[dict]:
    """Answers to each prompt of a round, and why each is kept or not; they are in the file `path`, too."""
    (number, step), count, reasons, started = origin, args.num_generations, [], time.perf_counter()
    found = answer(policy, tokenizer, asked, count, args.temperature, (args.seed, number), judges, args)  # B
    if all(row["reward"] is None for row in found):
        fail(f"--reward {', '.join(judges[0])}: None for every completion of round {number}")
    for n in range(0, len(found), count):
        reasons += reasons_against(found[n : n + count], args.filter, args.threshold, args.max_per_prompt)
    counts = Counter(reason or "kept" for reason in reasons).most_common()
    told = ", ".join(f"{n:,} {reason}" for reason, n in counts)
    say(f"round {number}, {time.perf_counter() - started:.0f} seconds: {told}")
    origin = {"round": number, "step": step, "model": args.model, "seed": args.seed}
    rows = [origin | row | {"kept": not why, "reason": why} for row, why in zip(found, reasons)]
    if dist.get_rank() == 0:
        path.with_suffix(".partial").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path.with_suffix(".partial").rename(path)
    return rows


def evaluate_best_of_n(policy, tokenizer, held_out, judges, output_dir, args) -> tuple[dict, list[dict]]:
    """Rewards of answers to held-out prompts, the best of each; best_of_n.json and .png: choosing among k."""
    if not held_out:
        return {}, []
    size, seed = args.eval_samples or 1, (args.seed, 0)
    rows = best = answer(policy, tokenizer, held_out, 1, 0.0, seed, judges, args)  # P
    metrics = {"eval/greedy_reward": mean_of(rows, "gold_reward")}
    if args.eval_samples:
        rows = answer(policy, tokenizer, held_out, size, args.temperature, seed, judges, args)  # P N
        metrics["eval/reward"], table, best = mean_of(rows, "gold_reward"), best_of_k(rows, size), []
        metrics |= {f"eval/{name}": line[name] for line in table[-1:] for name in line if "@k" in name}
        for group in (rows[n : n + size] for n in range(0, len(rows), size)):
            top = max(group, key=lambda row: -math.inf if row["reward"] is None else row["reward"])
            best.append(top | {"majority": Counter(row["final"] for row in group).most_common(1)[0][0]})
        for line in table:
            say("  " + "  ".join(f"{name} {value:<6.4g}" for name, value in line.items()))
        if table and dist.get_rank() == 0:
            (output_dir / "best_of_n.json").write_text(json.dumps(table, indent=2))
            figure, names = Figure(), [name for name in table[0] if "@k" in name]
            axes = figure.add_subplot(xscale="log", xlabel="k")
            axes.plot([line["k"] for line in table], [[line[name] for name in names] for line in table], ".-")
            axes.legend(names)
            figure.savefig(output_dir / "best_of_n.png")
    return metrics, [row | {"prompt": tokenizer.decode(row["prompt_ids"])} for row in best]


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
# What is asked: token ids, the dataset row with its prompt (text or messages), where that stands.
Prompt = namedtuple("Prompt", ["input_ids", "row", "place"])
# An answer as it was sampled: token ids, log-probs under the sampler, text, whether an end token came.
Completion = namedtuple("Completion", ["prompt", "token_ids", "logprobs", "text", "ended"])
Sequence = namedtuple("Sequence", ["input_ids", "trained"])  # token ids and which of them are trained
FILLER = Sequence(np.zeros(1, np.int32), np.zeros(1, bool))  # for a process that has no row: trains nothing
COLUMNS = ("reward", "loss", "entropy", "sampling/kept_ratio", "grad_norm")  # on the terminal


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


def ask(name: str, rewarder, rollout: list[Completion], args) -> list[float]:
    """What a reward function says of completions, NaN for None; where it fails, that ends the run."""
    try:
        values = list(rewarder(**reward_inputs(rollout, args)))
        numbers = [math.nan if value is None else float(value) for value in values]
        if len(numbers) != len(rollout) or any(map(math.isinf, numbers)) or str in map(type, values):
            raise ValueError(f"not a number for each of {len(rollout)} completions: {values!s:.40}")
        return numbers
    except Exception as error:
        for completion in rollout if len(rollout) > 1 else ():
            ask(name, rewarder, [completion], args)  # ends here at the first row that fails by itself
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error!s:.200}".replace("\n", " ")
        row = rollout[0].prompt.place if len(rollout) == 1 else "no row by itself"
        fail(f"reward {name}: {what} ({row}; {Path(frame.filename).name}, line {frame.lineno})")


def score(rewarders: dict, rollout: list[Completion], group_size: int, args) -> torch.Tensor:
    """Scores (F, B), float64, of each reward function, NaN for None; each process scores whole groups."""
    mine, found = my_share(len(rollout), group_size), {}
    for name, rewarder in rewarders.items() if mine else ():
        found |= zip([(name, i) for i in mine], ask(name, rewarder, [rollout[i] for i in mine], args))
    found = gather(found)
    scores = [[found[name, i] for i in range(len(rollout))] for name in rewarders]
    return torch.tensor(scores, dtype=torch.float64).reshape(len(rewarders), len(rollout))


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


def answer(policy, tokenizer, asked, group_size, temperature, seed, judges, args) -> list[dict]:
    """Sampled answers to prompts, group after group, as rows with what rewards say of them, None for nothing.

    An answer is `correct` if the first reward is 1. Without gold rewards the rewards are gold.
    """
    rollout = roll_out(policy, tokenizer, asked, group_size, temperature, seed, args)  # B
    scores, gold_scores = (score(some, rollout, group_size, args) for some in judges)  # (F, B) each
    rewards = weighted_sum(scores, args.reward_weights)  # (B,)
    columns = {"reward": rewards, "gold_reward": weighted_sum(gold_scores, ()) if judges[1] else rewards}
    columns |= {f"rewards/{name}": values for name, values in zip(judges[0], scores)}
    columns = {name: [None if x != x else x for x in values.tolist()] for name, values in columns.items()}
    final_answer, rows = runpy.run_path(str(HERE / "rewards.py"))["final_answer"], []
    for n, c in enumerate(rollout):
        row = {"prompt": c.prompt.row["prompt"], "completion": c.text, "final": final_answer(c.text)}
        row |= {"place": c.prompt.place, "ended": c.ended, "correct": bool(scores[0, n] == 1)}
        row |= {name: values[n] for name, values in columns.items()}
        rows.append(row | {"prompt_ids": c.prompt.input_ids, "completion_ids": c.token_ids})
    return rows


def describe_round(rows: list[dict]) -> dict:
    """Metrics of the answers of a round."""
    found = {"reward": mean_of(rows, "reward"), "gold_reward": mean_of(rows, "gold_reward")}
    found |= {f"{name}/mean": mean_of(rows, name) for name in rows[0] if name.startswith("rewards/")}
    found["completions/mean_length"] = float(np.mean([len(row["completion_ids"]) for row in rows]))
    found["completions/clipped_ratio"] = 1 - mean_of(rows, "ended")
    return found | {"sampling/kept_ratio": mean_of(rows, "kept")}


def end_tokens(tokenizer, model) -> list[int]:
    """Ids that end an answer: those of the model and tokenizer, and what a chat template writes behind it."""
    ends = {tokenizer.eos_token_id, *np.atleast_1d(model.generation_config.eos_token_id or []).tolist()}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("!")[2]
    behind_ids = tokenizer(behind, add_special_tokens=False).input_ids  # Qwen2.5's base: not its EOS
    return sorted(ends | set(behind_ids[:1]) & set(tokenizer.added_tokens_decoder))


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
        main(tyro.cli(Args))
    except BaseException as error:  # CheckpointException is no Exception
        if not re.search("No space left|unexpected pos", str(error)):  # the latter is PyTorch's word for it
            raise
        fail(f"no space left on the device; what was saved before is whole ({type(error).__name__})")
