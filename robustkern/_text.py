"""Escapes text from outside, such as names of files and classes: one function for each place where it is shown.

What cannot be printed (control characters, terminal escapes, bytes that are not UTF-8, marks that change the direction
of writing) is shown everywhere as Python's repr shows it.
"""

import html
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def plain(text: object) -> str:
    """One line that any place can print, whatever `text` holds."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def brief(text: object, most: int = 160) -> str:
    """`plain`, cut in the middle to `most` characters: for messages."""
    try:
        text = str(text)
    except ValueError:  # of an integer with thousands of digits
        return f"a {type(text).__name__} too long to be shown"
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 3 :]}"
    return plain(text)


def terminal(text: object) -> str:
    """For Rich: nothing in it is markup."""
    from rich.markup import escape

    return escape(plain(text))


def in_html(text: object) -> str:
    """For HTML, attributes included."""
    return html.escape(plain(text))


def in_markdown(text: object) -> str:
    """For Markdown, cells of tables included."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", plain(text))


def markdown_code(text: object) -> str:
    """For Markdown, as code; not in a table."""
    text = plain(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def command_line(words: Sequence[object]) -> str:
    """A line that a shell splits into these words again."""
    return " ".join(map(_word, map(str, words)))


def _word(text: str) -> str:
    if text.isprintable():
        return shlex.quote(text)
    escaped = (chr(b) if 32 <= b < 127 and chr(b) not in "'\\" else f"\\x{b:02x}" for b in os.fsencode(text))
    return f"$'{''.join(escaped)}'"


@contextmanager
def literal(figure: Any) -> Iterator[None]:
    """In this context, Matplotlib draws a figure's texts literally: a $ in a name starts no formula, and TeX is off."""
    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set(parse_math=False, usetex=False, text="\n".join(map(plain, text.get_text().split("\n"))))
    # The context covers the drawing, which makes the tick labels.  Names may have letters that the font lacks, drawn as
    # boxes, or be too long for any layout.
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from|constrained_layout not applied", UserWarning)
        yield


def loosen_streams() -> None:
    """Makes stdout and stderr print characters that their encoding lacks as escapes, not raise: for ASCII terminals."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
