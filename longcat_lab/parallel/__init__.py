"""Meshes, how each block is placed on them, collectives, checkpoints, the planner."""
