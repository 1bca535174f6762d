"""A soak: clients, files and signals at random against one daemon, with every byte compared, for as long as one likes.

`python -m soak --seconds 60`; `make soak` says so. The seed decides every choice, but not when the machine carries it
out. A finding is anything that must not happen: a wrong byte, content that was never written, an error that speaks of a
bug, a daemon that ends by itself, or anything left at the end that was not there at the start.
"""
