"""Attention by sequences, common beginnings, products by oneDNN, log-probabilities in place."""
import copy

import pytest
import torch
from conftest import tiny_model
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM

from core.attention import attend, join, separate, varlen
from core.linear import onednn_linear, use_onednn
from core.packing import (
    MULTIPLE,
    beginning,
    completion_logps,
    hidden_states,
    pack,
    target_logps,
)

WINDOWS = dict(sliding_window=8, head_dim=8, vocab_size=64, hidden_size=32, intermediate_size=48,
               num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)


def windowed(family):
    """A model with windows shorter than a sequence, where it has them: in some or all layers."""
    torch.manual_seed(1)
    more = {"gemma3_text": {"sliding_window_pattern": 2}, "mistral": {}}[family]
    config = AutoConfig.for_model(family, **WINDOWS, **more)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


MODELS = {**{family: lambda family=family: tiny_model(family)
             for family in ("llama", "gemma", "qwen3")},
          **{family: lambda family=family: windowed(family)
             for family in ("mistral", "gemma3_text")}}


def random_pairs(count=5, seed=0):
    """Sequences, two by two with a common prompt of weight 0; the first pair has none."""
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        return torch.randint(3, 24, (int(torch.randint(low, high, (), generator=g)),),
                             generator=g).tolist()
    sequences = []
    for k in range(count):
        prompt = ids(3, 20) if k else [1]
        for _ in range(2):
            answer = ids(1, 25)
            sequences.append((prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)))
    return sequences


def loss_and_gradients(model, batches):
    model.zero_grad()
    total = 0.0
    for batch in batches:
        logps, weights, owner = completion_logps(model, batch)
        # another factor for every sequence, as in a preference loss
        loss = (logps * weights * (1 + owner).to(logps.dtype).sin()).sum()
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters()}


def relative_gap(found, expected):
    scale = max(g.abs().max() for g in expected.values())
    return max((found[n] - expected[n]).abs().max() for n in expected) / scale


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_one_row_of_pairs_is_every_sequence_alone(family, checkpointing):
    model, sequences = MODELS[family]().train(), random_pairs()
    alone = [next(pack([s], 1, "cpu", model)) for s in sequences]
    for k, batch in enumerate(alone):
        batch["owner"] += k
    expected, gradients = loss_and_gradients(model, alone)
    exact = copy.deepcopy(model).double()
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert separate(model)
    for group, micro_tokens in ((1, 1000), (2, 1000), (2, 60)):
        batches = list(pack(sequences, micro_tokens, "cpu", model, group))
        assert len(batches) == 1 if micro_tokens == 1000 else len(batches) > 2
        found, ours = loss_and_gradients(model, batches)
        # fp32, of about 200 tokens, relative to their size
        assert found == pytest.approx(expected, rel=1e-6)
        assert relative_gap(ours, gradients) < 3e-6
    # that this is rounding and nothing else: in float64 they are equal to 1e-12
    logps, _ = completion_logps_of(exact, sequences, False)
    assert separate(exact)
    assert (completion_logps_of(exact, sequences, True)[0] - logps).abs().max() < 1e-12
    join(model)
    assert model.config._attn_implementation == "sdpa"


def completion_logps_of(model, sequences, together):
    """Hidden states in float64 of all targets, in the order of the sequences, and their number."""
    found = {}
    with torch.no_grad():
        batches = (pack(sequences, 1000, "cpu", model, 2) if together else
                   ({**next(pack([s], 1, "cpu", model)), "number": i}
                    for i, s in enumerate(sequences)))
        for batch in batches:
            hidden = hidden_states(model, batch)
            owner = batch["owner"] if together else torch.full_like(batch["owner"],
                                                                    batch["number"])
            for i in set(owner[batch["weights"] > 0].tolist()):
                found[i] = hidden[(owner == i) & (batch["weights"] > 0)]
    return torch.cat([found[i] for i in sorted(found)]), len(found)


def test_a_beginning_holds_no_target():
    def s(ids, first_target):
        return list(ids), [0.0] * first_target + [1.0] * (len(ids) - first_target)
    # the last token before a target stays with each sequence, because it predicts that target
    assert beginning([s("abcdXY", 4), s("abcdZ", 4)]) == 3
    assert beginning([s("abcdXY", 4), s("abXdZ", 4)]) == 2
    assert beginning([s("abcdXY", 4), s("abcdZ", 2)]) == 1
    assert beginning([s("abcd", 4), s("abcd", 4)]) == 3      # each keeps a last token of its own
    assert beginning([s("abcd", 0), s("abcd", 0)]) == 0
    assert beginning([s("abcd", 1), s("Xbcd", 1)]) == beginning([s("abcd", 4)]) == 0


