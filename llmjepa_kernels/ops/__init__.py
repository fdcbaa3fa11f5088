"""The operations: attention under the view-isolation mask, and the loss of last tokens."""
