"""Plans as text: one for people who ask, and the table of all in a folder."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from .devices import GIB, MARGIN

_HEAD = (
    "| model | task | devices | mesh | rows at a time | parameters | optimizer | all, by arithmetic | all, compiled | "
    "usable | fits | least s | bound by | tokens/s at most |\n"
    "|---|---|---|---|--:|--:|--:|--:|--:|--:|---|--:|---|--:|\n"
)

_UNITS = {"train": "a training step", "encode": "a batch", "score": "a batch"}

_NOTES = """
GiB are of one device. Rows have {length} tokens; "rows at a time" are over all devices (of training: the GradCache
chunk; "all" is the batch at once). "By arithmetic" is the analytic model; "compiled" is what XLA's compiler for the
target says of the real program (for GPUs with XLA's attention in place of cuDNN's); with a star, two shallow versions
were compiled and the other layers extrapolated. "Usable" is the compiler's limit, of an H100 95% of its memory. A plan
fits if it needs no more than that compiled or, where nothing was compiled, no more than {margin} of that by arithmetic,
which is not exact. "No" names the number of chips that would do. Time and tokens a second are rooflines from the
published peaks of arithmetic, memory and interconnect, with every position of every row in use: real programs reach
perhaps half. A training step counts three full rows an example. v4-8 and v5p-8 are Cloud TPU's names: 8 cores, 4 chips.
"""


def describe(plan: dict[str, Any]) -> str:
    """A plan in words."""
    memory, seconds, check = plan["memory"], plan["seconds"], plan["flops_check"]
    what = plan["task"] + (f" {plan['trainable']}" if plan["trainable"] else "") + _weights(plan)
    at_a_time = f"{plan['chunk']} rows at a time" if plan["chunk"] else "all at once"
    lines = [
        f"{plan['model']} ({plan['parameters'] / 1e9:.2f} billion parameters), {what} on {plan['topology']}: "
        + ("fits" if plan["fits"] else "does not fit" + _instead(plan)),
        f"  mesh        {plan['mesh']}",
        f"  batch       {plan['rows']} rows of {plan['length']} tokens, {at_a_time}"
        + (f" (by arithmetic {plan['largest']} would fit)" if plan["largest"] else ""),
        "  a device    "
        + ", ".join(
            f"{name} {memory[name] / GIB:.2f}"
            for name in ("parameters", "optimizer", "gradients", "activations", "temporaries")
        )
        + f": {memory['total'] / GIB:.2f} GiB by arithmetic, which may plan with {MARGIN * memory['usable'] / GIB:.2f} "
        f"({MARGIN:.0%} of {memory['usable'] / GIB:.2f})",
    ]
    compiled = plan["compiled"]
    if compiled is not None:
        layers = " and ".join(map(str, compiled["layers"]))
        lines.append(
            f"  compiled    {compiled['total'] / GIB:.2f} of {memory['usable'] / GIB:.2f} GiB, which decides "
            f"({layers} layers compiled{_rest(plan)})"
        )
    lines.append(f"  FLOPs       {plan['flops']:.3e}" + _counted(check))
    lines.append(
        f"  least time  {seconds['step']:.3g} s {_UNITS[plan['task']]}: matmuls {seconds['compute']:.3g}, "
        f"memory {seconds['memory']:.3g}, "
        f"exchange {seconds['exchange']:.3g}; {plan['tokens_per_second']:,.0f} tokens/s at most"
    )
    if plan["biases_added"]:
        lines.append("  note        the model has no biases: zero ones are added (--add-biases)")
    lines += [f"  note        {note}" for note in plan["notes"]]
    return "\n".join(lines)


def write_table(folder: epath.Path) -> None:
    """Writes README.md: one row for each plan in the folder."""
    plans = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    plans = [plan for plan in plans if plan["task"] != "search"]  # of which there is no table
    plans.sort(key=lambda plan: (plan["task"], str(plan["trainable"]), plan["topology"], plan["parameters"]))
    lengths = sorted({plan["length"] for plan in plans})
    text = "# What runs would need\n\nWritten by `python -m eval plan`; each plan's JSON has its command.\n\n"
    text += (
        _HEAD
        + "".join(map(_row, plans))
        + _NOTES.format(length=" or ".join(map(str, lengths)), margin=f"{MARGIN:.0%}")
    )
    text += _checks(plans)
    (folder / "README.md").write_text(text)


def _row(plan: dict[str, Any]) -> str:
    memory, seconds, compiled = plan["memory"], plan["seconds"], plan["compiled"]
    bound = max(("compute", "memory", "exchange"), key=seconds.__getitem__)
    mesh = ",".join(part for part in plan["mesh"].split(",") if not part.endswith("=1")) or "one device"
    if plan["task"] == "train":
        at_a_time = plan["chunk"] or "all"
    else:
        at_a_time = plan["rows"]
    all_compiled = "" if compiled is None else f"{compiled['total'] / GIB:.2f}{'*' if _rest(plan) else ''}"
    cells = [
        plan["model"],
        plan["task"] + (f", {plan['trainable']}" if plan["trainable"] else "") + _weights(plan),
        plan["topology"],
        mesh,
        at_a_time,
        f"{memory['parameters'] / GIB:.2f}",
        f"{memory['optimizer'] / GIB:.2f}",
        f"{memory['total'] / GIB:.2f}",
        all_compiled,
        f"{memory['usable'] / GIB:.2f}",
        "yes" if plan["fits"] else "no" + _instead(plan),
        f"{seconds['step']:.3g}",
        bound,
        f"{plan['tokens_per_second']:,.0f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _checks(plans: list[dict[str, Any]]) -> str:
    """One line: how far the counts of FLOPs are apart."""
    ratios = [
        plan["flops_check"]["xla"] / plan["flops_check"]["analytic"]
        for plan in plans
        if plan["flops_check"]["xla"]
    ]
    if not ratios:
        return ""
    return (
        f"\nFLOPs: XLA's own count of the same programs (before compilation, few layers, a loop's body once) is "
        f"{min(ratios):.3f} to {max(ratios):.3f} of the analytic count of matmuls.\n"
    )


def _weights(plan: dict[str, Any]) -> str:
    return ", int8 weights" if plan.get("weights") else ""  # older plans do not say


def _instead(plan: dict[str, Any]) -> str:
    count = plan["devices_needed"]
    return f" ({count} would)" if count and count > plan["devices"] else ""


def _rest(plan: dict[str, Any]) -> str:
    compiled = plan["compiled"]
    return ", the rest extrapolated" if len(compiled["layers"]) > 1 else ""


def _counted(check: dict[str, Any]) -> str:
    if not check["xla"]:
        return " by the analytic count"
    ratio = check["xla"] / check["analytic"]
    return f" by the analytic count; of {check['layers']} layers XLA counts {ratio:.3f} times it"
