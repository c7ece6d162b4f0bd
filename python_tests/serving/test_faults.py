"""Nothing is wrong in silence: an engine gives right numbers, or says in one line what is not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lozo_kernels
from lozo_kernels.errors import EngineError
from lozo_kernels.vllm import LOZO, nll
from lozo_kernels.vllm.worker import check_engine

from .engines import EPS, engine, losses_at, perturbed, texts
from .test_objectives import completions, sampling

POINTS = [(0, 0.0), (0, EPS), (0, -EPS), (1, EPS), (1, -EPS)]


def test_an_engine_that_was_not_built_for_it(models):
    with engine(models("llama"), plain=True) as llm, pytest.raises(EngineError, match="engine_options"):
        LOZO(llm, lr=1e-4)


def test_a_module_that_takes_no_part_is_named(models):
    """As after a compilation that did not see it, or a head that goes around."""
    with engine(models("llama")) as llm:
        optimizer = LOZO(llm, lr=1e-4, eps=EPS)
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        del model.model.layers[1].mlp.down_proj.quant_method.__dict__["apply"]
        with pytest.raises(EngineError, match=r"layers\.1\.mlp\.down_proj.*took no part"):
            optimizer.step(nll(texts(0)))


def test_a_place_with_another_matrix_is_named(models):
    with engine(models("llama")) as llm:
        optimizer = LOZO(llm, lr=1e-4, eps=EPS)
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        worker = llm.llm_engine.model_executor.driver_worker.worker
        site = next(site for site in worker.lozo.sites if site.places[0].module is model.model.layers[0].mlp.gate_up_proj)
        one, two = site.places
        one.first, two.first = two.first, one.first  # gate and up in each other's place
        with pytest.raises(EngineError, match=r"gate_up_proj.*does not compute with the checkpoint's matrix"):
            optimizer.step(nll(texts(0)))


@pytest.mark.parametrize(
    "options",
    [
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        {"load_format": "dummy"},
        {"pipeline_parallel_size": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_engines_that_would_be_trained_wrongly(models, options):
    from vllm.engine.arg_utils import EngineArgs

    plain = {"model": models("llama"), "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 128}
    check_engine(EngineArgs(**plain).create_engine_config())
    with pytest.raises(ValueError, match="cannot be trained"):
        check_engine(EngineArgs(**plain, **options).create_engine_config())


def test_points_do_not_move_under_requests(models):
    from vllm import SamplingParams

    with engine(models("llama")) as llm:
        optimizer = LOZO(llm, lr=1e-4, eps=EPS)
        optimizer.step(nll(texts(0)))
        llm.llm_engine.add_request("mine", {"prompt_token_ids": [3, 4, 5]}, SamplingParams(max_tokens=4, detokenize=False))
        for act in (lambda: optimizer.step(nll(texts(1))), optimizer.remove):
            with pytest.raises(EngineError, match="not finished"):
                act()
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        optimizer.step(nll(texts(1)))
        optimizer.remove()


def test_the_cache_of_prefixes_never_mixes_points(models, monkeypatch):
    """Prompts are longer than the cache's blocks. Without salts the points would see each other's keys and values."""
    prompts = texts(6, count=3, length=200)
    points = [(0, 0.3), (0, -0.3)]
    found = {}
    for cached in (False, True):
        with engine(models("llama"), enable_prefix_caching=cached, block_size=32) as llm:
            optimizer = LOZO(llm, lr=1e-4, eps=EPS)
            found[cached] = completions(optimizer, prompts, sampling(temperature=0.0), points)
            if cached:
                assert completions(optimizer, prompts, sampling(temperature=0.0), points) == found[cached]
                monkeypatch.setattr(type(optimizer.handle), "salt", lambda self, slot: "the same")
                for point in points:  # one after the other, so that the second finds the blocks of the first
                    found["unsalted", point] = completions(optimizer, prompts, sampling(temperature=0.0), [point])[point]
    assert found[True] == found[False]
    assert found["unsalted", points[1]] != found[False][points[1]]  # the guard is needed


def test_what_was_learned_is_seen_by_the_next_request(models):
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": texts(7, count=1, length=200)[0]}
    greedy = SamplingParams(max_tokens=8, temperature=0.0, detokenize=False, ignore_eos=True, logprobs=1)

    def ask(llm):
        (output,) = llm.generate([prompt], greedy, use_tqdm=False)
        return [next(iter(row.values())).logprob for row in output.outputs[0].logprobs]

    with engine(models("llama"), block_size=32) as llm:
        optimizer = LOZO(llm, lr=0.05, eps=EPS)
        before = ask(llm)
        optimizer.step(nll(texts(8)))
        after = ask(llm)
        llm.reset_prefix_cache()
        assert after == ask(llm)
        assert after != before
        optimizer.remove()
        assert ask(llm) == before  # in every bit


def test_prefill_in_chunks_and_preempted_requests(models):
    path, some = models("llama"), texts(9, count=8, length=120)
    with engine(path) as llm:
        optimizer = LOZO(llm, lr=1e-4, eps=EPS, directions=2)
        whole = losses_at(optimizer.handle, nll(some), POINTS)
        wrote = completions(optimizer, some, sampling(max_tokens=60, temperature=0.0), POINTS[1:3])
    small = {"max_num_batched_tokens": 64, "max_num_seqs": 16, "num_gpu_blocks_override": 24, "block_size": 32}
    with engine(path, **small) as llm:
        optimizer = LOZO(llm, lr=1e-4, eps=EPS, directions=2)
        preempted = []
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempt = scheduler._preempt_request
        scheduler._preempt_request = lambda *a, **k: (preempted.append(1), preempt(*a, **k))[1]
        pieces = losses_at(optimizer.handle, nll(some), POINTS)
        again = completions(optimizer, some, sampling(max_tokens=60, temperature=0.0), POINTS[1:3])
    assert preempted
    assert all(abs(pieces[point] - whole[point]) < 1e-6 for point in POINTS)
    assert again == wrote


@pytest.mark.parametrize("options", [{}, {"hf_overrides": {"head_dtype": "float32"}}], ids=["head_bf16", "head_fp32"])
def test_bf16(models, options):
    """The head alone is trained, which with head_dtype goes around its layer's method; then everything."""
    path, some = models("llama"), texts(10, count=8)
    for include in (["lm_head*"], None):
        points = [(d, s) for d in range(4) for s in (0.05, -0.05)]
        with engine(path, dtype="bfloat16", ours={"include": include}, **options) as llm:
            optimizer = LOZO(llm, lr=1e-4, eps=EPS, directions=4)
            optimizer.handle.check(nll(some))
            found = losses_at(optimizer.handle, nll(some), points)
        theirs = perturbed(path, some, points, include=include)
        mine, other = (torch.tensor([f[d, 0.05] - f[d, -0.05] for d in range(4)]) for f in (found, theirs))
        assert float((mine - other).abs().max()) < 0.1 * float(other.abs().max()) + 4e-3, (mine, other)


