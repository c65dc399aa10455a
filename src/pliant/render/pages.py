"""The page of a method, made from its class: what it does, its paper, its options."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path

from pliant.registry import CALLS, Entry, entries, options
from pliant.registry.options import written


def prose(entry: Entry) -> str:
    """Return what a method's docstring says, without its example."""
    return inspect.cleandoc(entry.kind.__doc__ or "").partition(">>>")[0].strip()


def page(entry: Entry) -> str:
    """Return the page of one method as Markdown."""
    paper = entry.paper
    title = f"[{paper.title}]({paper.url})" if paper.url else paper.title
    lines = [
        f"# {entry.name}",
        prose(entry),
        f"**Paper.** {paper.authors}: {title}. {paper.venue} {paper.year}.",
        f"**Family.** {entry.family}. **Saves.** {', '.join(entry.saves) or 'nothing by itself'}.",
        f"**Use.** `{_use(entry)}`",
    ]
    return "\n\n".join([*lines, _table(entry)]).strip() + "\n"


def _use(entry: Entry) -> str:
    budget = f', "{entry.saves[0]}=0.3"' if entry.saves else ""
    return f'pliant.{entry.verb}({CALLS[entry.verb]}, "{entry.name}"{budget})'


def _table(entry: Entry) -> str:
    rows = options(entry)
    if not rows:
        return "It has no options."
    cells = [(f"`{r.name}`", r.type, f"`{written(r.default)}`", r.text) for r in rows]
    return _markdown(("option", "takes", "default", "what it does"), cells)


def overview(methods: Iterable[Entry]) -> str:
    """Return the overview of all methods as Markdown, family by family."""
    parts = ["# Methods", "Made from the classes by `python -m pliant.render.pages`."]
    families: dict[str, list[Entry]] = {}
    for entry in methods:
        families.setdefault(entry.family, []).append(entry)
    for family, members in families.items():
        cells = [
            (
                f"[{e.name}]({e.name}.md)",
                e.summary,
                ", ".join(e.saves),
                f"{e.paper.venue} {e.paper.year}",
            )
            for e in members
        ]
        parts += [f"## {family}", _markdown(("name", "what it does", "saves", "published"), cells)]
    return "\n\n".join(parts) + "\n"


def _markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )


def write(folder: Path) -> list[Path]:
    """Write the pages of all methods and their overview, and remove pages of methods gone."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {f"{entry.name}.md": page(entry) for entry in entries()}
    texts["README.md"] = overview(entries())
    for path in folder.glob("*.md"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


if __name__ == "__main__":
    write(Path("docs/methods"))
