"""Docstrings are plain text with formulas; this makes reStructuredText of them that shows what was written."""

import re

_SECTION = re.compile(
    r"(Args|Attributes|Returns|Raises|Yields|Examples?|Differentiability|Determinism|Source|Passes|Note):"
)


def to_restructured_text(app, what, name, obj, options, lines):
    """Escapes what is markup by accident, and keeps examples, and indented formulas and code, as they stand."""
    shown = []
    example = section = False
    literal = 0  # the indent of the block that is kept, if any
    for line in lines:
        indent, text = len(line) - len(line.lstrip()), line.strip()
        example = bool(text) and (example or text.startswith(">>>"))
        if not text or example or (literal and indent >= literal):
            shown.append(line)
            continue
        if literal and shown[-1]:
            shown.append("")
        literal = 0
        if indent == 0:
            section = bool(_SECTION.fullmatch(text))
        elif not section:  # indented in running text: a formula, a table or code
            shown += ["", "::", "", line]
            literal = indent
            continue
        shown.append(" " * indent + _escaped(text))
    lines[:] = shown


def _escaped(text):
    """Single backticks are code, asterisks, bars and underscores themselves."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(f"`{part}`" if part.startswith("`") else re.sub(r"([*|_\\])", r"\\\1", part) for part in parts)
