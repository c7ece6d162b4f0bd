"""A probe inside Hugging Face models: generation, attention implementations, adapters, layers that are called several times."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from lozo_kernels import LOZO, patch  # noqa: E402
from python_tests.architectures import build, run  # noqa: E402
from python_tests.models import same, weights  # noqa: E402


def materialised_twin(name, handle, seed=0, **changes):
    """A plain model with the weights that a probed one behaves as having."""
    twin, _ = build(name, seed=seed)
    run(twin, build(name, seed=seed)[1])
    for n, p in twin.named_parameters():
        handle.write_perturbed(n, p.data)
    return twin


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3_moe", "t5"])
@pytest.mark.parametrize("side", ["activation", "scratch"])
def test_greedy_generation_with_a_cache(name, side):
    model, inputs = build(name)
    run(model, inputs)
    handle = patch(model, placement="probe", side=side, rank=4)
    handle.prepare(lambda: run(model, inputs)[0])
    handle.update_(0, 1.0, 0.05)
    handle.perturb_(1, 0.05)
    settings = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    ids = inputs["input_ids"][:, :5]
    expected = materialised_twin(name, handle).generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations(attention):
    model, inputs = build("llama")
    model.set_attn_implementation(attention)
    handle = patch(model, placement="probe", rank=2, side="activation")
    handle.prepare(lambda: run(model, inputs)[0])
    handle.perturb_(0, 0.05)
    twin = materialised_twin("llama", handle)
    twin.set_attn_implementation(attention)
    with torch.no_grad():
        assert torch.allclose(run(model, inputs)[1], run(twin, inputs)[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_expert_implementations(experts):
    model, inputs = build("mixtral")
    model.set_experts_implementation(experts)
    before = weights(model)
    handle = patch(model, placement="probe", rank=2)
    handle.prepare(lambda: run(model, inputs)[0])
    assert handle.notes == () and {m.side for m in handle.members} <= {"activation", "scratch", "copy", "shift"}
    handle.perturb_(0, 0.02)
    twin = materialised_twin("mixtral", handle)
    twin.set_experts_implementation(experts)
    with torch.no_grad():
        assert torch.allclose(run(model, inputs)[1], run(twin, inputs)[1], rtol=1e-4, atol=1e-5)
    assert same(weights(model), before)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_adapters_of_peft_are_trained_like_in_place(options):
    peft = pytest.importorskip("peft")
    finals = []
    for placement in ("inplace", "probe"):
        model, inputs = build("llama")
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
        model = peft.get_peft_model(model, config).eval()
        before = weights(model)
        optimizer = LOZO(model, placement=placement, lr=1e-2, eps=1e-3, rank=2, interval=2)
        for _ in range(4):
            optimizer.step(lambda model=model, inputs=inputs: model(**inputs).loss)
        if placement == "probe":
            assert optimizer.handle.notes == () and "inplace" not in {m.side for m in optimizer.handle.members}
        optimizer.handle.restore()
        after = weights(model)
        assert all("lora" in n for n in after if not torch.equal(after[n], before[n]))
        finals.append((before, after))
    for n, p in finals[0][1].items():
        moved = (p - finals[0][0][n]).norm()
        assert (finals[1][1][n] - p).norm() <= 0.05 * moved + 1e-6, n


def test_a_merged_adapter_is_an_error():
    peft = pytest.importorskip("peft")
    model, inputs = build("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    optimizer = LOZO(model, placement="probe", rank=2)
    optimizer.step(lambda: model(**inputs).loss)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"adapter of '.*q_proj' is merged into its layer"):
        optimizer.step(lambda: model(**inputs).loss)
    model.unmerge_adapter()
    optimizer.step(lambda: model(**inputs).loss)
    optimizer.handle.restore()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="is merged into its layer"):
        LOZO(model, placement="probe", rank=2)
    with pytest.raises(RuntimeError, match="is merged into its layer"):  # in place too: nothing runs what is trained
        LOZO(model, rank=2)


def test_saved_models_hold_what_was_learned(tmp_path):
    model, inputs = build("opt")
    optimizer = LOZO(model, placement="probe", lr=1e-2, rank=2)
    for _ in range(3):
        optimizer.step(lambda: run(model, inputs)[0])
    with torch.no_grad():
        live = run(model, inputs)[1]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(run(again, inputs)[1], live, rtol=1e-4, atol=1e-5)
