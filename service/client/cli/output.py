"""What ``ntm-client`` prints: tables for people, JSON for programs."""

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from service.client.errors import GatewayError

# What numbers look like in a table; JSON has them whole.
_DIGITS = 6


class Output:
    """Prints to standard output; errors to standard error.

    Args:
        as_json: JSON in place of tables.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
        """Rows of one kind: as JSON whole, as a table the columns named."""
        if self.as_json:
            self.document(list(rows))
            return
        cells = [[_cell(row[column]) for column in columns] for row in rows]
        titles = [column.replace("_", " ") for column in columns]
        _print_table(titles, cells)

    def record(self, record: Mapping[str, Any]) -> None:
        """One thing, a line for each of its fields."""
        if self.as_json:
            self.document(record)
            return
        width = max(map(len, record), default=0)
        for name, value in record.items():
            print(f"{name.replace('_', ' '):{width}}  {_cell(value)}")

    def document(self, value: Any) -> None:
        """Any value, as JSON."""
        json.dump(value, sys.stdout, default=_plain, indent=2)
        print()

    def say(self, text: str) -> None:
        """A line for people; programs do not see it."""
        if not self.as_json:
            print(text)

    def error(self, text: str) -> None:
        """A line on standard error."""
        print(text, file=sys.stderr)

    def refused(self, error: GatewayError, target: str) -> None:
        """What the gateway said, or that it could not be reached."""
        if not self.as_json:
            self.error(f"ntm-client: {target}: {error}")
            return
        self.document(
            {
                "error": {
                    "code": error.code().name,
                    "reason": error.reason,
                    "message": error.details(),
                    "metadata": dict(error.metadata),
                    "field_violations": [violation._asdict() for violation in error.field_violations],
                    "retry_after": error.retry_after,
                }
            }
        )


def _cell(value: Any) -> str:
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, float):
        return f"{value:.{_DIGITS}g}"
    if isinstance(value, tuple | list):
        return " x ".join(map(str, value))
    return str(value)


def _plain(value: Any) -> Any:
    """What JSON has no form for."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not for JSON")


def _print_table(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    if importlib.util.find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
        for line in (titles, *cells):
            print("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*titles, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in cells:
        table.add_row(*row)
    # Piped into another program, a table keeps its width: nothing is cut off.
    console = Console(markup=False, width=None if sys.stdout.isatty() else 500)
    console.print(table)
