"""Checkpoint file formats: each module turns a file's header into a checked `weightd.types.FileLayout`.

The header is hostile. Every bound is checked before it is used, and every refusal is a `FormatError` that names the
file, the tensor where there is one, the fault, and what it means.
"""
