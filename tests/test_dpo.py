"""dpo.py: its losses, packed pairs, preference data, the reference, and short runs.

Losses are held against numbers worked by hand from the papers, log-probs against a loop over log_softmax of
the stock model on one sequence at a time; only a setting that changes nothing is held against its absence.
"""

import functools
import itertools
import json
import math
import re
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, read_lines, write_rows
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import dpo
from common import completion_states, head_settings

LN2, CPU = math.log(2), torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def process_group():
    dpo.setup_distributed()


# Losses -----------------------------------------------------------------------------------------------------
# beta 0.1; the log-ratios of chosen and rejected are (0, 0), (2, -3), (-4, -1), so the margins 0, 0.5, -0.3.
BY_HAND = {
    ("sigmoid",): (0.693147, 0.474077, 0.854355),
    ("sigmoid", ("label_smoothing", 0.1)): (0.693147, 0.524077, 0.824355),
    ("robust", ("label_smoothing", 0.1)): (0.693147, 0.411577, 0.891855),
    ("hinge",): (1, 0.5, 1.3),
    ("exo", ("label_smoothing", 1e-3)): (2.761231, 1.945734, 3.286512),
    ("exo", ("label_smoothing", 0.1)): (0.510826, 0.272055, 0.685517),
    ("nca",): (1.386294, 1.274386, 1.491721),
    ("bco",): (1.386294, 1.152494, 1.557412),
    ("sppo",): (50, 13, 97),
    ("apo_zero",): (1, 0.875723, 1.073708),
    ("apo_down",): (1, 0.927375, 0.975755),
    ("discopop", ("discopop_tau", 0.05)): (0.846574, 0.606525, 0.855580),
    ("discopop", ("discopop_tau", 0.5)): (0.846574, 0.570908, 1.029934),
    ("sigmoid_norm",): (0.693147, 0.474077, 0.854355),
    ("dpop", ("dpop_lambda", 50.0)): (0.693147, 0.474077, 20.3),
    ("dpop", ("dpop_lambda", 5.0)): (0.693147, 0.474077, 2.395545),
    ("tdpo2", ("tdpo_alpha", 1.0)): (0.798139, 0.554355, 0.974077),  # the KLs are 1 (chosen), 3 (rejected)
    ("tdpo2", ("tdpo_alpha", 0.5)): (0.744397, 0.513015, 0.913015),
    ("tdpo2", ("tdpo_alpha", 0.25)): (0.718460, 0.493249, 0.883382),
    ("step_dpo",): (0.693147, 0.474077, 0.854355),
}
CASES = [pytest.param(*key, id="-".join(map(str, (key[0], *dict(key[1:]).values())))) for key in BY_HAND]
CASES = [pytest.param(case.values[0], dict(case.values[1:]), id=case.id) for case in CASES]


def kls_of(name, chosen=1.0, rejected=3.0, size=1):
    kls = {"chosen_kls": chosen, "rejected_kls": rejected}
    full = {key: torch.full((size,), value, dtype=torch.float64) for key, value in kls.items()}
    return full if name == "tdpo2" else {}


def ratios_of(points):
    """Log-ratios (chosen, rejected), (B,) each."""
    return torch.tensor(points, dtype=torch.float64).T.clone()


def loss_of(name, points, **settings):
    kls = kls_of(name, size=len(points))
    return dpo.LOSSES[name](*ratios_of(points), beta=settings.pop("beta", 0.1), **kls, **settings)


@pytest.mark.parametrize("name, settings", CASES)
def test_losses_by_hand_at_the_reference_and_beside_it(name, settings):
    values = loss_of(name, [(0, 0), (2, -3), (-4, -1)], **settings)
    assert values.tolist() == pytest.approx(BY_HAND[(name, *settings.items())], abs=2e-6)


