"use strict";
// The heat strip: samples x token positions, coloured by continuation.
(() => {
  const { data, tokens, text, colour, element, whenShown } = report;
  const AXIS = 22;
  const CONTEXT = 4;
  const nowhere = Number.MAX_SAFE_INTEGER;

  const orders = {
    tree: (arm) => (a, b) =>
      arm.trunks[a.trunk].place - arm.trunks[b.trunk].place || (a.latent?.[0] ?? nowhere) - (b.latent?.[0] ?? nowhere) || a.sample - b.sample,
    batch: (arm) => (a, b) => a.size - b.size || orders.tree(arm)(a, b),
    run: () => (a, b) => a.sample - b.sample,
  };

  // From which token on a row has which colour: its trunk's, before that its parent's, and so on.
  function segments(arm, index) {
    const found = [];
    for (let end = arm.trunks[index].end; index >= 0; index = arm.trunks[index].parent) {
      const { start, colour: number } = arm.trunks[index];
      found.push([start, end, number]);
      end = start;
    }
    return found;
  }

  function niceStep(rough) {
    const power = 10 ** Math.floor(Math.log10(rough));
    return Math.max(1, [1, 2, 5, 10].find((factor) => factor * power >= rough) * power);
  }

  // Equal tokens with other bits keep their colour below the lines.
  function hatch(context, ratio) {
    const size = 6 * ratio, tile = Object.assign(document.createElement("canvas"), { width: size, height: size });
    const own = tile.getContext("2d");
    own.strokeStyle = colour("latent");
    own.lineWidth = 1.5 * ratio;
    for (const shift of [-size, 0, size]) {
      own.moveTo(shift, size);
      own.lineTo(shift + size, 0);
    }
    own.stroke();
    return context.createPattern(tile, "repeat");
  }

  document.querySelectorAll(".strip").forEach((figure) => {
    const arm = data.probes[figure.dataset.probe].arms[figure.dataset.arm];
    const canvas = figure.querySelector("canvas");
    const status = figure.querySelector(".status");
    const order = figure.querySelector(".order");
    const nTokens = Math.max(1, ...arm.trunks.map((trunk) => trunk.end));
    let rows = [], at = null, width = 0;
    const height = arm.trunks.length === 1 ? 48 : Math.min(420, Math.max(90, arm.rows.length * 5));

    function draw(newWidth) {
      width = newWidth;
      const ratio = devicePixelRatio || 1, context = canvas.getContext("2d");
      canvas.width = width * ratio;
      canvas.height = (height + AXIS) * ratio;
      canvas.style.height = `${height + AXIS}px`;
      const palette = Array.from({ length: 8 }, (_, i) => colour(`c${i}`));
      const x = width / nTokens, y = height / rows.length;
      const cached = new Map();
      // Whole pixels, so that no seams show; the exits last, since a row thinner than a pixel must
      // not hide behind the many.
      for (const first of [true, false]) {
        rows.forEach((row, i) => {
          if (!cached.has(row.trunk)) cached.set(row.trunk, segments(arm, row.trunk));
          const top = Math.floor(i * y * ratio), bottom = Math.ceil((i + 1) * y * ratio);
          for (const [start, end, number] of cached.get(row.trunk)) {
            if ((number === 0) !== first) continue;
            const left = Math.floor(start * x * ratio), right = Math.ceil(end * x * ratio);
            context.fillStyle = palette[number];
            context.fillRect(left, top, right - left, bottom - top);
          }
        });
      }
      const hatching = hatch(context, ratio);
      rows.forEach(({ latent }, i) => {
        if (latent === null) return;
        const [left, right] = latent.map((token) => Math.floor(token * x * ratio));
        const top = Math.floor(i * y * ratio);
        context.fillStyle = hatching;
        context.fillRect(left, top, right - left, Math.ceil((i + 1) * y * ratio) - top);
      });
      context.scale(ratio, ratio);
      context.fillStyle = colour("soft");
      context.font = "12px system-ui, sans-serif";
      context.textBaseline = "top";
      const step = niceStep(nTokens / (width / 70));
      for (let token = 1; token <= nTokens; token = token === 1 && step > 1 ? step : token + step) {
        context.textAlign = token === 1 ? "left" : (token - 0.5) * x > width - 20 ? "right" : "center";
        context.fillText(String(token), (token - 0.5) * x, height + 6);
        context.fillRect((token - 0.5) * x, height + 1, 1, 4);
      }
      if (at) {
        context.strokeStyle = colour("ink");
        context.lineWidth = 1;
        context.strokeRect(at.token * x + 0.5, 0.5, Math.max(x - 1, 2), height - 1);
        context.strokeRect(0.5, at.row * y + 0.5, width - 1, Math.max(y - 1, 2));
      }
    }

    function sort() {
      rows = [...arm.rows].sort(orders[order.value](arm));
      if (width) draw(width);
    }

    function show(row, token) {
      at = {
        row: Math.min(rows.length - 1, Math.max(0, row)),
        token: Math.min(nTokens - 1, Math.max(0, token)),
      };
      const { sample, trial, load, size, slot, latent, trunk: index } = rows[at.row];
      const { completion, count } = arm.trunks[index];
      status.replaceChildren(
        `Sample ${sample}, trial ${trial}: ${arm.loads[load]}, batch ${size}, slot ${slot} · completion ${completion} (${count} of ${arm.n_samples})${latent ? ` · other bits from ${data.unit} ${latent[0] + 1} on` : ""} · ${data.unit} ${at.token + 1}: `,
      );
      const own = tokens(arm, index);
      if (own === null) status.append("text in completions.csv");
      else if (at.token >= own.length) status.append("ended before");
      else {
        const before = text(own.subarray(Math.max(0, at.token - CONTEXT), at.token));
        status.append(
          element("code", `…${before}`, "shared"),
          element("code", text(own.subarray(at.token, at.token + 1)), "fork"),
          element("code", `${text(own.subarray(at.token + 1, at.token + 1 + CONTEXT))}…`, "shared"),
        );
      }
      draw(width);
    }

    function point(event) {
      const box = canvas.getBoundingClientRect();
      const row = Math.floor(((event.clientY - box.top) / height) * rows.length);
      show(row, Math.floor(((event.clientX - box.left) / box.width) * nTokens));
    }

    function compare() {
      const { completion } = arm.trunks[rows[at.row].trunk];
      report.compare(Number(figure.dataset.probe), Number(figure.dataset.arm), completion);
    }

    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("dblclick", compare);
    canvas.addEventListener("focus", () => at ?? show(0, 0));
    canvas.addEventListener("keydown", (event) => {
      const far = event.shiftKey ? 10 : 1;
      const moves = { ArrowLeft: [0, -far], ArrowRight: [0, far], ArrowUp: [-far, 0], ArrowDown: [far, 0], Home: [0, -nTokens], End: [0, nTokens] };
      if (event.key === "Enter") compare();
      else if (moves[event.key]) show(at.row + moves[event.key][0], at.token + moves[event.key][1]);
      else return;
      event.preventDefault();
    });
    order.addEventListener("change", sort);
    sort();
    whenShown(canvas, draw);
  });
})();
