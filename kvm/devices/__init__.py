"""The port and MMIO bus, and the devices that sit on it."""
