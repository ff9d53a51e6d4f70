"""Whether the figures of a page are drawn where their points are: an axis maps numbers to places by one straight rule, and its ticks,
whose labels are read from their glyphs, give the rule; where they do not, the points must at least agree on one.
"""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import numpy as np

from longcat_lab.ablation.report import content

NEAR = 0.1  # units of the picture (points) that a place may be away from where its number says
DIGITS = 1e-5  # relative, of numbers that were rounded to six digits
PARTS = {"svg", "g", "defs", "path", "use", "clipPath", "rect", "style", "metadata"}  # what a picture is made of: no text, no link
STYLE = re.compile(r"\s*\*\s*\{[\sa-z:;-]*\}\s*")  # of how lines join and end; no place, no element by its name
PREFIX = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}
LABEL = re.compile(r"([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?) ?([PTGMk]?)")
OFFSET = re.compile(r"(1e[-+]?\d+)?([-+]\d[\d.e+-]*)?")
FIRST, MINUS = 29, 0xC9C  # numbers of glyphs in DejaVu Sans, the figures' font: a letter's code less this; the minus sign
Axis = tuple[float, float]  # place = first * number + second


def check(name: str, pictures: list[str], figures: dict[str, dict[str, Any]]) -> list[str]:
    """The pictures of a page against the points of its figures: each is there once, whole, and drawn where its numbers are."""
    problems, seen, others = [], [], 0
    for picture in pictures:
        try:
            svg = ElementTree.fromstring(picture)
        except ElementTree.ParseError:
            problems.append(f"{name} holds a picture that cannot be read.")
            continue
        if odd := _foreign(svg):
            problems.append(f"{name}: a picture holds {odd}, which no figure has.")
        key = svg.get("data-figure")
        if key in figures:
            seen.append(key)
            problems += _placed(name, key, svg, figures[key])
        elif key is None and svg.get("aria-label") == content.BY_PART and not others:
            others += 1
        else:
            problems.append(f"{name} shows a picture '{key or svg.get('aria-label')}', which the run folder does not give.")
    for key in figures:
        if seen.count(key) != 1:
            problems.append(f"{name} shows the figure '{key}' {seen.count(key)} times, the run folder gives it one time.")
    return problems


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _foreign(svg: ElementTree.Element) -> str:
    """What is in a picture that a drawing of lines and glyphs has not; empty where there is nothing."""
    for element in svg:
        if _tag(element) == "metadata":
            continue
        for each in element.iter():
            if _tag(each) not in PARTS:
                return f"an element '{_tag(each)}'"
            if _tag(each) == "style" and not STYLE.fullmatch(each.text or ""):
                return "a style of its own"
            if _tag(each) != "style" and (each.text or "").strip():
                return f"the words '{' '.join((each.text or '').split())[:40]}'"
            if (each.tail or "").strip():
                return f"the words '{' '.join((each.tail or '').split())[:40]}'"
    return ""


def _placed(name: str, key: str, svg: ElementTree.Element, figure: dict[str, Any]) -> list[str]:
    """Each series of one figure: as many points as it has numbers, where its axes put them."""
    parents = {child: parent for parent in svg.iter() for child in parent}
    groups = {element.get("id", ""): element for element in svg.iter() if _tag(element) == "g"}
    drawn: dict[ElementTree.Element, list[tuple[int, np.ndarray, dict[str, Any]]]] = {}
    for index, series in enumerate(figure["series"]):
        group = groups.get(f"lab-{key}-{index}")
        places = np.array(_places(group) if group is not None else []).reshape(-1, 2)
        if len(places) != len(series["x"]):
            return [f"{name}: the figure '{key}' has {len(places)} points of {_named(series)}, the run folder gives {len(series['x'])}."]
        axes, above = None, group
        while above is not None and above is not svg:
            if set(above.keys()) - {"id"}:
                return [f"{name}: the figure '{key}' moves or hides {_named(series)}."]
            axes = above if axes is None and re.fullmatch(r"axes_\d+", above.get("id", "")) else axes
            above = parents.get(above)
        if axes is not None and len(places):
            drawn.setdefault(axes, []).append((index, places, series))
    problems = []
    for axes, those in drawn.items():
        for side, letter in enumerate("xy"):
            if not all(len(series[letter]) == len(places) for _, places, series in those):
                continue  # a row of its own: its height means nothing
            numbers = [np.array(series[letter], dtype=float) for _, _, series in those]
            at = [places[:, side] for _, places, _ in those]
            rule = _by_ticks(axes, side) or _by_points(np.concatenate(numbers), np.concatenate(at))
            far = [np.abs(rule[0] * n + rule[1] - p) for n, p in zip(numbers, at, strict=True)]
            room = NEAR + abs(rule[0]) * DIGITS * max(float(np.abs(n).max()) for n in numbers)
            odd = [series for each, (_, _, series) in zip(far, those, strict=True) if not each.max() <= room]
            upright = rule[0] * (1 if side == 0 else -1) >= 0
            if odd or not upright:
                problems.append(f"{name}: the figure '{key}' draws {_named(odd[0] if odd else those[0][2])} where its numbers are not.")
            elif side:
                problems += _ranges(name, key, groups, those, rule)
    return list(dict.fromkeys(problems))


