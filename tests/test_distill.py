"""distill.py: its divergences, heads in chunks, sampled losses, cache, teacher's answers, runs and errors.

Divergences are held against sums written out over the vocabulary in float64, gradients against the papers'
formulas, finite differences and autograd over whole logits, sampled losses against every sequence that a
small vocabulary has (see test_grpo.py).
"""

import gc
import json
import math
import re
import shutil
import sys
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, start
from safetensors.torch import load_file
from test_common import HEADS, Head, assert_equal, assert_equal_gradients, build, gradients, make_sequences
from test_grpo import Table, distance
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, SmolLM3Config

import distill
from common import collate, completion_states, head_logits, head_settings, kl_full

CLOCK = {"tokens_per_second", "step_time", "time/rollout"}  # what no two runs share
KINDS = {
    "forward_kl": distill.forward_kl,
    "reverse_kl": distill.reverse_kl,
    "jsd": partial(distill.jsd, beta=0.3),
}


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_logits(*shape, seed=0, size=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * size


def written_out(kind, student, teacher, beta=0.3):
    """The divergence of two rows of probabilities, term by term."""
    kl = lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    rows = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        mixture = [beta * b + (1 - beta) * a for a, b in zip(s, t, strict=True)]
        of_kind = {"forward_kl": kl(t, s), "reverse_kl": kl(s, t)}
        of_kind["jsd"] = beta * kl(t, mixture) + (1 - beta) * kl(s, mixture)
        rows.append(of_kind[kind])
    return float64(*rows)


# Divergences ------------------------------------------------------------------------------------------------


def test_divergences_by_hand():
    # p_S = (1/4, 3/4), p_T = (1/2, 1/2), m = (3/8, 5/8) at beta 1/2
    student, teacher = float64([1 / 4, 3 / 4]).log(), float64([1 / 2, 1 / 2]).log()
    log = math.log
    assert distill.forward_kl(student, teacher).item() == pytest.approx(log(4 / 3) / 2)
    assert distill.reverse_kl(student, teacher).item() == pytest.approx(log(1 / 2) / 4 + 3 * log(3 / 2) / 4)
    of_teacher = log((1 / 2) / (3 / 8)) / 2 + log((1 / 2) / (5 / 8)) / 2
    of_student = log((1 / 4) / (3 / 8)) / 4 + 3 * log((3 / 4) / (5 / 8)) / 4
    found = distill.jsd(student, teacher, beta=0.5).item()
    assert found == pytest.approx((of_teacher + of_student) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_are_the_sums_over_the_vocabulary(kind):
    student, teacher = (random_logits(6, 9, seed=seed).log_softmax(-1) for seed in (1, 2))
    found = KINDS[kind](student, teacher)
    assert torch.allclose(found, written_out(kind, student.exp(), teacher.exp()), atol=1e-12)
    assert KINDS[kind](student, student).abs().max() < 1e-12
    swapped = KINDS[kind](teacher, student)
    assert (found - swapped).abs().min() > 1e-3, "the two sides are told apart"


def test_kls_are_those_of_common():
    student, teacher = (random_logits(6, 9, seed=seed).float() for seed in (1, 2))
    logprobs = student.log_softmax(-1), teacher.log_softmax(-1)
    assert_equal(distill.forward_kl(*logprobs), kl_full(teacher, student), 1e-6)
    assert_equal(distill.reverse_kl(*logprobs), kl_full(student, teacher), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_slopes_of_the_values(kind):
    student, teacher = random_logits(3, 5, seed=1).requires_grad_(), random_logits(3, 5, seed=2)
    of_logits = lambda logits: KINDS[kind](logits.log_softmax(-1), teacher.log_softmax(-1))
    assert torch.autograd.gradcheck(of_logits, student)


def test_gradients_of_the_kls_are_the_formulas():
    # of KL(T || S): p_S - p_T; of KL(S || T): p_S (log p_S/p_T - KL); with respect to the student's logits
    logits, teacher = (
        random_logits(4, 7, seed=1).requires_grad_(),
        random_logits(4, 7, seed=2).log_softmax(-1),
    )
    [found] = torch.autograd.grad(distill.forward_kl(logits.log_softmax(-1), teacher).sum(), logits)
    p = logits.softmax(-1).detach()
    assert torch.allclose(found, p - teacher.exp(), atol=1e-12)
    [found] = torch.autograd.grad(distill.reverse_kl(logits.log_softmax(-1), teacher).sum(), logits)
    log_ratio = p.log() - teacher
    wanted = p * (log_ratio - (p * log_ratio).sum(-1, keepdim=True))
    assert torch.allclose(found, wanted, atol=1e-12)


def test_jsd_vanishes_at_its_end_points_like_the_two_kls():
    student, teacher = (random_logits(5, 6, seed=seed, size=1.0).log_softmax(-1) for seed in (1, 2))
    near = 1e-6
    to_forward = distill.jsd(student, teacher, beta=near) / near
    to_reverse = distill.jsd(student, teacher, beta=1 - near) / near
    assert torch.allclose(to_forward, distill.forward_kl(student, teacher), rtol=1e-4)
    assert torch.allclose(to_reverse, distill.reverse_kl(student, teacher), rtol=1e-4)
    values = torch.stack([distill.jsd(student, teacher, beta=b) for b in (1e-4, 0.1, 0.5, 0.9, 1 - 1e-4)])
    assert values[[0, 4]].max() < 2e-3 < values[1:4].min()


def test_jsd_is_symmetric_at_one_half_and_bounded():
    far = float64([0.0, -40.0]), float64([-40.0, 0.0])  # hardly any overlap
    one, other = (x.log_softmax(-1) for x in far)
    found = distill.jsd(one, other, beta=0.5)
    assert found.item() == pytest.approx(math.log(2)) == distill.jsd(other, one, beta=0.5).item()
    student, teacher = (random_logits(5, 6, seed=seed).log_softmax(-1) for seed in (1, 2))
    swapped = distill.jsd(teacher, student, beta=0.3)
    assert torch.allclose(distill.jsd(student, teacher, beta=0.7), swapped)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_both_rule_out_count_nothing(kind):
    logits, teacher = random_logits(3, 5, seed=1), random_logits(3, 5, seed=2)
    without = KINDS[kind](logits.log_softmax(-1), teacher.log_softmax(-1))
    banned = torch.full((3, 1), -math.inf, dtype=torch.float64)
    wider = torch.cat([logits, banned], -1).requires_grad_()
    found = KINDS[kind](wider.log_softmax(-1), torch.cat([teacher, banned], -1).log_softmax(-1))
    assert torch.allclose(found, without)
    [gradient] = torch.autograd.grad(found.sum(), wider)
    assert torch.isfinite(gradient).all()


def test_teacher_that_rules_out_a_token_gives_a_finite_forward_kl():
    student, teacher = float64([0.5, 0.25, 0.25]).log(), float64([0.5, 0.5, 0.0]).log()
    assert distill.forward_kl(student, teacher).item() == pytest.approx(math.log(2) / 2)
    assert distill.reverse_kl(student, teacher).item() > 1e9


# The rest as one bucket -------------------------------------------------------------------------------------


def test_bucket_by_hand():
    logprobs = float64([0.1, 0.4, 0.2, 0.3]).log()
    found = distill.bucketed(logprobs, torch.tensor([[1, 3]]))
    assert torch.allclose(found.exp(), float64([0.4, 0.3, 0.3]))
    assert found.dtype == torch.float64 and found.shape == (1, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_over_buckets_is_never_negative_and_grows_to_the_whole(kind):
    student, teacher = (random_logits(8, 12, seed=seed).log_softmax(-1) for seed in (3, 4))
    whole, values = KINDS[kind](student, teacher), []
    for k in range(1, 13):
        ids = teacher.topk(k).indices
        values.append(KINDS[kind](distill.bucketed(student, ids), distill.bucketed(teacher, ids)))
    values = torch.stack(values)  # (k, 8)
    assert values.min() >= 0 and values[0].min() > 1e-6
    assert (values.diff(dim=0) > -1e-12).all()
    assert torch.allclose(values[-1], whole, atol=1e-14) and (values[5] < whole).all()


def test_without_the_rest_a_kl_of_likely_tokens_may_be_negative():
    # What the bucket is for: D14, a teacher's top tokens without the mass behind them.
    student, teacher = float64([0.6, 0.3, 0.1]).log(), float64([0.5, 0.2, 0.3]).log()
    kept = torch.tensor([[0, 1]])
    assert distill.forward_kl(student.gather(-1, kept), teacher.gather(-1, kept)).item() < 0
    assert distill.forward_kl(*(distill.bucketed(x, kept) for x in (student, teacher))).item() > 0


# Both heads in chunks ---------------------------------------------------------------------------------------


def plain_terms(logits, teacher_logits, targets, divergence, temperature):
    """What `token_divergences` gives, from whole logits (C, V) in float64."""
    softened = [(x / temperature).log_softmax(-1) for x in (logits, teacher_logits)]
    of_targets = [x.log_softmax(-1).gather(-1, targets[:, None])[:, 0] for x in (logits, teacher_logits)]
    return distill.TokenTerms(
        divergences=divergence(*softened),
        logprobs=of_targets[0],
        kl_forward=distill.forward_kl(*softened),
        kl_reverse=distill.reverse_kl(*softened),
        token_agreement=(logits.argmax(-1) == teacher_logits.argmax(-1)).double(),
        teacher_logprobs=of_targets[1],
    )


def whole_logits(model, batch):
    """Logits (C, V) of a model from `test_common`, by plain algebra in float64."""
    weight, bias, scale, softcap = head_settings(model)
    logits = completion_states(model, batch).double() @ weight.double().T
    logits = (logits + (0 if bias is None else bias.double())) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config, scale, softcap, bias, temperature", HEADS)
def test_chunked_heads_and_their_gradient_equal_float64_autograd(
    config, scale, softcap, bias, temperature, kind
):
    batch = collate(make_sequences())
    size = batch.input_ids.shape[1]
    student, teacher = Head(size, bias, size=0.5, **config), Head(size, not bias, size=0.5)
    teacher.hidden.data = teacher.hidden.data.flip(-1)
    view = distill.live_teacher(teacher, batch, 61)
    settings = {"divergence": KINDS[kind], "temperature": temperature, "vocab_size": 61}
    targets = batch.input_ids[0, batch.completion_index]
    teacher_logits = whole_logits(teacher, batch).detach()
    for chunk_size, used in ((1, [0]), (7, [1]), (7, [0, 1]), (1000, [0, 1])):
        found = distill.token_divergences(student, batch, view, **settings, chunk_size=chunk_size)
        logits = whole_logits(student, batch)
        wanted = plain_terms(logits, teacher_logits, targets, KINDS[kind], temperature)
        for x, y in zip(found, wanted, strict=True):
            assert_equal(x, y, 2e-5)
        actual = gradients(student, *(found[i] for i in used))
        assert_equal_gradients(actual, gradients(student, *(wanted[i] for i in used)), 2e-5)
        assert [term.requires_grad for term in found] == [True, True, False, False, False, False]


@pytest.mark.parametrize("family", ["llama_tied", "phi", "cohere", "gemma3", "granite"])
def test_chunked_heads_of_real_architectures(family):
    student, teacher = build(family), build("llama")
    batch = collate(make_sequences())
    settings = {"divergence": distill.reverse_kl, "temperature": 1.0, "vocab_size": 61, "chunk_size": 5}
    found = distill.token_divergences(student, batch, distill.live_teacher(teacher, batch, 61), **settings)
    logits = [
        head_logits(completion_states(model, batch), *head_settings(model)) for model in (student, teacher)
    ]
    wanted = kl_full(logits[0], logits[1].detach())
    assert_equal(found[0], wanted, 1e-4)
    assert_equal_gradients(gradients(student, found[0]), gradients(student, wanted), 1e-4)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_rows_that_pad_a_table_are_ignored():
    batch = collate(make_sequences())
    student, teacher = build("llama"), build("llama", vocab_size=80)
    settings = {"divergence": distill.forward_kl, "temperature": 1.0, "vocab_size": 61}
    before = distill.token_divergences(student, batch, distill.live_teacher(teacher, batch, 61), **settings)
    teacher.lm_head.weight.data[61:] *= 100  # whatever they say
    view = distill.live_teacher(teacher, batch, 61)
    after = distill.token_divergences(student, batch, view, **settings)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    padded = build("llama", vocab_size=70)
    for name, parameter in padded.named_parameters():
        parameter.data[: len(dict(student.named_parameters())[name])] = dict(student.named_parameters())[name]
    found = distill.token_divergences(padded, batch, view, **settings)
    assert_equal(found[0], after[0], 1e-5)
    found[0].sum().backward()
    assert padded.lm_head.weight.grad[61:].abs().max() == 0 < padded.lm_head.weight.grad[:61].abs().max()


def test_row_without_trained_tokens_gives_nothing_and_a_gradient_of_zero():
    student = build("llama")
    batch = collate([distill.FILLER])
    view = distill.live_teacher(build("llama"), batch, 61)
    settings = {"divergence": distill.forward_kl, "temperature": 1.0, "vocab_size": 61}
    terms = distill.token_divergences(student, batch, view, **settings)
    assert [term.shape for term in terms] == [(0,)] * 6
    (terms.divergences.sum() + terms.logprobs.sum()).backward()
    assert student.lm_head.weight.grad.abs().max() == 0


# Sampled losses ---------------------------------------------------------------------------------------------


def sampled_gradient(student, teacher, discount):
    """Mean over all answers that the student may write of the gradient of sum_t -A_t log p_S."""
    ids = list(range(len(student.sequences)))
    index = torch.arange(len(ids)).repeat_interleave(student.lengths)
    logps, teacher_logps = student.token_logps(ids), teacher.token_logps(ids)
    advantages = distill.reverse_kl_advantages(logps, teacher_logps, index, discount=discount)
    assert not advantages.requires_grad
    chances = student.probabilities().detach()[index]
    return student.gradient((chances * -advantages * logps).sum())


@pytest.mark.parametrize("end", [None, 2], ids=["equal-lengths", "an-end"])
def test_policy_gradient_at_discount_0_is_that_of_every_tokens_reverse_kl(end):
    # What comes before a token is held fixed: the chance of a prefix is not differentiated.
    student, teacher = Table(1, end), Table(2, end)
    prefixes = torch.zeros(13, dtype=torch.float64)  # how likely the student is to come to each row
    for chance, rows in zip(student.probabilities().detach().tolist(), student.rows, strict=True):
        for row in rows:
            prefixes[row] += chance
    logprobs = student.logits.log_softmax(-1)
    log_ratio = logprobs - teacher.logits.detach().log_softmax(-1)
    wanted = student.gradient((prefixes * (logprobs.exp() * log_ratio).sum(-1)).sum())
    assert distance(sampled_gradient(student, teacher, 0.0), wanted) < 1e-9


@pytest.mark.parametrize("end", [None, 2], ids=["equal-lengths", "an-end"])
def test_policy_gradient_at_discount_1_is_that_of_the_reverse_kl_of_whole_answers(end):
    student, teacher = Table(1, end), Table(2, end)
    log_ratio = student.probabilities().log() - teacher.probabilities().log().detach()
    wanted = student.gradient((student.probabilities() * log_ratio).sum())
    assert distance(sampled_gradient(student, teacher, 1.0), wanted) < 1e-9
    assert distance(sampled_gradient(student, teacher, 0.0), wanted) > 0.01


def test_advantages_by_hand():
    logps, teacher_logps = float64(-1, -2, -3, -1), float64(-2, -1, -1, -1.5)
    index = torch.tensor([0, 0, 0, 1])  # log-ratios -1, 1, 2 and -0.5
    found = distill.reverse_kl_advantages(logps, teacher_logps, index, discount=0.5)
    assert found.tolist() == [-1 + 0.5 * (1 + 0.5 * 2), 1 + 0.5 * 2, 2, -0.5]
    found = distill.reverse_kl_advantages(logps, teacher_logps, index, discount=0.0)
    assert found.tolist() == [-1, 1, 2, -0.5]


# Mode seeking and mode covering -----------------------------------------------------------------------------


def fit(kind):
    """The bump, of all means and widths on a grid, that is closest to two bumps on 41 places: mean, width."""
    places = torch.arange(41, dtype=torch.float64) - 20
    means, widths = (x.flatten()[:, None] for x in torch.meshgrid(places, 0.25 * places[21:], indexing="ij"))
    bump = lambda mean, width: (-((places - mean) ** 2) / (2 * width**2)).log_softmax(-1)
    teacher = torch.logaddexp(bump(-8, 2) + math.log(0.6), bump(8, 2) + math.log(0.4))
    students = bump(means, 2 * widths)
    best = kind(students, teacher.expand_as(students)).argmin()
    return means[best].item(), 2 * widths[best].item()


def test_forward_kl_covers_both_modes_and_reverse_kl_seeks_one():
    # The moments of the mixture: mean 0.6 x -8 + 0.4 x 8 = -1.6, variance 4 + 64 - 1.6^2, so 8.1 wide, about
    # which the edge of the places cuts the bump; and the higher of the two bumps.
    mean, width = fit(distill.forward_kl)
    assert -4 < mean < 0 and 7.5 < width
    assert fit(distill.reverse_kl) == (-8, 2)
    assert fit(partial(distill.jsd, beta=0.01))[1] > 7.5
    assert fit(partial(distill.jsd, beta=0.99)) == (-8, 2)


# Short runs -------------------------------------------------------------------------------------------------


def tiny_rows(name="sft_train", count=48):
    """The first rows of a data set of tiny/, of conversations those with a single answer."""
    lines = (ROOT / "tiny" / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    one = lambda row: [m["role"] for m in row.get("messages", ())].count("assistant") < 2
    return [row for row in rows if one(row)][:count]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def flags_of(tmp_path):
    """flags_of(**changes): flags of 2 steps on 48 rows of tiny/; tiny/base is the student of tiny/sft."""
    prompts = write_rows(tmp_path / "prompts.jsonl", tiny_rows("prompts_train"))
    rows, held_out = tiny_rows(), tiny_rows("sft_eval", 4)
    defaults = {"dataset": (write_rows(tmp_path / "train.jsonl", rows),), "prompt_dataset": prompts}
    defaults |= {"eval_dataset": write_rows(tmp_path / "eval.jsonl", held_out), "model": "tiny/base"}
    defaults |= {"cache_dir": str(tmp_path / "cache"), "max_completion_length": 12, "batch_size": 8}
    defaults |= {
        "max_steps": 2,
        "eval_every": 0,
        "save_every": 0,
        "warmup_steps": 0,
        "lr_schedule": "constant",
    }
    return lambda **changes: defaults | changes


@pytest.fixture
def train(tmp_path, flags_of, one_cpu):
    """train(**flags) -> output folder, lines of metrics.jsonl behind step 0, which is train.start."""

    def run(**flags):
        folder = Path(flags.setdefault("output_dir", str(tmp_path / f"run_{run.count}")))
        run.count += 1
        distill.main(distill.Args(**flags_of(**flags)))
        run.start, *lines = read_lines(folder / "metrics.jsonl")
        return folder, lines

    run.count = 0
    return run


def assert_same_metrics(one, other, rel=1e-5, abs_=1e-6, without=()):
    assert len(one) == len(other)
    for line, wanted in zip(one, other, strict=True):
        assert line.keys() == wanted.keys()
        for key in wanted.keys() - CLOCK - {"packing/fill"} - set(without):
            assert line[key] == pytest.approx(wanted[key], rel=rel, abs=abs_), (key, wanted["step"])


def stock_step(tokens, flags, divergence=distill.forward_kl):
    """Loss and gradient norm of the sequences `tokens` (ids, trained) under the stock models, token mean."""
    args = distill.Args(**flags)
    models = [
        AutoModelForCausalLM.from_pretrained(ROOT / name, dtype=torch.float32).eval()
        for name in (args.model, args.teacher)
    ]
    losses = []
    for ids, trained in tokens:
        ids = torch.as_tensor(np.asarray(ids)).long()
        logits, teacher_logits = (model(input_ids=ids[None]).logits[0, :-1].double() for model in models)
        targets, kept = ids[1:], torch.as_tensor(np.asarray(trained))[1:].bool()
        terms = plain_terms(
            logits[kept], teacher_logits[kept].detach(), targets[kept], divergence, args.kd_temperature
        )
        losses.append(terms[0] * args.kd_temperature**2 - args.ce_coef * terms[1])
    loss = torch.cat(losses).mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in models[0].parameters() if p.grad is not None])
    return loss.item(), gradient.norm().item()


def encoded(rows):
    """Messages as tiny's template lays them out: token ids, and which of them are trained."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "sft")
    found = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(
            row["messages"][:-1], tokenize=False, add_generation_prompt=True
        )
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answer = row["messages"][-1]["content"] + "<|im_end|>"
        ids = prompt_ids + tokenizer(answer, add_special_tokens=False).input_ids
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        rest = tokenizer(text, add_special_tokens=False).input_ids[len(ids) :]  # a line break
        found.append(
            (ids + rest, [0] * len(prompt_ids) + [1] * (len(ids) - len(prompt_ids)) + [0] * len(rest))
        )
    return found


STEPS = {
    "forward_kl": ({}, distill.forward_kl),
    "reverse_kl": ({"divergence": "reverse_kl"}, distill.reverse_kl),
    "jsd": ({"divergence": "jsd", "jsd_beta": 0.9}, partial(distill.jsd, beta=0.9)),
    "softened": ({"kd_temperature": 3.0, "ce_coef": 0.5}, distill.forward_kl),
}


@pytest.mark.parametrize("name", STEPS)
def test_loss_and_gradient_of_a_step_are_those_of_the_stock_models(train, flags_of, name):
    flags, divergence = STEPS[name]
    _, [line] = train(max_steps=1, order="given", eval_dataset=None, **flags)
    loss, grad_norm = stock_step(encoded(tiny_rows(count=8)), flags_of(**flags), divergence)
    assert line["loss"] == pytest.approx(loss, rel=1e-4)
    assert line["grad_norm"] == pytest.approx(grad_norm, rel=1e-3)
    if name in ("forward_kl", "reverse_kl"):
        assert line[f"kl_{name[:7]}"] == pytest.approx(line["loss"], rel=1e-5)


def test_temperature_squared_is_a_factor_of_the_loss(train):
    _, [with_factor] = train(max_steps=1, eval_dataset=None, kd_temperature=3.0)
    _, [without] = train(max_steps=1, eval_dataset=None, kd_temperature=3.0, kd_temperature_squared=False)
    assert with_factor["loss"] == pytest.approx(9 * without["loss"], rel=1e-6)
    assert with_factor["kl_forward"] == pytest.approx(without["loss"], rel=1e-5), "metrics have no factor"


def test_gradient_keeps_its_size_with_the_temperature_squared():
    # Hinton et al., Eq. 4: at high T the gradient goes to (z_S - z_T) / (V T^2), of centred logits z.
    logits, teacher = random_logits(5, 8, seed=1).requires_grad_(), random_logits(5, 8, seed=2)
    temperature = 1e4
    divergence = distill.forward_kl(*((x / temperature).log_softmax(-1) for x in (logits, teacher)))
    [found] = torch.autograd.grad(temperature**2 * divergence.sum(), logits)
    centred = [x - x.mean(-1, keepdim=True) for x in (logits.detach(), teacher)]
    assert torch.allclose(found, (centred[0] - centred[1]) / 8, atol=1e-3)


def test_held_out_metrics_are_those_of_the_stock_models(train, flags_of):
    train(max_steps=1)
    held_out = encoded(tiny_rows("sft_eval", 4))
    for key, divergence in {"kl_forward": distill.forward_kl, "kl_reverse": distill.reverse_kl}.items():
        loss, _ = stock_step(held_out, flags_of(), divergence)
        assert train.start[f"eval/{key}"] == pytest.approx(loss, rel=1e-4)
    assert train.start["eval/ce"] > 0.9 > 0.3 > train.start["eval/teacher_ce"] > 0
    assert train.start["eval/teacher_greedy_accuracy"] > train.start["eval/greedy_accuracy"]


def test_student_that_is_its_teacher_has_nothing_to_learn(train):
    _, lines = train(model="tiny/sft", keep_layers=(0, 1, 2, 3), learning_rate=1e-6)
    assert train.start["eval/kl_forward"] < 1e-6 and train.start["eval/token_agreement"] == 1
    assert train.start["eval/ce"] == pytest.approx(train.start["eval/teacher_ce"], rel=1e-6)
    assert lines[0]["loss"] == pytest.approx(0, abs=1e-6)
    assert train.start["eval/accuracy"] == train.start["eval/teacher_accuracy"]


def test_a_few_steps_bring_the_student_nearer(train):
    for flags in ({}, {"mode": "on_policy"}, {"divergence": "reverse_kl", "cache_top_k": 4}):
        _, lines = train(max_steps=12, learning_rate=1e-3, **flags)
        assert lines[-1]["eval/kl_forward"] < 0.9 * train.start["eval/kl_forward"], flags


OBJECTIVES = {
    "token_kd": {"divergence": "jsd", "loss_agg": "seq_mean_token_mean"},
    "on_policy": {"mode": "on_policy", "on_policy_fraction": 1.0},
    "policy_gradient": {"mode": "on_policy", "on_policy_loss": "policy_gradient", "kl_discount": 0.9},
    "mixture": {"mode": "on_policy", "ce_coef": 0.5, "divergence": "reverse_kl"},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_memory_flags_change_nothing(train, name):
    _, lines = train(**OBJECTIVES[name], eval_dataset=None)
    for flags in (
        {"max_tokens_per_micro_batch": 100, "generation_batch_size": 3},
        {"max_tokens_per_micro_batch": 4096, "gradient_checkpointing": True},
    ):
        _, others = train(**OBJECTIVES[name], eval_dataset=None, **flags)
        assert_same_metrics(others, lines, rel=1e-4, abs_=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        {"mode": "on_policy", "on_policy_fraction": 0.5},
        {"mode": "seq_kd", "answers_per_prompt": 1},
        {"cache_top_k": 5, "keep_layers": (1, 2)},
    ],
    ids=lambda flags: flags.get("mode", "cache"),
)
def test_continued_run_equals_one_that_never_stopped(train, flags, tmp_path):
    flags = flags | {"max_steps": 4, "save_every": 2, "eval_every": 2}
    whole, lines = train(**flags)
    part, _ = train(**flags, output_dir=str(tmp_path / "part"))
    for path in (part / "checkpoints").glob("step_00000004"):
        path.rename(tmp_path / "gone")
    train(**flags, output_dir=str(part), resume=True)
    continued = read_lines(part / "metrics.jsonl")[1:]
    strip = lambda line: {key: value for key, value in line.items() if key not in CLOCK}
    assert [strip(line) for line in continued] == [strip(line) for line in lines]
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole, part))
    assert all(torch.equal(one[name], other[name]) for name in one)


# The student ------------------------------------------------------------------------------------------------


def test_student_keeps_the_layers_that_were_named(train):
    folder, _ = train(model="tiny/sft", keep_layers=(0, 3), max_steps=1, learning_rate=0.0)
    whole = AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "sft", dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    assert student.config.num_hidden_layers == len(student.config.layer_types) == 2
    ids = torch.arange(5, 15)[None]
    del whole.model.layers[1:3]
    whole.config.num_hidden_layers = 2
    assert torch.equal(student(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)


def tiny_config(kind, **changes):
    """A configuration of 4 layers; logits differ by more than rounding where a layer is another."""
    settings = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    return kind(**settings | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | changes)


def random_layers(folder, config):
    """A folder with a random model of a configuration."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def test_lists_of_a_config_that_go_layer_by_layer_are_pruned(tmp_path):
    config = tiny_config(SmolLM3Config, no_rope_layers=[1, 0, 0, 1])
    source = random_layers(tmp_path / "whole", config)
    args = distill.Args(model=source, keep_layers=(0, 2))
    path = distill.prune_layers(args, tmp_path / "student")
    student, whole = (AutoModelForCausalLM.from_pretrained(name).eval() for name in (path, source))
    assert student.config.no_rope_layers == [1, 0]
    ids = torch.arange(5, 30)[None]
    del whole.model.layers[3], whole.model.layers[1]  # each knows for itself whether it has positions
    whole.config.num_hidden_layers = 2
    wanted = whole(ids, use_cache=False).logits
    assert torch.allclose(student(ids, use_cache=False).logits, wanted, atol=1e-5)


def test_student_that_does_not_read_back_as_what_was_kept_is_an_error(tmp_path, capsys):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    experts |= {"shared_expert_intermediate_size": 16, "mlp_only_layers": [3]}  # layers by their numbers
    source = random_layers(tmp_path / "whole", tiny_config(Qwen2MoeConfig, **experts))
    with pytest.raises(SystemExit) as stop:
        distill.prune_layers(distill.Args(model=source, keep_layers=(0, 3)), tmp_path / "student")
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "a config of qwen2_moe tells layers apart in a way not known" in line
    assert not (tmp_path / "student").exists()


# Chat templates ---------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """folders(student, teacher): copies of tiny/base and tiny/sft whose tokens are not ChatML's.

    Both arguments say whether that one has a chat template, or are one; without, it has a base model's EOS.
    """

    def copy(name, template):
        folder = tmp_path / f"{name}_{len(list(tmp_path.glob('*_*')))}"
        shutil.copytree(ROOT / "tiny" / name, folder)
        for path in [*folder.glob("*.json"), *folder.glob("*.jinja")]:
            path.write_text(path.read_text().replace("<|im_", "<|turn_"))
        path = folder / "chat_template.jinja"
        if isinstance(template, str):
            path.write_text(template)
        elif not template:
            path.unlink()
            for file, change in (
                ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
                ("generation_config.json", {"eos_token_id": 0}),
            ):
                settings = json.loads((folder / file).read_text())
                (folder / file).write_text(json.dumps(settings | change))
        return str(folder)

    return lambda student, teacher: {"model": copy("base", student), "teacher": copy("sft", teacher)}


def saved_template(folder):
    return AutoTokenizer.from_pretrained(folder / "model").chat_template


def test_base_student_takes_the_template_of_its_teacher(train, folders, capsys):
    _, [usual] = train(**folders(True, True), max_steps=1)
    assert "template" not in capsys.readouterr().out
    flags = folders(False, True)
    folder, [line] = train(**flags, max_steps=1)
    told = f"{flags['model']} has no chat template: using that of {flags['teacher']}"
    assert told in capsys.readouterr().out
    assert_same_metrics([line], [usual], rel=0, abs_=0)
    assert saved_template(folder) == AutoTokenizer.from_pretrained(flags["teacher"]).chat_template
    ends = json.loads((folder / "model" / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.convert_tokens_to_ids("<|turn_end|>") in np.atleast_1d(ends)


def test_base_teacher_takes_the_template_of_its_student(train, folders, capsys):
    train(**folders(True, True), max_steps=1)
    usual, flags = train.start, folders(True, False)
    train(**flags, max_steps=1)
    told = f"{flags['teacher']} has no chat template: using that of {flags['model']}"
    assert told in capsys.readouterr().out
    assert train.start == usual


@pytest.mark.parametrize("mode", ["token_kd", "on_policy"])
def test_two_base_models_take_chatml_with_or_without_held_out_data(train, folders, mode):
    flags = folders(False, False) | {"mode": mode, "max_steps": 1}
    (folder, [line]), (_, [without]) = train(**flags), train(**flags, eval_dataset=None)
    assert saved_template(folder) == distill.CHATML
    assert without["loss"] == pytest.approx(line["loss"], rel=1e-6)


def test_template_that_is_not_the_teachers_is_warned_of(train, folders, capsys):
    flags = folders(distill.CHATML.replace("<|im_", "<|turn_").replace("\\n", " "), True)
    train(**flags, max_steps=1, eval_dataset=None)
    told = f"warning: {flags['teacher']} is asked in {flags['model']}'s chat template, which is not its own"
    assert told in capsys.readouterr().out


def test_default_student_is_a_part_of_its_teacher():
    assert distill.Args().keep_layers == (0, 1)
    assert distill.Args(teacher="tiny/base").keep_layers is None
    assert distill.Args(model="tiny/base").keep_layers is None


# The cache --------------------------------------------------------------------------------------------------


def test_cache_of_all_tokens_equals_the_live_teacher(train, capsys):
    flags = {"max_steps": 4, "eval_every": 2, "kd_temperature": 1.5, "ce_coef": 0.3, "divergence": "jsd"}
    _, live = train(**flags)
    start = train.start
    _, cached = train(**flags, cache_top_k=768)
    assert (
        "6,148 bytes each" in capsys.readouterr().out
    )  # 768 log-probs and ids of 4 bytes, and the token's own
    # The cache adds up the vocabulary in another order, the likeliest first. The gradient's norm, of a sum in
    # which much cancels out, shows more of that rounding than the loss does.
    assert_same_metrics([train.start, *cached], [start, *live], rel=1e-6, abs_=1e-6, without=["grad_norm"])
    norms = [[line["grad_norm"] for line in lines] for lines in (cached, live)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    _, more = train(**flags, cache_top_k=100_000)
    assert_same_metrics(more, cached, rel=0, abs_=0)


def test_kl_of_every_cache_is_positive_and_grows_with_it(train):
    _, lines = train(max_steps=1, learning_rate=0.0)
    kls = []
    for k in (1, 5, 100, 768):
        train(max_steps=1, learning_rate=0.0, cache_top_k=k)
        kls.append([train.start["eval/kl_forward"], train.start["eval/kl_reverse"]])
        for key in ("eval/ce", "eval/teacher_ce", "eval/token_agreement"):  # do not depend on k
            assert train.start[key] == pytest.approx(lines[0][key], rel=1e-5)
    kls = np.array(kls)
    assert kls.min() > 0 and (np.diff(kls, axis=0) > -1e-6).all() and kls[0, 0] < 0.99 * kls[-1, 0]
    assert kls[-1] == pytest.approx([lines[0]["eval/kl_forward"], lines[0]["eval/kl_reverse"]], rel=1e-5)


def calls_of(monkeypatch, name):
    """The calls of a function of distill.py from now on."""
    calls, function = [], getattr(distill, name)
    spy = lambda *arguments, **options: calls.append(arguments) or function(*arguments, **options)
    monkeypatch.setattr(distill, name, spy)
    return calls


def test_cache_is_written_once_and_found_by_what_it_depends_on(train, monkeypatch, tmp_path):
    flags = {"cache_top_k": 5, "eval_dataset": None, "max_tokens_per_micro_batch": 8192}
    stored, loaded = calls_of(monkeypatch, "store_row"), calls_of(monkeypatch, "load_model")
    _, lines = train(**flags)
    assert len(stored) == len(list((tmp_path / "cache").iterdir())) == 1
    _, again = train(**flags)
    assert len(stored) == 1 and [name for name, *_ in loaded] == ["tiny/base", "tiny/sft", "tiny/base"]
    assert_same_metrics(again, lines, rel=0, abs_=0)
    train(**flags, max_steps=6)  # the other sequences of the data
    assert len(stored) == 2 and len(list((tmp_path / "cache").iterdir())) == 1
    for count, changes in enumerate(
        ({"cache_top_k": 6}, {"kd_temperature": 2.0}, {"max_length": 60}, {"teacher": "tiny/base"}), 2
    ):
        train(**(flags | changes))
        assert len(list((tmp_path / "cache").iterdir())) == count, changes


def test_run_that_finds_its_cache_made_by_a_faster_one_fills_that(train, monkeypatch, tmp_path):
    rename = Path.rename

    def late(path, target):
        if path.is_dir() and path.name.startswith("teacher_"):
            shutil.copytree(path, target)  # the other run
        return rename(path, target)

    _, lines = train(cache_top_k=5)
    monkeypatch.setattr(distill.Path, "rename", late)
    _, others = train(cache_top_k=5, cache_dir=str(tmp_path / "shared"))
    assert_same_metrics(others, lines, rel=0, abs_=0)
    assert not [path for path in (tmp_path / "shared").iterdir() if "partial" in path.name]


def test_files_of_the_teacher_are_read_once_for_two_caches(train, monkeypatch, tmp_path):
    distill.teacher_digest.cache_clear()
    calls = calls_of(monkeypatch, "model_digest")
    train(cache_top_k=5)
    assert len(list((tmp_path / "cache").iterdir())) == 2 and len(calls) == 1


KILL = """
import os, signal
import distill, tyro
distill.BLOCK = 8
function, calls = distill.{name}, []

def spy(*arguments, **options):
    calls.append(arguments)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **options)

distill.{name} = spy
distill.main(tyro.cli(distill.Args))
"""


def command_line(flags):
    words = []
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


@pytest.mark.parametrize("mode", ["token_kd", "seq_kd"])
def test_kill_loses_no_more_than_a_block_of_the_teachers_work(train, flags_of, monkeypatch, tmp_path, mode):
    flags = {"max_steps": 6, "eval_dataset": None}
    flags |= {"cache_top_k": 5} if mode == "token_kd" else {"mode": "seq_kd", "answers_per_prompt": 1}
    name = "store_row" if mode == "token_kd" else "roll_out"
    arguments = command_line(flags_of(**flags, output_dir=str(tmp_path / "killed")))
    done = start(sys.executable, "-c", KILL.format(name=name), *arguments, cwd=ROOT)
    assert done.returncode == -9, done.stderr
    monkeypatch.setattr(distill, "BLOCK", 8)
    calls = calls_of(monkeypatch, name)
    _, lines = train(**flags)
    assert len(calls) == 6 - 2  # 48 rows are 6 blocks, of which 2 were safe
    _, others = train(**flags, cache_dir=str(tmp_path / "fresh"))
    assert_same_metrics(lines, others, rel=0, abs_=0)


# The student's own answers ----------------------------------------------------------------------------------


def test_batch_mixes_samples_and_data_in_the_ratio_that_was_asked_for(train, monkeypatch):
    batches = []
    collate_row = distill.collate
    monkeypatch.setattr(distill, "collate", lambda s, device: batches.append(s) or collate_row(s, device))
    sampled = calls_of(monkeypatch, "roll_out")
    flags = {"mode": "on_policy", "on_policy_fraction": 0.25, "max_steps": 3, "order": "given"}
    train(**flags, eval_dataset=None, max_tokens_per_micro_batch=4096)
    assert [len(prompts) for _, _, prompts, *_ in sampled] == [2, 2, 2]
    asked = [json.dumps(prompt.row["prompt"]) for _, _, prompts, *_ in sampled for prompt in prompts]
    assert asked == [json.dumps(row["prompt"]) for row in tiny_rows("prompts_train", 6)]
    data = encoded(tiny_rows(count=18))
    rows = [[s.input_ids.tolist() for s in batch] for batch in batches if len(batch) == 8]
    assert len(rows) == 3
    for n, row in enumerate(rows):
        assert [ids in row for ids, _ in data] == [6 * n <= i < 6 * n + 6 for i in range(18)]


def test_given_tokens_alone_have_a_likelihood_term(train, monkeypatch):
    seen = calls_of(monkeypatch, "token_losses")
    flags = {
        "mode": "on_policy",
        "on_policy_fraction": 0.5,
        "ce_coef": 2.0,
        "on_policy_loss": "policy_gradient",
    }
    train(**flags, max_steps=1, eval_dataset=None, max_tokens_per_micro_batch=4096)
    [(terms, given, index, args)] = seen
    losses = distill.token_losses(terms, given, index, args)
    assert given.sum() > 0 < (~given).sum()
    assert torch.equal(losses[given], (terms.divergences - 2 * terms.logprobs)[given])
    wanted = -(terms.teacher_logprobs - terms.logprobs.detach()) * terms.logprobs
    assert torch.equal(losses[~given], wanted[~given])


def test_loss_of_a_step_on_samples_is_that_of_the_stock_models(train, monkeypatch):
    rolled, roll_out = [], distill.roll_out

    def spy(model, tokenizer, prompts, *rest, **options):
        found = roll_out(model, tokenizer, prompts, *rest, **options)
        rolled.append((any(p.requires_grad for p in model.parameters()), options["seed"], found))
        return found

    monkeypatch.setattr(distill, "roll_out", spy)
    flags = {"mode": "on_policy", "on_policy_fraction": 0.25, "on_policy_loss": "policy_gradient"}
    flags |= {"kl_discount": 0.5, "ce_coef": 0.5, "order": "given", "learning_rate": 0.0}
    _, lines = train(**flags, eval_dataset=None)
    (trained_one, seed, sampled), (_, next_seed, _) = rolled
    assert trained_one and seed != next_seed, "the student samples, anew at every step"
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(ROOT / name, dtype=torch.float32).eval()
        for name in ("tiny/base", "tiny/sft")
    )

    def logprobs_of(model, ids, trained):
        """Of all tokens (C, V) and of those that are there (C,)."""
        ids, kept = torch.tensor(ids), torch.tensor(trained[1:]).bool()
        rows = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)[kept]
        return rows, rows.gather(-1, ids[1:][kept][:, None])[:, 0]

    total = count = 0
    with torch.no_grad():
        for given in encoded(tiny_rows(count=6)):  # 6 of 8 sequences are the data's
            (s, own), (t, _) = logprobs_of(student, *given), logprobs_of(teacher, *given)
            total += ((t.exp() * (t - s)).sum(-1) - 0.5 * own).sum()
            count += len(own)
        for completion in sampled:
            ids, trained = completion.input_ids.tolist(), completion.trained.tolist()
            own, theirs = (logprobs_of(model, ids, trained)[1] for model in (student, teacher))
            for t in range(len(own)):
                advantage = sum(0.5 ** (u - t) * (theirs[u] - own[u]) for u in range(t, len(own)))
                total -= advantage * own[t]
            count += len(own)
    assert len(sampled) == 2
    assert lines[0]["loss"] == pytest.approx((total / count).item(), rel=1e-4)


def test_epoch_counts_passes_over_what_a_mode_goes_through(train):
    _, lines = train(eval_dataset=None)  # 8 of 48 sequences a step
    assert [line["epoch"] for line in lines] == pytest.approx([8 / 48, 16 / 48])
    _, lines = train(mode="on_policy", on_policy_fraction=0.25, eval_dataset=None)  # 2 of 48 prompts
    assert [line["epoch"] for line in lines] == pytest.approx([2 / 48, 4 / 48])


def test_sampled_token_that_pads_the_table_is_not_trained():
    prompt = distill.Prompt([5, 6], {})
    completion = distill.Completion(prompt, [7, 800, 8], np.zeros(3), "", True)
    found = distill.as_sequence(completion, 768)
    assert found.input_ids.tolist() == [5, 6, 7, 800, 8]
    assert found.trained.tolist() == [False, False, True, False, True]


# The teacher's answers --------------------------------------------------------------------------------------

REWARDS = """
def right(completions, answer, **columns):
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [None if a is None else float(t.split("####")[-1].strip() == a) for t, a in zip(texts, answer)]


def short(completions, **columns):
    return [1.0] * (len(completions) - 1)


def half(completions, **columns):
    return [0.5] * len(completions)


def even(completions, prompts, **columns):
    numbers = [int(p[-1]["content"].split()[2]) for p in prompts]
    return [None if n % 2 else 0.0 for n in numbers]


def broken(completions, answer, **columns):
    return [float(len(a)) for a in answer]
"""


@pytest.fixture
def rewards(tmp_path):
    """rewards("a", "b"): the flag --reward for functions of a file."""
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS)
    return lambda *names: tuple(f"{path}:{name}" for name in names)


def teacher_rows():
    """Three right answers, a wrong one, one without a gold answer."""
    chat = lambda n: [{"role": "user", "content": f"What is {n} + 1?"}]
    rows = [{"prompt": chat(n), "completion": f"{n} + 1\n#### {n + 1}", "answer": str(n + 1)} for n in (1, 2)]
    rows.append({"messages": [*chat(3), {"role": "assistant", "content": "#### 4"}], "answer": "4"})
    rows.append({"prompt": chat(4), "completion": "#### 6", "answer": "5"})
    rows.append({"prompt": chat(5), "completion": "#### 6", "answer": None})
    return rows


def test_right_answers_of_a_file_are_kept(train, rewards, tmp_path, capsys):
    path = write_rows(tmp_path / "teacher.jsonl", teacher_rows())
    flags = {"mode": "seq_kd", "teacher_data": path, "teacher": None, "batch_size": 3, "max_steps": 1}
    folder, [line] = train(**flags, reward=rewards("right"))
    assert "3 of 5 answers have a reward above 0.5" in capsys.readouterr().out
    kept = read_lines(folder / "answers" / "kept.jsonl")
    assert [row["prompt"][-1]["content"] for row in kept] == [f"What is {n} + 1?" for n in (1, 2, 3)]
    assert line["num_tokens"] == sum(
        len(ids)
        for ids, _ in encoded(
            {"messages": [*row["prompt"], {"role": "assistant", "content": row["completion"]}]}
            for row in kept
        )
    )
    assert not {"kl_forward", "token_agreement", "eval/kl_forward", "eval/teacher_ce"} & line.keys()
    assert line["ce"] == pytest.approx(line["loss"], rel=1e-6)
    train(**flags)  # all of them, without a reward
    assert "5 sequences" in capsys.readouterr().out


def test_threshold_is_for_the_mean_of_the_rewards(train, rewards, tmp_path, capsys):
    path = write_rows(tmp_path / "teacher.jsonl", teacher_rows())
    flags = {"mode": "seq_kd", "teacher_data": path, "batch_size": 1, "max_steps": 1, "eval_dataset": None}
    train(**flags, reward=rewards("right", "half"), reward_threshold=0.7)  # 0.75 or 0.25
    assert "3 of 5 answers" in capsys.readouterr().out
    train(**flags, reward=rewards("right", "half"), reward_threshold=0.2)
    assert "5 of 5 answers" in capsys.readouterr().out  # 0.5 where `right` knows nothing
    with pytest.raises(SystemExit):
        train(**flags, reward=rewards("half"))  # not above 0.5
    assert "no answer is left" in capsys.readouterr().err


def test_rewards_that_know_nothing_of_an_answer_do_not_count(train, rewards, tmp_path):
    # `right`: 1, 1, 1, 0, None; `even`: None, 0, None, 0, None; their means: 1, 0.5, 1, 0, none.
    path = write_rows(tmp_path / "teacher.jsonl", teacher_rows())
    flags = {"mode": "seq_kd", "teacher_data": path, "batch_size": 1, "max_steps": 1, "eval_dataset": None}
    for threshold, numbers in ((0.7, [1, 3]), (0.3, [1, 2, 3]), (-1.0, [1, 2, 3, 4])):
        folder, _ = train(**flags, reward=rewards("right", "even"), reward_threshold=threshold)
        kept = read_lines(folder / "answers" / "kept.jsonl")
        asked = [int(row["prompt"][-1]["content"].split()[2]) for row in kept]
        assert asked == numbers, threshold


def test_rewards_never_compare_an_answer_with_itself(capsys, flags_of, rewards, tmp_path):
    rows = [{"question": f"What is {n} + 1?", "answer": "#### 0"} for n in range(1, 4)]
    flags = {"mode": "seq_kd", "teacher_data": write_rows(tmp_path / "teacher.jsonl", rows)}
    with pytest.raises(SystemExit) as stop:
        distill.main(distill.Args(**flags_of(**flags, reward=rewards("right"))))
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and re.search(r"row 1: `answer` is read as the completion.*columns", line)


def test_loss_of_seq_kd_is_the_likelihood_of_the_answers(train, tmp_path):
    rows = tiny_rows(count=8)
    flags = {"mode": "seq_kd", "teacher_data": write_rows(tmp_path / "teacher.jsonl", rows), "max_steps": 1}
    _, [line] = train(**flags, order="given")
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "base", dtype=torch.float32).eval()
    losses = []
    for ids, trained in encoded(rows):
        logprobs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        losses += [-logprobs[t - 1, ids[t]].item() for t in range(1, len(ids)) if trained[t]]
    assert line["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert "eval/kl_forward" in train.start  # the same tokens: the teacher is asked in evaluations


def test_teacher_samples_several_answers_of_which_the_right_ones_are_learnt(train, tmp_path, monkeypatch):
    flags = {"mode": "seq_kd", "answers_per_prompt": 3, "max_completion_length": 40, "max_steps": 1}
    folder, _ = train(**flags, reward=("rewards.py:math_answer",), eval_dataset=None)
    [path] = (tmp_path / "cache").glob("answers_*/answers_*.jsonl")
    sampled, kept = read_lines(path), read_lines(folder / "answers" / "kept.jsonl")
    prompts = [json.dumps(row["prompt"]) for row in tiny_rows("prompts_train")]
    asked = [json.dumps(row["prompt"]) for row in sampled]
    assert (
        asked == sorted(asked, key=prompts.index)
        and 100 < len(asked) <= 3 * 48
        and set(asked) == set(prompts)
    )
    assert len({row["completion"] for row in sampled[:3]}) > 1
    gold = {json.dumps(row["prompt"]): row["answer"] for row in tiny_rows("prompts_train")}
    right = lambda row: row["completion"].split("####")[-1].strip() == gold[json.dumps(row["prompt"])]
    assert 30 < len(kept) < len(sampled) and all(map(right, kept))
    assert sum(map(right, sampled)) <= len(kept)
    calls = calls_of(monkeypatch, "roll_out")
    train(**flags, eval_dataset=None)
    assert not calls, "what was sampled is found again"
    for count, changes in enumerate(({"seed": 2}, {"temperature": 0.7}, {"max_completion_length": 30}), 2):
        train(**(flags | changes), eval_dataset=None)
        assert len(list((tmp_path / "cache").glob("answers_*"))) == count, changes


def test_answers_that_were_cut_off_are_not_learnt(train, monkeypatch, tmp_path):
    rolled, roll_out = [], distill.roll_out
    keep = lambda *arguments, **options: rolled.extend(found := roll_out(*arguments, **options)) or found
    monkeypatch.setattr(distill, "roll_out", keep)
    train(mode="seq_kd", max_completion_length=20, max_steps=1, eval_dataset=None)
    [path] = (tmp_path / "cache").glob("answers_*/answers_*.jsonl")
    ended = [c.text for c in rolled if c.ended]
    assert [row["completion"] for row in read_lines(path)] == ended and 20 < len(ended) < len(rolled) - 20


def test_temperature_0_samples_the_likeliest_answer_once(train, monkeypatch, tmp_path):
    prompts = write_rows(tmp_path / "few.jsonl", tiny_rows("prompts_train", 4))
    flags = {"mode": "seq_kd", "prompt_dataset": prompts, "max_completion_length": 40, "max_steps": 1}
    calls = calls_of(monkeypatch, "roll_out")
    train(**flags, temperature=0.0, eval_dataset=None)
    [(_, _, asked, *_)] = calls
    assert len(asked) == 4
    teacher = AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "sft", dtype=torch.float32).eval()
    tokenizer, wanted = AutoTokenizer.from_pretrained(ROOT / "tiny" / "sft"), []
    for prompt in asked:
        ids = torch.tensor([prompt.input_ids])
        output = teacher.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :]
        if output[-1] == tokenizer.eos_token_id:
            wanted.append(tokenizer.decode(output, skip_special_tokens=True))
    [path] = (tmp_path / "cache").glob("answers_*/answers_*.jsonl")
    assert [row["completion"] for row in read_lines(path)] == wanted and wanted


def test_short_runs_ask_for_no_more_than_they_can_learn(train, monkeypatch, capsys):
    monkeypatch.setattr(distill, "BLOCK", 8)
    calls = calls_of(monkeypatch, "roll_out")
    flags = {"mode": "seq_kd", "max_completion_length": 40, "eval_dataset": None, "answers_per_prompt": 2}
    train(**flags, max_steps=1, batch_size=9)
    assert [len(asked) for _, _, asked, *_ in calls] == [16, 16]
    told = "2 answers of tiny/sft to each of 16 prompts, of which 2 of 2 blocks are still to sample"
    assert told in capsys.readouterr().out
    train(**flags, max_steps=2, batch_size=9)
    assert len(calls) == 3, "and go on where those have come to"
    assert "of 24 prompts, of which 1 of 3 blocks are still to sample" in capsys.readouterr().out


def test_progress_is_told_without_a_terminal(monkeypatch, capsys):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(distill.time, "perf_counter", lambda: next(clock))
    assert list(distill.with_progress(list("abcdefg"), "blocks")) == list("abcdefg")
    assert capsys.readouterr().out.splitlines() == [
        "blocks: 3 of 7 blocks, left 0:16",  # 12 of 28 seconds
        "blocks: 6 of 7 blocks, left 0:04",
    ]


@pytest.mark.parametrize("eval_dataset", [None, "EVAL"])
def test_teacher_of_seq_kd_stays_for_held_out_data_alone(train, tmp_path, monkeypatch, eval_dataset):
    alive, load_model, aggregate = [], distill.load_model, distill.aggregate

    def load(*arguments):
        model = load_model(*arguments)
        loaded.append(weakref.ref(model))
        return model

    def spy(*arguments, **options):
        gc.collect()
        alive.append(loaded[0]() is not None)
        return aggregate(*arguments, **options)

    loaded = []
    monkeypatch.setattr(distill, "load_model", load)
    monkeypatch.setattr(distill, "aggregate", spy)
    flags = {"mode": "seq_kd", "max_completion_length": 40, "max_steps": 1, "answers_per_prompt": 1}
    train(**flags, eval_dataset=eval_dataset and str(tmp_path / "eval.jsonl"))
    assert len(loaded) == 2 and set(alive) == {eval_dataset is not None}


def test_continued_run_keeps_the_answers_that_it_began_with(train, monkeypatch, tmp_path):
    flags = {"mode": "seq_kd", "max_completion_length": 40, "save_every": 1, "eval_dataset": None}
    flags |= {"reward": ("rewards.py:math_answer",), "output_dir": str(tmp_path / "run")}
    folder, _ = train(**flags, max_steps=1)
    before = (folder / "answers" / "kept.jsonl").read_bytes()
    for name in ("right_rows", "sample_teacher"):
        monkeypatch.setattr(distill, name, lambda *_: pytest.fail("answers are sampled or scored anew"))
    train(**flags, max_steps=2, resume=True)
    assert (folder / "answers" / "kept.jsonl").read_bytes() == before


def test_answers_of_the_teacher_are_learnt_where_the_prompts_come_with_messages_of_their_own(train, tmp_path):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "the dataset's answer"}]
    rows = [row | {"messages": messages} for row in tiny_rows("prompts_train")[:16]]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {"mode": "seq_kd", "max_completion_length": 40, "max_steps": 1, "eval_dataset": None}
    train(**flags, prompt_dataset=str(tmp_path / "asked.jsonl"))
    [path] = (tmp_path / "cache").glob("answers_*/answers_*.jsonl")
    texts = [
        example["messages"][-1]["content"] for example in distill.load_examples(str(path), "train", None)
    ]
    assert texts == [row["completion"] for row in read_lines(path)] and len(texts) > 4


def test_seq_kd_works_across_tokenizers(train, random_model, tmp_path):
    flags = {"mode": "seq_kd", "model": str(random_model), "max_completion_length": 40, "max_steps": 3}
    folder, lines = train(**flags, reward=("rewards.py:math_answer",), learning_rate=3e-3)
    own = AutoTokenizer.from_pretrained(random_model)
    kept = read_lines(folder / "answers" / "kept.jsonl")
    lengths = [
        len(
            own.apply_chat_template(
                [*row["prompt"], {"role": "assistant", "content": row["completion"]}], return_dict=True
            ).input_ids
        )
        for row in kept
    ]
    assert min(lengths) * 24 <= lines[-1]["num_tokens"] <= max(lengths) * 24
    assert lines[-1]["loss"] < lines[0]["loss"] and "eval/kl_forward" not in lines[-1]
    assert train.start["eval/teacher_greedy_accuracy"] > 0.5  # asked with its own tokenizer
    assert (folder / "model" / "tokenizer.json").read_bytes() == (
        random_model / "tokenizer.json"
    ).read_bytes()


# Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, flags",
    [
        (r"--jsd-beta 0\.0: at 0 and 1 jsd is 0; take --divergence forward_kl", {"jsd_beta": 0.0}),
        (r"--jsd-beta 1\.0", {"jsd_beta": 1.0}),
        (r"--kd-temperature must be above 0, not 0\.0", {"kd_temperature": 0.0}),
        (r"--temperature must be at least 0, not -1", {"temperature": -1.0}),
        (r"--temperature 0: --mode on_policy trains on samples", {"temperature": 0.0, "mode": "on_policy"}),
        (r"--on-policy-fraction must lie in \(0, 1\], not 0\.0", {"on_policy_fraction": 0.0}),
        (r"--on-policy-fraction 0\.05 is no sequence", {"on_policy_fraction": 0.05, "mode": "on_policy"}),
        (r"--kl-discount must lie in \[0, 1\]", {"kl_discount": 2.0}),
        (r"--kl-discount 0\.5: only --on-policy-loss policy_gradient", {"kl_discount": 0.5}),
        (r"--ce-coef must be at least 0, not -1", {"ce_coef": -1.0}),
        (r"--cache-dir .*/train\.jsonl: no folder can be", {"cache_dir": "TRAIN", "cache_top_k": 4}),
        (r"--cache-dir .*/train\.jsonl: no folder can be", {"cache_dir": "TRAIN", "mode": "seq_kd"}),
        (r"--teacher None: only --mode seq_kd with --teacher-data", {"teacher": None}),
        (r"--teacher nowhere/at_all: ", {"teacher": "nowhere/at_all"}),
        (r"--teacher \./nowhere: no such folder", {"teacher": "./nowhere"}),
        (r"--cache-top-k -1", {"cache_top_k": -1}),
        (r"--cache-top-k 5: only --mode token_kd", {"cache_top_k": 5, "mode": "on_policy"}),
        (r"--teacher-data: only --mode seq_kd reads it", {"teacher_data": "answers.jsonl"}),
        (
            r"--reward: only --mode seq_kd reads it",
            {"reward": ("rewards.py:math_answer",), "mode": "on_policy"},
        ),
        (r"--ce-coef 0\.5", {"ce_coef": 0.5, "mode": "on_policy", "on_policy_fraction": 1.0}),
        (
            r"policy_gradient needs --temperature 1",
            {"mode": "on_policy", "on_policy_loss": "policy_gradient", "temperature": 0.7},
        ),
        (r"--keep-layers \[0, 4\]: not rising numbers of the layers 0 to 3", {"keep_layers": (0, 4)}),
        (r"--keep-layers \[1, 0\]", {"keep_layers": (1, 0)}),
        (r"--keep-layers \[\]", {"keep_layers": ()}),
        (r"--batch-size must be at least 1", {"batch_size": 0}),
        (r"nowhere\.jsonl: no such file", {"dataset": ("nowhere.jsonl",)}),
        (r"nowhere\.jsonl: no such file", {"mode": "seq_kd", "teacher_data": "nowhere.jsonl"}),
        (r"nowhere\.jsonl: no such file", {"mode": "seq_kd", "eval_dataset": "nowhere.jsonl"}),
        (r"nowhere\.py:f: not file\.py:function", {"reward": ("nowhere.py:f",), "mode": "seq_kd"}),
        (
            r"found the columns messages, prompt; needed is prompt",
            {"mode": "on_policy", "prompt_dataset": "TRAIN"},
        ),
    ],
)
def test_mistakes_end_the_run_with_one_line_before_a_model_is_loaded(
    monkeypatch, capsys, flags_of, tmp_path, pattern, flags
):
    monkeypatch.setattr(distill, "load_model", lambda *_: pytest.fail("a model was loaded"))
    flags = {k: str(tmp_path / "train.jsonl") if v == "TRAIN" else v for k, v in flags.items()}
    with pytest.raises(SystemExit) as stop:
        distill.main(distill.Args(**flags_of(**flags, output_dir=str(tmp_path / "run"))))
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and re.search(pattern, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["token_kd", "on_policy"])
def test_other_tokens_are_an_error_that_names_seq_kd(monkeypatch, capsys, flags_of, random_model, mode):
    monkeypatch.setattr(distill, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        distill.main(distill.Args(**flags_of(model=str(random_model), mode=mode)))
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "has other tokens than --model" in line and "--mode seq_kd" in line


def test_rewards_that_leave_nothing_are_an_error(capsys, flags_of, rewards, tmp_path):
    path = write_rows(tmp_path / "teacher.jsonl", teacher_rows()[3:])
    flags = {"mode": "seq_kd", "teacher_data": path, "output_dir": str(tmp_path / "run")}
    for reward, message in (
        ("right", "no answer is left to learn from"),
        ("short", "1 numbers for 2 completions"),
        ("broken", "error: reward broken: TypeError: object of type 'NoneType' has no len()"),
    ):
        with pytest.raises(SystemExit) as stop:
            distill.main(distill.Args(**flags_of(**flags, reward=rewards(reward))))
        assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_gsm8k_rows_train_a_random_student(gsm8k, train, random_model, tmp_path):
    rows = write_rows(tmp_path / "gsm8k.jsonl", read_lines(gsm8k / "train.jsonl")[:8])
    flags = {
        "model": str(random_model),
        "teacher": str(random_model),
        "keep_layers": (0,),
        "max_length": 2048,
    }
    flags |= {"dataset": (rows,), "prompt_dataset": rows, "eval_dataset": rows, "max_prompt_length": 1024}
    for mode in ("token_kd", "on_policy"):
        _, lines = train(mode=mode, **flags, max_completion_length=6)
        assert len(lines) == 2 and all(math.isfinite(value) for line in lines for value in line.values())
        assert lines[-1]["grad_norm"] > 0


# Beside TRL -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergences_are_those_of_trls_gkd(temperature):
    # Its beta 0 and 1 stand for the two KLs; it has no factor of the squared temperature.
    if not pytest.importorskip("trl").__version__.startswith("1.16."):
        pytest.skip("compares with TRL 1.16")
    from trl.experimental.gkd import GKDTrainer

    student, teacher = random_logits(6, 9, seed=1), random_logits(6, 9, seed=2)
    kinds = {0: distill.forward_kl, 1: distill.reverse_kl}
    kinds |= {beta: partial(distill.jsd, beta=beta) for beta in (0.1, 0.5, 0.9)}
    for beta, kind in kinds.items():
        theirs = GKDTrainer.generalized_jsd_loss(
            student, teacher, beta=beta, temperature=temperature, reduction="none"
        ).sum(-1)
        ours = kind(*((x / temperature).log_softmax(-1) for x in (student, teacher)))
        assert torch.allclose(ours, theirs, atol=1e-12), beta
