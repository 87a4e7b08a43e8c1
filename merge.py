"""Model merging: one checkpoint out of several with the same architecture, in weight space, without training.

    theta = theta_0 + lambda sum_i w_i m_i (theta_i - theta_0)           task arithmetic, arXiv:2212.04089

theta_i - theta_0 is the task vector of model i: what fine-tuning changed in the base. The methods differ in
what they keep of it (m_i), and in how they average:

    linear, soup       averages of the weights themselves: Model Soups, arXiv:2203.05482 (uniform or greedy)
    wise_ft            a point on the line from the base to one model: WiSE-FT, arXiv:2109.01903, Eq. 1
    slerp              the same on the arc of a circle (Shoemake 1985)
    task_arithmetic    a weighted sum of task vectors: arXiv:2212.04089
    ties               of the largest changes, those of the elected sign: TIES, arXiv:2306.01708
    dare_linear, _ties a random part of the changes, scaled up: DARE, arXiv:2311.03099
    breadcrumbs        neither the smallest nor the very largest changes: arXiv:2312.06795
    model_stock        between base and average, by the angle of the task vectors: arXiv:2403.19522
    lora               whole weights of a LoRA (arXiv:2106.09685); other methods take one as a model, too

Nothing is loaded as a model. The loop goes over tensors, in the order of the output files:

    1. Check     names, shapes, dtypes and vocabularies of all models, before anything is merged
    2. Measure   what a method must know of whole tensors: thresholds, angles, norms
    3. Merge     a tile of every model in float32, one merged tile, one rounding
    4. Write     a thread of its own writes a shard while the next one is merged
    5. Report    norms and angles of the task vectors, as table and JSON

Deviations from the papers, each with its reason (docs/merge.md lists what `--compat mergekit` changes):
    1. `--weights` multiply task vectors everywhere; TIES and DARE have one scale for all. 1 is the paper's.
    2. Changes of the same size as a threshold are all kept: a tie has no order, in bfloat16 it is common.
    3. dare_ties replaces TIES' trimming by DARE; the paper leaves open whether both apply.
    4. Model Stock keeps the base where task vectors point apart: its ratio, below 0 there, has no bound.

    python merge.py                                            # CPU, offline, seconds
    python merge.py --method ties --base Qwen/Qwen2.5-1.5B --models math-model code-model --density 0.2

Shapes: K models, n numbers in a tile or tensor.
"""

import ctypes
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import numpy as np
import pydantic
import torch
import tyro
from huggingface_hub import split_state_dict_into_shards_factory
from pydantic import Field, FiniteFloat, NonNegativeInt, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tqdm import tqdm

import loading

HERE = Path(__file__).resolve().parent
Kept = Annotated[float, Field(gt=0, le=1)]
Dropped = Annotated[float, Field(ge=0, lt=1)]
Size = Annotated[str, Field(pattern=r"^[1-9]\d*[KMG]B$")]
Plain = Literal["linear", "soup", "wise_ft", "slerp", "task_arithmetic", "model_stock", "lora"]
Sparse = Literal["ties", "dare_linear", "dare_ties", "breadcrumbs"]
SPARSE = get_args(Sparse)


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
METHODS_WITH = {  # which methods have a parameter
    "weight": ("linear", "task_arithmetic", *SPARSE),
    "lambda": ("task_arithmetic", *SPARSE),
    "t": ("wise_ft", "slerp"),
    "density": SPARSE,
    "outliers": ("breadcrumbs",),
}


@pydantic.dataclasses.dataclass
class Args:
    # Models
    base: str | None = None  # what the others were tuned from: a hub id or a folder
    models: tuple[str, ...] = ()  # hub ids or folders; by default tiny/sft, half-way from tiny/base
    pad_vocab: bool = False  # fill up smaller vocabularies by rows of the largest, if ids agree otherwise

    # Method
    method: Plain | Sparse = "task_arithmetic"  # the default is the simplest, and rarely beaten
    compat: Literal["paper", "mergekit"] = "paper"  # where the two differ: the paper's formula, or mergekit's
    weights: tuple[FiniteFloat, ...] = ()  # of each model, by default 1 each; linear divides by their sum
    lambda_: Annotated[FiniteFloat | None, tyro.conf.arg(name="lambda")] = None  # scale; by default 1
    t: FiniteFloat | None = None  # way from base (0) to model (1) of wise_ft and slerp; by default 0.5
    density: Kept | None = None  # share of each task vector that is kept; by default 0.2 (ties) or 0.1
    outliers: Dropped | None = None  # share of largest changes that breadcrumbs drops; by default 0.01
    rule: tuple[str, ...] = ()  # PATTERN:NAME=V[,V...] for some tensors; several V are a line over layers
    eval_command: str | None = None  # greedy soup: prints a number last for folder {model}, more is better
    seed: NonNegativeInt = 1  # of the data order and the sampling

    # Output
    output_dir: str | None = None  # new folder of the run; by default runs/<script>_<seed>_<time>
    out_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the result; auto: as the base
    max_shard_size: Size = "5GB"  # largest file of weights (10^9 bytes); up to two of them are in memory
    report: bool = True  # measure norms and angles of the task vectors, if there is a --base

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def in_range(cls, values, build):
        try:
            return build(values)
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            fail(f"--{problem['loc'][0].replace('_', '-')} {problem['input']}: {problem['msg']}")

    def __post_init__(self):
        given = {"weight": self.weights or None, "lambda": self.lambda_, "t": self.t}
        given |= {"density": self.density, "outliers": self.outliers}
        for name in given:
            if given[name] is not None and self.method not in METHODS_WITH[name]:
                fail(f"--method {self.method} has no {name}")
        defaults = {"lambda_": 1.0 if self.models else 0.5, "t": 0.5, "outliers": 0.01}
        defaults |= {"density": 0.2 if self.method == "ties" else 0.1}  # the paper's of TIES and of DARE
        for name in defaults:
            setattr(self, name, defaults[name] if getattr(self, name) is None else getattr(self, name))
        if self.base and not self.models:
            fail("--base without --models: there is nothing to merge with it")
        if not self.models:
            self.base, self.models = f"{HERE}/tiny/base", (f"{HERE}/tiny/sft",)
        if self.method in METHODS_WITH["t"] and self.base is None and len(self.models) == 2:
            self.base, self.models = self.models[0], self.models[1:]
        if self.method == "lora" and (self.base or len(self.models) != 1):
            fail("--method lora takes one folder of a LoRA as --models; it names its base itself")
        if self.method not in ("linear", "soup", "lora") and self.base is None:
            fail(f"--method {self.method} needs --base, the model that --models were fine-tuned from")
        if self.method in METHODS_WITH["t"] and len(self.models) != 1:
            fail(f"--method {self.method} takes --base and one model, not {len(self.models)}")
        if self.method == "model_stock" and len(self.models) < 2:
            fail("--method model_stock takes two models or more: it goes by the angle between them")
        if self.weights and len(self.weights) != len(self.models):
            fail(f"--weights has {len(self.weights)} numbers for {len(self.models)} models")
        if self.eval_command and (self.method != "soup" or "{model}" not in self.eval_command):
            fail("--eval-command is for --method soup, and says with {model} where the folder to score goes")


