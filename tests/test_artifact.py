"""The .pliant file: equal outputs bit for bit, and nothing loaded from a file that is not right."""

from __future__ import annotations

import ast
import copy
import errno
import hashlib
import io
import json
import os
import pickle
import random
import resource
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pliant import registry, zoo
from pliant.api import compress
from pliant.codecs import container
from pliant.data import Train
from pliant.edits import Edit, Factor, replay
from pliant.errors import ArtifactError, ModelError, OutputError
from pliant.files import artifact, manifest
from pliant.files.artifact import MANIFEST, WEIGHTS, Manifest, inspect, load, save
from pliant.math.forms import forms_for, max_ranks
from pliant.run import start
from pliant.surgery import select as layers


def tiny() -> nn.Sequential:
    """A small dense network, always the same one."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).eval()


EDITS: tuple[Edit, ...] = (Factor("0", "spatial", (3,)), Factor("4", "svd", (2,)))
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def compressed() -> nn.Sequential:
    model = tiny()
    replay(model, EDITS)
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save(tmp_path / "a.pliant", compressed(), EDITS, source="tiny", extra={"classes": [1]})


def random_edits(model: nn.Module, seed: int) -> tuple[Edit, ...]:
    """Factorize about two thirds of what can be factorized, in random forms and ranks."""
    choose, edits = random.Random(seed), []
    for name, layer in layers.factorizable(model)[0].items():
        shape = tuple(layer.weight.shape)
        if choose.random() < 0.67:
            form = choose.choice(forms_for(shape))
            ranks = tuple(choose.randint(1, most) for most in max_ranks(shape, form))
            edits.append(Factor(name, form, ranks))
    return tuple(edits)


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """Fill every tensor with noise: no two are alike, and none is what a fresh model has."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=noise) / max(1, tensor[0].numel()))
    return model.eval()


def same_tensors(model: nn.Module, other: nn.Module) -> bool:
    mine, others = model.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(
        value.dtype == others[name].dtype and torch.equal(value, others[name])
        for name, value in mine.items()
    )


@contextmanager
def refused(
    model: nn.Module, says: str | None = None
) -> Iterator[pytest.ExceptionInfo[ArtifactError]]:
    """Nothing but an ArtifactError may come out, and the model must be as it was."""
    before, parts = copy.deepcopy(model.state_dict()), [id(part) for part in model.modules()]
    owned = [id(parameter) for parameter in model.parameters()]
    with pytest.raises(ArtifactError, match=says) as caught:
        yield caught
    assert [id(part) for part in model.modules()] == parts
    assert [id(parameter) for parameter in model.parameters()] == owned
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", ["lenet5", "lenet5-wide", "resnet20", "resnet56", "vgg16-bn-half"])
def test_a_network_of_the_zoo_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = zoo.build(name)
    edits = random_edits(model, seed=len(name))
    replay(model, edits, weights=False)
    randomized(model, seed=0)
    path = save(tmp_path / "a.pliant", model, edits, source=name)
    back = load(path, zoo.build(name).eval())
    assert same_tensors(back, model) and inspect(path).edits == edits
    example = zoo.NETWORKS[name].example(2)
    with torch.no_grad():
        assert torch.equal(back(*example), model(*example))


def test_the_given_model_is_changed_in_place_and_keeps_its_parameters(file: Path) -> None:
    model = tiny().train()
    bias, norm = model[0].bias, model[1].weight
    back = load(file, model)
    assert back is model and back[0].rest.bias is bias and back[1].weight is norm
    assert all(part.training for part in back.modules())
    assert all(parameter.requires_grad for parameter in back.parameters())


def test_a_function_may_build_the_model(file: Path) -> None:
    assert same_tensors(load(file, tiny), compressed())


