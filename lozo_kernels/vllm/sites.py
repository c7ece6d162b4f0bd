"""What is put into the modules of an engine: each adds to the outputs of a module what its perturbed parameters would add.

A compiled graph keeps what it was traced with, so it calls one opaque operator a module, which looks up the module's site by its
number when it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.calls import PointsCall
from ..kernels.skinny import dispatch_points
from ..model.overriding import Overrides
from .factors import Factors, Learned
from .loading import signs
from .modules import has_bias, logits_processors, norm_kind
from .places import Place
from .tokens import Tokens

_SITES: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()

_library = torch.library.Library("lozo_kernels_vllm", "DEF")
_library.define("add_(Tensor(a!) y, Tensor? x, int site) -> ()")
_library.impl("add_", lambda y, x, site: _SITES[site](y, x), "CompositeExplicitAutograd")
torch.library.register_fake("lozo_kernels_vllm::add_", lambda y, x, site: None, lib=_library)  # noqa: ARG005


@dataclasses.dataclass(eq=False)
class _Block:
    """One place in the form that its site computes with, made anew when the factors changed.

    Attributes:
        v, b, u: the factors as ``lowrank_points_`` takes them; of an embedding, of which rows are looked up, b and u as they are
            in :class:`~.factors.Learned`.
        gain: what the outputs are multiplied by, or None. values: of a vector, what is added at each slot.
    """

    place: Place
    learned: Learned
    seen: tuple[int, int] = (-1, -1)
    v: Tensor | None = None
    b: Tensor | None = None
    u: Tensor | None = None
    gain: Tensor | None = None
    values: Tensor | None = None

    def follow(self, factors: Factors, *, looked_up: bool = False) -> None:
        """Takes this rank's block out of the factors. All rows stay in where rows are looked up."""
        place, learned = self.place, self.learned
        seen = factors.version, factors.moves if learned.v is None else 0  # the scales of points are in values of vectors alone
        if self.seen == seen:
            return
        self.seen, self.gain = seen, learned.gain
        if learned.v is None:
            self.values = _at_slots(learned, factors, place.cols)
            return
        assert learned.b is not None
        self.v, self.b, self.u = learned.v[:, place.cols].contiguous(), learned.b, learned.u
        if not looked_up:
            self.b = learned.b[place.rows].T.contiguous()
            self.u = None if learned.u is None else learned.u[:, place.rows].transpose(1, 2).contiguous()


def _at_slots(learned: Learned, factors: Factors, cols: slice) -> Tensor:
    """What is added to a vector at each slot, (slots, elements) fp32."""
    assert learned.delta is not None
    delta = learned.delta[cols]
    if learned.u is None:
        return delta[None].expand(len(factors.slots), -1)
    scales = torch.tensor([scale for _, scale in factors.slots], dtype=torch.float32, device=delta.device)
    index = torch.tensor([direction for direction, _ in factors.slots], dtype=torch.int64, device=delta.device)
    return delta + scales[:, None] * learned.u[index][:, cols]


class Site:
    """What was put into one module.

    Attributes:
        number: its number for compiled code. calls: how often it ran since it was counted last.
        error: the largest difference that its check found, beside the norm of a token's outputs; None if nothing was checked.
    """

    def __init__(self, places: Sequence[Place], factors: Factors, tokens: Tokens) -> None:
        self.places, self.factors, self.tokens = list(places), factors, tokens
        ordered = sorted(places, key=lambda place: place.kind == "bias")  # which is added when the weight's decay is done
        self.blocks = [_Block(place, factors.learned[place.name]) for place in ordered]
        self.number = max(_SITES, default=-1) + 1
        self.calls = 0
        self.checking = False
        self.error: float | None = None
        _SITES[self.number] = self

    @property
    def name(self) -> str:
        """The module's name, and what of it was not called if it never is."""
        return f"{self.places[0].path} ({', '.join(place.name for place in self.places)})"

    def run(self, y: Tensor, x: Tensor | None) -> None:
        """Adds to outputs in place; compiled code does so through the operator."""
        if torch.compiler.is_compiling():
            torch.ops.lozo_kernels_vllm.add_(y, x, self.number)
        else:
            self(y, x)

    def __call__(self, y: Tensor, x: Tensor | None) -> None:
        self.calls += 1
        if self.checking:
            self.check(y, x)
        if self.factors.live or self.tokens.moved:
            self.add(y, x)

    def add(self, y: Tensor, x: Tensor | None) -> None:
        raise NotImplementedError

    def check(self, y: Tensor, x: Tensor | None) -> None:
        """Compares the outputs of the module alone with what the checkpoint's parameters give."""

    def _note(self, errors: Tensor) -> None:
        self.error = max(self.error or 0.0, float(errors.abs().max()))


