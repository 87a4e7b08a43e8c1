"""distill.py against float64 sums over the vocabulary, enumeration, and whole logits of the stock models."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import read_lines, write_rows
from helpers import assert_same_metrics, calls_of, models_of, trainer
from samples import float64, gradient_norm, said, stock, tiny_rows, tiny_tokenizer
from test_common import HEADS, Head, assert_equal, assert_equal_gradients, build, gradients, make_sequences
from test_grpo import Table, distance

import distill
from common import collate, completion_states, head_logits, head_settings

KINDS = {"forward_kl": distill.forward_kl, "reverse_kl": distill.reverse_kl}
KINDS |= {"jsd": partial(distill.jsd, beta=0.3)}
every_kind = pytest.mark.parametrize("kind", KINDS)
both_ends = pytest.mark.parametrize("end", [None, 2], ids=["equal-lengths", "an-end"])


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


@every_kind
def test_divergences_are_the_sums_over_the_vocabulary(kind):
    student, teacher = (random_logits(6, 9, seed=seed).log_softmax(-1) for seed in (1, 2))
    found = KINDS[kind](student, teacher)
    assert torch.allclose(found, written_out(kind, student.exp(), teacher.exp()), atol=1e-12)
    assert KINDS[kind](student, student).abs().max() < 1e-12
    swapped = KINDS[kind](teacher, student)
    assert (found - swapped).abs().min() > 1e-3, "the two sides are told apart"


def test_jsd_vanishes_at_its_end_points_like_the_two_kls():
    student, teacher = (random_logits(5, 6, seed=seed, size=1.0).log_softmax(-1) for seed in (1, 2))
    near = 1e-6
    to_forward = distill.jsd(student, teacher, beta=near) / near
    to_reverse = distill.jsd(student, teacher, beta=1 - near) / near
    assert torch.allclose(to_forward, distill.forward_kl(student, teacher), rtol=1e-4)
    assert torch.allclose(to_reverse, distill.reverse_kl(student, teacher), rtol=1e-4)


@every_kind
def test_tokens_that_both_rule_out_count_nothing(kind):
    logits, teacher = random_logits(3, 5, seed=1), random_logits(3, 5, seed=2)
    without = KINDS[kind](logits.log_softmax(-1), teacher.log_softmax(-1))
    banned = torch.full((3, 1), -math.inf, dtype=torch.float64)
    wider = torch.cat([logits, banned], -1).requires_grad_()
    found = KINDS[kind](wider.log_softmax(-1), torch.cat([teacher, banned], -1).log_softmax(-1))
    assert torch.allclose(found, without)
    [gradient] = torch.autograd.grad(found.sum(), wider)
    assert torch.isfinite(gradient).all()


def test_bucket_by_hand():
    logprobs = float64([0.1, 0.4, 0.2, 0.3]).log()
    found = distill.bucketed(logprobs, torch.tensor([[1, 3]]))
    assert torch.allclose(found.exp(), float64([0.4, 0.3, 0.3]))


@every_kind
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


def plain_terms(logits, teacher_logits, targets, divergence, temperature):
    """What `token_divergences` gives, from whole logits (C, V) in float64."""
    softened = [(x / temperature).log_softmax(-1) for x in (logits, teacher_logits)]
    of_targets = [x.log_softmax(-1).gather(-1, targets[:, None])[:, 0] for x in (logits, teacher_logits)]
    return distill.TokenTerms(
        divergences=divergence(*softened),
        ce=-of_targets[0],
        teacher_ce=-of_targets[1],
        kl_forward=distill.forward_kl(*softened),
        kl_reverse=distill.reverse_kl(*softened),
        token_agreement=(logits.argmax(-1) == teacher_logits.argmax(-1)).double(),
    )


def whole_logits(model, batch):
    """Logits (C, V) of a model from `test_common`, by plain algebra in float64."""
    weight, bias, scale, softcap = head_settings(model)
    logits = completion_states(model, batch).double() @ weight.double().T
    logits = (logits + (0 if bias is None else bias.double())) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def view_of(teacher, batch, vocab_size=61):
    return distill.live_view(lambda: teacher, vocab_size, batch, None)


def settings_of(divergence=distill.forward_kl, temperature=1.0, **changes):
    return {"divergence": divergence, "temperature": temperature, "vocab_size": 61} | changes


@every_kind
@pytest.mark.parametrize("config, scale, softcap, bias, temperature", HEADS)
def test_chunked_heads_equal_float64_autograd(config, scale, softcap, bias, temperature, kind):
    batch = collate(make_sequences())
    size = batch.input_ids.shape[1]
    student, teacher = Head(size, bias, size=0.5, **config), Head(size, not bias, size=0.5)
    teacher.hidden.data = teacher.hidden.data.flip(-1)
    targets = batch.input_ids[0, batch.completion_index]
    teacher_logits = whole_logits(teacher, batch).detach()
    for chunk_size, used in ((1, [0]), (7, [1]), (7, [0, 1]), (1000, [0, 1])):
        settings = settings_of(KINDS[kind], temperature, chunk_size=chunk_size)
        found = distill.token_divergences(student, batch, view_of(teacher, batch), **settings)
        logits = whole_logits(student, batch)
        wanted = plain_terms(logits, teacher_logits, targets, KINDS[kind], temperature)
        for x, y in zip(found, wanted, strict=True):
            assert_equal(x, y, 2e-5)
        actual = gradients(student, *(found[i] for i in used))
        assert_equal_gradients(actual, gradients(student, *(wanted[i] for i in used)), 2e-5)
        assert [term.requires_grad for term in found] == [True, True, False, False, False, False]


def test_rows_that_pad_a_table_are_ignored():
    batch = collate(make_sequences())
    student, teacher = build("llama"), build("llama", vocab_size=80)
    before = distill.token_divergences(student, batch, view_of(teacher, batch), **settings_of())
    teacher.lm_head.weight.data[61:] *= 100  # whatever they say
    after = distill.token_divergences(student, batch, view_of(teacher, batch), **settings_of())
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    padded = build("llama", vocab_size=70)
    for name, parameter in padded.named_parameters():
        parameter.data[: len(dict(student.named_parameters())[name])] = dict(student.named_parameters())[name]
    found = distill.token_divergences(padded, batch, view_of(teacher, batch), **settings_of())
    assert_equal(found[0], after[0], 1e-5)
    found[0].sum().backward()
    assert padded.lm_head.weight.grad[61:].abs().max() == 0 < padded.lm_head.weight.grad[:61].abs().max()


def test_whole_logits_never_exist(monkeypatch):
    sizes, batch = [], collate(make_sequences())
    spy = lambda hidden, *head: sizes.append(len(hidden)) or head_logits(hidden, *head)
    monkeypatch.setattr(distill.common, "head_logits", spy)
    view = view_of(build("llama"), batch)
    found = distill.token_divergences(build("llama"), batch, view, **settings_of(chunk_size=4))
    once = len(sizes)
    found[0].sum().backward()
    assert max(sizes) == 4 and len(sizes) == 2 * once  # each chunk of both again in the backward pass


def sampled_gradient(student, teacher, discount):
    """Mean over all answers that the student may write of the gradient of sum_t -A_t log p_S."""
    ids = list(range(len(student.sequences)))
    index = torch.arange(len(ids)).repeat_interleave(student.lengths)
    logps, teacher_logps = student.token_logps(ids), teacher.token_logps(ids)
    advantages = distill.reverse_kl_advantages(logps, teacher_logps, index, discount)
    assert not advantages.requires_grad
    chances = student.probabilities().detach()[index]
    return student.gradient((chances * -advantages * logps).sum())


@both_ends
def test_policy_gradient_is_of_each_tokens_reverse_kl_at_discount_0_and_of_whole_answers_at_1(end):
    student, teacher = Table(1, end), Table(2, end)
    # At 0 what comes before a token is held fixed: the chance of a prefix is not differentiated.
    prefixes = torch.zeros(13, dtype=torch.float64)  # how likely the student is to come to each row
    for chance, rows in zip(student.probabilities().detach().tolist(), student.rows, strict=True):
        for row in rows:
            prefixes[row] += chance
    logprobs = student.logits.log_softmax(-1)
    log_ratio = logprobs - teacher.logits.detach().log_softmax(-1)
    of_tokens = student.gradient((prefixes * (logprobs.exp() * log_ratio).sum(-1)).sum())
    log_ratio = student.probabilities().log() - teacher.probabilities().log().detach()
    of_answers = student.gradient((student.probabilities() * log_ratio).sum())
    assert distance(sampled_gradient(student, teacher, 0.0), of_tokens) < 1e-9
    assert distance(sampled_gradient(student, teacher, 1.0), of_answers) < 1e-9
    assert distance(of_tokens, of_answers) > 0.01


def test_advantages_by_hand():
    logps, teacher_logps = float64(-1, -2, -3, -1), float64(-2, -1, -1, -1.5)
    index = torch.tensor([0, 0, 0, 1])  # log-ratios -1, 1, 2 and -0.5
    found = distill.reverse_kl_advantages(logps, teacher_logps, index, 0.5)
    assert found.tolist() == [-1 + 0.5 * (1 + 0.5 * 2), 1 + 0.5 * 2, 2, -0.5]
    found = distill.reverse_kl_advantages(logps, teacher_logps, index, 0.0)
    assert found.tolist() == [-1, 1, 2, -0.5]


def answered_rows(name="sft_train", count=48):
    """The first conversations of a data set of tiny/ with a single answer."""
    answers = lambda row: [m["role"] for m in row["messages"]].count("assistant")
    return [row for row in tiny_rows(name) if answers(row) == 1][:count]


@pytest.fixture
def train(tmp_path, one_cpu):
    """As `trainer` says, of 2 steps on 48 rows; tiny/base is the student of tiny/sft. train.start: step 0."""
    prompts = write_rows(tmp_path / "prompts.jsonl", tiny_rows("prompts_train")[:48])
    flags = {"model": "tiny/base", "prompt_dataset": prompts, "cache_dir": str(tmp_path / "cache")}
    flags |= {"max_completion_length": 12, "batch_size": 8, "max_steps": 2, "lr_schedule": "constant"}
    short = trainer(distill, tmp_path, **flags)

    def run(**flags):
        folder, lines = short(answered_rows(), answered_rows("sft_eval", 4), **flags)
        run.start = lines.pop(0) if lines[0]["step"] == 0 else None
        return folder, lines

    return run


def stock_step(tokens, measure=distill.forward_kl, **flags):
    """Loss and gradient norm of the sequences `tokens` (ids, trained) under the stock models, token mean."""
    args, losses = distill.Args(**flags), []
    temperature, models = args.kd_temperature, [stock("tiny/base"), stock("tiny/sft")]
    for ids, trained in tokens:
        ids, kept = torch.tensor(ids), torch.tensor(trained)[1:].bool()
        logits, others = (model(input_ids=ids[None]).logits[0, :-1].double()[kept] for model in models)
        terms = plain_terms(logits, others.detach(), ids[1:][kept], measure, temperature)
        losses.append(terms.divergences * temperature**2 + args.ce_coef * terms.ce)
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.item(), gradient_norm(models[0])


def encoded(rows):
    """Messages as tiny's template lays them out: token ids, and which of them are trained."""
    tokenizer, found = tiny_tokenizer(), []
    for row in rows:
        *prompt, answer = row["messages"]
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        parts = tokenizer([text, answer["content"] + "<|im_end|>"], add_special_tokens=False).input_ids
        found.append((sum(parts, []), [0] * len(parts[0]) + [1] * len(parts[1])))
    return found


