"""Proximal policy optimization (PPO) from a reward model: the full RLHF loop, four models in one process.

    J = E[ r(q, o) - kl_coef sum_t log( pi(o_t | s_t) / pi_ref(o_t | s_t) ) ]    Eq. 2, arXiv:2203.02155

    delta_t = r_t + gamma V(s_t+1) - V(s_t),  A_t = sum_l (gamma lam)^l delta_t+l  Eq. 16, arXiv:1506.02438
    L_policy = -E_t[ min( rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t ) ]          Eq. 7, arXiv:1707.06347
    L_value = 1/2 E_t[ (V(s_t) - R_t)^2 ],  R_t = A_t + V_old(s_t)

s_t is the prompt and the completion before token t, rho_t = pi / pi_old. The policy is trained, and the value
model beside it, which predicts what a completion will earn from each token on: a token's advantage is how
much better things went than predicted there. Reference and reward model are frozen. The loop:

    1. Rollout    sample completions from the policy as it is, pi_old
    2. Score      reward models and verifiers; caps, normalisation, clip, penalty for a missing end
    3. Look       log-probs under policy and reference, values: of every sampled token, without gradient
    4. Advantage  score and KL as rewards of tokens, then generalised advantage estimation
    5. Update     `num_ppo_epochs` passes: clipped policy gradient, clipped value regression
    6. Evaluate   proxy beside gold reward; monitors; log; save

Details after "The N+ implementation details of RLHF with PPO" (arXiv:2403.17031); each has its flag.

Deviations from the papers, each with its reason:
    1. PPO, not PPO-ptx: no pretraining text is mixed in (InstructGPT's gamma). The KL holds the policy.
    2. Policy and value model are clipped to --max-grad-norm one by one, where TRL clips both as one model: a
       value loss that is large at the start would shrink the policy's step.
    3. `policy/approxkl_avg` is k3, unbiased and never negative, where TRL logs k2; `objective/entropy` is
       that of the whole distribution, where TRL sums -log-probs.
    4. A missing end takes --missing-eos-penalty off the score, as in TRL; arXiv:2403.17031 puts -1 there.
    5. AdamW's epsilon is PyTorch's 1e-8; arXiv:2403.17031 takes 1e-5.

    python ppo_rlhf.py                                         # CPU, offline, 3 minutes on two cores
    python ppo_rlhf.py --model Qwen/Qwen2.5-1.5B-Instruct --reward-model runs/my_reward_model/model \
        --dataset trl-lib/ultrafeedback-prompt --learning-rate 1e-6 --value-learning-rate 5e-6 \
        --kl-coef 0.05 --batch-size 512 --max-completion-length 512 --max-tokens-per-micro-batch 16384 \
        --max-steps 0
    python ppo_rlhf.py --reward rewards.py:math_answer --model Qwen/Qwen2.5-1.5B-Instruct \
        --dataset openai/gsm8k --dataset-config main           # verifiers only, no reward model (RLVR)

Shapes: B sequences of a rollout, N tokens in a row, C completion tokens (of a row, or of the rollout), H
hidden size, F reward functions.
"""

import ctypes
import gc
import importlib.util
import inspect
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from bisect import bisect_left, insort
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
)

