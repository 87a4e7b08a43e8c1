"""merge.py: formulas against values worked by hand, the streamed result against whole tensors in memory."""

import json
import math
import os
import shutil
import signal
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import tyro
from conftest import DATA, ROOT, read_lines, run_command, start
from helpers import error_of
from safetensors.torch import load_file, save_file
from samples import stock
from sync_docs import metric_differences
from transformers import AutoTokenizer

import merge

pytestmark = pytest.mark.usefixtures("one_cpu")
EMBEDDING = "model.embed_tokens.weight"
NEEDS_BASE = {"task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs"}


@pytest.fixture(scope="module")
def models(random_model, tmp_path_factory):
    """Folders 0 to 3: a random model and three that were moved away from it, in float32."""
    folder = tmp_path_factory.mktemp("models")

    def moved(seed):
        random = torch.Generator().manual_seed(seed)
        noise = lambda x: 0.02 * bool(seed) * torch.randn(x.shape, generator=random)
        return lambda tensors: tensors.update({k: x.float() + noise(x) for k, x in tensors.items()})

    return [changed(folder / f"model{seed}", random_model, moved(seed)) for seed in range(4)]


def changed(folder, like, change=lambda tensors: None, **config):
    """A copy of a model in which `change(tensors)` was at work, with another config if one is given."""
    shutil.copytree(like, folder)
    tensors = load_file(like / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


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


def tensors_of(folder):
    """The tensors of a model, from all its files."""
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def weights(folder):
    """The tensors that a run has merged."""
    return tensors_of(folder / "model")


def vectors(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def settings(weights=(1.0,), densities=None, lambda_=1.0, t=0.5, outliers=0.01):
    return merge.Settings(weights, densities or (1.0,) * len(weights), lambda_, t, outliers)


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
    assert arc([1, 2], [-3, 1], 0.0, compat).tolist() == pytest.approx([1, 2])
    assert arc([1, 2], [-3, 1], 1.0, compat).tolist() == pytest.approx([-3, 1])


def test_slerp_without_an_arc_is_a_straight_line():
    assert arc([1, 2], [2, 4], 0.25).tolist() == pytest.approx([1.25, 2.5])
    assert arc([1, 2], [-1, -2], 0.25).tolist() == pytest.approx([0.5, 1])  # antiparallel: no plane is given
    assert arc([0, 0], [4, 8], 0.25).tolist() == [1, 2] and arc([4, 8], [0, 0], 0.25).tolist() == [3, 6]
    assert arc([0, 0], [0, 0], 0.25).tolist() == [0, 0]
    angle = 0.02  # its cosine is 0.9998: an arc in the paper
    end, half = [math.cos(angle), math.sin(angle)], [math.cos(angle / 2), math.sin(angle / 2)]
    assert arc([1, 0], end, 0.5).tolist() == pytest.approx(half, abs=1e-6)


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


@pytest.mark.parametrize("kind", ["normal", "bfloat16", "subnormal", "equal", "wide"])
def test_threshold_is_the_kth_largest_exactly(kind):
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1))
    x = {"bfloat16": x.bfloat16().float(), "subnormal": x * 1e-42, "equal": 0 * x - 0.3}.get(kind, x)
    x = x * 10 ** (20 * x.flip(0)) if kind == "wide" else x
    sizes = x.abs().sort(descending=True).values
    for ks in ([1, 1, 1], [2, 999, 2500], [4999] * 3, [1, 7, 5000]):
        assert kth_largest(x, ks).tolist() == [row[k - 1].item() for row, k in zip(sizes, ks, strict=True)]


def crumbs(n, density, outliers):
    """The numbers of 1 to n, with signs, that breadcrumbs keeps."""
    x = torch.arange(1.0, n + 1)[None] * torch.tensor([1.0, -1.0]).repeat(n)[:n]
    first, last = merge.breadcrumb_ranks(n, density, outliers)
    highest, lowest = kth_largest(x, [first]), kth_largest(x, [last])
    return [abs(number) for number in merge.trim(x, lowest, highest)[0].tolist() if number]


