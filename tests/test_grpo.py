"""grpo.py: its advantages, losses and weights, the sampler, rewards, rollouts, short runs and errors.

Gradients are held against those of the expected reward over every sequence of a small vocabulary, values
against numbers worked by hand. What dapo.py and rloo_remax.py share with it word for word is tested here.
"""

import functools
import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import grpo

CPU, END = torch.device("cpu"), 2  # <|im_end|> of tiny's tokenizer, whose padding is 0
CLOCK = {"tokens_per_second", "step_time"}  # what no two runs share
CLOCK |= {f"time/{stage}" for stage in ("rollout", "reward", "logprobs", "update")}


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


# Gradients against enumeration ------------------------------------------------------------------------------


class Table:
    """A policy over 3 symbols, one row of random logits for each prefix, and all that it can write.

    Sequences have 3 symbols; with `end` that symbol ends them before.
    """

    def __init__(self, seed, end=None):
        generator = torch.Generator().manual_seed(seed)
        prefixes = [p for n in range(3) for p in itertools.product(range(3), repeat=n)]
        self.logits = torch.randn(13, 3, dtype=torch.float64, generator=generator).requires_grad_()
        full = itertools.product(range(3), repeat=3)
        cut = lambda s: s[: s.index(end) + 1] if end in s else s
        self.sequences = sorted({cut(s) for s in full})
        self.rows = [[prefixes.index(s[:t]) for t in range(len(s))] for s in self.sequences]
        self.lengths = torch.tensor([len(s) for s in self.sequences])
        self.rewards = torch.randn(len(self.sequences), dtype=torch.float64, generator=generator)

    def token_logps(self, ids):
        """Log-probs of the tokens of the sequences `ids`, end to end."""
        rows = [row for i in ids for row in self.rows[i]]
        columns = [token for i in ids for token in self.sequences[i]]
        return self.logits.log_softmax(-1)[rows, columns]

    def probabilities(self):
        """Of every sequence; they sum to 1."""
        logps = self.token_logps(range(len(self.sequences))).split(self.lengths.tolist())
        return torch.stack([x.sum() for x in logps]).exp()

    def gradient(self, value):
        """Of a number that depends on the logits."""
        return torch.autograd.grad(value, self.logits)[0]


def true_gradient(table, values=None):
    """Of the expected reward, or of the expectation of other values of the sequences."""
    return table.gradient((table.probabilities() * (table.rewards if values is None else values)).sum())


def expected_gradient(table, group_size, advantages_of, loss_of, loss_agg="seq_mean_token_sum_norm"):
    """The mean of minus the loss's gradient over all groups that the policy may sample.

    `seq_mean_token_sum_norm` with a longest length of 1 sums the tokens and takes the mean of the sequences.
    """
    groups = torch.tensor(list(itertools.product(range(len(table.sequences)), repeat=group_size)))
    chances = table.probabilities().detach()[groups].prod(1)  # of each group
    assert chances.sum().item() == pytest.approx(1)
    lengths = table.lengths[groups]
    weights = grpo.token_weights(
        lengths.flatten(),
        loss_agg=loss_agg,
        num_sequences=group_size,
        num_tokens=0,
        max_completion_length=1,
    )
    of_sequence = chances.repeat_interleave(group_size) * weights
    logps = table.token_logps(groups.flatten().tolist())
    spread = lambda x: x.repeat_interleave(lengths.flatten())
    losses = loss_of(logps, spread(advantages_of(table.rewards[groups]).flatten()))
    return -table.gradient((losses * spread(of_sequence)).sum())


def on_policy(logps, advantages, **settings):
    settings = {"epsilon": 0.2, "epsilon_high": 0.2} | settings
    return grpo.grpo_loss(logps, logps.detach(), settings.pop("ref", None), advantages, **settings)


def distance(one, other):
    assert other.abs().max() > 0.01
    return (one - other).abs().max().item()


@pytest.mark.parametrize("policy_loss", ["clip", "cispo"])
@pytest.mark.parametrize("end", [None, 2], ids=["equal-lengths", "an-end"])
def test_gradient_with_plain_rewards_is_that_of_the_expected_reward(end, policy_loss):
    table = Table(0, end)
    assert len(table.sequences) == (27 if end is None else 15)
    loss_of = functools.partial(on_policy, policy_loss=policy_loss)
    found = expected_gradient(table, 1, lambda rewards: rewards, loss_of)
    assert distance(found, true_gradient(table)) < 1e-6


@pytest.mark.parametrize("group_size", [2, 3])
def test_unscaled_grpo_is_the_true_gradient_times_one_less_than_the_group_over_the_group(group_size):
    table = Table(1, None if group_size == 2 else 2)
    unscaled = functools.partial(grpo.group_advantages, scale="none")
    found = expected_gradient(table, group_size, unscaled, on_policy)
    assert distance(found, true_gradient(table) * (group_size - 1) / group_size) < 1e-6


def bernoulli_gradient(p, group_size, scale):
    """GRPO's expected gradient in the log-odds of a right answer of chance p, over all groups."""
    odds = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    groups = torch.tensor(list(itertools.product((0.0, 1.0), repeat=group_size))).double()
    chances = (p**groups * (1 - p) ** (1 - groups)).prod(1, keepdim=True)
    logps = torch.where(groups == 1, odds, -odds) - torch.nn.functional.softplus(
        torch.where(groups == 1, odds, -odds)
    )
    advantages = grpo.group_advantages(groups, scale=scale)
    losses = on_policy(logps.flatten(), advantages.flatten()).view(groups.shape)
    return -torch.autograd.grad((losses * chances / group_size).sum(), odds)[0].item()


def test_division_by_the_standard_deviation_favours_prompts_that_are_nearly_solved_or_nearly_hopeless():
    # k of G right: sum_i A_i x_i = k (G - k) / G over sqrt(k (G - k) / G / (G - 1)); the true slope is p q
    def by_hand(p, group_size):
        chance = lambda k: math.comb(group_size, k) * p**k * (1 - p) ** (group_size - k)
        terms = [
            chance(k) * math.sqrt(k * (group_size - k) / group_size * (group_size - 1))
            for k in range(group_size)
        ]
        return sum(terms) / group_size

    ratios = {}
    for p in (0.03, 0.5, 0.97):
        assert bernoulli_gradient(p, 8, "none") == pytest.approx(p * (1 - p) * 7 / 8, abs=1e-6)
        scaled = bernoulli_gradient(p, 8, "group")
        assert scaled == pytest.approx(by_hand(p, 8), rel=1e-3)  # std + 1e-4
        ratios[p] = scaled / (p * (1 - p))
    assert ratios[0.03] == pytest.approx(ratios[0.97]) and ratios[0.03] > 1.3 * ratios[0.5]


def test_division_by_the_length_favours_short_sequences():
    # It gives the gradient of E[r / |o|]: the pull of a sequence of 3 tokens is a third of that of 1.
    table = Table(2, end=2)
    found = expected_gradient(table, 1, lambda r: r, on_policy, "seq_mean_token_mean")
    assert distance(found, true_gradient(table, table.rewards / table.lengths)) < 1e-6
    assert distance(found, true_gradient(table)) > 0.01
    # and with the group's mean, of half of E[r / |o|] - E[r] E[1 / |o|], the baseline held
    unscaled = functools.partial(grpo.group_advantages, scale="none")
    pairs = expected_gradient(table, 2, unscaled, on_policy, "seq_mean_token_mean")
    mean = (table.probabilities() * table.rewards).sum().detach()
    wanted = true_gradient(table, (table.rewards - mean) / table.lengths) / 2
    assert distance(pairs, wanted) < 1e-6
    # All equally right but for one long wrong answer: where lengths count, the short answer gains most.
    table.rewards = (table.lengths < 3).double()
    short = lambda gradient: gradient[0, 2].item()  # the end as first symbol
    gains = [
        short(expected_gradient(table, 1, lambda r: r, on_policy, agg))
        for agg in ("seq_mean_token_mean", "seq_mean_token_sum_norm")
    ]
    assert gains[0] > gains[1] + 0.01


