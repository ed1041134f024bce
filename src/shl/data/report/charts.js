// Line charts as inline SVG, drawn anew for every width. Each is one stop of the keyboard; arrow keys visit its points.

const HEIGHT = 230,
  TOP = 12,
  BOTTOM = 34,
  LEFT = 48;
const tip = document.getElementById("tip"),
  live = document.getElementById("live");

// spec: {title, note, x: {low, high, ticks: [[at, label]], label}, y: {low, high, log, kind}, series, levels}
// series: {arm, hollow, opacity, line, label, points: [{x, y, low, high, head, lines, silent}]}
// levels: {name, y, dashed, lines}
function chart(spec) {
  const picture = el("div", {
    class: "picture",
    tabindex: "0",
    role: "group",
    "aria-roledescription": "chart",
    "aria-label": plain(spec.title) + ". Arrow keys move between its points.",
  });
  const state = { spec, picture, at: -1, spots: [] };
  new ResizeObserver((seen) => draw(state, Math.round(seen[0].contentRect.width))).observe(picture);
  picture.addEventListener("pointermove", (event) => near(state, event));
  picture.addEventListener("pointerdown", (event) => near(state, event));
  picture.addEventListener("pointerleave", () => leave(state));
  picture.addEventListener("blur", () => leave(state));
  picture.addEventListener("keydown", (event) => step(state, event));
  return el(
    "figure",
    {},
    el("figcaption", {}, el("h3", {}, visible(spec.title)), spec.note ? el("p", {}, spec.note) : null),
    picture,
    numbers(spec),
  );
}

function draw(state, width) {
  if (!width || width === state.width) return;
  state.width = width;
  const { spec } = state;
  const right = Math.min(118, 22 + 6.7 * Math.max(2, ...labels(spec).map((label) => label.text.length)));
  const x = (value) => LEFT + ((value - spec.x.low) / (spec.x.high - spec.x.low || 1)) * (width - LEFT - right);
  const scale = spec.y.log ? Math.log : (value) => value;
  const [low, high] = [scale(spec.y.low), scale(spec.y.high)];
  const y = (value) =>
    HEIGHT -
    BOTTOM -
    ((scale(Math.min(Math.max(value, spec.y.low), spec.y.high)) - low) / (high - low || 1)) * (HEIGHT - BOTTOM - TOP);
  const root = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, "aria-hidden": "true" });
  axes(root, spec, x, y, width - right);
  for (const level of spec.levels || []) {
    root.append(
      svg("line", {
        class: "level" + (level.dashed ? " dashed" : ""),
        x1: LEFT,
        x2: width - right,
        y1: y(level.y),
        y2: y(level.y),
      }),
    );
  }
  state.spots = [];
  for (const one of spec.series) lineOf(root, one, x, y, state);
  for (const level of spec.levels || [])
    state.spots.push({ x: width - right, y: y(level.y), wide: true, point: { head: level.name, lines: level.lines } });
  write(root, labels(spec), y, width - right);
  state.ring = svg("circle", { class: "ring", r: 8, visibility: "hidden" });
  root.append(state.ring);
  state.picture.replaceChildren(root);
}

