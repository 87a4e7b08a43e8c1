"""dapo.py: its loss, the punishment of long completions, dynamic sampling, short runs.

Values are worked by hand from the paper. Advantages, token weights, sampling and what else is the same
text in grpo.py are tested with grpo.py.
"""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_lines
from safetensors.torch import load_file

import dapo

END = 2  # <|im_end|> of tiny's tokenizer


@pytest.fixture(autouse=True, scope="module")
def process_group():
    dapo.setup_distributed()


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
    args = dapo.Args()  # the paper's 0.2 and 0.28
    logprobs = float64(-1.3).requires_grad_()
    ratios = torch.exp(logprobs - logprobs.detach() + math.log(ratio))
    found = dapo.dapo_loss(ratios, float64(advantage), args.epsilon, args.epsilon_high)
    assert found.item() == pytest.approx(loss)
    assert torch.autograd.grad(found.sum(), logprobs)[0].item() == pytest.approx(slope)


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
    groups = {
        (0, 1, 0, 0): True,
        (1, 1, 1, 1): False,
        # whose mean is not 0.1
        (0.1, 0.1, 0.1, 0.1): False,
        # what has no reward neither is nor makes a difference
        (nan, nan, nan, nan): False,
        (nan, 1, 1, 1): False,
        (nan, 1, 0, 1): True,
        (-5, nan, nan, -6): True,
    }
    assert dict(zip(groups, dapo.with_signal(float64(*groups)).tolist(), strict=True)) == groups


def test_groups_without_a_signal_are_those_that_have_no_advantage():
    rewards = torch.randint(0, 2, (200, 3), generator=torch.Generator().manual_seed(0)) * 0.7
    rewards[torch.rand(rewards.shape, generator=torch.Generator().manual_seed(1)) < 0.2] = math.nan
    nonzero = dapo.group_advantages(rewards).abs().amax(1) > 0
    assert torch.equal(nonzero, dapo.with_signal(rewards)) and 0 < nonzero.sum() < 200


# Dynamic sampling -------------------------------------------------------------------------------------------

REWARDS = """
def rare(completion_ids, **columns):
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def residue(completion_ids, **columns):
    return [sum(ids) % 7 / 3 for ids in completion_ids]


def nothing(completions, **columns):
    return [None] * len(completions)
"""


def trainer(script, tmp_path, **defaults):
    """train(rows, **flags) -> output folder, lines of metrics.jsonl; 2 steps of 4 prompts on tiny/sft.

    `reward` is the name of a function in REWARDS.
    """
    (tmp_path / "rewards.py").write_text(REWARDS)
    defaults |= {"batch_size": 16, "num_generations": 4, "max_completion_length": 12, "max_steps": 2}
    defaults |= {"eval_every": 0, "save_every": 0, "warmup_steps": 0, "log_every": 1}

    def train(rows=None, **flags):
        number = len([*tmp_path.glob("*.jsonl")])
        folder, path = tmp_path / f"run_{number}", tmp_path / f"prompts_{number}.jsonl"
        rows = rows or read_lines(ROOT / "tiny" / "data" / "prompts_train.jsonl")[:64]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        flags = defaults | {"dataset": (str(path),), "output_dir": str(folder)} | flags
        flags["reward"] = (f"{tmp_path / 'rewards.py'}:{flags['reward']}",)
        script.main(script.Args(**flags))
        lines = read_lines(Path(flags["output_dir"]) / "metrics.jsonl")
        return folder, [line for line in lines if len(line) > 1]  # without step 0 where nothing was evaluated

    return train


@pytest.fixture
def train(tmp_path, one_cpu):
    return trainer(dapo, tmp_path, reward="rare", overlong_buffer=2)


def assert_continues(train, **flags):
    """A run that goes on from its checkpoint before the last equals one that never stopped."""
    folder, wanted = train(**flags)
    copy, dataset = folder.with_name("continued"), json.loads((folder / "args.json").read_text())["dataset"]
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "model")
    shutil.rmtree(max((copy / "checkpoints").iterdir()))
    _, found = train(output_dir=str(copy), resume=True, dataset=tuple(dataset), **flags)
    assert_same_metrics(found, wanted, 0, 0)
    one, other = (load_file(x / "model" / "model.safetensors") for x in (folder, copy))
    assert all(torch.equal(one[name], other[name]) for name in one)


