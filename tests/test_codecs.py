"""Coded tensors: equal to the last bit, as small as promised, and safe to read from anywhere."""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import scipy.sparse
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from pliant.codecs import address_map, ans, huffman, loops, packing, tensors
from pliant.codecs.address_map import ALL, FORMS, csc, decode, encode, paper_size, predict, smallest
from pliant.edits import Quantize, from_json, replay, to_json
from pliant.edits.encode import Encode, encoding
from pliant.errors import ArtifactError, EditError
from pliant.families.code.sharing import draw, mask, representatives
from pliant.files import artifact
from pliant.methods.code.hac import HAC, WHOLE
from pliant.nn import coded
from pliant.run import start
from tests.counts import calls, most
from tests.test_artifact import refused

HEAD = 16  # bytes


def shared(shape: tuple[int, int], level: float, values: int = 32, seed: int = 0) -> torch.Tensor:
    """Gaussian weights, pruned and rounded to quantiles, as the paper makes them."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random)
    kept = mask(weight, level)
    levels = representatives(weight * kept, values)
    return levels[draw(weight * kept, levels, random)] * kept + 0.0


def some() -> dict[str, np.ndarray[Any, Any]]:
    """Matrices (outputs, inputs) that a coder may stumble over."""
    column = shared((40, 30), 0.5).numpy()
    column[7] = 0
    return {
        "pruned": shared((50, 70), 0.9).numpy(),
        "shared": shared((50, 70), 0.0).numpy(),
        "a column of zeros": column,
        "nothing but zeros": np.zeros((9, 11), np.float32),
        "one value": np.full((13, 5), 2.5, np.float32),
        "one number": np.ones((1, 1), np.float32),
        "less than a word": np.array([[1, 2, 1]], np.float32),
        "many inputs": shared((3, 300), 0.9).numpy(),
        "few inputs": shared((300, 3), 0.9).numpy(),
    }


def bits(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return matrix.view(f"<u{matrix.itemsize}")


@pytest.fixture(params=["plain", "compiled"])
def both_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Once as Python, once as numba compiles it."""
    monkeypatch.setattr(loops, "WORTH", 0 if request.param == "compiled" else 1 << 60)
    yield


# ---------------------------------------------------------------- there and back


@pytest.mark.slow  # the first use compiles
@pytest.mark.parametrize("form", ALL)
def test_every_matrix_comes_back(form: str, both_loops: None) -> None:
    for name, matrix in some().items():
        data, flat = encode(bits(matrix), form), bits(matrix)
        assert (decode(data, matrix.shape, 4) == flat).all(), name
        pieces = list(address_map.blocks(data, matrix.shape, 4, 4))
        assert [len(piece) for piece in pieces[:-1]] == [4] * (len(pieces) - 1), name
        assert (np.concatenate(pieces) == flat).all(), name


@pytest.mark.parametrize("form", ALL)
def test_a_product_from_the_code_is_the_product(form: str) -> None:
    for matrix in some().values():
        x = np.random.default_rng(0).normal(size=(4, matrix.shape[1])).astype(np.float32)
        blocks = address_map.blocks(encode(bits(matrix), form), matrix.shape, 4, 2)
        found = np.concatenate([x @ block.view(np.float32).T for block in blocks], axis=1)
        assert np.allclose(found, x @ matrix.T, rtol=1e-5, atol=1e-5)


def test_sparse_parts_are_those_of_scipy() -> None:
    for matrix in some().values():
        data, rows, counts = csc(matrix)
        other = scipy.sparse.csc_matrix(matrix.T)  # the paper's W has a row per input
        assert (data == other.data).all() and (rows == other.indices).all()
        assert (counts == np.diff(other.indptr)).all()
        assert rows.itemsize == counts.itemsize == (1 if matrix.shape[1] < 256 else 2)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.int8, torch.bool]
)
def test_every_type_comes_back(dtype: torch.dtype) -> None:
    tensor = shared((6, 50), 0.8, 8).reshape(6, 5, 10).to(dtype)
    data = tensors.pack(tensor, "auto")
    assert data is not None and len(data) < tensor.nbytes
    back = tensors.unpack(data, tensor.shape, dtype)
    assert back.dtype == dtype and torch.equal(back.float(), tensor.float())


