"""The architecture as one picture that follows the configuration: what there is, how it is connected, and who holds the parameters."""

from __future__ import annotations

from longcat_lab.blocks import MoEConfig, MTPConfig, TokenEmbeddingConfig
from longcat_lab.blocks.ngram_embedding.hash_config import HashSettings
from longcat_lab.config import RunConfig
from longcat_lab.notebook.panel.budget_view import human, unknown
from longcat_lab.notebook.panel.controls import ACCENT
from longcat_lab.notebook.panel.described import OWN_KIND, at_input, mtp_lines, ngram_lines
from longcat_lab.notebook.panel.drawing import Drawing
from longcat_lab.notebook.panel.layer_picture import (
    COLOUR,
    FRAME,
    HEAD,
    LEFT,
    LEFT_WIDE,
    LINE,
    OUTLINE,
    RIGHT,
    RIGHT_WIDE,
    TOP,
    WIDTH,
    LayerPicture,
    height,
)
from longcat_lab.notebook.style import INK

ORDERS_SHOWN = STEPS_SHOWN = 5
LEGEND_FROM = 0.0005  # share of the parameters


def architecture_svg(config: RunConfig, baseline: RunConfig | None = None) -> str:
    """The architecture as SVG text, 720 wide; parts that differ from `baseline` are outlined.

    Kinds that this package does not know are plain boxes with their name.
    """
    try:
        return _Picture(config, baseline).drawn()
    except Exception as error:  # a block that is being written may raise anything; the knobs must go on turning
        sheet, said = Drawing(WIDTH), f"The architecture is not drawn: {unknown(error)}"
        sheet.text(LEFT, TOP, said, room=WIDTH - 2 * LEFT)
        return sheet.svg(said)


