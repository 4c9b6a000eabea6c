"""Machine code of NVIDIA GPUs as the compiler leaves it in a cubin: instructions, jumps, loops.

The toolkit's disassemblers are not always installed, and what a budget needs is little: how many
instructions a loop has, and how many of them lie on the way that a thread usually takes through it.
From compute capability 7.0 on an instruction is 16 bytes and its low 12 bits say what it does.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

INSTRUCTION_BYTES = 16

# Opcodes with all forms of their operands (register, immediate, constant, uniform register).
BRANCH, BRANCH_UNIFORM = 0x947, 0x547
EXIT, RETURN, SYNC_PUSH, SYNC = 0x94D, 0x950, 0x945, 0x941
MUFU = frozenset({0x308, 0xD08})  # exponential, reciprocal, ...
STORE_GLOBAL, LOAD_GLOBAL = 0x986, 0x981
LOAD_SHARED = 0x984
COPY_ASYNC = 0xFAE
FENCE = 0x992
CALL = 0x944
WAIT_COPIES = 0x91A
BARRIER = 0xB1D  # of a block
MATRIX_PRODUCT = 0x23C  # mma.sync of 16-bit operands: HMMA
SHUFFLES = frozenset({0x389, 0x589, 0x989, 0xF89})

NEVER = 10**9  # a weight: no usual way leads through this instruction


@dataclass(frozen=True)
class Instruction:
    low: int
    high: int

    @property
    def opcode(self) -> int:
        return self.low & 0xFFF

    @property
    def is_wide_product(self) -> bool:
        return self.opcode & 0x1FF == 0x025

    @property
    def always(self) -> bool:
        """Executed whatever its predicates say: a jump that is always taken, for example."""
        return (
            self.low >> 12 & 15 == 7 and self.high >> 23 & 31 == 7 and self.opcode != BRANCH_UNIFORM
        )

    def jump(self, architecture: int) -> int:
        """Bytes from the next instruction to the one that a jump or SYNC_PUSH names."""
        if self.opcode == SYNC_PUSH:
            return _signed(self.low >> 32, 32)
        words = self.low >> 34 | (self.high & 0x3FFFF) << 30
        if architecture < 90:
            return _signed(words, 48) * 4
        return _signed(words << 8 | self.low >> 16 & 0xFF, 56) * 4

    @property
    def waits_for_all_copies(self) -> bool:
        return self.opcode == WAIT_COPIES and self.low >> 38 & 63 == 0

    @property
    def store_bytes(self) -> int:
        """Bytes that a global store writes per lane."""
        return (1, 1, 2, 2, 4, 8, 16, 16)[self.high >> 9 & 7]


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the sections of a 64-bit little-endian ELF file."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    for name, kind, _, _, offset, length in headers:
        start = headers[names][4] + name
        text = elf[start : elf.index(b"\0", start)].decode()
        yield text, b"" if kind == 8 else elf[offset : offset + length]  # 8: no bytes in the file


def kernels(cubin: bytes) -> dict[str, list[Instruction]]:
    """The instructions of each kernel of a cubin, by its mangled name."""
    found = {}
    for name, code in sections(cubin):
        if name.startswith(".text."):
            whole = len(code) - len(code) % INSTRUCTION_BYTES
            found[name.removeprefix(".text.")] = [
                Instruction(*struct.unpack_from("<QQ", code, at))
                for at in range(0, whole, INSTRUCTION_BYTES)
            ]
    return found


@dataclass
class Loop:
    header: int
    body: set[int]
    latches: set[int]


@dataclass
class Flow:
    """Where a kernel's instructions lead, and its loops, the longest first.

    Called subroutines (rare cases of division) are not followed. SYNC goes where the SYNC_PUSH of
    the same barrier register says.
    """

    code: list[Instruction]
    architecture: int
    successors: dict[int, list[int]] = field(default_factory=dict)
    back: set[tuple[int, int]] = field(default_factory=set)
    loops: list[Loop] = field(default_factory=list)
    order: list[int] = field(default_factory=list)  # successors first, without jumps back

    def __post_init__(self) -> None:
        self._walk()
        self._find_loops()

    def _successors(self, at: int, syncs: tuple[int, ...]) -> list[int]:
        one = self.code[at]
        following = [at + 1] if at + 1 < len(self.code) else []
        if one.opcode in (EXIT, RETURN):
            return [] if one.low >> 12 & 15 == 7 else following
        if one.opcode == SYNC:
            target = syncs[one.low >> 16 & 15]
            targets = [target] if target >= 0 else following
            return targets if one.low >> 12 & 15 == 7 else [*targets, *following]
        # sm_80 leaves loops by calls with a predicate, which do not return.
        if one.opcode in (BRANCH, BRANCH_UNIFORM) or (one.opcode == CALL and not one.always):
            target = at + 1 + one.jump(self.architecture) // INSTRUCTION_BYTES
            targets = [target] if 0 <= target < len(self.code) else []
            return targets if one.always else [*following, *targets]
        return following

    def _walk(self) -> None:
        """Depth first from the entry; a jump to an instruction that is still open leads back."""
        syncs: tuple[int, ...] = (-1,) * 16
        done: set[int] = set()
        stack: list[tuple[int, Iterator[int], tuple[int, ...]]] = []

        def enter(at: int, syncs: tuple[int, ...]) -> None:
            one = self.code[at]
            if one.opcode == SYNC_PUSH:
                target = at + 1 + one.jump(self.architecture) // INSTRUCTION_BYTES
                register = one.low >> 16 & 15
                syncs = (*syncs[:register], target, *syncs[register + 1 :])
            self.successors[at] = self._successors(at, syncs)
            stack.append((at, iter(self.successors[at]), syncs))

        if self.code:
            enter(0, syncs)
        open_ = {0}
        while stack:
            at, rest, syncs = stack[-1]
            target = next(rest, None)
            if target is None:
                stack.pop()
                open_.discard(at)
                done.add(at)
                self.order.append(at)
            elif target in open_:
                self.back.add((at, target))
            elif target not in done:
                open_.add(target)
                enter(target, syncs)

    def _find_loops(self) -> None:
        predecessors: dict[int, list[int]] = {}
        for at, targets in self.successors.items():
            for target in targets:
                predecessors.setdefault(target, []).append(at)
        latches: dict[int, set[int]] = {}
        for at, header in self.back:
            latches.setdefault(header, set()).add(at)
        for header, ends in latches.items():
            body, pending = {header}, list(ends)
            while pending:
                at = pending.pop()
                if at not in body:
                    body.add(at)
                    pending += predecessors.get(at, [])
            if body != {header}:  # the endless jump that pads a kernel
                self.loops.append(Loop(header, body, ends))
        self.loops.sort(key=lambda loop: (-len(loop.body), loop.header))

    def inside(self, loop: Loop) -> list[Loop]:
        return [other for other in self.loops if other is not loop and other.body < loop.body]

    def before(self, loop: Loop, some: set[int]) -> set[int]:
        """Instructions of a loop's body that lead to some of these in the same pass."""
        found: set[int] = set()
        for at in self.order:
            if at in loop.body:
                on = [x for x in self.successors[at] if x in loop.body and (at, x) not in self.back]
                if at in some or not found.isdisjoint(on):
                    found.add(at)
        return found

    def skippable(self, loop: Loop) -> dict[int, set[int]]:
        """Parts of a loop's body that a jump leaves out, by their first instruction."""
        # The next instruction on all ways to the end of a pass, and how many follow it so.
        meets: dict[int, int] = {}
        depth = {-1: 0}
        after: dict[int, list[int]] = {}
        for at in self.order:
            if at not in loop.body:
                continue
            targets = [
                target
                for target in self.successors[at]
                if target in depth and (at, target) not in self.back
            ]
            after[at] = targets + ([-1] if at in loop.latches else [])
            if not after[at]:
                continue
            common = after[at][0]
            for other in after[at][1:]:
                while common != other:
                    if depth[common] >= depth[other]:
                        common = meets[common]
                    else:
                        other = meets[other]
            meets[at], depth[at] = common, depth[common] + 1
        parts = {}
        for at, common in meets.items():
            if len(after[at]) != 2 or common not in after[at]:
                continue
            first = next((target for target in after[at] if target != common), None)
            if first is None:
                continue
            part, pending = set(), [first]
            while pending:
                one = pending.pop()
                if one not in part and one != common and one >= 0:
                    part.add(one)
                    pending += after.get(one, [])
            parts[first] = part
        return parts

    def way(
        self,
        loop: Loop,
        weight: dict[int, int],
        counted: frozenset[int] = frozenset(),
        most: int = 0,
    ) -> list[int]:
        """The way once around a loop with the least sum of weights; of equals, the shortest.

        A weight of an instruction may be negative: the way then leads through it if it can. Of the
        counted instructions it has as many as it can, but no more than `most`. Loops inside are
        passed at most once.
        """
        # best[at][n]: from `at` on with n counted instructions: weight, length, next instruction
        best: dict[int, dict[int, tuple[int, int, int | None]]] = {}
        for at in self.order:
            if at not in loop.body:
                continue
            own = at in counted
            here: dict[int, tuple[int, int, int | None]] = {}
            ends = [(0, (0, 0, None))] if at in loop.latches else []
            for target in self.successors[at]:
                if target in best and (at, target) not in self.back:
                    ends += [(n, (w, length, target)) for n, (w, length, _) in best[target].items()]
            for n, (w, length, target) in ends:
                found = (w + weight.get(at, 0), length + 1, target)
                if n + own <= most and found[:2] < here.get(n + own, (NEVER,))[:2]:
                    here[n + own] = found
            if here:
                best[at] = here
        way: list[int] = []
        at: int | None = loop.header
        left = max(best.get(loop.header, {0: None}))
        while at is not None and at in best:
            way.append(at)
            at, left = best[at][left][2], left - (at in counted)
        return way