def test_bit_patterns_come_back() -> None:
    """Negative zeros and numbers that are none."""
    tensor = torch.tensor([0.0, -0.0, torch.nan, torch.inf] * 40).reshape(4, 40)
    tensor.view(torch.int32)[0, 2] += 1  # another pattern that is not a number
    for form in ALL:
        data = encode(tensors.patterns(tensor), form)
        back = tensors.unpack(data, tensor.shape, tensor.dtype)
        assert torch.equal(back.view(torch.int32), tensor.view(torch.int32))


def test_a_mask_takes_a_bit_for_each_number_and_those_that_are_not_zero() -> None:
    """Numbers may all differ, and be more than a dictionary holds; noise is not coded."""
    noise = torch.randn(300, 1001)
    sparse = torch.where(torch.rand(300, 1001) < 0.5, noise, 0.0)
    data = address_map.smallest(tensors.patterns(sparse), ("mask",))
    assert data is not None and address_map.form_of(data) == "mask"
    numbers = int((sparse != 0).sum())
    assert len(data) == HEAD + 300 * 126 + 4 * numbers
    assert len(data) == address_map.masked_size(numbers, (300, 1001), 4)
    assert torch.equal(tensors.unpack(data, sparse.shape, sparse.dtype), sparse)
    assert address_map.smallest(tensors.patterns(noise), ("mask",)) is None


def test_noise_and_nothing_are_not_coded() -> None:
    for tensor in (torch.randn(100, 100), torch.empty(0), torch.empty(0, 3), torch.tensor(3)):
        assert tensors.pack(tensor, "auto") is None


# ---------------------------------------------------------------- Huffman


def independent(counts: list[int]) -> int:
    """The length of the stream: the sum of all inner nodes of a Huffman tree."""
    heap, total = sorted(counts), 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        heapq.heappush(heap, merged)
        total += merged
    return total or sum(counts)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=300))
def test_no_prefix_code_is_shorter(counts: list[int]) -> None:
    found = huffman.lengths(np.array(counts))
    total, number = int(np.array(counts) @ found.astype(np.int64)), sum(counts)
    assert total == independent(counts)
    entropy = -sum(c * math.log2(c / number) for c in counts)
    assert entropy - 1e-6 * number <= total
    assert total < entropy + number or len(counts) == 1
    huffman.check(np.sort(found))


def test_long_codewords_are_cut() -> None:
    """Counts like Fibonacci's make the longest codewords there are."""
    counts = [1, 1]
    while len(counts) < 40:
        counts.append(counts[-1] + counts[-2])
    assert huffman._depths(np.array(counts)).max() == 39
    for limit in (32, 8, 6):
        found = huffman.lengths(np.array(counts), limit)
        assert found.max() <= limit
        huffman.check(np.sort(found))


def test_a_stream_by_hand() -> None:
    """a a b c a with lengths 1, 2, 2: 0 0 10 11 0, first bit first, filled up with zeros."""
    matrix = np.array([[5, 5, 6, 7, 5]], np.uint8)
    data = encode(matrix, "hac")
    assert data == bytes([1, 1, 0, 0, *[1, 0, 0, 0], *[5, 0, 0, 0], *[3, 0, 0, 0]]) + bytes(
        [5, 6, 7, *[1, 2, 2], 0b00101100, *[0] * 7]
    )
    sparse = encode(np.array([[0, 9, 0], [9, 9, 0]], np.uint8), "shac")
    assert sparse[HEAD:] == bytes([9, 1, *[1, 2], *[1, 0, 1], *[0] * 8])


def test_what_the_paper_counts_by_hand() -> None:
    """Codes of 1, 2 and 2 bits: strings with their ends take 2 + 3 + 3, then 12 for each symbol."""
    matrix = bits(np.array([[5, 5, 6, 7, 5]], np.float32))
    assert paper_size(matrix, "hac") == 8 + 3 * 12 + 8
    assert paper_size(bits(np.array([[0, 9, 0], [9, 9, 0]], np.float32)), "shac") == 14 + 8 + 3 + 2


