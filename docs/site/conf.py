"""The site: every Markdown file that the documents link to, where it stands in the repository, and the docstrings."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from docstrings import to_restructured_text

from robustkern import __version__

project = "robustkern"
author = "the robustkern authors"
release = version = __version__
root_doc = "docs/index"
include_patterns = [
    "docs/**.md", "csrc/README.md", "benchmarks/README.md", "benchmarks/cuda_budget/*.md", "benchmarks/results/*.md",
    "tests/*/README.md", "CONTRIBUTING.md", "CHANGELOG.md",
]  # fmt: skip
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx_copybutton"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_typehints = "none"  # docstrings name shapes and dtypes; annotations would repeat Tensor
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_custom_sections = [("Differentiability", "returns_style"), ("Determinism", "returns_style")]
nitpicky = True
# Other people's names, and exceptions and fields that their users never make by hand.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|typing|collections|pathlib|os|robustkern\._)\b.*|.*Error"),
    ("py:.*", r"robustkern\.sharding\.Shard|Interrupted|MissingPackage"),
]
suppress_warnings = ["toc.not_included"]  # check.py finds pages that nothing leads to

smartquotes = False  # quotes in formulas and options are meant

html_theme = "furo"
html_title = f"robustkern {release}"
html_extra_path = [str(Path(__file__).parent / "root")]  # an index.html that leads to docs/index.html
html_copy_source = False
html_show_copyright = False
html_static_path = [str(Path(__file__).parent / "static")]
html_css_files = ["wide.css"]
copybutton_exclude = ".linenos, .gp"


def setup(app):
    # Before napoleon, which reads what Google's style leaves.
    app.connect("autodoc-process-docstring", to_restructured_text, priority=100)
