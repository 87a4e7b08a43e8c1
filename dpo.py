"""Direct preference optimization (DPO): learn which of two answers is preferred, without a reward model.

    L(theta) = -E log sigma( beta log pi(y_w|x) / ref(y_w|x) - beta log pi(y_l|x) / ref(y_l|x) )

Eq. 7 of arXiv:2305.18290: logistic regression on the difference of implicit rewards, beta log pi/ref, of the
chosen answer y_w and the rejected answer y_l to the prompt x. `--loss` has its relatives. The loop:

    0. Reference  log-probs of all pairs under the reference, once; then it leaves the memory
    1. Batch      take the next `--batch-size` pairs and pack them, both answers of a pair in one row
    2. Log-probs  sum them over each answer under the policy
    3. Loss       one number a pair, from the four log-probs; their mean over the whole optimizer batch
    4. Update     clip the gradient, learning-rate schedule, AdamW
    5. Evaluate   accuracy on held-out pairs, sampled answers; log; save

What DPO is known to do besides: the log-prob of the chosen answer may fall, too, so long as the rejected
one's falls faster (likelihood displacement, arXiv:2410.08847). `logps/chosen_drift` always shows it.

Deviations from the paper, each with its reason:
    1. AdamW with the schedule of sft.py in place of RMSprop: TRL's and everybody's choice since.
    2. The mean is over the pairs of the optimizer batch, whatever `--max-tokens-per-micro-batch` is.
    3. `--loss bco` has no running mean of rewards (delta of arXiv:2404.04656, Eq. 10), as in TRL 1.16.

    python dpo.py                                              # CPU, offline, 1 minute on one core
    python dpo.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset trl-lib/ultrafeedback_binarized \
        --eval-dataset trl-lib/ultrafeedback_binarized --beta 0.1 --learning-rate 1e-6 --batch-size 64 \
        --max-length 2048 --max-tokens-per-micro-batch 8192

Shapes: N tokens in a row, P pairs of the run, B of a row, C trained tokens, H hidden size, V vocabulary.
"""

import atexit
import ctypes
import gc
import inspect
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
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import common
import loading
from common import CHATML, check_packed, kl_full, segment_sum, token_logprobs

