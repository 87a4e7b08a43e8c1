"""Proximal policy optimization (PPO) from a reward model: the full RLHF loop, four models in one process.

    J = E[ r(q, o) - kl_coef sum_t log( pi(o_t | s_t) / pi_ref(o_t | s_t) ) ]    Eq. 2, arXiv:2203.02155

    delta_t = r_t + gamma V(s_t+1) - V(s_t),  A_t = sum_l (gamma lam)^l delta_t+l  Eq. 16, arXiv:1506.02438
    L_policy = -E_t[ min( rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t ) ]          Eq. 7, arXiv:1707.06347
    L_value = 1/2 E_t[ (V(s_t) - R_t)^2 ],  R_t = A_t + V_old(s_t)

s_t is the prompt and the completion before token t, rho_t = pi / pi_old. The policy is trained, and the value
model beside it, which predicts what a completion will earn from each token on: a token's advantage is how
much better things went than predicted there. Reference and reward model are frozen. The loop:

    1. Rollout    sample completions from the policy as it is, pi_old
    2. Score      reward models and verifiers of --reward, a penalty for a missing end
    3. Look       log-probs under policy and reference, values: of every token, without gradient
    4. Advantage  score and KL as rewards of tokens, then generalised advantage estimation
    5. Update     `num_ppo_epochs` passes: clipped policy gradient, clipped value regression
    6. Evaluate   proxy beside gold reward; log; save

Details after "The N+ implementation details of RLHF with PPO" (arXiv:2403.17031); siblings without a value
model: grpo.py, rloo_remax.py.

Deviations from the papers, each with its reason:
    1. PPO, not PPO-ptx: no pretraining text is mixed in (InstructGPT's gamma). The KL holds the policy.
    2. Policy and value model are clipped to --max-grad-norm one by one, where TRL clips both as one model: a
       value loss that is large at the start would shrink the policy's step.
    3. `policy/approxkl_avg` is k3, unbiased and never negative, where TRL logs k2; `objective/entropy` is
       that of the whole distribution, where TRL sums -log-probs.
    4. A missing end takes --missing-eos-penalty off the score, as in TRL; arXiv:2403.17031 puts -1 there.
    5. AdamW's epsilon is PyTorch's 1e-8; arXiv:2403.17031 takes 1e-5.
    6. Every pass takes the same minibatches, where arXiv:2403.17031 shuffles: old log-probs are then those
       of the very rows that are trained on. The prompts of a rollout are in random order.
    7. A completion without a score (None) is not trained on, and no mean counts it.

    python ppo_rlhf.py                                         # CPU, offline, 4 minutes on one core
    python ppo_rlhf.py --model Qwen/Qwen2.5-1.5B-Instruct --reward runs/my_reward_model/model \
        --dataset trl-lib/ultrafeedback-prompt --learning-rate 1e-6 --value-learning-rate 5e-6 \
        --kl-coef 0.05 --batch-size 512 --max-completion-length 512 --max-tokens-per-micro-batch 16384 \
        --gradient-checkpointing --max-steps 0
    python ppo_rlhf.py --model Qwen/Qwen2.5-1.5B-Instruct --reward rewards.py:math_answer \
        --dataset openai/gsm8k --dataset-config main --learning-rate 1e-6 --value-learning-rate 1e-5 \
        --kl-coef 0.001 --batch-size 512 --max-completion-length 512 --max-tokens-per-micro-batch 16384 \
        --gradient-checkpointing

Shapes: P prompts of a step, G completions of each, B = P G sequences, N tokens in a row, C completion tokens
(of a row, or of a process), H hidden size, F reward functions.
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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

import common
import loading
from common import CHATML, check_packed, kl_k1, kl_k3, token_logprobs

HERE = Path(__file__).resolve().parent
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@pydantic.dataclasses.dataclass
class Args:
    # Model
    model: str = "tiny/sft"  # model to train: a hub id or a folder
    ref_model: str | None = None  # reference model; by default --model as it is before training
    value_model: str | None = None  # start of the value model: the first reward model, else --model, head 0
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
    reward: tuple[str, ...] = ("tiny/reward",)  # file.py:function, or a reward model
    reward_weights: tuple[float, ...] = ()  # weight of each --reward in turn; by default 1 each
    missing_eos_penalty: NonNegativeFloat = 0.0  # off the score where a completion is cut off (TRL: 1.0)
    kl_coef: NonNegativeFloat = 0.8  # weight of the KL to the reference in the reward (TRL: 0.05)
    kl_target: PositiveFloat | None = None  # steer --kl-coef to this KL per completion (arXiv:1909.08593: 6)
    kl_horizon: PositiveFloat = 10_000  # completions over which it is steered (arXiv:1909.08593: 10,000)
    whiten_rewards: bool = False  # token rewards over their deviation, mean kept (arXiv:2403.17031)
    eval_reward: tuple[str, ...] = ()  # gold rewards: logged and evaluated on, never optimised
    allow_code_execution: bool = False  # let rewards run what the model writes (rewards.py:code_tests)
    reward_timeout: NonNegativeFloat = 1800  # seconds a reward has for a batch, or the run ends; 0: for ever

    # Rollout
    num_generations: PositiveInt = 4  # completions of each prompt (arXiv:2403.17031: 1)
    max_completion_length: PositiveInt = 128  # longest sampled answer in tokens
    temperature: PositiveFloat = 1.0  # sampling temperature
    max_tokens_per_rollout: PositiveInt = 65536  # tokens that are sampled at once: memory, never the result
    rollout: Literal["transformers", "vllm"] = "transformers"  # sampling engine, in this process
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.4  # share of a GPU's memory that vLLM may take
    mask_truncated: bool = False  # do not train on completions that --max-completion-length cut off

    # Advantage and loss
    gamma: Share = 1.0  # discount per token of later rewards (arXiv:2403.17031: 1)
    lam: Share = 0.95  # GAE's lambda: 1 trusts the rewards (Monte Carlo), 0 the next value (TRL: 0.95)
    whiten_advantages: bool = True  # minus their mean, over their deviation (arXiv:2403.17031)
    epsilon: PositiveFloat = 0.2  # ratios are clipped at 1 - epsilon (arXiv:1707.06347: 0.2)
    epsilon_high: PositiveFloat | None = None  # and at 1 + this (DAPO: 0.28); None: epsilon
    tis_cap: NonNegativeFloat = 0.0  # cap of weights old / sampler (TIS: 2); 0 trusts the sampler's log-probs
    cliprange_value: PositiveFloat | None = None  # how far a value may move from the old one (TRL: 0.2)
    vf_coef: NonNegativeFloat = 0.1  # weight of the value loss: --max-grad-norm feels it (TRL: 0.1)
    entropy_coef: NonNegativeFloat = 0.0  # weight of an entropy bonus (Eq. 9, arXiv:1707.06347: 0.01)
    max_kl: PositiveFloat | None = None  # stop after a step whose mean KL to the reference is above (nats)
    num_ppo_epochs: PositiveInt = 2  # passes over a rollout (TRL: 4)
    num_minibatches: PositiveInt = 2  # optimizer updates that a pass over a rollout is cut into

    # Optimization
    optimizer: loading.Optimizer = "adamw"  # adamw8bit: its moments in 8 bits, a quarter of their memory
    learning_rate: NonNegativeFloat = 1e-4  # peak, for tiny/; models of billions need 1e-5 (SFT) to 1e-6
    value_learning_rate: NonNegativeFloat = 3e-4  # the value model's (OpenRLHF: nine times the policy's)
    lr_schedule: Literal["linear", "cosine", "constant"] = "constant"  # after warm-up; the first two end at 0
    warmup_steps: NonNegativeInt = 5  # steps over which the learning rate rises linearly from 0
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay rates of AdamW's two moments
    weight_decay: NonNegativeFloat = 0.0  # AdamW's decoupled weight decay, on matrices only
    max_grad_norm: PositiveFloat = 1.0  # larger gradients are scaled down to this norm; inf: no clipping
    batch_size: PositiveInt = 128  # sequences, pairs or completions per step, over all processes
    max_tokens_per_micro_batch: PositiveInt = 1024  # tokens of a packed row: memory only, never the result
    num_epochs: PositiveFloat = 1.0  # passes over the training set or the prompts, if --max-steps is 0
    max_steps: NonNegativeInt = 60  # steps, or rollouts; 0 derives them from --num-epochs

    # Evaluation and output
    eval_every: NonNegativeInt = 20  # steps between evaluations; 0 evaluates only before and after
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
            self.eval_reward = self.eval_reward or ("rewards.py:math_answer",)
        if self.value_model is None:
            reward_models = [spec for spec in self.reward if ".py:" not in spec]
            self.value_model = re.sub(":(mean|min|mean_minus_std)$", "", [*reward_models, self.model][0])
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon
        if self.batch_size % self.num_generations:
            fail(f"--batch-size {self.batch_size} is no multiple of --num-generations {self.num_generations}")
        if self.batch_size // self.num_generations < self.num_minibatches:
            fail(f"--num-minibatches {self.num_minibatches}: more than the prompts of a step")
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            fail(f"{len(self.reward_weights)} --reward-weights for {len(self.reward)} rewards")
        if self.kl_target and not self.kl_coef:
            fail("--kl-target multiplies --kl-coef: it must be above 0")
        if self.kl_target and self.batch_size >= 5 * self.kl_horizon:
            fail(
                f"--kl-horizon {self.kl_horizon}: one step of --batch-size {self.batch_size} could end the KL"
            )
        for flag, value in (("learning_rate", 1e-6), ("value_learning_rate", 5e-6), ("kl_coef", 0.05)):
            if "tiny/" not in self.model and getattr(self, flag) == getattr(Args, flag):
                name = f"--{flag.replace('_', '-')} {getattr(self, flag)}"
                say(f"{name} suits tiny/; models of billions take {value}")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def weighted_sum(scores: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """Rewards (B,) from the scores (F, B) of F functions, by default 1 each: without NaN, NaN if all are."""
    weighted = scores * torch.tensor(weights or [1.0] * len(scores), dtype=scores.dtype)[:, None]  # (F, B)
    return weighted.nansum(0).masked_fill(scores.isnan().all(0), math.nan)


def shaped_rewards(scores, ref_log_ratio, sequence_index, kl_coef: float) -> torch.Tensor:
    """Rewards of tokens (C,): -kl_coef log(pi_old / pi_ref) at each, the score at the last of each sequence.

    `scores` (C,) are those of the tokens' sequences; `ref_log_ratio` (C,) is detached: the KL as a reward,
    k1, has the gradient of KL(pi || pi_ref) (Eq. 2, arXiv:2203.02155).
    """
    is_last = sequence_index.diff(append=sequence_index.new_tensor([-1])) != 0  # (C,)
    return scores * is_last - kl_coef * ref_log_ratio


def gae(token_rewards, values, sequence_index, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation on sequences laid end to end -> advantages, returns, (C,) each.

    A_t = sum_l (gamma lam)^l delta_t+l, delta_t = r_t + gamma V(s_t+1) - V(s_t) (Eq. 16, arXiv:1506.02438);
    returns are A + V, what the value model is to learn, before anything is whitened. `values[c]` is that of
    the state before token c; behind the last token of a sequence there is nothing left to earn: 0.
    """
    counts = torch.unique_consecutive(sequence_index, return_counts=True)[1]  # (B,)
    first = counts.cumsum(0) - counts  # (B,)
    running, following = values.new_zeros(2, len(counts))  # (B,) each: A and V of what comes next
    advantages = torch.zeros_like(values)  # (C,)
    for t in reversed(range(max(counts.tolist(), default=0))):  # all sequences that have a token t at once
        at = counts > t  # (B,)
        token = first[at] + t  # (those,)
        delta = token_rewards[token] + gamma * following[at] - values[token]  # (those,)
        advantages[token] = running[at] = delta + gamma * lam * running[at]
        following[at] = values[token]
    return advantages, advantages + values


