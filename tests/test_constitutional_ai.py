"""constitutional_ai.py: soft labels and position bias, what models are asked, rows of whatever run alike."""

import functools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, read_lines, two_processes
from helpers import error_of
from samples import CPU, asked, said, stock, tiny_tokenizer
from sync_docs import metric_differences

import constitutional_ai as script
import dpo
import reward_model
import sft

pytestmark = pytest.mark.usefixtures("one_cpu")
SHORT = {"num_rows": 6, "batch_size": 2, "num_eval": 2, "max_completion_length": 40}
PAIR = {"stage": "judge", "min_margin": 0.0, "judge": "tiny/sft"}
STAGES = {"revise": {"rounds": 2}, "judge": PAIR}
CLOCK = "step_time"
every_stage = pytest.mark.parametrize("stage", STAGES)


@pytest.fixture
def make_rows(tmp_path):
    """make_rows(**flags) -> folder of a short run on tiny/, its rows, its metrics."""

    def run(**flags):
        flags = SHORT | {"output_dir": str(tmp_path / f"run_{len([*tmp_path.glob('run_*')])}")} | flags
        script.main(script.Args(**flags))
        folder = Path(flags["output_dir"])
        return folder, read_lines(folder / "rows.jsonl"), untimed(folder)

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(stage) -> what `make_rows` gives for the stage's own flags; one run for all tests."""

    @functools.cache
    def run(stage):
        folder = tmp_path_factory.mktemp(stage) / "run"
        script.main(script.Args(**SHORT | STAGES[stage], output_dir=str(folder)))
        return folder, read_lines(folder / "rows.jsonl"), untimed(folder)

    return run


def untimed(folder: Path) -> list[dict]:
    return [{k: v for k, v in x.items() if k != CLOCK} for x in read_lines(folder / "metrics.jsonl")]


@pytest.mark.parametrize("case", read_lines(DATA / "judgements.jsonl"), ids=lambda case: str(case["shown"]))
def test_both_orders_are_averaged_and_tell_the_position_bias(case):
    """P(first shown is better) in the order y, z and in z, y; P(y better), lean, same place."""
    shown = torch.tensor([case["shown"]], dtype=torch.float64)
    assert script.preference(shown).item() == pytest.approx(case["prefers"])
    renamed = script.preference(shown.flip(1)).item()  # y and z change their names
    assert renamed == pytest.approx(1 - case["prefers"])
    lean, same_place = script.position_bias(shown)
    assert (lean.item(), same_place.item()) == (pytest.approx(case["lean"]), case["same_place"])


def test_soft_labels_are_normalised_over_the_two_labels():
    logprobs = torch.tensor([[[0.3, 0.1], [0.02, 0.06]]]).log()  # the rest is on other tokens
    assert script.first_shown(logprobs).tolist() == [pytest.approx([0.75, 0.25])]


def test_principles_of_an_answer_are_different_ones_and_every_one_is_drawn_alike():
    draws = np.array([script.draw_principles((1, 0, i), 5, 3) for i in range(2000)])  # (2000, rounds)
    assert all(len({*line}) == 3 for line in draws.tolist())
    for drawn in draws.T:
        assert np.bincount(drawn, minlength=5) / 2000 == pytest.approx([0.2] * 5, abs=0.03)
    assert script.draw_principles((1, 0, 7), 5, 3) == draws[7].tolist()
    assert (draws[:100] != [script.draw_principles((2, 0, i), 5, 3) for i in range(100)]).any()


@pytest.mark.parametrize("settings", [{}, {"max_tokens_per_micro_batch": 50}, {"attn": "eager"}])
@pytest.mark.parametrize("labels", [("A", "B"), ("first", "second")])  # one token each, and several
def test_label_logprobs_are_those_of_a_stock_model(labels, settings, process_group, monkeypatch):
    monkeypatch.setattr(script, "LABELS", labels)
    args, model = script.Args(model="tiny/sft", **settings), stock("tiny/sft")
    tokenizer, judge = script.load_tokenizer(args), script.load_model("tiny/sft", args, CPU, frozen=True)
    label_ids = script.label_tokens(tokenizer, args)
    assert tuple(tokenizer.batch_decode(label_ids)) == labels
    assert (min(map(len, label_ids)) > 1) == (labels[0] != "A")
    questions = [asked("Which?"), [*asked("1 + 1?"), *said("2"), *asked("Is 2 better, or 3?")]]
    found = script.label_logprobs(judge, tokenizer, label_ids, questions, args)
    for question, line in zip(questions, found.tolist(), strict=True):
        head = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
        for ids, value in zip(label_ids, line, strict=True):
            logprobs = model(torch.tensor([head + ids])).logits[0].log_softmax(-1)  # (N, V)
            wanted = sum(logprobs[len(head) - 1 + n, token].item() for n, token in enumerate(ids))
            assert value == pytest.approx(wanted, abs=1e-4)


