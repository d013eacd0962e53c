"""Measure a model: losses, scores on generations, acceptance suites, and paired comparison."""