from common import (
    check_attention,
    check_packed,
    collate,
    fsdp_forward,
    kl_k1,
    kl_k3,
    packed_hidden_states,
    segment_sum,
    token_logprobs,
)


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    # Models
    model: str = "tiny/sft"
    """Model to fine-tune: a hub id or a folder."""
    ref_model: str | None = None
    """Reference model: a hub id or a folder; by default --model as it is before training."""
    value_init: Literal["reward", "policy"] | None = None
    """Start of the value model: the first reward model, if there is one (InstructGPT), or --model, head 0."""
    offload: bool = False
    """Keep reference and reward models on the CPU between uses: less device memory, the same result."""
    chat_template: str | None = None
    """File with a Jinja chat template to use instead of the tokenizer's own."""
    prompt_template: str | None = None
    """Text for a base model in place of a chat template; {prompt} in it is the question (R1-Zero)."""
    attn: str = "packed"
    """Attention: packed, or flash_attention_2 where it is installed, or eager (exact, slow)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about 30 % slower, far less memory, the same result."""
    compile: bool = False
    """Compile each layer with torch.compile."""

    # Data
    dataset: tuple[str, ...] = ("tiny/data/prompts_train.jsonl",)
    """Hub ids or local .jsonl/.json/.parquet/.csv files or saved datasets."""
    dataset_config: str | None = None
    """Configuration name of the hub dataset ("main" for openai/gsm8k)."""
    dataset_split: str = "train"
    """Split of the hub dataset to train on."""
    eval_dataset: str | None = None
    """Held-out dataset; by default the one of tiny/ if tiny/ is trained on, else none."""
    eval_split: str = "test"
    """Split of the hub dataset to evaluate on."""
    order: Literal["shuffled", "given", "length"] = "shuffled"
    """Order of the sequences within an epoch; `length` goes from short to long (a curriculum)."""
    max_prompt_length: int = 512
    """Longest prompt in tokens; longer ones are dropped and counted."""
    share_prompt: bool = True
    """Put a prompt into the row once, seen by all its answers (arXiv:2410.20305): the same result."""

    # Reward
    reward: tuple[str, ...] = ()
    """Functions file.py:function that score completions: in place of a reward model, or beside it."""
    reward_model: tuple[str, ...] = ()
    """Folders of reward models (see reward_model.py), scored together as one reward."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each --reward in turn, and of the reward models last; by default 1 each."""
    reward_caps: tuple[float, ...] = ()
    """Most that each of them may give, before its weight; by default no end (inf)."""
    reward_aggregation: Literal["mean", "min", "mean_minus_std"] = "mean"
    """One reward from those of several reward models (arXiv:2310.02743)."""
    std_coef: float = 1.0
    """Standard deviations that mean_minus_std takes off (arXiv:2310.02743 takes off variances)."""
    normalize_reward: bool = False
    """Scores minus their mean so far, over their deviation so far (LLaMA-Factory's ppo_score_norm)."""
    reward_clip: float | None = None
    """Scores, normalised or not, are clipped to plus or minus this (OpenRLHF: 10)."""
    missing_eos_penalty: float = 0.0
    """Taken off the score of a completion that was cut off (TRL's examples: 1.0)."""
    truncated: Literal["score", "bootstrap", "drop"] = "score"
    """Completions cut off: scored as they are (TRL), the value at their end as score, or not trained on."""
    kl_coef: float = 0.8
    """Weight of the KL to the reference in the reward (TRL: 0.05)."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """Keep --kl-coef as it is, or steer it so that the KL per completion comes to --kl-target."""
    kl_target: float = 6.0
    """KL per completion in nats that the adaptive controller steers to (arXiv:1909.08593; TRL: 6)."""
    kl_horizon: float = 10_000
    """Completions over which the adaptive controller reacts (arXiv:1909.08593's code: 10,000)."""
    whiten_rewards: bool = False
    """Rewards of tokens over their standard deviation in the rollout, mean kept (arXiv:2403.17031)."""
    eval_reward: tuple[str, ...] = ()
    """Gold rewards, file.py:function: logged and evaluated on, never optimised."""
    allow_code_execution: bool = False
    """Let reward functions run what the model writes (rewards.py:code_tests)."""

    # Rollout
    num_generations: int = 4
    """Completions of each prompt: the group (TRL: 8)."""
    max_completion_length: int = 128
    """Longest sampled answer in tokens."""
    temperature: float = 1.0
    """Sampling temperature; 0, where samples are not trained on, is greedy."""
    top_p: float = 1.0
    """Share of the probability mass to sample from: 1, for log-probs are those of the whole distribution."""
    generation_batch_size: int = 256
    """Prompts that are sampled at once."""
    save_rollouts: bool = False
    """Write every rollout to rollouts.jsonl of the run."""
    replay_rollouts: str | None = None
    """Train on the rollouts of this file, of an earlier run, in place of sampling."""

    # Advantage and loss
    gamma: float = 1.0
    """Discount per token of later rewards (arXiv:2403.17031: 1)."""
    lam: float = 0.95
    """GAE's lambda: 1 trusts the rewards (Monte Carlo), 0 the next value (arXiv:1506.02438; TRL: 0.95)."""
    whiten_advantages: bool = True
    """Advantages minus their mean, over their standard deviation, of the rollout (arXiv:2403.17031)."""
    epsilon: float = 0.2
    """How far below 1 the probability ratio still earns (arXiv:1707.06347: 0.2)."""
    epsilon_high: float | None = None
    """How far above 1 (arXiv:2503.14476: 0.28); None is as far as below."""
    dual_clip: float | None = None
    """Most that a ratio may count at a negative advantage, above 1 (arXiv:1912.09729: 3); None is no end."""
    cliprange_value: float | None = None
    """How far a value may move from the old one, in units of reward (TRL: 0.2); None does not clip."""
    vf_coef: float = 0.1
    """Weight of the value loss: AdamW hardly feels it, --max-grad-norm does (TRL: 0.1)."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus (arXiv:1707.06347, Eq. 9: 0.01; language models: 0)."""
    num_ppo_epochs: int = 2
    """Passes over a rollout (TRL: 4)."""
    num_minibatches: int = 2
    """Optimizer updates that a pass over a rollout is cut into."""
    target_kl: float | None = None
    """End the passes over a rollout once KL(old to new policy) per token is above this (nats)."""
    max_kl: float | None = None
    """Stop the run once the mean KL to the reference per token is above this (nats)."""

    # Optimization
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW; the default suits tiny/, models of billions 2e-5 (SFT) to 1e-6 (DPO)."""
    value_learning_rate: float = 3e-4
    """Peak learning rate of the value model (OpenRLHF: 9e-6, nine times the policy's)."""
    value_warmup_steps: int = 0
    """Rollouts at first from which the value model alone learns; the policy's schedule follows (verl)."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "constant"
    """Shape of the learning rate after warm-up; linear and cosine end at 0."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises linearly from 0."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments (TRL: 0.9, 0.999)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, on matrices only (TRL: 0)."""
    max_grad_norm: float = 1.0
    """Largest norm of a model's gradient; larger ones are scaled down to it (TRL: 1.0); inf is no end."""
    batch_size: int = 128
    """Sequences, or pairs of them, per step over all processes; online, completions of a rollout."""
    max_tokens_per_micro_batch: int = 1024
    """Tokens of a packed row: memory only, never the result. A longer sequence gets its own row."""
    num_epochs: float = 1.0
    """Passes over the training set (TRL: 3)."""
    max_steps: int = 60
    """Steps (optimizer updates; online, rollouts); 0 derives them from --num-epochs."""

    # Evaluation and output
    eval_every: int = 20
    """Steps between evaluations; 0 evaluates only before and after."""
    num_eval: int = 256
    """Rows of the evaluation sets that are used; 0 uses all."""
    eval_samples: int = 4
    """Samples of each held-out prompt: the k of pass@k and maj@k."""
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
    log_every: int = 5
    """Steps between lines on the terminal; metrics.jsonl has one line a step."""
    wandb: bool = False
    """Log to Weights & Biases as well (WANDB_MODE=offline works)."""

    def __post_init__(self):
        if self.dataset == ("tiny/data/prompts_train.jsonl",):
            self.eval_dataset = self.eval_dataset or "tiny/data/prompts_eval.jsonl"
            self.eval_reward = self.eval_reward or ("rewards.py:math_answer",)
        if not self.reward and not self.reward_model:
            self.reward_model = ("tiny/reward",)
        if self.value_init is None:
            self.value_init = "reward" if self.reward_model else "policy"
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon
        check_flags(self)
        if self.dual_clip is not None and not self.dual_clip > 1:
            fail(f"--dual-clip must be above 1, not {self.dual_clip}: below it every ratio would be cut")
        if self.attn != "packed":
            self.share_prompt = False
        if self.batch_size % self.num_generations:
            fail(f"--batch-size {self.batch_size} is no multiple of --num-generations {self.num_generations}")
        if self.batch_size // self.num_generations < self.num_minibatches:
            fail(f"--num-minibatches {self.num_minibatches}: more than the prompts of a step")
        if self.kl_controller == "adaptive" and not self.kl_coef:
            fail("--kl-controller adaptive multiplies --kl-coef: it must be above 0")
        if self.value_init == "reward" and not self.reward_model:
            fail("--value-init reward: there is no --reward-model to start from; use --value-init policy")
        for name in ("reward_weights", "reward_caps"):
            if len(getattr(self, name)) not in (0, self.num_rewards):
                flag, given = f"--{name.replace('_', '-')}", len(getattr(self, name))
                fail(f"{flag} has {given} numbers for {self.num_rewards} rewards")

    @property
    def num_rewards(self) -> int:
        return len(self.reward) + bool(self.reward_model)


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def shaped_scores(
    scores: torch.Tensor,
    ended: torch.Tensor,
    *,
    reward_clip: float | None,
    missing_eos_penalty: float,
    bootstrapped: torch.Tensor,
) -> torch.Tensor:
    """Scores (B,) as the policy is to earn them: clipped, then less a penalty where a completion was cut off.

    0 comes in the place of a score that is NaN, and of one that is `bootstrapped` (B,): a value stands there.
    """
    if reward_clip is not None:
        scores = scores.clamp(-reward_clip, reward_clip)
    return scores.nan_to_num(0.0).masked_fill(bootstrapped, 0.0) - missing_eos_penalty * ~ended


def shaped_rewards(
    scores: torch.Tensor, ref_log_ratio: torch.Tensor, sequence_index: torch.Tensor, *, kl_coef: float
) -> torch.Tensor:
    """Rewards of tokens (C,): -kl_coef log(pi_old / pi_ref) at each, the score at the last of each sequence.

    `scores` (B,), one a sequence, every one of which has tokens; `ref_log_ratio` (C,), detached: the KL as a
    reward, k1, has the gradient of KL(pi || pi_ref) (Eq. 2, arXiv:2203.02155).
    """
    last = torch.bincount(sequence_index, minlength=len(scores)).cumsum(0) - 1  # (B,)
    return (-kl_coef * ref_log_ratio).index_add(0, last, scores.type_as(ref_log_ratio))  # (C,)


def gae(
    token_rewards: torch.Tensor,
    values: torch.Tensor,
    sequence_index: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    end_values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation on sequences laid end to end -> advantages, returns, (C,) each.

    A_t = sum_l (gamma lam)^l delta_t+l, delta_t = r_t + gamma V(s_t+1) - V(s_t) (Eq. 16, arXiv:1506.02438);
    returns are A + V, what the value model is to learn, before anything is whitened. `values[c]` is that of
    the state before token c, `end_values` (B,) those of the states behind the sequences: 0, as without it,
    where one has ended, and the value there where only the sampling has (arXiv:1712.00378).
    """
    counts = torch.bincount(sequence_index)  # (B,)
    first = counts.cumsum(0) - counts  # (B,)
    running, following = values.new_zeros(2, len(counts))  # (B,) each: A and V of what comes next
    if end_values is not None:
        following.copy_(end_values)
    advantages = torch.zeros_like(values)  # (C,)
    for t in range(int(counts.max()) - 1, -1, -1):  # from the end, all sequences that have a token t at once
        at = counts > t  # (B,)
        token = first[at] + t  # (those,)
        delta = token_rewards[token] + gamma * following[at] - values[token]  # (those,)
        advantages[token] = running[at] = delta + gamma * lam * running[at]
        following[at] = values[token]
    return advantages, advantages + values


def whiten(values: torch.Tensor, *, shift_mean: bool = True) -> torch.Tensor:
    """Values (C,) over their unbiased standard deviation, around 0 or, without `shift_mean`, their mean.

    Values that do not vary have no deviation to be divided by: they come out as 0, or as they are.
    """
    mean = values.mean() if len(values) else 0.0
    centred = torch.zeros_like(values)  # (C,)
    if len(values) > 1 and values.amax() > values.amin():
        centred = (values - mean) / (values.std(unbiased=True) + 1e-8)  # + 1e-8: TRL, there to the variance
    return centred if shift_mean else centred + mean


def ppo_policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    epsilon: float,
    epsilon_high: float,
    dual_clip: float | None = None,
) -> torch.Tensor:
    """PPO's clipped surrogate of each token, (C,), to be minimised (Eq. 7, arXiv:1707.06347).

    Beyond the clip nothing is left to earn, so the gradient is 0; on the side where the policy has moved away
    from a good token, or towards a bad one, it stays. There the loss grows with the ratio and has no end;
    with `dual_clip` c > 1 no token counts more than -c A (arXiv:1912.09729), at A < 0 only.
    """
    ratio = torch.exp(logprobs - old_logprobs)  # (C,)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)  # (C,)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)  # (C,)
    if dual_clip is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, cliprange_value: float | None
) -> torch.Tensor:
    """Half the squared error of each value, (C,); the larger of that and of the value clipped around the old.

    So a value that has moved further than `cliprange_value` from the old one, towards its return, gets no
    gradient; one that has moved away from it does (arXiv:2005.12729; TRL).
    """
    losses = (values - returns).square()  # (C,)
    if cliprange_value is not None:
        near = values.clamp(old_values - cliprange_value, old_values + cliprange_value)  # (C,)
        losses = torch.maximum(losses, (near - returns).square())
    return losses / 2


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, num_episodes: int) -> float:
    """The KL weight after a rollout of `num_episodes` whose KL per completion was `kl`, in nats.

    Up where it is above the target, down where below, by a factor of 1 + 0.2 num_episodes / horizon at most
    (section 2.2, arXiv:1909.08593).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_episodes / horizon)


def merged_moments(moments: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Count, mean and sum of squared deviations (3,) after some more values, none of them NaN (Chan 1983)."""
    count, mean, squares = moments
    total, shift = count + len(values), (values.mean() if len(values) else mean) - mean
    more = (values - values.mean()).square().sum() if len(values) else 0.0
    shifted = shift.square() * count * len(values) / total.clamp(min=1)
    return torch.stack([total, mean + shift * len(values) / total.clamp(min=1), squares + more + shifted])


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 as good as a constant, below 0 worse."""
    if len(returns) < 2 or returns.amax() == returns.amin():
        return 0.0
    return 1 - ((returns - values).var() / returns.var()).item()


def clip_shares(ratio: torch.Tensor, advantages: torch.Tensor, epsilon, epsilon_high) -> torch.Tensor:
    """Where the clip takes the gradient, (2, C): below the range at A < 0, above it at A > 0."""
    low, high = (ratio < 1 - epsilon) & (advantages < 0), (ratio > 1 + epsilon_high) & (advantages > 0)
    return torch.stack([low, high]).float()


def pass_at_k(right: np.ndarray, k: int) -> float:
    """Chance that one of k samples is right, unbiased, from n samples of each prompt (P, n).

    1 - C(n - c, k) / C(n, k) for c right ones of n (Eq. 1, arXiv:2107.03374).
    """
    n, counts = right.shape[1], right.sum(1)
    return float(np.mean([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in counts]))


def majority(answers: list[str]) -> int:
    """Index of a solution with the most frequent final answer (self-consistency, arXiv:2203.11171)."""
    counts = Counter(answers)
    return max(range(len(answers)), key=lambda i: (counts[answers[i]], -i))


def distinct_ngrams(group: list[list[int]], n: int = 2) -> float:
    """Share of n-grams of a group of completions that are different (distinct-n, arXiv:1510.03055)."""
    grams = [tuple(ids[i : i + n]) for ids in group for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def self_bleu(group: list[list[int]], n: int = 4) -> float:
    """Mean BLEU-n of each completion of a group beside its siblings: 1 if all are alike (arXiv:1802.01886).

    An order of n-grams without a match counts as half a match.
    """
    if len(group) < 2:
        return 0.0
    grams = [[Counter(tuple(ids[i : i + k]) for i in range(len(ids) - k + 1)) for k in range(1, n + 1)]
             for ids in group]  # fmt: skip
    scores = []
    for i, ids in enumerate(group):
        others = [j for j in range(len(group)) if j != i]
        logs = []
        for k in range(n):
            total = sum(grams[i][k].values())
            if not total:
                continue
            best = Counter()
            for j in others:
                best |= grams[j][k]
            matches = sum((grams[i][k] & best).values())
            logs.append(math.log(matches / total if matches else 1 / (2 * total)))
        closest = min((len(group[j]) for j in others), key=lambda m: (abs(m - len(ids)), m))
        brevity = min(0.0, 1 - closest / max(1, len(ids)))
        scores.append(math.exp(sum(logs) / len(logs) + brevity) if logs else 0.0)
    return sum(scores) / len(scores)


def symptoms(first: dict, last: dict) -> list[str]:
    """What has commonly gone wrong, from metrics averaged over the first steps and over the last."""
    found, both = [], first.keys() & last.keys()
    if "entropy" in both and last["entropy"] < 0.5 * first["entropy"]:
        found.append("entropy has halved: samples are getting alike (--epsilon-high, a lower learning rate)")
    if last["completions/mean_length"] > 2 * first["completions/mean_length"]:
        found.append("completions are twice as long: does the reward pay for length?")
    if {"reward", "gold_reward"} <= both:
        rise, fall = last["reward"] - first["reward"], first["gold_reward"] - last["gold_reward"]
        if rise > 0 and fall > 0.02:
            found.append(
                "reward rises and gold reward falls: it is being hacked (a weight for the KL, --max-kl)"
            )
    return found


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
    "objective/scores": ".3f",
    "objective/kl": ".3f",
    "objective/entropy": ".3f",
    "loss/policy_avg": "+.4f",
    "loss/value_avg": ".4f",
    "val/explained_var": ".2f",
    "policy/clipfrac_avg": ".3f",
    "completions/mean_length": ".1f",
    "step_time": ".1f",
}
SUMS = (  # of a minibatch, over its tokens that are trained on
    *("tokens", "approxkl", "policy_loss", "value_loss"),
    *("ratio", "clip_low", "clip_high", "value_clip", "entropy", "sampler_gap"),
)


def main(args: Args) -> dict:
    """Train as `args` says and return the last metrics."""
    rank, world_size, device = setup_distributed()
    torch.manual_seed(args.seed)
    check_sampling(args.temperature, args.top_p)
    output_dir = choose_output_dir(args, "ppo_rlhf")
    tokenizer = load_tokenizer(args)
    check_reference(args, tokenizer)
    judge_names = find_judges(args.reward_model)
    functions, gold = load_functions(args.reward, args), load_functions(args.eval_reward, args)
    sources = [tokenize_prompts(tokenizer, name, args.dataset_split, args) for name in args.dataset]
    prompts = [prompt for source in sources for prompt in source]
    held_out = tokenize_prompts(tokenizer, args.eval_dataset, args.eval_split, args, args.num_eval)
    readers = judge_tokenizers(judge_names, prompts + held_out, args)
    value_source = judge_names[0] if args.value_init == "reward" else args.model
    value_tokenizer = readers[value_source] if args.value_init == "reward" else tokenizer
    check_value_model(value_source, value_tokenizer, tokenizer)
    recorded = load_rollouts(args, tokenizer) if args.replay_rollouts else None
    epoch_size, prompt_lengths = len(prompts), np.array([len(prompt.input_ids) for prompt in prompts])
    group_size, num_prompts = args.num_generations, args.batch_size // args.num_generations
    total_steps = args.max_steps or max(1, math.ceil(args.num_epochs * epoch_size / num_prompts))
    num_epochs = math.ceil(total_steps * num_prompts / epoch_size)
    stream = data_order(prompt_lengths, [prompts], [1], epoch_size, num_epochs, args.order, args.seed)
    say(tokenizer.decode(prompts[stream[0]].input_ids))

    roles = {"policy": args.model, "value model": value_source, "reference": args.ref_model or args.model}
    roles |= {"reward": ", ".join([*args.reward, *judge_names]), "gold reward": ", ".join(args.eval_reward)}
    say("; ".join(f"{role}: {name}" for role, name in roles.items() if name))
    policy = load_model(args.model, args, tokenizer, device)
    value_model = load_reward_model(value_source, args, value_tokenizer, device)
    if args.value_init == "policy":
        value_model.score.weight.data.zero_()  # lm-human-preferences
    ref_policy = load_model(args.ref_model or args.model, args, tokenizer, device).requires_grad_(False)
    judges = [load_judge(name, reader, args, device) for name, reader in readers.items()]
    frozen = [ref_policy] + [judge for judge, _ in judges]
    for model in frozen if args.offload else ():
        model.to("cpu")
    adaptive = Adaptive(args.kl_coef)
    moving = torch.nn.ModuleDict({"policy": policy, "value_model": value_model, "adaptive": adaptive})
    optimizers = make_optimizer(policy, args), make_optimizer(value_model, args)
    step, num_tokens = load_checkpoint(output_dir, moving, optimizers) if args.resume else (0, 0)
    columns = COLUMNS | ({"gold_reward": ".3f"} if gold else {})
    logger = Logger(args, output_dir, total_steps, step, columns)
    metrics, spent, monitor = {}, False, Monitor(output_dir, step)
    shaping = {"reward_clip": args.reward_clip, "missing_eos_penalty": args.missing_eos_penalty}
    clip = {"epsilon": args.epsilon, "epsilon_high": args.epsilon_high, "dual_clip": args.dual_clip}
    schedule = {"warmup_steps": args.warmup_steps, "lr_schedule": args.lr_schedule}
    judging = (gold, [], ()) if gold else (functions, judges, args.reward_weights)
    scorers = [] if gold else frozen[1:]  # what an evaluation runs
    evaluation = (policy, tokenizer, held_out, *judging, args, device)
    if step == 0:
        with on_device(scorers, args, device):
            results, samples = evaluate_policy(*evaluation)
        logger.log({"step": 0} | results, samples)
    while step < total_steps and not spent:
        # 1. Rollout: completions of the prompts of the step, from the policy as it is
        step, started = step + 1, time.perf_counter()
        picks = stream[(step - 1) * num_prompts : step * num_prompts]
        asked = [prompts[i] for i in picks for _ in range(group_size)]  # B, group after group
        if recorded is not None:
            rollout = recorded[(step - 1) % len(recorded)]
        else:
            rollout = roll_out(policy, tokenizer, asked, args, device, seed=args.seed * 10**6 + step)
        rolled_out = time.perf_counter()

        # 2. Score: a line for each function, the reward models last; NaN says nothing
        with on_device(frozen[1:], args, device):
            terms = score(functions, judges, rollout, args, device)  # (F, B)
        caps = torch.tensor(args.reward_caps or [math.inf] * len(terms), dtype=torch.float64)
        proxy = weigh(terms.minimum(caps[:, None]), args.reward_weights)  # (B,)
        gold_scores = score(gold, [], rollout, args, device)  # (gold, B)
        ended = torch.tensor([completion.ended for completion in rollout])  # (B,)
        bootstrapped = ~ended & (args.truncated == "bootstrap")  # (B,): a value in place of their score
        kept = bootstrapped | ~proxy.isnan() & (ended | (args.truncated != "drop"))  # (B,): are trained on
        scores = adaptive.normalized(proxy, kept & ~bootstrapped) if args.normalize_reward else proxy  # (B,)
        scores = shaped_scores(scores, ended, bootstrapped=bootstrapped, **shaping)  # (B,)
        scored = time.perf_counter()

        # 3. Look: what the models say of each token, on the rows of the first pass, so that its ratio is
        #    exactly 1 up to the first update
        sequences = [Sequence(completion.input_ids, completion.trained) for completion in rollout]
        counts = torch.tensor([len(completion.token_ids) for completion in rollout])  # (B,)
        sequence_index = torch.arange(len(rollout)).repeat_interleave(counts)  # (C,)
        minibatches, fills = plan_updates(sequences, step, args, world_size)
        first_pass = [row for _, rows in minibatches[: args.num_minibatches] for row in rows]
        looking = partial(look, sequences=sequences, rows=first_pass, counts=counts, args=args, device=device)
        with_entropy = partial(token_logprobs, temperature=args.temperature, return_entropy=True)
        old_logprobs, old_entropy = looking(with_entropy, policy).unbind(1)  # (C,) each
        with on_device([ref_policy], args, device):
            ref_logprobs, _ = looking(with_entropy, ref_policy).unbind(1)
        old_values, values_behind = looking(token_values, value_model).unbind(1)  # (C,) each
        looked = time.perf_counter()

        # 4. Advantage: of each token; completions that are not trained on take no part
        ref_log_ratio = kl_k1(old_logprobs, ref_logprobs)  # (C,)
        kl = segment_sum(ref_log_ratio, sequence_index, len(rollout)).mean().item()  # per completion
        kl_coef = adaptive.kl_coef.item() if args.kl_controller == "adaptive" else args.kl_coef
        token_rewards = shaped_rewards(scores, ref_log_ratio, sequence_index, kl_coef=kl_coef)  # (C,)
        trained = kept[sequence_index]  # (C,): tokens of what is trained on
        rlhf_reward = token_rewards[trained].sum() / kept.sum()  # (): of a completion
        if args.whiten_rewards:
            token_rewards[trained] = whiten(token_rewards[trained], shift_mean=False)
        end_values = values_behind[counts.cumsum(0) - 1] * bootstrapped  # (B,)
        advantages, returns = gae(
            token_rewards, old_values, sequence_index, gamma=args.gamma, lam=args.lam, end_values=end_values
        )  # (C,) each
        explained = explained_variance(old_values[trained], returns[trained])
        advantage_std = nan_std(advantages[trained])
        if args.whiten_advantages:
            advantages[trained] = whiten(advantages[trained])
        advantages = advantages * trained
        if args.kl_controller == "adaptive" and step > args.value_warmup_steps:  # until then the KL is 0
            adaptive.steer(kl, target=args.kl_target, horizon=args.kl_horizon, num_episodes=args.batch_size)

        # 5. Update: `num_ppo_epochs` passes over the rollout, `num_minibatches` updates each
        policy.train()
        value_model.train()
        sampler_logps = torch.cat([torch.from_numpy(completion.logprobs) for completion in rollout])  # (C,)
        of_rollout = [old_logprobs, advantages, old_values, returns, sampler_logps.double()]
        of_rollout = torch.stack(of_rollout, 1).float()  # (C, 5)
        sums = torch.zeros(len(minibatches), len(SUMS), dtype=torch.float64, device=device)
        norms, done = torch.zeros(2, device=device), 0  # of the gradients of policy and value model
        waits = args.value_warmup_steps  # the policy's schedule begins behind them
        policy_share = lr_factor(max(1, step - waits), total_steps=total_steps - waits, **schedule)
        rates = (
            args.learning_rate * policy_share if step > waits else 0.0,
            args.value_learning_rate * lr_factor(step, total_steps=total_steps, **schedule),
        )
        for n, (ids, rows) in enumerate(minibatches):
            num_tokens_trained = int(counts[ids][kept[ids]].sum())
            if not num_tokens_trained:
                continue
            weights = kept.float() / num_tokens_trained  # (B,): a mean over tokens
            for mine in rows[rank::world_size]:
                batch = collate_answers([sequences[i] for i in mine], args, device)
                per_token = of_rollout[positions(mine, counts)].to(device)  # (C, 5)
                old, advantage, old_value, return_, sampler = per_token.unbind(1)
                weight = weights[mine].to(device)[batch.sequence_index]  # (C,)
                logprobs, entropy = token_logprobs(
                    policy, batch, temperature=args.temperature, return_entropy=True
                )  # (C,) each
                policy_losses = ppo_policy_loss(logprobs, old, advantage, **clip)  # (C,)
                bonus = args.entropy_coef * entropy if args.entropy_coef else 0.0
                share = weight * world_size  # FSDP2 averages over processes what is to be summed
                ((policy_losses - bonus) * share).sum().backward()
                values = token_values(value_model, batch)[:, 0]  # (C,)
                value_losses = value_loss(values, old_value, return_, cliprange_value=args.cliprange_value)
                (args.vf_coef * value_losses * share).sum().backward()
                with torch.no_grad():
                    ratio = torch.exp(logprobs - old)  # (C,)
                    clip_low, clip_high = clip_shares(ratio, advantage, args.epsilon, args.epsilon_high)
                    of_tokens = {
                        "tokens": torch.ones_like(ratio),
                        "approxkl": kl_k3(old, logprobs),
                        "policy_loss": policy_losses,
                        "value_loss": value_losses,
                        "ratio": ratio,
                        "clip_low": clip_low,
                        "clip_high": clip_high,
                        "value_clip": value_losses > (values - return_).square() / 2,  # the clip holds them
                        "entropy": entropy,
                        "sampler_gap": (old - sampler).abs(),
                    }  # (C,) each
                    told = torch.stack([of_tokens[name].double() for name in SUMS])  # (SUMS, C)
                    sums[n] += torch.where(weight > 0, told, 0.0).sum(1)
            if args.target_kl is not None:
                num, moved = all_reduce(sums[n, :2].clone())  # tokens, approxkl
                if moved > args.target_kl * num:
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    break
            clipped = [
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                for model in (policy, value_model)
            ]
            grad_norms = torch.stack([full(norm) for norm in clipped])  # (2,)
            if not torch.isfinite(grad_norms).all():
                loss, norm = (sums[n, 2:4].sum() / sums[n, 0]).item(), grad_norms.sum().item()
                stop_on_nonfinite(output_dir, step, [sequences[i] for i in ids], loss, norm)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
            norms += grad_norms
            done += 1
        stopping = all_reduce(torch.tensor(float(logger.stopping), device=device)).item()
        table = all_reduce(sums).cpu()  # (minibatches, SUMS)
        table = table[table[:, 0] > 0]  # those that were looked at
        table = table if len(table) else torch.full((1, len(SUMS)), math.nan)  # nothing was trained on
        of_minibatches = table / table[:, :1]  # means over the tokens of each
        averages, losses, first, last = (
            dict(zip(SUMS, line.tolist(), strict=True))
            for line in (
                table.sum(0) / table[:, 0].sum(),  # over all tokens
                of_minibatches.mean(0),  # as they were minimised, one by one
                of_minibatches[0],
                of_minibatches[-1],
            )
        )
        seconds = time.perf_counter() - started

        # 6. Evaluate, log, save
        batch_tokens = sum(len(sequence.input_ids) for sequence in sequences)
        num_tokens += batch_tokens
        names = [name for name, _ in functions] + ["reward_model"] * bool(judges)
        metrics = {
            "step": step,
            "epoch": step * num_prompts / epoch_size,
            "episode": step * args.batch_size,
            "loss": losses["policy_loss"]
            + args.vf_coef * losses["value_loss"]
            - args.entropy_coef * losses["entropy"],
            "loss/policy_avg": losses["policy_loss"],
            "loss/value_avg": losses["value_loss"],
            "learning_rate": rates[0],
            "learning_rate/value": rates[1],
            "grad_norm": norms[0].item() / max(1, done),
            "grad_norm/value": norms[1].item() / max(1, done),
            "objective/scores": proxy.nanmean().item(),
            "objective/kl": kl,
            "objective/non_score_reward": -kl_coef * kl,
            "objective/rlhf_reward": rlhf_reward.item(),
            "objective/entropy": old_entropy.mean().item(),
            "objective/kl_coef": kl_coef,
            "kl": kl_k3(old_logprobs, ref_logprobs).mean().item(),
            "policy/approxkl_avg": averages["approxkl"],
            "policy/approxkl_last": last["approxkl"],
            "policy/clipfrac_avg": averages["clip_low"] + averages["clip_high"],
            "policy/clipfrac_first": first["clip_low"] + first["clip_high"],
            "policy/clipfrac_last": last["clip_low"] + last["clip_high"],
            "policy/entropy_avg": averages["entropy"],
            "val/clipfrac_avg": averages["value_clip"],
            "val/ratio": averages["ratio"],
            "val/ratio_first": first["ratio"],
            "val/explained_var": explained,
            "val/mean": old_values.mean().item(),
            "val/returns_mean": returns[trained].mean().item(),
            "advantage_std": advantage_std,
            "updates": done,
            "sampling/logp_difference_mean": averages["sampler_gap"],
            "num_tokens": num_tokens,
            "tokens_per_second": batch_tokens / seconds,
            "step_time": seconds,
            "packing/fill": float(np.mean(fills)),
            "time/rollout": rolled_out - started,
            "time/reward": scored - rolled_out,
            "time/logprobs": looked - scored,
            "time/update": seconds - (looked - started),
        }
        metrics |= describe_rollout(rollout, names, terms, gold_scores, group_size)
        if device.type == "cuda":
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        monitor(metrics)
        spent = args.max_kl is not None and metrics["kl"] > args.max_kl
        samples = []
        if step == total_steps or spent or (args.eval_every and step % args.eval_every == 0):
            with on_device(scorers, args, device):
                results, samples = evaluate_policy(*evaluation)
            metrics |= results
        logger.log(metrics, samples)
        if args.save_rollouts and recorded is None:
            save_rollout(output_dir, step, rollout, proxy)
        if stopping or (args.save_every and (step == total_steps or spent or step % args.save_every == 0)):
            save_checkpoint(output_dir, moving, optimizers, step, num_tokens, args.keep_checkpoints)
        if stopping and step < total_steps:
            logger.close(f"stopped; continue with --resume --output-dir {output_dir}")
            return metrics
    if spent:
        say(
            f"stopped at step {step}: KL {metrics['kl']:.3g} to the reference is above --max-kl {args.max_kl}"
        )
    save_model(output_dir / "value_model", value_model, tokenizer)
    save_model(output_dir / "model", policy, tokenizer)
    logger.close(f"models saved to {output_dir / 'model'} and {output_dir / 'value_model'}")
    return metrics


class Adaptive(torch.nn.Module):
    """The numbers that a run adapts, in checkpoints beside its models: KL weight and moments of scores."""

    def __init__(self, kl_coef: float):
        super().__init__()
        self.register_buffer("kl_coef", torch.tensor(kl_coef, dtype=torch.float64))
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64))

    def normalized(self, scores: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Scores (B,) under the moments of all that were known so far, these included."""
        self.moments.copy_(merged_moments(self.moments, scores[known]))
        count, mean, squares = self.moments
        return (scores - mean) / ((squares / (count - 1).clamp(min=1)).sqrt() + 1e-8)  # + 1e-8: as in whiten

    def steer(self, kl: float, **settings):
        """Adapt the KL weight after a rollout of this KL per completion."""
        self.kl_coef.fill_(adapted_kl_coef(self.kl_coef.item(), kl, **settings))


@fsdp_forward
def token_values(value_model, batch) -> torch.Tensor:
    """Values of the states before and behind each trained token, (C, 2), float32, in units of the score."""
    hidden = packed_hidden_states(value_model, batch)[0]  # (N, H)
    states = torch.stack([hidden[batch.predictor_index], hidden[batch.completion_index]], 1)  # (C, 2, H)
    return value_model.score(states.float()).squeeze(-1) + value_model.config.reward_offset


@torch.no_grad()
def look(function, model, *, sequences, rows, counts, args, device) -> torch.Tensor:
    """What function(model, packed row) says of each token, (C, k), float64, on every process."""
    model.eval()
    rank, world_size = process()
    found = torch.zeros(int(counts.sum()), 2, device=device)
    for row in rows[rank::world_size]:
        said = function(model, collate_answers([sequences[i] for i in row], args, device))
        found[positions(row, counts)] = torch.stack(said, 1) if isinstance(said, tuple) else said
    return all_reduce(found).double().cpu()


def positions(ids, counts: torch.Tensor) -> torch.Tensor:
    """Where the tokens of some sequences stand in what is known of all tokens, in the order of the ids."""
    starts = counts.cumsum(0) - counts  # (B,)
    ranges = [torch.arange(starts[i], starts[i] + counts[i]) for i in ids]
    return torch.cat(ranges or [torch.zeros(0, dtype=torch.long)])


def evaluate_policy(policy, tokenizer, held_out, functions, judges, weights, args, device):
    """Rewards of sampled and greedy answers to held-out prompts; how often one of k samples is right."""
    if not held_out:
        return {}, []
    asked = [prompt for prompt in held_out for _ in range(args.eval_samples)]
    sampled = roll_out(policy, tokenizer, asked, args, device, seed=args.seed)
    greedy = roll_out(policy, tokenizer, held_out, replace(args, temperature=1e-6), device, seed=args.seed)
    scores = score(functions, judges, sampled, args, device)  # (F, P k)
    rewards = weigh(scores, weights)  # (P k,)
    metrics = {
        "eval/reward": rewards.nanmean().item(),
        "eval/greedy_reward": weigh(score(functions, judges, greedy, args, device), weights).nanmean().item(),
        "eval/mean_length": float(np.mean([len(completion.token_ids) for completion in sampled])),
        "eval/clipped_ratio": float(np.mean([not completion.ended for completion in sampled])),
    }
    if functions:  # right: more than half a point of the first one
        right = (scores[0] > 0.5).view(len(held_out), -1).numpy()  # (P, k)
        finals = np.array([final_answer(c.text) for c in sampled], object).reshape(right.shape)  # (P, k)
        metrics["eval/pass@k"] = pass_at_k(right, args.eval_samples)
        chosen = [majority(list(f)) for f in finals]  # (P,)
        metrics["eval/maj@k"] = float(np.mean(right[np.arange(len(chosen)), chosen]))
    samples = [
        {"prompt": tokenizer.decode(c.prompt.input_ids), "completion": c.text, "reward": reward}
        for c, reward in zip(sampled, rewards.tolist(), strict=True)
    ]
    return metrics, samples[:: args.eval_samples]


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
class Sequence(NamedTuple):
    """Token ids and which of them are trained, both (length,)."""

    input_ids: np.ndarray
    trained: np.ndarray


FILLER = Sequence(np.zeros(1, np.int32), np.zeros(1, bool))  # for a process that has no row: trains nothing


class Prompt(NamedTuple):
    """What is asked: its token ids, and the dataset row with a `prompt`, text or messages."""

    input_ids: list[int]
    row: dict


class Completion(NamedTuple):
    """A sampled answer as it was sampled: token ids, their log-probs under the sampler, its text."""

    prompt: Prompt
    token_ids: list[int]
    logprobs: np.ndarray
    text: str
    ended: bool

    @property
    def input_ids(self) -> np.ndarray:
        return np.array(self.prompt.input_ids + self.token_ids, np.int32)

    @property
    def trained(self) -> np.ndarray:
        return np.arange(len(self.prompt.input_ids) + len(self.token_ids)) >= len(self.prompt.input_ids)


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


def check_sampling(temperature: float, top_p: float):
    """End the run where samples would come from another distribution than the one that is scored."""
    if temperature <= 0:
        fail(f"--temperature must be above 0 to explore, not {temperature}")
    if top_p != 1:
        fail("--top-p must be 1: log-probs of the whole distribution do not fit samples of a part of it")


def check_reference(args, tokenizer):
    """End the run where --ref-model does not exist or has other tokens than --model."""
    if args.ref_model is None:
        return
    path = locate(args.ref_model)
    if path.startswith((".", "/")) and not Path(path).is_dir():
        fail(f"--ref-model {args.ref_model}: no such folder")
    try:
        vocabulary = AutoTokenizer.from_pretrained(path).get_vocab()
    except (OSError, ValueError) as error:
        fail(f"--ref-model {args.ref_model}: {str(error).splitlines()[0]}")
    if vocabulary != tokenizer.get_vocab():
        fail(f"--ref-model {args.ref_model}: its tokenizer is not that of --model {args.model}")


def check_value_model(name: str, value_tokenizer, tokenizer):
    """End the run where the value model would read other token ids than the policy writes."""
    if value_tokenizer.get_vocab() != tokenizer.get_vocab():
        fail(f"--value-init reward: the tokenizer of {name} is not that of --model; use --value-init policy")


class Monitor:
    """Looks at the metrics of a run, warns of each of `symptoms` once; knows the steps before a --resume."""

    def __init__(self, output_dir: Path, step: int):
        path = output_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if step and process()[0] == 0 else []
        self.history = [self.known(line) for line in map(json.loads, lines) if 0 < line["step"] <= step]
        self.warned = set()

    def known(self, metrics: dict) -> dict:
        """Metrics without those that are NaN, under the names that `symptoms` reads: PPO has others."""
        alike = {"objective/entropy": "entropy", "objective/scores": "reward"}
        return {alike.get(key, key): value for key, value in metrics.items() if value == value}

    def before(self, name: str) -> float:
        """What a metric was at the last step before a --resume, on every process; 0 at the start."""
        value = [self.history[-1][name] if self.history else 0]
        if dist.is_initialized():
            dist.broadcast_object_list(value)
        return value[0]

    def __call__(self, metrics: dict):
        self.history.append(self.known(metrics))
        first, last = self.history[:5], self.history[-5:]
        keys = [key for key in self.history[-1] if all(key in m for m in first + last)]
        means = [{key: sum(m[key] for m in steps) / len(steps) for key in keys} for steps in (first, last)]
        for symptom in symptoms(*means) if len(self.history) >= 10 else ():
            if symptom not in self.warned:
                say(f"warning: step {metrics['step']}: {symptom}")
                self.warned.add(symptom)


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


def tokenize_prompts(tokenizer, source: str | None, split: str, args, limit: int = 0) -> list[Prompt]:
    """The prompts of a dataset, with all columns for the reward functions; `question` is a user's message."""
    if source is None:
        return []
    prompts, dropped = [], 0
    rows = load_rows(source, split, args.dataset_config)[: limit or None]
    for n, row in enumerate(tqdm(rows, desc=f"tokenize {source}", leave=False, disable=None), 1):
        where = f"{source}, row {n}"
        if not isinstance(row, dict):
            fail(f"{where}: not an object with columns, but {type(row).__name__}")
        asked = [{"role": "user", "content": row["question"]}] if "question" in row else None
        row = row | {"prompt": row.get("prompt", asked)}
        if not isinstance(row["prompt"], str | list) or not row["prompt"]:
            fail(f"{where}: found the columns {', '.join(row)}; needed is prompt or question")
        try:
            if args.prompt_template:
                question = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
                row["prompt"] = args.prompt_template.replace("{prompt}", question)
            elif isinstance(row["prompt"], list) and tokenizer.chat_template is None:
                use_chatml(tokenizer)
            input_ids = prompt_tokens(tokenizer, row["prompt"], row)
        except Exception as error:  # templates raise what they like
            fail(f"{where}: neither text nor messages that the chat template takes ({error})")
        if len(input_ids) > args.max_prompt_length:
            dropped += 1
        else:
            prompts.append(Prompt(input_ids, row))
    if not prompts:
        fail(f"{source}: no prompt is within --max-prompt-length {args.max_prompt_length}")
    told = f", {dropped:,} dropped as longer than {args.max_prompt_length:,} tokens" if dropped else ""
    say(f"{source}: {len(prompts):,} prompts{told}")
    return prompts


def prompt_tokens(tokenizer, prompt, row: dict) -> list[int]:
    """A prompt, text or messages, as the token ids after which an answer begins."""
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options)
    return tokenizer(text, add_special_tokens=False).input_ids


def load_function(spec: str):
    """The function that file.py:function names."""
    path, _, name = spec.rpartition(":")
    path = Path(locate(path))
    if not name or not path.is_file():
        fail(f"{spec}: not file.py:function of a file that exists")
    found = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:  # whatever stands in that file
        fail(f"{spec}: {type(error).__name__}: {error}".splitlines()[0])
    if not callable(getattr(module, name, None)):
        fail(f"{spec}: {path.name} has no function {name}")
    return getattr(module, name)


def load_functions(specs: tuple[str, ...], args) -> list[tuple[str, object]]:
    """Names and functions of --reward or --eval-reward, with those of our settings that they name."""
    ours = {
        "allow_code_execution": args.allow_code_execution,
        "max_completion_length": args.max_completion_length,
    }
    found = []
    for spec in specs:
        function = load_function(spec)
        named = inspect.signature(function).parameters
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in named.values()):
            fail(f"{spec}: without **kwargs it cannot take prompts, completions and the dataset's columns")
        name = spec.rpartition(":")[2]
        if name in (known for known, _ in found):
            name = f"{name}_{len(found)}"
        found.append((name, partial(function, **{key: value for key, value in ours.items() if key in named})))
    return found


