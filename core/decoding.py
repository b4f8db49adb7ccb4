"""Decoding: a model and a batch of prompts -> token ids, greedy, sampled or by beam search."""
import hashlib
import inspect

from core.memory import lacks_memory
from core.needs import SLACK
from core.records import InputError, dumps


def sample_uniforms(seed, id_, sample, count):
    """(count,) float32 in [0, 1): the noise of one sample, a function of (seed, id, sample)."""
    import numpy as np
    digest = hashlib.sha256(dumps([seed, id_, sample]).encode()).digest()
    generator = np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))
    return generator.random(count, dtype=np.float32)


def choose_tokens(logits, temperature, uniforms=None):
    """Next tokens (B,) from logits (B, V).

    The argmax; or with `uniforms` (B,) the inverse of the CDF of softmax(logits / temperature).
    """
    import torch
    if uniforms is None:
        return logits.argmax(-1)
    cdf = (logits.float() / temperature).softmax(-1).cumsum(-1)
    # The last sum is 1 up to rounding: scaling by it keeps the index below V.
    chosen = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)[:, 0]
    return chosen.clamp(max=logits.shape[-1] - 1)


def roomy_cache(model, tokens):
    """A DynamicCache whose attention layers have memory for `tokens` tokens from the start.

    The cache of transformers is copied at every token, a third of the time of a small model. Layers
    with a sliding window have memory for it and SLACK tokens, and copy it once in SLACK tokens. All
    return the same tensors as transformers' own, so masks of any layers are right.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    class RoomyLayer(DynamicLayer):
        def __init__(self, layer):
            super().__init__()
            self.is_sliding = layer.is_sliding
            # a token sees window - 1 before it; without a window, all
            self.before = layer.sliding_window - 1 if layer.is_sliding else tokens
            # tokens read; of these in memory; of these the same in all rows of a prompt's beams
            self.read = self.end = self.shared = 0
            self.room = []      # of keys and of values: (B, heads, tokens, width)

        def get_seq_length(self):
            return self.read

        def get_mask_sizes(self, query_length):
            seen = min(self.read, self.before)
            return seen + query_length, self.read - seen

        def update(self, key_states, value_states, *args, **kwargs):
            import torch
            new, size = (key_states, value_states), min(tokens, self.before + SLACK)
            if not self.room:
                self.lazy_initialization(*new)
                self.room = [x.new_empty(*x.shape[:2], size, x.shape[-1]) for x in new]
            start, end = self.end - min(self.read, self.before), self.end + key_states.shape[-2]
            if end <= size:
                for room, x in zip(self.room, new, strict=True):
                    room[:, :, self.end:end] = x
                seen, kept = [room[:, :, start:end] for room in self.room], end
            else:       # copy the window to the front
                seen = [torch.cat([room[:, :, start:self.end], x], 2)
                        for room, x in zip(self.room, new, strict=True)]
                kept = min(end - start, self.before)
                for room, x in zip(self.room, seen, strict=True):
                    room[:, :, :kept] = x[:, :, end - start - kept:]
                self.shared = max(0, self.shared - (end - kept))
            self.read, self.end = self.read + key_states.shape[-2], kept
            return seen

        def reorder_cache(self, rows):
            """Row i becomes what row rows[i] was; there may be more or fewer rows than before."""
            part = slice(self.shared, self.end)
            for i, room in enumerate(self.room):
                moved = room[:, :, part].index_select(0, rows)
                if len(rows) > len(room):
                    room = room.new_empty(len(rows), *room.shape[1:])
                self.room[i] = room[:len(rows)]
                self.room[i][:, :, part] = moved

    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(layer) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
                    else layer for layer in cache.layers]
    return cache


def takes(model, name):
    """Whether a model's forward function has an argument of this name."""
    return name in inspect.signature(model.forward).parameters


