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

Nothing is loaded as a model. The loop goes over tensors, in the order of the output files:

    1. Check     names, shapes, dtypes and vocabularies of all models, before anything is written
    2. Measure   what a method must know of whole tensors: thresholds, angles, norms
    3. Merge     a tile of every model in float32, one merged tile, one rounding
    4. Write     a thread of its own writes it where it belongs in its shard, while the next one is computed
    5. Report    norms and angles of the task vectors, as table, JSON and heat map

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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from safetensors import SafetensorError, safe_open
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    method: Literal[
        "linear",
        "wise_ft",
        "task_arithmetic",
        "slerp",
        "ties",
        "dare_linear",
        "dare_ties",
        "model_stock",
        "breadcrumbs",
        "soup",
    ] = "task_arithmetic"
    """How several models become one. Start with task_arithmetic: the simplest is rarely beaten."""
    compat: Literal["paper", "mergekit"] = "paper"
    """Where the two differ (trimming, rescaling, ties of signs): the paper's formula, or mergekit's."""

    # Models
    base: str | None = None
    """Model the others were tuned from: hub id or folder. linear and soup report on it and take its type."""
    models: tuple[str, ...] = ()
    """Models to merge: hub ids or folders; by default tiny/sft, and tiny/base as --base."""
    pad_vocab: bool = False
    """Give models with fewer tokens the missing rows of the one with most, if their ids agree otherwise."""

    # Parameters of the methods
    weights: tuple[float, ...] = ()
    """Weight of each model; by default 1 each. linear divides by their sum."""
    lambda_: Annotated[float | None, tyro.conf.arg(name="lambda")] = None
    """Scale of the merged task vector; by default 1, or 0.5 in the run without --models."""
    t: float | None = None
    """Way from the base (0) to the model (1), for wise_ft and slerp; by default 0.5."""
    density: float | None = None
    """Share of each task vector that is kept; by default 0.2 (ties, its paper), 0.1 (dare, breadcrumbs)."""
    outliers: float | None = None
    """Share of each tensor's changes, the largest, that breadcrumbs drops; by default 0.01."""
    soup: Literal["uniform", "greedy"] = "uniform"
    """Average all, or add a model, best first, only if --eval-command then scores at least as high."""
    rule: tuple[str, ...] = ()
    """PATTERN:NAME=V[,V...] for tensors that match, as in 'layers.*.mlp.*:t=0.3'; several V: over layers."""
    seed: int = 1
    """Seed of the data order, the noise and the sampling."""

    # Evaluation
    eval_command: str | None = None
    """Command that scores a model: {model} is its folder; the last line it prints is a JSON object."""
    eval_metrics: tuple[str, ...] = ()
    """Which of these numbers count: two for the plot, one for the soup; `name:min` where less is better."""
    sweep: str | None = None
    """NAME=FIRST:LAST:STEP: merge and score at every value of a parameter, e.g. t=0:1:0.1; keeps no model."""

    # Output
    output_dir: str | None = None
    """Folder of the run; by default runs/<script>_<seed>_<time>."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type that the result is rounded to; auto takes that of the base, or else of the first model."""
    max_shard_size: str = "5GB"
    """Largest weights file, in MB or GB of 10^6 or 10^9 bytes; a larger tensor gets its own file."""
    report: bool = True
    """Measure norms and angles of the task vectors on the way."""

    def __post_init__(self):
        if self.base and not self.models:
            fail("--base without --models: there is nothing to merge with it")
        if not self.models:
            self.base, self.models = "tiny/base", ("tiny/sft",)
            if "lambda" in PARAMETERS_OF[self.method] and self.lambda_ is None:
                self.lambda_ = 0.5  # half-way
        if self.method in ("wise_ft", "slerp") and self.base is None and len(self.models) == 2:
            self.base, self.models = self.models[0], self.models[1:]
        if self.method not in ("linear", "soup") and self.base is None:
            fail(f"--method {self.method} needs --base, the model that --models were fine-tuned from")
        if self.method in ("wise_ft", "slerp") and len(self.models) != 1:
            fail(f"--method {self.method} takes --base and one model, not {len(self.models)}")
        if self.method == "model_stock" and len(self.models) < 2:
            fail("--method model_stock takes two models or more: it goes by the angle between them")
        if self.weights and "weight" not in PARAMETERS_OF[self.method]:
            fail(f"--method {self.method} has no --weights")
        if self.weights and len(self.weights) != len(self.models):
            fail(f"--weights has {len(self.weights)} numbers for {len(self.models)} models")
        given = {"lambda": self.lambda_, "t": self.t, "density": self.density, "outliers": self.outliers}
        for name in given:
            if given[name] is not None and name not in PARAMETERS_OF[self.method]:
                fail(f"--method {self.method} has no --{name}")
        if self.soup == "greedy" and (self.method != "soup" or not self.eval_command):
            fail("--soup greedy needs --method soup and an --eval-command that scores a model")
        if self.sweep and not self.eval_command:
            fail("--sweep needs an --eval-command that scores each merged model")
        if self.eval_command and not (self.sweep or self.soup == "greedy"):
            fail("--eval-command is read by --sweep and by --soup greedy: neither is given")
        if self.eval_command and "{model}" not in self.eval_command:
            fail("--eval-command must say with {model} where the folder of the model goes")
        if self.eval_metrics and not self.eval_command:
            fail("--eval-metrics chooses from what an --eval-command prints, and there is none")
        names = [name.removesuffix(":min") for name in self.eval_metrics]
        if len(set(names)) < len(names) or any(":" in name for name in names):
            fail("--eval-metrics takes names, each once, with nothing behind a colon but min")
        read_size(self.max_shard_size)
        try:
            program = shlex.split(self.eval_command)[0] if self.eval_command else sys.executable
        except ValueError as error:
            fail(f"--eval-command {self.eval_command!r} is no command line: {error}")
        if not shutil.which(program):
            fail(f"--eval-command: there is no program {program}")


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


