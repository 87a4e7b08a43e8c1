"""dapo.py: its loss, the punishment of long completions, dynamic sampling, short runs and errors.

Values are worked by hand from the paper. Advantages, token weights, the sampler and what else is a copy of
grpo.py's are tested with grpo.py.
"""

import functools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import dapo

END = 2  # <|im_end|> of tiny's tokenizer
CLOCK = {"tokens_per_second", "step_time", *(f"time/{x}" for x in ("rollout", "logprobs", "update"))}


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


# Loss and punishment ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (0.5, 2, -1.0, -1.0),
        (0.79, -2, 1.6, 0.0),
        (0.81, -2, 1.62, 1.62),
        (1.0, 2, -2.0, -2.0),
        (1.0, -2, 2.0, 2.0),
        # higher than PPO's 1.2, and not above 1.28
        (1.27, 2, -2.54, -2.54),
        (1.29, 2, -2.56, 0.0),
        (1.5, -2, 3.0, 3.0),
    ],
)
def test_clip_is_higher_above_than_below(ratio, advantage, loss, slope):
    args = dapo.Args()
    logprobs = float64(-1.3).requires_grad_()
    old, advantages = logprobs.detach() - math.log(ratio), float64(advantage)
    clip = {"epsilon": args.epsilon, "epsilon_high": args.epsilon_high}  # the paper's 0.2 and 0.28
    found = dapo.dapo_loss(logprobs, old, advantages, **clip)
    assert found.item() == pytest.approx(loss)
    assert torch.autograd.grad(found.sum(), logprobs)[0].item() == pytest.approx(slope)


def test_loss_at_ratio_1_has_the_gradient_of_the_weighted_log_probs():
    logprobs = float64(-0.5, -3.0, -0.01).requires_grad_()
    advantages = float64(1.5, -0.5, 0.0)
    losses = dapo.dapo_loss(logprobs, logprobs.detach(), advantages, epsilon=0.2, epsilon_high=0.28)
    assert losses.tolist() == [-1.5, 0.5, 0]
    assert torch.autograd.grad(losses.sum(), logprobs)[0].tolist() == [-1.5, 0.5, 0]


def test_punishment_of_length_by_hand():
    # Eq. 13: 20 tokens at most, the last 5 of them the buffer; (15 - 18) / 5 = -0.6
    lengths = torch.tensor([1, 10, 15, 16, 18, 20, 25])
    punish = lambda buffer: dapo.overlong_punishment(
        lengths, max_completion_length=20, overlong_buffer=buffer
    )
    assert punish(5).tolist() == pytest.approx([0, 0, 0, -0.2, -0.6, -1, -1])
    assert punish(20).tolist() == pytest.approx([-0.05, -0.5, -0.75, -0.8, -0.9, -1, -1])
    assert punish(1).tolist() == [0, 0, 0, 0, 0, -1, -1]
    assert punish(0).tolist() == [0] * 7


def test_groups_with_a_signal_are_those_with_two_different_rewards():
    nan = math.nan
    groups = {
        (0, 1, 0, 0): True,
        (1, 1, 1, 1): False,
        (0, 0, 0, 0): False,
        # whose mean is not 0.1
        (0.1, 0.1, 0.1, 0.1): False,
        (-1 / 3, -1 / 3, -1 / 3, -1 / 3): False,
        (0.1, 0.1, 0.1, 0.2): True,
        # what has no reward neither is nor makes a difference
        (nan, nan, nan, nan): False,
        (nan, 1, 1, 1): False,
        (nan, nan, nan, 1): False,
        (nan, 1, 0, 1): True,
        (-5, nan, nan, -6): True,
    }
    for dtype in (torch.float32, torch.float64):
        found = dapo.with_signal(torch.tensor(list(groups), dtype=dtype)).tolist()
        assert dict(zip(groups, found, strict=True)) == groups


