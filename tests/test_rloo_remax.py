"""rloo_remax.py: its baselines, returns and losses, the variance of its gradient, short runs and errors.

Gradients are held against those of the expected reward over every sequence of a small vocabulary (see
test_grpo.py) and of the stock model, values against numbers worked by hand.
"""

import itertools
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
from test_grpo import Table, distance, expected_gradient, true_gradient
from transformers import AutoModelForCausalLM

import rloo_remax as rr

END = 2  # <|im_end|> of tiny's tokenizer
CLOCK = {"tokens_per_second", "step_time"}  # what no two runs share
CLOCK |= {f"time/{stage}" for stage in ("rollout", "reward", "logprobs", "update")}
ALGORITHMS = ("reinforce", "rloo", "remax", "reinforce_pp", "reinforce_pp_baseline")


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def settings(algorithm, gamma=1.0):
    return SimpleNamespace(algorithm=algorithm, gamma=gamma)


# Gradients against enumeration ------------------------------------------------------------------------------


def plain(logps, advantages):
    return rr.reinforce_loss(logps, logps.detach(), advantages)


def clipped(logps, advantages):
    return rr.reinforce_loss(logps, logps.detach(), advantages, clip=(0.2, 0.2))


@pytest.mark.parametrize("loss_of", [plain, clipped])
@pytest.mark.parametrize("end", [None, 2], ids=["equal-lengths", "an-end"])
def test_reinforce_is_unbiased(end, loss_of):
    table = Table(5, end)
    found = expected_gradient(table, 1, lambda rewards: rewards, loss_of)
    assert distance(found, true_gradient(table)) < 1e-6


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("end", [None, 2], ids=["equal-lengths", "an-end"])
def test_rloo_is_unbiased(end, group_size):
    table = Table(6, end)
    found = expected_gradient(table, group_size, rr.rloo_advantages, plain)
    assert distance(found, true_gradient(table)) < 1e-6


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("end", [None, 2], ids=["equal-lengths", "an-end"])
def test_remax_is_unbiased(end, group_size):
    table = Table(7, end)
    greedy, row = (), 0
    while greedy not in table.sequences:  # rows of the table: the empty prefix, a, b, c, aa, ab ...
        greedy += (table.logits[row].argmax().item(),)
        row = 3 * row + 1 + greedy[-1]
    score = table.rewards[table.sequences.index(greedy)]
    baselines = lambda rewards: rr.remax_advantages(rewards, score.expand(len(rewards)))
    found = expected_gradient(table, group_size, baselines, plain)
    assert distance(found, true_gradient(table)) < 1e-6


def test_baselines_quieten_the_gradient():
    # The same mean; the variance about it over all pairs is what baselines are for.
    table = Table(8)
    table.rewards = table.rewards + 2  # all is good, so that plain REINFORCE pushes everything
    pairs = torch.tensor(list(itertools.product(range(27), repeat=2)))
    scores = torch.stack(
        [table.gradient(table.token_logps([i]).sum()).flatten() for i in range(27)]
    )  # of each sequence
    chances = table.probabilities().detach()[pairs].prod(1)

    def variance(advantages):
        gradients = (advantages[..., None] * scores[pairs]).mean(1)  # (729, 39)
        mean = (chances[:, None] * gradients).sum(0)
        assert distance(mean.view(13, 3), true_gradient(table)) < 1e-6
        return (chances * (gradients - mean).square().sum(1)).sum().item()

    rewards = table.rewards[pairs]
    assert variance(rr.rloo_advantages(rewards)) < 0.5 * variance(rewards)


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


