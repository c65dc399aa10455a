"""Tables for the terminal; each stays readable at 80 columns."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from pliant.errors import shown
from pliant.registry import Entry
from pliant.render import quantities, tables, words
from pliant.result import LayerRow, Report

BARS = "▁▂▃▄▅▆▇█"
MANY = (
    ("params", "params", words.human),
    ("latency_ms", "ms", words.milliseconds),
    ("seconds", "took", words.seconds),
)
LEAST = 8  # characters of a column that may be folded
SPARK = 12  # characters of a spectrum in a table


class _Fitting(Table):
    """A table that writes its rows below each other where they would be cut at the right."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table where its columns fit, and as a list of rows where they do not."""
        if self._needed() <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        yield from (Text(overflow="fold").join(part) for part in self._listed())

    def _needed(self) -> int:
        """The least width at which every column can be read."""
        widths = []
        for column in self.columns:
            cells = [_text(cell) for cell in (column.header, *column.cells)]
            whole = max((line.cell_len for cell in cells for line in cell.split()), default=0)
            folds = column.overflow == "fold" and not column.no_wrap
            widths.append(min(whole, column.min_width or LEAST) if folds else whole)
        return sum(widths) + 2 * len(widths)

    def _listed(self) -> Iterator[list[Text]]:
        if self.title:
            yield [_text(self.title)]
        heads = [_text(column.header) for column in self.columns]
        for row in zip(*(column.cells for column in self.columns), strict=True):
            first, *rest = map(_text, row)
            yield [Text(first.plain, "bold")]
            for head, cell in zip(heads[1:], rest, strict=True):
                if cell.plain.strip():
                    yield [Text(f"    {head.plain or 'what'}: ", "dim"), cell]
        if self.caption:
            yield [_text(self.caption)]


def _text(cell: Any) -> Text:
    return cell if isinstance(cell, Text) else Text(str(cell))


def _table(title: str | None = None) -> Table:
    return _Fitting(
        title=title and Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        pad_edge=False, collapse_padding=True, padding=(0, 1), header_style="bold",
    )  # fmt: skip


def plain(pairs: Sequence[tuple[str, str]]) -> Table:
    """List names and what they stand for."""
    table = _table()
    table.show_header = False
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, text in pairs:
        table.add_row(Text(name, "dim"), Text(text))
    return table


def before_after(report: Report) -> Table:
    """Compare the network before and after: scores and costs, one row each."""
    table = _table(words.headline(report))
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for row in words.comparisons(report):
        table.add_row(row.label, row.before, Text(row.after, "bold"), Text(row.change, "green"))
    said = f"{words.verdict(report)} {words.near(report)}".strip()
    table.caption = Text(said, "dim" if words.fine(report) else "bold red")
    table.caption_justify = "left"
    return table


def sizes(report: Report) -> Table:
    """List the sizes of an elastic network, the largest first."""
    table = _table("Every size in the file")
    for name in tables.SIZE_COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in tables.sizes(report):
        table.add_row(*row)
    return table


def tried(report: Report) -> Table:
    """List what was tried where sizes or methods were searched, the chosen one in bold."""
    table, rows = _table("What was tried"), tables.tried_cells(report)
    shown = [place for place in range(1, 7) if any(row[place] != words.NONE for row in rows)]
    table.add_column("network", overflow="fold", min_width=10)
    for place in shown:
        table.add_column(
            tables.tried_columns(report)[place - 1], justify="right", no_wrap=place != 5
        )
    table.add_column("", overflow="fold", ratio=1)
    for tried, cells in zip(report.tried, rows, strict=True):
        said = "chosen" if tried.get("chosen") else cells[-1]
        texts = (cells[0], *(cells[place] for place in shown), said)
        table.add_row(*map(Text, texts), style="bold" if tried.get("chosen") else "dim")
    table.caption = Text(
        "; ".join(row["note"] for row in tables.tried(report) if row.get("chosen"))
    )
    table.caption_justify = "left"
    return table


def many(rows: Sequence[Mapping[str, Any]]) -> Table:
    """List networks: what each costs and scores, or why there is none."""
    table, metric = _table(), quantities.metric(rows)
    write_score = quantities.named_score if metric == "score" else quantities.score
    columns = [(metric, [write_score(row) for row in rows])]
    columns += [(name, [write(row.get(key)) for row in rows]) for key, name, write in MANY]
    kept = [each for each in columns if set(each[1]) != {words.NONE}]
    table.add_column("network", overflow="fold", min_width=14, ratio=2)
    for name, _ in kept:
        table.add_column(Text(name), justify="right", no_wrap=True)
    refused = [str(row.get("refused") or "") for row in rows]
    if any(refused):
        table.add_column("refused", overflow="fold", ratio=2)
    for place, row in enumerate(rows):
        texts = [str(row["name"]), *(cells[place] for _, cells in kept)]
        table.add_row(*map(Text, texts + ([refused[place]] if any(refused) else [])))
    return table