HERE = Path(__file__).resolve().parent
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
MarginLoss = Literal["sigmoid", "robust", "hinge", "exo", "discopop", "sigmoid_norm", "step_dpo"]
AnswerLoss = Literal["nca", "bco", "sppo", "apo_zero", "apo_down", "dpop", "tdpo2"]  # not of the margin alone


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@pydantic.dataclasses.dataclass
class Args:
    # Model
    model: str = "tiny/sft"  # model to train: a hub id or a folder
    ref_model: str | None = None  # reference model; by default --model as it is before training
    ref: Literal["cached", "live"] = "cached"  # read once before training, or kept in memory
    sync_ref_every: NonNegativeInt = 0  # steps between moves of a live reference (TR-DPO: 512); 0 is never
    sync_ref_alpha: Share = 0.6  # share of the policy in the moved reference (TR-DPO, arXiv:2404.09656: 0.6)
    chat_template: FilePath | None = None  # Jinja chat template to use instead of the tokenizer's own
    attn: str = "packed"  # packed, or flash_attention_2 where it is installed, or eager (exact, slow)
    dtype: loading.Dtype = "bfloat16" if torch.cuda.is_available() else "float32"  # compute precision
    gradient_checkpointing: bool = False  # recompute activations: about 30 % slower, far less memory
    compile: bool = False  # compile each layer with torch.compile
    lora_rank: NonNegativeInt = 0  # train a LoRA of this rank and leave the model as it is; 0: no LoRA
    lora_alpha: PositiveFloat = 32.0  # what a LoRA adds is multiplied by alpha / rank
    lora_target: str = "all-linear"  # layers with a LoRA: all but the head, or a regular expression of names

    # Data
    dataset: tuple[str, ...] = ("tiny/data/preference_train.jsonl",)  # hub ids, files, saved datasets
    dataset_config: str | None = None  # configuration name of the hub dataset ("main" for openai/gsm8k)
    dataset_split: str = "train"  # split of the hub dataset to train on
    eval_dataset: str | None = None  # held-out dataset; by default tiny/'s if tiny/ is trained on, else none
    eval_split: str = "test"  # split of the hub dataset to evaluate on
    max_length: PositiveInt = 1024  # longest sequence in tokens; longer ones are dropped and counted

    # Loss
    loss: MarginLoss | AnswerLoss = "sigmoid"  # DPO's, or a relative: a function with its paper below
    beta: PositiveFloat = 0.5  # tie to the reference: the reward is beta log pi/ref (DPO, TRL: 0.1; 0.5)
    label_smoothing: Decay = 0.0  # share of labels believed flipped (cDPO, robust); EXO's smoothing (1e-3)
    dpop_lambda: NonNegativeFloat = 50.0  # DPOP's penalty on chosen answers (arXiv:2402.13228: 5 to 500)
    discopop_tau: PositiveFloat = 0.05  # temperature of DiscoPOP's switch (arXiv:2406.08414: 0.05)
    tdpo_alpha: NonNegativeFloat = 0.5  # weight of TDPO2's difference of KLs (arXiv:2404.11999: 0.5)
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
        if self.dataset == Args.dataset:
            self.eval_dataset = self.eval_dataset or "tiny/data/preference_eval.jsonl"
        if self.loss == "robust" and self.label_smoothing >= 0.5:
            fail("--loss robust divides by 1 - 2 x --label-smoothing, which must therefore be below 0.5")
        if self.loss == "exo" and self.label_smoothing == 0:
            fail("--loss exo takes the logarithm of --label-smoothing, which must therefore be above 0")
        if self.label_smoothing and self.loss not in ("sigmoid", "step_dpo", "sigmoid_norm", "robust", "exo"):
            fail(f"--label-smoothing means nothing to --loss {self.loss}")
        if self.ref == "cached" and (self.loss == "tdpo2" or self.sync_ref_every):
            fail("--loss tdpo2 and --sync-ref-every need the reference itself: add --ref live")
        if self.ref == "live" and self.lora_rank and not self.ref_model:
            fail("--ref live keeps a second model; with --lora-rank take --ref cached, or name a --ref-model")
        if "tiny/" not in self.model and Args.learning_rate == self.learning_rate:
            say(f"--learning-rate {self.learning_rate} suits tiny/; models of billions take 1e-6, --beta 0.1")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def dpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float, label_smoothing: float = 0.0):
    """DPO of each pair, (B,) from log pi/ref, summed over the tokens, of both of its answers, (B,) in nats.

    Eq. 7 of arXiv:2305.18290. With label_smoothing e it is cDPO, the cross entropy of labels that are wrong
    with probability e (Mitchell 2023, Eq. 3): -(1 - e) log sigma(m) - e log sigma(-m).
    """
    margins = beta * (chosen - rejected)  # (B,) of implicit rewards, Eq. 5
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


# Its relatives, each from the same log-ratios log pi/ref, chosen and rejected (B,), to the loss of each pair,
# (B,). In them m = beta (chosen - rejected) is the margin of a pair.


