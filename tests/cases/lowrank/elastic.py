"""Elastic networks: nested ranks, what a step looks at, and a size picked from the file."""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pliant import compress, load
from pliant.budget import Budget
from pliant.compose import chain
from pliant.cost import Cost, cost, layer_costs
from pliant.data import Data, Train
from pliant.drivers.loop import evaluate
from pliant.edits import Edit, Factor, Nest, Settle, replay
from pliant.edits.nest import cut
from pliant.edits.settle import MEANS
from pliant.edits.sizes import choose, cuttable, of_size, shrink, weights_at
from pliant.errors import BudgetError, EditError, MethodError
from pliant.families.lowrank.factorize import Form, look, subjects
from pliant.families.lowrank.nested import nested, ordered
from pliant.families.lowrank.precision import Precision
from pliant.latency import Target
from pliant.math.divergence import divergence
from pliant.math.forms import compose
from pliant.math.metric import Metric
from pliant.method import Method
from pliant.methods.lowrank.elastic import Elastic
from pliant.result import Report
from pliant.run import Run, start
from pliant.testing import Case
from tests.cases.witness import on_many
from tests.metrics import smooth


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def images(count: int = 64) -> Data:
    noise = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 4, (count,), generator=noise)
    return Data((torch.randn(count, 3, 8, 8, generator=noise), labels), classes=4)


def first_components_are_the_best_of_their_rank() -> None:
    """diag(3, 2, 1) in two factors, cut to r: the r largest are left, turned or not."""
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    for metric in (None, Metric(torch.eye(3))):
        first, last = nested(weight, "svd", [(3,)], metric)
        for rank, kept in ((1, [3.0, 0, 0]), (2, [3.0, 2.0, 0]), (3, [3.0, 2.0, 1.0])):
            one, two = cut((first, last), (rank,))
            assert torch.allclose(two @ one, torch.diag(torch.tensor(kept)), atol=1e-5)


def order_is_that_of_the_outputs() -> None:
    """A direction that is hardly read comes last, however large its weights."""
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    metric = Metric(torch.diag(torch.tensor([1e-3, 1.0, 1.0])))
    one, two = cut(ordered((weight, torch.eye(3)), metric), (2,))
    assert torch.allclose((two @ one).diag(), torch.tensor([0.0, 2.0, 1.0]), atol=1e-3)


def sharing_factors_costs_next_to_nothing() -> None:
    """All sizes together lose about what their own factors would; cuts of the largest lose more."""
    noise = torch.Generator().manual_seed(0)
    weight, metric = torch.randn(6, 5, 3, 3, generator=noise), smooth(6, 5)

    def loss(kernels: Sequence[Tensor], form: str) -> float:
        return metric.energy(weight - compose(kernels, form)) / metric.energy(weight)

    for form, ranks in (
        ("spatial", [(10,), (6,), (3,)]),
        ("tucker2", [(5, 6), (4, 3), (2, 3), (2, 2)]),  # once only one side grows
    ):
        found = nested(weight, form, ranks, metric)
        apart = [loss(metric.decompose(weight, form, rank), form) for rank in ranks]
        largest = metric.decompose(weight, form, ranks[0])
        through = [loss(cut(largest, rank), form) for rank in ranks]
        losses = [loss(cut(found, rank), form) for rank in ranks]
        assert losses == sorted(losses) and losses[0] < losses[-1]
        assert sum(losses) < 1.05 * sum(apart) < 0.8 * sum(through)


def forms_are_those_that_suit_all_sizes() -> None:
    """All sizes together lose no more than with any one form everywhere."""
    run = start(network(), Method(), data=images())
    layers = subjects(run)
    seen = look(run, layers, 64)

    def lost(form: Form, smallest: float) -> float:
        elastic = Elastic(sizes=5, smallest=smallest, form=form, samples=64)
        edits = start(network(), elastic, Budget(params=0.7), data=images()).edits
        total = 0.0
        for edit in edits:
            for size in range(5 if isinstance(edit, Nest) else 0):
                near = compose(cut(edit.kernels, edit.at(size)), edit.form)
                total += seen[edit.layer].energy(layers[edit.layer].weight.detach() - near)
        return total

    for smallest in (0.5, 0.2):
        alone = [lost(form, smallest) for form in ("tucker2", "input", "output", "spatial")]
        assert lost("auto", smallest) < 1.03 * min(alone) < 0.8 * max(alone)


