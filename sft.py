"""Supervised fine-tuning (SFT): maximum likelihood of the assistant's tokens, given everything before them.

    L(theta) = -1/T sum_t log pi_theta(y_t | x, y_<t)            T: trained tokens of the optimizer batch

The sum runs over the assistant's tokens y of every turn, its end token included; system, user and tool tokens
x are read and not trained. This is step 1 of InstructGPT (arXiv:2203.02155, section 3.1). The loop:

    1. Batch     take the next `--batch-size` sequences and pack them, best fit decreasing, into rows
    2. Loss      log-probs of each row's trained tokens, divided by counts over the whole optimizer batch
    3. Update    clip the gradient, learning-rate schedule, AdamW
    4. Evaluate  held-out loss, sampled answers, forgetting; log; save

Deviations from common practice, each with its reason:
    1. A row holds sequences of one optimizer batch only: what is trained together then does not depend on
       `--max-tokens-per-micro-batch`, which is a memory setting.
    2. Dropout is off: a sequence has the same log-probs in every script and at every stage.
    3. Nothing random has a state: each draw is seeded by the flags and the step, so a run resumes exactly.

    python sft.py                                              # CPU, offline, 3 minutes on one core
    python sft.py --model Qwen/Qwen2.5-1.5B --dataset openai/gsm8k --dataset-config main \
        --eval-dataset openai/gsm8k --learning-rate 1e-5 --batch-size 64 --max-tokens-per-micro-batch 8192

Shapes: N tokens in a row, B sequences, C trained (completion) tokens, H hidden size, V vocabulary.
"""

import atexit
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
from collections import namedtuple
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

HERE = Path(__file__).resolve().parent
Decay = Annotated[float, Field(ge=0, lt=1)]


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@pydantic.dataclasses.dataclass
class Args:
    # Model
    model: str = "tiny/base"  # model to train: a hub id or a folder
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
    dataset_weights: tuple[PositiveFloat, ...] = ()  # their shares (0.95 0.05 replays a little); else by size
    dataset_config: str | None = None  # configuration name of the hub dataset ("main" for openai/gsm8k)
    dataset_split: str = "train"  # split of the hub dataset to train on
    eval_dataset: str | None = None  # held-out dataset; by default tiny/'s if tiny/ is trained on, else none
    eval_split: str = "test"  # split of the hub dataset to evaluate on
    forgetting_dataset: str | None = None  # corpus whose perplexity is measured, too; default as above
    order: Literal["shuffled", "given", "length"] = "shuffled"  # within an epoch; length: short to long
    max_length: PositiveInt = 1024  # longest sequence in tokens; longer ones are dropped and counted
    train_on_prompt: bool = False  # train on every token, not only the assistant's
    ewc_dataset: str | None = None  # what --ewc-coef keeps the model from forgetting, --num-eval rows of it

    # Optimization
    optimizer: loading.Optimizer = "adamw"  # adamw8bit: its moments in 8 bits, a quarter of their memory
    learning_rate: NonNegativeFloat = 1e-3  # peak, for tiny/; models of billions need 1e-5 (SFT) to 1e-6
    lr_schedule: Literal["linear", "cosine", "constant"] = "cosine"  # after warm-up; the first two end at 0
    warmup_steps: NonNegativeInt = 10  # steps over which the learning rate rises linearly from 0
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay rates of AdamW's two moments
    weight_decay: NonNegativeFloat = 0.0  # AdamW's decoupled weight decay, on matrices only
    max_grad_norm: PositiveFloat = 1.0  # larger gradients are scaled down to this norm; inf: no clipping
    batch_size: PositiveInt = 32  # sequences, pairs or completions per step, over all processes
    max_tokens_per_micro_batch: PositiveInt = 8192  # tokens of a packed row: memory only, never the result
    ewc_coef: NonNegativeFloat = 0.0  # weight of the pull back to weights that --ewc-dataset needs (EWC)
    num_epochs: PositiveFloat = 3.0  # passes over the training set or the prompts, if --max-steps is 0
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
        if self.dataset == Args.dataset:
            self.eval_dataset = self.eval_dataset or "tiny/data/sft_eval.jsonl"
            self.forgetting_dataset = self.forgetting_dataset or "tiny/data/text_eval.jsonl"
        if bool(self.ewc_coef) != bool(self.ewc_dataset):
            fail("--ewc-coef and --ewc-dataset go together: how much is kept, and of what")
        if self.dataset_weights and len(self.dataset_weights) != len(self.dataset):
            fail(f"{len(self.dataset_weights)} --dataset-weights for {len(self.dataset)} datasets")
        if "tiny/" not in self.model and self.learning_rate == Args.learning_rate:
            say(f"--learning-rate {self.learning_rate} suits tiny/; models of billions take 1e-5")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def sft_loss(logprobs: torch.Tensor, batch_tokens: int) -> torch.Tensor:
    """A row's part of the mean negative log-likelihood, logprobs (C,) -> scalar in nats: rows add up.

    `batch_tokens` counts the trained tokens of the optimizer batch, over all rows and processes: what shares
    a row must not change the objective.
    """
    return -logprobs.sum() / batch_tokens


