"""dpo.py against numbers worked by hand from the papers and a loop over log_softmax of the stock model."""

import functools
import itertools
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, read_lines, write_rows
from helpers import assert_continues, assert_same_metrics, calls_of, error_of, models_of, trainer
from samples import CPU, asked, float64, said, stock, tiny_rows, tiny_tokenizer
from test_common import assert_equal_gradients, build
from torch.distributed.fsdp import FSDPModule

import dpo
from common import completion_states, head_settings

LN2, ROWS = math.log(2), tiny_rows("preference_train")
cached = functools.cache(stock)  # for tests that leave the model as it is
pytestmark = pytest.mark.usefixtures("process_group")


# data/dpo_losses.jsonl: beta 0.1; the log-ratios of chosen and rejected are (0, 0), (2, -3), (-4, -1), so the
# margins 0, 0.5, -0.3; of TDPO the KLs are 1 (chosen) and 3 (rejected).
BY_HAND = read_lines(DATA / "dpo_losses.jsonl")
named = lambda case: " ".join(map(str, [case["loss"], *case["settings"].values()]))
every_loss = pytest.mark.parametrize("case", BY_HAND, ids=named)


def kls_of(name, size=1):
    kls = {"chosen_kls": [1.0] * size, "rejected_kls": [3.0] * size}
    return {key: float64(*values) for key, values in kls.items()} if name == "tdpo2" else {}


def loss_of(name, points, beta=0.1, **settings):
    """At log-ratios (chosen, rejected), (B,)."""
    return dpo.LOSSES[name](*float64(*points).T, beta=beta, **kls_of(name, len(points)), **settings)


@every_loss
def test_losses_by_hand_at_the_reference_and_beside_it(case):
    values = loss_of(case["loss"], [(0, 0), (2, -3), (-4, -1)], **case["settings"])
    assert values.tolist() == pytest.approx(case["values"], abs=2e-6)


def test_tdpo2_has_gradient_into_the_kl_of_the_rejected_answer_only():
    kls = {key: value.requires_grad_() for key, value in kls_of("tdpo2").items()}
    loss = dpo.tdpo2_loss(*float64((2, -3)).T, beta=0.1, tdpo_alpha=0.5, **kls).sum()
    chosen, rejected = torch.autograd.grad(loss, list(kls.values()), allow_unused=True)
    # -log sigma(x): slope -sigma(-x) with x = 0.4 here, times beta, times alpha
    assert chosen is None and rejected.item() == pytest.approx(0.5 * 0.1 / (1 + math.exp(0.4)))


# A spread of points, one of them the reference, for the identities.
POINTS = [(0, 0), (2, -3), (-4, -1), (7.5, 7), (-0.5, 12), (-30, -55)]
SWAPPED = [(r, c) for c, r in POINTS]


def test_swapped_labels():
    """DPO plus the margin; robust: DPO of the right labels on average; EXO: the smoothing turned round."""
    margins = float64(*(0.1 * (c - r) for c, r in POINTS))
    assert torch.allclose(loss_of("sigmoid", SWAPPED), loss_of("sigmoid", POINTS) + margins)
    for e in (0.05, 0.2, 0.45):
        right, flipped = (loss_of("robust", points, label_smoothing=e) for points in (POINTS, SWAPPED))
        assert torch.allclose((1 - e) * right + e * flipped, loss_of("sigmoid", POINTS), atol=1e-9)
    swapped = loss_of("exo", SWAPPED, label_smoothing=0.2)
    assert torch.allclose(swapped, loss_of("exo", POINTS, label_smoothing=0.8))
    assert (swapped >= 0).all()  # a KL divergence


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "step_dpo"])
def test_cdpo_is_the_mixture_of_dpo_of_both_labels(name):
    right, flipped = loss_of("sigmoid", POINTS), loss_of("sigmoid", SWAPPED)
    assert not torch.allclose(right, flipped)
    for e in (0.0, 0.1, 0.5):
        mixture = (1 - e) * right + e * flipped
        assert torch.allclose(loss_of(name, POINTS, label_smoothing=e), mixture, atol=1e-9)