def prefix_kl_gradient(table, ref, forward):
    """Gradient of the KL of each prefix's next-symbol distributions, weighted by how often it is reached."""
    chances = table.probabilities().detach()
    reached = torch.zeros(13, dtype=torch.float64)
    for chance, rows in zip(chances, table.rows, strict=True):
        for row in rows:
            reached[row] += chance
    log_p, log_q = table.logits.log_softmax(-1), ref.logits.detach().log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p) if forward else log_p.exp() * (log_p - log_q)).sum(-1)
    return table.gradient((reached * kl).sum())


@pytest.mark.parametrize("end", [None, 2], ids=["equal-lengths", "an-end"])
def test_gradient_of_the_kl_in_the_loss_depends_on_the_estimator(end):
    table, ref = Table(3, end), Table(4, end)
    ref_logps = ref.token_logps(range(len(table.sequences))).detach()

    def pull(kl, beta):
        loss_of = functools.partial(on_policy, ref=ref_logps, beta=beta, kl=kl)
        return -expected_gradient(table, 1, lambda r: 0 * r, loss_of)

    assert pull("k1", 1.0).abs().max() < 1e-6
    assert distance(pull("k2", 1.0), prefix_kl_gradient(table, ref, forward=False)) < 1e-6
    assert distance(pull("k3", 1.0), prefix_kl_gradient(table, ref, forward=True)) < 1e-6
    assert distance(pull("k3", 0.04), 0.04 * pull("k3", 1.0)) < 1e-6


# Advantages -------------------------------------------------------------------------------------------------


def test_group_advantages_by_hand():
    rewards = float64([1, 0, 0, 0], [3, 1, 1, 3])
    # centred (3/4, -1/4, ...), squares 3/4 over 3: std 1/2; (1, -1, -1, 1): std sqrt(4/3)
    found = grpo.group_advantages(rewards)
    std = math.sqrt(4 / 3) + 1e-4
    assert found[0].tolist() == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3], abs=1e-6)
    assert found[1].tolist() == pytest.approx([1 / std, -1 / std, -1 / std, 1 / std], abs=1e-6)
    unscaled = grpo.group_advantages(rewards, scale="none")
    assert unscaled.tolist() == [[0.75, -0.25, -0.25, -0.25], [1, -1, -1, 1]]
    # the batch's 8 rewards: mean 9/8, squares 21 - 81/8 over 7
    std = math.sqrt((21 - 81 / 8) / 7) + 1e-4
    found = grpo.group_advantages(rewards, scale="batch")
    assert found.tolist() == [pytest.approx([x / std for x in line], abs=1e-6) for line in unscaled.tolist()]


def test_the_guard_of_the_deviation_is_1e_4():
    # std of (0, 2e-4) is sqrt(2) 1e-4
    found = grpo.group_advantages(float64([0, 2e-4])).tolist()[0]
    assert found == pytest.approx([-1 / (math.sqrt(2) + 1), 1 / (math.sqrt(2) + 1)], abs=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_equal_rewards_are_exactly_0(scale):
    # The mean of 3 times 0.1 is not 0.1, in neither precision.
    for value in (0.1, 0.7, -1 / 3, 1e6 + 0.1):
        for dtype in (torch.float32, torch.float64):
            rewards = torch.tensor([[value] * 3, [0.0, 1.0, 5.0], [value] * 3], dtype=dtype)
            found = grpo.group_advantages(rewards, scale=scale)
            assert found[[0, 2]].abs().max() == 0 and found[1].abs().min() > 0
            assert grpo.group_std(rewards.double())[[0, 2]].tolist() == [0, 0]
    alone = grpo.group_advantages(torch.full((1, 7), 0.1), scale=scale)
    assert alone.tolist() == [[0] * 7]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_completion_without_a_reward_is_left_out_and_gets_no_advantage(scale):
    nan = math.nan
    with_gaps = grpo.group_advantages(float64([1, nan, 0, 5], [nan] * 4, [nan, nan, 3, nan]), scale=scale)
    # the group of 1, 0, 5: mean 2, squares 1 + 4 + 9 over 2; the batch also has 3: mean 9/4, 35 - 81/4 over 3
    std = {"group": math.sqrt(7) + 1e-4, "batch": math.sqrt((35 - 81 / 4) / 3) + 1e-4, "none": 1}[scale]
    assert with_gaps[0].tolist() == pytest.approx([-1 / std, 0, -2 / std, 3 / std], abs=1e-6)
    assert with_gaps[1:].tolist() == [[0] * 4] * 2


def test_group_std_by_hand():
    found = grpo.group_std(float64([1, 0, 0, 0], [1, math.nan, 0, 5], [math.nan] * 4, [2, *[math.nan] * 3]))
    assert found.tolist() == pytest.approx([0.5, math.sqrt(7), 0, 0])


# Loss -------------------------------------------------------------------------------------------------------


def loss_and_slope(ratio, advantage, **settings):
    settings = {"epsilon": 0.2, "epsilon_high": 0.28} | settings
    logprobs = float64(-1.3).requires_grad_()
    old = logprobs.detach() - math.log(ratio)
    loss = grpo.grpo_loss(logprobs, old, None, float64(advantage), **settings)
    return loss.item(), torch.autograd.grad(loss.sum(), logprobs)[0].item()


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (0.5, 2, -1.0, -1.0),
        (1.0, 2, -2.0, -2.0),
        # above 1.28, where the clip takes the gradient
        (1.5, 2, -2.56, 0.0),
        # below 0.8, where it takes that of a bad token
        (0.5, -2, 1.6, 0.0),
        (1.0, -2, 2.0, 2.0),
        (1.5, -2, 3.0, 3.0),
        # between epsilon and epsilon_high
        (1.25, 2, -2.5, -2.5),
    ],
)
def test_clip_by_hand(ratio, advantage, loss, slope):
    assert loss_and_slope(ratio, advantage) == pytest.approx((loss, slope))


@pytest.mark.parametrize("ratio, weight", [(0.01, 0.01), (0.5, 0.5), (1, 1), (4.9, 4.9), (5.1, 5), (90, 5)])
@pytest.mark.parametrize("advantage", [2, -2])
def test_cispo_clamps_the_weight_and_keeps_every_gradient(ratio, weight, advantage):
    found = loss_and_slope(ratio, advantage, policy_loss="cispo", epsilon_high=4.0)
    assert found == pytest.approx((weight * advantage * 1.3, -weight * advantage))


def test_sequence_ratio_is_the_geometric_mean_with_its_gradient():
    index = torch.tensor([0, 0, 1, 1, 1, 2])
    old = float64(-1, -2, -1, -1, -1, -3)
    moved = float64(0.1, 0.3, -0.5, 0.1, -0.2, 2.0)
    advantages, lengths = float64(1, 1, 2, 2, 2, 3), float64(2, 2, 3, 3, 3, 1)
    ratios = [math.exp(0.2)] * 2 + [math.exp(-0.2)] * 3 + [math.exp(2)]
    assert grpo.importance_ratio(old + moved, old, index).tolist() == pytest.approx(ratios)
    assert grpo.importance_ratio(old + moved, old).tolist() == pytest.approx(moved.exp().tolist())

    def loss(logprobs):
        clip = {"epsilon": 0.25, "epsilon_high": 0.25, "sequence_index": index}
        return (grpo.grpo_loss(logprobs, old, None, advantages, **clip) / lengths).sum()

    logprobs = (old + moved).requires_grad_()
    assert torch.autograd.gradcheck(loss, (logprobs,))
    # d (-s A) / d logp = -s A / |o|; the last one is above the clip
    wanted = [-math.exp(0.2) / 2] * 2 + [-math.exp(-0.2) * 2 / 3] * 3 + [0]
    assert torch.autograd.grad(loss(logprobs), logprobs)[0].tolist() == pytest.approx(wanted)
    value = -math.exp(0.2) - 2 * math.exp(-0.2) - 3 * 1.25
    assert loss(logprobs).item() == pytest.approx(value)