def test_a_model_that_cannot_be_copied_can_be_built(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model.stream = (value for value in ())
        return model  # type: ignore[no-any-return]

    model, edits = build(), [Factor("1", "svd", (2,))]
    replay(model, edits)
    path = save(tmp_path / "a.pliant", model, edits)
    with refused(other := build(), "pass the function that builds it"):
        load(path, other)
    assert same_tensors(load(path, build), model)


def test_without_a_model_the_message_names_what_it_was_made_from(file: Path) -> None:
    with pytest.raises(ArtifactError, match=r"needs the dense architecture.*\(tiny\)"):
        load(file)
    with pytest.raises(ArtifactError, match="not dict"):
        load(file, dict)  # type: ignore[arg-type]


def test_types_of_numbers_become_those_of_the_file(tmp_path: Path) -> None:
    model = compressed()
    model[0].bfloat16(), model[4].double()
    path = save(tmp_path / "a.pliant", model, EDITS)
    back = load(path, tiny())
    assert same_tensors(back, model)
    assert back[0].first.weight.dtype == torch.bfloat16
    assert back[4].expand.weight.dtype == torch.float64
    assert back[1].num_batches_tracked.dtype == torch.int64
    back[4](torch.randn(1, 64).double()).sum().backward()
    assert back[4].expand.weight.grad is not None


class Tied(nn.Module):
    """Embedding and decoder share one weight, as language models do."""

    def __init__(self, *, tie: bool = True) -> None:
        super().__init__()
        self.embed, self.middle = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.decode = nn.Linear(4, 7, bias=False)
        if tie:
            self.decode.weight = self.embed.weight
        self.register_buffer("window", torch.arange(6.0)[1:5].flip(0).expand(2, 4))
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


NORMS = [
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    parametrizations.orthogonal,
]


@pytest.mark.parametrize("norm", NORMS)
def test_parametrizations_of_the_dense_network_stay(norm: Any, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), norm(nn.Linear(16, 8)))

    inputs = torch.rand(32, 16)
    data, train = (inputs, torch.arange(32) % 8), Train(epochs=1, batch=8)
    result = compress(build(), data, "energy", "params=0.8", train=train)
    result.save(tmp_path / "a.pliant")
    for dense in (build, build()):
        model = load(tmp_path / "a.pliant", dense).eval()
        assert torch.equal(model(inputs), result.model(inputs))


def test_shared_tensors_are_stored_once_and_stay_shared(tmp_path: Path) -> None:
    model, edits = Tied(), (Factor("middle", "svd", (2,)),)
    replay(model, edits)
    path = save(tmp_path / "a.pliant", model, edits)
    assert inspect(path).aliases == {"embed.weight": "decode.weight"}
    fresh = Tied()
    fresh.window = fresh.window.contiguous()
    back = load(path, fresh)
    assert same_tensors(back, model) and back.decode.weight is back.embed.weight


