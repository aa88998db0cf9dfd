"""One readable Transformer with switches: GPT-2, and what came after it.

Shapes: B sequences, T tokens, C = n_embd, H query heads, K key/value heads, D = head_dim, V padded
vocabulary. Weights are float32; autocast decides what the products run in.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptcore.kernels import causal_attention, linear
from gptcore.loss import head_loss, logits_of
from gptcore.spec import ModelSpec


class Linear(nn.Linear):
    """`nn.Linear` by the fastest exact product of the device."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def norm_layer(spec: ModelSpec, width: int) -> nn.Module:
    """The family's norm over the last dimension."""
    if spec.norm == "layernorm":
        return nn.LayerNorm(width, eps=spec.norm_eps)
    return nn.RMSNorm(width, eps=spec.norm_eps, elementwise_affine=spec.norm == "rmsnorm")


def rope_tables(spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """cos, sin (block_size, D) float32 for rotating halves, as the Hub's classes do (Su et al. 2021).

    Direction "backward" negates the angle: nanochat's classes turn that way.
    """
    # as the Hub's classes round it: an ulp more here is 1e-4 radians at position 1024, and as much in the logits
    inverse = 1.0 / spec.rope_theta ** (torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim)
    angles = torch.outer(torch.arange(spec.block_size, dtype=torch.float32), inverse)
    angles = torch.cat((angles, angles), dim=-1)
    sign = 1.0 if spec.rope_direction == "forward" else -1.0
    return angles.cos(), sign * angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, T, D), cos and sin (T, D) → x turned by each position's angles, in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention, grouped (Ainslie et al. 2023) where n_kv_head < n_head."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = spec.n_head, spec.n_kv_head, spec.head_dim
        q_width, kv_width = spec.n_head * spec.head_dim, spec.n_kv_head * spec.head_dim
        self.q = Linear(spec.n_embd, q_width, bias=spec.attention_bias)
        self.k = Linear(spec.n_embd, kv_width, bias=spec.attention_bias)
        self.v = Linear(spec.n_embd, kv_width, bias=spec.attention_bias)
        self.o = Linear(q_width, spec.n_embd, bias=spec.attention_bias)
        self.q_norm = norm_layer(spec, spec.head_dim) if spec.qk_norm else None
        self.k_norm = norm_layer(spec, spec.head_dim) if spec.qk_norm else None
        # nanochat normalises after the rotation, Qwen3 before; they differ once the norm has a gain
        self.norm_after_rope = spec.norm == "rmsnorm_plain"

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None = None) -> Tensor:
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        if not self.norm_after_rope:
            q, k = self._normalise(q, k)
        if rope is not None:
            # after the transpose: dimension 2 is time. On the head axis it would encode no position.
            q, k = rotate(q, *rope), rotate(k, *rope)
        if self.norm_after_rope:
            q, k = self._normalise(q, k)
        if mask is None:
            y = causal_attention(q, k, v.to(q.dtype))
        else:
            grouped = self.n_kv_head != self.n_head
            y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), mask, enable_gqa=grouped)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))

    def _normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks & Gimpel 2016), x's shape and dtype."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    wide = x.float()  # 1 + tanh(u) is 2 sigmoid(2 u), and an exponential takes half a tanh's time
    return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)


class MLP(nn.Module):
    """GELU (tanh form, as GPT-2's), ReLU² (So et al. 2021) or SwiGLU (Shazeer 2020)."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.kind = spec.mlp
        self.up = Linear(spec.n_embd, spec.n_hidden, bias=spec.mlp_bias)
        self.gate = Linear(spec.n_embd, spec.n_hidden, bias=spec.mlp_bias) if spec.mlp == "swiglu" else None
        self.down = Linear(spec.n_hidden, spec.n_embd, bias=spec.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.kind == "relu2":
            return self.down(F.relu(self.up(x)).square())
        return self.down(gelu(self.up(x)))


class Block(nn.Module):
    """Attention and MLP, each added to the residual; norm before each, or after each sum."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.norm_first = spec.norm_placement == "pre"
        self.attn_norm = norm_layer(spec, spec.n_embd)
        self.attn = Attention(spec)
        self.mlp_norm = norm_layer(spec, spec.n_embd)
        self.mlp = MLP(spec)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None = None) -> Tensor:
        if self.norm_first:
            x = x + self.attn(self.attn_norm(x), rope, mask)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attn_norm(x + self.attn(x, rope, mask))
        return self.mlp_norm(x + self.mlp(x))


