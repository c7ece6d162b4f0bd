"""Random models with awkward parameters, ``patch()`` with any options, and the methods of a handle against plain arithmetic."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lozo_kernels import Handle, PatchConfig, handle_of, patch
from lozo_kernels.kernels import noise
from lozo_kernels.model.config import ESTIMATORS, FACTORED, PLACEMENTS, ROUNDINGS, SCALINGS, SIDES
from python_tests.fuzz.choices import ANSWER, ODD_NUMBERS, ODD_THINGS, Choices, Memory, attempt, expect, reference_answer

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Net(nn.Module):
    """Layers of every kind in a row, tied or not, and parameters that the forward uses as they are."""

    def __init__(self, case: Choices) -> None:
        super().__init__()
        width, dtype = case.of(1, 3, 8, 17), case.of(*FLOATS)
        self.embed = nn.Embedding(case.of(2, 11), width)
        self.up = nn.Linear(width, case.of(width, 5), bias=case.chance(70))
        self.norm = nn.LayerNorm(self.up.out_features)
        self.head = nn.Linear(self.up.out_features, self.embed.num_embeddings, bias=False)
        self.to(dtype)
        if case.chance(30) and self.head.weight.shape == self.embed.weight.shape:
            self.head.weight = self.embed.weight
        if case.chance(30):
            self.up.weight.requires_grad_(False)
        self.extra = nn.ParameterDict()
        if case.chance(40):
            shape = case.of((), (4,), (2, 3, 5), (3, 1), (0, 4), (2, 0))
            self.extra["more"] = nn.Parameter(torch.randn(shape).to(case.of(*FLOATS)))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.head(self.norm(torch.tanh(self.up(self.embed(tokens))))).float()
        return h + self.extra["more"].float().sum() if "more" in self.extra else h


def make_model(case: Choices, percent: int = 25) -> Net:
    """A model, now and then with a parameter that cannot be trained, or two that share storage."""
    model = Net(case)
    kinds = ("fp64", "complex", "meta", "int", "transposed", "expanded", "shared", "part", "freed", "neg", "inference", "sparse")
    for kind in case.odd(percent, *kinds, note="parameter"):
        case.notes[-1] = f"parameter: {kind}"
        p = torch.randn(4, 6)
        with torch.inference_mode(kind == "inference"):
            odd = _strange(kind, p, model)
            model.extra["odd"] = nn.Parameter(p.int(), requires_grad=False) if kind == "int" else nn.Parameter(odd)
        if kind == "freed":
            odd.untyped_storage().resize_(0)
    return model


def _strange(kind: str, p: Tensor, model: Net) -> Tensor:
    kinds = {
        "fp64": lambda: p.double(),
        "complex": lambda: torch.complex(p, p),
        "meta": lambda: p.to("meta"),
        "transposed": lambda: p.t(),
        "expanded": lambda: p[:1].expand(5, -1),
        "shared": lambda: model.embed.weight.data,
        "part": lambda: model.embed.weight.data[0],
        "neg": lambda: torch._neg_view(p),
        "sparse": lambda: p.to_sparse(),
    }
    return kinds.get(kind, p.clone)()


def contents(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that have storage, by name, copied."""
    found = {name: p for name, p in model.named_parameters() if p.layout == torch.strided and p.device.type == "cpu"}
    return {name: p.detach().clone() for name, p in found.items() if not p.numel() or p.untyped_storage().nbytes()}


def memory_of(model: nn.Module) -> Memory:
    return Memory([p.detach() for p in model.parameters()])


def loss_of(model: nn.Module) -> Any:
    """A closure: cross-entropy of the model on fixed tokens."""
    tokens = torch.randint(0, model.embed.num_embeddings, (2, 5))  # type: ignore[union-attr,arg-type]
    return lambda: nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


BY_HAND = ("lowrank", "dense", "subspace")
"""The estimators whose handles move and update with nothing but a step and a scale: no inputs, parts of a batch, or momentum."""


def make_options(case: Choices, *, estimators: Sequence[str] = (), placement: bool = True) -> dict[str, Any]:
    """Keywords of :func:`patch`."""
    options: dict[str, Any] = {
        "rank": case.of(1, 2, 4, 9),
        "interval": case.of(1, 3, 50),
        "seed": case.whole("seed", 1 << 64, 2),
        "rounding": case.of("nearest", *ROUNDINGS),
        "backend": case.of(None, None, "native", "eager"),
    }
    if estimators:
        options["estimator"] = case.of(*estimators)
    kind = options.get("estimator")
    if kind not in FACTORED:
        options["scaling"] = case.of("paper", *SCALINGS)
    if kind == "perexample":
        options["placement"] = "probe"
    elif placement and case.chance(30):
        kept = kind != "guided" and case.chance(30)
        options |= {"placement": "probe", "side": case.of("auto", *SIDES), "keep_factors": kept}
    if case.chance(10):
        options["include"] = case.of("*", ("embed*", "up*", "head*"), ["*weight"])
    for name in case.odd(12, *options, "exclude", "square", "include", "allow_drift", "drive", note="option"):
        case.notes[-1] = f"option: {name}"
        options[name] = case.of(*ODD_THINGS, 0, -1, 65, 2**64, "[", "nothing*", ["*", 3], "cuda", "card", *ESTIMATORS, *PLACEMENTS)
    return options


