"""Options of commands: each value is checked when it is read, and the fields of a dataclass can be options."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin, get_type_hints

import typer

from robustkern import data as datasets
from robustkern import models
from robustkern._arguments import shown
from robustkern._settings import Range, summaries
from robustkern.training import UsageError
from robustkern.training.config import DEVICES, parse_fraction
from robustkern.training.yaml_files import load_yaml

Command = TypeVar("Command", bound=Callable[..., Any])

DATA_HELP = f"{', '.join(datasets.NAMES)}, or a folder with train/CLASS/*.png and test/CLASS/*.png."
MODEL_HELP = f"{', '.join(models.MODELS)}, timm:NAME, or package.module:function."
MODEL_SET_HELP = "A keyword argument of the network, as NAME=VALUE. Can be repeated."
ROOT_HELP = "Folder with the data set's files."


def number(valid: Range) -> Callable[[Any], Any]:
    """Reads a number in a range, or a fraction such as 8/255."""

    def read(value: Any) -> Any:
        try:
            found = int(str(value)) if valid.integer else parse_fraction(str(value))
        except (ValueError, UsageError):
            found = None
        if found not in valid:
            raise typer.BadParameter(f"must be {valid}, got {shown(value)}")
        return found

    return read


def text(value: Any) -> str:
    """Reads a text that is not empty."""
    if not str(value).strip() or "\0" in str(value):
        raise typer.BadParameter(f"must be a text that is not empty, got {shown(value)}")
    return str(value)


def path(value: Any) -> Path:
    """Reads a path that is not empty: an empty one would be the working directory."""
    return Path(text(value))


def device_name(value: Any) -> str:
    """Reads a device."""
    if value not in DEVICES:
        raise typer.BadParameter(f"must be one of {', '.join(DEVICES)}, got {shown(value)}")
    return str(value)


def names(value: Any) -> str:
    """Reads names separated by commas, none of them empty."""
    if not all(part.strip() for part in text(value).split(",")):
        raise typer.BadParameter(f"must be names with commas, got {shown(value)}")
    return str(value)


def assignment(value: Any) -> str:
    """Reads NAME=VALUE."""
    name, sign, given = text(value).partition("=")
    if not (name.strip() and sign and given.strip()):
        raise typer.BadParameter(f"must be of the form NAME=VALUE, got {shown(value)}")
    return str(value)


def milestone_epochs(value: Any) -> Any:
    """Reads epochs separated by commas: 100,150."""
    if isinstance(value, tuple):
        return value
    try:
        return tuple(int(epoch) for epoch in text(value).split(","))
    except ValueError:
        raise typer.BadParameter(f"must be epochs with commas such as 100,150, got {shown(value)}") from None


def numbers(value: Any) -> Any:
    """Reads numbers separated by commas: 0.485,0.456,0.406."""
    if isinstance(value, tuple):
        return value
    try:
        return tuple(parse_fraction(part) for part in text(value).split(","))
    except UsageError:
        raise typer.BadParameter(f"must be numbers with commas such as 0.5,0.5,0.5, got {shown(value)}") from None


def assigned(given: Sequence[str] | None) -> dict[str, Any]:
    """The values of NAME=VALUE texts, with the types that YAML gives them."""
    pairs = [text.partition("=") for text in given or ()]
    return {name.strip().replace("-", "_"): load_yaml(value) for name, _, value in pairs}


def option(help: str, *flags: str, panel: str | None = None, read: Any = text, show: bool = True) -> Any:
    """An option whose values `read` reads: a function, or the range of a number; None for a flag."""
    parser = number(read) if isinstance(read, Range) else read
    return typer.Option(*flags, help=help, rich_help_panel=panel, show_default=show, parser=parser)


def takes(
    *kinds: type, defaults: bool = True, panels: Sequence[str | None] = (None,), **changed: Mapping[str, Any] | None
) -> Callable[[Command], Command]:
    """Gives a command the fields of these dataclasses as options, before its own; it gets them by name.

    Args:
        kinds: The dataclasses.
        defaults: Whether the options have the defaults of the fields; if not, an option that is not given is None.
        panels: The order in which `--help` shows panels.
        **changed: For the name of a field, what replaces the field's own in its option: "kind", "default", and
            arguments of `option`. None: no option.
    """

    def decorate(command: Command) -> Command:
        parameters = [
            _parameter(field.name, **{**_declared(kind, field, defaults), **change})
            for kind in kinds
            for field in dataclasses.fields(kind)
            if (change := changed.get(field.name, {})) is not None
        ]
        hints = get_type_hints(command, include_extras=True)
        for name, own in inspect.signature(command).parameters.items():
            if own.kind is not inspect.Parameter.VAR_KEYWORD:
                parameters.append(own.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
        parameters.sort(key=lambda parameter: panels.index(parameter.annotation.__metadata__[0].rich_help_panel))
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _declared(kind: type, field: dataclasses.Field[Any], defaults: bool) -> dict[str, Any]:
    """The option that a field declares."""
    own = get_type_hints(kind)[field.name]
    own = str if get_origin(own) is Literal else own  # the dataclass says which texts it takes
    return {
        "kind": own,
        "default": field.default if defaults and field.default is not dataclasses.MISSING else None,
        "help": summaries(kind).get(field.name, ""),
        "flags": field.metadata.get("flags", ()),
        "panel": field.metadata.get("panel"),
        "read": None if own is bool else field.metadata.get("valid") or text,
        "show": defaults,
    }


def _parameter(
    name: str, *, kind: Any, default: Any, help: str, flags: Sequence[str], **more: Any
) -> inspect.Parameter:
    annotation: Any = Annotated[kind if default is not None else kind | None, option(help, *flags, **more)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
