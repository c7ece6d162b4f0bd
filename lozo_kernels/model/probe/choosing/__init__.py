"""On which side of each weight a probe enters: what is measured, chosen and checked before the first step."""
