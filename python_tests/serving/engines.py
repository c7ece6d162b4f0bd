"""Tiny models, engines that serve them, and the same losses from transformers."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import transformers

import lozo_kernels

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON | {"hidden_size": 128}),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON | {"hidden_size": 128}, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=32, tie_word_embeddings=True),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=128,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
        max_position_embeddings=512,
        word_embed_proj_dim=128,
    ),
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, head_dim=32, query_pre_attn_scalar=32),
    "phi3": lambda: transformers.Phi3Config(**COMMON | {"hidden_size": 128}, pad_token_id=0),
    "gpt2": lambda: transformers.GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=512, n_positions=512),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON | {"hidden_size": 128}, num_local_experts=4, num_experts_per_tok=2),
}
OPTIONS = {"rank": 2, "interval": 20, "seed": 7}
EPS = 1e-2


def make_model(name: str, folder: Path) -> str:
    path = folder / name
    if not path.exists():
        torch.manual_seed(len(name))
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).to(torch.float32)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.05)  # biases that are not zero, and norms that are not one
        model.save_pretrained(path)
    return str(path)


@contextlib.contextmanager
def engine(path: str, *, ours: dict | None = None, plain: bool = False, **options):
    """An engine in this process, gone at the end. ``ours``: what engine_options() is given besides OPTIONS."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from lozo_kernels.vllm import engine_options

    settings = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 64,
    }
    settings |= {} if plain else engine_options(**OPTIONS | (ours or {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llm = LLM(path, **settings | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def texts(seed: int, count: int = 4, length: int = 24) -> list[list[int]]:
    """Fresh texts as tokens, each of another length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 500, (length - i,), generator=generator).tolist() for i in range(count)]


def many(seed: int) -> list[list[int]]:
    """Enough tokens for a c within 1e-5: it has the rounding of a mean loss over eps, and one token alone has more than that."""
    return texts(seed, 8, 48)


def reference(path: str, dtype: torch.dtype = torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@torch.no_grad()
def loss_of(model, some: list[list[int]]) -> float:
    """The mean loss of the tokens, which nll(some) is in an engine."""
    total = count = 0.0
    for text in some:
        ids = torch.tensor([text])
        logs = model(ids).logits[:, :-1].float().log_softmax(-1)
        total -= logs.gather(2, ids[:, 1:, None]).double().sum().item()
        count += len(text) - 1
    return total / count


def losses_at(handle, objective, points) -> dict:
    """The losses of an objective at points of the next step."""
    handle.expect(0, points)
    found = {}
    for point in points:
        handle.move(0, None, point)
        total, count = handle.loss_at(objective)
        found[point] = total / count
    handle.rest_()
    return found


def perturbed(path: str, some: list[list[int]], points, dtype: torch.dtype = torch.float32, **options) -> dict:
    """The losses of the Hugging Face model at points of step 0, whose weights are moved along whole directions."""
    model = reference(path, dtype)
    own = lozo_kernels.patch(model, **OPTIONS, **options)
    base = {p.name: p.tensor.detach().clone() for p in own.trained}
    found = {}
    for direction, scale in points:
        with torch.no_grad():
            for p in own.trained:
                p.tensor.copy_((base[p.name].float() + scale * own.materialize(p.name, 0, direction=direction)).to(dtype))
        found[direction, scale] = loss_of(model, some)
    return found


def script(name: str, *arguments: str, env: dict[str, str] | None = None) -> dict:
    """What subprocess runs one of the scripts beside this file with."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'python_tests'}"} | (env or {})
    return {"args": [sys.executable, str(Path(__file__).with_name(name)), *arguments], "env": environment, "text": True}


def lines_of(output: str) -> list[dict]:
    """The JSON lines that a script printed."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def run_script(name: str, *arguments: str, env: dict[str, str] | None = None, kill: bool = False) -> list[dict]:
    """Runs one of the scripts beside this file in a process of its own. Returns the JSON lines that it printed."""
    done = subprocess.run(**script(name, *arguments, env=env), capture_output=True, timeout=1200, check=False)
    assert kill or done.returncode == 0, done.stderr[-4000:]
    return lines_of(done.stdout)