def test_groups_without_a_signal_are_those_that_have_no_advantage():
    rewards = torch.randint(0, 2, (200, 3), generator=torch.Generator().manual_seed(0)) * 0.7
    rewards[torch.rand(rewards.shape, generator=torch.Generator().manual_seed(1)) < 0.2] = math.nan
    nonzero = dapo.group_advantages(rewards).abs().amax(1) > 0
    assert torch.equal(nonzero, dapo.with_signal(rewards)) and 0 < nonzero.sum() < 200


# Dynamic sampling -------------------------------------------------------------------------------------------


@functools.cache
def tiny_rows():
    path = ROOT / "tiny" / "data" / "prompts_train.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[:64]]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


REWARDS = """
def rare(completion_ids, **columns):
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def residue(completion_ids, **columns):
    return [sum(ids) % 7 / 3 for ids in completion_ids]


def nothing(completions, **columns):
    return [None] * len(completions)


def solved(completions, answer, **columns):
    last = lambda text: text.split("####")[-1].strip().replace(",", "")
    texts = [c[0]["content"] for c in completions]
    return [float("####" in text and last(text) == last(a)) for text, a in zip(texts, answer)]
"""


@pytest.fixture
def rewards(tmp_path):
    """rewards("a", "b"): the flag --reward for functions of a file."""
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS)
    return lambda *names: tuple(f"{path}:{name}" for name in names)


@pytest.fixture
def train(tmp_path, rewards, one_cpu):
    """train(rows, **flags) -> output folder, lines of metrics.jsonl; 2 steps of 4 prompts on tiny/sft."""

    def run(rows=None, **flags):
        folder = tmp_path / f"run_{run.count}"
        run.count += 1
        path = write_rows(tmp_path / f"prompts_{run.count}.jsonl", rows or tiny_rows())
        defaults = {"dataset": (path,), "output_dir": str(folder), "reward": rewards("rare")}
        defaults |= {"batch_size": 16, "num_generations": 4, "max_completion_length": 12, "max_steps": 2}
        defaults |= {"overlong_buffer": 2, "eval_every": 0, "save_every": 0, "warmup_steps": 0}
        run.result = dapo.main(dapo.Args(**(defaults | flags)))
        folder = Path((defaults | flags)["output_dir"])
        lines = read_lines(folder / "metrics.jsonl")
        return folder, [line for line in lines if len(line) > 1]  # without step 0 where nothing was evaluated

    run.count = 0
    return run


@pytest.fixture
def scripted(monkeypatch):
    """Completions of the lengths and rewards that stand in each prompt's row -> lists of the rows asked."""
    asked = []

    def roll_out(policy, tokenizer, prompts, args, device, *, seed):
        found = []
        asked.append([prompt.row["id"] for prompt in prompts[:: args.num_generations]])
        for n, prompt in enumerate(prompts):
            i, row = n % args.num_generations, prompt.row
            ended = row["ended"][i] if "ended" in row else True
            ids = [*range(10, 9 + row["lengths"][i]), END if ended else 9]
            found.append(dapo.Completion(prompt, ids, np.zeros(len(ids), np.float32), "", ended))
        return found

    def score(functions, judges, rollout, args, device):
        values = [c.prompt.row["scores"][n % args.num_generations] for n, c in enumerate(rollout)]
        line = [math.nan if value is None else value for value in values]
        return float64(*[line] * len(functions)) if functions else torch.zeros(0, len(rollout))

    monkeypatch.setattr(dapo, "roll_out", roll_out)
    monkeypatch.setattr(dapo, "score", score)
    return asked


def rows_of(*groups, **columns):
    """Rows whose completions get these rewards; the lengths are 1, 2, 3 ... unless given."""
    lengths = [list(range(1, 1 + len(group))) for group in groups]
    rows = [{"prompt": "1 + 1 =", "id": n, "scores": group} for n, group in enumerate(groups)]
    return [row | {"lengths": x} | columns for row, x in zip(rows, lengths, strict=True)]


SMALL = {"batch_size": 6, "num_generations": 2, "order": "given", "max_steps": 1, "save_rollouts": True}
GROUPS = ([0, 1], [1, 1], [0, 0], [1, 0], [2, 2], [3, 0], [0, 1], [0, 1], [0, 1], [5, 5])