class Settings(NamedTuple):
    """The parameters of the methods for one tensor, after the rules: those with (K,) one per model."""

    weights: tuple[float, ...]
    densities: tuple[float, ...]
    lambda_: float
    t: float
    outliers: float


# ------------------------------------------------------------------------------------------------------------
# Algorithm
# ------------------------------------------------------------------------------------------------------------
# Comparisons write 0 and 1 into floats (`ge_`): products with them keep a NaN, and boolean masks are slower.
def linear(tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_i w_i theta_i / sum_i w_i, tensors (K, ...) and weights (K,) -> (...).

    With equal weights the uniform soup (arXiv:2203.05482, section 2).
    """
    return torch.tensordot(weights / weights.sum(), tensors, 1)


def greedy_soup(scores: list[float], score_of: Callable[[list[int]], float]) -> list[int]:
    """The models that go into the greedy soup (arXiv:2203.05482, Recipe 1), as indices, best first.

    `scores` are those of the single models, higher is better; `score_of` scores the average of several.
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept, best = order[:1], scores[order[0]]
    for i in order[1:]:
        score = score_of([*kept, i])
        if score >= best:
            kept, best = [*kept, i], score
    return kept


def wise_ft(base: torch.Tensor, tensor: torch.Tensor, t: float) -> torch.Tensor:
    """(1 - t) theta_0 + t theta_1, exact at both ends (arXiv:2109.01903, Eq. 1, with t for alpha)."""
    return torch.lerp(base, tensor, t)


def gram(base: torch.Tensor, task_vectors: torch.Tensor) -> torch.Tensor:
    """Inner products of base (n,) and task vectors (K, n), (K + 1, K + 1) float64: those of tiles add up."""
    row = base[None]  # (1, n): products by blocks, for all rows in one matrix would be a copy of them
    cross, among = task_vectors @ row.T, task_vectors @ task_vectors.T  # (K, 1), (K, K)
    top = torch.cat([row @ row.T, cross.T], 1)  # (1, K + 1)
    return torch.cat([top, torch.cat([cross, among], 1)]).double()


def slerp_coefficients(inner: torch.Tensor, t: float, *, compat: str = "paper") -> tuple[float, float]:
    """The factors of slerp's two tensors (Shoemake 1985): sin((1 - t) a) / sin a and sin(t a) / sin a.

    `inner` (2, 2) is the `gram` of the first tensor and of the difference, a the angle between the tensors.
    Where there is no arc (a = 0 or pi, up to rounding, or a tensor of zeros) it is 1 - t and t, a straight
    line. mergekit takes the line from |cos a| > 0.9995 on, and a right angle where a tensor is zero.
    """
    (base, cross), (_, change) = inner.tolist()
    norms = math.sqrt(max(base, 0) * max(base + 2 * cross + change, 0))
    if norms < 1e-16:
        cosine = 0.0 if compat == "mergekit" else 1.0
    else:
        cosine = max(-1.0, min(1.0, (base + cross) / norms))
    if abs(cosine) > (0.9995 if compat == "mergekit" else 1 - 1e-6):
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp(base: torch.Tensor, tensor: torch.Tensor, coefficients: tuple[float, float]) -> torch.Tensor:
    """The point on the arc from base to tensor that `slerp_coefficients` gives (Shoemake 1985)."""
    return (base * coefficients[0]).add_(tensor, alpha=coefficients[1])


def task_arithmetic(base, task_vectors, weights: torch.Tensor, lambda_: float) -> torch.Tensor:
    """theta_0 + lambda sum_i w_i tau_i, task vectors (K, ...), weights (K,) (arXiv:2212.04089, section 2)."""
    return base + torch.tensordot(lambda_ * weights, task_vectors, 1)


def trim(task_vectors: torch.Tensor, lowest: torch.Tensor, highest=None) -> torch.Tensor:
    """Task vectors (K, n) with 0 where |tau_i| is below lowest (K,), or above highest (K,).

    TIES keeps the largest changes (arXiv:2306.01708, section 4, step 1), Model Breadcrumbs those between two
    ranks of every tensor (arXiv:2312.06795, section 3).
    """
    sizes = task_vectors.abs()  # (K, n)
    kept = sizes.clone().ge_(lowest[:, None]).mul_(task_vectors)
    return kept if highest is None else kept.mul_(sizes.le_(highest[:, None]))


def magnitude_counts(task_vectors: torch.Tensor, upper: list[int] | None = None) -> torch.Tensor:
    """How often the upper 16 bits of |tau| have each value, task vectors (K, n) float32 -> (K, 65536).

    With `upper` (K of them): of the numbers with these upper bits, the lower 15, -> (K, 32768). Bit patterns
    of floats that are not negative sort as the floats do. Counts of tiles add up.
    """
    bits, counts = task_vectors.abs().view(torch.int32), []
    for i, row in enumerate(bits):
        if upper is None:
            counts.append(torch.bincount(row >> 15, minlength=2**16))
        else:  # 0 and 32769 hold what has other upper bits
            lower = (row - (upper[i] << 15)).clamp_(-1, 2**15) + 1
            counts.append(torch.bincount(lower, minlength=2**15 + 2)[1:-1])
    return torch.stack(counts)


def kth_largest(count: Callable[[list[int] | None], torch.Tensor], ks: list[int]) -> torch.Tensor:
    """The k-th largest |tau| of each task vector, (K,), exactly: a radix selection in two passes.

    `count(upper)` is the sum of `magnitude_counts` over all tiles, which are never in memory together. For
    k = 0 it is NaN, which no number reaches.
    """

    def digit(counts: torch.Tensor, k: int) -> tuple[int, int]:
        from_top = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, k))
        return len(counts) - 1 - place, k - (int(from_top[place - 1]) if place else 0)

    upper, left = zip(*(digit(counts, k) for counts, k in zip(count(None), ks, strict=True)), strict=True)
    lower = [digit(counts, k)[0] for counts, k in zip(count(list(upper)), left, strict=True)]
    bits = [high << 15 | low for high, low in zip(upper, lower, strict=True)]
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def breadcrumb_ranks(n: int, density: float, outliers: float, *, compat: str = "paper") -> tuple[int, int]:
    """First and last rank, from the largest |tau| = 1 of n, that breadcrumbs keeps (arXiv:2312.06795).

    The share `outliers` above and the rest of 1 - density below are dropped. Where both do not fit, paper
    keeps fewer, mergekit drops fewer of the largest. Of a small tensor paper keeps one, mergekit may keep
    none: (1, 0).
    """
    top, kept = int(outliers * n), int(density * n)
    if compat == "mergekit":
        top = min(top, n - kept)
        return (top + 1, top + kept) if kept else (1, 0)
    return min(top, n - 1) + 1, min(top + max(1, kept), n)