class LinearSite(Site):
    """A linear layer, or a head."""

    def add(self, y: Tensor, x: Tensor | None) -> None:
        assert x is not None
        flat, rows = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        head = self.places[0].kind == "head"
        where = self.tokens.of_head(len(flat)) if head else self.tokens.of(len(flat))
        biases = {block.place.first: block for block in self.blocks if block.place.kind == "bias"}
        for block in self.blocks:
            block.follow(self.factors)
        for block in self.blocks:
            place = block.place
            part = flat[:, place.first : place.first + place.outputs]
            if place.kind == "bias":
                assert block.values is not None
                if has_bias(place.module):
                    part += block.values[where.slots].to(part.dtype)
                continue
            if place.first in biases:
                self._keep_bias(part, block.gain, biases[place.first])
            assert block.v is not None and block.b is not None
            self._check_shapes(part, rows, block)
            factors = block.v, block.b, block.u, where.directions, where.scales
            dispatch_points(PointsCall(part, rows, *factors, place.transposed, block.gain), self.factors.backend)

    def _check_shapes(self, y: Tensor, x: Tensor, block: _Block) -> None:
        """Raises RuntimeError for activations that are not those of the place, because the kernels do not look."""
        assert block.v is not None and block.b is not None
        inputs, outputs = (block.b, block.v) if block.place.transposed else (block.v, block.b)
        if y.shape[1] != outputs.shape[1] or x.shape[1] != inputs.shape[1] or y.stride(1) != 1:
            raise RuntimeError(
                f"{block.place.name}: the module has inputs {tuple(x.shape)}, outputs {tuple(y.shape)} with strides {y.stride()}; "
                f"needed are {inputs.shape[1]} and {outputs.shape[1]} columns, rows contiguous"
            )

    def _keep_bias(self, part: Tensor, gain: Tensor | None, bias: _Block) -> None:
        """Changes outputs so that the decay of the weight, which comes next, leaves the bias with the decay of its own."""
        own, kept = bias.place.module.bias, bias.gain  # type: ignore[union-attr]
        if gain is kept or not has_bias(bias.place.module):
            return
        assert isinstance(own, Tensor)
        ratio = (1.0 if kept is None else kept) / (1.0 if gain is None else gain)
        part += (own[bias.place.first : bias.place.first + bias.place.outputs].float() * (ratio - 1.0)).to(part.dtype)

    def check(self, y: Tensor, x: Tensor | None) -> None:
        assert x is not None
        flat, rows = y.view(-1, y.shape[-1]).float(), x.reshape(-1, x.shape[-1]).float()
        bias = getattr(self.places[0].module, "bias", None)
        for place in self.places:
            if place.sketch is None or place.kind == "bias":
                continue
            part = slice(place.first, place.first + place.outputs)
            found = flat[:, part]
            if isinstance(bias, Tensor) and bias.numel() and has_bias(place.module) and not place.module.skip_bias_add:
                found = found - bias[part].float()
            z = signs(place.outputs, found.device)
            # Beside the norm of the outputs: signs make sums of about that size, which may cancel, and their errors do not.
            self._note((found @ z - rows @ place.sketch.to(rows.device)) / found.norm(dim=1).clamp(min=1e-30))


class EmbeddingSite(Site):
    """An embedding: the rows of tokens, or of positions."""

    def add(self, y: Tensor, x: Tensor | None) -> None:
        assert x is not None
        (block,) = self.blocks
        block.follow(self.factors, looked_up=True)
        ids, flat = x.reshape(-1), y.view(-1, y.shape[-1])
        offset = getattr(block.place.module, "offset", 0) if block.place.kind == "table" else 0
        where = self.tokens.of(len(flat))
        assert block.b is not None and block.v is not None
        left = block.b[ids + offset]
        if block.u is not None:
            rank = block.u.shape[2]
            left[:, :rank] += where.scales[:, None] * block.u[where.directions, ids + offset]
        if block.gain is not None:
            flat *= block.gain.to(flat.dtype)
        flat += (left @ block.v).to(flat.dtype)


