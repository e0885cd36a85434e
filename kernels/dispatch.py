"""When a TPU kernel runs, why not, and how it becomes one node of torch_xla's graph."""
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from torch import Tensor

from chips import CHIPS, Chip, GiB, MiB, Refused, supported, this_chip

target: Chip | None = None  # trace the kernels for this chip, on any machine. None: for the one that is here
interpret = False  # run them on a CPU, slowly


def for_tpu(x: Tensor) -> bool:
    """Whether x is where kernels run, or is traced for such a place."""
    return x.device.type == "xla" and (target is not None or interpret or _device_type() == "TPU")


def _device_type() -> str:
    import torch_xla.runtime as xr
    return xr.device_type()


def chip() -> Chip:
    """What kernels are traced for."""
    return target or (CHIPS["v6e"] if interpret else _chip_here())


@functools.cache
def _chip_here() -> Chip:
    found = this_chip()
    if found is None:
        raise Refused(f"no TPU of a known kind on the PCI bus, so it is unknown how large its kernels' blocks may be: {supported()}")
    return found


def vmem_limit() -> int:
    """Bytes of VMEM that one kernel may take; the rest of a v6e's 128 MiB is left to XLA."""
    return min(100 * MiB, chip().vmem_bytes - 2 * MiB)


@dataclass(frozen=True)
class Kept:
    """What kernels keep for the backward pass, which otherwise computes it again."""
    p_tokens: int  # tokens of a device whose P, [tokens, V], lm_head keeps
    mlp: bool  # hidden activations, [4d, tokens] of each layer
    qkv: bool = True  # q, k and v, and q and k before their norm, 5 [tokens, d] of each layer


def what_to_keep(tokens: int, layers: int, d: int, V: int, state_bytes: int) -> Kept:
    """
    D25: as much as fits beside a device's state and its other activations, q, k and v first, then P: of a GiB of it, lm_head makes ten
    times the use that MLPs make. tokens: of a device, in one program. Refused where the step cannot fit.
    """
    if target is None and _device_type() != "TPU":
        return Kept(tokens, True)
    # As compiled, 10.5 arrays of [tokens, d] a layer. Without q, k and v 4 fewer, for one layer's are there while they are computed again
    activations = 21 * layers * tokens * d
    of_qkv = 8 * layers * tokens * d
    code = 3 * GiB // 2  # of all graphs of a run, as compiled for v5e; a v6e's is less than half of that
    spare = GiB // 2
    room = chip().hbm_bytes - spare - code - state_bytes - activations
    qkv = room >= 0
    if not qkv:
        room += of_qkv
    if room < 0:
        raise Refused(f"a step of {tokens} tokens takes some {(activations - of_qkv) / GiB:.1f} GiB beside {state_bytes / GiB:.1f} of "
                      f"state and {(code + spare) / GiB:.1f} of programs, and this chip has {chip().hbm_bytes / GiB:.2f}: take more "
                      "chips, or less in --train_bs_schedule")
    p_tokens = min(tokens, room // (2 * V) // 2048 * 2048)
    return Kept(p_tokens, room - 2 * V * p_tokens >= layers * 8 * d * tokens, qkv)


def little_memory() -> bool:
    """Whether this chip has too little of it for float32 sums of the gradients of the largest tables, if it is alone."""
    return (target is not None or _device_type() == "TPU") and chip().hbm_bytes < 16 * GiB


def largest_fitting(choices: list, vmem_bytes: Callable):
    """The first of some shapes whose kernels, of vmem_bytes(shapes), fit; None if none does."""
    return next((shapes for shapes in choices if vmem_bytes(shapes) <= vmem_limit()), None)


def takes(x: Tensor, what: str, why_not: Callable[[], str | None]) -> bool:
    """Whether the kernels of `what` run where x is. A warning says why_not() where one would expect them to."""
    if not for_tpu(x):
        return False
    reason = why_not()
    if reason:
        warn_once(f"no TPU kernels for {what}, {reason}: plain torch instead, several times slower")
    return not reason


@functools.cache
def warn_once(text: str):
    warnings.warn(text, stacklevel=4)


def call_kernel(call: Callable, shapes, **tensors: Tensor | None) -> SimpleNamespace:
    """
    call(shapes, dtype, interpret)(**arrays) as one node of torch_xla's graph: call is a function of kernels.tpu, whose result maps the
    names of the outputs to arrays, or to None for one that is not asked for. A tensor that is None is left out. XLA cannot split a kernel
    over devices, so this belongs in the program of a single device (spmd.enter).
    """
    import torch_xla.core.xla_builder as xb
    tensors = {name: x for name, x in tensors.items() if x is not None}
    arguments = tuple((name, tuple(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in tensors.items())
    computation, outputs = lowered(call, shapes, arguments, chip(), interpret)
    results = iter(xb.xla_computation_as_func(computation)(list(tensors.values())))
    return SimpleNamespace(**{name: next(results) if there else None for name, there in outputs.items()})


@functools.cache
def lowered(call: Callable, shapes, arguments: tuple, chip: Chip, interpret: bool):
    """The kernel as an XLA computation, and which of its outputs there are. Cached, because a step is traced several times."""
    import jax
    import torch_xla.core.xla_builder as xb
    names, outputs = [name for name, _, _ in arguments], {}
    # of activations and weights: sums are as wide or wider
    dtype = min((jax.numpy.dtype(dtype) for _, _, dtype in arguments if "float" in dtype), key=lambda dtype: dtype.itemsize)

    def run(*arrays):
        results = call(shapes, dtype, interpret)(**dict(zip(names, arrays)))
        outputs.update({name: x is not None for name, x in results.items()})
        return [x for x in results.values() if x is not None]
    traced = jax.jit(run, keep_unused=True).trace(*(jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in arguments))
    hlo = traced.lower(lowering_platforms=("cpu" if interpret else "tpu",)).compiler_ir("hlo")
    return xb.computation_from_module_proto(call.__name__, hlo.as_serialized_hlo_module_proto()), outputs
