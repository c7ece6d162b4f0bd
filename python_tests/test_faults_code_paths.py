"""Probes of models that take another way through their code later: other modes, branches that run late, fast paths of torch."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lozo_kernels import LOZO, MeZO, patch
from lozo_kernels.model.probe.choosing import lookout


def pair(make, *, seed=0):
    """A model and a twin with the same weights."""
    torch.manual_seed(seed)
    model, twin = make(), make()
    twin.load_state_dict(model.state_dict())
    return model, twin


def materialise(handle, twin):
    """Gives the twin the weights that the probed model behaves as having."""
    for name, p in twin.named_parameters():
        if p.requires_grad:
            handle.write_perturbed(name, p.data)
    return twin


def assert_same(handle, model, twin, call):
    """The probed model computes what the twin does with the probed model's weights."""
    with torch.no_grad():
        torch.testing.assert_close(call(model), call(materialise(handle, twin)), rtol=1e-4, atol=1e-5)


def learn(model, loss, steps=3, **options):
    """Takes steps that move the model so far that a weight without what it learned is seen."""
    optimizer = LOZO(model, **{"placement": "probe", "lr": 0.1, "eps": 1e-2, "rank": 2, "interval": 50, **options})
    for _ in range(steps):
        optimizer.step(loss)
    return optimizer


class Classifier(nn.Module):
    """nn.TransformerEncoder as torch's tutorials use it."""

    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers that never take the fast path
            self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x, padding=None):
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


def padded_batch():
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"norm_first": True}], ids=lambda o: "-".join(o) or "plain")
def test_what_a_transformer_encoder_learned_in_train_mode_is_there_in_eval_mode(options, padded):
    model, twin = pair(lambda: Classifier(**options))
    x, padding = padded_batch()
    padding = padding if padded else None
    y = torch.tensor([0, 1, 2])
    model.train()
    optimizer = learn(model, lambda: F.cross_entropy(model(x, padding), y))
    model.eval()
    assert_same(optimizer.handle, model, twin.eval(), lambda m: m(x, padding))
    model.train()
    assert_same(optimizer.handle, model, twin.train(), lambda m: m(x, padding))
    optimizer.handle.restore()
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("first", ["train", "eval"])
@pytest.mark.parametrize("make", [LOZO, MeZO])
def test_steps_of_a_transformer_encoder_in_both_modes(make, first):
    model, twin = pair(Classifier)
    x, padding = padded_batch()
    y = torch.tensor([0, 1, 2])
    optimizers = [
        make(m, placement=where, lr=0.05, eps=1e-2, **({"rank": 2} if make is LOZO else {}))
        for m, where in ((model, "probe"), (twin, "inplace"))
    ]
    for mode in (first, "train", "eval", "train", "eval"):
        losses = []
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            m.train(mode == "train")
            losses.append(float(optimizer.step(lambda m=m: F.cross_entropy(m(x, padding), y))))
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        assert torch.allclose(optimizers[0].info.c, optimizers[1].info.c, rtol=2e-2, atol=1e-2)


def test_a_fast_path_that_was_taken_in_the_first_step_stays():
    model = Classifier().eval()
    x, _ = padded_batch()
    optimizer = learn(model, lambda: model(x).square().mean())
    layers = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    assert not any(inner._forward_pre_hooks for layer in layers for inner in layer.modules())
    assert {m.side for m in optimizer.handle.members if "layers" in m.name} <= {"scratch", "copy"}


class Late(nn.Module):
    """Has a branch that is not taken at first, and in which a parent reads the weights of its children."""

    def __init__(self, branch):
        super().__init__()
        self.first, self.branch, self.late = nn.Linear(8, 8), branch, False

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return x + self.branch(x) if self.late else x


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(x, self.inner.weight, self.inner.bias)