def test_a_tied_model_does_not_take_two_tensors_for_one(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pliant", Tied(tie=False), ())
    with refused(model := Tied(), "one tensor in the model and two in the file"):
        load(path, model)


def test_the_manifest_says_what_is_inside(file: Path) -> None:
    found = inspect(file)
    assert isinstance(found, Manifest)
    assert found.source == "tiny" and found.extra == {"classes": [1]}
    assert found.edits == EDITS and found.version == 1
    assert found.tensors["0.first.weight"].shape == (3, 3, 3, 1)
    assert found.bytes == sum(t.nbytes for t in compressed().state_dict().values())
    with zipfile.ZipFile(file) as archive:
        assert found.sha256 == hashlib.sha256(archive.read(WEIGHTS)).hexdigest()


def test_inspect_leaves_the_weights_unread(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo(WEIGHTS).header_offset + 60
    data = bytearray(file.read_bytes())
    data[start : start + 50] = bytes(50)
    file.write_bytes(data)
    assert inspect(file).edits == EDITS
    with refused(model := tiny(), "damaged"):
        load(file, model)


def test_same_model_same_bytes(tmp_path: Path, file: Path) -> None:
    again = save(tmp_path / "b.pliant", compressed(), EDITS, source="tiny", extra={"classes": [1]})
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["lenet5-wide", "resnet20"])
def test_the_file_is_hardly_larger_than_the_tensors(name: str, tmp_path: Path) -> None:
    model = zoo.build(name)
    edits = random_edits(model, seed=3)
    replay(model, edits, weights=False)
    randomized(model, seed=0)
    path = save(tmp_path / "a.pliant", model, edits)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    tensors = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert path.stat().st_size <= tensors + 20_000
    assert path.stat().st_size <= len(buffer.getvalue())


def test_zeros_are_packed_and_noise_is_not(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(100, 100))
    noise = save(tmp_path / "noise.pliant", model, ())
    with torch.no_grad():
        model[0].weight[:90] = 0
    zeros = save(tmp_path / "zeros.pliant", model, ())
    assert noise.stat().st_size > 40_000 and zeros.stat().st_size < 10_000
    with zipfile.ZipFile(noise) as archive:
        assert archive.getinfo(WEIGHTS).compress_type == zipfile.ZIP_STORED
    assert same_tensors(load(zeros, nn.Sequential(nn.Linear(100, 100))), model)
    with torch.no_grad():
        model[0].weight[:], model[0].bias[:] = 0, 0
    nothing = save(tmp_path / "nothing.pliant", model, ())
    assert same_tensors(load(nothing, nn.Sequential(nn.Linear(100, 100))), model)


# ---------------------------------------------------------------- what is not written


def test_an_unfinished_model_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    run = start(model, registry.build("weightalign"), example=(torch.rand(1, 3, 8, 8),))
    with pytest.raises(ModelError, match=r"call run.finish\(\) before saving"):
        save(tmp_path / "a.pliant", model, run.edits)
    assert not list(tmp_path.iterdir())
    run.finish()
    save(tmp_path / "a.pliant", model, run.edits)


class Counting(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: nn.Sequential(Counting(2, 2)), "0._extra_state' is of type dict"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "complex64"),
        (lambda: nn.Linear(2, 2, device="meta"), "without data"),
    ],
)
def test_what_is_no_plain_tensor_is_refused(
    build: Callable[[], nn.Module], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=says):
        save(tmp_path / "a.pliant", build(), ())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extra", [{"a": float("nan")}, {"a": X}, {"a": {1, 2}}, {"a": print}])
def test_only_plain_data_goes_beside_the_weights(extra: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="extra must be plain data"):
        save(tmp_path / "a.pliant", tiny(), (), extra=extra)
    with pytest.raises(ArtifactError, match="keep less"):
        save(tmp_path / "a.pliant", tiny(), (), extra={"a": "x" * container.MANIFEST_LIMIT})
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_kind_is_not_replaced(tmp_path: Path, file: Path) -> None:
    text, empty = tmp_path / "keep.txt", tmp_path / "empty"
    text.write_text("three years")
    with pytest.raises(OutputError, match="keep.txt must be a new file or an earlier .pliant file"):
        save(text, tiny(), ())
    assert text.read_text() == "three years"
    empty.touch()
    for path in (file, empty):
        assert not inspect(save(path, tiny(), ())).edits


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, file: Path) -> None:
    """A limit on the size of files stops the write where a full disk would."""
    old, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OutputError, match="cannot be written"):
            save(file, nn.Linear(100, 100), ())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == old and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_write_that_ends_late_leaves_the_old_file(
    stop: BaseException, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise stop

    old = file.read_bytes()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError if isinstance(stop, OSError) else KeyboardInterrupt):
        save(file, tiny(), ())
    assert file.read_bytes() == old and list(file.parent.iterdir()) == [file]


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"No such file.*choose a folder that exists"):
        save(tmp_path / "missing" / "a.pliant", tiny(), ())
    (tmp_path / "folder.pliant").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        save(tmp_path / "folder.pliant", tiny(), ())
    (tmp_path / "plain").write_text("")
    with pytest.raises(OutputError):
        save(tmp_path / "plain" / "a.pliant", tiny(), ())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.pliant", "plain"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_an_output_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            save(tmp_path / "a.pliant", tiny(), ())
    finally:
        tmp_path.chmod(0o700)


