"""Fuzzing: what reads hostile bytes, as functions of bytes; a corpus of hostile inputs; mutations of them."""
