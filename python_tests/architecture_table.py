"""Which transformers architectures are built tiny, and what each needs beside the sizes that all share."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """One row.

    Attributes:
        name: the ``model_type`` of the configuration.
        family: decoder, encoder, seq2seq, vision, audio, moe or state-space.
        head: the transformers class that builds the model: an auto class where one has a loss for the task.
        inputs: which inputs are drawn, a key of ``architectures.INPUTS``.
        overrides: what the configuration has in place of the shared sizes; a dict for a configuration inside it.
    """

    name: str
    family: str
    head: str
    inputs: str
    overrides: dict[str, Any]


# Their forward mixes in fp32 tensors, or uses an operation that knows no bf16.
FLOAT32_ONLY = frozenset({"deberta", "fnet", "xlnet", "xlstm"})

# Settings that several rows share.
_SLIDING = {"sliding_window": 5}
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_FROM_PADDING = {"decoder_start_token_id": 0}
_STAGES = {"depths": (1, 1), "hidden_sizes": (16, 32)}
_CONVNEXT = {**_STAGES, "num_stages": 2, "patch_size": 4}
_WINDOWS = {"depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4), "window_size": 4, "patch_size": 4}
_PYRAMID = {
    **_STAGES,
    "num_encoder_blocks": 2,
    "num_attention_heads": (2, 4),
    "patch_sizes": (7, 3),
    "strides": (4, 2),
    "mlp_ratios": (2, 2),
}
_WAVES = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "ctc_loss_reduction": "mean",
}
_EXPERTS = {"intermediate_size": 40}  # a grouped product wants rows of a multiple of 16 bytes
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_SHARED_BLOCK = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}


def _alike(names: str, overrides: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    return {name: overrides or {} for name in names.split()}


_DECODERS = {
    **_alike("llama gpt2 gpt_bigcode gpt_neox gpt_neox_japanese bloom falcon ministral qwen2 qwen3 gemma phi phi3 starcoder2 xglm"),
    **_alike("biogpt olmo olmo2 stablelm mpt persimmon cohere granite nemotron glm glm4 smollm3 helium ctrl openai-gpt arcee"),
    **_alike("seed_oss diffllama apertus bitnet vaultgemma nanochat modernbert-decoder xlnet"),
    **_alike("mistral olmo3 cohere2 exaone4", _SLIDING),
    **_alike("gemma2 gemma3_text", {**_SLIDING, "query_pre_attn_scalar": 8}),
    **_alike("gptj codegen", {"rotary_dim": 4}),
    "opt": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},  # as OPT-350M: projections in and out, norms behind
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
}
_MASKED_ENCODERS = {
    **_alike(
        "bert distilbert albert electra mpnet camembert convbert nystromformer fnet modernbert big_bird esm nomic_bert eurobert"
    ),
    **_alike("xlm flaubert"),
    "deberta": _DISENTANGLED,
    "deberta-v2": {**_DISENTANGLED, "conv_kernel_size": 3},
    "mobilebert": {"intra_bottleneck_size": 16, "num_feedforward_networks": 2},
    "funnel": {"block_sizes": (1, 1)},
    "layoutlm": {"max_2d_position_embeddings": 16},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "longformer": {"attention_window": 4},
}
_CLASSIFYING_ENCODERS = {
    **_alike("roberta xlm-roberta roformer ibert megatron-bert ernie roberta-prelayernorm data2vec-text"),
    "squeezebert": {"embedding_size": 32, "intermediate_size": 40},
    "canine": {"num_hash_buckets": 31},
    "luke": {"entity_vocab_size": 11, "entity_emb_size": 16},
}
_SEQ2SEQS = {
    **_alike("umt5 mt5 bart mbart pegasus pegasus_x m2m_100 marian blenderbot blenderbot-small plbart prophetnet bigbird_pegasus"),
    **_alike("t5 longt5", _FROM_PADDING),
    "t5gemma": {},
    "switch_transformers": {**_FROM_PADDING, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "led": {"attention_window": 4},
    "fsmt": {"src_vocab_size": 61, "tgt_vocab_size": 61},
}
_VISIONS = {
    **_alike("vit dinov2 vit_msn"),
    **_alike("convnext convnextv2", _CONVNEXT),
    "beit": {"use_relative_position_bias": True},
    "swin": _WINDOWS,
    "swinv2": {**_WINDOWS, "pretrained_window_sizes": (0, 0)},
    "resnet": _STAGES,
    "regnet": {**_STAGES, "groups_width": 8},
    "segformer": {**_PYRAMID, "sr_ratios": (2, 1)},
    "mobilevit": {"patch_size": 2, "hidden_sizes": (16, 24, 32), "neck_hidden_sizes": (8, 8, 8, 16, 16, 16, 32)},
    "mobilevitv2": {
        "output_stride": 16,
        "patch_size": 2,
        "base_attn_unit_dims": (16, 24, 32),
        "n_attn_blocks": (1, 1, 1),
        "width_multiplier": 0.125,
    },
    "mobilenet_v1": {"depth_multiplier": 0.05},
    "mobilenet_v2": {"depth_multiplier": 0.1, "finegrained_output": False},
    "efficientnet": {
        "width_coefficient": 0.0625,
        "depth_coefficient": 1.0,
        "hidden_dim": 80,
        "in_channels": (8, 8),
        "out_channels": (8, 16),
        "kernel_sizes": (3, 5),
        "strides": (1, 2),
        "num_block_repeats": (1, 1),
        "expand_ratios": (1, 2),
    },
    "poolformer": {**_STAGES, "num_encoder_blocks": 2, "patch_sizes": (7, 3), "strides": (4, 2), "padding": (2, 1)},
    "pvt": {**_PYRAMID, "sequence_reduction_ratios": (2, 1), "patch_sizes": (4, 2)},
    "pvt_v2": {**_PYRAMID, "sr_ratios": (2, 1), "image_size": (32, 32)},
    "cvt": {
        "depth": (1, 2),
        "embed_dim": (16, 32),
        "num_heads": (1, 2),
        "patch_sizes": (7, 3),
        "patch_stride": (4, 2),
        "patch_padding": (2, 1),
        "mlp_ratio": (2.0, 2.0),
        "cls_token": (False, True),
        "drop_path_rate": (0.0, 0.0),
    },
    "focalnet": {**_STAGES, "embed_dim": 16, "focal_levels": (2, 2), "focal_windows": (3, 3)},
    "hiera": {
        "depths": (1, 1),
        "embed_dim": 16,
        "num_heads": (2, 4),
        "image_size": (32, 32),
        "masked_unit_size": (4, 4),
        "masked_unit_attention": (True, False),
        "num_query_pool": 1,
    },
}
_LEVIT = {
    "patch_size": 16,
    "depths": (1, 1, 1),
    "hidden_sizes": (16, 24, 32),
    "num_attention_heads": (2, 3, 4),
    "key_dim": (4, 4, 4),
}
_MOES = {
    **_alike("qwen2_moe qwen3_moe llama4_text ernie4_5_moe glm4_moe"),
    **_alike("mixtral olmoe phimoe granitemoe granitemoeshared jetmoe gpt_oss hunyuan_v1_moe minimax flex_olmo", _EXPERTS),
    "deepseek_v2": _LATENT,
    "deepseek_v3": {**_LATENT, "n_group": 2, "topk_group": 1},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 40}},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
}
_STATE_SPACES = {
    **_alike("mamba falcon_mamba rwkv recurrent_gemma xlstm"),
    "mamba2": {"num_heads": 8},
    "zamba": {**_SHARED_BLOCK, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {**_SHARED_BLOCK, "num_key_value_heads": 4, "use_shared_attention_adapter": True, "adapter_rank": 4},
    "jamba": {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "granitemoehybrid": {**_EXPERTS, **_MIXED},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 24},
    "qwen3_next": {
        **_MIXED,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}
_AUDIOS = _alike("wav2vec2 hubert wavlm unispeech data2vec-audio sew wav2vec2-conformer", _WAVES)

# Family, class, inputs, rows. DeiT and LeViT have two heads each, between which no auto class chooses.
_GROUPS = [
    ("decoder", "AutoModelForCausalLM", "tokens", _DECODERS),
    ("decoder", "ImageGPTForCausalImageModeling", "tokens", {"imagegpt": {"vocab_size": 62}}),
    ("encoder", "AutoModelForMaskedLM", "tokens", _MASKED_ENCODERS),
    ("encoder", "AutoModelForSequenceClassification", "classified tokens", _CLASSIFYING_ENCODERS),
    ("seq2seq", "AutoModelForSeq2SeqLM", "tokens", _SEQ2SEQS),
    ("seq2seq", "AutoModelForSpeechSeq2Seq", "spectrograms", {"whisper": {"max_source_positions": 24}}),
    ("seq2seq", "AutoModelForSpeechSeq2Seq", "frames", {"speech_to_text": {"conv_channels": 24}}),
    ("vision", "AutoModelForImageClassification", "classified images", _VISIONS),
    ("vision", "DeiTForImageClassification", "classified images", {"deit": {}}),
    ("vision", "LevitForImageClassification", "classified images", {"levit": _LEVIT}),
    ("vision", "AutoModel", "images", {"dinov3_vit": {}}),
    ("vision", "AutoModel", "images and captions", _alike("clip siglip")),
    ("audio", "AutoModelForCTC", "waves", _AUDIOS),
    ("moe", "AutoModelForCausalLM", "tokens", _MOES),
    ("state-space", "AutoModelForCausalLM", "tokens", _STATE_SPACES),
]

ARCHITECTURES = {
    name: Architecture(name, family, head, inputs, overrides)
    for family, head, inputs, rows in _GROUPS
    for name, overrides in rows.items()
}
