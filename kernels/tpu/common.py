"""What the kernels share: the one way to declare operands and make a pallas_call, and pieces of arithmetic."""
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from chips import MiB
from kernels import dispatch

EPS = jnp.finfo(jnp.float32).eps  # of RMSNorm
LANES = 128  # of a vector register
f32 = jnp.float32

# -----------------------------------------------------------------------------
# Operands

@dataclass(frozen=True)
class Operand:
    """
    An array that a kernel reads or writes. block: the part that one program of the grid has in VMEM, which index chooses (program ids,
    then prefetched scalars -> place in blocks). fixed: its place never changes, so one buffer is enough instead of two. Without a block
    the array stays in `space`.
    """
    shape: tuple[int, ...]
    dtype: jnp.dtype
    block: tuple[int, ...] | None = None
    index: Callable | None = None
    fixed: bool = False
    space: object = pl.ANY

    @property
    def spec(self) -> pl.BlockSpec:
        if self.block is None:
            return pl.BlockSpec(memory_space=self.space)
        return pl.BlockSpec(self.block, self.index, **(dict(pipeline_mode=pl.Buffered(1)) if self.fixed else {}))

    @property
    def vmem_bytes(self) -> int:
        return 0 if self.block is None else padded_bytes(self.block, self.dtype) * (1 if self.fixed else 2)


def scalar() -> Operand:
    """One float32 in SMEM, as an array [1]."""
    return Operand((1,), f32, space=pltpu.SMEM)


def padded_bytes(shape: tuple[int, ...], dtype) -> int:
    """Of an array in VMEM, whose last two dims are tiled: 8 x 128 words of 32 bits."""
    size = jnp.dtype(dtype).itemsize
    *most, rows, columns = (1, 1, *shape)
    whole = lambda n, tile: -(-n // tile) * tile
    return math.prod(most) * whole(rows, 8 * 4 // size) * whole(columns, LANES) * size


@dataclass(frozen=True)
class Operands:
    """
    Of a kernel, by name. One that is None is not there: the kernel gets None for it, and so does who calls it. prefetch: int32 arrays in
    SMEM that index functions get, too. scratch: VMEM that lives on from program to program, and semaphores. large: values that the kernel
    holds in between, as far as they count. in_place: outputs that take the memory of an input, and keep of it what no program writes.
    """
    inputs: dict[str, Operand | None]
    outputs: dict[str, Operand | None]
    scratch: dict[str, tuple | pltpu.SemaphoreType | None] = field(default_factory=dict)  # (shape, dtype)
    large: dict[str, tuple] = field(default_factory=dict)  # the same
    prefetch: tuple[str, ...] = ()
    in_place: dict[str, str] = field(default_factory=dict)  # output: input

    @property
    def vmem_bytes(self) -> int:
        blocks = sum(x.vmem_bytes for x in (*self.inputs.values(), *self.outputs.values()) if x is not None)
        return blocks + sum(padded_bytes(*x) for x in (*self.scratch.values(), *self.large.values()) if isinstance(x, tuple))


def kernel_call(kernel: Callable, shapes, grid: tuple[int, ...], operands: Operands, interpret: bool) -> Callable:
    """
    A function (**arrays: prefetched scalars and inputs) -> dict of outputs that runs kernel(r, shapes) on every program of the grid,
    r holding a reference for each operand under its name.

    after: an array that has to be there before the kernel runs, which does not read it. XLA would not wait at an optimization barrier:
    it has removed those when it orders what remains.
    """
    here = lambda group: {name: x for name, x in group.items() if x is not None}
    inputs, outputs, scratch = map(here, (operands.inputs, operands.outputs, operands.scratch))
    order = [*operands.prefetch, *inputs]
    absent = dict.fromkeys((*operands.inputs, *operands.outputs, *operands.scratch))
    # Twice what is counted, because the compiler needs room of its own. No more, because XLA keeps other arrays in the rest.
    limit = min(dispatch.vmem_limit(), max(32 * MiB, 2 * operands.vmem_bytes))

    def run(after=None, **arrays):
        first = {} if after is None else dict(after=Operand(after.shape, after.dtype))
        names = (*order, *first, *outputs, *scratch)
        assert len(set(names)) == len(names), "two operands with one name"
        results = pl.pallas_call(
            lambda *refs: kernel(SimpleNamespace(**absent | dict(zip(names, refs, strict=True))), shapes), name=kernel.__name__,
            interpret=interpret,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(operands.prefetch), grid=grid, in_specs=[x.spec for x in (inputs | first).values()],
                out_specs=[x.spec for x in outputs.values()],
                scratch_shapes=[pltpu.VMEM(*x) if isinstance(x, tuple) else x for x in scratch.values()]),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()],
            input_output_aliases={order.index(x): list(outputs).index(y) for y, x in operands.in_place.items() if y in outputs},
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * len(grid), vmem_limit_bytes=limit),
        )(*(arrays[name] for name in order), *(() if after is None else (after,)))
        return dict.fromkeys(operands.outputs) | dict(zip(outputs, results))
    return run

