"""Every script on disk that trains, for a few steps on tiny/: it runs, is reproducible and survives a stop.

data/smoke.jsonl has a line for each: the flags of its run, beside those of runs `like` it, of runs that must
come out the same for every token budget, and of two steps on the same rows that have the same loss.
"""

import importlib
import math
import os
import re
import shutil
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
import tyro
from conftest import DATA, ROOT, fork, read_lines, run_command, two_processes, write_rows
from helpers import CLOCK
from safetensors.torch import load_file
from sync_copies import scripts
from sync_docs import documented_metrics, flags, metric_differences
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

SHORT = {"batch_size": 8, "max_tokens_per_micro_batch": 512, "learning_rate": 3e-4, "warmup_steps": 2}
SHORT |= {"max_steps": 6, "eval_every": 3, "save_every": 2, "log_every": 1, "num_eval": 4}
PAIRS = SHORT | {"dataset": ("DATA/preference_train.jsonl",), "eval_dataset": "DATA/preference_eval.jsonl"}
ONLINE = SHORT | {"dataset": ("DATA/prompts_train.jsonl",), "eval_dataset": "DATA/prompts_eval.jsonl"}
ONLINE |= {"eval_samples": 2, "max_completion_length": 40, "num_generations": 4}
ONLINE |= {"batch_size": 16, "learning_rate": 1e-4}


