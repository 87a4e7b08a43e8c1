"""sft.py: its loss, its batches, which tokens it trains, its errors, and what a run leaves on disk."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, start
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
)

import sft
from common import collate, token_logprobs

# Re-typed from the templates of the model families, without what plays no part here (tools, dates, vision).
TEMPLATES = {
    "chatml": (  # Qwen2.5
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama": (  # Llama 3.1: writes BOS, always has a system message, no line break after the end of a turn
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting date: 2023\n\n' + system + '<|eot_id|>' }}"
        "{% for message in messages %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
        "{{ message.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (  # Gemma 2: the assistant is called model, no system message, EOS is not the end of a turn
        "{{ bos_token }}"
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for message in messages %}"
        "{% set role = 'model' if message.role == 'assistant' else message.role %}"
        "{{ '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "qwen3": (  # Qwen3: only what follows the last question keeps its reasoning
        "{% set ns = namespace(last=0) %}{% for message in messages %}{% if message.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.role == 'assistant' %}{% set parts = message.content.split('</think>') %}"
        "{% if loop.index0 > ns.last %}"
        "{{ '<think>\n' }}{{ parts[0].replace('<think>', '').strip('\n') if parts | length > 1 }}"
        "{{ '\n</think>\n\n' }}{% endif %}{{ parts[-1].lstrip('\n') }}"
        "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
CHAT = [
    {"role": "user", "content": "What color is the sky?"},
    {"role": "assistant", "content": "It is blue."},
    {"role": "user", "content": "What color is the grass?"},
    {"role": "assistant", "content": "It is green."},
]
SYSTEM = {"role": "system", "content": "Be brief."}


# Loss -------------------------------------------------------------------------------------------------------


def test_nll_and_dft_by_hand():
    logprobs = torch.tensor([0.5, 0.25, 1.0]).log()
    assert sft.nll_loss(logprobs).tolist() == pytest.approx([math.log(2), 2 * math.log(2), 0])
    assert sft.dft_loss(logprobs).tolist() == pytest.approx([0.5 * math.log(2), 0.5 * math.log(2), 0])


def test_dft_gradient_is_that_of_its_definition_with_the_weight_held_constant():
    logits = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 3, 6, 2])

    def logprobs(z):
        return z.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

    weights = logprobs(logits).exp()  # of Eq. 9, behind the stop-gradient

    def numerical(f, h=1e-6):
        grad = torch.zeros_like(logits)
        for i in np.ndindex(*logits.shape):
            step = torch.zeros_like(logits)
            step[i] = h
            grad[i] = (f(logits + step) - f(logits - step)) / (2 * h)
        return grad

    variable = logits.clone().requires_grad_()
    sft.dft_loss(logprobs(variable)).sum().backward()
    definition = numerical(lambda z: -(weights * logprobs(z)).sum())
    expected_probability = numerical(lambda z: -logprobs(z).exp().sum())  # pi grad log pi = grad pi
    assert torch.allclose(variable.grad, definition, atol=1e-9)
    assert torch.allclose(variable.grad, expected_probability, atol=1e-9)


def test_aggregates_by_hand():
    batch = collate([([5, 6, 7, 8], [0, 1, 1, 1]), ([9], [0]), ([5, 6], [0, 1])])
    losses = torch.tensor([1.0, 2.0, 6.0, 5.0])
    counts = {"batch_tokens": 4, "batch_sequences": 2}
    assert sft.aggregate(losses, batch, **counts, loss_agg="token_mean").item() == 14 / 4
    assert sft.aggregate(losses, batch, **counts, loss_agg="seq_mean_token_mean").item() == (3 + 5) / 2


@pytest.mark.parametrize("loss_agg", ["token_mean", "seq_mean_token_mean"])
def test_aggregates_do_not_depend_on_the_rows(loss_agg):
    rng = np.random.default_rng(0)
    lengths = [1, 2, 4, 8, 16, 1, 8, 4, 4, 16]  # powers of two: every quotient and sum below is exact
    losses = [torch.tensor(rng.integers(0, 1024, n) / 1024) for n in lengths]
    counts = {"batch_tokens": sum(lengths), "batch_sequences": 16}
    assert counts["batch_tokens"] == 64

    def total(rows):
        parts = []
        for row in rows:
            batch = collate([(range(lengths[i] + 1), [0] + [1] * lengths[i]) for i in row])
            parts.append(
                sft.aggregate(torch.cat([losses[i] for i in row]), batch, **counts, loss_agg=loss_agg)
            )
        return sum(parts).item()

    whole = total([range(10)])
    assert whole == total([[i] for i in range(10)]) == total([[9, 0, 3], [1, 2, 8, 7], [4], [6, 5]])
    by_hand = {
        "token_mean": sum(x.sum().item() for x in losses) / 64,
        "seq_mean_token_mean": sum(x.mean().item() for x in losses) / 16,
    }
    assert whole == by_hand[loss_agg]


def test_neftune_noise_is_uniform_up_to_alpha_over_the_root_of_l_h():
    lengths, hidden_size, alpha = (100, 4), 64, 5.0
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    noise = sft.neftune_noise(lengths, generators, hidden_size, alpha=alpha)
    assert noise.shape == (104, 64)
    for part, length in zip(noise.split(lengths), lengths, strict=True):
        bound = alpha / math.sqrt(length * hidden_size)
        assert 0.97 * bound < part.max() <= bound and -bound <= part.min() < -0.97 * bound
        assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert abs(part.mean().item()) < 0.1 * bound


def test_neftune_noise_of_a_sequence_does_not_depend_on_its_row():
    def noise(*order, lengths=(5, 3, 9)):
        generators = [torch.Generator().manual_seed(i) for i in order]
        packed = sft.neftune_noise([lengths[i] for i in order], generators, 8, alpha=5.0)
        return dict(zip(order, packed.split([lengths[i] for i in order]), strict=True))

    together, alone = noise(2, 0, 1), {i: noise(i)[i] for i in range(3)}
    assert all(torch.equal(together[i], alone[i]) for i in range(3))
    assert not torch.equal(alone[0][:3], alone[1])


@pytest.mark.parametrize("lr_schedule", ["linear", "cosine", "constant"])
def test_learning_rate_at_its_ends(lr_schedule):
    def factor(step, total_steps=100, warmup_steps=10):
        return sft.lr_factor(
            step, total_steps=total_steps, warmup_steps=warmup_steps, lr_schedule=lr_schedule
        )

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


# Batches ----------------------------------------------------------------------------------------------------


def test_packs_the_example_of_the_docstring():
    assert sft.pack([3, 5, 2, 4], max_tokens=8) == [[1, 0], [3, 2]]
    assert "[[1, 0], [3, 2]]" in sft.pack.__doc__


@pytest.mark.parametrize("multiple_of", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_packs_every_index_once_within_the_budget(seed, multiple_of):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, [2, 40, 130, 400, 50][seed], size=[1, 5, 60, 33, 2][seed])
    rows = sft.pack(lengths, max_tokens=100, multiple_of=multiple_of)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[row]) <= 100 or len(row) == 1 for row in rows)
    assert len(rows) % multiple_of == 0
    if multiple_of == 1:
        assert all(rows)


def test_packing_fills_rows_of_a_realistic_mix():
    lengths = np.random.default_rng(0).lognormal(mean=math.log(190), sigma=0.45, size=1000)  # like GSM8K's
    lengths = lengths.round().astype(int).clip(40, 1024)
    rows = sft.pack(lengths, max_tokens=8192)
    assert len(rows) == math.ceil(lengths.sum() / 8192)  # no packing needs fewer
    assert lengths.sum() / (8192 * len(rows)) >= 0.97
    assert all(lengths[row].sum() >= 0.97 * 8192 for row in rows[:-1])


def order_of(sizes, *, shares=None, num_epochs=1, order="shuffled", seed=1, epoch_size=None, lengths=None):
    sources = [[None] * size for size in sizes]
    lengths = np.ones(sum(sizes), int) if lengths is None else np.array(lengths)
    shares, epoch_size = shares or sizes, epoch_size or sum(sizes)
    return sft.data_order(lengths, sources, shares, epoch_size, num_epochs, order, seed)


def test_an_epoch_of_one_source_is_a_permutation_and_each_epoch_another():
    stream = order_of([50], num_epochs=2)
    assert sorted(stream[:50]) == sorted(stream[50:]) == list(range(50))
    assert list(stream[:50]) != list(range(50)) and list(stream[:50]) != list(stream[50:])


def test_several_sources_without_weights_are_used_once_each_and_mixed():
    stream = order_of([30, 70])
    assert sorted(stream) == list(range(100))
    assert 5 < sum(i < 30 for i in stream[:50]) < 25


def test_given_order_keeps_each_source_in_its_order():
    assert list(order_of([5], order="given", num_epochs=2)) == [0, 1, 2, 3, 4] * 2
    stream = order_of([10, 40], order="given")
    assert [i for i in stream if i < 10] == list(range(10))
    assert [i for i in stream if i >= 10] == list(range(10, 50))
    assert all(sum(i < 10 for i in stream[n : n + 5]) == 1 for n in range(0, 50, 5))  # evenly interleaved


def test_length_order_goes_from_short_to_long_in_each_epoch():
    lengths = [7, 3, 5, 3, 9, 1]
    stream = order_of([6], order="length", lengths=lengths, num_epochs=2)
    assert [lengths[i] for i in stream] == sorted(lengths) * 2
    assert sorted(stream[:6]) == list(range(6))


def test_weights_hold_to_within_one_sequence_in_every_epoch():
    stream = order_of([90, 13], shares=(0.7, 0.3), num_epochs=4)
    for epoch in stream.reshape(4, 103):
        first, second = epoch[epoch < 90], epoch[epoch >= 90]
        assert abs(len(first) - 0.7 * 103) <= 1
        assert len(set(first)) == len(first)  # nothing twice from the source that is larger than its share
        repeats = np.bincount(second - 90)  # the small source goes round: each sequence as often, up to one
        assert len(repeats) == 13 and repeats.max() - repeats.min() <= 1


def test_data_order_depends_on_the_seed_alone_and_begins_alike_for_any_number_of_epochs():
    kinds = ({}, {"shares": (0.5, 0.5)}, {"order": "length"})
    for kind in kinds:
        stream = order_of([40, 9], num_epochs=3, **kind)
        np.random.seed(0)  # the global state plays no part
        assert np.array_equal(stream, order_of([40, 9], num_epochs=3, **kind))
        assert np.array_equal(stream[:49], order_of([40, 9], **kind))
        assert not np.array_equal(stream, order_of([40, 9], num_epochs=3, seed=2, **kind))


# Encoding ---------------------------------------------------------------------------------------------------


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


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
        args = sft.Args(model=str(model), dataset=(path,), **flags)
        tokenizer = sft.load_tokenizer(args)
        tokenizer.add_tokens(list(args.add_special_tokens), special_tokens=True)
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


def test_generation_marks_train_every_assistant_turn_and_its_end_token(encode):
    _, [(_, text, spans)] = encode({"messages": [SYSTEM, *CHAT]})
    assert spans == ["It is blue.<|im_end|>", "It is green.<|im_end|>"]
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat")
    assert text.endswith("It is green.<|im_end|>\n")


def test_end_token_is_trained_where_the_template_leaves_it_outside_its_marks(encode, variant):
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.role == 'assistant' %}{%- generation -%}{{ message.content }}{%- endgeneration -%}"
        "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    )
    _, [(_, _, spans)] = encode({"messages": CHAT}, model=variant(template))
    assert spans == ["It is blue.<|im_end|>", "It is green.<|im_end|>"]


def test_chatml_without_marks_trains_up_to_the_end_token_and_not_the_line_break(encode, variant):
    _, [(_, text, spans)] = encode({"messages": [SYSTEM, *CHAT]}, model=variant("chatml"))
    assert spans == ["It is blue.<|im_end|>", "It is green.<|im_end|>"]
    assert text.endswith("It is green.<|im_end|>\n")


def test_llama_template_without_marks(encode, variant):
    names = ["<|start_header_id|>", "<|end_header_id|>"]
    folder = variant("llama", eos="<|eot_id|>", bos="<s>", tokens=names, adds="<s> $A")
    for messages in (CHAT, [SYSTEM, *CHAT]):
        _, [(_, text, spans)] = encode({"messages": messages}, model=folder)
        assert spans == ["It is blue.<|eot_id|>", "It is green.<|eot_id|>"]
        assert text.startswith("<s><|start_header_id|>system<|end_header_id|>\n\nCutting")
        assert text.count("<s>") == 1


def test_gemma_template_ends_turns_with_what_the_generation_config_names(encode, variant, capsys):
    ends = ["<eos>", "<end_of_turn>"]
    folder = variant("gemma", eos="<eos>", bos="<bos>", tokens=["<start_of_turn>", *ends], ends=ends)
    tokenizer, [(_, text, spans)] = encode({"messages": CHAT}, model=folder)
    assert spans == ["It is blue.<end_of_turn>", "It is green.<end_of_turn>"]
    assert "<start_of_turn>model\n" in text and text.startswith("<bos>") and text.count("<bos>") == 1
    assert sorted(tokenizer.end_ids) == sorted(tokenizer.convert_tokens_to_ids(ends))
    with pytest.raises(SystemExit) as stop:
        encode({"messages": CHAT}, {"messages": [SYSTEM, *CHAT]}, model=folder)
    assert stop.value.code == 2
    assert re.fullmatch(r"error: .*rows\.jsonl, row 2: .*no system role\n", capsys.readouterr().err)


def test_template_that_drops_old_reasoning_gives_one_sequence_per_turn(encode, variant):
    messages = [dict(message) for message in CHAT]
    messages[1]["content"] = "<think>\nsky\n</think>\n\nIt is blue."
    messages[3]["content"] = "<think>\ngrass\n</think>\n\nIt is green."
    tokenizer, found = encode({"messages": messages}, model=variant("qwen3"))
    assert [spans for _, _, spans in found] == [
        ["<think>\nsky\n</think>\n\nIt is blue.<|im_end|>"],
        ["<think>\ngrass\n</think>\n\nIt is green.<|im_end|>"],
    ]
    for turn, (sequence, text, _) in zip((1, 3), found, strict=True):  # what the model sees when it writes it
        prompt = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        assert text.startswith(prompt) and not sequence.trained[: len(prompt_ids)].any()
        assert sequence.input_ids[: len(prompt_ids)].tolist() == prompt_ids
    assert "sky\n</think>" not in found[1][1]


def test_template_that_keeps_old_turns_gives_one_sequence(encode, variant):
    _, found = encode({"messages": CHAT[:2]}, model=variant("qwen3"))
    assert [spans for _, _, spans in found] == [["<think>\n\n</think>\n\nIt is blue.<|im_end|>"]]


def test_end_of_turn_that_nothing_names_is_found_in_the_template(encode, variant):
    # Qwen2.5's base models: EOS is <|endoftext|>, in the generation config, too, but turns end otherwise
    folder = variant("chatml", eos="<|endoftext|>")
    tokenizer, [(_, _, spans)] = encode({"messages": CHAT}, model=folder)
    assert spans == ["It is blue.<|im_end|>", "It is green.<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in tokenizer.end_ids


def test_reply_behind_a_space_is_trained_from_its_first_token(encode, variant):
    template = (
        "{% for message in messages %}{{ message.role + ': ' + message.content }}"
        "{{ eos_token if message.role == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    _, [(_, _, spans)] = encode({"messages": CHAT[:2]}, model=variant(template))
    assert [span.lstrip() for span in spans] == ["It is blue.<|im_end|>"]


@pytest.mark.parametrize("template", [None, "chatml"])
@pytest.mark.parametrize("adds", ["$A", "<s> $A", "$A <|im_end|>", "<s> $A <|im_end|>"])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"])
def test_prompt_and_completion_as_text(encode, variant, template, adds, pad):
    folder = variant(template, bos="<s>" if "<s>" in adds else None, adds=adds, pad=pad)
    row = {"prompt": "The sky is", "completion": " blue today."}
    tokenizer, [(sequence, text, spans)] = encode(row, model=folder)
    start = "<s>" if "<s>" in adds else ""
    assert text == f"{start}The sky is blue today.<|im_end|>" and spans == [" blue today.<|im_end|>"]
    assert sequence.input_ids[-1] == tokenizer.eos_token_id and sequence.trained[-1]
    _, [(sequence, text, spans)] = encode({"text": "The sky is blue."}, model=folder)
    assert text == f"{start}The sky is blue.<|im_end|>"
    assert sequence.trained.tolist() == [False] + [True] * (len(sequence.input_ids) - 1)


def test_tokenizer_that_begins_texts_with_its_eos_keeps_whole_prompts(encode, variant):
    folder = variant(None, bos="<|im_end|>", adds="<|im_end|> $A")  # as OPT's
    _, [(_, text, spans)] = encode({"prompt": "The sky is", "completion": " blue."}, model=folder)
    assert text == "<|im_end|>The sky is blue.<|im_end|>" and spans == [" blue.<|im_end|>"]
    _, [(_, text, _)] = encode({"text": "The sky is blue."}, model=folder)
    assert text == "<|im_end|>The sky is blue.<|im_end|>"


def test_completion_that_ends_with_eos_gets_no_second_one(encode):
    _, [(_, text, spans)] = encode({"prompt": "The sky is", "completion": " blue.<|im_end|>"})
    assert spans == [" blue.<|im_end|>"] and text.count("<|im_end|>") == 1


def test_prompt_that_ends_with_an_end_token_keeps_it(encode):
    _, [(_, text, spans)] = encode({"prompt": "What color?<|im_end|>", "completion": "It is blue."})
    assert text == "What color?<|im_end|>It is blue.<|im_end|>" and spans == ["It is blue.<|im_end|>"]


def test_prompt_keeps_its_own_tokens_where_the_completion_would_merge_with_it(encode):
    tokenizer, [(sequence, _, spans)] = encode({"prompt": "The sky is bl", "completion": "ue today."})
    prompt_ids = tokenizer("The sky is bl").input_ids
    joined = tokenizer("The sky is blue today.").input_ids
    assert joined[: len(prompt_ids)] != prompt_ids  # else this tests nothing
    assert sequence.input_ids[: len(prompt_ids)].tolist() == prompt_ids
    assert spans == ["ue today.<|im_end|>"]


def test_formats_say_the_same(encode):
    user, assistant = CHAT[:2]
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "blue."}]
    rows = [
        {"messages": CHAT[:2]},
        {"prompt": [user], "completion": [assistant]},
        {"prompt": user["content"], "completion": [assistant]},
        {"prompt": [user], "completion": assistant["content"]},
        {"question": user["content"], "answer": assistant["content"]},
        {"messages": [user, {"role": "assistant", "content": parts}]},
        {"messages": [{**user, "name": None}, {**assistant, "tool_calls": None}], "source": "x"},
        {
            "conversations": [
                {"from": "human", "value": user["content"]},
                {"from": "gpt", "value": assistant["content"]},
            ]
        },
    ]
    _, found = encode(*rows, dedupe=False)
    assert len(found) == len(rows)
    assert {text for _, text, _ in found} == {found[0][1]}
    assert {tuple(spans) for _, _, spans in found} == {("It is blue.<|im_end|>",)}


def test_assistant_turns_of_the_prompt_are_not_trained(encode, variant):
    row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    for model in ({}, {"model": variant("chatml")}):
        _, [(_, text, spans)] = encode(row, **model)
        assert spans == ["It is green.<|im_end|>"] and "It is blue." in text


def test_file_formats_say_the_same(encode, random_model, tmp_path):
    rows = [{"prompt": "The sky is", "completion": " blue."}, {"prompt": "Be", "completion": " brief, déjà"}]
    files = [tmp_path / f"same.{kind}" for kind in ("jsonl", "json", "parquet", "csv")] + [tmp_path / "saved"]
    write_rows(files[0], rows)
    files[1].write_text(json.dumps(rows, indent=1), encoding="utf-8")
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(files[2])
    table.to_csv(files[3])
    datasets.DatasetDict(train=table).save_to_disk(files[4])
    assert all(sft.load_rows(str(path), "train", None) == rows for path in files)
    turns = [conversation(SYSTEM, *CHAT), {**conversation(*CHAT[:2]), "tools": None}]
    datasets.Dataset.from_list(turns).to_parquet(tmp_path / "turns.parquet")
    args = sft.Args(model=str(random_model))
    tokenizer = sft.load_tokenizer(args)
    found = sft.load_sequences(tokenizer, str(tmp_path / "turns.parquet"), "train", args)
    assert [s.input_ids.tolist() for s in found] == [s.input_ids.tolist() for s, _, _ in encode(*turns)[1]]


def test_chat_template_options_of_a_row_reach_the_template(encode, variant):
    template = TEMPLATES["chatml"].replace("{% for", "{{ 'loud ' if loud else '' }}{% for", 1)
    rows = [{"messages": CHAT, "chat_template_kwargs": {"loud": True}}, {"messages": CHAT}]
    _, found = encode(*rows, model=variant(template))
    assert [text[:5] for _, text, _ in found] == ["loud ", "<|im_"]


def test_chat_template_of_a_file_replaces_the_tokenizers(encode, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATES["chatml"].replace("<|im_start|>", "<|im_start|><|im_start|>"), encoding="utf-8")
    _, [(_, text, spans)] = encode({"messages": CHAT[:2]}, chat_template=str(path))
    assert text.startswith("<|im_start|><|im_start|>user\n") and spans == ["It is blue.<|im_end|>"]


def test_train_on_system(encode, variant):
    for model in ({}, {"model": variant("chatml")}):
        _, [(_, _, spans)] = encode({"messages": [SYSTEM, *CHAT]}, train_on_system=True, **model)
        assert spans[0].startswith("system\nBe brief.<|im_end|>") and "What" not in spans[0]
        assert spans[1:] == ["It is blue.<|im_end|>", "It is green.<|im_end|>"]
        _, [(_, _, spans)] = encode({"messages": CHAT}, train_on_system=True, **model)
        assert spans == ["It is blue.<|im_end|>", "It is green.<|im_end|>"]


def test_train_on_prompt(encode, variant):
    rows = [{"messages": CHAT}, {"prompt": "The sky is", "completion": " blue."}]
    for model in ({}, {"model": variant("chatml")}):
        _, found = encode(*rows, train_on_prompt=True, **model)
        assert all(sequence.trained[1:].all() and not sequence.trained[0] for sequence, _, _ in found)


def test_tokenizer_without_template_falls_back_to_chatml(encode, random_model, tmp_path, capsys):
    folder = tmp_path / "no_template"
    shutil.copytree(random_model, folder)
    (folder / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):  # its tokens are not ChatML's, either
        text = (folder / name).read_text(encoding="utf-8")
        text = text.replace("<|im_start|>", "<|turn|>").replace("<|im_end|>", "<|end|>")
        (folder / name).write_text(text, encoding="utf-8")
    size = len(AutoTokenizer.from_pretrained(folder))
    tokenizer, [(_, text, spans)] = encode({"messages": CHAT}, model=folder)
    assert "no chat template: using ChatML" in capsys.readouterr().out
    assert spans == ["It is blue.<|im_end|>", "It is green.<|im_end|>"]
    assert text.startswith("<|im_start|>user\nWhat color is the sky?<|im_end|>\n<|im_start|>assistant\nIt")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id in tokenizer.end_ids
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [size, size + 1]
    model = sft.load_model(str(folder), sft.Args(model=str(folder)), tokenizer, torch.device("cpu"))
    assert_new_rows_are_the_mean(model, random_model, size, 2)
    assert len(model.get_input_embeddings().weight) == size + 2


def assert_new_rows_are_the_mean(model, source, size, count):
    rows = model.get_input_embeddings().weight.detach()
    source = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    old = source.get_input_embeddings().weight.detach()[:size]
    assert torch.equal(rows[:size], old)
    assert torch.allclose(rows[size : size + count], old.mean(0).expand(count, -1), atol=1e-7)
    assert torch.equal(model.get_output_embeddings().weight, rows)


@pytest.mark.parametrize("spare", [0, 16])
def test_new_special_tokens_start_as_the_mean_of_the_old_ones(encode, random_model, tmp_path, spare):
    folder = tmp_path / "spare"
    shutil.copytree(random_model, folder)
    size = len(AutoTokenizer.from_pretrained(folder))
    if spare:  # Qwen's tables have more rows than the tokenizer has tokens
        model = AutoModelForCausalLM.from_pretrained(random_model)
        model.resize_token_embeddings(size + spare)
        model.save_pretrained(folder)
    flags = {"add_special_tokens": ("<think>", "</think>")}
    example = {"prompt": "What?", "completion": "<think>six</think>blue"}
    tokenizer, [(sequence, _, spans)] = encode(example, model=folder, **flags)
    assert spans == ["<think>six</think>blue<|im_end|>"]
    assert {size, size + 1} <= set(sequence.input_ids.tolist())
    model = sft.load_model(str(folder), sft.Args(model=str(folder), **flags), tokenizer, torch.device("cpu"))
    assert len(model.get_input_embeddings().weight) == size + (spare or 2)
    assert_new_rows_are_the_mean(model, random_model, size, 2)


def test_duplicates_are_dropped_and_counted(encode, capsys):
    rows = [{"messages": CHAT}, {"messages": CHAT[:2]}, {"messages": CHAT}, {"messages": CHAT}]
    assert len(encode(*rows)[1]) == 2
    assert ", 2 dropped as duplicates" in capsys.readouterr().out
    assert len(encode(*rows, dedupe=False)[1]) == 4
    assert "as duplicates" not in capsys.readouterr().out
    same_tokens = [
        {"prompt": "The sky", "completion": " is blue."},
        {"prompt": "The sky is", "completion": " blue."},
    ]
    assert len(encode(*same_tokens)[1]) == 2  # they train other tokens


def test_overlong_sequences_are_dropped_or_cut_and_counted(encode, capsys):
    short = {"prompt": "The sky is", "completion": " blue."}
    long = {"prompt": "The sky is", "completion": " blue" + " and blue" * 30}
    out_of_reach = {"prompt": "The sky is blue. " * 10, "completion": "Yes."}
    rows = [short, long, out_of_reach]
    _, [(_, text, _)] = encode(*rows, max_length=20)
    assert text == "The sky is blue.<|im_end|>"
    assert "1 sequences" in (out := capsys.readouterr().out) and "2 dropped as longer than 20 tokens" in out
    _, found = encode(*rows, max_length=20, overlong="truncate")
    out = capsys.readouterr().out
    assert "1 cut to 20 tokens" in out and "1 dropped as longer than 20 tokens" in out
    assert [len(sequence.input_ids) for sequence, _, _ in found][1:] == [20]
    cut = found[1][0]
    assert found[1][1].startswith("The sky is blue and blue") and "<|im_end|>" not in found[1][1]
    assert cut.trained[-1] and "EOS trained in 50%" in out


def test_text_of_any_kind_survives_the_round_trip(encode):
    replies = ["déjà vu — 東京 🎉 é", "  two spaces\n\n", "\ttab", "CR\r\nLF"]
    rows = [{"messages": [CHAT[0], {"role": "assistant", "content": reply}]} for reply in replies]
    _, found = encode(*rows)
    assert [spans for _, _, spans in found] == [[f"{reply}<|im_end|>"] for reply in replies]


def test_only_a_line_feed_ends_a_line_of_jsonl(encode):
    text = (
        "next line\x85 line separator\u2028 paragraph separator\u2029 form feed"  # valid within JSON strings
    )
    _, [(_, found, _)] = encode({"text": text})
    assert found == f"{text}<|im_end|>"


# Errors -----------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path, random_model):
    """refused(pattern, rows or text, **flags): one line on stderr, exit status 2, no model is loaded."""

    def fail_to_load(*_, **__):
        pytest.fail("a model was loaded before the error was found")

    def run(pattern, content=({"messages": CHAT},), *, name="rows.jsonl", **flags):
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail_to_load)
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            write_rows(path, content)
        defaults = {
            "model": str(random_model),
            "dataset": (str(path),),
            "output_dir": str(tmp_path / "run"),
        }
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            sft.main(sft.Args(**(defaults | flags)))
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1, lines
        assert lines[0].startswith("error: ") and re.search(pattern, lines[0]), lines[0]
        if "output_dir" not in flags:
            assert not (tmp_path / "run").exists()

    return run


def conversation(*messages):
    return {"messages": list(messages)}


EMPTY_TURN = {"role": "assistant", "content": " \n"}


@pytest.mark.parametrize(
    "pattern, content, flags",
    [
        (r"rows\.jsonl: .*empty", "", {}),
        (r"rows\.jsonl: .*empty", "\n\n", {}),
        (r"rows\.json: .*empty", "[]", {"name": "rows.json"}),
        (r"rows\.jsonl, line 2: not JSON", '{"text": "a b"}\n{"text": \n', {}),
        (r"rows\.json\b.*not JSON", '[{"text": "a b"}, ', {"name": "rows.json"}),
        (r"row 1: .*\bfoo, bar\b.*messages; prompt \+ completion", [{"foo": 1, "bar": 2}], {}),
        (r"row 2: .*\bprompt\b.*accepted", [conversation(*CHAT), {"prompt": "a", "chosen": "b"}], {}),
        (r"row 2: an assistant turn is empty", [conversation(*CHAT), conversation(CHAT[0], EMPTY_TURN)], {}),
        (r"row 1: the completion is empty", [{"prompt": "a", "completion": "  "}], {}),
        (r"row 3: no assistant turn", [conversation(*CHAT), conversation(*CHAT), conversation(CHAT[0])], {}),
        (r"row 1: no assistant turn", [{"prompt": CHAT[:2], "completion": CHAT[2:3]}], {}),
        (r"--max-length 4;.*shortest has \d+ tokens", [conversation(*CHAT)], {"max_length": 4}),
        (r"--dataset-weights has 1 numbers? for 2", "", {"dataset": ("a", "b"), "dataset_weights": (1,)}),
        (r"--dataset-weights must be above 0", "", {"dataset": ("a", "b"), "dataset_weights": (1, 0)}),
        (r"--replay-fraction", [conversation(*CHAT)], {"replay_fraction": 1.0}),
        (r"--batch-size must be at least 1", [conversation(*CHAT)], {"batch_size": 0}),
        (r"--resume needs --output-dir", [conversation(*CHAT)], {"resume": True, "output_dir": None}),
        (r"--model no/such_model", [conversation(*CHAT)], {"model": "no/such_model"}),
        (r"--model \./nowhere: no such folder", [conversation(*CHAT)], {"model": "./nowhere"}),
        (r"--chat-template nowhere: no such file", [conversation(*CHAT)], {"chat_template": "nowhere"}),
        (r"nowhere\.jsonl: no such file", [conversation(*CHAT)], {"dataset": ("nowhere.jsonl",)}),
        (r"nowhere\.jsonl: no such file", [conversation(*CHAT)], {"eval_dataset": "nowhere.jsonl"}),
        (r"nowhere\.jsonl: no such file", [conversation(*CHAT)], {"replay_dataset": "nowhere.jsonl"}),
        (r"nowhere\.jsonl: no such file", [conversation(*CHAT)], {"forgetting_dataset": "nowhere.jsonl"}),
    ],
)
def test_mistakes_end_the_run_with_one_line_before_a_model_is_loaded(refused, pattern, content, flags):
    refused(pattern, content, **flags)


@pytest.mark.parametrize(
    "pattern, content",
    [
        (r"row 1\b", [{"messages": "What?"}]),
        (r"row 2\b", [conversation(*CHAT), {"messages": None}]),
        (r"row 1\b", [conversation(CHAT[0], {"content": "It is blue."})]),
        *(
            case
            for case in (
                (r"row 2\b", [conversation(*CHAT), 5]),
                (r"row 1\b", [["a", "b"]]),
                (r"row 1\b", [{"messages": ["What?", "It is blue."]}]),
                (r"row 1\b", [conversation(CHAT[0], {"role": "assistant", "content": 5})]),
                (r"row 1\b", [{"conversations": [{"from": "human"}]}]),
                (r"row 1\b", [{"prompt": "The sky is", "completion": 5}]),
                (r"rows\.jsonl\b.*(UTF-8|utf-8)", b'{"text": "caf\xe9 au lait"}\n'),
            )
        ),
    ],
)
def test_rows_of_the_wrong_type_are_named(refused, pattern, content):
    refused(pattern, content)


def test_sharegpt_rows_may_use_the_names_of_roles_that_openai_uses(encode):
    turns = [{"role": message["role"], "content": message["content"]} for message in CHAT]
    _, [(_, _, spans)] = encode({"conversations": turns})
    assert spans == ["It is blue.<|im_end|>", "It is green.<|im_end|>"]


@pytest.mark.parametrize(
    "marked", ["{% generation %}{% endgeneration %}", "{%- generation -%}{%- endgeneration -%}"]
)
def test_generation_marks_that_hold_nothing_are_an_error(refused, variant, marked):
    template = TEMPLATES["chatml"].replace(
        "{% endfor", f"{{% if message.role == 'assistant' %}}{marked}{{% endif %}}{{% endfor"
    )
    refused(r"row 1: .*generation marks", model=str(variant(template)))


def test_two_bos_tokens_are_an_error(refused, variant):
    folder = variant("llama", bos="<s>", tokens=["<|start_header_id|>", "<|end_header_id|>"], adds="<s> $A")
    refused(r"row 1: .*two BOS", [{"prompt": "<s>The sky is", "completion": " blue."}], model=str(folder))
    doubled = variant("{{ bos_token }}" + TEMPLATES["llama"], bos="<s>")
    refused(r"row 1: .*two BOS", model=str(doubled))


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ raise_exception('no') }}", "{{ messages[2].content }}"]
)
def test_template_that_breaks_is_an_error(refused, tmp_path, template):
    path = tmp_path / "template.jinja"
    path.write_text(template)
    refused(r"(row 1|template\.jinja)\b", [conversation(*CHAT[:2])], chat_template=str(path))


def test_template_that_needs_a_system_message_works(encode, variant):
    template = "{{ raise_exception('no') if messages[0].role != 'system' }}" + TEMPLATES["chatml"]
    _, [(_, _, spans)] = encode({"messages": [SYSTEM, *CHAT]}, model=variant(template))
    assert spans == ["It is blue.<|im_end|>", "It is green.<|im_end|>"]


def test_template_that_renders_the_prompt_anew_is_an_error(refused, variant):
    template = "{{ messages | length }}" + TEMPLATES["chatml"]
    refused(r"row 1: .*generation marks", model=str(variant(template)))


def test_split_that_a_saved_dataset_lacks_is_an_error(refused, tmp_path):
    table = datasets.Dataset.from_list([conversation(*CHAT)])
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "saved")
    refused(r"saved: .*test", dataset=(str(tmp_path / "saved"),), dataset_split="test")


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_run_in_the_output_folder_is_left_alone(refused, tmp_path, state):
    folder = tmp_path / "old"
    (folder / ("model" if state == "finished" else "checkpoints")).mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    refused(rf"old.*\b{state}\b.*--resume", output_dir=str(folder))
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_soft_capped_model_is_refused_by_name(refused, random_model, tmp_path):
    folder = tmp_path / "gemma2"
    shutil.copytree(random_model, folder)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    Gemma2Config(vocab_size=500, architectures=["Gemma2ForCausalLM"], **sizes).save_pretrained(folder)
    refused(r"gemma2.*soft-cap.*--attn eager", model=str(folder))


def test_tokenizer_without_an_end_token_is_an_error(refused, variant):
    folder = variant(None, eos=None)
    refused(r"(EOS|end token)", [{"prompt": "The sky is", "completion": " blue."}], model=str(folder))


def test_model_that_is_not_a_language_model_is_refused(refused, random_model, tmp_path):
    folder = tmp_path / "vision"
    shutil.copytree(random_model, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    refused(r"vit is not a causal language model", model=str(folder))


# Runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(monkeypatch, tmp_path, random_model, one_cpu):
    """train(rows, **flags) -> output folder, lines of metrics.jsonl; train.models: the models it trained."""
    load_model = sft.load_model

    def run(rows, **flags):
        path = write_rows(tmp_path / "train.jsonl", rows)
        folder = str(tmp_path / f"run_{len(run.models)}")
        defaults = {"model": str(random_model), "dataset": (path,), "output_dir": folder, "batch_size": 4}
        defaults |= {"max_completion_length": 8, "warmup_steps": 0, "save_every": 0}
        args = sft.Args(**(defaults | flags))
        run.result = sft.main(args)
        return Path(args.output_dir), read_lines(Path(args.output_dir) / "metrics.jsonl")

    run.models = []
    monkeypatch.setattr(
        sft, "load_model", lambda *args: run.models.append(load_model(*args)) or run.models[-1]
    )
    return run


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sums(n, start=0):
    return [
        {"question": f"What is {i} and 2?", "answer": f"{i} and 2 are {i + 2}\n#### {i + 2}"}
        for i in range(start, start + n)
    ]


def test_metrics_of_a_run(train, tmp_path, encode, random_model):
    held_out = write_rows(tmp_path / "held_out.jsonl", sums(5, start=50))
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": "The sky is blue."}, {"text": "Be brief."}])
    flags = {"eval_dataset": held_out, "forgetting_dataset": corpus, "eval_every": 2, "max_steps": 5}
    flags |= {"learning_rate": 0.01, "warmup_steps": 2, "lr_schedule": "linear"}
    folder, lines = train(sums(10), max_tokens_per_micro_batch=64, **flags)
    lengths = [len(sequence.input_ids) for sequence, _, _ in encode(*sums(10))[1]]
    uniform = math.log(AutoConfig.from_pretrained(random_model).vocab_size)  # entropy of knowing nothing
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    rates = [0.005, 0.01, 0.01, 0.02 / 3, 0.01 / 3]
    assert [line["learning_rate"] for line in lines[1:]] == pytest.approx(rates)
    assert [line["epoch"] for line in lines[1:]] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert lines[5]["num_tokens"] == 2 * sum(lengths)  # 5 batches of 4 are 2 epochs of 10
    assert 4 * min(lengths) <= lines[1]["num_tokens"] <= 4 * max(lengths)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    for line in lines[1:]:
        assert line["grad_norm"] > 0 and line["tokens_per_second"] > 0 and line["step_time"] > 0
        assert 0 <= line["mean_token_accuracy"] <= 1 and 0 < line["packing/fill"] <= 1
        assert 0 < line["entropy"] <= uniform + 1e-4
    evaluated = [line["step"] for line in lines if "eval/loss" in line]
    assert evaluated == [0, 2, 4, 5]
    for line in lines[0], lines[5]:
        assert line["eval/perplexity"] == pytest.approx(math.exp(line["eval/loss"]))
        assert line["eval/forgetting_perplexity"] > 1 and 0 <= line["eval/accuracy"] <= 1
    assert lines[0]["eval/loss"] == pytest.approx(uniform, rel=0.1)
    assert lines[5]["eval/loss"] < lines[2]["eval/loss"] < lines[0]["eval/loss"]
    assert train.result == lines[5]
    samples = read_lines(folder / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [step for step in evaluated for _ in range(5)]
    assert samples[0]["prompt"] == "<|im_start|>user\nWhat is 50 and 2?<|im_end|>\n<|im_start|>assistant\n"
    assert samples[0]["answer"].strip() == "50 and 2 are 52\n#### 52" and samples[0]["right"] is False
    assert json.loads((folder / "args.json").read_text())["learning_rate"] == 0.01
    assert (folder / "sft.py").read_text() == (ROOT / "sft.py").read_text()


def test_run_is_a_plain_loop_over_the_stock_model(train, encode, random_model):
    rows = sums(6)  # all in every batch
    flags = {"learning_rate": 0.01, "warmup_steps": 2, "lr_schedule": "linear", "adam_betas": (0.8, 0.95)}
    flags |= {"batch_size": 6, "max_steps": 4, "max_grad_norm": 1.5, "weight_decay": 0.3}
    _, lines = train(rows, max_tokens_per_micro_batch=80, **flags)
    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95))
    sequences = [sequence for sequence, _, _ in encode(*rows)[1]]
    for line, rate in zip(lines[1:], (0.005, 0.01, 0.01, 0.005), strict=True):
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
    trained = train.models[0].state_dict()
    distance = {k: (trained[k] - v).abs().max().item() for k, v in model.state_dict().items()}
    assert distance == pytest.approx(dict.fromkeys(distance, 0), abs=1e-4)  # of updates of 0.01


def test_eager_attention_gives_the_same_loss(train):
    packed, eager = (
        train(sums(8), max_steps=2, learning_rate=1e-3, attn=attn)[1][1:] for attn in ("packed", "eager")
    )
    for line, other in zip(packed, eager, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_soft_capped_model_trains_with_eager_attention(train, random_model, tmp_path):
    folder = tmp_path / "gemma2"
    shutil.copytree(random_model, folder)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_logit_softcapping": 1.0}
    config = Gemma2Config(vocab_size=500, pad_token_id=0, **sizes, **heads)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    held_out = write_rows(tmp_path / "held_out.jsonl", sums(2))
    flags = {"model": str(folder), "attn": "eager", "eval_dataset": held_out, "max_steps": 10}
    _, lines = train(sums(4), learning_rate=0.003, **flags)
    assert lines[-1]["loss"] < lines[1]["loss"] and lines[-1]["eval/loss"] < lines[0]["eval/loss"]


def test_held_out_loss_is_that_of_the_trained_tokens_for_any_rows(encode, random_model, one_cpu):
    tokenizer, found = encode(*sums(9), {"prompt": "The sky is", "completion": " blue" * 60})
    sequences, device = [sequence for sequence, _, _ in found], torch.device("cpu")
    model = sft.load_model(str(random_model), sft.Args(model=str(random_model)), tokenizer, device)
    losses, right = [], []
    for input_ids, trained in sequences:
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor(input_ids[None]).long()).logits[0].log_softmax(-1)
        for position in np.flatnonzero(trained):
            losses.append(-logprobs[position - 1, int(input_ids[position])].item())
            right.append(logprobs[position - 1].argmax().item() == input_ids[position])
    for budget in (32, 100, 8192):
        args = sft.Args(max_tokens_per_micro_batch=budget)
        loss, accuracy = sft.held_out_loss(model, sequences, args, device)
        assert loss == pytest.approx(np.mean(losses), rel=1e-5) and accuracy == pytest.approx(np.mean(right))


@pytest.mark.parametrize("kind", ["marks", "pad is EOS"])
def test_sampled_answers_do_not_depend_on_the_padding(variant, random_model, one_cpu, kind):
    folder = random_model if kind == "marks" else variant("chatml", pad="<|im_end|>")
    device, lengths = torch.device("cpu"), (3, 20, 1, 9)
    prompts = [[(7 * i + n) % 300 + 3 for i in range(n)] for n in lengths]
    args = sft.Args(model=str(folder), temperature=0, max_completion_length=12)
    tokenizer = sft.load_tokenizer(args)
    model = sft.load_model(args.model, args, tokenizer, device)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in [*model.model.layers, *stock.model.layers]:
        for weight in layer.parameters():
            weight.data *= 10  # else the next token is the last one again, whatever stands before it
    alone = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and (len(ids) == len(prompt) or ids[-1] not in tokenizer.end_ids):
            ids.append(stock(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        alone.append(ids[len(prompt) :])
    assert all(len(set(ids)) > 3 for ids in alone)
    for batch in (1, 3, 64):
        args.generation_batch_size = batch
        assert sft.generate(model, tokenizer, prompts, args, device) == alone


def test_sampling_leaves_the_random_state_and_the_settings_of_the_model_alone(random_model, one_cpu):
    args = sft.Args(model=str(random_model), max_completion_length=8)
    tokenizer = sft.load_tokenizer(args)
    model = sft.load_model(args.model, args, tokenizer, torch.device("cpu"))
    before, own = torch.get_rng_state(), model.generation_config
    first = sft.generate(model, tokenizer, [[5, 6, 7]] * 20, args, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before) and model.generation_config is own
    assert first == sft.generate(model, tokenizer, [[5, 6, 7]] * 20, args, torch.device("cpu"))
    assert len({tuple(ids) for ids in first}) == 20  # it samples


def test_final_answer_is_what_follows_the_last_mark():
    assert sft.final_answer("3 + 4 = 7\n#### 7\n") == "7"
    assert sft.final_answer("#### 1\n#### 1,234 ") == "1234"
    assert sft.final_answer(" It is blue. ") == "It is blue."


def answer_of(folder, question):
    """What a saved model answers under plain transformers: its own generation config says where to stop."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    "flags",
    [{}, {"loss_agg": "seq_mean_token_mean"}, {"loss": "dft"}, {"neftune_alpha": 5.0}],
    ids=["nll", "seq_mean_token_mean", "dft", "neftune"],
)
def test_every_objective_learns_and_ends_answers(train, flags):
    folder, _ = train([{"messages": CHAT[:2]}], learning_rate=0.01, max_steps=40, **flags)
    assert answer_of(folder / "model", CHAT[0]) == "It is blue.<|im_end|>"


