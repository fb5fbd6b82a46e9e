"""The text of a kernel, taken apart: its instructions, registers, labels and parameters."""

import re
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

HEAD = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)\s*([^{]*)\{")
PARAMETER = re.compile(r"\s*\.param\s+\.(\w+)(?:\s+\.ptr(?:\s+\.global)?(?:\s+\.align\s+\d+)?)?\s+(\w+)\s*")
TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*)
      | \.loc\s(?P<loc>[^\n]*)
      | (?P<label>[$\w]+):(?!:)
      | (?P<open>\{)
      | (?P<close>\})
      | (?P<statement>[^;{}]+(?:\{[^{}]*\}[^;{}]*)*);""",
    re.VERBOSE,
)
STATEMENT = re.compile(r"(?:@(!?)(\S+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{\[][^,]*")
ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]")


class Unmodelled(Exception):
    """PTX that is not modelled."""


class Address(NamedTuple):
    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    index: int
    text: str
    opcode: str  # with its suffixes
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None  # a predicate, and whether it is negated
    source: str  # file:line, and where that was inlined


@dataclass
class Kernel:
    name: str
    threads: int  # of a program
    parameters: dict[str, str]  # types
    shared: set[str]  # names of the program's shared memory, all of which start at 0
    registers: dict[str, str] = field(default_factory=dict)  # types
    labels: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)


@cache
def parse(text: str) -> Kernel:
    """The kernel of a module that has one, and nothing else that would matter."""
    heads = list(HEAD.finditer(text))
    if len(heads) != 1 or re.search(r"^\s*(\.visible\s+|\.extern\s+)?\.func\b", text, re.MULTILINE):
        raise Unmodelled("a module of anything but one kernel")
    name, parameters, directives = heads[0].groups()
    threads = re.fullmatch(r"\.(?:req|max)ntid\s+(\d+)(?:,\s*1)*\s*(?:\.minnctapersm\s+\d+\s*)?", directives)
    if not threads:
        raise Unmodelled(f"a kernel of {directives.strip()}")
    if static := re.search(r"^\s*(?:\.shared|\.local)\b.*", text, re.MULTILINE):
        raise Unmodelled(static[0].strip())
    shared = set(re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]", text))
    kernel = Kernel(name, int(threads[1]), {}, shared)
    for one in parameters.split(",") if parameters.strip() else []:
        found = PARAMETER.fullmatch(one)
        if not found:
            raise Unmodelled(one.strip())
        kernel.parameters[found[2]] = found[1]
    files = {number: path.rsplit("/", 1)[-1] for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    _read_body(kernel, text, heads[0].end(), files)
    return kernel


def _read_body(kernel: Kernel, text: str, at: int, files: dict[str, str]) -> None:
    scopes: list[dict[str, str]] = [{}]  # own names of the registers that inline assembly declares
    n_scopes, source = 0, ""
    while True:
        found = TOKEN.match(text, at)
        if not found:
            raise Unmodelled(f"text that is no statement: {text[at : at + 60]!r}")
        at = found.end()
        if found["loc"]:
            source = _source(found["loc"], files) or source
        elif found["label"]:
            kernel.labels[found["label"]] = len(kernel.code)
        elif found["open"]:
            scopes.append({})
            n_scopes += 1
        elif found["close"]:
            scopes.pop()
            if not scopes:
                return
        elif found["statement"]:
            statement = found["statement"].strip()
            if declared := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement):
                for name in declared[2].split(","):
                    _declare(kernel, scopes, declared[1], name.strip(), n_scopes)
            elif statement != '.pragma "nounroll"':
                own = {name: own for scope in scopes for name, own in scope.items()}
                kernel.code.append(_instruction(statement, own, source, len(kernel.code)))


def _declare(kernel: Kernel, scopes: list[dict[str, str]], kind: str, name: str, scope: int) -> None:
    if many := re.fullmatch(r"(.*)<(\d+)>", name):
        kernel.registers |= {f"{many[1]}{k}": kind for k in range(int(many[2]))}
    elif len(scopes) > 1:
        scopes[-1][name] = f"{name}.{scope}"
        kernel.registers[f"{name}.{scope}"] = kind
    else:
        kernel.registers[name] = kind


def _source(loc: str, files: dict[str, str]) -> str:
    """Of the file's number, line and column; line 0 says nothing."""
    number, line = loc.split()[:2]
    chain = [f"{files.get(a, a)}:{b}" for a, b in re.findall(r"inlined_at (\d+) (\d+)", loc)]
    chain = re.findall(r"@\[ ([^\s:]+:\d+)", loc) or chain
    place = f"{files.get(number, number)}:{line}" + (f" in {chain[-1]}" if chain else "")
    return "" if line == "0" else place


def _instruction(text: str, own: dict[str, str], source: str, index: int) -> Instruction:
    found = STATEMENT.fullmatch(text)
    if not found or "//" in text:
        raise Unmodelled(text)
    negated, guard, opcode, rest = found.groups()

    def renamed(words: str) -> str:
        return re.sub(r"[%\w$]+", lambda word: own.get(word[0], word[0]), words) if own else words

    operands = tuple(_operand(renamed(part.strip())) for part in OPERAND.findall(rest or ""))
    return Instruction(index, text, opcode, operands, (renamed(guard), negated == "!") if guard else None, source)


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(name.strip() for name in text[1:-1].split(","))
    if not text.startswith("["):
        return text
    found = ADDRESS.fullmatch(text)
    if not found:
        raise Unmodelled(text)
    return Address(found[1], int(found[2] or "0", 0))
