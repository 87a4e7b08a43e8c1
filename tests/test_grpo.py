"""grpo.py and its kin against the gradient by enumeration, the stock model, and numbers worked by hand."""

import functools
import itertools
import json
import math
import random
import re
import shutil

import pytest
import torch
from conftest import DATA, ROOT, read_lines, write_rows
from helpers import calls_of, error_of, trainer, written
from samples import CPU, END, float64, gradient_norm, said, stock, tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM

import common
import dapo
import grpo
import ppo_rlhf
import rejection_sampling
import rloo_remax as rr

pytestmark = pytest.mark.usefixtures("process_group")


class Table:
    """A policy over 3 symbols, one row of random logits for each prefix, and all that it can write.

    Sequences have 3 symbols; with `end` that symbol ends them before.
    """

    def __init__(self, seed, end=None):
        generator = torch.Generator().manual_seed(seed)
        prefixes = [p for n in range(3) for p in itertools.product(range(3), repeat=n)]
        self.logits = torch.randn(13, 3, dtype=torch.float64, generator=generator).requires_grad_()
        cut = lambda s: s[: s.index(end) + 1] if end in s else s
        self.sequences = sorted({cut(s) for s in itertools.product(range(3), repeat=3)})
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


def regularised_gradient(table, ref, kl_coef):
    """Of the expected reward minus kl_coef KL(pi || ref) of whole sequences."""
    logps, ref_logps = table.probabilities().log(), ref.probabilities().log().detach()
    return true_gradient(table, table.rewards - kl_coef * (logps - ref_logps))


def expected_gradient(table, group_size, advantages_of, loss_of, loss_agg="seq_mean_token_sum_norm"):
    """The mean of minus the loss's gradient over all groups that the policy may sample.

    `seq_mean_token_sum_norm` with a longest length of 1 sums the tokens and takes the mean of the sequences.
    """
    groups = torch.tensor(list(itertools.product(range(len(table.sequences)), repeat=group_size)))
    chances = table.probabilities().detach()[groups].prod(1)  # of each group
    assert chances.sum().item() == pytest.approx(1)
    lengths = table.lengths[groups]
    weights = torch.stack([grpo.token_weights(x, loss_agg, max_completion_length=1) for x in lengths])
    of_sequence = (chances[:, None] * weights).flatten()
    logps = table.token_logps(groups.flatten().tolist())
    spread = lambda x: x.repeat_interleave(lengths.flatten())
    losses = loss_of(logps, spread(advantages_of(table.rewards[groups]).flatten()))
    return -table.gradient((losses * spread(of_sequence)).sum())


def on_policy(logps, advantages):
    return grpo.grpo_loss(grpo.importance_ratio(logps, logps.detach()), advantages, 0.2, 0.2)


def cispo_on_policy(logps, advantages):
    return grpo.cispo_loss(grpo.importance_ratio(logps, logps.detach()), advantages, logps, 4.0)


def distance(one, other):
    assert other.abs().max() > 0.01
    return (one - other).abs().max().item()


@pytest.mark.parametrize("loss_of", [on_policy, cispo_on_policy])
@pytest.mark.parametrize("end", [None, 2], ids=["equal-lengths", "an-end"])
def test_gradient_with_plain_rewards_is_that_of_the_expected_reward(end, loss_of):
    table = Table(0, end)
    assert len(table.sequences) == (27 if end is None else 15)
    found = expected_gradient(table, 1, lambda rewards: rewards, loss_of)
    assert distance(found, true_gradient(table)) < 1e-6


@pytest.mark.parametrize("group_size", [2, 3])
def test_unscaled_grpo_is_the_true_gradient_times_one_less_than_the_group_over_the_group(group_size):
    table = Table(1, None if group_size == 2 else 2)
    unscaled = functools.partial(grpo.group_advantages, scale="none")
    found = expected_gradient(table, group_size, unscaled, on_policy)
    assert distance(found, true_gradient(table) * (group_size - 1) / group_size) < 1e-6


