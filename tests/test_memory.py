"""The formula of benchmarks/memory.py: by hand, against models as transformers builds them, and in order."""

import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

import common

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory
from memory import MODELS, SCRIPTS, Run, Shape, moments, parameters, peak
from memory_measured import CONFIG


@pytest.mark.parametrize(("checkpointing", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
@pytest.mark.parametrize(("kind", "qk_norm"), [(Qwen2Config, False), (Qwen3Config, True)])
def test_parameters_and_what_a_row_keeps_are_those_of_the_model(kind, qk_norm, checkpointing, dtype):
    shape, kept = Shape(64, 3, 4, 2, 16, 96, 50, qk_norm, qk_norm), {}
    config = kind(**dict(zip(CONFIG, shape)), attn_implementation="packed")
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    assert parameters(shape)[0] + 3 * parameters(shape)[1] == model.num_parameters()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    keep = lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        common.token_logprobs(model, common.collate([([1] * 1024, [0] + [1] * 1023)]))
    size = sum(kept.values()) - sum(kept.get(p.untyped_storage().data_ptr(), 0) for p in model.parameters())
    run = Run(row=1024, bytes_each=dtype.itemsize, checkpointing=checkpointing, on_cuda=False)
    assert size == pytest.approx(memory.activations(shape, run), rel=0.05)


def test_sums_by_hand():
    shape, run = Shape(2, 1, 1, 1, 2, 3, 5, True), Run("grpo.py", processes=2, row=64)
    assert parameters(shape) == (5 * 2 + 2, 4 * 4 + 6 + 3 * 6 + 4)
    assert memory.lora_parameters(shape, 1) == 4 * 4 + 3 * 5
    now = [moments(shape, run)["layer"][x] for x in "weights moments gradients whole frozen".split()]
    assert now == [4 * 56 / 2, 8 * 56 / 2, 4 * 56 / 2, 2 * (12 + 2 * 44), 2 * 56 / 2]
    assert memory.needed() == memory.load_result("memory_table", ROOT)["needed"]


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_more_processes_checkpointing_and_a_lora_take_less(shape):
    for script in SCRIPTS:
        peaks = [peak(shape, Run(script, n)) for n in (1, 2, 4, 8)]
        assert peaks[0] > peaks[1] > peaks[2] > peaks[3]
        less, more = (peak(shape, Run(script, **x)) for x in ({"lora_rank": 16}, {"checkpointing": False}))
        assert less < peaks[0] < more
