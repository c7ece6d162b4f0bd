"""Tiny transformers models with random weights, inputs and a loss: ``python python_tests/architectures.py`` lists them."""

import collections
import dataclasses
from collections.abc import Iterator

import torch

from python_tests.architecture_table import ARCHITECTURES

VOCABULARY, BATCH, TOKENS, LABELS, IMAGE, BANDS, FRAMES, SAMPLES = 61, 2, 12, 5, 32, 10, 48, 160
NOISE = 0.1

# The same quantity has many names; a configuration is given those that it has. Odd where the architecture allows it.
_SIZES = {
    "hidden_size d_model n_embd dim projection_dim attention_hidden_size lru_width emb_dim pooler_output_size": 32,
    "embedding_size decoder_hidden_size": 16,
    "num_hidden_layers n_layer n_layers num_layers num_decoder_layers encoder_layers decoder_layers num_encoder_layers": 2,
    "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads": 4,
    "num_encoder_attention_heads num_decoder_attention_heads": 4,
    "num_key_value_heads kv_n_heads": 2,
    "head_dim d_kv kv_channels d_head": 8,
    "intermediate_size ffn_dim d_ff dff d_inner n_inner hidden_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size": 37,
    "vocab_size": VOCABULARY,
    "max_position_embeddings n_positions n_ctx max_seq_len context_length max_source_positions max_target_positions": 64,
    "max_encoder_position_embeddings max_decoder_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id decoder_start_token_id": 1,
    "eos_token_id forced_eos_token_id forced_bos_token_id": 2,
    "num_experts n_routed_experts num_local_experts moe_num_experts": 4,
    "num_experts_per_tok moe_top_k moe_k": 2,
    "moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size": 24,
    "mamba_n_heads n_mamba_heads mamba_num_heads mamba_d_head mamba_headdim mamba_head_dim": 8,
    "mamba_d_state state_size ssm_state_size": 8,
    "mamba_n_groups mamba_ngroups n_groups": 2,
    "mamba_dt_rank time_step_rank": 5,
    "mamba_chunk_size chunk_size": 4,
    "image_size": IMAGE,
    "patch_size": 8,
    "num_mel_bins input_feat_per_channel": BANDS,
    "use_cache apply_spec_augment": False,
    "router_jitter_noise input_jitter_noise": 0.0,
}
_SHARED = {name: value for names, value in _SIZES.items() for name in names.split()}


def _tokens(count: int = TOKENS) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, count))  # none of the special ones


def _images() -> torch.Tensor:
    return torch.randn(BATCH, 3, IMAGE, IMAGE)


def _classes() -> torch.Tensor:
    return torch.randint(LABELS, (BATCH,))


INPUTS = {
    "tokens": lambda: {"input_ids": _tokens(), "labels": _tokens()},
    "classified tokens": lambda: {"input_ids": _tokens(), "labels": _classes()},
    "spectrograms": lambda: {"input_features": torch.randn(BATCH, BANDS, FRAMES), "labels": _tokens()},
    "frames": lambda: {"input_features": torch.randn(BATCH, FRAMES, BANDS), "labels": _tokens()},
    "images": lambda: {"pixel_values": _images()},
    "classified images": lambda: {"pixel_values": _images(), "labels": _classes()},
    "images and captions": lambda: {"pixel_values": _images(), "input_ids": _tokens(), "return_loss": torch.tensor(True)},
    "waves": lambda: {"input_values": torch.randn(BATCH, SAMPLES), "labels": _tokens(3)},
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Builds the model of a row in evaluation mode, and its inputs. Both depend on ``seed`` alone.

    Returns:
        The model, no parameter of which is constant, and the keyword arguments of its forward.
    """
    row = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(row, dtype)
        with torch.no_grad():  # zeros, ones and copies would hide an element that was missed or met twice
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype), alpha=NOISE)
        inputs = INPUTS[row.inputs]()
    return model.eval(), {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def run(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss, a scalar, and the first output. The loss is the model's own, or a fixed projection of that output."""
    outputs = model(**inputs)
    logits = next(value for key, value in outputs.items() if key != "loss" and isinstance(value, torch.Tensor))
    loss = outputs.get("loss")
    return (_projection(logits) if loss is None else loss), logits


def unused(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[str]:
    """Lists the trainable parameters that the loss does not depend on."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(run(model, inputs)[0], list(trainable.values()), allow_unused=True)
    return [name for name, gradient in zip(trainable, gradients, strict=True) if gradient is None]


def summary() -> Iterator[str]:
    """Yields the lines of a Markdown table that says what every model is made of."""
    yield "| name | family | class | parameters | tensors by dimension | frozen | unused | owners of parameters |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, row in ARCHITECTURES.items():
        model, inputs = build(name)
        parameters = list(model.parameters())
        cells = [
            name,
            row.family,
            type(model).__name__,
            str(sum(p.numel() for p in parameters)),
            ", ".join(f"{dim}-D {count}" for dim, count in sorted(collections.Counter(p.dim() for p in parameters).items())),
            str(sum(not p.requires_grad for p in parameters)),
            ", ".join(unused(model, inputs)),
            ", ".join(sorted({type(m).__name__ for m in model.modules() if next(m.parameters(recurse=False), None) is not None})),
        ]
        yield f"| {' | '.join(cells)} |"


def _projection(values: torch.Tensor) -> torch.Tensor:
    direction = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    return (values.float() * direction).mean()


def _model(row, dtype: torch.dtype) -> torch.nn.Module:
    import transformers

    config = _config(transformers.CONFIG_MAPPING[row.name], row.overrides)
    head = getattr(transformers, row.head)
    return (head.from_config if row.head.startswith("Auto") else head._from_config)(config, dtype=dtype)


def _config(kind, overrides: dict):
    """Makes a configuration with the shared sizes and no dropout, also in the configurations inside it."""
    fields = {f.name: f.default for f in dataclasses.fields(kind)}
    values = {name: value for name, value in _SHARED.items() if name in fields and not isinstance(fields[name], (list, tuple))}
    values |= {name: 0.0 for name, default in fields.items() if "drop" in name and isinstance(default, float)}
    inner = {name: part for name, part in kind.sub_configs.items() if dataclasses.is_dataclass(part)}
    values |= {name: _config(part, overrides.get(name, {})) for name, part in inner.items()}
    outer = {name: value for name, value in overrides.items() if name not in inner}
    return kind(**values | outer | {"num_labels": LABELS})


if __name__ == "__main__":
    print(*summary(), sep="\n")
