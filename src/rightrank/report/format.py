"""Format numbers, units and text the same way in every view."""

from __future__ import annotations

from collections.abc import Sequence

CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
# Invisible characters that can disguise text: DEL, C1 controls, bidirectional marks, separators, surrogates.
HIDDEN = {
    0x7F: 0x2421,
    **dict.fromkeys(
        [*range(0x80, 0xA0), *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070)], 0xFFFD
    ),
    **dict.fromkeys([*range(0xD800, 0xE000), 0xFEFF, 0xFFFE, 0xFFFF], 0xFFFD),
}


def make_visible(text: str) -> str:
    """Replace control and invisible characters with symbols, so that data cannot change how a page reads."""
    return text.translate(CONTROL_PICTURES | HIDDEN)


def format_metric_label(metric: str, higher_is_better: bool | None) -> str:
    """Return the label of an axis with held-out values, with the better direction if it is available."""
    label = "held-out loss, nats" if metric == "loss" else f"held-out {make_visible(metric)}"
    better = "" if higher_is_better is None else f" ({'higher' if higher_is_better else 'lower'} is better)"
    return label + better


def format_quantity(count: float, noun: str) -> str:
    """Format a count with its noun: `1 seed`, `3 seeds`, `4.3 trainings`."""
    text = f"{count:,.0f}" if float(count).is_integer() else f"{count:,.1f}"
    return f"{text} {noun}" + ("" if count == 1 else "s")


def format_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_bytes(count: float) -> str:
    """Format bytes in a binary unit: `1.50 GiB`."""
    sign, count = ("-" if count < 0 else ""), abs(count)
    for unit, spec in (("B", ".0f"), ("KiB", ".1f"), ("MiB", ".1f"), ("GiB", ".2f")):
        if count < 1024:
            return f"{sign}{count:{spec}} {unit}"
        count /= 1024
    return f"{sign}{count:.2f} TiB"


def format_training_settings(
    rank: int,
    lora_alpha: float,
    use_rslora: bool,
    target_modules: str | Sequence[str],
    *,
    learning_rate: float | None,
    batch_size: int | None,
    gradient_accumulation_steps: int | None,
    steps: int | None,
) -> str:
    """Format the settings of a training in the names of PEFT and transformers. None: unknown, and left out."""
    values = {
        "r": rank,
        "lora_alpha": int(lora_alpha) if float(lora_alpha).is_integer() else lora_alpha,
        "use_rslora": use_rslora,
        "learning_rate": learning_rate,
        "target_modules": target_modules,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "max_steps": steps,
    }
    return ", ".join(f"{name}={value!r}" for name, value in values.items() if value)
