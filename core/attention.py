"""Attention within each sequence of a row that holds many, without a mask over the row.

A micro-batch is then one row of tokens, nearly all of them real, and every other operation of a
model sees nothing else. Sequences that begin alike may keep that beginning once (prefix sharing,
arXiv 2410.20305), since what comes later changes nothing before it.
"""
import functools
import inspect

NAME = "by_sequence"        # in transformers' table of attention functions


def separate(model):
    """Make `attend` the attention of a model, if the model allows another attention function.

    Returns whether the model uses `attend` now. It replaces `sdpa` only: models with another
    attention add what `attend` does not know. From then on every forward pass of the model needs
    `units`; `join` undoes it.
    """
    from transformers import AttentionInterface
    AttentionInterface.register(NAME, attend)
    if implementation(model) == "sdpa":
        model.set_attn_implementation(NAME)
    return is_separate(model)


def join(model):
    """Undo `separate`."""
    if is_separate(model):
        model.set_attn_implementation("sdpa")


def is_separate(model):
    """Whether the model's attention is `attend` now."""
    return implementation(model) == NAME


def implementation(model):
    return getattr(model.config.get_text_config(), "_attn_implementation", None)


def attend(module, query, key, value, attention_mask, units=None, scaling=None, dropout=0.0,
           sliding_window=None, softcap=None, position_bias=None, **kwargs):
    """Causal attention of every token to those of its own sequence, as transformers calls it.

    query (1, heads, N, size), key and value (1, fewer heads, N, size); units: for each unit of the
    row the lengths (beginning, rest, rest, ...) of one sequence or of several with a common
    beginning, see `core.packing.pack`. Returns ((1, N, heads, size), None).
    Raises ValueError for what it cannot do; `core.probe` then takes another way.
    """
    import torch
    if (units is None or len(query) > 1 or dropout or softcap is not None
            or position_bias is not None):
        raise ValueError("attention by sequences knows only rows of units, without dropout, "
                         "softcap or bias")
    if (query.is_cuda and query.dtype != torch.float32
            and torch.backends.cuda.is_flash_attention_available()):
        return varlen(query, key, value, units, scaling, sliding_window), None
    # the first rest stands behind the beginning, so both are one sequence already
    sizes = [n for shared, first, *others in units for n in (shared + first, *others)]
    pieces = zip(*(x.split(sizes, 2) for x in (query, key, value)), strict=True)
    found = []
    for shared, _, *others in units:
        q, k, v = next(pieces)
        found.append(causal(q, k, v, scaling, sliding_window))
        for _ in others:
            own_q, *own = next(pieces)
            k_v = (torch.cat([x[:, :, :shared], y], 2) for x, y in zip((k, v), own, strict=True))
            found.append(causal(own_q, *k_v, scaling, sliding_window))
    return torch.cat(found, 1), None


def causal(q, k, v, scaling, window):
    """Attention of one sequence, (1, length of q, heads, size). q: of its last tokens, or all."""
    import torch
    mask, n, total = None, q.shape[2], k.shape[2]
    window = window or total
    if n < total or window < total:
        ages = (torch.arange(total - n, total, device=q.device)[:, None]
                - torch.arange(total, device=q.device))
        mask = (ages >= 0) & (ages < window)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def varlen(query, key, value, units, scaling, window):
    """The same as in `attend` by one kernel for all sequences (16 bits on CUDA)."""
    from torch.nn.attention.varlen import varlen_attn
    at, q_ends, k_ends, q_most, k_most = cumulative(units, query.device)
    # (N, heads, size); the keys of a beginning are repeated for each sequence that has it
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    # the last query stands at the last key; (-1, 0) is causal, and a window counts the token itself
    # torch 2.11 has no such argument: there, fewer heads of keys are always allowed
    known = inspect.signature(varlen_attn).parameters
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if "enable_gqa" in known else {}
    return varlen_attn(q.contiguous(), k[at], v[at], q_ends, k_ends, q_most, k_most, scale=scaling,
                       window_size=(window - 1 if window else -1, 0), **grouped)[None]


@functools.lru_cache(4)         # the same for all layers
def cumulative(units, device):
    """What `varlen_attn` needs of a row: positions of the keys, ends of the sequences among the
    queries and among those keys, int32 (sequences + 1,), and the longest of either."""
    import torch
    at, q_lengths, k_lengths, start = [], [], [], 0
    for shared, *rests in units:
        beginning, own = range(start, start + shared), start + shared
        for k, rest in enumerate(rests):
            at += [*beginning, *range(own, own + rest)]
            q_lengths.append(rest + (0 if k else shared))
            k_lengths.append(shared + rest)
            own += rest
        start = own
    ends = [torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
            for lengths in (q_lengths, k_lengths)]
    return torch.tensor(at, device=device), *ends, max(q_lengths), max(k_lengths)
