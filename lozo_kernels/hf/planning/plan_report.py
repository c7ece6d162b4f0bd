"""A plan as tables for a reader."""

from __future__ import annotations

from ...model.text_table import mebibytes, number
from ..tables import table
from .planner import Alternative, Plan


def render_plan(plan: Plan) -> str:
    """Memory and time of inference, of the placements of the method and of fine-tuning, side by side."""
    options: list[Alternative | None] = [None, *plan.options]  # None: inference
    heads = ["inference", *(o.placement or "ft" for o in plan.options)]
    if plan.method != "ft":
        options.append(plan.finetuning)
        heads.append("ft (AdamW)")
    forwards = [plan.machine.forward_seconds(plan.flops, plan.weight_bytes), *(o.forward_seconds for o in options if o)]
    steps = [None, *(1e3 * o.step_seconds for o in options if o)]
    lines = [
        f"{plan.model}: {plan.architecture}, {plan.parameters:,} parameters in {plan.dtype}",
        f"{plan.method}, rank {plan.rank}, interval {plan.interval}; a forward pass: "
        f"{plan.tokens:,} tokens, {plan.flops / 1e12:.3g} TFLOP",
        "",
        table([["MiB", *heads], *_memory_rows(plan, options)]),
        "",
        table(
            [
                ["ms", *heads],
                ["forward (and backward)", *(f"{1e3 * v:.1f}" for v in forwards)],
                ["a step", *("" if v is None else number(v, ".1f") for v in steps)],
            ],
        ),
        "",
    ]
    if plan.options[0].placement is not None:
        lines.append(f"placement: {plan.options[0].placement} ({plan.why})")
        lines += [f"sides: {_spell(o.sides)}" for o in plan.options if o.sides]
    machine = plan.machine
    speed = "forward passes at the speed of reading the weights (give --device-tflops)"
    if machine.flops is not None:
        speed = f"{machine.flops / 1e12:.3g} TFLOP/s"
    return "\n".join([*lines, f"speeds: {machine.source}: {machine.bandwidth / 1e9:.1f} GB/s, {speed}"])


def _memory_rows(plan: Plan, options: list[Alternative | None]) -> list[list[str]]:
    totals = [plan.inference_bytes if o is None else plan.total_bytes(o) for o in options]
    rows = [
        ("weights and buffers", [plan.weight_bytes + plan.buffer_bytes] * len(options)),
        ("activations", [plan.activation_bytes if o is None else o.activation_bytes for o in options]),
        *((name, [getattr(o.state, name) if o else 0 for o in options]) for name in ("factors", "momentum", "scratch", "copies")),
        ("in all", totals),
    ]
    shown = [[name, *(mebibytes(v or None, ",.2f") for v in values)] for name, values in rows if any(values)]
    shown.append(["of inference", *(f"{v / plan.inference_bytes:.3f}" for v in totals)])
    first = [o.state.first_step if o else 0 for o in options]
    if any(first):
        shown.append(["first step, which checks", *(mebibytes(v, ",.2f") if v else "" for v in first)])
    return shown


def _spell(sides: dict[str, int]) -> str:
    return ", ".join(f"{count} on {side}" for side, count in sorted(sides.items(), key=lambda pair: -pair[1]))
