"""What is done to images before a network sees them: options that several commands have."""

from typing import Annotated, Any, Literal

import typer

Size = Annotated[
    str | None,
    typer.Option(
        help="resize images: 64,96 (height, width), or 224: the middle square of the shorter "
        "side (default: as they are)"
    ),
]
Normalize = Annotated[
    Literal["auto", "imagenet", "data", "none"],
    typer.Option(help="images by which mean and deviation; auto: imagenet in colour, else data"),
]
Augment = Annotated[
    Literal["auto", "none", "crop-flip"],
    typer.Option(help="training images; auto: crop-flip for 32x32 in colour, else none"),
]


def prepared(size: str | None, normalize: str, augment: str) -> dict[str, Any]:
    """Return the options for `pliant.data.load`, which refuses a size that is none."""
    sides = (size or "").replace("x", ",").split(",")
    numbers = tuple(int(side) if side.strip().isdigit() else 0 for side in sides)
    whole = None if size is None else numbers[0] if len(numbers) == 1 else numbers
    return {"size": whole, "normalize": normalize, "augment": augment}
