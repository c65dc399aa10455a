"""Networks of Transformers that read and write: encoders, decoders, both, experts, state spaces."""

from __future__ import annotations

from typing import Any

from bench.networks.network import Network, tokens
from bench.networks.pictures import SIZES, of

_WORDS = 300
_TWO = tokens(12, _WORDS, "input_ids decoder_input_ids")
_ROPE: dict[str, Any] = {**SIZES, "vocab_size": _WORDS, "num_key_value_heads": 2}
_SIDES = {
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 128 for side in ("encoder", "decoder")},
}
_EXPERTS = {"num_experts_per_tok": 2}


def _text(kind: str, **options: Any) -> Network:
    return of(kind, tokens(16, _WORDS), vocab_size=_WORDS, **options)


def _decoder(kind: str, **options: Any) -> Network:
    return of(kind, tokens(16, _WORDS), **{**_ROPE, **options}, use_cache=False)


NETWORKS: dict[str, Network] = {
    "hf BERT": _text("BertForSequenceClassification", **SIZES),
    "hf BERT, masked words": _text("BertForMaskedLM", **SIZES),
    "hf RoBERTa": _text("RobertaForTokenClassification", **SIZES),
    "hf DistilBERT": _text(
        "DistilBertForSequenceClassification", dim=64, hidden_dim=128, n_layers=2, n_heads=4
    ),
    "hf ALBERT": _text("AlbertForSequenceClassification", **SIZES, embedding_size=32),
    "hf ELECTRA": _text("ElectraForPreTraining", **SIZES, embedding_size=32),
    "hf DeBERTa v2": _text("DebertaV2ForSequenceClassification", **SIZES),
    "hf MPNet": _text("MPNetModel", **SIZES),
    "hf ModernBERT": _text("ModernBertForMaskedLM", **SIZES, pad_token_id=0),
    "hf GPT-2": _text("GPT2LMHeadModel", n_embd=64, n_layer=2, n_head=4, use_cache=False),
    "hf GPT-NeoX": _text("GPTNeoXForCausalLM", **SIZES, use_cache=False),
    "hf OPT": _text(
        "OPTForCausalLM", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
        word_embed_proj_dim=64, use_cache=False,
    ),
    "hf BLOOM": _text("BloomForCausalLM", hidden_size=64, n_layer=2, n_head=4, use_cache=False),
    "hf Falcon": _text("FalconForCausalLM", **SIZES, use_cache=False),
    "hf Phi": _text("PhiForCausalLM", **SIZES, use_cache=False),
    "hf Llama": _decoder("LlamaForCausalLM"),
    "hf Llama, with its cache": of("LlamaForCausalLM", tokens(16, _WORDS), **_ROPE),
    "hf Mistral": _decoder("MistralForCausalLM"),
    "hf Qwen2": _decoder("Qwen2ForCausalLM", tie_word_embeddings=True),
    "hf Qwen3": _decoder("Qwen3ForCausalLM", head_dim=16),
    "hf Gemma": _decoder("GemmaForCausalLM", head_dim=16),
    "hf Mixtral": _decoder("MixtralForCausalLM", num_local_experts=4, **_EXPERTS),
    "hf Qwen3 experts": _decoder(
        "Qwen3MoeForCausalLM", head_dim=16, num_experts=4, moe_intermediate_size=64, **_EXPERTS
    ),
    "hf Mamba": _text(
        "MambaForCausalLM", hidden_size=64, num_hidden_layers=2, state_size=8, use_cache=False
    ),
    "hf T5": of(
        "T5ForConditionalGeneration", _TWO, vocab_size=_WORDS, d_model=64, d_kv=16, d_ff=128,
        num_layers=2, num_heads=4,
    ),
    "hf BART": of(
        "BartForConditionalGeneration", _TWO, vocab_size=_WORDS, d_model=64, **_SIDES
    ),
    "hf Marian": of(
        "MarianMTModel", _TWO, vocab_size=_WORDS, d_model=64, pad_token_id=0,
        decoder_start_token_id=0, **_SIDES,
    ),
}  # fmt: skip
