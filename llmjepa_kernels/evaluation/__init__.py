"""Evaluation: answers, the rules that judge them, and the geometry of the views."""