def regularised_gradient(table, ref, kl_coef):
    """Of the expected reward minus kl_coef KL(pi || ref) of whole sequences."""
    logps, ref_logps = (
        torch.stack([x.sum() for x in t.token_logps(range(len(t.sequences))).split(t.lengths.tolist())])
        for t in (table, ref)
    )
    kl = (logps.exp() * (logps - ref_logps.detach())).sum()
    return table.gradient((logps.exp() * table.rewards).sum() - kl_coef * kl)


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
def test_returns_of_tokens_give_that_gradient_as_well(end):
    # What was paid before a token is not its doing; to leave it out changes no expectation.
    table, ref = Table(11, end), Table(12, end)
    returns = lambda rewards, penalties, index: rr.reinforce_pp_returns(
        rewards.flatten(), penalties, index, gamma=1.0
    )
    found = penalised(table, ref, 0.7, 1, returns)
    assert distance(found, regularised_gradient(table, ref, 0.7)) < 1e-6


# Advantages and losses --------------------------------------------------------------------------------------


def test_rloo_advantages_by_hand():
    found = rr.rloo_advantages(float64([1, 2, 6], [5, 5, 5]))
    assert found.tolist() == [[1 - 4, 2 - 3.5, 6 - 1.5], [0, 0, 0]]
    assert rr.rloo_advantages(float64([0.1] * 3)).abs().max() < 1e-15


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


def test_completion_without_a_score_takes_no_part_in_rloo():
    nan = math.nan
    found = rr.rloo_advantages(float64([1, nan, 3, 8], [nan, 5, nan, nan], [nan] * 4))
    assert found.tolist() == [[1 - 5.5, 0, 3 - 4.5, 8 - 2], [0] * 4, [0] * 4]


def test_remax_advantages_by_hand():
    nan = math.nan
    found = rr.remax_advantages(float64([1, 0, nan], [2, 3, 4]), float64(0.25, 3))
    assert found.tolist() == [[0.75, -0.25, 0], [-1, 0, 1]]


def test_returns_by_hand():
    # two sequences of 3 tokens and 1; penalties 1, 2, 4 and 8
    found = rr.reinforce_pp_returns(
        float64(10, 5), float64(1, 2, 4, 8), torch.tensor([0, 0, 0, 1]), gamma=0.5
    )
    assert found.tolist() == [-1 - 0.5 * 2 + 0.25 * 6, -2 + 0.5 * 6, 6, -3]
    plain_sum = rr.reinforce_pp_returns(
        float64(10, 5), float64(1, 2, 4, 8), torch.tensor([0, 0, 0, 1]), gamma=1.0
    )
    assert plain_sum.tolist() == [3, 4, 6, -3]


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_returns_are_the_double_sum_on_ragged_lengths(gamma):
    rng, lengths = np.random.default_rng(0), [3, 1, 7, 2, 1, 5]
    rewards, penalties = rng.normal(size=6), [rng.normal(size=n) for n in lengths]
    wanted = []
    for reward, line in zip(rewards, penalties, strict=True):
        end = len(line) - 1
        for t in range(len(line)):
            later = sum(gamma ** (k - t) * -line[k] for k in range(t, len(line)))
            wanted.append(later + gamma ** (end - t) * reward)
    index = torch.arange(6).repeat_interleave(torch.tensor(lengths))
    flat = torch.tensor(np.concatenate(penalties))
    found = rr.reinforce_pp_returns(torch.tensor(rewards), flat, index, gamma=gamma)
    assert found.tolist() == pytest.approx(wanted)


def test_whiten_by_hand():
    assert rr.whiten(float64(1, 2, 3)).tolist() == pytest.approx([-1, 0, 1])
    assert rr.whiten(float64(0, 0, 0, 2)).tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5])
    for values in ([0.1] * 3, [7.0], [], [-2.0, -2.0]):
        assert rr.whiten(torch.tensor(values)).tolist() == [0] * len(values)


