"use strict";
// The whole text of a branch that is opened, and any two completions side by side.
(() => {
  const { data, tokens, text, trunkOf, element } = report;
  const SHOWN_OF_SHARED = 60;
  const PATIENCE_MS = 2000;

  document.querySelectorAll("pre[data-completion]").forEach((node) => {
    node.closest("details").addEventListener("toggle", () => {
      const { probe, arm, completion, start, stop } = node.dataset;
      const own = data.probes[probe].arms[arm];
      const found = tokens(own, trunkOf(own, Number(completion)));
      if (found) node.textContent = text(found.subarray(Number(start), Number(stop)));
    }, { once: true });
  });

  function sharedPrefix(a, b) {
    let n = 0;
    while (n < a.length && n < b.length && a[n] === b[n]) n++;
    return n;
  }

  // Both completions as nodes: what only the left has, and only the right, is marked.
  function sides(a, b) {
    const n = sharedPrefix(a, b);
    const head = n > SHOWN_OF_SHARED ? `⋯ ${n - SHOWN_OF_SHARED} ${data.unit}s\n` : "";
    const shared = head + text(a.subarray(Math.max(0, n - SHOWN_OF_SHARED), n));
    const found = [[element("span", shared, "shared")], [element("span", shared, "shared")]];
    const rests = [Array.from(a.subarray(n)), Array.from(b.subarray(n))];
    const parts = Diff.diffArrays(...rests, { timeout: PATIENCE_MS }) ?? [
      { removed: true, value: rests[0] },
      { added: true, value: rests[1] },
    ];
    for (const { added, removed, value } of parts) {
      if (!added) found[0].push(element(removed ? "del" : "span", text(value)));
      if (!removed) found[1].push(element(added ? "ins" : "span", text(value)));
    }
    return { n, found };
  }

  function pickers(section, probe) {
    const selects = [section.querySelector("select.left"), section.querySelector("select.right")];
    const status = section.querySelector(".status");
    const panes = section.querySelectorAll("pre");
    const several = probe.arms.length > 1;
    const options = probe.arms.flatMap((arm, i) =>
      arm.trunks.slice(0, arm.n_with_tokens).map(({ completion: id, start, count }) => ({
        value: `${i}/${id}`,
        label: `${several ? `${arm.arm} ` : ""}${id}: ${count} of ${arm.n_samples}${id === arm.reference ? ", the reference" : start ? `, leaves at ${data.unit} ${start + 1}` : ""}`,
      })),
    );
    selects.forEach((select) => select.append(...options.map(({ value, label }) => Object.assign(element("option", label), { value }))));

    function chosen(select) {
      const [arm, completion] = select.value.split("/").map(Number);
      return tokens(probe.arms[arm], trunkOf(probe.arms[arm], completion));
    }

    function show() {
      const [a, b] = selects.map(chosen);
      const { n, found } = sides(a, b);
      const equal = n === a.length && n === b.length;
      status.textContent = equal
        ? `The same ${n} ${data.unit}s.`
        : `${n} ${data.unit}${n === 1 ? "" : "s"} in common; they part at ${data.unit} ${n + 1}. ${a.length} ${data.unit}s on the left, ${b.length} on the right.`;
      panes.forEach((pane, i) => pane.replaceChildren(...found[i]));
    }

    selects.forEach((select) => select.addEventListener("change", show));
    section.querySelector(".swap").addEventListener("click", () => {
      [selects[0].value, selects[1].value] = [selects[1].value, selects[0].value];
      show();
    });
    if (options.length) {
      selects[1].selectedIndex = Math.min(1, options.length - 1);
      show();
    }
    return (arm, completion) => {
      const value = `${arm}/${completion}`;
      if (!options.some((option) => option.value === value)) return;
      selects[1].value = value;
      if (selects[0].value === value) selects[0].selectedIndex = selects[0].selectedIndex ? 0 : 1;
      show();
      section.scrollIntoView({ block: "start" });
      selects[1].focus({ preventScroll: true });
    };
  }

  const showers = new Map();
  document.querySelectorAll(".diff").forEach((section) => {
    showers.set(Number(section.dataset.probe), pickers(section, data.probes[section.dataset.probe]));
  });
  report.compare = (probe, arm, completion) => showers.get(probe)?.(arm, completion);
  document.querySelectorAll("button.compare").forEach((button) => {
    const { probe, arm, completion } = button.dataset;
    button.addEventListener("click", () => report.compare(Number(probe), Number(arm), Number(completion)));
  });
})();
