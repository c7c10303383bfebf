"""What torch.compile makes of the blocks, by a backend without a compiler; FSDP's precision."""

import copy
import functools
import importlib.util
import logging
import warnings

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from autoregressive.models import gpt
from autoregressive.models.captured import BUCKET, CapturedSteps, compile_decoding
from autoregressive.models.cluster_loss import fused_head_loss, plain_head_loss
from autoregressive.models.config import GPTConfig
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT
from autoregressive.models.sampler import Sampler
from autoregressive.runtime.compute import BlockCompiler, autocast, set_up_compiler, set_up_gpu
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.optim import ModelOptimizer, OptimSettings
from autoregressive.runtime.parallel import whole_tensor, wrap_for_training
from autoregressive.train.objective import GPTTrainer, Objective

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ALONE = Session(rank=0, world_size=1, device=CPU)
NUM_LAYERS = 10                                     # more than Dynamo compiles one function again


@pytest.fixture(autouse=True)
def clean():
    """Forgets what was compiled, and restores what compiling sets."""
    torch._dynamo.reset()
    config = torch._dynamo.config
    names = ("suppress_errors", "fail_on_recompile_limit_hit", "recompile_limit", "optimize_ddp")
    with config.patch({name: getattr(config, name) for name in names}):
        assert set_up_compiler(CPU, "raise")
        yield


@pytest.fixture
def group():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def new_objective(drop_path=0.0, recomputes=False, num_layers=NUM_LAYERS, dropout=0.1):
    torch.manual_seed(0)
    model = GPT(GPTConfig("small", num_layers, 2, 16, grid=3, vocab_size=24, num_classes=5,
                          dropout=dropout, drop_path=drop_path))
    torch.nn.init.normal_(model.output.weight)
    for layer in model.layers:
        layer.recomputes = recomputes
    head_loss = functools.partial(fused_head_loss, cluster_size=4, lambda_cce=1.0, rows_at_once=7)
    return Objective(model, head_loss)


def batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(24, (4, 9), generator=generator)
    labels = torch.randint(6, (4,), generator=generator)
    return tokens, labels


def loss_and_gradients(wrapped, precision="none"):
    """Returns the loss and all gradients, joined, of a pass with the same random numbers."""
    torch.manual_seed(2)
    with autocast(CPU, precision):
        loss, _ = wrapped(*batch())
    loss.backward()
    gradients = [whole_tensor(parameter.grad).flatten() for parameter in wrapped.parameters()]
    return loss.item(), torch.cat(gradients)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("drop_path", [0.0, 0.2])
def test_one_graph_serves_all_blocks_and_changes_no_number(drop_path, recomputes):
    plain_loss, plain_gradients = loss_and_gradients(new_objective(drop_path))
    objective = new_objective(drop_path, recomputes)
    compiler = BlockCompiler(objective.model.layers, "aot_eager")
    loss, gradients = loss_and_gradients(objective)
    assert (compiler.graphs, compiler.calls) == (1, NUM_LAYERS)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert (gradients - plain_gradients).norm() < 1e-6 * plain_gradients.norm()


@pytest.mark.parametrize("head_loss", [
    plain_head_loss, functools.partial(fused_head_loss, rows_at_once=20)])
def test_the_loss_is_not_compiled_again_while_lambda_changes(head_loss):
    counter = CompileCounter()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(functools.partial(head_loss, cluster_size=4), backend=counter)
    objective = new_objective(num_layers=1)
    objective = Objective(objective.model, compiled, lambda step: 1 - step / 8)
    optimizer = ModelOptimizer(objective.model, OptimSettings(lr=1e-3), CPU)
    trainer = GPTTrainer(objective, optimizer, ALONE, "none", accumulation=2)
    graphs = []
    for step in range(5):
        trainer.step(step, batch(), 1e-3)
        graphs.append(counter.frame_count)
    assert graphs == [graphs[0]] * 5 and graphs[0] > 0
    assert not torch._dynamo.utils.counters["recompiles"]
    assert trainer.meter.sums[-1] == 1 + 7 / 8 + 6 / 8 + 5 / 8 + 4 / 8


@pytest.mark.parametrize("guidance_free", [False, True])
def test_stages_and_passes_have_a_graph_of_all_blocks_each_and_no_more(guidance_free):
    torch.manual_seed(0)
    model = GPT(GPTConfig("small", NUM_LAYERS, 2, 16, grid=4, vocab_size=24, num_classes=5,
                          guidance_free=guidance_free))
    counter = CompileCounter()
    head_loss = functools.partial(fused_head_loss, cluster_size=4, lambda_cce=1.0, rows_at_once=100)
    compiled_loss = torch.compile(head_loss, backend=counter, dynamic=False)
    objective = Objective(model, compiled_loss, patch_at=lambda step: 2 if step < 3 else 1)
    compiler = BlockCompiler(model.layers, "eager")
    trainer = GPTTrainer(objective, ModelOptimizer(model, OptimSettings(lr=1e-3), CPU), ALONE,
                         "none", accumulation=2)
    data = (torch.randint(24, (4, 16)), torch.randint(6, (4,)), torch.rand(4))
    found = []
    for step in range(6):
        trainer.step(step, data if guidance_free else data[:2], 1e-3)
        found.append((compiler.graphs, counter.frame_count))
    passes = 2 if guidance_free else 1
    assert found == [(passes, 1)] * 3 + [(2 * passes, 2)] * 3
    assert compiler.calls == 6 * 2 * passes * NUM_LAYERS


