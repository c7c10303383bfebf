"""The loss of the paper: cross-entropy of the token, and of the cluster that the token lies in.

Letters: N rows (batch times tokens), V codes, K clusters, S codes per cluster, V = K * S. z are the logits of a row,
t its target, c = t // S the target's cluster.

    s_j       = logsumexp of z over cluster j              the cluster's logit
    lse       = logsumexp of z over all codes
    L_token   = lse - z_t
    L_cluster = lse - s_c                                  since logsumexp over all s_j is lse
    L         = L_token + lambda * L_cluster
"""

import torch
import torch.nn.functional as F


def check_cluster_size(vocab_size, cluster_size):
    """Raises ValueError unless clusters of `cluster_size` codes divide a codebook of `vocab_size`."""
    if cluster_size < 1 or vocab_size % cluster_size:
        raise ValueError(f"cluster size: expected a divisor of the {vocab_size} codes, got {cluster_size}")


def reference_losses(logits, targets, cluster_size):
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


def token_and_cluster_loss(logits, targets, cluster_size):
    """Computes both losses from three scalars a row: lse, s_c and z_t (SPEC of the method, closed form above).

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
    rows = torch.arange(len(logits), device=logits.device)
    tile = logits.unflatten(-1, (-1, cluster_size))[rows, targets // cluster_size]  # (N, S): the target's cluster
    lse = logits.logsumexp(-1)                                                      # (N,)
    s_c = tile.logsumexp(-1)
    z_t = tile[rows, targets % cluster_size]
    return (lse - z_t).mean(), (lse - s_c).mean()
