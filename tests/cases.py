"""Small arenas to attend over: random codes, odd page tables, retained flags, poisoned slots; attention over one in 16 bits.

For tests of every backend and of the specification, and for the gates of ``benchmarks/gpu``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from skvq.kernels import reference
from skvq.kernels.interface import (
    Backend,
    FullSlots,
    HeadCodec,
    HeadSide,
    LabelCodec,
    PackedPages,
    PlainPages,
    RopeFrequencies,
    Side,
    Step,
)
from skvq.kernels.layout import PAGE_TOKENS, PageLayout, pages_for

FULL_SPAN = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """One arena, one codec and one step."""

    layout: PageLayout
    pages: PackedPages
    heads: HeadCodec
    labels: LabelCodec
    plain: PlainPages
    full: FullSlots
    step: Step
    q: Tensor


def rope_of(size: int, device: torch.device, scale: float = 1.0) -> RopeFrequencies:
    inv_freq = 10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64, device=device) / size)
    return RopeFrequencies(inv_freq=inv_freq, scale=scale)


def random_words(shape: tuple[int, ...], groups: int, layout: PageLayout, retained: float, gen: torch.Generator) -> Tensor:
    """Metadata words with plausible bytes: scales 0.02 .. 0.5, mids of both signs, a share of flags on group 0."""
    scale = (torch.rand(*shape, 2, generator=gen) * 0.48 + 0.02).to(torch.float8_e4m3fn).view(torch.uint8)
    mid = (torch.randn(*shape, 2, generator=gen) * 0.3).to(torch.float8_e4m3fn).view(torch.uint8)
    words = torch.stack([scale[..., 0], mid[..., 0], scale[..., 1], mid[..., 1]], -1)
    flags = (torch.rand(*shape[:1], 1, *shape[2:], generator=gen) < retained).to(torch.uint8) * 0x80
    rows = words.view(*shape[:2], layout.tiles, groups, layout.tile, 4)
    rows[..., 0, :, 0] |= flags.view(shape[0], 1, layout.tiles, groups, layout.tile)[..., 0, :]
    return words.view(torch.int32)[..., 0].contiguous()


def orthogonal(count: int, size: int, gen: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(count, size, size, generator=gen))[0].contiguous()


def make_case(
    *,
    size: int = 128,
    kv_heads: int = 2,
    repeat: int = 4,
    key_bits: float = 2.0,
    value_bits: float = 2.0,
    group_size: int = 128,
    packed: tuple[int, ...] = (1, 11),
    window: int = 37,
    queries: int = 1,
    span: int = FULL_SPAN,
    has_key_mean: bool = False,
    has_basis: bool = True,
    has_metric: bool = False,
    retained: float = 0.02,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    seed: int = 0,
    among_trits: bool = False,
) -> Case:
    """A batch of ``len(packed)`` sequences with that many packed tiles each, and ``window`` recent tokens."""
    gen = torch.Generator().manual_seed(seed)
    dev = torch.device(device)
    layout = PageLayout(
        head_size=size,
        kv_heads=kv_heads,
        key_bits=key_bits,
        value_bits=value_bits,
        group_size=min(group_size, size),
        among_trits=among_trits,
    )
    groups = layout.groups
    per_row = max(1, -(-max(packed) * layout.tile // PAGE_TOKENS))
    count = per_row * len(packed) + 1
    pages = PackedPages(
        layout=layout,
        key_codes=_codes(key_bits, (count, kv_heads, layout.key_bytes), gen).to(dev),
        value_codes=_codes(value_bits, (count, kv_heads, layout.value_bytes), gen).to(dev),
        meta=random_words((count, kv_heads, layout.meta_words), groups, layout, retained, gen).to(dev),
    )
    table = torch.randperm(count, generator=gen)[: per_row * len(packed)].view(len(packed), per_row).to(torch.int32)
    table = torch.cat([table[:0].new_zeros(1, per_row), table]).to(dev)  # slot 0 belongs to nobody here
    slots = torch.randperm(len(packed), generator=gen) + 1
    lengths = torch.tensor([n * layout.tile for n in packed], dtype=torch.int32)
    now = lengths[:, None] + window - queries + torch.arange(queries, dtype=torch.int32)[None]
    full = window + 5 + 3  # sinks, then the window, three slots empty and poisoned
    held = torch.full((len(packed) + 1, full), -1, dtype=torch.int32)
    for row, slot in enumerate(slots.tolist()):
        held[slot, :5] = torch.arange(5) if packed[row] else -1
        held[slot, 5 : 5 + window] = torch.arange(window).roll(row * 7) + int(lengths[row])
    keys, values = (torch.randn(len(packed) + 1, kv_heads, full, size, generator=gen).to(dtype) for _ in range(2))
    for t in (keys, values):
        t.masked_fill_((held < 0)[:, None, :, None], float("nan"))
    rope = rope_of(size, dev, 1.1)
    unit = 2.0 ** torch.randint(-1, 2, (2, kv_heads, groups), generator=gen).float()
    clip = 0.9 + 0.1 * torch.rand(2, kv_heads, groups, generator=gen)
    eye = torch.eye(size).expand(kv_heads, -1, -1).contiguous()
    basis, value_basis = (orthogonal(kv_heads, size, gen) if has_basis else eye for _ in range(2))
    mean = torch.randn(2, kv_heads, size, generator=gen)
    sides = [Side(unit=unit[i].to(dev), clip=clip[i].to(dev)) for i in range(2)]
    spread = torch.randn(kv_heads, size, size, generator=gen) / size**0.5
    metric = (spread @ spread.transpose(1, 2) + torch.eye(size)).contiguous()
    chol = torch.linalg.cholesky(metric.flip(1, 2)).flip(1, 2)  # upper times its transpose
    upper = (chol / chol.diagonal(dim1=1, dim2=2)[:, None, :]).contiguous()
    head_sides = [
        HeadSide(unit=s.unit, clip=s.clip, metric=metric.to(dev), factor=upper.to(dev), has_metric=has_metric) for s in sides
    ]
    heads = HeadCodec(
        keys=head_sides[0], values=head_sides[1], rope=rope, has_key_mean=has_key_mean and has_basis, has_basis=has_basis,
        key_mean=(mean[0] * (has_key_mean and has_basis)).to(dev), value_mean=(mean[1] * has_basis).to(dev),
        key_basis=(basis * 2).to(dev), query_basis=(basis / 2).to(dev),
        value_basis=value_basis.to(dev), output_basis=value_basis.transpose(1, 2).contiguous().to(dev),
    )  # fmt: skip
    every = torch.arange(kv_heads * groups).repeat(4)  # at least four channels a group
    rest = torch.randint(0, kv_heads * groups, (2, kv_heads * size - len(every)), generator=gen)
    labels = [torch.cat([every, rest[i]])[torch.randperm(kv_heads * size, generator=gen)].to(dev) for i in range(2)]
    flat = [Side(unit=s.unit.reshape(-1), clip=s.clip.reshape(-1)) for s in sides]
    return Case(
        layout=layout, pages=pages, heads=heads,
        labels=LabelCodec(keys=flat[0], values=flat[1], key_labels=labels[0], value_labels=labels[1], rope=rope),
        plain=PlainPages(
            keys=torch.randn(count, kv_heads, PAGE_TOKENS, size, generator=gen).to(dtype).to(dev),
            values=torch.randn(count, kv_heads, PAGE_TOKENS, size, generator=gen).to(dtype).to(dev),
        ),
        full=FullSlots(keys=keys.to(dev), values=values.to(dev), positions=held.to(dev)),
        step=Step(
            slots=slots.to(dev), positions=now.to(dev), packed=lengths.to(dev), page_table=table,
            max_packed=int(lengths.max()), span=span,
        ),
        q=torch.randn(len(packed), queries, kv_heads * repeat, size, generator=gen).to(dtype).to(dev),
    )  # fmt: skip


def lengthened(case: Case, tokens: int, device: torch.device, seed: int = 0) -> Case:
    """A case of one sequence with that many packed tokens, whole tiles, on pages like its own in any order: to be timed.

    Attention over ``plain`` pages is not lengthened.
    """
    gen, layout = torch.Generator().manual_seed(seed), case.layout
    count, packed = pages_for(tokens), tokens // layout.tile * layout.tile
    pick = torch.randint(len(case.pages.meta), (count,), generator=gen).to(device)
    table = torch.randperm(count, generator=gen).to(torch.int32).expand(len(case.step.page_table), -1)
    moved = on_device(case, device)
    pages = {name: getattr(moved.pages, name)[pick] for name in ("key_codes", "value_codes", "meta")}
    step = replace(
        moved.step, packed=torch.full_like(moved.step.packed, packed), page_table=table.to(device).contiguous(),
        positions=moved.step.positions - moved.step.packed[:, None] + packed, max_packed=packed,
    )  # fmt: skip
    return replace(moved, pages=replace(moved.pages, **pages), step=step)


def on_device(value: Any, device: torch.device) -> Any:
    """A tensor, or a bundle of tensors, on that device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: on_device(getattr(value, f.name), device) for f in fields(value) if f.init})
    return value


