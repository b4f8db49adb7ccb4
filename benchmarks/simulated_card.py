"""What a 7B model would cost on a card, before and after: simulated, no card has run it.

    python benchmarks/simulated_card.py

The stages' own code and transformers' Mistral run on the meta device, whose tensors have shapes and
no values. Each operation that reaches PyTorch's dispatcher counts as a kernel, and takes the longer
of two times: of its arithmetic, and of the bytes that it reads and writes (core/roofline.py has the
rates). Writes results/simulated_card.md and .json. Takes 2 GB and two minutes.
"""
import collections
import contextlib
import itertools
import math
from unittest import mock

import torch
import torch.fx.experimental._config as symbolic
from _bench import about, in_words, preferences, problems, save
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache

from core import attention, decoding
from core.packing import completion_logps, pack
from core.roofline import CARDS, Made, Model

CARD, META, BASE = CARDS["H100"], torch.device("meta"), "mistralai/Mistral-7B-v0.1"
LAUNCH = 6e-3               # ms to launch a kernel; assumed: 1,500 of a token would take 9 ms
TOKENS, ROW = 4096, 2048
# Characters a token of GSM8K's prompts and answers, by SmolLM2's tokenizer, which like Mistral's
# reads single digits. Lengths in tokens and in characters are correlated by 0.96 and 0.93.
PROMPT, ANSWER = 3.6, 2.3
CONTEXT, ANSWERED = 400, 64     # tokens before the one that is decoded; those that are answer
KINDS = ("matrix products", "attention", "other operations")

# Operations that launch nothing; that read what an index chooses; which argument others write
FREE = {"_unsafe_view", "detach", "empty", "new_empty", "empty_like", "empty_strided", "lift_fresh"}
READ = {"embedding", "index", "index_select", "gather"}
WRITTEN = {"index_put_": 2, "_index_put_impl_": 2, "scatter_": 3, "scatter_add_": 3}


# ---------------------------------------------------------------- a card of paper
def size(tensor):
    """Bytes of a tensor; what is repeated by a stride of 0 is there once."""
    shape = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(n for n, stride in shape if stride)


class Simulation(TorchDispatchMode):
    """Adds up the milliseconds of all operations on the meta device, by kind, and the kernels.

    labelled: how many positions have a loss weight; pairs: of a query and a key that attention over
    lists of sequences compares. What code asks of values is denied: no row has finished, no mask is
    all ones.
    """

    def __init__(self, labelled=0, pairs=0):
        super().__init__()
        self.labelled, self.pairs, self.spent = labelled, pairs, collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, op._overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not any(x.is_meta for x in inputs) and kwargs.get("device") != META:
            return op(*args, **kwargs)      # on the CPU
        if name in ("item", "_local_scalar_dense"):
            return False
        if name == "nonzero" and args[0].is_floating_point():
            return torch.empty(self.labelled, args[0].ndim, dtype=torch.long, device=META)
        if torch.is_inference_mode_enabled():       # operations arrive before they are divided
            with self:
                out = op.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = op(*args, **kwargs)
        view = any(r.alias_info and not r.alias_info.is_write for r in op._schema.returns)
        if not view and name not in FREE:
            self.count(op._overloadpacket, name, args, kwargs, inputs, out)
        return out

    def count(self, packet, name, args, kwargs, inputs, out):
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        inputs = [x for x in inputs if x is not kwargs.get("out")]
        moved, flops, rate, kind = sum(map(size, inputs + outputs)), 0, CARD.matrix, KINDS[2]
        if name in READ:
            moved = 2 * sum(map(size, outputs))
        elif name in WRITTEN:
            moved = 2 * size(args[WRITTEN[name]])
        elif name == "copy_":
            moved = sum(map(size, inputs))
        elif "attention" in name or "attn" in name:
            backward = "backward" in name
            q, k = inputs[backward:backward + 2]
            causal = "flash" in name and any(x is True for x in args)
            compared = q.shape[0] * q.shape[-2] * k.shape[-2] / (1 + causal)
            flops = (10 if backward else 4) * q.shape[1] * q.shape[-1] * (
                compared if q.ndim == 4 else self.pairs)
            rate, kind = CARD.attention, KINDS[1]
        elif packet in flop_registry:
            flops, kind = flop_registry[packet](*args, **kwargs, out_val=out), KINDS[0]
        self.spent[kind] += 1e3 * max(flops / rate, moved / CARD.memory)
        self.spent["kernels"] += 1