class NormSite(Site):
    """A normalisation that runs without its weight: the site multiplies by it, and adds its shift."""

    def __init__(self, places: Sequence[Place], factors: Factors, tokens: Tokens, norm: str) -> None:
        super().__init__(places, factors, tokens)
        self._module, self._norm = places[0].module, norm
        self._seen = (-1, -1)
        self._values: dict[str, Tensor] = {}

    def __call__(self, y: Tensor, x: Tensor | None) -> None:  # noqa: ARG002
        self.calls += 1
        self._follow()
        moving = self.factors.live or self.tokens.moved
        slots = self.tokens.of(y.shape[0]).slots if moving else None
        flat = y if y.dim() <= 2 else y.view(y.shape[0], -1, y.shape[-1])
        for kind, values in self._values.items():
            value = values[0] if slots is None else values[slots]
            value = value.to(y.dtype) if value.dim() == 1 or flat.dim() == 2 else value[:, None].to(y.dtype)
            if kind == "weight":
                flat *= value
            else:
                flat += value

    def _follow(self) -> None:
        seen = self.factors.version, self.factors.moves
        if self._seen == seen:
            return
        self._seen = seen
        blocks = {block.place.kind: block for block in self.blocks}
        for kind, base in self._base().items():
            block = blocks.get(kind)
            if block is None:
                self._values[kind] = base[None].expand(len(self.factors.slots), -1)
                continue
            block.follow(self.factors)
            assert block.values is not None
            self._values[kind] = (base if block.gain is None else base * block.gain) + block.values

    def _base(self) -> dict[str, Tensor]:
        """What the module itself would multiply by and add."""
        weight, shift = (getattr(self._module, name, None) for name in ("weight", "bias"))
        assert weight is not None
        base = {"weight": weight.detach().float() + (1.0 if self._norm == "gemma" else 0.0)}
        return base if shift is None else base | {"shift": shift.detach().float()}


def install(model: nn.Module, places: Sequence[Place], factors: Factors, tokens: Tokens) -> tuple[list[Site], Overrides]:
    """Puts sites into the modules of the places. ``Overrides.remove()`` takes them out."""
    overrides, sites = Overrides(), []
    by_module: dict[nn.Module, list[Place]] = {}
    for place in places:
        by_module.setdefault(place.module, []).append(place)
    heads: dict[nn.Module, Site] = {}
    for module, some in by_module.items():
        head = [place for place in some if place.kind == "head"]
        rest = [place for place in some if place.kind != "head"]
        if head:
            heads[module] = LinearSite(head, factors, tokens)
            sites.append(heads[module])
        if rest:
            sites.append(_put(overrides, module, rest, factors, tokens))
    for processor in logits_processors(model):
        apply_head: Any = processor._apply_head  # noqa: SLF001
        overrides.put(processor, "_apply_head", _with_heads(apply_head, heads))
    return sites, overrides


def _put(overrides: Overrides, module: nn.Module, places: list[Place], factors: Factors, tokens: Tokens) -> Site:
    kind = places[0].kind
    if kind in ("linear", "bias"):
        site: Site = LinearSite(places, factors, tokens)
        method: Any = module.quant_method
        overrides.put(method, "apply", _with_site(method.apply, module, site))
        return site
    if kind in ("embedding", "table"):
        site = EmbeddingSite(places, factors, tokens)
        overrides.put(module, "forward", _with_ids(module.forward, site))
        return site
    norm = norm_kind(module)
    assert norm is not None
    site = NormSite(places, factors, tokens, norm)
    overrides.put(module, "forward", _bare(norm, module, site))
    if norm == "rms":
        for flag in ("pass_weight", "pass_weight_add"):
            overrides.put(module, flag, False)
    return site


def _with_site(apply: Callable[..., Tensor], module: nn.Module, site: Site) -> Callable[..., Tensor]:
    @functools.wraps(apply)
    def call(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = apply(layer, x, *args, **kwargs)
        if layer is module or getattr(layer, "base_layer", None) is module:
            site.run(y, x)
        return y

    return call


def _with_ids(forward: Callable[..., Tensor], site: Site) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def call(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = forward(ids, *args, **kwargs)
        site.run(y, ids)
        return y

    return call


def _with_heads(apply_head: Callable[..., Tensor], heads: dict[nn.Module, Site]) -> Callable[..., Tensor]:
    @functools.wraps(apply_head)
    def call(lm_head: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = apply_head(lm_head, hidden, *args, **kwargs)
        site = heads.get(lm_head)
        if site is not None:
            site.run(y, hidden)
        return y

    return call


def _bare(norm: str, module: Any, site: Site) -> Callable[..., Any]:
    """The forward of a normalisation without its weight, and then the site."""
    forward: Any = module.forward
    eps = float(getattr(module, "variance_epsilon", None) or module.eps)

    @functools.wraps(forward)
    def rms(x: Tensor, residual: Tensor | None = None) -> Any:
        y = forward(x) if residual is None else forward(x, residual)
        site.run(y if residual is None else y[0], None)
        return y

    @functools.wraps(forward)
    def gemma(x: Tensor, residual: Tensor | None = None) -> Any:  # the product with 1 + w is rounded once
        wide = x.float() if residual is None else x.float() + residual.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        site.run(y, None)
        return y.to(x.dtype) if residual is None else (y.to(x.dtype), wide.to(x.dtype))

    @functools.wraps(forward)
    def layer(x: Tensor) -> Tensor:
        y = nn.functional.layer_norm(x.float(), module.normalized_shape, None, None, eps)
        site.run(y, None)
        return y.to(x.dtype)

    forwards: dict[str, Callable[..., Any]] = {"rms": rms, "gemma": gemma, "layer": layer}
    return forwards[norm]
