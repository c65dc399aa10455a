"""`recover`, `cluster`, `analyze`: what they refuse, what they pass on; and that checks bite."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import pliant
from pliant import registry
from pliant.cli import app
from pliant.data import Data
from pliant.errors import DataError, MethodError, ModelError
from pliant.registry import Paper, register
from pliant.result import Finding, Solution, Views
from pliant.testing import checks

PAPER = Paper("Title", "A. Author", "Venue", 2020, "https://example.org")
X = torch.arange(12.0).reshape(3, 4)


@pytest.fixture(autouse=True)
def own_list(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    registry.entries()
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    yield


@dataclass(frozen=True)
class Filled:
    """Puts the mean of what is known where nothing is known."""

    gain: float = 1.0  # on the mean

    def recover(self, x: Tensor, known: Tensor | None, generator: torch.Generator) -> Solution:
        mask = torch.ones_like(x, dtype=torch.bool) if known is None else known
        mean = x.sum() / mask.sum() * self.gain
        values = {"recovered": torch.where(mask, x, mean)}
        return Solution(values, ({"mean": float(mean)},), iterations=1)


@dataclass(frozen=True)
class Drawn:
    """Draws the labels."""

    def cluster(self, views: Views, groups: int, generator: torch.Generator) -> Solution:
        labels = torch.randint(groups, (len(views[0]),), generator=generator)
        return Solution({"labels": labels}, ({"drawn": len(labels)},), iterations=1)


@dataclass(frozen=True)
class Mean:
    """Averages the outputs."""

    def analyze(self, model: nn.Module, data: Data, generator: torch.Generator) -> Finding:
        flags = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            batches = [*data.batches("test" if data.has("test") else "val", 64)]
            with torch.no_grad():
                found = float(torch.cat([model(batch[0]) for batch in batches]).mean())
        except RuntimeError as error:
            raise ModelError("The model fails.") from error
        finally:
            for module, flag in flags:
                module.training = flag
        return Finding({"mean": found}, text=f"The mean is {found}.")


# ---------------------------------------------------------------- the verbs


def test_a_solver_gets_a_copy_of_its_own():
    @dataclass(frozen=True)
    class Doubled:
        def recover(self, x: Tensor, known: Tensor | None, generator: Any) -> Solution:
            return Solution({"recovered": x.mul_(2)})

    before = X.clone()
    assert torch.equal(pliant.recover(X, None, Doubled()).value, 2 * before)
    assert torch.equal(X, before)


def test_unknown_entries_reach_no_solver():
    known = X < 6
    found = pliant.recover(X.masked_fill(~known, math.nan), known, Filled())
    assert torch.equal(found.value, torch.where(known, X, 2.5))
    assert found.seed == 0 and found.method == {"name": "Filled", "options": {"gain": 1.0}}
    assert found.plain()["values"] == {"recovered": {"shape": [3, 4]}}


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, np.uint8])
def test_arrays_come_back_as_arrays_of_their_precision(kind: Any):
    found = pliant.recover(X.numpy().astype(kind), None, Filled()).value
    assert isinstance(found, np.ndarray) and found.dtype == (
        np.float32 if kind is np.float32 else float
    )


def test_a_mask_may_be_of_zeros_and_ones_and_nothing_else():
    assert pliant.recover(X, np.eye(3, 4), Filled()).converged
    with pytest.raises(DataError, match="must be a mask of the shape"):
        pliant.recover(X, X, Filled())


def test_what_ends_not_finite_is_refused():
    with pytest.raises(MethodError, match="not finite"):
        pliant.recover(X, X < 6, Filled(math.inf))


@pytest.mark.parametrize(
    "x",
    [X, X[..., None], [row[:, None] for row in X], [X, X[..., None]], [[r[:, None] for r in X]]],
)
def test_samples_come_in_many_forms(x: Any):
    found = pliant.cluster(x, 2, Drawn(), seed=3)
    assert found.value.shape == (3,)
    assert torch.equal(found.value, pliant.cluster(X, 2, Drawn(), seed=3).value)


def test_samples_of_other_forms_are_refused():
    for wrong in (X[0], X[None, None], [], [[X, X[:2]]]):
        with pytest.raises(DataError):
            pliant.cluster(wrong, 2, Drawn())
    for groups in (True, 0, 4, 2.0):
        with pytest.raises(DataError, match="from 1 to the 3 samples"):
            pliant.cluster(X, groups, Drawn())


def test_data_of_a_probe_come_in_many_forms():
    model = nn.Linear(4, 2)
    expected = pliant.analyze(model, X, Mean()).value
    labels = torch.zeros(3, dtype=torch.long)
    for data in (X.numpy(), (X, labels), [(X, labels)], Data(test=(X, labels))):
        assert pliant.analyze(model, data, Mean()).value == pytest.approx(expected)


# ---------------------------------------------------------------- which method belongs where


def test_a_method_of_another_verb_names_its_call():
    register("filled", paper=PAPER, verb="recover")(Filled)
    with pytest.raises(
        MethodError, match=r"cannot compress.*pliant.recover\(x, known, \"filled\"\)"
    ):
        pliant.compress(nn.Linear(2, 2), None, "filled")
    for call in (pliant.recover, pliant.cluster):
        with pytest.raises(MethodError, match=r"nrmf cannot .* pliant.compress\(model, data"):
            call(X, None if call is pliant.recover else 2, "nrmf")
    with pytest.raises(MethodError, match="cannot analyze"):
        pliant.analyze(nn.Linear(4, 2), X, "filled")
    with pytest.raises(MethodError, match="not list"):
        pliant.recover(X, None, ["filled"])


def test_a_class_must_do_what_its_verb_says():
    with pytest.raises(MethodError, match=r"must have a method cluster\(...\)"):
        register("filled", paper=PAPER, verb="cluster")(Filled)


# ---------------------------------------------------------------- the checks


def failing(method: Any) -> set[str]:
    found = set()
    for name, check in checks(method, tuple(pliant.testing.TOYS[n] for n in ("plain", "linear"))):
        try:
            check()
        except Exception:
            found.add(name)
    return found


def test_sound_methods_fail_nothing():
    register("filled", paper=PAPER, verb="recover")(Filled)
    for method in (Filled(), Drawn(), Mean()):
        assert failing(method) == set()


@dataclass(frozen=True)
class Bad:
    """Breaks one rule."""

    how: str = ""

    def recover(self, x: Tensor, known: Tensor | None, generator: torch.Generator) -> Solution:
        values = {"recovered": x.clone()}
        rows: tuple[dict[str, Any], ...] = ({"step": 1},)
        if self.how == "global randomness":
            np.random.rand()
        elif self.how == "forgets":
            _SEEN.append(0)
            values["recovered"] += len(_SEEN)
        elif self.how == "shape":
            values["recovered"] = x[:1]
        elif self.how == "rows":
            rows = ({"tensor": x},)
        elif self.how == "name":
            values = {"x": x}
        return Solution(values, rows, iterations=1)


_SEEN: list[int] = []
CAUGHT = {
    "global randomness": {"random_states_stay_untouched"},
    "forgets": {"same_seed_same_bytes"},
    "shape": {"solves_missing_entries", "solves_wrong_entries"},
    "rows": {"solves_missing_entries", "same_seed_same_bytes"},
    "name": {"solves_missing_entries"},
}


@pytest.mark.parametrize("how", CAUGHT)
def test_a_broken_rule_is_caught(how: str):
    assert CAUGHT[how] <= failing(Bad(how))


@dataclass(frozen=True)
class Careless:
    """Leaves the network in eval mode."""

    def analyze(self, model: nn.Module, data: Data, generator: torch.Generator) -> Finding:
        model.eval()
        return Finding({"value": 1.0}, text="Done.")


def test_a_network_left_in_another_mode_is_noticed():
    assert {"input_stays_untouched", "model_is_left_alone_after_an_error"} <= failing(Careless())


# ---------------------------------------------------------------- scikit-learn


@pytest.mark.slow  # 46 checks of scikit-learn
@pytest.mark.filterwarnings("ignore")
def test_the_estimator_keeps_the_conventions_of_scikit_learn():
    from sklearn.utils.estimator_checks import check_estimator

    from pliant.api.estimator import Clusterer

    zero = "whole numbers of the check make vectors of zeros, which span no line"
    known = {"check_estimators_dtypes": zero}
    rows = check_estimator(Clusterer(2, random_state=0), expected_failed_checks=known, on_fail=None)
    wrong = [
        f"{row['check_name']}: {row['exception']}" for row in rows if row["status"] == "failed"
    ]
    assert not wrong, wrong


def test_the_estimator_takes_sets_and_views():
    from pliant.api.estimator import Clusterer

    random = torch.Generator().manual_seed(0)
    views = [torch.randn(12, 6, 3, generator=random).numpy() for _ in range(2)]
    spec = "product_grassmann_lrr(size=2)"
    model = Clusterer(3, method=spec, random_state=0)
    assert model.fit_predict(views).shape == (12,) and model.n_iter_ == 1
    again = Clusterer(3, method=spec, random_state=0).fit(views)
    assert np.array_equal(model.labels_, again.labels_)
    assert Clusterer(3, method=spec).fit(list(views[0])).solution_.value.max() <= 2


# ---------------------------------------------------------------- the command line


def cli(*words: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def test_a_tensor_is_recovered_from_files(tmp_path: Path):
    register("filled", paper=PAPER, verb="recover")(Filled)
    x, mask, out = tmp_path / "x.npy", tmp_path / "mask.npy", tmp_path / "out.npz"
    np.save(x, X.numpy())
    np.save(mask, (X < 6).numpy())
    words = ("recover", x, "--known", mask, "--method", "filled", "--out", out)
    said = cli(*words).stdout
    assert "converged after 1 iterations" in said and "recovered: 3x4" in said
    assert np.load(out)["recovered"][2, 3] == 2.5
    plain = json.loads(cli(*words[:-2], "--json").stdout)
    assert plain["method"]["name"] == "filled" and plain["values"]["recovered"] == {"shape": [3, 4]}
    cli(*words[:-1], tmp_path / "out.npy")
    assert np.load(tmp_path / "out.npy").shape == (3, 4)


def test_samples_are_clustered_from_files(tmp_path: Path):
    register("drawn", paper=PAPER, verb="cluster")(Drawn)
    x = tmp_path / "x.npy"
    np.save(x, X.numpy())
    words = ("cluster", x, "--groups", 2, "--method", "drawn", "--seed", 3)
    assert "Samples in each group" in cli(*words).stdout
    plain = json.loads(cli(*words, "--view", x, "--json").stdout)
    assert plain["values"]["labels"] == {"shape": [3]} and plain["seed"] == 3


def test_a_network_is_analyzed_from_its_name(tmp_path: Path):
    out = tmp_path / "finding.json"
    words = ("analyze", "lenet5", "--data", "mnist5k", "--out", out)
    said = cli(*words).stdout
    assert "moves the mean of 10 outputs" in said and "sensitivity" in said
    plain = json.loads(cli(*words[:-2], "--json").stdout)
    saved = json.loads(out.read_text())
    assert plain["values"] == saved["values"] and len(saved["rows"]) == 10


def test_bad_files_and_places_are_refused_in_a_sentence(tmp_path: Path):
    text = tmp_path / "x.npy"
    text.write_text("no numbers")
    assert "must be an .npy file" in cli("recover", text, code=2).stderr
    words = ("recover", text, "--out", tmp_path / "none" / "x.npy")
    assert "folder that exists" in cli(*words, code=2).stderr
    assert (
        "cannot cluster"
        in cli("cluster", _saved(tmp_path), "--groups", 2, "--method", "nrmf", code=2).stderr
    )


def _saved(folder: Path) -> Path:
    np.save(folder / "numbers.npy", X.numpy())
    return folder / "numbers.npy"


def test_methods_are_listed_by_verb():
    names = {
        row["name"] for row in json.loads(cli("methods", "--verb", "recover", "--json").stdout)
    }
    assert "nonconvex_tsvd" in names and "nrmf" not in names
    said = cli("methods", "--verb", "cluster").stdout
    assert "cluster" in said and "compress" not in said
    assert "verb" in cli("methods", "--verb", "cure", code=2).stderr
