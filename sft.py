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

    python sft.py                                              # CPU, offline, 3 minutes on 2 cores
    python sft.py --model Qwen/Qwen2.5-1.5B --dataset openai/gsm8k --dataset-config main \
        --eval-dataset openai/gsm8k --learning-rate 1e-5 --batch-size 64 --max-tokens-per-micro-batch 16384

Shapes: N tokens in a row, B sequences, C trained (completion) tokens, H hidden size, V vocabulary.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
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
    # Model
    model: str = "tiny/base"
    """Model to fine-tune: a hub id or a folder."""
    chat_template: str | None = None
    """File with a Jinja chat template to use instead of the tokenizer's own."""
    add_special_tokens: tuple[str, ...] = ()
    """New special tokens; their embeddings start as the mean of the old ones."""
    attn: str = "packed"
    """Attention: packed, or flash_attention_2 where it is installed, or eager (exact, slow)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about 30 % slower, far less memory, the same result."""
    compile: bool = False
    """Compile each layer with torch.compile."""

    # Data
    dataset: tuple[str, ...] = ("tiny/data/sft_train.jsonl",)
    """Hub ids or local .jsonl/.json/.parquet/.csv files or saved datasets."""
    dataset_weights: tuple[float, ...] = ()
    """Share of each dataset in the mixture; by default each counts by its size."""
    dataset_config: str | None = None
    """Configuration name of the hub dataset ("main" for openai/gsm8k)."""
    dataset_split: str = "train"
    """Split of the hub dataset to train on."""
    eval_dataset: str | None = None
    """Held-out dataset; by default the one of tiny/ if tiny/ is trained on, else none."""
    eval_split: str = "test"
    """Split of the hub dataset to evaluate on."""
    replay_dataset: str | None = None
    """Dataset of what the model must not forget, mixed into the training set."""
    replay_fraction: float = 0.1
    """Share of sequences that come from --replay-dataset (0.01 to 0.1 in practice: arXiv:2403.08763)."""
    forgetting_dataset: str | None = None
    """Corpus whose perplexity is measured before and after; by default tiny/'s if tiny/ is trained on."""
    order: Literal["shuffled", "given", "length"] = "shuffled"
    """Order of the sequences within an epoch; `length` goes from short to long (a curriculum)."""
    dedupe: bool = True
    """Drop sequences that repeat an earlier one exactly."""
    max_length: int = 1024
    """Longest sequence in tokens (TRL: 1024)."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to longer sequences; both are counted in the log."""
    train_on_prompt: bool = False
    """Train on every token, not only the assistant's."""
    train_on_system: bool = False
    """Train on the system message, too."""

    # Loss
    loss: Literal["nll", "dft"] = "nll"
    """Negative log-likelihood, or dynamic fine-tuning: weighted by the probability (arXiv:2508.05629)."""
    loss_agg: Literal["token_mean", "seq_mean_token_mean"] = "token_mean"
    """Mean over all trained tokens (long answers weigh more), or over sequences of each one's token mean."""
    neftune_alpha: float = 0.0
    """Scale of uniform noise on the input embeddings (NEFTune, arXiv:2310.05914: 5 to 15); 0 is off."""

    # Optimization
    learning_rate: float = 1e-3
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
    max_tokens_per_micro_batch: int = 8192
    """Tokens of a packed row: memory only, never the result. A longer sequence gets its own row."""
    num_epochs: float = 3.0
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
        on_tiny = self.dataset == ("tiny/data/sft_train.jsonl",)
        self.eval_dataset = self.eval_dataset or ("tiny/data/sft_eval.jsonl" if on_tiny else None)
        self.forgetting_dataset = self.forgetting_dataset or (
            "tiny/data/text_eval.jsonl" if on_tiny else None
        )
        check_flags(self)
        if self.dataset_weights and len(self.dataset_weights) != len(self.dataset):
            fail(
                f"--dataset-weights has {len(self.dataset_weights)} numbers for {len(self.dataset)} datasets"
            )
        if any(weight <= 0 for weight in self.dataset_weights):
            fail("--dataset-weights must be above 0: leave a dataset out instead")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def nll_loss(logprobs: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each token: logprobs (C,) -> (C,) in nats."""
    return -logprobs


def dft_loss(logprobs: torch.Tensor) -> torch.Tensor:
    """Dynamic fine-tuning (arXiv:2508.05629, Eq. 9): -sg(pi) log pi of each token, logprobs (C,) -> (C,).

    The gradient of log pi is grad pi / pi: the factor takes away the 1/pi that lets unlikely tokens dominate.
    """
    return -logprobs.detach().exp() * logprobs


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


def neftune_noise(lengths, generators, hidden_size: int, alpha: float) -> torch.Tensor:
    """Uniform noise in [-1, 1] alpha / sqrt(L H) for sequences of L tokens -> (N, H) (arXiv:2310.05914).

    Each sequence has its own generator, so that its noise does not depend on the row that it was packed into.
    """
    noise = []
    for length, generator in zip(lengths, generators, strict=True):
        uniform = torch.rand(length, hidden_size, generator=generator, device=generator.device)  # (L, H)
        noise.append((2 * uniform - 1) * alpha / math.sqrt(length * hidden_size))
    return torch.cat(noise)


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
    "mean_token_accuracy": ".3f",
    "grad_norm": ".2f",
    "learning_rate": ".1e",
    "tokens_per_second": ",.0f",
}


def main(args: Args) -> dict:
    """Train as `args` says and return the last metrics."""
    rank, world_size, device = setup_distributed()
    torch.manual_seed(args.seed)
    output_dir = choose_output_dir(args, "sft")
    tokenizer = load_tokenizer(args)
    tokenizer.add_tokens(list(args.add_special_tokens), special_tokens=True)
    sources, shares, epoch_size = load_mixture(tokenizer, args)
    sequences = [sequence for source in sources for sequence in source]
    lengths = np.array([len(sequence.input_ids) for sequence in sequences])
    held_out = load_sequences(tokenizer, args.eval_dataset, args.eval_split, args, args.num_eval)
    forgetting = load_sequences(tokenizer, args.forgetting_dataset, args.eval_split, args, args.num_eval)
    total_steps = args.max_steps or max(1, math.ceil(args.num_epochs * epoch_size / args.batch_size))
    num_epochs = math.ceil(total_steps * args.batch_size / epoch_size)
    stream = data_order(lengths, sources, shares, epoch_size, num_epochs, args.order, args.seed)
    show_sequence(tokenizer, sequences[stream[0]])

    model = load_model(args.model, args, tokenizer, device)
    optimizer = make_optimizer(model, args)
    hidden_size = model.config.get_text_config().hidden_size
    row_size = args.max_tokens_per_micro_batch
    token_loss = {"nll": nll_loss, "dft": dft_loss}[args.loss]
    step, num_tokens = load_checkpoint(output_dir, model, optimizer) if args.resume else (0, 0)
    logger = Logger(args, output_dir, total_steps, step, COLUMNS)
    metrics = {}
    if step == 0:
        evaluation, samples = evaluate(model, tokenizer, held_out, forgetting, args, device)
        logger.log({"step": 0} | evaluation, samples)
    while step < total_steps:
        # 1. Batch: the sequences of this optimizer step, packed into rows that are dealt to the processes
        step, started = step + 1, time.perf_counter()
        picks = stream[(step - 1) * args.batch_size : step * args.batch_size]
        batch_lengths = lengths[picks]
        rows = pack(batch_lengths, row_size, multiple_of=world_size)
        batch_tokens = sum(int(sequences[i].trained.sum()) for i in picks)
        counts = {"batch_tokens": batch_tokens, "batch_sequences": len(picks)}

        # 2. Loss: each row adds its part of the mean over the whole optimizer batch
        model.train()
        sums = torch.zeros(4, device=device)  # loss, right predictions, entropy, processes told to stop
        for row in rows[rank::world_size]:
            batch = collate([sequences[picks[i]] for i in row] or [FILLER], device)
            noise = None
            if args.neftune_alpha and row:
                generators = [torch.Generator(device).manual_seed(hash((args.seed, step, i))) for i in row]
                noise = neftune_noise(batch.lengths, generators, hidden_size, args.neftune_alpha)  # (N, H)
            logprobs, entropy, is_top1 = token_logprobs(
                model, batch, return_entropy=True, return_top1=True, embedding_noise=noise
            )  # (C,) each
            loss = aggregate(token_loss(logprobs), batch, **counts, loss_agg=args.loss_agg)
            (loss * world_size).backward()  # FSDP2 averages over processes what is to be summed
            sums[:3] += torch.stack([loss.detach(), is_top1.sum(), entropy.detach().sum()])

        # 3. Update
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * lr_factor(
                step, total_steps=total_steps, warmup_steps=args.warmup_steps, lr_schedule=args.lr_schedule
            )
        sums[3] = logger.stopping
        results = torch.cat([all_reduce(sums), full(grad_norm)[None]])
        loss, right, entropy, stopping, grad_norm = results.tolist()  # the one synchronisation of a step
        if not math.isfinite(loss + grad_norm):
            stop_on_nonfinite(output_dir, step, [sequences[i] for i in picks], loss, grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started

        # 4. Evaluate, log, save
        num_tokens += int(batch_lengths.sum())
        metrics = {
            "step": step,
            "epoch": step * args.batch_size / epoch_size,
            "loss": loss,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            "mean_token_accuracy": right / batch_tokens,
            "entropy": entropy / batch_tokens,
            "num_tokens": num_tokens,
            "tokens_per_second": int(batch_lengths.sum()) / seconds,
            "step_time": seconds,
            "packing/fill": batch_lengths.sum() / (len(rows) * max(row_size, *batch_lengths)),
        }
        if device.type == "cuda":
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        samples = []
        if step == total_steps or (args.eval_every and step % args.eval_every == 0):
            evaluation, samples = evaluate(model, tokenizer, held_out, forgetting, args, device)
            metrics |= evaluation
        logger.log(metrics, samples)
        if stopping or (args.save_every and (step == total_steps or step % args.save_every == 0)):
            save_checkpoint(output_dir, model, optimizer, step, num_tokens, args.keep_checkpoints)
        if stopping and step < total_steps:
            logger.close(f"stopped; continue with --resume --output-dir {output_dir}")
            return metrics
    save_model(output_dir / "model", model, tokenizer)
    logger.close(f"model saved to {output_dir / 'model'}")
    return metrics


def evaluate(model, tokenizer, held_out, forgetting, args, device) -> tuple[dict, list[dict]]:
    """Held-out loss and accuracy, perplexity of the forgetting corpus, share of right sampled answers."""
    metrics = {}
    if held_out:
        metrics["eval/loss"], metrics["eval/token_accuracy"] = held_out_loss(model, held_out, args, device)
        metrics["eval/perplexity"] = perplexity(metrics["eval/loss"])
    if forgetting:
        metrics["eval/forgetting_perplexity"] = perplexity(held_out_loss(model, forgetting, args, device)[0])
    samples = sample_answers(model, tokenizer, held_out, args, device)
    if samples:
        metrics["eval/accuracy"] = sum(sample["right"] for sample in samples) / len(samples)
    return metrics, samples


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats, capped where a float ends."""
    return math.exp(min(loss, 709.0))


@torch.no_grad()
def held_out_loss(model, sequences, args, device) -> tuple[float, float]:
    """Mean negative log-likelihood (nats) and top-1 accuracy over the trained tokens of the sequences."""
    model.eval()
    rank, world_size = process()
    sums = torch.zeros(3, device=device)  # negative log-likelihood, right predictions, tokens
    lengths = [len(sequence.input_ids) for sequence in sequences]
    rows = pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)
    for row in rows[rank::world_size]:
        batch = collate([sequences[i] for i in row] or [FILLER], device)
        logprobs, is_top1 = token_logprobs(model, batch, return_top1=True)  # (C,) each
        sums += torch.stack([-logprobs.sum(), is_top1.sum(), torch.ones_like(logprobs).sum()])
    loss, right, count = all_reduce(sums).tolist()
    return loss / count, right / count


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
class Sequence(NamedTuple):
    """Token ids and which of them are trained, both (length,)."""

    input_ids: np.ndarray
    trained: np.ndarray


FILLER = Sequence(np.zeros(1, np.int32), np.zeros(1, bool))  # for a process that has no row: trains nothing
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


def load_mixture(tokenizer, args) -> tuple[list[list[Sequence]], list[float], int]:
    """The training sets, the replay set last: their sequences, their shares of an epoch, and its sequences.

    An epoch holds as many sequences as the training sets, and those of the replay set beside them.
    """
    sources = [load_sequences(tokenizer, source, args.dataset_split, args) for source in args.dataset]
    shares, epoch_size = args.dataset_weights or [len(s) for s in sources], sum(len(s) for s in sources)
    if args.replay_dataset:
        sources.append(load_sequences(tokenizer, args.replay_dataset, args.dataset_split, args))
        beside = args.replay_fraction / (1 - args.replay_fraction)  # replayed ones to each of the others
        shares, epoch_size = [*shares, sum(shares) * beside], round(epoch_size * (1 + beside))
    return sources, shares, epoch_size


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