def test_judge_whose_tokenizer_does_not_tell_the_labels_apart_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(script, "LABELS", ("A", "A"))
    args = script.Args(stage="judge", judge="tiny/sft")
    told = error_of(lambda: script.label_tokens(tiny_tokenizer(), args), capsys)
    assert told == "--judge tiny/sft: its tokenizer does not tell A from A"


def test_judge_that_always_says_first_prefers_nothing_and_leaves_no_pair(make_rows, monkeypatch, capsys):
    always = torch.tensor([0.0, -1e9])
    monkeypatch.setattr(script, "label_logprobs", lambda *a, **k: always.expand(len(a[3]), 2))
    folder, rows, metrics = make_rows(**PAIR | {"min_margin": 0.01})
    assert {(row["probability"], row["margin"], row["position_bias"]) for row in rows} == {(0.5, 0.0, 1.0)}
    assert metrics[-1]["eval/position_bias"] == metrics[-1]["eval/same_place"] == 1
    assert (folder / "preference.jsonl").read_text() == ""
    assert "position_bias              1\n" in capsys.readouterr().out


def test_judge_that_knows_better_is_followed_in_both_orders(make_rows, monkeypatch):
    """It prefers the longer answer, wherever that stands; the pair says by how much."""

    def longer(judge, tokenizer, labels, turns, args):
        shown = [talk[0]["content"].split("\n\nA: ")[1].split("\n\nCheck both")[0] for talk in turns]
        sizes = [list(map(len, answers.split("\n\nB: "))) for answers in shown]
        return (0.05 * torch.tensor(sizes, dtype=torch.float64)).log_softmax(-1)

    monkeypatch.setattr(script, "label_logprobs", longer)
    rows = make_rows(**PAIR)[1]
    for row in rows:
        [chosen], [rejected] = row["chosen"], row["rejected"]
        gap = len(chosen["content"]) - len(rejected["content"])
        assert gap >= 0 and row["probability"] == pytest.approx(1 / (1 + np.exp(-0.05 * gap)))
        assert row["margin"] == pytest.approx(2 * row["probability"] - 1)
        assert row["position_bias"] == pytest.approx(0, abs=1e-9)
        assert row["margin"] == 0 or not row["same_place"]


def test_every_round_asks_about_the_newest_answer_by_another_principle(make_rows, monkeypatch):
    talks = []

    def say_next(policy, tokenizer, turns, cases, number, args, temperature):
        talks.extend([(number, turns)] if cases[0].key[1] == 0 else [])  # not of held-out prompts
        return [script.Completion(c.prompt, [2], None, f"{number} of {c.key[1:]}", True) for c in cases]

    monkeypatch.setattr(script, "say_next", say_next)
    rows = make_rows(num_rows=2, rounds=2)[1]
    rules = (ROOT / "tiny" / "constitution.txt").read_text().splitlines()
    for n, row in enumerate(rows):
        own = [(number, turns[n]) for number, turns in talks]
        whose, first, second = f"of (0, {row['index']})", *row["principles"]
        assert {first, second} <= {*rules} and first != second
        answers = [said(f"{number} {whose}") for number in range(5)]
        check = lambda principle: asked(script.CRITIQUE_REQUEST.format(principle=principle))
        rewrite = asked(script.REVISION_REQUEST)
        checked = row["prompt"] + answers[0] + check(first), row["prompt"] + answers[2] + check(second)
        assert own == [
            (0, row["prompt"]),
            (1, checked[0]),
            (2, checked[0] + answers[1] + rewrite),
            (3, checked[1]),
            (4, checked[1] + answers[3] + rewrite),
        ]
        assert row["completion"] == answers[4] and row["first_answer"] == f"0 {whose}"
        assert row["critiques"] == [f"1 {whose}", f"3 {whose}"]
        assert row["revisions"] == [f"2 {whose}", f"4 {whose}"]


def test_prompts_of_any_kind_are_conversations_and_reach_the_judge_as_text():
    parts = [{"role": "user", "content": [{"type": "text", "text": "1 + 1"}, {"type": "text", "text": "?"}]}]
    for prompt, wanted in (("1 + 1?", asked("1 + 1?")), (parts, asked("1 + 1?"))):
        assert script.as_case(script.Prompt([], {"prompt": prompt}, ""), ()).messages == wanted
    turns = [{"role": "system", "content": "S"}, *asked("{first}?")]
    text = script.judge_request(turns, "{second}", "no", "Be {kind}.")  # braces of the data are only text
    assert text.startswith("System: S\n\nUser: {first}?\n\nA: {second}\n\nB: no\n\n") and "Be {kind}." in text


