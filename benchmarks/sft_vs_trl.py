"""SFT of one model on the same rows by sft.py and by TRL's SFTTrainer: tokens per second and peak memory.

The model is Qwen3-shaped and random, with 13 million parameters; its tokenizer is a byte-level BPE of 23,000
entries, trained on GSM8K. Everything runs on the CPU. What is compared (CONTENDERS has the settings):

    cleanpost    sft.py as it is: `sft.main`, with its own data loading, packing, logging and saving
    cleanpost_bf16  the same with --dtype bfloat16: weights in float32, products in bfloat16
    trl_shipped  TRL with its defaults: bfloat16 autocast, gradient checkpointing, padded batches
    trl_packed   the same, packed
    trl_tuned    packed, float32, no gradient checkpointing
    trl_float32  padded, float32, no gradient checkpointing: the batches and the arithmetic of sft.py, so that
                 the losses of both can be compared, step by step
    trl_bf16     packed, bfloat16 autocast, no gradient checkpointing: what suits TRL best where the CPU
                 multiplies bfloat16 in hardware

Each runs in a process of its own, one after the other, in rounds (A B C A B C ...): a machine that gets
slower then slows all of them. A step is timed from its beginning to the end of its update, without logging
and saving; TRL's collation lies outside of that, ours inside. The first `--warmup` steps are not counted.
Tokens are real ones: padding is not counted, prompt tokens are.

Packed TRL sees the same rows in bins of `pack_length` tokens, one bin a step, which makes its step as large
as ours. (With its default of 8 bins of 1,024 tokens a step would be six times larger, and its dense attention
mask 8,192 x 8,192.)

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/sft_vs_trl.py                                 # about 20 minutes on 2 idle cores
    python benchmarks/sft_vs_trl.py --rounds 1 --steps 5            # a rough look
"""

import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import tyro