@pytest.mark.parametrize("level", [0.0, 0.8, 0.97, 0.99])
def test_sizes_and_the_crossover(level: float) -> None:
    """512 x 512 Gaussians in 32 quantiles: sizes as counted, and who is smaller when."""
    weight = shared((512, 512), level)
    matrix, whole = tensors.patterns(weight), weight.nbytes
    real = {form: len(encode(matrix, form)) for form in ("hac", "shac")}
    for form, size in real.items():
        assert size == pytest.approx(paper_size(matrix, form), rel=0.02 if level < 0.99 else 0.05)
    assert real["hac"] >= whole / 32
    assert (real["shac"] < real["hac"]) == (level >= 0.97)
    if level == 0.99:
        assert whole >= 100 * real["shac"]


@pytest.mark.parametrize("level", [0.0, 0.9, 1.0])
def test_sizes_are_known_before_coding(level: float) -> None:
    matrix = bits(shared((60, 90), min(level, 0.999)).numpy() * (level < 1))
    symbols, counts = np.unique(matrix, return_counts=True)
    zeros = int(counts[0]) if symbols[0] == 0 else 0
    others = counts[1:] if zeros else counts
    for form in FORMS:
        size = len(encode(matrix, form))
        expected = predict(others, zeros, matrix.shape, 4, form)
        assert size <= expected <= size + (16 if form == "ans" else 0)


def test_ans_comes_close_to_the_entropy_and_to_another_coder() -> None:
    constriction = pytest.importorskip("constriction")
    index = np.random.default_rng(0).geometric(0.8, 300_000).clip(max=20).astype(np.int32) - 1
    counts = np.bincount(index)
    entropy = -float(counts @ np.log2(counts / len(index))) / 8
    size = len(encode(index.astype(np.uint8).reshape(300, -1), "ans"))
    model = constriction.stream.model.Categorical(counts / len(index), perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(index, model)
    assert entropy <= size <= 1.01 * entropy
    assert size <= 1.01 * coder.get_compressed().nbytes
    assert size < 0.95 * len(encode(index.astype(np.uint8).reshape(300, -1), "hac"))


def test_small_integers_are_worth_coding() -> None:
    """Codes of int8, as quantization leaves them: normal, with most near zero."""
    codes = (torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 12).round()
    found = tensors.pack(codes.clamp(-127, 127).to(torch.int8), "auto")
    assert found is not None and len(found) < 0.76 * codes.numel()


# ---------------------------------------------------------------- bytes from anywhere


@pytest.mark.parametrize("form", ALL)
def test_a_cut_code_is_refused(form: str) -> None:
    matrix = bits(shared((20, 40), 0.7, 8).numpy())
    data = encode(matrix, form)
    for length in range(len(data)):
        with pytest.raises(ArtifactError, match=r"\.$"):
            decode(data[:length], matrix.shape, 4)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damage_gives_an_error_or_a_matrix(data: st.DataObject) -> None:
    """Without a checksum: never a hang, an overrun, or another kind of error."""
    matrix = bits(shared((20, 40), 0.7, 8).numpy())
    good = encode(matrix, data.draw(st.sampled_from(ALL)))
    start = data.draw(st.integers(0, len(good) - 1))
    over = data.draw(st.binary(min_size=1, max_size=12))
    bad = good[:start] + over + good[start + len(over) :]
    compiled = data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops, "WORTH", 0 if compiled else 1 << 60)
        try:
            found = decode(bad, matrix.shape, 4)
        except ArtifactError:
            return
    assert found.shape == matrix.shape