def score(functions, judges, rollout: list[Completion], args, device) -> torch.Tensor:
    """Scores (F, B), float64, of each function and, last, of the reward models together; NaN for None."""
    rank, world_size = process()
    scores = torch.zeros(len(functions), len(rollout), dtype=torch.float64)  # (F, B)
    blocks = range(0, len(rollout), args.num_generations)  # groups stay together: some rewards compare
    mine = [n for start in blocks[rank::world_size] for n in range(start, start + args.num_generations)]
    mine = [n for n in mine if n < len(rollout)]
    rows, texts = [rollout[n].prompt.row for n in mine], [rollout[n].text for n in mine]
    columns = {
        key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)
    }
    given = {
        "prompts": columns.pop("prompt", []),
        "completion_ids": [rollout[n].token_ids for n in mine],
    } | columns
    given["completions"] = [
        [{"role": "assistant", "content": text}] if isinstance(row["prompt"], list) else text
        for row, text in zip(rows, texts, strict=True)
    ]
    for line, (name, function) in zip(scores, functions, strict=True):
        values = list(function(**given) or ()) if mine else []
        if len(values) != len(mine):
            fail(f"reward {name} returned {len(values)} numbers for {len(mine)} completions")
        line[mine] = torch.tensor([math.nan if v is None else float(v) for v in values], dtype=torch.float64)
    scores = all_reduce(scores.to(device)).cpu()
    if judges:
        lines = torch.stack([judge_rewards(*judge, rollout, args, device) for judge in judges])  # (judges, B)
        together = combine(lines, reward_aggregation=args.reward_aggregation, std_coef=args.std_coef)  # (B,)
        scores = torch.cat([scores, together[None].double().cpu()])
    return scores


