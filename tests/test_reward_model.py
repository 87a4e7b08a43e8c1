"""reward_model.py: its losses, rewards read by position, heads, runs, ensembles, scores, reports and errors.

Losses are held against numbers worked by hand, rewards against the stock sequence classifier on one answer at
a time. What the script shares with dpo.py and ipo_kto_simpo_orpo.py is tested there.
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
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

import reward_model as rm
from common import collate

CPU, END = torch.device("cpu"), 2  # <|im_end|> of tiny's tokenizer, whose padding is 0


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def softplus(x):
    return math.log1p(math.exp(x))


# Losses -----------------------------------------------------------------------------------------------------

CHOSEN, REJECTED = (2.0, -1.0, 0.3), (0.5, 1.0, 0.3)  # differences 1.5, -2, 0


def bradley_terry(**settings):
    return rm.bradley_terry_loss(float64(*CHOSEN), float64(*REJECTED), **settings).tolist()


def test_bradley_terry_by_hand():
    # ln(1 + e^-1.5), ln(1 + e^2), ln 2
    assert bradley_terry() == pytest.approx([0.201413, 2.126928, 0.693147], abs=2e-6)


def test_margin_is_what_the_chosen_answer_must_win_by():
    # differences less margins: 1, -3, 1
    losses = bradley_terry(margin=float64(0.5, 1.0, -1.0))
    assert losses == pytest.approx([0.313262, 3.048587, 0.313262], abs=2e-6)
    assert bradley_terry(margin=0.5) == pytest.approx([0.313262, softplus(2.5), softplus(0.5)])


def test_smoothed_bradley_terry_mixes_the_losses_of_both_labels():
    # 0.9 * 0.201413 + 0.1 * 1.701413, 0.9 * 2.126928 + 0.1 * 0.126928
    losses = bradley_terry(label_smoothing=0.1)
    assert losses == pytest.approx([0.351413, 1.926928, 0.693147], abs=2e-6)
    both = bradley_terry(label_smoothing=0.1, margin=float64(0.5, 1.0, -1.0))  # at 1, -3, 1
    assert both == pytest.approx([0.413262, 2.748587, 0.413262], abs=2e-6)


def test_outcome_loss_by_hand():
    rewards, labels = float64(2, -1, 0, -1), torch.tensor([1, 1, 0, 0])
    losses = rm.outcome_loss(rewards, labels).tolist()
    assert losses == pytest.approx([0.126928, 1.313262, 0.693147, 0.313262], abs=2e-6)
    # 0.8 * 0.126928 + 0.2 * 2.126928, 0.8 * 1.313262 + 0.2 * 0.313262, ln 2, 0.8 * 0.313262 + 0.2 * 1.313262
    losses = rm.outcome_loss(rewards, labels, label_smoothing=0.2).tolist()
    assert losses == pytest.approx([0.526928, 1.113262, 0.693147, 0.513262], abs=2e-6)


def test_center_loss_is_the_square_of_the_sum():
    assert rm.center_loss(float64(2, 1.5, -1), float64(-3, 1.5, 1)).tolist() == [1, 9, 0]


def test_gradients_are_those_of_finite_differences():
    chosen, rejected = (float64(*x).requires_grad_() for x in (CHOSEN, REJECTED))
    margin = float64(0.5, 1.0, -1.0)
    for settings in ({}, {"margin": margin}, {"label_smoothing": 0.2, "margin": margin}):
        assert torch.autograd.gradcheck(
            functools.partial(rm.bradley_terry_loss, **settings), (chosen, rejected)
        )
    assert torch.autograd.gradcheck(rm.center_loss, (chosen, rejected))
    labels = torch.tensor([1, 0, 1])
    for smoothing in (0.0, 0.3):
        assert torch.autograd.gradcheck(
            functools.partial(rm.outcome_loss, labels=labels, label_smoothing=smoothing), (chosen,)
        )
    up, down = torch.autograd.grad(rm.bradley_terry_loss(chosen, rejected).sum(), (chosen, rejected))
    assert (up < 0).all() and torch.allclose(up, -down)


def test_losses_stay_finite_far_from_0():
    far = torch.tensor([300.0, -300.0])
    losses = torch.cat([rm.bradley_terry_loss(far, -far), rm.outcome_loss(far, torch.tensor([0, 1]))])
    assert losses.tolist() == pytest.approx([0, 600, 300, 300])


# Ensembles and measures -------------------------------------------------------------------------------------


def test_combine_by_hand():
    members = float64([1, 4], [3, 0], [2, 5])
    assert rm.combine(members, reward_aggregation="mean", std_coef=9.0).tolist() == [2, 3]
    assert rm.combine(members, reward_aggregation="min", std_coef=9.0).tolist() == [1, 0]
    # population variances 2/3 and 14/3: the members are all there are
    found = rm.combine(members, reward_aggregation="mean_minus_std", std_coef=0.5).tolist()
    assert found == pytest.approx([2 - 0.5 * math.sqrt(2 / 3), 3 - 0.5 * math.sqrt(14 / 3)])
    assert rm.combine(members[:1], reward_aggregation="mean_minus_std", std_coef=1.0).tolist() == [1, 4]


def test_combine_keeps_the_shape_of_pairs():
    members = torch.arange(12.0).view(2, 3, 2)
    for how in ("mean", "min", "mean_minus_std"):
        assert rm.combine(members, reward_aggregation=how, std_coef=1.0).shape == (3, 2)
    assert rm.combine(members, reward_aggregation="mean", std_coef=1.0).tolist() == [[3, 4], [5, 6], [7, 8]]


def logit(p):
    return math.log(p / (1 - p))


def test_calibrated_rewards_have_no_calibration_error():
    # confidence 3/4: right in 3 of 4; confidence 3/5: right in 3 of 5; no confidence: a tie
    sure, unsure = logit(0.75), logit(0.6)
    differences = torch.tensor([sure] * 3 + [-sure] + [unsure] * 3 + [-unsure] * 2 + [0.0])
    assert rm.calibration_error(differences) == pytest.approx(0, abs=1e-6)


def test_calibration_error_of_a_model_that_is_sure_and_wrong_is_its_confidence():
    assert rm.calibration_error(torch.full((7,), -logit(0.98))) == pytest.approx(0.98, abs=1e-5)
    assert rm.calibration_error(torch.full((7,), -50.0)) == pytest.approx(1)
    assert rm.calibration_error(torch.full((7,), 50.0)) == pytest.approx(0)


def test_calibration_error_by_hand():
    # bins of width 0.05: 0.57 (right) is alone, off by 0.43; 0.92 (right) and 0.93 (wrong) share one, off by
    # |1.85 - 1| together
    differences = torch.tensor([logit(0.57), logit(0.92), -logit(0.93)])
    assert rm.calibration_error(differences) == pytest.approx((0.43 + 0.85) / 3, abs=1e-6)
    assert rm.calibration_error(differences, num_bins=1) == pytest.approx(0.42 / 3, abs=1e-6)
    split = torch.tensor([logit(0.57), logit(0.64), -logit(0.93)])  # three bins
    assert rm.calibration_error(split) == pytest.approx((0.43 + 0.36 + 0.93) / 3, abs=1e-6)


def test_length_correlation_is_pearsons():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, 30)
    rewards = rng.normal(size=30) + 0.05 * lengths
    found = rm.length_correlation(torch.tensor(rewards).float(), torch.tensor(lengths))
    assert found == pytest.approx(np.corrcoef(rewards, lengths)[0, 1], abs=1e-6) and 0.2 < found < 0.95
    assert rm.length_correlation(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([4, 5, 6])) == pytest.approx(-1)


def test_length_correlation_is_0_where_one_does_not_vary():
    lengths = torch.arange(7)
    for constant in (0.0, 1.0, -3.0):
        assert rm.length_correlation(torch.full((7,), constant), lengths) == 0
    assert rm.length_correlation(torch.randn(7), torch.full((7,), 4)) == 0
    assert rm.length_correlation(torch.tensor([2.0]), torch.tensor([4])) == 0


# Models and answers -----------------------------------------------------------------------------------------


def small_config(kind, pad=0):
    sizes = {"vocab_size": 768, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_labels": 1}
    ids = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": pad}
    config = {"qwen3": Qwen3Config, "llama": LlamaConfig}[kind]
    return config(**sizes, **ids, max_position_embeddings=2048, initializer_range=0.2)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of small random float32 models with tiny's tokenizer: two classifiers, a language model, and a
    classifier whose padding is the end token."""
    classes = {"qwen3": Qwen3ForSequenceClassification, "llama": LlamaForSequenceClassification}
    wanted = {kind: (classes[kind], kind, 0) for kind in classes}
    wanted |= {"causal": (Qwen3ForCausalLM, "qwen3", 0), "pad_is_end": (classes["qwen3"], "qwen3", END)}
    found = {}
    for name, (model_class, kind, pad) in wanted.items():
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = model_class(small_config(kind, pad))
        found[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(found[name])
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "sft")
        if pad == END:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(found[name])
    return found


