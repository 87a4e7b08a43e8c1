"""sft.py: which tokens of a row it trains, its loss, its batches, its evaluation, the model it saves."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import DATA, read_lines, write_rows
from helpers import calls_of, error_of, trainer
from safetensors.torch import load_file
from samples import asked, said, stock, tiny_rows
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config

import sft
from common import collate, token_logprobs

TEMPLATES = {name: (DATA / f"{name}.jinja").read_text() for name in ("chatml", "llama", "gemma", "qwen3")}
CHAT = [*asked("What color is the sky?"), *said("It is blue.")]
CHAT += [*asked("What color is the grass?"), *said("It is green.")]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def variant(random_model, tmp_path):
    """variant(template, eos=..., ...) -> a folder with the random model and a tokenizer of another kind."""

    def make(template, *, eos="<|im_end|>", bos=None, pad="<|endoftext|>", adds="$A", ends=None, tokens=()):
        tokenizer = AutoTokenizer.from_pretrained(random_model)
        tokens = [token for token in (*tokens, bos, eos) if token]
        tokenizer.add_tokens(tokens, special_tokens=True)
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = bos, eos, pad
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in tokens]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=adds, special_tokens=ids)
        tokenizer.chat_template = TEMPLATES.get(template, template)
        folder = tmp_path / f"variant_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(random_model / name, folder)
        tokenizer.save_pretrained(folder)
        ends = tokenizer.convert_tokens_to_ids(list(ends)) if ends else tokenizer.eos_token_id
        GenerationConfig(eos_token_id=ends).save_pretrained(folder)  # what may end a turn beside EOS
        return folder

    return make


@pytest.fixture
def encode(random_model, tmp_path):
    """encode(row, ..., model=folder, **flags) -> tokenizer, a list of (sequence, text, trained spans)."""

    def run(*rows, model=random_model, **flags):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        sft.setup_distributed()  # it silences libraries, as in a run
        args = sft.Args(model=str(model), dataset=(path,), **flags)
        tokenizer = sft.load_tokenizer(args)
        found = []
        for sequence in sft.load_sequences(tokenizer, path, "train", args):
            ids, trained = sequence
            cuts = np.flatnonzero(np.diff(trained)) + 1
            runs = zip(np.split(ids, cuts), np.split(trained, cuts), strict=True)
            spans = [tokenizer.decode(run) for run, is_trained in runs if is_trained[0]]
            found.append((sequence, tokenizer.decode(ids), spans))
            assert len(ids) == len(trained) and trained.dtype == bool and not trained[0]
        return tokenizer, found

    return run


SPANS = ["It is blue.<|im_end|>", "It is green.<|im_end|>"]


def test_every_assistant_turn_is_trained_with_its_end_token_and_not_the_line_break(encode, variant):
    for model in ({}, {"model": variant("chatml")}):
        _, [(_, text, spans)] = encode({"messages": [SYSTEM, *CHAT]}, **model)
        assert spans == SPANS and text.endswith("It is green.<|im_end|>")
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat")
        _, [(_, text, spans)] = encode({"prompt": CHAT[:3], "completion": CHAT[3:]}, **model)
        assert spans == SPANS[1:] and "It is blue." in text  # turns of the prompt are not


def test_llama_template(encode, variant):
    names = ["<|start_header_id|>", "<|end_header_id|>"]
    folder = variant("llama", eos="<|eot_id|>", bos="<s>", tokens=names, adds="<s> $A")
    for messages in (CHAT, [SYSTEM, *CHAT]):
        _, [(_, text, spans)] = encode({"messages": messages}, model=folder)
        assert spans == ["It is blue.<|eot_id|>", "It is green.<|eot_id|>"]
        assert text.startswith("<s><|start_header_id|>system<|end_header_id|>\n\nCutting")
        assert text.count("<s>") == 1


def test_gemma_template_without_a_system_role_drops_such_rows(encode, variant, capsys):
    ends = ["<eos>", "<end_of_turn>"]
    folder = variant("gemma", eos="<eos>", bos="<bos>", tokens=["<start_of_turn>", *ends])
    rows = [{"messages": messages} for messages in (CHAT, [SYSTEM, *CHAT], CHAT)]
    _, [(_, text, spans)] = encode(*rows, model=folder)
    assert spans == ["It is blue.<end_of_turn>", "It is green.<end_of_turn>"]
    assert "<start_of_turn>model\n" in text and text.startswith("<bos>") and text.count("<bos>") == 1
    assert "1 rows dropped, first row 2: TemplateError: no system role" in capsys.readouterr().out


def test_template_that_drops_old_reasoning_gives_one_sequence_per_turn(encode, variant):
    messages = [CHAT[0], *said("<think>\nsky\n</think>\n\nIt is blue.")]
    messages += [CHAT[2], *said("<think>\ngrass\n</think>\n\nIt is green.")]
    tokenizer, found = encode({"messages": messages}, model=variant("qwen3"))
    assert [spans for _, _, spans in found] == [[f"{messages[n]['content']}<|im_end|>"] for n in (1, 3)]
    for turn, (sequence, text, _) in zip((1, 3), found, strict=True):  # what the model sees when it writes it
        prompt = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        assert text.startswith(prompt) and not sequence.trained[: len(prompt_ids)].any()
        assert sequence.input_ids[: len(prompt_ids)].tolist() == prompt_ids
    assert "sky\n</think>" not in found[1][1]


def test_template_without_a_generation_prompt_trains_the_reply_and_not_its_header(encode, variant):
    template = TEMPLATES["chatml"].partition("{% if add_generation_prompt %}")[0]
    short = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}  # is in "assistant", too
    _, found = encode({"messages": CHAT}, {"messages": [CHAT[0], short]}, model=variant(template))
    assert [spans for _, _, spans in found] == [SPANS, ["a<|im_end|>"]]


@pytest.mark.parametrize("template, pad", [(None, "<|im_end|>"), ("chatml", "<|endoftext|>")])
@pytest.mark.parametrize("adds", ["$A", "<s> $A", "$A <|im_end|>", "<s> $A <|im_end|>"])
def test_prompt_and_completion_as_text(encode, variant, template, adds, pad):
    folder = variant(template, bos="<s>" if "<s>" in adds else None, adds=adds, pad=pad)
    row = {"prompt": "The sky is", "completion": " blue today."}
    tokenizer, [(sequence, text, spans)] = encode(row, model=folder)
    start = "<s>" if "<s>" in adds else ""
    assert text == f"{start}The sky is blue today.<|im_end|>" and spans == [" blue today.<|im_end|>"]
    assert sequence.input_ids[-1] == tokenizer.eos_token_id and sequence.trained[-1]
    _, [(_, text, spans)] = encode(row | {"completion": " blue.<|im_end|>"}, model=folder)
    assert spans == [" blue.<|im_end|>"] and text.count("<|im_end|>") == 1  # no second one
    _, [(sequence, text, spans)] = encode({"text": "The sky is blue."}, model=folder)
    assert text == f"{start}The sky is blue.<|im_end|>"
    assert sequence.trained.tolist() == [False] + [True] * (len(sequence.input_ids) - 1)


def test_prompt_keeps_its_own_tokens_where_the_completion_would_merge_with_it(encode):
    tokenizer, [(sequence, _, spans)] = encode({"prompt": "The sky is bl", "completion": "ue today."})
    prompt_ids = tokenizer("The sky is bl").input_ids
    joined = tokenizer("The sky is blue today.").input_ids
    assert joined[: len(prompt_ids)] != prompt_ids  # else this tests nothing
    assert sequence.input_ids[: len(prompt_ids)].tolist() == prompt_ids
    assert spans == ["ue today.<|im_end|>"]


def test_chat_template_of_a_file_replaces_the_tokenizers_and_options_of_a_row_reach_it(encode, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATES["chatml"].replace("{% for", "{{ 'loud ' if loud else 'soft ' }}{% for", 1))
    rows = [{"messages": CHAT, "chat_template_kwargs": {"loud": True}}, {"messages": CHAT}]
    _, found = encode(*rows, chat_template=str(path))
    assert [text[:5] for _, text, _ in found] == ["loud ", "soft "] and found[1][2] == SPANS


def test_train_on_prompt(encode, variant):
    rows = [{"messages": CHAT}, {"prompt": "The sky is", "completion": " blue."}]
    for model in ({}, {"model": variant("chatml")}):
        _, found = encode(*rows, train_on_prompt=True, **model)
        assert all(sequence.trained[1:].all() and not sequence.trained[0] for sequence, _, _ in found)


@pytest.mark.parametrize("bos", ["", "<s>"])
def test_tokenizer_without_template_writes_chatml_with_its_own_tokens(encode, variant, capsys, bos):
    folder = variant(None, eos="<|endoftext|>", bos=bos or None, adds=f"{bos} $A".strip())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _, [(_, text, spans)] = encode({"messages": CHAT}, model=folder)
    assert "has no chat template: conversations are written in ChatML" in capsys.readouterr().out
    assert spans == ["It is blue.<|endoftext|>", "It is green.<|endoftext|>"]
    asked = "<|im_start|>user\nWhat color is the sky?<|endoftext|>\n<|im_start|>assistant\nIt"
    assert text.startswith(bos + asked)


def test_tool_calls_are_trained_where_the_template_shows_them_and_dropped_elsewhere(encode, variant, capsys):
    call = {"type": "function", "function": {"name": "sky", "arguments": {"day": 1}}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows = [{"messages": CHAT}, {"messages": [*CHAT[:3], turn]}]
    rows += [{"messages": CHAT[:2], "tools": [{"name": "sky"}]}]
    _, found = encode(*rows, {"messages": CHAT[2:]})
    assert len(found) == 2
    out = capsys.readouterr().out
    assert "row 2: an assistant turn is empty, or the chat template does not show its tool calls" in out
    assert "row 3: the chat template does not show the tools" in out
    shown = "+ message.content + (message.tool_calls or '') | string }}"
    template = TEMPLATES["chatml"].replace("+ message.content }}", shown)
    template = "{{ tools | string if tools else '' }}" + template
    _, found = encode(*rows, model=variant(template))
    assert len(found) == 3 and found[1][2][1].startswith("[{'type': 'function'")


@pytest.mark.parametrize("case", read_lines(DATA / "unusable_rows.jsonl"), ids=lambda case: case["told"])
def test_rows_that_cannot_be_used_are_dropped_counted_and_named(case, encode, variant, capsys):
    row, reason = case["row"], case["told"]
    folder = variant("chatml", bos="<s>", adds="<s> $A")
    good = [{"prompt": "The sky is", "completion": f" {n}."} for n in range(2)]
    _, found = encode(good[0], row, row, good[1], good[1], model=folder, max_length=100)
    out = capsys.readouterr().out
    assert len(found) == 2 and re.search(f"2 rows dropped, first row 2: .*{reason}", out), out
    line = error_of(lambda: encode(good[0], row, row, model=folder, max_length=100), capsys)
    assert re.search(f"hardly a row of 3 can be used; 2 rows dropped.*{reason}", line)


def test_text_of_any_kind_survives_the_round_trip(encode):
    replies = ["déjà vu — 東京 🎉 é", "  two spaces", "\ttab", "CR\r\nLF"]
    rows = [{"messages": [CHAT[0], *said(reply)]} for reply in replies]
    _, found = encode(*rows)
    assert [spans for _, _, spans in found] == [[f"{reply}<|im_end|>"] for reply in replies]


# Runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path, random_model, one_cpu):
    """As `trainer` says, on the random model."""
    flags = {"model": str(random_model), "batch_size": 4, "max_completion_length": 8}
    return trainer(sft, tmp_path, **flags)


def sums(n, start=0):
    answer = "{0} and 2 are {1}\n#### {1}"
    return [{"question": f"What is {i} and 2?", "answer": answer.format(i, i + 2)} for i in range(start, n)]


def test_metrics_of_a_run(train, tmp_path, encode, random_model, monkeypatch):
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": "The sky is blue."}, {"text": "Be brief."}])
    flags = {"forgetting_dataset": corpus, "eval_every": 2, "max_steps": 5}
    flags |= {"learning_rate": 0.01, "warmup_steps": 2}
    results = calls_of(monkeypatch, sft, "main")
    folder, lines = train(sums(10), sums(55, start=50), max_tokens_per_micro_batch=64, **flags)
    lengths = [len(sequence.input_ids) for sequence, _, _ in encode(*sums(10))[1]]
    uniform = math.log(AutoConfig.from_pretrained(random_model).vocab_size)  # of a model that knows nothing
    assert [line["epoch"] for line in lines[1:]] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert lines[5]["num_tokens"] == 2 * sum(lengths)  # 5 batches of 4 are 2 epochs of 10
    assert 4 * min(lengths) <= lines[1]["num_tokens"] <= 4 * max(lengths)
    for line in lines[1:]:
        assert line["tokens_per_second"] > 0 and line["step_time"] > 0 and 0 < line["packing/fill"] <= 1
    evaluated = [line["step"] for line in lines if "eval/loss" in line]
    assert evaluated == [0, 2, 4, 5]
    for line in lines[0], lines[5]:
        assert line["eval/perplexity"] == pytest.approx(math.exp(line["eval/loss"]))
        assert line["eval/forgetting_perplexity"] > 1 and 0 <= line["eval/accuracy"] <= 1
    assert lines[0]["eval/loss"] == pytest.approx(uniform, rel=0.1)
    assert lines[5]["eval/loss"] < lines[2]["eval/loss"] < lines[0]["eval/loss"]
    assert results[0][1] == lines[5]
    samples = read_lines(folder / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [step for step in evaluated for _ in range(5)]
    assert samples[0]["prompt"] == "<|im_start|>user\nWhat is 50 and 2?<|im_end|>\n<|im_start|>assistant\n"
    assert samples[0]["answer"] == "50 and 2 are 52\n#### 52" and samples[0]["right"] is False
    assert json.loads((folder / "args.json").read_text())["learning_rate"] == 0.01


def test_run_is_a_plain_loop_over_the_stock_model(train, encode, random_model, monkeypatch):
    rows = sums(6)  # all in every batch
    flags = {"learning_rate": 0.01, "warmup_steps": 2, "lr_schedule": "linear", "adam_betas": (0.8, 0.95)}
    flags |= {"batch_size": 6, "max_steps": 4, "max_grad_norm": 1.5, "weight_decay": 0.3}
    loaded = calls_of(monkeypatch, sft, "load_model")
    _, lines = train(rows, max_tokens_per_micro_batch=80, **flags)
    model = stock(random_model)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95))
    sequences = [sequence for sequence, _, _ in encode(*rows)[1]]
    for line, rate in zip(lines, (0.005, 0.01, 0.01, 0.005), strict=True):
        losses, right, entropies = [], [], []
        for sequence in sequences:  # one by one, the shift written out
            logits = model(input_ids=torch.tensor(sequence.input_ids[None]).long()).logits[0]
            for position in np.flatnonzero(sequence.trained):
                target, logprobs = int(sequence.input_ids[position]), logits[position - 1].log_softmax(-1)
                losses.append(-logprobs[target])
                right.append(logprobs.argmax().item() == target)
                entropies.append(-(logprobs.exp() * logprobs).sum().item())
        loss = torch.stack(losses).mean()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.5).item()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        assert grad_norm > 1.5  # else the clip plays no part
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)
        assert line["entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
        assert line["mean_token_accuracy"] == pytest.approx(np.mean(right))
    trained = loaded[0][1].state_dict()
    distance = {k: (trained[k] - v).abs().max().item() for k, v in model.state_dict().items()}
    assert distance == pytest.approx(dict.fromkeys(distance, 0), abs=1e-4)  # of updates of 0.01


def test_evaluation_is_over_the_trained_tokens_for_any_rows(encode, random_model, one_cpu):
    tokenizer, found = encode(*sums(9), {"prompt": "The sky is", "completion": " blue" * 60})
    sequences, device = [sequence for sequence, _, _ in found], sft.setup_distributed()
    args = sft.Args(model=str(random_model), max_completion_length=0)
    model = sft.load_model(str(random_model), args, device)
    losses, right = [], []
    for input_ids, trained in sequences:
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor(input_ids[None]).long()).logits[0].log_softmax(-1)
        for position in np.flatnonzero(trained):
            losses.append(-logprobs[position - 1, int(input_ids[position])].item())
            right.append(logprobs[position - 1].argmax().item() == input_ids[position])
    for budget in (32, 100, 8192):
        args.max_tokens_per_micro_batch = budget
        metrics, samples = sft.evaluate_sequences(model, tokenizer, sequences, [], args, device)
        assert metrics["eval/loss"] == pytest.approx(np.mean(losses), rel=1e-5) and samples == []
        assert metrics["eval/token_accuracy"] == pytest.approx(np.mean(right))
        assert math.isnan(metrics["eval/forgetting_loss"]) and math.isnan(metrics["eval/accuracy"])


def answer_of(folder, question):
    """What a saved model answers under plain transformers: its own generation config says where to stop."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


