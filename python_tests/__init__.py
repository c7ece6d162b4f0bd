"""The tests, and what they share. Run from the repository root, which is where ``python_tests`` and ``bench`` are found."""
