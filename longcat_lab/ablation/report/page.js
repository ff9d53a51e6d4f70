// What a page of figures and tables does for its reader, beyond what is there without it: tells the point under the pointer, hides an arm
// on a click on its legend, sorts a table on a click on its head, unfolds all before printing. Asks nothing of the network.
(() => {
  "use strict";
  const element = document.getElementById("lab-facts");
  const facts = element ? JSON.parse(element.textContent) : { parts: {}, figures: {} };
  const SVG = "http://www.w3.org/2000/svg";
  const NEAR = 24; // pixels of the screen between the pointer and a point that it still means

  // A click, or Enter or Space where the keyboard is.
  const pressed = (node, act) => {
    node.setAttribute("tabindex", "0");
    node.addEventListener("click", act);
    node.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      act();
    });
  };

  const plain = (value) => {
    const size = Math.abs(value);
    for (const [factor, prefix] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]]) {
      if (size >= factor) return `${Number((value / factor).toPrecision(4))}${prefix}`;
    }
    return `${Number(value.toPrecision(5))}`;
  };

  const nameOf = (series) => series.arm + (series.seed === undefined ? "" : `, seed ${series.seed} (${series.status})`);

  const words = (figure, series, i) => {
    if (series.said) return series.said[i];
    const name = nameOf(series);
    const range = series.low && series.low[i] !== series.high[i] ? ` (seeds ${plain(series.low[i])} to ${plain(series.high[i])})` : "";
    return `${name}: ${plain(series.y[i])}${range} at ${plain(series.x[i])} ${series.panel || figure.x}`;
  };

  // Points of a drawn line: the corners of its path, or the places of its markers.
  const places = (group) => {
    const uses = [...group.querySelectorAll("use")].map((use) => [+use.getAttribute("x"), +use.getAttribute("y")]);
    const path = [...group.children].find((child) => child.tagName === "path");
    const corners = path ? [...path.getAttribute("d").matchAll(/[ML] (\S+) (\S+)/g)].map((found) => [+found[1], +found[2]]) : [];
    return corners.length > uses.length ? corners : uses;
  };

  const tip = document.createElement("div");
  tip.id = "lab-tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);

  for (const svg of document.querySelectorAll("svg[data-figure]")) {
    const name = svg.dataset.figure;
    const figure = facts.figures[name];
    if (!figure) continue;
    const drawn = figure.series.map((series, i) => {
      const parts = [...svg.querySelectorAll(`[id="lab-${name}-${i}"], [id^="lab-${name}-${i}-"]`)];
      const line = svg.querySelector(`[id="lab-${name}-${i}"]`);
      return { series, parts, points: line ? places(line) : [] };
    });
    const dot = document.createElementNS(SVG, "circle");
    dot.setAttribute("r", "4");
    dot.setAttribute("fill", "none");
    dot.setAttribute("stroke", "currentColor");
    dot.setAttribute("class", "lab-gone");
    svg.append(dot);

    svg.addEventListener("pointermove", (event) => {
      const screen = svg.getScreenCTM();
      let best = null;
      for (const { series, parts, points } of drawn) {
        if (parts.some((part) => part.classList.contains("lab-gone"))) continue;
        points.forEach(([x, y], i) => {
          const far = Math.hypot(screen.a * x + screen.e - event.clientX, screen.d * y + screen.f - event.clientY);
          if (far < NEAR && (!best || far < best.far)) best = { far, x, y, text: words(figure, series, i) };
        });
      }
      tip.hidden = !best;
      dot.classList.toggle("lab-gone", !best);
      if (!best) return;
      tip.textContent = best.text;
      tip.style.left = `${Math.max(0, Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8))}px`;
      tip.style.top = `${event.clientY + 16}px`;
      dot.setAttribute("cx", best.x);
      dot.setAttribute("cy", best.y);
    });
    svg.addEventListener("pointerleave", () => {
      tip.hidden = true;
      dot.classList.add("lab-gone");
    });

    for (const key of svg.querySelectorAll(`[id^="lab-${name}-legend-"]`)) {
      const own = figure.series[+key.id.split("-").pop()]; // an arm takes its seeds that ended badly with it
      const box = key.getBBox();
      const area = document.createElementNS(SVG, "rect"); // letters are thin: the whole field takes the click
      for (const [side, value] of Object.entries({ x: box.x - 32, y: box.y - 3, width: box.width + 36, height: box.height + 6 })) {
        area.setAttribute(side, value);
      }
      area.setAttribute("fill", "transparent");
      key.append(area);
      key.classList.add("lab-key");
      key.setAttribute("role", "button");
      key.setAttribute("aria-label", `show ${nameOf(own)}`);
      key.setAttribute("aria-pressed", "true");
      pressed(key, () => {
        const off = key.classList.toggle("lab-off");
        key.setAttribute("aria-pressed", String(!off));
        for (const { series, parts } of drawn) {
          const meant = series.arm === own.arm && (own.seed === undefined || series.seed === own.seed);
          if (meant) parts.forEach((part) => part.classList.toggle("lab-gone", off));
        }
      });
    }
  }

  for (const table of document.querySelectorAll("table.lab")) {
    const body = table.tBodies[0];
    const known = (facts.parts[table.dataset.part] || { rows: [] }).rows;
    const rows = [...body.rows].map((row, i) => ({ row, i, cells: known[i] || [...row.cells].map((cell) => cell.textContent) }));
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.setAttribute("aria-sort", "none");
      pressed(head, () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((each) => each.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const order = (one, other) => {
          const [a, b] = [one.cells[column], other.cells[column]];
          if (Array.isArray(a) !== Array.isArray(b)) return Array.isArray(a) ? -1 : 1; // what has no number stays below
          const way = Array.isArray(a) ? a[1] - b[1] : a.localeCompare(b, undefined, { numeric: true });
          return (down ? -way : way) || one.i - other.i;
        };
        [...rows].sort(order).forEach(({ row }) => body.append(row));
      });
    });
  }

  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((each) => (each.open = true));
  });
  window.addEventListener("afterprint", () => folded.forEach((each) => (each.open = false)));
})();
