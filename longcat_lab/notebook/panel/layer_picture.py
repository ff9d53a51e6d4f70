"""The middle of the architecture's picture: one layer, its parts in their order on the residual stream, and what they hold."""

from __future__ import annotations

from dataclasses import replace

from longcat_lab.blocks import MLAConfig, MoEConfig
from longcat_lab.blocks.interface import attentions_of
from longcat_lab.config import RunConfig
from longcat_lab.notebook.panel.budget_view import parts
from longcat_lab.notebook.panel.controls import ACCENT
from longcat_lab.notebook.panel.described import OWN_KIND, dense_lines, differing, mixture_lines, position_line, selection_lines
from longcat_lab.notebook.panel.drawing import Drawing
from longcat_lab.notebook.style import COLOURS, INK

WIDTH = 720.0
LEFT, LEFT_WIDE = 16.0, 138.0  # the column of tables
FRAME, FRAME_WIDE = 172.0, 392.0  # the layer
RIGHT, RIGHT_WIDE = 580.0, 134.0  # the column of head and prediction steps
STREAM, MAIN, MAIN_WIDE = FRAME + 14, FRAME + 36, 208.0  # the residual stream, and the boxes that hang on it
SIDE, SIDE_WIDE = MAIN + MAIN_WIDE + 14, 124.0  # the mixture beside them
LINE, HEAD, FOOT = 13.0, 20.0, 10.0  # heights of a line of text, of a title, and of the bar under them
GAP = 22.0
TOP = 30.0
OUTLINE = 2.5
COLOUR = {
    "token table": INK,
    "embedding": INK,
    "n-gram tables": COLOURS[1],
    "attention": COLOURS[0],
    "layers": COLOURS[0],
    "dense networks": COLOURS[5],
    "mixture": COLOURS[2],
    "head": INK,
    "mtp": COLOURS[3],
}
LAYERS = {"scmoe": "shortcut layer (scmoe)", "serial": "serial layer", "decoder": "decoder layer"}


def height(lines: list[str]) -> float:
    """Of a box with these lines."""
    return HEAD + LINE * len(lines) + FOOT


