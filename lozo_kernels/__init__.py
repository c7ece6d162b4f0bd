"""lozo"""
from . import backends
