"""Faults of loops that were written for back-propagation: Lightning, TRL, accelerate and one's own. Each runs right, or says in one
line of its own what to do, never torch's "element 0 of tensors does not require grad"."""

import logging
import warnings

import lightning
import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch.callbacks import WeightAveraging
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lozo_kernels import LOZO
from python_tests.trainer_helpers import tiny_llama, token_rows

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|checkpoint|srun|batch size|log_every|eval mode).*")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.gain = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(3))

    def forward(self, x, y=None):
        logits = self.gain * self.second(self.first(x).tanh())
        return logits if y is None else (nn.functional.cross_entropy(logits, y), logits)


class Lit(lightning.LightningModule):
    """A module of Lightning with a loss that ``how`` computes and an optimiser that ``make`` makes."""

    def __init__(self, how, make, manual=False):
        super().__init__()
        self.net, self.unused = Net(), nn.Linear(2, 2)
        self.how, self.make, self.automatic_optimization = how, make, not manual

    def forward(self, x, y):
        return self.net(x, y)

    def training_step(self, batch, _):
        if self.automatic_optimization:
            return self.how(self, *batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.how(self, *batch))
        optimizer.step()
        return None

    def configure_optimizers(self):
        return self.make(self)


def fit(module, *callbacks):
    torch.manual_seed(0)
    data = [(torch.randn(6), torch.tensor(i % 3)) for i in range(12)]
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    return module


def outside(lit, x, y):
    return nn.functional.cross_entropy(lit.net(x), y)


def inside(lit, x, y):
    return lit.net(x, y)[0]


def of_itself(lit, x, y):
    return lit(x, y)[0]


def drive_itself(lit):
    return LOZO(lit, lr=1e-3, drive="backward")


def drive_net(lit):
    return LOZO(lit.net, lr=1e-3, drive="backward")


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize(
    ("how", "make", "said"),
    [
        (outside, drive_itself, "from a call of Net, which is no call of the driven Lit"),
        (inside, drive_itself, "from a call of Net, which is no call of the driven Lit"),
        (outside, drive_net, "must return its loss"),
        (lambda lit, x, y: lit.net.second(lit.net.first(x)).square().mean(), drive_net, "no call of the driven Net"),
        (lambda lit, x, y: inside(lit, x, y) + lit.net(x, y)[1].mean(), drive_net, "only that loss is trained"),
        (of_itself, drive_itself, None),
        (inside, drive_net, None),
    ],
    ids=["outside-self", "inside-self", "outside-net", "parts", "terms", "own call", "the module with the loss"],
)  # fmt: skip
def test_lightning(how, make, said, manual):
    module = Lit(how, make, manual)
    if said is None:
        before = module.net.first.weight.clone()
        fit(module)
        assert not torch.equal(before, module.net.first.weight)
        return
    with pytest.raises((RuntimeError, TypeError), match=said) as raised:
        fit(module)
    assert "element 0" not in str(raised.value)


def test_lightning_in_eval_mode():
    """Lightning leaves the mode alone, and models of transformers come in eval mode."""
    with pytest.raises(RuntimeError, match=r"in eval mode, where nothing is trained: call model.train\(\)"):
        fit(Lit(inside, drive_net).eval())


def test_lightning_without_a_drive():
    """Its closure enables gradients: the step is right, and a backward pass is paid for nothing."""
    with pytest.warns(UserWarning, match="pays time and memory for gradients that nothing uses"):
        module = fit(Lit(inside, lambda lit: LOZO(lit.net, lr=1e-3)))
    assert module.net.first.weight.grad is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pays time.*")
        fit(Lit(inside, drive_net))


AVERAGES = {"all": {}, "moving": {"avg_fn": get_ema_avg_fn(0.9)}, "no buffers": {"use_buffers": False}}


@pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES)
def test_lightning_averages_a_driven_model(options):
    with pytest.raises(TypeError, match=r"do not match: an average .* needs step\(closure\)"):
        fit(Lit(inside, drive_net), WeightAveraging(**options))


def test_lightning_averages_a_model_that_a_closure_trains():
    """The way out that the error names: manual optimisation."""

    class Manual(Lit):
        def training_step(self, batch, _):
            self.optimizers().step(closure=lambda: self.net(*batch)[0])

    averaging = WeightAveraging()
    module = Manual(None, lambda lit: LOZO(lit.net, lr=1e-2), manual=True)
    before = module.net.first.weight.detach().clone()
    fit(module, averaging)
    assert not torch.equal(module.net.first.weight, before) and module.net.first.weight.grad is None


