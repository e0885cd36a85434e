"""
Where gradients go. A weight's gradient has an address: the stack that NorMuon reduces, or a sum that later gradients are added to.
TPU kernels write to it directly, because a stack or a sum made afterwards would be a copy; what autograd finds joins them in collect().
Those of a sum do not run before it is asked for, so the optimizer says when.

    gradients = Gradients({param: Stack(...) or Sum(...)})
    with gradients.receive({param: leaf}):
        loss = forward(leaves)  # kernels ask for the addresses of their weights
        loss.backward()
    gradients.get(param)        # one device's own

Outside of receive() a kernel's gradients are plain ones, for autograd.
"""
import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Stack:
    """
    The gradient of a bank of weights as one tensor [n, rows, columns], of which the first `used` matrices exist in the model and the rest
    is padding, zeros. Different kernels store different parts of it. tensor: None before the first one is stored. on_top: it holds float32
    sums, and each gradient is added to what its place has.
    """
    def __init__(self, used: int, tensor: Tensor | None = None, on_top: bool = False):
        self.used, self.tensor, self.on_top, self.stored = used, tensor, on_top, set()

    def so_far(self, bank: Tensor) -> Tensor:
        """Memory for all of it, with what has been stored. bank: the weights, [..., rows, columns]."""
        if self.tensor is None:
            from kernels.dispatch import call_kernel
            from kernels.tpu import stack
            matrices = bank.view(-1, *bank.shape[-2:])
            self.tensor = call_kernel(stack.empty_stack, (len(matrices), self.used, *bank.shape[-2:]), weight=matrices).stack
        return self.tensor

    def store(self, tensor: Tensor, part: tuple) -> Tensor | None:
        """Takes the stack as a kernel has left it. part: what it has stored, (name, layer). Returns what autograd gets."""
        if part in self.stored:
            raise ValueError(f"a second gradient for {part} of a bank: two layers have one place, or two backward passes one set of "
                             "gradients")
        self.stored.add(part)
        self.tensor = tensor
        return None

    def collect(self, found: Tensor | None, after: Tensor | None = None) -> Tensor | None:
        """All of it, [n, rows, columns]. found: what autograd has, which is all or nothing. Its kernels have run."""
        if found is None:
            return self.tensor
        if self.stored:
            raise ValueError(f"kernels have stored gradients of {sorted(self.stored)}, and autograd has found others of the same bank: all "
                             "layers run by kernels, or none")
        found = found.view(-1, *found.shape[-2:])
        return self.tensor + found if self.on_top else found


class Sum:
    """
    A gradient that several kernels add to, on top of `before`, if there is one. tensor: None before the first of them. in_place: they
    add in its memory.
    """
    def __init__(self, before: Tensor | None = None, tensor: Tensor | None = None, in_place: bool = False):
        self.before, self.tensor, self.in_place = before, tensor, in_place
        self.waiting: list[Callable] = []

    def add(self, kernel: Callable) -> Tensor | None:
        """kernel(what there is so far or None, after) -> that with a gradient added to it. Returns what autograd gets."""
        self.waiting.append(kernel)
        return None

    def collect(self, found: Tensor | None, after: Tensor | None = None) -> Tensor | None:
        """None where neither a kernel nor autograd has found any. after: what these kernels wait for."""
        so_far = self.before if self.tensor is None else self.tensor
        for kernel in self.waiting:
            so_far = self.tensor = kernel(so_far, after)
        self.waiting = []
        if found is None:
            return self.tensor
        return found if so_far is None else found + so_far


class Shared:
    """
    The gradient of an activation that kernels of several layers read. From the last of these layers to the first each adds to it, in its
    memory, which the first one to come makes; then autograd gets it. readers: how many layers they are.
    """
    def __init__(self, readers: int):
        self.left, self.tensor = readers, None

    def so_far(self) -> Tensor | None:
        return self.tensor

    def store(self, total: Tensor) -> Tensor | None:
        self.left, self.tensor = self.left - 1, total
        return None if self.left else total


class PlainStack(Stack):
    def so_far(self, bank: Tensor) -> Tensor:
        return torch.zeros(bank.shape, dtype=bank.dtype, device=bank.device).view(-1, *bank.shape[-2:])

    def store(self, tensor: Tensor, part: tuple) -> Tensor:
        return tensor


class PlainSum(Sum):
    def add(self, kernel: Callable) -> Tensor:
        return kernel(None, None)


class Gradients:
    """The gradients of one backward pass on each device, by parameter."""
    receiving: "Gradients | None" = None  # whose forward pass is being traced

    def __init__(self, addresses: dict[nn.Parameter, Stack | Sum]):
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

    def get(self, p: nn.Parameter, after: Tensor | None = None) -> Tensor | None:
        """A parameter's, or None. after: kernels that have not run yet do so when this has been computed."""
        return self.addresses[p].collect(self.found(p), after)

    def found(self, p: nn.Parameter) -> Tensor | None:
        """What autograd has."""
        return self.leaves[p].grad if p in self.leaves else None


def stack_of(bank: Tensor) -> Stack | None:
    """Where kernels store the gradients of a bank's weights. store() returns [n, rows, columns]; autograd wants the bank's shape."""
    if not torch.is_grad_enabled():
        return None
    return PlainStack(len(bank)) if Gradients.receiving is None else Gradients.receiving.of_leaf[bank]


def sum_of(weight: Tensor) -> Sum | None:
    """Where kernels add the gradient of a weight."""
    if not torch.is_grad_enabled():
        return None
    return PlainSum() if Gradients.receiving is None else Gradients.receiving.of_leaf[weight]
