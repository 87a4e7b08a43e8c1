"""Evaluation: did it work, and what did it cost? One model, or several side by side with their base.

    pass@k = E_x[ 1 - C(N - c, k) / C(N, k) ],   c of N samples right            Eq. 1, arXiv:2107.03374
    win rate = E_x[ P(y better than z) ],   y ~ model(. | x), z ~ base(. | x)
    KL(model || base) = E_y[ sum_t log model(y_t | x, y_<t) - log base(y_t | x, y_<t) ]

    capability     rewards, pass@k, majorities, strict and lenient accuracy, win rates, also length-controlled
    cost           KL from the base, and what the model forgot of a corpus
    health         lengths, answers cut off, distinct and repeated n-grams, entropy, refusals
    honesty        wrong hints that turn right answers, calibration, the right format with a wrong answer
    contamination  prompts of which training files hold 13 words in a row

The loop:

    1. Read     the data in every model's own tokens; what training files hold of it
    2. Answer   for each model: greedily, sampled, with wrong hints and without; samples_<n>.jsonl
    3. Compare  each model with the base, by --reward or by --judge
    4. Report   a table, report.json, and report.html, one page that loads nothing

Intervals are 95 % over prompts drawn anew (bootstrap). --resume skips models whose answers are written.

Deviations from the papers, each with its reason:
    1. The length-controlled win rate takes a prompt's difficulty from how other models fare on it, not from a
       joint fit, which would fit the noise of a handful of models. With fewer than three models it has none.
    2. Samples of model and base meet shifted by one: no pair shares its random numbers.

    python evaluate.py                                         # CPU, offline, under 2 minutes on one core
    python evaluate.py --models Qwen/Qwen2.5-1.5B runs/sft/model runs/grpo/model --dataset openai/gsm8k \
        --dataset-config main --eval-samples 16 --max-completion-length 512

Shapes: P prompts, N samples of each, C tokens of an answer, K pairs of a prompt, L = 2 labels.
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
import tempfile
import time
import traceback
from collections import namedtuple
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pydantic
import torch
import torch.distributed as dist
import transformers
import tyro
from pydantic import FilePath, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import common
import estimators
import loading
from common import CHATML, check_packed, kl_k1, kl_k3, token_logprobs

HERE = Path(__file__).resolve().parent


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
    dtype: loading.Dtype = "bfloat16" if torch.cuda.is_available() else "float32"  # compute precision
    gradient_checkpointing = compile = lora_rank = optimizer = False  # no flags: nothing is trained

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
    reward_timeout: NonNegativeFloat = 1800  # seconds a reward has for a batch, or the run ends; 0: for ever

    # Rollout
    eval_samples: NonNegativeInt = 8  # samples of each held-out prompt, the k of pass@k; 0: greedy only
    max_completion_length: PositiveInt = 128  # longest sampled answer in tokens
    temperature: PositiveFloat = 1.0  # sampling temperature
    max_tokens_per_rollout: PositiveInt = 65536  # tokens that are sampled at once: memory, never the result
    max_tokens_per_micro_batch: PositiveInt = 8192  # tokens of a packed row: memory only, never the result

    # Output
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
            self.sycophancy_dataset = self.sycophancy_dataset or "tiny/data/sycophancy_eval.jsonl"
            self.forgetting_dataset = self.forgetting_dataset or "tiny/data/text_eval.jsonl"
            self.training_files = self.training_files or ("tiny/data/sft_train.jsonl",)
        if not self.models or not self.dataset:
            fail("--models and --dataset: what should be evaluated, and on what?")
        self.base = self.base or self.models[0]
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            fail(f"{len(self.reward_weights)} --reward-weights for {len(self.reward)} rewards")


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
def weighted_sum(scores: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """Rewards (B,) from the scores (F, B) of F functions, by default 1 each: without NaN, NaN if all are."""
    weighted = scores * torch.tensor(weights or [1.0] * len(scores), dtype=scores.dtype)[:, None]  # (F, B)
    return weighted.nansum(0).masked_fill(scores.isnan().all(0), math.nan)


def preferred(margins: torch.Tensor, tie: float = 1e-4) -> torch.Tensor:
    """1 where the chosen answer has the higher reward, 1/2 in a tie, 0 else: margins (B,) -> (B,).

    Rewards closer than `tie` are equal: in another row a float32 reward differs by 1e-6.
    """
    return (1 + margins.sign() * (margins.abs() > tie)) / 2


# ------------------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------------------
def main(args: Args) -> dict:
    """Evaluate the models as `args` says -> the report, as it stands in report.json."""
    device, output_dir = setup_distributed(), choose_output_dir(args)
    names = list(dict.fromkeys([args.base, *args.models]))  # the base first
    # 1. Read
    folders = [whole_model(name) for name in names]
    inputs = with_same_prompts([read_inputs(folder, args) for folder in folders])
    tokens, prompts = inputs[0].tokenizer.get_vocab(), inputs[0].prompts  # the base's
    rewarders = load_rewards(args.reward, prompts[:1] + inputs[0].hinted[:1], args, device)
    judge = choose_judge(prompts, args, device) if args.judge else None
    contamination = find_contamination(prompts, args)
    begin_report(output_dir, args)

    # 2. Answer: the base stays in memory, for the KL
    count = sum(len(x.prompts) * (1 + args.eval_samples) + 2 * len(x.hinted) for x in inputs)
    bar = tqdm(total=count, unit="answer", dynamic_ncols=True, disable=dist.get_rank() > 0 or None)
    base, everyones = None, []  # rows of each model
    for number, (name, folder, own) in enumerate(zip(names, folders, inputs)):
        path = output_dir / f"samples_{number}.jsonl"
        rows = read_answers(path, name, args) if args.resume else []
        if not rows or number == 0:
            policy = load_model(folder, args, device, frozen=True)
            policy.generation_config.eos_token_id = end_tokens(own.tokenizer, policy)
            base = base or policy
        if not rows:
            reference = base if own.tokenizer.get_vocab() == tokens else None
            rows, costs = answer_all(policy, reference, own, rewarders, bar, args)
            rows = [origin_of(name, args) | {"kind": "model", "metrics": costs}, *rows]
            write(path, rows)  # all of it, or nothing
        everyones.append(rows)
    chosen = [row for rows in everyones for row in estimators.chosen_rows(rows, args.eval_samples)]
    verifier, size = estimators.verifier_of(chosen), args.eval_samples
    metrics = [
        estimators.measured(rows, size, args.seed, verifier) | rows[0]["metrics"] for rows in everyones
    ]
    bar.close()
    policy = base = None

    # 3. Compare with the base
    if judge and judge.words:
        judge = judge._replace(model=load_model(args.judge, args, device, frozen=True))
    pairs = [pair_up(rows, everyones[0], prompts, judge, args) for rows in everyones[1:]]
    for number, own in enumerate(metrics[1:]):
        others = [preferences for n, (preferences, _) in enumerate(pairs) if n != number]
        own |= estimators.win_rates(*pairs[number], others, args.seed)
    for own, one in zip(metrics, inputs if args.forgetting_dataset else ()):
        name = "eval/forgetting_perplexity"
        if one.tokenizer.get_vocab() == tokens:
            own["eval/forgetting_ratio"] = own[name] / metrics[0][name]

    # 4. Report
    metrics = [{key: value for key, value in own.items() if value == value} for own in metrics]  # without NaN
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    report = {"models": dict(zip(names, metrics)), "base": args.base, "contamination": contamination}
    report |= {"plots": {n: estimators.plotted(rows, size, verifier) for n, rows in zip(names, everyones)}}
    report |= {"flags": json.loads(as_json(args))}
    report |= {"versions": versions | {"transformers": transformers.__version__}}
    write_evaluation(output_dir, report, everyones)
    return report


def answer_all(policy, base, inputs, rewarders, bar, args) -> tuple[list[dict], dict]:
    """Rows of a model's answers of every `kind`, and its metrics that are no means over rows."""
    started, rows = time.perf_counter(), []
    kinds = {
        "greedy": (inputs.prompts, 1, 0.0),
        "sampled": (inputs.prompts, args.eval_samples, args.temperature),
    }
    kinds |= {"hinted": (inputs.hinted, 1, 0.0), "unhinted": (inputs.unhinted, 1, 0.0)}
    for n, (kind, (asked, size, temperature)) in enumerate(kinds.items()):
        for start in range(0, len(asked) * (size > 0), CHUNK):
            some, seed = asked[start : start + CHUNK], (args.seed, n, start)
            made = answer(policy, inputs.tokenizer, some, size, temperature, seed, (rewarders, {}), args)
            add_verdicts(made, [prompt.row for prompt in some for _ in range(size)])
            rows += [{"kind": kind} | row for row in made]
            bar.update(len(made))
    seconds, num_tokens = time.perf_counter() - started, sum(len(row["completion_ids"]) for row in rows)
    costs = {"num_tokens": num_tokens, "tokens_per_second": num_tokens / seconds, "step_time": seconds}
    measured_rows = estimators.chosen_rows(rows, args.eval_samples)
    answers = [(row["prompt_ids"], row["completion_ids"]) for row in measured_rows]
    own = token_scores(policy, answers, args.temperature, args)
    others = own if base in (policy, None) else token_scores(base, answers, args.temperature, args)
    for row, (logprobs, entropy), (ref_logprobs, _) in zip(measured_rows, own, others):  # (C,) each
        row["entropy"] = entropy.sum().item()
        for name, estimate in (("kl_k1", kl_k1), ("kl_k3", kl_k3)) if base and args.eval_samples else ():
            row[name] = estimate(logprobs, ref_logprobs).sum().item()
    return rows, perplexity_of(policy, inputs, args) | costs