@pytest.mark.parametrize("multi", [False, True])
def test_averages_that_are_made_before_the_drive(multi):
    """Where the shapes fit, each weight would be averaged with its neighbour."""
    holder = nn.Sequential(Net(), *(nn.Linear(1, 3, bias=False) for _ in range(2)))
    average = AveragedModel(holder, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9) if multi else None)
    optimizer = LOZO(holder[0], drive="backward")
    with pytest.raises(TypeError, match="do not match"):
        average.update_parameters(holder)
    with torch.no_grad(), pytest.raises(TypeError, match="do not match"):  # as other libraries do it
        torch._foreach_lerp_(list(average.module.parameters()), list(holder.parameters())[:-1], 0.1)
    optimizer.handle.restore()
    average.update_parameters(holder)


def test_a_closure_that_calls_backward():
    net, x, y = Net(), torch.randn(5, 6), torch.randint(3, (5,))
    optimizer = LOZO(net)

    def closure():
        loss = net(x, y)[0]
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"the closure calls backward\(\).*drive='backward'"):
        optimizer.step(closure)
    with pytest.raises(TypeError, match="drive='backward'"):
        optimizer.step()  # as a loop calls it that has called backward
    optimizer.step(lambda: net(x, y)[0])
    assert optimizer.steps_done == 1


def test_a_driven_closure_that_backpropagates_something_else():
    net, x, y = Net(), torch.randn(5, 6), torch.randint(3, (5,))
    optimizer = LOZO(net.train(), drive="backward")
    with pytest.raises(RuntimeError, match="from a call of Linear, which is no call of the driven Net"):
        optimizer.step(lambda: net.forward(x, y)[0].backward())
    with pytest.raises(RuntimeError, match="does not come from the driven model"):
        optimizer.step(lambda: net.gain.square().sum().backward())
    optimizer.step(lambda: net(x, y)[0].backward())
    assert optimizer.steps_done == 1


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "PEFT"])
def test_models_of_transformers_in_eval_mode(wrapped):
    model = tiny_llama().eval()
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval()
    batch = {name: row[None] for name, row in token_rows(1)[0].items()}
    optimizer = LOZO(model, lr=1e-3, drive="backward")
    accelerator = Accelerator(cpu=True)
    prepared, stepping = accelerator.prepare(model, optimizer)
    with pytest.raises(RuntimeError, match="in eval mode, where nothing is trained"):
        accelerator.backward(prepared(**batch).loss)
    for part in (m for m in model.modules() if type(m).__name__ == "LlamaModel"):
        with pytest.raises(RuntimeError, match="from a call of LlamaModel"):
            part.train()(input_ids=batch["input_ids"]).last_hidden_state.sum().backward()
    prepared.train()
    accelerator.backward(prepared(**batch).loss)
    stepping.step()
    assert optimizer.steps_done == 1
    with torch.no_grad():
        assert not prepared.eval()(**batch).loss.requires_grad
    optimizer.handle.restore()
    prepared.train()(**batch).loss.backward()


def test_gradients_of_inputs_in_eval_mode_are_right():
    """Saliency maps and adversarial examples need no parameter."""
    net, x, y = Net().eval(), torch.randn(5, 6, requires_grad=True), torch.randint(3, (5,))
    (expected,) = torch.autograd.grad(net(x, y)[0], x)
    LOZO(net, drive="backward")
    (found,) = torch.autograd.grad(net(x, y)[0], x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_distributed_data_parallel_sends_no_gradient_to_other_outputs(tmp_path, options):
    """It passes all outputs through one node of its own, which asks each of them for a gradient."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net, x, y = Net().train(), torch.randn(5, 6), torch.randint(3, (5,))
        optimizer = LOZO(net, lr=1e-3, drive="backward")
        wrapped = nn.parallel.DistributedDataParallel(net, **options)
        for _ in range(3):
            wrapped(x, y)[0].backward()
            optimizer.step()
        assert optimizer.steps_done == 3
        loss, logits = wrapped(x, y)
        with pytest.raises(RuntimeError, match="only that loss is trained"):
            (loss + logits.mean()).backward()
    finally:
        torch.distributed.destroy_process_group()


def test_derivatives_within_a_loss():
    """As in physics-informed networks: derivatives with respect to inputs, in a closure that says so."""
    net, x = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), torch.linspace(0, 1, 7)[:, None].requires_grad_(True)
    optimizer = LOZO(net, lr=1e-3)

    def slope():
        (found,) = torch.autograd.grad(net(x).sum(), x)
        return (found - 1).square().mean()

    with pytest.raises(RuntimeError, match=r"takes them under torch\.enable_grad\(\)"):
        optimizer.step(slope)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(torch.enable_grad()(slope))
    assert optimizer.steps_done == 1
