"""What `make docs` runs: docstrings become text that shows what was written, and a fault of the site is found."""

import importlib.util
import json
from pathlib import Path

import pytest

SITE = Path(__file__).parents[1] / "docs" / "site"


def module(name):
    spec = importlib.util.spec_from_file_location(f"site_{name}", SITE / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def site(tmp_path):
    terms = dict.fromkeys(("second", "attent", "attention", "bfloat16", "jacobian"), 0)
    (tmp_path / "searchindex.js").write_text(f"Search.setIndex({json.dumps({'terms': terms})})")
    (tmp_path / "index.html").write_text('<meta http-equiv="refresh" content="0; url=docs/a.html">')
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.html").write_text(
        '<h1 id="top">A</h1><a href="b.html#there">b</a><a href="https://x.org/gone">x</a><img src="p.png">'
    )
    (tmp_path / "docs" / "b.html").write_text('<h2 id="there">B</h2><a href="#there">here</a>')
    (tmp_path / "docs" / "p.png").write_bytes(b"")
    return tmp_path


def test_a_whole_site_has_no_faults(site):
    assert module("check").faults(site) == []


@pytest.mark.parametrize(
    "file, old, new, fault",
    [
        ("docs/a.html", "b.html#there", "c.html", "docs/a.html: c.html does not exist"),
        ("docs/a.html", "#there", "#gone", "docs/a.html: b.html#gone has no such heading"),
        ("docs/a.html", "p.png", "q.png", "docs/a.html: q.png does not exist"),
        ("docs/a.html", '<a href="b.html#there">b</a>', "", "docs/b.html: no page links to it"),
        ("index.html", "docs/a.html", "docs/z.html", "index.html: docs/z.html does not exist"),
        ("searchindex.js", "bfloat16", "float", "the search does not find bfloat16"),
    ],
)
def test_a_fault_of_the_site_is_found(file, old, new, fault, site):
    path = site / file
    path.write_text(path.read_text().replace(old, new))
    assert fault in module("check").faults(site)


DOCSTRING = """||w * g||_p of `x`, with *args.

It is one of

    plain    ||J||_F^2
    fisher   tr F
and no other.

Args:
    x: the [B, N] inputs, |x| <= 1,
        as they are.

>>> 1 * 2
2
"""


def test_docstrings_show_what_was_written():
    lines = DOCSTRING.splitlines()
    module("docstrings").to_restructured_text(None, "function", "f", None, None, lines)
    text = "\n".join(lines)
    assert r"\|\|w \* g\|\|\_p of ``x``, with \*args." in text
    assert "::\n\n    plain    ||J||_F^2\n    fisher   tr F\n\nand no other." in text
    assert "Args:\n" + r"    x: the [B, N] inputs, \|x\| <= 1," in text
    assert text.endswith(">>> 1 * 2\n2")
