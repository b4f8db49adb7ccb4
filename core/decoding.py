"""Decoding: a model and a batch of prompts -> token ids, greedy, sampled or by beam search."""
import hashlib

from core.records import dumps


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
    """A DynamicCache whose full-attention layers have memory for `tokens` tokens from the start.

    The cache of transformers is copied at every token, a third of the time of a small model.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class RoomyLayer(DynamicLayer):
        room = None

        def update(self, key_states, value_states, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            start, new = self.get_seq_length(), (key_states, value_states)
            end = start + key_states.shape[-2]
            if self.room is None:       # the first tokens, or other rows than before
                self.room = [x.new_empty(*x.shape[:2], tokens, x.shape[-1]) for x in new]
                if start:
                    self.room[0][:, :, :start] = self.keys
                    self.room[1][:, :, :start] = self.values
            for room, x in zip(self.room, new, strict=True):
                room[:, :, start:end] = x
            self.keys, self.values = (room[:, :, :end] for room in self.room)
            return self.keys, self.values

        def batch_select_indices(self, indices):
            super().batch_select_indices(indices)
            self.room = None

    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer
                    for layer in cache.layers]
    return cache


def decode(model, prompts, eos, max_new_tokens, temperature=0.0, uniforms=None):
    """Greedy or sampled continuations of a batch of prompts, without EOS.

    prompts: B lists of token ids, left-padded here.
    uniforms: (B, max_new_tokens) fp32, the noise of each row; None is greedy.
    Returns (completions, truncated): B lists of token ids; whether each was cut off.
    Equal prompts are read once. Finished rows leave the batch once they are a quarter of it.
    Runs at most max_new_tokens forward passes. Raises FloatingPointError for logits that are
    not finite.
    """
    import torch
    device, width = model.device, max(map(len, prompts))
    row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    input_ids = torch.zeros(len(row_of), width, dtype=torch.long)
    mask = torch.zeros(len(row_of), width, dtype=torch.long)
    for prompt, row in row_of.items():
        input_ids[row, width - len(prompt):] = torch.tensor(prompt)
        mask[row, width - len(prompt):] = 1
    input_ids, mask = input_ids.to(device), mask.to(device)
    alive = torch.arange(len(prompts), device=device)       # output row of each row of the batch
    tokens = torch.full((len(prompts), max_new_tokens), eos, device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    with torch.inference_mode():
        out = model(input_ids=input_ids, attention_mask=mask,
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                    past_key_values=roomy_cache(model, width + max_new_tokens),
                    use_cache=True, logits_to_keep=1)
        if not out.logits.isfinite().all():
            raise FloatingPointError("the model's logits are not finite: its weights are broken")
        rows = torch.tensor([row_of[tuple(prompt)] for prompt in prompts], device=device)
        logits, mask, cache = out.logits[rows, -1], mask[rows], out.past_key_values
        if len(row_of) < len(prompts):
            cache.batch_select_indices(rows)
        for step in range(max_new_tokens):
            noise = None if uniforms is None else uniforms[alive, step]
            # ABLATION: the sampling rule
            chosen = choose_tokens(logits, temperature, noise)
            tokens[alive[~finished], step] = chosen[~finished]
            finished = finished | (chosen == eos)
            if finished.all() or step + 1 == max_new_tokens:
                break
            if finished.float().mean() >= 0.25:
                keep = (~finished).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                alive, chosen = alive[keep], chosen[keep]
                mask, finished = mask[keep], finished[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = model(input_ids=chosen[:, None], attention_mask=mask,
                           position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=cache,
                           use_cache=True, logits_to_keep=1).logits[:, -1]
    return strip_eos(tokens.tolist(), eos)


def decode_beams(model, prompts, eos, max_new_tokens, num_beams):
    """Beam search by transformers, as in the paper's release. Arguments and result as `decode`.

    What the model's folder says of sampling, penalties and lengths is ignored, as in `decode`.
    """
    import torch
    from transformers import GenerationConfig
    width = max(map(len, prompts))
    input_ids = [[eos] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    model.generation_config = GenerationConfig(
        num_beams=num_beams, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos,
        pad_token_id=eos)
    with torch.inference_mode():
        out = model.generate(input_ids=torch.tensor(input_ids, device=model.device),
                             attention_mask=torch.tensor(mask, device=model.device))
    rows = out[:, width:].tolist()
    return strip_eos([row + [eos] * (max_new_tokens - len(row)) for row in rows], eos)


def strip_eos(rows, eos):
    """(token ids before the first EOS of each row, whether a row has no EOS)"""
    ends = [row.index(eos) if eos in row else len(row) for row in rows]
    completions = [row[:end] for row, end in zip(rows, ends, strict=True)]
    return completions, [end == len(row) for row, end in zip(rows, ends, strict=True)]
