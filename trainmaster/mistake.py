"""What a user can mend."""

from __future__ import annotations


class Mistake(Exception):
    """The message says how to mend it; it is shown without a traceback."""
