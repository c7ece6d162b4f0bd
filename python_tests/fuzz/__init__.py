"""The fuzzers.

``python -m python_tests.fuzz.api`` generates calls of the public API. The others try the journal, and are run by
``python -m bench.journal`` with ``--fuzz``, ``--kills`` or ``--atheris``. All run from the repository root.
"""