def stop_in_second_step(monkeypatch):
    log = script.log

    def log_and_stop(folder, metrics):
        log(folder, metrics)
        if metrics["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(script, "log", log_and_stop)


@every_stage
def test_continued_run_makes_the_rows_of_one_that_never_stopped(stage, whole, make_rows, monkeypatch, capsys):
    flags, (unstopped, rows, metrics) = STAGES[stage], whole(stage)
    with monkeypatch.context() as patch:
        stop_in_second_step(patch)
        folder, some, _ = make_rows(**flags)  # returns, and so the process exits with 0
    assert some == rows[:4] and "continue with --resume" in capsys.readouterr().out
    with (folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps(rows[4]) + "\n" + '{"prompt": "half a li')  # killed in its third step
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "violations/before": 0.5}\n')
    assert make_rows(**flags, output_dir=str(folder), resume=True)[1:] == (rows, metrics)
    for path in unstopped.glob("*.jsonl"):
        if path.name != "metrics.jsonl":
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    told = error_of(lambda: make_rows(**flags, output_dir=str(folder), resume=True, temperature=0.5), capsys)
    assert told == "--resume: temperature was 1.0 and is 0.5"
    more = make_rows(**flags, output_dir=str(folder), resume=True, num_rows=7, num_eval=1)[1]
    assert more[:6] == rows and len(more) == 7


@every_stage
def test_rows_depend_on_no_batch_and_no_memory_flag(stage, whole, make_rows):
    rows = whole(stage)[1]
    flags = {"batch_size": 3, "max_tokens_per_rollout": 200, "max_tokens_per_micro_batch": 100}
    other = make_rows(**STAGES[stage], **flags)[1]
    drop = ("probability", "margin", "first_shown", "position_bias", "label_mass", "same_place")
    exact = [[{k: v for k, v in row.items() if k not in drop} for row in some] for some in (rows, other)]
    assert exact[0] == exact[1]
    for one, two in zip(rows, other, strict=True) if stage == "judge" else ():
        assert one["first_shown"] == pytest.approx(two["first_shown"], abs=1e-4)


def both_stages(flags):
    """A run of each stage, and one in bfloat16: FSDP2 casts, as on a GPU."""
    for stage, more in STAGES.items():
        script.main(script.Args(**flags | more | {"output_dir": stage}))
    script.main(script.Args(**flags | PAIR | {"output_dir": "bfloat16", "dtype": "bfloat16"}))


def test_two_processes_are_one(whole, make_rows, tmp_path):
    two_processes(both_stages, SHORT, cwd=tmp_path)
    names = "completion critiques chosen rejected principles principle violations rewards".split()
    for stage in STAGES:
        runs = whole(stage)[1], read_lines(tmp_path / stage / "rows.jsonl")
        one, two = ([[row.get(name) for name in names] for row in rows] for rows in runs)
        assert one == two
    rounded = make_rows(**PAIR, dtype="bfloat16")[1]
    two = read_lines(tmp_path / "bfloat16" / "rows.jsonl")
    assert [row["principle"] for row in two] == [row["principle"] for row in rounded]
    assert len(two) == SHORT["num_rows"] and all(0 < row["label_mass"] <= 1 for row in two + rounded)


def test_rows_have_their_provenance_and_sft_dpo_and_reward_model_read_them(whole):
    (revised, rows, metrics), (judged, pairs, more) = whole("revise"), whole("judge")
    wanted = {"model": "tiny/constitutional", "seed": 1, "stage": "revise", "round": 2, "temperature": 1.0}
    assert all(wanted.items() <= row.items() for row in rows)
    wanted = {"model": "tiny/constitutional", "judge": "tiny/sft", "stage": "judge"}
    assert all(wanted.items() <= row.items() for row in pairs)
    prompts = [row["prompt"] for row in read_lines(ROOT / "tiny/data/prompts_train.jsonl")]
    assert all(row["prompt"] == prompts[row["index"]] for row in rows + pairs)
    names = {key for line in metrics + more for key in line} | {CLOCK}
    assert metric_differences(ROOT / "constitutional_ai.py", names) == []
    tokenizer = tiny_tokenizer()
    args = sft.Args()
    learnt = sft.load_rows(str(revised / "sft.jsonl"), "train", args)
    texts = [sft.encode(tokenizer, row, args) for row in learnt]
    decoded = [tokenizer.decode(s.input_ids[s.trained]) for [s] in texts]
    assert decoded == [row["completion"][0]["content"] + "<|im_end|>" for row in rows if row["ended"]]
    learnt = read_lines(judged / "preference.jsonl")
    assert learnt and all(row["chosen"] != row["rejected"] for row in learnt)
    path, args = str(judged / "preference.jsonl"), dpo.Args()
    assert len(dpo.load_pairs(tokenizer, path, "train", args)) == len(learnt)
    for row, original in zip(reward_model.load_rows(path, "train", args), learnt, strict=True):
        assert reward_model.read_pair(row)["margin"] == original["margin"]
