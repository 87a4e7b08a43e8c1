"""Merging: formulas against values worked by hand, and the streamed result against whole tensors in memory.

The models are small and made here: a random one, and copies of it whose weights were moved.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, start
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sync_docs import flags, metric_differences

import merge

pytestmark = pytest.mark.usefixtures("one_cpu")
NEEDS_BASE = {"task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs"}


@pytest.fixture(scope="module")
def models(random_model, tmp_path_factory):
    """Folders 0 to 3: a random model and three that were moved away from it, in float32."""
    folders, weights = [], load_file(random_model / "model.safetensors")
    for seed in range(4):
        folder = tmp_path_factory.mktemp("models") / f"model{seed}"
        moved = {}
        generator = torch.Generator().manual_seed(seed)
        for name, x in weights.items():
            noise = torch.randn(x.shape, generator=generator) * 0.02 * bool(seed)
            moved[name] = x.float() + noise
        folders.append(write(folder, random_model, moved))
    return folders


def write(folder, like, tensors, **config):
    """A model folder with other weights, and another config where one is given."""
    shutil.copytree(like, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def changed(folder, like, **config):
    """A copy of a model in which `change(tensors)` has been at work: changed(folder, like)(change)."""

    def apply(change=lambda tensors: None):
        tensors = load_file(like / "model.safetensors")
        change(tensors)
        return write(folder, like, tensors, **config)

    return apply


@pytest.fixture
def run(tmp_path):
    """run(method, base, models, **flags) -> the folder of the run; each call has one of its own."""
    count = iter(range(99))

    def run_in(method, base, models, **flags):
        folder = tmp_path / f"run{next(count)}"
        flags = {"report": False, "output_dir": str(folder)} | flags
        base = None if base is None else str(base)
        merge.main(merge.Args(method=method, base=base, models=tuple(map(str, models)), **flags))
        return folder

    return run_in


def weights(folder):
    """The tensors of a merged model, from all its files."""
    tensors = {}
    for path in sorted((folder / "model").glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def error_of(function, capfd):
    """The one line and exit code of a user's mistake."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        function()
    [line] = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and line.startswith("error: ")
    return line


def vectors(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def settings(weights=(1.0,), densities=None, lambda_=1.0, t=0.5, outliers=0.01):
    return merge.Settings(weights, densities or (1.0,) * len(weights), lambda_, t, outliers)


# Formulas ---------------------------------------------------------------------------------------------------


def test_linear_is_the_weighted_mean():
    assert merge.linear(vectors([1, 2], [3, 6]), torch.tensor([1.0, 3.0])).tolist() == [2.5, 5]
    assert merge.linear(vectors([1, 2], [3, 6]), torch.tensor([5.0, 5.0])).tolist() == [2, 4]


def test_wise_ft_is_a_point_on_the_line_and_exact_at_its_ends():
    base, tensor = torch.randn(2, 1000)
    assert merge.wise_ft(vectors([0, 4])[0], vectors([2, 0])[0], 0.25).tolist() == [0.5, 3]
    assert torch.equal(merge.wise_ft(base, tensor, 0.0), base)
    assert torch.equal(merge.wise_ft(base, tensor, 1.0), tensor)


def test_task_arithmetic_adds_scaled_task_vectors():
    merged = merge.task_arithmetic(
        vectors([1, 1])[0], vectors([2, 0], [0, -1]), torch.tensor([1.0, 2.0]), 0.5
    )
    assert merged.tolist() == [2, 0]  # 1 + 0.5 (1 x 2 + 2 x 0), 1 + 0.5 (1 x 0 - 2 x 1)


def arc(one, other, t, compat="paper"):
    one, other = vectors(one, other)
    inner = merge.gram(one, (other - one)[None])
    return merge.slerp(one, other, merge.slerp_coefficients(inner, t, compat=compat))


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_slerp_goes_along_the_circle(compat):
    assert arc([1, 0], [0, 1], 1 / 3, compat).tolist() == pytest.approx([math.sqrt(3) / 2, 0.5])
    assert arc([2, 0], [0, 1], 0.5, compat).tolist() == pytest.approx([math.sqrt(2), math.sqrt(0.5)])
    # 60 degrees: a quarter of the way is sin 45 / sin 60 and sin 15 / sin 60
    there = [math.sin(math.pi / 4) / math.sin(math.pi / 3), math.sin(math.pi / 12) / math.sin(math.pi / 3)]
    expected = [there[0] + there[1] / 2, there[1] * math.sqrt(3) / 2]
    assert arc([1, 0], [0.5, math.sqrt(3) / 2], 0.25, compat).tolist() == pytest.approx(expected, rel=1e-6)
    for t, end in ((0.0, [1.0, 2.0]), (1.0, [-3.0, 1.0])):
        assert arc([1, 2], [-3, 1], t, compat).tolist() == pytest.approx(end)


def test_slerp_without_an_arc_is_a_straight_line():
    assert arc([1, 2], [2, 4], 0.25).tolist() == pytest.approx([1.25, 2.5])
    assert arc([1, 2], [1, 2], 0.3).tolist() == pytest.approx([1, 2])
    assert arc([1, 2], [-1, -2], 0.25).tolist() == pytest.approx([0.5, 1])  # antiparallel: no plane is given
    assert arc([0, 0], [4, 8], 0.25).tolist() == [1, 2] and arc([4, 8], [0, 0], 0.25).tolist() == [3, 6]
    assert arc([0, 0], [0, 0], 0.25).tolist() == [0, 0]


def test_slerp_of_a_zero_tensor_is_at_a_right_angle_in_mergekit_mode():
    there = [math.sin(math.pi / 8) * 4, math.sin(math.pi / 8) * 8]
    assert arc([0, 0], [4, 8], 0.25, "mergekit").tolist() == pytest.approx(there)


def test_slerp_near_an_angle_of_zero_is_the_arc_in_paper_and_the_line_in_mergekit():
    angle = 0.02  # its cosine is 0.9998
    end = [math.cos(angle), math.sin(angle)]
    half = [math.cos(angle / 2), math.sin(angle / 2)]
    assert arc([1, 0], end, 0.5).tolist() == pytest.approx(half, abs=1e-6)
    assert math.hypot(*arc([1, 0], end, 0.5).tolist()) == pytest.approx(1, abs=1e-6)
    assert math.hypot(*arc([1, 0], end, 0.5, "mergekit").tolist()) == pytest.approx(half[0], abs=1e-6)


TASK_VECTORS = ([4, -1, 2, 0.5], [3, 2, -3, -0.5], [-1, 2, -2, 0.2])


def test_ties_by_hand():
    task_vectors = vectors(*TASK_VECTORS)
    trimmed = merge.trim(task_vectors, torch.tensor([2.0, 3.0, 2.0]))  # the largest half of each
    assert trimmed.tolist() == [[4, 0, 2, 0], [3, 0, -3, 0], [0, 2, -2, 0]]
    # elected: + (4 + 3), + (2), - (2 - 3 - 2), none
    assert merge.ties(trimmed, torch.ones(3)).tolist() == [3.5, 2, -2.5, 0]
    # weights 1, 1, 0.5: the third number has 2 - 3 - 1 < 0, and (-3 - 1) / 1.5
    weighted = merge.ties(trimmed, torch.tensor([1.0, 1.0, 0.5]))
    assert weighted.tolist() == pytest.approx([3.5, 2, -4 / 1.5, 0])
    assert merge.ties(trimmed, torch.ones(3), mean=False).tolist() == [7, 2, -5, 0]


def test_ties_between_signs_elect_nothing_in_paper_and_plus_in_mergekit():
    balanced = vectors([2, 1], [-2, 1])
    assert merge.ties(balanced, torch.ones(2)).tolist() == [0, 1]
    assert merge.ties(balanced, torch.ones(2), compat="mergekit").tolist() == [2, 1]


def kth_largest(task_vectors, ks):
    return merge.kth_largest(lambda upper: merge.magnitude_counts(task_vectors, upper), ks)


@pytest.mark.parametrize("kind", ["normal", "bfloat16", "zeros", "tiny", "equal", "wide"])
def test_threshold_is_the_kth_largest_exactly(kind):
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1))
    x = {
        "normal": x,
        "bfloat16": x.bfloat16().float(),
        "zeros": x * (x > 1.5),
        "tiny": x * 1e-42,  # subnormal
        "equal": torch.full_like(x, -0.3),
        "wide": x * 10 ** (20 * x.flip(0)),
    }[kind]
    for k in (1, 2, 999, 2500, 4999, 5000):
        assert kth_largest(x, [k] * 3).tolist() == x.abs().topk(k).values[:, -1].tolist()
    assert kth_largest(x, [1, 7, 5000]).tolist() == [
        x[i].abs().topk(k).values[-1] for i, k in enumerate([1, 7, 5000])
    ]