def weigh(scores: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """The weighted sum of scores (F, B) -> (B,): without those that are NaN, NaN where all are."""
    weighted = scores * torch.tensor(weights or [1.0] * len(scores), dtype=torch.float64)[:, None]
    return torch.where(scores.isnan().all(0), math.nan, weighted.nansum(0))


def describe_rollout(rollout, names, scores, gold_scores, group_size: int) -> dict:
    """Metrics of what was sampled: rewards by name, lengths, how many were cut off, how alike groups are."""
    lengths = [len(completion.token_ids) for completion in rollout]
    groups = [[c.token_ids for c in rollout[n : n + group_size]] for n in range(0, len(rollout), group_size)]
    metrics = {
        "completions/mean_length": float(np.mean(lengths)),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": float(np.mean([not completion.ended for completion in rollout])),
        "completions/distinct_2": float(np.mean([distinct_ngrams(group) for group in groups])),
        "completions/self_bleu": float(np.mean([self_bleu(group) for group in groups[:8]])),
    }
    for name, line in zip(names, scores, strict=True):
        metrics |= {f"rewards/{name}/mean": line.nanmean().item(), f"rewards/{name}/std": nan_std(line)}
    if len(gold_scores):
        metrics["gold_reward"] = weigh(gold_scores, ()).nanmean().item()
    return metrics


def nan_std(x: torch.Tensor) -> float:
    """Unbiased standard deviation of what is not NaN, 0 for fewer than two numbers."""
    known = x[~x.isnan()]
    return known.std().item() if len(known) > 1 else 0.0


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


def load_reward_model(name: str, args, tokenizer, device):
    """A model with one output and float32 parameters; on a causal language model it gets a new head.

    The head starts with standard deviation 1 / sqrt(H + 1) (arXiv:2009.01325), from the seed.
    """
    path = locate(name)
    config = AutoConfig.from_pretrained(path, num_labels=1)
    options = {"config": config, "dtype": torch.float32, "attn_implementation": args.attn}
    try:
        model = AutoModelForSequenceClassification.from_pretrained(path, **options)
    except ValueError:
        fail(f"{name}: transformers has no sequence classification for {config.model_type}")
    model.auto_class, model.stored_dtype = AutoModelForSequenceClassification, config.dtype
    embed_new_tokens(model, tokenizer)
    if not any("SequenceClassification" in kind for kind in config.architectures or ()):
        generator = torch.Generator().manual_seed(args.seed)
        std = 1 / math.sqrt(model.score.in_features + 1)
        model.score.weight.data = torch.randn(model.score.weight.shape, generator=generator) * std
    model.config.reward_offset = getattr(config, "reward_offset", 0.0)
    model.config.pad_token_id = (
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )
    prepare_model(model, args, device)
    with unsharded(model):
        check_rewards(model, name)
    size = sum(p.numel() for p in model.parameters())
    say(f"{name}: {config.model_type}, {size:,} parameters, {device.type}, attention {args.attn}")
    return model


@torch.no_grad()
def check_rewards(model, name: str):
    """End the run unless two answers in one packed row score as each does alone in the stock model.

    Also where their prompt stands in the row once, if --attn packed lets it.
    """
    device, vocab_size = model.get_input_embeddings().weight.device, model.config.get_text_config().vocab_size
    one, other = (torch.arange(1, n + 1) * 7919 % (vocab_size - 1) + 1 for n in (9, 6))
    attn = model.config._attn_implementation
    rows = [([one, other], None)] + [([one, torch.cat([one[:4], other])], [0, 4])] * (attn == "packed")
    for sequences, shared in rows:
        ends = [(ids, torch.arange(len(ids)) == len(ids) - 1) for ids in sequences]
        pad, model.config.pad_token_id = model.config.pad_token_id, None  # stock reads the last token then
        logits = [model(input_ids=ids[None].to(device), use_cache=False).logits[0, 0] for ids in sequences]
        model.config.pad_token_id = pad
        rewards = answer_rewards(model, collate(ends, device, shared))
        error = (rewards - torch.stack(logits).float()).abs().max().item()
        if not error < (1e-3 if logits[0].dtype == torch.float32 and device.type == "cpu" else 0.1):
            fail(f"{name}: packed rewards differ from the model's by {error:.2g} under --attn {attn}")


def find_judges(names: tuple[str, ...]) -> list[str]:
    """The folders of --reward-model, an ensemble's members in its place; each must be a reward model."""
    found = []
    for name in names:
        index = Path(locate(name)) / "ensemble.json"
        members = json.loads(index.read_text())["members"] if index.exists() else []
        found += [str(index.parent / member) for member in members] or [name]
    for name in found:
        path = locate(name)
        if path.startswith((".", "/")) and not Path(path).is_dir():
            fail(f"--reward-model {name}: no such folder")
        try:
            kinds = AutoConfig.from_pretrained(path).architectures or ()
        except (OSError, ValueError) as error:
            fail(f"--reward-model {name}: {str(error).splitlines()[0]}")
        if not any("SequenceClassification" in kind for kind in kinds):
            fail(f"--reward-model {name}: no reward model, but {', '.join(kinds) or 'nothing known'}")
    return found


def judge_tokenizers(names: list[str], prompts: list[Prompt], args) -> dict:
    """The own tokenizer of each reward model, which must have a template if prompts are messages."""
    found = {name: own_tokenizer(name, args, "--reward-model") for name in names}
    for name, tokenizer in found.items():
        if tokenizer.chat_template is None and any(isinstance(p.row["prompt"], list) for p in prompts):
            fail(f"--reward-model {name}: prompts are messages, and its tokenizer has no chat template")
    return found


def load_judge(name: str, tokenizer, args, device) -> tuple:
    """A frozen reward model and its own tokenizer."""
    return load_reward_model(name, args, tokenizer, device).requires_grad_(False), tokenizer


def own_tokenizer(name: str, args, flag: str):
    """The tokenizer of another model than --model, which `flag` gives, with its own chat template."""
    return load_tokenizer(replace(args, model=name, chat_template=None), flag)


@fsdp_forward
def answer_rewards(model, batch) -> torch.Tensor:
    """Rewards (B,), float32, of the B answers in a packed row, read at the last trained token of each."""
    states = packed_hidden_states(model, batch)[0, batch.completion_index]  # (C, H)
    ones = torch.ones_like(states[:, 0], dtype=torch.long)  # (C,)
    last = segment_sum(ones, batch.sequence_index, batch.num_sequences).cumsum(0) - 1  # (B,)
    return model.score(states[last if len(ones) else []].float()).squeeze(-1)  # none where a row holds filler


@torch.no_grad()
def judge_rewards(model, tokenizer, rollout: list[Completion], args, device) -> torch.Tensor:
    """Rewards (B,) of completions under a reward model, each read at its last token, on every process."""
    rank, world_size = process()
    sequences = [judged(tokenizer, completion) for completion in rollout]
    rewards = torch.zeros(len(sequences), device=device)
    rows = pack(
        [len(s.input_ids) for s in sequences], args.max_tokens_per_micro_batch, multiple_of=world_size
    )
    for row in rows[rank::world_size]:
        rewards[row] = answer_rewards(model, collate([sequences[i] for i in row] or [FILLER], device))
    return all_reduce(rewards) + model.config.reward_offset


def judged(tokenizer, completion: Completion) -> Sequence:
    """A completion as a reward model reads it: with its own tokenizer and template, its last token marked."""
    row = completion.prompt.row
    end = tokenizer.turn_end_id if isinstance(row["prompt"], list) else tokenizer.eos_token_id
    ending = [end] * (completion.ended and end is not None)
    prompt_ids = prompt_tokens(tokenizer, row["prompt"], row)
    answer_ids = tokenizer(completion.text, add_special_tokens=False).input_ids
    input_ids = np.array(prompt_ids + answer_ids + ending, np.int32)
    return Sequence(input_ids, np.arange(len(input_ids)) == len(input_ids) - 1)


def combine(rewards: torch.Tensor, *, reward_aggregation: str, std_coef: float) -> torch.Tensor:
    """One reward from those of several models, (members, ...) -> (...), after arXiv:2310.02743.

    A policy that is trained against the mean finds where single members err; `min` and `mean_minus_std`
    distrust answers on which they differ. The paper takes off variances, in another unit.
    """
    if reward_aggregation == "min":
        return rewards.amin(0)
    return rewards.mean(0) - (
        std_coef * rewards.std(0, unbiased=False) if reward_aggregation == "mean_minus_std" else 0
    )


@contextmanager
def on_device(models, args, device):
    """Frozen models on the device while they are used; under --offload on the CPU before and after."""
    for model in models if args.offload else ():
        model.to(device)
    yield
    for model in models if args.offload else ():
        model.to("cpu")


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


class InverseSampler(LogitsProcessor):
    """Samples by inverting the distribution function at uniform numbers (B, T) given, and keeps log-probs.

    Each sequence has its own numbers, so what is sampled depends on no other: not on the sequences that are
    sampled at once, nor on the number of processes.
    """

    def __init__(self, uniforms: torch.Tensor, temperature: float):
        self.uniforms, self.temperature, self.logprobs = uniforms, temperature, []  # logprobs: T times (B,)

    def __call__(self, input_ids, scores):
        logprobs = (scores.float() / self.temperature).log_softmax(-1)  # (B, V)
        cumulative = logprobs.double().exp().cumsum(-1)  # (B, V)
        wanted = self.uniforms[:, len(self.logprobs), None] * cumulative[:, -1:]  # (B, 1)
        tokens = torch.searchsorted(cumulative, wanted, right=True).clamp(max=scores.shape[-1] - 1)  # (B, 1)
        self.logprobs.append(logprobs.gather(-1, tokens).squeeze(-1))
        return torch.full_like(scores, -math.inf).scatter(-1, tokens, 0.0)  # greedy decoding then takes it


@torch.no_grad()
def roll_out(policy, tokenizer, prompts: list[Prompt], args, device, *, seed: int) -> list[Completion]:
    """Sample a completion of each prompt at --temperature, up to and with the first end token.

    Every setting is given here: the model's own generation config stays out of it.
    """
    policy.eval()
    rank, world_size = process()
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    own_config, policy.generation_config = (
        policy.generation_config,
        GenerationConfig(
            max_new_tokens=args.max_completion_length,
            eos_token_id=tokenizer.end_ids,
            pad_token_id=pad,
            do_sample=False,  # InverseSampler has sampled already
        ),
    )
    size = (len(prompts), args.max_completion_length + 1)  # some devices decode one token more
    uniforms = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order, sampled = (
        sorted(range(rank, len(prompts), world_size), key=lambda i: len(prompts[i].input_ids)),
        {},
    )
    with unsharded(policy):
        for start in range(0, len(order), args.generation_batch_size):
            chunk = order[start : start + args.generation_batch_size]
            asked = [prompts[i].input_ids for i in chunk]
            width = max(map(len, asked))
            input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in asked], device=device)
            attention_mask = torch.tensor(
                [[0] * (width - len(ids)) + [1] * len(ids) for ids in asked], device=device
            )
            sampler = InverseSampler(uniforms[chunk].to(device), args.temperature)
            output = policy.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_processor=[sampler],
                synced_gpus=False,  # processes have different numbers of chunks
            )
            logprobs = torch.stack(sampler.logprobs, 1).cpu().numpy()  # (chunk, T)
            for i, ids, line in zip(chunk, output[:, width:].tolist(), logprobs, strict=True):
                stop = next((n + 1 for n, token in enumerate(ids) if token in tokenizer.end_ids), len(ids))
                sampled[i] = ids[:stop], line[:stop]
    policy.generation_config = own_config
    if dist.is_initialized():
        shares = [None] * world_size
        dist.all_gather_object(shares, sampled)
        sampled = {i: found for share in shares for i, found in share.items()}
    return [completion_of(tokenizer, prompt, *sampled[i]) for i, prompt in enumerate(prompts)]


