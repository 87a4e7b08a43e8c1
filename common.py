"""The mathematics that every script shares: packed rows, log-probs, sampling, KL estimators, chat formats.

A batch is a list of sequences laid end to end in one row, without padding. Everything that is known per token
is known for the trained tokens only:

    input_ids       (1, N)    the row                              N tokens in the row, B sequences,
    position_ids    (1, N)    restart at 0 with each sequence      C completion (= trained) tokens,
    cu_seqlens      (B + 1,)  where each sequence begins           H hidden size, V vocabulary
    completion_index (C,)     where in the row each trained token stands
    sequence_index  (C,)      which of the B sequences it belongs to
    predictor_index (C,)      where the state stands that predicts it: one before it, or at its prompt's end

`token_logprobs(model, batch)` gives `logprobs (C,)` with `logprobs[c] = log pi(token c | all before it in its
own sequence)`: the shift by one happens there and nowhere else. The (N, V) logits never exist.
"""

import json
import math
import re
from bisect import bisect_left, insort
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loading import fsdp_forward


# ------------------------------------------------------------------------------------------------------------
# Packed rows
# ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PackedBatch:
    """The only batch type of the project; the fields are described at the head of this file."""

    input_ids: torch.Tensor  # (1, N) int64
    position_ids: torch.Tensor  # (1, N) int64
    cu_seqlens: torch.Tensor  # (B + 1,) int32, on the device of the row
    completion_index: torch.Tensor  # (C,) int64
    sequence_index: torch.Tensor  # (C,) int64
    predictor_index: torch.Tensor  # (C,) int64: where the state stands that predicts each trained token
    lengths: tuple[int, ...]  # B Python integers: the host reads boundaries here, never from the device
    key_index: torch.Tensor | None = None  # (K,) with shared prompts: what each sequence sees, end to end
    key_lengths: tuple[int, ...] | None = None  # B: how many of them belong to each sequence

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    def to(self, device) -> "PackedBatch":
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors.items()})


def collate(sequences, device="cpu", shared=None) -> PackedBatch:
    """Lay sequences, each a pair (token ids, which of them are trained), end to end in one row.

    >>> collate([([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])])
    input_ids [[5, 6, 7, 8, 9]]   position_ids [[0, 1, 2, 0, 1]]   cu_seqlens [0, 3, 5]
    completion_index [1, 2, 4]    predictor_index [0, 1, 3]        sequence_index [0, 0, 1]   lengths (3, 2)

    `shared` says of each sequence how many of its first tokens, its prompt, it shares with the last sequence
    before it that shares none. They stand in the row once; all sharers attend to them (arXiv:2410.20305):

    >>> collate([([5, 6, 7], [0, 0, 1]), ([5, 6, 8, 9], [0, 0, 1, 1])], shared=[0, 2])
    input_ids [[5, 6, 7, 8, 9]]   position_ids [[0, 1, 2, 2, 3]]   cu_seqlens [0, 3, 5]
    completion_index [2, 3, 4]    predictor_index [1, 1, 3]        key_index [0, 1, 2, 0, 1, 3, 4]

    Raises ValueError where the first token of a sequence is marked as trained (nothing comes before it), and
    where a shared prompt is trained, differs from its first sharer's, or is a whole sequence.
    """
    skip = torch.tensor(shared or [0] * len(sequences))  # (B,) tokens that are in the row already
    lengths = torch.tensor([len(input_ids) for input_ids, _ in sequences]) - skip  # (B,)
    ends = lengths.cumsum(0)  # (B,)
    starts = ends - lengths  # (B,)
    input_ids, trained = (
        torch.cat([torch.as_tensor(pair[which])[n:] for pair, n in zip(sequences, skip.tolist())])
        for which in (0, 1)
    )  # (N,) each
    input_ids, trained = input_ids.long(), trained.bool()
    if trained[starts[skip == 0]].any():
        raise ValueError("the first token of a sequence cannot be trained: nothing comes before it")
    sequence_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # (N,)
    predictors = torch.arange(len(input_ids)) - 1  # (N,)
    owner, keys = 0, []  # of each sequence that may share its prompt: the positions in the row that it sees
    bounds = zip(sequences, skip.tolist(), starts.tolist(), ends.tolist()) if shared else ()
    for (ids, t), n, start, end in bounds:
        owner = owner if n else start  # where its prompt begins
        prompt = torch.as_tensor(ids)[:n].long()
        if n and (start == end or any(t[:n]) or not torch.equal(input_ids[owner : owner + n], prompt)):
            raise ValueError("a shared prompt must be the beginning of both sequences, and not be trained")
        predictors[start] = owner + n - 1
        keys.append([*range(owner, owner + n), *range(start, end)])
    completion_index = trained.nonzero().squeeze(1)  # (C,)
    batch = PackedBatch(
        input_ids=input_ids[None],
        position_ids=(torch.arange(len(input_ids)) - (starts - skip)[sequence_of])[None],
        cu_seqlens=F.pad(ends, (1, 0)).int(),
        completion_index=completion_index,
        sequence_index=sequence_of[completion_index],
        predictor_index=predictors[completion_index],
        lengths=tuple(lengths.tolist()),
        key_index=torch.tensor(sum(keys, [])) if keys else None,
        key_lengths=tuple(map(len, keys)) or None,
    )
    return batch if torch.device(device).type == "cpu" else batch.to(device)


