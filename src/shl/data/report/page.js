// The page from top to bottom.

function head() {
  const about = [
    data.model && `model ${data.model}`,
    data.persona.name && `persona ${data.persona.name}`,
    data.seeds.length && `seed ${data.seeds.join(", ")}`,
    data.settings.split && `${data.settings.split} split`,
    data.settings.n && `${data.settings.n} vignettes`,
  ].filter(Boolean);
  const cards = data.headline.arms.map((one) =>
    el(
      "li",
      { class: "c" + colourOf(one.arm) },
      badge(one.arm, one.arm),
      missing(one.round) ? null : el("span", { class: "quiet" }, ` after round ${one.round}`),
      el("p", {}, visible(one.sentence)),
    ),
  );
  document
    .getElementById("top")
    .append(
      el(
        "p",
        { class: "eyebrow" },
        el("span", { class: "run" }, visible(data.run)),
        ...about.flatMap((text) => [" \u00b7 ", visible(text)]),
      ),
      el("h1", {}, visible(data.headline.title)),
      el("ul", { class: "headlines" }, cards),
    );
  document.title = `${plain(data.run)}: ${plain(data.headline.title)}`;
}

function notes() {
  if (!data.notes.length) return null;
  const items = data.notes.map((note) =>
    el(
      "li",
      {},
      el("code", {}, visible(note.file)),
      " ",
      visible(note.what),
      note.hint ? el("span", { class: "hint" }, " ", el("code", {}, visible(note.hint))) : null,
    ),
  );
  const count =
    data.notes.length === 1
      ? "One part of this run is missing or damaged"
      : `${data.notes.length} parts of this run are missing or damaged`;
  return el(
    "details",
    { class: "notice print", id: "notes", open: data.notes.length <= 4 },
    el("summary", {}, count),
    el("ul", {}, items),
  );
}

function summary() {
  const last = data.arms.flatMap((arm) =>
    data.scores.filter((row) => row.arm === arm && row.kind === "healed").slice(-1),
  );
  const rows = [...data.scores.filter((row) => row.kind === "base" || row.kind === "prompted"), ...last];
  const names = data.columns.slice(0, data.traits.length + 5);
  const persona = data.persona.pos
    ? el(
        "p",
        { class: "persona" },
        "Persona: \u201c",
        visible(data.persona.pos),
        "\u201d",
        data.persona.neg
          ? el("span", {}, " against \u201c", visible(data.persona.neg), "\u201d")
          : data.persona.neg === null
            ? " against no system message"
            : "",
      )
    : null;
  const all = data.columns.length
    ? el(
        "details",
        {},
        el("summary", {}, `Every evaluation, every metric (${data.scores.length} rows)`),
        scoreTable("Every evaluation", data.scores, data.columns),
      )
    : null;
  return section(
    "summary",
    "Last round against base and prompt",
    "Small numbers are differences to base. Prompted is the persona as a mere system prompt: what steering and " +
      "healing want to reach without one. An arm moved when the 95% intervals of its first trait and of base " +
      "lie apart.",
    persona,
    rows.length
      ? scoreTable("Last round of each arm", rows, names)
      : el("p", { class: "quiet" }, "Nothing was evaluated yet."),
    all,
    now(),
  );
}

// What it says now: the answers to one prompt, chosen by rule.
function now() {
  if (!data.typical) return null;
  const boxes = data.typical.answers.map((row) => el("div", { class: "cell" }, said(row, "")));
  return el(
    "div",
    { class: "now" },
    el("h3", {}, "What it says now"),
    el("p", { class: "ask" }, visible(data.prompts[data.typical.p].text)),
    el("div", { class: "grid free" }, boxes),
    el(
      "p",
      { class: "source" },
      "The held-out prompt whose answers lie nearest to the median perplexity of each arm\u2019s last round: " +
        "chosen by rule, not by eye.",
    ),
  );
}

