"""A model's parameters, and how they are perturbed and updated."""