# This process only starts the others and stays small: a child's peak memory begins at its parent's size.
ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = {  # name: label, settings of SFTConfig beside those that all share (None: not TRL)
    "cleanpost": ("CleanPost", None),
    "cleanpost_bf16": ("CleanPost bfloat16", None),
    "trl_shipped": ("TRL as shipped", {}),
    "trl_packed": ("TRL packed", {"packing": True}),
    "trl_tuned": ("TRL tuned", {"packing": True, "bf16": False, "gradient_checkpointing": False}),
    "trl_float32": ("TRL float32, padded", {"bf16": False, "gradient_checkpointing": False}),
    "trl_bf16": ("TRL bfloat16, packed", {"packing": True, "gradient_checkpointing": False}),
}
TARGETS = {  # tokens per second of cleanpost over theirs, at least; peak memory over theirs, at most
    "speed": {"trl_shipped": 3.5, "trl_packed": 3.0, "trl_tuned": 3.0},
    "memory": {"trl_shipped": 0.45},
    "first_step_loss": 1e-4,
}
# With which of ours a contender is compared
COMPARED = {name: "cleanpost" for name in CONTENDERS if name.startswith("trl")}
COMPARED["trl_bf16"] = "cleanpost_bf16"
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
VOCABULARY = 23_000
# No line break after the last turn: TRL would train it, as part of the completion, and sft.py would not.
TEMPLATE = (
    "{% for message in messages %}{{ '' if loop.first else '\n' }}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class Args:
    data: str = "openai/gsm8k"
    """Rows with `question` and `answer`: a hub id, or a .jsonl file."""
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    """Which to run, and in which order."""
    rounds: int = 3
    """How often each runs."""
    steps: int = 20
    """Optimizer steps that are timed."""
    warmup: int = 3
    """Optimizer steps before them."""
    batch_size: int = 8
    """Sequences per optimizer step (TRL: 8)."""
    learning_rate: float = 2e-5
    """Peak learning rate of AdamW, linear to 0 (TRL: 2e-5)."""
    threads: int = os.cpu_count() or 1
    """Threads of each process."""
    seed: int = 1
    """Seed of the model's weights."""
    output: Path = ROOT / "benchmarks" / "results" / "sft_vs_trl.json"
    """The file of results."""
    plot: Path | None = ROOT / "docs" / "img" / "sft_vs_trl.png"
    """The bar plot of the results; None for none."""
    only: str | None = None
    """Run just this contender (or `prepare`), in this process: what the script calls itself with."""
    folder: Path | None = None
    """Where the model, the rows and the figures of --only are."""


# ------------------------------------------------------------------------------------------------------------
# In a process of its own
# ------------------------------------------------------------------------------------------------------------
def load_rows(data: str) -> list[dict]:
    """All rows of GSM8K."""
    if Path(data).exists():
        return [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    from datasets import load_dataset

    return list(load_dataset(data, "main", split="train"))


def make_tokenizer(rows: list[dict]):
    """A byte-level BPE of `rows`, with the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((row[key] for row in rows for key in ("question", "answer")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=special[0], eos_token=special[2], chat_template=TEMPLATE
    )


def write_model(tokenizer, seed: int, folder: Path) -> dict:
    """Write the tokenizer and a random model into `folder`; describe them."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen3Config(
        **MODEL, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return {
        "model": {"architecture": "Qwen3ForCausalLM", "parameters": model.num_parameters(), **MODEL},
        "vocabulary": len(tokenizer),
    }


def prepare(args: Args, folder: Path) -> dict:
    """Write the rows, the tokenizer and the model into `folder`; describe them."""
    rows = load_rows(args.data)
    tokenizer = make_tokenizer(rows)
    described = write_model(tokenizer, args.seed, folder / "model")
    steps = args.warmup + args.steps
    rows = rows[: steps * args.batch_size]
    conversations = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]
    text = "".join(json.dumps(row) + "\n" for row in conversations)
    (folder / "rows.jsonl").write_text(text)
    lengths, prompt_lengths = [], []
    for row in conversations:
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        assert whole[: len(prompt)] == prompt
        lengths.append(len(whole))
        prompt_lengths.append(len(prompt))
    return described | {
        "rows": len(rows),
        "rows_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": sum(lengths),
        "trained_tokens": sum(lengths) - sum(prompt_lengths),
        "longest_row": max(lengths),
        "pack_length": max(max(lengths), -(-sum(lengths) // steps)),
    }


def resident_gb() -> float:
    """Memory of this process now, in GB (1e9 bytes)."""
    import psutil

    return psutil.Process().memory_info().rss / 1e9


def run_cleanpost(args: Args, folder: Path, name: str = "sft", **more) -> dict:
    """sft.py (or another script of ours, with more settings) as a user runs it, without evaluation; its own
    metrics.jsonl has the figures.
    """
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(name)
    loaded, load_model = [], script.load_model

    def load_and_look(*arguments, **settings):
        model = load_model(*arguments, **settings)
        loaded.append(resident_gb())
        return model

    script.load_model = load_and_look
    if name == "sft":
        more["order"] = "given"
    script.main(
        script.Args(
            model=str(folder / "model"),
            dataset=(str(folder / "rows.jsonl"),),
            learning_rate=args.learning_rate,
            lr_schedule="linear",
            warmup_steps=0,
            batch_size=args.batch_size,
            max_steps=args.warmup + args.steps,
            eval_every=0,
            save_every=0,
            output_dir=str(folder / "run"),
            **more,
        )
    )
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if line["step"] > 0]
    return {
        "seconds": [line["step_time"] for line in steps],
        "total_tokens": [line["num_tokens"] for line in steps],
        "losses": [line["loss"] for line in steps],
        "loaded_memory_gb": loaded[-1],  # with all models
    }


def trl_settings(args: Args, overrides: dict, pack_length: int | None = None) -> dict:
    """What TRL's config is given: what all share so that they can be compared, and the contender's own."""
    packed = {"max_length": pack_length, "per_device_train_batch_size": 1}
    return {
        "use_cpu": True,
        "per_device_train_batch_size": args.batch_size,
        "max_steps": args.warmup + args.steps,
        "learning_rate": args.learning_rate,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,  # outside of what is timed
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **(packed if overrides.get("packing") else {}),
        **overrides,
    }


def run_trl(args: Args, folder: Path) -> dict:
    """SFTTrainer on prompt + completion rows, of which it trains the completion."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    prepared = json.loads((folder / "prepare.json").read_text())
    settings = trl_settings(args, CONTENDERS[args.only][1], prepared["pack_length"])
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    trainer = SFTTrainer(
        model=str(folder / "model"),
        args=SFTConfig(output_dir=str(folder / "run"), **settings),
        train_dataset=Dataset.from_list(rows),
    )
    return train_trl(trainer)


def train_trl(trainer) -> dict:
    """Train with one of TRL's trainers, whose log has the figures."""
    from transformers import TrainerCallback

    begun, seconds, loaded = [], [], []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, **__):
            loaded.append(resident_gb())

        def on_step_begin(self, *_, **__):
            begun.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - begun[-1])

    trainer.add_callback(Watch())
    trainer.train()
    steps = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "seconds": seconds,
        "total_tokens": [line["num_tokens"] for line in steps],
        "losses": [line["loss"] for line in steps],
        "loaded_memory_gb": loaded[0],
    }


def run_only(args: Args, job):
    """Do what --only says, by the function `job`, and leave the figures beside the model."""
    result = job(args, args.folder)
    usage, unit = resource.getrusage(resource.RUSAGE_SELF), 1 if sys.platform == "darwin" else 1024  # KiB
    result["peak_memory_gb"] = usage.ru_maxrss * unit / 1e9
    result["involuntary_switches"] = usage.ru_nivcsw  # many where other programs want the cores
    (args.folder / f"{args.only}.json").write_text(json.dumps(result))


