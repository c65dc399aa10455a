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