def whiten(values, population, shift_mean: bool = True) -> torch.Tensor:
    """Values (C,) over the unbiased deviation of `population`, around 0; without `shift_mean` its mean.

    The population is the whole rollout. Where it does not vary there is no deviation to divide by: values
    come out as 0, or as they are.
    """
    centred, mean = torch.zeros_like(values), population.mean() if len(population) else 0.0
    if len(population) > 1 and population.amax() > population.amin():
        std = population.std(unbiased=True)
        centred = (values - mean) / (std + 1e-8)  # std + 1e-8: TRL, there the variance
    return centred if shift_mean else centred + mean


def ppo_policy_loss(ratio, advantages, epsilon: float, epsilon_high: float) -> torch.Tensor:
    """PPO's clipped surrogate of each token, (C,), to be minimised (Eq. 7, arXiv:1707.06347).

    Beyond the clip nothing is left to earn, so the gradient is 0; on the side where the policy has moved away
    from a good token, or towards a bad one, it stays. There the loss grows with the ratio and has no end.
    """
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)  # (C,)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def value_loss(values, old_values, returns, cliprange_value: float | None) -> torch.Tensor:
    """Half the squared error of each value, (C,); the larger of that and of the value clipped around the old.

    So a value that has moved further than `cliprange_value` from the old one, towards its return, gets no
    gradient; one that has moved away from it does (arXiv:2005.12729; TRL).
    """
    losses = (values - returns).square()  # (C,)
    if cliprange_value is not None:
        near = values.clamp(old_values - cliprange_value, old_values + cliprange_value)  # (C,)
        losses = torch.maximum(losses, (near - returns).square())
    return losses / 2


