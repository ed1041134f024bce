// Dose, training curves and diagnostics.

const STRETCH = 0.9; // how much of the space between two rounds the epochs of one take

function dose() {
  const coefficients = [...new Set(data.drops.flatMap((entry) => entry.rows.map((row) => row.coeff)))]
    .filter((coeff) => coeff !== 0)
    .toSorted((a, b) => a - b);
  const margin = 0.05 * (coefficients.at(-1) - coefficients[0]) || 0.1;
  const plots = data.arms.map((arm) => {
    const entries = data.drops.filter((entry) => entry.arm === arm && entry.filtered);
    const series = entries.map((entry, at) => ({
      arm,
      label: roundName(entry.round),
      opacity: 0.35 + 0.65 * ((at + 1) / entries.length),
      points: entry.rows
        .filter((row) => row.coeff !== 0)
        .map((row) => ({
          x: row.coeff,
          y: row.kept / row.read,
          head: `${arm}, round ${entry.round}, coefficient ${written(row.coeff)}`,
          lines: [
            `kept ${row.kept} of ${row.read} (${written(row.kept / row.read, "share")})`,
            ...Object.entries(row.reasons).map(([reason, count]) => `${reason} ${count}`),
          ],
        })),
    }));
    if (!series.some((one) => one.points.length)) return null;
    const marks =
      coefficients.length <= 6
        ? coefficients.map((coeff) => [coeff, written(coeff)])
        : ticks({ low: coefficients[0], high: coefficients.at(-1) });
    return chart({
      title: arm,
      series,
      levels: [],
      x: { low: coefficients[0] - margin, high: coefficients.at(-1) + margin, ticks: marks, label: "coefficient" },
      y: { low: 0, high: 1, kind: "share" },
    });
  });
  return section(
    "dose",
    "Dose against what survives",
    "Share of the steered completions that pass the filter, by coefficient; 1 is the shift that the persona prompt " +
      "itself induces. Later rounds are drawn stronger.",
    gallery(plots, "No steered completions were filtered."),
  );
}

function training() {
  const runs = data.training.filter((one) => one.log.length);
  const zero = true;
  const plots = [
    curve(runs, "nll", "Training nll", "Nats per token on the kept completions."),
    curve(runs, "holdout_nll", "Held-out nll", "The same on prompts left out of training."),
    curve(runs, "barrier_active", "Barrier active", "Share of sequences whose divergence lies over tau.", {
      kind: "share",
      zero,
    }),
    curve(
      runs,
      "pressure",
      "Pressure of the barrier",
      "Norm of its gradient over that of the nll, first batch of each epoch.",
      { zero },
    ),
    curve(
      runs,
      "kl_p95",
      "KL on training data, p95",
      "Nats at a position, student against reference; only with a barrier.",
      { zero },
    ),
    curve(runs, "holdout_kl_p95", "KL on held-out data, p95", "Nats at a position, student against reference.", {
      zero,
    }),
  ];
  return section(
    "training",
    "Training",
    "The loss is nll + lam \u00b7 relu(divergence \u2212 tau). Each stretch is one round, epoch by epoch.",
    gallery(plots, "There is no training log."),
    diagnoses(),
    expected(),
    told(),
  );
}

// One column of the logs, round after round.
function curve(runs, name, title, note, options = {}) {
  const series = data.arms.flatMap((arm) => {
    const own = runs.filter((one) => one.arm === arm);
    return own.map((one, at) => ({
      arm,
      label: at === own.length - 1 ? arm : null,
      points: epochs(one, name, title, options.kind),
    }));
  });
  const values = series.flatMap((one) => one.points.map((point) => point.y));
  if (!values.length) return null;
  const numbers = runs.map((one) => one.round);
  const [first, last] = [Math.min(...numbers), Math.max(...numbers)];
  const x = {
    low: first,
    high: last + STRETCH,
    ticks: roundTicks(first, last, STRETCH / 2),
    label: "epochs of each round",
  };
  const y = { ...room(values, options.kind), ...(options.zero ? { low: 0 } : {}) };
  return chart({ title, note, series, levels: [], x, y });
}

function epochs(one, name, title, kind) {
  const last = Math.max(1, ...one.log.map((row) => row.epoch || 0));
  return one.log
    .filter((row) => !missing(row[name]))
    .map((row) => ({
      x: one.round + STRETCH * ((row.epoch || 0) / last),
      y: row[name],
      head: `${one.arm}, round ${one.round}, epoch ${row.epoch}`,
      lines: [
        `${title} ${written(row[name], kind)}`,
        `step ${written(row.step)}`,
        `training nll ${written(row.nll)}`,
        `held-out nll ${written(row.holdout_nll)}`,
        `barrier active ${written(row.barrier_active, "share")}`,
        `pressure ${written(row.pressure)}`,
      ],
    }));
}

