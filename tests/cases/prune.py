"""Pruning methods: what leaves, worked out by hand; the limits of soft pruning, bit for bit."""

from pliant.testing import Case, toys

NONE = "no channels that can be removed"
REFUSES = {"shared": NONE, "single": NONE}
TOYS = tuple(name for name in toys.TOYS if name != "bare") + ("bare",)  # the last one is exported

CASES = [
    Case(
        "magnitude",
        toys=TOYS,
        refuses=REFUSES,
        variants=(
            'magnitude(norm="l1", scope="local")',
            "magnitude(rounds=3)",
        ),
    ),
    Case("random", toys=TOYS, refuses=REFUSES, variants=('random(scope="global", rounds=2)',)),
    Case(
        "asrfp",
        toys=TOYS,
        refuses=REFUSES,
        variants=(
            "asrfp(alpha=0.0, ramp=0.0)",
            "asrfp(epochs=4, search=0.5)",
            "asrfp(every=True, norms=True)",
        ),
    ),
]
