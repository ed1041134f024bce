// The trait and the coherences over the rounds: a line for each arm, base and prompted as levels.

const FLOOR = data.floor; // the log axis of 1 - coherence ends here: a perfect score lies on it

const reference = (kind) => data.scores.find((row) => row.kind === kind);

// y gives the axis for the values that are drawn, cost what is drawn for a metric's value.
function overRounds(name, title, note, y, cost) {
  const base = reference("base");
  const start = base && !missing(base.metrics[name]);
  const numbers = data.scores.map((row) => row.round).filter((round) => !missing(round));
  const [first, last] = numbers.length ? [Math.min(...numbers), Math.max(...numbers)] : [0, 0];
  const origin = start ? [{ x: first - 1, y: cost(base.metrics[name]), silent: true, lines: [] }] : [];
  const path = (arm, kind) =>
    data.scores.filter((row) => row.arm === arm && row.kind === kind).map((row) => spot(row, name, cost));
  const series = data.arms.flatMap((arm) => {
    const points = path(arm, "healed");
    return [
      { arm, label: arm, points: points.length ? [...origin, ...points] : [] },
      { arm, hollow: true, line: false, points: path(arm, "steered") },
    ];
  });
  const levels = ["base", "prompted"]
    .map(reference)
    .filter((row) => row && !missing(row.metrics[name]))
    .map((row) => ({ ...spot(row, name, cost), name: row.kind, dashed: row.kind === "prompted" }));
  const values = [...series.flatMap((one) => one.points), ...levels]
    .flatMap((one) => [one.y, one.low, one.high])
    .filter((value) => !missing(value));
  if (!values.length) return null;
  const marks = [...(start ? [[first - 1, "base"]] : []), ...roundTicks(first, last)];
  const x = { low: start ? first - 1 : first, high: last, label: "round", ticks: marks };
  return chart({ title, note, series, levels, x, y: y(values) });
}

// One evaluation as a point, with what is told about it on hover.
function spot(row, name, cost) {
  const { short, kind } = metricOf(name);
  const bounds = row.ci[name];
  const [low, high] = bounds ? bounds.map(cost).toSorted((a, b) => a - b) : [null, null];
  const lines = [`${short} ${written(row.metrics[name], kind)}`];
  if (bounds) lines.push(`95% interval ${written(bounds[0], kind)} to ${written(bounds[1], kind)}`);
  if (!missing(row.delta[name])) lines.push(`${signed(row.delta[name], kind)} against base`);
  if (!missing(row.retain[name])) lines.push(`keeps ${written(row.retain[name], "share")} of the steered shift`);
  if (row.verdict) lines.push(shorten(row.verdict, 90));
  const steered = row.kind === "steered" ? ", steered" : "";
  const head = missing(row.round) ? row.kind : `${row.arm}, round ${row.round}${steered}`;
  return { x: row.round, y: missing(row.metrics[name]) ? null : cost(row.metrics[name]), low, high, head, lines };
}

// At most eight rounds are named, however many there are.
function roundTicks(first, last, offset = 0) {
  const every = Math.ceil((last - first + 1) / 8);
  const count = Math.floor((last - first) / every) + 1;
  return Array.from({ length: count }, (_, at) => first + at * every).map((round) => [round + offset, "r" + round]);
}

function room(values, kind) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const margin = 0.06 * (high - low || Math.abs(high) || 1);
  return kind === "share"
    ? { low: Math.max(0, low - margin), high: Math.min(1, high + margin), kind }
    : { low: low - margin, high: high + margin, kind };
}

function trajectory() {
  const titles = { auth_nats: "ln p(authority): lower is less deference", care_nats: "ln p(care)" };
  const titleOf = (name) =>
    titles[name] ||
    (name.startsWith("enact_") && `Free answers that enact ${name.slice(6)}`) ||
    (name.startsWith("agree_") && `Agreement with the persona: ${name.slice(6)}`) ||
    metricOf(name).short;
  const plots = data.traits.map((name) =>
    overRounds(
      name,
      titleOf(name),
      null,
      (values) => room(values, metricOf(name).kind),
      (value) => value,
    ),
  );
  return section(
    "trajectory",
    "The trait over the rounds",
    "Each arm starts from base. Thin bars are 95% intervals over items; hollow marks are the steered model, " +
      "before healing.",
    gallery(plots, "No trait was measured."),
  );
}

function coherence() {
  const decades = (values) => ({ low: FLOOR, high: 1, log: true, floor: FLOOR, kind: "number" });
  const cost = (value) => Math.max(FLOOR, 1 - value);
  const plots = [
    overRounds(
      "p_ans_any",
      "1 \u2212 answer mass",
      "Probability that does not lie on any of the digits asked for.",
      decades,
      cost,
    ),
    overRounds("json_is_valid", "1 \u2212 valid JSON", "Free replies that are not the JSON asked for.", decades, cost),
    overRounds(
      "broken",
      "Broken free answers",
      "1 \u2212 the share that the independent judge finds sound.",
      decades,
      (value) => Math.max(FLOOR, value),
    ),
    overRounds(
      "free_ppl_p90",
      "p90 perplexity of free answers",
      "Under the base model; 1 is no surprise at all.",
      (values) => ({ low: 1, high: Math.max(3, 1.1 * Math.max(...values)), log: true, kind: "ppl" }),
      (value) => Math.max(1, value),
    ),
  ];
  return section(
    "coherence",
    "What it costs in coherence",
    "On log scales, down is better. The lowest line of 1 \u2212 coherence holds all that is below it.",
    gallery(plots, "No coherence was measured."),
  );
}

function gallery(plots, nothing) {
  const found = plots.filter(Boolean);
  return found.length
    ? el("div", { class: "gallery" + (found.length === 4 ? " four" : "") }, found)
    : el("p", { class: "quiet" }, nothing);
}
