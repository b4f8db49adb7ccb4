"""What a model is asked before it trains or judges. No list of families decides: a test does.

Packed rows are a fast path that not every model can take: some attend across the sequences of a
row, some carry a state from one into the next. So a few short records go through the model in every
way that is about to be used, and what differs decides.
"""
import contextlib
import itertools

from core.attention import join, separate
from core.distributed import first, inside_forward, is_loss_of_another
from core.linear import use_onednn
from core.memory import lacks_memory
from core.packing import completion_logps, pack
from core.records import InputError

TOKENS = (48, 40, 32)       # of the records that are tried; different, so that padding is tried too
ALIKE = 16      # first tokens that two of them have in common, as the sequences of a pair


def without_dropout(model):
    """Switch off all dropout of a model and of its config, in place: the paper trains without any.

    That is every Dropout module, and every number whose name says drop.
    """
    import torch
    from transformers import PreTrainedConfig
    configs = []
    for thing in itertools.chain(model.modules(), configs):     # configs grows meanwhile
        for name, value in list(vars(thing).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(thing, name, 0.0)
            if isinstance(value, PreTrainedConfig) and all(value is not c for c in configs):
                configs.append(value)
        if isinstance(thing, torch.nn.modules.dropout._DropoutNd):
            thing.p = 0.0


@inside_forward
def own_logps(model, batch):
    """Log-probabilities of one sequence by the model's own forward pass, fp32: of its tokens from
    the one numbered `alike` on, or of a judge's two answers (2,). batch: (token ids (1, L), alike).
    """
    ids, alike = batch
    logps = model.forward(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0]
    if logps.dim() == 1:
        return logps
    return logps[alike - 1:-1].gather(1, ids[0, alike:, None])[:, 0]


def gap(found, expected):
    """Mean difference, without sign, of two lists of tensors; the first process says it for all."""
    import torch
    return first(lambda: (torch.cat(found) - torch.cat(expected)).abs().mean().item())


@contextlib.contextmanager
def refusal(what):
    """What a model says of an input that it cannot take becomes an InputError of one line."""
    try:
        yield
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as e:
        if lacks_memory(e) or is_loss_of_another(e):
            raise
        said = (str(e) or type(e).__name__).splitlines()[0]
        raise InputError(f"{what} ({said})") from None


def refuse_cross_talk(ask, tried, changed, row_tokens, alone, slack, noise):
    """InputError if sequences that share a row are not what they are alone, or if those of `tried`
    but the first are not what they are in `changed`, where the first one has other tokens."""
    with refusal("it cannot read packed rows"):
        packed, other = ask(tried, row_tokens), ask(changed, row_tokens)
    to_alone, by_another = gap(packed, alone), gap(other[1:], packed[1:])
    if to_alone > slack or by_another > noise:
        raise InputError("packed records see each other, which changes them by "
                         f"{max(to_alone, by_another):.1g} nats a token")


def probe(model, sequences, args, device, ours=completion_logps):
    """Switch dropout off and on a CPU oneDNN on (core/linear.py), and refuse a model whose training
    would not be what it says.

    sequences: (token ids, weights) of all records. Three of them are tried, cut short, and one row
    as full as training makes it. ours: what computes log-probabilities, as `completion_logps`.
    Sets args.row_tokens to the first of these that leaves records what they are alone: 0 for
    attention by sequences (core/attention.py), what it is, or 1, aloud, for rows of one record.
    InputError for token ids without an embedding, for values that are not the model's own, for what
    is random, and for records that are too long for the model. The processes of a sharded model all
    do the same.
    """
    import torch
    name, was_training = model.name_or_path or type(model).__name__, model.training
    known, highest = model.get_input_embeddings().weight.shape[0], max(max(s[0]) for s in sequences)
    if highest >= known:
        raise InputError(f"{name}: the tokenizer writes token {highest}, but the model has only "
                         f"{known} embeddings: they do not belong together")
    # the ends of records, because a judge reads the last token
    tried = [s[0][-n:] for s, n in zip(itertools.cycle(sequences), TOKENS, strict=False)]
    tried.sort(key=len, reverse=True)
    alike = max(1, min(ALIKE, len(tried[-1]) // 2))
    tried[1] = tried[0][:alike] + tried[1][alike:]
    kinds = sorted({i for ids in tried for i in ids})
    another = dict(zip(kinds, kinds[1:] + kinds[:1], strict=True))
    changed = [tried[0][:alike] + [another[i] for i in tried[0][alike:]], *tried[1:]]

    # what depends on a length shows at the ends of whole records: a long, a middle, a short one
    whole = sorted((s[0] for s in sequences), key=len)
    lengths = [whole[-1], whole[len(whole) // 2], whole[0]]

    def ask(sequences, row_tokens, last=None):
        """Log-probabilities of each sequence's last tokens, or of all from `alike` on."""
        found = [torch.zeros(0)] * len(sequences)
        starts = [max(1, len(ids) - last) if last else alike for ids in sequences]
        weighted = [(ids, [0.0] * start + [1.0] * (len(ids) - start))
                    for ids, start in zip(sequences, starts, strict=True)]
        room = max(1024, sum(map(len, sequences)))
        for batch in pack(weighted, row_tokens, room, device, None, 2):
            logps, _, owner = ours(model, batch)
            for i in set(owner.tolist()):
                found[i] = logps[owner == i].flatten().float().cpu()
        return found

    with torch.no_grad():
        with refusal(f"{name}: its forward pass fails"):
            join(model)
            own = [own_logps(model.eval(), (torch.tensor([ids], device=device), alike)).cpu()
                   for ids in tried]
            without_dropout(model)
            use_onednn(model)
            alone, beside = ask(tried, 1), ask(changed, 1)
            model.train()
            training = ask(tried, 1)
        # fp32 sums in batches of other shapes differ by 1e-6; a bf16 value is off by up to 0.4%,
        # which 32 layers add up to 0.003 nats (a random Llama). In batches of one shape nothing
        # differs, unless other tokens in other rows make groups of other sizes for the experts.
        exact = getattr(model, "compute_dtype", model.dtype) == torch.float32
        slack = (1e-4 if exact else 0.02) * (1 + torch.cat(own).std(correction=0).item())
        noise = 1e-6 + 4 * gap(beside[1:], alone[1:])
        for found, expected, limit, what in (
                (alone, own, slack, "without dropout, in padded rows of one record"),
                (training, alone, noise, "in training mode, without dropout,")):
            if gap(found, expected) > limit:
                got, wanted = (-torch.cat(x).mean().item() for x in (found, expected))
                raise InputError(f"{name}: {what} it computes something else: {got:.4f} instead of "
                                 f"{wanted:.4f} nats a token, each off by "
                                 f"{gap(found, expected):.1g}")
        with refusal(f"{name}: it cannot read a row of {len(lengths[0])} tokens"):
            ends = [ask([ids], 1, TOKENS[0])[0] for ids in lengths]
        for row_tokens in dict.fromkeys((0, args.row_tokens or 1, 1)):
            if row_tokens == 0 and not separate(model):
                continue
            try:
                if row_tokens != 1:
                    # at least: some other one comes behind the first
                    width = row_tokens and len(tried[0]) + len(tried[-1])
                    refuse_cross_talk(ask, tried, changed, width, training, slack, noise)
                with refusal("it cannot read whole records beside each other"):
                    far = gap(ask(lengths, row_tokens, TOKENS[0]), ends)
                if far > slack:
                    raise InputError("whole records beside each other change each other, by "
                                     f"{far:.1g} nats a token")
                full = row_tokens or args.micro_tokens
                weighted = [(ids, [0.0] * (len(ids) - 1) + [1.0]) for ids in whole[::-1][:full]]
                row = next(pack(weighted, row_tokens, 1 if row_tokens else full, device))
                what = f"it cannot read a row of {row['input_ids'].shape[1]} tokens"
                # if memory is short, training tries smaller rows
                with contextlib.suppress(torch.OutOfMemoryError), refusal(what):
                    ours(model, row)[0].tolist()    # waits for the device, whose errors come late
                args.row_tokens = row_tokens
                break
            except InputError as e:
                join(model)
                if row_tokens == 1:
                    raise InputError(f"{name}: {e}") from None
                if row_tokens:
                    print(f"note: {name}: {e}: rows of one record instead, as by --row-tokens 1")
    model.train(was_training)
