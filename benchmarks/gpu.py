"""On a GPU: is what runs there right, and how fast is it? One command, under 8 minutes on one device.

    python benchmarks/gpu.py                                   # writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --tiny               # a rehearsal: every line but the CUDA calls

First checks, each a figure and what it may be at most; all of them run, whatever fails. Then the speed of SFT,
DPO and GRPO at the shapes of Qwen2.5 with random weights and the whole vocabulary, by the functions of the
scripts: `load_model` (FSDP2, float32 weights, bfloat16 products), `pack`, `collate`, `token_logprobs`, the
losses, `roll_out`. Random weights are made on the device; no file is read. What is counted of a row:

    forward FLOPs = 2 N_body tokens + 2 V H trained tokens + 4 L heads head_dim (query, key) pairs
    step FLOPs    = 3 x forward, for forward and backward pass; recomputing for checkpointing is not counted
    MFU           = step FLOPs / (seconds of the step x dense bfloat16 peak of the device)

N_body: matrices of the layers, without embedding and head. A query of a causal sequence has its own position
and all before it as keys; a prompt that several answers share stands in the row once and is counted once. GRPO's
rollout and reference pass have a time of their own; its MFU is that of the update. The roofline of a step is
its FLOPs at the peak plus the 28 bytes a parameter that AdamW moves, at the bandwidth of the memory.

tyro, datasets and pydantic may be missing (a bare machine): stand-ins then read the scripts' flags unchecked.
"""

import argparse
import dataclasses
import faulthandler
import functools
import gc
import inspect
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
parser.add_argument("--tiny", action="store_true", help="speed of a tiny model, for a rehearsal")
parser.add_argument("--minutes", type=float, default=7, help="speed cases that begin later are skipped")
parser.add_argument("--case-seconds", type=float, default=60, help="a case, compiling included, ends there")
parser.add_argument("--only", default="", help="checks and cases whose name has this text")
ROOT = Path(__file__).resolve().parent.parent
parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
if __name__ == "__main__" and "cpu" in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the scripts take a GPU where they see one
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen2Config  # noqa: E402

import common  # noqa: E402


def read_json_lines(kind, data_files, split):
    return [json.loads(line) for line in open(data_files, encoding="utf-8")]


def stand_in() -> list[str]:
    """Put stand-ins where packages are missing that the scripts import -> their names."""
    anything = lambda *_, **__: None
    kinds = {"FilePath": Path, "PositiveFloat": float, "NonNegativeFloat": float}
    kinds |= {"PositiveInt": int, "NonNegativeInt": int, "Field": anything, "ValidationError": ValueError}
    quiet = {"logging": SimpleNamespace(set_verbosity=anything, CRITICAL=50)}
    stand_ins = {
        "tyro": {"cli": anything},
        "datasets": quiet | {"disable_progress_bars": anything, "load_dataset": read_json_lines},
        "pydantic": kinds | {"dataclasses": dataclasses, "model_validator": lambda mode: lambda check: check},
    }
    missing = []
    for name, contents in stand_ins.items():
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
            sys.modules[name] = module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            vars(module).update(contents)
    return missing


MISSING = stand_in()
import dpo  # noqa: E402
import grpo  # noqa: E402
import sft  # noqa: E402

if OLD_VARLEN := "enable_gqa" not in inspect.signature(common.varlen_attn).parameters:  # torch before 2.12,
    kernel = common.varlen_attn  # which takes grouped heads without being told
    common.varlen_attn = lambda *args, enable_gqa, **options: kernel(*args, **options)

PEAKS = {  # dense bfloat16 FLOP/s and bytes/s by what a device's name contains, from NVIDIA's datasheets
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "B200": (2250e12, 8e12),
    "A100": (312e12, 2.0e12),
    "L40S": (362e12, 0.864e12),
    "4090": (165e12, 1.008e12),
}
KEYS = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
SHAPES = {  # of Qwen2.5: the numbers of KEYS, is the head tied, tokens of a row, prompts and tokens of a rollout
    "1.5B": ((1536, 8960, 28, 12, 2, 151_936), True, 16_384, 16, 256),
    "0.5B": ((896, 4864, 24, 14, 2, 151_936), True, 16_384, 16, 256),
    "7B": ((3584, 18_944, 28, 28, 4, 152_064), False, 8192, 16, 256),
    "tiny": ((64, 128, 2, 4, 2, 512), True, 256, 2, 8),
}
# Algorithm, checkpointing, compile; all sizes go through the first list before the second one begins
CASES = [[(name, again, False) for again in (False, True) for name in ("sft", "dpo", "grpo")]]
CASES += [[("sft", False, True), ("dpo", False, True), ("grpo", False, True), ("sft", True, True)]]
GROUP, END = 8, 2  # completions of a prompt; the end token
MODEL = "tiny/sft"
for script in (sft, dpo, grpo):
    script.say = lambda message: None