def ewc_gradient(weight: torch.Tensor, start: torch.Tensor, fisher: torch.Tensor, ewc_coef: float):
    """That of EWC's penalty, ewc_coef / 2 sum_i F_i (theta_i - theta*_i)^2 (arXiv:1612.00796, Eq. 3)."""
    return ewc_coef * fisher * (weight - start)


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
    if args.max_length + args.max_completion_length > tokenizer.positions:
        fail(f"--max-length and --max-completion-length exceed the model's {tokenizer.positions} positions")
    sources = [load_sequences(tokenizer, name, args.dataset_split, args) for name in args.dataset]
    shares = np.array(args.dataset_weights or [len(source) for source in sources])
    counts = np.rint(shares / shares.sum() * sum(map(len, sources))).astype(int)  # of each in an epoch
    sequences = [source[i * len(source) // n] for source, n in zip(sources, counts) for i in range(n)]
    held_out = load_sequences(tokenizer, args.eval_dataset, args.eval_split, args, args.num_eval)
    forgetting = load_sequences(tokenizer, args.forgetting_dataset, args.eval_split, args, args.num_eval)
    to_keep = load_sequences(tokenizer, args.ewc_dataset, args.dataset_split, args, args.num_eval)
    lengths = np.array([len(sequence.input_ids) for sequence in sequences])
    steps_per_epoch = len(sequences) / args.batch_size
    total_steps = args.max_steps or max(1, math.ceil(args.num_epochs * steps_per_epoch))
    num_epochs, rng = math.ceil(total_steps / steps_per_epoch), np.random.default_rng(args.seed)
    orders = {"shuffled": rng.permutation, "given": np.arange, "length": lambda _: np.argsort(lengths)}
    stream = np.concatenate([orders[args.order](len(sequences)) for _ in range(num_epochs)])
    ids, trained = sequences[stream[0]]
    say(f"first sequence:\n{tokenizer.decode(ids)}\ntrained of it:\n{tokenizer.decode(ids[trained])}")

    model = load_model(args.model, args, device)
    special = {int(ids[-1]) for ids, _ in sequences} & set(tokenizer.added_tokens_decoder)  # ends of replies
    end_ids = sorted(special | {tokenizer.eos_token_id})
    model.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id)
    optimizer = loading.adamw(args, model)
    anchors = fisher_information(model, to_keep, device) if to_keep else []
    step = load_checkpoint(output_dir, model, optimizer).get("step", 0) if args.resume else 0
    logger, metrics = Logger(args, output_dir, total_steps, step), {}
    if step == 0:
        evaluation, samples = evaluate_sequences(model, tokenizer, held_out, forgetting, args, device)
        logger.log({"step": 0} | evaluation, samples)
    while step < total_steps:
        # 1. Batch: the sequences of this optimizer step, packed into rows that are dealt to the processes
        step, started = step + 1, time.perf_counter()
        picks = stream[(step - 1) * args.batch_size : step * args.batch_size]
        rows = common.pack(lengths[picks], args.max_tokens_per_micro_batch, multiple_of=world_size)
        num_tokens = int(lengths[picks].sum())
        num_trained = sum(int(sequences[i].trained.sum()) for i in picks)

        # 2. Loss: each row adds its part of the mean over the whole optimizer batch
        model.train()
        sums = torch.zeros(4, device=device)  # loss, right predictions, entropy, processes told to stop
        for row in rows[dist.get_rank() :: world_size]:
            batch = common.collate([sequences[picks[i]] for i in row] or [FILLER], device)
            logprobs, entropy, is_top1 = token_logprobs(model, batch, return_entropy=True, return_top1=True)
            loss = sft_loss(logprobs, num_trained)
            (loss * world_size).backward()  # FSDP2 averages over processes what is to be summed
            sums[:3] += torch.stack([loss.detach(), is_top1.sum(), entropy.detach().sum()])

        # 3. Update
        for group in optimizer.param_groups:
            factor = lr_factor(step, total_steps, args.warmup_steps, args.lr_schedule)
            group["lr"] = args.learning_rate * factor
        for weight, start, fisher in anchors:
            weight.grad += ewc_gradient(weight.detach(), start, fisher, args.ewc_coef)
        sums[3] = logger.stopping
        dist.all_reduce(sums)
        loss, right, entropy, stopping = sums.tolist()
        grad_norm = loading.clip_grad_norm(model, args.max_grad_norm)
        if not math.isfinite(loss + grad_norm):
            fail(f"step {step}: loss {loss}, gradient norm {grad_norm}; --resume goes back to a checkpoint")
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started

        # 4. Evaluate, log, save
        metrics = {
            "step": step,
            "epoch": step / steps_per_epoch,
            "loss": loss,
            "learning_rate": group["lr"],
            "grad_norm": grad_norm,
            "mean_token_accuracy": right / num_trained,
            "entropy": entropy / num_trained,
            "num_tokens": int(lengths[stream[: step * args.batch_size]].sum()),
            "tokens_per_second": num_tokens / seconds,
            "step_time": seconds,
            "packing/fill": num_tokens / (len(rows) * args.max_tokens_per_micro_batch),
        }
        last, samples = step == total_steps, []
        if last or (args.eval_every and step % args.eval_every == 0):
            evaluation, samples = evaluate_sequences(model, tokenizer, held_out, forgetting, args, device)
            metrics |= evaluation
        logger.log(metrics, samples)
        if stopping or (args.save_every and (last or step % args.save_every == 0)):
            save_checkpoint(output_dir, model, optimizer, {"step": step})
        if stopping and not last:
            logger.close(f"stopped; continue with --resume --output-dir {output_dir}")
            return metrics
    save_model(output_dir / "model", model, tokenizer)
    logger.close(f"model saved to {output_dir / 'model'}")
    return metrics


def fisher_information(model, sequences, device) -> list[tuple]:
    """(weight, its value now, its Fisher information) of all that is trained: mean squared gradients."""
    anchors = [(p, p.detach().clone(), torch.zeros_like(p)) for p in model.parameters() if p.requires_grad]
    for ids, trained in sequences:  # alike in every process
        token_logprobs(model, common.collate([(ids, trained)], device)).sum().backward()
        anchors = [one for one in anchors if one[0].grad is not None]  # without an idle vision tower
        for weight, _, fisher in anchors:
            fisher += weight.grad.square() / len(sequences)
        model.zero_grad()
    return anchors


@torch.no_grad()
def evaluate_sequences(model, tokenizer, held_out, forgetting, args, device) -> tuple[dict, list[dict]]:
    """Loss (nats), its exp and top-1 accuracy on held-out tokens and on what should be kept; samples."""
    model.eval()
    metrics, world_size = {}, dist.get_world_size()
    for name, sequences in (("eval/", held_out), ("eval/forgetting_", forgetting)):
        sums = torch.zeros(3, device=device)  # negative log-likelihood, right predictions, tokens
        lengths = [len(ids) for ids, _ in sequences]
        rows = common.pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)
        for row in rows[dist.get_rank() :: world_size]:
            batch = common.collate([sequences[i] for i in row] or [FILLER], device)
            logprobs, is_top1 = token_logprobs(model, batch, return_top1=True)  # (C,) each
            sums += torch.stack([-logprobs.sum(), is_top1.sum(), torch.ones_like(logprobs).sum()])
        dist.all_reduce(sums)
        loss, accuracy = (sums[:2] / sums[2]).tolist()  # NaN without sequences, which is not logged
        perplexity = math.exp(min(loss, 700))  # floats end at exp(709)
        metrics |= {f"{name}loss": loss, f"{name}token_accuracy": accuracy, f"{name}perplexity": perplexity}
    samples = sample_answers(model, tokenizer, held_out, args, device) if args.max_completion_length else []
    right = [sample["right"] for sample in samples]
    return metrics | {"eval/accuracy": sum(right) / len(right) if right else math.nan}, samples


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


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
Sequence = namedtuple("Sequence", ["input_ids", "trained"])  # token ids and which of them are trained
FILLER = Sequence(np.zeros(1, np.int32), np.zeros(1, bool))  # for a process that has no row: trains nothing
COLUMNS = ("loss", "mean_token_accuracy", "entropy", "grad_norm", "tokens_per_second")  # on the terminal
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
