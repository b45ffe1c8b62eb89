"""Yojo: you only judge once. A reward model that scores N responses in one forward pass, by hand.

Start with `tutorials/00_one_pass.md`; the file list in README.md is the order in which data flows.
"""

from yojo import lora
from yojo.checkpoint import load_backbone, save_backbone
from yojo.files import InputError
from yojo.lora import LoraConfig
from yojo.mask import AttentionMask
from yojo.molmo2 import Molmo2
from yojo.prompt import Processor
from yojo.reward import RewardModel

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
