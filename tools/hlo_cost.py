"""
What one step costs on a TPU, read from what libtpu wrote when it compiled it. Text in, milliseconds out: no jax, no TPU.

Every operation of the optimised HLO, in its scheduled order and as often as it runs, gets its time from the first of these:
- the compiler's own `estimated_cycles`, at the chip's clock;
- for a collective, its bytes over the links of the chip;
- for an asynchronous copy between HBM and VMEM, its bytes over the HBM bandwidth;
- for the rest (Pallas kernels, gathers, scatters, sorts, some reshapes) a lower bound: the VLIW bundles of its final program, each
  loop's body times its trips, or its bytes over the HBM bandwidth where that is longer. Waits for memory are not in the bundles.
Whatever is left is listed as not estimated. A clock runs along: a transfer that is started and waited for later costs only what
the operations in between do not hide.
"""
import dataclasses
import math
import operator
import re
import sys
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from chips import CHIPS, Chip

# Every TPU of chips.py is a mesh without wrap-around (only axes of 16 chips wrap), so that a corner chip has two of its links. libtpu's
# collectives run as two rings over the chips, one in each direction ("UniDirection1DRingStrategy{colors:2"), which is those two links.
RINGS = 2

KINDS = ("matmuls", "elementwise", "copies", "kernels", "collectives")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "ragged-all-to-all",
               "reduce-scatter")
MOVERS = {"bitcast", "broadcast", "concatenate", "copy", "dynamic-slice", "dynamic-update-slice", "get-tuple-element", "pad", "reshape",
          "reverse", "slice", "transpose", "tuple"}
READ_IN_PART, WRITTEN_IN_PART = {"gather", "slice", "dynamic-slice"}, {"scatter", "dynamic-update-slice"}
FREE = {"add-dependency", "after-all", "bitcast", "constant", "get-tuple-element", "opt-barrier", "parameter", "partition-id", "replica-id",
        "tuple"}
FREE_TARGETS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "GatherScatterIndicesBitpacked", "Sharding"}
BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128}  # the others end in their width: f32, bf16, s8, f8e4m3 ...

# -----------------------------------------------------------------------------
# HLO text

