"""A fleet of nodes with weightd: places checkpoints by the bytes that are there already, and publishes them."""
