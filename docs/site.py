"""What MkDocs does beside: pages from outside of docs/, and links that lead to them."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "bench/README.md": "benches.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}

CALLED = {"pliant.api.network.once": "compress", "pliant.registry.build": "method"}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside of docs/."""
    for source, name in OUTSIDE.items():
        text = inward((ROOT / source).read_text(encoding="utf-8"), source)
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links that leave docs/ to the copies within."""
    up = "../" * page.file.src_uri.count("/")
    for source, name in OUTSIDE.items():
        markdown = markdown.replace(f"]({up}../{source}", f"]({up}{name}")
    return markdown


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Call two functions as users do, and not as they are called where they are defined."""
    if page.file.src_uri == "reference.md":
        for path, name in CALLED.items():
            before, mark, after = html.partition(f'id="{path}"')
            own = f'<span class="nf">{path.rpartition(".")[2]}</span>'
            html = before + mark + after.replace(own, f'<span class="nf">{name}</span>', 1)
    return html


def inward(text: str, source: str) -> str:
    """Turn the links of a page outside of docs/ into those of a page within."""
    folder = Path(source).parent

    def led(found: re.Match[str]) -> str:
        path, anchor = found[1], found[2] or ""
        target = (ROOT / folder / path).resolve().relative_to(ROOT).as_posix()
        if target in OUTSIDE:
            return f"]({OUTSIDE[target]}{anchor})"
        if target.startswith("docs/"):
            return f"]({target.removeprefix('docs/')}{anchor})"
        return found[0]  # of the repository, not of the site: the build names it

    return re.sub(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)", led, text)
