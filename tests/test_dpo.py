"""dpo.py: its losses, packed pairs, preference data, the cached reference, its errors, and short runs.

Losses are held against numbers worked by hand from the papers, log-probs against a loop over log_softmax of
the stock model on one sequence at a time; only a setting that changes nothing is held against its absence.
"""

import functools
import gc
import inspect
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
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import dpo
import ipo_kto_simpo_orpo
from common import completion_states, head_settings, token_logprobs

LN2, CPU = math.log(2), torch.device("cpu")
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
    ("tdpo1",): (0.798139, 0.554355, 0.974077),  # the KLs are 1 (chosen) and 3 (rejected)
    ("tdpo2", ("tdpo_alpha", 0.5)): (0.744397, 0.513015, 0.913015),
    ("tdpo2", ("tdpo_alpha", 0.25)): (0.718460, 0.493249, 0.883382),
    ("step_dpo",): (0.693147, 0.474077, 0.854355),
}
CASES = [pytest.param(*key, id="-".join(map(str, (key[0], *dict(key[1:]).values())))) for key in BY_HAND]
CASES = [pytest.param(case.values[0], dict(case.values[1:]), id=case.id) for case in CASES]


def kls_of(name, chosen=1.0, rejected=3.0, size=1):
    kls = {"chosen_kls": chosen, "rejected_kls": rejected}
    full = {key: torch.full((size,), value, dtype=torch.float64) for key, value in kls.items()}
    return full if name.startswith("tdpo") else {}


def logps_of(ratios, dtype=torch.float64):
    """Four log-probs with the given log-ratios (chosen, rejected) and references that differ."""
    chosen, rejected = torch.tensor(ratios, dtype=dtype).T
    ref_chosen, ref_rejected = torch.full_like(chosen, -12.0), torch.full_like(chosen, -17.0)
    return chosen + ref_chosen, rejected + ref_rejected, ref_chosen, ref_rejected


def loss_of(name, ratios, **settings):
    kls = kls_of(name, size=len(ratios))
    return dpo.LOSSES[name](*logps_of(ratios), beta=settings.pop("beta", 0.1), **kls, **settings)


@pytest.mark.parametrize("name, settings", CASES)
def test_losses_by_hand_at_the_reference_and_beside_it(name, settings):
    values = loss_of(name, [(0, 0), (2, -3), (-4, -1)], **settings)
    assert values.tolist() == pytest.approx(BY_HAND[(name, *settings.items())], abs=2e-6)


def test_every_loss_has_numbers_by_hand():
    assert {key[0] for key in BY_HAND} == set(dpo.LOSSES)


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_tdpo_at_equal_kls_is_dpo(name):
    alpha = {"tdpo_alpha": 0.5} if name == "tdpo2" else {}
    for size in (0.0, 7.0):
        four, kls = logps_of([(0, 0), (2, -3)]), kls_of(name, size, size, 2)
        values = dpo.LOSSES[name](*four, beta=0.1, **kls, **alpha)
        assert values.tolist() == pytest.approx([LN2, 0.474077], abs=2e-6)


def test_hinge_is_0_behind_a_margin_of_1_and_has_no_gradient_there():
    four = [x.requires_grad_() for x in logps_of([(20, 5), (20, 15)])]
    losses = dpo.hinge_loss(*four, beta=0.1)
    assert losses.tolist() == pytest.approx([0, 0.5])
    losses.sum().backward()
    assert four[0].grad.tolist() == pytest.approx([0, -0.1]) and four[1].grad.tolist() == pytest.approx(
        [0, 0.1]
    )


