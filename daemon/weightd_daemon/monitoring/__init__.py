"""Observation of the daemon: events and their log lines, metrics, and the pages that monitors read."""
