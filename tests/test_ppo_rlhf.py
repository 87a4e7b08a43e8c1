"""ppo_rlhf.py: advantages, losses, shaping, a step by hand, models, memory, short runs and errors.

Gradients are held against those of the expected reward over every sequence of a small vocabulary (see
test_grpo.py), a whole step against stock models, values against numbers worked by hand. Most runs replay
written completions, so that lengths, ends and scores are known.
"""

import gc
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_grpo import (
    Table,
    assert_same_metrics,
    distance,
    float64,
    read_lines,
    stock,
    stock_reward,
    tiny_rows,
    tiny_tokenizer,
    true_gradient,
    write_rows,
)
from test_rloo_remax import regularised_gradient
from test_smoke import state
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForSequenceClassification

import common
import ppo_rlhf as ppo
import rloo_remax as rr

CPU, END = torch.device("cpu"), 2  # <|im_end|> of tiny's tokenizer
JUDGE = str(ROOT / "tiny" / "reward")


# Advantages -------------------------------------------------------------------------------------------------

LENGTHS = (3, 1, 7, 2, 1, 40)
INDEX = torch.arange(6).repeat_interleave(torch.tensor(LENGTHS))


def ragged(seed=0):
    """Rewards and values of tokens, values behind the sequences."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, dtype=torch.float64, generator=generator) for n in (54, 54, 6)]


def double_sum(rewards, values, gamma, lam, end=0.0):
    """Eq. 16 of arXiv:1506.02438 for one sequence, term by term."""
    values = [*values, end]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))
    ]


@pytest.mark.parametrize("with_ends", [False, True])
@pytest.mark.parametrize("gamma, lam", [(1, 0.95), (0.9, 0.5), (1, 1), (0.8, 0), (0, 0.5)])
def test_gae_is_the_double_sum_on_ragged_lengths(gamma, lam, with_ends):
    rewards, values, ends = ragged()
    wanted = []
    for r, v, end in zip(rewards.split(LENGTHS), values.split(LENGTHS), ends, strict=True):
        wanted += double_sum(r.tolist(), v.tolist(), gamma, lam, end.item() if with_ends else 0.0)
    found, returns = ppo.gae(
        rewards, values, INDEX, gamma=gamma, lam=lam, end_values=ends.clone() if with_ends else None
    )
    assert found.tolist() == pytest.approx(wanted, abs=1e-12)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(wanted, values.tolist(), strict=True)])


def test_gae_by_hand():
    # deltas 1 + 0.5 * 5 - 3 = 0.5 and 2 - 5 = -3, or 2 + 0.5 * 4 - 5 = -1 with 4 behind the end; alone 7 - 4
    rewards, values, index = float64(1, 2, 7), float64(3, 5, 4), torch.tensor([0, 0, 1])
    advantages, returns = ppo.gae(rewards, values, index, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [0.5 - 0.25 * 3, -3, 3] and returns.tolist() == [2.75, 2, 7]
    advantages, returns = ppo.gae(rewards, values, index, gamma=0.5, lam=0.5, end_values=float64(4, 0))
    assert advantages.tolist() == [0.5 - 0.25, -1, 3] and returns.tolist() == [3.25, 4, 7]


def test_lambda_0_is_the_td_error_and_lambda_1_monte_carlo():
    rewards, values, ends = ragged(1)
    td, _ = ppo.gae(rewards, values, INDEX, gamma=0.9, lam=0.0, end_values=ends.clone())
    monte_carlo, returns = ppo.gae(rewards, values, INDEX, gamma=0.9, lam=1.0, end_values=ends.clone())
    first = 0
    for length, end in zip(LENGTHS, ends.tolist(), strict=True):
        r, v = (x[first : first + length].tolist() for x in (rewards, values))
        assert td[first].item() == pytest.approx(r[0] + 0.9 * [*v, end][1] - v[0])
        last = first + length - 1
        assert td[last].item() == monte_carlo[last].item() == pytest.approx(r[-1] + 0.9 * end - v[-1])
        earned = sum(0.9**t * x for t, x in enumerate(r)) + 0.9**length * end
        assert monte_carlo[first].item() == pytest.approx(earned - v[0])
        assert returns[first].item() == pytest.approx(earned)
        first += length


def test_value_behind_a_sequence_counts_for_that_sequence_alone():
    rewards, values, _ = ragged(2)
    settings = {"gamma": 0.9, "lam": 0.8}
    plain, _ = ppo.gae(rewards, values, INDEX, **settings)
    only = torch.zeros(6, dtype=torch.float64)
    only[2] = 5.0
    found, _ = ppo.gae(rewards, values, INDEX, **settings, end_values=only)
    raised = [5 * 0.9 * (0.9 * 0.8) ** (6 - t) for t in range(7)]
    assert (found - plain).tolist() == pytest.approx([0] * 4 + raised + [0] * 43)


def test_gae_leaves_its_arguments_as_they_are():
    given = ragged(3)
    rewards, values = (x.clone() for x in given[:2])
    ppo.gae(rewards, values, INDEX, gamma=1.0, lam=0.95)
    assert torch.equal(rewards, given[0]) and torch.equal(values, given[1])


def test_gae_leaves_the_values_behind_the_sequences_as_they_are():
    rewards, values, ends = ragged(3)
    given = ends.clone()
    ppo.gae(rewards, values, INDEX, gamma=1.0, lam=0.95, end_values=ends)
    assert torch.equal(ends, given)


# Gradients against enumeration ------------------------------------------------------------------------------


def expected_gradient(table, advantages_of):
    """The mean of minus the gradient of PPO's loss at ratio 1 over all that the policy may sample."""
    ids = range(len(table.sequences))
    chances, logps = table.probabilities().detach(), table.token_logps(ids)
    index = torch.arange(len(ids)).repeat_interleave(table.lengths)
    losses = ppo.ppo_policy_loss(
        logps, logps.detach(), advantages_of(index, logps.detach()), epsilon=0.2, epsilon_high=0.2
    )
    return -table.gradient((losses * chances[index]).sum())


def states_of(table):
    """The state before each token of all sequences, end to end: a row of the table."""
    return torch.tensor(sum(table.rows, []))


both_kinds = pytest.mark.parametrize("end", [None, 2], ids=["equal-lengths", "an-end"])


@both_kinds
def test_score_and_kl_as_rewards_of_tokens_give_the_gradient_of_reward_minus_kl(end):
    table, ref = Table(9, end), Table(10, end)

    def advantages_of(index, logps):
        log_ratio = (logps - ref.token_logps(range(len(table.sequences)))).detach()
        rewards = ppo.shaped_rewards(table.rewards, log_ratio, index, kl_coef=0.7)
        return ppo.gae(rewards, torch.zeros_like(rewards), index, gamma=1.0, lam=1.0)[0]

    wanted = regularised_gradient(table, ref, 0.7)
    assert distance(expected_gradient(table, advantages_of), wanted) < 1e-6
    assert distance(true_gradient(table), wanted) > 0.01


def advantages_under(table, values_of_states, lam):
    def advantages_of(index, logps):
        rewards = ppo.shaped_rewards(table.rewards, torch.zeros_like(logps), index, kl_coef=0.0)
        return ppo.gae(rewards, values_of_states[states_of(table)], index, gamma=1.0, lam=lam)[0]

    return advantages_of


def exact_values(table):
    """The expected reward from each prefix on."""
    chances, values = table.probabilities().detach(), torch.zeros(13, dtype=torch.float64)
    for row in range(13):
        through = torch.tensor([row in rows for rows in table.rows])
        if through.any():
            values[row] = (chances * table.rewards)[through].sum() / chances[through].sum()
    return values


@both_kinds
def test_any_values_leave_the_gradient_unbiased_at_lambda_1(end):
    table = Table(11, end)
    values = torch.randn(13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = true_gradient(table)
    assert distance(expected_gradient(table, advantages_under(table, values, 1.0)), wanted) < 1e-6
    assert distance(expected_gradient(table, advantages_under(table, values, 0.5)), wanted) > 0.01


@both_kinds
@pytest.mark.parametrize("lam", [0.0, 0.4, 0.95])
def test_exact_values_leave_the_gradient_unbiased_at_every_lambda(end, lam):
    table = Table(12, end)
    found = expected_gradient(table, advantages_under(table, exact_values(table), lam))
    assert distance(found, true_gradient(table)) < 1e-6


def test_exact_values_quieten_the_gradient():
    table = Table(13)
    table.rewards = table.rewards + 2
    logps, chances = table.token_logps(range(27)), table.probabilities().detach()
    index = torch.arange(27).repeat_interleave(3)
    noise = []
    for values, lam in ((torch.zeros(13, dtype=torch.float64), 1.0), (exact_values(table), 0.0)):
        advantages = advantages_under(table, values, lam)(index, logps.detach())
        sums = [(advantages * logps)[index == i].sum() for i in range(27)]
        gradients = torch.stack(
            [torch.autograd.grad(x, table.logits, retain_graph=True)[0].flatten() for x in sums]
        )
        mean = (chances[:, None] * gradients).sum(0)
        noise.append((chances * (gradients - mean).square().sum(1)).sum().item())
    assert noise[1] < 0.5 * noise[0]


# Losses -----------------------------------------------------------------------------------------------------


def loss_and_slope(ratio, advantage, **settings):
    logprobs = float64(-1.3).requires_grad_()
    old = logprobs.detach() - math.log(ratio)
    settings = {"epsilon": 0.2, "epsilon_high": 0.28} | settings
    loss = ppo.ppo_policy_loss(logprobs, old, float64(advantage), **settings)
    return loss.item(), torch.autograd.grad(loss.sum(), logprobs)[0].item()


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (0.5, 2, -1.0, -1.0),
        (1.0, 2, -2.0, -2.0),
        # above 1.28 a good token has nothing left to earn
        (1.5, 2, -2.56, 0.0),
        # below 0.8 a bad one
        (0.5, -2, 1.6, 0.0),
        (1.0, -2, 2.0, 2.0),
        (1.5, -2, 3.0, 3.0),
        # between epsilon and epsilon_high
        (1.25, 2, -2.5, -2.5),
        (0.75, -2, 1.6, 0.0),
        (0.1, 0, 0.0, 0.0),
    ],
)
def test_clip_by_hand(ratio, advantage, loss, slope):
    assert loss_and_slope(ratio, advantage) == pytest.approx((loss, slope))


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        # c = 3: beyond it at A < 0 the loss stays at 6
        (2.9, -2, 5.8, 5.8),
        (3.1, -2, 6.0, 0.0),
        (90, -2, 6.0, 0.0),
        # elsewhere nothing changes
        (0.5, -2, 1.6, 0.0),
        (1.0, -2, 2.0, 2.0),
        (0.1, 2, -0.2, -0.2),
        (90, 2, -2.56, 0.0),
    ],
)
def test_dual_clip_ends_what_a_bad_token_may_count(ratio, advantage, loss, slope):
    assert loss_and_slope(ratio, advantage, dual_clip=3.0) == pytest.approx((loss, slope))
    if loss != 6:
        assert loss_and_slope(ratio, advantage) == pytest.approx((loss, slope))


