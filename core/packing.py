"""Packed rows: several sequences side by side in one row of a batch, without cross-talk."""
import itertools

from core.distributed import inside_forward, most, own_share


def pack(sequences, row_tokens, micro_tokens, device="cpu", model=None):
    """Sequences -> micro-batches of packed rows (first fit, longest first).

    sequences: list of (token ids, loss weight of each token as a target; the first is ignored).
    Rows hold up to `row_tokens` tokens (or one longer sequence), micro-batches up to
    `micro_tokens` (or one row). Yields at least one micro-batch, padding if there is no sequence:
    a dict of (rows, length) tensors
        input_ids     int64
        position_ids  int64; they restart at 0 with every sequence, which keeps sequences apart
        weights       fp32; loss weight of predicting the next token
        owner         int64; index into `sequences`, -1 for padding
    and `packed`, a bool: whether any row holds two sequences.
    If `model` is sharded, a process gets its share of the sequences, and padding until all
    processes have the same number of micro-batches.
    """
    import torch
    rows, free = [], []
    for i in own_share(sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0])), model):
        n = len(sequences[i][0])
        r = next((r for r, room in enumerate(free) if room >= n), len(rows))
        if r == len(rows):
            rows.append([])
            free.append(max(row_tokens, n))
        rows[r].append(i)
        free[r] -= n
    lengths = [sum(len(sequences[i][0]) for i in row) for row in rows]

    cuts = [0]      # micro-batch m holds the rows cuts[m] to cuts[m + 1]
    while cuts[-1] < len(rows):
        start, end = cuts[-1], cuts[-1] + 1
        while end < len(rows) and max(lengths[start:end + 1]) * (end + 1 - start) <= micro_tokens:
            end += 1
        cuts.append(end)
    for _ in range(len(cuts), most(max(2, len(cuts)), model)):
        rows.append([])
        lengths.append(1)
        cuts.append(len(rows))

    for start, end in itertools.pairwise(cuts):
        shape = (end - start, max(lengths[start:end]))
        packed = any(len(row) > 1 for row in rows[start:end])
        batch = {"input_ids": torch.zeros(shape, dtype=torch.long),
                 "position_ids": torch.zeros(shape, dtype=torch.long),
                 "weights": torch.zeros(shape), "owner": torch.full(shape, -1)}
        for r, row in enumerate(rows[start:end]):
            at = 0
            for i in row:
                ids, w = sequences[i]
                span = slice(at, at + len(ids))
                batch["input_ids"][r, span] = torch.tensor(ids)
                batch["owner"][r, span] = i
                batch["position_ids"][r, span] = torch.arange(len(ids))
                following = torch.tensor(w[1:], dtype=torch.float)
                batch["weights"][r, at:at + len(ids) - 1] = following
                at += len(ids)
        # Padding stays at position 0: a model may have no later one.
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        yield {**batch, "packed": packed}


def model_inputs(batch):
    """The arguments of a forward pass over a micro-batch.

    No attention mask and no cache: only then does transformers build the block-diagonal causal
    mask from the restarting position_ids, which keeps packed sequences apart. Where no row holds
    two sequences, causal attention is enough: no positions and no mask, for any model.
    """
    positions = {"position_ids": batch["position_ids"]} if batch["packed"] else {}
    return {"input_ids": batch["input_ids"], **positions, "use_cache": False}


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


@inside_forward
def completion_logps(model, batch):
    """Log-probability of every token whose loss weight is not 0.

    log softmax(logits)[target] in fp32, with logits at these N positions only.
    Returns logps fp32 (N,), weights (N,), owner (N,).
    """
    rows, columns = batch["weights"].nonzero(as_tuple=True)
    targets = batch["input_ids"][rows, columns + 1]
    logits = logits_at(model, batch, rows, columns).float()
    logps = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
    assert logps.shape == rows.shape
    return logps, batch["weights"][rows, columns], batch["owner"][rows, columns]