def ties(task_vectors, weights: torch.Tensor, *, compat: str = "paper", mean=True) -> torch.Tensor:
    """Elect a sign and average what agrees with it: trimmed task vectors (K, ...), weights (K,) -> (...).

    sign = sgn(sum_i w_i tau_i), then sum_i w_i tau_i / sum_i |w_i| over the non-zero terms of that sign:
    their mean (arXiv:2306.01708, section 4, steps 2 and 3, has no weights). Where the sum is 0 nothing is
    elected, and for mergekit plus; mergekit divides by sum_i w_i. `mean` False (its dare_ties) only sums.
    """
    weighted = task_vectors * weights.view(-1, *[1] * (task_vectors.ndim - 1))  # (K, ...)
    sign = weighted.sum(0)  # (...)
    sign = sign.ge_(0).mul_(2).sub_(1) if compat == "mergekit" else sign.sign_()
    agrees = (weighted * sign).gt_(0)  # (K, ...)
    total = (weighted * agrees).sum(0)  # (...)
    if not mean:
        return total
    divisor = torch.tensordot(weights if compat == "mergekit" else weights.abs(), agrees, 1)  # (...)
    return total / divisor.add_(divisor.clone().eq_(0))


def dare(task_vectors: torch.Tensor, draws: torch.Tensor, densities: torch.Tensor) -> torch.Tensor:
    """Keep each change with probability `densities` (K,), 1 - p in the paper (arXiv:2311.03099).

    `draws` (K, n) are uniform in [0, 1). Not rescaled yet: the paper divides by the density, which leaves the
    expectation as it was; mergekit by the share of the L1 norm that is left of the tensor.
    """
    return draws.lt(densities[:, None]).float().mul_(task_vectors)


def model_stock_ratio(inner: torch.Tensor, *, compat: str = "paper") -> float:
    """t = K cos a / (1 + (K - 1) cos a), cos a the mean cosine of task vectors (arXiv:2403.19522).

    `inner` (K + 1, K + 1) is the `gram` of a whole tensor. A task vector of zeros has cosine 0. Task vectors
    that point away from one another (cos a < 0) give 0, the base: the formula, made for acute angles, would
    go beyond it, without end. mergekit follows it there, and takes products of norms below 1e-6 for 1e-6.
    """
    vectors = inner[1:, 1:]
    norms = vectors.diagonal().clamp(min=0).sqrt()
    pairs = combinations(range(len(vectors)), 2)
    floor = 1e-6 if compat == "mergekit" else 1e-300
    cosines = [(vectors[i, j] / max(norms[i] * norms[j], floor)).item() for i, j in pairs]
    cosine = max(-1.0, min(1.0, sum(cosines) / len(cosines)))
    divisor = 1 + (len(vectors) - 1) * cosine
    if abs(divisor) < 1e-6 or (cosine < 0 and compat == "paper"):
        return 0.0
    return len(vectors) * cosine / divisor


