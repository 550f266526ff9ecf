"""What to install where an optional package is missing; the extras of pyproject.toml are for a source folder only."""

_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def pip_install(*modules: str) -> str:
    """The command that brings these modules: pip_install("yaml") is "pip install pyyaml"."""
    return " ".join(["pip install", *(_DISTRIBUTIONS.get(name, name) for name in modules)])
