"""Devices: where segments come from and how they are handed out."""
