"""Edgeward: services, functions, devices and networks at the edge, steered from one cloud."""

__version__ = "0.1.0"