def trained_rows(folder, step=1):
    return [row["row"]["id"] for row in read_lines(folder / "rollouts.jsonl") if row["step"] == step]


def test_dropped_groups_are_replaced_by_the_next_prompts_until_the_batch_is_full(train, scripted, capsys):
    folder, lines = train(rows_of(*GROUPS), **SMALL | {"max_steps": 3})
    # of 0, 1, 2 one has a signal; of 3, 4 one; 5 has; then 6, 7, 8; then 9 and on to the next epoch
    assert scripted == [[0, 1, 2], [3, 4], [5], [6, 7, 8], [9, 0, 1], [2, 3], [4], [5]]
    assert trained_rows(folder) == [0, 0, 3, 3, 5, 5] and trained_rows(folder, 2) == [6, 6, 7, 7, 8, 8]
    assert trained_rows(folder, 3) == [0, 0, 3, 3, 5, 5]
    assert [line["sampling/kept_ratio"] for line in lines] == pytest.approx([1 / 2, 1, 3 / 7])
    assert [line["sampling/num_prompts"] for line in lines] == [6, 9, 16]
    assert [line["epoch"] for line in lines] == pytest.approx([0.6, 0.9, 1.6])
    # every group has 3 tokens, so that what is generated is to what is trained as prompts are
    assert [line["sampling/generated_per_trained"] for line in lines] == pytest.approx([2, 1, 7 / 3])
    # of all that were sampled, not of those that were kept
    assert lines[0]["reward"] == pytest.approx((1 + 2 + 0 + 1 + 4 + 3) / 12)
    assert lines[0]["frac_reward_zero_std"] == pytest.approx(1 / 2)
    assert "have a signal after" not in capsys.readouterr().out


def test_generated_per_trained_counts_tokens(train, scripted):
    rows = rows_of([0, 1], [1, 1], [0, 1], [1, 0], [1, 0])
    for row, lengths in zip(rows, ([1, 2], [6, 5], [2, 2], [4, 1], [9, 9]), strict=True):
        row["lengths"] = lengths
    _, [line] = train(rows, **SMALL)
    assert scripted == [[0, 1, 2], [3]]
    assert line["sampling/generated_per_trained"] == pytest.approx(23 / 12)
    assert line["completions/mean_length"] == pytest.approx(23 / 8)


def test_rounds_of_sampling_are_bounded_and_the_step_says_so(train, scripted, capsys):
    rows = rows_of([0, 1], *[[1, 1]] * 20)
    folder, [line] = train(rows, max_resamples=2, **SMALL)
    assert scripted == [[0, 1, 2], [3, 4], [5, 6]] and trained_rows(folder) == [0, 0]
    assert "step 1: 1 of 3 groups have a signal after 3 rounds of sampling" in capsys.readouterr().out
    assert line["sampling/kept_ratio"] == pytest.approx(1 / 7) and line["sampling/num_prompts"] == 7
    assert line["grad_norm"] > 0


def test_no_resampling_keeps_every_group(train, scripted):
    folder, [line] = train(rows_of(*GROUPS), max_resamples=0, **SMALL)
    assert scripted == [[0, 1, 2]] and trained_rows(folder) == [0, 0, 1, 1, 2, 2]
    assert line["sampling/kept_ratio"] == 1 and line["sampling/generated_per_trained"] == 1


def test_fewer_groups_than_minibatches_train_on_what_there_is(train, scripted):
    _, [line] = train(rows_of([0, 1], *[[1, 1]] * 9), max_resamples=1, num_minibatches=3, **SMALL)
    assert line["sampling/kept_ratio"] == pytest.approx(1 / 5) and line["grad_norm"] > 0
    assert all(math.isfinite(value) for value in line.values())


