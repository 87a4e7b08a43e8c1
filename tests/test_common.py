"""common.py against transformers on one unpadded sequence at a time, float64, and numbers worked by hand."""

import copy
import functools
import gc
import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import DATA, read_lines, two_processes
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import common
from common import check_packed, collate, head_logits, packed_attention, token_logprobs

VOCAB_SIZE, HIDDEN_SIZE = 61, 32
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "intermediate_size": 48}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {  # what each adds: a kind of head, window, position or norm that the ones above do not have
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),  # biased projections
    "qwen3": ("qwen3", {"head_dim": 8}),  # normalised queries and keys
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"moe_intermediate_size": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_window": ("mistral", {"sliding_window": 4}),
    "phi3": ("phi3", {"sliding_window": None}),  # fused projections
    "olmo2": ("olmo2", {}),  # norms after the blocks
    "gemma": ("gemma", {"head_dim": 8}),  # scaled embeddings
    "gemma3": ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 3.0} | WINDOWS),
    "cohere": ("cohere", {"logit_scale": 0.5}),  # tied
    "granite": ("granite", {"logits_scaling": 2.0}),
    "gpt2": ("gpt2", {}),  # learned absolute positions
    "gpt_neox": ("gpt_neox", {}),
    "phi": ("phi", {}),  # biased head
}
CAPPED = {"head_dim": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0} | WINDOWS
LENGTHS = (9, 2, 13, 5, 6)


