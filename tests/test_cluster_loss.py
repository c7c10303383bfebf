"""The closed form of the loss against the paper's form."""

import pytest
import torch

from autoregressive.models.cluster_loss import reference_losses, token_and_cluster_loss


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
