"""The lesson, docs/lesson.md and docs/lesson.zh.md: every block prints what stands below it, every command runs,
every picture is what its command draws, and the two languages have the same code.

A block's comment says how it is compared: `measured` comes from training on the full data, whose last digits depend on
the processor; `timed` is a ratio of times, of which the order counts.
"""

import codeop
import contextlib
import doctest
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fmnist.data
from fmnist import __main__, diagrams
from fmnist.errors import UserError
from fmnist_runs import without_pictures
from softxent import dispatch

DOCS = Path(__file__).parents[1] / "docs"
ENGLISH, CHINESE = ((DOCS / name).read_text(encoding="utf-8") for name in ("lesson.md", "lesson.zh.md"))
BLOCK = re.compile(r"(?:<!-- (\w+) -->\n)?```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
SECONDS_OF_COMMANDS = 17 + 85  # the blocks, and the commands: one core of an AMD EPYC, beside other work
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]\d+)?")


def commands(page: str) -> list[str]:
    """In the page's order: what it begins with, those of its shell blocks, and then those within its text."""
    first = [f"python -m fmnist train {options}" for options in re.findall(r'`make train ARGS="(.*?)"`', page)]
    blocks = re.findall(r"```shell\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python -m")]
    return first + lines + re.findall(r"(?<!`)`(python -m fmnist [^`]+)`", page)


@pytest.fixture
def lesson(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names that the lesson's blocks use; `full` says whether they see the whole data, or the sample."""
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    full = True
    try:
        fmnist.data.load(require_full=True, log=lambda line: None)
    except UserError:
        monkeypatch.setenv("FMNIST_DATA", "sample")
        full = False
    threads = torch.get_num_threads()
    names: dict[str, Any] = {"full": full}
    yield names
    torch.set_num_threads(threads)


def test_every_block_prints_what_stands_below_it_and_every_answer_too(lesson: dict[str, Any]) -> None:
    blocks = BLOCK.findall(ENGLISH)
    assert len(blocks) >= 14
    for mark, code, expected in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "docs/lesson.md", "exec"), lesson)
        assert bool(expected) == bool(out.getvalue()), f"a block without its output:\n{code}"
        if lesson["full"] or mark != "measured":
            assert agree(out.getvalue(), expected, mark), f"{code}\nprints\n{out.getvalue()}\nnot\n{expected}"
    answers = re.findall(r"```pycon\n(.*?)```", ENGLISH, re.DOTALL)
    assert len(answers) >= 5
    for i, answer in enumerate(answers):
        test = doctest.DocTestParser().get_doctest(answer, lesson, f"answer {i}", "lesson.md", 0)
        assert doctest.DocTestRunner().run(test).failed == 0


def test_every_block_can_be_pasted_into_pythons_prompt_where_a_blank_line_ends_an_indented_block() -> None:
    for _, block, _ in BLOCK.findall(ENGLISH):
        statement: list[str] = []
        for line in [*block.splitlines(), ""]:
            statement.append(line)
            if codeop.compile_command("\n".join(statement), "docs/lesson.md", "single") is not None:
                statement = []
        assert not statement, "not whole"


def agree(found: str, expected: str, mark: str) -> bool:
    """Word for word; of `measured` numbers up to two of the last digit, of `timed` ones within a factor of ten."""
    if mark == "":
        return found == expected
    if NUMBER.split(found) != NUMBER.split(expected):
        return False
    pairs = list(zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True))
    if mark == "timed":
        return all(float(b) / 10 <= float(a) <= float(b) * 10 for a, b in pairs)
    assert mark == "measured"
    decimals = [len(b.partition(".")[2]) for _, b in pairs]
    return all(
        abs(float(a) - float(b)) <= (2.5 * 10.0**-k if k else 0) for (a, b), k in zip(pairs, decimals, strict=True)
    )


def test_agreement_is_no_wider_than_it_says() -> None:
    assert agree("a 1\n", "a 1\n", "") and not agree("a 1\n", "a 2\n", "")
    assert agree("a 0.12 3", "a 0.14 3", "measured") and not agree("a 0.11 3", "a 0.14 3", "measured")
    assert not agree("a 4", "a 3", "measured") and not agree("b 0.12", "a 0.12", "measured")
    assert agree("40 times", "300 times", "timed") and not agree("4000 times", "300 times", "timed")


def test_both_languages_have_the_same_code_output_answers_commands_pictures_and_sections() -> None:
    """Chinese pages lack no idea, and no slip."""
    assert BLOCK.findall(CHINESE) == BLOCK.findall(ENGLISH)
    for pattern in (
        r"```pycon\n(.*?)```",
        r"```shell\n(.*?)```",
        r"\]\((pictures/\w+\.svg)\)",
        r"^## (\d+)\.",
        r"^(\d+)\. ",
        r"\$\$(.*?)\$\$",
        r"<details markdown=\"1\">",
        r"^\| .*?(\d\.\d{4}.*?)\s*$",
    ):
        found = [re.findall(pattern, page, re.DOTALL | re.MULTILINE) for page in (ENGLISH, CHINESE)]
        if pattern.startswith(r"^\|"):
            found = [[re.findall(r"\d\.\d+", row) for row in rows] for rows in found]
        assert found[0] == found[1] and found[0], pattern
    assert commands(CHINESE) == commands(ENGLISH)


