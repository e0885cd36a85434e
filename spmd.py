"""
The mesh and what lives where. One process drives all chips with one program (SPMD): a tensor is whole and carries a sharding over the mesh
axis "data". Between enter() and leave() (or reduce_scatter()) code sees one chip's part, as a rank does upstream.
"""
import itertools
import os
from functools import cache

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor

ROWS = 8  # the record's 8 ranks; also the most devices, so stacks are padded to a multiple of it

# Without it XLA repeats, on a CPU, the sums of all layers before in every operation that reads x: it then takes four times as long to
# compile a small model's step, and five times as long to run it.
FUSE_ONCE = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"

# XLA_FLAGS for programs that run once or twice on a CPU, where compiling takes longer than running. At LLVM's level 0 XLA's older emitters
# of fusions compile faster than its newer ones; at level 1, which the rehearsal uses, they do not.
COMPILE_FAST = f"{FUSE_ONCE} --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

def setup_devices(cpu_flags: str = FUSE_ONCE):
    """
    SPMD over all devices: mesh "data", and Python numbers as constants of the graph instead of inputs. Once a process, before the first
    computation, when XLA reads its flags: on CPU devices cpu_flags join XLA_FLAGS, unless the user's already name an optimization level.
    """
    flags = os.environ.get("XLA_FLAGS", "")  # never empty: importing torch_xla sets one
    if xr.device_type() == "CPU" and "xla_backend_optimization_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {cpu_flags}".strip()
    xr.use_spmd()
    n = xr.global_runtime_device_count()
    if ROWS % n:
        raise ValueError(f"{n} devices cannot share {ROWS} rows evenly: use 1, 2, 4 or 8 (TPU_VISIBLE_CHIPS or CPU_NUM_DEVICES)")
    xs.set_global_mesh(xs.Mesh(np.arange(n), (n,), ("data",)))
    torch_xla._XLAC._set_xla_all_numbers_special_scalars(True)

def device_count() -> int:
    """Of the mesh."""
    return int(xs.get_global_mesh().size())

def turns() -> int:
    """How often a device takes its turn in a step: on fewer than 8, its rows come one after the other."""
    return ROWS // device_count()

# -----------------------------------------------------------------------------
# Between host and devices

def to_device(x: Tensor, *spec) -> Tensor:
    """Copies a CPU tensor to the devices. spec: a mesh axis or None for each dimension; none given means replicated."""
    return xm.send_cpu_data_to_device([x], torch_xla.device(), _placement(spec + (None,) * (x.ndim - len(spec))))[0]

@cache
def _placement(spec: tuple) -> xs.ShardingSpec:
    return xs.ShardingSpec(xs.get_global_mesh(), spec)

def is_split(x: Tensor) -> bool:
    return xs.XLAShardedTensor(x).sharding_type == xs.ShardingType.TILED

def to_host(x: Tensor, lazy: bool = False):
    """
    Copies a device tensor, whole or split by rows, to the CPU. Nothing is compiled, where .cpu() compiles a gather. lazy: returns a
    function that joins its parts, which need not be done while the devices wait.
    """
    parts = [data for data, _ in torch_xla._XLAC._get_local_shards([x])[0]] if is_split(x) else [x.detach().cpu()]
    join = lambda: torch.cat(parts) if len(parts) > 1 else parts[0]
    return join if lazy else join()

def assign(x: Tensor, value: Tensor):
    """Gives a device tensor the value of a CPU tensor, whole, with the sharding it has: compiled programs go on to fit."""
    x.data = to_device(value, *(("data",) if is_split(x) else ()))

# -----------------------------------------------------------------------------
# In a traced program

def shard(x: Tensor, *spec) -> Tensor:
    """Annotates where x lives: a mesh axis or None for each dimension; none given means replicated."""
    spec = spec + (None,) * (x.ndim - len(spec))
    return xs.mark_sharding(x, xs.get_global_mesh(), spec).global_tensor

def enter(x: Tensor, *spec) -> Tensor:
    """
    Into the program of a single device, as a rank runs it upstream: it sees its own part of x, or all of a replicated x. XLA splits
    nothing and communicates nothing until leave().
    """
    return xs.enable_manual_sharding(x, spec + (None,) * (x.ndim - len(spec))).global_tensor

