"""An empty stack of gradients: memory that kernels fill, one weight's gradient a slot."""
import jax.numpy as jnp

from kernels.tpu.common import Operand, Operands, kernel_call


def empty_stack_kernel(r, shapes):
    r.stack[...] = jnp.zeros_like(r.stack)


def empty_stack(shape: tuple[int, int, int, int], dtype, interpret=False):
    """
    shape: n, used, rows, columns. A function of the bank of weights [n, rows, columns], to be on its device, -> stack, as the bank: zeros
    behind the first `used`, which are not written at all.
    """
    n, used, *matrix = shape
    first = min(used, n - 1)
    operands = Operands(
        inputs=dict(weight=Operand((n, *matrix), dtype)),
        outputs=dict(stack=Operand((n, *matrix), dtype, (1, *matrix), lambda i: (first + i, 0, 0))))
    return kernel_call(empty_stack_kernel, shape, (n - first,), operands, interpret)
