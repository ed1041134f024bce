// Tables that explain their columns.

// columns: {label, help, number}; rows: lists of cells, each a string or a node; a row may have a class.
function table(label, columns, rows, options = {}) {
  const head = columns.map((column) =>
    el("th", { scope: "col", class: column.number ? "number" : null }, column.label),
  );
  const body = rows.map((row) => {
    const cells = row.cells.map((cell, at) =>
      el(at === 0 ? "th" : "td", { scope: at === 0 ? "row" : null, class: columns[at].number ? "number" : null }, cell),
    );
    return el("tr", { class: row.class || null }, cells);
  });
  const scroller = el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    el(
      "table",
      {},
      el("caption", { class: "hidden" }, label),
      el("thead", {}, el("tr", {}, head)),
      el("tbody", {}, body),
    ),
  );
  return el("div", { class: "tabled" }, scroller, legend(columns, options.legend));
}

function legend(columns, open = false) {
  const told = columns.filter((column) => column.help);
  if (!told.length) return null;
  const terms = told.map((column) => el("div", {}, el("dt", {}, column.label), el("dd", {}, column.help)));
  return el("details", { class: "legend", open }, el("summary", {}, "What the columns mean"), el("dl", {}, terms));
}

const ARROWS = { up: " \u2191", down: " \u2193" };

function metricColumn(name) {
  const metric = metricOf(name);
  const better = { up: "; higher is better", down: "; lower is better" }[metric.better] || "";
  return {
    label: plain(metric.short) + (ARROWS[metric.better] || ""),
    help: metric.meaning ? metric.meaning + better : plain(name),
    number: true,
  };
}

// A metric with its difference to base underneath, and its interval on hover.
function metricCell(row, name) {
  const metric = metricOf(name);
  const value = row.metrics[name];
  if (missing(value)) return el("span", { class: "quiet", title: plain(row.why[name] || "not measured") }, "\u2013");
  const bounds = row.ci[name];
  const title = bounds
    ? "95% interval " + written(bounds[0], metric.kind) + " to " + written(bounds[1], metric.kind)
    : null;
  const delta = row.delta[name];
  return el(
    "span",
    { title },
    written(value, metric.kind),
    missing(delta) ? null : el("small", {}, signed(delta, metric.kind)),
  );
}

function scoreName(row) {
  if (row.kind === "base" || row.kind === "prompted") return badge(null, row.kind);
  const what = row.kind === "steered" ? " steered" + (missing(row.coeff) ? "" : " at " + written(row.coeff)) : "";
  return badge(row.arm, row.arm + " " + roundName(row.round) + what);
}

function verdictChip(verdict) {
  const word = verdict.split(":")[0];
  if (!["coherent", "broken", "collapsed"].includes(word)) return el("span", { class: "quiet" }, "no verdict");
  const why = word !== "coherent" ? verdict.slice(word.length + 1).trim() : "";
  return el(
    "span",
    { class: "verdict" },
    el("span", { class: "chip " + word }, (word !== "coherent" ? "\u2715 " : "\u2713 ") + word),
    why ? el("small", {}, visible(why)) : null,
  );
}

function scoreTable(label, rows, names, options) {
  const columns = [
    { label: "" },
    { label: "verdict", help: "of shl eval: broken when a reading of coherence is outside its bounds, collapsed when the trait is far " +
        "beyond the prompt's while answers depend less on the question" },
    ...names.map(metricColumn),
  ];
  const cells = rows.map((row) => ({
    cells: [scoreName(row), verdictChip(row.verdict), ...names.map((name) => metricCell(row, name))],
  }));
  return table(label, columns, cells, options);
}

// A share as a number and a bar.
function bar(part, whole) {
  const share = whole ? part / whole : 0;
  const fill = svg(
    "svg",
    { class: "bar", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: "track", width: 100, height: 8 }),
    svg("rect", { class: "filled", width: 100 * share, height: 8 }),
  );
  return el("span", { class: "barred" }, fill, written(share, "share"));
}

// The rounds of one arm, coefficient by coefficient.
function dropTable(arm, entries) {
  const reasons = Object.keys(data.reasons)
    .concat([...new Set(entries.flatMap((entry) => entry.reasons))].filter((reason) => !(reason in data.reasons)))
    .filter((reason) => reason !== "control" && entries.some((entry) => entry.reasons.includes(reason)));
  const columns = [
    { label: "round" },
    {
      label: "coefficient",
      help: "multiple of the steering vector; 0 is a control, scored but not trained on",
      number: true,
    },
    { label: "read", help: "completions at this coefficient", number: true },
    { label: "kept", help: "worth training on", number: true },
    { label: "share kept", help: "kept of read" },
    ...reasons.map((reason) => ({
      label: plain(reason),
      help: data.reasons[reason] || "a reason of your own",
      number: true,
    })),
  ];
  return table(
    `What the filter dropped of ${plain(arm)}`,
    columns,
    entries.flatMap((entry) => dropRows(entry, reasons)),
    { legend: true },
  );
}

function dropRows(entry, reasons) {
  const count = (value) => (value ? String(value) : el("span", { class: "quiet" }, "0"));
  const rows = entry.rows.map((row, at) => ({
    class: (row.coeff === 0 ? "quiet" : "") + (at === 0 ? " first" : ""),
    cells: [
      at === 0 ? roundName(entry.round) : "",
      written(row.coeff),
      row.read,
      entry.filtered && (row.coeff !== 0 || row.kept) ? row.kept : "\u2013",
      row.coeff === 0 || !entry.filtered ? "" : bar(row.kept, row.read),
      ...reasons.map((reason) => count(row.reasons[reason])),
    ],
  }));
  const treated = entry.rows.filter((row) => row.coeff !== 0);
  const total = (key) => treated.reduce((sum, row) => sum + (key(row) || 0), 0);
  const [read, kept] = [total((row) => row.read), total((row) => row.kept)];
  const all = {
    class: "total",
    cells: [
      "",
      "all",
      read,
      entry.filtered ? kept : "\u2013",
      entry.filtered ? bar(kept, read) : "not filtered yet",
      ...reasons.map((reason) => count(total((row) => row.reasons[reason]))),
    ],
  };
  return treated.length > 1 || !entry.filtered ? [...rows, all] : rows;
}

// Where the reasons come from, said once for all rounds of which it is true, and where they cannot be right.
function dropSources(entries) {
  const told = new Map();
  for (const entry of entries)
    if (entry.source) told.set(entry.source, [...(told.get(entry.source) || []), roundName(entry.round)]);
  const counts = (name) =>
    entries
      .filter((entry) => entry[name])
      .map((entry) => `${roundName(entry.round)} ${entry[name]}`)
      .join(", ");
  const doubts = [
    counts("against") && `kept although these limits would drop them: ${counts("against")}`,
    counts("silent") && `dropped although these limits would keep them: ${counts("silent")}`,
  ].filter(Boolean);
  const lines = [...told.entries()].map(([source, rounds]) => `${rounds.join(", ")}: ${source}.`);
  if (doubts.length)
    lines.push(`So these rounds were filtered with other limits or by another version; ${doubts.join("; ")}.`);
  return lines.map((line) => el("p", { class: "source" }, line));
}
