"""The core of the searches: cells as data, mixtures, derivation, the bilevel trainer."""

import json
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant import zoo
from pliant.cost import cost, layer_costs
from pliant.data import Data
from pliant.edits import Choose, from_json, replay, to_json
from pliant.errors import DataError, EditError, MethodError, ModelError
from pliant.families.search import bilevel as search
from pliant.method import Method
from pliant.nn.cells import CellNetwork, derive, placed
from pliant.nn.genotype import DARTS_V2, DARTS_V2_WIRING, Genotype, Layout, chain, dense
from pliant.nn.mixed import MixedOp
from pliant.nn.operations import OPERATIONS, FactorizedReduction, operation
from pliant.render.genotype import genotype_svg
from pliant.run import start
from pliant.zoo.darts import DARTS_OPS, DENSE, EDARTS_OPS, evaluation, supernet


def seeded(wiring: tuple[tuple[int, ...], ...], ops: tuple[str, ...], seed: int = 0) -> CellNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = supernet(wiring, ops, cells=3, channels=2)
        for logits in search.architecture(network):
            logits.copy_(torch.randn(len(logits)))
    return network


# ---------------------------------------------------------------- cells as data


def test_the_wiring_has_eight_edges_and_stays_bit_for_bit() -> None:
    assert sum(map(len, DARTS_V2_WIRING)) == 8 and sum(map(len, DENSE)) == 14
    for wiring in (DARTS_V2_WIRING, chain()):
        for node, reads in enumerate(wiring):
            assert len(set(reads)) == 2 and max(reads) < 2 + node
        genotype = derive(seeded(wiring, EDARTS_OPS))
        assert [layout.wiring for layout in genotype.layouts()] == [wiring, wiring]


def test_one_hot_mixtures_equal_the_derived_network() -> None:
    network, x = seeded(DARTS_V2_WIRING, EDARTS_OPS).eval(), torch.randn(2, 3, 8, 8)
    genotype = derive(network, most_skips=1)
    chosen = placed(network, genotype)
    with torch.no_grad():
        for name, part in search.mixed(network).items():
            part.logits.fill_(-1e4)[list(part.ops).index(chosen[name])] = 0.0
        mixture = network(x)
        replay(network, [Choose(layer, op) for layer, op in chosen.items()])
        assert torch.allclose(mixture, network(x), atol=1e-5)
    assert not search.mixed(network)
    with pytest.raises(ModelError, match="derived already"):
        derive(network)


def test_a_plain_cell_network_is_the_genotype_with_these_weights() -> None:
    """The evaluation network computes what the derived one does, once it has its tensors."""
    network, x = seeded(DARTS_V2_WIRING, EDARTS_OPS).eval(), torch.randn(2, 3, 8, 8)
    genotype = derive(network)
    replay(network, [Choose(*row) for row in placed(network, genotype).items()])
    plain = CellNetwork(*genotype.layouts(), cells=3, channels=2, affine=False).eval()
    plain.load_state_dict(network.state_dict())
    assert torch.equal(plain(x), network(x))


def test_published_sizes() -> None:
    """3.349342M and 1.930842M (with 224 logits) are what the authors' code prints."""
    count = sum(p.numel() for p in zoo.build("darts-v2").parameters())
    assert count == 3_349_342
    network = supernet(DENSE, DARTS_OPS, cells=8)
    assert sum(p.numel() for p in network.parameters()) == 1_930_842
    assert sum(p.numel() for p in search.architecture(network)) == 2 * 14 * 8


def test_dense_wiring_keeps_the_two_strongest_edges() -> None:
    network = seeded(dense(2), ("none", "skip_connect", "avg_pool_3x3"))
    with torch.no_grad():
        for place, row in enumerate(((0, 1, 0), (0, 0, 2), (9, 3, 0), (0, 4, 0), (0, 0, 1))):
            for cell in network.cells:
                cell.edges[place].logits.copy_(torch.tensor(row))
    node = (("skip_connect", 1), ("avg_pool_3x3", 2))  # the edge from 0 is sure of `none`
    assert derive(network).normal == ((("skip_connect", 0), ("avg_pool_3x3", 1)), node)
    assert placed(network, derive(network))["cells.0.edges.2"] == "none"


