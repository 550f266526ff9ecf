"""YAML 1.2, and only plain data.

PyYAML reads version 1.1, in which 010 is eight, 1:00 is sixty, `no` is false and 5e-4 is a text, and in which a few
bytes of aliases grow into gigabytes.  Here 010 is ten, and 1:00 and `no` are texts.  Anchors, aliases, tags and keys
that stand twice are refused, and so is anything too long or too deep for settings.
"""

import re
from functools import cache
from typing import Any

from robustkern._text import brief

from .errors import UsageError

MOST_BYTES = 1 << 16  # a configuration has a thousandth of that
_DEPTH = 16

# The core schema of YAML 1.2: tag, what it matches, what such a text may begin with.
_SCHEMA = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
]


def load_yaml(text: str) -> Any:
    """The one document in `text`, made of mappings, lists, strings, numbers, booleans and null.

    Raises:
        UsageError: It is not YAML, longer or deeper than settings are, has a key twice, an anchor, alias or tag.
    """
    import yaml

    if len(text) > MOST_BYTES:
        raise UsageError(f"not settings: longer than {MOST_BYTES} characters")
    try:
        return yaml.load(text, _loader())
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UsageError(f"not YAML{where} ({brief(reason)})") from error


def dump_yaml(values: Any) -> str:
    """Text that readers of YAML 1.2 and 1.1 read back as it was, floating-point numbers to their last bit."""
    import yaml

    return yaml.dump(values, Dumper=_dumper(), sort_keys=False, allow_unicode=True)


def _resolved(kind: Any) -> Any:
    for tag, pattern, first in _SCHEMA:
        kind.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), first)
    return kind


@cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's name for YAML 1.1's
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if getattr(event, "anchor", None) or getattr(event, "tag", None):  # an alias has its anchor's name
                raise yaml.MarkedYAMLError(None, None, "anchors, aliases and tags are not read", event.start_mark)
            if self.depth == _DEPTH:
                raise yaml.MarkedYAMLError(None, None, f"more than {_DEPTH} levels", event.start_mark)
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.MarkedYAMLError(None, None, "a key must be a name", key.start_mark)
                name = self.construct_object(key)
                if name in seen:
                    raise yaml.MarkedYAMLError(None, None, f"{brief(name)} stands twice", key.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep)

        def construct_int(self, node: Any) -> int:
            text = node.value
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)

        def construct_float(self, node: Any) -> float:
            return float(re.sub(r"\.(?=[iInN])", "", node.value))  # .inf

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_int)
    Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_float)
    return _resolved(Loader)


@cache
def _dumper() -> Any:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes each text that either version of YAML would take for something else."""

    # Within single quotes PyYAML writes line breaks of Unicode that it cannot read back.
    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')

    Dumper.add_representer(str, text)
    return _resolved(Dumper)
