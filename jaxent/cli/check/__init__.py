"""`jaxent check`: what the losses return on this device, against their definitions."""
