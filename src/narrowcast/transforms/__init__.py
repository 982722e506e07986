"""Rewrites of weights that keep the float function and make it easier to quantize. Sees tensors, never models."""

from narrowcast.transforms.fold_batchnorm import BatchNormStatistics, fold_batchnorm

__all__ = ["BatchNormStatistics", "fold_batchnorm"]