def task_arithmetic(
    base: torch.Tensor, task_vectors: torch.Tensor, weights: torch.Tensor, lambda_: float
) -> torch.Tensor:
    """theta_0 + lambda sum_i w_i tau_i, task vectors (K, ...), weights (K,) (arXiv:2212.04089, section 2)."""
    return base + torch.tensordot(lambda_ * weights, task_vectors, 1)


def trim(
    task_vectors: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor | None = None
) -> torch.Tensor:
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


def ties(
    task_vectors: torch.Tensor, weights: torch.Tensor, *, compat: str = "paper", mean=True
) -> torch.Tensor:
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


def merge_tensors(
    method: str,
    base: torch.Tensor,
    tensors: torch.Tensor,
    settings: Settings,
    measured: dict,
    draws: torch.Tensor | None = None,
    *,
    compat: str = "paper",
) -> torch.Tensor:
    """One tile by one of the methods: base (n,) and tensors (K, n) -> (n,), all float32.

    `measured` is what was measured on whole tensors: `coefficients` (slerp), `ratio` (model_stock), `lowest`
    and `highest` (ties, breadcrumbs), `rescale` (K,) (dare; 1 / density without it). `draws`: see `dare`.
    """
    weights = torch.tensor(settings.weights)
    if method in ("linear", "soup"):
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
TILE = 2**18  # numbers of a tensor that are merged at a time: they stay in the processor's cache
PARAMETERS_OF = {  # which parameters a method has
    "linear": {"weight"},
    "wise_ft": {"t"},
    "task_arithmetic": {"weight", "lambda"},
    "slerp": {"t"},
    "ties": {"weight", "lambda", "density"},
    "dare_linear": {"weight", "lambda", "density"},
    "dare_ties": {"weight", "lambda", "density"},
    "model_stock": set(),
    "breadcrumbs": {"weight", "lambda", "density", "outliers"},
    "soup": set(),
}


def main(args: Args) -> dict:
    """Merge, or sweep, as `args` says and return a summary of report.json or sweep.json."""
    started = time.perf_counter()
    output_dir = Path(args.output_dir or f"runs/merge_{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}")
    if output_dir.exists():
        fail(f"{output_dir} exists: choose another --output-dir")

    # 1. Check
    base = Checkpoint(args.base) if args.base else None
    models = [Checkpoint(name) for name in args.models]
    lead = check_models(base, models, args)
    rules = [read_rule(text, args) for text in args.rule]
    parameter, values = read_sweep(args)
    moved = {value: [read_rule(f"*:{parameter}={value}", args), *rules] for value in values}
    for chosen in [*moved.values(), rules]:
        settings_of_tensors(lead, chosen, args, len(models))
    with partial_folder(output_dir, args) as folder:
        if args.sweep:
            summary = sweep(folder, base, models, lead, parameter, moved, args)
        else:
            if args.soup == "greedy":
                models = choose_ingredients(folder / "candidate", base, models, lead, args)
            grams = merge_models(folder / "model", base, models, lead, rules, args, args.report)
            # 5. Report
            summary = {"models": len(models), "tensors": len(lead.shapes), "parameters": lead.num_parameters}
            summary |= write_report(folder, grams, base, models) if grams else {}
        summary["seconds"] = time.perf_counter() - started
    say(f"{'sweep' if args.sweep else 'merged model'} saved to {output_dir} in {summary['seconds']:.1f} s")
    return summary


