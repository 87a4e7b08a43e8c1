"""evaluate.py: its metrics against hand-worked values and stock models, its report in a browser.

data/evaluate.jsonl: function, arguments (behind "a" an array, behind "t" a tensor), what it gives and why.
"""

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, fork, read_lines, write_rows
from helpers import CPU, asked, error_of, rewards, stock, tiny_rows, tiny_tokenizer
from sync_docs import metric_differences

import constitutional_ai
import estimators
import evaluate as script

pytestmark = pytest.mark.usefixtures("one_cpu")
SHORT = {"num_eval": 6, "eval_samples": 3, "max_completion_length": 40, "temperature": 0.8}
SHORT |= {"training_files": ()}
CLOCK = ("tokens_per_second", "step_time")  # what no two runs share
FORMULAS, METRICS = [], []
for case in read_lines(DATA / "evaluate.jsonl"):
    (FORMULAS if "function" in case else METRICS).append(case)


@pytest.fixture
def run(tmp_path):
    """run(**flags) -> folder and report of a short run on tiny/."""

    def call(**flags):
        flags = SHORT | {"output_dir": str(tmp_path / f"run_{len([*tmp_path.glob('run_*')])}")} | flags
        script.main(script.Args(**flags))
        return Path(flags["output_dir"]), json.loads((Path(flags["output_dir"]) / "report.json").read_text())

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder and report of one run of two models, shared by tests."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    script.main(script.Args(**SHORT, output_dir=str(folder)))
    return folder, json.loads((folder / "report.json").read_text())


def untimed(report: dict) -> dict:
    return {name: {k: v for k, v in own.items() if k not in CLOCK} for name, own in report["models"].items()}


# Formulas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FORMULAS, ids=lambda case: f"{case['function']}: {case['why']}")
def test_value_worked_by_hand(case):
    function = getattr(estimators if hasattr(estimators, case["function"]) else script, case["function"])
    given, kinds = [], {"a": np.array, "t": lambda x: torch.tensor(x, dtype=torch.float64)}
    for value in case["given"]:
        if given and isinstance(given[-1], str) and given[-1] in kinds and isinstance(value, list):
            value = kinds[given.pop()](value)
        given.append(value)
    if "error" in case:
        with pytest.raises(ValueError, match=case["error"]):
            function(*given)
        return
    found = function(*given)
    found = found.tolist() if hasattr(found, "tolist") else found
    if isinstance(found, list) and found and isinstance(found[0], tuple):
        assert found == [pytest.approx(tuple(line)) for line in case["wanted"]]
    else:
        assert found == (case["wanted"] if isinstance(found, str) else pytest.approx(case["wanted"]))


def test_interval_holds_the_true_mean_in_95_percent_of_draws():
    rng, hits = np.random.default_rng(0), 0
    for seed in range(300):
        low, high = estimators.bootstrap_interval(rng.random(80) < 0.3, seed)
        hits += low <= 0.3 <= high
    assert 0.9 <= hits / 300 <= 0.98
    assert estimators.bootstrap_interval(np.arange(100) % 2, 1) == pytest.approx([0.402, 0.598], abs=0.02)


def test_length_controlled_win_rate_sees_through_length_and_finds_what_is_left():
    rng = np.random.default_rng(0)
    lengths = rng.normal(60, 50, 4000)  # the model writes more
    pull = 2 * np.tanh(lengths / lengths.std())
    for strength, wanted in ((0.0, 0.5), (math.log(3), 0.75)):
        likely = 1 / (1 + np.exp(-strength - pull))
        found = estimators.length_controlled_win_rate(likely, lengths)
        assert found == pytest.approx(wanted, abs=1e-3) and likely.mean() > wanted + 0.1
        sampled = (rng.random(4000) < likely).astype(float)
        assert estimators.length_controlled_win_rate(sampled, lengths) == pytest.approx(wanted, abs=0.04)
    difficulty = np.repeat([-1.0, 1.0], 2000)
    likely = 1 / (1 + np.exp(-difficulty - pull))  # at equal length the mean of sigma(-1) and sigma(1)
    assert estimators.length_controlled_win_rate(likely, lengths, difficulty) == pytest.approx(0.5, abs=1e-3)
    assert (
        0.99 < estimators.length_controlled_win_rate(np.ones(500), lengths[:500]) < 1
    )  # unanimous, yet finite


# Metrics of rows --------------------------------------------------------------------------------------------


