"""Calibration: what a model's keys and values look like, and the transform, groups, units and clip factors that follow."""
