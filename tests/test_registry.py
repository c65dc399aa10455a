"""Methods are found by name, built from text that is never evaluated, and refused in words."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
import torch
from torch import nn

import pliant
from pliant import registry
from pliant.compose import Together
from pliant.errors import MethodError
from pliant.method import Method
from pliant.registry import (
    In,
    Paper,
    build,
    check_options,
    construct,
    entries,
    entry_of,
    get,
    plain,
    register,
)
from pliant.registry.options import rows, say

if TYPE_CHECKING:
    from decimal import Decimal

PAPER = Paper("Title", "A. Author", "Venue", 2020)


@pytest.fixture(autouse=True)
def own_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone afterwards."""
    entries()
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


@dataclass(frozen=True)
class Sample(Method):
    """Does nothing, but has options of every kind.

    More words.
    """

    strength: float = 0.1
    count: int = 3
    bound: float | None = None
    form: Literal["auto", "spatial"] = "auto"
    only: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    fast: bool = True
    anything: Any = None
    table: dict[str, int] = field(default_factory=dict)


def sample() -> None:
    register("sample", paper=PAPER, saves="params macs")(Sample)


# ------------------------------------------------------------------ the list


def test_an_entry_says_what_a_method_is():
    sample()
    entry = get("sample")
    assert entry.kind is Sample and entry.paper is PAPER
    assert entry.saves == ("params", "macs") and entry.verb == "compress"
    assert entry.summary == "Does nothing, but has options of every kind."
    assert entry_of(Sample()) is entry and entry_of(Method()) is None
    assert entry in entries(family=entry.family) and entry not in entries(verb="recover")


def test_the_family_is_the_folder():
    assert get("nrmf").family == "lowrank"
    assert [e.name for e in entries(family="lowrank")] == sorted(
        e.name for e in entries() if e.family == "lowrank"
    )
    with pytest.raises(MethodError, match="families are .*lowrank"):
        entries(family="lowrnak")


def test_unknown_names_get_the_nearest():
    with pytest.raises(MethodError, match="no method 'nrfm': did you mean nrmf"):
        get("nrfm")
    with pytest.raises(MethodError, match="choose from .*energy"):
        get("zzzzzz")


def test_a_name_is_taken_once():
    sample()
    sample()  # the same class again: a reloaded module

    @dataclass(frozen=True)
    class Other(Method):
        """Another."""

    with pytest.raises(MethodError, match="'sample' is taken by .*Sample: choose another"):
        register("sample", paper=PAPER)(Other)
    imposter = dataclass(frozen=True)(type("Sample", (Method,), {"__doc__": "Another."}))
    imposter.__module__ = "elsewhere.methods"
    with pytest.raises(MethodError, match="taken"):
        register("sample", paper=PAPER)(imposter)


@pytest.mark.parametrize("name", ["tucker-2", "2nd", "", "lambda", "a b"])
def test_names_can_be_written_in_a_spec(name):
    with pytest.raises(MethodError, match="identifier"):
        register(name, paper=PAPER)


def test_only_frozen_dataclasses_and_known_axes():
    @dataclass
    class Thawed:
        """Not frozen."""

    class Plain:
        """No dataclass."""

    for kind in (Thawed, Plain):
        with pytest.raises(MethodError, match=r"@dataclass\(frozen=True\)"):
            register("thawed", paper=PAPER)(kind)
    with pytest.raises(MethodError, match="cannot save energy: the axes are params"):
        register("green", paper=PAPER, saves="params energy")