@pytest.mark.parametrize("name, settings", CASES)
def test_gradients_are_those_of_finite_differences(name, settings):
    # The KLs held fixed: TDPO2's definition has a stop-gradient, which finite differences do not see.
    points = [(2, -3), (-4, -1), (0.5, 1.5), (-2, 3)]
    chosen, rejected, *refs = logps_of(points)
    kls = kls_of(name, size=len(points))
    function = lambda c, r: dpo.LOSSES[name](c, r, *refs, beta=0.1, **kls, **settings)
    c, r = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    grads = torch.autograd.grad(function(c, r).sum(), (c, r))
    for which, h in itertools.product((0, 1), (1e-5,)):
        up, down = [chosen, rejected], [chosen, rejected]
        up[which], down[which] = up[which] + h, down[which] - h
        numerical = (function(*up) - function(*down)) / (2 * h)
        assert torch.allclose(grads[which], numerical, rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradcheck(function, (c, r))


def test_direction_in_which_each_loss_moves_the_answers_at_the_reference():
    def slopes(name, settings):
        chosen, rejected, *refs = logps_of([(0.0, 0.0)])
        two, kls = (chosen.requires_grad_(), rejected.requires_grad_()), kls_of(name)
        losses = dpo.LOSSES[name](*two, *refs, beta=0.1, **kls, **settings)
        return [grad.item() for grad in torch.autograd.grad(losses.sum(), two)]

    for name, settings in (case.values for case in CASES):
        chosen, rejected = slopes(name, settings)
        if name == "apo_down":  # sigma(b c) + 1 - sigma(b (c - r)): the two slopes in c cancel at 0
            assert (chosen, rejected) == pytest.approx((0, 0.025))
        elif settings.get("discopop_tau") == 0.05:
            # Not convex: its switch, of slope 1 / (4 tau), goes from ln 2 to 1 here: margins first fall.
            slope = 0.1 * (-0.75 + (1 - LN2) / (4 * 0.05))
            assert (chosen, rejected) == pytest.approx((slope, -slope)) and slope > 0
        else:
            assert chosen < 0 < rejected, name
    assert slopes("dpop", {"dpop_lambda": 50.0}) == pytest.approx([-0.05, 0.05])  # no penalty yet


def test_dpo_gradient_is_the_weight_of_the_paper():
    # Below Eq. 7: each log-prob moves by beta sigma(-m), most where the implicit rewards have it wrong.
    c, r, *refs = logps_of([(2, -3), (-4, -1)])
    c.requires_grad_(), r.requires_grad_()
    dpo.dpo_loss(c, r, *refs, beta=0.1).sum().backward()
    weights = [0.1 / (1 + math.exp(0.5)), 0.1 / (1 + math.exp(-0.3))]
    assert c.grad.tolist() == pytest.approx([-x for x in weights]) and r.grad.tolist() == pytest.approx(
        weights
    )


def test_tdpo1_has_gradient_into_both_kls_and_tdpo2_only_into_the_rejected_one():
    def grads(name, **alpha):
        kls = {key: value.requires_grad_() for key, value in kls_of(name).items()}
        loss = dpo.LOSSES[name](*logps_of([(2, -3)]), beta=0.1, **kls, **alpha).sum()
        found = torch.autograd.grad(loss, list(kls.values()), allow_unused=True)
        return [0 if grad is None else grad.item() for grad in found]

    # -log sigma(x): slope -sigma(-x) with x = 0.3 and 0.4 here, times beta, times alpha
    one, two = 0.1 / (1 + math.exp(0.3)), 0.5 * 0.1 / (1 + math.exp(0.4))
    assert grads("tdpo1") == pytest.approx([-one, one])
    assert grads("tdpo2", tdpo_alpha=0.5) == pytest.approx([0, two])


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
    margin_alone = "sigmoid robust hinge exo discopop sigmoid_norm tdpo1 tdpo2 step_dpo".split()
    assert same == (name in margin_alone)


@pytest.mark.parametrize("name", ["bco", "sppo", "apo_zero"])
def test_losses_of_each_answer_by_itself_treat_good_and_bad_alike(name):
    mirrored = [(-r, -c) for c, r in POINTS]
    assert torch.allclose(loss_of(name, mirrored), loss_of(name, POINTS))
    assert not torch.allclose(loss_of(name, SWAPPED), loss_of(name, POINTS))


def test_sppo_is_0_at_its_targets_for_any_beta():
    for beta in (0.01, 0.1, 2.0):
        assert loss_of("sppo", [(0.5 / beta, -0.5 / beta)], beta=beta).item() == pytest.approx(0, abs=1e-20)


def test_nca_alone_is_least_at_a_finite_chosen_reward():
    # d/dr [-log sigma(r) - log sigma(-r) / 2] = 0 at sigma(r) = 2/3, so r = ln 2
    at = [loss_of("nca", [((LN2 + d) / 0.1, 0)]).item() for d in (-0.1, 0, 0.1)]
    assert at[1] < at[0] and at[1] < at[2]


def test_length_normalized_dpo_of_equally_long_answers_is_dpo_with_beta_over_the_length():
    length = 7
    averages = [x / length for x in logps_of(POINTS)]
    normalized = dpo.sigmoid_norm_loss(*averages, beta=3.5, label_smoothing=0.1)
    assert torch.allclose(normalized, loss_of("sigmoid", POINTS, beta=0.5, label_smoothing=0.1))


def test_dpop_is_dpo_where_the_chosen_answer_is_not_below_the_reference():
    above = [(c, r) for c, r in POINTS if c >= 0]
    below = [(c, r) for c, r in POINTS if c < 0]
    assert len(above) == len(below) == 3
    assert torch.equal(loss_of("dpop", above, dpop_lambda=50.0), loss_of("sigmoid", above))
    assert (loss_of("dpop", below, dpop_lambda=50.0) > loss_of("sigmoid", below) + 1).all()


def test_losses_stay_finite_far_from_the_reference():
    for name, settings in (case.values for case in CASES):
        losses = [loss_of(name, [pair], **settings) for pair in ((300.0, -300.0), (-300.0, 300.0))]
        assert all(torch.isfinite(loss).all() for loss in losses), name


def test_preferred_counts_ties_half():
    margins = torch.tensor([3.0, 0.001, 0.0, 1e-5, -1e-5, -0.001, -3.0])
    assert dpo.preferred(margins).tolist() == [1, 1, 0.5, 0.5, 0.5, 0, 0]


def test_chosen_loss_gets_the_flags_that_it_takes():
    for name in dpo.LOSSES:
        flags = {"ref": "live", "label_smoothing": 0.2 if name in ("sigmoid", "robust", "exo") else None}
        args = dpo.Args(loss=name, beta=0.3, dpop_lambda=9.0, discopop_tau=0.7, tdpo_alpha=0.9, **flags)
        function, settings = dpo.choose_loss(args)
        assert settings["beta"] == 0.3
        assert settings.get("label_smoothing", 0.2) == (0.2 if flags["label_smoothing"] else 0.0) or (
            "label_smoothing" not in settings
        )
        own = {"dpop": {"dpop_lambda": 9.0}, "discopop": {"discopop_tau": 0.7}, "tdpo2": {"tdpo_alpha": 0.9}}
        extra = {k: v for k, v in settings.items() if k not in ("beta", "label_smoothing")}
        assert extra == own.get(name, {})
        inspect.signature(function).bind(*[0] * 4, **settings, **kls_of(name))


# CHES -------------------------------------------------------------------------------------------------------


def test_ches_by_hand():
    # h_w sums to (4, 2) over 2 tokens -> (2, 1); h_l sums to (3, 9) over 3 -> (1, 3): <> = 5, |h_w|^2 = 5.
    # second pair: (2, 0) over 1; (8, 4) over 4 -> (2, 1): 4 - 4 = 0; third: (0, 3) over 3; (-5, 5) over 1
    chosen = torch.tensor([[4.0, 2.0], [2.0, 0.0], [0.0, 3.0]])
    rejected = torch.tensor([[3.0, 9.0], [8.0, 4.0], [-5.0, 5.0]])
    scores = dpo.ches_scores(chosen, rejected, torch.tensor([2, 1, 3]), torch.tensor([3, 4, 1]))
    assert scores.tolist() == [0, 0, 4]  # 5 - 1


def test_ches_scores_equal_a_loop_over_tokens():
    rng = np.random.default_rng(0)
    answers = [[rng.integers(-3, 4, (n, 5)) for n in lengths] for lengths in ((2, 4), (3, 1), (5, 5))]
    sums = [torch.tensor(np.array([pair[which].sum(0) for pair in answers])).float() for which in (0, 1)]
    counts = [torch.tensor([len(pair[which]) for pair in answers]) for which in (0, 1)]
    expected = []
    for chosen, rejected in answers:  # the double sum of the definition, token by token
        across = np.mean([[h @ other for other in rejected] for h in chosen])
        within = np.mean([[h @ other for other in chosen] for h in chosen])
        expected.append(across - within)
    assert dpo.ches_scores(*sums, *counts).tolist() == pytest.approx(expected, abs=1e-5)


# Models and pairs -------------------------------------------------------------------------------------------


@functools.cache
def stock(name):
    """A model of tiny/ as plain transformers loads it: nothing in here knows of packed rows."""
    folder = Path(dpo.__file__).parent / name
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def packed(name="tiny/sft"):
    folder = Path(dpo.__file__).parent / name
    options = {"dtype": torch.float32, "attn_implementation": "packed"}
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


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@functools.cache
def tiny_rows():
    path = Path(dpo.__file__).parent / "tiny" / "data" / "preference_train.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[:200]]


@functools.cache
def tiny_tokenizer():
    return dpo.load_tokenizer(dpo.Args())


def pairs_of(tmp_path, rows, **flags):
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    args = dpo.Args(dataset=(path,), **flags)
    return dpo.load_preferences(tiny_tokenizer(), args)[0]


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


def spans(sequence):
    """The text of the runs of trained tokens."""
    cuts = np.flatnonzero(np.diff(sequence.trained)) + 1
    runs = zip(np.split(sequence.input_ids, cuts), np.split(sequence.trained, cuts), strict=True)
    return [tiny_tokenizer().decode(ids) for ids, trained in runs if trained[0]]


def small_model(config_class, seed, attn, **changes):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            config_class(**sizes, **heads, **changes), attn_implementation=attn
        ).eval()


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
    batch = dpo.collate_pairs(pairs, CPU)
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


def test_reference_of_tdpo_gets_no_gradient(one_cpu):
    policy, ref = (small_model(Qwen3Config, seed, "packed") for seed in (0, 1))
    batch = dpo.collate_pairs(random_pairs(0), CPU)
    logps, ref_logps, kls = dpo.answer_logps(policy, ref, batch, "tdpo1")
    assert logps.requires_grad and kls["chosen_kls"].requires_grad and not ref_logps.requires_grad
    (logps.sum() + sum(kls.values()).sum()).backward()
    assert all(parameter.grad is None for parameter in ref.parameters())


def test_sequential_kls_of_both_answers_are_sums_over_their_tokens(one_cpu):
    pairs = random_pairs(3)
    policy, ref = (small_model(Qwen3Config, seed, "packed") for seed in (0, 1))
    logps, ref_logps, kls = dpo.answer_logps(policy, ref, dpo.collate_pairs(pairs, CPU), "tdpo2")
    for which, key in enumerate(("chosen_kls", "rejected_kls")):
        for k, answer in enumerate(pair[which] for pair in pairs):
            ids, kl = torch.tensor(answer.input_ids).long()[None], 0
            log_p, log_q = (m(input_ids=ids).logits[0].log_softmax(-1) for m in (policy, ref))
            for position in np.flatnonzero(answer.trained):
                kl += (log_q[position - 1].exp() * (log_q - log_p)[position - 1]).sum().item()
            assert kls[key][k].item() == pytest.approx(kl, rel=1e-4)
            for found, model in ((logps, policy), (ref_logps, ref)):
                assert found[k, which].item() == pytest.approx(sum(alone(model, answer)).item(), rel=1e-4)