def test_model_that_got_chatml_stops_at_its_end_of_turn_after_saving(train, variant):
    base = variant(None, eos="<|endoftext|>")
    folder, _ = train([{"messages": CHAT[:2]}], model=str(base), learning_rate=0.01, max_steps=40)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == sft.CHATML
    assert answer_of(folder / "model", CHAT[0]) == "It is blue.<|im_end|>"


def test_answer_of_a_sample_is_the_reply_alone(train, tmp_path):
    thanks = {"role": "user", "content": "Thank you"}
    held_out = write_rows(tmp_path / "held_out.jsonl", [conversation(*CHAT, thanks)])
    folder, _ = train(sums(4), eval_dataset=held_out, max_steps=1)
    sample = read_lines(folder / "samples.jsonl")[0]
    assert sample["prompt"].endswith("What color is the grass?<|im_end|>\n<|im_start|>assistant\n")
    assert sample["answer"].strip() == "It is green."


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_model_is_the_trained_one_in_the_dtype_of_its_source(train, variant, dtype, tied):
    source = variant("chatml")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, tie_word_embeddings=tied)
    if not tied:
        model.lm_head.weight.data = model.lm_head.weight.data.flip(0).clone()
    model.save_pretrained(source)
    folder, _ = train(sums(8), model=str(source), max_steps=3, learning_rate=0.01)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.dtype == dtype and AutoConfig.from_pretrained(folder / "model").dtype == dtype
    assert model.config.architectures == ["Qwen3ForCausalLM"] and type(model).__name__ == "Qwen3ForCausalLM"
    stored = load_file(folder / "model" / "model.safetensors")
    before = load_file(source / "model.safetensors")
    assert stored.keys() == before.keys() and tied == ("lm_head.weight" not in stored)  # tied: once
    assert {x.dtype for x in stored.values()} == {dtype}
    trained = train.models[0].state_dict()
    assert all(torch.equal(stored[name], trained[name].to(dtype)) for name in stored)
    assert all(not torch.equal(stored[name], before[name]) for name in stored)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = model.float()(input_ids=ids).logits
        own = train.models[0](input_ids=ids, use_cache=False).logits
    assert torch.allclose(logits, own, atol=0.05 if dtype == torch.bfloat16 else 1e-5)
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (folder / "model" / name).read_text() == (source / name).read_text()
    assert not (folder / "model.partial").exists()


