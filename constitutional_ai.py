"""Constitutional AI: a model mends its own answers by written principles, and judges pairs of them (RLAIF).

    y_0 ~ pi(. | x),   c_r ~ pi(. | x, y_r-1, critique by p_r),   y_r ~ pi(. | x, y_r-1, c_r, revise)
    P(y better than z) = 1/2 [ P(A | x, A is y, B is z, p) + P(B | x, A is z, B is y, p) ]

x is a prompt, p a principle drawn from --constitution, a text file with one principle a line. P(A | ..) is
the judge's probability of the answer "A", over that of "A" or "B". Nothing is trained here: what comes out is
data for other scripts.

    --stage revise  SL-CAI (section 3, arXiv:2212.08073): last revisions, sft.jsonl for sft.py
    --stage judge   RL-CAI (section 4 there), RLAIF (arXiv:2309.00267): pairs of answers, preference.jsonl for
                    dpo.py, reward_model.py and online_dpo.py

The loop, over batches of prompts:

    1. Answer    one answer to each prompt, or two to be judged
    2. Revise    --rounds times: a critique by a fresh principle, and a revision
    3. Judge     each pair by a principle, in both orders: a thought, then the probabilities of two labels
    4. Write     a row with all that was said to rows.jsonl; log what a rule and a gold reward say

Deviations from the papers, each with its reason:
    1. Requests are turns of a conversation, without few-shot examples: chat models follow instructions.
    2. A principle is one line that both the critique and the judge are asked with; the paper words each for
       its use. The principles of one answer differ from round to round: none is asked twice.
    3. Only the last revision is learnt from, not those of all rounds, and no helpful answers are mixed in:
       what a principle has not named yet is still wrong in earlier ones. sft.py takes several datasets.
    4. The judge thinks greedily, and its probabilities behind that are not clamped to 40 to 60 %.

    python constitutional_ai.py                                # CPU, offline, 3 minutes on one core
    python constitutional_ai.py --stage judge
    python constitutional_ai.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset my_prompts.jsonl \
        --constitution my_principles.txt --max-completion-length 512 --batch-size 64

Shapes: B prompts of a batch, L = 2 labels, 2 orders in which a pair is shown.
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
from pathlib import Path
from typing import Annotated, Literal

import datasets
import numpy as np
import pydantic
import torch
import torch.distributed as dist
import transformers
import tyro
from pydantic import Field, FilePath, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import common
import loading
from common import CHATML, check_packed, segment_sum, token_logprobs

HERE = Path(__file__).resolve().parent
Share = Annotated[float, Field(ge=0, le=1)]
Rounds = Annotated[int, Field(ge=1, le=3)]

# What the model is asked, as turns of the user; tiny/make.py teaches tiny/constitutional these very words.
CRITIQUE_REQUEST = "Check your answer by this rule: {principle} What is wrong with it?"
REVISION_REQUEST = "Now rewrite your answer so that nothing is wrong with it. Write the new answer alone."
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
    # Model
    model: str = "tiny/constitutional"  # model to train: a hub id or a folder
    judge: str | None = None  # model that judges pairs, with its own chat template; by default --model
    chat_template: FilePath | None = None  # Jinja chat template to use instead of the tokenizer's own
    attn: str = "packed"  # packed, or flash_attention_2 where it is installed, or eager (exact, slow)
    dtype: loading.Dtype = "bfloat16" if torch.cuda.is_available() else "float32"  # compute precision
    gradient_checkpointing = compile = lora_rank = optimizer = False  # no flags: nothing is trained

    # Data
    dataset: tuple[str, ...] = ("tiny/data/prompts_train.jsonl",)  # hub ids, files, saved datasets
    dataset_config: str | None = None  # configuration name of the hub dataset ("main" for openai/gsm8k)
    dataset_split: str = "train"  # split of the hub dataset to train on
    eval_dataset: str | None = None  # held-out dataset; by default tiny/'s if tiny/ is trained on, else none
    eval_split: str = "test"  # split of the hub dataset to evaluate on
    max_prompt_length: PositiveInt = 512  # longest prompt in tokens; longer ones are dropped and counted
    num_rows: NonNegativeInt = 1024  # prompts that rows are made of, at most; 0 only evaluates --model

    # Constitution
    stage: Literal["revise", "judge"] = "revise"  # revise answers (data for sft.py), or judge pairs (dpo.py)
    constitution: str = "tiny/constitution.txt"  # text file, a principle a line; empty lines and # are none
    rounds: Rounds = 3  # critiques and revisions of an answer, each by a principle not asked before
    chain_of_thought: bool = True  # the judge says what it thinks of both answers before it decides
    min_margin: Share = 0.2  # least margin |2 P - 1| of a judged pair that is learnt from
    violation: str | None = None  # file.py:function, 1 where an answer breaks rules; on tiny/ rudeness
    eval_reward: tuple[str, ...] = ()  # gold rewards: logged and evaluated on, never optimised
    allow_code_execution: bool = False  # let rewards run what the model writes (rewards.py:code_tests)
    reward_timeout: NonNegativeFloat = 1800  # seconds a reward has for a batch, or the run ends; 0: for ever

    # Rollout
    batch_size: PositiveInt = 128  # sequences, pairs or completions per step, over all processes
    max_completion_length: PositiveInt = 96  # longest answer, critique or revision in tokens
    temperature: PositiveFloat = 1.0  # sampling temperature of answers, critiques and revisions
    max_tokens_per_rollout: PositiveInt = 65536  # tokens that are sampled at once: memory, never the result
    max_tokens_per_micro_batch: PositiveInt = 8192  # tokens of a packed row: memory only, never the result

    # Evaluation and output
    num_eval: NonNegativeInt = 256  # rows of the evaluation sets that are used; 0 uses all
    seed: NonNegativeInt = 1  # of the data order and the sampling
    output_dir: str | None = None  # new folder of the run; by default runs/<script>_<seed>_<time>
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
            self.eval_dataset = self.eval_dataset or "tiny/data/prompts_eval.jsonl"
            self.violation = self.violation or "tiny/make.py:rudeness"
            self.eval_reward = self.eval_reward or ("rewards.py:math_answer",)
        if self.judge and self.stage == "revise":
            fail("--judge needs --stage judge: answers are revised by the model that gave them")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def weighted_sum(scores: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """Rewards (B,) from the scores (F, B) of F functions, by default 1 each: without NaN, NaN if all are."""
    weighted = scores * torch.tensor(weights or [1.0] * len(scores), dtype=scores.dtype)[:, None]  # (F, B)
    return weighted.nansum(0).masked_fill(scores.isnan().all(0), math.nan)


def draw_principles(key: tuple[int, ...], num_principles: int, rounds: int) -> list[int]:
    """Which principle each round goes by, `rounds` different ones; `key` seeds the draw."""
    return np.random.default_rng(key).permutation(num_principles)[:rounds].tolist()


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


def position_bias(shown: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much a judge goes by the place, (B,) each, from P(first shown is better) in both orders, (B, 2).

    Its lean, from -1 (always the second) to 1 (always the first), 0 of a fair judge; and whether it prefers
    the same place in both orders (appendix B, arXiv:2309.00267).
    """
    return shown.sum(1) - 1, ((shown > 0.5).sum(1) != 1).double()