def _codes(bits: float, shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
    """Random bytes; of trits only the 243 that packing writes."""
    if bits == 1.5:
        return ((torch.randint(0, 243, shape, generator=gen) * 256 + 242) // 243).to(torch.uint8)
    return torch.randint(0, 256, shape, generator=gen).to(torch.uint8)


def formats() -> Iterator[tuple[float, float, int, int]]:
    """Key bits, value bits, group and head size of every format."""
    for size in (128, 64):
        for group in (128, 64, 32):
            if group <= size:
                for key_bits, value_bits in itertools.product((1.5, 2.0, 3.0, 4.0, 8.0), repeat=2):
                    yield key_bits, value_bits, group, size


def arguments(case: Case, method: str) -> tuple[object, ...]:
    return {
        "heads": (case.pages, case.heads, case.full, case.step),
        "labels": (case.pages, case.labels, case.full, case.step),
        "plain": (case.plain, case.full, case.step),
    }[method]


def attend(backend: Backend, case: Case, method: str) -> tuple[Tensor, Tensor]:
    """A backend's attention over the case: output like q, log-sum-exp float32."""
    kernels = backend.attend_plain if method == "plain" else getattr(backend, method).attend
    found: tuple[Tensor, Tensor] = kernels(case.q, *arguments(case, method))
    return found


def compare(made: Backend, case: Case, method: str, host: Case | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and log-sum-exp of ``made``, and of the specification in float32; ``host``: the case where that one can run."""
    twin = host or case
    return *attend(made, case, method), *attend(reference.Reference(), replace(twin, q=twin.q.float()), method)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in float64: q [N, H, D], k and v [KH, T, D]."""
    repeat = q.shape[1] // k.shape[0]
    k, v = (t.double().repeat_interleave(repeat, 0) for t in (k, v))
    score = torch.einsum("nhd,htd->nht", q.double(), k) / q.shape[-1] ** 0.5
    score = score.masked_fill(~visible[:, None], -torch.inf)
    return torch.einsum("nht,htd->nhd", score.softmax(-1), v), score.logsumexp(-1)


def stepwise(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attention of q [N, H, D] over k and v [T, H, D] in torch, step by step: scores and weights in 16 bits too."""
    score = torch.einsum("nhd,thd->nht", q, k) / q.shape[2] ** 0.5
    weight = score.masked_fill(~visible[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("nht,thd->nhd", weight, v)


def fused(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """The same by torch's own kernel, which has scores and weights in float32."""
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf).to(k.dtype)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


def torch_attention(case: Case, method: str, attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Attention in torch on keys and values in q's 16-bit dtype, ``stepwise`` or ``fused``: its error is the yardstick."""
    outs = []
    for row, slot in enumerate(case.step.slots.tolist()):
        count, table = int(case.step.packed[row]), case.step.page_table[slot]
        retained = torch.zeros(count, dtype=torch.bool)
        if method == "plain":
            used = table[: -(-count // PAGE_TOKENS)].long()
            k, v = (t[used].transpose(1, 2).flatten(0, 1)[:count] for t in (case.plain.keys, case.plain.values))
        else:
            codec = getattr(case, method)
            k, v = getattr(reference, f"unpack_{method}")(case.pages, codec, table, 0, count)
            retained = getattr(reference, f"read_{method}")(case.pages, codec, table, 0, count)[2]
        t, held = case.step.positions[row][:, None].long(), case.full.positions[slot].long()[None]
        near = (held >= 0) & (held <= t) & (t - held < case.step.span)
        visible = torch.cat([~retained & (t - torch.arange(count)[None] < case.step.span), near], 1)
        seen = visible.any(0)
        k, v = (torch.cat([a.to(b.dtype), b[slot].transpose(0, 1)]) for a, b in ((k, case.full.keys), (v, case.full.values)))
        k, v = (x[seen].repeat_interleave(case.q.shape[2] // x.shape[1], 1) for x in (k, v))  # [T, H, D]
        outs.append(attention(case.q[row], k, v, visible[:, seen]))
    return torch.stack(outs)


def torch_error(exact: Tensor, case: Case, method: str) -> float:
    """The largest error of that, stepwise, of which a kernel may make twice."""
    return float((torch_attention(case, method, stepwise).float() - exact).abs().max())


def check_unpacked(
    made: Backend,
    method: str,
    pages: PackedPages,
    codec: HeadCodec | LabelCodec,
    where: tuple[Any, ...],
    dtypes: Sequence[torch.dtype],
) -> None:
    """Numbers in the stored basis bit for bit as the specification has them; with a basis, and in ``dtypes``, as good as
    rounding lets them be.
    """
    stored = replace(codec, has_basis=False, has_key_mean=False) if isinstance(codec, HeadCodec) else codec
    for form, dtype in [(stored, torch.float32), *((codec, dtype) for dtype in dtypes)]:
        exact = getattr(reference, f"unpack_{method}")(pages, form, *where)
        found = getattr(made, method).unpack(pages, form, *where, dtype)
        for got, wanted in zip(found, exact, strict=True):
            error, largest = float((got.float() - wanted).abs().max()), float(wanted.abs().max())
            allowed = 2 * float((wanted.to(dtype).float() - wanted).abs().max()) + 2e-6 * largest
            assert got.dtype == dtype and error <= allowed, (method, dtype, error, allowed, largest)
            assert form is not stored or dtype != torch.float32 or torch.equal(got, wanted), (method, error)
