"""What a probe learned: factors between merges, and what becomes of them."""
