"""Measurements around the package: what needs the repository, many processes, or minutes."""
