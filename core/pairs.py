"""Preference pairs: as token sequences, packed together, and as log-probabilities."""
import math
from collections import namedtuple

from core.distributed import deal, most, own_share
from core.packing import completion_logps, pack
from core.records import InputError
from core.tokens import encode_completion, encode_prompt
from core.unfinished import BatchLog


class Pairs(namedtuple("Pairs", "policy_chosen policy_rejected reference_chosen reference_rejected "
                       "chosen_tokens rejected_tokens")):
    """What a loss is computed from: fp32 (B,) tensors.

    policy_*, reference_*: log-probabilities of whole completions in nats, summed over tokens, EOS
    included; the reference's are 0 for a loss that needs none. *_tokens: the numbers of tokens.
    """
    def ratios(self):
        """Log ratios of policy to reference, (chosen, rejected)."""
        return (self.policy_chosen - self.reference_chosen,
                self.policy_rejected - self.reference_rejected)

    def h(self, beta):
        """beta * (log ratio of chosen - log ratio of rejected), the difference of rewards."""
        chosen, rejected = self.ratios()
        return beta * (chosen - rejected)


def encode_pairs(args, tokenizer, records):
    """[[chosen, rejected]] sequences (token ids, weights) of the pairs that fit --max-length."""
    pairs = []
    for r in records:
        prompt = encode_prompt(tokenizer, r["prompt"])
        sides = [encode_completion(tokenizer, r[k]) for k in ("chosen", "rejected")]
        if len(prompt) + max(map(len, sides)) <= args.max_length:
            pairs.append([(prompt + side, [0.0] * len(prompt) + [1.0] * len(side))
                          for side in sides])
    if len(pairs) < len(records):
        print(f"{len(records) - len(pairs)} of {len(records)} pairs are longer than --max-length "
              f"{args.max_length} and left out")
    if not pairs:
        raise InputError(f"{args.data}: no pair fits --max-length {args.max_length}")
    return pairs


def sequence_logps(model, batch, count):
    """(count,) fp32: the summed log-probability of the completion of each packed sequence; 0 for
    those that are not in this batch."""
    import torch
    logps, _, owner = completion_logps(model, batch)
    return torch.zeros(count, device=logps.device).index_add(0, owner, logps)


def pair_batches(pairs, args, device, model=None, dealt_out=False):
    """Pack pairs (chosen sequence, rejected sequence), longest first; none is divided.

    Yields (indices into pairs, micro-batch), whose sequences are chosen 0..n-1, then rejected
    n..2n-1. The processes of a sharded model get equally many micro-batches, some of padding:
    of their own pairs, or with dealt_out of a share of common ones.
    """
    tokens_of = [len(chosen[0]) + len(rejected[0]) for chosen, rejected in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -tokens_of[i])
    order, groups = own_share(order, model if dealt_out else None), []
    while order:
        end, tokens = 1, tokens_of[order[0]]
        while end < len(order) and tokens + tokens_of[order[end]] <= args.micro_tokens:
            tokens += tokens_of[order[end]]
            end += 1
        groups.append(order[:end])
        order = order[end:]
    for indices in groups + [[]] * (most(len(groups), model) - len(groups)):
        sequences = [pairs[i][side] for side in (0, 1) for i in indices]
        # one forward pass, even if the padding of short rows exceeds --micro-tokens
        row_tokens = min(args.row_tokens, args.micro_tokens)
        batch, = pack(sequences, row_tokens, math.inf, device)
        yield indices, batch


def reference_logps(model, pairs, args, device, path):
    """(N, 2) fp32 log-probabilities of chosen and rejected, appended to `path` block by block."""
    import torch
    from tqdm import tqdm
    size = 64
    blocks = [pairs[k:k + size] for k in range(0, len(pairs), size)]
    log = BatchLog(path, [1] * len(blocks))
    bar = tqdm(total=len(log.results) or len(blocks), desc="reference", unit="batch",
               mininterval=1, leave=False)

    def logps_of(block):
        found = {}
        for indices, batch in pair_batches(block, args, device, model):
            logps = sequence_logps(model, batch, 2 * len(indices)).tolist()
            both = zip(logps[:len(indices)], logps[len(indices):], strict=True)
            found.update(zip(indices, both, strict=True))
        return [found[i] for i in range(len(block))]
    model.eval()
    with torch.no_grad():
        for found in deal(blocks[log.batches_done:], logps_of, idle=[]):
            log.append([found])
            bar.update()
    bar.close()
    model.train()
    return torch.tensor([pair for block in log.results for pair in block])