def stock(folder):
    """A classifier as plain transformers loads it."""
    options = {"dtype": torch.float32, "attn_implementation": "eager", "num_labels": 1}
    return AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()


def loaded(folder, **flags):
    args = rm.Args(model=str(folder), **flags)
    return rm.load_reward_model(str(folder), args, rm.load_tokenizer(args), CPU)


def stock_reward(model, sequence):
    """What a stock classifier says of one answer up to and with its last trained token, alone."""
    ids = torch.tensor(sequence.input_ids[: np.flatnonzero(sequence.trained)[-1] + 1]).long()
    hidden = model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state
    return model.score(hidden[0, -1])[0]


def stock_rewards(folder, pairs):
    """(P, K) by `stock_reward`, a list of lists."""
    model = stock(folder)
    with torch.no_grad():
        return [[stock_reward(model, answer).item() for answer in pair] for pair in pairs]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@functools.cache
def tiny_rows(name="preference_train"):
    return read_lines(ROOT / "tiny" / "data" / f"{name}.jsonl")[:200]


def pairs_of(folder, tmp_path, rows):
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    args = rm.Args(dataset=(path,), model=str(folder))
    return rm.load_pairs(rm.load_tokenizer(args), path, "train", args)[0]


def random_answers(count, tail=0, seed=0):
    """Answers of 2 to 9 tokens to prompts of 3 to 6, END last, `tail` untrained tokens behind it."""
    rng, answers = np.random.default_rng(seed), []
    for _ in range(count):
        prompt, size = rng.integers(3, 768, rng.integers(3, 7)), rng.integers(1, 9)
        ids = np.array([*prompt, *rng.integers(3, 768, size), END, *rng.integers(3, 768, tail)], np.int32)
        trained = (np.arange(len(ids)) >= len(prompt)) & (np.arange(len(ids)) < len(ids) - tail)
        answers.append(rm.Sequence(ids, trained))
    return answers


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_rewards_are_those_of_the_stock_classifier_on_each_answer_alone(folders, kind, one_cpu):
    answers, model, plain = random_answers(6), loaded(folders[kind]), stock(folders[kind])
    with torch.no_grad():
        # the whole answer through the stock forward, which looks for the last token that is not padding
        expected = [
            plain(input_ids=torch.tensor(a.input_ids[None]).long()).logits[0, 0].item() for a in answers
        ]
        found = rm.answer_rewards(model, collate(answers))
    assert found.dtype == torch.float32 and np.std(expected) > 0.1
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_reward_does_not_depend_on_the_rest_of_the_row(folders, kind, one_cpu):
    answers, model = random_answers(6), loaded(folders[kind])
    with torch.no_grad():
        together = rm.answer_rewards(model, collate(answers))
        alone = torch.cat([rm.answer_rewards(model, collate([answer])) for answer in answers])
        backwards = rm.answer_rewards(model, collate(answers[::-1])).flip(0)
        some = rm.answer_rewards(model, collate([answers[i] for i in (4, 1)]))
    assert torch.allclose(together, alone, atol=1e-5) and torch.allclose(together, backwards, atol=1e-5)
    assert torch.allclose(some, together[[4, 1]], atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_shared_prompts_do_not_change_the_rewards(folders, kind, tmp_path, one_cpu):
    pairs, model = pairs_of(folders[kind], tmp_path, tiny_rows()[:4]), loaded(folders[kind])
    with torch.no_grad():
        rows = [rm.collate_pairs(pairs, CPU, shared) for shared in (False, True)]
        apart, shared = (rm.answer_rewards(model, row) for row in rows)
    assert rows[1].input_ids.shape[1] < rows[0].input_ids.shape[1]
    assert torch.allclose(apart, shared, atol=1e-5)
    expected = stock_rewards(folders[kind], pairs)
    assert shared.view(-1, 2).numpy() == pytest.approx(np.array(expected), abs=1e-4)


def test_reward_is_read_at_the_end_token_and_not_at_what_a_template_writes_behind_it(
    folders, tmp_path, one_cpu
):
    folder = folders["qwen3"]
    [pair] = pairs_of(folder, tmp_path, tiny_rows()[:1])
    chosen, model, plain = pair.chosen, loaded(folder), stock(folder)
    end = int(np.flatnonzero(chosen.trained)[-1])
    assert chosen.input_ids[end] == END and len(chosen.input_ids) == end + 2  # and a line break
    with torch.no_grad():
        found = rm.answer_rewards(model, collate([chosen])).item()
        to_the_end, with_line_break = (
            plain(input_ids=torch.tensor(chosen.input_ids[None, :stop]).long()).logits.item()
            for stop in (end + 1, end + 2)
        )
    assert found == pytest.approx(to_the_end, abs=1e-4) and abs(found - with_line_break) > 1e-2
    tails = random_answers(3, tail=2)
    with torch.no_grad():
        found = rm.answer_rewards(model, collate(tails)).tolist()
        assert found == pytest.approx([stock_reward(plain, a).item() for a in tails], abs=1e-4)


def test_padding_that_is_the_end_token_moves_the_stock_reward_and_not_ours(folders, one_cpu):
    folder, answers = folders["pad_is_end"], random_answers(4)
    model, plain = loaded(folder), stock(folder)
    assert model.config.pad_token_id == plain.config.pad_token_id == END
    width = max(len(a.input_ids) for a in answers)
    padded = torch.tensor([[*a.input_ids, *[END] * (width - len(a.input_ids))] for a in answers])
    attended = torch.tensor([[1] * len(a.input_ids) + [0] * (width - len(a.input_ids)) for a in answers])
    with torch.no_grad():
        theirs = plain(input_ids=padded, attention_mask=attended).logits[:, 0]
        hidden = plain.get_decoder()(input_ids=padded, attention_mask=attended).last_hidden_state
        ours = rm.answer_rewards(model, collate(answers))
        at_end, before = (
            torch.stack([plain.score(hidden[n, len(a.input_ids) + shift])[0] for n, a in enumerate(answers)])
            for shift in (-1, -2)
        )
    assert torch.allclose(theirs, before, atol=1e-4)  # one token early
    assert torch.allclose(ours, at_end, atol=1e-4) and (ours - theirs).abs().min() > 1e-3


def test_row_without_answers_has_no_rewards_and_a_backward_that_reaches_every_parameter(folders, one_cpu):
    model = loaded(folders["qwen3"])
    for share in (False, True):
        rewards = rm.answer_rewards(model, rm.collate_pairs([], CPU, share))
        assert rewards.shape == (0,)
        losses = rm.bradley_terry_loss(*rewards.view(-1, 2).T, margin=torch.zeros(0))
        losses.sum().backward()
    # FSDP2 waits for a gradient of each, so none may be missing; all are 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_new_head_is_drawn_from_the_seed_with_standard_deviation_1_over_sqrt_of_h_plus_1(one_cpu):
    heads = [loaded("tiny/sft", seed=seed).score.weight.detach() for seed in (1, 1, 2)]
    assert heads[0].shape == (1, 128) and torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    many = torch.stack(heads[1:]).double()
    # 256 draws: their standard deviation is within 20 % of the true one but once in 10^5 times
    assert many.std().item() == pytest.approx(1 / math.sqrt(129), rel=0.2)
    assert abs(many.mean().item()) < 4 / math.sqrt(129 * 256)
    drawn = torch.randn(1, 128, generator=torch.Generator().manual_seed(2)) / math.sqrt(129)
    assert torch.allclose(heads[2], drawn)


def test_trained_head_is_kept(folders, one_cpu):
    saved = load_file(Path(folders["qwen3"]) / "model.safetensors")["score.weight"]
    for seed in (1, 2):
        assert torch.equal(loaded(folders["qwen3"], seed=seed).score.weight, saved)


def test_tokens_that_the_tokenizer_has_been_given_start_at_the_mean_embedding(folders, one_cpu):
    args = rm.Args(model=str(folders["qwen3"]))
    tokenizer = rm.load_tokenizer(args)
    known = stock(folders["qwen3"]).get_input_embeddings().weight[: len(tokenizer)]
    size = len(stock(folders["qwen3"]).get_input_embeddings().weight)
    tokenizer.add_tokens([f"<new {n}>" for n in range(size - len(tokenizer) + 1)], special_tokens=True)
    table = (
        rm.load_reward_model(args.model, args, tokenizer, torch.device("cpu")).get_input_embeddings().weight
    )
    assert len(table) == len(tokenizer) > size
    torch.testing.assert_close(table[-1], known.mean(0))


def test_attention_that_mixes_the_answers_of_a_row_is_refused(folders, monkeypatch, capsys, one_cpu):
    def leaky(model, batch):
        return answer_rewards(model, batch) + 0.01 * torch.arange(batch.num_sequences)

    answer_rewards = rm.answer_rewards
    monkeypatch.setattr(rm, "answer_rewards", leaky)
    with pytest.raises(SystemExit) as stop:
        loaded(folders["qwen3"])
    assert stop.value.code == 2 and "packed rewards differ" in capsys.readouterr().err


# Runs -------------------------------------------------------------------------------------------------------

TIMES = ("tokens_per_second", "step_time")
PACKING = ("num_tokens", "packing/fill")


@pytest.fixture
def train(tmp_path, folders, one_cpu):
    """train(rows, held_out, **flags) -> output folder, lines of metrics.jsonl."""

    def run(rows, held_out=None, **flags):
        folder = tmp_path / f"run_{run.count}"
        run.count += 1
        path = write_rows(tmp_path / f"train_{run.count}.jsonl", rows)
        defaults = {"model": folders["qwen3"], "dataset": (path,), "output_dir": str(folder)}
        defaults |= {"batch_size": len(rows), "max_steps": 1, "eval_every": 0, "save_every": 0}
        defaults |= {"warmup_steps": 0, "lr_schedule": "constant", "learning_rate": 1e-3}
        if held_out:
            defaults["eval_dataset"] = write_rows(tmp_path / "held_out.jsonl", held_out)
        args = rm.Args(**(defaults | flags))
        run.result = rm.main(args)
        path = Path(args.output_dir) / "metrics.jsonl"  # an ensemble's are in the folders of its members
        return path.parent, read_lines(path) if path.exists() else None

    run.count = 0
    return run


def assert_same_metrics(one, other, *, without=(*TIMES, *PACKING)):
    assert len(one) == len(other)
    for line, wanted in zip(one, other, strict=True):
        assert line.keys() == wanted.keys()
        keys = [key for key in wanted if key not in without]
        assert [line[k] for k in keys] == pytest.approx([wanted[k] for k in keys], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "center_coef, label_smoothing, margins",
    [(0.0, 0.0, None), (0.3, 0.0, None), (0.01, 0.2, (0.5, None, 0.0, 1.5, -1.0))],
    ids=["plain", "centred", "smoothed-margins"],
)
def test_first_step_is_a_plain_loop_over_the_stock_model(
    train, tmp_path, folders, center_coef, label_smoothing, margins
):
    rows = tiny_rows()[:5]
    if margins:
        rows = [row | {"margin": m} for row, m in zip(rows, margins, strict=True)]
    pairs, model = pairs_of(folders["qwen3"], tmp_path, rows), stock(folders["qwen3"])
    losses, rewards = [], []
    for pair, margin in zip(pairs, margins or [0.0] * 5, strict=True):
        chosen, rejected = (stock_reward(model, answer) for answer in pair)
        d = chosen - rejected - (margin or 0.0)
        loss = (1 - label_smoothing) * torch.log1p(torch.exp(-d)) + label_smoothing * torch.log1p(
            torch.exp(d)
        )
        losses.append(loss + center_coef * (chosen + rejected) ** 2)
        rewards.append((chosen.item(), rejected.item()))
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    flags = {"center_coef": center_coef, "label_smoothing": label_smoothing}
    total = sum(len(answer.input_ids) for pair in pairs for answer in pair)
    # One row, rows of four pairs and one, rows of one: the mean is over the pairs of all.
    for budget in (8192, total - 1, 60):
        _, lines = train(rows, max_tokens_per_micro_batch=budget, **flags)
        rewards = np.array(rewards)
        expected = {
            "loss": loss.item(),
            "grad_norm": norm,
            "accuracy": float(np.mean(rewards[:, 0] > rewards[:, 1])),  # without the margin
            "margin": float(np.mean(rewards[:, 0] - rewards[:, 1])),
            "mean_reward": float(rewards.mean()),
            "min_reward": float(rewards.min()),
            "max_reward": float(rewards.max()),
        }
        assert rewards.min() < rewards.max() and expected["min_reward"] < expected["mean_reward"]
        assert {key: lines[1][key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_second_step_reads_the_updated_model_and_the_loss_falls(train):
    _, lines = train(tiny_rows()[:4], max_steps=4, learning_rate=1e-3)
    losses = [line["loss"] for line in lines[1:]]
    assert losses[3] < losses[2] < losses[1] < losses[0]
    assert lines[4]["margin"] > lines[1]["margin"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"max_tokens_per_micro_batch": 128}, id="rows"),
        pytest.param({"share_prompt": True}, id="shared"),
        pytest.param({"share_prompt": True, "max_tokens_per_micro_batch": 128}, id="shared-rows"),
        pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param({"attn": "eager"}, id="eager"),
    ],
)
def test_settings_of_memory_and_speed_do_not_change_the_metrics(train, changes):
    rows, held_out = tiny_rows()[:10], tiny_rows()[20:28]
    flags = {"max_steps": 3, "batch_size": 4, "eval_every": 1, "share_prompt": False}
    _, plain = train(rows, held_out, **flags)
    assert len({line["loss"] for line in plain[1:]}) == 3
    _, lines = train(rows, held_out, **(flags | changes))
    assert_same_metrics(lines, plain)
    ratio = lines[-1]["num_tokens"] / plain[-1]["num_tokens"]
    assert ratio < 0.8 if "share_prompt" in changes else ratio == 1


