"""Numerical kernels, each with a plain reference beside it. Torch only; imports nothing else of ours."""
