"""The class-conditional GPT over tokens, with the state-dict keys and shapes of published files.

Those are the files of LlamaGen and IAR: names of modules and parameters are theirs.

Letters: B batch, T tokens, D width, H query heads, G key-value heads, V values of a token, L
length of the cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoregressive.models.cache import DecodePosition, KVCache, multiply_in_float32
from autoregressive.models.config import GPTConfig
from autoregressive.models.guidance_free import BetaEmbedding
from autoregressive.models.patches import patch_table, split_patches
from autoregressive.models.rope import apply_rotary, rotary_table


class RMSNorm(nn.Module):
    """Root-mean-square norm: normalises in float32, casts back, then multiplies by its weight."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Returns (..., D) from x (..., D)."""
        wide = x.float()
        normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normalised.type_as(x) * self.weight


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads.

    The rows of wqkv are all q heads, then all k heads, then all v heads.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.kv_heads = config.kv_heads
        self.head_dim = config.head_dim
        rows = (self.num_heads + 2 * self.kv_heads) * self.head_dim
        self.wqkv = nn.Linear(config.width, rows, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def project(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns q (B, H, T, head_dim), k and v (B, G, T, head_dim) from x (B, T, D).

        q and k are turned by the rotary table (T, head_dim / 2, 2).
        """
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim))       # (B, T, H + 2G, head_dim)
        q, k, v = qkv.split([self.num_heads, self.kv_heads, self.kv_heads], dim=2)
        q = apply_rotary(q, table)                                  # (B, T, H, head_dim)
        k = apply_rotary(k, table)                                  # (B, T, G, head_dim)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Returns (B, T, D) from x (B, T, D): every token attends to itself and those before."""
        q, k, v = self.project(x, table)
        is_grouped = self.kv_heads != self.num_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
        y = y.transpose(1, 2).flatten(2)                            # (B, T, H * head_dim)
        return self.wo(y)

    def decode(self, x: Tensor, table: Tensor, at: DecodePosition, keys: Tensor,
               values: Tensor) -> Tensor:
        """Attends from one new token to the cache, after writing its key and value there.

        Args:
            x: (B, 1, D).
            table: (1, head_dim / 2, 2), the rotary table's row of the token.
            at: the place in the sequence: 0 is that of the label, p that of token p - 1.
            keys, values: (B, G, L, head_dim), written in place.

        Returns:
            (B, 1, D).
        """
        q, k, v = self.project(x, table)                            # (B, H or G, 1, head_dim)
        keys.index_copy_(2, at.index, k)
        values.index_copy_(2, at.index, v)
        read_keys = keys[:, :, :at.length]                          # (B, G, length, head_dim)
        read_values = values[:, :, :at.length]
        q = q.reshape(len(x), self.kv_heads, -1, self.head_dim)     # (B, G, H/G, head_dim)
        scores = multiply_in_float32(q, read_keys.mT) * self.head_dim ** -0.5  # (B, G, H/G, length)
        if at.hidden is not None:
            scores = scores.masked_fill(at.hidden, -torch.inf)
        y = multiply_in_float32(scores.softmax(-1), read_values)    # (B, G, H/G, head_dim)
        return self.wo(y.type_as(x).reshape(len(x), 1, -1))         # (B, 1, D)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.hidden_width, bias=False)
        self.w3 = nn.Linear(config.width, config.hidden_width, bias=False)
        self.w2 = nn.Linear(config.hidden_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, T, D) from x (B, T, D)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm transformer block: h = x + attention(norm x); out = h + feed_forward(norm h).

    Attributes:
        recomputes: whether a backward pass computes the activations again, so that a forward pass
            need not keep them.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.width)
        self.ffn_norm = RMSNorm(config.width)
        self.dropout = 0.0 if config.drop_path > 0 else config.dropout
        self.recomputes = False

    def forward(self, x: Tensor, table: Tensor, kept_attention: Tensor | None = None,
                kept_feed_forward: Tensor | None = None) -> Tensor:
        """Runs the block over whole sequences.

        Args:
            x: (B, T, D).
            table: (T, head_dim / 2, 2), the rotary table.
            kept_attention, kept_feed_forward: drop path, see GPT.draw_kept; None keeps all.

        Returns:
            (B, T, D).
        """
        inputs = (x, table, kept_attention, kept_feed_forward)
        if self.recomputes:                     # in here, since what is compiled is Block.forward
            return checkpoint(self._forward, *inputs, use_reentrant=False)
        return self._forward(*inputs)

    def _forward(self, x: Tensor, table: Tensor, kept_attention: Tensor | None,
                 kept_feed_forward: Tensor | None) -> Tensor:
        x = x + self.regularise(self.attention(self.attention_norm(x), table), kept_attention)
        return x + self.regularise(self.feed_forward(self.ffn_norm(x)), kept_feed_forward)

    def regularise(self, branch: Tensor, kept: Tensor | None) -> Tensor:
        """Applies dropout to a branch (B, T, D), then drop path: its samples times (B, 1, 1)."""
        branch = F.dropout(branch, self.dropout, self.training)
        return branch if kept is None else branch * kept.type_as(branch)

    def decode(self, x: Tensor, table: Tensor, at: DecodePosition, keys: Tensor,
               values: Tensor) -> Tensor:
        """Runs the block over one new token each, (B, 1, D); arguments as for Attention.decode."""
        x = x + self.attention.decode(self.attention_norm(x), table, at, keys, values)
        return x + self.feed_forward(self.ffn_norm(x))


class LabelEmbedding(nn.Module):
    """Turns a label into the condition token in front of the picture's tokens."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        rows = config.num_classes + 1                               # the last is the null label
        self.embedding_table = nn.Embedding(rows, config.width)

    def forward(self, labels: Tensor) -> Tensor:
        """Returns (B, 1, D) from labels (B,)."""
        return self.embedding_table(labels)[:, None]


class GPT(nn.Module):
    """Predicts the tokens of a picture one after the other, from a class label.

    Position 0 holds the condition and predicts token 0: n tokens in give n + 1 rows out.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = LabelEmbedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        with torch.device("cpu"):       # a real table also where the weights are on the meta device
            table = rotary_table(config.grid, config.head_dim)      # (1 + T, head_dim / 2, 2)
        self.register_buffer("rotary", table, persistent=False)
        self.reset_parameters()
        # Last, so that the names and first weights of the rest are those of an ordinary GPT.
        self.t_embedder = BetaEmbedding(config.width) if config.guidance_free else None

    def reset_parameters(self) -> None:
        """Fills the weights: normal(0, 0.02), the head with zeros; the norms keep their ones."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.0 if name == "output.weight" else 0.02)

    def cast(self, dtype: torch.dtype) -> "GPT":
        """Casts the weights in place, and so later caches; the rotary table stays float32."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def features(self, tokens: Tensor, labels: Tensor, betas: Tensor | None = None,
                 patch: int = 1) -> Tensor:
        """Runs the transformer over the condition and the tokens, or over patches of them.

        Args:
            tokens: (B, n) int64 in 0 .. V - 1, n < T in training (the last one is no input); all
                (B, T) if they are taken by patches, whose last is no input.
            labels: (B,) int64 in 0 .. num_classes, the last being the null label.
            betas: (B,) float32 in 0 .. 1, of a guidance-free GPT; None is 1.
            patch: side of a patch in tokens.

        Returns:
            (B, n + 1, D): row i predicts token i, or the tokens of patch i.
        """
        condition = self.cls_embedding(labels)                      # (B, 1, D)
        if self.t_embedder is not None:
            betas = torch.ones_like(labels, dtype=torch.float32) if betas is None else betas
            condition = condition + self.t_embedder(betas)[:, None]
        x = self.tok_embeddings(tokens)                             # (B, n, D)
        table = self.rotary
        if patch > 1:
            x = split_patches(x, self.config.grid, patch).mean(2)[:, :-1]
            table = patch_table(table, self.config.grid, patch)
        x = torch.cat([condition, x], dim=1)                        # (B, n + 1, D)
        x = F.dropout(x, self.config.token_dropout, self.training)
        table = table[:x.shape[1]]                                  # (n + 1, head_dim / 2, 2)
        for number, layer in enumerate(self.layers):
            x = layer(x, table, *self.draw_kept(number, x))         # (B, n + 1, D)
        return self.norm(x)

    def targets(self, tokens: Tensor, patch: int = 1) -> Tensor:
        """Returns what the rows of features predict, (B, T / M, M) of M = patch * patch tokens.

        Args:
            tokens: (B, T).
            patch: side of a patch in tokens.
        """
        return split_patches(tokens, self.config.grid, patch)

    def draw_kept(self, number: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Draws which samples of x (B, T, D) keep the two branches of a layer: drop path.

        Blocks are given tensors, not their own rate: a block with a number of its own would be
        compiled for itself.

        Returns:
            for attention and feed-forward (B, 1, 1), 0 with the layer's rate, else 1 / (1 - rate);
            None twice if all are kept.
        """
        if not (self.config.drop_path and self.training):
            return None, None
        rate = self.config.drop_path * number / max(self.config.num_layers - 1, 1)
        ones = x.new_ones(2, len(x), 1, 1)
        return F.dropout(ones[0], rate), F.dropout(ones[1], rate)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns the float32 logits (B, n + 1, V) of features(tokens, labels)."""
        return self.output(self.features(tokens, labels)).float()

    def new_cache(self, batch_size: int) -> KVCache:
        """Returns an empty cache of `batch_size` sequences, in dtype and place of the weights."""
        weight = self.norm.weight
        return KVCache.empty(self.config, batch_size, weight.dtype, weight.device)

    def prefill(self, labels: Tensor, cache: KVCache) -> Tensor:
        """Starts sequences from labels (B,); returns the float32 logits (B, V) of token 0.

        Raises:
            ValueError: beta is an input of the model, see guidance_free.fold_beta.
        """
        if self.t_embedder is not None:
            raise ValueError("expected an ordinary GPT, got one whose input is beta; fold_beta "
                             "makes one at a fixed beta")
        index = torch.zeros(1, dtype=torch.int64, device=labels.device)
        return self._decode(self.cls_embedding(labels), DecodePosition(index, length=1), cache)

    def decode_step(self, tokens: Tensor, at: DecodePosition, cache: KVCache) -> Tensor:
        """Feeds one token each and returns the logits of the next.

        Args:
            tokens: (B,) int64, the tokens p - 1.
            at: the place p in the sequence, 1 .. T - 1; all before it are in the cache.
            cache: of B sequences, written in place.

        Returns:
            (B, V) float32: logits of the tokens p.
        """
        return self._decode(self.tok_embeddings(tokens)[:, None], at, cache)

    def _decode(self, x: Tensor, at: DecodePosition, cache: KVCache) -> Tensor:
        table = self.rotary[at.index]                               # (1, head_dim / 2, 2)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = layer.decode(x, table, at, keys, values)            # (B, 1, D)
        return self.output(self.norm(x))[:, 0].float()              # (B, V)
