"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table_row(cells: Iterable[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def number_table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a table whose first column is text, and whose others, numbers, are aligned to the right."""
    return [table_row(header), "|---|" + "---:|" * (len(header) - 1), *map(table_row, rows)]
