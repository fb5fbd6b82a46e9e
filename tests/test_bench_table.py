"""The table says what was measured, on what, and what was not."""

import re
from dataclasses import replace

from bench.cases import KINDS, SMALL, sweep
from bench.results import Results
from bench.table import one_line, table, time_of
from made_results import CASES, SPEED, made_results


def row(text: str, heading: str, shape: str) -> list[str]:
    """The cells of one line of one table."""
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    line = next(line for line in part.splitlines() if line.startswith(f"| {shape} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]


STEP = "cross_entropy step, bfloat16"


def test_a_gpu_has_shares_of_the_copy_with_quartiles_and_calls_and_memory() -> None:
    found = made_results(0, "cuda", n_turns=9)
    for one in found.measurements:
        t = one.least_bytes / (0.5 * found.ceilings["copy"])
        if one.seconds:
            one.seconds = {"graph": [[t / 1.1] * 4 + [t] + [t / 0.9] * 4], "calls": [[25e-6] * 9]}
    cells = row(table(found), STEP, "5 x 128256")
    assert cells[0] == "**50 %** (45-55)<br>1500 GB/s, 1.00 B<br>25 µs, 100 ms"
    assert cells[-1] == "**50 %** (45-55)<br>1500 GB/s<br>25 µs"  # the copy
    forward = row(table(found), "cross_entropy forward, bfloat16", "5 x 128256")
    assert forward[-1] == cells[-1]  # which moves as much where the contenders only read


def test_a_cpu_has_ratios_and_no_times() -> None:
    found = made_results(0, n_turns=9)
    for one in filter(lambda one: one.seconds, found.measurements):
        for i in range(5):  # the machine becomes slower by far
            one.seconds["calls"][i] = [SPEED[one.contender] * 10.0**i] * 9
    text = table(found)
    assert row(text, STEP, "5 x 128256")[-1] == "0.38"  # the limit
    assert row(text, STEP, "5 x 128256")[:3] == [
        "**0.48** (0.48-0.48)<br>1.00 B",
        "**0.43** (0.43-0.43)<br>0.90 B",
        "1<br>2.10 B",
    ]
    assert not re.search(r"\d (s|ms|µs|GB/s)\b", text)


def test_a_rehearsal_says_so_and_has_ratios() -> None:
    found = replace(made_results(0, "cuda"), device="rehearsal", rehearsed=True)
    text = table(found)
    assert "nothing about any GPU" in text
    assert not re.search(r"\d (s|ms|µs|GB/s)\b", text)


def test_the_header_says_what_it_ran_on() -> None:
    found = made_results(0, "cuda")
    found.environment["after"] = {"gpu": "a GPU", "clock_mhz": "1755"}
    found.environment["command"] = ["python", "-m", "bench", "run"]
    found.contenders["softxent-inplace"]["overwrites"] = "the logits"
    text = table(found)
    for words in (
        "# A GPU\n",
        "commit abc",
        "torch 2.13.0",
        "clock_mhz 1980",
        "afterwards: clock_mhz 1755",
        "`python -m bench run`",
        "* quack: 1.0\n",
        "* liger: not installed\n",
        "* softxent-inplace: 1.0, which writes the loss's gradient over the logits\n",
        "3000 GB/s",
    ):
        assert words in text


def test_an_error_is_said_in_words_below_its_table() -> None:
    found = made_results(0, "cuda")
    wrong = found.of(CASES[0])["quack"]
    wrong.error, wrong.seconds = "the loss is 3 where 2 | 1 is right", {}
    text = table(found)
    assert row(text, STEP, "52429 x 10")[3] == "no time <sup>1</sup>"
    assert "\n1. quack: the loss is 3 where 2 \\| 1 is right\n" in text


def test_who_does_not_do_it_at_all_has_no_column() -> None:
    text = table(made_results(0, "cuda"))
    forward = text.split("## cross_entropy forward, bfloat16\n")[1].split("\n## ")[0]
    assert "| rows x width | softxent | eager | quack | copy |" in forward
    assert "Not in this table: softxent-inplace, does not do it: there is no gradient." in forward


def test_what_was_no_graph_is_said() -> None:
    found = made_results(0, "cuda")
    one = found.of(CASES[0])["softxent"]
    del one.seconds["graph"]
    one.not_captured = "it waits for the device"
    text = table(found)
    assert "<sup>1</sup>" in row(text, STEP, "52429 x 10")[0]
    assert "\n1. no CUDA graph: it waits for the device\n" in text


def test_without_eager_there_is_no_ratio() -> None:
    found = made_results(0)
    gone = found.of(CASES[0])["eager"]
    gone.error, gone.seconds = "out of memory", {}
    text = table(found)
    assert row(text, STEP, "52429 x 10")[0] == "- <sup>1</sup><br>1.00 B"
    assert "\n1. there is no time of eager to compare with\n" in text


def test_every_line_of_a_table_has_as_many_cells() -> None:
    for device in ("cpu", "cuda"):
        for part in table(made_results(0, device)).split("\n## ")[1:]:
            assert len({line.count("|") for line in part.splitlines() if line.startswith("|")}) == 1


def test_the_widest_line_of_ten_contenders_fits_a_page() -> None:
    """Of letters on a line of a cell: GitHub shows about 140 side by side before it scrolls."""
    cells = row(table(made_results(0, "cuda")), STEP, "5 x 128256")
    assert max(len(part.replace("*", "")) for cell in cells for part in cell.split("<br>")) <= 18


def test_results_of_nothing_are_a_header() -> None:
    assert table(Results("CPU")).startswith("# CPU\n")


def test_the_sweep_has_every_kind() -> None:
    assert {case.kind for case in sweep(64)} == set(KINDS)
    assert SMALL[0] in {(case.n_rows, case.n_cols) for case in sweep(1 << 20)}


def test_times_have_a_unit() -> None:
    assert [time_of(t) for t in (1.234, 0.0215, 0.00001234)] == ["1.23 s", "21.5 ms", "12.3 µs"]


def test_words_stay_in_their_cell() -> None:
    assert one_line("two\nlines | of <b>") == "two lines \\| of &lt;b>"
