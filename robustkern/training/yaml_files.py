"""YAML without its surprises: 5e-4 is a number, no key stands twice, nothing but plain data is read."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from .errors import UsageError


def load_yaml(text: str) -> Any:
    """The one document in `text`, made of mappings, lists, strings, numbers, booleans and null.

    Raises:
        UsageError: It is not YAML, has a key twice or a tag that would make anything else.
    """
    import yaml

    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        raise UsageError(f"not YAML{where} ({getattr(error, 'problem', None) or error})") from error


def dump_yaml(values: Any) -> str:
    """What `load_yaml` reads back as it was, floating-point numbers to their last bit."""
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


@cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for name in names:
                if names.count(name) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"{name} stands twice", node.start_mark)
            return super().construct_mapping(node, deep)

    # YAML 1.1, which PyYAML reads, takes 5e-4 for a string: it wants a point, and a sign after the e.
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)[eE][0-9]+$"), list("-+.0123456789")
    )
    return Loader