def test_kl_in_the_loss_by_hand():
    # log-ratio 0.5: k1 = 0.5, k2 = 0.125, k3 = e^-0.5 - 1 + 0.5; slopes 1, 0.5, 1 - e^-0.5
    values = {"k1": (0.5, 1), "k2": (0.125, 0.5), "k3": (0.1065307, 0.3934693)}
    for kl, (value, slope) in values.items():
        logprobs = float64(-1.0).requires_grad_()
        old, ref = logprobs.detach(), logprobs.detach() - 0.5
        clip = {"epsilon": 0.2, "epsilon_high": 0.2}
        loss = grpo.grpo_loss(logprobs, old, ref, float64(2.0), beta=0.1, kl=kl, **clip)
        assert loss.item() == pytest.approx(-2 + 0.1 * value)
        assert torch.autograd.grad(loss.sum(), logprobs)[0].item() == pytest.approx(-2 + 0.1 * slope)


def test_token_weights_by_hand():
    settings = {"num_sequences": 2, "num_tokens": 6, "max_completion_length": 8}
    weights = lambda agg: grpo.token_weights(torch.tensor([2, 4]), loss_agg=agg, **settings).tolist()
    assert weights("seq_mean_token_mean") == pytest.approx([1 / 4, 1 / 8])
    assert weights("token_mean") == pytest.approx([1 / 6] * 2)
    assert weights("seq_mean_token_sum_norm") == pytest.approx([1 / 16] * 2)


@pytest.mark.parametrize("loss_agg", ["seq_mean_token_mean", "token_mean", "seq_mean_token_sum_norm"])
def test_loss_is_the_same_for_any_split_into_micro_batches(loss_agg):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 7)
    losses = [rng.normal(size=n) for n in lengths]
    means = {
        "seq_mean_token_mean": np.mean([x.mean() for x in losses]),
        "token_mean": np.concatenate(losses).mean(),
        "seq_mean_token_sum_norm": np.mean([x.sum() / 9 for x in losses]),
    }
    for split in ([range(7)], [[3], [0, 6], [1, 2, 4, 5]], [[i] for i in range(7)]):
        total = 0.0
        for row in split:
            weights = grpo.token_weights(
                torch.tensor(lengths[list(row)]),
                loss_agg=loss_agg,
                num_sequences=7,
                num_tokens=int(lengths.sum()),
                max_completion_length=9,
            )
            total += sum(w * losses[i].sum() for w, i in zip(weights.tolist(), row, strict=True))
        assert total == pytest.approx(means[loss_agg], rel=1e-5)


def test_clip_shares_count_where_the_gradient_is_lost():
    ratio, advantages = torch.tensor([0.7, 0.7, 1.3, 1.3, 1.0, 1.25]), torch.tensor([1.0, -1, 1, -1, 1, 1])
    found = grpo.clip_shares(ratio, advantages, 0.2, 0.28)
    assert found.tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert grpo.clip_shares(ratio, 0 * advantages, 0.2, 0.28).sum() == 0


# Measures ---------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    right = np.array([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]], bool)
    for k in range(1, 6):
        wanted = np.mean([[any(some) for some in itertools.combinations(line, k)] for line in right])
        assert grpo.pass_at_k(right, k) == pytest.approx(wanted)


def test_majority_is_the_first_of_the_most_frequent_answers():
    assert grpo.majority(["7", "3", "3", "7", "3"]) == 1
    assert grpo.majority(["5", "8", "8", "5"]) == 0
    assert grpo.majority(["5"]) == 0


def test_distinct_ngrams_by_hand():
    # 12 23 34, 12 25: 4 of 5; orders longer than a completion have none
    group = [[1, 2, 3, 4], [1, 2, 5]]
    assert grpo.distinct_ngrams(group) == pytest.approx(4 / 5)
    assert grpo.distinct_ngrams(group, 1) == pytest.approx(5 / 7)
    assert grpo.distinct_ngrams([[1], [2]]) == 0


def test_self_bleu_by_hand():
    assert grpo.self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1)
    # 2 of 4, 1 of 3, then half a match of 2 and of 1
    assert grpo.self_bleu([[1, 2, 3, 4], [1, 2, 5, 6]]) == pytest.approx((1 / 2 / 3 / 4 / 2) ** 0.25)
    # a match counts once (1 of 4, then halves of 3, 2, 1), and the short one pays for its length
    clipped = [(1 / 4 / 6 / 4 / 2) ** 0.25] * 2
    assert grpo.self_bleu([[1, 1, 1, 1], [1, 2, 3, 4]]) == pytest.approx(np.mean(clipped))
    short = [math.exp(1 - 4 / 2), (1 / 2 / 3 / 4 / 2) ** 0.25]
    assert grpo.self_bleu([[1, 2], [1, 2, 3, 4]]) == pytest.approx(np.mean(short))
    # the sibling that is nearest in length and the best matches of all of them count
    three = [1.0, (1 / 2 / 3 / 4 / 2) ** 0.25, 1.0]
    assert grpo.self_bleu([[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 3, 4]]) == pytest.approx(np.mean(three))
    assert grpo.self_bleu([list(range(8)), list(range(8, 16))]) < 0.1


def test_symptoms_are_told_by_their_thresholds():
    first = {"entropy": 1.0, "completions/mean_length": 10.0, "reward": 0.5, "gold_reward": 0.5}
    healthy = {"entropy": 0.51, "completions/mean_length": 19.0, "reward": 0.9, "gold_reward": 0.49}
    assert grpo.symptoms(first, healthy) == []
    found = lambda **changes: grpo.symptoms(first, healthy | changes)
    assert ["entropy" in message for message in found(entropy=0.49)] == [True]
    assert ["length" in message for message in found(**{"completions/mean_length": 21.0})] == [True]
    assert ["hacked" in message for message in found(gold_reward=0.4)] == [True]
    assert found(gold_reward=0.4, reward=0.4) == []  # both fall: that is no hacking
    no_gold = {key: value for key, value in healthy.items() if key != "gold_reward"}
    assert grpo.symptoms(first, no_gold) == []


def test_each_symptom_is_told_once(tmp_path, capsys):
    monitor = grpo.Monitor(tmp_path, 0)
    steps = [
        {"step": n, "entropy": 1 / n, "completions/mean_length": 5.0, "reward": 0.1} for n in range(1, 16)
    ]
    for metrics in steps:
        monitor(metrics)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: step 10: entropy")