def test_division_by_the_length_favours_short_sequences():
    # It gives the gradient of E[r / |o|]: the pull of a sequence of 3 tokens is a third of that of 1.
    table = Table(2, end=2)
    found = expected_gradient(table, 1, lambda r: r, on_policy, "seq_mean_token_mean")
    assert distance(found, true_gradient(table, table.rewards / table.lengths)) < 1e-6
    assert distance(found, true_gradient(table)) > 0.01


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


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_equal_rewards_are_exactly_0(scale):
    # The mean of 3 times 0.1 is not 0.1, in neither precision.
    for value in (0.1, 0.7, -1 / 3, 1e6 + 0.1):
        for dtype in (torch.float32, torch.float64):
            rewards = torch.tensor([[value] * 3, [0.0, 1.0, 5.0], [value] * 3], dtype=dtype)
            found = grpo.group_advantages(rewards, scale=scale)
            assert found[[0, 2]].abs().max() == 0 and found[1].abs().min() > 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_completion_without_a_reward_is_left_out_and_gets_no_advantage(scale):
    nan = math.nan
    with_gaps = grpo.group_advantages(float64([1, nan, 0, 5], [nan] * 4, [nan, nan, 3, nan]), scale=scale)
    # the group of 1, 0, 5: mean 2, squares 1 + 4 + 9 over 2; the batch also has 3: mean 9/4, 35 - 81/4 over 3
    std = {"group": math.sqrt(7) + 1e-4, "batch": math.sqrt((35 - 81 / 4) / 3) + 1e-4, "none": 1}[scale]
    assert with_gaps[0].tolist() == pytest.approx([-1 / std, 0, -2 / std, 3 / std], abs=1e-6)
    assert with_gaps[1:].tolist() == [[0] * 4] * 2


def loss_and_slope(loss_of, ratio):
    """Loss at a ratio of new to old probability, and its slope by the log-prob -1.3 of one token."""
    logprobs = float64(-1.3).requires_grad_()
    loss = loss_of(torch.exp(logprobs - logprobs.detach() + math.log(ratio)), logprobs)
    return loss.item(), torch.autograd.grad(loss.sum(), logprobs)[0].item()


PAPERS = (dapo.Args.epsilon, dapo.Args.epsilon_high)
CLIPPED = {  # losses of a token by ratio, advantage and log-prob
    "grpo": lambda rho, advantage, _: grpo.grpo_loss(rho, advantage, 0.2, 0.28),
    "cispo": lambda rho, advantage, logprobs: grpo.cispo_loss(rho, advantage, logprobs, 4.0),
    "dapo": lambda rho, advantage, _: dapo.dapo_loss(rho, advantage, *PAPERS),
    "ppo": lambda rho, advantage, _: ppo_rlhf.ppo_policy_loss(rho, advantage, 0.2, 0.28),
    "rloo": lambda rho, advantage, logprobs: rr.reinforce_loss(logprobs, rho, advantage, clip=(0.2, 0.3)),
}


@pytest.mark.parametrize("case", read_lines(DATA / "clips.jsonl"), ids=lambda x: "{loss}-{ratio}".format(**x))
def test_clip_by_hand(case):
    """Above its clip a good token has no gradient, below its clip a bad one; CISPO keeps every gradient."""
    loss_of = lambda rho, logprobs: CLIPPED[case["loss"]](rho, float64(case["advantage"]), logprobs)
    assert loss_and_slope(loss_of, case["ratio"]) == pytest.approx((case["value"], case["slope"]))