# ------------------------------------------------------------------------------------------------------------
# What both parts use
# ------------------------------------------------------------------------------------------------------------
class Skipped(Exception):
    """A check or a case that cannot run here, and why."""


class Clock:
    """Seconds between marks, summed by name; on CUDA by events, which nothing waits for until `read`."""

    def __init__(self, device):
        self.on_gpu, self.marks = device.type == "cuda", []

    def mark(self, name: str):
        now = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            now.record()
        self.marks.append((name, now))

    def read(self) -> dict[str, float]:
        if self.on_gpu:
            torch.cuda.synchronize()
        found = {}
        for (_, before), (name, now) in zip(self.marks, self.marks[1:]):
            seconds = before.elapsed_time(now) / 1000 if self.on_gpu else now - before
            found[name] = found.get(name, 0) + seconds
        return found


@contextmanager
def no_host_synchronisation(device):
    """In here the host may not wait for the device: PyTorch raises where it would."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def load(device, dtype="bfloat16", frozen=False, script=sft, **flags):
    """MODEL as a script loads it: trained in bfloat16 it is FSDP2's."""
    return script.load_model(MODEL, script.Args(model=MODEL, dtype=dtype, **flags), device, frozen=frozen)


def forget_models():
    gc.collect()  # FSDP's modules refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def clip(model, limit=math.inf) -> float:
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def sft_work(sequences, budget, device):
    """The rows of one step, the loss of each as sft.py has it, and the rows' batches, to count FLOPs."""
    num_trained = sum(int(trained.sum()) for _, trained in sequences)
    rows = [[sequences[i] for i in row] for row in common.pack([len(x) for x, _ in sequences], budget)]

    def loss(model, row):
        batch = common.collate(row, device)
        logprobs, _, _ = common.token_logprobs(model, batch, return_entropy=True, return_top1=True)  # (C,)
        return sft.sft_loss(logprobs, num_trained)

    return SimpleNamespace(rows=rows, loss=loss, batches=[common.collate(row) for row in rows])


def dpo_work(pairs, ref_logps, budget, device):
    """The same for dpo.py; ref_logps (P, 2) are the reference's, on the device."""
    args = SimpleNamespace(attn="packed")
    lengths = [dpo.row_length(pair, args) for pair in pairs]
    rows = [([pairs[i] for i in row], ref_logps[row]) for row in common.pack(lengths, budget)]

    def loss(model, row):
        batch = dpo.collate_pairs(row[0], args, device)
        logps, _, _ = dpo.answer_logps(model, None, batch, "sigmoid")  # (B, 2)
        return dpo.dpo_loss(*(logps - row[1]).T, beta=0.1).sum() / len(pairs)

    return SimpleNamespace(rows=rows, loss=loss, batches=[dpo.collate_pairs(x, args, "cpu") for x, _ in rows])


def grpo_work(rollout, advantages, budget, device, on_policy=True):
    """The same for grpo.py, its advantages (B,) given; off policy the ratio is to the sampler's log-probs."""
    args = SimpleNamespace(max_tokens_per_micro_batch=budget, attn="packed")
    lengths = torch.tensor([len(completion.token_ids) for completion in rollout])  # (B,)
    weights = grpo.token_weights(lengths, "seq_mean_token_mean", int(lengths.max())).to(device)  # (B,)
    advantages = advantages.to(device)

    def loss(model, row):
        logprobs, _ = common.token_logprobs(model, row.batch, return_entropy=True)  # (C,)
        ratio = grpo.importance_ratio(logprobs, logprobs.detach() if on_policy else row.sampler_logprobs)
        return (grpo.grpo_loss(ratio, advantages[row.completion], 0.2, 0.2) * weights[row.completion]).sum()

    rows = grpo.pack_rollout(rollout, list(range(len(rollout))), args, device)
    return SimpleNamespace(rows=rows, loss=loss, batches=[row.batch for row in rows])


