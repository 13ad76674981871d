"""Tables in a log keep their numbers whole; on a terminal they keep to its width."""

import re

from rich.table import Table

from flexolmo_megatron.commands.console import show


def wide_table() -> Table:
    table = Table()
    for number in range(12):
        table.add_column(f"domain {number}", no_wrap=True)
    table.add_row(*(f"* 1.23{number:02}" for number in range(12)))
    return table


def test_a_log_is_wide(capsys):
    show(wide_table())
    shown = capsys.readouterr().out
    assert all(f"* 1.23{number:02}" in shown for number in range(12)) and "…" not in shown


def test_a_terminal_has_its_own_width(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any output for a terminal
    show(wide_table())
    plain = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert {len(line) for line in plain.splitlines()} == {60}