def robust_loss(chosen, rejected, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """rDPO: unbiased where labels are flipped with probability label_smoothing < 1/2 (arXiv:2403.00409)."""
    right, flipped = (dpo_loss(chosen, rejected, beta=beta, label_smoothing=e) for e in (0, 1))
    return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(chosen, rejected, *, beta: float) -> torch.Tensor:
    """SLiC's hinge on DPO's margin, max(0, 1 - m) (arXiv:2305.10425, so normalized in arXiv:2309.06657)."""
    return F.relu(1 - beta * (chosen - rejected))


def exo_loss(chosen, rejected, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """EXO: KL(policy's preference || smoothed labels), the reverse of DPO's (Eq. 16, arXiv:2402.00856)."""
    margins = beta * (chosen - rejected)  # (B,)
    log_p, log_q = F.logsigmoid(margins), F.logsigmoid(-margins)  # preferred, or not
    right = log_p.exp() * (log_p - math.log1p(-label_smoothing))
    return right + log_q.exp() * (log_q - math.log(label_smoothing))


def nca_loss(chosen, rejected, *, beta: float) -> torch.Tensor:
    """NCA for two answers: raises the chosen reward itself, not only the difference (arXiv:2402.05369)."""
    chosen, rejected = beta * chosen, beta * rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_loss(chosen, rejected, *, beta: float) -> torch.Tensor:
    """BCO: a binary classifier of good and bad answers (arXiv:2404.04656; deviation 3: no shift)."""
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)


def sppo_loss(chosen, rejected, *, beta: float) -> torch.Tensor:
    """SPPO-hard: log-ratios to 1/(2 beta) and -1/(2 beta), each by itself (Eq. 4.7, arXiv:2405.00675)."""
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def apo_zero_loss(chosen, rejected, *, beta: float) -> torch.Tensor:
    """APO-zero: chosen up, rejected down; where chosen answers beat the model's (Eq. 7, arXiv:2408.06266)."""
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(chosen, rejected, *, beta: float) -> torch.Tensor:
    """APO-down: both down, rejected more; where the model beats chosen answers (Eq. 8, arXiv:2408.06266)."""
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))


def discopop_loss(chosen, rejected, *, beta: float, discopop_tau: float) -> torch.Tensor:
    """DiscoPOP: logistic loss and e^-m, mixed by sigma(m / tau) (Eq. 5, arXiv:2406.08414)."""
    margins = beta * (chosen - rejected)  # (B,)
    mixing = torch.sigmoid(margins / discopop_tau)  # (B,)
    return (1 - mixing) * -F.logsigmoid(margins) + mixing * torch.exp(-margins)


def dpop_loss(chosen, rejected, *, beta: float, dpop_lambda: float) -> torch.Tensor:
    """DPO-Positive: takes lambda x what the chosen answer lost to the reference off m (arXiv:2402.13228)."""
    return -F.logsigmoid(beta * (chosen - rejected - dpop_lambda * F.relu(-chosen)))


def tdpo2_loss(chosen, rejected, *, chosen_kls, rejected_kls, beta: float, tdpo_alpha: float) -> torch.Tensor:
    """TDPO2: DPO minus alpha x the difference of sequential KLs, (B,) (arXiv:2404.11999, section 4.3).

    The KLs (B,) are sum_t KL(ref || pi) at each token of an answer; no gradient goes into the chosen one's.
    """
    difference = rejected_kls - chosen_kls.detach()  # (B,)
    return -F.logsigmoid(beta * (chosen - rejected) - tdpo_alpha * beta * difference)


LOSSES = {
    "sigmoid": dpo_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "exo": exo_loss,
    "discopop": discopop_loss,
    "sigmoid_norm": dpo_loss,  # of log-probs averaged over an answer's tokens (Tulu 3, arXiv:2411.15124)
    "step_dpo": dpo_loss,  # of the first step in which the answers differ (arXiv:2406.18629)
    "nca": nca_loss,
    "bco": bco_loss,
    "sppo": sppo_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "dpop": dpop_loss,
    "tdpo2": tdpo2_loss,
}


def preferred(margins: torch.Tensor, tie: float = 1e-4) -> torch.Tensor:
    """1 where the chosen answer has the higher reward, 1/2 in a tie, 0 else: margins (B,) -> (B,).

    Rewards closer than `tie` are equal: in another row a float32 reward differs by 1e-6.
    """
    return (1 + margins.sign() * (margins.abs() > tie)) / 2