def test_tdpo2_has_gradient_into_the_kl_of_the_rejected_answer_only():
    kls = {key: value.requires_grad_() for key, value in kls_of("tdpo2").items()}
    loss = dpo.tdpo2_loss(*ratios_of([(2, -3)]), beta=0.1, tdpo_alpha=0.5, **kls).sum()
    chosen, rejected = torch.autograd.grad(loss, list(kls.values()), allow_unused=True)
    # -log sigma(x): slope -sigma(-x) with x = 0.4 here, times beta, times alpha
    assert chosen is None and rejected.item() == pytest.approx(0.5 * 0.1 / (1 + math.exp(0.4)))


# A spread of points, one of them the reference, for the identities.
POINTS = [(0, 0), (2, -3), (-4, -1), (7.5, 7), (-0.5, 12), (-30, -55)]
SWAPPED = [(r, c) for c, r in POINTS]


def test_robust_loss_of_labels_that_flip_is_dpo_of_the_right_ones_on_average():
    for e in (0.05, 0.2, 0.45):
        right, flipped = (loss_of("robust", points, label_smoothing=e) for points in (POINTS, SWAPPED))
        assert torch.allclose((1 - e) * right + e * flipped, loss_of("sigmoid", POINTS), atol=1e-9)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "step_dpo"])
def test_cdpo_is_the_mixture_of_dpo_of_both_labels(name):
    right, flipped = loss_of("sigmoid", POINTS), loss_of("sigmoid", SWAPPED)
    assert not torch.allclose(right, flipped)
    for e in (0.0, 0.1, 0.5):
        mixture = (1 - e) * right + e * flipped
        assert torch.allclose(loss_of(name, POINTS, label_smoothing=e), mixture, atol=1e-9)


def test_swapping_the_labels_adds_the_margin_to_dpo():
    margins = torch.tensor([0.1 * (c - r) for c, r in POINTS], dtype=torch.float64)
    assert torch.allclose(loss_of("sigmoid", SWAPPED), loss_of("sigmoid", POINTS) + margins)


def test_exo_of_swapped_labels_is_exo_with_the_smoothing_turned_round():
    swapped = loss_of("exo", SWAPPED, label_smoothing=0.2)
    assert torch.allclose(swapped, loss_of("exo", POINTS, label_smoothing=0.8))
    assert (swapped >= 0).all()  # a KL divergence
    zero = [(math.log(4) / 0.1, 0)]  # where sigma(m) = 0.8 are the smoothed labels themselves
    assert loss_of("exo", zero, label_smoothing=0.2).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name, settings", CASES)
def test_losses_of_the_margin_alone_ignore_a_shift_of_both_and_the_others_do_not(name, settings):
    shifted = loss_of(name, [(c + 40, r + 40) for c, r in POINTS], **settings)
    same = torch.allclose(loss_of(name, POINTS, **settings), shifted)
    margin_alone = "sigmoid robust hinge exo discopop sigmoid_norm tdpo2 step_dpo".split()
    assert same == (name in margin_alone)


def test_sppo_is_0_at_its_targets_for_any_beta():
    for beta in (0.01, 0.1, 2.0):
        assert loss_of("sppo", [(0.5 / beta, -0.5 / beta)], beta=beta).item() == pytest.approx(0, abs=1e-20)


def test_preferred_counts_ties_half():
    margins = torch.tensor([3.0, 0.001, 0.0, 1e-5, -1e-5, -0.001, -3.0])
    assert dpo.preferred(margins).tolist() == [1, 1, 0.5, 0.5, 0.5, 0, 0]


# Models and pairs -------------------------------------------------------------------------------------------


@functools.cache
def stock(name):
    """A model of tiny/ as plain transformers loads it: nothing in here knows of packed rows."""
    folder = Path(dpo.__file__).parent / name
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def alone(model, sequence):
    """Log-probs (list of scalars) of the trained tokens of one sequence, the shift written out."""
    logits = model(input_ids=torch.tensor(sequence.input_ids[None]).long(), use_cache=False).logits[0]
    logprobs = logits.log_softmax(-1)
    positions = np.flatnonzero(sequence.trained)
    return [logprobs[position - 1, int(sequence.input_ids[position])] for position in positions]


def loop_logps(name, pairs):
    """(P, 2) summed log-probs by `alone`, float64."""
    with torch.no_grad():
        found = [[sum(x.double() for x in alone(stock(name), answer)) for answer in pair] for pair in pairs]
    return torch.tensor(found, dtype=torch.float64)