@pytest.mark.parametrize("form", ALL)
def test_huge_claims_are_refused_at_once(form: str) -> None:
    """A claim of billions costs no more calls and bytes than what is really there."""
    matrix = bits(shared((20, 40), 0.7, 8).numpy())
    data = bytearray(encode(matrix, form))

    def tried(held: bytes) -> bool:
        try:
            decode(held, matrix.shape, 4)
        except ArtifactError:
            return False
        return True

    tried(bytes(data))  # imports
    steps, held = (count(lambda: tried(bytes(data))) for count in (calls, most))
    for at, size in ((2, 2), (4, 4), (8, 4), (12, 4), (HEAD + 45, 4)):
        bad = data.copy()
        bad[at : at + size] = b"\xff" * size
        assert calls(lambda bad=bad: tried(bytes(bad))) < 2 * steps
        assert most(lambda bad=bad: tried(bytes(bad))) < 4 * held
        assert not tried(bytes(bad)) or at > HEAD or (at == 2 and form != "ans")


class Counted:
    """Numbers that count how often one is looked at."""

    def __init__(self, numbers: Any) -> None:
        self.numbers, self.looks = numbers, 0

    def __getitem__(self, at: int) -> Any:
        self.looks += 1
        return self.numbers[at]


def test_many_long_codewords_do_not_slow_a_reader_down() -> None:
    """All but one of 65,536 codewords share their first bits: the search must not be a walk."""
    code = np.array([1, *[17] * 65_536], np.uint8)
    huffman.check(code)
    symbols = np.full(30, 65_536)
    stream = huffman.Stream(huffman.pack(symbols, code), code)
    looks: list[int] = []

    def follow(*asked: Any) -> int:
        words, position, end, table, shift, aligned, code, out = asked
        looked = Counted(aligned)
        after = loops._follow(words, position, end, table, shift, looked, code, out)
        looks.append(looked.looks)
        return after

    found = stream._compiled(loops.Loops(follow, loops._unwind), len(symbols))
    assert (found == symbols).all() and 0 < looks[0] <= 17 * len(symbols)


def test_impossible_codes_are_refused() -> None:
    for lengths in ([], [0], [2], [1, 1, 1], [1, 2], [2, 1, 2], [1, 33, 33], [1, 2, 3, 4]):
        with pytest.raises(ArtifactError, match="of no Huffman code"):
            huffman.check(np.array(lengths, np.uint8))
    for shares in ([], [0, 65536], [1, 2], [65535]):
        with pytest.raises(ArtifactError, match="do not sum"):
            ans.check(np.array(shares))
    with pytest.raises(ArtifactError, match="share values first"):
        encode(np.arange(70_000, dtype=np.uint32).reshape(100, 700), "hac")


# ---------------------------------------------------------------- layers


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(288, 10)),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20).round_().div_(20)
    return model.eval()


LAYERS = ("0", "2", "4")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def coded_net(form: str = "auto") -> tuple[nn.Sequential, list[Encode]]:
    model = net()
    edits = [encoding(name, model.get_submodule(name).weight, form) for name in LAYERS]
    replay(model, edits)  # type: ignore[arg-type]
    return model, edits  # type: ignore[return-value]


@pytest.mark.parametrize("form", FORMS)
def test_coded_layers_compute_the_same(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, dense = coded_net(form)[0], net()
    assert all(isinstance(model.get_submodule(name), coded.Coded) for name in LAYERS)
    assert torch.equal(model(X), dense(X))
    monkeypatch.setattr(coded, "TILE", 100)
    assert torch.allclose(model(X), dense(X), atol=1e-6)
    back = coded.decoded(model)
    assert str(back) == str(dense) and torch.equal(back(X), dense(X))
    assert coded.decoded(dense) is dense


def test_gradients_reach_inputs_and_biases() -> None:
    model, x = coded_net()[0].train(), X.clone().requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not any("weight" in name for name, _ in model.named_parameters())


def test_replayed_without_weights_the_kernel_is_zero() -> None:
    model, edits = coded_net()
    fresh = net()
    replay(fresh, from_json(json.loads(json.dumps(to_json(edits)))), weights=False)
    assert str(fresh) == str(model) and not fresh[0].weight.any()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (Encode("0", "zip", 50), "coded in hac, shac, ans"),
        (Encode("0", "hac", 50, "int8"), "with int8"),
        (Encode("0", "hac", 0), "takes 1 to 864 bytes"),
        (Encode("0", "hac", 10**12), "takes 1 to 864 bytes"),
        (Encode("0", "hac", 51), "was to take 51 bytes"),
        (Encode("1", "hac", 50), "ReLU"),
        (Encode("9", "hac", 50), "no layer"),
        (Encode("", "hac", 50), "single layer"),
    ],
)
def test_edits_that_do_not_fit_are_refused(edit: Encode, says: str) -> None:
    with pytest.raises(EditError, match=says):
        edit.apply(net())


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(EditError, match="not finite"):
        encoding("0", torch.tensor([[1.0, torch.nan]]), "auto")
    assert encoding("0", torch.randn(40, 40), "auto") is None


