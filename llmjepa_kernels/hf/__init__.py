"""Hugging Face models: loading them, and patching them to attend through view_attention."""
