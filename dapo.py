"""Decoupled clip and dynamic sampling policy optimization (DAPO): GRPO with four changes.

    J = E[ 1 / sum_i |o_i|  sum_i sum_t min( rho_it A_i, clip(rho_it, 1 - eps_low, 1 + eps_high) A_i ) ]
        subject to  0 < |{ o_i is right }| < G                                     Eq. 8, arXiv:2503.14476

A and rho are those of grpo.py; `diff grpo.py dapo.py` shows the changes, (a) to (d). The loop:

    1. Rollout    sample G completions of each prompt until P groups have rewards that differ: groups that
                  are all right or all wrong teach nothing (b: dynamic sampling)
    2. Reward     the functions and reward models of --reward, and a punishment of long completions (d: soft
                  overlong punishment; or --mask-truncated leaves those that are cut off out of the loss)
    3. Advantage  compare each completion with its group
    4. Update     policy gradient, clipped higher above than below, so that unlikely tokens may rise (a:
                  clip-higher); every token of the batch counts the same (c: token-level loss); no KL
    5. Evaluate   sampled and greedy answers to held-out prompts; log; save

Deviations from the paper, each with its reason:
    1. A round samples as many prompts as should fill the batch at the share kept of late. Kept groups beyond
       it, at most half a batch, are trained on in the next step (pi_old is the policy that sampled them):
       little is thrown away. After 1 + --max-resamples batches a step trains on what it has, and says so.
    2. The filter looks at the weighted rewards without the punishment of length; the paper's at accuracy.
       A group that is all wrong has nothing to teach, however different its lengths.
    3. A completion without a reward (None) is not trained on, and no mean counts it.

    python dapo.py                                             # CPU, offline, 4 minutes on one core
    python dapo.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k --dataset-config main \
        --learning-rate 1e-6 --batch-size 512 --max-completion-length 1024 --overlong-buffer 256 \
        --max-tokens-per-micro-batch 8192

Shapes: P prompts, G completions of each, B = P G, N tokens in a row, C completion tokens, F rewards.
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
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from itertools import groupby
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
import transformers
import tyro
from matplotlib.figure import Figure
from pydantic import Field, FilePath, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import common
import loading
from common import CHATML, KL, check_packed, token_logprobs

HERE = Path(__file__).resolve().parent
Decay = Annotated[float, Field(ge=0, lt=1)]
Aggregation = Literal["seq_mean_token_mean", "token_mean", "seq_mean_token_sum_norm"]


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

    # Rollout
    num_generations: Annotated[int, Field(ge=2)] = 8  # completions of each prompt: the group (TRL: 8)
    max_completion_length: PositiveInt = 128  # longest sampled answer in tokens
    temperature: PositiveFloat = 1.0  # sampling temperature
    max_tokens_per_rollout: PositiveInt = 65536  # tokens that are sampled at once: memory, never the result
    rollout: Literal["transformers", "vllm"] = "transformers"  # sampling engine, in this process
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.4  # share of a GPU's memory that vLLM may take
    overlong_buffer: NonNegativeInt = 32  # last tokens over which a punishment rises to 1 (Eq. 13); 0: none
    max_resamples: NonNegativeInt = 10  # further batches a step may sample; 0 keeps all groups (verl: 10)
    mask_truncated: bool = False  # do not train on completions that --max-completion-length cut off

    # Loss
    loss_agg: Aggregation = "token_mean"  # a token counts 1 / its length (GRPO), 1 (DAPO), 1 / longest
    scale_rewards: Literal["group", "batch", "none"] = "group"  # whose deviation advantages are divided by
    epsilon: PositiveFloat = 0.2  # ratios are clipped at 1 - epsilon (arXiv:1707.06347: 0.2)
    epsilon_high: PositiveFloat = 0.28  # and at 1 + this (arXiv:2503.14476: 0.28)
    tis_cap: NonNegativeFloat = 0.0  # cap of weights old / sampler (TIS: 2); 0 trusts the sampler's log-probs
    max_kl: PositiveFloat | None = None  # stop after a step whose mean KL to the reference is above (nats)
    num_iterations: PositiveInt = 1  # passes over a rollout (GRPO's mu)
    num_minibatches: PositiveInt = 1  # optimizer updates that a pass over a rollout is cut into

    # Optimization
    optimizer: loading.Optimizer = "adamw"  # adamw8bit: its moments in 8 bits, a quarter of their memory
    learning_rate: NonNegativeFloat = 1e-4  # peak, for tiny/; models of billions need 1e-5 (SFT) to 1e-6
    lr_schedule: Literal["linear", "cosine", "constant"] = "constant"  # after warm-up; the first two end at 0
    warmup_steps: NonNegativeInt = 5  # steps over which the learning rate rises linearly from 0
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay rates of AdamW's two moments
    weight_decay: NonNegativeFloat = 0.0  # AdamW's decoupled weight decay, on matrices only
    max_grad_norm: PositiveFloat = 1.0  # larger gradients are scaled down to this norm; inf: no clipping
    batch_size: PositiveInt = 128  # sequences, pairs or completions per step, over all processes
    max_tokens_per_micro_batch: PositiveInt = 1024  # tokens of a packed row: memory only, never the result
    num_epochs: PositiveFloat = 1.0  # passes over the training set or the prompts, if --max-steps is 0
    max_steps: NonNegativeInt = 120  # steps, or rollouts; 0 derives them from --num-epochs

    # Evaluation and output
    eval_every: NonNegativeInt = 40  # steps between evaluations; 0 evaluates only before and after
    num_eval: NonNegativeInt = 256  # rows of the evaluation sets that are used; 0 uses all
    eval_samples: NonNegativeInt = 4  # samples of each held-out prompt, the k of pass@k; 0: greedy only
    seed: NonNegativeInt = 1  # of the data order and the sampling
    output_dir: str | None = None  # new folder of the run; by default runs/<script>_<seed>_<time>
    resume: bool = False  # continue the run in --output-dir from its last checkpoint
    save_every: NonNegativeInt = 500  # steps between checkpoints; 0 saves only on SIGTERM or Ctrl-C
    log_every: PositiveInt = 5  # steps between lines on the terminal; metrics.jsonl has one line a step
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
        if self.batch_size % self.num_generations:
            fail(f"--batch-size {self.batch_size} is no multiple of --num-generations {self.num_generations}")
        if self.batch_size // self.num_generations < self.num_minibatches:
            fail(f"--num-minibatches {self.num_minibatches}: more than the prompts of a step")
        if self.overlong_buffer > self.max_completion_length:
            fail(f"--overlong-buffer {self.overlong_buffer} is longer than --max-completion-length")
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            fail(f"{len(self.reward_weights)} --reward-weights for {len(self.reward)} rewards")
        if "tiny/" not in self.model and self.learning_rate == Args.learning_rate:
            say(f"--learning-rate {self.learning_rate} suits tiny/; models of billions take 1e-6")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def weighted_sum(scores: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """Rewards (B,) from the scores (F, B) of F functions, by default 1 each: without NaN, NaN if all are."""
    weighted = scores * torch.tensor(weights or [1.0] * len(scores), dtype=scores.dtype)[:, None]  # (F, B)
    return weighted.nansum(0).masked_fill(scores.isnan().all(0), math.nan)


def group_advantages(rewards: torch.Tensor, scale: str = "group") -> torch.Tensor:
    """Advantages (P, G) of G completions of each of P prompts from their rewards (P, G), NaN if none.

    r - mean of its group, divided by the standard deviation of the `group` (section 4.1.2, arXiv:2402.03300),
    of the `batch`, or by `none` (arXiv:2503.20783, section 3.2: the division favours prompts of which nearly
    all or nearly no completions are right). Deviations are unbiased (n - 1). In float64: equal rewards give
    exactly 0, and so does a completion without a reward, which is left out of mean and deviation.
    """
    rewards = rewards.double()
    known = ~rewards.isnan()  # (P, G)
    differ = rewards.nan_to_num(math.inf).amin(1) < rewards.nan_to_num(-math.inf).amax(1)  # (P,)
    centred = (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num(0)  # (P, G)
    centred = centred * differ[:, None]  # where all are equal, it is the rounding of their mean
    if scale == "none":
        return centred.float()
    std = (centred.square().sum(1) / (known.sum(1) - 1)).sqrt()[:, None]  # (P, 1)
    if scale == "batch":
        std = rewards[known].std(unbiased=True)
    return (centred / (std + 1e-4)).nan_to_num(0).float()  # std + 1e-4: TRL; 0 / 0 where one reward is known


def dapo_loss(ratio, advantages, epsilon: float, epsilon_high: float) -> torch.Tensor:
    """-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A), (C,) (Eq. 8, arXiv:2503.14476)."""
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)  # (C,)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def overlong_punishment(lengths: torch.Tensor, longest: int, buffer: int) -> torch.Tensor:
    """Punishment (B,) of `lengths` (B,): 0, then linearly to -1 over the last `buffer` tokens (Eq. 13)."""
    return -((lengths - longest + buffer) / max(1, buffer)).clamp(0, 1) * bool(buffer)


def with_signal(rewards: torch.Tensor) -> torch.Tensor:
    """Which groups (P,) have rewards (P, G) that differ, by more than rounding: others have no advantage."""
    return rewards.nan_to_num(-math.inf).amax(1) - rewards.nan_to_num(math.inf).amin(1) > 1e-6


def token_weights(lengths: torch.Tensor, loss_agg: Aggregation, max_completion_length: int) -> torch.Tensor:
    """What each token of the B completions of an optimizer batch counts, (B,) from their `lengths` (B,).

    The loss is the weighted sum: a mean of sequence means (GRPO), in which a token of a long answer counts
    less; a mean over all tokens (DAPO, Eq. 8, arXiv:2503.14476); or a sum over a constant (Dr. GRPO).
    """
    lengths = lengths.float()
    if loss_agg == "token_mean":
        return torch.ones_like(lengths) / lengths.sum()
    if loss_agg == "seq_mean_token_sum_norm":
        return torch.ones_like(lengths) / (len(lengths) * max_completion_length)
    return 1 / (len(lengths) * lengths)


def distinct_ngrams(group: list[list[int]], n: int = 2) -> float:
    """Share of n-grams of a group of completions that are different (distinct-n, arXiv:1510.03055)."""
    grams = [tuple(ids[i : i + n]) for ids in group for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


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
    prompts = load_prompts(tokenizer, args.dataset, args.dataset_split, args)
    held_out = load_prompts(tokenizer, args.eval_dataset, args.eval_split, args, args.num_eval)
    longest = max(len(prompt.input_ids) for prompt in prompts + held_out) + args.max_completion_length
    if longest > tokenizer.positions:
        fail(f"--max-completion-length: {longest} tokens with a prompt, {tokenizer.positions} positions")
    rewarders = load_rewards(args.reward, [prompts[0], *held_out[:1]], args, device)
    gold_rewarders = load_rewards(args.eval_reward, [prompts[0], *held_out[:1]], args, device)
    group_size, num_prompts = args.num_generations, args.batch_size // args.num_generations
    total_steps = args.max_steps or max(1, math.ceil(args.num_epochs * len(prompts) / num_prompts))
    most_prompts = num_prompts * (1 + args.max_resamples)  # that a step may sample
    rng, num_epochs = np.random.default_rng(args.seed), math.ceil(total_steps * most_prompts / len(prompts))
    stream = np.concatenate([rng.permutation(len(prompts)) for _ in range(num_epochs)])
    say(f"first prompt:\n{tokenizer.decode(prompts[stream[0]].input_ids)}")

    engine = runpy.run_path(located("rollout_vllm.py"))["find_engine"]() if args.rollout == "vllm" else None
    policy = load_model(args.model, args, device)
    end_ids = end_tokens(tokenizer, policy)
    policy.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id)
    if engine:
        policy.decode = engine(located(args.model), args.vllm_memory, args).decode
    optimizer = loading.adamw(args, policy)
    kl_every = 1 if args.max_kl else args.log_every  # a metric alone is worth less
    if args.lora_rank and not args.ref_model:
        ref_policy = loading.WithoutLora(policy)
    elif kl_every <= total_steps:
        ref_policy = load_model(args.ref_model or args.model, args, device, frozen=True)
    progress = load_checkpoint(output_dir, policy, optimizer) if args.resume else {}
    step, num_tokens = progress.get("step", 0), progress.get("num_tokens", 0)
    cursor, recent = progress.get("cursor", 0), progress.get("recent", [])  # in the stream; had it a signal?
    surplus_rewards = torch.tensor(progress.get("surplus_rewards", []), dtype=torch.float64)
    surplus = [Completion(*fields) for fields in progress.get("surplus", [])]
    surplus = [c._replace(prompt=prompts[c.prompt], logprobs=torch.tensor(c.logprobs)) for c in surplus]
    logger = Logger(args, output_dir, total_steps, step)
    logprobs_of = partial(token_logprobs, temperature=args.temperature)
    evaluation = partial(evaluate, policy, tokenizer, held_out, rewarders, gold_rewarders, args)
    metrics, updates = {}, args.num_iterations * args.num_minibatches
    if step == 0:
        evaluated, samples = evaluation()
        logger.log({"step": 0} | evaluated, samples)
    while step < total_steps:
        # 1. Rollout: G completions of each prompt, from the policy as it is, until P groups have a signal
        step, started, rounds, limit = step + 1, time.perf_counter(), 0, cursor + most_prompts
        rollout, rewards = surplus, surplus_rewards  # of the policy before, (B,) at the end
        carried = torch.arange(args.batch_size, device=device) < len(rollout)  # (B,)
        sampled, scores = [], torch.zeros(len(rewarders), 0)  # (F, sampled): with groups that are dropped
        while len(rollout) < args.batch_size and cursor < limit:
            share = max(0.1, np.mean(recent or [1]))  # of groups that have a signal
            size = math.ceil((num_prompts - len(rollout) // group_size) / share)
            asked = [prompts[i] for i in stream[cursor : min(cursor + size, limit)]]
            seed, rounds, cursor = (args.seed, step, rounds), rounds + 1, cursor + len(asked)
            found = roll_out(policy, tokenizer, asked, group_size, args.temperature, seed, args)
            found_scores = score(rewarders, found, group_size, args)  # (F, found)
            found_rewards = weighted_sum(found_scores, args.reward_weights)  # (found,)
            if not recent and found_rewards.isnan().all():
                fail(f"--reward {', '.join(rewarders)}: None for every completion of the first rollout")
            kept = with_signal(found_rewards.view(-1, group_size)) | (args.max_resamples == 0)  # (asked,)
            recent = (recent + kept.tolist())[-4 * num_prompts :]
            ids = kept.repeat_interleave(group_size).nonzero().flatten().tolist()
            rollout, rewards = rollout + [found[i] for i in ids], torch.cat([rewards, found_rewards[ids]])
            sampled, scores = sampled + found, torch.cat([scores, found_scores], 1)
        if len(rollout) < args.batch_size:
            say(f"step {step}: {len(rollout) // group_size} of {num_prompts} groups have a signal")
        spare = slice(args.batch_size, args.batch_size + num_prompts // 2 * group_size)
        surplus, surplus_rewards, rollout = rollout[spare], rewards[spare], rollout[: args.batch_size]

        # 2. Reward: the weighted sum of all functions, and the punishment of long completions
        lengths = torch.tensor([len(completion.token_ids) for completion in rollout])  # (B,)
        punishments = overlong_punishment(lengths, args.max_completion_length, args.overlong_buffer)  # (B,)
        rewards = rewards[: len(rollout)] + punishments  # (B,)
        gold_rewards = weighted_sum(score(gold_rewarders, sampled, group_size, args), ())  # (sampled,)

        # 3. Advantage: every completion beside its group
        groups = rewards.view(-1, group_size)  # (P, G)
        advantages = group_advantages(groups, args.scale_rewards).flatten().to(device)  # (B,)

        # 4. Update: `num_iterations` passes over the rollout, `num_minibatches` updates each
        usable = torch.tensor([c.ended or not args.mask_truncated for c in rollout], dtype=torch.bool)  # (B,)
        usable &= ~rewards.isnan()  # what is not trained on is in no mean of the loss
        weights, minibatches = torch.zeros(len(rollout), device=device), []  # (B,)
        for part in np.array_split(np.arange(len(rollout)).reshape(groups.shape), args.num_minibatches):
            ids = [i for i in part.flat if usable[i]]
            weights[ids] = token_weights(lengths[ids], args.loss_agg, args.max_completion_length).to(device)
            minibatches.append(pack_rollout(rollout, ids, args, device))
        with_ref = step % kl_every == 0
        with torch.no_grad():
            for row in sum(minibatches, []):
                row.old_logprobs = logprobs_of(policy, row.batch) if updates > 1 else None
                row.ref_logprobs = logprobs_of(ref_policy, row.batch) if with_ref else None
        learning_rate = args.learning_rate * lr_factor(step, total_steps, args.warmup_steps, args.lr_schedule)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        policy.train()
        sums, grad_norms = Counter(), []  # over the tokens of the step, by metric
        for rows in minibatches * args.num_iterations:
            for row in rows:
                logprobs, entropy = logprobs_of(policy, row.batch, return_entropy=True)  # (C,) each
                old_logprobs = logprobs.detach() if row.old_logprobs is None else row.old_logprobs  # (C,)
                old_logprobs = old_logprobs.where(~carried[row.completion], row.sampler_logprobs)  # (C,)
                ratio = torch.exp(logprobs - old_logprobs)  # (C,)
                advantage, weight = advantages[row.completion], weights[row.completion]  # (C,) each
                too_low = (ratio < 1 - args.epsilon) & (advantage < 0)  # (C,) where the clip holds the token
                too_high = (ratio > 1 + args.epsilon_high) & (advantage > 0)  # (C,)
                losses = dapo_loss(ratio, advantage, args.epsilon, args.epsilon_high)  # (C,)
                if args.tis_cap:  # truncated importance sampling, fengyao.notion.site/off-policy-rl
                    losses = losses * torch.exp(old_logprobs - row.sampler_logprobs).clamp(max=args.tis_cap)
                loss = (losses * weight).sum()
                (loss * world_size).backward()  # FSDP2 averages over processes what is to be summed
                sums["tokens"] += len(logprobs)
                sums["loss"] += loss.detach()
                sums["entropy"] += entropy.detach().sum()
                sums["clip_ratio/low_mean"] += too_low.sum()
                sums["clip_ratio/high_mean"] += too_high.sum()
                sums["clip_ratio/region_mean"] += (too_low | too_high).sum()
                sums["sampling/logp_difference_mean"] += (old_logprobs - row.sampler_logprobs).abs().sum()
                if with_ref:
                    sums["kl"] += KL["k3"](logprobs.detach(), row.ref_logprobs).sum()
            grad_norms.append(loading.clip_grad_norm(policy, args.max_grad_norm))
            if not math.isfinite(grad_norms[-1]):
                fail(f"step {step}: gradient norm {grad_norms[-1]}; --resume goes back to a checkpoint")
            optimizer.step()
            optimizer.zero_grad()
        sums["stopping"] = logger.stopping
        totals = torch.tensor([float(x) for x in sums.values()], device=device)
        dist.all_reduce(totals)
        totals = dict(zip(sums, totals.tolist()))
        loss, stopping, count = totals.pop("loss"), totals.pop("stopping"), max(1, totals.pop("tokens"))
        seconds = time.perf_counter() - started

        # 5. Evaluate, log, save
        groups = weighted_sum(scores, args.reward_weights).view(-1, group_size)  # (sampled / G, G)
        signals, generated = int(with_signal(groups).sum()), sum(len(c.token_ids) for c in sampled)
        batch_tokens = sum(len(c.prompt.input_ids) + len(c.token_ids) for c in rollout)
        num_tokens += batch_tokens
        metrics = {
            "step": step,
            "epoch": cursor / len(prompts),
            "loss": loss / updates,
            "learning_rate": learning_rate,
            "grad_norm": float(np.mean(grad_norms)),
            "reward": groups.nanmean().item(),
            "reward_std": groups.std(1).nanmean().item(),  # of groups that have all their rewards
            "frac_reward_zero_std": 1 - signals / len(groups),
            "sampling/kept_ratio": signals / len(groups),
            "sampling/generated_per_trained": generated / max(1, int(lengths[usable].sum())),
            "rewards/overlong_punishment/mean": punishments.mean().item(),
            "gold_reward": gold_rewards.nanmean().item(),
            "num_tokens": num_tokens,
            "tokens_per_second": batch_tokens / seconds,
            "step_time": seconds,
        }
        metrics |= {f"rewards/{name}/mean": x.nanmean().item() for name, x in zip(rewarders, scores)}
        metrics |= {name: total / count for name, total in totals.items()}
        metrics |= describe_rollout(sampled, group_size)
        if args.max_kl and metrics["kl"] > args.max_kl:
            say(f"step {step}: KL {metrics['kl']:.3g} to the reference is above --max-kl {args.max_kl}")
            total_steps = step
        last, samples = step == total_steps, []
        if last or (args.eval_every and step % args.eval_every == 0):
            evaluated, samples = evaluation()
            metrics |= evaluated
        logger.log(metrics, samples)
        if stopping or (args.save_every and (last or step % args.save_every == 0)):
            progress = {"step": step, "num_tokens": num_tokens, "cursor": cursor, "recent": recent}
            kept = [c._replace(prompt=prompts.index(c.prompt), logprobs=c.logprobs.tolist()) for c in surplus]
            progress |= {"surplus": kept, "surplus_rewards": surplus_rewards.tolist()}
            save_checkpoint(output_dir, policy, optimizer, progress)
        if stopping and not last:
            logger.close(f"stopped; continue with --resume --output-dir {output_dir}")
            return metrics
    save_model(output_dir / "model", policy, tokenizer)
    logger.close(f"model saved to {output_dir / 'model'}")
    return metrics


def evaluate(policy, tokenizer, held_out, rewarders, gold_rewarders, args) -> tuple[dict, list[dict]]:
    """Rewards of greedy and of sampled answers to held-out prompts; how often one of k samples is right."""
    if not held_out:
        return {}, []
    k, seed = args.eval_samples, (args.seed, 0)
    judges, weights = (gold_rewarders, ()) if gold_rewarders else (rewarders, args.reward_weights)
    answers = roll_out(policy, tokenizer, held_out, 1, 0.0, seed, args)  # P
    rewards = weighted_sum(score(judges, answers, 1, args), weights)  # (P,)
    metrics = {"greedy_reward": rewards.nanmean().item()}
    if k:
        answers = roll_out(policy, tokenizer, held_out, k, args.temperature, seed, args)  # P k
        scores = score(judges, answers, k, args)  # (F, P k)
        rewards = weighted_sum(scores, weights)  # (P k,)
        metrics |= {"reward": rewards.nanmean().item()} | describe_rollout(answers, k)
        right = scores[0].nan_to_num(0).view(-1, k).numpy()  # (P, k)
        if np.isin(right, (0, 1)).all():  # the first reward tells right from wrong
            final_answer = runpy.run_path(str(HERE / "rewards.py"))["final_answer"]
            finals = [[final_answer(c.text) for c in answers[n : n + k]] for n in range(0, len(answers), k)]
            votes = [line.index(Counter(line).most_common(1)[0][0]) for line in finals]  # arXiv:2203.11171
            metrics |= {"pass@k": right.max(1).mean(), "maj@k": right[range(len(votes)), votes].mean()}
    samples = [
        {"prompt": tokenizer.decode(c.prompt.input_ids), "completion": c.text, "reward": reward}
        for c, reward in zip(answers[:: k or 1], rewards[:: k or 1].tolist())
    ]
    return {f"eval/{name}": value for name, value in metrics.items()}, samples


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
# What is asked: token ids, the dataset row with its prompt (text or messages), where that stands.
Prompt = namedtuple("Prompt", ["input_ids", "row", "place"])
# An answer as it was sampled: token ids, log-probs under the sampler, text, whether an end token came.
Completion = namedtuple("Completion", ["prompt", "token_ids", "logprobs", "text", "ended"])
COLUMNS = ("reward", "kl", "entropy", "completions/mean_length", "grad_norm", "step_time")  # on the terminal


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


def pack_siblings(answers, max_tokens: int, multiple_of: int = 1, share: bool = True):
    """`pack` for pairs of (prompt ids, completion ids): neighbours with the same prompt share a copy of it.

    A group larger than max_tokens is split into parts, each with its copy. A row lists (pair, tokens shared):

    >>> pack_siblings([([1, 2], [5, 5]), ([1, 2], [6, 6]), ([1, 2], [7, 7]), ([3], [8])], max_tokens=6)
    [[(0, 0), (1, 2)], [(2, 0), (3, 0)]]  # 2 + 2 + 2 and 2 + 2 + 1 + 1 tokens
    """
    parts, sizes = [], []  # answers that share a copy; tokens
    for prompt, siblings in groupby(range(len(answers)), key=lambda i: answers[i][0]):
        group, lengths = zip(*[(i, len(answers[i][1])) for i in siblings])
        for part in common.pack(lengths, max_tokens - len(prompt) if share else 0):
            parts.append([(group[n], len(prompt) if n != part[0] else 0) for n in part])
            sizes.append(len(prompt) + sum(lengths[n] for n in part))
    rows = common.pack(sizes, max_tokens, multiple_of) or [[]] * multiple_of
    return [[member for n in row for member in parts[n]] for row in rows]


def pack_rollout(rollout: list[Completion], ids: list[int], args, device) -> list[SimpleNamespace]:
    """This process's packed rows of the completions `ids` of a rollout, at last empty ones.

    A row has a `batch` and, of its C tokens, `completion` (whose in the rollout) and `sampler_logprobs`.
    """
    answers = [(rollout[i].prompt.input_ids, rollout[i].token_ids) for i in ids]
    budget, world_size, rows = args.max_tokens_per_micro_batch, dist.get_world_size(), []
    packed = pack_siblings(answers, budget, world_size, share=args.attn == "packed")
    for row in packed[dist.get_rank() :: world_size]:
        pairs, shared = [answers[n] for n, _ in row], [count for _, count in row]
        sequences = [(x + y, [False] * len(x) + [True] * len(y)) for x, y in pairs]
        batch = common.collate(sequences or [([0], [False])], device, shared if any(shared) else None)
        completion = torch.tensor([ids[n] for n, _ in row], device=device).long()[batch.sequence_index]
        logprobs = torch.cat([torch.zeros(0), *(rollout[ids[n]].logprobs for n, _ in row)]).to(device)  # (C,)
        rows.append(SimpleNamespace(batch=batch, completion=completion, sampler_logprobs=logprobs))
    return rows


def describe_rollout(rollout: list[Completion], group_size: int) -> dict:
    """Metrics of what was sampled: lengths, how many were cut off, how alike groups are (of a few tokens)."""
    starts = range(0, min(len(rollout), 16 * group_size), group_size)
    groups = [[c.token_ids[:256] for c in rollout[n : n + group_size]] for n in starts]
    return {
        "completions/mean_length": float(np.mean([len(completion.token_ids) for completion in rollout])),
        "completions/clipped_ratio": float(np.mean([not completion.ended for completion in rollout])),
        "completions/distinct_2": float(np.mean([distinct_ngrams(group) for group in groups])),
    }


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
        main(tyro.cli(Args, description=__doc__))
    except BaseException as error:  # CheckpointException is no Exception
        if not re.search("No space left|unexpected pos", str(error)):  # the latter is PyTorch's word for it
            raise
        fail(f"no space left on the device; what was saved before is whole ({type(error).__name__})")
