"""Every script on disk that trains, for a few steps on tiny/: it runs, is reproducible and survives a stop.

A new script adds its entry to `RUN`, and to `VARIANTS` what else must not depend on the token budget.
"""

import importlib
import json
import math
import os
import re
import shutil
import signal
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import tyro
from conftest import ROOT, start
from safetensors.torch import load_file
from sync_copies import scripts
from sync_docs import documented_metrics, flags, metric_differences
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

SHORT = {
    "num_eval": 4,
    "batch_size": 8,
    "max_tokens_per_micro_batch": 512,
    "learning_rate": 3e-4,
    "warmup_steps": 2,
    "max_steps": 6,
    "eval_every": 3,
    "save_every": 2,
    "log_every": 1,
}
PAIRS = SHORT | {
    "dataset": ("DATA/preference_train.jsonl",),
    "eval_dataset": "DATA/preference_eval.jsonl",
    "max_completion_length": 8,
}
ONLINE = SHORT | {
    "dataset": ("DATA/prompts_train.jsonl",),
    "eval_dataset": "DATA/prompts_eval.jsonl",
    "eval_samples": 2,
    "max_completion_length": 40,
    "num_generations": 4,
    "batch_size": 16,
    "learning_rate": 1e-4,
}
REWARDS = {k: v for k, v in PAIRS.items() if k != "max_completion_length"}
# Flags of a run of 6 steps, evaluations at 0, 3 and 6, checkpoints at 2, 4 and 6; DATA: tiny/data, shortened.
RUN = {
    "sft.py": PAIRS
    | {
        "dataset": ("DATA/sft_train.jsonl",),
        "eval_dataset": "DATA/sft_eval.jsonl",
        "forgetting_dataset": "DATA/text_eval.jsonl",
        "batch_size": 16,
    },
    "dpo.py": PAIRS,
    "ipo_kto_simpo_orpo.py": PAIRS | {"algorithm": "kto", "dataset": ("DATA/unpaired_train.jsonl",)},
    "reward_model.py": REWARDS,
    "process_reward_model.py": PAIRS
    | {
        "dataset": ("DATA/steps_train.jsonl",),
        "eval_dataset": "DATA/steps_eval.jsonl",
        "search_dataset": "DATA/prompts_eval.jsonl",
        "policy": "tiny/sft",
        "num_prompts": 2,
        "num_samples": 2,
    },
    "grpo.py": ONLINE,
    "dapo.py": ONLINE | {"overlong_buffer": 20},
    "rloo_remax.py": ONLINE,
    "rejection_sampling.py": ONLINE | {"num_rounds": 2, "prompts_per_round": 8, "batch_size": 8},
    "ppo_rlhf.py": ONLINE | {"eval_reward": ("rewards.py:math_answer",)},
    "distill.py": PAIRS
    | {
        "dataset": ("DATA/sft_train.jsonl",),
        "eval_dataset": "DATA/sft_eval.jsonl",
        "prompt_dataset": "DATA/prompts_train.jsonl",
        "cache_dir": "DATA/cache",
    },
}
# Flags of the runs that must come out the same for every token budget, beside the run itself.
VARIANTS = {
    "sft.py": (),
    "dpo.py": (
        {"loss": "tdpo2", "ref": "live", "sync_ref_every": 1},
        {"loss": "sigmoid_norm", "sft_coef": 1.0},
    ),
    "ipo_kto_simpo_orpo.py": tuple(
        {"algorithm": name, "dataset": ("DATA/preference_train.jsonl",)} for name in ("ipo", "simpo", "orpo")
    ),
    "reward_model.py": ({"objective": "outcome", "dataset": ("DATA/unpaired_train.jsonl",)},),
    "process_reward_model.py": (),
    "grpo.py": (
        {"num_iterations": 2, "num_minibatches": 2, "beta": 0.1},
        {"importance_sampling": "sequence", "tis_cap": 2.0, "mask_truncated": True},
    ),
    "dapo.py": ({"mask_truncated": True, "max_resamples": 1},),
    "rloo_remax.py": ({"algorithm": "remax"}, {"algorithm": "reinforce_pp", "kl_coef": 0.1}),
    "rejection_sampling.py": ({"filter": "top1", "restart": True},),
    "ppo_rlhf.py": ({"kl_target": 1.0, "whiten_rewards": True},),
    "distill.py": (
        {"divergence": "jsd", "cache_top_k": 4, "ce_coef": 0.5},
        {"mode": "on_policy", "divergence": "reverse_kl"},
        {"mode": "seq_kd", "max_completion_length": 48},
    ),
}
CLOCK = {"tokens_per_second", "step_time", "peak_memory_gb"}  # what no two runs share
SCRIPTS = [path for path in scripts() if any(flag.name == "max_steps" for flag in flags(path))]  # that train
QUICK = {"max_steps": 2, "save_every": 0, "eval_every": 0, "num_eval": 2}

