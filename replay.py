"""
Trace a training step once, then replay it.

Eager PyTorch runs each operation as Python reaches it. torch_xla instead records operations into a graph and runs the graph
at xm.mark_step(). Recording costs the same at every step, some 75 ms for an 11-layer model: more than a TPU needs to run it.
Upstream has torch.compile for this; here Replay records a step once and from then on hands the compiled program its inputs.

    step = Replay(training_step, state=lambda: [*model.parameters(), *buffers])
    loss = step(key, batch)    # first call with this key: record, compile, run; later calls: run

fn must be a function of its arguments, of the tensors in state, which it may update in place, of the key and of the constants.
A tensor from anywhere else is refused, and a state or argument of another shape, dtype or sharding than recorded is recorded anew.
The calls into torch_xla are those that its own torch.compile backend makes (torch_xla/_dynamo/dynamo_bridge.py).
"""
import torch_xla
import torch_xla.core.xla_model as xm
from torch import Tensor
from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

C = torch_xla._XLAC

def signature(tensors: list[Tensor]) -> list:
    """What a compiled program takes for granted of its inputs."""
    return [*((x.shape, x.dtype) for x in tensors), *C._get_xla_sharding_specs(tensors)]

class Recording:
    """One compiled program: which tensors go in (sources), and which of the state comes out (changed) before fn's result."""
    def __init__(self, fn, inputs: list[Tensor], state: list[Tensor], hlo: bool = False):
        xm.mark_step()
        xm.wait_device_ops()  # from here on the inputs' buffers exist, and the recording can point to them
        tensors = state + inputs
        self.signature = signature(tensors)
        handle = lambda x: C._get_tensors_xla_device_data_node([x])[1][0]  # another tensor on the same buffer
        before = [handle(x) for x in tensors]
        for x in tensors:
            x.data = handle(x)  # a graph input bears the id of the last handle made
        places = {C._xla_get_tensor_id(x): i for i, x in enumerate(tensors)}
        try:
            result = fn(*inputs)
            self.changed = [i for i, pending in enumerate(C._check_tensor_need_materialization(state)) if pending]
            outputs = [state[i] for i in self.changed] + [result]
            ids, values = C._get_tensors_xla_device_data_node(outputs)
            for i, value in zip(ids, values, strict=True):
                if i not in places:
                    raise ValueError(f"a recorded step reads a {value.dtype} tensor of shape {tuple(value.shape)} that is neither "
                                     "an argument nor in its state, so replay could not follow its changes: add it to the state")
            self.sources = [places[i] for i in ids]
            for i in self.changed:
                C._set_buffer_donation(before[i], True)  # the new value goes where the old one was: state exists once
            with alias_with_buffer_donor_config():
                self.hlo = C._get_xla_tensors_hlo_proto(outputs) if hlo else None
                self.graph = C._get_graph_hash(outputs)
                if not hlo:
                    C._xla_warm_up_cache(outputs, [])
        finally:  # as if fn had not been called
            for x, value in zip(tensors, before, strict=True):
                x.data = value
            C._clear_pending_irs(str(torch_xla.device()))

    def run(self, inputs: list[Tensor], state: list[Tensor]) -> Tensor:
        tensors = state + inputs
        *new, result = C._run_cached_graph(self.graph, [tensors[i] for i in self.sources])
        for i, value in zip(self.changed, new, strict=True):
            state[i].data = value
        return result

class Replay:
    """
    fn(*tensors) -> tensor, replayed. state() lists the tensors that fn reads or updates beside its arguments, constants() the Python
    values that it depends on and that someone may change: they are part of the key.
    enabled=False traces every call instead, for debugging: same numbers, slower.
    """
    def __init__(self, fn, state, constants=tuple, enabled: bool = True):
        self.fn, self.state, self.constants, self.enabled = fn, state, constants, enabled
        self.recordings: dict[object, Recording] = {}

    def __call__(self, key, *inputs: Tensor) -> Tensor:
        if not self.enabled:
            return self.fn(*inputs)
        key, inputs, state = (key, *(x.shape for x in inputs), self.constants()), list(inputs), self.state()
        if any(C._check_tensor_need_materialization(inputs + state)):
            xm.mark_step()  # someone changed the state between steps: settle that first
        recording = self.recordings.get(key)
        if recording is None or recording.signature != signature(state + inputs):
            recording = self.recordings[key] = Recording(self.fn, inputs, state)
        return recording.run(inputs, state)
