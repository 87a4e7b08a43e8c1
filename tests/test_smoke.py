"""Every script on disk that trains, for a few steps on tiny/: it runs, is reproducible and survives a stop.

A new script adds its entry to `RUN`, and to `VARIANTS` what else must not depend on the token budget.
"""

import ast
import importlib
import json
import math
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT, start
from safetensors.torch import load_file
from sync_copies import scripts
from sync_docs import documented_metrics, flags, metric_differences
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

PAIRS = {
    "eval_dataset": "DATA/preference_eval.jsonl",
    "cache_dir": "DATA/cache",
    "num_eval": 4,
    "max_completion_length": 8,
    "batch_size": 8,
    "max_tokens_per_micro_batch": 512,
    "learning_rate": 3e-4,
    "warmup_steps": 2,
    "max_steps": 6,
    "eval_every": 3,
    "save_every": 2,
    "log_every": 1,
}
ONLINE = {
    "dataset": ("DATA/prompts_train.jsonl",),
    "eval_dataset": "DATA/prompts_eval.jsonl",
    "num_eval": 4,
    "eval_samples": 2,
    "max_completion_length": 40,
    "num_generations": 4,
    "batch_size": 16,
    "max_tokens_per_micro_batch": 512,
    "learning_rate": 1e-4,
    "warmup_steps": 2,
    "max_steps": 6,
    "eval_every": 3,
    "save_every": 2,
    "log_every": 1,
}
# Flags of a run of 6 steps, evaluations at 0, 3 and 6, checkpoints at 2, 4 and 6; DATA: tiny/data, shortened.
RUN = {
    "sft.py": {
        "dataset": ("DATA/sft_train.jsonl",),
        "eval_dataset": "DATA/sft_eval.jsonl",
        "forgetting_dataset": "DATA/text_eval.jsonl",
        "num_eval": 4,
        "max_completion_length": 8,
        "batch_size": 16,
        "max_tokens_per_micro_batch": 512,
        "learning_rate": 3e-4,
        "warmup_steps": 2,
        "max_steps": 6,
        "eval_every": 3,
        "save_every": 2,
        "log_every": 1,
    },
    "dpo.py": PAIRS | {"dataset": ("DATA/preference_train.jsonl",)},
    "ipo_kto_simpo_orpo.py": PAIRS | {"algorithm": "kto", "dataset": ("DATA/unpaired_train.jsonl",)},
    "grpo.py": ONLINE,
    "dapo.py": ONLINE | {"overlong_buffer": 20},
    "rloo_remax.py": ONLINE,
    "ppo_rlhf.py": ONLINE
    | {"reward_model": ("tiny/reward",), "eval_reward": ("rewards.py:math_answer",), "target_kl": 0.01},
    "reward_model.py": {k: v for k, v in PAIRS.items() if k not in ("cache_dir", "max_completion_length")}
    | {"dataset": ("DATA/preference_train.jsonl",)},
    "process_reward_model.py": {k: v for k, v in PAIRS.items() if k != "cache_dir"}
    | {
        "dataset": ("DATA/steps_train.jsonl",),
        "eval_dataset": "DATA/steps_eval.jsonl",
        "search_dataset": "DATA/prompts_eval.jsonl",
        "policy": "tiny/sft",
        "num_prompts": 2,
        "num_samples": 2,
    },
    "distill.py": {k: v for k, v in PAIRS.items() if k != "eval_dataset"}
    | {
        "teacher": "tiny/base",  # other than the student, which thus keeps all its layers
        "dataset": ("DATA/sft_train.jsonl",),
        "prompt_dataset": "DATA/prompts_train.jsonl",
        "eval_dataset": "DATA/sft_eval.jsonl",
    },
}
# Flags of the runs that must come out the same for every token budget.
VARIANTS = {
    "sft.py": (
        {},
        {"gradient_checkpointing": True},
        {"neftune_alpha": 5.0},
        {"loss_agg": "seq_mean_token_mean"},
    ),
    "dpo.py": (
        {},
        {"share_prompt": True},
        {"loss": "sigmoid_norm", "sft_coef": 1.0},
        {"loss": "tdpo2", "ref": "live", "sync_ref_every": 2},
    ),
    "ipo_kto_simpo_orpo.py": (
        {},
        *(
            {"algorithm": name, "dataset": ("DATA/preference_train.jsonl",)}
            for name in ("ipo", "simpo", "orpo")
        ),
    ),
    "reward_model.py": (
        {},
        {"share_prompt": True},
        {"objective": "outcome", "dataset": ("DATA/unpaired_train.jsonl",)},
    ),
    "process_reward_model.py": ({"batch_size": 13},),
    "distill.py": (
        {"ce_coef": 0.5},
        {"divergence": "jsd", "kd_temperature": 2.0, "cache_top_k": 4},
        {"mode": "on_policy", "divergence": "reverse_kl"},
        {"mode": "seq_kd", "teacher_data": "DATA/sft_train.jsonl"},
    ),
    "grpo.py": (
        {},
        {"num_iterations": 2, "num_minibatches": 2, "beta": 0.1},
        {"importance_sampling": "sequence", "num_iterations": 2, "generation_batch_size": 3},
    ),
    "dapo.py": ({}, {"overlong_filtering": True, "max_resamples": 1}),
    "rloo_remax.py": (
        {"kl_coef": 0.1},
        {"algorithm": "remax"},
        {"algorithm": "reinforce_pp", "kl_coef": 0.1},
    ),
    "ppo_rlhf.py": (
        {},
        {"num_ppo_epochs": 2, "num_minibatches": 2, "kl_controller": "adaptive", "normalize_reward": True},
        {"truncated": "bootstrap", "whiten_rewards": True, "value_init": "policy"},
    ),
}
NO_EVALUATION = {
    "distill.py": {"eval_dataset": None},
    "sft.py": {"eval_dataset": None, "forgetting_dataset": None},
    "dpo.py": {"eval_dataset": None},
    "ipo_kto_simpo_orpo.py": {"eval_dataset": None},
    "reward_model.py": {"eval_dataset": None},
    "process_reward_model.py": {"eval_dataset": None, "num_prompts": 0},
    "grpo.py": {"eval_dataset": None},
    "dapo.py": {"eval_dataset": None},
    "rloo_remax.py": {"eval_dataset": None},
    "ppo_rlhf.py": {"eval_dataset": None},
}
CLOCK = {"tokens_per_second", "step_time", "peak_memory_gb"}  # what no two runs share
CLOCK |= {f"time/{stage}" for stage in ("rollout", "reward", "logprobs", "update")}
SCRIPTS = [path for path in scripts() if any(flag.name == "max_steps" for flag in flags(path))]  # that train