class Transposed(nn.Module):
    """An autoencoder with one weight both ways."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 6)

    def forward(self, x):
        return torch.tanh(self.inner(x)) @ self.inner.weight


BRANCHES = {"attention": Attention, "raw": Raw, "transposed": Transposed, "plain": lambda: nn.Linear(8, 8)}


def take_alike(models, optimizers, x):
    """Takes steps of both, of which the later ones run the late branch, and compares them."""
    for step in range(6):
        losses = []
        for m, optimizer in zip(models, optimizers, strict=True):
            m.late = step >= 2
            losses.append(float(optimizer.step(lambda m=m: m(x).square().mean())))
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        assert torch.allclose(optimizers[0].info.c, optimizers[1].info.c, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("side", ["auto", "activation", "scratch", "copy"])
def test_a_branch_that_first_runs_in_a_later_step_is_perturbed(branch, side):
    model, twin = pair(lambda: Late(BRANCHES[branch]()))
    x = torch.randn(2, 4, 8)
    optimizers = [
        LOZO(m, lr=0.05, eps=1e-2, rank=2, interval=4, **o) for m, o in ((model, {"placement": "probe", "side": side}), (twin, {}))
    ]
    take_alike((model, twin), optimizers, x)
    assert not any("not verified" in note for note in optimizers[0].handle.notes)


@pytest.mark.parametrize("branch", ["attention", "raw", "transposed"])
def test_a_branch_that_first_runs_in_an_evaluation_has_what_it_learned(branch):
    """All parameters learn, also those that no loss depends on yet."""
    model, twin = pair(lambda: Late(BRANCHES[branch]()))
    x = torch.randn(2, 4, 8)
    optimizer = learn(model, lambda: model(x).square().mean())
    model.late = twin.late = True
    assert_same(optimizer.handle, model, twin, lambda m: m(x))
    assert_same(optimizer.handle, model, twin, lambda m: m(x))
    optimizer.step(lambda: model(x).square().mean())
    assert_same(optimizer.handle, model, twin, lambda m: m(x))


class TwoModes(nn.Module):
    """Reads a weight in another way in eval mode, as layers do that fuse for inference."""

    def __init__(self):
        super().__init__()
        self.inner, self.drop, self.norm = nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)

    def forward(self, x, cache=None):
        if cache is not None:
            cache.append(x)
        if self.training:
            return self.norm(self.drop(self.inner(x)))
        return self.norm(x @ self.inner.weight.T + self.inner.bias)


def test_weights_that_are_read_in_another_way_in_eval_mode():
    model, twin = pair(TwoModes)
    x = torch.randn(16, 8)
    optimizer = learn(model, lambda: model(x).square().mean() + model.inner(x).square().mean())
    model.eval()
    twin.load_state_dict({n: b.clone() for n, b in model.named_buffers()}, strict=False)
    twin.eval()
    assert_same(optimizer.handle, model, twin, lambda m: m(x))
    optimizer.step(lambda: model(x).square().mean())
    assert not optimizer.handle.moves_weights  # a probe still
    assert_same(optimizer.handle, model, twin, lambda m: m(x))
    assert any("also used inside TwoModes" in str(m.reason) for m in optimizer.handle.members)


def test_random_numbers_and_statistics_advance_once_in_a_forward_that_is_made_again():
    """The first forward in another mode reads a weight in another way, in train mode with dropout and BatchNorm."""

    class Turned(TwoModes):
        def forward(self, x):
            return self.norm(self.drop(self.inner(x) if not self.training else x @ self.inner.weight.T + self.inner.bias))

    model, twin = pair(Turned)
    x = torch.randn(16, 8)
    model.eval()
    optimizer = learn(model, lambda: model(x).square().mean())
    model.train()
    twin.train()
    materialise(optimizer.handle, twin)
    with torch.no_grad():
        torch.manual_seed(3)
        got, after = model(x), torch.rand(3)
        torch.manual_seed(3)
        torch.testing.assert_close(got, twin(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(after, torch.rand(3))
    assert model.norm.num_batches_tracked == twin.norm.num_batches_tracked == 1
    torch.testing.assert_close(model.norm.running_mean, twin.norm.running_mean)


def test_inputs_that_a_forward_may_change_make_one_error_and_then_it_is_right():
    model, twin = pair(TwoModes)
    x = torch.randn(16, 8)
    optimizer = learn(model, lambda: model(x).square().mean())
    model.eval()
    twin.load_state_dict({n: b.clone() for n, b in model.named_buffers()}, strict=False)
    twin.eval()

    class Cache(list):
        """As transformers' caches, whose contents nobody knows."""

    from torch.utils import _pytree

    assert not _pytree.tree_is_leaf([]) and _pytree.tree_is_leaf(Cache())
    with pytest.raises(RuntimeError, match="make this call again"):
        model(x, cache=Cache())
    assert_same(optimizer.handle, model, twin, lambda m: m(x, cache=Cache()))