@every_loss
def test_losses_of_the_margin_alone_ignore_a_shift_of_both_and_the_others_do_not(case):
    shifted = loss_of(case["loss"], [(c + 40, r + 40) for c, r in POINTS], **case["settings"])
    same = torch.allclose(loss_of(case["loss"], POINTS, **case["settings"]), shifted)
    margin_alone = "sigmoid robust hinge exo discopop sigmoid_norm tdpo2 step_dpo".split()
    assert same == (case["loss"] in margin_alone)


def test_sppo_and_exo_are_0_at_their_targets():
    for beta in (0.01, 0.1, 2.0):
        assert loss_of("sppo", [(0.5 / beta, -0.5 / beta)], beta=beta).item() == pytest.approx(0, abs=1e-20)
    target = [(math.log(4) / 0.1, 0)]  # where sigma(m) = 0.8 are the smoothed labels themselves
    assert loss_of("exo", target, label_smoothing=0.2).item() == pytest.approx(0, abs=1e-12)


def test_preferred_counts_ties_half():
    margins = torch.tensor([3.0, 0.001, 0.0, 1e-5, -1e-5, -0.001, -3.0])
    assert dpo.preferred(margins).tolist() == [1, 1, 0.5, 0.5, 0.5, 0, 0]


def alone(model, sequence):
    """Log-probs (list of scalars) of the trained tokens of one sequence, the shift written out."""
    logits = model(input_ids=torch.tensor(sequence.input_ids[None]).long(), use_cache=False).logits[0]
    logprobs = logits.log_softmax(-1)
    positions = np.flatnonzero(sequence.trained)
    return [logprobs[position - 1, int(sequence.input_ids[position])] for position in positions]


def loop_logps(name, pairs):
    """(P, 2) summed log-probs by `alone`, float64."""
    with torch.no_grad():
        found = [[sum(x.double() for x in alone(cached(name), answer)) for answer in pair] for pair in pairs]
    return torch.tensor(found, dtype=torch.float64)


SHARED = dpo.Args()  # a pair's prompt stands in a row once


def pairs_of(tmp_path, rows, **flags):
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    pairs = dpo.load_pairs(tiny_tokenizer(), path, "train", dpo.Args(dataset=(path,), **flags))
    return [dpo.step_only(pair) for pair in pairs] if flags.get("loss") == "step_dpo" else pairs


def random_pairs(seed, count=3, vocab_size=61):
    """Pairs with prompts of 3 to 6 random tokens and answers of 1 to 7 that differ from the first one on."""
    rng, pairs = np.random.default_rng(seed), []
    for _ in range(count):
        prompt, sequences = rng.integers(3, vocab_size, rng.integers(3, 7)), []
        for first in (3, 4):
            answer = [first, *rng.integers(3, vocab_size, rng.integers(0, 7))]
            input_ids = np.array([*prompt, *answer], np.int32)
            sequences.append(dpo.Sequence(input_ids, np.arange(len(input_ids)) >= len(prompt)))
        pairs.append(dpo.Pair(*sequences))
    return pairs


