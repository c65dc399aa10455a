"""Runs what the pages show: every Python block, every `pliant` command; follows every link.

Blocks and commands of a page run in their order, in one namespace and one empty folder. A block
whose first line is a comment with a file name is also written to that file, for the commands
after it. Blocks marked ```text only show output.
"""

import doctest
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from pliant import entries, registry, zoo
from pliant.cli import app
from pliant.data import Data, readers
from pliant.latency.compare import interleaved
from pliant.registry import In
from pliant.registry.options import say
from pliant.testing import check_method

ROOT = Path(__file__).resolve().parents[1]
RUN = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*RUN, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "bench" / "README.md"]
SHELL = ("console", "sh")
CHECKED = ("make ",)  # commands that only have to exist
ELSEWHERE = ("pip install ", "git clone ", "cd ", "torchrun ", "python -m bench")


@dataclass(frozen=True)
class Step:
    """A block of Python or one command, and the line of the page where it begins."""

    kind: str
    line: int
    text: str


def blocks(page: Path) -> Iterator[Step]:
    """Yield the fenced blocks of a page, without their fences."""
    kind, start, lines = None, 0, list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"\s*```(.*)", line)
        if fence and kind is None:
            kind, start, lines = fence[1].strip(), number + 1, []
        elif fence and kind is not None:
            yield Step(kind, start, "\n".join(lines))
            kind = None
        else:
            lines.append(line)
    assert kind is None, f"{page.name}: the block at line {start} has no end"


def commands(step: Step) -> Iterator[Step]:
    """Yield the commands of a shell block: lines after a prompt, continued by a backslash."""
    text = ""
    for number, line in enumerate(step.text.splitlines(), step.line):
        if not text and not line.startswith("$ "):
            continue  # output
        text += line.removeprefix("$ ").removesuffix("\\")
        if not line.endswith("\\"):
            yield Step("command", number, text)
            text = ""


def steps(page: Path) -> Iterator[Step]:
    for block in blocks(page):
        if block.kind == "python":
            yield block
        elif block.kind in SHELL:
            yield from commands(block)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---------------------------------------------------------------- running


def few(whole: Callable[[], Data]) -> Data:
    return whole().subset(train=300, val=50, test=50)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, with what the pages take for granted: images and a trained network.

    The embedded digits are cut down to a few hundred: the pages must run, not learn.
    """
    before = set(sys.modules)
    furnish(tmp_path, monkeypatch)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def furnish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, whole: bool = False) -> None:
    """Put into a folder what the pages take for granted, and go there."""
    for split in ("train", "test"):
        for label in range(10):
            folder = tmp_path / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(3):
                shade = (25 * label, 80 * number, 0)
                Image.new("RGB", (32, 32), shade).save(folder / f"{number}.png")
    torch.manual_seed(0)
    save_file(zoo.build("resnet20").state_dict(), tmp_path / "resnet20.safetensors")
    for name, make in () if whole else readers._EMBEDDED.items():
        monkeypatch.setitem(readers._EMBEDDED, name, partial(few, make))
    monkeypatch.setitem(interleaved.__globals__, "ROUNDS", (9, 61))  # a fifth: times are only shown
    entries()  # what is found only once is found now
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    monkeypatch.chdir(tmp_path)


def module(page: Path, desk: Path) -> ModuleType:
    """An empty module for a page, whose source has the page's own line numbers."""
    lines = [""] * len(page.read_text(encoding="utf-8").splitlines())
    for step in steps(page):
        if step.kind == "python" and not step.text.lstrip().startswith(">>>"):
            lines[step.line - 1 : step.line - 1 + step.text.count("\n") + 1] = step.text.split("\n")
    source = desk / f"{page.stem.lower().replace('-', '_')}_page.py"
    source.write_text("\n".join(lines) + "\n")
    made = ModuleType(f"docs.{source.stem}")
    made.__file__ = str(source)
    sys.modules[made.__name__] = made  # where dataclasses look their annotations up
    return made


def run_python(step: Step, home: ModuleType, desk: Path) -> None:
    if step.text.lstrip().startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(
            step.text, vars(home), home.__name__, None, step.line
        )
        result = doctest.DocTestRunner(verbose=False).run(test, clear_globs=False)
        assert not result.failed, f"line {step.line}: {result.failed} examples fail"
        return
    if name := re.match(r"# (\w+\.py)\b", step.text):
        (desk / name[1]).write_text(step.text + "\n")
    code = compile("\n" * (step.line - 1) + step.text, str(home.__file__), "exec")
    exec(code, vars(home))


def run_command(step: Step) -> None:
    words = shlex.split(step.text, comments=True)
    if words[0] != "pliant":
        known = (*CHECKED, *ELSEWHERE)
        assert step.text.startswith(known), f"line {step.line}: {step.text} is not tested"
        return
    result = CliRunner().invoke(app, words[1:])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"line {step.line}: {step.text}\n{result.output}"