def leave(x: Tensor) -> Tensor:
    """Out of it again: what each device has, [...] -> [devices, ...], split by device."""
    shape = (device_count(), *x.shape)
    return xs.disable_manual_sharding(x.unsqueeze(0), ("data",) + (None,) * x.ndim, shape).global_tensor

_channels = itertools.count(1)  # of collectives; each of a program needs its own

def begin_program():
    """Before a program with collectives is traced: they are numbered from 1 again, so that the same program traced twice is the same."""
    global _channels
    _channels = itertools.count(1)

def leave_rows(x: Tensor) -> Tensor:
    """Out of it again: rows that each device has of its own, [rows / devices, ...] -> [rows, ...], split by rows."""
    shape = (device_count() * x.size(0), *x.shape[1:])
    return xs.disable_manual_sharding(x, ("data",) + (None,) * (x.ndim - 1), shape).global_tensor

def reduce_scatter(x: Tensor) -> Tensor:
    """
    Out of it too: the sum of what the devices have, [rows, ...], split by rows (upstream: dist.reduce_scatter_tensor). Explicit,
    because XLA makes an all-reduce of eight times the bytes where a sum over devices is reshaped.
    """
    return leave_rows(_collective("reduce_scatter", x, x.size(0) // device_count()))

def exchange(x: Tensor) -> Tensor:
    """Within it: [devices * rows, ...] on each device, the rows for each -> those from each."""
    return _collective("all_to_all", x, x.size(0))

def first_row(rows: int, like: Tensor) -> Tensor:
    """Within it: the number of the first of the `rows` rows that a device has of its own, [1] int32, on the device of `like`."""
    if device_count() == 1:
        return torch.zeros(1, dtype=torch.int32, device=like.device)
    return _collective("first_row", torch.full((1,), rows, dtype=torch.int32, device=like.device), 1)

def _collective(kind: str, x: Tensor, rows: int) -> Tensor:
    if device_count() == 1:
        return x
    computation = _computation(kind, (rows, *x.shape[1:]), tuple(x.shape), x.dtype, device_count(), next(_channels))
    return xb.xla_computation_as_func(computation)([x])[0]

@cache
def _computation(kind: str, to: tuple, shape: tuple, dtype: torch.dtype, devices: int, channel: int):
    """As StableHLO text: xm's own collectives bring a token along, a tensor that replay cannot account for."""
    from jax._src.lib import xla_client  # only now: on a TPU VM, importing JAX sets flags of libtpu, which has to be loaded before
    element = {torch.bfloat16: "bf16", torch.float32: "f32", torch.int32: "i32"}[dtype]
    array = lambda shape: f"tensor<{''.join(f'{n}x' for n in shape)}{element}>"
    groups = f"""use_global_device_ids, replica_groups = dense<[{list(range(devices))}]> : tensor<1x{devices}xi64>,
                 channel_handle = #stablehlo.channel_handle<handle = {channel}, type = 1>"""
    body = dict(
        reduce_scatter=f"""
          %y = "stablehlo.reduce_scatter"(%x) <{{scatter_dimension = 0 : i64, {groups}}}> ({{
              ^bb0(%a: tensor<{element}>, %b: tensor<{element}>):
                %sum = stablehlo.add %a, %b : tensor<{element}>
                stablehlo.return %sum : tensor<{element}>
            }}) : ({array(shape)}) -> {array(to)}""",
        all_to_all=f"""
          %y = "stablehlo.all_to_all"(%x) <{{split_dimension = 0 : i64, concat_dimension = 0 : i64, split_count = {devices} : i64,
            {groups.replace("use_global_device_ids, ", "")}}}> : ({array(shape)}) -> {array(to)}""",
        first_row=f"""
          %id = stablehlo.partition_id : tensor<ui32>
          %number = stablehlo.convert %id : (tensor<ui32>) -> tensor<i32>
          %one = stablehlo.reshape %number : (tensor<i32>) -> {array(to)}
          %y = stablehlo.multiply %x, %one : {array(to)}""")[kind]
    module = xla_client._xla.mlir.mlir_module_to_xla_computation(
        f"func.func @main(%x: {array(shape)}) -> {array(to)} {{ {body} \n return %y : {array(to)} }}",
        use_tuple_args=False, return_tuple=True)
    return xb.computation_from_module_proto(kind, module.as_serialized_hlo_module_proto())
