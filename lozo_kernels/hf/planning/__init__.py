"""``lozo-kernels plan``: memory and time of training, without the weights of the model."""
