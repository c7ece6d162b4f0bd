"""How a probed model evaluates: what is put into its modules, and what they compute."""
