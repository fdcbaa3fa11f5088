"""The choice among what could run, timed once and kept."""

import json

import pytest

from llmjepa_kernels.ops import autotune

pytest.importorskip("triton")  # names the cache


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A cache of its own, and a clock that runs a candidate and takes its word for the time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_device_name", lambda: "device")
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.setattr(autotune, "_time", lambda run: run())


def never():
    raise AssertionError("timed again")


def test_choices_made_while_others_are_timed_are_kept(clock):
    """A back end being timed chooses the tiles of its kernels, and another process writes too."""

    def back_end():
        assert autotune.fastest("tiles", {"small": lambda: 2.0, "large": lambda: 1.0}) == "large"
        return 3.0

    assert autotune.fastest("back end", {"this": back_end, "that": lambda: 4.0}) == "this"
    autotune._chosen.clear()  # as another process would start
    assert autotune.fastest("tiles", {"small": never, "large": never}) == "large"
    assert autotune.fastest("back end", {"this": never, "that": never}) == "this"


def test_neither_a_bad_candidate_nor_an_unwritable_cache_ends_the_run(clock, monkeypatch, tmp_path):
    def bad():
        raise RuntimeError("out of resource")

    blocked = tmp_path / "file"
    blocked.write_text("no folder can be made here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    autotune._warn.cache_clear()
    with pytest.warns(RuntimeWarning) as warned:
        assert autotune.fastest("tiles", {"bad": bad, "good": lambda: 1.0}) == "good"
    said = " ".join(str(warning.message) for warning in warned)
    assert "bad, which failed" in said
    assert "not kept for other processes" in said


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_cache_is_replaced(clock, tmp_path, content):
    path = tmp_path / "llmjepa_kernels" / "autotune.json"
    path.parent.mkdir()
    path.write_text(content)
    assert autotune.fastest("tiles", {"small": lambda: 2.0, "large": lambda: 1.0}) == "large"
    assert list(json.loads(path.read_text()).values()) == ["large"]
