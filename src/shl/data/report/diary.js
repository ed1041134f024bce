// The diary: what was said to each prompt down the rounds, searched, filtered and sorted.

const STAGES = ["base", "prompted", "steered", "healed"];
const STEP = { prompt: 8, list: 40 };

function diary() {
  const says = data.says.map((row, at) => ({ ...row, at, low: row.text.toLowerCase() }));
  const asked = data.prompts.map((prompt) => prompt.text.toLowerCase());
  const view = { shown: 1 };
  const results = el("div", { id: "said" });
  const count = el("p", { class: "count", id: "count", role: "status" });
  const form = controls(says, () => {
    view.shown = 1;
    refresh();
  });
  const more = el(
    "button",
    {
      type: "button",
      id: "more",
      onclick: () => {
        view.shown += 1;
        refresh();
      },
    },
    "Show more",
  );
  const all = el(
    "button",
    {
      type: "button",
      onclick: () => {
        view.shown = Infinity;
        refresh();
      },
    },
    "Show all",
  );
  const rest = el("p", { class: "more" }, more, " ", all);

  function refresh() {
    const chosen = Object.fromEntries(new FormData(form));
    const wanted = chosen.search.trim().toLowerCase();
    const found = says.filter((row) => matches(row, chosen, wanted, asked));
    const groups =
      chosen.view === "list" ? sorted(found, chosen.sort).map((row) => [row]) : byPrompt(found, chosen.sort);
    const step = STEP[chosen.view];
    const some = groups.slice(0, view.shown * step);
    const prompts = new Set(found.map((row) => row.p)).size;
    const many = (number) => number.toLocaleString("en");
    count.textContent =
      `${many(found.length)} of ${many(says.length)} completions, ` +
      `to ${many(prompts)} of ${many(data.prompts.length)} prompts`;
    results.replaceChildren(
      ...some.map((rows) => (chosen.view === "list" ? listed(rows[0], wanted) : card(rows, says, wanted))),
    );
    rest.hidden = some.length >= groups.length;
    more.textContent = `Show ${Math.min(step, groups.length - some.length)} more`;
  }
  refresh();
  return section(
    "diary",
    "What it says",
    "Every completion that the run kept a record of, by prompt and down the rounds. " +
      "Steered: the model of the round before, with the round\u2019s vector, asked for training. " +
      "Healed: after the round\u2019s training, nothing added. " +
      "Answers to training prompts after a round are the controls of the next.",
    form,
    count,
    results,
    rest,
  );
}

function matches(row, chosen, wanted, asked) {
  if (chosen.arm && (chosen.arm.startsWith("=") ? row.arm !== chosen.arm.slice(1) : row.stage !== chosen.arm))
    return false;
  if (chosen.round && String(row.round) !== chosen.round) return false;
  if (chosen.stage && row.stage !== chosen.stage) return false;
  if (chosen.pool && data.prompts[row.p].pool !== chosen.pool) return false;
  if (chosen.judgement === "-" ? row.tags.length : chosen.judgement && !row.tags.includes(chosen.judgement))
    return false;
  return !wanted || row.low.includes(wanted) || asked[row.p].includes(wanted);
}

// "score:ppl:down" and the like; rows without the score come last.
function keyOf(sort) {
  const [kind, name, way] = sort.split(":");
  const sign = way === "down" ? -1 : 1;
  const read = {
    score: (row) => row.scores[name],
    tokens: (row) => row.tokens,
    round: (row) => row.round,
    text: (row) => row.text.length,
  }[kind];
  return (
    read &&
    ((row) => {
      const value = read(row);
      return missing(value) ? Infinity : sign * value;
    })
  );
}

function sorted(rows, sort) {
  const key = keyOf(sort);
  return key
    ? rows.toSorted((a, b) => compare(key(a), key(b)) || a.at - b.at)
    : rows.toSorted((a, b) => a.p - b.p || a.at - b.at);
}

const compare = (a, b) => (a === b ? 0 : a < b ? -1 : 1);

function byPrompt(rows, sort) {
  const groups = new Map();
  for (const row of rows) groups.set(row.p, [...(groups.get(row.p) || []), row]);
  const key = keyOf(sort);
  const best = (group) => group.reduce((least, row) => Math.min(least, key(row)), Infinity);
  const list = [...groups.entries()].map(([prompt, group]) => ({ prompt, group, rank: key ? best(group) : 0 }));
  return list.toSorted((a, b) => compare(a.rank, b.rank) || a.prompt - b.prompt).map((one) => one.group);
}

function choice(name, label, options) {
  const list = options.map(([value, text]) => el("option", { value }, plain(text)));
  return field(name, label, el("select", { name, id: "by-" + name }, list));
}

function field(name, label, input) {
  return el("div", { class: "field for-" + name }, el("label", { for: "by-" + name }, label), input);
}

function controls(says, changed) {
  const tags = new Map();
  for (const tag of says.flatMap((row) => row.tags)) tags.set(tag, (tags.get(tag) || 0) + 1);
  const rounds = [...new Set(says.map((row) => row.round).filter((round) => !missing(round)))].toSorted(
    (a, b) => a - b,
  );
  const scores = [...new Set(says.flatMap((row) => Object.keys(row.scores)))].filter((name) => name !== "n_tokens");
  const known = [...Object.keys(TAGS), ...[...tags.keys()].filter((tag) => !(tag in TAGS))].filter((tag) =>
    tags.has(tag),
  );
  const stages = STAGES.filter((stage) => says.some((row) => row.stage === stage));
  const references = stages.filter((stage) => stage === "base" || stage === "prompted");
  const form = el(
    "form",
    { class: "controls", role: "search", "aria-label": "Completions", onsubmit: (event) => event.preventDefault() },
    field(
      "search",
      "Search",
      el("input", { type: "search", name: "search", id: "by-search", autocomplete: "off", spellcheck: "false" }),
    ),
    choice("arm", "Arm", [
      ["", "any"],
      ...data.arms.map((arm) => ["=" + arm, arm]),
      ...references.map((stage) => [stage, stage]),
    ]),
    choice("round", "Round", [["", "any"], ...rounds.map((round) => [round, "r" + round])]),
    choice("stage", "Stage", [["", "any"], ...stages.map((stage) => [stage, stage])]),
    choice("judgement", "Judgement", [
      ["", "any"],
      ...known.map((tag) => [tag, `${TAGS[tag] || "dropped: " + tag} (${tags.get(tag)})`]),
      ["-", "not judged"],
    ]),
    choice("pool", "Prompts", [
      ["", "all"],
      ["held out", "held out"],
      ["training", "for training"],
    ]),
    choice("sort", "Sort by", [
      ["", "prompt"],
      ...scores.flatMap((name) => [
        ["score:" + name + ":down", (SCORES[name] || name) + ", highest first"],
        ["score:" + name + ":up", (SCORES[name] || name) + ", lowest first"],
      ]),
      ["tokens::down", "longest first"],
      ["tokens::up", "shortest first"],
      ["round::down", "latest round first"],
    ]),
    choice("view", "Show", [
      ["prompt", "by prompt"],
      ["list", "as a list"],
    ]),
    el("button", { type: "reset" }, "Clear"),
  );
  form.addEventListener("input", changed);
  form.addEventListener("reset", () => setTimeout(changed));
  return form;
}