def sampler_weights(old_logprobs, sampler_logprobs, cap: float) -> torch.Tensor:
    """min(pi_old / pi_sampler, cap) of each token, (C,): truncated importance sampling.

    For a sampler (another engine, another precision) that is not quite the policy
    (https://fengyao.notion.site/off-policy-rl).
    """
    return torch.exp(old_logprobs - sampler_logprobs).clamp(max=cap)


def adapted_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, num_episodes: int) -> float:
    """The KL weight after a rollout of `num_episodes` whose KL per completion was `kl`, in nats.

    Up where it is above the target, down where below, by a factor of 1 + 0.2 num_episodes / horizon at most
    (section 2.2, arXiv:1909.08593).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_episodes / horizon)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 as good as a constant, below 0 worse."""
    if len(returns) < 2 or returns.amax() == returns.amin():
        return 0.0
    return 1 - ((returns - values).var() / returns.var()).item()


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
    value_start = runpy.run_path(str(HERE / "rewards.py"))["ensemble_members"](args.value_model)[0]
    for name in filter(None, (args.ref_model, value_start)):
        if load_tokenizer(SimpleNamespace(model=name, chat_template=None)).vocab != tokenizer.vocab:
            flag = "ref" if name == args.ref_model else "value"
            fail(f"{name} has another vocabulary than --model {args.model}: name another --{flag}-model")
    prompts = load_prompts(tokenizer, args.dataset, args.dataset_split, args)
    held_out = load_prompts(tokenizer, args.eval_dataset, args.eval_split, args, args.num_eval)
    longest = max(len(prompt.input_ids) for prompt in prompts + held_out) + args.max_completion_length
    if longest > tokenizer.positions:
        fail(f"--max-completion-length: {longest} tokens with a prompt, {tokenizer.positions} positions")
    rewarders = load_rewards(args.reward, [prompts[0], *held_out[:1]], args, device)
    gold_rewarders = load_rewards(args.eval_reward, [prompts[0], *held_out[:1]], args, device)
    group_size, num_prompts = args.num_generations, args.batch_size // args.num_generations
    total_steps = args.max_steps or max(1, math.ceil(args.num_epochs * len(prompts) / num_prompts))
    rng, num_epochs = np.random.default_rng(args.seed), math.ceil(total_steps * num_prompts / len(prompts))
    stream = np.concatenate([rng.permutation(len(prompts)) for _ in range(num_epochs)])
    say(f"first prompt:\n{tokenizer.decode(prompts[stream[0]].input_ids)}")

    engine = runpy.run_path(located("rollout_vllm.py"))["find_engine"]() if args.rollout == "vllm" else None
    policy = load_model(args.model, args, device)
    end_ids = end_tokens(tokenizer, policy)
    policy.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id)
    if engine:
        policy.decode = engine(located(args.model), args.vllm_memory, args).decode
    value_model = load_model(value_start, args, device, kind=ValueModel, check=check_values)
    models = torch.nn.ModuleDict({"policy": policy, "value_model": value_model})
    optimizer = loading.adamw(args, policy, value_model)
    peaks = [args.learning_rate] * 2 + [args.value_learning_rate] * 2  # of its groups
    kl_every = 1 if args.kl_coef or args.max_kl else args.log_every  # as a metric alone: now and then
    if args.lora_rank and not args.ref_model:
        ref_policy = loading.WithoutLora(policy)
    elif kl_every <= total_steps:
        ref_policy = load_model(args.ref_model or args.model, args, device, frozen=True)
    progress = load_checkpoint(output_dir, models, optimizer) if args.resume else {}
    step, num_tokens = progress.get("step", 0), progress.get("num_tokens", 0)
    kl_coef = progress.get("kl_coef", args.kl_coef) if args.kl_target else args.kl_coef
    logger = Logger(args, output_dir, total_steps, step)
    logprobs_of = partial(token_logprobs, temperature=args.temperature, return_entropy=True)
    evaluation = partial(evaluate, policy, tokenizer, held_out, rewarders, gold_rewarders, args)
    metrics = {}
    if step == 0:
        evaluated, samples = evaluation()
        logger.log({"step": 0} | evaluated, samples)
    while step < total_steps:
        # 1. Rollout: completions of the prompts of the step, from the policy as it is, group after group
        step, started = step + 1, time.perf_counter()
        asked = [prompts[i] for i in stream[(step - 1) * num_prompts : step * num_prompts]]  # P
        seed = (args.seed, step)
        rollout = roll_out(policy, tokenizer, asked, group_size, args.temperature, seed, args)  # B

        # 2. Score: a line for each function, and their weighted sum; NaN says nothing
        scores = score(rewarders, rollout, group_size, args)  # (F, B)
        proxy = weighted_sum(scores, args.reward_weights)  # (B,)
        gold_rewards = weighted_sum(score(gold_rewarders, rollout, group_size, args), ())  # (B,)
        if step == 1 and proxy.isnan().all():
            fail(f"--reward {', '.join(rewarders)}: None for every completion of the first step")
        ended = torch.tensor([completion.ended for completion in rollout])  # (B,)
        penalised = proxy - args.missing_eos_penalty * ~ended  # (B,)

        # 3. Look: what the models say of each token, on the rows that are trained on: its ratio is then
        #    exactly 1 up to the first update
        trained = ~proxy.isnan() & (ended | (not args.mask_truncated))  # (B,) what else is in no mean
        minibatches = []  # number of tokens over all processes, and rows of this one
        for part in np.array_split(np.arange(len(rollout)).reshape(-1, group_size), args.num_minibatches):
            if ids := [i for i in part.flat if trained[i]]:
                size = sum(len(rollout[i].token_ids) for i in ids)
                minibatches.append((size, pack_rollout(rollout, ids, args, device)))
        with_ref, mine = step % kl_every == 0, [row for _, rows in minibatches for row in rows]
        models.eval()
        with torch.no_grad():
            for row in mine:
                row.old_logprobs, row.entropy = logprobs_of(policy, row.batch)  # (C,) each
                row.ref_logprobs = logprobs_of(ref_policy, row.batch)[0] if with_ref else row.old_logprobs
                row.old_values = token_values(value_model, row.batch)  # (C,)

        # 4. Advantage: of each token of this process's rows; whitened over those of all processes
        old_logprobs, ref_logprobs = tokens_of(mine, "old_logprobs"), tokens_of(mine, "ref_logprobs")
        old_values, completion = tokens_of(mine, "old_values"), tokens_of(mine, "completion").long()
        ref_log_ratio = kl_k1(old_logprobs, ref_logprobs)  # (C,)
        token_rewards = shaped_rewards(penalised[completion], ref_log_ratio, completion, kl_coef)  # (C,)
        told = [ref_log_ratio, kl_k3(old_logprobs, ref_logprobs), tokens_of(mine, "entropy"), token_rewards]
        if args.whiten_rewards:
            token_rewards = whiten(token_rewards, of_all(token_rewards), shift_mean=False)
        advantages, returns = gae(token_rewards, old_values, completion, args.gamma, args.lam)  # (C,) each
        told = of_all(torch.stack([*told, old_values, returns, advantages]))  # (7, C) of all processes
        if args.whiten_advantages:
            advantages = whiten(advantages, told[-1])
        both = torch.stack([advantages, returns]).float().to(device)  # (2, C)
        for row, of_row in zip(mine, both.split([len(row.completion) for row in mine], dim=1)):
            row.advantages, row.returns = of_row  # (C,) each

        # 5. Update: `num_ppo_epochs` passes over the rollout, `num_minibatches` updates each
        factor = lr_factor(step, total_steps, args.warmup_steps, args.lr_schedule)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        models.train()
        sums, grad_norms = Counter(), []  # over the tokens of the step, by metric
        for size, rows in minibatches * args.num_ppo_epochs:
            for row in rows:
                logprobs, entropy = logprobs_of(policy, row.batch)  # (C,) each
                ratio = torch.exp(logprobs - row.old_logprobs)  # (C,)
                policy_losses = ppo_policy_loss(ratio, row.advantages, args.epsilon, args.epsilon_high)
                if args.tis_cap:
                    weights = sampler_weights(row.old_logprobs, row.sampler_logprobs, args.tis_cap)  # (C,)
                    policy_losses = policy_losses * weights
                policy_loss = policy_losses.sum() / size
                if args.entropy_coef:
                    policy_loss = policy_loss - args.entropy_coef * entropy.sum() / size
                (policy_loss * world_size).backward()  # FSDP2 averages over processes what is to be summed
                values = token_values(value_model, row.batch)  # (C,)
                value_losses = value_loss(values, row.old_values, row.returns, args.cliprange_value)  # (C,)
                (args.vf_coef * value_losses.sum() / size * world_size).backward()
                with torch.no_grad():
                    too_low = (ratio < 1 - args.epsilon) & (row.advantages < 0)  # (C,) where the clip holds
                    too_high = (ratio > 1 + args.epsilon_high) & (row.advantages > 0)  # (C,)
                    value_held = value_losses > (values - row.returns).square() / 2  # (C,)
                    sums["loss/policy_avg"] += policy_losses.sum() / size
                    sums["loss/value_avg"] += value_losses.sum() / size
                    sums["loss"] += policy_loss + args.vf_coef * value_losses.sum() / size
                    sums["tokens"] += len(ratio)
                    sums["policy/approxkl_avg"] += kl_k3(row.old_logprobs, logprobs).sum()
                    sums["policy/clipfrac_avg"] += (too_low | too_high).sum()
                    sums["val/clipfrac_avg"] += value_held.sum()
                    sums["val/ratio"] += ratio.sum()
                    gap = row.old_logprobs - row.sampler_logprobs  # (C,)
                    sums["sampling/logp_difference_mean"] += gap.abs().sum()
            norms = [loading.clip_grad_norm(model, args.max_grad_norm) for model in (policy, value_model)]
            grad_norms.append(norms)
            if not math.isfinite(sum(norms)):
                fail(f"step {step}: gradient norms {norms}; --resume goes back to a checkpoint")
            optimizer.step()
            optimizer.zero_grad()
        sums["stopping"] = logger.stopping
        totals = torch.tensor([float(x) for x in sums.values()], device=device)
        dist.all_reduce(totals)
        totals = dict(zip(sums, totals.tolist()))
        stopping, count = totals.pop("stopping"), totals.pop("tokens", 0)
        seconds = time.perf_counter() - started

        # 6. Evaluate, log, save
        batch_tokens = sum(len(c.prompt.input_ids) + len(c.token_ids) for c in rollout)
        num_tokens += batch_tokens
        k1, k3, entropy, token_rewards, old_values, returns, _ = told  # (C,) each, of all processes
        per_completion = math.nan if not trained.any() else 1 / trained.sum().item()
        kl = k1.sum().item() * per_completion if with_ref else math.nan
        metrics = {
            "step": step,
            "epoch": step * num_prompts / len(prompts),
            "episode": step * args.batch_size,
            "learning_rate": args.learning_rate * factor,
            "learning_rate/value": args.value_learning_rate * factor,
            "objective/scores": proxy.nanmean().item(),
            "objective/kl": kl,
            "objective/non_score_reward": -kl_coef * kl,
            "objective/rlhf_reward": token_rewards.sum().item() * per_completion,
            "objective/entropy": entropy.mean().item(),
            "objective/kl_coef": kl_coef,
            "kl": k3.mean().item() if with_ref else math.nan,
            "val/explained_var": explained_variance(old_values, returns),
            "gold_reward": gold_rewards.nanmean().item(),
            "num_tokens": num_tokens,
            "tokens_per_second": batch_tokens / seconds,
            "step_time": seconds,
        }
        metrics |= {f"rewards/{name}/mean": x.nanmean().item() for name, x in zip(rewarders, scores)}
        for name, total in totals.items():  # losses are means over minibatches, the others over tokens
            metrics[name] = total / (len(grad_norms) if name.startswith("loss") else count)
        if grad_norms:
            metrics["grad_norm"], metrics["grad_norm/value"] = np.mean(grad_norms, 0).tolist()
        metrics |= describe_rollout(rollout, group_size)
        if args.kl_target and minibatches:
            kl_coef = adapted_kl_coef(kl_coef, kl, args.kl_target, args.kl_horizon, args.batch_size)
        if args.max_kl and metrics["kl"] > args.max_kl:
            say(f"step {step}: KL {metrics['kl']:.3g} to the reference is above --max-kl {args.max_kl}")
            total_steps = step
        last, samples = step == total_steps, []
        if last or (args.eval_every and step % args.eval_every == 0):
            evaluated, samples = evaluation()
            metrics |= evaluated
        logger.log(metrics, samples)
        if stopping or (args.save_every and (last or step % args.save_every == 0)):
            progress = {"step": step, "num_tokens": num_tokens, "kl_coef": kl_coef}
            save_checkpoint(output_dir, models, optimizer, progress)
        if stopping and not last:
            logger.close(f"stopped; continue with --resume --output-dir {output_dir}")
            return metrics
    save_model(output_dir / "value_model", value_model, tokenizer)
    save_model(output_dir / "model", policy, tokenizer)
    logger.close(f"models saved to {output_dir / 'model'} and {output_dir / 'value_model'}")
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