# ---------------------------------------------------------------- another architecture


def test_another_architecture_is_refused_with_the_first_three_differences(file: Path) -> None:
    model = tiny()
    model[1], model[4] = nn.BatchNorm2d(5), nn.Linear(64, 6)
    with refused(model, r"1.bias is float32 \(4,\) in the file and float32 \(5,\)") as caught:
        load(file, model)
    message = str(caught.value)
    assert message.count(" in the model") == 3 and "and 3 more" in message and "(tiny)" in message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.append(nn.Linear(2, 2)), "5.bias is not in the file"),
        (lambda m: m.__delitem__(1), "edit that does not fit"),
        (lambda m: m.__setitem__(1, nn.Identity()), "1.bias is not in the model"),
        (lambda m: m.__setitem__(4, nn.Conv2d(3, 4, 3)), "has no svd form"),
        (lambda m: m.__setitem__(4, nn.Linear(64, 5, bias=False)), "4.expand.bias is not in the m"),
        (lambda m: m[1].register_buffer("running_mean", torch.zeros(4).int()), "int32"),
        (lambda m: replay(m, EDITS), "edit that does not fit"),
        (lambda m: m.__setitem__(4, Counting(64, 5)), "Counting computes something else"),
        (lambda m: m.append(Counting(2, 2)), "5._extra_state is not in the file"),
        (lambda m: m.__setitem__(2, nn.LazyLinear(4)), "run the model once"),
    ],
)
def test_a_model_that_differs_in_any_way_is_refused(
    change: Callable[[nn.Sequential], object], says: str, file: Path
) -> None:
    model = tiny()
    change(model)
    with pytest.raises(ArtifactError, match=says):
        load(file, model)
    if not any(isinstance(part, nn.LazyLinear | Counting) for part in model):
        with refused(model):
            load(file, model)


def test_a_model_without_memory_is_refused(file: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(*tiny())
    with pytest.raises(ArtifactError, match="meta device"):
        load(file, model.to("meta"))


# ---------------------------------------------------------------- damaged files


def test_a_file_cut_off_anywhere_is_refused(file: Path) -> None:
    data, model = file.read_bytes(), tiny()
    with refused(model):
        for length in (*range(0, 80), *range(80, len(data), 61), *range(len(data) - 80, len(data))):
            file.write_bytes(data[:length])
            with pytest.raises(ArtifactError):
                inspect(file)
            with pytest.raises(ArtifactError, match="cut off"):
                load(file, model)
        load(file, model)


def test_a_flipped_bit_never_goes_unseen(file: Path) -> None:
    """Either the file is refused or, where the bit has no meaning, everything is as written."""
    data, model, wanted = bytearray(file.read_bytes()), tiny(), compressed()
    before, choose, harmless = tiny(), random.Random(0), 0
    second = data.index(b"PK\3\4", 4)
    edges = (*range(0, 60), *range(second, second + 70), *range(len(data) - 220, len(data)))
    for position in {*edges, *range(60, len(data), 29)}:
        bit = 1 << choose.randrange(8)
        data[position] ^= bit
        file.write_bytes(data)
        data[position] ^= bit
        try:
            load(file, model)
        except ArtifactError:
            assert same_tensors(model, before)
        else:
            assert same_tensors(model, wanted)
            model, harmless = tiny(), harmless + 1
    assert harmless < 100  # dates, versions, attributes and the local copies of sizes


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bytes_written_over_never_give_another_model(data: st.DataObject, file: Path) -> None:
    original = file.read_bytes()
    start = data.draw(st.integers(0, len(original) - 1))
    over = data.draw(st.binary(min_size=1, max_size=40))
    spoiled = (original[:start] + over + original[start + len(over) :])[: len(original)]
    other, model = file.with_name("spoiled.pliant"), tiny()
    other.write_bytes(spoiled)
    try:
        load(other, model)
    except ArtifactError:
        assert same_tensors(model, tiny())
    else:
        assert same_tensors(model, compressed())


@pytest.mark.parametrize("junk", [b"", b"PK", b"\0" * 5000, b"PK\5\6" + b"\0" * 18, b"{}" * 40])
def test_what_is_no_archive_is_refused(junk: bytes, file: Path) -> None:
    file.write_bytes(junk)
    with refused(model := tiny(), "fetch or write it again|comes from elsewhere"):
        load(file, model)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="There is no file"):
        inspect(tmp_path / "a.pliant")
    with pytest.raises(ArtifactError, match="cannot be read"):
        inspect(tmp_path)