def test_sequence_ratio_is_the_geometric_mean_with_its_gradient():
    index = torch.tensor([0, 0, 1, 1, 1, 2])
    old = float64(-1, -2, -1, -1, -1, -3)
    moved = float64(0.1, 0.3, -0.5, 0.1, -0.2, 2.0)
    advantages, lengths = float64(1, 1, 2, 2, 2, 3), float64(2, 2, 3, 3, 3, 1)
    ratios = [math.exp(0.2)] * 2 + [math.exp(-0.2)] * 3 + [math.exp(2)]
    assert grpo.importance_ratio(old + moved, old, index).tolist() == pytest.approx(ratios)
    assert grpo.importance_ratio(old + moved, old).tolist() == pytest.approx(moved.exp().tolist())

    def loss(logprobs):
        ratio = grpo.importance_ratio(logprobs, old, index)
        return (grpo.grpo_loss(ratio, advantages, 0.25, 0.25) / lengths).sum()

    logprobs = (old + moved).requires_grad_()
    assert torch.autograd.gradcheck(loss, (logprobs,))
    # d (-s A) / d logp = -s A / |o|; the last one is above the clip
    wanted = [-math.exp(0.2) / 2] * 2 + [-math.exp(-0.2) * 2 / 3] * 3 + [0]
    assert torch.autograd.grad(loss(logprobs), logprobs)[0].tolist() == pytest.approx(wanted)
    value = -math.exp(0.2) - 2 * math.exp(-0.2) - 3 * 1.25
    assert loss(logprobs).item() == pytest.approx(value)


def test_token_weights_by_hand():
    weights = lambda agg: grpo.token_weights(torch.tensor([2, 4]), agg, 8).tolist()
    assert weights("seq_mean_token_mean") == pytest.approx([1 / 4, 1 / 8])
    assert weights("token_mean") == pytest.approx([1 / 6] * 2)
    assert weights("seq_mean_token_sum_norm") == pytest.approx([1 / 16] * 2)


def test_distinct_ngrams_by_hand_and_of_a_bounded_number_of_tokens(monkeypatch):
    # 12 23 34, 12 25: 4 of 5; orders longer than a completion have none
    group, read = [[1, 2, 3, 4], [1, 2, 5]], []
    assert grpo.distinct_ngrams(group) == pytest.approx(4 / 5)
    assert grpo.distinct_ngrams(group, 1) == pytest.approx(5 / 7)
    assert grpo.distinct_ngrams([[1], [2]]) == 0
    monkeypatch.setattr(grpo, "distinct_ngrams", lambda group: read.append(sum(map(len, group))) or 0.5)
    rollout = [completion_of([7] * 8000)] * 512
    assert grpo.describe_rollout(rollout, 8)["completions/distinct_2"] == 0.5 and sum(read) <= 2**16


def prompts_of(rows):
    return [grpo.read_prompt(tiny_tokenizer(), row, f"row {n}", grpo.Args()) for n, row in enumerate(rows, 1)]


def test_prompt_is_what_stands_before_the_answer_or_all_there_is():
    ask, answer = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    rows = [{"prompt": [ask]}, {"messages": [ask, answer]}, {"messages": [ask]}]
    assert [prompt.row["prompt"] for prompt in prompts_of(rows)] == [[ask]] * 3
    with pytest.raises(ValueError, match="no prompt in messages"):
        prompts_of([{"messages": []}])


def completion_of(token_ids, text=""):
    prompt = grpo.Prompt([5, 6], {"prompt": "?"}, "row 1")
    return grpo.Completion(prompt, token_ids, torch.zeros(len(token_ids)), text, True)


def test_end_tokens_are_those_of_the_model_and_of_the_template(one_cpu, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "tiny" / "sft", folder)
    newline = tiny_tokenizer()("1\n2", add_special_tokens=False).input_ids[1]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": newline}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert grpo.end_tokens(tiny_tokenizer(), model) == sorted({END, newline})


# Short runs -------------------------------------------------------------------------------------------------


SHORT = {"batch_size": 16, "num_generations": 4, "max_completion_length": 12, "max_steps": 2}
SHORT |= {"reward": "residue"}


@pytest.fixture
def train(tmp_path, one_cpu):
    """As `trainer` says: 2 steps of 4 prompts on tiny/sft."""
    return trainer(grpo, tmp_path, **SHORT)


