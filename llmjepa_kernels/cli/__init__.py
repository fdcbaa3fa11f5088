"""The llmjepa command."""