def test_threshold_of_no_change_is_beyond_all():
    assert kth_largest(vectors([1, math.inf, 0]), [0]).isnan().all()


def test_threshold_of_tiles_is_that_of_the_whole():
    x = torch.randn(2, 1000)
    whole = kth_largest(x, [100, 300])
    tiles = merge.kth_largest(
        lambda upper: sum(merge.magnitude_counts(t, upper) for t in x.split(64, 1)), [100, 300]
    )
    assert torch.equal(whole, tiles)


def crumbs(n, density, outliers, compat="paper"):
    """The numbers of 1 to n, with signs, that breadcrumbs keeps."""
    x = torch.arange(1.0, n + 1)[None] * torch.tensor([1.0, -1.0]).repeat(n)[:n]
    first, last = merge.breadcrumb_ranks(n, density, outliers, compat=compat)
    highest, lowest = kth_largest(x, [first]), kth_largest(x, [last])
    return [abs(number) for number in merge.trim(x, lowest, highest)[0].tolist() if number]


def test_breadcrumbs_drops_both_ends():
    assert crumbs(10, 0.5, 0.2) == [4, 5, 6, 7, 8]  # 10 and 9 are outliers, 1 to 3 small
    assert crumbs(10, 0.5, 0.0) == [6, 7, 8, 9, 10]  # no outlier: nothing else is dropped at the top
    assert crumbs(5, 0.6, 0.01) == [3, 4, 5]  # less than one number is an outlier
    assert crumbs(10, 1.0, 0.2) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert crumbs(10, 1.0, 0.2, "mergekit") == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert crumbs(10, 0.9, 0.2, "mergekit") == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert crumbs(3, 0.1, 0.9) == [1] and crumbs(1, 0.1, 0.9) == [1]  # at least one
    assert crumbs(3, 0.1, 0.9, "mergekit") == crumbs(9, 0.1, 0.0, "mergekit") == []
    assert merge.breadcrumb_ranks(3, 0.1, 0.9, compat="mergekit") == (1, 0)  # also where changes are equal


def test_equal_changes_are_all_kept_which_in_bfloat16_are_many():
    random, shares = torch.Generator().manual_seed(1), {}
    for size in (1e-3, 3e-4, 1e-4):
        base = (0.02 * torch.randn(10**6, generator=random)).bfloat16()
        model = (base.float() + size * torch.randn(10**6, generator=random)).bfloat16()
        change = (model.float() - base.float())[None]
        kept = merge.trim(change, kth_largest(change, [200_000]))
        shares[size] = kept.ne(0).float().mean().item()
    page = (ROOT / "docs" / "merge.md").read_text()
    assert "keeps {:.2f}, {:.2f} and {:.2f} of them".format(*shares.values()) in page


def test_dare_by_hand():
    draws = vectors([0.1, 0.3, 0.24, 0.9])
    kept = merge.dare(vectors([4, 8, -2, 1]), draws, torch.tensor([0.25]))
    assert kept.tolist() == [[4, 0, -2, 0]]
    one, model = torch.zeros(4), vectors([4, 8, -2, 1])
    merged = merge.merge_tensors("dare_linear", one, model, settings(densities=(0.25,)), {}, draws)
    assert merged.tolist() == [16, 0, -8, 0]  # divided by the density


def test_dare_ties_averages_what_agrees_in_paper_and_sums_it_in_mergekit():
    base, models, draws = torch.zeros(2), vectors([4, 2], [2, -2]), torch.zeros(2, 2)
    half = settings(weights=(1.0, 1.0), densities=(0.5, 0.5), lambda_=0.5)
    merged = merge.merge_tensors("dare_ties", base, models, half, {}, draws)
    assert merged.tolist() == [3, 0]  # 0.5 (8 + 4) / 2; 4 - 4 elects nothing
    same_norm = {"rescale": torch.ones(2)}
    merged = merge.merge_tensors("dare_ties", base, models, half, same_norm, draws, compat="mergekit")
    assert merged.tolist() == [3, 1]  # 0.5 (4 + 2); 2 - 2 elects plus


def test_dare_keeps_the_density_and_the_expectation():
    task_vector, density, n = torch.linspace(-1, 3, 64)[None], 0.3, 4000
    tile = slice(0, 64)
    draws = torch.stack([merge.uniform(seed, 0, "w", tile) for seed in range(n)])  # (n, 64)
    kept = torch.cat([merge.dare(task_vector, d[None], torch.tensor([density])) for d in draws])
    share = kept.ne(0).float().mean().item()
    assert share == pytest.approx(density, abs=4 * math.sqrt(0.21 / (n * 64)))
    # mean of kept / density: tau, with standard error |tau| sqrt((1 - p) / (p n))
    error = (kept.mean(0) / density - task_vector[0]) / (task_vector[0].abs() * math.sqrt(0.7 / (0.3 * n)))
    assert error.abs().max() < 4.5 and error.square().mean().sqrt() < 1.5


def test_draws_depend_on_seed_model_name_and_place_alone():
    whole = merge.uniform(1, 0, "w", slice(0, 4096))
    parts = [merge.uniform(1, 0, "w", slice(start, start + 64)) for start in range(0, 4096, 64)]
    assert torch.equal(torch.cat(parts), whole)
    for other in ((2, 0, "w"), (1, 1, "w"), (1, 0, "v")):
        assert not torch.equal(merge.uniform(*other, slice(0, 4096)), whole)
    assert 0 <= whole.min() and whole.max() < 1 and whole.mean() == pytest.approx(0.5, abs=0.02)


def stock(base, *models):
    base, models = vectors(base)[0], vectors(*models)
    ratio = merge.model_stock_ratio(merge.gram(base, models - base))
    return merge.model_stock(base, models, ratio).tolist()


def test_model_stock_by_hand():
    # 45 degrees: t = 2 cos / (1 + cos) = 0.8284, and the mean is (1, 0.5)
    ratio = math.sqrt(2) / (1 + math.sqrt(0.5))
    assert stock([0, 0], [1, 0], [1, 1]) == pytest.approx([ratio, ratio / 2])
    assert stock([5, 1], [6, 1], [6, 2]) == pytest.approx([5 + ratio, 1 + ratio / 2], rel=1e-6)
    assert stock([1, 1], [2, 1], [1, 2]) == [1, 1]  # orthogonal: the base
    assert stock([1, 1], [2, 3], [2, 3]) == pytest.approx([2, 3])  # the same: their mean
    # three, pairwise cosines 0, 0 and 1: mean 1/3, t = 3/3 / (1 + 2/3) = 0.6
    assert stock([0, 0], [3, 0], [0, 3], [0, 3]) == pytest.approx([0.6, 1.2])


def test_model_stock_where_the_formula_has_no_value():
    assert stock([1, 2], [2, 3], [0, 1]) == [1, 2]  # opposite: 0 / 0
    assert stock([1, 2], [1, 2], [1, 2]) == [1, 2]  # no change at all
    assert stock([1, 2], [1, 2], [3, 2]) == [1, 2]  # one that did not change


def test_model_stock_of_changes_that_point_apart_keeps_the_base():
    obtuse = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, -0.5], [0.0, -0.5, 1.0]], dtype=torch.float64)
    assert merge.model_stock_ratio(obtuse) == 0
    assert merge.model_stock_ratio(obtuse, compat="mergekit") == pytest.approx(-2)  # 2 (-1/2) / (1 - 1/2)


def test_model_stock_of_tiny_changes_is_that_of_their_angle_but_not_in_mergekit():
    tiny = torch.tensor([[1.0, 0, 0], [0, 1e-8, 5e-9], [0, 5e-9, 1e-8]], dtype=torch.float64)
    assert merge.model_stock_ratio(tiny) == pytest.approx(2 / 3)  # 2 (1/2) / (1 + 1/2)
    # mergekit: the cosine is 5e-9 / 1e-6
    assert merge.model_stock_ratio(tiny, compat="mergekit") == pytest.approx(0.01 / 1.005)


