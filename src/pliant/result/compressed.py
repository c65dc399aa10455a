"""What came out: plain data that every renderer reads, and the compressed network with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from torch import nn

from pliant.edits import Edit
from pliant.errors import PliantError
from pliant.files import artifact
from pliant.result.read import plain, read


@dataclass(frozen=True)
class Side:
    """The network before or after: its costs and what it scores; None where not measured.

    ``latency_spread_ms`` is half the distance between the quartiles of the measured times.
    ``metrics`` are those of the task by name, the first one judges.
    """

    params: int
    macs: int
    bytes: int
    latency_ms: float | None = None
    accuracy: float | None = None
    loss: float | None = None
    uncounted: tuple[str, ...] = ()
    latency_spread_ms: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Fidelity:
    """How near all outputs of the smaller network are to those of the dense one.

    Args:
        error: root of the squared error over the squared size, over all samples; a mean over
            outputs.
        cosine: between the outputs of a sample, a mean over samples.
        agreement: share of equal answers, None where answers are no classes.
        samples: how many were compared.
        where: the split they are of.
    """

    error: float
    cosine: float
    agreement: float | None
    samples: int
    where: str


@dataclass(frozen=True)
class Verdict:
    """What the smaller network lost of its score, and whether that may be.

    Args:
        bound: points of a percent, or percent, that may be lost.
        lost: what was lost on the split that was scored; None where nothing was.
        low: lower end of an interval of 95 % for what is lost on all such samples.
        high: its upper end.
        samples: how many samples were scored.
        holds: whether no more was lost than may be; None where it was not measured.
        note: what to know besides, in a sentence; empty if nothing.
        metric: by which it is judged.
        unit: of what was lost: points of a percent where the metric is a share, else percent of
            what it was.
    """

    bound: float
    lost: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int = 0
    holds: bool | None = None
    note: str = ""
    metric: str = "accuracy"
    unit: Literal["points", "%"] = "points"


@dataclass(frozen=True)
class LayerRow:
    """One layer, changed or left alone.

    Args:
        layer: its name in the dense network; of a new layer, its name now.
        kind: its class there.
        form: what it became: ``dense``, or the form of its factorization.
        ranks: the ranks of the form, empty where it stayed dense.
        kept: channels kept of how many, where channels were removed.
        before: params, macs and bytes in the dense network; latency, the milliseconds of the
            layer alone, where it was measured.
        after: the same now.
        reason: why it was left alone; of a changed layer a warning, empty without one.
    """

    layer: str
    kind: str
    form: str
    ranks: tuple[int, ...]
    kept: tuple[int, int] | None
    before: Mapping[str, float]
    after: Mapping[str, float]
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """Everything worth knowing about one compression, as plain data.

    ``history`` is the run's log: rows with ``step`` and ``epoch`` and any of ``loss``,
    ``accuracy``, ``lr``, ``phase``, ``ranks`` (by layer), ``warnings`` (by layer) and ``spectra``
    (singular values by layer and unfolding). ``seconds`` is by stage, ``export`` what was written
    and how it compares, ``target`` where milliseconds were measured and how sure their comparison
    is. ``sizes`` are those of an elastic network, each by itself, from the largest; empty for any
    other. ``verdict`` judges what was lost, ``fidelity`` compares outputs with the dense network's,
    ``task`` is what was trained and scored, and ``metrics`` says of its metrics which way is better
    and what they count. ``tried`` has a row for every network that was made on the way, where
    sizes or methods were searched: what it is, costs and lost. ``inputs`` says how data in memory
    were resized, normalized and augmented, and which part of the example was counted as one sample.
    ``findings`` say in sentences what went wrong in the training, and what to do about it.
    """

    model: str
    data: str
    method: dict[str, Any]
    budget: dict[str, Any]
    before: Side
    after: Side
    layers: tuple[LayerRow, ...]
    met: bool
    misses: tuple[str, ...]
    history: tuple[dict[str, Any], ...]
    seconds: dict[str, float]
    seed: int
    device: str
    versions: dict[str, str]
    export: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[Side, ...] = ()
    verdict: Verdict | None = None
    tried: tuple[dict[str, Any], ...] = ()
    fidelity: Fidelity | None = None
    task: str = ""
    metrics: dict[str, dict[str, str]] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    findings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Say in a line what came out; the whole report is in `to_json`."""
        return f"Report({self.model}: {self.before.params:,} -> {self.after.params:,} parameters)"

    def judged(self) -> dict[str, Any]:
        """Return the metric that judges, the network's score by it, its unit and better side.

        Keys are ``metric``, ``score`` (None where nothing was scored), ``unit`` and ``better``.
        """
        name = next(iter(self.after.metrics), "accuracy")
        told = {"unit": "share" if name == "accuracy" else "", "better": "higher"}
        told |= self.metrics.get(name, {})
        return {"metric": name, "score": self.after.metrics.get(name, self.after.accuracy), **told}

    def to_json(self) -> str:
        """Return the report as JSON; numbers that are not finite become null."""
        return json.dumps(_finite(asdict(self)), indent=1)

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``report.html``, ``report.json`` and ``report.md`` into a folder.

        Raises:
            OutputError: the folder cannot be made or written.
        """
        return shown("save_report")(self, folder)

    def _repr_html_(self) -> str:
        """Show the verdict and the numbers in a notebook."""
        return shown("notebook")(self)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report back.

        Raises:
            PliantError: the text is not a report.
        """
        try:
            found: Report = read(cls, plain(text), "report")
            return found
        except (ValueError, TypeError, RecursionError) as error:
            raise PliantError(
                f"The text must be a report as Report.to_json writes it, but is not "
                f"({type(error).__name__}: {error}); make it anew."
            ) from error


