"""Tables of text and of Markdown, and the numbers in them."""

from lozo_kernels.model.text_table import markdown_table, mebibytes, number, text_table


def test_columns_are_as_wide_as_their_widest_cell(rng):
    words = ["", "a", "some words", "1.25", "-"]
    rows = [[rng.choice(words) for _ in range(4)] for _ in range(6)]
    left, gap = rng.randrange(5), rng.randrange(1, 5)
    lines = text_table(rows, left=left, gap=gap).split("\n")
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for line, row in zip(lines, rows, strict=True):
        assert line == line.rstrip()
        start = 0
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            shown = line.ljust(sum(widths) + 3 * gap)[start : start + width]
            assert shown == (cell.ljust(width) if i < left else cell.rjust(width))
            start += width + gap


def test_markdown():
    text = markdown_table(["", "before", "after"], [["loss", "1.5", ""], ["score", "-", "3"]], left=2)
    assert text == "| | before | after |\n|---|---|---:|\n| loss | 1.5 | |\n| score | - | 3 |"


def test_numbers():
    assert number(1.26, ".1f") == "1.3" and number(0.5, ".0%") == "50%" and number(2.0, ".1f", " ms") == "2.0 ms"
    assert number(None, ".1f", " ms") == "-" and number(float("nan"), ".1f") == "-"
    assert mebibytes(3 << 20) == "3.0" and mebibytes(1536 << 20, ",.2f", " MiB") == "1,536.00 MiB" and mebibytes(None) == "-"