def test_live_reference_gives_log_probs_without_and_the_policy_with_gradient(one_cpu):
    pairs = random_pairs(3)
    policy, ref = (small_model(Qwen3Config, seed, "packed") for seed in (0, 1))
    batch = dpo.collate_pairs(pairs, CPU)
    logps, ref_logps, kls = dpo.answer_logps(policy, ref, batch, "sigmoid")
    for found, model in ((logps, policy), (ref_logps, ref)):
        expected = [[sum(alone(model, answer)).item() for answer in pair] for pair in pairs]
        assert found.tolist() == [pytest.approx(row, rel=1e-4) for row in expected]
    assert kls == {} and logps.requires_grad and not ref_logps.requires_grad


@pytest.mark.parametrize("share_prompt", [False, True])
@pytest.mark.parametrize("budget", [1, 150, 8192])
def test_pair_logps_equal_a_loop_over_log_softmax_for_any_rows(tmp_path, one_cpu, budget, share_prompt):
    pairs = pairs_of(tmp_path, tiny_rows()[:7])
    args = dpo.Args(max_tokens_per_micro_batch=budget, share_prompt=share_prompt)
    found = dpo.pair_logps(packed(), pairs, args, CPU)
    assert found.tolist() == [
        pytest.approx(row, abs=1e-3, rel=1e-5) for row in loop_logps("tiny/sft", pairs).tolist()
    ]
    assert not found.requires_grad


def test_pair_sums_put_the_chosen_answer_first(one_cpu):
    pairs = random_pairs(5)
    swapped = [dpo.Pair(pair.rejected, pair.chosen) for pair in pairs]
    model = small_model(LlamaConfig, 0, "packed")
    one, other = (
        dpo.pair_sums(token_logprobs(model, batch), batch)
        for batch in (dpo.collate_pairs(some, CPU) for some in (pairs, swapped))
    )
    assert torch.allclose(one, other.flip(1), atol=1e-4) and (one[:, 0] - one[:, 1]).abs().min() > 0.1


def test_pair_sums_of_ones_count_the_tokens():
    pairs = random_pairs(6, count=5)
    batch = dpo.collate_pairs(pairs, CPU)
    sums = dpo.pair_sums(torch.ones(batch.num_completion_tokens), batch)
    assert sums.tolist() == [[float(answer.trained.sum()) for answer in pair] for pair in pairs]
    assert dpo.count_tokens(pairs).tolist() == sums.tolist()


def test_row_without_pairs_trains_nothing_and_sums_to_0():
    batch = dpo.collate_pairs([], CPU)
    assert batch.num_completion_tokens == 0
    assert dpo.pair_sums(torch.zeros(0), batch).tolist() == [[0, 0]]


def test_shared_prompt_gives_the_same_log_probs_and_gradients_from_fewer_tokens(one_cpu):
    pairs = random_pairs(7, count=4)
    weights = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    results = {}
    for share in (False, True):
        model, batch = small_model(Qwen3Config, 0, "packed"), dpo.collate_pairs(pairs, CPU, share)
        logps = dpo.pair_sums(token_logprobs(model, batch), batch)
        (weights * logps).sum().backward()
        results[share] = logps.detach(), grads_of(model), batch.input_ids.shape[1]
    plain = small_model(Qwen3Config, 0, "eager")
    sums = torch.stack([torch.stack([sum(alone(plain, answer)) for answer in pair]) for pair in pairs])
    (weights * sums).sum().backward()
    for logps, grads, _ in results.values():
        assert torch.allclose(logps, sums, rtol=1e-5, atol=1e-4)
        assert_close_grads(grads, grads_of(plain))
    prompts = [int(pair.chosen.trained.argmax()) for pair in pairs]
    assert results[False][2] - results[True][2] == sum(prompts) > 0
    for share in (False, True):
        assert results[share][2] == sum(dpo.row_length(pair, share) for pair in pairs)


def test_only_what_both_prompts_begin_with_is_shared(one_cpu):
    one, other = (ids for ids in random_pairs(8, count=2))

    def pair(prompt, other_prompt, answers=([9, 8], [7])):
        sequences = []
        for beginning, answer in zip((prompt, other_prompt), answers, strict=True):
            input_ids = np.array(beginning + answer, np.int32)
            sequences.append(dpo.Sequence(input_ids, np.arange(len(input_ids)) >= len(beginning)))
        return dpo.Pair(*sequences)

    cases = {
        4: pair([5, 6, 7, 8], [5, 6, 7, 8]),
        0: pair([5, 6, 7, 8], [4, 6, 7, 8]),
        2: pair([5, 6, 7, 8], [5, 6, 3, 8]),
        3: pair([5, 6, 7], [5, 6, 7], ([9, 8], [9, 7])),  # what is trained is never shared
    }
    assert {n: dpo.shared_prompt(p) for n, p in cases.items()} == {n: n for n in cases}
    pairs, model = [one, *cases.values(), other], small_model(Qwen3Config, 0, "packed")
    plain = small_model(Qwen3Config, 0, "eager")
    batch = dpo.collate_pairs(pairs, CPU, True)
    found = dpo.pair_sums(token_logprobs(model, batch), batch)
    expected = [[sum(alone(plain, answer)).item() for answer in p] for p in pairs]
    assert found.tolist() == [pytest.approx(row, abs=1e-4) for row in expected]


def test_ches_filter_drops_the_most_alike_pairs_first_and_keeps_the_order(tmp_path, one_cpu, capsys):
    question = {"prompt": [{"role": "user", "content": "Ella has 17 carrots and finds 46. How many?"}]}
    answer = lambda text: [{"role": "assistant", "content": text}]
    good = "17 + 46 = 63\n#### 63"
    texts = ["17 + 46 = 63\n#### 64", "You are a fool.", "17 + 46 = 63\n#### 65", "How slow you must be!"]
    rows = [question | {"chosen": answer(good), "rejected": answer(text)} for text in texts]
    pairs = pairs_of(tmp_path, rows)
    scores = []
    for pair in pairs:  # the definition, from the stock model's states
        sums = []
        for ids, trained in pair:
            output = stock("tiny/sft")(input_ids=torch.tensor(ids[None]).long(), output_hidden_states=True)
            states = output.hidden_states[-1][0].detach().numpy().astype(np.float64)
            sums.append(sum(states[n - 1] for n in np.flatnonzero(trained)) / trained.sum())
        scores.append(sums[0] @ sums[1] - sums[0] @ sums[0])
    assert {0, 2} == set(np.argsort(scores)[2:].tolist())
    for budget in (1, 8192):
        args = dpo.Args(ches_filter_fraction=0.5, max_tokens_per_micro_batch=budget)
        capsys.readouterr()
        kept = dpo.ches_filter(pairs, "tiny/sft", args, tiny_tokenizer(), CPU)
        assert [id(pair) for pair in kept] == [id(pairs[1]), id(pairs[3])]
        told = re.search(r"2 of 4 pairs dropped.*mean (\S+) before, (\S+) after", capsys.readouterr().out)
        means = [float(number) for number in told.groups()]
        assert means == pytest.approx([np.mean(scores), np.mean([scores[1], scores[3]])], rel=0.01)
    order = np.argsort(scores)
    args = dpo.Args(ches_filter_fraction=0.26)  # rounded down: at most the share that was asked for
    kept = dpo.ches_filter(pairs, "tiny/sft", args, tiny_tokenizer(), CPU)
    assert [id(pair) for pair in kept] == [id(pairs[i]) for i in range(4) if i != order[-1]]


# Data -------------------------------------------------------------------------------------------------------

ASK = [{"role": "user", "content": "What is 1 and 2?"}]


