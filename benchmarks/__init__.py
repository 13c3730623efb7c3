"""How close jaxent runs to the limits of this device, and alongside whom: `python -m benchmarks`."""
