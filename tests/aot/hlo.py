"""Reads the text of an optimised XLA program: memory traffic, buffers, operations.

`Compiled.cost_analysis()` counts the body of a loop once, however often it runs, and is
absent for GPU programs compiled without a GPU. The scheduled text has what is needed to
do better: every instruction outside a fusion reads its operands from memory and writes
its result to memory, a loop says or shows how often it runs, and a layout says which
buffers live on the chip (`S(1)`) and cost no traffic.

The count is a model, not a measurement: sizes are without padding, and caches are taken
to hold nothing between two instructions.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

# Instructions that move no data: they name, group or wait for buffers.
_FREE = frozenset(
    {
        "after-all",
        "bitcast",
        "constant",
        "get-tuple-element",
        "opt-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
    }
)
_CONTROL_FLOW = frozenset({"call", "conditional", "while"})
# Inside a fusion: the same values by another name, or in another order of the memory.
_RENAMES = frozenset({"bitcast", "copy"})
_SLICES = frozenset({"slice", "dynamic-slice", "gather"})
_ASYNC_COPIES = frozenset({"copy-start", "slice-start", "dynamic-slice-start"})

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\)\s*->\s*.*\{\s*")
_INSTRUCTION = re.compile(r"\s+(ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)")
_OPERATION = re.compile(r"\s*([\w\-]+)\((.*)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's type."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The size without padding, wherever the array lives."""
        return math.ceil(self.elements * _item_bytes(self.dtype))

    @property
    def memory_bytes(self) -> int:
        """The size if the array lives in the device's main memory, else 0."""
        return 0 if self.on_chip else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        """The size of the result, wherever it lives."""
        return sum(array.bytes for array in self.arrays)

    @property
    def memory_bytes(self) -> int:
        """The size of the part of the result that lives in main memory."""
        return sum(array.memory_bytes for array in self.arrays)

    def called(self, attribute: str) -> str:
        """The name of the computation that an attribute such as `body` points to."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        if match is None:
            raise ValueError(f"{self.name}: no attribute {attribute}.")
        return match.group(1)


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A parsed program: its computations by name, and the name of the first to run."""

    computations: Mapping[str, Computation]
    entry: str

    @property
    def opcodes(self) -> frozenset[str]:
        """Every operation used anywhere, inside fusions too."""
        return frozenset(instruction.opcode for _, instruction in self._all())

    @property
    def custom_calls(self) -> frozenset[str]:
        """The targets of all custom calls."""
        pattern = re.compile(r'custom_call_target="([^"]*)"')
        targets = (pattern.search(line.attributes) for _, line in self._all())
        return frozenset(target.group(1) for target in targets if target)

    @property
    def matmul_dtypes(self) -> frozenset[tuple[str, ...]]:
        """The operand types of every matrix product (TPUs call it a convolution)."""
        return frozenset(
            tuple(computation[name].arrays[0].dtype for name in product.operands[:2])
            for computation, product in self._all()
            if product.opcode in ("dot", "convolution")
        )

    @property
    def matmul_flops(self) -> int:
        """Floating-point operations of all matrix products in one run.

        A product that a library does, a custom call, is not among them.
        """
        return sum(
            repetitions * _product_flops(instruction, computation)
            for name, repetitions in self._executed(self.entry, 1)
            for computation, instruction in self._nested(name)
            if instruction.opcode in ("dot", "convolution")
        )

    def _all(self) -> Iterator[tuple[Computation, Instruction]]:
        """Yields every instruction with the computation that it is part of."""
        for computation in self.computations.values():
            for instruction in computation.values():
                yield computation, instruction

    def buffers(self, dtype: str | None, elements: int) -> list[str]:
        """Names the instructions that write such an array to main memory.

        Instructions inside fusions are left out: their results never exist as a whole.

        Args:
          dtype: the element type in XLA's spelling, such as `f32` or `bf16`; `None`
            for any.
          elements: arrays with at least so many elements count, whatever their shape.

        Returns:
          `name type` of each, for a readable assertion.
        """
        return [
            f"{instruction.name} {array.dtype}{list(array.shape)}"
            for computation, _ in self._executed(self.entry, 1)
            for instruction in self.computations[computation].values()
            for array in instruction.arrays
            if instruction.opcode not in _FREE
            and dtype in (None, array.dtype)
            and array.elements >= elements
            and not array.on_chip
        ]

    @property
    def traffic(self) -> int:
        """Bytes moved between the chip and its main memory in one run."""
        return sum(self.traffic_by_instruction.values())

    @functools.cached_property
    def traffic_by_instruction(self) -> collections.Counter[str]:
        """The bytes of `traffic`, by instruction, over all its repetitions."""
        traffic = collections.Counter()
        for name, repetitions in self._executed(self.entry, 1):
            computation = self.computations[name]
            for instruction in computation.values():
                moved = repetitions * self._moved(instruction, computation)
                if moved:
                    traffic[f"{instruction.opcode} {instruction.name}"] += moved
        return traffic

    def _executed(self, name: str, repetitions: int) -> Iterator[tuple[str, int]]:
        """Yields the computations that run, as against those fused, and how often."""
        yield name, repetitions
        for instruction in self.computations[name].values():
            match instruction.opcode:
                case "while":
                    trips = self._trip_count(instruction)
                    body = instruction.called("body")
                    yield from self._executed(body, repetitions * trips)
                case "call":
                    called = instruction.called("to_apply")
                    yield from self._executed(called, repetitions)
                case "conditional":
                    yield from self._executed(
                        max(_branches(instruction), key=self._total), repetitions
                    )

    def _total(self, name: str) -> int:
        """The traffic of one computation and all it runs."""
        return Module(self.computations, name).traffic

    def _trip_count(self, loop: Instruction) -> int:
        """How often a loop's body runs."""
        known = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.attributes)
        if known:
            return int(known.group(1))
        # The TPU compiler leaves no such note, but the loops that JAX builds count from
        # zero in steps of one and stop at `counter < N`, the condition's one constant.
        condition = [line for _, line in self._nested(loop.called("condition"))]
        limits = [
            int(line.arguments)
            for line in condition
            if line.opcode == "constant" and line.arguments.isdecimal()
        ]
        if len(limits) == 1 and any("direction=LT" in i.attributes for i in condition):
            return limits[0]
        raise ValueError(f"{loop.name}: the trip count cannot be read from the text.")

    def _nested(self, name: str) -> Iterator[tuple[Computation, Instruction]]:
        """Yields the instructions of a computation and of the fusions in it."""
        computation = self.computations[name]
        for instruction in computation.values():
            yield computation, instruction
            if instruction.opcode in ("fusion", "async-start"):
                yield from self._nested(instruction.called("calls"))

    def _moved(self, instruction: Instruction, computation: Computation) -> int:
        """The bytes that one execution of an instruction moves."""
        operands = [computation[name] for name in instruction.operands]
        opcode = instruction.opcode
        if opcode in _FREE | _CONTROL_FLOW:
            return 0
        if opcode.endswith(("-done", "-update")) and opcode != "dynamic-update-slice":
            return 0  # The matching start was charged.
        if opcode in _SLICES:
            return _copied(instruction.arrays[0], operands[0])
        if opcode == "dynamic-update-slice":  # In place: the rest stays as it is.
            return _copied(instruction.arrays[0], operands[1], operands[1].bytes)
        if opcode in _ASYNC_COPIES:  # The type is (destination, source, context).
            return _copied(instruction.arrays[0], operands[0])
        if opcode in ("fusion", "async-start"):
            fused = self.computations[instruction.called("calls")]
            read = sum(
                self._read(_parameter(fused, index), fused)
                for index, operand in enumerate(operands)
                if operand.memory_bytes
            )
            return read + self._written(instruction, fused)
        if opcode.endswith("-start"):  # A collective: the type holds both ends.
            return instruction.memory_bytes
        return instruction.memory_bytes + sum(
            operand.memory_bytes for operand in operands
        )

    def _read(self, source: Instruction, fused: Computation) -> int:
        """The bytes that a fused computation reads of one of its values.

        A value of which only slices are used is read in slices, and one that is updated
        in place is not read at all.
        """
        if source.is_root:
            return source.bytes
        total = 0
        for user in fused.values():
            for index, operand in enumerate(user.operands):
                if operand != source.name:
                    continue
                if user.opcode in _SLICES and index == 0:
                    total += user.bytes
                elif user.opcode == "dynamic-update-slice" and index == 0:
                    continue
                elif user.opcode in _RENAMES:
                    total += self._read(user, fused)
                elif user.opcode == "fusion":
                    inner = self.computations[user.called("calls")]
                    parameter = _parameter(inner, index)
                    if _renamed(inner) == parameter:
                        total += self._read(user, fused)
                    else:
                        total += self._read(parameter, inner)
                else:
                    return source.bytes
        return min(total, source.bytes)

    def _written(self, instruction: Instruction, fused: Computation) -> int:
        """The bytes that a fusion writes: of an update in place, the update alone."""
        root = next(inner for inner in fused.values() if inner.is_root)
        if instruction.opcode == "async-start":
            # The type is ((operands), result, context), so the root's own type counts,
            # which has the size but not the place: the result is the one before last.
            return root.bytes
        results = [fused[name] for name in root.operands]
        if root.opcode != "tuple":
            results = [root]
        if len(results) != len(instruction.arrays):  # A tuple nested in the result.
            return instruction.memory_bytes
        return sum(
            self._updated(result, fused)
            for result, array in zip(results, instruction.arrays, strict=True)
            if not array.on_chip
        )

    def _updated(self, result: Instruction, fused: Computation) -> int:
        """The bytes that change when a fused result is written."""
        if result.opcode == "bitcast":
            return self._updated(fused[result.operands[0]], fused)
        if result.opcode == "dynamic-update-slice":
            return fused[result.operands[1]].bytes
        if result.opcode == "fusion":
            return self._written(result, self.computations[result.called("calls")])
        return result.bytes


