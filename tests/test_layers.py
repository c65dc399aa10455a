"""The import rules see every module: the checker passes over folders without __init__.py."""

from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "pliant"


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for path in SOURCE.rglob("*.py")}
    folders |= {parent for folder in folders for parent in folder.parents}
    inside = sorted(folder for folder in folders if folder.is_relative_to(SOURCE))
    missing = [str(folder) for folder in inside if not (folder / "__init__.py").exists()]
    assert not missing, f"add an empty __init__.py to {', '.join(missing)}"
