"""Chooses the side of each parameter under a probe, and says why."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ...config import NOISE_LEFT, PatchConfig
from ...sharding import ALONE, Peers
from ...storage import layer_kind
from ..members import Member
from .cost import Costs, free_bytes
from .trace import Uses

_GAIN = 0.8  # scratch is chosen below this part of the other cost: it takes memory, and noise should not decide
_PASSES = 3  # passes over the weights in a step that moves them

_COPY_BYTES = 1 << 16
"""Weights up to this size get memory of their own: one call for all of them costs less than a call for each module."""


def choose_sides(
    members: Sequence[Member],
    uses: Mapping[Member, Uses],
    costs: Mapping[Member, Costs],
    config: PatchConfig,
    compiled: bool,
    peers: Peers = ALONE,
) -> None:
    """Sets ``side``, ``reason`` and ``scopes`` of every member.

    Args:
        uses: where an evaluation used each member.
        costs: of each member that :func:`needs_costs`, on its device and in its dtype.
        compiled: the model is compiled, so that scratch memory cannot be used.
        peers: the processes that have to choose alike; the other arguments are the same for all.
    """
    for member in members:
        used = uses[member]
        if None in used.modules:
            member.settle_on("inplace", "used outside of any module")
            continue
        member.scopes = [m for m in used.modules if m is not None] or [member.owners[0].module]
        if member.signed:
            _choose_signed(member, used, config)
        elif member.parameter.low_rank:
            _choose_matrix(member, used, costs.get(member), config, compiled)
        else:
            member.settle_on("copy", "small" if _bytes(member) <= _COPY_BYTES else "dense")
            if config.estimator == "dense" and _bytes(member) > _COPY_BYTES and not compiled:
                member.settle_on("scratch", "dense noise has no factors")
            if not member.storage.always_here:
                member.settle_on("scratch", f"{member.storage.word}: only its module has it")
    if config.placement == "auto":
        _fall_back(members, uses, costs, config, peers)
    for member in members:
        _make_shift(member, members, uses)


def widen(member: Member, modules: Iterable[nn.Module], members: Sequence[Member]) -> None:
    """Lets more modules run with the perturbed weight of a member. A member of the activation side moves to scratch memory.

    Args:
        members: all of them; biases that were added with the member's part move too.

    Raises:
        RuntimeError: it is quantised or in blocks, and has no perturbed weight.
    """
    new = [m for m in modules if m not in member.scopes]
    reason = f"also used inside {', '.join(sorted({type(m).__name__ for m in new}))}"
    if not member.storage.mergeable or member.storage.in_blocks:
        raise RuntimeError(f"{member.name!r} is {member.storage.word} and cannot be probed ({reason}): exclude it")
    for bias in members:
        if bias.layer_weight is member and bias.side == "shift":
            bias.scopes, bias.layer_weight = [bias.owners[0].module], None
            bias.settle_on("scratch", f"{member.name} is {reason}")
    if member.side in ("activation", "shift"):
        member.scopes, member.layer_weight = list(dict.fromkeys(owner.module for owner in member.owners)), None
        member.settle_on("scratch", reason)
    member.scopes += [m for m in new if m not in member.scopes]


def _fall_back(
    members: Sequence[Member], uses: Mapping[Member, Uses], costs: Mapping[Member, Costs], config: PatchConfig, peers: Peers
) -> None:
    """Moves weights in place where their scratch does not fit, or all of them if that is faster and drift is allowed."""
    for member in members:
        scratch = member.side == "scratch" and member.storage.resident
        if scratch and _bytes(member) > peers.least(free_bytes(member.device)):
            member.settle_on("inplace", "no memory for its scratch")
    known = [m for m in members if m in costs and m.storage.resident]
    probe = 2 * sum(cost_of(m, uses[m], costs[m]) for m in known)
    passes = _PASSES * sum(m.numel * costs[m].element for m in known)
    if config.allow_drift and config.estimator != "dense" and passes < probe:
        for member in members:
            if member.storage.resident:
                member.settle_on("inplace", f"{1e3 * passes:.1f} ms a step against {1e3 * probe:.1f} for a probe")


def cost_of(member: Member, used: Uses, costs: Costs) -> float:
    """Seconds that one evaluation takes for a member on the activation or the weight side, beside the forward pass."""
    return _skinny_cost(member, used, costs) if member.side == "activation" else _scratch_cost(member, costs)


def _skinny_cost(member: Member, used: Uses, costs: Costs) -> float:
    """Seconds of one evaluation for all layers that have the weight. An embedding touches only the rows that are looked up."""
    _, rows, cols = member.extent
    tokens = max(1, used.tokens)
    inputs = [0 if layer_kind(owner) == "embedding" else rows for owner in member.owners]
    return sum(costs.activation(tokens, some, cols) for some in inputs)


def _scratch_cost(member: Member, costs: Costs) -> float:
    return max(1, len(member.scopes)) * costs.scratch(member.numel)


def needs_costs(member: Member, config: PatchConfig) -> bool:
    """Whether a member has a side by what it costs, or whether it stays a probe does."""
    chosen = _asked(member, config) == "auto" or (config.placement == "auto" and config.allow_drift)
    return member.parameter.low_rank and not member.signed and chosen


def _choose_matrix(member: Member, used: Uses, costs: Costs | None, config: PatchConfig, compiled: bool) -> None:
    obstacle = why_not_activation(member, used, config.estimator)
    asked = _asked(member, config)
    if not member.storage.mergeable:
        if obstacle is not None:
            member.settle_on("inplace", obstacle)
        member.settle_on("activation", "quantised: its weight cannot be written elsewhere")
    elif asked in ("scratch", "copy") or (asked == "activation" and obstacle is None):
        member.settle_on(asked, "asked for")
    elif costs is not None and obstacle is None:
        skinny, scratch = _skinny_cost(member, used, costs), _scratch_cost(member, costs)
        if compiled or _GAIN * skinny <= scratch:
            member.settle_on("activation", _compare(skinny, scratch, used.tokens))
        else:
            member.settle_on("scratch", _compare(scratch, skinny, used.tokens))
    elif compiled or (_bytes(member) <= _COPY_BYTES and member.storage.always_here):
        member.settle_on("copy", f"{obstacle}; " + ("the model is compiled" if compiled else "small"))
    else:
        member.settle_on("scratch", str(obstacle))
    if not member.storage.always_here and member.side == "copy":
        member.settle_on("scratch", f"{member.storage.word}: only its module has it")


def _choose_signed(member: Member, used: Uses, config: PatchConfig) -> None:
    """Settles a matrix that has a direction for each example on the only side that it can be on, or says why it cannot."""
    obstacle, asked = why_not_activation(member, used, config.estimator), _asked(member, config)
    if asked in ("scratch", "copy"):
        obstacle = f"side={asked!r} was asked for"
    member.settle_on("activation" if obstacle is None else "scratch", obstacle or "each example has its own direction")


def why_not_activation(member: Member, used: Uses, estimator: str) -> str | None:
    """Returns what rules the activation side out, or None. Every use of the weight has to be in a layer whose kind is known."""
    if member.parameter.layout.form != "matrix":
        return "not the matrix of a layer"
    if estimator not in NOISE_LEFT:
        return "directions with another left factor than LOZO's are written into weights"
    for owner in member.owners:
        if layer_kind(owner) is None:
            return f"held by {type(owner.module).__name__}, which uses it in its own way"
    inside = {owner.module for owner in member.owners}
    for module in used.modules:
        if module is not None and module not in inside:
            return f"also used inside {type(module).__name__}"
    return used.obstacle


def _make_shift(member: Member, members: Sequence[Member], uses: Mapping[Member, Uses]) -> None:
    """Puts a bias on the side "shift" if its layer is on the activation side."""
    if member.parameter.low_rank or len(member.owners) != 1 or member.owners[0].attribute != "bias":
        return
    module = member.owners[0].module
    if any(m is not module for m in uses[member].modules):
        return
    for other in members:
        if other.side == "activation" and any(h.module is module for h in other.owners):
            member.settle_on("shift", "added with the weight's part")
            member.scopes, member.layer_weight = [], other


def _asked(member: Member, config: PatchConfig) -> str:
    if isinstance(config.side, str):
        return config.side
    names = (member.name, *member.parameter.aliases)
    for pattern, word in dict(config.side).items():
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            return word
    return "auto"


def _bytes(member: Member) -> int:
    return member.numel * member.parameter.tensor.element_size()


def _compare(chosen: float, other: float, tokens: int) -> str:
    return f"{1e6 * chosen:.0f} us against {1e6 * other:.0f} at {tokens} tokens"
