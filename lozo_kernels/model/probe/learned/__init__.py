"""What a probe learned: the factors since the last merge, and how they are merged or kept."""