def test_an_engine_with_lora_has_the_same_losses(models):
    """LoRA layers call the layers that they wrap."""
    path, some = models("llama"), texts(11)
    with engine(path, enable_lora=True, max_lora_rank=8) as llm:
        optimizer = LOZO(llm, lr=1e-4, eps=EPS, directions=2)
        optimizer.handle.check(nll(some))
        found = losses_at(optimizer.handle, nll(some), POINTS)
    wanted = perturbed(path, some, POINTS)
    assert all(abs(found[p] - wanted[p]) < 1e-6 for p in POINTS)


def test_weights_of_eight_bits(models, tmp_path):
    """A W8A8 checkpoint moves as the model that its numbers stand for; activations of eight bits make noise."""
    path, some = Path(models("llama")), texts(12, count=12)
    weights, packed, plain = load_file(path / "model.safetensors"), {}, {}
    for name, w in weights.items():
        plain[name] = w
        if "_proj" in name:
            scale = w.abs().amax(1, keepdim=True) / 127
            packed[name] = (w / scale).round().clamp(-128, 127).to(torch.int8)
            packed[name + "_scale"] = scale.float()
            plain[name] = packed[name].float() * scale
        else:
            packed[name] = w.to(torch.bfloat16)
    config = json.loads((path / "config.json").read_text())
    for folder, tensors in (("packed", packed), ("plain", plain)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    group = {"num_bits": 8, "type": "int", "symmetric": True}
    quantised = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": group | {"strategy": "channel", "dynamic": False},
                "input_activations": group | {"strategy": "token", "dynamic": True},
            }
        },
    }
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "quantization_config": quantised}))
    points = [(d, s) for d in range(4) for s in (0.05, -0.05)]
    with engine(str(tmp_path / "packed"), dtype="bfloat16") as llm:
        optimizer = LOZO(llm, lr=1e-4, eps=EPS, directions=4)
        assert not optimizer.handle.not_placed
        optimizer.handle.check(nll(some))
        found = losses_at(optimizer.handle, nll(some), points)
    theirs = perturbed(str(tmp_path / "plain"), some, points)
    mine, other = (torch.tensor([f[d, 0.05] - f[d, -0.05] for d in range(4)]) for f in (found, theirs))
    assert float((mine - other).abs().max()) < 0.2 * float(other.abs().max()) + 1e-2, (mine, other)


def test_what_an_engine_does_not_have_is_said(models):
    with engine(models("llama")) as llm:
        optimizer = LOZO(llm, lr=1e-4, eps=EPS)
        for act, message in (
            (optimizer.state_dict, "journal"),
            (lambda: optimizer.load_state_dict({}), "journal"),
            (lambda: optimizer.save("x"), "journal="),
            (optimizer.reload, "journal="),
        ):
            with pytest.raises(EngineError, match=message):
                act()
        with pytest.raises(TypeError, match="fuse_steps"):
            LOZO(llm, fuse_steps=True)
        with pytest.raises(EngineError, match="points themselves"):
            optimizer.handle.perturb_(0, 1e-3)
        with pytest.raises(EngineError, match="no graph"):
            lozo_kernels.capture_step(optimizer, lambda inputs: 0.0, torch.zeros(1))
        second = LOZO(llm, lr=1e-4, eps=EPS)
        with pytest.raises(EngineError, match="another optimiser"):
            optimizer.step(nll(texts(0)))
        c, loss = second.estimate(nll(texts(0)))
        assert float(second.step(nll(texts(0)))) == float(loss) and float(second.info.c) == float(c[0])
        optimizer = second
        optimizer.remove()
        with pytest.raises(RuntimeError, match=r"restored|anew"):
            optimizer.step(nll(texts(0)))
        with pytest.raises(Exception, match="anew"):
            LOZO(llm, lr=1e-4)


def test_a_loss_that_is_not_finite_skips_the_step(models, monkeypatch):
    with engine(models("llama")) as llm:
        optimizer = LOZO(llm, lr=1e-4, eps=EPS)
        optimizer.step(nll(texts(0)))
        before = optimizer.handle.factors
        monkeypatch.setattr(optimizer.handle, "loss_at", lambda objective: (float("nan"), 7))
        with pytest.warns(UserWarning, match="skipped"):
            optimizer.step(nll(texts(1)))
        after = optimizer.handle.factors
        assert all(torch.equal(before[name], after[name]) for name in before)
