"""Checks of gradients and of inputs."""
