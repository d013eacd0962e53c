"""The fault tests use the bench of the training tests."""

from training.conftest import bench, no_report, tiny_base, with_report

__all__ = ["bench", "no_report", "tiny_base", "with_report"]