def test_a_row_holds_every_token_once():
    sequences, model = random_pairs(12, seed=2), tiny_model()
    assert separate(model)
    batches = list(pack(sequences, 90, "cpu", model, 2))
    assert sorted(i for b in batches for i in b["members"]) == list(range(24))
    for b in batches:
        ids, positions, owner, weights = (b[k][0].tolist() for k in (
            "input_ids", "position_ids", "owner", "weights"))
        assert b["input_ids"].shape[0] == 1 and len(ids) % MULTIPLE == 0
        assert len(ids) - owner.count(-1) <= 90 or len(b["members"]) == 2
        padding = owner.count(-1)
        assert padding < MULTIPLE and owner[len(owner) - padding:] == [-1] * padding
        assert sum(map(sum, b["units"])) == len(ids)
        for i in b["members"]:
            own = [t for t, o in enumerate(owner) if o == i]
            start = positions[own[0]]
            assert i % 2 or start == 0
            first = [t for t, o in enumerate(owner) if o == i - i % 2][:start]
            assert [ids[t] for t in first + own] == sequences[i][0]
            assert [positions[t] for t in first + own] == list(range(len(sequences[i][0])))
            assert [weights[t] for t in own] == [*sequences[i][1][start + 1:], 0.0]


@pytest.mark.parametrize("window", [None, 6])
def test_what_a_card_computes(window, monkeypatch):
    """`varlen` with a plain loop in the place of torch's kernel, which needs a card."""
    def plain(q, k, v, q_ends, k_ends, q_most, k_most, scale, window_size, enable_gqa):
        left, right = window_size
        found = []
        for a, b, c, d in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
            assert b - a <= q_most and d - c <= k_most and q_ends.dtype == torch.int32
            keys, values = (x[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            last = (d - c) - (b - a) + torch.arange(b - a)[:, None]     # at the end of the keys
            there = torch.arange(d - c)
            seen = (there <= last + right) & ((left < 0) | (there >= last - left))
            scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            found.append(torch.einsum("hqk,khd->qhd", weights, values))
        return torch.cat(found)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain)
    units = ((0, 5), (7, 4, 9), (3, 1, 2, 6), (0, 11))
    n = sum(map(sum, units))
    q, k, v = (torch.randn(1, heads, n, 8, dtype=torch.float64) for heads in (4, 2, 2))
    expected, _ = attend(None, q, k, v, None, units=units, scaling=0.3, sliding_window=window)
    assert (varlen(q, k, v, units, 0.3, window) - expected).abs().max() < 1e-12


def test_what_attention_cannot_do_is_said():
    q = torch.randn(1, 2, 5, 4)
    for more in ({}, {"units": [(0, 5)], "softcap": 2.0}, {"units": [(0, 5)], "position_bias": q}):
        with pytest.raises(ValueError, match="only rows of units"):
            attend(None, q, q, q, None, **more)


def test_log_probabilities_in_place():
    torch.manual_seed(0)
    values, targets = 5 * torch.randn(7, 11, dtype=torch.float64), torch.randint(11, (7,))
    factors = torch.randn(7, dtype=torch.float64)

    def ours(x):
        return (target_logps(x.clone(), targets) * factors).sum()
    x, y = values.clone().requires_grad_(), values.clone().requires_grad_()
    found = ours(x)
    expected = (y.log_softmax(1)[range(7), targets] * factors).sum()
    for loss in (found, expected):
        loss.backward()
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    assert (x.grad - y.grad).abs().max() < 1e-12
    # finite differences: gradcheck would go backward twice over what is overwritten
    eps = 1e-6
    for r, c in ((0, 3), (4, int(targets[4])), (6, 10)):
        more, less = values.clone(), values.clone()
        more[r, c] += eps
        less[r, c] -= eps
        slope = (ours(more) - ours(less)).item() / (2 * eps)
        assert slope == pytest.approx(x.grad[r, c].item(), abs=1e-8)
    # far from the most probable token, and over what else would use the logits
    far = target_logps(torch.tensor([[0.0, -300.0]]), torch.tensor([1]))
    assert far.item() == -300
    again = target_logps(y * 2, targets)
    again.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        again.sum().backward()
    tanh = (y * 1).tanh()       # keeps its output for its own gradient
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        target_logps(tanh, targets).sum().backward()


@pytest.mark.parametrize("shape", [(5, 16), (2, 7, 16), (1, 40, 16), (1, 1, 16)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers_by_onednn(shape, bias):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24, bias=bias))
    use_onednn(model)
    layer = model[0]
    assert type(layer) is onednn_linear() and copy.deepcopy(layer).weight is not layer.weight
    x, factors = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 24)
    (layer(x) * factors).sum().backward()
    y = x.detach().double().requires_grad_()
    exact = copy.deepcopy(layer).double()
    exact.zero_grad()
    (exact(y) * factors).sum().backward()
    assert layer(x).dtype == torch.float32 and exact(y).dtype == torch.float64
    # fp32 sums of 16 to 40 products of size 1
    assert (layer(x) - exact(y)).abs().max() < 1e-5 and (x.grad - y.grad).abs().max() < 1e-5
    for p, q in zip(layer.parameters(), exact.parameters(), strict=True):
        assert p.grad.shape == p.shape and (p.grad - q.grad).abs().max() < 1e-5
    layer.weight.requires_grad_(False)      # as under adapters
    layer.weight.grad = None
    layer(x).sum().backward()
    assert layer.weight.grad is None
    with torch.no_grad():
        assert torch.equal(layer(x[..., :0, :]), linear(x[..., :0, :], layer.weight, layer.bias))
        wide = copy.deepcopy(layer).to(torch.bfloat16)
        assert torch.equal(wide(x.bfloat16()), linear(x.bfloat16(), wide.weight, wide.bias))
