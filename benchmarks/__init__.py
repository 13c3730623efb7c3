"""How close jaxent runs to the limits of this device, and beside whom: `python -m benchmarks`."""