@loading.fsdp_forward
def token_values(value_model, batch) -> torch.Tensor:
    """The value of the state before each trained token, (C,), float32, in units of the score."""
    states = common.completion_states(value_model, batch)  # (C, H)
    offset = getattr(value_model.config, "reward_offset", 0.0)
    return value_model.score(states.float()).squeeze(-1) + offset  # the head is float32, whatever --dtype is


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
# What is asked: token ids, the dataset row with its prompt (text or messages), where that stands.
Prompt = namedtuple("Prompt", ["input_ids", "row", "place"])
# An answer as it was sampled: token ids, log-probs under the sampler, text, whether an end token came.
Completion = namedtuple("Completion", ["prompt", "token_ids", "logprobs", "text", "ended"])
COLUMNS = ("objective/scores", "objective/kl", "loss/value_avg", "completions/mean_length", "step_time")


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


def tokens_of(rows: list[SimpleNamespace], name: str) -> torch.Tensor:
    """What is known of all tokens of this process's rows, (C,), float64 on the CPU."""
    return torch.cat([torch.zeros(0), *(getattr(row, name).cpu() for row in rows)]).double()


def of_all(x: torch.Tensor) -> torch.Tensor:
    """What is known of the tokens of this process, (..., C), beside that of the other processes' tokens."""
    return torch.cat([*gather({dist.get_rank(): x}).values()], dim=-1)


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


