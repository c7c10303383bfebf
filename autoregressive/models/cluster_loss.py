"""The loss of the paper: cross-entropy of the token, and of the cluster that the token lies in.

Letters: N rows (batch times tokens), D width, V codes, K clusters, S codes per cluster, V = K * S,
M targets of a row. z are the logits of a row, t its target, c = t // S the target's cluster.

    s_j       = logsumexp of z over cluster j              the cluster's logit
    lse       = logsumexp of z over all codes
    L_token   = lse - z_t
    L_cluster = lse - s_c                                  since logsumexp over all s_j is lse
    L         = L_token + lambda * L_cluster
    dL/dz_v   = (1 + lambda) softmax(z)_v - [v = t] - lambda [v in c] exp(z_v - s_c)

Of several targets, those of a patch, the loss is the mean, and so is the gradient; targets that are
equal or share a cluster add. In guidance-free training z are the logits of features plus `fixed`
ones, which carry no gradient, not even to the head: dL/dW is the product with `features` alone.

There are two forms of it, both computed together with the head that makes the logits, and of the
same numbers up to rounding. plain_head_loss writes the equations down for all logits at once and
leaves the gradient to autograd. fused_head_loss, which training uses, goes through the rows in
chunks and computes the gradient by the last equation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


def check_cluster_size(vocab_size: int, cluster_size: int) -> None:
    """Raises ValueError unless clusters of `cluster_size` codes divide `vocab_size` codes."""
    if cluster_size < 1 or vocab_size % cluster_size:
        raise ValueError(f"cluster size: expected a divisor of the {vocab_size} codes, "
                         f"got {cluster_size}")


def plain_head_loss(features: Tensor, weight: Tensor, targets: Tensor, cluster_size: int,
                    lambda_cce: float | Tensor,
                    fixed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Computes the loss as the equations say, from all logits (N, V) at once.

    Args:
        features: (N, D) float, rows of GPT.features; under autocast the logits are computed in its
            precision, and the loss in float32 all the same.
        weight: (V, D) float, the head.
        targets: (N,) int64 tokens in 0 .. V - 1, or (N, M) of several targets a row.
        cluster_size: S, a divisor of V.
        lambda_cce: weight of the cluster loss; a float32 scalar on the device if it changes.
        fixed: (N, D) float, added to the features, without a gradient to it or through it; or None.

    Returns:
        the loss, a mean over the rows (scalar, float32 at least), and a detached (3,) of token
        loss, cluster loss and cluster accuracy: the fraction of targets in whose cluster their
        row's largest logit lies.

    Raises:
        ValueError: S does not divide V.
    """
    check_cluster_size(len(weight), cluster_size)
    targets = targets.view(len(targets), -1)                        # (N, M)
    clusters = targets // cluster_size                              # (N, M)
    logits = F.linear(features, weight)                             # (N, V)
    if fixed is not None:
        logits = logits + F.linear(fixed.detach(), weight.detach())
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = logits.logsumexp(-1, keepdim=True)                        # (N, 1)
    s = logits.unflatten(-1, (-1, cluster_size)).logsumexp(-1)      # (N, K)
    s_c = s.gather(-1, clusters)                                    # (N, M)
    z_t = logits.gather(-1, targets)                                # (N, M)
    token_loss = (lse - z_t).mean()
    cluster_loss = (lse - s_c).mean()
    largest = logits.detach().argmax(-1, keepdim=True)              # (N, 1)
    hits = largest // cluster_size == clusters                      # (N, M)
    statistics = torch.stack([token_loss.detach(), cluster_loss.detach(), hits.float().mean()])
    return token_loss + lambda_cce * cluster_loss, statistics


