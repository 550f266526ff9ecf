"""The tables of random directions, of attacks and of training methods."""

from __future__ import annotations

from .markdown import Row, sentence, table, times


def cotangents(results: Row) -> str:
    """Random directions: ours, PyTorch's, and the time that the random numbers and flops alone would take."""
    section = results["cotangents"]
    cases: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in section["rows"]:
        case = (row["law"], row["batch"], row["classes"], row["projections"])
        cases.setdefault(case, {})[row["provider"]] = row
    rival = {"orthonormal": "torch.linalg.qr", "sphere": "torch.randn, divided"}
    lines = [
        [
            f"{law}, B = {batch}, C = {classes}, K = {projections}",
            f"{row['pytorch']['ms']:.3g} ({rival[str(law)]})",
            f"{row['robustkern']['ms']:.3g}",
            times(row["pytorch"]["ms"] / row["robustkern"]["ms"]),
            f"{row['robustkern']['floor_ms']:.2g}",
        ]
        for (law, batch, classes, projections), row in cases.items()
    ]
    return f"{sentence(section)}\n\n{table(['', 'PyTorch, ms', 'robustkern, ms', 'faster', 'floor, ms'], lines)}"


def attacks(results: Row) -> str:
    """Attacks as multiples of the network's passes, then the operators."""
    section = results["attacks"]
    lines = [
        [
            f"{row['attack']}, {row['model']}",
            str(row["passes"]) + (f" + {row['forwards']} forward" if row["forwards"] else ""),
            f"{row['pass_ms']:.3g}",
            f"{row['ms']:.3g}",
            f"{row['ratio']:.2f}x",
            f"{row['added_ms']:.2f}",
            f"{row['added']:.1%}",
        ]
        for row in section["attacks"]
    ]
    header = [
        "attack",
        "passes it needs",
        "a pass, ms",
        "attack, ms",
        "over its passes",
        "added to a pass, ms",
        "of a pass",
    ]
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in section["operators"]:
        cases.setdefault((row["op"], "x".join(map(str, row["shape"]))), {})[row["provider"]] = row
    operators = [
        [
            f"{op}, {shape}",
            f"{c['stock']['ms']:.3g}",
            f"{c['robustkern']['ms']:.3g}",
            times(c["stock"]["ms"] / c["robustkern"]["ms"]),
            f"{c['robustkern']['of_copy']:.0%}",
        ]
        for (op, shape), c in cases.items()
    ]
    second = table(["operator", "stock (l1: reference), ms", "robustkern, ms", "faster", "of copy"], operators)
    return f"{sentence(section)}\n\n{table(header, lines)}\n\n{second}"


def methods(results: Row) -> str:
    """Training steps of every method as multiples of the plain step, beside what their passes would take."""
    section = results["methods"]
    models: dict[str, list[Row]] = {}
    for row in section["rows"]:
        models.setdefault(row["model"], []).append(row)
    header = ["method", "passes", "of plain steps", "stock code", "robustkern", "over its passes"]
    parts = [sentence(section)]
    for model, rows in models.items():
        lines = [
            [
                row["method"],
                str(row["passes"]),
                f"{row['passes'] / 3:.2f}",
                f"{row['stock_ratio']:.2f}x",
                f"{row['ratio']:.2f}x",
                f"{row['over_passes']:.2f}",
            ]
            for row in rows
        ]
        parts.append(f"{model}; the plain step takes {rows[0]['plain_ms']:.3g} ms.")
        parts.append(table(header, lines))
    return "\n\n".join(parts)
