"""Every registered method through the same checks, and a case and a page for each of them."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pliant.registry import entries
from pliant.render import pages
from pliant.testing import check_method, checks_for
from pliant.testing.toys import TOYS
from tests.cases import CASES

DOCS = Path(__file__).resolve().parents[1] / "docs" / "methods"


def every_check() -> Iterator[Any]:
    for case in CASES.values():
        for name, check in checks_for(case):
            marks = [pytest.mark.slow] if name == "exports_to_onnx" else []  # onnxruntime starts
            if name in case.fails:
                marks.append(pytest.mark.xfail(reason=case.fails[name], strict=True))
            yield pytest.param(check, id=f"{case.method}-{name}", marks=marks)
        # What others see, who know no case; where it adds nothing these are the same checks again.
        if case.refuses or case.budget or {*case.toys} != {*TOYS}:
            outside = partial(check_method, case.spec or case.method, fails=case.fails)
            yield pytest.param(outside, id=f"{case.method}-passes_without_its_case")


@pytest.mark.parametrize("check", list(every_check()))
def test_conformance(check: Callable[[], None]) -> None:
    check()


def test_every_method_has_a_case_and_a_page() -> None:
    names = {entry.name for entry in entries()}
    assert set(CASES) == names
    assert {path.stem for path in DOCS.glob("*.md")} == names | {"README"}


def test_known_failures_name_checks() -> None:
    for case in CASES.values():
        assert set(case.fails) <= {name for name, _ in checks_for(case)}


def test_pages_are_those_of_the_classes() -> None:
    again = "python -m pliant.render.pages"
    for entry in entries():
        text = (DOCS / f"{entry.name}.md").read_text(encoding="utf-8")
        assert text == pages.page(entry), f"{entry.name}.md is stale: run {again}"
    overview = (DOCS / "README.md").read_text(encoding="utf-8")
    assert overview == pages.overview(entries()), f"README.md is stale: run {again}"
