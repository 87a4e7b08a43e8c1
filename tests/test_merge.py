"""Merging: formulas against values worked by hand, and the streamed result against whole tensors in memory.

The models are small and made here: a random one, and copies of it whose weights were moved.
"""

import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, start
from safetensors.torch import load_file, save_file
from sync_docs import metric_differences

import merge

pytestmark = pytest.mark.usefixtures("one_cpu")
NEEDS_BASE = {"task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs"}


@pytest.fixture(scope="module")
def models(random_model, tmp_path_factory):
    """Folders 0 to 3: a random model and three that were moved away from it, in float32."""
    folders, weights = [], load_file(random_model / "model.safetensors")
    for seed in range(4):
        random = torch.Generator().manual_seed(seed)
        noise = {k: 0.02 * bool(seed) * torch.randn(x.shape, generator=random) for k, x in weights.items()}
        moved = {name: x.float() + noise[name] for name, x in weights.items()}
        folders.append(write(tmp_path_factory.mktemp("models") / f"model{seed}", random_model, moved))
    return folders


def write(folder, like, tensors, **config):
    """A model folder with other weights, and another config where one is given."""
    shutil.copytree(like, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def changed(folder, like, change=lambda tensors: None, **config):
    """A copy of a model in which `change(tensors)` has been at work."""
    tensors = load_file(like / "model.safetensors")
    change(tensors)
    return write(folder, like, tensors, **config)


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
    files = sorted((folder / "model").glob("*.safetensors"))
    return {name: x for path in files for name, x in load_file(path).items()}


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


def test_averages_by_hand_and_exact_at_their_ends():
    assert merge.linear(vectors([1, 2], [3, 6]), torch.tensor([1.0, 3.0])).tolist() == [2.5, 5]
    assert merge.linear(vectors([1, 2], [3, 6]), torch.tensor([5.0, 5.0])).tolist() == [2, 4]
    assert merge.wise_ft(vectors([0, 4])[0], vectors([2, 0])[0], 0.25).tolist() == [0.5, 3]
    base, tensor = torch.randn(2, 1000)
    assert torch.equal(merge.wise_ft(base, tensor, 0.0), base)
    assert torch.equal(merge.wise_ft(base, tensor, 1.0), tensor)
    changes, two = vectors([2, 0], [0, -1]), torch.tensor([1.0, 2.0])
    merged = merge.task_arithmetic(torch.ones(2), changes, two, 0.5)
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
    angle = 0.02  # its cosine is 0.9998: an arc in paper, a line in mergekit
    end, half = [math.cos(angle), math.sin(angle)], [math.cos(angle / 2), math.sin(angle / 2)]
    assert arc([1, 0], end, 0.5).tolist() == pytest.approx(half, abs=1e-6)
    assert math.hypot(*arc([1, 0], end, 0.5).tolist()) == pytest.approx(1, abs=1e-6)
    assert math.hypot(*arc([1, 0], end, 0.5, "mergekit").tolist()) == pytest.approx(half[0], abs=1e-6)


def test_ties_by_hand():
    task_vectors = vectors([4, -1, 2, 0.5], [3, 2, -3, -0.5], [-1, 2, -2, 0.2])
    trimmed = merge.trim(task_vectors, torch.tensor([2.0, 3.0, 2.0]))  # the largest half of each
    assert trimmed.tolist() == [[4, 0, 2, 0], [3, 0, -3, 0], [0, 2, -2, 0]]
    # elected: + (4 + 3), + (2), - (2 - 3 - 2), none
    assert merge.ties(trimmed, torch.ones(3)).tolist() == [3.5, 2, -2.5, 0]
    assert merge.ties(trimmed, torch.ones(3), mean=False).tolist() == [7, 2, -5, 0]
    # weights 1, 1, 0.5: the third number has 2 - 3 - 1 < 0, and (-3 - 1) / 1.5
    weighted = merge.ties(trimmed, torch.tensor([1.0, 1.0, 0.5]))
    assert weighted.tolist() == pytest.approx([3.5, 2, -4 / 1.5, 0])
    balanced = vectors([2, 1], [-2, 1])  # a sum of 0 elects nothing, in mergekit plus
    assert merge.ties(balanced, torch.ones(2)).tolist() == [0, 1]
    assert merge.ties(balanced, torch.ones(2), compat="mergekit").tolist() == [2, 1]
    # a negative weight takes the change off: weighted 1 and 1.5, so 2.5 over the sizes of the weights
    assert merge.ties(vectors([1, -2]), torch.tensor([-1.0])).tolist() == [-1, 2]
    assert merge.ties(vectors([1], [-3]), torch.tensor([1.0, -0.5])).item() == pytest.approx(2.5 / 1.5)


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
    largest = [row.abs().topk(k).values[-1] for row, k in zip(x, [1, 7, 5000], strict=True)]
    assert kth_largest(x, [1, 7, 5000]).tolist() == largest


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
    draws, model, quarter = vectors([0.1, 0.3, 0.24, 0.9]), vectors([4, 8, -2, 1]), torch.tensor([0.25])
    assert merge.dare(model, draws, quarter).tolist() == [[4, 0, -2, 0]]
    merged = merge.merge_tensors("dare_linear", torch.zeros(4), model, settings(densities=(0.25,)), {}, draws)
    assert merged.tolist() == [16, 0, -8, 0]  # divided by the density
    base, models, draws = torch.zeros(2), vectors([4, 2], [2, -2]), torch.zeros(2, 2)
    half = settings(weights=(1.0, 1.0), densities=(0.5, 0.5), lambda_=0.5)
    merged = merge.merge_tensors("dare_ties", base, models, half, {}, draws)
    assert merged.tolist() == [3, 0]  # 0.5 (8 + 4) / 2; 4 - 4 elects nothing
    same_norm = {"rescale": torch.ones(2)}
    merged = merge.merge_tensors("dare_ties", base, models, half, same_norm, draws, "mergekit")
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
    assert torch.equal(merge.uniform(1, 0, "w", slice(64, 128)), whole[64:128])
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
    # where the formula has no value, or no bound
    assert stock([1, 2], [2, 3], [0, 1]) == [1, 2]  # opposite: 0 / 0
    assert stock([1, 2], [1, 2], [1, 2]) == [1, 2]  # no change at all
    assert stock([1, 2], [1, 2], [3, 2]) == [1, 2]  # one that did not change
    obtuse = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, -0.5], [0.0, -0.5, 1.0]], dtype=torch.float64)
    assert merge.model_stock_ratio(obtuse) == 0
    assert merge.model_stock_ratio(obtuse, compat="mergekit") == pytest.approx(-2)  # 2 (-1/2) / (1 - 1/2)
    tiny = torch.tensor([[1.0, 0, 0], [0, 1e-8, 5e-9], [0, 5e-9, 1e-8]], dtype=torch.float64)
    assert merge.model_stock_ratio(tiny) == pytest.approx(2 / 3)  # 2 (1/2) / (1 + 1/2)
    # mergekit: the cosine is 5e-9 / 1e-6
    assert merge.model_stock_ratio(tiny, compat="mergekit") == pytest.approx(0.01 / 1.005)


