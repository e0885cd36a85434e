"""An empty stack of gradients: memory that kernels fill, one weight's gradient a slot."""
import jax.numpy as jnp

from kernels.mlp import MLP_VMEM_LIMIT
from kernels.tpu.common import Operand, kernel_call


def stack_kernel(r, shapes):
    r.stack[...] = jnp.zeros_like(r.stack)


def empty_stack(shape: tuple[int, int, int, int], dtype, interpret=False):
    """
    shape: n, used, rows, columns. A function of a weight, to be on its device, -> stack [n, rows, columns]: zeros behind the first `used`,
    which are not written at all.
    """
    n, used, *matrix = shape
    first = min(used, n - 1)
    def run(weight):
        return kernel_call(
            stack_kernel, shape, "stack_kernel", (n - first,), vmem_limit=MLP_VMEM_LIMIT, interpret=interpret,
            inputs=dict(weight=Operand(weight.shape, dtype)),
            outputs=dict(stack=Operand((n, *matrix), dtype, (1, *matrix), lambda i: (first + i, 0, 0))),
            scratch={})(weight=weight)
    return run
