"""Architectures and loading of base models."""
