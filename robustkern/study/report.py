"""A study's figures, and a report in one HTML file that needs nothing beside it."""

import base64
from pathlib import Path
from typing import Any

from robustkern import __version__
from robustkern._text import command_line, in_html, in_markdown, markdown_code
from robustkern.training import METHODS
from robustkern.training.figures import eps_text, gradients
from robustkern.training.files import write_atomically

from . import figures
from .measures import MEASURES, PROPORTIONS
from .plan import TWO_BY_TWO, Plan
from .results import SMOOTHNESS
from .study import Study

Table = list[list[tuple[str, str]]]  # a head, then rows; a cell is its text, and a small text below
_TITLES = {
    "centred_alignment": "|cosine| of gradient and image, means out",
    "edge_concentration": "gradient energy on edges",
    "low_frequency_share": "gradient energy in low frequencies",
    "inversion_accuracy": "inversions named by the robust judge",
    "noise_inversion_accuracy": "inversions from noise, robust judge",
    "inversion_transfer": "inversions named by the standard judge",
}
_PERCENT = (*PROPORTIONS, "low_frequency_share")
_SMOOTH_HEADS = {
    "gradient_norm": "eps · ‖∂ loss / ∂x‖₁, mean",
    "median_gradient_norm": "the same, median",
    "local_lipschitz": "local Lipschitz constant of the logits",
}
_SMOOTH_TITLES = {
    "gradient_norm": "eps · ‖∂ loss / ∂x‖₁ (smooth: small)",
    "local_lipschitz": "local Lipschitz constant of the logits",
}
_CAPTIONS = {
    "gradients": "Input gradients of every network for the same images, one of each class: the gradient of the label's "
    "logit, each divided by its 99.5th percentile of |value|. Colour shows where and with which sign, not how much.",
    "inversions": "The seeded grid: rows begin with an image of each class, columns say which class it is driven to.",
    "noise": "Images made from noise, one class a column.",
    "perturbations": "The same images under attacks with three times the radius of training. Where nothing changes, "
    "the network's loss has no gradient to follow.",
    "terms": "Both terms of each loss against the epoch, orientation on the left axis, smoothness on the right one: "
    "what it is differs from method to method, as the panels say. One network of each.",
    "accuracy": "Accuracy against the radius of PGD-20, on the images that are measured. Bands are 95 % bootstrap "
    "intervals. An accuracy that hardly falls is not robustness, but a loss that shows the attack no way, as a "
    "saturated one.",
    "smoothness": "The thesis as a curve: the gradient penalty with ever larger weights (numbers: multiples of the "
    "recipe's). Bars are 95 % bootstrap intervals over images.",
    "two_by_two": "Orientation with and without smoothness, smoothness with and without orientation; first how smooth "
    "each cell is. Bars are 95 % bootstrap intervals over images.",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 12px; } th, td { padding: .25rem .5rem; text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; } tr:nth-child(even) { background: #f6f6f4; }
thead th { vertical-align: bottom; border-bottom: 1px solid #999; font-weight: 600; max-width: 7rem; }
td small { color: #777; display: block; } img { max-width: 100%; } figure { margin: 1.5rem 0; }
figcaption { color: #555; font-size: 13px; } .scroll { overflow-x: auto; }
"""


def draw(study: Study, to: Path | None = None) -> dict[str, tuple[Path, str]]:
    """Every figure of a study as a PNG in the folder `figures`: for each, its file and its caption.

    Args:
        study: A finished study.
        to: The folder to make `figures` in, by default the study's own.
    """
    plan, data, folder = study.plan, study.data, (to or study.folder) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    networks = {name: study.network(name) for name in plan.matrix}
    trained = [name for name in plan.matrix if name in study.terms]
    drawn: dict[str, tuple[Path, str]] = {}

    def add(name: str) -> Path:
        drawn[name] = (folder / f"{name}.png", _CAPTIONS[name])
        return drawn[name][0]

    gradients(add("gradients"), data, networks)
    figures.inversion_grids(add("inversions"), data, networks)
    figures.noise_grids(add("noise"), data, networks, made=study.noise)
    figures.perturbations(add("perturbations"), data, networks, min(1.0, 3 * plan.eps))
    if trained:
        methods = {entry.name: entry.method for entry in plan.entries()}
        captions = {name: METHODS[methods[name]].smoothness or "none" for name in trained}
        figures.term_panels(add("terms"), {name: study.terms[name] for name in trained}, captions)
    figures.accuracy_curves(add("accuracy"), {name: study.curves[name] for name in plan.matrix})
    if plan.sweep:
        least, label = SMOOTHNESS[0], MEASURES[SMOOTHNESS[0]][0]
        figures.against_smoothness(add("smoothness"), _sweep_points(study), _TITLES, smoothness=least, label=label)
    if plan.two_by_two:
        cells = {cell: study.summary[name] for cell, name in TWO_BY_TWO.items()}
        figures.two_by_two(add("two_by_two"), cells, {**_SMOOTH_TITLES, **_TITLES})
    return drawn


def write_report(study: Study, drawn: dict[str, tuple[Path, str]], to: Path | None = None) -> Path:
    """`report.html`: the figures, embedded, and every number.

    Args:
        study: A finished study.
        drawn: What `draw` gave.
        to: Its folder, by default the study's own.
    """
    plan = study.plan
    parts = [
        f"<h1>What a classifier learns to see: {in_html(plan.data)}</h1>",
        f"<p>{plan.seeds} model{'s' * (plan.seeds > 1)} of each kind, measured on the first {plan.samples} test "
        f"images; attacks and penalties with ε = {eps_text(plan.eps)} (ℓ∞). robustkern {__version__}. Made again by "
        f"<code>{in_html(command(study))}</code>.</p>",
        "<p>Means over images and seeds; below each, the 95 % bootstrap interval over images, in which an image comes "
        "with all its seeds. Inversions are judged by two networks of another seed: one adversarially trained, the "
        "nearer stand-in for a person, and one of standard training, which patterns that no person sees may move as "
        "they move the network that made them.</p>",
        *([f"<p>{in_html(judges_note(study))}</p>"] if study.judges else []),
    ]
    for title, note, rows in tables(study):
        parts += [f"<h2>{in_html(title)}</h2>", *([f"<p>{in_html(note)}</p>"] if note else []), _html_table(rows)]
    parts.append("<h2>Figures</h2>")
    for path, caption in drawn.values():
        picture = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f'<figure><img alt="{in_html(caption)}" src="data:image/png;base64,{picture}">'
            f"<figcaption>{in_html(caption)}</figcaption></figure>"
        )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>robustkern study: {in_html(plan.data)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    path = (to or study.folder) / "report.html"
    write_atomically(path, page)
    return path


def write_tables(study: Study, to: Path | None = None) -> Path:
    """`tables.md`: every number of the report as Markdown.

    Args:
        study: A finished study.
        to: Its folder, by default the study's own.
    """
    made_by = markdown_code(command(study))
    parts = [f"# {in_markdown(study.plan.data)}: tables", f"Means over images and seeds, 95 % intervals. {made_by}"]
    parts += [judges_note(study)] if study.judges else []
    for title, note, rows in tables(study):
        parts += [f"## {title}", *([note] if note else []), _markdown_table(rows)]
    path = (to or study.folder) / "tables.md"
    write_atomically(path, "\n\n".join(parts) + "\n")
    return path


def tables(study: Study) -> list[tuple[str, str, Table]]:
    """The tables of a study: title, note, and rows.

    Args:
        study: A finished study.
    """
    plan = study.plan
    groups = {"Methods": plan.matrix}
    if plan.two_by_two:
        groups["Orientation and smoothness, together and alone"] = list(TWO_BY_TWO.values())
    if plan.sweep:
        groups["The weight of the penalty"] = [entry.name for entry in plan.entries() if entry.swept]
    found = [(title, "", _measures({n: study.summary[n] for n in names})) for title, names in groups.items() if names]
    if study.contrasts:
        note = (
            "An image's value under one network less its value under the other, both of the same seed and trained on "
            "the same images; orientation alone is the loss without penalty, smoothness alone the penalised one on "
            "shuffled labels. 95 % bootstrap intervals over images."
        )
        found.append(("Differences that the claim is about", note, _measures(study.contrasts)))
    if study.correlations:
        note = (
            f"Spearman's, over the {len(plan.matrix)} kinds of networks in the first table. Smoother is less of what "
            "heads the column: where loss gradients are zero for most images and large for a few, as with a saturated "
            "softmax, mean and median disagree."
        )
        found.append(("Rank correlation with smoothness", note, _ranks(study.correlations)))
    return found


def judges_note(study: Study) -> str:
    """A sentence on how well the judges know the classes.

    Args:
        study: A finished study.
    """
    shares = " and ".join(f"{100 * share:.1f} % ({name})" for name, share in study.judges.items())
    return f"Of the test images themselves the judges name {shares} right."


def command(study: Study) -> str:
    """The command that makes the study again."""
    plan, usual = study.plan, Plan(study.plan.data)
    words: list[object] = ["robustkern", "study", "--data", plan.data, "--seeds", plan.seeds, "--samples", plan.samples]
    if plan.epochs != usual.epochs:
        words += ["--epochs", plan.epochs]
    if plan.methods != usual.methods:
        words += ["--methods", ",".join(plan.methods) or "none"]
    if plan.sweep != usual.sweep:
        words += ["--sweep", ",".join(f"{factor:g}" for factor in plan.sweep) or "none"]
    for name, source in plan.given:
        words += ["--checkpoint", f"{name}={source}"]
    for option, value in (("threads", plan.threads), ("device", plan.device)):
        if value != getattr(usual, option):
            words += [f"--{option}", value]
    return command_line([*words, *(["--no-two-by-two"] if not plan.two_by_two else [])])


def _sweep_points(study: Study) -> list[dict[str, Any]]:
    points = []
    for factor in sorted({0.0, *study.plan.sweep, 1.0}):
        name = "gradient-penalty" if factor == 1.0 else f"gradient-penalty x {factor:g}"
        points.append({"line": "gradient penalty", "text": f"{factor:g}", **study.summary[name]})
    return points


def _measures(lines: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """A column for each measure."""
    head = [("", ""), *((text, "") for text, _ in MEASURES.values())]
    return [head, *([(name, ""), *(_cell(m, measures[m]) for m in MEASURES)] for name, measures in lines.items())]


def _ranks(correlations: dict[str, dict[str, float]]) -> Table:
    """A row for each measure, a column for each way to measure smoothness."""
    head = ["", *(_SMOOTH_HEADS[column] for column in correlations)]
    names = dict.fromkeys(name for column in correlations.values() for name in column)
    rows = [
        [MEASURES[name][0], *(f"{c[name]:.2f}" if name in c else "-" for c in correlations.values())] for name in names
    ]
    return [[(text, "") for text in row] for row in (head, *rows)]


def _cell(measure: str, values: dict[str, Any]) -> tuple[str, str]:
    if values["value"] is None:
        return "-", ""
    scale, digits, unit = (100, ".1f", " %") if measure in _PERCENT else (1, ".3g", "")
    mean, low, high = (f"{scale * values[part]:{digits}}" for part in ("value", "low", "high"))
    return f"{mean}{unit}", f"{low} to {high}"


def _html_table(table: Table) -> str:
    head, body = _html_row(table[0], "th"), "".join(_html_row(row, "td") for row in table[1:])
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _html_row(row: list[tuple[str, str]], tag: str) -> str:
    cells = (f"<{tag}>{in_html(text)}{small and f'<small>{small}</small>'}</{tag}>" for text, small in row)
    return f"<tr>{''.join(cells)}</tr>"


def _markdown_table(table: Table) -> str:
    head, *rows = ([in_markdown(text) + (small and f" ({small})") for text, small in row] for row in table)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows))