def test_filter_looks_at_the_rewards_before_the_punishment_of_length(train, scripted):
    rows = rows_of([1, 1], [1, 0], [0, 0], [0.5, 1])
    for row in rows:
        row["lengths"] = [4, 8]
    # 8 of at most 8, of which 2 are the buffer: 1 less. The last group ends with equal sums, and is kept.
    rows[3]["lengths"] = [1, 7]
    flags = {"max_completion_length": 8, "overlong_buffer": 2, "scale_rewards": "none"}
    folder, [line] = train(rows, **SMALL | {"batch_size": 4} | flags)
    assert scripted == [[0, 1], [2], [3]] and trained_rows(folder) == [1, 1, 3, 3]
    found = [row["reward"] for row in read_lines(folder / "rollouts.jsonl")]
    assert found == pytest.approx([1, -1, 0.5, 0.5])
    # the punishment makes advantages of 1 and -1; -(4 - 8) / 20 tokens
    assert line["loss"] == pytest.approx(4 / 20, abs=1e-6)
    assert line["rewards/overlong_punishment/mean"] == pytest.approx(-1.5 / 4)


def test_groups_without_rewards_are_dropped(train, scripted):
    rows = rows_of([None, None], [None, 1], [0, 1], [0, 1], [0, 2])
    folder, _ = train(rows, **SMALL)
    assert scripted == [[0, 1, 2], [3, 4]] and trained_rows(folder) == [2, 2, 3, 3, 4, 4]


def test_step_without_any_signal_learns_nothing(train, scripted):
    folder, [line] = train(rows_of(*[[1, 1]] * 9), max_resamples=1, **SMALL)
    assert line["grad_norm"] == 0 and line["loss"] == 0 and len(scripted) == 2
    before = load_file(ROOT / "tiny" / "sft" / "model.safetensors")
    after = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_step_without_any_signal_learns_no_length(train, scripted):
    rows = rows_of(*[[1, 1]] * 9, lengths=[2, 12])
    _, [line] = train(rows, max_resamples=1, **SMALL)
    assert line["grad_norm"] == 0


def test_step_without_any_signal_says_so(train, scripted, capsys):
    _, [line] = train(rows_of(*[[1, 1]] * 9), max_resamples=1, **SMALL)
    assert "step 1: 0 of 3 groups have a signal after 2 rounds of sampling" in capsys.readouterr().out
    assert line["sampling/kept_ratio"] == 0


# Loss of a step ---------------------------------------------------------------------------------------------

ENDED = [True, False, True, True]


@pytest.mark.parametrize("filtering", [False, True])
def test_completions_that_are_cut_off_are_in_the_loss_or_out_of_it_and_of_its_normaliser(
    train, scripted, filtering
):
    # advantages 0.75, -0.25, -0.25, -0.25 of 1, 8, 3, 4 tokens; the second is cut off
    rows = rows_of([1, 0, 0, 0], lengths=[1, 8, 3, 4], ended=ENDED)
    flags = {"max_completion_length": 8, "overlong_buffer": 0, "scale_rewards": "none"}
    flags |= {"batch_size": 4, "max_steps": 1, "overlong_filtering": filtering}
    _, [line] = train(rows, **flags)
    wanted = -(0.75 - 0.25 * 7) / 8 if filtering else -(0.75 - 0.25 * 15) / 16
    assert line["loss"] == pytest.approx(wanted, abs=1e-6)
    assert line["sampling/generated_per_trained"] == pytest.approx(2 if filtering else 1)
    assert line["completions/clipped_ratio"] == 0.25
    _, [line] = train(rows, loss_agg="seq_mean_token_mean", **flags)
    assert line["loss"] == pytest.approx(-0.25 / 3 if filtering else 0, abs=1e-6)


def test_batch_of_nothing_but_completions_that_are_cut_off_has_no_gradient(train, scripted):
    rows = rows_of([1, 0, 0, 0], lengths=[8] * 4, ended=[False] * 4)
    flags = {"max_completion_length": 8, "batch_size": 4, "max_steps": 1, "overlong_filtering": True}
    _, [line] = train(rows, **flags)
    assert line["grad_norm"] == 0 and line["loss"] == 0
    assert all(math.isfinite(value) for value in line.values())


