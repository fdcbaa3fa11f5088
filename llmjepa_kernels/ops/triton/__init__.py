"""The Triton back end of both operations."""
