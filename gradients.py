"""
Where gradients go. A weight's gradient has an address: a slot in the stack that Muon reduces, or a sum that later gradients are added to.
TPU kernels write to it directly, because a stack or a sum made afterwards would be a copy; what autograd finds joins them in collect().

    gradients = Gradients({param: Slot(...) or Sum(...)})
    with gradients.receive({param: leaf}):
        loss = forward(leaves)  # kernels ask for the addresses of their weights
        loss.backward()
    gradients[param]            # one device's own

Outside of receive() a kernel's gradients are plain ones, for autograd.
"""
import contextlib

import torch
from torch import Tensor, nn


class Stack:
    """
    Gradients of `used` weights as one tensor [n, ...], zeros at its end. tensor: None before the first one is stored. on_top: it holds
    float32 sums, and each gradient is added to what its slot has.
    """
    def __init__(self, n: int, used: int, tensor: Tensor | None = None, on_top: bool = False):
        self.n, self.used, self.tensor, self.on_top, self.stored = n, used, tensor, on_top, set()

    def so_far(self, weight: Tensor) -> Tensor:
        """Memory for all slots, with what has been stored."""
        if self.tensor is None:
            from kernels.dispatch import call_kernel
            from kernels.tpu import stack
            self.tensor = call_kernel(stack.empty_stack, (self.n, self.used, *weight.shape), weight=weight).stack
        return self.tensor

    def collect(self, found: list[Tensor | None]) -> Tensor:
        """All of it, where found[slot] is what autograd has for a slot, or None."""
        import torch_xla.core.xla_model as xm
        if any(grad is None for grad in found):  # kernels have stored them
            for slot, grad in enumerate(found):
                if grad is not None:  # of a block that they refuse
                    self.tensor = torch.select_scatter(self.tensor, self.total(slot, grad), 0, slot)
            return self.tensor
        found = list(found)
        # without it libtpu 0.0.21 fuses the stack with what made the gradients into a cycle, and dies
        xm.optimization_barrier_(found)
        stacked = torch.stack(found + [torch.zeros_like(found[0])] * (self.n - len(found)))
        return self.tensor + stacked if self.on_top else stacked

    def total(self, slot: int, grad: Tensor) -> Tensor:
        return self.tensor[slot] + grad if self.on_top else grad


class Slot:
    """A weight's place in a stack. Different kernels may store different parts of it."""
    def __init__(self, stack: Stack, number: int):
        self.stack, self.number = stack, number

    def index(self, like: Tensor, pairs: bool = False) -> Tensor:
        """The slot's number, or its pair's, as a kernel takes it, on the device of `like`."""
        return torch.full((1,), self.number // 2 if pairs else self.number, dtype=torch.int32, device=like.device)

    def so_far(self, weight: Tensor) -> Tensor:
        return self.stack.so_far(weight)

    def store(self, stack: Tensor, part: str = "all") -> Tensor | None:
        """Takes the stack as a kernel has left it. Returns what autograd gets."""
        if (self.number, part) in self.stack.stored:
            raise ValueError(f"a second gradient for slot {self.number} ({part}) of a stack: two weights have one slot, or two backward "
                             "passes one set of gradients")
        self.stack.stored.add((self.number, part))
        self.stack.tensor = stack
        return None

    def collect(self, found: Tensor | None) -> Tensor | None:
        if found is None:
            return None if self.stack.tensor is None else self.stack.tensor[self.number]
        return self.stack.total(self.number, found)


class Sum:
    """
    A gradient that several kernels add to, on top of `before`, if there is one. tensor: None before the first of them. in_place: `before`
    is float32, and they add in its memory.
    """
    def __init__(self, before: Tensor | None = None, tensor: Tensor | None = None, in_place: bool = False):
        self.before, self.tensor, self.in_place = before, tensor, in_place

    def so_far(self) -> Tensor | None:
        return self.before if self.tensor is None else self.tensor

    def store(self, total: Tensor) -> Tensor | None:
        """Takes so_far() with a kernel's gradient added to it. Returns what autograd gets."""
        self.tensor = total
        return None

    def collect(self, found: Tensor | None) -> Tensor | None:
        """None where neither a kernel nor autograd has found any."""
        if found is None:
            return self.tensor
        return found if self.so_far() is None else found + self.so_far()


class PlainSlot(Slot):
    def so_far(self, weight: Tensor) -> Tensor:
        return torch.zeros(self.stack.n, *weight.shape, dtype=weight.dtype, device=weight.device)

    def store(self, stack: Tensor, part: str = "all") -> Tensor:
        return stack[self.number]


class PlainSum(Sum):
    def store(self, total: Tensor) -> Tensor:
        return total


class Gradients:
    """The gradients of one backward pass on each device, by parameter."""
    receiving: "Gradients | None" = None  # whose forward pass is being traced

    def __init__(self, addresses: dict[nn.Parameter, Slot | Sum]):
        self.addresses = addresses
        self.leaves: dict[nn.Parameter, Tensor] = {}

    @contextlib.contextmanager
    def receive(self, leaves: dict[nn.Parameter, Tensor]):
        """Within it, forward and backward passes of a model with these leaves for parameters leave their gradients here."""
        self.leaves, self.of_leaf = leaves, {leaf: self.addresses[p] for p, leaf in leaves.items()}
        Gradients.receiving = self
        try:
            yield self
        finally:
            Gradients.receiving = None

    def __getitem__(self, p: nn.Parameter) -> Tensor | None:
        return self.addresses[p].collect(self.found(p))

    def stack(self, params: list[nn.Parameter]) -> Tensor:
        """Those of parameters with slots 0, 1, ... of one stack, [n, ...]."""
        return self.addresses[params[0]].stack.collect([self.found(p) for p in params])

    def found(self, p: nn.Parameter) -> Tensor | None:
        """What autograd has."""
        return self.leaves[p].grad if p in self.leaves else None


def slots(*weights: Tensor) -> list[Slot | None]:
    """Where kernels store the gradients of weights that share a stack."""
    if not torch.is_grad_enabled():
        return [None] * len(weights)
    if Gradients.receiving is None:
        stack = Stack(len(weights), len(weights))
        return [PlainSlot(stack, i) for i in range(len(weights))]
    return [Gradients.receiving.of_leaf[weight] for weight in weights]


def sum_of(weight: Tensor) -> Sum | None:
    """Where kernels add the gradient of a weight."""
    if not torch.is_grad_enabled():
        return None
    return PlainSum() if Gradients.receiving is None else Gradients.receiving.of_leaf[weight]
