"""Meshes: how arrays are split over devices, and reductions along the class axis."""
