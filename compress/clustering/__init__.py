"""Weights shared by codebooks: each becomes an index into a small one.

`method` has the layers, `kmeans` finds the centroids.
"""

from compress.clustering.method import ClusteredConv, ClusteredLinear, Config, apply, freeze

__all__ = ["ClusteredConv", "ClusteredLinear", "Config", "apply", "freeze"]
