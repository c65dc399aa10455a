"""Groups of channels on networks that are hard to cut, and the proof of every cut."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

import pliant
from pliant import zoo
from pliant.budget import Budget
from pliant.cost import cost, layer_costs
from pliant.data import Data, Train
from pliant.edits import Prune, from_json, replay, to_json
from pliant.errors import EditError, ModelError
from pliant.families.prune.allocate import after
from pliant.families.prune.schedule import Schedule
from pliant.registry import build
from pliant.run import start
from pliant.surgery import marks
from pliant.surgery.batchnorm import absorb
from pliant.surgery.graph import Group, trace
from pliant.surgery.optim import carry
from pliant.surgery.prove import cuttable, edits_of, ignore, prove, silence
from pliant.testing.toys import TOYS


class Net(nn.Module):
    """Layers by name, and a forward that is given."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def conv(inputs: int, outputs: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)  # type: ignore[arg-type]


IMAGE = (torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


def padded() -> Net:
    """A shortcut that pads channels and slices pixels, as option A does."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = F.relu(net.bn(net.second(F.relu(net.first(x)))) + short)
        return net.head(x.mean((2, 3)))

    return Net(
        run,
        stem=conv(3, 8),
        first=conv(8, 6),
        second=conv(6, 12, stride=2),
        bn=nn.BatchNorm2d(12),
        head=nn.Linear(12, 4),
    )


def concatenated() -> Net:
    def run(net: Net, x: Tensor) -> Tensor:
        both = torch.cat([F.relu(net.one(x)), net.two(x), net.two(x)], 1)
        return net.head(torch.flatten(F.max_pool2d(net.join(both), 4), 1))

    return Net(run, one=conv(3, 6), two=conv(3, 4), join=conv(14, 5), head=nn.Linear(20, 4))


def sliced() -> Net:
    """Two readers of one layer; the code names where the second half begins."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        return net.head((net.left(x[:, :4]) + net.right(x[:, 4:])).mean((2, 3)))

    return Net(run, stem=conv(3, 10), left=conv(4, 6), right=conv(6, 6), head=nn.Linear(6, 4))


def depthwise() -> Net:
    """A depthwise convolution with a multiplier, a grouped one, a PReLU, a gate."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = net.act(net.deep(net.stem(x)))
        gate = torch.sigmoid(net.up(F.relu(net.down(x.mean((2, 3))))))
        x = F.relu(net.groups(x * gate[:, :, None, None]))
        return net.head(net.last(x).mean((2, 3)))

    return Net(
        run,
        stem=conv(3, 6),
        deep=conv(6, 12, groups=6),
        act=nn.PReLU(12),
        down=nn.Linear(12, 4),
        up=nn.Linear(4, 12),
        groups=conv(12, 8, groups=2),
        last=conv(8, 5),
        head=nn.Linear(5, 4),
    )


def twice() -> Net:
    """One layer called twice, and one more that reads it."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = net.same(F.relu(net.same(F.relu(net.stem(x)))))
        return net.head(x.mean((2, 3)))

    return Net(run, stem=conv(3, 6), same=conv(6, 6), head=nn.Linear(6, 4))


def shuffled() -> Net:
    """Channels that a constant order and a normalization over all of an image bind."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)[:, torch.tensor([3, 1, 2, 0])]
        x = net.next(F.relu(x)).flatten(2).transpose(1, 2)
        return net.head(net.norm(x).mean(1))

    norm = nn.LayerNorm((IMAGE[0].shape[2:].numel(), 6))  # of two axes: no channel leaves it
    return Net(run, stem=conv(3, 4), next=conv(4, 6), norm=norm, head=nn.Linear(6, 4))


FOUND: dict[Callable[[], Net], dict[str, int]] = {
    padded: {"stem": 8, "first": 6},  # what the code pads cannot leave
    concatenated: {"one": 6, "two": 4, "join": 5},
    sliced: {"stem:2": 6, "left": 6},
    depthwise: {"down": 4, "groups": 4, "last": 5},  # stem to up: below
    twice: {"stem": 6},
    shuffled: {},
}


def built(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def some(groups: list[Group]) -> dict[str, list[int]]:
    """A third of the units of every group, and never all."""
    return {group.name: list(range(0, len(group.units) - 1, 3)) for group in groups}


@pytest.mark.parametrize("build", FOUND, ids=lambda build: build.__name__)
def test_what_can_leave_is_found_and_the_rest_has_a_reason(build: Callable[[], Net]) -> None:
    groups, reasons = cuttable(built(build), IMAGE)
    found = {group.name: len(group.units) for group in groups}
    assert {name: found.get(name) for name in FOUND[build]} == FOUND[build]
    if build is not depthwise:
        assert found == FOUND[build]
    assert reasons["head"] == "its channels are outputs of the network"


def test_half_padded_and_wrongly_ordered_channels_stay_and_say_why() -> None:
    _, reasons = cuttable(built(padded), IMAGE)
    assert "second" not in reasons  # eight of its channels come from the stem
    _, reasons = cuttable(built(shuffled), IMAGE)
    assert "the forward pass fails" in reasons["stem"]
    assert "LayerNorm norm takes its statistics over all" in reasons["next"]


@pytest.mark.parametrize("build", FOUND, ids=lambda build: build.__name__)
def test_a_cut_network_computes_what_the_whole_one_does_without_the_channels(
    build: Callable[[], Net],
) -> None:
    model = built(build)
    groups, _ = cuttable(model, IMAGE)
    edits = edits_of(model, groups, some(groups))
    prove(model, IMAGE, edits)
    ignored, small = copy.deepcopy(model), copy.deepcopy(model)
    ignore(ignored, edits)
    replay(small, from_json(json.loads(json.dumps(to_json(edits)))))
    with torch.no_grad():
        assert torch.allclose(small(*IMAGE), ignored(*IMAGE), atol=1e-5)


@pytest.mark.parametrize("name", ["resnet20", "lenet5"])
def test_zeroed_channels_leave_without_a_trace(name: str) -> None:
    """Silent everywhere, batch norms too, so the outputs are the same to 1e-5."""
    model, example = built(lambda: zoo.build(name)), zoo.NETWORKS[name].example()
    groups, reasons = cuttable(model, example)
    edits = edits_of(model, groups, some(groups))
    silence(model, edits)
    with torch.no_grad():
        wanted = model(*example)
        now, rows = cost(model, example), layer_costs(model, example)
        predicted = after(now, rows, edits)
        replay(model, edits)
        assert torch.allclose(model(*example), wanted, atol=1e-5 * float(wanted.abs().max()))
    found = cost(model, example)
    assert (found.params, found.macs, found.bytes) == (
        predicted.params,
        predicted.macs,
        predicted.bytes,
    )
    if name == "resnet20":
        assert {len(g.units) for g in groups if g.name == "conv1"} == {16}
        assert sum(g.name.endswith("conv1") for g in groups) == 10 == len(groups)
        assert set(reasons) == {"linear"}


@dataclass(frozen=True)
class Answer:
    """What a network may give."""

    scores: Tensor


def test_outputs_in_an_object_of_any_kind_stay() -> None:
    """Scores in a dataclass are outputs; where no number comes out, nothing is known."""
    layers = nn.Sequential(conv(3, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 10))
    groups, reasons = cuttable(Net(lambda net, x: Answer(net.all(x)), all=layers), IMAGE)
    assert len(groups) == 1 and reasons["all.3"] == "its channels are outputs of the network"
    with pytest.raises(ModelError, match="its Answer holds none: wrap the network"):
        cuttable(Net(lambda net, x: Answer(net.all(x).argmax(1)), all=layers), IMAGE)


def test_a_cut_that_breaks_the_network_is_refused() -> None:
    model = built(padded)
    wrong = [Prune("first", "out", (0, 1), 6)]
    with pytest.raises(EditError, match="cannot be removed: without them the forward pass fails"):
        prove(model, IMAGE, wrong)
    swapped = [Prune("first", "out", (0, 1), 6), Prune("second", "in", (0, 2), 6)]
    with pytest.raises(EditError, match="computes something else"):
        prove(model, IMAGE, swapped)


def test_tracing_changes_neither_the_model_nor_the_random_state() -> None:
    model = built(depthwise).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    cuttable(model, IMAGE)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all("forward" not in vars(module) for module in model.modules())


# ---------------------------------------------------------------- edits


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Prune("stem", "channels", (0,), 8), "of which no channels can be removed"),
        (Prune("stem", "out", (0,), 9), "has 8 channels"),
        (Prune("stem", "out", (), 8), "cannot keep 0 of 8"),
        (Prune("stem", "out", (1, 0), 8), "must rise"),
        (Prune("stem", "out", (0, 8), 8), "must rise"),
        (Prune("stem", "out", (-1, 2), 8), "must rise"),
        (Prune("nothing", "out", (0,), 8), "has no layer"),
    ],
)
def test_edits_that_do_not_fit_are_refused(edit: Prune, words: str) -> None:
    with pytest.raises(EditError, match=words):
        edit.apply(built(padded))


def test_groups_of_a_convolution_stay_equally_large() -> None:
    with pytest.raises(EditError, match="equally many"):
        Prune("groups", "out", (0, 1, 2), 8).apply(built(depthwise))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_all_state_of_the_optimizer_is_cut_like_the_weights(kind: str) -> None:
    """A step after the cut is the step before it, of the rows that stay."""
    torch.manual_seed(0)
    model = built(padded).train()
    parameters = list(model.parameters())
    optimizer = SGD(parameters, 0.1, momentum=0.9) if kind == "sgd" else Adam(parameters, 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(*IMAGE).square().mean().backward()
        optimizer.step()
    groups, _ = cuttable(model, IMAGE)
    edits = edits_of(model, groups, some(groups))
    whole = copy.deepcopy(model)
    states = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    for edit in edits:
        carry(optimizer, edit.apply(model))
    now = dict(model.named_parameters())
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, now.values()))
    for key in states["stem.weight"]:
        shadow = copy.deepcopy(whole)  # holds the state in the place of the weights, and is cut too
        for name, parameter in shadow.named_parameters():
            parameter.detach().copy_(states[name][key])
        replay(shadow, edits)
        for name, parameter in shadow.named_parameters():
            found = optimizer.state[now[name]][key]
            assert torch.equal(found, parameter if found.dim() else states[name][key]), name


def test_a_constant_is_put_into_the_next_bias() -> None:
    """A filter that is zero emits beta - gamma mu / sigma; without padding nothing is lost."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    x = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        model.train()(x)
        model.eval()
        model[1].bias.fill_(0.7)
        model[0].weight[1], model[0].bias[1] = 0, 0
        wanted = model(x)
        edits = [Prune("0", "out", (0, 2, 3), 4), Prune("1", "channels", (0, 2, 3), 4)]
        edits.append(Prune("3", "in", (0, 2, 3), 4))
        assert absorb(model, {"3": (1,)}, [(x,)]) == 1
        replay(model, edits)
        assert torch.allclose(model(x), wanted, atol=1e-5)


# ---------------------------------------------------------------- schedules and chains


def test_rounds_go_equal_parts_of_the_way() -> None:
    schedule = Schedule(4, 0.0, 0.5)
    due = [schedule.due(step, 1000) for step in (0, 100, 125, 300, 490, 500, 1000)]
    assert due == [1, 1, 2, 3, 4, 4, 4]
    left = 1.0
    for done in range(4):
        left *= 1 - schedule.ratio(0.5, done, done + 1)
        assert left == pytest.approx(1 - 0.5 * (done + 1) / 4)


def test_gradual_cuts_in_training_end_at_the_budget() -> None:
    toy = TOYS["plain"]
    train = Train(epochs=2, batch=8, lr=0.01)
    result = pliant.compress(
        toy.model(), toy.data(), "magnitude(rounds=3)", Budget(macs=0.4), train=train
    )
    sizes = [edit.kept for edit in result.edits if (edit.layer, edit.side) == ("7", "out")]  # type: ignore[attr-defined]
    assert len(sizes) > 1 and sizes[0][1] == 12 and sizes[1][1] == sizes[0][0]
    assert result.report.met


@pytest.mark.parametrize("first", ["magnitude", "nrmf"])
def test_pruning_and_factorizing_chain_both_ways(first: str, tmp_path: object) -> None:
    """Saved, loaded equal; factors are layers, so their channels can leave too."""
    toy = TOYS["residual"]
    specs = {
        "magnitude": pliant.Stage(
            pliant.method("magnitude"), Budget(macs=0.8 if first == "magnitude" else 0.3)
        ),
        "nrmf": pliant.Stage(
            pliant.method("nrmf(interval=1, search=0.5, samples=8)"), Budget(params=0.6)
        ),
    }
    stages = [specs.pop(first), *specs.values()]
    result = pliant.compress(
        toy.model(), toy.data(), pliant.chain(*stages), train=Train(epochs=2, batch=8, lr=0.01)
    )
    kinds = [type(edit).__name__ for edit in result.edits]
    assert set(kinds) == {"Prune", "Factor"}
    path = result.save(f"{tmp_path}/chain.pliant")
    loaded = pliant.load(path, toy.model(seed=1)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(*toy.inputs(4)), result.model.eval()(*toy.inputs(4)))
    program = pliant.files.onnx.to_program(result.model, toy.inputs(2))
    assert torch.allclose(program.module()(*toy.inputs(4)), loaded(*toy.inputs(4)), atol=1e-5)


def test_nothing_to_remove_is_said_in_a_sentence() -> None:
    with pytest.raises(ModelError, match="no channels that can be removed"):
        pliant.compress(nn.Sequential(nn.Linear(3, 2)), data(), "magnitude")


def data() -> Data:
    return Data((torch.randn(8, 3), torch.arange(8) % 2), classes=2)


def finite(net: Any, x: Tensor) -> Tensor:
    out: Tensor = net.c(net.b(net.a(x).relu()).relu()).mean((2, 3))
    assert torch.isfinite(out).all(), "diverged"
    return torch.distributions.Normal(out, 1.0).mean


def plain(net: Any, x: Tensor) -> Tensor:
    out: Tensor = net.c(net.b(net.a(x).relu()).relu()).mean((2, 3))
    return out


def test_networks_that_check_their_numbers_are_traced_by_moved_values() -> None:
    """The same groups as without the checks, residual sums and grouped layers included."""
    layers = {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 4)}
    checked, _ = cuttable(Net(finite, **layers), IMAGE)
    free, _ = cuttable(Net(plain, **layers), IMAGE)
    assert [(g.name, g.slots, g.units) for g in checked] == [
        (g.name, g.slots, g.units) for g in free
    ]
    assert [group.name for group in checked] == ["a", "b"]


