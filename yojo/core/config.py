"""The numbers of a checkpoint: of its network, of how pictures are cut, of how they are marked up in a prompt. Every
default is Molmo2-4B's.

`settings.py` fills them from a checkpoint's files. `pytest tests/test_molmo2.py tests/test_image.py` checks the
defaults against the released files.
"""

from dataclasses import dataclass, field

from yojo.files import InputError


@dataclass(frozen=True)
class TextConfig:
    """Decoder. Defaults are Molmo2-4B."""

    hidden_size: int = 2560
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 9728
    vocab_size: int = 151936
    additional_vocab_size: int = 128
    max_position_embeddings: int = 36864
    rope_theta: float = 5_000_000.0
    rms_norm_eps: float = 1e-6

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the four matrices of a block."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "att_proj": (self.hidden_size, queries + 2 * keys),
            "attn_out": (queries, self.hidden_size),
            "ff_proj": (self.hidden_size, 2 * self.intermediate_size),
            "ff_out": (self.intermediate_size, self.hidden_size),
        }

    @property
    def rows(self) -> int:
        """Height of the embedding table; `lm_head` covers only the first `vocab_size` rows."""
        return self.vocab_size + self.additional_vocab_size


@dataclass(frozen=True)
class VisionConfig:
    """Vision tower. `num_hidden_layers` is the DECLARED depth; see `Config.vision_layers` for what is stored."""

    hidden_size: int = 1152
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    head_dim: int = 72
    intermediate_size: int = 4304
    patch_size: int = 14
    num_position_embeddings: int = 729
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class ConnectorConfig:
    """Connector between the tower and the decoder."""

    hidden_size: int = 1152
    num_attention_heads: int = 16
    head_dim: int = 72
    intermediate_size: int = 9728
    vit_layers: tuple[int, ...] = (-3, -9)


@dataclass(frozen=True)
class Config:
    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    image_patch_id: int = 151938
    eos_ids: tuple[int, ...] = (151645,)  # an answer ends with any of them; none: `generate` never stops early
    pad_id: int = 151643

    @property
    def vision_layers(self) -> tuple[int, ...]:
        """The layers whose outputs are read, 0-based. Negative numbers count from the DECLARED depth."""
        depth, layers = self.vision.num_hidden_layers, self.connector.vit_layers
        if not all(-depth <= layer < depth for layer in layers):
            raise InputError(f"vit_layers {layers} must lie among the {depth} declared vision layers")
        return tuple(layer % depth for layer in layers)

    @property
    def vision_depth(self) -> int:
        """Layers that exist: nothing above the deepest one that is read."""
        return max(self.vision_layers) + 1


@dataclass(frozen=True)
class ImageConfig:
    """Defaults are the release's. Sizes in pixels, margins and windows in patches."""

    size: int = 378
    patch: int = 14
    margins: tuple[int, int] = (4, 4)  # top and left, bottom and right
    max_crops: int = 8
    pooling: tuple[int, int] = (2, 2)
    video_pooling: tuple[int, int] = (3, 3)
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def side(self) -> int:
        """Patches along one side of a view."""
        return self.size // self.patch

    @property
    def window(self) -> int:
        """Pixels along one side of a crop without its margins: how far the next crop is."""
        return (self.side - sum(self.margins)) * self.patch

    @property
    def overlap(self) -> int:
        """Pixels along one side that the margins take."""
        return sum(self.margins) * self.patch


@dataclass(frozen=True)
class Markup:
    """How picture tokens are laid out; `processor_config.json`. Defaults are the release's."""

    image_use_col_tokens: bool = True
    use_single_crop_col_tokens: bool = False
    use_single_crop_start_token: bool = True
    video_use_col_tokens: bool = False
    use_frame_special_tokens: bool = False
