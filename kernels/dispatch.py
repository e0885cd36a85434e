"""When a TPU kernel runs, why not, and how it becomes one node of torch_xla's graph."""
import functools
import warnings
from collections.abc import Callable
from types import SimpleNamespace

from torch import Tensor

# None: the device decides. "TPU": trace the TPU kernels on any machine, to compile for one. "interpret": run them on a CPU, slowly.
target = None


def for_tpu(x: Tensor) -> bool:
    """Whether x is where kernels run, or is traced for such a place."""
    if x.device.type != "xla":
        return False
    import torch_xla.runtime as xr
    return target is not None or xr.device_type() == "TPU"


@functools.cache
def warn_once(text: str):
    warnings.warn(text, stacklevel=3)


def call_kernel(call: Callable, shapes, **tensors: Tensor | None) -> SimpleNamespace:
    """
    call(shapes, dtype, interpret)(**arrays) as one node of torch_xla's graph: call is a function of kernels.tpu, whose result maps the
    names of the outputs to arrays, or to None for one that is not asked for. A tensor that is None is left out. XLA cannot split a kernel
    over devices, so this belongs in the program of a single device (spmd.enter).
    """
    import torch_xla.core.xla_builder as xb
    tensors = {name: x for name, x in tensors.items() if x is not None}
    arguments = tuple((name, tuple(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in tensors.items())
    computation, outputs = lowered(call, shapes, arguments, target == "interpret")
    results = iter(xb.xla_computation_as_func(computation)(list(tensors.values())))
    return SimpleNamespace(**{name: next(results) if there else None for name, there in outputs.items()})


@functools.cache
def lowered(call: Callable, shapes, arguments: tuple, interpret: bool):
    """The kernel as an XLA computation, and which of its outputs there are. Cached, because a step is traced several times."""
    import jax
    import torch_xla.core.xla_builder as xb
    names, outputs = [name for name, _, _ in arguments], {}
    dtype = next(jax.numpy.dtype(dtype) for _, _, dtype in arguments if "float" in dtype)  # of activations and weights

    def run(*arrays):
        results = call(shapes, dtype, interpret)(**dict(zip(names, arrays)))
        outputs.update({name: x is not None for name, x in results.items()})
        return [x for x in results.values() if x is not None]
    traced = jax.jit(run, keep_unused=True).trace(*(jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in arguments))
    hlo = traced.lower(lowering_platforms=("cpu" if interpret else "tpu",)).compiler_ir("hlo")
    return xb.computation_from_module_proto(call.__name__, hlo.as_serialized_hlo_module_proto()), outputs
