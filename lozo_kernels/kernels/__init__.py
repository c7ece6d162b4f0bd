"""The ops: the noise, the reference, the checks of arguments, and the backends that compute them."""
