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

  // What if: the shares that are chosen, and the sum of what each cost alone.
  function whatIf(holder) {
    const known = JSON.parse(holder.textContent);
    const rows = new Map(
      [...document.querySelectorAll("tr[data-layer]")].map((row) => [row.dataset.layer, row])
    );
    const sizes = (name) => known.layers[name];
    const choice = (row) => row.querySelector("select");
    const at = (name) => sizes(name).find((size) => size[0] === Number(choice(rows.get(name)).value));
    const compact = new Intl.NumberFormat("en", {
      notation: "compact", maximumSignificantDigits: 3,
    });
    const short = (count) => compact.format(count).replace("K", "k");
    const show = (key, text, from) => {
      document.querySelector(`[data-sum=${key}]`).textContent = text;
      document.querySelector(`[data-from=${key}]`).textContent = from;
    };
    const most = document.querySelector("[data-most]");
    // Squares: half of the slider is for losses up to a quarter of the largest.
    const largest = Math.max(...Object.values(known.layers).flat().map((size) => size[3] || 0), 0.1);
    const allowed = () => largest * (Number(most.value) / 100) ** 2;

    function add() {
      let [params, macs, lost, loss, whole] = [known.params, known.macs, 0, known.loss, []];
      for (const [name, row] of rows) {
        const size = at(name);
        row.querySelector("[data-became]").textContent = size ? size[5] : "as it is";
        choice(row).closest("td").dataset.value = size ? size[0] : 1;
        if (!size) whole.push(name);
        if (!size) continue;
        params -= known.params - size[1];
        macs -= known.macs - size[2];
        lost = size[3] === null || lost === null ? null : lost + size[3];
        loss = size[4] === null || loss == null ? null : loss + size[4] - known.loss;
      }
      const share = (now, then) => `${((100 * now) / then).toFixed(1)} % of ${short(then)}`;
      show("params", short(Math.max(0, params)), share(Math.max(0, params), known.params));
      show("macs", short(Math.max(0, macs)), share(Math.max(0, macs), known.macs));
      show("lost", lost === null ? "all" : lost.toFixed(1), "sum over layers");
      const from = known.loss == null ? "" : `from ${known.loss.toPrecision(3)}`;
      show("loss", loss == null ? "–" : loss.toPrecision(3), from);
      const some = whole.length && whole.length < rows.size;
      const names = whole.map((name) => JSON.stringify(name)).join(", ");
      const spec = some ? `To leave the others alone: exclude=(${names},)` : "";
      document.querySelector("[data-spec]").textContent = spec;
    }

    // The smallest size that is no smaller than asked, or 100 % where there is none.
    function choose(pickOne) {
      for (const [name, row] of rows) {
        const size = sizes(name).filter(pickOne).pop();
        choice(row).value = size ? String(size[0]) : "1";
      }
      add();
    }

    const every = document.querySelector("[data-all]");
    every.addEventListener("change", () => choose((size) => size[0] >= Number(every.value)));
    most.addEventListener("input", function () {
      document.querySelector("[data-most-said]").textContent = allowed().toFixed(2);
      choose((size) => size[3] !== null && size[3] <= allowed());
    });
    rows.forEach((row) => choice(row).addEventListener("change", add));
    document.querySelector("[data-most-said]").textContent = "0.00";
    add();
  }

  const wondering = document.getElementById("what-if");
  if (wondering) whatIf(wondering);

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
