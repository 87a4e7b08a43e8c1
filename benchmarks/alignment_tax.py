"""The alignment tax on tiny/: what a merged model can do, and what it has forgotten.

    python benchmarks/alignment_tax.py --model tiny/sft       # one model: a JSON object, half a minute
    python benchmarks/alignment_tax.py                        # all below, ten minutes on one core

With --model the last line is a JSON object, by evaluate.py: `accuracy` (of one sampled answer to each
question of prompts_eval.jsonl), `greedy_accuracy`, and `perplexity` (of the stories of text_eval.jsonl, as
they were in pre-training). Without it

    sweep    merge.py goes from tiny/base to tiny/sft in steps of 0.1 (WiSE-FT): merge_sweep.json
    methods  sft.py trains tiny/base on stories, 63 steps, and merge.py merges that and tiny/sft by every
             method; the report of the two task vectors: merge_methods.json

in benchmarks/results/; benchmarks/merge_plots.py draws their figures.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import tyro
from learning import ROOT, cpu_name

sys.path.insert(0, str(ROOT))


STORIES = "--dataset tiny/data/text_train.jsonl --num-epochs 2 --eval-every 0"
METHODS = {  # name: flags of merge.py beside the models; all but linear and slerp have tiny/base as --base
    "linear": {"method": "linear", "base": None},
    "slerp": {"method": "slerp", "base": None},
    "task_arithmetic": {"method": "task_arithmetic"},
    "task_arithmetic --lambda 0.5": {"method": "task_arithmetic", "lambda_": 0.5},
    "ties": {"method": "ties"},
    "ties --density 0.8": {"method": "ties", "density": 0.8},
    "dare_linear --density 0.5": {"method": "dare_linear", "density": 0.5},
    "dare_ties --density 0.5": {"method": "dare_ties", "density": 0.5},
    "breadcrumbs --density 0.8": {"method": "breadcrumbs", "density": 0.8},
    "model_stock": {"method": "model_stock"},
}


@dataclass
class Args:
    model: str | None = None
    """Folder of the model to score; without one the sweep is run."""
    num_eval: int = 256
    """Questions and stories that are used; 0 uses all."""
    seed: int = 1
    """Seed of the sampled answers."""


def score(args: Args) -> dict[str, float]:
    """Accuracy on questions and perplexity on stories."""
    import evaluate

    with tempfile.TemporaryDirectory() as folder:
        flags = {"eval_samples": 1, "num_eval": args.num_eval, "seed": args.seed}
        flags |= {"models": (args.model,), "output_dir": f"{folder}/run"}
        [(_, found)] = evaluate.main(evaluate.Args(**flags))["models"].items()
    names = {"accuracy": "eval/reward", "greedy_accuracy": "eval/greedy_reward"}
    return {k: found[v] for k, v in (names | {"perplexity": "eval/forgetting_perplexity"}).items()}


def sweep(args: Args):
    """Score the models between base and sft, and keep the numbers."""
    import merge

    started, points = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as temporary:
        for t in (i / 10 for i in range(11)):
            folder = Path(temporary) / f"t_{t}"
            pair = {"base": f"{ROOT}/tiny/base", "models": (f"{ROOT}/tiny/sft",), "output_dir": str(folder)}
            merge.main(merge.Args(method="wise_ft", t=t, **pair))
            points.append({"t": t} | score(replace(args, model=str(folder / "model"))))
            print(points[-1], flush=True)
    write("merge_sweep", args, {"seconds": time.perf_counter() - started, "points": points})


def methods(args: Args):
    """Score what every method makes of tiny/sft and of a model of stories, and keep the report of the two."""
    import merge

    scores = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flags = [*STORIES.split(), "--output-dir", str(folder / "stories")]
        subprocess.run([sys.executable, "sft.py", *flags], cwd=ROOT, check=True)
        stories = str(folder / "stories" / "model")
        for name, path in (("tiny/base", "tiny/base"), ("tiny/sft", "tiny/sft"), ("stories", stories)):
            scores[name] = score(replace(args, model=path))
        for i, (name, settings) in enumerate(METHODS.items()):
            output = folder / f"merged{i}"
            pair = {
                "base": "tiny/base",
                "models": ("tiny/sft", stories),
                "output_dir": str(output),
            } | settings
            merge.main(merge.Args(**pair, seed=args.seed))
            scores[name] = score(replace(args, model=str(output / "model")))
            print(name, scores[name], flush=True)
            if name == "task_arithmetic":
                report = json.loads((output / "report.json").read_text())
    write("merge_methods", args, {"scores": scores, "report": report, "trained": f"python sft.py {STORIES}"})


def write(name: str, args: Args, result: dict):
    """A file of results, with what the numbers depend on."""
    conditions = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "num_eval": args.num_eval,
        "seed": args.seed,
    }
    command = "python benchmarks/alignment_tax.py"
    result = {"benchmark": name, "command": command, "conditions": conditions} | result
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    parsed = tyro.cli(Args)
    if parsed.model:
        print(json.dumps(score(parsed)))
    else:
        sweep(parsed)
        methods(parsed)
