"""Optimizers that descend along the natural gradient, and what they have learned of the curvature for pruning."""

from fishleg_ext.optim.fishleg import FishLeg
from fishleg_ext.optim.shared import OptimizerCurvature

__all__ = ["FishLeg", "OptimizerCurvature"]
