"""Several results side by side: a table, and curves where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from vision_ar.evaluation.scoring import Result


def write_sweep(results: Mapping[float, Result], out: Path) -> str:
    """Write `sweep.md` and `sweep.png`, and say where they are.

    Args:
        results: of one model by one protocol, by guidance strength.
        out: folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = sweep_table(results)
    (out / "sweep.md").write_text(text)
    if importlib.util.find_spec("matplotlib") is None:
        return f"{text}\nsaved in {out / 'sweep.md'}; for curves: pip install matplotlib, and run the command again"
    plot_sweep(results, out / "sweep.png")
    return f"{text}\nsaved in {out / 'sweep.md'} and {out / 'sweep.png'}"


def sweep_table(results: Mapping[float, Result]) -> str:
    """A table in Markdown, one row a strength; partial results are marked."""
    names = curve_names(results)
    first = next(iter(results.values()))
    lines = [
        subject(first),
        "",
        "| cfg_scale | " + " | ".join(names) + " |",
        "|" + "---|" * (len(names) + 1),
    ]
    for scale, result in results.items():
        lines.append(f"| {scale:g} | " + " | ".join(f"{result.scores[name]:.4f}" for name in names) + " |")
    return "\n".join(lines) + "\n"


def subject(result: Result) -> str:
    """What the rows have in common."""
    model, partial = result.stamp["model"], ", PARTIAL" if result.partial else ""
    samples = f"{result.stamp['num_images']} samples each{partial}"
    return f"Protocol {result.protocol.name}, model {model['name']} ({model['hash']}), {samples}"


def plot_sweep(results: Mapping[float, Result], path: Path) -> None:
    """One small curve for each score over the guidance strength."""
    from matplotlib.figure import Figure  # an extra: pip install vision-ar[eval]

    names = curve_names(results)
    figure = Figure(figsize=(3.2 * len(names), 2.8), layout="constrained")
    scales = list(results)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axes.plot(scales, [result.scores[name] for result in results.values()], marker="o")
        axes.set_title(name)
        axes.set_xlabel("cfg_scale")
        axes.grid(alpha=0.3)
    first = next(iter(results.values()))
    figure.suptitle(subject(first))
    figure.savefig(path, dpi=120)


def curve_names(results: Mapping[float, Result]) -> list[str]:
    """Names of the scores, without their deviations."""
    return [name for name in next(iter(results.values())).scores if not name.endswith("_std")]