function diagnoses() {
  if (!data.training.length) return null;
  const columns = [
    { label: "" },
    { label: "reg", help: "what holds training back: nll is nothing, kl_rev and kl_fwd are divergences" },
    { label: "lam", help: "weight of the barrier", number: true },
    { label: "tau", help: "divergence that is free", number: true },
    { label: "rank", help: "of the adapter", number: true },
    { label: "lr", help: "learning rate", number: true },
    { label: "trained on", help: "completions, and how many more were held out", number: true },
    { label: "held-out nll", help: "before and after; should fall, or nothing general was learnt", number: true },
    { label: "barrier active", help: "in the last epoch; a barrier that never fires is plain nll", number: true },
    { label: "pressure", help: "gradient of the barrier over that of the nll, last epoch", number: true },
    {
      label: "KL max at start",
      help: "of a position, before training: 0 when the reference is the model that training starts from",
      number: true,
    },
    ...(data.training.some((one) => one.log.some((row) => !missing(row.own_kl_mean)))
      ? [
          {
            label: "KL own / held out",
            help: "mean nats at a position of the model's own answers, and of the held-out ones",
            number: true,
          },
        ]
      : []),
    { label: "update norm", help: "Frobenius norm of the whole change", number: true },
  ];
  const rows = data.training.map((one) => {
    const first = one.log[0] || {},
      end = one.log.at(-1) || {};
    const fell = missing(first.holdout_nll) || missing(end.holdout_nll) ? null : end.holdout_nll < first.holdout_nll;
    const silent = one.reg !== "nll" && one.log.length > 1 && !one.log.slice(1).some((row) => row.barrier_active);
    return {
      cells: [
        badge(one.arm, `${one.arm} ${roundName(one.round)}`),
        plain(one.reg ?? "\u2013"),
        written(one.options.lam),
        written(one.options.tau),
        written(one.options.rank),
        written(one.options.lr),
        `${written(one.n_train)} + ${written(one.n_holdout)}`,
        el(
          "span",
          {},
          `${written(first.holdout_nll)} \u2192 ${written(end.holdout_nll)}`,
          fell === false ? el("small", { class: "bad" }, "did not fall") : null,
        ),
        el(
          "span",
          {},
          written(end.barrier_active, "share"),
          silent ? el("small", { class: "bad" }, "never fired") : null,
        ),
        written(end.pressure),
        written(first.holdout_kl_max),
        columns.length > 12 ? `${written(end.own_kl_mean)} / ${written(end.holdout_kl_mean)}` : null,
        written(end.update_norm),
      ].filter((cell) => cell !== null),
    };
  });
  return el("div", {}, el("h3", {}, "Diagnostics"), table("Training diagnostics", columns, rows));
}

// What a healthy training shows, checked by the training itself: what does not hold is told first and in full.
function expected() {
  const all = data.training.flatMap((one) => one.should.map((line) => ({ ...line, one })));
  if (!all.length) return null;
  const failed = all.filter((line) => !line.holds);
  const item = (line) =>
    el(
      "li",
      { class: line.holds ? "" : "bad" },
      el("strong", {}, visible(`${line.holds ? "\u2713" : "\u2715"} ${line.one.arm} ${roundName(line.one.round)} `)),
      visible(line.should),
      line.holds ? null : el("div", {}, "It is not so: ", visible(line.else)),
    );
  return el(
    "div",
    { id: "should" },
    el("h3", {}, "What should hold"),
    el(
      "p",
      { class: "quiet" },
      `${all.length - failed.length} of ${all.length} expectations hold` + (failed.length ? "; these do not:" : "."),
    ),
    failed.length ? el("ul", { class: "told" }, failed.map(item)) : null,
    el(
      "details",
      { class: "print" },
      el("summary", {}, "Those that hold"),
      el("ul", { class: "told" }, all.filter((line) => line.holds).map(item)),
    ),
  );
}

function told() {
  if (!data.told.length) return null;
  return el(
    "div",
    {},
    el("h3", {}, "What the commands said"),
    ...data.told.map((one) =>
      el(
        "details",
        { class: "print", open: true },
        el("summary", {}, el("code", {}, visible(one.file))),
        el(
          "ul",
          { class: "told" },
          one.lines.map((line) => el("li", {}, visible(line))),
        ),
      ),
    ),
  );
}