def test_breadcrumbs_drops_both_ends():
    assert crumbs(10, 0.5, 0.2) == [4, 5, 6, 7, 8]  # 10 and 9 are outliers, 1 to 3 small
    assert crumbs(10, 0.5, 0.0) == [6, 7, 8, 9, 10]  # no outlier: nothing else is dropped at the top
    assert crumbs(5, 0.6, 0.01) == [3, 4, 5]  # less than one number is an outlier
    assert crumbs(10, 1.0, 0.2) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert crumbs(3, 0.1, 0.9) == [1] and crumbs(1, 0.1, 0.9) == [1]  # at least one


def test_equal_changes_are_all_kept_which_in_bfloat16_are_many():
    random, shares = torch.Generator().manual_seed(1), []
    for size in (1e-3, 3e-4, 1e-4):
        base = (0.02 * torch.randn(10**6, generator=random)).bfloat16()
        model = (base.float() + size * torch.randn(10**6, generator=random)).bfloat16()
        change = (model.float() - base.float())[None]
        kept = merge.trim(change, kth_largest(change, [200_000]))
        shares.append(kept.ne(0).float().mean().item())
    assert "keeps {:.2f}, {:.2f} and {:.2f} of them".format(*shares) in (ROOT / "docs/merge.md").read_text()


def test_dare_by_hand():
    draws, model, quarter = vectors([0.1, 0.3, 0.24, 0.9]), vectors([4, 8, -2, 1]), torch.tensor([0.25])
    assert merge.dare(model, draws, quarter).tolist() == [[4, 0, -2, 0]]
    merged = merge.merge_tensors("dare_linear", torch.zeros(4), model, settings(densities=(0.25,)), {}, draws)
    assert merged.tolist() == [16, 0, -8, 0]  # divided by the density
    base, models, draws = torch.zeros(2), vectors([4, 2], [2, -2]), torch.zeros(2, 2)
    half = settings(weights=(1.0, 1.0), densities=(0.5, 0.5), lambda_=0.5)
    merged = merge.merge_tensors("dare_ties", base, models, half, {}, draws)
    assert merged.tolist() == [3, 0]  # 0.5 (8 + 4) / 2; 4 - 4 elects nothing


def test_dare_keeps_the_density_and_the_expectation():
    task_vector, density, n, tile = torch.linspace(-1, 3, 64)[None], 0.3, 4000, slice(0, 64)
    draws = torch.stack([merge.uniform(seed, 0, "w", tile) for seed in range(n)])  # (n, 64)
    for other in ((2, 0, "w"), (1, 1, "w"), (1, 0, "v")):  # of a seed, a model and a tensor
        assert not torch.equal(merge.uniform(*other, tile), draws[1])
    kept = torch.cat([merge.dare(task_vector, d[None], torch.tensor([density])) for d in draws])
    share = kept.ne(0).float().mean().item()
    assert share == pytest.approx(density, abs=4 * math.sqrt(0.21 / (n * 64)))
    # mean of kept / density: tau, with standard error |tau| sqrt((1 - p) / (p n))
    error = (kept.mean(0) / density - task_vector[0]) / (task_vector[0].abs() * math.sqrt(0.7 / (0.3 * n)))
    assert error.abs().max() < 4.5 and error.square().mean().sqrt() < 1.5


def model_stock(base, *models):
    base, models = vectors(base)[0], vectors(*models)
    ratio = merge.model_stock_ratio(merge.gram(base, models - base))
    return merge.model_stock(base, models, ratio).tolist()


def test_model_stock_by_hand():
    # 45 degrees: t = 2 cos / (1 + cos) = 0.8284, and the mean is (1, 0.5)
    ratio = math.sqrt(2) / (1 + math.sqrt(0.5))
    assert model_stock([0, 0], [1, 0], [1, 1]) == pytest.approx([ratio, ratio / 2])
    assert model_stock([5, 1], [6, 1], [6, 2]) == pytest.approx([5 + ratio, 1 + ratio / 2], rel=1e-6)
    assert model_stock([1, 1], [2, 1], [1, 2]) == [1, 1]  # orthogonal: the base
    assert model_stock([1, 1], [2, 3], [2, 3]) == pytest.approx([2, 3])  # the same: their mean
    # three, pairwise cosines 0, 0 and 1: mean 1/3, t = 3/3 / (1 + 2/3) = 0.6
    assert model_stock([0, 0], [3, 0], [0, 3], [0, 3]) == pytest.approx([0.6, 1.2])
    # where the formula has no value, or no bound
    assert model_stock([1, 2], [2, 3], [0, 1]) == [1, 2]  # opposite: 0 / 0
    assert model_stock([1, 2], [1, 2], [3, 2]) == [1, 2]  # one that did not change
    obtuse = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, -0.5], [0.0, -0.5, 1.0]], dtype=torch.float64)
    assert merge.model_stock_ratio(obtuse) == 0
    tiny = torch.tensor([[1.0, 0, 0], [0, 1e-8, 5e-9], [0, 5e-9, 1e-8]], dtype=torch.float64)
    assert merge.model_stock_ratio(tiny) == pytest.approx(2 / 3)  # 2 (1/2) / (1 + 1/2)


