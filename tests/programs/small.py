"""
Small programs for 8 TPUs whose cost is known by hand, as libtpu takes them; written by jax, which runs nothing.

    JAX_PLATFORMS=cpu python tests/programs/small.py FOLDER    NAME.hlo.pb, and in FOLDER/moved the same from lines further down
"""
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.shard_map import shard_map
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def write_all(out: Path):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    row, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    def arg(sharding, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    def write(name, f, *args):
        lowered = jax.jit(f, keep_unused=True).trace(*args).lower(lowering_platforms=("tpu",))
        (out / f"{name}.hlo.pb").write_bytes(lowered.compiler_ir("hlo").as_serialized_hlo_module_proto())

    # a matmul and an all-reduce
    write("matmul", lambda a, b, g: (a @ b, jax.lax.with_sharding_constraint(g.sum(0), whole)),
          arg(row, 8, 4096, 4096), arg(whole, 4096, 4096), arg(row, 8, 1024, 1024))
    write("loop", lambda a, b: jax.lax.fori_loop(0, 7, lambda i, x: (x @ b).astype(x.dtype), a),
          arg(row, 8, 2048, 2048), arg(whole, 2048, 2048))
    # 40 GiB, a chip, that nothing can fuse away
    big = lambda x: jax.lax.optimization_barrier(jnp.broadcast_to(x[:, :, None], (8, 2**20, 10240)) * 2).sum((1, 2))
    write("planted", big, arg(row, 8, 2**20, dtype=jnp.float32))

    # kernels of 16, 32 and 64 iterations of the same body, the first of them in a loop of 3
    def kernel(n, name):
        def body(x, o):
            o[...] = jnp.exp2(x[...]) + jnp.exp2(x[...] * 2)
        spec = pl.BlockSpec((1, 256, 128), lambda i: (i % 8, 0, 0))
        shape = jax.ShapeDtypeStruct((8, 256, 128), jnp.float32)
        call = pl.pallas_call(body, grid=(n,), in_specs=[spec], out_specs=spec, out_shape=shape, name=name)
        return shard_map(call, mesh=mesh, in_specs=P(), out_specs=P(), check_rep=False)
    short, long, looped = kernel(32, "short_kernel"), kernel(64, "long_kernel"), kernel(16, "looped_kernel")
    write("kernels", lambda x: (short(x), long(x), jax.lax.fori_loop(0, 3, lambda i, y: looped(y), x)),
          arg(whole, 8, 256, 128, dtype=jnp.float32))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_use_shardy_partitioner", False)
    folder = Path(sys.argv[1])
    write_all(folder)
    (folder / "moved").mkdir()
    moved = {"__name__": "moved"}
    exec(compile("\n\n\n" + Path(__file__).read_text(), "moved.py", "exec"), moved)
    moved["write_all"](folder / "moved")
