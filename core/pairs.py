"""Preference pairs: as token sequences, in micro-batches, and as log-probabilities."""
from collections import namedtuple

from core.distributed import summed
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
    """[[chosen, rejected]] sequences (token ids, weights) of the pairs that fit --max-length and
    whose two sides differ."""
    fit, pairs = 0, []
    for r in records:
        prompt = encode_prompt(tokenizer, r["prompt"], getattr(r, "place", "a record"))
        sides = [encode_completion(tokenizer, r[k]) for k in ("chosen", "rejected")]
        if len(prompt) + max(map(len, sides)) > args.max_length:
            continue
        fit += 1
        # the first token of a sequence is never a target
        if sides[0] != sides[1] and len(prompt) + min(map(len, sides)) > 1:
            pairs.append([(prompt + side, [0.0] * len(prompt) + [1.0] * len(side))
                          for side in sides])
    if fit < len(records):
        print(f"{len(records) - fit} of {len(records)} pairs are longer than --max-length "
              f"{args.max_length} and left out")
    if len(pairs) < fit:
        print(f"{fit - len(pairs)} of {fit} pairs have the same text on both sides, or none on one "
              "and no prompt, and are left out")
    if not fit:
        raise InputError(f"{args.data}: no pair fits --max-length {args.max_length}")
    if not pairs:
        raise InputError(f"{args.data}: chosen and rejected are the same in every pair: there is "
                         "no preference to learn")
    return pairs


def sequence_logps(model, batch, count):
    """(count,) fp32: the summed log-probability of each sequence's completion; 0 for those that are
    not in this batch."""
    import torch
    logps, _, owner = completion_logps(model, batch)
    return torch.zeros(count, device=logps.device).index_add(0, owner, logps)


def pair_batches(pairs, args, device, model):
    """Pack pairs (chosen sequence, rejected sequence), as `pack` does; none is divided.

    Yields (indices into pairs, micro-batch), whose sequences are chosen 0, rejected 0, chosen 1,
    and so on. The processes of a sharded model share the pairs.
    """
    sequences = [side for pair in pairs for side in pair]
    for batch in pack(sequences, args.micro_tokens, device, model, 2):
        yield sorted({i // 2 for i in batch["members"]}), batch


def reference_logps(model, pairs, args, device, path):
    """(N, 2) fp32 log-probabilities of chosen and rejected, appended to `path` block by block."""
    import torch
    from tqdm import tqdm
    size = 64
    blocks = [pairs[k:k + size] for k in range(0, len(pairs), size)]
    log = BatchLog(path, [1] * len(blocks))
    bar = tqdm(total=len(log.results) or len(blocks), desc="reference", unit="batch",
               mininterval=1, leave=False)

    model.eval()
    with torch.no_grad():
        for block in blocks[log.batches_done:]:
            found = sum(sequence_logps(model, batch, 2 * len(block))
                        for _, batch in pair_batches(block, args, device, model))
            log.append([summed(found, model).reshape(-1, 2).tolist()])
            bar.update()
    bar.close()
    model.train()
    return torch.tensor([pair for block in log.results for pair in block])