def assert_same_metrics(one, other, rel=1e-5, abs_=1e-6):
    for line, wanted in zip(one, other, strict=True):
        assert line.keys() == wanted.keys()
        for key in wanted.keys() - {"tokens_per_second", "step_time"}:
            assert line[key] == pytest.approx(wanted[key], rel=rel, abs=abs_), (key, wanted["step"])


@pytest.fixture
def scripted(monkeypatch):
    """scripted(groups): rewards of the groups in the order in which they are sampled, None for no reward.

    Returns how many prompts each round asks for, and the rewards of the groups that each step trains on, in
    lists that the run fills. `lengths` are those of a group's completions; those in `cut` do not end.
    """

    def script(groups, lengths=(1, 2, 3, 4), cut=()):
        asked, trained, group_advantages = [], [], dapo.group_advantages

        def roll_out(policy, tokenizer, prompts, group_size, *_):
            first, found = sum(asked), []
            for n, prompt in enumerate(prompts, first):
                for i, reward in enumerate(groups[n % len(groups)]):
                    ids = [*range(10, 9 + lengths[i]), 9 if i in cut else END]
                    logprobs, text = (
                        torch.full((len(ids),), -1.0),
                        str(math.nan if reward is None else reward),
                    )
                    found.append(dapo.Completion(prompt, ids, logprobs, text, i not in cut))
            asked.append(len(prompts))
            return found

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


def test_rewards_of_none_end_the_run_after_the_first_rollout(train, capsys, monkeypatch):
    rollouts, roll_out = [], dapo.roll_out
    monkeypatch.setattr(dapo, "roll_out", lambda *args: rollouts.append(roll_out(*args)) or rollouts[-1])
    with pytest.raises(SystemExit) as stop:
        train(reward="nothing", max_completion_length=4)
    assert stop.value.code == 2 and len(rollouts) == 1
    assert "nothing: None for every completion of the first rollout" in capsys.readouterr().err


def test_what_is_carried_over_has_the_policy_that_sampled_it_as_its_old_one(train, monkeypatch):
    ratios, dapo_loss = [], dapo.dapo_loss
    spy = lambda ratio, *rest: ratios.append(ratio.detach()) or dapo_loss(ratio, *rest)
    monkeypatch.setattr(dapo, "dapo_loss", spy)
    monkeypatch.setattr(dapo, "with_signal", lambda rewards: torch.full((len(rewards),), len(rewards) != 4))
    flags = {"max_tokens_per_micro_batch": 4096, "learning_rate": 1e-3, "max_completion_length": 6}
    train(reward="residue", **flags)
    first, second = ratios  # a row a step; half of the second is carried over
    assert (first == 1).all() and (second - 1).abs().max() > 0.01
    assert len(second) / 4 < (second == 1).sum() < len(second) * 3 / 4


# Loss of a step ---------------------------------------------------------------------------------------------


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


MASKED = {"num_iterations": 2, "mask_truncated": True, "max_resamples": 1, "max_completion_length": 24}


@pytest.mark.parametrize("flags", [{}, MASKED])
def test_memory_flags_change_nothing(train, flags):
    _, wanted = train(**flags)
    _, found = train(max_tokens_per_micro_batch=64, max_tokens_per_rollout=200, **flags)
    assert_same_metrics(found[:1], wanted[:1])
    assert_same_metrics(found[1:], wanted[1:], 1e-3, 1e-5)  # after steps of Adam
    assert wanted[1]["grad_norm"] > 0.1 and wanted[0]["sampling/kept_ratio"] < 1


def test_continued_run_equals_one_that_never_stopped_and_has_its_surplus(train, monkeypatch):
    saved, save_checkpoint = [], dapo.save_checkpoint
    spy = lambda *args: saved.append(json.loads(json.dumps(args[-1]))) or save_checkpoint(*args)
    monkeypatch.setattr(dapo, "save_checkpoint", spy)
    flags = {"max_steps": 4, "save_every": 2, "max_completion_length": 8, "learning_rate": 1e-3}
    assert_continues(train, **flags)
    # neither the position in the stream of prompts nor the surplus follows from the step
    assert saved[0]["surplus"] and saved[0]["cursor"] != 8 and saved[1] == saved[2]