def test_greedy_soup_keeps_what_does_not_make_it_worse():
    table, asked = {(1, 2): 0.85, (1, 0): 0.92, (1, 0, 3): 0.92}, []
    kept = merge.greedy_soup([0.5, 0.9, 0.7, 0.2], lambda i: asked.append(tuple(i)) or table[tuple(i)])
    assert kept == [1, 0, 3] and asked == [(1, 2), (1, 0), (1, 0, 3)]  # an equal score is good enough


@pytest.mark.parametrize("method", sorted(NEEDS_BASE))
def test_one_model_at_density_one_is_task_arithmetic(method):
    base, model = torch.randn(2, 512, generator=torch.Generator().manual_seed(1))
    one, measured = settings(lambda_=0.7), {"lowest": torch.zeros(1)}
    merged = merge.merge_tensors(method, base, model[None], one, measured, torch.rand(1, 512))
    assert torch.allclose(merged, base + 0.7 * (model - base), atol=1e-6)


@pytest.mark.parametrize("method", sorted(NEEDS_BASE | {"model_stock", "slerp", "wise_ft", "linear"}))
@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_zero_task_vectors_leave_the_base(method, compat, models, run):
    copies = [models[0]] * (1 if method in ("slerp", "wise_ft") else 2)
    merged = weights(run(method, models[0], copies, compat=compat))
    base = load_file(models[0] / "model.safetensors")
    for name in base:
        assert torch.allclose(merged[name], base[name], rtol=1e-6, atol=0), name


# Streams ----------------------------------------------------------------------------------------------------