def say_so(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def read(tmp_path):
    """read(row, ...) -> (prompt, chosen, rejected) of each."""

    def run(*rows, reader=None, limit=0):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        found = (reader or dpo.read_preferences)(path, "train", None, limit)
        run.where = [where.removeprefix(path) for where, _ in found]
        return [tuple(row.get(key) for key in ("prompt", "chosen", "rejected")) for _, row in found]

    return run


def test_prompt_and_answers_are_read_as_they_are(read):
    texts = {"prompt": "1 and 2 are", "chosen": " 3", "rejected": " 30"}
    talks = {"prompt": ASK, "chosen": say_so("It is 3."), "rejected": say_so("It is 4.")}
    assert read(texts, talks) == [tuple(texts.values()), tuple(talks.values())]
    assert read.where == [", row 1", ", row 2"] and len(read(texts, talks, limit=1)) == 1


def test_question_is_what_a_user_asks(read):
    asked = [{"role": "user", "content": "1 and 2?"}]
    assert read({"question": "1 and 2?", "chosen": "3", "rejected": "4"}) == [(asked, "3", "4")]
    both = {"question": "no", "prompt": "1 and 2?", "chosen": "3", "rejected": "4"}
    assert read(both) == [("1 and 2?", "3", "4")]


def test_implicit_prompt_of_texts_ends_with_a_whole_word(read):
    beginning = "\n\nHuman: What is 1 and 2?\n\nAssistant:"
    row = {"chosen": f"{beginning} It is three.", "rejected": f"{beginning} It is thirty."}
    assert read(row) == [(f"{beginning} It is", " three.", " thirty.")]
    row = {"chosen": f"{beginning}\nThree.", "rejected": f"{beginning}\nThirty."}
    assert read(row) == [(beginning, "\nThree.", "\nThirty.")]


@pytest.mark.parametrize(
    "chosen, rejected",
    [
        (" isn't.", " is it."),
        (" is it.", " isn't."),
        (" is", " is 3."),
        (" is 3.", " is"),
    ],
)
def test_implicit_prompt_does_not_end_inside_a_word_of_either_answer(read, chosen, rejected):
    found = read({"chosen": f"1 and 2? It{chosen}", "rejected": f"1 and 2? It{rejected}"})
    assert found == [("1 and 2? It", chosen, rejected)]


def test_implicit_prompt_of_messages_is_what_both_conversations_begin_with(read):
    before = [{"role": "system", "content": "Be brief."}, *ASK]
    row = {"chosen": [*before, *say_so("3")], "rejected": [*before, *say_so("4")]}
    assert read(row) == [(before, say_so("3"), say_so("4"))]


def test_ultrafeedback_rows_hold_the_whole_conversation_beside_a_prompt(read):
    row = {"chosen": [*ASK, *say_so("3")], "rejected": [*ASK, *say_so("4")], "score_chosen": 8.0}
    assert read({"prompt": ASK[0]["content"], **row}) == [(ASK, say_so("3"), say_so("4"))]
    assert read({"prompt": ASK, **row}) == [(ASK, say_so("3"), say_so("4"))]


def test_identical_conversations_are_dropped_as_such(tmp_path, capsys):
    same = [*ASK, *say_so("3")]
    rows = [{"chosen": same, "rejected": [*ASK, *say_so("4")]}, {"chosen": same, "rejected": same}]
    assert len(pairs_of(tmp_path, rows)) == 1
    assert "1 dropped as identical answers" in capsys.readouterr().out


def test_unknown_columns_end_the_run_with_their_names_and_the_row(tmp_path, capsys):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for bad in ({"foo": 1, "bar": 2}, {"prompt": "a", "chosen": "b"}, {"chosen": None, "rejected": "c"}):
        path = write_rows(tmp_path / "rows.jsonl", [good, bad])
        for reader in (dpo.read_preferences, dpo.read_steps):
            with pytest.raises(SystemExit) as stop:
                reader(path, "train", None, 0)
            [line] = capsys.readouterr().err.splitlines()
            assert stop.value.code == 2 and "rows.jsonl, row 2" in line and ", ".join(bad) in line
            assert "prompt + chosen + rejected" in line


@pytest.mark.parametrize(
    "bad",
    [
        5,
        {"chosen": 5, "rejected": 6},
        {"prompt": "a", "chosen": 5, "rejected": "b"},
    ],
    ids=str,
)
def test_rows_of_the_wrong_type_are_named(tmp_path, capsys, bad):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, bad]
    with pytest.raises(SystemExit) as stop:
        pairs_of(tmp_path, rows)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and re.search(r"pairs\.jsonl, row 2\b", line)


def labelled(prompt, *steps):
    """A row of labelled steps; a wrong one is written with ! before it."""
    labels = [not step.startswith("!") for step in steps]
    return {"prompt": prompt, "completions": [step.lstrip("!") for step in steps], "labels": labels}


def test_first_wrong_step_is_set_against_a_right_one_that_follows_the_same_steps(read):
    rows = [
        labelled("p", "k", "l"),
        labelled("p", "a", "b", "c"),
        labelled("q", "a", "!b"),  # alone with its prompt: no right answer to set against it
        labelled("p", "a", "!x", "!y"),
        labelled("p", "a", "!z"),
        labelled("p", "!w"),
        labelled("p", "a", "b", "!d"),  # the third step of row 2 is right
        labelled("p", "a", "b", "c", "!e"),  # no answer has a fourth step
    ]
    expected = [("p", "a\nb", "a\nx"), ("p", "a\nb", "a\nz"), ("p", "k", "w"), ("p", "a\nb\nc", "a\nb\nd")]
    assert read(*rows, reader=dpo.read_steps) == expected
    assert read.where == [", row 4", ", row 5", ", row 6", ", row 7"]


def test_labelled_steps_without_two_answers_to_compare_are_an_error(read, capsys):
    with pytest.raises(SystemExit) as stop:
        read(labelled("p", "a", "!b"), labelled("q", "a", "b"), reader=dpo.read_steps)
    assert stop.value.code == 2 and "no two answers" in capsys.readouterr().err


def test_answers_in_steps_are_cut_behind_the_first_that_differs(read):
    lists = {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["a", "x", "y", "z"]}
    texts = {"prompt": "p", "chosen": "a\nb\nc", "rejected": "a\nx"}
    talks = {"prompt": ASK, "chosen": say_so("a\nb\nc"), "rejected": say_so("a\nx\nc")}
    continued = {"prompt": "p", "chosen": "a\nb\nc", "rejected": "a\nb"}
    found = read(lists, texts, talks, continued, reader=dpo.read_steps)
    assert found == [("p", "a\nb", "a\nx"), ("p", "a\nb", "a\nx"), (ASK, "a\nb", "a\nx")]


@pytest.mark.parametrize("kind", ["messages", "texts"])
def test_step_dpo_trains_the_first_step_that_differs_and_no_end_token(tmp_path, kind):
    chosen, rejected = "17 + 46 = 63\n63 - 5 = 58\n#### 58", "17 + 46 = 63\n5 + 46 = 51\n#### 51"
    row = {"prompt": ASK, "chosen": say_so(chosen), "rejected": say_so(rejected)}
    if kind == "texts":
        row = {"prompt": "17 and 46?\n", "chosen": chosen, "rejected": rejected}
    [pair] = pairs_of(tmp_path, [row], loss="step_dpo")
    assert [[text.strip("\n") for text in spans(answer)] for answer in pair] == [
        ["63 - 5 = 58"],
        ["5 + 46 = 51"],
    ]
    for answer in pair:
        assert (
            answer.trained[-1]
            and not np.isin(answer.input_ids[answer.trained], tiny_tokenizer().end_ids).any()
        )
        assert (
            tiny_tokenizer().decode(answer.input_ids[~answer.trained]).rstrip("\n").endswith("17 + 46 = 63")
        )
    [whole] = pairs_of(tmp_path, [row])
    assert all(np.isin(answer.input_ids[answer.trained], tiny_tokenizer().end_ids).any() for answer in whole)