# ------------------------------------------------------------------------------------------------------------
# The rounds
# ------------------------------------------------------------------------------------------------------------
def in_own_process(script: str, args: Args, name: str, folder: Path) -> dict:
    """Call a benchmark's script with --only `name` and return the figures that it leaves."""
    command = [sys.executable, script, "--only", name, "--folder", str(folder), "--data", args.data]
    for flag in ("steps", "warmup", "batch_size", "learning_rate", "threads", "seed"):
        command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""}
    if name != "prepare":
        environment["HF_HUB_OFFLINE"] = "1"
    shutil.rmtree(folder / "run", ignore_errors=True)
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads((folder / f"{name}.json").read_text())


def figures(run: dict, warmup: int) -> dict:
    """Tokens per second and the rest of one run, its warm-up left out."""
    tokens = run["total_tokens"][-1] - run["total_tokens"][warmup - 1] if warmup else run["total_tokens"][-1]
    seconds = run["seconds"][warmup:]
    return {
        "tokens_per_second": tokens / sum(seconds),
        "tokens_per_step": tokens / len(seconds),
        "median_step_seconds": median(seconds),
        "peak_memory_gb": run["peak_memory_gb"],
        "loaded_memory_gb": run["loaded_memory_gb"],
        "involuntary_switches": run["involuntary_switches"],
        "first_step_loss": run["losses"][0],
        "last_step_loss": run["losses"][-1],
    }


def run_rounds(script: str, args: Args, show) -> tuple[dict, dict[str, list[dict]]]:
    """Prepare, and run all contenders in rounds -> the conditions, and the runs of every contender.

    `show` makes of a contender's name and one run of it what is printed then.
    """
    conditions = machine(args.threads)
    if conditions["load_average_at_start"] > 0.3:
        print(f"load average {conditions['load_average_at_start']:.1f}: the machine is not idle")
    runs = {name: [] for name in args.contenders}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepared = in_own_process(script, args, "prepare", folder)
        for number in range(1, args.rounds + 1):
            for contender in args.contenders:
                run = in_own_process(script, args, contender, folder)
                runs[contender].append(run)
                print(f"round {number}  {show(contender, run)}", flush=True)
    del prepared["peak_memory_gb"], prepared["involuntary_switches"]
    flags = ("rounds", "steps", "warmup", "batch_size", "learning_rate", "seed")
    return conditions | {"data": prepared, **{flag: getattr(args, flag) for flag in flags}}, runs


def spread(values: list[float]) -> dict:
    return {"median": median(values), "min": min(values), "max": max(values), "rounds": values}


def machine(threads: int) -> dict:
    """What the figures depend on besides the programs."""
    name, flags = platform.processor(), ""
    if Path("/proc/cpuinfo").exists():
        lines = dict(
            map(str.strip, line.split(":", 1))
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if ":" in line
        )
        name, flags = lines.get("model name", name), lines.get("flags", "")
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    packages = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "trl", "numpy")
    return {
        "cpu": name,
        "cpu_extensions": [flag for flag in wanted if flag in flags.split()],
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }


def loss_gaps(runs: dict[str, list[dict]], ours: str, theirs: str) -> dict:
    """Differences of the losses of two contenders that see the same batches, in the first round."""
    pairs = zip(runs[ours][0]["losses"], runs[theirs][0]["losses"], strict=True)
    gaps = [abs(our_loss - their_loss) for our_loss, their_loss in pairs]
    return {"first_step": gaps[0], "largest_of_all_steps": max(gaps)}


def compare(
    rounds: dict[str, list[dict]],
    runs: dict[str, list[dict]],
    contenders: dict[str, tuple],
    targets: dict[str, dict],
    compared: dict[str, str],
    same_batches: tuple[str, str],
    speed: str,
) -> dict:
    """Medians, ratios of each round and the targets, from the figures and the runs of every contender.

    `compared` has which of ours another contender is compared with; `speed` is the figure that counts.
    """
    result = {"contenders": {}, "speed_ratio": {}, "memory_ratio": {}, "targets": {}}
    for name, of_name in rounds.items():
        spreads = {key: spread([figure[key] for figure in of_name]) for key in of_name[0]}
        result["contenders"][name] = {"label": contenders[name][0]} | spreads
    for name in rounds:
        if compared.get(name) not in rounds:
            continue
        pairs = list(zip(rounds[compared[name]], rounds[name], strict=True))
        for ratio, key in (("speed_ratio", speed), ("memory_ratio", "peak_memory_gb")):
            result[ratio][name] = spread([ours[key] / theirs[key] for ours, theirs in pairs])
    for kind, met in (("speed", float.__ge__), ("memory", float.__le__)):
        for name, target in targets[kind].items():
            if name in result[f"{kind}_ratio"]:
                value = result[f"{kind}_ratio"][name]["median"]
                reached = {"target": target, "value": value, "met": met(value, target)}
                result["targets"][f"{kind}_{name}"] = reached
    if set(same_batches) <= set(runs):
        gaps = result["loss_difference"] = loss_gaps(runs, *same_batches)
        result["targets"]["first_step_loss"] = {
            "target": targets["first_step_loss"],
            "value": gaps["first_step"],
            "met": gaps["first_step"] <= targets["first_step_loss"],
        }
    return result


