"""What is optimised, and one update of it.

Letters: B batch, T tokens.
"""

import torch
from torch import nn

PRECISIONS = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Objective(nn.Module):
    """The loss of a GPT as a module, so that DDP and compile can wrap it; weights are saved from `.model`.

    `losses` maps logits (N, V) and targets (N,) to (token loss, cluster loss).
    """

    def __init__(self, model, losses, lambda_cce):
        super().__init__()
        self.model, self.losses, self.lambda_cce = model, losses, lambda_cce

    def forward(self, tokens, labels):
        """Computes the loss of a batch.

        Args:
            tokens: (B, T) int64.
            labels: (B,) int64, the null label where it was dropped.

        Returns:
            the loss, token + lambda * cluster (scalar, float32), and (token loss, cluster loss) as a detached (2,).
        """
        logits = self.model(tokens[:, :-1], labels)                                 # (B, T, V)
        token_loss, cluster_loss = self.losses(logits.flatten(0, 1), tokens.flatten())
        return token_loss + self.lambda_cce * cluster_loss, torch.stack([token_loss, cluster_loss]).detach()


class Trainer:
    """Applies updates and keeps the sums that the log needs on the device: no host sync in between."""

    def __init__(self, objective, optimizer, device, precision, max_grad_norm):
        self.objective, self.optimizer = objective, optimizer
        self.device, self.max_grad_norm = device, max_grad_norm
        self.autocast_dtype = PRECISIONS[precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.sums = torch.zeros(3, device=device)                                   # token loss, cluster loss, norm
        self.count = 0

    def update(self, tokens, labels, lr):
        """Applies one update from this process's part of the batch.

        Args:
            tokens: (B, T) int64 and labels (B,) int64, on the CPU.
            lr: learning rate.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        tokens, labels = tokens.to(self.device), labels.to(self.device)
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            loss, losses = self.objective(tokens, labels)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.max_grad_norm or float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.sums += torch.cat([losses, norm[None]])
        self.count += 1

    def drain(self, session):
        """Returns the means since the last call over all processes, as a dict of floats, and starts anew."""
        means = session.sum(self.sums / self.count) / session.world_size
        self.sums, self.count = torch.zeros_like(self.sums), 0
        return dict(zip(("token_loss", "cluster_loss", "grad_norm"), means.tolist(), strict=True))
