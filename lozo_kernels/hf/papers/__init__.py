"""``lozo-kernels reproduce``: what the papers report, and the same measured here."""
