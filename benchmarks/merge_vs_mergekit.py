"""merge.py beside mergekit on a model of 1 GB in several shards: seconds, and memory beyond the page cache.

Three models in the shape of Qwen3-0.6B, in bfloat16, are made from seeds: a base and two that moved away from
it. What is compared (CONTENDERS):

    linear   the average of the two, equal weights
    slerp    base and one model, t = 0.3
    ties     base and both models, density 0.2: of mergekit, of `merge.py --compat mergekit` (the same
             trimming, tensor by tensor), and, for information, of merge.py as it is (over the whole model)

mergekit runs as `mergekit-yaml` does, with its own settings: arithmetic in bfloat16 for task vectors, where
merge.py has float32. Both write shards of the size of those they read, and neither is asked for a report.
merge.py waits until its files are on disk (fsync), mergekit leaves that to the system. merge.py has two
shards in memory: that which is merged and that which is written.

A run is a process of its own, timed from its start to its end, start-up included (measured by itself, too, as
the time of `--help`). The files it reads are in the page cache. Memory is the peak of RssAnon + RssShmem in
/proc/<pid>/status, looked at 200 times a second: all that is resident but files. VmHWM, which counts mapped
files, is recorded as well. The rounds are interleaved (A B C A B C ...); a ratio is taken within each round.
At the end merge.py alone merges three models of 4 GB by TIES into shards of 500 MB.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/merge_vs_mergekit.py                                         # 17 GB of disk
    python benchmarks/merge_vs_mergekit.py --layers 4 --large-layers 0 --rounds 1  # a rough look
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import sft_vs_trl as shared
import torch
import tyro
from safetensors.torch import load_file, save_file
from sft_vs_trl import ROOT

CONTENDERS = {  # name: label, method, whose, compat
    "cleanpost_linear": ("CleanPost, linear", "linear", "paper"),
    "mergekit_linear": ("mergekit, linear", "linear", None),
    "cleanpost_slerp": ("CleanPost, slerp", "slerp", "paper"),
    "mergekit_slerp": ("mergekit, slerp", "slerp", None),
    "cleanpost_ties": ("CleanPost, ties", "ties", "mergekit"),
    "mergekit_ties": ("mergekit, ties", "ties", None),
    "cleanpost_ties_paper": ("CleanPost, ties, whole model", "ties", "paper"),
}
TARGETS = {  # seconds and memory of ours over mergekit's, at most; GB of the large run, at most
    "seconds": {"linear": 0.67, "slerp": 0.4, "ties": 0.4},
    "memory": {"linear": 0.5, "slerp": 0.5, "ties": 0.5},
    "large_gb": 1.5,
}
DENSITY, T = 0.2, 0.3


@dataclass
class Args:
    rounds: int = 3
    """How often each contender runs."""
    threads: int = 2
    """OMP_NUM_THREADS of every run."""
    layers: int = 28
    """Layers of the model; 28 make 1.0 GB."""
    large_layers: int = 33
    """Layers of the model of the large run, of twice the width; 33 make 3.9 GB, 0 leaves it out."""
    folder: Path | None = None
    """Where the models are made and merged; by default a temporary folder."""
    output: Path = ROOT / "benchmarks" / "results" / "merge_vs_mergekit.json"
    """The file of results."""
    plot: Path | None = ROOT / "docs" / "img" / "merge_vs_mergekit.png"
    """The bar plot of the results; None for none."""


# ------------------------------------------------------------------------------------------------------------
# The models
# ------------------------------------------------------------------------------------------------------------
def make_models(folder: Path, layers: int, width: int, shard_size: int) -> dict:
    """Write base, one and two, with tiny's tokenizer; return what they are."""
    vocabulary, head, inner = 151_936, 64, 3 * width
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    for i in range(layers):
        layer = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (width // 2, width),
            "self_attn.v_proj": (width // 2, width),
            "self_attn.o_proj": (width, width),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // head,
        "num_key_value_heads": width // head // 2,
        "head_dim": head,
        "tie_word_embeddings": True,
    }
    groups, sizes = [[]], {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    for name in shapes:
        if groups[-1] and sum(sizes[other] for other in groups[-1]) + sizes[name] > shard_size:
            groups.append([])
        groups[-1].append(name)
    for path in ("base", "one", "two"):
        shutil.copytree(ROOT / "tiny" / "sft", folder / path, ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / path / "config.json").write_text(json.dumps(config))
    weight_map, random = {}, torch.Generator().manual_seed(1)
    for i, group in enumerate(groups, 1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        base = {name: 0.02 * torch.randn(shapes[name], generator=random) for name in group}
        for path in ("base", "one", "two"):
            change = 0.0 if path == "base" else 0.002
            moved = {}
            for name, x in base.items():
                moved[name] = x + change * torch.randn(x.shape, generator=random) if change else x
            save_file({k: x.bfloat16() for k, x in moved.items()}, folder / path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    for path in ("base", "one", "two"):
        (folder / path / "model.safetensors.index.json").write_text(json.dumps(index))
    return {"parameters": sum(sizes.values()) // 2, "gb": sum(sizes.values()) / 1e9, "shards": len(groups)}


# ------------------------------------------------------------------------------------------------------------
# A run
# ------------------------------------------------------------------------------------------------------------
def command_of(name: str, folder: Path, output: Path, shard_size: int) -> list[str]:
    """The command line of a contender."""
    _, method, compat = CONTENDERS[name]
    base, one, two = (str(folder / path) for path in ("base", "one", "two"))
    if compat:
        flags = ["--method", method, "--compat", compat, "--output-dir", str(output), "--no-report"]
        flags += ["--max-shard-size", f"{shard_size // 10**6}MB"]
        more = {
            "linear": ["--models", one, two],
            "slerp": ["--base", base, "--models", one, "--t", str(T)],
            "ties": ["--base", base, "--models", one, two, "--density", str(DENSITY)],
        }
        return [sys.executable, str(ROOT / "merge.py"), *flags, *more[method]]
    weighted = {"parameters": {"weight": 1.0} | ({"density": DENSITY} if method == "ties" else {})}
    config = {"merge_method": method, "models": [{"model": one} | weighted, {"model": two} | weighted]}
    if method == "slerp":
        config |= {"models": [{"model": base}, {"model": one}], "parameters": {"t": T}}
    if method != "linear":
        config["base_model"] = base
    (folder / f"{name}.yml").write_text(json.dumps(config))  # JSON is YAML
    program = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(folder / f"{name}.yml"), str(output)]
    return [*program, "--out-shard-size", str(shard_size // 2), "--quiet"]


def watch(command: list[str], threads: int) -> dict[str, float]:
    """Run a command to its end -> seconds, and its peak memory in GB of 1e9 bytes."""
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    peaks, done = {"anonymous": 0, "VmHWM": 0}, threading.Event()
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def look():
        while not done.wait(0.005):
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
            peaks["anonymous"] = max(peaks["anonymous"], sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0))
            peaks["VmHWM"] = max(peaks["VmHWM"], sizes.get("VmHWM", 0))

    watcher = threading.Thread(target=look)
    watcher.start()
    printed, _ = process.communicate()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{printed[-3000:]}")
    gigabytes = {key: value * 1024 / 1e9 for key, value in peaks.items()}
    return {"seconds": seconds, "peak_memory_gb": gigabytes["anonymous"], "vm_hwm_gb": gigabytes["VmHWM"]}


def warm(folder: Path):
    """Read all inputs, so that they are in the page cache, and let the system write what it has to."""
    os.sync()
    for path in folder.glob("*/*.safetensors"):
        with open(path, "rb") as file:
            while file.read(2**24):
                pass


def read_merged(output: Path) -> dict[str, torch.Tensor]:
    folder = output / "model" if (output / "model").exists() else output
    return {k: x for path in sorted(folder.glob("*.safetensors")) for k, x in load_file(path).items()}


def difference(ours: Path, theirs: Path) -> dict[str, float]:
    """How far two merged models are apart: share of equal numbers, and the largest gap."""
    one, two = read_merged(ours), read_merged(theirs)
    assert one.keys() == two.keys()
    equal = sum((one[name] == two[name]).sum().item() for name in one)
    largest = max((one[name].float() - two[name].float()).abs().max().item() for name in one)
    return {"equal_share": equal / sum(x.numel() for x in one.values()), "largest": largest}


# ------------------------------------------------------------------------------------------------------------
# The rounds
# ------------------------------------------------------------------------------------------------------------
def run_all(args: Args, folder: Path) -> dict:
    conditions = shared.machine(args.threads)
    conditions["versions"] |= {name: version(name) for name in ("mergekit", "safetensors")}
    conditions |= {"rounds": args.rounds, "density": DENSITY, "t": T}
    shard_size = 250_000_000
    conditions["model"] = make_models(folder / "models", args.layers, 1024, shard_size)
    conditions["units"] = (
        "seconds of whole processes; GB of 1e9 bytes of RssAnon + RssShmem (VmHWM: with files)"
    )
    runs, gaps = {name: [] for name in CONTENDERS}, {}
    startup = {"cleanpost": [], "mergekit": []}
    for number in range(1, args.rounds + 1):
        for name, (label, *_) in CONTENDERS.items():
            warm(folder / "models")
            command = command_of(name, folder / "models", folder / name, shard_size)
            runs[name].append(watch(command, args.threads))
            shown = f"{runs[name][-1]['seconds']:8.2f} s  {runs[name][-1]['peak_memory_gb']:.2f} GB"
            print(f"round {number}  {label:30}{shown}", flush=True)
            method = name.removeprefix("mergekit_")
            if number == 1 and name in ("mergekit_linear", "mergekit_slerp"):
                gaps[method] = difference(folder / f"cleanpost_{method}", folder / name)
            if name.startswith("mergekit"):
                shutil.rmtree(folder / name)
                shutil.rmtree(folder / f"cleanpost_{method}")
        shutil.rmtree(folder / "cleanpost_ties_paper")
        startup["cleanpost"].append(watch([sys.executable, str(ROOT / "merge.py"), "--help"], 1)["seconds"])
        helping = [sys.executable, "-m", "mergekit.scripts.run_yaml", "--help"]
        startup["mergekit"].append(watch(helping, 1)["seconds"])
    shutil.rmtree(folder / "models")

    result = {"benchmark": "merge_vs_mergekit", "conditions": conditions, "contenders": {}, "targets": {}}
    for name, (label, *_) in CONTENDERS.items():
        spreads = {key: shared.spread([run[key] for run in runs[name]]) for key in runs[name][0]}
        result["contenders"][name] = {"label": label} | spreads
    result["startup_seconds"] = {who: shared.spread(seconds) for who, seconds in startup.items()}
    for kind, key in (("seconds", "seconds"), ("memory", "peak_memory_gb")):
        result[f"{kind}_ratio"] = {}
        for method, target in TARGETS[kind].items():
            pairs = list(zip(runs[f"cleanpost_{method}"], runs[f"mergekit_{method}"], strict=True))
            ratio = shared.spread([ours[key] / theirs[key] for ours, theirs in pairs])
            result[f"{kind}_ratio"][method] = ratio
            reached = {"target": target, "value": ratio["median"], "met": ratio["median"] <= target}
            result["targets"][f"{kind}_{method}"] = reached
    result["difference"] = gaps
    if args.large_layers:
        model = make_models(folder / "models", args.large_layers, 2048, 1_000_000_000)
        warm(folder / "models")
        command = command_of("cleanpost_ties_paper", folder / "models", folder / "large", 500_000_000)
        result["large"] = {"model": model} | watch(command, args.threads)
        value = result["large"]["peak_memory_gb"]
        met = value < TARGETS["large_gb"]
        result["targets"]["large_gb"] = {"target": TARGETS["large_gb"], "value": value, "met": met}
    return result


def table(result: dict) -> str:
    """The results as lines for the terminal."""
    lines = ["{:32}{:>9}{:>18}{:>9}{:>9}".format("", "seconds", "(min - max)", "GB", "VmHWM")]
    for figure in result["contenders"].values():
        seconds = figure["seconds"]
        lines.append(
            f"{figure['label']:32}{seconds['median']:>9.2f}{seconds['min']:>9.2f} - {seconds['max']:>6.2f}"
            f"{figure['peak_memory_gb']['median']:>9.2f}{figure['vm_hwm_gb']['median']:>9.2f}"
        )
    return "\n".join(lines + shared.target_lines(result))


def main(args: Args):
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        result = run_all(args, Path(temporary))
    panels = {"seconds": ("seconds", ".1f"), "peak_memory_gb": ("peak memory beyond files, GB", ".2f")}
    shared.finish(args, result, table(result), panels)


if __name__ == "__main__":
    main(tyro.cli(Args))