pytestmark = pytest.mark.usefixtures("one_cpu")  # as the subprocesses of `start`
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


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
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The tensors and numbers of a checkpoint by path: weights in float32, moments, random states."""
    file = folder / "state.pt"
    dcp_to_torch_save(folder / "checkpoints" / f"step_{step:08d}", file)

    def flat(tree, prefix=""):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            if isinstance(value, dict | list):
                yield from flat(value, f"{prefix}{key}/")
            elif isinstance(value, torch.Tensor | int | float):
                yield f"{prefix}{key}", torch.as_tensor(value)

    return dict(flat(torch.load(file, weights_only=False)))


def assert_same_run(one: Path, other: Path, step: int):
    """Metrics, samples, the last checkpoint and the final model are equal bit for bit."""
    assert read(one) == read(other)
    assert read(one, "samples") == read(other, "samples")
    first, second = state(one, step), state(other, step)
    assert first.keys() == second.keys()
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert [name for name in differing if not name.startswith("rng")] == []
    assert checkpoints(one) == checkpoints(other)
    for path in (one / "model").iterdir():
        assert path.read_bytes() == (other / "model" / path.name).read_bytes(), path.name


def assert_close_metrics(lines, others, keys=("loss", "grad_norm"), rel=1e-5):
    assert len(lines) == len(others)
    for line, other in zip(lines, others, strict=True):
        for key in keys:
            if key in line or key in other:
                # AdamW makes a rounding larger from update to update; a loss at ratio 1 is 0
                near = pytest.approx(other[key], rel=rel if line["step"] <= 1 else 10 * rel, abs=1e-7)
                assert line[key] == near, (line["step"], key)


def comparable(script, lines):
    """What must be the same: of an online script up to its first update.

    Behind it the weights differ by a rounding, and a sample may fall on the other side of a token's edge.
    """
    return [line for line in lines if line["step"] <= 1] if "num_generations" in RUN[script.name] else lines


@every_script
@pytest.mark.parametrize(
    "change, told",
    [
        ({"max_grad_norm": -1.0}, "error: --max-grad-norm must be above 0, not -1.0"),
        ({"learning_rate": math.nan}, "error: --learning-rate must be at least 0, not nan"),
        ({"batch_size": 0}, "error: --batch-size must be at least 1, not 0"),
        ({"resume": True}, "error: --resume needs --output-dir: which run should continue?"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_no_run_can_have_is_refused_by_every_script(script, change, told, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script.stem).Args(**change)
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines() == [told]


def test_flags_that_are_checked_for_their_range_exist():
    tree = ast.parse((ROOT / "sft.py").read_text())
    [check] = [node for node in tree.body if getattr(node, "name", "") == "check_flags"]
    ranges = next(node.value for node in check.body if isinstance(node, ast.Assign))
    names = [name for entry in ranges.elts for name in entry.elts[2].value.split()]
    known = {flag.name for path in SCRIPTS for flag in flags(path)}
    assert len(names) > 40 and set(names) <= known and len(set(names)) == len(names)


def test_every_script_has_a_fast_run():
    assert {path.name for path in SCRIPTS} == RUN.keys() == VARIANTS.keys() == NO_EVALUATION.keys()


@every_script
def test_help_names_every_flag(script, tmp_path):
    done = start(sys.executable, script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = [f"--{flag.name.replace('_', '-')}" for flag in flags(script) if flag.init]
    assert [name for name in names if name not in done.stdout] == []
    assert list(tmp_path.iterdir()) == []


@every_script
def test_run_from_another_folder_gives_the_same_metrics(script, run, flags_of, tmp_path):
    done = start(sys.executable, script, *command_line(flags_of(script)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "runs").iterdir()  # the default output folder
    method, seed, _ = folder.name.rsplit("_", 2)
    assert method in script.stem and seed == "1"
    assert_same_run(folder, run(script), step=6)
    assert checkpoints(folder) == ["step_00000004", "step_00000006"]  # the last two
    assert "step 6/6" in done.stdout and "Traceback" not in done.stderr
    assert (folder / script.name).read_bytes() == script.read_bytes()


@every_script
def test_another_seed_gives_another_run(script, run):
    quick = {"max_steps": 3, "save_every": 0} | NO_EVALUATION[script.name]
    losses = [[line["loss"] for line in read(run(script, seed=seed, **quick))[1:]] for seed in (1, 2)]
    assert losses[0] != losses[1]


@every_script
def test_metrics_are_finite(script, run):
    lines = read(run(script))
    assert [line["step"] for line in lines] == list(range(7))
    assert [key for line in lines for key, value in line.items() if not math.isfinite(value)] == []


@every_script
def test_metrics_are_exactly_the_documented_ones(script, run):
    if not documented_metrics(script):
        pytest.skip(f"docs/{script.stem}.md lists no metrics yet")
    lines = (run(script) / "metrics.jsonl").read_text().splitlines()
    assert metric_differences(script, {key for line in lines for key in json.loads(line)}) == []


@every_script
def test_every_trainable_parameter_changes(script, run, tiny):
    before = load_file(ROOT / importlib.import_module(script.stem).Args().model / "model.safetensors")
    prefix = re.compile(r"model/(policy\.)?")  # ppo_rlhf.py saves its value model beside its policy
    after = {prefix.sub("", k, 1): v for k, v in state(run(script), 6).items() if k.startswith("model/")}
    assert before.keys() <= after.keys()
    moved = {name: (after[name] != before[name].float()).float().mean().item() for name in before}
    # Without a language model head only the embeddings of tokens that were read have a gradient.
    least = {name: 0.1 if "score.weight" in after and "embed" in name else 0.9 for name in moved}
    assert {name: share for name, share in moved.items() if share < least[name]} == {}


@every_script
@pytest.mark.parametrize("budget", [200, 8192])
def test_token_budget_is_memory_only(script, run, budget):
    quick = {"max_steps": 3, "save_every": 0} | NO_EVALUATION[script.name]
    for variant in VARIANTS[script.name]:
        lines, others = (
            read(run(script, max_tokens_per_micro_batch=tokens, **quick | variant))
            for tokens in (1024, budget)
        )
        assert_close_metrics(comparable(script, lines[1:]), comparable(script, others[1:]))
        assert [line["packing/fill"] for line in lines[1:]] != [line["packing/fill"] for line in others[1:]]


@every_script
def test_gradient_checkpointing_is_memory_only(script, run):
    quick = {"max_steps": 3, "save_every": 0, "max_tokens_per_micro_batch": 1024} | NO_EVALUATION[script.name]
    lines, others = read(run(script, **quick)), read(run(script, gradient_checkpointing=True, **quick))
    assert_close_metrics(comparable(script, lines[1:]), comparable(script, others[1:]))


@every_script
def test_two_processes_are_one(script, run, flags_of, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    whole, folder, replayed = run(script), tmp_path / "two", {}
    if (
        "num_generations" in RUN[script.name]
    ):  # on the same samples: a rounding may move another to the next token
        whole = run(script, save_rollouts=True)
        replayed = {"replay_rollouts": str(whole / "rollouts.jsonl")}
    arguments = command_line(flags_of(script, output_dir=str(folder), **replayed))
    done = start(*torchrun, script, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    keys = ("loss", "grad_norm", "grad_norm/value", "updates", "eval/loss")
    assert_close_metrics(read(folder), read(whole), keys=keys)
    first, wanted = read(folder)[0], read(whole)[0]  # what both sample before any update
    assert {k: first[k] for k in first if "reward" in k} == pytest.approx(
        {k: wanted[k] for k in wanted if "reward" in k}
    )
    one, two = state(whole, 6), state(folder, 6)
    weights = [name for name in one if name.startswith("model/")]
    apart = sum(((one[name] - two[name]).abs() > 1e-5).sum().item() for name in weights)
    assert apart <= 1e-4 * sum(one[name].numel() for name in weights)
    saved, expected = (load_file(path / "model" / "model.safetensors") for path in (folder, whole))
    assert saved.keys() == expected.keys()
    # one process continues what two began
    for path in (folder / "model", folder / "checkpoints" / "step_00000006"):
        shutil.rmtree(path)
    main(script, flags_of(script, output_dir=str(folder), resume=True, **replayed))
    assert_close_metrics(read(folder), read(whole), keys=keys)


HOOKED = """
import importlib, os, signal
import tyro
from torch.distributed.checkpoint import FileSystemWriter