def on_cuda(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What PyTorch launches on CUDA for scaled_dot_product_attention."""
    ops, keys = torch.ops.aten, k.shape[2]
    if attn_mask is None:
        return ops._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    assert not enable_gqa, "no fused kernel has a mask and fewer heads of keys"
    zero, least = (torch.full((), x, dtype=q.dtype, device=META) for x in (0, -1))
    bias = torch.nn.functional.pad(torch.where(attn_mask, zero, least), (0, -keys % 8))[..., :keys]
    return ops._scaled_dot_product_efficient_attention(
        q, k, v, bias.expand(*q.shape[:3], keys), torch.is_grad_enabled(), scale=scale)[0]


@contextlib.contextmanager
def simulated(**known):
    with (Simulation(**known) as simulation,
          mock.patch.object(symbolic, "meta_nonzero_assume_all_nonzero", True),
          mock.patch("torch.nn.functional.scaled_dot_product_attention", on_cuda)):
        yield simulation


# ---------------------------------------------------------------- training
def filled(groups):
    """Sequences of the groups, in their order, that fill a micro-batch of rows; none is divided."""
    found = []
    for group in groups:
        if math.prod(rows_of(found + group, 1)) <= TOKENS:
            found = found + group
    return found


def rows_of(sequences, group):
    """(rows, their length) of sequences as `pack` laid them out before: the longest groups first,
    each sequence in the first row of up to ROW tokens that has room."""
    lengths, rows = [len(ids) for ids, _ in sequences], []
    groups = [lengths[k:k + group] for k in range(0, len(lengths), group)]
    for n in itertools.chain(*sorted(groups, key=sum, reverse=True)):
        k = next((k for k, used in enumerate(rows) if used + n <= ROW), None)
        if k is None:
            rows.append(n)
        else:
            rows[k] += n
    return len(rows), max(rows)


def sequences_of(record, *sides):
    """(token ids, loss weights) of a prompt with each of some answers, by their characters."""
    prompt = round(len(record["prompt"]) / PROMPT)
    answers = [round(len(record[side]) / ANSWER) for side in sides]
    return [([1] * (prompt + n), [0.0] * prompt + [1.0] * n) for n in answers]


def masked_logps(model, batch):
    """`completion_logps` as it was: transformers makes a mask from the positions."""
    hidden = model.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"],
                         use_cache=False).last_hidden_state
    rows, columns = batch["weights"].nonzero(as_tuple=True)
    targets = batch["input_ids"][rows, columns + 1]
    logits = model.lm_head(hidden[rows, columns]).float()
    return [logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)]


def compared(units):
    """Pairs of a query and a key in the sequences of `units` (as of `core.attention.attend`); a
    token and itself are half a pair."""
    return sum((shared + first) ** 2 / 2 + sum(n * (shared + n / 2) for n in others)
               for shared, first, *others in units)


def attend_on_cuda(module, q, k, v, mask, units, scaling=None, sliding_window=None, **more):
    """What `core.attention.attend` does with 16 bits on CUDA."""
    return attention.varlen(q, k, v, units, scaling, sliding_window), None


def train(model, sequences, group, way):
    """A forward and a backward pass, the first of a step."""
    labelled = int(sum(sum(weights[1:]) for _, weights in sequences))
    model.train().zero_grad()
    if way == "before":
        read, shape = masked_logps, rows_of(sequences, group)
        batch = {name: torch.zeros(shape, dtype=dtype, device=META) for name, dtype in (
            ("input_ids", torch.long), ("position_ids", torch.long), ("weights", torch.float))}
    else:
        read = completion_logps
        attention.separate(model)
        (batch,) = pack(sequences, TOKENS, META, model, group)
    with (mock.patch.dict(AttentionInterface._global_mapping, {attention.NAME: attend_on_cuda}),
          simulated(labelled=labelled, pairs=compared(batch.get("units", ()))) as simulation):
        logps = read(model, batch)
        logps[0].sum().backward()
    attention.join(model)
    return simulation.spent | {"tokens": batch["input_ids"].numel()}


# ---------------------------------------------------------------- decoding
class Enough(Exception):
    """Leaves a decoding after the token that is counted."""


def decode(model, prompts, beams, way, answered):
    """The token after CONTEXT others. Prompts are of two lengths, so that there is a mask."""
    marks, ids = [], [[i] * (CONTEXT - answered - i % 2) for i in range(prompts)]

    def mark(*call):
        marks.append(simulation.spent.copy())
        if len(marks) == answered + 2:
            raise Enough
    hook = model.eval().register_forward_pre_hook(mark)
    caches = {"before": lambda model, tokens: DynamicCache(config=model.config),
              "after": decoding.roomy_cache}
    with (contextlib.suppress(Enough), simulated() as simulation,
          mock.patch.object(decoding, "roomy_cache", caches[way]),
          mock.patch("torch.Tensor.isfinite", lambda x: torch.ones(1)),
          mock.patch("transformers.GenerationMixin._beam_search_has_unfinished_sequences",
                     lambda *args: True)):
        if beams > 1:
            decoding.decode_beams(model, ids, [2], 256, beams)
        else:
            decoding.decode(model, ids, [2], 256)
    hook.remove()
    last, token = marks[-2:]
    token.subtract(last)
    return token


# ---------------------------------------------------------------- the table
HEAD = """# Simulated: what a 7B model would cost on a card

**No card has run any of this.** Milliseconds by a roofline: {0:.0f} TFLOP/s in matrix products,
{1:.0f} in attention, {2:.2g} TB/s ({3}; `CARDS` in core/roofline.py), summed over all operations of
the real code with the shapes of Mistral-7B-v0.1 in bf16. A launch takes {4:.0f} us, while others
compute: work takes at least the larger of the two sums, which is what *faster* compares.

Not simulated: gaps between kernels and waits; kernels side by side; how near to the rates a kernel
comes (small ones, and attention with a mask, are slower than that); memory in pieces; gradients
that are added to earlier ones; the optimizer's step.

Before: commit d97519c. A mask over rows of several sequences, for which heads of keys and values
are repeated; a cache that is copied at every token; beams by `generate`. After: this commit, with
attention by `torch.nn.attention.varlen` in training, as on CUDA.

| work | way | """ + " | ".join(KINDS) + """ | in all | kernels, to launch | faster |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def total(spent):
    return sum(spent[kind] for kind in KINDS)


def least(spent):
    return max(total(spent), LAUNCH * spent["kernels"])


def lines_of(work, ways):
    for way, spent in ways.items():
        faster = least(ways["before"]) / least(spent)
        yield (f"| {work} | {way} | " + " | ".join(f"{spent[kind]:.1f}" for kind in KINDS)
               + f" | {total(spent):.1f} | {spent['kernels']:,}, {LAUNCH * spent['kernels']:.1f} | "
               + (f"**{faster:.2f}** |" if way != "before" else "|"))


def main():
    def tokens(work, way):
        return f"{table[work][way]['tokens']:,}"
    model, table = Model(Made(BASE, 0), False, None, False).model, {}
    for prompts, beams in ((256, 1), (32, 1), (64, 4), (8, 4)):
        # a greedy token costs the same whatever part of the row is answer
        answered = ANSWERED if beams > 1 else 2
        work = f"a token, {prompts} prompts" + (f" x {beams} beams" if beams > 1 else "")
        table[work] = {way: decode(model, prompts, beams, way, answered)
                       for way in ("before", "after")}
    records = problems("train", 200)
    tuned = filled([sequences_of(r, "completion") for r in records])
    pairs = filled([sequences_of(r, "chosen", "rejected") for r in preferences(records)])
    half = [([1] * ROW, [0.0] * (ROW // 2) + [1.0] * (ROW // 2))] * (TOKENS // ROW)
    for words in ("", ", checkpointing"):
        if words:
            model.gradient_checkpointing_enable()
        for work, sequences, group in (("SFT", tuned, 1), ("DPO", pairs, 2)):
            table[work + words] = {way: train(model, sequences, group, way)
                                   for way in ("before", "after")}
    old = train(model, half, 1, "before")
    text = HEAD.format(CARD.matrix / 1e12, CARD.attention / 1e12, CARD.memory / 1e12, CARD.name,
                       1e3 * LAUNCH)
    text += "\n".join(line for item in table.items() for line in lines_of(*item)) + f"""

SFT: a micro-batch of {len(tuned)} GSM8K problems, {tokens("SFT", "before")} tokens in rows before,
{tokens("SFT", "after")} after. DPO: {len(pairs) // 2} pairs of them, {tokens("DPO", "before")} and
{tokens("DPO", "after")}. Lengths are those of the texts, by {PROMPT} characters a token of a prompt
and {ANSWER} of an answer. A token: after {CONTEXT} others; of beams {ANSWERED} of these are answer,
half of a mean one.

With 32 rows a token takes as long as its launches, so that a better cache changes nothing there; a
CUDA graph would. In training nothing waits for launches, and most of what is left are matrix
products, which do not change.

Held against an earlier simulation by another program. An SFT micro-batch of rows of {ROW:,} tokens,
half of them labelled, checkpointing: {total(old):.0f} ms
({", ".join(f"{kind} {old[kind]:.0f}" for kind in KINDS)}), there 518 (331, 49, 138). A token of 256
prompts: {total(table["a token, 256 prompts"]["before"]):.1f} ms, there 23.5; with memory for the
cache {total(table["a token, 256 prompts"]["after"]):.1f}, there 14.6.

{in_words(about())}"""
    print(text)
    save("simulated_card", text, {"about": about(), "card": CARD._asdict(), "launch": LAUNCH,
                                  "milliseconds": table, "rows of 2,048 tokens": old}, indent=1)


if __name__ == "__main__":
    main()