class _Picture(LayerPicture):
    def drawn(self) -> str:
        bottom = self.layer()
        bottom = max(bottom + 10, self.tables(), self.ends(bottom))
        self.shares(bottom + 12)
        return self.sheet.svg(self.sentence())

    def tables(self) -> float:
        """Input, token table and n-gram tables on the left; the lower edge."""
        sheet, model, read, bus, y = self.sheet, self.model, LEFT - 10, LEFT + LEFT_WIDE + 8, TOP - 4
        if "input" in self.differs:
            sheet.box(read - 4, y - 14, LEFT_WIDE + 12, 20, ACCENT, fill=0, weight=OUTLINE)
        sheet.text(read, y, f"tokens, {self.config.data.sequence_length:,} a sequence", room=LEFT_WIDE)
        known, part, y = isinstance(model.embedding, TokenEmbeddingConfig), next(iter(self.parts)), y + 22
        lines = [f"{model.vocab_size:,} rows × {model.hidden_size:,}"] if known else OWN_KIND
        h = self.block(LEFT, y, LEFT_WIDE, part if known else model.embedding.kind, lines, part, self.share(part))
        sheet.line((read, TOP + 2), (read, y + 20), (LEFT, y + 20))
        sheet.line((LEFT + LEFT_WIDE, y + 20), (bus, y + 20), (bus, TOP + 16), (FRAME - 10, TOP + 16), arrow=False)
        ngram, after, y = getattr(model.embedding, "ngram", None), y + 20, y + h + 14
        if ngram is not None:
            lines, orders = ngram_lines(ngram, self.shape), ngram.order - 1 if isinstance(ngram, HashSettings) else 0
            tall = height(lines) + (LINE * min(orders, ORDERS_SHOWN) + 4 if orders else 0)
            h = self.block(LEFT, y, LEFT_WIDE, ngram.kind, lines, "n-gram tables", self.share("n-gram tables"), tall)
            self.grid(ngram, orders, y + HEAD + LINE * len(lines) + 4)
            sheet.line((read, after), (read, y + 20), (LEFT, y + 20))
            if at_input(ngram):
                sheet.line((LEFT + LEFT_WIDE, y + 20), (bus, y + 20), (bus, after), arrow=False)
            else:
                sheet.line((LEFT + LEFT_WIDE, y + 20), (FRAME, y + 20), dashed=True)
            y += h + 14
        return self.gone("n-gram tables", LEFT, y, LEFT_WIDE)

    def grid(self, ngram: HashSettings, orders: int, y: float) -> None:
        """The tables: a row for each order, a cell for each split."""
        for row in range(min(orders, ORDERS_SHOWN)):
            last = row == ORDERS_SHOWN - 1 and orders > ORDERS_SHOWN
            self.sheet.text(LEFT + 7, y + 9 + LINE * row, f"… {ngram.order}-grams" if last else f"{row + 2}-grams", size=9, dim=True)
            step = min(14.0, (LEFT_WIDE - 67) / ngram.splits)
            for cell in range(ngram.splits):
                self.sheet.box(LEFT + 60 + cell * step, y + 1 + LINE * row, step * 0.8, 9, COLOUR["n-gram tables"], fill=0.4)

    def ends(self, bottom: float) -> float:
        """Final norm, head and prediction steps on the right, from the bottom up; the lower edge."""
        sheet, model, x, thin = self.sheet, self.model, RIGHT + 20, 26.0
        lines = [f"{model.vocab_size:,} × {model.hidden_size:,}", "untied, own weights"]
        tall = height(lines)
        steps = mtp_lines(model.mtp, model.attention) if model.mtp is not None else []
        chips = 22 if isinstance(model.mtp, MTPConfig) else 0
        above = height(steps) + chips + 20 if model.mtp is not None else 0
        head = max(bottom - thin - tall - 20, TOP + 4 + above)
        norm = head + tall + 20
        self.block(RIGHT, norm, RIGHT_WIDE, f"norm: {model.norm.kind}", [], "final norm", h=thin)
        self.block(RIGHT, head, RIGHT_WIDE, "head", lines, "head", self.share("head"))
        sheet.line((RIGHT - 10, bottom + 10), (RIGHT - 10, norm + thin / 2), (RIGHT, norm + thin / 2))
        sheet.line((x, norm), (x, head + tall))
        if model.mtp is not None:
            y, count = head - above, self.parts["mtp"].count
            title = f"{model.mtp.kind}: {count} step{'s' * (count > 1)}"
            h = self.block(RIGHT, y, RIGHT_WIDE, title, steps, "mtp", self.share("mtp"), height(steps) + chips)
            self.steps(y + HEAD + LINE * len(steps) + 6)
            sheet.line((RIGHT - 10, norm + thin / 2), (RIGHT - 10, y + 20), (RIGHT, y + 20))
            sheet.line((x, y + h), (x, head))
        self.gone("mtp", RIGHT, TOP + 10, RIGHT_WIDE)
        return norm + thin

    def steps(self, y: float) -> None:
        """A chip for each prediction step: joined where one block is applied again and again."""
        mtp = self.model.mtp
        if not isinstance(mtp, MTPConfig):
            return
        shown = min(mtp.num_nextn_predict_layers, STEPS_SHOWN)
        wide = (RIGHT_WIDE - 14) / shown
        for i in range(shown):
            last = i == shown - 1 and mtp.num_nextn_predict_layers > shown
            number = mtp.num_nextn_predict_layers if last else i + 1
            self.sheet.box(RIGHT + 7 + i * wide, y, wide - (0 if mtp.repeat_block else 3), 15, COLOUR["mtp"], fill=0.25)
            self.sheet.text(RIGHT + 10 + i * wide, y + 11, f"{'…' if last else ''}t+{number + 1}", size=9, room=wide - 4)

    def gone(self, part: str, x: float, y: float, w: float) -> float:
        """An empty place where only the baseline has this part."""
        if part in self.differs and part not in self.parts:
            self.sheet.box(x, y, w, 34, ACCENT, fill=0, dashed=True, weight=1.5)
            self.sheet.text(x + 7, y + 14, part, size=11, bold=True)
            self.sheet.text(x + 7, y + 27, "in the pinned one alone", room=w - 14)
            return y + 34
        return y

    def shares(self, y: float) -> None:
        """One bar of all parameters, and what its pieces are."""
        sheet, left, wide = self.sheet, LEFT - 10, WIDTH - 12
        active = sum(part.cost.active_params for part in self.parts.values())
        sheet.text(left, y + 10, f"{human(self.total)} parameters, {human(active)} active a token", size=11, bold=True)
        if self.differs:
            sheet.box(WIDTH - 196, y + 2, 12, 9, ACCENT, fill=0, weight=OUTLINE)
            sheet.text(WIDTH - 178, y + 10, "differs from the pinned configuration", size=9, room=172)
        x, y = left, y + 18
        for name, part in self.parts.items():
            size = wide * part.cost.params / self.total
            if size >= 0.2:
                sheet.box(x, y, size, 14, COLOUR.get(name, INK), fill=0.75, weight=0.5)
            x += size
        shown = sorted((p for p in self.parts.values() if p.cost.params >= LEGEND_FROM * self.total), key=lambda p: -p.cost.params)
        for i, part in enumerate(shown):
            at, row = left + (i % 5) * wide / 5, y + 30 + 15 * (i // 5)
            percent = f"{part.cost.params / self.total:.1%}"
            sheet.box(at, row - 8, 9, 9, COLOUR.get(part.name, INK), fill=0.75)
            sheet.text(at + 13, row, f"{part.name} {percent}", size=9.5, room=wide / 5 - 18)

    def sentence(self) -> str:
        """The picture in words."""
        model = self.model
        ngram = getattr(model.embedding, "ngram", None)
        tables = f"an embedding with {ngram.kind} tables" if ngram is not None else "a token embedding"
        found = [
            f"{human(self.total)} parameters: {tables}",
            f"{model.num_layers} layers of kind {model.layer.kind} with {model.attention.kind} attention",
        ]
        if "dense networks" in self.parts:
            found.append(f"{model.ffn.kind} dense networks")
        if isinstance(model.moe, MoEConfig) and "mixture" in self.parts:
            found.append(f"a mixture of {model.moe.n_routed_experts} experts and {model.moe.zero_expert_num} zero-experts")
        if model.mtp is not None:
            found.append(f"{self.parts['mtp'].count} prediction steps")
        differs = f" Different from the pinned configuration: {', '.join(sorted(self.differs))}." if self.differs else ""
        return f"Architecture with {', '.join(found)}.{differs}"
