"""online_dpo.py: who answers, who judges, which pairs come of it, rounds, short runs and errors.

The mixture is held against the enumeration of all it can write, pairs, scores and losses against numbers
worked by hand and the stock model. Losses are the text of dpo.py and ipo_kto_simpo_orpo.py, tested there.
"""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file
from test_dapo import assert_continues, assert_same_metrics, read_lines
from transformers import AutoModelForCausalLM, Qwen3Config

import common
import dpo
import online_dpo as od

END = 2  # <|im_end|> of tiny's tokenizer
NAN = math.nan


@pytest.fixture(autouse=True, scope="module")
def process_group():
    od.setup_distributed()


# Pairs and scores -------------------------------------------------------------------------------------------


def test_best_and_worst_answers_by_hand():
    groups = [
        [0, 1, 1],
        [1, 1, 1],
        [2, NAN, 1],
        [NAN, NAN, NAN],
        [NAN, 5, NAN],
        [0, 5e-5, 9e-5],
        [-3, -1, -2],
    ]
    scores = torch.tensor(groups, dtype=torch.float64)
    assert od.best_and_worst(scores) == [(1, 0), (6, 8), (19, 18)]
    assert od.best_and_worst(scores[:0]) == []


def test_expected_score_by_hand():
    logprobs = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.0, 0.5]], dtype=torch.float64).log()
    scores = od.expected_score(logprobs, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    assert scores.tolist() == pytest.approx([(0.2 + 0.6) / 0.6, 1.0])


# The mixture ------------------------------------------------------------------------------------------------


def language_model(seed, layers):
    """A random model over 4 tokens, the last of which ends a text."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 4, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    heads = {"num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, **heads, initializer_range=0.6)).eval()
    model.generation_config.eos_token_id = [3]
    return model


PROMPT = [1, 0, 2]
TEXTS = [(a, b) for a, b in itertools.product(range(4), repeat=2) if a != 3] + [(3,)]  # of 2 tokens at most


@torch.no_grad()
def next_logprobs(model, ids):
    return model(input_ids=torch.tensor([PROMPT + list(ids)])).logits[0, -1].double().log_softmax(-1)


def enumerated(policy, ref_policy, c):
    """Log-probs of TEXTS under the mixture of next-token distributions, and under that of whole texts."""
    by_token, whole = [], []
    for text in TEXTS:
        steps = [
            (next_logprobs(policy, text[:t]), next_logprobs(ref_policy, text[:t])) for t in range(len(text))
        ]
        mixed = [((1 - c) * p + c * q).log_softmax(-1) for p, q in steps]
        by_token.append(sum(x[token] for x, token in zip(mixed, text, strict=True)))
        whole.append(sum((1 - c) * p[i] + c * q[i] for (p, q), i in zip(steps, text, strict=True)))
    return torch.stack(by_token), torch.stack(whole).log_softmax(0)


@pytest.mark.parametrize("c", [0.0, 0.3, 0.9])
def test_mixture_is_sampled_as_enumeration_says(c):
    policy, ref_policy = language_model(1, 1), language_model(2, 2)
    mixture, size = od.Mixture(policy, ref_policy, c), 48
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    uniforms = torch.cartesian_prod(axis, axis)  # the unit square, evenly
    answers = common.decode(mixture, [PROMPT] * len(uniforms), uniforms, [3], 1.0)
    by_token, whole = enumerated(policy, ref_policy, c)
    assert by_token.exp().sum().item() == pytest.approx(1)
    found = [tuple(ids) for ids, _ in answers]
    shares = torch.tensor([found.count(text) for text in TEXTS]) / len(found)
    assert (shares - by_token.exp()).abs().max() < 2 / size
    logps = dict(zip(TEXTS, by_token.tolist(), strict=True))
    for ids, logprobs in answers[::7]:
        assert logprobs.sum().item() == pytest.approx(logps[tuple(ids)], abs=1e-4)
    if c:  # what it is not: the mixture over whole texts, the policy, the reference
        assert (by_token.exp() - whole.exp()).abs().max() > 0.02
        assert (by_token.exp() - enumerated(policy, ref_policy, 0.0)[0].exp()).abs().max() > 0.02
    alone = common.decode(mixture, [PROMPT], uniforms[700:701], [3], 1.0)
    assert alone[0][0] == answers[700][0]  # a sample depends on no other


def test_mixture_at_a_temperature_is_the_mixture_of_both_at_it():
    p, q = torch.randn(2, 5, dtype=torch.float64).unbind()
    mixed = (od.mixed_logits(p, q, 0.25).double() / 0.7).log_softmax(-1)
    tempered = 0.75 * (p / 0.7).log_softmax(-1) + 0.25 * (q / 0.7).log_softmax(-1)
    assert torch.allclose(mixed, tempered.log_softmax(-1), atol=1e-6)


# Answers of the data, questions of the judge ----------------------------------------------------------------

ASKED = [{"role": "user", "content": "1 + 1 ="}]
SAID = [{"role": "assistant", "content": "2"}]
GIVEN = [
    {"prompt": ASKED, "completion": SAID},
    {"prompt": ASKED, "chosen": SAID, "rejected": [{"role": "assistant", "content": "3"}]},
    {"messages": ASKED + SAID},
    {"question": "1 + 1 =", "answer": "2"},
    {"prompt": "1 + 1 =", "completion": "2"},
]


@pytest.mark.parametrize("row", GIVEN, ids=lambda row: "-".join(row))
def test_answer_of_a_row_ends_and_follows_the_prompt(row):
    args = od.Args(algorithm="spin")
    tokenizer = od.load_tokenizer(args)
    prompt = od.read_prompt(tokenizer, row, "", args)
    [answer] = od.given_answers(tokenizer, [prompt], args)
    assert (
        answer.token_ids == [*tokenizer("2").input_ids, END]
        and answer.text == "2"
        and answer.prompt is prompt
    )


def test_rows_without_a_fitting_answer_are_dropped_and_counted(capsys):
    args = od.Args(algorithm="spin", max_completion_length=4)
    rows = [
        *GIVEN,
        {"prompt": ASKED},
        {"prompt": ASKED, "completion": "a very long answer to a short question"},
    ]
    tokenizer = od.load_tokenizer(args)
    found = od.given_answers(tokenizer, [od.read_prompt(tokenizer, row, "", args) for row in rows], args)
    assert len(found) == 5 and "2 rows dropped, first row 6: no answer" in capsys.readouterr().out


def test_judges_score_is_that_of_the_stock_model():
    args, device = od.Args(algorithm="self_rewarding"), torch.device("cpu")
    tokenizer = od.load_tokenizer(args)
    policy, question = od.load_model(args.model, args, device), od.load_judge(tokenizer)
    asked = [question(ASKED, text) for text in ("2", "{prompt} 3")]
    found = od.expected_score(od.answer_sums(policy, asked, 1.0, args, device), torch.arange(6.0))
    for (ids, *digits), score in zip(asked, found.tolist(), strict=True):
        p = policy(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[torch.tensor(digits).flatten()]
        assert score == pytest.approx(sum(n * x for n, x in enumerate(p.tolist())) / p.sum().item(), rel=1e-4)
        assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n") and len(digits) == 6
    text = tokenizer.decode(asked[1][0])
    assert "1 + 1 =" in text and "Answer: {prompt} 3" in text  # what was said is no place to fill


# Short runs -------------------------------------------------------------------------------------------------

JUDGES = """
def longer(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def residue(completion_ids, **columns):
    return [sum(ids) % 7 / 3 for ids in completion_ids]


def beats(completions, opponent, **columns):
    texts = [completion[-1]["content"] for completion in completions]
    return [None if y is None else float(x > y) for x, y in zip(texts, opponent)]


def same(completions, **columns):
    return [1.0] * len(completions)
"""


@pytest.fixture
def train(tmp_path, one_cpu):
    """train(algorithm, **flags) -> output folder, lines of metrics.jsonl; 2 steps on 16 rows of tiny/."""
    (tmp_path / "judges.py").write_text(JUDGES)
    defaults = {"batch_size": 8, "num_generations": 4, "max_steps": 2}
    defaults |= {"eval_every": 0, "save_every": 0, "warmup_steps": 0, "log_every": 1}

    def run(algorithm, reward="residue", **flags):
        folder = tmp_path / f"run_{len([*tmp_path.iterdir()])}"
        name = "preference" if algorithm == "spin" else "prompts"
        flags = {"max_completion_length": 64 if algorithm == "spin" else 12} | flags
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join((ROOT / f"tiny/data/{name}_train.jsonl").open().readlines()[:16]))
        if algorithm not in ("spin", "self_rewarding"):
            flags["reward"] = (f"{tmp_path / 'judges.py'}:{reward}",)
        flags = defaults | {"dataset": (str(path),), "output_dir": str(folder)} | flags
        od.main(od.Args(algorithm=algorithm, **flags))
        return Path(flags["output_dir"]), read_lines(Path(flags["output_dir"]) / "metrics.jsonl")[1:]

    return run


@pytest.fixture
def drawn(monkeypatch):
    """Arguments of every `as_row` of a run: step, chosen and rejected completion, scores."""
    found, as_row = [], od.as_row
    monkeypatch.setattr(od, "as_row", lambda *args: found.append(args) or as_row(*args))
    return found


def stock_logps(name, pairs):
    """Log-probs (K, 2) of both answers of pairs under the stock model."""
    model, found = AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / name, dtype=torch.float32).eval(), []
    for answer in (answer for pair in pairs for answer in pair[1:3]):
        prompt, ids = answer.prompt.input_ids, answer.token_ids
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1)[range(len(ids)), ids].sum())
    norm = lambda: torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    return torch.stack(found).view(-1, 2), norm


HAND = {"dpo": lambda h: -F.logsigmoid(0.3 * h), "ipo": lambda h: (h - 1 / 0.6) ** 2}


@pytest.mark.parametrize("loss", HAND)
def test_loss_and_gradient_of_online_pairs_are_those_of_the_stock_model(train, drawn, loss):
    base = str(ROOT / "tiny" / "base")
    _, [line] = train("online_dpo", loss=loss, beta=0.3, ref_model=base, max_steps=1)
    logps, norm = stock_logps("sft", drawn)
    ref_logps, _ = stock_logps("base", drawn)
    wanted = HAND[loss]((logps - ref_logps.detach()).diff(dim=1)[:, 0].neg()).mean()
    wanted.backward()
    assert line["loss"] == pytest.approx(wanted.item(), rel=1e-4)
    assert line["grad_norm"] == pytest.approx(norm(), rel=1e-3)
    assert line["pairs/usable_ratio"] == len(drawn) / 2 > 0
    for _, chosen, rejected, scores in drawn:  # of the same prompt, by the reward
        assert chosen.prompt is rejected.prompt and scores[0] > scores[1]
        assert [sum(x.token_ids) % 7 / 3 for x in (chosen, rejected)] == pytest.approx(scores.tolist())


def test_spin_prefers_the_data_to_each_sample(train, drawn):
    folder, lines = train("spin", round_steps=2)
    given = {row["chosen"][0]["content"] for row in read_lines(folder.parent / "preference.jsonl")}
    assert {step for step, *_ in drawn} == {1, 2} and 0 < len(drawn) <= 16
    for _, chosen, rejected, scores in drawn:
        assert chosen.text in given and chosen.token_ids != rejected.token_ids and scores.tolist() == [1, 0]
    assert sum(line["pairs/usable_ratio"] for line in lines) == len(drawn) / 8
    assert "reward" not in lines[0] and lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)


def test_judge_of_nash_md_sees_both_answers_and_players_differ(train, drawn):
    _, [line] = train("nash_md", reward="beats", max_steps=1, temperature=2.0)
    assert all(chosen.text > rejected.text for _, chosen, rejected, _ in drawn)
    assert 0 < len(drawn) == line["pairs/usable_ratio"] * 8 and 0 <= line["win_rate"] <= 1


def test_rounds_keep_their_pairs_for_themselves_and_for_dpo(train):
    folder, lines = train("iterative_dpo", max_steps=3, round_steps=2, learning_rate=1e-2)
    files = sorted((folder / "rounds").iterdir())
    rounds = [read_lines(path) for path in files]
    assert [path.name for path in files] == ["0000.jsonl", "0001.jsonl"]
    assert [{row["step"] for row in rows} for rows in rounds] == [{1, 2}, {3, 4}]
    assert [step for step, line in enumerate(lines, 1) if "kl" in line] == [1, 3]
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-4) != lines[1]["rewards/margins"]
    assert lines[2]["rewards/margins"] == pytest.approx(0, abs=1e-4)  # the reference moved
    args = SimpleNamespace(**vars(dpo.Args()) | {"max_length": 200})
    pairs = dpo.load_pairs(dpo.load_tokenizer(args), str(files[0]), "train", args)
    known = {tuple(map(tuple, row["ids"])) for row in rounds[0]}
    assert len(pairs) == len(known) and all(row["place"].startswith("prompts.jsonl") for row in rounds[0])
    _, kept = train("iterative_dpo", max_steps=3, round_steps=2, learning_rate=1e-2, reference="initial")
    assert abs(kept[2]["rewards/margins"]) > 1e-3 and kept[1]["loss"] == pytest.approx(lines[1]["loss"])


ALGORITHMS = ("online_dpo", "iterative_dpo", "self_rewarding", "spin", "nash_md")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_memory_flags_change_nothing(train, algorithm):
    settings = {"loss": "simpo"} if algorithm == "online_dpo" else {"round_steps": 2}
    _, wanted = train(algorithm, **settings)
    _, found = train(algorithm, max_tokens_per_micro_batch=64, max_tokens_per_rollout=200, **settings)
    _, repeated = train(algorithm, attn="eager", **settings)  # no prompt is shared
    for lines in (found, repeated):
        assert_same_metrics(lines[:1], wanted[:1], rel=1e-4, abs_=1e-5)
        assert lines[1]["loss"] == pytest.approx(wanted[1]["loss"], rel=1e-2)
    assert wanted[1]["grad_norm"] > 1e-3


@pytest.mark.parametrize("algorithm", ["iterative_dpo", "nash_md"])
def test_run_that_continues_within_a_round_equals_one_that_never_stopped(train, algorithm):
    # of checkpoints 2 and 4 the last is taken away: step 3 is the last one of its round
    assert_continues(lambda **flags: train(algorithm, **flags), max_steps=4, save_every=2, round_steps=3)


def test_ties_make_no_pair_and_nothing_moves(train):
    folder, lines = train("online_dpo", reward="same", learning_rate=1e-2, save_every=1)
    for line in lines:
        assert line["pairs/usable_ratio"] == line["loss"] == line["grad_norm"] == 0 and line["reward"] == 1
        assert "rewards/margins" not in line
    before, after = (load_file(x / "model.safetensors") for x in (ROOT / "tiny" / "sft", folder / "model"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_round_whose_pairs_are_gone_ends_a_run_that_needs_them(train):
    folder, _ = train("iterative_dpo", max_steps=2, save_every=1, round_steps=3)
    (folder / "rounds" / "0000.jsonl").unlink()
    with pytest.raises(SystemExit):
        dataset = tuple(json.loads((folder / "args.json").read_text())["dataset"])
        train(
            "iterative_dpo", max_steps=3, round_steps=3, resume=True, output_dir=str(folder), dataset=dataset
        )


MISTAKES = [
    ({"algorithm": "spin", "reward": ("tiny/reward",)}, "--algorithm spin asks no --reward"),
    ({"algorithm": "self_rewarding", "reward": ("a.py:b",)}, "--algorithm self_rewarding asks no --reward"),
    ({"num_generations": 1}, "--num-generations 1: 2 or more that divide --batch-size"),
    ({"num_generations": 3}, "--num-generations 3: 2 or more"),
    ({"algorithm": "spin", "num_generations": 3}, "--num-generations 3: 1 or more"),
    ({"mixture_coef": 1.0}, "--mixture-coef 1.0: Input should be less than 1"),
    ({"reward_weights": (1.0, 2.0)}, "2 --reward-weights for 1 rewards"),
]


@pytest.mark.parametrize("flags, told", MISTAKES)
def test_mistake_is_told_in_one_line(flags, told, capsys):
    with pytest.raises(SystemExit) as stop:
        od.Args(**flags)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(f"error: {told}")
