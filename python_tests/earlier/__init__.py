"""Files that an earlier version wrote, and what wrote them."""