def test_a_layer_of_another_type_keeps_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32).bfloat16())
    with torch.no_grad():
        model[0].weight.mul_(20).round_().div_(20)
    edit = encoding("0", model[0].weight, "hac")
    assert edit is not None and edit.dtype == "bfloat16"
    replay(model, [edit])
    path = artifact.save(tmp_path / "a.pliant", model, [edit])
    back = artifact.load(path, nn.Sequential(nn.Linear(64, 32)))
    assert back[0].weight.dtype == torch.bfloat16  # type: ignore[index, union-attr]
    assert torch.equal(back[0].weight, model[0].weight)  # type: ignore[index]


# ---------------------------------------------------------------- files


def repacked(path: Path, change: Any) -> None:
    """Change the members of a file and write it with the right checksum."""
    with zipfile.ZipFile(path) as archive:
        manifest = json.loads(archive.read(artifact.MANIFEST))
        weights = safetensors.torch.load(archive.read(artifact.WEIGHTS))
    change(manifest, weights)
    data = safetensors.torch.save(weights)
    manifest["sha256"] = hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(artifact.MANIFEST, json.dumps(manifest))
        archive.writestr(artifact.WEIGHTS, data)


@pytest.mark.parametrize("choice", ["hac", "ans", "auto"])
def test_a_file_holds_coded_tensors(choice: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 5))
    with torch.no_grad():
        model[0].weight.copy_(shared((100, 300), 0.9))
    plain = artifact.save(tmp_path / "plain.pliant", model, ())
    small = artifact.save(tmp_path / "small.pliant", model, (), encode=choice)
    again = artifact.save(tmp_path / "again.pliant", model, (), encode=choice)
    assert small.stat().st_size < 0.93 * plain.stat().st_size  # which is packed by the zip
    assert small.stat().st_size < 0.07 * model[0].weight.nbytes
    assert small.read_bytes() == again.read_bytes()
    found = artifact.inspect(small)
    assert found.version == 2 and set(found.coded) == {"0.weight"}
    fresh = nn.Sequential(nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 5))
    back, state = artifact.load(small, fresh), model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())


def test_a_file_without_coded_tensors_is_as_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30))
    plain = artifact.save(tmp_path / "plain.pliant", model, ())
    coded = artifact.save(tmp_path / "coded.pliant", model, (), encode="auto")
    assert plain.read_bytes() == coded.read_bytes()
    with pytest.raises(ArtifactError, match="one of hac, ans, auto"):
        artifact.save(plain, model, (), encode="zip")


def test_files_whose_codes_lie_are_refused(tmp_path: Path) -> None:
    """The checksum is right, the codes are not: nothing is loaded."""

    def cut(manifest: Any, weights: Any) -> None:
        weights["4.weight"] = weights["4.weight"][:-8].clone()
        manifest["coded"]["4.weight"] -= 8

    def turn(manifest: Any, weights: Any) -> None:
        weights["4.weight"][4] ^= 1

    def grow(manifest: Any, weights: Any) -> None:
        manifest["coded"]["4.weight"] = 2 * 4 * 2880

    def other(manifest: Any, weights: Any) -> None:
        manifest["coded"]["4.weight"] += 1

    def stranger(manifest: Any, weights: Any) -> None:
        manifest["coded"]["9.weight"] = 5

    def true(manifest: Any, weights: Any) -> None:
        manifest["coded"]["4.weight"] = True

    cases = ((cut, "at 4.weight"), (turn, "at 4.weight"), (other, "is damaged"))
    sizes = ((grow, "coded sizes"), (true, "coded sizes"), (stranger, "coded tensors"))
    for change, says in (*cases, *sizes):
        path = artifact.save(tmp_path / "a.pliant", net(), (), encode="hac")
        repacked(path, change)
        with refused(nn.Sequential(*net()), says):
            artifact.load(path, model := net())
        assert torch.equal(model(X), net()(X))


