"""Preference learning from one's own samples: online and iterative DPO, self-rewarding, SPIN, Nash-MD.

    L = -E log sigma(beta log pi/ref (y_w|x) - beta log pi/ref (y_l|x))             Eq. 7, arXiv:2305.18290

A pair is two answers, one or both the policy's own. Five algorithms, one loop; --loss ipo and simpo as well:

    --algorithm     y, y'                        who prefers            drawn        reference
    online_dpo      best and worst of G answers  --reward               every batch  start  arXiv:2402.04792
    iterative_dpo   best and worst of G answers  --reward               in rounds    round  arXiv:2312.16682
    self_rewarding  best and worst of G answers  the policy as a judge  in rounds    round  arXiv:2401.10020
    spin            the data's answer, its own   nobody: the data wins  in rounds    round  arXiv:2401.01335
    nash_md         its own, the mixture's       --reward of both       every batch  start  arXiv:2312.00886

"round" is the policy as it was when the round began (--reference initial: the start, too). The loop:

    1. Answers   G of the policy to each prompt; beside each the data's (spin) or the mixture's (nash_md)
    2. Judge     score them: reward functions, reward models, or the policy's own expected score
    3. Pairs     the best and the worst answer; a tie makes none; log-probs of both under the reference
    4. Update    the loss on the pairs of the step; their mean over the whole optimizer batch
    5. Evaluate  sampled and greedy answers to held-out prompts; log; save

Deviations from the papers, each with its reason:
    1. nash_md has the players of its paper, policy against pi^(1 - c) ref^c sampled token by token; the paper
       updates with a policy gradient, here a pair has a loss, and what the judge prefers has simply won.
    2. online_dpo asks a reward, not a language model that sees both answers (OAIF). self_rewarding reads
       expected scores, not sampled ones; training on judgements before (EFT) is left to sft.py.
    3. The pairs of a round are passed over once; the mean of the loss is over pairs, of which a tie is none.

    python online_dpo.py                                       # CPU, offline, 2 minutes on one core
    python online_dpo.py --algorithm iterative_dpo --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k \
        --dataset-config main --learning-rate 1e-6 --beta 0.1 --batch-size 512 --max-completion-length 512

Shapes: P prompts, G policy answers each, B = P G, K groups of A answers, C tokens, F rewards, S scores.
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
from collections import namedtuple
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
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
from transformers.cache_utils import DynamicCache, DynamicLayer

import common
import loading
from common import CHATML, check_packed, segment_sum, token_logprobs

HERE = Path(__file__).resolve().parent
JUDGE_PROMPT = """Add up the points of this answer, one for each that holds: it is relevant; it covers what
was asked; it is useful; it is clear; it is right in every step. Say the sum of the points alone."""
Decay = Annotated[float, Field(ge=0, lt=1)]
Algorithm = Literal["online_dpo", "iterative_dpo", "self_rewarding", "spin", "nash_md"]
# The flags that an algorithm has for itself, and what they are where they are not given.
SETTINGS = {
    "online_dpo": {"reward": ("rewards.py:math_answer",)},
    "iterative_dpo": {"reward": ("rewards.py:math_answer",), "reference": "round", "round_steps": 10},
    "self_rewarding": {"reference": "round", "round_steps": 10},
    "spin": {"reference": "round", "round_steps": 10},
    "nash_md": {"reward": ("tiny/reward",), "mixture_coef": 0.25},
}


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@pydantic.dataclasses.dataclass
class Args:
    # Algorithm
    algorithm: Algorithm = "online_dpo"  # who answers, who judges, when: the table at the head of this file
    reference: Literal["round", "initial"] | None = None  # round: the policy as it began; initial: the start
    round_steps: PositiveInt | None = None  # with rounds: steps of one, all drawn as it begins; 10
    loss: Literal["dpo", "ipo", "simpo"] = "dpo"  # of a pair; simpo compares without a reference
    beta: PositiveFloat | None = None  # DPO's tie to the reference, IPO's tau, SimPO's beta; 1, 0.1, 2
    gamma_beta_ratio: float = 0.5  # SimPO's target margin gamma as a share of beta (SimPO: 0.3 to 1.0)
    mixture_coef: Decay | None = None  # share of the reference in nash_md's opponent, 0: self-play; 0.25

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
    max_prompt_length: PositiveInt = 512  # longest prompt in tokens; longer ones are dropped and counted

    # Answers and rewards
    reward: tuple[str, ...] = ()  # file.py:function, or a reward model; math_answer, for nash_md tiny/reward
    reward_weights: tuple[float, ...] = ()  # weight of each --reward in turn; by default 1 each
    eval_reward: tuple[str, ...] = ()  # gold rewards: logged and evaluated on, never optimised
    allow_code_execution: bool = False  # let rewards run what the model writes (rewards.py:code_tests)
    reward_timeout: NonNegativeFloat = 1800  # seconds a reward has for a batch, or the run ends; 0: for ever
    num_generations: PositiveInt = 4  # the policy's answers to each prompt; spin and nash_md: pairs, too
    max_completion_length: PositiveInt = 128  # longest sampled answer in tokens
    temperature: PositiveFloat = 1.0  # sampling temperature
    max_tokens_per_rollout: PositiveInt = 65536  # tokens that are sampled at once: memory, never the result
    rollout: Literal["transformers", "vllm"] = "transformers"  # sampling engine, in this process
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.4  # share of a GPU's memory that vLLM may take

    # Optimization
    optimizer: loading.Optimizer = "adamw"  # adamw8bit: its moments in 8 bits, a quarter of their memory
    learning_rate: NonNegativeFloat = 1e-4  # peak, for tiny/; models of billions need 1e-5 (SFT) to 1e-6
    lr_schedule: Literal["linear", "cosine", "constant"] = "constant"  # after warm-up; the first two end at 0
    warmup_steps: NonNegativeInt = 5  # steps over which the learning rate rises linearly from 0
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay rates of AdamW's two moments
    weight_decay: NonNegativeFloat = 0.0  # AdamW's decoupled weight decay, on matrices only
    max_grad_norm: PositiveFloat = 1.0  # larger gradients are scaled down to this norm; inf: no clipping
    batch_size: PositiveInt = 64  # sequences, pairs or completions per step, over all processes
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
        own = SETTINGS[self.algorithm]
        for flag in ("reward", "reference", "round_steps", "mixture_coef"):
            if getattr(self, flag) in (None, ()):
                setattr(self, flag, own.get(flag, getattr(self, flag)))
            elif flag not in own:
                fail(f"--{flag.replace('_', '-')} means nothing to --algorithm {self.algorithm}")
        least = 1 if self.algorithm in ("spin", "nash_md") else 2
        if self.num_generations < least or self.batch_size % self.num_generations:
            fail(f"--num-generations {self.num_generations}: {least} or more that divide --batch-size")
        if not self.dataset:
            kind = "preference" if self.algorithm == "spin" else "prompts"
            self.dataset = (f"tiny/data/{kind}_train.jsonl",)
            self.eval_dataset = self.eval_dataset or "tiny/data/prompts_eval.jsonl"
            self.eval_reward = self.eval_reward or ("rewards.py:math_answer",)
        self.beta = self.beta or {"dpo": 1.0, "ipo": 0.1, "simpo": 2.0}[self.loss]
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            fail(f"{len(self.reward_weights)} --reward-weights for {len(self.reward)} rewards")
        if "tiny/" not in self.model and self.learning_rate == Args.learning_rate:
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


def ipo_loss(chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float) -> torch.Tensor:
    """IPO of each pair, (B,) from log pi/ref, summed over the tokens, of both of its answers, (B,) in nats.

    Eq. 17 of arXiv:2310.12036, (h - 1 / (2 beta))^2: h is the difference of the two log-ratios, and beta the
    paper's tau. Where DPO's loss falls for ever, this one has its minimum at a margin of 1 / (2 beta).
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def simpo_loss(avg_chosen_logps, avg_rejected_logps, *, beta: float, gamma_beta_ratio: float) -> torch.Tensor:
    """SimPO of each pair, (B,) from log-probs averaged over each answer's tokens (B,).

    Eq. 6 of arXiv:2405.14734: the margin beta x difference must exceed gamma = beta x gamma_beta_ratio.
    """
    return -F.logsigmoid(beta * (avg_chosen_logps - avg_rejected_logps - gamma_beta_ratio))


