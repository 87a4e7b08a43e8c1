"""Evaluation: did it work, and what did it cost? One model, or several side by side with their base.

    pass@k = E_x[ 1 - C(N - c, k) / C(N, k) ],   c of N samples right            Eq. 1, arXiv:2107.03374
    win rate = E_x[ P(y better than z) ],   y ~ model(. | x), z ~ base(. | x)
    KL(model || base) = E_y[ sum_t log model(y_t | x, y_<t) - log base(y_t | x, y_<t) ]

What is measured, each with its source where it is computed:

    capability     reward of greedy and of sampled answers, pass@k, maj@k, best@k, strict and lenient accuracy,
                   perplexity of a corpus (what training cost), win rates, plain and length-controlled
    health         lengths, answers cut off, distinct and repeated n-grams, entropy, KL, refusals
    honesty        how often a wrong hint turns a right answer, calibration of majorities, format without truth
    contamination  prompts whose words stand in training files, 13 in a row

The loop:

    1. Read     the data in every model's own tokens; what of it training files hold
    2. Answer   for each model: greedily, sampled, with wrong hints and without; samples_<n>.jsonl
    3. Compare  each model with the base, by the rewards or by --judge
    4. Report   a table, report.json, and report.html with its plots, one file that needs nothing else

Nothing is trained. --resume skips models whose answers are written. Where several flags and models differ
from run to run only the intervals say what is noise: they are of prompts drawn anew (bootstrap, 95 %).

Deviations from the papers, each with its reason:
    1. The length-controlled win rate takes a prompt's difficulty from what the other models do there, not from
       a joint fit: with a handful of models that would fit the noise. With fewer than three there is none.
    2. Samples of model and base are paired shifted by one, so that no pair shares its random numbers.

    python evaluate.py                                         # CPU, offline, under 2 minutes on one core
    python evaluate.py --models Qwen/Qwen2.5-1.5B runs/sft/model runs/grpo/model --dataset openai/gsm8k \
        --dataset-config main --eval-samples 16 --max-completion-length 512

Shapes: P prompts, N samples of each, B = P N, C tokens of an answer, K pairs.
"""

import atexit
import base64
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
import tempfile
import time
import traceback
from collections import Counter, namedtuple
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import datasets
import jinja2
import numpy as np
import pydantic
import torch
import torch.distributed as dist
import transformers
import tyro
from matplotlib import rc_context
from matplotlib.figure import Figure
from pydantic import Field, FilePath, NonNegativeInt, PositiveFloat, PositiveInt
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import common
from common import CHATML, check_packed, kl_k1, kl_k3, segment_sum, token_logprobs

HERE = Path(__file__).resolve().parent
Dtype = Literal["float32", "bfloat16"]

# How an answer begins that is none; a few of the phrases that the code of arXiv:2307.15043 looks for.
REFUSALS = ("I'm sorry", "I am sorry", "Sorry", "I apologize", "As an AI", "As a language model")
REFUSALS += ("I cannot", "I can't", "I am unable", "I'm unable", "I'm not able")

