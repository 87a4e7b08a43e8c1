"""rloo_remax.py against the gradient by enumeration, the stock model, and numbers worked by hand."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import calls_of, trainer, written
from samples import END, float64, gradient_norm, stock
from test_grpo import Table, distance, expected_gradient, regularised_gradient, true_gradient

import rloo_remax as rr
from common import KL

pytestmark = pytest.mark.usefixtures("process_group")
ALGORITHMS = ("reinforce", "rloo", "remax", "reinforce_pp", "reinforce_pp_baseline")


def settings(algorithm, gamma=1.0):
    return SimpleNamespace(algorithm=algorithm, gamma=gamma)


def plain(logps, advantages):
    return rr.reinforce_loss(logps, None, advantages)


def clipped(logps, advantages):
    return rr.reinforce_loss(logps, torch.exp(logps - logps.detach()), advantages, clip=(0.2, 0.2))


def greedy_reward(table):
    """Of the sequence that takes the likeliest symbol each time."""
    greedy, row = (), 0
    while greedy not in table.sequences:  # rows of the table: the empty prefix, a, b, c, aa, ab ...
        greedy += (table.logits[row].argmax().item(),)
        row = 3 * row + 1 + greedy[-1]
    return table.rewards[table.sequences.index(greedy)]


SIZES = [("reinforce", 1), ("rloo", 2), ("rloo", 3), ("remax", 1), ("remax", 2)]


@pytest.mark.parametrize("algorithm, group_size", SIZES)
@pytest.mark.parametrize("end", [None, 2], ids=["equal-lengths", "an-end"])
def test_gradient_is_that_of_the_expected_reward(end, algorithm, group_size):
    table = Table(6, end)
    greedy = greedy_reward(table)
    advantages_of = {
        "reinforce": lambda rewards: rewards,
        "rloo": rr.rloo_advantages,
        "remax": lambda rewards: rr.remax_advantages(rewards, greedy.expand(len(rewards))),
    }[algorithm]
    for loss_of in (plain, clipped):
        found = expected_gradient(table, group_size, advantages_of, loss_of)
        assert distance(found, true_gradient(table)) < 1e-6


def penalised(table, ref, kl_coef, group_size, advantages_of):
    """Mean of minus the loss's gradient under advantages of tokens, from rewards and their penalties."""
    groups = torch.tensor(list(itertools.product(range(len(table.sequences)), repeat=group_size)))
    chances = table.probabilities().detach()[groups].prod(1)
    flat, lengths = groups.flatten().tolist(), table.lengths[groups].flatten()
    logps = table.token_logps(flat)
    penalties = kl_coef * rr.kl_k1(logps, ref.token_logps(flat)).detach()
    sequence_index = torch.arange(len(flat)).repeat_interleave(lengths)
    advantages = advantages_of(table.rewards[groups], penalties, sequence_index)
    weights = (chances / group_size).repeat_interleave(group_size)[sequence_index]
    return -table.gradient((plain(logps, advantages) * weights).sum())


@pytest.mark.parametrize("algorithm", ["reinforce", "rloo", "remax"])
@pytest.mark.parametrize("end", [None, 2], ids=["equal-lengths", "an-end"])
def test_kl_in_the_reward_gives_the_gradient_of_the_kl_of_policy_and_reference(algorithm, end):
    table, ref = Table(9, end), Table(10, end)

    def advantages_of(rewards, penalties, sequence_index):
        greedy = float64(0.3).expand(len(rewards))
        return rr.token_advantages(rewards, penalties, sequence_index, greedy, settings(algorithm))

    wanted = regularised_gradient(table, ref, 0.7)
    assert distance(penalised(table, ref, 0.7, 2, advantages_of), wanted) < 1e-6
    assert distance(true_gradient(table), wanted) > 0.01


@pytest.mark.parametrize("end", [None, 2], ids=["equal-lengths", "an-end"])
def test_returns_of_tokens_give_that_gradient_as_well_and_k2_in_the_loss_does_not(end):
    # What was paid before a token is not its doing; to leave it out changes no expectation.
    table, ref = Table(11, end), Table(12, end)
    returns = lambda rewards, *rest: rr.reinforce_pp_returns(rewards.flatten(), *rest, gamma=1.0)
    wanted, sequences = regularised_gradient(table, ref, 0.7), range(len(table.sequences))
    assert distance(penalised(table, ref, 0.7, 1, returns), wanted) < 1e-6
    # deviation 3
    chances = table.probabilities().detach().repeat_interleave(table.lengths)
    losses = KL["k2"](table.token_logps(sequences), ref.token_logps(sequences).detach())
    with_k2 = true_gradient(table) - 0.7 * table.gradient((chances * losses).sum())
    assert distance(with_k2, wanted) > 0.01


