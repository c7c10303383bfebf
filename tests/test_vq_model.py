"""VQ models against published shapes and computed fixtures; the quantiser against closed forms."""

import json
import zlib

import pytest
import torch
import torch.nn.functional as F

from conftest import FIXTURES
from tokenizer.tokenizer_image.quantizer import Quantizer, full_float32, nearest_codes
from tokenizer.tokenizer_image.vq_model import VQ_MODELS, VQConfig, VQModel, downsampling

BUDGET = "tokenizer.tokenizer_image.quantizer.CPU_BUDGET"


def weights_by_rule(model):
    """The fixture's weights: seeded by the name of each tensor."""
    state = {}
    for name, tensor in model.state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("codebook_used"):
            noise = torch.zeros(tensor.shape)
        elif noise.dim() == 1:
            noise = 1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.1 * noise
        elif "embedding" not in name:
            noise = noise / noise[0].numel() ** 0.5
        state[name] = noise
    return state


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(scope="module")
def vq16():
    with torch.device("meta"):
        model = VQModel(VQConfig("VQ-16"))
    model.load_state_dict(weights_by_rule(model), assign=True)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def published(fixture):
    return fixture("vq_vq16")


@pytest.mark.parametrize("name", ["VQ-16", "VQ-8"])
def test_keys_and_shapes_are_the_published_ones(name):
    with torch.device("meta"):
        state = VQModel(VQConfig(name)).state_dict()
    published = json.loads((FIXTURES / "state_dict_shapes.json").read_text())[name]
    assert {key: list(tensor.shape) for key, tensor in state.items()} == published


def test_weights_of_the_fixture_are_rebuilt_by_its_rule(vq16, published):
    sums = {name: tensor.double().sum().item() for name, tensor in vq16.state_dict().items()}
    assert sums == pytest.approx(published["weight_sum"], rel=1e-6, abs=1e-4)


def test_vq16_encodes_as_published(vq16, published):
    latents = vq16.encode(published["x"])
    assert relative_error(latents, published["z_e"]) < 2e-5
    is_clear = published["index_margin"] > 1e-5
    codes = vq16.quantize.codes(latents).flatten()
    assert torch.equal(codes[is_clear], published["indices"][is_clear])


def test_vq16_decodes_codes_as_published(vq16, published):
    assert relative_error(vq16.decode_codes(published["code"], 4), published["decoded"]) < 2e-5


def test_vq16_reconstructs_as_published(vq16, published):
    reconstruction, _, codes = vq16(published["x"])
    assert relative_error(reconstruction, published["reconstruction"]) < 2e-5
    assert relative_error(vq16.quantize.vectors(codes, 4, 4), published["z_q"]) < 2e-5