def the_smallest_size_may_need_other_forms() -> None:
    """At the lowest ranks of all not every form is in reach: those of a smaller size are taken."""
    elastic = Elastic(sizes=4, smallest=0.01, samples=0)
    run = start(network(), elastic, Budget(params=0.5), data=images())
    found = [edit for edit in run.edits if isinstance(edit, Nest)]
    assert found and all(set(edit.at(3)) == {1} for edit in found)


def every_size_is_a_part_of_the_next_larger_one() -> None:
    """No rank rises, parameters fall, and what a cut keeps are the first rows of the larger."""
    elastic = Elastic(sizes=6, smallest=0.2, samples=16)
    run = start(network(), elastic, Budget(params=0.7), data=images())
    for edit in run.edits:
        ranks = [edit.at(size) for size in range(6)] if isinstance(edit, Nest) else []
        for more, less in pairwise(ranks):
            assert all(1 <= a <= b for a, b in zip(less, more, strict=True))
    found = [of_size(run.model, run.edits, size) for size in range(6)]
    counts = [cost(each, run.example).params for each in found]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    for larger, smaller in pairwise(found):
        for name, part in smaller.named_parameters():
            whole = larger.get_parameter(name)
            assert torch.equal(whole[tuple(slice(0, size) for size in part.shape)], part)


def sizes_must_fall() -> None:
    model = network()
    for sizes in ((2, 3), (), (1, 0)):
        try:
            replay(model, [Nest("3", "spatial", sizes)])
        except EditError:
            continue
        raise AssertionError(f"{sizes} were taken")


def one_step_teaches_three_sizes() -> None:
    """The smallest size always, one between at random, and gradients reach what only they use."""
    run = start(network(), Elastic(sizes=4, samples=0), Budget(params=0.7), data=images(), steps=1)
    assert isinstance(run.method, Elastic)
    drawn = [run.method._sampled(run) for _ in range(20)]
    assert all(row[0] == 3 and row[1] in (1, 2) for row in drawn)
    assert {row[1] for row in drawn} == {1, 2}
    x, y = torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    output = run.model(x)
    zero = output.sum() * 0
    run.loss(zero, output, (x, y)).backward()
    edit = next(edit for edit in run.edits if isinstance(edit, Nest))
    gradient = run.model.get_submodule(edit.layer)[0].weight.grad  # type: ignore[index]
    assert gradient[: edit.at(2)[0]].abs().sum() > 0 and not gradient[edit.at(1)[0] :].any()


def the_largest_and_the_labels_teach_the_others() -> None:
    """What a size loses: 0.75 of the divergence from the largest, and 0.25 of the task's loss."""
    x, y = torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    for share in (0.0, 0.25):
        method = Elastic(sizes=2, samples=0, labels=share)
        run = start(network(), method, Budget(params=0.7), data=images(), steps=1)
        output = run.model(x)
        small = torch.func.functional_call(run.model, weights_at(run.model, run.edits, 1), (x,))
        wanted = (1 - share) * divergence(small, output.detach(), 1.0)
        wanted = wanted + share * nn.functional.cross_entropy(small, y)
        assert torch.allclose(run.loss(output.sum() * 0, output, (x, y)), wanted)


def the_dense_network_can_teach_all_sizes() -> None:
    """The largest half from the labels, half from the dense network; the others from it alone."""
    model, method = network(), Elastic(sizes=2, samples=0, learn_from="dense", labels=0.0)
    dense = copy.deepcopy(model).eval()
    run = start(model, method, Budget(params=0.7), data=images(), steps=1)
    x, y = torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    output, aim = run.model(x), dense(x).detach()
    small = torch.func.functional_call(run.model, weights_at(run.model, run.edits, 1), (x,))
    task = nn.functional.cross_entropy(output, y)
    wanted = task + divergence(output, aim, 4.0) + divergence(small, aim, 1.0)
    wanted = (wanted + divergence(small, aim, 4.0)) / 2
    assert torch.allclose(run.loss(task, output, (x, y)), wanted)
    run.close()
    assert not run.aside.kept