def row(kind, completion, reward, final, ids, **more):
    both = {"reward": reward, "rewards/f": reward, "correct": reward == 1}
    both |= {"strict": more.pop("strict", reward), "lenient": reward, "format": True, "ended": True}
    both |= {"entropy": 2.0, "kl_k1": 1.0, "kl_k3": 3.0, "kind": kind, "completion": completion}
    return both | {"final": final, "completion_ids": ids} | more


ROWS = [
    row("greedy", "#### 3", 1.0, "3", [1, 2]),
    row("greedy", "#### 9", 0.0, "9", [1, 2]),
    row("sampled", "#### 3", 1.0, "3", [1, 2, 3]),
    row("sampled", "it is 3", 1.0, "3", [1, 2, 3], strict=0.0, format=False),
    row("sampled", "#### 4", 0.0, "4", [1, 2, 4], ended=False),
    row("sampled", "#### 5", 0.0, "5", [1, 2, 5]),
    row("sampled", " I'm sorry, 1", 0.0, "1", [6, 6, 6, 6, 6], format=False),
    row("sampled", "#### 1", 0.0, "1", [7]),
    row("sampled", "#### 8", 1.0, "8", [8], kl_k1=8.0),
    row("sampled", "#### 1", 0.0, "1", [9]),
    *[row("hinted", "", right, "", [0], is_hint=hint) for right, hint in ((1, 0), (0, 1), (0, 1), (0, 0))],
    *[row("unhinted", "", right, "", [0], is_hint=hint) for right, hint in ((1, 0), (1, 0), (0, 1), (1, 0))],
]


@pytest.mark.parametrize("case", METRICS, ids=lambda case: case["metric"])
def test_metric_of_rows_worked_by_hand(case):
    assert estimators.measured(ROWS, 4, 1, estimators.verifier_of(ROWS))[case["metric"]] == pytest.approx(
        case["wanted"]
    )


def test_rewards_that_are_no_verifier_are_chosen_by_and_unknown_ones_left_out():
    values = [0.2, 0.6, None, 0.4, 0.1, 0.3]
    rows = [row("sampled", "", x, "", [1]) for x in values] + [row("greedy", "", None, "", [1])]
    found = estimators.measured(rows, 2, 1, estimators.verifier_of(rows))
    assert found["eval/best@2"] == pytest.approx((0.6 + 0.3) / 2) and "eval/greedy_reward" not in found
    assert found["eval/best@1"] == pytest.approx(0.3) == pytest.approx(found["eval/reward"])
    assert not [name for name in found if re.search("pass|maj|ece", name)]


def test_pairs_share_no_random_numbers_and_win_by_reward_with_ties():
    mine = [row("sampled", "ab", x, "", [1]) for x in (1.0, 0.0, 1.0)]
    theirs = [row("sampled", "a", x, "", [1]) for x in (1.0, 0.0, None)]
    preferences, differences = script.pair_up(mine, theirs, None, None, script.Args(eval_samples=3))
    np.testing.assert_array_equal(preferences, [[1.0, math.nan, 0.5]])  # against 0, None, 1
    assert differences.tolist() == [[1.0, 1.0, 1.0]]
    found = estimators.win_rates(preferences, differences, [], 1)
    assert found["eval/win_rate"] == 0.75
    assert found["eval/length_controlled_win_rate"] == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("logits", [[3.0, 0.0], [0.0, 1.0]])
def test_judge_that_goes_by_the_place_prefers_nothing_and_sees_both_orders(logits):
    words, shown = SimpleNamespace(**vars(constitutional_ai)), []

    def label_logprobs(model, tokenizer, labels, turns, args):
        shown.extend(turn["content"] for [turn] in turns)
        return torch.tensor(logits).log_softmax(-1).expand(len(turns), 2)

    words.label_logprobs = label_logprobs
    judge, args = script.Judge(None, words, None, None, None), script.Args(principle="Be {brief}.")
    prompts = [script.Prompt([], {"prompt": asked("1 + 1?")}, "")]
    rows = [[row("sampled", text, 1.0, "", [1])] * 8 for text in ("mine", "theirs")]
    preferences, _ = script.pair_up(*rows, prompts, judge, args)
    assert preferences.tolist() == [[pytest.approx(0.5)]]
    assert ["A: mine\n\nB: theirs" in text for text in shown] == [True, False]
    assert "A: theirs\n\nB: mine" in shown[1] and "User: 1 + 1?" in shown[0] and "Be {brief}." in shown[1]


