"""Hostile names in terminals, figures, HTML, Markdown and shells: they are shown, never interpreted."""

import html
import io
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from PIL import Image
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from robustkern import _text
from robustkern.cli.app import app
from robustkern.study import figures
from robustkern.study.plan import Plan
from robustkern.study.report import command
from robustkern.study.study import Study
from robustkern.training.figures import save_png

# Rich's markup and emoji, mathtext, HTML, Markdown, shells, terminals, the direction of writing, undecodable bytes.
NAMES = ["[bold red]", "[ {x} ]", ":smile:", "$a$$", "$\\frac", "_first", "a|b`c``d`", "<img src=x onerror=y>&'\"",
         "*x*\\", "# head", "$(touch pwned);`touch pwned`'", "two\nlines\r", "\x1b[31mred\x07", "left\u202eright",
         "\x85\u2028", "é–中", os.fsdecode(b"\xff\xfe"), "-rf", " ", "~"]  # fmt: skip
FOREIGN = st.one_of(
    st.text(),
    st.sampled_from(NAMES),
    st.binary(max_size=8).map(os.fsdecode),
    st.lists(st.sampled_from("[]/\\`$|'\"ab \n")).map("".join),
)


@given(FOREIGN)
def test_plain_is_one_line_that_can_be_encoded(text):
    shown = _text.plain(text)
    assert shown.isprintable() and shown.encode() is not None
    assert shown == text or not text.isprintable()
    assert _text.brief(text * 50).isprintable() and len(_text.brief(text * 50)) <= 12 * 160


@given(FOREIGN)
def test_rich_shows_what_it_is_given(text):
    console = Console(file=io.StringIO(), width=10_000, emoji=False, color_system=None)
    console.print(f"[bold]{_text.terminal(text)}[/bold]", highlight=False, soft_wrap=True)
    assert console.file.getvalue() == _text.plain(text) + "\n"
    table = Table(title=_text.terminal(text), box=None)
    table.add_row(_text.terminal(text))
    console.print(table)


@given(FOREIGN)
def test_html_shows_what_it_is_given(text):
    shown = _text.in_html(text)
    assert html.unescape(shown) == _text.plain(text) and not set(shown) & set("<>\"'")


@given(FOREIGN)
def test_markdown_cells_and_code_hold_what_they_are_given(text):
    cell = _text.in_markdown(text)
    bare = cell.replace("\\\\", "")
    assert all(f"\\{c}" in bare or c not in bare for c in "|`*_<[$")
    assert bare.count("|") == bare.count("\\|") and "\n" not in cell
    code = _text.markdown_code(text)
    fence = code[: len(code) - len(code.lstrip("`"))]
    assert fence and code.endswith(fence) and "\n" not in code
    assert fence not in code[len(fence) : -len(fence)] or not _text.plain(text).strip("`")


@given(st.lists(FOREIGN.filter(lambda text: text.isprintable()), min_size=1))
def test_shell_words_are_split_into_what_they_were(words):
    assert shlex.split(_text.command_line(words)) == words


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_reads_what_cannot_be_printed():
    words = [*NAMES, "\x00"[:0], "'", "\\x41b"]
    line = _text.command_line(["printf", "%s\\0", *words])
    assert line.isprintable()
    read = subprocess.run(["bash", "-c", line.encode()], capture_output=True, check=True).stdout
    assert read.split(b"\0")[:-1] == [os.fsencode(word) for word in words]


@settings(max_examples=25)
@given(FOREIGN)
def test_matplotlib_draws_what_it_is_given(text):
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(2, 2))
    axes = figure.subplots()
    axes.plot([0, 1], label=f" {text}")
    axes.set_title(text)
    axes.set_xticks([0, 1], [_text.plain(text), "b"])
    axes.legend()
    with _text.literal(figure):
        figure.savefig(io.BytesIO(), format="png", dpi=20)
        drawn = [label.get_text() for label in figure.findobj(Text)]
    assert sum(_text.plain(text.split("\n")[0]) in label for label in drawn) >= 3
    assert not any(label.get_parse_math() or label.get_usetex() for label in figure.findobj(Text))


