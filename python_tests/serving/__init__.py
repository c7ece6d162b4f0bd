"""Tests of ``lozo_kernels.vllm`` on real engines: ``make test-vllm`` runs them in an environment of their own."""