@dataclass(frozen=True)
class Result:
    """A compressed network, the edits that made it, and the report.

    Args:
        model: plain modules only; use it as any other.
        edits: rebuild its shape from the dense architecture.
        report: see ``Report``.
    """

    model: nn.Module
    edits: tuple[Edit, ...]
    report: Report

    def save(
        self, path: str | Path, *, source: str | None = None, encode: str | None = None
    ) -> Path:
        """Write the network to one ``.pliant`` file that ``pliant.load`` rebuilds.

        Args:
            path: where to; an earlier ``.pliant`` file is replaced, once the new one is complete,
                and a file of another kind is refused.
            source: what builds the dense network, for commands: a zoo name or module:callable.
            encode: store tensors coded where that is smaller, without loss: ``hac`` by Huffman,
                ``ans`` at the entropy, ``auto`` in whichever is smallest.

        Raises:
            OutputError: a file of another kind is there, or the file cannot be written.
        """
        return artifact.save(path, self.model, self.edits, source=source, encode=encode)

    def save_pretrained(
        self, folder: str | Path, *, source: str | None = None, onnx: Any = ()
    ) -> Path:
        """Write a folder to share, which ``pliant.load`` reads: network, report, model card.

        Args:
            folder: where to; files of the same names in it are replaced.
            source: what builds the dense network, for commands: a zoo name or module:callable.
            onnx: inputs of one forward call; with them the network is written as ONNX too.

        Raises:
            OutputError: the folder cannot be made or written.
        """
        return shown("save_pretrained")(self, folder, source=source, onnx=onnx)

    def push_to_hub(self, repo: str, folder: str | Path, **asked: Any) -> str:
        """Write a folder as `save_pretrained` does, upload it, and return its address.

        Args:
            repo: ``owner/name`` on the hub.
            folder: where the files are kept here.
            asked: ``token``, ``private``, ``endpoint`` and ``message`` of the upload; ``source``
                and ``onnx`` of `save_pretrained`.

        Raises:
            MissingExtraError: huggingface_hub is not installed.
            OutputError: the folder cannot be written, or the hub refuses.
        """
        return shown("push_to_hub")(self, repo, folder, **asked)

    def __repr__(self) -> str:
        """Say in a line what came out; the network is in ``model``."""
        return f"Result({len(self.edits)} edits, {self.report!r})"

    def _repr_html_(self) -> str:
        """Show the report in a notebook."""
        return self.report._repr_html_()


def shown(name: str) -> Callable[..., Any]:
    """Return a function of the room above that shows and shares results.

    It is looked up when it is called: results are plain data, and need no renderer to exist.
    """
    found: Callable[..., Any] = getattr(import_module("pliant.api.present"), name)
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