def test_evaluation_by_hand(train, tmp_path, folders):
    held_out = tiny_rows()[20:32]
    _, lines = train(tiny_rows()[:2], held_out)
    others = pairs_of(folders["qwen3"], tmp_path, held_out)
    rewards = np.array(stock_rewards(folders["qwen3"], others))
    counts = np.array([[answer.trained.sum() for answer in pair] for pair in others])
    alike = np.array([abs(c - r) <= 0.1 * max(c, r) for c, r in counts.tolist()])
    assert alike.any() and not alike.all()
    differences = rewards[:, 0] - rewards[:, 1]
    confidence, right = 1 / (1 + np.exp(-np.abs(differences))), differences > 0
    ece = sum(
        abs(sum(confidence[i] - right[i] for i in range(12) if int((confidence[i] - 0.5) * 20) == n))
        for n in range(10)
    )
    expected = {
        "eval/accuracy": np.mean(right),
        "eval/accuracy_length_matched": np.mean(right[alike]),
        "eval/ties": 0.0,
        "eval/ece": ece / 12,
        "eval/margin": np.mean(differences),
        "eval/length_correlation": np.corrcoef(rewards.flatten(), counts.flatten())[0, 1],
    }
    assert {key: lines[0][key] for key in expected} == pytest.approx(expected, abs=1e-3)
    assert lines[1].keys() >= expected.keys()  # and after the last step


