"""How much memory a run takes: a formula for every script that trains, and which models fit on which GPUs.

    python benchmarks/memory.py               # a second

`moments` is the formula; memory_measured.py holds it against peaks measured on a CPU. No run on a GPU has
been held against it.
"""

import json
from dataclasses import dataclass
from typing import NamedTuple

from result_tables import ROOT, fits_table, load_result


class Shape(NamedTuple):
    """The sizes of a Qwen2 or, with `qk_norm`, a Qwen3; `tied`: the head is the embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool
    qk_norm: bool = False


class Script(NamedTuple):
    """What a script does with the logits, and what it holds beside the policy."""

    head: str | None = "entropy"  # log-probs, their entropy, too, or a divergence
    rollouts: bool = False  # whether it samples whole rollouts, else only held-out answers
    frozen: int = 0  # references and teachers, which are sharded
    values: bool = False  # whether it trains a value model


@dataclass(frozen=True)
class Run:
    """Where and how a script runs; the defaults are the flags of its GPU command, with checkpointing."""

    script: str = "sft.py"
    processes: int = 1
    bytes_each: int = 2  # of a number in --dtype
    row: int = 16384  # --max-tokens-per-micro-batch
    checkpointing: bool = True  # --gradient-checkpointing
    lora_rank: int = 0
    live: bool = False  # dpo.py: --ref live
    reward_models: int = 0  # of --reward; each process has them whole
    rollout: int = 65536  # --max-tokens-per-rollout
    batch: int = 512  # completions of a rollout, over all processes
    longest: int = 1024  # tokens of a prompt with its completion
    on_cuda: bool = True


SCRIPTS = {name: Script(rollouts=True, frozen=1) for name in ("grpo.py", "dapo.py", "rloo_remax.py")}
SCRIPTS |= {name: Script("log-probs") for name in ("dpo.py", "ipo_kto_simpo_orpo.py")}
SCRIPTS |= {name: Script(None) for name in ("reward_model.py", "process_reward_model.py")}  # no language head
SCRIPTS |= {"sft.py": Script(), "ppo_rlhf.py": Script(rollouts=True, frozen=1, values=True)}
SCRIPTS["distill.py"] = Script("divergence", rollouts=True, frozen=1)  # a teacher as large as the model
MODELS = {  # Qwen2.5
    "0.5B": Shape(896, 24, 14, 2, 64, 4864, 151936, True),
    "1.5B": Shape(1536, 28, 12, 2, 128, 8960, 151936, True),
    "7B": Shape(3584, 28, 28, 4, 128, 18944, 152064, False),
    "32B": Shape(5120, 64, 40, 8, 128, 27648, 152064, False),
}
GPUS, USABLE = (24, 80, 141), 0.92  # GB of 1e9 bytes; the rest is CUDA's and NCCL's, and lost between buffers


# ------------------------------------------------------------------------------------------------------------
# The formula
# ------------------------------------------------------------------------------------------------------------
def attention_sizes(shape: Shape) -> tuple[int, int]:
    """Numbers a token in the queries of a layer, and in its keys."""
    return shape.heads * shape.head_size, shape.kv_heads * shape.head_size


def parameters(shape: Shape, head=True) -> tuple[int, int]:
    """Parameters of the root (embeddings, an untied head if asked, the last norm), and of a layer."""
    (q, k), h = attention_sizes(shape), shape.hidden
    small = 2 * h + (2 * shape.head_size if shape.qk_norm else q + 2 * k)  # two norms; Qwen3's or biases
    root = shape.vocabulary * h * (2 if head and not shape.tied else 1) + h
    return root, h * (2 * q + 2 * k) + 3 * h * shape.intermediate + small


def lora_parameters(shape: Shape, rank: int) -> int:
    """Numbers in A and B of all linear layers but the head: rank times (in + out) of each."""
    (q, k), h = attention_sizes(shape), shape.hidden
    return rank * shape.layers * (4 * h + 2 * q + 2 * k + 3 * (h + shape.intermediate))


def layer_activations(shape: Shape, run: Run) -> int:
    """Bytes a token that a layer keeps for its backward pass.

    In --dtype: what both norms normalise and give, queries, keys, values, what attention gives (twice where
    sequences are joined, on a CPU), of the MLP gate, its SiLU, up and their product. In float32: the input of
    each norm. Qwen3's norms of queries and keys come on top.
    """
    q, k = attention_sizes(shape)
    normed = 2 * shape.hidden + (q + k if shape.qk_norm else 0)
    kept = normed + 2 * shape.hidden + (2 if run.on_cuda else 3) * q + 2 * k + 4 * shape.intermediate
    return run.bytes_each * kept + 4 * normed


def activations(shape: Shape, run: Run) -> int:
    """Bytes that a row keeps: of each layer all, or its input if it is computed again; the last norm."""
    of_layer = shape.hidden * run.bytes_each if run.checkpointing else layer_activations(shape, run)
    return run.row * (shape.layers * of_layer + shape.hidden * (4 + 2 * run.bytes_each))


def head_buffers(shape: Shape, run: Run) -> float:
    """Bytes of the head while it makes the log-probs of a chunk of c tokens, or their gradient.

    Forward: float32 logits (c, V), and as many again for the entropy. Backward: logits, their gradient in
    --dtype, and of a trained head the float32 gradient (V, H), in bfloat16 beside that of the chunk. A
    divergence holds a dozen of (c, V) (benchmarks/distill_memory.py).
    """
    head, small = SCRIPTS[run.script].head, run.bytes_each < 4
    chunk = (1024 if run.on_cuda else 256) if head == "divergence" else (4096 if run.on_cuda else 512)
    logits = 4 * min(run.row, chunk) * shape.vocabulary if head else 0
    weight = 4 * shape.vocabulary * shape.hidden * (1 + small) if head and not run.lora_rank else 0
    if head == "divergence":
        return 12 * logits + weight
    return max(logits * (1 + (head == "entropy")), logits * (1.5 if small else 1) + weight)


def moments(shape: Shape, run: Run) -> dict[str, dict[str, float]]:
    """Bytes on one device at each moment that can be the fullest, by what they are.

    Always: float32 master weights and AdamW's two moments, sharded; frozen models in --dtype, sharded, too,
    but for the root of distill.py's teacher, whose head the loss needs; reward models whole. With LoRA the
    base is in --dtype, only A and B have gradients and moments, an online script's reference costs nothing.
    FSDP2 (several processes, or bfloat16) has roots and two layers whole in --dtype, and gradients of a
    layer, at the end of the root, in --dtype and in float32; for sampling it has the whole policy. Samples:
    keys and values with an eighth of room, three float32 (B, V). Left out: the prompts' pass of a rollout,
    the second copy of a shared prompt's keys, a rollout by vLLM, models that process_reward_model.py samples
    with.
    """
    script, size, world, lora = SCRIPTS[run.script], run.bytes_each, run.processes, run.lora_rank > 0
    fsdp, (root, layer) = world > 1 or size < 4, parameters(shape, script.head)
    policy, headless = root + shape.layers * layer, parameters(shape, head=None)[0] + shape.layers * layer
    models = 1 + script.values  # that are trained
    base = policy + script.values * headless
    trained = lora_parameters(shape, run.lora_rank) * models if lora else base
    frozen = run.live + (script.frozen if not lora or run.script == "distill.py" else 0)
    teacher_root = root * frozen * (world > 1 and run.script == "distill.py")
    always = {
        "weights": 4 * trained / world + lora * size * base / world,
        "moments": 8 * trained / world,
        "frozen": size * (frozen * policy / world + teacher_root + run.reward_models * headless),
    }
    whole = size * (models * root + 2 * layer) if fsdp else 0
    update = always | {"gradients": 4 * trained / world, "whole": whole, "kept": activations(shape, run)}
    matrix = size * shape.vocabulary * shape.hidden  # a gradient of the head, or of the embeddings
    work = run.row * (run.checkpointing * layer_activations(shape, run) + 2 * size * shape.intermediate)
    work += 0 if lora else (size + 4) * layer * fsdp + (matrix if script.head else 0)
    end = (size + 4) * root if fsdp else matrix * (1 + shape.tied)
    at_once, answers = (run.rollout, run.batch / world) if script.rollouts else (run.row, run.row)
    answers = max(1, min(answers, at_once // run.longest))
    cache = 2 * shape.layers * attention_sizes(shape)[1] * size * answers * run.longest * 9 / 8
    sampling = {"whole": size * policy * fsdp, "cache": cache, "drawing": 12 * answers * shape.vocabulary}
    return {
        "head": update | {"head": head_buffers(shape, run)},
        "layer": update | {"layer": work},
        "end": update | {"kept": 0, "root": 0 if lora else end},
        "sampling": always | (sampling if script.head else {}),
    }


def peak(shape: Shape, run: Run) -> float:
    """Bytes on one device at the fullest moment."""
    return max(sum(terms.values()) for terms in moments(shape, run).values())


# ------------------------------------------------------------------------------------------------------------
# What fits
# ------------------------------------------------------------------------------------------------------------
ASKED = {"sft.py": {}, "dpo.py": {}, "grpo.py": {}, "ppo_rlhf.py": {"reward_models": 1}}  # beside Run's own
ASKED |= {f"{name} --lora-rank 16": {"lora_rank": 16} for name in ("sft.py", "grpo.py")}


def needed() -> dict:
    """GB on each GPU, for each run of ASKED, each model and 1, 2, 4 and 8 GPUs."""
    rows = {}
    for (name, settings), (model, shape) in ((a, m) for a in ASKED.items() for m in MODELS.items()):
        runs = {n: Run(name.split()[0], n, **settings) for n in (1, 2, 4, 8)}
        rows[f"{name}, {model}"] = {str(n): peak(shape, run) / 1e9 for n, run in runs.items()}
    return rows


def main():
    result = {"command": "python benchmarks/memory.py", "gpus": GPUS, "usable": USABLE, "needed": needed()}
    path = ROOT / "benchmarks" / "results" / "memory_table.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(fits_table(load_result("memory_table", ROOT)))


if __name__ == "__main__":
    main()
