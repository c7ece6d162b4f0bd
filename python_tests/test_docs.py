"""What the pages say of the repository is so: links, files, names of Python, the map of the code, figures and pictures."""

import importlib
import json
import re
import struct
from pathlib import PurePosixPath

import pytest
from hf_helpers import REPO
from pages import PAGES, anchors, indented, links, quoted

from bench import passes
from bench.sass import summary

RESULTS = REPO / "bench" / "results"
GUIDES = [name for name in PAGES if name != "CHANGELOG.md"]  # which names what was before


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for link in links(name):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = (REPO / name).parent / target if target else REPO / name
        assert path.exists(), link
        page = str(path.resolve().relative_to(REPO))
        assert not anchor or anchor in anchors(page), link


FILE = re.compile(r"(lozo_kernels|bench|python_tests|csrc|docs|examples)(/[\w.*-]+)+/?")


@pytest.mark.parametrize("name", GUIDES)
def test_files_that_are_named_exist(name):
    for text in quoted(name) + indented(name):
        for found in FILE.finditer(text):
            path = found.group().rstrip("/.")
            if not re.search(r"[A-Z]{4}", path):  # bench/results/NAME
                assert list(REPO.glob(path)), text


@pytest.mark.parametrize("name", GUIDES)
def test_names_of_python_exist(name):
    """``lozo_kernels.hf.plan`` is a module, or something in one; so is each import of a block (which other tests run)."""
    for dotted in re.findall(r"\blozo_kernels(?:\.\w+)+", PAGES[name]):
        found = importlib.import_module("lozo_kernels")
        for word in dotted.split(".")[1:]:
            if not hasattr(found, word):
                importlib.import_module(f"{found.__name__}.{word}")
            found = getattr(found, word)


def test_the_map_is_the_directory():
    """CONTRIBUTING lists errors.py and every folder of the package with its folders, and nothing that is not there."""
    text = PAGES["CONTRIBUTING.md"].split("## The map")[1].split("## What is promised")[0]
    package = REPO / "lozo_kernels"
    folder, listed = None, set()
    for line in re.findall(r"^    ( *\S.*)$", text, re.MULTILINE):
        indent = len(line) - len(line.lstrip())
        assert re.search(r"\S {2,}\S|/$", line), f"no word on {line}"
        for entry in re.split(r" {2,}", line.strip())[0].split(", "):
            if indent == 0:
                folder = None
                assert (REPO / entry).is_dir(), entry
                continue
            if indent == 2:
                folder = package / entry
            path = folder if indent == 2 else folder / entry
            assert path.exists(), entry
            listed.add(path.relative_to(package).as_posix())
    top = {path.name for path in package.iterdir() if path.is_dir() and (path / "__init__.py").is_file()} | {"errors.py"}
    inner = {
        f"{outer.name}/{path.name}"
        for outer in map(package.joinpath, top)
        if outer.is_dir()
        for path in outer.iterdir()
        if (path / "__init__.py").is_file()
    }
    assert top | inner <= listed


def png_size(path):
    return struct.unpack(">II", path.read_bytes()[16:24])


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.png")), ids=lambda path: path.name)
def test_pictures_are_legible_at_the_width_of_a_page(path):
    """Each is drawn from a document beside it, shown on a page, no wider than what a page shows and no longer than a screen."""
    assert any(path.stem.startswith(document.stem) for document in RESULTS.glob("*.json"))
    assert any(PurePosixPath(link).name == path.name for name in PAGES for link in links(name))
    width, height = png_size(path)
    assert width <= 1300 and height <= 1.4 * width


def test_every_result_is_on_a_page():
    text = "\n".join(PAGES.values())
    assert [path.name for path in RESULTS.glob("*.json") if path.name not in text] == []


def test_no_command_of_a_result_names_a_folder_of_one_machine():
    commands = {path.name: str(json.loads(path.read_text(encoding="utf-8")).get("command")) for path in RESULTS.glob("*.json")}
    assert {name: command for name, command in commands.items() if re.search(r"(^|[ =])/", command)} == {}


def test_measurements_of_the_readme_name_their_file_and_machine():
    table = PAGES["README.md"].split("## What was measured")[1].split("\n\n")[1].split("\n")[2:]
    assert len(table) == 6
    for row in table:
        *_, file, machine = (cell.strip() for cell in row.strip("|").split("|"))
        document = json.loads((REPO / re.fullmatch(r"\[[\w.]+\]\((bench/results/\w+\.json)\)", file).group(1)).read_text())
        assert machine.startswith(f"{document['threads']} thread") and document["cpu"] in machine
        assert document["commit"] and document["command"] and document["date"]
    assert "No GPU figure in this repository is a measurement" in PAGES["README.md"]
    assert "No GPU figure here is a measurement" in PAGES["docs/gpu.md"]


def rows_of(table, start):
    return [line for line in PAGES[table].splitlines() if line.startswith(start)]