# ------------------------------------------------------------------ from text


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        ("sample", Sample()),
        (" sample ( ) ", Sample()),
        ("sample(strength=1e-3, count=-2)", Sample(strength=1e-3, count=-2)),
        ("sample(strength=1)", Sample(strength=1)),
        ("sample(bound=0.5, form='spatial')", Sample(bound=0.5, form="spatial")),
        ("sample(bound=None)", Sample()),
        ("sample(only=['a', 'b'])", Sample(only=("a", "b"))),
        ("sample(only=('a',), fast=False)", Sample(only=("a",), fast=False)),
        ("sample(pair=[2, 3])", Sample(pair=(2, 3))),
        ("sample(anything='x', table={'a': 1})", Sample(anything="x", table={"a": 1})),
    ],
)
def test_a_spec_is_read(spec, method):
    sample()
    assert build(spec) == method


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "sample(",
        "sample(0.1)",
        "sample(strength)",
        "sample.strength",
        "sample(strength=2 * 3)",
        "sample(strength=__import__('os').getpid())",
        "sample(strength=open('/etc/passwd'))",
        "sample(strength=1, strength=2)",
        "sample()()",
        "sample(table={[]: 1})",
        "sample; sample",
        "lambda: sample",
        "sample\0",
        "sample(only=" + "(" * 300 + ")" * 300 + ")",
    ],
)
def test_nothing_else_is_read(spec):
    sample()
    with pytest.raises(MethodError, match="Cannot read the method"):
        build(spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strenght": 1.0}, "no option 'strenght': did you mean strength"),
        ({"zzz": 1.0}, "no option 'zzz': choose from"),
        ({"strength": "0.1"}, "strength must be float, not '0.1'"),
        ({"strength": True}, "strength must be float"),
        ({"strength": None}, "strength must be float"),
        ({"count": 2.0}, "count must be int"),
        ({"count": True}, "count must be int"),
        ({"bound": "x"}, "bound must be float or None"),
        ({"form": "best"}, 'form must be one of "auto", "spatial"'),
        ({"only": "conv1"}, "only must be a list of str"),
        ({"only": ("conv1", 3)}, "only must be a list of str"),
        ({"pair": (1, 2, 3)}, "pair must be"),
        ({"pair": (1.5, 2)}, "pair must be"),
        ({"fast": 1}, "fast must be bool"),
        ({"table": 3}, "table must be"),
    ],
)
def test_wrong_options_are_named(options, message):
    sample()
    with pytest.raises(MethodError) as error:
        construct("sample", options)
    assert message in str(error.value) and "sample" in str(error.value)


def test_unknown_keywords_by_splat_are_refused():
    sample()
    with pytest.raises(MethodError, match=r"no option '\*\*'"):
        build("sample(**{'strength': 1.0})")


def test_methods_become_plain_data_and_come_back():
    sample()
    method = Sample(only=("a",), bound=0.5)
    data = plain(method)
    assert data["name"] == "sample" and data["options"]["only"] == ("a",)
    assert construct(data["name"], {**data["options"], "only": ["a"]}) == method


def test_an_unregistered_method_goes_by_its_class():
    assert plain(Sample(count=4))["name"] == "Sample"
    assert plain(Sample(count=4))["options"]["count"] == 4


def test_annotations_in_words():
    assert say(float | None) == "float or None"
    assert say(tuple[str, ...]) == "a list of str"
    assert say(tuple[int, float]) == "(int, float)"
    assert say(Literal["a", 1]) == 'one of "a", 1'
    assert say(Literal[0] | Annotated[int, In(2, 8)]) == "0 or int in 2..8"
    assert say(Annotated[float, In(0, 1, "low")] | None) == "float above 0 and at most 1 or None"


# ------------------------------------------------------------------ ranges


@dataclass(frozen=True)
class Ranged(Method):
    """Has options with ranges of every kind."""

    share: Annotated[float, In(0, 1)] = 0.5  # closed
    below: Annotated[float, In(0, 1, "high")] = 0.5  # one end is open
    bound: Annotated[float, In(0, open="low")] | None = None  # no upper end, or nothing
    # a comment of its own,
    # on two lines
    bits: Literal[0] | Annotated[int, In(2, 8)] = 4
    each: tuple[Annotated[int, In(1)], ...] = ()


OUT_OF_RANGE = [
    ({"share": -0.1}, "share must be float in 0..1, not -0.1"),
    ({"share": 1.1}, "share must be float in 0..1, not 1.1"),
    ({"share": float("nan")}, "share must be float in 0..1, not nan"),
    ({"below": 1.0}, "below must be float of at least 0 and below 1, not 1.0"),
    ({"bound": 0.0}, "bound must be float above 0 or None, not 0.0"),
    ({"bound": float("inf")}, "bound must be float above 0 or None, not inf"),
    ({"bits": 1}, "bits must be 0 or int in 2..8, not 1"),
    ({"bits": 4.0}, "bits must be 0 or int in 2..8, not 4.0"),
    ({"each": (1, 0)}, "each must be a list of int of at least 1, not (1, 0)"),
]


def test_values_within_their_range_are_taken():
    register("ranged", paper=PAPER)(Ranged)
    for options in (
        *({}, {"share": 0}, {"share": 1}, {"below": 0.0}, {"bound": 1e-9}, {"bound": 1e30}),
        *({"bits": 0}, {"bits": 2}, {"bits": 8}, {"each": [1, 2]}),
    ):
        assert construct("ranged", options)


@pytest.mark.parametrize(("options", "message"), OUT_OF_RANGE)
def test_values_out_of_range_are_refused_wherever_they_come_in(options, message):
    register("ranged", paper=PAPER)(Ranged)
    method, model = Ranged(**options), nn.Linear(3, 2)
    for use in (
        lambda: construct("ranged", options),
        lambda: pliant.start(model, method, example=(torch.zeros(1, 3),)),
        lambda: pliant.compress(model, None, method, example=torch.zeros(1, 3)),
        lambda: pliant.chain("energy", method),
        lambda: check_options(Together((Method(), method))),
    ):
        with pytest.raises(MethodError) as error:
            use()
        assert str(error.value) == f"ranged: {message}."


