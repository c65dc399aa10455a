"""The site of the documentation: every page and every public name is on it, and it builds."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import pliant
from pliant import api, data, errors, latency, testing, zoo

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
REFERENCE = (DOCS / "reference.md").read_text(encoding="utf-8")
TARGETS = re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)
WITHIN = {"CONTROL", "IGNORED", "MOST_CLASSES", "TOYS", "Where", "as_target", "checks"}
"""Names that are public for the package's own rooms; a user meets them nowhere."""


def settings() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8")))


def pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [page for item in items for page in pages(item)]


def named(path: str) -> Any:
    """What a dotted path leads to, functions before modules of the same name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_page_is_in_the_navigation() -> None:
    listed = pages(settings()["nav"])
    assert len(listed) == len(set(listed))
    there = {path.name for path in DOCS.iterdir() if path.suffix in (".md", ".ipynb")}
    outside = {"benches.md", "changelog.md", "contributing.md"}
    assert set(listed) == there | outside | {"methods/README.md"}


def test_every_method_is_reached_from_the_overview() -> None:
    overview = (DOCS / "methods" / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((\w+\.md)\)", overview))
    assert linked == {path.name for path in (DOCS / "methods").glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("room", [pliant, api, data, latency, testing], ids=lambda r: r.__name__)
def test_every_public_name_has_a_section(room: Any) -> None:
    found = [named(target) for target in TARGETS]
    found.append(pliant.compress)  # which is documented where it is defined, under its name
    assert "heading: compress" in REFERENCE
    missing = [
        name
        for name in room.__all__
        if name not in WITHIN and not any(getattr(room, name) is each for each in found)
    ]
    assert not missing


def test_every_error_has_a_section() -> None:
    kinds = {n for n, v in vars(errors).items() if isinstance(v, type) and n.endswith("Error")}
    assert {f"pliant.errors.{name}" for name in kinds - {"PliantError"}} <= set(TARGETS)
    assert "pliant.PliantError" in TARGETS and zoo.build in [named(t) for t in TARGETS]


@pytest.mark.slow  # reads the whole package
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="MkDocs is not installed: pip install 'pliant[docs]'",
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Strict, so that every link and anchor leads somewhere."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0 and not done.stderr.strip(), done.stdout + done.stderr
    page = (tmp_path / "reference.html").read_text(encoding="utf-8")
    for target in TARGETS:
        assert f'id="{target}"' in page, f"{target} has no section"
    # What a browser would load from elsewhere; links to follow may lead anywhere.
    loads = r'<(?:script|img)[^>]* src="https?:|<link[^>]*rel="stylesheet"[^>]*href="https?:'
    assert not [p.name for p in tmp_path.rglob("*.html") if re.search(loads, p.read_text())]