def preferred(margins: torch.Tensor, tie: float = 1e-4) -> torch.Tensor:
    """1 where the chosen answer has the higher reward, 1/2 in a tie, 0 else: margins (B,) -> (B,).

    Rewards closer than `tie` are equal: in another row a float32 reward differs by 1e-6.
    """
    return (1 + margins.sign() * (margins.abs() > tie)) / 2


def best_and_worst(scores: torch.Tensor, tie: float = 1e-4) -> list[tuple[int, int]]:
    """Where the best and the worst answer of each group stand, of scores (K, A) read row by row.

    Not of groups whose scores are within `tie`; NaN is neither. Of 0 1 1, 1 1 1, 2 NaN 1: (1, 0), (6, 8).
    """
    high, best = scores.nan_to_num(-math.inf).max(1)  # (K,) each
    low, worst = scores.nan_to_num(math.inf).min(1)  # (K,) each
    first, differ = torch.arange(len(scores)) * scores.shape[1], high - low > tie  # (K,) each
    return list(zip((first + best)[differ].tolist(), (first + worst)[differ].tolist()))


def mixed_logits(logits: torch.Tensor, ref_logits: torch.Tensor, mixture_coef: float) -> torch.Tensor:
    """Logits (..., V) of pi^(1 - c) ref^c from those of pi and ref, token by token (arXiv:2312.00886)."""
    return (1 - mixture_coef) * logits.float() + mixture_coef * ref_logits.float()