@loading.fsdp_forward
def logprobs_and_kls(policy, batch, ref_states, ref_head, chunk_size: int = 512):
    """Of each trained token of a row: log-prob under policy and reference, and KL(ref || policy), (C,) each.

    The reference comes as the states (C, H) that predict the tokens, and its head. Logits exist for
    `chunk_size` tokens at a time and are computed again in the backward pass.
    """
    states, head = common.completion_states(policy, batch), common.head_settings(policy)  # (C, H)
    targets = batch.input_ids[0, batch.completion_index]  # (C,)

    def of_chunk(states, ref_states, targets):
        logits = common.head_logits(states, *head)  # (c, V)
        with torch.no_grad():
            ref_logits = common.head_logits(ref_states, *ref_head)  # (c, V)
        picked = [x.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1) for x in (logits, ref_logits)]
        return *picked, kl_full(ref_logits, logits)

    chunks = zip(*(x.split(chunk_size) for x in (states, ref_states, targets)), strict=True)
    outputs = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def lr_factor(step: int, total_steps: int, warmup_steps: int, lr_schedule: str) -> float:
    """The learning rate of the 1-based `step` as a share of its peak: linear warm-up, then down towards 0."""
    if step <= warmup_steps:
        return step / warmup_steps
    done = (step - warmup_steps - 1) / max(1, total_steps - warmup_steps)  # in [0, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[lr_schedule]


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
MEANS = (*REWARDS, "logps/chosen", "logps/rejected", "logps/chosen_drift")  # over the pairs of a batch