def accumulate(model, work, clock=None) -> torch.Tensor:
    """Forward and backward pass of every row of a step -> its loss."""
    losses = []
    for row in work.rows:
        loss = work.loss(model, row)
        if clock:
            clock.mark("forward")
        loss.backward()
        if clock:
            clock.mark("backward")
        losses.append(loss.detach())
    return sum(losses)


def random_sequence(rng, vocab_size, prompt, length):
    """`length` random tokens behind a prompt, an array, all of them trained."""
    ids = np.concatenate([prompt, rng.integers(3, vocab_size, length)])
    return sft.Sequence(ids, np.arange(len(ids)) >= max(1, len(prompt)))


def random_pairs(rng, vocab_size, count, low, high):
    """Pairs whose prompt has `low` tokens, their answers `low` to `high`."""
    pairs = []
    for _ in range(count):
        prompt = rng.integers(3, vocab_size, low)
        answers = [random_sequence(rng, vocab_size, prompt, n) for n in rng.integers(low, high, 2)]
        pairs.append(dpo.Pair(*answers))
    return pairs


# ------------------------------------------------------------------------------------------------------------
# Checks: each returns a figure, which may be at most what stands beside its name
# ------------------------------------------------------------------------------------------------------------
CHECKS = []  # name, largest figure, function of the device


def check(name: str, largest: float, *args):
    def register(function):
        CHECKS.append((name, largest, lambda device: function(device, *args)))
        return function

    return register


def distance(found, expected) -> float:
    """|found - expected| / |expected| of two tensors, in float64 on the CPU."""
    found, expected = (x.detach().double().cpu() for x in (found, expected))
    return float((found - expected).norm() / expected.norm())


def text_sequences(count=12):
    """The first rows of tiny/'s SFT data as token sequences."""
    args = sft.Args(model=MODEL)
    path = str(ROOT / "tiny" / "data" / "sft_eval.jsonl")
    return sft.load_sequences(sft.load_tokenizer(args), path, "train", args, count)


@check("packed bfloat16 log-probs: their error over that of each sequence alone in bfloat16", 1.5)
def packed_equals_alone(device):
    sequences, found = text_sequences(), {}
    for dtype, packed in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        model = load(device, dtype, frozen=True, attn="packed" if packed else "sdpa").eval()
        batches = [sequences] if packed else [[sequence] for sequence in sequences]
        with torch.no_grad():
            parts = [common.token_logprobs(model, common.collate(batch, device)) for batch in batches]
        found[dtype, packed] = torch.cat(parts)  # (C,)
    exact, alone, packed = found.values()
    return float((packed - exact).abs().mean() / (alone - exact).abs().mean())


@check("variable-length attention against float32 sdpa of each sequence", 0.015, (4, 4), None, False)
@check("the same with grouped heads", 0.015, (8, 2), None, False)
@check("the same with a sliding window", 0.015, (4, 4), 50, False)
@check("the same with shared prompts", 0.015, (4, 4), None, True)
@check("the same with all three", 0.015, (8, 2), 50, True)
def varlen(device, heads, window, sharing, head_dims=(64, 128)):
    """The worst of output and gradients, over head sizes."""
    rng, worst = np.random.default_rng(0), 0.0
    sequences = [random_sequence(rng, 100, np.arange(70), n) for n in (40, 1, 130, 65, 3)]
    shared = [0, 70, 70, 0, 70] if sharing else None
    batch = common.collate(sequences, shared=shared)
    key_lengths = torch.tensor(batch.key_lengths or batch.lengths)
    for head_dim in head_dims:
        generator = torch.Generator().manual_seed(head_dim)
        sizes = [(1, n, batch.input_ids.shape[1], head_dim) for n in (heads[0], heads[1], heads[1])]
        qkv = [torch.randn(size, generator=generator).bfloat16() for size in sizes]
        weights, found = torch.randn(1, sizes[0][2], heads[0], head_dim, generator=generator), []
        for place, dtype in (("cpu", torch.float32), (device, torch.bfloat16)):
            query, key, value = (x.to(place, dtype).requires_grad_() for x in qkv)
            settings = {
                "packed_lengths": torch.tensor(batch.lengths),
                "cu_seq_lens_q": batch.cu_seqlens.to(place),
                "cu_seq_lens_k": F.pad(key_lengths.cumsum(0), (1, 0)).int().to(place),
                "max_length_q": max(batch.lengths),
                "max_length_k": int(key_lengths.max()),
                "sliding_window": window,
                "scaling": head_dim**-0.5,
            }
            if sharing:
                settings |= {"packed_key_lengths": key_lengths, "packed_key_index": batch.key_index.to(place)}
            module = SimpleNamespace(config=SimpleNamespace(sliding_window=window))
            out, _ = common.packed_attention(module, query, key, value, None, **settings)
            slopes = torch.autograd.grad((out.float() * weights.to(place)).sum(), (query, key, value))
            found.append((out, *slopes))
        worst = max(worst, *(distance(x, expected) for expected, x in zip(*found)))
    return worst


