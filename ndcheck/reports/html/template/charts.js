"use strict";
// What the three scripts of this page share: the data, and the tokens of any completion.
const report = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  // The tokens that each trunk does not share with its parent: LEB128 numbers in base64.
  function decode(arm) {
    const bytes = atob(arm.tokens);
    let at = 0;
    return arm.trunks.slice(0, arm.n_with_tokens).map(({ start, end }) => {
      const own = new Uint32Array(end - start);
      for (let i = 0; i < own.length; i++) {
        let byte, shift = 0;
        do {
          byte = bytes.charCodeAt(at++);
          own[i] |= (byte & 127) << shift;
          shift += 7;
        } while (byte & 128);
      }
      return own;
    });
  }

  // Token numbers of a whole completion; null where the page does not hold them.
  function tokens(arm, index) {
    if (index >= arm.n_with_tokens) return null;
    arm.own ??= decode(arm);
    const { parent, start, end } = arm.trunks[index];
    const found = new Uint32Array(end);
    if (parent >= 0) found.set(tokens(arm, parent).subarray(0, start));
    found.set(arm.own[index], start);
    return found;
  }

  function text(numbers) {
    return Array.from(numbers, (number) => data.vocabulary[number]).join("");
  }

  function trunkOf(arm, completion) {
    return arm.trunks.findIndex((trunk) => trunk.completion === completion);
  }

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  }

  function element(name, content, className) {
    const made = document.createElement(name);
    if (content !== undefined) made.textContent = content;
    if (className) made.className = className;
    return made;
  }

  // Draws when there is room, again when the room or the colours change.
  const redraws = [];
  function whenShown(node, draw) {
    let width = 0;
    new ResizeObserver(() => {
      if (node.clientWidth && node.clientWidth !== width) draw((width = node.clientWidth));
    }).observe(node);
    redraws.push(() => node.clientWidth && draw(node.clientWidth));
  }
  const redraw = () => redraws.forEach((draw) => draw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  // On paper nothing opens: the branches are printed open, and in the colours of paper.
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details:not([open]):not(.numbers)").forEach((node) => {
      node.open = true;
      node.dataset.printed = "";
    });
    redraw();
  });
  addEventListener("afterprint", () => {
    document.querySelectorAll("details[data-printed]").forEach((node) => {
      node.open = false;
      delete node.dataset.printed;
    });
    redraw();
  });
  return { data, tokens, text, trunkOf, colour, element, whenShown };
})();