def main(args: Args) -> dict:
    """Train as `args` says and return the last metrics."""
    device, world_size = setup_distributed(), dist.get_world_size()
    output_dir, tokenizer = choose_output_dir(args), load_tokenizer(args)
    if args.ref_model and load_tokenizer(replace(args, model=args.ref_model)).vocab != tokenizer.vocab:
        fail(f"--ref-model {args.ref_model} has another vocabulary than --model {args.model}")
    if args.max_length + args.max_completion_length > tokenizer.positions:
        fail(f"--max-length and --max-completion-length exceed the model's {tokenizer.positions} positions")
    pairs = [pair for name in args.dataset for pair in load_pairs(tokenizer, name, args.dataset_split, args)]
    held_out = load_pairs(tokenizer, args.eval_dataset, args.eval_split, args, args.num_eval)
    special = {int(ids[-1]) for (ids, _), _ in pairs} & set(tokenizer.added_tokens_decoder)  # ends of answers
    end_ids = sorted(special | {tokenizer.eos_token_id})
    if args.loss == "step_dpo":
        pairs, held_out = ([step_only(pair) for pair in some] for some in (pairs, held_out))

    policy = load_model(args.model, args, device)
    policy.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id)
    optimizer = loading.adamw(args, policy)
    ref_policy = policy  # as long as it is not trained
    if args.ref_model or args.ref == "live":
        ref_policy = load_model(args.ref_model or args.model, args, device, frozen=True)
    steps_per_epoch = len(pairs) / args.batch_size
    total_steps = args.max_steps or max(1, math.ceil(args.num_epochs * steps_per_epoch))
    rng, num_epochs = np.random.default_rng(args.seed), math.ceil(total_steps / steps_per_epoch)
    stream = np.concatenate([rng.permutation(len(pairs)) for _ in range(num_epochs)])
    used, stream = np.unique(stream[: total_steps * args.batch_size], return_inverse=True)
    pairs = [pairs[i] for i in used]  # from here on only those that a step meets
    counts = count_tokens(pairs)  # (P, 2) trained tokens
    lengths = np.array([row_length(pair, args) for pair in pairs])  # (P,) tokens in a row
    (chosen_ids, _), (rejected_ids, trained) = pairs[stream[0]]
    say(f"first pair:\n{tokenizer.decode(chosen_ids)}\nrejected:\n{tokenizer.decode(rejected_ids[trained])}")

    answer_tokens = torch.from_numpy(counts).to(device)  # (P, 2)
    # 0. Reference: log-probs (P, 2) of both answers under it and, for their drift, under the starting policy
    ref_logps = start_logps = held_out_logps = None
    if args.ref == "cached" or args.ref_model or args.sync_ref_every:
        start_logps = pair_logps(policy, pairs, args, device)
    if args.ref == "cached":
        held_out_logps = pair_logps(ref_policy, held_out, args, device)
        ref_logps = pair_logps(ref_policy, pairs, args, device) if args.ref_model else start_logps
        ref_policy = None
        gc.collect()  # FSDP's modules refer to each other
    models = {"policy": policy, "ref_policy": ref_policy} if args.sync_ref_every else {"policy": policy}
    moving = torch.nn.ModuleDict(models)  # what a checkpoint holds
    step = load_checkpoint(output_dir, moving, optimizer).get("step", 0) if args.resume else 0
    logger = Logger(args, output_dir, total_steps, step)
    pair_loss, metrics = LOSSES[args.loss], {}
    taken = [name for name in inspect.signature(pair_loss).parameters if hasattr(args, name)]
    pair_loss = partial(pair_loss, **{name: getattr(args, name) for name in taken})
    evaluation = partial(
        evaluate_pairs, policy, ref_policy, tokenizer, held_out, held_out_logps, args, device
    )
    if step == 0:
        evaluated, samples = evaluation()
        logger.log({"step": 0} | evaluated, samples)
    while step < total_steps:
        # 1. Batch: the pairs of this optimizer step, packed into rows that are dealt to the processes
        step, started = step + 1, time.perf_counter()
        picks = stream[(step - 1) * args.batch_size : step * args.batch_size]
        rows = common.pack(lengths[picks], args.max_tokens_per_micro_batch, multiple_of=world_size)
        num_tokens, chosen_tokens = int(lengths[picks].sum()), int(counts[picks, 0].sum())
        policy.train()
        sums = torch.zeros(2 + len(MEANS), device=device)  # processes told to stop, loss, MEANS
        for row in rows[dist.get_rank() :: world_size]:
            # 2. Log-probs: columns (B, 2) are the chosen and the rejected answer of every pair
            batch = collate_pairs([pairs[i] for i in picks[row]], args, device)
            ids = torch.from_numpy(picks[row]).to(device, non_blocking=True)  # (B,)
            logps, live_logps, kls = answer_logps(policy, ref_policy, batch, args.loss)
            logps = logps[: len(ids)]  # none of the filler's
            ref = ref_logps[ids] if ref_policy is None else live_logps[: len(ids)]  # (B, 2)
            start = ref if start_logps is None else start_logps[ids]  # (B, 2)

            # 3. Loss: each row adds its part of the mean over the pairs of the whole optimizer batch
            sizes = answer_tokens[ids] if args.loss == "sigmoid_norm" else 1
            log_ratios = ((logps - ref) / sizes).T  # (2, B)
            losses = pair_loss(*log_ratios, **{name: kl[: len(ids)] for name, kl in kls.items()})  # (B,)
            nll = -logps[:, 0].sum() / chosen_tokens
            loss = losses.sum() / len(picks) + args.sft_coef * nll
            (loss * world_size).backward()  # FSDP2 averages over processes what is to be summed
            with torch.no_grad():
                chosen, rejected = args.beta * log_ratios  # rewards (B,) each
                margins, drift = chosen - rejected, (logps - start)[:, 0]  # (B,)
                means = torch.stack([chosen, rejected, preferred(margins), margins, *logps.T, drift])
                sums[1:] += torch.cat([loss[None], means.sum(1) / len(picks)])

        # 4. Update
        for group in optimizer.param_groups:
            factor = lr_factor(step, total_steps, args.warmup_steps, args.lr_schedule)
            group["lr"] = args.learning_rate * factor
        sums[0] = logger.stopping
        dist.all_reduce(sums)
        stopping, loss, *means = sums.tolist()
        grad_norm = loading.clip_grad_norm(policy, args.max_grad_norm)
        if not math.isfinite(loss + grad_norm):
            fail(f"step {step}: loss {loss}, gradient norm {grad_norm}; --resume goes back to a checkpoint")
        optimizer.step()
        optimizer.zero_grad()
        if args.sync_ref_every and step % args.sync_ref_every == 0:
            move_reference(ref_policy, policy, args.sync_ref_alpha)
        seconds = time.perf_counter() - started

        # 5. Evaluate, log, save
        metrics = {
            "step": step,
            "epoch": step / steps_per_epoch,
            "loss": loss,
            "learning_rate": group["lr"],
            "grad_norm": grad_norm,
            **dict(zip(MEANS, means, strict=True)),
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
            save_checkpoint(output_dir, moving, optimizer, {"step": step})
        if stopping and not last:
            logger.close(f"stopped; continue with --resume --output-dir {output_dir}")
            return metrics
    save_model(output_dir / "model", policy, tokenizer)
    logger.close(f"model saved to {output_dir / 'model'}")
    return metrics


def answer_logps(policy, ref_policy, batch, loss: str):
    """Log-probs (B, 2) of a row's chosen and rejected answers under the policy and, if it is in memory, the
    reference (else None), and the sequential KLs (B,) of both answers where the loss asks for them.
    """
    if loss == "tdpo2":
        with torch.no_grad():
            ref_states = loading.fsdp_forward(common.completion_states, keep=True)(
                ref_policy, batch
            )  # (C, H)
        per_token = logprobs_and_kls(policy, batch, ref_states, common.head_settings(ref_policy))  # (C,) each
        logps, ref_logps, kls = (pair_sums(x, batch) for x in per_token)  # (B, 2) each
        return logps, ref_logps, {"chosen_kls": kls[:, 0], "rejected_kls": kls[:, 1]}
    logps, ref_logps = pair_sums(token_logprobs(policy, batch), batch), None  # (B, 2)
    if ref_policy is not None:
        with torch.no_grad():
            ref_logps = pair_sums(token_logprobs(ref_policy, batch), batch)  # (B, 2)
    return logps, ref_logps, {}


def evaluate_pairs(policy, ref_policy, tokenizer, held_out, ref_logps, args, device) -> tuple[dict, list]:
    """Accuracy on held-out pairs, all and those of equal length; right sampled answers and their length."""
    if not held_out:
        return {}, []
    counts = torch.from_numpy(count_tokens(held_out)).to(device)  # (P, 2)
    logps = pair_logps(policy, held_out, args, device)  # (P, 2)
    if ref_policy is not None:
        ref_logps = pair_logps(ref_policy, held_out, args, device)
    log_ratio = logps - ref_logps  # (P, 2)
    rewards = args.beta * log_ratio / (counts if args.loss == "sigmoid_norm" else 1)  # (P, 2)
    margins = rewards[:, 0] - rewards[:, 1]  # (P,)
    alike = counts.diff().abs().squeeze(1) <= 0.1 * counts.amax(1)  # (P,) by 10 % of the longer one
    metrics = {
        "eval/accuracy": preferred(margins).mean().item(),
        "eval/accuracy_length_matched": preferred(margins)[alike].mean().item(),  # NaN, if there are none
        "eval/margin": margins.mean().item(),
        "eval/chosen_log_ratio": log_ratio[:, 0].mean().item(),
    }
    asked = [pair.chosen for pair in held_out]
    samples = sample_answers(policy, tokenizer, asked, args, device) if args.max_completion_length else []
    if samples:
        lengths = [len(tokenizer(s["completion"], add_special_tokens=False).input_ids) for s in samples]
        right = [sample["right"] for sample in samples]
        metrics |= {"eval/reward": float(np.mean(right)), "eval/mean_length": float(np.mean(lengths))}
    return metrics, samples


@torch.no_grad()
def move_reference(ref_policy, policy, alpha: float):
    """TR-DPO's soft update of the reference: ref <- alpha pi + (1 - alpha) ref (Eq. 5, arXiv:2404.09656).

    Each process moves its own shards; what a forward pass has gathered is given up before, or the next pass
    would use it as it was.
    """
    for model in (ref_policy, policy):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    for ref, new in zip(ref_policy.parameters(), policy.parameters(), strict=True):
        ref, new = (x.to_local() if isinstance(x, DTensor) else x for x in (ref, new))
        ref.copy_(ref.float().lerp(new.float(), alpha))


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
Sequence = namedtuple("Sequence", ["input_ids", "trained"])  # token ids and which of them are trained
Pair = namedtuple("Pair", ["chosen", "rejected"])  # two answers, sequences that begin with the same prompt
FILLER = Sequence(np.zeros(1, np.int32), np.zeros(1, bool))  # for a process that has no row: trains nothing
COLUMNS = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen_drift", "grad_norm")
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


def read_step(row: dict) -> dict:
    """As `read_pair`, the answers cut behind the first step in which they differ (arXiv:2406.18629).

    The lines of an answer are its steps. Where a row has those before in `initial_reason_steps`
    (Math-Step-DPO-10K), an answer is the step itself, and the prompt a question.
    """
    row = {name: value for name, value in row.items() if value is not None}
    if "initial_reason_steps" in row:
        whole = {key: row["initial_reason_steps"] + row[key] for key in Pair._fields}
        return read_pair(row | {"prompt": [{"role": "user", "content": row["prompt"]}]} | whole)
    row = read_pair(row)
    if any(isinstance(row[key], list) and len(row[key]) > 1 for key in Pair._fields):
        raise ValueError("the answers differ in more than one message: there is no step to compare")
    texts = [row[key] if isinstance(row[key], str) else row[key][-1]["content"] for key in Pair._fields]
    chosen, rejected = (text.split("\n") for text in texts)
    if (shared := len_shared(chosen, rejected)) == min(len(chosen), len(rejected)):
        raise ValueError("the steps of one answer begin the other: there is no step to compare")
    cut = {"chosen": "\n".join(chosen[: shared + 1]), "rejected": "\n".join(rejected[: shared + 1])}
    return common.conversational(row | cut)


def load_pairs(tokenizer, source: str | None, split: str, args, limit: int = 0) -> list[Pair]:
    """A preference dataset as pairs, each once; says how many there are, and how answers differ in length."""
    if source is None:
        return []
    rows, found, dropped = load_rows(source, split, args, limit), {}, {}
    for n in tqdm(range(len(rows)), desc=f"tokenize {source}", leave=False, disable=None):
        try:
            row = read_step(rows[n]) if args.loss == "step_dpo" else read_pair(rows[n])
            pair = Pair(*(encode_answer(tokenizer, row["prompt"], row[key], row) for key in Pair._fields))
            key = tuple(answer.input_ids.tobytes() for answer in pair)
            if key[0] == key[1]:
                raise ValueError("chosen and rejected are the same")
            if max(len(answer.input_ids) for answer in pair) > args.max_length:
                raise ValueError("longer than --max-length")
            found[key] = pair
        except Exception as error:  # chat templates raise what they like
            dropped.setdefault(str(error).partition("\n")[0], []).append(n + 1)
    report_dropped(source, len(rows), dropped)
    pairs = list(found.values())
    chosen, rejected = count_tokens(pairs).T  # (P,) each
    sizes = f"{chosen.mean():.1f} and {rejected.mean():.1f} tokens an answer"
    longer = f"chosen ones longer in {np.mean(chosen > rejected):.0%}"
    say(f"{source}: {len(pairs):,} different pairs, {sizes}, {longer}")
    return pairs


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


def step_only(pair: Pair) -> Pair:
    """Train only what follows the tokens that both answers share, and no end token: an answer goes on.

    Where one step is the beginning of the other, its last token stays trained, too, so that both have one.
    """
    chosen, rejected = (Sequence(*(x[:-1] for x in answer)) for answer in pair)
    both = [answer.input_ids.tolist() for answer in (chosen, rejected)]
    shared = min(len_shared(*both), *(len(ids) - 1 for ids in both))
    steps = [(ids, trained & (np.arange(len(ids)) >= shared)) for ids, trained in (chosen, rejected)]
    return Pair(*(Sequence(*step) for step in steps))


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