# ---------------------------------------------------------------- malicious files


def members(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def forge(
    file: Path, parts: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED
) -> None:
    """Write a well-formed zip of any members in the place of a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same name twice
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in parts:
                archive.writestr(zipfile.ZipInfo(name), data, compression)


def reword(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and leave the rest as it was."""
    parts = members(file)
    manifest = json.loads(parts[MANIFEST])
    changed = change(manifest)
    text = json.dumps(manifest if changed is None else changed)
    forge(file, [(MANIFEST, text.encode()), (WEIGHTS, parts[WEIGHTS])])


def test_a_forged_file_without_changes_loads(file: Path) -> None:
    """The tools of this section do no harm of their own."""
    reword(file, lambda manifest: None)
    assert same_tensors(load(file, tiny()), compressed())


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize(
    "names",
    [
        ["../../evil.json", WEIGHTS],
        ["/etc/passwd", WEIGHTS],
        [MANIFEST, "..\\" + WEIGHTS],
        [WEIGHTS, MANIFEST],
        [MANIFEST, MANIFEST],
        [WEIGHTS, WEIGHTS],
        [MANIFEST, "weights.pkl"],
        [MANIFEST],
        [MANIFEST, WEIGHTS, "data.pkl"],
        [MANIFEST, WEIGHTS, WEIGHTS],
        [MANIFEST, WEIGHTS, "folder/"],
        ["word/document.xml", "[Content_Types].xml"],
        [f"{i}" for i in range(500)],
    ],
    ids=lambda names: ",".join(names)[:40].replace("\0", "0"),
)
def test_other_members_than_ours_are_refused(names: list[str], file: Path) -> None:
    parts = members(file) | {"data.pkl": pickle.dumps(Bomb())}
    forge(file, [(name, parts.get(name, parts["data.pkl"])) for name in names])
    with refused(model := tiny(), "comes from elsewhere"):
        load(file, model)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickled_checkpoint_is_never_opened(new: bool, file: Path) -> None:
    torch.save({"a": Bomb()}, file, _use_new_zipfile_serialization=new)
    with refused(model := tiny(), "never opened|no .pliant file"):
        load(file, model)
    forge(file, [(MANIFEST, members_of_good()[MANIFEST]), (WEIGHTS, pickle.dumps(Bomb()))])
    with refused(model):
        load(file, model)


def members_of_good() -> dict[str, bytes]:
    weights = safetensors.torch.save(compressed().state_dict())
    manifest = {
        **{"format": "pliant", "version": 1, "pliant": "0", "source": None, "extra": {}},
        **{"aliases": {}, "sha256": hashlib.sha256(pickle.dumps(Bomb())).hexdigest()},
        "edits": [
            {"edit": "factor", "layer": "0", "form": "spatial", "ranks": [3]},
            {"edit": "factor", "layer": "4", "form": "svd", "ranks": [2]},
        ],
        "tensors": {
            name: {"shape": list(t.shape), "dtype": str(t.dtype)[6:]}
            for name, t in compressed().state_dict().items()
        },
    }
    return {MANIFEST: json.dumps(manifest).encode(), WEIGHTS: weights}


def test_a_bomb_is_refused_before_it_is_unpacked(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = members(file)
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda *_: pytest.fail("it was read"))
    bomb = b"\0" * 10**8
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST, bomb)
        archive.writestr(WEIGHTS, parts[WEIGHTS])
    with refused(model := tiny(), "manifest.json that unpacks to 100,000,000 bytes"):
        load(file, model)
    with pytest.raises(ArtifactError, match="100,000,000"):
        inspect(file)