@functools.cache
def tiny_rows():
    path = Path(dpo.__file__).parent / "tiny" / "data" / "preference_train.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[:200]]


@functools.cache
def tiny_tokenizer():
    return dpo.load_tokenizer(dpo.Args())


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


def small_model(config_class, seed, attn, **changes):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = config_class(**sizes, **heads, **changes)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()


def grads_of(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close_grads(one, other, rtol=1e-4):
    assert one.keys() == other.keys()
    for name in one:
        scale = other[name].abs().max().item()
        assert scale > 0 and (one[name] - other[name]).abs().max().item() <= rtol * scale, name


@pytest.mark.parametrize("chunk_size", [1, 4, 512])
def test_logprobs_and_kls_are_those_of_a_plain_loop_and_so_are_the_gradients(one_cpu, chunk_size):
    pairs = random_pairs(0)
    kinds = {"policy": (Qwen3Config, 0, {"tie_word_embeddings": True}), "ref": (LlamaConfig, 1, {})}
    build = lambda kind, attn: small_model(*kinds[kind][:2], attn, **kinds[kind][2])
    policy, ref, plain, plain_ref = (
        build(kind, attn) for attn in ("packed", "eager") for kind in ("policy", "ref")
    )
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
    assert_close_grads(grads_of(policy), grads_of(plain))


def test_only_what_both_prompts_begin_with_and_neither_answer_trains_is_shared():
    def shared(prompt, other_prompt, *answers):
        both = zip((prompt, other_prompt), answers, strict=True)
        sequences = [(np.array(b + a), np.arange(len(b + a)) >= len(b)) for b, a in both]
        return dpo.shared_prompt(dpo.Pair(*(dpo.Sequence(*s) for s in sequences)), SHARED)

    assert shared([5, 6, 7, 8], [5, 6, 7, 8], [9, 8], [7]) == 4
    assert shared([5, 6, 7, 8], [4, 6, 7, 8], [9, 8], [7]) == 0
    assert shared([5, 6, 7, 8], [5, 6, 3, 8], [9, 8], [7]) == 2
    assert shared([5, 6, 7], [5, 6, 7], [9, 8], [9, 7]) == 3


# Data -------------------------------------------------------------------------------------------------------

ASK = [{"role": "user", "content": "What is 1 and 2?"}]


def say_so(text):
    return [{"role": "assistant", "content": text}]


def read(row, reader=dpo.read_pair):
    row = reader(row)
    return row["prompt"], row["chosen"], row["rejected"]


HH = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: What is 1 and 2?\n\nAssistant:"
TALK = [{"role": "user", "content": "Hi."}, *say_so("Hello."), *ASK]
TWO = {"chosen": say_so("3"), "rejected": say_so("4")}
WHOLE = {"chosen": [*ASK, *say_so("3")], "rejected": [*ASK, *say_so("4")]}


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "1 and 2 are", "chosen": " 3", "rejected": " 30"}, ("1 and 2 are", " 3", " 30")),
        ({"prompt": ASK, **TWO}, (ASK, *TWO.values())),
        ({"prompt": ASK, "chosen": "3", "rejected": say_so("4")}, (ASK, *TWO.values())),
        ({"prompt": "1 and 2?", "chosen": 3, "rejected": 4}, ("1 and 2?", "3", "4")),
        ({"question": "What is 1 and 2?", "chosen": "3", "rejected": "4"}, (ASK, *TWO.values())),
        # Without a prompt: whole words of texts, whole messages of conversations.
        ({"chosen": "2? It is three.", "rejected": "2? It is thirty."}, ("2? It is", " three.", " thirty.")),
        ({"chosen": "2? It is", "rejected": "2? It is 3."}, ("2? It", " is", " is 3.")),
        ({"chosen": "2? It is it.", "rejected": "2? It isn't."}, ("2? It", " is it.", " isn't.")),
        ({"chosen": "2?\nThree.", "rejected": "2?\nThirty."}, ("2?", "\nThree.", "\nThirty.")),
        (WHOLE, (ASK, *TWO.values())),
        ({"prompt": "What is 1 and 2?", **WHOLE}, (ASK, *TWO.values())),  # UltraFeedback
        # Anthropic's HH: the prompt ends at the last "Assistant:", though the replies begin alike.
        (
            {"chosen": f"{HH} It is three.", "rejected": f"{HH} It is thirty."},
            (TALK, say_so("It is three."), say_so("It is thirty.")),
        ),
    ],
    ids=str,
)
def test_prompt_and_answers_of_a_row(row, expected):
    assert read(row) == expected


