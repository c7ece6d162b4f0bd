"""The known answers of the noise contract (docs/noise.md). ``python -m python_tests.noise_file`` writes their text form."""

import json
from pathlib import Path

FILE = Path(__file__).parent / "noise_vectors.json"
TEXT = FILE.with_suffix(".txt")
DOCUMENT = json.loads(FILE.read_text(encoding="utf-8"))
VECTORS = DOCUMENT["vectors"]


def lines():
    """The text form: a line for each value."""
    yield f"# lozo_kernels noise vectors, format {DOCUMENT['format']}, noise version {DOCUMENT['noise_version']}"
    yield "# stream seed tensor_id draw direction position k bits"
    for vector in VECTORS:
        arguments = vector["arguments"]
        first, direction = arguments.get("row_offset", arguments.get("offset", 0)), arguments.get("direction", 0)
        for i, bits in enumerate(vector["values"]):
            stream, part, at, k = _place(vector["function"], arguments, i)
            where = (arguments["seed"], arguments["tensor_id"], arguments["draw"], direction + part, first + at, k)
            yield f"{stream} {' '.join(map(str, where))} {bits:08x}"


def _place(function, arguments, i):
    """The stream of a vector's value, and its part, row or element, and column."""
    if function == "factor":
        return arguments["stream"], 0, *divmod(i, arguments["rank"])
    if function == "part_signs":
        return arguments["stream"].replace(" ", "_"), *divmod(i, arguments["count"]), 0
    if function == "dense":
        return "signs" if arguments.get("law") == "rademacher" else "Z", 0, i, 0
    return "rounding", 0, i, 0


if __name__ == "__main__":
    TEXT.write_text("\n".join(lines()) + "\n", encoding="utf-8")
