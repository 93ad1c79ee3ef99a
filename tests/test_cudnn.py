"""cuDNN's attention in prefill (``kernels/cudnn.py``) on a GPU that is not there: when it is asked, whether it is believed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import card as stand_in
import pytest
import torch
from card import card
from cases import plain_attention
from tiny import random_ids, steps, tiny_cache, tiny_engine, tiny_folder
from torch import Tensor

from skvq.kernels import cudnn
from skvq.kernels.cudnn import blocks, cudnn_on
from skvq.kernels.dense import attend_all, attend_causal, kv_buffer

pytestmark = pytest.mark.usefixtures("one_thread")
OP = "_scaled_dot_product_cudnn_attention"
COUNT, HEADS, KV_HEADS, SIZE = 128, 6, 2, 16
FULL = 2**31 - 1


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "BLOCK_TOKENS", 64)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Queries of a kv head and keys of every call of cuDNN."""
    calls: list[tuple[int, int]] = []
    answer_with(monkeypatch, lambda q, k, found: calls.append((q.shape[2], k.shape[2])) or found)
    return calls


def answer_with(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor, Any], Any]) -> None:
    """cuDNN gives what ``change(q, k, its results)`` makes of its results."""
    sound = stand_in._cudnn
    monkeypatch.setitem(stand_in.ATTENTION, OP, lambda q, k, v, *rest: change(q, k, sound(q, k, v, *rest)))


