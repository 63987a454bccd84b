"""Wrappers, one file each: what can be put around any mechanism, `NAME(...)+WRAPPER(...)`."""
