"""Draws the figures of the documentation from a real packed batch.

python docs/figures/draw.py
"""

from __future__ import annotations

from pathlib import Path

from llmjepa_kernels import PackedBatch, llm_jepa_example, pack

HERE = Path(__file__).parent
CELL = 22
PRIME = "\u2032"
INK, FAINT, PAPER = "#20303c", "#c9d3da", "#ffffff"
HEADER, TEXT, CODE, PRED, VIEW = "#7f8c99", "#2f7fb8", "#d9822b", "#8e5bb5", "#3f9b5f"
# (name, letter, colour) of the segments of the two examples below, in row order.
SEGMENTS = [
    ("header", "S", HEADER),
    ("Text", "T", TEXT),
    ("Code", "C", CODE),
    ("PRED", "P", PRED),
    (f"Text{PRIME}", "t", TEXT),
    (f"Code{PRIME}", "c", CODE),
    (f"PRED{PRIME}", "p", PRED),
    ("view", "V", VIEW),
    (f"view{PRIME}", "v", VIEW),
]
PARENTS = [None, 0, 1, 1, 0, 4, 4, None, None]
PAIRS = [(3, 7), (6, 8)]  # predictor and target, by segment


def batch_and_runs() -> tuple[PackedBatch, list[tuple[int, int]]]:
    """Two examples that share a header of three tokens; where each segment begins and ends."""
    lengths = [3, 3, 3, 1, 2, 2, 1, 2, 2]
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    header, pred = [1, 2, 3], [90]
    batch = pack(
        [
            llm_jepa_example([*header, 10, 11, 12], [20, 21, 22], [30, 31], pred_ids=pred),
            llm_jepa_example([*header, 40, 41], [50, 51], [60, 61], pred_ids=pred),
        ]
    )
    expected = [1, 2, 3, 10, 11, 12, 20, 21, 22, 90, 40, 41, 50, 51, 90, 30, 31, 60, 61]
    found = batch["input_ids"][0].tolist()
    if found != expected:
        raise RuntimeError(f"the row must be {expected} for these labels, got {found}")
    return batch, list(zip([0, *ends], ends, strict=False))


def svg(width: float, height: float, title: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img" '
        'font-family="ui-sans-serif, system-ui, Helvetica, Arial, sans-serif" font-size="12">'
    )
    paper = f'<rect width="{width:g}" height="{height:g}" rx="6" fill="{PAPER}"/>'
    return "\n".join([head, f"<title>{title}</title>", paper, *parts, "</svg>\n"])


def box(x: float, y: float, width: float, height: float, colour: str, opacity: float = 1) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" '
        f'fill="{colour}" fill-opacity="{opacity:g}"/>'
    )


def text(x: float, y: float, words: object, colour: str = INK, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def token(x: float, y: float, letter: str, colour: str) -> str:
    inner = text(x + CELL / 2, y + CELL / 2 + 4, letter, PAPER)
    return box(x + 1, y + 1, CELL - 2, CELL - 2, colour) + inner


def draw_mask() -> str:
    """Who sees whom, with visible_until below: a column is full from its own row to that one."""
    batch, runs = batch_and_runs()
    visible_until = batch["visible_until"][0].tolist()
    seq, left, top = len(visible_until), 100, 62
    owner = [s for s, (start, end) in enumerate(runs) for _ in range(start, end)]
    parts = [
        text(left + seq * CELL / 2, 20, "key j"),
        text(14, top - 14, "query i", anchor="start"),
    ]
    for i in range(seq):
        for j in range(seq):
            x, y = left + j * CELL, top + i * CELL
            if j <= i < visible_until[j]:
                parts.append(box(x + 1, y + 1, CELL - 2, CELL - 2, SEGMENTS[owner[j]][2], 0.85))
            else:
                parts.append(box(x + 1, y + 1, CELL - 2, CELL - 2, FAINT, 0.35))
    for s, (start, end) in enumerate(runs):
        name, letter, colour = SEGMENTS[s]
        parts.append(text(left - 32, top + (start + end) / 2 * CELL + 4, name, colour, "end"))
        for i in range(start, end):
            parts.append(token(left + i * CELL, top - CELL - 6, letter, colour))
            parts.append(token(left - CELL - 6, top + i * CELL, letter, colour))
        if start:
            for x1, y1, x2, y2 in (
                (left, top + start * CELL, left + seq * CELL, top + start * CELL),
                (left + start * CELL, top, left + start * CELL, top + seq * CELL),
            ):
                parts.append(f'<path d="M{x1} {y1}L{x2} {y2}" stroke="{FAINT}"/>')
    bottom = top + seq * CELL + 18
    parts.append(text(left - 10, bottom, "visible_until", anchor="end"))
    parts += [
        text(left + j * CELL + CELL / 2, bottom, until) for j, until in enumerate(visible_until)
    ]
    return svg(left + seq * CELL + 16, bottom + 14, "The mask of a packed row", parts)


def draw_row() -> str:
    """The forest of segments, the row it is stored as, and the pairs that are compared."""
    batch, runs = batch_and_runs()
    left, cell = 20, 40
    levels: list[int] = []
    for parent in PARENTS:
        levels.append(0 if parent is None else levels[parent] + 1)
    top, step, height = 44, 58, 26
    row_y = top + 3 * step + 26
    centre = [left + (start + end) / 2 * cell for start, end in runs]
    parts = [text(left, 22, "two examples as a forest of segments", anchor="start")]
    for s, parent in enumerate(PARENTS):
        if parent is not None:
            y1, y2 = top + levels[parent] * step + height, top + levels[s] * step
            parts.append(
                f'<path d="M{centre[parent]:g} {y1}C{centre[parent]:g} {y1 + 20} {centre[s]:g} '
                f'{y2 - 20} {centre[s]:g} {y2}" fill="none" stroke="{FAINT}" stroke-width="2"/>'
            )
    for s, (start, end) in enumerate(runs):
        name, letter, colour = SEGMENTS[s]
        width = (end - start) * cell - 2
        y = top + levels[s] * step
        parts.append(box(centre[s] - width / 2, y, width, height, colour))
        parts.append(text(centre[s], y + 17, name, PAPER))
        for i in range(start, end):
            x = left + i * cell
            parts.append(box(x + 1, row_y, cell - 2, height, colour))
            parts.append(text(x + cell / 2, row_y + 17, letter, PAPER))
    seq = runs[-1][1]
    parts.append(text(left, row_y - 10, "the row, depth first", anchor="start"))
    for line, key in ((1, "position_ids"), (2, "visible_until")):
        y = row_y + height + 18 * line
        parts += [text(left + (i + 0.5) * cell, y, n) for i, n in enumerate(batch[key][0].tolist())]
        parts.append(text(left + seq * cell + 10, y, key, anchor="start"))
    base = row_y + height + 46
    for predictor, target in PAIRS:
        x1 = left + (runs[predictor][1] - 0.5) * cell
        x2 = left + (runs[target][1] - 0.5) * cell
        drop = base + 34
        parts.append(
            f'<path d="M{x1:g} {base}C{x1:g} {drop} {x2:g} {drop} {x2:g} {base}" fill="none" '
            f'stroke="{PRED}" stroke-width="2"/>'
        )
    parts.append(
        text(left, base + 26, "view_pairs: last hidden states that are compared", PRED, "start")
    )
    return svg(left + seq * cell + 110, base + 42, "A packed row", parts)


def main() -> None:
    (HERE / "mask.svg").write_text(draw_mask(), encoding="utf-8")
    (HERE / "row.svg").write_text(draw_row(), encoding="utf-8")


if __name__ == "__main__":
    main()