def model_stock(base: torch.Tensor, tensors: torch.Tensor, ratio: float) -> torch.Tensor:
    """t mean_i theta_i + (1 - t) theta_0 of tensors (K, ...) (arXiv:2403.19522)."""
    return torch.lerp(base, tensors.mean(0), ratio)


def merge_tensors(method, base, tensors, settings: Settings, measured: dict, draws=None, compat="paper"):
    """One tile by one of the methods: base (n,) and tensors (K, n) -> (n,), all float32.

    `measured` is what was measured on whole tensors: `coefficients` (slerp), `ratio` (model_stock), `lowest`
    and `highest` (ties, breadcrumbs), `rescale` (K,) (dare; 1 / density without it). `draws`: see `dare`.
    """
    weights = torch.tensor(settings.weights)
    if method in ("linear", "soup", "lora"):
        return linear(tensors, weights)
    if method == "wise_ft":
        return wise_ft(base, tensors[0], settings.t)
    if method == "slerp":
        return slerp(base, tensors[0], measured["coefficients"])
    if method == "model_stock":
        return model_stock(base, tensors, measured["ratio"])
    task_vectors = tensors - base
    if method.startswith("dare"):
        densities = torch.tensor(settings.densities)
        rescale = measured.get("rescale", 1 / densities)
        task_vectors = dare(task_vectors, draws, densities).mul_(rescale[:, None])
    elif method in ("ties", "breadcrumbs"):
        task_vectors = trim(task_vectors, measured["lowest"], measured.get("highest"))
    if method.endswith("ties"):
        mean = method == "ties" or compat == "paper"
        return base + settings.lambda_ * ties(task_vectors, weights, compat=compat, mean=mean)
    return task_arithmetic(base, task_vectors, weights, settings.lambda_)


# ------------------------------------------------------------------------------------------------------------
# Merging
# ------------------------------------------------------------------------------------------------------------
SHARDS = "model{suffix}.safetensors"  # the names that transformers looks for
TILE = 2**18  # numbers of a tensor that are merged at a time: they stay in the processor's cache


def main(args: Args) -> dict:
    """Merge as `args` says and return a summary."""
    started = time.perf_counter()
    with run_folder(args) as folder:
        # 1. Check
        base = Checkpoint(args.base) if args.base else None
        is_lora = [(Path(name) / "adapter_config.json").exists() for name in args.models]
        models = [Adapter(name) if lora else Checkpoint(name) for name, lora in zip(args.models, is_lora)]
        lead = check_models(base, models, args)
        rules = [read_rule(text, args) for text in args.rule]
        if args.eval_command:
            models = choose_ingredients(folder, models, lead, args)
        grams = merge_models(folder / "model.partial", base, models, lead, rules, args)
        (folder / "model.partial").rename(folder / "model")

        # 5. Report
        summary = {"models": len(models), "tensors": len(lead.shapes), "parameters": lead.num_parameters}
        summary |= write_report(folder, grams, base, models) if grams else {}
    summary["seconds"] = time.perf_counter() - started
    say(f"merged model saved to {folder} in {summary['seconds']:.1f} s")
    return summary


class Work(NamedTuple):
    """One tensor of the result, and where its values come from."""

    name: str
    sources: list[tuple[Callable, torch.Tensor]]  # of the base and of each model, see `sources_of`
    with_base: bool  # whether there is one
    settings: Settings
    dtype: torch.dtype  # of the result

    @property
    def size(self) -> int:
        return len(self.sources[0][1])

    @property
    def tiles(self) -> list[slice]:
        return [slice(start, min(start + TILE, self.size)) for start in range(0, self.size, TILE)]

    def load(self, tile: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """A tile as float32: base (n,), or the first model where there is none, and models (K, n)."""
        rows = torch.empty(len(self.sources), tile.stop - tile.start)
        for row, (values, filler) in zip(rows, self.sources):
            own = values(tile)
            row[: len(own)].copy_(own)
            row[len(own) :].copy_(filler[tile.start + len(own) : tile.stop])
        return rows[0], rows[int(self.with_base) :]

    def changes(self, tile: slice) -> torch.Tensor:
        """A tile of the task vectors, (K, n)."""
        base, tensors = self.load(tile)
        return tensors - base

    def draws(self, tile: slice, seed: int) -> torch.Tensor:
        """Uniform numbers for a tile, (K, n)."""
        models = range(len(self.settings.weights))
        return torch.stack([uniform(seed, i, self.name, tile) for i in models])


def merge_models(folder: Path, base, models: list, lead, rules: list, args: Args) -> dict:
    """Write the merged model into a new folder -> the `gram` of each tensor, with --report and a base."""
    settings = settings_of_tensors(lead, rules, args, len(models))
    read, works = [base] * bool(base) + models, {}
    for name in lead.shapes:
        dtype = DTYPES[read[0].dtypes[name]]
        if args.out_dtype != "auto" and dtype.is_floating_point:
            dtype = getattr(torch, args.out_dtype)
        works[name] = Work(name, sources_of(name, read, lead), bool(base), settings[name], dtype)
    sizes = {name: work.size * work.dtype.itemsize for name, work in works.items()}
    plan = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern=SHARDS, max_shard_size=args.max_shard_size
    )
    if sum(sizes.values()) > shutil.disk_usage(folder.parent).free:
        fail(f"{folder.parent}: no room for the {sum(sizes.values()) / 1e9:.1f} GB of the merged model")
    say(f"{args.method} of {', '.join(m.name for m in read)}: {lead.num_parameters:,} parameters")
    folder.mkdir()
    grams, measured, written = {}, {}, None
    with worker_threads() as pool, ThreadPoolExecutor(1) as writer:
        # 2. Measure: here what is needed of all tensors together, in `merge_tensor` what is needed of each
        if args.method == "ties" and args.compat == "paper":
            floats = [work for work in works.values() if work.dtype.is_floating_point]
            measured = {"lowest": largest_changes(pool, floats)}

        # 3. Merge
        bar = tqdm(total=lead.num_parameters, desc="merging", unit="", unit_scale=True, disable=None)
        for file, names in plan.filename_to_tensors.items():
            tensors = {}
            for name in names:
                merged, grams[name] = merge_tensor(pool, works[name], measured, args)
                tensors[name] = merged.view(lead.shapes[name])
                bar.update(works[name].size)

            # 4. Write
            if written:
                written.result()  # no more than two shards are in memory
            written = writer.submit(write_shard, folder / file, tensors)
        written.result()
        bar.close()
    write_other_files(folder, plan, lead, works)
    return {name: inner for name, inner in grams.items() if inner is not None}