def test_shares_by_instruction_set_follow_from_their_files():
    found = [result(f"perturb_rank4_{isa}")["details"] for isa in ("avx512", "avx2")]
    methods = {
        "LOZO": "lowrank_update",
        "LOZO-M": "lowrank_momentum",
        "GRZO": "lowrank_signed_update",
        "MeZO with random signs": "dense_update_signs",
    }
    for method, op in methods.items():
        for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
            ratios = [next(d["ratios"] for d in details if (d["op"], d["dtype"]) == (op, dtype)) for details in found]
            cells = [f"{r['floor']:.2f}" for r in ratios] + [f"{r['addmm']:.1f}" if "addmm" in r else "-" for r in ratios]
            assert f"| {method}, {short} | {' | '.join(cells)} |" in PAGES["docs/benchmarks.md"]


@pytest.mark.parametrize("case", ("llama", "demo", "minilm"))
def test_the_table_of_rules_is_that_of_its_file(case):
    assert passes.table(result(f"passes_{case}")["rules"]) in PAGES["docs/benchmarks.md"]


@pytest.mark.parametrize(("dtype", "short"), (("bfloat16", "bf16"), ("float32", "fp32")))
def test_the_table_of_steps_follows_from_its_file(dtype, short):
    details = {(d["method"], d["placement"], d["tokens"]): d for d in result("step_cpu")["details"] if d["dtype"] == dtype}
    for tokens in (16, 32, 64, 128, 512):
        ours = [details["lozo", placement, tokens] for placement in ("inplace", "probe", "batched")]
        mezo = details["mezo", "inplace", tokens]
        exact = [d["times_two_forwards"] for d in ours] + [ours[2]["together_to_two_forwards"], mezo["times_two_forwards"]]
        exact += [1 + d["reference_overhead"] for d in (ours[0], mezo)]
        (row,) = rows_of("docs/benchmarks.md", f"| {tokens}, {short} |")
        for cell, value in zip(row.strip("|").split("|")[1:], exact, strict=True):
            assert abs(float(cell) - value) <= 0.5001 * 10 ** -len(cell.strip().split(".")[1])


def test_shares_of_the_floor_follow_from_their_file():
    ratios = {}
    for d in result("perturb_cpu")["details"]:
        if d["op"] == "lowrank_update" and d["shape"] != "opt-125m":
            ratios.setdefault((d["dtype"], "1 to 2" if d["rank"] < 4 else str(d["rank"])), []).append(d["ratios"])
    for (dtype, rank), found in ratios.items():
        (row,) = rows_of("docs/benchmarks.md", f"| LOZO, {'bf16' if dtype == 'bfloat16' else 'fp32'}, rank {rank} |")
        for cell, key, digits in zip(row.split("|")[2:5], ("floor", "addmm", "reference"), (2, 1, 0), strict=True):
            low, high = min(r[key] for r in found), max(r[key] for r in found)
            ends = [f"{x:.{digits}f}" for x in (low, high)]
            assert cell.strip() == " - ".join(dict.fromkeys(ends))


def test_peaks_of_memory_follow_from_their_file():
    names = {"LOZO": "lozo", "LOZO-M": "lozo-m", "MeZO": "mezo", "MeZO-M": "mezo-m", "SubZero": "subzero", "FT-LoRA": "ft-lora"}
    names |= {"FT, SGD": "ft-sgd", "Forward-Grad": "forward-grad", "FT, AdamW": "ft-adamw"}
    found = {row["method"]: row["over_inference"] for row in result("memory_table_cpu")["rows"]}
    lines = PAGES["docs/benchmarks.md"].splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith("| LOZO | LOZO-M | MeZO |")]
    heads, cells = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (start, start + 2))
    assert set(heads) == set(names)
    for head, cell in zip(heads, cells, strict=True):
        assert cell == f"{found[names[head]]:.{len(cell.split('.')[1])}f}"


def test_figures_of_rounding_follow_from_their_file():
    curves = {(c["dtype"], c["placement"]): c for c in result("probe_drift")["curves"]}
    text = PAGES["README.md"]
    for placement in ("in place", "published", "probe, activation", "probe, scratch"):
        assert f"{100 * curves['bfloat16', placement]['off_at_end']:.1f}" in text
    coverage = result("coverage")["rows"]
    assert f"{len({row['name'] for row in coverage})} architectures" in text


def test_predictions_for_gpus_follow_from_their_files():
    """Of the oldest and the newest Triton: the whole table is printed from them."""
    newest, oldest = result("sass_aot"), result("sass_aot_oldest")
    assert oldest["versions"]["triton"].startswith("3.6.")
    assert all(row["triton"] in (None, found["versions"]["triton"]) for found in (newest, oldest) for row in found["rows"])
    assert summary.summary([newest, oldest]) in PAGES["docs/gpu.md"]