def parse(text: str) -> Module:
    """Parses the text of a compiled program.

    Args:
      text: what `Compiled.as_text()` returns.

    Returns:
      The program. Fusions and loop bodies are computations of their own.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations = {}
    entry = None
    current = {}
    for line in text.splitlines():
        if header := _COMPUTATION.fullmatch(line):
            current = computations.setdefault(header.group(2), {})
            if header.group(1):
                entry = header.group(2)
            continue
        match = _INSTRUCTION.fullmatch(line)
        if match and (instruction := _instruction(*match.groups())):
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("parse: the text has no ENTRY computation.")
    return Module(computations, entry)


def _instruction(root: str | None, name: str, rest: str) -> Instruction | None:
    """Parses `type opcode(arguments), attributes`, the part after the equals sign."""
    # The type of an array holds no blank, that of a tuple does.
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    operation = _OPERATION.fullmatch(rest[end:])
    if operation is None:
        return None
    opcode, tail = operation.groups()
    end_of_arguments = _closing("(" + tail, 0) - 1
    arguments = tail[:end_of_arguments]
    return Instruction(
        name=name,
        opcode=opcode,
        arrays=tuple(
            Array(
                dtype=dtype,
                shape=tuple(int(size) for size in shape.split(",") if size),
                on_chip="S(1)" in layout,
            )
            for dtype, shape, layout in _ARRAY.findall(rest[:end])
        ),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=tail[end_of_arguments + 1 :],
        is_root=root is not None,
    )


def _closing(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _item_bytes(dtype: str) -> float:
    """The size of an element: XLA spells the number of bits in the type's name."""
    if dtype in ("token", "opaque"):
        return 0
    bits = re.search(r"\d+", dtype)
    return int(bits.group()) / 8 if bits else 1  # `pred` takes a byte.