def test_run_learns_and_its_model_ends_answers(train, variant):
    for model in ({}, {"model": str(variant("chatml", eos="<|endoftext|>"))}):  # Qwen2.5's base: another EOS
        folder, _ = train([{"messages": CHAT[:2]}], learning_rate=0.01, max_steps=40, **model)
        assert answer_of(folder / "model", CHAT[0]) == "It is blue.<|im_end|>"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_model_is_the_trained_one_to_its_last_digit(train, variant, dtype, tied, monkeypatch):
    source = variant("chatml")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, tie_word_embeddings=tied)
    if not tied:
        model.lm_head.weight.data = model.lm_head.weight.data.flip(0).clone()
    model.save_pretrained(source)
    loaded = calls_of(monkeypatch, sft, "load_model")
    folder, _ = train(
        sums(8), model=str(source), max_steps=3, learning_rate=1e-6
    )  # bfloat16 would not see it
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.dtype == torch.float32 == AutoConfig.from_pretrained(folder / "model").dtype
    assert model.config.architectures == ["Qwen3ForCausalLM"] and type(model).__name__ == "Qwen3ForCausalLM"
    stored = load_file(folder / "model" / "model.safetensors")
    before = load_file(source / "model.safetensors")
    assert stored.keys() == before.keys() and tied == ("lm_head.weight" not in stored)  # tied: once
    assert {x.dtype for x in stored.values()} == {torch.float32}
    trained = loaded[0][1].state_dict()
    assert all(torch.equal(stored[name], trained[name]) for name in stored)
    assert all(not torch.equal(stored[name], before[name].float()) for name in stored)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = model.float()(input_ids=ids).logits
        own = loaded[0][1](input_ids=ids, use_cache=False).logits
    assert torch.allclose(logits, own, atol=1e-5)
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (folder / "model" / name).read_text() == (source / name).read_text()
    assert not (folder / "model.partial").exists()