def unpaired_rows(rows):
    return [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
        for row in rows
        for key in ("chosen", "rejected")
    ]


@pytest.mark.parametrize("pairs", [False, True], ids=["unpaired", "taken-apart"])
def test_outcome_step_is_a_plain_loop_over_single_answers(train, tmp_path, folders, pairs):
    rows, held_out = tiny_rows()[:3], tiny_rows()[20:26]
    singles = unpaired_rows(rows)[: None if pairs else 5]  # three good ones, two bad
    answers = [a for pair in pairs_of(folders["qwen3"], tmp_path, rows) for a in pair][: len(singles)]
    model, labels = stock(folders["qwen3"]), [row["label"] for row in singles]
    rewards = torch.stack([stock_reward(model, answer) for answer in answers])
    signs = torch.tensor([1.0 if good else -1.0 for good in labels])
    losses = 0.9 * torch.log1p(torch.exp(-signs * rewards)) + 0.1 * torch.log1p(torch.exp(signs * rewards))
    losses.mean().backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    found, good = rewards.detach(), signs > 0
    expected = {
        "loss": losses.mean().item(),
        "grad_norm": norm,
        "accuracy": (found * signs > 0).float().mean().item(),
        "margin": (found[good].mean() - found[~good].mean()).item(),
        "mean_reward": found.mean().item(),
        "min_reward": found.min().item(),
        "max_reward": found.max().item(),
    }
    flags = {"objective": "outcome", "label_smoothing": 0.1, "batch_size": len(singles)}
    # Held-out pairs are judged as pairs, held-out single answers one by one.
    held_out = held_out if pairs else unpaired_rows(held_out)
    _, lines = train(rows if pairs else singles, held_out, max_tokens_per_micro_batch=100, **flags)
    assert {key: lines[1][key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)
    others = np.array(
        stock_rewards(folders["qwen3"], pairs_of(folders["qwen3"], tmp_path, tiny_rows()[20:26]))
    )
    if pairs:
        assert lines[0]["eval/accuracy"] == pytest.approx(np.mean(others[:, 0] > others[:, 1]))
        assert "eval/auc" not in lines[0]
    else:
        assert lines[0]["eval/accuracy"] == pytest.approx(np.mean([*(others[:, 0] > 0), *(others[:, 1] < 0)]))
        auc = np.mean([[g > b for b in others[:, 1]] for g in others[:, 0]])
        assert lines[0]["eval/auc"] == pytest.approx(auc) and "eval/margin" not in lines[0]


@pytest.mark.parametrize("objective", ["bradley_terry", "outcome"])
def test_every_parameter_moves(train, folders, objective):
    folder, _ = train(tiny_rows()[:3], objective=objective, model=folders["causal"], seed=4)
    before, after = (
        load_file(Path(path) / "model.safetensors") for path in (folders["causal"], folder / "model")
    )
    head = torch.randn(1, 32, generator=torch.Generator().manual_seed(4)) / math.sqrt(33)
    before["score.weight"] = head
    assert after.keys() == before.keys() - {"lm_head.weight"}
    assert all(not torch.equal(after[name], before[name]) for name in after)
    # Rows of the embedding that no token of the data has have no gradient and stay where they are.
    same = (after["model.embed_tokens.weight"] == before["model.embed_tokens.weight"]).all(1)
    assert same.any() and not same.all()


@pytest.mark.parametrize("objective", ["bradley_terry", "outcome"])
def test_saved_model_has_the_rewards_of_transformers_and_an_offset_that_centres_the_training_set(
    train, tmp_path, folders, objective
):
    rows = tiny_rows()[:6]
    flags = {"objective": objective, "max_steps": 3, "learning_rate": 1e-2, "center_coef": 0.0}
    folder, _ = train(rows, **flags)
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"] and config["reward_offset"] != 0
    pairs = pairs_of(folders["qwen3"], tmp_path, rows)
    rewards = np.array(stock_rewards(folder / "model", pairs))  # stock: without the offset
    assert abs(rewards.mean()) > 0.01
    assert rewards.mean() + config["reward_offset"] == pytest.approx(0, abs=1e-3)
    model = loaded(folder / "model", seed=9)
    assert model.config.reward_offset == config["reward_offset"]
    found = rm.pair_rewards(model, pairs, rm.Args(), CPU)
    assert found.numpy() == pytest.approx(rewards + config["reward_offset"], abs=1e-4)
    assert abs(found.mean().item()) < 1e-3


def test_offset_of_a_model_that_is_trained_again_is_not_counted_twice(train, tmp_path, folders):
    rows = tiny_rows()[:6]
    first, _ = train(rows, learning_rate=1e-2)
    again, _ = train(tiny_rows()[6:10], model=str(first / "model"), learning_rate=1e-2)
    pairs = pairs_of(folders["qwen3"], tmp_path, tiny_rows()[6:10])
    offset = json.loads((again / "model" / "config.json").read_text())["reward_offset"]
    assert np.mean(stock_rewards(again / "model", pairs)) + offset == pytest.approx(0, abs=1e-3)


def test_offset_centres_the_model_as_it_is_saved_in_the_dtype_of_the_checkpoint(train, tmp_path):
    rows = tiny_rows()[:8]
    folder, _ = train(rows, model="tiny/sft", learning_rate=1e-4, max_steps=2)
    offset = json.loads((folder / "model" / "config.json").read_text())["reward_offset"]
    rewards = stock_rewards(folder / "model", pairs_of("tiny/sft", tmp_path, rows))
    assert np.mean(rewards) + offset == pytest.approx(0, abs=1e-3)


def test_continued_run_is_the_uninterrupted_one(train):
    rows, flags = tiny_rows()[:10], {"save_every": 2, "batch_size": 4}
    _, whole = train(rows, max_steps=4, **flags)
    folder, _ = train(rows, max_steps=2, **flags)
    shutil.rmtree(folder / "model")
    _, lines = train(rows, max_steps=4, output_dir=str(folder), resume=True, **flags)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert_same_metrics(lines, whole)


# Reports ----------------------------------------------------------------------------------------------------


def answers_of(lengths):
    """Pairs, or single answers, with these numbers of trained tokens behind a prompt of two."""
    return [
        tuple(rm.Sequence(np.zeros(n + 2, np.int32), np.arange(n + 2) > 1) for n in pair) for pair in lengths
    ]


def test_report_by_hand(tmp_path):
    # differences 0.3 (right), -1 (wrong), 2 (right), 0 (tie), 4 (right), -0.5 (wrong), 3 (right), 1.5 (right)
    chosen = [1.3, 0.0, 2.0, 1.0, 4.0, -0.5, 2.0, 1.0]
    rejected = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, -1.0, -0.5]
    kinds = ["a", "a", "a", "b", "b", "b", None, "b"]
    lengths = [(3, 4), (2, 2), (9, 1), (4, 5), (8, 2), (3, 3), (6, 1), (2, 7)]
    rewards = torch.tensor([chosen, rejected]).T
    rows = [{} if kind is None else {"kind": kind} for kind in kinds]
    rm.report(tmp_path, rewards, answers_of(lengths), np.array([[1, 0]] * 8), rows)
    found = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert found["ties"] == 1
    assert found["by_kind"] == {
        "a": {"pairs": 3, "accuracy": pytest.approx(2 / 3)},
        "b": {"pairs": 4, "accuracy": pytest.approx(2.5 / 4)},
    }
    # sizes in order: 0, 0.3 | 0.5, 1 | 1.5, 2 | 3, 4; quartiles between them, by linear interpolation
    edges = [0, 0.45, 1.25, 2.25, 4]
    accuracies = [0.75, 0.0, 1.0, 1.0]
    expected = [
        {"from": a, "to": b, "accuracy": c} for a, b, c in zip(edges[:-1], edges[1:], accuracies, strict=True)
    ]
    assert [line for line in found["by_margin"]] == [
        {key: pytest.approx(value, abs=1e-5) for key, value in line.items()} for line in expected
    ]
    # each confidence has a bin of its own but 3 and 4 (0.953, 0.982), which share the last one
    sure = lambda d: 1 / (1 + math.exp(-d))
    gaps = [1 - sure(0.3), sure(1), 1 - sure(2), 0, sure(0.5), 1 - sure(1.5), 2 - sure(3) - sure(4)]
    assert found["ece"] == pytest.approx(sum(gaps) / 8, abs=1e-5)
    flat = np.array(lengths).flatten()
    correlation = np.corrcoef(rewards.flatten().numpy(), flat)[0, 1]
    assert found["length_correlation"] == pytest.approx(correlation, abs=1e-5)


