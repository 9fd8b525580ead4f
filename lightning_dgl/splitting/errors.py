"""The one error that splitting raises."""

from __future__ import annotations


class SplitError(ValueError):
    """The network cannot be split as asked; the message names what stands in the way and what to do."""