def rows_of_step_1(count, rows=None, seed=1):
    """Those of the data that the first step takes."""
    rows = rows or answered_rows()
    return [rows[i] for i in distill.training_order(len(rows), count, seed)]


STEPS = {
    "forward_kl": ({}, distill.forward_kl),
    "reverse_kl": ({"divergence": "reverse_kl"}, distill.reverse_kl),
    "jsd": ({"divergence": "jsd", "jsd_beta": 0.9}, partial(distill.jsd, beta=0.9)),
    "softened": ({"kd_temperature": 3.0, "ce_coef": 0.5}, distill.forward_kl),
}


@pytest.mark.parametrize("name", STEPS)
def test_loss_and_gradient_of_a_step_are_those_of_the_stock_models(train, name):
    flags, divergence = STEPS[name]
    _, [line] = train(max_steps=1, eval_dataset=None, **flags)
    loss, grad_norm = stock_step(encoded(rows_of_step_1(8)), divergence, **flags)
    assert line["loss"] == pytest.approx(loss, rel=1e-4)
    assert line["grad_norm"] == pytest.approx(grad_norm, rel=1e-3)


def test_held_out_metrics_are_those_of_the_stock_models(train):
    train(max_steps=1)
    held_out = encoded(answered_rows("sft_eval", 4))
    for key, divergence in {"kl_forward": distill.forward_kl, "kl_reverse": distill.reverse_kl}.items():
        assert train.start[f"eval/{key}"] == pytest.approx(stock_step(held_out, divergence)[0], rel=1e-4)
    assert train.start["eval/ce"] > 0.9 > 0.3 > train.start["eval/teacher_ce"] > 0