def test_beginning_that_two_steps_share_plays_no_part_in_the_margin(tmp_path, one_cpu):
    # Its tokens have the same log-probs in both answers, so the loss may leave them out.
    row = {"prompt": ASK, "chosen": say_so("1 + 2 = 3\n#### 3"), "rejected": say_so("1 + 2 = 4\n#### 4")}
    [pair] = pairs_of(tmp_path, [row], loss="step_dpo")
    whole = [{**row, "chosen": say_so("1 + 2 = 3"), "rejected": say_so("1 + 2 = 4")}]
    [steps] = pairs_of(tmp_path, whole)
    ends = [int(np.flatnonzero(np.isin(s.input_ids, tiny_tokenizer().end_ids) & s.trained)[0]) for s in steps]
    steps = dpo.Pair(*(dpo.Sequence(*(x[:n] for x in s)) for s, n in zip(steps, ends, strict=True)))
    margins = [
        float(logps[0, 0] - logps[0, 1]) for logps in (loop_logps("tiny/sft", [p]) for p in (pair, steps))
    ]
    assert margins[0] == pytest.approx(margins[1], abs=1e-4) and abs(margins[0]) > 0.1


def test_dropped_pairs_are_counted_by_reason(tmp_path, capsys):
    row = lambda chosen, rejected, **more: {"prompt": ASK, "chosen": chosen, "rejected": rejected, **more}
    rows = [
        row("3", "4 5 6 7 8"),
        row("3", "4 5 6 7 8"),  # again
        row("4 5 6 7 8", "3"),  # the other way round is another pair
        row("It is 3.", "It is 3."),
        row("5", "6", score_chosen=7.0, score_rejected=7.0),
        row("6", "5", score_chosen=7.0, score_rejected=7.0),
        row("5", "7 8 9", score_chosen=7.0, score_rejected=6.0),
        row("3", "4 " * 60),
        row("4 " * 60, "3"),
        row("4 " * 61, "3"),
    ]
    pairs = pairs_of(tmp_path, rows, max_length=60)
    [line] = capsys.readouterr().out.splitlines()
    assert len(pairs) == 3 and "pairs.jsonl: 3 pairs, " in line
    for part in (
        "1 dropped as duplicates",
        "1 dropped as identical answers",
        "2 dropped as ties",
        "3 dropped as longer than 60 tokens",
        "chosen longer in 33%, rejected in 67%",
    ):
        assert part in line
    assert [
        [text.removesuffix("<|im_end|>") for text in map("".join, map(spans, pair))] for pair in pairs
    ] == [
        ["3", "4 5 6 7 8"],
        ["4 5 6 7 8", "3"],
        ["5", "7 8 9"],
    ]
    assert len(pairs_of(tmp_path, rows, max_length=60, dedupe=False)) == 4
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        pairs_of(tmp_path, rows, max_length=3)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "no pair is left" in line and "2 dropped as ties" in line


def test_overlong_answers_are_cut_on_request(tmp_path, capsys):
    rows = [{"prompt": ASK, "chosen": "3", "rejected": "4 " * 60}]
    [pair] = pairs_of(tmp_path, rows, max_length=50, overlong="truncate")
    assert (
        len(pair.rejected.input_ids) == 50 and pair.rejected.trained[-1] and len(pair.chosen.input_ids) < 50
    )
    assert "1 cut to 50 tokens" in capsys.readouterr().out


def by_prompt(numbers):
    ask = lambda n: [{"role": "user", "content": f"What is {n} and 2?"}]
    rows = [(n, k) for n, count in numbers.items() for k in range(count)]
    return [{"prompt": ask(n), "chosen": f"{n} is {k}", "rejected": f"no {k}"} for n, k in rows]


def keys_of(pairs):
    return [tuple(answer.input_ids.tobytes() for answer in pair) for pair in pairs]


