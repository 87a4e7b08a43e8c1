"""dapo.py: punishment of length, dynamic sampling, short runs; what is grpo.py's text is tested there."""

import json
import math
import random

import pytest
import torch
from conftest import ROOT
from helpers import assert_continues, calls_of, trainer, written
from safetensors.torch import load_file
from samples import float64

import dapo

pytestmark = pytest.mark.usefixtures("process_group")


def test_punishment_of_length_by_hand():
    # Eq. 13: 20 tokens at most, the last 5 of them the buffer; (15 - 18) / 5 = -0.6
    lengths = torch.tensor([1, 10, 15, 16, 18, 20, 25])
    punish = lambda buffer: dapo.overlong_punishment(lengths, 20, buffer).tolist()
    assert punish(5) == pytest.approx([0, 0, 0, -0.2, -0.6, -1, -1])
    assert punish(20) == pytest.approx([-0.05, -0.5, -0.75, -0.8, -0.9, -1, -1])
    assert punish(1) == [0, 0, 0, 0, 0, -1, -1]
    assert punish(0) == [0] * 7


def test_groups_with_a_signal_are_those_with_two_different_rewards():
    nan = math.nan
    groups = {(0, 1, 0, 0): True, (1, 1, 1, 1): False, (0.1,) * 4: False}  # of these the mean is not 0.1
    # what has no reward neither is nor makes a difference
    groups |= {(nan,) * 4: False, (nan, 1, 1, 1): False, (nan, 1, 0, 1): True, (-5, nan, nan, -6): True}
    assert dict(zip(groups, dapo.with_signal(float64(*groups)).tolist(), strict=True)) == groups


def test_groups_without_a_signal_are_those_that_have_no_advantage():
    rewards = torch.randint(0, 2, (200, 3), generator=torch.Generator().manual_seed(0)) * 0.7
    rewards[torch.rand(rewards.shape, generator=torch.Generator().manual_seed(1)) < 0.2] = math.nan
    nonzero = dapo.group_advantages(rewards).abs().amax(1) > 0
    assert torch.equal(nonzero, dapo.with_signal(rewards)) and 0 < nonzero.sum() < 200


@pytest.fixture
def train(tmp_path, one_cpu):
    """As `trainer` says: 2 steps of 4 prompts on tiny/sft."""
    flags = {"batch_size": 16, "num_generations": 4, "max_completion_length": 12, "max_steps": 2}
    return trainer(dapo, tmp_path, reward="rare", overlong_buffer=2, **flags)


@pytest.fixture
def scripted(monkeypatch):
    """scripted(groups, ...): rewards of groups in the order of sampling, None for no reward; see `written`.

    It gives two lists that the run fills: the prompts of each round, and the rewards that each step takes.
    """

    def script(groups, lengths=(1, 2, 3, 4), cut=()):
        asked, trained, group_advantages = [], [], dapo.group_advantages

        def roll_out(policy, tokenizer, prompts, group_size, *_):
            numbers = range(sum(asked), sum(asked) + len(prompts))
            asked.append(len(prompts))
            rewards = [reward for n in numbers for reward in groups[n % len(groups)]]
            answers = written(dapo, prompts, group_size, lengths[:group_size] * len(prompts), cut)
            texts = [str(math.nan if reward is None else reward) for reward in rewards]
            return [x._replace(text=text) for x, text in zip(answers, texts, strict=True)]

        def score(rewarders, rollout, *_):
            scores = [[float(completion.text) for completion in rollout]] * len(rewarders)
            return float64(*scores).reshape(len(rewarders), len(rollout))

        spy = lambda rewards, scale: trained.append(rewards.tolist()) or group_advantages(rewards, scale)
        monkeypatch.setattr(dapo, "roll_out", roll_out)
        monkeypatch.setattr(dapo, "score", score)
        monkeypatch.setattr(dapo, "group_advantages", spy)
        return asked, trained

    return script


SMALL = {"batch_size": 6, "num_generations": 2, "max_steps": 1, "overlong_buffer": 0}
NONE = [1, 1]  # without a signal


def test_rounds_are_sized_by_the_share_that_was_kept_and_the_surplus_is_trained_on_next(train, scripted):
    #                          round 1        | 2: 2 are missing, a third is kept | 3: 2, and 4 of 9
    asked, trained = scripted([[0, 1], NONE, NONE, [0, 2], NONE, [0, 3], [0, 4], NONE, NONE, *[[0, 5]] * 5])
    _, lines = train(**SMALL | {"max_steps": 2})
    assert asked == [3, 6, 5]
    assert trained == [[[0, 1], [0, 2], [0, 3]], [[0, 4], [0, 5], [0, 5]]]
    assert [line["sampling/kept_ratio"] for line in lines] == pytest.approx([4 / 9, 1])
    assert [line["frac_reward_zero_std"] for line in lines] == pytest.approx([5 / 9, 0])
    assert [line["epoch"] for line in lines] == [9 / 64, 14 / 64]
    # every group has 3 tokens, so that what is generated is to what is trained as prompts are
    assert [line["sampling/generated_per_trained"] for line in lines] == pytest.approx([9 / 3, 5 / 3])
    assert lines[0]["reward"] == pytest.approx((5 * 2 + 1 + 2 + 3 + 4) / 18)  # of all that were sampled