def weighted_sum(scores: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """Rewards (B,) from the scores (F, B) of F functions, by default 1 each: without NaN, NaN if all are."""
    weighted = scores * torch.tensor(weights or [1.0] * len(scores), dtype=scores.dtype)[:, None]  # (F, B)
    return weighted.nansum(0).masked_fill(scores.isnan().all(0), math.nan)


def lr_factor(step: int, total_steps: int, warmup_steps: int, lr_schedule: str) -> float:
    """The learning rate of the 1-based `step` as a share of its peak: linear warm-up, then down towards 0."""
    if step <= warmup_steps:
        return step / warmup_steps
    done = (step - warmup_steps - 1) / max(1, total_steps - warmup_steps)  # in [0, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[lr_schedule]


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------
MEANS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")  # over the pairs
MEANS += ("logps/chosen", "logps/rejected", "logps/chosen_drift")


def main(args: Args) -> dict:
    """Train as `args` says and return the last metrics."""
    device, world_size = setup_distributed(), dist.get_world_size()
    output_dir, tokenizer = choose_output_dir(args), load_tokenizer(args)
    if args.ref_model and load_tokenizer(replace(args, model=args.ref_model)).vocab != tokenizer.vocab:
        fail(f"--ref-model {args.ref_model} has another vocabulary than --model {args.model}")
    spin, nash, judging = (args.algorithm == name for name in ("spin", "nash_md", "self_rewarding"))
    prompts = load_prompts(tokenizer, args.dataset, args.dataset_split, args)
    held_out = load_prompts(tokenizer, args.eval_dataset, args.eval_split, args, args.num_eval)
    given = given_answers(tokenizer, prompts, args) if spin else []
    prompts = [answer.prompt for answer in given] or prompts
    facing = lambda prompt, text: prompt._replace(row=prompt.row | {"opponent": text})
    if nash:  # its judge may look at the other answer, too
        prompts, held_out = ([facing(prompt, None) for prompt in some] for some in (prompts, held_out))
    question = load_judge(tokenizer) if judging else None
    longest = max(len(prompt.input_ids) for prompt in prompts + held_out) + args.max_completion_length
    longest += len(question("", "")[0]) + 1 if judging else 0
    if longest > tokenizer.positions:
        fail(f"--max-completion-length: {longest} tokens with a prompt, {tokenizer.positions} positions")
    asked = ([] if spin else prompts[:1]) + held_out[:1]  # spin's data need no column of a reward
    rewarders, gold = (load_rewards(x, asked, args, device) for x in (args.reward, args.eval_reward))
    group_size, num_prompts = args.num_generations, args.batch_size // args.num_generations
    total_steps = args.max_steps or max(1, math.ceil(args.num_epochs * len(prompts) / num_prompts))
    rng, round_steps = np.random.default_rng(args.seed), args.round_steps or 1
    num_epochs = math.ceil((total_steps + round_steps) * num_prompts / len(prompts))  # of whole rounds
    stream = np.concatenate([rng.permutation(len(prompts)) for _ in range(num_epochs)])
    say(f"first prompt:\n{tokenizer.decode(prompts[stream[0]].input_ids)}")

    engine = runpy.run_path(located("rollout_vllm.py"))["find_engine"]() if args.rollout == "vllm" else None
    policy = load_model(args.model, args, device)
    end_ids = end_tokens(tokenizer, policy)
    policy.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id)
    if engine:
        policy.decode = engine(located(args.model), args.vllm_memory, args).decode
    optimizer = loading.adamw(args, policy)
    if args.lora_rank and not (args.ref_model or nash):
        ref_policy = loading.WithoutLora(policy)
    else:
        ref_policy = load_model(args.ref_model or args.model, args, device, frozen=True)
    reference = policy if args.round_steps and args.reference == "round" else ref_policy
    progress = load_checkpoint(output_dir, policy, optimizer) if args.resume else {}
    step, num_tokens = progress.get("step", 0), progress.get("num_tokens", 0)
    first = lambda: step - (step - 1) % round_steps  # step of a round, whose pairs are kept in a file:
    kept = lambda: output_dir / "rounds" / f"steps_{first():06d}_to_{first() + round_steps - 1:06d}.jsonl"
    if step % round_steps and not kept().exists():
        fail(f"--resume: {kept()} is missing, the pairs of the round in which the run stopped")
    pairs = [json.loads(line) for line in kept().open()] if step % round_steps else []
    logger, metrics = Logger(args, output_dir, total_steps, step), {}
    evaluation = partial(evaluate_rewards, policy, tokenizer, held_out, rewarders, gold, args)
    simpo = partial(simpo_loss, gamma_beta_ratio=args.gamma_beta_ratio)
    pair_loss = {"dpo": dpo_loss, "ipo": ipo_loss, "simpo": simpo}[args.loss]
    if step == 0:
        evaluated, samples = evaluation()
        logger.log({"step": 0} | evaluated, samples)
    while step < total_steps:
        # 1. Answers: G of the policy to each prompt, of a step or of a whole round, and their opponents
        step, seed, started, drawn = step + 1, (args.seed, step + 1), time.perf_counter(), {}
        if (step - 1) % round_steps == 0:
            ids = stream[(step - 1) * num_prompts : (step - 1 + round_steps) * num_prompts]
            asked, size = [prompts[i] for i in ids], group_size  # P; A
            rollout = answers = roll_out(policy, tokenizer, asked, group_size, args.temperature, seed, args)
            others = [given[i] for i in ids for _ in range(group_size)] if spin else []  # B, or none
            if nash:  # with other uniform numbers: from the same ones it would say what the policy says
                seed, mixture = (*seed, 1), Mixture(policy, ref_policy, args.mixture_coef)
                others = roll_out(mixture, tokenizer, asked, group_size, args.temperature, seed, args)
            if others:
                both = [(x, y) for pair in zip(rollout, others) for x, y in (pair, pair[::-1])]
                answers, size = [x._replace(prompt=facing(x.prompt, y.text)) for x, y in both], 2

            # 2. Judge: a score of each answer, (K A,)
            scores = weighted_sum(score(rewarders, answers, size, args), args.reward_weights)
            if spin:
                scores = torch.tensor([0.0, 1.0]).repeat(len(others))
            if judging:  # the mean of the points 0 to 5, by the log-probs of their tokens as if no other came
                asked = [question(answer.prompt.row["prompt"], answer.text) for answer in answers]
                logps = answer_sums(policy, asked, 1.0, args, device).cpu()  # (B, S)
                scores = logps.softmax(-1) @ torch.arange(6.0)  # (B,)
            if step == 1 and scores.isnan().all():
                fail(f"--reward {', '.join(rewarders)}: None for every completion of the first step")

            # 3. Pairs: best and worst of each group, and their log-probs under the reference
            places, per_step = best_and_worst(scores.view(-1, size)), len(answers) // round_steps
            places = [(i, j) for i, j in places if answers[i].token_ids != answers[j].token_ids]
            pairs = [as_row(step + i // per_step, answers[i], answers[j], scores[[i, j]]) for i, j in places]
            groups = [pair["ids"] for pair in pairs]
            ref_logps = answer_sums(reference, groups, args.temperature, args, device).tolist()  # (K, 2)
            pairs = [pair | {"ref_logps": logps} for pair, logps in zip(pairs, ref_logps)]
            if args.round_steps and dist.get_rank() == 0:
                unfinished = kept().with_suffix(".partial")
                unfinished.parent.mkdir(exist_ok=True)
                unfinished.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
                unfinished.rename(kept())  # from here on it counts
            gold_scores = weighted_sum(score({} if spin else gold, answers, size, args), ())  # (K A,)
            drawn = describe_pairs(rollout, scores, gold_scores, places, size, args)
            if args.round_steps or step % args.log_every == 0:
                groups = [[x.prompt.input_ids, x.token_ids] for x in rollout[: args.batch_size]]
                logps = answer_sums(ref_policy, groups, args.temperature, args, device).sum().item()
                logprobs = torch.cat([x.logprobs for x in rollout[: args.batch_size]])  # (C,) as sampled
                drawn["kl"] = (logprobs.sum().item() - logps) / len(logprobs)  # k1

        # 4. Update: the pairs of this step; where all answers tie, there is no gradient, and nothing moves
        batch_pairs = [pair for pair in pairs if pair["step"] == step]
        groups = [pair["ids"] for pair in batch_pairs]
        for group in optimizer.param_groups:
            factor = lr_factor(step, total_steps, args.warmup_steps, args.lr_schedule)
            group["lr"] = args.learning_rate * factor
        policy.train()
        sums = torch.zeros(2 + len(MEANS), device=device)  # processes told to stop, loss, MEANS
        for ids, logps in group_logps(policy, groups, args.temperature, args, device):  # (b, 2)
            ref = torch.tensor([batch_pairs[i]["ref_logps"] for i in ids], device=device).view(-1, 2)
            counts = torch.tensor([list(map(len, groups[i][1:])) for i in ids], device=device).view(-1, 2)
            compared = logps / counts if args.loss == "simpo" else logps - ref  # (b, 2)
            loss = pair_loss(*compared.T, beta=args.beta).sum() / len(groups)
            (loss * world_size).backward()  # FSDP2 averages over processes what is to be summed
            with torch.no_grad():
                chosen, rejected = args.beta * compared.T  # rewards (b,) each
                margins, drift = chosen - rejected, (logps - ref)[:, 0]  # (b,) each
                means = torch.stack([chosen, rejected, preferred(margins), margins, *logps.T, drift])
                sums[1:] += torch.cat([loss[None], means.sum(1) / len(groups)])
        sums[0] = logger.stopping
        dist.all_reduce(sums)
        stopping, loss, *means = sums.tolist()
        grad_norm = loading.clip_grad_norm(policy, args.max_grad_norm)
        if not math.isfinite(loss + grad_norm):
            fail(f"step {step}: loss {loss}, gradient norm {grad_norm}; --resume goes back to a checkpoint")
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started

        # 5. Evaluate, log, save
        batch_tokens = sum(len(ids) for group in groups for ids in group)
        num_tokens += batch_tokens
        metrics = {
            "step": step,
            "epoch": step * num_prompts / len(prompts),
            "loss": loss,
            "learning_rate": group["lr"],
            "grad_norm": grad_norm,
            **dict(zip(MEANS, means if groups else [math.nan] * len(MEANS))),
            "pairs/usable_ratio": len(groups) / (args.batch_size if spin or nash else num_prompts),
            **drawn,
            "sampling/temperature": args.temperature,
            "num_tokens": num_tokens,
            "tokens_per_second": batch_tokens / seconds,
            "step_time": seconds,
        }
        last, samples = step == total_steps, []
        if last or (args.eval_every and step % args.eval_every == 0):
            evaluated, samples = evaluation()
            metrics |= evaluated
        logger.log(metrics, samples)
        if stopping or (args.save_every and (last or step % args.save_every == 0)):
            save_checkpoint(output_dir, policy, optimizer, {"step": step, "num_tokens": num_tokens})
        if stopping and not last:
            logger.close(f"stopped; continue with --resume --output-dir {output_dir}")
            return metrics
    save_model(output_dir / "model", policy, tokenizer)
    logger.close(f"model saved to {output_dir / 'model'}")
    return metrics


def describe_pairs(rollout, scores, gold, places, size, args) -> dict:
    """Metrics of the policy's answers, with scores and gold rewards (K A,), and of the pairs at `places`."""
    own = 1 if args.algorithm in ("spin", "nash_md") else size  # the second answer is the opponent's
    reward, gold_reward = (x.view(-1, size)[:, :own].nanmean().item() for x in (scores, gold))
    margins = torch.stack([gold[i] - gold[j] for i, j in places]) if places else gold[:0]  # (K,)
    won = preferred(scores[::2] - scores[1::2]).nanmean().item() if args.algorithm == "nash_md" else math.nan
    return {
        "reward": math.nan if args.algorithm == "spin" else reward,
        "gold_reward": gold_reward,
        "win_rate": won,
        "pairs/gold_accuracy": preferred(margins)[margins.abs() > 1e-4].mean().item(),  # if gold is known
        "completions/mean_length": float(np.mean([len(c.token_ids) for c in rollout])),
        "completions/clipped_ratio": float(np.mean([not c.ended for c in rollout])),
    }


def evaluate_rewards(policy, tokenizer, held_out, rewarders, gold_rewarders, args) -> tuple[dict, list[dict]]:
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
        rewards = weighted_sum(score(judges, answers, k, args), weights)  # (P k,)
        metrics["reward"] = rewards.nanmean().item()
        if torch.isin(rewards, torch.tensor([0.0, 1.0])).all():  # the reward tells right from wrong
            metrics["pass@k"] = rewards.view(-1, k).amax(1).mean().item()
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
COLUMNS = ("loss", "reward", "gold_reward", "rewards/margins", "kl", "grad_norm", "step_time")


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


class Mixture(torch.nn.Module):
    """pi^(1 - c) ref^c of two models, as a model that `roll_out` samples from: see `mixed_logits`."""

    def __init__(self, policy, ref_policy, mixture_coef: float):
        super().__init__()
        self.models, self.mixture_coef = torch.nn.ModuleList([policy, ref_policy]), mixture_coef
        self.config, self.device = policy.config, policy.device
        self.generation_config = policy.generation_config

    def next_logits(self, input_ids, past_key_values, **options) -> torch.Tensor:
        caches, logits = [DynamicCache(config=model.config) for model in self.models], []
        layers, own = past_key_values.layers, len(caches[0].layers)  # the policy's, then the reference's
        if len(layers) == own:  # the first call
            layers += [common.RoomyLayer() if type(x) is DynamicLayer else x for x in caches[1].layers]
        for model, cache, part in zip(self.models, caches, (layers[:own], layers[own:])):
            cache.layers = part
            logits.append(common.next_logits(model, input_ids, past_key_values=cache, **options))
        return mixed_logits(*logits, self.mixture_coef)


def given_answers(tokenizer, prompts: list[Prompt], args) -> list[Completion]:
    """The answers that the rows of prompts hold, with their end tokens; rows without one are dropped."""
    conversation_ids = runpy.run_path(str(HERE / "rewards.py"))["conversation_ids"]
    columns, found, dropped = ("chosen", "completion", "messages", "answer"), [], {}
    for n, prompt in enumerate(prompts, 1):
        row, size = common.conversational(prompt.row), len(prompt.input_ids)
        try:
            answer = next((row[name] for name in columns if row.get(name)), "")
            answer = answer if isinstance(answer, str) else answer[-1:]  # of messages the last
            settings = (row.get(name) for name in ("truncated", "tools", "chat_template_kwargs"))
            input_ids = conversation_ids(tokenizer, row["prompt"], answer, *settings)
            too_long = len(input_ids) > size + args.max_completion_length
            if too_long or not answer or input_ids[:size] != prompt.input_ids:
                raise ValueError("no answer, one above --max-completion-length, or another prompt with it")
            text = tokenizer.decode(input_ids[size:], skip_special_tokens=True)
            found.append(Completion(prompt, input_ids[size:], None, text, True))
        except Exception as error:  # chat templates raise what they like
            dropped.setdefault(str(error).partition("\n")[0], []).append(n)
    report_dropped("--algorithm spin", len(prompts), dropped)
    return found


def load_judge(tokenizer):
    """self_rewarding's question: a function of prompt and answer to its ids, and then those of each score."""
    apply = common.template_of(tokenizer, {})

    def question_ids(prompt, answer: str, score="") -> list[int]:
        turns = [prompt] if isinstance(prompt, str) else [str(turn["content"]) for turn in prompt]
        asked = "\n\n".join([JUDGE_PROMPT, "Question:", *turns, "Answer:", answer, "Points, from 0 to 5:"])
        head = apply([{"role": "user", "content": asked}], add_generation_prompt=True)
        return tokenizer(head + score, add_special_tokens=False).input_ids

    scored = [question_ids("?", "!", digit) for digit in "012345"]
    if any(ids[:-1] != question_ids("?", "!") for ids in scored):
        fail("--algorithm self_rewarding: a score from 0 to 5 is not one token behind the generation prompt")
    return lambda prompt, answer: [question_ids(prompt, answer), *(ids[-1:] for ids in scored)]


def as_row(step: int, chosen: Completion, rejected: Completion, scores: torch.Tensor) -> dict:
    """A pair in the columns that dpo.py reads; its step, scores (2,), the place of its prompt, all ids."""
    prompt, ids = chosen.prompt, [chosen.prompt.input_ids, chosen.token_ids, rejected.token_ids]
    row = {"prompt": prompt.row["prompt"], "chosen": chosen.text, "rejected": rejected.text, "ids": ids}
    return row | {"step": step, "scores": scores.tolist(), "place": prompt.place}


def group_logps(model, groups: list, temperature: float, args, device):
    """Which of groups [prompt ids, ids of each of A answers] a row holds, and their log-probs (b, A).

    Of the rows of this process; all have as many, at last empty ones. A group is never divided.
    """
    share, world_size = args.attn == "packed", dist.get_world_size()
    size = len(groups[0]) - 1 if groups else 2
    lengths = [sum(map(len, group)) + (0 if share else size - 1) * len(group[0]) for group in groups]
    rows = common.pack(lengths, args.max_tokens_per_micro_batch, multiple_of=world_size)
    for ids in rows[dist.get_rank() :: world_size]:
        members = [(groups[i][0], answer, n) for i in ids for n, answer in enumerate(groups[i][1:])]
        sequences = [(x + y, [False] * len(x) + [True] * len(y)) for x, y, _ in members]
        shared = [len(x) if n and share else 0 for x, _, n in members]
        batch = common.collate(sequences or [([0], [False])], device, shared if any(shared) else None)
        logprobs = token_logprobs(model, batch, temperature=temperature)  # (C,)
        logps = segment_sum(logprobs, batch.sequence_index, batch.num_sequences)  # (b A,); a filler's: (1,)
        yield ids, logps[: len(ids) * size].view(len(ids), size)


@torch.no_grad()
def answer_sums(model, groups: list, temperature: float, args, device) -> torch.Tensor:
    """`group_logps` of all groups, (K, A), on every process."""
    model.eval()
    sums = torch.zeros(len(groups), len(groups[0]) - 1 if groups else 2, device=device)
    for ids, logps in group_logps(model, groups, temperature, args, device):
        sums[ids] = logps
    dist.all_reduce(sums)
    return sums


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
