"""What is optimised, and one update of it.

Letters: B batch, T tokens, D width, V codes.
"""

import torch
from torch import nn

from autoregressive.runtime.distributed import gather_state, scatter_state, shard_like, sync_gradients, whole_tensor

PRECISIONS = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
STATISTICS = ("token_loss", "cluster_loss", "cluster_accuracy", "grad_norm")
EMA_DECAY = 0.9999


class Objective(nn.Module):
    """The loss of a GPT as a module, so that DDP, FSDP and compile can wrap it; weights are saved from `.model`.

    `head_loss` maps features (N, D), head (V, D) and targets (N,) to the loss and its statistics (3,).
    """

    def __init__(self, model, head_loss):
        super().__init__()
        self.model, self.head_loss = model, head_loss

    def forward(self, tokens, labels):
        """Computes the loss of a batch.

        Args:
            tokens: (B, T) int64.
            labels: (B,) int64, the null label where it was dropped.

        Returns:
            the loss, token + lambda * cluster (scalar, float32), and (token loss, cluster loss, cluster accuracy) as a
            detached (3,).
        """
        features = self.model.features(tokens[:, :-1], labels)                      # (B, T, D)
        return self.head_loss(features.flatten(0, 1), self.model.output.weight, tokens.flatten())


class MovingAverage:
    """Exponential moving average of weights in float32; its decay warms up as min(EMA_DECAY, (1 + n) / (10 + n))."""

    def __init__(self, model):
        self.weights = {name: weight.detach().clone().float() for name, weight in model.named_parameters()}

    @torch.no_grad()
    def update(self, model, num_updates, skip):
        """Moves towards the weights after `num_updates` updates; not at all where the scalar tensor `skip` is 1."""
        step = (1 - min(EMA_DECAY, (1 + num_updates) / (10 + num_updates))) * (1 - skip)
        for name, weight in model.named_parameters():
            average = self.weights[name]
            average.add_((weight - average) * step)


class Trainer:
    """Applies updates, and keeps on the device what the log needs: no host sync in between.

    An update whose gradient is not finite changes nothing: not the weights, not the moments, not the average.
    """

    def __init__(self, objective, wrapped, optimizer, device, precision, max_grad_norm, accumulation=1, ema=None):
        """
        Args:
            objective: Objective.
            wrapped: what is called: `objective`, or what DDP or FSDP made of it.
            optimizer: a fused one, whose step can be skipped on the device.
            device: where to compute.
            precision: one of PRECISIONS, of the forward pass.
            max_grad_norm: bound of the gradient's norm; 0 is none.
            accumulation: micro-batches of an update.
            ema: MovingAverage or None.
        """
        self.objective, self.wrapped, self.optimizer, self.ema = objective, wrapped, optimizer, ema
        self.device, self.max_grad_norm, self.accumulation = device, max_grad_norm, accumulation
        self.autocast_dtype = PRECISIONS[precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.sums = torch.zeros(len(STATISTICS), device=device)
        self.count = 0
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)       # update that was not finite

    def update(self, number, tokens, labels, lr):
        """Applies one update from this process's part of the batch.

        Args:
            number: of the update, from 0.
            tokens: (B, T) int64 and labels (B,) int64, on the CPU; B is a multiple of the accumulation.
            lr: learning rate.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.device.type == "cuda":
            tokens, labels = tokens.pin_memory(), labels.pin_memory()
        tokens, labels = tokens.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        statistics = sum(self._backward(part, part_labels, last) for part, part_labels, last in zip(
            tokens.chunk(self.accumulation), labels.chunk(self.accumulation),
            [False] * (self.accumulation - 1) + [True], strict=True))
        self.scaler.unscale_(self.optimizer)
        norm = whole_tensor(nn.utils.clip_grad_norm_(self.objective.parameters(), self.max_grad_norm or float("inf")))
        bad = ~(norm.isfinite() if not self.scaler.is_enabled() else statistics[0].isfinite())
        self._step(number, bad)
        self.sums += torch.cat([statistics, norm.detach()[None]])
        self.count += 1
        self.first_bad = torch.where(bad & (self.first_bad < 0), number, self.first_bad)

    def _backward(self, tokens, labels, is_last):
        with sync_gradients(self.wrapped, is_last):
            with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                loss, statistics = self.wrapped(tokens, labels)
            self.scaler.scale(loss / self.accumulation).backward()
        return statistics / self.accumulation

    def _step(self, number, bad):
        skip = bad.float()
        if self.scaler.is_enabled():                # skips by itself, and lowers its scale, where a gradient overflowed
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            skip = torch.tensor(float(self.scaler.get_scale() < before), device=self.device)
        else:
            self.optimizer.found_inf, self.optimizer.grad_scale = skip, None        # of fused optimizers: step or not
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.objective.model, number + 1, skip)

    def whole_state(self):
        """Returns everything that training continues from, as plain containers, on rank 0 (all processes call this)."""
        model, optimizer = gather_state(self.objective.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "scaler": self.scaler.state_dict()}
        if self.ema:
            state["ema"] = {name: whole_tensor(weight).cpu() for name, weight in self.ema.weights.items()}
        return state

    def load_whole_state(self, state):
        """Loads what whole_state returned, read on every process."""
        scatter_state(self.objective.model, state["model"], self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            for name, weight in self.ema.weights.items():
                weight.copy_(shard_like(state["ema"][name], weight))

    def bad_update(self, session):
        """Returns the first update that was not finite on any process; -1 if all were. Waits for the device."""
        found = [number for number in session.gather(int(self.first_bad)) if number >= 0]
        return min(found, default=-1)

    def drain(self, session):
        """Returns the means since the last call over all processes, as a dict of floats, and starts anew."""
        means = session.sum(self.sums / self.count) / session.world_size
        self.sums, self.count = torch.zeros_like(self.sums), 0
        return dict(zip(STATISTICS, means.tolist(), strict=True))

    @torch.no_grad()
    def evaluate(self, batches, session):
        """Returns the mean losses over all batches, without dropout, as a dict of floats."""
        part = session.share_of(batches.batch_size)
        sums = torch.zeros(len(STATISTICS) - 1, device=self.device)
        self.objective.eval()
        for index in range(batches.per_epoch):
            tokens, labels = (tensor.to(self.device) for tensor in batches.batch(index, part))
            with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                sums += self.wrapped(tokens, labels)[1] * (len(tokens) / batches.batch_size)
        self.objective.train()
        means = session.sum(sums) / batches.per_epoch
        return {f"heldout_{name}": value for name, value in zip(STATISTICS, means.tolist(), strict=False)}