@check("float32 logits of bfloat16 states and head against float64", 1e-5, False)
@check("their gradients", 0.01, True)
def float32_logits(device, gradients):
    generator = torch.Generator().manual_seed(0)
    sizes, found = ((512, 896), (896, 4096), (512, 4096)), []
    a, b, weights = (torch.randn(size, generator=generator).bfloat16() for size in sizes)
    for place, dtype in (("cpu", torch.float64), (device, torch.bfloat16)):
        x, y = (t.to(place, dtype).requires_grad_() for t in (a, b))
        product = x @ y if dtype == torch.float64 else common.float32_product(x, y)
        slopes = torch.autograd.grad((product * weights.to(place, product.dtype)).sum(), (x, y))
        found.append(slopes if gradients else (product,))
    return max(distance(x, expected) for expected, x in zip(*found))


@check("log-probs and entropy of a bfloat16 head of 151,936 tokens against float64, nats", 1e-3)
def head_logprobs(device):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 256, generator=generator).bfloat16() for n in (64, 151_936))
    hidden, targets = hidden / 4, torch.arange(64) * 2000
    settings = (None, targets.to(device), 1.0, 1.0, None, 48, True, False)
    logprobs, entropy, _ = common._HeadLogprobs.apply(hidden.to(device), weight.to(device), *settings)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)  # (64, V)
    errors = logprobs.cpu() - exact[range(64), targets], entropy.cpu() + (exact.exp() * exact).sum(-1)
    return float(torch.stack(errors).abs().max())


@functools.cache
def tiny_rollout():
    """Four completions of each of four of tiny/'s prompts, sampled on the CPU; advantages (16,)."""
    prompts = [ids[: int(trained.argmax())].tolist() for ids, trained in text_sequences(4)]
    asked = [grpo.Prompt(prompt, {}, "") for prompt in prompts for _ in range(4)]
    uniforms = torch.rand(16, 24, generator=torch.Generator().manual_seed(0))
    model = load(torch.device("cpu"), "float32", frozen=True).eval()
    sampled = common.decode(model, [prompt.input_ids for prompt in asked], uniforms, [END], 1.0)
    rollout = [grpo.Completion(p, ids, logps, "", True) for p, (ids, logps) in zip(asked, sampled)]
    return rollout, torch.linspace(-1, 1.5, 16)


def tiny_work(name, device):
    """One step of an algorithm on rows of tiny/."""
    if name == "sft":
        return sft_work(text_sequences(), 512, device)
    if name == "dpo":
        pairs = random_pairs(np.random.default_rng(0), 700, 6, 5, 30)
        ref_logps = -5.0 * torch.from_numpy(dpo.count_tokens(pairs)).float().to(device)  # (6, 2)
        return dpo_work(pairs, ref_logps, 128, device)
    return grpo_work(*tiny_rollout(), 256, device, on_policy=False)


@functools.cache
def step_on_cpu(name) -> tuple[float, float]:
    """Loss and gradient norm in float32 on the CPU."""
    model = load(torch.device("cpu"), "float32").train()
    loss = accumulate(model, tiny_work(name, torch.device("cpu")))
    return float(loss), clip(model)


@check("sft.py's loss and gradient norm, float32, against the CPU's", 1e-3, "sft", "float32")
@check("dpo.py's", 1e-3, "dpo", "float32")
@check("grpo.py's", 1e-3, "grpo", "float32")
@check("sft.py's in bfloat16 under FSDP2, against float32 on the CPU", 0.03, "sft", "bfloat16")
@check("dpo.py's in bfloat16", 0.03, "dpo", "bfloat16")
@check("grpo.py's in bfloat16", 0.03, "grpo", "bfloat16")
def step_equals_cpu(device, name, dtype):
    model = load(device, dtype).train()
    found = float(accumulate(model, tiny_work(name, device))), clip(model)
    return max(abs(x / y - 1) for x, y in zip(found, step_on_cpu(name)))


