"""A machine for the PTX of Triton's kernels: what a card would compute, seen without one, as far as arithmetic goes.

All threads of a program go in step, one numpy lane each, so a branch must go the same way for all of them. Refused are accesses
outside the tensors that a kernel was given, accesses that are not aligned, and shared memory out of bounds. ``cp.async`` copies
when it is waited for, not before. Not seen: races between warps, and time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

TYPES: dict[str, Any] = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f64": np.float64, "pred": np.bool_,
}  # fmt: skip
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
IGNORED = {"rn", "rz", "approx", "ftz", "full", "uni", "relu"}
Array = Any


class Memory:
    """Tensors by address."""

    def __init__(self, spans: Sequence[tuple[int, np.ndarray]]) -> None:
        spans = sorted(((base, data) for base, data in spans if len(data)), key=lambda span: span[0])
        self.bases = np.array([base for base, _ in spans], dtype=np.uint64)
        self.data = [data for _, data in spans]

    def places(self, address: Array, size: int, mask: Array) -> list[tuple[np.ndarray, Array, Array]]:
        """(bytes of a tensor, lanes, offsets) of the accesses of ``size`` bytes under ``mask``."""
        lanes = np.nonzero(mask)[0]
        at = address[lanes].astype(np.uint64)
        assert not (at % np.uint64(size)).any(), f"an access of {size} bytes is not aligned: {hex(int(at[0]))}"
        which = np.searchsorted(self.bases, at, side="right").astype(np.int64) - 1
        out = []
        for i in np.unique(which):
            assert i >= 0, "an access before all tensors"
            chosen = which == i
            offset = (at[chosen] - self.bases[i]).astype(np.int64)
            assert int(offset.max()) + size <= len(self.data[i]), (
                f"an access of {size} bytes {int(offset.max())} into {len(self.data[i])}"
            )
            out.append((self.data[i], lanes[chosen], offset))
        return out


class Program:
    """PTX of one kernel, parsed once."""

    def __init__(self, text: str, threads: int, shared: int) -> None:
        self.threads, self.shared_bytes = threads, shared
        self.kinds: dict[str, Any] = {}
        self.labels: dict[str, int] = {}
        self.params: list[tuple[str, str]] = re.findall(r"\.param \.(\w+).*?(\w+_param_\d+)", text[: text.index(".reqntid")])
        self.code: list[Callable[[Machine], Any]] = []
        self.text: list[str] = []
        body = text[text.index(".reqntid") :]
        body = body[body.index("{") + 1 :]
        for raw in body.splitlines():
            line = raw.split("//")[0].strip()
            if line == "}" or line.startswith(".section"):
                break
            if not line or line.startswith((".loc", ".file", ".pragma")):
                continue
            if label := re.fullmatch(r"(\$\w+):", line):
                self.labels[label.group(1)] = len(self.code)
                continue
            if line.startswith("{ .reg"):
                line = line[1 : line.rindex("}")]
            for part in (p.strip() for p in line.split(";")):
                if part.startswith(".reg"):
                    self.declare(part)
                elif part:
                    self.text.append(part)
                    self.code.append(self.parse(part))

    def declare(self, part: str) -> None:
        _, kind, names = part.split(None, 2)
        for name in names.split(","):
            self.kinds[re.sub(r"<\d+>", "", name.strip())] = TYPES[kind[1:]]

    # --- operands -----------------------------------------------------------------------------------------------------

    def kind(self, name: str) -> Any:
        found = self.kinds.get(name)
        return self.kinds[re.sub(r"\d+$", "", name)] if found is None else found

    def value(self, text: str, kind: str) -> Callable[[Machine], Array]:
        """The operand as lanes of numpy type ``kind`` (of ``f16x2``: [threads, 2])."""
        pair = kind == "f16x2"
        want = TYPES["b32" if pair else kind]
        special = re.fullmatch(r"%(n?tid|n?ctaid|nctaid)\.([xyz])|%laneid", text)
        if special:
            return lambda m: m.special[text].view(want)
        if re.match(r"[%a-z]", text) and text != "global_smem":
            if np.dtype(want).itemsize < np.dtype(self.kind(text)).itemsize:
                return lambda m: m.registers[text].astype(RAW[np.dtype(want).itemsize]).view(want)
            if pair:
                return lambda m: m.registers[text].view(np.float16).reshape(-1, 2)
            return lambda m: m.registers[text].view(want)
        fixed = np.full(self.threads, immediate(text, want))
        return (lambda m: fixed.view(np.float16).reshape(-1, 2)) if pair else (lambda m: fixed)

    def number(self, text: str, kind: str) -> Callable[[Machine], Array]:
        """The operand as lanes of numbers, of bfloat16 widened to float32."""
        if kind != "bf16":
            return self.value(text, kind)
        bits = self.value(text, "b16")
        return lambda m: wide_bf16(bits(m))

    def target(self, text: str) -> Callable[[Machine, Array], None]:
        """Writes lanes to a register; narrower ones are extended by their sign or zeros."""
        kind = self.kind(text)
        size = np.dtype(kind).itemsize

        def put(m: Machine, x: Array) -> None:
            x = np.ascontiguousarray(x)
            if x.ndim == 2:
                x = x.reshape(-1).view(np.uint32)
            if kind is not np.bool_:
                if x.dtype.itemsize != size:
                    x = x.astype(np.int64 if x.dtype.kind == "i" else np.uint64).astype(RAW[size])
                x = x.view(kind)
            guard = m.guard
            m.registers[text] = x if guard is None else np.where(guard, x, m.registers.get(text, np.zeros_like(x)))

        return put

    def address(self, text: str) -> Callable[[Machine], Array]:
        inner = text.strip("[] ").replace(" ", "")
        base, _, offset = inner.partition("+")
        plus = int(offset or "0", 0)
        if base == "global_smem":
            return lambda m: np.full(self.threads, plus, dtype=np.uint64)
        get = self.value(base, "b64" if np.dtype(self.kind(base)).itemsize == 8 else "b32")
        return lambda m: (get(m).astype(np.int64) + plus).astype(np.uint64)

    # --- instructions -------------------------------------------------------------------------------------------------

    def parse(self, text: str) -> Callable[[Machine], Any]:
        guard = None
        if text.startswith("@"):
            word, text = text.split(None, 1)
            negative, name = word.startswith("@!"), word.lstrip("@!")
            guard = (lambda m: ~m.registers[name]) if negative else (lambda m: m.registers[name])
        op, _, rest = text.partition(" ")
        op, _, extra = op.partition("\t")
        names = split_operands(extra + rest)
        if op.split(".")[0] == "bra":
            label = names[0]
            return (lambda m: m.branch(label, None)) if guard is None else (lambda m: m.branch(label, guard(m)))
        step = self.instruction(op.split("."), names)
        if guard is None:
            return step

        def guarded(m: Machine) -> None:
            m.guard = guard(m)
            step(m)
            m.guard = None

        return guarded

    def instruction(self, op: list[str], names: list[str]) -> Callable[[Machine], Any]:
        name = op[0]
        if name in ("ret", "exit"):
            return lambda m: "end"
        if name in ("bar", "barrier", "membar", "fence", "createpolicy", "griddepcontrol"):  # launches run one after another
            return lambda m: None
        if op[:4] == ["cp", "async", "bulk", "prefetch"]:
            return lambda m: None
        if name == "cp" and op[1] == "async":
            return self.copy(op, names)
        if name == "ld" and op[1] == "param":
            which = names[1].strip("[] ")
            put, out = self.target(names[0]), TYPES[op[-1]]
            return lambda m: put(
                m, np.full(self.threads, m.params[which]).astype(np.uint64).astype(RAW[np.dtype(out).itemsize]).view(out)
            )
        if name in ("ld", "st"):
            return self.access(name, op, names)
        if name in ("ldmatrix", "stmatrix"):
            return self.matrix(name, op, names)
        if name == "mma":
            return self.mma(op, names)
        if name == "wgmma":  # one that is done at once needs no fences
            return self.wgmma(op, names) if op[1] == "mma_async" else lambda m: None
        if name == "shfl":
            return self.shuffle(op, names)
        if name == "redux":
            get, put, function = self.value(names[1], op[3]), self.target(names[0]), REDUCE[op[2]]
            return lambda m: put(m, np.repeat(function.reduce(get(m).reshape(-1, 32), 1), 32))
        if name == "mov" and "{" in "".join(names):
            return self.move_parts(op, names)
        return self.arithmetic(op, names)

    def arithmetic(self, op: list[str], names: list[str]) -> Callable[[Machine], Any]:
        name, words = op[0], [w for w in op[1:] if w not in IGNORED]
        put = self.target(names[0])
        if name == "cvt":
            out, kind = words[-2], words[-1]
            if kind == "bf16":
                wide = self.value(names[1], "u16")
                return lambda m: put(m, (wide(m).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(TYPES[out]))
            if out == "tf32":
                exact = self.value(names[1], "b32")
                return lambda m: put(m, (exact(m) + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
            if out == "bf16":
                number = self.value(names[1], kind)
                return lambda m: put(m, bf16(number(m)))
            if out == "bf16x2":
                pair = [self.value(n, kind) for n in names[1:]]
                return lambda m: put(m, np.ascontiguousarray(np.stack([bf16(pair[1](m)), bf16(pair[0](m))], 1)))
            if out == "f16x2":
                if kind == "e4m3x2":
                    source = self.value(names[1], "b16")
                    return lambda m: put(m, e4m3(source(m).view(np.uint8).reshape(-1, 2)))
                both = [self.value(n, kind) for n in names[1:]]
                return lambda m: put(m, np.stack([both[1](m), both[0](m)], 1).astype(np.float16))
            source, target, toward_zero = self.value(names[1], kind), TYPES[out], "rzi" in op

            def convert(m: Machine) -> None:
                x = source(m)
                put(m, (np.trunc(x) if toward_zero else x).astype(target))

            return convert
        if name in ("setp", "selp"):
            kind = words[-1]
            get = [self.number(n, kind) if name == "setp" else self.value(n, kind) for n in names[1:3]]
            if name == "selp":
                chosen = names[3]
                return lambda m: put(m, np.where(m.registers[chosen], get[0](m), get[1](m)))
            compare = COMPARE[words[0]]
            if len(words) == 3:
                combine, also = LOGIC[words[1]], self.value(names[3], "pred")
                return lambda m: put(m, combine(compare(get[0](m), get[1](m)), also(m)))
            return lambda m: put(m, compare(get[0](m), get[1](m)))
        kind = words[-1]
        if name == "prmt":
            a, b, c = (self.value(n.rstrip("U"), "u32") for n in names[1:])
            return lambda m: put(m, permuted(a(m), b(m), c(m)))
        if name == "lop3":
            a, b, c = (self.value(n, "u32") for n in names[1:4])
            table = int(names[4], 0)
            return lambda m: put(m, lut(a(m), b(m), c(m), table))
        if name == "bfe":
            x, start, length = self.value(names[1], kind), int(names[2]), int(names[3])
            return lambda m: put(m, ((x(m) << TYPES[kind](32 - start - length)) >> TYPES[kind](32 - length)))
        if name in ("shl", "shr"):
            x, by = self.value(names[1], kind), self.value(names[2], "u32")
            width = np.dtype(TYPES[kind]).itemsize * 8
            return lambda m: put(m, shifted(x(m), by(m), width, name == "shl"))
        if kind in ("bf16", "bf16x2"):
            function = {"mul": lambda a, b: a * b, "fma": lambda a, b, c: a * b + c, **FUNCTIONS}[name]
            parts = [self.value(n, "b32" if kind == "bf16x2" else "b16") for n in names[1:]]

            def compute(m: Machine) -> None:
                x = bf16(function(*(wide_bf16(g(m)) for g in parts)))
                put(m, x.reshape(-1, 2) if kind == "bf16x2" else x)

            return compute
        wide = "wide" in op
        if name in ("mul", "mad", "fma"):
            get = [self.value(n, kind) for n in names[1:3]]
            double = {"s32": "s64", "u32": "u64", "u16": "u32", "s16": "s32"}.get(kind, kind)
            plus = self.value(names[3], double if wide else kind) if len(names) > 3 else None
            high = "hi" in op

            def multiply(m: Machine) -> None:
                a, b = get[0](m), get[1](m)
                if a.dtype.kind == "f":
                    more = np.float64 if a.dtype == np.float32 else np.float32
                    x = a.astype(more) * b.astype(more) if plus is not None else a * b
                    put(m, (x + plus(m)).astype(a.dtype) if plus is not None else x)
                    return
                if wide or high:
                    x = a.astype(TYPES[double]) * b.astype(TYPES[double])
                    x = (x >> TYPES[double](32)).astype(a.dtype) if high else x
                else:
                    x = a * b
                put(m, x + plus(m) if plus is not None else x)

            return multiply
        lanes = TYPES[kind[:-2]] if kind.endswith("16x2") and kind != "f16x2" else None  # two integers a register
        get = [self.value(n, "b32" if lanes else kind) for n in names[1:]]
        function = FUNCTIONS[name]
        if lanes:
            return lambda m: put(m, function(*(np.ascontiguousarray(g(m)).view(lanes) for g in get)).view(np.uint32))
        if "relu" in op:
            return lambda m: put(m, np.maximum(function(*(g(m) for g in get)), 0))
        return lambda m: put(m, function(*(g(m) for g in get)))

    def move_parts(self, op: list[str], names: list[str]) -> Callable[[Machine], Any]:
        """``mov`` between a register and a tuple of narrower ones."""
        if names[0].startswith("{"):
            puts = [self.target(n) if n != "_" else None for n in split_operands(names[0].strip("{} "))]
            source = self.value(names[1], op[-1])
            small = RAW[np.dtype(TYPES[op[-1]]).itemsize // len(puts)]

            def spread(m: Machine) -> None:
                x = np.ascontiguousarray(source(m)).view(small).reshape(self.threads, -1)
                for i, put in enumerate(puts):
                    if put:
                        put(m, x[:, i])

            return spread
        parts = split_operands(names[1].strip("{} "))
        kind = f"b{np.dtype(TYPES[op[-1]]).itemsize * 8 // len(parts)}"
        get, put = [self.value(n, kind) for n in parts], self.target(names[0])
        whole = RAW[np.dtype(TYPES[op[-1]]).itemsize]
        return lambda m: put(m, np.ascontiguousarray(np.stack([g(m) for g in get], 1)).reshape(-1).view(whole))

    def access(self, name: str, op: list[str], names: list[str]) -> Callable[[Machine], Any]:
        """Loads and stores of vectors; global ones are checked against tensors, shared ones against its size."""
        place, values = (names[1], names[0]) if name == "ld" else (names[0], names[1])
        parts = split_operands(values.strip("{} "))
        raw, shared = RAW[np.dtype(TYPES[op[-1]]).itemsize], "shared" in "".join(op)
        size = np.dtype(raw).itemsize * len(parts)
        address = self.address(place)
        if name == "ld":
            puts = [self.target(n) for n in parts]

            def load(m: Machine) -> None:
                found = m.load(address(m), size, shared).view(raw).reshape(self.threads, -1)
                for i, put in enumerate(puts):
                    put(m, found[:, i])

            return load
        get = [self.value(n, op[-1]) for n in parts]
        return lambda m: m.store(address(m), np.stack([g(m).view(raw) for g in get], 1), shared)

    def copy(self, op: list[str], names: list[str]) -> Callable[[Machine], Any]:
        if op[2] == "commit_group":
            return lambda m: m.groups.append(m.loose) or m.renew()
        if op[2] == "wait_group":
            keep = int(names[0], 0)
            return lambda m: m.finish(keep)
        if op[2] == "wait_all":
            return lambda m: m.groups.append(m.loose) or m.renew() or m.finish(0)
        target, source, size = self.address(names[0]), self.address(names[1]), int(names[2], 0)
        used = self.value(names[3], "u32") if len(names) > 3 else None

        def start(m: Machine) -> None:
            guard = np.ones(self.threads, bool) if m.guard is None else m.guard
            count = np.full(self.threads, size) if used is None else used(m)
            assert np.isin(count, (0, size)).all(), count
            m.loose.append((target(m), source(m), size, guard.copy(), count > 0))

        return start

    def matrix(self, name: str, op: list[str], names: list[str]) -> Callable[[Machine], Any]:
        count, turned = int(op[4][1:]), "trans" in op
        place, values = (names[1], names[0]) if name == "ldmatrix" else (names[0], names[1])
        parts, address = split_operands(values.strip("{} ")), self.address(place)
        warps = self.threads // 32
        lane = np.arange(32)

        def rows(m: Machine) -> Array:
            return address(m).reshape(warps, 32)[:, : 8 * count].reshape(-1)

        if name == "ldmatrix":
            puts = [self.target(n) for n in parts]

            def load(m: Machine) -> None:
                tile = m.load(rows(m), 16, True).view(np.uint16).reshape(warps, count, 8, 8)
                tile = tile.swapaxes(2, 3) if turned else tile
                for i, put in enumerate(puts):
                    pairs = tile[:, i].reshape(warps, 8, 4, 2)[:, lane // 4, lane % 4]  # [warps, 32, 2]
                    put(m, np.ascontiguousarray(pairs).reshape(-1).view(np.uint32))

            return load
        get = [self.value(n, "b32") for n in parts]

        def store(m: Machine) -> None:
            tile = np.stack([g(m).view(np.uint16).reshape(warps, 8, 8) for g in get], 1)  # [warps, count, 8, 8]
            tile = tile.swapaxes(2, 3) if turned else tile
            m.store(rows(m), np.ascontiguousarray(tile).reshape(-1, 8), True)

        return store

    def mma(self, op: list[str], names: list[str]) -> Callable[[Machine], Any]:
        shape, kinds = op[3], op[6:10]
        warps, lane = self.threads // 32, np.arange(32)
        g, t = lane // 4, lane % 4
        puts = [self.target(n) for n in split_operands(names[0].strip("{} "))]
        a, b, c = ([self.value(n, "b32") for n in split_operands(x.strip("{} "))] for x in names[1:4])
        assert shape in ("m16n8k16", "m16n8k8"), shape
        half = kinds[1] in ("f16", "bf16")
        assert half == (shape == "m16n8k16") and (half or kinds[1] == "tf32"), op
        depth = 16 if half else 8

        def gather(m: Machine, get: list[Any]) -> Array:
            """Numbers [registers, warps, 32, halves] of a fragment, float32."""
            return floats(np.stack([x(m) for x in get]), kinds[1]).reshape(len(get), warps, 32, -1)

        def multiply(m: Machine) -> None:
            fa, fb = gather(m, a), gather(m, b)
            left = np.zeros((warps, 16, depth), np.float32)
            right = np.zeros((warps, depth, 8), np.float32)
            for i in range(len(a)):
                for h in range(fa.shape[3]):
                    k = (2 * t + h + 8 * (i // 2)) if half else (t + 4 * (i // 2))
                    left[:, g + 8 * (i % 2), k] = fa[i, :, :, h]
            for i in range(len(b)):
                for h in range(fb.shape[3]):
                    k = (2 * t + h + 8 * i) if half else (t + 4 * i)
                    right[:, k, g] = fb[i, :, :, h]
            product = left @ right
            if kinds[0] == "f16":
                old = np.stack([x(m) for x in c]).view(np.float16).reshape(2, warps, 32, 2).astype(np.float32)
                for i, put in enumerate(puts):
                    both = [product[:, g + 8 * i, 2 * t + h] + old[i, :, :, h] for h in range(2)]
                    put(m, np.ascontiguousarray(np.stack(both, -1).astype(np.float16)).reshape(-1).view(np.uint32))
                return
            for i, put in enumerate(puts):
                more = product[:, g + 8 * (i // 2), 2 * t + i % 2].reshape(-1)
                put(m, c[i](m).view(np.float32) + more)

        return multiply

    def wgmma(self, op: list[str], names: list[str]) -> Callable[[Machine], Any]:
        """Four warps a product of [64, depth] and [depth, wide]; the right side, often the left one too, in shared memory."""
        sizes = re.fullmatch(r"m64n(\d+)k(\d+)", op[4])
        assert sizes and op[6] == op[7] and op[6] in ("f16", "bf16", "tf32"), op
        wide, depth = map(int, sizes.groups())
        puts = [self.target(n) for n in split_operands(names[0].strip("{} "))]
        old = [self.value(n, "b32") for n in split_operands(names[0].strip("{} "))]
        left = [self.value(n, "b32") for n in split_operands(names[1].strip("{} "))] if "{" in names[1] else None
        turned = [bool(int(n)) for n in names[6:]]  # the left side's, if it is in shared memory, then the right side's
        assert names[4:6] == ["1", "1"], names
        keep = self.value(names[3], "pred")
        tiles = [None if left else self.value(names[1], "b64"), self.value(names[2], "b64")]
        groups, lane = self.threads // 128, np.arange(32)
        row, pair = lane // 4, lane % 4
        narrow = op[5] == "f16"

        def multiply(m: Machine) -> None:
            right = np.stack([tile(m, d, wide, depth, op[6], bool(turned[-1:] == [True])) for d in tiles[1](m)[::128]])
            if left:
                a = np.zeros((groups * 4, 16, depth), np.float32)
                for i, get in enumerate(left):
                    x = floats(get(m), op[6]).reshape(groups * 4, 32, -1)
                    for h in range(x.shape[2]):
                        k = 2 * pair + h + 8 * (i // 2) if op[6] != "tf32" else pair + 4 * (i // 2)
                        a[:, row + 8 * (i % 2), k] = x[:, :, h]
                a = a.reshape(groups, 64, depth)
            else:
                a = np.stack([tile(m, d, 64, depth, op[6], turned[:1] == [True]) for d in tiles[0](m)[::128]])
            product = (a @ right.swapaxes(1, 2)).reshape(groups * 4, 16, wide)
            for i, put in enumerate(puts):
                if narrow:
                    both = [product[:, row + 8 * (i % 2), 8 * (i // 2) + 2 * pair + h] for h in range(2)]
                    x, before = np.stack(both, -1).reshape(-1), old[i](m).view(np.float16)
                else:
                    x = product[:, row + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * pair + i % 2].reshape(-1)
                    before = old[i](m).view(np.float32)
                x = np.where(np.repeat(keep(m), 2 if narrow else 1), x + before, x)
                put(m, np.ascontiguousarray(x.astype(before.dtype)).view(np.uint32))

        return multiply

    def shuffle(self, op: list[str], names: list[str]) -> Callable[[Machine], Any]:
        source, by = self.value(names[1], "b32"), self.value(names[2], "u32")
        put, mode = self.target(names[0].split("|")[0]), op[2]
        assert (mode, int(names[3], 0)) in (("bfly", 31), ("idx", 31), ("up", 0)), (op, names)
        lane = np.arange(self.threads)

        def shuffle(m: Machine) -> None:
            at = by(m).astype(np.int64)
            if mode == "up":  # the first lanes of a warp keep their own
                put(m, source(m)[np.where((lane & 31) >= at, lane - at, lane)])
                return
            put(m, source(m)[(lane ^ at) if mode == "bfly" else (lane & ~31) | (at & 31)])

        return shuffle


class Registers(dict[str, Array]):
    """By name; one that is read before it is written, which is allowed where nothing comes of it, holds odd numbers."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def __missing__(self, name: str) -> Array:
        kind = self.program.kind(name)
        return np.full(self.program.threads, True if kind is np.bool_ else np.iinfo(kind).max // 7, kind)


class Machine:
    """One program of a grid at work."""

    def __init__(
        self, program: Program, memory: Memory, params: dict[str, int], place: Sequence[int], grid: Sequence[int]
    ) -> None:
        threads = program.threads
        self.program, self.memory, self.params = program, memory, params
        self.shared = np.full(program.shared_bytes, 0xAB, np.uint8)  # poison
        self.registers = Registers(program)
        self.guard: Array = None
        self.groups: list[list[Any]] = []
        self.loose: list[Any] = []
        self.jump = -1
        self.special = {"%tid.x": np.arange(threads, dtype=np.uint32), "%laneid": np.arange(threads, dtype=np.uint32) % 32}
        for axis, at, count in zip("xyz", place, grid, strict=True):
            self.special[f"%ctaid.{axis}"] = np.full(threads, at, np.uint32)
            self.special[f"%nctaid.{axis}"] = np.full(threads, count, np.uint32)

    def run(self) -> None:
        code, at, size = self.program.code, 0, len(self.program.code)
        with np.errstate(all="ignore"):
            while at < size:
                try:
                    done = code[at](self)
                except Exception as error:
                    raise type(error)(f"{self.program.text[at]}: {error}") from error
                if done == "end":
                    return
                at, self.jump = (self.jump if self.jump >= 0 else at + 1), -1

    def branch(self, label: str, taken: Array) -> None:
        if taken is not None and not taken.any():
            return
        assert taken is None or taken.all(), "threads part ways"
        self.jump = self.program.labels[label]

    def renew(self) -> None:
        self.loose = []

    def finish(self, keep: int) -> None:
        """Copy all groups of ``cp.async`` but the last ``keep``."""
        count = max(0, len(self.groups) - keep)
        for group in self.groups[:count]:
            for target, source, size, guard, there in group:
                data = self.load(source, size, False, guard & there)
                self.store(target, data.reshape(self.program.threads, size), True, guard)
        del self.groups[:count]

    def load(self, address: Array, size: int, shared: bool, mask: Array = None) -> Array:
        """Bytes [lanes * size]; zeros where masked."""
        mask = self.mask(len(address)) if mask is None else mask
        out = np.zeros((len(address), size), np.uint8)
        if mask.any():
            for data, lanes, offset in self.places(address, size, shared, mask):
                out[lanes] = data[offset[:, None] + np.arange(size)]
        return out.reshape(-1)

    def store(self, address: Array, values: Array, shared: bool, mask: Array = None) -> None:
        mask = self.mask(len(address)) if mask is None else mask
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(address), -1)
        if mask.any():
            for data, lanes, offset in self.places(address, raw.shape[1], shared, mask):
                data[offset[:, None] + np.arange(raw.shape[1])] = raw[lanes]

    def mask(self, lanes: int) -> Array:
        return np.ones(lanes, bool) if self.guard is None else self.guard

    def places(self, address: Array, size: int, shared: bool, mask: Array) -> list[tuple[np.ndarray, Array, Array]]:
        if not shared:
            return self.memory.places(address, size, mask)
        lanes = np.nonzero(mask)[0]
        at = address[lanes].astype(np.int64)
        assert not (at % size).any(), f"a shared access of {size} bytes is not aligned"
        assert at.min() >= 0 and at.max() + size <= len(self.shared), (
            f"shared memory: {at.max()} + {size} of {len(self.shared)}"
        )
        return [(self.shared, lanes, at)]