class LayerPicture:
    """What all parts of the picture know of the model, and how they draw a box."""

    def __init__(self, config: RunConfig, baseline: RunConfig | None) -> None:
        self.config, self.model = config, config.model
        self.shape = replace(self.model.shape(), sequence_length=config.data.sequence_length)
        self.parts = {part.name: part for part in parts(config)}
        self.total = sum(part.cost.params for part in self.parts.values()) or 1
        self.differs = set() if baseline is None else differing(config, baseline)
        self.sheet = Drawing(WIDTH)

    def share(self, part: str, place: int | None = None) -> float:
        """Share of the model's parameters in a part, or in the part at one place of the layers."""
        found = self.parts[part]
        return (found.cost if place is None else found.places[place]).params / self.total

    def block(
        self, x: float, y: float, w: float, title: str, lines: list[str], part: str, share: float | None = None, h: float = 0
    ) -> float:
        """A box with a title, lines and the share of the parameters that it holds; its height (at least `h`)."""
        h, colour, sheet = max(h, height(lines)), COLOUR.get(part, INK), self.sheet
        if part in self.differs:
            sheet.box(x - 3, y - 3, w + 6, h + 6, ACCENT, fill=0, weight=OUTLINE)
        sheet.box(x, y, w, h, colour)
        percent = "" if share is None else f"{share:.0%}" if share >= 0.01 or share == 0 else "<1%"
        sheet.text(x + 7, y + 14, title, size=11, bold=True, room=w - 14 - (30 if percent else 0))
        if percent:
            sheet.text(x + w - 6, y + 14, percent, end=True, dim=True)
            sheet.bar(x + 7, y + h - 8, w - 14, share, colour)
        for i, line in enumerate(lines):
            sheet.text(x + 7, y + HEAD + 8 + LINE * i, line, room=w - 14)
        return h

    def layer(self) -> float:
        """The layer in its frame; the frame's lower edge."""
        kind, count, sheet, start = self.model.layer.kind, self.model.num_layers, self.sheet, TOP + 16
        y = start + 12
        if kind == "decoder":
            y = self._decoder(y)
        elif kind in LAYERS:
            y = self._double(y, shortcut=kind == "scmoe")
        else:
            y += self._hung(y, kind, OWN_KIND, "layers", self.share("layers")) + 18
        if self._has_index():
            y = self._selectors(y + 6)
        bottom, edge = y + 14, FRAME + FRAME_WIDE
        for behind in (6, 3) if count > 1 else ():  # the layers behind this one
            sheet.line((FRAME + 8, TOP - behind), (edge + behind, TOP - behind), (edge + behind, bottom - 8), arrow=False)
        sheet.box(FRAME, TOP, FRAME_WIDE, bottom - TOP, INK, fill=0.03)
        if "layer" in self.differs:
            sheet.box(FRAME - 1, TOP - 1, FRAME_WIDE + 2, bottom - TOP + 2, ACCENT, fill=0, weight=OUTLINE)
        title = f"{count} × {LAYERS.get(kind, f'layer of kind {kind}')}, width {self.model.hidden_size:,}"
        sheet.text(FRAME + 2, TOP - 12, title, size=12, bold=True, room=FRAME_WIDE)
        sheet.line((FRAME - 10, start), (STREAM, start), (STREAM, bottom + 10), (RIGHT - 10, bottom + 10), arrow=False)
        return bottom

    def _hung(self, y: float, title: str, lines: list[str], part: str, share: float, h: float = 0) -> float:
        """A box that reads the stream and adds to it; its height."""
        h = self.block(MAIN, y, MAIN_WIDE, title, lines, part, share, h)
        self.sheet.line((STREAM, y + 9), (MAIN, y + 9))
        self.sheet.line((MAIN, y + h - 7), (STREAM + 5, y + h - 7))
        self.sheet.plus(STREAM, y + h - 7)
        return h

    def _beside(self, y: float, h: float, lines: list[str], join: float, dashed: bool = False) -> None:
        """The mixture beside the stream's boxes: it reads what the box at `y` reads, and adds to the stream at `join`."""
        h = self.block(SIDE, y, SIDE_WIDE, f"mixture: {self.model.moe.kind}", lines, "mixture", self.share("mixture"), h)
        self._experts(SIDE + 7, y + HEAD + LINE * len(lines) + 6, y + h - FOOT - 6)
        self.sheet.line((STREAM + 9, y + 9), (STREAM + 9, y - 9), (SIDE + 20, y - 9), (SIDE + 20, y), dashed=dashed)
        self.sheet.line((SIDE + 20, y + h), (SIDE + 20, join), (STREAM + 5, join), dashed=dashed)
        self.sheet.plus(STREAM, join)

    def _experts(self, x: float, y: float, bottom: float) -> None:
        """A mark for each expert, or for as many as there is no room for: filled where it computes, hollow where it costs nothing."""
        moe, step = self.model.moe, 9.0
        columns, rows = int((SIDE_WIDE - 14) // step), int((bottom - LINE - y) // step)
        if not isinstance(moe, MoEConfig) or rows < 2:
            return
        slots = moe.n_routed_experts + moe.zero_expert_num
        each = -(-slots // (columns * rows))
        real = -(-moe.n_routed_experts // each)
        for i in range(real + -(-moe.zero_expert_num // each)):
            at = (x + step * (i % columns), y + step * (i // columns))
            self.sheet.box(*at, 6.5, 6.5, COLOUR["mixture"], fill=0.75 if i < real else 0)
        if each > 1:
            self.sheet.text(x, bottom + 2, f"a mark: {each} experts", size=9, dim=True)

    def _double(self, y: float, shortcut: bool) -> float:
        model, lines, tops = self.model, mixture_lines(self.model.moe), []
        for place in range(2):
            title = f"attention {place + 1}: {model.attention.kind}"
            y += self._hung(y, title, self._attention(place), "attention", self.share("attention", place)) + GAP
            tops.append(y)
            tall = height(lines) if place and not shortcut else 0  # room for the mixture beside it
            title = f"dense {place + 1}: {model.ffn.kind}"
            y += self._hung(y, title, dense_lines(model.ffn), "dense networks", self.share("dense networks", place), tall) + GAP
        top = tops[0] if shortcut else tops[1]
        self._beside(top, y - GAP - top, lines, join=y - GAP + 12)
        return y

    def _decoder(self, y: float) -> float:
        model, lines = self.model, mixture_lines(self.model.moe)
        y += self._hung(y, f"attention: {model.attention.kind}", self._attention(0), "attention", self.share("attention", 0)) + GAP
        dense, rest = model.layer.first_k_dense_replace, model.num_layers - model.layer.first_k_dense_replace
        if dense == 0:
            return y + self._hung(y, f"mixture: {model.moe.kind}", lines, "mixture", self.share("mixture")) + GAP
        where = f"in the first {dense} of {model.num_layers} layers" if rest > 0 else "in all layers"
        lines = [*lines, f"in the other {rest}"]
        own, tall = [*dense_lines(model.ffn), where], height(lines) if rest > 0 else 0
        h = self._hung(y, f"dense: {model.ffn.kind}", own, "dense networks", self.share("dense networks", 0), tall)
        if rest > 0:
            self._beside(y, h, lines, join=y + h + 12, dashed=True)
        return y + h + GAP

    def _attention(self, place: int) -> list[str]:
        """Lines on the attention at `place` in its layer; a second one says only what is its own."""
        attention, lines = self.model.attention, []
        if not isinstance(attention, MLAConfig):
            return OWN_KIND
        rule = getattr(attention, "selection", None)
        if place == 0:
            widths = f"{attention.qk_nope_head_dim} + {attention.qk_rope_head_dim} rope, value {attention.v_head_dim}"
            lines = [f"{attention.num_attention_heads} heads: {widths}"]
            lines.append(f"latents: query {attention.q_lora_rank or 'none'}, key-value {attention.kv_lora_rank}")
            lines.append(position_line(self.model.rope))
            lines += selection_lines(attention, self.shape) if rule is not None else []
        if rule is not None and rule.uses_indexer:
            owners = self._owners()[place :: attentions_of(self.model.layer)]
            some = f"own index in {sum(owners)} of {len(owners)} layers" if any(owners) else "takes the index before it"
            lines.append(f"own index: {attention.index_n_heads} heads × {attention.index_head_dim}" if all(owners) else some)
        return lines or ["as attention 1, own weights"]

    def _has_index(self) -> bool:
        """Whether this page knows which attentions have an index."""
        uses = getattr(getattr(self.model.attention, "selection", None), "uses_indexer", False)
        return uses and isinstance(self.model.attention, MLAConfig) and self.model.layer.kind in LAYERS

    def _owners(self) -> list[bool]:
        """For each attention of the trunk, whether it has an index of its own."""
        count = self.model.num_layers * attentions_of(self.model.layer)
        return [self.model.attention.owns_index(replace(self.shape, attention_index=i)) for i in range(count)]

    def _selectors(self, y: float) -> float:
        """A mark for each attention of the model: filled where it selects, hollow where it takes another's selection."""
        owners, x = self._owners(), MAIN + 78
        self.sheet.text(MAIN, y + 8, "who selects:", dim=True)
        step = min(14.0, (FRAME + FRAME_WIDE - 12 - x) / len(owners))
        for i, owner in enumerate(owners):
            self.sheet.box(x + i * step, y, step * 0.8, 9, COLOUR["attention"], fill=1 if owner else 0)
        hollow = "" if all(owners) else "; hollow: takes the one before"
        self.sheet.text(MAIN, y + 22, f"{sum(owners)} of {len(owners)} attentions have an index{hollow}", size=9, dim=True)
        return y + 24