def test_held_out_fraction_keeps_all_pairs_of_a_prompt_on_one_side(tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", by_prompt(dict.fromkeys(range(10, 16), 3)))
    sides = []
    for seed in range(4):
        args = dpo.Args(dataset=(path,), eval_fraction=0.4, seed=seed, num_eval=0)
        pairs, held_out = dpo.load_preferences(tiny_tokenizer(), args)
        prompts = [
            {re.search(r"is (\d+) and", tiny_tokenizer().decode(p.chosen.input_ids))[1] for p in some}
            for some in (pairs, held_out)
        ]
        assert len(pairs) == 9 and len(held_out) == 9  # 3 of 6 prompts: 2.4, rounded up
        assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 6
        assert len(set(keys_of(pairs) + keys_of(held_out))) == 18
        sides.append(frozenset(prompts[1]))
        assert re.search(r"held out: 3 of 6 prompts.*\b9\b", capsys.readouterr().out)
    assert len(set(sides)) > 1  # drawn with the seed
    again = dpo.load_preferences(tiny_tokenizer(), args)
    assert keys_of(again[1]) == keys_of(held_out)
    args.num_eval = 2
    assert len(dpo.load_preferences(tiny_tokenizer(), args)[1]) == 2


def test_held_out_fraction_of_steps_keeps_a_prompt_on_one_side_though_its_answers_begin_differently(tmp_path):
    rows = []
    for n in range(12):  # two pairs to each prompt, whose right steps differ
        ask = [{"role": "user", "content": f"What is {n} and 2?"}]
        for first in ("Let me see.", "So be it."):
            chosen, rejected = f"{first}\n{n} + 2 = {n + 2}", f"{first}\n2 - {n} = 0"
            rows.append({"prompt": ask, "chosen": chosen, "rejected": rejected})
    path = write_rows(tmp_path / "rows.jsonl", rows)
    args = dpo.Args(dataset=(path,), eval_fraction=0.5, loss="step_dpo", num_eval=0)
    pairs, held_out = dpo.load_preferences(tiny_tokenizer(), args)
    prompts = [
        {re.search(r"is (\d+) and", tiny_tokenizer().decode(p.chosen.input_ids))[1] for p in some}
        for some in (pairs, held_out)
    ]
    assert not prompts[0] & prompts[1] and len(prompts[0]) == len(prompts[1]) == 6


def test_pairs_with_a_held_out_prompt_are_counted(tmp_path, capsys):
    train = write_rows(tmp_path / "train.jsonl", by_prompt({10: 2, 11: 1, 12: 4}))
    held_out = write_rows(tmp_path / "eval.jsonl", by_prompt({10: 1, 11: 3, 13: 2}))
    dpo.load_preferences(tiny_tokenizer(), dpo.Args(dataset=(train,), eval_dataset=held_out))
    assert re.search(r"warning: 3\b.*training.*held out", capsys.readouterr().out)
    dpo.load_preferences(tiny_tokenizer(), dpo.Args(dataset=(train,)))
    assert "warning" not in capsys.readouterr().out


def test_answers_are_alike_in_length_up_to_a_tenth_of_the_longer_one():
    counts = np.array([[10, 9], [9, 10], [10, 8], [100, 90], [100, 89], [1, 1]])
    assert dpo.equal_lengths(counts).tolist() == [True, True, False, True, False, True]


# Cached reference -------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, one_cpu, monkeypatch):
    """cache(name, pairs, **flags) -> log-probs; cache.loads counts the models that were loaded for it."""
    load_model = dpo.load_model

    def counted(*rest):
        run.loads += 1
        return load_model(*rest)

    def run(name, pairs, tokenizer=None, **flags):
        args = dpo.Args(cache_dir=str(tmp_path / "cache"), **flags)
        return dpo.cached_logps(name, pairs, args, tokenizer or tiny_tokenizer(), CPU)

    run.loads = 0
    monkeypatch.setattr(dpo, "load_model", counted)
    return run


def test_second_run_reads_the_log_probs_and_loads_no_model(cache, tmp_path, monkeypatch):
    pairs = pairs_of(tmp_path, tiny_rows()[:5])
    first = cache("tiny/sft", pairs)
    assert first.tolist() == [pytest.approx(row, abs=1e-3) for row in loop_logps("tiny/sft", pairs).tolist()]
    monkeypatch.setattr(dpo, "load_model", lambda *_: pytest.fail("the cache was not used"))
    assert torch.equal(cache("tiny/sft", pairs), first)
    assert torch.equal(cache("tiny/sft", pairs, beta=0.5, seed=9, max_tokens_per_micro_batch=64), first)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npy"]


def test_cache_is_another_for_every_thing_that_log_probs_depend_on(cache, tmp_path, tiny):
    rows = [{"prompt": ASK, "chosen": "3", "rejected": "4 5 6 7 8 9 10 11 12 13"}, *tiny_rows()[:3]]
    pairs, copy = pairs_of(tmp_path, rows), tmp_path / "copy"
    shutil.copytree(tiny / "sft", copy)
    base = cache("tiny/sft", pairs)
    assert (
        torch.equal(cache(str(copy), pairs), base) and cache.loads == 1
    )  # the weights count, not their place
    weights = load_file(copy / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] * 1.5
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert not torch.allclose(cache(str(copy), pairs), base) and cache.loads == 2
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    cache(str(copy), pairs)
    assert cache.loads == 3
    template = tmp_path / "template.jinja"
    template.write_text((tiny / "sft" / "chat_template.jinja").read_text() + "{{ '\n' }}")
    tokenizer = dpo.load_tokenizer(dpo.Args(chat_template=str(template)))
    path = write_rows(tmp_path / "rows.jsonl", rows)
    others = {
        "data": pairs_of(tmp_path, tiny_rows()[1:4]),
        "order": pairs[::-1],
        "swapped": [dpo.Pair(pair.rejected, pair.chosen) for pair in pairs],
        "template": dpo.load_pairs(tokenizer, path, "train", dpo.Args(dataset=(path,)))[0],
        "max_length": pairs_of(tmp_path, rows, max_length=40, overlong="truncate"),
        "trained": [
            dpo.Pair(*(dpo.Sequence(s.input_ids, s.trained & (np.arange(len(s.trained)) > 40)) for s in pair))
            for pair in pairs[1:]
        ],
    }
    for n, (what, other) in enumerate(others.items(), 4):
        cache("tiny/sft", other)
        assert cache.loads == n, what
    eager = cache("tiny/sft", pairs, attn="eager")
    assert cache.loads == 10 and torch.allclose(eager, base, atol=1e-3)
    assert len(list((tmp_path / "cache").iterdir())) == 10


# Runs -------------------------------------------------------------------------------------------------------


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def train(monkeypatch, tmp_path, one_cpu):
    """train(rows, **flags) -> output folder, lines of metrics.jsonl; train.models: weakly, as loaded."""
    load_model = dpo.load_model

    def loaded(name, *rest):
        model = load_model(name, *rest)
        run.models.append(weakref.ref(model))
        if run.keep:
            run.kept.append(model)
        return model

    def run(rows, held_out=None, **flags):
        folder = tmp_path / f"run_{run.count}"
        run.count += 1
        path = write_rows(tmp_path / f"train_{run.count}.jsonl", rows)
        defaults = {"dataset": (path,), "output_dir": str(folder), "cache_dir": str(tmp_path / "cache")}
        defaults |= {
            "beta": 0.1,
            "learning_rate": 1e-4,
        }  # those of the numbers by hand
        defaults |= {"batch_size": 4, "max_steps": 2, "eval_every": 0, "num_eval": 4, "save_every": 0}
        defaults |= {"max_completion_length": 8, "warmup_steps": 0, "lr_schedule": "constant"}
        if held_out:
            defaults["eval_dataset"] = write_rows(tmp_path / "held_out.jsonl", held_out)
        args = dpo.Args(**(defaults | flags))
        run.models.clear(), run.kept.clear()
        run.result = dpo.main(args)
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
        assert [line[key] for key in keys] == pytest.approx(
            [wanted[key] for key in keys], rel=1e-4, abs=tolerance
        )


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"ref": "live"}, id="live"),
        pytest.param({"max_tokens_per_micro_batch": 128}, id="rows"),
        pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param({"attn": "eager"}, id="eager"),
        pytest.param({"share_prompt": True}, id="shared"),
        pytest.param({"share_prompt": True, "ref": "live"}, id="shared-live"),
    ],
)
def test_settings_of_memory_and_speed_do_not_change_the_metrics(train, changes):
    rows, held_out = tiny_rows()[:10], tiny_rows()[20:24]
    flags = {"max_steps": 3, "learning_rate": 1e-3}
    _, plain = train(rows, held_out, **flags)
    losses = [line["loss"] for line in plain[1:]]
    assert losses[0] == pytest.approx(LN2, abs=1e-4) and len(set(losses)) == 3
    _, lines = train(rows, held_out, **flags, **changes)
    assert_same_metrics(lines, plain, without=(*TIMES, *PACKING))
    ratio = lines[-1]["num_tokens"] / plain[-1]["num_tokens"]
    assert ratio < 0.8 if "share_prompt" in changes else ratio == 1


def by_hand(policy, ref, beta=0.1):
    """Rewards of the chosen and rejected answers from (P, 2) log-probs of two models."""
    return beta * (policy - ref)


@pytest.mark.parametrize("ref", ["cached", "live"])
def test_other_reference_gives_the_rewards_of_both_models_log_probs(train, tmp_path, ref):
    rows, held_out = tiny_rows()[:6], tiny_rows()[20:28]
    pairs, others = pairs_of(tmp_path, rows), pairs_of(tmp_path, held_out)
    flags = {"ref_model": "tiny/base", "batch_size": 6, "learning_rate": 1e-3, "ref": ref, "num_eval": 0}
    folder, lines = train(rows, held_out, **flags)
    policy = loop_logps("tiny/sft", pairs)
    rewards = by_hand(policy, loop_logps("tiny/base", pairs))
    margins = rewards[:, 0] - rewards[:, 1]
    loss = sum(math.log1p(math.exp(-margin)) for margin in margins.tolist()) / 6
    assert abs(loss - LN2) > 0.05
    expected = {
        "loss": loss,
        "rewards/chosen": rewards[:, 0].mean().item(),
        "rewards/rejected": rewards[:, 1].mean().item(),
        "rewards/margins": margins.mean().item(),
        "rewards/accuracies": (margins > 0).double().mean().item(),
        "rewards/ties": 0.0,
        "logps/chosen": policy[:, 0].mean().item(),
        "logps/rejected": policy[:, 1].mean().item(),
        "logps/chosen_drift": 0.0,  # from the policy's own start, not from the reference
    }
    assert {key: lines[1][key] for key in expected} == pytest.approx(expected, abs=1e-3)
    drift = lines[2]["logps/chosen"] - lines[1]["logps/chosen"]  # the same pairs in every batch
    assert lines[2]["logps/chosen_drift"] == pytest.approx(drift, abs=1e-3) and abs(drift) > 0.01
    ratios = loop_logps("tiny/sft", others) - loop_logps("tiny/base", others)
    margins = 0.1 * (ratios[:, 0] - ratios[:, 1])
    counts = np.array([[answer.trained.sum() for answer in pair] for pair in others])
    alike = torch.tensor([abs(c - r) <= 0.1 * max(c, r) for c, r in counts.tolist()])
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
    assert lines[0]["eval/mean_length"] == np.mean([sample["length"] for sample in samples])
    assert lines[0]["eval/mean_length"] <= 8


def test_policy_that_is_its_reference_ties_everywhere(train):
    _, lines = train(tiny_rows()[:4], tiny_rows()[20:24], max_steps=1)
    assert lines[0]["eval/accuracy"] == 0.5 and lines[0]["eval/margin"] == pytest.approx(0, abs=1e-4)
    assert lines[1]["rewards/accuracies"] == 0.5 and lines[1]["rewards/ties"] == 1
    assert lines[1]["logps/chosen_drift"] == pytest.approx(0, abs=1e-3)
    assert lines[1]["loss"] == pytest.approx(LN2, abs=1e-4)