def completion_of(tokenizer, prompt: Prompt, token_ids: list[int], logprobs) -> Completion:
    """What was sampled, with its text; truncated if its last token is not an end token."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    return Completion(prompt, token_ids, logprobs, text, token_ids[-1] in tokenizer.end_ids)


def save_rollout(output_dir: Path, step: int, rollout: list[Completion], rewards: torch.Tensor):
    """Add a step's completions to rollouts.jsonl."""
    if process()[0] == 0:
        with open(output_dir / "rollouts.jsonl", "a") as file:
            for completion, reward in zip(rollout, rewards.tolist(), strict=True):
                sampled = {"token_ids": completion.token_ids, "logprobs": completion.logprobs.tolist()}
                asked = {"prompt_ids": completion.prompt.input_ids, "row": completion.prompt.row}
                reward = None if math.isnan(reward) else reward
                line = {"step": step} | asked | sampled | {"completion": completion.text, "reward": reward}
                file.write(json.dumps(line) + "\n")


def load_rollouts(args, tokenizer) -> list[list[Completion]]:
    """The rollouts of --replay-rollouts in the order of their steps."""
    steps = {}
    for line in load_rows(args.replay_rollouts, "train", None):
        if (
            not isinstance(line, dict)
            or not {"step", "prompt_ids", "token_ids", "logprobs", "row"} <= line.keys()
        ):
            fail(f"--replay-rollouts {args.replay_rollouts}: not a rollouts.jsonl of --save-rollouts")
        prompt, logprobs = Prompt(line["prompt_ids"], line["row"]), np.array(line["logprobs"], np.float32)
        completion = completion_of(tokenizer, prompt, line["token_ids"], logprobs)
        steps.setdefault(line["step"], []).append(completion)
    size = args.num_generations
    groups = [rollout[n : n + size] for rollout in steps.values() for n in range(0, len(rollout), size)]
    if any(len(g) < size or any(c.prompt.input_ids != g[0].prompt.input_ids for c in g) for g in groups):
        fail(
            f"--replay-rollouts {args.replay_rollouts}: groups are not of {args.num_generations} completions"
        )
    return [steps[step] for step in sorted(steps)]


