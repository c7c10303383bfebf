"""The class-conditional GPT over codes, with the state-dict keys and shapes of the published LlamaGen and IAR files.

Letters: B batch, T tokens, D width, H query heads, G key-value heads, V codes, L length of the cache.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoregressive.models.cache import DecodePosition, KVCache
from autoregressive.models.rope import apply_rotary, rotary_table
from autoregressive.runtime.entry import at_least


@dataclass(frozen=True)
class GPTConfig:
    """Shape and regularisation of a GPT.

    Attributes:
        name: of the size, for messages.
        num_layers, num_heads, width: size of the transformer.
        grid: side of the picture in tokens.
        vocab_size: V.
        num_classes: labels 0 .. num_classes - 1; `num_classes` itself is the null label.
        num_kv_heads: key-value heads, a divisor of num_heads; None means num_heads.
        dropout: after the two projections of each block.
        token_dropout: on the input embeddings, the condition included.
        drop_path: rate of the last layer; rises linearly from 0. A rate above 0 turns `dropout` off.
    """

    name: str
    num_layers: int
    num_heads: int
    width: int
    grid: int = 16
    vocab_size: int = 16384
    num_classes: int = 1000
    num_kv_heads: int | None = None
    dropout: float = 0.1
    token_dropout: float = 0.1
    drop_path: float = 0.0

    @property
    def head_dim(self):
        return self.width // self.num_heads

    @property
    def kv_heads(self):
        return self.num_kv_heads or self.num_heads

    @property
    def num_tokens(self):
        return self.grid * self.grid

    @property
    def hidden_width(self):
        """Width of the SwiGLU layer: 2/3 of 4 D, rounded up to a multiple of 256."""
        return -(-(2 * 4 * self.width // 3) // 256) * 256

    def flops_per_token(self, num_parameters: int) -> int:
        """Returns the floating-point operations of forward and backward for one token.

        Six for every weight that is multiplied (the token embedding is only looked up), and those of causal attention:
        6 * layers * width * T, half of the full matrix.

        Args:
            num_parameters: of the model.
        """
        looked_up = (self.vocab_size + self.num_classes + 1) * self.width
        return 6 * (num_parameters - looked_up) + 6 * self.num_layers * self.width * self.num_tokens


GPT_MODELS = {                                      # name: layers, heads, D
    "GPT-tiny": (4, 4, 96), "GPT-B": (12, 12, 768), "GPT-L": (24, 16, 1024), "GPT-XL": (36, 20, 1280),
    "GPT-XXL": (48, 24, 1536), "GPT-XXXL": (48, 40, 2560), "GPT-1B": (22, 32, 2048), "GPT-3B": (24, 32, 3200),
    "GPT-7B": (32, 32, 4096),
}


def gpt_config(name, **settings):
    """Returns the GPTConfig of a size in GPT_MODELS; `settings` are further fields of GPTConfig."""
    num_layers, num_heads, width = GPT_MODELS[name]
    return GPTConfig(name, num_layers, num_heads, width, **settings)


def add_gpt_args(parser):
    """Declares the flags that say which GPT is meant: shared by training and sampling."""
    group = parser.add_argument_group("GPT")
    group.add_argument("--gpt-model", default="GPT-B", choices=GPT_MODELS, help="size of the GPT")
    group.add_argument("--gpt-ckpt", help="checkpoint of the GPT: a file, or a folder whose newest is taken")
    group.add_argument("--gpt-type", default="c2i", choices=("c2i",),
                       help="what the GPT is conditioned on: its class label; text is not supported")
    group.add_argument("--cls-token-num", type=int, default=1, choices=(1,),
                       help="condition tokens in front: a class is one")
    group.add_argument("--num-classes", type=at_least(1), default=1000, help="number of class labels")
    group.add_argument("--downsample-size", type=at_least(1), default=16, help="pixels of a token's side")
    group.add_argument("--cluster-size", type=at_least(1), default=128,
                       help="codes per cluster of the reordered codebook")


def grid_of(image_size: int, downsample_size: int) -> int:
    """Returns the side in tokens of pictures of `image_size` pixels. Raises ValueError if it is no whole number."""
    if image_size % downsample_size:
        raise ValueError(f"--image-size: expected a multiple of --downsample-size {downsample_size}, got {image_size}")
    return image_size // downsample_size


class RMSNorm(nn.Module):
    """Root-mean-square norm: normalises in float32, casts back, then multiplies by its weight."""

    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads; rows of wqkv: all q heads, all k heads, all v heads."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        rows = (self.num_heads + 2 * self.kv_heads) * self.head_dim
        self.wqkv = nn.Linear(config.width, rows, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def project(self, x, table):
        """Returns q (B, H, T, head_dim), k and v (B, G, T, head_dim); q and k are turned by `table`."""
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim))                       # (B, T, H + 2G, head_dim)
        q, k, v = qkv.split([self.num_heads, self.kv_heads, self.kv_heads], dim=2)
        q, k = apply_rotary(q, table), apply_rotary(k, table)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, table):                                                    # x (B, T, D)
        q, k, v = self.project(x, table)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.num_heads)
        return self.wo(y.transpose(1, 2).flatten(2))                                # (B, T, D)

    def decode(self, x, table, at, keys, values):
        """Attends from one new token to the filled part of the cache, after writing its key and value there.

        Args:
            x: (B, 1, D); table: (1, head_dim / 2, 2); at: DecodePosition of the token in the sequence.
            keys, values: (B, G, L, head_dim), written in place.

        Returns:
            (B, 1, D).
        """
        q, k, v = self.project(x, table)
        keys.index_copy_(2, at.index, k)
        values.index_copy_(2, at.index, v)
        q = q.reshape(len(x), self.kv_heads, -1, self.head_dim)                     # (B, G, H/G, head_dim)
        read_keys, read_values = keys[:, :, :at.length], values[:, :, :at.length]
        scores = q @ read_keys.transpose(-2, -1) * self.head_dim ** -0.5            # (B, G, H/G, length)
        if at.hidden is not None:
            scores = scores.masked_fill(at.hidden, -torch.inf)
        y = scores.float().softmax(-1).type_as(q) @ read_values                     # (B, G, H/G, head_dim)
        return self.wo(y.reshape(len(x), 1, -1))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.width, config.hidden_width, bias=False)
        self.w3 = nn.Linear(config.width, config.hidden_width, bias=False)
        self.w2 = nn.Linear(config.hidden_width, config.width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm transformer block: h = x + attention(norm x); out = h + feed_forward(norm h).

    Attributes:
        recomputes: whether a backward pass computes the activations again, so that a forward pass need not keep them.
    """

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.width)
        self.ffn_norm = RMSNorm(config.width)
        self.dropout = 0.0 if config.drop_path > 0 else config.dropout
        self.recomputes = False

    def regularise(self, branch: Tensor, kept: Tensor | None) -> Tensor:
        """Applies dropout, and drop path: each sample of a branch (B, T, D) is multiplied by its factor (B, 1, 1)."""
        branch = F.dropout(branch, self.dropout, self.training)
        return branch if kept is None else branch * kept.type_as(branch)

    def forward(self, x: Tensor, table: Tensor, kept: tuple[Tensor | None, Tensor | None] = (None, None)) -> Tensor:
        """Returns (B, T, D) from x (B, T, D), the rotary table (T, head_dim / 2, 2) and the branches' factors."""
        if self.recomputes:                         # in here, since what is compiled is the forward of a block
            return checkpoint(self._forward, x, table, kept, use_reentrant=False)
        return self._forward(x, table, kept)

    def _forward(self, x, table, kept):
        x = x + self.regularise(self.attention(self.attention_norm(x), table), kept[0])
        return x + self.regularise(self.feed_forward(self.ffn_norm(x)), kept[1])

    def decode(self, x, table, at, keys, values):
        x = x + self.attention.decode(self.attention_norm(x), table, at, keys, values)
        return x + self.feed_forward(self.ffn_norm(x))


