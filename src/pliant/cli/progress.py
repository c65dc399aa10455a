"""Bars for what takes long: one for each phase, with the time left."""

from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pliant.cli.console import err
from pliant.render import words

SAID = {
    "prepare": "looking at the network",
    "control": "training the dense control",
    "search": "training with the method",
    "train": "training",
    "finetune": "fine-tuning",
    "factorize": "factorizing",
    "measure": "measuring",
    "sizes": "measuring every size",
    "onnx": "exporting to ONNX",
    "write": "writing",
}


class Bars:
    """Shows what `compress` is doing: bars in a terminal, elsewhere a line for each epoch."""

    def __init__(self, *, quiet: bool) -> None:
        console = err()
        self.lines = None if quiet or console.is_terminal else console
        self.last: dict[str, Any] = {}  # the last step of the epoch that is going on
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[what]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self.tasks: dict[str, Any] = {}
        self.now = ""

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._end()
        self._line()
        self.progress.stop()

    def watch(self, row: dict[str, Any]) -> None:
        """Take a row of `compress`: a phase, and a step of it if it has steps."""
        phase = str(row["phase"])
        if phase != self.now:
            self._begin(phase)
        if "step" in row:
            if self.last and self.last["epoch"] != row["epoch"]:
                self._line()
            self.last = row
            self.progress.update(
                self.tasks[phase],
                completed=row["step"],
                total=row["steps"],
                what=f"epoch {row['epoch']}/{row['epochs']:g} loss {row['loss']:.3f}",
                left=f"{words.seconds(row['seconds_left'])} left",
            )

    def count(self, row: dict[str, Any]) -> None:
        """Take a row that counts: how many are done of how many, and the seconds left."""
        phase = str(row["phase"])
        if phase != self.now:
            self._begin(phase)
        left = f"{words.seconds(row['seconds_left'])} left"
        done, total = row["step"], row["steps"]
        told = {"completed": done, "total": total, "what": f"{done} of {total}", "left": left}
        self.progress.update(self.tasks[phase], **told)
        if self.lines is not None:
            self.lines.print(f"{done} of {total}, {left}", markup=False)

    def _line(self) -> None:
        """Write down the epoch that has ended, where nobody sees bars."""
        row, self.last = self.last, {}
        if row and self.lines is not None:
            left = words.seconds(row["seconds_left"])
            self.lines.print(
                f"{SAID.get(self.now, self.now)}: epoch {row['epoch']}/{row['epochs']:g}, step "
                f"{row['step']}/{row['steps']}, loss {row['loss']:.3f}, {left} left",
                soft_wrap=True,
                markup=False,
            )

    def _begin(self, phase: str) -> None:
        self._line()
        self._end()
        self.now = phase
        if self.lines is not None:
            self.lines.print(SAID.get(phase, phase), soft_wrap=True, markup=False)
        if phase not in self.tasks:
            said = SAID.get(phase, phase)
            self.tasks[phase] = self.progress.add_task(said, total=None, what="", left="")
        self.progress.update(self.tasks[phase], visible=True)

    def _end(self) -> None:
        """Fill the bar of a phase that is over; one without steps disappears."""
        if not self.now:
            return
        task = self.progress.tasks[self.tasks[self.now]]
        if task.total is None:
            self.progress.update(task.id, visible=False)
        else:
            self.progress.update(task.id, completed=task.total, left="")
            self.progress.stop_task(task.id)
        self.now = ""