def padded(prompts, device):
    """(token ids, mask) of prompts, padded on the left: (B, longest), int64."""
    import torch
    width = max(map(len, prompts))
    ids = [[0] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def positions(mask):
    """Position ids of left-padded rows, from their mask: (B, T), int64."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def decode(model, prompts, eos, max_new_tokens, temperature=0.0, uniforms=None):
    """Greedy or sampled continuations of a batch of prompts, without EOS.

    prompts: B lists of token ids, left-padded here; eos: list of the ids that end an answer.
    uniforms: (B, max_new_tokens) fp32, the noise of each row; None is greedy.
    Returns (completions, truncated): B lists of token ids; whether each was cut off.
    Equal prompts are read once. Finished rows leave the batch once they are a quarter of it.
    Runs at most max_new_tokens forward passes. FloatingPointError: the logits are not finite.
    """
    import torch
    device, width = model.device, max(map(len, prompts))
    row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    input_ids, mask = padded(row_of, device)
    alive = torch.arange(len(prompts), device=device)       # output row of each row of the batch
    tokens = torch.full((len(prompts), max_new_tokens), eos[0], device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    ends, cache = torch.tensor(eos, device=device), roomy_cache(model, width + max_new_tokens)
    # Mamba's kind: its cache has another name, and steps after the prompt take no mask
    stateful = takes(model, "cache_params")
    settings = {"cache_params" if stateful else "past_key_values": cache,
                "use_cache": True, "logits_to_keep": 1}
    with torch.inference_mode():
        logits = model(input_ids=input_ids, attention_mask=mask, position_ids=positions(mask),
                       **settings).logits
        if not logits.isfinite().all():
            raise FloatingPointError("the model's logits are not finite: its weights are broken")
        rows = torch.tensor([row_of[tuple(prompt)] for prompt in prompts], device=device)
        logits, mask = logits[rows, -1], mask[rows]
        if len(row_of) < len(prompts):
            cache.reorder_cache(rows)       # which, unlike batch_select_indices, knows states
        for step in range(max_new_tokens):
            noise = None if uniforms is None else uniforms[alive, step]
            # ABLATION: the sampling rule
            chosen = choose_tokens(logits, temperature, noise)
            tokens[alive[~finished], step] = chosen[~finished]
            finished = finished | (chosen[:, None] == ends).any(1)
            if finished.all() or step + 1 == max_new_tokens:
                break
            if finished.float().mean() >= 0.25:
                keep = (~finished).nonzero()[:, 0]
                cache.reorder_cache(keep)
                alive, chosen = alive[keep], chosen[keep]
                mask, finished = mask[keep], finished[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = model(input_ids=chosen[:, None], attention_mask=None if stateful else mask,
                           position_ids=mask.sum(1, keepdim=True) - 1, **settings).logits[:, -1]
    return strip_eos(tokens.tolist(), eos)


def decode_beams(model, prompts, eos, max_new_tokens, num_beams):
    """Beam search by transformers, as in the paper's release. Arguments and result as `decode`.

    What the model's folder says of sampling, penalties and lengths is ignored, as in `decode`. A
    prompt is read once, and not copied when beams are exchanged; the last token of it is read by
    each beam, because `generate` must read one.
    """
    import torch
    from transformers import GenerationConfig
    (input_ids, mask), settings = padded(prompts, model.device), {}
    width = input_ids.shape[1]
    cache = roomy_cache(model, width + max_new_tokens)
    model.generation_config = GenerationConfig(
        num_beams=num_beams, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos,
        pad_token_id=0)
    with torch.inference_mode():
        # models with other caches or states make their own
        if (width > 1 and takes(model, "past_key_values")
                and all(hasattr(layer, "room") for layer in cache.layers)):
            settings = {"past_key_values": cache}
            before = mask[:, :-1]
            model(input_ids=input_ids[:, :-1], attention_mask=before, logits_to_keep=1,
                  position_ids=positions(before), use_cache=True, **settings)
            rows = torch.arange(len(prompts), device=model.device)
            cache.reorder_cache(rows.repeat_interleave(num_beams))
            for layer in cache.layers:
                layer.shared = layer.end
        out = model.generate(input_ids=input_ids, attention_mask=mask, **settings)
    rows = out[:, width:].tolist()
    return strip_eos([row + [eos[0]] * (max_new_tokens - len(row)) for row in rows], eos)


def strip_eos(rows, eos):
    """(token ids before the first of the EOS ids of each row, whether a row has none)"""
    ends = [next((i for i, token in enumerate(row) if token in eos), len(row)) for row in rows]
    return ([row[:end] for row, end in zip(rows, ends, strict=True)],
            [end == len(row) for row, end in zip(rows, ends, strict=True)])


def check_decoding(model, prompt, num_beams=1):
    """InputError, which says what differs, for a model that decodes otherwise than it reads.

    Two short prompts, one padded and there twice, are decoded as answers will be, and read whole,
    alone and without a cache. If all is right the logits differ by rounding: in 72 families and
    SmolLM2-135M by up to 4e-6 of their spread in fp32, 0.02 in bf16; if a model sees padding or has
    a state of its own, by 0.07 to 1.4. A median of steps: rounding may change one token's expert.
    """
    import torch
    ids, seen = (prompt * 16)[:16], []
    batch = [ids, ids[:3], ids[:3]]
    hook = model.register_forward_hook(lambda model, args, out: seen.append(out.logits.float()))
    try:
        completions, _ = (decode_beams(model, batch, [-1], 4, num_beams) if num_beams > 1 else
                          decode(model, batch, [-1], 4))
        steps, seen[:] = seen[1:], []
        with torch.inference_mode():
            for ids, completion in zip(batch, completions, strict=True):
                model(input_ids=torch.tensor([ids + completion[:-1]], device=model.device),
                      use_cache=False)
        whole = torch.stack([logits[0, -len(steps):] for logits in seen])   # (3, steps, V)
        spread = (whole - whole.mean(-1, keepdim=True)).norm(dim=-1)
        decoded = torch.stack([logits[:, -1] for logits in steps], 1)
        decoded = decoded.view(3, num_beams, *whole.shape[1:])
        # one of the beams of each step led to the answer
        error = (decoded - whole[:, None]).norm(dim=-1).amin(1) / spread
        error = error.median(1).values.max().item()
        wrong = error > (0.1 if model.dtype.itemsize == 2 else 0.01)
        differs = f"its logits are then off by {error:.0%}" if wrong else ""
    except Exception as e:      # whatever a model of another kind does with these arguments
        if isinstance(e, ArithmeticError) or lacks_memory(e):
            raise
        differs = f"{type(e).__name__}: {e}".splitlines()[0]
    finally:
        hook.remove()
    if differs:
        raise InputError(f"{model.name_or_path}: a {type(model).__name__} does not decode padded "
                         f"prompts with a cache as it reads each alone ({differs})")
