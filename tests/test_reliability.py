"""What campaigns found is what the page says, and covers all methods."""

from pathlib import Path

from tests.reliability import kills, page, record


def test_the_page_says_what_was_recorded() -> None:
    text = page.PATH.read_text(encoding="utf-8")
    again = "run python -m tests.reliability.page"
    assert text == page.replaced(text, record.read()), again


def test_what_was_recorded_holds_no_surprise() -> None:
    """But for what the page says of commands, with its reason."""
    for what, entries in record.read().items():
        for entry in entries:
            rows = entry["found"].values() if what in ("kills", "commands") else [entry["found"]]
            for key in ("raw", "slow", "opened", "taken", "untrue", "different", "failed"):
                assert not any(row.get(key) for row in rows), f"{what}: {key}"


def test_killed_methods_are_registered() -> None:
    for entry in record.read().get("kills", []):
        assert set(entry["found"]) <= set(kills.methods())


def test_an_entry_takes_the_place_of_the_same_one(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for refused in (1, 2):
        record.write("flips", 3, 10, {"refused": refused}, 1.0, path)
    record.write("flips", 4, 10, {"refused": 5}, 1.0, path)
    assert [row["found"]["refused"] for row in record.read(path)["flips"]] == [2, 5]
    assert record.find("flips", 4, 10, path) and record.find("flips", 5, 10, path) is None
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert record.total([{"a": 1, "slowest": 0.5}, {"a": 2, "slowest": 0.2}]) == {
        "a": 3, "slowest": 0.5,
    }  # fmt: skip
