"""The formula of benchmarks/memory.py: by hand, against models as transformers builds them, and in order."""

import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

import common

sys.path.insert(0, str(ROOT / "benchmarks"))
from memory import MODELS, SCRIPTS, Run, Shape, activations, lora_parameters, moments, parameters, peak
from memory_measured import CONFIG


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "qk_norm"), [(Qwen2Config, False), (Qwen3Config, True)])
def test_parameters_and_what_a_row_keeps_are_those_of_the_model(kind, qk_norm, checkpointing, dtype):
    shape, kept = Shape(64, 3, 4, 2, 16, 96, 50, qk_norm, qk_norm), {}
    config = kind(**dict(zip(CONFIG, shape)), attn_implementation="packed")
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    root, layer = parameters(shape)
    assert root + 3 * layer == model.num_parameters()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    keep = lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        common.token_logprobs(model, common.collate([([1] * 1024, [0] + [1] * 1023)]))
    size = sum(kept.values()) - sum(kept.get(p.untyped_storage().data_ptr(), 0) for p in model.parameters())
    run = Run(row=1024, bytes_each=dtype.itemsize, checkpointing=checkpointing, on_cuda=False)
    assert size == pytest.approx(activations(shape, run), rel=0.05)


def test_sums_by_hand():
    shape, run = Shape(2, 1, 1, 1, 2, 3, 5, True), Run("grpo.py", processes=2, row=64)
    assert (
        parameters(shape) == (5 * 2 + 2, 4 * 4 + 6 + 3 * 6 + 4) and lora_parameters(shape, 1) == 4 * 4 + 3 * 5
    )
    now = moments(shape, run)["layer"]
    assert [now[x] for x in ("weights", "moments", "gradients")] == [4 * 56 / 2, 8 * 56 / 2, 4 * 56 / 2]
    assert now["whole"] == 2 * (12 + 2 * 44) and now["frozen"] == 2 * 56 / 2 + 2 * 12


@pytest.mark.parametrize("script", SCRIPTS)
def test_more_processes_smaller_rows_and_a_lora_take_less(script):
    for shape in MODELS.values():
        peaks = [peak(shape, Run(script, n)) for n in (1, 2, 4, 8)]
        assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4
        assert (
            peak(shape, Run(script, lora_rank=16)) < peaks[0] < peak(shape, Run(script, checkpointing=False))
        )
