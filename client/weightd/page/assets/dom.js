// Makes and replaces elements. Text is always text: nothing here parses HTML, for names may hold anything.

/** Makes an element. `attributes` may hold `class`, `on…` listeners, `data`, booleans; children are nodes or texts. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "data") Object.assign(made.dataset, value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/** Sets the text of an element, if it differs: what has not changed is not drawn again. */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Replaces an element's children if `key` differs from that of the last time. Returns whether it did. */
export function redraw(target, key, make) {
  if (target.drawnKey === key) return false;
  target.drawnKey = key;
  const focused = target.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  target.replaceChildren(...[make()].flat().filter(Boolean));
  if (focused !== undefined) target.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  return true;
}

/** A table with a caption that only screen readers read. Cells are texts, nodes, or {value, class, header}. */
export function plainTable(caption, heads, rows) {
  const cell = (content, tag = "td") => {
    const given = content !== null && typeof content === "object" && !(content instanceof Node);
    const { value, header, ...attributes } = given ? content : { value: content };
    return element(header ? "th" : tag, header ? { scope: "row", ...attributes } : attributes, value);
  };
  const head = heads.map((each) => {
    const { value, ...attributes } = typeof each === "string" ? { value: each } : each;
    return element("th", { scope: "col", ...attributes }, value);
  });
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {},
      element("caption", { class: "unseen" }, caption),
      element("thead", {}, element("tr", {}, head)),
      element("tbody", {}, rows.map((row) => element("tr", {}, row.map((content) => cell(content)))))));
}
