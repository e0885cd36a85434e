"""
The record's two optimizers for XLA: NorMuon for the matrices of the blocks, DistAdam for all else.

As upstream splits it by hand: reduce-scatter, update one chunk a rank, all-gather (ZeRO, arXiv:1910.02054). From the first to
the last, tensors are whole and carry a sharding over the mesh axis "data": each chip updates its own part, and a weight that is
annotated as replicated leaves by all-gather.
"""
from collections import defaultdict

import torch
import torch_xla.core.xla_builder as xb
import torch_xla.core.xla_op_registry as xor
from torch import Tensor, nn

from gradients import Gradients, Slot, Stack, Sum
from spmd import ROWS, device_count, enter, leave, reduce_scatter, shard, to_device, turns


def _truncate(x: xb.Op) -> xb.Op:
    mask = xb.Op.scalar(x.builder(), -65536, xb.Type.S32)
    return (x.bitcast(xb.Type.S32) & mask).bitcast(xb.Type.F32).cast(xb.Type.BF16)

# XLA may merge a cast to bfloat16 and back, and the cast rounds: neither gives upstream's upper 16 bits. A bit mask does.
truncate_to_bfloat16 = xor.register("truncate_to_bfloat16", _truncate)

# -----------------------------------------------------------------------------
# Coefficients for 5 iterations, safety factor 2e-2, cushion 2 (the paper's terms)
polar_express_coeffs = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]

