"""Mapping what the daemon hands out into this process, one module per kind of device."""
