"""When units leave: at once, in rounds while the network trains, or when training is over."""

from __future__ import annotations

from dataclasses import dataclass, replace

MOST_ROUNDS = 8  # each adds edits to the file


@dataclass(frozen=True)
class Schedule:
    """A number of cuts, spread evenly over a part of the training.

    One round is one-shot pruning, several are iterative pruning; many rounds over most of the
    training make it gradual, and a start of 1 leaves it to the end.

    Args:
        rounds: number of cuts, each an equal part of the way; between them the network trains.
        start: share of the training before the first cut; at 1 the run makes it when it ends.
        end: share of the training over which the cuts are spread, counted from its beginning.

    >>> [Schedule(2, 0.2, 0.8).due(step, 10) for step in range(0, 10, 2)]
    [0, 1, 1, 2, 2]
    """

    rounds: int = 1
    start: float = 0.0
    end: float = 0.5

    def due(self, step: int, steps: int) -> int:
        """Return how many cuts are to be made by this step, of so many in all.

        Without training all are, but for those that wait for the end of the run. Cuts that start
        after the end are all made at the start.
        """
        if self.start == 1 or step < round(self.start * steps):
            return 0
        if not steps:
            return self.rounds
        progress, width = max(0.0, step / steps - self.start), self.end - self.start
        if progress >= width:
            return self.rounds
        return min(self.rounds, 1 + int(progress * self.rounds / width + 1e-9))

    def by(self, share: float) -> Schedule:
        """Return this schedule, its cuts nearer together where the last would come after a share.

        >>> Schedule(2, 0.0, 0.9).by(0.25).end, Schedule(2, 0.0, 0.3).by(0.25).end
        (0.5, 0.3)
        """
        spaces, width = self.rounds - 1, self.end - self.start
        if not spaces or self.start + width * spaces / self.rounds <= share:
            return self
        return replace(self, end=self.start + (share - self.start) * self.rounds / spaces)

    def part(self, done: int, then: int) -> float:
        """Return the part of the remaining way that leads from so many cuts to so many."""
        return (then - done) / (self.rounds - done)

    def ratio(self, whole: float, done: int, then: int) -> float:
        """Return the share of the units now left that leaves between so many cuts and so many.

        Args:
            whole: the share of all units that leaves with all cuts.
            done: cuts made.
            then: cuts made afterwards.
        """
        left, after = (1 - whole * cuts / self.rounds for cuts in (done, then))
        return 1 - after / left