def test_columns_that_are_not_understood_are_named_beside_those_that_are(tmp_path, capsys):
    for bad in ({"foo": 1, "bar": 2}, {"prompt": "a", "chosen": "b"}):
        with pytest.raises(SystemExit) as stop:
            pairs_of(tmp_path, [bad])
        [line] = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and all(name in line for name in bad)
        assert "prompt + chosen + rejected" in line


def test_answers_are_cut_behind_the_first_step_that_differs():
    texts = {"prompt": "p", "chosen": "a\nb\nc", "rejected": "a\nx"}
    talks = {"prompt": ASK, "chosen": say_so("a\nb\nc"), "rejected": say_so("a\nx\nc")}
    assert read(texts, dpo.read_step) == ("p", "a\nb", "a\nx")
    assert read(talks, dpo.read_step) == (ASK, say_so("a\nb"), say_so("a\nx"))
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
    row = {"prompt": ASK, "chosen": say_so(chosen), "rejected": say_so(rejected)}
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
    reasons = {
        3: (row("It is 3.", "It is 3."), "chosen and rejected are the same"),
        4: (row("5", "6", score_chosen=7.0, score_rejected=7.0), "a tie: score_chosen equals"),
        5: (row("3", "4 " * 60), "longer than --max-length"),
        6: (row("", "3"), "an assistant turn is empty"),
        7: ({"chosen": f"{HH} 3", "rejected": HH}, "an assistant turn is empty"),
    }
    # A repeated pair counts once; one the other way round is another.
    rows = [row("3", "4 5 6 7 8")] * 2 + [bad for bad, _ in reasons.values()] + [row("4 5 6 7 8", "3")]
    rows += [row(str(n), "9") for n in range(4)]
    pairs = pairs_of(tmp_path, rows, max_length=60)
    out = capsys.readouterr().out
    for n, (_, reason) in reasons.items():
        assert re.search(rf"\d rows dropped, first row {min(n, 6)}: {reason}", out)
    assert len(pairs) == 6 and "6 different pairs" in out and "chosen ones longer in 17%" in out
    assert [spans(answer) for answer in pairs[1]] == [["4 5 6 7 8<|im_end|>"], ["3<|im_end|>"]]


# Runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(monkeypatch, tmp_path, one_cpu):
    """train(rows, **flags) -> output folder, lines of metrics.jsonl; train.models: weakly, as loaded."""
    load_model = dpo.load_model

    def loaded(*rest, **more):
        model = load_model(*rest, **more)
        run.models.append(weakref.ref(model))
        run.kept += [model] * run.keep
        return model

    def run(rows, held_out=None, **flags):
        folder = tmp_path / f"run_{run.count}"
        run.count += 1
        path = write_rows(tmp_path / f"train_{run.count}.jsonl", rows)
        defaults = {"dataset": (path,), "output_dir": str(folder), "beta": 0.1, "learning_rate": 1e-4}
        defaults |= {"batch_size": 4, "max_steps": 2, "eval_every": 0, "num_eval": 0, "save_every": 0}
        defaults |= {"max_completion_length": 0, "warmup_steps": 0, "lr_schedule": "constant"}
        if held_out:
            defaults["eval_dataset"] = write_rows(tmp_path / "held_out.jsonl", held_out)
        run.models.clear(), run.kept.clear()
        args = dpo.Args(**(defaults | flags))
        dpo.main(args)
        return Path(args.output_dir), read_lines(Path(args.output_dir) / "metrics.jsonl")

    run.models, run.kept, run.count, run.keep = [], [], 0, False
    monkeypatch.setattr(dpo, "load_model", loaded)
    return run