def pack(lengths, max_tokens: int, multiple_of: int = 1) -> list[list[int]]:
    """Best fit decreasing: indices of `lengths` in rows of at most max_tokens; a longer one has its own row.

    >>> pack([3, 5, 2, 4], max_tokens=8)
    [[1, 0], [3, 2]]  # 5 + 3 and 4 + 2 tokens

    The number of rows is a multiple of `multiple_of` (processes): rows are split, at last empty ones added.
    Long sequences come first: what processes take at the same time costs alike, attention included.
    """
    rows, spaces = [], []  # spaces: sorted (free tokens, row)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fit = bisect_left(spaces, (lengths[i], -1))  # the row with the least room that is enough
        free, row = spaces.pop(fit) if fit < len(spaces) else (max_tokens, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        insort(spaces, (free - lengths[i], row))
    while len(rows) % multiple_of:
        most = max(rows, key=len)
        rows.append([most.pop() for _ in range(len(most) // 2)])
    return rows


def segment_sum(x: torch.Tensor, index: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Sum the entries of x (C, ...) of the same index (C,) -> (num_segments, ...); empty segments give 0."""
    return torch.zeros(num_segments, *x.shape[1:], dtype=x.dtype, device=x.device).index_add(0, index, x)


# ------------------------------------------------------------------------------------------------------------
# Attention over a packed row
# ------------------------------------------------------------------------------------------------------------
def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Causal attention in which each sequence of a packed row sees only itself; `--attn packed`.

    query (1, heads, N, D), key and value (1, kv_heads, N, D) -> (1, N, heads, D). On CUDA in half precision
    it is one variable-length flash kernel, elsewhere one sdpa call per sequence. Without `packed_lengths`
    (`generate`, a plain padded call) it is transformers' own sdpa under the ordinary mask.

    Raises ValueError for soft-capped scores, attention sinks, and a sliding window kept in the mask.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} soft-caps its scores or has sinks: use --attn eager")
    lengths, key_lengths = kwargs.get("packed_lengths"), kwargs.get("packed_key_lengths")
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    sliding_window, longest = kwargs.get("sliding_window"), kwargs["max_length_q"]
    own_window = getattr(module.config, "sliding_window", None)
    if "sliding_window" not in kwargs and longest > (own_window or longest):
        raise ValueError(f"{type(module).__name__} keeps its sliding window in the mask: use --attn eager")
    if key_lengths is not None:  # shared prompts: (1, kv_heads, K, D), each sequence's keys in one piece
        key, value = (x.index_select(2, kwargs["packed_key_index"]) for x in (key, value))
    if has_kernel(query):
        window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)  # W includes the token itself
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
        ends, sizes = ([kwargs[f"{name}_{x}"] for x in "qk"] for name in ("cu_seq_lens", "max_length"))
        grouped = q.shape[1] != k.shape[1]
        out = varlen_attn(q, k, v, *ends, *sizes, scale=scaling, window_size=window, enable_gqa=grouped)
        return out[None], None
    key_lengths = lengths if key_lengths is None else key_lengths
    return sdpa_per_sequence(query, key, value, lengths, key_lengths, scaling, sliding_window), None


def has_kernel(query) -> bool:
    """Whether `varlen_attn` runs on such queries: on CUDA in half precision."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


@torch.compiler.disable  # the boundaries move with every row
def sdpa_per_sequence(query, key, value, lengths, key_lengths, scaling, sliding_window) -> torch.Tensor:
    """One causal sdpa call per sequence, shapes as in `packed_attention`; queries are the last positions."""
    lengths, key_lengths, out = lengths.tolist(), key_lengths.tolist(), []
    options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    for q, k, v in zip(query.split(lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2)):
        band, before = None, k.shape[2] - q.shape[2]  # keys before the first query
        if before or (sliding_window is not None and k.shape[2] > sliding_window):
            band = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(before)
            band = band if sliding_window is None else band.triu(before + 1 - sliding_window)
        attended = F.scaled_dot_product_attention(q, k, v, band, is_causal=band is None, **options)
        out.append(attended.transpose(1, 2))  # (1, length, heads, D)
    return torch.cat(out, dim=1)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)  # `generate` needs it: without one there is no mask


# ------------------------------------------------------------------------------------------------------------
# Log-probs
# ------------------------------------------------------------------------------------------------------------
def packed_hidden_states(model, batch: PackedBatch) -> torch.Tensor:
    """Run the backbone of a causal language model over a packed row -> last hidden states (1, N, H)."""
    packed = model.config._attn_implementation == "packed"
    # An empty 4-D mask counts as ready-made: transformers then neither builds a dense (N, N) one nor
    # synchronises to look for boundaries. Other implementations find the boundaries in position_ids, which is
    # exact only with no mask *and* use_cache=False: the default cache or an all-ones mask leaks silently.
    no_mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=batch.input_ids.device) if packed else None
    keys = {}
    if batch.key_lengths is not None:
        if not packed:
            raise ValueError("shared prompts need --attn packed")
        keys = {"packed_key_index": batch.key_index, "packed_key_lengths": torch.tensor(batch.key_lengths)}
    cu_keys = batch.cu_seqlens if not keys else F.pad(keys["packed_key_lengths"].cumsum(0), (1, 0)).int()
    return model.get_decoder()(
        input_ids=batch.input_ids,
        attention_mask=no_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=cu_keys.to(batch.input_ids.device, non_blocking=True),
        max_length_q=max(batch.lengths),
        max_length_k=max(batch.key_lengths or batch.lengths),
        packed_lengths=torch.tensor(batch.lengths),  # on the host; a tensor, or torch.compile specialises
        **keys,
    ).last_hidden_state


def completion_states(model, batch: PackedBatch) -> torch.Tensor:
    """The last hidden states that predict the trained tokens of a packed row, (C, H)."""
    return packed_hidden_states(model, batch)[0, batch.predictor_index]


def head_settings(model) -> tuple[torch.Tensor, torch.Tensor | None, float, float | None]:
    """The LM head of a model: weight (V, H), bias (V,), the scale of its logits and their soft cap."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return head.weight, head.bias, scale, getattr(config, "final_logit_softcapping", None)


class _ProductOnCuda(torch.autograd.Function):
    """a @ b in float32 of two matrices in bfloat16, for which PyTorch has no derivative."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.mm(a, b, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad = grad.to(a.dtype)
        return grad @ b.T, a.T @ grad


def float32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32: rounded to bfloat16, logits would move every ratio of two policies."""
    return _ProductOnCuda.apply(a, b) if a.is_cuda and a.dtype != torch.float32 else a.float() @ b.float()


def head_logits(hidden, weight, bias, scale, softcap, temperature=1.0) -> torch.Tensor:
    """Logits / temperature (c, V), float32, of states (c, H) under a head as `head_settings` describes it."""
    logits = float32_product(hidden, weight.T)
    logits = logits if bias is None else logits + bias
    logits = logits if scale == 1 else logits * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits if temperature == 1 else logits / temperature


class _HeadLogprobs(torch.autograd.Function):
    """LM head and log-softmax in chunks of rows; the backward pass recomputes each, so only (C,) is kept."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, scale, softcap, chunk_size, *wanted):
        with_entropy, with_top1 = wanted
        logprobs = torch.empty(len(targets), device=hidden.device)  # (C,)
        entropy, is_top1 = torch.empty_like(logprobs), torch.empty_like(targets, dtype=torch.bool)  # (C,)
        for start in range(0, len(targets), chunk_size):
            c = slice(start, start + chunk_size)
            logits = head_logits(hidden[c], weight, bias, scale, softcap, temperature)  # (c, V)
            # In place, one row after the other, each of which stays in the cache.
            log_p = torch.log_softmax(logits, -1, out=logits)  # (c, V)
            logprobs[c] = log_p.gather(-1, targets[c, None]).squeeze(-1)
            if with_top1:
                is_top1[c] = logprobs[c] == log_p.amax(-1)
            if with_entropy:
                entropy[c] = -torch.linalg.vecdot(log_p.exp(), log_p)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        ctx.settings = temperature, scale, softcap, chunk_size
        ctx.mark_non_differentiable(is_top1)
        ctx.set_materialize_grads(False)
        return logprobs, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy, _):
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        temperature, scale, softcap, chunk_size = ctx.settings
        wanted_of_head = zip((weight, bias), ctx.needs_input_grad[1:3])  # a frozen head gets no gradient
        zeros = [torch.zeros_like(x, dtype=torch.float32) if wanted else None for x, wanted in wanted_of_head]
        grad_hidden, (grad_weight, grad_bias) = torch.empty_like(hidden), zeros
        for start in range(0, len(targets), chunk_size):
            c = slice(start, start + chunk_size)
            logits = head_logits(hidden[c], weight, bias, scale, softcap, temperature)  # (c, V)
            slope = None if softcap is None else 1 - (logits * temperature / softcap) ** 2  # of the soft cap
            factor = torch.full_like(targets[c, None], scale / temperature, dtype=logits.dtype)  # (c, 1)
            if grad_entropy is None:
                # d logprob / d logits = onehot - p; the (c, 1) factor before it goes to the states
                grad = torch.softmax(logits, -1, out=logits)
                grad.scatter_add_(-1, targets[c, None], -torch.ones_like(factor))
                factor *= -grad_logprobs[c, None]
            else:  # d entropy / d logits = -p (log p + H)
                log_p = logits.log_softmax(-1)
                grad = -log_p.exp() * (
                    (log_p + entropy[c, None]) * grad_entropy[c, None]
                    + (0 if grad_logprobs is None else grad_logprobs[c, None])
                )
                if grad_logprobs is not None:
                    grad.scatter_add_(-1, targets[c, None], grad_logprobs[c, None])
            if slope is not None:
                grad *= slope
            grad = grad.to(weight.dtype)  # (c, V)
            grad_hidden[c] = float32_product(grad, weight) * factor
            if grad_weight is not None:
                states = (hidden[c] * factor).to(weight.dtype)
                if weight.dtype == torch.float32:
                    grad_weight.addmm_(grad.T, states)
                else:
                    grad_weight += float32_product(grad.T, states)
            if grad_bias is not None:
                grad_bias += (grad * factor).sum(0)
        grads = (x if x is None else x.to(weight.dtype) for x in (grad_weight, grad_bias))
        return grad_hidden, *grads, *[None] * 7


@fsdp_forward
def token_logprobs(
    model, batch, *, temperature=1.0, return_entropy=False, return_top1=False, chunk_size=None
):
    """Log-probs of the C trained tokens of a packed row under a causal language model.

    Returns `logprobs (C,)`, float32, in nats: log_softmax(logits / temperature) at the token, given what
    comes before it in its own sequence. With `return_entropy` also `entropy (C,)` of that distribution over
    the vocabulary, with `return_top1` also `is_top1 (C,)`, whether the token is the most likely one (no
    gradient); then a tuple in this order.

    The LM head (tied or not, with bias, logit scaling and soft-capping where the config has them) runs on
    the C positions only, `chunk_size` rows at a time, and is recomputed in the backward pass. The default
    is 4,096 rows on CUDA, where small products waste the device, and 512 elsewhere.
    """
    hidden = completion_states(model, batch)  # (C, H)
    targets = batch.input_ids[0, batch.completion_index]  # (C,)
    chunk_size = chunk_size or (4096 if hidden.is_cuda else 512)
    weight, bias, scale, softcap = head_settings(model)
    logprobs, entropy, is_top1 = _HeadLogprobs.apply(
        hidden, weight, bias, targets, temperature, scale, softcap, chunk_size, return_entropy, return_top1
    )
    outputs = (logprobs,) + (entropy,) * return_entropy + (is_top1,) * return_top1
    return outputs if len(outputs) > 1 else logprobs


@torch.no_grad()
def check_packed(model) -> None:
    """Raise ValueError unless two sequences in one packed row score as each does alone in the stock model.

    It holds the whole path (attention, positions, head, scaling) against the model's own forward pass,
    before the model is sharded: in float32 a leak shows as 0.1 nats and more, rounding as 1e-5 (it grows with
    the log-probs). Where rows can hold a prompt once for several sequences, that is held, too.
    """
    device, vocab_size = model.get_input_embeddings().weight.device, model.config.get_text_config().vocab_size
    one, other = (torch.arange(1, n + 1) * 7919 % vocab_size for n in (9, 6))
    name, attn = model.config.model_type, model.config._attn_implementation
    rows = {"packed": ([one, other], 1, None)}  # sequences, tokens before the first trained one, shared
    if attn == "packed":
        rows["shared"] = ([one, torch.cat([one[:4], other])], 4, [0, 4])
    for what, (sequences, untrained, shared) in rows.items():
        batch = collate([(ids, torch.arange(len(ids)) >= untrained) for ids in sequences], device, shared)
        try:
            packed = token_logprobs(model, batch)  # (C,)
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{name}: --attn {attn} does not run on packed rows ({error})") from error
        alone = []
        for ids in sequences:
            logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0, :-1]  # (length - 1, V)
            logps = logits.float().log_softmax(-1).gather(-1, ids[1:, None].to(device)).squeeze(-1)
            alone.append(logps[untrained - 1 :])
        alone = torch.cat(alone)  # (C,)
        allowed = (1e-4 if logits.dtype == torch.float32 else 0.03) * (10 + alone.abs().max())
        if not (error := (packed - alone).abs().max()) < allowed:
            raise ValueError(
                f"{name}: {what} rows leak under --attn {attn}: log-probs are {error:.2g} nats off"
            )


# ------------------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------------------
class RoomyLayer(DynamicLayer):
    """Keys and values (B, heads, length, D) with room behind them: `torch.cat` copies all for each token."""

    def make_room(self):
        length = self.keys.shape[2]
        self.memory = [F.pad(x, (0, 0, 0, max(32, length // 8))) for x in (self.keys, self.values)]
        self.keys, self.values = (x[:, :, :length] for x in self.memory)

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.make_room()

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:  # the prompts
            super().update(key_states, value_states)
            self.make_room()
            return self.keys, self.values
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self.memory[0].shape[2]:
            self.make_room()
        for memory, new in zip(self.memory, (key_states, value_states), strict=True):
            memory[:, :, start:end] = new
        self.keys, self.values = (x[:, :, :end] for x in self.memory)
        return self.keys, self.values


def crossing(weights, shares):
    """Where the running sum of weights (B, K) crosses a share (B, 1) of its end; how far into that weight."""
    sums = weights.cumsum(1, dtype=torch.float64)  # (B, K)
    wanted = shares * sums[:, -1:]  # (B, 1)
    index = torch.searchsorted(sums, wanted, right=True).clamp(max=weights.shape[1] - 1)  # (B, 1)
    left = 1 - (sums.gather(1, index) - wanted) / weights.gather(1, index)
    return index, left.clamp(0, 1 - 1e-12)


def draw(logits, uniforms, temperature: float):
    """Tokens (B,) where the distribution function of logits (B, V) crosses uniforms (B,); their log-probs."""
    scaled = F.pad(logits.float() / max(temperature, 1e-6), (0, -logits.shape[1] % 256), value=-math.inf)
    p = scaled.softmax(1).unflatten(1, (-1, 256))  # (B, V / 256, 256): one running sum of all is slow
    block, left = crossing(p.sum(2), uniforms[:, None])  # (B, 1) each
    p = p.take_along_dim(block[:, :, None], 1).squeeze(1)  # (B, 256)
    token, _ = crossing(p, left)  # (B, 1)
    tokens = (256 * block + token).clamp(max=logits.shape[1] - 1)  # NaN logits would point behind the end
    return tokens.squeeze(1), p.gather(1, token).log().squeeze(1)


def next_logits(model, input_ids, **options) -> torch.Tensor:
    """Logits (B, V), float32 whatever a model computes in, of the token behind input_ids (B, n)."""
    states = model.get_decoder()(input_ids, use_cache=True, **options).last_hidden_state[:, -1]  # (B, H)
    return head_logits(states, *head_settings(model))


@torch.no_grad()
def decode(model, prompts, uniforms, end_ids, temperature: float) -> list[tuple[list[int], torch.Tensor]]:
    """Sample a completion of each of B prompts, lists of token ids, at the uniform numbers (B, T) given.

    Returns the token ids of each, up to and with the first end token or T of them, and their log-probs under
    `temperature`, on the CPU. Equal prompts are read once; what has ended is dropped. What is sampled depends
    on no other sequence, for each has its own numbers. A sharded model must be whole: see `unsharded`.
    """
    device, (size, longest) = uniforms.device, uniforms.shape
    distinct = {ids: n for n, ids in enumerate(dict.fromkeys(map(tuple, prompts)))}  # P
    width = max(map(len, distinct))
    padded = [[0] * (width - len(ids)) + [*ids] for ids in distinct]
    input_ids = torch.tensor(padded, device=device)  # (P, width)
    starts = torch.tensor([[width - len(ids)] for ids in distinct], device=device)  # (P, 1)
    positions = torch.arange(width + longest, device=device) - starts  # (P, width + T)
    seen, positions = (positions >= 0).long(), positions.clamp(min=0)
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    tokens = torch.zeros(size, longest, dtype=torch.long, device=device)
    logprobs = torch.zeros(size, longest, device=device)
    ends, alive = torch.tensor(end_ids, device=device), torch.arange(size, device=device)
    rows = torch.tensor([distinct[tuple(ids)] for ids in prompts], device=device)  # (B,)
    for t in range(longest):
        now = slice(width + t - 1 if t else 0, width + t)
        logits = getattr(
            model, "next_logits", partial(next_logits, model)
        )(  # (B, V)
            tokens[alive, t - 1, None] if t else input_ids,
            attention_mask=seen[:, : now.stop],
            position_ids=positions[:, now],
            past_key_values=cache,
        )
        if t == 0:  # each prompt as often as it was given
            cache.batch_select_indices(rows)
            logits, seen, positions = logits[rows], seen[rows], positions[rows]
        tokens[alive, t], logprobs[alive, t] = draw(logits, uniforms[alive, t], temperature)
        if t % 16 == 15:  # drop what has ended once it is an eighth of all
            rows = (~torch.isin(tokens[alive, : t + 1], ends).any(1)).nonzero().squeeze(1)
            if not len(rows):
                break
            if len(rows) <= 7 / 8 * len(alive):
                cache.batch_select_indices(rows)
                alive, seen, positions = alive[rows], seen[rows], positions[rows]
    ended = torch.isin(tokens, ends)  # (B, T)
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, longest).tolist()
    lines = zip(tokens.tolist(), logprobs.cpu(), lengths)
    return [(ids[:n], line[:n].clone()) for ids, line, n in lines]  # views would be sent with all of (B, T)


# ------------------------------------------------------------------------------------------------------------
# KL divergence
#
# For x ~ pi and log_ratio = logprobs - ref_logprobs, every estimator below has its own gradient, and only
# some are the one that is wanted (Schulman 2020, http://joschu.net/blog/kl-approx.html; arXiv:2510.01555):
#
#               estimates         its gradient, used as a loss         used as a (detached) reward
#     k1        KL(pi || ref)     0 in expectation: no regularisation  gradient of KL(pi || ref)
#     k2        biased            gradient of KL(pi || ref)            biased
#     k3        KL(pi || ref)     gradient of KL(ref || pi)            biased
#     kl_full   KL exactly        gradient of KL(pi || ref)            -
#
# Used as a loss, the gradient is that of every token's own distribution, what comes before it held fixed; k1
# as a reward gives that of whole sequences.
# ------------------------------------------------------------------------------------------------------------
def kl_k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """log(pi / ref) (C,), for samples of pi: unbiased for KL(pi || ref), of either sign (Schulman 2020)."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """log(pi / ref)^2 / 2 (C,): never negative, biased in value, right in gradient (Schulman 2020)."""
    return (logprobs - ref_logprobs).square() / 2


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """ref/pi - 1 - log(ref/pi) (C,): unbiased for KL(pi || ref), never negative (Schulman 2020)."""
    log_ratio = logprobs - ref_logprobs
    return torch.expm1(-log_ratio) + log_ratio


KL = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}  # of --kl


def kl_full(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """KL(pi || ref) over the vocabulary, in nats: logits (..., V), ref_logits (..., V) -> (...,) float32."""
    log_p, log_q = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# ------------------------------------------------------------------------------------------------------------
# Chat formats
# ------------------------------------------------------------------------------------------------------------
ROLES = {"human": "user", "gpt": "assistant", "Human": "user", "Assistant": "assistant"}
SPEAKERS = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
HH_TURN = re.compile(r"\n\n(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|$)", re.DOTALL)
CHATML = (  # with the tokenizer's own end token: no new ones have to be learnt
    "{% for message in messages %}<|im_start|>{{ message.role + '\n' + message.content + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversational(row: dict) -> dict:
    """A row of GSM8K, ShareGPT, Alpaca, HH or TRL in TRL's columns: numbers are text, nothing is null."""
    row = {name: value for name, value in row.items() if value is not None}
    match row:
        case {"conversations": [*turns]}:
            said = [(t.get("from") or t["role"], t.get("value", t.get("content"))) for t in turns]
            row["messages"] = [{"role": ROLES.get(who, who), "content": text} for who, text in said]
        case {"instruction": task, "output": answer}:
            question = f"{task}\n\n{row.get('input', '')}".strip()
            row |= {"prompt": [{"role": "user", "content": question}], "completion": answer}
        case {"question": question} if "prompt" not in row:
            asked = [{"role": "user", "content": str(question)}]
            row |= {"prompt": asked, "completion": row.get("completion", row.get("answer", ""))}
    for name in [name for name in (*SPEAKERS, "text") if name in row and not isinstance(row[name], list)]:
        row[name] = str(row[name])
        if row[name].startswith("\n\nHuman:"):
            said = HH_TURN.findall(row[name])
            turns = [{"role": ROLES[who], "content": text.strip()} for who, text in said]
            asks = name == "prompt" and turns[-1] == {"role": "assistant", "content": ""}
            row["messages" if name == "text" else name] = turns[:-1] if asks else turns
    is_chat = any(isinstance(row.get(name), list) for name in SPEAKERS)
    for name in (name for name in SPEAKERS if is_chat and isinstance(row.get(name), str)):
        row[name] = [{"role": SPEAKERS[name], "content": row[name]}]
    return row


def template_of(tokenizer, row: dict):
    """The chat template as a function of messages -> text, with the row's tools and template settings.

    Contents may be null or lists of text parts. Raises ValueError where the template does not show the tools.
    """
    tools, options = row.get("tools") or None, row.get("chat_template_kwargs") or {}
    tools = json.loads(tools) if isinstance(tools, str) else tools

    def apply(messages, tools=tools, **more):
        tidied = []
        for message in messages:
            content = message.get("content") or ""
            text = "".join(part["text"] for part in content) if isinstance(content, list) else str(content)
            tidied.append({k: v for k, v in message.items() if v is not None} | {"content": text})
        return tokenizer.apply_chat_template(tidied, tokenize=False, tools=tools, **options, **more)

    question = [{"role": "user", "content": "?"}]
    if tools and apply(question) == apply(question, tools=None):
        raise ValueError("the chat template does not show the tools")
    return apply