def test_gradient_at_ratio_1_is_that_of_reinforce():
    logprobs = float64(-0.5, -3.0, -0.01, -1.0).requires_grad_()
    advantages = float64(1.5, -0.5, 0.0, -2.0)
    for dual_clip in (None, 3.0):
        losses = ppo.ppo_policy_loss(
            logprobs, logprobs.detach(), advantages, epsilon=0.1, epsilon_high=0.3, dual_clip=dual_clip
        )
        [slopes] = torch.autograd.grad(losses.sum(), logprobs)
        assert slopes.tolist() == [-1.5, 0.5, 0, 2] and losses.tolist() == [-1.5, 0.5, 0, 2]


@pytest.mark.parametrize(
    "value, cliprange, loss, slope",
    [
        # old value 1, return 3
        (1.0, 0.2, 2.0, -2.0),
        (1.125, 0.2, 1.875**2 / 2, -1.875),
        # moved further than allowed towards the return: the loss of 1.2, no gradient
        (1.5, 0.2, 1.62, 0.0),
        # moved away: the loss of the value itself
        (0.5, 0.2, 3.125, -2.5),
        # and beyond the return
        (9.0, 0.2, 18.0, 6.0),
        (1.5, None, 1.125, -1.5),
        (9.0, None, 18.0, 6.0),
    ],
)
def test_value_loss_by_hand(value, cliprange, loss, slope):
    for sign in (1, -1):  # and mirrored
        values = float64(sign * value).requires_grad_()
        old, returns = float64(sign * 1.0), float64(sign * 3.0)
        found = ppo.value_loss(values, old, returns, cliprange_value=cliprange)
        assert found.item() == pytest.approx(loss)
        assert torch.autograd.grad(found.sum(), values)[0].item() == pytest.approx(sign * slope)


# Shaping and measures ---------------------------------------------------------------------------------------


def test_score_comes_at_the_last_token_and_the_kl_at_every_token():
    index = torch.tensor([0, 0, 0, 1, 2, 2])
    found = ppo.shaped_rewards(float64(10, 5, -1), float64(1, 2, 4, 8, -1, 0.5), index, kl_coef=0.1)
    assert found.tolist() == pytest.approx([-0.1, -0.2, 10 - 0.4, 5 - 0.8, 0.1, -1 - 0.05])


def test_whiten_by_hand():
    for values in (float64(1, 2, 3), float64(0, 0, 0, 2)):
        deviations = {3: [-1, 0, 1], 4: [-0.5, -0.5, -0.5, 1.5]}[len(values)]
        assert ppo.whiten(values).tolist() == pytest.approx(deviations, abs=1e-7)
        mean = values.mean().item()
        kept = ppo.whiten(values, shift_mean=False).tolist()
        assert kept == pytest.approx([x + mean for x in deviations], abs=1e-7)
    for values in ([0.1] * 3, [7.0], [], [-2.0, -2.0]):
        assert ppo.whiten(torch.tensor(values)).tolist() == [0] * len(values)
        assert ppo.whiten(torch.tensor(values), shift_mean=False).tolist() == pytest.approx(values)


@pytest.mark.parametrize(
    "kl, factor",
    [
        # target 6, 64 completions of a horizon of 1000
        (6.0, 1.0),
        (5.4, 1 - 0.1 * 0.064),
        (6.6, 1 + 0.1 * 0.064),
        (9.0, 1 + 0.2 * 0.064),
        (1e9, 1 + 0.2 * 0.064),
        (0.0, 1 - 0.2 * 0.064),
        (-3.0, 1 - 0.2 * 0.064),
    ],
)
def test_kl_controller_by_hand(kl, factor):
    found = ppo.adapted_kl_coef(0.15, kl, target=6.0, horizon=1000, num_episodes=64)
    assert found == pytest.approx(0.15 * factor)


def test_kl_controller_steers_the_kl_to_its_target():
    kl_coef = 0.5
    for _ in range(4000):  # a KL of 1 / kl_coef nats
        kl_coef = ppo.adapted_kl_coef(kl_coef, 1 / kl_coef, target=6.0, horizon=1000, num_episodes=64)
    assert 1 / kl_coef == pytest.approx(6, rel=1e-3)


def test_merged_moments_are_those_of_all_values_for_any_split():
    values = np.random.default_rng(0).normal(3, 2, 23)
    for cuts in ([], [0], [1], [23], [1, 2, 3], [5, 5, 20], [10]):
        moments = torch.zeros(3, dtype=torch.float64)
        for part in np.split(values, cuts):
            moments = ppo.merged_moments(moments, torch.tensor(part))
        squares = ((values - values.mean()) ** 2).sum()
        assert moments.tolist() == pytest.approx([23, values.mean(), squares])
    assert ppo.merged_moments(torch.zeros(3), torch.zeros(0)).tolist() == [0, 0, 0]


def test_normalised_scores_have_the_moments_of_all_that_were_known():
    adaptive, nan = ppo.Adaptive(0.1), math.nan
    found = adaptive.normalized(float64(1, nan, 4, 100), torch.tensor([True, False, True, False]))
    std = math.sqrt(4.5)
    assert found[[0, 2]].tolist() == pytest.approx([-1.5 / std, 1.5 / std]) and found[1].isnan()
    found = adaptive.normalized(float64(7, 0), torch.tensor([True, True]))
    std = math.sqrt((4 + 1 + 16 + 9) / 3)  # of 1, 4, 7, 0 around 3
    assert found.tolist() == pytest.approx([4 / std, -3 / std])


def test_explained_variance_by_hand():
    returns = float64(1, 2, 3, 6)
    assert ppo.explained_variance(returns - 5, returns) == pytest.approx(1)  # a shift is no variance
    assert ppo.explained_variance(float64(7, 7, 7, 7), returns) == pytest.approx(0)
    assert ppo.explained_variance(-returns, returns) == pytest.approx(1 - 4)
    assert ppo.explained_variance(returns / 2, returns) == pytest.approx(3 / 4)
    for constant in ([], [3.0], [3.0, 3.0]):
        assert ppo.explained_variance(torch.ones(len(constant)), torch.tensor(constant)) == 0


def test_clip_shares_count_where_the_gradient_is_lost():
    ratio, advantages = torch.tensor([0.7, 0.7, 1.3, 1.3, 1.0, 1.25]), torch.tensor([1.0, -1, 1, -1, 1, 1])
    found = ppo.clip_shares(ratio, advantages, 0.2, 0.28)
    assert found.tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    "change, told",
    [
        ({}, None),
        ({"objective/scores": 0.9, "gold_reward": 0.4}, "hacked"),
        ({"objective/entropy": 0.4}, "entropy"),
        ({"objective/scores": math.nan, "objective/entropy": 0.4}, "entropy"),  # nothing is known of scores
    ],
)
def test_monitor_reads_the_names_of_these_metrics(change, told, tmp_path, capsys):
    first = {"objective/entropy": 1.0, "objective/scores": 0.5, "gold_reward": 0.5}
    first |= {"completions/mean_length": 10.0}
    monitor = ppo.Monitor(tmp_path, 0)
    for step in range(1, 15):
        monitor(first | {"step": step} | (change if step > 5 else {}))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == (told is not None) and all(told in line for line in warnings)


def test_shaped_scores_are_clipped_before_the_penalty():
    scores, ended = float64(5, -5, math.nan, 0.5), torch.tensor([True, False, True, False])
    settings = {"reward_clip": 2.0, "missing_eos_penalty": 1.0}
    nothing, second = torch.zeros(4, dtype=torch.bool), torch.tensor([False, True, False, False])
    found = ppo.shaped_scores(scores, ended, bootstrapped=nothing, **settings)
    assert found.tolist() == [2, -3, 0, -0.5]
    found = ppo.shaped_scores(scores, ended, bootstrapped=second, **settings)
    assert found.tolist() == [2, -1, 0, -0.5]
    found = ppo.shaped_scores(scores, ended, bootstrapped=nothing, reward_clip=None, missing_eos_penalty=0.0)
    assert found.tolist() == [5, -5, 0, 0.5]


# Short runs -------------------------------------------------------------------------------------------------

REWARDS = """
def given(completions, score, **columns):
    return score


def residue(completion_ids, **columns):
    return [sum(ids) % 7 / 3 for ids in completion_ids]


def length(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]
"""
PROMPTS = ("1 + 1 =", "Two and three are")  # of the groups of 2 in turn
ANSWERS = ([END], [10, 11, END], [12, END], [13, 14, 15, END])
CUT = ([END], [10, 11, 12], [12, END], [13, 14, 15])  # the second and the fourth have no end
SCORES = (1.0, 0.0, 3.0, -1.0)


SETTINGS = {
    "batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 8,
    "max_steps": 1,
    "kl_coef": 0.05,
    "gamma": 1.0,
    "lam": 0.95,
    "epsilon": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "num_ppo_epochs": 1,
    "num_minibatches": 1,
    "learning_rate": 1e-4,
    "value_learning_rate": 3e-4,
    "warmup_steps": 0,
    "eval_every": 0,
    "save_every": 0,
}


@pytest.fixture
def rewards(tmp_path):
    """rewards("a", "b"): the flag --reward for functions of a file."""
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS)
    return lambda *names: tuple(f"{path}:{name}" for name in names)