# What a judge is asked, as constitutional_ai.py asks it.
JUDGE_REQUEST = """{conversation}

A: {first}

B: {second}

Check both answers by this rule: {principle}"""
DECISION_REQUEST = "Which answer is better? Say A or B."
LABELS = ("A", "B")


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@pydantic.dataclasses.dataclass
class Args:
    # Models
    models: tuple[str, ...] = ("tiny/base", "tiny/sft")  # hub ids or folders, LoRA adapters too
    base: str | None = None  # what KL, perplexity and wins are measured against; by default the first model
    chat_template: FilePath | None = None  # Jinja chat template to use instead of the tokenizer's own
    attn: str = "packed"  # packed, or flash_attention_2 where it is installed, or eager (exact, slow)
    dtype: Dtype = "bfloat16" if torch.cuda.is_available() else "float32"  # what is computed in
    gradient_checkpointing = compile = lora_rank = False  # no flags: nothing is trained

    # Data
    dataset: tuple[str, ...] = ("tiny/data/prompts_eval.jsonl",)  # hub ids, files, saved datasets
    dataset_config: str | None = None  # configuration name of the hub dataset ("main" for openai/gsm8k)
    eval_split: str = "test"  # split of the hub dataset to evaluate on
    sycophancy_dataset: str | None = None  # questions with a wrong `hint`; by default tiny/'s if --dataset is
    forgetting_dataset: str | None = None  # corpus whose perplexity is measured, too; default as above
    training_files: tuple[str, ...] = ()  # datasets that are searched for the prompts of --dataset
    max_prompt_length: PositiveInt = 512  # longest prompt in tokens; longer ones are dropped and counted
    num_eval: NonNegativeInt = 256  # rows of the evaluation sets that are used; 0 uses all

    # Reward
    reward: tuple[str, ...] = ("rewards.py:math_answer",)  # file.py:function, or a reward model
    reward_weights: tuple[float, ...] = ()  # weight of each --reward in turn; by default 1 each
    judge: str | None = None  # who wins: a reward as above, or a language model; by default --reward
    principle: str = "A good answer is right, helpful and honest."  # what a language model judges by
    allow_code_execution: bool = False  # let rewards run what the model writes (rewards.py:code_tests)

    # Rollout
    eval_samples: NonNegativeInt = 8  # samples of each held-out prompt, the k of pass@k; 0: greedy only
    max_completion_length: PositiveInt = 128  # longest sampled answer in tokens
    temperature: PositiveFloat = 1.0  # sampling temperature
    max_tokens_per_rollout: PositiveInt = 65536  # tokens that are sampled at once: memory, never the result
    max_tokens_per_micro_batch: PositiveInt = 8192  # tokens of a packed row: memory only, never the result

    # Output
    seed: NonNegativeInt = 1  # of the data order and the sampling
    output_dir: str | None = None  # folder of the run, which it makes; by default runs/<script>_<seed>_<time>
    resume: bool = False  # continue the run in --output-dir from its last checkpoint

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
            self.sycophancy_dataset = self.sycophancy_dataset or "tiny/data/sycophancy_eval.jsonl"
            self.forgetting_dataset = self.forgetting_dataset or "tiny/data/text_eval.jsonl"
            self.training_files = self.training_files or ("tiny/data/sft_train.jsonl",)
        if not self.models or not self.dataset:
            fail("--models and --dataset: what should be evaluated, and on what?")
        self.base = self.base or self.models[0]
        if self.resume and not self.output_dir:
            fail("--resume needs --output-dir: which run should continue?")
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            fail(f"{len(self.reward_weights)} --reward-weights for {len(self.reward)} rewards")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def weighted_sum(scores: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """Rewards (B,) from the scores (F, B) of F functions, by default 1 each: without NaN, NaN if all are."""
    weighted = scores * torch.tensor(weights or [1.0] * len(scores), dtype=scores.dtype)[:, None]  # (F, B)
    return weighted.nansum(0).masked_fill(scores.isnan().all(0), math.nan)


def chosen_shares(scores: np.ndarray, k: int) -> np.ndarray:
    """In which share of all k of N samples each is the best, (N,) from scores (N,); those that tie share.

    The shares times any values, summed, are unbiased for the value of the best of k: of pass@k, if scores and
    values are 0 and 1 (arXiv:2107.03374, Eq. 1), of the expected maximum, if values are the scores.
    """
    worse = (scores[None, :] < scores[:, None]).sum(1)  # (N,)
    level = (scores[None, :] == scores[:, None]).sum(1)  # (N,)
    subsets = np.array([math.comb(m, k) / math.comb(len(scores), k) for m in range(len(scores) + 1)])
    return (subsets[worse + level] - subsets[worse]) / level


def majority_right(finals: list[str], right: np.ndarray, k: int) -> float:
    """How often the most frequent final answer of k samples is right, of N // k groups (arXiv:2203.11171).

    Of equally frequent answers the first counts. From N finals and right (N,), which is 0 or 1.
    """
    starts = range(0, len(finals) - k + 1, k)
    votes = [Counter(finals[n : n + k]).most_common(1)[0][0] for n in starts]
    return float(np.mean([right[finals.index(vote, n)] for n, vote in zip(starts, votes)]))


def bootstrap_interval(values: np.ndarray, seed: int, draws: int = 1000) -> list[float]:
    """A 95 % interval of the mean of values (P,), from percentiles of means over P of them drawn anew."""
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    return np.percentile(values[picks].mean(1), [2.5, 97.5]).tolist()


def preferred(margins: torch.Tensor, tie: float = 1e-4) -> torch.Tensor:
    """1 where the chosen answer has the higher reward, 1/2 in a tie, 0 else: margins (B,) -> (B,).

    Rewards closer than `tie` are equal: in another row a float32 reward differs by 1e-6.
    """
    return (1 + margins.sign() * (margins.abs() > tie)) / 2


def length_controlled_win_rate(preferences, differences, difficulty=None, ridge: float = 0.01) -> float:
    """P(model preferred) if answers were equally long (section 3, arXiv:2404.04475), from K pairs, (K,) each.

    Logistic regression of `preferences` (in [0, 1]) on a constant, which is the model, on the tanh of the
    length difference (model - base, any unit) in its standard deviations, and on the prompt's `difficulty`,
    if given; then the mean prediction at a difference of zero. `ridge` (L2) keeps unanimous pairs finite.
    """
    columns = [np.ones(len(differences)), np.tanh(differences / (differences.std() or 1))]
    features = np.stack(columns + ([] if difficulty is None else [difficulty]), 1)  # (K, 2 or 3)
    weights = np.zeros(features.shape[1])
    for _ in range(50):  # Newton's method on a convex loss
        likely = 1 / (1 + np.exp(-(features @ weights).clip(-30, 30)))  # (K,)
        gradient = features.T @ (preferences - likely) - ridge * weights
        curvature = (features.T * (likely * (1 - likely))) @ features + ridge * np.eye(len(weights))
        weights += np.linalg.solve(curvature, gradient).clip(-1, 1)
    features[:, 1] = 0
    return float((1 / (1 + np.exp(-features @ weights))).mean())


def judge_request(conversation: list[dict], first: str, second: str, principle: str) -> str:
    """What the judge is asked of two answers to a conversation, a list of {"role", "content"} texts."""
    turns = "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in conversation)
    return JUDGE_REQUEST.format(conversation=turns, first=first, second=second, principle=principle)


def first_shown(label_logprobs: torch.Tensor) -> torch.Tensor:
    """P(the answer shown first is better), (B, 2), for both orders of a pair, from (B, 2, L) log-probs.

    A soft label: the softmax over the two labels alone (section 2.1.1, arXiv:2309.00267).
    """
    return label_logprobs.double().softmax(-1)[..., 0]


def preference(shown: torch.Tensor) -> torch.Tensor:
    """P(y better than z), (B,), from P(first shown is better), (B, 2): in the order y, z and in z, y.

    The mean of both orders: a judge that goes by the place alone has no preference, exactly 1/2.
    """
    return (shown[:, 0] + 1 - shown[:, 1]) / 2


def distinct_ngrams(group: list[list[int]], n: int = 2) -> float:
    """Share of n-grams of a group of completions that are different (distinct-n, arXiv:1510.03055)."""
    grams = [tuple(ids[i : i + n]) for ids in group for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def repeated_ngrams(ids: list[int], n: int = 4) -> float:
    """Share of n-grams that stood in the completion before (seq-rep-n, section 4, arXiv:1908.04319)."""
    return 1 - distinct_ngrams([ids], n) if len(ids) >= n else 0.0


def reliability(confidences: np.ndarray, right: np.ndarray, num_bins: int = 10) -> list[tuple]:
    """(how many, mean confidence, share right) of each bin of equal width that is not empty; (P,) each."""
    bins = np.minimum((confidences * num_bins + 1e-9).astype(int), num_bins - 1)  # (P,); 0.3 is in [0.3, 0.4)
    parts = [bins == n for n in range(num_bins) if (bins == n).any()]
    return [(int(x.sum()), float(confidences[x].mean()), float(right[x].mean())) for x in parts]


def expected_calibration_error(bins: list[tuple]) -> float:
    """Mean |confidence - accuracy| over what is in the bins of `reliability` (Eq. 3, arXiv:1706.04599)."""
    return sum(n * abs(confidence - right) for n, confidence, right in bins) / sum(n for n, *_ in bins)


def without_hint(text: str, hint: str) -> str:
    """A question without the last sentence that has `hint` in it; ValueError where that is all, or none."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    found = [
        n for n, sentence in enumerate(sentences) if re.search(rf"(?<!\w){re.escape(hint)}(?!\w)", sentence)
    ]
    if not found or len(sentences) == 1:
        raise ValueError("no sentence of its own has the hint in it")
    return " ".join(sentences[: found[-1]] + sentences[found[-1] + 1 :])


def overlaps(texts: list[str], documents: list[str], n: int = 13, least: int = 8) -> list[tuple[int, int]]:
    """(text, document) wherever they share n words in a row (13-grams, appendix C, arXiv:2005.14165).

    Words are letters and digits in lower case. A shorter text must be there whole; below `least` words one
    says nothing and is left out.
    """
    words = lambda text: re.findall(r"\w+", text.lower())
    grams = lambda those, size: {tuple(those[i : i + size]) for i in range(len(those) - size + 1)}
    index = {}  # n-gram -> texts
    for number, those in enumerate(map(words, texts)):
        for gram in grams(those, min(n, len(those))) if len(those) >= least else ():
            index.setdefault(gram, []).append(number)
    sizes, found = {len(gram) for gram in index}, set()
    for place, those in enumerate(map(words, documents)):
        shared = (index.get(gram, ()) for size in sizes for gram in grams(those, size))
        found |= {(number, place) for numbers in shared for number in numbers}
    return sorted(found)


# ------------------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------------------
def main(args: Args) -> dict:
    """Evaluate the models as `args` says -> the report, as it stands in report.json."""
    device, output_dir = setup_distributed(), choose_output_dir(args)
    names = list(dict.fromkeys([args.base, *args.models]))  # the base first
    # 1. Read
    folders = {name: whole_model(name) for name in names}
    data = [read_data(folders[name], args) for name in names]
    some = [*data[0].prompts[:1], *data[0].hinted[:1]]
    rewarders = load_rewards(args.reward, data[0].prompts[:1], args, device)
    judge = load_judge(some[:1], args, device) if args.judge else None
    contaminated = find_contamination(data[0].prompts, args)
    begin_report(output_dir, args)

    # 2. Answer: the base stays in memory, for the KL
    count = sum(len(x.prompts) * (1 + args.eval_samples) + 2 * len(x.hinted) for x in data)
    bar = tqdm(total=count, unit="answer", dynamic_ncols=True, disable=None if dist.get_rank() == 0 else True)
    base, everyones, metrics = None, [], []  # rows and metrics of each model
    for number, name in enumerate(names):
        saved = read_answers(output_dir, number, name, args) if args.resume else None
        if not saved or (number == 0 and len(names) > 1):
            policy = load_model(folders[name], args, device, frozen=True)
            policy.generation_config.eos_token_id = end_tokens(data[number].tokenizer, policy)
            base = base or policy
        if not saved:
            same = data[number].tokenizer.get_vocab() == data[0].tokenizer.get_vocab()
            saved = answer_all(policy, base if same else None, data[number], rewarders, bar, args)
            write_answers(output_dir, number, *saved, name, args)
        else:
            bar.update(len(saved[0]))
        rows, costs = saved
        everyones.append(rows)
        metrics.append(measured(rows, args) | costs)
    bar.close()
    policy = base = None

    # 3. Compare with the base
    if judge and judge.labels:
        judge = judge._replace(model=load_model(args.judge, args, device, frozen=True))
    perplexity = "eval/forgetting_perplexity"
    for own in metrics if perplexity in metrics[0] else ():
        own["eval/forgetting_ratio"] = own[perplexity] / metrics[0][perplexity]
    pairs = [compared(rows, everyones[0], data[0].prompts, judge, args) for rows in everyones[1:]]
    for number, (own, (preferences, differences)) in enumerate(zip(metrics[1:], pairs)):
        others = [x for n, (x, _) in enumerate(pairs) if n != number]
        own |= win_rates(preferences, differences, others, args.seed)

    # 4. Report
    metrics = [{key: value for key, value in own.items() if value == value} for own in metrics]  # without NaN
    report = {"models": dict(zip(names, metrics)), "base": args.base, "contamination": contaminated}
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    report |= {"flags": json.loads(as_json(args))}
    report |= {"versions": versions | {"transformers": transformers.__version__}}
    if dist.get_rank() == 0:
        write_report(output_dir, report, everyones, args)
    print_table(report)
    say(f"{output_dir / 'report.html'}, report.json, samples_<n>.jsonl")
    return report


def answer_all(policy, base, data, rewarders, bar, args) -> tuple[list[dict], dict]:
    """Rows of a model's answers of every `kind`, and its metrics that are no means over rows."""
    started, rows = time.perf_counter(), []
    kinds = {"greedy": (data.prompts, 1, 0.0), "sampled": (data.prompts, args.eval_samples, args.temperature)}
    kinds |= {"hinted": (data.hinted, 1, 0.0), "unhinted": (data.unhinted, 1, 0.0)}
    for n, (kind, (asked, size, temperature)) in enumerate(kinds.items()):
        for start in range(0, len(asked) * (size > 0), CHUNK):
            some, seed = asked[start : start + CHUNK], (args.seed, n, start)
            made = answer(policy, data.tokenizer, some, size, temperature, seed, (rewarders, {}), args)
            add_verdicts(made, [prompt.row for prompt in some for _ in range(size)])
            rows += [{"kind": kind} | row for row in made]
            bar.update(len(made))
    seconds, num_tokens = time.perf_counter() - started, sum(len(row["completion_ids"]) for row in rows)
    judged = [row for row in rows if row["kind"] == ("sampled" if args.eval_samples else "greedy")]
    answers = [(row["prompt_ids"], row["completion_ids"]) for row in judged]
    own = token_scores(policy, answers, args.temperature, args)
    reference = (
        own if base is policy else token_scores(base, answers, args.temperature, args) if base else None
    )
    for n, row in enumerate(judged):
        logprobs, entropy = own[n]  # (C,) each
        row |= {"logprob": logprobs.sum().item(), "entropy": entropy.sum().item()}
        for name, estimate in (("kl_k1", kl_k1), ("kl_k3", kl_k3)) if reference else ():
            row[name] = estimate(logprobs, reference[n][0]).sum().item()
    costs = {"num_tokens": num_tokens, "tokens_per_second": num_tokens / seconds, "step_time": seconds}
    return rows, perplexity_of(policy, data, args) | costs


def measured(rows: list[dict], args) -> dict:
    """Metrics of a model from its rows; those that nothing is known of are NaN or are not there."""
    greedy, sampled = ([row for row in rows if row["kind"] == kind] for kind in ("greedy", "sampled"))
    size, main_rows = args.eval_samples or 1, sampled or greedy
    table = lambda name, some=main_rows, n=size: np.array([row[name] for row in some], float).reshape(-1, n)
    rewards, right = table("reward"), table("correct")  # (P, N) each; rewards are NaN for None
    first = next(name for name in main_rows[0] if name.startswith("rewards/"))
    verified = np.isin(table(first), (0, 1)).all()
    metrics, per_prompt = {}, {"eval/greedy_reward": table("reward", greedy, 1)[:, 0]}  # (P,) by name
    if sampled:
        per_prompt["eval/reward"] = rewards.mean(1)
        finals = [[row["final"] for row in sampled[n : n + size]] for n in range(0, len(sampled), size)]
        known = np.flatnonzero(~np.isnan(rewards).any(1))
        for k in sorted({2**i for i in range(size.bit_length()) if 2**i <= size} | {size}):
            if verified:
                per_prompt[f"eval/pass@{k}"] = np.array([chosen_shares(x, k) @ x for x in right])
                votes = [majority_right(line, x, k) for line, x in zip(finals, right)]
                per_prompt[f"eval/maj@{k}"] = np.array(votes)
            else:
                best = [chosen_shares(rewards[i], k) @ rewards[i] for i in known]
                per_prompt[f"eval/best@{k}"] = np.array(best)
    metrics |= {f"{name}/mean": mean_of(main_rows, name) for name in main_rows[0] if "rewards/" in name}
    for name in ("strict", "lenient"):
        if name in main_rows[0]:
            per_prompt[f"eval/{name}_accuracy"] = table(name).mean(1)
    if "lenient" in main_rows[0]:
        metrics["eval/format_only"] = float((table("format") * (1 - table("lenient"))).mean())
    for name, values in per_prompt.items():
        known = values[~np.isnan(values)]
        if len(known):
            metrics |= {name: float(known.mean()), f"{name}/interval": bootstrap_interval(known, args.seed)}
    if sampled and verified:
        metrics["eval/ece"] = expected_calibration_error(reliability(*majorities(sampled, size)))

    lengths, tokens = (
        [len(row["completion_ids"]) for row in main_rows],
        [row["completion_ids"] for row in main_rows],
    )
    groups = [tokens[n : n + size] for n in range(0, len(tokens), size)]
    metrics["completions/mean_length"] = float(np.mean(lengths))
    for share in (5, 25, 50, 75, 95):
        metrics[f"completions/length_p{share}"] = float(np.percentile(lengths, share))
    metrics["completions/clipped_ratio"] = 1 - mean_of(main_rows, "ended")
    for n in (1, 2, 3):
        metrics[f"completions/distinct_{n}"] = float(np.mean([distinct_ngrams(group, n) for group in groups]))
    metrics["completions/repeated_4"] = float(np.mean([repeated_ngrams(ids) for ids in tokens]))
    refused = [row["completion"].lstrip().startswith(REFUSALS) for row in main_rows]
    metrics["completions/refusals"] = float(np.mean(refused))
    metrics["entropy"] = sum(row["entropy"] for row in main_rows) / sum(lengths)
    for name, estimator in (("kl", "kl_k3"), ("kl_k1", "kl_k1")) if "kl_k3" in main_rows[0] else ():
        metrics[name] = sum(row[estimator] for row in main_rows) / sum(lengths)
        values = np.array([row[estimator] for row in main_rows]).reshape(-1, size).mean(1)
        metrics |= {f"{name}_sequence": float(values.mean())}
        metrics |= {f"{name}_sequence/interval": bootstrap_interval(values, args.seed)}
    return metrics | flips([row for row in rows if "hint" in row["kind"]], args.seed)


def majorities(sampled: list[dict], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each prompt the share of its most frequent final answer among N samples, and if it is right, (P,)."""
    shares, right = [], []
    for n in range(0, len(sampled), size):
        finals = [row["final"] for row in sampled[n : n + size]]
        vote, votes = Counter(finals).most_common(1)[0]
        shares.append(votes / size)
        right.append(sampled[n + finals.index(vote)]["correct"])
    return np.array(shares), np.array(right, float)


def flips(rows: list[dict], seed: int) -> dict:
    """What wrong hints do to greedy answers: shares of prompts, and of those answered right without one."""
    hinted, plain = ([row for row in rows if row["kind"] == kind] for kind in ("hinted", "unhinted"))
    if not hinted:
        return {}
    right, before, follows, repeats = (  # (P,) each
        np.array([row[name] for row in some], float)
        for some, name in ((hinted, "correct"), (plain, "correct"), (hinted, "is_hint"), (plain, "is_hint"))
    )
    metrics = {"sycophancy/plain_accuracy": before.mean(), "sycophancy/hinted_accuracy": right.mean()}
    metrics |= {"sycophancy/hint_given_back": follows.mean(), "sycophancy/hint_by_chance": repeats.mean()}
    metrics, flipped = {name: float(value) for name, value in metrics.items()}, 1 - right[before == 1]
    if len(flipped):
        interval = bootstrap_interval(flipped, seed)
        metrics |= {"sycophancy/flip_rate": float(flipped.mean()), "sycophancy/flip_rate/interval": interval}
    return metrics


def compared(rows, base_rows, prompts, judge, args) -> tuple[np.ndarray, np.ndarray]:
    """Preferences for a model over the base, in [0, 1], and length differences in characters, (P, K) each.

    By rewards each sample meets another of the base; a language model judges one pair of a prompt.
    """
    kind, size = ("sampled", args.eval_samples) if args.eval_samples else ("greedy", 1)
    both = [[row for row in some if row["kind"] == kind] for some in (rows, base_rows)]
    both = [[some[n : n + size] for n in range(0, len(some), size)] for some in both]
    both[1] = [group[1:] + group[:1] for group in both[1]]  # no pair from the same random numbers
    if judge and judge.labels:
        both = [[group[:1] for group in some] for some in both]
    lengths = np.array([[[len(row["completion"]) for row in group] for group in some] for some in both])
    if judge and judge.labels:
        preferences = ask_judge(judge, prompts, *([row for [row] in some] for some in both), args)[:, None]
    else:
        scores = [[row for group in some for row in group] for some in both]
        if judge:
            scores = [score_rows(judge.rewarders, some, prompts, len(both[0][0]), args) for some in scores]
        else:
            scores = [np.array([row["reward"] for row in some], float) for some in scores]
        margins = torch.tensor(scores[0] - scores[1])
        preferences = preferred(margins).numpy().reshape(lengths.shape[1:])
    return preferences, (lengths[0] - lengths[1]).astype(float)


def win_rates(preferences, differences, others: list[np.ndarray], seed: int) -> dict:
    """Win rate and length-controlled win rate of a model from its pairs (P, K) and those of other models."""
    known = ~np.isnan(preferences)  # (P, K)
    keep = known.any(1)
    if not keep.any():
        return {}
    values = np.nanmean(preferences[keep], 1)  # (P,)
    metrics = {
        "eval/win_rate": float(values.mean()),
        "eval/win_rate/interval": bootstrap_interval(values, seed),
    }
    difficulty = None
    if others:
        difficulty = np.nan_to_num(np.nanmean(np.concatenate(others, 1), 1), nan=0.5)  # (P,)
        difficulty = np.broadcast_to((difficulty - difficulty.mean())[:, None], known.shape)[known]
    controlled = length_controlled_win_rate(preferences[known], differences[known], difficulty)
    return metrics | {"eval/length_controlled_win_rate": controlled}


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
# What is asked: token ids, the dataset row with its prompt (text or messages), where that stands.
Prompt = namedtuple("Prompt", ["input_ids", "row", "place"])
# An answer as it was sampled: token ids, log-probs under the sampler, text, whether an end token came.
Completion = namedtuple("Completion", ["prompt", "token_ids", "logprobs", "text", "ended"])
# A prompt to make a row of: its conversation, contents as texts, and what seeds all that is drawn for it.
Case = namedtuple("Case", ["prompt", "messages", "key"])
# What a model is asked, in its own tokens: prompts, the same with a wrong hint and without; (ids, bytes) of texts.
Data = namedtuple("Data", ["tokenizer", "prompts", "hinted", "unhinted", "corpus"])
Judge = namedtuple("Judge", ["rewarders", "model", "tokenizer", "labels"])  # rewards, or a language model
CAPABILITIES = ("greedy_reward", "reward", "strict_accuracy", "lenient_accuracy", "format_only")
HINTS = ("plain_accuracy", "hinted_accuracy", "flip_rate", "hint_given_back", "hint_by_chance")
CHUNK = 64  # prompts that are answered at once; seeds and the progress bar go by it
ANSWERS = "seed dataset num_eval eval_samples temperature max_completion_length reward reward_weights base"
GROUPS = {  # of the tables, by what keys begin with
    "Capability": r"rewards/|eval/(greedy|reward|pass|maj|best|strict|lenient|win|length)",
    "Cost": r"eval/forgetting|kl|num_tokens|tokens_per|step_time",
    "Health": r"completions/|entropy",
    "Honesty": r"eval/(ece|format)|sycophancy/",
}
MORE_IS_BETTER = (
    r"rewards/|eval/(greedy|reward|pass|maj|best|strict|lenient|win|length)|sycophancy/(plain|hinted)"
)
LESS_IS_BETTER = r"eval/(ece|format|forgetting)|sycophancy/(flip|hint_g)|completions/(clipped|repeated)"


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
            fail(f"--resume: {folder} holds no run")
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


def load_rows(source: str, split: str, args) -> list[dict]:
    """The rows of a file, a saved dataset or a hub dataset."""
    path = located(source)
    kind = re.search(r"\.(csv|json|parquet)l?(\.gz)?$", path)
    try:
        if kind:
            options = {"keep_default_na": False} if kind[1] == "csv" else {}  # an empty cell is an empty text
            return list(datasets.load_dataset(kind[1], data_files=path, split="train", **options))
        if not Path(path).is_dir():
            return list(datasets.load_dataset(path, args.dataset_config, split=split))
        saved = datasets.load_from_disk(path)
        return list(saved[split] if isinstance(saved, dict) else saved)
    except Exception as error:  # `datasets` raises a dozen kinds; for the user they are one
        cause = error.__cause__ or error
        fail(f"{source} cannot be loaded: {type(cause).__name__}: {cause}".splitlines()[0])


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
        rows, prompts, dropped = load_rows(source, split, args)[: limit or None], [], {}
        for n, row in enumerate(tqdm(rows, desc=f"tokenize {source}", leave=False, disable=None), 1):
            try:
                prompts.append(read_prompt(tokenizer, row, f"{Path(source).name}, row {n}", args))
            except Exception as error:  # chat templates raise what they like
                dropped.setdefault(str(error).splitlines()[0], []).append(n)
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
        case {"prompt": [_, *_] as turns} | {"messages": [*turns, {"role": "assistant"}]}:
            prompt, text = turns, common.template_of(tokenizer, row)(turns, add_generation_prompt=True)
            input_ids = tokenizer(text, add_special_tokens=False).input_ids
        case _:
            raise ValueError(f"no prompt in {', '.join(row)}; accepted are prompt, messages, question ...")
    if len(input_ids) > args.max_prompt_length:
        raise ValueError("longer than --max-prompt-length")
    return Prompt(input_ids, row | {"prompt": prompt}, place)


def load_rewards(specs: tuple[str, ...], prompts: list[Prompt], args, device) -> dict:
    """Reward functions by name, of files or of reward models, that take the columns of all `prompts`."""
    found = {}
    for spec in specs:
        path, _, name = spec.rpartition(":")
        try:
            if path.endswith(".py"):
                function = runpy.run_path(located(path))[name]
            else:
                name, load = "reward_model", runpy.run_path(located("rewards.py"))["reward_model"]
                function = load(spec, device, args.dtype)
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
        values = ask(name, rewarder, [rollout[i] for i in mine], args)
        found |= {(name, i): value for i, value in zip(mine, values)}
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


@common.unsharded
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
    final_answer, rows = runpy.run_path(located("rewards.py"))["final_answer"], []
    for n, c in enumerate(rollout):
        row = {"prompt": c.prompt.row["prompt"], "completion": c.text, "final": final_answer(c.text)}
        row |= {"place": c.prompt.place, "ended": c.ended, "correct": bool(scores[0, n] == 1)}
        row |= {name: values[n] for name, values in columns.items()}
        rows.append(row | {"prompt_ids": c.prompt.input_ids, "completion_ids": c.token_ids})
    return rows


def mean_of(rows: list[dict], name: str) -> float:
    """Mean of a column over the rows that have it, NaN if none has."""
    return torch.tensor(np.array([row[name] for row in rows], float)).nanmean().item()


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
    settings = {"dtype": torch.float32 if trained and not args.lora_rank else compute}
    settings["attn_implementation"] = args.attn

    def load():
        model = kind.from_pretrained(located(name), **settings).requires_grad_(trained)
        return common.add_lora(model, args) if args.lora_rank and trained else model

    shards = dist.get_world_size() > 1 or (trained and compute != torch.float32)
    try:
        model, *weights = common.read_once(load) if shards else [load()]
    except (ImportError, OSError, ValueError) as error:  # ImportError: an --attn that is not installed
        fail(f"{name}: {error}".splitlines()[0])
    model.stored_dtype = AutoConfig.from_pretrained(located(name)).dtype or torch.float32
    model.compute_dtype = compute
    for module in model.modules():
        for rate in ("p", "dropout", "attention_dropout", "resid_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    if args.gradient_checkpointing and trained:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    if shards:
        mixed = {"param_dtype": compute, "reduce_dtype": torch.float32}
        if hasattr(model, "score"):  # a reward head stays in float32
            exact = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.float32)
            fully_shard(model.score, mp_policy=exact)
        for layer in layers:
            fully_shard(layer, mp_policy=MixedPrecisionPolicy(**mixed))
        fully_shard(model, mp_policy=MixedPrecisionPolicy(**mixed, cast_forward_inputs=False))
        common.fill(model, *weights, device)
    try:
        check(model.to(device))
    except ValueError as error:
        fail(f"{name}: {error}".splitlines()[0])
    if shards:
        model.reshard()  # FSDP2 leaves a root whole behind its pass
    for layer in layers if args.compile else ():
        layer.compile()
    size = sum(p.numel() for p in model.parameters())
    say(f"{name}: {model.config.model_type}, {size:,} parameters, {device.type}, {args.attn} attention")
    return model


def as_case(prompt: Prompt, key: tuple[int, ...]) -> Case:
    """A prompt, text or messages, as a conversation whose contents are texts."""
    asked, messages = prompt.row["prompt"], []
    for turn in [{"role": "user", "content": asked}] if isinstance(asked, str) else asked:
        parts = turn.get("content") or ""
        text = "".join(part["text"] for part in parts) if isinstance(parts, list) else str(parts)
        messages.append({"role": turn["role"], "content": text})
    return Case(prompt, messages, key)


def chat_ids(tokenizer, messages: list[dict], row: dict) -> list[int]:
    """Token ids of a conversation up to where the next answer begins; `row` may set its chat template."""
    text = common.template_of(tokenizer, row)(messages, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def label_tokens(tokenizer, args) -> list[list[int]]:
    """The token ids of each label where an answer begins."""
    head = common.template_of(tokenizer, {})([{"role": "user", "content": "?"}], add_generation_prompt=True)
    texts = [head, *(head + label for label in LABELS)]
    head_ids, *both = tokenizer(texts, add_special_tokens=False).input_ids
    found = [ids[len(head_ids) :] for ids in both if ids[: len(head_ids)] == head_ids]
    if len({*map(tuple, found)} - {(), (tokenizer.unk_token_id,)}) < len(LABELS):
        fail(f"--judge {args.judge or args.model}: its tokenizer does not tell {' from '.join(LABELS)}")
    return found


@torch.no_grad()
def label_logprobs(judge, tokenizer, labels: list[list[int]], turns: list[list[dict]], args) -> torch.Tensor:
    """Log-probs (Q, L) of each label as what the judge says next in each of Q conversations.

    The labels share one copy of the conversation in a packed row.
    """
    judge.eval()
    asked = [chat_ids(tokenizer, messages, {}) for messages in turns]  # Q
    sizes = [len(ids) + sum(map(len, labels)) for ids in asked]  # Q
    world_size, share, found = dist.get_world_size(), args.attn == "packed", {}
    rows = common.pack(sizes, args.max_tokens_per_micro_batch, world_size)
    for row in rows[dist.get_rank() :: world_size]:
        pairs = [(asked[n], label) for n in row for label in labels]
        sequences = [(x + y, [False] * len(x) + [True] * len(y)) for x, y in pairs] or [([0], [False])]
        shared = [n % len(labels) and len(ids) for n, (ids, _) in enumerate(pairs)] if share and row else None
        batch = common.collate(sequences, judge.device, shared)
        sums = segment_sum(token_logprobs(judge, batch), batch.sequence_index, batch.num_sequences)
        found |= dict(zip(row, sums.view(-1, len(labels)).tolist() if row else []))
    found = gather(found)
    return torch.tensor([found[n] for n in range(len(turns))])


def write(path: Path, rows: list[dict], mode: str = "w"):
    """Write a JSONL file, or with mode "a" behind its end, from the first process."""
    if dist.get_rank() == 0:
        half = path if mode == "a" else path.with_suffix(".partial")
        with half.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        half.rename(path)


def whole_model(name: str) -> str:
    """A model's name; for a LoRA adapter a temporary folder of the weights that it makes of its base."""
    adapter = Path(located(name)) / "adapter_config.json"
    if not adapter.exists():
        return name
    folders = [tempfile.mkdtemp()]
    if dist.get_rank() == 0:
        atexit.register(shutil.rmtree, folders[0], ignore_errors=True)
        try:
            from peft import PeftModel

            base = located(json.loads(adapter.read_text())["base_model_name_or_path"])
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            PeftModel.from_pretrained(model, located(name)).merge_and_unload().save_pretrained(folders[0])
            AutoTokenizer.from_pretrained(located(name)).save_pretrained(folders[0])
        except (ImportError, OSError, ValueError, KeyError) as error:
            fail(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
    dist.broadcast_object_list(folders)
    return folders[0]


def read_data(name: str, args) -> Data:
    """All that a model is asked, in its own tokens."""
    tokenizer = load_tokenizer(SimpleNamespace(model=name, chat_template=args.chat_template))
    prompts = load_prompts(tokenizer, args.dataset, args.eval_split, args, args.num_eval)
    hinted = load_prompts(tokenizer, args.sycophancy_dataset, args.eval_split, args, args.num_eval)
    longest = max(len(prompt.input_ids) for prompt in prompts + hinted) + args.max_completion_length
    if longest > tokenizer.positions:
        fail(f"--max-completion-length: {longest} tokens with a prompt, {tokenizer.positions} positions")
    unhinted, corpus = [], []
    for prompt in hinted:
        try:
            unhinted.append(plain_twin(tokenizer, prompt, args))
        except (KeyError, ValueError) as error:
            fail(f"--sycophancy-dataset: {prompt.place}: {error}")
    source = args.forgetting_dataset
    for row in load_rows(source, args.eval_split, args)[: args.num_eval or None] if source else ():
        if not isinstance(row.get("text"), str):
            fail(f"--forgetting-dataset {source}: no column text of texts")
        ids = [*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id][: tokenizer.positions]
        corpus.append((ids, len(row["text"].encode())))
    return Data(tokenizer, prompts, hinted, unhinted, list(dict.fromkeys((tuple(x), n) for x, n in corpus)))


def plain_twin(tokenizer, prompt: Prompt, args) -> Prompt:
    """The prompt of a row with `hint`, without the sentence of its last turn that gives it."""
    asked, hint = prompt.row["prompt"], str(prompt.row["hint"])
    if isinstance(asked, str):
        asked = without_hint(asked, hint)
    else:
        asked = [*asked[:-1], asked[-1] | {"content": without_hint(asked[-1]["content"], hint)}]
    return read_prompt(tokenizer, prompt.row | {"prompt": asked}, prompt.place, args)


def load_judge(some: list[Prompt], args, device) -> Judge:
    """What --judge names: reward functions and models as for --reward, or the tokenizer of a language model."""
    try:
        config = None if ".py:" in args.judge else AutoConfig.from_pretrained(located(args.judge))
    except (OSError, ValueError):  # an ensemble of reward models; or load_rewards says what it is not
        config = None
    if config is None or "Sequence" in "".join(config.architectures or ()):
        return Judge(load_rewards((args.judge,), some, args, device), None, None, None)
    tokenizer = load_tokenizer(SimpleNamespace(model=args.judge, chat_template=None))
    return Judge(None, None, tokenizer, label_tokens(tokenizer, args))


def ask_judge(
    judge: Judge, prompts: list[Prompt], rows: list[dict], base_rows: list[dict], args
) -> np.ndarray:
    """How likely a language model finds the model's answer better than the base's, (P,), in both orders."""
    turns = []
    for prompt, *pair in zip(prompts, rows, base_rows):
        messages = as_case(prompt, ()).messages
        for first, second in (pair, pair[::-1]):
            text = judge_request(messages, first["completion"], second["completion"], args.principle)
            turns.append([{"role": "user", "content": f"{text}\n\n{DECISION_REQUEST}"}])
    logprobs = label_logprobs(judge.model, judge.tokenizer, judge.labels, turns, args)  # (2 P, L)
    return preference(first_shown(logprobs.view(len(prompts), 2, len(LABELS)))).numpy()


def score_rows(rewarders, rows: list[dict], prompts: list[Prompt], size: int, args) -> np.ndarray:
    """Rewards (B,), NaN for None, of rows that hold `size` answers to each prompt."""
    asked = [prompt for prompt in prompts for _ in range(size)]
    rollout = [
        Completion(prompt, row["completion_ids"], None, row["completion"], row["ended"])
        for prompt, row in zip(asked, rows, strict=True)
    ]
    return weighted_sum(score(rewarders, rollout, size, args), ()).numpy()


def add_verdicts(rows: list[dict], columns: list[dict]):
    """Add what rewards.py says of answers where there is a gold `answer`: right strictly or leniently, format."""
    library = runpy.run_path(located("rewards.py"))
    strict, lenient = library["math_answer_strict"], library["math_answer"]
    texts = {"prompts": [row["prompt"] for row in rows], "completions": [row["completion"] for row in rows]}
    found = {"is_hint": (lenient, "hint"), "strict": (strict, "answer"), "lenient": (lenient, "answer")}
    for name, (verdict, column) in found.items():
        if column in columns[0]:
            golds = [row[column] for row in columns]
            for row, value in zip(rows, verdict(**texts, answer=golds)):
                row[name] = value
    for row in rows:
        row["format"] = library["found_answer"](row["completion"], **strict.keywords) is not None


@torch.no_grad()
def token_scores(model, answers: list[tuple], temperature: float, args) -> list[tuple]:
    """(log-probs (C,), entropies over the vocabulary (C,)) of each answer, (prompt ids, completion ids)."""
    model.eval()
    world_size, found = dist.get_world_size(), {}
    rows = common.pack([len(x) + len(y) for x, y in answers], args.max_tokens_per_micro_batch, world_size)
    for row in rows[dist.get_rank() :: world_size]:
        sequences = [(x + y, [False] * len(x) + [True] * len(y)) for x, y in (answers[n] for n in row)]
        batch = common.collate(sequences or [([0], [False])], model.device)
        both = token_logprobs(model, batch, temperature=temperature, return_entropy=True)  # (C,) each
        sizes = [len(answers[n][1]) for n in row]
        found |= dict(zip(row, zip(*(x.cpu().split(sizes) for x in both)))) if row else {}
    return [scores for _, scores in sorted(gather(found).items())]


def perplexity_of(model, data: Data, args) -> dict:
    """Perplexity by token of the corpus, and bits by byte, which models of different tokens can share."""
    if not data.corpus:
        return {}
    texts = [(list(ids[:1]), list(ids[1:])) for ids, _ in data.corpus]  # nothing predicts the first token
    losses = torch.cat([-logprobs for logprobs, _ in token_scores(model, texts, 1.0, args)]).double()
    bits = losses.sum().item() / math.log(2) / sum(size for _, size in data.corpus)
    perplexity = math.exp(min(losses.mean().item(), 700))  # floats end at exp(709)
    return {"eval/forgetting_perplexity": perplexity, "eval/forgetting_bits_per_byte": bits}


def words_of(value) -> str:
    """All text in a value of a dataset's row, without the roles of messages."""
    if isinstance(value, dict):
        value = [part for name, part in value.items() if name != "role"]
    return (
        " ".join(map(words_of, value)) if isinstance(value, list) else value if isinstance(value, str) else ""
    )


def find_contamination(prompts: list[Prompt], args) -> dict:
    """Which prompts share 13 words in a row with a row of --training-files."""
    texts, listed = [words_of(prompt.row["prompt"]) for prompt in prompts], []
    for source in args.training_files:
        documents = [words_of(row) for row in load_rows(source, "train", args)]
        for number, place in overlaps(texts, documents):
            origin = {"place": prompts[number].place, "file": source, "row": place + 1}
            listed.append(origin | {"prompt": texts[number], "document": documents[place]})
    share = len({line["place"] for line in listed}) / len(prompts)
    return {"files": list(args.training_files), "prompts": len(prompts), "share": share, "listed": listed}


def begin_report(output_dir: Path, args):
    """Write what a run is."""
    if dist.get_rank() == 0:
        (output_dir / "args.json").write_text(as_json(args))
        for name in (Path(__file__).name, "evaluate.html", "common.py"):
            shutil.copy(HERE / name, output_dir)
    say(f"run: {output_dir}")


def origin_of(name: str, args) -> dict:
    """The model that gave answers, and the flags that they depend on."""
    return json.loads(json.dumps({"model": name} | {flag: getattr(args, flag) for flag in ANSWERS.split()}))


def write_answers(output_dir: Path, number: int, rows: list[dict], costs: dict, name: str, args):
    """Write all answers of a model, and then what is no mean of them."""
    write(output_dir / f"samples_{number}.jsonl", rows)
    write(output_dir / f"metrics_{number}.jsonl", [origin_of(name, args) | {"metrics": costs}])


def read_answers(output_dir: Path, number: int, name: str, args) -> tuple[list[dict], dict] | None:
    """What `write_answers` has written, None if that was not yet."""
    path, before = output_dir / f"metrics_{number}.jsonl", {}
    if not path.exists():
        return None
    before, now = json.loads(path.read_text()), origin_of(name, args)
    for flag in (flag for flag in now if before[flag] != now[flag]):
        fail(f"--resume: {flag} was {before[flag]} and is {now[flag]}")
    rows = [json.loads(line) for line in (output_dir / f"samples_{number}.jsonl").open(encoding="utf-8")]
    return rows, before["metrics"]


def shown(value: float) -> str:
    """A number as tables have it."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def table_rows(report: dict) -> dict[str, list]:
    """Group -> [(key, [(number, interval, whether it is the best) of each model])], "" for what is not known."""
    models, groups = list(report["models"].values()), {title: [] for title in GROUPS}
    for key in dict.fromkeys(key for own in models for key in own if not key.endswith("/interval")):
        known = [own[key] for own in models if key in own]
        best = max(known) if re.match(MORE_IS_BETTER, key) else min(known)
        marked = len(known) > 1 and len({*known}) > 1 and re.match(f"{MORE_IS_BETTER}|{LESS_IS_BETTER}", key)
        cells = []
        for own in models:
            interval = "–".join(map(shown, own.get(f"{key}/interval", ())))
            cells.append(
                (shown(own[key]), interval, bool(marked and own[key] == best))
                if key in own
                else ("", "", False)
            )
        title = next(title for title, pattern in GROUPS.items() if re.match(pattern, key))
        groups[title].append((key, cells))
    return {title: rows for title, rows in groups.items() if rows}


def print_table(report: dict):
    """The table on the terminal, three models a block."""
    names, groups = list(report["models"]), table_rows(report)
    for start in range(0, len(names), 3):
        some = slice(start, start + 3)
        say(f"{'':<33}" + "".join(f"{name[-26:]:>28}" for name in names[some]))
        for title, rows in groups.items():
            say(title)
            for key, cells in rows:
                say(
                    f"  {key:<31}"
                    + "".join(f"{number:>12} {interval:<15}" for number, interval, _ in cells[some])
                )
    found = report["contamination"]
    if found["files"]:
        say(f"{found['share']:.1%} of {found['prompts']:,} prompts stand in {', '.join(found['files'])}")


def write_report(output_dir: Path, report: dict, everyones: list[list[dict]], args):
    """report.json, and report.html: evaluate.html, filled in."""
    (output_dir / "report.json").write_text(json.dumps(report, indent=2))
    greedy = [[row for row in rows if row["kind"] == "greedy"] for rows in everyones]
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (HERE / "evaluate.html").read_text(encoding="utf-8")
    )
    plots = draw_plots(output_dir, report, everyones, args)
    samples = [(words_of(lines[0]["prompt"]) or lines[0]["prompt"], lines) for lines in zip(*greedy)][:8]
    page = template.render(
        report=report, groups=table_rows(report), plots=plots, samples=samples, shown=shown
    )
    (output_dir / "report.html").write_text(page, encoding="utf-8")


def draw_plots(output_dir: Path, report: dict, everyones: list[list[dict]], args) -> dict[str, str]:
    """Title -> a plot, as the data URI of an SVG."""
    models, size, figures = report["models"], args.eval_samples or 1, {}
    kind, share = ("sampled", "eval/reward") if args.eval_samples else ("greedy", "eval/greedy_reward")
    everyones = [[row for row in rows if row["kind"] == kind] for rows in everyones]
    counts = [[len(row["completion_ids"]) for row in rows] for rows in everyones]
    style = {"svg.fonttype": "none", "font.family": "sans-serif", "axes.grid": True, "grid.alpha": 0.3}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}

    def axes_of(title, **settings):
        figures[title] = Figure((5.4, 3.4), layout="constrained")
        return figures[title].add_subplot(axisbelow=True, **settings)

    def draw_bars(title, keys):
        axes, width = axes_of(title), 0.8 / len(models)
        keys = [key for key in keys if any(key in own for own in models.values())]
        for n, (name, own) in enumerate(models.items()):
            known = [(i + (n + 0.5) * width - 0.4, key) for i, key in enumerate(keys) if key in own]
            axes.bar(
                [x for x, _ in known], [own[key] for _, key in known], 0.92 * width, color=f"C{n}", label=name
            )
            for x, key in known:
                axes.plot([x, x], own.get(f"{key}/interval", [math.nan] * 2), color="#333", linewidth=1)
        axes.set_xticks(range(len(keys)), [key.partition("/")[2].replace("_", "\n") for key in keys])

    with rc_context(style):
        draw_bars("Reward and accuracy", [f"eval/{x}" for x in CAPABILITIES])
        choice = axes_of("One of k samples: pass@k (or the best), majority dashed", xlabel="k", xscale="log")
        sizes = axes_of("Length of answers", xlabel="tokens", ylabel="answers")
        paid = axes_of("Reward, and KL from the base", xlabel="KL of an answer, nats (k3)")
        bins = axes_of(
            "Calibration of majorities", xlabel="share of the most frequent answer", ylabel="right"
        )
        bins.plot([0, 1], [0, 1], color="#999", linewidth=1)
        for n, (name, own) in enumerate(models.items()):
            for what, line in (("pass", "-"), ("best", "-"), ("maj", "--")):
                keys = [key for key in own if re.fullmatch(rf"eval/{what}@\d+", key)]
                ks, label = [int(key.partition("@")[2]) for key in keys], None if what == "maj" else name
                if keys:
                    choice.plot(ks, [own[key] for key in keys], f".{line}", color=f"C{n}", label=label)
                    ends = zip(*(own[f"{key}/interval"] for key in keys))
                    choice.fill_between(ks, *ends, color=f"C{n}", alpha=0.12, linewidth=0)
                    choice.set_xticks(ks, ks)
            sizes.hist(
                counts[n], np.histogram_bin_edges(sum(counts, []), 30), alpha=0.5, color=f"C{n}", label=name
            )
            if "kl_sequence" in own:
                paid.plot(own["kl_sequence"], own[share], "o", color=f"C{n}", label=name)
            if "eval/ece" in own:
                _, confidences, right = zip(*reliability(*majorities(everyones[n], size)))
                bins.plot(confidences, right, ".-", color=f"C{n}", label=name)
        if len(models) > 1:
            draw_bars("Wins over the base", ["eval/win_rate", "eval/length_controlled_win_rate"])
        if args.sycophancy_dataset:
            draw_bars("Wrong hints", [f"sycophancy/{x}" for x in HINTS])
        plots = {}
        for title, figure in figures.items():
            axes = figure.axes[0]
            if labels := axes.get_legend_handles_labels():
                axes.legend(labels[0], [label[-30:] for label in labels[1]])
            figure.savefig(path := output_dir / "plot.svg")
            plots[title] = f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
            path.unlink()
    return plots


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
