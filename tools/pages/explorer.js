// The images of a run. Captions are what models wrote: they become text nodes, never markup.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const STEP = 48; // cards that are drawn at a time
const state = { evaluation: 0, rung: 0, label: "", show: "all", sort: "index", shown: STEP };
const at = id => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter(child => child !== null));
  return node;
};
const here = () => data[state.evaluation];
const under = (image, rung) => image.under[rung] || null;
const share = (image, seen) => seen.labels.filter(label => label === image.label).length / seen.labels.length;
const kind = (image, seen) => !seen ? "" : share(image, seen) === 1 ? "all" : share(image, seen) === 0 ? "none" : "some";
const SIGN = { all: "✓", some: "~", none: "✕", "": "·" };
const WORDS = { all: "right in every draw", some: "right in some draws", none: "wrong in every draw", "": "not run" };
const breaker = image => { // the mildest attack under which some draw is wrong
  const first = here().rungs.findIndex((_, rung) => under(image, rung) && kind(image, under(image, rung)) !== "all");
  return first < 0 ? here().rungs.length : first;
};
const SHOW = {
  all: ["all images", () => true],
  caption: ["caption right, LGAP wrong", (image, seen) => seen && seen.named && share(image, seen) < 0.5],
  wrong: ["LGAP wrong in most draws", (image, seen) => seen && share(image, seen) < 0.5],
  changed: ["caption changed by the attack", (image, seen) => seen && seen.caption !== image.under[0]?.caption],
  stands: ["right under every attack it met", image => breaker(image) === here().rungs.length],
};
const SORT = {
  index: ["number in the data set", (a, b) => a.index - b.index],
  breaks: ["what breaks it first", (a, b) => breaker(a) - breaker(b) || a.index - b.index],
  strong: ["what breaks it last", (a, b) => breaker(b) - breaker(a) || a.index - b.index],
  label: ["class", (a, b) => a.label - b.label || a.index - b.index],
};
const judged = (right, text) => make("span", { class: right ? "right" : "wrong" }, `${text} ${right ? "✓" : "✕"}`);
const labels = (image, seen) => { // one for each draw; equal ones are counted
  const count = new Map(), out = make("span");
  for (const label of seen.labels) count.set(label, 1 + (count.get(label) || 0));
  for (const [label, n] of count) out.append(out.childNodes.length ? ", " : "", judged(label === image.label, here().classes[label]), ` in ${n} of ${seen.labels.length}`);
  return out;
};
const caption = seen => judged(seen.named, `“${seen.caption || "(no caption)"}”`);
const picture = (sheet, place, alt) => {
  if (!sheet || place === undefined) return null;
  const { columns, rows } = sheet, x = place % columns, y = Math.floor(place / columns);
  const where = (k, n) => n > 1 ? `${100 * k / (n - 1)}%` : "0";
  const look = `background-image: url("${sheet.file}"); background-size: ${100 * columns}% ${100 * rows}%; background-position: ${where(x, columns)} ${where(y, rows)}`;
  return make("figure", {}, make("span", { class: "picture", role: "img", "aria-label": alt, style: look }), make("figcaption", {}, alt));
};
const pictures = (image, rung) => {
  const out = make("div", { class: "pictures" }), { rungs, sheet } = here(), seen = under(image, rung);
  for (const each of [picture(sheet, image.place, "clean"), rung && seen ? picture(rungs[rung].sheet, seen.place, "attacked") : null,
    seen ? picture(rungs[rung].purified, seen.place, "purified") : null]) if (each) out.append(each);
  return out.childNodes.length ? out : null;
};
const line = (key, ...rest) => make("p", {}, make("span", { class: "key" }, `${key} `), ...rest);
const cells = (image, rung) => make("div", { class: "rungs", role: "list" }, ...here().rungs.map((each, k) => {
  const of = kind(image, under(image, k)), text = `${each.name}: ${WORDS[of]}`;
  return make("span", { class: `rung ${of} ${k === rung ? "now" : ""}`, role: "listitem", title: text, "aria-label": text }, SIGN[of]);
}));
const card = (image, list) => {
  const rung = state.rung, seen = under(image, rung), clean = under(image, 0), name = here().rungs[rung].name;
  return make("article", { class: "card" },
    make("h3", {}, `${image.index}: ${here().classes[image.label]}`), pictures(image, rung),
    clean && line("caption, clean:", caption(clean)),
    rung && seen ? line("caption, attacked:", caption(seen)) : null,
    seen ? line(`LGAP under ${name}:`, labels(image, seen)) : line(`not run under ${name}`),
    cells(image, rung), make("button", { type: "button", onclick: () => open(image, list) }, "All attacks on this image"));
};
const open = (image, list) => {
  const dialog = at("detail"), place = list.indexOf(image);
  const step = by => make("button", { type: "button", disabled: !list[place + by], onclick: () => open(list[place + by], list) }, by < 0 ? "← Previous" : "Next →");
  const body = make("tbody", {}, ...here().rungs.map((rung, k) => {
    const seen = under(image, k), of = kind(image, seen);
    return make("tr", {}, make("td", {}, make("span", { class: `rung ${of}`, title: WORDS[of] }, SIGN[of]), ` ${rung.name}`), seen
      ? make("td", {}, pictures(image, k) || "", line("caption:", caption(seen)), line("LGAP, draw by draw:", seen.labels.map(label => here().classes[label]).join(", ")),
        seen.undefended === null ? null : line("undefended:", judged(seen.undefended === image.label, here().classes[seen.undefended])),
        make("details", {}, make("summary", {}, "protocol"), rung.protocol))
      : make("td", {}, "not run on this image"));
  }));
  dialog.replaceChildren(make("div", { class: "bar" }, make("strong", {}, `Image ${image.index}: ${here().classes[image.label]}`),
    make("span", {}, step(-1), " ", step(1), " ", make("button", { type: "button", onclick: () => dialog.close() }, "Close"))),
  make("table", {}, make("thead", {}, make("tr", {}, make("th", {}, "attack"), make("th", {}, "what LGAP made of it"))), body));
  if (!dialog.open) dialog.showModal();
  dialog.focus();
  dialog.onkeydown = event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && list[place + by]) open(list[place + by], list);
  };
};
const draw = () => {
  const { images, rungs } = here();
  const keep = image => (state.label === "" || image.label === Number(state.label)) && SHOW[state.show][1](image, under(image, state.rung));
  const list = images.filter(keep).sort(SORT[state.sort][1]);
  at("cards").replaceChildren(...list.slice(0, state.shown).map(image => card(image, list)));
  const ran = images.filter(image => under(image, state.rung)).length;
  at("count").textContent = `${list.length} of ${images.length} images; ${rungs[state.rung].name} was run on ${ran}, and leaves ${rungs[state.rung].stands}`;
  at("more").hidden = list.length <= state.shown;
};
const choose = (name, title, options) => make("label", {}, title, make("select", {
  id: name, onchange: event => { state[name] = ["evaluation", "rung"].includes(name) ? Number(event.target.value) : event.target.value;
    state.shown = STEP; if (name === "evaluation") { state.rung = 0; state.label = ""; controls(); } draw(); },
}, ...options.map(([value, text]) => make("option", { value, selected: String(value) === String(state[name]) }, text))));
const controls = () => at("controls").replaceChildren(
  choose("evaluation", "evaluation", data.map((each, k) => [k, each.title])),
  choose("rung", "attack", here().rungs.map((rung, k) => [k, `${rung.name} (n = ${rung.n})`])),
  choose("label", "class", [["", "all"], ...here().classes.map((name, k) => [k, name])].filter(([k]) => k === "" || here().images.some(image => image.label === k))),
  choose("show", "show", Object.entries(SHOW).map(([name, [text]]) => [name, text])),
  choose("sort", "sort by", Object.entries(SORT).map(([name, [text]]) => [name, text])));
if (data.length) {
  state.rung = Math.min(1, here().rungs.length - 1);
  at("more").addEventListener("click", () => { state.shown += STEP; draw(); });
  controls();
  draw();
}