TIMES = ("tokens_per_second", "step_time")
PACKING = ("num_tokens", "packing/fill")


def assert_same_metrics(one, other, *, without=TIMES, tolerance=1e-4):
    assert len(one) == len(other)
    for line, wanted in zip(one, other, strict=True):
        assert line.keys() == wanted.keys()
        keys = [key for key in wanted if key not in without]
        values = [wanted[key] for key in keys]
        assert [line[key] for key in keys] == pytest.approx(values, rel=1e-4, abs=tolerance)


def test_settings_of_memory_and_speed_do_not_change_the_metrics(train):
    rows, held_out = tiny_rows()[:10], tiny_rows()[20:24]
    flags = {"max_steps": 3, "learning_rate": 1e-3}
    _, plain = train(rows, held_out, **flags)
    losses = [line["loss"] for line in plain[1:]]
    assert losses[0] == pytest.approx(LN2, abs=1e-4) and len(set(losses)) == 3
    for changes in ({"ref": "live"}, {"attn": "eager"}):
        _, lines = train(rows, held_out, **flags, **changes)
        assert_same_metrics(lines, plain, without=(*TIMES, *PACKING))
        more = lines[-1]["num_tokens"] / plain[-1]["num_tokens"]  # a prompt stands in a packed row once
        assert more > 1.25 if "attn" in changes else more == 1


@pytest.mark.parametrize("ref", ["cached", "live"])
def test_other_reference_gives_the_rewards_of_both_models_log_probs(train, tmp_path, ref):
    rows, held_out = tiny_rows()[:6], tiny_rows()[20:28]
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
    expected = {
        "eval/accuracy": right.mean().item(),
        "eval/accuracy_length_matched": right[alike].mean().item(),
        "eval/margin": margins.mean().item(),
        "eval/chosen_log_ratio": ratios[:, 0].mean().item(),
    }
    assert {key: lines[0][key] for key in expected} == pytest.approx(expected, abs=1e-3)
    samples = [sample for sample in read_lines(folder / "samples.jsonl") if sample["step"] == 0]
    assert lines[0]["eval/reward"] == np.mean([sample["right"] for sample in samples])
    assert 0 < lines[0]["eval/mean_length"] < 10 and len(samples) == 8


def test_nothing_is_said_of_pairs_of_equal_length_where_there_are_none_nor_of_samples_that_are_not_drawn(
    train,
):
    held_out = [{"prompt": ASK, "chosen": "3", "rejected": "It is 4 5 6 7 8."}]
    _, lines = train(tiny_rows()[:4], held_out, max_steps=1)
    assert lines[0].keys() == {"step", "eval/accuracy", "eval/margin", "eval/chosen_log_ratio"}


def test_tdpo_run_takes_the_kls_of_its_answers(train, tmp_path):
    rows = tiny_rows()[:4]
    pairs, kls = pairs_of(tmp_path, rows), []
    with torch.no_grad():
        for sequence in itertools.chain(*pairs):
            ids = torch.tensor(sequence.input_ids).long()[None]
            models = [stock(name) for name in ("tiny/sft", "tiny/base")]
            log_p, log_q = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in models)
            at = [position - 1 for position in np.flatnonzero(sequence.trained)]
            kls.append((log_q[at].exp() * (log_q[at] - log_p[at])).sum().item())
    losses = []
    for k, (chosen, rejected) in enumerate(loop_logps("tiny/sft", pairs) - loop_logps("tiny/base", pairs)):
        margin = 0.1 * float(chosen - rejected) - 0.25 * 0.1 * (kls[2 * k + 1] - kls[2 * k])
        losses.append(math.log1p(math.exp(-margin)))
    flags = {"ref": "live", "ref_model": "tiny/base", "max_steps": 1, "loss": "tdpo2", "tdpo_alpha": 0.25}
    assert train(rows, **flags)[1][1]["loss"] == pytest.approx(np.mean(losses), rel=1e-3)