# Models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"max_tokens_per_micro_batch": 60}, {"temperature": 0.7}])
def test_log_probs_entropy_kl_and_perplexity_are_those_of_stock_models(settings, process_group):
    args, texts = script.Args(**settings), [line["text"] for line in tiny_rows("text_eval", 3)]
    tokenizer, ids = tiny_tokenizer(), tiny_tokenizer()(texts).input_ids
    answers = [(x[:4], x[4:]) for x in ids]
    models = {name: script.load_model(name, args, CPU, frozen=True) for name in ("tiny/sft", "tiny/base")}
    for name, model in models.items():
        scores = script.token_scores(model, answers, args.temperature, args)
        for (prompt, answer), (logprobs, entropy) in zip(answers, scores, strict=True):
            logits = stock(name)(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            wanted = (logits / args.temperature).log_softmax(-1)  # (C, V)
            at = wanted.gather(1, torch.tensor(answer)[:, None])[:, 0]
            torch.testing.assert_close(logprobs, at, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(entropy, -(wanted.exp() * wanted).sum(-1), rtol=1e-4, atol=1e-4)
    corpus = [(tuple([*x, tokenizer.eos_token_id]), len(text)) for x, text in zip(ids, texts)]
    inputs = script.Inputs(tokenizer, [], [], [], corpus)
    found, losses = script.perplexity_of(models["tiny/base"], inputs, args), []
    for x, _ in corpus:
        logits = stock("tiny/base")(torch.tensor([x])).logits[0, :-1].log_softmax(-1)
        losses += (-logits.gather(1, torch.tensor(x[1:])[:, None])[:, 0]).tolist()
    assert found["eval/forgetting_perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    bits = sum(losses) / math.log(2) / sum(map(len, texts))
    assert found["eval/forgetting_bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_adapter_of_peft_is_evaluated_as_the_model_it_makes(process_group, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(stock("tiny/sft"), peft.LoraConfig(r=2, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(1))
    adapted.peft_config["default"].base_model_name_or_path = "tiny/sft"
    adapted.save_pretrained(tmp_path / "lora")
    tiny_tokenizer().save_pretrained(tmp_path / "lora")
    folder, ids, args = script.whole_model(str(tmp_path / "lora")), torch.arange(5, 20), script.Args()
    model = script.load_model(folder, args, CPU, frozen=True)
    [(logprobs, _)] = script.token_scores(model, [([5], ids[1:].tolist())], 1.0, args)
    wanted = adapted(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])  # (C, 1)
    torch.testing.assert_close(logprobs, wanted[:, 0].detach(), rtol=1e-4, atol=1e-4)
    assert script.whole_model("tiny/sft") == "tiny/sft"


# Runs -------------------------------------------------------------------------------------------------------


def test_report_has_the_documented_metrics_and_rows_bear_them_out(whole):
    folder, report = whole
    names = {key for own in report["models"].values() for key in own}
    assert metric_differences(ROOT / "evaluate.py", names) == []
    for number, own in enumerate(report["models"].values()):
        _, *rows = read_lines(folder / f"samples_{number}.jsonl")
        counts = Counter(x["kind"] for x in rows)
        assert counts == {"greedy": 6, "sampled": 18, "hinted": 6, "unhinted": 6}
        sampled = [x["reward"] for x in rows if x["kind"] == "sampled"]
        assert own["eval/reward"] == pytest.approx(np.mean(sampled)) == pytest.approx(own["eval/pass@1"])
        for low, high, value in ((*own[f"{k}/interval"], own[k]) for k in own if f"{k}/interval" in own):
            assert low <= value <= high
    line, logps = rows[-13], []  # of tiny/sft, sampled
    for name in ("tiny/sft", "tiny/base"):
        logits = stock(name)(torch.tensor([line["prompt_ids"] + line["completion_ids"]])).logits[0]
        logps.append((logits[len(line["prompt_ids"]) - 1 : -1].double() / 0.8).log_softmax(-1))  # (C, V)
    both = [x.gather(1, torch.tensor(line["completion_ids"])[:, None]) for x in logps]
    gap = both[0] - both[1]  # (C, 1)
    assert line["kind"] == "sampled" and line["kl_k1"] == pytest.approx(gap.sum().item(), rel=1e-3)
    assert line["kl_k3"] == pytest.approx((torch.exp(-gap) - 1 + gap).sum().item(), rel=1e-3)
    assert line["entropy"] == pytest.approx(-(logps[0].exp() * logps[0]).sum().item(), rel=1e-3)
    base, sft = report["models"].values()
    assert base["kl"] == 0 and sft["kl"] > 0.1 and "eval/win_rate" not in base and sft["eval/win_rate"] > 0.5
    texts = [x["prompt"][0]["content"] for x in rows[-12:]]  # six with hints, the same without
    assert all(x.startswith(y) and len(y) < len(x) and y.endswith("?") for x, y in zip(texts, texts[6:]))


def test_continued_run_skips_what_is_written_and_reports_the_same(whole, run, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole[0], folder := tmp_path / "half")
    (folder / "samples_1.jsonl").unlink()
    (folder / "report.json").unlink()
    asked_of, answer_all = [], script.answer_all
    monkeypatch.setattr(script, "answer_all", lambda *a: asked_of.append(a) or answer_all(*a))
    assert untimed(run(output_dir=str(folder), resume=True)[1]) == untimed(whole[1]) and len(asked_of) == 1
    changed = {"temperature": (0.8, 0.5), "max_prompt_length": (512, 60), "eval_split": ("test", "x")}
    for flag, (was, now) in changed.items():
        again = partial(run, output_dir=str(folder), resume=True, **{flag: now})
        assert error_of(again, capsys) == f"--resume: {flag} was {was} and is {now}"


def test_two_processes_with_other_memory_flags_are_one(whole, tmp_path):
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    group["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # what torchrun sets: the store is there already
    memory = {"max_tokens_per_rollout": 300, "max_tokens_per_micro_batch": 128}
    args = script.Args(**SHORT, **memory, output_dir="two")
    processes = [fork(script.main, args, cwd=tmp_path, RANK=rank, LOCAL_RANK=rank, **group) for rank in "01"]
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "output").read_text()
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    for one, two in zip(untimed(report).values(), untimed(whole[1]).values(), strict=True):
        assert one == {name: pytest.approx(value, rel=1e-3, abs=1e-5) for name, value in two.items()}


@pytest.mark.parametrize("judge", ["tiny/reward", "tiny/constitutional", "residue"])
def test_any_judge_gives_win_rates_of_three_models(judge, run):
    flags = {"models": ("tiny/base", "tiny/sft", "tiny/checker"), "num_eval": 3, "eval_samples": 2}
    judge = rewards(judge)[0] if judge == "residue" else judge
    report = run(**flags, base="tiny/sft", judge=judge, sycophancy_dataset=None)[1]
    assert list(report["models"]) == ["tiny/sft", "tiny/base", "tiny/checker"]
    for name in ("tiny/base", "tiny/checker"):
        own = report["models"][name]
        assert 0 <= own["eval/win_rate"] <= 1 and 0 < own["eval/length_controlled_win_rate"] < 1


def test_greedy_alone_and_other_rewards_are_enough(run, tmp_path):
    rows = [{"prompt": line["prompt"]} for line in tiny_rows("prompts_eval", 2)]  # no gold answer
    flags = {"dataset": (write_rows(tmp_path / "rows.jsonl", rows),), "reward": rewards("residue")}
    flags |= {"eval_samples": 0}
    [own] = run(models=("tiny/sft",), **flags)[1]["models"].values()
    assert "eval/greedy_reward" in own and not [
        x for x in own if re.search("@|accuracy|hint|forget|win|^kl", x)
    ]


def test_unknown_rewards_are_no_wrong_answers_and_a_verifier_is_one_to_all_models():
    rows = [row("sampled", "", x, "3", [1]) for x in (1.0, 1.0, None, None)]
    assert estimators.plotted(rows, 2, "rewards/f")["reliability"] == [(1, 1.0, 1.0)]
    assert estimators.verifier_of(rows) and not estimators.verifier_of(
        rows + [row("sampled", "", 0.5, "", [1])]
    )


@pytest.mark.parametrize("answers", [["", ""], ["7"] * 64 + [""], [""] * 64 + ["7"]], ids=len)
def test_gold_answers_may_be_missing_for_some_or_all_prompts(answers, run, tmp_path):
    rows = [{"prompt": f"{n} + 1 =", "answer": answer} for n, answer in enumerate(answers)]
    flags = {"dataset": (write_rows(tmp_path / "rows.jsonl", rows),), "num_eval": 0, "eval_samples": 1}
    folder, report = run(**flags, max_completion_length=2)
    known = {"eval/strict_accuracy", "eval/lenient_accuracy", "eval/ece", "eval/reward"}
    for own in report["models"].values():
        assert known & own.keys() == (known if any(answers) else set())
    assert ("no rewards" in (folder / "report.html").read_text()) != any(answers)


def test_bits_count_the_bytes_that_are_read(tmp_path):
    rows = [{"text": line["text"] * 60} for line in tiny_rows("text_eval", 1)]
    args = script.Args(**SHORT, forgetting_dataset=write_rows(tmp_path / "texts.jsonl", rows))
    [(ids, size)] = (inputs := script.read_inputs("tiny/sft", args)).corpus
    text, last = rows[0]["text"].encode(), inputs.tokenizer.decode(ids[-20:], skip_special_tokens=True)
    text = text[len(inputs.tokenizer.decode(ids[:1])) :]  # behind the token that nothing predicts
    assert len(ids) == inputs.tokenizer.positions and text[:size].decode().endswith(last)


def test_model_of_another_tokenizer_meets_the_same_prompts_and_no_number_of_other_tokens(run, tmp_path):
    shutil.copytree(ROOT / "tiny" / "sft", other := tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    text = text.replace('"Lily": 767', '"Lily": 766').replace('packs": 766', 'packs": 767')
    (other / "tokenizer.json").write_text(text)  # another vocabulary
    path = other / "chat_template.jinja"
    path.write_text("{{ '\\n' * 12 }}" + path.read_text())  # and longer prompts
    lengths = sorted(len(x.input_ids) for x in script.read_inputs("tiny/sft", script.Args(**SHORT)).hinted)
    flags = {"models": (str(other), "tiny/checker"), "base": "tiny/sft", "max_prompt_length": lengths[3] + 12}
    folder, report = run(**flags, eval_samples=1)
    asked = [[x["place"] for x in read_lines(folder / f"samples_{n}.jsonl")[1:]] for n in range(3)]
    hinted = [x["place"] for x in read_lines(folder / "samples_1.jsonl")[1:] if x["kind"] == "hinted"]
    assert asked[0] == asked[1] == asked[2] and 4 <= len(hinted) < 6
    ratios = [{"eval/forgetting_ratio", "kl"} & own.keys() for own in report["models"].values()]
    assert ratios == [{"eval/forgetting_ratio", "kl"}, set(), {"eval/forgetting_ratio", "kl"}]


def test_contamination_is_listed_with_file_and_row(run, tmp_path):
    question = tiny_rows("prompts_eval")[1]["prompt"][-1]["content"]
    rows = [
        {"text": "Nothing."},
        {"messages": [*asked(question.upper()), {"role": "assistant", "content": "1"}]},
    ]
    path = write_rows(tmp_path / "train.jsonl", [{"text": "", "messages": []} | line for line in rows])
    found = run(training_files=(path,), models=("tiny/sft",), eval_samples=0)[1]["contamination"]
    [line] = found["listed"]
    assert found["share"] == pytest.approx(1 / 6) and line["file"] == path and line["row"] == 2
    assert line["place"] == "tiny/data/prompts_eval.jsonl, row 2" and line["prompt"] == question


# The page ---------------------------------------------------------------------------------------------------


def test_page_is_whole_in_a_browser_and_loads_nothing(run, figures, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        pytest.skip("no chromium")
    folder, _ = run(num_eval=3)
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|<script|<link""", page)
    (tmp_path / "page.html").write_text(page + SEEN)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    result = subprocess.run([*command, tmp_path / "page.html"], capture_output=True, text=True, timeout=120)
    seen = json.loads(re.search(r"<title>(.*?)</title>", result.stdout)[1])
    assert seen["images"] == [True] * 7 and seen["columns"] == 4 and seen["wide"] <= 0
    assert "tiny/sft" in seen["text"] and "eval/pass@2" in seen["text"]


SEEN = """<script>addEventListener("load", () => { document.title = JSON.stringify({
  images: [...document.images].map(image => image.naturalWidth > 100),
  columns: document.querySelector("tr").children.length,
  wide: document.documentElement.scrollWidth - innerWidth,
  text: document.querySelector("table").innerText.replace(/[<>&"]/g, " ")}) })</script>"""