def pair_up(rows, base_rows, prompts, judge, args) -> tuple[np.ndarray, np.ndarray]:
    """Preferences for a model over the base, in [0, 1], and length differences in characters, (P, K) each.

    By rewards each sample meets another of the base (K = N); a language model judges one pair of a prompt.
    """
    size = args.eval_samples or 1
    mine, theirs = (estimators.chosen_rows(some, args.eval_samples) for some in (rows, base_rows))
    theirs = [theirs[n - n % size + (n + 1) % size] for n in range(len(theirs))]  # other random numbers
    if judge and judge.words:
        mine, theirs, size = mine[::size], theirs[::size], 1
        preferences = ask_judge(judge, prompts, mine, theirs, args)
    else:
        rewards = [rewards_of(some, prompts, size, judge, args) for some in (mine, theirs)]  # (P K,) each
        margins = torch.tensor(rewards[0] - rewards[1])  # (P K,), NaN where one is unknown
        preferences = preferred(margins).masked_fill(margins.isnan(), math.nan).numpy()
    differences = [len(x["completion"]) - len(y["completion"]) for x, y in zip(mine, theirs)]
    return preferences.reshape(-1, size), np.array(differences, float).reshape(-1, size)


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
# What is asked: token ids, the dataset row with its prompt (text or messages), where that stands.
Prompt = namedtuple("Prompt", ["input_ids", "row", "place"])
# An answer as it was sampled: token ids, log-probs under the sampler, text, whether an end token came.
Completion = namedtuple("Completion", ["prompt", "token_ids", "logprobs", "text", "ended"])
# What a model is asked, in its own tokens: prompts, those with a hint and without, (ids, bytes) of texts.
Inputs = namedtuple("Inputs", ["tokenizer", "prompts", "hinted", "unhinted", "corpus"])
# Reward functions; or a language model, and constitutional_ai.py's `words`: what it is asked, how it is read.
Judge = namedtuple("Judge", ["rewarders", "words", "tokenizer", "labels", "model"])
CHUNK = 64  # prompts that are answered at once; seeds and the progress bar go by it
ANSWERS = "seed dataset num_eval eval_samples temperature max_completion_length reward reward_weights base"
ANSWERS += " dataset_config eval_split max_prompt_length chat_template sycophancy_dataset forgetting_dataset"


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
            own = located(name) if adapter.with_name("tokenizer_config.json").exists() else base
            AutoTokenizer.from_pretrained(own).save_pretrained(folders[0])
        except (ImportError, OSError, ValueError, KeyError) as error:
            fail(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
    dist.broadcast_object_list(folders)
    return folders[0]


def read_inputs(name: str, args) -> Inputs:
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
        except ValueError as error:
            fail(f"--sycophancy-dataset: {prompt.place}: {error}")
    source = args.forgetting_dataset
    for row in load_rows(source, args.eval_split, args, args.num_eval) if source else ():
        if not isinstance(row.get("text"), str):
            fail(f"--forgetting-dataset {source}: no column text of texts")
        ids, text = [*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id], row["text"]
        if len(ids) > tokenizer.positions:
            text = tokenizer.decode(ids := ids[: tokenizer.positions], skip_special_tokens=True)
        first = tokenizer.decode(ids[:1], skip_special_tokens=True)  # which nothing predicts
        corpus.append((ids, len(text.encode()) - len(first.encode())))
    return Inputs(tokenizer, prompts, hinted, unhinted, list(dict.fromkeys((tuple(x), n) for x, n in corpus)))


def with_same_prompts(inputs: list[Inputs]) -> list[Inputs]:
    """The inputs of models with the prompts that are short enough in the tokens of all of them."""
    for name in ("prompts", "hinted", "unhinted"):
        places = set.intersection(*({prompt.place for prompt in getattr(one, name)} for one in inputs))
        keep = lambda one, name=name, here=places: [x for x in getattr(one, name) if x.place in here]
        inputs = [one._replace(**{name: keep(one)}) for one in inputs]
    return inputs


def plain_twin(tokenizer, prompt: Prompt, args) -> Prompt:
    """The prompt of a row with `hint`, without the sentence of its last turn that gives it."""
    if missing := {"hint", "answer"} - {*prompt.row}:
        raise ValueError(f"no column {min(missing, key=len)}")
    asked, hint = prompt.row["prompt"], str(prompt.row["hint"])
    if isinstance(asked, str):
        asked = estimators.without_hint(asked, hint)
    else:
        asked = [*asked[:-1], asked[-1] | {"content": estimators.without_hint(asked[-1]["content"], hint)}]
    return read_prompt(tokenizer, prompt.row | {"prompt": asked}, prompt.place, args)


def choose_judge(prompts: list[Prompt], args, device) -> Judge:
    """What --judge names: rewards, as --reward does, or a language model, which is loaded later."""
    try:
        config = None if ".py:" in args.judge else AutoConfig.from_pretrained(located(args.judge))
    except (OSError, ValueError):  # an ensemble of reward models, or nothing at all, as load_rewards will say
        config = None
    if config is None or "SequenceClassification" in str(config.architectures):
        return Judge(load_rewards((args.judge,), prompts[:1], args, device), None, None, None, None)
    words = SimpleNamespace(**runpy.run_path(str(HERE / "constitutional_ai.py")))
    tokenizer = load_tokenizer(SimpleNamespace(model=args.judge, chat_template=None))
    return Judge(None, words, tokenizer, words.label_tokens(tokenizer, args), None)


def ask_judge(
    judge: Judge, prompts: list[Prompt], rows: list[dict], base_rows: list[dict], args
) -> np.ndarray:
    """P(the model's answer is better than the base's), (P,), by a language model, in both orders."""
    turns, words = [], judge.words
    for prompt, *pair in zip(prompts, rows, base_rows):
        messages = words.as_case(prompt, ()).messages
        for first, second in (pair, pair[::-1]):
            text = words.judge_request(messages, first["completion"], second["completion"], args.principle)
            turns.append([{"role": "user", "content": f"{text}\n\n{words.DECISION_REQUEST}"}])
    logprobs = words.label_logprobs(judge.model, judge.tokenizer, judge.labels, turns, args)  # (2 P, L)
    return words.preference(words.first_shown(logprobs.view(len(prompts), 2, -1))).numpy()


def rewards_of(rows: list[dict], prompts: list[Prompt], size: int, judge: Judge | None, args) -> np.ndarray:
    """Rewards (B,), NaN for None, of `size` answers to each prompt: those of the rows, or the judge's."""
    if judge is None:
        return np.array([row["reward"] for row in rows], float)
    asked = [prompt for prompt in prompts for _ in range(size)]
    rollout = [
        Completion(prompt, row["completion_ids"], None, row["completion"], row["ended"])
        for prompt, row in zip(asked, rows, strict=True)
    ]
    return weighted_sum(score(judge.rewarders, rollout, size, args), ()).numpy()


def add_verdicts(rows: list[dict], columns: list[dict]):
    """Add what rewards.py says of answers: format; if they are right (strictly, leniently) or the hint."""
    library = runpy.run_path(str(HERE / "rewards.py"))
    strict, lenient = library["math_answer_strict"], library["math_answer"]
    texts = {"prompts": [row["prompt"] for row in rows], "completions": [row["completion"] for row in rows]}
    verdicts = {"strict": (strict, "answer"), "lenient": (lenient, "answer"), "is_hint": (lenient, "hint")}
    for name, (verdict, column) in verdicts.items():
        for row, value in zip(rows, verdict(**texts, answer=[row.get(column) for row in columns])):
            row[name] = value  # None without a gold answer
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


def perplexity_of(model, inputs: Inputs, args) -> dict:
    """Perplexity by token of the corpus, and bits by byte, which models of different tokens can share."""
    if not inputs.corpus:
        return {}
    texts = [(list(ids[:1]), list(ids[1:])) for ids, _ in inputs.corpus]  # nothing predicts the first token
    losses = torch.cat([-logprobs for logprobs, _ in token_scores(model, texts, 1.0, args)]).double()
    bits = losses.sum().item() / math.log(2) / sum(size for _, size in inputs.corpus)
    perplexity = math.exp(min(losses.mean().item(), 700))  # floats end at exp(709)
    return {"eval/forgetting_perplexity": perplexity, "eval/forgetting_bits_per_byte": bits}


def words_of(value) -> str:
    """All text in a value of a dataset's row, without the roles of messages."""
    if isinstance(value, dict):
        value = [part for name, part in value.items() if name != "role"]
    if isinstance(value, list):
        return " ".join(map(words_of, value))
    return value if isinstance(value, str) else ""


def find_contamination(prompts: list[Prompt], args) -> dict:
    """Which prompts share 13 words in a row with a row of --training-files."""
    texts, listed = [words_of(prompt.row["prompt"]) for prompt in prompts], []
    for source in args.training_files:
        documents = [words_of(row) for row in load_rows(source, "train", args)]
        for number, place in estimators.overlaps(texts, documents):
            origin = {"place": prompts[number].place, "file": source, "row": place + 1}
            listed.append(origin | {"prompt": texts[number], "document": documents[place]})
    share = len({line["place"] for line in listed}) / len(prompts)
    return {"files": list(args.training_files), "prompts": len(prompts), "share": share, "listed": listed}


def begin_report(output_dir: Path, args):
    """Write what a run is."""
    if dist.get_rank() == 0:
        (output_dir / "args.json").write_text(as_json(args))
        for name in (Path(__file__).name, "evaluate_report.py", "evaluate.html", "common.py"):
            shutil.copy(HERE / name, output_dir)
    say(f"run: {output_dir}")


def origin_of(name: str, args) -> dict:
    """The model that gave answers, and the flags that they depend on."""
    flags = {"model": name} | {flag: getattr(args, flag) for flag in ANSWERS.split()}
    return json.loads(json.dumps(flags, default=str))


def read_answers(path: Path, name: str, args) -> list[dict]:
    """The rows of a model that was asked before, none of one that was not."""
    if not path.exists():
        return []
    rows, now = [json.loads(line) for line in path.open(encoding="utf-8")], origin_of(name, args)
    for flag in (flag for flag in now if rows[0].get(flag) != now[flag]):
        fail(f"--resume: {flag} was {rows[0].get(flag)} and is {now[flag]}")
    return rows


def write_evaluation(output_dir: Path, report: dict, everyones: list[list[dict]]):
    """Write report.json and report.html; print the table."""
    if dist.get_rank() == 0:
        (output_dir / "report.json").write_text(json.dumps(report, indent=2))
        show = runpy.run_path(str(HERE / "evaluate_report.py"))
        greedy = [[row for row in rows if row["kind"] == "greedy"] for rows in everyones]
        samples = [(words_of(lines[0]["prompt"]), lines) for lines in zip(*greedy)][:8]
        (output_dir / "report.html").write_text(show["page"](report, samples, output_dir), encoding="utf-8")
        for line in show["table"](report):
            say(line)
    say(f"{output_dir}/report.html, report.json, samples_<n>.jsonl")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