def test_report_of_single_answers_has_the_length_correlation_alone(tmp_path):
    rewards, lengths = torch.tensor([[1.0], [0.0], [-1.0], [3.0]]), [(3,), (2,), (2,), (9,)]
    rm.report(tmp_path, rewards, answers_of(lengths), np.array([[1], [0], [0], [1]]), [{}] * 4)
    found = json.loads((tmp_path / "report.json").read_text())
    expected = np.corrcoef([1, 0, -1, 3], [3, 2, 2, 9])[0, 1]
    assert found == {"length_correlation": pytest.approx(expected, abs=1e-6)}
    assert (tmp_path / "report.png").stat().st_size > 0


def test_report_of_few_or_equal_differences_is_valid_json(tmp_path):
    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    for n in (1, 3):
        rm.report(
            tmp_path,
            torch.tensor([[1.0, 0.0]] * n),
            answers_of([(3, 4)] * n),
            np.array([[1, 0]] * n),
            [{}] * n,
        )
        json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)


def test_run_with_held_out_pairs_leaves_a_report_of_centred_rewards(train, tmp_path):
    held_out = tiny_rows()[20:32]
    folder, lines = train(tiny_rows()[:4], held_out)
    found = json.loads((folder / "report.json").read_text())
    assert (folder / "report.png").stat().st_size > 0
    assert found["ece"] == pytest.approx(lines[-1]["eval/ece"], abs=1e-4)  # differences know no offset
    pairs = sum(line["pairs"] for line in found["by_kind"].values())
    right = sum(line["pairs"] * line["accuracy"] for line in found["by_kind"].values())
    assert pairs == 12 and right / 12 == pytest.approx(lines[-1]["eval/accuracy"], abs=1e-5)
    assert set(found["by_kind"]) == {row["kind"] for row in held_out}