def build(family, attn="packed", **changes):
    """A random model of the family, its weights so large that a leak moves a log-prob by more than 0.1."""
    model_type, settings = FAMILIES.get(family, (family, {}))
    config = AutoConfig.for_model(model_type, **(SIZES | settings | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = norm + 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


cached = functools.cache(build)  # for tests that leave the model as it is


def make_sequences(lengths=LENGTHS, seed=0):
    """Random tokens, of which random ones are trained, never the first, and none in the fourth sequence."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for i, length in enumerate(lengths):
        ids = torch.randint(3, VOCAB_SIZE, (length,), generator=generator)
        trained = torch.rand(length, generator=generator) < 0.7
        trained[-1] = True
        trained &= (torch.arange(length) > 0) & (i != 3)
        sequences.append((ids, trained))
    return sequences


def stock_logprobs(model, sequences, temperature=1.0):
    """Log-probs and entropy, each (C,), by log_softmax of the logits of one unpadded sequence at a time."""
    logprobs, entropy = [], []
    for ids, trained in sequences:
        logits = model(input_ids=ids[None], use_cache=False).logits[0].double()  # (length, V)
        for t in trained.nonzero().flatten():
            log_p = (logits[t - 1] / temperature).log_softmax(-1)  # (V,)
            logprobs.append(log_p[ids[t]])
            entropy.append(-(log_p.exp() * log_p).sum())
    return torch.stack(logprobs), torch.stack(entropy)


def gradients(model, *outputs, seed=0):
    """Gradients of a random weighted sum of the outputs, each (C,), with respect to all parameters."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum((torch.randn(len(x), generator=generator).to(x.dtype) * x).sum() for x in outputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_equal(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, check_dtype=False)


def assert_all_equal(outputs, expected, tolerance):
    for x, y in zip(outputs, expected, strict=True):
        assert_equal(x, y, tolerance)


def assert_equal_gradients(actual, expected, relative=1e-4):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        assert largest > 1e-3, f"{name} has no gradient to compare"
        error = (actual[name] - gradient).abs().max().item()
        assert error < relative * largest, f"{name}: {error:.1e} of {largest:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logprobs_entropy_and_gradients_are_those_of_each_sequence_alone(family):
    sequences, model, stock = make_sequences(), cached(family), cached(family, "eager")
    check_packed(model)
    chunks = {"chunk_size": 7}  # several
    outputs = token_logprobs(model, collate(sequences), temperature=0.7, return_entropy=True, **chunks)
    expected = stock_logprobs(stock, sequences, temperature=0.7)
    assert expected[0].std() > 0.3, "the model is too uniform for a mistake to show"
    assert_all_equal(outputs, expected, 1e-5)
    assert_equal_gradients(gradients(model, *outputs), gradients(stock, *expected))
    logits = head_logits(
        common.completion_states(model, collate(sequences)), *common.head_settings(model)
    )  # (C, V)
    alone = [stock(input_ids=ids[None]).logits[0, :-1][trained[1:]] for ids, trained in sequences]
    assert_equal(logits, torch.cat(alone), 2e-5)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma2", "gemma3", "gpt2"])
@torch.no_grad()
def test_packed_equals_alone_under_stock_attention(family, attn):
    changes, sequences = CAPPED if family == "gemma2" else {}, make_sequences()
    attn = "eager" if family == "gemma2" else attn  # which alone caps the scores
    model, stock = build(family, attn, **changes), build(family, "eager", **changes)
    check_packed(model)
    assert_equal(token_logprobs(model, collate(sequences)), stock_logprobs(stock, sequences)[0], 1e-5)


def make_sharing_sequences():
    """Sequences that continue three prompts in ways of their own, and how many tokens each shares."""
    generator, sequences, shared = torch.Generator().manual_seed(0), [], []
    for prompt_length, lengths in ((5, (4, 1, 7)), (3, (2,)), (6, (3, 6))):  # of the prompts, of completions
        prompt = torch.randint(3, VOCAB_SIZE, (prompt_length,), generator=generator)
        for i, length in enumerate(lengths):
            ids = torch.cat([prompt, torch.randint(3, VOCAB_SIZE, (length,), generator=generator)])
            sequences.append((ids, torch.arange(len(ids)) >= prompt_length))
            shared.append(prompt_length if i else 0)
    return sequences, shared


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3", "gpt2"])
def test_sequences_that_share_a_prompt_have_the_logprobs_and_gradients_of_each_alone(family):
    sequences, shared = make_sharing_sequences()
    model, stock = cached(family), cached(family, "eager")
    batch = collate(sequences, shared=shared)
    assert batch.input_ids.shape[1] == sum(len(ids) for ids, _ in sequences) - sum(shared)
    outputs, expected = token_logprobs(model, batch, return_entropy=True), stock_logprobs(stock, sequences)
    assert_all_equal(outputs, expected, 1e-5)
    assert_equal_gradients(gradients(model, *outputs), gradients(stock, *expected))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_give_the_same_and_are_compiled_twice_at_most(backend):
    torch._dynamo.reset()
    counters.clear()
    stock, model = (build("llama", num_hidden_layers=1) for _ in range(2))
    for layer in model.model.layers:
        layer.compile(backend=backend)
    graphs = []
    for lengths in ((9, 2, 13), (5, 6), (12, 4, 7, 3), (3, 20)):
        batch = collate(make_sequences(lengths))
        logprobs, expected = token_logprobs(model, batch), token_logprobs(stock, batch)
        assert_equal(logprobs, expected, 1e-5)
        assert_equal_gradients(gradients(model, logprobs), gradients(stock, expected))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0, "nothing was compiled"
    assert graphs[-1] == graphs[1], "boundaries that move should not compile the layer again"
    torch._dynamo.reset()


TRAPS = [{"attention_mask": torch.ones(1, sum(LENGTHS)).long()}, {"use_cache": True}]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trap", TRAPS)
@torch.no_grad()
def test_an_all_ones_mask_or_a_cache_leaks_in_the_stock_model(family, trap):
    sequences = make_sequences()
    model, batch = cached(family, "sdpa"), collate(sequences)
    settings = {"attention_mask": None, "use_cache": False} | trap
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, **settings).logits[0]  # (N, V)
    log_p = logits[batch.completion_index - 1].log_softmax(-1)  # (C, V)
    leaking = log_p.gather(-1, batch.input_ids[0, batch.completion_index, None]).squeeze(-1)
    error = (leaking - stock_logprobs(cached(family, "eager"), sequences)[0]).abs()
    assert error[batch.sequence_index == 0].max() < 1e-5  # nothing stands before the first sequence
    assert error.max() > 0.1


def test_neither_the_logits_nor_a_dense_mask_of_a_row_ever_exist():
    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **kwargs or {})
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if isinstance(tensor, torch.Tensor):
                    shapes.add((tuple(tensor.shape), str(func)))
            return output

    model, batch, shapes, chunk_size = build("llama"), collate(make_sequences((60,) * 5)), set(), 40
    assert len(batch.completion_index) > 3 * chunk_size
    with Shapes():
        logprobs, entropy = token_logprobs(model, batch, return_entropy=True, chunk_size=chunk_size)
        gradients(model, logprobs, entropy)
    assert any(shape == (chunk_size, VOCAB_SIZE) for shape, _ in shapes)
    rows = batch.input_ids.shape[1]
    for shape, func in shapes:
        assert not (shape[-1:] == (VOCAB_SIZE,) and math.prod(shape) > chunk_size * VOCAB_SIZE), (shape, func)
        assert sum(size >= rows for size in shape) < 2, (shape, func)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3", "cohere"])
