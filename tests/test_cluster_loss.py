"""Both forms of the loss against cross-entropies, the gradient's equation, and each other."""

import functools

import pytest
import torch
import torch.nn.functional as F

from autoregressive.models.cluster_loss import fused_head_loss, plain_head_loss

FUSED = functools.partial(fused_head_loss, rows_at_once=5)
BOTH = (plain_head_loss, FUSED)


def losses_of(head_loss, logits, targets, cluster_size, weight=1.0):
    """Returns the loss and the statistics of logits (N, V): the head is the identity."""
    head = torch.eye(logits.shape[1], dtype=logits.dtype)
    return head_loss(logits, head, targets, cluster_size=cluster_size, lambda_cce=weight)


@pytest.mark.parametrize("head_loss, dtype, tolerance", [
    (plain_head_loss, torch.float64, 1e-10),
    (plain_head_loss, torch.float32, 1e-5),
    (FUSED, torch.float32, 1e-5),
])
@pytest.mark.parametrize("cluster_size", [1, 2, 3, 8, 24])
@pytest.mark.parametrize("weight", [0.0, 1.0, 0.37])
def test_losses_are_cross_entropies_of_codes_and_of_clusters(
        head_loss, dtype, tolerance, cluster_size, weight):
    torch.manual_seed(cluster_size)
    logits = (5 * torch.randn(13, 24, dtype=dtype)).requires_grad_()
    targets = torch.randint(24, (13,))
    cluster_logits = logits.unflatten(-1, (-1, cluster_size)).logsumexp(-1)
    token_loss = F.cross_entropy(logits, targets)
    cluster_loss = F.cross_entropy(cluster_logits, targets // cluster_size)
    loss = token_loss + weight * cluster_loss
    expected = loss, token_loss, cluster_loss, *torch.autograd.grad(loss, logits)
    loss, statistics = losses_of(head_loss, logits, targets, cluster_size, weight)
    found = loss, *statistics[:2], *torch.autograd.grad(loss, logits)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * max(1.0, other.abs().max())


@pytest.mark.parametrize("head_loss, dtype, tolerance", [
    (plain_head_loss, torch.float64, 1e-12),
    (FUSED, torch.float32, 1e-6),
])
def test_gradient_equals_the_equation(head_loss, dtype, tolerance):
    torch.manual_seed(0)
    logits = torch.randn(5, 12, dtype=dtype, requires_grad=True)
    targets, size, weight = torch.tensor([0, 11, 5, 6, 3]), 4, 0.7
    loss, _ = losses_of(head_loss, logits, targets, size, weight)
    gradient, = torch.autograd.grad(loss, logits)
    z = logits.detach()
    for row, t in enumerate(targets.tolist()):
        inside = torch.arange(12) // size == t // size
        s_c = z[row][inside].logsumexp(0)
        peak = torch.arange(12) == t
        share_in_cluster = inside * (z[row] - s_c).exp()
        expected = (1 + weight) * z[row].softmax(0) - 1.0 * peak - weight * share_in_cluster
        found = gradient[row] * 5                       # the loss is a mean over 5 rows
        assert torch.allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize("head_loss", BOTH)
def test_cluster_of_all_codes_has_no_cluster_loss(head_loss):
    _, statistics = losses_of(head_loss, torch.randn(4, 6), torch.tensor([1, 5, 0, 3]), 6)
    assert statistics[1].abs() < 1e-6


@pytest.mark.parametrize("head_loss", BOTH)
def test_huge_logits_stay_finite(head_loss):
    logits = torch.tensor([[1e4, -1e4, 0.0, 5.0]], requires_grad=True)
    loss, _ = losses_of(head_loss, logits, torch.tensor([1]), 2)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("head_loss", BOTH)
def test_size_that_does_not_divide_the_codebook_is_refused(head_loss):
    with pytest.raises(ValueError, match="expected a divisor of the 24 codes, got 5"):
        losses_of(head_loss, torch.zeros(2, 24), torch.zeros(2).long(), 5)


def losses_and_gradients(head_loss, *options, dtype=torch.float32, precision=None, weight=0.7):
    torch.manual_seed(0)
    features = torch.randn(13, 16, dtype=dtype, requires_grad=True)
    head = torch.randn(24, 16, dtype=dtype, requires_grad=True)
    targets = torch.randint(24, (13,))
    with torch.autocast("cpu", precision, enabled=precision is not None):
        loss, statistics = head_loss(features, head, targets, 4, weight, *options)
    (3 * loss).backward()
    return loss.detach(), statistics, features.grad, head.grad


@pytest.mark.parametrize("rows_at_once", [1, 5, 13, 100])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_fused_loss_equals_the_plain_one_in_value_statistics_and_gradients(rows_at_once, weight):
    expected = losses_and_gradients(plain_head_loss, weight=weight)
    found = losses_and_gradients(fused_head_loss, rows_at_once, weight=weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found[0] - expected[0]).abs() <= 1e-6 * expected[0]


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_lambda_as_a_tensor_is_lambda_as_a_number(weight):
    changing = torch.tensor(weight)
    plain = losses_and_gradients(plain_head_loss, weight=changing)
    fused = losses_and_gradients(fused_head_loss, 5, weight=changing)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    for found, options in ((plain, (plain_head_loss,)), (fused, (fused_head_loss, 5))):
        expected = losses_and_gradients(*options, weight=weight)
        for one, other in zip(found, expected, strict=True):
            if weight in (0.0, 1.0):                # what float32 holds exactly
                assert torch.equal(one, other)
            assert (one - other).norm() <= 1e-7 * other.norm()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_fused_loss_follows_autocast(precision):
    expected = losses_and_gradients(plain_head_loss, precision=precision)
    found = losses_and_gradients(fused_head_loss, 5, precision=precision)
    exact = losses_and_gradients(plain_head_loss)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-6)
    for place in (2, 3):            # as near to float32 as autograd's is, within a factor
        error, allowed = ((result[place] - exact[place]).norm() for result in (found, expected))
        assert 0 < error < 2 * allowed and found[place].dtype == torch.float32


def test_fused_loss_of_many_rows_keeps_small_gradients_in_fp16():
    torch.manual_seed(0)
    features, head = torch.randn(4096, 16, requires_grad=True), torch.randn(24, 16)
    targets = torch.randint(24, (4096,))
    gradients = []
    for precision in (torch.float16, None):
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss, _ = fused_head_loss(features, head, targets, 4, 1.0, 512)
        gradients += torch.autograd.grad(loss * 2**12, features)    # scaled, as a GradScaler does
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[1].norm()


def test_accuracy_counts_rows_whose_largest_logit_lies_in_the_cluster():
    features = torch.eye(4)[[0, 1, 2]]
    head = 5 * torch.eye(4)                                     # row i prefers code i
    for options in ((plain_head_loss,), (fused_head_loss, 2)):
        statistics = options[0](features, head, torch.tensor([1, 3, 3]), 2, 1.0, *options[1:])[1]
        assert statistics[2] == pytest.approx(2 / 3)


def test_fused_loss_without_gradients_gives_the_same_values():
    features, head, targets = torch.randn(7, 16), torch.randn(24, 16), torch.randint(24, (7,))
    with torch.no_grad():
        torch.testing.assert_close(fused_head_loss(features, head, targets, 4, 1.0, 3),
                                   plain_head_loss(features, head, targets, 4, 1.0))