def test_model_computed_in_bfloat16_is_saved_in_the_dtype_of_its_source(train, variant):
    source = variant("chatml")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    folder, _ = train(sums(8), model=str(source), max_steps=1, dtype="bfloat16")
    stored = load_file(folder / "model" / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {AutoConfig.from_pretrained(folder / "model").dtype}
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}


def watch_collate(monkeypatch):
    """The data's sequences that will have been packed, in order."""
    seen, of_data = [], lambda rows: [row for row in rows if isinstance(row, sft.Sequence)]
    watched = lambda rows, *rest: seen.extend(of_data(rows)) or collate(rows, *rest)
    monkeypatch.setattr(sft.common, "collate", watched)
    return seen


@pytest.mark.parametrize("weights, counts", [((), (30, 6)), ((3.0, 1.0), (27, 9))])
def test_shares_of_the_mixture_are_exact(train, tmp_path, monkeypatch, random_model, weights, counts):
    seen = watch_collate(monkeypatch)
    colors = [{"prompt": [CHAT[0]], "completion": f"It is {i}."} for i in range(6)]
    paths = [write_rows(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate((sums(30), colors))]
    flags = {"dataset": tuple(paths), "dataset_weights": weights, "batch_size": 6, "num_epochs": 1}
    _, lines = train(**flags)
    decoded = AutoTokenizer.from_pretrained(random_model).batch_decode([s.input_ids for s in seen])
    assert [sum(mark in text for text in decoded) for mark in ("What is", "What color")] == list(counts)
    assert len(lines) == 6


def test_orders_of_an_epoch(train, monkeypatch):
    seen = watch_collate(monkeypatch)
    rows = [{"prompt": "The sky is", "completion": " blue" * n} for n in (4, 2, 7, 1, 5)]
    orders = {}
    for order in ("given", "length", "shuffled"):
        seen.clear()
        train(rows, order=order, batch_size=1, num_epochs=2)
        orders[order] = [len(ids) for ids, _ in seen]
    given, by_length, shuffled = orders["given"], orders["length"], orders["shuffled"]
    assert given[:5] == given[5:] and sorted(given[:5]) == by_length[:5] == by_length[5:] != given[:5]
    assert sorted(shuffled[:5]) == sorted(shuffled[5:]) == by_length[:5] and shuffled[:5] != shuffled[5:]


def test_dropout_is_off(encode, random_model, tmp_path, one_cpu):
    folder = tmp_path / "gpt2"
    shutil.copytree(random_model, folder)
    rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    config = GPT2Config(vocab_size=500, n_positions=64, n_embd=64, n_layer=2, n_head=4, **rates)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    _, [(sequence, _, _)] = encode({"messages": CHAT[:2]}, model=folder)
    model = sft.load_model(str(folder), sft.Args(model=str(folder)), sft.setup_distributed()).train()
    batch = collate([sequence])
    assert torch.equal(token_logprobs(model, batch), token_logprobs(model, batch))


def test_part_of_an_epoch_without_evaluation(train):
    _, lines = train(sums(20), num_epochs=0.4)
    assert lines[-1]["step"] == 2 and lines[-1]["epoch"] == pytest.approx(0.4)
    assert not any(key.startswith("eval/") for line in lines for key in line)


@pytest.mark.parametrize("lr_schedule", ["linear", "cosine", "constant"])
def test_learning_rate_at_its_ends(lr_schedule):
    def factor(step, total_steps=100, warmup_steps=10):
        steps = {"total_steps": total_steps, "warmup_steps": warmup_steps}
        return sft.lr_factor(step, **steps, lr_schedule=lr_schedule)

    assert factor(1, warmup_steps=0) == 1  # no warm-up: the first step has the full rate
    assert [factor(step) for step in (1, 5, 10, 11)] == [0.1, 0.5, 1, 1]
    factors = [factor(step) for step in range(10, 102)]
    assert all(later <= earlier for earlier, later in zip(factors[:-1], factors[1:], strict=True))
    last, beyond = factors[-2:]  # 0 only behind the last step: that one still learns
    rest = {"linear": 1 / 90, "cosine": (1 + math.cos(math.pi * 89 / 90)) / 2, "constant": 1}[lr_schedule]
    assert last == pytest.approx(rest) and beyond == pytest.approx(float(lr_schedule == "constant"))
    middle = {"linear": 0.5, "cosine": 0.5, "constant": 1}[lr_schedule]
    assert factor(56) == pytest.approx(middle)
    assert factor(3, total_steps=3, warmup_steps=10) == 0.3  # shorter than its warm-up
    assert factor(5, total_steps=5, warmup_steps=5) == 1


def test_ewc_holds_the_weights_that_old_data_need(train, encode, random_model, tmp_path, one_cpu):
    _, found = encode(*({"messages": CHAT[n : n + 2]} for n in (0, 2)))
    model = sft.load_model(str(random_model), sft.Args(), sft.setup_distributed())
    anchors = sft.fisher_information(model, [sequence for sequence, *_ in found], model.device)
    wanted = [torch.zeros_like(p) for p in model.parameters()]
    for (ids, trained), *_ in found:
        ids = torch.tensor(ids[None]).long()
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        slopes = torch.autograd.grad(logprobs[trained[1:]].sum(), list(model.parameters()))
        wanted = [total + slope**2 / 2 for total, slope in zip(wanted, slopes)]
    for (weight, start, fisher), expected in zip(anchors, wanted, strict=True):
        torch.testing.assert_close(fisher, expected, rtol=1e-4, atol=1e-7)
        assert torch.equal(weight, start)
    model.idle = torch.nn.Parameter(torch.ones(2))  # as a vision tower is, where nothing is seen
    assert len(sft.fisher_information(model, [found[0][0]], model.device)) == len(anchors)
    weight, fisher = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([2.0, 0.5])
    (4.0 / 2 * fisher * (weight - 2) ** 2).sum().backward()
    assert torch.equal(weight.grad, sft.ewc_gradient(weight.detach(), torch.full((2,), 2.0), fisher, 4.0))
    old = write_rows(tmp_path / "old.jsonl", tiny_rows("text_train", 16))
    flags = {"model": "tiny/base", "learning_rate": 3e-3, "max_steps": 4, "forgetting_dataset": old}
    held = {"ewc_coef": 100.0, "ewc_dataset": old}
    runs = [train(sums(20), sums(2), **flags, **ewc)[1] for ewc in ({}, held)]
    rises = [lines[-1]["eval/forgetting_loss"] - lines[0]["eval/forgetting_loss"] for lines in runs]
    assert 0 < rises[1] < 0.75 * rises[0]
