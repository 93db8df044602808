"""What a compiled program says of itself: what devices send each other, and its compiler's guess of time.

Read off XLA's text, in which a computation stands once however often it runs: a loop's body counts as often
as its condition says.
"""

import collections
import re
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Starts of overlapped collectives whose results repeat their operands.
_WITH_OPERANDS = ("all-gather-start", "reduce-scatter-start", "collective-permute-start")
_BYTES = {
    "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "pred": 1, "s8": 1, "u8": 1,
    "s64": 8, "u64": 8, "f64": 8, "token": 0,
}  # fmt: skip
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?(\S+) = (.*?) ([a-z][\w-]*)\(")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    """What devices send each other at one place of a program.

    Attributes:
      kind: one of KINDS.
      bytes: of its results on one device, each time.
      times: how often it runs.
      axes: of the mesh, along which it goes.
      group: how many devices take part in one.
    """

    kind: str
    bytes: int
    times: int
    axes: tuple[str, ...]
    group: int

    @property
    def sent(self) -> int:
        """Bytes that a device sends in all, by the algorithms that send least."""
        others = self.group - 1
        share = {
            "all-reduce": 2 * others / self.group,
            "all-gather": others / self.group,
            "reduce-scatter": others,
            "all-to-all": others / self.group,
        }.get(self.kind, 1)
        return int(self.bytes * self.times * share)


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      lines: of every computation by name; the entry's name is ENTRY.
      times: how often each computation runs in one run of the program.
    """

    lines: dict[str, list[str]]
    times: dict[str, int]


def read(text: str) -> Program:
    """A program by its text.

    Args:
      text: of a compiled program.
    """
    lines = _computations(text)
    return Program(lines, _executions(lines))


def collectives(program: Program, mesh: dict[str, int]) -> list[Collective]:
    """Everything that devices send each other in a program.

    Args:
      program: as `read`.
      mesh: size of every axis, in order; the program's devices are the mesh's, row by row.
    """
    (bodies, times), found = program, {}
    fused = {
        callee
        for lines in bodies.values()
        for line in lines
        for how, callee in _CALLED.findall(line)
        if how == "calls"
    }
    for name, lines in bodies.items():
        for line in lines:
            match = _INSTRUCTION.match(line)
            kind = match and match[3].removesuffix("-start")
            if not match or kind not in KINDS or not times[name]:
                continue
            group = _first_group(line, int(np.prod(list(mesh.values()))))
            axes = _axes(group, mesh)
            one = Collective(kind, _size(match[2], match[3]), times[name], axes, len(group))
            # One that libtpu overlaps stands in every piece of work beside it, each time with its channel.
            channel = re.search(r"channel_id=(\d+)", line) if name in fused else None
            key = channel[1] if channel else match[1]
            found[key] = max(found.get(key, one), one, key=lambda c: (c.times, c.bytes))
    return list(found.values())


def cycles(program: Program) -> float:
    """The TPU compiler's estimate of all fused work in cycles; collectives and Pallas kernels have none."""
    total = 0.0
    for name, lines in program.lines.items():
        for line in lines:
            total += program.times[name] * (_estimate(line) or 0)
    return total


def unestimated(program: Program) -> int:
    """Bytes that work without `cycles` reads and writes: rows read by index, sorts, Pallas kernels.

    An array of which some rows are read counts whole. Collectives are not among it.
    """
    total = 0
    fused = {
        callee
        for lines in program.lines.values()
        for line in lines
        for how, callee in _CALLED.findall(line)
        if how in ("calls", "to_apply")
    }
    for name in program.lines.keys() - fused:
        sizes: dict[str, int] = {}
        for line in program.lines[name]:
            if not (match := _INSTRUCTION.match(line)):
                continue
            sizes[match[1]] = size = _size(match[2], match[3])
            if _estimate(line) is not None or not _is_work(line, match[3]):
                continue
            operands = line[match.end() :].partition(")")[0]
            size += sum(sizes.get(one, 0) for one in re.findall(r"%?([\w.-]+)", operands))
            total += program.times[name] * size
    return total


def _estimate(line: str) -> int | None:
    """The cycles of an instruction; None where there are none, for which some compilers write 2^63 - 1."""
    found = re.search(r'"estimated_cycles":"(\d+)"', line)
    return int(found[1]) if found and int(found[1]) < 2**63 - 1 else None


def _is_work(line: str, operation: str) -> bool:
    """Whether an instruction moves numbers that are not counted elsewhere, as those of a loop's body are."""
    if operation == "custom-call":
        return 'custom_call_target="tpu_custom_call"' in line
    return operation in ("fusion", "gather", "scatter", "sort")


def _computations(text: str) -> dict[str, list[str]]:
    found, lines = {}, None
    for line in text.splitlines():
        if lines is None and line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)):
            lines = found.setdefault("ENTRY" if head[1] else head[2], [])
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return found


def _executions(bodies: dict[str, list[str]]) -> dict[str, int]:
    callers = collections.defaultdict(list)
    for name, lines in bodies.items():
        for line in lines:
            called = dict(_CALLED.findall(line))
            trips = _trips(line, bodies.get(called["condition"], []), bodies) if "body" in called else 1
            for callee in called.values():
                callers[callee].append((name, trips))
            for branches in _BRANCHES.findall(line):
                for callee in branches.replace("%", "").split(","):
                    callers[callee.strip()].append((name, 1))

    counts: dict[str, int] = {"ENTRY": 1}

    def count(name: str) -> int:
        if name not in counts:
            counts[name] = sum(count(caller) * trips for caller, trips in callers[name])
        return counts[name]

    return {name: count(name) for name in bodies}


def _trips(line: str, condition: list[str], bodies: dict) -> int:
    """How often a loop from 0 on runs: as the compiler notes, else up to its condition's constant."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(known[1])
    inner = [bodies.get(name, []) for one in condition for _, name in _CALLED.findall(one)]
    for one in [*condition, *(one for lines in inner for one in lines)]:
        if constant := re.search(r"[su]32\[\]\S* constant\((\d+)\)", one):
            return int(constant[1])
    return 1


def _size(result: str, operation: str) -> int:
    """Bytes of a result; of the start of an overlapped collective, of what it brings, not of its operand."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
    sizes = [_BYTES[dtype] * int(np.prod([int(n) for n in shape.split(",") if n])) for dtype, shape in arrays]
    if operation in _WITH_OPERANDS and len(sizes) > 1:
        sizes = [size for (dtype, shape), size in zip(arrays, sizes) if shape or dtype != "u32"]
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def _first_group(line: str, n_devices: int) -> list[int]:
    """The devices that take part in a collective together with the first."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        found = [(int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", pairs[1])]
        return list(next((pair for pair in found if pair[0] != pair[1]), (0,)))
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(n) for n in groups[1].split(",")]
    if grid := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims = ([int(n) for n in grid[i].split(",")] for i in (1, 2))
        ids = np.arange(np.prod(dims)).reshape(dims)
        if grid[3]:
            ids = ids.transpose([int(n) for n in grid[3].split(",")])
        return ids.reshape(shape)[0].tolist()
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values()))
        where = tuple(slice(None) if f"'{name}'" in named[2] else 0 for name in sizes)
        return ids[where].reshape(-1).tolist()
    return list(range(n_devices))


def _axes(group: list[int], mesh: dict[str, int]) -> tuple[str, ...]:
    places = np.unravel_index(group, list(mesh.values()))
    return tuple(name for name, place in zip(mesh, places) if len(set(place.tolist())) > 1)