def as_args(row: dict) -> dict:
    """Flags as Args has them: JSON knows no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


CASES = {case["script"]: case for case in read_lines(DATA / "smoke.jsonl")}
# Flags of a run of 6 steps, evaluations at 0, 3 and 6, checkpoints at 2, 4 and 6; DATA: tiny/data, shortened.
BASES = {"pairs": PAIRS, "online": ONLINE}
RUN = {name: BASES[case["like"]] | as_args(case["run"]) for name, case in CASES.items()}
SCRIPTS = [path for path in scripts() if any(flag.name == "max_steps" for flag in flags(path))]  # that train
QUICK = {"max_steps": 2, "save_every": 0, "eval_every": 0, "num_eval": 2}
HELD_OUT = ("eval_dataset", "search_dataset", "forgetting_dataset")  # what a run can do without

pytestmark = pytest.mark.usefixtures("one_cpu")  # as the subprocesses of `start`
PARAMS = [pytest.param(p, id=p.stem, marks=pytest.mark.xdist_group(p.stem)) for p in SCRIPTS]
every_script = pytest.mark.parametrize("script", PARAMS)


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
    lines = read_lines(folder / f"{name}.jsonl")
    return [{k: v for k, v in x.items() if k not in CLOCK} for x in lines]


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
    """Equal up to rounding, as far as that can be said."""
    lines, others = ([x for x in run if x["step"] <= comparable_steps(script)] for run in (lines, others))
    assert len(lines) == len(others) > 0
    for line, other in zip(lines, others, strict=True):
        for key in (key for key in keys if key in line or key in other):
            # AdamW makes a rounding larger from update to update; a loss at ratio 1 is 0
            near = pytest.approx(other[key], rel=rel if line["step"] <= 1 else 10 * rel, abs=1e-6)
            assert line[key] == near, (line["step"], key)


@every_script
def test_what_no_run_can_have_is_refused_by_every_script(script, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script.stem).Args(batch_size=0)
    told = "error: --batch-size 0: Input should be greater than 0"
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines() == [told]


def test_every_script_has_a_fast_run():
    assert {path.name for path in SCRIPTS} == RUN.keys()


@every_script
def test_help_names_every_flag(script, capsys):
    module = importlib.import_module(script.stem)
    with pytest.raises(SystemExit) as stop:
        tyro.cli(module.Args, args=["--help"])
    shown = capsys.readouterr().out
    names = [f"--{flag.name.replace('_', '-')}" for flag in flags(script)]
    assert stop.value.code == 0 and [name for name in names if name not in shown] == []


def comparable_steps(script) -> int:
    """Of runs that differ in rounding: of an online script the first, behind it a sample may differ."""
    return 1 if "num_generations" in RUN[script.name] else 2


def lean(script, **changes) -> dict:
    """Flags of a run of the steps that can be compared, without evaluations."""
    without = {flag: None for flag in HELD_OUT if flag in RUN[script.name]}
    return QUICK | without | {"max_steps": comparable_steps(script)} | changes


@every_script
def test_another_seed_gives_another_run(script, run):
    one, other = run(script, **QUICK), run(script, **lean(script, seed=2, max_steps=1))
    assert read(one)[1]["grad_norm"] != read(other)[1]["grad_norm"]


@every_script
def test_metrics_are_finite_and_exactly_the_documented_ones(script, run):
    lines = read(run(script))
    assert [line["step"] for line in lines] == list(range(7))
    assert [key for line in lines for key, value in line.items() if not math.isfinite(value)] == []
    assert documented_metrics(script)
    logged = {key for line in read_lines(run(script) / "metrics.jsonl") for key in line}
    assert metric_differences(script, logged) == []


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


class Downhill(torch.optim.SGD):
    """Steps against the gradient, each as long as lowers what it is the gradient of by `drop`."""

    drop = 3e-3

    def __init__(self, groups, betas, fused):
        super().__init__(groups)

    def step(self):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        square = sum(grad.double().square().sum() for grad in grads)
        for group in self.param_groups:
            group["lr"] = self.drop / float(square)
        super().step()


@every_script
def test_a_step_lowers_the_logged_loss_by_the_gradient_squared(script, flags_of, tmp_path, monkeypatch):
    """A finite difference of every loss: it holds the sign, the normaliser and the size of the gradient."""
    if script.stem == "ppo_rlhf":
        return  # two losses, two models: test_ppo_rlhf.py has its step against stock models
    passes = any(flag.name == "num_iterations" for flag in flags(script))  # over a rollout, in its clip range
    monkeypatch.setattr(Downhill, "drop", 3e-4 if passes else 3e-3)
    monkeypatch.setattr(torch.optim, "AdamW", Downhill)
    settings = QUICK | {"max_grad_norm": math.inf, "warmup_steps": 0}

    def loss_of(number, **changes):
        folder = tmp_path / f"run_{number}"
        main(script, flags_of(script, output_dir=str(folder), **settings | changes))
        return [line["loss"] for line in read(folder)[1:]]

    if passes:  # what two and three passes over one rollout had to lose
        two, three = (loss_of(n, num_iterations=n, max_steps=1)[0] * n for n in (2, 3))
        drop = (two - 2 * (three - two)) / 3  # L + (L - d), and from there L - 2 d
    else:  # two steps on the same rows
        source = flags_of(script)["dataset"][0].replace("unpaired", "preference")
        rows = write_rows(tmp_path / "rows.jsonl", read_lines(source)[:8])
        if script.stem == "online_dpo":  # the second step has the answers of the first
            module, answers = importlib.import_module(script.stem), []
            roll_out = lambda *args, draw=module.roll_out: answers or answers.extend(draw(*args)) or answers
            monkeypatch.setattr(module, "roll_out", roll_out)
        first, second = loss_of(0, dataset=(rows,), batch_size=8, **CASES[script.name].get("same_rows", {}))
        drop = first - second
    assert drop == pytest.approx(Downhill.drop, rel=0.25)


@every_script
def test_token_budgets_and_gradient_checkpointing_are_memory_only(script, run):
    small, large = {"max_tokens_per_micro_batch": 200}, {"max_tokens_per_micro_batch": 8192}
    if any(flag.name == "max_tokens_per_rollout" for flag in flags(script)):
        small["max_tokens_per_rollout"] = 200
    several = [(QUICK, lean(script, **small), lean(script, gradient_checkpointing=True, **large))]
    for variant in map(as_args, CASES[script.name]["variants"]):
        several.append((lean(script, **variant, **small), lean(script, **variant, **large)))
    keys = ("loss", "grad_norm", "grad_norm/value", "reward", "entropy", "advantage_std")
    for settings in several:
        first, *others = ([x for x in read(run(script, **s)) if "loss" in x] for s in settings)
        for other in others:
            assert_close_metrics(script, first, other, keys=keys)
        fills = [[line.get("packing/fill", n) for line in x[:1]] for n, x in enumerate((first, *others))]
        assert all(one != other for one, other in zip(fills[:-1], fills[1:], strict=True))


@every_script
def test_bfloat16_is_the_same_but_for_rounding_and_continues_exactly(script, run, flags_of, tmp_path):
    """FSDP2 casts float32 masters to bfloat16 for a process group of one: the GPU's configuration."""
    settings, folder = QUICK | {"dtype": "bfloat16", "save_every": 1}, tmp_path / "run"
    whole = run(script, **settings)
    if comparable_steps(script) > 1:  # other samples have another loss
        one, other = read(whole)[1], read(run(script, **QUICK))[1]
        assert one["loss"] == pytest.approx(other["loss"], rel=0.1)
    shutil.copytree(whole, folder)
    for path in [*folder.glob("model*"), folder / "checkpoints" / "step_00000002"]:
        shutil.rmtree(path)
    main(script, flags_of(script, output_dir=str(folder), resume=True, **settings))
    assert_same_run(folder, whole, step=2)


