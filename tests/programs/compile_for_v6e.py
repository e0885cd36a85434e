"""Compiles an HLO file for the first n chips of a v6e-8, and prints the optimised HLO: compile_for_v6e.py N FILE."""
import sys

import numpy as np
from jax._src.interpreters import mlir
from jax._src.lib import xla_client as xc
from jax.experimental import topologies
from jaxlib.mlir import ir

from chips import TPUS

n, source = int(sys.argv[1]), sys.argv[2]
devices = topologies.get_topology_desc(**TPUS["v6e-8"].description).devices[:n]
text = xc._xla.mlir.xla_computation_to_mlir_module(xc.XlaComputation(open(source, "rb").read()))
with mlir.make_ir_context():
    code = mlir.module_to_bytecode(ir.Module.parse(text))
options = xc.CompileOptions()
options.num_replicas, options.num_partitions = 1, n
build = options.executable_build_options
build.use_spmd_partitioning, build.num_replicas, build.num_partitions = n > 1, 1, n
build.allow_spmd_sharding_propagation_to_output = [True]
build.device_assignment = xc.DeviceAssignment.create(np.arange(n).reshape(1, n))
executable = devices[0].client.compile(code, xc.DeviceList(tuple(devices)), options)
print(executable.hlo_modules()[0].to_string())
