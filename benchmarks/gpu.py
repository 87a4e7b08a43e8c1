"""On a GPU: is what runs there right, and how fast is it? One command, under 8 minutes on one device.

    python benchmarks/gpu.py                                   # writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --tiny               # a rehearsal: every line but the CUDA calls

First the checks of gpu_checks.py, all of them, whatever fails. Then the speed of SFT, DPO and GRPO at the
shapes of Qwen2.5 with the whole vocabulary, by the functions of the scripts: `load_model` (FSDP2, float32
weights, bfloat16 products), `pack`, `collate`, `token_logprobs`, the losses, `roll_out`. Weights are random
and made on the device; no file is read. What is counted of a row:

    forward FLOPs = 2 N_body tokens + 2 V H trained tokens + 4 L heads head_dim (query, key) pairs
    step FLOPs    = 3 x forward, for forward and backward pass; recomputing for checkpointing is not counted
    MFU           = step FLOPs / (seconds of the step x dense bfloat16 peak of the device)

N_body: matrices of the layers, without embedding and head. A query of a causal sequence has its own position
and all before it as keys; a prompt that several answers share stands in the row once and is counted once.
GRPO's rollout and reference pass have a time of their own; its MFU is that of the update. The roofline of a
step is its FLOPs at the peak plus the 28 bytes a parameter that AdamW moves, at the bandwidth of the memory.
"""

import argparse
import faulthandler
import json
import math
import platform
import signal
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import gpu_checks
import numpy as np
import torch
import torch.distributed as dist
from gpu_checks import (
    END,
    GROUP,
    ROOT,
    Clock,
    Skipped,
    accumulate,
    clip,
    common,
    dpo,
    forget_models,
    grpo,
    sft,
)
from transformers import AutoModelForCausalLM, Qwen2Config

PEAKS = {  # dense bfloat16 FLOP/s and bytes/s by what a device's name contains, from NVIDIA's datasheets
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "B200": (2250e12, 8e12),
    "A100": (312e12, 2.0e12),
    "L40S": (362e12, 0.864e12),
    "4090": (165e12, 1.008e12),
}
KEYS = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
SHAPES = {  # of Qwen2.5: the numbers of KEYS; is the head tied; tokens of a row; a rollout's prompts, tokens
    "1.5B": ((1536, 8960, 28, 12, 2, 151_936), True, 16_384, 16, 256),
    "0.5B": ((896, 4864, 24, 14, 2, 151_936), True, 16_384, 16, 256),
    "7B": ((3584, 18_944, 28, 28, 4, 152_064), False, 8192, 16, 256),
    "tiny": ((64, 128, 2, 4, 2, 512), True, 256, 2, 8),
}
PACKAGES = ("torch", "transformers", "triton", "peft", "numpy")
# Algorithm, checkpointing, compile; all sizes go through the first list before the second one begins
CASES = [[(name, again, False) for again in (False, True) for name in ("sft", "dpo", "grpo")]]
CASES += [[("sft", False, True), ("dpo", False, True), ("grpo", False, True), ("sft", True, True)]]