def test_the_pooling_head_of_siglip_first_used_after_training():
    """Its attention is an nn.MultiheadAttention, and the steps use the encoder alone."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    model, twin = pair(lambda: SiglipVisionModel(config))
    images = torch.randn(2, 3, 8, 8)
    body = getattr(model, "vision_model", model)

    def loss():
        return body.encoder(inputs_embeds=body.embeddings(images)).last_hidden_state.square().mean()

    optimizer = learn(model, loss)
    model.eval(), twin.eval()
    assert_same(optimizer.handle, model, twin, lambda m: m(images).pooler_output)


def test_a_second_adapter_of_peft_is_used_later():
    peft = pytest.importorskip("peft")
    from transformers import OPTConfig, OPTForCausalLM

    def make():
        base = OPTForCausalLM(
            OPTConfig(vocab_size=32, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16)
        )
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(base, config)
        model.add_adapter("second", config)
        for name, p in model.named_parameters():
            p.requires_grad_("lora" in name)
        return model.eval()

    model, twin = pair(make)
    ids = torch.arange(12).view(2, 6)
    optimizer = learn(model, lambda: model(input_ids=ids, labels=ids).loss)
    model.set_adapter("second")
    twin.set_adapter("second")
    for _, p in twin.named_parameters():
        p.requires_grad_(False)
    for name, p in twin.named_parameters():
        if name in optimizer.handle.names:
            optimizer.handle.write_perturbed(name, p.data)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, twin(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_the_order_of_modes_is_looked_at_once_each(monkeypatch):
    model = TwoModes()
    x = torch.randn(16, 8)
    looks = []
    monkeypatch.setattr(lookout, "Uncovered", lambda members, kind=lookout.Uncovered: looks.append(1) or kind(members))
    optimizer = learn(model, lambda: model(x).square().mean())
    for _ in range(4):
        model.eval()
        model(x)
        model.train()
        optimizer.step(lambda: model(x).square().mean())
    assert len(looks) == 1


def test_an_interrupt_in_a_forward_that_is_looked_at_leaves_nothing_on():
    model = TwoModes()
    x = torch.randn(16, 8)
    optimizer = learn(model, lambda: model(x).square().mean())
    model.eval()

    def interrupt(module, args):
        raise KeyboardInterrupt

    hook = model.norm.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    hook.remove()
    twin = TwoModes()
    twin.load_state_dict({n: b.clone() for n, b in model.named_buffers()}, strict=False)
    assert_same(optimizer.handle, model, twin.eval(), lambda m: m(x))
    assert (
        not torch.utils._python_dispatch._len_torch_dispatch_stack()
        if hasattr(torch.utils._python_dispatch, "_len_torch_dispatch_stack")
        else True
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_looking_again_changes_no_side_that_was_right(dtype, autocast):
    torch.manual_seed(0)
    model = Classifier() if autocast else Classifier().to(dtype)
    x, y = padded_batch()[0].to(torch.float32 if autocast else dtype), torch.tensor([0, 1, 2])

    def loss():
        with torch.autocast("cpu", dtype, enabled=autocast):
            return F.cross_entropy(model(x).float(), y)

    optimizer = learn(model.train(), loss, lr=1e-2, side="activation")
    sides = [(m.name, m.side) for m in optimizer.handle.members]
    model.eval()
    optimizer.step(loss)
    optimizer.handle._doubts.add(optimizer.handle.members)
    optimizer.step(loss)
    assert [(m.name, m.side) for m in optimizer.handle.members] == sides and optimizer.handle.notes == ()


def test_a_handle_alone_looks_again_too():
    model, twin = pair(Classifier)
    x, _ = padded_batch()
    handle = patch(model, placement="probe", rank=2)
    handle.prepare(lambda: model(x).square().mean())
    handle.perturb_(0, 0.1)
    model.eval()
    assert_same(handle, model, twin.eval(), lambda m: m(x))


@pytest.mark.parametrize("first", ["train", "eval"])
def test_a_compiled_transformer_encoder_in_both_modes(first):
    torch._dynamo.reset()
    model, twin = pair(Classifier)
    x, _ = padded_batch()
    model.compile(backend="eager")
    model.train(first == "train")
    optimizer = learn(model, lambda: model(x).square().mean())
    for mode in (True, False):
        model.train(mode), twin.train(mode)
        assert_same(optimizer.handle, model, twin, lambda m: m(x))


class SameModule(nn.Module):
    """Reads weights of modules that never run, in a branch of a forward that did without them before."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.late = nn.Linear(8, 8), nn.Linear(8, 8), False
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.gate = nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        if self.late:
            x = F.linear(x, self.inner.weight, self.inner.bias) * self.gate
            x = x @ self.experts[0].weight.T + torch.einsum("...i,oi->...o", x, self.experts[1].weight) + self.experts[0].bias
        return x