def test_epochs_are_passes_over_what_a_mode_goes_through(train):
    _, lines = train(eval_dataset=None, max_steps=0, num_epochs=0.25)  # 8 of 48 sequences a step
    assert [line["epoch"] for line in lines] == pytest.approx([8 / 48, 16 / 48])
    flags = {"mode": "on_policy", "on_policy_fraction": 0.25, "max_steps": 0, "num_epochs": 0.05}
    _, lines = train(**flags, eval_dataset=None)  # 2 of 48 prompts
    assert [line["epoch"] for line in lines] == pytest.approx([2 / 48, 4 / 48])
    args = distill.Args()
    assert args.max_steps == 0 and args.num_epochs * 4096 / args.batch_size == 400  # tiny's sequences


def test_cached_teacher_is_not_rounded_on_its_way_through_fsdp(train, monkeypatch):
    # bfloat16 under FSDP2, a group of one process
    calls = calls_of(monkeypatch, distill, "forward_kl")
    monkeypatch.setitem(distill.DIVERGENCES, "forward_kl", distill.forward_kl)
    flags = {"dtype": "bfloat16", "max_steps": 1}
    _, live = train(**flags)
    _, cached = train(**flags, cache_top_k=768)
    assert {x.dtype for arguments, _ in calls for x in arguments} == {torch.float32}
    assert_same_metrics(cached, live, rel=2e-3, abs_=2e-3, without=["packing/fill"])


