(function () {
  "use strict";
  const narrow = window.matchMedia("(max-width: 640px)");
  const calm = window.matchMedia("(hover: none)");
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: calm.matches ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
  };

  // A panel beside another on a desk stands below it on a phone. The height belongs to the box:
  // a height in the layout would freeze the width as well, and the plot would not follow the page.
  function look(graph, meta) {
    const { height, ...layout } = structuredClone(narrow.matches ? meta.narrow : meta.wide);
    graph.style.height = height + "px";
    return { ...layout, autosize: true };
  }

  function fit(graph) {
    return Plotly.relayout(graph, look(graph, graph.layout.meta));
  }

  // Plotly's own drop-down is deaf to keyboards and screen readers: use the browser's.
  function pick(graph, menu) {
    const label = document.createElement("label");
    const select = document.createElement("select");
    const words = document.createElement("span");
    label.className = "pick";
    words.textContent = menu.name;
    menu.buttons.forEach(function (button) {
      const plain = new DOMParser().parseFromString(button.label, "text/html");
      select.add(new Option(plain.body.textContent));
    });
    select.addEventListener("change", function () {
      const [data, layout, traces] = structuredClone(menu.buttons[select.selectedIndex].args);
      Plotly.update(graph, data, layout, traces);
    });
    label.append(words, select);
    graph.before(label);
  }

  function value(row, column) {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  }

  // Numbers come before words, and empty cells stay last whichever way a column is sorted.
  function order(a, b, turn) {
    const empty = (x) => x === "" || x === "–";
    if (empty(a) || empty(b)) return empty(a) - empty(b);
    if (typeof a === "number" && typeof b === "number") return turn * (a - b);
    return turn * String(a).localeCompare(String(b), undefined, { numeric: true });
  }

  function sortable(table) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach(function (head, column) {
      if (!head.textContent) return;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", function () {
        const turn = head.ariaSort === "ascending" ? -1 : 1;
        [...head.parentNode.cells].forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", turn > 0 ? "ascending" : "descending");
        const rows = [...body.rows];
        rows.sort((a, b) => order(value(a, column), value(b, column), turn));
        body.append(...rows);
      });
    });
    const label = document.createElement("label");
    const input = document.createElement("input");
    label.className = "pick";
    input.type = "search";
    label.append("Show only", input);
    input.addEventListener("input", function () {
      const wanted = input.value.toLowerCase();
      for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    });
    table.parentNode.before(label);
  }

  document.querySelectorAll("table[data-sort]").forEach(sortable);

  const graphs = [];
  document.querySelectorAll(".graph").forEach(function (graph) {
    try {
      const figure = JSON.parse(document.getElementById(graph.dataset.figure).textContent);
      const menus = figure.layout.updatemenus || [];
      delete figure.layout.updatemenus;
      delete figure.layout.height;
      figure.layout.autosize = true;
      look(graph, figure.layout.meta);
      menus.forEach((menu) => pick(graph, menu));
      Plotly.newPlot(graph, figure.data, figure.layout, config).then(() => fit(graph));
      graphs.push(graph);
    } catch (error) {
      graph.textContent = "This figure could not be drawn: " + error.message;
      console.error(error);
    }
  });
  narrow.addEventListener("change", () => graphs.forEach(fit));
})();
