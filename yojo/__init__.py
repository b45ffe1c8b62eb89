"""Yojo: you only judge once. A reward model that scores N responses in one forward pass, by hand.

The method is the folder `core/`; start with `tutorials/00_one_pass.md`.
"""

from yojo.core import lora
from yojo.core.lora import LoraConfig
from yojo.core.mask import AttentionMask
from yojo.core.molmo2 import Molmo2
from yojo.core.prompt import Processor
from yojo.core.reward import RewardModel
from yojo.files import InputError
from yojo.weights import load_backbone, save_backbone

__all__ = [
    "AttentionMask",
    "InputError",
    "LoraConfig",
    "Molmo2",
    "Processor",
    "RewardModel",
    "load_backbone",
    "lora",
    "save_backbone",
]
