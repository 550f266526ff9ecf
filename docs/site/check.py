"""Reads the built site: links, anchors, pictures, the search index, and pages that nothing leads to.

    python docs/site/check.py build/docs

Prints what is wrong, a line each, and ends with status 1 if anything is.  Links to other sites are not followed.
"""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_MADE_BY_SPHINX = {"genindex.html", "search.html", "py-modindex.html"}
_WORDS = ("second", "attention", "bfloat16", "jacobian")  # that the search has to find, as stems


class Page(HTMLParser):
    """The targets of links and of pictures on a page, and what can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "meta" and found.get("http-equiv") == "refresh":
            self.links.append(found["content"].partition("url=")[2])
        elif tag == "img":
            self.pictures.append(found.get("src", ""))


def faults(site: Path) -> list[str]:
    """A line for each thing that is wrong with the site."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    if not (site / "index.html").is_file():
        return ["there is no index.html"]
    wrong, reached = [], {(site / "index.html").resolve()}
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for target in [*page.links, *page.pictures]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not file.is_file():
                wrong.append(f"{name}: {target} does not exist")
            elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].anchors:
                wrong.append(f"{name}: {target} has no such heading")
            elif name.name not in _MADE_BY_SPHINX and file != path:
                reached.add(file)
    unreached = [path for path in pages if path not in reached and path.name not in _MADE_BY_SPHINX]
    wrong += [f"{path.relative_to(site.resolve())}: no page links to it" for path in unreached]
    return wrong + _search_faults(site)


def _search_faults(site: Path) -> list[str]:
    index = site / "searchindex.js"
    if not index.is_file():
        return ["there is no searchindex.js"]
    match = re.fullmatch(r"Search\.setIndex\((.*)\)\s*;?\s*", index.read_text(encoding="utf-8"), re.DOTALL)
    if match is None:
        return ["searchindex.js is not an index"]
    terms = json.loads(match[1])["terms"]
    return [f"the search does not find {word}" for word in _WORDS if not any(term.startswith(word) for term in terms)]


if __name__ == "__main__":
    lines = faults(Path(sys.argv[1]))
    print("\n".join(lines) or f"{sys.argv[1]}: every link, picture and word of the search is there")
    raise SystemExit(1 if lines else 0)