@pytest.mark.parametrize("kind", [LOZO, MeZO])
@pytest.mark.parametrize("side", ["auto", "scratch", "copy"])
def test_a_weight_that_a_module_which_ran_first_reads_in_a_later_step(kind, side):
    model, twin = pair(SameModule)
    x, options = torch.randn(2, 4, 8), {"rank": 2, "interval": 4} if kind is LOZO else {}
    optimizers = [
        kind(m, lr=0.05, eps=1e-2, **options, **o) for m, o in ((model, {"placement": "probe", "side": side}), (twin, {}))
    ]
    take_alike((model, twin), optimizers, x)
    assert not optimizers[0].handle.moves_weights


def test_an_unused_weight_is_converted_and_read_as_others():
    model, twin = pair(SameModule)
    x = torch.randn(2, 4, 8)
    optimizer = learn(model, lambda: model(x).square().mean())
    materialise(optimizer.handle, twin)
    stored = model.inner.weight.detach().clone()
    assert torch.equal(model.inner.weight.clone(), stored) and torch.equal(model.inner.weight.double().float(), stored)
    assert (twin.inner.weight - stored).abs().max() > 0.05  # what it learned
    model.bfloat16()
    optimizer.handle.restore()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.float(), q, rtol=1e-2, atol=1e-2)


def test_a_closure_that_takes_an_unused_weight_by_itself():
    model, twin = pair(SameModule)
    x, late = torch.randn(2, 4, 8), [False]

    def loss(m):
        return (m(x) @ m.inner.weight if late[0] else m(x)).square().mean()

    optimizers = [LOZO(m, lr=0.05, eps=1e-2, rank=2, interval=4, **o) for m, o in ((model, {"placement": "probe"}), (twin, {}))]
    for step in range(6):
        late[0] = step >= 2
        losses = [float(o.step(lambda m=m: loss(m))) for m, o in zip((model, twin), optimizers, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        assert torch.allclose(optimizers[0].info.c, optimizers[1].info.c, rtol=2e-2, atol=1e-2)


def test_a_weight_that_a_module_which_ran_first_reads_in_an_evaluation():
    model, twin = pair(SameModule)
    x = torch.randn(2, 4, 8)
    optimizer = learn(model, lambda: model(x).square().mean())
    model.late = twin.late = True
    assert_same(optimizer.handle, model, twin, lambda m: m(x))
    copied = copy.deepcopy(model)
    assert (
        {type(p) for p in copied.parameters()}
        == {nn.Parameter}
        == {type(p) for p in pickle.loads(pickle.dumps(model)).parameters()}
    )
    assert_same(optimizer.handle, model, copied, lambda m: m(x))
    model.inner.weight.data.mul_(1.0)
    assert model.inner.weight.shape == (8, 8) and model.inner.weight.dtype == torch.float32
    optimizer.handle.restore()
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    torch.testing.assert_close(model(x), copied(x), rtol=1e-4, atol=1e-5)


def test_an_unused_layer_that_runs_later_by_itself_or_by_its_forward():
    class Called(SameModule):
        def forward(self, x):
            x = torch.tanh(self.first(x))
            return self.experts[0].forward(self.inner(x)) if self.late else x

    model, twin = pair(Called)
    x = torch.randn(2, 4, 8)
    optimizer = learn(model, lambda: model(x).square().mean())
    model.late = twin.late = True
    assert_same(optimizer.handle, model, twin, lambda m: m(x))
    optimizer.step(lambda: model(x).square().mean())
    assert_same(optimizer.handle, model, twin, lambda m: m(x))