def test_cache_of_all_tokens_equals_the_live_teacher(train, capsys):
    flags = {"kd_temperature": 1.5, "ce_coef": 0.3, "divergence": "jsd"}
    _, live = train(**flags)
    start_line = train.start
    _, cached = train(**flags, cache_top_k=768)
    assert "6,152 bytes a token" in capsys.readouterr().out
    # The cache adds up the vocabulary in another order, which shows most in the gradient's norm.
    lines, without = [start_line, *live], ["grad_norm", "packing/fill"]
    assert_same_metrics([train.start, *cached], lines, rel=1e-6, abs_=1e-6, without=without)
    norms = [[line["grad_norm"] for line in lines] for lines in (cached, live)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_cache_is_written_once_and_found_by_what_it_depends_on(train, monkeypatch, tmp_path):
    flags = {"cache_top_k": 5, "eval_dataset": None, "max_tokens_per_micro_batch": 8192}
    asked, loaded = (calls_of(monkeypatch, distill, name) for name in ("live_view", "load_model"))
    _, lines = train(**flags)
    [folder] = (tmp_path / "cache").iterdir()
    assert len(asked) == 1 and len(list(folder.iterdir())) == 16
    _, again = train(**flags)
    assert len(asked) == 1 and [names[0] for names, _ in loaded] == ["tiny/sft", "tiny/base", "tiny/base"]
    assert_same_metrics(again, lines, rel=0, abs_=0)
    lost, *_ = folder.iterdir()
    lost.rename(lost.with_suffix(".partial_1"))  # as a killed run leaves it
    train(**flags, max_steps=6)  # the other sequences of the data, too
    [*_, ((_, _, _, members), _)] = asked
    assert len(members) == 33 and len(list(folder.glob("*"))) == 49
    depends = {"cache_top_k": 6}, {"kd_temperature": 2.0}, {"teacher": "tiny/base"}, {"dtype": "bfloat16"}
    for count, changes in enumerate(depends, 2):
        train(**(flags | changes))
        assert len(list((tmp_path / "cache").iterdir())) == count, changes


@pytest.mark.parametrize("mask", [False, True])
def test_loss_of_a_step_on_samples_is_that_of_the_stock_models(train, monkeypatch, mask):
    rolled = calls_of(monkeypatch, distill, "roll_out")
    flags = {"mode": "on_policy", "on_policy_fraction": 0.5, "on_policy_loss": "policy_gradient"}
    flags |= {"kl_discount": 0.5, "ce_coef": 0.5, "learning_rate": 0.0, "mask_truncated": mask}
    flags |= {"model": "tiny/sft", "teacher": "tiny/base", "max_completion_length": 22}
    _, lines = train(**flags, eval_dataset=None)
    ((policy, _, asked, *_, seed, _), sampled), (others, _) = rolled
    assert any(p.requires_grad for p in policy.parameters()) and seed != others[-2]
    prompts = tiny_rows("prompts_train")[:48]
    wanted = [prompts[i]["prompt"] for i in distill.training_order(len(prompts), 4, 1)]
    assert [prompt.row["prompt"] for prompt in asked] == wanted and len(sampled) == 4
    models = [stock("tiny/sft"), stock("tiny/base")]

    def logprobs_of(ids, trained):
        """Of all tokens (C, V) under student and teacher, and of those that are there (C,)."""
        ids, kept = torch.tensor(ids), torch.tensor(trained[1:]).bool()
        rows = [model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)[kept] for model in models]
        return *rows, *(x.gather(-1, ids[1:][kept][:, None])[:, 0] for x in rows)

    total = ce = count = given_count = cut = 0
    with torch.no_grad():
        for given in encoded(rows_of_step_1(4)):  # 4 of 8 sequences are the data's
            student, teacher, own, _ = logprobs_of(*given)
            total += (teacher.exp() * (teacher - student)).sum()
            ce, given_count = ce - own.sum(), given_count + len(own)
        for c in sampled:
            cut += not c.ended
            if mask and not c.ended:
                continue
            prompt_ids, size = c.prompt.input_ids, len(c.token_ids)
            _, _, own, theirs = logprobs_of(prompt_ids + c.token_ids, [0] * len(prompt_ids) + [1] * size)
            for t in range(size):
                total -= sum(0.5 ** (u - t) * (theirs[u] - own[u]) for u in range(t, size)) * own[t]
            count += size
    assert 0 < cut < 4
    # the likelihood is a mean over the data's own tokens, the rest over all
    wanted = total / (count + given_count) + 0.5 * ce / given_count
    assert lines[0]["loss"] == pytest.approx(wanted.item(), rel=1e-4)