def test_weights_that_unpack_to_more_than_the_model_holds_are_refused(file: Path) -> None:
    parts = members(file)
    forge(file, [(MANIFEST, parts[MANIFEST]), (WEIGHTS, b"\0" * 10**8)], zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 200_000
    with refused(model := tiny(), r"has 100,000,000 bytes of weights.safetensors where"):
        load(file, model)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_packings_are_refused(method: int, file: Path) -> None:
    parts = members(file)
    forge(file, list(parts.items()), method)
    with refused(model := tiny(), "foreign member"):
        load(file, model)


@pytest.mark.parametrize("claim", [10**5, 2**32 - 2, 0])
def test_a_member_that_lies_about_its_size_is_refused(claim: int, file: Path) -> None:
    parts = list(members(file).items())
    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        forge(file, parts, packing)
        data = bytearray(file.read_bytes())
        first, second = data.index(b"PK\1\2"), data.rindex(b"PK\1\2")
        for place in (first + 20, first + 24, second + 20, second + 24):  # packed size, size
            spoiled = bytearray(data)
            spoiled[place : place + 4] = struct.pack("<L", claim)
            file.write_bytes(spoiled)
            with refused(model := tiny()):
                load(file, model)


def test_a_name_that_hides_its_end_is_refused(file: Path) -> None:
    data = file.read_bytes().replace(b"safetensors", b"safe\0ensors")
    assert data.count(b"\0ensors") == 2
    file.write_bytes(data)
    with refused(model := tiny(), "comes from elsewhere"):
        load(file, model)


def test_members_that_share_their_bytes_are_refused(file: Path) -> None:
    data = bytearray(file.read_bytes())
    entry = data.rindex(b"PK\1\2")
    data[entry + 42 : entry + 46] = struct.pack("<L", 0)
    file.write_bytes(data)
    with refused(model := tiny()):
        load(file, model)


@pytest.mark.parametrize("prefix", [b"#!/bin/sh\n", b"PK\3\4"])
def test_bytes_around_the_archive_are_refused(prefix: bytes, file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(prefix + data)
    with refused(model := tiny()):
        load(file, model)
    file.write_bytes(data + prefix)
    with refused(model, "cut off"):
        load(file, model)


def factor(**changes: Any) -> dict[str, Any]:
    return {"edit": "factor", "layer": "0", "form": "spatial", "ranks": [3]} | changes


WORDS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda m: m.update(version=3), "update pliant"),
    (lambda m: m.update(version=2), "fields"),
    (lambda m: m.update(version=10**30), "update pliant"),
    (lambda m: m.update(version=0), "fields"),
    (lambda m: m.update(version=True), "fields"),
    (lambda m: m.update(version="1"), "fields"),
    (lambda m: m.update(format="torch"), "comes from elsewhere"),
    (lambda m: [m], "comes from elsewhere"),
    (lambda m: "pliant", "comes from elsewhere"),
    (lambda m: m.pop("sha256") and None, "fields"),
    (lambda m: m.update(run="import os"), "fields"),
    (lambda m: m.update(source=["os", "system"]), "source"),
    (lambda m: m.update(pliant=None), "versions"),
    (lambda m: m.update(extra=[]), "source"),
    (lambda m: m.update(sha256="0" * 64), "damaged"),
    (lambda m: m.update(aliases={"a": "b"}), "aliases"),
    (lambda m: m.update(aliases={"0.rest.bias": "0.rest.bias"}), "aliases"),
    (lambda m: m.update(aliases=[["a", "b"]]), "aliases"),
    (lambda m: m.update(aliases={"9.bias": "0.rest.bias"}), "9.bias is not in the model"),
    (lambda m: m.update(edits=None), "must be a list"),
    (lambda m: m.update(edits=[factor()] * 20_000), "20,000 edits, more"),
    (lambda m: m.update(edits=[factor(edit="exec")]), "Unknown edit 'exec'"),
    (lambda m: m.update(edits=[factor(edit="__reduce__")]), "Unknown edit"),
    (lambda m: m.update(edits=[factor(kernels=[1])]), "takes form, layer, ranks"),
    (lambda m: m.update(edits=[{"edit": "factor"}]), "takes form, layer, ranks"),
    (lambda m: m.update(edits=[factor(ranks=[10**12])]), "do not fit"),
    (lambda m: m.update(edits=[factor(ranks=[10**400])]), "do not fit"),
    (lambda m: m.update(edits=[factor(ranks=[-3])]), "do not fit"),
    (lambda m: m.update(edits=[factor(ranks=[1e12])]), "ranks of the edit"),
    (lambda m: m.update(edits=[factor(ranks="3")]), "ranks of the edit"),
    (lambda m: m.update(edits=[factor(layer="__class__")]), "no layer"),
    (lambda m: m.update(edits=[factor(layer="0.forward")]), "no layer"),
    (lambda m: m.update(edits=[factor(layer="")]), "cannot be factorized"),
    (lambda m: m.update(edits=[]), "another architecture"),
    (lambda m: m["edits"].reverse(), "damaged|^$"),
    (lambda m: m["tensors"].clear(), "is not in the file"),
    (lambda m: m.update(tensors=[]), "tensors"),
    (lambda m: m["tensors"].update(x=3), "tensors"),
    (lambda m: m["tensors"]["1.bias"].update(offset=3), "tensors"),
    (lambda m: m["tensors"]["1.bias"].update(shape=4), "tensors"),
    (lambda m: m["tensors"]["1.bias"].update(shape=[4.0]), "shapes"),
    (lambda m: m["tensors"]["1.bias"].update(shape=[-4]), "shapes"),
    (lambda m: m["tensors"]["1.bias"].update(shape=[10**18]), "shapes"),
    (lambda m: m["tensors"]["1.bias"].update(shape=[2**40] * 9), "another architecture"),
    (lambda m: m["tensors"]["1.bias"].update(shape=[2, 2]), "another architecture"),
    (lambda m: m["tensors"]["1.bias"].update(shape=[5]), "another architecture"),
    (lambda m: m["tensors"]["1.bias"].update(dtype="object"), "types of numbers"),
    (lambda m: m["tensors"]["1.bias"].update(dtype=["float32"]), "types of numbers"),
    (lambda m: m["tensors"]["1.bias"].update(dtype="int32"), "another architecture"),
    (lambda m: m["tensors"]["1.bias"].update(dtype="float16"), "damaged"),
]


