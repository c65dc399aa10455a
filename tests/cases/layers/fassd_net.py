"""Asymmetric pairs, the two modules for dense prediction, and the network in three sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.cost import cost, module_cost
from pliant.data.bootstrapped import Bootstrapped
from pliant.edits import Insert, Swap
from pliant.errors import EditError, MethodError, ModelError
from pliant.methods.layers.fassd_net import FASSDNet as Method
from pliant.nn.asymmetric import DAPF, MDA, AsymmetricConv2d, HarDBlock, dilated_pair
from pliant.run import Run, start
from pliant.testing import Case
from pliant.zoo.fassd import STRIDES, Encoder, FASSDNet


def numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def parts_have_the_published_sizes() -> None:
    with torch.device("meta"):
        assert [numbers(FASSDNet(19, v)) for v in ("full", "l1", "l2")] == [
            *(2_845_351, 2_845_351, 2_289_454)
        ]
        assert numbers(Encoder()) == 1_150_660 and numbers(DAPF(224)) == 466_144
        assert [numbers(MDA(c, 2)) for c in (192, 119, 63)] == [324_576, 123_667, 34_599]


def dense_blocks_read_powers_of_two_back() -> None:
    with torch.device("meta"):
        block = HarDBlock(160, 24, 8)
    widths = [(row[0].in_channels, row[0].out_channels) for row in block.layers]  # type: ignore[index]
    assert widths == [
        *((160, 24), (184, 40), (40, 24), (224, 70)),
        *((70, 24), (94, 40), (40, 24), (294, 118)),
    ]
    assert block.links[3] == [3, 2, 0] and block.given == [1, 3, 5, 7, 8] and block.outputs == 214


def sizes_are_those_of_the_input() -> None:
    for variant, stride in (("full", 4), ("l1", 6), ("l2", 8)):
        encoder = Encoder(STRIDES[variant]).eval()
        x = torch.zeros(1, 3, 192, 192)
        with torch.no_grad():
            assert [192 // m.shape[2] for m in encoder(x)] == [stride * 2**i for i in range(4)]
    model = FASSDNet(5).eval()
    for size in ((321, 479), (64, 96)):
        with torch.no_grad():
            assert model(torch.zeros(1, 3, *size)).shape == (1, 5, *size)
    with torch.device("meta"):
        for variant in ("full", "l1", "l2"):
            whole = FASSDNet(19, variant).eval()  # type: ignore[arg-type]
            for size in ((1024, 2048), (512, 1024)):
                assert whole(torch.zeros(1, 3, *size)).shape == (1, 19, *size)
    with pytest.raises(ModelError, match="not as 'l3'"):
        FASSDNet(5, "l3")  # type: ignore[arg-type]


def half_of_the_weights_see_as_far() -> None:
    column, row = dilated_pair(224, 112, 12)
    plain = nn.Conv2d(224, 112, 3, bias=False)
    assert numbers(column) + numbers(row) == 112_896 and numbers(plain) == 225_792
    far = 3
    pair = nn.Sequential(*dilated_pair(2, 2, far))
    x = torch.randn(1, 2, 15, 15, requires_grad=True)
    pair(x)[0, 0, 7, 7].backward()
    assert x.grad is not None
    rows, columns = x.grad[0, 0].nonzero(as_tuple=True)
    for seen in (rows, columns):
        assert sorted({*seen.tolist()}) == [7 - far, 7, 7 + far]


def noise(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def separable_kernels_are_found() -> None:
    """A kernel of rank w between column and row is exactly such a pair; of any geometry."""
    for geometry in (
        *({"padding": 1}, {"padding": (2, 0), "stride": (2, 1)}, {"stride": 2, "padding": 1}),
        *({"padding": "same", "dilation": 2}, {"padding": 1, "padding_mode": "reflect"}),
    ):
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 3, 3, **geometry).double()
        with torch.no_grad():
            kernel = torch.einsum("rci,orj->ocij", noise(2, 4, 3), noise(3, 2, 3, seed=1))
            conv.weight.copy_(kernel)
        model, x = nn.Sequential(conv), noise(2, 4, 8, 9)
        wanted, before = model(x), module_cost(model, (x,), "0")
        edit = Swap("0", "asymmetric", {"width": 2, "between": "nothing"})
        edit.apply(model)
        assert isinstance(model[0], AsymmetricConv2d) and torch.allclose(model(x), wanted)
        found, said = cost(model, (x,)), edit.predict(before)
        assert (found.params, found.macs, found.bytes) == (said.params, said.macs, said.bytes)
        assert model[0].row.bias is conv.bias
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1).double())
    wanted = wide(x)
    Swap("0", "asymmetric", {"width": 11, "between": "nothing"}).apply(wide)  # more than the rank
    assert torch.allclose(wide(x), wanted)


def a_refinement_begins_as_the_identity() -> None:
    torch.manual_seed(0)
    for spec, kind in (
        ({"channels": 5, "dilation": 2, "identity": True}, "mda"),
        ({"channels": 5, "alpha": 2, "dilations": (1, 2)}, "dapf"),
    ):
        model, x = (
            nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())),
            torch.randn(1, 3, 9, 9),
        )
        wanted, before = model(x), module_cost(model, (x,), "0")
        edit = Insert("0", kind, spec)
        edit.apply(model)
        found, said = cost(model, (x,)), edit.predict(before)
        assert (found.params, found.macs, found.bytes) == (said.params, said.macs, said.bytes)
        assert torch.equal(model(x), wanted) == (kind == "mda")
        with pytest.raises(EditError, match="channels"):
            Insert("0", kind, {**spec, "channels": 0}).apply(model)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(8, 2, 1)),
    )


def begun(method: Method) -> Run:
    return start(network(), method, example=(torch.randn(1, 3, 8, 8),))


def batch_norms_are_folded_but_the_first_of_a_refinement() -> None:
    run = begun(Method(refine=("3",), pyramid=("1",), reach=1))
    assert run.reasons["0"] == "a column and a row would have as many weights"
    model, x = run.model, torch.randn(4, 3, 8, 8)
    for _ in range(3):
        model.train()(x)
    wanted = model.eval()(x)
    run.finish()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [m for m in norms if m.eps == 1e-3]
    # of a refinement, the first one, and the one behind the sum of both branches
    assert len(norms) == len(kept) == 2 and torch.allclose(model(x), wanted, atol=1e-5)


def what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ModelError, match="see width"):
        begun(Method(only=("0",)))
    assert begun(Method(only=("0",), refine=("3",))).edits[0].layer == "3"
    for name in ("9", "4"):
        with pytest.raises(MethodError, match=f"but '{name}' is none"):
            begun(Method(refine=(name,)))
    with pytest.raises(EditError, match="takes between"):
        Swap("3", "asymmetric", {"width": 10**9, "between": "norm"}).apply(network())


def hard_positions_count() -> None:
    """Above the threshold, or at least K; nothing known is no loss, with a gradient."""
    scores = torch.zeros(2, 2, 1, 4)
    scores[:, 0, 0] = torch.tensor([-3.0, -2.0, 4.0, 5.0])
    scores.requires_grad_()
    labels = torch.zeros(2, 1, 4, dtype=torch.long)
    labels[1] = 255
    rows = nn.functional.cross_entropy(scores[:1], labels[:1], reduction="none").flatten()
    for count, wanted in ((1, rows[:2]), (3, rows[:3]), (4096, rows)):
        loss: Any = Bootstrapped(count)
        found = loss(scores, (None, labels), reduction="none")
        assert torch.isclose(found[0], wanted.mean()) and found[1] == 0
        assert torch.isclose(loss(scores, (None, labels)), wanted.mean() / 2)
    Bootstrapped()(scores, (None, labels[1:].expand(2, 1, 4))).backward()
    assert scores.grad is not None and not scores.grad.any()
    with pytest.raises(MethodError, match="count"):
        Bootstrapped(0)


def it_learns_to_segment() -> None:
    """Squares whose class is the colour of a far corner, by the network and its own loss."""
    random = torch.Generator().manual_seed(0)
    images = 0.1 * torch.randn(24, 3, 32, 32, generator=random)
    masks, kind = torch.zeros(24, 32, 32, dtype=torch.long), torch.arange(24) % 2
    images[:, 2, 12:22, 12:22] += 1
    images[kind == 1, 0, :6, :6] += 2
    masks[:, 12:22, 12:22] = 1 + kind[:, None, None]
    torch.manual_seed(0)
    model = FASSDNet(3, dilations=(1, 2, 3))
    train = pliant.Train(epochs=8, batch=8, lr=0.02, device="cpu")
    data = pliant.data.Data(train=(images, masks), val=(images, masks))
    report = pliant.compress(
        model,
        data,
        "fassd_net(only=('encoder.*',), width=0.5, between='nothing')",
        train=train,
        loss=Bootstrapped(256),
        task="segmentation",
    ).report
    before, after = (side.metrics["mIoU"] for side in (report.before, report.after))
    assert before is not None and after is not None and after > 0.6 > before
    assert report.after.params < report.before.params


CASES = [
    Case(
        "fassd_net",
        variants=(
            "fassd_net(between='nothing', width=0.5)",
            "fassd_net(exclude=('0',))",
            "fassd_net(refine=('3',), pyramid=('0',), reach=1)",
        ),
        refuses={
            name: "2-d convolutions" for name in ("signal", "volume", "linear", "transformer")
        },
        own=(
            parts_have_the_published_sizes,
            dense_blocks_read_powers_of_two_back,
            sizes_are_those_of_the_input,
            half_of_the_weights_see_as_far,
            separable_kernels_are_found,
            a_refinement_begins_as_the_identity,
            batch_norms_are_folded_but_the_first_of_a_refinement,
            what_cannot_be_done_is_refused,
            hard_positions_count,
            it_learns_to_segment,
        ),
    )
]