@pytest.mark.slow  # trainings, small ones, by four loops
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in RUN if any(steps(page))], ids=named)
def test_what_a_page_shows_runs(page: Path, desk: Path) -> None:
    home = module(page, desk)
    for step in steps(page):
        if step.kind == "python":
            run_python(step, home, desk)
        else:
            run_command(step)


# ---------------------------------------------------------------- the examples of the guide

GUIDE = ROOT / "docs" / "adding-a-method.md"
FILES = {
    re.search(r'^@register\(\s*"(\w+)"', block.text, re.M)[1]: block.text + "\n"  # type: ignore[index]
    for block in blocks(GUIDE)
    if block.kind == "python" and block.text.startswith('"""')
}
"""The examples that are whole files, by the names that they register."""


def test_every_family_has_an_example() -> None:
    heads = re.findall(r"^## (\w+)$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    families = {entry.family for entry in entries()}
    assert families <= set(heads)
    assert len(FILES) >= len(families - {"search"})  # which points to a file


@pytest.mark.parametrize("name", FILES)
def test_an_example_is_as_clean_as_a_method(name: str) -> None:
    for command in (["check"], ["format", "--check"]):
        path = f"src/pliant/methods/family/{name}.py"
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", path, "-"]
        done = subprocess.run(ruff, input=FILES[name], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow  # mypy reads what the examples import
@pytest.mark.timeout(600)  # where it has not read it before
def test_examples_have_sound_types(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    mypy = [sys.executable, "-m", "mypy", *(str(tmp_path / f"{name}.py") for name in FILES)]
    done = subprocess.run(mypy, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow  # all checks of a method
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_an_example_passes_every_check(name: str, desk: Path) -> None:
    (desk / f"{name}_example.py").write_text(FILES[name])
    source = ModuleType(f"docs.{name}_example")
    source.__file__ = str(desk / f"{name}_example.py")
    sys.modules[source.__name__] = source
    exec(compile(FILES[name], source.__file__, "exec"), vars(source))
    variants = ("lamp(rounds=3)",) if name == "lamp" else ()
    # How many inputs go through at once is a matter of memory: no result shows it.
    witnesses = {"batch": lambda: None} if name == "zero_share" else {}
    check_method(name, variants=variants, witnesses=witnesses)


def test_options_are_shown_as_the_guide_says() -> None:
    known: dict[str, Any] = {"Annotated": Annotated, "In": In, "Literal": Literal}
    rows = re.findall(
        r"^\| `\w+: (.+?) = .*?` \| .+? \| (.+?) \|$",
        GUIDE.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(rows) > 5
    for declared, shown in rows:
        assert say(eval(declared.replace("\\|", "|"), known)) == shown


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {
        word
        for page in RUN
        for step in steps(page)
        if step.text.startswith("make ")
        for word in shlex.split(step.text, comments=True)[1:]
        if "=" not in word
    }
    assert {"demo", "test"} <= asked <= targets


def test_every_block_has_a_known_kind() -> None:
    known = {"python", "text", *SHELL}
    wrong = [
        f"{named(page)}:{step.line} {step.kind!r}"
        for page in RUN
        for step in blocks(page)
        if step.kind not in known
    ]
    assert not wrong


# ---------------------------------------------------------------- links


def prose(page: Path) -> str:
    return re.sub(r"^\s*```.*?^\s*```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What a heading is called in an address, as GitHub does it."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [page for page in PAGES if page.exists()], ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)|<img [^>]*src=\"([^\"]+)\"", prose(page)):
        address = next(filter(None, target))
        if re.match(r"https?:|mailto:", address):
            continue
        path, _, anchor = address.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            wrong.append(address)
    assert not wrong, f"{named(page)} points to {wrong}"


# ---------------------------------------------------------------- what pages quote


def test_reasons_are_those_that_reports_give() -> None:
    """The table of reasons quotes the source, so it cannot fall behind unseen."""
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    table = page.partition("## Layers left alone")[2].partition("\n## ")[0]
    quoted = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    assert len(quoted) > 8
    for reason in quoted:
        parts = [part.strip() for part in reason.split("…")]
        assert all(part in source for part in parts), reason


@pytest.mark.parametrize("quoting", ["docs/measured.md", "docs/make-it-faster.md"])
def test_figures_are_those_of_the_benches(quoting: str) -> None:
    """Every row with decimals stands in the page that is generated from the results."""
    rows = [row for row in (ROOT / quoting).read_text().splitlines() if row.startswith("| ")]
    measured = [row for row in rows if re.search(r"\| \d+\.\d\d", row)]
    page = (ROOT / "bench" / "README.md").read_text().splitlines()
    assert measured and not [row for row in measured if row not in page]
