"""Losses of tokenizer training against closed forms; LPIPS, discriminator, and the trainer."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import nn

from autoregressive.runtime.checkpoint import save_checkpoint
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.optim import OptimSettings
from tokenizer.tokenizer_image.discriminator import PatchDiscriminator
from tokenizer.tokenizer_image.images import to_float
from tokenizer.tokenizer_image.lpips import LPIPS, load_lpips
from tokenizer.tokenizer_image.quantizer import Quantizer
from tokenizer.tokenizer_image.vq_loss import (
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
    non_saturating_discriminator,
    non_saturating_generator,
)
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel
from tokenizer.tokenizer_image.vq_train import build_parser
from tokenizer.tokenizer_image.vq_trainer import (
    STATISTICS,
    Networks,
    TokenizerSettings,
    TokenizerTrainer,
)
from tokenizer.validation.metrics import ssim

CPU = torch.device("cpu")
GENERATOR, DISCRIMINATOR = STATISTICS.index("generator"), STATISTICS.index("discriminator")


def test_hinge_is_zero_beyond_the_margin_and_linear_inside():
    assert hinge_discriminator(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -5.0])) == 0
    halves = hinge_discriminator(torch.tensor([-1.0, 1.0]), torch.tensor([1.0, -3.0]))
    assert halves == 0.5 * (1 + 1)
    assert hinge_generator(torch.tensor([2.0, -4.0])) == 1


def test_non_saturating_losses_are_binary_cross_entropies():
    cross_entropy = F.binary_cross_entropy_with_logits
    real, fake = torch.randn(3, 4), torch.randn(3, 4)
    ones, zeros = torch.ones(3, 4), torch.zeros(3, 4)
    expected = 0.5 * (cross_entropy(real, ones) + cross_entropy(fake, zeros))
    torch.testing.assert_close(non_saturating_discriminator(real, fake), expected)
    torch.testing.assert_close(non_saturating_generator(fake), cross_entropy(fake, ones))
    assert non_saturating_generator(torch.zeros(2)) == pytest.approx(math.log(2))


@pytest.mark.parametrize("losses", [
    (hinge_discriminator, hinge_generator),
    (non_saturating_discriminator, non_saturating_generator),
])
def test_discriminator_and_generator_pull_fake_logits_apart(losses):
    real, fake = (torch.zeros(4, requires_grad=True) for _ in range(2))
    losses[0](real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()      # a step raises real, lowers fake
    fake.grad = None
    losses[1](fake).backward()
    assert (fake.grad < 0).all()


def test_adaptive_weight_is_the_ratio_of_norms_within_its_bounds():
    gradient = torch.tensor([3.0, 4.0])
    found = adaptive_weight(gradient, torch.tensor([0.0, 2.0]))
    assert found == pytest.approx(5 / 2.0001)
    assert adaptive_weight(gradient, torch.zeros(2)) == 1e4
    assert adaptive_weight(torch.zeros(2), torch.ones(2)) == 0


def test_gradient_passes_straight_through_the_quantiser():
    torch.manual_seed(0)
    quantizer = Quantizer(24, 4).double()
    z = F.normalize(torch.randn(2, 4, 3, 3, dtype=torch.float64), dim=1).requires_grad_()
    weights = torch.randn(2, 4, 3, 3, dtype=torch.float64)

    def score(z_q):
        return (weights * z_q.sin()).sum()

    z_q = quantizer.train()(z, 0.0)[0]
    score(z_q).backward()
    step = 1e-6
    numeric = torch.zeros_like(weights)             # gradient of the score at the quantised point
    for place in range(weights.numel()):
        shift = torch.zeros(weights.numel(), dtype=torch.float64)
        shift[place] = step
        shift = shift.view_as(weights)
        change = score(z_q.detach() + shift) - score(z_q.detach() - shift)
        numeric.view(-1)[place] = change / (2 * step)
    unit = z.detach()                               # the input is of length 1 already
    expected = numeric - unit * (unit * numeric).sum(1, keepdim=True)
    torch.testing.assert_close(z.grad, expected, rtol=1e-4, atol=1e-5)


def test_discriminator_has_the_published_layers():
    for norm, kind in (("group", nn.GroupNorm), ("batch", nn.BatchNorm2d)):
        model = PatchDiscriminator(norm)
        convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        layers = [(c.in_channels, c.out_channels, c.stride[0], c.kernel_size[0], c.bias is not None)
                  for c in convolutions]
        assert layers == [
            (3, 64, 2, 4, True),
            (64, 128, 2, 4, False),
            (128, 256, 2, 4, False),
            (256, 512, 1, 4, False),
            (512, 1, 1, 4, True),
        ]
        assert sum(isinstance(module, kind) for module in model.modules()) == 3
        assert convolutions[1].weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1, 6, 6)


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(0)
    features = {f"features.{name}": value for name, value in LPIPS().features.state_dict().items()}
    save_checkpoint(folder / "vgg16.pth", features | {"classifier.0.weight": torch.zeros(1)})
    linear = {f"lin{number}.model.1.weight": torch.rand(1, width, 1, 1)
              for number, width in enumerate((64, 128, 256, 512, 512))}
    save_checkpoint(folder / "vgg.pth", linear)
    return folder, linear


def test_lpips_is_its_definition(lpips_files):
    folder, linear = lpips_files
    model = load_lpips(folder / "vgg16.pth", folder / "vgg.pth")
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    shift, scale = torch.tensor([-.030, -.088, -.188]), torch.tensor([.458, .448, .450])
    features = [[], []]
    for found, image in zip(features, (x, y), strict=True):
        h = (image - shift[:, None, None]) / scale[:, None, None]
        for number, layer in enumerate(model.features):
            h = layer(h)
            if number in (3, 8, 15, 22, 29):                        # relu1_2, 2_2, 3_3, 4_3, 5_3
                found.append(h / (h.norm(dim=1, keepdim=True) + 1e-10))
    expected = 0
    for number, (a, b) in enumerate(zip(*features, strict=True)):
        weight = linear[f"lin{number}.model.1.weight"]
        expected += F.conv2d((a - b).square(), weight).mean((1, 2, 3))
    torch.testing.assert_close(model(x, y), expected, rtol=1e-5, atol=1e-6)
    assert (model(x, x) == 0).all() and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("missing", ["vgg16.pth", "vgg.pth"])
def test_missing_lpips_weights_say_how_to_go_on_without(lpips_files, tmp_path, missing):
    paths = {name: lpips_files[0] / name for name in ("vgg16.pth", "vgg.pth")}
    paths[missing] = tmp_path / missing
    message = f"{missing}: expected a file, found none; .* --perceptual-weight 0"
    with pytest.raises(ValueError, match=message):
        load_lpips(*paths.values())


def test_ssim_is_that_of_a_gaussian_window():
    def blur(image):
        return gaussian_filter(image, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    random = np.random.default_rng(0)
    x = random.integers(256, size=(2, 20, 20, 3), dtype=np.uint8)
    y = np.clip(x + random.integers(-40, 40, size=x.shape), 0, 255).astype(np.uint8)
    expected = []
    for first, second in zip(x.astype(float), y.astype(float), strict=True):
        values = []
        for channel in range(3):
            a, b = first[..., channel], second[..., channel]
            ma, mb = blur(a), blur(b)
            va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
            above = (2 * ma * mb + 6.5025) * (2 * cov + 58.5225)
            below = (ma**2 + mb**2 + 6.5025) * (va + vb + 58.5225)
            values.append((above / below).mean())
        expected.append(np.mean(values))
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    assert np.allclose(ssim(x, y), expected, rtol=1e-9)
    assert torch.allclose(ssim(x, x), torch.ones(2, dtype=torch.float64))


def make_trainer(**settings):
    torch.manual_seed(0)
    networks = Networks(VQModel(VQConfig("VQ-4-small", 48, 8)), PatchDiscriminator())
    defaults = build_parser().parse_args(["--data-path", "x"]).pick(TokenizerSettings)
    defaults |= {"mixed_precision": "none", "disc_start": 1}
    settings = TokenizerSettings(**defaults | settings)
    session = Session(0, 1, CPU)
    return TokenizerTrainer(networks, settings, OptimSettings(lr=1e-3), session, num_steps=10)


def pictures(count=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 24, 24, 3), dtype=torch.uint8, generator=generator)


def weights_of(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def unchanged(module, before):
    return all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("loss", ["hinge", "non-saturating"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_discriminator_begins_at_its_step_and_is_not_moved_by_the_generators(loss, adaptive):
    trainer = make_trainer(disc_loss=loss, disc_adaptive_weight=adaptive)
    before = weights_of(trainer.discriminator)
    trainer.step(0, pictures(), 1e-3)
    assert unchanged(trainer.discriminator, before)
    trainer.discriminator_optimizer.optimizer.step = lambda: None    # the generator's step alone
    trainer.step(1, pictures(), 1e-3)
    assert unchanged(trainer.discriminator, before) and trainer.meter.sums[GENERATOR] != 0
    del trainer.discriminator_optimizer.optimizer.step
    trainer.step(2, pictures(), 1e-3)
    assert not unchanged(trainer.discriminator, before) and trainer.meter.sums[DISCRIMINATOR] > 0


def test_accumulated_micro_batches_are_one_batch():
    whole, parts = make_trainer(), make_trainer(gradient_accumulation_steps=2)
    for step in range(3):
        for trainer in (whole, parts):
            trainer.step(step, pictures(), 1e-4)
    torch.testing.assert_close(whole.meter.sums, parts.meter.sums, rtol=1e-4, atol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing():
    trainer = make_trainer(disc_start=0)
    trainer.step(0, pictures(), 1e-3)
    before = weights_of(trainer.model), weights_of(trainer.discriminator)
    good = trainer.wrapped.forward
    trainer.wrapped.forward = lambda *inputs: (good(*inputs)[0] * torch.nan, *good(*inputs)[1:])
    trainer.step(1, pictures(), 1e-3)
    assert unchanged(trainer.model, before[0]) and unchanged(trainer.discriminator, before[1])
    assert trainer.meter.first_bad_step(trainer.session) == 1


def test_revival_moves_unused_codes_only_and_onto_present_latents():
    trainer = make_trainer()
    trainer.step(0, pictures(), 1e-3)
    used, before = trainer.used > 0, trainer.model.quantize.embedding.weight.detach().clone()
    count = trainer.revive(1, to_float(pictures()))
    after = trainer.model.quantize.embedding.weight.detach()
    assert count == int((~used).sum()) > 0
    assert torch.equal(after[used], before[used]) and not torch.equal(after[~used], before[~used])
    assert torch.allclose(after[~used].norm(dim=1), torch.ones(count), atol=1e-5)
    assert not trainer.used.any()