def run_config(case: Choices) -> str:
    """:class:`PatchConfig` of any values, and back from JSON."""
    options = make_options(case, estimators=ESTIMATORS)
    for name in case.odd(30, *PatchConfig.__dataclass_fields__, note="field"):
        options[name] = case.of(*ODD_THINGS, [("a", "scratch")], {"*": "copy"}, {"*": 3}, [("a",)], 2**63, 10**30, math.nan)
    options.pop("drive", None)
    outcome, config = attempt(case, Memory(), lambda: PatchConfig(**options))
    if outcome == ANSWER:
        with reference_answer(case):
            expect(PatchConfig.from_json(config.to_json()) == config, "JSON gives another config", case)
            expect(hash(config) is not None and 1 <= config.rank <= 64 and 0 <= config.seed < 1 << 64, "not checked", case)
    text = config.to_json() if outcome == ANSWER else "{}"
    for damage in case.odd(20, "", "[", "[]", "3", "null", '{"rnk": 2}', '{"rank": "x"}', '{"rank": NaN}', text[:-2], note="JSON"):
        attempt(case, Memory(), functools.partial(PatchConfig.from_json, damage))
    return outcome


def run_handle(case: Choices) -> str:
    """``patch()`` and some methods of what it returns."""
    model = make_model(case)
    memory, options = memory_of(model), make_options(case, estimators=BY_HAND)
    target = case.of(model, *case.odd(2, *ODD_THINGS, note="model"))
    outcome, handle = attempt(case, memory, lambda: patch(target, **options))
    if outcome != ANSWER:
        expect(handle_of(model) is None, "a model whose patch failed is patched", case)
        return outcome
    memory.check("patch() worked")
    closure = loss_of(model)
    if handle.config.placement != "inplace" and case.chance(80):
        outcome, _ = attempt(case, memory, lambda: handle.prepare(closure))
    elif handle.config.placement != "inplace":
        case.notes.append("not prepared")
    for _ in range(case.of(1, 2, 3)):
        if outcome == ANSWER:
            outcome = _method(case, model, handle)
    if outcome == ANSWER:
        with reference_answer(case):
            str(handle.report())
            handle.restore()
            expect(handle_of(model) is None, "restored and still patched", case)
    return outcome


def _method(case: Choices, model: nn.Module, handle: Handle) -> str:
    with contextlib.suppress(RuntimeError):  # what decayed and cannot is found out here
        handle.merge()
    before = contents(model)
    memory = memory_of(model)
    kept = {name: n.clone() for name, n in handle.momentum.items()}
    step: Any = case.whole("step", noise.MAX_DRAW - 1, 3)
    direction = case.of(0, 0, case.whole("direction", noise.MAX_DIRECTION, 3))
    scale: Any = case.of(1e-2, -0.3, 0, 1.0)
    for odd in case.odd(5, *ODD_NUMBERS, *ODD_THINGS[:-1], torch.zeros(2), note="scale"):
        scale = odd
    which = case.of("perturb", "perturb", "shift", "update", "update", "momentum", "direction", "load")
    if isinstance(step, int) and which != "direction":
        direction = direction if case.chance(50) else 0
    calls: dict[str, Any] = {
        "perturb": lambda: handle.perturb_(step, scale, direction=direction),
        "shift": lambda: _shift(handle, step, direction, scale),
        "momentum": handle.enable_momentum,
        "direction": lambda: handle.materialize(_name(case, handle), step, direction=direction),
        "load": lambda: handle.load_momentum(*_momentum(case, handle)),
    }
    if which == "update":
        return _update(case, handle, before, memory, step)
    outcome, found = attempt(case, memory, calls[which])
    if outcome != ANSWER:
        same = all(torch.equal(n, kept[name]) for name, n in handle.momentum.items() if name in kept)
        expect(same, "an error left other momentum", case)
        return outcome
    with reference_answer(case):
        if which == "perturb":
            _check_moved(case, handle, before, step, [(direction, float(scale))])
            handle.perturb_(step, -float(scale), direction=direction)
        elif which == "shift":
            _check_moved(case, handle, before, step, [(0, -0.1), (direction, float(scale))])
        elif which == "direction":
            expect(bool(found.isfinite().all()), "a direction is not finite", case)
    return outcome


