"""Tables on standard output."""

from rich.console import Console, RenderableType

LOG_WIDTH = 240
"""Columns of a file or pipe, which has no width of its own: numbers and digests stay in one piece."""


def show(tables: RenderableType) -> None:
    """Print tables, as wide as the terminal, or as a log may be."""
    console = Console()
    Console(width=console.width if console.is_terminal else LOG_WIDTH).print(tables)
