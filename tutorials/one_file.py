"""You only judge once, the whole idea in one file: N answers about a picture are scored in ONE forward pass.

    python -m tutorials.one_file        judge four answers, then train a new judge and watch it learn (a minute)

Nothing is hidden: weights, picture to patches, the row in which the answers stand, the mask that isolates them, the
network (vision tower, connector, decoder), LoRA, the value head, the loss, the training loop. From the package `yojo`
only the tiny world is borrowed: its pictures, questions and graded answers. `tests/test_one_file.py` holds scores and
gradients against the package.

Left out: picture sizes other than that of weights/tiny (one square view), several pictures, video, long rows, saving.

B rows, T tokens, N answers, D width, H heads, K key/value heads, d head width, P patches a view, M <im_patch> tokens.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
LORA = ("self_attn.att_proj", "self_attn.attn_out", "mlp.ff_proj", "mlp.ff_out")  # beside these matrices
PROMPT, PADDING = -1, -2  # owners of a token; the answers are 0, 1, 2, ...

# ------------------------------------------------------------------------------------------- 1. weights and settings


@dataclass
class Judge:
    """A frozen backbone and the little that is trained."""

    weights: dict[str, Tensor]  # the backbone, by the names in its file
    config: dict
    tokenizer: Tokenizer
    text: Tokenizer  # the same without special tokens: a text that spells <|resp_sep|> stays text
    lora: dict[str, tuple[Tensor, Tensor]]  # matrix -> A [r, in], B [out, r]
    scale: float  # alpha / r
    head: list[Tensor]  # W1 [inner, D], b1, w2 [1, inner], b2
    isolated: bool  # False: joint, an answer also attends to the answers before it

    def id(self, token: str) -> int:
        return self.tokenizer.token_to_id(token)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def load_backbone(folder: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict, Tokenizer, Tokenizer]:
    weights = {name.removeprefix("model."): w.to(dtype) for name, w in load_file(folder / "model.safetensors").items()}
    table = [weights.pop(f"transformer.wte.{part}") for part in ("embedding", "new_embedding")]
    weights["embedding"] = torch.cat(table)
    config = read_json(folder / "config.json") | read_json(folder / "preprocessor_config.json")
    raw = read_json(folder / "tokenizer.json")
    plain = raw | {"added_tokens": [], "post_processor": None}
    return weights, config, *(Tokenizer.from_str(json.dumps(t)) for t in (raw, plain))


def load_judge(folder: Path, dtype: torch.dtype = torch.float32) -> Judge:
    """A trained judge: its backbone, its adapter (PEFT's files) and its value head."""
    about, peft = read_json(folder / "reward_model_config.json"), read_json(folder / "adapter_config.json")
    adapter, head = (load_file(folder / f"{name}.safetensors") for name in ("adapter_model", "value_head"))
    prefix, lora = "base_model.model.model.", {}
    for key in sorted(k for k in adapter if k.endswith("lora_A.weight")):
        pair = adapter[key], adapter[key.replace("lora_A", "lora_B")]
        lora[key.removeprefix(prefix).removesuffix(".lora_A.weight")] = tuple(x.to(dtype) for x in pair)
    head = [head[name].to(dtype) for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
    backbone = load_backbone(folder / about["base"], dtype)
    return Judge(*backbone, lora, peft["lora_alpha"] / peft["r"], head, about["mode"] == "isolated")


def new_judge(isolated: bool, r: int = 16, alpha: int = 64, inner: int = 128, seed: int = 0) -> Judge:
    """An untrained judge. A is random and B is zero, so that at first it computes what its backbone computes."""
    generator = torch.Generator().manual_seed(seed)
    weights, config, *tokenizers = load_backbone(WEIGHTS / "tiny", torch.float32)
    lora, D = {}, config["text_config"]["hidden_size"]
    for name in (
        f"transformer.blocks.{i}.{m}" for i in range(config["text_config"]["num_hidden_layers"]) for m in LORA
    ):
        out, width = weights[f"{name}.weight"].shape
        bound = 1 / math.sqrt(width)
        lora[name] = torch.empty(r, width).uniform_(-bound, bound, generator=generator), torch.zeros(out, r)
    W1, w2 = (torch.empty(n, m).normal_(std=0.01, generator=generator) for n, m in ((inner, D), (1, inner)))
    head = [W1, torch.zeros(inner), w2, torch.zeros(1)]
    judge = Judge(weights, config, *tokenizers, lora, alpha / r, head, isolated)
    for parameter in trainable(judge):
        parameter.requires_grad_(True)
    return judge


def trainable(j: Judge) -> list[Tensor]:
    return [*(x for pair in j.lora.values() for x in pair), *j.head]


# ---------------------------------------------------------------------------------------------- 2. picture to patches


def to_patches(picture: Image.Image, config: dict) -> tuple[Tensor, Tensor]:
    """-> patches [2, P, 3 * 14 * 14] of an overview and of one crop, and windows [M, 4]: which four patches, 2 x 2,
    become one <im_patch> token. At this size both views are the same, but the network was trained to read two."""
    size, p = config["size"]["height"], config["patch_size"]
    pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    x = pixels.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)[0]
    x = (x.round().clamp(0, 255) / 255 - 0.5) / 0.5
    patches = x.unfold(1, p, p).unfold(2, p, p).permute(1, 2, 3, 4, 0).reshape(-1, 3 * p * p)  # y, x, colour
    side = size // p
    places = torch.arange(side * side).view(side, side)
    windows = places.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4)
    return torch.stack([patches, patches]), torch.cat([windows, windows + side * side])