def test_loss_has_the_same_gradient_with_and_without_a_clip_at_ratio_1():
    advantages = float64(1.5, -0.5, 0.0, -2.0)
    gradients = []
    for clip in (None, (0.2, 0.2)):
        logprobs = float64(-0.5, -3.0, -0.01, -1.0).requires_grad_()
        losses = rr.reinforce_loss(logprobs, logprobs.detach(), advantages, clip=clip)
        gradients.append(torch.autograd.grad(losses.sum(), logprobs)[0].tolist())
    assert gradients[0] == gradients[1] == [-1.5, 0.5, 0, 2]
    assert (
        rr.reinforce_loss(float64(-2.0), float64(-9.0), float64(3.0)).item() == 6
    )  # whatever the old policy


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [(0.5, 2, -1, -1), (0.5, -2, 1.6, 0), (1.5, 2, -2.6, 0), (1.5, -2, 3, 3), (1.25, 2, -2.5, -2.5)],
)
def test_clip_by_hand(ratio, advantage, loss, slope):
    logprobs = float64(-1.3).requires_grad_()
    old = logprobs.detach() - math.log(ratio)
    found = rr.reinforce_loss(logprobs, old, float64(advantage), clip=(0.2, 0.3))
    assert found.item() == pytest.approx(loss)
    assert torch.autograd.grad(found.sum(), logprobs)[0].item() == pytest.approx(slope)


# Five tokens: sequences of 2 and 1 of one prompt, of 1 and 1 of another.
INDEX = torch.tensor([0, 0, 1, 2, 3])
PENALTIES = torch.tensor([0.5, 1.0, 2.0, -1.0, 0.0])
BY_HAND = {
    # rewards minus the sequence's penalties: 4 - 1.5, 1 - 2; 0 + 1, 6
    "reinforce": (2.5, 2.5, -1, 1, 6),
    "rloo": (3.5, 3.5, -3.5, -5, 5),
    "remax": (2.0, 2.0, -1.5, -1, 4),
}


@pytest.mark.parametrize("algorithm", BY_HAND)
def test_advantages_of_tokens_by_hand(algorithm):
    rewards, greedy = float64([4, 1], [0, 6]), float64(0.5, 2)
    found = rr.token_advantages(rewards, PENALTIES, INDEX, greedy, settings(algorithm))
    assert found.tolist() == pytest.approx(BY_HAND[algorithm])


@pytest.mark.parametrize(
    "algorithm, gamma, returns",
    [
        ("reinforce_pp", 1.0, (4 - 1.5, 4 - 1, 1 - 2, 0 + 1, 6)),
        ("reinforce_pp", 0.5, (0.5 * 3 - 0.5, 3, -1, 1, 6)),
        # rewards 1.5, -1.5; -3, 3
        ("reinforce_pp_baseline", 1.0, (1.5 - 1.5, 1.5 - 1, -1.5 - 2, -3 + 1, 3)),
    ],
)
def test_whitened_returns_of_tokens_by_hand(algorithm, gamma, returns):
    rewards = float64([4, 1], [0, 6])
    found = rr.token_advantages(rewards, PENALTIES, INDEX, float64(), settings(algorithm, gamma))
    mean, std = np.mean(returns), np.std(returns, ddof=1)
    assert found.tolist() == pytest.approx([(x - mean) / std for x in returns], rel=1e-5)


@pytest.mark.parametrize(
    "algorithm",
    ALGORITHMS,
)
def test_completion_without_a_reward_gets_no_advantage(algorithm):
    rewards = float64([math.nan, 4], [1, 8])
    index = torch.tensor([0, 0, 1, 2, 3, 3, 3])
    found = rr.token_advantages(rewards, torch.zeros(7), index, float64(1, 2), settings(algorithm))
    assert found[:2].tolist() == [0, 0] and found[3:].abs().max() > 0


# Variance of the gradient -----------------------------------------------------------------------------------


def test_gradient_variance_by_hand():
    # halves (1, 2), (3) and (3, 4), (-1): differences 2, 2, -4
    half, whole = [float64(1, 2), float64([3])], [float64(4, 6), float64([2])]
    assert rr.gradient_variance(half, whole, 0.5).item() == pytest.approx(24)
    assert rr.gradient_variance(half, [2 * x for x in half], 0.5).item() == 0


