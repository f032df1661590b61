"""A model of the package dualform (`pip install dualform`), for trust_remote_code=True where nobody has imported it."""
