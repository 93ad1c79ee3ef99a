"""4-bit checkpoints in safetensors: AWQ, GPTQ, compressed-tensors. A matrix is several tensors, given out as Q4_1 blocks.

A weight is ``scale * (code - zero)``: codes 0 to 15 for each number, scale and zero for a group of g input channels. Codes and
zeros are packed in words of eight, the first in the lowest bits; AWQ has outputs in the order 0 2 4 6 1 3 5 7 there.

    awq, gemm           qweight [in, out/8]         qzeros [in/g, out/8]                        scales [in/g, out]
    gptq                qweight [in/8, out]         qzeros [in/g, out/8], less 1, of 16         scales [in/g, out]
    compressed-tensors  weight_packed [out, in/8]   weight_zero_point [out/8, in/g], or all 8   weight_scale [out, in/g]

Scales of 8-bit activations or of another engine's KV cache, where a checkpoint has them, are left alone.

Sources: AutoAWQ's WQLinear_GEMM, AutoGPTQ's QuantLinear (``gptq_v2`` has zeros as they are), compressed-tensors'
``pack_quantized``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from skvq.engine.errors import ModelError
from skvq.kernels.ggml.formats import BLOCK, FORMATS
from skvq.loaders.fields import Fields
from skvq.loaders.source import QuantizedBlocks

Read = Callable[[str], Tensor]
"""Gives a tensor of a checkpoint by its name."""
KIND = "Q4_1"
METHODS = ("awq", "gptq", "compressed-tensors")
GPTQ_LESS = {"gptq": 1, "gptq_v2": 0, "gptq_p": 0}
"""What zeros are stored less by in each form of GPTQ; of 4 bits they do not differ otherwise."""
OTHER_SCALES, KV_SCALES = ("input_scale", "output_scale"), (".k_scale", ".v_scale")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Format:
    """How a checkpoint's matrices are quantized; ``group``: input channels that share a scale, 0: all of a row."""

    method: str
    group: int
    less: int = 0  # what zeros are stored less by
    has_zeros: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        """What a matrix is stored as, in place of ``weight``: codes, scales, zeros."""
        if self.method != "compressed-tensors":
            return "qweight", "scales", "qzeros"
        return "weight_packed", "weight_scale", *(("weight_zero_point",) if self.has_zeros else ())

    def shapes(self, outs: int, ins: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parts of a matrix [out, in]."""
        groups = ins // (self.group or ins)
        if self.method == "compressed-tensors":
            return ((outs, ins // 8), (outs, groups), (outs // 8, groups))[: len(self.parts)]
        return (ins, outs // 8) if self.method == "awq" else (ins // 8, outs), (groups, outs), (groups, outs // 8)


def int4_format(fields: Fields) -> Int4Format | None:
    """What ``quantization_config`` of a config.json says; None if there is none. ModelError for what is not read."""
    if not fields.has("quantization_config"):
        return None
    found = fields.section("quantization_config")
    method = found.text("quant_method")
    if method == "compressed-tensors":
        return _compressed(found)
    bits = found.data.get("bits", 4)
    if method not in METHODS or bits != 4:
        raise _not_read(found, f"{method} of {bits} bits" if method in METHODS else method)
    group = _group(found, found.data.get("group_size", 128))
    if method == "gptq":
        layout = found.text("checkpoint_format", "gptq").lower()
        if layout not in GPTQ_LESS:
            raise _not_read(found, f"gptq, checkpoint_format {layout}")
        return Int4Format(method=method, group=group, less=GPTQ_LESS[layout])
    version, has_zeros = found.text("version", "gemm"), found.flag("zero_point", True)
    if version.lower() != "gemm" or not has_zeros:
        raise _not_read(found, f"awq, version {version}, {'with' if has_zeros else 'without'} zero points")
    return Int4Format(method=method, group=group)


def _compressed(found: Fields) -> Int4Format:
    groups = found.section("config_groups").data
    if found.text("format", "") != "pack-quantized" or len(groups) != 1:
        raise _not_read(found, f"compressed-tensors, format {found.data.get('format')!r}, {len(groups)} groups of layers")
    weights = found.section("config_groups").section(next(iter(groups))).section("weights")
    kind = weights.data.get("num_bits"), weights.data.get("type"), weights.data.get("strategy")
    if kind[:2] != (4, "int") or kind[2] not in ("group", "channel"):
        raise _not_read(found, f"compressed-tensors, {kind[1]} of {kind[0]} bits by {kind[2]}")
    group = _group(found, weights.data.get("group_size") if kind[2] == "group" else -1)
    return Int4Format(method="compressed-tensors", group=group, has_zeros=not weights.flag("symmetric", True))


def _group(fields: Fields, size: object) -> int:
    if size == -1:
        return 0
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0 or size % BLOCK:
        raise ModelError(f"{fields.where}: group_size is {str(size)[:40]}, this engine reads -1 and multiples of {BLOCK}")
    return size


def _not_read(fields: Fields, what: str) -> ModelError:
    return ModelError(
        f"{fields.where}: the weights are quantized with {what[:100]}, and this engine reads 4-bit awq, gptq and "
        "compressed-tensors: use the 16-bit checkpoint of the same model, or its GGUF"
    )


class Int4Matrices:
    """The matrices of a checkpoint that are stored in 4 bits, by canonical name."""

    def __init__(
        self, form: Int4Format, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str
    ) -> None:
        """``shapes``: of the model's weights; ``found``: of the checkpoint's tensors."""
        self._form, self._found, self._where = form, found, where
        matrices = {name: (shape[0], shape[1]) for name, shape in shapes.items() if len(shape) == 2}
        self._biases = {name for name in shapes if name.endswith("bias")}
        self.shapes = {name: shape for name, shape in matrices.items() if _prefix(name) + form.parts[0] in found}

    def parts(self, name: str) -> tuple[str, ...]:
        """The tensors that a matrix is read from: codes, scales, zeros."""
        return tuple(_prefix(name) + part for part in self._form.parts)

    def whole(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the checkpoint's tensors as if every matrix were one. ModelError for parts missing or of another shape."""
        whole, unit = dict(self._found), self._form.group or BLOCK
        for name, (outs, ins) in self.shapes.items():
            if ins % unit or ins % BLOCK or outs % 8:
                raise self._wrong(f"{name} of [{outs}, {ins}] has no whole groups of {unit} channels")
            wanted = self._form.shapes(outs, ins)
            for part, shape in zip(self.parts(name), wanted, strict=True):
                if whole.pop(part, None) != shape:
                    raise self._wrong(f"{part} is {list(self._found.get(part, ()))}, not {list(shape)}")
            for other in ("g_idx", "weight_g_idx", "weight_shape", *OTHER_SCALES):
                whole.pop(_prefix(name) + other, None)
            if (bias := f"{_prefix(name)}bias") not in self._biases:
                whole.pop(bias, None)
            whole[name] = (outs, ins)
        return {name: shape for name, shape in whole.items() if not name.endswith(KV_SCALES)}

    def check(self, read: Read) -> None:
        """Raise ModelError for what would change the model: channels in another order, biases that the config does not have."""
        for name, (_, ins) in self.shapes.items():
            for index in (f"{_prefix(name)}g_idx", f"{_prefix(name)}weight_g_idx"):
                wanted = torch.arange(ins) // (self._form.group or ins)
                if index in self._found and not torch.equal(read(index).to(torch.int64), wanted):
                    raise self._wrong(f"{index} puts channels in another order (desc_act), which this engine does not read")
            bias = f"{_prefix(name)}bias"
            if bias in self._found and bias not in self._biases and bool(read(bias).any()):
                raise self._wrong(f"{bias} is not zero, and the config says that there is none")

    def read(self, name: str, read: Read) -> Tensor:
        """Weights float32 [out, in]."""
        return dequantized(*self._numbers(name, read))

    def blocks(self, name: str, read: Read) -> QuantizedBlocks:
        """The same in blocks."""
        return QuantizedBlocks(data=to_blocks(*self._numbers(name, read)), kind=KIND, shape=self.shapes[name])

    @property
    def name(self) -> str:
        """All that its numbers depend on besides the tensors."""
        return repr(self._form)

    def nbytes(self, name: str) -> int:
        """Bytes of its blocks."""
        outs, ins = self.shapes[name]
        return outs * (ins // BLOCK) * FORMATS[KIND].file_bytes

    def _numbers(self, name: str, read: Read) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [out, in], scales and zeros float32 [out, groups]."""
        form = self._form
        packed, scales, *zeros = map(read, self.parts(name))
        if form.method == "compressed-tensors":
            zero = _nibbles(zeros[0].T).T if zeros else torch.full(scales.shape, 8, dtype=torch.uint8)
            return _nibbles(packed), scales.float(), zero.float()
        order = torch.tensor(AWQ_ORDER).argsort() if form.method == "awq" else torch.arange(8)
        codes = _nibbles(packed, order).T.contiguous() if form.method == "awq" else _nibbles(packed.T)
        return codes, scales.T.float(), (_nibbles(zeros[0], order).T + form.less & 15).float()

    def _wrong(self, what: str) -> ModelError:
        return ModelError(f"{self._where} ({self._form.method}): {what}")


def _prefix(name: str) -> str:
    return name.removesuffix("weight")


def dequantized(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Weights float32 [out, in]."""
    groups = codes.view(*scales.shape, -1)
    return ((groups - zeros[..., None]) * scales[..., None]).view(codes.shape)


def to_blocks(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Rows of Q4_1 blocks uint8 [out, bytes]: ``d * code + m``, d the scale and m minus scale times zero, both rounded to
    float16 (m by a 128th of a step at most)."""
    outs, ins = codes.shape
    halves = codes.view(outs, ins // BLOCK, 2, BLOCK // 2)
    heads = torch.stack([scales, -scales * zeros], -1).half()  # [out, groups, 2]
    heads = heads.repeat_interleave(ins // BLOCK // scales.shape[1], 1).contiguous()
    blocks = torch.cat([heads.view(torch.uint8), halves[:, :, 0] | halves[:, :, 1] << 4], -1)
    assert blocks.shape[-1] == FORMATS[KIND].file_bytes
    return blocks.view(outs, -1)


def _nibbles(words: Tensor, order: Tensor | None = None) -> Tensor:
    """The eight codes of each word int32 [rows, n], uint8 [rows, 8 n]; ``order``: which of them come first."""
    packed = words.contiguous().view(torch.uint8)  # [rows, 4 n], the lowest byte of a word first
    codes = torch.stack([packed & 15, packed >> 4], -1).view(len(words), -1, 8)
    return (codes if order is None else codes[..., order]).reshape(len(words), -1)