def test_every_token_of_the_batch_counts_the_same(train, scripted):
    # 1 and -1 of 1 and 5 tokens, 0.5 and -0.5 of 2 and 4: -(1 - 5 + 1 - 2) / 12
    rows = rows_of([2, 0], [1, 0])
    rows[0]["lengths"], rows[1]["lengths"] = [1, 5], [2, 4]
    flags = {"num_generations": 2, "batch_size": 4, "max_steps": 1, "scale_rewards": "none"}
    for tokens in (8, 2048):
        _, [line] = train(rows, max_tokens_per_micro_batch=tokens, overlong_buffer=0, **flags)
        assert line["loss"] == pytest.approx(5 / 12, abs=1e-6)


# Short runs -------------------------------------------------------------------------------------------------


def assert_same_metrics(one, other, rel=1e-5, abs_=1e-6, without=()):
    assert len(one) == len(other)
    for line, wanted in zip(one, other, strict=True):
        assert line.keys() == wanted.keys()
        for key in wanted.keys() - CLOCK - {"packing/fill"} - set(without):
            assert line[key] == pytest.approx(wanted[key], rel=rel, abs=abs_), (key, wanted["step"])


@pytest.fixture
def ratios(monkeypatch):
    """The ratios of every row of a run, in order."""
    found, clip_shares = [], dapo.clip_shares
    spy = lambda ratio, *rest: found.append(ratio) or clip_shares(ratio, *rest)
    monkeypatch.setattr(dapo, "clip_shares", spy)
    return found


def test_first_pass_has_ratios_of_exactly_1_and_a_gradient(train, ratios):
    flags = {"loss_agg": "seq_mean_token_mean"}  # under which advantages cancel
    _, lines = train(max_tokens_per_micro_batch=256, **flags)
    assert len(ratios) >= 4 and all((ratio == 1).all() for ratio in ratios)
    for line in lines:
        assert abs(line["loss"]) < 1e-6 and line["grad_norm"] > 0.1
        assert line["clip_ratio/low_mean"] == line["clip_ratio/high_mean"] == 0
        assert line["sampling/logp_difference_mean"] < 1e-4
    assert lines[0]["kl"] == 0 and lines[1]["kl"] > 1e-5


def test_second_pass_over_a_rollout_has_other_ratios(train, ratios):
    _, [line] = train(num_iterations=2, max_steps=1, epsilon=1e-3, epsilon_high=1e-3)
    first, second = torch.cat(ratios[: len(ratios) // 2]), torch.cat(ratios[len(ratios) // 2 :])
    assert (first - 1).abs().max() < 1e-4 and (second - 1).abs().max() > 0.01
    assert line["clip_ratio/low_mean"] > 0 and line["clip_ratio/high_mean"] > 0


@pytest.mark.parametrize("flags", [{}, {"num_iterations": 2, "overlong_filtering": True, "max_resamples": 1}])
def test_memory_flags_change_nothing(train, flags):
    _, wanted = train(**flags)
    _, found = train(max_tokens_per_micro_batch=128, generation_batch_size=3, **flags)
    assert_same_metrics(found[:1], wanted[:1])
    assert_same_metrics(found[1:], wanted[1:], rel=1e-3, abs_=1e-5)  # after steps of Adam
    assert wanted[1]["grad_norm"] > 0.1 and wanted[0]["sampling/kept_ratio"] < 1


def test_continued_run_equals_one_that_never_stopped(train):
    flags = {"max_steps": 4, "save_every": 2, "max_completion_length": 8}
    folder, wanted = train(**flags)
    copy = folder.with_name("continued")
    shutil.copytree(folder, copy)
    # As if it had been stopped in its fourth step
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "checkpoints" / "step_00000004")
    _, found = train(output_dir=str(copy), resume=True, **flags)
    assert_same_metrics(found, wanted, rel=0, abs_=0)
    one, other = (load_file(x / "model" / "model.safetensors") for x in (folder, copy))
    assert all(torch.equal(one[name], other[name]) for name in one)
    # the position in the stream of prompts does not follow from the step
    assert wanted[1]["sampling/num_prompts"] > 8 and len(wanted) == 4


def test_continued_run_goes_on_with_the_next_prompt(train, scripted):
    flags = SMALL | {"max_steps": 2, "save_every": 1}
    folder, wanted = train(rows_of(*GROUPS), **flags)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "step_00000002")
    asked = list(scripted)
    scripted.clear()
    _, found = train(rows_of(*GROUPS), output_dir=str(folder), resume=True, **flags)
    assert scripted == [[6, 7, 8]] == asked[3:]
    assert_same_metrics(found, wanted, rel=0, abs_=0)