@pytest.mark.parametrize(("change", "says"), WORDS, ids=range(len(WORDS)))
def test_a_manifest_that_says_something_else_is_refused(
    change: Callable[[dict[str, Any]], Any], says: str, file: Path
) -> None:
    reword(file, change)
    if says == "damaged|^$":  # the order of independent edits does not matter
        assert same_tensors(load(file, tiny()), compressed())
        return
    with refused(model := tiny(), says):
        load(file, model)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "damaged"),
        (b"\xff\xfe{}", "damaged"),
        (b"{'format': 'pliant'}", "damaged"),
        (b'{"format": "pliant", "version": NaN}', "NaN, which is not a number"),
        (b'{"format": "pliant", "version": -Infinity}', "-Infinity, which is not"),
        (b'{"format": "pliant", "version": 1e999}', "1e999, which is not"),
        (b'{"format": "pliant", "format": "pliant"}', "stands twice"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b'{"a":' * 100_000, "damaged"),
        (b"[" * 100_000 + b"]" * 100_000, "damaged"),
    ],
    ids=range(11),
)
def test_json_that_is_not_plain_is_refused(text: bytes, says: str, file: Path) -> None:
    forge(file, [(MANIFEST, text), (WEIGHTS, members(file)[WEIGHTS])])
    with refused(model := tiny(), says):
        load(file, model)
    with pytest.raises(ArtifactError, match=says):
        inspect(file)