def _product_flops(product: Instruction, computation: Computation) -> int:
    """Two operations for every element of the result and every term of its sum."""
    left, right = (computation[name].arrays[0] for name in product.operands[:2])
    if product.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes)
        listed = axes.group(1).split(",") if axes else []
        terms = math.prod(left.shape[int(axis)] for axis in listed if axis)
    else:  # The sum is over all of the right operand's axes but that of the outputs.
        labels = re.search(r"dim_labels=\w+_(\w+)->", product.attributes)
        if labels is None:
            raise ValueError(f"{product.name}: no dim_labels.")
        terms = right.elements // right.shape[labels.group(1).index("o")]
    return 2 * product.arrays[0].elements * terms


def _copied(result: Array, source: Instruction, size: int | None = None) -> int:
    """The traffic of a copy: one read and one write, each if in main memory."""
    size = result.bytes if size is None else size
    return size * ((source.memory_bytes > 0) + (result.memory_bytes > 0))


def _parameter(fused: Computation, index: int) -> Instruction:
    """The parameter of a fused computation that stands for operand `index`."""
    return next(
        instruction
        for instruction in fused.values()
        if instruction.opcode == "parameter" and instruction.arguments == str(index)
    )


def _renamed(fused: Computation) -> Instruction:
    """What the result of a fused computation is another name of, itself if nothing."""
    result = next(inner for inner in fused.values() if inner.is_root)
    while result.opcode in _RENAMES:
        result = fused[result.operands[0]]
    return result


def _branches(conditional: Instruction) -> list[str]:
    """The names of a conditional's branches."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
    if listed:
        return re.findall(r"[\w.\-]+", listed.group(1))
    return [conditional.called(f"{side}_computation") for side in ("true", "false")]
