"""The one exception the commands turn into a single line and exit status 2."""

from __future__ import annotations


class Mistake(ValueError):
    """What the user asked for cannot be done; the message says which part and how to mend it."""