def precision_is_that_of_the_training_after_resuming() -> None:
    """A stage that resumes behind a validation runs its sizes as the loop runs the network."""
    method = chain("norm_loss", "elastic(sizes=2, samples=0)")
    x, y = torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)

    def begun() -> Run:
        bound = Budget(params=0.7)
        return start(network(), method, bound, data=images(), steps=2)

    def loss(run: Run) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = run.model.train()(x)
        return run.loss(output.float().sum(), output, (x, y))

    run, again = begun(), begun()
    run.after_step()
    loss(run)
    with torch.no_grad():
        run.model.eval()(x)
    again.load_state_dict(copy.deepcopy(run.state_dict()))
    again.model.load_state_dict(run.model.state_dict())
    assert torch.equal(loss(again), loss(run))
    assert again.aside.scope("stage1").get(Precision).kind == torch.bfloat16
    again.close()
    assert not again.model._forward_pre_hooks


def what_elastic_cannot_do_is_refused_before_training() -> None:
    """Milliseconds as a bound, and the statistics of batch norms without inputs."""
    target = Target.of(lambda module, _: 1e-6 * sum(p.numel() for p in module.parameters()))
    x, val = torch.zeros(1, 3, 8, 8), Data(images().train, images(32).train, classes=4)
    with pytest.raises(BudgetError, match="not by milliseconds: bound one of these"):
        start(network(), Elastic(), Budget(latency=0.5), example=(x,), data=val, target=target)
    with pytest.raises(MethodError, match="batch norms, such as 1, .* pass data"):
        start(network(), Elastic(), Budget(params=0.7), example=(x,))
    plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    run = start(plain, Elastic(sizes=2), Budget(params=0.7), example=(torch.zeros(1, 16),))
    run.finish()  # nothing to re-estimate, nothing to refuse


def a_budget_that_is_met_leaves_the_network_as_it_is() -> None:
    """No tables without sizes: nothing is added to the file, and the reason is said."""
    result = compress(network(), images(), "elastic(sizes=3, samples=0)", "params=100000")
    assert result.edits == () and result.report.after.bytes == result.report.before.bytes
    assert {row.reason for row in result.report.layers if row.layer in "038"} == {
        "the budget is met without it, even at the smallest size"
    }


def every_size_comes_out_of_the_file() -> None:
    """Outputs of a size cut from the file are those of the same ranks within the network."""
    data = images()
    result = compress(
        network(),
        data,
        "elastic(sizes=3, smallest=0.5, samples=16)",
        "params=0.7",
        train=Train(epochs=1, batch=16, lr=0.01),
    )
    sizes = next(row["sizes"] for row in result.report.history if "sizes" in row)
    x = torch.randn(2, 3, 8, 8)
    with tempfile.TemporaryDirectory() as folder:
        path = result.save(Path(folder) / "a.pliant")
        for size, row in enumerate(sizes):
            found = load(path, network, at=Budget(params=row["params"])).eval()
            assert cost(found, (x,)).params == row["params"]
            assert torch.equal(found(x), expected(result.model, result.edits, size, x))
            assert not any(MEANS in name for name in found.state_dict())
            edits = shrink(load(path, network), result.edits, size)
            again = network()
            replay(again, edits, weights=False)
            assert str(again.eval()) == str(found) and {type(e) for e in edits} == {Factor}
        refused = 0
        for at in (0.01, "bytes=10"):
            try:
                load(path, network, at=at)
            except BudgetError:
                refused += 1
        assert refused == 2


