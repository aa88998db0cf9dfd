"""The consoles that the command line prints to."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from gptcore.control_characters import escape_controls


class Terminal(Console):
    """A console that shows control characters as escapes.

    Names, labels, errors and logs may come from other users: their control characters must not reach the terminal of
    whoever looks at them. Rich's own styles and cursor movements are not part of a segment's text.
    """

    def __init__(self, *, stderr: bool = False):
        super().__init__(stderr=stderr, highlight=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text, style, control) if control else Segment(escape_controls(text), style)
