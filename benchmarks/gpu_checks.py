"""What benchmarks/gpu.py checks: that a GPU computes what the CPU does, in bfloat16 and float32.

Each check returns a figure; `CHECKS` at the end has its name and the most that it may be. What makes a step
of sft.py, dpo.py and grpo.py (`sft_work` and so on) serves the measurements of gpu.py, too.

tyro, datasets and pydantic may be missing (a bare machine): stand-ins then read the scripts' flags unchecked.
"""

import dataclasses
import functools
import gc
import inspect
import json
import math
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import loading  # noqa: E402


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

OLD_VARLEN = "enable_gqa" not in inspect.signature(common.varlen_attn).parameters
if OLD_VARLEN:  # torch 2.11, which takes grouped heads without being told
    kernel = common.varlen_attn
    common.varlen_attn = lambda *args, enable_gqa, **options: kernel(*args, **options)

GROUP, END = 8, 2  # completions of a prompt; the end token
MODEL = "tiny/sft"
warnings.filterwarnings("ignore", category=FutureWarning)  # new names in transformers for old ones
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
    """Free what is no longer used, compiled code included: with too many variants PyTorch stops."""
    torch._dynamo.reset()
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
def distance(found, expected) -> float:
    """|found - expected| / |expected| of two tensors, in float64 on the CPU."""
    found, expected = (x.detach().double().cpu() for x in (found, expected))
    return float((found - expected).norm() / expected.norm())


def text_sequences(count=12):
    """The first rows of tiny/'s SFT data as token sequences."""
    args = sft.Args(model=MODEL)
    path = str(ROOT / "tiny" / "data" / "sft_eval.jsonl")
    return sft.load_sequences(sft.load_tokenizer(args), path, "train", args, count)


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


def step_equals_cpu(device, name, dtype):
    model = load(device, dtype).train()
    found = float(accumulate(model, tiny_work(name, device))), clip(model)
    return max(abs(x / y - 1) for x, y in zip(found, step_on_cpu(name)))


def no_synchronisation(device, name):
    model, work = load(device).train(), tiny_work(name, device)
    accumulate(model, work)  # the first pass may set things up
    with no_host_synchronisation(device):
        accumulate(model, work)
    return 0


def gradient(device, dtype="bfloat16", **flags) -> torch.Tensor:
    """All gradients of one step of sft.py, end to end."""
    model = load(device, dtype, **flags).train()
    accumulate(model, tiny_work("sft", device))
    grads = [p.grad.full_tensor() if isinstance(p, DTensor) else p.grad for p in model.parameters()]
    return torch.cat([grad.flatten() for grad in grads])


def checkpointing(device):
    return distance(gradient(device, gradient_checkpointing=True), gradient(device))


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


def sampler_equals_trainer(device):
    model = load(device).eval()
    prompts = [ids[: int(trained.argmax())].tolist() for ids, trained in text_sequences(8)]
    uniforms = torch.rand(8, 32, generator=torch.Generator().manual_seed(0)).to(device)
    sampled = loading.unsharded(common.decode)(model, prompts, uniforms, [END], 1.0)
    rows = [(p + ids, [False] * len(p) + [True] * len(ids)) for p, (ids, _) in zip(prompts, sampled)]
    with torch.no_grad():
        logprobs = common.token_logprobs(model, common.collate(rows, device)).cpu()  # (C,)
    return float((logprobs - torch.cat([line for _, line in sampled])).abs().mean())


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
        on, off = (common.token_logprobs(x, batch) for x in (model, loading.WithoutLora(model)))
        expected = common.token_logprobs(base, batch)
    if float((on - off).abs().max()) < 0.05:
        raise AssertionError("the LoRA changes nothing")
    return float((off - expected).abs().max())


def compiled(device):
    exact = gradient(device, "float32")
    return distance(gradient(device, compile=True), exact) / distance(gradient(device), exact)


CHECKS = [  # name, the most that the figure may be, function, its arguments beside the device
    ("packed bfloat16 log-probs: error over that of sequences alone", 1.5, packed_equals_alone),
    ("varlen attention against float32 sdpa a sequence", 0.015, varlen, (4, 4), None, False),
    ("varlen attention, grouped heads", 0.015, varlen, (8, 2), None, False),
    ("varlen attention, sliding window", 0.015, varlen, (4, 4), 50, False),
    ("varlen attention, shared prompts", 0.015, varlen, (4, 4), None, True),
    ("varlen attention, all three", 0.015, varlen, (8, 2), 50, True),
    ("float32 logits of bfloat16 states against float64", 1e-5, float32_logits, False),
    ("float32 logits, their gradients", 0.01, float32_logits, True),
    ("head of 151,936 tokens against float64, nats", 1e-3, head_logprobs),
    ("sft loss and gradient norm in float32 against the CPU", 1e-3, step_equals_cpu, "sft", "float32"),
    ("dpo loss and gradient norm in float32", 1e-3, step_equals_cpu, "dpo", "float32"),
    ("grpo loss and gradient norm in float32", 1e-3, step_equals_cpu, "grpo", "float32"),
    ("sft loss and gradient norm, bfloat16 under FSDP2", 0.03, step_equals_cpu, "sft", "bfloat16"),
    ("dpo loss and gradient norm, bfloat16 under FSDP2", 0.03, step_equals_cpu, "dpo", "bfloat16"),
    ("grpo loss and gradient norm, bfloat16 under FSDP2", 0.03, step_equals_cpu, "grpo", "bfloat16"),
    ("no host synchronisation in sft's passes", 0, no_synchronisation, "sft"),
    ("no host synchronisation in dpo's passes", 0, no_synchronisation, "dpo"),
    ("no host synchronisation in grpo's passes", 0, no_synchronisation, "grpo"),
    ("gradients with and without checkpointing under FSDP2", 1e-3, checkpointing),
    ("greedy completions that `generate` has otherwise, share", 0, decode_equals_generate),
    ("sampler's log-probs against training's, bfloat16, nats", 0.03, sampler_equals_trainer),
    ("step 4 of sft.py: 2 steps and --resume against 4", 1e-3, resume),
    ("LoRA off against the model without one, nats", 1e-3, lora),
    ("gradients under --compile: error over that without, bfloat16", 1.5, compiled),
]
