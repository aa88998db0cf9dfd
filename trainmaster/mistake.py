"""What a user can mend."""


class Mistake(Exception):
    """The message says how to mend it; it is shown without a traceback."""
