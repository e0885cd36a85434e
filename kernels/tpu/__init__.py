"""
The TPU kernels, in Pallas. Loaded only when one is traced: JAX lowers them and runs nothing, so it is told to stay on the CPU and leaves
the TPU to torch_xla.
"""
import jax

jax.config.update("jax_platforms", "cpu")
