// Elements, text and numbers. Text from the run enters the page through textContent and in no other way.

// Objects without a prototype: a metric or a tag may be called "constructor".
const bare = (value) => Object.assign(Object.create(null), value);
const data = JSON.parse(document.getElementById("data").textContent, (_, value) =>
  value !== null && typeof value === "object" && !Array.isArray(value) ? bare(value) : value,
);
const SVG = "http://www.w3.org/2000/svg";

// An element with attributes and children; a child that is a string becomes text, null is left out.
function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined)
      node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

// What a reader would not see or a terminal would obey: controls, direction marks, zero-width and private characters.
const UNSEEN = new RegExp(
  "[\\u0000-\\u0009\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f\\u2028-\\u202e" +
    "\\u2060-\\u206f\\ud800-\\udfff\\ufeff\\ufff9-\\ufffb\\u{e0000}-\\u{e007f}]",
  "u",
);

function named(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return "\u2421";
  return "\u27e8U+" + code.toString(16).toUpperCase().padStart(4, "0") + "\u27e9";
}

// Text as a fragment in which every unseen character is spelt out, and each occurrence of `wanted` is marked.
function visible(text, wanted = "") {
  const fragment = document.createDocumentFragment();
  let plain = "";
  const flush = () => {
    if (plain) fragment.append(...marked(plain, wanted));
    plain = "";
  };
  for (const character of String(text)) {
    if (!UNSEEN.test(character)) {
      plain += character;
      continue;
    }
    flush();
    const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    fragment.append(el("span", { class: "control", title: "U+" + code }, named(character)));
  }
  flush();
  return fragment;
}

function marked(text, wanted) {
  if (!wanted) return [text];
  const pieces = [];
  const low = text.toLowerCase();
  let at = 0;
  // a character whose lower case is longer would shift every place after it
  for (let hit = low.length === text.length ? low.indexOf(wanted) : -1; hit >= 0; hit = low.indexOf(wanted, at)) {
    pieces.push(text.slice(at, hit), el("mark", {}, text.slice(hit, hit + wanted.length)));
    at = hit + wanted.length;
  }
  pieces.push(text.slice(at));
  return pieces.filter((piece) => piece !== "");
}

// The same spelling for places that hold no elements: attributes, labels in a picture.
function plain(text) {
  return Array.from(String(text), (character) => (UNSEEN.test(character) ? named(character) : character)).join("");
}

function shorten(text, length) {
  const letters = Array.from(plain(text));
  return letters.length > length ? letters.slice(0, length - 1).join("") + "\u2026" : letters.join("");
}

const missing = (value) => value === null || value === undefined;

// A number as people write it; a share as a percentage.
function written(value, kind = "number") {
  if (missing(value)) return "\u2013";
  if (kind === "share") {
    const percent = 100 * value;
    return (
      (percent !== 0 && percent !== 100 && (percent < 1 || percent > 99) ? percent.toFixed(1) : percent.toFixed(0)) +
      "%"
    );
  }
  if (kind === "nats" || kind === "ppl")
    return minus(Math.abs(value) >= 1000 ? value.toPrecision(3) : value.toFixed(2));
  if (Number.isInteger(value)) return minus(String(value));
  const size = Math.abs(value);
  return minus(size >= 1000 || size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3))));
}

// A difference, with its sign; of shares in percentage points.
function signed(value, kind) {
  if (missing(value)) return "";
  const text = kind === "share" ? (100 * value).toFixed(0) + " pt" : value.toFixed(2);
  if (Number.parseFloat(text) === 0) return "\u00b10";
  return (value > 0 ? "+" : "") + minus(text);
}

const minus = (text) => text.replace("-", "\u2212");
const metricOf = (name) => data.metrics[name] || { short: name, kind: "number", better: "", meaning: "" };
const colourOf = (arm) => (data.arms.includes(arm) ? data.arms.indexOf(arm) % 7 : "ref");
const roundName = (round) => (missing(round) ? "" : "r" + round);

// The marker of an arm or a reference: shape and colour together, so that neither is needed alone.
const SHAPES = [
  "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
  "M-3.6,-3.6h7.2v7.2h-7.2z",
  "M0,-4.8l4.6,8h-9.2z",
  "M0,-5l5,5l-5,5l-5,-5z",
  "M0,4.8l4.6,-8h-9.2z",
  "M-1.6,-4.6h3.2v3h3v3.2h-3v3h-3.2v-3h-3v-3.2h3z",
  "M-4.4,-2.4l2,-2l2.4,2.4l2.4,-2.4l2,2l-2.4,2.4l2.4,2.4l-2,2l-2.4,-2.4l-2.4,2.4l-2,-2l2.4,-2.4z",
];
const shapeOf = (arm) => SHAPES[data.arms.includes(arm) ? data.arms.indexOf(arm) % SHAPES.length : 0];

function badge(arm, label = arm) {
  const mark = svg(
    "svg",
    { class: "badge c" + colourOf(arm), viewBox: "-6 -6 12 12", "aria-hidden": "true" },
    svg("path", { d: shapeOf(arm) }),
  );
  return el("span", { class: "arm" }, mark, el("span", {}, visible(label)));
}

function section(id, title, intro, ...children) {
  return el(
    "section",
    { id, "aria-labelledby": id + "-title" },
    el("h2", { id: id + "-title" }, title),
    intro ? el("p", { class: "intro" }, intro) : null,
    ...children,
  );
}