@check("host synchronisations in forward and backward pass: sft.py", 0, "sft")
@check("the same: dpo.py", 0, "dpo")
@check("the same: grpo.py", 0, "grpo")
def no_synchronisation(device, name):
    model, work = load(device).train(), tiny_work(name, device)
    accumulate(model, work)  # the first pass may set things up
    with no_host_synchronisation(device):
        accumulate(model, work)
    return 0


@check("gradients with and without checkpointing under FSDP2", 1e-3)
def checkpointing(device):
    found = []
    for again in (False, True):
        model = load(device, gradient_checkpointing=again).train()
        accumulate(model, tiny_work("sft", device))
        found.append(torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()]))
    return distance(*found)


@check("share of greedy completions in float32 that `generate` has otherwise", 0)
def decode_equals_generate(device):
    model = load(device, "float32", frozen=True).eval()
    prompts = [ids[: int(trained.argmax())].tolist() for ids, trained in text_sequences(8)]
    sampled = common.decode(model, prompts, torch.zeros(8, 24, device=device), [END], 0.0)
    settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": END, "pad_token_id": 0}
    others = 0
    for prompt, (ids, _) in zip(prompts, sampled):
        ask = torch.tensor([prompt], device=device)
        whole = model.generate(input_ids=ask, attention_mask=torch.ones_like(ask), **settings)[0].tolist()
        others += whole[len(prompt) :] != ids
    return others / len(prompts)


@check("sampler's log-probs against those of training, bfloat16, mean nats", 0.03)
def sampler_equals_trainer(device):
    model = load(device).eval()
    prompts = [ids[: int(trained.argmax())].tolist() for ids, trained in text_sequences(8)]
    uniforms = torch.rand(8, 32, generator=torch.Generator().manual_seed(0)).to(device)
    sampled = common.unsharded(common.decode)(model, prompts, uniforms, [END], 1.0)
    rows = [(p + ids, [False] * len(p) + [True] * len(ids)) for p, (ids, _) in zip(prompts, sampled)]
    with torch.no_grad():
        logprobs = common.token_logprobs(model, common.collate(rows, device)).cpu()  # (C,)
    return float((logprobs - torch.cat([line for _, line in sampled])).abs().mean())


@check("loss and gradient norm of sft.py's step 4: 2 steps and --resume against 4 steps", 1e-3)
def resume(device):
    lines = (ROOT / "tiny" / "data" / "sft_train.jsonl").read_text(encoding="utf-8").splitlines()[:64]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("\n".join(lines), encoding="utf-8")
        flags = {"model": MODEL, "dataset": (str(rows),), "batch_size": 8, "eval_every": 0, "save_every": 2}
        flags |= {"lr_schedule": "constant", "warmup_steps": 0, "dtype": "bfloat16"}
        whole = sft.main(sft.Args(output_dir=f"{folder}/whole", max_steps=4, **flags))
        sft.main(sft.Args(output_dir=f"{folder}/parts", max_steps=2, **flags))
        parts = sft.main(sft.Args(output_dir=f"{folder}/parts", max_steps=4, resume=True, **flags))
    return max(abs(parts[key] / whole[key] - 1) for key in ("loss", "grad_norm"))


@check("log-probs with LoRA off against the model without one, nats", 1e-3)
def lora(device):
    try:
        import peft  # noqa: F401
    except ImportError:
        raise Skipped("peft is not installed") from None
    batch = common.collate(text_sequences(4), device)
    model, base = load(device, lora_rank=4).eval(), load(device, frozen=True).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first: a LoRA that does nothing
                (parameter.to_local() if isinstance(parameter, DTensor) else parameter).fill_(0.02)
        on, off = (common.token_logprobs(x, batch) for x in (model, common.WithoutLora(model)))
        expected = common.token_logprobs(base, batch)
    if float((on - off).abs().max()) < 0.05:
        raise AssertionError("the LoRA changes nothing")
    return float((off - expected).abs().max())


@check("gradients with and without --compile", 0.03)
def compiled(device):
    found = []
    for compile_it in (False, True):
        model = load(device, compile=compile_it).train()
        accumulate(model, tiny_work("sft", device))
        found.append(torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()]))
    return distance(*found)