def test_monitor_knows_the_steps_before_a_resume(tmp_path):
    lines = [{"step": 0, "eval/reward": 1.0}, *({"step": n, "x": n * 10} for n in range(1, 5))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert grpo.Monitor(tmp_path, 3).before("x") == 30 and len(grpo.Monitor(tmp_path, 3).history) == 3
    assert grpo.Monitor(tmp_path, 0).before("x") == 0


# The sampler ------------------------------------------------------------------------------------------------


@functools.cache
def tiny_tokenizer():
    return grpo.load_tokenizer(grpo.Args())


@functools.cache
def tiny_policy(name="tiny/sft"):
    return grpo.load_model(name, grpo.Args(), tiny_tokenizer(), CPU)


@functools.cache
def tiny_rows():
    path = ROOT / "tiny" / "data" / "prompts_train.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[:64]]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def prompts_of(rows, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer()
    return [grpo.Prompt(grpo.prompt_tokens(tokenizer, row["prompt"], row), row) for row in rows]


def sample(prompts, policy=None, tokenizer=None, seed=5, **flags):
    args = grpo.Args(**({"max_completion_length": 24} | flags))
    policy, tokenizer = policy or tiny_policy(), tokenizer or tiny_tokenizer()
    return grpo.roll_out(policy, tokenizer, prompts, args, CPU, seed=seed)


LOGITS = float64(0.3, -1.2, 2.0, -math.inf, 0.0, 1.1, -0.4)


def sampled_tokens(uniforms, temperature, logits=LOGITS):
    sampler = grpo.InverseSampler(float64(*uniforms)[:, None], temperature)
    scores = sampler(None, logits.float().expand(len(uniforms), -1))
    assert ((scores == 0).sum(1) == 1).all() and (scores.isinf().sum(1) == len(logits) - 1).all()
    return scores.argmax(1), sampler.logprobs[0]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sampler_draws_the_tokens_as_often_as_softmax_says(temperature):
    count = 20_000
    tokens, logprobs = sampled_tokens([(n + 0.5) / count for n in range(count)], temperature)
    wanted = (LOGITS / temperature).softmax(0)
    shares = torch.bincount(tokens, minlength=7) / count
    assert (shares - wanted).abs().max() < 1.5 / count  # evenly spaced numbers leave no noise
    assert torch.allclose(logprobs.double(), wanted.log()[tokens], atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_changes_where_the_distribution_function_is_crossed(temperature):
    ends = (LOGITS / temperature).softmax(0).cumsum(0).tolist()
    allowed = [0, 1, 2, 4, 5, 6]
    below, above = [ends[k] - 1e-6 for k in allowed[:-1]], [ends[k] + 1e-6 for k in allowed[:-1]]
    assert sampled_tokens(below, temperature)[0].tolist() == allowed[:-1]
    assert sampled_tokens(above, temperature)[0].tolist() == allowed[1:]
    assert sampled_tokens([0.0, 1 - 1e-12], temperature)[0].tolist() == [0, 6]


def test_tokens_without_any_chance_are_never_drawn():
    forbidden = float64(-math.inf, 0.0, -math.inf, 0.0, -math.inf)
    assert sampled_tokens([0.0, 0.25, 0.5, 1 - 1e-12], 1.0, forbidden)[0].tolist() == [1, 1, 3, 3]


def test_sampler_takes_another_number_at_each_step():
    sampler = grpo.InverseSampler(float64([0.01, 0.99], [0.99, 0.01]), 1.0)
    tokens = [sampler(None, LOGITS.float().expand(2, -1)).argmax(1).tolist() for _ in range(2)]
    assert tokens == [[0, 6], [6, 0]]


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_kept_logprobs_are_those_of_packed_rows(one_cpu, temperature):
    found = sample(prompts_of(tiny_rows()[:12]), temperature=temperature)
    sequences = [grpo.Sequence(completion.input_ids, completion.trained) for completion in found]
    args = grpo.Args(temperature=temperature, max_tokens_per_micro_batch=200, share_prompt=False)
    packed = grpo.completion_logps(tiny_policy(), sequences, args, CPU)
    for completion, logprobs in zip(found, packed, strict=True):
        assert len(completion.logprobs) == len(completion.token_ids) == completion.trained.sum()
        assert completion.input_ids[completion.trained].tolist() == completion.token_ids
        assert completion.logprobs.tolist() == pytest.approx(logprobs.tolist(), abs=1e-4)
    assert min(completion.logprobs.min() for completion in found) < -0.5


def test_samples_do_not_depend_on_the_batch_or_on_the_other_prompts(one_cpu):
    rows = sorted(tiny_rows()[:10], key=lambda row: len(str(row)))
    prompts = prompts_of(rows[::2] + rows[1::2])  # of many lengths, so that padding differs
    ids = [completion.token_ids for completion in sample(prompts)]
    assert len({tuple(x) for x in ids}) > 5
    for size in (1, 3):
        assert [c.token_ids for c in sample(prompts, generation_batch_size=size)] == ids
    assert [c.token_ids for c in sample(prompts[:4])] == ids[:4]
    others = prompts[:4] + prompts[:3:-1]  # the same four before others
    assert [c.token_ids for c in sample(others, generation_batch_size=5)][:4] == ids[:4]
    assert [c.token_ids for c in sample(prompts, seed=6)] != ids


def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_sampling_at_a_temperature_of_almost_0_is_greedy(one_cpu):
    prompts, model = prompts_of(tiny_rows()[:4]), stock(ROOT / "tiny" / "sft")
    args = replace(grpo.Args(max_completion_length=12), temperature=1e-6)
    found = grpo.roll_out(tiny_policy(), tiny_tokenizer(), prompts, args, CPU, seed=0)
    for prompt, completion in zip(prompts, found, strict=True):
        ids = list(prompt.input_ids)
        while len(ids) < len(prompt.input_ids) + 12 and ids[-1] != END or ids == prompt.input_ids:
            with torch.no_grad():
                ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        assert completion.token_ids == ids[len(prompt.input_ids) :]


def test_generation_config_of_the_model_stays_out(one_cpu, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "tiny" / "sft", folder)
    path = folder / "generation_config.json"
    own = {"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 7.0, "max_new_tokens": 3}
    own |= {"min_new_tokens": 2, "num_beams": 2, "no_repeat_ngram_size": 1, "forced_eos_token_id": 7}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    policy = grpo.load_model(str(folder), grpo.Args(), tiny_tokenizer(), CPU)
    assert policy.generation_config.top_k == 1  # it is there
    prompts = prompts_of(tiny_rows()[:6])
    assert [c.token_ids for c in sample(prompts, policy)] == [c.token_ids for c in sample(prompts)]
    assert policy.generation_config.repetition_penalty == 7.0  # and is put back


def test_every_end_token_ends_a_completion(one_cpu, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "tiny" / "sft", folder)
    newline = tiny_tokenizer()("1\n2", add_special_tokens=False).input_ids[1]
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [END, newline]}))
    tokenizer = grpo.load_tokenizer(grpo.Args(model=str(folder)))
    assert tokenizer.end_ids == sorted({END, newline})
    prompts = prompts_of(tiny_rows()[:12])
    plain, found = sample(prompts), sample(prompts, tokenizer=tokenizer)
    cut = [c.token_ids.index(newline) + 1 for c in plain if newline in c.token_ids]
    assert len(cut) > 5
    for one, other in zip(found, plain, strict=True):
        end = other.token_ids.index(newline) + 1 if newline in other.token_ids else None
        assert one.token_ids == other.token_ids[:end]
        assert one.ended == (one.token_ids[-1] in (END, newline))
        assert one.logprobs.tolist() == pytest.approx(other.logprobs[:end].tolist(), abs=1e-4)


def test_completion_that_is_cut_off_has_not_ended(one_cpu):
    found = sample(prompts_of(tiny_rows()[:16]), max_completion_length=16)
    for completion in found:
        assert completion.ended == (completion.token_ids[-1] == END)
        assert END not in completion.token_ids[:-1]
        assert completion.ended or len(completion.token_ids) == 16
        assert completion.text == tiny_tokenizer().decode([i for i in completion.token_ids if i != END])
    assert len({completion.ended for completion in found}) == 2


# Short runs -------------------------------------------------------------------------------------------------

REWARDS = r"""
import json, re


def residue(completion_ids, **columns):
    return [sum(ids) % 7 / 3 for ids in completion_ids]


def brief(completion_ids, **columns):
    return [-len(ids) / 10 for ids in completion_ids]


def halves(completion_ids, **columns):
    return [None if sum(ids) % 2 else 1.0 + len(ids) for ids in completion_ids]


def nothing(completions, **columns):
    return [None] * len(completions)


def short(completions, **columns):
    return [0.0]


def solved(completions, answer, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    last = lambda text: text.split("####")[-1].strip().replace(",", "")
    return [float("####" in text and last(text) == last(a)) for text, a in zip(texts, answer)]


def seen(prompts, completions, completion_ids, max_completion_length, **columns):
    with open(__file__ + ".seen", "a") as file:
        columns |= {"longest": max_completion_length}
        file.write(json.dumps([prompts, completions, completion_ids, columns]) + "\n")
    return [float(len(ids)) for ids in completion_ids]


def trusted(completions, allow_code_execution, **columns):
    return [float(allow_code_execution)] * len(completions)
"""


