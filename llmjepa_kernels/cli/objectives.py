"""What `llmjepa train` adds to the next-token loss, and what its runs are called."""

from __future__ import annotations

TITLES = {"jepa": "LLM-JEPA", "stp": "STP", "sigreg": "SIGReg", "vicreg": "VICReg"}
_COMBINED = (
    ("jepa",),
    ("stp",),
    ("jepa", "stp"),
    *((*terms, name) for terms in (("jepa",), ("jepa", "stp")) for name in ("sigreg", "vicreg")),
)
OBJECTIVES = {"ntp": "NTP only"} | {
    "+".join(terms): " + ".join(TITLES[term] for term in terms) for terms in _COMBINED
}


def directory_name(name: str) -> str:
    """Where a run of a name out of `OBJECTIVES` is kept."""
    return name.lower().replace(" + ", "-").replace(" ", "-")


def terms_of(name: str) -> set[str]:
    """The terms beside the next-token loss of a run of a name out of `OBJECTIVES`."""
    (objective,) = (key for key, known in OBJECTIVES.items() if known == name)
    return set(objective.split("+")) - {"ntp"}