def test_greedy_soup_keeps_what_does_not_make_it_worse():
    table, asked = {(1, 2): 0.85, (1, 0): 0.92, (1, 0, 3): 0.92}, []
    kept = merge.greedy_soup([0.5, 0.9, 0.7, 0.2], lambda i: asked.append(tuple(i)) or table[tuple(i)])
    assert kept == [1, 0, 3] and asked == [(1, 2), (1, 0), (1, 0, 3)]  # an equal score is good enough


@pytest.mark.parametrize("method", sorted(NEEDS_BASE | {"model_stock", "slerp", "wise_ft", "linear"}))
@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_zero_task_vectors_leave_the_base(method, compat, models, run):
    copies = [models[0]] * (1 if method in ("slerp", "wise_ft") else 2)
    merged = weights(run(method, models[0], copies, compat=compat))
    base = tensors_of(models[0])
    for name in base:
        assert torch.allclose(merged[name], base[name], rtol=1e-6, atol=0), name


def in_memory(method, folders, density=0.3, rule=(), seed=1, **flags):
    """The merged tensors by the papers from whole tensors, thresholds by sorting."""
    loaded = list(map(tensors_of, folders))
    count = len(folders) - 1
    densities = [density, 0.6 if rule else density][:count]
    p = settings(**{"weights": (1.0,) * count, "densities": densities, "outliers": 0.1} | flags)
    stacks = {k: torch.stack([tensors[k].float().flatten() for tensors in loaded]) for k in loaded[0]}
    every = torch.cat([stack[1:] - stack[0] for stack in stacks.values()], 1).abs()  # (K, all numbers)
    of_all = [x.topk(int(d * len(x))).values[-1] for x, d in zip(every, densities, strict=True)]
    merged = {}
    for name, (one, *others) in stacks.items():
        n, others, measured = len(one), torch.stack(others), {"lowest": torch.stack(of_all)}
        if method == "breadcrumbs":
            sizes, top = (others - one).abs().sort(descending=True).values, int(0.1 * n)
            last = [max(1, int(d * n)) - 1 + top for d in densities]
            measured = {"highest": sizes[:, top], "lowest": sizes[range(count), last]}
        draws = torch.stack([merge.uniform(seed, i, name, slice(0, n)) for i in range(count)])
        result = merge.merge_tensors(method, one, others, p, measured, draws)
        merged[name] = result.view_as(loaded[0][name]).to(loaded[0][name].dtype)
    return merged


MERGES = read_lines(DATA / "merges.jsonl")


@pytest.mark.parametrize("case", MERGES, ids=lambda case: f"{case['method']}-{case['compat']}")
def test_streamed_result_is_that_of_whole_tensors(case, models, run, monkeypatch):
    method, compat, flags = case["method"], case["compat"], case["flags"]
    folders = models[:2] if method in ("wise_ft", "slerp") else models[:3]
    peers = method in ("slerp", "model_stock") or compat == "mergekit"  # see test_peers.py
    expected = {} if peers else in_memory(method, folders, **flags)
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
    cast = lambda tensors: tensors.update({k: x.to(dtype) for k, x in tensors.items()})
    folders = [changed(tmp_path / f"m{i}", models[i], cast) for i in range(3)]
    merged = weights(run("task_arithmetic", folders[0], folders[1:], lambda_=0.3))
    for name, expected in in_memory("task_arithmetic", folders, lambda_=0.3).items():
        assert merged[name].dtype == dtype and torch.equal(merged[name], expected), name
    assert {x.dtype for x in weights(run("wise_ft", models[0], folders[:1])).values()} == {torch.float32}
    folder = run("wise_ft", folders[0], models[:1], out_dtype="float16")
    assert {x.dtype for x in weights(folder).values()} == {torch.float16}
    assert json.loads((folder / "model" / "config.json").read_text())["dtype"] == "float16"


