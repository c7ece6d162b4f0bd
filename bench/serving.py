"""What training inside of a vLLM engine costs, and what it learns: needs the environment of ``make test-vllm``.

``PYTHONPATH=. .venv-vllm/bin/python -m bench.serving cost`` times, in turn and in one run, a Llama of 50M parameters: vLLM and
Hugging Face as they are, the probe at rest, at one point, at several points in one batch and in turn, and vLLM's own LoRA. Every
engine has a process of its own and waits while another one runs. In the case ``decode`` weights are read for every token. On a GPU
the Llama has 1.2B parameters.
``... -m bench.serving rewards`` trains the small model of ``examples/serving/rewards.py`` by rewards, with five seeds.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}

import torch

from bench.evidence import REPO, made_by, result_parser, write_result
from lozo_kernels.bench.environment import OtherLoad

SHAPES = {
    "cpu": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12, "vocab_size": 8192},
    "cuda": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
}
POINTS = 8
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
CASES = {"cpu": {"score": (8, 32), "decode": (4, 32)}, "cuda": {"score": (64, 256), "decode": (64, 256)}}
"""Texts and tokens: of each text, or written after a prompt of 8."""


def make_model(folder: Path, device: str) -> str:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPES[device])
    transformers.LlamaForCausalLM(config).to(getattr(torch, DTYPES[device])).save_pretrained(folder)
    return str(folder)


def make_adapter(model: str, folder: Path) -> str:
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=names, init_lora_weights=False)).save_pretrained(folder)
    return str(folder)


class Cost:
    """The contenders of one case, each a function that does the work of one point."""

    def __init__(self, case: str, model: str, adapter: str, device: str) -> None:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        from lozo_kernels.vllm import LOZO, engine_options

        texts, tokens = CASES[device][case]
        same: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": DTYPES[device], "enforce_eager": True, "max_model_len": 320}
        same["max_num_seqs"] = POINTS * texts
        if device == "cuda":
            same["gpu_memory_utilization"] = 0.25  # three engines beside each other
        self._case, generator = case, torch.Generator().manual_seed(0)
        count = tokens if case == "score" else 8
        self._texts = torch.randint(3, 8000, (texts, count), generator=generator).tolist()
        self._adapter = LoRARequest("adapter", 1, adapter)
        self._plain = LLM(model, **same)
        self._lora = LLM(model, **same, enable_lora=True, max_lora_rank=8)
        self._optimizer = LOZO(
            LLM(model, **same, **engine_options(rank=2, points=POINTS)), lr=1e-6, eps=1e-3, directions=POINTS // 2
        )
        shape = {"max_tokens": 1} if case == "score" else {"max_tokens": tokens, "ignore_eos": True}
        self._params = SamplingParams(temperature=0.0, detokenize=False, **shape)
        self._hf: Any = None
        if case == "score":
            import transformers

            self._hf = transformers.AutoModelForCausalLM.from_pretrained(model).to(device).eval()

    def contenders(self) -> dict[str, tuple[Callable[[], Any], int]]:
        """What is timed, and how many points it evaluates."""
        points = [(d, s) for d in range(POINTS // 2) for s in (1e-3, -1e-3)]
        found = {
            "vLLM": (lambda: self._ask(self._plain), 1),
            "vLLM, LoRA adapter": (lambda: self._ask(self._lora, self._adapter), 1),
            "probe at rest": (lambda: self._probe([(0, 0.0)]), 1),
            "probe, one point": (lambda: self._probe(points[:1]), 1),
            f"probe, {POINTS} points in a batch": (lambda: self._probe(points), POINTS),
            f"probe, {POINTS} points in turn": (lambda: [self._probe([point]) for point in points], POINTS),
        }
        return found if self._hf is None else found | {"Hugging Face": (self._forward, 1)}

    def _ask(self, llm: Any, adapter: Any = None) -> None:
        llm.reset_prefix_cache()
        llm.generate([{"prompt_token_ids": text} for text in self._texts], self._params, use_tqdm=False, lora_request=adapter)

    def _probe(self, points: list[tuple[int, float]]) -> None:
        from lozo_kernels.vllm import nll, rewards

        handle = self._optimizer.handle
        handle.llm.reset_prefix_cache()
        objective = nll(self._texts) if self._case == "score" else rewards(self._texts, self._params, lambda *_: 0.0)
        handle.expect(0, points)
        for point in points:
            handle.move(0, None, point)
            handle.loss_at(objective)

    @torch.no_grad()
    def _forward(self) -> None:
        texts = torch.tensor(self._texts, dtype=torch.int64, device=self._hf.device)
        logs = self._hf(texts).logits[:, :-1].float().log_softmax(-1)
        logs.gather(2, texts[:, 1:, None]).double().mean().item()


def cost(argv: list[str], output: Path, rounds: int, device: str) -> None:
    others, rows = OtherLoad(), []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", device)
        adapter = make_adapter(model, Path(folder) / "adapter")
        for case in CASES[device]:
            contenders = Cost(case, model, adapter, device).contenders()
            seen: dict[str, list[float]] = {name: [] for name in contenders}
            for turn in range(rounds + 1):
                for name, (work, points) in contenders.items():
                    if points == 1:
                        work()  # the process of its engine has slept, and another one had the caches
                    start = time.perf_counter()
                    work()
                    if turn:
                        seen[name].append(1e3 * (time.perf_counter() - start) / points)
            plain = statistics.median(seen["vLLM"])
            for name, times in seen.items():
                median = statistics.median(times)
                rows.append({"case": case, "contender": name, "ms_per_point": median, "to_vllm": median / plain})
                print(f"{case:8} {name:28} {median:9.1f} ms a point, {median / plain:.2f} of vLLM's", flush=True)
    evidence = made_by("bench.serving", argv, torch.device(device))
    about = {"model": SHAPES[device], "dtype": DTYPES[device], "cases": CASES[device], "rounds": rounds}
    write_result(evidence | about | {"cpus_used_by_others": others.mean(), "rows": rows}, output)


def rewards_of(seed: int, model: str, steps: int) -> list[float]:
    """The mean rewards of a run, in a process of its own."""
    code = f"import json, runpy; m = runpy.run_path({str(REPO / 'examples' / 'serving' / 'rewards.py')!r})"
    code += f"; print(json.dumps(m['main']({model!r}, {steps}, {seed})))"
    here = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=here, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def rewards(argv: list[str], output: Path, seeds: int, steps: int) -> None:
    import runpy

    with tempfile.TemporaryDirectory() as folder:
        model = runpy.run_path(str(REPO / "examples" / "serving" / "rewards.py"))["write_model"](folder)
        runs = [{"seed": seed, "rewards": rewards_of(seed, model, steps)} for seed in range(seeds)]
    first, last = ([statistics.mean(run["rewards"][part]) for run in runs] for part in (slice(5), slice(-5, None)))
    found = {"mean_of_first_5_steps": statistics.mean(first), "mean_of_last_5_steps": statistics.mean(last)}
    error = statistics.stdev(b - a for a, b in zip(first, last, strict=True)) / len(runs) ** 0.5
    print(found, "standard error of the gain", error)
    write_result(
        made_by("bench.serving", argv) | {"steps": steps} | found | {"standard_error_of_gain": error, "runs": runs}, output
    )


def main(argv: list[str] | None = None) -> int:
    parser = result_parser(__doc__, "serving_WHAT_cpu.json")
    parser.add_argument("what", choices=["cost", "rewards"])
    parser.add_argument("--device", choices=list(SHAPES), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    random.seed(0)
    output = args.output.with_name(args.output.name.replace("WHAT", args.what))
    if args.what == "cost":
        cost(argv, output, args.rounds, args.device)
    else:
        rewards(argv, output, args.seeds, args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