FIRST = [  # script, its loss and where that takes the ratio, flags
    (grpo, ("grpo_loss", 0), {"reward": "residue tensor", "reward_weights": (2.0, 0.5)}),
    (grpo, ("grpo_loss", 0), {"temperature": 1.5}),
    (rr, ("reinforce_loss", 1), {"algorithm": "rloo"}),
    (rr, ("reinforce_loss", 1), {"algorithm": "reinforce_pp"}),
]


@pytest.mark.parametrize("script, loss, flags", FIRST)
def test_first_pass_has_ratios_of_exactly_1_and_a_gradient(
    tmp_path, one_cpu, monkeypatch, script, loss, flags
):
    calls = calls_of(monkeypatch, script, loss[0])
    _, lines = trainer(script, tmp_path, **SHORT | {"max_tokens_per_micro_batch": 256} | flags)()
    assert len(calls) >= 4 and all((arguments[loss[1]] == 1).all() for arguments, _ in calls)
    for line in lines:
        assert line["grad_norm"] > (0.1 if script is grpo else 0.01)
        assert abs(line["loss"]) < 1e-6 or script is not grpo
        assert line["clip_ratio/low_mean"] == line["clip_ratio/high_mean"] == 0
        assert line["sampling/logp_difference_mean"] < 1e-4
    assert lines[0]["kl"] == 0 and lines[1]["kl"] > 1e-6  # the first is the reference itself
    if "reward_weights" in flags:
        assert lines[0]["reward"] == pytest.approx(2.5 * lines[0]["rewards/tensor/mean"])
    assert lines[0]["reward_std"] > 0 and lines[0]["epoch"] == 4 / 64


