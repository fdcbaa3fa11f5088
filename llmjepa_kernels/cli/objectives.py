"""What `llmjepa train` adds to the next-token loss, and what its runs are called."""

from __future__ import annotations

OBJECTIVES = {"ntp": "NTP only", "jepa": "LLM-JEPA", "stp": "STP", "jepa+stp": "LLM-JEPA + STP"}


def directory_name(name: str) -> str:
    """Where a run of a name out of `OBJECTIVES` is kept."""
    return name.lower().replace(" + ", "-").replace(" ", "-")


def terms_of(name: str) -> set[str]:
    """The terms beside the next-token loss of a run of a name out of `OBJECTIVES`."""
    (objective,) = (key for key, known in OBJECTIVES.items() if known == name)
    return set(objective.split("+")) - {"ntp"}