class Work(NamedTuple):
    """One tensor of the result: where its values come from, and all that its tiles need.

    `sources`, of the base, if it is read, and of every model: its values (n,), and those of the model that
    leads, which fill up missing ones.
    """

    name: str
    sources: list[tuple[torch.Tensor, torch.Tensor]]
    with_base: bool
    settings: Settings
    dtype: torch.dtype
    measured: dict

    @property
    def size(self) -> int:
        return len(self.sources[0][1])

    @property
    def tiles(self) -> list[slice]:
        return [slice(start, min(start + TILE, self.size)) for start in range(0, self.size, TILE)]

    def load(self, tile: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """A tile as float32: base (n,), or the first model where none is read, and models (K, n)."""
        rows = torch.empty(len(self.sources), tile.stop - tile.start)
        for row, (flat, filler) in zip(rows, self.sources, strict=True):
            own = flat[tile]
            row[: len(own)].copy_(own)
            row[len(own) :].copy_(filler[tile.start + len(own) : tile.stop])
        return rows[0], rows[int(self.with_base) :]

    def draws(self, tile: slice, args: Args) -> torch.Tensor:
        """Uniform numbers for a tile, (K, n)."""
        models = range(len(self.settings.weights))
        return torch.stack([uniform(args.seed, i, self.name, tile) for i in models])


def merge_models(folder: Path, base, models: list, lead, rules: list, args: Args, with_report=False) -> dict:
    """Write the merged model; for a report, return the `gram` of base and task vectors by tensor.

    Without a base the first model takes its place there.
    """
    settings = settings_of_tensors(lead, rules, args, len(models))
    with_base = base is not None and (with_report or args.method not in ("linear", "soup"))
    read, works, dtypes = [base] * with_base + models, {}, {}
    for name in lead.shapes:
        dtypes[name] = DTYPES[(base or models[0]).dtypes[name]]
        if args.dtype != "auto" and dtypes[name].is_floating_point:
            dtypes[name] = getattr(torch, args.dtype)
        works[name] = Work(name, sources_of(name, read, lead), with_base, settings[name], dtypes[name], {})
    shards = plan_shards(lead.shapes, dtypes, args.max_shard_size)
    needed, free = sum(shard.size for shard in shards), shutil.disk_usage(folder.parent).free
    if needed > free:
        fail(f"{folder.parent} has {free / 1e9:.1f} GB left, the merged model takes {needed / 1e9:.1f} GB")
    say(f"{args.method} of {', '.join(m.name for m in read)}: {lead.num_parameters:,} parameters")
    folder.mkdir()
    grams, synced = {}, []
    with workers() as pool, ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as disk:
        # 2. Measure: here what is needed of all tensors together, in `jobs` what is needed of each
        if args.method == "ties" and args.compat == "paper":
            trim_whole_models(pool, list(works.values()), Progress("thresholds", read, passes=2))
        progress = Progress("merging", read)

        def jobs(shard: Shard) -> Iterator[Callable]:
            for work in map(works.get, shard.names):
                work.measured.update(measure(pool, work, args))
                for tile in work.tiles:
                    yield partial(merge_tile, work, tile, args, with_report)

        # 3. Merge
        def merged_tiles(shard: Shard) -> Iterator[torch.Tensor]:
            for work, merged, inner in in_order(pool, jobs(shard)):
                if merged is None:
                    fail(f"{work.name}: the result is not finite (NaN in a model, or beyond {work.dtype})")
                if inner is not None:
                    grams[work.name] = grams.get(work.name, 0) + inner
                progress.update(merged.numel())
                yield merged

        # 4. Write
        for shard in shards:
            write_shard(folder, shard, thread, merged_tiles(shard))
            synced.append(disk.submit(sync, folder / shard.file))  # while the next one is merged
        for result in synced:
            result.result()
    progress.bar.close()
    write_other_files(folder, shards, lead, dtypes)
    return grams


def measure(pool, work: Work, args: Args) -> dict:
    """What the method must know of the whole tensor before its first tile is merged."""
    settings, densities, n = work.settings, work.settings.densities, work.size
    if not work.dtype.is_floating_point or "lowest" in work.measured:
        return {}
    if n == 0:
        return {"coefficients": (0.0, 0.0), "ratio": 0.0, "lowest": torch.zeros(len(densities))}

    def total(function: Callable) -> torch.Tensor:
        return sum(in_order(pool, (partial(function, tile) for tile in work.tiles)))

    def inner_products(tile: slice) -> torch.Tensor:
        base, tensors = work.load(tile)
        return gram(base, tensors - base)

    def l1_norms(tile: slice) -> torch.Tensor:
        base, tensors = work.load(tile)
        kept = dare(tensors - base, work.draws(tile, args), torch.tensor(densities))
        return torch.stack([(tensors - base).abs().sum(-1), kept.abs().sum(-1)]).double()

    if args.method == "slerp":
        return {"coefficients": slerp_coefficients(total(inner_products), settings.t, compat=args.compat)}
    if args.method == "model_stock":
        return {"ratio": model_stock_ratio(total(inner_products), compat=args.compat)}
    if args.method == "ties":
        return {"lowest": thresholds(pool, [work], [max(1, int(density * n)) for density in densities])}
    if args.method == "breadcrumbs":
        ranks = [breadcrumb_ranks(n, density, settings.outliers, compat=args.compat) for density in densities]
        highest, lowest = (thresholds(pool, [work], list(ks)) for ks in zip(*ranks, strict=True))
        return {"lowest": lowest, "highest": highest}
    if args.method.startswith("dare") and args.compat == "mergekit":
        before, after = total(l1_norms)  # (K,) each
        return {"rescale": torch.where((before < 1e-7) | (after < 1e-7), 1.0, before / after).float()}
    return {}


def thresholds(pool, works: list[Work], ks: list[int], progress=None) -> torch.Tensor:
    """The k-th largest change of each model over all the tensors of `works`, (K,)."""

    def counts_of(work: Work, tile: slice, upper: list[int] | None) -> tuple[torch.Tensor, int]:
        base, tensors = work.load(tile)
        return magnitude_counts(tensors - base, upper), len(base)

    def counts(upper: list[int] | None) -> torch.Tensor:
        total, jobs = 0, (partial(counts_of, work, tile, upper) for work in works for tile in work.tiles)
        for of_tile, size in in_order(pool, jobs):
            total = total + of_tile
            if progress:
                progress.update(size)
        return total

    return kth_largest(counts, ks)


def trim_whole_models(pool, works: list[Work], progress):
    """Give every tensor TIES' threshold of each task vector over all of them."""
    works = [work for work in works if work.dtype.is_floating_point]
    n = sum(work.size for work in works)
    ks = [max(1, int(density * n)) for density in works[0].settings.densities]
    lowest = thresholds(pool, works, ks, progress)
    for work in works:
        work.measured["lowest"] = lowest
    progress.bar.close()


def merge_tile(work: Work, tile: slice, args: Args, with_report: bool) -> tuple:
    """The work, its merged tile (n,), rounded, None where it is not finite; the `gram` of it for a report."""
    if not work.dtype.is_floating_point:  # counters and the like: equal everywhere
        return work, work.sources[0][0][tile], None
    base, tensors = work.load(tile)
    draws = work.draws(tile, args) if args.method.startswith("dare") else None
    merged = merge_tensors(
        args.method, base, tensors, work.settings, work.measured, draws, compat=args.compat
    )
    lowest, highest = merged.aminmax()  # NaN if there is one
    limit = torch.finfo(work.dtype).max
    if not (-limit <= lowest and highest <= limit):
        return work, None, None
    others = tensors if work.with_base else tensors[1:]
    return work, merged.to(work.dtype), gram(base, others - base) if with_report else None


def choose_ingredients(folder: Path, base, models: list, lead, args: Args) -> list:
    """The models of the greedy soup: scored one by one, then in soups that are thrown away."""
    names = [name.removesuffix(":min") for name in args.eval_metrics[:1]]

    def score(path: Path, label: str) -> float:
        metrics = score_model(path, args, names)
        names[:] = names or list(metrics)[:1]
        say(f"  {names[0]} {metrics[names[0]]:.4g}: {label}")
        less_is_better = args.eval_metrics[:1] == (f"{names[0]}:min",)
        return -metrics[names[0]] if less_is_better else metrics[names[0]]

    def score_of(indices: list[int]) -> float:
        chosen = [models[i] for i in indices]
        merge_models(folder, base, chosen, lead, [], args)
        result = score(folder, " + ".join(model.name for model in chosen))
        shutil.rmtree(folder)
        return result

    kept = greedy_soup([score(model.folder, model.name) for model in models], score_of)
    say(f"the greedy soup has {len(kept)} of {len(models)} models")
    return [models[i] for i in kept]


def sweep(folder: Path, base, models: list, lead, parameter: str, moved: dict, args: Args) -> dict:
    """Merge and score at every value of a parameter: `moved` has the rules that hold there, by value."""
    points, names = [], [name.removesuffix(":min") for name in args.eval_metrics]
    for value, rules in moved.items():
        merge_models(folder / "model", base, models, lead, rules, args)
        metrics = score_model(folder / "model", args, names)
        names = names or [name for name in metrics if name != parameter]
        points.append({parameter: value} | metrics | {parameter: value})  # also if a metric has its name
        text = json.dumps({"args": asdict(args), "points": points}, indent=2)
        (folder / "sweep.json").write_text(text + "\n")
        say("  ".join(f"{key} {number:.4g}" for key, number in points[-1].items()))
        shutil.rmtree(folder / "model")
    draw_sweep(folder / "sweep.png", points, [parameter, *names[:2]], args.method)
    ends = {"first": points[0], "last": points[-1]}
    return {"points": len(points)} | {f"{name}/{end}": ends[end][name] for name in names[:2] for end in ends}


# ------------------------------------------------------------------------------------------------------------
# Plumbing
# ------------------------------------------------------------------------------------------------------------
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES = FLOATS | INTEGERS | {"BOOL": torch.bool}
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
HEAD = re.compile(r"^(lm_head|embed_out|output)\.(weight|bias)$")
LAYER = re.compile(r"^(.*?\.)(\d+)\.")
# What the numbers of a model mean depends on these.
CONFIG_KEYS_COMPARED = ("rope_theta", "rope_parameters", "num_attention_heads", "head_dim", "hidden_act")
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.onnx")  # not read
NOT_COPIED = (*OTHER_WEIGHTS, "*.safetensors", "*.index.json", "adapter_config.json", "README.md", ".git*")


def say(message: str, file=None):
    """Print a line above the progress bar, from the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(message, file=file or sys.stdout)


def fail(message: str):
    """End the run over a user's mistake: one line and exit code 2."""
    say(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def locate(name: str) -> str:
    """A path as given, or beside this file (tiny/ is found from any folder); a hub id is left as it is."""
    beside = Path(__file__).resolve().parent / name
    return str(beside) if beside.exists() and not Path(name).exists() else name


def read_json(path: Path, part: str | None = None) -> dict:
    """A JSON object; `part` has to be one, too, if it is given."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read: {error}")
    if not isinstance(found, dict) or (part and not isinstance(found.get(part), dict)):
        fail(f"{path} is no JSON object" + (f" with a {part}" if part else ""))
    return found


class Checkpoint:
    """A model folder: its config, and its tensors as views of the files, which the page cache holds."""

    def __init__(self, name: str):
        self.name, self.folder = name, Path(locate(name))
        self.rows = None  # how many of those for tokens count, if not all: see check_models
        if not self.folder.is_dir():
            self.folder = download(name)
        self.config = read_json(self.folder / "config.json")
        index = self.folder / "model.safetensors.index.json"
        listed = read_json(index, "weight_map")["weight_map"] if index.exists() else {}
        self.handles, self.shapes, self.dtypes = {}, {}, {}  # by tensor, in the order of the files
        for file in sorted(set(listed.values())) or ["model.safetensors"]:
            try:
                handle = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                fail(f"{self.folder / file} cannot be read as safetensors: {error}")
            for key in handle.offset_keys():
                view = handle.get_slice(key)
                self.handles[key] = handle
                self.shapes[key], self.dtypes[key] = view.get_shape(), view.get_dtype()
        if listed and listed.keys() != self.shapes.keys():
            fail(f"{index} and its files differ in {some(listed.keys() ^ self.shapes.keys())}")
        heads = [key for key in self.shapes if HEAD.match(key) and key.endswith("weight")]
        of_text = self.config.get("text_config") or self.config
        self.tied = of_text.get("tie_word_embeddings", self.config.get("tie_word_embeddings", not heads))
        embedding = next((key for key in self.shapes if EMBEDDING.search(key)), None)
        for head in heads if self.tied and embedding else ():  # stored twice: the head is dropped
            if not torch.equal(self[head], self[embedding]):
                fail(f"{name}: {head} is not {embedding}, though the config ties them")
            del self.shapes[head], self.dtypes[head], self.handles[head]

    def __getitem__(self, name: str) -> torch.Tensor:
        """All numbers of a tensor, (n,), not read yet."""
        return self.handles[name].get_tensor(name).view(-1)

    @property
    def num_parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    def vocabulary(self) -> list[str | None]:
        """The text of every token id; empty without a tokenizer.json."""
        if not (self.folder / "tokenizer.json").exists():
            return []
        tokenizer = read_json(self.folder / "tokenizer.json", "model")
        tokens = tokenizer["model"].get("vocab", {})
        if isinstance(tokens, list):  # unigram: [text, score] in the order of the ids
            tokens = {text: i for i, (text, _) in enumerate(tokens)}
        known = {i: text for text, i in tokens.items()}
        known |= {token["id"]: token["content"] for token in tokenizer.get("added_tokens", [])}
        return [known.get(i) for i in range(max(known, default=-1) + 1)]


def of_tokens(name: str) -> bool:
    """Whether a tensor has a row for each token."""
    return bool(EMBEDDING.search(name) or HEAD.match(name))


def download(name: str) -> Path:
    """The local copy of a model of the hub."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, ignore_patterns=list(OTHER_WEIGHTS)))
    except Exception as error:  # of many kinds: no such name, no network, no access
        fail(f"{name} is no folder, and the hub does not give it: {str(error).splitlines()[0]}")


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first of some names, and how many more there are."""
    names = sorted(map(str, names))
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check_models(base, models: list, args: Args):
    """Compare all models; end with one line of all that differs.

    Returns the model that leads: its other files are kept, and its rows fill up those that another lacks. It
    is the first, or with --pad-vocab the one with most tokens. What the others have in rows beyond their own
    tokenizer stands for no token, and does not count.
    """
    every, problems = [*models, *([base] if base else [])], []
    tokens = {model: model.vocabulary() for model in every}
    lead = models[0]
    if args.pad_vocab:
        lead = max(every, key=lambda model: (len(tokens[model]), model.num_parameters))
    for other in every:
        if other is lead:
            continue
        pair = f"{lead.name} and {other.name}"
        if alone := lead.shapes.keys() ^ other.shapes.keys():
            problems.append(f"{pair} differ in the tensors {some(alone)}")
        for name, shape in lead.shapes.items():
            found = other.shapes.get(name, shape)
            of_rows = of_tokens(name) and shape[1:] == found[1:]
            fits = args.pad_vocab and of_rows and (shape[0] > found[0] or tokens[other])
            if shape != found and not fits:
                hint = " (--pad-vocab fills them up)" if of_rows and not args.pad_vocab else ""
                problems.append(f"{name} is {shape} in {lead.name}, {found} in {other.name}{hint}")
        if lead.tied != other.tied:
            problems.append(f"{pair} differ in tie_word_embeddings")
        if lead.config.get("model_type") != other.config.get("model_type"):
            problems.append(f"{pair} differ in model_type")
        if not tokens[lead] or not tokens[other]:
            say(f"note: without a tokenizer.json in both, tokens of {pair} are not compared")
        else:  # what the longer one has more is an error, if it is not to be padded
            both = (zip if args.pad_vocab else zip_longest)(tokens[lead], tokens[other])
            if unequal := [i for i, (text, other_text) in enumerate(both) if text != other_text]:
                problems.append(f"{pair} differ in the tokens with the ids {some(unequal)}")
            other.rows = len(tokens[other]) if len(tokens[other]) < len(tokens[lead]) else None
        changed = [key for key in CONFIG_KEYS_COMPARED if lead.config.get(key) != other.config.get(key)]
        if changed:
            say(f"note: the configs of {pair} differ in {some(changed)}; that of {lead.name} is kept")
    for model in every:
        if unknown := {dtype for dtype in model.dtypes.values() if dtype not in DTYPES}:
            problems.append(f"{model.name} has tensors of type {some(unknown)}")
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
    """Values of a parameter for the tensors whose name matches, of all models or of the given one."""

    pattern: str
    name: str
    model: int | None
    values: tuple[float, ...]

    def matches(self, tensor: str) -> bool:
        return fnmatchcase(tensor, self.pattern) or fnmatchcase(tensor, f"*.{self.pattern}")


def read_parameter(text: str, flag: str, args: Args) -> tuple[str, int | None]:
    """`weight.2` -> ("weight", 1): a parameter of the method, and the model that it is of."""
    name, _, number = text.partition(".")
    if name not in PARAMETERS_OF[args.method]:
        known = ", ".join(sorted(PARAMETERS_OF[args.method])) or "none"
        fail(f"{flag}: --method {args.method} has no parameter {name!r}; it has: {known}")
    numbers = [str(i) for i in range(1, len(args.models) + 1)] if name in ("weight", "density") else []
    if number and number not in numbers:
        fail(f"{flag}: {text} should be {name}, or weight.i or density.i with i from 1 to {len(args.models)}")
    return name, int(number) - 1 if number else None


def read_rule(text: str, args: Args) -> Rule:
    match = re.fullmatch(r"(.+):([\w.]+)=(.+)", text)
    if not match:
        fail(f"--rule {text!r} is not PATTERN:NAME=V[,V...]")
    try:
        values = tuple(map(float, match[3].split(",")))
    except ValueError:
        fail(f"--rule {text!r}: {match[3]!r} is not a number, nor several with commas between them")
    return Rule(match[1], *read_parameter(match[2], f"--rule {text!r}", args), values)


def read_sweep(args: Args) -> tuple[str, list[float]]:
    """--sweep as the name of a parameter and its values."""
    if not args.sweep:
        return "", []
    match = re.fullmatch(r"([\w.]+)=([^:]+):([^:]+):([^:]+)", args.sweep)
    try:
        first, last, step = map(float, match.groups()[1:])
        steps = int((last - first) / step + 1e-9) + 1 if last >= first and 0 < step < math.inf else 0
    except (AttributeError, ValueError, OverflowError):
        steps = 0
    if not steps:
        fail(f"--sweep {args.sweep!r} is not NAME=FIRST:LAST:STEP with LAST from FIRST on and STEP above 0")
    read_parameter(match[1], "--sweep", args)
    return match[1], [round(first + i * step, 10) for i in range(steps)]


def settings_of_tensors(model, rules: list[Rule], args: Args, num_models: int) -> dict[str, Settings]:
    """The parameters of every tensor; of several rules that match the last one counts.

    Several values are points of a line over the layers. Outside of the layers the embeddings have the first
    value and what comes behind the last layer has the last (mergekit: all of these have the first).
    """
    density = (0.2 if args.method == "ties" else 0.1) if args.density is None else args.density
    count = {}  # layers of each stack
    for name in model.shapes:
        if match := LAYER.match(name):
            count[match[1]] = max(count.get(match[1], 0), int(match[2]) + 1)
    result, unused = {}, set(rules)
    for name in model.shapes:
        match = LAYER.match(name)
        depth = float(not EMBEDDING.search(name) and args.compat == "paper")
        if match:
            depth = int(match[2]) / (count[match[1]] - 1) if count[match[1]] > 1 else 1.0
        weights, densities = list(args.weights or (1.0,) * num_models), [density] * num_models
        chosen = {  # in the order of Settings
            "lambda": 1.0 if args.lambda_ is None else args.lambda_,
            "t": 0.5 if args.t is None else args.t,
            "outliers": 0.01 if args.outliers is None else args.outliers,
        }
        for rule in [rule for rule in rules if rule.matches(name)]:
            unused.discard(rule)
            points = range(len(rule.values))
            value = float(np.interp(depth * points[-1], points, rule.values))
            if rule.name in chosen:
                chosen[rule.name] = value
            else:
                per_model = weights if rule.name == "weight" else densities
                for i in range(num_models) if rule.model is None else [rule.model]:
                    per_model[i] = value
        if not all(0 < density <= 1 for density in densities) or not 0 <= chosen["outliers"] < 1:
            fail(f"{name}: --density must lie in (0, 1] and --outliers in [0, 1)")
        if not all(map(math.isfinite, [*weights, *chosen.values()])):
            fail(f"{name}: a parameter is not a finite number")
        if args.method == "linear" and abs(sum(weights)) <= 1e-6 * sum(map(abs, weights)):
            fail(f"{name}: the weights add up to 0, and linear divides by their sum")
        result[name] = Settings(tuple(weights), tuple(densities), *chosen.values())
    if unused:
        fail(f"--rule: no tensor matches {some(rule.pattern for rule in unused)}")
    if args.method == "ties" and args.compat == "paper" and len({s.densities for s in result.values()}) > 1:
        fail("ties trims whole task vectors: a density of single tensors needs --compat mergekit")
    return result


def sources_of(name: str, read: list, lead) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(values, filler) of a tensor in each model: the one that leads fills up missing rows for tokens."""
    width = math.prod(lead.shapes[name][1:])
    ends = [model.rows * width if model.rows and of_tokens(name) else None for model in read]
    return [(model[name][:end], lead[name]) for model, end in zip(read, ends, strict=True)]


def uniform(seed: int, model: int, name: str, tile: slice) -> torch.Tensor:
    """Draws in [0, 1), (n,), from a counter-based generator: they depend on nothing but their place.

    So tiles and shards of any size give the same masks. The counter moves on once in 8 draws.
    """
    key = hashlib.blake2b(f"{seed} {model} {name}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(key, "little")).advance(tile.start // 8)
    draws = np.random.Generator(generator).random(tile.stop - tile.start, dtype=np.float32)
    return torch.from_numpy(draws)


@contextmanager
def workers():
    """As many threads as torch has, each for a tile of its own."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc gives tiles back to the system and pages them in anew: keep them
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer from outside the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)


def in_order(pool, jobs: Iterable[Callable]) -> Iterator:
    """The results of jobs in their order; a few are under way, so that few are held in memory."""
    pending = deque()
    for job in jobs:
        pending.append(pool.submit(job))
        if len(pending) > 2 * pool._max_workers:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class Progress:
    """A bar of the bytes read, and a line every ten seconds where there is no terminal to draw it on."""

    def __init__(self, what: str, read: list, passes: int = 1):
        widths = [(model.shapes[k], DTYPES[model.dtypes[k]].itemsize) for model in read for k in model.shapes]
        size = sum(math.prod(shape) * width for shape, width in widths)
        self.what, self.per_number, self.total = what, size / max(1, read[0].num_parameters), passes * size
        self.bar = tqdm(total=self.total, unit="B", unit_scale=True, desc=what, disable=None)
        self.started, self.done = time.perf_counter(), 0
        self.last = self.started

    def update(self, numbers: int):
        self.done += numbers * self.per_number
        self.bar.update(int(self.done) - self.bar.n)
        now = time.perf_counter()
        if now - self.last > 10:
            speed, self.last = self.done / (now - self.started), now
            left = round((self.total - self.done) / speed)
            done, total, speed = self.done / 1e9, self.total / 1e9, speed / 1e9
            eta = f"{left // 60}:{left % 60:02}"
            say(f"{self.what}  {done:.1f} of {total:.1f} GB, {speed:.2f} GB/s, left {eta}")


class Shard(NamedTuple):
    """A file of the result: its tensors in order, and what stands before their values."""

    file: str
    names: list[str]
    header: bytes
    size: int


def read_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        fail(f"--max-shard-size {text!r} is not a size such as 500MB or 5GB")
    return int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()])


def plan_shards(shapes: dict, dtypes: dict, max_shard_size: str) -> list[Shard]:
    """The files of the result, headers and all, before a number of it is known."""
    limit, groups, sizes, total = read_size(max_shard_size), [[]], {}, 0
    codes = {dtype: code for code, dtype in DTYPES.items()}
    for name, shape in shapes.items():
        sizes[name] = math.prod(shape) * dtypes[name].itemsize
        if groups[-1] and total + sizes[name] > limit:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += sizes[name]
    shards = []
    for i, group in enumerate(groups, 1):
        group.sort(key=lambda name: -dtypes[name].itemsize)  # every tensor starts at a multiple of its width
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in group:
            start, end = end, end + sizes[name]
            header[name] = {"dtype": codes[dtypes[name]], "shape": shapes[name], "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = "model.safetensors" if len(groups) == 1 else f"model-{i:05}-of-{len(groups):05}.safetensors"
        shards.append(Shard(file, group, len(text).to_bytes(8, "little") + text, end))
    return shards


def write_shard(folder: Path, shard: Shard, thread, tiles: Iterable[torch.Tensor]):
    """Write a file tile by tile, in a thread of its own, while the next ones are computed."""
    with open(folder / shard.file, "wb") as file:
        file.write(shard.header)
        writes = (partial(file.write, tile.view(torch.uint8).numpy()) for tile in tiles)
        size = sum(in_order(thread, writes))
    if size != shard.size:
        raise RuntimeError(f"{shard.file} has {size} bytes of tensors, not {shard.size}")


def write_other_files(folder: Path, shards: list[Shard], lead, dtypes: dict):
    """All but the weights: their index, where they are in several files, and what the model that leads has.

    That is its config, tokenizer, generation config, chat template and whatever else is no weights.
    """
    if len(shards) > 1:
        weight_map = {name: shard.file for shard in shards for name in shard.names}
        index = {"metadata": {"total_size": sum(s.size for s in shards)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for path in sorted(lead.folder.iterdir()):
        if path.is_file() and not any(fnmatchcase(path.name, pattern) for pattern in NOT_COPIED):
            shutil.copyfile(path, folder / path.name)
    stored = str(max(dtypes.values(), key=list(dtypes.values()).count)).removeprefix("torch.")
    config = {k: stored if k in ("dtype", "torch_dtype") else v for k, v in lead.config.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def sync(path: Path):
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextmanager
def partial_folder(output_dir: Path, args: Args):
    """The folder of the run under another name until all of it is on disk: what has the name is whole.

    A run that fails leaves nothing but the scores of a sweep, under that other name.
    """
    folder = output_dir.with_name(f"{output_dir.name}.partial")
    scores = folder / "sweep.json"
    if os.path.exists(scores) or (os.path.exists(folder) and not os.path.exists(folder / "args.json")):
        fail(f"{folder} is in the way, and not what a killed merge leaves: move it or delete it")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps(asdict(args), indent=2))
        shutil.copy(__file__, folder)
        yield folder
        for path in (*folder.rglob("*"), folder):
            sync(path)
    except BaseException as error:
        shutil.rmtree(folder / "model" if scores.exists() else folder, ignore_errors=True)
        if scores.exists():
            say(f"the scores so far are in {scores}")
        if isinstance(error, OSError):
            fail(f"{error.filename or folder}: {error.strerror or error}")
        raise
    folder.rename(output_dir)
    sync(output_dir.parent)


def score_model(folder: Path, args: Args, names: list[str]) -> dict[str, float]:
    """What --eval-command says of a model: the numbers in the JSON object it prints last, `names` too."""
    command = [word.replace("{model}", str(folder)) for word in shlex.split(args.eval_command)]
    done = subprocess.run(command, capture_output=True, text=True)
    printed = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]
    if done.returncode:
        why = (done.stderr.strip() or printed).splitlines()[-1]
        fail(f"--eval-command ends with exit code {done.returncode}: {why}")
    try:
        metrics = {k: float(v) for k, v in json.loads(printed).items() if isinstance(v, int | float)}
    except (ValueError, AttributeError):
        metrics = {}
    missing = [name for name in names if name not in metrics]
    if not metrics or missing:
        wanted = f" with {', '.join(missing)}" if missing else ""
        fail(f"--eval-command should print a JSON object of numbers{wanted} last, not: {printed[:200]}")
    if wrong := [name for name in metrics if not math.isfinite(metrics[name])]:
        fail(f"--eval-command gives {metrics[wrong[0]]} for {wrong[0]}, which is no score")
    return metrics


def draw_sweep(path: Path, points: list[dict], names: list[str], method: str):
    """Metrics against the parameter, the first of `names`, and two metrics against each other."""
    from matplotlib.figure import Figure

    (parameter, *chosen), columns = names, {name: [point[name] for point in points] for name in names}
    pairs = [(parameter, name) for name in chosen] + [tuple(chosen)] * (len(chosen) > 1)
    figure = Figure(figsize=(3.7 * len(pairs), 3.4), layout="tight")
    for axis, (x, y) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        color = "tab:blue" if x == parameter else "tab:red"
        axis.plot(columns[x], columns[y], "o-", markersize=4, color=color)
        axis.set(xlabel=x, ylabel=y)
        for name, letter in ((x, "x"), (y, "y")):
            low, high = min(columns[name]), max(columns[name])
            if 0 < 10 * low < high:
                ticks = [digit * 10.0**power for power in range(-9, 10) for digit in (1, 2, 5)]
                ticks = [tick for tick in ticks if low <= tick <= high]
                axis.set(**{f"{letter}scale": "log", f"{letter}ticks": ticks})
                getattr(axis, f"{letter}axis").set(major_formatter="{x:g}", minor_formatter="")
        for value, *place in zip(*columns.values(), strict=True) if x != parameter else ():
            axis.annotate(f" {value:g}", place, fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{method}, along {parameter}", fontsize=10)
    figure.savefig(path, dpi=120)


def sizes_and_angles(inner: torch.Tensor) -> dict:
    """From a `gram`: norms of base and task vectors, and cosines of these with it and one another."""
    norms = inner.diagonal().clamp(min=0).sqrt()
    cosines = (inner / (norms[:, None] * norms).clamp(min=1e-300)).tolist()
    pairs = combinations(range(1, len(norms)), 2)
    return {
        "base_norm": norms[0].item(),
        "norm": norms[1:].tolist(),
        "relative_norm": (norms[1:] / norms[0].clamp(min=1e-300)).tolist(),
        "cosine_with_base": cosines[0][1:],
        "cosine": {f"{i}-{j}": cosines[i][j] for i, j in pairs},
    }


def kind_of(name: str) -> str:
    """The name of a tensor without the number of its layer."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def write_report(folder: Path, grams: dict[str, torch.Tensor], base, models: list) -> dict:
    """Norms and cosines of the task vectors: report.json by tensor, a table by kind of tensor, a heat map."""
    kinds = {}
    for name, inner in grams.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0) + inner
    whole = sizes_and_angles(sum(grams.values()))
    named = [model.name for model in (models if base else models[1:])]
    result = {
        "base": (base or models[0]).name,
        "models": named,
        "whole": whole,
        "kinds": {kind: sizes_and_angles(inner) for kind, inner in kinds.items()},
        "tensors": {name: sizes_and_angles(inner) for name, inner in grams.items()},
    }
    (folder / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    if not named:  # a single model, compared with nothing
        return {}
    widest, shown = max(map(len, [*kinds, "all"])), 9
    titles = [f"change {i}" for i in range(1, len(named) + 1)]
    titles += [f"cosine {pair}" for pair in whole["cosine"]]
    say(f"norm of each task vector over that of {result['base']}, and cosines of task vectors:")
    for i, name in enumerate(named, 1):
        say(f"  {i} is {name}")
    more = f"  and {len(titles) - shown} more in report.json" if len(titles) > shown else ""
    say(f"{'':{widest}}" + "".join(f"{title:>13}" for title in titles[:shown]) + more)
    for kind, figures in [*result["kinds"].items(), ("all", whole)]:
        cells = [f"{norm:.4f}" for norm in figures["relative_norm"]]
        cells += [f"{cosine:+.4f}" for cosine in figures["cosine"].values()]
        say(f"{kind:{widest}}" + "".join(f"{cell:>13}" for cell in cells[:shown]))
    draw_report(folder / "report.png", result)
    summary = {f"relative_norm/{i}": x for i, x in enumerate(whole["relative_norm"], 1)}
    return summary | {f"cosine/{pair}": x for pair, x in whole["cosine"].items()}


def draw_report(path: Path, result: dict):
    """Kinds of tensors by layers: mean change; of two models or more, mean cosine of their task vectors."""
    from matplotlib.figure import Figure

    cells, layers = {}, {-1}  # -1: none
    for name, figures in result["tensors"].items():
        layer = int(match[2]) if (match := LAYER.match(name)) else -1
        layers.add(layer)
        cells.setdefault((kind_of(name), layer), []).append(figures)
    kinds, layers = list(result["kinds"]), sorted(layers)
    panels = [("mean norm of the task vectors over that of the base", "relative_norm", "viridis", 0, None)]
    if result["whole"]["cosine"]:
        panels.append(("mean cosine of the task vectors", "cosine", "coolwarm", -1, 1))
    size = (4.5 + (0.32 * len(layers) + 2) * len(panels), 1.5 + 0.28 * len(kinds))
    figure = Figure(figsize=size, layout="tight")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, key, colours, lowest, highest) in zip(axes, panels, strict=True):
        values = np.full((len(kinds), len(layers)), np.nan)
        for (kind, layer), of_cell in cells.items():
            rows = [list(f[key].values()) if key == "cosine" else f[key] for f in of_cell]
            row, column = kinds.index(kind), layers.index(layer)
            values[row, column] = np.mean(rows)
            axis.text(column, row, f"{np.mean(rows):.2f}", ha="center", va="center", fontsize=6)
        # Pale, so that the numbers can be read.
        image = axis.imshow(values, aspect="auto", cmap=colours, vmin=lowest, vmax=highest, alpha=0.6)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(layers)), ["–" if layer < 0 else layer for layer in layers], fontsize=7)
        axis.set_yticks(range(len(kinds)), kinds, fontsize=7)
        axis.set_xlabel("layer", fontsize=8)
        figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except KeyboardInterrupt:
        say("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