@pytest.mark.parametrize("flags", [{"num_iterations": 2}, {"num_minibatches": 2}], ids=str)
def test_second_update_of_a_rollout_has_other_ratios(train, monkeypatch, flags):
    calls = calls_of(monkeypatch, grpo, "grpo_loss")
    _, [line] = train(max_steps=1, epsilon=1e-3, learning_rate=1e-3, max_tokens_per_micro_batch=256, **flags)
    ratios = [ratio for (ratio, *_), _ in calls]
    first, second = torch.cat(ratios[: len(ratios) // 2]), torch.cat(ratios[len(ratios) // 2 :])
    assert (first == 1).all() and (second - 1).abs().max() > 0.01  # old log-probs are those of the same rows
    assert line["clip_ratio/low_mean"] > 0 and line["clip_ratio/high_mean"] > 0
    region = line["clip_ratio/low_mean"] + line["clip_ratio/high_mean"]
    assert line["clip_ratio/region_mean"] == pytest.approx(region)
    assert line["sampling/logp_difference_mean"] < 1e-4  # of the old policy, in both updates


def test_clip_ratio_of_cispo_has_no_lower_side(train):
    flags = {"policy_loss": "cispo", "num_iterations": 2, "learning_rate": 1e-3, "epsilon": 1e-3}
    _, [line] = train(max_steps=1, epsilon_high=1e-3, **flags)
    assert line["clip_ratio/low_mean"] == 0 < line["clip_ratio/high_mean"] == line["clip_ratio/region_mean"]


LENGTHS = (1, 3, 5, 2, 4, 4, 1, 6)  # of 2 groups of 4
SCORES = (1.0, 0.0, 0.0, 0.0, 3.0, 1.0, 1.0, 3.0)
UNSCALED = (0.75, -0.25, -0.25, -0.25, 1, -1, -1, 1)


@pytest.fixture
def scripted(monkeypatch):
    """scripted(lengths, scores): completions as `written` says, with these rewards, in place of sampled ones.

    The sampler's log-probs are by `surprise` below the policy's.
    """

    def script(lengths, scores, cut=(), surprise=None):
        def roll_out(policy, tokenizer, prompts, group_size, *_):
            found = written(grpo, prompts, group_size, lengths, cut)
            if surprise is None:
                return found
            rows = grpo.pack_rollout(found, list(range(len(found))), grpo.Args(), CPU)
            for row in rows:
                logprobs = grpo.token_logprobs(policy, row.batch).detach()
                for i in row.completion.unique().tolist():
                    found[i] = found[i]._replace(logprobs=logprobs[row.completion == i] - surprise)
            return found

        monkeypatch.setattr(grpo, "roll_out", roll_out)
        line = torch.tensor([scores], dtype=torch.float64)
        empty = torch.zeros(0, len(scores), dtype=torch.float64)
        monkeypatch.setattr(grpo, "score", lambda functions, *_: line if functions else empty)

    return script


def run_of_8(train, **flags):
    defaults = {"scale_rewards": "none", "max_completion_length": 8, "batch_size": 8, "max_steps": 1}
    return train(**(defaults | flags))[1][0]


SUM = 0.75 - 0.25 * 10 + 4 - 4 - 1 + 6  # of A over the 26 tokens


@pytest.mark.parametrize(
    "loss_agg, loss",  # 26 tokens; 8 sequences, a longest of 8
    [("seq_mean_token_mean", 0), ("token_mean", -SUM / 26), ("seq_mean_token_sum_norm", -SUM / (8 * 8))],
)
def test_loss_of_a_step_by_hand(train, scripted, loss_agg, loss):
    scripted(LENGTHS, SCORES, cut=(6, 7))  # which plays no part without --mask-truncated
    line = run_of_8(train, loss_agg=loss_agg)
    assert line["loss"] == pytest.approx(loss, abs=1e-6) and line["grad_norm"] > 0.01
    assert line["reward"] == pytest.approx(9 / 8)
    assert line["reward_std"] == pytest.approx((0.5 + math.sqrt(4 / 3)) / 2)
    assert line["completions/mean_length"] == 26 / 8 and line["completions/clipped_ratio"] == 2 / 8


@pytest.mark.parametrize("why", ["no reward", "cut off"])
@pytest.mark.parametrize("loss_agg", ["seq_mean_token_mean", "token_mean", "seq_mean_token_sum_norm"])
def test_completions_that_are_not_trained_on_are_in_no_normaliser(train, scripted, loss_agg, why):
    # of the second group the 4 of 4 tokens and the 6: advantages 1, -1 (no reward) or as they were (cut off)
    scores = [*SCORES[:4], 3.0, 1.0, math.nan, math.nan] if why == "no reward" else SCORES
    scripted(LENGTHS, scores, cut=() if why == "no reward" else (6, 7))
    advantages, lengths = UNSCALED[:6], LENGTHS[:6]  # (3, 1) has the mean 2, as (3, 1, 1, 3)
    weights = {"token_mean": [1 / 19] * 6, "seq_mean_token_sum_norm": [1 / (6 * 8)] * 6}
    weights = weights.get(loss_agg) or [1 / (6 * n) for n in lengths]
    wanted = -sum(a * n * w for a, n, w in zip(advantages, lengths, weights, strict=True))
    line = run_of_8(train, loss_agg=loss_agg, mask_truncated=True)
    assert line["loss"] == pytest.approx(wanted, abs=1e-6) and line["grad_norm"] > 0.01


WEIGHTS = [(None, 1), (math.log(1.5), 1.5), (math.log(8), 2.0), (-1.0, math.exp(-1))]  # at most 2


@pytest.mark.parametrize("surprise, weight", WEIGHTS)
def test_gradient_of_a_step_is_that_of_the_weighted_log_probs(train, scripted, surprise, weight):
    # -sum w A log pi of the stock model, token by token
    scripted(LENGTHS, SCORES, surprise=surprise)
    rows = tiny_rows("prompts_train")[:1] * 2
    line = run_of_8(train, rows=rows, loss_agg="token_mean", tis_cap=2.0 if surprise else 0.0)
    model, [prompt] = stock("tiny/sft"), prompts_of(rows[:1])
    loss = 0
    for length, advantage in zip(LENGTHS, UNSCALED, strict=True):
        answer = [*range(10, 9 + length), END]
        logits = model(input_ids=torch.tensor([[*prompt.input_ids, *answer]])).logits[0]
        logps = logits[len(prompt.input_ids) - 1 : -1].log_softmax(-1)
        loss = loss - weight * advantage * logps[range(length), answer].sum() / 26
    loss.backward()
    assert line["grad_norm"] == pytest.approx(gradient_norm(model), rel=1e-4)
    assert line["loss"] == pytest.approx(-SUM / 26 * weight, abs=1e-5)
    if surprise:
        assert line["sampling/logp_difference_mean"] == pytest.approx(abs(surprise), abs=1e-4)


def test_reference_is_a_model_of_its_own_and_its_kl_may_be_in_the_loss(train):
    flags = {"ref_model": "tiny/base", "max_steps": 1}
    _, [plain] = train(**flags)
    _, [pulled] = train(beta=0.5, **flags)
    assert plain["kl"] == pulled["kl"] and plain["kl"] > 0.01
    assert plain["loss"] == pytest.approx(0, abs=1e-6) and pulled["loss"] > 1e-3
    assert pulled["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)


def test_run_stops_above_max_kl(train, capsys):
    folder, lines = train(max_steps=5, max_kl=1e-6, log_every=10)
    assert [line["step"] for line in lines] == [1, 2]  # at the first, the policy is the reference
    assert (folder / "model").is_dir() and "is above --max-kl 1e-06" in capsys.readouterr().out


def test_weighted_sum_leaves_out_what_is_none():
    nan = math.nan
    scores = float64([1, nan, nan, 2], [10, 20, nan, nan])
    found = grpo.weighted_sum(scores, (0.5, 2.0)).tolist()
    assert found[:2] + found[3:] == [20.5, 40, 1] and math.isnan(found[2])
    assert grpo.weighted_sum(scores[:, :1], ()).tolist() == [11]


def test_reward_functions_see_texts_ids_and_the_columns_of_all_datasets(train, tmp_path, monkeypatch):
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    rows = tiny_rows("prompts_train")[:1]
    one = write_rows(tmp_path / "one.jsonl", rows)
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "2 + 3 =", "answer": 5, "level": 1}])
    train(dataset=(one, other), reward="seen", batch_size=4, max_completion_length=6)
    seen = sorted(read_lines(tmp_path / "seen"), key=str, reverse=True)
    for (prompts, completions, ids, columns), row in zip(seen, [rows[0], None], strict=True):
        texts = [tiny_tokenizer().decode(x, skip_special_tokens=True) for x in ids]
        assert prompts == ([row["prompt"]] if row else ["2 + 3 ="]) * 4
        assert completions == ([said(text) for text in texts] if row else texts)
        wanted = {"answer": row["answer"], "level": None} if row else {"answer": 5, "level": 1}
        assert {k: v[0] for k, v in columns.items() if k in wanted} == wanted and columns["longest"] == 6


