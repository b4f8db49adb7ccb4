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
            # After a single sequence, padding continues its positions: if no row holds two
            # sequences, transformers then needs no mask, because causal attention is enough.
            padding = torch.arange(shape[1] - at)
            batch["position_ids"][r, at:] = padding + (at if len(row) == 1 else 0)
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def hidden_states(model, batch):
    """(rows, length, width) last hidden states of a micro-batch.

    No attention mask and no cache: only then does transformers build the block-diagonal causal
    mask from the restarting position_ids, which keeps packed sequences apart.
    """
    return model.base_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"],
                            use_cache=False).last_hidden_state


@inside_forward
def completion_logps(model, batch):
    """Log-probability of every token whose loss weight is not 0.

    log softmax(logits)[target] in fp32, with logits at these N positions only; Gemma 2's
    soft-capping of the logits is included. Returns logps fp32 (N,), weights (N,), owner (N,).
    """
    import torch
    rows, columns = batch["weights"].nonzero(as_tuple=True)
    targets = batch["input_ids"][rows, columns + 1]
    logits = model.get_output_embeddings()(hidden_states(model, batch)[rows, columns]).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    logps = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
    assert logps.shape == rows.shape
    return logps, batch["weights"][rows, columns], batch["owner"][rows, columns]
