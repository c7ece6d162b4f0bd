"""What an optimiser saves, so that a run can go on bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.noise import MAX_DRAW
from ..model.config import ADDED_LATER
from ..model.contract import version_of, version_problem
from ..model.guidance import Guidance
from ..model.handle import Handle
from ..model.momentum import check_saved
from .groups import Groups, check_settings, trained_names
from .stepper import Stepper


def state_of(stepper: Stepper, groups: Groups) -> dict[str, Any]:
    """Returns the state; see :meth:`ZerothOrderOptimizer.state_dict`."""
    stepper.flush()
    handle, guidance = stepper.handle, stepper.handle.guidance
    handle.merge()
    if guidance is not None and guidance.window == stepper.count // handle.config.interval:
        handle.enter_window(stepper.count)  # momentum is saved in the V that is saved
    saved_groups = [
        {k: v for k, v in group.items() if k not in ("params", "param_names")} | {"params": names}
        for group, names in zip(groups, trained_names(groups, handle), strict=True)
    ]
    return {
        **_setup(stepper),
        "step": stepper.count,
        **({} if stepper.finder is None else {"rate": stepper.finder.state()}),
        **({} if stepper.settings.normalise is None else {"moment": stepper.moment.tolist()}),
        "window": handle.window,
        **({} if guidance is None else {"guides": {"window": guidance.window, "vs": guidance.vs}}),
        "skipped": [int(stepper.skipped_total), int(stepper.skipped_in_a_row)],
        "state": {name: {"momentum": value} for name, value in handle.momentum_state.items()},
        "past": handle.past,
        "history": [(window, dict(kept)) for window, kept in handle.history],
        "param_groups": saved_groups,
    }


@torch.no_grad()
def load_state(state: dict[str, Any], stepper: Stepper, groups: Groups, needed: Sequence[str], *, kind: str) -> None:
    """Loads a state; see :meth:`ZerothOrderOptimizer.load_state_dict`. Every group has the settings ``needed``; messages name the
    optimiser by ``kind``."""
    handle = stepper.handle
    _check_state(state, handle, needed, kind)
    if stepper.log is not None and state["step"] != stepper.count:
        raise RuntimeError("the optimiser has a journal, which cannot say how it came to another state: close() it first")
    setup = _setup(stepper)
    for key in ("patch", "settings"):
        saved, value = _saved(state, key), setup[key]
        if saved != value:
            what = key
            if isinstance(saved, dict) and isinstance(value, dict):
                what = ", ".join(k for k in value if saved.get(k) != value[k]) or key
            raise ValueError(f"the state was saved under other settings; differing: {what} (saved {saved}, now {value})")
    problem = version_problem("the state", state["noise_version"], setup["noise_version"])
    if problem is not None:
        raise ValueError(problem)
    saved_groups = state["param_groups"]
    if trained_names(groups, handle) != [list(g["params"]) for g in saved_groups]:
        raise ValueError("the state was saved with other parameter groups")
    _check_momentum(state["state"], handle)
    if handle.probes:
        _check_factors(state, handle)
    guides = _checked_guides(state, handle.guidance)
    _load_means(state, stepper)
    stepper.flush()
    handle.load_learned(state.get("past", {}), state.get("history", []))
    handle.load_guides(**guides)
    if stepper.settings.momentum:
        handle.load_momentum({name: s["momentum"] for name, s in state["state"].items()}, state["window"])
    for group, saved_group in zip(groups, saved_groups, strict=True):
        group.update({k: v for k, v in saved_group.items() if k != "params"})  # type: ignore[attr-defined]
    total, in_a_row = state["skipped"]
    stepper.step = state["step"]
    stepper.skipped_total = torch.tensor(total, dtype=torch.int64, device="cpu")
    stepper.skipped_in_a_row = torch.tensor(in_a_row, dtype=torch.int64, device="cpu")


def _saved(state: dict[str, Any], key: str) -> Any:
    """What was saved under a key, with the fields of a config that earlier versions did not save."""
    saved = state.get(key)
    return ADDED_LATER | saved if key == "patch" and isinstance(saved, dict) else saved


def _load_means(state: Mapping[str, Any], stepper: Stepper) -> None:
    """Loads what the length of steps follows from: the measurements of ``lr="auto"``, the running mean of ``normalise``."""
    rate, saved = state.get("rate"), state.get("moment")
    if (stepper.finder is None) != (rate is None):
        raise ValueError("the state was saved with another kind of learning rate: lr='auto' or a number")
    if stepper.settings.normalise is not None:
        if not isinstance(saved, list) or len(saved) != 2 or not all(isinstance(v, float) and v >= 0 for v in saved):
            raise _not("moment", "the running mean of c^2 and its weight", saved)
        stepper.moment = torch.tensor(saved, dtype=torch.float64, device="cpu")
    if stepper.finder is not None:
        stepper.finder.load(rate)


def _setup(stepper: Stepper) -> dict[str, Any]:
    """What the saved and the loading optimiser must have in common."""
    return {
        "noise_version": version_of(stepper.handle.config, stepper.settings.of_run),
        "patch": stepper.handle.config.to_dict(),
        "settings": stepper.settings.of_run,
    }


_NEEDED = ("noise_version", "patch", "settings", "step", "window", "skipped", "state", "param_groups")


def _check_state(state: Any, handle: Handle, needed: Sequence[str], kind: str) -> None:
    """Raises ValueError, which names the problem, unless a state has all that an optimiser takes from it, and numbers where it has
    numbers."""
    if not isinstance(state, dict):
        raise ValueError(f"a state of a {kind} is a dict, not {state!r:.200}")
    missing = [key for key in (*_NEEDED, *(("past", "history") if handle.probes else ())) if key not in state]
    if not missing:
        groups = state["param_groups"]
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise _not("param_groups", "a list of dicts", groups)
        missing = [f"{key} in its param_groups" for key in ("params", *needed) if any(key not in g for g in groups)]
    if missing:
        raise ValueError(f"this is not all of what state_dict() of a {kind} returned: it has no {missing[0]}")
    _check_numbers(state)
    for group in groups:
        if not isinstance(group["params"], (list, tuple)):
            raise _not("params", "a list of names", group["params"])
        try:
            check_settings(group, group)
        except (TypeError, ValueError) as e:
            raise ValueError(f"the state has a parameter group that cannot be: {e}") from None


def _not(what: str, wanted: str, found: Any) -> ValueError:
    return ValueError(f"the state's {what} is {wanted}, not {found!r:.200}")


def _is_count(value: Any, bound: int = 1 << 63) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < bound


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "meta" and value.layout == torch.strided and not value.is_complex()


def _check_numbers(state: dict[str, Any]) -> None:
    if not _is_count(state["step"], MAX_DRAW):
        raise _not("step", "an integer of at least 0", state["step"])
    if state["window"] is not None and not _is_count(state["window"], MAX_DRAW):
        raise _not("window", "an integer of at least 0, or None", state["window"])
    skipped = state["skipped"]
    if not isinstance(skipped, (list, tuple)) or len(skipped) != 2 or not all(map(_is_count, skipped)):
        raise _not("skipped", "two integers of at least 0", skipped)


def _check_momentum(saved: Any, handle: Handle) -> None:
    if not isinstance(saved, Mapping) or not all(isinstance(s, Mapping) for s in saved.values()):
        raise _not("state", "a dict for each name", saved)
    for name, own in handle.momentum.items():
        if "momentum" not in saved.get(name, {}):
            raise ValueError(f"the state has no momentum of {name!r}: it is not all of what state_dict() returned")
        n = saved[name]["momentum"]
        if not _is_tensor(n):
            raise _not(f"momentum of {name!r}", "a tensor", n)
        check_saved(handle.find(name), n, own, handle.state_in_pieces)
    other = sorted(set(saved).difference(handle.momentum)) if handle.momentum else []
    if other:
        raise ValueError(f"the saved momentum is of other parameters; differing: {', '.join(map(repr, other[:5]))}")


def _checked_guides(state: dict[str, Any], guidance: Guidance | None) -> dict[str, Any]:
    """What :meth:`Handle.load_guides` takes of a state. Raises ValueError unless an AGZO handle can have it."""
    if guidance is None:
        return {}
    guides = state.get("guides")
    if not isinstance(guides, dict) or guides.keys() != {"window", "vs"} or not isinstance(guides["vs"], dict):
        raise _not("guides", "the V of a window by name, as AGZO has it", guides)
    window, vs = guides["window"], guides["vs"]
    if window != state["window"] or (window is None and vs) or not all(map(_is_tensor, vs.values())):
        raise _not("guides", f"the V of window {state['window']} by name", guides)
    guidance.check(vs)
    return guides


def _check_factors(state: dict[str, Any], handle: Handle) -> None:
    past, history = state["past"], state["history"]
    rows = past.values() if isinstance(past, dict) else [None]
    if not all(
        isinstance(s, dict) and s.keys() >= {"b", "v", "window"} and all(_is_tensor(s[k]) and s[k].dim() == 2 for k in "bv")
        and _is_count(s["window"]) for s in rows
    ):  # fmt: skip
        raise _not("past", "factors b and v and a window for each name", past)
    good = isinstance(history, (list, tuple)) and all(isinstance(row, (list, tuple)) and len(row) == 2 for row in history)
    good = good and all(_is_count(window) and isinstance(kept, dict) for window, kept in history)
    if not good or not all(
        name in handle.names and _is_tensor(b) and b.dim() == 3 for _, kept in history for name, b in kept.items()
    ):
        raise _not("history", "windows, each with factors by name", history)