@pytest.mark.parametrize("chunk_size", [1, 4, 512])
def test_logprobs_and_kls_are_those_of_a_plain_loop_and_so_are_the_gradients(one_cpu, chunk_size):
    pairs = random_pairs(0)
    policy, plain = (build("qwen3", attn, tie_word_embeddings=True) for attn in ("packed", "eager"))
    ref, plain_ref = (build("llama", attn) for attn in ("packed", "eager"))
    batch = dpo.collate_pairs(pairs, SHARED, CPU)
    with torch.no_grad():
        states = completion_states(ref, batch)
    found = dpo.logprobs_and_kls(policy, batch, states, head_settings(ref), chunk_size)
    expected = [[], [], []]
    for sequence in itertools.chain(*pairs):
        ids = torch.tensor(sequence.input_ids).long()
        log_p = plain(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        with torch.no_grad():
            log_q = plain_ref(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        for position in np.flatnonzero(sequence.trained):
            p, q, token = log_p[position - 1], log_q[position - 1], ids[position]
            kl = sum(q[v].exp() * (q[v] - p[v]) for v in range(61))  # of the reference to the policy
            for values, value in zip(expected, (p[token], q[token], kl), strict=True):
                values.append(value)
    expected = [torch.stack(values) for values in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), rel=1e-5, abs=1e-4)
    assert expected[2].min() > 0.1
    weights = torch.randn(2, len(found[0]), generator=torch.Generator().manual_seed(2))
    for logprobs, kls in ((found[0], found[2]), (expected[0], expected[2])):
        (weights[0] * logprobs + weights[1] * kls).sum().backward()
    assert_equal_gradients(*({n: p.grad for n, p in m.named_parameters()} for m in (policy, plain)))


def test_only_what_both_prompts_begin_with_and_neither_answer_trains_is_shared():
    def shared(prompt, other_prompt, *answers):
        both = zip((prompt, other_prompt), answers, strict=True)
        sequences = [(np.array(b + a), np.arange(len(b + a)) >= len(b)) for b, a in both]
        return dpo.shared_prompt(dpo.Pair(*(dpo.Sequence(*s) for s in sequences)), SHARED)

    assert shared([5, 6, 7, 8], [5, 6, 7, 8], [9, 8], [7]) == 4
    assert shared([5, 6, 7, 8], [4, 6, 7, 8], [9, 8], [7]) == 0
    assert shared([5, 6, 7, 8], [5, 6, 3, 8], [9, 8], [7]) == 2
    assert shared([5, 6, 7], [5, 6, 7], [9, 8], [9, 7]) == 3


ASK = asked("What is 1 and 2?")
HH = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: What is 1 and 2?\n\nAssistant:"


def read(row, reader=dpo.read_pair):
    row = reader(row)
    return [row["prompt"], row["chosen"], row["rejected"]]


# Without a prompt: whole words of texts, whole messages of conversations; Anthropic's HH up to the last
# "Assistant:", though the replies begin alike.
@pytest.mark.parametrize("case", read_lines(DATA / "preference_rows.jsonl"))
def test_prompt_and_answers_of_a_row(case):
    assert read(case["row"]) == case["read"]


def test_columns_that_are_not_understood_are_named_beside_those_that_are(tmp_path, capsys):
    for bad in ({"foo": 1, "bar": 2}, {"prompt": "a", "chosen": "b"}):
        line = error_of(lambda bad=bad: pairs_of(tmp_path, [bad]), capsys)
        assert all(name in line for name in bad) and "prompt + chosen + rejected" in line


def test_answers_are_cut_behind_the_first_step_that_differs():
    texts = {"prompt": "p", "chosen": "a\nb\nc", "rejected": "a\nx"}
    talks = {"prompt": ASK, "chosen": said("a\nb\nc"), "rejected": said("a\nx\nc")}
    assert read(texts, dpo.read_step) == ["p", "a\nb", "a\nx"]
    assert read(talks, dpo.read_step) == [ASK, said("a\nb"), said("a\nx")]
    with pytest.raises(ValueError, match="begin the other"):
        dpo.read_step({"prompt": "p", "chosen": "a\nb\nc", "rejected": "a\nb"})


def spans(sequence):
    """The text of the runs of trained tokens."""
    cuts = np.flatnonzero(np.diff(sequence.trained)) + 1
    runs = zip(np.split(sequence.input_ids, cuts), np.split(sequence.trained, cuts), strict=True)
    return [tiny_tokenizer().decode(ids) for ids, trained in runs if trained[0]]


@pytest.mark.parametrize("kind", ["messages", "texts"])
def test_step_dpo_trains_the_first_step_that_differs_and_no_end_token(tmp_path, kind):
    chosen, rejected = "17 + 46 = 63\n63 - 5 = 58\n#### 58", "17 + 46 = 63\n5 + 46 = 51\n#### 51"
    row = {"prompt": ASK, "chosen": said(chosen), "rejected": said(rejected)}
    if kind == "texts":
        row = {"prompt": "17 and 46?\n", "chosen": chosen, "rejected": rejected}
    [pair] = pairs_of(tmp_path, [row], loss="step_dpo")
    steps = [[text.strip("\n") for text in spans(answer)] for answer in pair]
    assert steps == [["63 - 5 = 58"], ["5 + 46 = 51"]]
    for ids, trained in pair:
        assert trained[-1] and tiny_tokenizer().decode(ids[~trained]).rstrip("\n").endswith("17 + 46 = 63")
    [whole] = pairs_of(tmp_path, [row])
    assert all(spans(answer)[0].endswith("<|im_end|>") for answer in whole)


def test_steps_before_those_of_math_step_dpo_are_read_and_not_trained(tmp_path):
    before = "Let's think step by step.\nStep 1: 17 + 46 = 63.\nStep 2:"
    row = {"prompt": "Ella has 17 and 46, and loses 5?", "initial_reason_steps": before, "answer": "58"}
    row |= {"chosen": " 63 - 5 = 58.", "rejected": " 5 + 46 = 51.", "full_chosen": "no", "dataset": "no"}
    [pair] = pairs_of(tmp_path, [row], loss="step_dpo")
    assert [spans(answer) for answer in pair] == [["63 - 5 = 58."], ["5 + 46 = 51."]]  # the space is shared
    for ids, trained in pair:
        asked = tiny_tokenizer().decode(ids[~trained])
        assert asked.endswith(f"<|im_start|>assistant\n{before} ") and row["prompt"] in asked


def test_rows_that_are_no_pairs_cost_the_row_not_the_run_and_are_counted_by_reason(tmp_path, capsys):
    row = lambda chosen, rejected, **more: {"prompt": ASK, "chosen": chosen, "rejected": rejected, **more}
    bad = [row("It is 3.", "It is 3."), row("5", "6", score_chosen=7.0, score_rejected=7.0)]
    bad += [row("3", "4 " * 60), row("", "3"), {"chosen": f"{HH} 3", "rejected": HH}]
    reasons = ["chosen and rejected are the same", "a tie: score_chosen equals"]
    reasons += ["longer than --max-length", "an assistant turn is empty"]  # the last one of two
    # A repeated pair counts once; one the other way round is another.
    rows = [row("3", "4 5 6 7 8")] * 2 + bad + [row("4 5 6 7 8", "3")]
    rows += [row(str(n), "9") for n in range(4)]
    pairs = pairs_of(tmp_path, rows, max_length=60)
    out = capsys.readouterr().out
    for n, reason in enumerate(reasons, 3):
        assert re.search(rf"{1 + (n == 6)} rows dropped, first row {n}: {reason}", out)
    assert len(pairs) == 6 and "6 different pairs" in out and "chosen ones longer in 17%" in out
    assert [spans(answer) for answer in pairs[1]] == [["4 5 6 7 8<|im_end|>"], ["3<|im_end|>"]]


# Runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path, one_cpu):
    """As `trainer` says: 2 steps of 4 pairs."""
    flags = {"beta": 0.1, "learning_rate": 1e-4, "lr_schedule": "constant", "batch_size": 4, "max_steps": 2}
    return trainer(dpo, tmp_path, num_eval=0, max_completion_length=0, **flags)


def test_settings_of_memory_and_speed_do_not_change_the_metrics(train):
    rows, held_out = ROWS[:10], ROWS[20:24]
    flags = {"max_steps": 3, "learning_rate": 1e-3}
    _, plain = train(rows, held_out, **flags)
    losses = [line["loss"] for line in plain[1:]]
    assert losses[0] == pytest.approx(LN2, abs=1e-4) and len(set(losses)) == 3
    for changes in ({"ref": "live"}, {"attn": "eager"}):
        _, lines = train(rows, held_out, **flags, **changes)
        assert_same_metrics(lines, plain, 1e-4, 1e-4, without=("num_tokens", "packing/fill"))
        more = lines[-1]["num_tokens"] / plain[-1]["num_tokens"]  # a prompt stands in a packed row once
        assert more > 1.25 if "attn" in changes else more == 1


@pytest.mark.parametrize("ref", ["cached", "live"])
def test_other_reference_gives_the_rewards_of_both_models_log_probs(train, tmp_path, ref):
    rows, held_out = ROWS[:6], ROWS[20:28]
    pairs, others = pairs_of(tmp_path, rows), pairs_of(tmp_path, held_out)
    flags = {"ref_model": "tiny/base", "batch_size": 6, "learning_rate": 1e-3, "ref": ref}
    folder, lines = train(rows, held_out, max_completion_length=8, **flags)
    policy = loop_logps("tiny/sft", pairs)
    rewards = 0.1 * (policy - loop_logps("tiny/base", pairs))
    margins = rewards[:, 0] - rewards[:, 1]
    loss = sum(math.log1p(math.exp(-margin)) for margin in margins.tolist()) / 6
    assert abs(loss - LN2) > 0.05
    expected = {
        "loss": loss,
        "rewards/chosen": rewards[:, 0].mean().item(),
        "rewards/rejected": rewards[:, 1].mean().item(),
        "rewards/margins": margins.mean().item(),
        "rewards/accuracies": (margins > 0).double().mean().item(),
        "logps/chosen": policy[:, 0].mean().item(),
        "logps/rejected": policy[:, 1].mean().item(),
        "logps/chosen_drift": 0.0,  # from the policy's own start, not from the reference
    }
    assert {key: lines[1][key] for key in expected} == pytest.approx(expected, abs=1e-3)
    drift = lines[2]["logps/chosen"] - lines[1]["logps/chosen"]  # the same pairs in every batch
    assert lines[2]["logps/chosen_drift"] == pytest.approx(drift, abs=1e-3) and abs(drift) > 0.01
    ratios = loop_logps("tiny/sft", others) - loop_logps("tiny/base", others)
    margins = 0.1 * (ratios[:, 0] - ratios[:, 1])
    counts = [[int(answer.trained.sum()) for answer in pair] for pair in others]
    alike = torch.tensor([abs(c - r) <= 0.1 * max(c, r) for c, r in counts])
    assert alike.any() and not alike.all()
    right = (margins > 0).double()
    numbers = [x.mean().item() for x in (right, right[alike], margins, ratios[:, 0])]
    names = ("accuracy", "accuracy_length_matched", "margin", "chosen_log_ratio")
    assert [lines[0][f"eval/{name}"] for name in names] == pytest.approx(numbers, abs=1e-3)
    samples = [sample for sample in read_lines(folder / "samples.jsonl") if sample["step"] == 0]
    assert lines[0]["eval/reward"] == np.mean([sample["right"] for sample in samples])
    assert 0 < lines[0]["eval/mean_length"] < 10 and len(samples) == 8


def test_nothing_is_said_of_pairs_of_equal_length_without_any_nor_of_samples_that_are_not_drawn(train):
    held_out = [{"prompt": ASK, "chosen": "3", "rejected": "It is 4 5 6 7 8."}]
    _, lines = train(ROWS[:4], held_out, max_steps=1)
    assert lines[0].keys() == {"step", "eval/accuracy", "eval/margin", "eval/chosen_log_ratio"}


def test_tdpo_run_takes_the_kls_of_its_answers(train, tmp_path):
    rows = ROWS[:4]
    pairs, kls = pairs_of(tmp_path, rows), []
    with torch.no_grad():
        for sequence in itertools.chain(*pairs):
            ids = torch.tensor(sequence.input_ids).long()[None]
            models = [cached(name) for name in ("tiny/sft", "tiny/base")]
            log_p, log_q = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in models)
            at = [position - 1 for position in np.flatnonzero(sequence.trained)]
            kls.append((log_q[at].exp() * (log_q[at] - log_p[at])).sum().item())
    losses = []
    for k, (chosen, rejected) in enumerate(loop_logps("tiny/sft", pairs) - loop_logps("tiny/base", pairs)):
        margin = 0.1 * float(chosen - rejected) - 0.25 * 0.1 * (kls[2 * k + 1] - kls[2 * k])
        losses.append(math.log1p(math.exp(-margin)))
    flags = {"ref": "live", "ref_model": "tiny/base", "max_steps": 1, "loss": "tdpo2", "tdpo_alpha": 0.25}
    assert train(rows, **flags)[1][0]["loss"] == pytest.approx(np.mean(losses), rel=1e-3)