function axes(root, spec, x, y, end) {
  for (const [value, label] of ticks(spec.y)) {
    root.append(
      svg("line", { class: "grid", x1: LEFT, x2: end, y1: y(value), y2: y(value) }),
      svg("text", { class: "tick", x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, label),
    );
  }
  for (const [value, label] of spec.x.ticks) {
    root.append(svg("text", { class: "tick", x: x(value), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, label));
  }
  root.append(
    svg("line", { class: "axis", x1: LEFT, x2: end, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }),
    svg("text", { class: "tick", x: (LEFT + end) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, spec.x.label),
  );
}

// Round values between the ends: decades on a log scale, steps of 1, 2 or 5 else.
function ticks(axis) {
  if (axis.log) {
    const found = [];
    const few = axis.high / axis.low < 30;
    for (let decade = Math.floor(Math.log10(axis.low) + 1e-9); 10 ** decade <= axis.high * 1.001; decade++) {
      for (const digit of few ? [1, 1.5, 2, 3, 5] : [1]) {
        const value = digit * 10 ** decade;
        if (value >= axis.low * 0.999 && value <= axis.high * 1.001)
          found.push([
            value,
            (axis.floor && value <= axis.floor * 1.001 ? "\u2264" : "") + String(Number(value.toPrecision(2))),
          ]);
      }
    }
    return found;
  }
  const span = axis.high - axis.low || 1;
  const unit = 10 ** Math.floor(Math.log10(span / 4));
  const size = unit * [1, 2, 5, 10].find((factor) => span / (unit * factor) <= 5);
  const found = [];
  for (let value = Math.ceil(axis.low / size - 1e-9) * size; value <= axis.high + size * 1e-6; value += size) {
    const clean = Number(value.toPrecision(6)) || 0;
    found.push([clean, axis.kind === "share" ? Math.round(100 * clean) + "%" : minus(String(clean))]);
  }
  return found;
}

const shift = (arm) => 5 * (data.arms.indexOf(arm) - (data.arms.length - 1) / 2);

function lineOf(root, one, x, y, state) {
  const group = svg("g", { class: "series c" + colourOf(one.arm) });
  if (one.opacity) group.setAttribute("opacity", one.opacity);
  const points = one.points.filter((point) => !missing(point.y));
  const place = (point) => x(point.x) + (point.silent ? 0 : shift(one.arm)); // arms that coincide stay apart
  if (one.line !== false && points.length > 1) {
    const path = points
      .map((point, at) => (at ? "L" : "M") + place(point).toFixed(1) + "," + y(point.y).toFixed(1))
      .join("");
    group.append(svg("path", { class: "line", d: path }));
  }
  for (const point of points) {
    if (!missing(point.low))
      group.append(
        svg("line", { class: "whisker", x1: place(point), x2: place(point), y1: y(point.low), y2: y(point.high) }),
      );
  }
  for (const point of points) {
    if (!point.silent)
      group.append(
        svg("path", {
          class: "mark" + (one.hollow ? " hollow" : ""),
          d: shapeOf(one.arm),
          transform: `translate(${place(point).toFixed(1)},${y(point.y).toFixed(1)})`,
        }),
      );
    if (point.head) state.spots.push({ x: place(point), y: y(point.y), point });
  }
  root.append(group);
}

// Names at the ends of the lines: no legend to look up.
function labels(spec) {
  const ends = spec.series
    .filter((one) => one.label)
    .map((one) => {
      const last = one.points.filter((point) => !missing(point.y)).at(-1);
      return last ? { text: shorten(one.label, 14), y: last.y, arm: one.arm } : null;
    });
  return [
    ...ends.filter(Boolean),
    ...(spec.levels || []).map((level) => ({ text: level.name, y: level.y, arm: null })),
  ];
}

// Labels keep their order and do not overlap: pushed down from the top, then back up from the bottom.
function write(root, wanted, y, left) {
  const placed = wanted.map((label) => ({ ...label, at: y(label.y) })).sort((a, b) => a.at - b.at);
  const gap = 13;
  for (let i = 1; i < placed.length; i++) placed[i].at = Math.max(placed[i].at, placed[i - 1].at + gap);
  let limit = HEIGHT - BOTTOM - 1;
  for (const label of placed.toReversed()) {
    label.at = Math.min(label.at, limit);
    limit = label.at - gap;
  }
  for (const label of placed)
    root.append(svg("text", { class: "label c" + colourOf(label.arm), x: left + 12, y: label.at + 4 }, label.text));
}

function near(state, event) {
  const box = state.picture.getBoundingClientRect();
  const [px, py] = [event.clientX - box.left, event.clientY - box.top];
  const far = (spot) => Math.hypot(spot.wide ? 0.25 * (spot.x - px) : spot.x - px, spot.y - py);
  let best = -1;
  state.spots.forEach((spot, at) => {
    if (far(spot) < (best < 0 ? 40 : far(state.spots[best]))) best = at;
  });
  if (best < 0) leave(state);
  else point(state, best);
}

function step(state, event) {
  const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
  if (event.key === "Escape") leave(state);
  if (move === undefined || !state.spots.length) return;
  event.preventDefault();
  const count = state.spots.length;
  const next = Number.isFinite(move)
    ? state.at < 0
      ? move > 0
        ? 0
        : count - 1
      : (state.at + move + count) % count
    : move < 0
      ? 0
      : count - 1;
  point(state, next);
  live.textContent = [state.spots[next].point.head, ...state.spots[next].point.lines].map(plain).join(", ");
}

function point(state, at) {
  state.at = at;
  const spot = state.spots[at];
  state.ring.setAttribute("cx", spot.x);
  state.ring.setAttribute("cy", spot.y);
  state.ring.setAttribute("visibility", "visible");
  tip.replaceChildren(
    el("strong", {}, visible(spot.point.head)),
    ...spot.point.lines.map((line) => el("div", {}, visible(line))),
  );
  tip.hidden = false;
  const box = state.picture.getBoundingClientRect(),
    size = tip.getBoundingClientRect();
  const left = Math.min(
    Math.max(8, box.left + spot.x - size.width / 2),
    document.documentElement.clientWidth - size.width - 8,
  );
  const above = box.top + spot.y - size.height - 14;
  tip.style.left = left + "px";
  tip.style.top = (above > 8 ? above : box.top + spot.y + 16) + "px";
}

function leave(state) {
  state.at = -1;
  tip.hidden = true;
  if (state.ring) state.ring.setAttribute("visibility", "hidden");
}
addEventListener(
  "scroll",
  () => {
    tip.hidden = true;
  },
  { passive: true },
);

// The chart's numbers as a table, for those who cannot see or hover it.
function numbers(spec) {
  const points = [...spec.series.flatMap((one) => one.points), ...(spec.levels || [])].filter(
    (point) => point.head || point.name,
  );
  const items = points.map((point) =>
    el("li", {}, el("strong", {}, visible(point.head || point.name)), ": ", visible(point.lines.join(", "))),
  );
  return el("details", { class: "numbers" }, el("summary", {}, "Numbers"), el("ul", {}, items));
}
