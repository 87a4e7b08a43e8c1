"""benchmarks/gpu.py, rehearsed on the CPU, and the call of the kernel that only a GPU has, by a stand-in."""

import inspect
import json
import sys

import pytest
import torch
from conftest import ROOT, start
from test_common import assert_all_equal, assert_equal_gradients, build, gradients, make_sharing_sequences
from torch.nn.attention.varlen import varlen_attn

import common


def plain_varlen(
    q, k, v, ends_q, ends_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """`varlen_attn` in float32 by its documentation: q (T_q, H_q, D), k and v (T_k, H_kv, D) -> as q."""
    assert ends_q.dtype == ends_k.dtype == torch.int32 and window_size[1] == 0
    assert (max_q, max_k) == tuple(x.diff().max().item() for x in (ends_q, ends_k))
    assert enable_gqa or q.shape[1] == k.shape[1]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = torch.zeros_like(q)
    for a, b, c, d in zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:]):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * (scale or q.shape[2] ** -0.5)
        places = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)  # key before query
        seen = (places >= 0) & ((places <= window_size[0]) | (window_size[0] < 0))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out = out.index_add(0, torch.arange(a, b), torch.einsum("hqk,khd->qhd", weights, v[c:d]))
    return out


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mistral_window", "gemma3"])
def test_the_kernel_is_asked_for_what_sdpa_computes_sequence_by_sequence(family, sharing, monkeypatch):
    sequences, shared = make_sharing_sequences()
    batch, model, found = common.collate(sequences, shared=shared if sharing else None), build(family), []
    for kernel in (False, True):
        monkeypatch.setattr(common, "has_kernel", lambda query, kernel=kernel: kernel)
        monkeypatch.setattr(common, "varlen_attn", plain_varlen)
        outputs = common.token_logprobs(model, batch, return_entropy=True)
        found.append((outputs, gradients(model, *outputs)))
    assert_all_equal(found[1][0], found[0][0], 1e-5)
    assert_equal_gradients(found[1][1], found[0][1])


def test_the_kernel_has_the_arguments_of_our_call():
    inspect.signature(varlen_attn).bind(*range(7), scale=1.0, window_size=(-1, 0), enable_gqa=True)
    assert "enable_gqa" in inspect.signature(plain_varlen).parameters


def test_the_gpu_benchmark_runs_on_a_cpu_and_its_checks_pass(tmp_path):
    flags = ["--device", "cpu", "--tiny", "--out", tmp_path / "gpu.json"]
    done = start(sys.executable, ROOT / "benchmarks" / "gpu.py", *flags, cwd=tmp_path, timeout=840)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {"command", "device", "versions", "shapes", "checks", "speed", "seconds"} <= result.keys()
    assert all(x["passed"] or "compile" in x["name"] for x in result["checks"])  # that takes minutes on a CPU
    measured = [x for x in result["speed"] if "skipped" not in x]
    assert len(measured) == 6 and all(x["mfu"] > 0 and x["split"]["backward"] > 0 for x in measured)