def test_solvers_and_probes_are_checked_too():
    @dataclass(frozen=True)
    class Mean:
        """Fills in a constant."""

        value: Annotated[float, In(0, 1)] = 0.5

        def recover(self, x, known, generator):
            """Never called."""
            raise AssertionError

    with pytest.raises(MethodError, match=r"Mean: value must be float in 0\.\.1, not 2"):
        pliant.recover(torch.ones(2, 2), None, Mean(2))


def test_options_are_shown_with_ranges_and_comments():
    shown = {row.name: (row.type, row.text) for row in rows(Ranged)}
    assert shown["share"] == ("float in 0..1", "closed")
    assert shown["bits"] == ("0 or int in 2..8", "a comment of its own, on two lines")
    assert shown["each"][1] == ""


def test_annotations_for_type_checkers_only_do_no_harm():
    @dataclass(frozen=True)
    class Lazy(Method):
        """Is not registered."""

        exact: "Decimal | None" = None

    check_options(Lazy())


# ------------------------------------------------------------------ discovery


def package(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of methods with one module of this text, in the place of pliant.methods."""
    import pliant.methods

    (folder / "toyfamily").mkdir()
    (folder / "toyfamily" / "__init__.py").touch()
    (folder / "toyfamily" / "toymethod.py").write_text(text)
    monkeypatch.setattr(pliant.methods, "__path__", [str(folder)])
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    return folder


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch):
    """Discovery runs anew in the test, and is as before after it."""
    registry._discover.cache_clear()
    yield
    registry._discover.cache_clear()
    for name in ("toyfamily", "toyfamily.toymethod"):
        sys.modules.pop(f"pliant.methods.{name}", None)


METHOD = '''
from dataclasses import dataclass
from pliant.method import Method
from pliant.registry import Paper, register

@register("toymethod", paper=Paper("T", "A", "V", 2020))
@dataclass(frozen=True)
class Toy(Method):
    """Does nothing."""
'''


def test_a_file_is_all_it_takes(tmp_path, monkeypatch, forget):
    package(tmp_path, METHOD, monkeypatch)
    assert get("toymethod").family == "toyfamily"


@pytest.mark.parametrize(
    ("text", "error"),
    [("import no_such_package", ModuleNotFoundError), ("1 / 0", ZeroDivisionError)],
)
def test_a_module_that_fails_to_import_raises(text, error, tmp_path, monkeypatch, forget):
    package(tmp_path, text, monkeypatch)
    for _ in range(2):  # not only the first time
        with pytest.raises(error):
            entries()


def test_other_packages_bring_methods(tmp_path, monkeypatch, forget):
    loaded = []
    point = SimpleNamespace(name="mine", value="my_package.mine", load=lambda: loaded.append(1))
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    entries()
    entries()
    assert loaded == [1]


def test_a_broken_package_is_named(monkeypatch, forget):
    def load() -> None:
        raise ImportError("no module named gone")

    point = SimpleNamespace(name="mine", value="my_package.mine", load=load)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.raises(MethodError, match="my_package.mine cannot be imported .*gone"):
        entries()


# ------------------------------------------------------------------ options renamed and fixed


@dataclass(frozen=True)
class Wide(Method):
    """Has two options."""

    ratio: float = 0.5  # what leaves
    scope: str = "global"  # where


def test_an_option_goes_by_its_old_name_with_a_warning():
    register("wide", paper=PAPER, renamed={"share": "ratio"})(Wide)
    with pytest.warns(DeprecationWarning, match="option share is now called ratio") as said:
        assert build("wide(share=0.25)") == Wide(0.25)
    assert said[0].filename == __file__  # whoever wrote it is shown the line
    assert plain(Wide(0.25))["options"] == {"ratio": 0.25, "scope": "global"}
    with pytest.raises(MethodError, match="share is now called ratio: give one"):
        construct("wide", {"share": 0.1, "ratio": 0.2})


def test_an_option_that_a_class_fixes_is_none_of_its_options():
    @dataclass(frozen=True)
    class Narrow(Wide):
        """Has one option."""

        scope: str = field(default="local", init=False)

    register("narrow", paper=PAPER)(Narrow)
    assert plain(build("narrow(ratio=0.1)"))["options"] == {"ratio": 0.1}
    assert [row.name for row in registry.options(get("narrow"))] == ["ratio"]
    assert [row.text for row in registry.options(get("narrow"))] == ["what leaves"]  # as inherited
    with pytest.raises(MethodError, match="has no option 'scope'"):
        build("narrow(scope='global')")