pytestmark = pytest.mark.usefixtures("one_cpu")  # as the subprocesses of `start`
every_script = pytest.mark.parametrize(
    "script", [pytest.param(p, id=p.stem, marks=pytest.mark.xdist_group(p.stem)) for p in SCRIPTS]
)


@pytest.fixture(autouse=True)
def own_signals():
    """A run takes SIGTERM and Ctrl-C; behind it they are pytest's again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def flags_of(tiny, tmp_path_factory):
    """flags_of(script, **changes): the flags of a fast run, on the first 64 rows of each data set."""
    short = tmp_path_factory.mktemp("data")
    for path in (tiny / "data").glob("*.jsonl"):
        lines = path.read_text(encoding="utf-8").split("\n")[:64]
        (short / path.name).write_text("\n".join(lines), encoding="utf-8")

    def located(value):
        if isinstance(value, tuple):
            return tuple(map(located, value))
        return value.replace("DATA", str(short)) if isinstance(value, str) else value

    return lambda script, **changes: {k: located(v) for k, v in (RUN[script.name] | changes).items()}


@pytest.fixture(scope="module")
def run(flags_of, tmp_path_factory):
    """run(script, **changes): the folder of a run in this process; equal calls share one."""

    @cache
    def cached(script, changes):
        folder = tmp_path_factory.mktemp(script.stem) / "run"
        main(script, flags_of(script, output_dir=str(folder), **dict(changes)))
        return folder

    return lambda script, **changes: cached(script, tuple(sorted(changes.items())))


def main(script: Path, flags: dict) -> dict:
    """Run a script in this process."""
    module = importlib.import_module(script.stem)
    return module.main(module.Args(**flags))


def command_line(flags: dict) -> list[str]:
    """The flags as tyro reads them."""
    words = []
    for name, value in flags.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def read(folder: Path, name: str = "metrics") -> list[dict]:
    """The lines of metrics.jsonl or samples.jsonl, without what the clock decides."""
    lines = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    return [{k: v for k, v in x.items() if k not in CLOCK and not k.startswith("time/")} for x in lines]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The tensors and numbers of a checkpoint by path: weights in float32, moments; and its progress."""
    file = folder / "state.pt"
    dcp_to_torch_save(folder / "checkpoints" / f"step_{step:08d}", file)

    def flat(tree, prefix=""):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            if isinstance(value, dict | list):
                yield from flat(value, f"{prefix}{key}/")
            else:
                value = list(str(value).encode()) if isinstance(value, str | None) else value
                yield f"{prefix}{key}", torch.as_tensor(value)

    return dict(flat(torch.load(file, weights_only=False)))


def assert_same_run(one: Path, other: Path, step: int):
    """Metrics, samples, the last checkpoint and the final model are equal bit for bit."""
    assert read(one) == read(other)
    assert read(one, "samples") == read(other, "samples")
    first, second = state(one, step), state(other, step)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert checkpoints(one) == checkpoints(other)
    for path in (path for path in one.rglob("model*/*") if path.is_file()):
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), path.name


def assert_close_metrics(script, lines, others, keys=("loss", "grad_norm"), rel=1e-5):
    """Equal up to rounding; of an online script up to its first update: behind it a sample may differ."""
    if "num_generations" in RUN[script.name]:
        lines, others = ([line for line in run if line["step"] <= 1] for run in (lines, others))
    assert len(lines) == len(others) > 0
    for line, other in zip(lines, others, strict=True):
        for key in (key for key in keys if key in line or key in other):
            # AdamW makes a rounding larger from update to update; a loss at ratio 1 is 0
            near = pytest.approx(other[key], rel=rel if line["step"] <= 1 else 10 * rel, abs=1e-6)
            assert line[key] == near, (line["step"], key)


