"""A batch driven by hand, under the name by which scripts outside ndcheck import it."""

from ndcheck.samplers.local.batch import ExactBatch

__all__ = ["ExactBatch"]