def test_sampled_token_that_pads_the_table_is_not_trained():
    prompt, args = distill.Prompt([5, 6], {}, ""), distill.Args(mode="on_policy", mask_truncated=True)
    for ended, wanted in ((True, [False, False, True, False, True]), (False, [False] * 5)):
        found = distill.as_sequence(distill.Completion(prompt, [7, 800, 8], None, "", ended), 768, args)
        assert found.input_ids.tolist() == [5, 6, 7, 800, 8] and found.trained.tolist() == wanted


SEQ_KD = {"mode": "seq_kd", "max_completion_length": 40, "max_steps": 1, "eval_dataset": None}


def test_right_answers_are_kept_and_what_is_sampled_is_found_again(train, monkeypatch):
    rolled = calls_of(monkeypatch, distill, "roll_out")
    flags = SEQ_KD | {"answers_per_prompt": 3}
    sampled = read_lines(train(**flags)[0] / "answers.jsonl")
    completions = rolled[0][1]
    ended = [c for c in completions if c.ended]  # what was cut off is not learnt
    assert len(completions) == 3 * 48 > len(ended) + 2 and len({c.text for c in ended[:3]}) > 1
    assert sampled == [c.prompt.row | {"completion": c.text} for c in ended]
    folder, [line] = train(**flags, reward=("rewards.py:math_answer",))
    kept = read_lines(folder / "answers.jsonl")
    right = lambda row: row["completion"].split("####")[-1].strip() == row["answer"]
    assert kept == [row for row in sampled if right(row)] and 30 < len(kept) < len(sampled)
    assert len(rolled) == 1, "what was sampled is found again"
    assert line["ce"] == pytest.approx(line["loss"], rel=1e-6)
    for count, changes in enumerate(({"seed": 2}, {"temperature": 0.0}, {"max_completion_length": 30}), 2):
        train(**(flags | changes))
        assert len(rolled) == count, changes
    assert len(rolled[2][1]) == 48  # greedy answers are all the same