@pytest.mark.parametrize(
    "flags, loads, alive",
    [
        ({}, 1, 1),
        ({"dtype": "bfloat16"}, 1, 1),  # sharded by FSDP2, whose modules refer to each other
        ({"ref_model": "tiny/base", "dtype": "bfloat16"}, 2, 1),
        ({"ref": "live"}, 2, 2),
    ],
    ids=str,
)
def test_reference_has_left_the_memory_before_training_unless_it_is_live(
    train, monkeypatch, flags, loads, alive
):
    counts, clip = [], torch.nn.utils.clip_grad_norm_

    def counted(*rest):
        counts.append((len(train.models), sum(model() is not None for model in train.models)))
        return clip(*rest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", counted)
    train(tiny_rows()[:4], tiny_rows()[20:24], **flags)
    assert set(counts) == {(loads, alive)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sync_moves_the_live_reference_every_so_many_steps(train, dtype):
    train.keep = True
    flags = {"ref": "live", "learning_rate": 1e-3, "sync_ref_every": 2, "sync_ref_alpha": 0.5, "dtype": dtype}
    train(tiny_rows()[:4], max_steps=2, **flags)
    assert isinstance(train.kept[0], FSDPModule) == (dtype == "bfloat16")
    whole = lambda p: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
    policy, ref = ({n: whole(p) for n, p in model.named_parameters()} for model in train.kept)
    for name, start_weight in stock("tiny/sft").named_parameters():
        before = start_weight.to(ref[name].dtype).float()  # in which the reference is kept
        expected = ((before + policy[name]) / 2).to(ref[name].dtype)
        assert torch.allclose(ref[name], expected, atol=1e-7, rtol=1e-2 if dtype == "bfloat16" else 1e-5)
        assert not torch.equal(policy[name], start_weight)
    train(tiny_rows()[:4], max_steps=1, **flags)
    ref = dict(train.kept[1].named_parameters())
    assert all(torch.equal(ref[n], p.to(ref[n].dtype)) for n, p in stock("tiny/sft").named_parameters())


def test_continued_run_with_a_moving_reference_is_the_uninterrupted_one(train):
    flags = {
        "ref": "live",
        "sync_ref_every": 1,
        "sync_ref_alpha": 0.3,
        "learning_rate": 1e-3,
        "save_every": 2,
    }
    rows = tiny_rows()[:10]
    _, whole = train(rows, max_steps=4, **flags)
    folder, _ = train(rows, max_steps=2, **flags)
    flags["dataset"] = tuple(json.loads((folder / "args.json").read_text())["dataset"])
    _, lines = train(rows, max_steps=4, output_dir=str(folder), resume=True, **flags)
    assert_same_metrics(lines, whole, tolerance=1e-6)


def test_model_in_bfloat16_with_long_answers_starts(train):
    long = "17 + 46 = 63\n" * 60
    rows = [{"prompt": ASK, "chosen": f"{long}#### {n}", "rejected": f"{long}no {n}"} for n in range(4)]
    _, lines = train(rows, dtype="bfloat16")
    assert lines[1]["loss"] == pytest.approx(LN2, abs=0.05)
    assert all(math.isfinite(x) for x in lines[-1].values())


# Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, flags",
    [
        (r"tdpo2 .*--ref live", {"loss": "tdpo2"}),
        (r"--sync-ref-every .*--ref live", {"sync_ref_every": 2}),
        (r"robust .*below 0\.5", {"loss": "robust", "label_smoothing": 0.5}),
        (r"exo .*above 0", {"loss": "exo"}),
        (r"--label-smoothing means nothing to --loss hinge", {"loss": "hinge", "label_smoothing": 0.1}),
    ],
)
def test_flags_that_mean_nothing_together_end_the_run_with_one_line(capsys, pattern, flags):
    with pytest.raises(SystemExit) as stop:
        dpo.Args(**flags)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and re.search(pattern, line)


def test_reference_with_another_tokenizer_is_refused(random_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dpo, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        dpo.main(dpo.Args(ref_model=str(random_model), output_dir=str(tmp_path / "run")))
    assert stop.value.code == 2 and re.search("--ref-model .* another vocabulary", capsys.readouterr().err)


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
