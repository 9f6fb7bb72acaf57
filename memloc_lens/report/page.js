"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const nonce = document.currentScript.nonce;
const dark = matchMedia("(prefers-color-scheme: dark)");

// Libraries are text until they are needed, so that the page is painted first.
function need(name) {
  const held = document.getElementById(`library-${name}`);
  if (!held) return;
  const script = document.createElement("script");
  script.nonce = nonce;
  script.textContent = held.textContent;
  held.remove();
  document.head.append(script);
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Tables

function sortBy(button) {
  const heading = button.closest("th");
  const table = heading.closest("table");
  const column = heading.cellIndex;
  const descending = heading.getAttribute("aria-sort") !== "descending" && column > 0 || heading.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const key = row => column ? parseFloat(row.cells[column].dataset.value ?? "nan") : row.cells[0].textContent;
  const rows = [...table.tBodies[0].querySelectorAll("tr.method")];
  rows.sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
    return (a < b ? -1 : a > b ? 1 : 0) * (descending ? -1 : 1);
  });
  const published = new Map([...table.tBodies[0].querySelectorAll("tr.published")].map(row => [row.previousElementSibling, row]));
  for (const row of rows) table.tBodies[0].append(row, ...(published.has(row) ? [published.get(row)] : []));
}

for (const button of document.querySelectorAll("table.sortable th button")) button.addEventListener("click", () => sortBy(button));

// Pictures

function colours() {
  const style = getComputedStyle(document.documentElement);
  const [ink, soft, line] = ["--ink", "--soft", "--line"].map(name => style.getPropertyValue(name).trim());
  const axis = {gridcolor: line, linecolor: line, zerolinecolor: line};
  return {"font.color": ink, "title.subtitle.font.color": soft, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    ...Object.fromEntries(["xaxis", "yaxis"].flatMap(name => Object.entries(axis).map(([key, value]) => [`${name}.${key}`, value])))};
}

function draw(place) {
  if (place.dataset.drawn) return;
  place.dataset.drawn = "yes";
  need("plotly");
  const figure = data[place.closest(".run").dataset.run].figures[place.dataset.figure];
  const layout = {...figure.layout, autosize: true, width: undefined, height: undefined};
  Plotly.newPlot(place, figure.data, layout, {responsive: true, displaylogo: false, topojsonURL: ""}).then(() => Plotly.relayout(place, colours()));
}

const plots = [...document.querySelectorAll(".plot")];
const seen = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
}, {rootMargin: "300px"});
requestAnimationFrame(() => setTimeout(() => plots.forEach(place => seen.observe(place))));
dark.addEventListener("change", () => plots.filter(place => place.dataset.drawn).forEach(place => Plotly.relayout(place, colours())));
addEventListener("beforeprint", () => plots.forEach(draw));

// Sequences

let count = 0;

// circuitsvis reads a token as HTML, and draws its line breaks
const escaped = text => text.replace(/[&<>"']/g, character => `&#${character.charCodeAt(0)};`);

function coloured(tokens, percent) {
  need("circuitsvis");
  const place = element("div", "tokens");
  place.id = `tokens-${count++}`;
  // it looks for the element in the document
  queueMicrotask(() => CircuitsVis.render(place.id, CircuitsVis.ColoredTokens,
    {tokens: tokens.map(escaped), values: percent, minValue: 0, maxValue: 100, positiveColor: "#9bd0f5"}));
  return place;
}

function marked(text, ranges) {
  const place = element("p", "written");
  const characters = Array.from(text);
  let at = 0;
  for (const [start, stop] of ranges) {
    place.append(characters.slice(at, start).join(""), element("mark", "", characters.slice(start, stop).join("")));
    at = stop;
  }
  place.append(characters.slice(at).join(""));
  return place;
}

function numbers(card, after) {
  const box = element("details");
  box.append(element("summary", "", "The numbers"));
  const scroll = element("div", "scroll");
  const table = element("table");
  const head = table.createTHead().insertRow();
  for (const heading of ["token", "before, %", "after, %"]) { const cell = element("th", "", heading); cell.scope = "col"; head.append(cell); }
  const body = table.createTBody();
  card.suffix.forEach((token, index) => {
    const row = body.insertRow();
    for (const value of [token, card.before.percent[index], after.percent[index]]) row.insertCell().textContent = value;
  });
  scroll.append(table);
  box.append(scroll);
  return box;
}

function state(title, card, values) {
  const part = element("section");
  part.append(element("h5", "", `${title}: probability of each token`), coloured(card.suffix, values.percent));
  part.append(element("h5", "", `${title}: what the model writes`), marked(values.written, values.wrong));
  return part;
}

const signed = (value, digits = 1) => value === null ? "" : `${value > 0 ? "+" : ""}${value.toFixed(digits)}`;

function fill(place, card, after) {
  const body = place.querySelector(".body");
  body.replaceChildren(element("h5", "", "Prompt"), element("p", "prompt", card.prompt.join("")));
  if (!card.before.percent || !after?.percent) {
    body.append(element("p", "note", "The run did not record what the model writes; run DEL again in a new folder."));
    return;
  }
  body.append(state("Before", card, card.before), state("After", card, after), numbers(card, after));
}

function filter(form, cards, matches) {
  let shown = 0;
  for (const card of cards) {
    card.hidden = !matches(card);
    shown += !card.hidden;
  }
  form.querySelector(".count").textContent = `${shown} of ${cards.length} shown`;
}

for (const run of document.querySelectorAll(".run")) {
  for (const form of run.querySelectorAll(".filters")) {
    form.addEventListener("submit", event => event.preventDefault());
    const cards = [...form.nextElementSibling.children];
    const [search, method, ratio] = ["search", "method", "ratio"].map(name => form.querySelector(`.${name}`));
    const sequences = Boolean(ratio);
    const content = card => data[run.dataset.run].cards[card.dataset.card];
    // methods are told apart by their place: a name may be shown with characters escaped
    const after = card => { const states = content(card).after[Object.keys(content(card).after)[method.selectedIndex]]; return states && states[ratio.value]; };
    const words = new Map(cards.map(card => [card, (sequences ? [content(card).id, content(card).category, ...content(card).prompt, ...content(card).suffix].join("") : card.textContent).toLowerCase()]));
    const refresh = () => {
      filter(form, cards, card => words.get(card).includes(search.value.toLowerCase())
        && (sequences || !method.value || card.dataset.methods[method.selectedIndex - 1] === "1"));
      if (!sequences) return;
      for (const card of cards) {
        const values = after(card);
        card.querySelector(".changes").textContent = values ? `self ${signed(values.self)}, others ${signed(values.neg)} points` : "";
        if (card.open) fill(card, content(card), values);
      }
    };
    for (const control of [search, method, ratio]) control?.addEventListener("input", refresh);
    if (sequences) for (const card of cards) card.addEventListener("toggle", () => card.open && fill(card, content(card), after(card)));
    refresh();
  }
}
