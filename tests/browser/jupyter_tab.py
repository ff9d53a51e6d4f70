"""A page of JupyterLab with one notebook, and what can be seen of a panel on it."""

from __future__ import annotations

from typing import Any

SECONDS = 120  # that anything may take on a loaded machine
NOTEBOOK = "window.jupyterapp.shell.currentWidget"
BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)  # of the palette: the live run, the first one beside it


class Shown:
    """JavaScript expressions on the panel in `where`, a part of the page."""

    def __init__(self, where: str = "") -> None:
        canvas = f"document.querySelector('{where} .longcat-curves canvas')"
        self.panel = f"document.querySelector('{where} .longcat-panel')"
        self.status = f"(document.querySelector('{where} .longcat-panel-status')?.innerText ?? '')"
        self.step = f"Number((/Step ([\\d,]+) of/.exec({self.status})?.[1] ?? '-1').replaceAll(',', ''))"
        self.budget = f"(document.querySelector('{where} .lab-budget')?.innerText ?? '')"
        self.figure = (
            f"document.querySelector('{where} [data-panel-figure]') && document.querySelector('{where} .jp-RenderedSVG img')?.naturalWidth"
        )
        self.curves = f"{canvas}.toDataURL()"
        self._canvas = canvas

    def pixels(self, colour: tuple[int, int, int]) -> str:
        """How many pixels of the canvas have this colour; none while it is hidden."""
        of_it = " && ".join(f"data[i + {channel}] === {value}" for channel, value in enumerate((*colour, 255)))
        return f"""(() => {{
          const canvas = {self._canvas};
          if (!canvas?.clientWidth || !canvas.width) return 0;
          const {{ data }} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
          let found = 0;
          for (let i = 0; i < data.length; i += 4) found += {of_it};
          return found;
        }})()"""


ACTIVE = ".jp-Cell.jp-mod-active"
FIRST, IN_THE_CELL = Shown(), Shown(ACTIVE)  # the first panel of the page, the one of the active cell


class Tab:
    """A page of JupyterLab with one notebook, in a session of the browser of its own.

    busy: do not wait until the kernel is idle, since a cell runs.
    """

    def __init__(self, browser: Any, address: str, name: str, busy: bool = False) -> None:
        self.page, self.name, self.errors = browser.new_page(viewport={"width": 1400, "height": 1500}), name, []
        self.page.set_default_timeout(SECONDS * 1000)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: dialog.accept())
        # A workspace for each notebook: else what another one has left open is opened here too.
        self.page.goto(f"{address}/lab/workspaces/{name.removesuffix('.ipynb')}/tree/{name}")
        self.ready(busy)

    def ready(self, busy: bool = False) -> None:
        opened = f"window.jupyterapp && {NOTEBOOK}?.context?.path === '{self.name}'"
        drawn = f"{NOTEBOOK}.content.widgets.length && document.querySelector('.jp-Notebook .jp-CodeCell')"
        self.until("the notebook", f"{opened} && {drawn}")
        if not busy:
            self.until("the kernel", f"{NOTEBOOK}.sessionContext?.session?.kernel?.status === 'idle'")

    def until(self, what: str, condition: str) -> Any:
        """Waits until the condition, a JavaScript expression, holds; its value."""
        from playwright.sync_api import TimeoutError

        try:
            return self.page.wait_for_function(condition, timeout=SECONDS * 1000, polling=100).json_value()
        except TimeoutError:
            said = [self.page.evaluate(FIRST.status), *self.errors, self.page.evaluate("document.body.innerText")[-1500:]]
            raise AssertionError(f"{what} did not come. The page says: " + "\n".join(said)) from None

    def command(self, name: str) -> None:
        """Starts one of JupyterLab's commands; what is awaited is what it brings about."""
        self.page.evaluate("(name) => { window.jupyterapp.commands.execute(name); }", name)

    def choose(self, cell: int) -> None:
        """Makes a cell the active one."""
        self.page.evaluate(f"(cell) => {{ {NOTEBOOK}.content.activeCellIndex = cell; }}", cell)

    def run(self, cell: int) -> Any:
        """Runs a cell to its end; its output."""
        self.choose(cell)
        self.command("notebook:run-cell")
        of_it = f"{NOTEBOOK}.content.widgets[{cell}].model"
        self.until(f"the end of cell {cell}", f"{of_it}.executionCount !== null && {of_it}.executionState === 'idle'")
        return self.page.locator(f"{ACTIVE} .jp-OutputArea")

    def save(self) -> None:
        self.command("docmanager:save")
        self.until("the saved file", f"{NOTEBOOK}.context.model.dirty === false")

    def button(self, name: str, where: str = "") -> Any:
        return self.page.locator(f"{where} .longcat-panel").first.get_by_role("button", name=name)

    def steps_on(self, last: int, shown: Shown = FIRST) -> int:
        """Waits for a later step than this; which it is."""
        return self.until("the next step", f"{shown.step} > {last} && {shown.step}")

    def grows(self, shown: Shown = FIRST) -> int:
        """Waits until the curve is drawn and drawn on; the step then."""
        self.until("a drawn curve", f"{shown.pixels(BLUE)} > 50")
        drawn, step = self.page.evaluate(f"[{shown.curves}, {shown.step}]")
        later = self.steps_on(step, shown)
        self.until("a longer curve", f"{shown.curves} !== {drawn!r}")
        return later
