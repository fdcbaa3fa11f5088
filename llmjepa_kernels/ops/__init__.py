"""The operations: attention under the view-isolation mask, losses of last tokens and of tubes."""
