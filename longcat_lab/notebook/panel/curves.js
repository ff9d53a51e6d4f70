// Small multiples on one canvas, drawn at most once a frame from one block of float32. No library.
const GAP = 14, HEIGHT = 168, NARROWEST = 270;
const MARGIN = { left: 52, right: 10, top: 26, bottom: 24 };
const SETTLED = 0.05; // the first steps' fall must not flatten the rest: it may leave the panel at the top

function colours(el) {
  const style = getComputedStyle(el);
  const of = (name, otherwise) => style.getPropertyValue(name).trim() || otherwise;
  return {
    text: of("--jp-ui-font-color1", "#222"),
    faint: of("--jp-ui-font-color2", "#666"),
    line: of("--jp-border-color2", "#ccc"),
    ground: of("--jp-layout-color1", "#fff"),
    font: of("--jp-ui-font-family", "system-ui, sans-serif"),
  };
}

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return found;
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return +(value / 1e9).toPrecision(4) + " G";
  if (size >= 1e6) return +(value / 1e6).toPrecision(4) + " M";
  if (size >= 1e4) return +(value / 1e3).toPrecision(4) + " k";
  if (size !== 0 && size < 1e-3) return value.toExponential(1).replace(/\.0e/, "e");
  return String(+value.toPrecision(4));
}

function floats(view) {
  // The bytes may start anywhere in their message; float32 must start at a multiple of four.
  if (!view || !view.byteLength) return new Float32Array(0);
  return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

function nearest(xs, wanted) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < wanted) low = middle; else high = middle;
  }
  return Math.abs(xs[low] - wanted) <= Math.abs(xs[high] - wanted) ? low : high;
}

function unpack(head, live, earlier) {
  const blocks = { live: floats(live), earlier: floats(earlier) };
  const palette = head.palette || ["#0072B2"];
  let thin = 1;
  return (head.runs || []).map((run) => {
    const bold = run.from === "live";
    const series = {};
    for (const [curve, [at, n]] of Object.entries(run.series)) {
      const block = blocks[run.from];
      if (block.length >= at + 2 * n) series[curve] = { x: block.subarray(at, at + n), y: block.subarray(at + n, at + 2 * n) };
    }
    const colour = bold ? palette[0] : palette[1 + (thin++ - 1) % (palette.length - 1)];
    return { name: run.name, bold, colour, series };
  });
}