def polar_express(G: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """
    The nearest orthogonal matrix of each [..., m, n], by five odd polynomials (Polar Express, arXiv:2505.16932).
    D2: upstream's XXT and ba_plus_cAA kernels skip half of each symmetric product; the MXU has no such saving.
    """
    X = G.to(dtype)
    # D23: square ones, too. libtpu lays X out that way for X @ X.mT, and would copy their state to that layout and back
    if transposed := G.size(-2) >= G.size(-1):
        X = X.mT
    X = X / (X.float().square().sum((-2, -1), keepdim=True).sqrt().to(dtype) * (1 + 2e-2) + 1e-6)
    for a, b, c in polar_express_coeffs:
        A = X @ X.mT
        B = b * A + c * (A @ A)
        X = a * X + B @ X
    return X.mT if transposed else X

# -----------------------------------------------------------------------------
# Helpers for NorMuon by @chrisjmccormick

def cautious_wd_and_update_inplace(p: Tensor, grad: Tensor, wd_tensor: Tensor, lr_tensor: Tensor):
    """
    Cautious weight decay (arXiv:2510.12402), then the update. All float32; wd_tensor and lr_tensor broadcast.
    D3: p is the float32 weight itself. Upstream keeps it as two halves, the bfloat16 weight and a uint16 mantissa.
    """
    mask = (grad * p) >= 0
    p.copy_(p - (p * mask * wd_tensor * lr_tensor) - (grad * lr_tensor))

def apply_normuon_variance_reduction(v_chunk: Tensor, second_momentum_buffer: Tensor, beta2: float, red_dim: int) -> Tensor:
    """Scales each row (or column) by its running root mean square and keeps the norm of the matrix (NorMuon, arXiv:2510.05491)."""
    v_mean = v_chunk.float().square().mean(dim=red_dim, keepdim=True)
    red_dim_size = v_chunk.size(red_dim)
    v_norm = (v_mean.sum(dim=(-2, -1), keepdim=True) * red_dim_size).sqrt()
    second_momentum_buffer.copy_(second_momentum_buffer + (1 - beta2) * (v_mean - second_momentum_buffer))
    step_size = second_momentum_buffer.clamp_min(1e-10).rsqrt()
    v_norm_new = ((v_mean * red_dim_size) * step_size.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    final_scale = step_size * (v_norm / v_norm_new.clamp_min(1e-10))
    return v_chunk * final_scale.type_as(v_chunk)

def put(total: Tensor, x: Tensor):
    """total [devices, ...] = x, on each device."""
    total.copy_(x)
    shard(total, "data")

# -----------------------------------------------------------------------------
# NorMuon optimizer

class NorMuon(torch.optim.Optimizer):
    """
    Muon (https://kellerjordan.github.io/posts/muon/): momentum, then the nearest orthogonal matrix instead of the gradient.
    With Polar Express, NorMuon's variance reduction and cautious weight decay, as upstream. For matrices inside the network
    only, not for embeddings, the head, gates or scalars.

    D4: one stack of square matrices for attention ([40, d, d] in the record) and one for the MLPs ([22 -> 24, 4d, d]), split
    evenly over the chips: 5 and 3 matrices each on 8. Upstream's custom sizing exists to balance 2 + 2 parameters a rank.
    """
    def __init__(self, params, lr=0.02, weight_decay=0.01, momentum=0.95, beta2=0.95):
        groups = defaultdict(list)
        for param in params:
            groups[param.label].append(param)
        super().__init__([dict(params=group) for group in groups.values()],
                         dict(lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2))
        for group in self.param_groups:
            square = 4 if group["params"][0].label == 'attn' else 1  # qkvo_w is four square matrices, @chrisjmccormick
            lr_mults, wd_mults = [], []
            for p in group["params"]:
                shape_mult = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                lr_mults += [shape_mult * getattr(p, "lr_mul", 1.0)] * square
                wd_mults += [getattr(p, "wd_mul", 1.0)] * square
            rows, cols = group["params"][0].shape[0] // square, group["params"][0].shape[1]
            n = -(-len(lr_mults) // ROWS) * ROWS
            column = lambda xs, n=n: to_device(torch.tensor(xs + [0.0] * (n - len(xs))).view(n, 1, 1), "data")
            group.update(square=square, rows=rows, param_lr=column(lr_mults), param_wd=column(wd_mults))
            for name, shape in dict(momentum_buffer=(n, rows, cols), second_momentum_buffer=(n, rows, 1), master=(n, rows, cols)).items():
                group[name] = to_device(torch.zeros(shape), "data")
            if turns() > 1:
                group["grad"] = to_device(torch.zeros(device_count(), n, rows, cols), "data")
        self.reset()

    def reset(self):
        """Clears the buffers; the float32 weights start again from the parameters (upstream: a mantissa of zero)."""
        for group in self.param_groups:
            for name in ("momentum_buffer", "second_momentum_buffer", *(["grad"] if "grad" in group else [])):
                group[name].data = to_device(torch.zeros(group[name].shape), "data")
            stack = torch.stack([p.detach().cpu() for p in group["params"]]).float().view(-1, *group["master"].shape[1:])
            pad = torch.zeros(group["master"].size(0) - stack.size(0), *stack.shape[1:])
            group["master"].data = to_device(torch.cat([stack, pad]), "data")

    def addresses(self) -> dict[nn.Parameter, Slot]:
        """For the gradients of a step: a slot for each in its group's stack. A block's kernels write theirs there (D16)."""
        found = {}
        for group in self.param_groups:
            params = group["params"]
            sums = enter(group["grad"], "data").view(-1, *params[0].shape) if "grad" in group else None  # of the rows before
            stack = Stack(group["master"].size(0) // group["square"], len(params), sums, on_top=sums is not None)
            found |= {p: Slot(stack, i) for i, p in enumerate(params)}
        return found

    @torch.no_grad()
    def keep(self, gradients: Gradients):
        """A row's turn: each device keeps the sums for the next one."""
        for group in self.param_groups:
            put(group["grad"], leave(gradients.stack(group["params"]).view(group["master"].shape)))

    def accumulated(self) -> dict[nn.Parameter, Slot]:
        """Where the gradients of all turns are."""
        found = {}
        for group in self.param_groups:
            tensor = enter(group["grad"], "data").squeeze(0).to(group["params"][0].dtype)
            stack = Stack(len(tensor) // group["square"], len(group["params"]), tensor)
            found |= {p: Slot(stack, i) for i, p in enumerate(group["params"])}
        return found

    def clear(self):
        for group in self.param_groups:
            put(group["grad"], torch.zeros_like(group["grad"]))

    @torch.no_grad()
    def step(self, gradients: Gradients, lr: Tensor, momentum: Tensor):
        """One update of every group. lr, momentum: 0-D."""
        for group in self.param_groups:
            params, dtype = group["params"], group["params"][0].dtype
            momentum_buffer, master = group["momentum_buffer"], group["master"]
            grads = reduce_scatter(gradients.stack(params).view(master.shape)).float()

            momentum_buffer.copy_(momentum_buffer + (1 - momentum) * (grads - momentum_buffer))
            updated_grads = grads + momentum * (momentum_buffer - grads)

            v_chunk = polar_express(updated_grads, dtype)
            # The heads of O lie the other way than those of Q, K and V, so this is not the per-head choice for O;
            # upstream found no gain in correcting it. @chrisjmccormick
            red_dim = -1 if group["params"][0].shape[-2] >= group["params"][0].shape[-1] else -2
            v_chunk = apply_normuon_variance_reduction(v_chunk, group["second_momentum_buffer"], group["beta2"], red_dim)

            eff_lr = group["param_lr"] * lr
            eff_wd = group["param_wd"] * group["weight_decay"] * lr
            cautious_wd_and_update_inplace(master, v_chunk.float(), eff_wd, eff_lr)
            shard(master, "data")
            weights = shard(truncate_to_bfloat16(master) if dtype == torch.bfloat16 else master.clone(), "data")
            weights = shard(weights.clone())  # all-gather, in the parameter's dtype
            for p, w in zip(params, weights[:len(params) * group["square"]].view(len(params), *params[0].shape).unbind(), strict=True):
                p.copy_(w)

# -----------------------------------------------------------------------------
# DistAdam optimizer

class DistAdam(torch.optim.Optimizer):
    """
    Adam with cautious weight decay, its state split over the chips by rows (upstream: @vagrawal, @akash5474).

    Each device adds up its gradients of two steps in state["grad"], [devices, ...] (upstream: in param.grad); step() reduces the sum. Where
    rows take turns it is float32, because a sum of 16 gradients in bfloat16 would lose the last ones.
    Bias correction and learning rates are computed on the host, in get_numbers(), and come in as 0-D tensors, by label.
    """
    def __init__(self, params, label_order: list[str], betas: list[list[float]], lr: float = 1e-3, eps: float = 1e-8,
                 weight_decay: float = 0.01):
        params_by_label = defaultdict(list)
        for p in params:
            params_by_label[p.label].append(p)
        super().__init__([dict(params=params_by_label[label], betas=betas[i]) for i, label in enumerate(label_order)],
                         dict(lr=lr, eps=eps, weight_decay=weight_decay))
        self.reset()

    def split(self, p: Tensor) -> tuple:
        """The sharding of p's moments: by rows, unless it is small or its rows do not divide."""
        return ("data",) if p.numel() >= 1024 and p.size(0) % ROWS == 0 else ()

    def reset(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = 0
                moment = lambda p=p: to_device(torch.zeros(p.shape), *self.split(p))
                dtype = p.dtype if turns() == 1 else torch.float32
                grad = to_device(torch.zeros(device_count(), *p.shape, dtype=dtype), "data")
                for name, zeros in dict(exp_avg=moment(), exp_avg_sq=moment(), grad=grad).items():
                    if name in state:
                        state[name].data = zeros
                    else:
                        state[name] = zeros

    def advance(self, split_embed: bool):
        """Counts one step of Adam, for the parameters that will take it."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.label != 'embed':
                    self.state[p]["step"] += 1
                elif split_embed:
                    lm_head = self.param_groups[0]["params"][0]  # whose count embed took over with its moments
                    self.state[p]["step"] = self.state[lm_head]["step"]

    def get_numbers(self) -> dict[str, tuple[float, float]]:
        """(step_size, eff_wd) of the step counted last, by label; zeros before a parameter's first step."""
        numbers = {}
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                t, lr = self.state[p]["step"], group["lr"] * getattr(p, "lr_mul", 1.0)
                scale = (1 - beta2 ** t) ** 0.5 / (1 - beta1 ** t) if t else 0.0
                # lr twice: the decay follows the schedule's square
                numbers[p.label] = (lr * scale, lr * lr * group["weight_decay"] * getattr(p, "wd_mul", 1.0))
        return numbers

    def copy_lm_to_embed(self):
        """At 2/3 of training, embed takes over lm_head's weight and moments; its step count follows in advance()."""
        (lm_head,), (embed,) = ([p for group in self.param_groups for p in group["params"] if p.label == label]
                                for label in ('lm_head', 'embed'))
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[embed][name].copy_(self.state[lm_head][name])
        embed.data.copy_(lm_head.data)

    @staticmethod
    def _update_step(p_slice, g_slice, exp_avg, exp_avg_sq, beta1, beta2, eps, step_size_t, eff_wd_t):
        """Returns the new weight. exp_avg and exp_avg_sq, float32, change in place."""
        g, p = g_slice.float(), p_slice.float()
        exp_avg.copy_(exp_avg * beta1 + g * (1 - beta1))
        exp_avg_sq.copy_(exp_avg_sq * beta2 + g * g * (1 - beta2))
        update = exp_avg / (exp_avg_sq.sqrt() + eps) * step_size_t
        mask = (update * p) > 0
        return (p - (update + p * mask * eff_wd_t)).to(p_slice.dtype)  # split by rows, as g_slice is

    def addresses(self, on_top: bool, in_place: bool = False) -> dict[nn.Parameter, Sum]:
        """For the gradients of a step: a sum for each, on top of the even step's (D19) or, in place, of those of the rows before."""
        return {p: Sum(enter(state["grad"], "data").squeeze(0) if on_top else None, in_place=in_place) for p, state in self.state.items()}

    @torch.no_grad()
    def keep(self, gradients: Gradients):
        """An even step, or a row's turn: each device keeps its own gradients for the next one."""
        for p, state in self.state.items():
            grad = gradients[p]
            if grad is not None:
                put(state["grad"], leave(grad))

    def accumulated(self, split_embed: bool) -> dict[nn.Parameter, Sum]:
        """Where the gradients of all turns are."""
        return {p: Sum(tensor=None if p.label == 'embed' and not split_embed else enter(state["grad"], "data").squeeze(0).to(p.dtype))
                for p, state in self.state.items()}

    def clear(self, split_embed: bool):
        for p, state in self.state.items():
            if p.label != 'embed' or split_embed:  # while tied it has no gradient of its own
                put(state["grad"], torch.zeros_like(state["grad"]))

    @torch.no_grad()
    def step(self, gradients: Gradients, numbers: dict[str, tuple[Tensor, Tensor]]):
        """An odd step. numbers: (step_size, eff_wd) by label, 0-D."""
        tables = []  # with their new weights, split by rows
        for group in self.param_groups:
            for p in group["params"]:
                state, spec, grad = self.state[p], self.split(p), gradients[p]
                if grad is None:
                    continue
                g_slice = reduce_scatter(grad) if spec else shard(leave(grad).sum(0))
                weight = self._update_step(p, g_slice, state["exp_avg"], state["exp_avg_sq"], *group["betas"], group["eps"],
                                           *numbers[p.label])
                for name in ("exp_avg", "exp_avg_sq"):
                    shard(state[name], *spec)
                if spec:
                    tables.append((p, shard(weight, *spec)))
                else:
                    p.copy_(shard(weight))
        # One all-gather, in the parameters' dtype. Each table by itself would be copied twice, for it takes the old one's memory.
        # Backwards: torch_xla numbers arguments from the last operand on, results as they were made, and XLA gives a result the first
        # donated argument of its size. In another's memory it would be copied
        tables.reverse()
        weights = shard(torch.stack([w for _, w in tables]), None, "data")
        for (p, _), w in zip(tables, shard(weights.clone()).unbind(), strict=True):
            p.copy_(w)
