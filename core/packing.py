"""Micro-batches: many sequences in one row where the model keeps them apart, else one a row."""
import functools
import math
import os

from core.attention import is_separate
from core.distributed import inside_forward, most, own_share

# Rows of attention by sequences are padded to a multiple of MULTIPLE tokens: oneDNN makes a plan
# for every new shape of a product, which takes longer than the product where a model is tiny.
MULTIPLE = 32


def pack(sequences, micro_tokens, device, model, group=1, shared=True):
    """Sequences -> micro-batches of up to `micro_tokens` tokens, longest first.

    sequences: list of (token ids, loss weight of each token as a target; the first is ignored).
    group: so many following sequences are never divided; a group may exceed micro_tokens.
    If the model's attention keeps sequences apart (core/attention.py), a micro-batch is one row
    with less than MULTIPLE tokens of padding, where a group's common beginning, up to its first
    target, stands once. Else a sequence is a row, padded to the longest.
    Yields at least one micro-batch, padding if there is no sequence: a dict of (rows, length)
    tensors
        input_ids     int64
        position_ids  int64; they restart with every sequence, or go on after the beginning
        weights       fp32; loss weight of predicting the next token
        owner         int64; index into `sequences`, -1 for padding; of a beginning the first one
    and `units`: None, or what `core.attention.attend` needs; `members`: the indices into
    `sequences`, in the rows' order.
    If `model` is sharded, a process gets its share of the groups, and padding until all
    processes have the same number of micro-batches; unless `shared` is False.
    """
    one_row, among = is_separate(model), model if shared else None
    groups = [range(k, min(k + group, len(sequences))) for k in range(0, len(sequences), group)]
    # a part is what stands together: sequences with a common beginning, or just one
    groups = [[tuple(g)] if one_row else [(i,) for i in g] for g in groups]

    @functools.cache
    def tokens(part):
        lengths = [len(sequences[i][0]) for i in part]
        return sum(lengths) - (len(part) - 1) * beginning([sequences[i] for i in part])

    def size(parts):
        lengths = list(map(tokens, parts))
        return sum(lengths) if one_row else len(parts) * max(lengths)

    groups.sort(key=lambda parts: -sum(map(tokens, parts)))
    micros, parts = [], []
    for more in own_share(groups, among):
        if parts and size(parts + more) > micro_tokens:
            micros.append(parts)
            parts = []
        parts = parts + more
    micros.append(parts)
    micros += [[]] * (most(len(micros), among) - len(micros))
    for parts in micros:
        rows = [parts] if one_row else [[part] for part in parts] or [[]]
        yield laid_out(sequences, rows, one_row, device)


def beginning(sequences):
    """How many first tokens some sequences can share: the same ones, none of which is a target or
    the last before one, so that what is predicted at a token belongs to one sequence."""
    if len(sequences) == 1:
        return 0
    same = len(os.path.commonprefix([ids for ids, _ in sequences]))
    targets = [next((t for t, w in enumerate(weights) if w and t), len(weights))
               for _, weights in sequences]
    return max(0, min(same, *(t - 1 for t in targets)))


def labelled_share(sequences, model, group=1):
    """The share of the tokens of micro-batches whose logits are computed; arguments of `pack`."""
    labelled = sum(sum(w > 0 for w in weights) for _, weights in sequences)
    tokens = sum(len(ids) for ids, _ in sequences)
    if is_separate(model):
        tokens -= sum(beginning(sequences[k:k + group]) * (len(sequences[k:k + group]) - 1)
                      for k in range(0, len(sequences), group))
    return labelled / tokens