def in_memory(method, folders, compat="paper", **flags):
    """The merged tensors from whole tensors, thresholds by sorting; slerp and model_stock: test_peers.py."""
    loaded = [load_file(folder / "model.safetensors") for folder in folders]
    densities = (flags.get("density", 0.3), 0.6 if "rule" in flags else flags.get("density", 0.3))
    t, count = flags.get("t", 0.5), len(folders) - 1
    p = settings(flags.get("weights", (1.0,) * count), densities, flags.get("lambda_", 1.0), t, 0.1)
    stacks = {k: torch.stack([tensors[k].float().flatten() for tensors in loaded]) for k in loaded[0]}
    changes = {k: stack[1:] - stack[0] for k, stack in stacks.items()}
    whole = [torch.cat([change[i] for change in changes.values()]).abs() for i in range(count)]
    of_whole = [x.topk(int(d * len(x))).values[-1] for x, d in zip(whole, densities, strict=False)]
    merged = {}
    for name, (one, *others) in stacks.items():
        n, change, measured, draws = len(one), changes[name], {}, None
        sizes = change.abs().sort(descending=True).values
        last = [max(1, int(d * n)) - 1 for d in densities[:count]]
        if method == "ties":
            measured["lowest"] = sizes[range(count), last]
            if compat == "paper":
                measured["lowest"] = torch.stack(of_whole)
        if method == "breadcrumbs":
            top = int(0.1 * n)
            measured = {"highest": sizes[:, top], "lowest": sizes[range(count), [top + i for i in last]]}
        if method.startswith("dare"):
            seed, tile = flags.get("seed", 1), slice(0, n)
            draws = torch.stack([merge.uniform(seed, i, name, tile) for i in range(count)])
            kept = change * (draws < torch.tensor(densities[:count])[:, None])
            if compat == "mergekit":
                measured["rescale"] = change.abs().sum(1) / kept.abs().sum(1)
        result = merge.merge_tensors(method, one, torch.stack(others), p, measured, draws, compat)
        merged[name] = result.view_as(loaded[0][name]).to(loaded[0][name].dtype)
    return merged


OWN_DENSITY = {"density": 0.3, "rule": ("*:density.2=0.6",)}
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
    ("ties", OWN_DENSITY, "paper"),
    ("ties", OWN_DENSITY, "mergekit"),
    ("breadcrumbs", OWN_DENSITY, "paper"),
    ("dare_linear", OWN_DENSITY, "paper"),
]