@pytest.fixture
def recorded(tmp_path):
    """recorded(scores of step 1, scores of step 2, ...): the flag --replay-rollouts for written answers."""

    def write(*steps, answers=ANSWERS, prompts=PROMPTS):
        lines = []
        for step, scores in enumerate(steps, 1):
            for n, (ids, score) in enumerate(zip(answers, scores, strict=True)):
                prompt = prompts[n // 2 % len(prompts)]
                asked = {"prompt_ids": tiny_tokenizer()(prompt).input_ids}
                said = {"token_ids": ids, "logprobs": [-1.0] * len(ids)}
                lines.append({"step": step, "row": {"prompt": prompt, "score": score}} | asked | said)
        write.count += 1
        return {"replay_rollouts": write_rows(tmp_path / f"rollouts_{write.count}.jsonl", lines)}

    write.count = 0
    return write


@pytest.fixture
def train(tmp_path, rewards, one_cpu, monkeypatch):
    """train(**flags) -> output folder, lines of metrics.jsonl; train.weights: of the models that were saved.

    One step of one pass over 2 groups of 2 on tiny/sft, with a value model that starts from it.
    """
    save_model = ppo.save_model

    def spy(folder, model, tokenizer):
        run.weights[folder.name] = {name: x.detach().clone() for name, x in model.state_dict().items()}
        save_model(folder, model, tokenizer)

    def run(rows=None, **flags):
        run.count, run.weights = run.count + 1, {}
        folder = tmp_path / f"run_{run.count}"
        path = write_rows(tmp_path / f"prompts_{run.count}.jsonl", rows or tiny_rows()[:8])
        defaults = {"dataset": (path,), "output_dir": str(folder)}
        defaults["reward"] = rewards("given" if "replay_rollouts" in flags else "residue")
        defaults |= SETTINGS
        ppo.main(ppo.Args(**(defaults | flags)))
        lines = read_lines(Path((defaults | flags)["output_dir"]) / "metrics.jsonl")
        return folder, [line for line in lines if len(line) > 1]  # without step 0 where nothing was evaluated

    run.count = 0
    monkeypatch.setattr(ppo, "save_model", spy)
    return run


@pytest.fixture
def looked(monkeypatch):
    """What went into and came out of GAE at each step of a run, by name."""
    found, gae = [], ppo.gae

    def spy(token_rewards, values, sequence_index, **settings):
        given = {"rewards": token_rewards, "values": values, "ends": settings["end_values"]}
        given = {name: x.clone() for name, x in given.items()}
        advantages, returns = gae(token_rewards, values, sequence_index, **settings)
        given |= {"advantages": advantages.clone(), "returns": returns.clone()}
        found.append(SimpleNamespace(**given, index=sequence_index, settings=settings))
        return advantages, returns

    monkeypatch.setattr(ppo, "gae", spy)
    return found


@pytest.fixture
def losses(monkeypatch):
    """Arguments and settings of every call of ppo_policy_loss: a row of an update."""
    found, ppo_policy_loss = [], ppo.ppo_policy_loss

    def spy(logprobs, old_logprobs, advantages, **settings):
        ratio = torch.exp(logprobs - old_logprobs).detach()
        found.append(SimpleNamespace(ratio=ratio, advantages=advantages, settings=settings))
        return ppo_policy_loss(logprobs, old_logprobs, advantages, **settings)

    monkeypatch.setattr(ppo, "ppo_policy_loss", spy)
    return found


def furthest(one, other):
    """Largest difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def stock_values(model, prompt_ids, answer):
    """What a stock classifier says of the states before each token of an answer, and behind the last."""
    prefixes = [[*prompt_ids, *answer[:t]] for t in range(len(answer) + 1)]
    logits = [model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in prefixes]
    return torch.stack(logits) + model.config.reward_offset


def stock_critic():
    model = AutoModelForSequenceClassification.from_pretrained(JUDGE, dtype=torch.float32).eval()
    model.config.pad_token_id = None  # the last token is read then
    return model


def stock_logps(model, prompt_ids, answer):
    """Log-probs of the tokens of an answer, and the entropies they were drawn with."""
    logits = model(input_ids=torch.tensor([[*prompt_ids, *answer]])).logits[0, len(prompt_ids) - 1 : -1]
    log_p = logits.log_softmax(-1)
    return log_p[range(len(answer)), answer], -(log_p.exp() * log_p).sum(-1)


def test_losses_metrics_and_updates_of_a_step_are_those_of_stock_models(train, recorded):
    # Two passes with every term: KL, bootstrap, penalty, GAE, whitening, both clips, entropy, clipped norms
    flags = {"reward_model": (JUDGE,), "reward_weights": (1.0, 0.0), "ref_model": str(ROOT / "tiny" / "base")}
    flags |= {"kl_coef": 0.3, "gamma": 0.9, "lam": 0.8, "truncated": "bootstrap", "missing_eos_penalty": 0.25}
    flags |= {"epsilon": 0.1, "epsilon_high": 0.15, "cliprange_value": 0.1, "entropy_coef": 0.05}
    flags |= {"learning_rate": 1e-3, "value_learning_rate": 2e-3, "num_ppo_epochs": 2, "max_grad_norm": 0.5}
    _, [line] = train(**flags, **recorded(SCORES, answers=CUT))

    policy, ref, critic = stock(ROOT / "tiny" / "sft"), stock(ROOT / "tiny" / "base"), stock_critic()
    asked = [tiny_tokenizer()(PROMPTS[n // 2]).input_ids for n in range(4)]
    pairs = list(zip(asked, CUT, strict=True))
    with torch.no_grad():
        old = torch.cat([stock_logps(policy, *p)[0] for p in pairs])
        log_ratio = old - torch.cat([stock_logps(ref, *p)[0] for p in pairs])
        values = [stock_values(critic, *p) for p in pairs]
    advantages, rewards = [], []
    for score, ids, kl, v in zip(SCORES, CUT, log_ratio.split([len(x) for x in CUT]), values, strict=True):
        ended = ids[-1] == END
        r = [-0.3 * x for x in kl.tolist()]
        r[-1] += score if ended else -0.25
        rewards += r
        advantages += double_sum(r, v[:-1].tolist(), 0.9, 0.8, 0.0 if ended else v[-1].item())
    old_values = torch.cat([v[:-1] for v in values])
    returns = torch.tensor(advantages) + old_values
    std = np.std(advantages, ddof=1)
    whitened = torch.tensor((np.array(advantages) - np.mean(advantages)) / std).float()

    models = {"model": (policy, 1e-3), "value_model": (critic, 2e-3)}
    optimizers = [torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=0.0) for m, lr in models.values()]
    seen = []
    for _ in range(2):
        logps, entropies = (torch.cat(x) for x in zip(*[stock_logps(policy, *p) for p in pairs]))
        now = torch.cat([stock_values(critic, *p)[:-1] for p in pairs])
        ratio = (logps - old).exp()
        surrogate = torch.stack([ratio * whitened, ratio.clip(0.9, 1.15) * whitened]).min(0).values
        near = now.clip(old_values - 0.1, old_values + 0.1)
        errors = torch.stack([(now - returns) ** 2, (near - returns) ** 2]).max(0).values / 2
        (-surrogate.mean() - 0.05 * entropies.mean()).backward()
        (0.1 * errors.mean()).backward()
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5).item() for m, _ in models.values()]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        lost = ((ratio > 1.15) & (whitened > 0)) | ((ratio < 0.9) & (whitened < 0))
        held = ((near - returns) ** 2 > (now - returns) ** 2).float().mean()
        k3 = (ratio - 1 - (logps - old)).mean()
        numbers = -surrogate.mean(), errors.mean(), lost.float().mean(), k3, entropies.mean(), ratio.mean()
        numbers += (held,)
        seen.append([x.item() for x in numbers] + norms)
    mean = np.mean(seen, 0)

    metrics = {
        "loss/policy_avg": mean[0],
        "loss/value_avg": mean[1],
        "loss": mean[0] + 0.1 * mean[1] - 0.05 * mean[4],
        "policy/clipfrac_avg": mean[2],
        "policy/clipfrac_last": seen[1][2],
        "policy/approxkl_avg": mean[3],
        "policy/approxkl_last": seen[1][3],
        "policy/entropy_avg": mean[4],
        "val/ratio": mean[5],
        "val/clipfrac_avg": mean[6],
        "grad_norm": mean[7],
        "grad_norm/value": mean[8],
        "objective/entropy": seen[0][4],
        "objective/scores": np.mean(SCORES),
        "objective/kl": log_ratio.sum().item() / 4,
        "objective/non_score_reward": -0.3 * log_ratio.sum().item() / 4,
        "objective/rlhf_reward": sum(rewards) / 4,
        "kl": (torch.exp(-log_ratio) - 1 + log_ratio).mean().item(),
        "val/mean": old_values.mean().item(),
        "val/returns_mean": returns.mean().item(),
        "val/explained_var": 1 - np.var(advantages) / np.var(returns.numpy()),
        "advantage_std": std,
        "sampling/logp_difference_mean": (old + 1).abs().mean().item(),
        "completions/clipped_ratio": 0.5,
        "updates": 2,
    }
    assert {key: line[key] for key in metrics} == pytest.approx(metrics, rel=2e-4, abs=1e-6)
    assert (
        metrics["policy/clipfrac_last"] > 0.1
        and seen[0][7] > 0.5
        and mean[6] > 0
        and metrics["objective/kl"] != 0
    )
    for name, (model, rate) in models.items():
        found, wanted = train.weights[name], model.state_dict()
        # AdamW's first steps are of size `rate` whatever the gradient's: near 0 its sign is a rounding
        apart = [((found[key] - wanted[key]).abs() > 0.05 * rate).sum().item() for key in found]
        assert sum(apart) < 1e-4 * sum(x.numel() for x in found.values())


def test_objective_entropy_by_hand(train, recorded):
    _, [line] = train(**recorded(SCORES), learning_rate=0.0)
    policy = stock(ROOT / "tiny" / "sft")
    asked = [tiny_tokenizer()(PROMPTS[n // 2]).input_ids for n in range(4)]
    entropies = [stock_logps(policy, *pair)[1] for pair in zip(asked, ANSWERS, strict=True)]
    assert line["objective/entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)


@pytest.mark.parametrize("flags", [{"max_tokens_per_micro_batch": 16}, {"num_ppo_epochs": 2}])
def test_objective_entropy_is_of_the_policy_that_sampled_whatever_the_rows_and_passes(train, recorded, flags):
    rollout = recorded(SCORES)
    [wanted], [found] = train(**rollout)[1], train(**rollout, **flags)[1]
    assert found["objective/entropy"] == pytest.approx(wanted["objective/entropy"], rel=1e-5)


# Golden behaviour -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"num_minibatches": 2},
        {"temperature": 0.7, "max_tokens_per_micro_batch": 64, "reward_model": (JUDGE,)},
        {"gradient_checkpointing": True, "share_prompt": False},
    ],
    ids=["whole", "minibatches", "rows", "checkpointing"],
)
def test_first_minibatch_of_each_rollout_has_ratios_of_exactly_1_and_later_ones_move(train, losses, flags):
    defaults = {"num_ppo_epochs": 3, "max_steps": 2, "batch_size": 8, "learning_rate": 1e-3}
    _, lines = train(**(defaults | flags))
    for line in lines:
        assert line["val/ratio_first"] == 1.0 and line["policy/clipfrac_first"] == 0.0
        assert line["policy/clipfrac_last"] > 0.02 and line["policy/approxkl_last"] > 1e-3
        assert 0 < line["policy/approxkl_avg"] < line["policy/approxkl_last"]
        assert line["updates"] == 3 * flags.get("num_minibatches", 1)
        assert line["sampling/logp_difference_mean"] < 1e-4
    assert (losses[0].ratio == 1).all() and (losses[-1].ratio != 1).any()
    assert lines[0]["kl"] == lines[0]["objective/kl"] == 0 and lines[1]["kl"] > 1e-4


def test_old_log_probs_are_of_the_very_rows_of_the_first_pass(train, monkeypatch):
    # with other rows a ratio may be 1 only up to rounding
    looked_at, trained_on, token_logprobs = [], [], ppo.token_logprobs

    def spy(model, batch, **settings):
        (trained_on if torch.is_grad_enabled() else looked_at).append(batch.input_ids.tolist())
        return token_logprobs(model, batch, **settings)

    monkeypatch.setattr(ppo, "token_logprobs", spy)
    train(batch_size=16, num_minibatches=2, num_ppo_epochs=2, max_tokens_per_micro_batch=128)
    rows = len(looked_at) // 2  # under the policy, then under the reference
    assert looked_at[:rows] == looked_at[rows:] == trained_on[:rows] and rows > 2
    assert trained_on[rows:] != trained_on[:rows]


def test_one_pass_in_one_minibatch_has_ratios_of_1_throughout(train, losses):
    _, lines = train(max_steps=2, max_tokens_per_micro_batch=64)
    assert len(losses) >= 4 and all((x.ratio == 1).all() for x in losses)
    for line in lines:
        assert line["policy/approxkl_last"] == line["policy/clipfrac_avg"] == line["val/clipfrac_avg"] == 0
        assert line["val/ratio"] == 1 and line["grad_norm"] > 0.01


def test_value_clip_holds_values_that_have_moved_too_far(train, recorded):
    rollout, flags = recorded(SCORES), {"num_ppo_epochs": 3, "value_learning_rate": 1e-3}
    [held] = train(**rollout, **flags, cliprange_value=1e-4)[1]
    [free] = train(**rollout, **flags, cliprange_value=None)[1]
    assert held["val/clipfrac_avg"] > 0.1 and free["val/clipfrac_avg"] == 0
    assert held["loss/value_avg"] > free["loss/value_avg"]


def test_value_clip_far_away_holds_nothing(train, recorded):
    flags = {"num_ppo_epochs": 3, "value_learning_rate": 1e-3, "reward_model": (JUDGE,)}
    [line] = train(**recorded(SCORES), **flags, cliprange_value=1e6)[1]
    assert line["val/clipfrac_avg"] == 0


def test_update_without_values_is_that_of_reinforce(train, recorded, monkeypatch, rewards, tmp_path):
    folder, _ = train(batch_size=8, save_rollouts=True, kl_coef=0.0)
    shared = {
        "replay_rollouts": str(folder / "rollouts.jsonl"),
        "dataset": (str(tmp_path / "prompts_1.jsonl"),),
    }
    shared |= {"batch_size": 8, "reward": rewards("residue"), "learning_rate": 3e-4, "kl_coef": 0.0}
    plain = {"lam": 1.0, "gamma": 1.0, "whiten_advantages": False, "value_learning_rate": 0.0}
    _, [line] = train(**shared, **plain)
    assert line["advantage_std"] > 0.1 and line["val/mean"] == 0

    kept = {}
    spy = lambda folder, model, tokenizer: kept.update(model.state_dict())
    monkeypatch.setattr(rr, "save_model", spy)
    shared |= {"algorithm": "reinforce", "loss_agg": "token_mean", "output_dir": str(tmp_path / "reinforce")}
    shared |= {"num_generations": 2, "max_completion_length": 8, "max_steps": 1, "warmup_steps": 0}
    other = rr.main(rr.Args(**shared, eval_every=0, save_every=0))
    assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    assert furthest(train.weights["model"], kept) < 0.01 * 3e-4
    assert furthest(kept, stock(ROOT / "tiny" / "sft").state_dict()) > 2e-4


def test_verifiers_train_on_gsm8k_without_a_reward_model(gsm8k, train, random_model, looked):
    rows = read_lines(gsm8k / "train.jsonl")[:8]
    flags = {"model": str(random_model), "max_prompt_length": 1024, "max_steps": 2, "num_ppo_epochs": 2}
    verifier = (str(ROOT / "rewards.py") + ":math_answer",)
    _, lines = train(rows, reward=verifier, missing_eos_penalty=1.0, whiten_advantages=False, **flags)
    assert len(lines) == 2 and all(math.isfinite(value) for line in lines for value in line.values())
    assert looked[0].values.abs().max() == 0 and looked[1].values.abs().max() > 0
    assert lines[1]["grad_norm"] > 0 and lines[1]["sampling/logp_difference_mean"] < 1e-4
    assert lines[0]["rewards/math_answer/mean"] == 0 and lines[0]["num_tokens"] > 4 * 50
    assert "rewards/reward_model/mean" not in lines[0]


# Rewards ----------------------------------------------------------------------------------------------------


def scores_of(step):
    """The reward of the last token of each sequence of a step."""
    last = torch.bincount(step.index).cumsum(0) - 1
    return step.rewards[last].tolist()


def test_scores_stand_at_the_last_tokens_and_nothing_elsewhere(train, recorded, looked):
    [line] = train(**recorded(SCORES))[1]  # the reference is the policy: no KL
    assert looked[0].rewards.tolist() == [1, 0, 0, 0, 0, 3, 0, 0, 0, -1]
    assert looked[0].settings["gamma"] == 1 and looked[0].settings["lam"] == 0.95
    assert line["objective/rlhf_reward"] == line["objective/scores"] == 3 / 4


def test_missing_eos_penalty_is_taken_off_what_was_cut_off(train, recorded, looked):
    [line] = train(**recorded(SCORES, answers=CUT), missing_eos_penalty=0.5)[1]
    assert scores_of(looked[0]) == [1, -0.5, 3, -1.5]
    assert line["objective/scores"] == 3 / 4 and line["objective/rlhf_reward"] == 2 / 4


def test_values_behind_cut_off_completions_take_the_place_of_their_scores(train, recorded, looked):
    flags = {"reward_model": (JUDGE,), "reward_weights": (1.0, 0.0)}
    train(**flags, **recorded(SCORES, answers=CUT), truncated="bootstrap")
    train(**flags, **recorded(SCORES, answers=CUT), truncated="score")
    bootstrapped, scored = looked
    assert scores_of(bootstrapped) == [1, 0, 3, 0] and scores_of(scored) == [1, 0, 3, -1]
    asked, critic = [tiny_tokenizer()(PROMPTS[n // 2]).input_ids for n in range(4)], stock_critic()
    with torch.no_grad():
        values = [stock_values(critic, *pair) for pair in zip(asked, CUT, strict=True)]
    ends = [0, values[1][-1].item(), 0, values[3][-1].item()]
    assert bootstrapped.ends.tolist() == pytest.approx(ends, rel=1e-4) and min(map(abs, ends[1::2])) > 0.01
    assert scored.ends.tolist() == [0] * 4
    wanted = torch.cat([v[:-1] for v in values]).tolist()
    assert bootstrapped.values.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "scores, flags",
    [
        ((1.0, None, 3.0, None), {}),
        (SCORES, {"truncated": "drop", "reward_model": (JUDGE,), "reward_weights": (1.0, 0.0)}),
    ],
    ids=["without-a-score", "cut-off"],  # values are 0, and not
)
def test_completion_that_is_not_trained_on_takes_no_part_in_the_update(
    train, recorded, looked, losses, scores, flags
):
    # whatever its tokens are: neither a gradient nor a share in what whitening and means are over
    other = ([END], [500, 9, 77, 3], [12, END], [300])
    flags |= {"whiten_rewards": True, "entropy_coef": 0.1, "normalize_reward": True, "num_ppo_epochs": 2}
    found = []
    for answers in (CUT, other):
        [line] = train(**flags, **recorded(scores, answers=answers))[1]
        found.append((line, train.weights))
    for name, rate in (("model", 1e-4), ("value_model", 3e-4)):
        assert furthest(*[weights[name] for _, weights in found]) < 0.02 * rate
        assert furthest(found[0][1][name], {k: 0 * v for k, v in found[0][1][name].items()}) > 0.1
    keys = ("loss/policy_avg", "loss/value_avg", "grad_norm", "grad_norm/value", "advantage_std")
    keys += ("val/returns_mean", "val/explained_var", "loss", "policy/approxkl_avg", "policy/approxkl_last")
    keys += ("policy/entropy_avg", "policy/clipfrac_avg", "val/ratio", "sampling/logp_difference_mean")
    for key in keys:
        assert found[0][0][key] == pytest.approx(found[1][0][key], rel=1e-4, abs=1e-6), key
    # 3 tokens are trained on: those of the first and the third
    trained = torch.tensor([True, False, False, False, True, True, False, False, False])
    raw = looked[0].advantages[trained]
    whitened = (raw - raw.mean()) / raw.std(unbiased=True)
    used = losses[0].advantages
    assert len(used) == 9 and used[used != 0].sort().values.tolist() == pytest.approx(
        whitened.sort().values.tolist(), rel=1e-4
    )


@pytest.mark.parametrize(
    "scores, flags",
    [([None] * 4, {"reward_model": ()}), (SCORES, {"truncated": "drop"})],
    ids=["without-a-score", "all-cut-off"],
)
def test_rollout_without_anything_to_train_on_changes_nothing(train, recorded, scores, flags):
    ids = ([10], [11, 12], [13], [14, 15])  # nothing ends
    flags |= {"entropy_coef": 0.1, "normalize_reward": True, "whiten_rewards": True, "max_steps": 2}
    # behind a step that was trained on, AdamW's momentum would move the weights without any gradient
    rows = read_lines(recorded(SCORES)["replay_rollouts"])
    spoilt = read_lines(recorded(scores, answers=ids)["replay_rollouts"])
    path = write_rows(Path(recorded(SCORES)["replay_rollouts"]), rows + [r | {"step": 2} for r in spoilt])
    folder, lines = train(replay_rollouts=path, **flags)
    after_two = train.weights
    train(**recorded(SCORES), **flags | {"max_steps": 1})
    assert all(furthest(after_two[name], train.weights[name]) == 0 for name in after_two)
    assert lines[1]["updates"] == lines[1]["grad_norm"] == lines[1]["grad_norm/value"] == 0
    assert lines[0].keys() > lines[1].keys()
    unknown = lines[0].keys() - lines[1].keys()
    assert {"loss", "val/ratio", "objective/rlhf_reward", "val/returns_mean"} <= unknown
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in text and all(math.isfinite(x) for x in json.loads(text).values())


def test_bootstrapped_completion_needs_no_score(train, recorded, looked):
    flags = {"truncated": "bootstrap", "normalize_reward": True, "reward_model": (JUDGE,)}
    flags |= {"reward_weights": (1.0, 0.0)}
    train(**recorded((1.0, math.nan, 3.0, 100.0), answers=CUT), **flags)
    # moments are those of 1 and 3: neither the missing score nor the one that has a value in its place
    assert scores_of(looked[0]) == pytest.approx([-1 / 2**0.5, 0, 1 / 2**0.5, 0])
    assert looked[0].ends[[1, 3]].abs().min() > 0


@pytest.mark.parametrize(
    "scores, flags",
    [((1.0, None, 3.0, None), {}), ((1.0, 8.0, 3.0, 6.0), {"truncated": "drop"})],
    ids=["without-a-score", "cut-off"],
)
def test_objective_rlhf_reward_is_of_what_is_optimised(train, recorded, scores, flags):
    [line] = train(**flags, **recorded(scores, answers=CUT))[1]
    assert line["objective/rlhf_reward"] == 2


def test_rewards_are_capped_then_weighted(train, recorded, rewards, looked):
    flags = {"reward": rewards("given", "length"), "reward_weights": (2.0, 0.5)}
    [line] = train(**flags, **recorded((1.0, 0.0, 3.0, -1.0)), reward_caps=(2.0, math.inf))[1]
    # lengths 1, 3, 2, 4
    wanted = [2 + 0.5, 1.5, 4 + 1, -2 + 2]
    assert scores_of(looked[0]) == wanted and line["objective/scores"] == np.mean(wanted)
    assert line["rewards/given/mean"] == 3 / 4 and line["rewards/length/mean"] == 2.5
    train(**flags, **recorded((None, 0.0, 3.0, None)), reward_caps=(math.inf, 2.5))
    assert scores_of(looked[1]) == [0.5, 1.25, 7, 1.25]  # a cap leaves None out


@pytest.mark.parametrize("clip, scores", [(0.5, [0.5, 0, 0.5, -0.5]), (2.0, [1, 0, 2, -1])])
def test_scores_are_clipped_to_both_sides(train, recorded, looked, clip, scores):
    [line] = train(**recorded(SCORES), reward_clip=clip)[1]
    assert scores_of(looked[0]) == scores and line["objective/scores"] == 3 / 4


def test_scores_are_normalised_by_all_so_far_and_clipped_afterwards(train, recorded, looked):
    second = (5.0, 5.0, None, 9.0)
    train(**recorded(SCORES, second), max_steps=2, normalize_reward=True, learning_rate=0.0)
    train(**recorded(SCORES, second), max_steps=2, normalize_reward=True, reward_clip=0.6, learning_rate=0.0)
    known = [*SCORES, 5.0, 5.0, 9.0]
    mean, std = np.mean(known), np.std(known, ddof=1)
    first = [(x - np.mean(SCORES)) / np.std(SCORES, ddof=1) for x in SCORES]
    wanted = [first, [0 if x is None else (x - mean) / std for x in second]]
    assert [scores_of(step) for step in looked[:2]] == [pytest.approx(line) for line in wanted]
    clipped = [pytest.approx(np.clip(line, -0.6, 0.6)) for line in wanted]
    assert [scores_of(step) for step in looked[2:]] == clipped


def test_whitened_rewards_keep_their_mean_and_returns_are_of_them(train, recorded, looked):
    flags = {"ref_model": str(ROOT / "tiny" / "base"), "kl_coef": 0.5, "learning_rate": 0.0}
    [plain] = train(**flags, **recorded(SCORES))[1]
    [white] = train(**flags, **recorded(SCORES), whiten_rewards=True)[1]
    raw, scaled = (step.rewards.numpy() for step in looked)
    assert np.count_nonzero(raw) == 10
    wanted = (raw - raw.mean()) / np.std(raw, ddof=1) + raw.mean()
    assert scaled.tolist() == pytest.approx(wanted.tolist(), rel=1e-6)
    assert white["objective/rlhf_reward"] == pytest.approx(plain["objective/rlhf_reward"])  # before whitening
    assert white["val/returns_mean"] == pytest.approx(looked[1].returns.mean().item())


@pytest.mark.parametrize("whitened", [True, False])
def test_advantages_are_whitened_over_the_rollout_and_returns_are_not(
    train, recorded, looked, losses, whitened
):
    flags = {"num_minibatches": 2, "learning_rate": 0.0, "value_learning_rate": 0.0}
    [line] = train(**recorded(SCORES), **flags, whiten_advantages=whitened, lam=0.5)[1]
    raw = looked[0].advantages
    wanted = (raw - raw.mean()) / raw.std(unbiased=True) if whitened else raw
    used = torch.cat([x.advantages for x in losses])
    assert len(losses) == 2  # the mean of neither minibatch alone is 0
    assert used.sort().values.tolist() == pytest.approx(wanted.sort().values.tolist(), rel=1e-5, abs=1e-6)
    assert line["val/returns_mean"] == pytest.approx(raw.mean().item(), abs=1e-6)  # values are 0
    # 4 tokens of one group, 6 of the other; the mean of both means of R^2 / 2
    halves = [x.square().mean().item() / 2 for x in raw.split([4, 6])]
    assert line["loss/value_avg"] == pytest.approx(np.mean(halves), rel=1e-5)


def test_adaptive_kl_weight_follows_the_formula_from_step_to_step(train, recorded, looked):
    flags = {"ref_model": str(ROOT / "tiny" / "base"), "kl_controller": "adaptive", "kl_horizon": 10.0}
    kls = set()
    for target in (0.01, 1000.0):  # above it, below it
        lines = train(**recorded(SCORES, SCORES), **flags, max_steps=3, kl_target=target)[1]
        assert lines[0]["objective/kl_coef"] == 0.05
        for line, following in zip(lines, lines[1:], strict=False):
            kl = line["objective/kl"]
            error = np.clip(kl / target - 1, -0.2, 0.2)
            wanted = line["objective/kl_coef"] * (1 + error * 4 / 10)
            assert following["objective/kl_coef"] == pytest.approx(wanted, rel=1e-9)
            kls.add(np.sign(error))
        for line in lines:
            wanted = -line["objective/kl_coef"] * line["objective/kl"]
            assert line["objective/non_score_reward"] == pytest.approx(wanted)
            assert line["objective/rlhf_reward"] == pytest.approx(wanted + 3 / 4, rel=1e-5)
    assert kls == {1, -1}
    [line] = train(**recorded(SCORES), **flags | {"kl_controller": "fixed"}, max_steps=2)[1][1:]
    assert line["objective/kl_coef"] == 0.05


def test_reward_models_and_verifiers_mix_with_weights_and_caps(train, recorded, looked):
    judges = (JUDGE, str(ROOT / "tiny" / "reward_biased"))
    flags = {"reward_model": judges, "reward_aggregation": "min", "reward_weights": (2.0, 0.5)}
    prompt = [{"role": "user", "content": "How many are 2 and 3?"}]
    rows = read_lines(recorded(SCORES)["replay_rollouts"])
    for row in rows:
        row["row"]["prompt"] = prompt
        row["completion"] = tiny_tokenizer().decode(row["token_ids"], skip_special_tokens=True)
    path = write_rows(Path(recorded(SCORES)["replay_rollouts"]), rows)
    [line] = train(**flags, replay_rollouts=path, reward_caps=(1.0, 0.3))[1]
    both = [[stock_reward(judge, row, prompt) for row in rows] for judge in judges]
    lowest = np.min(both, 0)
    wanted = [2 * min(s, 1.0) + 0.5 * min(x, 0.3) for s, x in zip(SCORES, lowest, strict=True)]
    assert scores_of(looked[0]) == pytest.approx(wanted, abs=1e-3)
    assert line["objective/scores"] == pytest.approx(np.mean(wanted), abs=1e-3)
    assert line["rewards/reward_model/mean"] == pytest.approx(lowest.mean(), abs=1e-3)
    assert np.abs(np.diff(both, axis=0)).max() > 0.1


def test_gold_reward_is_logged_and_evaluated_on_but_never_optimised(train, rewards, tmp_path):
    held_out = write_rows(tmp_path / "held_out.jsonl", tiny_rows()[:2])
    flags = {"eval_dataset": held_out, "eval_samples": 2, "max_steps": 2}
    _, plain = train(**flags)
    weights = train.weights
    _, gold = train(eval_reward=rewards("length"), **flags)
    evaluations = {key for key in plain[0] if key.startswith("eval/")}
    drop = lambda line: {k: v for k, v in line.items() if k != "gold_reward"}
    assert_same_metrics([drop(line) for line in gold], plain, rel=0, abs_=0, without=evaluations)
    assert all(furthest(weights[name], train.weights[name]) == 0 for name in weights)
    for line in gold[1:]:
        assert line["gold_reward"] == pytest.approx(line["completions/mean_length"])
    for line in (gold[0], gold[2]):
        assert line["eval/reward"] == pytest.approx(line["eval/mean_length"])
    assert all("gold_reward" not in line for line in plain)


# The update -------------------------------------------------------------------------------------------------


def test_target_kl_ends_the_passes_before_the_update_that_goes_too_far(train, recorded):
    # the second pass is looked at and not made: the run is one of single passes, step after step
    rollouts, flags = recorded(SCORES, SCORES[::-1]), {"max_steps": 2, "learning_rate": 1e-3}
    single = train(**rollouts, **flags)[1]
    weights = train.weights
    ended = train(**rollouts, **flags, num_ppo_epochs=4, target_kl=1e-5)[1]
    assert [line["updates"] for line in ended] == [line["updates"] for line in single] == [1, 1]
    assert all(furthest(weights[name], train.weights[name]) == 0 for name in weights)
    for line, wanted in zip(ended, single, strict=True):
        assert line["policy/approxkl_last"] > 1e-5 and line["grad_norm"] == wanted["grad_norm"]
    free = train(**rollouts, **flags, num_ppo_epochs=4, target_kl=math.inf)[1]
    assert [line["updates"] for line in free] == [4, 4]


def test_target_kl_is_a_mean_over_tokens(train, recorded):
    flags = {"learning_rate": 1e-3, "num_ppo_epochs": 2}
    [line] = train(**recorded(SCORES), **flags, target_kl=math.inf)[1]
    moved = line["policy/approxkl_last"]  # of the second pass, over 10 tokens
    for target, updates in ((0.9 * moved, 1), (1.1 * moved, 2)):
        assert train(**recorded(SCORES), **flags, target_kl=target)[1][0]["updates"] == updates


def test_max_kl_is_that_per_token_of_k3(train, recorded):
    [line] = train(**recorded(SCORES), ref_model=str(ROOT / "tiny" / "base"))[1]
    assert abs(line["objective/kl"]) > 1.3 * line["kl"]  # per completion, of 2.5 tokens in the mean
    for bound, steps in ((0.9 * line["kl"], 1), (1.1 * line["kl"], 2)):
        flags = {
            "max_kl": bound,
            "max_steps": 2,
            "learning_rate": 0.0,
            "ref_model": str(ROOT / "tiny" / "base"),
        }
        assert len(train(**recorded(SCORES, SCORES), **flags)[1]) == steps


def test_learning_rates_of_both_models_follow_the_schedule(train, recorded):
    flags = {"max_steps": 6, "warmup_steps": 2, "lr_schedule": "linear"}
    flags |= {"learning_rate": 1e-4, "value_learning_rate": 3e-4}
    lines = train(**recorded(SCORES), **flags)[1]
    shares = [0.5, 1, 1, 3 / 4, 2 / 4, 1 / 4]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-4 * share for share in shares])
    assert [line["learning_rate/value"] for line in lines] == pytest.approx([3e-4 * x for x in shares])
    weights = train.weights
    train(**recorded(SCORES), **flags | {"lr_schedule": "constant"})  # and reach the optimizers
    assert all(furthest(weights[name], train.weights[name]) > 1e-5 for name in weights)


def test_schedule_and_kl_weight_of_the_policy_begin_behind_the_value_warmup(train, recorded):
    flags = {"max_steps": 6, "value_warmup_steps": 2, "warmup_steps": 2, "kl_controller": "adaptive"}
    lines = train(**recorded(SCORES), **flags, kl_horizon=10.0)[1]
    shares = [0, 0, 0.5, 1, 1, 1]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-4 * share for share in shares])
    assert [line["learning_rate/value"] for line in lines] == pytest.approx(
        [3e-4 * x for x in shares[2:] + [1, 1]]
    )
    coefs = [line["objective/kl_coef"] for line in lines]
    assert coefs[0] == coefs[1] == coefs[2] > coefs[3] > coefs[5]


def test_minibatches_are_shuffled_anew_in_every_pass_and_step(one_cpu):
    args = ppo.Args(batch_size=32, num_generations=2, num_ppo_epochs=2, num_minibatches=4)
    sequences = [ppo.Sequence(np.arange(3), np.arange(3) > 1) for _ in range(32)]
    plans = [ppo.plan_updates(sequences, step, args, 1)[0] for step in (1, 2, 1)]
    orders = [np.concatenate([ids for ids, _ in plan]).reshape(2, 32) for plan in plans]  # (passes, B)
    assert all(sorted(order) == list(range(32)) for plan in orders for order in plan)
    assert all((order[0::2] + 1 == order[1::2]).all() for plan in orders for order in plan)  # whole groups
    assert (orders[0] == orders[2]).all()
    different = [*orders[0], *orders[1]]
    assert all((a != b).any() for n, a in enumerate(different) for b in different[:n])


def test_run_stops_above_max_kl_and_saves_both_models(train, capsys):
    folder, lines = train(max_steps=5, max_kl=1e-6)
    assert [line["step"] for line in lines] == [1, 2]  # at the first, the policy is the reference
    assert (folder / "model").is_dir() and (folder / "value_model").is_dir()
    assert "is above --max-kl 1e-06" in capsys.readouterr().out


def test_value_warmup_trains_the_value_model_alone(train, recorded):
    flags = {"max_steps": 1, "num_ppo_epochs": 2, "entropy_coef": 0.1, "value_warmup_steps": 1}
    _, [line] = train(**recorded(SCORES), **flags)
    start = stock(ROOT / "tiny" / "sft").state_dict()
    assert furthest(train.weights["model"], start) == 0 and line["policy/approxkl_last"] == 0
    assert train.weights["value_model"]["score.weight"].abs().min() > 1e-5
    assert line["grad_norm"] > 0 and line["updates"] == 2
    _, lines = train(**recorded(SCORES), **flags | {"max_steps": 2})
    assert lines[0]["policy/approxkl_last"] == 0 < lines[1]["policy/approxkl_last"]
    assert lines[1]["val/mean"] != 0 and furthest(train.weights["model"], start) > 5e-5


def test_checkpoint_within_the_value_warmup_changes_nothing(train, recorded):
    flags = {"max_steps": 2, "value_warmup_steps": 1}
    train(**recorded(SCORES), **flags)
    weights = train.weights
    train(**recorded(SCORES), **flags, save_every=1)
    assert furthest(weights["value_model"], train.weights["value_model"]) == 0
    assert furthest(weights["model"], train.weights["model"]) == 0


def test_checkpoint_changes_nothing(train, recorded):
    train(**recorded(SCORES), max_steps=2)
    weights = train.weights
    train(**recorded(SCORES), max_steps=2, save_every=1)
    assert all(furthest(weights[name], train.weights[name]) == 0 for name in weights)


def test_entropy_bonus_raises_the_entropy(train, recorded):
    flags = {"max_steps": 3, "num_ppo_epochs": 2, "learning_rate": 3e-4}
    entropies = [
        train(**recorded(SCORES), **flags, entropy_coef=coef)[1][-1]["policy/entropy_avg"]
        for coef in (-0.5, 0.0, 0.5)
    ]
    assert entropies[0] + 0.01 < entropies[1] < entropies[2] - 0.01


def test_clip_ranges_reach_the_loss(train, recorded, losses):
    train(**recorded(SCORES), epsilon=0.1, epsilon_high=0.3, dual_clip=4.0)
    train(**recorded(SCORES), epsilon=0.1)
    wanted = [{"epsilon": 0.1, "epsilon_high": 0.3, "dual_clip": 4.0}]
    wanted.append({"epsilon": 0.1, "epsilon_high": 0.1, "dual_clip": None})
    assert [x.settings for x in losses] == wanted


def test_vf_coef_scales_the_gradient_of_the_value_model_alone(train, recorded):
    [one], [other] = (train(**recorded(SCORES), vf_coef=coef)[1] for coef in (0.1, 0.2))
    assert other["grad_norm/value"] == pytest.approx(2 * one["grad_norm/value"], rel=1e-5)
    assert other["grad_norm"] == one["grad_norm"] and other["loss/value_avg"] == one["loss/value_avg"]


def test_nothing_is_computed_over_anything_but_real_tokens(train, recorded, monkeypatch):
    # NaN in every state but those before and behind the tokens of completions
    flags = {"reward_model": (JUDGE,), "num_ppo_epochs": 2, "truncated": "bootstrap", "entropy_coef": 0.1}
    wanted = train(**flags, **recorded(SCORES, answers=CUT))[1]
    weights, planted = train.weights, []

    def spoilt(model, batch, *rest):
        hidden = packed_hidden_states(model, batch, *rest)
        read = torch.zeros(hidden.shape[1], dtype=torch.bool)
        read[batch.predictor_index] = read[batch.completion_index] = True
        planted.append(int((~read).sum()))
        return hidden.masked_fill(~read[None, :, None], math.nan)

    packed_hidden_states = common.packed_hidden_states
    for module in (common, ppo):
        monkeypatch.setattr(module, "packed_hidden_states", spoilt)
    found = train(**flags, **recorded(SCORES, answers=CUT))[1]
    assert_same_metrics(found, wanted, rel=0, abs_=0)
    assert all(furthest(weights[name], train.weights[name]) == 0 for name in weights)
    assert sum(planted) > 100


# Models -----------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch):
    """The models of a run in the order in which they are loaded, with their weights as they were then."""
    found = []
    for name in ("load_model", "load_reward_model"):
        load = getattr(ppo, name)

        def spy(*args, load=load):
            model = load(*args)
            weights = {key: x.detach().clone() for key, x in model.state_dict().items()}
            found.append(SimpleNamespace(model=model, before=weights))
            return model

        monkeypatch.setattr(ppo, name, spy)
    return found


def test_two_models_move_and_are_saved_and_two_stay(train, loaded):
    folder, _ = train(reward_model=(JUDGE,), num_ppo_epochs=2, max_steps=2, batch_size=8)
    policy, value_model, ref_policy, judge = loaded
    for moved, name in ((policy, "model"), (value_model, "value_model")):
        after = moved.model.state_dict()
        shares = {
            key: (after[key] != moved.before[key]).float().mean().item()
            for key in after
            if not (moved is value_model and "embed" in key)  # rows of tokens that were read
        }
        assert {key: share for key, share in shares.items() if share < 0.9} == {}
        saved = load_file(folder / name / "model.safetensors")
        assert all(torch.equal(saved[key], after[key].to(saved[key].dtype)) for key in saved)
        assert (saved.keys() | {"lm_head.weight"} if name == "model" else saved.keys()) == after.keys()
    for kept in (ref_policy, judge):
        assert furthest(kept.before, kept.model.state_dict()) == 0
        assert not any(p.requires_grad or p.grad is not None for p in kept.model.parameters())
    assert furthest(policy.before, ref_policy.before) == 0 and furthest(value_model.before, judge.before) == 0


def test_saved_value_model_reloads_as_a_stock_classifier(train, loaded):
    folder, _ = train(reward_model=(JUDGE,))
    model = AutoModelForSequenceClassification.from_pretrained(folder / "value_model", dtype=torch.float32)
    offset = stock_critic().config.reward_offset
    assert model.config.num_labels == 1 and model.config.reward_offset == offset != 0
    value_model, prompt_ids = loaded[1].model.eval(), tiny_tokenizer()(PROMPTS[0]).input_ids
    sequence = ppo.Sequence(np.array([*prompt_ids, *ANSWERS[3]]), np.arange(len(prompt_ids) + 4) > 5)
    with torch.no_grad():
        for p in value_model.parameters():  # as it is stored
            p.copy_(p.bfloat16())
        batch = common.collate([sequence])
        found = ppo.token_values(value_model, batch)[:, 1].tolist()
        model.config.pad_token_id = None
        wanted = stock_values(model.eval(), sequence.input_ids[:6].tolist(), sequence.input_ids[6:].tolist())
    assert found == pytest.approx(wanted[1:].tolist(), abs=1e-5)


def test_value_model_from_the_reward_model_says_its_score_behind_an_answer(one_cpu):
    args, tokenizer = ppo.Args(), tiny_tokenizer()
    model = ppo.load_reward_model(JUDGE, args, tokenizer, CPU)
    prompt = ppo.Prompt(tokenizer("1 + 1 =").input_ids, {"prompt": "1 + 1 ="})
    ids = [tokenizer(text, add_special_tokens=False).input_ids + [END] for text in (" 2", "two and 3", "1")]
    rollout = [ppo.completion_of(tokenizer, prompt, x, np.zeros(len(x), np.float32)) for x in ids]
    with torch.no_grad():
        values = ppo.token_values(model, common.collate([(c.input_ids, c.trained) for c in rollout]))
        stock_scores = [stock_values(stock_critic(), prompt.input_ids, x)[-1].item() for x in ids]
    last = np.cumsum([len(x) for x in ids]) - 1
    assert values[last, 1].tolist() == pytest.approx(stock_scores, abs=1e-4)
    scores = ppo.judge_rewards(model, tokenizer, rollout, args, CPU)
    assert scores.tolist() == pytest.approx(stock_scores, abs=1e-4) and np.std(stock_scores) > 0.01


def test_value_model_from_the_policy_says_0_at_first(train, recorded, looked, loaded):
    _, [line] = train(**recorded(SCORES), value_init="policy", reward_model=(JUDGE,))
    assert looked[0].values.tolist() == [0] * 10 and line["val/mean"] == line["val/explained_var"] == 0
    policy, value_model = (x.before for x in loaded[:2])
    assert {key for key in value_model if key not in policy} == {"score.weight"}
    assert all(torch.equal(policy[key], value_model[key]) for key in policy.keys() & value_model.keys())
    assert train.weights["value_model"]["score.weight"].abs().min() > 0
    # a head of 0 lets no gradient through until it has moved
    before, after = ({k: x[k] for k in x if k in policy} for x in (value_model, train.weights["value_model"]))
    assert furthest(before, after) == 0


def test_value_model_of_a_model_without_a_chat_template_has_its_new_tokens(train, random_model, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(random_model, folder)
    (folder / "chat_template.jinja").unlink()
    for path in folder.glob("*token*.json"):
        text = path.read_text().replace("<|im_start|>", "<|a|>").replace("<|im_end|>", "<|b|>")
        path.write_text(text)
    rows = [{"prompt": [{"role": "user", "content": "blue"}]}] * 2
    _, [line] = train(rows, model=str(folder))
    assert line["grad_norm"] > 0 and line["grad_norm/value"] > 0


def test_value_model_keeps_the_embeddings_that_its_reward_model_has_learnt(
    train, random_model, loaded, tmp_path
):
    folder, judge = tmp_path / "base", tmp_path / "judge"
    shutil.copytree(random_model, folder)
    (folder / "chat_template.jinja").unlink()  # so that the policy gets ChatML, and its tokens
    for path in folder.glob("*token*.json"):
        path.write_text(path.read_text().replace("<|im_start|>", "<|a|>").replace("<|im_end|>", "<|b|>"))
    tokenizer = ppo.load_tokenizer(ppo.Args(model=str(folder)))
    known = len(tokenizer)
    ppo.use_chatml(tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size), mean_resizing=False)
    model.get_input_embeddings().weight.data[known:] = 0.5
    model.save_pretrained(judge)
    tokenizer.save_pretrained(judge)
    rows = [{"prompt": [{"role": "user", "content": "blue"}]}] * 2
    train(rows, model=str(folder), reward_model=(str(judge),), reward=())
    value_model = loaded[1].before["model.embed_tokens.weight"]
    assert (value_model[known : len(tokenizer)] == 0.5).all()


def storages():
    """Bytes of every storage that a tensor or its gradient holds, by address."""
    with_gradients = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    with_gradients += [x.grad for x in with_gradients if x.is_leaf and x.grad is not None]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in with_gradients}


def test_memory_is_16_bytes_a_parameter_that_moves_and_4_a_parameter_that_stays(train, recorded, loaded):
    gc.collect()
    before, during = storages(), []
    measure = lambda *_: during.append(storages())
    hook = register_optimizer_step_post_hook(measure)
    train(reward_model=(JUDGE,), num_ppo_epochs=2, **recorded(SCORES))
    hook.remove()
    copies = {x.data_ptr() for one in loaded for x in one.before.values()}  # of the fixture
    new = [{at: size for at, size in seen.items() if at not in before.keys() | copies} for seen in during]
    sizes = [sum(p.numel() for p in one.model.parameters()) for one in loaded]
    policy, value_model, ref_policy, judge = sizes
    assert len(new) == 4 and policy > 800_000 and value_model > 1_000_000
    wanted = 16 * (policy + value_model) + 4 * (ref_policy + judge)
    assert sum(new[2].values()) == pytest.approx(wanted, rel=0.005)  # as the policy is updated a second time
    assert sum(new[3].values()) == pytest.approx(wanted - 4 * policy, rel=0.005)  # its gradients are gone


def test_offload_moves_the_frozen_models_in_and_out_and_no_others(train, loaded, monkeypatch, tmp_path):
    held_out = write_rows(tmp_path / "held_out.jsonl", tiny_rows()[:2])
    flags = {"reward_model": (JUDGE,), "num_ppo_epochs": 2, "max_steps": 2, "batch_size": 8}
    flags |= {"eval_dataset": held_out, "eval_samples": 1}
    _, wanted = train(**flags)
    weights = train.weights
    loaded.clear()
    home, used, to = {}, [], torch.nn.Module.to

    def spy(module, device):
        home[id(module)] = "cpu" if isinstance(device, str) else "device"  # both are the CPU here
        moves.setdefault(id(module), []).append(home[id(module)])
        return to(module, device)

    def checked(model, *rest):
        used.append(home[id(model)])
        return packed_hidden_states(model, *rest)

    moves, packed_hidden_states = {}, common.packed_hidden_states
    monkeypatch.setattr(torch.nn.Module, "to", spy)
    for module in (common, ppo):
        monkeypatch.setattr(module, "packed_hidden_states", checked)
    away = []
    note = lambda *_: away.append([home[id(x.model)] for x in loaded])
    hook = register_optimizer_step_post_hook(note)
    _, found = train(**flags, offload=True)
    hook.remove()
    assert_same_metrics(found, wanted, rel=0, abs_=0)
    assert all(furthest(weights[name], train.weights[name]) == 0 for name in weights)
    policy, value_model, ref_policy, judge = (moves[id(x.model)] for x in loaded)
    assert policy == value_model == ["device"]
    for frozen in (ref_policy, judge):
        assert frozen == ["device", "cpu"] * (len(frozen) // 2)
    assert set(used) == {"device"} and len(moves) == 4
    assert away == [["device", "device", "cpu", "cpu"]] * 8


# Memory flags, continued runs -------------------------------------------------------------------------------

GROUPS = [[*range(10 * n, 10 * n + n % 4), END] for n in range(1, 9)]


@pytest.mark.parametrize(
    "flags",
    [
        {"max_tokens_per_micro_batch": 24},
        {"share_prompt": False},
        {"share_prompt": False, "max_tokens_per_micro_batch": 24},
        {"gradient_checkpointing": True},
        {"attn": "eager"},
        {"num_generations": 4},
        {"num_generations": 1},
    ],
    ids=lambda flags: "-".join(flags),
)
def test_memory_flags_and_the_size_of_groups_change_nothing(train, recorded, flags):
    scores = (1.0, 0.0, 3.0, -1.0, None, 2.0, 2.0, 5.0)
    rollout = recorded(scores, answers=GROUPS, prompts=PROMPTS[:1])
    shared = {"batch_size": 8, "num_ppo_epochs": 2, "ref_model": str(ROOT / "tiny" / "base")}
    shared |= {"reward_model": (JUDGE,), "entropy_coef": 0.01, "learning_rate": 1e-5}
    wanted = train(**rollout, **shared)[1]
    weights = train.weights
    found = train(**rollout, **shared | flags)[1]
    others = set()
    if "num_generations" in flags:
        others = {key for key in wanted[0] if key.startswith("completions/") or key == "epoch"}
    assert_same_metrics(found, wanted, rel=1e-4, abs_=1e-5, without=others)
    for name, rate in (("model", 1e-5), ("value_model", 3e-4)):
        assert furthest(weights[name], train.weights[name]) < 0.2 * rate
    assert wanted[0]["grad_norm"] > 0.01


def test_continued_run_equals_one_that_never_stopped(train, tmp_path):
    flags = {
        "max_steps": 3,
        "save_every": 1,
        "num_ppo_epochs": 2,
        "num_minibatches": 2,
        "normalize_reward": True,
    }
    flags |= {"ref_model": str(ROOT / "tiny" / "base"), "kl_controller": "adaptive", "kl_target": 0.1}
    flags |= {"kl_horizon": 20.0, "reward_model": (JUDGE,), "warmup_steps": 3}
    folder, wanted = train(**flags)
    weights, copy = train.weights, tmp_path / "continued"
    shutil.copytree(folder, copy)
    # As if it had been stopped in its third step
    for name in ("model", "value_model", "checkpoints/step_00000003"):
        shutil.rmtree(copy / name)
    _, found = train(output_dir=str(copy), resume=True, **flags)
    assert_same_metrics(found, wanted, rel=0, abs_=0)
    assert all(furthest(weights[name], train.weights[name]) == 0 for name in weights)
    one, other = state(folder, 3), state(copy, 3)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for name in ("model", "value_model"):
        left, right = (x / name / "model.safetensors" for x in (folder, copy))
        assert left.read_bytes() == right.read_bytes()
    # and all that moves was in it
    assert one["model/adaptive.moments"][0] == 3 * 4
    coefs = [line["objective/kl_coef"] for line in wanted]
    assert len(set(coefs)) == 3 and one["model/adaptive.kl_coef"] not in coefs
    moments = [name for name in one if name.endswith("exp_avg_sq")]
    assert {re.search(r"policy|value_model", name).group() for name in moments} == {"policy", "value_model"}
    assert wanted[2]["loss"] != wanted[1]["loss"]


def test_continued_run_takes_the_kl_weight_that_it_is_given(train, tmp_path):
    folder, _ = train(max_steps=2, save_every=1, kl_coef=0.8)
    for name in ("model", "value_model", "checkpoints/step_00000002"):
        shutil.rmtree(folder / name)
    _, found = train(max_steps=2, save_every=1, kl_coef=0.1, output_dir=str(folder), resume=True)
    assert [line["objective/kl_coef"] for line in found] == [0.8, 0.1]


def test_run_that_its_kl_has_stopped_can_be_continued(train):
    folder, lines = train(max_steps=3, max_kl=1e-9, save_every=50, ref_model=str(ROOT / "tiny" / "base"))
    assert len(lines) == 1 and [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000001"]


def test_replayed_rollouts_train_as_they_did(train, rewards):
    folder, wanted = train(save_rollouts=True, num_ppo_epochs=2, max_steps=2, reward_model=(JUDGE,))
    rollouts = str(folder / "rollouts.jsonl")
    weights = train.weights
    flags = {"num_ppo_epochs": 2, "max_steps": 2, "reward_model": (JUDGE,)}
    _, found = train(replay_rollouts=rollouts, reward=rewards("residue"), **flags)
    assert_same_metrics(found, wanted)
    assert all(furthest(weights[name], train.weights[name]) < 1e-6 for name in weights)


# Errors -----------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path, rewards):
    """refused(pattern, **flags): one line on stderr, exit status 2, no model, nothing written."""

    def run(pattern, **flags):
        for name in ("load_model", "load_reward_model"):
            monkeypatch.setattr(ppo, name, lambda *_: pytest.fail("a model was loaded"))
        defaults = {"dataset": (write_rows(tmp_path / "rows.jsonl", tiny_rows()[:4]),)}
        defaults |= {"output_dir": str(tmp_path / "run"), "reward": rewards("residue")}
        with pytest.raises(SystemExit) as stop:
            ppo.main(ppo.Args(**(defaults | flags)))
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1, lines
        assert lines[0].startswith("error: ") and re.search(pattern, lines[0]), lines[0]
        assert not (tmp_path / "run").exists()

    return run


NEEDS_1 = ("max_prompt_length", "max_completion_length", "max_tokens_per_micro_batch", "batch_size")
NEEDS_1 += ("num_generations", "generation_batch_size", "num_ppo_epochs", "num_minibatches", "eval_samples")
ABOVE_0 = ("epsilon", "epsilon_high", "kl_target", "kl_horizon", "max_grad_norm")
ABOVE_0 += ("reward_clip", "cliprange_value", "target_kl", "max_kl")
NOT_BELOW_0 = ("max_steps", "value_warmup_steps", "vf_coef", "kl_coef", "missing_eos_penalty", "weight_decay")
NOT_BELOW_0 += (
    "learning_rate",
    "value_learning_rate",
    "warmup_steps",
    "eval_every",
    "save_every",
    "num_eval",
)
RANGES = [(name, 0, "must be at least 1, not 0") for name in NEEDS_1]
RANGES += [(name, 0.0, "must be above 0, not 0.0") for name in ABOVE_0]
RANGES += [(name, -1, "must be at least 0, not -1") for name in NOT_BELOW_0]
RANGES += [(name, math.nan, "must .*, not nan") for name in ("kl_coef", "max_grad_norm", "learning_rate")]


@pytest.mark.parametrize("name, value, told", RANGES, ids=[f"{name}-{value}" for name, value, _ in RANGES])
def test_numbers_out_of_range_end_the_run_with_one_line(refused, name, value, told):
    refused(f"--{name.replace('_', '-')} {told}", **{name: value})


@pytest.mark.parametrize(
    "pattern, flags",
    [
        (r"--gamma must lie in \[0, 1\], not 1\.5", {"gamma": 1.5}),
        (r"--lam must lie in \[0, 1\], not -0\.1", {"lam": -0.1}),
        (r"--lam must lie in \[0, 1\], not nan", {"lam": math.nan}),
        (r"--dual-clip must be above 1, not 1\.0", {"dual_clip": 1.0}),
        (r"--batch-size 10 is no multiple of --num-generations 4", {"batch_size": 10, "num_generations": 4}),
        (r"--num-minibatches 3: more than the prompts", {"batch_size": 8, "num_minibatches": 3}),
        (r"--value-init reward: there is no --reward-model", {"value_init": "reward"}),
        (r"--temperature must be above 0", {"temperature": 0.0}),
        (r"--top-p must be 1", {"top_p": 0.9}),
        (r"--reward-weights has 2 numbers for 1 rewards", {"reward_weights": (1.0, 2.0)}),
        (
            r"--reward-weights has 1 numbers for 2 rewards",
            {"reward_weights": (1.0,), "reward_model": (JUDGE, JUDGE)},
        ),
        (r"--reward-caps has 3 numbers for 1 rewards", {"reward_caps": (1.0, 2.0, 3.0)}),
        (r"--prompt-template has no \{prompt\}", {"prompt_template": "Question:"}),
        (r"--resume needs --output-dir", {"resume": True, "output_dir": None}),
        (r"--model \./nowhere: no such folder", {"model": "./nowhere"}),
        (r"--ref-model \./nowhere: no such folder", {"ref_model": "./nowhere"}),
        (r"--reward-model \./nowhere: no such folder", {"reward_model": ("./nowhere",)}),
        (r"--reward-model .*sft: no reward model", {"reward_model": (str(ROOT / "tiny" / "sft"),)}),
        (r"nowhere\.jsonl: no such file", {"dataset": ("nowhere.jsonl",)}),
        (r"nowhere\.jsonl: no such file", {"eval_dataset": "nowhere.jsonl"}),
        (r"nowhere\.jsonl: no such file", {"replay_rollouts": "nowhere.jsonl"}),
        (r"nowhere\.py:f: not file\.py:function", {"reward": ("nowhere.py:f",)}),
        (r"nowhere\.py:f: not file\.py:function", {"eval_reward": ("nowhere.py:f",)}),
    ],
)
def test_mistakes_end_the_run_with_one_line_before_a_model_is_loaded(refused, pattern, flags):
    refused(pattern, **flags)


def reward_model_with(folder, tokenizer_of=None):
    """A copy of tiny/reward with another tokenizer, or none."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(JUDGE) / name, folder)
    for path in [*tokenizer_of.glob("*token*"), *tokenizer_of.glob("*.jinja")] if tokenizer_of else ():
        shutil.copy(path, folder)
    return str(folder)


def test_value_model_that_reads_other_tokens_than_the_policy_is_refused(refused, random_model, tmp_path):
    judge = reward_model_with(tmp_path / "judge", random_model)
    told = r"--value-init reward: the tokenizer of .*judge is not that of --model; use --value-init policy"
    refused(told, reward_model=(judge,))


@pytest.mark.parametrize("others", [(), (JUDGE,)])
def test_reward_model_without_a_tokenizer_is_refused(refused, tmp_path, others):
    judge = reward_model_with(tmp_path / "judge")
    refused(r"--reward-model .*judge", reward_model=(*others, judge))


def test_reward_model_without_a_template_for_messages_is_refused(refused, tmp_path):
    judge = tmp_path / "judge"
    shutil.copytree(JUDGE, judge)
    (judge / "chat_template.jinja").unlink()
    told = r"--reward-model .*judge: prompts are messages, and its tokenizer has no chat template"
    rows = write_rows(tmp_path / "asked.jsonl", [{"question": "How many are 1 and 1?"}])
    refused(told, reward_model=(JUDGE, str(judge)), dataset=(rows,))


def test_reward_that_takes_no_columns_is_refused(refused, tmp_path):
    (tmp_path / "mine.py").write_text("def strict(completions): return [0.0] * len(completions)")
    told = r"mine\.py:strict: without \*\*kwargs it cannot take"
    refused(told, reward=(f"{tmp_path / 'mine.py'}:strict",))