@every_script
@pytest.mark.parametrize(
    "change, told",
    [
        ({"max_grad_norm": -1.0}, "error: --max-grad-norm -1.0: Input should be greater than 0"),
        (
            {"learning_rate": math.nan},
            "error: --learning-rate nan: Input should be greater than or equal to 0",
        ),
        ({"batch_size": 0}, "error: --batch-size 0: Input should be greater than 0"),
        ({"resume": True}, "error: --resume needs --output-dir: which run should continue?"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_no_run_can_have_is_refused_by_every_script(script, change, told, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script.stem).Args(**change)
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines() == [told]


def test_every_script_has_a_fast_run():
    assert {path.name for path in SCRIPTS} == RUN.keys() == VARIANTS.keys()


@every_script
def test_help_names_every_flag(script, capsys):
    module = importlib.import_module(script.stem)
    with pytest.raises(SystemExit) as stop:
        tyro.cli(module.Args, args=["--help"])
    shown = capsys.readouterr().out
    names = [f"--{flag.name.replace('_', '-')}" for flag in flags(script)]
    assert stop.value.code == 0 and [name for name in names if name not in shown] == []


@every_script
def test_another_seed_gives_another_run(script, run):
    losses = [[line["loss"] for line in read(run(script, seed=seed, **QUICK))[1:]] for seed in (1, 2)]
    assert losses[0] != losses[1]


@every_script
def test_metrics_are_finite_and_exactly_the_documented_ones(script, run):
    lines = read(run(script))
    assert [line["step"] for line in lines] == list(range(7))
    assert [key for line in lines for key, value in line.items() if not math.isfinite(value)] == []
    assert documented_metrics(script)
    raw = (run(script) / "metrics.jsonl").read_text().splitlines()
    assert metric_differences(script, {key for line in raw for key in json.loads(line)}) == []


@every_script
def test_every_trainable_parameter_changes(script, run):
    before = load_file(ROOT / importlib.import_module(script.stem).Args().model / "model.safetensors")
    prefix = re.compile(r"model/(policy\.)?")  # ppo_rlhf.py saves its value model beside its policy
    after = {prefix.sub("", k, 1): v for k, v in state(run(script), 6).items() if k.startswith("model/")}
    assert before.keys() <= after.keys()
    moved = {name: (after[name] != before[name].float()).float().mean().item() for name in before}
    # Without a language model head only the embeddings of tokens that were read have a gradient.
    least = {name: 0.1 if "score.weight" in after and "embed" in name else 0.9 for name in moved}
    assert {name: share for name, share in moved.items() if share < least[name]} == {}


@every_script
def test_token_budget_and_gradient_checkpointing_are_memory_only(script, run):
    for variant in ({}, *VARIANTS[script.name]):
        lines = read(run(script, **QUICK | variant))
        others = [read(run(script, max_tokens_per_micro_batch=n, **QUICK | variant)) for n in (200, 8192)]
        if not variant:
            others.append(read(run(script, gradient_checkpointing=True, **QUICK)))
        for other in others:
            assert_close_metrics(script, lines[1:], other[1:])
        fills = [[line.get("packing/fill", n) for line in x[1:]] for n, x in enumerate((lines, *others[:2]))]
        assert fills[0] != fills[1] != fills[2]


@every_script
def test_bfloat16_is_the_same_but_for_rounding_and_continues_exactly(script, run, flags_of, tmp_path):
    """FSDP2 casts float32 masters to bfloat16 for a process group of one: the GPU's configuration."""
    settings, folder = QUICK | {"dtype": "bfloat16", "save_every": 1}, tmp_path / "run"
    whole = run(script, **settings)
    if "num_generations" not in RUN[script.name]:  # other samples have another loss
        one, other = read(whole)[1], read(run(script, **QUICK))[1]
        assert one["loss"] == pytest.approx(other["loss"], rel=0.1)
    shutil.copytree(whole, folder)
    for path in [*folder.glob("model*"), folder / "checkpoints" / "step_00000002"]:
        shutil.rmtree(path)
    main(script, flags_of(script, output_dir=str(folder), resume=True, **settings))
    assert_same_run(folder, whole, step=2)


BOTH_DTYPES = """
import importlib, json, sys
from pathlib import Path

script, settings = importlib.import_module(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
for dtype in ("float32", "bfloat16"):
    script.main(script.Args(**settings | {"dtype": dtype, "output_dir": f"{settings['output_dir']}_{dtype}"}))
"""


@every_script
def test_two_processes_are_one(script, run, flags_of, tmp_path):
    (tmp_path / "program.py").write_text(BOTH_DTYPES)
    settings = flags_of(script, output_dir=str(tmp_path / "two"), **QUICK | {"save_every": 1})
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py"]
    done = start(sys.executable, *torchrun, script.stem, "settings.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for dtype, rel in (("float32", 1e-5), ("bfloat16", 0.05)):
        folder, whole = tmp_path / f"two_{dtype}", run(script, dtype=dtype, **QUICK | {"save_every": 1})
        keys = ("loss", "grad_norm", "grad_norm/value", "updates", "eval/loss")[: 2 if rel > 0.01 else None]
        assert_close_metrics(script, read(folder), read(whole), keys=keys, rel=rel)
    first, wanted = read(tmp_path / "two_float32")[0], read(run(script, **QUICK))[0]  # before any update
    sampled = {k: wanted[k] for k in wanted if "reward" in k}
    assert {k: first[k] for k in sampled} == pytest.approx(sampled)
    # one process continues what two began
    main(script, settings | {"output_dir": str(tmp_path / "two_float32"), "resume": True, "max_steps": 3})
    assert [line["step"] for line in read(tmp_path / "two_float32")] == [0, 1, 2, 3]


@every_script
def test_sigterm_saves_and_continuing_equals_never_having_stopped(
    script, run, flags_of, tmp_path, monkeypatch, capsys
):
    module, folder = importlib.import_module(script.stem), tmp_path / "run"

    def log_and_terminate(self, metrics, *rest):
        log(self, metrics, *rest)
        if metrics["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    log = module.Logger.log
    with monkeypatch.context() as patch:
        patch.setattr(module.Logger, "log", log_and_terminate)
        main(script, flags_of(script, output_dir=str(folder)))
    assert checkpoints(folder) == ["step_00000002", "step_00000003"]
    assert not (folder / "model").exists()
    assert f"--resume --output-dir {folder}" in capsys.readouterr().out
    assert [line["step"] for line in read(folder)] == [0, 1, 2, 3]
    main(script, flags_of(script, output_dir=str(folder), resume=True))
    assert_same_run(folder, run(script), step=6)


KILL_WITHIN_THE_SECOND_CHECKPOINT = """
import os, runpy, signal, sys
from torch.distributed.checkpoint import FileSystemWriter

finish, calls = FileSystemWriter.finish, []

def finish_or_die(self, *args, **kwargs):  # the tensors are written, what says where they are is not
    calls.append(self)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(self, *args, **kwargs)

FileSystemWriter.finish = finish_or_die
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@every_script
def test_kill_in_a_run_from_another_folder_loses_nothing_saved(script, run, flags_of, tmp_path):
    """The command line in a folder of the user's, killed within its second checkpoint, then continued."""
    hooked = [sys.executable, "-c", KILL_WITHIN_THE_SECOND_CHECKPOINT, script]
    done = start(*hooked, *command_line(flags_of(script)), cwd=tmp_path)
    assert done.returncode == -9, done.stderr
    [folder] = (tmp_path / "runs").iterdir()  # the default output folder
    assert folder.name.startswith(f"{script.stem}_1_")
    assert checkpoints(folder) == ["partial", "step_00000002"]
    assert [line["step"] for line in read(folder)] == [0, 1, 2, 3, 4]
    assert "step 4/6" in done.stdout and "Traceback" not in done.stderr
    main(script, flags_of(script, output_dir=str(folder), resume=True))
    assert_same_run(folder, run(script), step=6)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    for path in (script, ROOT / "common.py"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