@pytest.mark.parametrize(("method", "flags", "compat"), CASES)
def test_streamed_result_is_that_of_whole_tensors(method, flags, compat, models, run, monkeypatch):
    folders = models[:2] if method in ("wise_ft", "slerp") else models[:3]
    expected = {} if method in ("slerp", "model_stock") else in_memory(method, folders, compat, **flags)
    if method == "breadcrumbs":
        flags = flags | {"outliers": 0.1}
    whole = weights(run(method, folders[0], folders[1:], compat=compat, **flags))
    for name in expected:
        assert torch.allclose(whole[name], expected[name], rtol=1e-5, atol=1e-6), name
    monkeypatch.setattr(merge, "TILE", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    tiled = weights(run(method, folders[0], folders[1:], compat=compat, max_shard_size="40KB", **flags))
    assert whole.keys() == tiled.keys()
    for name in whole:  # sums over tiles are rounded otherwise
        exact = method not in ("slerp", "model_stock") and (compat == "paper" or method == "ties")
        close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
        assert torch.allclose(tiled[name], whole[name], **close), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_is_float32_and_rounds_once_to_the_type_of_the_base(dtype, models, run, tmp_path):
    folders = []
    for i, folder in enumerate(models[:3]):
        tensors = {k: x.to(dtype) for k, x in load_file(folder / "model.safetensors").items()}
        folders.append(write(tmp_path / f"m{i}", folder, tensors))
    merged = weights(run("task_arithmetic", folders[0], folders[1:], lambda_=0.3))
    for name, expected in in_memory("task_arithmetic", folders, lambda_=0.3).items():
        assert merged[name].dtype == dtype and torch.equal(merged[name], expected), name
    assert {x.dtype for x in weights(run("wise_ft", models[0], folders[:1])).values()} == {torch.float32}
    folder = run("wise_ft", folders[0], models[:1], out_dtype="float16")
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


def test_shards_load_give_the_logits_of_one_file_and_can_be_merged_again(models, run):
    one = run("linear", None, models[1:3])
    several = run("linear", None, models[1:3], max_shard_size="60KB")
    files = sorted((several / "model").glob("*.safetensors"))
    index = json.loads((several / "model" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == {p.name for p in files}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in weights(one).values())
    for path in files:
        tensors = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in tensors)
        assert sum(x.nbytes for x in tensors.values()) <= 60_000 or len(tensors) == 1
        assert path.stat().st_mode == (several / "args.json").stat().st_mode
    model, logits = logits_of(several)
    assert torch.isfinite(logits).all() and torch.equal(logits, logits_of(one)[1])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = weights(run("linear", None, [several / "model"]))
    assert all(torch.equal(again[name], x) for name, x in weights(one).items())
    index["weight_map"]["model.extra"] = files[0].name
    (several / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SystemExit):
        run("linear", None, [several / "model"])


def test_everything_beside_the_weights_is_copied_but_no_weights_of_other_formats(models, run, tmp_path):
    littered = changed(tmp_path / "littered", models[1])
    stray = ["flax_model.msgpack", "model.onnx", "rust_model.ot", "pytorch_model.bin.index.json"]
    for name in (*stray, "README.md", ".gitattributes", "adapter_config.json", "notes.txt"):
        (littered / name).write_text("{}")
    merged = run("linear", None, [littered, models[2]]) / "model"
    names = {path.name for path in models[1].iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert {path.name for path in merged.iterdir()} == names | {"notes.txt"}
    for name in names - {"model.safetensors", "config.json"}:
        assert (merged / name).read_bytes() == (littered / name).read_bytes()


def head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def test_heads_tied_stored_twice_and_untied(models, run, tmp_path, capfd):
    twice = changed(tmp_path / "twice", models[1], head)
    assert "lm_head.weight" not in weights(run("wise_ft", models[0], [twice]))
    assert "lm_head.weight" not in weights(run("wise_ft", twice, [models[0]]))
    untied = [changed(tmp_path / f"u{i}", models[i], head, tie_word_embeddings=False) for i in (0, 1)]
    merged = weights(run("wise_ft", untied[0], [untied[1]], t=0.25))
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    line = error_of(lambda: run("linear", None, [models[0], untied[1]]), capfd)
    assert "tie_word_embeddings" in line and "lm_head.weight" in line
    wrong = changed(tmp_path / "wrong", twice, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert "though the config ties them" in error_of(lambda: run("linear", None, [models[0], wrong]), capfd)


def test_whole_numbers_are_copied_and_must_agree(models, run, tmp_path, capfd):
    def counting(name, numbers, dtype=torch.int64):
        counter = torch.tensor(numbers, dtype=dtype)
        return changed(tmp_path / name, models[0], lambda t: t.update(counter=counter))

    one, same, other = counting("a", [3, 7]), counting("b", [3, 7]), counting("c", [4, 7])
    merged = weights(run("wise_ft", one, [same]))
    assert merged["counter"].tolist() == [3, 7] and merged["counter"].dtype == torch.int64
    long, short = counting("long", [3] * 50_000), counting("short", [3, 7], torch.int32)
    for pair in ([one, other], [one, short], [short, one], [one, counting("float", [3, 7], torch.float32)]):
        line = error_of(lambda pair=pair: run("linear", None, pair), capfd)
        assert "counter" in line and "whole numbers" in line
    move = lambda tensors: tensors["model.norm.weight"].add_(1)
    counted = weights(run("ties", long, [changed(tmp_path / "tuned", long, move)]))
    merged = weights(run("ties", models[0], [changed(tmp_path / "plain", models[0], move)]))
    assert all(torch.equal(counted[name], merged[name]) for name in merged)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "model_stock", "dare_linear"])
def test_scalar_and_empty_tensors_and_other_types(method, models, run, tmp_path):
    def odd(i):
        more = {"scalar": torch.tensor(2.0 + i), "empty": torch.zeros(0, 4)}
        more["mixed"] = torch.ones(3, dtype=torch.float32 if i else torch.bfloat16)  # two bytes among four
        return changed(tmp_path / f"o{i}", models[i], lambda t: t.update(more))

    merged = weights(run(method, odd(0), [odd(1), odd(2)]))
    assert merged["scalar"].shape == () and merged["empty"].shape == (0, 4)
    assert merged["mixed"].dtype == torch.bfloat16 and merged["mixed"].tolist() == [1, 1, 1]


# What is refused --------------------------------------------------------------------------------------------


def shrink(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-8].clone()
    del tensors["model.norm.weight"]
    tensors["extra.weight"] = torch.zeros(3)


def test_mismatched_models_are_one_error_that_lists_all(models, run, tmp_path, capfd):
    other = changed(tmp_path / "other", models[1], shrink)
    line = error_of(lambda: run("linear", None, [models[1], other]), capfd)
    for wanted in ("model.norm.weight", "extra.weight", "layers.0.mlp.up_proj", "[128, 64]", "[120, 64]"):
        assert wanted in line
    llama = changed(tmp_path / "llama", models[1], model_type="llama")
    assert "model_type" in error_of(lambda: run("linear", None, [models[0], llama]), capfd)
    odd = torch.zeros(2).to(torch.float8_e4m3fn)
    eight = changed(tmp_path / "eight", models[1], lambda tensors: tensors.update(odd=odd))
    assert "F8_E4M3" in error_of(lambda: run("linear", None, [eight]), capfd)
    assert not list(tmp_path.glob("run*"))
    longer = changed(tmp_path / "longer", models[1], rope_theta=123.0)
    run("linear", None, [models[0], longer])
    assert "differ in rope_theta" in capfd.readouterr().out


EMBEDDING = "model.embed_tokens.weight"


def with_tokens(folder, like, *texts, more_rows=None):
    """A copy of a model whose tokenizer knows further tokens, with a row each, or as many as are given."""
    rows = len(texts) if more_rows is None else more_rows
    count = json.loads((like / "config.json").read_text())["vocab_size"]

    def resize(tensors):
        table = tensors[EMBEDDING]
        tensors[EMBEDDING] = torch.cat([table, torch.randn(max(rows, 0), 64)])[: count + rows].clone()

    changed(folder, like, resize, vocab_size=count + rows)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    token, added = tokenizer["added_tokens"][0], tokenizer["added_tokens"]
    added += [token | {"id": count + i, "content": text} for i, text in enumerate(texts) if text]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_pad_vocab_keeps_the_tokens_that_one_model_added(method, models, run, tmp_path, monkeypatch):
    """A table padded beyond its tokens, and one that is shorter, but has a token in each row (Qwen)."""
    monkeypatch.setattr(merge, "TILE", 64)
    padded = with_tokens(tmp_path / "padded", models[0], more_rows=20)
    added = with_tokens(tmp_path / "added", models[1], "<think>", "</think>")
    base = None if method == "linear" else padded
    others = [padded, added] if method == "linear" else [added]
    flags = {"density": 1.0} if method == "ties" else {}
    folder = run(method, base, others, pad_vocab=True, **flags) / "model"
    merged = load_file(folder / "model.safetensors")[EMBEDDING]
    own, other = (load_file(f / "model.safetensors")[EMBEDDING] for f in (added, padded))
    n = len(own) - 2
    assert merged.shape == own.shape and torch.equal(merged[n:], own[n:])
    mean = (own[:n] + other[:n]) / 2 if method == "linear" else own[:n]
    assert torch.allclose(merged[:n], mean, atol=1e-6)
    assert (folder / "tokenizer.json").read_bytes() == (added / "tokenizer.json").read_bytes()
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(merged)


def test_vocabularies_that_do_not_fit_are_refused(models, run, tmp_path, capfd):
    one = with_tokens(tmp_path / "one", models[0], "<a>")
    renamed = with_tokens(tmp_path / "renamed", models[1], "<b>")
    other = with_tokens(tmp_path / "other", models[1], "<b>", "<c>")
    gap = with_tokens(tmp_path / "gap", models[1], "", "<c>")  # its row for <a> is no token's
    same = with_tokens(tmp_path / "same", models[1], "<a>", more_rows=0)  # same shapes, one token more
    nameless = with_tokens(tmp_path / "nameless", models[1], "<a>", "<b>")
    (nameless / "tokenizer.json").unlink()  # which tokens its further rows are, nobody knows
    shorter = with_tokens(tmp_path / "shorter", models[2], more_rows=-5)
    for pair, pad_vocab, wanted in (
        ([one, renamed], False, "differ in the tokens"),
        ([one, renamed], True, "differ in the tokens"),
        ([one, other], True, "differ in the tokens"),
        ([one, gap], True, "differ in the tokens"),
        ([models[0], same], False, "differ in the tokens"),
        ([one, nameless], True, "embed_tokens"),
        ([models[1], shorter], False, "--pad-vocab"),
    ):
        line = error_of(lambda pair=pair, pad=pad_vocab: run("linear", None, pair, pad_vocab=pad), capfd)
        assert wanted in line, pair


@pytest.mark.parametrize("method", ["linear", *sorted(NEEDS_BASE), "slerp"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_result_that_is_not_finite_is_refused(method, bad, models, run, tmp_path, capfd):
    def poison(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad  # 1e38: beyond float16 for all shares of it

    broken = changed(tmp_path / "broken", models[1], poison)
    # Without these breadcrumbs drops the largest, and DARE may: then it is not in the result.
    more = {"breadcrumbs": {"outliers": 0.0}}.get(method, {"density": 1.0} if "dare" in method else {})
    line = error_of(lambda: run(method, models[0], [broken], out_dtype="float16", **more), capfd)
    assert "model.layers.1.mlp.up_proj.weight" in line and "not finite" in line
    assert not list(tmp_path.glob("run*"))


GREEDY = {"method": "soup", "eval_command": "echo 1 {model}"}
MISTAKES = [
    ({"method": "ties"}, "needs --base"),
    ({"weights": (1.0,)}, "--weights has 1 numbers for 2 models"),
    ({"models": ("0", "1", "2"), "weights": (0.1, 0.2, -0.3)}, "add up to 0"),  # 0.1 + 0.2 > 0.3
    ({"weights": (math.nan, 1.0)}, "--weights nan: Input should be a finite number"),
    ({"models": (), "base": "0"}, "--base without --models"),
    ({"method": "wise_ft", "base": "0", "models": ("1",), "t": math.nan}, "--t nan"),
    ({"density": 0.5}, "linear has no density"),
    ({"lambda_": 0.5}, "linear has no lambda"),
    ({"method": "slerp", "base": "0"}, "one model"),
    ({"method": "model_stock", "base": "0", "models": ("1",)}, "two models or more"),
    ({"method": "ties", "base": "0", "density": 0.0}, "--density 0.0"),
    ({"method": "ties", "base": "0", "rule": ("layers.0.*:density=0.5",)}, "--compat mergekit"),
    ({"method": "ties", "base": "0", "rule": ("*:density=0",)}, "greater than 0"),
    ({"method": "breadcrumbs", "base": "0", "outliers": 1.0}, "--outliers 1.0"),
    ({"rule": ("layers.*:weight",)}, "PATTERN:NAME"),
    ({"rule": ("layers.*:weight=half",)}, "valid number"),
    ({"rule": ("layers.*:t=0.5",)}, "linear has no t"),
    ({"rule": ("layers.*:weight.3=0.5",)}, "from 1 to 2"),
    ({"rule": ("layers.9.*:weight=0.5",)}, "no tensor matches layers.9.*"),
    ({"eval_command": "echo 1 {model}"}, "--method soup"),
    ({"method": "soup", "eval_command": "echo 1"}, "{model}"),
    (GREEDY | {"eval_command": "echo it broke >&2; false {model}"}, "it broke"),
    (GREEDY | {"eval_command": "echo {model} nan"}, "a finite number last"),
    ({"max_shard_size": "5 bottles"}, "--max-shard-size 5 bottles"),
    ({"models": ("/nonesuch/folder",)}, "/nonesuch/folder cannot be read"),
]


@pytest.mark.parametrize(("flags", "wanted"), MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_mistakes_are_one_clear_line(flags, wanted, models, tmp_path, capfd):
    def located(name):
        return str(models[int(name)]) if name.isdigit() else name

    flags = {"method": "linear", "models": ("0", "1")} | flags
    flags["models"] = tuple(map(located, flags["models"]))
    flags |= {"base": located(flags["base"])} if "base" in flags else {}
    line = error_of(lambda: merge.main(merge.Args(output_dir=str(tmp_path / "run"), **flags)), capfd)
    assert wanted in line and not list(tmp_path.iterdir())


BROKEN = [("config.json", "{"), ("config.json", "[]"), ("model.safetensors", "{"), ("tokenizer.json", "{}")]
BROKEN += [("model.safetensors.index.json", "{}"), ("model.safetensors.index.json", '{"weight_map": []}')]


@pytest.mark.parametrize(("name", "content"), BROKEN)
def test_broken_file_is_named(name, content, models, run, tmp_path, capfd):
    broken = changed(tmp_path / "broken", models[1])
    (broken / name).write_text(content)
    assert str(broken / name) in error_of(lambda: run("linear", None, [broken, models[0]]), capfd)


def test_folder_that_exists_or_cannot_be_made_is_one_clear_line(models, run, tmp_path, capfd):
    (tmp_path / "file").write_text("important")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("important")
    for place in (tmp_path / "mine", tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        line = error_of(lambda place=place: run("linear", None, models[:2], output_dir=str(place)), capfd)
        assert line.startswith(f"error: --output-dir {place}: ")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]
    assert (tmp_path / "file").read_text() == (tmp_path / "mine" / "notes").read_text() == "important"


NO_SPACE = "No space left on device"
FAILURES = [
    ("shutil.disk_usage", lambda path: SimpleNamespace(free=1000), "no room for"),
    ("os.fsync", Mock(side_effect=OSError(28, NO_SPACE)), NO_SPACE),
    ("save_file", Mock(side_effect=merge.SafetensorError(f"I/O error: {NO_SPACE} (os error 28)")), NO_SPACE),
    (
        "shutil.copymode",
        Mock(side_effect=OSError(5, "Input/output error", "/its/name")),
        "error: /its/name: Input",
    ),
]


@pytest.mark.parametrize(("name", "function", "wanted"), FAILURES, ids=[case[0] for case in FAILURES])
def test_full_disk_is_one_clear_line(name, function, wanted, models, run, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(f"merge.{name}", function)
    assert wanted in error_of(lambda: run("linear", None, models[:2]), capfd)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
import tyro
import merge

merge.TILE, merge_tensors, calls = 64, merge.merge_tensors, []

def merge_or_die(*args):
    calls.append(args)
    if len(calls) == 300:
        os.kill(os.getpid(), getattr(signal, sys.argv.pop()))
    return merge_tensors(*args)

merge.merge_tensors = merge_or_die
merge.main(tyro.cli(merge.Args, args=sys.argv[1:-1]))
"""


def test_killed_half_way_there_is_no_model_and_interrupted_nothing(models, tmp_path):
    flags = ["--method", "linear", "--models", *models[:2], "--output-dir", tmp_path / "out"]
    done = start(sys.executable, "-c", KILLED, *flags, "SIGINT", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: interrupted\n") and not list(tmp_path.iterdir())
    done = start(sys.executable, "-c", KILLED, *flags, "--max-shard-size", "40KB", "SIGKILL", cwd=tmp_path)
    assert done.returncode == -9, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"args.json", "merge.py", "model.partial"}
    done = start(sys.executable, ROOT / "merge.py", *flags, cwd=tmp_path)  # what is left is not written into
    assert done.returncode == 2 and done.stderr.endswith("out: File exists\n")


def test_weights_are_on_disk_before_the_folder_has_its_name(models, run, tmp_path, monkeypatch):
    synced, fsync = set(), merge.os.fsync

    def watched(handle):
        assert not (tmp_path / "run0" / "model").exists()
        synced.add(merge.os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(merge.os, "fsync", watched)
    folder = run("linear", None, models[:2], max_shard_size="60KB")
    assert {path.stat().st_ino for path in (folder / "model").glob("*.safetensors")} == synced
    assert {path.name for path in folder.iterdir()} == {"args.json", "merge.py", "model"}


# Rules, soups, report ---------------------------------------------------------------------------------------


def resolve(*rules, compat="paper", method="task_arithmetic", **flags):
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("mlp.up", "attn.q")]
    args = merge.Args(method=method, base="x", models=("a", "b"), rule=rules, compat=compat, **flags)
    read = [merge.read_rule(rule, args) for rule in rules]
    return merge.settings_of_tensors(SimpleNamespace(shapes=dict.fromkeys(names)), read, args, 2)


def test_rules_hold_for_the_tensors_that_match_and_the_last_one_counts():
    found = resolve("*:lambda=0.9", "layers.*.mlp.*:lambda=0.3", "model.layers.1.*:weight.2=0.5", lambda_=0.1)
    assert found["model.layers.0.attn.q.weight"].lambda_ == 0.9
    assert found["model.layers.4.mlp.up.weight"].lambda_ == 0.3
    assert found["model.layers.1.mlp.up.weight"].weights == (1.0, 0.5)
    assert found["model.layers.2.mlp.up.weight"].weights == (1.0, 1.0)
    assert resolve("*:weight=0.25")["lm_head.weight"].weights == (0.25, 0.25)
    assert resolve(weights=(2.0, 3.0))["lm_head.weight"].weights == (2.0, 3.0)
    found = resolve("*:lambda=0,1,0.5")  # a line over the layers
    assert [found[f"model.layers.{i}.mlp.up.weight"].lambda_ for i in range(5)] == [0, 0.5, 1, 0.75, 0.5]
    assert found["model.embed_tokens.weight"].lambda_ == 0
    assert found["model.norm.weight"].lambda_ == found["lm_head.weight"].lambda_ == 0.5
    found = resolve("*:lambda=0,1,0.5", compat="mergekit")
    assert found["model.norm.weight"].lambda_ == found["lm_head.weight"].lambda_ == 0


SCORE = """
import sys
from safetensors.numpy import load_file
one = load_file(sys.argv[1] + "/model.safetensors")["model.norm.weight"]
print("scoring", sys.argv[1])
print(float(-abs(one - 1.5).mean() if len(sys.argv) < 3 else one.mean()))
"""


def test_greedy_soup_by_an_evaluation_command(models, run, tmp_path, capfd):
    (tmp_path / "score.py").write_text(SCORE)
    fill = lambda value: lambda tensors: tensors["model.norm.weight"].fill_(value)
    folders = [changed(tmp_path / f"norm {v}", models[0], fill(v)) for v in (1.0, 2.0, 3.0, 4.0)]
    command = f"{sys.executable} {tmp_path / 'score.py'} {{model}}"
    # 1 and 2 are both 0.5 away from 1.5, their mean is there; 3 and 4 make it worse
    folder = run("soup", None, folders[::-1], eval_command=command)
    assert weights(folder)["model.norm.weight"].mean().item() == 1.5
    assert "2 of 4 models" in capfd.readouterr().out and not (folder / "candidate").exists()
    folder = run("soup", None, folders, eval_command=f"{command} mean")
    assert weights(folder)["model.norm.weight"].mean().item() == 4
    folder = run("soup", None, folders)  # uniform
    assert weights(folder)["model.norm.weight"].mean().item() == 2.5


def test_report_has_the_norms_and_cosines_of_the_task_vectors(models, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(merge, "TILE", 64)
    chosen = {"base": str(models[0]), "models": tuple(map(str, models[1:3]))}
    summary = merge.main(merge.Args(**chosen, output_dir=str(tmp_path / "run")))
    assert metric_differences(ROOT / "merge.py", set(summary)) == []
    kinds = json.loads((tmp_path / "run" / "report.json").read_text())["kinds"]
    tensors = [load_file(folder / "model.safetensors") for folder in models[:3]]
    kind = "model.layers.*.mlp.up_proj.weight"
    for name, members in (("all", list(tensors[0])), (kind, [kind.replace("*", i) for i in "01"])):
        base, *others = (torch.cat([x[member].flatten() for member in members]).double() for x in tensors)
        one, two = others[0] - base, others[1] - base
        expected = [one.norm() / base.norm(), two.norm() / base.norm(), one @ two / one.norm() / two.norm()]
        found = [*kinds[name]["relative_norm"].values(), kinds[name]["cosine"]["1-2"]]
        assert found == pytest.approx([x.item() for x in expected], rel=1e-4, abs=1e-5)
    assert summary["cosine/1-2"] == kinds["all"]["cosine"]["1-2"]
    assert f"1-2 {summary['cosine/1-2']:+.3f}" in capfd.readouterr().out


def test_default_run_merges_half_way_from_base_to_sft(tiny, tmp_path):
    done = start(sys.executable, ROOT / "merge.py", cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    [folder] = (tmp_path / "runs").iterdir()
    merged = weights(folder)
    base, sft = (load_file(tiny / name / "model.safetensors") for name in ("base", "sft"))
    for name in merged:
        assert torch.equal(merged[name], torch.lerp(base[name].float(), sft[name].float(), 0.5).bfloat16())
    assert (folder / "report.json").exists() and "model.layers.*.mlp.up_proj.weight" in done.stdout
    assert torch.isfinite(logits_of(folder)[1]).all()


def test_mistakes_come_before_anything_slow_and_transformers_is_not_needed(tmp_path):
    for flags in (["--method", "ties", "--models", "a"], ["--density", "2"]):
        done = start(sys.executable, ROOT / "merge.py", *flags, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    code = "import sys, merge; print([m for m in ('transformers', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