function rangeOf(curve, points, runs, asked) {
  let low = Infinity, high = -Infinity;
  const see = (y) => { if (y < low) low = y; if (y > high) high = y; };
  for (const run of runs) {
    const line = run.series[curve], long = [line, run.series[points]].find((s) => s && s.x.length >= 12);
    const from = curve === "learning_rate" || !long ? -1 : SETTLED * long.x[long.x.length - 1];
    for (const s of [line, run.series[points]]) if (s) for (let i = 0; i < s.x.length; i++) if (s.x[i] >= from) see(s.y[i]);
  }
  if (asked !== undefined) see(asked);
  if (curve === "learning_rate") see(0);
  if (low > high) return [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [curve === "learning_rate" ? 0 : low - room, high + room];
}

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "longcat-curves";
  const legend = document.createElement("div");
  legend.className = "longcat-curves-legend";
  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  const note = document.createElement("div");
  note.className = "longcat-curves-note";
  note.textContent = "This page was reloaded meanwhile: show the panel in a cell again, and the notebook's file keeps a picture of these curves.";
  note.hidden = true;
  root.append(legend, canvas, note);
  el.append(root);
  const c = canvas.getContext("2d");
  let runs = [], head = {}, places = [], mouse = null, waiting = 0;

  function read() {
    head = model.get("head") || {};
    runs = unpack(head, model.get("live"), model.get("earlier"));
    legend.replaceChildren(...runs.map((run) => {
      const item = document.createElement("span"), mark = document.createElement("i");
      mark.style.borderTopColor = run.colour;
      if (run.bold) mark.className = "live";
      item.append(mark, document.createTextNode(run.name));
      return item;
    }));
    canvas.setAttribute("aria-label", "Curves: " + (head.curves || []).map((curve) => curve.title).join(", "));
    seek(25);
    ask();
  }

  // Where the page shows the static picture of the same curves, one of the two is enough.
  function seek(times) {
    const found = head.figure && document.querySelector(`[data-panel-figure="${head.figure}"]`);
    const hidden = Boolean(found) || !(head.curves || []).length;
    root.style.display = hidden ? "none" : "";
    if (!hidden) ask();
    note.hidden = !head.figure || Boolean(found) || times > 0; // a page that was reloaded knows no place for the picture any more
    if (head.figure && !found && times > 0) {
      const figure = head.figure;
      setTimeout(() => { if (head.figure === figure) seek(times - 1); }, 200);
    }
  }

  function ask() {
    if (!waiting) waiting = requestAnimationFrame(() => { waiting = 0; draw(); });
  }

  function draw() {
    const width = root.clientWidth;
    if (!width) return;
    const panels = [...(head.curves || [])];
    if (head.load) panels.push({ name: null, title: "expert load" + (head.load.of ? `, ${head.load.of}` : ""), unit: "share of tokens" });
    const columns = Math.max(1, Math.min(panels.length, Math.floor((width + GAP) / (NARROWEST + GAP))));
    const rows = Math.ceil(panels.length / columns);
    const height = rows * (HEIGHT + GAP);
    const ratio = window.devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.height = height + "px";
    }
    const ink = colours(root);
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, width, height);
    let end = 0;
    for (const run of runs) for (const s of Object.values(run.series)) end = Math.max(end, s.x[s.x.length - 1] || 0);
    end = Math.max(end, head.end || 0) || 1;
    const wide = (width - GAP * (columns - 1)) / columns;
    places = panels.map((panel, i) => {
      const left = (i % columns) * (wide + GAP), top = Math.floor(i / columns) * (HEIGHT + GAP);
      const place = {
        panel, left: left + MARGIN.left, right: left + wide - MARGIN.right, top: top + MARGIN.top, bottom: top + HEIGHT - MARGIN.bottom,
      };
      if (panel.name === null) bars(place, ink); else curve(place, ink, end);
      return place;
    });
    if (mouse) tell(ink, width);
  }

  function title(place, ink, value) {
    c.textBaseline = "alphabetic";
    c.textAlign = "left";
    c.fillStyle = ink.text;
    c.font = `600 12px ${ink.font}`;
    c.fillText(place.panel.title, place.left, place.top - 9);
    const after = place.left + c.measureText(place.panel.title + " ").width + 2;
    c.font = `11px ${ink.font}`;
    c.fillStyle = ink.faint;
    const room = place.right - after - (value === null ? 0 : 52);
    if (c.measureText(place.panel.unit || "").width <= room) c.fillText(place.panel.unit || "", after, place.top - 9);
    if (value !== null) {
      c.textAlign = "right";
      c.fillStyle = ink.text;
      c.font = `600 12px ${ink.font}`;
      c.fillText(short(value), place.right, place.top - 9);
    }
  }

  function grid(place, ink, xs, ys, toX, toY) {
    c.font = `11px ${ink.font}`;
    c.fillStyle = ink.faint;
    c.strokeStyle = ink.line;
    c.lineWidth = 1;
    c.beginPath();
    c.textAlign = "right";
    c.textBaseline = "middle";
    for (const y of ys) {
      const at = Math.round(toY(y)) + 0.5;
      c.moveTo(place.left, at);
      c.lineTo(place.right, at);
      c.fillText(short(y), place.left - 6, at);
    }
    c.stroke();
    c.textBaseline = "top";
    c.textAlign = "center";
    for (const x of xs) c.fillText(x ? short(x) : "0", toX(x), place.bottom + 6);
  }

  function curve(place, ink, end) {
    const { name, points } = place.panel, asked = (head.asked || {})[name];
    const [low, high] = rangeOf(name, points, runs, asked);
    const toX = (x) => place.left + (x / end) * (place.right - place.left);
    const toY = (y) => place.bottom - ((y - low) / (high - low)) * (place.bottom - place.top);
    Object.assign(place, { toX, toY, end });
    grid(place, ink, ticks(0, end, 4), ticks(low, high, 4), toX, toY);
    c.save();
    c.beginPath();
    c.rect(place.left - 4, place.top - 2, place.right - place.left + 8, place.bottom - place.top + 4);
    c.clip();
    if (asked !== undefined) {
      c.setLineDash([5, 4]);
      c.strokeStyle = ink.faint;
      c.beginPath();
      c.moveTo(place.left, toY(asked));
      c.lineTo(place.right, toY(asked));
      c.stroke();
      c.setLineDash([]);
    }
    const last = {};
    c.lineJoin = "round";
    for (const run of [...runs].sort((a, b) => a.bold - b.bold)) { // the bold one on top
      c.strokeStyle = c.fillStyle = run.colour;
      for (const each of [name, points]) {
        const s = run.series[each];
        if (!s || !s.x.length) continue;
        const wide = run.bold ? 2.4 : 1.1;
        c.lineWidth = each === points ? 0.6 * wide : wide;
        c.setLineDash(each === points ? [2, 3] : []);
        c.beginPath();
        for (let i = 0; i < s.x.length; i++) i ? c.lineTo(toX(s.x[i]), toY(s.y[i])) : c.moveTo(toX(s.x[i]), toY(s.y[i]));
        c.stroke();
        c.setLineDash([]);
        if (each === points || s.x.length < 3) for (let i = 0; i < s.x.length; i++) dot(toX(s.x[i]), toY(s.y[i]), run.bold ? 4 : 3);
        if (run.bold) last[each] = s.y[s.y.length - 1];
      }
    }
    c.restore();
    if (points) key(place, ink, last[points]);
    title(place, ink, last[name] === undefined ? null : last[name]);
  }

  // What the line and the points of one panel are, where falling curves leave room: the two lines end at its upper right corner.
  function key(place, ink, value) {
    const { name, points } = place.panel, names = head.together || {};
    c.font = `11px ${ink.font}`;
    c.textAlign = "right";
    c.textBaseline = "middle";
    [[name, names[name]], [points, names[points] + (value === undefined ? "" : " " + short(value))]].forEach(([each, text], i) => {
      const y = place.top + 8 + 15 * i, x = place.right - c.measureText(text).width - 6;
      c.fillStyle = ink.ground;
      c.globalAlpha = 0.8;
      c.fillRect(x - 26, y - 7, place.right - x + 26, 15);
      c.globalAlpha = 1;
      c.strokeStyle = c.fillStyle = ink.text;
      c.lineWidth = each === points ? 1.2 : 2;
      c.setLineDash(each === points ? [2, 3] : []);
      c.beginPath();
      c.moveTo(x - 22, y);
      c.lineTo(x - 2, y);
      c.stroke();
      c.setLineDash([]);
      if (each === points) dot(x - 12, y, 3.5);
      c.fillText(text, place.right - 2, y);
    });
  }

  function dot(x, y, size) {
    c.beginPath();
    c.arc(x, y, size, 0, 2 * Math.PI);
    c.fill();
  }

  function bars(place, ink) {
    const { share, real, mean } = head.load, most = Math.max(...share, mean) * 1.06 || 1;
    const toY = (y) => place.bottom - (y / most) * (place.bottom - place.top);
    const wide = (place.right - place.left) / share.length;
    grid(place, ink, [], ticks(0, most, 4), null, toY);
    share.forEach((value, i) => {
      c.fillStyle = i < real ? (head.palette || [])[0] : ink.faint;
      c.globalAlpha = i < real ? 1 : 0.55;
      c.fillRect(place.left + i * wide + wide * 0.12, toY(value), Math.max(wide * 0.76, 0.5), place.bottom - toY(value));
    });
    c.globalAlpha = 1;
    c.strokeStyle = ink.text;
    c.setLineDash([5, 4]);
    c.beginPath();
    c.moveTo(place.left, toY(mean));
    c.lineTo(place.left + real * wide, toY(mean));
    c.stroke();
    c.setLineDash([]);
    c.fillStyle = ink.faint;
    c.textBaseline = "top";
    c.textAlign = "center";
    c.fillText(`${real} experts`, place.left + (real * wide) / 2, place.bottom + 6);
    if (share.length > real) c.fillText("zero", place.left + ((real + share.length) * wide) / 2, place.bottom + 6);
    title(place, ink, null);
    Object.assign(place, { share, wide });
  }

  function tell(ink, width) {
    const over = places.find((p) => mouse.x >= p.left - 8 && mouse.x <= p.right + 8 && mouse.y >= p.top - 20 && mouse.y <= p.bottom + 20);
    if (!over) return;
    let lines = [];
    if (over.share) {
      const slot = Math.floor((mouse.x - over.left) / over.wide);
      if (slot < 0 || slot >= over.share.length) return;
      lines = [[ink.text, `${slot < head.load.real ? "expert" : "zero-expert"} ${slot}: ${short(over.share[slot])}`]];
    } else {
      const tokens = ((mouse.x - over.left) / (over.right - over.left)) * over.end;
      c.strokeStyle = ink.faint;
      c.lineWidth = 1;
      for (const place of places.filter((p) => p.toX)) {
        c.beginPath();
        c.moveTo(Math.round(place.toX(tokens)) + 0.5, place.top);
        c.lineTo(Math.round(place.toX(tokens)) + 0.5, place.bottom);
        c.stroke();
        const { name, points } = place.panel, what = (each) => (points ? `, ${(head.together || {})[each]}` : "");
        for (const [run, each] of runs.flatMap((run) => [[run, name], [run, points]])) {
          const s = run.series[each];
          if (!s || !s.x.length) continue;
          const i = nearest(s.x, tokens), y = place.toY(s.y[i]);
          c.fillStyle = run.colour;
          if (y >= place.top - 2 && y <= place.bottom + 2) dot(place.toX(s.x[i]), y, 3);
          if (place === over) lines.push([run.colour, `${short(s.y[i])}  at ${short(s.x[i])}  ${run.name}${what(each)}`]);
        }
      }
    }
    c.font = `12px ${ink.font}`;
    const wide = Math.max(...lines.map(([, text]) => c.measureText(text).width)) + 16, tall = lines.length * 17 + 8;
    const x = Math.max(0, Math.min(mouse.x + 14, width - wide - 2)), y = Math.min(mouse.y + 12, over.bottom - 4);
    c.globalAlpha = 0.94;
    c.fillStyle = ink.ground;
    c.fillRect(x, y, wide, tall);
    c.globalAlpha = 1;
    c.strokeStyle = ink.line;
    c.strokeRect(x + 0.5, y + 0.5, wide, tall);
    c.textAlign = "left";
    c.textBaseline = "top";
    lines.forEach(([colour, text], i) => { c.fillStyle = colour; c.fillText(text, x + 8, y + 6 + i * 17); });
  }

  const onMove = (event) => { const box = canvas.getBoundingClientRect(); mouse = { x: event.clientX - box.left, y: event.clientY - box.top }; ask(); };
  const onLeave = () => { mouse = null; ask(); };
  canvas.addEventListener("mousemove", onMove);
  canvas.addEventListener("mouseleave", onLeave);
  const sizes = new ResizeObserver(ask);
  sizes.observe(root);
  const themes = new MutationObserver(ask);
  themes.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name", "data-jp-theme-light", "class"] });
  // One update changes several traits, and each tells of itself.
  let due = false;
  const soon = () => { if (!due) { due = true; queueMicrotask(() => { due = false; read(); }); } };
  for (const name of ["head", "live", "earlier"]) model.on(`change:${name}`, soon);
  read();
  return () => {
    cancelAnimationFrame(waiting);
    sizes.disconnect();
    themes.disconnect();
    for (const name of ["head", "live", "earlier"]) model.off(`change:${name}`, soon);
  };
}

export default { render };
