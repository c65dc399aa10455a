"""Five small networks for five tasks, trained in seconds on data that is at hand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.data import part
from bench.small import seeded
from pliant import zoo
from pliant.data import Data, Train, load
from pliant.drivers.loop import fit
from pliant.errors import require
from pliant.method import Method
from pliant.run import start

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Member:
    """One of the five: what makes the network and its data, its task, and its training."""

    build: Callable[[], nn.Module]
    data: Callable[[int], Data]
    task: str | None
    train: Train | None


def trained(name: str, seed: int, epochs: float = 1.0) -> tuple[nn.Module, Data, str | None]:
    """Build and train one of them.

    Args:
        name: a key of `FLEET`.
        seed: of random weights, of the training, and of what is scored where that is drawn.
        epochs: share of the training that is done.
    """
    member = FLEET[name]
    model, data = seeded(seed, member.build), member.data(seed)
    if member.train is not None:
        plan = Train(epochs=max(1, round(epochs * member.train.epochs)), lr=member.train.lr,
                     batch=member.train.batch, optimizer=member.train.optimizer)  # fmt: skip
        steps = plan.steps(data.steps(plan.batch))
        run = start(model, Method(), data=data, steps=steps, seed=seed, task=member.task)
        fit(run, data, plan)
    return model.eval(), data, member.task


def parted(inputs: Any, labels: Tensor, train: int, val: int, seed: int) -> Data:
    """Cut samples into three splits, in a random order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    inputs, labels = inputs[order], labels[order]
    cuts = (slice(0, train), slice(train, train + val), slice(train + val, None))
    first, second, third = ((inputs[cut], labels[cut]) for cut in cuts)
    return Data(train=first, val=second, test=third)


def _digits() -> tuple[Tensor, Tensor]:
    """1,797 digits of 8 x 8 pixels with values of 0..16."""
    images, labels = require("sklearn.datasets", "data").load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32), torch.tensor(labels)


def _classified(seed: int) -> Data:
    return load("mnist5k").subset(train=1000)


def _segmented(seed: int) -> Data:
    """Digits whose every pixel is background (0) or belongs to a digit (1 to 10)."""
    data = load("mnist5k")

    def masks(pair: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
        images, labels = pair[0][:count].float() / 255, pair[1][:count]
        ink = images.flatten(1).unflatten(1, (28, 28)) > 0.3
        return images.reshape(-1, 1, 28, 28), torch.where(ink, labels[:, None, None] + 1, 0)

    return Data(masks(data.train, 1200), masks(data.val, 300), masks(data.test, 300))


def _read(seed: int) -> Data:
    """Digits as sentences: one of 17 words for each pixel."""
    images, labels = _digits()
    return parted(images.long(), labels, 900, 400, seed)


def _tabular(seed: int) -> Data:
    """Digits as a table of 64 columns."""
    images, labels = _digits()
    return parted(images / 16, labels, 900, 400, seed)


def _heard(seed: int) -> Data:
    """Spoken digits at 4 kHz, one second each; those numbered 0 to 9 are not trained on."""
    recordings = np.load(part("speech-digits") / "recordings.npz")
    sounds: dict[bool, list[Tensor]] = {False: [], True: []}
    labels: dict[bool, list[int]] = {False: [], True: []}
    for key in sorted(recordings.files):
        digit, _, number = key.split("_")
        wave = torch.tensor(recordings[key][:8000].astype(np.float32))
        wave = F.avg_pool1d(F.pad(wave, (0, 8000 - len(wave)))[None], 2)
        sounds[int(number) < 10].append(wave / wave.std().clamp(min=1e-3))
        labels[int(number) < 10].append(int(digit))
    order = torch.randperm(len(labels[True]), generator=torch.Generator().manual_seed(seed))
    held, wanted = torch.stack(sounds[True])[order], torch.tensor(labels[True])[order]
    whole = (torch.stack(sounds[False]), torch.tensor(labels[False]))
    return Data(whole, (held[:300], wanted[:300]), (held[300:], wanted[300:]))


def _segmenter() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 24), (24, 48), (48, 48), (48, 48)):
        layers += [nn.Conv2d(inputs, outputs, 5, padding=2), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(48, 11, 1))


def _listener() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride in ((1, 32, 40, 8), (32, 64, 9, 4), (64, 96, 9, 4)):
        conv = nn.Conv1d(inputs, outputs, kernel, stride, padding=kernel // 2)
        layers += [conv, nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(384, 10))


class Encoder(nn.Module):
    """A sentence encoder in the shape of MiniLM, small: tokens in, mean of the last states out."""

    def __init__(self) -> None:
        super().__init__()
        transformers = require("transformers", "transformers")
        config = transformers.BertConfig(
            vocab_size=17, hidden_size=96, num_hidden_layers=3, num_attention_heads=6,
            intermediate_size=384, max_position_embeddings=64,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(96, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.bert(input_ids=tokens).last_hidden_state
        found: Tensor = self.head(states.mean(1))
        return found


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


FLEET = {
    "classifier": Member(lambda: zoo.build("lenet5", weights="mnist5k"), _classified, None, None),
    "segmenter": Member(
        _segmenter, _segmented, "segmentation", Train(epochs=4, lr=0.005, optimizer="adamw")
    ),
    "encoder": Member(
        Encoder, _read, "classification", Train(epochs=14, lr=0.002, optimizer="adamw", batch=64)
    ),
    "audio": Member(
        _listener, _heard, "classification", Train(epochs=6, lr=0.003, optimizer="adamw", batch=64)
    ),
    "tabular": Member(
        _mlp, _tabular, "classification", Train(epochs=12, lr=0.005, optimizer="adamw", batch=32)
    ),
}