class GPT(nn.Module):
    """A decoder-only language model of the shape that `spec` says."""

    cos: Tensor
    sin: Tensor

    def __init__(self, spec: ModelSpec, *, activation_checkpointing: bool = False):
        super().__init__()
        self.spec = spec
        self.activation_checkpointing = activation_checkpointing
        self.wte = nn.Embedding(spec.padded_vocab_size, spec.n_embd)
        self.wpe = nn.Embedding(spec.block_size, spec.n_embd) if spec.position == "learned" else None
        self.embed_norm = norm_layer(spec, spec.n_embd) if spec.embed_norm else None
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.n_layer))
        # with the norm behind each residual sum the last block's output is normalised already
        self.final_norm = norm_layer(spec, spec.n_embd) if spec.norm_placement == "pre" else None
        self.lm_head = Linear(spec.n_embd, spec.padded_vocab_size, bias=False)
        if spec.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        if spec.position == "rope":
            cos, sin = rope_tables(spec)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        residual_std = 0.02 / math.sqrt(2 * self.spec.n_layer)  # Radford et al. 2019
        for name, module in self.named_modules():
            if not isinstance(module, (nn.Linear, nn.Embedding)):
                continue
            out = name.endswith((".o", ".down"))
            # a tied table is never as fan_in says: a head of zeros would be an input of zeros too, and learn nothing
            if self.spec.init == "gpt2" or (self.spec.tie_embeddings and module.weight is self.wte.weight):
                nn.init.normal_(module.weight, std=residual_std if out else 0.02)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=1.0)
            elif out or name == "lm_head":
                nn.init.zeros_(module.weight)
            else:  # uniform of the standard deviation sqrt(0.33 / inputs)
                bound = math.sqrt(3 * 0.33 / module.in_features)
                nn.init.uniform_(module.weight, -bound, bound)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64 → last hidden states (B, T, C), normalised.

        With positions (B, T) and mask (B, 1, T, T), true where a query may look: several continuations
        of one text in one row. Without: each row is a text.
        """
        T = tokens.shape[1]
        assert positions is not None or self.spec.block_size >= T, f"{T} tokens in a block of {self.spec.block_size}"
        x = self.wte(tokens)  # (B, T, C)
        if self.wpe is not None:
            x = x + (self.wpe.weight[:T] if positions is None else self.wpe(positions))
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        rope = None
        if self.spec.position == "rope":
            # heads share a row's angles: (T, D), or (B, 1, T, D) where the rows differ
            rope = (self.cos[:T], self.sin[:T]) if positions is None else (
                self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
            )  # fmt: skip
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask)
        return x if self.final_norm is None else self.final_norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (…, C) → logits (…, vocab_size) float32: softcapped, the padding cut off."""
        assert self.spec.vocab_size is not None
        return logits_of(self.lm_head(hidden), self.spec.vocab_size, self.spec.logit_softcap)

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 → logits (B, T, vocab_size) float32."""
        return self.head(self.hidden(tokens))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets (B, T) int64 → mean cross-entropy () float32, nats a token."""
        hidden, spec = self.hidden(tokens).flatten(0, 1), self.spec
        assert spec.vocab_size is not None
        return head_loss(hidden, self.lm_head.weight, targets.flatten(), spec.vocab_size, spec.logit_softcap)