@pytest.fixture
def rewards(tmp_path):
    """rewards("a", "b"): the flag --reward for functions of a file."""
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS)
    return lambda *names: tuple(f"{path}:{name}" for name in names)


@pytest.fixture
def train(tmp_path, rewards, one_cpu):
    """train(**flags) -> output folder, lines of metrics.jsonl; 2 steps of 4 prompts on tiny/sft."""

    def run(rows=None, **flags):
        folder = tmp_path / f"run_{run.count}"
        run.count += 1
        path = write_rows(tmp_path / f"prompts_{run.count}.jsonl", rows or tiny_rows())
        defaults = {"dataset": (path,), "output_dir": str(folder), "reward": rewards("residue")}
        defaults |= {"batch_size": 16, "num_generations": 4, "max_completion_length": 12, "max_steps": 2}
        defaults |= {"eval_every": 0, "save_every": 0, "warmup_steps": 0}
        run.result = grpo.main(grpo.Args(**(defaults | flags)))
        folder = Path((defaults | flags)["output_dir"])
        lines = read_lines(folder / "metrics.jsonl")
        return folder, [line for line in lines if len(line) > 1]  # without step 0 where nothing was evaluated

    run.count = 0
    return run


@pytest.fixture
def ratios(monkeypatch):
    """The ratios of every row of a run, in order."""
    found, clip_shares = [], grpo.clip_shares
    spy = lambda ratio, *rest: found.append(ratio) or clip_shares(ratio, *rest)
    monkeypatch.setattr(grpo, "clip_shares", spy)
    return found


def assert_same_metrics(one, other, rel=1e-5, abs_=1e-6, without=()):
    assert len(one) == len(other)
    for line, wanted in zip(one, other, strict=True):
        assert line.keys() == wanted.keys()
        for key in wanted.keys() - CLOCK - {"packing/fill"} - set(without):
            assert line[key] == pytest.approx(wanted[key], rel=rel, abs=abs_), (key, wanted["step"])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_pass_has_ratios_of_exactly_1_no_loss_and_a_gradient(train, ratios, temperature):
    _, lines = train(temperature=temperature, max_tokens_per_micro_batch=256)
    assert len(ratios) >= 4 and all((ratio == 1).all() for ratio in ratios)
    for line in lines:
        assert abs(line["loss"]) < 1e-6 and line["grad_norm"] > 0.1
        assert line["clip_ratio/low_mean"] == line["clip_ratio/high_mean"] == 0
        assert line["sampling/logp_difference_mean"] < 1e-4
    assert lines[0]["kl"] == 0 and lines[1]["kl"] > 1e-6  # the first is the reference itself
    assert lines[0]["reward_std"] > 0 and lines[0]["epoch"] == 4 / 64


