"""The loss of the paper: cross-entropy of the token, and of the cluster that the token lies in.

Letters: N rows (batch times tokens), D width, V codes, K clusters, S codes per cluster, V = K * S. z are the logits of
a row, t its target, c = t // S the target's cluster.

    s_j       = logsumexp of z over cluster j              the cluster's logit
    lse       = logsumexp of z over all codes
    L_token   = lse - z_t
    L_cluster = lse - s_c                                  since logsumexp over all s_j is lse
    L         = L_token + lambda * L_cluster
    dL/dz_v   = (1 + lambda) softmax(z)_v - [v = t] - lambda [v in c] exp(z_v - s_c)

Training computes them together with the head: fused_head_loss in chunks of rows, with this gradient; plain_head_loss
with all logits at once, through autograd. Both give the same numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def check_cluster_size(vocab_size: int, cluster_size: int) -> None:
    """Raises ValueError unless clusters of `cluster_size` codes divide a codebook of `vocab_size`."""
    if cluster_size < 1 or vocab_size % cluster_size:
        raise ValueError(f"cluster size: expected a divisor of the {vocab_size} codes, got {cluster_size}")


def reference_losses(logits: Tensor, targets: Tensor, cluster_size: int) -> tuple[Tensor, Tensor]:
    """Computes both losses as the paper writes them: two cross-entropies, one over codes, one over clusters.

    Args:
        logits: (N, V) float.
        targets: (N,) int64 tokens in 0 .. V - 1.
        cluster_size: S, a divisor of V.

    Returns:
        (token loss, cluster loss): scalars, means over the N rows.
    """
    check_cluster_size(logits.shape[-1], cluster_size)
    cluster_logits = logits.unflatten(-1, (-1, cluster_size)).logsumexp(-1)         # (N, K)
    return F.cross_entropy(logits, targets), F.cross_entropy(cluster_logits, targets // cluster_size)


def token_and_cluster_loss(logits: Tensor, targets: Tensor, cluster_size: int) -> tuple[Tensor, Tensor]:
    """Computes both losses from three scalars a row: lse, s_c and z_t (closed form above).

    Equal to reference_losses in value and gradient, without the (N, K) cluster logits: only the S logits of the
    target's own cluster are looked at a second time.

    Args:
        logits: (N, V) float.
        targets: (N,) int64 tokens in 0 .. V - 1.
        cluster_size: S, a divisor of V.

    Returns:
        (token loss, cluster loss): scalars, means over the N rows.

    Raises:
        ValueError: S does not divide V.
    """
    check_cluster_size(logits.shape[-1], cluster_size)
    lse = logits.logsumexp(-1)                                                      # (N,)
    _, z_t, s_c = _target_cluster(logits, targets, cluster_size)
    return (lse - z_t).mean(), (lse - s_c).mean()


def _target_cluster(logits, targets, cluster_size):
    """Returns the logits of the target's cluster, a copy (N, S), and z_t and s_c, (N,)."""
    rows = torch.arange(len(logits), device=logits.device)
    tile = logits.unflatten(-1, (-1, cluster_size))[rows, targets // cluster_size]
    return tile, tile[rows, targets % cluster_size], tile.logsumexp(-1)


def plain_head_loss(features: Tensor, weight: Tensor, targets: Tensor, cluster_size: int,
                    lambda_cce: float) -> tuple[Tensor, Tensor]:
    """Computes the loss from all logits (N, V) at once; the gradient is autograd's.

    Args:
        features: (N, D) float, rows of GPT.features; under autocast the product is computed in its precision.
        weight: (V, D) float, the head.
        targets: (N,) int64 tokens.
        cluster_size: S, a divisor of V.
        lambda_cce: weight of the cluster loss.

    Returns:
        the loss, token + lambda * cluster (float32 scalar), and (token loss, cluster loss, cluster accuracy) as a
        detached (3,): the accuracy is the share of rows whose largest logit lies in the target's cluster.
    """
    logits = F.linear(features, weight).float()
    token_loss, cluster_loss = token_and_cluster_loss(logits, targets, cluster_size)
    hits = logits.detach().argmax(-1) // cluster_size == targets // cluster_size
    statistics = torch.stack([token_loss.detach(), cluster_loss.detach(), hits.float().mean()])
    return token_loss + lambda_cce * cluster_loss, statistics


def fused_head_loss(features: Tensor, weight: Tensor, targets: Tensor, cluster_size: int, lambda_cce: float,
                    rows_at_once: int) -> tuple[Tensor, Tensor]:
    """Computes what plain_head_loss does in chunks of rows, without ever holding all logits.

    The gradient is found in the same pass, by the closed form, while the logits of a chunk are at hand: nothing is
    computed twice, and beyond the results only `rows_at_once` rows of logits are held, in two copies.

    Args:
        features, weight, targets, cluster_size, lambda_cce: as for plain_head_loss.
        rows_at_once: rows of a chunk.

    Returns:
        as plain_head_loss.

    Raises:
        ValueError: S does not divide V.
    """
    check_cluster_size(len(weight), cluster_size)
    kind = features.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype
    return _FusedHeadLoss.apply(features.to(dtype), weight, targets, cluster_size, lambda_cce, rows_at_once)


class _FusedHeadLoss(torch.autograd.Function):

    @staticmethod
    def forward(ctx, features, weight, targets, cluster_size, lambda_cce, rows_at_once):
        head = weight.to(features.dtype)
        wants_gradient = any(ctx.needs_input_grad[:2])
        if wants_gradient:
            grad_features = torch.empty_like(features)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        sums = torch.zeros(3, device=features.device)
        with torch.autocast(features.device.type, enabled=False):
            for first in range(0, len(features), rows_at_once):
                rows = slice(first, first + rows_at_once)
                x, t = features[rows], targets[rows]
                z = (x @ head.t()).float()                                          # (n, V)
                losses, gradient = _chunk(z, t, cluster_size, lambda_cce, wants_gradient)
                sums += losses
                if wants_gradient:
                    gradient = gradient.to(head.dtype)
                    torch.mm(gradient, head, out=grad_features[rows])
                    _add_product(grad_weight, gradient, x)
        if wants_gradient:
            ctx.save_for_backward(grad_features, grad_weight)
        statistics = sums / len(features)
        ctx.mark_non_differentiable(statistics)
        return statistics[0] + lambda_cce * statistics[1], statistics

    @staticmethod
    def backward(ctx, grad_loss, _):
        # The sums over rows become the mean here, after all products: in fp16 a gradient divided by N would vanish.
        grad_features, grad_weight = ctx.saved_tensors
        scale = grad_loss / len(grad_features)
        return (grad_features.float() * scale).to(grad_features.dtype), grad_weight * scale, None, None, None, None


def _chunk(z, targets, cluster_size, lambda_cce, wants_gradient):
    """Returns the sums of (token loss, cluster loss, hits) over float32 logits z (n, V), and dL/dz, made out of z."""
    rows, c = torch.arange(len(z), device=z.device), targets // cluster_size
    tile, z_t, s_c = _target_cluster(z, targets, cluster_size)
    largest, position = z.max(-1)
    z.sub_(largest[:, None]).exp_()                                                 # the one exponential of a logit
    total = z.sum(-1)
    lse = largest + total.log()
    sums = torch.stack([(lse - z_t).sum(), (lse - s_c).sum(), (position // cluster_size == c).sum()])
    if not wants_gradient:
        return sums, None
    gradient = z.mul_(((1 + lambda_cce) / total)[:, None])                          # (1 + lambda) softmax(z)
    gradient.view(len(z), -1, cluster_size)[rows, c] -= lambda_cce * (tile - s_c[:, None]).exp()
    gradient[rows, targets] -= 1
    return sums, gradient


def _add_product(total, gradient, x):
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), x)
    elif gradient.dtype == torch.float16:           # sums over rows may leave its range
        total.addmm_(gradient.t().float(), x.float())
    else:
        total += gradient.t() @ x