MODELS = [  # flags, models that are loaded, models that are in memory in a step
    ({}, 1, 1),
    ({"dtype": "bfloat16"}, 1, 1),  # sharded by FSDP2, whose modules refer to each other
    ({"ref_model": "tiny/base", "dtype": "bfloat16"}, 2, 1),
    ({"ref": "live"}, 2, 2),
]


@pytest.mark.parametrize("flags, loads, alive", MODELS, ids=str)
def test_reference_has_left_the_memory_in_a_step_unless_it_is_live(train, monkeypatch, flags, loads, alive):
    models, counts, clip = models_of(monkeypatch, dpo), [], torch.nn.utils.clip_grad_norm_

    def counted(*rest):
        counts.append((len(models), sum(model() is not None for model in models)))
        return clip(*rest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", counted)
    train(ROWS[:4], ROWS[20:24], **flags)
    assert set(counts) == {(loads, alive)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sync_moves_the_live_reference_every_so_many_steps(train, monkeypatch, dtype):
    loaded = calls_of(monkeypatch, dpo, "load_model")
    flags = {"ref": "live", "learning_rate": 1e-3, "sync_ref_every": 2, "sync_ref_alpha": 0.5, "dtype": dtype}
    train(ROWS[:4], max_steps=2, **flags)
    assert isinstance(loaded[0][1], FSDPModule) == (dtype == "bfloat16")
    whole = lambda p: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
    policy, ref = ({n: whole(p) for n, p in model.named_parameters()} for _, model in loaded)
    for name, start_weight in cached("tiny/sft").named_parameters():
        before = start_weight.to(ref[name].dtype).float()  # in which the reference is kept
        expected = ((before + policy[name]) / 2).to(ref[name].dtype)
        assert torch.allclose(ref[name], expected, atol=1e-7, rtol=1e-2 if dtype == "bfloat16" else 1e-5)
        assert not torch.equal(policy[name], start_weight)
    train(ROWS[:4], max_steps=1, **flags)
    ref = dict(loaded[3][1].named_parameters())
    assert all(torch.equal(ref[n], p.to(ref[n].dtype)) for n, p in cached("tiny/sft").named_parameters())


def test_continued_run_with_a_moving_reference_is_the_uninterrupted_one(train):
    moving = {"ref": "live", "sync_ref_every": 1, "sync_ref_alpha": 0.3, "learning_rate": 1e-3}
    assert_continues(train, ROWS[:10], max_steps=3, save_every=2, **moving)


def test_model_in_bfloat16_with_long_answers_starts(train):
    long = "17 + 46 = 63\n" * 60
    rows = [{"prompt": ASK, "chosen": f"{long}#### {n}", "rejected": f"{long}no {n}"} for n in range(4)]
    _, lines = train(rows, dtype="bfloat16")
    assert lines[0]["loss"] == pytest.approx(LN2, abs=0.05)
    assert all(math.isfinite(x) for x in lines[-1].values())


def test_gsm8k_solutions_become_pairs_as_the_page_says_and_train(gsm8k, tmp_path, monkeypatch, one_cpu):
    page = (ROOT / "docs" / "dpo.md").read_text(encoding="utf-8")
    shutil.copy(gsm8k / "example_model_solutions.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n", 1)[1].split("```", 1)[0], {})
    pairs, solutions = read_lines(Path("pairs.jsonl")), {}
    assert len(pairs) == 967  # as the page says
    for row in read_lines(Path("example_model_solutions.jsonl")):
        for found in (value for value in row.values() if isinstance(value, dict)):
            solutions.setdefault((row["question"], found["solution"]), set()).add(found["is_correct"])
    for pair in pairs:
        assert True in solutions[pair["question"], pair["chosen"]]
        assert False in solutions[pair["question"], pair["rejected"]]
    flags = {"dataset": ("pairs.jsonl",), "max_steps": 1, "batch_size": 4, "save_every": 0}
    assert dpo.main(dpo.Args(output_dir="dpo", **flags))["loss"] == pytest.approx(LN2, abs=1e-3)
