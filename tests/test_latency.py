"""Milliseconds: measured in turn, kept in a table, planned for; never asserted of a real clock."""

import itertools
import json
import math
import random
import re
import zlib
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import pliant
from pliant.budget import Budget
from pliant.cli import app
from pliant.cost import Cost
from pliant.errors import BudgetError, ChainError, MethodError, ModelError
from pliant.families.prune.ranking import Unit, in_blocks
from pliant.latency import LatencyTable, Target, compare, measure, runtimes
from pliant.latency.clock import Clock
from pliant.latency.compare import BUILDS, _rounds, compared, of_builds, timing
from pliant.latency.runtimes import batched
from pliant.latency.table import _between, _spread, _step, input_shape, signature
from pliant.render.html import html
from pliant.render.markdown import markdown
from pliant.result import Report

EXAMPLE = (torch.zeros(1, 3, 6, 6),)


def net() -> nn.Sequential:
    """Two convolutions that can be factorized, and what stands around them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1)),
            *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
        )


def weights(module):
    return [p for p in module.parameters() if p.dim() > 1]


def arithmetic(module, example, *, call=1e-5, layer=1e-6, number=1e-8):
    """Seconds that grow with the weights: what a machine without kernels of its own would do."""
    each = sum(layer + number * p.numel() for p in weights(module))
    return call + each


def of_arithmetic(**costs):
    return Target.of(lambda module, example: arithmetic(module, example, **costs))


# ------------------------------------------------------------ targets


def test_a_target_is_read():
    target = Target.parse("torch,threads=2, batch=16,dtype=bfloat16")
    assert target == Target("torch", threads=2, batch=16, dtype="bfloat16")
    assert str(target) == "torch, 2 threads, batch 16, bfloat16"
    assert Target.parse("onnxruntime").threads == torch.get_num_threads()
    assert Target.parse("torch,seconds=0.5").seconds == 0.5
    assert str(Target.of(arithmetic, "phone")) == "phone, batch 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensorrt", "onnxruntime, torch, compile"),
        ("torch,threads", "write a runtime and then"),
        ("torch,cores=2", "write a runtime and then"),
        ("torch,threads=2,threads=3", "write a runtime and then"),
        ("torch,threads=0", "at least 1"),
        ("torch,batch=many", "at least 1"),
        ("torch,batch=1.5", "at least 1"),
        ("torch,seconds=0", "above 0"),
        ("torch,seconds=nan", "above 0"),
        ("torch,seconds=long", "above 0"),
        ("torch,dtype=int8", "float32, bfloat16"),
        ("onnxruntime,dtype=bfloat16", "take torch or compile"),
    ],
)
def test_what_is_no_target_is_refused(text, message):
    with pytest.raises(MethodError, match=message):
        Target.parse(text)


NOT_ONE = [5, {"runtime": "torch"}, lambda module: 1.0, lambda: 1.0, True]


@pytest.mark.parametrize("target", NOT_ONE)
def test_only_a_target_text_or_a_function_is_a_target(target):
    """Wherever one is taken, with the same words."""
    takes = [
        Target.of,
        lambda place: Target("", function=place),
        lambda place: measure(net(), EXAMPLE, place),
        lambda place: compare(net(), net(), EXAMPLE, place),
        lambda place: begin("energy", place),
        lambda place: squeeze(place, "latency=80%"),
        lambda place: pliant.load("missing.pliant", net(), at=0.5, target=place),
    ]
    for take in takes:
        with pytest.raises(MethodError, match="A target is a Target, text such as .* returns sec"):
            take(target)


def test_a_plain_function_and_text_are_targets():
    assert squeeze(arithmetic, "latency=80%").report.met
    assert begin("energy", arithmetic).clock.target.function is arithmetic
    assert measure(net(), EXAMPLE, arithmetic).repeats == 3
    assert measure(net(), EXAMPLE, "torch,threads=1,seconds=0.01").median_ms > 0
    assert compare(net(), net(), EXAMPLE, lambda *both: max(1.0, 0.5)).speedup == 1


def test_a_table_belongs_to_threads_batch_and_versions():
    targets = [Target("torch", threads=t, batch=b) for t in (1, 2) for b in (1, 8)]
    assert len({target.digest() for target in targets}) == 4
    assert "torch" in targets[0].fingerprint() and "machine" in targets[0].fingerprint()


def test_a_table_belongs_to_a_graphics_card(monkeypatch):
    target = Target("torch", threads=1, device="cuda:1")
    assert target.digest() == target.digest()  # also where there is no such card
    named = {"cuda:0": "A", "cuda:1": "B"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: named[device])
    assert target.fingerprint()["card"] == "B"
    before = target.digest()
    named["cuda:1"] = "C"
    assert target.digest() != before


def test_how_long_one_looks_does_not_change_what_is_seen():
    short, long = (Target("torch", threads=1, seconds=seconds) for seconds in (2.0, 20.0))
    assert short.digest() == long.digest() and short.plain() == long.plain()
    assert _rounds(0.1, short.seconds, 9) == 20
    assert _rounds(0.1, long.seconds, 9) == 200
    assert _rounds(1e-3, long.seconds, 9) == 10 * _rounds(1e-3, short.seconds, 9)


# ------------------------------------------------------------ measuring


def scripted(*seconds):
    """A target whose times come from a list."""
    left = iter(seconds)
    return Target.of(lambda module, example: next(left))


def test_the_first_sample_warms_up_and_times_are_medians():
    found = measure(net(), EXAMPLE, scripted(9.0, 0.002, 0.001, 0.003))
    assert (found.median_ms, found.repeats) == (pytest.approx(2.0), 3)
    assert found.spread_ms > 0 and "±" in str(found)


def test_networks_are_measured_in_turn_and_the_order_changes():
    seen = []

    def look(module, example):
        seen.append(len(module))
        return 1e-3

    compare(nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU()), (), Target.of(look))
    assert seen == [1, 2, *4 * [1, 2, 2, 1]]


def test_verdicts():
    small, large = nn.Linear(4, 4), nn.Linear(40, 40)
    example = (torch.zeros(1, 4),)
    assert compare(large, small, example, of_arithmetic()).verdict == "faster"
    assert compare(small, large, example, of_arithmetic()).verdict == "slower"
    assert compare(small, small, example, of_arithmetic()).verdict == "not distinguishable"


def test_what_the_spread_hides_is_not_called_faster():
    slow = [1.0, 2.0, 1.0, 2.0, 1.5, 1.0, 2.0, 1.2, 1.0]
    fast = [1.1, 0.9, 1.9, 1.0, 1.0, 1.9, 1.0, 1.0, 1.5]
    assert compared(slow, fast).verdict == "not distinguishable"
    assert compared(slow, [s / 2 for s in slow]).verdict == "faster"


def test_the_interval_holds_what_builds_differ_by():
    """Each build is quiet; two of one network lie further apart than a pair of them shows."""
    a, b = [[1.03] * 20, [1.00] * 20], [[1.00] * 20, [0.99] * 20]
    assert compared(a[0], b[0]).verdict == "faster"
    found = of_builds(a, b)
    assert (found.low, found.high) == (1.0, pytest.approx(1.03 / 0.99))
    assert found.verdict == "not distinguishable" and found.a.repeats == 20
    assert of_builds([[2.0] * 20, [2.06] * 20], b).verdict == "faster"


@pytest.mark.parametrize(
    ("runtime", "short", "builds"),
    [("torch", math.inf, BUILDS), ("torch", 0, 1), ("onnxruntime", math.inf, BUILDS)]
    + [("compile", math.inf, 1)],
)
def test_short_networks_are_built_more_than_once(runtime, short, builds, monkeypatch):
    monkeypatch.setattr(runtimes, "SHORT", short)
    monkeypatch.setattr(torch, "compile", lambda network: network)
    place = Target(runtime, threads=1)
    assert len(place.samplers(nn.Linear(3, 3), (torch.zeros(1, 3),), BUILDS)) == builds
    assert len(place.samplers(nn.Linear(3, 3), (torch.zeros(1, 3),))) == 1


def test_a_network_that_is_built_alike_takes_its_time_unmeasured():
    clock = Clock.start(net(), EXAMPLE, scripted(9.0, 0.002, 0.001, 0.003))
    found = clock.finish(net())
    assert (found.verdict, found.speedup) == ("not distinguishable", 1.0)
    assert clock.sides(net())[1] == clock.timing


@given(st.integers(8, 400))
def test_the_interval_holds_the_median_as_often_as_it_says(rounds):
    """Each ratio lies below the true median as often as a coin shows heads."""
    found = compared(range(1, rounds + 1), [1.0] * rounds)
    outside = sum(math.comb(rounds, below) for below in range(int(found.low)))
    assert found.low + found.high == rounds + 1
    assert 200 * outside <= 2**rounds


@pytest.mark.parametrize("rounds", [1, 3, 7])
def test_of_too_few_rounds_there_is_no_verdict(rounds):
    found = compared([2.0] * rounds, [1.0] * rounds)
    assert (found.speedup, found.low, found.high) == (2, 0, math.inf)
    assert found.verdict == "not distinguishable"


def test_equal_networks_are_hardly_ever_told_apart():
    luck = random.Random(0)
    target = Target.of(lambda module, example: luck.uniform(1.0, 2.0))
    found = [compare(nn.ReLU(), nn.ReLU(), (), target).verdict for _ in range(300)]
    assert found.count("not distinguishable") >= 0.98 * len(found)


@given(st.lists(st.floats(1e-4, 1.0), min_size=3, max_size=40))
def test_comparing_is_fair(seconds):
    assert compared(seconds, seconds).verdict == "not distinguishable"
    other = seconds[1:] + seconds[:1]
    there, back = compared(seconds, other), compared(other, seconds)
    opposite = {"faster": "slower", "slower": "faster"}
    assert back.verdict == opposite.get(there.verdict, there.verdict)
    assert there.low <= there.speedup <= there.high
    assert timing(seconds).median_ms >= 1000 * min(seconds)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf"), None, "soon", [1.0, 2.0]])
def test_a_function_must_return_seconds(seconds):
    with pytest.raises(ModelError, match="must return seconds"):
        measure(net(), EXAMPLE, Target.of(lambda module, example: seconds))


def test_a_function_may_not_change_the_network():
    model = net().train()

    def greedy(module, example):
        module.train()
        module[0].weight.data.zero_()
        return 1.0

    measure(model, EXAMPLE, Target.of(greedy))
    assert model.training and model[0].weight.abs().sum() > 0


@pytest.mark.parametrize("spec", ["torch,batch=2", "onnxruntime,threads=1", "torch,dtype=bfloat16"])
def test_runtimes_measure(spec):
    found = measure(net(), EXAMPLE, Target.parse(spec))
    assert found.median_ms > 0 and found.repeats >= 9


def test_volumes_and_images_have_their_channels_last():
    """Kernels of both ranks in one network, in the layout that each rank has."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.volume, self.image = nn.Conv3d(3, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x):
            seen.extend([x, self.volume.weight, self.image.weight])
            return self.image(self.volume(x).mean(2))

    seen = []
    measure(Both(), (torch.zeros(1, 3, 6, 6, 6),), Target("torch", threads=1, seconds=0.01))
    x, volume, image = seen[:3]
    assert x.is_contiguous(memory_format=torch.channels_last_3d)
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)
    assert image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("make", ["sampler", "layer_sampler"])