def reason_against(row: dict, min_margin: float) -> str:
    """Why a row is not learnt from, "" if it is."""
    checks = {"cut off": not row["ended"]}
    if "chosen" in row:
        checks |= {"of equal answers": row["chosen"] == row["rejected"]}
        checks |= {"undecided": row["margin"] < min_margin}
    checks |= {"empty": not row.get("chosen", row.get("completion"))[0]["content"].strip()}
    return next((reason for reason, holds in checks.items() if holds), "")


# ------------------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------------------
def main(args: Args) -> dict:
    """Make rows as `args` says and return the last metrics."""
    device, size = setup_distributed(), args.batch_size
    output_dir, tokenizer = choose_output_dir(args), load_tokenizer(args)
    principles = load_constitution(args)
    judge_args = replace(args, model=args.judge, chat_template=None) if args.judge else args
    judge_tokenizer = load_tokenizer(judge_args)
    labels = label_tokens(judge_tokenizer, args) if args.stage == "judge" else []
    prompts = load_prompts(tokenizer, args.dataset, args.dataset_split, args)
    held_out = load_prompts(tokenizer, args.eval_dataset, args.eval_split, args, args.num_eval)
    cases = [as_case(prompts[i], (args.seed, 0, i)) for i in range(len(prompts))]
    held_out = [as_case(held_out[i], (args.seed, 1, i)) for i in range(len(held_out))]
    longest = max(len(case.prompt.input_ids) for case in cases + held_out)
    if (longest := longest + 3 * args.max_completion_length) > tokenizer.positions:  # critique and revision
        fail(f"--max-completion-length: {longest} tokens in a conversation, {tokenizer.positions} positions")
    some, violation = [case.prompt for case in cases[:1] + held_out[:1]], filter(None, [args.violation])
    rules = [load_rewards(specs, some, args, device) for specs in (violation, args.eval_reward)]
    order = np.random.default_rng(args.seed).permutation(len(cases))[: args.num_rows]
    cases, total_steps = [cases[i] for i in order], math.ceil(len(order) / size)
    rows = read_rows(output_dir, len(cases), args) if args.resume else []

    policy = load_model(args.model, args, device, frozen=True)
    policy.generation_config.eos_token_id = end_tokens(tokenizer, policy)
    judge = load_model(args.judge, args, device, frozen=True) if args.judge else policy
    judge.generation_config.eos_token_id = end_tokens(judge_tokenizer, judge)
    models, step = Models(policy, tokenizer, judge, judge_tokenizer, labels), math.ceil(len(rows) / size)
    begin_files(output_dir, step, args)
    stopping, metrics = torch.zeros(1, device=device), {}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.fill_(1))
    make_rows = partial(revise if args.stage == "revise" else judge_pairs, models, principles, rules, args)
    if step == 0:
        metrics = {"step": 0} | (evaluate_models(models, held_out, rules, args) if held_out else {})
        log(output_dir, metrics)
    while step < total_steps:
        # 1. to 3. Answer, revise or judge
        step, started = step + 1, time.perf_counter()
        made = make_rows(cases[(step - 1) * size : step * size])

        # 4. Write what was said; log what rules say of it, at the end of held-out prompts, too
        metrics = {"step": step} | summed_up(made) | {"step_time": time.perf_counter() - started}
        if step == total_steps and held_out:
            samples = sum([make_rows(held_out[n : n + size]) for n in range(0, len(held_out), size)], [])
            metrics |= {f"eval/{k.removesuffix('/after')}": value for k, value in summed_up(samples).items()}
            write(output_dir / "samples.jsonl", samples)
        log(output_dir, metrics)
        rows += made
        write(output_dir / "rows.jsonl", made, "a")  # from here on the step counts
        dist.all_reduce(stopping)
        if stopping and step < total_steps:
            say(f"stopped; continue with --resume --output-dir {output_dir}")
            return metrics
    write_dataset(output_dir, rows, args)
    return metrics