@torch.no_grad()
def test_plain_call_with_a_padding_mask_equals_each_sequence_alone(family, side):
    model, stock = cached(family), cached(family, "eager")
    longest = max(LENGTHS)
    rows, masks, places = [], [], []
    for ids, _ in make_sequences():
        padding = (longest - len(ids), 0) if side == "left" else (0, longest - len(ids))
        rows.append(F.pad(ids, padding, value=40))  # a token like any other: only the mask hides it
        masks.append(F.pad(torch.ones_like(ids), padding))
        places.append(slice(padding[0], padding[0] + len(ids)))
    logits = model(input_ids=torch.stack(rows), attention_mask=torch.stack(masks)).logits  # (B, longest, V)
    for row, place, (ids, _) in zip(logits, places, make_sequences(), strict=True):
        assert_equal(row[place], stock(input_ids=ids[None]).logits[0], 2e-5)


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gpt2"])
@torch.no_grad()
def test_packed_positions_without_boundaries_go_through_the_dense_mask(family):
    batch = collate(make_sequences())
    model, stock = cached(family), cached(family, "eager")
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
    alone = [stock(input_ids=ids[None]).logits[0] for ids, _ in make_sequences()]
    assert_equal(logits, torch.cat(alone), 2e-5)


# The head ---------------------------------------------------------------------------------------------------


class Head(torch.nn.Module):
    """A model whose backbone is a table of hidden states (N, H), so that only the head is left to test."""

    def __init__(self, num_tokens, bias=False, dtype=torch.float32, size=1.0, **config):
        super().__init__()
        text_config = SimpleNamespace(**config)
        self.config = SimpleNamespace(_attn_implementation="packed", get_text_config=lambda: text_config)
        self.head = torch.nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=bias)
        self.hidden = torch.nn.Parameter(torch.empty(1, num_tokens, HIDDEN_SIZE))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).mul(size).to(dtype)

    def get_decoder(self):
        return lambda **_: SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self):
        return self.head


def float64_outputs(model, batch, temperature, scale, softcap):
    """Log-probs and entropy of a Head, each (C,), in plain float64 with PyTorch's own gradient."""
    logits = model.hidden[0].double() @ model.head.weight.double().T  # (N, V)
    if model.head.bias is not None:
        logits = logits + model.head.bias.double()
    logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    log_p = torch.log_softmax(logits / temperature, dim=-1)[batch.completion_index - 1]  # (C, V)
    logprobs = log_p.gather(-1, batch.input_ids[0, batch.completion_index, None]).squeeze(-1)
    return logprobs, torch.special.entr(log_p.exp()).sum(-1)


HEADS = [tuple(case.values()) for case in read_lines(DATA / "heads.jsonl")]


@pytest.mark.parametrize("with_entropy, chosen", [(False, [0]), (True, [0]), (True, [1]), (True, [0, 1])])
@pytest.mark.parametrize("config, scale, softcap, bias, temperature", HEADS)
def test_head_and_gradient_equal_float64(config, scale, softcap, bias, temperature, with_entropy, chosen):
    batch = collate(make_sequences())
    model = Head(batch.input_ids.shape[1], bias, size=0.5, **config)
    wanted = {"temperature": temperature, "return_entropy": with_entropy, "chunk_size": 7}
    outputs = token_logprobs(model, batch, **wanted)
    outputs = outputs if with_entropy else (outputs,)
    expected = float64_outputs(model, batch, temperature, scale, softcap)[: len(outputs)]
    assert_all_equal(outputs, expected, 1e-5)
    actual = gradients(model, *(outputs[i] for i in chosen))
    assert_equal_gradients(actual, gradients(model, *(expected[i] for i in chosen)), 1e-5)


