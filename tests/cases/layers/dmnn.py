"""Paths that add up to a block, gates that look at the input, and the share that runs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from pliant import zoo
from pliant.cost import cost, module_cost
from pliant.data import Data
from pliant.edits import Swap
from pliant.errors import EditError, ModelError
from pliant.families.layers.routes import Seen, gates_of, rate_of
from pliant.methods.layers.dmnn import DMNN
from pliant.nn.mobile import MBConv
from pliant.nn.multipath import MultiPathBlock, MultiPathStage, straight_through
from pliant.nn.paths import PaddedShortcut, hidden_norms
from pliant.run import Run, start
from pliant.testing import Case
from pliant.testing.toys import TOYS
from pliant.zoo.resnet import BasicBlock
from pliant.zoo.resnet_cifar import Block
from pliant.zoo.staged import StagedBlock, StagedResNet


def trained(block: nn.Module) -> nn.Module:
    """With statistics, scales and shifts of batch norms that are those of no fresh one."""
    for _ in range(2):
        block.train()(torch.randn(8, 6, 8, 8))
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return block.eval()


def routed(block: nn.Module, paths: int) -> MultiPathStage:
    model = nn.Sequential(nn.Sequential(block))
    spec = {"blocks": (hidden_norms(block),), "paths": paths, "width": 4, "classes": 0}
    Swap("0", "multi_path", spec).apply(model)
    stage = model.eval()[0]
    assert isinstance(stage, MultiPathStage)
    return stage


BLOCKS = (
    lambda: MBConv(6, 6, 3, 3, 1, 1e-5),
    lambda: Block(6, 6, 1),
    lambda: Block(6, 10, 2),
    lambda: BasicBlock(6, 9, 2),
    lambda: StagedBlock(6, 6, 1),
    lambda: StagedBlock(6, 9, 2),
)


def open_paths_add_up_to_the_block() -> None:
    """And with all of them closed the shortcut is left, exactly."""
    for make in BLOCKS:
        for paths in (1, 2, 3):
            torch.manual_seed(0)
            block, x = trained(make()), torch.randn(5, 6, 8, 8)
            wanted = block(x)
            [part] = routed(block, paths).parts
            assert isinstance(part, MultiPathBlock) and len(part.paths) == paths
            assert torch.allclose(part(x, torch.ones(5, paths)), wanted, atol=1e-5)
            plain = part.after(part.shortcut(x))
            assert torch.equal(part(x, torch.zeros(5, paths)), plain)
    assert torch.equal(part.shortcut(x), block.shortcut(x))  # type: ignore[operator]
    inner, short = torch.randn(2, 6, 4, 4), PaddedShortcut(2, 2)
    assert torch.equal(short(inner)[:, 2:-2], inner[:, :, ::2, ::2]) and short(inner).shape[1] == 10


def only_open_paths_run() -> None:
    """The same for any gates, rows without any too; what runs is sum c g, to the unit."""
    for make in BLOCKS:
        torch.manual_seed(0)
        stage, x = routed(trained(make()), 3), torch.randn(7, 6, 8, 8)
        [part] = stage.parts
        assert isinstance(part, MultiPathBlock)
        gates = (torch.rand(7, 3) > 0.5).float()
        gates[2] = 0
        assert torch.allclose(part.sparse(x, gates), part(x, gates), atol=1e-5)
        x = x[:1]
        stage.sparse, whole = False, cost(stage, (x,)).macs
        each = [module_cost(stage, (x,), f"parts.0.paths.{n}").macs for n in range(3)]
        for pattern in ((1, 0, 1), (0, 0, 0), (0, 1, 0)):
            with torch.no_grad():
                bias = 5 * (2 * torch.tensor(pattern, dtype=torch.float32) - 1)
                stage.controllers[0].gate.bias.copy_(torch.stack([-bias, bias], 1).flatten())  # type: ignore[union-attr, operator]
            stage.sparse = True
            closed = sum(c for c, g in zip(each, pattern, strict=True) if not g)
            assert cost(stage, (x,)).macs == whole - closed
            sparse = stage(x)
            stage.sparse = False
            assert torch.allclose(sparse, stage(x), atol=1e-5)


def states_go_from_block_to_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(StagedBlock(6, 6, 1), StagedBlock(6, 6, 1)))
    Swap("0", "multi_path", {"blocks": (1, 1), "paths": 2, "width": 4, "classes": 3}).apply(model)
    stage: Any = model.eval()[0]
    x = torch.randn(5, 6, 8, 8)
    found, gates, states = stage.routed(x)
    one, two = stage.controllers
    _, first = one(x, torch.zeros(5, 4), stage.cell)
    inner = stage.parts[0](x, gates[0])
    own, second = two(inner, first, stage.cell)
    assert torch.equal(states[0], first) and torch.equal(states[1], second)
    assert torch.equal(gates[1], own) and torch.equal(found, stage.parts[1](inner, own))
    seen = two.norm(two.embed(inner.mean((2, 3)))).relu()
    cell = stage.cell
    moved = seen @ cell.read.weight.T + cell.read.bias + first @ cell.keep.weight.T
    assert torch.allclose(second, moved.tanh(), atol=1e-6)
    one.gate.bias.detach().copy_(torch.tensor([5.0, -5.0, -5.0, 5.0]))
    assert stage.routed(x)[1][0].tolist() == [[0, 1]] * 5
    one.gate.forced.fill_(1)
    assert stage.routed(x)[1][0].tolist() == [[1, 1]] * 5


def gates_are_drawn_with_a_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0]).expand(20_000, 2).clone().requires_grad_()
    gates = straight_through(logits, 1.0)
    assert sorted(gates.unique().tolist()) == [0, 1]
    assert abs(float(gates.detach().mean()) - torch.sigmoid(torch.tensor(1.0))) < 0.02
    gates.sum().backward()
    assert logits.grad is not None and (logits.grad[:, 1] > 0).all()
    half = straight_through(torch.zeros(1000, 2, dtype=torch.float16), 1.0)
    assert half.isfinite().all()


def the_rate_is_weighed_by_products() -> None:
    gates = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])]
    assert torch.isclose(rate_of(gates, [300.0, 100.0]), torch.tensor(0.625))


def batch() -> tuple[Tensor, Tensor]:
    """Four classes of noisy images: easy ones are bright, hard ones a faint half."""
    random = torch.Generator().manual_seed(0)
    x, labels = 0.3 * torch.randn(64, 3, 8, 8, generator=random), torch.arange(64) % 4
    for number, label in enumerate(labels.tolist()):
        if label < 2:
            x[number, label] += 2
        else:
            x[number, 2, :, 4 * (label - 2) : 4 * (label - 1)] += 0.5
    return x, labels


def begun(method: DMNN, steps: int = 0, decay: float = 0.0) -> Run:
    torch.manual_seed(0)
    model, (x, labels) = StagedResNet((2, 2), (8, 12), 4), batch()
    data = Data(train=(x, labels), val=(x, labels), classes=4)
    optimizer = SGD([*model.parameters()], 0.1, momentum=0.9, weight_decay=decay)
    return start(model, method, data=data, optimizer=optimizer, steps=steps)


def walk(run: Run, steps: int) -> list[float]:
    x, labels = batch()
    assert isinstance(run.optimizer, SGD)
    shares = []
    for step in range(steps):
        if step == 3 * steps // 4:
            run.optimizer.param_groups[0]["lr"] /= 10
        run.optimizer.zero_grad()
        output = run.model.train()(x)
        stages: Any = [run.model.get_submodule(n) for n in run.state["stages"]]
        run.loss(F.cross_entropy(output, labels), output, (x, labels)).backward()
        shares.append(float(stages[0].controllers[0].gate.forced))
        run.before_step()
        run.optimizer.step()
        run.after_step()
    return shares


def the_rate_is_held() -> None:
    """Where gates are drawn, as the penalty sees them; what is decided follows it."""
    decided = []
    x, labels = batch()
    for rate in (0.4, 0.8):
        run = begun(DMNN(rate=rate, width=16, strength=30), steps=80)
        torch.manual_seed(0)
        forced = walk(run, 80)
        assert forced == [1.0] * 4 + [0.0] * 76
        seen = run.aside.get(Seen)
        seen.take()
        for _ in range(20):
            run.model.train()(x)
        gates = seen.take()[0]
        share = rate_of([gate.mean(0) for gate in gates], 20 * run.state["costs"])
        assert abs(float(share) - rate) <= 0.05, (rate, share)
        run.finish()
        assert (run.model.eval()(x).argmax(1) == labels).float().mean() > 0.6  # chance is 0.25
        decided.append(run.log[-1]["rate"])
    assert decided[0] < decided[1], decided


def which_paths_run_depends_on_the_input() -> None:
    """By default, on images of which some are easier; the share that is decided is near, too."""
    run = begun(DMNN(rate=0.4, width=16), steps=80)
    torch.manual_seed(0)
    walk(run, 80)
    run.finish()
    assert run.log[-1]["patterns"] > 1
    assert abs(run.log[-1]["rate"] - 0.4) <= 0.05, run.log[-1]


def heads_teach_and_leave() -> None:
    run = begun(DMNN(width=8), steps=4)
    stages: Any = [run.model.get_submodule(n) for n in run.state["stages"]]
    assert [len(stage.heads) for stage in stages] == [2, 2]
    torch.manual_seed(0)
    walk(run, 1)
    assert stages[1].heads[1].weight.grad.any()
    before = len(gates_of(run))
    run.finish(strict=False)
    assert not [n for n, _ in run.model.named_modules() if n.endswith("heads.0")] and before == 4
    assert not [h for m in run.model.modules() for h in m._forward_hooks]
    run = begun(DMNN(category=0))
    assert not [n for n, _ in run.model.named_modules() if n.endswith("heads.0")]


class PreActivated(StagedBlock):
    """Has the names of a block that can be divided, and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(self.bn1(x).relu())
        return x + self.conv2(self.bn2(inner).relu())