def test_gradient_variance_is_unbiased():
    # Halves drawn at random from 3 gradients: the variance of their sum over all 9 cases.
    gradients = [float64(1, -2, 0.5), float64(0, 3, 1), float64(-4, 0.1, 2)]
    cases = list(itertools.product(gradients, repeat=2))
    found = np.mean([rr.gradient_variance([a], [a + b], 0.5).item() for a, b in cases])
    sums = torch.stack([a + b for a, b in cases])
    assert found == pytest.approx(sums.var(0, unbiased=False).sum().item())


# Short runs -------------------------------------------------------------------------------------------------

REWARDS = """
def residue(completion_ids, **columns):
    return [sum(ids) % 7 / 3 for ids in completion_ids]


def nothing(completions, **columns):
    return [None] * len(completions)


def solved(completions, answer, **columns):
    last = lambda text: text.split("####")[-1].strip().replace(",", "")
    texts = [c[0]["content"] for c in completions]
    return [float("####" in text and last(text) == last(a)) for text, a in zip(texts, answer)]
"""


def tiny_rows():
    path = ROOT / "tiny" / "data" / "prompts_train.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[:64]]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


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
        defaults = {"dataset": (path,), "output_dir": str(folder), "reward": rewards("residue")}
        defaults |= {"batch_size": 16, "num_generations": 4, "max_completion_length": 12, "max_steps": 2}
        defaults |= {"eval_every": 0, "save_every": 0, "warmup_steps": 0}
        run.result = rr.main(rr.Args(**(defaults | flags)))
        folder = Path((defaults | flags)["output_dir"])
        lines = read_lines(folder / "metrics.jsonl")
        return folder, [line for line in lines if len(line) > 1]  # without step 0 where nothing was evaluated

    run.count = 0
    return run


def assert_same_metrics(one, other, rel=1e-5, abs_=1e-6, without=()):
    assert len(one) == len(other)
    for line, wanted in zip(one, other, strict=True):
        assert line.keys() == wanted.keys()
        for key in wanted.keys() - CLOCK - {"packing/fill"} - set(without):
            assert line[key] == pytest.approx(wanted[key], rel=rel, abs=abs_), (key, wanted["step"])


@pytest.fixture
def ratios(monkeypatch):
    """The ratios of every row of a run, in order."""
    found, clip_shares = [], rr.clip_shares
    spy = lambda ratio, *rest: found.append(ratio) or clip_shares(ratio, *rest)
    monkeypatch.setattr(rr, "clip_shares", spy)
    return found


LENGTHS, SCORES, GREEDY_SCORES = (1, 3, 2, 2), (1.0, 0.0, 3.0, 1.0), (0.5, 2.0)  # of 2 groups of 2
ANSWERS = [[*range(10, 9 + n), END] for n in LENGTHS]


@pytest.fixture
def scripted(monkeypatch):
    """scripted(scores, answers): these completions and rewards in place of sampled ones."""

    def script(scores=SCORES, answers=ANSWERS):
        def roll_out(policy, tokenizer, prompts, args, device, *, seed):
            ids = [[END]] * len(prompts) if args.temperature < 1e-3 else answers
            return [
                rr.completion_of(tokenizer, prompt, x, np.zeros(len(x), np.float32))
                for prompt, x in zip(prompts, ids, strict=True)
            ]

        def score(functions, judges, rollout, args, device):
            lines = {len(scores): scores, len(GREEDY_SCORES): GREEDY_SCORES, 0: ()}
            return float64(*[lines[len(rollout)]] * len(functions)).view(len(functions), len(rollout))

        monkeypatch.setattr(rr, "roll_out", roll_out)
        monkeypatch.setattr(rr, "score", score)

    return script


