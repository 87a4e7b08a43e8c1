"""What is the same text in every training script, tested once, in sft.py: folders, files, flags, stops."""

import gzip
import json
import math
import os
import re
import shutil
import signal
import sys
import time

import datasets
import pytest
import torch
from conftest import DATA, ROOT, read_lines, run_command, start, write_rows
from helpers import error_of
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, Gemma2Config

import sft

SUM = "{0} and 2 are {1}\n#### {1}"
ROWS = [{"question": f"What is {i} and 2?", "answer": SUM.format(i, i + 2)} for i in range(12)]


@pytest.fixture
def flags(random_model, tmp_path, one_cpu):
    """flags(**changes): of a run of 3 steps with checkpoints at every step, into tmp_path/run."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    small = {"model": str(random_model), "dataset": (path,), "output_dir": str(tmp_path / "run")}
    small |= {"batch_size": 4, "max_steps": 3, "save_every": 1, "warmup_steps": 0, "learning_rate": 9e-4}
    return lambda **changes: small | changes


@pytest.fixture
def train(flags, tmp_path):
    def run(**changes):
        sft.main(sft.Args(**flags(**changes)))
        return tmp_path / "run", read_lines(tmp_path / "run" / "metrics.jsonl")

    return run


@pytest.fixture
def refused(flags, capsys, monkeypatch):
    """refused(pattern, **flags): one line on stderr, exit code 2, before a model is loaded."""

    def run(pattern, **changes):
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
        line = error_of(lambda: sft.main(sft.Args(**flags(**changes))), capsys)
        assert re.search(pattern, line), line

    return run


def test_command_line_that_fails_tells_why_and_leaves_no_empty_run(tmp_path):
    done = start(sys.executable, ROOT / "sft.py", "--model", "x", cwd=tmp_path)
    told = done.stderr.splitlines()
    assert done.returncode == 2 and told[-1].startswith("error: --model x") and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.rglob("*") if path.name != "runs"] == []


def test_existing_folder_is_never_written_into(refused, tmp_path):
    (tmp_path / "run").mkdir()
    write_rows(tmp_path / "run" / "train.jsonl", [{"step": i} for i in range(40)])
    refused(r"run: File exists; name a new one, or --resume the run in it")
    refused(r"holds no run", resume=True)
    assert len(read_lines(tmp_path / "run" / "train.jsonl")) == 40


def test_two_runs_started_at_once_have_two_folders(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    sft.setup_distributed()
    folders = []
    for process in (1, 2):
        monkeypatch.setattr(sft.os, "getpid", lambda process=process: process)
        folders.append(sft.choose_output_dir(sft.Args(**flags(output_dir=None))))
    assert len({path.name for path in folders}) == 2 and all(path.is_dir() for path in folders)


def test_another_run_is_not_continued(train, capsys):
    folder, lines = train()
    model = (folder / "model" / "model.safetensors").read_bytes()
    for case in read_lines(DATA / "other_runs.jsonl"):
        if "script" in case["told"]:
            begun = json.loads((folder / "args.json").read_text())
            (folder / "args.json").write_text(json.dumps(begun | {"script": "grpo.py"}))
        line = error_of(lambda flags=case["flags"]: train(resume=True, **flags), capsys)
        assert re.search(case["told"], line), line
        assert read_lines(folder / "metrics.jsonl") == lines
        assert (folder / "model" / "model.safetensors").read_bytes() == model


def test_changed_flags_of_a_continued_run_are_told_and_recorded(train, capsys):
    train(lr_schedule="constant")
    capsys.readouterr()
    folder, lines = train(lr_schedule="constant", max_steps=5, log_every=1, resume=True)
    out = capsys.readouterr().out
    assert "--resume: max_steps was 3 and is 5" in out and "--resume: log_every was 10 and is 1" in out
    assert json.loads((folder / "args.json").read_text())["max_steps"] == 5
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]


def test_finished_run_without_checkpoints_is_not_begun_anew(train, capsys):
    folder, lines = train(save_every=0)
    line = error_of(lambda: train(save_every=0, max_steps=4, resume=True), capsys)
    assert "no checkpoint that can be read" in line
    assert read_lines(folder / "metrics.jsonl") == lines


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damaged_last_checkpoint_falls_back_to_the_one_before(train, flags, capsys, how):
    folder, lines = train()
    shutil.rmtree(folder / "model")
    last = folder / "checkpoints" / "step_00000003"
    assert {path.name for path in last.parent.iterdir()} == {"step_00000002", last.name}  # of three two
    for path in last.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100]) if how == "cut" else path.unlink()
    capsys.readouterr()
    again = train(resume=True)[1]
    out = capsys.readouterr().out
    assert "trying the one before" in out and "continuing from" in out and "step_00000002" in out
    keys = ("step", "loss", "grad_norm", "num_tokens")
    assert [[x.get(k) for k in keys] for x in again] == [[x.get(k) for k in keys] for x in lines]
    for path in (folder / "checkpoints").rglob("*.distcp"):
        path.unlink()
    shutil.rmtree(folder / "model")
    assert "no checkpoint that can be read" in error_of(lambda: train(resume=True), capsys)


def test_torn_last_line_does_not_stop_a_run_from_continuing(train):
    folder, lines = train(max_steps=2)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "prom')
    shutil.rmtree(folder / "model")
    assert train(max_steps=2, resume=True)[1] == lines


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_were_cut_off_are_one_line(dtype, train, tmp_path, capsys):
    model = shutil.copytree(ROOT / "tiny" / "sft", tmp_path / "model")
    os.truncate(model / "model.safetensors", 9999)
    assert str(model) in error_of(lambda: train(model=str(model), dtype=dtype), capsys)


def run_on_a_full_disk(words, error):
    def full(*_, **__):
        raise error

    torch.distributed.checkpoint.save = full
    run_command(ROOT / "sft.py", *words)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("[enforce fail] unexpected pos 704 vs 598")],
)
def test_full_disk_is_one_line(error, flags, forked):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags(dataset="rows.jsonl").items()]
    code, told = forked(run_on_a_full_disk, words, error)
    lines = [line for line in told.splitlines() if "error" in line.lower()]
    assert code == 2 and len(lines) == 1 and "no space left on the device" in lines[0], told
    assert "Traceback" not in told


def interrupt_before_training():
    sft.setup_distributed()
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_before_training_ends_quietly(forked):
    assert forked(interrupt_before_training) == (130, "")


def test_failure_of_any_process_is_told(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    sft.say("not from the second process")
    with pytest.raises(SystemExit):
        sft.fail("seen")
    assert capsys.readouterr() == ("", "error: seen\n")


def test_signal_to_one_process_stops_all_with_one_checkpoint(flags, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, signal, sft
import torch.distributed as dist

log = sft.Logger.log

def log_and_terminate(self, metrics, *rest):
    log(self, metrics, *rest)
    if metrics["step"] == 1 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)

sft.Logger.log = log_and_terminate
sft.main(sft.Args(**{flags(save_every=0, batch_size=1)!r}))
""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = start(*torchrun, program, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


def test_advice_on_the_learning_rate_of_another_model(flags, capsys):
    sft.Args(**flags(learning_rate=sft.Args.learning_rate))
    assert "suits tiny/; models of billions take 1e-5" in capsys.readouterr().out
    sft.Args(**flags(learning_rate=1e-5)), sft.Args()
    assert capsys.readouterr().out == ""


def run_without_and_with_wandb(flags):
    sft.main(sft.Args(**flags | {"output_dir": "without"}))
    assert "wandb" not in sys.modules
    sft.main(sft.Args(**flags | {"output_dir": "with", "wandb": True}))
    assert "wandb" in sys.modules


def test_wandb_is_imported_only_on_request(flags, forked, tmp_path):
    code, told = forked(run_without_and_with_wandb, flags(save_every=0, max_steps=1))
    assert code == 0, told
    assert list((tmp_path / "with" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_step_that_is_not_finite_ends_the_run_before_its_update(train, monkeypatch, capsys, tmp_path):
    factors, sft_loss = iter([1, math.nan]), sft.sft_loss
    monkeypatch.setattr(sft, "sft_loss", lambda *x: sft_loss(*x) * next(factors))
    assert "step 2: loss nan" in error_of(train, capsys)
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]


def test_dtype_and_processes_decide_whether_a_model_is_sharded(flags):
    device = sft.setup_distributed()
    for dtype, frozen, sharded in (("float32", False, 0), ("bfloat16", False, 1), ("bfloat16", True, 0)):
        args = sft.Args(**flags(dtype=dtype))
        model = sft.load_model(args.model, args, device, frozen=frozen)
        assert isinstance(model, FSDPModule) == sharded and model.stored_dtype == torch.bfloat16
        assert model.dtype == (torch.bfloat16 if frozen else torch.float32)
        assert all(p.requires_grad != frozen for p in model.parameters())


def test_soft_capped_model_is_refused_by_name(flags, random_model, tmp_path, capsys):
    folder = tmp_path / "gemma2"
    shutil.copytree(random_model, folder)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    sizes |= {"vocab_size": 500, "intermediate_size": 64, "num_key_value_heads": 2}
    config = Gemma2Config(**sizes, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    line = error_of(lambda: sft.main(sft.Args(**flags(model=str(folder)))), capsys)
    assert re.search("gemma2: .*use --attn eager", line)
    sft.main(sft.Args(**flags(model=str(folder), attn="eager", output_dir=str(tmp_path / "eager"))))


def test_files_of_every_kind_hold_the_same_rows(tmp_path, one_cpu):
    rows = [{"prompt": "The sky is", "completion": " blue."}]
    rows += [{"prompt": "Be", "completion": " brief, déjà\u2028"}]
    kinds = ("jsonl", "json", "parquet", "csv", "jsonl.gz", "bom.jsonl")
    files = [tmp_path / f"same.{kind}" for kind in kinds]
    write_rows(files[0], rows)
    files[1].write_text(json.dumps(rows, indent=1), encoding="utf-8")
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(files[2])
    table.to_csv(files[3])
    with gzip.open(files[4], "wt", encoding="utf-8") as file:
        file.write(files[0].read_text(encoding="utf-8"))
    files[5].write_text(files[0].read_text(encoding="utf-8"), encoding="utf-8-sig")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "saved")
    for path in (*files, tmp_path / "saved"):
        assert list(sft.load_rows(str(path), "train", sft.Args())) == rows, path
        assert list(sft.load_rows(str(path), "train", sft.Args(), limit=1)) == rows[:1], path


def test_empty_cells_are_empty_texts_and_numbers_stay_whole(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\na,3\n,4\nb,\n")
    rows = list(sft.load_rows(str(tmp_path / "rows.csv"), "train", sft.Args()))
    assert [str(row["answer"]) for row in rows] == ["3", "4", ""] and rows[1]["question"] == ""


BROKEN = [("a.jsonl", b'{"text": "a"}\n{"text": \n'), ("a.json", b'[{"text": "a"}, ')]
BROKEN += [("a.parquet", b"PAR1"), ("a.jsonl", b""), ("a.jsonl", rb'{"text": "a", "\u0000": 1}')]


@pytest.mark.parametrize("name, content", BROKEN)
def test_broken_files_are_named(tmp_path, capsys, name, content, refused):
    (tmp_path / name).write_bytes(content)
    refused(rf"{name} (cannot be loaded|: hardly a row|: .*empty)", dataset=(str(tmp_path / name),))


def test_tiny_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sft.located("tiny/base") == str(ROOT / "tiny" / "base")
    assert sft.located("openai/gsm8k") == "openai/gsm8k"
    (tmp_path / "tiny" / "base").mkdir(parents=True)
    assert sft.located("tiny/base") == "tiny/base"  # one's own comes first


def test_curves_of_two_runs_are_laid_over_each_other(train, forked, figures):
    folder, _ = train()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    code, told = forked(run_command, ROOT / "benchmarks" / "curves.py", folder, folder)
    assert code == 0, told
