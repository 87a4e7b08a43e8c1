"""ppo_rlhf.py against the gradient by enumeration, stock models, and numbers worked by hand."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from helpers import assert_same_metrics, trainer
from samples import CPU, END, float64, stock, stock_classifier, tiny_rows, tiny_tokenizer
from test_grpo import Table, distance, regularised_gradient, true_gradient

import common
import ppo_rlhf as ppo

JUDGE, BASE = "tiny/reward", "tiny/base"
pytestmark = pytest.mark.usefixtures("process_group")


LENGTHS = (3, 1, 7, 2, 1, 40)
INDEX = torch.tensor([4, 0, 9, 2, 7, 1]).repeat_interleave(torch.tensor(LENGTHS))  # numbers of sequences


def double_sum(rewards, values, gamma, lam):
    """Eq. 16 of arXiv:1506.02438 for one sequence, term by term."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    weighted = lambda t: [(gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])]
    return [sum(weighted(t)) for t in range(len(deltas))]


@pytest.mark.parametrize("gamma, lam", [(1, 0.95), (0.9, 0.5), (1, 1), (0.8, 0), (0, 0.5)])
def test_gae_is_the_double_sum_on_ragged_lengths(gamma, lam):
    rewards, values = torch.randn(2, 54, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = rewards.clone(), values.clone()
    wanted = []
    for r, v in zip(rewards.split(LENGTHS), values.split(LENGTHS), strict=True):
        wanted += double_sum(r.tolist(), v.tolist(), gamma, lam)
    found, returns = ppo.gae(rewards, values, INDEX, gamma, lam)
    assert found.tolist() == pytest.approx(wanted, abs=1e-12)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(wanted, values.tolist(), strict=True)])
    assert torch.equal(rewards, given[0]) and torch.equal(values, given[1])  # and they stay as they are