def test_second_pass_over_a_rollout_has_other_ratios(train, ratios):
    _, [line] = train(num_iterations=2, max_steps=1, epsilon=1e-3)
    first, second = torch.cat(ratios[: len(ratios) // 2]), torch.cat(ratios[len(ratios) // 2 :])
    assert (first - 1).abs().max() < 1e-4 and (second - 1).abs().max() > 0.01
    assert line["clip_ratio/low_mean"] > 0 and line["clip_ratio/high_mean"] > 0
    region = line["clip_ratio/low_mean"] + line["clip_ratio/high_mean"]
    assert line["clip_ratio/region_mean"] == pytest.approx(region)
    assert line["sampling/logp_difference_mean"] < 1e-4  # of the old policy, in both passes


def test_second_minibatch_has_other_ratios(train, ratios):
    train(num_minibatches=2, max_steps=1, learning_rate=1e-3)
    first, second = torch.cat(ratios[: len(ratios) // 2]), torch.cat(ratios[len(ratios) // 2 :])
    assert (first - 1).abs().max() < 1e-4 and (second - 1).abs().max() > 0.01


LENGTHS = (1, 3, 5, 2, 4, 4, 1, 6)  # of 2 groups of 4
SCORES = (1.0, 0.0, 0.0, 0.0, 3.0, 1.0, 1.0, 3.0)
UNSCALED = (0.75, -0.25, -0.25, -0.25, 1, -1, -1, 1)


@pytest.fixture
def scripted(monkeypatch):
    """scripted(lengths, scores): completions of given lengths and rewards in place of sampled ones."""

    def script(lengths, scores):
        def roll_out(policy, tokenizer, prompts, args, device, *, seed):
            ids = [[*range(10, 9 + n), END] for n in lengths]
            return [
                grpo.completion_of(tokenizer, prompt, x, np.zeros(len(x), np.float32))
                for prompt, x in zip(prompts, ids, strict=True)
            ]

        monkeypatch.setattr(grpo, "roll_out", roll_out)
        line = torch.tensor([scores], dtype=torch.float64)
        empty = torch.zeros(0, len(scores), dtype=torch.float64)
        monkeypatch.setattr(grpo, "score", lambda functions, *_: line if functions else empty)

    return script


@pytest.mark.parametrize(
    "loss_agg, loss",
    [
        # -sum over tokens of A, each with its weight; 26 tokens, a longest of 8
        ("seq_mean_token_mean", 0.0),
        ("token_mean", -(0.75 - 0.25 * 10 + 4 - 4 - 1 + 6) / 26),
        ("seq_mean_token_sum_norm", -(0.75 - 0.25 * 10 + 4 - 4 - 1 + 6) / (8 * 8)),
    ],
)
def test_loss_of_a_step_by_hand(train, scripted, loss_agg, loss):
    scripted(LENGTHS, SCORES)
    flags = {"scale_rewards": "none", "loss_agg": loss_agg, "max_completion_length": 8}
    _, [line] = train(batch_size=8, max_steps=1, **flags)
    assert line["loss"] == pytest.approx(loss, abs=1e-6) and line["grad_norm"] > 0.01
    assert line["reward"] == pytest.approx(9 / 8)
    assert line["reward_std"] == pytest.approx((0.5 + math.sqrt(4 / 3)) / 2)
    assert line["completions/mean_length"] == 26 / 8 and line["completions/clipped_ratio"] == 0
    assert [line["completions/min_length"], line["completions/max_length"]] == [1, 6]


def test_loss_of_minibatches_is_the_mean_of_theirs(train, scripted, ratios):
    scripted(LENGTHS, SCORES)
    flags = {"scale_rewards": "none", "loss_agg": "token_mean", "learning_rate": 0.0}
    _, [line] = train(batch_size=8, num_minibatches=2, max_steps=1, **flags)
    # 11 tokens of one group, 15 of the other
    wanted = -((0.75 - 0.25 * 10) / 11 + (4 - 4 - 1 + 6) / 15) / 2
    assert line["loss"] == pytest.approx(wanted, abs=1e-5)
    assert sorted(len(ratio) for ratio in ratios) == [11, 15]


def test_gradient_of_a_step_is_that_of_the_weighted_log_probs(train, scripted, tmp_path):
    # -sum w A log pi of the stock model, token by token
    scripted(LENGTHS, SCORES)
    rows = [tiny_rows()[0]] * 2
    _, [line] = train(rows, batch_size=8, max_steps=1, scale_rewards="none", loss_agg="token_mean")
    model, [prompt] = stock(ROOT / "tiny" / "sft"), prompts_of(rows[:1])
    loss = 0
    for length, advantage in zip(LENGTHS, UNSCALED, strict=True):
        answer = [*range(10, 9 + length), END]
        logits = model(input_ids=torch.tensor([[*prompt.input_ids, *answer]])).logits[0]
        logps = logits[len(prompt.input_ids) - 1 : -1].log_softmax(-1)
        loss = loss - advantage * logps[range(length), answer].sum() / 26
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        {"loss_agg": "token_mean"},
        {"importance_sampling": "sequence", "num_iterations": 2, "num_minibatches": 2, "beta": 0.04},
        {"policy_loss": "cispo", "num_iterations": 2, "scale_rewards": "batch", "order": "length"},
    ],
    ids=["token-mean", "gspo", "cispo"],
)
def test_memory_flags_change_nothing(train, flags):
    _, wanted = train(**flags)
    _, found = train(max_tokens_per_micro_batch=128, generation_batch_size=3, **flags)
    assert_same_metrics(found[:1], wanted[:1])
    assert_same_metrics(found[1:], wanted[1:], rel=1e-3, abs_=1e-5)  # after steps of Adam
    assert wanted[1]["grad_norm"] > 0.1


@pytest.mark.parametrize("budget", [128, 2048])
def test_prompts_that_groups_share_change_nothing(train, budget):
    flags = {"num_iterations": 2, "beta": 0.04}
    _, wanted = train(**flags)
    _, found = train(max_tokens_per_micro_batch=budget, share_prompt=False, **flags)
    assert_same_metrics(found[:1], wanted[:1])
    assert_same_metrics(found[1:], wanted[1:], rel=1e-3, abs_=1e-5)


def continued_run(train, folder, **flags):
    """The run of `folder` of 4 steps continued from step 2 in a copy -> folder, metrics."""
    copy = folder.with_name("continued")
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "checkpoints" / "step_00000004")
    return train(output_dir=str(copy), resume=True, **flags)


def test_continued_run_equals_one_that_never_stopped(train):
    flags = {"max_steps": 4, "save_every": 2, "num_iterations": 2, "max_completion_length": 8}
    folder, wanted = train(**flags)
    copy, found = continued_run(train, folder, **flags)
    assert_same_metrics(found, wanted, rel=0, abs_=0)
    one, other = (load_file(x / "model" / "model.safetensors") for x in (folder, copy))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(wanted) == 4 and wanted[3]["loss"] != wanted[1]["loss"]


# Rewards ----------------------------------------------------------------------------------------------------


def completions_of(*texts, ended=True, prompt=None):
    row = {"prompt": prompt or "?"}
    asked = grpo.Prompt([5, 6], row)
    ids = lambda text: tiny_tokenizer()(text).input_ids + [END] * ended
    return [grpo.Completion(asked, ids(t), np.zeros(len(ids(t)), np.float32), t, ended) for t in texts]


def test_weighted_sum_leaves_out_what_is_none():
    nan = math.nan
    scores = float64([1, nan, nan, 2], [10, 20, nan, nan])
    found = grpo.weigh(scores, (0.5, 2.0)).tolist()
    assert found[:2] + found[3:] == [20.5, 40, 1] and math.isnan(found[2])
    assert grpo.weigh(scores[:, :1], ()).tolist() == [11]


def test_rewards_of_none_get_no_gradient(train, rewards):
    folder, lines = train(reward=rewards("nothing"))
    assert all(line["grad_norm"] == 0 for line in lines)
    before = load_file(ROOT / "tiny" / "sft" / "model.safetensors")
    after = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_none_of_one_function_leaves_the_others(train, rewards):
    folder, [line, _] = train(reward=rewards("halves", "nothing"), save_rollouts=True)
    found = [row for row in read_lines(folder / "rollouts.jsonl") if row["step"] == 1]
    odd = [sum(row["token_ids"]) % 2 == 1 for row in found]
    lengths = [1.0 + len(row["token_ids"]) for row in found]
    wanted = [None if x else n for x, n in zip(odd, lengths, strict=True)]
    assert 0 < sum(odd) < 16 and [row["reward"] for row in found] == wanted
    assert line["reward"] == pytest.approx(np.mean([x for x in wanted if x is not None]))
    assert line["rewards/halves/mean"] == line["reward"] and "rewards/nothing/mean" not in line


def test_several_rewards_are_weighted(train, rewards):
    flags = {"reward": rewards("residue", "brief", "residue"), "reward_weights": (2.0, 0.5, 1.0)}
    folder, [line, _] = train(save_rollouts=True, **flags)
    found = [row for row in read_lines(folder / "rollouts.jsonl") if row["step"] == 1]
    residues = [sum(row["token_ids"]) % 7 / 3 for row in found]
    briefs = [-len(row["token_ids"]) / 10 for row in found]
    assert [row["reward"] for row in found] == pytest.approx(
        [3 * r + 0.5 * b for r, b in zip(residues, briefs, strict=True)]
    )
    assert line["rewards/residue/mean"] == line["rewards/residue_2/mean"] == pytest.approx(np.mean(residues))
    assert line["rewards/brief/std"] == pytest.approx(np.std(briefs, ddof=1))


def test_reward_functions_see_messages_or_text_ids_and_columns(train, rewards, tmp_path):
    rows = [tiny_rows()[0], {"prompt": "2 + 3 =", "answer": "5", "level": 1}]
    train(rows, reward=rewards("seen"), batch_size=8, max_steps=1, order="given", max_completion_length=6)
    [(prompts, completions, completion_ids, columns)] = read_lines(tmp_path / "my_rewards.py.seen")
    assert prompts == [rows[0]["prompt"]] * 4 + ["2 + 3 ="] * 4
    assert columns == {
        "answer": [rows[0]["answer"]] * 4 + ["5"] * 4,
        "level": [None] * 4 + [1] * 4,
        "longest": 6,
    }
    texts = [tiny_tokenizer().decode(ids, skip_special_tokens=True) for ids in completion_ids]
    assert completions == [[{"role": "assistant", "content": text}] for text in texts[:4]] + texts[4:]


def test_leave_to_run_code_is_passed_to_those_who_name_it(rewards):
    for allowed in (False, True):
        args = grpo.Args(reward=rewards("trusted", "residue"), allow_code_execution=allowed)
        functions = grpo.load_functions(args.reward, args)
        scores = grpo.score(functions, [], completions_of("a", "b"), args, CPU)
        assert scores[0].tolist() == [float(allowed)] * 2
        assert [set(function.keywords) for _, function in functions] == [{"allow_code_execution"}, set()]


def test_function_that_returns_too_few_rewards_ends_the_run(train, rewards, capsys):
    with pytest.raises(SystemExit) as stop:
        train(reward=rewards("short"))
    assert stop.value.code == 2
    assert "reward short returned 1 numbers for 16 completions" in capsys.readouterr().err


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Folders of two reward models on tiny/sft's backbone, with offsets 0.5 and -2."""
    found = []
    for seed, offset in enumerate((0.5, -2.0)):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(
                ROOT / "tiny" / "sft", num_labels=1, dtype=torch.float32
            )
            model.score.weight.data.normal_(0, 0.3)
        model.config.reward_offset = offset
        found.append(str(tmp_path_factory.mktemp("judge")))
        model.save_pretrained(found[-1])
        AutoTokenizer.from_pretrained(ROOT / "tiny" / "sft").save_pretrained(found[-1])
    return found


def stock_reward(folder, row, prompt):
    """What a stock classifier says of a completion in rollouts.jsonl, read at its last token, alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.pad_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    text += row["completion"] + "<|im_end|>" * (row["token_ids"][-1] == END)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids).logits.item() + model.config.reward_offset


@pytest.mark.parametrize("aggregation", ["mean", "min", "mean_minus_std"])
def test_reward_models_score_as_the_stock_model_does(train, judges, rewards, aggregation):
    flags = {"reward_model": tuple(judges), "reward_aggregation": aggregation, "std_coef": 0.7}
    flags |= {"max_tokens_per_micro_batch": 200, "batch_size": 4, "num_generations": 2}
    folder, [line] = train(
        reward=rewards("brief"), reward_weights=(2, 0.5), max_steps=1, save_rollouts=True, **flags
    )
    found = read_lines(folder / "rollouts.jsonl")
    one, other = (
        np.array([stock_reward(judge, row, row["row"]["prompt"]) for row in found]) for judge in judges
    )
    middle, half = (one + other) / 2, np.abs(one - other) / 2  # the population's deviation of two
    wanted = {"mean": middle, "min": np.minimum(one, other), "mean_minus_std": middle - 0.7 * half}
    wanted = wanted[aggregation]
    briefs = np.array([-len(row["token_ids"]) / 10 for row in found])
    assert [row["reward"] for row in found] == pytest.approx((2 * briefs + 0.5 * wanted).tolist(), abs=1e-3)
    assert line["rewards/reward_model/mean"] == pytest.approx(wanted.mean(), abs=1e-3)
    assert np.abs(one - other).max() > 0.1


def test_reward_models_read_an_end_only_where_there_is_one(judges):
    tokenizer = grpo.own_tokenizer(judges[0], grpo.Args(), "--reward-model")
    for ended in (True, False):
        [completion] = completions_of("1 + 1 = 2", ended=ended, prompt=tiny_rows()[0]["prompt"])
        sequence = grpo.judged(tokenizer, completion)
        assert (sequence.input_ids[-1] == END) == ended
        assert sequence.trained.tolist() == [False] * (len(sequence.input_ids) - 1) + [True]
        assert tokenizer.decode(sequence.input_ids).endswith("assistant\n1 + 1 = 2" + "<|im_end|>" * ended)


def test_reward_models_read_the_end_that_their_template_writes_where_it_is_not_the_eos(judges, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(judges[0])
    tokenizer.eos_token = "<|endoftext|>"  # as Qwen2.5's base models have it
    shutil.copytree(judges[0], tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    tokenizer = grpo.own_tokenizer(str(tmp_path / "judge"), grpo.Args(), "--reward-model")
    assert tokenizer.eos_token_id != END and tokenizer.eos_token_id is not None
    for prompt, end in ((tiny_rows()[0]["prompt"], END), ("1 + 1", tokenizer.eos_token_id)):
        [completion] = completions_of("2", ended=True, prompt=prompt)
        assert grpo.judged(tokenizer, completion).input_ids[-1] == end


def test_reward_model_without_a_template_for_messages_ends_the_run_with_one_line(judges, tmp_path, capsys):
    shutil.copytree(judges[0], tmp_path / "judge")
    (tmp_path / "judge" / "chat_template.jinja").unlink()
    prompts = [grpo.Prompt([1], row) for row in tiny_rows()[:1]]
    with pytest.raises(SystemExit) as stop:
        grpo.judge_tokenizers([judges[0], str(tmp_path / "judge")], prompts, grpo.Args())
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"--reward-model {tmp_path / 'judge'}" in line and "chat template" in line


def test_language_model_is_refused_as_a_reward_model(train):
    with pytest.raises(SystemExit):
        train(reward=(), reward_model=(str(ROOT / "tiny" / "sft"),), max_steps=1)


def test_gold_reward_is_logged_and_evaluated_on_but_not_optimised(train, rewards, tmp_path):
    held_out = write_rows(tmp_path / "held_out.jsonl", tiny_rows()[:3])
    flags = {"eval_dataset": held_out, "eval_samples": 2}
    _, plain = train(**flags)
    _, gold = train(eval_reward=rewards("brief"), **flags)
    evaluations = {key for key in plain[0] if key.startswith("eval/")}
    drop = lambda line: {k: v for k, v in line.items() if k != "gold_reward"}
    assert_same_metrics([drop(line) for line in gold], plain, rel=0, abs_=0, without=evaluations)
    assert all("gold_reward" not in line for line in plain)
    for line in gold[1:]:
        assert line["gold_reward"] == pytest.approx(-line["completions/mean_length"] / 10)
    for line in (gold[0], gold[2]):
        assert line["eval/reward"] == pytest.approx(-line["eval/mean_length"] / 10)


def test_evaluation_by_hand(monkeypatch):
    # two prompts, three samples each: right are 1 of 3 and 2 of 3; the majority is wrong for the first
    sampled = completions_of("#### 1", "#### 2", "so #### 2", "#### 1,000", "#### 1000", "3")
    greedy = completions_of("#### 1", "3")
    rollouts = iter([sampled, greedy])
    monkeypatch.setattr(grpo, "roll_out", lambda *_, **__: next(rollouts))
    right = {"#### 1": 1.0, "#### 1,000": 1.0, "#### 1000": 0.9}
    function = lambda completions, **_: [right.get(text, 0.0) for text in completions]
    args = grpo.Args(eval_samples=3)
    held_out = [sampled[0].prompt] * 2
    metrics, samples = grpo.evaluate_policy(
        None, tiny_tokenizer(), held_out, [("f", function)], [], (), args, CPU
    )
    assert metrics["eval/reward"] == pytest.approx(2.9 / 6)
    assert metrics["eval/greedy_reward"] == pytest.approx(0.5)
    assert metrics["eval/pass@k"] == 1 and metrics["eval/maj@k"] == pytest.approx(0.5)
    assert metrics["eval/clipped_ratio"] == 0
    assert [sample["completion"] for sample in samples] == ["#### 1", "#### 1,000"]


# Reference, rollouts, prompts -------------------------------------------------------------------------------


def test_reference_is_a_model_of_its_own_and_its_kl_may_be_in_the_loss(train):
    flags = {"ref_model": str(ROOT / "tiny" / "base"), "max_steps": 1}
    _, [plain] = train(**flags)
    _, [pulled] = train(beta=0.5, **flags)
    assert plain["kl"] == pulled["kl"] and plain["kl"] > 0.01
    assert plain["loss"] == pytest.approx(0, abs=1e-6) and pulled["loss"] > 1e-3
    assert pulled["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)


def test_run_stops_above_max_kl(train, capsys):
    folder, lines = train(max_steps=5, max_kl=1e-6)
    assert [line["step"] for line in lines] == [1, 2]  # at the first, the policy is the reference
    assert (folder / "model").is_dir() and "is above --max-kl 1e-06" in capsys.readouterr().out


def test_replayed_rollouts_train_as_they_did(train):
    folder, wanted = train(save_rollouts=True, loss_agg="token_mean")
    rollouts = folder / "rollouts.jsonl"
    assert len(read_lines(rollouts)) == 32
    other, found = train(replay_rollouts=str(rollouts), loss_agg="token_mean", max_steps=3)
    assert_same_metrics(found[:1], wanted[:1], without=("learning_rate",))
    assert found[1]["reward"] == wanted[1]["reward"] and found[2]["reward"] == wanted[0]["reward"]
    assert not (other / "rollouts.jsonl").exists()


def test_replayed_rollouts_keep_their_number_whatever_the_batch_size(train):
    folder, wanted = train(save_rollouts=True, max_steps=1, loss_agg="token_mean", num_minibatches=2)
    for batch_size in (8, 32):
        flags = {"replay_rollouts": str(folder / "rollouts.jsonl"), "batch_size": batch_size}
        _, found = train(max_steps=1, loss_agg="token_mean", num_minibatches=2, **flags)
        assert_same_metrics(found, wanted, without=("epoch",))


def test_replayed_rollouts_of_broken_groups_are_refused(train, capsys):
    folder, _ = train(save_rollouts=True, max_steps=1)
    with pytest.raises(SystemExit) as stop:
        train(replay_rollouts=str(folder / "rollouts.jsonl"), batch_size=12, num_generations=3)
    assert stop.value.code == 2 and "groups are not of 3 completions" in capsys.readouterr().err


def test_replayed_rollouts_of_another_group_size_are_refused(train):
    folder, _ = train(save_rollouts=True, max_steps=1)
    with pytest.raises(SystemExit):
        train(replay_rollouts=str(folder / "rollouts.jsonl"), num_generations=8)


def test_continued_run_writes_its_rollouts_once(train):
    flags = {"max_steps": 4, "save_every": 2, "save_rollouts": True, "max_completion_length": 4}
    folder, _ = train(**flags)
    copy, _ = continued_run(train, folder, **flags)
    assert read_lines(copy / "rollouts.jsonl") == read_lines(folder / "rollouts.jsonl")


def tokenized(tmp_path, rows, limit=0, **flags):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return grpo.tokenize_prompts(tiny_tokenizer(), path, "train", grpo.Args(**flags), limit)


def test_prompts_are_messages_text_or_questions(tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": messages}, {"prompt": "Hi"}, {"question": "Hi", "answer": "x"}]
    found = tokenized(tmp_path, rows)
    templated = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert [tiny_tokenizer().decode(p.input_ids) for p in found] == [templated, "Hi", templated]
    assert [p.row["prompt"] for p in found] == [messages, "Hi", messages] and found[2].row["answer"] == "x"
    assert len(tokenized(tmp_path, rows, limit=2)) == 2


def test_prompt_template_takes_the_place_of_the_chat_template(tmp_path):
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + {x}"}]
    rows = [{"prompt": conversation}, {"prompt": "Why?"}, {"question": "How?"}]
    found = tokenized(tmp_path, rows, prompt_template="User: {prompt}\nAssistant: {x}")
    wanted = [f"User: {text}\nAssistant: {{x}}" for text in ("2 + {x}", "Why?", "How?")]
    assert [tiny_tokenizer().decode(p.input_ids) for p in found] == wanted
    assert [p.row["prompt"] for p in found] == wanted


def test_prompts_that_are_too_long_are_dropped_and_counted(tmp_path, capsys):
    rows = [{"prompt": "1 " * n} for n in (3, 40, 4, 50)]
    lengths = [len(tiny_tokenizer()(row["prompt"]).input_ids) for row in rows]
    found = tokenized(tmp_path, rows, max_prompt_length=lengths[2])
    assert [p.row["prompt"] for p in found] == [rows[0]["prompt"], rows[2]["prompt"]]
    told = f"2 prompts, 2 dropped as longer than {lengths[2]} tokens"
    assert told in capsys.readouterr().out


# Errors and real data ---------------------------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path, rewards):
    """refused(pattern, rows, **flags): one line on stderr, exit status 2, no model, nothing written."""

    def run(pattern, rows=None, **flags):
        monkeypatch.setattr(grpo, "load_model", lambda *_: pytest.fail("a model was loaded"))
        defaults = {"dataset": (write_rows(tmp_path / "rows.jsonl", rows or tiny_rows()[:4]),)}
        defaults |= {"output_dir": str(tmp_path / "run"), "reward": rewards("residue")}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            grpo.main(grpo.Args(**(defaults | flags)))
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1, lines
        assert lines[0].startswith("error: ") and re.search(pattern, lines[0]), lines[0]
        assert not (tmp_path / "run").exists()

    return run


@pytest.mark.parametrize(
    "pattern, flags",
    [
        (r"--batch-size must be at least 1", {"batch_size": 0}),
        (r"--num-iterations must be at least 1", {"num_iterations": 0}),
        (r"--eval-samples must be at least 1", {"eval_samples": 0}),
        (r"--num-generations 1: a group needs at least 2", {"num_generations": 1}),
        (r"--batch-size 10 is no multiple of --num-generations 4", {"batch_size": 10, "num_generations": 4}),
        (r"--num-minibatches 3: more than the prompts", {"batch_size": 16, "num_minibatches": 3}),
        (r"--temperature must be above 0", {"temperature": 0.0}),
        (r"--top-p must be 1", {"top_p": 0.9}),
        (r"--reward-weights has 2 numbers for 1 rewards", {"reward_weights": (1.0, 2.0)}),
        (r"--prompt-template has no \{prompt\}", {"prompt_template": "Question:"}),
        (r"--resume needs --output-dir", {"resume": True, "output_dir": None}),
        (r"--model \./nowhere: no such folder", {"model": "./nowhere"}),
        (r"nowhere\.jsonl: no such file", {"dataset": ("nowhere.jsonl",)}),
        (r"nowhere\.jsonl: no such file", {"eval_dataset": "nowhere.jsonl"}),
        (r"nowhere\.jsonl: no such file", {"replay_rollouts": "nowhere.jsonl"}),
        (r"nowhere\.py:f: not file\.py:function", {"reward": ("nowhere.py:f",)}),
        (r"nowhere\.py:f: not file\.py:function", {"eval_reward": ("nowhere.py:f",)}),
        (r"a_name: not file\.py:function", {"reward": ("a_name",)}),
        (r"--chat-template nowhere: no such file", {"chat_template": "nowhere"}),
        (r"no prompt is within --max-prompt-length 2", {"max_prompt_length": 2}),
        pytest.param(r"--reward-model \./nowhere: no such folder", {"reward_model": ("./nowhere",)}),
        pytest.param(r"--ref-model \./nowhere: no such folder", {"ref_model": "./nowhere"}),
    ],
)
def test_mistakes_end_the_run_with_one_line_before_a_model_is_loaded(refused, pattern, flags):
    refused(pattern, **flags)


def test_reward_file_without_the_function_or_with_an_error_ends_the_run(refused, rewards, tmp_path):
    refused(r"my_rewards\.py has no function unknown", reward=rewards("unknown"))
    (tmp_path / "broken.py").write_text("import nonexistent_module\n")
    refused(r"broken\.py:f: ModuleNotFoundError", reward=(f"{tmp_path}/broken.py:f",))


@pytest.mark.parametrize(
    "pattern, bad",
    [
        (r"row 3: found the columns text, prompt; needed is prompt or question", {"text": "a"}),
        (r"row 3: found the columns prompt; needed is prompt or question", {"prompt": []}),
        (r"row 3: found the columns prompt; needed is prompt or question", {"prompt": 5}),
        (r"row 3: not an object with columns, but str", "a text"),
        (r"row 3: neither text nor messages", {"prompt": ["a"]}),
    ],
)
def test_bad_rows_end_the_run_with_one_line(refused, pattern, bad):
    refused(pattern, [*tiny_rows()[:2], bad])


def test_bad_messages_under_a_prompt_template_end_the_run_with_one_line(refused):
    refused(r"row 2: ", [tiny_rows()[0], {"prompt": ["a"]}], prompt_template="{prompt}")


def test_file_that_is_no_rollout_ends_the_run_with_one_line(refused, tmp_path):
    path = write_rows(tmp_path / "other.jsonl", [{"step": 1, "prompt_ids": [1]}])
    refused(r"other\.jsonl: not a rollouts\.jsonl", replay_rollouts=path)


def test_folder_of_a_finished_run_is_left_alone(train, capsys):
    folder, _ = train(max_steps=1)
    lines = read_lines(folder / "metrics.jsonl")
    for flags, pattern in (({}, "--resume continues it"), ({"resume": True}, "without checkpoints")):
        with pytest.raises(SystemExit) as stop:
            train(output_dir=str(folder), **flags)
        assert stop.value.code == 2 and pattern in capsys.readouterr().err
    assert read_lines(folder / "metrics.jsonl") == lines


def test_gsm8k_prompts_train_a_random_model(gsm8k, train, rewards, random_model):
    rows = read_lines(gsm8k / "train.jsonl")[:8]
    [right] = completions_of("6 * 7 = <<6*7=42>>42\n#### 42")
    function = grpo.load_function(rewards("solved")[0])
    assert function([right.text, "42"], ["#### 42"] * 2) == [1, 0]
    flags = {"model": str(random_model), "batch_size": 8, "max_completion_length": 6}
    _, lines = train(rows, reward=rewards("solved", "residue"), max_prompt_length=1024, **flags)
    assert len(lines) == 2 and all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[1]["grad_norm"] > 0 and lines[1]["sampling/logp_difference_mean"] < 1e-4
    assert lines[0]["rewards/solved/mean"] == 0 and lines[0]["num_tokens"] > 8 * 50
