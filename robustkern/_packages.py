"""How to install a missing optional package; the extras of pyproject.toml work in a source folder only."""

_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def pip_install(*modules: str) -> str:
    """The command that installs these modules: pip_install("yaml") is "pip install pyyaml"."""
    return " ".join(["pip install", *(_DISTRIBUTIONS.get(name, name) for name in modules)])