def layers(report: Report) -> Table:
    """List the layers that cost MACs: what each became, or why it was left alone.

    Layers without MACs (normalisation, activations) are only counted, unless changed.
    """
    table = _table("Layers")
    table.add_column("layer", overflow="fold", min_width=12, max_width=34)
    table.add_column("became", overflow="fold", min_width=20)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("MACs", justify="right", no_wrap=True)
    table.add_column("saved", justify="right", no_wrap=True)
    shown = [row for row in report.layers if row.before.get("macs") or words.is_changed(row)]
    timed = words.has_times(shown)
    if timed:
        table.add_column("ms", justify="right", no_wrap=True)
    for row in shown:
        table.add_row(*_layer(row), *([_times(row)] if timed else []))
    if hidden := len(report.layers) - len(shown):
        table.caption = Text(f"{hidden} layers without MACs were left alone.", "dim")
        table.caption_justify = "left"
    return table


def _layer(row: LayerRow) -> tuple[Text, ...]:
    style = "" if words.is_changed(row) else "dim"
    became = ": ".join(filter(None, (words.what(row), words.why(row))))
    if not words.is_changed(row):
        became = f"dense: {words.why(row)}"
    return (
        Text(shown(row.layer, 200), style),
        Text(became, style),
        Text(_change(row, "params"), style),
        Text(_change(row, "macs"), style),
        Text(words.saved(row), "green" if style == "" else style),
    )


def _times(row: LayerRow) -> Text:
    before, after = words.layer_times(row)
    if not words.is_changed(row):
        return Text(before, "dim")
    return Text(f"{before} → {after}")


def _change(row: LayerRow, axis: str) -> str:
    before, after = row.before.get(axis, 0), row.after.get(axis, 0)
    if before == after:
        return words.human(before)
    return f"{words.human(before)} → {words.human(after)}"


def methods(entries: Sequence[Entry]) -> Table:
    """List methods family by family: their verb, what they save and where they come from."""
    table = _table()
    table.add_column("method", overflow="fold", min_width=22, style="bold")
    table.add_column("verb", no_wrap=True)
    table.add_column("saves", overflow="fold", min_width=7, max_width=7)
    table.add_column("what it does", overflow="fold", min_width=20)
    table.add_column("paper", overflow="fold", min_width=9, max_width=9)
    family = ""
    for entry in entries:
        if entry.family != family:
            family = entry.family
            table.add_section()
            table.add_row(Text(family, "bold cyan"))
        paper = Text(f"{entry.paper.venue} {entry.paper.year}", _link(entry.paper.url))
        saves = " ".join(entry.saves) or words.NONE
        cells = (f" {entry.name}", entry.verb, saves, entry.summary)
        table.add_row(*map(Text, cells), paper)
    return table


def _link(url: str) -> str:
    return f"link {url}" if url.startswith(("https://", "http://")) and " " not in url else ""


def inspect(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show plain rows: a column for each key, numbers made short, spectra as small pictures."""
    table = _table()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    for key in keys:
        text = any(isinstance(row.get(key), str) for row in rows)
        table.add_column(
            Text(str(key).replace("_", " ")),
            justify="left" if text else "right",
            overflow="fold",
            min_width=min(10, max((len(cell(row.get(key))) for row in rows), default=1)),
        )
    for row in rows:
        table.add_row(*(Text(cell(row.get(key))) for key in keys))
    return table


def cell(value: Any) -> str:
    """Write one value of a plain row; a long list of numbers becomes a spark line."""
    if value is None:
        return words.NONE
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return words.human(value)
    if isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value):
        return spark(value) if len(value) > 4 else "/".join(map(words.human, value))
    return shown(words.plain(value), 200)


def spark(values: Sequence[float]) -> str:
    """Draw numbers from 0 to their maximum with block characters, at most 12 of them.

    >>> spark([8, 4, 2, 1, 0.5, 0.1])
    '█▄▂▁▁▁'
    """
    shown = [values[i * len(values) // SPARK] for i in range(SPARK)]
    shown = shown if len(values) > SPARK else list(values)
    top = max(shown) or 1.0
    return "".join(BARS[min(7, max(0, int(8 * value / top - 1e-9)))] for value in shown)