def plan_updates(sequences: list[Sequence], step: int, args, world_size: int) -> tuple[list, list[float]]:
    """The minibatches of all passes over a rollout, (ids, packed rows) each; how full the rows are.

    A minibatch takes whole groups, shuffled anew in every pass.
    """
    minibatches, fills = [], []
    for epoch in range(args.num_ppo_epochs):
        rng = np.random.default_rng((args.seed, step, epoch))
        shuffled = rng.permutation(len(sequences) // args.num_generations)
        for groups in np.array_split(shuffled, args.num_minibatches):
            ids = (groups[:, None] * args.num_generations + np.arange(args.num_generations)).flatten()
            rows, fill = rows_of(sequences, ids, args, world_size)
            minibatches.append((ids, rows))
            fills.append(fill)
    return minibatches, fills


def rows_of(sequences: list[Sequence], ids: np.ndarray, args, world_size: int) -> tuple[list, float]:
    """Which of `ids`, group after group, stand in each packed row, and the share of the rows' room they fill.

    Where a group shares its prompt it stands in one row.
    """
    size = args.num_generations if args.share_prompt else 1
    units = ids.reshape(-1, size)  # (units, size)
    lengths = [
        sum(len(sequences[i].input_ids) for i in unit) - (size - 1) * prompt_length(sequences[unit[0]])
        for unit in units
    ]
    rows = pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)
    room = len(rows) * max([args.max_tokens_per_micro_batch, *lengths])
    return [units[row].flatten() for row in rows], sum(lengths) / max(1, room)


def prompt_length(sequence: Sequence) -> int:
    """Tokens before the first trained one."""
    return int(sequence.trained.argmax())


def collate_answers(sequences: list[Sequence], args, device):
    """A packed row of answers, or of whole groups with each prompt once; of filler where there is nothing."""
    size = args.num_generations
    shared = (
        [prompt_length(s) if n % size else 0 for n, s in enumerate(sequences)] if args.share_prompt else None
    )
    return collate(sequences or [FILLER], device, shared or None)


def final_answer(text: str) -> str:
    """What follows the last `####` (GSM8K's mark) without thousands separators, or else the whole text."""
    return text.rsplit("####", 1)[-1].strip().replace(",", "")


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