class ValueModel:
    """Loads a sequence classification model with one output; a head that it has not yet is 0."""

    @staticmethod
    def from_pretrained(name: str, **settings):
        settings |= {"config": AutoConfig.from_pretrained(name, num_labels=1), "output_loading_info": True}
        model, loaded = AutoModelForSequenceClassification.from_pretrained(name, **settings)
        if loaded["missing_keys"]:
            torch.nn.init.zeros_(model.score.weight)  # lm-human-preferences: every value is 0 at first
        model.generation_config = None  # it does not generate
        return model


@torch.no_grad()
@loading.fsdp_forward
def check_values(model):
    """Raise ValueError unless a packed row gives two sequences the states that each has in the stock model.

    Also where their prompt stands in the row once, if --attn packed lets it.
    """
    device, vocab_size = model.get_input_embeddings().weight.device, model.config.get_text_config().vocab_size
    one, other = (torch.arange(1, n + 1) * 7919 % vocab_size for n in (9, 6))
    attn = model.config._attn_implementation
    rows = [([one, other], None)] + [([one, torch.cat([one[:4], other])], [0, 4])] * (attn == "packed")
    for sequences, shared in rows:
        batch = common.collate([(ids, torch.arange(len(ids)) >= 4) for ids in sequences], device, shared)
        states = common.completion_states(model, batch)  # (C, H): values alone may be 0 under every error
        alone = [model.base_model(ids[None].to(device), use_cache=False)[0][0, 3:-1] for ids in sequences]
        alone = torch.cat(alone)  # (C, H)
        allowed = (1e-3 if alone.dtype == torch.float32 else 0.03) * (1 + alone.abs().max())
        if not (error := (states - alone).abs().max()) < allowed:
            raise ValueError(
                f"packed values differ from the model's: states by {error:.2g} under --attn {attn}"
            )


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
