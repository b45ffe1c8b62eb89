"""Yojo: you only judge once. A reward model that scores N responses in one forward pass, by hand.

Start with `tutorials/00_one_pass.md`; README.md lists the core's files in the order in which data flows.
"""

from importlib import import_module

# Each name is imported when it is first used, so that `python -m yojo.checkpoint` runs that module once, not twice.
_WHERE = {
    "AttentionMask": "core.mask",
    "InputError": "files",
    "LoraConfig": "core.lora",
    "Molmo2": "core.molmo2",
    "Processor": "core.prompt",
    "RewardModel": "core.reward",
    "load_backbone": "weights",
    "save_backbone": "weights",
}
__all__ = [*_WHERE, "lora"]


def __getattr__(name: str):
    if name == "lora":
        return import_module("yojo.core.lora")
    if name not in _WHERE:
        raise AttributeError(f"module 'yojo' has no attribute {name!r}")
    return getattr(import_module(f"yojo.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
