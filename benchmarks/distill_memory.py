"""Peak memory of the divergence and its gradient: distill.py's heads in chunks beside both logits at once.

    python benchmarks/distill_memory.py          # 4 minutes on one core, 8 GB of memory

Student and teacher are random states, (C, H) and (C, H_t), under random heads over a vocabulary of V: the
part of a distillation step that grows with V. What is compared:

    cleanpost    distill.token_divergences, with all its metrics, and its backward pass
    plain        both logits (C, V) in float32, their log-softmax, torch.nn.functional.kl_div, autograd

Each has a process of its own, which makes its inputs, runs on one token so that libraries are loaded, and
takes the memory that it holds then as its start; the peak is the most that was resident later (VmHWM) above
it, with the gradients of states and head. Loss and gradients of both are compared by value and norm.
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import tyro

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ("cleanpost", "plain")
TARGET = 0.3  # peak memory of cleanpost over that of plain, at most


@dataclass
class Args:
    divergences: tuple[str, ...] = ("forward_kl", "reverse_kl", "jsd")
    """Which of distill.py's divergences."""
    num_tokens: int = 8192
    """Trained tokens C."""
    vocab_size: int = 32768
    """Entries V of the vocabulary."""
    hidden_size: int = 256
    """H of the student."""
    teacher_hidden_size: int = 512
    """H_t of the teacher."""
    contender: str = ""
    """Set for the processes that this one starts."""


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(args: Args) -> dict:
    """One contender, in this process: peak memory above the start, loss, norms of gradients, seconds."""
    sys.path.insert(0, str(ROOT))
    import torch
    import torch.nn.functional as F

    import distill
    from common import collate, head_logits

    torch.manual_seed(0)
    weight, teacher_weight = (
        torch.randn(args.vocab_size, size) * 3 / size**0.5
        for size in (args.hidden_size, args.teacher_hidden_size)
    )
    states = torch.randn(1, args.num_tokens + 1, args.hidden_size)
    teacher_states = torch.randn(args.num_tokens, args.teacher_hidden_size)
    student = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation="packed", get_text_config=lambda: SimpleNamespace()),
        get_decoder=lambda: lambda **_: SimpleNamespace(last_hidden_state=states),
        get_output_embeddings=lambda: SimpleNamespace(weight=weight, bias=None),
    )
    divergence = distill.DIVERGENCES[args.divergences[0]]
    if args.divergences[0] == "jsd":
        divergence = partial(divergence, beta=0.5)
    trained = torch.arange(args.num_tokens + 1) > 0
    ids = torch.arange(args.num_tokens + 1) % args.vocab_size

    def cleanpost(count):
        batch = collate([(ids[: count + 1], trained[: count + 1])])
        head = teacher_weight, None, 1.0, None
        return distill.token_divergences(
            student,
            batch,
            lambda c, targets, temperature: distill.live_terms(teacher_states[c], head, targets, temperature),
            divergence=divergence,
            temperature=1.0,
            vocab_size=args.vocab_size,
        )[0]

    def plain(count):
        logprobs = head_logits(states[0, :count], weight, None, 1.0, None).log_softmax(-1)  # (C, V)
        with torch.no_grad():
            teacher_logits = head_logits(teacher_states[:count], teacher_weight, None, 1.0, None)
            teacher_logprobs = teacher_logits.log_softmax(-1)  # (C, V)
            del teacher_logits
        kl = partial(F.kl_div, reduction="none", log_target=True)  # of its second argument to its first
        if args.divergences[0] == "forward_kl":
            return kl(logprobs, teacher_logprobs).sum(-1)
        if args.divergences[0] == "reverse_kl":
            return kl(teacher_logprobs, logprobs).sum(-1)
        mixture = torch.logaddexp(logprobs, teacher_logprobs) - math.log(2)  # (C, V)
        return (kl(mixture, teacher_logprobs).sum(-1) + kl(mixture, logprobs).sum(-1)) / 2

    contender = {"cleanpost": cleanpost, "plain": plain}[args.contender]
    for x in (states, weight):
        x.requires_grad_()
    contender(1).sum().backward()
    states.grad = weight.grad = None
    start, started = resident("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on
    loss = contender(args.num_tokens).mean()
    loss.backward()
    return {
        "peak_bytes": resident("VmHWM") - start,
        "seconds": time.perf_counter() - started,
        "loss": loss.item(),
        "grad_norm_states": states.grad.norm().item(),
        "grad_norm_head": weight.grad.norm().item(),
    }


def main(args: Args):
    if args.contender:
        print(json.dumps(measure(args)))
        return
    results = {}
    for divergence in args.divergences:
        found = {}
        for contender in CONTENDERS:
            flags = ["--divergences", divergence, "--contender", contender]
            for name in ("num_tokens", "vocab_size", "hidden_size", "teacher_hidden_size"):
                flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, __file__, *flags],
                check=True,
                capture_output=True,
                text=True,
                env=environment,
            )
            found[contender] = json.loads(done.stdout.splitlines()[-1])
        one, other = (found[contender] for contender in CONTENDERS)
        keys = ("loss", "grad_norm_states", "grad_norm_head")
        found["memory_ratio"] = one["peak_bytes"] / other["peak_bytes"]
        found["relative_difference"] = {key: abs(one[key] / other[key] - 1) for key in keys}
        results[divergence] = found
        peaks = ", ".join(f"{name} {found[name]['peak_bytes'] / 2**30:.2f} GiB" for name in CONTENDERS)
        print(f"{divergence}: {peaks}, ratio {found['memory_ratio']:.3f} (goal {TARGET})", flush=True)
    result = {
        "command": "python benchmarks/distill_memory.py",
        "settings": asdict(args),
        "target": TARGET,
        "divergences": results,
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.system(),
            "python": platform.python_version(),
        },
        "versions": {"torch": version("torch")},
    }
    path = ROOT / "benchmarks" / "results" / "distill_memory.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