def test_however_many_networks_are_compiled(make, monkeypatch):
    """Dynamo gives up on code that it has compiled eight times; networks share their forward."""
    compiled, compile_ = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda network: compile_(network, backend=backend))
    for width in range(1, 11):
        model = Windows(width)
        getattr(Target("compile", threads=1), make)(model, (torch.zeros(1, 24),))
    assert len(compiled) == 10


def test_a_graphics_card_is_timed_by_its_own_events(monkeypatch):
    current, seen = ["cuda:0"], []

    @contextmanager
    def device(name):
        current.append(name)
        yield
        current.pop()

    def look(*_, **__):
        seen.append(current[-1])

    event = SimpleNamespace(record=look, elapsed_time=lambda other: 3.0)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: (look(), event)[1])
    monkeypatch.setattr(torch.cuda, "synchronize", look)
    monkeypatch.setattr(runtimes, "_torch", lambda *_: lambda: (look(), look)[1])
    assert Target("torch", threads=1, device="cuda:1").sampler(net(), EXAMPLE)() > 0
    assert set(seen) == {"cuda:1"} and len(seen) > 8 and current == ["cuda:0"]


def test_a_function_gets_everything_on_the_cpu(monkeypatch):
    """The device without memory stands for any other one: moving from it gives zeros here."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.zeros(self.shape))
    seen = []

    def look(module, example):
        seen.extend([*module.parameters(), *example])
        return 1.0

    target, model = Target.of(look), net().to("meta")
    target.sampler(model, (torch.zeros(1, 3, 6, 6, device="meta"),))()
    target.layer_sampler(model[0], EXAMPLE)()
    assert {str(tensor.device) for tensor in seen} == {"cpu"}


def test_a_network_that_fails_on_the_target_is_refused():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x.double().float() if x.dtype == torch.float32 else x[:, :3])

    with pytest.raises(ModelError, match="Odd must run on torch.* but fails .RuntimeError: "):
        measure(Odd(6, 5), EXAMPLE[0][0, 0], Target("torch", threads=1, dtype="bfloat16"))


class Scaled(nn.Module):
    """Has a default that is a number, which is no input of its graph."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 5)

    def forward(self, x, offset=None, scale=2):
        return {"sum": self.inner(x) * scale + (0 if offset is None else offset), "x": x[:, :scale]}