def test_top1_says_whether_the_token_is_the_argmax():
    model = Head(sum(LENGTHS), bias=True, final_logit_softcapping=3.0, size=0.5)
    logits = F.linear(model.hidden[0], model.head.weight, model.head.bias)  # (N, V)
    best, second = logits.topk(2).indices.roll(1, 0).T  # (N,) each: after the hidden state before
    is_best = torch.arange(len(best)) % 3 > 0
    rows = torch.where(is_best, best, second).split(LENGTHS)
    batch = collate([(x, torch.arange(len(x)) > 0) for x in rows])
    for settings in ({"return_entropy": True, "chunk_size": 7}, {}):
        *found, is_top1 = token_logprobs(model, batch, return_top1=True, temperature=0.7, **settings)
        assert_all_equal(found, float64_outputs(model, batch, 0.7, 1, 3.0)[: len(found)], 1e-5)
        assert is_top1.dtype == torch.bool and not is_top1.requires_grad
        assert is_top1.tolist() == is_best[batch.completion_index].tolist()


def test_logits_of_thousands_neither_overflow_nor_lose_the_small_log_probs():
    batch = collate(make_sequences())
    model = Head(batch.input_ids.shape[1], size=20.0)
    outputs = token_logprobs(model, batch, return_entropy=True)
    expected = float64_outputs(model, batch, 1.0, 1, None)
    assert expected[0].min() < -1000
    for x, y in zip(outputs, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-3, check_dtype=False)
    assert all(g.isfinite().all() for g in gradients(model, *outputs).values())


def test_half_precision_logits_are_normalised_in_float32():
    batch = collate(make_sequences())
    model = Head(batch.input_ids.shape[1], dtype=torch.bfloat16, size=0.5)
    logprobs, entropy = token_logprobs(model, batch, return_entropy=True)
    assert logprobs.dtype == entropy.dtype == torch.float32
    expected = float64_outputs(model, batch, 1.0, 1, None)  # of products that are not rounded
    assert_all_equal((logprobs, entropy), expected, 1e-5)
    assert_equal_gradients(gradients(model, logprobs, entropy), gradients(model, *expected), 2e-2)


def test_shared_prompts_are_refused_where_only_packed_attention_sees_them_and_where_they_are_none():
    sequences, shared = make_sharing_sequences()
    for attn in ("sdpa", "eager"):
        with pytest.raises(ValueError, match="--attn packed"):
            token_logprobs(cached("llama", attn), collate(sequences, shared=shared))
    for second in (([5, 6, 8], [0, 1, 1]), ([5, 7, 8], [0, 0, 1]), ([5, 6], [0, 0])):  # trained, other, whole
        with pytest.raises(ValueError, match="shared prompt"):
            collate([([5, 6, 7], [0, 0, 1]), second], shared=[0, 2])


def test_window_that_lives_in_the_mask_is_refused_once_it_matters():
    experts = {"num_local_experts": 2, "sliding_window": 8}
    config = AutoConfig.for_model("phimoe", **SIZES | experts)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="packed")
    token_logprobs(model, collate(make_sequences((8, 5))))
    with pytest.raises(ValueError, match="sliding window"):
        token_logprobs(model, collate(make_sequences((9, 5))))


def test_frozen_head_gets_no_gradient_and_the_backbone_the_same():
    model = build("llama", tie_word_embeddings=False)
    batch = collate(make_sequences((9, 5)))
    expected = torch.autograd.grad(token_logprobs(model, batch).sum(), model.model.norm.weight)[0]
    model.lm_head.requires_grad_(False)
    token_logprobs(model, batch).sum().backward()
    assert model.lm_head.weight.grad is None
    assert torch.equal(model.model.norm.weight.grad, expected)


def test_attention_itself_refuses_what_its_kernels_do_not_compute():
    qkv, lengths = torch.randn(3, 1, 4, 6, 8), torch.tensor([6])
    for kind in ({"softcap": 5.0}, {"s_aux": torch.zeros(4)}):
        with pytest.raises(ValueError, match="use .*--attn"):
            packed_attention(torch.nn.Identity(), *qkv, None, packed_lengths=lengths, **kind)


LEAKING = {
    "gpt_oss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "mamba": {"state_size": 8},
    "qwen3_next": EXPERTS,
    "gemma2": {"head_dim": 8, "attn_logit_softcapping": 2.0},
}


@pytest.mark.parametrize("family, attn", [*product(LEAKING, ["packed"]), *product([*LEAKING][:3], ["eager"])])
def test_check_packed_refuses_a_model_that_leaks(family, attn):
    with pytest.raises(ValueError, match="--attn|packed sequences"):  # some models refuse themselves
        check_packed(build(family, attn, **LEAKING[family]))