@pytest.mark.parametrize("name", list(VQ_MODELS))
def test_grid_is_the_image_size_over_the_downsampling(name):
    with torch.device("meta"):
        model = VQModel(VQConfig(name, 24, 3))
        latents = model.encode(torch.empty(2, 3, 32, 48))
        assert latents.shape == (2, 3, 32 // downsampling(name), 48 // downsampling(name))
        assert model.decode(latents).shape == (2, 3, 32, 48)


def test_small_model_has_about_a_million_parameters():
    with torch.device("meta"):
        count = sum(p.numel() for p in VQModel(VQConfig("VQ-4-small", 512, 8)).parameters())
    assert 0.4e6 < count < 1.2e6


@pytest.mark.parametrize("config", [
    ("VQ-2",), ("VQ-16", 0), ("VQ-16", -1, -1), ("VQ-8", 2**31), ("VQ-8", 1, 0)])
def test_config_of_no_model_is_refused(config):
    with pytest.raises(ValueError, match="expected .* got"):
        VQConfig(*config)


def test_codebook_of_one_code_encodes_everything_as_it():
    model = VQModel(VQConfig("VQ-4-small", 1, 3)).eval()
    reconstruction, losses, codes = model(torch.rand(2, 3, 8, 12), 0.1)
    assert not codes.any() and reconstruction.shape == (2, 3, 8, 12)
    assert torch.isfinite(torch.stack(losses)).all()


@pytest.fixture(scope="module")
def trained_step(fixture):
    expected = fixture("vq_quantizer_train")
    quantizer = Quantizer(expected["n_e"], expected["e_dim"])
    quantizer.embedding.weight.data.copy_(expected["embedding"])
    z_q, losses, codes = quantizer(expected["z"], expected["entropy_loss_ratio"])
    quantizer.remember_usage(codes)
    return expected, quantizer, z_q, losses, codes


def test_quantizer_losses_are_the_published_ones(trained_step):
    expected, _, _, losses, _ = trained_step
    for name, value in zip(("vq_loss", "commit_loss", "entropy_loss"), losses, strict=True):
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_quantizer_output_and_usage_are_the_published_ones(trained_step):
    expected, quantizer, z_q, _, codes = trained_step
    assert torch.equal(codes.flatten(), expected["indices"])
    torch.testing.assert_close(z_q, expected["z_q"])
    used = quantizer.codebook_used.unique()     # the zeros that it starts with count as code 0
    assert len(used) / expected["n_e"] == expected["usage"]


def test_gradient_passes_straight_through_the_lookup():
    quantizer = Quantizer(24, 5)
    latents = torch.randn(2, 5, 3, 2, requires_grad=True)
    weights = torch.randn(2, 5, 3, 2)
    (quantizer(latents)[0] * weights).sum().backward()
    through = latents.grad.clone()
    latents.grad = None
    (F.normalize(latents, dim=1) * weights).sum().backward()
    torch.testing.assert_close(through, latents.grad)


def test_codebook_loss_moves_codes_alone_and_commitment_moves_latents_alone():
    quantizer = Quantizer(24, 5)
    latents = torch.randn(2, 5, 3, 2, requires_grad=True)
    _, losses, _ = quantizer(latents)
    inputs = (latents, quantizer.embedding.weight)
    for_latents, for_codes = torch.autograd.grad(
        losses.codebook, inputs, retain_graph=True, allow_unused=True)
    assert for_latents is None and for_codes.any()
    for_latents, for_codes = torch.autograd.grad(losses.commitment, inputs, allow_unused=True)
    assert for_latents.any() and for_codes is None


def test_entropy_loss_in_chunks_equals_the_plain_form(monkeypatch):
    quantizer = Quantizer(24, 5)
    latents = torch.randn(2, 5, 3, 3, requires_grad=True)
    monkeypatch.setattr(BUDGET, 24 * 7)
    ours = quantizer(latents, 0.3)[1].entropy

    z = F.normalize(latents.permute(0, 2, 3, 1).reshape(-1, 5), dim=1)
    distances = (z[:, None] - F.normalize(quantizer.embedding.weight, dim=1)).square().sum(2)
    p = torch.softmax(-distances.double() / 0.01, dim=1)
    average = p.mean(0)
    plain = 0.3 * (-(p * torch.log(p)).sum(1).mean() + (average * torch.log(average + 1e-5)).sum())

    torch.testing.assert_close(ours.double(), plain, rtol=1e-4, atol=1e-5)
    inputs = (latents, quantizer.embedding.weight)
    found = torch.autograd.grad(ours, inputs)
    expected = torch.autograd.grad(plain, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_usage_memory_keeps_the_newest_indices_whatever_their_number():
    quantizer = Quantizer(100, 2)
    quantizer.remember_usage(torch.tensor([[5, 6], [7, 8]]))
    assert quantizer.codebook_used[-5:].tolist() == [0, 5, 6, 7, 8]
    quantizer.remember_usage(torch.arange(70000) % 90)
    assert quantizer.codebook_used.tolist() == [index % 90 for index in range(70000 - 65536, 70000)]
    assert len(quantizer.codebook_used.unique()) == 90


def test_chunked_search_equals_the_plain_search(monkeypatch):
    z, codebook = torch.randn(101, 5), torch.randn(37, 5)
    plain = torch.cdist(z.double(), codebook.double()).argmin(1)
    assert torch.equal(nearest_codes(z, codebook), plain)
    for budget in (1, 37 * 4 + 1, 37 * 101):
        monkeypatch.setattr(BUDGET, budget)
        assert torch.equal(nearest_codes(z, codebook), plain)


def test_search_holds_no_more_distances_than_its_budget(monkeypatch):
    sizes = []
    original = torch.addmm

    def addmm(*args, **kwargs):
        result = original(*args, **kwargs)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(BUDGET, 200)
    nearest_codes(torch.randn(50, 5), torch.randn(37, 5))
    assert max(sizes) <= 200 and sum(sizes) == 50 * 37


def test_search_is_float32_under_autocast_and_reduced_precision():
    z, codebook = F.normalize(torch.randn(500, 8), dim=1), F.normalize(torch.randn(4096, 8), dim=1)
    expected = torch.cdist(z.double(), codebook.double()).argmin(1)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = nearest_codes(z, codebook)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, expected)


def test_precision_settings_survive_an_error():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError), full_float32(torch.device("cpu")):
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before


def test_reordered_codes_with_the_reordered_codebook_decode_to_the_same_bits():
    torch.manual_seed(0)
    model = VQModel(VQConfig("VQ-4-small", 48, 5)).eval().requires_grad_(False)
    codes = torch.randint(48, (3, 6 * 6))
    images = model.decode_codes(codes, 6)
    mapping = torch.randperm(48)
    model.quantize.embedding.weight[mapping] = model.quantize.embedding.weight.clone()
    assert torch.equal(model.decode_codes(mapping[codes], 6), images)


def test_code_of_a_decoded_position_is_in_raster_order():
    quantizer = Quantizer(24, 5)
    codes = torch.randint(24, (2, 12))
    assert torch.equal(quantizer.codes(quantizer.vectors(codes, 3, 4)), codes)
    expected = F.normalize(quantizer.embedding.weight[codes[1, 2 * 4 + 1]], dim=0)
    assert torch.equal(quantizer.vectors(codes, 3, 4)[1, :, 2, 1], expected)
