"""How a probed model evaluates: the forwards that replace those of its modules."""