def test_loss_without_a_clip_by_hand():
    assert plain(float64(-2.0), float64(3.0)).item() == 6


def test_rloo_advantages_by_hand():
    found = rr.rloo_advantages(float64([1, 2, 6], [5, 5, 5]))
    assert found.tolist() == [[1 - 4, 2 - 3.5, 6 - 1.5], [0, 0, 0]]
    assert rr.rloo_advantages(float64([0.1] * 3)).abs().max() < 1e-15
    # a completion without a score takes no part
    nan = math.nan
    found = rr.rloo_advantages(float64([1, nan, 3, 8], [nan, 5, nan, nan], [nan] * 4))
    assert found.tolist() == [[1 - 5.5, 0, 3 - 4.5, 8 - 2], [0] * 4, [0] * 4]


def test_rloo_baseline_excludes_the_completion_itself_and_advantages_sum_to_zero():
    scores = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = rr.rloo_advantages(scores)
    assert before.sum(1).abs().max() < 1e-12
    for i in range(4):
        changed = scores.clone()
        changed[:, i] += 3
        difference = rr.rloo_advantages(changed) - before
        others = [j for j in range(4) if j != i]
        assert torch.allclose(difference[:, i], float64(3.0)), "its own reward is in its baseline"
        assert torch.allclose(difference[:, others], float64(-1.0))


def test_remax_advantages_by_hand():
    nan = math.nan
    found = rr.remax_advantages(float64([1, 0, nan], [2, 3, 4]), float64(0.25, 3))
    assert found.tolist() == [[0.75, -0.25, 0], [-1, 0, 1]]


def test_returns_by_hand():
    # two sequences of 3 tokens and 1; penalties 1, 2, 4 and 8
    index, given = torch.tensor([0, 0, 0, 1]), (float64(10, 5), float64(1, 2, 4, 8))
    for gamma, returns in ((0.5, [-1 - 0.5 * 2 + 0.25 * 6, -2 + 0.5 * 6, 6, -3]), (1.0, [3, 4, 6, -3])):
        assert rr.reinforce_pp_returns(*given, index, gamma).tolist() == returns


def test_whitened_returns_by_hand():
    assert rr.whiten_returns(float64(1, 2, 3)).tolist() == pytest.approx([-1, 0, 1])
    assert rr.whiten_returns(float64(0, 0, 0, 2)).tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5])
    for values in ([0.1] * 3, [7.0], [], [-2.0, -2.0]):
        assert rr.whiten_returns(torch.tensor(values)).tolist() == [0] * len(values)


# Five tokens: sequences of 2 and 1 of one prompt, of 1 and 1 of another.
INDEX = torch.tensor([0, 0, 1, 2, 3])
PENALTIES = torch.tensor([0.5, 1.0, 2.0, -1.0, 0.0])
BY_HAND = [
    # rewards minus the sequence's penalties: 4 - 1.5, 1 - 2; 0 + 1, 6
    ("reinforce", 1.0, (2.5, 2.5, -1, 1, 6)),
    ("rloo", 1.0, (3.5, 3.5, -3.5, -5, 5)),
    ("remax", 1.0, (2.0, 2.0, -1.5, -1, 4)),
    # returns, which are whitened
    ("reinforce_pp", 1.0, (4 - 1.5, 4 - 1, 1 - 2, 0 + 1, 6)),
    ("reinforce_pp", 0.5, (0.5 * 3 - 0.5, 3, -1, 1, 6)),
    # rewards 1.5, -1.5; -3, 3
    ("reinforce_pp_baseline", 1.0, (1.5 - 1.5, 1.5 - 1, -1.5 - 2, -3 + 1, 3)),
]


