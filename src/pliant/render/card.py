"""A model card: what a hub shows beside a network, from the report's own numbers."""

from __future__ import annotations

import json

from pliant.render import words
from pliant.render.markdown import markdown
from pliant.result import Report

TASKS = {  # as a hub calls them, where that is sure
    "segmentation": "image-segmentation",
    "next-token": "text-generation",
    "super-resolution": "image-to-image",
}
USE = """\
```python
import pliant

model = pliant.load({folder}, build)  # build: a function that makes the dense network
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
    use = USE.format(folder=json.dumps(folder))
    return f"---\n{front}\n---\n\n{markdown(report)}\n## Use\n\n{use}"


def _names(report: Report) -> list[str]:
    return [str(part["name"]) for part, _ in words.parts(report.method)]


def _results(report: Report) -> list[dict[str, object]]:
    judged, data = report.judged(), report.data or "unknown"
    if not words.known(judged["score"]):
        return []
    metric = {"type": judged["metric"], "value": judged["score"]}
    task = TASKS.get(report.task, report.task or "other")
    return [{"task": {"type": task}, "dataset": {"name": data, "type": data}, "metrics": [metric]}]
