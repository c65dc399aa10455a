import io
from pathlib import Path

import pytest
import torch
from conftest import needs_data
from safetensors.torch import save_file
from torch import nn

from pliant import zoo
from pliant.errors import ModelError
from pliant.zoo.quadratic import QuadraticBlock

BOTTLENECKS = [  # inputs, outputs and side of the 22 kernels
    *((3, 16, 3), (16, 16, 1), (16, 16, 3), (16, 64, 1), (16, 64, 1)),
    *((64, 16, 1), (16, 16, 3), (16, 64, 1)),
    *((64, 64, 1), (64, 64, 3), (64, 128, 1), (64, 128, 1)),
    *((128, 64, 1), (64, 64, 3), (64, 128, 1)),
    *((128, 128, 1), (128, 128, 3), (128, 256, 1), (128, 256, 1)),
    *((256, 128, 1), (128, 128, 3), (128, 256, 1)),
]
LARGE = ("cqnn-alexnet", "cqnn-resnet20")  # tens of billions of products for one image
PARAMETERS = {
    "lenet5": 61_706,
    "lenet5-wide": 602_266,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "vgg16-bn": 14_987_722,
    "resnet18-cifar": 11_173_962,
    "resnet18": 11_689_512,
    "dran-x2": 1_477_205,
    "dran-x3": 1_661_845,
    "dran-x4": 1_624_917,
    "stdtnn": 16 * (5 + 5) + 4 * 16 + 4 + 2 * 3 * 3,
    "alexnet-cifar": 65_568 + 2_102_794,
    "cqnn-alexnet": 29_350_560 + 2_102_794,
    "cqnn-resnet20": 128_028_672 + 2 * 688 + 650,
    "resnet20-v2": 570_602,
    "bm-resnet20": 570_602 + sum(i * o * k * k for i, o, k in BOTTLENECKS),
    "fassd-net": 2_845_351,
    "fassd-net-l1": 2_845_351,
    "fassd-net-l2": 2_289_454,
}


@pytest.mark.parametrize("name", [name for name in zoo.NETWORKS if name not in LARGE])
def test_builds_and_runs(name: str) -> None:
    network, model = zoo.NETWORKS[name], zoo.build(name, classes=7).eval()
    with torch.no_grad():
        out = model(*network.example(2 if network.input[-1] < 100 else 1))
    assert out.shape[1] == 7
    assert out.isfinite().all()


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameters_are_the_published_ones(name: str, count: int) -> None:
    with torch.device("meta"):
        model = zoo.NETWORKS[name].build(zoo.NETWORKS[name].classes)
    assert sum(p.numel() for p in model.parameters()) == count


def test_quadratic_networks_compute_what_their_layers_do() -> None:
    """Those of one block: the sign, ELU behind it, and a quadratic shortcut without a norm."""
    torch.manual_seed(0)
    block, x = QuadraticBlock(2, 3, 2).eval(), torch.rand(2, 2, 6, 6)
    middle = nn.functional.elu(block.bn1(block.conv1(x)))
    wanted = nn.functional.elu(block.bn2(block.conv2(middle)) + block.shortcut(x))  # type: ignore[operator]
    assert torch.equal(block(x), wanted)
    assert block.shortcut.kernel_size == (1, 1) and block.shortcut.stride == (2, 2)  # type: ignore[union-attr]
    assert isinstance(QuadraticBlock(3, 3, 1).shortcut, nn.Identity)


def test_the_bottlenecks_are_those_of_the_list() -> None:
    model = zoo.build("resnet20-v2")
    found = [m.weight.shape for m in model.modules() if isinstance(m, nn.Conv2d)]
    listed = [(o, i, k, k) for i, o, k in BOTTLENECKS]
    assert sorted(map(tuple, found)) == sorted(listed) and len(found) == 22
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))
    kinds = [type(m).__name__ for m in zoo.build("bm-resnet20").modules()]
    assert kinds.count("BMConv2d") == 22 and "Conv2d" not in kinds


def test_wide_lenet_holds_the_kernel_of_the_paper() -> None:
    kernel = zoo.build("lenet5-wide").get_parameter("extra.weight")
    assert kernel.shape == (256, 128, 3, 3)


def test_half_width() -> None:
    model = zoo.build("vgg16-bn-half")
    assert model.get_parameter("features.0.weight").shape == (32, 3, 3, 3)
    assert model.get_parameter("classifier.0.weight").shape == (256, 256)


def test_zero_padded_shortcut_by_hand() -> None:
    block = zoo.resnet_cifar.Block(2, 4, 2).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 4, 4)
    out = block(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3]].any()


@pytest.mark.parametrize("name", ["lenet5-wide", "resnet20", "resnet18-cifar"])
def test_traces_and_exports(name: str) -> None:
    model, example = zoo.build(name).eval(), zoo.NETWORKS[name].example(2)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(*example), model(*example))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, example, dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(*example), model(*example))


def test_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(ModelError, match="resnet20"):
        zoo.build("resnet-20")
    with pytest.raises(ModelError, match="at least 1 class"):
        zoo.build("lenet5", classes=0)


def test_weights_round_trip(tmp_path: Path) -> None:
    first = zoo.build("resnet20")
    state = {k: v for k, v in first.state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "w.safetensors")
    second = zoo.build("resnet20", weights=tmp_path / "w.safetensors")
    x = zoo.NETWORKS["resnet20"].example(2)
    assert torch.equal(first.eval()(*x), second.eval()(*x))
    with pytest.raises(ModelError, match="number of classes"):
        zoo.build("resnet20", classes=5, weights=tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="misses 'layer1.3.conv1.weight'"):
        zoo.build("resnet32", weights=tmp_path / "w.safetensors")
    save_file(state | {"other": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ModelError, match="foreign tensor 'other'"):
        zoo.build("resnet20", weights=tmp_path / "more.safetensors")


def test_pickles_and_broken_files_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(zoo.build("lenet5").state_dict(), buffer)
    for name in ("w.pt", "w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(buffer.getvalue())
    with pytest.raises(ModelError, match="pickled checkpoint can run code"):
        zoo.build("lenet5", weights=tmp_path / "w.pt")
    with pytest.raises(ModelError, match="must be a readable safetensors file"):
        zoo.build("lenet5", weights=tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="no weights file"):
        zoo.build("lenet5", weights=tmp_path / "absent.safetensors")


@pytest.mark.data
@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_published_weights_load_as_they_are(depth: int) -> None:
    weights = needs_data("pretrained") / f"resnet{depth}-cifar10.safetensors"
    zoo.build(f"resnet{depth}", weights=weights)