def logits_of(folder):
    model = stock(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Two and two?"}], tokenize=False)
    with torch.no_grad():
        return model, model(**tokenizer(text, return_tensors="pt")).logits


def test_shards_load_give_the_logits_of_one_file_and_can_be_merged_again(models, run):
    one = run("linear", None, models[1:3])
    several = run("linear", None, models[1:3], max_shard_size="60KB")
    files = list((several / "model").glob("*.safetensors"))
    index = json.loads((several / "model" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == {p.name for p in files}
    for path in files:
        tensors = load_file(path)
        assert sum(x.nbytes for x in tensors.values()) <= 60_000 or len(tensors) == 1
        assert path.stat().st_mode == (several / "args.json").stat().st_mode
    model, logits = logits_of(several)
    assert torch.isfinite(logits).all() and torch.equal(logits, logits_of(one)[1])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = weights(run("linear", None, [several / "model"]))
    assert all(torch.equal(again[name], x) for name, x in weights(one).items())


def head(tensors):
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()


def test_heads_tied_stored_twice_and_untied(models, run, tmp_path, capfd):
    twice = changed(tmp_path / "twice", models[1], head)
    assert "lm_head.weight" not in weights(run("wise_ft", models[0], [twice]))
    assert "lm_head.weight" not in weights(run("wise_ft", twice, [models[0]]))
    untied = [changed(tmp_path / f"u{i}", models[i], head, tie_word_embeddings=False) for i in (0, 1)]
    merged = weights(run("wise_ft", untied[0], [untied[1]], t=0.25))
    assert torch.equal(merged["lm_head.weight"], merged[EMBEDDING])
    line = error_of(lambda: run("linear", None, [models[0], untied[1]]), capfd)
    assert "tie_word_embeddings" in line and "lm_head.weight" in line
    wrong = changed(tmp_path / "wrong", twice, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert "though the config ties them" in error_of(lambda: run("linear", None, [models[0], wrong]), capfd)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "model_stock", "dare_linear"])
def test_scalar_and_empty_tensors_and_other_types(method, models, run, tmp_path):
    def odd(i):
        more = {"scalar": torch.tensor(2.0 + i), "empty": torch.zeros(0, 4)}
        more["mixed"] = torch.ones(3, dtype=torch.float32 if i else torch.bfloat16)  # two bytes among four
        return changed(tmp_path / f"o{i}", models[i], lambda t: t.update(more))

    merged = weights(run(method, odd(0), [odd(1), odd(2)]))
    assert merged["scalar"].shape == () and merged["empty"].shape == (0, 4)
    assert merged["mixed"].dtype == torch.bfloat16 and merged["mixed"].tolist() == [1, 1, 1]


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
    merged, own, other = (tensors_of(path)[EMBEDDING] for path in (folder, added, padded))
    n = len(own) - 2
    assert merged.shape == own.shape and torch.equal(merged[n:], own[n:])
    mean = (own[:n] + other[:n]) / 2 if method == "linear" else own[:n]
    assert torch.allclose(merged[:n], mean, atol=1e-6)
    assert (folder / "tokenizer.json").read_bytes() == (added / "tokenizer.json").read_bytes()
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(merged)


def test_vocabularies_that_do_not_fit_are_refused(models, run, tmp_path, capfd):
    one = with_tokens(tmp_path / "one", models[0], "<a>")
    renamed = with_tokens(tmp_path / "renamed", models[1], "<b>")
    gap = with_tokens(tmp_path / "gap", models[1], "", "<c>")  # its row for <a> is no token's
    same = with_tokens(tmp_path / "same", models[1], "<a>", more_rows=0)  # same shapes, one token more
    nameless = with_tokens(tmp_path / "nameless", models[1], "<a>", "<b>")
    (nameless / "tokenizer.json").unlink()  # which tokens its further rows are, nobody knows
    shorter = with_tokens(tmp_path / "shorter", models[2], more_rows=-5)
    for wanted, pad, *pair in (
        ("differ in the tokens", False, one, renamed),
        ("differ in the tokens", True, one, renamed),
        ("differ in the tokens", True, one, gap),
        ("differ in the tokens", False, models[0], same),
        ("embed_tokens", True, one, nameless),
        ("--pad-vocab", False, models[1], shorter),
    ):
        assert wanted in error_of(lambda p=pair, pad=pad: run("linear", None, p, pad_vocab=pad), capfd), pair


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


BROKEN = [("config.json", "{"), ("config.json", "[]"), ("model.safetensors", "{"), ("tokenizer.json", "{}")]
BROKEN += [("model.safetensors.index.json", text) for text in ("{}", '{"weight_map": []}')]


@pytest.mark.parametrize("name, content", BROKEN)
def test_broken_file_is_named(name, content, models, run, tmp_path, capfd):
    broken = changed(tmp_path / "broken", models[1])
    (broken / name).write_text(content)
    assert str(broken / name) in error_of(lambda: run("linear", None, [broken, models[0]]), capfd)


FULL = "No space left on device"
FAILURES = {  # what fails, how, and what is said
    "shutil.disk_usage": ({"return_value": SimpleNamespace(free=1000)}, "no room for"),
    "os.fsync": ({"side_effect": OSError(28, FULL)}, FULL),
    "save_file": ({"side_effect": merge.SafetensorError(f"I/O error: {FULL}")}, FULL),
    "shutil.copymode": ({"side_effect": OSError(5, "Bad disk", "/its/name")}, "/its/name: Bad"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_full_disk_is_one_clear_line(name, models, run, tmp_path, capfd, monkeypatch):
    behaviour, wanted = FAILURES[name]
    monkeypatch.setattr(f"merge.{name}", Mock(**behaviour))
    assert wanted in error_of(lambda: run("linear", None, models[:2]), capfd)
    assert not list(tmp_path.iterdir())


def merge_until_a_signal(number, words):
    """The command line with small tiles, and a signal at the 300th of them."""
    merge_tensors, calls = merge.merge_tensors, []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background has not

    def merge_or_die(*args):
        calls.append(args)
        if len(calls) == 300:
            os.kill(os.getpid(), number)
        return merge_tensors(*args)

    merge.TILE, merge.merge_tensors = 64, merge_or_die
    merge.main(tyro.cli(merge.Args, args=list(map(str, words))))


def test_killed_half_way_there_is_no_model_and_interrupted_nothing(models, forked, tmp_path):
    words = ["--method", "linear", "--models", *models[:2], "--output-dir", tmp_path / "out"]
    code, told = forked(merge_until_a_signal, signal.SIGINT, words)
    assert code == 2 and told.endswith("error: interrupted\n") and not list(tmp_path.iterdir())
    code, told = forked(merge_until_a_signal, signal.SIGKILL, [*words, "--max-shard-size", "40KB"])
    assert code == -9, told
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"args.json", "merge.py", "model.partial"}
    code, told = forked(run_command, ROOT / "merge.py", *words)  # what is left is not written into
    assert code == 2 and told.endswith("out: File exists\n")


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
    tensors = list(map(tensors_of, models[:3]))
    kind = "model.layers.*.mlp.up_proj.weight"
    for name, members in (("all", list(tensors[0])), (kind, [kind.replace("*", i) for i in "01"])):
        base, *others = (torch.cat([x[member].flatten() for member in members]).double() for x in tensors)
        one, two = others[0] - base, others[1] - base
        expected = [one.norm() / base.norm(), two.norm() / base.norm(), one @ two / one.norm() / two.norm()]
        found = [*kinds[name]["relative_norm"].values(), kinds[name]["cosine"]["1-2"]]
        assert found == pytest.approx([x.item() for x in expected], rel=1e-4, abs=1e-5)
    assert f"1-2 {kinds['all']['cosine']['1-2']:+.3f}" in capfd.readouterr().out


def test_default_run_merges_half_way_from_base_to_sft_and_needs_no_transformers(tiny, tmp_path):
    code = "import sys, merge, tyro; merge.main(tyro.cli(merge.Args)); print('transformers' in sys.modules)"
    done = start(sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("False\n") and "Traceback" not in done.stderr
    [folder] = (tmp_path / "runs").iterdir()
    merged = weights(folder)
    base, sft = (tensors_of(tiny / name) for name in ("base", "sft"))
    for name in merged:
        assert torch.equal(merged[name], torch.lerp(base[name].float(), sft[name].float(), 0.5).bfloat16())
    assert (folder / "report.json").exists() and "model.layers.*.mlp.up_proj.weight" in done.stdout
    assert torch.isfinite(logits_of(folder)[1]).all()
