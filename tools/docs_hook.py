"""What mkdocs does beside its own: pages of the checkout that lie outside docs/, and formulas as MathML.

A file of the checkout has one place in the site: `docs/x.md` is `x.md`, README.md is the first page, `index.md`, and
any other, such as `bench/README.md`, has the path that it has. So links go on working, in the site as in the checkout.
"""

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "bench/README.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "bench/results").rglob("*.*"))),
)
LINK = re.compile(r"(\]\()([^)#\s]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

# What latex2mathml does not do as TeX does: names of functions upright, and a thin space around them.
OPERATOR = re.compile(r"\\operatorname\{(\w+)\}")
FUNCTION = re.compile(r"\\(?:log|exp|tanh)\b(?!\s*(?:\(|\\left|[_^]))|\\mathrm\{argmax\}_\w")


def in_site(path: str) -> str:
    """The place in the site of a file of the checkout."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def in_checkout(place: str) -> str:
    """The file of the checkout that a place in the site shows."""
    if place == "index.md":
        return "README.md"
    return place if place in OUTSIDE else f"docs/{place}"


def on_files(files: Any, config: Any) -> Any:
    for path in OUTSIDE:
        files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links between files of the checkout as links between pages; to a file that is no page, its name alone."""
    place = page.file.src_uri
    folder = posixpath.dirname(in_checkout(place))

    def moved(match: re.Match[str]) -> str:
        if "://" in match[2]:
            return match[0]
        target = in_site(posixpath.normpath(posixpath.join(folder, match[2])))
        return match[1] + posixpath.relpath(target, posixpath.dirname(place) or ".")

    return LINK.sub(moved, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    def drawn(match: re.Match[str]) -> str:
        formula = OPERATOR.sub(r"\\mathrm{\1}", html.unescape(match[2]).replace("{aligned}", "{align*}"))
        spaced = FUNCTION.sub(r"\\,\g<0>\\,", formula)
        mathml: str = convert(spaced, display="block" if match[1] == "div" else "inline")
        if "&amp;" in mathml or "&#x00026;" in mathml or "\\" in mathml:
            raise ValueError(f"{page.file.src_uri}: latex2mathml does not know all of {match[2]}")
        return mathml

    return FORMULA.sub(drawn, content)