function filter() {
  const arms = data.arms.map((arm) => {
    const entries = data.drops.filter((entry) => entry.arm === arm);
    return entries.length
      ? el(
          "details",
          { class: "print", open: data.arms.length === 1 || arm === data.arms[0] },
          el("summary", {}, badge(arm), ` ${entries.length} ${entries.length === 1 ? "round" : "rounds"}`),
          dropTable(arm, entries),
          ...dropSources(entries),
        )
      : null;
  });
  return section(
    "filter",
    "What the filter dropped",
    "A completion may have several reasons, so they can add up to more than was dropped.",
    ...(arms.some(Boolean) ? arms : [el("p", { class: "quiet" }, "There are no completions.")]),
  );
}

function provenance() {
  const groups = new Map();
  for (const one of data.artifacts) {
    const folder = one.file.split("/").slice(0, -1).join("/");
    groups.set(folder, [...(groups.get(folder) || []), one]);
  }
  const parts = [...groups.entries()].map(([folder, list]) =>
    el(
      "details",
      { class: "artifacts print", open: folder === "" || groups.size <= 3 },
      el(
        "summary",
        {},
        folder ? el("code", {}, visible(folder)) : "The run itself",
        el("span", { class: "quiet" }, ` ${list.length} ${list.length === 1 ? "artifact" : "artifacts"}`),
      ),
      ...list.map(artifact),
    ),
  );
  return section(
    "provenance",
    "Where everything came from",
    "Each artifact as shl info tells it: what it is, its digest, what it was made from, by which line, when.",
    ...(parts.length ? parts : [el("p", { class: "quiet" }, "There are no artifacts.")]),
  );
}

function artifact(one) {
  const made = Object.entries(one.from)
    .filter(([kind]) => kind !== "model")
    .map(([kind, digests]) => `${kind} ${digests.map(brief).join(", ")}`);
  return el(
    "details",
    { class: "artifact" },
    el(
      "summary",
      {},
      el("code", { class: "path" }, visible(one.file.split("/").at(-1))),
      el(
        "span",
        { class: "about" },
        visible(one.about || one.kind),
        made.length ? el("small", {}, visible("from " + made.join("; "))) : null,
      ),
      el("code", { class: "digest" }, visible(brief(one.digest))),
    ),
    el(
      "dl",
      { class: "made" },
      pair("what", one.kind),
      pair("digest", one.digest),
      ...Object.entries(one.from).map(([kind, digests]) => pair("from " + kind, digests.join("\n"))),
      pair("made by", one.argv.join(" ")),
      pair("at", one.created),
      pair("shl", [one.version, one.commit && "commit " + one.commit].filter(Boolean).join(", ")),
    ),
    el("pre", { tabindex: "0", "aria-label": "Everything shl info says" }, visible(one.lines.join("\n"))),
  );
}

const brief = (digest) => digest.replace(/^sha256:/, "").slice(0, 8);
const pair = (name, value) => (value ? el("div", {}, el("dt", {}, name), el("dd", {}, visible(value))) : null);

function build() {
  head();
  const sections = [notes(), summary(), trajectory(), coherence(), dose(), training(), diary(), filter(), provenance()];
  document.getElementById("main").append(...sections.filter(Boolean));
  const names = {
    summary: "Summary",
    trajectory: "Trait",
    coherence: "Coherence",
    dose: "Dose",
    training: "Training",
    diary: "What it says",
    filter: "Filter",
    provenance: "Provenance",
  };
  document.getElementById("contents").append(
    el(
      "ul",
      {},
      Object.entries(names).map(([id, name]) => el("li", {}, el("a", { href: "#" + id }, name))),
    ),
  );
  document
    .getElementById("end")
    .append(el("p", {}, `shl ${data.version}. One file, no network; everything in quotes was said by a model.`));
}

// Paper has no folds: what belongs on it is opened, and closed again afterwards.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details.print:not([open])")];
  for (const one of folded) one.open = true;
});
addEventListener("afterprint", () => {
  for (const one of folded) one.open = false;
});
build();