def laid_out(sequences, rows, one_row, device):
    """The micro-batch of some rows, as `pack` says."""
    import torch
    names = "input_ids", "position_ids", "weights", "owner"
    table, units = {name: [] for name in names}, []
    for row in rows:
        lines = [[] for _ in names]
        for part in row:
            shared = beginning([sequences[i] for i in part])
            for start, i in zip((0, *[shared] * len(part[1:])), part, strict=True):
                ids, weights = sequences[i]
                new = (ids[start:], range(start, len(ids)), [*weights[start + 1:], 0.0],
                       [i] * (len(ids) - start))
                for line, values in zip(lines, new, strict=True):
                    line += values
            units.append((shared, *(len(sequences[i][0]) - shared for i in part)))
        for name, line in zip(names, lines, strict=True):
            table[name].append(line)
    width = max(1, *map(len, table["owner"]))
    if one_row:
        filled = math.ceil(width / MULTIPLE) * MULTIPLE
        units += [(0, filled - sum(map(sum, units)))]       # the padding, a sequence of its own
        width = filled
    # Padding stays at position 0: a model may have no later one.
    batch = {name: torch.tensor(
        [line + [-1 if name == "owner" else 0] * (width - len(line)) for line in lines],
        dtype=torch.float if name == "weights" else torch.long).to(device, non_blocking=True)
        for name, lines in table.items()}
    return {**batch, "units": tuple(unit for unit in units if sum(unit)) if one_row else None,
            "members": [i for row in rows for part in row for i in part]}


def model_inputs(batch):
    """The arguments of a forward pass over a micro-batch.

    No attention mask and no cache. A row of one sequence, whose padding comes last, needs neither
    mask nor positions for causal attention, in any model.
    """
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    if batch["units"]:
        inputs.update(position_ids=batch["position_ids"], units=batch["units"])
    return inputs


def hidden_states(model, batch):
    """(rows, length, width) last hidden states of a micro-batch."""
    return model.base_model(**model_inputs(batch)).last_hidden_state


def logits_at(model, batch, rows, columns):
    """(N, vocabulary) logits at N positions of a micro-batch, by the model's own forward pass.

    A head may scale, cap or shift its logits. So the model's own code computes them, and a hook
    on its body hands it the hidden states of the N positions only. A model whose forward does
    not go through `base_model` computes all logits.
    """
    chosen = []

    def choose(body, inputs, output):
        if getattr(output, "last_hidden_state", None) is not None:
            chosen.append(output.last_hidden_state[rows, columns][None])
            output.last_hidden_state = chosen[0]
            return output
    hook = model.base_model.register_forward_hook(choose)
    try:
        # not model(...): the weights of a sharded model are gathered by now (`inside_forward`)
        logits = model.forward(**model_inputs(batch)).logits
    finally:
        hook.remove()
    return logits[0] if chosen else logits[rows, columns]


def target_logps(logits, targets):
    """log softmax(logits)[target]: (N,) of logits (N, vocabulary) and targets int64 (N,).

    Everything, the gradient too, is written over the logits, which are the largest tensor of a
    pass: nothing else may use them.
    """
    return target_logps_function().apply(logits, targets)


@functools.cache
def target_logps_function():
    import torch

    class TargetLogps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, targets):
            logps = logits.detach()
            torch.log_softmax(logps, 1, out=logps)
            ctx.save_for_backward(logps, targets)
            return logps.gather(1, targets[:, None])[:, 0]

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            logps, targets = ctx.saved_tensors
            gradient = gradient[:, None]
            return logps.exp_().mul_(-gradient).scatter_add_(1, targets[:, None], gradient), None
    return TargetLogps


@inside_forward
def completion_logps(model, batch):
    """Log-probability of every token whose loss weight is not 0.

    log softmax(logits)[target] in fp32, with logits at these N positions only.
    Returns logps fp32 (N,), weights (N,), owner (N,).
    """
    rows, columns = batch["weights"].nonzero(as_tuple=True)
    targets = batch["input_ids"][rows, columns + 1]
    logps = target_logps(logits_at(model, batch, rows, columns).float(), targets)
    assert logps.shape == rows.shape
    return logps, batch["weights"][rows, columns], batch["owner"][rows, columns]