def test_recomputing_a_block_keeps_less():
    sizes = []
    for recomputes in (False, True):
        kept = []
        objective = new_objective(recomputes=recomputes)
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
            objective(*batch())
        sizes.append(sum(tensor.numel() for tensor in kept))
    assert sizes[1] < sizes[0] / 5


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_graph_serves_all_blocks_whose_gradients_are_averaged(group, parallel):
    objective = new_objective(recomputes=True)
    compiler = BlockCompiler(objective.model.layers, "eager")
    if parallel == "ddp":                           # buckets that end within a block
        wrapped = torch.nn.parallel.DistributedDataParallel(objective, bucket_cap_mb=0.002)
    else:
        wrapped = wrap_for_training(objective, ALONE, "fsdp", objective.model.layers, torch.float32)
    loss_and_gradients(wrapped)
    assert (compiler.graphs, compiler.calls) == (1, NUM_LAYERS)


def test_fsdp_in_bfloat16_computes_what_ddp_does(group, monkeypatch):
    found, tables, streams = [], set(), set()
    original = gpt.apply_rotary

    def apply_rotary(x, table):
        tables.add(table.dtype)
        return original(x, table)

    def note_dtypes(module, inputs, output):
        streams.update({inputs[0].dtype, output.dtype})

    monkeypatch.setattr(gpt, "apply_rotary", apply_rotary)
    for parallel in ("ddp", "fsdp"):
        objective = new_objective(dropout=0.0)
        layers = objective.model.layers
        for layer in layers:
            layer.register_forward_hook(note_dtypes)
        wrapped = wrap_for_training(objective, ALONE, parallel, layers, torch.bfloat16)
        found.append(loss_and_gradients(wrapped, "bf16"))
    assert tables == streams == {torch.float32}
    (loss, gradients), (sharded_loss, sharded_gradients) = found
    # The norm weights are 1: nothing else is rounded.
    assert sharded_loss == pytest.approx(loss, rel=1e-6)
    assert (sharded_gradients - gradients).norm() < 1e-4 * gradients.norm()


def test_every_bucket_of_24_by_24_tokens_has_its_compiled_step():
    torch.manual_seed(0)
    model = GPT(GPTConfig("small", 2, 2, 16, grid=24, vocab_size=24, num_classes=5)).eval()
    torch.nn.init.normal_(model.output.weight)
    counter = CompileCounter()
    compiled = compile_decoding(copy.deepcopy(model), backend=counter)
    num_tokens = model.config.num_tokens
    labels, uniforms = torch.tensor([0, 4]), torch.rand(2, num_tokens, dtype=torch.float64)
    found = generate(compiled, labels, uniforms, Sampler(2.0), CapturedSteps(compiled))
    assert torch.equal(found, generate(model, labels, uniforms, Sampler(2.0), CapturedSteps(model)))
    assert counter.frame_count == num_tokens // BUCKET == 9


def test_a_compiled_step_has_no_product_of_matrices_that_would_copy_the_cache_to_float32():
    model = GPT(GPTConfig("small", 2, 2, 16, grid=3, vocab_size=24, num_classes=5)).eval()
    backend = CompileCounterWithBackend("eager")
    compile_decoding(model.cast(torch.bfloat16), backend)
    uniforms = torch.rand(2, 9, dtype=torch.float64)
    generate(model, torch.tensor([0, 4]), uniforms, Sampler(2.0), CapturedSteps(model))
    assert [graph.code.count("matmul") for graph in backend.graphs] == [0]


def test_the_advice_to_use_tf32_is_not_shown():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        set_up_compiler(CPU, "raise")
        warnings.warn("TensorFloat32 tensor cores for float32 matrix multiplication", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["another"]


def first_step(monkeypatch, errors, backend):
    """Takes the first step of a trainer whose blocks a backend is to compile."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert set_up_compiler(GPU, errors)
    objective = new_objective(num_layers=3)
    compiler = BlockCompiler(objective.model.layers, backend)
    optimizer = ModelOptimizer(objective.model, OptimSettings(lr=1e-3), CPU)
    trainer = GPTTrainer(objective, optimizer, ALONE, "none", accumulation=2, compiler=compiler)
    trainer.step(0, batch(), 1e-3)


def failing_backend(graph, inputs):
    raise RuntimeError("no such instruction")


def test_the_first_step_says_how_many_blocks_run_compiled(monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        first_step(monkeypatch, "warn", "eager")
    assert "3 of 3 blocks run compiled; graphs of blocks: 1" in caplog.text


def test_blocks_that_cannot_be_compiled_run_as_they_are_with_a_warning(monkeypatch, caplog):
    first_step(monkeypatch, "warn", failing_backend)
    assert "0 of 3 blocks run compiled" in caplog.text


def test_blocks_that_cannot_be_compiled_end_the_run_if_wanted(monkeypatch):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no such instruction"):
        first_step(monkeypatch, "raise", failing_backend)


@pytest.fixture
def gpu_settings():
    """Restores what set_up_gpu sets."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    before = cuda.matmul.allow_tf32, cudnn.allow_tf32, cuda.cudnn_sdp_enabled()
    yield
    set_up_gpu(before[0], before[2])
    cudnn.allow_tf32 = before[1]


def test_products_are_tf32_and_attention_is_not_that_of_cudnn_unless_wanted(gpu_settings):
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    for tf32, cudnn_attention in ((True, False), (False, True)):
        set_up_gpu(tf32, cudnn_attention)
        found = (cuda.matmul.allow_tf32, cudnn.allow_tf32, cuda.cudnn_sdp_enabled())
        assert found == (tf32, tf32, cudnn_attention)