(() => {
  const { data, colour, element, whenShown } = report;
  const HEIGHT = 240;
  const whole = (plot, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? String(tick) : ""));
  const dash = { stock: [], invariant: [7, 4] };

  function line(arm, extra) {
    const stroke = colour(arm.arm);
    return { label: arm.arm, colour: stroke, stroke, width: 2, dash: dash[arm.arm], points: { show: true, size: 8, fill: stroke, stroke }, ...extra };
  }

  // Batch sizes are told apart, not measured: they stand at equal distances.
  function bySize(charts, field) {
    return {
      x: charts.sizes.map((_, i) => i),
      xNames: charts.sizes,
      xLabel: "batch size",
      rows: charts.series.map((one) => one[field]),
      series: charts.series.map((one) => line(one, { label: one.label, hollow: one.hollow, points: { show: true, size: 8, fill: colour(one.hollow ? "card" : one.arm), stroke: colour(one.arm) }, value: (_, value) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(3)))) })),
    };
  }

  const kinds = {
    unique: (charts) => ({ ...bySize(charts, "unique"), isCount: true }),
    speed: (charts) => bySize(charts, "speed"),
    histogram(charts) {
      const { edges } = charts, n = charts.arms.length;
      const names = edges.slice(0, -1).map((edge, i) => (edges[1] > 1 ? `${edge + 1}–${edges[i + 1]}` : `${edge + 1}`));
      return {
        x: edges.slice(0, -1).map((edge, i) => (edge + 1 + edges[i + 1]) / 2),
        xNames: names,
        xLabel: data.unit,
        range: [0.5, edges.at(-1) + 0.5],
        isCount: true,
        rows: charts.arms.map((arm) => arm.histogram.map((n) => n || null)),
        series: charts.arms.map((arm, i) => ({
          label: arm.arm, colour: colour(arm.arm), stroke: colour(arm.arm), fill: colour(arm.arm), points: { show: false },
          paths: uPlot.paths.bars({ size: [0.9 / n, Infinity], align: n === 1 ? 0 : i ? 1 : -1 }),
        })),
      };
    },
    margin(charts) {
      const at = new Map();
      charts.margins.forEach((margin, i) => at.set(i, [margin]));
      charts.arms.forEach((arm, i) => arm.forks.forEach(({ position, margin }) => {
        const row = at.get(position) ?? at.set(position, [null]).get(position);
        row[i + 1] = Math.min(margin, row[i + 1] ?? Infinity);
      }));
      const positions = [...at.keys()].sort((a, b) => a - b);
      const column = (i) => positions.map((position) => at.get(position)[i] ?? null);
      const forks = charts.arms.map((arm, i) => ({
        ...line(arm, { label: `forks, ${arm.arm}`, width: 0, paths: () => null }), points: { show: true, size: 9, fill: colour(arm.arm), stroke: colour("card") },
      }));
      return {
        x: positions.map((position) => position + 1),
        xLabel: data.unit,
        hasZeros: true,
        rows: [column(0), ...charts.arms.map((_, i) => column(i + 1))],
        series: [{ label: "reference", colour: colour("trace"), stroke: colour("trace"), width: 1.25, points: { show: false } }, ...forks],
      };
    },
  };

  function axis(extra) {
    return { stroke: colour("soft"), grid: { stroke: colour("rule"), width: 1 }, ticks: { stroke: colour("rule"), width: 1 }, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", ...extra };
  }

  function draw(node, view, width) {
    node.replaceChildren();
    const named = view.xNames && !view.range;
    const options = {
      width,
      height: HEIGHT,
      cursor: { y: false, points: { size: 8 } },
      legend: { markers: { width: 2, stroke: (_, i) => view.series[i - 1]?.colour, fill: (_, i) => (view.series[i - 1]?.hollow ? colour("card") : view.series[i - 1]?.colour) } },
      scales: {
        x: { time: false, range: view.range ?? (named ? [-0.4, view.x.length - 0.6] : undefined) },
        y: {
          range: (_, low, high) => {
            const top = (view.isCount ? Math.max(high ?? 0, 1) : high || 1) * 1.08;
            return [view.hasZeros ? -0.04 * top : 0, top]; // no point on the edge is cut in half
          },
        },
      },
      axes: [
        axis({ label: view.xLabel, labelSize: 20, size: 32, ...(named && { splits: () => view.x, values: () => view.xNames }) }),
        axis({ size: 52, values: view.isCount ? whole : undefined }),
      ],
      series: [{ label: view.xLabel, value: (_, __, ___, i) => (i === null ? "–" : view.xNames?.[i] ?? view.x[i]) }, ...view.series],
    };
    new uPlot(options, [view.x, ...view.rows], node);
  }

  function table(view) {
    const made = element("table"), head = made.createTHead().insertRow();
    [view.xLabel, ...view.series.map((one) => one.label)].forEach((name) => head.append(element("th", name, "number")));
    const body = made.createTBody();
    view.x.forEach((x, i) => {
      const cells = view.rows.map((row) => row[i]);
      if (cells.every((cell) => cell === null)) return;
      const row = body.insertRow();
      [view.xNames?.[i] ?? x, ...cells].forEach((cell) => row.append(element("td", cell === null ? "" : String(cell), "number")));
    });
    if (!body.rows.length) body.insertRow().append(element("td", "none"));
    return made;
  }

  document.querySelectorAll(".plot").forEach((node) => {
    const { charts } = data.probes[node.dataset.probe];
    const view = () => kinds[node.dataset.kind](charts);
    whenShown(node, (width) => draw(node, view(), width));
    const numbers = node.parentElement.querySelector(".numbers");
    numbers.addEventListener("toggle", () => numbers.lastElementChild.replaceChildren(table(view())), { once: true });
  });
})();
