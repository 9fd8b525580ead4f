"""Checks of single arguments; errors name the argument, its value and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


def check_length(name: str, values: Sequence[Any], expected: int, why: str) -> None:
    """Raise ValueError unless ``values`` has ``expected`` entries."""
    if len(values) != expected:
        raise ValueError(f"{name} is a list of {len(values)}, but must have {expected}: {why}.")


def plain_list(value: Any) -> Any:
    """Return a sequence such as a list of OmegaConf's as a list; anything else, also a string, as it is."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def one_per_block(name: str, factory: Any, num_blocks: int) -> list[Any]:
    """Return ``factory``, a callable or a list of callables, as a list with one callable for each block."""
    factory = plain_list(factory)
    if isinstance(factory, list):
        check_length(name, factory, num_blocks, "one for each block")
    factories = factory if isinstance(factory, list) else [factory] * num_blocks
    for make in factories:
        if not callable(make):
            raise TypeError(f"{name} must be a callable (or a list of callables), got {type(make).__name__}.")
    return factories


def describe(value: Any) -> str:
    """Return what to call an argument that is a callable, a module, or a list of these, in a message."""
    if isinstance(value, list):
        return f"[{', '.join(describe(own) for own in value)}]"
    if isinstance(value, partial):
        given = [*map(repr, value.args), *(f"{name}={own!r}" for name, own in value.keywords.items())]
        return f"{describe(value.func)}({', '.join(given)})"
    return str(getattr(value, "__qualname__", None) or type(value).__name__)


def warn_of_unsaved(saved: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Warn of arguments that a checkpoint's module was given, and that the module that loads it was not."""
    missing = [name for name in saved if name not in given]
    if missing:
        rank_zero_warn(
            f"The checkpoint is of a module with {', '.join(f'{name}={saved[name]}' for name in missing)}, which "
            "checkpoints do not hold; this one has the default. Pass the same to load_from_checkpoint, or to the "
            f"module before fit: {', '.join(f'{name}=...' for name in missing)}."
        )
