"""What commands print: one JSON document for programs, plain lines or a table for people."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

PIPED_WIDTH = 240


def show_json(document: Mapping[str, object]) -> None:
    print(json.dumps(document, ensure_ascii=False))


def show_fields(fields: Mapping[str, object]) -> None:
    """Aligned `name  value` lines."""
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        print(f"{name:<{width}}  {cell(value)}")


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """A table, or the sentence `empty` where there are no rows."""
    # rich is a slow import that JSON output and errors do without
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        # Text, not markup: names come from outside
        table.add_row(*(Text(cell(value)) for value in row))
    if not table.row_count:
        print(empty)
        return
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(table)


def show_error(message: str, *, as_json: bool) -> None:
    """On stderr, so that stdout holds results only."""
    text = json.dumps({"error": {"message": message}}, ensure_ascii=False) if as_json else f"Error: {message}"
    print(text, file=sys.stderr)


def cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def timestamp(milliseconds: int) -> str:
    """Local time of day for people; JSON has Unix seconds."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