def test_length_normalized_run_divides_by_the_tokens_of_each_answer(train, tmp_path):
    rows, held_out = tiny_rows()[:6], tiny_rows()[20:24]
    pairs, others = pairs_of(tmp_path, rows), pairs_of(tmp_path, held_out)
    flags = {"ref_model": "tiny/base", "batch_size": 6, "max_steps": 1, "beta": 5.0}
    _, lines = train(rows, held_out, loss="sigmoid_norm", **flags)

    def margins_of(some):
        counts = torch.tensor([[int(answer.trained.sum()) for answer in pair] for pair in some])
        ratios = (loop_logps("tiny/sft", some) - loop_logps("tiny/base", some)) / counts
        return (5.0 * (ratios[:, 0] - ratios[:, 1])).tolist()

    margins = margins_of(pairs)
    assert lines[1]["rewards/margins"] == pytest.approx(np.mean(margins), abs=1e-3)
    assert lines[1]["loss"] == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in margins]), abs=1e-3)
    assert lines[0]["eval/margin"] == pytest.approx(np.mean(margins_of(others)), abs=1e-3)


def test_run_is_a_plain_loop_over_the_stock_model(train, tmp_path):
    rows = tiny_rows()[:4]  # all in every batch
    flags = {"max_steps": 3, "learning_rate": 1e-3, "max_grad_norm": 0.5, "weight_decay": 0.1}
    _, lines = train(rows, lr_schedule="linear", max_tokens_per_micro_batch=100, **flags)
    pairs = pairs_of(tmp_path, rows)
    ref = loop_logps("tiny/sft", pairs)
    folder = Path(dpo.__file__).parent / "tiny" / "sft"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    for line, rate in zip(lines[1:], (1e-3, 2e-3 / 3, 1e-3 / 3), strict=True):
        losses = []
        for pair, (ref_chosen, ref_rejected) in zip(pairs, ref.tolist(), strict=True):
            chosen, rejected = (sum(alone(model, answer)) for answer in pair)
            margin = 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))
            losses.append(torch.log1p(torch.exp(-margin)))
        loss = torch.stack(losses).mean()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        assert line["learning_rate"] == pytest.approx(rate)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-3)
        assert line["grad_norm"] == pytest.approx(grad_norm, rel=1e-2)
    assert lines[3]["loss"] < lines[2]["loss"] < lines[1]["loss"] == pytest.approx(LN2, abs=1e-4)
    assert lines[3]["rewards/accuracies"] == 1


@pytest.mark.parametrize("name", list(dpo.LOSSES))
def test_every_loss_begins_at_its_value_at_the_reference_and_learns(train, name):
    settings = {"robust": 0.1, "exo": 1e-3}.get(name)
    key = next(k for k in BY_HAND if k[0] == name)  # the defaults are the first of each
    at_reference = LN2 if name in ("tdpo1", "tdpo2") else BY_HAND[key][0]  # both KLs are 0 there
    flags = {"ref": "live"} if name.startswith("tdpo") else {}
    _, lines = train(tiny_rows()[:4], loss=name, label_smoothing=settings, learning_rate=1e-4, **flags)
    assert lines[1]["loss"] == pytest.approx(at_reference, rel=1e-3)
    assert all(math.isfinite(x) for x in lines[2].values())
    # DPOP: the penalty begins once an answer is below the reference. DiscoPOP: not convex, see above.
    assert name == "dpop" or lines[2]["loss"] < lines[1]["loss"]
    assert (lines[2]["rewards/margins"] < 0) == (name == "discopop")


def test_tdpo_run_takes_the_kls_of_its_answers(train, tmp_path):
    rows = tiny_rows()[:4]
    flags = {"ref": "live", "ref_model": "tiny/base", "max_steps": 1}
    pairs, kls = pairs_of(tmp_path, rows), []
    with torch.no_grad():
        for sequence in itertools.chain(*pairs):
            ids = torch.tensor(sequence.input_ids).long()[None]
            log_p, log_q = (
                stock(n)(input_ids=ids).logits[0].double().log_softmax(-1) for n in ("tiny/sft", "tiny/base")
            )
            at = [position - 1 for position in np.flatnonzero(sequence.trained)]
            kls.append((log_q[at].exp() * (log_q[at] - log_p[at])).sum().item())
    rewards = by_hand(loop_logps("tiny/sft", pairs), loop_logps("tiny/base", pairs)).tolist()
    for name, weight in (("tdpo1", 1.0), ("tdpo2", 0.25)):
        losses = []
        for k, (chosen, rejected) in enumerate(rewards):
            margin = chosen - rejected - weight * 0.1 * (kls[2 * k + 1] - kls[2 * k])
            losses.append(math.log1p(math.exp(-margin)))
        _, lines = train(rows, loss=name, tdpo_alpha=0.25, **flags)
        assert lines[1]["loss"] == pytest.approx(np.mean(losses), rel=1e-3)