def test_curves_of_any_name_are_in_the_legend(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        figures, "save_png", lambda path, figure, dpi: seen.append(figure) or save_png(path, figure, dpi)
    )
    point = {"eps": 0.1, "accuracy": 0.5, "low": 0.4, "high": 0.6}
    figures.accuracy_curves(tmp_path / "curves.png", {name: [point] for name in NAMES}, title="$")
    legend = seen[0].axes[0].get_legend().get_texts()
    assert [label.get_text().strip() for label in legend] == [
        "\n".join(map(_text.plain, name.split("\n"))).strip() for name in NAMES
    ]


def test_the_command_that_makes_a_study_again_is_one(tmp_path):
    for name in NAMES:
        if not name.isprintable() or "/" in name:
            continue
        plan = Plan("digits", given=((name, f"runs/{name}"),), sweep=(), methods=(), two_by_two=False, threads=2)
        words = shlex.split(command(Study(plan, None, tmp_path)))
        assert words[:2] == ["robustkern", "study"] and f"{name}=runs/{name}" in words
        assert words[words.index("--methods") + 1] == "none"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Images in classes of such names, below a folder of such a name, and a run of one epoch, with its figures."""
    folder = tmp_path_factory.mktemp("hostile") / os.fsdecode(b"d[red]$x$\xff\x1b[31m")
    names = [name for name in NAMES if "/" not in name]
    for split in ("train", "test"):
        for number, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for shade in range(2):
                Image.new("L", (8, 8), 12 * number + shade).save(folder / split / name / f"{shade}.png")
    (folder / "train" / "~" / "[not] an image\n.txt").touch()
    out = folder / "run[bold]"
    result = CliRunner(charset="ascii").invoke(
        app, ["train", "--data", str(folder), "--method", "standard", "--epochs", "1", "--pgd-steps", "1",
                  "--threads", "1", "--out", str(out)]
    )  # fmt: skip
    return folder, out, result


def fit_to_print(text):
    return all(line.isprintable() and line.isascii() for line in text.splitlines()) and "\x1b" not in text


def test_training_on_such_names(hostile):
    _, out, result = hostile
    assert result.exit_code == 0 and fit_to_print(result.output), result.output
    assert "skipped 1 that is no image in the folder of a class: ~/[not] an image\\n.txt" in result.stderr
    assert "run[bold]/ holds model.safetensors" in result.stdout
    assert (out / "gradients.png").stat().st_size > 5000
    again = CliRunner(charset="ascii").invoke(app, ["train", "--resume", "--out", str(out)])
    assert again.exit_code == 0 and fit_to_print(again.output), again.output


def test_evaluating_on_such_names(hostile):
    _, out, _ = hostile
    arguments = ["--attacks", "pgd", "--pgd-steps", "1", "--restarts", "1", "--check-samples", "20"]
    result = CliRunner(charset="ascii").invoke(app, ["evaluate", str(out), *arguments])
    assert result.exit_code == 0 and fit_to_print(result.output), result.output
    written = json.loads((out / "evaluation" / "evaluation.json").read_text())
    assert {row["class"] for row in written["per_class"]} == {name for name in NAMES if "/" not in name}
    assert (out / "evaluation" / "evaluation.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "arguments", [["--data", "nowhere[/x]\udcff"], ["--method", "[/b]"], ["--eps", "[/]\udcff"], ["--set", "[/]"]]
)
def test_wrong_arguments_are_shown_as_they_are(arguments):
    result = CliRunner(charset="ascii").invoke(app, ["train", *arguments])
    assert (
        result.exit_code == 2
        and "Traceback" not in result.output
        and arguments[1][-3:].strip("\udcff") in result.output
    )


@pytest.mark.long
@pytest.mark.parametrize("arguments", [["info"], ["train", "--help"]])
def test_a_terminal_without_letters_is_no_error(arguments):
    surroundings = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-m", "robustkern", *arguments], env=surroundings, capture_output=True, check=False
    )
    assert done.returncode == 0 and done.stdout.isascii() and not done.stderr
