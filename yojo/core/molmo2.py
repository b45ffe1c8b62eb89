"""Molmo2 by hand: vision tower, connector, decoder.

    picture --patches--> ImageViT --two layers, 2x2 windows--> pooling attention --SwiGLU--> features [M, D]
    ids --table--> embeddings, features ADDED at the <im_patch> tokens --blocks--> final norm --> hidden [B, T, D]

How it differs from a textbook decoder (facts: the Molmo2 report and `transformers.models.molmo2`):
- queries and keys are RMS-normalised per head BEFORE the rotary embedding; grouped-query attention, no biases;
- picture features are added to the embedding of their token; they do not replace it;
- all picture tokens of a record attend to each other in both directions; everything else is causal;
- the forward pass returns hidden states after the final norm and never logits: a reward model needs none.

Attribute names are the checkpoint's tensor names, so loading is one strict `load_state_dict` (`weights.py`).
Norms, rotary angles and softmax run in at least float32 (bf16 goes up, float64 stays); `ops.py` is there for speed.

Shape alphabet: B batch rows, T tokens, N responses, R kept positions, P patches of a view, M pooled picture tokens,
D decoder width, H query heads, K key/value heads, d head width, V vocabulary; in attention Q queries, S keys.

See it run: `pytest tests/test_molmo2.py` holds every part against `transformers`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from yojo.core import lora, ops
from yojo.core.config import Config, TextConfig, VisionConfig
from yojo.core.image import Pictures
from yojo.core.lora import Linear
from yojo.core.mask import AttentionMask
from yojo.files import InputError

if TYPE_CHECKING:  # the next file, which reads token by token
    from yojo.core.generate import Cache, LayerCache


def heads(x: Tensor, d: int) -> Tensor:
    """Vectors in pieces of width d, one a head: [B, T, H d] -> [B, H, T, d]."""
    return x.unflatten(-1, (-1, d)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """And back: [B, H, T, d] -> [B, T, H d]."""
    return x.transpose(1, 2).flatten(2)


# ---------------------------------------------------------------------------------------------------- vision tower


class VisionAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V with biases; queries and keys may come from different places."""

    def __init__(self, width_in: int, width_out: int, num_heads: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.wq, self.wk, self.wv = (nn.Linear(width_in, num_heads * head_dim) for _ in range(3))
        self.wo = nn.Linear(num_heads * head_dim, width_out)

    def forward(self, x: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, Q, width_in], keys [B, S, width_in], mask bool [B, 1, Q, S] -> [B, Q, width_out]."""
        q, k, v = (heads(y, self.head_dim) for y in (self.wq(x), self.wk(keys), self.wv(keys)))
        return self.wo(joined(ops.attention(q, k, v, mask)))


class VisionMLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(inner, width)

    @ops.tokenwise(products=True)
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.attention = VisionAttention(c.hidden_size, c.hidden_size, c.num_attention_heads, c.head_dim)
        self.ffn_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.feed_forward = VisionMLP(c.hidden_size, c.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        x = x + self.attention(y, y)
        return x + self.feed_forward(self.ffn_norm(x))


class ImageViT(nn.Module):
    """Each patch attends to every patch of its own view and to no other view. No class token, no final norm."""

    def __init__(self, c: VisionConfig, depth: int, layers: tuple[int, ...]):
        super().__init__()
        self.layers = layers
        self.patch_embedding = nn.Linear(3 * c.patch_size**2, c.hidden_size)
        self.positional_embedding = nn.Parameter(torch.zeros(c.num_position_embeddings, c.hidden_size))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(VisionBlock(c) for _ in range(depth))})

    def forward(self, patches: Tensor) -> list[Tensor]:
        """patches [views, P, 3 * patch^2] -> the outputs of the layers that are read, each [views, P, width]."""
        if patches.shape[1] != (places := len(self.positional_embedding)):
            raise ValueError(f"views have {patches.shape[1]} patches, the tower {places} positions")
        x = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype)) + self.positional_embedding
        outputs = {}
        for i, block in enumerate(self.transformer["resblocks"]):
            x = block(x)
            if i in self.layers:
                outputs[i] = x
        return [outputs[i] for i in self.layers]


# -------------------------------------------------------------------------------------------------------- connector


class ImageProjector(nn.Module):
    """SwiGLU into the decoder's width: w2(silu(w1 x) * w3 x)."""

    def __init__(self, width_in: int, inner: int, width_out: int):
        super().__init__()
        self.w1 = nn.Linear(width_in, inner, bias=False)
        self.w2 = nn.Linear(inner, width_out, bias=False)
        self.w3 = nn.Linear(width_in, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class VisionBackbone(nn.Module):
    """Tower and connector: pictures to features in the decoder's width."""

    def __init__(self, config: Config):
        super().__init__()
        v, a = config.vision, config.connector
        self.image_vit = ImageViT(v, config.vision_depth, config.vision_layers)
        read_width = v.hidden_size * len(config.vision_layers)
        self.image_pooling_2d = VisionAttention(read_width, a.hidden_size, a.num_attention_heads, a.head_dim)
        self.image_projector = ImageProjector(a.hidden_size, a.intermediate_size, config.text.hidden_size)

    def forward(self, patches: Tensor, pooling: Tensor) -> Tensor:
        """patches [views, P, 3 * patch^2], pooling int [M, window] (-1 = padding) -> features [M', D]."""
        return self.image_projector(self.pool(torch.cat(self.image_vit(patches), dim=-1), pooling))

    def pool(self, outputs: Tensor, pooling: Tensor) -> Tensor:
        """One token per window: the query is the mean of its patches, keys and values are the patches.

        outputs [views, P, W], pooling [M, window] -> [M', width]; windows without any patch are dropped.
        """
        outputs = outputs.flatten(0, 1)
        if pooling.max() >= len(outputs):
            raise ValueError(f"pooling index {int(pooling.max())} points beyond the {len(outputs)} patches given")
        pooling = pooling[(pooling >= 0).any(-1)]
        valid = pooling >= 0  # [M', window]
        patches = outputs[pooling.clamp_min(0)] * valid[..., None]
        query = patches.sum(1, keepdim=True) / valid.sum(1)[:, None, None].to(patches.dtype)
        return self.image_pooling_2d(query, patches, valid[:, None, None, :]).squeeze(1)


# ---------------------------------------------------------------------------------------------------------- decoder


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = w * x / sqrt(mean(x^2) + eps), cast back BEFORE it is multiplied by w: so the checkpoint was trained."""
    exact = torch.promote_types(x.dtype, torch.float32)
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact).square() / x.shape[-1]  # no copy of x
    return weight * (x * torch.rsqrt(mean_square + eps)).to(x.dtype)


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [B, T, 1, d/2] in `dtype`, of position * theta^(-2i/d)."""
    exact = torch.promote_types(dtype, torch.float32)
    steps = torch.arange(0, head_dim, 2, device=positions.device).to(exact) / head_dim
    angle = positions[:, :, None, None].to(exact) * theta**-steps
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) = (x_i, x_{i + d/2}) by its angle: (a cos - b sin, b cos + a sin). x [..., heads, d]."""
    a, b = x.chunk(2, dim=-1)  # addcmul(p, q, r) = p + q r, here with q r times -1 and 1
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class RotaryNorm(RMSNorm):
    """What a query or a key goes through: its head's norm, then its rotation. x [..., heads, d]."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(rms_norm(x, self.weight, self.eps), cos, sin)


@dataclass(frozen=True)
class Context:
    """What every block of a pass receives, by value: activation checkpointing runs a block again at backward time, when
    another adapter may be in use, and it must then repeat exactly what it did."""

    angles: tuple[Tensor, Tensor]  # cos and sin, [B, T, 1, d/2]
    mask: AttentionMask | Tensor | None  # None = causal
    adapter: str | None  # None = the base alone


def gather(x: Tensor, keep: Tensor | None) -> Tensor:
    """x [B, T, D] at the (row, index) pairs of keep [R, 2] -> [R, D]; None = all of it."""
    return x if keep is None else x[keep.to(x.device, non_blocking=True).unbind(1)]


class Attention(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.widths = [c.num_attention_heads * c.head_dim] + 2 * [c.num_key_value_heads * c.head_dim]
        self.head_dim = c.head_dim
        self.att_proj = Linear(c.hidden_size, sum(self.widths))
        self.attn_out = Linear(self.widths[0], c.hidden_size)
        self.q_norm = RotaryNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RotaryNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x: Tensor, context: Context, cache: "LayerCache | None", keep: Tensor | None) -> Tensor:
        """x [B, T, D] -> [B, T, D], or [R, D] of the R pairs to `keep`."""
        q, k, v = self.split_heads(self.att_proj(x, context.adapter), *context.angles)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [B, heads, T, d]
        if cache is not None:
            k, v = cache.append(k, v)
        out = ops.attention(q, k, v, context.mask, causal=context.mask is None, keep=keep)
        return self.attn_out(gather(joined(out), keep), context.adapter)

    @ops.tokenwise(products=False)
    def split_heads(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What att_proj made of tokens, [..., sum of widths], and their angles -> q, k, v, each [..., heads, d]."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in qkv.split(self.widths, dim=-1))
        return self.q_norm(q, cos, sin), self.k_norm(k, cos, sin), v


class SwiGLU(nn.Module):
    """silu(gate) * up; x [..., 2 * inner], up first -> [..., inner]. A module, so that `fuse` finds it."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.swiglu(x)


class MLP(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.ff_proj = Linear(c.hidden_size, 2 * c.intermediate_size)
        self.act = SwiGLU()
        self.ff_out = Linear(c.intermediate_size, c.hidden_size)

    @ops.tokenwise(products=True)
    def forward(self, x: Tensor, adapter: str | None) -> Tensor:
        return self.ff_out(self.act(self.ff_proj(x, adapter)), adapter)


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). After attention only what is to `keep` goes on."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.attn_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.ff_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, context: Context, cache: "LayerCache | None", keep: Tensor | None) -> Tensor:
        x = gather(x, keep) + self.self_attn(self.attn_norm(x), context, cache, keep)
        return x + self.mlp(self.ff_norm(x), context.adapter)


class Embedding(nn.Module):
    """One table. In files it is cut in two, `embedding` and `new_embedding`, at any row."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding)


class Decoder(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.wte = Embedding(c.rows, c.hidden_size)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.ln_f = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Trunk(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.transformer = Decoder(config.text)
        self.vision_backbone = VisionBackbone(config)


class Molmo2(nn.Module):
    """The backbone: `encode_images`, then read tokens. With an `lm_head`, `generate.py` can sample from it."""

    def __init__(self, config: Config, lm_head: bool = True):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute blocks at backward time instead of keeping their activations
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False) if lm_head else None

    @property
    def device(self) -> torch.device:
        return self.model.transformer.ln_f.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.transformer.ln_f.weight.dtype

    def fuse(self) -> None:
        """Compile norms, rotation and SwiGLU with `torch.compile`: each is then one pass over memory instead of one for
        every operation. The first passes take some 20 s more, and need a C++ compiler (on CUDA: Triton); without one
        this raises InputError. In bf16 a fused norm rounds once, at its end; the plain one also rounds before it
        multiplies by its weight. A copy of the model is not compiled."""
        norm = self.model.transformer.ln_f
        parts = [part for part in self.modules() if isinstance(part, (RMSNorm, SwiGLU))]
        ops.fuse(parts, lambda: norm(norm.weight.repeat(2, 1)))

    def encode_images(self, pictures: Pictures) -> Tensor:
        """Features [M', D] in the model's dtype, in the order of the <im_patch> tokens (M' <= M: empty windows are
        dropped). Kept features of `pictures` are used again, unless the tower is being trained."""
        if not len(pictures.pooling):
            return torch.empty(0, self.config.text.hidden_size, device=self.device, dtype=self.dtype)
        if pictures.features is not None and not self.tower_learns():
            return pictures.features.to(self.device, self.dtype)
        if not len(pictures.patches):
            raise ValueError("of these pictures only features were kept, which no longer hold: open them again")
        with torch.autocast(self.device.type, enabled=False):  # kept features must not depend on the caller
            seen = (x.to(self.device, non_blocking=True) for x in (pictures.patches, pictures.pooling))
            return self.model.vision_backbone(*seen)

    @torch.no_grad()
    def keep_features(self, pictures: Pictures) -> Pictures:
        """The same pictures with their features in place of their patches, so that a frozen tower need not run again.
        If the tower is being trained, the pictures stay as they are."""
        return pictures if self.tower_learns() else pictures.keeping(self.encode_images(pictures))

    def tower_learns(self) -> bool:
        return any(p.requires_grad for p in self.model.vision_backbone.parameters())

    def embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """ids [B, T] and features [M, D] -> embeddings [B, T, D]; features are ADDED at the <im_patch> tokens."""
        x = self.model.transformer.wte(input_ids)
        if input_ids.is_meta:  # shapes only: nothing can be counted
            return x
        patches, given = input_ids == self.config.image_patch_id, 0 if features is None else len(features)
        if (tokens := int(patches.sum())) != given:
            raise ValueError(f"{tokens} <im_patch> tokens but {given} picture features: pass `encode_images(...)`")
        return x.index_put(patches.nonzero(as_tuple=True), features, accumulate=True) if given else x

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor | None = None,
        mask: AttentionMask | None = None,
        positions: Tensor | None = None,
        keep: Tensor | None = None,
        cache: "Cache | None" = None,
        adapter: str | None = lora.IN_USE,
    ) -> Tensor:
        """Hidden states after the final norm, in the model's dtype. Never logits.

        input_ids int [B, T]; features [M, D] from `encode_images`; mask None = causal; positions int [B, T], None =
        counting up from the length of the cache; keep int [R, 2] of (row, index), best on the host -> [R, D], None ->
        [B, T, D]; cache: attend to its tokens and append these to it (`mask` only while it is empty); adapter: its
        name, None = the base alone, left out = the one that `lora.use` set in this thread.
        """
        (B, T), past = input_ids.shape, 0 if cache is None else cache.length
        if mask is not None and (past or mask.record.shape != (B, T)):
            raise ValueError(f"mask of shape {tuple(mask.record.shape)} for ids {(B, T)} after {past} cached tokens")
        if positions is None:
            positions = torch.arange(past, past + T, device=input_ids.device)
        c, decoder = self.config.text, self.model.transformer
        said = past and T == 1 and features is None  # a sampled token, which is no picture token
        x = decoder.wte(input_ids) if said else self.embed(input_ids, features)
        angles = rotary_angles(positions.expand(B, T), c.head_dim, c.rope_theta, x.dtype)
        allow = cache.allow(T) if past else mask and ops.laid_out(mask, x.device)
        context = Context(angles, allow, lora.active(self, adapter))
        recompute = self.checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(decoder.blocks):
            # the last block computes only what is kept: beyond it no token attends to another
            keep_here = keep if i == len(decoder.blocks) - 1 else None
            args = (x, context, None if cache is None else cache.layers[i], keep_here)
            x = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
        return decoder.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> [..., V]."""
        if self.lm_head is None:
            raise InputError("this backbone was loaded without its lm_head: use load_backbone(..., lm_head=True)")
        return self.lm_head(hidden)