class LabelEmbedding(nn.Module):
    """Labels (B,) -> one condition token each (B, 1, D)."""

    def __init__(self, config):
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.width)   # the last row is the null label

    def forward(self, labels):
        return self.embedding_table(labels)[:, None]


class GPT(nn.Module):
    """Predicts the tokens of a picture one after the other, from a class label.

    Position 0 holds the condition and predicts token 0: n tokens in give n + 1 rows out.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cls_embedding = LabelEmbedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        with torch.device("cpu"):                   # a real table also where the weights are on the meta device
            table = rotary_table(config.grid, config.head_dim)
        self.register_buffer("rotary", table, persistent=False)                     # (1 + T, head_dim / 2, 2)
        self.reset_parameters()

    def reset_parameters(self):
        """Fills the weights: normal(0, 0.02), the head with zeros, the norms with ones."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.0 if name == "output.weight" else 0.02)

    def cast(self, dtype):
        """Casts the weights, and with them the cache, to `dtype`; the rotary table stays float32."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def features(self, tokens, labels):
        """Runs the transformer over the condition and the tokens.

        Args:
            tokens: (B, n) int64 in 0 .. V - 1, n < T for training (the last token is never an input).
            labels: (B,) int64 in 0 .. num_classes, the last being the null label.

        Returns:
            (B, n + 1, D): row i predicts token i.
        """
        x = torch.cat([self.cls_embedding(labels), self.tok_embeddings(tokens)], dim=1)
        x = F.dropout(x, self.config.token_dropout, self.training)
        table = self.rotary[:x.shape[1]]
        for number, layer in enumerate(self.layers):
            x = layer(x, table, self.draw_kept(number, x))
        return self.norm(x)

    def draw_kept(self, number: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Draws which samples of x (B, T, D) keep the two branches of a layer.

        Blocks are given tensors, not their own rate: a block with a number of its own would be compiled for itself.

        Returns:
            two of (B, 1, 1), 0 with the layer's probability and else 1 / (1 - it); or None twice, if all are kept.
        """
        if not (self.config.drop_path and self.training):
            return None, None
        rate = self.config.drop_path * number / max(self.config.num_layers - 1, 1)
        ones = x.new_ones(2, len(x), 1, 1)
        return F.dropout(ones[0], rate), F.dropout(ones[1], rate)

    def forward(self, tokens, labels):
        """Returns the float32 logits (B, n + 1, V) of features(tokens, labels)."""
        return self.output(self.features(tokens, labels)).float()

    def new_cache(self, batch_size):
        """Returns an empty KVCache for `batch_size` sequences, in the precision and place of the weights."""
        return KVCache(self.config, batch_size, self.norm.weight.dtype, self.norm.weight.device)

    def prefill(self, labels, cache):
        """Starts sequences from their labels (B,); returns the float32 logits (B, V) of token 0."""
        first = DecodePosition(torch.zeros(1, dtype=torch.int64, device=labels.device), length=1)
        return self._decode(self.cls_embedding(labels), first, cache)

    def decode_step(self, tokens, at, cache):
        """Feeds one token each and returns the logits of the next.

        Args:
            tokens: (B,) int64, the tokens before `at`.
            at: DecodePosition in the sequence, 1 .. T - 1; all before it are in the cache.
            cache: KVCache, written in place.

        Returns:
            (B, V) float32: logits of the token at the position.
        """
        return self._decode(self.tok_embeddings(tokens)[:, None], at, cache)

    def _decode(self, x, at, cache):                                                # x (B, 1, D)
        table = self.rotary[at.index]
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = layer.decode(x, table, at, keys, values)
        return self.output(self.norm(x))[:, 0].float()
