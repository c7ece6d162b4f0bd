"""Scripts that make the evidence in ``bench/results``. Each runs from the repository root: ``python -m bench.NAME``."""