def test_every_section_has_its_question_and_its_exercise_with_an_answer() -> None:
    for page, question, exercise, answer in (
        (ENGLISH, "**Question.**", "**Exercise.**", "<summary>Answer<"),
        (CHINESE, "**问题。**", "**练习。**", "<summary>答案<"),
    ):
        sections = re.split(r"^## (?=\d+\. )", page, flags=re.MULTILINE)[1:]
        sections[-1] = sections[-1].split("\n## ")[0]
        assert len(sections) == 11
        for section in sections:
            assert [section.count(part) for part in (question, exercise, answer)] == [1, 1, 1], section[:40]
            assert section.count("<details") == section.count("</details>")


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_the_lesson_takes_less_than_an_hour_as_it_says(page: str) -> None:
    """180 words or 300 Chinese characters a minute; a minute for a formula and for a block of code, half a minute more
    for one of more than ten lines, one and a half for an exercise, and a quarter to type a command and read what it
    prints, beside the time that it ran. Asides, an answer's commands, and what is below the last section do not count.
    """
    page = page[: page.rindex("\n## ", 0, page.rindex("\n## "))]
    page = re.sub(r"<details markdown=\"1\"><summary>(?:Aside|旁白).*?</details>", "", page, flags=re.DOTALL)
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    page = re.sub(r"(?<=</summary>)\n\n```shell\n.*?```", "", page, flags=re.DOTALL)
    formulas, exercises = page.count("$$") / 2, page.count("<details")
    prose = re.sub(r"```.*?```|\$\$.*?\$\$|<[^>]*>|!?\]\([^)]*\)", " ", page, flags=re.DOTALL)
    characters = len(re.findall(r"[\u4e00-\u9fff]", prose))
    words = len(re.findall(r"\$[^$]+\$|[A-Za-z0-9][\w.,%'-]*", re.sub(r"[\u4e00-\u9fff]", " ", prose)))
    minutes = words / 180 + characters / 300 + formulas
    minutes += sum(1 + 0.5 * (len(re.findall(r"\S.*\n", block)) > 10) for block in code)
    minutes += 1.5 * exercises + 0.25 * len(commands(page)) + SECONDS_OF_COMMANDS / 60
    print(f"{minutes:.1f} minutes")
    assert 45 < minutes < 60


def test_every_command_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one folder, on the sample, an epoch each; pictures are drawn for the run that the lesson looks at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FMNIST_DATA", "sample")
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    found = commands(ENGLISH)
    assert len(found) >= 15
    for command in found:
        arguments = command.replace("<name>", "lesson").split()[3:]
        if "--resume" not in arguments and arguments[0] == "train":
            arguments += ["--epochs", "1"]
            if "--validation" in arguments:
                arguments += ["--validation", "100"]  # of 2,000 images
        with monkeypatch.context() as patch:
            if arguments[0] == "train" and "lesson" not in arguments:
                without_pictures(patch)
            assert __main__.main(arguments) == 0, command
        assert capsys.readouterr().out, command
    for path in ("compare.png", "runs/lesson/report.html", "runs/lesson/mistakes.png"):
        assert (tmp_path / path).stat().st_size > 10_000, path


def test_the_pictures_are_what_their_command_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, but for those that come from training."""
    pytest.importorskip("matplotlib")
    named = set(re.findall(r"pictures/(\w+)\.svg", ENGLISH))
    assert named == {*diagrams.DRAWN, *diagrams.TRAINED}
    assert {path.name for path in (DOCS / "pictures").iterdir()} == {f"{name}.svg" for name in named}
    assert diagrams.main([str(tmp_path)]) == 0
    for name in diagrams.DRAWN:
        assert (tmp_path / f"{name}.svg").read_bytes() == (DOCS / "pictures" / f"{name}.svg").read_bytes(), name
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    threads = torch.get_num_threads()
    assert diagrams.main([str(tmp_path), "--train", "--data", "sample"]) == 0
    torch.set_num_threads(threads)
    for name in diagrams.TRAINED:
        assert (tmp_path / f"{name}.svg").stat().st_size > 10_000


def test_what_the_pages_name_is_there() -> None:
    for page in (ENGLISH, CHINESE):
        for target in re.findall(r"\]\(([^)#]+)", page):
            assert (DOCS / target).exists(), target
        for path in re.findall(r"`(fmnist/\w+\.py)`", page):
            assert (DOCS.parent / path).is_file(), path


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_the_notebook_has_every_block_as_a_cell_and_nothing_else_to_run(page: str) -> None:
    jupytext = pytest.importorskip("jupytext")
    cells = jupytext.reads(page, fmt="md").cells
    code = [cell.source + "\n" for cell in cells if cell.cell_type == "code"]
    assert code == [block for _, block, _ in BLOCK.findall(page)]
    for cell in cells:
        if cell.cell_type == "markdown":
            assert cell.source.count("<details") == cell.source.count("</details>"), "an answer cut in two"