def revise(models, principles: list[str], rules, args, cases) -> list[dict]:
    """A row for each of B cases: an answer, critiques by --rounds principles, a revision after each."""
    # 1. Answer
    converse = partial(say_next, *models[:2], cases=cases, args=args, temperature=args.temperature)
    answers = [converse([case.messages for case in cases], number=0)]  # 1 + rounds lists of B
    drawn = [draw_principles(case.key, len(principles), args.rounds) for case in cases]  # (B, rounds)
    critiques = []  # rounds lists of B
    for number in range(args.rounds):
        # 2. Revise: the conversation is that about the newest answer
        asked = [CRITIQUE_REQUEST.format(principle=principles[those[number]]) for those in drawn]
        turns = [case.messages + reply(x, y) for case, x, y in zip(cases, answers[-1], asked)]
        critiques.append(converse(turns, number=2 * number + 1))
        turns = [before + reply(critique, REVISION_REQUEST) for before, critique in zip(turns, critiques[-1])]
        answers.append(converse(turns, number=2 * number + 2))
    violations, rewards = (by_rule(rule, answers, args) for rule in rules)  # (B, 1 + rounds) each
    rows = []
    for i, (case, *own) in enumerate(zip(cases, *answers)):
        row = {"prompt": case.messages, "completion": reply(own[-1]), "first_answer": own[0].text}
        row |= {"round": args.rounds, "principles": [principles[n] for n in drawn[i]]}
        row |= {"critiques": [some[i].text for some in critiques], "revisions": [c.text for c in own[1:]]}
        row |= {"violations": violations[i], "rewards": rewards[i], "ended": own[-1].ended}
        rows.append(row | origin(case, args))
    return rows


