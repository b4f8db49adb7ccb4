"""What a model is asked before it trains or judges. No list of families decides: a test does.

Many records in one row are a fast path that not every model can take: some attend across them, some
carry a state from one into the next. So a few records go through the model in every way that is
about to be used, and what differs decides.
"""
import contextlib
import itertools

from core.attention import is_separate, join, separate
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
    the one numbered `alike` on, or of a judge's two answers (2,). batch: (token ids (B, L), alike),
    of which the first row is read."""
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


def what_is_tried(records):
    """(tried, changed, alike, whole) of the token ids of all records.

    tried: the ends of three of them, because a judge reads the last token; two begin with the same
    `alike` tokens. changed: these, the first one with other tokens. whole: a long, a middle and a
    short record, at whose ends shows what depends on a length.
    """
    tried = [ids[-n:] for ids, n in zip(itertools.cycle(records), TOKENS, strict=False)]
    tried.sort(key=len, reverse=True)
    alike = max(1, min(ALIKE, len(tried[-1]) // 2))
    tried[1] = tried[0][:alike] + tried[1][alike:]
    kinds = sorted({i for ids in tried for i in ids})
    another = dict(zip(kinds, kinds[1:] + kinds[:1], strict=True))
    changed = [tried[0][:alike] + [another[i] for i in tried[0][alike:]], *tried[1:]]
    records = sorted(records, key=len)
    return tried, changed, alike, [records[-1], records[len(records) // 2], records[0]]


def probe(model, sequences, args, device, ours=completion_logps):
    """Switch dropout off and on a CPU oneDNN on (core/linear.py), and refuse a model whose training
    would not be what it says. Attention by sequences (core/attention.py) stays on if that leaves
    records what they are alone; if not, it is said aloud, and a record is a row.

    sequences: (token ids, weights) of all records. Three of them are tried, cut short and whole,
    and one row as full as training makes it. args: its micro_tokens is read. ours: what computes
    log-probabilities, as `completion_logps`.
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
    records = [ids for ids, _ in sequences]
    tried, changed, alike, whole = what_is_tried(records)

    def ask(sequences, last=None):
        """Log-probabilities of each sequence's last tokens, or of all from `alike` on."""
        found = [torch.zeros(0)] * len(sequences)
        starts = [max(1, len(ids) - last) if last else alike for ids in sequences]
        weighted = [(ids, [0.0] * start + [1.0] * (len(ids) - start))
                    for ids, start in zip(sequences, starts, strict=True)]
        room = max(1024, sum(map(len, sequences)))
        for batch in pack(weighted, room, device, model, 2, shared=False):
            logps, _, owner = ours(model, batch)
            for i in set(owner.tolist()):
                found[i] = logps[owner == i].flatten().float().cpu()
        return found

    with torch.no_grad():
        with refusal(f"{name}: its forward pass fails"):
            join(model)
            own, copies = ([own_logps(model.eval(), (torch.tensor([ids] * n, device=device),
                                                     alike)).cpu() for ids in tried]
                           for n in (1, 3))
            without_dropout(model)
            use_onednn(model)
            alone, beside = ask(tried), ask(changed)
            model.train()
            training = ask(tried)
        # fp32 sums in batches of other shapes differ by 1e-6; a bf16 value is off by up to 0.4%,
        # which 32 layers add up to 0.003 nats in a small random Llama, and to 0.05 in a random 7B
        # on a card. So three copies in a batch say how much it is in this model. In batches of one
        # shape nothing differs, unless other tokens in other rows make groups of other sizes for
        # the experts.
        exact = getattr(model, "compute_dtype", model.dtype) == torch.float32
        slack = (1e-4 if exact else 0.03) * (1 + torch.cat(own).std(correction=0).item())
        slack = min(max(slack, 4 * gap(copies, own)), 5 * slack)
        noise = 1e-6 + 4 * gap(beside[1:], alone[1:])
        for found, expected, limit, what in (
                (alone, own, slack, "without dropout, in padded rows of one record"),
                (training, alone, noise, "in training mode, without dropout,")):
            if gap(found, expected) > limit:
                got, wanted = (-torch.cat(x).mean().item() for x in (found, expected))
                raise InputError(f"{name}: {what} it computes something else: {got:.4f} instead of "
                                 f"{wanted:.4f} nats a token, each off by "
                                 f"{gap(found, expected):.1g}")
        with refusal(f"{name}: it cannot read a row of {len(whole[0])} tokens"):
            ends = [ask([ids], TOKENS[0])[0] for ids in whole]

        def compare_whole():
            with refusal(f"{name}: it cannot read whole records beside each other"):
                far = gap(ask(whole, TOKENS[0]), ends)
            if far > slack:
                raise InputError(f"{name}: whole records beside each other change each other, by "
                                 f"{far:.1g} nats a token")

        def compare_one_row():
            if not separate(model):
                raise InputError(f"{name}: its attention cannot be computed by sequences")
            with refusal(f"{name}: it cannot read many records in a row"):
                together, other = ask(tried), ask(changed)
            to_alone, by_another = gap(together, training), gap(other[1:], together[1:])
            if to_alone > slack or by_another > noise:
                raise InputError(f"{name}: records in one row see each other, which changes them "
                                 f"by {max(to_alone, by_another):.1g} nats a token")
            compare_whole()
            longest = sorted(records, key=len, reverse=True)[:args.micro_tokens]
            full = [(ids, [0.0] * (len(ids) - 1) + [1.0]) for ids in longest]
            row = next(pack(full, args.micro_tokens, device, model, shared=False))
            what = f"{name}: it cannot read a row of {row['input_ids'].shape[1]} tokens"
            # if memory is short, training tries smaller rows
            with contextlib.suppress(torch.OutOfMemoryError), refusal(what):
                ours(model, row)[0].tolist()    # waits for the device, whose errors come late

        try:
            compare_one_row()
        except InputError as e:
            join(model)
            print(f"note: {e}: a record a row instead")
        if not is_separate(model):
            compare_whole()
    model.train(was_training)