def merge_tensor(pool, work: Work, measured: dict, args: Args) -> tuple:
    """A tensor of the result, (n,), in its type, and for a report the `gram` of base and task vectors."""
    if not work.dtype.is_floating_point or not work.size:  # counters and the like: equal everywhere
        return work.sources[0][0](slice(None)).to(work.dtype, copy=True), None
    merged, limit = torch.empty(work.size, dtype=work.dtype), torch.finfo(work.dtype).max
    measured, with_report = measured or measure(pool, work, args), args.report and work.with_base

    def merge_tile(tile: slice) -> tuple:
        base, tensors = work.load(tile)
        draws = work.draws(tile, args.seed) if args.method.startswith("dare") else None
        result = merge_tensors(args.method, base, tensors, work.settings, measured, draws, args.compat)
        merged[tile] = result
        lowest, highest = result.aminmax()  # NaN if there is one
        finite = bool(-limit <= lowest and highest <= limit)
        return finite, gram(base, tensors - base) if with_report else None

    finite, grams = zip(*pool.map(merge_tile, work.tiles))
    if not all(finite):
        fail(f"{work.name}: the result is not finite (NaN in a model, or beyond {work.dtype})")
    return merged, sum(grams) if with_report else None


def measure(pool, work: Work, args: Args) -> dict:
    """What the method must know of the whole tensor before its first tile is merged."""

    def inner_products(work: Work, tile: slice) -> torch.Tensor:
        base, tensors = work.load(tile)
        return gram(base, tensors - base)

    def l1_norms(work: Work, tile: slice) -> torch.Tensor:
        changes = work.changes(tile)
        kept = dare(changes, work.draws(tile, args.seed), torch.tensor(settings.densities))
        return torch.stack([changes.abs().sum(-1), kept.abs().sum(-1)]).double()

    settings, compat = work.settings, args.compat
    if args.method == "slerp":
        inner = total(pool, inner_products, [work])
        return {"coefficients": slerp_coefficients(inner, settings.t, compat=compat)}
    if args.method == "model_stock":
        return {"ratio": model_stock_ratio(total(pool, inner_products, [work]), compat=compat)}
    if args.method == "ties":
        return {"lowest": largest_changes(pool, [work])}
    if args.method == "breadcrumbs":
        outliers, n = settings.outliers, work.size
        ranks = [breadcrumb_ranks(n, density, outliers, compat=compat) for density in settings.densities]
        highest, lowest = (largest_changes(pool, [work], list(ks)) for ks in zip(*ranks))
        return {"lowest": lowest, "highest": highest}
    if args.method.startswith("dare") and compat == "mergekit":
        before, after = total(pool, l1_norms, [work])  # (K,) each
        return {"rescale": torch.where((before < 1e-7) | (after < 1e-7), 1.0, before / after).float()}
    return {}


def largest_changes(pool, works: list[Work], ks: list[int] | None = None) -> torch.Tensor:
    """The k-th largest change of each model over all tensors of `works`, (K,); by default by the density."""
    if ks is None:
        n = sum(work.size for work in works)
        ks = [max(1, int(density * n)) for density in works[0].settings.densities]

    def counts(upper: list[int] | None) -> torch.Tensor:
        return total(pool, lambda work, tile: magnitude_counts(work.changes(tile), upper), works)

    return kth_largest(counts, ks)


def total(pool, function: Callable[[Work, slice], torch.Tensor], works: list[Work]) -> torch.Tensor:
    """The sum of a function over all tiles; the results of few of them are in memory at a time."""
    result = 0
    for work in tqdm(works, "measuring", unit="tensor", disable=None if len(works) > 1 else True):
        for start in range(0, len(work.tiles), 64):
            tiles = work.tiles[start : start + 64]
            result = result + sum(pool.map(function, [work] * len(tiles), tiles))
    return result