def other_blocks_are_refused() -> None:
    x = torch.randn(2, 6, 8, 8)
    model = nn.Sequential(nn.Sequential(PreActivated(6, 6, 1)), nn.Flatten(), nn.Linear(384, 2))
    with pytest.raises((EditError, ModelError), match="add up"):
        start(model, DMNN(), example=(x,))
    assert not hidden_norms(MBConv(6, 6, 3, 1, 1, 1e-5)) and not hidden_norms(nn.Conv2d(3, 3, 1))
    assert not hidden_norms(MBConv(6, 8, 3, 3, 1, 1e-5)) and hidden_norms(Block(6, 6, 1), 7) == 0
    with pytest.raises(EditError, match="of another kind"):
        spec = {"blocks": (2,), "paths": 2, "width": 4, "classes": 0}
        Swap("0", "multi_path", spec).apply(nn.Sequential(nn.Sequential(Block(6, 6, 1))))
    run = begun(DMNN(exclude=("stages.0",)))
    assert run.state["stages"] == ["stages.1"]


def the_network_of_the_zoo_begins_as_mobilenet() -> None:
    plain, paths = zoo.build("mobilenet-v2-cifar"), zoo.build("dmnn-mobilenet-v2-cifar")
    numbers = [sum(p.numel() for p in model.parameters()) for model in (plain, paths)]
    stage = paths.get_submodule("blocks")
    assert isinstance(stage, MultiPathStage) and len(stage.controllers) == 10
    controllers: list[Any] = list(stage.controllers)
    channels = [controller.embed.in_features for controller in controllers]
    own = sum(64 * c + 2 * 64 + 4 * 65 + 2 * c for c in channels) + 2 * 64**2 + 64
    assert numbers[1] == numbers[0] + own


CASES = [
    Case(
        "dmnn",
        spec="dmnn(width=4)",
        variants=("dmnn(paths=4, category=0, warm=1)",),
        toys=("staged",),
        refuses={name: "rows of residual blocks" for name in TOYS},
        own=(
            open_paths_add_up_to_the_block,
            only_open_paths_run,
            states_go_from_block_to_block,
            gates_are_drawn_with_a_gradient,
            the_rate_is_weighed_by_products,
            the_rate_is_held,
            which_paths_run_depends_on_the_input,
            heads_teach_and_leave,
            other_blocks_are_refused,
            the_network_of_the_zoo_begins_as_mobilenet,
        ),
    )
]