def test_ties_with_a_negative_weight_takes_the_change_off():
    change = torch.tensor([[1.0, -2.0]])
    assert merge.ties(change, torch.tensor([-1.0])).tolist() == [-1, 2]
    both = torch.tensor([[1.0], [-3.0]])  # weighted 1 and 1.5: 2.5 over the sizes of the weights
    assert merge.ties(both, torch.tensor([1.0, -0.5])).item() == pytest.approx(2.5 / 1.5)


def test_greedy_soup_keeps_what_does_not_make_it_worse():
    table = {(1, 2): 0.85, (1, 0): 0.92, (1, 0, 3): 0.92}
    asked = []

    def score_of(indices):
        asked.append(tuple(indices))
        return table[tuple(indices)]

    assert merge.greedy_soup([0.5, 0.9, 0.7, 0.2], score_of) == [1, 0, 3]  # an equal score is good enough
    assert asked == [(1, 2), (1, 0), (1, 0, 3)]


@pytest.mark.parametrize("method", sorted(NEEDS_BASE))
def test_one_model_at_density_one_is_task_arithmetic(method):
    base, model = torch.randn(2, 512, generator=torch.Generator().manual_seed(1))
    measured = {"lowest": torch.zeros(1)}
    one = settings(weights=(1.0,), lambda_=0.7)
    merged = merge.merge_tensors(method, base, model[None], one, measured, torch.rand(1, 512))
    assert torch.allclose(merged, base + 0.7 * (model - base), atol=1e-6)


@pytest.mark.parametrize("method", sorted(NEEDS_BASE | {"model_stock", "slerp", "wise_ft", "linear"}))
@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_zero_task_vectors_leave_the_base(method, compat, models, run):
    copies = [models[0]] * (1 if method in ("slerp", "wise_ft") else 2)
    merged, base = (
        weights(run(method, models[0], copies, compat=compat)),
        load_file(models[0] / "model.safetensors"),
    )
    for name in base:
        assert torch.allclose(merged[name], base[name], rtol=1e-6, atol=0), name


# Streams ----------------------------------------------------------------------------------------------------


def in_memory(method, folders, compat="paper", dtype=None, **flags):
    """The merged tensors from whole tensors: thresholds by topk, angles and norms in float64."""
    base, *models = [load_file(folder / "model.safetensors") for folder in folders]
    weights_ = flags.get("weights", (1.0,) * len(models))
    seed = flags.get("seed", 1)
    densities = flags.get("densities", (flags.get("density", 0.3),) * len(models))
    p = settings(weights_, densities, flags.get("lambda_", 1.0), flags.get("t", 0.5), 0.1)
    merged, lowest = {}, None
    changes = {
        k: torch.stack([m[k].float().flatten() - base[k].float().flatten() for m in models]) for k in base
    }
    if method == "ties" and compat == "paper":
        whole = torch.cat(list(changes.values()), 1).abs()
        lowest = torch.stack(
            [x.topk(int(d * len(x))).values[-1] for x, d in zip(whole, densities, strict=True)]
        )
    for name in base:
        one, stack = base[name].float().flatten(), torch.stack([m[name].float().flatten() for m in models])
        n, measured, draws = len(one), {}, None
        sizes = changes[name].abs().sort(descending=True).values
        if method == "ties":
            last = [max(1, int(d * n)) - 1 for d in densities]
            measured["lowest"] = sizes[range(len(models)), last] if lowest is None else lowest
        if method == "breadcrumbs":
            top = int(0.1 * n)
            last = [top + max(1, int(d * n)) - 1 for d in densities]
            measured = {"highest": sizes[:, top], "lowest": sizes[range(len(models)), last]}
        if method == "slerp":
            a, b = one.double(), stack[0].double()
            angle = torch.arccos((a @ b) / (a.norm() * b.norm())).item()
            t = flags.get("t", 0.5)
            measured["coefficients"] = (
                math.sin((1 - t) * angle) / math.sin(angle),
                math.sin(t * angle) / math.sin(angle),
            )
        if method == "model_stock":
            cosine = torch.cosine_similarity(*changes[name].double(), dim=0)
            measured["ratio"] = (2 * cosine / (1 + cosine)).item() if cosine > 0 else 0.0
        if method.startswith("dare"):
            draws = torch.stack([merge.uniform(seed, i, name, slice(0, n)) for i in range(len(models))])
            if compat == "mergekit":
                kept = changes[name] * (draws < densities[0])
                measured["rescale"] = changes[name].abs().sum(1) / kept.abs().sum(1)
        result = merge.merge_tensors(method, one, stack, p, measured, draws, compat=compat)
        merged[name] = result.view_as(base[name]).to(dtype or base[name].dtype)
    return merged


CASES = [
    ("linear", {"weights": (1.0, 3.0)}, "paper"),
    ("soup", {}, "paper"),
    ("wise_ft", {"t": 0.3}, "paper"),
    ("slerp", {"t": 0.3}, "paper"),
    ("task_arithmetic", {"weights": (1.0, 0.5), "lambda_": 0.7}, "paper"),
    ("ties", {"density": 0.3, "lambda_": 0.7}, "paper"),
    ("ties", {"density": 0.3}, "mergekit"),
    ("dare_linear", {"density": 0.3, "seed": 5}, "paper"),
    ("dare_linear", {"density": 0.3}, "mergekit"),
    ("dare_ties", {"density": 0.3}, "paper"),
    ("dare_ties", {"density": 0.3}, "mergekit"),
    ("breadcrumbs", {"density": 0.3}, "paper"),
    ("model_stock", {}, "paper"),
]


