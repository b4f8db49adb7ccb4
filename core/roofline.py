"""Memory and time of a model on a card, by its shape: for `core.estimate`. No weight is read.

Time is a roofline: matrix products, attention and bytes of memory, each at a rate that the card
should reach. The optimizer's step and gaps between kernels are not in it (docs/full-size.md).
"""
import contextlib
import io
import json
from collections import namedtuple
from pathlib import Path

from core.adapters import add_lora, inner_linears
from core.needs import layer_bytes, shape_of, size_of
from core.records import InputError

# Bytes of memory; operations a second in matrix products and in attention; bytes a second. Of the
# makers' dense bf16 peaks (989, 312, 165 TFLOP/s) and memory rates (3.35, 2.04, 1.01 TB/s) the
# shares that are assumed for an H100: 66%, 40% and 78%.
Card = namedtuple("Card", "name bytes matrix attention memory")
CARDS = {"H100": Card("H100 of 80 GB", 80e9, 650e12, 400e12, 2.6e12),
         "A100": Card("A100 of 80 GB", 80e9, 205e12, 126e12, 1.58e12),
         "4090": Card("RTX 4090 of 24 GB", 24e9, 108e12, 67e12, 0.78e12)}
LAUNCH = 3e-4               # seconds to launch a layer's kernels for one token: 46 of them

# Passes over what autograd keeps of a layer: forward, backward, computing it again. Adapters add
# sums as wide as their layers. Fitted to simulations of every operation of a 7B and a 2B model
# (tests/test_estimate.py has their milliseconds, benchmarks/simulated_card.py makes some of them).
PASSES, ADAPTED = (4, 5, 3), 5 / 3

# What config.json says of the presets' models, so that no network is needed.
KNOWN = {
    "gemma-2b": ("gemma", dict(
        hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256, vocab_size=256000)),
    "Mistral-7B-v0.1": ("mistral", dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, sliding_window=4096, tie_word_embeddings=False)),
    "Meta-Llama-3-8B": ("llama", dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False)),
    "Meta-Llama-3-70B": ("llama", dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False)),
    "SmolLM2-135M-Instruct": ("llama", dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True))}

Made = namedtuple("Made", "base rank")      # a model: hub name or folder; rank of adapters, or 0


# ---------------------------------------------------------------- models, without their weights
def config_of(base):
    """The config of a folder, of a hub name in the local cache, or of KNOWN; InputError if none."""
    from transformers import AutoConfig
    if Path(base).suffix == ".json" and Path(base).exists():
        return AutoConfig.for_model(**json.loads(Path(base).read_text()))
    with contextlib.suppress(OSError, ValueError):
        return AutoConfig.from_pretrained(base, local_files_only=True)
    name = Path(base).name
    if name not in KNOWN:
        raise InputError(f"there is no config of {base} here")
    family, shape = KNOWN[name]
    return AutoConfig.for_model(family, **shape)


class Model:
    """A model on the meta device as a stage would open it, and the numbers that its time takes."""

    def __init__(self, made, four, dtype, judge):
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
        auto, config = AutoModelForCausalLM, config_of(made.base)
        if judge:
            auto, config.num_labels = AutoModelForSequenceClassification, 2
        with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
            self.model = auto.from_config(config, dtype=getattr(torch, dtype or "bfloat16"))
            self.count = sum(p.numel() for p in self.model.parameters())
            inner = [layer for _, layer in inner_linears(self.model, "")]
            if made.rank:
                add_lora(self.model, made.rank)
        self.config, self.rank, self.four = self.model.config.get_text_config(), made.rank, four
        self.shape, self.size = shape_of(self.config), self.model.dtype.itemsize
        self.inner = sum(layer.in_features * layer.out_features for layer in inner)
        # checkpointing stops before a layer's last product
        self.last = sum(layer.in_features * layer.out_features for layer in inner
                        if layer.in_features == self.shape.inner)
        for layer in inner if four else ():     # two weights a byte, as bitsandbytes keeps them
            packed = torch.empty(layer.weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
            layer.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.name = Path(made.base).name + (f" + LoRA {made.rank}" if made.rank else "")
        self.name += " in 4 bits" if four else ""
        self.bytes = size_of(self.model.parameters())
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.adapters = sum(p.numel() for p in self.trained) if made.rank else 0

    def seconds(self, card, tokens, seen, labelled, batches, train=False, again=False):
        """Of reading `tokens` tokens in `batches` passes, each attending to `seen` tokens on
        average; train: with gradients; again: layers are computed again (checkpointing)."""
        s, full = self.shape, not self.rank
        matrix = self.inner * (2 + train * (2 + 2 * full)) + again * 2 * (self.inner - self.last)
        matrix += self.adapters * (2 + 4 * train + 2 * again)
        matrix += labelled * s.h * s.vocabulary * (2 + train * (2 + 2 * full))
        attention = 4 * s.a * seen * s.layers * (1 + 2.5 * train + again)
        passes = sum(n for n, done in zip(PASSES, (True, train, again), strict=True) if done)
        kept = layer_bytes(self.model, seen)[0] * s.layers * (1 if full else ADAPTED)
        moved = kept * passes + labelled * s.vocabulary * (10 + 30 * train)
        weights = self.four * 4.5 * self.inner * (1 + train + again) * batches
        return tokens * (matrix / card.matrix + attention / card.attention
                         + moved / card.memory) + weights / card.memory

    def token_seconds(self, card, rows, alive, tokens, moved):
        """Of one token of each of `rows` rows of `tokens` tokens, a share of them `alive`; moved:
        tokens whose cache is moved because beams change places."""
        s = self.shape
        read = self.inner * (4.5 if self.four else self.size) + self.size * s.h * s.vocabulary
        products = 2 * (self.inner + s.h * s.vocabulary) * rows * alive
        # attention reads the cache once; moving is two reads and two writes
        cache = 2 * self.size * s.kv * s.layers * (tokens + 4 * moved) * rows * alive
        other = PASSES[0] * layer_bytes(self.model, 1)[0] * s.layers * rows * alive
        computing = max(read / card.memory, products / card.matrix) + (cache + other) / card.memory
        return max(computing, LAUNCH * s.layers)