FAILURES = {
    "text": r"reward text: ValueError: not a number for each of",
    "matrix": r"reward matrix: .*rows_\w+\.jsonl, row \d",
    "raises": r"reward raises: KeyError: .no such key. \(.*rows_\w+\.jsonl, row 3; reward_functions.py, line",
    "together": r"reward together: ZeroDivisionError: .* \(no row by itself; reward_functions.py, line \d",
}


@pytest.mark.parametrize("name, pattern", FAILURES.items(), ids=FAILURES)
def test_reward_that_fails_ends_the_run_with_one_line(train, capsys, name, pattern):
    rows = [row | {"answer": str(10 + n)} for n, row in enumerate(tiny_rows("prompts_train")[:4], 1)]
    line = error_of(lambda: train(rows, reward=name), capsys)
    assert re.search(pattern, line), line


@pytest.mark.parametrize("script", [grpo, dapo, rr, rejection_sampling], ids=lambda x: x.__name__)
def test_rewards_of_none_end_the_run_after_the_first_rollout(script, tmp_path, one_cpu, capsys, monkeypatch):
    rollouts, train = calls_of(monkeypatch, script, "roll_out"), trainer(script, tmp_path, reward="nothing")
    flags = {"batch_size": 8, "num_generations": 4, "max_completion_length": 32}
    flags |= {"prompts_per_round": 4} if script is rejection_sampling else {}
    line = error_of(lambda: train(**flags), capsys)
    assert "--reward nothing: None for every completion" in line and len(rollouts) == 1