def test_edits_nested_without_end_are_refused(tmp_path: Path) -> None:
    """Every factor can be factorized again: the names would grow until Python gives up."""
    edits = [Factor("0" + ".reduce" * depth, "svd", (2,)) for depth in range(600)]
    for some in (edits, edits[::20]):
        path = save(tmp_path / "a.pliant", nn.Sequential(nn.Linear(2, 2)), some)
        with refused(model := nn.Sequential(nn.Linear(2, 2)), "edits, more or deeper ones"):
            load(path, model)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.__delitem__("1.bias"),
        lambda t: t.update(more=torch.zeros(1)),
        lambda t: t.update({"1.bias": torch.zeros(4, 1)}),
        lambda t: t.update({"1.bias": torch.zeros(4, dtype=torch.float16)}),
        lambda t: t.update({"1.bias": torch.zeros(4, dtype=torch.complex64)}),
    ],
)
def test_weights_other_than_the_manifest_lists_are_refused(
    change: Callable[[dict[str, Tensor]], Any], file: Path
) -> None:
    parts = members(file)
    tensors = safetensors.torch.load(parts[WEIGHTS])
    change(tensors)
    weights = safetensors.torch.save(tensors)
    manifest = json.loads(parts[MANIFEST]) | {"sha256": hashlib.sha256(weights).hexdigest()}
    forge(file, [(MANIFEST, json.dumps(manifest).encode()), (WEIGHTS, weights)])
    with refused(model := tiny(), "damaged"):
        load(file, model)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: struct.pack("<Q", 2**63) + w[8:],
        lambda w: struct.pack("<Q", len(w)) + w[8:],
        lambda w: w[:8] + b"[" * 50 + w[58:],
        lambda w: w.replace(b'"F32"', b'"F99"'),
        lambda w: w.replace(b'"F32"', b'"I32"'),
        lambda w: w.replace(b'"data_offsets":[', b'"data_offsets":[9'),
        lambda w: bytes(len(w)),
    ],
    ids=range(7),
)
def test_hostile_safetensors_are_refused(spoil: Callable[[bytes], bytes], file: Path) -> None:
    parts = members(file)
    weights = spoil(parts[WEIGHTS])
    manifest = json.loads(parts[MANIFEST]) | {"sha256": hashlib.sha256(weights).hexdigest()}
    forge(file, [(MANIFEST, json.dumps(manifest).encode()), (WEIGHTS, weights)])
    with refused(model := tiny(), "damaged"):
        load(file, model)


# ---------------------------------------------------------------- nothing is executed


def test_loading_needs_neither_pickle_nor_torch_load(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        pytest.fail("a file was unpickled")

    for owner, name in (
        (pickle, "Unpickler"),
        (pickle, "load"),
        (pickle, "loads"),
        (torch, "load"),
    ):
        monkeypatch.setattr(owner, name, fail)
    assert same_tensors(load(file, tiny()), compressed())


@pytest.mark.parametrize("module", [artifact, container, manifest])
def test_the_source_has_no_way_to_run_what_it_reads(module: Any) -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                for alias in node.names}  # fmt: skip
    imported |= {f"{node.module}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "importlib", "runpy", "marshal", "shelve", "dill"}
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    forbidden = {"eval", "exec", "compile", "__import__", "torch.load", "getattr", "require"}
    assert not called & forbidden
    assert not any(name.endswith(("extract", "extractall", "import_module")) for name in called)