# ------------------------------------------------------------------------------------------------------------
# Speed
# ------------------------------------------------------------------------------------------------------------
def load_shape(size, device, frozen=False, compile=False):
    """A model of random weights by `load_model`, which finds a folder with nothing but a config."""
    numbers, tied, *_ = SHAPES[size]
    more = {"tie_word_embeddings": tied, "max_position_embeddings": 32_768, "eos_token_id": END}
    config = Qwen2Config(**dict(zip(KEYS.split(), numbers)), **more)

    def on_device(folder, **settings):
        with device:
            return AutoModelForCausalLM.from_config(config, **settings)

    torch.manual_seed(0)
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
        sequences = [gpu_checks.random_sequence(rng, numbers[-1], *pair) for pair in zip(prompts, lengths)]
        work = gpu_checks.sft_work(sequences, budget, device)
    elif name == "dpo":
        pairs = gpu_checks.random_pairs(rng, numbers[-1], int(1.9 * budget / (8 * low)), low, 6 * low)
        args = SimpleNamespace(attn="packed", max_tokens_per_micro_batch=budget)
        clock.mark("start")
        ref_logps = dpo.pair_logps(model, pairs, args, device)  # once, before training
        clock.mark("reference")
        result["reference_seconds_before_training"] = clock.read()["reference"]
        work = gpu_checks.dpo_work(pairs, ref_logps, budget, device)
    else:
        rollout, result = roll_out(size, model, rng, device)
        rewards = torch.from_numpy(rng.random((len(rollout) // GROUP, GROUP)))
        work = gpu_checks.grpo_work(rollout, grpo.group_advantages(rewards).flatten(), budget, device)
        ref_policy = load_shape(size, device, frozen=True)
        with torch.no_grad():
            for _ in range(2):  # the first pass is slower
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


NO_COMPILE = "compiling on a CPU takes minutes: --only compile does it"


def wanted_compile(args, device) -> bool:
    return device.type == "cuda" or "compile" in args.only


def run_checks(args, device, say) -> list[dict]:
    """Run every check; one that raises has failed."""
    done = []
    for name, largest, function, *more in gpu_checks.CHECKS:
        if args.only not in name:
            continue
        entry = {"name": name, "at_most": largest, "passed": False}
        started = time.perf_counter()
        try:
            if "compile" in name and not wanted_compile(args, device):
                raise Skipped(NO_COMPILE)
            with limit(args.case_seconds):
                entry["figure"] = float(function(device, *more))
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


def label_of(case: dict) -> str:
    flags = [flag for flag in ("checkpointing", "compile") if case[flag]]
    return " ".join([case["model"], case["algorithm"], *flags])


def run_cases(args, device, peak, bandwidth, deadline, say, save) -> list[dict]:
    """Measure case after case; an error ends the case and its model, not the others."""
    done, too_large = [], set()
    sizes = ["tiny"] if args.tiny else [size for size in SHAPES if size != "tiny"]
    groups = [(size, cases) for cases in CASES for size in sizes]
    for size, cases in groups:
        model = optimizer = None
        for name, again, compile_it in cases:
            case = {"model": size, "algorithm": name, "checkpointing": again, "compile": compile_it}
            label = label_of(case)
            if args.only not in label:
                continue
            done.append(case)
            left = deadline - time.perf_counter()
            reasons = {"no time left": left < 1, "sft does not fit, either": (size, again) in too_large}
            reasons[NO_COMPILE] = compile_it and not wanted_compile(args, device)
            if found := [reason for reason, holds in reasons.items() if holds]:
                case["skipped"] = found[0]
                say(f"skipped {label}: {found[0]}")
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
                say(f"{label}: {case['tokens_per_second']:,.0f} tokens/s, MFU {case['mfu']:.1%}")
            except (Exception, SystemExit) as error:
                case["error"] = described(error)
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    case["fits"] = False
                    too_large |= {(size, again)} if name == "sft" else set()
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
        label = label_of(case)
        if "tokens" not in case:
            print(f"{label:<34}  {case.get('skipped') or case['error']}")
            continue
        times = "".join(f"{case['split'].get(part, math.nan):>11.3f}" for part in parts)
        memory, speed = case.get("peak_memory_gb", math.nan), case["tokens_per_second"]
        print(f"{label:<34}{speed:>10,.0f}{case['mfu']:>7.1%}{memory:>7.1f}{times}".replace("nan", "  -"))


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the speed of a tiny model, for a rehearsal")
    parser.add_argument("--minutes", type=float, default=7, help="cases that would begin later are skipped")
    parser.add_argument("--case-seconds", type=float, default=60, help="a case ends there, compiled or not")
    parser.add_argument("--only", default="", help="the checks and cases whose name has this text")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    args = parser.parse_args()
    if (args.device == "cuda") != torch.cuda.is_available():  # the scripts take a GPU where they see one
        parser.error("--device cuda needs a GPU, and --device cpu CUDA_VISIBLE_DEVICES='' where there is one")
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
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda},
        "stand_ins": gpu_checks.MISSING,
        "varlen_attn_without_enable_gqa": gpu_checks.OLD_VARLEN,
        "shapes": {size: SHAPES[size][0] for size in SHAPES},
    }
    report["versions"] |= {name: version(name) for name in PACKAGES if find_spec(name)}
    report["device"] |= {"bandwidth": bandwidth, "world_size": dist.get_world_size()}
    report["device"] |= measure_device(device, args.tiny)
    peak = peak or report["device"]["matmul_flops_per_second"]
    bandwidth = bandwidth or report["device"]["copy_bytes_per_second"]
    measured = "{matmul_flops_per_second:.3g} FLOP/s, {copy_bytes_per_second:.3g} bytes/s".format
    say(f"{name}: {measured(**report['device'])}; stand-ins for {gpu_checks.MISSING}")
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