# ------------------------------------------------------------------------------------------------------------
# Speed
# ------------------------------------------------------------------------------------------------------------
def load_shape(size, device, frozen=False, compile=False):
    """A model of random weights by a script's `load_model`, which finds a folder with nothing but a config."""
    numbers, tied, *_ = SHAPES[size]
    more = {"tie_word_embeddings": tied, "max_position_embeddings": 32_768, "eos_token_id": END}
    config = Qwen2Config(**dict(zip(KEYS.split(), numbers)), **more)

    def on_device(folder, **settings):
        with device:
            return AutoModelForCausalLM.from_config(config, **settings)

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        args = sft.Args(model=folder, dtype="bfloat16", compile=compile)
        kind = SimpleNamespace(from_pretrained=on_device)
        return sft.load_model(folder, args, device, frozen=frozen, kind=kind)


def sizes_of(model) -> tuple[int, int, int]:
    """Parameters of the layers' matrices, of the head, and FLOPs of a (query, key) pair in all layers."""
    config = model.config
    body = sum(p.numel() for p in model.get_decoder().layers.parameters() if p.ndim == 2)
    return body, config.vocab_size * config.hidden_size, 4 * config.num_hidden_layers * config.hidden_size


def forward_flops(model, batch) -> int:
    """The formula at the head of this file, for a row."""
    body, head, pair = sizes_of(model)
    lengths = zip(batch.lengths, batch.key_lengths or batch.lengths)
    pairs = sum(n * (keys - n) + n * (n + 1) // 2 for n, keys in lengths)
    return 2 * body * sum(batch.lengths) + 2 * head * len(batch.completion_index) + pair * pairs


def optimizer_of(model):
    """AdamW as the scripts make it."""
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.0}
    vectors = {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=1e-6, fused=True)


def roll_out(size, model, rng, device) -> tuple[list, dict]:
    """grpo.py's rollout of the size's prompts; its seconds beside those that memory alone would take."""
    numbers, _, _, num_prompts, longest = SHAPES[size]
    prompts = [
        grpo.Prompt(rng.integers(3, numbers[-1], longest).tolist(), {}, "") for _ in range(num_prompts)
    ]
    args = SimpleNamespace(max_completion_length=4, max_tokens_per_rollout=65_536)
    tokenizer = SimpleNamespace(batch_decode=lambda ids, **_: [""] * len(ids))
    grpo.roll_out(model, tokenizer, prompts, GROUP, 1.0, (0, 0), args)
    args.max_completion_length, clock = longest, Clock(device)
    clock.mark("start")
    rollout = grpo.roll_out(model, tokenizer, prompts, GROUP, 1.0, (0, 1), args)
    clock.mark("rollout")
    seconds, tokens = clock.read()["rollout"], sum(len(answer.token_ids) for answer in rollout)
    body, head, _ = sizes_of(model)
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    cached = 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim  # bytes of a token
    bytes_read = longest * (2 * (body + head) + len(rollout) * 1.5 * longest * cached)
    found = {"rollout_tokens": tokens, "rollout_tokens_per_second": tokens / seconds}
    return rollout, {"split": {"rollout": seconds}, "rollout_bytes": bytes_read} | found


