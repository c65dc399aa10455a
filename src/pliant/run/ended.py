"""What a training that ended before its method did is told."""

from collections.abc import Sequence


def unended(open_: Sequence[str], late: Sequence[str], step: int, steps: int) -> str:
    """Say what was still to be done, or was done too late to be trained; "" if nothing was.

    Args:
        open_: what the method had not done yet, in words.
        late: layers that were changed when the training was over.
        step: optimizer steps that were taken.
        steps: those that the run was started for.
    """
    found = list(open_)
    if late:
        more = f" and {len(late) - 1} more layers were" if late[1:] else " was"
        found.insert(0, f"{late[0]}{more} changed when it was over and never trained since")
    if not found:
        return ""
    return (
        f"The run was started for {steps} steps of the optimizer, but the training ended "
        f"after {step}: {'; '.join(found)}. Gradients that accumulate over several "
        "batches make one step: start the run for the steps that are taken, or, if it was "
        "ended early on purpose, take the result by finish(strict=False)."
    )
