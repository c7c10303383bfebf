"""AdamW, the moving average, and the guarded step that all training shares."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoregressive.runtime.entry import Parser, at_least, between, fraction
from autoregressive.runtime.parallel import (
    check_names,
    copy_part,
    gather_state,
    gather_tensors,
    local_part,
    scatter_state,
    whole_tensor,
)
from autoregressive.runtime.schedules import SCHEDULES

EMA_DECAY = 0.9999
EMA_GROUPS = 8                  # parts of the weights that the average moves one after the other


def add_optim_args(parser: Parser) -> None:
    """Declares the flags of the optimizer and its learning rate."""
    group = parser.add_argument_group("optimizer")
    group.add_argument("--lr", type=at_least(0.0), default=1e-4,
                       help="peak learning rate (1e-4 per 256 images of a batch)")
    group.add_argument("--lr-schedule", default="constant", choices=SCHEDULES,
                       help="what follows the warm-up")
    group.add_argument("--lr-decay-from", type=fraction, default=0.0,
                       help="fraction of the run before the learning rate falls; 0: from the end "
                            "of the warm-up on")
    group.add_argument("--min-lr", type=at_least(0.0), default=0.0,
                       help="what the learning rate falls to")
    group.add_argument("--warmup", type=at_least(0), default=0, help="steps of linear warm-up")
    group.add_argument("--warmup-epochs", type=between(0.0, 1e6), default=0.0,
                       help="epochs of linear warm-up, instead of steps")
    group.add_argument("--weight-decay", type=at_least(0.0), default=0.05,
                       help="on tensors of two or more dimensions only")
    group.add_argument("--beta1", type=fraction, default=0.9, help="first AdamW beta")
    group.add_argument("--beta2", type=fraction, default=0.95, help="second AdamW beta")
    group.add_argument("--max-grad-norm", type=at_least(0.0), default=1.0,
                       help="clip the gradient's norm; 0 is off")
    group.add_argument("--ema", action="store_true",
                       help=f"keep a moving average of the weights, decay {EMA_DECAY}")
    group.add_argument("--ema-warmup", action="store_true",
                       help=f"let the decay rise as (1 + n) / (10 + n) up to {EMA_DECAY}, for runs "
                            "of a few thousand steps")


def check_optim(ema: bool, ema_warmup: bool) -> None:
    """Raises ValueError for flags of add_optim_args without effect."""
    if ema_warmup and not ema:
        raise ValueError("--ema-warmup: expected --ema, whose decay it warms up; give both, or "
                         "neither")


@dataclass(frozen=True)
class OptimSettings:
    """Settings of AdamW, the moving average and clipping: flags of add_optim_args.

    Attributes:
        lr: learning rate, until a step says another.
        beta1, beta2, weight_decay: of AdamW.
        max_grad_norm: bound of the gradient's norm; 0 is none.
        ema: whether a moving average of the weights is kept.
        ema_warmup: whether its decay rises from the first step on.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema: bool = False
    ema_warmup: bool = False


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """Returns AdamW (eps 1e-8) with weight decay on tensors of two or more dimensions only."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.dim() >= 2]
    spared = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay},
              {"params": spared, "weight_decay": 0.0}]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=1e-8, fused=True)


class MovingAverage:
    """Exponential moving average of weights in float32, of decay EMA_DECAY.

    With `warms_up` the decay after n steps is min(EMA_DECAY, (1 + n) / (10 + n)): a constant one
    would keep most of the initial weights in a run of a few thousand steps.

    Attributes:
        warms_up: whether the decay rises.
        weights: name -> averaged weight, float32, sharded as the model's is.
    """

    def __init__(self, model: nn.Module, warms_up: bool = False) -> None:
        self.warms_up = warms_up
        self.weights = {name: weight.detach().clone().float()
                        for name, weight in model.named_parameters()}
        self._groups = self._split_names()

    def _split_names(self) -> list[list[str]]:
        """Returns the names in groups that are moved at once.

        So a few kernels move all, without a second copy of all in memory.
        """
        sizes = {name: local_part(weight).numel() for name, weight in self.weights.items()}
        largest = max(sum(sizes.values()) // EMA_GROUPS, max(sizes.values()))
        groups: list[list[str]] = []
        room = 0
        for name, size in sizes.items():
            if not groups or size > room:
                groups.append([])
                room = largest
            groups[-1].append(name)
            room -= size
        return groups

    @torch.no_grad()
    def update(self, model: nn.Module, num_steps: int, skip: Tensor) -> None:
        """Moves the averages towards the present weights.

        Args:
            model: whose weights these are.
            num_steps: steps that were applied to it.
            skip: scalar on the device; where it is 1, nothing moves.
        """
        decay = EMA_DECAY
        if self.warms_up:
            decay = min(EMA_DECAY, (1 + num_steps) / (10 + num_steps))
        weight_of_new = (1 - decay) * (1 - skip)
        parameters = dict(model.named_parameters())
        for names in self._groups:
            averages = [local_part(self.weights[name]) for name in names]
            weights = [local_part(parameters[name]) for name in names]
            steps = torch._foreach_sub(weights, averages)
            torch._foreach_mul_(steps, weight_of_new)
            torch._foreach_add_(averages, steps)
            del steps                               # or those of two groups would lie in memory


class ModelOptimizer:
    """A model, its AdamW and perhaps an average of its weights: one guarded step, one state.

    A step whose gradient is not finite changes nothing: not the weights, not the moments, not the
    average. That is decided on the device, so that no step waits for it.

    Attributes:
        model: that is trained.
        device: where to compute.
        max_grad_norm: bound of the gradient's norm; infinity is none.
        optimizer: AdamW.
        ema: the moving average, or None.
        scaler: of losses; without effect unless they are computed in float16.
    """

    def __init__(self, model: nn.Module, settings: OptimSettings, device: torch.device,
                 uses_scaler: bool = False) -> None:
        """
        Args:
            model: on its device, sharded if it is to be.
            settings: OptimSettings.
            device: where to compute.
            uses_scaler: whether losses are scaled, as float16 needs.
        """
        self.model = model
        self.device = device
        self.max_grad_norm = settings.max_grad_norm or float("inf")
        self.optimizer = build_optimizer(model, settings)
        self.ema = MovingAverage(model, settings.ema_warmup) if settings.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=uses_scaler)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss."""
        self.scaler.scale(loss).backward()

    def step(self, step: int, lr: float, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clips the gradient and applies it, unless it is not finite.

        Args:
            step: number of the step, from 0.
            lr: its learning rate.
            loss: what has to be finite with a scaler, a scalar on the device.

        Returns:
            the gradient's norm before clipping, and whether the step was bad, both scalars on the
            device. A step is bad if its gradient is not finite; with a scaler, which expects that
            gradients overflow now and then and skips these steps, if its loss is not.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        norm = whole_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
        if self.scaler.is_enabled():
            is_bad = ~loss.isfinite()
            skip = self._step_with_scaler()
        else:
            is_bad = ~norm.isfinite()
            skip = is_bad.to(torch.float32)         # the type that fused optimizers read
            self.optimizer.found_inf = skip         # a fused optimizer does nothing where this is 1
            self.optimizer.grad_scale = None
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model, step + 1, skip)
        return norm.detach(), is_bad

    def _step_with_scaler(self) -> Tensor:
        """Applies the gradient; returns 1, and does not, if it overflowed, else 0 (float32)."""
        one = torch.ones((), device=self.device)
        before = self.scaler.scale(one)             # on the device: get_scale would wait for it
        self.scaler.step(self.optimizer)
        self.scaler.update()                        # lowers the scale where a gradient overflowed
        return (self.scaler.scale(one) < before).float()

    def best_weights(self, keep: bool = True) -> dict[str, Tensor]:
        """Returns copies of the whole weights on the CPU, averaged ones where there are any.

        All processes call this; those that do not `keep` them get none.
        """
        best = self.model.state_dict()
        if self.ema:
            best |= self.ema.weights
        weights = {}
        for name, weight in best.items():
            whole = whole_tensor(weight)
            if keep:
                weights[name] = whole.detach().cpu().clone()
        return weights

    def state(self) -> dict[str, Any]:
        """Returns all that training continues from, as plain containers, on rank 0.

        All processes call this.
        """
        model, optimizer = gather_state(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "scaler": self.scaler.state_dict()}
        if self.ema:
            state["ema"] = gather_tensors(self.ema.weights)
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Loads what `state` returned, read on every process.

        Raises:
            ValueError: it holds no average but one is kept.
        """
        if self.ema and "ema" not in state:
            raise ValueError("--ema: expected a checkpoint with an average of the weights, found "
                             "none; start without --ema")
        scatter_state(self.model, state["model"], self.optimizer, state["optimizer"])
        if "scaler" in state:                       # public checkpoints hold none
            self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            check_names("averages", self.ema.weights, state["ema"])
            for name, weight in self.ema.weights.items():
                copy_part(f"average of {name}", state["ema"][name], weight)
