"""Devices: they create segments and export them."""