# ------------------------------------------------------------------------------------------------ 3. one row of answers


@dataclass
class Row:
    """One record as the network reads it: ids, owner, image (does it belong to the picture, as a patch or a mark?) and
    position, all [T]; ends [N]: the last token of every answer, just before its separator, where its score is read; and
    the picture's patches and windows."""

    ids: Tensor
    owner: Tensor
    image: Tensor
    position: Tensor
    ends: Tensor
    picture: tuple[Tensor, Tensor]


def encode(j: Judge, question: str, answers: list[str], picture: Image.Image) -> Row:
    """BOS PICTURE <|im_start|>user QUESTION <|im_end|> <|im_start|>assistant   ANSWER sep  ANSWER sep  ...  ANSWER sep

    BOS is <|im_end|>, as in the release. In joint mode a separator shows later answers where one ended.

    The row is built piece by piece, so every position is known because we put it there. Nothing is searched for.
    """

    def tokens(s: str) -> list[int]:
        return j.text.encode(s, add_special_tokens=False).ids

    patches, windows = to_patches(picture, j.config)
    side = math.isqrt(len(windows) // 2)  # windows along one side of a view
    names = ("<im_patch>", "<low_res_im_start>", "<im_start>", "<im_end>", "<im_col>")
    patch, overview, crop, end, column = image_ids = [j.id(name) for name in names]
    image = [overview, *side * side * [patch], end, crop, *side * [*side * [patch], column], end]
    turn, turn_end, separator = (j.id(name) for name in ("<|im_start|>", "<|im_end|>", "<|resp_sep|>"))
    separator = j.tokenizer.get_vocab_size() if separator is None else separator  # the release adds it after all others
    ids = [turn_end, *image, turn, *tokens("user\n" + question), turn_end, *tokens("\n"), turn, *tokens("assistant\n")]
    prompt = len(ids)
    owner, position, ends = [PROMPT] * prompt, list(range(prompt)), []
    for i, answer in enumerate(answers):
        piece = [*tokens(answer), separator]
        start = prompt if j.isolated else len(ids)  # isolated: at the position it would have alone
        position += range(start, start + len(piece))
        ids, owner = ids + piece, owner + [i] * len(piece)
        ends.append(len(ids) - 2)  # the answer's last token; the separator is the one after it
    ids, owner, position, ends = (torch.tensor(x) for x in (ids, owner, position, ends))
    return Row(ids, owner, torch.isin(ids, torch.tensor(image_ids)), position, ends, (patches, windows))


def attention_mask(owner: Tensor, image: Tensor, isolated: bool) -> Tensor:
    """[B, T] -> bool [B, 1, T, T]: may query q attend to key k?

    k is no padding  AND  (k is not after q  OR  both are picture tokens)
                     AND  (joint  OR  k is in the prompt  OR  k is in q's own answer)

    Picture tokens attend to each other in both directions, since a picture has no before and after.
    """
    q, k, T = owner[:, :, None], owner[:, None, :], owner.shape[1]
    ordered = torch.ones(T, T, dtype=torch.bool).tril() | (image[:, :, None] & image[:, None, :])
    visible = (k == PROMPT) | (k == q) if isolated else k != PADDING
    return ((k != PADDING) & ordered & visible)[:, None]


# ---------------------------------------------------------------------------------------------------- 4. the network


def linear(j: Judge, name: str, x: Tensor) -> Tensor:
    """y = W x + b + (alpha / r) B A x; few matrices have a b, and only those of the decoder's blocks have A and B."""
    y = F.linear(x, j.weights[f"{name}.weight"], j.weights.get(f"{name}.bias"))
    if name in j.lora:
        A, B = j.lora[name]
        y = y + j.scale * (x @ A.T) @ B.T
    return y


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v.  q [B, H, T, d], k and v [B, K, S, d]; H / K query heads share a key head."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def heads(x: Tensor, d: int) -> Tensor:
    return x.unflatten(-1, (-1, d)).transpose(1, 2)  # [B, T, H d] -> [B, H, T, d]


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # and back


def vision_attention(j: Judge, name: str, x: Tensor, keys: Tensor, d: int) -> Tensor:
    q, k, v = (heads(linear(j, f"{name}.{m}", y), d) for m, y in (("wq", x), ("wk", keys), ("wv", keys)))
    return linear(j, f"{name}.wo", joined(attention(q, k, v)))


def layer_norm(j: Judge, name: str, x: Tensor) -> Tensor:
    eps = j.config["vit_config"]["layer_norm_eps"]
    return F.layer_norm(x, x.shape[-1:], j.weights[f"{name}.weight"], j.weights[f"{name}.bias"], eps)


def encode_images(j: Judge, patches: Tensor, windows: Tensor) -> Tensor:
    """patches [views, P, 588] -> vision tower -> two of its layers side by side -> one vector a window -> [M, D]."""
    vit, connector, name = j.config["vit_config"], j.config["adapter_config"], "vision_backbone.image_vit"
    x = linear(j, f"{name}.patch_embedding", patches.to(j.head[0].dtype)) + j.weights[f"{name}.positional_embedding"]
    layers = []
    for i in range(vit["num_hidden_layers"]):
        block = f"{name}.transformer.resblocks.{i}"
        y = layer_norm(j, f"{block}.attention_norm", x)
        x = x + vision_attention(j, f"{block}.attention", y, y, vit["head_dim"])
        y = linear(j, f"{block}.feed_forward.w1", layer_norm(j, f"{block}.ffn_norm", x))
        x = x + linear(j, f"{block}.feed_forward.w2", F.gelu(y, approximate="tanh"))
        layers.append(x)
    four = torch.cat([layers[i] for i in connector["vit_layers"]], dim=-1).flatten(0, 1)[windows]  # [M, 4, 2 width]
    mean = four.mean(1, keepdim=True)  # query: the mean; keys, values: the patches
    x = vision_attention(j, "vision_backbone.image_pooling_2d", mean, four, connector["head_dim"]).squeeze(1)
    w1, w3 = (linear(j, f"vision_backbone.image_projector.{m}", x) for m in ("w1", "w3"))
    return linear(j, "vision_backbone.image_projector.w2", F.silu(w1) * w3)


def rms_norm(j: Judge, name: str, x: Tensor) -> Tensor:
    """y = w * x / sqrt(mean(x^2) + eps)"""
    eps = j.config["text_config"]["layer_norm_eps"]
    return j.weights[f"{name}.weight"] * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """The pair (a, b) = (x_i, x_{i + d/2}) is turned by the angle position * theta^(-2i/d).  x [B, H, T, d]."""
    d = x.shape[-1]
    angle = position[:, None, :, None] * theta ** -(torch.arange(0, d, 2).to(x.dtype) / d)
    cos, sin, (a, b) = angle.cos(), angle.sin(), x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def decode(j: Judge, ids: Tensor, features: Tensor, mask: Tensor, position: Tensor) -> Tensor:
    """ids [B, T], features [M, D] of the pictures, ADDED at their tokens -> hidden [B, T, D] after the last norm."""
    c, x = j.config["text_config"], j.weights["embedding"][ids]
    x = x.index_put((ids == j.id("<im_patch>")).nonzero(as_tuple=True), features, accumulate=True)
    d, theta = c["head_dim"], c["rope_theta"]
    widths = [d * c[f"num_{kind}_heads"] for kind in ("attention", "key_value", "key_value")]
    for i in range(c["num_hidden_layers"]):
        block = f"transformer.blocks.{i}"
        qkv = linear(j, f"{block}.self_attn.att_proj", rms_norm(j, f"{block}.attn_norm", x))
        q, k, v = (heads(y, d) for y in qkv.split(widths, dim=-1))
        q, k = (rotate(rms_norm(j, f"{block}.self_attn.{n}_norm", y), position, theta) for n, y in (("q", q), ("k", k)))
        x = x + linear(j, f"{block}.self_attn.attn_out", joined(attention(q, k, v, mask)))
        up, gate = linear(j, f"{block}.mlp.ff_proj", rms_norm(j, f"{block}.ff_norm", x)).chunk(2, dim=-1)
        x = x + linear(j, f"{block}.mlp.ff_out", F.silu(gate) * up)
    return rms_norm(j, "transformer.ln_f", x)


# ------------------------------------------------------------------------------------------ 5. scores, loss, training


def score(j: Judge, rows: list[Row]) -> tuple[Tensor, ...]:
    """ONE pass over a batch of rows -> for each row the scores [N] of its answers.

    s = (w2 silu(W1 h + b1) + b2) / sqrt(D), where h is the hidden state at an answer's last token
    """
    ids, image, position = (pad_sequence([getattr(r, k) for r in rows], True) for k in ("ids", "image", "position"))
    owner = pad_sequence([r.owner for r in rows], True, PADDING)
    with torch.no_grad():  # the tower is frozen
        features = torch.cat([encode_images(j, *r.picture) for r in rows])
    hidden = decode(j, ids, features, attention_mask(owner, image, j.isolated), position)
    h = torch.cat([states[r.ends] for states, r in zip(hidden, rows, strict=True)])
    W1, b1, w2, b2 = j.head
    s = F.linear(F.silu(F.linear(h, W1, b1)), w2, b2).squeeze(-1) / math.sqrt(h.shape[-1])
    return s.split([len(r.ends) for r in rows])


def best_of_n(s: Tensor, ranks: Tensor) -> Tensor:
    """Cross-entropy over the N scores: - log softmax(s) at the best answer. Several best share the target evenly."""
    return -s.log_softmax(-1)[ranks == ranks.min()].mean()


Record = tuple[str, list[str], Image.Image, list[int]]  # question, answers, picture, rank of each answer (1 = best)


@torch.no_grad()
def accuracy(j: Judge, records: list[Record]) -> float:
    """How often the highest score is that of a best answer."""
    scores = score(j, [encode(j, *record[:3]) for record in records])
    best = [ranks[int(s.argmax())] == min(ranks) for s, (*_, ranks) in zip(scores, records, strict=True)]
    return sum(best) / len(best)


def train(j: Judge, draw: Callable[[], Record], test: list[Record], steps: int, lr: float = 2e-3) -> float:
    """AdamW on adapter and head, 16 new records a step; the backbone is frozen. -> the last accuracy on `test`."""
    optimizer = torch.optim.AdamW(trainable(j), lr=lr, weight_decay=0.0)
    for step in range(steps + 1):
        if step in (0, 2, 4, 6, 8) or step % 10 == 0 or step == steps:
            right = accuracy(j, test)
            print(f"step {step:3d}   best of 4, unseen records: {right:.2f}   {'#' * round(40 * right)}")
        if step == steps:
            return right
        for group in optimizer.param_groups:  # ten steps up, then down along half a cosine
            group["lr"] = lr * min(1, (step + 1) / 10) * (1 + math.cos(math.pi * step / steps)) / 2
        records = [draw() for _ in range(16)]
        scores = score(j, [encode(j, *record[:3]) for record in records])
        losses = [best_of_n(s, torch.tensor(ranks)) for s, (*_, ranks) in zip(scores, records, strict=True)]
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(trainable(j), 1.0)
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------------ 6. see it run


def world(seed: str) -> Callable[[], Record]:
    """Records of the tiny world, one after the other: a picture, a question, four answers, how true each is."""
    from yojo.tiny.world import absolute, make_scene, render

    rng = random.Random(seed)

    def draw() -> Record:
        scene = make_scene(rng)
        record = absolute(scene, rng)
        return record["prompt"], record["responses"], render(scene), record["rankings"]

    return draw


def main() -> None:
    draw = world("judged")
    question, answers, picture, ranks = draw()
    judge = load_judge(WEIGHTS / "tiny-rm-isolated")
    with torch.no_grad():
        (scores,) = score(judge, [encode(judge, question, answers, picture)])
    print(f"{question}   (rank 1 is the truest answer; of scores, only differences mean something)")
    for s, r, answer in sorted(zip(scores.tolist(), ranks, answers, strict=True), reverse=True):
        print(f"{s:8.3f}   rank {r}   {answer}")
    print("\nA new judge on the backbone, which stays frozen and was pre-trained on this world:")
    unseen = world("unseen")
    train(new_judge(isolated=True), world("seen"), [unseen() for _ in range(128)], steps=60)


if __name__ == "__main__":
    main()
