"use strict";
// The completion viewer. Completions are untrusted text: what comes from the data goes into the page as text nodes and
// attribute values, never as markup.

const byId = (id) => document.getElementById(id);

function make(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// ---- words and numbers

const REASONS = ["kept", "m_F beyond its bound", "m_H beyond its bounds", "m_F and m_H beyond their bounds",
  "not by a bound on this token's own shifts"];
const SIGNS = ["", "F", "H", "F H", "x"];

function number(value, signed = false) {
  if (value === null || value === undefined) return "not recorded";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e6) ? size.toExponential().replace("e+", "e") : String(size);
  return (value < 0 ? "-" : signed && value > 0 ? "+" : "") + text;
}

// A character that would not be seen, or would change what is around it, as a sign for it.
function visible(character) {
  const code = character.codePointAt(0);
  if (character === " ") return "·";
  if (character === "\n") return "⏎";
  if (character === "\t") return "⇥";
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

function showText(node, text, plain = "") {
  for (const part of text.split(/([\p{C}\p{Z}])/u).filter(Boolean))
    node.append(/^[\p{C}\p{Z}]$/u.test(part) && !plain.includes(part) ? make("i", {}, visible(part)) : part);
  return node;
}

// ---- colours: a few steps with edges, so that the legend can say what each means

const PROBABILITIES = [0.01, 0.1, 0.5, 0.9];
const reached = (edges, value) => edges.filter((edge) => value >= edge).length;

const level = {
  policy: (value) => reached(data.edges.policy, value ?? 0),
  objective: (value) => Math.sign(value ?? 0) * reached(data.edges.objective, Math.abs(value ?? 0)),
  probability: (value) => (value === undefined || value === null ? 0 : 5 - reached(PROBABILITIES, value)),
};

function swatch(kind, step, text) {
  return make("span", { class: "swatch", [`data-${kind}`]: step }, text);
}

function drawLegend(kind, run) {
  const parts = [];
  if (kind === "policy") {
    const edges = data.edges.policy.map((edge) => number(edge));
    parts.push("m_F, nats: ", swatch(kind, 0, `below ${edges[0]}`), ...edges.map((edge, i) => swatch(kind, i + 1, `≥ ${edge}`)));
  } else if (kind === "objective") {
    const edges = data.edges.objective.map((edge) => number(edge));
    const below = edges.map((edge, i) => swatch(kind, -i - 1, `≤ -${edge}`)).reverse();
    parts.push("m_H, reward units: ", ...below, swatch(kind, 0, "between"), ...edges.map((edge, i) => swatch(kind, i + 1, `≥ ${edge}`)));
  } else if (kind === "probability") {
    parts.push("probability when sampled: ");
    ["≥ 0.9", "≥ 0.5", "≥ 0.1", "≥ 0.01", "< 0.01"].forEach((text, i) => parts.push(swatch(kind, i + 1, text)));
  }
  const sample = make("del", { class: "token", "data-by": "F" }, "token");
  parts.push(make("span", { class: "key" }, sample, " rejected, by its m_F (F), its m_H (H) or otherwise (x)"));
  const [policy, low, high] = run.bounds ?? [];
  if (run.bounds) parts.push(make("span", { class: "key" },
    `bounds of this run: m_F < ${policy === null ? "∞" : number(policy)}, `
    + `${low === null ? "-∞" : number(low)} < m_H < ${high === null ? "∞" : number(high)}`));
  byId("legend").replaceChildren(...parts);
}

// ---- one completion

function tokenNode(row, place) {
  const [id, text] = data.tokens[row.tokens[place]];
  const reason = Number(row.rejected[place] ?? 0);
  const node = make(reason ? "del" : "span", {
    class: "token", dir: "auto", tabindex: place ? -1 : 0, "data-place": place, "data-by": SIGNS[reason] || null,
    "data-policy": level.policy(row.policy[place]), "data-objective": level.objective(row.objective[place]),
    "data-probability": level.probability(row.probability[place]),
  });
  return showText(node, text ?? String(id));
}

function completionNode(row, place) {
  const rejected = [...row.rejected].filter((code) => code !== "0").length;
  const facts = make("p", { class: "facts" },
    make("b", { class: row.right ? "right" : "wrong" }, row.right ? "✓ correct" : "✗ wrong"),
    row.truncated ? make("b", { class: "cut" }, "✂ truncated") : "",
    make("span", {}, `reward ${number(row.reward)}`), make("span", {}, `advantage ${number(row.advantage, true)}`),
    make("span", {}, `${row.length} tokens, ${rejected} rejected`));
  const text = make("div", { class: hasTexts(row) ? "text" : "text ids", role: "group", "data-row": place,
    "aria-label": "Tokens of the completion; arrow keys go from one to the next" });
  row.tokens.forEach((token, i) => {
    text.append(tokenNode(row, i), ...((data.tokens[token][1] ?? "").includes("\n") ? [make("br", {})] : []));
  });
  const cut = row.tokens.length < row.length ? `The first ${row.tokens.length} of ${row.length} tokens.` : "";
  const whole = row.text === null ? [] : [showText(make("p", { class: "whole", dir: "auto" }), row.text, " \n")];
  return make("article", { class: "completion" }, facts, text, make("p", { class: "note" }, cut), ...whole);
}

// ---- the page of one step

const data = JSON.parse(byId("viewer-data").textContent);
const current = () => data.runs[byId("run").value];
const currentStep = () => current().steps[byId("step").value];
let stepShown = 0; // so that another run opens at the nearest step
const tint = () => document.querySelector("#tint input:checked").value;
const hasTexts = (row) => row.tokens.every((token) => data.tokens[token][1] !== null);
const texts = (row) => row.text ?? row.tokens.map((token) => data.tokens[token][1] ?? "").join("");

function wanted(row) {
  const [prompt, , family] = data.prompts[row.prompt];
  const searched = byId("search").value.toLowerCase();
  return (!byId("only-rejected").checked || /[^0]/.test(row.rejected))
    && (!byId("only-wrong").checked || !row.right)
    && (!byId("family").value || family === byId("family").value)
    && (!searched || `${prompt}\n${texts(row)}`.toLowerCase().includes(searched));
}

function render() {
  const rows = currentStep().rows;
  const shown = [...rows.keys()].filter((place) => wanted(rows[place]));
  const groups = Map.groupBy(shown, (place) => rows[place].prompt);
  byId("prompts").replaceChildren(...[...groups].map(([prompt, places]) => {
    const [question, answer, family] = data.prompts[prompt];
    return make("section", { class: "prompt" },
      showText(make("h3", { dir: "auto" }), question.trim(), " \n"),
      make("p", { class: "note" }, `right answer: ${answer}`, family ? ` · family: ${family}` : ""),
      make("div", { class: "side-by-side" }, ...places.map((place) => completionNode(rows[place], place))));
  }));
  const codes = shown.map((place) => rows[place].rejected).join("");
  const rejected = codes.replaceAll("0", "").length;
  byId("count").textContent = `${shown.length} of ${rows.length} completions shown; ${rejected} of `
    + `${codes.length} tokens in them rejected${codes.length ? ` (${(100 * rejected / codes.length).toFixed(1)} %)` : ""}. `
    + `In this file: ${current().note}.`
    + (rows.every(hasTexts) ? "" : " This run logged no token texts: token ids are in their place, the text is below them.");
  stepShown = currentStep().step;
  byId("previous").disabled = Number(byId("step").value) === 0;
  byId("next").disabled = Number(byId("step").value) === current().steps.length - 1;
}

function recolour() {
  byId("prompts").dataset.tint = tint();
  drawLegend(tint(), current());
}

function chooseRun() {
  const steps = current().steps.map((each) => each.step);
  byId("step").replaceChildren(...steps.map((each, i) => make("option", { value: i }, each)));
  const nearest = steps.reduce((best, each, i) => (Math.abs(each - stepShown) < Math.abs(steps[best] - stepShown) ? i : best), 0);
  byId("step").value = nearest;
  recolour();
  render();
}

function move(by) {
  byId("step").selectedIndex += by;
  render();
}

// ---- a token's numbers

function showTip(token) {
  const row = currentStep().rows[token.parentNode.dataset.row];
  const place = Number(token.dataset.place);
  const [id, text] = data.tokens[row.tokens[place]];
  const reason = Number(row.rejected[place] ?? 0);
  const lines = [
    `id ${id}`,
    `m_F ${number(row.policy[place])} nats`,
    `m_H ${number(row.objective[place], true)} reward units`,
    `probability when sampled ${number(row.probability[place])}`,
    reason ? `rejected: ${REASONS[reason]}` : "kept",
  ];
  const tip = byId("tip");
  tip.replaceChildren(showText(make("b", { dir: "auto" }), text ?? ""), ...lines.map((line) => make("div", {}, line)));
  tip.hidden = false;
  const box = token.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${box.bottom + tip.offsetHeight + 8 > innerHeight ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`;
  token.setAttribute("aria-describedby", "tip");
}

function hideTip() {
  byId("tip").hidden = true;
}

// The token under the pointer, else the one with the focus: a page that scrolls under a resting pointer hides nothing.
function tipFor(node) {
  const token = node?.closest("[data-row] .token") ?? document.activeElement.closest("[data-row] .token");
  if (token) showTip(token);
  else hideTip();
}

// One stop of the tab key a completion; inside it the arrow keys move.
function moveFocus(event) {
  const token = event.target.closest(".token");
  const siblings = token ? [...token.parentNode.querySelectorAll(".token")] : [];
  const places = { ArrowRight: +token?.dataset.place + 1, ArrowLeft: token?.dataset.place - 1, Home: 0, End: siblings.length - 1 };
  const next = siblings[places[event.key]];
  if (!next) return;
  event.preventDefault();
  token.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function start() {
  byId("run").append(...data.runs.map((run, i) => make("option", { value: i }, run.label)));
  const families = [...new Set(data.prompts.map(([, , family]) => family))].filter(Boolean).sort();
  byId("family").append(...families.map((family) => make("option", { value: family }, family)));
  byId("run").addEventListener("change", chooseRun);
  byId("tint").addEventListener("change", recolour);
  byId("previous").addEventListener("click", () => move(-1));
  byId("next").addEventListener("click", () => move(1));
  for (const id of ["step", "only-rejected", "only-wrong", "family"]) byId(id).addEventListener("change", render);
  byId("search").addEventListener("input", render);
  const prompts = byId("prompts");
  prompts.addEventListener("mouseover", (event) => tipFor(event.target));
  prompts.addEventListener("mouseleave", () => tipFor(null));
  prompts.addEventListener("focusin", (event) => tipFor(event.target));
  prompts.addEventListener("focusout", hideTip);
  prompts.addEventListener("keydown", moveFocus);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
  chooseRun();
  byId("viewer").hidden = false;
}

start();
