"""Over-optimisation: proxy and gold reward against sqrt(KL), for Best-of-N and PPO, one reward model or four.

    python benchmarks/overoptimization.py         # an hour on one core; goes on where it was stopped

The proxy is a reward model that likes long answers: tiny/reward_biased, or an ensemble of four that
reward_model.py trains on the same pairs from other seeds, taken by its mean, its lowest member, or its mean
less the deviation. The gold reward says whether the sum is right. Best-of-N is computed, not run: from a pool
of answers to each prompt, by the exact law of the best of N draws from it. What gold gains is fitted with the
forms of Gao et al. (arXiv:2210.10760), d = sqrt(KL): d (alpha - beta d) for Best-of-N, d (alpha - beta log d)
for PPO. Writes benchmarks/results/overoptimization.json and docs/img/overoptimization.png.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
SIZES = [2**i for i in range(9)]  # N
CHOOSERS = {
    "single": "one model",
    "mean": "mean of four",
    "min": "lowest of four",
    "mean_minus_std": "mean - std",
}
PAIRS = "tiny/data/preference_length_biased_"


@dataclass
class Args:
    prompts: int = 32
    """Held-out prompts of the pool."""
    samples: int = 512
    """Answers of tiny/sft to each of them."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of PPO, a run of each chooser each."""
    flags: str = "--kl-coef 0 --max-steps 16 --eval-every 0 --num-eval 1 --log-every 1 --save-every 0"
    """Flags of ppo_rlhf.py."""
    folder: Path = ROOT / "runs" / "overoptimization"
    """What the runs leave; what is there is not made again."""


def script(name: str, *words):
    """Run a script of ours, without its output."""
    command = [sys.executable, ROOT / f"{name}.py", *words]
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def make_pool(args: Args) -> list[list[dict]]:
    """Of each prompt the different answers: how often each was drawn, its gold reward, its five scores."""
    import rejection_sampling as rs
    from rewards import math_answer, reward_model

    settings = rs.Args(num_rounds=0, num_eval=args.prompts)
    device, tokenizer = rs.setup_distributed(), rs.load_tokenizer(settings)
    prompts = rs.load_prompts(tokenizer, settings.eval_dataset, "test", settings, args.prompts)
    policy = rs.load_model(settings.model, settings, device)
    ends = rs.end_tokens(tokenizer, policy)
    policy.generation_config = rs.GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    rollout = rs.roll_out(policy, tokenizer, prompts, args.samples, 1.0, (1, 0), settings)
    named = {(c.prompt.place, *c.token_ids): c for c in rollout}
    counts, columns = (
        Counter((c.prompt.place, *c.token_ids) for c in rollout),
        rs.reward_inputs([*named.values()], settings),
    )
    members = [args.folder / "ensemble" / f"member_{n}" / "model" for n in range(4)]
    found = [math_answer(**columns)] + [
        reward_model(str(m))(**columns) for m in ("tiny/reward_biased", *members)
    ]
    pool = {}
    for key, gold, *scores in zip(named, *found):
        pool.setdefault(key[0], []).append({"count": counts[key], "gold": gold, "scores": scores})
    return [*pool.values()]


def choose(scores: np.ndarray, chooser: str) -> np.ndarray:
    """The reward (U,) that a chooser gives from the scores (U, 5) of tiny/reward_biased and four members."""
    single, members = scores[:, 0], scores[:, 1:]
    choices = {"single": single, "mean": members.mean(1), "min": members.min(1)}
    return (choices | {"mean_minus_std": members.mean(1) - members.std(1)})[chooser]


def best_of_n(pool: list[list[dict]], chooser: str, sizes=SIZES) -> list[dict]:
    """Proxy, gold reward, and KL of the best of each N of `sizes` draws from the pool: means over prompts."""
    from estimators import best_of_n_kl, best_of_n_law

    lines = []
    for n in sizes:
        found = []  # of each prompt
        for answers in pool:
            counts, gold, scores = (
                np.array([x[key] for x in answers], float) for key in ("count", "gold", "scores")
            )
            p, proxy = counts / counts.sum(), choose(scores, chooser)  # (U,) each
            law = best_of_n_law(p, proxy, n)  # (U,)
            found.append((law @ proxy, law @ gold, best_of_n_kl(p, proxy, n)))
        proxy, gold, kl = np.mean(found, 0).tolist()
        lines.append({"n": n, "proxy": proxy, "gold": gold, "kl": max(kl, 0.0)})
    return lines


def ppo(chooser: str, seed: int, args: Args) -> list[dict]:
    """The same of every step of a run of ppo_rlhf.py; the KL is that of whole answers."""
    folder, ensemble = args.folder / f"ppo_{chooser}_{seed}", args.folder / "ensemble"
    reward = "tiny/reward_biased" if chooser == "single" else f"{ensemble}:{chooser}".removesuffix(":mean")
    if not (folder / "model").exists():
        shutil.rmtree(folder, ignore_errors=True)
        script("ppo_rlhf", "--reward", reward, "--seed", seed, "--output-dir", folder, *args.flags.split())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    keys = {"proxy": "objective/scores", "gold": "gold_reward", "kl": "objective/kl"}
    of_steps = [{key: line[name] for key, name in keys.items()} for line in lines if "objective/kl" in line]
    return [line | {"kl": max(line["kl"], 0.0)} for line in of_steps]  # k1 may be negative near 0