def test_sft_coef_adds_the_mean_nll_of_the_chosen_tokens_of_the_batch(train, tmp_path):
    rows = tiny_rows()[:5]
    tokens = [x for pair in pairs_of(tmp_path, rows) for x in alone(stock("tiny/sft"), pair.chosen)]
    nll = -sum(x.item() for x in tokens) / len(tokens)
    assert nll > 0.01
    for budget in (8192, 60):  # rows of one pair: the mean is over the tokens of all
        flags = {"max_steps": 1, "batch_size": 5, "max_tokens_per_micro_batch": budget}
        plain, added = (train(rows, sft_coef=coef, **flags)[1][1] for coef in (0.0, 2.5))
        assert added["loss"] - plain["loss"] == pytest.approx(2.5 * nll, abs=1e-4)
        assert added["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-2)
        assert added["rewards/margins"] == pytest.approx(plain["rewards/margins"], abs=1e-4)


def test_other_pairs_log_probs_in_the_cache_end_the_run_at_step_1(train, tmp_path, capsys):
    rows = tiny_rows()[:4]
    train(rows, max_steps=1)
    [path] = (tmp_path / "cache").iterdir()
    right = np.load(path)
    np.save(path, right + np.array([[3.0, 0.0]], np.float32))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(rows, max_steps=1)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "step 1" in line and "0.3 on average" in line and "--cache-dir" in line
    assert not (tmp_path / "run_1" / "model").exists()
    np.save(path, right + np.array([[3.0, 3.0]], np.float32))  # no margin, but not the reward of BCO
    with pytest.raises(SystemExit) as stop:
        train(rows, max_steps=1, loss="bco")
    assert stop.value.code == 2
    np.save(
        path, right + np.array([[3.0, 0.0], [-3.0, 0.0]] * 2, np.float32)
    )  # margins that cancel on average
    with pytest.raises(SystemExit) as stop:
        train(rows, max_steps=1)
    assert stop.value.code == 2
    np.save(path, right)
    train(rows, max_steps=1)


@pytest.mark.parametrize(
    "ref, ref_model, alive",
    [("cached", None, 1), ("cached", "tiny/base", 1), ("live", None, 2)],
)
def test_reference_has_left_the_memory_before_training_unless_it_is_live(
    train, monkeypatch, ref, ref_model, alive
):
    counts, collate_pairs = [], dpo.collate_pairs

    def counted(*rest):
        counts.append((sum(model() is not None for model in train.models), len(train.models)))
        return collate_pairs(*rest)

    monkeypatch.setattr(dpo, "collate_pairs", counted)
    gc.collect()
    gc.disable()  # it must go by itself: the collector may not come before memory runs out
    try:
        train(tiny_rows()[:4], tiny_rows()[20:24], ref=ref, ref_model=ref_model)
    finally:
        gc.enable()
    assert counts[-1][0] == alive and max(count for count, _ in counts) == alive
    loads = {("cached", None): 3, ("cached", "tiny/base"): 4, ("live", None): 2}[ref, ref_model]
    assert counts[-1][1] == loads  # of training and held-out pairs, start and reference, and the policy


def test_reference_moves_by_alpha_of_the_way_to_the_policy():
    policy, ref = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    policy.weight.data, ref.weight.data = torch.tensor([[4.0, -8.0]]), torch.tensor([[0.0, 2.0]])
    dpo.move_reference(ref, policy, 0.75)
    assert ref.weight.tolist() == [[3.0, -5.5]] and policy.weight.tolist() == [[4.0, -8.0]]
    dpo.move_reference(ref, policy, 1.0)
    assert ref.weight.tolist() == [[4.0, -8.0]]
    policy.weight.data += 1
    assert ref.weight.tolist() == [[4.0, -8.0]]  # a copy, not the same memory


def test_sync_moves_the_live_reference_every_so_many_steps(train):
    train.keep = True
    flags = {"ref": "live", "learning_rate": 1e-3, "sync_ref_every": 2, "sync_ref_alpha": 0.5}
    before = {name: weight.clone() for name, weight in stock("tiny/sft").named_parameters()}
    train(tiny_rows()[:4], max_steps=2, **flags)
    ref, policy = (dict(model.named_parameters()) for model in train.kept[-2:])
    for name, start in before.items():
        assert torch.allclose(ref[name], (start + policy[name]) / 2, atol=1e-7)
        assert not torch.equal(policy[name], start)
    train(tiny_rows()[:4], max_steps=1, **flags)
    ref = dict(train.kept[-2].named_parameters())
    assert all(torch.equal(ref[name], start) for name, start in before.items())


def test_reference_that_is_replaced_sends_the_margins_back_to_0_and_leaves_the_drift(train):
    flags = {"ref": "live", "learning_rate": 1e-3, "max_steps": 4, "sync_ref_every": 2, "sync_ref_alpha": 1.0}
    _, lines = train(tiny_rows()[:4], **flags)  # the same pairs in every batch
    ties = [line["loss"] == pytest.approx(LN2, abs=1e-4) for line in lines[1:]]
    assert ties == [True, False, True, False]
    for line in lines[2:]:
        drift = line["logps/chosen"] - lines[1]["logps/chosen"]
        assert line["logps/chosen_drift"] == pytest.approx(drift, abs=1e-3) and abs(drift) > 0.01


@pytest.mark.parametrize(
    "sync",
    [
        pytest.param({}, id="cached"),
        pytest.param({"ref": "live", "sync_ref_every": 1, "sync_ref_alpha": 0.3}, id="sync"),
    ],
)
def test_continued_run_is_the_uninterrupted_one(train, sync):
    flags = {"learning_rate": 1e-3, "save_every": 2, **sync}
    rows = tiny_rows()[:10]
    _, whole = train(rows, max_steps=4, **flags)
    folder, _ = train(rows, max_steps=2, **flags)
    _, lines = train(rows, max_steps=4, output_dir=str(folder), resume=True, **flags)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert_same_metrics(lines, whole, tolerance=1e-6)


@pytest.mark.parametrize("flags, warnings", [({"loss": "apo_down"}, 1), ({"sft_coef": 10.0}, 0)], ids=str)
def test_displacement_is_warned_of_once(train, monkeypatch, capsys, flags, warnings):
    monkeypatch.setattr(dpo, "DISPLACED_STEPS", 2)
    _, lines = train(tiny_rows()[:4], learning_rate=3e-4, max_steps=5, **flags)
    rewards = [line["rewards/chosen"] for line in lines[2:]]
    assert all((reward < 0) == bool(warnings) for reward in rewards), rewards  # else the test shows nothing
    assert capsys.readouterr().out.count("likelihood displacement") == warnings


def test_ches_filter_of_a_run_drops_pairs_by_the_reference(train, capsys):
    _, lines = train(tiny_rows()[:8], ches_filter_fraction=0.5, num_epochs=1, max_steps=0)
    assert "CHES: 4 of 8 pairs dropped" in capsys.readouterr().out
    assert lines[-1]["step"] == 1 and lines[-1]["epoch"] == 1


# Errors -----------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """refused(pattern, **flags): one line on stderr, exit status 2, no model loaded, nothing written."""

    def run(pattern, **flags):
        monkeypatch.setattr(dpo, "load_model", lambda *_: pytest.fail("a model was loaded"))
        defaults = {"dataset": (write_rows(tmp_path / "rows.jsonl", tiny_rows()[:4]),)}
        defaults |= {"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache")}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            dpo.main(dpo.Args(**(defaults | flags)))
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1, lines
        assert lines[0].startswith("error: ") and re.search(pattern, lines[0]), lines[0]
        assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()

    return run


@pytest.mark.parametrize(
    "pattern, flags",
    [
        (r"tdpo1 .*--ref live", {"loss": "tdpo1"}),
        (r"tdpo2 .*--ref live", {"loss": "tdpo2"}),
        (r"robust .*below 0\.5", {"loss": "robust", "label_smoothing": 0.5}),
        (r"exo .*above 0", {"loss": "exo", "label_smoothing": 0.0}),
        (r"--label-smoothing means nothing to --loss hinge", {"loss": "hinge", "label_smoothing": 0.1}),
        (r"--sync-ref-every .*--ref live", {"sync_ref_every": 2}),
        (r"--eval-fraction and --eval-dataset", {"eval_fraction": 0.1, "eval_dataset": "a.jsonl"}),
        (r"--eval-fraction must lie in", {"eval_fraction": 1.0}),
        (r"--ches-filter-fraction must lie in", {"ches_filter_fraction": 1.0}),
        (r"--beta must be above 0", {"beta": 0.0}),
        (r"--batch-size must be at least 1", {"batch_size": 0}),
        (r"--resume needs --output-dir", {"resume": True, "output_dir": None}),
        (r"--ref-model \./nowhere: no such folder", {"ref_model": "./nowhere"}),
        (r"--ref-model no/such_model: ", {"ref_model": "no/such_model"}),
        (r"--eval-fraction 0\.99 leaves no pair", {"eval_fraction": 0.99}),
        (r"nowhere\.jsonl: no such file", {"dataset": ("nowhere.jsonl",)}),
        (r"nowhere\.jsonl: no such file", {"eval_dataset": "nowhere.jsonl"}),
    ],
)
def test_mistakes_end_the_run_with_one_line_before_a_model_is_loaded(refused, pattern, flags):
    refused(pattern, **flags)


def test_reference_with_another_tokenizer_is_refused(refused, random_model):
    refused(r"--ref-model .*tokenizer is not that of --model tiny/sft", ref_model=str(random_model))


def test_gsm8k_solutions_become_pairs_as_the_page_says_and_train_both_scripts(
    gsm8k, tmp_path, monkeypatch, one_cpu
):
    page = (ROOT / "docs" / "dpo.md").read_text(encoding="utf-8")
    program = page.split("```python\n", 1)[1].split("```", 1)[0]
    shutil.copy(gsm8k / "example_model_solutions.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    pairs = [json.loads(line) for line in Path("pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(pairs) == 967  # as the page says
    solutions = {}
    for line in Path("example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for found in (value for value in row.values() if isinstance(value, dict)):
            solutions.setdefault((row["question"], found["solution"]), set()).add(found["is_correct"])
    for pair in pairs:
        assert True in solutions[pair["question"], pair["chosen"]]
        assert False in solutions[pair["question"], pair["rejected"]]
    flags = {
        "dataset": ("pairs.jsonl",),
        "eval_fraction": 0.05,
        "num_eval": 2,
        "max_steps": 1,
        "batch_size": 4,
    }
    flags |= {"max_completion_length": 4, "save_every": 0, "eval_every": 0}
    assert dpo.main(dpo.Args(output_dir="dpo", **flags))["loss"] == pytest.approx(math.log(2), abs=1e-3)
    for algorithm in ("ipo", "kto", "simpo", "orpo"):
        args = ipo_kto_simpo_orpo.Args(algorithm=algorithm, output_dir=algorithm, **flags)
        assert math.isfinite(ipo_kto_simpo_orpo.main(args)["loss"])