def _ranges(name: str, key: str, groups: dict[str, ElementTree.Element], those: list[Any], rule: Axis) -> list[str]:
    """Bands and strokes from lowest to highest: a corner at each end."""
    problems = []
    for index, places, series in those:
        for part in ("band", "range"):
            group = groups.get(f"lab-{key}-{index}-{part}")
            if group is None or "low" not in series:
                continue
            corners = _corners(group)
            for side in ("low", "high"):
                wanted = np.stack([places[:, 0], rule[0] * np.array(series[side], dtype=float) + rule[1]], axis=1)
                room = NEAR + abs(rule[0]) * DIGITS * float(np.abs(series[side]).max())
                far = np.abs(wanted[:, None] - corners[None]).max(axis=2).min(axis=1) if len(corners) else np.array([np.inf])
                if not far.max() <= room:
                    problems.append(f"{name}: the figure '{key}' draws the range of {_named(series)} where its numbers are not.")
    return problems


def _named(series: dict[str, Any]) -> str:
    return series["arm"] + (f", seed {series['seed']}" if "seed" in series else "")


def _path(text: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", text)]


def _href(element: ElementTree.Element) -> str:
    return next((value for key, value in element.items() if key.rpartition("}")[2] == "href"), "")


def _places(group: ElementTree.Element) -> list[tuple[float, float]]:
    """The corners of a line, or the places of its markers where it has none."""
    corners = [corner for child in group if _tag(child) == "path" for corner in _path(child.get("d", ""))]
    marks = [(float(use.get("x", "nan")), float(use.get("y", "nan"))) for use in group.iter() if _tag(use) == "use"]
    return corners if len(corners) > len(marks) else marks


def _corners(group: ElementTree.Element) -> np.ndarray:
    """Corners of everything in a group, those of a shape where it is used included."""
    shapes = {path.get("id"): _path(path.get("d", "")) for path in group.iter() if _tag(path) == "path"}
    found = [corner for path in group.iter() if _tag(path) == "path" and path.get("id") is None for corner in _path(path.get("d", ""))]
    for use in group.iter():
        if _tag(use) == "use":
            x, y = float(use.get("x", 0)), float(use.get("y", 0))
            found += [(x + a, y + b) for a, b in shapes.get(_href(use).lstrip("#"), [])]
    return np.array(found).reshape(-1, 2)


def readings(group: ElementTree.Element) -> tuple[str, str]:
    """The text of a label, which is drawn as glyphs: if they are named by their number in the font, and if by their character."""
    codes = [_href(use).rpartition("-")[2] for use in group.iter() if _tag(use) == "use"]
    known = [int(code, 16) for code in codes if re.fullmatch(r"[0-9a-f]{1,5}", code)]
    by_number = "".join("-" if code == MINUS else chr(code + FIRST) for code in known)
    return by_number.strip(), "".join(map(chr, known)).replace("−", "-").strip()


def _by_ticks(axes: ElementTree.Element, side: int) -> Axis | None:
    """The rule of an axis by its ticks and their labels; None where they give none, or are counted from an offset."""
    both = [each for each in axes if re.fullmatch(r"matplotlib\.axis_\d+", each.get("id", ""))]  # x, then y; counted over the figure
    known = []
    for group in both[side] if len(both) == 2 else ():
        if re.fullmatch(r"[xy]tick_\d+", group.get("id", "")):
            label = next((found for words in readings(group) if (found := LABEL.fullmatch(words))), None)
            mark = next((use for use in group.iter() if _tag(use) == "use" and use.get("xy"[side]) is not None), None)
            if label is None or mark is None:
                return None
            known.append((float(label[1]) * PREFIX[label[2]], float(mark.get("xy"[side], "nan"))))
        elif any(words and OFFSET.fullmatch(words) for words in readings(group)):
            return None
    if len({number for number, _ in known}) < 2:
        return None
    numbers, places = np.array(known).T
    rule = _by_points(numbers, places)
    return rule if np.abs(rule[0] * numbers + rule[1] - places).max() < NEAR else None


def _by_points(numbers: np.ndarray, places: np.ndarray) -> Axis:
    """The straight rule that fits best."""
    if np.ptp(numbers) == 0:
        return 0.0, float(np.median(places))
    middle, scale = numbers.mean(), np.ptp(numbers)
    slope, rest = np.polyfit((numbers - middle) / scale, places, 1)
    return float(slope / scale), float(rest - slope * middle / scale)
