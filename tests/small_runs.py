"""Small trainings of a GPT by its entry script: their data, their flags, what they leave."""

import argparse
import functools
import json

import numpy as np
import torch

from autoregressive.data.batches import TokenBatches, split_store
from autoregressive.data.code_writer import CodeWriter
from autoregressive.data.opening import open_codes
from autoregressive.models.cluster_loss import fused_head_loss, plain_head_loss
from autoregressive.models.config import gpt_config
from autoregressive.models.gpt import GPT
from autoregressive.runtime.checkpoint import list_checkpoints, read_checkpoint, save_checkpoint
from processes import run_here, start, without_time
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

TRAIN = "autoregressive/train/train_c2i.py"
SAMPLE = "autoregressive/sample/sample_c2i_ddp.py"
SIZE = 4                                            # codes of a cluster, in LOSSES
LOSSES = {
    "plain": functools.partial(plain_head_loss, cluster_size=SIZE),
    "fused": functools.partial(fused_head_loss, cluster_size=SIZE, rows_at_once=5)}
MANIFEST = {
    "dataset": "test", "num_images": 50, "num_crops": 2, "num_tokens": 16, "grid": 4,
    "codebook_size": 64, "crops": ["centre", "centre, mirrored"], "class_names": ["a", "b", "c"],
    "images_sha256": "1" * 64, "image_size": 16, "codebook_sha256": "2" * 64,
    "tokenizer_sha256": "3" * 64}
NO_DROPOUT = ("--dropout-p", 0, "--token-dropout-p", 0, "--global-batch-size", 16)
EVERYTHING = ("--ema", "--gradient-accumulation-steps", 2, "--val-every", 7, "--val-share", 0.1,
              "--lr-schedule", "cosine", "--warmup", 3)


def write_store(path, labels, seed):
    writer = CodeWriter(path, MANIFEST)
    writer.create(labels)
    writer.write(range(50), np.random.default_rng(seed).integers(64, size=(50, 2, 16)), {})
    writer.finish(0)


def write_data(folder):
    """Writes a store of 50 images, a mapping, and a VQ model of random weights."""
    write_store(folder / "codes", np.arange(50) % 3, seed=0)
    torch.manual_seed(0)
    save_checkpoint(folder / "mapping.pt", torch.randperm(64))
    model = VQModel(VQConfig("VQ-4-small", 64, 8))
    save_checkpoint(folder / "vq.pt", {"model": model.state_dict()})


def flags(folder, results, *more):
    return ("--code-path", folder / "codes", "--mapping-path", folder / "mapping.pt",
            "--results-dir", results, "--gpt-model", "GPT-tiny", "--num-classes", 3,
            "--vocab-size", 64, "--codebook-size", 64, "--cluster-size", 8,
            "--image-size", 16, "--downsample-size", 4,
            "--vq-model", "VQ-4-small", "--vq-ckpt", folder / "vq.pt",
            "--mixed-precision", "none", "--global-batch-size", 8, "--max-steps", 20,
            "--log-every", 1, "--ckpt-steps", 3, *more)


def train(folder, results, *more, processes=0):
    if not processes:
        run_to_its_end(folder, results, *more)
        return
    done = start(TRAIN, *flags(folder, results, *more), processes=processes)
    assert done.returncode == 0, done.stderr


def run_to_its_end(folder, results, *more):
    assert run_here(TRAIN, *flags(folder, results, *more)) == 0


def metrics(results):
    path, = results.glob("*/metrics.jsonl")
    return [without_time(json.loads(line)) for line in path.read_text().splitlines()]


def last_checkpoint(results):
    checkpoints, = results.glob("*/checkpoints")
    return read_checkpoint(list_checkpoints(checkpoints)[-1])


def validation_losses(folder, weights, share, batch_size):
    """Returns token loss and cluster loss of an ordinary GPT on the first batch of validation."""
    model = GPT(gpt_config("GPT-tiny", grid=4, vocab_size=64, num_classes=3)).eval()
    model.load_state_dict(weights)
    mapping = torch.load(folder / "mapping.pt", weights_only=True).numpy()
    _, held = split_store(open_codes(folder / "codes"), share, seed=0)
    tokens, labels = TokenBatches(held, mapping, batch_size, 0, 3, 0)[0, range(batch_size)]
    with torch.no_grad():
        logits = model(tokens[:, :-1], labels)
    _, losses = plain_head_loss(logits.flatten(0, 1), torch.eye(64), tokens.flatten(),
                                cluster_size=8, lambda_cce=1.0)
    return losses[:2].tolist()


def sample_flags(folder, run, out, *more):
    return ("--gpt-ckpt", run, "--vq-ckpt", folder / "vq.pt", "--gpt-model", "GPT-tiny",
            "--num-classes", 3, "--image-size", 16, "--downsample-size", 4, "--cluster-size", 8,
            "--vq-model", "VQ-4-small", "--codebook-size", 64, "--image-size-eval", 16,
            "--precision", "none", "--sample-dir", out, "--num-fid-samples", 12, "--save-codes",
            *more)


def public_checkpoint(config):
    """Returns a checkpoint after one step as the public code writes it, and its moments by name.

    That is LlamaGen's and IAR's code, or GFT's if the config is guidance-free.
    """
    torch.manual_seed(1)
    model = GPT(config)
    weights = dict(model.named_parameters())
    matrices = ["cls_embedding.embedding_table.weight", "tok_embeddings.weight"]
    vectors = []
    for layer in range(config.num_layers):
        for name in ("attention.wqkv", "attention.wo",
                     "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"):
            matrices.append(f"layers.{layer}.{name}.weight")
        for name in ("attention_norm", "ffn_norm"):
            vectors.append(f"layers.{layer}.{name}.weight")
    matrices.append("output.weight")
    vectors.append("norm.weight")
    if config.guidance_free:
        matrices += ["t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"]
        vectors += ["t_embedder.mlp.0.bias", "t_embedder.mlp.2.bias"]
    groups = [{"params": [weights[name] for name in names]} for names in (matrices, vectors)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    moments = {name: optimizer.state[weight]["exp_avg"] for name, weight in weights.items()}
    payload = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": 4,
               "args": argparse.Namespace(lr=1e-3)}
    return payload, moments


def assert_same_end(results, others):
    assert metrics(results) == metrics(others)
    expected, found = last_checkpoint(results), last_checkpoint(others)
    for kind in ("model", "ema"):
        assert (kind in expected) == (kind in found)
        for name in expected.get(kind, ()):
            assert torch.equal(expected[kind][name], found[kind][name]), (kind, name)
    assert expected["steps"] == found["steps"] and expected["images_seen"] == found["images_seen"]


def steps_done(results):
    found = list(results.glob("*/metrics.jsonl"))
    return len(found[0].read_text().splitlines()) if found else 0