def choose_ingredients(folder: Path, models: list, lead, args: Args) -> list:
    """The models of the greedy soup: scored one by one, then in soups that are thrown away."""

    def score_of(indices: list[int]) -> float:
        chosen = [models[i] for i in indices]
        merge_models(folder / "candidate", None, chosen, lead, [], args)
        score = score_model(folder / "candidate", " + ".join(model.name for model in chosen), args)
        shutil.rmtree(folder / "candidate")
        return score

    kept = greedy_soup([score_model(model.folder, model.name, args) for model in models], score_of)
    say(f"the greedy soup has {len(kept)} of {len(models)} models")
    return [models[i] for i in kept]


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES = FLOATS | INTEGERS | {"BOOL": torch.bool}
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
HEAD = re.compile(r"^(lm_head|embed_out|output)\.(weight|bias)$")
OF_TOKENS = re.compile(f"{EMBEDDING.pattern}|{HEAD.pattern}")  # has a row for each token
LAYER = re.compile(r"^(.*?\.)(\d+)\.")
# What the numbers of a model mean depends on these.
CONFIG_KEYS_COMPARED = ("rope_theta", "rope_parameters", "num_attention_heads", "head_dim", "hidden_act")
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.onnx")  # not read
NOT_COPIED = (*OTHER_WEIGHTS, "*.safetensors", "*.index.json", "adapter_config.json", "README.md", ".git*")


def say(message: str):
    """Print a line above the progress bar, from the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(message)


def fail(message: str):
    """End the run over a user's mistake: one line and exit code 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def run_folder(args: Args):
    """The folder of the run, a new one, which a run that fails takes away again."""
    folder = Path(args.output_dir or f"runs/merge_{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        fail(f"--output-dir {folder}: {error.strerror}")
    try:
        (folder / "args.json").write_text(json.dumps({"script": "merge.py"} | asdict(args), indent=2))
        shutil.copy(__file__, folder)
        yield folder
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt):
            fail("interrupted")
        if isinstance(error, OSError | SafetensorError):  # a full disk, a file that cannot be read
            fail(f"{getattr(error, 'filename', None) or folder}: {getattr(error, 'strerror', None) or error}")
        raise


def read(source: Path | str, function: Callable):
    """function(source); what it cannot read ends the run."""
    try:
        return function(source)
    except Exception as error:  # libraries have all kinds of them
        fail(f"{source} cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


class Checkpoint:
    """A model folder: its config, and its tensors as views of the files, which the page cache holds."""

    def __init__(self, name: str):
        self.name, self.folder = name, Path(name)
        if not self.folder.is_dir():
            from huggingface_hub import snapshot_download  # slow

            self.folder = Path(read(name, partial(snapshot_download, ignore_patterns=list(OTHER_WEIGHTS))))
        self.rows = None  # how many of those for tokens count, if not all: see check_models
        self.config = read(self.folder / "config.json", lambda path: {**json.loads(path.read_bytes())})
        index, tokenizer = self.folder / "model.safetensors.index.json", self.folder / "tokenizer.json"
        listed, self.tokens = {}, {}  # the file of each tensor; the id of each token
        if index.exists():
            listed = read(index, lambda path: {**json.loads(path.read_bytes())["weight_map"]})
        if tokenizer.exists():
            self.tokens = read(tokenizer, lambda path: Tokenizer.from_file(str(path)).get_vocab())
        self.num_tokens = max(self.tokens.values(), default=-1) + 1
        self.handles, self.shapes, self.dtypes = {}, {}, {}  # by tensor, in the order of the files
        for file in sorted(set(listed.values())) or ["model.safetensors"]:
            handle = read(self.folder / file, lambda path: safe_open(path, framework="pt"))
            for key in handle.offset_keys():
                view = handle.get_slice(key)
                self.handles[key], self.shapes[key] = handle, view.get_shape()
                self.dtypes[key] = view.get_dtype()
        if listed and listed.keys() != self.shapes.keys():
            fail(f"{index} and its files differ in {some(listed.keys() ^ self.shapes.keys())}")
        heads = [key for key in self.shapes if HEAD.match(key) and key.endswith("weight")]
        of_text = self.config.get("text_config") or self.config
        tied = of_text.get("tie_word_embeddings", self.config.get("tie_word_embeddings", not heads))
        self.kind = (self.config.get("model_type"), "tied" if tied else "untied")
        embedding = next((key for key in self.shapes if EMBEDDING.search(key)), None)
        for head in heads if tied and embedding else ():  # stored twice: the head is dropped
            if not torch.equal(self[head], self[embedding]):
                fail(f"{name}: {head} is not {embedding}, though the config ties them")
            del self.shapes[head], self.dtypes[head], self.handles[head]

    def __getitem__(self, name: str) -> torch.Tensor:
        """All numbers of a tensor, (n,), not read yet."""
        return self.handles[name].get_tensor(name).view(-1)

    def values(self, name: str) -> Callable:
        """Reads a tile of a tensor."""
        return self[name].__getitem__

    @property
    def num_parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))