def stock_logps(name, prompt):
    """Log-probs of the tokens of each answer under the stock model, with their gradients."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / name, dtype=torch.float32).eval()
    found = []
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


def weighted_loss(advantages, logps):
    """-sum of A log pi over all tokens; 4 completions of at most 8 tokens each."""
    pairs = zip(advantages, logps, strict=True)
    return -sum((a * x).sum() for a, x in pairs) / (4 * 8)


@pytest.mark.parametrize("algorithm", STEP)
def test_loss_and_gradient_of_a_step_are_those_of_the_stock_model(train, scripted, algorithm):
    scripted()
    rows = [{"prompt": "1 + 1 ="}] * 2
    flags = {"batch_size": 4, "num_generations": 2, "max_steps": 1, "max_completion_length": 8}
    _, [line] = train(rows, algorithm=algorithm, **flags)
    prompt = rr.load_tokenizer(rr.Args())(rows[0]["prompt"]).input_ids
    model, logps = stock_logps("sft", prompt)
    loss = weighted_loss(STEP[algorithm], logps)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    spread = np.repeat(STEP[algorithm], LENGTHS)
    assert line["advantage_std"] == pytest.approx(np.std(spread, ddof=1), rel=1e-5)
    assert line["reward"] == pytest.approx(5 / 4) and line["kl"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("algorithm", ["rloo", "reinforce_pp"])
def test_kl_of_a_step_is_taken_off_the_rewards(train, scripted, algorithm):
    scripted()
    rows = [{"prompt": "1 + 1 ="}] * 2
    flags = {"batch_size": 4, "num_generations": 2, "max_steps": 1, "max_completion_length": 8}
    ref = str(ROOT / "tiny" / "base")
    _, [line] = train(rows, algorithm=algorithm, kl_coef=0.3, ref_model=ref, **flags)
    prompt = rr.load_tokenizer(rr.Args())(rows[0]["prompt"]).input_ids
    _, logps = stock_logps("sft", prompt)
    _, ref_logps = stock_logps("base", prompt)
    gaps = [0.3 * (x - y).detach() for x, y in zip(logps, ref_logps, strict=True)]
    if algorithm == "rloo":
        a, b, c, d = (r - gap.sum() for r, gap in zip(SCORES, gaps, strict=True))
        advantages = [a - b, b - a, c - d, d - c]
    else:
        later = [
            torch.stack([r - gap[t:].sum() for t in range(len(gap))])
            for r, gap in zip(SCORES, gaps, strict=True)
        ]
        flat = torch.cat(later)
        advantages = [(x - flat.mean()) / flat.std(unbiased=True) for x in later]
    loss = weighted_loss(advantages, logps).item()
    assert line["loss"] == pytest.approx(loss, rel=1e-4)
    assert line["loss"] != pytest.approx(weighted_loss(STEP[algorithm], logps).item(), rel=1e-2)
    assert line["reward"] == pytest.approx(5 / 4)  # the reward alone


@pytest.mark.parametrize("num_groups", [2, 4, 3])
def test_gradient_of_groups_that_are_all_the_same_has_no_variance(train, scripted, num_groups):
    scripted((1.0, 0.0) * num_groups, [[11, 12, END], [13, END]] * num_groups)
    rows = [{"prompt": "1 + 1 ="}] * num_groups
    _, [line] = train(rows, batch_size=2 * num_groups, num_generations=2, max_steps=1)
    assert line["grad_norm"] > 0.01
    assert line["gradient/variance"] == pytest.approx(0, abs=1e-4 * line["grad_norm"] ** 2)


def test_gradient_variance_of_a_step_is_that_of_its_halves(train, scripted):
    scripted((1.0, 0.0, 0.0, 3.0))
    rows = [{"prompt": "1 + 1 ="}] * 2
    flags = {"batch_size": 4, "num_generations": 2, "max_steps": 1, "max_completion_length": 8}
    _, [line] = train(rows, **flags)
    gradients = []
    for advantages in ((1, -1, 0, 0), (0, 0, -3, 3)):
        prompt = rr.load_tokenizer(rr.Args())(rows[0]["prompt"]).input_ids
        model, logps = stock_logps("sft", prompt)
        weighted_loss(advantages, logps).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    wanted = (gradients[0] - gradients[1]).square().sum().item()
    assert line["gradient/variance"] == pytest.approx(wanted, rel=1e-3)


def test_measuring_the_variance_changes_nothing_else(train):
    _, wanted = train()
    _, found = train(gradient_variance=False)
    assert_same_metrics(found[:1], wanted[:1], without=("gradient/variance",))
    assert found[0]["gradient/variance"] == 0 < wanted[0]["gradient/variance"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_first_pass_has_ratios_of_exactly_1_and_a_gradient(train, ratios, algorithm):
    _, lines = train(algorithm=algorithm, max_tokens_per_micro_batch=256)
    assert len(ratios) >= 4 and all((ratio == 1).all() for ratio in ratios)
    for line in lines:
        assert line["grad_norm"] > 0.01
        assert line["clip_ratio/low_mean"] == line["clip_ratio/high_mean"] == 0
        assert line["sampling/logp_difference_mean"] < 1e-4
    assert lines[0]["kl"] == 0 and lines[1]["kl"] > 1e-5


def test_second_pass_over_a_rollout_has_other_ratios(train, ratios):
    _, [line] = train(num_iterations=2, max_steps=1, epsilon=1e-3, epsilon_high=1e-3, kl_coef=0.1)
    first, second = torch.cat(ratios[: len(ratios) // 2]), torch.cat(ratios[len(ratios) // 2 :])
    assert (first - 1).abs().max() < 1e-4 and (second - 1).abs().max() > 0.01
    assert line["clip_ratio/low_mean"] > 0 and line["clip_ratio/high_mean"] > 0


@pytest.mark.parametrize(
    "flags",
    [
        {"kl_coef": 0.1},
        {"algorithm": "remax", "temperature": 0.8},
        {
            "algorithm": "reinforce_pp",
            "kl_coef": 0.1,
            "gamma": 0.9,
            "num_iterations": 2,
            "num_minibatches": 2,
        },
    ],
    ids=["rloo", "remax", "reinforce_pp"],
)
def test_memory_flags_change_nothing(train, flags):
    _, wanted = train(**flags)
    _, found = train(max_tokens_per_micro_batch=128, generation_batch_size=3, **flags)
    assert_same_metrics(found[:1], wanted[:1])
    assert_same_metrics(found[1:], wanted[1:], rel=1e-3, abs_=1e-5)  # after steps of Adam
    assert wanted[1]["grad_norm"] > 0.01


@pytest.mark.parametrize("flags", [{"algorithm": "remax"}, {"algorithm": "reinforce_pp", "kl_coef": 0.1}])
def test_continued_run_equals_one_that_never_stopped(train, flags):
    flags = {"max_steps": 4, "save_every": 2, "max_completion_length": 8} | flags
    folder, wanted = train(**flags)
    copy = folder.with_name("continued")
    shutil.copytree(folder, copy)
    # As if it had been stopped in its fourth step
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "checkpoints" / "step_00000004")
    _, found = train(output_dir=str(copy), resume=True, **flags)
    assert_same_metrics(found, wanted, rel=0, abs_=0)
    one, other = (load_file(x / "model" / "model.safetensors") for x in (folder, copy))
    assert all(torch.equal(one[name], other[name]) for name in one) and len(wanted) == 4


@pytest.mark.parametrize("algorithm", ["rloo", "remax"])
def test_replayed_rollouts_train_as_they_did(train, algorithm):
    folder, wanted = train(save_rollouts=True, algorithm=algorithm, max_steps=1)
    rollouts = str(folder / "rollouts.jsonl")
    _, found = train(replay_rollouts=rollouts, algorithm=algorithm, max_steps=1)
    assert_same_metrics(found, wanted)


@pytest.mark.parametrize("batch_size", [8, 32])
def test_replayed_rollouts_keep_their_number_whatever_the_batch_size(train, batch_size):
    folder, wanted = train(save_rollouts=True, max_steps=1)
    rollouts = str(folder / "rollouts.jsonl")
    _, found = train(replay_rollouts=rollouts, batch_size=batch_size, max_steps=1)
    assert_same_metrics(found, wanted, without=("epoch",))


def greedy_prompts(monkeypatch):
    """The prompts (token ids) of each greedy roll-out of a run."""
    asked, roll_out = [], rr.roll_out

    def spy(policy, tokenizer, prompts, args, device, *, seed):
        if args.temperature < 1e-3:
            asked.append([prompt.input_ids for prompt in prompts])
        return roll_out(policy, tokenizer, prompts, args, device, seed=seed)

    monkeypatch.setattr(rr, "roll_out", spy)
    return asked


def test_greedy_baselines_are_of_the_prompts_of_the_step(train, monkeypatch):
    asked = greedy_prompts(monkeypatch)
    folder, _ = train(algorithm="remax", save_rollouts=True)
    rows = read_lines(folder / "rollouts.jsonl")
    steps = [[row["prompt_ids"] for row in rows if row["step"] == step][::4] for step in (1, 2)]
    assert asked == steps and len(asked[0]) == 4


def test_greedy_baselines_of_replayed_rollouts_are_of_their_prompts(train, monkeypatch):
    folder, _ = train(save_rollouts=True, max_steps=1)
    rollouts = folder / "rollouts.jsonl"
    recorded = [row["prompt_ids"] for row in read_lines(rollouts)][::4]
    asked = greedy_prompts(monkeypatch)
    train(algorithm="remax", replay_rollouts=str(rollouts))  # 2 steps, both of the one recorded
    assert asked == [recorded] * 2


@pytest.mark.parametrize("algorithm", ["reinforce", "remax", "reinforce_pp"])
def test_one_completion_of_a_prompt_is_enough_without_a_group_baseline(train, algorithm):
    _, lines = train(algorithm=algorithm, num_generations=1, batch_size=8)
    assert all(line["grad_norm"] > 0.01 and line["reward_std"] == 0 for line in lines)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rewards_of_none_get_no_gradient(train, rewards, algorithm):
    _, [line] = train(reward=rewards("nothing"), algorithm=algorithm, max_steps=1, max_completion_length=4)
    assert line["grad_norm"] == 0


# Errors and real data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, flags",
    [
        (r"--num-generations 1: --algorithm rloo compares at least 2", {"num_generations": 1}),
        (
            r"--num-generations 1: --algorithm reinforce_pp_baseline compares",
            {"num_generations": 1, "algorithm": "reinforce_pp_baseline"},
        ),
        (r"--num-generations must be at least 1, not 0", {"num_generations": 0, "algorithm": "remax"}),
        (r"--gamma must lie in \[0, 1\], not 1\.5", {"gamma": 1.5}),
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
    monkeypatch.setattr(rr, "load_model", lambda *_: pytest.fail("a model was loaded"))
    defaults = {"dataset": (write_rows(tmp_path / "rows.jsonl", tiny_rows()[:4]),)}
    defaults |= {"output_dir": str(tmp_path / "run"), "reward": rewards("residue")}
    with pytest.raises(SystemExit) as stop:
        rr.main(rr.Args(**(defaults | flags)))
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and re.search(pattern, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", ["rloo", "remax"])
def test_gsm8k_prompts_train_a_random_model(gsm8k, train, rewards, random_model, algorithm):
    rows = read_lines(gsm8k / "train.jsonl")[:8]
    flags = {"model": str(random_model), "batch_size": 8, "max_completion_length": 6, "algorithm": algorithm}
    _, lines = train(rows, reward=rewards("solved", "residue"), max_prompt_length=1024, **flags)
    assert len(lines) == 2 and all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[1]["grad_norm"] > 0 and lines[1]["sampling/logp_difference_mean"] < 1e-4
    assert lines[0]["rewards/solved/mean"] == 0 and lines[0]["num_tokens"] > 8 * 50
