"""
The record's optimizer for XLA: NorMuon for the banks of matrices, Adam for all else.

As upstream splits it by hand: reduce-scatter, update one chunk a rank, all-gather (ZeRO, arXiv:1910.02054). From the first to
the last, tensors are whole and carry a sharding over the mesh axis "data": each chip updates its own part, and a weight that is
annotated as replicated leaves by all-gather.
"""
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch_xla.core.xla_builder as xb
import torch_xla.core.xla_op_registry as xor
from torch import Tensor, nn

from gradients import Gradients, Stack, Sum
from kernels.dispatch import little_memory
from spmd import ROWS, device_count, enter, leave, leave_rows, reduce_scatter, shard, to_device, turns


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

def polar_express(grad_chunk: Tensor, momentum_buffer: Tensor, momentum_t: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """
    Nesterov momentum in float32, then, in dtype, the nearest orthogonal matrix of each [..., m, n], by five odd polynomials (Polar
    Express, arXiv:2505.16932). momentum_buffer changes in place; momentum_t is 0-D.
    D2: upstream's XXT, XTX and ba_plus_cAA kernels skip half of each symmetric product; the MXU has no such saving.
    """
    momentum_buffer.copy_(momentum_buffer + (1 - momentum_t) * (grad_chunk - momentum_buffer))
    X = (grad_chunk + momentum_t * (momentum_buffer - grad_chunk)).to(dtype)
    is_tall = X.size(-2) > X.size(-1)
    X = X / (X.float().square().sum((-2, -1), keepdim=True).sqrt().to(dtype) * (1 + 2e-2) + 1e-6)
    for a, b, c in polar_express_coeffs:
        A = X.mT @ X if is_tall else X @ X.mT
        B = b * A + c * (A @ A)
        X = a * X + (X @ B if is_tall else B @ X)
    return X

# -----------------------------------------------------------------------------
# Combined NorMuon + Adam Optimizer

@dataclass
class ParamConfig:
    """What NorMuonAndAdam knows of one parameter."""
    label: str
    optim: str  # "adam" or "normuon"
    comms: str  # "replicated", "sharded" or "owned" (D4)
    adam_betas: tuple[float, float] | None
    lr_mul: float
    wd_mul: float
    initial_lr: float
    weight_decay: float
    eps: float | None = None  # Adam's
    reshape: tuple | None = None  # NorMuon's, to a stack of matrices
    used: int | None = None  # how many of them are in the model; the rest is padding
    beta2: float | None = None
    per_matrix_lr_mul: Tensor | None = None  # [n, 1, 1]

    @property
    def split(self) -> tuple:
        """The sharding of its state."""
        return () if self.comms == "replicated" else ("data",)

def put(total: Tensor, x: Tensor):
    """total [devices, ...] = x, on each device, or total [rows, ...], split by rows."""
    total.copy_(x)
    shard(total, "data")

class NorMuonAndAdam:
    """
    Muon (https://kellerjordan.github.io/posts/muon/) for the banks: momentum, then the nearest orthogonal matrix instead of the gradient,
    by Polar Express, with NorMuon's variance reduction (arXiv:2510.05491) and cautious weight decay. Adam with cautious weight decay for
    embeddings, gates and scalars. A parameter's label names its line in param_table.

    Upstream's contributors: @YouJiacheng, @KonstantinWilleke, @alexrgilbert, @adricarda, @tuttyfrutyee, @vdlad, @ryanyang0, @vagrawal,
    @varunneal, @chrisjmccormick.

    "replicated": gradients are summed over the chips, each of which makes the whole update. "sharded": reduce-scatter, each chip updates
    its rows or matrices, all-gather. "owned" (D4, in the place of upstream's "sharded_sparse"): each chip has rows of its own, weights and
    all; their gradients come to it by themselves (lookup_owned). Updates follow work_order; reductions are XLA's to order (D12).

    Each device adds up its gradients of two steps in state["grad"], [devices, ...] (upstream: in param.grad); step() reduces the sum. Where
    rows take turns it is float32, because a sum of 16 gradients in bfloat16 would lose the last ones.
    Bias correction and learning rates are computed on the host, in get_numbers(), and come in as 0-D tensors, by label.

    There is no state before reset(): the record's is some GB, and whoever owns this resets it anyway.
    """
    def __init__(self, named_params, param_table: dict, work_order: list[str], adam_defaults: dict, normuon_defaults: dict):
        self.param_cfgs: dict[nn.Parameter, ParamConfig] = {}
        self.param_states: dict[nn.Parameter, dict] = {}
        self._param_by_label: dict[str, nn.Parameter] = {}
        for name, param in named_params:
            label = param.label
            assert label in param_table, f"{name}: {label} is not in param_table"
            assert label not in self._param_by_label, f"{name}: a second parameter {label}"
            self._param_by_label[label] = param
            self.param_cfgs[param] = self._build_param_cfg(param, label, param_table[label],
                                                           adam_defaults if param_table[label]["optim"] == "adam" else normuon_defaults)
        assert param_table.keys() == self._param_by_label.keys(), param_table.keys() ^ self._param_by_label.keys()
        assert sorted(work_order) == sorted(param_table), set(work_order) ^ param_table.keys()
        self.work_order = work_order

    @staticmethod
    def _build_param_cfg(param: nn.Parameter, label: str, entry: dict, defaults: dict) -> ParamConfig:
        betas = entry.get("adam_betas")
        cfg = ParamConfig(label, entry["optim"], entry["comms"], tuple(betas) if betas else None, entry.get("lr_mul", 1.0),
                          entry.get("wd_mul", 1.0), defaults["lr"], defaults["weight_decay"])
        if cfg.optim == "adam":
            cfg.eps = defaults["eps"]
            return cfg
        cfg.reshape, cfg.used, cfg.beta2 = param.reshape, param.used, defaults["beta2"]
        n, rows, cols = cfg.reshape
        cfg.lr_mul *= max(1.0, rows / cols) ** 0.5
        # c_proj, at odd places of the MLPs' bank, at twice the rate
        mul = [2.0 if label == "mlp_bank" and i % 2 else 1.0 for i in range(n)]
        cfg.per_matrix_lr_mul = to_device(torch.tensor(mul).view(n, 1, 1), "data")
        return cfg

    # -----------------------------------
    # State

    def reset(self):
        """Zeros, and float32 weights from the parameters as they are (upstream: a mantissa of zero)."""
        for param, cfg in self.param_cfgs.items():
            new = {}
            if cfg.optim == "adam":
                new = {name: to_device(torch.zeros(param.shape), *cfg.split) for name in ("exp_avg", "exp_avg_sq")}
                shape = param.shape if cfg.comms == "owned" else (device_count(), *param.shape)
                new["grad"] = to_device(torch.zeros(shape, dtype=self._sum_dtype(param)), "data")
            else:
                n, rows, cols = cfg.reshape
                second = (n, rows, 1) if rows >= cols else (n, 1, cols)
                for name, shape in dict(momentum_buffer=cfg.reshape, second_momentum_buffer=second).items():
                    new[name] = to_device(torch.zeros(shape), "data")
                new["master"] = to_device(param.detach().cpu().float().view(cfg.reshape), "data")  # D3: upstream's bfloat16 and mantissa
                if turns() > 1:
                    new["grad"] = to_device(torch.zeros(device_count(), *cfg.reshape), "data")
            state = self.param_states.setdefault(param, {})
            for name, value in new.items():
                if name in state:
                    state[name].data = value
                else:
                    state[name] = value
            if cfg.optim == "adam":
                state["step"] = 0

    @staticmethod
    def _sum_dtype(param: nn.Parameter) -> torch.dtype:
        """Of the sum of Adam's gradients. One chip of 16 GiB has no room for float32 sums of the two tables of some GB."""
        too_large = param.numel() > 2**27 and turns() == ROWS and little_memory()
        return param.dtype if turns() == 1 or too_large else torch.float32

    def tensors(self) -> list[Tensor]:
        """All tensors on the devices that step() reads or updates."""
        return [*(x for state in self.param_states.values() for x in state.values() if isinstance(x, Tensor)),
                *(cfg.per_matrix_lr_mul for cfg in self.param_cfgs.values() if cfg.optim == "normuon")]

    def advance(self, split_embed: bool):
        """Counts one step of Adam, for the parameters that will take it."""
        for param, cfg in self.param_cfgs.items():
            if cfg.label == "embed":
                if split_embed:  # embed took over lm_head's count with its moments
                    self.param_states[param]["step"] = self.param_states[self._param_by_label["lm_head"]]["step"]
            elif cfg.optim == "adam":
                self.param_states[param]["step"] += 1

    def get_numbers(self, lr: float) -> dict[str, tuple[float, float]]:
        """(step_size, eff_wd) of the Adam step counted last, by label, at this part of the initial rates; zeros before the first step."""
        numbers = {}
        for param, cfg in self.param_cfgs.items():
            if cfg.optim == "adam":
                (beta1, beta2), t, rate = cfg.adam_betas, self.param_states[param]["step"], cfg.initial_lr * lr * cfg.lr_mul
                scale = (1 - beta2 ** t) ** 0.5 / (1 - beta1 ** t) if t else 0.0
                # the rate twice: the decay follows the schedule's square
                numbers[cfg.label] = (rate * scale, rate * rate * cfg.weight_decay * cfg.wd_mul)
        return numbers

    def copy_lm_state_to_embed(self):
        """At 2/3 of training, embed takes over lm_head's weight and moments; its step count follows in advance()."""
        lm_head, embed = self._param_by_label["lm_head"], self._param_by_label["embed"]
        for name in ("exp_avg", "exp_avg_sq"):
            self.param_states[embed][name].copy_(self.param_states[lm_head][name])
        embed.data.copy_(lm_head.data)

    # -----------------------------------
    # Gradients

    def _on_device(self, param: nn.Parameter) -> Tensor:
        """state["grad"], as a device has it."""
        grad = enter(self.param_states[param]["grad"], "data")
        return grad if self.param_cfgs[param].comms == "owned" else grad.squeeze(0)

    def _leave(self, param: nn.Parameter, grad: Tensor) -> Tensor:
        """A device's own gradient, in state["grad"]'s form."""
        return leave_rows(grad) if self.param_cfgs[param].comms == "owned" else leave(grad)

    def leave_gradient(self, param: nn.Parameter, grad: Tensor) -> Tensor:
        """A device's own gradient -> the sum over devices, float32, in the parameter's shape. For tools; step() has ways of its own."""
        grad = self._leave(param, grad).float()
        return (grad if self.param_cfgs[param].comms == "owned" else grad.sum(0)).view(param.shape)

    def addresses(self, on_top: bool, in_place: bool = False) -> dict[nn.Parameter, Stack | Sum]:
        """For the gradients of a step: on top of the even step's (D19) or, in place, of those of the rows before."""
        found = {}
        for param, cfg in self.param_cfgs.items():
            if cfg.optim == "adam":
                found[param] = Sum(self._on_device(param) if on_top else None, in_place=in_place)
            else:
                sums = self._on_device(param) if turns() > 1 else None  # of the rows before
                found[param] = Stack(cfg.used, sums, on_top=sums is not None)
        return found

    @torch.no_grad()
    def keep(self, gradients: Gradients):
        """A row's turn: each device keeps its own gradients for the next one."""
        for param in self.param_cfgs:
            self._keep(param, gradients.get(param))

    def _keep(self, param: nn.Parameter, grad: Tensor | None):
        if grad is not None:
            put(self.param_states[param]["grad"], self._leave(param, grad))

    @staticmethod
    def _updates(cfg: ParamConfig, do_adam: bool, split_embed: bool) -> bool:
        """While tied, embed has no gradient of its own."""
        return cfg.optim == "normuon" or do_adam and (cfg.label != "embed" or split_embed)

    def accumulated(self, do_adam: bool, split_embed: bool) -> dict[nn.Parameter, Stack | Sum]:
        """Where the gradients of all turns are, of what will be updated."""
        found = {}
        for param, cfg in self.param_cfgs.items():
            grad = self._on_device(param).to(param.dtype) if self._updates(cfg, do_adam, split_embed) else None
            found[param] = Sum(tensor=grad) if cfg.optim == "adam" else Stack(cfg.used, grad)
        return found

    def clear(self, do_adam: bool, split_embed: bool):
        """After the update that took the gradients of all turns."""
        for param, cfg in self.param_cfgs.items():
            if self._updates(cfg, do_adam, split_embed):
                grad = self.param_states[param]["grad"]
                put(grad, torch.zeros_like(grad))

    # -----------------------------------
    # Unified optimizer step

    @torch.no_grad()
    def step(self, gradients: Gradients, lr: Tensor, momentum: Tensor, adam: dict[str, tuple[Tensor, Tensor]] | None):
        """
        One update. lr, momentum: NorMuon's, 0-D. adam: get_numbers(), 0-D, on odd steps; on even ones only the banks are updated, and each
        device keeps its own gradients of the rest.

        In work_order: kernels that make a gradient wait for the new weights before it, so that their all-gather runs beside these kernels.
        """
        tables = defaultdict(list)  # with their new weights, split by rows, by shape
        new = []  # one element of each of the new weights that are to be gathered
        for param in (self._param_by_label[label] for label in self.work_order):
            cfg, grad = self.param_cfgs[param], gradients.get(param, torch.cat(new) if new else None)
            if grad is None:
                continue
            if cfg.optim == "normuon":
                weight = self._normuon_update(param, grad, cfg, lr, momentum)
            elif adam is None:
                self._keep(param, grad)
                continue
            else:
                weight = self._adam_update(param, grad, cfg, *adam[cfg.label])
                if cfg.comms == "sharded":
                    tables[param.shape].append((param, weight))
                else:
                    param.copy_(shard(weight, *cfg.split))
            if cfg.comms == "sharded":
                new.append(enter(weight, "data").flatten()[:1])
        # One all-gather for tables of one shape, in the parameters' dtype. Each by itself would be copied twice, for it takes the old one's
        # memory. Backwards: torch_xla numbers arguments from the last operand on, results as they were made, and XLA gives a result the
        # first donated argument of its size. In another's memory it would be copied
        for some in tables.values():
            some.reverse()
            weights = shard(torch.stack([weight for _, weight in some]), None, "data")
            for (param, _), weight in zip(some, shard(weights.clone()).unbind(), strict=True):
                param.copy_(weight)

    # -----------------------------------
    # Adam update

    def _adam_update(self, param: nn.Parameter, grad: Tensor, cfg: ParamConfig, step_size: Tensor, eff_wd: Tensor) -> Tensor:
        """The new weight, split as cfg says."""
        state = self.param_states[param]
        if cfg.comms == "sharded":
            g_slice = reduce_scatter(grad)
        else:
            g_slice = leave_rows(grad) if cfg.comms == "owned" else shard(leave(grad).sum(0))
        weight = self._adam_update_step(param, g_slice, state["exp_avg"], state["exp_avg_sq"], *cfg.adam_betas, cfg.eps, step_size, eff_wd)
        for name in ("exp_avg", "exp_avg_sq"):
            shard(state[name], *cfg.split)
        return shard(weight, *cfg.split)

    @staticmethod
    def _adam_update_step(p_slice, g_slice, exp_avg, exp_avg_sq, beta1, beta2, eps, step_size_t, eff_wd_t):
        """Returns the new weight. exp_avg and exp_avg_sq, float32, change in place."""
        g, p = g_slice.float(), p_slice.float()
        exp_avg.copy_(exp_avg * beta1 + g * (1 - beta1))
        exp_avg_sq.copy_(exp_avg_sq * beta2 + g * g * (1 - beta2))
        update = exp_avg / (exp_avg_sq.sqrt() + eps) * step_size_t
        mask = (update * p) > 0  # cautious weight decay (arXiv:2510.12402)
        return (p - (update + p * mask * eff_wd_t)).to(p_slice.dtype)  # split by rows, as g_slice is

    # -----------------------------------
    # NorMuon update

    def _normuon_update(self, param: nn.Parameter, grad: Tensor, cfg: ParamConfig, lr: Tensor, momentum: Tensor) -> Tensor:
        """Updates the parameter, and returns its new weights as they are before the all-gather, split."""
        state, dtype = self.param_states[param], param.dtype
        grad_chunk = reduce_scatter(grad).float()
        v_chunk = polar_express(grad_chunk, state["momentum_buffer"], momentum, dtype)
        red_dim = -1 if cfg.reshape[-2] >= cfg.reshape[-1] else -2
        v_chunk = self._apply_normuon_variance_reduction(v_chunk, state["second_momentum_buffer"], cfg.beta2, red_dim)
        eff_lr, eff_wd = cfg.lr_mul * cfg.per_matrix_lr_mul * lr, cfg.wd_mul * cfg.weight_decay * lr
        master = state["master"]
        self._cautious_wd_and_update_inplace(master, v_chunk.float(), eff_wd, eff_lr)
        for name in ("momentum_buffer", "second_momentum_buffer", "master"):
            shard(state[name], "data")
        weights = shard(truncate_to_bfloat16(master) if dtype == torch.bfloat16 else master.clone(), "data")
        param.copy_(shard(weights.clone()).view(param.shape))  # all-gather, in the parameter's dtype
        return weights

    @staticmethod
    def _cautious_wd_and_update_inplace(p: Tensor, grad: Tensor, wd_tensor: Tensor, lr_tensor: Tensor):
        """
        Cautious weight decay (arXiv:2510.12402), then the update. All float32; wd_tensor and lr_tensor broadcast.
        D3: p is the float32 weight itself. Upstream keeps it as two halves, the bfloat16 weight and a uint16 mantissa.
        """
        mask = (grad * p) >= 0
        p.copy_(p - (p * mask * wd_tensor * lr_tensor) - (grad * lr_tensor))

    @staticmethod
    def _apply_normuon_variance_reduction(v_chunk: Tensor, second_momentum_buffer: Tensor, beta2: float, red_dim: int) -> Tensor:
        """Scales each row (or column) by its running root mean square and keeps the norm of the matrix (NorMuon, arXiv:2510.05491)."""
        v_mean = v_chunk.float().square().mean(dim=red_dim, keepdim=True)
        red_dim_size = v_chunk.size(red_dim)
        v_norm = (v_mean.sum(dim=(-2, -1), keepdim=True) * red_dim_size).sqrt()
        second_momentum_buffer.copy_(second_momentum_buffer + (1 - beta2) * (v_mean - second_momentum_buffer))
        step_size = second_momentum_buffer.clamp_min(1e-10).rsqrt()
        v_norm_new = ((v_mean * red_dim_size) * step_size.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
        final_scale = step_size * (v_norm / v_norm_new.clamp_min(1e-10))
        return v_chunk * final_scale.type_as(v_chunk)
