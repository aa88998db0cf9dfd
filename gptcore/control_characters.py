"""Characters that act on a terminal or reorder its line instead of being shown."""

import re

# C0 and C1 codes, DEL, line separators, and codes that reorder the text after them (Unicode TR 36, section 2.4)
CONTROL_CLASS = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"
_CONTROL = re.compile(f"[{CONTROL_CLASS}]")
_CONTROL_IN_LINES = re.compile(rf"(?![\n\t])[{CONTROL_CLASS}]")


def has_controls(text: str) -> bool:
    """Return whether a text meant for one line has a control character; a line break and a tab are some."""
    return _CONTROL.search(text) is not None


def escape_controls(text: str) -> str:
    r"""Return the text with each control character, apart from line breaks and tabs, as Python writes it: `\x1b`."""
    return _CONTROL_IN_LINES.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