def test_a_module_under_two_names_is_cut_as_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4))
            self.body, self.head = self.net[:-1], self.net[-1]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)).mean((2, 3))  # type: ignore[no-any-return]

    groups, _ = cuttable(Twice(), IMAGE)
    assert [(group.name, len(group.units)) for group in groups] == [("net.0", 8)]


class Windows(nn.Module):
    """Blocks of a convolution and of windows that become samples, as MaxViT has them."""

    def __init__(self, depth: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.wide = nn.ModuleList(nn.Conv2d(width, 4 * width, 1) for _ in range(depth))
        self.deep = nn.ModuleList(
            conv(4 * width, 4 * width, groups=4 * width) for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 * width) for _ in range(depth))
        self.back = nn.ModuleList(nn.Conv2d(4 * width, width, 1) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, 8, 8) to (N, 5)."""
        x = self.stem(x)
        for wide, deep, norm, back, up, down in zip(
            self.wide, self.deep, self.norms, self.back, self.up, self.down, strict=True
        ):
            x = x + back(norm(deep(wide(x).relu())).relu())
            parts = x.unflatten(2, (-1, 4)).unflatten(4, (-1, 4)).permute(0, 2, 4, 3, 5, 1)
            seen = down(up(parts.reshape(-1, 16, x.shape[1])).relu()).reshape(parts.shape)
            x = x + seen.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("name", ["residual", "windows", "grouped", "transformer"])
def test_marks_of_several_layers_in_one_batch_say_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, example = _net(name)
    together = trace(model, example)
    monkeypatch.setattr(marks, "ROWS", 1)
    assert trace(model, example) == together
    assert together[0]


def _net(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if name == "windows":
        return Windows(), IMAGE
    toy = TOYS[name]
    return toy.model(), toy.inputs(1)


@pytest.mark.parametrize("depth", [2, 8])
def test_planning_channels_takes_few_forward_passes(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    model, x = Windows(depth), torch.randn(64, 3, 8, 8)
    plain = Windows.forward
    monkeypatch.setattr(Windows, "forward", lambda net, x: calls.append(len(x)) or plain(net, x))
    data = Data((x, torch.randint(0, 5, (64,))))
    run = start(model, build("group_fisher(samples=64)"), Budget(params=0.8), data=data)
    run.finish()
    assert len(calls) <= 30
    assert sum(calls) <= 30 * 64


def test_places_with_the_same_marks_are_read_once() -> None:
    codes = marks.codes_of(6)
    mixed = torch.ones(len(codes), 4, dtype=torch.bool)
    mixed[0] = False
    assert list(marks.met(codes, mixed)) == [([0, 1, 2, 3, 4, 5], [0, 1, 2, 3])]
    apart = codes[:, [3, 1, 3]]
    assert sorted(marks.met(codes, apart)) == [([1], [1]), ([3], [0, 2])]
    assert not list(marks.met(codes, torch.zeros_like(apart)))
