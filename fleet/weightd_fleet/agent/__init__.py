"""A node's agent: serves what is published here to other nodes, and fetches from them what is missing here."""