def judge_pairs(models, principles: list[str], rules, args, cases) -> list[dict]:
    """A row for each of B cases: two answers, the better one as `chosen` by a principle, and by how much."""
    # 1. Answer
    converse = partial(say_next, *models[:2], cases=cases, args=args, temperature=args.temperature)
    pairs = [converse([case.messages for case in cases], number=n) for n in (0, 1)]  # 2 lists of B
    drawn = [principles[draw_principles(case.key, len(principles), 1)[0]] for case in cases]  # B

    # 3. Judge: each pair in both orders, one after the other; what is thought of it comes first
    asked = []  # 2 B
    for case, principle, *pair in zip(cases, drawn, *pairs):
        for first, second in (pair, pair[::-1]):
            text = judge_request(case.messages, first.text, second.text, principle)
            text = text if args.chain_of_thought else f"{text}\n\n{DECISION_REQUEST}"
            asked.append(as_case(Prompt([], {"prompt": text}, ""), case.key))
    turns, judge = [case.messages for case in asked], (models.judge, models.judge_tokenizer)
    if args.chain_of_thought:
        thoughts = say_next(*judge, turns, asked, 2, args, temperature=0.0)
        turns = [messages + reply(thought, DECISION_REQUEST) for messages, thought in zip(turns, thoughts)]
    logprobs = label_logprobs(*judge, models.labels, turns, args)  # (2 B, L)
    logprobs = logprobs.view(len(cases), 2, len(LABELS))  # (B, 2, L)
    shown = first_shown(logprobs)  # (B, 2)
    preferences, (leans, same_place) = preference(shown), position_bias(shown)  # (B,) each
    label_mass = logprobs.exp().sum(-1).mean(1)  # (B,)
    violations, rewards = (by_rule(rule, pairs, args) for rule in rules)  # (B, 2) each
    rows = []
    for i, case in enumerate(cases):
        order = (0, 1) if preferences[i] < 0.5 else (1, 0)  # rejected, chosen
        rejected, chosen = (pairs[n][i] for n in order)
        probability = max(preferences[i].item(), 1 - preferences[i].item())
        row = {"prompt": case.messages, "chosen": reply(chosen), "rejected": reply(rejected)}
        row |= {"principle": drawn[i], "probability": probability, "margin": 2 * probability - 1}
        row |= {"rationales": [turns[n][1]["content"] for n in (2 * i, 2 * i + 1) if args.chain_of_thought]}
        row |= {"first_shown": shown[i].tolist(), "position_bias": leans[i].item()}
        row |= {"same_place": same_place[i].item(), "label_mass": label_mass[i].item()}
        row |= {"violations": [violations[i][n] for n in order], "rewards": [rewards[i][n] for n in order]}
        row |= {"ended": rejected.ended and chosen.ended}
        rows.append(row | origin(case, args))
    return rows


def evaluate_models(models, held_out, rules, args) -> dict:
    """How often the model's own answers to held-out prompts break the rules, and their gold reward."""
    turns = [case.messages for case in held_out]
    answers = say_next(*models[:2], turns, held_out, 0, args, args.temperature)  # B
    violations, rewards = (by_rule(rule, [answers], args) for rule in rules)  # (B, 1) each
    return {"eval/violations": mean(violations), "eval/reward": mean(rewards)}


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
# What is asked: token ids, the dataset row with its prompt (text or messages), where that stands.
Prompt = namedtuple("Prompt", ["input_ids", "row", "place"])
# An answer as it was sampled: token ids, log-probs under the sampler, text, whether an end token came.
Completion = namedtuple("Completion", ["prompt", "token_ids", "logprobs", "text", "ended"])
# A prompt to make a row of: its conversation, contents as texts, and what seeds all that is drawn for it.
Case = namedtuple("Case", ["prompt", "messages", "key"])
Models = namedtuple("Models", ["policy", "tokenizer", "judge", "judge_tokenizer", "labels"])


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