def test_rounds_are_few_and_little_is_thrown_away_where_a_third_of_the_groups_has_a_signal(train, scripted):
    rng = random.Random(0)
    groups = [[0, 1] if rng.random() < 0.3 else NONE for _ in range(5000)]
    asked, trained = scripted(groups)
    train(**SMALL | {"batch_size": 32, "max_steps": 15})
    assert len(asked) / 15 < 2.7 and all(len(step) == 16 for step in trained)
    assert sum(asked) < 15 * 16 / 0.3 * 1.25


def test_no_more_than_half_a_batch_is_carried_over(train, scripted):
    asked, trained = scripted([NONE] * 3 + [[0, n] for n in range(1, 40)])
    train(**SMALL | {"max_steps": 2})
    assert asked == [3, 30, 2]  # as if a tenth were kept; then all of the last twelve were
    assert trained[1] == [[0, 4], [0, 31], [0, 32]]


def test_sampling_of_a_step_is_bounded_and_the_step_says_so(train, scripted, capsys):
    asked, trained = scripted([[0, 1]] + [NONE] * 20)
    _, [line] = train(max_resamples=2, num_minibatches=3, **SMALL)
    assert asked == [3, 6] and trained == [[[0, 1]]]
    assert "step 1: 1 of 3 groups have a signal" in capsys.readouterr().out
    assert line["sampling/kept_ratio"] == pytest.approx(1 / 9) and line["grad_norm"] > 0


def test_no_resampling_keeps_every_group(train, scripted):
    asked, trained = scripted([[0, 1], NONE, [0, 0]])
    train(max_resamples=0, **SMALL | {"max_steps": 2})
    assert asked == [3, 3] and trained == [[[0, 1], NONE, [0, 0]]] * 2


def test_step_without_any_signal_learns_nothing(train, scripted, capsys):
    scripted([NONE])
    folder, [line] = train(max_resamples=1, **SMALL | {"overlong_buffer": 11})
    assert line["grad_norm"] == line["loss"] == line["sampling/kept_ratio"] == 0
    assert "step 1: 0 of 3 groups have a signal" in capsys.readouterr().out
    before = load_file(ROOT / "tiny" / "sft" / "model.safetensors")
    after = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_filter_looks_at_the_rewards_before_the_punishment_of_length(train, scripted):
    # 8 of at most 8, of which 2 are the buffer: 1 less. The last group ends with equal sums, and is kept.
    asked, trained = scripted([[1, 1], [0, 1], [0, 0], [0, 1]], lengths=(4, 8))
    flags = {"max_completion_length": 8, "overlong_buffer": 2, "batch_size": 4}
    _, [line] = train(**SMALL | flags)
    assert asked == [2, 2] and trained == [[[0, 0], [0, 0]]] and line["grad_norm"] == 0
    assert line["rewards/overlong_punishment/mean"] == pytest.approx(-1 / 2)


def test_groups_without_rewards_are_dropped(train, scripted):
    asked, trained = scripted([[None, None], [None, 1], *[[0, n] for n in range(1, 8)]])
    train(**SMALL)
    assert asked == [3, 6] and trained == [[[0, 1], [0, 2], [0, 3]]]


def test_what_is_carried_over_has_the_policy_that_sampled_it_as_its_old_one(train, monkeypatch):
    calls = calls_of(monkeypatch, dapo, "dapo_loss")
    monkeypatch.setattr(dapo, "with_signal", lambda rewards: torch.full((len(rewards),), len(rewards) != 4))
    flags = {"max_tokens_per_micro_batch": 4096, "learning_rate": 1e-3, "max_completion_length": 6}
    train(reward="residue", **flags)
    first, second = (ratio for (ratio, *_), _ in calls)  # a row a step; half of the second is carried over
    assert (first == 1).all() and (second - 1).abs().max() > 0.01
    assert len(second) / 4 < (second == 1).sum() < len(second) * 3 / 4


@pytest.mark.parametrize("masked", [False, True])
def test_cut_off_completions_are_in_the_loss_or_out_of_it_and_of_its_normaliser(train, scripted, masked):
    # advantages 0.75, -0.25, -0.25, -0.25 of 1, 8, 3, 4 tokens; the second is cut off
    scripted([[1, 0, 0, 0]], lengths=(1, 8, 3, 4), cut=(1,))
    flags = {"max_completion_length": 8, "overlong_buffer": 0, "scale_rewards": "none"}
    flags |= {"batch_size": 4, "max_steps": 1, "mask_truncated": masked}
    _, [line] = train(**flags)
    wanted = -(0.75 - 0.25 * 7) / 8 if masked else -(0.75 - 0.25 * 15) / 16
    assert line["loss"] == pytest.approx(wanted, abs=1e-6)
    assert line["sampling/generated_per_trained"] == pytest.approx(2 if masked else 1)
    assert line["completions/clipped_ratio"] == 0.25


def test_continued_run_equals_one_that_never_stopped_and_has_its_surplus(train, monkeypatch):
    saved, save_checkpoint = [], dapo.save_checkpoint
    spy = lambda *args: saved.append(json.loads(json.dumps(args[-1]))) or save_checkpoint(*args)
    monkeypatch.setattr(dapo, "save_checkpoint", spy)
    flags = {"max_steps": 4, "save_every": 2, "max_completion_length": 8, "learning_rate": 1e-3}
    assert_continues(train, **flags)
    # neither the position in the stream of prompts nor the surplus follows from the step
    assert saved[0]["surplus"] and saved[0]["cursor"] != 8 and saved[1] == saved[2]
