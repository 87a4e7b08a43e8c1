"""What the tests of several scripts share: short runs, spies, comparisons; and all of samples.py."""

import json
import shutil
import weakref
import zlib
from pathlib import Path

import pytest
import torch
from conftest import DATA, read_lines, write_rows
from safetensors.torch import load_file
from samples import *  # noqa: F403
from samples import END, tiny_rows

CLOCK = {"tokens_per_second", "step_time", "peak_memory_gb", "time/rollout"}  # what no two runs share


def rewards(names: str) -> tuple[str, ...]:
    """The flag --reward for functions of data/reward_functions.py."""
    return tuple(f"{DATA / 'reward_functions.py'}:{name}" for name in names.split())


def trainer(script, tmp_path, **defaults):
    """train(rows, held_out, **flags) -> output folder, lines of metrics.jsonl (None where there are none).

    Evaluations are before and behind the run only, models are saved behind it; without the former there is
    no step 0. `reward` may name functions of data/reward_functions.py. Equal rows are in the same file.
    """
    defaults = {"eval_every": 0, "save_every": 0, "warmup_steps": 0, "log_every": 1} | defaults

    def train(rows=None, held_out=None, **flags):
        rows = tiny_rows("prompts_train", 64) if rows is None else rows
        own = {"output_dir": str(tmp_path / f"run_{len([*tmp_path.glob('run_*')])}")}
        for flag, some in (("dataset", rows), ("eval_dataset", held_out)):
            if some:
                name = f"rows_{zlib.crc32(json.dumps(some).encode())}.jsonl"
                own[flag] = write_rows(tmp_path / name, some)
        flags = defaults | own | {"dataset": (own["dataset"],)} | flags
        reward = flags.get("reward")
        if isinstance(reward, str) and ".py:" not in reward:
            flags["reward"] = rewards(reward)
        args = script.Args(**flags)
        script.main(args)
        path = Path(args.output_dir) / "metrics.jsonl"
        lines = [line for line in read_lines(path) if len(line) > 1] if path.exists() else None
        return path.parent, lines

    return train


def written(script, prompts, group_size, lengths, cut=()):
    """Completions of given lengths: tokens 10, 11, ... and an end, which those numbered in `cut` have not.

    Under the sampler every token has the log-prob -1.
    """
    asked, found = [prompt for prompt in prompts for _ in range(group_size)], []
    for n, (prompt, length) in enumerate(zip(asked, lengths, strict=True)):
        ids = [*range(10, 9 + length), 9 if n in cut else END]
        found.append(script.Completion(prompt, ids, torch.full((length,), -1.0), "", n not in cut))
    return found


def error_of(function, capture) -> str:
    """The one line on stderr, after "error: ", with which a user's mistake ends a run at exit status 2."""
    capture.readouterr()
    with pytest.raises(SystemExit) as stop:
        function()
    [line] = filter(None, capture.readouterr().err.splitlines())
    assert stop.value.code == 2 and line.startswith("error: "), line
    return line.removeprefix("error: ")


def calls_of(monkeypatch, module, name: str) -> list[tuple]:
    """(arguments, result) of every call of a module's function from now on."""
    calls, function = [], getattr(module, name)

    def spy(*arguments, **options):
        calls.append((arguments, function(*arguments, **options)))
        return calls[-1][1]

    monkeypatch.setattr(module, name, spy)
    return calls


def models_of(monkeypatch, script) -> list[weakref.ref]:
    """The models that a script loads from now on, as long as they are in memory."""
    models, load_model = [], script.load_model

    def load(*arguments, **options):
        model = load_model(*arguments, **options)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(script, "load_model", load)
    return models


def assert_same_metrics(one, other, rel=1e-5, abs_=1e-6, without=()):
    """Equal lines but for what the clock decides and the keys `without`."""
    for line, wanted in zip(one, other, strict=True):
        assert line.keys() == wanted.keys()
        for key in wanted.keys() - CLOCK - set(without):
            assert line[key] == pytest.approx(wanted[key], rel=rel, abs=abs_), (key, wanted["step"])


def assert_continues(train, *rows, **flags):
    """A run that goes on from its checkpoint before the last equals one that never stopped."""
    folder, wanted = train(*rows, **flags)
    copy = folder.with_name("continued")
    shutil.copytree(folder, copy)
    for path in [*copy.glob("*model"), max((copy / "checkpoints").iterdir())]:
        shutil.rmtree(path)
    _, found = train(*rows, output_dir=str(copy), resume=True, **flags)
    assert_same_metrics(found, wanted, 0, 0)
    for path in folder.glob("*model/*.safetensors"):
        tensors, others = load_file(path), load_file(copy / path.relative_to(folder))
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