def target_lines(result: dict) -> list[str]:
    """The targets as lines for the terminal."""
    lines, width = [], max(20, *map(len, result["targets"]), 0)
    for name, target in result["targets"].items():
        met = "met" if target["met"] else "MISSED"
        lines.append(f"target {name:{width}} {target['target']:<7g} reached {target['value']:<9.3g} {met}")
    return lines


def table(result: dict) -> str:
    """The results as lines for the terminal."""
    titles = ("tokens/s", "(min - max)", "ours / it", "peak GB", "ours / it", "loss 1")
    lines = ["{:22}{:>10}{:>16}{:>11}{:>9}{:>11}{:>9}".format("", *titles)]
    for name, figure in result["contenders"].items():
        speed, memory = figure["tokens_per_second"], figure["peak_memory_gb"]
        ratios = [result[key].get(name, {}).get("median") for key in ("speed_ratio", "memory_ratio")]
        faster, smaller = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        lines.append(
            f"{figure['label']:22}{speed['median']:>10,.0f}{speed['min']:>8,.0f} - {speed['max']:>5,.0f}"
            f"{faster:>11}{memory['median']:>9.2f}{smaller:>11}{figure['first_step_loss']['median']:>9.4f}"
        )
    return "\n".join(lines + target_lines(result))


def draw(result: dict, path: Path, panels: dict[str, tuple[str, str]]):
    """Bars of some figures, each with its title and number format, with the range over the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.5 + 0.42 * len(result["contenders"])), sharey=True)
    labels = [contender["label"] for contender in result["contenders"].values()]
    colours = ["tab:blue" if name.startswith("cleanpost") else "silver" for name in result["contenders"]]
    for axis, (key, (title, form)) in zip(axes, panels.items(), strict=True):
        spreads = [contender[key] for contender in result["contenders"].values()]
        medians = [s["median"] for s in spreads]
        ranges = [[s["median"] - s["min"] for s in spreads], [s["max"] - s["median"] for s in spreads]]
        bars = axis.barh(labels, medians, color=colours, xerr=ranges, error_kw={"elinewidth": 1})
        axis.bar_label(bars, [f"{m:{form}}" for m in medians], padding=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, 1.2 * max(s["max"] for s in spreads))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def finish(args: Args, result: dict, lines: str, panels: dict[str, tuple[str, str]]):
    """Print the table, write the results and draw them."""
    print(lines)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        draw(result, args.plot, panels)


def main(args: Args):
    def show(name: str, run: dict) -> str:
        return f"{CONTENDERS[name][0]:22}{figures(run, args.warmup)['tokens_per_second']:>8,.0f} tokens/s"

    conditions, runs = run_rounds(__file__, args, show)
    settings = {
        name: trl_settings(args, CONTENDERS[name][1], conditions["data"]["pack_length"])
        for name in args.contenders
        if CONTENDERS[name][1] is not None
    }
    conditions |= {
        "trl_settings": settings,
        "units": "tokens without padding, with prompts; seconds of optimizer steps; resident GB of 1e9 bytes",
    }
    rounds = {name: [figures(run, args.warmup) for run in of_name] for name, of_name in runs.items()}
    compared = compare(
        rounds, runs, CONTENDERS, TARGETS, COMPARED, ("cleanpost", "trl_float32"), "tokens_per_second"
    )
    result = {"benchmark": "sft_vs_trl", "conditions": conditions} | compared
    result["losses"] = {name: of_name[0]["losses"] for name, of_name in runs.items()}
    panels = {
        "tokens_per_second": ("tokens per second", ",.0f"),
        "peak_memory_gb": ("peak memory, GB", ".2f"),
    }
    finish(args, result, table(result), panels)


if __name__ == "__main__":
    parsed = tyro.cli(Args)
    in_bfloat16 = partial(run_cleanpost, dtype="bfloat16")
    jobs = {"prepare": prepare, "cleanpost": run_cleanpost, "cleanpost_bf16": in_bfloat16}
    run_only(parsed, jobs.get(parsed.only, run_trl)) if parsed.only else main(parsed)