class Differences(nn.Module):
    """Calls what the older exporter to ONNX cannot write."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 5)

    def forward(self, x):
        return torch.diff(self.inner(x), prepend=x[:, :1] * 0)


@pytest.mark.parametrize(
    "example",
    [
        (torch.zeros(1, 6),),
        (torch.zeros(1, 6), torch.zeros(1, 5), 3),
        {"x": torch.zeros(1, 6)},
        {"offset": torch.zeros(1, 5), "x": torch.zeros(1, 6)},
        {"scale": 3, "x": torch.zeros(1, 6, dtype=torch.float64)},
    ],
)
def test_defaults_are_no_inputs_of_a_graph(example):
    place = Target("onnxruntime", threads=1, seconds=0.01)
    assert measure(Scaled(), example, place).median_ms > 0


def test_a_graph_of_another_network_is_not_measured(monkeypatch):
    """The older exporter is made to write one; its successor is asked then, and writes it well."""
    asked, export = [], torch.onnx.export

    def wrong(network, *args, dynamo, **more):
        asked.append(dynamo)
        if not dynamo:
            network = nn.Sequential(network, nn.Flatten(0))
        return export(network, *args, dynamo=dynamo, **more)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    place = Target("onnxruntime", threads=1, seconds=0.01)
    assert measure(nn.Linear(6, 5), (torch.zeros(1, 6),), place).median_ms > 0
    assert asked == [False, True]


def test_exporters_print_nothing(capfd):
    measure(Differences(), (torch.zeros(1, 6),), Target("onnxruntime", threads=1, seconds=0.01))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_a_network_that_does_not_take_the_inputs_is_told_so(runtime, capfd):
    place = Target(runtime, threads=1, seconds=0.01)
    with pytest.raises(
        ModelError, match=r"Linear does not run on inputs of shapes \(1, 6\)"
    ) as seen:
        compare(nn.Identity(), nn.Linear(5, 4), (torch.zeros(1, 6),), place)
    assert "same inputs" in str(seen.value) and "target" not in str(seen.value)
    assert capfd.readouterr() == ("", "")


def test_why_an_exporter_fails_is_told_in_one_line():
    class Own(nn.Linear):
        def forward(self, x):
            return SimpleNamespace(scores=super().forward(x))

    with pytest.raises(ModelError, match="must run on onnxruntime") as seen:
        measure(Own(6, 5), (torch.zeros(1, 6),), Target("onnxruntime", threads=1))
    said = str(seen.value)
    assert "\x1b" not in said and "\n" not in said and "step 1/3" not in said


def test_a_tensor_alone_is_an_example():
    assert measure(nn.Linear(6, 5), torch.zeros(1, 6), of_arithmetic()).median_ms > 0


def test_rows_are_repeated_up_to_the_batch():
    inputs = {"x": torch.ones(2, 3), "mask": torch.ones(2), "scale": torch.tensor(2.0)}
    found = batched(inputs, 5)
    assert found["x"].shape == (5, 3) and found["mask"].shape == (5,)
    assert found["scale"].dim() == 0


# ------------------------------------------------------------ the table


def counted():
    """A target that counts its calls."""
    calls = itertools.count()
    target = Target.of(lambda module, example: (next(calls), arithmetic(module, example))[1], "own")
    return target, lambda: next(calls)


def test_every_time_is_measured_once_and_kept_on_disk(tmp_path):
    layer, shape = nn.Conv2d(12, 12, 3, padding=1), (1, 12, 6, 6)
    target, calls = counted()
    table = LatencyTable(target, tmp_path / "deep" / "table.json")
    first = table.time(layer, shape), table.factor(layer, shape, "tucker2", (3, 5))
    after = calls()
    assert (table.time(layer, shape), table.factor(layer, shape, "tucker2", (3, 5))) == first
    assert calls() == after + 1
    again = LatencyTable(target, table.path, json.loads(table.path.read_text())["times"])
    assert again.factor(layer, shape, "tucker2", (3, 5)) == first[1]
    assert [path.name for path in table.path.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1, "times": {"a": 1}}', '{"version": 2, "times": 3}']
)
def test_a_damaged_file_counts_as_empty(text, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = Target.of(arithmetic, "own")
    path = LatencyTable.of(target).path
    path.parent.mkdir(parents=True)
    path.write_text(text)
    table = LatencyTable.of(target)
    assert table.times == {}
    table.time(nn.Linear(3, 3), (1, 3))
    assert LatencyTable.of(target).past == table.times


def test_times_that_make_no_sense_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = Target.of(arithmetic, "own")
    path = LatencyTable.of(target).path
    path.parent.mkdir(parents=True)
    path.write_text('{"version": 2, "times": {"a": 1.5, "b": -1, "c": "x", "d": NaN}}')
    assert LatencyTable.of(target).past == {"a": 1.5}


def test_a_table_without_a_disk_stays_in_memory(tmp_path):
    (tmp_path / "file").write_text("")
    table = LatencyTable(Target.of(arithmetic), tmp_path / "file" / "table.json")
    assert table.time(nn.Linear(3, 3), (1, 3)) == table.time(nn.Linear(3, 3), (1, 3))
    assert LatencyTable.of(Target.of(arithmetic)).path is None


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    table = LatencyTable(Target.of(arithmetic, "own"), tmp_path / "table.json")
    assert table.time(nn.Linear(3, 3), (1, 3)) > 0 and table.path is None
    assert list(tmp_path.iterdir()) == []


def test_what_others_left_in_the_file_changes_no_plan(tmp_path):
    """A run that finds an exact time asks for it first, as the run did that measured it."""

    def uneven(module, example):
        return sum(1e-6 * (2 + len(p) % 2) * p.numel() for p in weights(module))

    layer, shape = nn.Conv2d(24, 24, 3, padding=1, bias=False), (1, 24, 6, 6)
    path = tmp_path / "table.json"
    first = LatencyTable(Target.of(uneven, "own"), path)
    before = first.factor(layer, shape, "input", (7,))
    exact = first.exact(layer, shape, "input", (7,))
    assert first.factor(layer, shape, "input", (7,)) == exact != before
    again = LatencyTable(Target.of(fails, "own"), path, past=first.past)
    assert again.factor(layer, shape, "input", (7,)) == before
    assert again.exact(layer, shape, "input", (7,)) == exact
    assert again.factor(layer, shape, "input", (7,)) == exact


class Machine:
    """Arithmetic on a machine that takes `slow` times as long, as a loaded one does."""

    slow = 1.0

    def __call__(self, module, example):
        return self.slow * arithmetic(module, example)


def test_runs_at_other_speeds_write_one_file_and_every_share_holds(tmp_path):
    layer, shape = nn.Conv2d(24, 24, 3, padding=1, bias=False), (1, 24, 6, 6)
    path, machine = tmp_path / "table.json", Machine()
    first, other = (LatencyTable(Target.of(machine, "own"), path) for _ in range(2))
    share = first.exact(layer, shape, "input", (7,)) / first.time(layer, shape)
    machine.slow = 2.0
    other.time(layer, shape)
    held = json.loads(path.read_text())["times"]
    again = LatencyTable(Target.of(fails, "own"), path, past=held)
    found = again.exact(layer, shape, "input", (7,)) / again.time(layer, shape)
    assert found == pytest.approx(share) and share < 0.5


def test_what_replaces_two_layers_is_measured_beside_both():
    machine = Machine()
    table, shape = LatencyTable(Target.of(machine)), (1, 24, 6, 6)
    narrow, wide, other = (nn.Conv2d(24, width, 3, bias=False) for width in (24, 48, 12))
    table.replaced(narrow, other, shape)
    machine.slow = 2.0
    half, quarter = (table.replaced(each, other, shape) for each in (narrow, wide))
    assert half / table.time(narrow, shape) == pytest.approx(0.5, rel=0.05)
    assert quarter / table.time(wide, shape) == pytest.approx(0.25, rel=0.05)


def fails(module, example):
    raise AssertionError("measured anew")


@pytest.mark.parametrize("form", ["tucker2", "input", "output", "spatial"])
def test_interpolation_is_exact_for_arithmetic(form):
    layer, shape = nn.Conv2d(24, 24, 3, padding=1, bias=False), (1, 24, 6, 6)
    table = LatencyTable(of_arithmetic())
    ranks = (5, 7) if form == "tucker2" else (7,)
    between = table.factor(layer, shape, form, ranks)
    assert between == pytest.approx(table.exact(layer, shape, form, ranks))
    assert table.factor(layer, shape, form, ranks) == table.exact(layer, shape, form, ranks)


@given(st.integers(1, 40), st.integers(1, 40))
def test_between_stays_within_what_was_measured(first, second):
    axes = ([4, 8, 30], [2, 16])
    times = {(a, b): float(a * b) for a in axes[0] for b in axes[1]}
    found = _between(axes, (first, second), times)
    inside = min(max(first, 4), 30) * min(max(second, 2), 16)
    assert found == pytest.approx(inside)


@given(st.integers(1, 16), st.integers(1, 600), st.integers(2, 5))
def test_measured_ranks_rise_to_the_highest(low, high, points):
    found = _spread(low, high, points)
    assert found == sorted(set(found)) and found[-1] == max(1, high)
    assert all(rank % low == 0 for rank in found[:-1])


@pytest.mark.parametrize("step", [1, 4, 16])
def test_the_steps_of_kernels_are_found_by_measuring(step):
    def staircase(module, example):
        rows = [-(-min(p.shape[:2]) // step) * step for p in weights(module)]
        return 1e-5 * sum(rows)

    table = LatencyTable(Target.of(staircase))
    assert table.step() == step
    narrow = nn.Conv2d(8, 8, 3)
    assert table.step_for(narrow, "tucker2") == min(step, 2)


def test_unaligned_ranks_that_are_slow_are_rounded_up():
    assert _step({r: (1.0 if r % 8 else 0.6) * r for r in range(17, 49)}) == 8


def test_signatures_tell_layers_apart():
    shape = (1, 8, 6, 6)
    made = [
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Sequential(nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 3)),
    ]
    assert len({signature(layer, shape) for layer in made}) == 4
    assert signature(nn.Conv2d(8, 8, 3), shape) == signature(made[0], shape)


class Windows(nn.Module):
    """Cuts a sample into four rows before its layer sees them."""

    def __init__(self, width=5):
        super().__init__()
        self.inner = nn.Linear(6, width)

    def forward(self, sample):
        return self.inner(sample.reshape(-1, 6))


def test_rows_of_one_sample_count():
    model = Windows()
    rows = pliant.layer_costs(model, (torch.zeros(1, 24),))
    assert input_shape(model.inner, rows["inner"], 2) == (8, 6)


# ------------------------------------------------------------ budgets


def test_latency_budgets_are_milliseconds_or_a_percentage():
    dense = Cost(1000, 5000, 4000, latency_ms=8.0)
    assert Budget(latency=0.5).limits(dense) == {"latency": 0.5}
    assert Budget.parse("latency=25%").limits(dense) == {"latency": 2.0}
    assert Budget.parse("latency=3").limits(dense) == {"latency": 3.0}
    for text in ("latency=0%", "latency=150%", "latency=x%"):
        with pytest.raises(BudgetError, match="milliseconds, or a share"):
            Budget.parse(text)
    with pytest.raises(BudgetError, match="needs a target"):
        Budget(latency=3.0).limits(Cost(1, 1, 1))


def squeeze(target, budget, method="energy(form='auto')", model=None):
    return pliant.compress(
        net() if model is None else model, None, method, budget, target=target, example=EXAMPLE
    )


@pytest.mark.parametrize("method", ["energy", "energy(form='auto')", "evbmf", "trp", "nrmf"])
def test_a_latency_budget_is_met_and_reported(method):
    report = squeeze(of_arithmetic(), "latency=80%", method).report
    assert report.met and report.after.latency_ms <= 0.8 * report.before.latency_ms
    assert report.target["verdict"] == "faster" and report.budget == {"latency": "80%"}
    timed = [row for row in report.layers if "latency" in row.before]
    assert timed
    for row in timed:
        changed = row.form != "dense"
        assert (row.after["latency"] < row.before["latency"]) if changed else row.reason


def test_milliseconds_and_parameters_together():
    report = squeeze(of_arithmetic(), "latency=0.03,params=70%").report
    assert report.met and report.after.latency_ms <= 0.03
    assert report.after.params <= 0.7 * report.before.params


def test_a_budget_out_of_reach_names_what_is_reachable():
    with pytest.raises(BudgetError, match=r"latency=0.001 ms \(the least reachable is 0.0"):
        squeeze(of_arithmetic(), "latency=0.001")


def test_latency_needs_a_target():
    with pytest.raises(BudgetError, match="needs a target"):
        squeeze(None, "latency=50%")


def test_a_method_that_does_not_save_latency_is_refused():
    method = type("Idle", (pliant.Method,), {})
    with pytest.raises(BudgetError, match="latency"):
        pliant.start(net(), method(), Budget(latency=1e-9), example=EXAMPLE).finish()


# ------------------------------------------------------------ the gate


def test_what_is_slower_is_left_alone_with_both_times():
    """Every further layer costs more than all arithmetic: nothing is worth it."""
    target = of_arithmetic(layer=1e-3, call=1e-6)
    result = squeeze(target, "latency=100%")
    assert not result.edits and result.report.met
    with pytest.raises(BudgetError, match="least reachable"):
        squeeze(target, "latency=90%")
    method = "energy(p=0.99, form='tucker2')"
    reasons = {r.layer: r.reason for r in squeeze(target, "latency=100%", method).report.layers}
    assert "measured slower" in reasons["2"] and "against" in reasons["2"]


def test_only_the_layers_that_gain_are_changed():
    """One kernel shape is fast as it is; its factors are slow whatever their ranks."""

    def partly(module, example):
        kernels = [p for p in weights(module) if p.shape[:2] != (12, 3) or p.shape[2:] != (3, 3)]
        return 1e-6 + sum(1e-6 + 1e-8 * kernel.numel() for kernel in kernels)

    result = squeeze(Target.of(partly), "latency=75%")
    assert {edit.layer for edit in result.edits} == {"2"}


def test_with_size_alone_nothing_is_gated():
    report = squeeze(of_arithmetic(layer=1e-3), "params=60%").report
    assert report.met and report.target["verdict"] == "slower"
    assert report.after.latency_ms > report.before.latency_ms


@pytest.mark.parametrize("method", ["energy(form='auto')", "magnitude"])
def test_a_saved_run_tells_its_times(method):
    saved = begin(method, of_arithmetic()).state_dict()
    again = begin(method, Target.of(fails), saved=saved)  # nothing is measured
    assert pliant.edits.to_json(again.edits) == saved["edits"]
    assert again.state_dict()["clock"] == saved["clock"]
    saved["clock"]["machine"] = "another"
    assert begin(method, Target.of(fails), saved=saved).edits == again.edits


def test_times_of_another_network_or_target_are_not_taken():
    saved = begin("energy", of_arithmetic()).state_dict()
    with pytest.raises(AssertionError, match="measured anew"):
        begin("energy", Target.of(fails, batch=2), saved=saved)
    with pytest.raises(AssertionError, match="measured anew"):
        begin("energy", Target.of(fails), nn.Sequential(net(), nn.ReLU()), saved=saved)
    saved["clock"]["version"] = 1  # times that meant something else
    with pytest.raises(AssertionError, match="measured anew"):
        begin("energy", Target.of(fails), saved=saved)
    del saved["clock"]  # as in a checkpoint of before
    assert begin("energy", of_arithmetic(), saved=saved).clock is not None


def begin(method, target, model=None, **more):
    return pliant.start(
        net() if model is None else model,
        pliant.method(method),
        Budget(latency="80%"),
        example=EXAMPLE,
        target=target,
        **more,
    )


@pytest.mark.parametrize("method", ["energy(form='auto')", "magnitude"])
def test_measuring_leaves_the_callers_random_state_alone(method):
    before = torch.get_rng_state()
    begin(method, of_arithmetic())
    assert torch.equal(before, torch.get_rng_state())


def test_copies_of_a_layer_leave_the_random_state_of_its_device_alone(monkeypatch):
    class Elsewhere(nn.Parameter):
        is_cuda, device = True, torch.device("cuda", 1)

    @contextmanager
    def fork(devices):
        forked.append([*devices])
        yield

    forked, layer = [], nn.Linear(3, 3)
    layer.weight = Elsewhere(layer.weight.data)
    monkeypatch.setattr(torch.random, "fork_rng", fork)
    runtimes.copies_of(layer)
    assert forked == [[1]]


@pytest.mark.slow  # every example compresses a network
@pytest.mark.parametrize("method", ["energy(form='auto')", "magnitude"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.integers(20, 100), rough=st.floats(0, 3))
def test_no_network_is_ever_slower(method, seed, share, rough):
    """Times without any order: of layers, and of whole networks apart from their layers."""

    def adversary(module, example):
        shapes = [tuple(p.shape) for p in weights(module)]
        luck = zlib.crc32(f"{seed} {shapes}".encode()) / 2**32
        return arithmetic(module, example) * (1 + rough * luck)

    try:
        report = squeeze(Target.of(adversary), f"latency={share}%", method).report
    except BudgetError as error:
        assert "latency" in str(error)
        return
    assert report.met
    assert report.after.latency_ms <= report.before.latency_ms * share / 100 * (1 + 1e-9)


def test_a_plan_that_is_slower_than_its_layers_is_not_taken():
    """Layers gain, the network they make loses: the dense one is kept, or the budget refused."""

    def treacherous(module, example):
        whole = len(list(module.children())) > 3
        return arithmetic(module, example) * (5 if whole and len(weights(module)) > 3 else 1)

    assert squeeze(Target.of(treacherous), "latency=100%").edits == ()
    with pytest.raises(BudgetError, match="the fastest network that was measured takes"):
        squeeze(Target.of(treacherous), "latency=80%")


# ------------------------------------------------------------ channels

PRUNING = ["magnitude", "random", "asrfp"]


@pytest.mark.parametrize("method", PRUNING)
def test_channels_leave_until_the_network_is_in_time(method):
    report = squeeze(of_arithmetic(), "latency=80%", method).report
    assert report.met and report.target["verdict"] == "faster"
    assert 0.7 * report.before.latency_ms < report.after.latency_ms
    assert report.after.latency_ms <= 0.8 * report.before.latency_ms
    assert any(row.form == "pruned" for row in report.layers)


def test_channels_leave_for_milliseconds_and_parameters_together():
    report = squeeze(of_arithmetic(), "latency=95%,params=40%", "magnitude").report
    assert report.met and report.after.params <= 0.4 * report.before.params
    report = squeeze(of_arithmetic(), "latency=60%,params=90%", "magnitude").report
    assert report.met and report.after.latency_ms <= 0.6 * report.before.latency_ms


def test_channels_leave_in_rounds_of_milliseconds():
    inputs = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    data = pliant.Data((inputs, torch.arange(16) % 4), classes=4)
    train = pliant.Train(epochs=3, batch=8, lr=0.01)
    result = pliant.compress(
        net(), data, "magnitude(rounds=3)", "latency=60%", train=train, target=of_arithmetic()
    )
    sizes = [edit.kept for edit in result.edits if (edit.layer, edit.side) == ("2", "out")]
    assert result.report.met and len(sizes) > 1
    assert [before for _, before in sizes] == [12, *(after for after, _ in sizes[:-1])]


def test_scores_from_data_leave_for_milliseconds():
    """On the way they are priced by what can be counted; what is refused is the time."""
    inputs = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    data = pliant.Data((inputs, torch.arange(16) % 4), classes=4)
    result = pliant.compress(
        net(), data, "group_fisher(samples=16)", "latency=70%", target=of_arithmetic()
    )
    assert result.report.met and {edit.form for edit in result.edits} == {"pruned"}
    with pytest.raises(BudgetError, match="the fastest network that was measured takes"):
        pliant.compress(net(), data, "group_fisher", "latency=1%", target=of_arithmetic())


def test_units_leave_by_blocks():
    """Of six, two leave first, so that four stay; four more would leave fewer than may."""
    units = [Unit(level, "a", unit) for level, unit in ((0.1, 3), (0.2, 0), (0.8, 1), (0.9, 2))]
    units += [Unit(0.3, "b", 0), Unit(0.4, "b", 1)]
    sizes, steps = {"a": 6, "b": 2}, {"a": 4, "b": 1}
    found = [[u.index for u in block] for block in in_blocks(units, sizes, steps)]
    assert found == [[3, 0], [0], [1]]
    units += [Unit(1.0, "a", 4), Unit(1.0, "a", 5)]
    assert [u.index for u in in_blocks(units, sizes, steps)[-1]] == [1, 2, 4, 5]


def test_channels_stay_in_multiples_of_the_step():
    """Kernels compute eight channels at once: what is left fills them."""

    def eights(module, example):
        return 1e-5 * sum(-(-p.shape[0] // 8) * -(-p.shape[1] // 8) for p in weights(module))

    wide = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten())
    model = nn.Sequential(*wide, nn.Linear(32 * 4, 4))
    result = squeeze(Target.of(eights), "latency=70%", "magnitude", model)
    kept = {edit.layer: edit.kept[0] for edit in result.edits if edit.side == "out"}
    assert kept and all(count % 8 == 0 for count in kept.values())


@pytest.mark.parametrize("method", PRUNING)
def test_channels_stay_where_fewer_are_slower(method):
    """The network stays as it was, or the budget is refused."""

    def perverse(module, example):
        return 1 / (1000 + sum(p.numel() for p in weights(module)))

    assert squeeze(Target.of(perverse), "latency=100%", method).edits == ()
    for budget in ("latency=90%", "latency=100%,params=50%"):
        with pytest.raises(BudgetError, match="the fastest network that was measured takes"):
            squeeze(Target.of(perverse), budget, method)


def test_a_latency_goes_to_the_stage_that_saves_it():
    result = squeeze(of_arithmetic(), "latency=80%", ["norm_loss", "magnitude"])
    assert result.report.met and result.edits
    with pytest.raises(ChainError, match="both save latency"):
        squeeze(of_arithmetic(), "latency=80%", ["magnitude", "energy"])


def test_stages_share_milliseconds():
    stages = [
        pliant.Stage(pliant.method("magnitude"), Budget(latency="85%")),
        pliant.Stage(pliant.method("energy(form='auto')"), Budget(latency="70%")),
    ]
    result = squeeze(of_arithmetic(), None, stages)
    assert {edit.form for edit in result.edits} > {"pruned"}
    assert result.report.after.latency_ms <= 0.7 * result.report.before.latency_ms


# ------------------------------------------------------------ the command line


def say(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def test_measure_prints_one_network_or_two():
    alone = say("measure", "lenet5", "--target", "torch,threads=1", "--json")
    assert alone.exit_code == 0, alone.output
    found = json.loads(alone.stdout)
    assert found["target"]["runtime"] == "torch" and found["model"]["median_ms"] > 0
    both = say("measure", "lenet5", "lenet5", "--target", "torch", "--threads", 1, "--batch", 2)
    assert both.exit_code == 0, both.output
    assert "times the speed" in both.stdout and "batch 2" in both.stdout
    refused = say("measure", "lenet5", "--target", "tensorrt")
    assert refused.exit_code == 2 and "onnxruntime, torch, compile" in refused.output


def test_a_target_alone_measures_for_the_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("compress", "lenet5", "--data", "mnist5k", "--method", "energy(p=0.5)", "--epochs", 0)
    done = say(*words, "--target", "torch", "--threads", 1, "--no-onnx", "--out", "run")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["before"]["latency_ms"] > 0 and report["after"]["latency_spread_ms"] >= 0
    assert report["target"]["name"] == "torch, 1 thread, batch 1"
    assert re.search(r"Latency +[\d.e+-]+ ± [\d.e+-]+ ms +[\d.e+-]+ ± [\d.e+-]+ ms", done.output)


def test_a_report_writes_times_everywhere():
    report = squeeze(of_arithmetic(), "latency=80%").report
    again = Report.from_json(report.to_json())
    assert (again.target, again.layers) == (report.target, report.layers)
    assert "| ms before | after |" in markdown(again)
    for text in (markdown(again), html(again)):
        assert "own function, batch 1" in text and "80 % of dense" in text
