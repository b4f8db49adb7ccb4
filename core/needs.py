"""Bytes that a training, and decoding, need: formulas on a model's shape.

The model may be on the meta device: nothing here reads a weight. tests/test_memory.py holds every
formula against the tensors that forward and backward passes and optimizers' steps really make.
"""
import math
from collections import namedtuple

from core.distributed import layers_of, world

VALUES = {"AdamW": 2, "RMSprop": 1, "Muon": 1}      # that an optimizer keeps of each weight
NF4 = 0.516     # bytes of a 4-bit weight with its share of the scales
STEP = 16       # bytes a weight while `core.precision.exact_step` updates a parameter
SLACK = 128     # tokens that the cache of a sliding window has room for beside the window


# ---------------------------------------------------------------- a model's shape
Shape = namedtuple("Shape", "h layers heads a kv inner vocabulary")


def shape_of(config):
    """The widths that memory and time depend on, of a text config of any family.

    h: hidden; a: queries of all heads; kv: keys of all heads; inner: of the MLP, or of all experts
    that a token goes to.
    """
    def get(*names, default):
        return next(filter(None, (getattr(config, name, None) for name in names)), default)
    h, heads = config.hidden_size, get("num_attention_heads", default=1)
    head = get("head_dim", default=h // heads)
    inner = get("intermediate_size", "ffn_dim", "ffn_hidden_size", default=4 * h)
    experts = get("num_experts_per_tok", default=0)
    return Shape(h, config.num_hidden_layers, heads, heads * head,
                 get("num_key_value_heads", default=heads) * head,
                 max(inner, experts * get("moe_intermediate_size", default=inner)),
                 config.vocab_size)


def compute_size(model):
    """Bytes of a value that is computed; weights that several processes share may be larger."""
    return getattr(model, "compute_dtype", model.dtype).itemsize


def size_of(params, trained=False):
    """Bytes of some parameters; with `trained`, of those that are trained."""
    # of 4-bit weights two are a byte, and their scales are no parameters
    return sum(p.numel() * (p.element_size() if p.is_floating_point() else 2 * NF4)
               for p in params if p.requires_grad or not trained)


# ---------------------------------------------------------------- training
def layer_bytes(model, longest):
    """(bytes a token that autograd keeps of a layer, those of them that are attention's scores).

    Of a norm its input in fp32, its output and, if its weight is trained, what this is multiplied
    with; 5 a from the queries to the attention's output; 4 i of the gated MLP; where attention is
    `eager`, 8 bytes for each score of a sequence of `longest` tokens.
    """
    config, size = model.config.get_text_config(), compute_size(model)
    s, layer = shape_of(config), (layers_of(model) or [model])[0]
    values_of_norm = 2 if all(p.requires_grad for p in layer.parameters()) else 1
    widths = [m.weight.numel() for m in layer.modules()
              if getattr(getattr(m, "weight", None), "ndim", 0) == 1]
    normed = sum(s.h if n == s.h else (s.a + s.kv) / 2 for n in widths)      # else of a head's size
    scores = score_bytes(config) * longest
    return normed * (4 + values_of_norm * size) + size * (5 * s.a + 4 * s.inner) + scores, scores


def activation_bytes(model, tokens, longest, labelled, checkpointing):
    """The most bytes of activations at once in a micro-batch of `tokens` tokens.

    model: may be on the meta device; longest: tokens of the longest sequence; labelled: share of
    the tokens whose logits are computed.

    A checkpointed layer keeps its input, and one layer at a time all of `layer_bytes`. To that
    comes the larger of two: at the head four fp32 values for each logit (logits, their
    exponentials, two gradients) and what the last norm keeps; in a layer's backward pass two
    gradients of its width and two tensors of the MLP's width, or one and the gradient of a weight;
    or half of the scores again.
    """
    s, size = shape_of(model.config.get_text_config()), compute_size(model)
    a_token, scores = layer_bytes(model, longest)
    trained = any(p.requires_grad for p in model.get_input_embeddings().parameters())
    kept = tokens * s.layers * (size * s.h if checkpointing else a_token)
    head = 16 * tokens * labelled * s.vocabulary + tokens * s.h * (4 + 3 * size)
    inner = s.inner * (tokens + max(tokens, s.h if trained else 0))
    backward = max(size * (inner + 2 * tokens * s.h), tokens * scores / 2)
    return kept + max(head, backward + (tokens * a_token if checkpointing else 0))


def state_bytes(kind, params, embedding):
    """Bytes that an optimizer of the class named `kind` keeps of some parameters.

    Its values are fp32, whatever the weights' type; in 8 bits all but those of the embedding.
    """
    name = kind.removesuffix("8bit")
    return sum(VALUES[name] * p.numel() * (1 if name != kind and p is not embedding else 4)
               for p in params)


def gathered_bytes(model, size):
    """Bytes of what is gathered while a layer of a sharded model computes; 0 for one process.

    Two layers, because the next one is fetched meanwhile; the gradients of one, also in the shards'
    type if they are summed in another one; and the parameters outside of the layers.
    """
    if world() == 1:
        return 0

    def weights(params, trained=False):
        return sum(p.numel() for p in params if p.requires_grad or not trained)
    layers = [list(layer.parameters()) for layer in layers_of(model)] or [[]]
    outside = weights(model.parameters()) - sum(map(weights, layers))
    summed = model.dtype.itemsize if model.dtype.itemsize != size else 0
    return (size * (2 * max(map(weights, layers)) + outside)
            + (size + summed) * max(weights(layer, True) for layer in layers))


class Plan(namedtuple("Plan", "weights remainders gradients optimizer gathered activations step")):
    """Bytes in each process. remainders: what 16-bit weights lack to fp32. step: temporaries of the
    optimizer's step, which comes when the activations are gone."""

    def total(self):
        return sum(self[:5]) + max(self.activations, self.step)

    def __str__(self):
        less = "step" if self.activations >= self.step else "activations"
        return " + ".join(f"{name} {value / 1e9:.3g}" for name, value in self._asdict().items()
                          if value and name != less)


def plan(model, state, args, labelled, longest, group=1):
    """The Plan of a training; state: bytes of its optimizers' state; group: so many sequences are
    never divided; else as `activation_bytes`.

    Trained 16-bit weights have remainders of 2 bytes (core/precision.py). Gradients are of their
    weights' type.
    """
    size, params = compute_size(model), list(model.parameters())
    exact = [p.numel() for p in params if p.requires_grad and p.element_size() == 2]
    parts = (size_of(params), 2 * sum(exact), size_of(params, True), state)
    activations = activation_bytes(model, max(args.micro_tokens, group * longest), longest,
                                   labelled, args.gradient_checkpointing)
    return Plan(*(part / world() for part in parts), gathered_bytes(model, size), activations,
                STEP * max(exact, default=0))


# ---------------------------------------------------------------- decoding
def reading_bytes(config, size, tokens, length):
    """Bytes of one layer's activations while `tokens` tokens in rows of `length` are read, with a
    mask."""
    s = shape_of(config)
    return (size * tokens * (4 * s.h + max(4 * s.inner, 6 * s.a) + 2 * length)
            + score_bytes(config) * tokens * length)


def score_bytes(config):
    """Bytes that attention keeps for each pair of query and key, of all heads."""
    eager = getattr(config, "_attn_implementation", "") == "eager"
    return 8 * shape_of(config).heads if eager else 0


def row_bytes(config, size, prompt_tokens, new_tokens, beams=1):
    """Bytes that decoding needs beside the weights for one row: one prompt, or one of its beams.

    size: bytes per value. The key-value cache of all layers, which is allocated once; and the
    larger of two: while the prompt is read, once for all its beams, one layer's activations; then
    one layer's cache copied, as rows are selected, with its heads repeated in `eager` attention,
    and a row of logits, which beam search holds in fp32 four times.
    """
    s, total = shape_of(config), prompt_tokens + new_tokens
    window = (getattr(config, "sliding_window", None) or math.inf) + SLACK
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * s.layers
    tokens = [min(total, window) if kind == "sliding_attention" else total for kind in kinds]
    a_token, scores = 2 * size * s.kv, score_bytes(config)      # a_token: of a layer's cache
    cache = a_token * sum(tokens)
    reading = reading_bytes(config, size, prompt_tokens, prompt_tokens)
    repeated = 2 * size * s.a + scores if scores else 0
    writing = (a_token + repeated) * max(tokens) + (size + 16) * s.vocabulary
    return max((cache + reading) / beams, cache + writing)


def rows_that_fit(have, row, beams):
    """How many prompts fit in `have` bytes, `row` for each of their beams; at least 1.

    A tenth is left alone: kernels' workspaces, and memory in pieces that are too small.
    """
    return max(1, int(0.9 * have / (beams * row)))