@pytest.mark.parametrize("algorithm, gamma, wanted", BY_HAND)
def test_advantages_of_tokens_by_hand(algorithm, gamma, wanted):
    rewards, greedy = float64([4, 1], [0, 6]), float64(0.5, 2)
    found = rr.token_advantages(rewards, PENALTIES, INDEX, greedy, settings(algorithm, gamma))
    if "pp" in algorithm:
        wanted = (np.array(wanted) - np.mean(wanted)) / np.std(wanted, ddof=1)
    assert found.tolist() == pytest.approx([*wanted], rel=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_completion_without_a_reward_gets_no_advantage(algorithm):
    rewards = float64([math.nan, 4], [1, 8])
    index = torch.tensor([0, 0, 1, 2, 3, 3, 3])
    found = rr.token_advantages(rewards, torch.zeros(7), index, float64(1, 2), settings(algorithm))
    assert found[:2].tolist() == [0, 0] and found[3:].abs().max() > 0


@pytest.fixture
def train(tmp_path, one_cpu):
    """As `trainer` says: 2 steps of 4 prompts on tiny/sft."""
    flags = {"batch_size": 16, "num_generations": 4, "max_completion_length": 12, "max_steps": 2}
    return trainer(rr, tmp_path, reward="residue", **flags)


LENGTHS, SCORES, GREEDY_SCORES = (1, 3, 2, 2), (1.0, 0.0, 3.0, 1.0), (0.5, 2.0)  # of 2 groups of 2
ANSWERS = [[*range(10, 9 + n), END] for n in LENGTHS]


@pytest.fixture
def scripted(monkeypatch):
    """scripted(scores, cut): answers as `written` says, with these rewards, in place of sampled ones."""

    def script(scores=SCORES, cut=()):
        def roll_out(policy, tokenizer, prompts, group_size, temperature, *_):
            sampled = (LENGTHS, cut) if temperature else ([1] * len(prompts),)
            return written(rr, prompts, group_size, *sampled)

        def score(rewarders, rollout, *_):
            lines = {len(scores): scores, len(GREEDY_SCORES): GREEDY_SCORES, 0: ()}
            return float64(*[lines[len(rollout)]] * len(rewarders)).reshape(len(rewarders), len(rollout))

        monkeypatch.setattr(rr, "roll_out", roll_out)
        monkeypatch.setattr(rr, "score", score)

    return script


def stock_logps(name):
    """Log-probs of the tokens of each answer under the stock model, with their gradients."""
    prompt = rr.load_tokenizer(rr.Args())(ROWS[0]["prompt"]).input_ids
    model, found = stock(name), []
    for answer in ANSWERS:
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
        found.append(logits[len(prompt) - 1 : -1].log_softmax(-1)[range(len(answer)), answer])
    return model, found


STD, STD_CENTRED = math.sqrt((21 - 81 / 8) / 7), math.sqrt((5 - 1 / 8) / 7)
STEP = {
    "reinforce": (1, 0, 3, 1),
    "rloo": (1, -1, 2, -2),
    "remax": (0.5, -0.5, 1, -1),
    # of 8 tokens with the rewards 1, 0 0 0, 3 3, 1 1, of which the mean is 9/8
    "reinforce_pp": [(x - 9 / 8) / STD for x in (1, 0, 3, 1)],
    # and 1/2, -1/2 ..., 1 1, -1 -1: the mean is -1/8
    "reinforce_pp_baseline": [(x + 1 / 8) / STD_CENTRED for x in (0.5, -0.5, 1, -1)],
}


ROWS = [{"prompt": "1 + 1 ="}] * 2
SMALL = {"batch_size": 4, "num_generations": 2, "max_steps": 1, "max_completion_length": 8}


def weighted_loss(advantages, logps, count=4):
    """-sum of A log pi over all tokens; `count` completions of at most 8 tokens each."""
    pairs = zip(advantages, logps, strict=True)
    return -sum((a * x).sum() for a, x in pairs) / (count * 8)


@pytest.mark.parametrize("algorithm", STEP)
def test_loss_and_gradient_of_a_step_are_those_of_the_stock_model(train, scripted, algorithm):
    scripted()
    _, [line] = train(ROWS, algorithm=algorithm, **SMALL)
    model, logps = stock_logps("tiny/sft")
    loss = weighted_loss(STEP[algorithm], logps)
    loss.backward()
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert line["grad_norm"] == pytest.approx(gradient_norm(model), rel=1e-4)
    spread = np.repeat(STEP[algorithm], LENGTHS)
    assert line["advantage_std"] == pytest.approx(np.std(spread, ddof=1), rel=1e-5)
    assert line["reward"] == pytest.approx(5 / 4) and line["kl"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("algorithm", ["rloo", "reinforce_pp"])
def test_kl_of_a_step_is_taken_off_the_rewards(train, scripted, algorithm):
    scripted()
    _, [line] = train(ROWS, algorithm=algorithm, kl_coef=0.3, ref_model="tiny/base", **SMALL)
    (_, logps), (_, ref_logps) = stock_logps("tiny/sft"), stock_logps("tiny/base")
    gaps = [0.3 * (x - y).detach() for x, y in zip(logps, ref_logps, strict=True)]
    if algorithm == "rloo":
        a, b, c, d = (r - gap.sum() for r, gap in zip(SCORES, gaps, strict=True))
        advantages = [a - b, b - a, c - d, d - c]
    else:
        columns = zip(SCORES, gaps, strict=True)
        later = [torch.stack([r - gap[t:].sum() for t in range(len(gap))]) for r, gap in columns]
        flat = torch.cat(later)
        advantages = [(x - flat.mean()) / flat.std(unbiased=True) for x in later]
    loss = weighted_loss(advantages, logps).item()
    assert line["loss"] == pytest.approx(loss, rel=1e-4)
    assert line["loss"] != pytest.approx(weighted_loss(STEP[algorithm], logps).item(), rel=1e-2)
    assert line["reward"] == pytest.approx(5 / 4)  # the reward alone


NO_REWARD = {"scores": (1.0, 0.0, 3.0, math.nan)}, {}
CUT_OFF = {"cut": (3,)}, {"mask_truncated": True}


@pytest.mark.parametrize("script, flags", [NO_REWARD, CUT_OFF], ids=["no reward", "cut off"])
@pytest.mark.parametrize("algorithm, advantages", [("reinforce", (1, 0, 3)), ("rloo", (1, -1, 0))])
def test_what_is_not_trained_on_is_in_no_mean(train, scripted, algorithm, advantages, script, flags):
    scripted(**script)
    _, [line] = train(ROWS, algorithm=algorithm, **SMALL, **flags)
    wanted = weighted_loss(advantages, stock_logps("tiny/sft")[1][:3], count=3)
    assert line["loss"] == pytest.approx(wanted.item(), rel=1e-4)
    assert line["completions/clipped_ratio"] == len(script.get("cut", ())) / 4


def test_truncated_importance_weights_of_a_step_by_hand(train, scripted):
    scripted()
    _, [line] = train(ROWS, tis_cap=0.5, **SMALL)
    logps = stock_logps("tiny/sft")[1]  # the sampler's are -1
    weighted = [torch.exp(x.detach() + 1).clamp(max=0.5) * x for x in logps]
    assert line["loss"] == pytest.approx(weighted_loss(STEP["rloo"], weighted).item(), rel=1e-4)


def test_second_pass_over_a_rollout_has_the_ratios_of_both_policies(train, monkeypatch):
    calls = calls_of(monkeypatch, rr, "reinforce_loss")
    _, [line] = train(num_iterations=2, max_steps=1, epsilon=1e-3, epsilon_high=1e-3, kl_coef=0.1)
    passes = calls[: len(calls) // 2], calls[len(calls) // 2 :]  # a call a row: log-probs, ratios, ...
    both = [[torch.cat([arguments[n] for arguments, _ in rows]) for n in (0, 1)] for rows in passes]
    (before, first), (after, second) = both
    assert (first - 1).abs().max() < 1e-4 and (second - 1).abs().max() > 0.01
    torch.testing.assert_close(second, torch.exp(after - before), rtol=1e-4, atol=1e-4)
    assert line["clip_ratio/low_mean"] > 0 and line["clip_ratio/high_mean"] > 0


def test_greedy_baselines_are_of_the_prompts_of_the_step(train, monkeypatch):
    calls = calls_of(monkeypatch, rr, "roll_out")
    train(algorithm="remax", temperature=0.8)
    asked = [arguments[2:5] for arguments, _ in calls]  # prompts, completions of each, temperature
    for sampled, greedy in (asked[:2], asked[2:]):
        assert sampled[1:] == (4, 0.8) and greedy[1:] == (1, 0.0)
        assert sampled[0] == greedy[0] and len(greedy[0]) == 4


@pytest.mark.parametrize("algorithm", ["remax", "reinforce_pp"])
def test_one_completion_of_a_prompt_is_enough_without_a_group_baseline(train, algorithm):
    _, lines = train(algorithm=algorithm, num_generations=1, batch_size=8)
    assert all(line["grad_norm"] > 0.01 and line["reward_std"] == 0 for line in lines)