def test_layers_whose_codes_lie_are_refused(tmp_path: Path) -> None:
    model, edits = coded_net("hac")

    def turn(manifest: Any, weights: Any) -> None:
        weights["4.code"][HEAD + 2] ^= 64
        weights["4.code"][20:60] = 0

    path = artifact.save(tmp_path / "a.pliant", model, edits)
    assert torch.equal(artifact.load(path, net())(X), model(X))
    repacked(path, turn)
    with refused(fresh := net(), "cannot be decoded at 4"):
        artifact.load(path, fresh)


def test_quantized_layers_are_coded_in_the_file(tmp_path: Path) -> None:
    """hac leaves them alone and says why; their integers are coded without loss where stored."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 50))
    quantize = Quantize("0", bits=8, groups=1, indexed=False)
    quantize.apply(model)
    run = start(model, HAC(prune=0.9, values=8), example=(x := torch.randn(2, 200),))
    run.finish()
    assert run.reasons["0"] == WHOLE and [edit.layer for edit in run.edits] == ["2"]
    with torch.no_grad():  # as trained weights are: normal, not uniform
        bell = torch.randn(model[0].integers.shape).mul(12).add(128).round().clamp(0, 255)
        model[0].integers.copy_(bell)
    edits = [quantize, *run.edits]
    plain = artifact.save(tmp_path / "plain.pliant", model, edits)
    small = artifact.save(tmp_path / "small.pliant", model, edits, encode="auto")
    assert artifact.inspect(small).coded["0.integers"] < 0.8 * model[0].integers.numel()
    assert small.stat().st_size < plain.stat().st_size
    fresh = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 50))
    assert torch.equal(artifact.load(small, fresh)(x), model(x))


def test_the_smallest_form_is_taken() -> None:
    matrix = bits(shared((300, 300), 0.97).numpy())
    sizes = {form: len(encode(matrix, form)) for form in FORMS}
    assert len(smallest(matrix) or b"") == min(sizes.values()) == sizes["ans"]
    found = smallest(matrix, ("hac", "shac")) or b""
    assert address_map.form_of(found) == "shac" and len(found) == sizes["shac"]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_packed_integers_are_coded_as_numbers_and_not_as_bytes(bits: int, tmp_path: Path) -> None:
    """At the entropy of the numbers, whatever their width; bytes would hold several of them."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(200, 101)), torch.randn(2, 200)
    edit = Quantize("0", bits=bits, groups=1, indexed=False)
    edit.apply(model)
    layer: Any = model[0]
    with torch.no_grad():  # as trained weights are: normal, with a few far out
        bell = torch.randn(101 * 200).mul(2**bits / 12).add(2 ** (bits - 1))
        numbers = bell.round().clamp(0, 2**bits - 1).to(torch.uint8)
        layer.integers.copy_(packing.pack(numbers, bits))
    share = torch.bincount(numbers.long()).double() / numbers.numel()
    entropy = -float((share[share > 0] * share[share > 0].log2()).sum())
    path = artifact.save(tmp_path / "a.pliant", model, [edit], encode="ans")
    size = artifact.inspect(path).coded["0.integers"]
    assert size < 1.03 * entropy * numbers.numel() / 8 + 200
    assert torch.equal(artifact.load(path, nn.Sequential(nn.Linear(200, 101)))(x), model(x))
    as_bytes = tensors.pack(layer.integers, "ans")  # as earlier files have it
    if as_bytes is not None:
        shape = layer.integers.shape
        assert torch.equal(tensors.unpack(as_bytes, shape, torch.uint8, bits), layer.integers)
    damaged = address_map.encode(tensors.patterns(numbers + 2**bits), "hac")
    assert damaged is not None
    with pytest.raises(ArtifactError, match="more than"):
        tensors.unpack(damaged, layer.integers.shape, torch.uint8, bits)