def inputs(tokens: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the card, as prefill has them; scores are spread, so that rows of the output are long."""
    made = torch.Generator().manual_seed(seed)
    q = (3 * torch.randn(COUNT, HEADS, SIZE, generator=made)).to("cuda", dtype)
    k, v = (kv_buffer(KV_HEADS, tokens, SIZE, dtype, q.device) for _ in range(2))
    for t in (k, v):
        t.copy_(torch.randn(KV_HEADS, tokens, SIZE, generator=made).to("cuda", dtype))
    return q, k, v


def check(found: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> None:
    host = [stand_in.plain(t) for t in (q, k, v)]
    wanted, lse = plain_attention(*host, visible)
    eps = torch.finfo(q.dtype).eps
    assert (stand_in.plain(found[0]) - wanted).abs().max() <= eps * wanted.abs().max()
    assert (stand_in.plain(found[1]) - lse).abs().max() <= 1e-5


def causal(tokens: int) -> Tensor:
    return torch.arange(tokens)[None] <= torch.arange(tokens - COUNT, tokens)[:, None]


def test_blocks_are_few_lengths() -> None:
    assert blocks(63) == [(0, 63)] and blocks(64) == [(0, 64)] and blocks(0) == []
    assert blocks(429) == [(0, 256), (256, 384), (384, 429)]
    for tokens in range(1, 2000, 7):
        runs = blocks(tokens)
        assert [a for a, _ in runs] == [0, *(b for _, b in runs[:-1])] and runs[-1][1] == tokens
    lengths = {b - a for tokens in range(1, 2**14, 31) for a, b in blocks(tokens) if b - a >= 64}
    assert len(lengths) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hopper_asks_cudnn_for_the_blocks_before_a_chunk(
    dtype: torch.dtype, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flash: list[int] = []
    sound = stand_in._flash
    op = "_scaled_dot_product_flash_attention"
    monkeypatch.setitem(stand_in.ATTENTION, op, lambda q, *rest, **how: (flash.append(q.shape[2]), sound(q, *rest, **how))[1])
    with card((9, 0)):
        for seed in (1, 2):  # compared with flash attention, then believed
            q, k, v = inputs(429 + COUNT, dtype, seed)
            check(attend_causal(q, k, v, FULL), q, k, v, causal(429 + COUNT))
            q, k, v = inputs(128, dtype, seed)
            check(attend_all(q, k, v), q, k, v, torch.ones(COUNT, 128, dtype=torch.bool))
        assert cudnn_on(q.device).trusted
    square, rest, compared = [COUNT], [3 * COUNT], [3 * COUNT] * 2
    assert flash == square + compared + rest + square + rest
    assert asked == 2 * [(3 * COUNT, 256), (3 * COUNT, 128), (3 * COUNT, 128)] and not capsys.readouterr().err


def test_others_do_not(asked: list[tuple[int, int]]) -> None:
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        with card(capability):
            q, k, v = inputs(300)
            check(attend_causal(q, k, v, FULL), q, k, v, causal(300))
    with card((9, 0)):
        attend_causal(*inputs(300), 200)  # a window
        attend_all(*inputs(300, torch.float32))
        q, k, v = inputs(300)
        attend_all(q[:96], k, v)  # a chunk that few others are like
        attend_all(q, k[:, :63], v[:, :63])
    attend_all(*(torch.randn(s).bfloat16() for s in ((COUNT, 2, 16), (2, 300, 16), (2, 300, 16))))
    assert not asked


@pytest.mark.parametrize("size", [12, 64, 260])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_flash_attention_of_heads_of_any_size(size: int, dtype: torch.dtype) -> None:
    """Torch's kernels want multiples of 8, flash attention at most 256."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, size, generator=gen).to(dtype) for _ in range(3))
    with card((8, 0)):
        out, lse = cudnn.flash_attention(*(t.to("cuda") for t in (q, k, v)), causal=True)
        out, lse = out.cpu(), lse.cpu()
    score = (q.float() @ k.float().mT / size**0.5).masked_fill(~causal(5)[-5:], -torch.inf)
    assert out.shape == q.shape and out.dtype == dtype
    assert torch.allclose(out.float(), score.softmax(-1) @ v.float(), atol=2e-3)
    assert torch.allclose(lse, score.logsumexp(-1), atol=2e-3)


def test_strides_past_32_bits_stay_with_flash_attention() -> None:
    hopper = cudnn.CudnnAttention((9, 0))
    far = torch.empty((3, 2**30, 1), dtype=torch.bfloat16, device="meta")
    assert hopper.takes_block(far[:1, :64]) and not hopper.takes_block(far[:, :64])


def test_head_sizes_past_what_cudnn_takes() -> None:
    hopper = cudnn.CudnnAttention((9, 0))
    taken = [hopper.takes(torch.empty(2, COUNT, size, dtype=torch.float16), COUNT) for size in (20, 64, 96, 128, 136, 256)]
    assert taken == [False, True, True, True, False, False]


@pytest.mark.parametrize("kernel", [cudnn.cudnn_attention, cudnn.flash_attention])
def test_torch_has_the_kernels_as_they_are_called(kernel: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Names, arguments and shapes of the results, as this torch declares them."""
    q, k, v = (torch.empty(2, tokens, 64, dtype=torch.bfloat16, device="meta") for tokens in (384, 128, 128))
    out, lse = kernel(q, k, v)
    assert out.shape == q.shape and out.dtype == q.dtype and lse.shape == (2, 384) and lse.dtype == torch.float32


def test_plans_are_those_of_any_prompt() -> None:
    with card((9, 0)):
        strides = {t.stride() for tokens in (300, 557) for t in inputs(tokens)[1:]}
    assert strides == {(SIZE, KV_HEADS * SIZE, 1)}


def wrong_row(q: Tensor, k: Tensor, found: Any) -> Any:
    found[0][0, 1, 70] += 0.1 * found[0][0, 1, 70].norm()
    return found


def raised(q: Tensor, k: Tensor, found: Any) -> Any:
    raise RuntimeError("No valid engine configs\nand a trace")


def in_base_two(q: Tensor, k: Tensor, found: Any) -> Any:
    return (found[0], found[1] * 1.4427, *found[2:])


def no_number(q: Tensor, k: Tensor, found: Any) -> Any:
    return (found[0] * torch.nan, *found[1:])


@pytest.mark.parametrize(
    "change, said",
    [
        (wrong_row, "differs from flash attention by 0."),
        (raised, "failed (No valid engine configs); "),
        (in_base_two, "log-sum-exp "),
        (no_number, "by nan, log-sum-exp "),
    ],
)
def test_a_wrong_answer_ends_it_with_one_line(
    change: Callable[[Tensor, Tensor, Any], Any], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    answer_with(monkeypatch, lambda q, k, found: change(q, k, (calls.append(1), found)[1]))
    with card((9, 0)):
        for seed in (1, 2):
            q, k, v = inputs(429 + COUNT, seed=seed)
            check(attend_causal(q, k, v, FULL), q, k, v, causal(429 + COUNT))
    told = capsys.readouterr().err
    assert len(calls) == 1 and told.count("\n") == 1
    assert told.startswith("skvq: cuDNN's attention (bfloat16, 2 heads of 16, 384 queries, 256 keys) ") and said in told


def test_a_new_shape_is_compared_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answer_with(monkeypatch, lambda q, k, found: wrong_row(q, k, found) if k.shape[2] == 128 else found)
    with card((9, 0)):
        for tokens in (256, 256, 384, 384):
            q, k, v = inputs(tokens)
            check(attend_all(q, k, v), q, k, v, torch.ones(COUNT, tokens, dtype=torch.bool))
    assert "128 keys" in capsys.readouterr().err


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_an_engine_on_hopper(prefill: str, asked: list[tuple[int, int]], tmp_path: Any) -> None:
    """A chunk of 1,024 tokens, then one of 128."""
    folder = tiny_folder(tmp_path, head_size=64, num_layers=2)
    options: dict[str, Any] = {"max_context": 1300, "cuda_graph": False, "prefill": prefill, "device": "cuda", "dtype": "auto"}
    logits = []
    for capability in ((8, 0), (9, 0)):
        assert not asked
        with card(capability):
            engine = tiny_engine(folder, tiny_cache(method="fp"), **options)
            logits.append(stand_in.plain(steps(engine, [engine.prefill(random_ids(1152))], [random_ids(3, seed=1)])))
    assert {queries for queries, _ in asked} == {2 * 128} and (1024 if prefill == "exact" else 512) in {t for _, t in asked}
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < 0.02