def arrays(shape: str) -> list[tuple[int, int, int]]:
    """(elements, bytes, memory space) of each array in a shape. Spaces: 0 HBM, 1 VMEM, the others are scalar memories and flags."""
    found = []
    for dtype, dims, layout in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^{}]*\})?", shape):
        n = math.prod(int(d) for d in dims.split(",") if d)
        bits = BITS.get(dtype) or int((re.match(r"[a-z]+(\d+)", dtype) or [0, 0])[1])
        space = re.search(r"S\((\d+)\)", layout)
        found.append((n, n * bits // 8, int(space.group(1)) if space else 0))
    return found


def element(shape: str, index: str) -> str:
    """The array at an index such as "{1}" or "{0,2}" of a tuple's shape; the shape itself for "{}" or nothing."""
    for i in re.findall(r"\d+", index):
        parts, depth, part = [], 0, ""
        for c in re.sub(r"/\*.*?\*/", "", shape)[1:-1]:
            depth += (c in "([{") - (c in ")]}")
            parts, part = (parts + [part], "") if c == "," and not depth else (parts, part + c)
        parts.append(part)
        if int(i) >= len(parts):
            return shape
        shape = parts[int(i)].strip()
    return shape


def nbytes(shape: str, space: int | None = None) -> int:
    """Bytes of a shape without the padding of its tiles; with a space, only what lies there."""
    return sum(b for _, b, s in arrays(shape) if space is None or s == space)


def closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at start."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


@dataclasses.dataclass
class Op:
    """One instruction."""
    name: str
    shape: str
    opcode: str
    operands: list[str]
    literal: str  # what stands between the parentheses: the value of a constant, the number of a parameter
    attrs: str
    root: bool

    def attr(self, pattern: str) -> str | None:
        m = re.search(pattern, self.attrs)
        return m and m.group(1)

    @cached_property
    def cycles(self) -> int | None:
        cycles = self.attr(r'"estimated_cycles":"(\d+)"')
        return cycles and int(cycles)

    @property
    def target(self) -> str | None:
        return self.attr(r'custom_call_target="([^"]*)"')

    @cached_property
    def callees(self) -> list[str]:
        """The computations whose instructions are this one's work: not the scalar function of a reduction or collective."""
        one = re.findall(r"\b(?:calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)", self.attrs)
        many = [n.strip(" %") for g in re.findall(r"\bbranch_computations=\{([^}]*)\}", self.attrs) for n in g.split(",")]
        return one + many + (re.findall(r"to_apply=%?([\w.\-]+)", self.attrs) if self.opcode in ("call", "call-start") else [])


def parse_op(line: str) -> Op | None:
    m = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
    if not m:
        return None
    rest = line[m.end():]
    end = closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    call = re.compile(r"\s*([a-z][\w\-]*)\(").match(rest, end)
    if not call:
        return None
    stop = closing(rest, call.end() - 1)
    inside = rest[call.end():stop]
    return Op(m.group(2), rest[:end], call.group(1), re.findall(r"%([\w.\-]+)", inside), inside, rest[stop + 1:], bool(m.group(1)))


class Module:
    """
    The computations of an HLO text, each a dict of instructions in scheduled order. kernels: {instruction: name of the kernel it calls}.
    """

    def __init__(self, text: str, kernels: dict[str, str] | None = None):
        self.computations, self.entry, self.kernels, ops = {}, None, kernels or {}, None
        partitions = re.search(r"num_partitions=(\d+)", text[:100_000])
        self.devices = int(partitions.group(1)) if partitions else 1
        for line in text.splitlines():
            if ops is None:
                head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
                if head and not line.startswith(("HloModule", " ")):
                    ops = self.computations[head.group(2)] = {}
                    self.entry = head.group(2) if head.group(1) else self.entry
            elif line.startswith("}"):
                ops = None
            elif op := parse_op(line):
                ops[op.name] = op
        if self.entry is None:
            raise ValueError("no ENTRY computation in the HLO text")

    def root(self, computation: str) -> Op:
        ops = list(self.computations[computation].values())
        return next((op for op in ops if op.root), ops[-1])

    def inside(self, op: Op) -> list[Op]:
        """All instructions of the computations that op calls, fusions within fusions included."""
        return [y for c in op.callees for x in self.computations.get(c, {}).values() for y in [x, *self.inside(x)]]

    def operand_shapes(self, op: Op, computation: str) -> list[str]:
        ops = self.computations[computation]
        return [ops[name].shape for name in op.operands if name in ops]

    def source(self, op: Op) -> str:
        """
        A kernel's name; else op_name and file:line that the front end gave it, or the first of them within the fusion. No folders but a
        package's. Of what JAX lowered no line: it has numbers of JAX's own table of lines, which XLA looks up in torch_xla's.
        """
        if op.name in self.kernels:
            return self.kernels[op.name]
        for x in [op, *self.inside(op)]:
            name, file, line = x.attr(r'op_name="([^"]*)"'), x.attr(r'source_file="([^"]*)"'), x.attr(r"source_line=(\d+)")
            if name and name.startswith("xla__computation/jit("):
                file = None
            if name or file:
                file = file and re.sub(r".*/(?=[^/]*$)" if "-packages/" not in file else r".*-packages/", "", file)
                return " ".join(filter(None, [name, file and f"{file}:{line}"]))
        return ""

    def signature(self, op: Op, computation: str) -> str:
        """Equal for instructions that libtpu emits only once: the same work on the same shapes in the same memories."""
        def text(x, within):
            attrs = re.sub(r", metadata=\{[^}]*\}|, sharding=\{[^}]*\}|channel_id=\d+", "", x.attrs)
            attrs = re.sub(r"\b(calls|to_apply|body|condition)=%?[\w.\-]+", "", attrs)
            parts = [x.opcode, x.shape, attrs, *self.operand_shapes(x, within)]
            parts += [x.literal] if x.opcode in ("constant", "parameter") else []
            return "|".join(parts + [text(y, c) for c in x.callees for y in self.computations.get(c, {}).values()])
        return re.sub(r"%[\w.\-]+", "%", text(op, computation))

    # -- trip counts

    def constant(self, computation: str, name: str) -> int | None:
        """The integer behind a name, through the copies and conversions that the compiler puts around scalars."""
        ops = self.computations[computation]
        while name in ops:
            op = ops[name]
            if op.opcode == "constant":
                return int(op.literal) if re.fullmatch(r"-?\d+", op.literal) else None
            if op.opcode not in ("copy", "convert", "bitcast", "reshape", "broadcast") or not op.operands:
                return None
            name = op.operands[0]
        return None

    def counter(self, computation: str, name: str) -> int | None:
        """Which element of the loop's state a name of its body or condition is."""
        ops = self.computations[computation]
        while name in ops and ops[name].opcode in ("copy", "convert", "bitcast"):
            name = ops[name].operands[0]
        op = ops.get(name)
        is_state = op and op.opcode == "get-tuple-element" and op.operands[0] in ops and ops[op.operands[0]].opcode == "parameter"
        return int(op.attr(r"index=(\d+)")) if is_state else None

    def unfused(self, op: Op, computation: str, opcode: str) -> tuple[Op, list] | None:
        """op, or the single instruction of this opcode that its fusion holds, with (computation, name) of each operand."""
        if op.opcode == opcode:
            return op, [(computation, n) for n in op.operands]
        if op.opcode in ("copy", "bitcast", "convert") and op.operands[0] in self.computations[computation]:
            return self.unfused(self.computations[computation][op.operands[0]], computation, opcode)
        if op.opcode != "fusion":
            return None
        inner = self.computations[op.callees[0]]
        found = [x for x in inner.values() if x.opcode == opcode]
        if len(found) != 1:
            return None
        outer = lambda n: (computation, op.operands[int(inner[n].literal)]) if inner[n].opcode == "parameter" else (op.callees[0], n)
        return found[0], [outer(n) for n in found[0].operands]

    def trips(self, loop: Op, computation: str) -> int | None:
        """How often a while loop runs its body, from the compiler's note, else from its condition, start and step; None if unknowable."""
        if known := loop.attr(r'"known_trip_count":\{"n":"?(\d+)'):
            return int(known)
        condition, body = loop.attr(r"condition=%?([\w.\-]+)"), loop.attr(r"body=%?([\w.\-]+)")
        test = self.unfused(self.root(condition), condition, "compare")
        if not test:
            return None
        compare, (left, right) = test
        index, limit, direction = self.counter(*left), self.constant(*right), compare.attr(r"direction=(\w+)")
        if index is None or limit is None:
            index, limit = self.counter(*right), self.constant(*left)
            direction = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}.get(direction, direction)
        initial, after = self.computations[computation].get(loop.operands[0]), self.root(body)
        if index is None or limit is None or not initial or initial.opcode != "tuple" or after.opcode != "tuple":
            return None
        start = self.constant(computation, initial.operands[index])
        update = next((u for o in ("add", "subtract")
                       if (u := self.unfused(self.computations[body][after.operands[index]], body, o))), None)
        if start is None or not update:
            return None
        op, (left, right) = update
        if self.counter(*left) != index:
            left, right = right, left
        step = self.constant(*right)
        if not step or self.counter(*left) != index or (op.opcode == "subtract" and left != update[1][0]):
            return None
        step = -step if op.opcode == "subtract" else step
        past = {"LT": limit, "LE": limit + 1, "GT": limit, "GE": limit - 1, "NE": limit}.get(direction)
        return None if past is None else max(0, math.ceil((past - start) / step))

# -----------------------------------------------------------------------------
# Final bundles (libtpu's --xla_jf_dump_llo_text)

def region_shares(text: str) -> list[tuple[int, int, float]]:
    """
    (first bundle, last bundle, share of a grid's steps that run it) of each region of a kernel that runs only at some index of its grid.
    The numbers of forward targets are from before the last packing; what they lead to is marked PF, in their order.
    """
    bounds = re.search(r"iteration_bounds: \(([\d, ]+)\)", text)
    index = {name: int(bounds.group(1).split(",")[int(d)]) for name, d in
             re.findall(r"%(\w+) = sphi [^;{}]*iteration index, stage = \d+ iter bound = (\d+) \*/", text)} if bounds else {}
    slots = {slot: index[name] for slot, name in re.findall(r"sst \[smem:\[#(\w+_spill)\]\] %(\w+)", text) if name in index}
    index |= {name: slots[slot] for name, slot in re.findall(r"%(\w+) = sld \[smem:\[#(\w+_spill)\]\]", text) if slot in slots}
    tests = {p: (getattr(operator, relation), index[i], int(n)) for p, relation, i, n in
             re.findall(r"%(\w+) = scmp\.(ne|eq|lt|le|gt|ge)\.s32\.totalorder (?:\([^)]*\), )?%(\w+), (\d+)\b", text) if i in index}
    back = set(re.findall(r"%(\w+) = scmp\.ge\.s32\.totalorder [^;{}]*/\* loop exit test", text))
    branches, ends = [], []  # (bundle, negated, predicate, target), bundle
    for line in text.splitlines():
        if m := re.match(r"\s*(?:0x)?([0-9a-f]+)\s+(PF)?(?:L[BHE]|PB|CT)?\s*:\s*>*\s*\{", line):
            at = int(m.group(1), 16)
            ends += [at] if m.group(2) else []
        for negated, predicate, target in re.findall(r"sbr\.rel \((!?)%(\w+)\) target bundleno = (\d+)", line):
            if int(target) > at and predicate not in back:
                branches.append((at, negated, predicate, int(target)))
    targets = sorted({b[3] for b in branches})
    shares = []
    for at, negated, predicate, target in branches if len(targets) == len(ends) else []:
        if predicate in tests:
            relation, steps, n = tests[predicate]
            skipped = sum(bool(relation(i, n)) != bool(negated) for i in range(steps))
            shares.append((at + 5, ends[targets.index(target)] - 1, 1 - skipped / steps))  # behind the four delay slots
    return shares


COUNT = 3  # raise it when bundle_cycles or aot.bytes_moved counts differently: what `aot` has counted before is then made again
PRODUCT_CYCLES = 4  # a vmatmul of 16 rows at the peak, all units at work: four of 128 x 128 (v5e, a core of v5p), two of 256 x 256 (v6e)


def bundle_cycles(text: str, turns: int = 1) -> tuple[int, int]:
    """
    (cycles, loops of unknown length) of one program, a cycle a bundle: a line is one, `>` stands once for each loop that it is in. A loop
    runs as often as its exit test says; one without a constant test counts `turns` times. Predicated regions count as if they were taken,
    unless an index of the kernel's grid decides alone (region_shares). Where the matrix units need longer for what is given to them, that
    counts: on v5e a program can issue products faster than they are computed.
    """
    steps = {}

    def trips(line):
        m = re.search(r"scmp\.ge\.s32\.totalorder (?:\([^)]*\), )?%(\w+), (\d+) /\* loop exit test", line)
        if not m:
            return None
        if not steps:  # all counters and what is added to each; there are few
            steps.update(re.findall(r"%(\w+) = sadd\.s32 (?:\([^)]*\), )?(\d+), %", text))
        return math.ceil(int(m.group(2)) / int(steps.get(m.group(1), 1)))

    shares, unknown, slots = region_shares(text), 0, 0  # slots: delay slots still to come
    stack = [[0, 1, 0]]  # [bundles, trips, products] of each open loop

    def leave():
        nonlocal unknown
        bundles, n, products = stack.pop()
        unknown += n is None
        stack[-1][0] += bundles * (n or turns)
        stack[-1][2] += products * (n or turns)

    for line in text.splitlines():
        m = re.match(r"\s*(?:0x)?([0-9a-f]+)\s+(L[BHE]|P[BF]|CT)?\s*:\s*(>*)\s*\{", line)
        if not m:
            continue
        at, depth = int(m.group(1), 16), len(m.group(3))
        if slots or line.rstrip().endswith("{}"):  # the four bundles behind a branch and empty ones are not always marked
            depth = max(depth, len(stack) - 1)
        slots = 4 if "sbr.rel" in line else max(0, slots - 1)
        while len(stack) - 1 > depth or (m.group(2) == "LB" and len(stack) - 1 == depth > 0):
            leave()
        while len(stack) - 1 < depth:
            stack.append([0, None, 0])
        share = math.prod(share for first, last, share in shares if first <= at <= last)
        stack[-1][0] += share
        stack[-1][2] += share * line.count(" = vmatmul.")
        if depth and "loop exit test" in line:
            stack[-1][1] = trips(line)
    while len(stack) > 1:
        leave()
    bundles, _, products = stack[0]
    return round(max(bundles, PRODUCT_CYCLES * products)), unknown

# -----------------------------------------------------------------------------
# The estimate

@dataclasses.dataclass
class Row:
    """One instruction's share of a step."""
    op: Op
    computation: str
    kind: str
    times: int
    ms: float | None  # of one execution; None where nothing says
    how: str  # "compiler", "bundles", "bytes", "links" or "none"
    exposed_ms: float | None = None  # what of ms nothing hides, and what it is slowed down; None: all of it
    bytes: int = 0
    asynchronous: bool = False

    @property
    def cost_ms(self) -> float:
        """What it adds to the step."""
        return self.times * ((self.ms or 0) if self.exposed_ms is None else self.exposed_ms)


def collective_ms(kind: str, payload: int, devices: int, link: float) -> float:
    """
    Milliseconds that the links need for a collective: no latency, no waiting for the slowest chip. link: its bytes/s, one way.
    payload: bytes of the reduced tensor, of the gathered result or of what is scattered; of one chip's operand for all-to-all and
    collective-permute.
    """
    if devices < 2:
        return 0.0
    rings = min(RINGS, devices - 1) * link
    if kind in ("all-to-all", "ragged-all-to-all"):  # each link and direction carries devices / 8 of a chip's operand on a ring
        return 1e3 * payload * devices / 8 / link
    if kind == "collective-permute":  # to a neighbour, over one link
        return 1e3 * payload / link
    return 1e3 * payload * (devices - 1) / devices / rings * (2 if kind == "all-reduce" else 1)


class Estimate:
    """
    Walks a module as the chip would. bundles: {instruction: (bundles, loops of unknown length)} of libtpu's dump. kernel_bytes:
    {instruction: what a Pallas kernel moves of each operand and result}, None for those of which it is not known.
    """

    def __init__(self, module: Module, bundles: dict | None = None, chip: Chip = CHIPS["v6e"], kernel_bytes: dict | None = None):
        self.module, self.bundles, self.chip, self.kernel_bytes = module, bundles or {}, chip, kernel_bytes or {}
        self.rows, self.loops, self.scalars = [], [], 0
        self.now = 0.0  # ms since the step began
        self.free = {"links": 0.0, "hbm": 0.0}  # when each queue of transfers is empty again
        self.pending = {}  # key of a started transfer -> (when it ends, its row)
        self.walk(module.entry, 1)
        for _, row in self.pending.values():
            row.exposed_ms = row.ms  # nobody was seen waiting for it: count all of it

    @cached_property
    def emitted(self) -> dict:
        """Bundles by signature: libtpu writes a program once for all instructions that share it."""
        return {self.module.signature(op, c): self.bundles[op.name]
                for c, ops in self.module.computations.items() for op in ops.values() if op.name in self.bundles}

    def add(self, op, computation, kind, times, ms, how, exposed_ms=None, nbytes=0, asynchronous=False):
        row = Row(op, computation, kind, times, ms, how, exposed_ms, nbytes, asynchronous)
        self.rows.append(row)
        self.now += (ms or 0.0) if exposed_ms is None else exposed_ms
        return row

    def start(self, key, row, queue):
        begin = max(self.now, self.free[queue]) if queue else self.now
        end = begin + row.ms
        if queue:
            self.free[queue] = end
        self.pending[key] = end, row

    def share_links(self, row):
        """A synchronous collective has half of the links while others are under way, which arrive later for it."""
        row.exposed_ms = row.ms + min(row.ms, max(0.0, self.free["links"] - self.now))
        self.free["links"] = max(self.free["links"], self.now) + row.ms
        self.pending = {key: (end + row.ms if other.kind == "collectives" and end > self.now else end, other)
                        for key, (end, other) in self.pending.items()}
        self.now += row.exposed_ms

    def wait(self, key):
        end, row = self.pending.pop(key, (None, None))
        if row:
            row.exposed_ms = max(0.0, end - self.now)
            self.now += row.exposed_ms

    def walk(self, computation: str, times: int):
        for op in self.module.computations[computation].values():
            self.visit(op, computation, times)

    def visit(self, op: Op, computation: str, times: int):
        m = self.module
        if op.opcode in FREE or op.target in FREE_TARGETS:
            return
        if op.opcode == "while":
            trips, since = m.trips(op, computation), self.now
            self.loops.append((op, trips, times))
            self.walk(op.attr(r"body=%?([\w.\-]+)"), times * (1 if trips is None else trips))
            self.now = since + (1 if trips is None else trips) * (self.now - since)
        elif op.opcode == "call":
            self.walk(op.callees[0], times)
        elif op.opcode == "conditional":
            self.dearest_branch(op, times)
        elif op.opcode.endswith("-done"):
            # An async wrapper hands its handle on through updates.
            key = op.operands[0]
            while (up := m.computations[computation].get(key)) and up.opcode.endswith("-update"):
                key = up.operands[0]
            self.wait(key)
        elif op.opcode.endswith("-start"):
            self.started(op, computation, times)
        elif not op.opcode.endswith("-update"):
            self.compute(op, computation, times)

    def dearest_branch(self, op, times):
        """Only one branch runs: count the longest."""
        before = self.now, dict(self.free), dict(self.pending), len(self.rows), len(self.loops)
        results = []
        for branch in op.callees:
            self.now, self.free, self.pending = before[0], dict(before[1]), dict(before[2])
            self.walk(branch, times)
            results.append((self.now, self.free, self.pending, self.rows[before[3]:], self.loops[before[4]:]))
            del self.rows[before[3]:], self.loops[before[4]:]
        self.now, self.free, self.pending, rows, loops = max(results, key=lambda r: r[0])
        self.rows += rows
        self.loops += loops

    def collective(self, op, computation, within=None):
        """(kind, payload bytes, devices) of a collective; within: the fused computation that holds it."""
        kind = op.opcode.removesuffix("-start")
        payload = sum(nbytes(s) for s in self.module.operand_shapes(op, within or computation))
        explicit, iota = op.attr(r"replica_groups=\{\{([\d,]+)\}"), op.attr(r"replica_groups=\[\d+,(\d+)\]")
        devices = len(explicit.split(",")) if explicit else int(iota) if iota else self.module.devices
        return kind, payload * (devices if kind == "all-gather" else 1), devices

    def links(self, kind, payload, devices):
        return collective_ms(kind, payload, devices, self.chip.link_bytes_per_s)

    def started(self, op, computation, times):
        """An operation that runs beside the following ones until its -done."""
        m, base = self.module, op.opcode.removesuffix("-start")
        inner = next((x for x in m.inside(op) if x.opcode in COLLECTIVES), None)
        if base in COLLECTIVES or inner:
            kind, payload, devices = self.collective(inner or op, computation, op.callees[0] if inner else None)
            row = self.add(op, computation, "collectives", times, self.links(kind, payload, devices), "links", 0.0, payload, True)
            self.start(op.name, row, None if kind == "collective-permute" else "links")
        elif base in ("copy", "slice", "dynamic-slice"):
            # Whatever it is cut from, what arrives has the shape of the -done.
            done = next((x for x in m.computations[computation].values() if x.opcode == base + "-done" and x.operands[0] == op.name), None)
            moved = nbytes(done.shape) if done else nbytes(op.shape) // 2
            row = self.add(op, computation, "copies", times, 1e3 * moved / self.chip.hbm_bandwidth, "bytes", 0.0, moved)
            self.start(op.name, row, "hbm")
        else:
            self.add(op, computation, "elementwise", times, None, "none", nbytes=nbytes(op.shape, 0))

    def compute(self, op, computation, times):
        m = self.module
        inner = m.inside(op)
        collective = next((x for x in [op, *inner] if x.opcode in COLLECTIVES), None)
        if collective:
            within = next((c for c in op.callees if collective.name in m.computations[c]), None)
            kind, payload, devices = self.collective(collective, computation, within)
            kind = "reduce-scatter" if op.callees and "all-reduce-scatter" in op.callees[0] else kind
            ms = self.links(kind, payload, devices)
            targets, key = {x.target for x in inner}, "channel " + str(collective.attr(r"channel_id=(\d+)"))
            if "AsyncCollectiveStart" in targets:
                row = self.add(op, computation, "collectives", times, ms, "links", 0.0, payload, True)
                return self.start(key, row, "links")
            if "AsyncCollectiveDone" in targets:
                return self.wait(key)
            # A fusion that computes while a collective is under way carries a piece of it; that is counted where it starts.
            if '"continuation_config"' not in op.attrs:
                self.share_links(self.add(op, computation, "collectives", times, ms, "links", 0.0, payload))
            if op.cycles is None:
                return
        kind = self.kind(op, inner)
        if op.cycles is not None:
            self.add(op, computation, kind, times, 1e3 * op.cycles / self.chip.clock_hz, "compiler")
        elif all(n <= 1 for n, _, _ in arrays(op.shape)) and not inner:
            self.scalars += times
        else:
            ms, how, moved = self.lower_bound(op, computation, inner)
            self.add(op, computation, kind, times, ms, how, nbytes=moved)

    def lower_bound(self, op, computation, inner):
        """(ms, how, HBM bytes) where the compiler gives no estimate."""
        shapes = [*self.module.operand_shapes(op, computation), op.shape]
        moved, opcodes = sum(nbytes(s, 0) for s in shapes), {x.opcode for x in [op, *inner]}
        in_part = "output_to_operand_aliasing" in op.attrs
        if opcodes & READ_IN_PART:
            moved = nbytes(op.shape, 0)
        if op.name in self.kernel_bytes:
            # of the arrays in HBM, by blocks; one without any counts as a whole, unless it is written in part
            whole = [(size, space) for shape in shapes for _, size, space in arrays(shape)]
            blocks = self.kernel_bytes[op.name] or [None] * len(whole)
            assert len(blocks) == len(whole), op.name
            moved = sum((0 if in_part else size) if n is None else n for n, (size, space) in zip(blocks, whole) if space == 0)
        elif opcodes & WRITTEN_IN_PART or in_part:
            moved = 0
        bundles = self.bundles.get(op.name) or self.emitted.get(self.module.signature(op, computation))
        if not bundles and not (moved and self.kind(op, inner) == "copies"):  # some have no program of their own: bare transfers
            return None, "none", moved
        bundles = bundles or (0, 0)
        issue, stream = 1e3 * bundles[0] / self.chip.clock_hz, 1e3 * moved / self.chip.hbm_bandwidth
        return max(issue, stream), "bundles" if issue >= stream else "bytes", moved

    @staticmethod
    def kind(op, inner):
        opcodes = {x.opcode for x in [op, *inner]} - {"parameter", "constant", "fusion", "call"}
        if op.opcode == "custom-call" and op.target == "tpu_custom_call":
            return "kernels"
        if opcodes & {"convolution", "dot"}:
            return "matmuls"
        moves = opcodes <= MOVERS | {"convert", "iota", "custom-call"} and opcodes & MOVERS - {"bitcast", "broadcast", "tuple"}
        return "copies" if moves else "elementwise"

    # -- what the report takes from it

    @property
    def total_ms(self) -> float:
        return sum(r.cost_ms for r in self.rows)

    def summary(self) -> dict:
        """The figures of one graph: milliseconds and MiB of one step."""
        ms = {k: sum(r.cost_ms for r in self.rows if r.kind == k) for k in KINDS}
        collectives = [r for r in self.rows if r.kind == "collectives"]
        prefetches = [r for r in self.rows if r.kind == "copies" and r.exposed_ms is not None]
        bounds = [r for r in self.rows if r.how in ("bundles", "bytes") and r.exposed_ms is None]
        kernels = {}
        for r in self.rows:
            if r.kind == "kernels":
                name = self.module.kernels.get(r.op.name, r.op.name)
                entry = kernels.setdefault(name, {"calls": 0, "ms": 0.0, "how": r.how})
                entry["calls"] += r.times
                entry["ms"] += r.cost_ms
        by_kind = {}
        for r in collectives:
            inside = [x.opcode.removesuffix("-start") for x in [r.op, *self.module.inside(r.op)]]
            name = "reduce-scatter" if "all-reduce-scatter" in "".join(r.op.callees) else next(x for x in inside if x in COLLECTIVES)
            entry = by_kind.setdefault(name, {"count": 0, "mib": 0.0, "ms": 0.0, "exposed_ms": 0.0})
            entry["count"] += r.times
            entry["mib"] += r.times * r.bytes / 2**20
            entry["ms"] += r.times * r.ms
            entry["exposed_ms"] += r.cost_ms
        return {
            "est_ms": {**ms, "total": sum(ms.values())},
            "kernels": kernels,
            "collectives": {
                "count": sum(r.times for r in collectives),
                "mib": sum(r.times * r.bytes for r in collectives) / 2**20,
                "ms": sum(r.times * r.ms for r in collectives),
                "exposed_ms": ms["collectives"],
                "asynchronous": sum(r.times for r in collectives if r.asynchronous),
                "kinds": by_kind,
            },
            "prefetches": {
                "count": sum(r.times for r in prefetches),
                "mib": sum(r.times * r.bytes for r in prefetches) / 2**20,
                "exposed_ms": sum(r.cost_ms for r in prefetches),
            },
            "lower_bounds_ms": sum(r.cost_ms for r in bounds),
            "not_estimated": [
                {"op": r.op.name, "opcode": r.op.opcode, "times": r.times, "hbm_mib": r.bytes / 2**20, "source": self.module.source(r.op)}
                for r in self.rows if r.ms is None
            ] + [{"op": op.name, "opcode": "while", "times": times, "why": "trip count unknown: its body is counted once"}
                 for op, trips, times in self.loops if trips is None],
            "loops": [{"op": op.name, "trips": trips, "times": times} for op, trips, times in self.loops],
            "scalar_ops": self.scalars,
        }

    def dearest(self, n: int = 10) -> list[dict]:
        """The n instructions that cost most in a step."""
        rows = sorted(self.rows, key=lambda r: -r.cost_ms)[:n]
        return [{"ms": r.cost_ms, "times": r.times, "kind": r.kind, "how": r.how, "op": r.op.name,
                 "shape": re.sub(r"/\*.*?\*/", "", r.op.shape), "source": self.module.source(r.op)} for r in rows]

    def dearest_lines(self, n: int = 10) -> list[dict]:
        """The n source lines, or kernels, whose instructions cost most in a step together."""
        lines = {}
        for r in self.rows:
            ms = lines.setdefault(self.module.source(r.op).rpartition(" ")[2] or "no source line", dict.fromkeys(KINDS, 0.0))
            ms[r.kind] += r.cost_ms
        dearest = sorted(lines.items(), key=lambda x: -sum(x[1].values()))[:n]
        return [{"line": line, "ms": sum(ms.values()), **{k: v for k, v in ms.items() if v}} for line, ms in dearest]

# -----------------------------------------------------------------------------
# Memory (the buffer assignment that XLA dumps)

def largest_buffers(text: str, module: Module, n: int = 10) -> list[dict]:
    """
    The n largest buffers in HBM when memory is at its fullest, with the shape and source line of what writes them, of a buffer assignment
    as XLA dumps it. XLA's own list of that moment does not count buffers of more than 2 GiB: lm_head's P of 1.5 GiB is in it, of 3.1 not.
    """
    ops = {op.name: op for computation in module.computations.values() for op in computation.values()}
    ranges = {name: (int(start), int(end)) for name, start, end in re.findall(r"^ +([\w.\-]+\{[\d,]*\}):(\d+)-(\d+)$", text, re.M)}
    values = []  # (start, end, where, name, bytes)
    for number, kind, lines in re.findall(r"^allocation (\d+): size \d+, (.*)\n((?: value: .*\n)*)", text, re.M):
        if re.search(r"color [1-9]|thread-local", kind):  # not in HBM
            continue
        always = kind.startswith(("parameter", "constant"))
        found = re.findall(r"^ value: <\d+ ([\w.\-]+)(\{[\d,]*\})? @\d+> \(size=(\d+),offset=(\d+)\)", lines, re.M)
        for name, index, size, offset in found[:1] if always else found:
            name += index or "{}"
            if int(size) >= 2**16 and (always or name in ranges):
                values.append((*((0, math.inf) if always else ranges[name]), (number, offset), name, int(size)))
    # what is written where something else has just been read has its place, and counts once
    alive = lambda t: {where: (size, name) for start, end, where, name, size in values if start <= t <= end}
    fullest = max((alive(t) for t in {start for start, *_ in values}), key=lambda at: sum(size for size, _ in at.values()), default={})
    found = []
    for size, value in sorted(fullest.values(), key=lambda x: -x[0])[:n]:
        name, _, index = value.partition("{")
        op = ops.get(name)
        found.append({"buffer": value.replace("{}", ""), "bytes": size, "shape": element(op.shape, index) if op else "",
                      "source": module.source(op) if op else ""})
    return found
