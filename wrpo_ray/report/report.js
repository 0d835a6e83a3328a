"use strict";
(() => {
  const element = document.getElementById("data");
  if (!element) return;
  const data = JSON.parse(element.textContent);
  const PAGE = 60, WORDS = 1200, ROLES = ["y_ws", "y_wt", "y_l"];
  const $ = (id) => document.getElementById(id);
  const number = (value) => value === null || value === undefined ? "–"
    : value && Math.abs(value) < 1e-4 ? value.toExponential(1).replaceAll("-", "−")
    : Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 }).replace("-", "−");
  const make = (tag, attributes, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
    made.append(...children.filter((child) => child !== null));
    return made;
  };
  const dot = (source) => {
    const made = make("span", { class: "dot", "aria-hidden": "true" });
    made.style.background = `var(--${data.colors[source] || "muted"})`;
    return made;
  };
  const last = (row) => row.messages.length ? row.messages[row.messages.length - 1].content : "";

  // --- which rows
  const rows = data.rows.map((row, index) => Object.assign(row, {
    index, words: [row.id, ...row.messages.map((m) => m.content), ...ROLES.map((r) => row[r] ? row[r].text : ""),
      ...row.candidates.map((c) => c[3] || "")].join("\n").toLowerCase(),
  }));
  const orders = {
    order: (row) => row.index,
    wide: (row) => -(row.target_margin ?? -Infinity),
    narrow: (row) => row.target_margin ?? Infinity,
    gain: (row) => -(row.source_margin ?? -Infinity),
    loss: (row) => row.source_margin ?? Infinity,
  };
  let found = rows, shown = PAGE, current = null;

  const filter = () => {
    const words = $("search").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const source = $("source").value, kind = $("kind").value, order = orders[$("order").value];
    found = rows.filter((row) =>
      (!source || (row.y_ws && row.y_ws.source === source)) && (!kind || row.kind === kind) &&
      words.every((word) => row.words.includes(word)));
    found = [...found].sort((a, b) => order(a) - order(b) || a.index - b.index);
    shown = PAGE;
    list();
    if (!found.includes(current)) show(found[0] || null);
  };

  const about = (row) => {
    const parts = [];
    if (row.y_ws && row.y_ws.source) parts.push(row.y_ws.source);
    if (row.target_margin !== null) parts.push(`margin ${number(row.target_margin)}`);
    if (row.kind !== "pair") parts.push(row.split === "sft" ? "SFT prompt" : "without a pair");
    return parts.join(" · ");
  };

  const list = () => {
    const items = found.slice(0, shown).map((row) => {
      const button = make("button", { type: "button", "data-index": row.index },
        make("span", { class: "prompt" }, last(row).slice(0, 300) || "(empty)"),
        make("span", { class: "about" }, row.y_ws ? dot(row.y_ws.source) : null, about(row)));
      if (row === current) button.setAttribute("aria-current", "true");
      return make("li", {}, button);
    });
    $("list").replaceChildren(...items);
    $("more").hidden = found.length <= shown;
    $("found").textContent = `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
  };

  // --- one row
  const split = (text) => {
    const words = text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) || [];
    return words.length > 5 ? words : [...text];
  };

  /** For each word of a, whether the longest common subsequence with b lacks it. */
  const lacking = (a, b) => {
    if (a.length > WORDS || b.length > WORDS) return null;
    const width = b.length + 1, best = new Uint16Array((a.length + 1) * width);
    for (let i = a.length - 1; i >= 0; i--)
      for (let j = b.length - 1; j >= 0; j--)
        best[i * width + j] = a[i] === b[j] ? best[(i + 1) * width + j + 1] + 1
          : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
    const own = new Array(a.length).fill(true);
    for (let i = 0, j = 0; i < a.length && j < b.length;) {
      if (a[i] === b[j]) { own[i++] = false; j++; }
      else if (best[(i + 1) * width + j] >= best[i * width + j + 1]) i++;
      else j++;
    }
    return own;
  };

  const text = (value, other) => {
    const box = make("div", { class: "text" });
    const words = other === null ? null : split(value), own = words && lacking(words, split(other));
    if (!own) { box.textContent = value || "(empty)"; return box; }
    for (let i = 0; i < words.length;) {
      let j = i;
      while (j < words.length && own[j] === own[i]) j++;
      const part = words.slice(i, j).join("");
      box.append(own[i] ? make("mark", {}, part) : part);
      i = j;
    }
    return box;
  };

  const answer = (row, role) => {
    const one = row[role];
    if (!one) return null;
    const against = $("diff").value, other = against && against !== role ? row[against] : null;
    const by = [one.source, one.sample === null ? null : `sample ${one.sample}`].filter((p) => p !== null);
    const box = make("section", { class: "answer", "aria-label": role },
      make("h4", {}, role, make("span", {}, one.reward === null ? "" : number(one.reward))),
      make("p", { class: "by" }, one.source ? dot(one.source) : null, by.join(", ")),
      text(one.text, other ? other.text : null));
    box.style.setProperty("--role", `var(--${role})`);
    return box;
  };

  const candidates = (row) => {
    if (!row.candidates.length) return null;
    const is = (c, one) => one && one.source === c[0] && one.sample === c[1];
    const sorted = [...row.candidates].sort((a, b) => (b[2] ?? -Infinity) - (a[2] ?? -Infinity));
    const body = sorted.map((c) => make("tr", {},
      make("th", { scope: "row" }, dot(c[0]), String(c[0]),
        ...ROLES.filter((r) => is(c, row[r])).map((r) => make("span", { class: "tag" }, r))),
      make("td", {}, String(c[1])), make("td", {}, number(c[2])),
      make("td", { class: "wrap text" }, c[3] === null ? "(text not read)" : c[3] || "(empty)",
        c[4] === "length" ? make("span", { class: "tag" }, "cut off") : null)));
    const head = make("tr", {}, ...["model", "sample", "reward", "answer"].map((name, i) =>
      make("th", i === 3 ? { scope: "col", class: "left" } : { scope: "col" }, name)));
    const table = make("table", {}, make("caption", {}, `All ${sorted.length} candidates, best first`),
      make("thead", {}, head), make("tbody", {}, ...body));
    return make("div", { class: "card scroll", tabindex: "0", role: "region", "aria-label": "Candidates" }, table);
  };

  const show = (row) => {
    current = row;
    for (const button of $("list").querySelectorAll("button"))
      if (row && Number(button.dataset.index) === row.index) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    if (!row) { $("detail").replaceChildren(make("p", { class: "quiet" }, "No row has all of this.")); return; }
    const turns = row.messages.map((m) => make("div", { class: "turn" },
      make("div", { class: "role" }, m.role), make("div", { class: "text" }, m.content)));
    const margins = [["y_ws − y_wt", row.source_margin], ["y_wt − y_l", row.target_margin]]
      .filter(([, value]) => value !== null).map(([name, value]) => `${name} ${number(value)}`).join(" · ");
    $("detail").replaceChildren(...[
      make("div", { class: "card" }, ...turns),
      margins ? make("p", { class: "quiet" }, `Rewards: ${margins}`) : null,
      make("div", { class: "answers" }, ...ROLES.map((role) => answer(row, role)).filter(Boolean)),
      candidates(row), make("p", { class: "quiet" }, `prompt ${row.id}`),
    ].filter(Boolean));
  };

  // --- hands
  for (const name of new Set(rows.map((row) => row.y_ws && row.y_ws.source).filter(Boolean)))
    $("source").append(make("option", { value: name }, name));
  for (const id of ["source", "kind", "order"]) $(id).addEventListener("change", filter);
  $("search").addEventListener("input", filter);
  $("diff").addEventListener("change", () => show(current));
  $("more").addEventListener("click", () => { shown += PAGE; list(); });
  $("list").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) show(rows[Number(button.dataset.index)]);
  });
  $("list").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const buttons = [...$("list").querySelectorAll("button")];
    const next = buttons[buttons.indexOf(document.activeElement) + step];
    if (next) { next.focus(); next.click(); }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || /INPUT|SELECT|TEXTAREA/.test(document.activeElement.tagName)) return;
    event.preventDefault();
    $("search").focus();
  });
  filter();

  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const a of links.values()) a.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-10% 0px -80% 0px" });
  for (const id of links.keys()) if ($(id)) seen.observe($(id));
})();
