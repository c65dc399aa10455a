"""A model card: what a hub shows beside a network, from the report's own numbers."""

from __future__ import annotations

import json

from pliant.render import words
from pliant.render.markdown import markdown
from pliant.result import Report

USE = """\
```python
import pliant

model = pliant.load("{folder}", build)  # build: a function that makes the dense network
```
"""


def card(report: Report, folder: str) -> str:
    """Return a model card with front matter, figures, seeds and versions.

    Args:
        report: of the compression.
        folder: where the network lies; stands in the example.
    """
    head = {
        "library_name": "pliant",
        "tags": ["model-compression", *dict.fromkeys(_names(report))],
        "model-index": [{"name": report.model, "results": _results(report)}],
    }
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    return f"---\n{front}\n---\n\n{markdown(report)}\n## Use\n\n{USE.format(folder=folder)}"


def _names(report: Report) -> list[str]:
    return [str(part["name"]) for part, _ in words.parts(report.method)]


def _results(report: Report) -> list[dict[str, object]]:
    if not words.known(report.after.accuracy):
        return []
    metric = {"type": "accuracy", "value": report.after.accuracy}
    data = report.data or "unknown"
    return [{"task": {"type": "image-classification"}, "dataset": {"name": data, "type": data},
             "metrics": [metric]}]  # fmt: skip