def test_loss_of_seq_kd_is_the_likelihood_of_the_answers(train):
    folder, [line] = train(**SEQ_KD, answers_per_prompt=1)
    rows = read_lines(folder / "answers.jsonl")
    for row in rows:
        row["messages"] = [*row["prompt"], *said(row["completion"])]
    model, losses = stock("tiny/base"), []
    for ids, trained in encoded(rows_of_step_1(8, rows)):
        logprobs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        losses += [-logprobs[t - 1, ids[t]].item() for t in range(1, len(ids)) if trained[t]]
    assert line["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


STAYS = [({}, True), ({"cache_top_k": 4}, False), ({"mode": "seq_kd"}, False)]


@pytest.mark.parametrize("flags, stays", STAYS, ids=str)
def test_teacher_leaves_the_memory_unless_steps_ask_it(train, monkeypatch, flags, stays):
    loaded, alive, lr_factor = models_of(monkeypatch, distill), [], distill.lr_factor

    def spy(*arguments):
        alive.append(loaded[0]() is not None)
        return lr_factor(*arguments)

    monkeypatch.setattr(distill, "lr_factor", spy)
    train(max_completion_length=40, max_steps=1, answers_per_prompt=1, **flags)
    assert len(loaded) == 2 and set(alive) == {stays}
    assert ("eval/kl_forward" in train.start) == (flags.get("mode") != "seq_kd")


def test_seq_kd_works_across_tokenizers(train, random_model):
    flags = {"mode": "seq_kd", "model": str(random_model), "max_completion_length": 40, "max_steps": 3}
    _, lines = train(**flags, learning_rate=3e-3)
    assert lines[-1]["loss"] < lines[0]["loss"] and "eval/kl_forward" not in lines[-1]