# Ensembles --------------------------------------------------------------------------------------------------


def test_ensemble_is_a_folder_of_members_that_differ(train, folders, tmp_path):
    rows, held_out = tiny_rows()[:6], tiny_rows()[20:30]
    flags = {"model": folders["causal"], "num_members": 3, "batch_size": 2, "seed": 5}
    train(rows, held_out, **flags)
    folder = tmp_path / "run_0"
    index = json.loads((folder / "ensemble.json").read_text())
    assert index == {"members": [f"member_{n}/model" for n in range(3)]}
    weights = [load_file(folder / name / "model.safetensors") for name in index["members"]]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(weights[one]["score.weight"], weights[other]["score.weight"], atol=0.01)
    seeds = [json.loads((folder / f"member_{n}" / "args.json").read_text())["seed"] for n in range(3)]
    losses = [read_lines(folder / f"member_{n}" / "metrics.jsonl")[1]["loss"] for n in range(3)]
    assert seeds == [5, 6, 7] and len(set(losses)) == 3

    pairs = pairs_of(folders["causal"], tmp_path, held_out)
    members = []  # (K, P, 2), by the stock model and the offset of each
    for name in index["members"]:
        offset = json.loads((folder / name / "config.json").read_text())["reward_offset"]
        members.append(np.array(stock_rewards(folder / name, pairs)) + offset)
    args = rm.Args(model=str(folder))
    models, tokenizer = rm.load_rewards(str(folder), args, CPU)
    assert len(models) == 3 and tokenizer.eos_token_id == END
    for model, expected in zip(models, members, strict=True):
        assert rm.pair_rewards(model, pairs, args, CPU).numpy() == pytest.approx(expected, abs=1e-4)
    differences = np.array(members)[..., 0] - np.array(members)[..., 1]
    votes = differences > 0
    expected = {
        "eval/accuracy_members": votes.mean(),
        "eval/accuracy_mean": (differences.mean(0) > 0).mean(),
        "eval/agreement": np.mean([(votes[a] == votes[b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))]),
        "eval/reward_std": np.std(members, axis=0).mean(),
    }
    found = json.loads((folder / "agreement.json").read_text())
    assert found == pytest.approx(expected, abs=1e-4) and 0 < expected["eval/agreement"]


def test_members_take_the_backbones_in_turn(train, folders, tmp_path):
    backbones = (folders["qwen3"], folders["llama"])
    train(tiny_rows()[:2], num_members=3, member_backbone=backbones)
    kinds = [
        json.loads((tmp_path / "run_0" / f"member_{n}" / "model" / "config.json").read_text())["model_type"]
        for n in range(3)
    ]
    assert kinds == ["qwen3", "llama", "qwen3"]