def _shift(handle: Handle, step: Any, direction: Any, scale: Any) -> None:
    if handle.config.placement == "inplace":
        handle.shift_(step, (0, 0.1), (direction, scale))
    else:
        handle.shift_(step, (0, 0.0), (direction, scale))
        handle.shift_(step, (direction, scale), (0, 0.0))


def _name(case: Choices, handle: Handle) -> Any:
    name = case.of(*handle.names)
    for odd in case.odd(10, "nothing", None, 3, [], note="name"):
        name = odd
    return name


def _momentum(case: Choices, handle: Handle) -> Any:
    handle.enable_momentum()
    saved = {name: torch.randn_like(n) for name, n in handle.momentum.items()}
    window: Any = case.of(None, 0, 5)
    for odd in case.odd(40, "gone", "shape", "thing", "all", "window", note="saved momentum"):
        name = next(iter(saved))
        if odd == "gone":
            del saved[name]
        elif odd == "window":
            window = case.of(*ODD_THINGS[1:], -1, 1 << 28)
        else:
            saved[name] = {"shape": torch.zeros(3, 3, 3, 3), "thing": case.of(*ODD_THINGS), "all": None}[odd]
            saved = case.of(*ODD_THINGS) if odd == "all" else saved
    return saved, window


def _check_moved(case: Choices, handle: Handle, before: dict[str, Tensor], step: int, moves: list[tuple[int, float]]) -> None:
    """X + sum of scale * D, in place; under a probe no weight moves."""
    now = dict(handle.model.named_parameters())
    for name, x in before.items():
        moved = now[name].detach()
        if handle.config.placement != "inplace" or name not in handle.names:
            # One that is odd may be a part of one that is trained.
            expect(name == "extra.odd" or torch.equal(moved, x), f"{name} moved", case)
            if name not in handle.names or len(moves) > 1:
                continue
            moved = torch.empty_like(x, memory_format=torch.contiguous_format)
            handle.write_perturbed(name, moved)  # what the model is evaluated with
        wanted, size = x.double(), x.double().abs()
        for direction, scale in moves:
            d = handle.materialize(name, step, direction=direction).double()
            wanted, size = wanted + scale * d, size + abs(scale) * d.abs()
        bound = 1.01 * UNIT[x.dtype] * wanted.abs() + 16 * 2.0**-24 * (size + abs(sum(abs(s) for _, s in moves)) * 25) + 2.0**-24
        good = ((moved.double() - wanted).abs() <= bound) | ~(wanted.abs() <= 6e4)
        expect(bool(good.all()), f"{name} moved to the wrong place", case)


def _update(case: Choices, handle: Handle, before: dict[str, Tensor], memory: Memory, step: Any) -> str:
    number = case.of(0.5, -2.0, 0, torch.tensor(0.25))
    c: Any = case.of(number, [number], [number, 1.5], [0.1, 0.2, 0.3])
    lr: Any = case.of(1e-2, 0, torch.tensor(1e-2), torch.full((len(handle.names),), 1e-2))
    decay: Any = 0.0 if handle.config.keep_factors else case.of(0.0, 0.0, 0.1)
    more: dict[str, Any] = {}
    for odd in case.odd(15, "c", "lr", "decay", "beta", "applied", "next", note="update"):
        strange = case.of(
            *ODD_NUMBERS, *ODD_THINGS[:-1], torch.zeros(3, 2), torch.ones(2, dtype=torch.complex64), [[0.1]], "x", [None]
        )
        c, lr, decay = (strange if odd == k else v for k, v in (("c", c), ("lr", lr), ("decay", decay)))
        if odd in ("beta", "applied", "next"):
            more[{"next": "perturb_next"}.get(odd, odd)] = strange
    directions = list(c) if isinstance(c, (list, tuple)) else [c]
    outcome, _ = attempt(case, memory, lambda: handle.update_(step, c, lr, weight_decay=decay, **more))
    if outcome == ANSWER and case.tame and handle.config.placement == "inplace":
        factor = handle.config.update_factor / handle.config.perturb_factor
        for name, p in handle.model.named_parameters():
            if name in before and name in handle.names:
                x, rate = before[name].double(), float(torch.as_tensor(lr).flatten()[0])
                wanted, size = x * (1 - rate * float(decay)), x.abs()
                low_rank = next(s.kind for s in handle.trained if s.name == name) == "lowrank"
                for d, value in enumerate(directions):
                    move = rate * float(value) / len(directions) * handle.materialize(name, step, direction=d).double()
                    move = move * factor if low_rank else move
                    wanted, size = wanted - move, size + move.abs()
                bound = (2.1 * len(directions) * UNIT[p.dtype] + 32 * 2.0**-24) * size + 2.0**-22
                expect(bool(((p.detach().double() - wanted).abs() <= bound).all()), f"{name} was updated wrongly", case)
    return outcome
