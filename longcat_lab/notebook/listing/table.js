// One listener for all tables of a page, so that it does not matter when a table is put into it.
if (!window.labRunsSorts) {
  window.labRunsSorts = true;
  document.addEventListener("click", (event) => {
    const head = event.target.closest && event.target.closest("table.lab-runs th");
    if (!head || !head.querySelector("button")) return;
    const body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") === "descending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[head.cellIndex].dataset.value;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what has no value stays at the end
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
      return up ? order : -order;
    };
    body.append(...[...body.rows].sort(compare));
  });
}
