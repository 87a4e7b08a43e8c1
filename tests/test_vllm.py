"""--rollout vllm, in a virtual environment that is made for it when --vllm is given.

Its log-probs are held against `token_logprobs` at every step, under a learning rate that moves all weights by
much in between: a push that came late, or left a tied head out, would show.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_lines
from helpers import tiny_tokenizer
from transformers import AutoModelForCausalLM

import grpo

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def environment():
    """The virtual environment of requirements-vllm.txt, made once, beside other caches."""
    folder = Path.home() / ".cache" / "cleanpost" / "vllm-0.32.0"
    if not (folder / "made").exists():
        subprocess.run(["python3", "-m", "venv", "--clear", folder], check=True)
        install = [folder / "bin" / "pip", "install", "-r", ROOT / "tests" / "requirements-vllm.txt"]
        subprocess.run(install, check=True)
        remove = [folder / "bin" / "pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"]
        subprocess.run(remove, check=True)
        (folder / "made").touch()
    return folder / "bin"


@pytest.fixture
def run(environment, tmp_path):
    """run(script, *flags, processes=1): the lines of metrics.jsonl behind step 0 of three steps."""

    def started(script, *flags, processes=1):
        folder = tmp_path / f"run_{len([*tmp_path.iterdir()])}"
        command = [environment / "torchrun", "--standalone", "--nproc-per-node", str(processes)]
        command = command if processes > 1 else [environment / "python"]
        command += [ROOT / f"{script}.py", "--rollout", "vllm", "--output-dir", folder, *flags]
        command += "--max-steps 3 --eval-every 0 --num-eval 4 --log-every 1 --learning-rate 1e-2".split()
        command += ["--batch-size", "32"]
        flags = {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}  # vLLM compiles for minutes otherwise
        subprocess.run(command, check=True, env=os.environ | flags, cwd=tmp_path)
        return read_lines(folder / "metrics.jsonl")[1:]

    return started


@pytest.fixture
def untied(tmp_path):
    """tiny/sft with a head of its own."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "sft", dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "untied")
    tiny_tokenizer().save_pretrained(tmp_path / "untied")
    return str(tmp_path / "untied")


@pytest.mark.parametrize("kind", ["tied", "untied", "lora"])
def test_log_probs_are_those_of_the_policy_at_every_step(run, untied, kind):
    flags = {"tied": (), "untied": ("--model", untied), "lora": ("--lora-rank", "8")}
    lines = run("grpo", *flags[kind])
    assert len(lines) == 3 and lines[-1]["kl"] > 1e-3  # by then the policy is another
    assert [line for line in lines if line["sampling/logp_difference_mean"] > 1e-4] == []


def test_two_processes_are_one(run):
    one, two = run("grpo"), run("grpo", processes=2)
    for line, other in zip(one, two, strict=True):
        assert line["reward"] == other["reward"]
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("script", ["dapo", "rloo_remax", "ppo_rlhf"])
def test_other_scripts_sample_with_it(run, script):
    lines = run(script)
    found = [line.get("sampling/logp_difference_mean", 0.0) for line in lines]
    assert len(lines) == 3 and max(found) < 1e-4


def test_on_policy_distillation_samples_with_it(run):
    assert len(run("distill", "--mode", "on_policy")) == 3


def test_vllm_that_is_not_there_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        grpo.main(grpo.Args(rollout="vllm", output_dir=str(tmp_path / "run")))
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "see tests/requirements-vllm.txt" in line
