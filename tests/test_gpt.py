"""The GPT against the published architecture's numbers, and against itself."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoregressive.models.cache import DecodePosition
from autoregressive.models.cluster_loss import fused_head_loss, plain_head_loss
from autoregressive.models.config import GPT_MODELS, GPTConfig, gpt_config
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT
from autoregressive.models.rope import apply_rotary, rotary_table
from autoregressive.models.sampler import Sampler
from autoregressive.runtime.checkpoint import load_strictly
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.optim import ModelOptimizer, OptimSettings
from autoregressive.train.objective import GPTTrainer, Objective
from conftest import FIXTURES

TINY = GPTConfig("tiny", num_layers=2, num_heads=4, width=64, grid=4, vocab_size=512,
                 num_classes=10, dropout=0.0, token_dropout=0.0)
ALONE = Session(rank=0, world_size=1, device=torch.device("cpu"))


def decode_all(model, tokens, labels):
    """Returns the logits (B, T, V) that decoding `tokens` (B, T) step by step gives."""
    cache = model.new_cache(len(tokens))
    rows = [model.prefill(labels, cache)]
    for position in range(1, tokens.shape[1]):
        at = DecodePosition(torch.tensor([position]), length=position + 1)
        rows.append(model.decode_step(tokens[:, position - 1], at, cache))
    return torch.stack(rows, dim=1)


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def tiny(fixture):
    model = GPT(TINY)
    load_strictly(model, fixture("gpt_tiny_weights")["state_dict"], "fixture")
    return model


@pytest.fixture(scope="module")
def numbers(fixture):
    return fixture("gpt_tiny_logits")


@pytest.mark.parametrize("training", [True, False])
def test_logits_equal_the_fixture(tiny, numbers, training):
    logits = tiny.train(training)(numbers["idx"][:, :-1], numbers["cond"])
    assert relative_error(logits, numbers["train_logits" if training else "eval_logits"]) < 1e-5


def test_logits_of_a_whole_picture_have_one_more_row(tiny, numbers):
    logits = tiny.eval()(numbers["idx"], numbers["cond"])
    assert relative_error(logits, numbers["eval_logits_no_input_pos_17"]) < 1e-5


def new_tiny(fixture):
    model = GPT(TINY)
    load_strictly(model, fixture("gpt_tiny_weights")["state_dict"], "fixture")
    return model


def losses_of(model, numbers):
    """Returns the loss with lambda 1, and the token loss and the cluster loss, detached."""
    features = model.features(numbers["idx"][:, :-1], numbers["cond"]).flatten(0, 1)
    targets = numbers["idx"].flatten()
    loss, statistics = plain_head_loss(features, model.output.weight, targets, 32, 1.0)
    return loss, statistics[0], statistics[1]


def optimizer_of(model, step):
    settings = OptimSettings(step["lr"], *step["betas"], step["weight_decay"], step["clip"])
    return ModelOptimizer(model, settings, ALONE.device)


def test_losses_and_gradients_equal_the_fixture(numbers, fixture):
    model = new_tiny(fixture)
    loss, token_loss, cluster_loss = losses_of(model, numbers)
    assert abs(token_loss - numbers["loss2"]) < 1e-6 * numbers["loss2"]
    assert abs(cluster_loss - numbers["loss1"]) < 1e-6 * numbers["loss1"]
    half = token_loss + 0.5 * cluster_loss
    assert abs(half - numbers["loss_lambda_0.5"]) < 1e-6 * numbers["loss_lambda_0.5"]
    loss.backward()
    gradients = fixture("gpt_tiny_grads")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert abs(norm - gradients["grad_norm"]) < 1e-5 * norm
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, gradients["grads"][name]) < 1e-5, name


def test_one_step_from_given_gradients_equals_the_fixture(fixture):
    model, step = new_tiny(fixture), fixture("gpt_tiny_step")
    gradients = fixture("gpt_tiny_grads")["grads"]
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()
    optimizer_of(model, step["step"]).optimizer.step()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.detach(), step["after_step"][name]) < 1e-6, name


def test_one_step_end_to_end_equals_the_fixture(numbers, fixture):
    model, step = new_tiny(fixture), fixture("gpt_tiny_step")
    head_loss = partial(fused_head_loss, cluster_size=32, lambda_cce=1.0, rows_at_once=9)
    objective = Objective(model, head_loss)
    trainer = GPTTrainer(objective, optimizer_of(model, step["step"]), ALONE, "none")
    trainer.step(0, (numbers["idx"], numbers["cond"]), step["step"]["lr"])
    for name, parameter in model.named_parameters():
        assert (parameter - step["after_step"][name]).abs().max() < 1e-4, name


def test_generating_in_the_middle_of_training_leaves_the_next_step_unchanged(numbers, fixture):
    gradients = []
    uniforms = torch.full((2, 16), 0.3, dtype=torch.float64)
    for generates in (False, True):
        model = new_tiny(fixture)
        torch.manual_seed(0)
        if generates:
            generate(model.eval(), numbers["cond"], uniforms, Sampler(2.0))
            model.train()
        losses_of(model, numbers)[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(without, after) for without, after in zip(*gradients, strict=True))


def test_evaluation_loss_is_defined_for_any_length_and_keeps_labels(tiny, numbers):
    whole = tiny.eval()(numbers["idx"], numbers["cond"])
    for length in (0, 1, 7):
        found = tiny(numbers["idx"][:, :length], numbers["cond"])
        assert torch.allclose(found, whole[:, :length + 1], atol=1e-5)
    with_null_labels = tiny(numbers["idx"], torch.full_like(numbers["cond"], 10))
    # They would be equal if labels were dropped.
    assert not torch.allclose(with_null_labels[:, 0], whole[:, 0])


def test_rotary_tables_equal_the_fixture_bit_for_bit(fixture):
    tables = fixture("rope")
    assert torch.equal(rotary_table(4, 16), tables["grid4_hd16_cls1"])
    assert torch.equal(rotary_table(16, 64), tables["grid16_hd64_cls1"])
    assert torch.equal(rotary_table(24, 64), tables["grid24_hd64_cls1"])
    assert torch.equal(rotary_table(4, 20)[1:], tables["grid4_hd20_cls4"][4:])
    assert torch.equal(apply_rotary(tables["x"], tables["grid4_hd16_cls1"]), tables["y"])


def test_cached_steps_equal_the_fixture(tiny, numbers):
    labels = torch.cat([numbers["cond"], torch.full_like(numbers["cond"], 10)])
    tokens = numbers["idx"].repeat(2, 1)
    with torch.no_grad():
        found = decode_all(tiny.eval(), tokens, labels)
    assert relative_error(found, numbers["kv_step_logits"]) < 1e-5


@pytest.mark.parametrize("name, scale, interval", [
    ("cfg2", 2.0, -1),
    ("cfg1", 1.0, -1),
    ("cfg2_interval3", 2.0, 3),
    ("cfg4_interval0", 4.0, 0),
])
def test_greedy_tokens_equal_the_fixture(tiny, numbers, name, scale, interval):
    # Below, a tie could be broken either way.
    assert numbers[f"greedy_{name}_margin"].min() > 1e-4
    uniforms = torch.zeros(2, 16, dtype=torch.float64)
    sampler = Sampler(scale, interval, greedy=True)
    tokens = generate(tiny.eval(), numbers["cond"], uniforms, sampler)
    assert torch.equal(tokens, numbers[f"greedy_{name}"].long())


def test_cached_decoding_equals_full_forward_with_grouped_heads():
    torch.manual_seed(3)
    config = GPTConfig("small", 3, 6, 24, grid=3, vocab_size=40, num_classes=5, num_kv_heads=2)
    model = GPT(config).eval()
    torch.nn.init.normal_(model.output.weight)
    tokens, labels = torch.randint(40, (2, 9)), torch.tensor([4, 5])
    with torch.no_grad():
        expected = model(tokens[:, :-1], labels)
        assert torch.allclose(decode_all(model, tokens, labels), expected, atol=1e-5)


def test_grouped_heads_equal_repeated_key_and_value_heads():
    torch.manual_seed(4)
    shape = ("small", 1, 4, 16)
    grouped = GPT(GPTConfig(*shape, grid=2, vocab_size=12, num_classes=3, num_kv_heads=2)).eval()
    full = GPT(GPTConfig(*shape, grid=2, vocab_size=12, num_classes=3)).eval()
    torch.nn.init.normal_(grouped.output.weight)
    state = grouped.state_dict()
    q, k, v = state["layers.0.attention.wqkv.weight"].split([16, 8, 8])
    k, v = (rows.view(2, 4, 16).repeat_interleave(2, dim=0).flatten(0, 1) for rows in (k, v))
    state["layers.0.attention.wqkv.weight"] = torch.cat([q, k, v])
    load_strictly(full, state, "test")
    tokens, labels = torch.randint(12, (5, 3)), torch.randint(3, (5,))
    assert torch.allclose(grouped(tokens, labels), full(tokens, labels), atol=1e-6)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("position", [1, 16, 64, 255])
def test_attention_to_a_bfloat16_cache_rounds_no_more_than_the_math_kernel(position, is_compiled):
    torch.manual_seed(position)
    model = GPT(GPTConfig("small", 1, 6, 48, grid=16, vocab_size=24, num_classes=3, num_kv_heads=2))
    attention = model.cast(torch.bfloat16).layers[0].attention.requires_grad_(False)
    torch.nn.init.normal_(attention.wqkv.weight, std=0.3)
    torch.nn.init.eye_(attention.wo.weight)
    decode = attention.decode
    if is_compiled:
        decode = torch.compile(decode, backend="eager", dynamic=False)
    x = torch.randn(25, 1, 48).bfloat16()
    keys, values = torch.randn(2, 25, 2, 256, 8).bfloat16()
    table = model.rotary[position:position + 1]
    at = DecodePosition.in_bucket(torch.tensor([position]), length=256)

    found = decode(x, table, at, keys, values)                      # writes to the cache, too
    read = [attention.project(x, table)[0], keys[:, :, :position + 1], values[:, :, :position + 1]]
    exact = F.scaled_dot_product_attention(*(part.double() for part in read), enable_gqa=True)
    with sdpa_kernel(SDPBackend.MATH):                              # as the published code does
        expected = F.scaled_dot_product_attention(*read, enable_gqa=True)
    error = (found.double() - exact.flatten(1)[:, None]).norm()
    assert error < 1.05 * (expected.double() - exact).norm()


def test_later_tokens_do_not_change_earlier_logits(tiny, numbers):
    changed = numbers["idx"].clone()
    changed[:, 9:] = 7
    before, after = (tiny.eval()(tokens, numbers["cond"]) for tokens in (numbers["idx"], changed))
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize("name", ["GPT-B"])
def test_keys_and_shapes_equal_the_published_file(name):
    expected = json.loads((FIXTURES / "state_dict_shapes.json").read_text())[name]
    with torch.device("meta"):
        model = GPT(gpt_config(name))
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == expected


def test_parameter_counts_equal_the_table(fixture):
    exact = fixture("gpt_param_counts")
    rounded = {"GPT-XL": 775e6, "GPT-XXL": 1.4e9, "GPT-XXXL": 3.9e9, "GPT-1B": 1.2e9,
               "GPT-3B": 3.1e9, "GPT-7B": 6.6e9}
    assert set(exact) | set(rounded) | {"GPT-tiny"} == set(GPT_MODELS)
    with torch.device("meta"):
        models = {name: GPT(gpt_config(name)) for name in GPT_MODELS}
    counts = {name: sum(weight.numel() for weight in model.parameters())
              for name, model in models.items()}
    assert {name: counts[name] for name in exact} == exact
    for name, count in rounded.items():
        digits = 1 if count > 1e9 else 0        # the table rounds to two figures above a billion
        assert abs(counts[name] - count) <= max(0.01 * count, 0.05e9 * digits), name


def test_drop_path_drops_whole_samples_and_rescales():
    torch.manual_seed(0)
    model = GPT(GPTConfig("small", 3, 2, 8, grid=2, vocab_size=6, num_classes=2, drop_path=0.5))
    x = torch.ones(400, 3, 8)
    assert [factor.unique().tolist() for factor in model.draw_kept(0, x)] == [[1], [1]]
    assert model.draw_kept(1, x)[0].unique().tolist() == pytest.approx([0, 1 / 0.75])
    kept = model.draw_kept(2, x)
    assert not torch.equal(*kept) and model.eval().draw_kept(2, x) == (None, None)
    branch = model.layers[2].regularise(x, kept[0])
    per_sample = branch.flatten(1)
    is_whole = (per_sample == 0).all(1) | (per_sample == 2).all(1)
    assert is_whole.all()                                       # never dropout inside a sample
    assert 0.4 < (per_sample[:, 0] == 0).float().mean() < 0.6


def test_the_start_is_uniform_over_codes_and_clusters():
    model = GPT(GPTConfig("small", 1, 2, 8, grid=3, vocab_size=24, num_classes=2))
    features = model.features(torch.randint(24, (2, 8)), torch.tensor([0, 1])).flatten(0, 1)
    _, statistics = plain_head_loss(features, model.output.weight, torch.randint(24, (18,)), 4, 1.0)
    assert torch.allclose(statistics[:2], torch.tensor([24.0, 6.0]).log())
