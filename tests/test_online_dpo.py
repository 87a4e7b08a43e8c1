"""online_dpo.py against the enumeration of its mixture, stock models, and numbers worked by hand."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import read_lines
from helpers import assert_continues, assert_same_metrics, calls_of, error_of, trainer
from samples import END, asked, float64, gradient_norm, said, stock, tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM, Qwen3Config

import common
import dpo
import online_dpo as od

NAN = math.nan
pytestmark = pytest.mark.usefixtures("process_group")


def test_best_and_worst_answers_by_hand():
    scores = float64([0, 1, 1], [1, 1, 1], [2, NAN, 1], [NAN] * 3, [0, 5e-5, 9e-5], [-3, -1, -2])
    assert od.best_and_worst(scores) == [(1, 0), (6, 8), (16, 15)]
    assert od.best_and_worst(scores[:0]) == []


def test_metrics_of_answers_and_pairs_by_hand():
    answer = od.Completion(None, [5, END], None, "", True)
    rollout = [answer, answer._replace(token_ids=[5], ended=False)]
    golds, online, nash = float64(1, 0, 2, 0, 1, 1), od.Args(), od.Args(algorithm="nash_md")
    # golds of three groups of two: the first pair is right, the second wrong, the third a tie
    scores, places = float64(3, 1, 2, 4, 1, 0), [(0, 1), (3, 2), (4, 5)]
    found = od.describe_pairs(rollout, scores, golds, places, 2, online)
    assert found["reward"] == pytest.approx(11 / 6) and found["gold_reward"] == pytest.approx(5 / 6)
    assert found["pairs/gold_accuracy"] == 0.5 and math.isnan(found["win_rate"])
    found = od.describe_pairs(rollout, float64(3, 1, 2, 4, 1, 1), golds, places[:2], 2, nash)
    assert found["win_rate"] == 0.5 and found["reward"] == 2  # of the policy's answers, the first of two


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
        steps = [[next_logprobs(model, text[:t]) for model in (policy, ref_policy)] for t in range(len(text))]
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


ASK, SAY = asked("1 + 1 ="), said("2")
GIVEN = [
    {"prompt": ASK, "completion": SAY},
    {"prompt": ASK, "chosen": SAY, "rejected": said("3")},
    {"messages": ASK + SAY},
    {"question": "1 + 1 =", "answer": "2"},
    {"prompt": "1 + 1 =", "completion": "2"},
]


def test_answer_of_a_row_ends_and_follows_the_prompt_and_other_rows_are_dropped(capsys):
    args = od.Args(algorithm="spin", max_completion_length=4)
    rows = [*GIVEN, {"prompt": ASK}, {"prompt": ASK, "completion": "a very long answer to a short question"}]
    prompts = [od.read_prompt(tiny_tokenizer(), row, "", args) for row in rows]
    found = od.given_answers(tiny_tokenizer(), prompts, args)
    assert [answer.prompt for answer in found] == prompts[:5]
    ids = [*tiny_tokenizer()("2").input_ids, END]
    assert all(answer.token_ids == ids and answer.text == "2" for answer in found)
    assert "2 rows dropped, first row 6: no answer" in capsys.readouterr().out


@pytest.fixture
def train(tmp_path, one_cpu):
    """train(algorithm, **flags), as `trainer` says: 2 steps of 2 prompts with 4 answers on tiny/sft."""
    flags = {"batch_size": 8, "num_generations": 4, "max_steps": 2, "max_completion_length": 12}
    run = trainer(od, tmp_path, **flags)
    own = dict.fromkeys(("online_dpo", "iterative_dpo", "nash_md"), {"reward": "residue"})
    own["spin"] = {"rows": tiny_rows("preference_train", 16), "max_completion_length": 64}
    return lambda algorithm, **flags: run(algorithm=algorithm, **own.get(algorithm, {}) | flags)


@pytest.fixture
def pairs(monkeypatch):
    """What a run gives to `as_row`: step, chosen and rejected completion, scores."""
    found, as_row = [], od.as_row
    monkeypatch.setattr(od, "as_row", lambda *arguments: found.append(arguments) or as_row(*arguments))
    return found


def logps_of(answers, *models, mix=lambda logits: logits):
    """Summed log-probs (B,) of answers under what `mix` makes of the logits of stock models."""
    found = []
    for answer in answers:
        ids, start = answer.token_ids, len(answer.prompt.input_ids) - 1
        row = torch.tensor([answer.prompt.input_ids + ids])
        logits = [model(input_ids=row).logits[0, start:-1] for model in models]
        found.append(mix(*logits).log_softmax(-1)[range(len(ids)), ids].sum())
    return torch.stack(found)


BY_HAND = {"dpo": lambda h: -F.logsigmoid(0.3 * h), "ipo": lambda h: (h - 1 / 0.6) ** 2}


@pytest.mark.parametrize("loss", BY_HAND)
def test_loss_gradient_and_kl_of_online_pairs_are_those_of_stock_models(train, pairs, monkeypatch, loss):
    rollouts = calls_of(monkeypatch, od, "roll_out")
    policy, ref_policy = stock("tiny/sft"), stock("tiny/base")
    _, [line] = train("online_dpo", loss=loss, beta=0.3, ref_model="tiny/base", max_steps=1)
    ratio = lambda answers: logps_of(answers, policy) - logps_of(answers, ref_policy).detach()
    chosen, rejected = (ratio([pair[n] for pair in pairs]) for n in (1, 2))
    wanted = BY_HAND[loss](chosen - rejected).mean()
    wanted.backward()
    assert line["loss"] == pytest.approx(wanted.item(), rel=1e-4)
    assert line["grad_norm"] == pytest.approx(gradient_norm(policy), rel=1e-3)
    assert line["rewards/margins"] == pytest.approx(0.3 * (chosen - rejected).mean().item(), rel=1e-3)
    assert line["pairs/usable_ratio"] == len(pairs) / 2 > 0
    for _, better, worse, scores in pairs:  # of the same prompt, by the reward
        assert better.prompt is worse.prompt and scores[0] > scores[1]
        assert [sum(x.token_ids) % 7 / 3 for x in (better, worse)] == pytest.approx(scores.tolist())
    [(_, answers)] = rollouts
    kl = ratio(answers).sum().item() / sum(len(x.token_ids) for x in answers)
    assert line["kl"] == pytest.approx(kl, rel=1e-3)


def test_spin_prefers_the_data_to_each_sample(train, pairs):
    _, lines = train("spin", round_steps=2)
    given = {row["chosen"][0]["content"] for row in tiny_rows("preference_train", 16)}
    assert {step for step, *_ in pairs} == {1, 2} and 0 < len(pairs) <= 16
    for _, chosen, rejected, scores in pairs:
        assert chosen.text in given and chosen.token_ids != rejected.token_ids and scores.tolist() == [1, 0]
    assert sum(line["pairs/usable_ratio"] for line in lines) == len(pairs) / 8
    assert "reward" not in lines[0] and lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)


def test_players_of_nash_md_are_the_policy_and_the_mixture_and_its_judge_sees_both(train, pairs, monkeypatch):
    rollouts = calls_of(monkeypatch, od, "roll_out")
    flags = {"ref_model": "tiny/base", "mixture_coef": 0.2, "temperature": 2.0, "reward": "beats"}
    _, [line] = train("nash_md", max_steps=1, **flags)
    assert all(chosen.text > rejected.text for _, chosen, rejected, _ in pairs)
    assert 0 < len(pairs) == line["pairs/usable_ratio"] * 8 and 0 <= line["win_rate"] <= 1
    for (_, answers), c in zip(rollouts, (0, 0.2), strict=True):  # the policy's, the mixture's
        mix = lambda p, q, c=c: ((1 - c) * p + c * q) / 2
        wanted = logps_of(answers, stock("tiny/sft"), stock("tiny/base"), mix=mix).tolist()
        assert [answer.logprobs.sum().item() for answer in answers] == pytest.approx(wanted, rel=1e-3)


def test_scores_of_self_rewarding_are_the_points_that_the_stock_model_expects(train, pairs):
    train("self_rewarding", max_steps=1, round_steps=1)
    question, model = od.load_judge(tiny_tokenizer()), stock("tiny/sft")
    for _, *answers, scores in pairs:
        assert scores[0] > scores[1]
        for answer, score in zip(answers, scores.tolist(), strict=True):
            prompt = answer.prompt.row["prompt"]
            ids, *digits = question(prompt, answer.text)
            text = tiny_tokenizer().decode(ids)
            assert prompt[0]["content"] in text and answer.text in text and text.endswith("assistant\n")
            assert [tiny_tokenizer().decode(x) for x in digits] == list("012345")
            p = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[torch.tensor(digits).flatten()]
            assert score == pytest.approx((p @ torch.arange(6.0) / p.sum()).item(), rel=1e-4)
    assert len(pairs) == 2


def test_rounds_keep_their_pairs_for_themselves_and_for_dpo(train):
    flags = {"max_steps": 3, "round_steps": 2, "learning_rate": 1e-2}
    folder, lines = train("iterative_dpo", **flags)
    files = sorted((folder / "rounds").iterdir())
    rounds = [read_lines(path) for path in files]
    assert [path.name for path in files] == ["steps_000001_to_000002.jsonl", "steps_000003_to_000004.jsonl"]
    assert [{row["step"] for row in rows} for rows in rounds] == [{1, 2}, {3, 4}]
    assert [step for step, line in enumerate(lines, 1) if "kl" in line] == [1, 3]
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-4) != lines[1]["rewards/margins"]
    assert lines[2]["rewards/margins"] == pytest.approx(0, abs=1e-4)  # the reference moved
    args = SimpleNamespace(**vars(dpo.Args()) | {"max_length": 200})
    rows = dpo.load_pairs(tiny_tokenizer(), str(files[0]), "train", args)
    assert len(rows) == len({tuple(map(tuple, row["ids"])) for row in rounds[0]})
    assert all("/rows_" in row["place"] for row in rounds[0])
    _, kept = train("iterative_dpo", reference="initial", **flags)
    assert abs(kept[2]["rewards/margins"]) > 1e-3 and kept[1]["loss"] == pytest.approx(lines[1]["loss"])


@pytest.mark.parametrize("algorithm", od.SETTINGS)
def test_shared_prompts_change_nothing(train, algorithm):
    settings = {"round_steps": 2} if "round_steps" in od.SETTINGS[algorithm] else {"loss": "simpo"}
    _, wanted = train(algorithm, **settings)
    _, lines = train(algorithm, attn="eager", max_tokens_per_micro_batch=64, **settings)  # nothing is shared
    assert_same_metrics(lines[:1], wanted[:1], rel=1e-4, abs_=1e-5)
    assert lines[1]["loss"] == pytest.approx(wanted[1]["loss"], rel=1e-2)


@pytest.mark.parametrize("algorithm", ["iterative_dpo", "nash_md"])
def test_run_that_continues_within_a_round_equals_one_that_never_stopped(train, algorithm):
    # of checkpoints 2 and 4 the last is taken away: step 3 is the last one of its round
    rounds = {"round_steps": 3} if algorithm == "iterative_dpo" else {}
    assert_continues(train, algorithm, max_steps=4, save_every=2, **rounds)


def test_pairs_of_a_round_that_are_gone_or_half_written_are_not_believed(train, capsys, monkeypatch):
    folder, _ = train("iterative_dpo", save_every=1, round_steps=3)
    again = lambda **flags: train("iterative_dpo", resume=True, output_dir=str(folder), **flags)
    line = error_of(lambda: again(max_steps=3, round_steps=4), capsys)  # of other rounds
    assert "000004.jsonl is missing" in line
    [path] = (folder / "rounds").iterdir()
    path.unlink()
    assert f"{path} is missing" in error_of(lambda: again(max_steps=3, round_steps=3), capsys)
    write_text = Path.write_text

    def write_half(path, text, **options):
        half = path.parent.name == "rounds"
        write_text(path, text[: len(text) // 2] if half else text, **options)
        if half:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(KeyboardInterrupt):
        train("iterative_dpo", output_dir=str(folder.with_name("killed")))
    assert [*folder.with_name("killed").glob("rounds/*.jsonl")] == []


def test_ties_make_no_pair_and_nothing_moves(train):
    folder, lines = train("online_dpo", reward="same", learning_rate=1e-2)
    for line in lines:
        assert line["pairs/usable_ratio"] == line["loss"] == line["grad_norm"] == 0 and line["reward"] == 1
        assert "rewards/margins" not in line
    before, after = stock("tiny/sft").state_dict(), stock(folder / "model").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_evaluation_by_hand(monkeypatch):
    texts = {1: "right right", 3: "right wrong wrong wrong wrong wrong"}  # two prompts, one and three answers
    prompt = od.Prompt([5, 6], {"prompt": "?"}, "row 1")
    completions = lambda k: [od.Completion(prompt, [1], None, text, True) for text in texts[k].split()]
    monkeypatch.setattr(od, "roll_out", lambda *arguments: completions(arguments[3]))
    judge = lambda n: {"f": lambda completions, **_: [n * (text == "right") for text in completions]}
    args = (None, tiny_tokenizer(), [prompt] * 2)
    evaluation = lambda *judges: od.evaluate_rewards(*args, *judges, od.Args(eval_samples=3))
    metrics, _ = evaluation(judge(2), judge(1))  # by gold
    assert metrics == pytest.approx({"eval/greedy_reward": 1, "eval/reward": 1 / 6, "eval/pass@k": 0.5})
    metrics, _ = evaluation(judge(2), {})
    assert metrics == pytest.approx({"eval/greedy_reward": 2, "eval/reward": 1 / 3})  # 2 is no share