def test_gae_by_hand():
    # deltas 1 + 0.5 * 5 - 3 = 0.5 and 2 - 5 = -3; alone 7 - 4
    rewards, values, index = float64(1, 2, 7), float64(3, 5, 4), torch.tensor([0, 0, 1])
    advantages, returns = ppo.gae(rewards, values, index, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [0.5 - 0.25 * 3, -3, 3] and returns.tolist() == [2.75, 2, 7]
    nothing = torch.zeros(0, dtype=torch.float64)
    assert [len(x) for x in ppo.gae(nothing, nothing, nothing.long(), 1.0, 0.95)] == [0, 0]


def expected_gradient(table, advantages_of):
    """The mean of minus the gradient of PPO's loss at ratio 1 over all that the policy may sample."""
    ids = range(len(table.sequences))
    chances, logps = table.probabilities().detach(), table.token_logps(ids)
    index = torch.arange(len(ids)).repeat_interleave(table.lengths)
    ratio = torch.exp(logps - logps.detach())
    losses = ppo.ppo_policy_loss(ratio, advantages_of(index, logps.detach()), epsilon=0.2, epsilon_high=0.2)
    return -table.gradient((losses * chances[index]).sum())


both_kinds = pytest.mark.parametrize("end", [None, 2], ids=["equal-lengths", "an-end"])


@both_kinds
def test_score_and_kl_as_rewards_of_tokens_give_the_gradient_of_reward_minus_kl(end):
    table, ref = Table(9, end), Table(10, end)

    def advantages_of(index, logps):
        log_ratio = (logps - ref.token_logps(range(len(table.sequences)))).detach()
        rewards = ppo.shaped_rewards(table.rewards[index], log_ratio, index, kl_coef=0.7)
        return ppo.gae(rewards, torch.zeros_like(rewards), index, gamma=1.0, lam=1.0)[0]

    wanted = regularised_gradient(table, ref, 0.7)
    assert distance(expected_gradient(table, advantages_of), wanted) < 1e-6
    assert distance(true_gradient(table), wanted) > 0.01


def advantages_under(table, values_of_states, lam):
    def advantages_of(index, logps):
        rewards = ppo.shaped_rewards(table.rewards[index], torch.zeros_like(logps), index, kl_coef=0.0)
        values = values_of_states[sum(table.rows, [])]  # of the state before each token, a row of the table
        return ppo.gae(rewards, values, index, gamma=1.0, lam=lam)[0]

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
@pytest.mark.parametrize("lam", [0.0, 0.4, 0.95, 1.0])
def test_exact_values_leave_the_gradient_unbiased_at_every_lambda_and_any_values_at_1(end, lam):
    table = Table(12, end)
    found = expected_gradient(table, advantages_under(table, exact_values(table), lam))
    assert distance(found, true_gradient(table)) < 1e-6
    any_values = torch.randn(13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = expected_gradient(table, advantages_under(table, any_values, lam))
    assert (distance(found, true_gradient(table)) < 1e-6) == (lam == 1)


VALUES = [  # value, cliprange, loss, slope; the old value is 1, the return 3
    (1.0, 0.2, 2.0, -2.0),
    (1.125, 0.2, 1.875**2 / 2, -1.875),
    (1.5, 0.2, 1.62, 0.0),  # moved further than allowed towards the return: the loss of 1.2, no gradient
    (0.5, 0.2, 3.125, -2.5),  # moved away: the loss of the value itself
    (9.0, 0.2, 18.0, 6.0),  # and beyond the return
    (9.0, None, 18.0, 6.0),
]


@pytest.mark.parametrize("value, cliprange, loss, slope", VALUES)
def test_value_loss_by_hand(value, cliprange, loss, slope):
    for sign in (1, -1):  # and mirrored
        values = float64(sign * value).requires_grad_()
        old, returns = float64(sign * 1.0), float64(sign * 3.0)
        found = ppo.value_loss(values, old, returns, cliprange)
        assert found.item() == pytest.approx(loss)
        assert torch.autograd.grad(found.sum(), values)[0].item() == pytest.approx(sign * slope)


def test_score_comes_at_the_last_token_and_the_kl_at_every_token():
    index = torch.tensor([3, 3, 3, 1, 2, 2])
    scores = float64(10, 10, 10, 5, -1, -1)
    found = ppo.shaped_rewards(scores, float64(1, 2, 4, 8, -1, 0.5), index, kl_coef=0.1)
    assert found.tolist() == pytest.approx([-0.1, -0.2, 10 - 0.4, 5 - 0.8, 0.1, -1 - 0.05])
    assert len(ppo.shaped_rewards(scores[:0], scores[:0], index[:0], kl_coef=0.1)) == 0


def test_whiten_by_hand():
    for values, deviations in (([1, 2, 3], [-1, 0, 1]), ([0, 0, 0, 2], [-0.5, -0.5, -0.5, 1.5])):
        values = float64(*values)
        assert ppo.whiten(values, values).tolist() == pytest.approx(deviations, abs=1e-7)
        mean = values.mean().item()
        kept = ppo.whiten(values, values, shift_mean=False).tolist()
        assert kept == pytest.approx([x + mean for x in deviations], abs=1e-7)
    assert ppo.whiten(float64(7, 2), float64(1, 2, 3)).tolist() == pytest.approx([5, 0], abs=1e-6)
    for values in ([0.1] * 3, [7.0], [], [-2.0, -2.0]):
        values = torch.tensor(values)
        assert ppo.whiten(values, values).tolist() == [0] * len(values)
        assert ppo.whiten(values, values, shift_mean=False).tolist() == pytest.approx(values.tolist())


def test_kl_controller_by_hand():
    step = 64 / 1000  # completions over the horizon
    for kl, factor in ((6.0, 1), (5.4, 1 - 0.1 * step), (1e9, 1 + 0.2 * step), (-3.0, 1 - 0.2 * step)):
        found = ppo.adapted_kl_coef(0.15, kl, target=6.0, horizon=1000, num_episodes=64)
        assert found == pytest.approx(0.15 * factor), kl


def test_explained_variance_by_hand():
    returns = float64(1, 2, 3, 6)
    assert ppo.explained_variance(returns - 5, returns) == pytest.approx(1)  # a shift is no variance
    assert ppo.explained_variance(float64(7, 7, 7, 7), returns) == pytest.approx(0)
    assert ppo.explained_variance(-returns, returns) == pytest.approx(1 - 4)
    assert ppo.explained_variance(returns / 2, returns) == pytest.approx(3 / 4)
    for constant in ([], [3.0], [3.0, 3.0]):
        assert ppo.explained_variance(torch.ones(len(constant)), torch.tensor(constant)) == 0


# Short runs -------------------------------------------------------------------------------------------------

PROMPTS = ("1 + 1 =", "Two and three are")  # of the groups of 2 in turn
ANSWERS = ([END], [10, 11, END], [12, END], [13, 14, 15, END])
CUT = ([END], [10, 11, 12], [12, END], [13, 14, 15])  # the second and the fourth have no end
SCORES = (1.0, 0.0, 3.0, -1.0)
SETTINGS = {"batch_size": 4, "num_generations": 2, "max_completion_length": 8, "max_steps": 1}
SETTINGS |= {"kl_coef": 0.05, "num_ppo_epochs": 1, "num_minibatches": 1, "cliprange_value": 0.2}


@pytest.fixture
def train(tmp_path, one_cpu, monkeypatch):
    """As `trainer` says, of one step over 2 groups of 2; train.weights: of the models that were saved.

    `written`, pairs of answers and scores, one a step, take the place of what would be sampled.
    """
    short = trainer(ppo, tmp_path, **SETTINGS)
    save_model, sample = ppo.save_model, ppo.roll_out

    def spy(folder, model, tokenizer):
        run.weights[folder.name] = {name: x.detach().clone() for name, x in model.state_dict().items()}
        save_model(folder, model, tokenizer)

    def run(written=(), **flags):
        def roll_out(*given):
            seed, rollout = given[5], []
            if not written or seed[1] == 0:  # 0: an evaluation
                return sample(*given)
            for n, (ids, score) in enumerate(zip(*written[min(seed[1], len(written)) - 1], strict=True)):
                text = PROMPTS[n // 2]
                prompt = ppo.Prompt(tiny_tokenizer()(text).input_ids, {"prompt": text, "score": score}, "")
                sampled, logprobs = tiny_tokenizer().decode(ids[:-1]), torch.full((len(ids),), -1.0)
                rollout.append(ppo.Completion(prompt, ids, logprobs, sampled, ids[-1] == END))
            return rollout

        monkeypatch.setattr(ppo, "roll_out", roll_out)
        run.weights = {}
        rows = [row | {"score": 0.0} for row in tiny_rows("prompts_train")[:8]]
        return short(rows, **{"reward": "given" if written else "residue"} | flags)

    monkeypatch.setattr(ppo, "save_model", spy)
    return run


ONCE = ((ANSWERS, SCORES),)


@pytest.fixture
def looked(monkeypatch):
    """Of each step of a run, what went into GAE and came out: values, numbers of sequences, advantages."""
    found, gae = [], ppo.gae

    def spy(token_rewards, values, index, *rest):
        advantages, returns = gae(token_rewards, values, index, *rest)
        found.append((values.clone(), index, advantages.clone()))
        return advantages, returns

    monkeypatch.setattr(ppo, "gae", spy)
    return found


@pytest.fixture
def losses(monkeypatch):
    """(ratio, advantages) of every call of ppo_policy_loss: a row of an update."""
    found, ppo_policy_loss = [], ppo.ppo_policy_loss
    spy = lambda *given: found.append((given[0].detach(), given[1])) or ppo_policy_loss(*given)
    monkeypatch.setattr(ppo, "ppo_policy_loss", spy)
    return found


def furthest(one, other):
    """Largest difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def pairs_of(answers):
    """Prompt ids and ids of written answers."""
    return [(tiny_tokenizer()(PROMPTS[n // 2]).input_ids, ids) for n, ids in enumerate(answers)]


def stock_values(model, prompt_ids, answer):
    """What a stock classifier says of the states before each token of an answer, and behind the last."""
    prefixes = [[*prompt_ids, *answer[:t]] for t in range(len(answer) + 1)]
    logits = [model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in prefixes]
    return torch.stack(logits) + model.config.reward_offset


def stock_critic(path=JUDGE):
    model = stock_classifier(path)
    model.config.pad_token_id = None  # the last token is read then
    return model


def stock_logps(model, prompt_ids, answer):
    """Log-probs of the tokens of an answer, and the entropies they were drawn with."""
    logits = model(input_ids=torch.tensor([[*prompt_ids, *answer]])).logits[0, len(prompt_ids) - 1 : -1]
    log_p = logits.log_softmax(-1)
    return log_p[range(len(answer)), answer], -(log_p.exp() * log_p).sum(-1)


def test_losses_metrics_and_updates_of_a_step_are_those_of_stock_models(train):
    # Two passes with every term: KL, penalty, GAE, whitening, both clips, entropy, clipped norms
    flags = {"value_model": JUDGE, "ref_model": BASE, "missing_eos_penalty": 0.25, "num_ppo_epochs": 2}
    flags |= {"kl_coef": 0.3, "gamma": 0.9, "lam": 0.8, "max_grad_norm": 0.5, "entropy_coef": 0.05}
    flags |= {"epsilon": 0.1, "epsilon_high": 0.15, "cliprange_value": 0.1}
    flags |= {"learning_rate": 1e-3, "value_learning_rate": 2e-3}
    _, [line] = train(written=((CUT, SCORES),), **flags)

    policy, ref, critic = stock("tiny/sft"), stock(BASE), stock_critic()
    pairs = pairs_of(CUT)
    with torch.no_grad():
        old = torch.cat([stock_logps(policy, *p)[0] for p in pairs])
        log_ratio = old - torch.cat([stock_logps(ref, *p)[0] for p in pairs])
        values = [stock_values(critic, *p)[:-1] for p in pairs]
    advantages, rewards = [], []
    for score, ids, kl, v in zip(SCORES, CUT, log_ratio.split([len(x) for x in CUT]), values, strict=True):
        r = [-0.3 * x for x in kl.tolist()]
        r[-1] += score if ids[-1] == END else score - 0.25
        rewards += r
        advantages += double_sum(r, v.tolist(), 0.9, 0.8)
    old_values = torch.cat(values)
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
    names = ["loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "policy/approxkl_avg", "entropy"]
    names += ["val/ratio", "val/clipfrac_avg", "grad_norm", "grad_norm/value"]
    metrics = dict(zip(names, np.mean(seen, 0), strict=True))
    entropy = metrics.pop("entropy")
    metrics |= {
        "loss": metrics["loss/policy_avg"] + 0.1 * metrics["loss/value_avg"] - 0.05 * entropy,
        "objective/entropy": seen[0][4],
        "objective/scores": np.mean(SCORES),
        "objective/kl": log_ratio.sum().item() / 4,
        "objective/non_score_reward": -0.3 * log_ratio.sum().item() / 4,
        "objective/rlhf_reward": sum(rewards) / 4,
        "kl": (torch.exp(-log_ratio) - 1 + log_ratio).mean().item(),
        "val/explained_var": 1 - np.var(advantages) / np.var(returns.numpy()),
        "sampling/logp_difference_mean": (old + 1).abs().mean().item(),
        "completions/clipped_ratio": 0.5,
    }
    assert {key: line[key] for key in metrics} == pytest.approx(metrics, rel=2e-4, abs=1e-6)
    assert seen[1][2] > 0.1 and seen[0][7] > 0.5
    assert metrics["val/clipfrac_avg"] > 0 and metrics["objective/kl"] != 0
    for name, (model, rate) in models.items():
        found, wanted = train.weights[name], model.state_dict()
        # AdamW's first steps are of size `rate` whatever the gradient's: near 0 its sign is a rounding
        apart = [((found[key] - wanted[key]).abs() > 0.05 * rate).sum().item() for key in found]
        assert sum(apart) < 1e-4 * sum(x.numel() for x in found.values())


def test_truncated_importance_weights_multiply_the_losses(train, losses):
    # -1 - log-prob is far below 0 or above it: weights are capped at 2 or below
    flags = {"whiten_advantages": False, "kl_coef": 0.0, "lam": 1.0}
    _, [line] = train(written=ONCE, tis_cap=2.0, **flags)
    policy = stock("tiny/sft")
    with torch.no_grad():
        logps = [stock_logps(policy, *pair)[0] for pair in pairs_of(ANSWERS)]
    wanted = [-s * (x + 1).exp().clamp(max=2.0).sum().item() for s, x in zip(SCORES, logps, strict=True)]
    assert line["loss/policy_avg"] == pytest.approx(sum(wanted) / 10, rel=1e-4)
    _, [line] = train(written=ONCE, **flags)
    assert line["loss/policy_avg"] == pytest.approx(-sum(s * len(x) for s, x in zip(SCORES, logps)) / 10)


GOLDEN = [{"num_minibatches": 2}, {"gradient_checkpointing": True, "attn": "eager"}]
GOLDEN += [{"temperature": 0.7, "max_tokens_per_micro_batch": 64, "value_model": JUDGE}]


@pytest.mark.parametrize("flags", GOLDEN, ids=["minibatches", "checkpointing", "rows"])
def test_first_pass_has_ratios_of_exactly_1_up_to_the_first_update_and_later_ones_move(train, losses, flags):
    defaults = {"num_ppo_epochs": 3, "max_steps": 2, "batch_size": 8, "learning_rate": 1e-3}
    _, lines = train(**(defaults | flags))
    for line in lines:
        assert line["policy/clipfrac_avg"] > 0.01 and line["policy/approxkl_avg"] > 1e-4
        assert line["sampling/logp_difference_mean"] < 1e-4
    assert (losses[0][0] == 1).all() and (losses[-1][0] != 1).any()
    assert lines[0]["kl"] == lines[0]["objective/kl"] == 0 and lines[1]["kl"] > 1e-4


def test_old_log_probs_are_of_the_very_rows_that_are_trained_on(train, monkeypatch):
    # with other rows a ratio may be 1 only up to rounding
    looked_at, trained_on, token_logprobs = [], [], ppo.token_logprobs

    def spy(model, batch, **settings):
        (trained_on if torch.is_grad_enabled() else looked_at).append(batch.input_ids.tolist())
        return token_logprobs(model, batch, **settings)

    monkeypatch.setattr(ppo, "token_logprobs", spy)
    train(batch_size=16, num_minibatches=2, num_ppo_epochs=2, max_tokens_per_micro_batch=128)
    rows = len(looked_at) // 2
    assert looked_at[0::2] == looked_at[1::2] == trained_on[:rows] == trained_on[rows:] and rows > 2


LEFT_OUT = {  # values are 0, and not
    "without-a-score": ((1.0, None, 3.0, None), {}),
    "cut-off": (SCORES, {"mask_truncated": True, "value_model": JUDGE}),
}


@pytest.mark.parametrize("scores, flags", LEFT_OUT.values(), ids=LEFT_OUT)
def test_completion_that_is_not_trained_on_takes_no_part_in_the_update(train, losses, scores, flags):
    # whatever its tokens are: neither a gradient nor a share in what whitening and means are over
    other = ([END], [500, 9, 77, 3], [12, END], [300])
    flags |= {"whiten_rewards": True, "entropy_coef": 0.1, "num_ppo_epochs": 2, "ref_model": BASE}
    found = []
    for answers in (CUT, other):
        [line] = train(written=((answers, scores),), **flags)[1]
        found.append((line, train.weights))
    for name, rate in (("model", 1e-4), ("value_model", 3e-4)):
        assert furthest(*[weights[name] for _, weights in found]) < 0.02 * rate
    others = {"num_tokens", "objective/scores", "rewards/given/mean"}
    others |= {key for key in found[0][0] if key.startswith("completions/")}
    assert_same_metrics(*[[line] for line, _ in found], rel=1e-4, without=others)
    assert [len(advantages) for _, advantages in losses] == [3] * 4  # tokens of the first and the third
    assert losses[0][1].mean().item() == pytest.approx(0, abs=1e-6)
    assert losses[0][1].std(unbiased=True).item() == pytest.approx(1)


def test_rollout_without_anything_to_train_on_changes_nothing(train):
    # behind a step that was trained on, AdamW's momentum would move the weights without any gradient
    spoilt = ([10], [11, 12], [13], [14, 15]), SCORES  # nothing ends
    flags = {"mask_truncated": True, "entropy_coef": 0.1, "whiten_rewards": True, "kl_target": 1.0}
    folder, lines = train(written=(*ONCE, spoilt), max_steps=2, **flags)
    after_two = train.weights
    train(written=ONCE, **flags)
    assert all(furthest(after_two[name], train.weights[name]) == 0 for name in after_two)
    unknown = lines[0].keys() - lines[1].keys()
    assert {"loss", "val/ratio", "objective/rlhf_reward", "grad_norm", "objective/kl", "kl"} <= unknown
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in text and all(math.isfinite(x) for x in json.loads(text).values())


@pytest.mark.parametrize("whitened", [True, False])
def test_advantages_are_whitened_over_the_rollout_and_returns_are_not(train, looked, losses, whitened):
    flags = {"num_minibatches": 2, "learning_rate": 0.0, "value_learning_rate": 0.0}
    [line] = train(written=ONCE, **flags, whiten_advantages=whitened, lam=0.5)[1]
    [(_, _, raw)] = looked
    wanted = (raw - raw.mean()) / raw.std(unbiased=True) if whitened else raw
    assert len(losses) == 2  # the mean of neither minibatch alone is 0
    used = torch.cat([advantages for _, advantages in losses])
    assert used.tolist() == pytest.approx(wanted.tolist(), rel=1e-5, abs=1e-6)
    # 4 tokens of one group, 6 of the other, values 0: the mean of both means of R^2 / 2
    halves = [x.square().mean().item() / 2 for x in raw.split([4, 6])]
    assert line["loss/value_avg"] == pytest.approx(np.mean(halves), rel=1e-5)


def test_kl_weight_follows_the_formula_from_step_to_step_and_in_a_continued_run(train):
    flags = {"ref_model": BASE, "kl_horizon": 10.0, "written": ONCE, "max_steps": 3, "save_every": 1}
    for target, sign in ((0.01, 1), (1000.0, -1)):  # above it, below it
        folder, lines = train(**flags, kl_target=target)
        coefs = [line["objective/kl_coef"] for line in lines]
        assert coefs[0] == 0.05 and np.sign(np.diff(coefs)).tolist() == [sign, sign]
        for line, following in zip(lines, coefs[1:], strict=False):
            error = np.clip(line["objective/kl"] / target - 1, -0.2, 0.2)
            assert following == pytest.approx(line["objective/kl_coef"] * (1 + error * 4 / 10), rel=1e-9)
            penalty = -line["objective/kl_coef"] * line["objective/kl"]
            assert line["objective/non_score_reward"] == pytest.approx(penalty)
            assert line["objective/rlhf_reward"] == pytest.approx(penalty + 3 / 4, rel=1e-5)
    weights = train.weights
    for name in ("model", "value_model", "checkpoints/step_00000003"):  # as if stopped in its third step
        shutil.rmtree(folder / name)
    _, found = train(output_dir=str(folder), resume=True, **flags, kl_target=target)
    assert_same_metrics(found, lines, rel=0, abs_=0)
    assert all(furthest(weights[name], train.weights[name]) == 0 for name in weights)
    assert [line["objective/kl_coef"] for line in train(**flags)[1]] == [0.05] * 3


def test_saved_value_model_goes_on_as_the_next_value_model(train, looked):
    folder, _ = train(value_model=JUDGE, value_learning_rate=1e-3)
    start = str(folder / "value_model")
    train(value_model=start, written=ONCE)
    critic = stock_critic(start)
    assert critic.config.num_labels == 1
    assert critic.config.reward_offset == stock_critic().config.reward_offset != 0
    with torch.no_grad():
        wanted = {n: stock_values(critic, *pair)[:-1] for n, pair in enumerate(pairs_of(ANSWERS))}
    values, index, _ = looked[-1]
    for n, of_answer in wanted.items():
        assert values[index == n].tolist() == pytest.approx(of_answer.tolist(), abs=1e-4)


@pytest.mark.parametrize("spec", ["tiny/reward", "tiny/reward:min"])
def test_value_model_starts_from_the_first_reward_model_and_says_its_score_behind_an_answer(one_cpu, spec):
    args = ppo.Args(reward=("rewards.py:math_answer", spec, "tiny/reward_biased"))
    assert args.value_model == "tiny/reward" and ppo.Args(reward=("a.py:f",)).value_model == "tiny/sft"
    model = ppo.load_model(args.value_model, args, CPU, kind=ppo.ValueModel, check=ppo.check_values)
    [(prompt_ids, _), *_] = pairs_of(ANSWERS)
    for answer in ANSWERS:
        behind = [*prompt_ids, *answer, END]  # the state before the last token is that behind the answer
        batch = common.collate([(behind, torch.arange(len(behind)) == len(behind) - 1)])
        with torch.no_grad():
            wanted = stock_values(stock_critic(), prompt_ids, answer)[-1].item()
            assert ppo.token_values(model, batch).item() == pytest.approx(wanted, abs=1e-4)


def test_value_model_from_the_policy_says_0_at_first(train, looked):
    _, [line] = train(written=ONCE, value_model="tiny/sft")
    assert looked[0][0].tolist() == [0] * 10 and line["val/explained_var"] == 0
    after, start = train.weights["value_model"], stock("tiny/sft").state_dict()
    assert after.pop("score.weight").abs().min() > 0
    # a head of 0 lets no gradient through until it has moved
    assert furthest(after, {key: start[key] for key in after}) == 0


def test_head_of_the_value_model_is_float32_in_bfloat16(one_cpu):
    states, completion_states = [], common.completion_states
    args = ppo.Args(dtype="bfloat16")
    model = ppo.load_model(JUDGE, args, CPU, kind=ppo.ValueModel, check=ppo.check_values)
    row = [(ids + answer, [0] * len(ids) + [1] * len(answer)) for ids, answer in pairs_of(ANSWERS)]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        spy = lambda *rest: states.append(completion_states(*rest)) or states[-1]
        patch.setattr(common, "completion_states", spy)
        values = ppo.token_values(model, common.collate(row))
        exact = stock_critic()
        wanted = exact.score(states[0].float()).squeeze(-1) + exact.config.reward_offset
        whole = torch.cat([stock_values(exact, *pair)[:-1] for pair in pairs_of(ANSWERS)])
    assert states[0].dtype == torch.bfloat16 and values.dtype == torch.float32
    assert (values - wanted).abs().max() < 1e-5 and 0 < (values - whole).abs().max() < 0.2
    assert model.score.weight.dtype == torch.float32


def test_check_of_the_value_model_finds_a_leak_between_sequences(one_cpu, monkeypatch, capsys):
    def leaking(sequences, *rest):
        batch = collate(sequences, *rest)
        whole = torch.arange(batch.input_ids.shape[1])[None]  # as if the row were one sequence
        one = {"lengths": (whole.shape[1],), "position_ids": whole, "key_index": None, "key_lengths": None}
        return common.replace(batch, **one)

    collate = common.collate
    monkeypatch.setattr(common, "collate", leaking)
    with pytest.raises(SystemExit):
        ppo.load_model(JUDGE, ppo.Args(), CPU, kind=ppo.ValueModel, check=ppo.check_values)
    assert "packed values differ from the model's" in capsys.readouterr().err