script = importlib.import_module({name!r})
{hook}
script.main(tyro.cli(script.Args))
"""
SIGTERM_AFTER_STEP_2 = """
log = script.Logger.log

def log_and_terminate(self, metrics, *rest):
    log(self, metrics, *rest)
    if metrics["step"] == 2:
        os.kill(os.getpid(), signal.SIGTERM)

script.Logger.log = log_and_terminate
"""
KILL_WITHIN_THE_SECOND_CHECKPOINT = """
finish, calls = FileSystemWriter.finish, []

def finish_or_die(self, *args, **kwargs):  # the tensors are written, what says where they are is not
    calls.append(self)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(self, *args, **kwargs)

FileSystemWriter.finish = finish_or_die
"""


def run_hooked(script, hook, flags, folder, cwd):
    program = HOOKED.format(name=script.stem, hook=hook)
    return start(sys.executable, "-c", program, *command_line(flags | {"output_dir": str(folder)}), cwd=cwd)


@pytest.fixture(scope="module")
def stopped(flags_of, tmp_path_factory):
    """stopped(script): the folder of a run that SIGTERM ended after step 3 and that was then continued."""

    @cache
    def cached(script):
        folder = tmp_path_factory.mktemp(f"{script.stem}_stopped") / "run"
        done = run_hooked(script, SIGTERM_AFTER_STEP_2, flags_of(script), folder, folder.parent)
        assert done.returncode == 0, done.stderr
        assert checkpoints(folder) == ["step_00000002", "step_00000003"]
        assert not (folder / "model").exists() and f"--resume --output-dir {folder}" in done.stdout
        assert [line["step"] for line in read(folder)] == [0, 1, 2, 3]
        main(script, flags_of(script, output_dir=str(folder), resume=True))
        return folder

    return cached


@every_script
def test_sigterm_saves_and_continuing_equals_never_having_stopped(script, run, stopped):
    assert_same_run(stopped(script), run(script), step=6)


@every_script
def test_random_state_is_seeded_and_continued(script, run, stopped):
    expected, continued = state(run(script), 6), state(stopped(script), 6)
    [name] = [name for name in expected if name.startswith("rng")]
    assert torch.equal(continued[name], expected[name])


@every_script
def test_kill_within_a_checkpoint_leaves_the_one_before(script, run, flags_of, tmp_path):
    folder = tmp_path / "run"
    done = run_hooked(script, KILL_WITHIN_THE_SECOND_CHECKPOINT, flags_of(script), folder, tmp_path)
    assert done.returncode == -9, done.stderr
    assert checkpoints(folder) == ["partial", "step_00000002"]
    assert [line["step"] for line in read(folder)] == [0, 1, 2, 3, 4]
    main(script, flags_of(script, output_dir=str(folder), resume=True))
    assert_same_run(folder, run(script), step=6)
