"""Frameworks' own loading, on shared memory: a module for each framework."""