def the_report_measures_every_size() -> None:
    """Each by itself: the largest as the whole network, with milliseconds of a formula's target."""
    target = Target.of(lambda module, _: 1e-6 * sum(p.numel() for p in module.parameters()))
    data = replace(images(), val=images(32).train)
    spec = "elastic(sizes=3, smallest=0.5, samples=16)"
    result = compress(network(), data, spec, "params=0.7", target=target)
    report, sizes = result.report, result.report.sizes
    assert [size.params for size in sizes] == sorted({size.params for size in sizes}, reverse=True)
    assert len(sizes) == 3 and sizes[0].bytes < report.after.bytes  # no tables
    assert replace(sizes[0], bytes=report.after.bytes) == report.after
    for size, row in enumerate(sizes):
        found = of_size(result.model, result.edits, size)
        assert row.loss == evaluate(found, data).loss
        assert row.latency_ms is not None and row.accuracy is not None
        assert abs(row.latency_ms - 1e-3 * row.params) < 1e-6
    assert evaluate(result.model, data).loss == report.after.loss  # cutting left it as it was
    assert Report.from_json(report.to_json()).sizes == sizes
    assert "sizes" in report.seconds


def sizes_are_cut_before_anything_else_is_done() -> None:
    nest = (Settle("1", 2), Nest("3", "spatial", (3, 2)))
    assert cuttable(nest) and cuttable((Factor("0", "spatial", (2,)), *nest))
    assert not cuttable((*nest, Factor("8", "svd", (2,))))
    assert not cuttable(nest[:1]) and not cuttable(())


def expected(model: nn.Module, edits: Sequence[Edit], size: int, x: Tensor) -> Tensor:
    """Run a network at a size by hand: views of its weights, a row of each table."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.means_by_size[size]  # type: ignore[index]
            module.running_var = module.variances_by_size[size]  # type: ignore[index]
    return torch.func.functional_call(model, weights_at(model, edits, size), (x,))


def a_latency_is_found_by_halving() -> None:
    """Eight sizes take 8, 7, ... 1 ms: 3.5 ms allow the one of 3, after at most four looks."""
    sizes, seen = [Cost(9 - k, 0, 0) for k in range(8)], []

    def latency(size: int) -> float:
        seen.append(size)
        return 8.0 - size

    dense = Cost(9, 0, 0, latency_ms=9.0)
    assert choose(sizes, Budget(latency=3.5), dense, latency) == 5
    assert len(seen) <= 4
    assert choose(sizes, Budget(params=4, latency=100.0), dense, latency) == 5


def a_table_costs_bytes_only() -> None:
    """Three sizes of 16 channels: 2 * 3 * 16 numbers of four bytes, and no arithmetic."""
    model, edit, x = network(), Settle("1", 3), torch.zeros(1, 3, 8, 8)
    before = layer_costs(model, (x,))["1"]
    edit.apply(model)
    after = layer_costs(model, (x,))["1"]
    assert after.bytes - before.bytes == 2 * 3 * 16 * 4
    assert (after.params, after.macs) == (before.params, before.macs)


CASES = [
    Case(
        "elastic",
        spec="elastic(sizes=3, samples=16)",
        variants=(
            'elastic(sizes=2, form="tucker2", samples=0)',
            'elastic(sizes=2, learn_from="dense", samples=16)',
        ),
        witnesses={
            "samples": on_many("elastic", "samples", Budget(macs=0.7)),
        },
        own=(
            first_components_are_the_best_of_their_rank,
            order_is_that_of_the_outputs,
            sharing_factors_costs_next_to_nothing,
            forms_are_those_that_suit_all_sizes,
            the_smallest_size_may_need_other_forms,
            every_size_is_a_part_of_the_next_larger_one,
            sizes_must_fall,
            one_step_teaches_three_sizes,
            the_largest_and_the_labels_teach_the_others,
            the_dense_network_can_teach_all_sizes,
            precision_is_that_of_the_training_after_resuming,
            what_elastic_cannot_do_is_refused_before_training,
            a_budget_that_is_met_leaves_the_network_as_it_is,
            every_size_comes_out_of_the_file,
            the_report_measures_every_size,
            sizes_are_cut_before_anything_else_is_done,
            a_latency_is_found_by_halving,
            a_table_costs_bytes_only,
        ),
    )
]
