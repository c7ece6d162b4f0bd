"""Models and image processors of transformers, opened and loaded with messages that help."""