def test_continued_ensemble_skips_the_members_that_are_finished(train, folders, tmp_path, monkeypatch):
    flags = {"model": folders["causal"], "num_members": 2, "max_steps": 2, "save_every": 1, "batch_size": 2}
    rows, folder = tiny_rows()[:6], tmp_path / "run_0"
    train(rows, **flags)
    whole = read_lines(folder / "member_1" / "metrics.jsonl")
    wanted = load_file(folder / "member_1" / "model" / "model.safetensors")
    # As if it had been stopped in the second member's second step
    shutil.rmtree(folder / "member_1" / "model")
    shutil.rmtree(folder / "member_1" / "checkpoints" / "step_00000002")
    (folder / "ensemble.json").unlink()
    before = (folder / "member_0" / "model" / "model.safetensors").stat().st_mtime_ns
    loads, load_reward_model = [], rm.load_reward_model
    monkeypatch.setattr(
        rm, "load_reward_model", lambda name, *rest: loads.append(name) or load_reward_model(name, *rest)
    )
    train(rows, output_dir=str(folder), resume=True, **flags)
    assert (folder / "member_0" / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert loads.count(folders["causal"]) == 1  # one member is trained, and then both are loaded
    assert_same_metrics(read_lines(folder / "member_1" / "metrics.jsonl"), whole)
    found = load_file(folder / "member_1" / "model" / "model.safetensors")
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    assert len(json.loads((folder / "ensemble.json").read_text())["members"]) == 2


def test_stopped_member_stops_the_ensemble(train, folders, tmp_path, monkeypatch):
    log = rm.Logger.log

    def stopping(self, metrics, *rest):
        self.stopping = True
        return log(self, metrics, *rest)

    monkeypatch.setattr(rm.Logger, "log", stopping)
    train(tiny_rows()[:6], num_members=2, max_steps=3, batch_size=2)
    folder = tmp_path / "run_0"
    assert (folder / "member_0" / "checkpoints").exists() and not (folder / "member_0" / "model").exists()
    assert not (folder / "member_1").exists() and not (folder / "ensemble.json").exists()


# Scores -----------------------------------------------------------------------------------------------------


@pytest.fixture
def score(tmp_path, one_cpu):
    """score(rows, **flags) -> the rows written, and what main returned."""

    def run(rows, **flags):
        path = write_rows(tmp_path / "answers.jsonl", rows)
        output = tmp_path / "answers.scored.jsonl"
        result = rm.main(rm.Args(score=path, output_dir=str(tmp_path / "none"), **flags))
        found = read_lines(flags.get("score_output", output))
        assert not (tmp_path / "none").exists()
        return found, result

    return run


def with_offset(folder, offset):
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reward_offset": offset}))


@pytest.fixture
def judges(folders, tmp_path):
    """An ensemble of two models with offsets 0.5 and -2, and the folder of each."""
    names = []
    for n, (kind, offset) in enumerate((("qwen3", 0.5), ("llama", -2.0))):
        names.append(str(tmp_path / "ensemble" / f"member_{n}" / "model"))
        shutil.copytree(folders[kind], names[-1])
        with_offset(names[-1], offset)
    index = {"members": [f"member_{n}/model" for n in range(2)]}
    (tmp_path / "ensemble" / "ensemble.json").write_text(json.dumps(index))
    return str(tmp_path / "ensemble"), names


def test_score_of_completions_is_the_stock_reward_and_the_offset(score, judges, tmp_path, folders):
    _, names = judges
    rows = tiny_rows()[:3]
    asked = [{"prompt": r["prompt"], "completion": r["chosen"], "kept": n} for n, r in enumerate(rows)]
    expected = [pair[0] + 0.5 for pair in stock_rewards(names[0], pairs_of(names[0], tmp_path, rows))]
    found, result = score(asked, model=names[0])
    assert [row["reward"] for row in found] == pytest.approx(expected, abs=1e-4)
    assert [{k: v for k, v in row.items() if k != "reward"} for row in found] == asked
    assert result == {"mean_reward": pytest.approx(np.mean(expected), abs=1e-4)}


@pytest.mark.parametrize("ensemble", ["mean", "min", "mean_minus_std"])
def test_score_of_an_ensemble_combines_its_members(score, judges, tmp_path, ensemble):
    folder, names = judges
    rows = tiny_rows()[:3]
    text = lambda answer: answer[0]["content"]
    # one, two and one completions; texts answer messages, steps are lines of one answer
    asked = [
        {"prompt": rows[0]["prompt"], "completions": [rows[0]["chosen"]]},
        {"prompt": rows[1]["prompt"], "completions": [text(rows[1]["chosen"]), text(rows[1]["rejected"])]},
        {"prompt": rows[2]["prompt"], "completion": rows[2]["chosen"]},
    ]
    offsets, members = (0.5, -2.0), []
    for name, offset in zip(names, offsets, strict=True):
        pairs = pairs_of(name, tmp_path, rows)
        (a, _), (b, c), (d, _) = stock_rewards(name, pairs)
        members.append([x + offset for x in (a, b, c, d)])
    one, other = np.array(members)
    half = np.abs(one - other) / 2  # the population's standard deviation of two
    middle = (one + other) / 2
    wanted = {"mean": middle, "min": np.minimum(one, other), "mean_minus_std": middle - 0.7 * half}[ensemble]
    output = str(tmp_path / "elsewhere.jsonl")
    found, _ = score(asked, model=folder, reward_aggregation=ensemble, std_coef=0.7, score_output=output)
    assert found[0]["reward"] == pytest.approx([wanted[0]], abs=1e-4)
    assert found[1]["reward"] == pytest.approx(wanted[1:3].tolist(), abs=1e-4)
    assert found[2]["reward"] == pytest.approx(wanted[3], abs=1e-4)
    assert not (tmp_path / "answers.scored.jsonl").exists()


def test_members_with_tokenizers_of_their_own_read_their_own_tokens_or_are_refused(
    score, judges, random_model, tmp_path
):
    folder, names = judges
    AutoTokenizer.from_pretrained(random_model).save_pretrained(names[1])  # 500 of the model's 768 ids
    rows = tiny_rows()[:3]
    asked = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    one, other = ([x for x, _ in stock_rewards(name, pairs_of(name, tmp_path, rows))] for name in names)
    try:
        found, _ = score(asked, model=folder)
    except SystemExit as stop:
        assert stop.code == 2
    else:
        wanted = [(a + 0.5 + b - 2) / 2 for a, b in zip(one, other, strict=True)]
        assert [row["reward"] for row in found] == pytest.approx(wanted, abs=1e-4)


def test_score_does_not_overwrite_its_output(score, folders, tmp_path, capsys, monkeypatch):
    (tmp_path / "answers.scored.jsonl").write_text("precious\n")
    monkeypatch.setattr(rm, "load_reward_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        score([{"prompt": "a", "completion": "b"}], model=folders["qwen3"])
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "answers.scored.jsonl exists" in line
    assert (tmp_path / "answers.scored.jsonl").read_text() == "precious\n"


BAD_ROWS = {
    "no completion": ({"prompt": "a", "answer": "b"}, "row 2: found the columns prompt, answer"),
    "no prompt": ({"completion": "b"}, "row 2: found the columns completion"),
    "empty": ({"prompt": "a", "completion": " "}, "row 2"),
    "a completion that is null": ({"prompt": "a", "completions": ["b", None]}, "row 2"),
    "a text": ("prompt and completion", "row 2"),
    "a number": (3, "row 2"),
    "completions that are null": ({"prompt": "a", "completions": None}, "row 2"),
}


@pytest.mark.parametrize("bad, pattern", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_to_score_end_the_run_with_one_line(score, folders, tmp_path, capsys, bad, pattern):
    with pytest.raises(SystemExit) as stop:
        score([{"prompt": "a", "completion": "b"}, bad], model=folders["qwen3"])
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and pattern in line
    assert not (tmp_path / "answers.scored.jsonl").exists()


# Errors and real data ---------------------------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """refused(pattern, rows, **flags): one line on stderr, exit status 2, no model, nothing written."""

    def run(pattern, rows=None, **flags):
        monkeypatch.setattr(rm, "load_reward_model", lambda *_: pytest.fail("a model was loaded"))
        defaults = {"dataset": (write_rows(tmp_path / "rows.jsonl", rows or tiny_rows()[:4]),)}
        defaults |= {"output_dir": str(tmp_path / "run")}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            rm.main(rm.Args(**(defaults | flags)))
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1, lines
        assert lines[0].startswith("error: ") and re.search(pattern, lines[0]), lines[0]
        assert not (tmp_path / "run").exists()

    return run


@pytest.mark.parametrize(
    "pattern, flags",
    [
        (r"--label-smoothing must lie in", {"label_smoothing": 1.0}),
        (r"--label-smoothing must lie in", {"label_smoothing": -0.1}),
        (r"--eval-fraction must lie in", {"eval_fraction": 1.0}),
        (r"--eval-fraction and --eval-dataset", {"eval_fraction": 0.1, "eval_dataset": "a.jsonl"}),
        (r"--eval-fraction 0\.99 leaves no pair", {"eval_fraction": 0.99}),
        (r"--num-members must be at least 1", {"num_members": 0}),
        (r"--batch-size must be at least 1", {"batch_size": 0}),
        (r"--resume needs --output-dir", {"resume": True, "output_dir": None}),
        (r"--model \./nowhere: no such folder", {"model": "./nowhere"}),
        (r"nowhere\.jsonl: no such file", {"dataset": ("nowhere.jsonl",)}),
        (r"nowhere\.jsonl: no such file", {"score": "nowhere.jsonl"}),
        (r"no pair is left", {"max_length": 5}),
    ],
)
def test_mistakes_end_the_run_with_one_line_before_a_model_is_loaded(refused, pattern, flags):
    refused(pattern, **flags)


@pytest.mark.parametrize(
    "pattern, objective, bad",
    [
        (
            r"row 3: found the columns prompt, chosen; accepted are",
            "bradley_terry",
            {"prompt": "a", "chosen": "b"},
        ),
        (r"row 3: not an object", "bradley_terry", "a text"),
        (
            r"row 3: .*accepted are prompt \+ completion \+ label",
            "outcome",
            {"prompt": "a", "completion": "b"},
        ),
        (r"row 3: .*accepted", "outcome", {"prompt": "a", "completion": "b", "label": "good"}),
        (r"row 3: not an object", "outcome", 3),
    ],
)
def test_bad_rows_end_the_run_with_one_line(refused, pattern, objective, bad):
    rows = unpaired_rows(tiny_rows()[:1]) if objective == "outcome" else tiny_rows()[:2]
    refused(pattern, [*rows, bad], objective=objective)


def test_first_row_that_is_no_object_ends_an_outcome_run_with_one_line(refused):
    for bad in (3, "a text"):
        refused(r"row 1: not an object", [bad], objective="outcome")


def test_pairs_and_single_answers_cannot_be_mixed(refused, tmp_path):
    one = write_rows(tmp_path / "pairs_alone.jsonl", tiny_rows()[:2])
    other = write_rows(tmp_path / "singles.jsonl", unpaired_rows(tiny_rows()[2:4]))
    refused(r"pairs", objective="outcome", dataset=(one, other))


def test_folder_of_a_finished_ensemble_is_left_alone(train, tmp_path, capsys):
    flags = {"num_members": 2, "output_dir": str(tmp_path / "ensemble")}
    train(tiny_rows()[:2], **flags)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(tiny_rows()[2:6], learning_rate=1e-2, **flags)
    assert stop.value.code == 2 and "--resume" in capsys.readouterr().err


def test_gsm8k_solution_pairs_train_a_reward_model(gsm8k, folders, tmp_path, one_cpu):
    methods = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    pairs = []
    for row in read_lines(gsm8k / "example_model_solutions.jsonl"):
        right = [row[method]["solution"] for method in methods if row[method]["is_correct"]]
        wrong = [row[method]["solution"] for method in methods if not row[method]["is_correct"]]
        pairs += [{"question": row["question"], "chosen": c, "rejected": r} for c, r in zip(right, wrong)]
    assert len(pairs) == 967
    path = write_rows(tmp_path / "pairs.jsonl", pairs[:60])
    flags = {
        "model": folders["qwen3"],
        "dataset": (path,),
        "eval_fraction": 0.1,
        "max_steps": 4,
        "batch_size": 8,
        "warmup_steps": 0,
    }
    flags |= {"learning_rate": 1e-3, "lr_schedule": "constant", "save_every": 0, "eval_every": 0}
    metrics = rm.main(rm.Args(output_dir=str(tmp_path / "run"), **flags))
    assert math.isfinite(metrics["loss"]) and 0 <= metrics["eval/accuracy"] <= 1
    assert (tmp_path / "run" / "report.png").stat().st_size > 0
