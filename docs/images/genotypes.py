"""Draws the cells that the search bench found: python docs/images/genotypes.py."""

import json
from pathlib import Path

from pliant.nn.genotype import Genotype
from pliant.render.genotype import genotype_svg

HERE = Path(__file__).resolve().parent
RESULT = HERE.parents[1] / "bench" / "results" / "edarts.json"
TITLES = {"edarts": "eDARTS", "darts": "First-order DARTS"}


def main() -> None:
    """Write the cell of the first seed of each search beside this file."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    for cell in result["cells"]:
        name, seed = cell["key"]["rival"], cell["key"].get("seed")
        if name in TITLES and seed == result["settings"]["seeds"][0]:
            found = Genotype.from_plain(cell["values"]["genotype"])
            heading = f"{TITLES[name]}, seed {seed}"
            (HERE / f"genotype-{name}.svg").write_text(genotype_svg(found, heading))


if __name__ == "__main__":
    main()
