"""The simulated card counts operations as they are, and what was simulated before comes out."""
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import simulated_card as card  # noqa: E402

MATRIX, ATTENTION, OTHER = card.KINDS


@pytest.fixture(scope="module")
def mistral():
    return card.Model(card.Made(card.BASE, 0), False, None, False).model


def spent(work, *shapes, **known):
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    with card.simulated(**known) as simulation:
        work(*tensors)
    return simulation.spent


def test_an_operation_takes_the_longer_of_its_two_times():
    found = spent(torch.mm, (512, 4096), (4096, 8192))
    assert found[MATRIX] == pytest.approx(1e3 * 2 * 512 * 4096 * 8192 / card.CARD.matrix)
    found = spent(torch.mm, (1, 4096), (4096, 8192))
    assert found[MATRIX] == pytest.approx(1e3 * 2 * (4096 + 4096 * 8192 + 8192) / card.CARD.memory)
    found = spent(lambda x, y: x + y.t(), (256, 512), (512, 256))       # .t() launches nothing
    assert found == {OTHER: pytest.approx(1e3 * 3 * 2 * 256 * 512 / card.CARD.memory), "kernels": 1}
    found = spent(lambda x: x[:, :128].copy_(x[:, 128:256]), (256, 512))
    assert found[OTHER] == pytest.approx(1e3 * 2 * 2 * 256 * 128 / card.CARD.memory)


def test_attention_counts_what_its_kernel_compares():
    """A mask spares nothing, a causal kernel a half, one over sequences all pairs of two others."""
    sdpa, heads, size = torch.nn.functional.scaled_dot_product_attention, 32, 128

    def attend(q, k, v):
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def masked(q, k, v):
        mask = torch.empty(1, 1, 2048, 2048, dtype=torch.bool, device="meta")
        torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    shapes = [(1, heads, 2048, size)] * 3
    whole = 1e3 * 4 * heads * size * 2048 ** 2 / card.CARD.attention
    assert spent(masked, *shapes)[ATTENTION] == pytest.approx(whole)
    assert spent(attend, *shapes)[ATTENTION] == pytest.approx(whole / 2)
    assert torch.nn.functional.scaled_dot_product_attention is sdpa

    # a beginning of 3 with rests of 2 and 4, and a sequence of 5: the keys of every query
    seen = [1, 2, 3, 4, 5, 4, 5, 6, 7, 1, 2, 3, 4, 5]
    assert card.compared([(3, 2, 4), (0, 5)]) == sum(n - 0.5 for n in seen)


def test_what_was_simulated_before_comes_out(mistral):
    """An earlier simulation was another program; 3%: it counts other small operations."""
    half = [([1] * 2048, [0.0] * 1024 + [1.0] * 1024)] * 2
    found = card.train(mistral, half, 1, "before")
    token = card.decode(mistral, 256, 1, "before", 2)
    assert card.total(token) == pytest.approx(23.5, rel=0.03)
    assert token["kernels"] == pytest.approx(1477, rel=0.03)
    mistral.gradient_checkpointing_enable()
    again = card.train(mistral, half, 1, "before")
    mistral.gradient_checkpointing_disable()
    assert [again[MATRIX], again[ATTENTION]] == pytest.approx([331, 49], rel=0.02)
    assert card.total(again) == pytest.approx(518, rel=0.03)
    assert card.total(found) < card.total(again)


def test_after_is_less(mistral):
    """Two pairs whose prompts are half of their tokens: a quarter less to read, no mask."""
    pair = [([1] * 400, [0.0] * 200 + [1.0] * 200)] * 2
    before, after = (card.train(mistral, pair * 2, 2, way) for way in ("before", "after"))
    # the last token of a prompt predicts, so each has its own
    assert (before["tokens"], after["tokens"]) == (1600, 1216)     # 1,202, filled up by 32
    assert after[ATTENTION] < before[ATTENTION] / 4 and after[MATRIX] < 0.8 * before[MATRIX]
    assert after["kernels"] < 1.1 * before["kernels"]
    assert card.decode(mistral, 4, 2, "after", 3)[OTHER] < card.decode(
        mistral, 4, 2, "before", 3)[OTHER]