def fit(lines: list[dict], of_ppo: bool) -> dict:
    """alpha and beta by least squares of what gold gained; R2; gold at first, at its best, at last."""
    d, gold = (np.sqrt([x["kl"] for x in lines]), np.array([x["gold"] for x in lines]))
    start, used = gold[0], d > 0
    d_used, gained = d[used], gold[used] - start
    form = np.stack([d_used, -d_used * (np.log(d_used) if of_ppo else d_used)], 1)  # (points, 2)
    (alpha, beta), *_ = np.linalg.lstsq(form, gained, rcond=None)
    left = np.square(gained - form @ (alpha, beta)).sum() / np.square(gained - gained.mean()).sum()
    found = {"alpha": alpha, "beta": beta, "R2": 1 - left, "gold at first": start, "best gold": gold.max()}
    found |= {"sqrt(KL) there": d[gold.argmax()], "gold at last": gold[-1], "sqrt(KL) at last": d[-1]}
    found["proxy gained"] = lines[-1]["proxy"] - lines[0]["proxy"]
    return {key: round(float(value), 4) for key, value in found.items()}


def draw(result: dict, path: Path):
    """Proxy and gold against sqrt(KL), Best-of-N and PPO; dashed: the fitted form."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for colour, chooser in zip(("tab:red", "tab:blue", "tab:green", "tab:orange"), CHOOSERS):
        runs = {"Best-of-N": [result["best_of_n"][chooser]], "PPO": result["ppo"].get(chooser, [])}
        for pair, (how, curves) in zip((panels[:2], panels[2:]), runs.items()):
            for lines in curves:
                d = np.sqrt([x["kl"] for x in lines])
                proxy, gold = (np.array([x[key] for x in lines]) for key in ("proxy", "gold"))
                style = {"marker": ".", "linestyle": "-" if how == "Best-of-N" else "", "alpha": 0.6}
                pair[0].plot(d, proxy - proxy[0], color=colour, label=CHOOSERS[chooser], **style)
                pair[1].plot(d, gold, color=colour, **style)
            if not curves:
                continue
            fitted, d = result["fits"][f"{how}, {chooser}"], np.linspace(0.01, max(d), 100)
            bend = np.log(d) if how == "PPO" else d
            gained = d * (fitted["alpha"] - fitted["beta"] * bend)
            pair[1].plot(d, fitted["gold at first"] + gained, "--", color=colour, linewidth=1)
            pair[0].set_title(f"{how}: what the proxy gains", fontsize=10)
            pair[1].set_title(f"{how}: gold, share of right answers", fontsize=10)
            pair[1].set_ylim(-0.05, 0.8)
    for panel in panels:
        panel.set_xlabel("sqrt(KL to tiny/sft), nats per answer")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def write(result: dict):
    """The result and its figure, as far as they have come."""
    path = ROOT / "benchmarks" / "results" / "overoptimization.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, ROOT / "docs" / "img" / "overoptimization.png")


def main(args: Args):
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from learning import cpu_name

    args.folder.mkdir(parents=True, exist_ok=True)
    ensemble, kept = args.folder / "ensemble", args.folder / "pool.json"
    if not (ensemble / "ensemble.json").exists():
        words = [
            "--dataset",
            f"{PAIRS}train.jsonl",
            "--eval-dataset",
            f"{PAIRS}eval.jsonl",
            "--eval-every",
            0,
        ]
        words += ["--resume"] if (ensemble / "args.json").exists() else []
        script("reward_model", "--num-members", 4, "--output-dir", ensemble, *words)
    if not kept.exists():
        kept.write_text(json.dumps(make_pool(args)))
    pool = json.loads(kept.read_text())
    result = {"command": "python benchmarks/overoptimization.py", "flags of ppo_rlhf.py": args.flags}
    result |= {"choosers": CHOOSERS, "seeds": list(args.seeds)}
    result["pool"] = {"prompts": len(pool), "answers": args.samples, "different": sum(map(len, pool))}
    result |= {"best_of_n": {name: best_of_n(pool, name) for name in CHOOSERS}, "ppo": {}, "fits": {}}
    for name in CHOOSERS:
        result["fits"][f"Best-of-N, {name}"] = fit(result["best_of_n"][name], of_ppo=False)
    result["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    result["versions"] = {package: version(package) for package in ("torch", "transformers")}
    write(result)
    for seed in args.seeds:
        for name in CHOOSERS:
            runs = result["ppo"].setdefault(name, [])
            runs.append(ppo(name, seed, args))
            mean = [{key: float(np.mean([x[key] for x in step])) for key in step[0]} for step in zip(*runs)]
            result["fits"][f"PPO, {name}"] = fit(mean, of_ppo=True)
            print(name, seed, runs[-1][-1], flush=True)
            write(result)
    print(json.dumps(result["fits"], indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