def tile(m: Machine, descriptor: Array, rows: int, depth: int, kind: str, turned: bool) -> Array:
    """Numbers [rows, depth] of an operand of wgmma in shared memory, by its matrix descriptor as the PTX manual lays it out."""
    bits = int(descriptor)
    start, leading, stride = ((bits >> by & 0x3FFF) << 4 for by in (0, 16, 32))
    size = 4 if kind == "tf32" else 2
    assert bits >> 62 == 0 or bits >> 49 & 7 == 0, "swizzled, with a base offset"
    span = (16, 128, 64, 32)[bits >> 62]  # bytes that are swizzled together
    row, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    if turned:  # ``row`` runs along memory
        chunk, inside = np.divmod(row * size, span)
        steps = (stride, leading) if span == 16 else (leading, stride)
        at = inside + chunk * steps[0] + k % 8 * span + k // 8 * steps[1]
    else:
        chunk, inside = np.divmod(k * size, 16)
        at = inside + chunk * (leading if span == 16 else 16) + row % 8 * span + row // 8 * stride
    at += start
    at ^= (at >> 7 & (span // 16 - 1)) << 4
    raw = m.load(at.reshape(-1).astype(np.uint64), size, True, np.ones(at.size, bool))
    return floats(raw.view(np.uint32 if size == 4 else np.uint16), kind).reshape(rows, depth)


def floats(x: Array, kind: str) -> Array:
    """float32 numbers in registers of a tensor core's operand."""
    if kind == "bf16":
        return wide_bf16(x)
    if kind == "f16":
        return np.ascontiguousarray(x).view(np.float16).astype(np.float32)
    return (x & np.uint32(0xFFFFE000)).view(np.float32)


def split_operands(text: str) -> list[str]:
    """At commas outside of brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if part.strip()]


def immediate(text: str, kind: Any) -> Any:
    size = np.dtype(kind).itemsize
    if text == "global_smem":
        return kind(0)
    if text.startswith("0f"):
        return (
            np.array(int(text[2:], 16), np.uint32).view(np.float32).astype(kind)
            if kind is np.float32
            else kind(int(text[2:], 16))
        )
    number = int(text.rstrip("U"), 0)
    return np.array(number & (2 ** (8 * size) - 1), RAW[size]).view(kind)


def permuted(a: Array, b: Array, selector: Array) -> Array:
    data = np.stack([np.ascontiguousarray(a), np.ascontiguousarray(b)], 1).view(np.uint8).reshape(-1, 8)
    out = np.zeros((len(data), 4), np.uint8)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = data[np.arange(len(data)), (pick & np.uint32(7)).astype(np.int64)]
        out[:, i] = np.where(pick & np.uint32(8), np.where(byte & 0x80, 0xFF, 0), byte)
    return out.reshape(-1).view(np.uint32)


def lut(a: Array, b: Array, c: Array, table: int) -> Array:
    out = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def shifted(x: Array, by: Array, width: int, left: bool) -> Array:
    kind = x.dtype.type
    few = np.minimum(by, width - 1).astype(kind)
    if left:
        return np.where(by >= width, kind(0), x << few)
    return x >> few if x.dtype.kind == "i" else np.where(by >= width, kind(0), x >> few)


def e4m3(x: Array) -> Array:
    """Halves of E4M3 bytes."""
    bits = x.astype(np.uint16)
    return (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).astype(np.uint16).view(np.float16) * np.float16(256)


def bf16(x: Array) -> Array:
    """Bits of the nearest bfloat16 of float32 numbers, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def wide_bf16(x: Array) -> Array:
    """float32 of bfloat16 bits, in pairs or single."""
    return (np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    return (np.sign(a) * np.sign(b) * (np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64)))).astype(a.dtype)


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "neu": np.not_equal, "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "lo": np.less, "hi": np.greater, "ls": np.less_equal, "hs": np.greater_equal,
}  # fmt: skip
REDUCE = {"min": np.minimum, "max": np.maximum, "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or}
LOGIC: dict[str, Any] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
FUNCTIONS: dict[str, Callable[..., Array]] = {
    "mov": lambda a: a.copy(), "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "not": np.invert,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "div": divide, "rem": lambda a, b: a - divide(a, b) * b,
    "min": lambda a, b: np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b),
    "max": lambda a, b: np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b),
    "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a), "rcp": lambda a: 1 / a,
}  # fmt: skip