@pytest.mark.parametrize(("method", "flags", "compat"), CASES, ids=[f"{c[0]}-{c[2]}" for c in CASES])
def test_streamed_result_is_that_of_whole_tensors(method, flags, compat, models, run, monkeypatch):
    folders = models[:2] if method in ("wise_ft", "slerp") else models[:3]
    expected = in_memory(method, folders, compat, **flags)
    if method == "breadcrumbs":
        flags = flags | {"outliers": 0.1}
    whole = weights(run(method, folders[0], folders[1:], compat=compat, **flags))
    assert whole.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(whole[name], expected[name], rtol=1e-5, atol=1e-6), name
    monkeypatch.setattr(merge, "TILE", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    tiled = weights(run(method, folders[0], folders[1:], compat=compat, max_shard_size="40KB", **flags))
    for name in expected:  # sums over tiles are rounded otherwise
        exact = method not in ("slerp", "model_stock") and (compat == "paper" or method == "ties")
        close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
        assert torch.allclose(tiled[name], whole[name], **close), name


OWN_DENSITY = [("ties", "paper"), ("ties", "mergekit"), ("breadcrumbs", "paper"), ("dare_linear", "paper")]


@pytest.mark.parametrize(("method", "compat"), OWN_DENSITY, ids=["-".join(case) for case in OWN_DENSITY])
def test_each_model_has_a_density_of_its_own(method, compat, models, run):
    expected = in_memory(method, models[:3], compat, densities=(0.3, 0.6))
    flags = {"density": 0.3, "rule": ("*:density.2=0.6",), "compat": compat}
    flags |= {"outliers": 0.1} if method == "breadcrumbs" else {}
    merged = weights(run(method, models[0], models[1:3], **flags))
    for name in expected:
        assert torch.allclose(merged[name], expected[name], rtol=1e-5, atol=1e-6), name


def test_whole_numbers_do_not_count_among_the_changes_of_ties(models, run, tmp_path):
    counted = [
        changed(tmp_path / f"c{i}", models[i])(lambda t: t.update(counter=torch.arange(50_000)))
        for i in range(3)
    ]
    merged, plain = (weights(run("ties", base, others)) for base, *others in (counted, models[:3]))
    assert all(torch.equal(merged[name], plain[name]) for name in plain)


def test_few_tiles_are_in_memory_at_a_time(models, run, monkeypatch):
    """However far the writer is behind: neither it nor the workers collect what is not written yet."""
    live, most, merge_tile = set(), [0], merge.merge_tile

    def watched(*args):
        work, merged, inner = merge_tile(*args)
        live.add(id(merged))
        weakref.finalize(merged, live.discard, id(merged))
        most[0] = max(most[0], len(live))
        return work, merged, inner

    monkeypatch.setattr(merge, "merge_tile", watched)
    monkeypatch.setattr(merge, "TILE", 64)
    run("linear", None, models[:2])
    assert 1 < most[0] < 16


def test_shard_that_is_not_as_long_as_planned_is_an_error(tmp_path):
    [shard] = merge.plan_shards({"a": [4]}, {"a": torch.float32}, "1GB")
    for tiles in ([torch.ones(3)], [torch.ones(4), torch.ones(1)]):
        with merge.ThreadPoolExecutor(1) as thread, pytest.raises(RuntimeError, match="not 16"):
            merge.write_shard(tmp_path, shard, thread, tiles)


def test_merged_model_differs_from_all_it_came_from(models, run):
    """A method that reads the wrong file would pass where all models are alike."""
    merged = weights(run("task_arithmetic", models[0], models[1:3], weights=(1.0, 0.5)))
    for folder in models[:3]:
        tensors = load_file(folder / "model.safetensors")
        assert all(not torch.equal(merged[name], tensors[name]) for name in merged)


def test_dare_gives_the_same_result_for_a_seed_and_another_for_another(models, run):
    one, same, other = (
        weights(run("dare_linear", models[0], models[1:3], density=0.3, seed=seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one if one[name].numel() > 100)


def test_dare_rescales_to_the_l1_norm_in_mergekit_mode(models, run):
    merged = weights(run("dare_linear", models[0], models[1:2], density=0.3, compat="mergekit"))
    base, model = (load_file(folder / "model.safetensors") for folder in models[:2])
    for name in merged:
        norm = (merged[name] - base[name]).abs().sum().item()
        assert norm == pytest.approx((model[name] - base[name]).abs().sum().item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_is_float32_and_rounds_once(dtype, models, run, tmp_path):
    folders = []
    for i, folder in enumerate(models[:3]):
        tensors = {k: x.to(dtype) for k, x in load_file(folder / "model.safetensors").items()}
        folders.append(write(tmp_path / f"m{i}", folder, tensors))
    merged = weights(run("task_arithmetic", folders[0], folders[1:], lambda_=0.3))
    expected = in_memory("task_arithmetic", folders, lambda_=0.3)
    for name in expected:
        assert merged[name].dtype == dtype and torch.equal(merged[name], expected[name]), name


def test_dtype_of_the_result(models, run, tmp_path):
    tensors = {k: x.bfloat16() for k, x in load_file(models[1] / "model.safetensors").items()}
    half = write(tmp_path / "half", models[1], tensors)
    assert {x.dtype for x in weights(run("wise_ft", models[0], [half])).values()} == {torch.float32}
    assert {x.dtype for x in weights(run("wise_ft", half, [models[0]])).values()} == {torch.bfloat16}
    folder = run("wise_ft", half, [models[0]], dtype="float16")
    assert {x.dtype for x in weights(folder).values()} == {torch.float16}
    assert json.loads((folder / "model" / "config.json").read_text())["dtype"] == "float16"


# What is written --------------------------------------------------------------------------------------------


def logits_of(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Two and two?"}], tokenize=False)
    with torch.no_grad():
        return model, model(**tokenizer(text, return_tensors="pt")).logits


def test_shards_and_index_load_and_give_the_logits_of_one_file(models, run):
    one = run("linear", None, models[1:3])
    several = run("linear", None, models[1:3], max_shard_size="60KB")
    assert sorted(p.name for p in (one / "model").glob("*.safetensors*")) == ["model.safetensors"]
    files = sorted((several / "model").glob("*.safetensors"))
    index = json.loads((several / "model" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == {p.name for p in files}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in weights(one).values())
    for path in files:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            assert all(index["weight_map"][name] == path.name for name in names)
            sizes = [file.get_tensor(name).nbytes for name in names]
        assert sum(sizes) <= 60_000 or len(sizes) == 1
    model, logits = logits_of(several)
    assert torch.isfinite(logits).all() and torch.equal(logits, logits_of(one)[1])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_everything_beside_the_weights_is_copied(models, run):
    merged, lead = run("linear", None, models[1:3]) / "model", models[1]
    names = {p.name for p in lead.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert {p.name for p in merged.iterdir()} == names
    for name in names - {"model.safetensors", "config.json"}:
        assert (merged / name).read_bytes() == (lead / name).read_bytes()


def test_what_was_of_the_weights_of_another_format_is_not_copied(models, run, tmp_path):
    littered = changed(tmp_path / "littered", models[1])()
    stray = ["flax_model.msgpack", "model.onnx", "rust_model.ot", "pytorch_model.bin.index.json"]
    for name in (*stray, "README.md", ".gitattributes", "adapter_config.json", "notes.txt"):
        (littered / name).write_text("{}")
    copied = {path.name for path in (run("linear", None, [littered, models[2]]) / "model").iterdir()}
    assert copied == {path.name for path in models[1].iterdir()} | {"notes.txt"}


def test_shards_are_merged_from_shards(models, run):
    sharded = run("linear", None, models[1:2], max_shard_size="30KB") / "model"
    merged = weights(run("task_arithmetic", models[0], [sharded, models[2]]))
    expected = in_memory("task_arithmetic", models[:3])
    assert all(torch.allclose(merged[name], expected[name], atol=1e-6) for name in expected)


def head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def test_tied_head_that_is_stored_twice_is_written_once(models, run, tmp_path):
    twice = changed(tmp_path / "twice", models[1])(head)
    assert "lm_head.weight" not in weights(run("wise_ft", models[0], [twice]))
    assert "lm_head.weight" not in weights(run("wise_ft", twice, [models[0]]))


def test_untied_head_is_merged(models, run, tmp_path):
    untied = [changed(tmp_path / f"u{i}", models[i], tie_word_embeddings=False)(head) for i in (0, 1)]
    merged = weights(run("wise_ft", untied[0], [untied[1]], t=0.25))
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_whole_numbers_are_copied_and_must_agree(models, run, tmp_path, capfd):
    with_counter = [
        changed(tmp_path / f"c{i}_{n}", models[i])(lambda t, n=n: t.update(counter=torch.tensor([n, 7])))
        for i, n in ((0, 3), (1, 3), (1, 4))
    ]
    merged = weights(run("wise_ft", with_counter[0], with_counter[1:2]))
    assert merged["counter"].tolist() == [3, 7] and merged["counter"].dtype == torch.int64
    line = error_of(lambda: run("wise_ft", with_counter[0], with_counter[2:]), capfd)
    assert "counter" in line and "whole numbers" in line
    for name, dtype in (("short", torch.int32), ("float", torch.float32)):
        other = changed(tmp_path / name, models[1])(
            lambda t, dtype=dtype: t.update(counter=torch.tensor([3, 7], dtype=dtype))
        )
        for pair in ([with_counter[0], other], [other, with_counter[0]]):
            assert "whole numbers" in error_of(lambda pair=pair: run("linear", None, pair), capfd)


def test_tensors_of_several_types_start_at_multiples_of_their_width(models, run, tmp_path):
    mixed = [
        changed(tmp_path / f"t{i}", models[i])(lambda t, dtype=dtype: t.update(a=torch.ones(3, dtype=dtype)))
        for i, dtype in ((0, torch.bfloat16), (1, torch.float32))
    ]
    folder = run("wise_ft", mixed[0], mixed[1:])  # in the file of the model `a` stands among float32
    content = (folder / "model" / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["a"]["dtype"] == "BF16"
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % (2 if name == "a" else 4) == 0, name


def test_scalar_and_empty_tensors(models, run, tmp_path):
    odd = [
        changed(tmp_path / f"o{i}", models[i])(
            lambda t, i=i: t.update(scalar=torch.tensor(2.0 + i), empty=torch.zeros(0, 4))
        )
        for i in (0, 1, 2)
    ]
    for method in ("ties", "breadcrumbs", "model_stock", "dare_linear"):
        merged = weights(run(method, odd[0], odd[1:]))
        assert merged["scalar"].shape == () and merged["empty"].shape == (0, 4)


# What is refused --------------------------------------------------------------------------------------------


def shrink(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-8].clone()
    del tensors["model.norm.weight"]
    tensors["extra.weight"] = torch.zeros(3)


def test_mismatched_models_are_one_error_that_lists_all(models, run, tmp_path, capfd):
    other = changed(tmp_path / "other", models[1])(shrink)
    line = error_of(lambda: run("linear", None, [models[1], other]), capfd)
    for wanted in ("model.norm.weight", "extra.weight", "layers.0.mlp.up_proj", "[128, 64]", "[120, 64]"):
        assert wanted in line
    assert not list(tmp_path.glob("run*"))


def cut_rows(tensors):
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name][:-5].clone()


def rename_token(folder, old, new):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[new] = vocabulary.pop(old)
    path.write_text(json.dumps(tokenizer))
    return folder


def test_mismatched_vocabularies_are_refused(models, run, tmp_path, capfd):
    other = changed(tmp_path / "other", models[1])()
    token = list(json.loads((other / "tokenizer.json").read_text())["model"]["vocab"])[-1]
    line = error_of(lambda: run("linear", None, [models[1], rename_token(other, token, "Ωζ")]), capfd)
    assert "tokens with the ids" in line
    line = error_of(lambda: run("linear", None, [models[1], other], pad_vocab=True), capfd)
    assert "tokens with the ids" in line
    shorter = changed(tmp_path / "shorter", models[2])(cut_rows)
    line = error_of(lambda: run("linear", None, [models[1], shorter]), capfd)
    assert "embed_tokens" in line and "--pad-vocab" in line


def test_pad_vocab_gives_missing_rows_from_the_largest(models, run, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "TILE", 64)
    shorter = changed(tmp_path / "shorter", models[2])(cut_rows)
    merged = weights(run("linear", None, [shorter, models[1]], pad_vocab=True))["model.embed_tokens.weight"]
    long, short = (
        load_file(f / "model.safetensors")["model.embed_tokens.weight"] for f in (models[1], shorter)
    )
    assert torch.equal(merged[-5:], long[-5:]) and merged.shape == long.shape
    assert torch.allclose(merged[:-5], (long[:-5] + short) / 2, atol=1e-7)
    base = weights(run("task_arithmetic", shorter, [models[1]], pad_vocab=True, lambda_=0.5))
    assert torch.equal(base["model.embed_tokens.weight"][-5:], long[-5:])


def add_tokens(folder, like, *texts, more_rows=None):
    """A copy of a model whose tokenizer knows further tokens, with a row each, or as many as are given."""
    rows = len(texts) if more_rows is None else more_rows

    def extend(tensors):
        table = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = torch.cat([table, torch.randn(rows, table.shape[1])])

    count = json.loads((like / "config.json").read_text())["vocab_size"]
    changed(folder, like, vocab_size=count + rows)(extend)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = [
        tokenizer["added_tokens"][0] | {"id": count + i, "content": t} for i, t in enumerate(texts) if t
    ]
    tokenizer["added_tokens"] += tokens
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_pad_vocab_keeps_the_tokens_that_one_model_added(method, models, run, tmp_path, monkeypatch):
    """A table padded beyond its tokens, and one that is shorter, but has a token in each row (Qwen)."""
    monkeypatch.setattr(merge, "TILE", 64)
    padded = add_tokens(tmp_path / "padded", models[0], more_rows=20)
    added = add_tokens(tmp_path / "added", models[1], "<think>", "</think>")
    base = None if method == "linear" else padded
    others = [padded, added] if method == "linear" else [added]
    flags = {"density": 1.0} if method == "ties" else {}
    folder = run(method, base, others, pad_vocab=True, **flags) / "model"
    merged = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    own, other = (load_file(f / "model.safetensors")["model.embed_tokens.weight"] for f in (added, padded))
    n = len(own) - 2
    assert merged.shape == own.shape and torch.equal(merged[n:], own[n:])
    mean = (own[:n] + other[:n]) / 2 if method == "linear" else own[:n]
    assert torch.allclose(merged[:n], mean, atol=1e-6)
    assert (folder / "tokenizer.json").read_bytes() == (added / "tokenizer.json").read_bytes()
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(merged)


@pytest.mark.parametrize("method", ["linear", "soup"])
def test_pad_vocab_with_the_longest_model_not_read(method, models, run, tmp_path):
    """As a base that is only reported on, or as a model that is left out of the soup, it sets the shapes."""
    longest = add_tokens(tmp_path / "longest", models[0], "<think>")
    flags = {"pad_vocab": True}
    if method == "linear":
        folder = run(method, longest, models[1:3], **flags)
    else:
        (tmp_path / "score.py").write_text(f"""
import pathlib
count = pathlib.Path("{tmp_path}/count")
count.write_text((count.read_text() if count.exists() else "") + "x")
print('{{"good": %d}}' % [3, 3, 1, 3, 0][len(count.read_text()) - 1])  # the last one is that of all three
""")
        command = f"{sys.executable} {tmp_path / 'score.py'} {{model}}"
        flags |= {"soup": "greedy", "eval_command": command}
        folder = run(method, None, [*models[1:3], longest], **flags)
    table = load_file(longest / "model.safetensors")["model.embed_tokens.weight"]
    merged = weights(folder)["model.embed_tokens.weight"]
    assert merged.shape == table.shape and torch.equal(merged[-1], table[-1])
    assert not torch.allclose(merged[:-1], table[:-1], atol=1e-4)


def test_tokens_that_padding_cannot_bring_together_are_refused(models, run, tmp_path, capfd):
    one = add_tokens(tmp_path / "one", models[0], "<a>")
    other = add_tokens(tmp_path / "other", models[1], "<b>", "<c>")
    gap = add_tokens(tmp_path / "gap", models[1], "", "<c>")  # its row for <a> is no token's
    same = add_tokens(tmp_path / "same", models[1], "<a>", more_rows=0)
    for second in (other, gap):
        line = error_of(lambda second=second: run("linear", None, [one, second], pad_vocab=True), capfd)
        assert "differ in the tokens" in line
    line = error_of(lambda: run("linear", None, [models[0], same]), capfd)  # same shapes, one token more
    assert "differ in the tokens" in line
    nameless = add_tokens(tmp_path / "nameless", models[1], "<a>", "<b>")
    (nameless / "tokenizer.json").unlink()  # which tokens its further rows are, nobody knows
    assert "embed_tokens" in error_of(lambda: run("linear", None, [one, nameless], pad_vocab=True), capfd)


def test_models_of_different_kinds_are_refused_and_other_settings_noted(models, run, tmp_path, capfd):
    other = changed(tmp_path / "other", models[1], model_type="llama")()
    assert "model_type" in error_of(lambda: run("linear", None, [models[0], other]), capfd)
    longer = changed(tmp_path / "longer", models[1], rope_theta=123.0)()
    run("linear", None, [models[0], longer])
    assert "differ in rope_theta" in capfd.readouterr().out


def test_tied_and_untied_models_do_not_fit(models, run, tmp_path, capfd):
    untied = changed(tmp_path / "untied", models[1], tie_word_embeddings=False)(head)
    assert "tie_word_embeddings" in error_of(lambda: run("linear", None, [models[0], untied]), capfd)

    def other_head(tensors):
        head(tensors)
        tensors["lm_head.weight"] += 1

    wrong = changed(tmp_path / "wrong", models[1])(other_head)
    assert "though the config ties them" in error_of(lambda: run("linear", None, [models[0], wrong]), capfd)


@pytest.mark.parametrize(
    "method", ["linear", "task_arithmetic", "ties", "dare_linear", "breadcrumbs", "slerp"]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_result_that_is_not_finite_is_refused(method, bad, models, run, tmp_path, capfd):
    def poison(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad

    broken = changed(tmp_path / "broken", models[1])(poison)
    line = error_of(lambda: run(method, models[0], [broken]), capfd)
    assert "model.layers.1.mlp.up_proj.weight" in line and "not finite" in line
    assert not list(tmp_path.glob("run*"))


def test_overflow_of_the_type_is_refused(models, run, tmp_path, capfd):
    def enlarge(tensors):
        tensors["model.norm.weight"] += 1e5

    large = changed(tmp_path / "large", models[1])(enlarge)
    assert "float16" in error_of(lambda: run("linear", None, [large], dtype="float16"), capfd)
    run("linear", None, [large], dtype="bfloat16")


def test_existing_folder_is_left_alone(models, run, tmp_path, capfd):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("important")
    line = error_of(lambda: run("linear", None, models[:2], output_dir=str(tmp_path / "mine")), capfd)
    assert "exists" in line and (tmp_path / "mine" / "notes").read_text() == "important"


SWEEP = {"sweep": "weight=0:1:0.5", "eval_command": "python {model}"}
MISTAKES = [
    ({"method": "ties"}, "needs --base"),
    ({"method": "linear", "weights": (1.0,)}, "--weights has 1 numbers for 2 models"),
    ({"method": "linear", "weights": (1.0, -1.0)}, "add up to 0"),
    ({"models": ("0", "1", "2"), "weights": (0.1, 0.2, -0.3)}, "add up to 0"),  # 0.1 + 0.2 > 0.3
    ({"models": (), "base": "0"}, "--base without --models"),
    ({"method": "wise_ft", "t": math.nan}, "not a finite number"),
    ({"method": "task_arithmetic", "base": "0", "lambda_": math.inf}, "not a finite number"),
    ({"weights": (math.nan, 1.0)}, "not a finite number"),
    ({"method": "linear", "density": 0.5}, "has no --density"),
    ({"method": "linear", "lambda_": 0.5}, "has no --lambda"),
    ({"method": "soup", "weights": (1.0, 2.0)}, "has no --weights"),
    ({"method": "slerp", "base": "0"}, "one model"),
    ({"method": "model_stock", "base": "0", "models": ("1",)}, "two models or more"),
    ({"method": "ties", "base": "0", "density": 0.0}, "--density"),
    ({"method": "ties", "base": "0", "density": 1.5}, "--density"),
    ({"method": "ties", "base": "0", "rule": ("layers.0.*:density=0.5",)}, "--compat mergekit"),
    ({"method": "breadcrumbs", "base": "0", "outliers": 1.0}, "--outliers"),
    ({"rule": ("layers.*:weight",)}, "PATTERN:NAME"),
    ({"rule": ("layers.*:weight=half",)}, "not a number"),
    ({"rule": ("layers.*:t=0.5",)}, "no parameter 't'"),
    ({"rule": ("layers.*:weight.3=0.5",)}, "from 1 to 2"),
    ({"rule": ("layers.9.*:weight=0.5",)}, "no tensor matches layers.9.*"),
    ({"sweep": "weight=0:1:0.5"}, "needs an --eval-command"),
    ({"sweep": "weight=0:1", "eval_command": "python {model}"}, "FIRST:LAST:STEP"),
    ({"sweep": "weight=0:1:0", "eval_command": "python {model}"}, "STEP above 0"),
    ({"sweep": "t=0:1:0.5", "eval_command": "python {model}"}, "no parameter 't'"),
    ({"sweep": "weight=0:1:0.5", "eval_command": "python"}, "{model}"),
    ({"sweep": "weight=0:1:0.5", "eval_command": "nonesuch {model}"}, "no program nonesuch"),
    ({"sweep": "weight=0:-0.1:1", "eval_command": "python {model}"}, "LAST from FIRST on"),
    ({"sweep": "weight=0:1:inf", "eval_command": "python {model}"}, "STEP above 0"),
    ({"eval_command": "python {model}"}, "neither is given"),
    ({"eval_metrics": ("loss",)}, "there is none"),
    (SWEEP | {"eval_metrics": ("loss:max",)}, "nothing behind a colon but min"),
    (SWEEP | {"eval_metrics": ("loss", "loss:min")}, "each once"),
    ({"method": "soup", "soup": "greedy"}, "--eval-command"),
    ({"max_shard_size": "5 bottles"}, "--max-shard-size"),
    ({"models": ("/nonesuch/folder",)}, "is no folder"),
]


@pytest.mark.parametrize(("flags", "wanted"), MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_mistakes_are_one_clear_line(flags, wanted, models, tmp_path, capfd):
    def located(name):
        return str(models[int(name)]) if name.isdigit() else name

    flags = {"method": "linear", "models": ("0", "1")} | flags
    flags["models"] = tuple(map(located, flags["models"]))
    flags |= {"base": located(flags["base"])} if "base" in flags else {}
    folder = tmp_path / "run"
    line = error_of(lambda: merge.main(merge.Args(output_dir=str(folder), report=False, **flags)), capfd)
    assert wanted in line and not list(tmp_path.iterdir())


BROKEN = [("config.json", "{"), ("config.json", "[]"), ("model.safetensors", "{"), ("tokenizer.json", "{}")]
BROKEN += [("model.safetensors.index.json", "{}"), ("model.safetensors.index.json", '{"weight_map": []}')]


@pytest.mark.parametrize(("name", "content"), BROKEN)
def test_broken_folder_is_named(name, content, models, run, tmp_path, capfd):
    broken = changed(tmp_path / "broken", models[1])()
    (broken / name).write_text(content)
    assert str(broken / name) in error_of(lambda: run("linear", None, [broken, models[0]]), capfd)


def test_index_that_does_not_fit_its_files_is_refused(models, run, capfd):
    sharded = run("linear", None, models[1:2], max_shard_size="30KB") / "model"
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra"] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    assert "model.extra" in error_of(lambda: run("linear", None, [sharded]), capfd)


def test_folder_that_cannot_be_made_is_one_clear_line(models, run, tmp_path, capfd):
    (tmp_path / "file").write_text("important")
    for place in (tmp_path / "file" / "run", "/proc/run"):
        line = error_of(lambda place=place: run("linear", None, models[:2], output_dir=str(place)), capfd)
        assert str(place) in line
    assert (tmp_path / "file").read_text() == "important"


def test_file_that_cannot_be_read_is_named(models, run, capfd, monkeypatch):
    def copy_or_fail(source, target, **flags):
        if merge.Path(target).parent.name == "model":
            raise OSError(5, "Input/output error", str(source))
        return copyfile(source, target, **flags)

    copyfile = shutil.copyfile
    monkeypatch.setattr(merge.shutil, "copyfile", copy_or_fail)
    line = error_of(lambda: run("linear", None, models[:2]), capfd)
    assert line.startswith(f"error: {models[0]}/") and line.endswith("Input/output error")


def test_partial_folder_of_somebody_else_is_left_alone(models, run, tmp_path, capfd):
    mine = tmp_path / "run0.partial"
    mine.mkdir()
    (mine / "notes").write_text("important")
    assert str(mine) in error_of(lambda: run("linear", None, models[:2]), capfd)
    assert (mine / "notes").read_text() == "important"


def test_all_files_are_on_disk_before_the_folder_has_its_name(models, run, monkeypatch):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(merge.os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), fsync(fd)))
    rename = merge.Path.rename

    def checked(folder, target):
        assert {path.stat().st_ino for path in (folder, *folder.rglob("*"))} <= synced
        return rename(folder, target)

    monkeypatch.setattr(merge.Path, "rename", checked)
    folder = run("linear", None, models[:2], max_shard_size="60KB")
    assert folder.parent.stat().st_ino in synced


KILLED = """
import os, signal, sys
import tyro
import merge

merge.TILE, merge_tile, calls = 64, merge.merge_tile, []

def merge_or_die(*args):
    calls.append(args)
    if len(calls) == 300:
        os.kill(os.getpid(), signal.SIGKILL)
    return merge_tile(*args)

merge.merge_tile = merge_or_die
merge.main(tyro.cli(merge.Args))
"""


def test_kill_half_way_leaves_no_folder_that_looks_finished(models, tmp_path):
    flags = ["--method", "linear", "--models", *models[:2], "--output-dir", tmp_path / "out", "--no-report"]
    done = start(sys.executable, "-c", KILLED, *flags, cwd=tmp_path)
    assert done.returncode == -9, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not (tmp_path / "out.partial" / "model" / "config.json").exists()
    done = start(sys.executable, ROOT / "merge.py", *flags, cwd=tmp_path)  # the rest is in nobody's way
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_finished_folder_appears_at_once(models, run, monkeypatch):
    places, write_others = [], merge.write_other_files

    def watched(folder, *rest):
        places.append(folder.stat().st_ino)
        assert folder.parent.name.endswith(".partial") and not folder.parent.with_suffix("").exists()
        write_others(folder, *rest)

    monkeypatch.setattr(merge, "write_other_files", watched)
    folder = run("linear", None, models[:2])
    assert [(folder / "model").stat().st_ino] == places  # renamed, not copied


def test_full_disk_is_one_clear_line(models, run, tmp_path, capfd, monkeypatch):
    room = SimpleNamespace(free=1000)
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda path: room)
    assert "GB left" in error_of(lambda: run("linear", None, models[:2]), capfd)
    room.free = 1e12

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge.os, "fsync", full)
    assert "No space left" in error_of(lambda: run("linear", None, models[:2]), capfd)
    assert not list(tmp_path.iterdir())


# Rules, sweeps, soups, report -------------------------------------------------------------------------------


def fake_model(layers=5):
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in ("mlp.up", "attn.q")]
    return SimpleNamespace(shapes={name: [2] for name in names})


def resolve(*rules, compat="paper", method="task_arithmetic", num_models=2, **flags):
    models = tuple("ab"[:num_models])
    args = merge.Args(method=method, base="x", models=models, rule=rules, compat=compat, **flags)
    read = [merge.read_rule(rule, args) for rule in rules]
    return merge.settings_of_tensors(fake_model(), read, args, num_models)


def test_rules_hold_for_the_tensors_that_match_and_the_last_one_counts():
    found = resolve("*:lambda=0.9", "layers.*.mlp.*:lambda=0.3", "model.layers.1.*:weight.2=0.5", lambda_=0.1)
    assert found["model.layers.0.attn.q.weight"].lambda_ == 0.9
    assert found["model.layers.4.mlp.up.weight"].lambda_ == 0.3
    assert found["model.layers.1.mlp.up.weight"].weights == (1.0, 0.5)
    assert found["model.layers.2.mlp.up.weight"].weights == (1.0, 1.0)
    assert resolve("*:weight=0.25")["lm_head.weight"].weights == (0.25, 0.25)
    assert resolve(weights=(2.0, 3.0))["lm_head.weight"].weights == (2.0, 3.0)


def test_several_values_are_a_line_over_the_layers():
    found = resolve("*:lambda=0,1,0.5")
    assert [found[f"model.layers.{i}.mlp.up.weight"].lambda_ for i in range(5)] == [0, 0.5, 1, 0.75, 0.5]
    assert found["model.embed_tokens.weight"].lambda_ == 0
    assert found["model.norm.weight"].lambda_ == found["lm_head.weight"].lambda_ == 0.5
    found = resolve("*:lambda=0,1,0.5", compat="mergekit")
    assert found["model.norm.weight"].lambda_ == found["lm_head.weight"].lambda_ == 0


def test_rule_changes_the_merged_tensors_that_match_alone(models, run):
    plain = weights(run("wise_ft", models[0], models[1:2], t=0.25))
    ruled = weights(
        run("wise_ft", models[0], models[1:2], t=0.25, rule=("layers.*.mlp.*:t=1", "layers.1.mlp.*:t=0"))
    )
    base, model = (load_file(folder / "model.safetensors") for folder in models[:2])
    for name in plain:
        expected = plain[name]
        if ".mlp." in name:
            expected = (base if ".layers.1." in name else model)[name]
        assert torch.equal(ruled[name], expected), name


SCORE = """
import json, sys
from safetensors.numpy import load_file
one = load_file(sys.argv[1] + "/model.safetensors")["model.norm.weight"]
print("scoring", sys.argv[1])
print(json.dumps({"distance": float(abs(one - 1.5).mean()), "mean": float(one.mean()), "name": "x"}))
"""


@pytest.fixture
def scored(tmp_path, models):
    """Models whose final norm is 1 to 4, and a command that says how far that is from 1.5."""
    (tmp_path / "score.py").write_text(SCORE)

    def fill(value):
        return lambda tensors: tensors["model.norm.weight"].fill_(value)

    folders = [changed(tmp_path / f"norm{v}", models[0])(fill(v)) for v in (1.0, 2.0, 3.0, 4.0)]
    return folders, f"{sys.executable} {tmp_path / 'score.py'} {{model}}"


def test_sweep_scores_the_models_along_a_line(scored, run):
    folders, command = scored
    folder = run("wise_ft", folders[0], folders[1:2], sweep="t=0:1:0.25", eval_command=command)
    points = json.loads((folder / "sweep.json").read_text())["points"]
    assert [p["t"] for p in points] == [0, 0.25, 0.5, 0.75, 1]
    assert [p["mean"] for p in points] == pytest.approx([1, 1.25, 1.5, 1.75, 2])
    assert [p["distance"] for p in points] == pytest.approx([0.5, 0.25, 0, 0.25, 0.5])
    assert sorted(p.name for p in folder.iterdir()) == ["args.json", "merge.py", "sweep.json", "sweep.png"]
    assert (folder / "sweep.png").stat().st_size > 10_000


def test_sweep_of_the_weight_of_one_model(scored, run):
    folders, command = scored
    flags = {"eval_metrics": ("mean",), "eval_command": command}
    folder = run("task_arithmetic", folders[0], folders[1:3], sweep="weight.2=-1:1:1", **flags)
    points = json.loads((folder / "sweep.json").read_text())["points"]
    assert [p["mean"] for p in points] == pytest.approx([1 + 1 - 2, 1 + 1, 1 + 1 + 2])


def test_sweep_moves_what_no_rule_holds(scored, run):
    folders, command = scored
    flags = {"sweep": "t=0:1:0.5", "eval_command": command}
    for pattern, means in (("model.norm.weight", [1.25, 1.25, 1.25]), ("layers.*", [1, 1.5, 2])):
        folder = run("wise_ft", folders[0], folders[1:2], rule=(f"{pattern}:t=0.25",), **flags)
        points = json.loads((folder / "sweep.json").read_text())["points"]
        assert [p["mean"] for p in points] == pytest.approx(means)


def test_metric_with_the_name_of_the_parameter_does_not_hide_it(models, run, tmp_path):
    (tmp_path / "score.py").write_text('print(\'{"t": 7, "loss": 1}\')')
    flags = {"sweep": "t=0:1:0.5", "eval_command": f"{sys.executable} {tmp_path / 'score.py'} {{model}}"}
    points = json.loads((run("wise_ft", models[0], models[1:2], **flags) / "sweep.json").read_text())[
        "points"
    ]
    assert points == [{"t": t, "loss": 1} for t in (0, 0.5, 1)]


TWICE = """
import pathlib, sys
count = pathlib.Path("{folder}/count")
count.write_text((count.read_text() if count.exists() else "") + "x")
print('{{"loss": 1, "accuracy": 2}}' if len(count.read_text()) < 3 else '{third}')
"""


@pytest.mark.parametrize(("third", "wanted"), [("it broke", "it broke"), ('{"loss": 1}', "with accuracy")])
def test_sweep_that_fails_keeps_what_was_measured(third, wanted, models, run, tmp_path, capfd):
    (tmp_path / "score.py").write_text(TWICE.format(folder=tmp_path, third=third))
    flags = {"sweep": "t=0:1:0.25", "eval_command": f"{sys.executable} {tmp_path / 'score.py'} {{model}}"}
    folder = tmp_path / "mine"

    def start_sweep():
        run("wise_ft", models[0], models[1:2], output_dir=str(folder), **flags)

    capfd.readouterr()
    with pytest.raises(SystemExit):
        start_sweep()
    printed, kept = capfd.readouterr(), tmp_path / "mine.partial"
    assert wanted in printed.err and f"scores so far are in {kept / 'sweep.json'}" in printed.out
    assert not folder.exists() and not (kept / "model").exists()
    points = json.loads((kept / "sweep.json").read_text())["points"]
    assert points == [{"t": t, "loss": 1, "accuracy": 2} for t in (0, 0.25)]
    assert str(kept) in error_of(start_sweep, capfd) and (kept / "sweep.json").exists()  # nor by the next run


def test_greedy_soup_by_an_evaluation_command(scored, run, capfd):
    folders, command = scored
    flags = {"soup": "greedy", "eval_command": command}
    # 1 and 2 are both 0.5 away from 1.5, their mean is there; 3 and 4 make it worse
    folder = run("soup", None, folders[::-1], eval_metrics=("distance:min",), **flags)
    assert weights(folder)["model.norm.weight"].mean().item() == 1.5
    assert "2 of 4 models" in capfd.readouterr().out and not (folder / "candidate").exists()
    folder = run("soup", None, folders, eval_metrics=("mean",), **flags)
    assert weights(folder)["model.norm.weight"].mean().item() == 4
    folder = run("soup", None, folders)  # uniform
    assert weights(folder)["model.norm.weight"].mean().item() == 2.5


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        ("import sys; sys.exit('it broke')", "it broke"),
        ("print('no numbers')", "no numbers"),
        ("print('[1, 2]')", "[1, 2]"),
        ("print('{\"loss\": 1}')", "with accuracy"),
        ("print('{\"accuracy\": NaN}')", "nan for accuracy"),
        ("", "nothing"),
    ],
)
def test_evaluation_command_that_gives_no_metrics_is_named(program, wanted, models, run, tmp_path, capfd):
    (tmp_path / "broken.py").write_text(program)
    command = f"{sys.executable} {tmp_path / 'broken.py'} {{model}}"
    flags = {"sweep": "t=0:1:1", "eval_command": command, "eval_metrics": ("accuracy",)}
    line = error_of(lambda: run("wise_ft", models[0], models[1:2], **flags), capfd)
    assert "--eval-command" in line and wanted in line and not list(tmp_path.glob("run*"))


def test_report_has_the_norms_and_cosines_of_the_task_vectors(models, run, capfd, monkeypatch):
    monkeypatch.setattr(merge, "TILE", 64)
    folder = run("task_arithmetic", models[0], models[1:3], report=True)
    base, *others = (load_file(f / "model.safetensors") for f in models[:3])
    found = json.loads((folder / "report.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"

    def expected(names):
        one = torch.cat([base[n].flatten() for n in names]).double()
        a, b = (torch.cat([o[n].flatten() for n in names]).double() - one for o in others)
        cosine = [(x @ y / (x.norm() * y.norm())).item() for x, y in ((a, b), (a, one), (b, one))]
        return [a.norm().item(), b.norm().item(), (a.norm() / one.norm()).item(), *cosine]

    def reported(figures):
        near = figures["norm"] + figures["relative_norm"][:1] + [figures["cosine"]["1-2"]]
        return near + figures["cosine_with_base"]

    assert reported(found["tensors"][name]) == pytest.approx(expected([name]), rel=1e-4, abs=1e-5)
    kind = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    assert reported(found["kinds"]["model.layers.*.mlp.up_proj.weight"]) == pytest.approx(
        expected(kind), rel=1e-4, abs=1e-5
    )
    assert reported(found["whole"]) == pytest.approx(expected(list(base)), rel=1e-4, abs=1e-5)
    assert found["tensors"].keys() == base.keys() and (folder / "report.png").stat().st_size > 10_000
    printed = capfd.readouterr().out
    assert f"{found['whole']['cosine']['1-2']:+.4f}" in printed and "cosine 1-2" in printed


def test_report_says_how_many_columns_it_leaves_out(models, run, capfd):
    run("linear", models[0], [*models[1:], models[1]], report=True)  # 4 norms and 6 cosines
    assert "and 1 more in report.json" in capfd.readouterr().out
    run("linear", None, models, report=True)
    assert "more in report.json" not in capfd.readouterr().out
    run("linear", None, models[1:2], report=True)  # a model alone: nothing to compare
    assert "task vector" not in capfd.readouterr().out


def test_report_without_a_base_is_about_the_first_model(models, run):
    found = json.loads((run("linear", None, models[:3], report=True) / "report.json").read_text())
    as_base = json.loads((run("linear", models[0], models[1:3], report=True) / "report.json").read_text())
    assert found["base"] == str(models[0]) and found["whole"] == as_base["whole"]


# The command line -------------------------------------------------------------------------------------------


def test_default_run_merges_half_way_from_base_to_sft(tiny, tmp_path):
    done = start(sys.executable, ROOT / "merge.py", cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    [folder] = (tmp_path / "runs").iterdir()
    merged = weights(folder)
    base, sft = (load_file(tiny / name / "model.safetensors") for name in ("base", "sft"))
    for name in merged:
        assert torch.equal(merged[name], torch.lerp(base[name].float(), sft[name].float(), 0.5).bfloat16())
    assert (folder / "report.png").exists() and "model.layers.*.mlp.up_proj.weight" in done.stdout
    assert torch.isfinite(logits_of(folder)[1]).all()


def test_help_names_every_flag(tmp_path):
    done = start(sys.executable, ROOT / "merge.py", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = [f"--{flag.name.strip('_').replace('_', '-')}" for flag in flags(ROOT / "merge.py")]
    assert [name for name in names if not re.search(rf"{name}\b", done.stdout)] == []
    assert list(tmp_path.iterdir()) == []


def test_mistakes_come_before_anything_slow_and_transformers_is_not_needed(tmp_path):
    done = start(sys.executable, ROOT / "merge.py", "--method", "ties", "--models", "a", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    code = "import sys, merge; print([m for m in ('transformers', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_summary_has_the_documented_keys(models, scored, tmp_path):
    args = {"models": tuple(map(str, models[1:3])), "base": str(models[0])}
    keys = set(merge.main(merge.Args(**args, output_dir=str(tmp_path / "a"))))
    sweep = {"sweep": "t=0:1:1", "eval_command": scored[1], "method": "wise_ft", "models": args["models"][:1]}
    keys |= set(merge.main(merge.Args(**args | sweep, output_dir=str(tmp_path / "b"))))
    assert metric_differences(ROOT / "merge.py", keys) == []


def test_progress_says_how_long_it_takes(models, capfd, monkeypatch):
    clock = iter(range(0, 1000, 15))
    monkeypatch.setattr(merge.time, "perf_counter", lambda: next(clock))
    progress = merge.Progress("merging", [merge.Checkpoint(str(models[0]))])
    total = sum(x.numel() for x in load_file(models[0] / "model.safetensors").values())
    progress.update(total // 4)  # after 15 seconds: 45 are left
    progress.bar.close()
    assert "left 0:45" in capfd.readouterr().out


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_progress_ends_at_all_that_was_read(compat, models, run, monkeypatch):
    bars = []

    class Watched(merge.Progress):
        def __init__(self, *args, **flags):
            super().__init__(*args, **flags)
            bars.append(self)

    monkeypatch.setattr(merge, "Progress", Watched)
    run("ties", models[0], models[1:3], compat=compat)
    size = 3 * sum(x.nbytes for x in load_file(models[0] / "model.safetensors").values())
    assert [bar.total for bar in bars] == ([2 * size] if compat == "paper" else []) + [size]
    assert [bar.done for bar in bars] == pytest.approx([bar.total for bar in bars])


def test_interrupted_run_is_one_line_and_leaves_nothing(models, tmp_path):
    flags = ["--method", "wise_ft", "--base", models[0], "--models", models[1], "--sweep", "t=0:1:0.5"]
    flags += ["--eval-command", "sh -c 'kill -INT $PPID; sleep 9' {model}", "--output-dir", tmp_path / "out"]
    done = start(sys.executable, ROOT / "merge.py", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "interrupted\n") and not list(tmp_path.iterdir())


def test_ratios_without_start_up_are_those_of_the_page():
    result = json.loads((ROOT / "benchmarks" / "results" / "merge_vs_mergekit.json").read_text())
    start_up = {who: seconds["median"] for who, seconds in result["startup_seconds"].items()}
    page = (ROOT / "docs" / "merge.md").read_text()
    for method in ("linear", "slerp", "ties"):
        ours, theirs = (
            result["contenders"][f"{who}_{method}"]["seconds"]["median"] - start_up[who]
            for who in ("cleanpost", "mergekit")
        )
        assert re.search(rf"{ours / theirs:.2f} \(`{method}`\)", page), method


def test_alignment_tax_scores_a_model():
    command = [ROOT / "benchmarks" / "alignment_tax.py", "--model", "tiny/sft", "--num-eval", "4"]
    done = start(sys.executable, *command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])
    assert scores.keys() == {"accuracy", "greedy_accuracy", "perplexity"}
    assert scores["greedy_accuracy"] > 0.5 and 10 < scores["perplexity"] < 200