def run_both_dtypes(script, settings):
    for dtype in ("float32", "bfloat16"):
        main(script, settings | {"dtype": dtype, "output_dir": f"{settings['output_dir']}_{dtype}"})


@every_script
def test_two_processes_are_one(script, run, flags_of, tmp_path):
    steps = comparable_steps(script)
    settings = QUICK | {"max_steps": steps, "save_every": 1, "output_dir": str(tmp_path / "two")}
    settings = flags_of(script, **settings)
    two_processes(run_both_dtypes, script, settings, cwd=tmp_path)
    rounded = run(script, dtype="bfloat16", **QUICK | {"save_every": 1})
    for dtype, whole, rel in (("float32", run(script, **QUICK), 1e-5), ("bfloat16", rounded, 0.05)):
        folder = tmp_path / f"two_{dtype}"
        keys = ("loss", "grad_norm", "grad_norm/value", "updates", "eval/loss")[: 2 if rel > 0.01 else None]
        assert_close_metrics(script, read(folder), read(whole), keys=keys, rel=rel)
    first, wanted = read(tmp_path / "two_float32")[0], read(run(script, **QUICK))[0]  # before any update
    sampled = {k: wanted[k] for k in wanted if "reward" in k}
    assert {k: first[k] for k in sampled} == pytest.approx(sampled)
    # one process continues what two began
    more = {"output_dir": str(tmp_path / "two_float32"), "resume": True, "max_steps": steps + 1}
    main(script, settings | more)
    assert [line["step"] for line in read(tmp_path / "two_float32")] == list(range(steps + 2))


def run_until_the_second_checkpoint(script, words):
    """The command line, killed when the tensors are written, and what says where they are is not."""
    finish, calls = FileSystemWriter.finish, []

    def finish_or_die(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(self, *args, **kwargs)

    FileSystemWriter.finish = finish_or_die
    run_command(script, *words)


@every_script
def test_kill_and_sigterm_lose_nothing_saved_and_a_continued_run_equals_one_that_never_stopped(
    script, run, flags_of, tmp_path, monkeypatch, capsys, figures
):
    # the command line in a folder of the user's, killed within its second checkpoint
    process = fork(run_until_the_second_checkpoint, script, command_line(flags_of(script)), cwd=tmp_path)
    process.join(300)
    printed = (tmp_path / "output").read_text()
    assert process.exitcode == -9, printed
    [folder] = (tmp_path / "runs").iterdir()  # the default output folder
    assert folder.name.startswith(f"{script.stem}_1_")
    assert checkpoints(folder) == ["partial", "step_00000002"]
    assert [line["step"] for line in read(folder)] == [0, 1, 2, 3, 4]
    assert "step 4/6" in printed and "Traceback" not in printed

    # continued, and told to stop in its third step: it saves behind the next one, as it would not by itself
    def log_and_terminate(self, metrics, *rest):
        log(self, metrics, *rest)
        if metrics["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    module = importlib.import_module(script.stem)
    log = module.Logger.log
    with monkeypatch.context() as patch:
        patch.setattr(module.Logger, "log", log_and_terminate)
        main(script, flags_of(script, output_dir=str(folder), resume=True, save_every=0))
    assert checkpoints(folder) == ["step_00000002", "step_00000004"]
    assert not (folder / "model").exists()
    assert f"--resume --output-dir {folder}" in capsys.readouterr().out
    assert [line["step"] for line in read(folder)] == [0, 1, 2, 3, 4]

    main(script, flags_of(script, output_dir=str(folder), resume=True))
    assert_same_run(folder, run(script), step=6)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    for path in (script, ROOT / "common.py", ROOT / "loading.py"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