# -----------------------------------------------------------------------------
# Arithmetic

def matmul(a, b, transpose_b=False):
    if dispatch.interpret:  # torch_xla's CPU runtime has no bfloat16 x bfloat16 -> float32
        a, b = a.astype(f32), b.astype(f32)
    return jax.lax.dot_general(a, b, (((1,), (1 if transpose_b else 0,)), ((), ())), preferred_element_type=f32)


def wide_matmul(a, b, transpose_b=False):
    """matmul, 256 columns at a time: compiled for v6e, a pass over blocks of 512 x 512 then takes 7% fewer bundles."""
    columns = [b[i:i + 256] if transpose_b else b[:, i:i + 256] for i in range(0, b.shape[0 if transpose_b else 1], 256)]
    return jnp.concatenate([matmul(a, c, transpose_b) for c in columns], axis=1)


def stream(units, start, turn, finish):
    """
    finish(turn(start(unit))) of each unit: a matmul, vector work, a matmul, issued in the order that lets the units overlap.

        MXU   start 0   start 1            start 2   finish 0            start 3   finish 1  ...
        VPU             turn 0  ........             turn 1  ........              turn 2  ....
    """
    started, turned = start(units[0]), None
    for i, unit in enumerate(units):
        current, started = started, start(units[i + 1]) if i + 1 < len(units) else None
        if i:
            finish(units[i - 1], turned)
        turned = turn(unit, current)
    finish(units[-1], turned)


def by_strips(when, features, do, strip=256):
    """do(slice of `strip` features) for all of them, if `when`. A loop, possibly of no turns, because its program is short."""
    jax.lax.fori_loop(0, jnp.where(when, features // strip, 0), lambda n, _: do(pl.ds(n * strip, strip)), None)


def scaled(factor, x):
    """factor * x, rounded as x. The twin is train_gpt_xla.scaled."""
    return (factor * x.astype(f32)).astype(x.dtype)


def add(x, y):
    """The sum of two blocks in x's dtype; y is rounded to it first."""
    return (x.astype(f32) + y.astype(x.dtype).astype(f32)).astype(x.dtype)


def normed(x):
    """[C, d] -> norm of each row, and what it was multiplied by, float32."""
    x = x.astype(f32)
    scale = jax.lax.rsqrt((x * x).mean(1, keepdims=True) + EPS)
    return x * scale, scale


def sigmoid(x, dtype):
    """Of a matmul's result, rounded before and after, float32."""
    return jax.nn.sigmoid(x.astype(dtype).astype(f32)).astype(dtype).astype(f32)


def columns(rows):
    """[n, m] -> [m, n], for n up to 8, float32. In HBM tokens lie along the lanes: n numbers of each would take 128."""
    which = jax.lax.broadcasted_iota(jnp.int32, (8, rows.shape[1]), 0)
    return sum(jnp.where(which == k, rows[k:k + 1], 0.0) for k in range(rows.shape[0])).T[:, :rows.shape[0]]


def to_rows(columns):
    """[m, 1] float32, n of them, -> [n, m]."""
    which = jax.lax.broadcasted_iota(jnp.int32, (columns[0].shape[0], LANES), 1)
    return sum(jnp.where(which == k, column, 0.0) for k, column in enumerate(columns)).T[:len(columns)]
