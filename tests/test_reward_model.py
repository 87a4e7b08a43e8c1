"""reward_model.py against numbers worked by hand and the stock sequence classifier, one answer at a time."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_lines, write_rows
from helpers import calls_of, error_of, trainer
from safetensors.torch import load_file
from samples import CPU, END, float64, gradient_norm, said, softplus, stock_classifier, tiny_rows

import reward_model as rm
from common import collate

ROWS = tiny_rows("preference_train")
pytestmark = pytest.mark.usefixtures("one_cpu", "process_group")


CHOSEN, REJECTED = (2.0, -1.0, 0.3), (0.5, 1.0, 0.3)  # differences 1.5, -2, 0


def bradley_terry(**settings):
    return rm.bradley_terry_loss(float64(*CHOSEN), float64(*REJECTED), **settings).tolist()


def test_bradley_terry_by_hand_with_margins_and_smoothed_labels():
    # ln(1 + e^-1.5), ln(1 + e^2), ln 2
    assert bradley_terry() == pytest.approx([0.201413, 2.126928, 0.693147], abs=2e-6)
    # a margin is what the chosen answer must win by; differences less margins: 1, -3, 1
    margins = float64(0.5, 1.0, -1.0)
    assert bradley_terry(margin=margins) == pytest.approx([0.313262, 3.048587, 0.313262], abs=2e-6)
    assert bradley_terry(margin=0.5) == pytest.approx([0.313262, softplus(2.5), softplus(0.5)])
    # 0.9 * 0.201413 + 0.1 * 1.701413, 0.9 * 2.126928 + 0.1 * 0.126928
    losses = bradley_terry(label_smoothing=0.1)
    assert losses == pytest.approx([0.351413, 1.926928, 0.693147], abs=2e-6)
    # The better answer, whichever it is, must win by the margin: at 1.5 - 0.5 and -1.5 - 0.5, and so on
    both = bradley_terry(label_smoothing=0.1, margin=margins)
    expected = [0.9 * softplus(-d + m) + 0.1 * softplus(d + m) for d, m in ((1.5, 0.5), (-2, 1), (0, -1))]
    assert both == pytest.approx(expected)


def test_margin_with_smoothing_never_helps_the_wrong_label():
    gradients = []
    for margin in (0.0, 2.0):
        rejected = float64(*REJECTED).requires_grad_()
        loss = rm.bradley_terry_loss(float64(*CHOSEN), rejected, margin, label_smoothing=0.5)
        gradients.append(torch.autograd.grad(loss.sum(), rejected)[0])
        assert loss.tolist() == pytest.approx(  # of labels that say nothing, both sides are the same
            rm.bradley_terry_loss(float64(*REJECTED), float64(*CHOSEN), margin, 0.5).tolist()
        )
    assert gradients[1][2] == pytest.approx(0)  # equal rewards stay equal


def test_outcome_and_center_loss_by_hand():
    rewards, labels = float64(2, -1, 0, -1), torch.tensor([1, 1, 0, 0])
    losses = rm.outcome_loss(rewards, labels).tolist()
    assert losses == pytest.approx([0.126928, 1.313262, 0.693147, 0.313262], abs=2e-6)
    # 0.8 * 0.126928 + 0.2 * 2.126928, 0.8 * 1.313262 + 0.2 * 0.313262, ln 2, 0.8 * 0.313262 + 0.2 * 1.313262
    losses = rm.outcome_loss(rewards, labels, label_smoothing=0.2).tolist()
    assert losses == pytest.approx([0.526928, 1.113262, 0.693147, 0.513262], abs=2e-6)
    # the centre's is the square of the sum
    assert rm.center_loss(float64(2, 1.5, -1), float64(-3, 1.5, 1)).tolist() == [1, 9, 0]


def logit(p):
    return math.log(p / (1 - p))


def test_calibration_error_by_hand():
    # bins of width 0.05: 0.57 (right) is alone, off by 0.43; 0.92 (right) and 0.93 (wrong) share one, off by
    # |1.85 - 1| together
    differences = torch.tensor([logit(0.57), logit(0.92), -logit(0.93)])
    assert rm.calibration_error(differences) == pytest.approx((0.43 + 0.85) / 3, abs=1e-6)
    assert rm.calibration_error(differences, num_bins=1) == pytest.approx(0.42 / 3, abs=1e-6)
    split = torch.tensor([logit(0.57), logit(0.64), -logit(0.93)])  # three bins
    assert rm.calibration_error(split) == pytest.approx((0.43 + 0.36 + 0.93) / 3, abs=1e-6)


def loaded(folder, **flags):
    args = rm.Args(model=str(folder), **flags)
    return rm.load_reward_model(str(folder), args, rm.load_tokenizer(args), CPU)


def stock_reward(model, sequence):
    """What a stock classifier says of one answer up to and with its last trained token, alone."""
    ids = torch.tensor(sequence.input_ids[: np.flatnonzero(sequence.trained)[-1] + 1]).long()
    hidden = model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state
    return model.score(hidden[0, -1])[0]


def stock_rewards(folder, pairs):
    """(P, K) by `stock_reward`."""
    model = stock_classifier(folder)
    with torch.no_grad():
        return np.array([[stock_reward(model, answer).item() for answer in pair] for pair in pairs])


def pairs_of(folder, tmp_path, rows):
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    args = rm.Args(dataset=(path,), model=str(folder))
    return [item.answers for item in rm.load_answers(rm.load_tokenizer(args), path, "train", args)]


def random_answers(count, tail=0, seed=0):
    """Answers of 2 to 9 tokens to prompts of 3 to 6, END marked, `tail` tokens behind it."""
    rng, answers = np.random.default_rng(seed), []
    for _ in range(count):
        begun = rng.integers(3, 768, rng.integers(5, 15))
        ids = np.array([*begun, END, *rng.integers(3, 768, tail)], np.int32)
        answers.append(rm.Sequence(ids, np.arange(len(ids)) == len(begun)))
    return answers


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_rewards_are_those_of_the_stock_classifier_on_each_answer_alone(random_classifiers, kind):
    """And read at the end token, not at what a template writes behind it."""
    folder, answers, tails = random_classifiers[kind], random_answers(6), random_answers(3, tail=2)
    model, plain = loaded(folder), stock_classifier(folder)
    with torch.no_grad():
        # the whole answer through the stock forward, which looks for the last token that is not padding
        whole = [plain(input_ids=torch.tensor(a.input_ids[None]).long()).logits[0, 0].item() for a in answers]
        found = rm.head_outputs(model, collate([*answers, *tails]))
        expected = [*whole, *(stock_reward(plain, answer).item() for answer in tails)]
    assert found.dtype == torch.float32 and np.std(expected) > 0.1
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_shared_beginnings_do_not_change_the_rewards(random_classifiers, kind, tmp_path):
    pairs, model = pairs_of(random_classifiers[kind], tmp_path, ROWS[:4]), loaded(random_classifiers[kind])
    flags = [rm.Args(attn=attn) for attn in ("packed", "eager")]  # eager shares nothing
    rows = [rm.collate_pairs(pairs, args, CPU) for args in flags]
    assert rows[0].input_ids.shape[1] < 0.7 * rows[1].input_ids.shape[1]
    with torch.no_grad():
        shared, apart = (rm.head_outputs(model, row) for row in rows)
    assert torch.allclose(apart, shared, atol=1e-5)
    expected = stock_rewards(random_classifiers[kind], pairs)
    assert shared.view(-1, 2).numpy() == pytest.approx(expected, abs=1e-4)


def test_new_head_is_drawn_from_the_seed_with_standard_deviation_1_over_sqrt_of_h_plus_1():
    heads = [loaded("tiny/sft", seed=seed).score.weight.detach() for seed in (1, 1, 2)]
    assert heads[0].shape == (1, 128) and torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    drawn = torch.randn(1, 128, generator=torch.Generator().manual_seed(2)) / math.sqrt(129)
    assert torch.allclose(heads[2], drawn)


def test_start_up_check_refuses_a_leak_and_lets_large_rewards_round(random_classifiers, monkeypatch, capsys):
    model, head_outputs = loaded(random_classifiers["qwen3"]), rm.head_outputs
    model.score.weight.data *= 1e4 / model.score.weight.data.norm()
    monkeypatch.setattr(rm, "head_outputs", lambda *rest: head_outputs(*rest) * (1 + 1e-5))
    rm.check_rewards(model)  # off by 0.1 of some thousand
    model.score.weight.data *= 1e-4
    monkeypatch.setattr(rm, "head_outputs", lambda *rest: head_outputs(*rest) + 0.1)
    with pytest.raises(ValueError, match="packed rewards are 0.1"):
        rm.check_rewards(model)
    leaky = lambda model, batch: head_outputs(model, batch) + 0.01 * torch.arange(batch.num_sequences)
    monkeypatch.setattr(rm, "head_outputs", leaky)
    line = error_of(lambda: loaded(random_classifiers["qwen3"]), capsys)
    assert "packed rewards are 0.01" in line


# Runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path, random_classifiers):
    """As `trainer` says: one step of all rows on a small random classifier."""
    flags = {"model": random_classifiers["qwen3"], "max_steps": 1, "lr_schedule": "constant"}
    train = trainer(rm, tmp_path, learning_rate=1e-3, **flags)
    return lambda rows, *rest, **flags: train(rows, *rest, **{"batch_size": len(rows)} | flags)


def test_first_step_is_a_plain_loop_over_the_stock_model(train, tmp_path, random_classifiers):
    center_coef, label_smoothing, margins = 0.01, 0.2, (0.5, None, 0.0, 1.5, -1.0)
    rows = [row | {"margin": m} for row, m in zip(ROWS, margins, strict=False)]
    folder = random_classifiers["qwen3"]
    pairs, model, losses = pairs_of(folder, tmp_path, rows), stock_classifier(folder), []
    for pair, margin in zip(pairs, margins, strict=True):
        chosen, rejected = (stock_reward(model, answer) for answer in pair)
        d, m = chosen - rejected, margin or 0.0
        loss = (1 - label_smoothing) * torch.log1p(torch.exp(m - d))
        loss = loss + label_smoothing * torch.log1p(torch.exp(m + d))
        losses.append(loss + center_coef * (chosen + rejected) ** 2)
    loss = torch.stack(losses).mean()
    loss.backward()
    flags = {"center_coef": center_coef, "label_smoothing": label_smoothing}
    total = sum(len(answer.input_ids) for pair in pairs for answer in pair)
    rewards = stock_rewards(folder, pairs)
    expected = {
        "loss": loss.item(),
        "grad_norm": gradient_norm(model),
        "accuracy": np.mean(rewards[:, 0] > rewards[:, 1]),  # without the margin
        "margin": np.mean(rewards[:, 0] - rewards[:, 1]),
        "mean_reward": rewards.mean(),
        "min_reward": rewards.min(),
        "max_reward": rewards.max(),
    }
    # Rows of some pairs, rows of one: the mean is over the pairs of all.
    for budget in (total // 3, 30):
        _, [line] = train(rows, max_tokens_per_micro_batch=budget, **flags)
        assert {key: line[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_evaluation_by_hand(train, tmp_path, random_classifiers):
    held_out, folder = ROWS[20:32], random_classifiers["qwen3"]
    _, lines = train(ROWS[:2], held_out)
    rewards = stock_rewards(folder, pairs_of(folder, tmp_path, held_out))
    texts = [[row[k][0]["content"] for k in ("chosen", "rejected")] for row in held_out]
    # tokens behind the prompt, the end token included
    tokenizer = rm.load_tokenizer(rm.Args())
    counts = np.array([[len(tokenizer(text).input_ids) + 1 for text in pair] for pair in texts])
    alike = np.array([abs(c - r) <= 0.1 * max(c, r) for c, r in counts.tolist()])
    assert alike.any() and not alike.all()
    differences = rewards[:, 0] - rewards[:, 1]
    confidence, right = 1 / (1 + np.exp(-np.abs(differences))), differences > 0
    bins = np.floor((confidence - 0.5) * 20)
    expected = {
        "eval/accuracy": np.mean(right),
        "eval/accuracy_length_matched": np.mean(right[alike]),
        "eval/ece": sum(abs((confidence - right)[bins == n].sum()) for n in range(10)) / 12,
        "eval/margin": np.mean(differences),
        "eval/length_correlation": np.corrcoef(rewards.flatten(), counts.flatten())[0, 1],
    }
    kinds = np.array([row["kind"] for row in held_out])
    expected |= {f"eval/accuracy_{kind}": np.mean(right[kinds == kind]) for kind in kinds}
    assert {key for key in lines[0] if "accuracy_" in key} == {key for key in expected if "accuracy_" in key}
    assert {key: lines[0][key] for key in expected} == pytest.approx(expected, abs=1e-3)
    assert lines[1].keys() >= expected.keys()  # and after the last step


def test_accuracy_of_equal_lengths_is_not_logged_where_nothing_matches(train):
    longer = said("1 + 1 = 2\n" * 20)
    _, lines = train(ROWS[:2], [row | {"rejected": longer} for row in ROWS[20:24]])
    assert "eval/accuracy" in lines[0] and "eval/accuracy_length_matched" not in lines[0]


def unpaired_rows(rows):
    found = [(row["prompt"], row[key], key == "chosen") for row in rows for key in ("chosen", "rejected")]
    return [dict(zip(("prompt", "completion", "label"), values, strict=True)) for values in found]


@pytest.mark.parametrize("pairs", [False, True], ids=["unpaired", "taken-apart"])
def test_outcome_step_is_a_plain_loop_over_single_answers(train, tmp_path, random_classifiers, pairs):
    rows, others, folder = ROWS[:3], ROWS[20:26], random_classifiers["qwen3"]
    singles = unpaired_rows(rows)[: None if pairs else 5]  # three good ones, two bad
    answers = [a for pair in pairs_of(folder, tmp_path, rows) for a in pair][: len(singles)]
    model, signs = stock_classifier(folder), torch.tensor([1.0, -1.0] * 3)[: len(singles)]
    rewards = torch.stack([stock_reward(model, answer) for answer in answers])
    losses = 0.9 * torch.log1p(torch.exp(-signs * rewards)) + 0.1 * torch.log1p(torch.exp(signs * rewards))
    losses.mean().backward()
    found, good = rewards.detach(), signs > 0
    expected = {
        "loss": losses.mean().item(),
        "grad_norm": gradient_norm(model),
        "accuracy": (found * signs > 0).float().mean().item(),
        "margin": (found[good].mean() - found[~good].mean()).item(),
        "mean_reward": found.mean().item(),
        "min_reward": found.min().item(),
        "max_reward": found.max().item(),
    }
    flags = {"objective": "outcome", "label_smoothing": 0.1, "batch_size": len(singles)}
    # Held-out pairs are judged as pairs, held-out single answers one by one.
    held_out = others if pairs else unpaired_rows(others)
    _, lines = train(rows if pairs else singles, held_out, max_tokens_per_micro_batch=100, **flags)
    assert {key: lines[1][key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)
    chosen, rejected = stock_rewards(folder, pairs_of(folder, tmp_path, others)).T
    if pairs:
        wanted = {"eval/accuracy": np.mean(chosen > rejected)}
    else:
        wanted = {"eval/accuracy": np.mean([*(chosen > 0), *(rejected < 0)])}
        wanted["eval/auc"] = np.mean([[c > r for r in rejected] for c in chosen])
    assert {key: lines[0][key] for key in wanted} == pytest.approx(wanted)
    assert ("eval/auc" in lines[0], "eval/margin" in lines[0]) == (not pairs, pairs)


@pytest.mark.parametrize("objective", ["bradley_terry", "outcome"])
def test_saved_model_has_the_rewards_of_transformers_and_pairs_an_offset_that_centres_them(
    train, tmp_path, random_classifiers, objective
):
    rows = ROWS[:6]
    flags = {"objective": objective, "max_steps": 3, "learning_rate": 1e-2, "center_coef": 0.0}
    folder, _ = train(rows, **flags)
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"] and config["pad_token_id"] == 0
    rewards = stock_rewards(folder / "model", pairs_of(random_classifiers["qwen3"], tmp_path, rows))
    assert abs(rewards.mean()) > 0.01  # stock: without the offset
    if objective == "outcome":  # sigma(r) is the probability that an answer is good
        assert config["reward_offset"] == 0
    else:
        assert rewards.mean() + config["reward_offset"] == pytest.approx(0, abs=1e-3)
    assert loaded(folder / "model").config.reward_offset == 0  # training it again begins anew


def test_head_is_exact_in_bfloat16(train, random_classifiers):
    folder, _ = train(ROWS[:6], dtype="bfloat16", batch_size=4)
    assert load_file(folder / "model" / "model.safetensors")["score.weight"].dtype == torch.float32
    model = loaded(random_classifiers["qwen3"], dtype="bfloat16")
    rewards = rm.head_outputs(model, collate(random_answers(3)))
    # rounded states, but a head that is not: no reward is a bfloat16 number
    assert type(model).__name__.startswith("FSDP")
    assert rewards.dtype == torch.float32 and (rewards.bfloat16() != rewards).any()


def test_ensemble_is_a_folder_of_members_that_differ(train, random_classifiers, tmp_path):
    train(ROWS[:6], model=random_classifiers["causal"], num_members=3, batch_size=2, seed=5)
    folder = tmp_path / "run_0"
    index = json.loads((folder / "ensemble.json").read_text())
    assert index == {"members": [f"member_{n}/model" for n in range(3)]}
    weights = [load_file(folder / name / "model.safetensors") for name in index["members"]]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(weights[one]["score.weight"], weights[other]["score.weight"], atol=0.01)
    seeds = [json.loads((folder / f"member_{n}" / "args.json").read_text())["seed"] for n in range(3)]
    losses = [read_lines(folder / f"member_{n}" / "metrics.jsonl")[1]["loss"] for n in range(3)]
    assert seeds == [5, 6, 7] and len(set(losses)) == 3


def test_continued_ensemble_skips_the_members_that_are_finished(
    train, random_classifiers, tmp_path, monkeypatch
):
    flags = {"model": random_classifiers["causal"], "num_members": 2, "batch_size": 2}
    flags |= {"max_steps": 2, "save_every": 1}
    rows, folder = ROWS[:6], tmp_path / "run_0"
    train(rows, **flags)
    wanted = load_file(folder / "member_1" / "model" / "model.safetensors")
    # As if it had been stopped in the second member's second step
    shutil.rmtree(folder / "member_1" / "model")
    shutil.rmtree(folder / "member_1" / "checkpoints" / "step_00000002")
    (folder / "ensemble.json").unlink()
    loads = calls_of(monkeypatch, rm, "load_reward_model")
    train(rows, output_dir=str(folder), resume=True, **flags)
    assert [name for (name, *_), _ in loads] == [random_classifiers["causal"]]  # one member is trained
    found = load_file(folder / "member_1" / "model" / "model.safetensors")
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    assert len(json.loads((folder / "ensemble.json").read_text())["members"]) == 2


@pytest.fixture
def score(tmp_path):
    """score(rows, **flags) -> the rows written, and what main returned."""

    def run(rows, **flags):
        path = write_rows(tmp_path / "answers.jsonl", rows)
        result = rm.main(rm.Args(score=path, output_dir=str(tmp_path / "none"), **flags))
        assert not (tmp_path / "none").exists()
        return read_lines(tmp_path / "answers.scored.jsonl"), result

    return run


@pytest.fixture
def judge(random_classifiers, tmp_path):
    """The folder of a model with the offset 0.5."""
    path = Path(shutil.copytree(random_classifiers["qwen3"], tmp_path / "judge")) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reward_offset": 0.5}))
    return str(path.parent)


def test_score_is_the_stock_reward_and_the_offset(score, judge, tmp_path):
    rows = ROWS[:3]
    (a, _), (b, c), (d, _) = stock_rewards(judge, pairs_of(judge, tmp_path, rows))
    asked = [
        {"prompt": rows[0]["prompt"], "completions": [rows[0]["chosen"]], "kept": 7},
        {"prompt": rows[1]["prompt"], "completions": [rows[1]["chosen"], rows[1]["rejected"]]},
        {"prompt": rows[2]["prompt"], "completion": rows[2]["chosen"]},
        {"prompt": rows[2]["prompt"], "answer": "nothing to score"},
    ]
    found, result = score(asked, model=judge)
    assert found[0]["reward"] == pytest.approx([a + 0.5], abs=1e-4) and found[0]["kept"] == 7
    assert found[1]["reward"] == pytest.approx([b + 0.5, c + 0.5], abs=1e-4)
    assert found[2]["reward"] == pytest.approx(d + 0.5, abs=1e-4)
    assert found[3] == asked[3] | {"reward": None}
    assert result == {"mean_reward": pytest.approx((a + b + c + d) / 4 + 0.5, abs=1e-4)}


def test_score_with_a_model_that_has_no_reward_head_is_refused(score, random_classifiers, tmp_path, capsys):
    rows = [{"prompt": "a", "completion": "b"}]
    assert "is no reward model" in error_of(lambda: score(rows, model=random_classifiers["causal"]), capsys)
    assert not (tmp_path / "answers.scored.jsonl").exists()


def test_rows_that_cannot_be_used_are_dropped_and_counted(random_classifiers, tmp_path, capsys):
    rows = ROWS[:6]
    bad = [rows[0], rows[1] | {"chosen": rows[1]["rejected"]}, rows[2] | {"chosen": None}]
    single = {"prompt": "a", "completion": said("4"), "label": True}
    path = write_rows(tmp_path / "rows.jsonl", [*rows, *bad, single])
    args = rm.Args(model=random_classifiers["qwen3"])
    assert len(rm.load_answers(rm.load_tokenizer(args), path, "train", args)) == 6
    told = capsys.readouterr().out
    assert "first row 8: chosen and rejected are the same" in told and "first row 9: found" in told
    assert "6 different examples" in told