def load_constitution(args) -> list[str]:
    """The principles of --constitution, enough of them for --rounds different ones."""
    try:
        text = Path(located(args.constitution)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--constitution {args.constitution}: {error}")
    lines = [line.strip() for line in text.splitlines()]
    principles = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    needed = args.rounds if args.stage == "revise" else 1
    if len(principles) < needed:
        fail(f"--constitution {args.constitution}: {len(principles)} principles, {needed} are needed")
    return principles


def as_case(prompt: Prompt, key: tuple[int, ...]) -> Case:
    """A prompt, text or messages, as a conversation whose contents are texts."""
    asked, messages = prompt.row["prompt"], []
    for turn in [{"role": "user", "content": asked}] if isinstance(asked, str) else asked:
        parts = turn.get("content") or ""
        text = "".join(part["text"] for part in parts) if isinstance(parts, list) else str(parts)
        messages.append({"role": turn["role"], "content": text})
    return Case(prompt, messages, key)


def reply(answer: Completion, request: str | None = None) -> list[dict]:
    """An answer as a turn of the assistant, and what the user asks of it."""
    asked = [{"role": "user", "content": request}] if request else []
    return [{"role": "assistant", "content": answer.text}, *asked]


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


@loading.unsharded
def say_next(policy, tokenizer, turns: list[list[dict]], cases: list[Case], number: int, args, temperature):
    """What a model says next in each of B conversations, as Completions.

    A case's key and `number` seed what is sampled: not the batch it is in, not how many processes there are.
    """
    policy.eval()
    asked = [chat_ids(tokenizer, messages, case.prompt.row) for messages, case in zip(turns, cases)]  # B
    mine, room = sorted(my_share(len(asked), 1), key=lambda i: len(asked[i])), args.max_completion_length
    size = max(1, args.max_tokens_per_rollout // (max(map(len, asked)) + room))
    end_ids, sampled = policy.generation_config.eos_token_id, {}
    for chunk in (mine[start : start + size] for start in range(0, len(mine), size)):
        numbers = [np.random.default_rng((*cases[i].key, number)).random(room) for i in chunk]
        uniforms = torch.tensor(np.stack(numbers), device=policy.device)  # (b, T)
        answers = common.decode(policy, [asked[i] for i in chunk], uniforms, end_ids, temperature)
        sampled |= dict(zip(chunk, answers))
    sampled = [answer for _, answer in sorted(gather(sampled).items())]  # B, token ids and log-probs
    texts = tokenizer.batch_decode([ids for ids, _ in sampled], skip_special_tokens=True)
    answers = zip(cases, sampled, texts)
    return [Completion(c.prompt, ids, logps, text, ids[-1] in end_ids) for c, (ids, logps), text in answers]


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


def by_rule(rewarders: dict, answers: list[list[Completion]], args) -> list[list[float | None]]:
    """What rules say, (B, n), of n lists of B answers; None where there is no rule, or it says nothing."""
    values = [weighted_sum(score(rewarders, some, 1, args), ()) for some in answers]  # n times (B,)
    return [[None if x != x else x for x in line] for line in torch.stack(values, 1).tolist()]


def mean(values: list[list[float | None]]) -> float:
    """Mean of all that is known; NaN where nothing is."""
    known = [x for line in values for x in line if x is not None]
    return float(np.mean(known)) if known else math.nan


def summed_up(rows: list[dict]) -> dict:
    """Metrics: what rules say of first answers and of last revisions, or of all answers and of the chosen."""
    judged, metrics = "chosen" in rows[0], {}
    for name, column in (("violations", "violations"), ("reward", "rewards")):
        values = [row[column] for row in rows]
        metrics[f"{name}/before"] = mean(values if judged else [line[:1] for line in values])
        metrics[f"{name}/after"] = mean([line[-1:] for line in values])
        if judged:  # of the pairs that a rule tells apart, those that the judge does as well
            apart = [line for line in values if None not in line and line[0] != line[1]]
            agreed = [[float((line[1] > line[0]) == (name == "reward"))] for line in apart]
            metrics[f"{name}/agreement"] = mean(agreed)
    if judged:
        differ = [row for row in rows if row["chosen"] != row["rejected"]]
        for name in ("margin", "position_bias", "same_place", "label_mass"):
            metrics[name] = mean([[row[name] for row in differ]])
    else:
        metrics["changed"] = mean([[row["revisions"][-1] != row["first_answer"] for row in rows]])
    return metrics | {"completions/clipped_ratio": mean([[not row["ended"] for row in rows]])}


def origin(case: Case, args) -> dict:
    """Where a row is from: the prompt's place in --dataset, and the flags that made it."""
    names = ("stage", "model", "judge", "constitution", "seed", "temperature", "max_completion_length")
    return {"index": case.key[-1]} | {name: getattr(args, name) for name in names}


def read_rows(output_dir: Path, count: int, args) -> list[dict]:
    """The rows that a run has made before, of whole steps; what follows them goes from rows.jsonl."""
    path = output_dir / "rows.jsonl"
    lines = [x for x in path.open(encoding="utf-8") if x.endswith("}\n")][:count] if path.exists() else []
    lines = lines if len(lines) == count else lines[: len(lines) // args.batch_size * args.batch_size]
    rows = [json.loads(line) for line in lines]
    for name in rows[0] if rows else ():
        if hasattr(args, name) and rows[0][name] != getattr(args, name):
            fail(f"--resume: {name} was {rows[0][name]} and is {getattr(args, name)}")
    dist.barrier()  # all have read it
    write(path, rows)
    return rows


def begin_files(output_dir: Path, step: int, args):
    """Write what a run is; of one that continues, cut off the metrics that follow `step`."""
    path = output_dir / "metrics.jsonl"
    lines = [x for x in path.open() if x.endswith("}\n")] if path.exists() else []
    dist.barrier()  # all have read it
    write(path, [x for x in map(json.loads, lines) if x["step"] <= step > 0])
    if dist.get_rank() == 0:
        (output_dir / "args.json").write_text(as_json(args))
        for path in (Path(__file__), HERE / "common.py"):
            shutil.copy(path, output_dir)
    say(f"run: {output_dir}")


def write(path: Path, rows: list[dict], mode: str = "w"):
    """Write a JSONL file, or with mode "a" behind its end, from the first process."""
    if dist.get_rank() == 0:
        half = path if mode == "a" else path.with_suffix(".partial")
        with half.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        half.rename(path)


def log(output_dir: Path, metrics: dict):
    """Write and print the metrics of a step, those that are known."""
    known = {name: value for name, value in metrics.items() if value == value}  # without NaN
    write(output_dir / "metrics.jsonl", [known], "a")
    step, shown = metrics["step"], [f"{name} {value:.3g}" for name, value in known.items() if name != "step"]
    for start in range(0, len(shown), 4):
        say(f"step {step}:  {'  '.join(shown[start : start + 4])}")


def write_dataset(output_dir: Path, rows: list[dict], args):
    """Write the rows that can be learnt from as sft.jsonl or preference.jsonl; say what all rows are."""
    reasons = [reason_against(row, args.min_margin) for row in rows]
    path = output_dir / ("sft.jsonl" if args.stage == "revise" else "preference.jsonl")
    write(path, [row for row, reason in zip(rows, reasons) if not reason])
    for name, value in summed_up(rows).items() if rows else ():
        say(f"  {name:<26} {value:.3g}")
    counts = Counter(reason or "written" for reason in reasons)
    say(f"{path}: {', '.join(f'{count:,} {reason}' for reason, count in counts.items()) or 'no rows'}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