@pytest.mark.parametrize("weights, shares", [((), (30, 6, 4)), ((3.0, 1.0), (27, 9, 4))])
def test_shares_of_the_mixture_are_exact(train, tmp_path, monkeypatch, random_model, weights, shares):
    seen, collate_rows = [], sft.collate
    monkeypatch.setattr(sft, "collate", lambda rows, *rest: seen.extend(rows) or collate_rows(rows, *rest))
    colors = [{"prompt": [CHAT[0]], "completion": f"It is {i}."} for i in range(6)]
    texts = [{"text": f"Be brief {i}."} for i in range(4)]
    paths = [write_rows(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate((sums(30), colors, texts))]
    flags = {"dataset": tuple(paths[:2]), "dataset_weights": weights, "batch_size": 8, "num_epochs": 1}
    _, lines = train([], replay_dataset=paths[2], replay_fraction=0.1, **flags)
    decoded = AutoTokenizer.from_pretrained(random_model).batch_decode([s.input_ids for s in seen])
    counts = [sum(mark in text for text in decoded) for mark in ("What is", "What color", "Be brief")]
    assert counts == list(shares)  # one tenth is replayed, the rest keeps its proportions
    assert len(lines) == 1 + 5 and len(set(decoded)) == 40 - max(0, shares[1] - 6)


def test_dropout_is_off(encode, random_model, tmp_path, one_cpu):
    folder = tmp_path / "gpt2"
    shutil.copytree(random_model, folder)
    rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    config = GPT2Config(vocab_size=500, n_positions=64, n_embd=64, n_layer=2, n_head=4, **rates)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer, [(sequence, _, _)] = encode({"messages": CHAT[:2]}, model=folder)
    model = sft.load_model(str(folder), sft.Args(model=str(folder)), tokenizer, torch.device("cpu")).train()
    batch = collate([sequence])
    assert torch.equal(token_logprobs(model, batch), token_logprobs(model, batch))


def test_part_of_an_epoch_without_evaluation(train):
    _, lines = train(sums(20), num_epochs=0.4)
    assert lines[-1]["step"] == 2 and lines[-1]["epoch"] == pytest.approx(0.4)
    assert not any(key.startswith("eval/") for line in lines for key in line)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_nonfinite_step_ends_the_run_before_its_update(train, monkeypatch, capsys, tmp_path, broken):
    calls = []

    def nll_loss(logprobs):
        calls.append(len(logprobs))
        loss = -logprobs
        if len(calls) == 2:
            if broken == "loss":
                return loss * math.nan
            loss.register_hook(lambda grad: grad * math.inf)
        return loss

    monkeypatch.setattr(sft, "nll_loss", nll_loss)
    with pytest.raises(SystemExit) as stop:
        train(sums(12), save_every=1, max_steps=3)
    assert stop.value.code == 1 and len(calls) == 2
    folder, [line] = tmp_path / "run_0", capsys.readouterr().err.splitlines()
    assert re.search(r"\bstep 2\b", line) and "nonfinite_step_2.json" in line and "step_00000001" in line
    assert re.search(r"\bnan\b" if broken == "loss" else r"\b(inf|nan)\b", line)
    batch = json.loads((folder / "nonfinite_step_2.json").read_text())
    assert len(batch) == 4 and sum(sum(sequence["trained"]) for sequence in batch) == calls[1]
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [0, 1]
    assert not (folder / "model").exists()
    flags = json.loads((folder / "args.json").read_text()) | {"resume": True}
    args = sft.Args(**flags)
    model = sft.load_model(args.model, args, sft.load_tokenizer(args), torch.device("cpu"))
    assert sft.load_checkpoint(folder, model, sft.make_optimizer(model, args))[0] == 1
    now = train.models[0].state_dict()
    assert all(torch.equal(now[name], weight) for name, weight in model.state_dict().items())


def test_torn_last_line_does_not_stop_a_run_from_continuing(train, tmp_path):
    held_out = write_rows(tmp_path / "held_out.jsonl", sums(2))
    flags = {"eval_dataset": held_out, "save_every": 1, "max_steps": 2}
    folder, lines = train(sums(8), **flags)
    for name in ("metrics.jsonl", "samples.jsonl"):  # killed between two writes of a long record
        with open(folder / name, "a") as file:
            file.write('{"step": 3, "prom')
    assert train(sums(8), output_dir=str(folder), resume=True, **flags)[1] == lines


def test_kill_while_a_run_continues_loses_no_metrics(train, monkeypatch):
    flags = {"max_steps": 2, "save_every": 1}
    folder, lines = train(sums(8), **flags)

    write = Path.write_text

    def write_half(path, text, *rest, **options):
        if not path.name.startswith("metrics"):
            return write(path, text, *rest, **options)
        write(path, text[: len(text) // 2])
        raise KeyboardInterrupt  # as if killed here

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_half)
        with pytest.raises(KeyboardInterrupt):
            train(sums(8), output_dir=str(folder), resume=True, **flags)
    assert read_lines(folder / "metrics.jsonl") == lines


def test_continuing_a_finished_run_loses_nothing(train):
    flags = {"max_steps": 2, "save_every": 1}
    folder, lines = train(sums(8), **flags)
    model = (folder / "model" / "model.safetensors").read_bytes()
    assert train(sums(8), output_dir=str(folder), resume=True, **flags)[1] == lines
    assert (folder / "model" / "model.safetensors").read_bytes() == model


def test_continuing_a_finished_run_without_checkpoints_loses_nothing(train):
    folder, lines = train(sums(8), max_steps=2, save_every=0)
    with pytest.raises(SystemExit) as stop:
        train(sums(8), max_steps=3, save_every=0, output_dir=str(folder), resume=True)
    assert stop.value.code == 2 and read_lines(folder / "metrics.jsonl") == lines


def test_loss_too_large_for_a_perplexity_is_logged(train, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "held_out_loss", lambda *_: (1000.0, 0.0))
    held_out = write_rows(tmp_path / "held_out.jsonl", sums(2))
    _, lines = train(sums(4), eval_dataset=held_out, max_steps=1)
    assert lines[0]["eval/loss"] == 1000 and lines[0]["eval/perplexity"] > 1e300


def test_wandb_is_imported_only_on_request(random_model, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", sums(4))
    program = f"""
import sys, sft
flags = dict(model={str(random_model)!r}, dataset=({path!r},), batch_size=4, max_steps=2, save_every=0)
sft.main(sft.Args(**flags, output_dir="without"))
assert "wandb" not in sys.modules
sft.main(sft.Args(**flags, output_dir="with", wandb=True))
assert "wandb" in sys.modules
"""
    done = start(sys.executable, "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "with" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_signal_to_one_process_stops_all_with_one_checkpoint(random_model, train, tmp_path):
    path, folder = write_rows(tmp_path / "rows.jsonl", sums(12)), tmp_path / "two"
    flags = {
        "dataset": (path,),
        "output_dir": str(folder),
        "max_steps": 4,
        "save_every": 0,
        "warmup_steps": 0,
    }
    flags |= {"batch_size": 1, "neftune_alpha": 5.0}  # one process has nothing to train
    flags |= {"eval_dataset": write_rows(tmp_path / "held_out.jsonl", sums(1)), "eval_every": 1}
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, signal, sft

log = sft.Logger.log

def log_and_terminate(self, metrics, *rest):
    log(self, metrics, *rest)
    if metrics["step"] == 1 and sft.process()[0] == 1:
        os.kill(os.getpid(), signal.SIGTERM)

sft.Logger.log = log_and_terminate
sft.main(sft.Args(model={str(random_model)!r}, **{flags!r}))
""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = start(*torchrun, program, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000002"]
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [0, 1, 2]
    lines = train(sums(12), resume=True, **flags)[1]  # one process continues what two began
    expected = train(sums(12), **flags | {"output_dir": str(tmp_path / "one")})[1]
    for key in ("loss", "grad_norm", "eval/loss"):
        values, wanted = ([line[key] for line in some if key in line] for some in (lines, expected))
        assert len(values) >= 4 and values == pytest.approx(wanted, rel=1e-5)