class Adapter(Checkpoint):
    """A LoRA, read as the model that it makes of its base."""

    def __init__(self, name: str):
        self.lora = read(Path(name), loading.SavedLora)
        base = self.lora.base
        super().__init__(base if Path(base).exists() or not (HERE / base).exists() else str(HERE / base))
        self.name, self.folder = name, Path(name)
        if absent := self.lora.names - self.shapes.keys():
            fail(f"{name}: {base} has no {some(absent)}")

    def values(self, name: str) -> Callable:
        if name not in self.lora.names:
            return super().values(name)
        flat, width = self[name], self.shapes[name][-1]

        def of_tile(tile: slice) -> torch.Tensor:
            start, stop, _ = tile.indices(len(flat))
            first = start // width  # of the rows that the tile touches
            added = self.lora.addition(name, slice(first, -(-stop // width))).view(-1)
            return flat[tile].float() + added[start - first * width :][: stop - start]

        return of_tile


def some(names: Iterable) -> str:
    """The first five of some names, and how many there are."""
    names = sorted(map(str, names))
    return ", ".join(names[:5]) + f", ... ({len(names)})" * (len(names) > 5)


def check_models(base, models: list, args: Args):
    """Compare all models, and end with one line of all that differs -> the model that leads.

    Its other files are kept, and its rows fill up those that another lacks. It is the first, or with
    --pad-vocab the one with most tokens. Rows of others beyond their own tokenizer do not count.
    """
    every, problems, lead = [*models, *([base] if base else [])], [], models[0]
    if args.pad_vocab:
        lead = max(every, key=lambda model: (model.num_tokens, model.num_parameters))
    for other in [model for model in every if model is not lead]:
        pair = f"{lead.name} and {other.name}"
        if alone := lead.shapes.keys() ^ other.shapes.keys():
            problems.append(f"{pair} differ in the tensors {some(alone)}")
        for name, shape in lead.shapes.items():
            found = other.shapes.get(name, shape)
            of_rows = OF_TOKENS.search(name) and shape[1:] == found[1:]
            if shape != found and not (args.pad_vocab and of_rows and (shape[0] > found[0] or other.tokens)):
                hint = " (--pad-vocab fills them up)" if of_rows and not args.pad_vocab else ""
                problems.append(f"{name} is {shape} in {lead.name}, {found} in {other.name}{hint}")
        if lead.kind != other.kind:
            problems.append(f"{pair} differ in model_type or tie_word_embeddings: {lead.kind}, {other.kind}")
        if lead.tokens and other.tokens:  # a longer vocabulary is a difference, if it is not to be padded
            shared = min(lead.num_tokens, other.num_tokens) if args.pad_vocab else math.inf
            if unequal := {i for _, i in lead.tokens.items() ^ other.tokens.items() if i < shared}:
                problems.append(f"{pair} differ in the tokens with the ids {some(unequal)}")
            other.rows = other.num_tokens if other.num_tokens < lead.num_tokens else None
        else:
            say(f"note: without a tokenizer.json in both, tokens of {pair} are not compared")
        if changed := [x for x in CONFIG_KEYS_COMPARED if lead.config.get(x) != other.config.get(x)]:
            say(f"note: the configs of {pair} differ in {some(changed)}; that of {lead.name} is kept")
    unknown = {dtype for model in every for dtype in model.dtypes.values()} - DTYPES.keys()
    problems += [f"{dtype} is no type that can be merged" for dtype in sorted(unknown)]
    for name in lead.shapes if not problems else ():
        types = {model.dtypes[name] for model in every}
        if types <= FLOATS.keys():
            continue
        if len(types) > 1 or not all(torch.equal(lead[name], model[name]) for model in every):
            problems.append(f"{name} holds whole numbers that differ, in value or in type")
    if problems:
        fail("the models do not fit: " + "; ".join(problems[:8]) + ("; ..." if len(problems) > 8 else ""))
    return lead


class Rule(NamedTuple):
    """Values of a parameter for the tensors whose name, or its end behind a dot, matches."""

    pattern: str
    name: str
    model: int | None  # of which model; None: of all
    values: tuple[float, ...]


def read_rule(text: str, args: Args) -> Rule:
    """`layers.*:weight.2=0,1`: pattern, a parameter of the method and the model that it is of, values."""
    if not (match := re.fullmatch(r"(.+):(\w+)(?:\.(\d+))?=(.+)", text)):
        fail(f"--rule {text!r} is not PATTERN:NAME=V[,V...]")
    pattern, name, number, values = match.groups()
    if args.method not in METHODS_WITH.get(name, ()):
        fail(f"--rule {text!r}: --method {args.method} has no {name}")
    if number and (name not in ("weight", "density") or not 1 <= int(number) <= len(args.models)):
        fail(f"--rule {text!r}: only weight.i and density.i exist, with i from 1 to {len(args.models)}")
    kind = TypeAdapter({"density": Kept, "outliers": Dropped}.get(name, FiniteFloat))
    try:
        numbers = tuple(map(kind.validate_python, values.split(",")))
    except pydantic.ValidationError as error:
        fail(f"--rule {text!r}: {error.errors()[0]['msg']}")
    return Rule(pattern, name, int(number) - 1 if number else None, numbers)


def settings_of_tensors(model, rules: list[Rule], args: Args, num_models: int) -> dict[str, Settings]:
    """The parameters of every tensor; of several rules that match the last one counts.

    Several values are points of a line over the layers. Outside of the layers the embeddings have the first
    value and what comes behind the last layer has the last (mergekit: all of these have the first).
    """
    last, result, unused = {}, {}, set(rules)
    start = {"weight": args.weights or (1.0,) * num_models, "density": (args.density,) * num_models}
    start |= {"lambda": (args.lambda_,), "t": (args.t,), "outliers": (args.outliers,)}
    for match in filter(None, map(LAYER.match, model.shapes)):  # the last layer of each stack
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    for name in model.shapes:
        match = LAYER.match(name)
        depth = float(not EMBEDDING.search(name) and args.compat == "paper")
        if match:
            depth = int(match[2]) / last[match[1]] if last[match[1]] else 1.0
        chosen = {key: list(numbers) for key, numbers in start.items()}
        for rule in [rule for rule in rules if fnmatchcase(f".{name}", f"*.{rule.pattern}")]:
            unused.discard(rule)
            points, numbers = range(len(rule.values)), chosen[rule.name]
            for i in range(len(numbers)) if rule.model is None else [rule.model]:
                numbers[i] = float(np.interp(depth * points[-1], points, rule.values))
        weights, densities, (lambda_,), (t,), (outliers,) = map(tuple, chosen.values())
        if args.method == "linear" and abs(sum(weights)) <= 1e-6 * sum(map(abs, weights)):
            fail(f"{name}: the weights add up to 0, and linear divides by their sum")
        result[name] = Settings(weights, densities, lambda_, t, outliers)
    if unused:
        fail(f"--rule: no tensor matches {some(rule.pattern for rule in unused)}")
    if args.method == "ties" and args.compat == "paper" and len({s.densities for s in result.values()}) > 1:
        fail("ties trims whole task vectors: a density of single tensors needs --compat mergekit")
    return result


def sources_of(name: str, read: list, lead) -> list[tuple[Callable, torch.Tensor]]:
    """(reader, filler) of a tensor in each model: the one that leads fills up missing rows for tokens."""
    width = math.prod(lead.shapes[name][1:])
    short = [model.rows * width if model.rows and OF_TOKENS.search(name) else 0 for model in read]
    values = [model[name][:n].__getitem__ if n else model.values(name) for model, n in zip(read, short)]
    return [(reader, lead[name]) for reader in values]


def uniform(seed: int, model: int, name: str, tile: slice) -> torch.Tensor:
    """Draws in [0, 1), (n,), that depend on these and their place alone, not on tiles, shards and threads."""
    key = hashlib.blake2b(f"{seed} {model} {name}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(key, "little"))
    generator.advance(tile.start // 8)  # the counter moves on once in 8 draws
    draws = np.random.Generator(generator).random(tile.stop - tile.start, dtype=np.float32)
    return torch.from_numpy(draws)


@contextmanager
def worker_threads():
    """As many threads as torch has, each for a tile of its own."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc gives tiles back to the system and pages them in anew: keep them
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer from outside the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(count) as pool:
        yield pool
    torch.set_num_threads(count)


def write_shard(path: Path, tensors: dict[str, torch.Tensor]):
    """Write a file of weights, free its tensors, and wait until it is on the disk."""
    save_file(tensors, path, {"format": "pt"})
    tensors.clear()
    shutil.copymode(path.parent.parent / "args.json", path)  # save_file lets nobody else read its files
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_other_files(folder: Path, plan, lead, works: dict[str, Work]):
    """The index of several files of weights, and all of the model that leads that is no weights."""
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for path in lead.folder.iterdir():
        if path.is_file() and not any(fnmatchcase(path.name, pattern) for pattern in NOT_COPIED):
            shutil.copyfile(path, folder / path.name)
    dtypes = [work.dtype for work in works.values()]
    stored = str(max(dtypes, key=dtypes.count)).removeprefix("torch.")
    config = {k: stored if k in ("dtype", "torch_dtype") else v for k, v in lead.config.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def score_model(folder: Path, label: str, args: Args) -> float:
    """The number that --eval-command prints last of a model."""
    command = args.eval_command.replace("{model}", shlex.quote(str(folder)))
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    try:
        score = math.nan if done.returncode else float(done.stdout.split()[-1])
    except (IndexError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        printed = " ".join((done.stdout + done.stderr).split())[-200:]
        fail(f"--eval-command should print a finite number last (exit code {done.returncode}): {printed}")
    say(f"  {score:.4g}: {label}")
    return score


def norms_and_cosines(inner: torch.Tensor) -> dict:
    """From a `gram`: norms of the task vectors, also over that of the base, and cosines among them."""
    norms = inner.diagonal().clamp(min=0).sqrt()  # (K + 1,)
    cosines = inner / (norms[:, None] * norms).clamp(min=1e-300)  # (K + 1, K + 1)
    return {
        "relative_norm": {str(i): x.item() for i, x in enumerate(norms / norms[0].clamp(min=1e-300)) if i},
        "cosine": {f"{i}-{j}": cosines[i, j].item() for i, j in combinations(range(1, len(norms)), 2)},
    }


def write_report(folder: Path, grams: dict[str, torch.Tensor], base, models: list) -> dict:
    """Norms and cosines of the task vectors, by kind of tensor over all layers, as table and JSON."""
    kinds = {"all": sum(grams.values())}
    for name, inner in grams.items():
        kind = re.sub(r"\.\d+(?=\.)", ".*", name)  # without the number of the layer
        kinds[kind] = kinds.get(kind, 0) + inner
    kinds = {kind: norms_and_cosines(inner) for kind, inner in kinds.items()}
    report = {"base": base.name, "models": [model.name for model in models], "kinds": kinds}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    say("norms of the task vectors over that of the base, and their cosines:")
    for kind, figures in kinds.items():
        cells = [f"{i} {norm:.4f}" for i, norm in figures["relative_norm"].items()]
        cells += [f"{pair} {cosine:+.3f}" for pair, cosine in figures["cosine"].items()]
        say(f"{kind:{max(map(len, kinds))}}  {'  '.join(cells[:7])}")  # of many models the first
    return {f"{key}/{i}": x for key in ("relative_norm", "cosine") for i, x in kinds["all"][key].items()}


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