def test_evaluation_by_hand(monkeypatch):
    # right are 1 of 3 and 2 of 3; the majority (2 and 1000, however they are marked) is wrong for the first
    right = {"#### 1": 1.0, "#### 1,000": 1.0, "<answer>1000</answer>": 1.0}
    function = lambda completions, **_: [right.get(text, 0.0) for text in completions]
    answer = lambda *texts: [completion_of([1], text=text) for text in texts]
    sampled = answer("#### 1", r"\boxed{2}", "so #### 2", "#### 1,000", "<answer>1000</answer>", "3")
    rollouts = {1: answer("#### 1", "3"), 3: sampled}  # one answer to each of two prompts, and three
    monkeypatch.setattr(grpo, "roll_out", lambda *arguments: rollouts[arguments[3]])
    held_out, args = [sampled[0].prompt] * 2, grpo.Args(eval_samples=3)
    metrics, samples = grpo.evaluate(None, tiny_tokenizer(), held_out, {"f": function}, {}, args)
    assert metrics["eval/reward"] == metrics["eval/greedy_reward"] == pytest.approx(0.5)
    assert metrics["eval/pass@k"] == 1 and metrics["eval/maj@k"] == pytest.approx(0.5)
    assert metrics["eval/completions/clipped_ratio"] == 0
    assert [sample["completion"] for sample in samples] == ["#### 1", "#### 1,000"]


def test_column_that_a_reward_needs_must_be_in_the_held_out_data_too(train, capsys, monkeypatch):
    monkeypatch.setattr(grpo, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    rows, held_out = tiny_rows("prompts_train")[:4], tiny_rows("prompts_eval")[:1]
    rows = [row | {"rubric": "x"} for row in rows]
    assert "rubric" in error_of(lambda: train(rows, held_out, reward="rubric"), capsys)


def test_weights_of_the_sampler_by_hand():
    old, sampler = float64(-1, -1, -2), float64(-1, -2, -1)  # ratios 1, e, 1 / e
    assert grpo.sampler_weights(old, sampler, 2.0).tolist() == pytest.approx([1, 2, math.exp(-1)])


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("max_tokens, multiple_of", [(40, 1), (64, 2), (1000, 3), (9, 4)])
def test_rows_keep_to_the_budget_and_deal_evenly(max_tokens, multiple_of, share):
    rng = random.Random(0)
    answers = [([n // 4] * (3 + n // 4), [50 + n] * rng.randint(1, 12)) for n in range(24)]
    rows = grpo.pack_siblings(answers, max_tokens, multiple_of, share)
    assert sorted(i for row in rows for i, _ in row) == list(range(24)) and len(rows) % multiple_of == 0
    for row in filter(None, rows):
        sequences = [(x + y, [0] * len(x) + [1] * len(y)) for x, y in (answers[i] for i, _ in row)]
        batch = common.collate(sequences, shared=[n for _, n in row] if share else None)
        trained = batch.input_ids[0, batch.completion_index].tolist()
        assert trained == [token for i, _ in row for token in answers[i][1]]
        assert batch.input_ids.shape[1] <= max_tokens or len(row) == 1
    assert any(n for row in rows for _, n in row) == share
    assert grpo.pack_siblings([], max_tokens, multiple_of, share) == [[]] * multiple_of


def test_kl_as_a_metric_is_measured_now_and_then_and_else_the_reference_is_not_loaded(train, monkeypatch):
    loaded = calls_of(monkeypatch, grpo, "load_model")
    for flags, measured in (((2, 0), [2]), ((4, 0), []), ((4, 0.1), [1, 2, 3])):
        loaded.clear()
        _, lines = train(max_steps=3, log_every=flags[0], beta=flags[1])
        assert [line["step"] for line in lines if "kl" in line] == measured
        assert len(loaded) == 1 + bool(measured)