def test_dropout_thins_skip_connections_in_training_only() -> None:
    """Half of what the skip gives is zeroed and the rest doubled; other candidates are whole."""
    part = MixedOp({"skip_connect": nn.Identity(), "none": nn.Identity()})
    part.logits.copy_(torch.tensor([0.0, -1e4]))
    part.drop.fill_(0.5)
    x = torch.ones(64, 4, 8, 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = part(x)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert 0.45 < float((out == 0).float().mean()) < 0.55
    assert torch.equal(part.eval()(x), x)
    part.train().logits.copy_(torch.tensor([-1e4, 0.0]))
    assert torch.equal(part(x), x)


def test_one_candidate_is_a_plain_operation() -> None:
    network = supernet(((0, 1),), ("skip_connect",), cells=3, channels=2)
    assert not search.mixed(network)
    assert derive(network) == Genotype.of((("skip_connect", 0), ("skip_connect", 1)))


def test_cells_that_cannot_be_are_refused() -> None:
    for wiring, ops, sentence in (
        (((0, 0),), ("none",), "different states"),
        (((0, 2),), ("none",), "below 2"),
        (((0, 1),), ("conv_9x9",), "needs different operations"),
        (((0, 1),), (), "none at all"),
    ):
        with pytest.raises(ModelError, match=sentence):
            Layout.of(wiring, ops)
    with pytest.raises(ModelError, match="at least 3"):
        supernet(cells=2)
    with pytest.raises(ModelError, match="even number"):
        FactorizedReduction(3, 5, affine=True)
    with pytest.raises(ModelError, match="no operation 'conv'"):
        operation("conv", 4, 1, affine=True)


def test_a_genotype_comes_back_from_json() -> None:
    assert Genotype.from_plain(json.loads(json.dumps(DARTS_V2.plain()))) == DARTS_V2
    assert DARTS_V2.count("skip_connect") == 2 and DARTS_V2.count("max_pool_3x3", reduction=True)
    for wrong in (None, {"normal": []}, {"normal": [[1]], "reduce": []}):
        with pytest.raises(ModelError, match="normal and reduce"):
            Genotype.from_plain(wrong)


def test_the_picture_names_every_operation() -> None:
    drawn = ElementTree.fromstring(genotype_svg(DARTS_V2, "a < b"))
    said = [part.text for part in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert said[0] == "a < b" and said.count("max_pool_3x3") == 5
    assert "<script" not in genotype_svg(DARTS_V2)


# ---------------------------------------------------------------- operations


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_halves_sides_rounding_up_and_costs_what_choosing_predicts(name: str) -> None:
    for stride, side in ((1, 5), (2, 5), (2, 6)):
        x = torch.randn(2, 4, side, side)
        others = {other: operation(other, 4, stride, affine=False) for other in ("none", name)}
        model = nn.Sequential(MixedOp(others)).eval()
        before, out = layer_costs(model, (x,))["0"], model(x)
        assert out.shape == (2, 4, -(-side // stride), -(-side // stride))
        Choose("0", name).apply(model)
        after = cost(model, (x,))
        expected = Choose("0", name).predict(before)
        assert (expected.params, expected.macs) == (after.params, after.macs)


def test_the_second_grid_of_a_reduction_begins_one_pixel_later() -> None:
    layer = FactorizedReduction(1, 2, affine=False).eval()
    with torch.no_grad():
        layer.even.weight.fill_(1.0)
        layer.odd.weight.fill_(1.0)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    out = layer(x) * (1 + layer.norm.eps) ** 0.5
    assert torch.allclose(out[0, 0], x[0, 0, ::2, ::2])
    assert torch.allclose(out[0, 1], x[0, 0, 1::2, 1::2])


def test_choosing_is_data_and_refuses_what_is_not_mixed() -> None:
    edits = [Choose("cells.0.edges.0", "sep_conv_3x3")]
    assert from_json(json.loads(json.dumps(to_json(edits)))) == edits
    network = seeded(((0, 1),), ("none", "sep_conv_3x3"))
    for edit, sentence in (
        (Choose("stem", "none"), "mixed operation"),
        (Choose("cells.0.edges.0", "skip_connect"), "no candidate"),
    ):
        with pytest.raises(EditError, match=sentence):
            edit.apply(network)
    shared = Choose("cells.1.edges.0", "none").apply(network).removed
    assert len(shared) == 4  # of the convolution that is gone; another cell has the logits still


# ---------------------------------------------------------------- the bilevel trainer


def test_halves_are_disjoint_and_balanced() -> None:
    labels = torch.tensor([0] * 6 + [1] * 5 + [2] * 2)
    inputs = torch.arange(13.0)[:, None]
    split = search.halves(Data((inputs, labels), classes=3), seed=1)
    rows = [part[0].flatten().tolist() for part in (split.train, split.val)]
    assert sorted(rows[0] + rows[1]) == list(range(13))
    counts = torch.stack([split.label_counts("train"), split.label_counts("val")])
    assert (counts[0] - counts[1]).abs().max() <= 1
    with pytest.raises(DataError, match="training split of tensors"):
        search.halves(Data([(inputs, labels)]))


def test_the_second_order_gradient_of_a_quadratic() -> None:
    """train = (w - a)^2 / 2, val = w^2 / 2: after a step w' = w - r (w - a), dval/da = w' r."""
    w, a = torch.tensor([3.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    loss, gradients = search.unrolled(
        lambda: (w**2).sum() / 2 + 0 * a.sum(), lambda: ((w - a) ** 2).sum() / 2, [a], [w], 0.1
    )
    ahead = 3.0 - 0.1 * (3.0 - 1.0)
    assert loss == pytest.approx(ahead**2 / 2)
    assert gradients[0].item() == pytest.approx(ahead * 0.1, rel=1e-3)
    assert w.item() == 3.0


class Choosing(Method):
    """A search in any network with mixed operations."""

    plan = search.Bilevel(lr=0.05, batch=8)

    def prepare(self, run) -> None:  # type: ignore[no-untyped-def]
        search.begin(run, self.plan, "choosing")

    def after_step(self, run) -> None:  # type: ignore[no-untyped-def]
        search.step(run, self.plan)


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    edge = MixedOp({"none": operation("none", 2, 1, affine=False), "skip_connect": nn.Identity()})
    return nn.Sequential(edge, nn.Flatten(), nn.Linear(8, 2))


def task() -> Data:
    labels = torch.arange(64) % 2
    inputs = torch.randn(64, 2, 2, 2) + 3 * (2 * labels - 1.0)[:, None, None, None]
    return Data((inputs[:32], labels[:32]), (inputs[32:], labels[32:]), classes=2)


def test_a_search_finds_the_operation_that_lets_the_signal_through() -> None:
    model, data = tiny(), task()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    run = start(model, Choosing(), data=data, optimizer=optimizer, steps=20)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(data.train[0]), data.train[1]).backward()
        optimizer.step()
        run.after_step()
    logits: Tensor = model[0].logits
    assert logits[1] - logits[0] > 0.5
    assert not logits.requires_grad and logits.grad is None


def test_its_adam_is_that_of_torch() -> None:
    plan = search.Bilevel(lr=0.01, decay=0.1)
    logits = nn.Parameter(torch.tensor([0.5, -1.0]))
    twin = nn.Parameter(logits.detach().clone())
    adam = torch.optim.Adam([twin], plan.lr, plan.betas, weight_decay=plan.decay)
    state = {"steps": 0, "first": [torch.zeros(2)], "second": [torch.zeros(2)]}
    for gradient in torch.randn(5, 2):
        search._adam(state, plan, [logits], [gradient])
        twin.grad = gradient
        adam.step()
    assert torch.allclose(logits, twin, atol=1e-6)


def test_second_order_runs_in_a_search() -> None:
    model, method = tiny(), Choosing()
    object.__setattr__(method, "plan", search.Bilevel(order=2, batch=8))
    run = start(model, method, data=task(), steps=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run.after_step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved == ["0.logits"]


def test_a_search_of_one_level_learns_on_the_training_split() -> None:
    """Without a validation split, the logits move by the gradient on the training samples."""
    model, method, data = tiny(), Choosing(), Data(task().train, classes=2)
    object.__setattr__(method, "plan", search.Bilevel(lr=0.05, batch=32, single=True))
    run = start(model, method, data=data, steps=2)
    logits = model[0].logits.requires_grad_(True)
    (wanted,) = torch.autograd.grad(F.cross_entropy(model(data.train[0]), data.train[1]), [logits])
    before = logits.detach().clone()
    logits.requires_grad_(False)
    run.after_step()
    assert torch.equal((logits - before).sign(), -wanted.sign())
    assert run.state["bilevel"]["places"]["train"] == [0, 1]
    with pytest.raises(MethodError, match="validation"):
        start(tiny(), Choosing(), data=data, steps=2)


def test_evaluation_network_trains() -> None:
    model = evaluation(DARTS_V2, cells=3, channels=2, classes=4)
    F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
    assert all(p.grad is not None for p in model.parameters())