def fused_head_loss(features: Tensor, weight: Tensor, targets: Tensor, cluster_size: int,
                    lambda_cce: float | Tensor, rows_at_once: int,
                    fixed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Computes what plain_head_loss does in chunks of rows, without ever holding all logits.

    The gradient is found in the same pass, by the closed form, while the logits of a chunk are at
    hand: nothing is computed twice, and beyond the results only `rows_at_once` rows of logits are
    held, in two copies.

    Args:
        features, weight, targets, cluster_size, lambda_cce, fixed: as for plain_head_loss.
        rows_at_once: rows of a chunk.

    Returns:
        as plain_head_loss.

    Raises:
        ValueError: S does not divide V.
    """
    check_cluster_size(len(weight), cluster_size)
    kind = features.device.type
    dtype = features.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    mixed = None if fixed is None else (features + fixed).detach().to(dtype)
    targets = targets.view(len(targets), -1)                        # (N, M)
    return _FusedHeadLoss.apply(features.to(dtype), mixed, weight, targets, lambda_cce,
                                (cluster_size, rows_at_once))


class _FusedHeadLoss(torch.autograd.Function):
    """The loss and its statistics, with the gradients of features and weight made in forward."""

    @staticmethod
    def forward(ctx: FunctionCtx, features: Tensor, mixed: Tensor | None, weight: Tensor,
                targets: Tensor, lambda_cce: float | Tensor,
                sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
        cluster_size, rows_at_once = sizes
        head = weight.to(features.dtype)                            # (V, D)
        wants_gradient = any(ctx.needs_input_grad)
        if wants_gradient:
            grad_features = torch.empty_like(features)              # (N, D)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)     # (V, D)
        sums = torch.zeros(3, device=features.device)
        with torch.autocast(features.device.type, enabled=False):
            for first in range(0, len(features), rows_at_once):
                rows = slice(first, first + rows_at_once)
                x = features[rows]                                  # (n, D)
                z = ((x if mixed is None else mixed[rows]) @ head.t()).float()      # (n, V)
                losses, gradient = _loss_of_chunk(z, targets[rows], cluster_size, lambda_cce,
                                                  wants_gradient)
                sums += losses
                if wants_gradient:
                    gradient = gradient.to(head.dtype)              # (n, V)
                    torch.mm(gradient, head, out=grad_features[rows])
                    _add_product(grad_weight, gradient, x)
        if wants_gradient:
            ctx.save_for_backward(grad_features, grad_weight)
        statistics = sums / len(features)
        ctx.mark_non_differentiable(statistics)
        return statistics[0] + lambda_cce * statistics[1], statistics

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # The sums over rows become the mean here, after all products: in fp16 a gradient divided
        # by N would vanish.
        grad_features, grad_weight = ctx.saved_tensors
        scale = grad_loss / len(grad_features)
        grad_features = (grad_features.float() * scale).to(grad_features.dtype)
        return grad_features, None, grad_weight * scale, None, None, None


def _loss_of_chunk(z: Tensor, targets: Tensor, cluster_size: int, lambda_cce: float | Tensor,
                   wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Returns the sums (3,) of token loss, cluster loss and hits over the rows, and dL/dz.

    Args:
        z: (n, V) float32 logits, overwritten: dL/dz (n, V) is made in their place.
        targets: (n, M) int64.
        cluster_size: S.
        lambda_cce: weight of the cluster loss.
        wants_gradient: whether dL/dz is computed; else it is None.
    """
    num_targets = targets.shape[1]
    rows = torch.arange(len(z), device=z.device)                    # (n,)
    clusters = targets // cluster_size                              # (n, M)
    # The targets' clusters, copied before the logits are overwritten.
    z_c = z.unflatten(-1, (-1, cluster_size))[rows[:, None], clusters]      # (n, M, S)
    z_t = z_c.gather(-1, (targets % cluster_size)[..., None])[..., 0]       # (n, M)
    s_c = z_c.logsumexp(-1)                                         # (n, M)

    # The losses. From here on z holds exp(z - largest).
    largest, position = z.max(-1, keepdim=True)                     # (n, 1)
    z.sub_(largest).exp_()
    total = z.sum(-1, keepdim=True)
    lse = largest + total.log()
    hits = position // cluster_size == clusters                     # (n, M)
    sums = torch.stack([(lse - z_t).sum(), (lse - s_c).sum(), hits.sum()]) / num_targets
    if not wants_gradient:
        return sums, None

    # The gradient, in the place of z. Target by target: those of a row may be equal, or share a
    # cluster, and an indexed subtraction of all at once would count one of them.
    gradient = z.mul_((1 + lambda_cce) / total)                     # (1 + lambda) softmax(z)
    tiles = gradient.view(len(z), -1, cluster_size)                 # (n, K, S)
    inside = (z_c - s_c[..., None]).exp()                           # (n, M, S)
    for number in range(num_targets):
        tiles[rows, clusters[:, number]] -= lambda_cce / num_targets * inside[:, number]
        gradient[rows, targets[:, number]] -= 1 / num_targets
    return sums, gradient


def _add_product(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """Adds the product (V, D) of gradient (n, V) and x (n, D) to a float32 total, in place."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), x)
    elif gradient.dtype == torch.float16:       # sums over rows may leave its range
        total.addmm_(gradient.t().float(), x.float())
    else:
        total += gradient.t() @ x