@pytest.mark.parametrize("scale", [1, 8])
def test_check_packed_accepts_a_healthy_bfloat16_model(scale):
    """Its logits are coarse: the larger they are, the further apart equal ones may come out."""
    model = build("llama")
    model.lm_head.weight.data *= scale
    check_packed(model.to(torch.bfloat16))


@pytest.mark.parametrize("factor", [1.2, math.nan])
def test_check_packed_refuses_a_head_that_it_does_not_know(factor):
    model = build("llama")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * factor)
    with pytest.raises(ValueError, match="llama.*--attn packed"):
        check_packed(model)


PROMPTS = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8], [11, 12, 13, 14, 15, 16, 17]]


def uniforms(rows, columns, seed=0):
    return torch.rand(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attn", ["packed", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_is_that_of_generate(family, attn):
    model = cached(family, attn)
    model.generation_config = GenerationConfig(eos_token_id=[2, 3], pad_token_id=0, max_new_tokens=40)
    decoded = common.decode(model, PROMPTS, uniforms(4, 40), [2, 3], 0.0)
    for prompt, (ids, _) in zip(PROMPTS, decoded, strict=True):
        expected = model.generate(torch.tensor([prompt]), do_sample=False)[0, len(prompt) :].tolist()
        assert ids == expected


@pytest.mark.parametrize("family", ["llama", "gemma3", "cohere", "gpt2"])
def test_sampled_log_probs_are_those_of_the_packed_row(family):
    model = cached(family)
    sampled = common.decode(model, PROMPTS, uniforms(4, 30), [2, 3], 0.7)
    rows = [(p + ids, [0] * len(p) + [1] * len(ids)) for p, (ids, _) in zip(PROMPTS, sampled, strict=True)]
    expected = token_logprobs(model, collate(rows), temperature=0.7)
    assert_equal(torch.cat([logprobs for _, logprobs in sampled]), expected, 1e-4)
    for ids, _ in sampled:
        assert set(ids[:-1]).isdisjoint([2, 3]) and (len(ids) == 30 or ids[-1] in (2, 3))


def test_a_sample_depends_on_no_other_sequence():
    model, numbers = cached("llama"), uniforms(40, 50)
    prompts = PROMPTS * 10
    together = common.decode(model, prompts, numbers, [2, 3], 1.0)
    assert len({len(ids) for ids, _ in together}) > 5  # some end long before others
    for i in (0, 7, 22, 39):
        [(alone, _)] = common.decode(model, [prompts[i]], numbers[i : i + 1], [2, 3], 1.0)
        assert alone == together[i][0]


def test_draws_follow_the_distribution_at_each_temperature():
    """Uniform numbers on a grid give each token as often as its probability says, to a grid point or two."""
    logits = 2 * torch.randn(1, 700, generator=torch.Generator().manual_seed(0))  # over two blocks
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for temperature in (0.5, 1.0):
        p = (logits[0].double() / temperature).softmax(0)
        tokens, logprobs = common.draw(logits.expand(20_000, -1), grid, temperature)
        assert (torch.bincount(tokens, minlength=700) - 20_000 * p).abs().max() <= 1.5
        assert_equal(logprobs, p.log()[tokens], 1e-4)
    assert common.draw(logits, grid[:1], 0.0)[0] == logits.argmax()
    assert common.draw(logits * math.nan, grid[:1], 1.0)[0] < 700


@pytest.mark.parametrize("multiple_of", [1, 2, 3, 8])
def test_packs_every_index_once_within_the_budget(multiple_of):
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(1, 120, 40)
        rows = common.pack(lengths, 100, multiple_of)
        assert sorted(i for row in rows for i in row) == list(range(40)) and len(rows) % multiple_of == 0
        assert all(len(row) == 1 or lengths[row].sum() <= 100 for row in rows if row)
        assert multiple_of > 1 or lengths.sum() / 100 / len(rows) > 0.8  # rows are full
    assert common.pack([], 100) == [] and common.pack([3, 5, 2, 4], max_tokens=8) == [[1, 0], [3, 2]]


def test_rows_that_run_at_the_same_time_cost_alike():
    lengths = (np.random.default_rng(1).pareto(1.2, 400) * 100 + 20).clip(max=8192).astype(int)
    rows = common.pack(lengths, 8192, multiple_of=4)
    costs = [sum(lengths[i] * (12_288 + lengths[i]) for i in row) for row in rows]  # attention, at H = 2,048
    assert len(rows) > 8 and costs == sorted(costs, reverse=True)


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize("case", read_lines(DATA / "chat_rows.jsonl"))
def test_rows_of_all_formats_say_the_same(case):
    read, expected = common.conversational(case["row"]), case["read"]
    assert {name: read[name] for name in expected} == expected and None not in read.values()


def test_template_shows_tools_null_contents_and_parts(random_model):
    tokenizer = AutoTokenizer.from_pretrained(random_model)
    apply = common.template_of(tokenizer, {})
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    assert apply([USER | {"content": parts}]) == apply([USER | {"content": "xy", "name": None}])
    assert apply([USER | {"content": None}]) == apply([USER | {"content": ""}])
    with pytest.raises(ValueError, match="does not show the tools"):
        common.template_of(tokenizer, {"tools": '[{"name": "f"}]'})
    tokenizer.chat_template = "{{ tools }}" + tokenizer.chat_template
    assert common.template_of(tokenizer, {"tools": '[{"name": "f"}]'})([USER]).startswith("[{'name': 'f'}]")


ALONE = {"input_ids": [[5, 6, 7, 8, 9]], "position_ids": [[0, 1, 2, 0, 1]], "cu_seqlens": [0, 3, 5]}
ALONE |= {"completion_index": [1, 2, 4], "sequence_index": [0, 0, 1], "predictor_index": [0, 1, 3]}
SHARED = {"input_ids": [[5, 6, 7, 8, 9]], "position_ids": [[0, 1, 2, 2, 3]], "cu_seqlens": [0, 3, 5]}
SHARED |= {"completion_index": [2, 3, 4], "predictor_index": [1, 1, 3]}  # 7 and 8 both follow 6
SHARED |= {"sequence_index": [0, 1, 1], "key_index": [0, 1, 2, 0, 1, 3, 4]}


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_collate_lays_out_the_worked_examples(kind):
    marked = lambda ids, trained: (kind(ids), kind(trained))
    batch = collate([marked([5, 6, 7], [False, True, True]), marked([8, 9], [False, True])])
    shared = collate([([5, 6, 7], [0, 0, 1]), ([5, 6, 8, 9], [0, 0, 1, 1])], shared=[0, 2])
    for some, wanted in ((batch, ALONE), (shared, SHARED)):
        assert {name: getattr(some, name).tolist() for name in wanted} == wanted
    assert batch.lengths == (3, 2) and all(type(length) is int for length in batch.lengths)
    assert batch.num_sequences == 2 and (shared.lengths, shared.key_lengths) == ((3, 2), (3, 4))
    assert batch.cu_seqlens.dtype == torch.int32  # what the kernels take
    assert all(getattr(batch, name).dtype == torch.int64 for name in ALONE if name != "cu_seqlens")


def test_collate_refuses_to_train_a_first_token():
    sequences = [([5, 6], [0, 1]), ([7], [0]), ([8, 9], [0, 1])]
    for ids, _ in sequences:
        with pytest.raises(ValueError, match="first token"):
            collate([(x, [1] * len(x) if x is ids else trained) for x, trained in sequences])


def test_batch_moves_to_a_device_and_keeps_its_lengths_on_the_host():
    sequences = [([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])]
    for moved in (collate(sequences).to("meta"), collate(sequences, device="meta")):
        tensors = {k: v for k, v in vars(moved).items() if isinstance(v, torch.Tensor)}
        assert len(tensors) == 6 and all(v.device.type == "meta" for v in tensors.values())
        assert moved.lengths == (3, 2)


def test_filler_gives_no_logprobs_and_a_gradient_of_zero():
    model = build("llama")
    wanted = {"return_entropy": True, "return_top1": True}
    logprobs, entropy, is_top1 = token_logprobs(model, collate([([0], [0])]), **wanted)
    assert logprobs.shape == entropy.shape == is_top1.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_segment_sum_adds_up_each_segment_and_leaves_empty_ones_at_zero():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums = common.segment_sum(x, torch.tensor([3, 1, 3, 1]), 5)
    assert sums.tolist() == [0, 10, 0, 5, 0]
    (sums * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert x.grad.tolist() == [4, 2, 4, 2]
    rows = common.segment_sum(torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([1, 0, 1]), 3)
    assert rows.tolist() == [[3, 4], [6, 8], [0, 0]]
    assert common.segment_sum(torch.empty(0), torch.empty(0, dtype=torch.int64), 2).tolist() == [0, 0]


# KL divergence ----------------------------------------------------------------------------------------------

PI, REF = torch.tensor([0.75, 0.25]).double(), torch.tensor([0.5, 0.5]).double()


def test_kl_full_takes_the_policy_first():
    policy_first = 0.75 * math.log(1.5) - 0.25 * math.log(2)  # 0.1308
    reference_first = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)  # 0.1438
    assert common.kl_full(PI.log(), REF.log()).item() == pytest.approx(policy_first, abs=1e-7)
    assert common.kl_full(REF.log(), PI.log()).item() == pytest.approx(reference_first, abs=1e-7)
    unnormalised = common.kl_full(PI.log() + 7, REF.log() - 3)
    assert unnormalised.item() == pytest.approx(policy_first, abs=1e-6)
    stacked = common.kl_full(torch.stack([PI, REF, PI]).log(), torch.stack([REF, PI, PI]).log())
    assert_equal(stacked, torch.tensor([policy_first, reference_first, 0]), 1e-6)


def exact():
    """A policy and a reference over five outcomes, float64, and KL both ways with PyTorch's own gradient."""
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    reverse = (log_p.exp() * (log_p - log_q)).sum()  # KL(pi || ref)
    forward = (log_q.exp() * (log_q - log_p)).sum()  # KL(ref || pi)
    kls = {"KL(pi || ref)": reverse, "KL(ref || pi)": forward}
    slopes = {name: torch.autograd.grad(kl, logits, retain_graph=True)[0] for name, kl in kls.items()}
    assert abs(reverse - forward) > 0.05
    return logits, log_p, log_q, kls, slopes


ESTIMATORS = [  # values by hand, is it unbiased, the KL whose gradient it has in the loss, right as a reward?
    (common.kl_k1, [math.log(1.5), -math.log(2)], True, None, True),
    # half the square of 0.40546511 and of 0.69314718
    (common.kl_k2, [0.08220098, 0.24022651], False, "KL(pi || ref)", False),
    (common.kl_k3, [2 / 3 - 1 + math.log(1.5), 2 - 1 - math.log(2)], True, "KL(ref || pi)", False),
]


@pytest.mark.parametrize("estimator, by_hand, is_unbiased, in_loss, is_right", ESTIMATORS)
def test_values_bias_and_gradients_of_an_estimator(estimator, by_hand, is_unbiased, in_loss, is_right):
    assert_equal(estimator(PI.log(), REF.log()), torch.tensor(by_hand).double(), 1e-7)
    logits, log_p, log_q, kls, slopes = exact()
    p, k = log_p.detach().exp(), estimator(log_p, log_q)  # samples of the policy: no gradient flows through p
    bias = (p * k).sum() - kls["KL(pi || ref)"]
    assert (abs(bias) < 1e-12) if is_unbiased else (abs(bias) > 0.01)
    gradient = torch.autograd.grad((p * k).sum(), logits, retain_graph=True)[0]  # E_pi[grad k]
    assert_equal(gradient, slopes[in_loss] if in_loss else torch.zeros(5), 1e-12)
    assert all((gradient - slope).abs().max() > 0.02 for name, slope in slopes.items() if name != in_loss)
    gradient = torch.autograd.grad((p * k.detach() * log_p).sum(), logits)[0]  # E_pi[k grad log pi]
    error = (gradient - slopes["KL(pi || ref)"]).abs().max()
    assert (error < 1e-12) if is_right else (error > 0.01)


def test_kl_full_and_its_gradient_are_exact_and_float32():
    logits, _, log_q, kls, slopes = exact()
    kl = common.kl_full(logits, log_q)
    assert_equal(kl, kls["KL(pi || ref)"], 1e-6)
    assert_equal(torch.autograd.grad(kl, logits)[0], slopes["KL(pi || ref)"], 1e-6)
    logits, ref_logits = torch.randn(2, 4, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    log_p, log_q = logits.double().log_softmax(-1), ref_logits.double().log_softmax(-1)
    kl = common.kl_full(logits, ref_logits)
    assert kl.dtype == torch.float32
    assert_equal(kl, (log_p.exp() * (log_p - log_q)).sum(-1), 1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_k3_is_accurate_for_tiny_log_ratios(sign):
    """At 1e-4 the estimator is 5e-9, which exp(-x) - 1 + x in float32 drowns in a rounding error of 6e-8."""
    log_ratio = sign * 2.0**-13  # 1.2e-4, and -1.5 + 2^-13 is exact in float32
    logprobs, ref_logprobs = torch.tensor([-1.5 + log_ratio], requires_grad=True), torch.tensor([-1.5])
    k3 = common.kl_k3(logprobs, ref_logprobs)
    assert k3.item() == pytest.approx(log_ratio**2 / 2 - log_ratio**3 / 6, rel=5e-3)  # its Taylor series
    k3.backward()
    assert logprobs.grad.item() == pytest.approx(log_ratio, rel=5e-3)


def sharded_worker():
    dist.init_process_group("gloo")
    compare_sharded(dist.get_rank())
    gc.collect()  # the models hold the group, whose threads must not outlive the interpreter
    dist.destroy_process_group()


def compare_sharded(rank):
    """Two processes, each with its own sequences, against one that has them all; raises where they differ."""
    first, second, filler = make_sequences(seed=1), make_sequences((4, 11), seed=2), [([0], [0])]
    for family in ("llama", "gemma3"):  # with a head of its own, and tied
        whole = build(family)
        sharded = copy.deepcopy(whole)
        for layer in sharded.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        check_packed(sharded)
        for shares in ((first, second), (first, filler)):  # a process without a row still takes part
            parts = [collate(share) for share in shares]
            settings = {"temperature": 0.7, "return_entropy": True}
            expected = token_logprobs(whole, collate([s for share in shares for s in share]), **settings)
            weights = torch.randn(2, len(expected[0]), generator=torch.Generator().manual_seed(0))  # (2, C)
            whole.zero_grad()
            (weights * torch.stack(expected)).sum().backward()
            start = len(parts[0].completion_index) if rank else 0
            mine = slice(start, start + len(parts[rank].completion_index))
            sharded.zero_grad()  # before the forward pass, which leaves the root's parameters unsharded
            outputs = token_logprobs(sharded, parts[rank], **settings)
            assert_all_equal(outputs, [y[mine] for y in expected], 1e-5)
            loss = (weights[:, mine] * torch.stack(outputs)).sum()
            (loss * 2).backward()  # FSDP2 averages over the processes; the parts belong to one sum
            found = {name: p.grad.full_tensor() for name, p in sharded.named_parameters()}
            assert_equal_gradients(found, {name: p.grad for name, p in whole.named_parameters()})
        sharded.requires_grad_(False).zero_grad()
        for _ in range(2):
            outputs = token_logprobs(sharded, parts[rank], **settings)
            assert_all_equal(outputs, [y[mine] for y in expected], 1e-5)
            assert all(isinstance(p, DTensor) for p in sharded.parameters())  # a frozen root, too


def test_two_sharded_processes_give_the_logprobs_and_gradients_of_one(tmp_path):
    two_processes(sharded_worker, cwd=tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_varlen_kernel_equals_one_sdpa_call_per_sequence(window, sharing):
    sequences, shared = make_sharing_sequences()
    batch, found = collate(sequences, shared=shared if sharing else None), []
    rows, generator = batch.input_ids.shape[1], torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, heads, rows, 64, generator=generator).bfloat16() for heads in (4, 2, 2)]
    weights = torch.randn(1, rows, 4, 64, generator=generator)
    key_lengths = torch.tensor(batch.key_lengths or batch.lengths)
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        query, key, value = (x.to(device, dtype).requires_grad_() for x in qkv)
        settings = {
            "packed_lengths": torch.tensor(batch.lengths),
            "cu_seq_lens_q": batch.cu_seqlens.to(device),
            "cu_seq_lens_k": F.pad(key_lengths.cumsum(0), (1, 0)).int().to(device),
            "max_length_q": max(batch.lengths),
            "max_length_k": int(key_lengths.max()),
        }
        if sharing:
            settings |= {"packed_key_lengths": key_lengths, "packed_key_index": batch.key_index.to(device)}
        settings |= {"scaling": 0.2, "sliding_window": window}
        out, _ = packed_attention(torch.nn.Identity(), query, key, value, None, **settings)
        slopes = torch.autograd.grad((out.float() * weights.to(device)).sum(), (query, key, value))
        found.append([x.float().cpu() for x in (out, *slopes)])
    for expected, actual in zip(*found, strict=True):
        assert_equal(actual, expected, 0.02 * expected.abs().max().item())
