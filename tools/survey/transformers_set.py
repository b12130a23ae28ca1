"""Tiny configurations of 48 mainstream architectures of Hugging Face transformers, one table."""

from typing import Any

import torch

_VOCABULARY = 99
_LENGTH = 8

_TEXT = {"vocab_size": _VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {**_TEXT, "intermediate_size": 64, "max_position_embeddings": 64}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {**_DECODER, "moe_intermediate_size": 32}
_GPT = {"vocab_size": _VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
_SEQ2SEQ = {
    "vocab_size": _VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_PATCHES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_SPEECH = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_length": 2,
}
_TOWERS = {
    "text_config": {**_ENCODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "vision_config": _PATCHES,
}

ARCHITECTURES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    # name: (model class, configuration class, kind of input, keywords of the configuration)
    # encoders
    "bert": ("BertForMaskedLM", "BertConfig", "text", _ENCODER),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", "text", _ENCODER),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        "text",
        {"vocab_size": _VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", "text", {**_ENCODER, "embedding_size": 16}),
    "electra": ("ElectraForPreTraining", "ElectraConfig", "text", {**_ENCODER, "embedding_size": 16}),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        "text",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    ),
    "mpnet": ("MPNetForMaskedLM", "MPNetConfig", "text", _ENCODER),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", "text", {**_ENCODER, "pad_token_id": 0}),
    # decoders
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", "text", _GPT),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        "text",
        {
            "vocab_size": _VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 64,
        },
    ),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", "text", {**_GPT, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", "text", _ENCODER),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        "text",
        {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        "text",
        {"vocab_size": _VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", "text", {**_TEXT, "bos_token_id": 1, "eos_token_id": 2}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", "text", _DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", "text", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", "text", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", "text", {**_DECODER, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", "text", {**_DECODER, "head_dim": 8}),
    "phi": ("PhiForCausalLM", "PhiConfig", "text", _DECODER),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", "text", _DECODER),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", "text", _DECODER),
    # mixtures of experts
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", "text", {**_DECODER, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        "text",
        {**_EXPERTS, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 64},
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", "text", {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2}),
    # state spaces
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        "ids",
        {"vocab_size": _VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        "ids",
        {
            "vocab_size": _VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 2,
            "chunk_size": 4,
        },
    ),
    # encoders with decoders
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        "text2text",
        {
            "vocab_size": _VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", "text2text", _SEQ2SEQ),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", "text2text", _SEQ2SEQ),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", "text2text", _SEQ2SEQ),
    "marian": ("MarianMTModel", "MarianConfig", "text2text", _SEQ2SEQ),
    "m2m_100": ("M2M100ForConditionalGeneration", "M2M100Config", "text2text", _SEQ2SEQ),
    # vision
    "vit": ("ViTForImageClassification", "ViTConfig", "image", _PATCHES),
    "deit": ("DeiTForImageClassification", "DeiTConfig", "image", _PATCHES),
    "beit": ("BeitForImageClassification", "BeitConfig", "image", {**_PATCHES, "use_relative_position_bias": True}),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        "image",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        "image",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1]},
    ),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", "image", _PATCHES),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        "image",
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 16, 16, 32],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 32,
        },
    ),
    "mobilevit": (
        "MobileViTForImageClassification",
        "MobileViTConfig",
        "image",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64]},
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        "image",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1], "layer_type": "basic"},
    ),
    # pictures and text
    "clip": ("CLIPModel", "CLIPConfig", "towers", {**_TOWERS, "projection_dim": 16}),
    "siglip": ("SiglipModel", "SiglipConfig", "towers", _TOWERS),
    # speech
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        "spectrogram",
        {
            **{key: value for key, value in _SEQ2SEQ.items() if key != "max_position_embeddings"},
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "begin_suppress_tokens": None,
        },
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", "waveform", _SPEECH),
    "hubert": ("HubertForCTC", "HubertConfig", "waveform", _SPEECH),
}


def build(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model with random weights, and keyword arguments for a batch of two."""
    import transformers

    model, config, kind, keywords = ARCHITECTURES[name]
    made = getattr(transformers, config)(**keywords)
    return getattr(transformers, model)(made), _example(kind, made)


def _example(kind: str, config: Any) -> dict[str, torch.Tensor]:
    def tokens() -> torch.Tensor:
        return torch.randint(3, _VOCABULARY, (2, _LENGTH))

    side = getattr(config, "image_size", 64)
    if kind == "ids":
        return {"input_ids": tokens()}
    if kind == "text":
        mask = torch.ones(2, _LENGTH, dtype=torch.int64)
        mask[1, -2:] = 0
        return {"input_ids": tokens(), "attention_mask": mask}
    if kind == "text2text":
        return {"input_ids": tokens(), "decoder_input_ids": tokens()}
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, side, side)}
    if kind == "towers":
        return {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 32, 32)}
    if kind == "spectrogram":
        return {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": tokens()}
    return {"input_values": torch.randn(2, 1000)}
