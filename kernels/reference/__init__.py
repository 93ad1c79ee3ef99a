"""The specification: every kernel in plain torch, float32, one sequence at a time. Slow, and always right.

One copy of it: every other backend is compared with this one.

    e4m3 quantizer lattice   numbers to codes and metadata, and back
    page                     codes and metadata to bytes of a page, and back
    rope heads labels        keys and values to what is stored, and back: one file a kind of codec
    attention                softmax over what the cache holds
"""

from __future__ import annotations

from skvq.kernels.interface import HeadCodec, LabelCodec, PackedKernels
from skvq.kernels.ops import Unfused
from skvq.kernels.reference.attention import attend_plain, masked_attention, merge
from skvq.kernels.reference.e4m3 import ENOUGH, e4m3_decode, e4m3_encode, encode_scale
from skvq.kernels.reference.heads import (
    attend_heads,
    decode_heads,
    encode_heads,
    pack_heads,
    quantize_heads,
    read_heads,
    unpack_heads,
)
from skvq.kernels.reference.labels import attend_labels, decode_labels, pack_labels, quantize_labels, read_labels, unpack_labels
from skvq.kernels.reference.lattice import LATTICE_FITS, LATTICE_ROUNDS, LATTICE_SWEEPS, quantize_lattice
from skvq.kernels.reference.page import pack_codes, pack_meta, tile_index, unpack_codes, unpack_meta
from skvq.kernels.reference.quantizer import REFINE_STEPS, dequantize, quantize
from skvq.kernels.reference.rope import rotary

__all__ = [
    "ENOUGH",
    "LATTICE_FITS",
    "LATTICE_ROUNDS",
    "LATTICE_SWEEPS",
    "REFINE_STEPS",
    "Reference",
    "attend_heads",
    "attend_labels",
    "attend_plain",
    "decode_heads",
    "decode_labels",
    "dequantize",
    "e4m3_decode",
    "e4m3_encode",
    "encode_heads",
    "encode_scale",
    "masked_attention",
    "merge",
    "pack_codes",
    "pack_heads",
    "pack_labels",
    "pack_meta",
    "quantize",
    "quantize_heads",
    "quantize_labels",
    "quantize_lattice",
    "read_heads",
    "read_labels",
    "rotary",
    "tile_index",
    "unpack_codes",
    "unpack_heads",
    "unpack_labels",
    "unpack_meta",
]


class ReferenceHeads:
    """``interface.PackedKernels`` of ``HeadCodec``."""

    pack = staticmethod(pack_heads)
    unpack = staticmethod(unpack_heads)
    attend = staticmethod(attend_heads)


class ReferenceLabels:
    """``interface.PackedKernels`` of ``LabelCodec``."""

    pack = staticmethod(pack_labels)
    unpack = staticmethod(unpack_labels)
    attend = staticmethod(attend_labels)


class Reference(Unfused):
    """The specification as a backend: any device, no speed."""

    name = "reference"
    heads: PackedKernels[HeadCodec] = ReferenceHeads()
    labels: PackedKernels[LabelCodec] = ReferenceLabels()
    attend_plain = staticmethod(attend_plain)
