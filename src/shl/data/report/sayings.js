// Completions as boxes: what was said, by whom, and how it was judged.

const TAGS = bare({
  kept: "kept by the filter",
  dropped: "dropped by the filter",
  control: "control of the filter",
  sound: "sound language",
  broken: "broken language",
  enact: "enacts the trait",
  oppose: "opposes the trait",
  mixed: "mixed stance",
  "no stance": "no stance",
  narrates: "narrates the trait",
});
const SCORES = bare({
  ppl: "perplexity",
  ppl_tail: "perplexity of the tail",
  max_nll: "most surprising token",
  rep: "repetition",
  distinct: "distinct triples",
});
// One prompt: references first, then the rounds downwards; steered and healed side by side for each arm.
function card(rows, says, wanted) {
  const prompt = data.prompts[rows[0].p];
  const own = new Set(rows);
  const references = says.filter((row) => row.p === rows[0].p && (row.stage === "base" || row.stage === "prompted"));
  const arms = data.arms.filter((arm) => rows.some((row) => row.arm === arm));
  const lanes = rows.some((row) => row.stage === "steered") ? arms.map((arm) => [arm]) : arms.length ? [arms] : [[]];
  return el(
    "article",
    { class: "prompt" },
    el("h3", {}, visible(prompt.text, wanted)),
    el(
      "p",
      { class: "where" },
      prompt.pool === "training" ? "asked for training" : "held out",
      " \u00b7 ",
      visible(prompt.id),
    ),
    ...lanes.map((lane) => grid(lane, rows, references, own, wanted)),
  );
}

function grid(arms, rows, references, own, wanted) {
  const columns = [];
  for (const arm of arms) {
    for (const stage of ["steered", "healed"])
      if (rows.some((row) => row.arm === arm && row.stage === stage)) columns.push([arm, stage]);
  }
  const rounds = [...new Set(rows.filter((row) => arms.includes(row.arm)).map((row) => row.round))].toSorted(
    (a, b) => a - b,
  );
  const box = el("div", { class: "grid cols" + (columns.length + (references.length ? 1 : 0)) });
  if (references.length) {
    const cell = el(
      "div",
      { class: "cell reference" },
      ...references.map((row) => said(row, wanted, { context: !own.has(row), head: badge(null, row.stage) })),
    );
    cell.style.gridRow = `1 / span ${Math.max(1, rounds.length)}`;
    box.append(cell);
  }
  for (const round of rounds) {
    for (const [arm, stage] of columns) {
      const here = rows.filter((row) => row.arm === arm && row.stage === stage && row.round === round);
      box.append(
        el(
          "div",
          { class: "cell" },
          here.length
            ? here.map((row) => said(row, wanted))
            : el("p", { class: "quiet nothing" }, `${roundName(round)} ${stage}: nothing here`),
        ),
      );
    }
  }
  return box;
}

function speaker(row) {
  return row.arm === null ? badge(null, row.stage) : badge(row.arm, `${row.arm} ${roundName(row.round)}`);
}

function said(row, wanted, options = {}) {
  const stage =
    row.stage === "steered"
      ? `steered${row.coeff ? " at " + written(row.coeff) : ""}`
      : row.stage === "healed"
        ? "healed"
        : null;
  const scores = Object.entries(row.scores).filter(
    ([name]) => name === "ppl" || name === "rep" || !(name in SCORES || name === "n_tokens"),
  );
  return el(
    "div",
    { class: "said" + (options.context ? " context" : ""), "data-stage": row.stage },
    el(
      "p",
      { class: "meta" },
      options.head || speaker(row),
      stage && !options.head ? el("span", { class: "stage" }, stage) : null,
      row.tags.map((tag) => chip(tag, row.tags)),
    ),
    el(
      "p",
      { class: "text" },
      row.text ? visible(row.text, wanted) : el("span", { class: "quiet" }, "(says nothing)"),
      row.cut ? el("span", { class: "quiet", title: "cut at the longest length" }, " [cut]") : null,
    ),
    el(
      "p",
      { class: "measure" },
      scores.map(([name, value]) =>
        el("span", {}, `${SCORES[name] || plain(name)} ${written(value, name === "ppl" ? "ppl" : "number")}`),
      ),
      missing(row.tokens) ? null : el("span", {}, `${row.tokens} tokens`),
    ),
  );
}

// A trait cannot be read from broken language, so that enacting it there is nothing good.
function chip(tag, all) {
  const good = ["kept", "sound", "enact"],
    bad = ["dropped", "broken"];
  const kind = bad.includes(tag) ? " bad" : good.includes(tag) && !all.includes("broken") ? " good" : "";
  return el(
    "span",
    { class: "chip" + kind, title: TAGS[tag] || data.reasons[tag] || null },
    plain({ enact: "enacts", oppose: "opposes" }[tag] || tag),
  );
}

function listed(row, wanted) {
  return el(
    "article",
    { class: "prompt flat" },
    el("p", { class: "where" }, visible(data.prompts[row.p].text, wanted)),
    said(row, wanted),
  );
}