def test_replayed_rollouts_train_as_they_did(train):
    folder, [wanted] = train(save_rollouts=True, max_steps=1)
    _, [found] = train(replay_rollouts=str(folder / "rollouts.jsonl"), max_steps=1)
    for key in ("loss", "grad_norm", "kl", "entropy", "rewards/overlong_punishment/mean", "num_tokens"):
        assert found[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-7), key
    assert found["sampling/kept_ratio"] == 1 and wanted["grad_norm"] > 0.1


def test_rollouts_of_a_step_that_was_not_full_can_be_replayed(train, scripted):
    rows = rows_of([0, 1], *[[1, 1]] * 9)
    folder, [wanted] = train(rows, max_resamples=1, **SMALL)
    _, [found] = train(rows, replay_rollouts=str(folder / "rollouts.jsonl"), max_resamples=1, **SMALL)
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"])


def test_rewards_of_none_get_no_gradient(train, rewards):
    _, lines = train(reward=rewards("nothing"), max_resamples=1, overlong_buffer=0, max_completion_length=4)
    assert all(line["grad_norm"] == 0 for line in lines)


# Errors and real data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, flags",
    [
        (r"--overlong-buffer 9 is not within --max-completion-length", {"max_completion_length": 8}),
        (r"--overlong-buffer -1 is not within", {"overlong_buffer": -1}),
        (r"--num-generations 1: a group needs at least 2", {"num_generations": 1}),
        (r"--batch-size 10 is no multiple of --num-generations 4", {"batch_size": 10, "num_generations": 4}),
        (r"--num-minibatches 3: more than the prompts", {"batch_size": 16, "num_minibatches": 3}),
        (r"--temperature must be above 0", {"temperature": 0.0}),
        (r"--top-p must be 1", {"top_p": 0.9}),
        (r"--reward-weights has 2 numbers for 1 rewards", {"reward_weights": (1.0, 2.0)}),
        (r"nowhere\.jsonl: no such file", {"dataset": ("nowhere.jsonl",)}),
        (r"nowhere\.py:f: not file\.py:function", {"reward": ("nowhere.py:f",)}),
    ],
)
def test_mistakes_end_the_run_with_one_line_before_a_model_is_loaded(
    monkeypatch, capsys, tmp_path, rewards, pattern, flags
):
    monkeypatch.setattr(dapo, "load_model", lambda *_: pytest.fail("a model was loaded"))
    defaults = {"dataset": (write_rows(tmp_path / "rows.jsonl", tiny_rows()[:4]),), "overlong_buffer": 9}
    defaults |= {"output_dir": str(tmp_path / "run"), "reward": rewards("rare")}
    with pytest.raises(SystemExit) as stop:
        dapo.main(dapo.Args(**(defaults | flags)))
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and re.search(pattern, line), line
    assert not (tmp_path / "run").exists()


def test_gsm8k_prompts_train_a_random_model(gsm8k, train, rewards, random_model):
    rows = read_lines(gsm8k / "train.jsonl")[:8]
    flags = {"model": str(random_model), "batch_size": 8, "max_completion_length": 6, "max_resamples": 1}
    _, lines = train(rows, reward=rewards("solved", "residue"), max_prompt_length=1024, **flags)
    assert len(lines) == 2 and all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[1]["grad_norm"] > 0 and lines[1]["sampling/logp_difference_mean"] < 1e-4
    assert lines[0]["rewards/solved/mean"] == 0 and lines[0]["num_tokens"] > 8 * 50
