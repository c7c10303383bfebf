"""The closed form of the loss against the paper's form."""

import pytest
import torch

from autoregressive.models.cluster_loss import (
    fused_head_loss,
    plain_head_loss,
    reference_losses,
    token_and_cluster_loss,
)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("cluster_size", [1, 2, 3, 8, 24])
@pytest.mark.parametrize("weight", [0.0, 1.0, 0.37])
def test_closed_form_equals_the_paper_in_value_and_gradient(dtype, tolerance, cluster_size, weight):
    torch.manual_seed(cluster_size)
    logits = (5 * torch.randn(13, 24, dtype=dtype)).requires_grad_()
    targets = torch.randint(24, (13,))
    results = []
    for losses in (reference_losses, token_and_cluster_loss):
        token_loss, cluster_loss = losses(logits, targets, cluster_size)
        gradient, = torch.autograd.grad(token_loss + weight * cluster_loss, logits)
        results.append((token_loss, cluster_loss, gradient))
    for expected, found in zip(*results, strict=True):
        assert (found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())


def test_gradient_equals_the_equation():
    torch.manual_seed(0)
    logits = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    targets, size, weight = torch.tensor([0, 11, 5, 6, 3]), 4, 0.7
    token_loss, cluster_loss = token_and_cluster_loss(logits, targets, size)
    gradient, = torch.autograd.grad(token_loss + weight * cluster_loss, logits)
    z = logits.detach()
    for row, t in enumerate(targets.tolist()):
        inside = torch.arange(12) // size == t // size
        s_c = z[row][inside].logsumexp(0)
        peak = torch.arange(12) == t
        expected = (1 + weight) * z[row].softmax(0) - 1.0 * peak - weight * inside * (z[row] - s_c).exp()
        assert torch.allclose(gradient[row] * 5, expected, atol=1e-12)       # the loss is a mean over 5 rows


def test_cluster_of_all_codes_has_no_cluster_loss():
    logits, targets = torch.randn(4, 6), torch.tensor([1, 5, 0, 3])
    assert token_and_cluster_loss(logits, targets, 6)[1].abs() < 1e-6


def test_huge_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0, 5.0]], requires_grad=True)
    loss = sum(token_and_cluster_loss(logits, torch.tensor([1]), 2))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_size_that_does_not_divide_the_codebook_is_refused():
    with pytest.raises(ValueError, match="expected a divisor of the 24 codes, got 5"):
        token_and_cluster_loss(torch.zeros(2, 24), torch.zeros(2).long(), 5)


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


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_fused_loss_follows_autocast(precision):
    expected = losses_and_gradients(plain_head_loss, precision=precision)
    found = losses_and_gradients(fused_head_loss, 5, precision=precision)
    exact = losses_and_gradients(plain_head_loss)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-6)
    for place in (2, 3):                                         # as near to float32 as autograd's is, within a factor
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
        gradients += torch.autograd.grad(loss * 2**12, features)                    # scaled, as a GradScaler does
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[1].norm()


def test_accuracy_counts_rows_whose_largest_logit_lies_in_the_cluster():
    features = torch.eye(4)[[0, 1, 2]]
    head = torch.tensor([[5.0, 0, 0, 0], [0, 5, 0, 0], [0, 0, 5, 0], [0, 0, 0, 5]])  # row i prefers code i
    for options in ((plain_head_loss,), (fused_head_loss, 2)):
        statistics = options[0](features, head, torch.tensor([1, 3, 3]), 2, 1.0, *options[1:])[1]
        assert statistics[2] == pytest.approx(2 / 3)


def test_fused_loss_without_gradients_gives_the_same_values():
    features, head, targets = torch.randn(7, 16), torch.randn(24, 16), torch.randint(24, (7,))
    with torch.no_grad():
        torch.testing.assert_close(fused_head_loss(features, head, targets, 4, 1.0, 3),
                                   plain_head_loss(features, head, targets, 4, 1.0))
