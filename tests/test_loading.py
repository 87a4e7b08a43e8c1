"""loading.py. LoRA: the adapter is peft's, the reference is the model without it, merge.py makes it whole.

And how weights come into memory, read once, by the first process; AdamW in 8 bits.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, fork
from helpers import CPU, assert_continues, error_of, stock, tiny_rows, trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import common
import dpo
import grpo
import loading
import merge
import reward_model
import sft

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_cpu", "process_group")
LORA = {"lora_rank": 4, "lora_alpha": 64.0, "learning_rate": 1e-2, "max_steps": 3, "batch_size": 8}
ROWS, HELD_OUT = tiny_rows("sft_train", 24), tiny_rows("sft_eval", 4)


@pytest.fixture
def train(tmp_path):
    """train(script, rows, held_out, **flags): three steps with a LoRA."""
    return lambda script, *rows, **flags: trainer(script, tmp_path, **LORA)(*rows, **flags)


@torch.no_grad()
def nll(model, rows) -> float:
    """Mean negative log-likelihood, in nats, of the trained tokens of rows, a sequence at a time."""
    tokenizer, logps = sft.load_tokenizer(sft.Args(model="tiny/sft")), []
    for row in rows:
        for ids, trained in sft.encode(tokenizer, row, sft.Args()):
            scores = model(torch.tensor(ids[None]).long()).logits[0, :-1].log_softmax(-1)
            logps.append(scores.gather(1, torch.tensor(ids[1:, None]).long())[trained[1:], 0])
    return -torch.cat(logps).mean().item()


def test_adapter_is_what_peft_loads_and_merge_makes_whole(train, tmp_path):
    folder, lines = train(sft, ROWS, HELD_OUT, model="tiny/sft")
    adapted = peft.PeftModel.from_pretrained(stock("tiny/sft"), folder / "model")
    assert nll(adapted, HELD_OUT) == pytest.approx(lines[-1]["eval/loss"], rel=1e-4)
    assert abs(lines[-1]["eval/loss"] - lines[0]["eval/loss"]) > 1e-2
    merge.main(
        merge.Args(
            method="lora",
            models=(str(folder / "model"),),
            out_dtype="float32",
            output_dir=str(tmp_path / "whole"),
        )
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model", dtype=torch.float32)
    for name, weight in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], weight, rtol=0, atol=1e-7)
    assert nll(whole, HELD_OUT) == pytest.approx(lines[-1]["eval/loss"], rel=1e-4)


def test_task_vector_of_a_lora_is_its_product(train, tmp_path):
    folder, _ = train(sft, ROWS, model="tiny/sft")
    flags = {"base": str(ROOT / "tiny" / "sft"), "models": (str(folder / "model"),), "lambda_": 0.5}
    merge.main(merge.Args(**flags, out_dtype="float32", output_dir=str(tmp_path / "half")))
    half = load_file(tmp_path / "half" / "model" / "model.safetensors")
    before, lora = (
        load_file(x / f"{y}.safetensors")
        for x, y in ((ROOT / "tiny" / "sft", "model"), (folder / "model", "adapter_model"))
    )
    layer = "model.layers.1.mlp.up_proj"
    a, b = (lora[f"base_model.model.{layer}.lora_{x}.weight"] for x in "AB")
    wanted = before[f"{layer}.weight"].float() + 0.5 * 16 * (b @ a)  # alpha / rank = 16
    torch.testing.assert_close(half[f"{layer}.weight"], wanted, rtol=1e-6, atol=1e-7)


def test_adapter_that_is_more_than_a_lora_is_refused(train, tmp_path, capsys):
    folder, _ = train(sft, ROWS, model="tiny/sft")
    path = folder / "model" / "adapter_config.json"
    path.write_text(path.read_text().replace('"use_dora": false', '"use_dora": true'))
    run = lambda: merge.main(
        merge.Args(method="lora", models=(str(folder / "model"),), output_dir=str(tmp_path / "x"))
    )
    assert "more than a plain LoRA" in error_of(run, capsys)


@pytest.mark.parametrize("script", [sft, dpo, grpo])
def test_run_with_a_lora_continues_exactly_and_moves_nothing_else(train, script):
    rows = {sft: ROWS, dpo: tiny_rows("preference_train", 24), grpo: tiny_rows("prompts_train", 24)}[script]
    flags = {"model": "tiny/sft", "save_every": 1}
    flags |= {"max_completion_length": 24, "num_generations": 4} if script is grpo else {}
    if script is dpo:
        flags |= {"loss": "sigmoid"}
    assert_continues(lambda *given, **more: train(script, rows, **flags | more))


@torch.no_grad()
def test_model_without_its_lora_is_the_one_that_it_was_made_from():
    args = grpo.Args(lora_rank=4)
    model = grpo.load_model("tiny/sft", args, CPU)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name) and parameter.dtype == torch.float32
        if "lora_B" in name:
            parameter.normal_(std=0.1)
    ids = torch.tensor(grpo.load_tokenizer(args)("7 + 8 = 15\n#### 15").input_ids)
    batch = common.collate([(ids, torch.arange(len(ids)) > 0)])
    before = common.token_logprobs(grpo.load_model("tiny/sft", grpo.Args(), CPU), batch)
    with_lora = common.token_logprobs(model, batch)
    torch.testing.assert_close(
        common.token_logprobs(loading.WithoutLora(model), batch), before, rtol=0, atol=1e-5
    )
    assert (with_lora - before).abs().max() > 0.1
    assert torch.equal(common.token_logprobs(model, batch), with_lora)  # it is on again


def test_kl_of_a_lora_is_to_the_model_without_it(train):
    flags = {"max_completion_length": 24, "num_generations": 4, "beta": 0.1}
    _, lines = train(grpo, tiny_rows("prompts_train", 24), **flags)
    assert abs(lines[0]["kl"]) < 1e-6 and lines[-1]["kl"] > 1e-3


def test_reward_model_with_a_lora_trains_its_head_whole(train):
    folder, _ = train(reward_model, tiny_rows("preference_train", 24), lora_rank=4)
    model = peft.PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(ROOT / "tiny" / "checker", num_labels=1),
        folder / "model",
    )
    before = load_file(ROOT / "tiny" / "checker" / "model.safetensors").get("score.weight")
    assert before is None or not torch.equal(model.base_model.score.weight.float(), before.float())


def read_in_two(rank, path):
    """Write how often this process read weights, and the sum of the parameters that it then had."""
    sft.setup_distributed()
    calls, read = [], AutoModelForCausalLM.from_pretrained
    kind = SimpleNamespace(from_pretrained=lambda *given, **more: calls.append(1) or read(*given, **more))
    model = sft.load_model("tiny/sft", sft.Args(), CPU, kind=kind)
    total = sum(p.full_tensor().double().sum() for p in model.parameters())
    buffers = sum(b.double().sum() for b in model.buffers())
    (path / f"{rank}.txt").write_text(f"{len(calls)} {float(total)} {float(buffers)}")


def test_only_the_first_process_reads_weights(tmp_path):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    group["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    processes = [
        fork(read_in_two, rank, tmp_path, cwd=tmp_path, RANK=rank, LOCAL_RANK=rank, **group) for rank in "01"
    ]
    for process in processes:
        process.join(120)
    model = stock("tiny/sft")
    wanted = [sum(x.double().sum().item() for x in some) for some in (model.parameters(), model.buffers())]
    for rank, calls in (("0", 1), ("1", 0)):
        found = list(map(float, (tmp_path / f"{rank}.txt").read_text().split()))
        assert found == pytest.approx([calls, *wanted], rel=1e-6)


@pytest.mark.parametrize(
    "flags, package", [({"lora_rank": 4}, "peft"), ({"optimizer": "adamw8bit"}, "torchao")]
)
def test_missing_package_is_said_before_a_model_is_read(train, flags, package, capsys, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == package else "there")
    run = lambda: train(sft, ROWS, **{"lora_rank": 0} | flags)
    assert error_of(run, capsys).startswith("tiny/base: ") and package in error_of(run, capsys)


@pytest.mark.slow  # torchao compiles its step
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw_in_8_bits_learns_alike_and_continues_exactly(train, dtype):
    pytest.importorskip("torchao")
    flags = {"lora_rank": 0, "learning_rate": 1e-3, "dtype": dtype, "model": "tiny/sft", "save_every": 1}
    _, wanted = train(sft, ROWS, **flags)
    _, found = train(sft, ROWS, **flags, optimizer="adamw8bit")
    assert found[-1]["loss"] == pytest.approx(wanted[-1]["loss"], rel=0.02) != wanted[0]["loss"]
    assert found[-1]["learning_rate"] == wanted[-1]["learning_rate"]
    assert_continues(lambda *given, **more: train(sft, *given, **flags | more), ROWS, optimizer="adamw8bit")