def measure(size, name, model, optimizer, device, peak, bandwidth, warm_up=1, steps=3) -> dict:
    """One case: seconds of a step and of its parts, tokens a second, MFU, memory."""
    numbers, _, budget, _, _ = SHAPES[size]
    rng, low, result = np.random.default_rng(0), budget // 64, {"split": {}}
    clock = Clock(device)
    if name == "sft":  # a prompt of `low` tokens, an answer of up to six times as many
        lengths = rng.integers(low, 6 * low, int(1.9 * budget / (4.5 * low)))
        prompts = [rng.integers(3, numbers[-1], low) for _ in lengths]
        sequences = [random_sequence(rng, numbers[-1], *pair) for pair in zip(prompts, lengths)]
        work = sft_work(sequences, budget, device)
    elif name == "dpo":
        pairs = random_pairs(rng, numbers[-1], int(1.9 * budget / (8 * low)), low, 6 * low)
        args = SimpleNamespace(attn="packed", max_tokens_per_micro_batch=budget)
        clock.mark("start")
        ref_logps = dpo.pair_logps(model, pairs, args, device)  # once, before training
        clock.mark("reference")
        result["reference_seconds_before_training"] = clock.read()["reference"]
        work = dpo_work(pairs, ref_logps, budget, device)
    else:
        rollout, result = roll_out(size, model, rng, device)
        rewards = torch.from_numpy(rng.random((len(rollout) // GROUP, GROUP)))
        work = grpo_work(rollout, grpo.group_advantages(rewards).flatten(), budget, device)
        ref_policy = load_shape(size, device, frozen=True)
        with torch.no_grad():
            for n in range(2):  # the first pass is slower
                clock = Clock(device)
                clock.mark("start")
                for row in work.rows:
                    common.token_logprobs(ref_policy, row.batch)
                clock.mark("reference")
        result["split"] |= clock.read()
    model.train()
    for n in range(warm_up + steps):
        if n == warm_up:
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            clock = Clock(device)
            clock.mark("start")
        loss = accumulate(model, work, clock)
        norm = clip(model, 1.0)  # the host reads it, as in the scripts
        optimizer.step()
        optimizer.zero_grad()
        clock.mark("optimizer")
    split = {part: seconds / steps for part, seconds in clock.read().items()}
    update = sum(split.values())
    tokens = sum(sum(batch.lengths) for batch in work.batches)
    flops = 3 * sum(forward_flops(model, batch) for batch in work.batches)
    size_in_bytes = 28 * sum(p.numel() for p in model.parameters())
    result["split"] |= split
    result |= {"tokens": tokens, "flops": flops, "seconds": sum(result["split"].values())}
    result |= {"tokens_per_second": tokens / result["seconds"], "update_seconds": update}
    result |= {"loss": float(loss), "grad_norm": norm}
    if peak:
        result |= {"mfu": flops / update / peak}
        result["roofline_share"] = (flops / peak + size_in_bytes / bandwidth) / update
        if name == "grpo":
            result["rollout_floor_seconds"] = result["rollout_bytes"] / bandwidth
    if device.type == "cuda":
        result["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def measure_device(device, tiny) -> dict:
    """FLOP/s of a large bfloat16 product, bytes/s of a large copy (read and written), on random data."""
    size, found = 512 if tiny else 8192, {}
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(size * size * 8, device=device)
    target = torch.empty_like(source)
    work = {"matmul_flops": (lambda: torch.mm(a, b), 2 * size**3)}
    work["copy_bytes"] = (lambda: target.copy_(source), 2 * 4 * source.numel())
    for name, (function, amount) in work.items():
        for _ in range(3):
            function()
        clock = Clock(device)
        clock.mark("start")
        for _ in range(10):
            function()
        clock.mark(name)
        found[f"{name}_per_second"] = 10 * amount / clock.read()[name]
    return found


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------
@contextmanager
def limit(seconds: float):
    """Raise TimeoutError in the block once it has taken so long (between two calls into C)."""

    def stop(*_):
        raise TimeoutError(f"not done after {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def described(error: BaseException) -> str:
    """An exception in a line, with the project's own line that it came through last."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(ROOT)]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}{place}"


def versions() -> dict:
    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "transformers", "triton", "peft", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def run_checks(args, device, say) -> list[dict]:
    done = []
    for name, largest, function in CHECKS:
        if args.only not in name:
            continue
        entry = {"name": name, "at_most": largest, "passed": False}
        started = time.perf_counter()
        try:
            with limit(args.case_seconds):
                entry["figure"] = float(function(device))
            entry["passed"] = entry["figure"] <= largest
        except Skipped as reason:
            entry |= {"passed": None, "skipped": str(reason)}
        except (Exception, SystemExit) as error:  # a script's `fail` exits
            entry["error"] = described(error)
        entry["seconds"] = time.perf_counter() - started
        verdict = {True: "ok", False: "FAIL", None: "skipped"}[entry["passed"]]
        figure = f"{entry['figure']:.2g} of {largest:g}" if "figure" in entry else ""
        say(f"{verdict:<8}{name}: {figure}{entry.get('error', entry.get('skipped', ''))}")
        done.append(entry)
        forget_models()
    return done


def run_cases(args, device, peak, bandwidth, deadline, say, save) -> list[dict]:
    """Measure case after case; an error ends the case and its model, not the others."""
    done, too_large = [], set()
    sizes = ["tiny"] if args.tiny else [size for size in SHAPES if size != "tiny"]
    groups = [(size, cases) for cases in CASES for size in sizes]
    for size, cases in groups:
        model = optimizer = None
        for name, again, compile_it in cases:
            case = {"model": size, "algorithm": name, "checkpointing": again, "compile": compile_it}
            label = f"{size} {name}{' checkpointing' * again}{' compile' * compile_it}"
            if args.only not in label:
                continue
            done.append(case)
            left = deadline - time.perf_counter()
            if left < 1 or (size, again) in too_large:
                case["skipped"] = "no time left" if left < 1 else "another algorithm does not fit"
                say(f"skipped {label}: {case['skipped']}")
                continue
            try:
                with limit(min(left + 20, args.case_seconds)):
                    if model is None:
                        model = load_shape(size, device, compile=compile_it)
                        model.generation_config.eos_token_id = [END]
                        optimizer = optimizer_of(model)
                    if again:
                        model.gradient_checkpointing_enable({"use_reentrant": False})
                    else:
                        model.gradient_checkpointing_disable()
                    warm_up = 2 if compile_it else 1
                    case |= measure(size, name, model, optimizer, device, peak, bandwidth, warm_up)
                shown = f"{case['tokens_per_second']:,.0f} tokens/s, MFU {case.get('mfu', math.nan):.1%}"
                say(f"{label}: {shown}, {case.get('peak_memory_gb', math.nan):.1f} GiB")
            except (Exception, SystemExit) as error:
                case["error"], case["fits"] = described(error), not isinstance(error, torch.OutOfMemoryError)
                if not case["fits"] and name == "sft":
                    too_large.add((size, again))
                say(f"FAIL    {label}: {case['error']}")
                model = optimizer = None  # FSDP2's state is undefined behind an error
            forget_models()
            save(done)
        del model, optimizer
        forget_models()
    return done


def show(cases):
    """The table: a line a case, seconds of the parts of its step."""
    parts = ("forward", "backward", "optimizer", "rollout", "reference")
    print(f"\n{'case':<34}{'tokens/s':>10}{'MFU':>7}{'GiB':>7}" + "".join(f"{part:>11}" for part in parts))
    for case in cases:
        label = f"{case['model']} {case['algorithm']}" + " checkpointing" * case["checkpointing"]
        label += " compile" * case["compile"]
        if "tokens" not in case:
            print(f"{label:<34}  {case.get('skipped') or case['error']}")
            continue
        times = "".join(f"{case['split'].get(part, math.nan):>11.3f}" for part in parts).replace("nan", "  -")
        memory, mfu = case.get("peak_memory_gb", math.nan), case.get("mfu", math.nan)
        print(f"{label:<34}{case['tokens_per_second']:>10,.0f}{mfu:>7.1%}{memory:>7.1f}{times}")


def main():
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is visible: --device cpu --tiny rehearses without one")
    faulthandler.dump_traceback_later(60 * args.minutes + 120, exit=True)  # whatever hangs
    started, device = time.perf_counter(), sft.setup_distributed()
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "CPU"
    peak, bandwidth = next((PEAKS[key] for key in PEAKS if on_gpu and key in name), (None, None))
    if not on_gpu:
        torch.set_num_threads(1)

    def say(line):
        print(f"{time.perf_counter() - started:6.1f} s  {line}", flush=True)

    def save(cases):
        report["speed"], report["seconds"] = cases, time.perf_counter() - started
        args.out.write_text(json.dumps(report, indent=1) + "\n")

    report = {
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "device": {"name": name, "count": torch.cuda.device_count(), "peak_flops": peak},
        "versions": versions() | {"stand_ins": MISSING, "varlen_attn without enable_gqa": OLD_VARLEN},
        "shapes": {size: SHAPES[size][0] for size in SHAPES},
    }
    report["device"] |= {"bandwidth": bandwidth, "world_size": dist.get_world_size()}
    report["device"] |= measure_device(device, args.tiny)
    peak = peak or (report["device"]["matmul_flops_per_second"] if on_gpu else None)
    bandwidth = bandwidth or report["device"]["copy_bytes_per_second"]
    measured = "{matmul_flops_per_second:.3g} FLOP/s, {copy_bytes_per_second:.3g} bytes/s".format
    say(f"{name}: {measured(**report['device'])}; stand-ins for {', '.join(MISSING) or 'nothing'}")
    report["checks"] = run_checks(args, device, say)
    save([])
    deadline = started + 60 * args.minutes
    save(run_cases(args, device, peak, bandwidth, deadline, say, save))
    show(report["speed"])
    passed = [entry["passed"] for entry in report["checks"]]
    print(f"\n{passed.count(True)} checks passed, {passed.count(False)} failed, {passed.count(None)} skipped")
    skipped = [case for case in report["speed"] if "tokens" not in case]
    say(f"{len(report['speed']) - len(skipped)} cases measured, {len(skipped)} not; written to {args.out}")
    sys.exit(1 if False in passed else 0)


if __name__ == "__main__":
    main()
